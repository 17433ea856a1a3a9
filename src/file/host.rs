//! The driver of this room: an open file, block device or memory file, read and written by the
//! calling thread with one system call where one will do.
//!
//! Promises: a request is done whole or fails; a read of bytes that the file was known to have and
//! that are gone is EIO, of bytes that were never there is zeroes; no request allocates memory.
//! Relies on: [`Device`](crate::block::Device) for alignment, on the openers in the room's `mod.rs`
//! for descriptors that nobody else changes.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use libc::iovec;
use parking_lot::{Mutex, RwLock};

use super::flush::Flusher;
use super::map::Mapping;
use super::sys::{self, Errno};
use crate::block::{
    Caps, Driver, Dst, Error, ExtentList, Fence, Name, Prealloc, ReqFlags, Result, Src,
};

/// Pieces of memory in one system call. The kernel takes 1024 (`IOV_MAX`); this many are cheap to
/// have on the stack. It also cuts a call to just under 2 GiB by itself, and says so.
const PIECES: usize = 64;
const NO_PIECE: iovec = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// What `lseek` for extents may be done on.
pub enum Seek {
    /// The driver's file: its position is nobody's.
    Main,
    /// Another opening of the same file, since the position of the first is shared with its owner.
    Own(Arc<File>),
    /// Nothing.
    Never,
}

/// What the file system was found not to do, so that it is asked once only.
#[derive(Default)]
pub(super) struct Cannot {
    pub punch: AtomicBool,
    pub zero_range: AtomicBool,
    pub zero_out: AtomicBool,
    pub dsync: AtomicBool,
    pub copy: AtomicBool,
    pub nowait: AtomicBool,
}

/// A run of the file that was found to be data, when `Host::holes` was `holes`. To find where one
/// ends takes time in proportion to its length on some file systems, so the last is remembered. If
/// another process makes holes in it meanwhile, they are taken for data, which is never wrong.
#[derive(Clone, Copy, Default)]
pub(super) struct DataRun {
    pub holes: u64,
    pub from: u64,
    pub to: u64,
}

/// A file, a block device, or memory that behaves like one.
pub struct Host {
    pub(super) file: Arc<File>,
    /// With direct I/O: the same file through the page cache, for parts of a block.
    pub(super) edge: Option<File>,
    pub(super) seek: Seek,
    pub(super) name: Name,
    pub(super) kind: &'static str,
    pub(super) is_block: bool,
    /// The file lives in memory (tmpfs).
    pub(super) in_memory: bool,
    /// Device and inode numbers.
    pub(super) identity: (u64, u64),
    /// Requests that change the allocation of a block device keep to this, bytes.
    pub(super) logical: u64,
    pub(super) caps: Caps,
    /// No write may end behind this.
    pub(super) limit: u64,
    /// The size that the file is known to have: as of the open, and by what we did since.
    pub(super) len: AtomicU64,
    pub(super) flusher: Flusher,
    /// Shared by writes that make the file longer, alone for `ftruncate`, which would cut off what
    /// such a write has just added. Held across the system call; no other lock is taken under it.
    pub(super) growing: RwLock<()>,
    pub(super) cannot: Cannot,
    /// Counts what may have made holes, twice: when it begins and when it is done.
    pub(super) holes: AtomicU64,
    pub(super) data_run: Mutex<DataRun>,
    /// What reads are served from.
    pub(super) map: Option<Mapping>,
    /// Closed while the image's lease is not good. Whole calls are refused above; this is for what
    /// is written behind them (tables that make room in a cache).
    pub(super) fence: Option<Arc<Fence>>,
}

/// Where a request stopped, and why.
pub(super) struct Stopped {
    pub offset: u64,
    pub left: u64,
    pub errno: Errno,
}

impl Host {
    pub(super) fn io_error(
        &self,
        op: &'static str,
        offset: u64,
        count: u64,
        errno: Errno,
    ) -> Error {
        Error::Io { op, file: self.name.clone(), offset, count, errno }
    }

