//! Dirty bitmaps: which parts of a device were changed since some moment.

/// What NBD calls the context of a bitmap, before its name: [`Driver::status`](super::Driver::status) is
/// asked for it so.
pub const BITMAP_CONTEXT: &[u8] = b"qemu:dirty-bitmap:";

/// What can be told of a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Bytes, none of them NUL.
    pub name: Vec<u8>,
    /// Bytes of the device that one bit stands for.
    pub granularity: u64,
    /// Bytes of the device that are dirty; `None` = not known.
    pub dirty: Option<u64>,
    /// Writes are noted in it.
    pub enabled: bool,
    /// It was not saved when it was last used: it can be removed, and nothing else.
    pub inconsistent: bool,
    /// It is kept in the image.
    pub persistent: bool,
}

/// A change of a device's bitmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapChange<'a> {
    /// Add one that has nothing dirty.
    Add {
        /// What it is called.
        name: &'a [u8],
        /// Bytes that one bit stands for; 0 = 64 KiB.
        granularity: u64,
        /// Writes are not noted in it.
        disabled: bool,
    },
    /// Remove one.
    Remove(&'a [u8]),
    /// Note writes in it from now on.
    Enable(&'a [u8]),
    /// Note no more writes in it.
    Disable(&'a [u8]),
    /// Nothing is dirty in it any more.
    Clear(&'a [u8]),
    /// What is dirty in `source` becomes dirty in `target`, too.
    Merge {
        /// The one that changes.
        target: &'a [u8],
        /// The one that stays.
        source: &'a [u8],
    },
}
