//! Checking and repairing images.

use std::ffi::{c_int, c_void};
use std::mem::offset_of;
use std::ptr;

use super::guard::{self, Fail, image};
use super::*;
use crate::block::{CheckReport, Repair};

/// What qblk_check() found. 128 bytes for ever; later versions give reserved bytes a meaning.
#[repr(C)]
pub struct qblk_check_result {
    /// Places found that contradict the format, or at which data is or will be lost.
    pub corruptions: u64,
    /// Clusters found that are counted as in use more often than they are: space that is lost.
    pub leaks: u64,
    /// How many of the corruptions were repaired; the rest is still there.
    pub corruptions_fixed: u64,
    /// How many of the leaks were repaired; the rest is still there.
    pub leaks_fixed: u64,
    /// Places that could not be looked at or repaired: what they hide is not in the numbers above.
    pub check_errors: u64,
    /// Where the last part of the file that is in use ends, bytes.
    pub image_end: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Those of them that this image has.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Those that do not lie behind the one before them.
    pub fragmented_clusters: u64,
    /// Zero.
    pub reserved: [u8; 48],
}

const _: () = {
    assert!(size_of::<qblk_check_result>() == 128 && align_of::<qblk_check_result>() == 8);
    assert!(offset_of!(qblk_check_result, corruptions) == 0);
    assert!(offset_of!(qblk_check_result, leaks) == 8);
    assert!(offset_of!(qblk_check_result, corruptions_fixed) == 16);
    assert!(offset_of!(qblk_check_result, leaks_fixed) == 24);
    assert!(offset_of!(qblk_check_result, check_errors) == 32);
    assert!(offset_of!(qblk_check_result, image_end) == 40);
    assert!(offset_of!(qblk_check_result, total_clusters) == 48);
    assert!(offset_of!(qblk_check_result, allocated_clusters) == 56);
    assert!(offset_of!(qblk_check_result, compressed_clusters) == 64);
    assert!(offset_of!(qblk_check_result, fragmented_clusters) == 72);
    assert!(offset_of!(qblk_check_result, reserved) == 80);
};

/// Check the image: qblk_check2() without progress.
///
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_check(
    dev: *mut qblk,
    flags: u32,
    result: *mut qblk_check_result,
) -> c_int {
    // SAFETY: a handle or NULL, and memory for the result, as the manual asks.
    unsafe { guard::on("qblk_check", dev, |dev| check(dev, flags, None, ptr::null_mut(), result)) }
}

/// Check the image (not those that it stands on), repair it if `flags` says so, and tell in `*result`
/// what was found and what was repaired.
///
/// Flags: 0 = nothing is written; QBLK_CHECK_REPAIR_LEAKS = space that nothing uses is given back;
/// QBLK_CHECK_REPAIR_ALL = all is repaired that can be without losing data, also refcounts and their
/// tables, and the marks "dirty" and "corrupt" are taken away when nothing is wrong any more. What is
/// counted, and how, is as in `qemu-img check`. `progress` (NULL: nobody) is told how far it is, and
/// may stop it; the image is whole then, and no worse than before.
///
/// On a device that is open for writing, other calls wait meanwhile. An image that can not be opened
/// otherwise is opened with QBLK_OPEN_CHECK. After a repair on another handle the device has been
/// opened anew; should that fail the code says why, and the handle is as if QBLK_OPEN_CHECK had been
/// given.
///
/// Returns 0 if the check ran, whatever it found; -EINVAL for a NULL or another flag; -EROFS if it is to
/// repair through a handle that does not write; -EBADF on a handle that is open for its description
/// only; -ENOTSUP for a format without a check; -ECANCELED; QBLK_ECORRUPT for a header that says
/// nothing; QBLK_EUNSUPPORTED; codes of reading and writing. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_check2(
    dev: *mut qblk,
    flags: u32,
    progress: qblk_progress_fn,
    opaque: *mut c_void,
    result: *mut qblk_check_result,
) -> c_int {
    // SAFETY: as for qblk_check(); the function is good for calls with `opaque`.
    unsafe { guard::on("qblk_check2", dev, |dev| check(dev, flags, progress, opaque, result)) }
}

/// # Safety
/// `result` is NULL or good for writing.
unsafe fn check(
    dev: &qblk,
    flags: u32,
    progress: qblk_progress_fn,
    opaque: *mut c_void,
    result: *mut qblk_check_result,
) -> Result<(), Fail> {
    let repair = match flags {
        0 => Repair::Nothing,
        QBLK_CHECK_REPAIR_LEAKS => Repair::Leaks,
        QBLK_CHECK_REPAIR_ALL => Repair::All,
        _ => return Err(Fail::Argument("flags are neither 0 nor QBLK_CHECK_REPAIR_LEAKS or _ALL")),
    };
    if result.is_null() {
        return Err(Fail::Argument("result is NULL"));
    }
    let image = image(dev)?;
    let report = guard::with_progress(progress, opaque, |p| image.check(repair, p))?;
    // SAFETY: the caller's word.
    unsafe { result.write(translate(&report)) };
    tell::done("checked", tell::Of(image), format_args!("{report:?}"));
    Ok(())
}

fn translate(r: &CheckReport) -> qblk_check_result {
    qblk_check_result {
        // Inside, these are what is left.
        corruptions: r.corruptions + r.corruptions_fixed,
        leaks: r.leaks + r.leaks_fixed,
        corruptions_fixed: r.corruptions_fixed,
        leaks_fixed: r.leaks_fixed,
        check_errors: r.check_errors,
        image_end: r.image_end,
        total_clusters: r.total_clusters,
        allocated_clusters: r.allocated_clusters,
        compressed_clusters: r.compressed_clusters,
        fragmented_clusters: r.fragmented_clusters,
        reserved: [0; 48],
    }
}
