//! Replacing an image's tables as a whole: snapshots, and changes of what the image is like.
//!
//! Everything that changes is built beside what there is: refcount blocks and their table, L2 tables, L1
//! tables, the snapshot table. Then one write of one sector of the header switches from the old to the
//! new. Before it nothing has happened, whatever fails and whenever the power goes, and after it all has;
//! in between there is nothing. Not even a leak is left behind, for the old refcounts do not know of
//! the clusters that the new tables lie in. (To write in place in the order of refcounts, L2, L1, header
//! would be safe as well, but there are moments in which marks of "the only reference" contradict the
//! refcounts, and a check calls that a corruption.)
//!
//! Nobody else may be at work on the image meanwhile: the caller sees to that.
//!
//! Source: "Host cluster management", "Cluster mapping" and "Snapshots" of the QCOW2 specification.

use super::edit::Edit;
use super::header::{MAX_L1_BYTES, at};
use super::refcount::Run;
use super::refcount::shadow::{Placed, Shadow};
use super::snapshot::{Snapshot, Table};
use super::*;

/// A change to the header beside where its tables lie.
pub(super) type HeaderChange<'a> = Box<dyn FnOnce(&mut Edit) + 'a>;

/// What the image is to be; at first what it is.
pub(super) struct Plan<'a> {
    /// Bytes.
    pub(super) size: u64,
    /// Entries of the active L1 table.
    pub(super) l1: Vec<u64>,
    pub(super) snapshots: Vec<Snapshot>,
    pub(super) header: Option<HeaderChange<'a>>,
}

/// The tables that are being built.
pub(super) struct Rebuild<'a> {
    pub(super) image: &'a Qcow2,
    pub(super) shadow: Shadow<'a>,
    progress: Progress<'a>,
    /// L2 tables looked at, and to be looked at, as far as is known.
    done: u64,
    total: u64,
}

/// Whose tables are looked at.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Whose {
    /// What is wrong with them is wrong with the image, which is marked.
    Active,
    /// The image goes on without the snapshot.
    Snapshots,
}

impl Whose {
    /// What was found, after marking an image that it speaks of.
    pub(super) fn judge<T>(self, image: &Qcow2, found: Result<T>) -> Result<T> {
        match self {
            Self::Active => image.or_corrupt(found),
            Self::Snapshots => found,
        }
    }
}

/// Where new tables lie.
struct Switch {
    size: u64,
    l1: Run,
    l1_entries: u32,
    refcounts: Placed,
    snapshots: Run,
    snapshot_count: u32,
}

impl Switch {
    fn l1_offset(&self, cluster_bits: u32) -> u64 {
        if self.l1_entries == 0 { 0 } else { self.l1.first << cluster_bits }
    }
}

