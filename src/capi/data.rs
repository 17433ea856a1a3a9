//! Reading and writing.

use std::ffi::{c_int, c_void};
use std::slice;

use libc::iovec;

use super::guard::{self, Fail, image};
use super::*;
use crate::block::{Dst, OneIov, Src};

/// Pieces of memory that one call takes, at most.
const IOV_LIMIT: c_int = 64 * 1024;

/// Read `count` bytes at `offset` into `buf`: all of them, or none that counts and an error.
///
/// `count` and `offset` are bytes; any values inside the device do. `buf` may be NULL if `count`
/// is 0.
///
/// Returns 0; -EINVAL for a NULL, and for a range that leaves the device (`buf` is not touched
/// then); -EBADF on a handle that is open for its description only; -EIO and other codes of the
/// system; QBLK_ECORRUPT. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_pread(
    dev: *mut qblk,
    buf: *mut c_void,
    count: usize,
    offset: u64,
) -> c_int {
    // SAFETY: a handle or NULL, and memory of `count` bytes, as the manual asks.
    unsafe {
        guard::on("qblk_pread", dev, |dev| {
            let to = OneIov::from_raw(memory(buf, count)?, count);
            Ok(image(dev)?.read(to.iov(), offset)?)
        })
    }
}

/// qblk_pread() with flags; there are none yet, so `flags` must be 0.
///
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_pread2(
    dev: *mut qblk,
    buf: *mut c_void,
    count: usize,
    offset: u64,
    flags: u32,
) -> c_int {
    // SAFETY: as for qblk_pread.
    unsafe {
        guard::on("qblk_pread2", dev, |dev| {
            known_flags(flags, 0)?;
            let to = OneIov::from_raw(memory(buf, count)?, count);
            Ok(image(dev)?.read(to.iov(), offset)?)
        })
    }
}

/// Write `count` bytes of `buf` at `offset`: qblk_pwrite2() without flags.
///
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_pwrite(
    dev: *mut qblk,
    buf: *const c_void,
    count: usize,
    offset: u64,
) -> c_int {
    // SAFETY: a handle or NULL, and memory of `count` bytes, as the manual asks.
    unsafe {
        guard::on("qblk_pwrite", dev, |dev| {
            let from = OneIov::from_raw(memory(buf.cast_mut(), count)?, count);
            Ok(image(dev)?.write(from.iov(), offset, ReqFlags::NONE)?)
        })
    }
}

/// Write `count` bytes of `buf` at `offset`: all of them, or an error.
///
/// `count` and `offset` are bytes; any values inside the device do. `buf` may be NULL if `count`
/// is 0. The one flag is QBLK_REQ_FUA: return when the bytes are on stable storage.
///
/// Returns 0; -EINVAL for a NULL, another flag, and a range that leaves the device (nothing
/// changes then); -EROFS on a handle without QBLK_OPEN_RDWR; -EBADF on one that is open for its
/// description only; -ENOSPC and -EFBIG when the image can grow no further; -EIO and other
/// codes of the system, also after a flush has failed; QBLK_ECORRUPT; QBLK_EPOLICY (see
/// qblk_open2()). After an error the range may hold a part of the new bytes. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_pwrite2(
    dev: *mut qblk,
    buf: *const c_void,
    count: usize,
    offset: u64,
    flags: u32,
) -> c_int {
    // SAFETY: as for qblk_pwrite.
    unsafe {
        guard::on("qblk_pwrite2", dev, |dev| {
            let flags = known_flags(flags, QBLK_REQ_FUA)?;
            let from = OneIov::from_raw(memory(buf.cast_mut(), count)?, count);
            Ok(image(dev)?.write(from.iov(), offset, flags)?)
        })
    }
}

/// qblk_pread2() into `iovcnt` pieces of memory, one after the other.
///
/// `iov` may be NULL if `iovcnt` is 0, and so may the base of a piece whose length is 0.
///
/// Returns as qblk_pread(); -EINVAL also for an `iovcnt` below 0 or above 65536, and for lengths
/// whose sum overflows. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_preadv(
    dev: *mut qblk,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
) -> c_int {
    // SAFETY: a handle or NULL, and `iovcnt` pieces of memory, as the manual asks.
    unsafe {
        guard::on("qblk_preadv", dev, |dev| {
            known_flags(flags, 0)?;
            let (pieces, len) = pieces(iov, iovcnt)?;
            Ok(image(dev)?.read(Dst::from_raw(pieces, len), offset)?)
        })
    }
}

/// qblk_pwrite2() from `iovcnt` pieces of memory, one after the other.
///
/// Returns as qblk_pwrite2(); -EINVAL also where qblk_preadv() answers it. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_pwritev(
    dev: *mut qblk,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
) -> c_int {
    // SAFETY: as for qblk_preadv.
    unsafe {
        guard::on("qblk_pwritev", dev, |dev| {
            let flags = known_flags(flags, QBLK_REQ_FUA)?;
            let (pieces, len) = pieces(iov, iovcnt)?;
            Ok(image(dev)?.write(Src::from_raw(pieces, len), offset, flags)?)
        })
    }
}

