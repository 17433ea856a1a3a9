//! `copy-on-read`: what is read from an image further down is written into this one.
//!
//! Writes may go on beside: a range is held alone while it is copied, and is looked up again once it is held.
//! What was written meanwhile is allocated then and left alone. Calls that change something share ranges
//! among themselves. What is known to be here is remembered, so that later reads look nothing up; it may come
//! to be wrong (below, a trim may give clusters back), which only costs a copy that is not made.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use parking_lot::RwLock;

use super::runs::Runs;
use super::*;
use crate::log::{Level, log};

pub(super) const KIND: Kind = Kind {
    name: "copy-on-read",
    about: "write what is read from images further down into this one",
    keys: &[("block-size", "what is copied at once, bytes, a power of two (the image's clusters)")],
    writes_below: always,
    open,
};

/// Bytes that are copied at a time, unless a block is larger.
const PIECE: u64 = 1 << 20;
/// Of an image without clusters.
const BLOCK: u64 = 64 << 10;
/// The state of blocks that are here.
const HERE: u8 = 1;

struct CopyOnRead {
    next: Device,
    block: u64,
    /// Whether anything can be copied: not when opened read-only, and not any more once a copy failed.
    copies: AtomicBool,
    copied: AtomicU64,
    /// Blocks that are known to be here.
    here: RwLock<Runs>,
    ranges: RangeLock,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let next = source.open(write)?;
    let clusters = u64::from(next.driver().describe().cluster_size);
    let default = if clusters.is_power_of_two() { clusters } else { BLOCK };
    let block = settings.block_size("block-size", default)?;
    Ok(Stacked::boxed(CopyOnRead {
        next,
        block,
        copies: write.into(),
        copied: 0.into(),
        here: Default::default(),
        ranges: Default::default(),
    }))
}

impl CopyOnRead {
    /// The blocks that a range touches, in bytes, as far as the device goes.
    fn around(&self, offset: u64, end: u64) -> (u64, u64) {
        let to = end.checked_next_multiple_of(self.block).unwrap_or(end);
        (offset - offset % self.block, to.min(self.next.size().max(end)))
    }

    fn is_here(&self, from: u64, to: u64) -> bool {
        let (first, last) = (from / self.block, to.div_ceil(self.block));
        self.here.read().at(first, last) == (HERE, last)
    }

    fn set(&self, from: u64, to: u64, state: u8) {
        self.here.write().set(from / self.block, to.div_ceil(self.block), state);
    }

    /// Do something that changes a range, while nothing of it is copied.
    fn change(&self, offset: u64, count: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let (from, to) = self.around(offset, offset.saturating_add(count));
        let _shared = self.ranges.lock(from, to, false);
        work()
    }

    /// See to it that blocks are here. They may not be where writing them fails.
    fn fetch(&self, from: u64, to: u64) -> Result<()> {
        if self.is_here(from, to) {
            return Ok(());
        }
        if self.is_allocated(from, to)? {
            self.set(from, to, HERE);
            return Ok(());
        }
        let _alone = self.ranges.lock(from, to, true);
        let mut at = from;
        let mut bytes = Vec::new();
        while at < to {
            let mut some = [Extent::default(); 32];
            let mut list = ExtentList::new(&mut some);
            self.next.driver().extents(at, to - at, &mut list)?;
            let n = list.len();
            let before = at;
            for e in &some[..n] {
                at += e.length;
                if !lacks(e) {
                    continue;
                }
                let zero = e.has(Extent::ZERO) && self.next.caps().zero;
                if !zero {
                    bytes.resize(e.length as usize, 0);
                    self.next.read_slice(&mut bytes, e.offset)?;
                }
                let done = match zero {
                    true => self.next.zero(e.offset, e.length, ReqFlags::MAY_TRIM),
                    false => self.next.write_slice(&bytes, e.offset, ReqFlags::NONE),
                };
                if let Err(error) = done {
                    self.give_up(e, error);
                    return Ok(());
                }
                self.copied.fetch_add(e.length, Relaxed);
            }
            if at == before {
                return Err(Error::Internal("what is below described no extent".into()));
            }
        }
        self.set(from, to, HERE);
        Ok(())
    }

    fn is_allocated(&self, from: u64, to: u64) -> Result<bool> {
        let mut some = [Extent::default(); 4];
        let mut list = ExtentList::new(&mut some);
        self.next.driver().extents(from, to - from, &mut list)?;
        let n = list.len();
        let covered = some[..n].last().map_or(from, |e| e.offset.saturating_add(e.length));
        Ok(covered >= to && !some[..n].iter().any(lacks))
    }

    fn give_up(&self, e: &Extent, error: Error) {
        if self.copies.swap(false, Relaxed) {
            let (count, offset) = (e.length, e.offset);
            log(
                Level::Warn,
                format_args!(
                    "layer '{}': {count} bytes at offset {offset} could not be copied: {error}; \
                     nothing more is copied until the device is opened anew",
                    KIND.name
                ),
            );
        }
    }

    /// The end of the piece that begins at `at`.
    fn piece(&self, at: u64, end: u64) -> u64 {
        (at - at % self.block).saturating_add(PIECE.max(self.block)).min(end)
    }
}

/// Whether what an extent describes lies further down. What nobody has is not worth keeping.
fn lacks(e: &Extent) -> bool {
    !e.has(Extent::ALLOCATED) && (!e.has(Extent::ZERO) || e.has(Extent::OWNED))
}

impl Layer for CopyOnRead {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        let below = self.next.caps().clone();
        // A write waits for a copy of the same blocks that comes from further down.
        Caps { cache: below.cache || !below.read_only, cached: false, ..below }
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        let (from, to) = self.around(offset, end);
        if !self.copies.load(Relaxed) || self.is_here(from, to) {
            return self.next.read(buf, offset);
        }
        let (mut rest, mut at) = (buf, offset);
        while at < end {
            let to = self.piece(at, end);
            let (from, until) = self.around(at, to);
            // Whether the bytes that were asked for can be read shows by reading them.
            if let Err(e) = self.fetch(from, until) {
                log(Level::Debug, format_args!("layer '{}': {e}", KIND.name));
            }
            let (part, after) = rest.split_at((to - at) as usize);
            self.next.read(part, at)?;
            (rest, at) = (after, to);
        }
        Ok(())
    }
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        let (from, to) = self.around(offset, offset.saturating_add(buf.len() as u64));
        if self.copies.load(Relaxed) && !self.is_here(from, to) {
            return Ok(false);
        }
        self.next.read_now(buf, offset)
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.change(offset, buf.len() as u64, || self.next.write(buf, offset, flags))
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.change(offset, count, || self.next.zero(offset, count, flags))
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.change(offset, count, || self.next.trim(offset, count, flags))?;
        let (from, to) = self.around(offset, offset.saturating_add(count));
        self.set(from, to, 0);
        Ok(())
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        let end = offset.saturating_add(count);
        let mut at = offset;
        while at < end && self.copies.load(Relaxed) {
            let to = self.piece(at, end);
            let (from, until) = self.around(at, to);
            self.fetch(from, until)?;
            at = to;
        }
        if self.next.caps().cache { self.next.cache(offset, count) } else { Ok(()) }
    }
    fn reopened(&self) {
        // Others may have changed what is below.
        self.set(0, u64::MAX, 0);
    }
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        vec![("copy-on-read.copied", self.copied.load(Relaxed).to_string().into_bytes())]
    }
}
