//! Zeroing and trimming: whole clusters by their entries, the rest by writing zeroes.

use super::write::Change;
use super::*;

/// What is done to whole clusters.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Fate {
    /// They read as zeroes; their space is kept.
    ZeroKeep,
    /// They read as zeroes; their space is given back.
    ZeroFree,
    /// As `ZeroFree`, where that can be had without writing; else they stay as they are.
    Trim,
    /// They are not in the image any more (past its end).
    Forget,
}

impl Qcow2 {
    /// See [`Driver::zero`].
    pub(super) fn zero_range(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.writer_parts()?;
        let how = if flags.has(ReqFlags::MAY_TRIM) { Fate::ZeroFree } else { Fate::ZeroKeep };
        let (from, to) = self.whole_clusters(offset, count);
        let end = offset + count;
        if flags.has(ReqFlags::FAST_ZERO) {
            for (from, to) in [(offset, from.min(end)), (to.max(from).min(end), end)] {
                if from < to && !self.reads_as_zeroes(from, to)? {
                    return Err(Error::NotSupported("fast zeroing of parts of clusters"));
                }
            }
        }
        if !self.v3 && (how == Fate::ZeroKeep || self.may_show_below(offset)) {
            // Version 2 has no zero flag: what does not read as zeroes yet is written.
            return match flags.has(ReqFlags::FAST_ZERO) {
                true => Err(Error::NotSupported("fast zeroing (the image is of version 2)")),
                false => self.zero_part(offset, end),
            };
        }
        if from >= to {
            return self.zero_part(offset, end);
        }
        self.zero_part(offset, from)?;
        self.drop_clusters(from, to, how)?;
        self.zero_part(to.min(end), end)
    }

    /// See [`Driver::trim`].
    pub(super) fn trim_range(&self, offset: u64, count: u64) -> Result<()> {
        let (from, to) = self.whole_clusters(offset, count);
        if from < to { self.drop_clusters(from, to, Fate::Trim) } else { Ok(()) }
    }

    /// The whole clusters of a range; a last one that the image's end cuts counts as whole.
    fn whole_clusters(&self, offset: u64, count: u64) -> (u64, u64) {
        let (end, mask) = (offset + count, self.cluster_size() - 1);
        let from = (offset + mask) & !mask;
        let to = if end == self.size.load(Acquire) { (end + mask) & !mask } else { end & !mask };
        (from, to)
    }

    fn reads_as_zeroes(&self, mut from: u64, to: u64) -> Result<bool> {
        while from < to {
            let run = walk::locate(self, from, to - from)?;
            if !matches!(run.place, Place::Zero { .. }) {
                return Ok(false);
            }
            from += run.len;
        }
        Ok(true)
    }

    /// Write zeroes over part of a cluster, unless it reads so already.
    pub(super) fn zero_part(&self, mut from: u64, to: u64) -> Result<()> {
        while from < to {
            let run = walk::locate(self, from, to - from)?;
            let len = run.len.min(to - from).min(ZEROES.0.len() as u64);
            // Runs of an image below may end anywhere; `from` and `to` are where requests may be cut.
            let whole = len - len % self.unit();
            // Zeroes that are only the lack of a backing image that is named but not open do not last.
            let named = self.backing_is_named && !self.hold_zeroes.load(Acquire);
            let lasts = |allocated| allocated || named || !self.may_show_below(from);
            if whole > 0 && matches!(run.place, Place::Zero { allocated, .. } if lasts(allocated)) {
                from += whole;
                continue;
            }
            let len = len.next_multiple_of(self.unit());
            self.write_data(OneIov::src(&ZEROES.0[..len as usize]).iov(), from, ReqFlags::NONE)?;
            from += len;
        }
        Ok(())
    }

    /// Change the entries of the whole clusters of `from..to`.
    pub(super) fn drop_clusters(&self, from: u64, to: u64, how: Fate) -> Result<()> {
        let writer = self.writer_parts()?;
        let (mut at, end) = (from >> self.cluster_bits, to >> self.cluster_bits);
        let table = 1u64 << self.l2_bits;
        while at < end {
            let l1_index = at >> self.l2_bits;
            let table_end = ((l1_index + 1) * table).min(end);
            let has_table = self
                .l1()
                .entries
                .get(l1_index as usize)
                .is_some_and(|e| e.load(Acquire) & !COPIED != 0);
            // Without a table the clusters are not here: that is as it should be, but where they must
            // read as zeroes and something may show from below.
            let as_it_should = matches!(how, Fate::Forget | Fate::Trim)
                || !self.may_show_below(at << self.cluster_bits);
            if !has_table && as_it_should {
                at = table_end;
                continue;
            }
            let slice = at >> self.slice_bits;
            let stop = ((slice + 1) << self.slice_bits).min(table_end);
            let done = self.or_grow(self.drop_in_slice(writer, slice, at, stop, how))?;
            at = done.unwrap_or(at);
        }
        Ok(())
    }

    /// Change entries `at..stop` of one slice; returns where to go on, which is `at` to try again.
    fn drop_in_slice(
        &self,
        writer: &Writer,
        slice: u64,
        at: u64,
        stop: u64,
        how: Fate,
    ) -> Change<u64> {
        let mut meta = writer.meta.lock();
        if meta.busy.iter().any(|b| b.0 < stop && at < b.1) {
            writer.settled.wait(&mut meta);
            return Ok(at);
        }
        self.own_table(&mut meta, at >> self.l2_bits)?;
        let Ok(held) = self.hold(slice)? else {
            drop(meta);
            self.writeback()?;
            return Ok(at);
        };
        let mut changed = false;
        for cluster in at..stop {
            let raw = held.get(cluster as usize);
            let old = entry::decode(raw, self.cluster_bits, self.v3)
                .map_err(|what| self.bad_entry(cluster, raw, what))?;
            let below = self.may_show_below(cluster << self.cluster_bits);
            let Some(new) = self.dropped(old, how, below) else { continue };
            if !changed {
                self.dirtied(writer, &mut meta, &held);
                changed = true;
            }
            held.set(cluster as usize, new);
            // A cluster whose space is kept is still pointed to.
            let kept = matches!(entry::decode(new, self.cluster_bits, self.v3),
                Ok(Entry::Zero { host, .. }) if host != 0);
            if !kept {
                self.unmap(&mut meta, raw);
            }
        }
        drop(held);
        let much = self.much_waits(&meta);
        drop(meta);
        if much {
            self.writeback()?;
        }
        Ok(stop)
    }

    /// The entry that takes the place of `old`, if it changes. `below`: an image below may have data.
    fn dropped(&self, old: Entry, how: Fate, below: bool) -> Option<u64> {
        // Without the zero flag, nothing at all is as good where nothing is below.
        let nothing = if below { self.v3.then(|| entry::zero(0)) } else { Some(0) };
        match (how, old) {
            (Fate::Forget, Entry::Unallocated) => None,
            (Fate::Forget, _) => Some(0),
            (Fate::Trim, Entry::Unallocated) => None,
            (_, Entry::Unallocated) => {
                if below {
                    nothing
                } else {
                    None
                }
            }
            (_, Entry::Zero { host: 0, .. }) => None,
            (Fate::ZeroKeep, Entry::Zero { .. }) => None,
            (Fate::ZeroKeep, Entry::Normal { host, copied: true }) => Some(entry::zero(host)),
            _ => nothing,
        }
    }
}
