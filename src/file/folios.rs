//! Small pieces of page cache for small writes that are synced one by one.
//!
//! Linux keeps a file that was read or written in large pieces in large folios (up to 2 MiB), and an
//! `fdatasync` after 4 KiB were written looks through all of the folio's blocks: half of the time of a
//! synced write, and more of sixteen at once. Where syncs follow one another closely, the region that
//! such a write fell into is dropped from the cache once it is on disk; what is read or written there
//! afterwards, piece by piece, comes in small folios. It is a hint: no byte depends on it.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::sys;

/// The largest folio there is, bytes as a power of two.
const REGION_BITS: u32 = 21;
/// Regions that are told apart: 128 GiB; those beyond share with others, which costs a hint.
const REGIONS: usize = 1 << 16;
/// A sync that begins so soon after the last one is one of many.
const CLOSE: Duration = Duration::from_millis(2);
/// Larger writes gain nothing, bytes.
const SMALL: u64 = 64 << 10;
/// Regions between two syncs; where there are more, syncs are not what takes the time.
const MOST: usize = 64;

#[derive(Default)]
struct Seen {
    last_sync: Option<Instant>,
    /// Regions that were dropped, a bit each.
    dropped: Vec<u64>,
    /// To be dropped after the next sync.
    next: Vec<u64>,
}

/// Which regions of a file were given small folios.
#[derive(Default)]
pub struct Folios {
    /// Syncs follow one another closely.
    close: AtomicBool,
    /// The region of the last write that was noted, plus 1: most writes need look no further.
    latest: AtomicU64,
    seen: Mutex<Seen>,
}

impl Folios {
    /// Note where something was written.
    #[inline]
    pub fn wrote(&self, offset: u64, count: u64) {
        if self.close.load(Relaxed) && count <= SMALL {
            self.note(offset >> REGION_BITS);
        }
    }

    fn note(&self, region: u64) {
        if self.latest.swap(region + 1, Relaxed) == region + 1 {
            return;
        }
        let mut seen = self.seen.lock();
        let (word, bit) = place(region);
        let dropped = seen.dropped.get(word).is_some_and(|w| w & bit != 0);
        if !dropped && seen.next.len() < MOST {
            seen.next.push(region);
        }
    }

    /// A sync of `file` is over.
    pub fn synced(&self, file: &File) {
        for region in self.to_drop(Instant::now()) {
            sys::drop_cache(file, region << REGION_BITS, 1 << REGION_BITS);
        }
    }

    fn to_drop(&self, now: Instant) -> Vec<u64> {
        let mut seen = self.seen.lock();
        let close = seen.last_sync.is_some_and(|last| now.duration_since(last) < CLOSE);
        seen.last_sync = Some(now);
        self.close.store(close, Relaxed);
        if seen.next.is_empty() {
            return Vec::new();
        }
        let mut next = std::mem::take(&mut seen.next);
        if seen.dropped.is_empty() {
            seen.dropped = vec![0; REGIONS / 64];
        }
        next.sort_unstable();
        next.dedup();
        for region in &next {
            let (word, bit) = place(*region);
            seen.dropped[word] |= bit;
        }
        next
    }
}

fn place(region: u64) -> (usize, u64) {
    ((region as usize % REGIONS) / 64, 1 << (region % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_dropped_once_and_only_where_syncs_are_close() {
        let (f, start) = (Folios::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let none: [u64; 0] = [];
        f.wrote(0, 4096);
        assert_eq!(f.to_drop(at(0)), none, "the first sync");
        f.wrote(0, 4096);
        assert_eq!(f.to_drop(at(100)), none, "a sync long after the last");
        assert_eq!(f.to_drop(at(101)), none, "close, but nothing was written since it is");
        f.wrote(5 << REGION_BITS, 4096);
        f.wrote((5 << REGION_BITS) + 8192, 4096);
        f.wrote(3 << REGION_BITS, 512);
        f.wrote(9 << REGION_BITS, SMALL + 1);
        assert_eq!(f.to_drop(at(102)), [3, 5]);
        f.wrote(5 << REGION_BITS, 4096);
        f.wrote(7 << REGION_BITS, 4096);
        assert_eq!(f.to_drop(at(103)), [7], "what was dropped is not dropped again");
        assert_eq!(f.to_drop(at(200)), none);
        f.wrote(8 << REGION_BITS, 4096);
        assert_eq!(f.to_drop(at(201)), none, "syncs had not been close when it was written");
    }
}
