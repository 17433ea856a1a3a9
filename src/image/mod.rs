//! Whole images: opened by name with their chain, created, resized, described.
//!
//! An [`Image`] is a context: an independent way into a source that may be shared. What is shared,
//! the open chain and its calls under way, is a `Shared`; reopening swaps the chain beneath all
//! contexts at once, so that there is never more than one owner of an image's metadata.
//!
//! Lock order: `Shared::admin`, then whatever the drivers lock. No call holds `admin` while data
//! moves but those that change what a handle is (resize, reopen, close).

mod amend;
mod bitmap;
mod calls;
mod chain;
mod chainwork;
mod check;
mod copy;
mod create;
mod how;
mod info;
mod key;
mod layers;
mod life;
mod managed;
mod named;
mod options;
mod remote;
mod whole;

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering::*};

use parking_lot::Mutex;

use crate::block::*;
use crate::file::FileLock;
use crate::lockmgr::Lease;
use crate::plugin::{self, PluginName};
use calls::Calls;
pub use chain::Probe;
pub use copy::copy;
pub use create::create;
pub use info::{Info, state};
pub use layers::context_of;
pub use options::{Options, Use, parse_seconds, parse_size};
pub use remote::list_exports;

/// How to open. The values are those of the C ABI (`QBLK_OPEN_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags(pub u32);

impl OpenFlags {
    /// Write too.
    pub const RDWR: Self = Self(1);
    /// Do not open what the image is backed by; its holes read as zeroes.
    pub const NO_BACKING: Self = Self(2);
    /// Read the header and stop.
    pub const INFO_ONLY: Self = Self(4);
    /// The image is hostile: format required, nothing that it names is opened.
    pub const UNTRUSTED: Self = Self(8);
    /// Take no part in locking beyond what a cautious reader needs.
    pub const SHARED: Self = Self(16);
    /// No locks at all.
    pub const NO_LOCK: Self = Self(32);
    /// Bypass the page cache.
    pub const DIRECT: Self = Self(64);
    /// To be checked and mended only: what is too broken to be used otherwise can be opened so.
    pub const CHECK: Self = Self(128);
    /// All flags that there are.
    pub const ALL: Self = Self(255);
    /// There are no bytes to be had.
    const NO_DATA: u32 = Self::INFO_ONLY.0 | Self::CHECK.0;
    /// Inside the library only: write the image below, too.
    const WRITE_BELOW: Self = Self(1 << 31);

    /// Whether all bits of `other` are set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for OpenFlags {
    type Output = Self;
    fn bitor(self, rhs: Self) -> Self {
        Self(self.0 | rhs.0)
    }
}

/// An open chain of images.
pub(crate) struct Tree {
    pub(crate) top: Device,
    /// The devices that hold the bytes, of `top` first; none for a description.
    pub(crate) files: Vec<Arc<Device>>,
    pub(crate) name: Name,
    pub(crate) options: Options,
    pub(crate) flags: OpenFlags,
    pub(crate) probed: bool,
    /// Kind of the driver that holds the top image's bytes.
    pub(crate) driver: &'static str,
    /// How the top image's source is opened again.
    again: Again,
    /// On the files of the chain. Behind what uses them, and so given back after that is gone.
    locks: Vec<Arc<FileLock>>,
    /// Its files, as a lock manager is told of them.
    parts: Vec<managed::Noted>,
    /// How many of them belong to the top image.
    own_parts: usize,
    /// And how many with those of the image below.
    parts_to_below: usize,
    /// What a lock manager has given, for the whole chain.
    lease: Option<Arc<Lease>>,
    /// Of a description, which takes no lock: somebody has locked the file.
    in_use: bool,
    /// What the uppermost layer stands on, if there are layers.
    below: Option<Image>,
}

impl Tree {
    /// The error of a change where there can be none: which may be a layer's doing.
    #[cold]
    fn is_read_only(&self) -> Error {
        let Again::Layer = self.again else {
            return Error::ReadOnly(self.name.clone());
        };
        let what =
            "opened read-only (QBLK_OPEN_RDWR opens for writing), or a layer on it refuses changes";
        Error::Refused { file: self.name.clone(), what: what.into(), errno: libc::EROFS }
    }

