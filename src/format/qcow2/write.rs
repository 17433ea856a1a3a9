//! Writing: prepare (find or allocate where), move the data, commit (make the mapping visible).
//!
//! A cluster that only this image points to is written in place, without any lock. Else the write
//! takes a [`Grant`]: clusters on the host, and the claim on the guest clusters, for which other
//! writes wait. No lock is held while data moves. A grant that is dropped gives everything back.
//!
//! What a write does not fill of the first and last cluster (with extended L2 entries, of the first and
//! last subcluster) that it allocates is filled with what was there. With an external data file nothing
//! is taken on the host: a cluster goes where the guest has it.

mod fill;

use parking_lot::MutexGuard;

use super::cluster::{ALL, Cluster, Plain, SUB_BITS};
use super::guard::Kind;
use super::refcount::{Run, Stop};
use super::*;

/// Guest bytes that one grant covers, at most: bounds what copying needs of memory.
const MAX_GRANT: u64 = 8 << 20;
/// Bytes by which a file is lengthened ahead of need.
const GROW_MIN: u64 = 1 << 20;
const GROW_MAX: u64 = 256 << 20;
/// What changes may wait in memory: bytes of L2 slices, runs of unmapped clusters.
const MAX_DIRTY_BYTES: usize = 4 << 20;
const MAX_UNMAPPED: usize = 4096;

/// The result of changing tables.
pub(super) type Change<T> = std::result::Result<T, Stop>;

/// What came of preparing a write.
enum Step<'a> {
    /// Things changed; look again.
    Again,
    /// Write here, then commit.
    Granted(Grant<'a>),
}

/// Host clusters for guest clusters, not visible yet.
pub(super) struct Grant<'a> {
    image: &'a Qcow2,
    writer: &'a Writer,
    /// First guest cluster.
    first: u64,
    /// Where on the host it goes, and how many follow.
    host: Run,
    /// The part of them that is to have data, in guest offsets: whole clusters or subclusters that have
    /// none, or whose data is to be copied.
    start: u64,
    end: u64,
    /// The file has nothing but zeroes there.
    blank: bool,
    /// The space is these clusters' already.
    kept: bool,
    committed: bool,
}

impl Grant<'_> {
    /// Where a guest offset goes.
    fn host_of(&self, offset: u64) -> u64 {
        let bits = self.image.cluster_bits;
        (self.host.first << bits) + (offset - (self.first << bits))
    }

    /// Let other writes at the guest clusters.
    fn settle(&mut self, meta: &mut Meta) {
        let mine = (self.first, self.first + self.host.count);
        if let Some(i) = meta.busy.iter().position(|b| *b == mine) {
            meta.busy.swap_remove(i);
        }
        self.writer.settled.notify_all();
    }
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        let writer = self.writer;
        let mut meta = writer.meta.lock();
        if !self.kept {
            for cluster in self.host.first..self.host.first + self.host.count {
                self.image.release_or_leak(&mut meta, cluster);
            }
        }
        self.settle(&mut meta);
    }
}

impl Qcow2 {
    /// Write guest data.
    pub(super) fn write_data(
        &self,
        mut buf: Src<'_>,
        mut offset: u64,
        flags: ReqFlags,
    ) -> Result<()> {
        let writer = self.writer_parts()?;
        let fua = flags.has(ReqFlags::FUA);
        let (mut flush, mut retried) = (false, false);
        while !buf.is_empty() {
            let found = self.lookup(offset, buf.len() as u64)?;
            let in_cluster = offset & (self.cluster_size() - 1);
            let done = match found.entry {
                Entry::Normal { host, copied: true } if found.own_table => {
                    let len = self.present(host, in_cluster, found.len)?;
                    let part = buf.split_at(len as usize).0;
                    self.check_data(host + in_cluster, part.len() as u64)?;
                    // It is on stable storage by itself, unless the way to it is not yet.
                    let late = fua && writer.changed.load(Acquire);
                    flush |= late;
                    let own = if late { ReqFlags::NONE } else { flags };
                    self.write_host(part, host + in_cluster, offset, own)?;
                    part.len()
                }
                _ => match self.prepare_or_grow(writer, offset, found.len) {
                    // What was freed may not have been given back to the host yet.
                    Err(e) if e.is_no_space() && !retried => {
                        self.make_room(e)?;
                        retried = true;
                        0
                    }
                    Err(e) => return Err(e),
                    Ok(Step::Again) => 0,
                    Ok(Step::Granted(grant)) => {
                        let part = buf.split_at((grant.end - offset) as usize).0;
                        match self.fill(&grant, part, offset) {
                            Ok(()) => self.commit(grant)?,
                            Err(e) if e.is_no_space() && !retried => {
                                drop(grant);
                                self.make_room(e)?;
                                retried = true;
                                continue;
                            }
                            Err(e) => return Err(e),
                        }
                        flush |= fua;
                        part.len()
                    }
                },
            };
            offset += done as u64;
            buf = buf.split_at(done).1;
        }
        if flush { self.flush_all() } else { Ok(()) }
    }