    /// Refuse to change anything while the fence is closed.
    #[inline]
    pub(super) fn may_write(&self) -> Result<()> {
        match &self.fence {
            Some(fence) if fence.is_closed() => Err(Error::Locked {
                file: self.name.clone(),
                what: "its lease was lost: nothing is written".into(),
            }),
            _ => Ok(()),
        }
    }

    pub(super) fn os_error(&self, op: &'static str, errno: Errno) -> Error {
        Error::Os { op, file: self.name.clone(), errno }
    }

    fn stopped(&self, op: &'static str, at: Stopped) -> Error {
        self.io_error(op, at.offset, at.left, at.errno)
    }

    pub(super) fn too_big(&self, offset: u64, count: u64) -> Error {
        let what = format!(
            "{count} bytes at offset {offset} end beyond the largest offset a file can have, {}",
            sys::MAX_SIZE
        );
        Error::TooBig { file: self.name.clone(), what }
    }

    /// Where a range ends, if a file can reach there.
    pub(super) fn end(&self, offset: u64, count: u64) -> Result<u64> {
        match offset.checked_add(count) {
            Some(end) if end <= sys::MAX_SIZE => Ok(end),
            _ => Err(self.too_big(offset, count)),
        }
    }

    /// Where a range ends, if this process may write there.
    pub(super) fn end_to_write(&self, op: &'static str, offset: u64, count: u64) -> Result<u64> {
        let end = self.end(offset, count)?;
        if end > self.limit {
            return Err(self.io_error(op, offset, count, libc::EFBIG));
        }
        Ok(end)
    }

    /// The rest of a read, of which the first `done` bytes are there.
    #[inline(never)]
    fn read_on(&self, buf: Dst<'_>, start: u64, done: usize) -> Result<()> {
        self.end(start, buf.len() as u64)?;
        let mut vecs = [NO_PIECE; PIECES];
        let mut offset = start + done as u64;
        let mut buf = buf.split_at(done).1;
        while !buf.is_empty() {
            // Before the read: a write that grows the file meanwhile must not make its bytes look
            // as if they had been there and were gone.
            let known = self.len.load(Acquire);
            let aligned = offset & u64::from(self.caps.align - 1) == 0;
            let got = match (aligned, &self.edge) {
                (true, _) => self.read_some(&self.file, buf, offset, &mut vecs),
                // A direct read ends in the middle of a block only where the file does; whether it
                // still does, only a buffered read may ask there.
                (false, Some(edge)) => self.read_some(edge, buf, offset, &mut vecs),
                (false, None) => Ok(0),
            };
            match got {
                Ok(0) if offset < known.min(self.len.load(Acquire)) => {
                    return Err(self.io_error("read", offset, buf.len() as u64, libc::EIO));
                }
                Ok(0) => {
                    buf.zero_fill();
                    return Ok(());
                }
                Ok(n) => {
                    buf = buf.split_at(n).1;
                    offset += n as u64;
                }
                Err(errno) => return Err(self.io_error("read", offset, buf.len() as u64, errno)),
            }
        }
        Ok(())
    }

    fn read_some(
        &self,
        file: &File,
        buf: Dst<'_>,
        offset: u64,
        vecs: &mut [iovec; PIECES],
    ) -> std::result::Result<usize, Errno> {
        let (n, _) = buf.fill(vecs);
        // SAFETY: the pieces are the caller's memory, writable while `buf` lives.
        unsafe { sys::preadv(file, &vecs[..n], offset) }
    }

