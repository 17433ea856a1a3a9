//! What a device is, and where its bytes are.

use std::ffi::{c_char, c_int};
use std::mem::offset_of;
use std::{ptr, slice};

use super::data::known_flags;
use super::guard::{self, Fail, image};
use super::options::text_arg;
use super::*;
use crate::block::quoted;

/// What qblk_get_info() tells. 256 bytes for ever; later versions give reserved bytes a meaning.
#[repr(C)]
pub struct qblk_info {
    /// Bytes.
    pub size: u64,
    /// Bytes in use on the host; UINT64_MAX = not known.
    pub allocated: u64,
    /// Bytes in one request; 0 = no limit. Larger ones are cut by the library.
    pub max_transfer: u64,
    /// Bytes that requests are best multiples of; 1 = any.
    pub request_alignment: u32,
    /// Bytes that a request is best a multiple of.
    pub optimal_io_size: u32,
    /// Bytes; 0 = none.
    pub cluster_size: u32,
    /// Images below this one.
    pub backing_depth: u32,
    /// Bits of QBLK_STATE_...
    pub state: u32,
    /// QBLK_CAN_...: flush.
    pub can_flush: u8,
    /// QBLK_CAN_...: QBLK_REQ_FUA.
    pub can_fua: u8,
    /// QBLK_CAN_...: trim.
    pub can_trim: u8,
    /// QBLK_CAN_...: zero.
    pub can_zero: u8,
    /// QBLK_CAN_...: zero with QBLK_REQ_FAST_ZERO.
    pub can_fast_zero: u8,
    /// QBLK_CAN_...: cache.
    pub can_cache: u8,
    /// QBLK_CAN_...: extents.
    pub can_extents: u8,
    /// QBLK_CAN_...: a flush through one context holds for what was written through all.
    pub can_multi_conn: u8,
    /// "qcow2", "raw"...; NUL-terminated.
    pub format: [c_char; 32],
    /// What holds the bytes: "file", "mem"...; NUL-terminated.
    pub driver: [c_char; 32],
    /// Zero.
    pub reserved: [u8; 140],
}

/// A run of bytes of a device that are alike. 48 bytes for ever.
#[repr(C)]
pub struct qblk_extent {
    /// Where it begins on the device, bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Where it begins in the file that holds it, bytes; only with QBLK_EXTENT_HOST.
    pub host_offset: u64,
    /// Bits of QBLK_EXTENT_...
    pub flags: u32,
    /// 0 = this image, 1 = its backing image...
    pub depth: u32,
    /// Zero.
    pub reserved: [u8; 16],
}

const _: () = {
    assert!(size_of::<qblk_info>() == QBLK_INFO_SIZE as usize && align_of::<qblk_info>() == 8);
    assert!(offset_of!(qblk_info, size) == 0);
    assert!(offset_of!(qblk_info, allocated) == 8);
    assert!(offset_of!(qblk_info, max_transfer) == 16);
    assert!(offset_of!(qblk_info, request_alignment) == 24);
    assert!(offset_of!(qblk_info, optimal_io_size) == 28);
    assert!(offset_of!(qblk_info, cluster_size) == 32);
    assert!(offset_of!(qblk_info, backing_depth) == 36);
    assert!(offset_of!(qblk_info, state) == 40);
    assert!(offset_of!(qblk_info, can_flush) == 44);
    assert!(offset_of!(qblk_info, can_fua) == 45);
    assert!(offset_of!(qblk_info, can_trim) == 46);
    assert!(offset_of!(qblk_info, can_zero) == 47);
    assert!(offset_of!(qblk_info, can_fast_zero) == 48);
    assert!(offset_of!(qblk_info, can_cache) == 49);
    assert!(offset_of!(qblk_info, can_extents) == 50);
    assert!(offset_of!(qblk_info, can_multi_conn) == 51);
    assert!(offset_of!(qblk_info, format) == 52);
    assert!(offset_of!(qblk_info, driver) == 84);
    assert!(offset_of!(qblk_info, reserved) == 116);

    assert!(size_of::<qblk_extent>() == 48 && align_of::<qblk_extent>() == 8);
    // An extent is filled by the rooms below, in their own type.
    assert!(size_of::<Extent>() == 48 && align_of::<Extent>() == 8);
    assert!(offset_of!(qblk_extent, offset) == 0 && offset_of!(Extent, offset) == 0);
    assert!(offset_of!(qblk_extent, length) == 8 && offset_of!(Extent, length) == 8);
    assert!(offset_of!(qblk_extent, host_offset) == 16 && offset_of!(Extent, host_offset) == 16);
    assert!(offset_of!(qblk_extent, flags) == 24 && offset_of!(Extent, flags) == 24);
    assert!(offset_of!(qblk_extent, depth) == 28 && offset_of!(Extent, depth) == 28);
    assert!(offset_of!(qblk_extent, reserved) == 32 && offset_of!(Extent, reserved) == 32);
};