impl Qcow2 {
    /// Change the image as `work` says, all of it or nothing. Nobody else is at work on the image.
    /// `order`: the width of refcounts that it is to have.
    pub(super) fn rebuild<'a>(
        &'a self,
        order: u32,
        progress: Progress<'a>,
        work: impl FnOnce(&mut Rebuild<'_>, &mut Plan<'a>) -> Result<()>,
    ) -> Result<()> {
        let writer = self.writer_parts()?;
        self.come_to_rest(writer)?;
        let turn = writer.turn.lock();
        let mut meta = writer.meta.lock();
        let Meta { refs, snapshots, .. } = &mut *meta;
        let mut plan = Plan {
            size: self.size.load(Acquire),
            l1: self.l1().entries.iter().map(|e| e.load(Acquire)).collect(),
            snapshots: snapshots.list.clone(),
            header: None,
        };
        let shadow = Shadow::new(refs, &self.file, order)?;
        let mut new = Rebuild { image: self, shadow, progress, done: 0, total: 0 };
        // Where the refcounts or the active image's tables contradict themselves the image is marked. What
        // `work` finds of a snapshot concerns that alone: the image goes on.
        self.or_corrupt(new.shadow.convert(progress))?;
        work(&mut new, &mut plan)?;
        let written = new.write(&mut plan, snapshots);
        let (switch, table) = self.or_corrupt(written)?;
        let shadow = new.shadow;
        // A reader may find something and mark the image as corrupt meanwhile: not between loading the
        // header and writing it, or the mark would be lost.
        let header_turn = self.features.turn.lock();
        let head = match plan.header.take() {
            Some(change) => Some(self.changed_header(&switch, change, order)?),
            None => None,
        };
        self.or_fail(writer, self.switch(&switch, head))?;
        drop(header_turn);
        // From here on the new tables are the image's.
        let freed = shadow.adopt(switch.refcounts);
        meta.refs.protect(switch.l1);
        self.snapshot_count.store(switch.snapshot_count, Release);
        meta.snapshots = table;
        let entries = plan.l1.iter().map(|e| AtomicU64::new(*e)).collect();
        let l1 = L1 { offset: switch.l1.first << self.cluster_bits, entries };
        self.size.store(plan.size, Release);
        self.cache.forget_all();
        self.compressed.forget();
        let old = self.l1.swap(Box::into_raw(Box::new(l1)), SeqCst);
        self.note_metadata(&meta);
        self.calls.wait();
        // SAFETY: made by Box::into_raw, taken out above, and no call is left that loaded it.
        drop(unsafe { Box::from_raw(old) });
        drop(meta);
        self.give_back(writer, freed);
        drop(turn);
        Ok(())
    }

    /// Write everything, and free what nothing points to, so that the tables in the file are all there is.
    fn come_to_rest(&self, writer: &Writer) -> Result<()> {
        for _ in 0..8 {
            self.flush_counts()?;
            let meta = writer.meta.lock();
            if meta.limbo.is_empty()
                && meta.unmapped.is_empty()
                && meta.tables_written()
                && !meta.refs.is_dirty()
            {
                return Ok(());
            }
        }
        Err(Error::Internal("calls are under way while tables are replaced".into()))
    }

    /// The header with `change` and the places of the new tables, if it fits. Under `Features::turn`.
    fn changed_header(&self, to: &Switch, change: HeaderChange<'_>, order: u32) -> Result<Edit> {
        let mut head = Edit::load(&self.file, self.cluster_bits)?;
        head.set_u64(at::SIZE, to.size);
        head.set_u32(at::L1, to.l1_entries);
        head.set_u64(at::L1 + 4, to.l1_offset(self.cluster_bits));
        head.set_u64(at::REFTABLE, to.refcounts.offset);
        head.set_u32(at::REFTABLE + 8, to.refcounts.clusters);
        head.set_u32(at::SNAPSHOTS, to.snapshot_count);
        head.set_u64(at::SNAPSHOTS + 4, to.snapshots.first << self.cluster_bits);
        head.set_u32(at::REFCOUNT_ORDER, order);
        change(&mut head);
        head.check(self.file.name())?;
        Ok(head)
    }

    /// One write of one sector makes the header name the new tables. Under `Features::turn`.
    fn switch(&self, to: &Switch, head: Option<Edit>) -> Result<()> {
        // What is named must be there.
        self.file.flush()?;
        if let Some(head) = head {
            return head.store(&self.file);
        }
        // All of it lies side by side, and in the first sector.
        let mut fields = Vec::with_capacity(48);
        fields.extend(to.size.to_be_bytes());
        fields.extend(self.header.crypt.to_be_bytes());
        fields.extend(to.l1_entries.to_be_bytes());
        fields.extend(to.l1_offset(self.cluster_bits).to_be_bytes());
        fields.extend(to.refcounts.offset.to_be_bytes());
        fields.extend(to.refcounts.clusters.to_be_bytes());
        fields.extend(to.snapshot_count.to_be_bytes());
        fields.extend((to.snapshots.first << self.cluster_bits).to_be_bytes());
        self.file.write_slice(&fields, at::SIZE, ReqFlags::NONE)?;
        self.file.flush()
    }

    /// Give the space of freed clusters back to the host. They are free already; nobody has taken them
    /// yet, for nobody else is at work.
    fn give_back(&self, writer: &Writer, runs: Vec<Run>) {
        let mut gone: Vec<Run> = Vec::new();
        let mut meta = writer.meta.lock();
        for cluster in runs.iter().flat_map(|r| r.first..r.first + r.count) {
            if !matches!(meta.refs.get(&self.file, cluster), Ok(0)) {
                continue;
            }
            match gone.last_mut() {
                Some(last) if last.first + last.count == cluster => last.count += 1,
                _ => gone.push(Run { first: cluster, count: 1 }),
            }
        }
        drop(meta);
        for run in gone {
            let (at, len) = (run.first << self.cluster_bits, run.count << self.cluster_bits);
            if let Err(e) = self.file.trim(at, len, ReqFlags::NONE) {
                crate::log::log(crate::log::Level::Warn, format_args!("{e}"));
                return;
            }
        }
    }

    /// Entries that an L1 table of `size` bytes needs.
    pub(super) fn l1_needed(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_size() << self.l2_bits)
    }

    /// Bytes of an L2 entry.
    pub(super) fn l2_entry_bytes(&self) -> usize {
        1 << (self.cluster_bits - self.l2_bits)
    }

    /// The clusters that a table of `bytes` at `offset` takes.
    pub(super) fn clusters_of(&self, offset: u64, bytes: u64) -> Run {
        let first = offset >> self.cluster_bits;
        Run { first, count: bytes.div_ceil(self.cluster_size()) }
    }
}