    /// Write all of `buf`, by as many calls as it takes.
    pub(super) fn write_all(
        &self,
        file: &File,
        mut buf: Src<'_>,
        mut offset: u64,
        flags: libc::c_int,
    ) -> std::result::Result<(), Stopped> {
        if flags == 0
            && let Some((p, len)) = buf.as_single()
        {
            // SAFETY: the piece is the caller's memory, readable while `buf` lives.
            let n = unsafe { libc::pwrite(file.as_raw_fd(), p.cast(), len, offset as libc::off_t) };
            if n == len as isize {
                return Ok(());
            }
            let done = n.max(0) as usize;
            buf = buf.split_at(done).1;
            offset += done as u64;
        }
        let mut vecs = [NO_PIECE; PIECES];
        while !buf.is_empty() {
            let (n, _) = buf.fill(&mut vecs);
            // SAFETY: the pieces are the caller's memory, readable while `buf` lives.
            match unsafe { sys::pwritev(file, &vecs[..n], offset, flags) } {
                // It would be repeated for ever.
                Ok(0) => return Err(Stopped { offset, left: buf.len() as u64, errno: libc::EIO }),
                Ok(done) => {
                    buf = buf.split_at(done).1;
                    offset += done as u64;
                }
                Err(errno) => return Err(Stopped { offset, left: buf.len() as u64, errno }),
            }
        }
        Ok(())
    }

    #[inline]
    fn put(&self, file: &File, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        let end = self.end_to_write("write", offset, buf.len() as u64)?;
        self.may_write()?;
        let _longer = (end > self.len.load(Relaxed)).then(|| self.growing.read());
        if flags.has(ReqFlags::FUA) && self.put_through(file, buf, offset)? {
            self.len.fetch_max(end, Release);
            return Ok(());
        }
        self.flusher.dirty();
        let result = self.write_all(file, buf, offset, 0);
        // Also when it failed: part of it may be there.
        self.flusher.dirty();
        result.map_err(|at| self.stopped("write", at))?;
        if self.caps.align == 1 {
            self.flusher.wrote(offset, end - offset);
        }
        self.len.fetch_max(end, Release);
        if flags.has(ReqFlags::FUA) { self.flush() } else { Ok(()) }
    }

    /// Write with FUA by the kernel; `false` if it does not know how.
    fn put_through(&self, file: &File, buf: Src<'_>, offset: u64) -> Result<bool> {
        if self.cannot.dsync.load(Relaxed) {
            return Ok(false);
        }
        let Err(at) = self.write_all(file, buf, offset, libc::RWF_DSYNC) else { return Ok(true) };
        if matches!(at.errno, libc::ENOSYS | libc::EOPNOTSUPP) {
            self.cannot.dsync.store(true, Relaxed);
            return Ok(false);
        }
        // Either the write failed (no room, say), which loses nothing that was acknowledged, or the
        // sync after it did, which has told this descriptor of lost pages and will not tell it
        // again. A write without the sync shows which.
        self.flusher.dirty();
        let again = self.write_all(file, buf, offset, 0);
        self.flusher.dirty();
        match again {
            Ok(()) => {
                self.flusher.fail(at.errno);
                Err(self.stopped("write", at))
            }
            Err(at) => Err(self.stopped("write", at)),
        }
    }
}

impl Driver for Host {
    fn name(&self) -> &Name {
        &self.name
    }

