//! The C ABI: the only room with `extern "C"`.
//!
//! Each function checks its arguments, calls [`crate::image`], and translates the answer; what is
//! common to all of them (the last error, panics, fork) is in `guard`. The names, the signatures
//! and the meanings are fixed by docs/abi.md. include/qblk.h is written from this room by cbindgen
//! (`make header`), and a comment here is the manual entry there, so it speaks C.

// The safety of each function is what its manual entry asks of a C program.
#![allow(clippy::missing_safety_doc, non_camel_case_types)]

mod guard;
mod life;
mod tell;

use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;

use crate::block::{Can, Extent, ReqFlags};
use crate::image::{Image, OpenFlags, Options, state};

// cbindgen reads them in this order, and so it is the header's.
mod version;
pub use version::*;
mod options;
pub use options::*;
mod open;
pub use open::*;
mod data;
pub use data::*;
mod info;
pub use info::*;
mod bitmap;
pub use bitmap::*;
mod images;
pub use images::*;
mod layers;
pub use layers::*;
mod check;
pub use check::*;
mod copy;
pub use copy::*;
mod amend;
pub use amend::*;
mod snapshots;
pub use snapshots::*;
mod server;
pub use server::*;
mod lockmgr;
pub use lockmgr::*;
mod plugin;
pub use plugin::*;
mod have;
pub use have::*;

/// The image contradicts its format.
pub const QBLK_ECORRUPT: c_int = -5001;
/// Not an image of that format.
pub const QBLK_EFORMAT: c_int = -5002;
/// The image needs a feature that this build lacks; qblk_get_error() names it.
pub const QBLK_EUNSUPPORTED: c_int = -5003;
/// Another process or handle has it.
pub const QBLK_ELOCKED: c_int = -5004;
/// The image is encrypted, and no key was given.
pub const QBLK_ENEEDKEY: c_int = -5005;
/// The key does not open the image.
pub const QBLK_EBADKEY: c_int = -5006;
/// An NBD peer broke the protocol.
pub const QBLK_EPROTO: c_int = -5007;
/// The open policy forbids it; qblk_get_error() says what would allow it.
pub const QBLK_EPOLICY: c_int = -5008;
/// A defect inside libqblk was met and contained. The device answers so from then on.
pub const QBLK_EINTERNAL: c_int = -5009;

/// qblk_open(): write too. Without it the file is opened read-only and nothing on disk changes.
pub const QBLK_OPEN_RDWR: u32 = 1;
/// qblk_open(): do not open what the image is backed by; its holes read as zeroes.
pub const QBLK_OPEN_NO_BACKING: u32 = 2;
/// qblk_open(): read the header and stop. Touches one file, takes no lock, works on images whose
/// features this build lacks; data calls answer -EBADF.
pub const QBLK_OPEN_INFO_ONLY: u32 = 4;
/// qblk_open(): the image is hostile. The option "format" must be given, nothing that the image
/// names is opened, limits are tight.
pub const QBLK_OPEN_UNTRUSTED: u32 = 8;
/// qblk_open(): read whatever others do meanwhile; what is read may change. Read-only opens only.
pub const QBLK_OPEN_SHARED: u32 = 16;
/// qblk_open(): no locks at all.
pub const QBLK_OPEN_NO_LOCK: u32 = 32;
/// qblk_open(): bypass the page cache (O_DIRECT). Any offset, count and memory still work.
pub const QBLK_OPEN_DIRECT: u32 = 64;
/// qblk_open(): for qblk_check() only. Opens images that are too damaged to be opened otherwise (marked
/// as corrupt, with a broken refcount table...), nothing but the image's own file, and needs no key.
/// Data calls answer -EBADF. With QBLK_OPEN_RDWR it can be repaired.
pub const QBLK_OPEN_CHECK: u32 = 128;

/// qblk_check(): give back space that nothing uses.
pub const QBLK_CHECK_REPAIR_LEAKS: u32 = 1;
/// qblk_check(): repair all that can be repaired.
pub const QBLK_CHECK_REPAIR_ALL: u32 = 3;

