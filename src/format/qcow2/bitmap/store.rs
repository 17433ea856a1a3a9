//! Bringing what is on disk to what memory has.
//!
//! The order: data and tables of the bitmaps that changed, and a directory that leads to them, go to
//! clusters of their own; these and all that the guest has written are made to last, and the counts of
//! the new clusters; then one write switches the header over to the new directory, and is made to
//! last; only then is the old one given up, with what only it led to. Where nothing but flags
//! changes they are written in place: each entry's lie in one sector, and each is true by itself.
//!
//! Where the switch could be torn, and where the bitmaps come or go as a whole, the autoclear bit
//! is cleared first and set afterwards: a power cut between costs the bitmaps, and nothing else.

use super::directory::{data_clusters, encode};
use super::marks::Found;
use super::view::{ALL_ONES, OFFSET, PIECE};
use super::*;
use crate::format::qcow2::guard::Kind;
use crate::format::qcow2::refcount::Run;
use crate::log::{Level, log};

/// What a disk writes whole or not at all, bytes.
const SECTOR: u64 = 512;

/// What a new directory leads to that the old one did not, and the other way round.
#[derive(Default)]
struct Moved {
    made: Vec<Run>,
    gone: Vec<Run>,
}

/// What becomes of a bitmap.
struct Plan {
    flags: u32,
    table: Table,
    /// All that memory has of it is on disk then.
    whole: bool,
}

impl Bitmap {
    /// Whether the file has something else than is true now.
    fn differs(&self, size: u64, entries: u64) -> bool {
        self.cut
            || self.base != granules(size, self.granularity_bits)
            || self.table.is_none_or(|t| u64::from(t.entries) != entries)
            || self.marks().iter().any(|m| m.any(0, u64::MAX))
    }
}

impl Qcow2 {
    /// Bring the disk to what memory has. What is still marked stays in use, unless this is to `finish`:
    /// nobody is about to write.
    pub(super) fn save(
        &self,
        state: &mut State,
        finish: bool,
        removed: Option<&Bitmap>,
    ) -> Result<()> {
        let writer = self.writer_parts()?;
        let armed = self.bitmaps.armed.load(Acquire) && !finish;
        let mut moved = Moved::default();
        if let Some(bitmap) = removed {
            self.give_up(bitmap, &[], &mut moved.gone);
        }
        let (mut plans, mut failure) = (Vec::with_capacity(state.list.len()), None);
        for b in &state.list {
            let mut own = Moved::default();
            let (e, table) = match (self.plan(b, armed, &mut own), b.table) {
                (Ok(plan), _) => {
                    plans.push(plan);
                    moved.made.append(&mut own.made);
                    moved.gone.append(&mut own.gone);
                    continue;
                }
                (Err(e), table) => (e, table.filter(|_| finish)),
            };
            self.take_back(writer, own.made);
            let Some(table) = table else {
                self.take_back(writer, moved.made);
                return Err(e);
            };
            // The others can be saved all the same; this one stays in use.
            plans.push(Plan { flags: b.flags | IN_USE, table, whole: false });
            failure = Some(e);
        }
        let same = removed.is_none()
            && state.extension.is_some_and(|e| e.bitmaps as usize == state.list.len())
            && state.list.iter().zip(&plans).all(|(b, p)| b.table == Some(p.table));
        let extension = if same {
            self.save_flags(state, &plans)?;
            state.extension
        } else {
            self.save_directory(writer, state, &plans, moved)?
        };
        state.extension = extension;
        let size = self.size.load(Acquire);
        for (b, plan) in state.list.iter_mut().zip(plans) {
            (b.flags, b.table) = (plan.flags, Some(plan.table));
            if plan.whole && b.differs(size, plan.table.entries.into()) {
                b.base = granules(size, b.granularity_bits);
                b.cut = false;
                b.older.clear();
                let new = || Arc::new(Marks::new(size, b.granularity_bits));
                b.active = b.enabled.then(new);
            }
        }
        self.bitmaps.activate(state);
        state.unsaved = failure.is_some();
        failure.map_or(Ok(()), Err)
    }

