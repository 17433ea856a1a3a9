//! Dirty bitmaps: which parts of a device were changed since some moment.

use std::ffi::{c_char, c_int};
use std::mem::offset_of;

use super::data::known_flags;
use super::guard::{self, Fail, image};
use super::options::text_arg;
use super::*;
use crate::block::{BitmapChange, BitmapInfo};

/// Size of a qblk_bitmap in bytes, for ever.
pub const QBLK_BITMAP_SIZE: u32 = 1152;

/// qblk_bitmap.flags: writes are noted in it.
pub const QBLK_BITMAP_ENABLED: u32 = 1;
/// qblk_bitmap.flags: it is inconsistent, for it was in use and never saved (the program that had it
/// was killed, or another writes the image now). It can be removed, and nothing else.
pub const QBLK_BITMAP_IN_USE: u32 = 2;
/// qblk_bitmap.flags: it is kept in the image.
pub const QBLK_BITMAP_PERSISTENT: u32 = 4;

/// qblk_bitmap_add(): writes are not noted in it until qblk_bitmap_enable().
pub const QBLK_BITMAP_DISABLED: u32 = 1;

/// qblk_extents2(): tell of QBLK_EXTENT_DIRTY only, not of where bytes are.
pub const QBLK_EXTENTS_BITMAP: u32 = 1;

/// What qblk_bitmap_list() tells of a dirty bitmap. 1152 bytes for ever.
#[repr(C)]
pub struct qblk_bitmap {
    /// Its name, NUL-terminated: at most 1023 bytes, in no encoding that would be known.
    pub name: [c_char; 1024],
    /// Bytes of the device that one bit stands for.
    pub granularity: u64,
    /// Bytes of the device that are dirty; UINT64_MAX = not known.
    pub dirty: u64,
    /// Bits of QBLK_BITMAP_...
    pub flags: u32,
    /// Zero.
    pub reserved: [u8; 108],
}

const _: () = {
    assert!(size_of::<qblk_bitmap>() == QBLK_BITMAP_SIZE as usize);
    assert!(align_of::<qblk_bitmap>() == 8);
    assert!(offset_of!(qblk_bitmap, name) == 0);
    assert!(offset_of!(qblk_bitmap, granularity) == 1024);
    assert!(offset_of!(qblk_bitmap, dirty) == 1032);
    assert!(offset_of!(qblk_bitmap, flags) == 1040);
    assert!(offset_of!(qblk_bitmap, reserved) == 1044);
};

/// List the dirty bitmaps of the device: fills `out` with the first `max` of them.
///
/// Bitmaps are counted as far as that is quick (64 MiB of them are read); on a handle that is open for
/// its description only none is. A device that can have none has none. `out` may be NULL if `max`
/// is 0.
///
/// Returns how many bitmaps there are, which may be more than `max`; -EINVAL for a NULL; QBLK_ECORRUPT
/// if what the image says of its bitmaps contradicts the format; codes of reading. Any thread.
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_bitmap_list(
    dev: *mut qblk,
    out: *mut qblk_bitmap,
    max: usize,
) -> i64 {
    // SAFETY: a handle or NULL, and memory for `max` structures, as the manual asks.
    unsafe {
        guard::on("qblk_bitmap_list", dev, |dev| {
            if out.is_null() && max > 0 {
                return Err(Fail::Argument("'out' is NULL"));
            }
            let all = image(dev)?.bitmaps()?;
            for (i, info) in all.iter().take(max).enumerate() {
                out.add(i).write(describe(info));
            }
            Ok(all.len() as i64)
        })
    }
}

fn describe(i: &BitmapInfo) -> qblk_bitmap {
    let mut name = [0; 1024];
    for (to, &from) in name[..1023].iter_mut().zip(&i.name) {
        *to = from as c_char;
    }
    let mut flags = 0;
    for (on, bit) in [
        (i.enabled, QBLK_BITMAP_ENABLED),
        (i.inconsistent, QBLK_BITMAP_IN_USE),
        (i.persistent, QBLK_BITMAP_PERSISTENT),
    ] {
        flags |= if on { bit } else { 0 };
    }
    qblk_bitmap {
        name,
        granularity: i.granularity,
        dirty: i.dirty.unwrap_or(u64::MAX),
        flags,
        reserved: [0; 108],
    }
}

/// Add a dirty bitmap `name`, in which nothing is dirty. It is kept in the image, a qcow2 one of
/// version 3, and says what was changed since, through whichever program that knows bitmaps.
///
/// `granularity` is how many bytes one bit stands for: a power of two from 512 to 2 GiB, 0 for 64 KiB.
/// Writes, zeroing and trims are noted in it from now on, before they happen, unless
/// QBLK_BITMAP_DISABLED is given.
///
/// Returns 0; -EINVAL for a NULL, a name of none or more than 1023 bytes, a granularity that is none,
/// an unknown flag; -EEXIST; -EFBIG if it would have more than 512 MiB, or there are 65535; -EROFS on
/// a handle without QBLK_OPEN_RDWR; -EBADF on one that is open for its description only; -ENOTSUP
/// for a device that can have none; codes of writing. Any thread; other calls on the device may run
/// meanwhile. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_bitmap_add(
    dev: *mut qblk,
    name: *const c_char,
    granularity: u64,
    flags: u32,
) -> c_int {
    // SAFETY: a handle or NULL, and a string or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_bitmap_add", dev, |dev| {
            known_flags(flags, QBLK_BITMAP_DISABLED)?;
            let name = text_arg(name, "the name is NULL")?.to_bytes();
            let disabled = flags & QBLK_BITMAP_DISABLED != 0;
            let change = BitmapChange::Add { name, granularity, disabled };
            Ok(image(dev)?.change_bitmap(&change)?)
        })
    }
}

