//! Changing what an image is like.

use std::ffi::{c_int, c_void};

use super::data::known_flags;
use super::guard::{self, image, with_progress};
use super::options::options_arg;
use super::*;

/// Change what an image is like, as `options` say: all of it, or nothing.
///
/// Of a qcow2 image: "compat" ("0.10" or "1.1"), "refcount-bits", "lazy-refcounts", "backing-file" and
/// "backing-fmt" (what is recorded; empty for none), "data-file-raw" ("off"), and its key slots:
/// "encrypt.state" ("active" adds a passphrase, "inactive" takes one away), "encrypt.new-secret",
/// "encrypt.old-secret", "encrypt.keyslot", "encrypt.iter-time", which change in a call of their own
/// (-EINVAL with the others). Of a LUKS image the same for key slots without "encrypt.". There are no
/// flags yet, so `flags` must be 0.
///
/// `progress` (NULL: nobody) is told how far it is, with `opaque`, and may stop it: -ECANCELED. It is
/// on stable storage when the call returns; a power cut before leaves the image as it was. Calls of
/// other threads on the device wait meanwhile. Unless it was key slots that changed the image is opened
/// anew beneath the handle and all its contexts, as by qblk_reopen(); if only that fails the image is
/// amended, and the handle refuses to write until it is reopened.
///
/// Returns 0; -EINVAL for a NULL, a flag, an option that has no use here or a value that it can not have
/// (refcounts too narrow for what there is, say); -ENOTSUP for a format that has nothing to amend;
/// QBLK_EUNSUPPORTED for a version that lacks what the image has; QBLK_ENEEDKEY and QBLK_EBADKEY;
/// -EROFS on a handle without QBLK_OPEN_RDWR; -ENOSPC and other codes of the system; QBLK_ECORRUPT;
/// as qblk_reopen(). Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_amend(
    dev: *mut qblk,
    options: *const qblk_options,
    flags: u32,
    progress: qblk_progress_fn,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: a handle or NULL, and options or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_amend", dev, |dev| {
            known_flags(flags, 0)?;
            let (options, image) = (options_arg(options), image(dev)?);
            Ok(with_progress(progress, opaque, |progress| image.amend(&options, progress))?)
        })
    }
}
