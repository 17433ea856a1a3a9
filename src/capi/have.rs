//! One macro a function, so that a program can ask at compile time whether its header has it:
//! `#ifdef QBLK_HAVE_PWRITE2`. capi-tests/exports.sh checks that none is missing. (To ask the
//! library that is loaded there is `dlsym`.)

// A line each in the header: there is nothing to say that the name does not.
#![allow(missing_docs)]

pub const QBLK_HAVE_VERSION: u32 = 1;
pub const QBLK_HAVE_VERSION_STRING: u32 = 1;
pub const QBLK_HAVE_SUPPORTS: u32 = 1;
pub const QBLK_HAVE_STRERROR: u32 = 1;
pub const QBLK_HAVE_GET_ERROR: u32 = 1;
pub const QBLK_HAVE_SET_LOG: u32 = 1;
pub const QBLK_HAVE_OPTIONS_NEW: u32 = 1;
pub const QBLK_HAVE_OPTIONS_SET: u32 = 1;
pub const QBLK_HAVE_OPTIONS_FREE: u32 = 1;
pub const QBLK_HAVE_OPEN: u32 = 1;
pub const QBLK_HAVE_OPEN2: u32 = 1;
pub const QBLK_HAVE_OPEN_FD: u32 = 1;
pub const QBLK_HAVE_CLOSE: u32 = 1;
pub const QBLK_HAVE_CONTEXT_OPEN: u32 = 1;
pub const QBLK_HAVE_REOPEN: u32 = 1;
pub const QBLK_HAVE_REOPEN2: u32 = 1;
pub const QBLK_HAVE_LAYER_PUSH: u32 = 1;
pub const QBLK_HAVE_PREAD: u32 = 1;
pub const QBLK_HAVE_PREAD2: u32 = 1;
pub const QBLK_HAVE_PWRITE: u32 = 1;
pub const QBLK_HAVE_PWRITE2: u32 = 1;
pub const QBLK_HAVE_PREADV: u32 = 1;
pub const QBLK_HAVE_PWRITEV: u32 = 1;
pub const QBLK_HAVE_FLUSH: u32 = 1;
pub const QBLK_HAVE_ZERO: u32 = 1;
pub const QBLK_HAVE_TRIM: u32 = 1;
pub const QBLK_HAVE_CACHE: u32 = 1;
pub const QBLK_HAVE_GET_INFO: u32 = 1;
pub const QBLK_HAVE_GET_PROPERTY: u32 = 1;
pub const QBLK_HAVE_EXTENTS: u32 = 1;
pub const QBLK_HAVE_CREATE: u32 = 1;
pub const QBLK_HAVE_RESIZE: u32 = 1;
pub const QBLK_HAVE_RESIZE2: u32 = 1;
pub const QBLK_HAVE_CHECK: u32 = 1;
pub const QBLK_HAVE_CHECK2: u32 = 1;
pub const QBLK_HAVE_SERVER_NEW: u32 = 1;
pub const QBLK_HAVE_SERVER_SET: u32 = 1;
pub const QBLK_HAVE_SERVER_ADD_EXPORT: u32 = 1;
pub const QBLK_HAVE_SERVER_ADD_EXPORT2: u32 = 1;
pub const QBLK_HAVE_SERVER_REMOVE_EXPORT: u32 = 1;
pub const QBLK_HAVE_SERVER_LISTEN: u32 = 1;
pub const QBLK_HAVE_SERVER_LISTEN_FD: u32 = 1;
pub const QBLK_HAVE_SERVER_SERVE_FD: u32 = 1;
pub const QBLK_HAVE_SERVER_GET_URI: u32 = 1;
pub const QBLK_HAVE_SERVER_WAIT: u32 = 1;
pub const QBLK_HAVE_SERVER_STOP: u32 = 1;
pub const QBLK_HAVE_SERVER_FREE: u32 = 1;
pub const QBLK_HAVE_NBD_LIST: u32 = 1;
pub const QBLK_HAVE_LOCK_MANAGER_LOAD: u32 = 1;
pub const QBLK_HAVE_OPTIONS_SET_LOCK_MANAGER: u32 = 1;
pub const QBLK_HAVE_LOCK_MANAGER_FREE: u32 = 1;
pub const QBLK_HAVE_BLOCK_STATUS: u32 = 1;
pub const QBLK_HAVE_BITMAP_LIST: u32 = 1;
pub const QBLK_HAVE_BITMAP_ADD: u32 = 1;
pub const QBLK_HAVE_BITMAP_REMOVE: u32 = 1;
pub const QBLK_HAVE_BITMAP_ENABLE: u32 = 1;
pub const QBLK_HAVE_BITMAP_DISABLE: u32 = 1;
pub const QBLK_HAVE_BITMAP_CLEAR: u32 = 1;
pub const QBLK_HAVE_BITMAP_MERGE: u32 = 1;
pub const QBLK_HAVE_EXTENTS2: u32 = 1;
pub const QBLK_HAVE_WRITE_COMPRESSED: u32 = 1;
pub const QBLK_HAVE_COPY: u32 = 1;
pub const QBLK_HAVE_COMMIT: u32 = 1;
pub const QBLK_HAVE_REBASE: u32 = 1;
pub const QBLK_HAVE_AMEND: u32 = 1;
pub const QBLK_HAVE_SNAPSHOT_LIST: u32 = 1;
pub const QBLK_HAVE_SNAPSHOT_CREATE: u32 = 1;
pub const QBLK_HAVE_SNAPSHOT_APPLY: u32 = 1;
pub const QBLK_HAVE_SNAPSHOT_DELETE: u32 = 1;
pub const QBLK_HAVE_VMSTATE_WRITE: u32 = 1;
pub const QBLK_HAVE_VMSTATE_READ: u32 = 1;
