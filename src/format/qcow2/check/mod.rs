//! Checking an image, and mending it.
//!
//! Every owner of clusters is gone through (header, L1 and L2 tables of the active image and of the
//! snapshots, refcount table and blocks, snapshot table, bitmaps, LUKS header), and what they refer to
//! is counted; then the counts are compared with those on disk, and the COPIED flags with both. What is
//! counted as what is the same as in QEMU's check, so that the numbers are.
//!
//! Mending, in this order, with a flush between: entries that can only be zero, refcounts (one by one
//! where each count has a block; else a new refcount table and new blocks, written behind the end of
//! all that is there and named by one write of the header), COPIED flags, the snapshot table, and last
//! the bits in the header that say that something is wrong. A power cut in between leaves an image that
//! is no worse than before.
//!
//! Bounds, whatever an image claims. Memory: 4 bits a cluster of the file, or (where that is above
//! 64 MiB) about 110 bytes for each place that something refers to; 16 bytes for each L2 table; to mend
//! all, 64 bytes for each stretch past the end that something refers to (see `beyond`); the tables that
//! have limits of their own. Time: each byte of a table is looked at twice at most,
//! however often and however askew tables are named (see `cover`), and each cluster that the refcount
//! table covers within the file three times at most.
//!
//! Source: "Refcounts", "Cluster mapping", "Snapshots", "Bitmaps" of the QCOW2 specification.

mod beyond;
mod compare;
mod copied;
mod counts;
mod cover;
mod disk;
pub mod driver;
mod owners;
mod rebuild;
mod snapshots;
mod tables;

use std::cell::Cell;

use beyond::Beyond;
use counts::Counts;
use cover::{Places, Plan, Times, segments};
use disk::Disk;
use snapshots::Snapshots;

use super::entry::{be16, be32, be64};
use super::header::{Header, MAX_REFTABLE_BYTES, at, incompat};
use super::refcount::max_count;
use crate::block::*;
use crate::log::{Level, log};

/// Check the image in `file`, which nobody writes to meanwhile, and mend what `repair` says.
pub fn run(file: &Device, repair: Repair, progress: Progress<'_>) -> Result<CheckReport> {
    let first = Check::new(file, repair, progress)?.whole()?;
    if first.corruptions_fixed == 0 && first.leaks_fixed == 0 && !first.changed {
        return Ok(first);
    }
    file.flush()?;
    // What is left is what another check finds.
    let left = Check::new(file, Repair::Nothing, progress)?.whole()?;
    let left = CheckReport {
        corruptions_fixed: first.corruptions_fixed,
        leaks_fixed: first.leaks_fixed,
        check_errors: left.check_errors.max(first.check_errors),
        changed: true,
        ..left
    };
    // One that goes away with the mending of another counts as left at first.
    mark_sound(file, &Header::read_to_check(file)?, &left)?;
    Ok(left)
}

/// Mend the refcounts of an image that was not closed cleanly, before it is written to.
pub fn repair_dirty(file: &Device) -> Result<()> {
    let name = file.name();
    log(Level::Warn, format_args!("{name}: was not closed cleanly; its refcounts are repaired"));
    let report = run(file, Repair::All, Progress::NONE)?;
    log(
        Level::Warn,
        format_args!(
            "{name}: repaired {} corruptions and {} leaks; {} and {} are left",
            report.corruptions_fixed, report.leaks_fixed, report.corruptions, report.leaks
        ),
    );
    if report.corruptions > 0 || report.check_errors > 0 {
        return Err(Error::corrupt(
            name,
            format!(
                "it was not closed cleanly, and {} corruptions are left after a repair ({} places could not \
                 be looked at): it can be read only",
                report.corruptions, report.check_errors
            ),
        ));
    }
    Ok(())
}

/// A check under way.
struct Check<'a> {
    file: &'a Device,
    /// Its size when the check began, bytes.
    file_size: u64,
    header: Header,
    /// The first cluster, as far as it is there.
    head: Vec<u8>,
    bits: u32,
    repair: Repair,
    report: CheckReport,
    counts: Counts,
    /// Clusters that are looked at: those of the file, and one behind it if something reaches there.
    clusters: u64,
    /// What is referred to past the end.
    beyond: Beyond,
    /// The last cluster that is in use, or counted as such.
    highest: u64,
    disk: Disk,
    /// Clusters whose count on disk is one when ours is not, or the other way round.
    flips: Option<Counts>,
    /// Some count on disk is wrong.
    differs: bool,
    /// The active image has entries without the flag COPIED, where there may be one.
    uncopied: bool,
    /// Clusters whose counts on disk can not be known: first and end.
    unknown: Vec<(u64, u64)>,
    /// The refcounts on disk can not be mended one by one.
    rebuild: bool,
    /// Not all owners of clusters are known: what nobody seems to use may be theirs.
    blind: bool,
    snapshots: Snapshots,
    /// The L2 tables.
    tables: Plan,
    /// Where L1 tables lie, and where other metadata does: no entry of other tables is mended there.
    l1_tables: Places,
    metadata: Places,
    /// Refcounts that were looked at last behind the end: where they lie, and they.
    near: Cell<Option<(u64, compare::Near)>>,
    progress: Progress<'a>,
    /// What is done and what there is to do, in bytes of tables.
    done: u64,
    todo: u64,
}

