//! The vocabulary of block devices: what a driver answers, requests, errors, limits, and the one
//! place that emulates what a driver lacks ([`Device`]).
//!
//! This room knows nobody else's names: no files, no formats.

mod amend;
mod bitmap;
mod check;
mod device;
mod error;
mod extent;
mod fence;
mod inflight;
mod iov;
mod name;
mod parse;
mod progress;
mod range_lock;
mod snapshot;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use amend::{Amend, AmendKeys};
pub use bitmap::{BITMAP_CONTEXT, BitmapChange, BitmapInfo};
pub use check::{CheckReport, Repair};
pub use device::Device;
pub(crate) use error::last_errno;
pub use error::{Error, ErrorKind, Result};
pub use extent::{Extent, ExtentList};
pub use fence::Fence;
pub use inflight::{Guard, InFlight, Own};
pub use iov::{Dst, FromMem, Iov, OneIov, Src, ToMem, ZEROES, zero_iovecs};
pub use name::{Name, quoted};
pub use parse::{parse_seconds, parse_size};
pub use progress::{Progress, Tell};
pub use range_lock::RangeLock;
pub use snapshot::{NewSnapshot, SnapshotInfo};

/// Flags of one request. The values are those of the C ABI (`QBLK_REQ_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReqFlags(pub u32);

impl ReqFlags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// The call returns when this write is on stable storage.
    pub const FUA: Self = Self(1);
    /// Zeroing may leave a hole.
    pub const MAY_TRIM: Self = Self(2);
    /// Fail with [`Error::NotSupported`] at once rather than write zeroes.
    pub const FAST_ZERO: Self = Self(4);

    /// Whether all bits of `other` are set.
    #[inline]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These flags without those of `other`.
    #[inline]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl std::ops::BitOr for ReqFlags {
    type Output = Self;
    fn bitor(self, rhs: Self) -> Self {
        Self(self.0 | rhs.0)
    }
}

/// How well a device does one thing. The values are those of the C ABI (`QBLK_CAN_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Can {
    /// Not at all.
    #[default]
    Not = 0,
    /// By other requests (zero by writing, FUA by flush, …).
    Emulate = 1,
    /// By itself.
    Native = 2,
}

/// What a driver can do by itself, and what it asks of requests.
#[derive(Clone, Debug)]
pub struct Caps {
    /// Requests (offset, count) must be multiples of this many bytes; a power of two; 1 = any.
    pub align: u32,
    /// Memory must be aligned to this many bytes; a power of two; 1 = any.
    pub mem_align: u32,
    /// Largest single request in bytes; 0 = no limit.
    pub max_transfer: u64,
    /// What a single request is best a multiple of, bytes.
    pub optimal_io: u32,
    /// The driver refuses changes.
    pub read_only: bool,
    /// `flush` does something.
    pub flush: bool,
    /// `write` honours [`ReqFlags::FUA`].
    pub fua: bool,
    /// `zero` honours [`ReqFlags::FUA`].
    pub zero_fua: bool,
    /// `trim` honours [`ReqFlags::FUA`].
    pub trim_fua: bool,
    /// A flush does for FUA where the driver does not honour that itself.
    pub fua_by_flush: bool,
    /// `trim` is worth calling.
    pub trim: bool,
    /// `zero` is worth calling; it may still answer [`Error::NotSupported`].
    pub zero: bool,
    /// Writing zeroes does for `zero` where the driver does not do that itself.
    pub zero_by_write: bool,
    /// `zero` honours [`ReqFlags::FAST_ZERO`]; it is not called with it otherwise.
    pub fast_zero: bool,
    /// Most bytes of one `zero`, `trim` or `cache`; 0 = no limit.
    pub max_range: u64,
    /// `cache` is worth calling.
    pub cache: bool,
    /// Reading does for `cache` where the driver has none.
    pub cache_by_read: bool,
    /// `extents` knows more than "all data".
    pub extents: bool,
    /// What it maps as data may have holes below, which are its own: it is worth asking what holds the
    /// bytes.
    pub sparse: bool,
    /// The medium turns.
    pub rotational: bool,
    /// Bytes pass through the host's page cache (or are memory): a write is as a rule a copy in memory,
    /// and waits for nobody.
    pub cached: bool,
}

