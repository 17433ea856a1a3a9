//! `cow`: a temporary overlay. What is written goes to a file without a name, or to memory, in blocks; what
//! is below is only read, until the overlay is closed and (with `commit=on`) written there.
//!
//! Blocks lie in the store where they lie on the device: it is sparse. A block is put there whole the first
//! time that a part of it is written. That is the one thing that needs a lock over I/O: bytes of the block
//! come from below, and nobody may write others of them meanwhile.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;

use super::runs::Runs;
use super::*;
use crate::file::{temporary, temporary_directory};

pub(super) const KIND: Kind = Kind {
    name: "cow",
    about: "a temporary overlay: what is below is only read; changes are dropped or committed at close",
    keys: &[
        ("store", "where changes are kept: file or memory (file)"),
        ("directory", "where the file is made (TMPDIR or /var/tmp)"),
        ("block-size", "in which changes are kept, bytes, a power of two (4k)"),
        ("commit", "on: write the changes below at close (off)"),
    ],
    writes_below: commits,
    open,
};

/// Bytes that are committed at a time.
const PIECE: u64 = 1 << 20;
/// In the store.
const STORED: u8 = 1;
/// All zeroes, kept nowhere.
const ZERO: u8 = 2;

struct Cow {
    next: Device,
    store: Device,
    /// That of the device below when it was opened.
    size: u64,
    block: u64,
    write: bool,
    commit: bool,
    /// Which blocks are here. Set after their bytes are in the store.
    here: RwLock<Runs>,
    /// Held alone where a block comes to be here in part from below, or goes; shared by other writes.
    blocks: RangeLock,
}

fn commits(settings: &Settings) -> Result<bool> {
    Ok(settings.switch("commit")?.unwrap_or(false))
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let commit = commits(settings)?;
    let next = source.open(write && commit)?;
    let block = settings.block_size("block-size", 4096)?;
    let store = store_of(settings, "file")?;
    Ok(Stacked::boxed(Cow {
        size: next.size(),
        next,
        store,
        block,
        write,
        commit,
        here: Default::default(),
        blocks: Default::default(),
    }))
}

/// Where a layer with the settings `store` and `directory` keeps bytes.
pub(super) fn store_of(settings: &Settings, default: &str) -> Result<Device> {
    let names = ["file", "memory"];
    let store = settings.one_of("store", &names)?.map_or(default, |i| names[i]);
    let directory = settings.path("directory");
    if store == "memory" && directory.is_some() {
        return Err(settings.bad("directory", "none with store=memory"));
    }
    let directory = (store == "file").then(|| directory.unwrap_or_else(temporary_directory));
    let place = directory.as_ref().map_or(PathBuf::from("memory"), Clone::clone);
    let name = Name::from(format!("store of layer '{}' in {}", settings.layer(), place.display()));
    Ok(Device::new(temporary(directory.as_deref(), &name)?))
}

impl Cow {
    /// The state of the byte at `offset`, and where it changes, at the latest `end`.
    fn at(&self, offset: u64, end: u64) -> (u8, u64) {
        let (state, to) = self.here.read().at(offset / self.block, end.div_ceil(self.block).max(1));
        (state, to.saturating_mul(self.block).min(end))
    }

    fn set(&self, from: u64, to: u64, state: u8) {
        self.here.write().set(from / self.block, to.div_ceil(self.block), state);
    }

    /// The end of a range of the device.
    fn end(&self, offset: u64, count: u64) -> Result<u64> {
        offset.checked_add(count).filter(|end| *end <= self.size).ok_or_else(|| {
            let file = self.next.name().clone();
            Error::Range { file, offset, count, size: self.size }
        })
    }

    /// The part of a range that is whole blocks. The last block of the device may be short.
    fn whole(&self, offset: u64, end: u64) -> (u64, u64) {
        let from = offset.checked_next_multiple_of(self.block).unwrap_or(end).min(end);
        let to = if end == self.size { end } else { end - end % self.block };
        (from, to.max(from))
    }