    /// Refuse to write what is not leased any more.
    #[inline]
    fn may_write(&self) -> Result<()> {
        match &self.lease {
            Some(lease) if lease.fence().is_closed() => Err(lease.error()),
            _ => Ok(()),
        }
    }
}

/// How a source is opened again.
enum Again {
    /// By this path, which does not depend on the working directory.
    Path(PathBuf),
    /// By a duplicate of this descriptor.
    Descriptor(OwnedFd),
    /// By a duplicate of this descriptor of memory.
    Memory(OwnedFd),
    /// By connecting anew.
    Remote(remote::Remote),
    /// By another instance.
    Plugin(PluginName),
    /// Not at all: a connected socket is good for one connection.
    Never,
    /// It is a layer: what it stands on is.
    Layer,
}

impl Again {
    /// What options have a use for it.
    fn carrier(&self) -> how::Carrier {
        match self {
            Self::Remote(_) => how::Carrier::Remote,
            Self::Plugin(_) => how::Carrier::Plugin,
            _ => how::Carrier::Local,
        }
    }
}

/// What the options have for a plugin.
fn plugin_settings(options: &Options) -> Vec<plugin::Setting> {
    options.with_prefix("plugin.").map(|(k, v)| (k.to_owned(), v.to_vec())).collect()
}

/// What all contexts of a source share.
struct Shared {
    /// Calls under way; they use `tree`.
    calls: Calls,
    /// The number of the device, by which plugins that it stands on know it.
    device: usize,
    /// The open chain, owned; null while it is being replaced and after close.
    tree: AtomicPtr<Tree>,
    /// Held by what changes `tree` or the size.
    admin: Mutex<()>,
    closed: AtomicBool,
    /// A call on it met an internal error: nothing more is to be done with it. One for a whole stack.
    broken: Arc<AtomicBool>,
}

// SAFETY: `tree` is a Box<Tree>, whose parts are Send and Sync.
unsafe impl Send for Shared {}
// SAFETY: as above; it is replaced under `admin` once `calls` has drained.
unsafe impl Sync for Shared {}

impl Drop for Shared {
    fn drop(&mut self) {
        let tree = *self.tree.get_mut();
        if !tree.is_null() {
            // SAFETY: made by Box::into_raw, and no context is left to use it.
            drop(unsafe { Box::from_raw(tree) });
        }
    }
}

/// An open image: a context. Cheap to share between threads by reference.
pub struct Image {
    shared: Arc<Shared>,
    write: AtomicBool,
}

/// A call under way on an image: as long as it lives, the tree does.
pub(crate) struct Call<'a> {
    tree: &'a Tree,
    guard: Guard<'a>,
}

impl std::ops::Deref for Call<'_> {
    type Target = Tree;
    #[inline]
    fn deref(&self) -> &Tree {
        self.tree
    }
}

impl Image {
    /// Open the image `name`: a path, `file:PATH`, `mem:SIZE`, the URI of an NBD export, or `layers:` and
    /// layers in front of one of these.
    pub fn open(name: &OsStr, options: &Options, flags: OpenFlags) -> Result<Self> {
        how::of_a_caller(flags)?;
        let (stack, name, options) = layers::split(name, options)?;
        stack.open(flags, |flags| {
            let calls = Arc::new(InFlight::default());
            let tree = chain::open(name, &options, flags, &calls)?;
            Ok(Self::from_tree(tree, calls, flags))
        })
    }

    /// Open the image behind a descriptor, which is now the library's.
    pub fn open_fd(fd: OwnedFd, options: &Options, flags: OpenFlags) -> Result<Self> {
        how::of_a_caller(flags)?;
        let (stack, _, options) = layers::split(OsStr::new(""), options)?;
        stack.open(flags, |flags| {
            let calls = Arc::new(InFlight::default());
            let tree = chain::open_fd(fd, &options, flags, &calls)?;
            Ok(Self::from_tree(tree, calls, flags))
        })
    }

