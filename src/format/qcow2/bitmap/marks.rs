//! What was written since a bitmap was last saved: one bit for each granule of the disk, set without
//! a lock and before the data moves.
//!
//! Memory is taken where bits are set, 4 KiB for 32,768 granules, and none where all of them are; what
//! leads there takes as little until then:
//! what the file has of a bitmap is not in memory at all (`view`), so that opening one costs nothing.

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering::*};

/// Bits in a chunk, as a power of two; 4 KiB.
pub const CHUNK_BITS: u32 = 15;
/// Words in a chunk.
pub const WORDS: usize = 1 << (CHUNK_BITS - 6);

/// A chunk's bits, lowest first.
pub type Words = [u64; WORDS];
type Chunk = [AtomicU64; WORDS];

/// What leads to some chunks. NULL: no bit is set; `full()`: all are.
type Leaf = [AtomicPtr<Chunk>; LEAF];
/// Chunks that a leaf leads to.
const LEAF: usize = 512;

/// What stands for a chunk whose bits are all set. Never looked into.
static FULL: Chunk = [const { AtomicU64::new(0) }; WORDS];

fn full() -> *mut Chunk {
    (&raw const FULL).cast_mut()
}

/// How many granules of 2^`granularity_bits` bytes a disk of `size` bytes has.
pub fn granules(size: u64, granularity_bits: u32) -> u64 {
    size.div_ceil(1 << granularity_bits)
}

/// A chunk of a bitmap, as it is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// No bit is set.
    Zeroes,
    /// All are.
    Ones,
    /// Look.
    Mixed,
}

/// Bits set so far.
pub struct Marks {
    granularity_bits: u32,
    /// How many bits there are.
    bits: u64,
    /// How many chunks there are.
    chunks: u64,
    /// NULL: no bit is set.
    leaves: Box<[AtomicPtr<Leaf>]>,
}

impl Drop for Marks {
    fn drop(&mut self) {
        for leaf in &mut self.leaves {
            let leaf = *leaf.get_mut();
            if leaf.is_null() {
                continue;
            }
            // SAFETY: made by Box::into_raw in `slot`, and nobody else has the marks any more.
            for mut chunk in *unsafe { Box::from_raw(leaf) } {
                let chunk = *chunk.get_mut();
                if !chunk.is_null() && chunk != full() {
                    // SAFETY: as above, in `own`.
                    drop(unsafe { Box::from_raw(chunk) });
                }
            }
        }
    }
}

impl Marks {
    /// None is set, for a disk of `size` bytes.
    pub fn new(size: u64, granularity_bits: u32) -> Self {
        let bits = granules(size, granularity_bits);
        let chunks = bits.div_ceil(1 << CHUNK_BITS);
        let leaves = chunks.div_ceil(LEAF as u64);
        let leaves = (0..leaves).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
        Self { granularity_bits, bits, chunks, leaves }
    }

    /// Where chunk `index` is noted, if something in its leaf is set.
    fn find(&self, index: u64) -> Option<&AtomicPtr<Chunk>> {
        let leaf = self.leaves.get(index as usize / LEAF)?.load(Acquire);
        // SAFETY: NULL, or a leaf that lives as long as the marks do.
        unsafe { leaf.as_ref() }?.get(index as usize % LEAF)
    }

    /// Where chunk `index` is to be noted.
    fn slot(&self, index: u64) -> Option<&AtomicPtr<Chunk>> {
        let leaf = self.leaves.get(index as usize / LEAF)?;
        if leaf.load(Acquire).is_null() {
            let new = Box::new([const { AtomicPtr::new(ptr::null_mut()) }; LEAF]);
            Self::install_or_drop(leaf, new);
        }
        self.find(index)
    }

    /// The chunk noted there, NULL if there is none.
    fn chunk(&self, index: u64) -> *mut Chunk {
        self.find(index).map_or(ptr::null_mut(), |slot| slot.load(Acquire))
    }

    pub fn granularity_bits(&self) -> u32 {
        self.granularity_bits
    }

    /// Set the bits of all granules that a range of the disk touches. What lies past the end has none.
    pub fn set(&self, offset: u64, count: u64) {
        if count == 0 {
            return;
        }
        let first = offset >> self.granularity_bits;
        let last = (offset.saturating_add(count) - 1) >> self.granularity_bits;
        self.set_bits(first, last.saturating_add(1).min(self.bits));
    }

