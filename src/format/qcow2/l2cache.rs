//! The cache of L2 tables, in slices of at most 4 KiB, kept as they are on disk.
//!
//! A hit takes no lock: a slot's tag says which slice it holds and carries a count of its refills;
//! a reader loads the tag, the entries, and the tag again, and starts over if it changed. Slices are
//! named by their place in the guest's address space, not in the file, so that moving a table does
//! not touch them.
//!
//! Lock order: a set's `fill` lock comes after the image's `Meta` lock. It is held while a slice is
//! read from the file (which holds up misses of the same few sets only) and while entries change.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::slice;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, Ordering::*, fence};

use memmap2::{MmapMut, MmapOptions};
use parking_lot::{Mutex, MutexGuard};

use crate::block::{Error, Name, Result};

/// Slots in a set: their tags fill one cache line.
const WAYS: usize = 8;
/// Locks that the sets share.
const FILL_LOCKS: usize = 64;
/// Bits of a tag that count refills.
const GENERATION_BITS: u32 = 24;
/// Largest cache unless asked for otherwise, bytes.
pub const DEFAULT_MAX: u64 = 64 << 20;
/// Smallest, so that an image that grows has something to grow into (memory is taken as used).
const MIN: u64 = 256 << 10;

/// The slot's slice was changed and is not written yet.
const DIRTY: u8 = 1;
/// A copy of it is being written: the file has not got it yet.
const WRITING: u8 = 2;

/// Slices of L2 tables.
pub struct L2Cache {
    /// Entries in a slice, as a power of two.
    slice_bits: u32,
    /// Sets, less one: a power of two less one.
    set_mask: u64,
    memory: Memory,
    fill: [Mutex<()>; FILL_LOCKS],
    hand: AtomicU64,
}

/// A slot found to hold a slice.
#[derive(Clone, Copy)]
pub struct Hit {
    slot: usize,
    tag: u64,
}

/// A set under its lock, with the slice asked for in it.
pub struct Held<'a> {
    cache: &'a L2Cache,
    slot: usize,
    _fill: MutexGuard<'a, ()>,
}

/// Every slot that could take the slice holds changes: they must be written first.
pub struct AllDirty;

/// Zeroes at first. Much of it is mapped: pages that are never used cost nothing, and malloc would
/// touch them when it hands them out a second time. Little comes from malloc, which is quicker.
enum Words {
    Heap(Box<[u64]>),
    Map(MmapMut),
}

/// Bytes that still come from malloc.
const LITTLE: usize = 16 << 10;

impl Words {
    fn new(count: usize) -> std::io::Result<Self> {
        let bytes = count.checked_mul(8).ok_or(std::io::ErrorKind::OutOfMemory)?;
        if bytes <= LITTLE {
            return Ok(Self::Heap(vec![0; count].into_boxed_slice()));
        }
        MmapOptions::new().len(bytes).no_reserve_swap().map_anon().map(Self::Map)
    }

    fn base(&mut self) -> *mut u8 {
        match self {
            Self::Heap(words) => words.as_mut_ptr().cast(),
            Self::Map(map) => map.as_mut_ptr(),
        }
    }
}

/// The memory of a cache: for each slot a tag, where its slice's entries are, and two bytes. Room for
/// entries is allocated when a slot is first filled, and stays until the cache goes: an image that is
/// opened for a single read costs a single slice.
struct Memory {
    /// Tags of all slots, then their places, then their bytes `used`, then `state`.
    tags: *mut u8,
    slots: usize,
    slice_bits: u32,
    /// What the pointer points into.
    _words: Words,
    /// Rooms that were allocated.
    rooms: Mutex<Vec<*mut u64>>,
}

// SAFETY: all access is by atomics, but for filling a slot, which its fill lock guards.
unsafe impl Send for Memory {}
// SAFETY: as for Send.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        for room in self.rooms.get_mut().drain(..) {
            // SAFETY: allocated by `room` with this layout, and nobody has the cache any more.
            unsafe { dealloc(room.cast(), Self::layout(self.slice_bits)) };
        }
    }
}

impl Memory {
    fn new(slots: usize, slice_bits: u32) -> std::io::Result<Self> {
        let mut words = Words::new(2 * slots + slots.div_ceil(4))?;
        let tags = words.base();
        Ok(Self { tags, slots, slice_bits, _words: words, rooms: Mutex::new(Vec::new()) })
    }

    fn layout(slice_bits: u32) -> Layout {
        // SAFETY: 8 is a power of two, and a slice has at most 4 KiB.
        unsafe { Layout::from_size_align_unchecked(8 << slice_bits, 8) }
    }