    fn from_tree(tree: Tree, calls: Arc<InFlight>, flags: OpenFlags) -> Self {
        let shared = Shared {
            device: calls.id(),
            calls: Calls::new(calls),
            tree: AtomicPtr::new(Box::into_raw(Box::new(tree))),
            admin: Mutex::new(()),
            closed: AtomicBool::new(false),
            broken: Arc::default(),
        };
        Self { shared: Arc::new(shared), write: AtomicBool::new(flags.has(OpenFlags::RDWR)) }
    }

    /// Another context of the same source, with its own flags (of which [`OpenFlags::RDWR`] matters).
    pub fn context(&self, options: &Options, flags: OpenFlags) -> Result<Self> {
        options.check(Use::Context)?;
        let call = self.call()?;
        if flags.0 & !(OpenFlags::RDWR | OpenFlags::NO_LOCK | OpenFlags::SHARED).0 != 0 {
            return Err(Error::invalid("a context takes QBLK_OPEN_RDWR, SHARED and NO_LOCK only"));
        }
        let write = flags.has(OpenFlags::RDWR);
        if write && flags.has(OpenFlags::SHARED) {
            return Err(Error::invalid("QBLK_OPEN_SHARED is for read-only opens"));
        }
        if write && !call.flags.has(OpenFlags::RDWR) {
            return Err(Error::ReadOnly(call.name.clone()));
        }
        drop(call);
        Ok(Self { shared: self.shared.clone(), write: AtomicBool::new(write) })
    }

    /// Refuse a call that comes from within a callback of a plugin that the device itself stands on.
    pub(crate) fn refuse_reentry(&self) -> Result<()> {
        plugin::refuse_reentry(self.shared.device)
    }

    /// Whether the device stands on plugins; `false` while its tree is being replaced, which is not
    /// waited for.
    pub(crate) fn is_on_plugin(&self) -> bool {
        self.try_call().is_some_and(|call| {
            let files = || call.files.iter().any(|f| f.driver().is_foreign());
            call.top.driver().is_foreign()
                || files()
                || call.below.as_ref().is_some_and(Self::is_on_plugin)
        })
    }

    /// What is set when a call on the device met an internal error.
    pub(crate) fn broken(&self) -> Arc<AtomicBool> {
        self.shared.broken.clone()
    }

    /// Another context with the flags of this one.
    pub fn own_context(&self) -> Result<Self> {
        let call = self.call()?;
        if call.flags.0 & OpenFlags::NO_DATA != 0 {
            return Err(no_data(&call));
        }
        let write = AtomicBool::new(self.write.load(Relaxed));
        Ok(Self { shared: self.shared.clone(), write })
    }

