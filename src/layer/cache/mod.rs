//! `cache`: blocks of the device below on memory or in a file, up to a size.
//!
//! A call holds the range of blocks that it works on: alone to bring blocks in or to change them, together
//! with others to read them or to write them back. It takes the slots that it may need before that, while it
//! holds no range: whoever holds a range waits for no slot, and whoever needs one can write back others'
//! blocks. Where no slot is to be had calls go below directly, which is right while a range is held.
//! The lock on [`Slots`] is taken last, and not held across I/O.
//!
//! In mode write-back a block that was changed is dirty until it was written below: when its slot is needed,
//! or by a flush. A write with FUA goes below at once. One that could not be written back is kept, tried
//! again by every flush, and the flush fails.

mod pieces;
mod slots;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

use self::slots::{Slot, Slots, Take};
use super::cow::store_of;
use super::*;
use crate::log::{Level, log};

pub(super) const KIND: Kind = Kind {
    name: "cache",
    about: "keep blocks of the device below on memory or in a file",
    keys: &[
        ("mode", "write-back or write-through (write-back)"),
        ("size", "what is kept at most, bytes (64M)"),
        ("block-size", "in which it is kept, bytes, a power of two (64k)"),
        ("store", "where: file or memory (memory)"),
        ("directory", "where the file is made (TMPDIR or /var/tmp)"),
    ],
    writes_below: always,
    open,
};

/// Bytes that are read or written below at a time, unless a block is larger.
const PIECE: u64 = 1 << 20;
/// Blocks that one call tries to write back for want of slots, before it does without.
const TRIES: usize = 2;

struct Cache {
    next: Device,
    store: Device,
    /// That of the device below when it was opened.
    size: u64,
    block: u64,
    piece: u64,
    write: bool,
    back: bool,
    slots: Mutex<Slots>,
    ranges: RangeLock,
    hits: AtomicU64,
    misses: AtomicU64,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let next = source.open(write)?;
    let back = settings.one_of("mode", &["write-back", "write-through"])?.unwrap_or(0) == 0;
    let block = settings.block_size("block-size", 64 << 10)?;
    let slots = settings.size("size")?.unwrap_or(64 << 20) / block;
    let Some(slots) = u32::try_from(slots).ok().filter(|n| *n >= 2) else {
        return Err(settings.bad("size", &format!("2 to {} blocks of {block} bytes", u32::MAX)));
    };
    let store = store_of(settings, "memory")?;
    // Several calls at once should find slots.
    let piece = (u64::from(slots) / 4 * block).min(PIECE).max(block);
    Ok(Stacked::boxed(Cache {
        size: next.size(),
        next,
        store,
        block,
        piece: piece - piece % block,
        write,
        back: back && write,
        slots: Mutex::new(Slots::new(slots)),
        ranges: Default::default(),
        hits: 0.into(),
        misses: 0.into(),
    }))
}

/// Slots that were taken; those that are left go back.
struct Spare<'a>(&'a Cache, Vec<Slot>);

impl Drop for Spare<'_> {
    fn drop(&mut self) {
        let mut slots = self.0.slots.lock();
        self.1.drain(..).for_each(|slot| slots.give_back(slot));
    }
}

/// A part of a request within one block.
struct Part {
    block: u64,
    /// The block on the device; the last may be short.
    from: u64,
    to: u64,
    /// The part on the device.
    at: u64,
    end: u64,
}

impl Part {
    fn is_whole(&self) -> bool {
        (self.at, self.end) == (self.from, self.to)
    }
    /// Where the part is in a buffer that begins at `start`.
    fn of(&self, start: u64) -> (usize, usize) {
        ((self.at - start) as usize, (self.end - self.at) as usize)
    }
}

impl Cache {
    fn end(&self, offset: u64, count: u64) -> Result<u64> {
        offset.checked_add(count).filter(|end| *end <= self.size).ok_or_else(|| {
            let file = self.next.name().clone();
            Error::Range { file, offset, count, size: self.size }
        })
    }

    /// The blocks that a range touches, by number.
    fn blocks(&self, offset: u64, end: u64) -> (u64, u64) {
        (offset / self.block, end.div_ceil(self.block))
    }

