//! Zeroing and trimming: whole clusters (and subclusters, where the image has them) by their entries, the
//! rest by writing zeroes.

use parking_lot::MutexGuard;

use super::cluster::{ALL, Cluster, Plain, SUB_BITS};
use super::write::Change;
use super::*;

/// What is done to whole clusters or subclusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
        if self.is_raw {
            return self.zero_raw(offset, count, flags);
        }
        let how = if flags.has(ReqFlags::MAY_TRIM) { Fate::ZeroFree } else { Fate::ZeroKeep };
        let (from, to) = self.whole_grains(offset, count);
        let end = offset + count;
        if flags.has(ReqFlags::FAST_ZERO) {
            for (from, to) in [(offset, from.min(end)), (to.max(from).min(end), end)] {
                if from < to && !self.reads_as_zeroes(from, to)? {
                    return Err(Error::NotSupported("fast zeroing of parts of clusters"));
                }
            }
            if from < to && (self.splits_compressed(from)? || self.splits_compressed(to)?) {
                return Err(Error::NotSupported("fast zeroing of parts of compressed clusters"));
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
        if self.is_raw {
            return self.data.trim(offset, count, ReqFlags::NONE);
        }
        let (from, to) = self.whole_grains(offset, count);
        if from < to { self.drop_clusters(from, to, Fate::Trim) } else { Ok(()) }
    }

    /// The whole clusters of a range (or subclusters); a last one that the image's end cuts counts as
    /// whole.
    fn whole_grains(&self, offset: u64, count: u64) -> (u64, u64) {
        let (end, mask) = (offset + count, self.grain() - 1);
        let from = (offset + mask) & !mask;
        let to = if end == self.size.load(Acquire) { (end + mask) & !mask } else { end & !mask };
        (from, to)
    }

    /// Whether a guest offset is inside a compressed cluster.
    fn splits_compressed(&self, offset: u64) -> Result<bool> {
        Ok(!offset.is_multiple_of(self.cluster_size())
            && matches!(self.lookup(offset, 1)?.entry, Entry::Compressed { .. }))
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
            // Where something else is about to be below, only this image's own do.
            let hold = self.holds_zeroes();
            let lasts = |allocated| match hold {
                true => allocated && run.depth == 0,
                false => allocated || self.backing_is_named || !self.may_show_below(from),
            };
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

    /// Change the entries of `from..to`, which are whole clusters or subclusters.
    pub(super) fn drop_clusters(&self, from: u64, to: u64, how: Fate) -> Result<()> {
        let writer = self.writer_parts()?;
        let (mut at, end) = (from >> self.cluster_bits, to.div_ceil(self.cluster_size()));
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
            let stop = (((at >> self.slice_bits) + 1) << self.slice_bits).min(table_end);
            let change = self.drop_in_slice(writer, (at, stop), (from, to), how);
            let Some(done) = self.or_grow(change)? else { continue };
            // Parts of compressed clusters can not be said to be zeroes, only be written so.
            for cluster in done.split {
                let start = cluster << self.cluster_bits;
                self.zero_part(start.max(from), (start + self.cluster_size()).min(to))?;
            }
            at = done.at;
        }
        Ok(())
    }

    /// Change what lies in `from..to` of the entries `at..stop` of one slice.
    fn drop_in_slice(
        &self,
        writer: &Writer,
        (at, stop): (u64, u64),
        (from, to): (u64, u64),
        how: Fate,
    ) -> Change<Dropped> {
        let again = || Dropped { at, split: Vec::new() };
        let mut meta = writer.meta.lock();
        if meta.busy.iter().any(|b| b.0 < stop && at < b.1) {
            writer.settled.wait(&mut meta);
            return Ok(again());
        }
        self.own_table(&mut meta, at >> self.l2_bits)?;
        let Ok(held) = self.hold(at >> self.slice_bits)? else {
            drop(meta);
            self.writeback()?;
            return Ok(again());
        };
        let (mut changed, mut split, mut holes) = (false, Vec::new(), Vec::new());
        for cluster in at..stop {
            let old = self.entry_of(&held, cluster)?;
            let below = self.may_show_below(cluster << self.cluster_bits);
            let mask = self.shape.mask(cluster, from, to);
            let new = match old {
                Cluster::Plain(p) => p.dropped(mask, how, below),
                Cluster::Compressed { .. } if mask == ALL => Cluster::deflated(how, below),
                Cluster::Compressed { .. } => {
                    if how != Fate::Trim {
                        split.push(cluster);
                    }
                    continue;
                }
            };
            // Version 2 has no way to hide what is below.
            if Cluster::Plain(new) == old || (new.zero != 0 && !self.v3) {
                continue;
            }
            if !changed {
                self.dirtied(writer, &mut meta, &held);
                changed = true;
            }
            self.set_entry(&held, cluster, new);
            self.note_holes(&mut holes, old, new, how);
            // A cluster whose space is kept is still pointed to.
            if new.host.is_none() {
                self.unmap(&mut meta, old);
            }
        }
        drop(held);
        if !holes.is_empty() {
            // Nobody else may come to write there before the space is given back.
            meta.busy.push((at, stop));
            MutexGuard::unlocked(&mut meta, || self.punch(&holes));
            meta.busy.retain(|b| *b != (at, stop));
            writer.settled.notify_all();
        }
        let much = self.much_waits(&meta);
        drop(meta);
        if much {
            self.writeback()?;
        }
        Ok(Dropped { at: stop, split })
    }

    /// Note what of the host's space holds nothing any more though the cluster has it, or would have it
    /// again: in a data file, and subclusters.
    fn note_holes(&self, holes: &mut Vec<(u64, u64)>, old: Cluster, new: Plain, how: Fate) {
        let Cluster::Plain(old) = old else { return };
        if how == Fate::ZeroKeep {
            return;
        }
        let Some(host) = old.host else { return };
        let gone = match (self.shape.external, new.host) {
            (true, None) => ALL,
            (true, _) => old.alloc & !new.alloc,
            (false, Some(_)) if old.copied => old.alloc & !new.alloc,
            // Others have it, or it is given up as a whole.
            _ => 0,
        };
        let bits = self.cluster_bits - SUB_BITS;
        let mut sub = 0;
        while sub < u32::BITS && gone >> sub != 0 {
            sub += (gone >> sub).trailing_zeros();
            let n = (gone >> sub).trailing_ones();
            let (at, len) = (host + (u64::from(sub) << bits), u64::from(n) << bits);
            match holes.last_mut() {
                Some(last) if last.0 + last.1 == at => last.1 += len,
                _ => holes.push((at, len)),
            }
            sub += n;
        }
    }
}

/// What came of dropping clusters.
struct Dropped {
    /// Where to go on: where it began, to try again.
    at: u64,
    /// Compressed clusters of which a part is to be written with zeroes.
    split: Vec<u64>,
}