    /// Write a part of one block, which begins at `from` and ends at `to`.
    fn write_part(&self, part: Src<'_>, offset: u64, from: u64, to: u64) -> Result<()> {
        {
            let _shared = self.blocks.lock(from, to, false);
            if self.at(from, to).0 == STORED {
                return self.store.write(part, offset, ReqFlags::NONE);
            }
        }
        let _alone = self.blocks.lock(from, to, true);
        let state = self.at(from, to).0;
        if state == STORED {
            return self.store.write(part, offset, ReqFlags::NONE);
        }
        let mut block = vec![0; (to - from) as usize];
        if state != ZERO {
            self.next.read_slice(&mut block, from)?;
        }
        part.copy_to(&mut block[(offset - from) as usize..]);
        self.store.write_slice(&block, from, ReqFlags::NONE)?;
        self.set(from, to, STORED);
        Ok(())
    }

    fn zero_part(&self, offset: u64, end: u64) -> Result<()> {
        let from = offset - offset % self.block;
        let to = from.saturating_add(self.block).min(self.size);
        if offset == end || self.at(from, to).0 == ZERO {
            return Ok(());
        }
        let zeroes = vec![0; (end - offset) as usize];
        self.write_part(OneIov::src(&zeroes).iov(), offset, from, to)
    }

    /// Let whole blocks be zeroes.
    fn zero_whole(&self, from: u64, to: u64) {
        if from == to {
            return;
        }
        let _alone = self.blocks.lock(from, to, true);
        self.set(from, to, ZERO);
        // That the space comes back is all that this is for.
        let _ = self.store.trim(from, to - from, ReqFlags::NONE);
    }

    /// Write what is here below, and make it last.
    fn commit_all(&self) -> Result<()> {
        let mut piece = Vec::new();
        let mut at = 0;
        while at < self.size {
            let (state, end) = self.at(at, self.size);
            let done = match state {
                STORED => {
                    let n = (end - at).min(PIECE);
                    piece.resize(n as usize, 0);
                    let read = self.store.read_slice(&mut piece, at);
                    read.and_then(|()| self.next.write_slice(&piece, at, ReqFlags::NONE))
                        .map(|()| n)
                }
                ZERO => self.next.zero(at, end - at, ReqFlags::MAY_TRIM).map(|()| end - at),
                _ => Ok(end - at),
            };
            at += done.map_err(|e| self.commit_error(at, e))?;
        }
        self.next.flush_to_close().map_err(|e| self.commit_error(self.size, e))?;
        self.here.write().set(0, u64::MAX, 0);
        Ok(())
    }

    fn commit_error(&self, at: u64, because: Error) -> Error {
        Error::Layer {
            layer: KIND.name,
            what: format!(
                "its changes are committed up to byte {at} of {} only, the rest is lost when it is closed",
                self.size
            ),
            because: Box::new(because),
        }
    }
}