/// Remove the dirty bitmap `name`, also one that is inconsistent.
///
/// Returns 0; -EINVAL for a NULL; -ENOENT if there is none of that name; -EROFS on a handle without
/// QBLK_OPEN_RDWR; -EBADF on one that is open for its description only; -ENOTSUP for a device that
/// can have none; codes of writing. Any thread; other calls on the device may run meanwhile.
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_bitmap_remove(dev: *mut qblk, name: *const c_char) -> c_int {
    // SAFETY: a handle or NULL, and a string or NULL, as the manual asks.
    unsafe { on_one("qblk_bitmap_remove", dev, name, BitmapChange::Remove) }
}

/// Note what is changed from now on in the dirty bitmap `name`. One that is enabled stays so.
///
/// Returns 0; -ESTALE if it is inconsistent; codes of qblk_bitmap_remove(). Any thread; other calls on
/// the device may run meanwhile. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_bitmap_enable(dev: *mut qblk, name: *const c_char) -> c_int {
    // SAFETY: a handle or NULL, and a string or NULL, as the manual asks.
    unsafe { on_one("qblk_bitmap_enable", dev, name, BitmapChange::Enable) }
}

/// Note nothing more in the dirty bitmap `name`. One that is disabled stays so.
///
/// If it fails to be saved it is disabled all the same, and saved when the device is closed.
///
/// Returns 0; -ESTALE if it is inconsistent; codes of qblk_bitmap_remove(). Any thread; other calls on
/// the device may run meanwhile. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_bitmap_disable(dev: *mut qblk, name: *const c_char) -> c_int {
    // SAFETY: a handle or NULL, and a string or NULL, as the manual asks.
    unsafe { on_one("qblk_bitmap_disable", dev, name, BitmapChange::Disable) }
}

/// Make nothing dirty in the dirty bitmap `name`. An enabled one notes all that is changed from the
/// return of this call on; what calls that run meanwhile change has happened by then.
///
/// Returns 0; -ESTALE if it is inconsistent; codes of qblk_bitmap_remove(). Any thread; other calls on
/// the device may run meanwhile. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_bitmap_clear(dev: *mut qblk, name: *const c_char) -> c_int {
    // SAFETY: a handle or NULL, and a string or NULL, as the manual asks.
    unsafe { on_one("qblk_bitmap_clear", dev, name, BitmapChange::Clear) }
}

/// A change of the bitmap `name`.
///
/// # Safety
/// A handle or NULL, and a string or NULL.
unsafe fn on_one<'a>(
    what: &'static str,
    dev: *mut qblk,
    name: *const c_char,
    change: impl FnOnce(&'a [u8]) -> BitmapChange<'a>,
) -> c_int {
    // SAFETY: the caller's word.
    unsafe {
        guard::on(what, dev, |dev| {
            let name = text_arg(name, "the name is NULL")?.to_bytes();
            Ok(image(dev)?.change_bitmap(&change(name))?)
        })
    }
}

/// Make dirty in the bitmap `target` what is dirty in the bitmap `source`, which stays as it is. Their
/// granularities may differ.
///
/// Returns 0; -ESTALE if one of them is inconsistent; codes of qblk_bitmap_remove(). Any thread;
/// other calls on the device may run meanwhile. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_bitmap_merge(
    dev: *mut qblk,
    target: *const c_char,
    source: *const c_char,
) -> c_int {
    // SAFETY: a handle or NULL, and strings or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_bitmap_merge", dev, |dev| {
            let target = text_arg(target, "the target's name is NULL")?.to_bytes();
            let source = text_arg(source, "the source's name is NULL")?.to_bytes();
            Ok(image(dev)?.change_bitmap(&BitmapChange::Merge { target, source })?)
        })
    }
}

/// qblk_extents(), and what the dirty bitmap `bitmap` says: extents have QBLK_EXTENT_DIRTY where it is
/// dirty, and end where that ends.
///
/// With QBLK_EXTENTS_BITMAP nothing else is told: `flags` of an extent are QBLK_EXTENT_DIRTY or 0, and
/// there are fewer of them. `bitmap` may be NULL without that flag: then this is qblk_extents(). Over
/// NBD a bitmap can be asked for whose context the option "nbd.contexts" named at open
/// ("qemu:dirty-bitmap:NAME").
///
/// Returns how many were filled; -ENOENT if there is no bitmap of that name; -ESTALE if it is
/// inconsistent; -ENOTSUP for a device that can have none, or a server that does not tell of it; codes
/// of qblk_extents(). Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_extents2(
    dev: *mut qblk,
    count: u64,
    offset: u64,
    bitmap: *const c_char,
    flags: u32,
    out: *mut qblk_extent,
    max: usize,
) -> i64 {
    // SAFETY: a handle or NULL, a string or NULL, and memory for `max` extents, as the manual asks.
    unsafe {
        guard::on("qblk_extents2", dev, |dev| {
            known_flags(flags, QBLK_EXTENTS_BITMAP)?;
            let only = flags & QBLK_EXTENTS_BITMAP != 0;
            if only && bitmap.is_null() {
                return Err(Fail::Argument("QBLK_EXTENTS_BITMAP needs the name of a bitmap"));
            }
            let out = info::extents_arg(out, max)?;
            let image = image(dev)?;
            if bitmap.is_null() {
                return Ok(image.extents(offset, count, out)? as i64);
            }
            let name = text_arg(bitmap, "the name is NULL")?.to_bytes();
            Ok(image.dirty_extents(name, only, offset, count, out)? as i64)
        })
    }
}