/// Make everything that was written survive a power cut.
///
/// Returns 0; -EIO and other codes of the system. A failed flush is told to every context of the
/// device, which refuses writes until qblk_reopen(): what was written before may be lost.
/// -EBADF on a handle that is open for its description only. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_flush(dev: *mut qblk) -> c_int {
    // SAFETY: a handle or NULL, as the manual asks.
    unsafe { guard::on("qblk_flush", dev, |dev| Ok(image(dev)?.flush()?)) }
}

/// Make `count` bytes at `offset` read as zeroes, without writing them where that is possible.
///
/// Note the order of the arguments. Flags: QBLK_REQ_MAY_TRIM (the space may be given back),
/// QBLK_REQ_FAST_ZERO (-ENOTSUP at once rather than write zeroes), QBLK_REQ_FUA.
///
/// Returns as qblk_pwrite2(). Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_zero(dev: *mut qblk, count: u64, offset: u64, flags: u32) -> c_int {
    // SAFETY: a handle or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_zero", dev, |dev| {
            let all = QBLK_REQ_FUA | QBLK_REQ_MAY_TRIM | QBLK_REQ_FAST_ZERO;
            let flags = known_flags(flags, all)?;
            Ok(image(dev)?.zero(offset, count, flags)?)
        })
    }
}

/// Give the space of `count` bytes at `offset` back; what they hold matters no more.
///
/// Note the order of the arguments. Each byte reads as before or as zero from then on, the same at
/// every read until it is written. The one flag is QBLK_REQ_FUA.
///
/// Returns as qblk_pwrite2(). Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_trim(dev: *mut qblk, count: u64, offset: u64, flags: u32) -> c_int {
    // SAFETY: a handle or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_trim", dev, |dev| {
            let flags = known_flags(flags, QBLK_REQ_FUA)?;
            Ok(image(dev)?.trim(offset, count, flags)?)
        })
    }
}

/// Bring `count` bytes at `offset` near, so that reading them soon is quick; a hint.
///
/// Note the order of the arguments. There are no flags yet, so `flags` must be 0.
///
/// Returns as qblk_pread(). Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_cache(dev: *mut qblk, count: u64, offset: u64, flags: u32) -> c_int {
    // SAFETY: a handle or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_cache", dev, |dev| {
            known_flags(flags, 0)?;
            Ok(image(dev)?.cache(offset, count)?)
        })
    }
}

/// A request's flags, if all of them mean something to the call.
#[inline(always)]
pub(super) fn known_flags(flags: u32, known: u32) -> Result<ReqFlags, Fail> {
    if flags & !known == 0 { Ok(ReqFlags(flags)) } else { Err(unknown_flags(flags & !known)) }
}

#[cold]
#[inline(never)]
fn unknown_flags(flags: u32) -> Fail {
    Fail::Code(-libc::EINVAL, format!("flags {flags:#x} mean nothing to this call"))
}

#[inline(always)]
pub(super) fn memory(buf: *mut c_void, count: usize) -> Result<*mut c_void, Fail> {
    if buf.is_null() && count > 0 { Err(null_memory()) } else { Ok(buf) }
}

#[cold]
#[inline(never)]
fn null_memory() -> Fail {
    Fail::Argument("the buffer is NULL")
}

/// The pieces of memory, and their bytes together.
///
/// # Safety
/// `iov` is NULL, or `iovcnt` pieces that live as long as the answer is used.
unsafe fn pieces<'a>(iov: *const iovec, iovcnt: c_int) -> Result<(&'a [iovec], usize), Fail> {
    let count = match iovcnt {
        0 => return Ok((&[], 0)),
        1..=IOV_LIMIT => iovcnt as usize,
        _ => {
            let text = format!("iovcnt is {iovcnt}, expected 0 to {IOV_LIMIT}");
            return Err(Fail::Code(-libc::EINVAL, text));
        }
    };
    if iov.is_null() {
        return Err(Fail::Argument("iov is NULL"));
    }
    // SAFETY: the caller's word.
    let pieces = unsafe { slice::from_raw_parts(iov, count) };
    let mut len = 0usize;
    for piece in pieces {
        memory(piece.iov_base, piece.iov_len)?;
        len = len
            .checked_add(piece.iov_len)
            .ok_or(Fail::Argument("the lengths in iov are more than memory can have"))?;
    }
    Ok((pieces, len))
}

/// End in a panic, on purpose: for the test that a program survives one. Not in the product.
#[cfg(feature = "test-panic")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk__test_panic(dev: *mut qblk) -> c_int {
    // SAFETY: a handle or NULL.
    unsafe {
        guard::on::<()>("qblk__test_panic", dev, |dev| {
            image(dev)?;
            panic!("on purpose")
        })
    }
}
