//! NBD, in and out: an export opened like a file, and any device served from the process.
//!
//! Specification: doc/proto.md and doc/uri.md of the NBD project. [`proto`] is the wire and does no
//! I/O; `net` and `tls` carry bytes; `client` is a driver like those of files, `server` stands above
//! images.

pub mod client;
pub mod net;
pub mod proto;
pub mod server;
pub mod tls;
pub mod uri;