    /// Which slice a slot holds: (slice + 1) above the count of refills; 0 above it = none.
    #[inline]
    fn tags(&self) -> &[AtomicU64] {
        // SAFETY: the first so many words; zeroes and whatever is stored are valid atomics.
        unsafe { slice::from_raw_parts(self.tags.cast(), self.slots) }
    }

    /// Where a slot's entries are; null if it was never filled.
    #[inline]
    fn places(&self) -> &[AtomicPtr<u64>] {
        // SAFETY: the next so many words; null is a valid pointer.
        unsafe { slice::from_raw_parts(self.tags.add(self.slots * 8).cast(), self.slots) }
    }

    /// A slot's entries, big-endian as on disk; none if it was never filled.
    #[inline]
    fn entries(&self, slot: usize) -> &[AtomicU64] {
        let place = self.places()[slot].load(Acquire);
        if place.is_null() {
            return &[];
        }
        // SAFETY: a room for so many, which stays as long as the cache.
        unsafe { slice::from_raw_parts(place.cast(), 1 << self.slice_bits) }
    }

    /// The room of a slot that is to be filled. Under its fill lock.
    fn room(&self, slot: usize) -> Option<*mut u64> {
        let place = &self.places()[slot];
        let mut room = place.load(Relaxed);
        if room.is_null() {
            // SAFETY: the layout's size is not 0.
            room = unsafe { alloc_zeroed(Self::layout(self.slice_bits)) }.cast();
            if room.is_null() {
                return None;
            }
            self.rooms.lock().push(room);
            place.store(room, Release);
        }
        Some(room)
    }

    /// Slots looked at since the hand last passed.
    #[inline]
    fn used(&self) -> &[AtomicU8] {
        // SAFETY: behind tags and places there is a word for every four slots: two bytes each.
        unsafe { slice::from_raw_parts(self.tags.add(self.slots * 16).cast(), self.slots) }
    }

    /// Bits of [`DIRTY`] and [`WRITING`].
    #[inline]
    fn state(&self) -> &[AtomicU8] {
        // SAFETY: as for `used`, the second half.
        unsafe { slice::from_raw_parts(self.tags.add(self.slots * 17).cast(), self.slots) }
    }
}

impl L2Cache {
    /// A cache for `slices` slices of 2^`slice_bits` entries, of at most `limit` bytes.
    pub fn new(name: &Name, slice_bits: u32, slices: u64, limit: Option<u64>) -> Result<Self> {
        let slice_bytes = 8u64 << slice_bits;
        let whole = slices.saturating_mul(slice_bytes);
        let set_bytes = slice_bytes * WAYS as u64;
        let sets = match limit {
            None if whole <= DEFAULT_MAX => whole.max(MIN).div_ceil(set_bytes).next_power_of_two(),
            limit => {
                let sets = limit.unwrap_or(DEFAULT_MAX).clamp(set_bytes, 16 << 30) / set_bytes;
                let enough = whole.max(MIN).div_ceil(set_bytes).next_power_of_two();
                (1 << sets.ilog2()).min(enough)
            }
        };
        // Where memory is limited the cache is smaller, which costs speed only.
        let mut sets = sets;
        let memory = loop {
            match Memory::new(sets as usize * WAYS, slice_bits) {
                Ok(memory) => break memory,
                Err(_) if sets > 1 => sets /= 2,
                Err(e) => {
                    let errno = e.raw_os_error().unwrap_or(libc::ENOMEM);
                    return Err(Error::Os { op: "mapping memory", file: name.clone(), errno });
                }
            }
        };
        Ok(Self {
            slice_bits,
            set_mask: sets - 1,
            memory,
            fill: [const { Mutex::new(()) }; FILL_LOCKS],
            hand: AtomicU64::new(0),
        })
    }

    /// Forget all slices, none of which is dirty: the tables that they are of are replaced. Nobody reads
    /// them now.
    pub fn forget_all(&self) {
        for (i, tag) in self.memory.tags().iter().enumerate() {
            let _fill = self.fill[(i / WAYS) % FILL_LOCKS].lock();
            let old = tag.load(Relaxed);
            if old >> GENERATION_BITS != 0 {
                tag.store((old + 1) & ((1 << GENERATION_BITS) - 1), Release);
            }
        }
    }

    fn first_slot(&self, slice: u64) -> usize {
        (slice & self.set_mask) as usize * WAYS
    }

