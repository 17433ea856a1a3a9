//! Layers: devices that stand on another one and change what passes through.
//!
//! A layer stands on contexts that it opens on a [`Source`]: one for all its calls as a rule, more where
//! it works in the background or swaps them. It knows the methods of [`Layer`], each of which goes to the
//! context below unless the layer says otherwise. Whatever else a [`Driver`] can be asked, now or in a
//! later version, is answered by [`Stacked`] with "not supported", never passed around the layer: one
//! that changes bytes would else be gone around by the first method that it has never heard of.
//!
//! One file a layer; [`KINDS`] lists them all.

mod around;
mod blocksize;
mod cache;
mod copy_on_read;
mod cow;
mod delay;
mod error;
mod fua;
mod log;
mod multi_conn;
mod noextents;
mod nozero;
mod offset;
mod partition;
mod protect;
mod random;
mod ranges;
mod rate;
mod readahead;
mod readonly;
mod retry;
mod runs;
mod settings;
mod spec;
mod stats;
mod swab;
mod truncate;
mod unflushed;

use std::any::Any;
use std::sync::Arc;

use crate::block::*;
pub use settings::Settings;
pub use spec::{Spec, parse_list};

/// All layers that are built in, by name.
pub const KINDS: &[Kind] = &[
    blocksize::KIND,
    cache::KIND,
    copy_on_read::KIND,
    cow::KIND,
    delay::KIND,
    error::KIND,
    fua::KIND,
    log::KIND,
    multi_conn::KIND,
    noextents::KIND,
    nozero::KIND,
    offset::KIND,
    partition::KIND,
    protect::KIND,
    rate::KIND,
    readahead::KIND,
    readonly::KIND,
    retry::KIND,
    stats::KIND,
    swab::KIND,
    truncate::KIND,
];

/// A kind of layer.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Its name in `layers=`.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// Its settings and what they mean; one that is not here is refused.
    pub keys: &'static [(&'static str, &'static str)],
    /// Whether what is below must be open for writing when the layer is to be written.
    pub writes_below: fn(&Settings) -> Result<bool>,
    /// Put a layer on a source.
    pub open: Open,
}

/// How a layer is put on a source; the last argument: whether it is to be written.
pub type Open = fn(&Settings, Arc<dyn Source>, bool) -> Result<Box<dyn Driver>>;

/// What a layer stands on: a device that any number of contexts can be opened on, at any time and from
/// any thread. They share one truth about every byte.
pub trait Source: Send + Sync {
    /// What is below, for people.
    fn name(&self) -> &Name;
    /// Whether contexts can be opened for writing.
    fn can_write(&self) -> bool;
    /// Open a context. It is closed by dropping it, which flushes nothing.
    fn open(&self, write: bool) -> Result<Device>;
    /// Open what is below anew, beneath all contexts: calls on them wait meanwhile; if it fails, all
    /// stays as it was.
    fn reopen(&self) -> Result<()>;
    /// A context as the room above knows it, for layers in C.
    fn handle(&self, write: bool) -> Result<Box<dyn Any + Send>>;
    /// Whether `context`, as the room above knows it, is one of this source.
    fn has(&self, _context: &dyn Any) -> bool {
        false
    }
}

/// The methods of a layer. Those that it does not write go to [`Layer::next`] as they are.
///
/// Promises and duties are those of [`Driver`]. What is passed on needs no emulation: contexts do that.
pub trait Layer: Send + Sync {
    /// Its name in `layers=`.
    fn kind(&self) -> &'static str;
    /// The context below.
    fn next(&self) -> &Device;
    /// What it can do: what the one below can.
    fn caps(&self) -> Caps {
        self.next().caps().clone()
    }
    /// Size in bytes, now.
    fn size(&self) -> u64 {
        self.next().size()
    }
    /// Fill `buf` with the bytes from `offset` on.
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.next().read(buf, offset)
    }
    /// Fill `buf` if nothing has to be waited for. A layer that changes reads writes this, too.
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        self.next().read_now(buf, offset)
    }
    /// Write `buf` at `offset`. Flag: [`ReqFlags::FUA`], if its caps say so.
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.next().write(buf, offset, flags)
    }
    /// Make everything that was written survive a power cut.
    fn flush(&self) -> Result<()> {
        self.next().flush()
    }
    /// Make a range read as zeroes.
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.next().zero(offset, count, flags)
    }
    /// Give a range back. Flag: [`ReqFlags::FUA`], if its caps say so.
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.next().trim(offset, count, flags)
    }
    /// Bring a range near.
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.next().cache(offset, count)
    }
    /// Which parts of a range are holes.
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        self.next().driver().extents(offset, count, out)
    }
    /// Bytes in use on the host.
    fn allocated(&self) -> Option<u64> {
        self.next().driver().allocated()
    }
    /// Flush because a handle is closed: as [`Layer::flush`], but nobody is kept waiting by a peer that does
    /// not answer. A layer that has something of its own to flush writes this, too.
    fn flush_to_close(&self) -> Result<()> {
        self.next().flush_to_close()
    }
    /// Flush, and settle what the layer itself keeps. It stays usable. A peer that does not answer keeps
    /// nobody waiting here, either.
    fn close(&self) -> Result<()> {
        self.flush_to_close()
    }
    /// What of its own is lost if it is dropped without having been closed, flushed or not: for people.
    fn kept_until_closed(&self) -> Option<String> {
        None
    }
    /// What is below was opened anew, because the device was: what was said to last until then does so no
    /// more.
    fn reopened(&self) {}
    /// Properties of its own (`NAME.KEY`), added to those from below.
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        Vec::new()
    }
}

/// A layer as a driver.
pub struct Stacked<L>(L);

impl<L: Layer + 'static> Stacked<L> {
    /// Put `layer` into a box.
    pub fn boxed(layer: L) -> Box<dyn Driver> {
        Box::new(Self(layer))
    }
}

impl<L: Layer> Driver for Stacked<L> {
    fn name(&self) -> &Name {
        self.0.next().name()
    }
    fn kind(&self) -> &'static str {
        self.0.kind()
    }
    fn caps(&self) -> Caps {
        self.0.caps()
    }
    #[inline]
    fn size(&self) -> u64 {
        self.0.size()
    }
    #[inline]
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.0.read(buf, offset)
    }
    #[inline]
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        self.0.read_now(buf, offset)
    }
    #[inline]
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.0.write(buf, offset, flags)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.0.zero(offset, count, flags)
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.0.trim(offset, count, flags)
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.0.cache(offset, count)
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        self.0.extents(offset, count, out)
    }
    fn allocated(&self) -> Option<u64> {
        self.0.allocated()
    }
    fn flush_to_close(&self) -> Result<()> {
        self.0.flush_to_close()
    }
    fn close(&self) -> Result<()> {
        self.0.close()
    }
    fn kept_until_closed(&self) -> Option<String> {
        self.0.kept_until_closed()
    }
    fn reopened(&self) {
        self.0.reopened();
    }
    fn describe(&self) -> Description {
        // What is below is asked by the room above.
        let below = self.0.next().driver().describe();
        Description { properties: self.0.properties(), ..below }
    }
}

/// The kind of that name.
pub fn find(name: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|k| k.name == name)
}

/// What most layers answer to [`Kind::writes_below`].
pub(crate) fn always(_: &Settings) -> Result<bool> {
    Ok(true)
}

/// And those that write nothing to what is below.
pub(crate) fn never(_: &Settings) -> Result<bool> {
    Ok(false)
}
