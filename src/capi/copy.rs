//! Copying, and work on chains that is made of it.

use std::ffi::{OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;

use super::guard::{self, Fail, image};
use super::options::{options_arg, text_arg};
use super::*;
use crate::image::copy;

/// Copy all bytes of the device `from` to the beginning of `to`, in parallel.
///
/// What reads as zeroes is not read, and in `to` it is zeroed where it does not read so yet. `to` must
/// be open for writing and have at least as many bytes; what it has beyond those of `from` stays.
/// Both may be used meanwhile, but what is written to either then may be copied or not.
/// qblk_flush() makes the copy last.
///
/// `options` may be NULL. They are "compress" (on: clusters are written in compressed form, as
/// qblk_write_compressed() does), "threads" (1 to 64; as many as there are processors), "sparse" (bytes:
/// the shortest run of zeroes in data that is not written as data, a multiple of 4096; 0 = zeroes are
/// written too; 4k), "target-is-zero" (on: `to` is known to read as zeroes) and "compare" (on: `to` is
/// read, and only what differs is written: for an overlay).
///
/// The one flag is QBLK_COPY_SHALLOW: only what `from` has itself is copied, not what shows from images
/// below, which is left as it is in `to`: a copy of one image of a chain. `progress` (NULL: nobody)
/// is called by the calling thread, in bytes.
///
/// Returns 0; -EINVAL for a NULL, another flag, an option that is unknown or has a value that it
/// cannot have, a `to` that is too small, is `from` or is part of its chain (nothing is written then);
/// -ECANCELED if `progress` said so; -ENOTSUP where compressed writes are not to be had; else as
/// qblk_pread() and qblk_pwrite2(). After an error a part may have been copied. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_copy(
    from: *mut qblk,
    to: *mut qblk,
    options: *const qblk_options,
    flags: u32,
    progress: qblk_progress_fn,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: handles or NULL, and options or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_copy", from, |from| {
            let to = to.as_ref().ok_or(Fail::Argument("the target's handle is NULL"))?;
            let shallow = data::known_flags(flags, QBLK_COPY_SHALLOW)?.0 != 0;
            let (from, to, options) = (image(from)?, image(to)?, options_arg(options));
            guard::with_progress(progress, opaque, |progress| {
                copy(from, to, &options, shallow, progress).map(|_| ())
            })?;
            Ok(())
        })
    }
}

/// Write what the image has itself into its backing image, and empty it.
///
/// The backing image, whatever its format, is opened for writing meanwhile, which nobody else may have
/// open; it grows if it is smaller. What is committed is on stable storage before the image is
/// emptied, and what the device reads is the same all the time. The one flag is QBLK_COMMIT_KEEP:
/// the image keeps what it has. `progress` (NULL: nobody) is called by the calling thread, in bytes.
///
/// Other calls on the device wait until this has ended. Other overlays of the backing image read
/// otherwise afterwards.
///
/// Returns 0; -EINVAL for a NULL, another flag, and where no backing image is open; -EROFS on a handle
/// without QBLK_OPEN_RDWR; QBLK_ELOCKED if somebody has the backing image; -ECANCELED if `progress` said
/// so; else as qblk_pread(), qblk_pwrite2() and qblk_resize(). After an error a part may have been
/// committed; the image itself is whole then. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_commit(
    dev: *mut qblk,
    flags: u32,
    progress: qblk_progress_fn,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: a handle or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_commit", dev, |dev| {
            let keep = data::known_flags(flags, QBLK_COMMIT_KEEP)?.0 != 0;
            let image = image(dev)?;
            Ok(guard::with_progress(progress, opaque, |progress| image.commit(keep, progress))?)
        })
    }
}

/// Put another image below: the image names `backing` (NULL: none) as its backing file from now on.
///
/// `backing` is a path, seen from the image's directory, and recorded as it is given. What would read
/// otherwise with it is copied into the image first and put on stable storage; then the header is
/// switched. So what the device reads stays the same, whenever the power is cut. With the flag
/// QBLK_REBASE_UNSAFE only the name is changed: for a backing file that was moved, or was replaced by one
/// that holds the same. Then it need not be there, if its format is given; if it can not be opened the
/// device goes on with the old one until it is closed.
///
/// `options` may be NULL. They are "backing-fmt" (the format, which is found by probing now if it is not
/// given, and recorded) and "threads". `progress` (NULL: nobody) is called by the calling thread, in
/// bytes. Other calls on the device wait until this has ended.
///
/// Returns 0; -EINVAL for a NULL, another flag, an option that has no use here, a name that is too long,
/// and on a device that was opened without its backing file; -ENOTSUP for a format that has none;
/// -EFBIG if the name does not fit into the header; -EROFS; -ECANCELED; QBLK_EPOLICY for an image that
/// would stand on itself; else as qblk_open2() and qblk_pwrite2(). After an error a part may have been
/// copied; the device reads the same. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_rebase(
    dev: *mut qblk,
    backing: *const c_char,
    options: *const qblk_options,
    flags: u32,
    progress: qblk_progress_fn,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: a handle or NULL, a string or NULL, and options or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_rebase", dev, |dev| {
            let blind = data::known_flags(flags, QBLK_REBASE_UNSAFE)?.0 != 0;
            let backing = match backing.is_null() {
                true => OsStr::new(""),
                false => OsStr::from_bytes(text_arg(backing, "")?.to_bytes()),
            };
            let (image, options) = (image(dev)?, options_arg(options));
            guard::with_progress(progress, opaque, |progress| {
                image.rebase(backing, &options, blind, progress)
            })?;
            Ok(())
        })
    }
}