impl Default for Caps {
    fn default() -> Self {
        Self {
            align: 1,
            mem_align: 1,
            max_transfer: 0,
            optimal_io: 4096,
            read_only: false,
            flush: true,
            fua: false,
            zero_fua: false,
            trim_fua: false,
            fua_by_flush: true,
            trim: false,
            zero: false,
            zero_by_write: true,
            fast_zero: true,
            max_range: 0,
            cache: false,
            cache_by_read: true,
            extents: false,
            sparse: false,
            rotational: false,
            cached: false,
        }
    }
}

/// How much room a new or grown device is given at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prealloc {
    /// None: space is taken as data comes.
    #[default]
    Off,
    /// The format's tables only.
    Metadata,
    /// Space is reserved (`fallocate`), not written.
    Falloc,
    /// Zeroes are written.
    Full,
}

impl Prealloc {
    /// The name that `qemu-img create -o preallocation=` has for it.
    pub fn parse(s: &str) -> Option<Self> {
        Some(match s {
            "off" => Self::Off,
            "metadata" => Self::Metadata,
            "falloc" => Self::Falloc,
            "full" => Self::Full,
            _ => return None,
        })
    }
}

/// Where a run of bytes lives.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// In the asked driver itself, at the same offset: it carries bytes and translates nothing.
    Own,
    /// At `offset` of `dev`, as they are.
    At {
        /// The device that holds them.
        dev: &'a Device,
        /// Where, bytes.
        offset: u64,
    },
    /// Nowhere: they read as zeroes.
    Zero {
        /// This image says so (not "nothing here and nothing below").
        allocated: bool,
        /// Space that is kept for them: device and offset.
        kept: Option<(&'a Device, u64)>,
    },
    /// In compressed form; read through the driver.
    Compressed {
        /// The device that holds the compressed bytes.
        dev: &'a Device,
        /// Where they begin, bytes.
        offset: u64,
    },
    /// Encrypted; read through the driver, which asks for no more than its [`Caps`] say.
    Encrypted {
        /// The device that holds the encrypted bytes.
        dev: &'a Device,
        /// Where they begin, bytes.
        offset: u64,
    },
    /// Not in this image: at the same offset of the one below.
    Below(&'a Device),
}

/// The answer to "where is this?": a run of `len` bytes in one place.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Bytes, at least 1 and at most what was asked for.
    pub len: u64,
    /// Where they live.
    pub place: Place<'a>,
}

