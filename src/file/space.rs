//! Space in a file: zeroing and trimming without writing, what is a hole, how long the file is.
//!
//! Promises: zeroing that would mean writing zeroes is `NotSupported` (the emulation writes them),
//! and what the file system was found not to do is not tried again. A size is never made smaller
//! but by a resize that may.

use std::fs::File;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, c_int, iovec};

use super::host::{DataRun, Host, Seek};
use super::sys;
use crate::block::{
    Driver, Error, Extent, ExtentList, Prealloc, ReqFlags, Result, Src, zero_iovecs,
};

const PUNCH: c_int = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
const ZERO: c_int = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
const NO_ZEROES: Error = Error::NotSupported("zeroing without writing here");

impl Host {
    /// Try one mode of `fallocate`; `false` if it is not to be had (here, or for want of room).
    fn try_mode(&self, mode: c_int, no: &AtomicBool, offset: u64, count: u64) -> Result<bool> {
        if no.load(Relaxed) {
            return Ok(false);
        }
        match sys::fallocate(&self.file, mode, offset, count) {
            Ok(()) => Ok(true),
            // EINVAL is how some say that they do not know the mode.
            Err(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV) => {
                no.store(true, Relaxed);
                Ok(false)
            }
            // Splitting an extent takes room, reserving takes it; writing over blocks does not.
            Err(libc::ENOSPC | libc::EDQUOT) => Ok(false),
            Err(errno) => Err(self.io_error("fallocate", offset, count, errno)),
        }
    }

    pub(super) fn zero_range(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        let end = self.end_to_write("zero", offset, count)?;
        self.may_write()?;
        self.flusher.dirty();
        self.holes.fetch_add(1, AcqRel);
        let result = if self.is_block {
            self.zero_block(offset, count, flags)
        } else {
            self.zero_file(offset, count, end, flags)
        };
        self.holes.fetch_add(1, AcqRel);
        self.flusher.dirty();
        result
    }

    fn zero_file(&self, offset: u64, count: u64, end: u64, flags: ReqFlags) -> Result<()> {
        let may_trim = flags.has(ReqFlags::MAY_TRIM);
        // Without MAY_TRIM the space has to stay, or come to be, reserved.
        let done = may_trim && self.try_mode(PUNCH, &self.cannot.punch, offset, count)?
            || self.try_mode(ZERO, &self.cannot.zero_range, offset, count)?;
        if !done {
            // What lies wholly behind the end is zeroes as soon as the file reaches there.
            let size = sys::file_size(&self.file).map_err(|e| self.os_error("fstat", e))?;
            if !may_trim || offset < size {
                return Err(NO_ZEROES);
            }
        }
        if end > self.size() { self.grow(end) } else { Ok(()) }
    }

    fn zero_block(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        if offset + count > self.size() {
            return Err(self.io_error("zero", offset, count, libc::ENOSPC));
        }
        // The kernel zeroes whole blocks only; what is left of the first and the last is written.
        let end = offset + count;
        let (from, to) = (offset.next_multiple_of(self.logical), end - end % self.logical);
        if from >= to {
            return Err(NO_ZEROES);
        }
        self.zero_blocks(from, to - from, flags)?;
        self.write_zeroes(offset, from)?;
        self.write_zeroes(to, end)
    }

    fn zero_blocks(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        // Never writes: the kernel refuses it where the device cannot.
        if flags.has(ReqFlags::MAY_TRIM)
            && self.try_mode(PUNCH, &self.cannot.punch, offset, count)?
        {
            return Ok(());
        }
        // These have the kernel write zeroes where the device cannot do better, and do not say so.
        if flags.has(ReqFlags::FAST_ZERO) {
            return Err(NO_ZEROES);
        }
        if self.try_mode(ZERO, &self.cannot.zero_range, offset, count)? {
            return Ok(());
        }
        if self.cannot.zero_out.load(Relaxed) {
            return Err(NO_ZEROES);
        }
        match sys::block_zero_out(&self.file, offset, count) {
            Ok(()) => Ok(()),
            Err(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL) => {
                self.cannot.zero_out.store(true, Relaxed);
                Err(NO_ZEROES)
            }
            Err(errno) => Err(self.io_error("zero", offset, count, errno)),
        }
    }

    /// Make the file at least `end` bytes long.
    fn grow(&self, end: u64) -> Result<()> {
        let _alone = self.growing.write();
        let size = sys::file_size(&self.file).map_err(|e| self.os_error("fstat", e))?;
        if size < end {
            sys::ftruncate(&self.file, end).map_err(|e| self.os_error("ftruncate", e))?;
        }
        self.len.fetch_max(end, Release);
        Ok(())
    }

    /// Give a range back. BLKDISCARD is not for block devices here: what it leaves may read
    /// differently from one read to the next. Punching a hole leaves zeroes, or is refused.
    pub(super) fn punch(&self, offset: u64, count: u64) -> Result<()> {
        let end = self.end(offset, count)?.min(self.size());
        let (from, to) = (offset.next_multiple_of(self.logical), end - end % self.logical);
        if from >= to {
            return Ok(());
        }
        self.may_write()?;
        self.flusher.dirty();
        self.holes.fetch_add(1, AcqRel);
        let result = self.try_mode(PUNCH, &self.cannot.punch, from, to - from);
        self.holes.fetch_add(1, AcqRel);
        self.flusher.dirty();
        // A hint: that it cannot be done is no failure.
        result.map(drop)
    }

