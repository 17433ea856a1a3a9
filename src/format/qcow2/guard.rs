//! What keeps damage from spreading: which host clusters hold metadata, and what is done when
//! something is about to be written over them, or an image is found to contradict itself.
//!
//! [`Areas`] knows the header, the active L1 table and its L2 tables, refcount table and blocks, the
//! snapshot table, the snapshots' L1 tables, the LUKS header and the bitmap directory: what QEMU calls
//! the cached overlap checks. Before a table is written, its place must be that table's alone; a
//! cluster that is handed out must be nothing of this, whatever its refcount says; data goes to none.
//!
//! Asking costs no lock where the answer is no, which it nearly always is: a filter of bits, set when
//! a cluster comes to hold metadata, is looked at first. Bits stay set when it does not any more, which
//! costs the next who asks a lock.
//!
//! What is found to be corrupt on a writable image is marked so in its header, once, and the image is
//! fenced: nothing is written any more, and who tries is told why. Reading goes on.
//!
//! Lock order: `Areas` comes last, with `Features::turn`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::*};

use parking_lot::Mutex;

use super::refcount::Run;
use super::*;
use crate::log::{Level, log};

/// What a host cluster holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    Luks,
    SnapshotTable,
    SnapshotL1,
    BitmapDirectory,
}

impl Kind {
    /// For messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Header => "the header",
            Self::L1 => "the L1 table",
            Self::L2 => "an L2 table",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
            Self::Luks => "the LUKS header",
            Self::SnapshotTable => "the snapshot table",
            Self::SnapshotL1 => "a snapshot's L1 table",
            Self::BitmapDirectory => "the bitmap directory",
        }
    }
}

/// What is in one cluster.
#[derive(Clone, Copy)]
struct Holder {
    kind: Kind,
    /// How often it was said to be there.
    times: u16,
    /// Another kind was said to be there, too, and how often.
    other: Option<Kind>,
    other_times: u16,
}

/// So many times or more: it is not counted down any more.
const MANY: u16 = u16::MAX;

impl Holder {
    /// Without the kind that it was first said to be; `None` if there is nothing else.
    fn without_first(self) -> Option<Self> {
        let (kind, times) = (self.other?, self.other_times);
        Some(Self { kind, times, other: None, other_times: 0 })
    }
}

/// Which host clusters hold metadata.
pub(super) struct Areas {
    filter: Box<[AtomicU64]>,
    /// Bits of a hash that choose a word.
    shift: u32,
    known: Mutex<HashMap<u64, Holder>>,
}

/// Bits of the filter for each cluster that is expected, and words at least.
const FILTER_BITS: u64 = 16;
const FILTER_WORDS: u64 = 64;

impl Areas {
    /// With a filter for so many clusters.
    pub(super) fn new(expected: u64) -> Self {
        let words = (expected * FILTER_BITS / 64).clamp(FILTER_WORDS, 1 << 20).next_power_of_two();
        Self {
            filter: (0..words).map(|_| AtomicU64::new(0)).collect(),
            shift: 64 - words.trailing_zeros(),
            known: Mutex::new(HashMap::new()),
        }
    }

    /// Word and bit of the filter for a cluster.
    #[inline]
    fn place(&self, cluster: u64) -> (usize, u64) {
        let hash = cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((hash >> self.shift) as usize, 1 << (hash >> 8 & 63))
    }

    /// A cluster holds metadata from now on.
    pub(super) fn add(&self, kind: Kind, cluster: u64) {
        let (word, bit) = self.place(cluster);
        if let Some(word) = self.filter.get(word) {
            word.fetch_or(bit, SeqCst);
        }
        let mut known = self.known.lock();
        let none = Holder { kind, times: 0, other: None, other_times: 0 };
        let holder = known.entry(cluster).or_insert(none);
        if holder.kind == kind {
            holder.times = holder.times.saturating_add(1);
        } else if holder.other == Some(kind) {
            holder.other_times = holder.other_times.saturating_add(1);
        } else {
            (holder.other, holder.other_times) = (Some(kind), 1);
        }
    }

    /// Make room for so many clusters more: growing by and by takes more memory for a while.
    pub(super) fn reserve(&self, clusters: usize) {
        self.known.lock().reserve(clusters);
    }

    /// A cluster does not hold what it was said to any more.
    pub(super) fn remove(&self, kind: Kind, cluster: u64) {
        let mut known = self.known.lock();
        let Some(holder) = known.get_mut(&cluster) else { return };
        if holder.kind == kind {
            match (holder.times, holder.without_first()) {
                (MANY, _) => {}
                (2.., _) => holder.times -= 1,
                (_, Some(other)) => *holder = other,
                (_, None) => drop(known.remove(&cluster)),
            }
        } else if holder.other == Some(kind) {
            match holder.other_times {
                MANY => {}
                2.. => holder.other_times -= 1,
                _ => holder.other = None,
            }
        }
    }