    fn hold(&self, (first, last): (u64, u64), alone: bool) -> impl Drop + '_ {
        let to = last.saturating_mul(self.block);
        self.ranges.lock(first * self.block, to, alone)
    }

    /// The parts of a range, block by block.
    fn parts(&self, offset: u64, end: u64) -> impl Iterator<Item = Part> + '_ {
        let (first, last) = self.blocks(offset, end);
        (first..last).map(move |block| {
            let from = block * self.block;
            let to = from.saturating_add(self.block).min(self.size);
            Part { block, from, to, at: offset.max(from), end: end.min(to) }
        })
    }

    /// The end of the piece of a request that begins at `at`.
    fn piece_end(&self, at: u64, end: u64) -> u64 {
        (at - at % self.block).saturating_add(self.piece).min(end)
    }

    fn place(&self, slot: Slot) -> u64 {
        u64::from(slot) * self.block
    }

    /// Take up to so many slots. No range is held.
    fn spare(&self, count: usize) -> Spare<'_> {
        let mut spare = Spare(self, Vec::with_capacity(count));
        let mut failed = 0;
        while spare.1.len() < count {
            let taken = self.slots.lock().take();
            match taken {
                Take::Slot(slot) => spare.1.push(slot),
                Take::Dirty(block) => {
                    if let Err(e) = self.write_back(block).1 {
                        log(Level::Warn, format_args!("{}", self.kept(e)));
                        failed += 1;
                        if failed == TRIES {
                            break;
                        }
                    }
                }
                Take::None => break,
            }
        }
        spare
    }

    fn kept(&self, because: Error) -> Error {
        let bytes = self.slots.lock().dirty_blocks().saturating_mul(self.block);
        Error::Layer {
            layer: KIND.name,
            what: format!(
                "writing back failed; {bytes} bytes are kept and tried again at the next flush"
            ),
            because: Box::new(because),
        }
    }

    /// Write back the dirty blocks from `first` on that follow one another: the first block after them,
    /// and how it went. No range is held.
    fn write_back(&self, first: u64) -> (u64, Result<()>) {
        let most = first.saturating_add(self.piece / self.block);
        let run = self.slots.lock().dirty_run(first, most);
        let Some((from, to)) = run.filter(|run| run.0 == first) else {
            return (first + 1, Ok(()));
        };
        // Nobody changes them while this is held.
        let _shared = self.hold((from, to), false);
        let pinned: Vec<Slot> = {
            let mut slots = self.slots.lock();
            let Some((_, to)) = slots.dirty_run(from, to).filter(|run| run.0 == from) else {
                // Of the others no one knows.
                return (first + 1, Ok(()));
            };
            (from..to).filter_map(|block| slots.pin_to_go(block)).collect()
        };
        let to = from + pinned.len() as u64;
        let mut done = self.write_slots(&pinned, from);
        let mut failed = vec![done.is_err(); pinned.len()];
        if done.is_err() && pinned.len() > 1 {
            // One that can not be written does not keep its neighbours here.
            done = Ok(());
            for ((slot, block), failed) in pinned.iter().zip(from..).zip(&mut failed) {
                let one = self.write_slots(std::slice::from_ref(slot), block);
                *failed = one.is_err();
                done = done.and(one);
            }
        }
        let mut slots = self.slots.lock();
        for ((slot, block), failed) in pinned.iter().zip(from..).zip(failed) {
            slots.unpin(*slot);
            if failed {
                // Another call may have written it back meanwhile.
                let dirty = slots.is_dirty(block);
                slots.set_stuck(block, dirty);
            } else {
                slots.set_dirty(block, false);
            }
        }
        (to, done)
    }

    /// Write what is in these slots below, where the block `first` and those after it are.
    fn write_slots(&self, slots: &[Slot], first: u64) -> Result<()> {
        let at = first * self.block;
        let end = at.saturating_add(slots.len() as u64 * self.block).min(self.size);
        let mut bytes = vec![0; (end - at) as usize];
        for (slot, part) in slots.iter().zip(bytes.chunks_mut(self.block as usize)) {
            self.store.read_slice(part, self.place(*slot))?;
        }
        self.next.write_slice(&bytes, at, ReqFlags::NONE)
    }

    /// Forget those blocks of which below has the truth. The range is held alone.
    fn forget_clean(&self, (first, last): (u64, u64)) {
        let mut slots = self.slots.lock();
        for block in slots.within(first, last) {
            if !slots.is_dirty(block) {
                slots.forget(block);
            }
        }
    }

    /// Write back all that is dirty, and flush what is below by `flush`.
    fn flush_by(&self, flush: impl FnOnce(&Device) -> Result<()>) -> Result<()> {
        let (mut at, mut failed) = (0, None);
        loop {
            let Some((first, _)) = self.slots.lock().dirty_run(at, u64::MAX) else { break };
            let (next, done) = self.write_back(first);
            failed = failed.or(done.err());
            at = next;
        }
        match failed {
            Some(e) => Err(self.kept(e)),
            None => flush(&self.next),
        }
    }

    /// Let a range be zeroes below, and here. The range is held alone.
    fn zero_held(&self, offset: u64, end: u64, flags: ReqFlags) -> Result<()> {
        let run = self.blocks(offset, end);
        if let Err(e) = self.next.zero(offset, end - offset, flags) {
            self.forget_clean(run);
            return Err(e);
        }
        let here = self.slots.lock().within(run.0, run.1);
        for block in here {
            let from = block * self.block;
            for p in self.parts(offset.max(from), end.min(from.saturating_add(self.block))) {
                if p.is_whole() {
                    self.slots.lock().forget(block);
                } else {
                    let zeroes = vec![0; (p.end - p.at) as usize];
                    self.write_slot(OneIov::src(&zeroes).iov(), &p, false)?;
                }
            }
        }
        Ok(())
    }
}

