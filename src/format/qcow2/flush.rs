//! Writing tables: the one place that does, in the order that makes every crash harmless.
//!
//! 1. refcount blocks (references are only added before what uses them, and only taken away after)
//! 2. — sync, if there are new blocks — then their entries in the refcount table
//! 3. — sync (an external data file first): data, refcounts and new L2 tables are there before anything points to them
//! 4. L2 slices
//! 5. — sync, if L1 entries changed — then those
//! 6. — sync: nothing on disk points any more to what was unmapped; only now may refcounts drop
//!
//! With lazy refcounts the first two steps are left out where they can be: the header says first that the
//! image is dirty, so that who opens it after a power cut makes the refcounts anew, and they are written
//! when it is closed.
//!
//! What is written is copied under the `Meta` lock at one moment, so that it is consistent, and
//! written without it, so that writes go on meanwhile.

use super::guard::Kind;
use super::refcount::Run;
use super::*;

/// Bytes of refcount blocks that lazy refcounts keep in memory; half of what may wait there.
const MAX_LAZY: usize = 2 << 20;
/// Most slices in one write.
const MAX_PIECES: usize = 256;

/// All changes of one moment.
struct Snapshot {
    blocks: Vec<(u64, Box<[u8]>)>,
    table: Vec<(u64, u64)>,
    l2: Vec<(u64, Box<[u8]>)>,
    slots: Vec<usize>,
    l1: Vec<(u64, u64)>,
    unmapped: Vec<Run>,
    /// Refcounts stay in memory.
    lazy: bool,
}

impl Qcow2 {
    /// Make everything that was written survive a power cut. Concurrent calls share the work.
    pub(super) fn flush_all(&self) -> Result<()> {
        self.flush_as(false)
    }

    /// [`Qcow2::flush_all`], with all refcounts, which may be late otherwise.
    pub(super) fn flush_counts(&self) -> Result<()> {
        self.flush_as(true)
    }

    /// [`Qcow2::flush_all`]; `counts`: with refcounts that may be late otherwise.
    fn flush_as(&self, counts: bool) -> Result<()> {
        if self.writer.is_none() {
            return Ok(());
        }
        let writer = self.writer_parts()?;
        // Where no table has changed the files are all there is, which share their syncs themselves.
        if !counts && !writer.changed.load(Acquire) && writer.meta.lock().limbo.is_empty() {
            return self.or_fail(writer, self.sync());
        }
        let arrival = writer.begun.load(SeqCst);
        let _turn = writer.turn.lock();
        let writer = self.writer_parts()?;
        if writer.ended.load(SeqCst) > arrival && !counts {
            // One that began after this call did has ended well: it wrote what this one would.
            return Ok(());
        }
        let number = writer.begun.fetch_add(1, SeqCst) + 1;
        self.or_fail(writer, self.write_tables(writer, counts).and_then(|()| self.sync()))?;
        writer.ended.store(number, SeqCst);
        let meta = writer.meta.lock();
        if meta.tables_written() {
            writer.changed.store(false, Release);
        }
        drop(meta);
        self.give_up_unmapped(writer)
    }

    /// Write changed tables, because many wait. What was written by others is not made durable.
    pub(super) fn writeback(&self) -> Result<()> {
        let writer = self.writer_parts()?;
        let _turn = writer.turn.lock();
        self.or_fail(writer, self.write_tables(writer, false))?;
        self.give_up_unmapped(writer)
    }

    /// Hold the only turn and the tables, with everything that has changed on disk. For what replaces
    /// a table as a whole.
    pub(super) fn with_all_written<T>(
        &self,
        writer: &Writer,
        work: impl FnOnce(&mut Meta) -> Result<T>,
    ) -> Result<T> {
        let _turn = writer.turn.lock();
        loop {
            let written = self.write_tables(writer, true).and_then(|()| self.sync());
            self.or_fail(writer, written)?;
            let mut meta = writer.meta.lock();
            if meta.tables_written() {
                return work(&mut meta);
            }
        }
    }

    /// [`Refcounts::publish`], where what is found to be corrupt is marked so.
    pub(super) fn publish_counts(&self, meta: &mut Meta) -> Result<()> {
        self.or_corrupt(meta.refs.publish(&self.file))
    }