    /// Begin a call: what it looks up stays valid until the answer is dropped.
    #[inline]
    pub(crate) fn call(&self) -> Result<Call<'_>> {
        loop {
            if let Some(call) = self.try_call() {
                return Ok(call);
            }
            self.wait_for_reopen()?;
        }
    }

    /// Begin a call, unless the tree is being replaced or gone.
    #[inline]
    fn try_call(&self) -> Option<Call<'_>> {
        loop {
            let calls = self.shared.calls.get();
            let guard = calls.enter();
            let tree = self.shared.tree.load(SeqCst);
            if std::ptr::eq(calls, self.shared.calls.get()) {
                // SAFETY: NULL, or a tree of which whoever replaces it waits for the guard to go before
                // freeing it.
                return unsafe { tree.as_ref() }.map(|tree| Call { tree, guard });
            }
        }
    }

    #[cold]
    fn wait_for_reopen(&self) -> Result<()> {
        drop(self.shared.admin.lock());
        if self.shared.closed.load(SeqCst) {
            return Err(Error::BadHandle("the device was closed when the program ended".into()));
        }
        Ok(())
    }

    /// Begin a data call on `count` bytes at `offset`.
    #[inline]
    fn data_call(&self, offset: u64, count: u64) -> Result<Call<'_>> {
        let call = self.call()?;
        if call.flags.0 & OpenFlags::NO_DATA != 0 {
            return Err(no_data(&call));
        }
        let size = call.top.size();
        match offset.checked_add(count) {
            Some(end) if end <= size => Ok(call),
            _ => Err(Error::Range { file: call.name.clone(), offset, count, size }),
        }
    }

    fn write_call(&self, offset: u64, count: u64) -> Result<Call<'_>> {
        let call = self.data_call(offset, count)?;
        // Another context may have reopened the source read-only.
        if !self.write.load(Relaxed) || !call.flags.has(OpenFlags::RDWR) {
            return Err(call.is_read_only());
        }
        call.may_write()?;
        Ok(call)
    }

    /// Size in bytes.
    pub fn size(&self) -> Result<u64> {
        Ok(self.call()?.top.size())
    }

    /// Fill `buf` with the bytes from `offset` on.
    #[inline]
    pub fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.data_call(offset, buf.len() as u64)?.top.read(buf, offset)
    }

    /// [`Image::read`] into one slice.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read(OneIov::dst(buf).iov(), offset)
    }

    /// Write `buf` at `offset`. Flag: [`ReqFlags::FUA`].
    #[inline]
    pub fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        let call = self.write_call(offset, buf.len() as u64)?;
        if buf.is_empty() && !flags.has(ReqFlags::FUA) {
            return Ok(());
        }
        let _own = call.guard.own();
        call.top.write(buf, offset, flags)
    }

    /// [`Image::write`] from one slice.
    pub fn write_at(&self, buf: &[u8], offset: u64, flags: ReqFlags) -> Result<()> {
        self.write(OneIov::src(buf).iov(), offset, flags)
    }

    /// Write `buf` at `offset` in compressed form, where that is smaller: whole clusters, of which the
    /// image's end may cut the last.
    pub fn write_compressed(&self, buf: Src<'_>, offset: u64) -> Result<()> {
        let call = self.write_call(offset, buf.len() as u64)?;
        let _own = call.guard.own();
        call.top.driver().write_compressed(buf, offset)
    }

    /// Make all that was written survive a power cut.
    pub fn flush(&self) -> Result<()> {
        let call = self.data_call(0, 0)?;
        call.may_write()?;
        let _own = call.guard.own();
        call.top.flush()
    }

    /// Make a range read as zeroes. Flags: all of [`ReqFlags`].
    pub fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        let call = self.write_call(offset, count)?;
        let _own = call.guard.own();
        call.top.zero(offset, count, flags)
    }

    /// Give a range back; afterwards it reads as before or as zeroes. Flag: [`ReqFlags::FUA`].
    pub fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        let call = self.write_call(offset, count)?;
        let _own = call.guard.own();
        call.top.trim(offset, count, flags)
    }

    /// Bring a range near; a hint.
    pub fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.data_call(offset, count)?.top.cache(offset, count)
    }

    /// Describe a range: fills `out` from its beginning with extents that follow one another from
    /// `offset` on, and returns how many; they may end before the range does.
    pub fn extents(&self, offset: u64, count: u64, out: &mut [Extent]) -> Result<usize> {
        let call = self.data_call(offset, count)?;
        let mut list = ExtentList::for_c(out);
        if call.below.is_some() {
            list = list.without_host();
        }
        crate::format::extents(&call.top, offset, count, &mut list)?;
        Ok(list.len())
    }

    /// What a meta context of the NBD server behind the image says of a range: runs of so many bytes
    /// with these flags, from `offset` on, perhaps not to its end; `most` of them, or a few more.
    pub fn block_status(
        &self,
        context: &[u8],
        offset: u64,
        count: u64,
        most: usize,
    ) -> Result<Vec<(u64, u64)>> {
        let call = self.data_call(offset, count)?;
        let mut out = Vec::new();
        if count > 0 {
            call.top.driver().status(context, offset, count, most, &mut out)?;
        }
        Ok(out)
    }

    /// [`Image::extents`] with [`Extent::OWNED`].
    pub(crate) fn extents_owned(
        &self,
        offset: u64,
        count: u64,
        out: &mut [Extent],
    ) -> Result<usize> {
        let call = self.data_call(offset, count)?;
        let mut list = ExtentList::new(out);
        if call.below.is_some() {
            list = list.without_host();
        }
        crate::format::extents(&call.top, offset, count, &mut list)?;
        Ok(list.len())
    }

    /// Fill `buf` if nothing has to be waited for; see [`Driver::read_now`].
    #[inline]
    pub(crate) fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        self.data_call(offset, buf.len() as u64)?.top.read_now(buf, offset)
    }

    /// The host file of the image at `depth`, if the kernel may send from it at any later time: what
    /// an [`Extent`] says of a place in it must stay true. In an image that is written only a raw
    /// one's does: elsewhere a cluster may come to belong to another part of the disk.
    pub(crate) fn host_file(&self, depth: u32) -> Result<Option<Arc<Device>>> {
        let call = self.call()?;
        let raw = call.top.driver().kind() == "raw";
        if !raw && call.flags.has(OpenFlags::RDWR) {
            return Ok(None);
        }
        let file = call.files.get(depth as usize).filter(|f| f.driver().file().is_some());
        Ok(file.cloned())
    }

    /// Whether a write of `count` bytes, without FUA, waits for nobody as a rule.
    pub(crate) fn writes_at_once(&self, count: usize) -> Result<bool> {
        Ok(self.call()?.top.writes_at_once(count))
    }

    /// Whether what is asked of it is as a rule answered from memory.
    pub(crate) fn is_cached(&self) -> Result<bool> {
        Ok(self.call()?.top.caps().cached)
    }

    /// Change the size; bytes that come into being read as zeroes. `shrink` must be set to lose some.
    pub fn resize(&self, size: u64, options: &Options, shrink: bool) -> Result<()> {
        options.check(Use::Resize)?;
        let prealloc = create::preallocation(options)?;
        self.with_tree(true, |tree| {
            if size < tree.top.size() && !shrink {
                return Err(Error::invalid(format!(
                    "{}: {size} bytes are fewer than the present {}: QBLK_RESIZE_SHRINK must be given",
                    tree.name,
                    tree.top.size()
                )));
            }
            tree.top.driver().resize(size, prealloc, shrink)
        })
    }

    /// Work on the image as a whole: nobody replaces or closes it meanwhile, and no other such work is
    /// done, but data calls of other threads go on. The caller counts as none of them, so that a driver
    /// may wait until those under way are over. `write`: the work changes the image.
    pub(crate) fn with_tree<T>(
        &self,
        write: bool,
        work: impl FnOnce(&Tree) -> Result<T>,
    ) -> Result<T> {
        let _admin = self.shared.admin.lock();
        let tree = self.shared.tree.load(SeqCst);
        if tree.is_null() {
            return Err(Error::BadHandle("the device is closed".into()));
        }
        // SAFETY: the tree is replaced and freed under `admin` only, which is held.
        let tree = unsafe { &*tree };
        if tree.flags.0 & OpenFlags::NO_DATA != 0 {
            return Err(no_data(tree));
        }
        if write {
            if !self.write.load(Relaxed) {
                return Err(Error::ReadOnly(tree.name.clone()));
            }
            tree.may_write()?;
        }
        work(tree)
    }
}

#[cold]
fn no_data(tree: &Tree) -> Error {
    match tree.flags.has(OpenFlags::INFO_ONLY) {
        true => info_only(&tree.name),
        false => {
            Error::BadHandle(format!("{}: opened to be checked only (QBLK_OPEN_CHECK)", tree.name))
        }
    }
}

fn info_only(name: &Name) -> Error {
    Error::BadHandle(format!("{name}: opened for its description only (QBLK_OPEN_INFO_ONLY)"))
}