    /// Write what is new of a bitmap, and say what the directory is to have of it.
    fn plan(&self, b: &Bitmap, armed: bool, moved: &mut Moved) -> Result<Plan> {
        let auto = if b.enabled { AUTO } else { 0 };
        let flags = b.flags & !(IN_USE | AUTO) | auto;
        let size = self.size.load(Acquire);
        let entries = data_clusters(size, b.granularity_bits, self.cluster_bits);
        match (b.table, b.fit) {
            (Some(table), Fit::InUse | Fit::Foreign) => {
                Ok(Plan { flags: b.flags, table, whole: false })
            }
            // Out of date in any case.
            (Some(table), _) if b.enabled && armed => {
                Ok(Plan { flags: flags | IN_USE, table, whole: false })
            }
            (Some(table), _) if !b.differs(size, entries) => Ok(Plan { flags, table, whole: true }),
            _ => {
                let table = self.write_bitmap(b, size, entries, moved)?;
                let in_use = if b.enabled && armed { IN_USE } else { 0 };
                Ok(Plan { flags: flags | in_use, table, whole: in_use == 0 })
            }
        }
    }

    /// Write the data that differs, and a table, to new clusters.
    fn write_bitmap(
        &self,
        b: &Bitmap,
        size: u64,
        entries: u64,
        moved: &mut Moved,
    ) -> Result<Table> {
        let (cluster, mut view) = (self.cluster_size(), View::new(self, b, size));
        let (marks, bits) = (b.marks(), granules(size, b.granularity_bits));
        let mut table = vec![0; entries as usize];
        for (i, entry) in table.iter_mut().enumerate() {
            let (start, end) = (i as u64 * cluster, (i as u64 + 1) * cluster);
            let chunks = start / PIECE..end.div_ceil(PIECE);
            if !marks.iter().any(|m| m.any(chunks.start, chunks.end)) {
                if b.base <= start * 8 {
                    continue;
                }
                if end * 8 <= b.base || (b.base == bits && !b.cut) {
                    *entry = view.entry(i as u64)?;
                    continue;
                }
            }
            let mut data = vec![0; cluster as usize];
            for index in chunks {
                let mut piece = [0; PIECE as usize];
                let found = view.chunk(index)?;
                if found == Found::Zeroes {
                    continue;
                }
                view.bytes(index, found, &mut piece);
                let at = index * PIECE;
                let (from, to) = (at.max(start), (at + PIECE).min(end));
                let from_piece = piece.get((from - at) as usize..(to - at) as usize);
                let into = data.get_mut((from - start) as usize..(to - start) as usize);
                if let (Some(into), Some(from)) = (into, from_piece) {
                    into.copy_from_slice(from);
                }
            }
            *entry = match () {
                _ if data.iter().all(|b| *b == 0) => 0,
                _ if end * 8 <= bits && data.iter().all(|b| *b == 0xff) => ALL_ONES,
                _ => {
                    let offset = self.take_clusters(1, moved)?;
                    self.file.write_slice(&data, offset, ReqFlags::NONE)?;
                    offset
                }
            };
        }
        let bytes = (entries * 8).next_multiple_of(cluster);
        let offset = self.take_clusters(bytes >> self.cluster_bits, moved)?;
        let mut raw: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        raw.resize(bytes as usize, 0);
        self.file.write_slice(&raw, offset, ReqFlags::NONE)?;
        self.give_up(b, &table, &mut moved.gone);
        Ok(Table { offset, entries: entries as u32 })
    }

    /// Note the clusters of a bitmap on disk that are not in its new table, and those of its table.
    /// What can not be read is leaked, which a check finds and mends.
    fn give_up(&self, b: &Bitmap, new: &[u64], gone: &mut Vec<Run>) {
        let Some(old) = b.table else { return };
        let mut view = View::new(self, b, self.size.load(Acquire));
        for i in 0..u64::from(old.entries) {
            match view.entry(i) {
                Ok(entry) if entry & OFFSET != 0 && new.get(i as usize) != Some(&entry) => {
                    gone.push(Run { first: (entry & OFFSET) >> self.cluster_bits, count: 1 });
                }
                Ok(_) => {}
                Err(e) => {
                    log(Level::Warn, format_args!("{e}; its clusters are leaked"));
                    break;
                }
            }
        }
        let count = (u64::from(old.entries) * 8).div_ceil(self.cluster_size());
        gone.push(Run { first: old.offset >> self.cluster_bits, count });
    }