    /// Remember a failure for good: what the kernel could not write it may have dropped.
    pub(super) fn or_fail(&self, writer: &Writer, result: Result<()>) -> Result<()> {
        if let Err(e) = &result {
            // What was said before stays.
            let _ = writer.failed.compare_exchange(0, e.errno(), AcqRel, Acquire);
        }
        result
    }

    /// All changes up to now; `counts`: those of refcounts, too, which may be late otherwise.
    fn snapshot(&self, writer: &Writer, counts: bool) -> Result<Snapshot> {
        let mut meta = writer.meta.lock();
        let lazy = self.features.compatible() & header::COMPAT_LAZY != 0
            && !counts
            && meta.refs.dirty_bytes() < MAX_LAZY;
        let slots = std::mem::take(&mut meta.dirty_slices);
        let mut l2 = Vec::with_capacity(slots.len());
        for &slot in &slots {
            let (slice, bytes) = self.cache.take_dirty(slot)?;
            match self.slice_offset(slice)? {
                Some(offset) => {
                    self.check_table(Kind::L2, offset)?;
                    l2.push((offset, bytes));
                }
                None => return Err(Error::Internal("a changed L2 slice has no table".into())),
            }
        }
        let mut changed = std::mem::take(&mut meta.dirty_l1);
        changed.sort_unstable();
        changed.dedup();
        let table = self.l1();
        let l1: Vec<(u64, u64)> = changed
            .into_iter()
            .filter_map(|i| {
                Some((table.offset + 8 * i, table.entries.get(i as usize)?.load(Acquire)))
            })
            .collect();
        for (offset, _) in &l1 {
            self.check_table(Kind::L1, *offset)?;
        }
        let (entries, blocks) = match lazy {
            true => (Vec::new(), Vec::new()),
            false => (meta.refs.take_new_blocks(), meta.refs.take_dirty()),
        };
        for (offset, _) in &blocks {
            self.check_table(Kind::RefcountBlock, *offset)?;
        }
        for (offset, _) in &entries {
            self.check_table(Kind::RefcountTable, *offset)?;
        }
        Ok(Snapshot {
            table: entries,
            blocks,
            l2,
            slots,
            l1,
            unmapped: std::mem::take(&mut meta.unmapped),
            lazy,
        })
    }

    /// Under `turn`.
    fn write_tables(&self, writer: &Writer, counts: bool) -> Result<()> {
        let s = self.snapshot(writer, counts)?;
        let points = !s.l2.is_empty() || !s.l1.is_empty();
        if s.lazy && points {
            // Synced, before anything points to what the refcounts on disk do not count.
            self.set_incompatible(incompat::DIRTY, true)?;
        }
        self.write_sorted(s.blocks)?;
        if !s.table.is_empty() {
            self.file.flush()?;
            for (offset, value) in s.table {
                self.file.write_slice(&value.to_be_bytes(), offset, ReqFlags::NONE)?;
            }
        }
        if points {
            self.sync()?;
            self.write_sorted(s.l2)?;
        }
        if !s.l1.is_empty() {
            self.file.flush()?;
            for (offset, value) in s.l1 {
                self.file.write_slice(&value.to_be_bytes(), offset, ReqFlags::NONE)?;
            }
        }
        for slot in s.slots {
            self.cache.written(slot);
        }
        writer.meta.lock().refs.written();
        if !s.unmapped.is_empty() {
            self.file.flush()?;
            writer.meta.lock().limbo.push((self.calls.mark(), s.unmapped));
        }
        Ok(())
    }

    /// Write slices, those that lie beside one another together.
    fn write_sorted(&self, mut slices: Vec<(u64, Box<[u8]>)>) -> Result<()> {
        slices.sort_unstable_by_key(|s| s.0);
        let mut rest = &slices[..];
        while let Some(((offset, first), _)) = rest.split_first() {
            let mut end = offset + first.len() as u64;
            let mut n = 1;
            while n < MAX_PIECES && rest.get(n).is_some_and(|s| s.0 == end) {
                end += rest[n].1.len() as u64;
                n += 1;
            }
            let vecs: Vec<libc::iovec> = rest[..n]
                .iter()
                .map(|(_, b)| libc::iovec {
                    iov_base: b.as_ptr().cast_mut().cast(),
                    iov_len: b.len(),
                })
                .collect();
            // SAFETY: the pieces are `slices`, which outlive the call and are only read.
            let src = unsafe { Src::from_raw(&vecs, (end - offset) as usize) };
            self.file.write(src, *offset, ReqFlags::NONE)?;
            rest = &rest[n..];
        }
        Ok(())
    }

