//! The server: open devices as NBD exports.
