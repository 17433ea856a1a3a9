//! A piece of a request: read from the cache or brought into it, written into it or through it.

use super::*;

impl Cache {
    /// Read blocks that are all here. `None`: they are not, or could not be read.
    pub(super) fn read_here(&self, buf: Dst<'_>, at: u64, end: u64, now: bool) -> Option<()> {
        let (first, last) = self.blocks(at, end);
        let pinned = self.slots.lock().pin_all(first, last)?;
        let mut all = true;
        for (slot, p) in pinned.iter().zip(self.parts(at, end)) {
            let (skip, len) = p.of(at);
            let (buf, place) = (buf.sub(skip, len), self.place(*slot) + (p.at - p.from));
            all &= match now {
                true => self.store.read_now(buf, place).unwrap_or(false),
                false => self.store.read(buf, place).is_ok(),
            };
        }
        let mut slots = self.slots.lock();
        pinned.iter().for_each(|slot| slots.unpin(*slot));
        all.then_some(())
    }

    /// Read a piece, and keep what of it was not here.
    pub(super) fn read_piece(&self, buf: Option<Dst<'_>>, at: u64, end: u64) -> Result<()> {
        let run = self.blocks(at, end);
        {
            let _shared = self.hold(run, false);
            let missing = self.slots.lock().missing(run.0, run.1);
            if missing == 0 {
                let found = buf.map_or(Some(()), |buf| self.read_here(buf, at, end, false));
                if found.is_some() {
                    self.hits.fetch_add(run.1 - run.0, Relaxed);
                    return Ok(());
                }
            }
        }
        let missing = self.slots.lock().missing(run.0, run.1);
        let mut spare = self.spare(missing);
        let _alone = self.hold(run, true);
        let parts: Vec<Part> = self.parts(at, end).collect();
        let mut i = 0;
        while let Some(p) = parts.get(i) {
            if self.read_slot(buf, at, p)? {
                self.hits.fetch_add(1, Relaxed);
                i += 1;
                continue;
            }
            // All that follow and are not here either come with it.
            let more = {
                let slots = self.slots.lock();
                parts[i..].iter().take_while(|p| slots.missing(p.block, p.block + 1) == 1).count()
            };
            let run = &parts[i..i + more.max(1)];
            self.bring(buf, at, run, &mut spare.1)?;
            self.misses.fetch_add(run.len() as u64, Relaxed);
            i += run.len();
        }
        Ok(())
    }

    /// Read the part of a block that is here; `false` if it is not. The range is held alone.
    fn read_slot(&self, buf: Option<Dst<'_>>, start: u64, p: &Part) -> Result<bool> {
        let Some(slot) = self.slots.lock().pin(p.block) else { return Ok(false) };
        let read = buf.map_or(Ok(()), |buf| {
            let (skip, len) = p.of(start);
            self.store.read(buf.sub(skip, len), self.place(slot) + (p.at - p.from))
        });
        let mut slots = self.slots.lock();
        slots.unpin(slot);
        self.or_forget(&mut slots, p, read)
    }

    /// Whether the store did what it was asked for with a block. One that fails is forgotten, for it is below,
    /// too; if it is not, that is an error.
    fn or_forget(&self, slots: &mut Slots, p: &Part, done: Result<()>) -> Result<bool> {
        match done {
            Ok(()) => Ok(true),
            Err(e) if slots.is_dirty(p.block) => Err(self.lost(p, e)),
            Err(_) => {
                slots.forget(p.block);
                Ok(false)
            }
        }
    }

    fn lost(&self, p: &Part, because: Error) -> Error {
        let what = format!(
            "{} bytes at offset {} are in its store only, which failed",
            p.to - p.from,
            p.from
        );
        Error::Layer { layer: KIND.name, what, because: Box::new(because) }
    }