impl<'a> Rebuild<'a> {
    fn name(&self) -> &'a Name {
        self.image.file.name()
    }

    /// Count a reference more (or fewer) for the clusters that an L1 table's L2 tables point to.
    pub(super) fn count_clusters(&mut self, l1: &[u64], up: bool) -> Result<()> {
        let tables = self.tables(l1)?;
        self.expect(tables.len());
        for table in tables {
            let bytes = self.read_table(table)?;
            for raw in self.entries(&bytes) {
                let Some((first, n)) = self.clusters(table, raw)? else { continue };
                for cluster in first..first + n {
                    self.expect_used(cluster)?;
                    self.shadow.change(cluster, up)?;
                }
            }
        }
        Ok(())
    }

    /// Count a reference more (or fewer) for the L2 tables of an L1 table.
    pub(super) fn count_tables(&mut self, l1: &[u64], up: bool) -> Result<()> {
        self.tables(l1)?.into_iter().try_for_each(|table| self.count_table(table, up))
    }

    /// Count a reference more (or fewer) for an L2 table alone.
    fn count_table(&mut self, table: u64, up: bool) -> Result<()> {
        let cluster = table >> self.image.cluster_bits;
        self.expect_used(cluster)?;
        self.shadow.change(cluster, up)
    }

    /// How many references a cluster is to have.
    fn count_of(&mut self, cluster: u64) -> Result<u64> {
        self.image.or_corrupt(self.shadow.get(cluster))
    }

    /// What is pointed to must be counted, or it would be handed out as free.
    fn expect_used(&mut self, cluster: u64) -> Result<()> {
        if self.count_of(cluster)? != 0 || self.image.or_corrupt(self.shadow.was_used(cluster))? {
            return Ok(());
        }
        Err(Error::corrupt(
            self.name(),
            format!(
                "the cluster at {:#x} is in use but has a refcount of 0",
                cluster << self.image.cluster_bits
            ),
        ))
    }

    /// How many references a cluster is to have that `whose` tables point to: one is theirs.
    fn kept(&mut self, cluster: u64, whose: Whose) -> Result<u64> {
        let count = self.count_of(cluster)?;
        if count != 0 {
            return Ok(count);
        }
        let used = self.expect_used(cluster);
        whose.judge(self.image, used)?;
        // It was counted once for two: for the active image and for the snapshot that goes.
        Err(Error::corrupt(
            self.name(),
            format!(
                "the cluster at {:#x} is in use and would have a refcount of 0: another snapshot or image \
                 points to it without being counted",
                cluster << self.image.cluster_bits
            ),
        ))
    }

    /// The L2 tables that an L1 table names, in order. Twice the same is nothing that a sound image has,
    /// and would make time depend on what a hostile one claims.
    pub(super) fn tables(&self, l1: &[u64]) -> Result<Vec<u64>> {
        let mut tables = Vec::new();
        for (i, raw) in l1.iter().enumerate() {
            let (table, _) = entry::decode_l1(*raw, self.image.cluster_bits).map_err(|what| {
                Error::corrupt(self.name(), format!("L1 entry {i} {what}: found {raw:#018x}"))
            })?;
            if table != 0 {
                tables.push(table);
            }
        }
        let mut sorted = tables.clone();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|w| w[0] == w[1]) {
            let what = format!("two L1 entries name the same L2 table at {:#x}", twice[0]);
            return Err(Error::corrupt(self.name(), what));
        }
        Ok(tables)
    }

    /// So many L2 tables more are to be looked at.
    pub(super) fn expect(&mut self, tables: usize) {
        self.total += tables as u64;
    }

    /// An L2 table as it is in the file.
    pub(super) fn read_table(&mut self, table: u64) -> Result<Vec<u8>> {
        self.progress.at(self.done, self.total)?;
        self.done += 1;
        let file = &self.image.file;
        let end = table + self.image.cluster_size();
        if end > file.size() {
            return Err(self.image.cut_off("the end of an L2 table", end));
        }
        let mut bytes = vec![0; self.image.cluster_size() as usize];
        file.read_slice(&mut bytes, table)?;
        Ok(bytes)
    }

    /// The first words of a table's entries.
    pub(super) fn entries<'b>(&self, table: &'b [u8]) -> impl Iterator<Item = u64> + use<'b> {
        table.chunks_exact(self.image.l2_entry_bytes()).map(entry::first_word)
    }

    /// The host clusters that an entry of an L2 table refers to.
    fn clusters(&self, table: u64, raw: u64) -> Result<Option<(u64, u64)>> {
        entry::clusters(raw, self.image.cluster_bits).map_err(|what| {
            Error::corrupt(
                self.name(),
                format!("an entry of the L2 table at {table:#x} {what}: found {raw:#018x}"),
            )
        })
    }

    /// Make the marks of "the only reference" in the L2 tables of an L1 table what the counts say. A
    /// table that changes gets another place; others that have it keep the old one.
    pub(super) fn mark_entries(&mut self, l1: &mut [u64], whose: Whose) -> Result<()> {
        let image = self.image;
        self.expect(whose.judge(image, self.tables(l1))?.len());
        let width = self.image.l2_entry_bytes();
        for slot in l1 {
            let table = *slot & !COPIED;
            if table == 0 {
                continue;
            }
            let (mut bytes, mut changed) = (whose.judge(image, self.read_table(table))?, false);
            for word in bytes.chunks_exact_mut(width) {
                let raw = entry::first_word(word);
                let clusters = whose.judge(image, self.clusters(table, raw))?;
                let Some((cluster, n)) = clusters else { continue };
                let count = self.kept(cluster, whose)?;
                if raw & entry::COMPRESSED != 0 {
                    for cluster in cluster + 1..cluster + n {
                        self.kept(cluster, whose)?;
                    }
                    continue;
                }
                let only = if count == 1 { COPIED } else { 0 };
                if raw & COPIED != only {
                    word[..8].copy_from_slice(&(raw & !COPIED | only).to_be_bytes());
                    changed = true;
                }
            }
            if changed {
                *slot = self.move_table(table, &bytes)?;
            }
        }
        Ok(())
    }

    /// Take free clusters that follow one another. One that is in use and counted as free is a corruption
    /// of the image.
    pub(super) fn take(&mut self, count: u64) -> Result<Run> {
        self.image.or_corrupt(self.shadow.take(count))
    }

    /// Put a changed L2 table into another place: where, with no mark.
    pub(super) fn move_table(&mut self, table: u64, bytes: &[u8]) -> Result<u64> {
        let run = self.take(1)?;
        let new = run.first << self.image.cluster_bits;
        self.image.file.write_slice(bytes, new, ReqFlags::NONE)?;
        self.count_table(table, false)?;
        Ok(new)
    }

    /// Make the marks in an L1 table what the counts of L2 tables say.
    pub(super) fn mark_tables(&mut self, l1: &mut [u64], whose: Whose) -> Result<()> {
        for slot in l1 {
            let table = *slot & !COPIED;
            if table != 0 {
                let only = self.kept(table >> self.image.cluster_bits, whose)? == 1;
                *slot = if only { entry::normal(table) } else { table };
            }
        }
        Ok(())
    }

    /// Write an L1 table into free clusters: which they are.
    pub(super) fn write_l1(&mut self, l1: &[u64]) -> Result<Run> {
        if l1.len() as u64 > MAX_L1_BYTES / 8 {
            return Err(self.image.too_big(self.image.size.load(Acquire)));
        }
        let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.write_run(bytes)
    }

    /// Write `bytes` into free clusters that follow one another; none for none.
    fn write_run(&mut self, mut bytes: Vec<u8>) -> Result<Run> {
        let clusters = (bytes.len() as u64).div_ceil(self.image.cluster_size());
        if clusters == 0 {
            return Ok(Run { first: 0, count: 0 });
        }
        let run = self.take(clusters)?;
        bytes.resize((clusters << self.image.cluster_bits) as usize, 0);
        let at = run.first << self.image.cluster_bits;
        self.image.file.write_slice(&bytes, at, ReqFlags::NONE)?;
        Ok(run)
    }

    /// Write what is planned, so that only the header is left. `old`: the present snapshot table.
    fn write(&mut self, plan: &mut Plan<'_>, old: &Table) -> Result<(Switch, Table)> {
        let image = self.image;
        let (l1, snapshots) = (image.l1(), old);
        if l1.offset != 0 {
            self.shadow.free(image.clusters_of(l1.offset, l1.entries.len() as u64 * 8))?;
        }
        if snapshots.bytes > 0 {
            self.shadow.free(image.clusters_of(snapshots.offset, snapshots.bytes))?;
        }
        let l1_run = self.write_l1(&plan.l1)?;
        let bytes = snapshot::serialize(&plan.snapshots, self.name())?;
        let len = bytes.len() as u64;
        let table_run = self.write_run(bytes)?;
        let switch = Switch {
            size: plan.size,
            l1: l1_run,
            l1_entries: plan.l1.len() as u32,
            refcounts: self.shadow.write()?,
            snapshots: table_run,
            snapshot_count: plan.snapshots.len() as u32,
        };
        let offset = table_run.first << image.cluster_bits;
        let list = std::mem::take(&mut plan.snapshots);
        Ok((switch, Table { offset, bytes: len, list }))
    }
}
