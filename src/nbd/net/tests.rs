//! Sockets of this host.

use super::*;
