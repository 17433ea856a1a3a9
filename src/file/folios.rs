//! Small pieces of page cache for small writes that are synced one by one.
//!
//! Linux keeps a file that was read or written in large pieces in large folios (up to 2 MiB), and an
//! `fdatasync` after 4 KiB were written looks through all of the folio's blocks: half of the time of a
//! synced write, and more of sixteen at once. Where syncs follow one another closely, the region that
//! such writes fall into again and again is dropped from the cache once it is on disk; what is read or written there
//! afterwards, piece by piece, comes in small folios. It is a hint: no byte depends on it.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
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
/// Synced writes into a region that make it worth dropping: dropping one takes as long as a sync or two.
const OFTEN: u8 = 8;

#[derive(Default)]
struct Seen {
    last_sync: Option<Instant>,
    /// Writes into each region, up to [`OFTEN`].
    hits: Vec<u8>,
    /// To be dropped after the next sync.
    next: Vec<u64>,
}

/// Which regions of a file were given small folios.
#[derive(Default)]
pub struct Folios {
    /// Syncs follow one another closely.
    close: AtomicBool,
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
        let mut seen = self.seen.lock();
        if seen.hits.is_empty() {
            seen.hits = vec![0; REGIONS];
        }
        let hits = &mut seen.hits[region as usize % REGIONS];
        if *hits < OFTEN {
            *hits += 1;
            if *hits == OFTEN {
                seen.next.push(region);
            }
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
        std::mem::take(&mut seen.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_dropped_once_and_only_where_syncs_are_close() {
        let (f, start) = (Folios::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let none: [u64; 0] = [];
        let often = |region: u64, times: u8| {
            (0..times).for_each(|i| f.wrote((region << REGION_BITS) + u64::from(i) * 4096, 4096));
        };
        often(0, OFTEN);
        assert_eq!(f.to_drop(at(0)), none, "the first sync");
        often(0, OFTEN);
        assert_eq!(f.to_drop(at(100)), none, "a sync long after the last");
        assert_eq!(f.to_drop(at(101)), none, "close, but nothing was written since it is");
        often(5, OFTEN - 1);
        often(3, OFTEN + 3);
        (0..OFTEN).for_each(|_| f.wrote(9 << REGION_BITS, SMALL + 1));
        assert_eq!(f.to_drop(at(102)), [3]);
        often(3, OFTEN);
        often(5, 1);
        assert_eq!(f.to_drop(at(103)), [5], "what was dropped is not dropped again");
        assert_eq!(f.to_drop(at(200)), none);
        often(8, OFTEN);
        assert_eq!(f.to_drop(at(201)), none, "syncs had not been close when it was written");
    }
}