/// A request: return when this write is on stable storage.
pub const QBLK_REQ_FUA: u32 = 1;
/// A request: zeroing may leave a hole.
pub const QBLK_REQ_MAY_TRIM: u32 = 2;
/// A request: fail with -ENOTSUP at once rather than write zeroes.
pub const QBLK_REQ_FAST_ZERO: u32 = 4;

/// qblk_resize(): the new size may be less than the present one; the bytes beyond it are lost.
pub const QBLK_RESIZE_SHRINK: u32 = 1;

/// qblk_copy(): only what the source itself has, not what shows from images below it.
pub const QBLK_COPY_SHALLOW: u32 = 1;
/// qblk_commit(): the image keeps what it has.
pub const QBLK_COMMIT_KEEP: u32 = 1;
/// qblk_rebase(): only the name is changed, nothing is copied.
pub const QBLK_REBASE_UNSAFE: u32 = 1;

/// qblk_info.state: this handle does not write.
pub const QBLK_STATE_READ_ONLY: u32 = 1;
/// qblk_info.state: the image is marked as not closed cleanly.
pub const QBLK_STATE_DIRTY: u32 = 2;
/// qblk_info.state: the image is marked as corrupt.
pub const QBLK_STATE_CORRUPT: u32 = 4;
/// qblk_info.state: its data is encrypted.
pub const QBLK_STATE_ENCRYPTED: u32 = 8;
/// qblk_info.state: it names a backing image.
pub const QBLK_STATE_HAS_BACKING: u32 = 16;
/// qblk_info.state: its data lies in another file.
pub const QBLK_STATE_HAS_DATA_FILE: u32 = 32;
/// qblk_info.state: the format was found by probing.
pub const QBLK_STATE_PROBED: u32 = 64;
/// qblk_info.state: it is locked, by this handle or (QBLK_OPEN_INFO_ONLY) by anybody.
pub const QBLK_STATE_LOCKED: u32 = 128;
/// qblk_info.state: the medium turns.
pub const QBLK_STATE_ROTATIONAL: u32 = 256;

/// qblk_info.can_...: not at all.
pub const QBLK_CAN_NOT: u8 = 0;
/// qblk_info.can_...: by other requests.
pub const QBLK_CAN_EMULATE: u8 = 1;
/// qblk_info.can_...: by itself.
pub const QBLK_CAN_NATIVE: u8 = 2;

/// qblk_extent.flags: in this image, not in one below. Set for depth 0 only.
pub const QBLK_EXTENT_ALLOCATED: u32 = 1;
/// qblk_extent.flags: reads as zeroes.
pub const QBLK_EXTENT_ZERO: u32 = 2;
/// qblk_extent.flags: bytes are kept for it.
pub const QBLK_EXTENT_DATA: u32 = 4;
/// qblk_extent.flags: kept compressed.
pub const QBLK_EXTENT_COMPRESSED: u32 = 8;
/// qblk_extent.flags: host_offset is valid.
pub const QBLK_EXTENT_HOST: u32 = 16;
/// qblk_extent.flags, of qblk_extents2(): dirty in the bitmap that was asked for.
pub const QBLK_EXTENT_DIRTY: u32 = 32;

/// qblk_set_log(): something failed, and nobody could be told otherwise.
pub const QBLK_LOG_ERROR: c_int = 1;
/// qblk_set_log(): something is not as it should be.
pub const QBLK_LOG_WARN: c_int = 2;
/// qblk_set_log(): what is done, once per open or close.
pub const QBLK_LOG_INFO: c_int = 3;
/// qblk_set_log(): why it is done.
pub const QBLK_LOG_DEBUG: c_int = 4;
/// qblk_set_log(): every request.
pub const QBLK_LOG_TRACE: c_int = 5;

/// Size of a qblk_info in bytes, for ever.
pub const QBLK_INFO_SIZE: u32 = 256;