    pub(super) fn find_extents(
        &self,
        offset: u64,
        count: u64,
        out: &mut ExtentList<'_>,
    ) -> Result<()> {
        let end = self.end(offset, count)?;
        let file = match &self.seek {
            Seek::Main => &self.file,
            Seek::Own(file) => file,
            Seek::Never => {
                self.tell_size(offset, end, false, out);
                return Ok(());
            }
        };
        let mut at = offset;
        let holes = self.holes.load(Acquire);
        let known = *self.data_run.lock();
        if known.holes == holes && (known.from..known.to).contains(&at) {
            let to = known.to.min(end);
            out.push(Extent::data(at, to - at));
            at = to;
        }
        while at < end && !out.is_full() {
            let Some(data) = seek_data(file, at) else {
                self.tell_size(at, end, false, out);
                break;
            };
            let Some(data) = data else {
                self.tell_size(at, end, true, out);
                break;
            };
            let data = data.max(at);
            if data >= end {
                out.push(Extent::hole(at, end - at));
                break;
            }
            out.push(Extent::hole(at, data - at));
            // A file that changes under us, or an odd file system: data is never wrong.
            let hole = match sys::lseek(file, data, libc::SEEK_HOLE) {
                Ok(hole) if hole > data => {
                    *self.data_run.lock() = DataRun { holes, from: data, to: hole };
                    hole.min(end)
                }
                _ => {
                    self.tell_size(data, end, false, out);
                    break;
                }
            };
            out.push(Extent::data(data, hole - data));
            at = hole;
        }
        Ok(())
    }

    /// Describe a range by the file's size alone: `hole` up to its present end, or data; behind
    /// that data again as far as the file once reached, since a read has to find out that those
    /// bytes are gone; and a hole behind all that ever was.
    fn tell_size(&self, offset: u64, end: u64, hole: bool, out: &mut ExtentList<'_>) {
        let known = self.size();
        let present = if self.is_block { known } else { sys::file_size(&self.file).unwrap_or(0) };
        let present = present.clamp(offset, end);
        let known = known.clamp(present, end);
        let first = if hole { Extent::hole } else { Extent::data };
        out.push(first(offset, present - offset));
        out.push(Extent::data(present, known - present));
        out.push(Extent::hole(known, end - known));
    }

    pub(super) fn change_size(&self, size: u64, prealloc: Prealloc, shrink: bool) -> Result<()> {
        if self.caps.read_only {
            return Err(Error::ReadOnly(self.name.clone()));
        }
        self.may_write()?;
        if self.is_block {
            return match size == self.size() {
                true => Ok(()),
                false => Err(Error::NotSupported("resizing a block device")),
            };
        }
        let _alone = self.growing.write();
        self.holes.fetch_add(1, AcqRel);
        let old = sys::file_size(&self.file).map_err(|e| self.os_error("fstat", e))?;
        let failed = |errno| self.os_error("resize", errno);
        if size < old.max(self.size()) {
            if !shrink {
                let name = &self.name;
                return Err(Error::invalid(format!(
                    "{name}: resizing from {old} to {size} bytes loses data \
                     (QBLK_RESIZE_SHRINK allows it)"
                )));
            }
            let known = self.size();
            // First: a read that meets the new end must not take it for bytes gone astray.
            self.len.store(size, Release);
            self.flusher.dirty();
            let result = sys::ftruncate(&self.file, size);
            self.flusher.dirty();
            return result.map_err(|errno| {
                self.len.store(known, Release);
                failed(errno)
            });
        }
        self.end_to_write("resize", size, 0)?;
        self.flusher.dirty();
        let result = self.lengthen(old, size, prealloc);
        self.flusher.dirty();
        match result {
            Ok(()) => {
                self.len.store(size, Release);
                Ok(())
            }
            Err(e) => {
                // Give back what was reserved. That it was longer before is all there is to say.
                let _ = sys::ftruncate(&self.file, old);
                Err(e)
            }
        }
    }

    /// Make the file longer, `growing` being held alone.
    fn lengthen(&self, old: u64, size: u64, prealloc: Prealloc) -> Result<()> {
        let failed = |errno| self.io_error("resize", old, size - old, errno);
        if size == old {
            return Ok(());
        }
        match prealloc {
            Prealloc::Off | Prealloc::Metadata => sys::ftruncate(&self.file, size).map_err(failed),
            Prealloc::Falloc => match sys::fallocate(&self.file, 0, old, size - old) {
                Ok(()) => Ok(()),
                Err(libc::EOPNOTSUPP | libc::ENOSYS) => {
                    Err(Error::NotSupported("reserving space on this file system"))
                }
                Err(errno) => Err(failed(errno)),
            },
            Prealloc::Full => {
                // In one go where that can be done: fewer extents, and no room is told at once.
                match sys::fallocate(&self.file, 0, old, size - old) {
                    Ok(()) | Err(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {}
                    Err(errno) => return Err(failed(errno)),
                }
                self.write_zeroes(old, size)
            }
        }
    }

    fn write_zeroes(&self, mut offset: u64, end: u64) -> Result<()> {
        // A file may end anywhere, direct I/O may not.
        let file = self.edge.as_ref().unwrap_or(&self.file);
        let mut vecs = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 64];
        while offset < end {
            let (n, bytes) = zero_iovecs(&mut vecs, end - offset);
            // SAFETY: the pieces lie in the static zeroes, which are only read.
            let zeroes = unsafe { Src::from_raw(&vecs[..n], bytes) };
            self.write_all(file, zeroes, offset, 0)
                .map_err(|at| self.io_error("write", at.offset, at.left, at.errno))?;
            offset += bytes as u64;
        }
        Ok(())
    }
}

/// Where the next data is: `Some(None)` if there is none to the end, `None` if there is no telling.
fn seek_data(file: &File, offset: u64) -> Option<Option<u64>> {
    match sys::lseek(file, offset, libc::SEEK_DATA) {
        Ok(data) => Some(Some(data)),
        Err(libc::ENXIO) => Some(None),
        Err(_) => None,
    }
}
