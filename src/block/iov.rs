//! Scattered memory that belongs to a caller: where a read puts bytes, where a write takes them.

use std::marker::PhantomData;
use std::ptr;

use libc::{c_void, iovec};

/// Marks memory that a read fills.
#[derive(Clone, Copy)]
pub struct ToMem;
/// Marks memory that a write takes from.
#[derive(Clone, Copy)]
pub struct FromMem;
/// Where a read puts bytes.
pub type Dst<'a> = Iov<'a, ToMem>;
/// Where a write takes bytes.
pub type Src<'a> = Iov<'a, FromMem>;

/// A window of `len` bytes over pieces of memory. Copies are windows over the same memory.
pub struct Iov<'a, D> {
    vecs: &'a [iovec],
    /// Bytes of the first piece that lie before the window.
    skip: usize,
    len: usize,
    dir: PhantomData<(&'a mut [u8], D)>,
}

// Derived, these would ask the same of D, which is only a mark.
impl<D> Copy for Iov<'_, D> {}
impl<D> Clone for Iov<'_, D> {
    #[inline]
    fn clone(&self) -> Self {
        *self
    }
}

// SAFETY: a window is a borrow of memory that is the caller's for as long as 'a; two threads that
// use it do to the bytes what the caller asked for.
unsafe impl<D> Send for Iov<'_, D> {}
// SAFETY: as for Send; the window itself is never changed.
unsafe impl<D> Sync for Iov<'_, D> {}

/// One piece of memory, with room for the `iovec` that a window needs.
pub struct OneIov<'a, D>([iovec; 1], PhantomData<(&'a mut [u8], D)>);

impl<'a> OneIov<'a, ToMem> {
    /// Memory to read into.
    pub fn dst(buf: &'a mut [u8]) -> Self {
        Self([iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() }], PhantomData)
    }
}

impl<'a> OneIov<'a, FromMem> {
    /// Memory to write from.
    pub fn src(buf: &'a [u8]) -> Self {
        Self([iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() }], PhantomData)
    }
}

impl<'a, D> OneIov<'a, D> {
    /// Memory by pointer.
    ///
    /// # Safety
    /// `base` must be good for `len` bytes (writable for [`ToMem`]) during `'a`.
    pub unsafe fn from_raw(base: *mut c_void, len: usize) -> Self {
        Self([iovec { iov_base: base, iov_len: len }], PhantomData)
    }

    /// The window over all of it.
    #[inline]
    pub fn iov(&self) -> Iov<'_, D> {
        Iov { vecs: &self.0, skip: 0, len: self.0[0].iov_len, dir: PhantomData }
    }
}

impl<'a, D> Iov<'a, D> {
    /// A window over the first `len` bytes of `vecs`.
    ///
    /// # Safety
    /// Every piece must be good for its length (writable for [`ToMem`]) during `'a`, and they must
    /// have at least `len` bytes together.
    pub unsafe fn from_raw(vecs: &'a [iovec], len: usize) -> Self {
        Self { vecs, skip: 0, len, dir: PhantomData }
    }

    /// Bytes in the window.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `n` bytes (at most all) and the rest.
    #[inline]
    pub fn split_at(self, n: usize) -> (Self, Self) {
        let n = n.min(self.len);
        let head = Self { len: n, ..self };
        if n == self.len {
            let none = Self { vecs: &[], skip: 0, len: 0, dir: PhantomData };
            return (head, none);
        }
        let (mut vecs, mut skip) = (self.vecs, self.skip + n);
        while let [first, rest @ ..] = vecs
            && skip >= first.iov_len
        {
            skip -= first.iov_len;
            vecs = rest;
        }
        (head, Self { vecs, skip, len: self.len - n, dir: PhantomData })
    }

    /// `len` bytes from byte `from` on.
    #[inline]
    pub fn sub(self, from: usize, len: usize) -> Self {
        if from == 0 { self.split_at(len).0 } else { self.split_at(from).1.split_at(len).0 }
    }

    /// The window as one piece of memory, if it is one.
    #[inline]
    pub fn as_single(&self) -> Option<(*mut u8, usize)> {
        let first = self.vecs.first()?;
        if first.iov_len - self.skip < self.len {
            return None;
        }
        // SAFETY: skip is at most the piece's length, by construction.
        Some((unsafe { first.iov_base.cast::<u8>().add(self.skip) }, self.len))
    }