/// What sits behind a [`Device`]: something that carries or translates bytes.
///
/// A driver may count on: ranges are not empty; `offset + count` does not overflow; offset, count
/// and memory keep to its [`Caps`]; no write reaches a driver whose caps say `read_only`. It must
/// allow any number of threads at once. A range may reach past the end of the device where a
/// format asks for it: what was never there reads as zeroes, and writing there grows the device.
pub trait Driver: Send + Sync {
    /// What the bytes are kept in, for people: a path, a URI.
    fn name(&self) -> &Name;
    /// The kind of driver: "file", "mem", "qcow2", …
    fn kind(&self) -> &'static str;
    /// Whether code that is not the library's own is behind it.
    fn is_foreign(&self) -> bool {
        false
    }
    /// The lock that it holds during calls, where it shares one with other devices.
    fn held(&self) -> Option<Held> {
        None
    }
    /// What it can do. Asked once, when the device is made.
    fn caps(&self) -> Caps;
    /// What tells the source from others on this host (for a file, its device and inode numbers).
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }
    /// Size in bytes, now.
    fn size(&self) -> u64;
    /// Fill `buf` with the bytes from `offset` on.
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()>;
    /// Fill `buf` if that needs to wait for no disk and no peer; `false`, with nothing said about
    /// what is in `buf`, where it might.
    fn read_now(&self, _buf: Dst<'_>, _offset: u64) -> Result<bool> {
        Ok(false)
    }
    /// Write `buf` at `offset`; of `flags` only FUA matters, and only if `caps().fua`.
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()>;
    /// Write bytes of the last block, of which the device has (or is to have) only a part; asked
    /// only of drivers with `align` above 1 whose size need not be a multiple of it.
    fn write_edge(&self, _buf: Src<'_>, _offset: u64, _flags: ReqFlags) -> Result<()> {
        Err(Error::NotSupported("writing part of a block"))
    }
    /// Whether a write of `count` bytes, without FUA, will be over at once as far as anybody can tell,
    /// though `caps().cached` does not say so.
    fn writes_at_once(&self, _count: usize) -> bool {
        false
    }
    /// Make everything that was written survive a power cut.
    fn flush(&self) -> Result<()>;
    /// Make a range read as zeroes; [`Error::NotSupported`] if that means writing them. FUA is among the
    /// flags only if `caps().zero_fua`.
    fn zero(&self, _offset: u64, _count: u64, _flags: ReqFlags) -> Result<()> {
        Err(Error::NotSupported("zero"))
    }
    /// Give a range back; afterwards it reads as before or as zeroes, always the same. The one flag is
    /// FUA, and only if `caps().trim_fua`.
    fn trim(&self, _offset: u64, _count: u64, _flags: ReqFlags) -> Result<()> {
        Ok(())
    }
    /// Bring a range near; a hint.
    fn cache(&self, _offset: u64, _count: u64) -> Result<()> {
        Ok(())
    }
    /// Where the bytes from `offset` on live: the first run of at most `count` bytes.
    fn map(&self, _offset: u64, count: u64) -> Result<Run<'_>> {
        Ok(Run { len: count, place: Place::Own })
    }
    /// Fill `buf` from a run that `map` called compressed.
    fn read_compressed(&self, _buf: Dst<'_>, _offset: u64) -> Result<()> {
        Err(Error::Internal("nothing is compressed here".into()))
    }
    /// Describe a range of a driver whose `map` answers [`Place::Own`]: which parts are holes.
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        out.push(Extent::data(offset, count));
        Ok(())
    }
    /// What one context of an NBD server (`base:allocation`, `qemu:dirty-bitmap:…`) says of a range: runs
    /// of so many bytes with these flags, from `offset` on, added to `out`. They may end before the range
    /// does, and more than `most` are of no use.
    fn status(
        &self,
        _context: &[u8],
        _offset: u64,
        _count: u64,
        _most: usize,
        _out: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        Err(Error::NotSupported("meta contexts"))
    }
    /// The file behind the driver, if the kernel may copy from it as it is.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Copy `count` bytes at `from_offset` of another driver to `offset` inside the kernel, where blocks
    /// may even come to be shared; [`Error::NotSupported`] where that can not be had.
    fn copy_from(
        &self,
        _from: &dyn Driver,
        _from_offset: u64,
        _offset: u64,
        _count: u64,
    ) -> Result<()> {
        Err(Error::NotSupported("copying in the kernel"))
    }
    /// Write `buf` at `offset` in compressed form, where that is smaller: whole clusters, of which the
    /// image's end may cut the last.
    fn write_compressed(&self, _buf: Src<'_>, _offset: u64) -> Result<()> {
        Err(Error::NotSupported("compressed writes"))
    }
    /// Change the size; bytes that come into being read as zeroes.
    fn resize(&self, _size: u64, _prealloc: Prealloc, _shrink: bool) -> Result<()> {
        Err(Error::NotSupported("resize"))
    }
    /// Check the image, and mend what `repair` says. The caller has closed it before, so that everything
    /// that was written is in the file; no other call is under way. When the report says `changed`, what the driver knows of
    /// the image may be out of date: it must be opened anew before it is used for anything else.
    fn check(&self, _repair: Repair, _progress: Progress<'_>) -> Result<CheckReport> {
        Err(Error::NotSupported("checking: only qcow2 images have tables that can be wrong"))
    }
    /// The dirty bitmaps that there are; `count`: also what is dirty in them, where that can be had.
    fn bitmaps(&self, _count: bool) -> Result<Vec<BitmapInfo>> {
        Ok(Vec::new())
    }
    /// Change a dirty bitmap. One at a time, and not from within a call under way.
    fn change_bitmap(&self, _change: &BitmapChange<'_>) -> Result<()> {
        Err(Error::NotSupported("dirty bitmaps (qcow2 images do)"))
    }
    /// What internal snapshots there are.
    fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        Err(Error::NotSupported("internal snapshots"))
    }
    /// Keep the state as it is now in an internal snapshot, with what was written to the area of the
    /// machine's state. Nobody else is at work on the driver, as in the next two.
    fn snapshot_create(&self, _name: &[u8], _how: &NewSnapshot) -> Result<()> {
        Err(Error::NotSupported("internal snapshots"))
    }
    /// Make everything what it was in the snapshot with that ID, or else that name; the size too.
    fn snapshot_apply(&self, _which: &[u8]) -> Result<()> {
        Err(Error::NotSupported("internal snapshots"))
    }
    /// Forget the snapshot with that ID, or else that name.
    fn snapshot_delete(&self, _which: &[u8]) -> Result<()> {
        Err(Error::NotSupported("internal snapshots"))
    }
    /// Change what the image is like, as a whole or not at all. Nobody else is at work on the driver.
    /// `true`: it refuses to be written to until the image is opened anew, for it is of another kind.
    fn amend(&self, _to: &Amend, _progress: Progress<'_>) -> Result<bool> {
        Err(Error::NotSupported("amending"))
    }
    /// Write to the area of the machine's state, which lies apart from the disk's bytes. One call at a
    /// time, as in the next.
    fn vm_state_write(&self, _buf: Src<'_>, _offset: u64) -> Result<()> {
        Err(Error::NotSupported("keeping a machine's state"))
    }
    /// Read from the area of the machine's state; what was never written reads as zeroes.
    fn vm_state_read(&self, _buf: Dst<'_>, _offset: u64) -> Result<()> {
        Err(Error::NotSupported("keeping a machine's state"))
    }
    /// Make the image hold nothing of its own, so that all shows from below. No call is under way.
    fn make_empty(&self) -> Result<()> {
        Err(Error::NotSupported("emptying an image"))
    }
    /// While `on`, zeroes are recorded by themselves, whatever is below: something else is about to be.
    fn hold_zeroes(&self, _on: bool) {}
    /// Record another image as the one below, by its name and format, or none.
    fn set_backing(&self, _backing: Option<(&[u8], Option<&[u8]>)>) -> Result<()> {
        Err(Error::NotSupported("backing files"))
    }
    /// Bytes in use on the host; `None` if not known.
    fn allocated(&self) -> Option<u64> {
        None
    }
    /// Flush, and settle what can wait otherwise (space to give back, a file's true length), so that
    /// another may take over the source. The driver stays usable. Dropping it writes nothing.
    fn close(&self) -> Result<()> {
        self.flush()
    }
    /// Flush because a handle is closed, though not the last: like [`Driver::flush`], but nobody is kept
    /// waiting by a peer that does not answer.
    fn flush_to_close(&self) -> Result<()> {
        self.flush()
    }
    /// What is lost if it is dropped without having been closed, flushed or not: for people.
    fn kept_until_closed(&self) -> Option<String> {
        None
    }
    /// What it stands on was opened anew beneath it, because the device was (layers).
    fn reopened(&self) {}
    /// What can be told of the image: state bits, cluster size, the image below.
    fn describe(&self) -> Description {
        Description::default()
    }
    /// More properties, which take work to learn: of `key`, or all of them for the key `properties`.
    fn properties_on_demand(&self, _key: &str) -> Vec<(&'static str, Vec<u8>)> {
        Vec::new()
    }
    /// The devices that hold the bytes of this image and of those below, this one's first.
    fn files(&self) -> Vec<Arc<Device>> {
        Vec::new()
    }
    /// The image below, if there is one open.
    fn backing(&self) -> Option<&Device> {
        None
    }
}

/// A lock that several devices share, held while one of them is called.
#[derive(Clone, Debug)]
pub struct Held {
    /// Which lock.
    pub id: u64,
    /// Whose, for people.
    pub name: String,
}

/// What a driver tells of itself beyond its [`Caps`].
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// Bits of `QBLK_STATE_*` that the format knows of.
    pub state: u32,
    /// Cluster size in bytes; 0 = none.
    pub cluster_size: u32,
    /// Name of the format ("qcow2"), or empty for a driver that is none.
    pub format: &'static str,
    /// Properties, by name: `backing-filename`, `qcow2.compat`, …
    pub properties: Vec<(&'static str, Vec<u8>)>,
}