impl Layer for Cache {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        let below = self.next.caps().clone();
        Caps {
            read_only: !self.write,
            // What is dirty is written, even if it then goes no further.
            flush: below.flush || self.back,
            fua_by_flush: below.flush && below.fua_by_flush,
            cache: true,
            ..below
        }
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn read(&self, mut buf: Dst<'_>, mut offset: u64) -> Result<()> {
        let end = self.end(offset, buf.len() as u64)?;
        while offset < end {
            let to = self.piece_end(offset, end);
            let (part, rest) = buf.split_at((to - offset) as usize);
            self.read_piece(Some(part), offset, to)?;
            (buf, offset) = (rest, to);
        }
        Ok(())
    }
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        let end = self.end(offset, buf.len() as u64)?;
        let (first, last) = self.blocks(offset, end);
        if last - first > self.piece / self.block {
            return Ok(false);
        }
        let to = last.saturating_mul(self.block);
        let Some(_shared) = self.ranges.try_lock(first * self.block, to, false) else {
            return Ok(false);
        };
        let found = self.read_here(buf, offset, end, true).is_some();
        if found {
            self.hits.fetch_add(last - first, Relaxed);
        }
        Ok(found)
    }
    fn write(&self, mut buf: Src<'_>, mut offset: u64, flags: ReqFlags) -> Result<()> {
        let end = self.end(offset, buf.len() as u64)?;
        let back = self.back && !flags.has(ReqFlags::FUA);
        while offset < end {
            let to = self.piece_end(offset, end);
            let (part, rest) = buf.split_at((to - offset) as usize);
            match back {
                true => self.write_piece_back(part, offset, to)?,
                false => self.write_piece_through(part, offset, to, flags)?,
            }
            (buf, offset) = (rest, to);
        }
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        self.flush_by(Device::flush)
    }
    fn flush_to_close(&self) -> Result<()> {
        self.flush_by(Device::flush_to_close)
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        let end = self.end(offset, count)?;
        let _alone = self.hold(self.blocks(offset, end), true);
        self.zero_held(offset, end, flags)
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        let end = self.end(offset, count)?;
        let run = self.blocks(offset, end);
        let _alone = self.hold(run, true);
        // What is dirty and was trimmed below would come back there. As zeroes it need not.
        let dirty = self.slots.lock().dirty_run(run.0, run.1).is_some();
        let below = self.next.caps();
        if dirty && below.zero && below.fast_zero {
            let zero = flags | ReqFlags::MAY_TRIM | ReqFlags::FAST_ZERO;
            match self.zero_held(offset, end, zero) {
                Err(Error::NotSupported(_)) => {}
                done => return done,
            }
        }
        let done = self.next.trim(offset, count, flags);
        // What of it is dirty reads as before; of the rest below knows how it reads now.
        self.forget_clean(run);
        done
    }
    fn cache(&self, mut offset: u64, count: u64) -> Result<()> {
        let end = self.end(offset, count)?;
        let mut left = self.slots.lock().most();
        while offset < end && left > 0 {
            let to = self.piece_end(offset, end);
            self.read_piece(None, offset, to)?;
            left = left.saturating_sub((to - offset).div_ceil(self.block));
            offset = to;
        }
        Ok(())
    }
    fn extents(&self, mut offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        let end = self.end(offset, count)?;
        while offset < end && !out.is_full() {
            let (first, last) = self.blocks(offset, end);
            let dirty = self.slots.lock().dirty_run(first, last);
            let (from, to) = dirty.unwrap_or((last, last));
            let from = from.saturating_mul(self.block).clamp(offset, end);
            let to = to.saturating_mul(self.block).clamp(from, end);
            if offset < from {
                let mut some = [Extent::default(); 32];
                let mut list = ExtentList::new(&mut some);
                self.next.driver().extents(offset, from - offset, &mut list)?;
                let n = list.len();
                some[..n].iter().for_each(|e| {
                    let flags = e.flags & !Extent::HOST;
                    out.push(Extent { flags, host_offset: 0, ..*e });
                });
                let covered = some[..n].last().map_or(offset, |e| e.offset + e.length);
                if covered < from {
                    // What comes next is not known yet.
                    return Ok(());
                }
            }
            let flags = Extent::ALLOCATED | Extent::DATA | Extent::OWNED;
            out.push(Extent::new(from, to - from, flags));
            offset = to;
        }
        Ok(())
    }
    fn reopened(&self) {
        // Others may have changed what is below; what is dirty was to be written over it in any case.
        let _alone = self.ranges.lock(0, u64::MAX, true);
        self.forget_clean((0, u64::MAX));
    }
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        let (filled, dirty) = {
            let slots = self.slots.lock();
            (slots.filled(), slots.dirty_blocks())
        };
        let text = |n: u64| n.to_string().into_bytes();
        vec![
            ("cache.allocated", text(filled.saturating_mul(self.block))),
            ("cache.dirty", text(dirty.saturating_mul(self.block))),
            ("cache.hits", text(self.hits.load(Relaxed))),
            ("cache.misses", text(self.misses.load(Relaxed))),
        ]
    }
}