    /// Bring in blocks that follow one another, as far as there are slots. The range is held alone.
    fn bring(
        &self,
        buf: Option<Dst<'_>>,
        start: u64,
        run: &[Part],
        spare: &mut Vec<Slot>,
    ) -> Result<()> {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return Ok(()) };
        // Without a slot there is no point in more than was asked for.
        let mut whole = !spare.is_empty();
        let (mut from, to) = if whole { (first.from, last.to) } else { (first.at, last.end) };
        let mut bytes = vec![0; (to - from) as usize];
        if let Err(e) = self.next.read_slice(&mut bytes, from) {
            if buf.is_none() || (from, to) == (first.at, last.end) {
                return Err(e);
            }
            // What can not be read may be beside what was asked for.
            (whole, from) = (false, first.at);
            bytes.truncate((last.end - from) as usize);
            self.next.read_slice(&mut bytes, from)?;
        }
        for p in run {
            let at = |offset: u64| (offset - from) as usize;
            if let Some(buf) = buf {
                let (skip, len) = p.of(start);
                buf.sub(skip, len).copy_from(&bytes[at(p.at)..at(p.end)]);
            }
            if whole && let Some(slot) = spare.pop() {
                let block = &bytes[at(p.from)..at(p.to)];
                self.fill(slot, p.block, block, false, spare);
            }
        }
        Ok(())
    }

    /// Put a block into a slot that was taken. Whether it is there: the store may be full.
    fn fill(
        &self,
        slot: Slot,
        block: u64,
        bytes: &[u8],
        dirty: bool,
        spare: &mut Vec<Slot>,
    ) -> bool {
        let written = self.store.write_slice(bytes, self.place(slot), ReqFlags::NONE);
        match written {
            Ok(()) => self.slots.lock().fill(slot, block, dirty),
            Err(_) => spare.push(slot),
        }
        written.is_ok()
    }

    /// Change the part of a block that is here, which makes it dirty or leaves it as it was; `false` if it
    /// is not here (any more: a clean one that the store does not take is forgotten). The range is held alone.
    pub(super) fn write_slot(&self, buf: Src<'_>, p: &Part, dirty: bool) -> Result<bool> {
        let Some(slot) = self.slots.lock().pin(p.block) else { return Ok(false) };
        let written = self.store.write(buf, self.place(slot) + (p.at - p.from), ReqFlags::NONE);
        let mut slots = self.slots.lock();
        if dirty && written.is_ok() {
            // Before anybody may take the slot.
            slots.set_dirty(p.block, true);
        }
        slots.unpin(slot);
        self.or_forget(&mut slots, p, written)
    }

    /// Write a piece into the cache; what finds no slot goes below.
    pub(super) fn write_piece_back(&self, buf: Src<'_>, at: u64, end: u64) -> Result<()> {
        let run = self.blocks(at, end);
        let missing = self.slots.lock().missing(run.0, run.1);
        let mut spare = self.spare(missing);
        let _alone = self.hold(run, true);
        for p in self.parts(at, end) {
            let (skip, len) = p.of(at);
            let part = buf.sub(skip, len);
            if self.write_slot(part, &p, true)? {
                continue;
            }
            let Some(slot) = spare.1.pop() else {
                self.next.write(part, p.at, ReqFlags::NONE)?;
                continue;
            };
            let mut bytes = vec![0; (p.to - p.from) as usize];
            if !p.is_whole()
                && let Err(e) = self.next.read_slice(&mut bytes, p.from)
            {
                // What can not be read may be beside it, or be mended by it.
                log(Level::Debug, format_args!("layer '{}': {e}", KIND.name));
                spare.1.push(slot);
                self.next.write(part, p.at, ReqFlags::NONE)?;
                continue;
            }
            part.copy_to(&mut bytes[(p.at - p.from) as usize..]);
            if !self.fill(slot, p.block, &bytes, true, &mut spare.1) {
                self.next.write(part, p.at, ReqFlags::NONE)?;
            }
        }
        Ok(())
    }

    /// Write a piece below, and change what of it is here.
    pub(super) fn write_piece_through(
        &self,
        buf: Src<'_>,
        at: u64,
        end: u64,
        flags: ReqFlags,
    ) -> Result<()> {
        let run = self.blocks(at, end);
        let missing = {
            let slots = self.slots.lock();
            let new = |p: &Part| p.is_whole() && slots.missing(p.block, p.block + 1) == 1;
            self.parts(at, end).filter(new).count()
        };
        let mut spare = self.spare(missing);
        let _alone = self.hold(run, true);
        if let Err(e) = self.next.write(buf, at, flags) {
            self.forget_clean(run);
            return Err(e);
        }
        for p in self.parts(at, end) {
            let (skip, len) = p.of(at);
            let part = buf.sub(skip, len);
            if self.write_slot(part, &p, false)? {
                if p.is_whole() {
                    self.slots.lock().set_dirty(p.block, false);
                }
            } else if p.is_whole()
                && let Some(slot) = spare.1.pop()
            {
                let mut bytes = vec![0; len];
                part.copy_to(&mut bytes);
                self.fill(slot, p.block, &bytes, false, &mut spare.1);
            }
        }
        Ok(())
    }
}