    /// The pieces of the window in order, none empty.
    pub fn pieces(self) -> impl Iterator<Item = (*mut u8, usize)> + 'a
    where
        D: 'a,
    {
        let (mut skip, mut left) = (self.skip, self.len);
        self.vecs.iter().filter_map(move |v| {
            let at = skip;
            skip = 0;
            let n = (v.iov_len - at).min(left);
            left -= n;
            // SAFETY: `at` is at most the piece's length, by construction.
            (n > 0).then(|| (unsafe { v.iov_base.cast::<u8>().add(at) }, n))
        })
    }

    /// Put the first pieces of the window into `out` for a system call: how many, and their bytes.
    pub fn fill(&self, out: &mut [iovec]) -> (usize, usize) {
        let (mut n, mut bytes) = (0, 0);
        for ((base, len), slot) in self.pieces().zip(out) {
            *slot = iovec { iov_base: base.cast(), iov_len: len };
            n += 1;
            bytes += len;
        }
        (n, bytes)
    }

    /// Whether every piece's address is a multiple of `mem`, and its length one of `block` (powers of
    /// two).
    pub fn is_aligned(&self, mem: usize, block: usize) -> bool {
        (mem <= 1 && block <= 1)
            || self.pieces().all(|(p, n)| (p as usize & (mem - 1)) | (n & (block - 1)) == 0)
    }
}

impl Iov<'_, ToMem> {
    /// Fill the window with zeroes.
    pub fn zero_fill(self) {
        for (p, n) in self.pieces() {
            // SAFETY: a piece is writable memory of n bytes (from_raw).
            unsafe { ptr::write_bytes(p, 0, n) };
        }
    }

    /// Copy as many bytes as the window has, or `from` if that is fewer; returns how many.
    pub fn copy_from(self, mut from: &[u8]) -> usize {
        let all = from.len();
        for (p, n) in self.pieces() {
            let n = n.min(from.len());
            // SAFETY: a piece is writable memory of n bytes, and `from` is another's memory.
            unsafe { ptr::copy_nonoverlapping(from.as_ptr(), p, n) };
            from = &from[n..];
        }
        all - from.len()
    }
}

impl Iov<'_, FromMem> {
    /// Copy the window's first bytes into `to`; returns how many.
    pub fn copy_to(self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for (p, n) in self.pieces() {
            let n = n.min(to.len() - done);
            // SAFETY: a piece is readable memory of n bytes, and `to` is another's memory.
            unsafe { ptr::copy_nonoverlapping(p, to[done..].as_mut_ptr(), n) };
            done += n;
        }
        done
    }

    /// Whether all bytes are zero.
    pub fn is_zero(self) -> bool {
        // SAFETY: a piece is readable memory of n bytes.
        self.pieces()
            .all(|(p, n)| unsafe { std::slice::from_raw_parts(p, n) }.iter().all(|&b| b == 0))
    }
}

/// Zeroes for writing from: 64 KiB, aligned for direct I/O, and no pages of memory in the file.
#[repr(align(4096))]
pub struct Zeroes(pub [u8; 65536]);
/// The one instance.
pub static ZEROES: Zeroes = Zeroes([0; 65536]);

/// Fill `out` with pieces of [`ZEROES`] for up to `count` bytes: how many pieces, how many bytes.
pub fn zero_iovecs(out: &mut [iovec], count: u64) -> (usize, usize) {
    let (mut n, mut left) = (0, count);
    for slot in out {
        if left == 0 {
            break;
        }
        let len = left.min(ZEROES.0.len() as u64);
        *slot = iovec { iov_base: ZEROES.0.as_ptr().cast_mut().cast(), iov_len: len as usize };
        left -= len;
        n += 1;
    }
    (n, (count - left) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_split_across_pieces() {
        let (mut a, mut b) = ([1u8; 3], [2u8; 5]);
        let vecs = [
            iovec { iov_base: a.as_mut_ptr().cast(), iov_len: 3 },
            iovec { iov_base: ptr::null_mut(), iov_len: 0 },
            iovec { iov_base: b.as_mut_ptr().cast(), iov_len: 5 },
        ];
        // SAFETY: a and b live to the end of the test.
        let all: Src = unsafe { Iov::from_raw(&vecs, 8) };
        let mut got = [0; 4];
        assert_eq!(all.sub(2, 4).copy_to(&mut got), 4);
        assert_eq!(got, [1, 2, 2, 2]);
        assert!(all.sub(2, 4).as_single().is_none());
        assert_eq!(all.sub(3, 5).as_single().map(|s| s.1), Some(5));
        let (head, rest) = all.split_at(8);
        assert_eq!((head.len(), rest.len()), (8, 0));
        assert_eq!(rest.pieces().count(), 0);
    }
}
