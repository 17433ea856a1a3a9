//! Changing an image's size. No data call is held up but where a cluster is taken away.

use super::discard::Fate;
use super::header::{MAX_L1_BYTES, at};
use super::refcount::Run;
use super::*;

impl Qcow2 {
    /// See [`Driver::resize`]. One at a time, and not from within a call under way.
    pub(super) fn change_size(&self, new: u64, prealloc: Prealloc) -> Result<()> {
        let writer = self.writer_parts()?;
        let old = self.size.load(Acquire);
        if self.snapshot_count.load(Acquire) > 0 && !self.v3 {
            // A snapshot need not say how large the disk was.
            return Err(Error::unsupported(
                self.file.name(),
                "resizing an image of version 2 that has internal snapshots (qblk amend -o compat=1.1 \
                 makes it one of version 3)",
            ));
        }
        if new > i64::MAX as u64 {
            return Err(self.too_big(new));
        }
        if !new.is_multiple_of(self.unit()) {
            return Err(Error::invalid(format!(
                "{new} bytes: an image with AES encryption has whole sectors of {} bytes",
                self.unit()
            )));
        }
        if new == old && prealloc == Prealloc::Off {
            return Ok(());
        }
        // It lies behind the disk's bytes, where others may come to lie.
        self.drop_vm_state()?;
        self.bitmaps_resizing(new)?;
        let resized = match new < old {
            true => self.shrink(writer, old, new),
            false => self.grow(writer, old, new, prealloc),
        };
        self.bitmaps_resized();
        resized
    }

    pub(super) fn too_big(&self, size: u64) -> Error {
        Error::TooBig {
            file: self.file.name().clone(),
            what: format!(
                "{size} bytes need an L1 table of more than {MAX_L1_BYTES} bytes with clusters of {}",
                self.cluster_size()
            ),
        }
    }

    fn shrink(&self, writer: &Writer, old: u64, new: u64) -> Result<()> {
        // New calls see the new end at once; those that saw the old one are waited for.
        self.size.store(new, Release);
        self.calls.wait();
        let whole = |size: u64| size.next_multiple_of(self.cluster_size());
        let result = self
            .drop_clusters(whole(new), whole(old), Fate::Forget)
            .and_then(|()| self.flush_all())
            .and_then(|()| self.or_fail(writer, self.record_size(new)));
        if result.is_err() {
            // Reads find what was there. Where the disk may say otherwise already nothing is written.
            self.size.store(old, Release);
            return result;
        }
        // The space goes back now, not at some later flush: no call holds it any more.
        self.flush_all()?;
        self.shrink_data(new)
    }

    fn grow(&self, writer: &Writer, old: u64, new: u64, prealloc: Prealloc) -> Result<()> {
        let entries = new.div_ceil(self.cluster_size() << self.l2_bits);
        if entries > MAX_L1_BYTES / 8 {
            return Err(self.too_big(new));
        }
        if entries > self.l1().entries.len() as u64 {
            self.grow_l1(writer, entries)?;
        }
        self.grow_data(old, new)?;
        // Counted as a call: clusters that are written to in place must not be freed meanwhile.
        let _call = self.calls.enter();
        // What lies past the old end in its last cluster, or in a longer image below, must not show.
        let old_end = old.next_multiple_of(self.cluster_size());
        self.zero_part(old, old_end.min(new))?;
        if old_end < new {
            self.cover(old_end, new.next_multiple_of(self.cluster_size()))?;
        }
        // What is not mapped would not be in a raw data file.
        let prealloc = match prealloc {
            Prealloc::Off if self.is_raw => Prealloc::Metadata,
            how => how,
        };
        if prealloc != Prealloc::Off {
            self.preallocate(old_end, new, prealloc)?;
        }
        self.flush_all()?;
        self.or_fail(writer, self.record_size(new))?;
        self.size.store(new, Release);
        Ok(())
    }

    /// Make whole clusters read as zeroes, whatever is there or shows from below.
    fn cover(&self, from: u64, to: u64) -> Result<()> {
        if self.v3 || !self.may_show_below(from) {
            return self.drop_clusters(from, to, Fate::ZeroFree);
        }
        // Version 2 has no zero flag: clusters full of zeroes hide what is below.
        self.drop_clusters(from, to, Fate::Forget)?;
        self.zero_part(from, to)
    }

    fn record_size(&self, size: u64) -> Result<()> {
        self.file.write_slice(&size.to_be_bytes(), at::SIZE, ReqFlags::NONE)?;
        self.file.flush()
    }

    /// Put a larger L1 table in the place of the present one: written whole elsewhere and synced, then
    /// named by the header in one write.
    pub(super) fn grow_l1(&self, writer: &Writer, entries: u64) -> Result<()> {
        let old = self.with_all_written(writer, |meta| {
            let old = self.l1();
            let roomy = (old.entries.len() as u64 * 3 / 2).clamp(entries, MAX_L1_BYTES / 8);
            let clusters = (roomy * 8).div_ceil(self.cluster_size());
            let run = self.or_corrupt(meta.refs.allocate_all(self, clusters))?;
            let written = self.write_l1(writer, meta, run, roomy, old);
            if written.is_err() {
                for cluster in run.first..run.first + run.count {
                    self.release_or_leak(meta, cluster);
                }
            }
            let new = written?;
            if old.offset != 0 && !old.entries.is_empty() {
                let first = old.offset >> self.cluster_bits;
                let count = (old.entries.len() as u64 * 8).div_ceil(self.cluster_size());
                meta.unmapped.push(Run { first, count });
            }
            Ok(self.l1.swap(Box::into_raw(Box::new(new)), SeqCst))
        })?;
        self.calls.wait();
        // SAFETY: made by Box::into_raw, taken out above, and no call is left that loaded it.
        drop(unsafe { Box::from_raw(old) });
        Ok(())
    }

    fn write_l1(
        &self,
        writer: &Writer,
        meta: &mut Meta,
        run: Run,
        entries: u64,
        old: &L1,
    ) -> Result<L1> {
        let offset = run.first << self.cluster_bits;
        let value = |i: usize| old.entries.get(i).map_or(0, |e| e.load(Acquire));
        let mut bytes = vec![0; (run.count << self.cluster_bits) as usize];
        for (i, to) in bytes.chunks_exact_mut(8).enumerate() {
            to.copy_from_slice(&value(i).to_be_bytes());
        }
        self.lengthen((run.first + run.count) << self.cluster_bits)?;
        self.file.write_slice(&bytes, offset, ReqFlags::NONE)?;
        self.or_fail(writer, self.switch_l1(meta, offset, entries))?;
        let entries = (0..entries as usize).map(|i| AtomicU64::new(value(i))).collect();
        Ok(L1 { offset, entries })
    }

    fn switch_l1(&self, meta: &mut Meta, offset: u64, entries: u64) -> Result<()> {
        // The counts of its clusters come before the header that names it.
        let table = offset;
        self.publish_counts(meta)?;
        let mut field = [0; 12];
        field[..4].copy_from_slice(&(entries as u32).to_be_bytes());
        field[4..].copy_from_slice(&table.to_be_bytes());
        self.file.write_slice(&field, at::L1, ReqFlags::NONE)?;
        self.file.flush()?;
        let clusters = (u64::from(entries as u32) * 8).div_ceil(self.cluster_size());
        meta.refs.protect(Run { first: table >> self.cluster_bits, count: clusters });
        Ok(())
    }
}