impl<'a> Check<'a> {
    fn new(file: &'a Device, repair: Repair, progress: Progress<'a>) -> Result<Self> {
        let header = Header::read_to_check(file)?;
        if let Some(feature) = header.not_checkable() {
            return Err(Error::unsupported(file.name(), feature));
        }
        let (bits, file_size) = (header.cluster_bits, file.size());
        let mut head = vec![0; file_size.min(1 << bits) as usize];
        file.read_slice(&mut head, 0)?;
        let clusters = file_size.div_ceil(1 << bits);
        let max = max_count(header.refcount_order);
        Ok(Self {
            file,
            file_size,
            head,
            bits,
            repair,
            report: CheckReport::default(),
            counts: Counts::new(clusters, max),
            clusters,
            beyond: Beyond::default(),
            highest: 0,
            disk: Disk::default(),
            flips: None,
            differs: false,
            uncopied: false,
            unknown: Vec::new(),
            rebuild: false,
            blind: false,
            snapshots: Snapshots::default(),
            tables: Plan::default(),
            l1_tables: Places::default(),
            metadata: Places::default(),
            near: Cell::new(None),
            progress,
            done: 0,
            todo: 0,
            header,
        })
    }

    /// All of it.
    fn whole(mut self) -> Result<CheckReport> {
        self.progress.at(0, 1)?;
        self.disk = Disk::load(self.file, &self.header, &mut self.report, &mut self.rebuild)?;
        self.read_snapshots()?;
        self.count_all()?;
        if self.report.changed {
            // Entries that were mended name nothing any more: before the refcounts say so.
            self.file.flush()?;
        }
        let found = self.report;
        self.compare(Repair::Nothing)?;
        if self.rebuild && self.repair == Repair::All && !self.blind {
            match self.rebuild_all() {
                Err(Error::TooBig { what, .. }) => {
                    self.trouble(format_args!("the refcounts can not be made anew: {what}"));
                    return Ok(self.end());
                }
                done => done?,
            }
        } else if self.repair != Repair::Nothing && self.report.leaks + self.report.corruptions > 0
        {
            if self.rebuild || self.blind {
                // Fixing some of it would make it worse.
                self.trouble(format_args!(
                    "the refcounts can not be mended: {}",
                    match self.blind {
                        true => "what some of the clusters belong to is not known",
                        false => "all of them need to be made anew, which 'all' does",
                    }
                ));
                return Ok(self.end());
            }
            self.report = CheckReport { changed: self.report.changed, ..found };
            self.compare(self.repair)?;
        }
        self.check_copied()?;
        self.mend_snapshots()?;
        if self.repair != Repair::Nothing {
            self.report.changed |= mark_sound(self.file, &self.header, &self.report)?;
        }
        self.progress.at(1, 1)?;
        Ok(self.end())
    }

    fn end(&mut self) -> CheckReport {
        self.report.image_end = (self.highest + 1) << self.bits;
        // A size that is no multiple of 512 is rounded down by QEMU, and so in its counts.
        self.report.total_clusters = (self.header.size & !511).div_ceil(1 << self.bits);
        self.report
    }

    /// Count who refers to what.
    fn count_all(&mut self) -> Result<()> {
        self.l1_tables = Places::default();
        self.metadata = Places::default();
        self.beyond = Beyond::default();
        self.uncopied = false;
        self.refer("the header", 0, self.cluster(), 1);
        self.note_metadata(0, self.cluster());
        let l1 = (self.header.l1_offset, u64::from(self.header.l1_entries) * 8);
        self.count_l1(l1)?;
        if let Some((offset, len)) = self.snapshots.place {
            self.refer("the snapshot table", offset, len, 1);
            self.note_metadata(offset, len);
        }
        let (offset, len) = self.disk.place;
        self.refer("the refcount table", offset, len, 1);
        self.note_metadata(offset, len);
        self.count_luks();
        self.count_bitmaps()?;
        self.count_tables()?;
        self.count_blocks()
    }

