//! Block status: what a range is, in the terms of each meta context.

use super::conn::{Conn, Context};
use crate::block::{Error, Extent, Result};
use crate::image::Image;
use crate::nbd::proto::{Mode, Request, alloc, chunk, chunk_header, cmd_flag};

/// Most descriptors in a reply, of each context.
const DESCRIPTORS: usize = 4096;
/// Bytes of all descriptors in a reply. It goes into the output whole: pieces would let one of the
/// pool come between.
const REPLY: usize = super::conn::OUTPUT / 2;
const _: () = assert!(2 * 16 * DESCRIPTORS <= REPLY);
/// Extents that are looked up at a time.
const EXTENTS: usize = 64;
/// Bytes of the disk that are looked at for one reply, though all of them be alike: tables have to be
/// read for them.
const SPAN: u64 = 64 << 30;

/// Descriptors of one context: lengths and flags, neighbours that are alike merged.
struct List<'a> {
    context: &'a Context,
    runs: Vec<(u64, u32)>,
    /// Most of them.
    room: usize,
    /// One found no room: what follows must not be added either.
    full: bool,
}

impl List<'_> {
    /// Add a run; `false` if there was no room.
    fn push(&mut self, len: u64, flags: u32) -> bool {
        let room = self.runs.len() < self.room;
        match self.runs.last_mut() {
            _ if self.full => {}
            Some((n, f)) if *f == flags => *n += len,
            _ if room => self.runs.push((len, flags)),
            _ => self.full = true,
        }
        !self.full
    }

    /// Add what a bitmap says of a range.
    fn dirty(&mut self, image: &Image, mut offset: u64, end: u64) -> Result<()> {
        let end = end.min(offset.saturating_add(SPAN));
        while offset < end {
            let before = offset;
            let (name, room) = (self.context.name(), self.room + 1);
            for (len, flags) in image.block_status(name, offset, end - offset, room)? {
                if !self.push(len, (flags & 1) as u32) {
                    return Ok(());
                }
                offset += len;
            }
            if offset == before {
                return Err(Error::Internal("nothing of a bitmap".into()));
            }
        }
        Ok(())
    }

    /// Shorten lengths to what a header of 32 bits can hold.
    fn fit(&mut self) {
        // The specification likes multiples of the block size; this is one of 64 KiB.
        let most = u64::from(u32::MAX) & !0xffff;
        if let Some(long) = self.runs.iter().position(|(n, _)| *n > most) {
            self.runs.truncate(long + 1);
            self.runs[long].0 = most;
        }
    }
}

impl Context {
    /// What it says of an extent; of a bitmap that is told elsewhere.
    fn flags(&self, e: &Extent) -> u32 {
        match self {
            Self::Allocation => {
                let hole = if e.has(Extent::DATA) { 0 } else { alloc::HOLE };
                hole | if e.has(Extent::ZERO) { alloc::ZERO } else { 0 }
            }
            Self::Depth if e.has(Extent::OWNED) => e.depth + 1,
            Self::Depth | Self::Bitmap(..) => 0,
        }
    }
}

impl Conn {
    /// The reply to a request for block status, of these contexts only if there are `ids`.
    pub(super) fn status(&self, r: &Request, ids: Option<&[u32]>) -> Result<Vec<u8>> {
        let asked = |c: &&Context| ids.is_none_or(|ids| ids.contains(&c.id()));
        let share = REPLY / 16 / self.contexts.iter().filter(asked).count().max(1);
        let one = r.flags & cmd_flag::REQ_ONE != 0;
        let room = if one { 1 } else { share.clamp(1, DESCRIPTORS) };
        let mut lists: Vec<List<'_>> = self
            .contexts
            .iter()
            .filter(asked)
            .map(|context| List { context, runs: Vec::new(), room, full: false })
            .collect();
        self.export.with(|image| {
            let end = r.offset.saturating_add(r.length).min(image.size()?);
            let bitmap = |c: &Context| matches!(c, Context::Bitmap(..));
            for list in lists.iter_mut().filter(|l| bitmap(l.context)) {
                list.dirty(image, r.offset, end)?;
            }
            let mut lists: Vec<_> = lists.iter_mut().filter(|l| !bitmap(l.context)).collect();
            let mut offset = if lists.is_empty() { end } else { r.offset };
            let mut some = [Extent::default(); EXTENTS];
            while offset < end && offset - r.offset < SPAN {
                let n = image.extents_owned(offset, (end - offset).min(SPAN), &mut some)?;
                if n == 0 {
                    return Err(Error::Internal("no extents".into()));
                }
                for e in &some[..n] {
                    let len = e.length.min(end - e.offset);
                    // Contexts may end at different places; with one full, the client asks again.
                    let mut room = true;
                    for list in &mut lists {
                        let flags = list.context.flags(e);
                        room &= list.push(len, flags);
                    }
                    if !room || self.is_cut() {
                        return Ok(());
                    }
                    offset += len;
                }
            }
            Ok(())
        })?;
        // The device became smaller since the range was checked.
        if lists.iter().any(|l| l.runs.is_empty()) {
            return Err(Error::invalid("nothing there to describe"));
        }
        Ok(self.encode(r, lists))
    }

    fn encode(&self, r: &Request, mut lists: Vec<List<'_>>) -> Vec<u8> {
        let extended = self.mode == Mode::Extended;
        let mut out = Vec::new();
        let last = lists.len().saturating_sub(1);
        for (i, list) in lists.iter_mut().enumerate() {
            let done = if i == last { chunk::DONE } else { 0 };
            if !extended {
                list.fit();
            }
            let count = list.runs.len() as u64;
            let (kind, length) = match extended {
                true => (chunk::BLOCK_STATUS_EXT, 8 + 16 * count),
                false => (chunk::BLOCK_STATUS, 4 + 8 * count),
            };
            let (head, n) = chunk_header(self.mode, done, kind, r, length);
            out.extend_from_slice(&head[..n]);
            out.extend_from_slice(&list.context.id().to_be_bytes());
            if extended {
                out.extend_from_slice(&(count as u32).to_be_bytes());
            }
            for (len, flags) in &list.runs {
                if extended {
                    out.extend_from_slice(&len.to_be_bytes());
                    out.extend_from_slice(&u64::from(*flags).to_be_bytes());
                } else {
                    out.extend_from_slice(&(*len as u32).to_be_bytes());
                    out.extend_from_slice(&flags.to_be_bytes());
                }
            }
        }
        out
    }
}