/// Tell what the device is: fills `*info`, all 256 bytes of it.
///
/// Works on any handle, also one that is open for its description only.
///
/// Returns 0; -EINVAL for a NULL. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_get_info(dev: *mut qblk, info: *mut qblk_info) -> c_int {
    // SAFETY: a handle or NULL, and memory for the structure, as the manual asks.
    unsafe {
        guard::on("qblk_get_info", dev, |dev| {
            if info.is_null() {
                return Err(Fail::Argument("info is NULL"));
            }
            info.write(describe(&image(dev)?.info()?));
            Ok(())
        })
    }
}

fn describe(i: &crate::image::Info) -> qblk_info {
    qblk_info {
        size: i.size,
        allocated: i.allocated.unwrap_or(u64::MAX),
        max_transfer: i.max_transfer,
        request_alignment: i.request_alignment,
        optimal_io_size: i.optimal_io_size,
        cluster_size: i.cluster_size,
        backing_depth: i.backing_depth,
        state: i.state,
        can_flush: i.can_flush as u8,
        can_fua: i.can_fua as u8,
        can_trim: i.can_trim as u8,
        can_zero: i.can_zero as u8,
        can_fast_zero: i.can_fast_zero as u8,
        can_cache: i.can_cache as u8,
        can_extents: i.can_extents as u8,
        can_multi_conn: i.can_multi_conn as u8,
        format: name(i.format),
        driver: name(i.driver),
        reserved: [0; 140],
    }
}

/// A name, cut so that a NUL is left at its end.
fn name(text: &str) -> [c_char; 32] {
    let mut out = [0; 32];
    for (to, &from) in out[..31].iter_mut().zip(text.as_bytes()) {
        *to = from as c_char;
    }
    out
}

/// Tell the property `key` of the device, as text in `buf`.
///
/// Keys: "filename", "backing-filename", "backing-format", "data-file", and the format's own
/// ("qcow2.compat"...). "properties" lists those that this device has, a line each. `size` is that
/// of `buf` in bytes, with room for the NUL that ends the text; `buf` may be NULL if it is 0.
///
/// Returns the length of the value in bytes without the NUL, 0 if it is empty; as with snprintf(),
/// a result of `size` or more means that the text was cut. -ENOENT for a key that this device
/// does not have; -EINVAL for a NULL. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_get_property(
    dev: *mut qblk,
    key: *const c_char,
    buf: *mut c_char,
    size: usize,
) -> i64 {
    // SAFETY: a handle or NULL, a string or NULL, and memory of `size` bytes, as the manual asks.
    unsafe {
        guard::on("qblk_get_property", dev, |dev| {
            let key = text_arg(key, "the key is NULL")?;
            if buf.is_null() && size > 0 {
                return Err(Fail::Argument("the buffer is NULL"));
            }
            let image = image(dev)?;
            let value = match key.to_str() {
                Ok(key) => image.property(key)?,
                Err(_) => None,
            };
            let Some(value) = value else {
                return Err(no_property(key.to_bytes()));
            };
            put_text(&value, buf, size);
            Ok(value.len() as i64)
        })
    }
}

/// Put as much of `value` into `buf` as there is room for, with a NUL behind it.
///
/// # Safety
/// `buf` must be good for writing `size` bytes.
pub(super) unsafe fn put_text(value: &[u8], buf: *mut c_char, size: usize) {
    if let Some(room) = size.checked_sub(1) {
        let n = value.len().min(room);
        // SAFETY: n + 1 is at most `size`.
        unsafe {
            ptr::copy_nonoverlapping(value.as_ptr(), buf.cast(), n);
            *buf.add(n) = 0;
        }
    }
}