    /// Note that `times` owners have `len` bytes at `offset`.
    fn refer(&mut self, what: &str, offset: u64, len: u64, times: u64) {
        if len == 0 {
            return;
        }
        // The last cluster of a file may be there in part only.
        let end = u128::from(offset) + u128::from(len);
        if end >= u128::from(self.file_size) + u128::from(self.cluster()) {
            self.report.corruptions += times;
            self.tell(format_args!("{what} at {offset:#x} ({len} bytes) lies past the end"));
            // Refcounts are made anew no further out than a table can name them.
            let most = (MAX_REFTABLE_BYTES / 8) << self.disk.block_bits;
            if self.repair == Repair::All && offset >> self.bits < most {
                self.beyond.push(offset, end, times, self.bits);
            } else {
                self.beyond.note();
            }
            return;
        }
        let (first, last) = (offset >> self.bits, (offset + len - 1) >> self.bits);
        self.clusters = self.clusters.max(last + 1);
        for cluster in first..=last {
            let lost = self.counts.add(cluster, times);
            if lost > 0 {
                self.report.corruptions += lost;
                self.tell(format_args!(
                    "the cluster at {:#x} is referred to more often than {} bits can count",
                    cluster << self.bits,
                    1 << self.header.refcount_order
                ));
            }
        }
    }

    /// Note who has tables: offset, bytes and by whom they are named. Each cluster is looked at once, for
    /// as many tables as lie there.
    fn refer_tables(&mut self, what: &str, tables: &[(u64, u64, Times)]) {
        let limit = u128::from(self.file_size) + u128::from(self.cluster());
        let is_there = |t: &(u64, u64, Times)| u128::from(t.0) + u128::from(t.1) < limit;
        for &(offset, len, _) in tables.iter().filter(|t| !is_there(t)) {
            self.refer(what, offset, len, 1);
        }
        let whole = tables.iter().filter(|t| t.1 > 0 && is_there(t)).map(|&(at, len, times)| {
            let (from, to) = self.whole_clusters(at, len);
            (from, to, times)
        });
        for part in segments(whole) {
            for at in (part.from..part.to).step_by(self.cluster() as usize) {
                self.refer(what, at, 1, part.times.all.into());
            }
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.bits
    }

    /// The clusters that `len` bytes at `offset` lie in: from where to where, bytes.
    fn whole_clusters(&self, offset: u64, len: u64) -> (u64, u64) {
        let mask = self.cluster() - 1;
        (offset & !mask, offset.saturating_add(len).saturating_add(mask) & !mask)
    }

    fn note_metadata(&mut self, offset: u64, len: u64) {
        if len > 0 {
            self.metadata.add(self.whole_clusters(offset, len));
        }
    }

    fn note_l1(&mut self, offset: u64, len: u64) {
        if len > 0 {
            self.l1_tables.add(self.whole_clusters(offset, len));
        }
    }

    /// Whether `len` bytes at `offset` are free of metadata but for L2 tables.
    fn is_free_to_mend(&self, offset: u64, len: u64) -> bool {
        self.is_free_to_mend_l1(offset, len) && !self.l1_tables.touch(offset, offset + len)
    }

    /// Whether `len` bytes at `offset` are free of metadata but for L1 and L2 tables.
    fn is_free_to_mend_l1(&self, offset: u64, len: u64) -> bool {
        let end = offset + len;
        !self.metadata.touch(offset, end) && !self.disk.has_block_at(offset, end, self.bits)
    }

    /// Read from the file, zeroes where it has ended.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_there(self.file, self.file_size, buf, offset)
    }

    /// Some work is done: `bytes` of tables.
    fn step(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        self.progress.at(self.done.min(self.todo), self.todo + 1)
    }

    /// Something is wrong that is counted elsewhere.
    fn tell(&self, what: std::fmt::Arguments<'_>) {
        log(Level::Debug, format_args!("{}: check: {what}", self.file.name()));
    }

    /// Something could not be looked at or mended.
    fn trouble(&mut self, what: std::fmt::Arguments<'_>) {
        self.report.check_errors += 1;
        log(Level::Warn, format_args!("{}: check: {what}", self.file.name()));
    }
}

/// Where nothing is wrong any more the header may say so: whether that has changed it.
fn mark_sound(file: &Device, header: &Header, report: &CheckReport) -> Result<bool> {
    let bits = header.incompatible;
    let sound = bits & !(incompat::DIRTY | incompat::CORRUPT);
    if report.check_errors > 0 || report.corruptions > 0 || bits == sound {
        return Ok(false);
    }
    file.flush()?;
    file.write_slice(&sound.to_be_bytes(), at::INCOMPATIBLE, ReqFlags::NONE)?;
    file.flush()?;
    Ok(true)
}

/// Fill `buf` from `offset` of a file of `size` bytes, with zeroes where it has ended.
fn read_there(file: &Device, size: u64, buf: &mut [u8], offset: u64) -> Result<()> {
    let there = size.saturating_sub(offset).min(buf.len() as u64) as usize;
    let (first, rest) = buf.split_at_mut(there);
    rest.fill(0);
    if first.is_empty() { Ok(()) } else { file.read_slice(first, offset) }
}