    /// All clusters of one kind are these from now on.
    pub(super) fn replace(&self, kind: Kind, runs: &[Run]) {
        self.known.lock().retain(|_, holder| {
            if holder.other == Some(kind) {
                holder.other = None;
            }
            match holder.without_first() {
                _ if holder.kind != kind => true,
                Some(other) => {
                    *holder = other;
                    true
                }
                None => false,
            }
        });
        for run in runs {
            for cluster in run.first..run.first.saturating_add(run.count) {
                self.add(kind, cluster);
            }
        }
    }

    /// What a cluster holds, if it is metadata.
    #[inline]
    pub(super) fn kind_at(&self, cluster: u64) -> Option<Kind> {
        let (word, bit) = self.place(cluster);
        match self.filter.get(word) {
            Some(word) if word.load(Acquire) & bit != 0 => self.look(cluster),
            _ => None,
        }
    }

    #[cold]
    fn look(&self, cluster: u64) -> Option<Kind> {
        self.known.lock().get(&cluster).map(|h| h.kind)
    }

    /// What else than one table of a kind a cluster holds that it is to be written as.
    pub(super) fn conflict(&self, kind: Kind, cluster: u64) -> Option<&'static str> {
        match self.known.lock().get(&cluster) {
            Some(h) if h.kind != kind => Some(h.kind.name()),
            Some(Holder { other: Some(other), .. }) => Some(other.name()),
            Some(h) if h.times > 1 && matches!(kind, Kind::L2 | Kind::RefcountBlock) => {
                Some("another of its kind")
            }
            Some(_) => None,
            None => Some("nothing that is known"),
        }
    }
}

/// What is said of a table that is to be written where another is.
pub(super) fn misplaced(what: &str, offset: u64, other: &str) -> String {
    format!("{what} is to be written at {offset:#x}, where {other} is")
}

impl Qcow2 {
    /// Note all metadata anew, after tables were replaced as a whole. Under `Writer::meta`.
    pub(super) fn note_metadata(&self, meta: &Meta) {
        meta.refs.note_blocks();
        note_snapshots(&self.areas, &meta.snapshots, &self.file, self.cluster_bits);
        self.note_l2_tables();
    }

    /// Note where the bitmap directory lies from now on, if there is one: offset and bytes. To be called
    /// whenever that changes, before what it had before is free.
    pub(super) fn note_bitmap_directory(&self, place: Option<(u64, u64)>) {
        let runs = place.map(|(offset, bytes)| Run {
            first: offset >> self.cluster_bits,
            count: bytes.div_ceil(self.cluster_size()),
        });
        self.areas.replace(Kind::BitmapDirectory, runs.as_slice());
    }

    /// Note the L2 tables that the L1 table in memory names, and no others. For what replaces entries of
    /// that as a whole. Under `Writer::meta`, or before anybody else has the image.
    pub(super) fn note_l2_tables(&self) {
        self.areas.replace(Kind::L2, &[]);
        let entries = &self.l1().entries;
        self.areas.reserve(entries.iter().filter(|e| e.load(Relaxed) & !COPIED != 0).count());
        for entry in entries {
            if let Ok((table @ 1.., _)) = entry::decode_l1(entry.load(Acquire), self.cluster_bits) {
                self.areas.add(Kind::L2, table >> self.cluster_bits);
            }
        }
    }

    /// Refuse to write a table of `kind` at `offset` unless that is its place, and no other's.
    pub(super) fn check_table(&self, kind: Kind, offset: u64) -> Result<()> {
        match self.areas.conflict(kind, offset >> self.cluster_bits) {
            None => Ok(()),
            Some(other) => Err(self.found_corrupt(misplaced(kind.name(), offset, other))),
        }
    }

    /// Refuse to write `len` bytes of data at `host` of the image's file where metadata is.
    #[inline]
    pub(super) fn check_data(&self, host: u64, len: u64) -> Result<()> {
        if self.shape.external {
            return Ok(());
        }
        let last = (host + len.max(1) - 1) >> self.cluster_bits;
        for cluster in host >> self.cluster_bits..=last {
            if let Some(kind) = self.areas.kind_at(cluster) {
                return Err(self.data_over(kind, cluster));
            }
        }
        Ok(())
    }

    #[cold]
    fn data_over(&self, kind: Kind, cluster: u64) -> Error {
        self.found_corrupt(format!(
            "data is to be written at {:#x}, where {} is",
            cluster << self.cluster_bits,
            kind.name()
        ))
    }

    /// The image contradicts itself. Where it is open for writing it is marked as corrupt, and nothing is
    /// written any more.
    #[cold]
    pub(super) fn found_corrupt(&self, what: String) -> Error {
        let Some(writer) = &self.writer else { return Error::corrupt(self.file.name(), what) };
        let first = writer.corrupt.set(what.clone()).is_ok();
        writer.failed.store(CORRUPT, Release);
        if first {
            log(Level::Error, format_args!("{}: image is corrupt: {what}", self.file.name()));
            // Version 2 has no place for the mark.
            if self.v3
                && let Err(e) = self.set_incompatible(incompat::CORRUPT, true)
            {
                log(Level::Error, format_args!("{e}"));
            }
        }
        Error::corrupt(self.file.name(), what)
    }