    /// Make sure that L1 entry `index` points to a table that only this image points to.
    pub(super) fn own_table(&self, meta: &mut Meta, index: u64) -> Change<()> {
        let name = self.file.name();
        let Some(slot) = self.l1().entries.get(index as usize) else {
            return Err(Error::Internal("a guest cluster past the L1 table".into()).into());
        };
        let raw = slot.load(Acquire);
        let (table, owned) = entry::decode_l1(raw, self.cluster_bits).map_err(|what| {
            Error::corrupt(name, format!("L1 entry {index} {what}: found {raw:#018x}"))
        })?;
        if owned && table != 0 {
            return Ok(());
        }
        if table != 0 && meta.refs.get(&self.file, table >> self.cluster_bits)? == 1 {
            slot.store(entry::normal(table), Release);
            return Ok(());
        }
        let (run, _) = self.allocate(meta, 1)?;
        let new = run.first << self.cluster_bits;
        let written = if table == 0 {
            // Zeroes are written, not punched: later writes of entries must not run out of space.
            self.file.zero(new, self.cluster_size(), ReqFlags::NONE)
        } else {
            self.copy_cluster(table, new)
        };
        if let Err(e) = written {
            self.release_or_leak(meta, run.first);
            return Err(e.into());
        }
        self.writer_parts()?.changed.store(true, Release);
        slot.store(entry::normal(new), Release);
        self.areas.add(Kind::L2, run.first);
        meta.dirty_l1.push(index);
        if table != 0 {
            self.areas.remove(Kind::L2, table >> self.cluster_bits);
            meta.unmapped.push(Run { first: table >> self.cluster_bits, count: 1 });
        }
        Ok(())
    }

    fn copy_cluster(&self, from: u64, to: u64) -> Result<()> {
        if from + self.cluster_size() > self.file.size() {
            return Err(self.cut_off("the end of an L2 table", from + self.cluster_size()));
        }
        let mut bytes = vec![0; self.cluster_size() as usize];
        self.file.read_slice(&mut bytes, from)?;
        self.file.write_slice(&bytes, to, ReqFlags::NONE)
    }

    /// Take host clusters, and make the file long enough for them.
    pub(super) fn allocate(&self, meta: &mut Meta, want: u64) -> Change<(Run, bool)> {
        let (run, blank) = meta.refs.allocate(&self.file, want)?;
        match self.lengthen((run.first + run.count) << self.cluster_bits) {
            Ok(()) => Ok((run, blank)),
            Err(e) => {
                for cluster in run.first..run.first + run.count {
                    self.release_or_leak(meta, cluster);
                }
                Err(e.into())
            }
        }
    }

    /// Make the file reach to `end`, and some way beyond so that this is seldom needed.
    pub(super) fn lengthen(&self, end: u64) -> Result<()> {
        if end <= self.file.size() {
            return Ok(());
        }
        if self.file.driver().kind() == "host_device" {
            return Err(Error::TooBig {
                file: self.file.name().clone(),
                what: format!("the device has no room at offset {end:#x}"),
            });
        }
        let ahead = (end / 8).clamp(GROW_MIN, GROW_MAX);
        let grow = |to: u64| self.file.driver().resize(to, Prealloc::Off, false);
        // Where the host limits a file's size, what is needed may still fit.
        grow(end + ahead).or_else(|_| grow(end))
    }