    /// Take clusters that follow one another; where they begin.
    fn take_clusters(&self, count: u64, moved: &mut Moved) -> Result<u64> {
        let writer = self.writer_parts()?;
        let run = if count == 1 {
            loop {
                let taken = self.allocate(&mut writer.meta.lock(), 1);
                if let Some((run, _)) = self.or_grow(taken)? {
                    break run;
                }
            }
        } else {
            // The refcount table may have to grow, and so no flush may be under way.
            let _turn = writer.turn.lock();
            let mut meta = writer.meta.lock();
            self.or_corrupt(meta.refs.allocate_all(self, count))?
        };
        moved.made.push(run);
        self.lengthen((run.first + run.count) << self.cluster_bits)?;
        Ok(run.first << self.cluster_bits)
    }

    /// Give back clusters that nothing ever led to.
    fn take_back(&self, writer: &Writer, made: Vec<Run>) {
        let mut meta = writer.meta.lock();
        for run in made {
            for cluster in run.first..run.first + run.count {
                self.release_or_leak(&mut meta, cluster);
            }
        }
    }

    /// Nothing but flags changes: write them in place, behind all that they vouch for.
    fn save_flags(&self, state: &mut State, plans: &[Plan]) -> Result<()> {
        if state.list.iter().zip(plans).all(|(b, p)| b.flags == p.flags) {
            return Ok(());
        }
        self.flush_all()?;
        let writer = self.writer_parts()?;
        for (b, plan) in state.list.iter_mut().zip(plans) {
            b.flags = plan.flags;
        }
        self.or_fail(writer, self.write_flags(state))
    }

    /// Write the directory with the flags that the bitmaps have, where it is.
    pub(super) fn write_flags(&self, state: &State) -> Result<()> {
        let Some(e) = &state.extension else { return Ok(()) };
        let mut bytes = Vec::with_capacity(e.size as usize);
        for b in &state.list {
            if let Some(table) = b.table {
                encode(&b.entry(b.flags, table), &mut bytes);
            }
        }
        if bytes.len() as u64 != e.size {
            return Err(Error::Internal("the bitmap directory has another size".into()));
        }
        self.check_table(Kind::BitmapDirectory, e.offset)?;
        self.file.write_slice(&bytes, e.offset, ReqFlags::NONE)?;
        self.file.flush()
    }

    /// Write a new directory and switch over to it; answers where it is.
    fn save_directory(
        &self,
        writer: &Writer,
        state: &State,
        plans: &[Plan],
        mut moved: Moved,
    ) -> Result<Option<Extension>> {
        let new = match self.write_directory(state, plans, &mut moved) {
            Ok(new) => new,
            Err(e) => {
                self.take_back(writer, moved.made);
                return Err(e);
            }
        };
        if let Some(old) = &state.extension {
            let count = old.size.div_ceil(self.cluster_size());
            moved.gone.push(Run { first: old.offset >> self.cluster_bits, count });
        }
        let mut switching = false;
        let switched = self.with_all_written(writer, |meta| {
            switching = true;
            let switched =
                self.publish_counts(meta).and_then(|()| self.switch_directory(new.as_ref()));
            self.or_fail(writer, switched)?;
            self.note_bitmap_directory(new.as_ref().map(|e| (e.offset, e.size)));
            meta.unmapped.append(&mut moved.gone);
            Ok(())
        });
        if switched.is_err() && !switching {
            self.take_back(writer, moved.made);
        }
        switched.map(|()| new)
    }