impl Layer for Cow {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        Caps {
            read_only: !self.write,
            flush: true,
            fua: true,
            zero_fua: true,
            trim_fua: true,
            trim: true,
            zero: true,
            fast_zero: true,
            extents: true,
            ..self.next.caps().clone()
        }
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn read(&self, mut buf: Dst<'_>, mut offset: u64) -> Result<()> {
        let end = self.end(offset, buf.len() as u64)?;
        while offset < end {
            let (state, to) = self.at(offset, end);
            let (part, rest) = buf.split_at((to - offset) as usize);
            match state {
                STORED => self.store.read(part, offset)?,
                ZERO => part.zero_fill(),
                _ => self.next.read(part, offset)?,
            }
            (buf, offset) = (rest, to);
        }
        Ok(())
    }
    fn read_now(&self, mut buf: Dst<'_>, mut offset: u64) -> Result<bool> {
        let end = self.end(offset, buf.len() as u64)?;
        while offset < end {
            let (state, to) = self.at(offset, end);
            let (part, rest) = buf.split_at((to - offset) as usize);
            let done = match state {
                STORED => self.store.read_now(part, offset)?,
                ZERO => {
                    part.zero_fill();
                    true
                }
                _ => self.next.read_now(part, offset)?,
            };
            if !done {
                return Ok(false);
            }
            (buf, offset) = (rest, to);
        }
        Ok(true)
    }
    fn write(&self, mut buf: Src<'_>, mut offset: u64, _flags: ReqFlags) -> Result<()> {
        let end = self.end(offset, buf.len() as u64)?;
        let (from, to) = self.whole(offset, end);
        while offset < end {
            let whole = offset >= from && offset < to;
            let start = offset - offset % self.block;
            let stop = start.saturating_add(self.block).min(self.size);
            let n = if whole { to } else { stop.min(end) } - offset;
            let (part, rest) = buf.split_at(n as usize);
            if whole {
                let _shared = self.blocks.lock(offset, to, false);
                self.store.write(part, offset, ReqFlags::NONE)?;
                self.set(offset, to, STORED);
            } else {
                self.write_part(part, offset, start, stop)?;
            }
            (buf, offset) = (rest, offset + n);
        }
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        // Nothing here is to outlive the program.
        Ok(())
    }
    fn flush_to_close(&self) -> Result<()> {
        self.flush()
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        let end = self.end(offset, count)?;
        let (from, to) = self.whole(offset, end);
        if flags.has(ReqFlags::FAST_ZERO) && (from, to) != (offset, end) {
            return Err(Error::NotSupported("fast zeroing of parts of the blocks of layer 'cow'"));
        }
        self.zero_part(offset, from)?;
        self.zero_whole(from, to);
        self.zero_part(to.max(from), end)
    }
    fn trim(&self, offset: u64, count: u64, _flags: ReqFlags) -> Result<()> {
        let end = self.end(offset, count)?;
        let (from, to) = self.whole(offset, end);
        self.zero_whole(from, to);
        Ok(())
    }
    fn cache(&self, mut offset: u64, count: u64) -> Result<()> {
        let end = self.end(offset, count)?;
        while offset < end {
            let (state, to) = self.at(offset, end);
            if state == 0 {
                self.next.cache(offset, to - offset)?;
            }
            offset = to;
        }
        Ok(())
    }
    fn extents(&self, mut offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        let end = self.end(offset, count)?;
        while offset < end && !out.is_full() {
            let (state, to) = self.at(offset, end);
            let n = to - offset;
            let kept = Extent::ALLOCATED | Extent::DATA | Extent::OWNED;
            match state {
                STORED => out.push(Extent::new(offset, n, kept)),
                ZERO => out.push(Extent::hole(offset, n)),
                _ => {
                    // What is below is one image further down.
                    let mut some = [Extent::default(); 32];
                    let mut list = ExtentList::new(&mut some);
                    self.next.driver().extents(offset, n, &mut list)?;
                    let found = list.len();
                    for e in &some[..found] {
                        let flags = e.flags & !(Extent::ALLOCATED | Extent::HOST);
                        let depth = e.depth.saturating_add(1);
                        out.push(Extent { flags, depth, host_offset: 0, ..*e });
                    }
                    let covered = some[..found].last().map_or(offset, |e| e.offset + e.length);
                    if covered < to {
                        // What comes next is not known yet.
                        return Ok(());
                    }
                }
            }
            offset = to;
        }
        Ok(())
    }
    fn allocated(&self) -> Option<u64> {
        Some(self.here.read().count(STORED).saturating_mul(self.block))
    }
    fn close(&self) -> Result<()> {
        if self.write && self.commit { self.commit_all() } else { Ok(()) }
    }
    fn kept_until_closed(&self) -> Option<String> {
        if !self.write || !self.commit {
            return None;
        }
        let here = self.here.read();
        let blocks = here.count(STORED).saturating_add(here.count(ZERO));
        let bytes = blocks.saturating_mul(self.block).min(self.size);
        (bytes > 0)
            .then(|| format!("{bytes} bytes of changes that layer '{}' was to commit", KIND.name))
    }
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        let bytes = |state| {
            self.here.read().count(state).saturating_mul(self.block).to_string().into_bytes()
        };
        vec![("cow.allocated", bytes(STORED)), ("cow.zeroed", bytes(ZERO))]
    }
}