    fn set_bits(&self, first: u64, end: u64) {
        let mut at = first;
        while at < end {
            let index = at >> CHUNK_BITS;
            let start = index << CHUNK_BITS;
            let stop = (start + (1 << CHUNK_BITS)).min(end);
            // A last chunk that the disk's end cuts is full when all that it has are set.
            let all = at == start && stop == (start + (1 << CHUNK_BITS)).min(self.bits);
            self.set_in_chunk(index, (at - start) as usize, (stop - start) as usize, all);
            at = stop;
        }
    }

    fn set_in_chunk(&self, index: u64, from: usize, to: usize, all: bool) {
        let Some(slot) = self.slot(index) else { return };
        let mut chunk = slot.load(Acquire);
        if chunk.is_null() {
            chunk = if all { Self::install(slot, full()) } else { Self::own(slot) };
        }
        if chunk == full() {
            return;
        }
        // SAFETY: not NULL and not `full`, so a chunk that lives as long as the marks do.
        let words = unsafe { &*chunk };
        let (mut at, to) = (from, if all { WORDS * 64 } else { to });
        while at < to {
            let n = (64 - at % 64).min(to - at);
            let mask = (u64::MAX >> (64 - n)) << (at % 64);
            // Granules that are written again and again cost a look and no more.
            if let Some(word) = words.get(at / 64)
                && word.load(Relaxed) & mask != mask
            {
                word.fetch_or(mask, Relaxed);
            }
            at += n;
        }
    }

    /// The chunk of a slot, made if there is none.
    fn own(slot: &AtomicPtr<Chunk>) -> *mut Chunk {
        Self::install_or_drop(slot, Box::new([const { AtomicU64::new(0) }; WORDS]))
    }

    /// Put `new` where nothing is yet, unless somebody else does; what is there then.
    fn install_or_drop<T>(slot: &AtomicPtr<T>, new: Box<T>) -> *mut T {
        let new = Box::into_raw(new);
        let there = Self::install(slot, new);
        if there != new {
            // SAFETY: made above, and nobody has seen it.
            drop(unsafe { Box::from_raw(new) });
        }
        there
    }

    /// Put `new` where nothing is yet; what is there then.
    fn install<T>(slot: &AtomicPtr<T>, new: *mut T) -> *mut T {
        match slot.compare_exchange(ptr::null_mut(), new, AcqRel, Acquire) {
            Ok(_) => new,
            Err(there) => there,
        }
    }

    /// Whether a bit may be set in chunks `from..to`.
    pub fn any(&self, from: u64, to: u64) -> bool {
        self.next_before(from, to).is_some()
    }

    /// The first chunk from `index` on in which a bit may be set.
    pub fn next(&self, index: u64) -> Option<u64> {
        self.next_before(index, u64::MAX)
    }

