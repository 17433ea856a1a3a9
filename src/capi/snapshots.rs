//! Internal snapshots, and the area of a machine's state that they keep.

use std::ffi::{c_char, c_int, c_void};
use std::mem::offset_of;

use super::data::{known_flags, memory};
use super::guard::{self, Fail, image};
use super::options::{options_arg, text_arg};
use super::*;
use crate::block::{OneIov, SnapshotInfo};

/// An internal snapshot. 512 bytes for ever; later versions give reserved bytes a meaning.
#[repr(C)]
pub struct qblk_snapshot {
    /// What names it alone; NUL-terminated, cut if it is longer.
    pub id: [c_char; 128],
    /// What people call it; NUL-terminated, cut if it is longer.
    pub name: [c_char; 256],
    /// Bytes of the machine's state that it keeps; 0 = none.
    pub vm_state_size: u64,
    /// Bytes that the disk had.
    pub disk_size: u64,
    /// When it was made: seconds since 1970.
    pub date_sec: u64,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// Zero.
    pub reserved0: u32,
    /// How long the machine had run, nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instructions that it had executed; UINT64_MAX = not known.
    pub icount: u64,
    /// Zero.
    pub reserved: [u8; 80],
}

const _: () = {
    assert!(size_of::<qblk_snapshot>() == 512 && align_of::<qblk_snapshot>() == 8);
    assert!(offset_of!(qblk_snapshot, name) == 128);
    assert!(offset_of!(qblk_snapshot, vm_state_size) == 384);
    assert!(offset_of!(qblk_snapshot, disk_size) == 392);
    assert!(offset_of!(qblk_snapshot, date_sec) == 400);
    assert!(offset_of!(qblk_snapshot, date_nsec) == 408);
    assert!(offset_of!(qblk_snapshot, vm_clock_nsec) == 416);
    assert!(offset_of!(qblk_snapshot, icount) == 424);
    assert!(offset_of!(qblk_snapshot, reserved) == 432);
};

/// List the image's internal snapshots: fills `out` with the first `max` of them, in the order of the
/// image's table. `out` may be NULL if `max` is 0.
///
/// Works on any handle, also one that is open for its description only.
///
/// Returns how many there are, which may be more than `max`; -ENOTSUP for a format without snapshots;
/// -EINVAL for a NULL; QBLK_ECORRUPT for a table that is no such; codes of reading. Any thread.
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_snapshot_list(
    dev: *mut qblk,
    out: *mut qblk_snapshot,
    max: usize,
) -> i64 {
    // SAFETY: a handle or NULL, and memory for `max` snapshots, as the manual asks.
    unsafe {
        guard::on("qblk_snapshot_list", dev, |dev| {
            if out.is_null() && max > 0 {
                return Err(Fail::Argument("'out' is NULL"));
            }
            let list = image(dev)?.snapshots()?;
            for (i, s) in list.iter().take(max).enumerate() {
                out.add(i).write(describe(s));
            }
            Ok(list.len() as i64)
        })
    }
}

fn describe(s: &SnapshotInfo) -> qblk_snapshot {
    qblk_snapshot {
        id: text(&s.id),
        name: text(&s.name),
        vm_state_size: s.vm_state_size,
        disk_size: s.disk_size,
        date_sec: s.date.0,
        date_nsec: s.date.1,
        reserved0: 0,
        vm_clock_nsec: s.vm_clock,
        icount: s.icount.unwrap_or(u64::MAX),
        reserved: [0; 80],
    }
}

/// Text, cut so that a NUL is left at its end.
fn text<const N: usize>(bytes: &[u8]) -> [c_char; N] {
    let mut out = [0; N];
    for (to, &from) in out[..N - 1].iter_mut().zip(bytes) {
        *to = from as c_char;
    }
    out
}

