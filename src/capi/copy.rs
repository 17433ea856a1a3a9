//! Copying, and work on chains that is made of it.

use std::ffi::{c_int, c_void};

use super::guard::{self, Fail, image};
use super::options::options_arg;
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