    fn next_before(&self, index: u64, end: u64) -> Option<u64> {
        let (mut at, end) = (index, end.min(self.chunks));
        while at < end {
            let leaf = self.leaves.get(at as usize / LEAF)?;
            if leaf.load(Acquire).is_null() {
                at = (at / LEAF as u64 + 1) * LEAF as u64;
            } else if self.chunk(at).is_null() {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }

    /// Add chunk `index` to `words`; what is known of it alone.
    pub fn add_to(&self, index: u64, words: &mut Words) -> Found {
        let chunk = self.chunk(index);
        if chunk.is_null() {
            return Found::Zeroes;
        }
        if chunk == full() {
            words.fill(u64::MAX);
            return Found::Ones;
        }
        // SAFETY: as in `set_in_chunk`.
        for (to, from) in words.iter_mut().zip(unsafe { &*chunk }) {
            *to |= from.load(Relaxed);
        }
        Found::Mixed
    }

    /// Set all bits that `other`, of the same granularity, has set.
    pub fn absorb(&self, other: &Self) {
        let mut at = 0;
        while let Some(index) = other.next(at) {
            at = index + 1;
            let mut words = [0; WORDS];
            let start = index << CHUNK_BITS;
            let found = other.add_to(index, &mut words);
            // No further than the other has bits, should it be the shorter one.
            let bits = other.bits.saturating_sub(start);
            if found == Found::Mixed {
                cut(&mut words, bits);
            }
            let end = start + bits.min(1 << CHUNK_BITS);
            match found {
                Found::Ones => self.set_bits(start, end.min(self.bits)),
                found => self.add(index, found, &words),
            }
        }
    }

    /// Set the bits of chunk `index` that are found in a bitmap of the same granularity and length: of a
    /// mixed one those of `words`.
    pub fn add(&self, index: u64, found: Found, words: &Words) {
        let start = index << CHUNK_BITS;
        match found {
            Found::Zeroes => return,
            Found::Ones => return self.set_bits(start, (start + (1 << CHUNK_BITS)).min(self.bits)),
            Found::Mixed => {}
        }
        let Some(slot) = self.slot(index) else { return };
        let mut chunk = slot.load(Acquire);
        if chunk.is_null() {
            chunk = Self::own(slot);
        }
        if chunk == full() {
            return;
        }
        // SAFETY: as in `set_in_chunk`.
        for (to, from) in unsafe { &*chunk }.iter().zip(words).filter(|(_, from)| **from != 0) {
            to.fetch_or(*from, Relaxed);
        }
    }
}

/// Clear all bits but the first `bits`.
pub fn cut(words: &mut Words, bits: u64) {
    for (i, word) in words.iter_mut().enumerate().skip((bits / 64) as usize) {
        let left = bits.saturating_sub(i as u64 * 64);
        *word &= if left == 0 { 0 } else { u64::MAX >> (64 - left.min(64)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(marks: &Marks) -> Vec<u64> {
        (0..marks.bits)
            .filter(|bit| {
                let mut words = [0; WORDS];
                marks.add_to(bit >> CHUNK_BITS, &mut words);
                words[(bit % (1 << CHUNK_BITS)) as usize / 64] >> (bit % 64) & 1 != 0
            })
            .collect()
    }

    #[test]
    fn every_granule_that_a_range_touches_is_marked_and_no_other() {
        let marks = Marks::new(100_000, 9);
        marks.set(511, 2);
        marks.set(5 * 512, 512);
        marks.set(99_999, 1 << 40);
        marks.set(1 << 50, 1);
        marks.set(0, 0);
        assert_eq!(dirty(&marks), [0, 1, 5, 195]);
        let across = Marks::new(1 << 20, 3);
        across.set((1 << 18) - 8, 16);
        assert_eq!(dirty(&across), [(1 << 15) - 1, 1 << 15]);
    }

    #[test]
    fn whole_chunks_take_no_memory() {
        let marks = Marks::new((4 << 15) + 100, 0);
        marks.set(0, u64::MAX);
        assert!((0..5).all(|i| marks.chunk(i) == full()));
        assert_eq!(dirty(&marks).len(), (4 << 15) + 100);
        let one = Marks::new(4 << 15, 0);
        one.set(7, 1);
        one.set(0, 1 << 15);
        assert_eq!(dirty(&one).len(), 1 << 15);
        assert!(one.any(0, 1) && !one.any(1, 4) && !one.any(9, 90));
        assert_eq!((one.next(0), one.next(1)), (Some(0), None));
    }

    #[test]
    fn marks_absorb_others_of_another_length() {
        let (long, short) = (Marks::new(100_000, 0), Marks::new(40_000, 0));
        long.set(5, 3);
        long.set(39_999, 70);
        short.set(32_768, 7232);
        short.absorb(&long);
        let mut want: Vec<u64> = vec![5, 6, 7];
        want.extend(32_768..40_000);
        assert_eq!(dirty(&short), want);
        let grown = Marks::new(100_000, 0);
        grown.absorb(&short);
        assert_eq!(dirty(&grown), want);
    }

    #[test]
    fn threads_lose_no_mark_of_one_another() {
        let marks = Marks::new(1 << 20, 0);
        std::thread::scope(|s| {
            for t in 0..4 {
                let marks = &marks;
                s.spawn(move || (0..1 << 18).for_each(|i| marks.set(i * 4 + t, 1)));
            }
        });
        assert_eq!(dirty(&marks).len(), 1 << 20);
    }
}