    fn prepare_or_grow<'a>(
        &'a self,
        writer: &'a Writer,
        offset: u64,
        count: u64,
    ) -> Result<Step<'a>> {
        self.or_grow(self.prepare(writer, offset, count)).map(|s| s.unwrap_or(Step::Again))
    }

    /// Where a change stopped because the refcount table is too small, let it grow: `None`, try again.
    pub(super) fn or_grow<T>(&self, change: Change<T>) -> Result<Option<T>> {
        match change {
            Ok(done) => Ok(Some(done)),
            Err(Stop::Failed(e)) => self.or_corrupt(Err(e)),
            Err(Stop::GrowTable(index)) => {
                let writer = self.writer_parts()?;
                let _turn = writer.turn.lock();
                let mut meta = writer.meta.lock();
                // Another may have done it meanwhile; growing twice does no harm but takes space.
                if !meta.refs.has_entry(index) {
                    self.or_corrupt(meta.refs.grow_table(self, index))?;
                }
                Ok(None)
            }
        }
    }

    /// Find where `count` guest bytes at `offset`, which can not be written in place, go.
    fn prepare<'a>(&'a self, writer: &'a Writer, offset: u64, count: u64) -> Change<Step<'a>> {
        let first = offset >> self.cluster_bits;
        let slice = first >> self.slice_bits;
        let slice_end = (slice + 1) << self.slice_bits;
        let most = (MAX_GRANT >> self.cluster_bits).max(1);
        let last = (offset + count).div_ceil(self.cluster_size()).min(slice_end).min(first + most);
        let mut meta = writer.meta.lock();
        if meta.busy.iter().any(|b| (b.0..b.1).contains(&first)) {
            writer.settled.wait(&mut meta);
            return Ok(Step::Again);
        }
        let last = meta.busy.iter().map(|b| b.0).filter(|b| *b > first).fold(last, u64::min);
        self.own_table(&mut meta, first >> self.l2_bits)?;
        let Ok(held) = self.hold(slice)? else {
            drop(meta);
            self.writeback()?;
            return Ok(Step::Again);
        };
        let grain = self.grain();
        let end = (offset + count).next_multiple_of(grain).min(last << self.cluster_bits);
        let (start, mut end) = (offset & !(grain - 1), end);
        let old = self.entry_of(&held, first)?;
        let ours = match old {
            Cluster::Plain(p) => self.own_space(&mut meta, p)?,
            Cluster::Compressed { .. } => None,
        };
        if let (Cluster::Plain(p), Some(host)) = (old, ours) {
            let sub = self.shape.sub(start);
            let free = (!p.alloc >> sub).trailing_ones();
            if free == 0 {
                // It has data there: others may be writing to it in place, and so may this.
                if !p.copied {
                    self.set_entry(&held, first, Plain { copied: true, ..p });
                    self.dirtied(writer, &mut meta, &held);
                }
                return Ok(Step::Again);
            }
            let stop = (first << self.cluster_bits)
                + (u64::from(sub + free) << (self.cluster_bits - SUB_BITS));
            let host = Run { first: host >> self.cluster_bits, count: 1 };
            drop(held);
            self.check_data(host.first << self.cluster_bits, 1)?;
            return Ok(self.grant(writer, meta, first, host, (start, end.min(stop)), false, true));
        }
        let mut want = 1;
        while first + want < last && self.joins(self.entry_of(&held, first + want)?) {
            want += 1;
        }
        end = end.min((first + want) << self.cluster_bits);
        let (start, to) = self.with_old_data(old, first, start, end);
        if to != end {
            (want, end) = (1, to);
        }
        drop(held);
        if self.shape.external {
            let host = Run { first, count: want };
            return Ok(self.grant(writer, meta, first, host, (start, end), false, true));
        }
        let (host, blank) = self.allocate(&mut meta, want)?;
        // Zeroes in the file are not zeroes to a cipher.
        let blank = blank && !self.is_encrypted();
        let end = end.min((first + host.count) << self.cluster_bits);
        Ok(self.grant(writer, meta, first, host, (start, end), blank, false))
    }

    /// Give out host clusters, and claim the guest clusters from `first` on.
    #[allow(clippy::too_many_arguments)]
    fn grant<'a>(
        &'a self,
        writer: &'a Writer,
        mut meta: MutexGuard<'_, Meta>,
        first: u64,
        host: Run,
        (start, end): (u64, u64),
        blank: bool,
        kept: bool,
    ) -> Step<'a> {
        meta.busy.push((first, first + host.count));
        let (image, committed) = (self, false);
        Step::Granted(Grant { image, writer, first, host, start, end, blank, kept, committed })
    }

    /// The space of a cluster, if nothing else points there.
    fn own_space(&self, meta: &mut Meta, p: Plain) -> Result<Option<u64>> {
        Ok(match p.host {
            Some(_) if p.copied || self.shape.external => p.host,
            Some(host) if meta.refs.get(&self.file, host >> self.cluster_bits)? == 1 => p.host,
            _ => None,
        })
    }

    /// Whether a cluster may follow another in a grant of new space.
    fn joins(&self, cluster: Cluster) -> bool {
        match cluster {
            Cluster::Plain(Plain { host: None, .. }) => true,
            // What is there is copied, of which only whole clusters are filled with.
            Cluster::Plain(p) => !self.shape.is_special() && !p.copied && p.alloc != 0,
            Cluster::Compressed { .. } => !self.shape.extended,
        }
    }

    /// What is to be filled of a cluster that is given new space, if `start..end` is what is written:
    /// also that which has data now. The rest stays as it is, not here.
    fn with_old_data(&self, old: Cluster, first: u64, start: u64, end: u64) -> (u64, u64) {
        let base = first << self.cluster_bits;
        let bits = self.cluster_bits - SUB_BITS;
        let alloc = match old {
            _ if !self.shape.extended => return (start, end),
            Cluster::Compressed { .. } => ALL,
            Cluster::Plain(Plain { alloc: 0, .. }) => return (start, end),
            Cluster::Plain(p) => p.alloc,
        };
        let from = base + (u64::from(alloc.trailing_zeros()) << bits);
        let to = base + (u64::from(u32::BITS - alloc.leading_zeros()) << bits);
        (start.min(from), end.min(base + self.cluster_size()).max(to))
    }

    /// Try to win back what was freed but not yet given up, once.
    #[cold]
    pub(super) fn make_room(&self, e: Error) -> Result<()> {
        let before = self.reclaimable();
        if before > 0 {
            self.writeback()?;
        }
        if self.reclaimable() < before { Ok(()) } else { Err(e) }
    }

    fn reclaimable(&self) -> usize {
        self.writer.as_ref().map_or(0, |w| {
            let meta = w.meta.lock();
            meta.unmapped.len() + meta.limbo.iter().map(|l| l.1.len()).sum::<usize>()
        })
    }

    /// Make a grant's clusters visible.
    fn commit(&self, mut grant: Grant<'_>) -> Result<()> {
        let writer = grant.writer;
        let (slice, mut meta) = (grant.first >> self.slice_bits, writer.meta.lock());
        let held = self.hold_to_change(&mut meta, slice)?;
        // Before the entries: who sees one must also see that it is not on disk yet.
        writer.changed.store(true, Release);
        // All of them are looked at before one is changed. They are as they were when they were granted.
        for i in 0..grant.host.count {
            self.entry_of(&held, grant.first + i)?;
        }
        for i in 0..grant.host.count {
            let cluster = grant.first + i;
            let mask = self.shape.mask(cluster, grant.start, grant.end);
            let old = self.entry_of(&held, cluster)?;
            let before = match old {
                Cluster::Plain(p) => p,
                Cluster::Compressed { .. } => Plain::default(),
            };
            let new = Plain {
                host: Some((grant.host.first + i) << self.cluster_bits),
                copied: true,
                alloc: before.alloc | mask,
                zero: before.zero & !mask,
            };
            self.set_entry(&held, cluster, new);
            if !grant.kept {
                self.unmap(&mut meta, old);
            }
        }
        self.dirtied(writer, &mut meta, &held);
        drop(held);
        grant.committed = true;
        grant.settle(&mut meta);
        let much = self.much_waits(&meta);
        drop(meta);
        if much { self.writeback() } else { Ok(()) }
    }

    /// Hold a slice whose entries are to change, whatever has to be written for that.
    pub(super) fn hold_to_change(
        &self,
        meta: &mut MutexGuard<'_, Meta>,
        slice: u64,
    ) -> Result<Held<'_>> {
        loop {
            match self.hold(slice)? {
                Ok(held) => return Ok(held),
                Err(AllDirty) => MutexGuard::unlocked(meta, || self.writeback())?,
            }
        }
    }

    /// Note that entries of a held slice were changed.
    pub(super) fn dirtied(&self, writer: &Writer, meta: &mut Meta, held: &Held<'_>) {
        writer.changed.store(true, Release);
        meta.dirty_slices.extend(held.mark_dirty());
    }

    /// Whether so many changes wait in memory that they should be written.
    pub(super) fn much_waits(&self, meta: &Meta) -> bool {
        (meta.dirty_slices.len() << (self.slice_bits + self.shape.entry_bits()))
            + meta.refs.dirty_bytes()
            > MAX_DIRTY_BYTES
            || meta.unmapped.len() > MAX_UNMAPPED
    }

    /// Note that nothing in memory points any more to what an L2 entry pointed to. In a data file there
    /// is nothing to note.
    pub(super) fn unmap(&self, meta: &mut Meta, old: Cluster) {
        let bits = self.cluster_bits;
        let run = match old {
            Cluster::Plain(Plain { host: Some(host), .. }) if !self.shape.external => {
                Run { first: host >> bits, count: 1 }
            }
            Cluster::Plain(_) => return,
            Cluster::Compressed { offset, len } => {
                self.compressed.forget();
                let first = offset >> bits;
                Run { first, count: ((offset + len - 1) >> bits) - first + 1 }
            }
        };
        if let Some(last) = meta.unmapped.last_mut()
            && last.first + last.count == run.first
        {
            last.count += run.count;
            return;
        }
        meta.unmapped.push(run);
    }

    /// Allocate clusters for all of a guest range that has none, filled with what they read as.
    pub fn preallocate(&self, from: u64, to: u64, how: Prealloc) -> Result<()> {
        let writer = self.writer_parts()?;
        let mut at = from;
        while at < to {
            let found = self.lookup(at, to - at)?;
            if matches!(found.entry, Entry::Normal { copied: true, .. }) && found.own_table {
                at += found.len;
                continue;
            }
            let Step::Granted(mut grant) = self.prepare_or_grow(writer, at, found.len)? else {
                continue;
            };
            // (Of the space of subclusters that are not here nothing shows.)
            let bytes = grant.end.min(self.data_len(to)) - grant.start;
            let host = grant.host_of(grant.start);
            let how = if self.is_encrypted() { Prealloc::Full } else { how };
            let guest = grant.start;
            match how {
                // ZERO_RANGE reserves space where the host has it; else zeroes are written.
                Prealloc::Falloc => self.data.zero(host, bytes, ReqFlags::NONE)?,
                Prealloc::Full => self.write_zeroes(host, guest, bytes)?,
                // What is in a raw data file is what the guest is to see.
                _ if grant.blank || self.is_raw => {}
                _ => self.data.zero(host, bytes, ReqFlags::MAY_TRIM)?,
            }
            at = grant.end;
            // Subclusters that are not here show what is below, though there is space for them.
            if self.shape.extended && self.may_show_below(guest) {
                grant.end = grant.start;
            }
            self.commit(grant)?;
        }
        Ok(())
    }
}
