//! Both ends of a session in memory, with certificates made for each test.

use super::*;