    /// The slot that holds `slice`, if one does. No lock.
    #[inline]
    pub fn find(&self, slice: u64) -> Option<Hit> {
        let first = self.first_slot(slice);
        let tags = &self.memory.tags()[first..first + WAYS];
        for (way, tag) in tags.iter().enumerate() {
            let tag = tag.load(Acquire);
            if tag >> GENERATION_BITS == slice + 1 {
                let slot = first + way;
                // Looking first keeps the line shared between cores.
                if self.memory.used()[slot].load(Relaxed) == 0 {
                    self.memory.used()[slot].store(1, Relaxed);
                }
                return Some(Hit { slot, tag });
            }
        }
        None
    }

    /// Entry `index` of a found slice. Means nothing unless [`L2Cache::still`] holds afterwards.
    #[inline]
    pub fn entry(&self, hit: Hit, index: usize) -> u64 {
        let i = index & ((1 << self.slice_bits) - 1);
        self.memory.entries(hit.slot).get(i).map_or(0, |e| u64::from_be(e.load(Acquire)))
    }

    /// Whether the slot still holds what it held when it was found.
    #[inline]
    pub fn still(&self, hit: Hit) -> bool {
        fence(Acquire);
        self.memory.tags()[hit.slot].load(Relaxed) == hit.tag
    }

    /// Hold the set of `slice` with the slice in it, reading it by `read` if it is not there.
    pub fn hold(
        &self,
        slice: u64,
        read: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<std::result::Result<Held<'_>, AllDirty>> {
        let first = self.first_slot(slice);
        let fill = self.fill[(first / WAYS) % FILL_LOCKS].lock();
        if let Some(hit) = self.find(slice) {
            return Ok(Ok(Held { cache: self, slot: hit.slot, _fill: fill }));
        }
        let Some(slot) = self.victim(first) else { return Ok(Err(AllDirty)) };
        let Some(room) = self.memory.room(slot) else {
            return Err(Error::Internal("no memory for a slice of an L2 table".into()));
        };
        let tag = &self.memory.tags()[slot];
        let generation = (tag.load(Relaxed) + 1) & ((1 << GENERATION_BITS) - 1);
        // Readers that found the old slice must see the tag gone before they can see new entries.
        tag.store(generation, Relaxed);
        fence(Release);
        // SAFETY: the fill lock makes this the only writer; readers use atomic loads and drop what
        // they saw when they find the tag changed.
        read(unsafe { slice::from_raw_parts_mut(room.cast::<u8>(), 8 << self.slice_bits) })?;
        self.memory.used()[slot].store(1, Relaxed);
        tag.store((slice + 1) << GENERATION_BITS | generation, Release);
        Ok(Ok(Held { cache: self, slot, _fill: fill }))
    }

    /// A slot of the set at `first` that can be given up: an empty one, else by the clock.
    fn victim(&self, first: usize) -> Option<usize> {
        let clean = |slot: usize| self.memory.state()[slot].load(Acquire) == 0;
        let empty = |slot: usize| self.memory.tags()[slot].load(Relaxed) >> GENERATION_BITS == 0;
        if let Some(slot) = (first..first + WAYS).find(|&s| empty(s) && clean(s)) {
            return Some(slot);
        }
        let hand = self.hand.fetch_add(1, Relaxed) as usize;
        for round in 0..2 * WAYS {
            let slot = first + (hand + round) % WAYS;
            if clean(slot) && self.memory.used()[slot].swap(0, Relaxed) == 0 {
                return Some(slot);
            }
        }
        (first..first + WAYS).find(|&s| clean(s))
    }

    /// Copy the dirty slice in `slot` out to be written: which slice it is, and its bytes. The slot
    /// is no longer dirty, and stays until [`L2Cache::written`]. Under the image's `Meta` lock.
    pub fn take_dirty(&self, slot: usize) -> Result<(u64, Box<[u8]>)> {
        let Some(tag) = self.memory.tags().get(slot).map(|t| t.load(Acquire) >> GENERATION_BITS)
        else {
            return Err(Error::Internal("a slot that is not there".into()));
        };
        let mut bytes = Vec::with_capacity(8 << self.slice_bits);
        for word in self.memory.entries(slot) {
            bytes.extend_from_slice(&word.load(Relaxed).to_ne_bytes());
        }
        self.memory.state()[slot].store(WRITING, Release);
        Ok((tag.wrapping_sub(1), bytes.into_boxed_slice()))
    }

    /// What was taken from `slot` is in the file.
    pub fn written(&self, slot: usize) {
        self.memory.state()[slot].fetch_and(!WRITING, Release);
    }
}