/// Keep the state of the disk as it is now in an internal snapshot `name`, and with it what was written
/// by qblk_vmstate_write() since the last one, which is not in the active image any more then.
///
/// `options` (NULL: none): "id" (a text that names it alone; without it the next number), "date" (seconds
/// since 1970, with a fraction; without it now), "vm-clock" (nanoseconds), "icount". There are no flags
/// yet, so `flags` must be 0. It is on stable storage when the call returns; a power cut before leaves
/// the image as it was. Calls of other threads on the device wait meanwhile; what they wrote before
/// is in the snapshot.
///
/// Returns 0; -EEXIST if the name or the ID is taken; -EINVAL for a NULL, a name that is empty or has more
/// than 255 bytes, an ID of more than 127, an option that has no use here, a flag, and where the image's
/// refcounts are too narrow for another reference; -ENOTSUP for a format without snapshots;
/// QBLK_EUNSUPPORTED for an image with an external data file; -EROFS on a handle without
/// QBLK_OPEN_RDWR; -EFBIG for more than 65536 snapshots; -ENOSPC and other codes of the system;
/// QBLK_ECORRUPT. After an error the image is as it was. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_snapshot_create(
    dev: *mut qblk,
    name: *const c_char,
    options: *const qblk_options,
    flags: u32,
) -> c_int {
    // SAFETY: a handle or NULL, a string or NULL, and options or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_snapshot_create", dev, |dev| {
            known_flags(flags, 0)?;
            let (name, options) = (text_arg(name, "the name is NULL")?, options_arg(options));
            Ok(image(dev)?.snapshot_create(name.to_bytes(), &options)?)
        })
    }
}

/// Make the disk, its size and the machine's state what they were in a snapshot: the one whose ID is
/// `id_or_name`, or else the first with that name. What was written since the last snapshot is lost.
///
/// There are no flags yet, so `flags` must be 0. Calls of other threads on the device wait meanwhile.
///
/// Returns as qblk_snapshot_create(); -ENOENT if there is no such snapshot. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_snapshot_apply(
    dev: *mut qblk,
    id_or_name: *const c_char,
    flags: u32,
) -> c_int {
    // SAFETY: a handle or NULL, and a string or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_snapshot_apply", dev, |dev| {
            known_flags(flags, 0)?;
            let which = text_arg(id_or_name, NO_NAME)?;
            Ok(image(dev)?.snapshot_apply(which.to_bytes())?)
        })
    }
}

/// Forget a snapshot: the one whose ID is `id_or_name`, or else the first with that name. The space that
/// it alone has taken is free then.
///
/// There are no flags yet, so `flags` must be 0. Calls of other threads on the device wait meanwhile.
///
/// Returns as qblk_snapshot_apply(). Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_snapshot_delete(
    dev: *mut qblk,
    id_or_name: *const c_char,
    flags: u32,
) -> c_int {
    // SAFETY: as for qblk_snapshot_apply.
    unsafe {
        guard::on("qblk_snapshot_delete", dev, |dev| {
            known_flags(flags, 0)?;
            let which = text_arg(id_or_name, NO_NAME)?;
            Ok(image(dev)?.snapshot_delete(which.to_bytes())?)
        })
    }
}

const NO_NAME: &str = "the snapshot's ID or name is NULL";

/// Write `count` bytes of `buf` at `offset` of the area of the machine's state, which lies apart from the
/// disk's bytes. The next qblk_snapshot_create() takes it with it; its size there is the end of the
/// furthest write since the last snapshot was made or applied.
///
/// The area is as large as the format can make it, and grows as it is written to. Resizing the device
/// empties it. `buf` may be NULL if `count` is 0.
///
/// Returns 0; -EINVAL for a NULL; -EFBIG for a range that the format can not have; -ENOTSUP for a format
/// without such an area; QBLK_EUNSUPPORTED for an image with an external data file; else as
/// qblk_pwrite2(). Any thread; calls on the area are done one by one. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_vmstate_write(
    dev: *mut qblk,
    buf: *const c_void,
    count: usize,
    offset: u64,
) -> c_int {
    // SAFETY: a handle or NULL, and memory of `count` bytes, as the manual asks.
    unsafe {
        guard::on("qblk_vmstate_write", dev, |dev| {
            let from = OneIov::from_raw(memory(buf.cast_mut(), count)?, count);
            Ok(image(dev)?.vm_state_write(from.iov(), offset)?)
        })
    }
}

/// Read `count` bytes at `offset` of the area of the machine's state into `buf`: what was written since,
/// or what the snapshot has kept that was applied, or opened by the option "snapshot".
///
/// What was never written reads as zeroes; how much there is the property "qcow2.vm-state-size" tells.
/// `buf` may be NULL if `count` is 0.
///
/// Returns as qblk_vmstate_write(), and codes of reading. Any thread; calls on the area are done one by
/// one. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_vmstate_read(
    dev: *mut qblk,
    buf: *mut c_void,
    count: usize,
    offset: u64,
) -> c_int {
    // SAFETY: a handle or NULL, and memory of `count` bytes, as the manual asks.
    unsafe {
        guard::on("qblk_vmstate_read", dev, |dev| {
            let to = OneIov::from_raw(memory(buf, count)?, count);
            Ok(image(dev)?.vm_state_read(to.iov(), offset)?)
        })
    }
}