fn no_property(key: &[u8]) -> Fail {
    let text = format!("no property {} here; 'properties' lists those there are", quoted(key));
    Fail::Code(-libc::ENOENT, text)
}

/// Tell where the bytes from `offset` on live: fills `out` with at most `max` extents, which begin
/// at `offset` and follow one another without gaps. Neighbours that are alike are one extent.
///
/// They cover `count` bytes, or fewer when `max` is too small; go on from where the last one ends.
/// There are no flags yet, so `flags` must be 0. `out` may be NULL if `max` is 0. What has changed is
/// told by qblk_extents2().
///
/// Returns how many were filled; -EINVAL for a NULL, a flag, a range that leaves the device; -EBADF
/// on a handle that is open for its description only; codes of reading. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_extents(
    dev: *mut qblk,
    count: u64,
    offset: u64,
    flags: u32,
    out: *mut qblk_extent,
    max: usize,
) -> i64 {
    // SAFETY: a handle or NULL, and memory for `max` extents, as the manual asks.
    unsafe {
        guard::on("qblk_extents", dev, |dev| {
            known_flags(flags, 0)?;
            let out = extents_arg(out, max)?;
            Ok(image(dev)?.extents(offset, count, out)? as i64)
        })
    }
}

/// Memory for `max` extents.
///
/// # Safety
/// NULL, or good for writing `max` extents for as long as the answer is used.
pub(super) unsafe fn extents_arg<'a>(
    out: *mut qblk_extent,
    max: usize,
) -> Result<&'a mut [Extent], Fail> {
    if out.is_null() && max > 0 {
        return Err(Fail::Argument("'out' is NULL"));
    }
    // No more than memory can have; a slice of more is not allowed to be.
    let max = max.min(isize::MAX as usize / size_of::<Extent>());
    Ok(match max {
        0 => &mut [],
        // SAFETY: the caller's word. The two types are laid out alike (asserted above), and any
        // bits are valid.
        _ => unsafe { slice::from_raw_parts_mut(out.cast(), max) },
    })
}

/// A run of bytes that a meta context says the same of. 16 bytes for ever.
#[repr(C)]
pub struct qblk_status {
    /// Bytes.
    pub length: u64,
    /// What it means is the context's to say: of "base:allocation", 1 is a hole and 2 reads as zeroes;
    /// of "qemu:allocation-depth" it is the depth; of "qemu:dirty-bitmap:NAME", 1 is dirty.
    pub flags: u64,
}

const _: () = assert!(size_of::<qblk_status>() == 16 && align_of::<qblk_status>() == 8);

/// Tell what a meta context of the NBD server behind `dev` says of a range (or, of an image that has
/// dirty bitmaps, what "qemu:dirty-bitmap:NAME" would be): fills `out` with at most
/// `max` runs, which begin at `offset` and follow one another.
///
/// `context` is "base:allocation", "qemu:allocation-depth", or one that the option "nbd.contexts" asked
/// for at open. They cover `count` bytes, or fewer; go on from where the last one ends. There are no
/// flags yet, so `flags` must be 0. `out` may be NULL if `max` is 0.
///
/// Returns how many were filled; -EINVAL for a NULL, a flag, a range that leaves the device; -ENOTSUP
/// if this is no NBD export, or the server does not have the context; codes of reading. Any thread.
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_block_status(
    dev: *mut qblk,
    context: *const c_char,
    count: u64,
    offset: u64,
    flags: u32,
    out: *mut qblk_status,
    max: usize,
) -> i64 {
    // SAFETY: a handle or NULL, a string or NULL, and memory for `max` runs, as the manual asks.
    unsafe {
        guard::on("qblk_block_status", dev, |dev| {
            known_flags(flags, 0)?;
            let context = text_arg(context, "the context is NULL")?;
            if out.is_null() && max > 0 {
                return Err(Fail::Argument("'out' is NULL"));
            }
            let runs = image(dev)?.block_status(context.to_bytes(), offset, count, max)?;
            let n = runs.len().min(max);
            for (i, (length, flags)) in runs.into_iter().take(n).enumerate() {
                out.add(i).write(qblk_status { length, flags });
            }
            Ok(n as i64)
        })
    }
}
