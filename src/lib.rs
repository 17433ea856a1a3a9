//! libqblk: disk images and block devices inside your own process.
//!
//! Everything is a block device, and a block device is a row of bytes with a size. A file of the
//! host is one; a qcow2 image is one, standing on another. The layers, each of which knows only
//! those to its right: [`capi`] → [`image`] → [`layer`], [`plugin`], [`mod@format`] → [`mod@file`] →
//! [`block`].
//!
//! C programs use the functions of [`capi`] by include/qblk.h; Rust programs (the tool, the tests)
//! use [`Image`]. The design is told in docs/architecture.md.

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(missing_docs)]

pub mod block;
pub mod capi;
pub mod crypto;
pub mod file;
pub mod format;
pub mod image;
pub mod layer;
pub mod lockmgr;
pub mod log;
pub mod nbd;
pub mod plugin;
mod thread;

pub use block::{Error, Extent, OneIov, ReqFlags, Result};
pub use image::{Image, Info, OpenFlags, Options};