    /// As [`Qcow2::found_corrupt`], where an error says so of this image.
    pub(super) fn or_corrupt<T>(&self, result: Result<T>) -> Result<T> {
        match result {
            Err(Error::Corrupt { file, what })
                if self.writer.is_some() && file == *self.file.name() =>
            {
                Err(self.found_corrupt(what))
            }
            other => other,
        }
    }
}

/// No table of snapshots, or of one, is larger, bytes.
const MAX_TABLE: u64 = 64 << 20;

/// Note where the snapshot table and the snapshots' L1 tables lie. What of it can not be is left out: who
/// uses it finds out.
pub(super) fn note_snapshots(areas: &Areas, table: &snapshot::Table, file: &Device, bits: u32) {
    let clusters = |from: u64, len: u64| {
        let end = from.checked_add(len).filter(|end| *end <= file.size())?;
        let good = from.is_multiple_of(1 << bits) && len <= MAX_TABLE;
        good.then(|| Run { first: from >> bits, count: end.div_ceil(1 << bits) - (from >> bits) })
    };
    areas.replace(Kind::SnapshotTable, clusters(table.offset, table.bytes).as_slice());
    let l1 = |s: &snapshot::Snapshot| clusters(s.l1_offset, u64::from(s.l1_entries) * 8);
    let mut l1s: Vec<Run> = table.list.iter().filter_map(l1).collect();
    // Those that several have are noted once, and where they lie over one another, once too: a hostile
    // table may name one for each of 65536.
    l1s.sort_unstable_by_key(|r| r.first);
    let mut end = 0;
    for run in &mut l1s {
        let last = run.first + run.count;
        run.first = run.first.max(end);
        run.count = last.saturating_sub(run.first);
        end = end.max(last);
    }
    areas.replace(Kind::SnapshotL1, &l1s);
}

/// In place of an error number: the image was found to be corrupt.
pub(super) const CORRUPT: i32 = -1;

/// What whoever writes to an image that was found to be corrupt is told.
pub(super) fn fenced(name: &Name, what: Option<&String>) -> Error {
    Error::corrupt(
        name,
        format!(
            "refuses writes since it was found to be so ({}); qblk check --repair=all may mend it",
            what.map_or("", String::as_str)
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_must_be_alone_in_its_place() {
        let areas = Areas::new(10);
        areas.add(Kind::Header, 0);
        areas.add(Kind::L2, 5);
        assert_eq!(areas.kind_at(5), Some(Kind::L2));
        assert_eq!(areas.kind_at(6), None);
        assert_eq!(areas.conflict(Kind::L2, 5), None);
        assert!(areas.conflict(Kind::L2, 0).is_some());
        assert!(areas.conflict(Kind::L2, 6).is_some());
        areas.add(Kind::RefcountBlock, 5);
        assert!(areas.conflict(Kind::L2, 5).is_some());
        areas.remove(Kind::RefcountBlock, 5);
        assert_eq!(areas.conflict(Kind::L2, 5), None);
        areas.add(Kind::L2, 5);
        assert!(areas.conflict(Kind::L2, 5).is_some(), "two L2 tables in one place");
        areas.remove(Kind::L2, 5);
        assert_eq!(areas.conflict(Kind::L2, 5), None);
        areas.remove(Kind::L2, 5);
        assert_eq!(areas.kind_at(5), None);
    }

    #[test]
    fn what_was_said_twice_is_taken_back_twice_whatever_came_first() {
        let areas = Areas::new(10);
        areas.add(Kind::L1, 5);
        areas.add(Kind::L2, 5);
        areas.add(Kind::L2, 5);
        areas.remove(Kind::L1, 5);
        assert!(areas.conflict(Kind::L2, 5).is_some(), "two L2 tables are left");
        areas.remove(Kind::L2, 5);
        assert_eq!((areas.kind_at(5), areas.conflict(Kind::L2, 5)), (Some(Kind::L2), None));
        areas.remove(Kind::L2, 5);
        assert_eq!(areas.kind_at(5), None);
        // More often than is counted: it stays for good.
        (0..70_000).for_each(|_| areas.add(Kind::L2, 7));
        (0..70_000).for_each(|_| areas.remove(Kind::L2, 7));
        assert!(areas.conflict(Kind::L2, 7).is_some());
        areas.replace(Kind::L2, &[]);
        assert_eq!(areas.kind_at(7), None);
    }

    #[test]
    fn a_kind_is_replaced_as_a_whole() {
        let areas = Areas::new(10);
        areas.add(Kind::L1, 3);
        areas.add(Kind::L2, 3);
        areas.add(Kind::L2, 3);
        areas.add(Kind::L2, 9);
        areas.replace(Kind::L2, &[Run { first: 20, count: 2 }]);
        let kinds = [3, 9, 20, 21, 22].map(|c| areas.kind_at(c));
        assert_eq!(kinds, [Some(Kind::L1), None, Some(Kind::L2), Some(Kind::L2), None]);
        assert_eq!(areas.conflict(Kind::L1, 3), None);
    }
}