impl Held<'_> {
    /// Entry `index` of the slice.
    pub fn get(&self, index: usize) -> u64 {
        u64::from_be(self.word(index).load(Relaxed))
    }

    /// Change entry `index`.
    pub fn set(&self, index: usize, value: u64) {
        self.word(index).store(value.to_be(), Release);
    }

    /// Change entries `index` and `index + 1` as one: who has found the slice and may have seen only one
    /// of them looks again.
    pub fn set_pair(&self, index: usize, values: [u64; 2]) {
        let tag = &self.cache.memory.tags()[self.slot];
        let old = tag.load(Relaxed);
        let generation = (old + 1) & ((1 << GENERATION_BITS) - 1);
        // As when a slot is filled: the slice is not to be found meanwhile, and who misses it waits for
        // the fill lock, which is held.
        tag.store(generation, Relaxed);
        fence(Release);
        self.set(index, values[0]);
        self.set(index + 1, values[1]);
        tag.store(old >> GENERATION_BITS << GENERATION_BITS | generation, Release);
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.cache.memory.entries(self.slot)[index & ((1 << self.cache.slice_bits) - 1)]
    }

    /// Mark the slice as changed: `Some(slot)` if it was not yet.
    pub fn mark_dirty(&self) -> Option<usize> {
        let before = self.cache.memory.state()[self.slot].fetch_or(DIRTY, AcqRel);
        (before & DIRTY == 0).then_some(self.slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(value: u64) -> impl FnOnce(&mut [u8]) -> Result<()> {
        move |bytes| {
            bytes.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&value.to_be_bytes()));
            Ok(())
        }
    }

    #[test]
    fn a_slice_given_up_is_noticed_by_who_found_it() {
        let cache = L2Cache::new(&Name::from("test"), 9, 1 << 20, Some(32 << 10)).unwrap();
        cache.hold(0, fill(7)).unwrap().ok().unwrap();
        let hit = cache.find(0).unwrap();
        assert_eq!(cache.entry(hit, 3), 7);
        assert!(cache.still(hit));
        for slice in 1..100 {
            cache.hold(slice, fill(slice)).unwrap().ok().unwrap();
        }
        assert!(!cache.still(hit));
        assert!(cache.find(0).is_none());
    }

    #[test]
    fn who_has_found_a_slice_notices_that_a_pair_has_changed() {
        let cache = L2Cache::new(&Name::from("test"), 9, 1 << 20, Some(32 << 10)).unwrap();
        let held = cache.hold(5, fill(7)).unwrap().ok().unwrap();
        let hit = cache.find(5).unwrap();
        held.set_pair(4, [1, 2]);
        assert!(!cache.still(hit));
        let hit = cache.find(5).unwrap();
        assert_eq!([3, 4, 5, 6].map(|i| cache.entry(hit, i)), [7, 1, 2, 7]);
        assert!(cache.still(hit));
    }

    #[test]
    fn pairs_are_seen_whole_by_all_threads() {
        let cache = L2Cache::new(&Name::from("test"), 9, 1 << 20, Some(32 << 10)).unwrap();
        drop(cache.hold(5, fill(0)).unwrap());
        std::thread::scope(|s| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    s.spawn(|| {
                        let mut seen = 0;
                        while seen < 20_000 {
                            let Some(hit) = cache.find(5) else { continue };
                            let pair = [cache.entry(hit, 8), cache.entry(hit, 9)];
                            if cache.still(hit) {
                                assert_eq!(pair[0], pair[1]);
                                assert!(pair[0] >= seen);
                                seen = pair[0];
                            }
                        }
                    })
                })
                .collect();
            let mut n = 0;
            while readers.iter().any(|r| !r.is_finished()) {
                n += 1;
                cache.hold(5, fill(0)).unwrap().ok().unwrap().set_pair(8, [n, n]);
            }
        });
    }

    #[test]
    fn dirty_slices_are_never_given_up() {
        let cache = L2Cache::new(&Name::from("test"), 9, 1 << 20, Some(32 << 10)).unwrap();
        for slice in 0..WAYS as u64 {
            let held = cache.hold(slice, fill(slice)).unwrap().ok().unwrap();
            held.set(0, 99);
            assert!(held.mark_dirty().is_some());
            assert!(held.mark_dirty().is_none());
        }
        assert!(cache.hold(1000, fill(0)).unwrap().is_err());
        let hit = cache.find(3).unwrap();
        assert_eq!(cache.entry(hit, 0), 99);
        let (slice, bytes) = cache.take_dirty(hit.slot).unwrap();
        assert_eq!((slice, &bytes[..8]), (3, &99u64.to_be_bytes()[..]));
        assert!(cache.hold(1000, fill(0)).unwrap().is_err(), "being written still holds it");
        cache.written(hit.slot);
        assert!(cache.hold(1000, fill(0)).unwrap().is_ok());
    }
}