    /// Free unmapped clusters that no call under way can know of any more: give their space back to
    /// the host first, so that this can not hit what they come to hold next. Under `turn`.
    fn give_up_unmapped(&self, writer: &Writer) -> Result<()> {
        let mut meta = writer.meta.lock();
        if meta.limbo.is_empty() {
            return Ok(());
        }
        let (over, wait): (Vec<_>, Vec<_>) = std::mem::take(&mut meta.limbo)
            .into_iter()
            .partition(|(mark, _)| self.calls.passed(*mark));
        meta.limbo = wait;
        let mut gone: Vec<Run> = Vec::new();
        for run in over.into_iter().flat_map(|(_, runs)| runs) {
            for cluster in run.first..run.first + run.count {
                if let Some(kind) = self.areas.kind_at(cluster) {
                    // Something says that it was data, too. Whatever it is, it stays.
                    let at = cluster << self.cluster_bits;
                    self.found_corrupt(format!("{} at {at:#x} was to be freed", kind.name()));
                    continue;
                }
                let shared = match meta.refs.get(&self.file, cluster) {
                    Ok(1) => false,
                    Ok(_) => true,
                    // What can not be counted is not freed: a leak, and what was flushed is safe.
                    Err(e) => {
                        crate::log::log(crate::log::Level::Error, format_args!("{e}"));
                        continue;
                    }
                };
                if shared {
                    self.release_or_leak(&mut meta, cluster);
                    continue;
                }
                // What is about to be given back must get no compressed bytes any more.
                meta.refs.close_tail(cluster);
                match gone.last_mut() {
                    Some(last) if last.first + last.count == cluster => last.count += 1,
                    _ => gone.push(Run { first: cluster, count: 1 }),
                }
            }
        }
        drop(meta);
        if self.is_fenced() {
            // What the image says of its clusters is not to be believed: nothing is given back.
            return Ok(());
        }
        // A call that has ended by now may have kept what it inflated of them after they were unmapped.
        self.compressed.forget();
        for run in &gone {
            let (at, len) = (run.first << self.cluster_bits, run.count << self.cluster_bits);
            if let Err(e) = self.file.trim(at, len, ReqFlags::NONE) {
                crate::log::log(crate::log::Level::Warn, format_args!("{e}"));
            }
        }
        let mut meta = writer.meta.lock();
        for run in gone {
            for cluster in run.first..run.first + run.count {
                // A second reference that the image should not have had is gone by now.
                self.release_or_leak(&mut meta, cluster);
            }
        }
        Ok(())
    }

    /// Take a reference from a cluster. Where that fails the cluster is leaked, which a check finds
    /// and mends; no data is at stake.
    pub(super) fn release_or_leak(&self, meta: &mut Meta, cluster: u64) {
        if let Err(e) = meta.refs.release(&self.file, cluster) {
            crate::log::log(crate::log::Level::Error, format_args!("{e}"));
        }
    }

    /// Write everything, free everything, and cut off what the file was lengthened by ahead of need.
    /// The caller is no call under way, and no other is left.
    pub fn settle(&self) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        // Bitmaps vouch for what is on disk only.
        self.flush_all()?;
        let saved = self.settle_bitmaps();
        // Each round may free clusters, which changes counts again; two suffice.
        let mut all = false;
        for _ in 0..8 {
            self.flush_as(true)?;
            let meta = writer.meta.lock();
            if meta.limbo.is_empty() && meta.tables_written() && !meta.refs.is_dirty() {
                all = true;
                break;
            }
        }
        let meta = writer.meta.lock();
        if let Some(end) = meta.refs.used_end()
            && end < self.file.size()
        {
            self.file.driver().resize(end, Prealloc::Off, true)?;
        }
        drop(meta);
        self.or_fail(writer, self.sync())?;
        // Only now do the refcounts on disk say all. Where that fails nobody knows whether the header says
        // so, and what is written from now on might not be counted.
        let clean = if all { self.set_incompatible(incompat::DIRTY, false) } else { Ok(()) };
        saved.and(self.or_fail(writer, clean))
    }
}