    fn write_directory(
        &self,
        state: &State,
        plans: &[Plan],
        moved: &mut Moved,
    ) -> Result<Option<Extension>> {
        if plans.is_empty() {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        for (b, plan) in state.list.iter().zip(plans) {
            encode(&b.entry(plan.flags, plan.table), &mut bytes);
        }
        let size = bytes.len() as u64;
        let clusters = size.div_ceil(self.cluster_size());
        if state.extension.is_none() {
            self.check_extension()?;
        }
        let offset = self.take_clusters(clusters, moved)?;
        bytes.resize((clusters << self.cluster_bits) as usize, 0);
        self.file.write_slice(&bytes, offset, ReqFlags::NONE)?;
        Ok(Some(Extension { bitmaps: plans.len() as u32, size, offset }))
    }

    /// See that the header has room for the extension, before anything depends on it.
    fn check_extension(&self) -> Result<()> {
        let _turn = self.features.turn.lock();
        let mut edit = edit::Edit::load(&self.file, self.cluster_bits)?;
        edit.set_extension(header::EXT_BITMAPS, Some(vec![0; EXTENSION_BYTES]));
        edit.check(self.file.name())
    }

    /// Make the header lead to another directory, or to none.
    fn switch_directory(&self, new: Option<&Extension>) -> Result<()> {
        const BIT: u64 = header::AUTOCLEAR_BITMAPS;
        let place = {
            let _turn = self.features.turn.lock();
            edit::Edit::load(&self.file, self.cluster_bits)?.place_of(header::EXT_BITMAPS)
        };
        let Some(new) = new else {
            self.set_autoclear(BIT, false)?;
            return self.drop_extension();
        };
        match place {
            Some(at) => {
                let whole = at / SECTOR == (at + EXTENSION_BYTES as u64 - 1) / SECTOR;
                if !whole {
                    self.set_autoclear(BIT, false)?;
                }
                let _turn = self.features.turn.lock();
                self.file.write_slice(&new.encode(), at, ReqFlags::NONE)?;
                self.file.flush()?;
            }
            None => self.edit_header(|edit| {
                edit.set_extension(header::EXT_BITMAPS, Some(new.encode().to_vec()));
                Ok(())
            })?,
        }
        self.set_autoclear(BIT, true)
    }

    /// Take the extension out of the header, which leads nowhere any more.
    fn drop_extension(&self) -> Result<()> {
        let last = {
            let _turn = self.features.turn.lock();
            edit::Edit::load(&self.file, self.cluster_bits)?.last_place()
        };
        if let Some((header::EXT_BITMAPS, at)) = last {
            // The end of the extensions in its place: one write of 8 aligned bytes.
            let _turn = self.features.turn.lock();
            self.file.write_slice(&[0; 8], at - 8, ReqFlags::NONE)?;
            return self.file.flush();
        }
        self.edit_header(|edit| {
            edit.set_extension(header::EXT_BITMAPS, None);
            Ok(())
        })
    }

    /// A program that knows nothing of bitmaps has written to the image: what they say can not be
    /// trusted. Nor can it be known to whom their clusters belong now, and so they are leaked, which a
    /// check mends.
    pub(in crate::format::qcow2) fn drop_stale_bitmaps(&self) -> Result<()> {
        if self.header.bitmaps.is_none()
            || self.features.autoclear() & header::AUTOCLEAR_BITMAPS != 0
        {
            return Ok(());
        }
        log(
            Level::Warn,
            format_args!(
                "{}: its bitmaps are dropped, for a program that does not know bitmaps has written to it; \
                 their clusters are leaked until the image is repaired",
                self.file.name()
            ),
        );
        self.note_bitmap_directory(None);
        self.drop_extension()
    }

    /// Nobody is about to write, and everything written is on disk: save all bitmaps.
    pub(in crate::format::qcow2) fn settle_bitmaps(&self) -> Result<()> {
        let mut state = self.bitmap_state()?;
        if !self.bitmaps.armed.load(Acquire) && !state.unsaved {
            return Ok(());
        }
        let saved = self.save(&mut state, true, None);
        // Whoever writes from now on marks anew.
        self.bitmaps.armed.store(false, Release);
        self.bitmaps.activate(&mut state);
        self.retire(state);
        saved
    }
}