    fn kind(&self) -> &'static str {
        self.kind
    }

    fn caps(&self) -> Caps {
        self.caps.clone()
    }

    #[inline]
    fn identity(&self) -> Option<(u64, u64)> {
        Some(self.identity)
    }
    fn size(&self) -> u64 {
        self.len.load(Acquire)
    }

    #[inline]
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        if let Some(map) = &self.map
            && map.read(buf, offset, (!self.is_block).then_some(&self.file))
        {
            return Ok(());
        }
        let mut done = 0;
        if let Some((p, len)) = buf.as_single() {
            // SAFETY: the piece is the caller's memory, writable while `buf` lives.
            let n =
                unsafe { libc::pread(self.file.as_raw_fd(), p.cast(), len, offset as libc::off_t) };
            if n == len as isize {
                return Ok(());
            }
            done = n.max(0) as usize;
        }
        // Several pieces, the end of the file, an interruption, an error: found out there.
        self.read_on(buf, offset, done)
    }

    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        // Memory has nothing to wait for but swap, and its file system does not know the flag.
        if self.in_memory {
            return self.read(buf, offset).map(|()| true);
        }
        if self.caps.align > 1 || self.cannot.nowait.load(Relaxed) {
            return Ok(false);
        }
        let mut vecs = [NO_PIECE; PIECES];
        let (n, bytes) = buf.fill(&mut vecs);
        // SAFETY: the pieces are the caller's memory, writable while `buf` lives.
        match unsafe { sys::preadv_now(&self.file, &vecs[..n], offset) } {
            // Fewer: not all of it is in memory, or the file ends there. Found out by a plain read.
            Ok(got) => Ok(got == buf.len() && got == bytes),
            Err(errno) => {
                if matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) {
                    self.cannot.nowait.store(true, Relaxed);
                }
                Ok(false)
            }
        }
    }

    #[inline]
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.put(&self.file, buf, offset, flags)
    }

    fn write_edge(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        // The page that this leaves in the cache is the kernel's to keep in step: it writes it out
        // before a direct request to the same page, and drops it after a direct write.
        match &self.edge {
            Some(edge) => self.put(edge, buf, offset, flags),
            None => Err(Error::NotSupported("writing part of a block")),
        }
    }

    fn flush(&self) -> Result<()> {
        // One file, however many descriptors: one sync is for all of it.
        self.flusher.flush(&self.file).map_err(|errno| self.os_error("fdatasync", errno))
    }

    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.zero_range(offset, count, flags)?;
        if flags.has(ReqFlags::FUA) { self.flush() } else { Ok(()) }
    }

    fn trim(&self, offset: u64, count: u64, _flags: ReqFlags) -> Result<()> {
        self.punch(offset, count)
    }

    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        let end = self.end(offset, count)?.min(self.size());
        // Direct reads never look into the cache.
        if offset < end && self.caps.align == 1 {
            sys::will_need(&self.file, offset, end - offset);
        }
        Ok(())
    }

    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        self.find_extents(offset, count, out)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        (!self.is_block && self.caps.align <= 1).then(|| self.file.as_fd())
    }

    fn copy_from(&self, from: &dyn Driver, at: u64, offset: u64, count: u64) -> Result<()> {
        const CANNOT: Error = Error::NotSupported("copying in the kernel");
        let ours = Driver::file(self).filter(|_| !self.cannot.copy.load(Relaxed));
        let (Some(to), Some(from)) = (ours, from.file()) else { return Err(CANNOT) };
        let end = self.end_to_write("copy", offset, count)?;
        self.may_write()?;
        let _longer = (end > self.len.load(Relaxed)).then(|| self.growing.read());
        self.flusher.dirty();
        let result = sys::copy(from, at, to, offset, count);
        self.flusher.dirty();
        match result {
            Ok(copied) if copied == count => {
                self.len.fetch_max(end, Release);
                Ok(())
            }
            // The source ends early: who reads it finds out why.
            Ok(_) => Err(CANNOT),
            Err(errno @ (libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EIO)) => {
                Err(self.io_error("copy", offset, count, errno))
            }
            Err(_) => {
                self.cannot.copy.store(true, Relaxed);
                Err(CANNOT)
            }
        }
    }

    fn resize(&self, size: u64, prealloc: Prealloc, shrink: bool) -> Result<()> {
        self.change_size(size, prealloc, shrink)
    }

    fn allocated(&self) -> Option<u64> {
        if self.is_block {
            return None;
        }
        let blocks = sys::fstat(&self.file).ok()?.st_blocks;
        // In units of 512 bytes, whatever the file system's own are.
        u64::try_from(blocks).ok()?.checked_mul(512)
    }
}