// The rooms below have these numbers in types of their own.
const _: () = {
    assert!(QBLK_OPEN_RDWR == OpenFlags::RDWR.0);
    assert!(QBLK_OPEN_NO_BACKING == OpenFlags::NO_BACKING.0);
    assert!(QBLK_OPEN_INFO_ONLY == OpenFlags::INFO_ONLY.0);
    assert!(QBLK_OPEN_UNTRUSTED == OpenFlags::UNTRUSTED.0);
    assert!(QBLK_OPEN_SHARED == OpenFlags::SHARED.0);
    assert!(QBLK_OPEN_NO_LOCK == OpenFlags::NO_LOCK.0);
    assert!(QBLK_OPEN_DIRECT == OpenFlags::DIRECT.0);
    assert!(QBLK_OPEN_CHECK == OpenFlags::CHECK.0);
    assert!(QBLK_REQ_FUA == ReqFlags::FUA.0);
    assert!(QBLK_REQ_MAY_TRIM == ReqFlags::MAY_TRIM.0);
    assert!(QBLK_REQ_FAST_ZERO == ReqFlags::FAST_ZERO.0);
    assert!(QBLK_STATE_READ_ONLY == state::READ_ONLY);
    assert!(QBLK_STATE_DIRTY == state::DIRTY);
    assert!(QBLK_STATE_CORRUPT == state::CORRUPT);
    assert!(QBLK_STATE_ENCRYPTED == state::ENCRYPTED);
    assert!(QBLK_STATE_HAS_BACKING == state::HAS_BACKING);
    assert!(QBLK_STATE_HAS_DATA_FILE == state::HAS_DATA_FILE);
    assert!(QBLK_STATE_PROBED == state::PROBED);
    assert!(QBLK_STATE_LOCKED == state::LOCKED);
    assert!(QBLK_STATE_ROTATIONAL == state::ROTATIONAL);
    assert!(QBLK_CAN_NOT == Can::Not as u8);
    assert!(QBLK_CAN_EMULATE == Can::Emulate as u8);
    assert!(QBLK_CAN_NATIVE == Can::Native as u8);
    assert!(QBLK_EXTENT_ALLOCATED == Extent::ALLOCATED);
    assert!(QBLK_EXTENT_ZERO == Extent::ZERO);
    assert!(QBLK_EXTENT_DATA == Extent::DATA);
    assert!(QBLK_EXTENT_COMPRESSED == Extent::COMPRESSED);
    assert!(QBLK_EXTENT_HOST == Extent::HOST);
    assert!(QBLK_EXTENT_DIRTY == Extent::DIRTY);
};

/// An open block device: a context, an independent way into a source of bytes.
///
/// Any number of threads may call on one handle at once, and their calls run side by side. Only
/// qblk_close() must be the last call on it.
pub struct qblk {
    image: Image,
    /// Shared by all contexts of the device: a call on one of them ended in a panic.
    broken: Arc<AtomicBool>,
    /// Opened by a plugin from within a call of it.
    inner: bool,
}

/// key=value settings for a call. docs/options.md lists the keys.
///
/// Any number of threads may use one at once. Only qblk_options_free() must be the last.
pub struct qblk_options(Mutex<Options>);

/// Receives messages; see qblk_set_log().
///
/// `message` is one line of UTF-8, valid during the call. The function may be called from any
/// thread, from several at once. It must return: neither throw a C++ exception nor longjmp().
pub type qblk_log_fn =
    Option<unsafe extern "C" fn(opaque: *mut c_void, level: c_int, message: *const c_char)>;

/// Is told how far long work is: `done` of `total`, in a unit of the work's own; `total` may grow.
///
/// What is returned decides: 0 = go on, anything else = stop, and the call answers -ECANCELED, with
/// the image whole. The function is called from one thread at a time, which need not be the caller's;
/// it must return (neither throw a C++ exception nor longjmp()) and call nothing on the same device.
pub type qblk_progress_fn =
    Option<unsafe extern "C" fn(opaque: *mut c_void, done: u64, total: u64) -> c_int>;
