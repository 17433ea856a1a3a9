//! Memory that goes back to the system when it is given up, unlike malloc's.

use std::io;
use std::ops::{Deref, DerefMut};

use memmap2::{MmapMut, MmapOptions};

/// Zeroed memory, mapped; pages that are never touched cost nothing.
pub struct Pages(MmapMut);

impl Pages {
    /// `len` bytes, at least one.
    pub fn new(len: usize) -> io::Result<Self> {
        MmapOptions::new().len(len.max(1)).no_reserve_swap().map_anon().map(Self)
    }

    /// Give the memory back and keep the addresses; it reads as zeroes afterwards.
    pub fn release(&mut self) {
        // SAFETY: the mapping is private, anonymous and ours alone; no reference into it is alive.
        unsafe { libc::madvise(self.0.as_mut_ptr().cast(), self.0.len(), libc::MADV_DONTNEED) };
    }
}

impl Deref for Pages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
