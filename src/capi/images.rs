//! Work on whole images.

use std::ffi::{OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;

use super::guard::{self, Fail, image};
use super::options::{options_arg, text_arg};
use super::*;
use crate::block::OneIov;
use crate::image::create;

/// Make the image `name` of `format` ("qcow2", "raw") with `size` bytes, all zero.
///
/// `options` (NULL: none) have the names and values of `qemu-img create -o`: "cluster-size",
/// "backing-file", "backing-fmt", "preallocation"..., and "exclusive" ("on" fails if the file
/// exists). A file that is in use is never overwritten, and no half file is left on failure.
///
/// Returns 0; -EINVAL for a NULL, an unknown format, an option that is unknown, has no use here
/// or a value that it cannot have; -EEXIST with exclusive=on; -EFBIG for a size that the format
/// cannot have; QBLK_ELOCKED; QBLK_EUNSUPPORTED; the system's codes. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_create(
    name: *const c_char,
    format: *const c_char,
    size: u64,
    options: *const qblk_options,
) -> c_int {
    guard::call("qblk_create", || {
        // SAFETY: strings, as the manual asks.
        let (name, format) = unsafe {
            (text_arg(name, "the name is NULL")?, text_arg(format, "the format is NULL")?)
        };
        guard::alive()?;
        // SAFETY: as the manual asks.
        let options = unsafe { options_arg(options) };
        let format = format.to_string_lossy();
        create(OsStr::from_bytes(name.to_bytes()), &format, size, &options)?;
        tell::done(
            "created",
            tell::Name(name.to_bytes()),
            format_args!(", {format}, {size} bytes"),
        );
        Ok(())
    })
}

/// Change the size of the device to `size` bytes: qblk_resize2() without options.
///
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_resize(dev: *mut qblk, size: u64, flags: u32) -> c_int {
    // SAFETY: a handle or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_resize", dev, |dev| {
            let shrink = shrink(flags)?;
            Ok(image(dev)?.resize(size, &Options::new(), shrink)?)
        })
    }
}

/// Change the size of the device to `size` bytes; bytes that come into being read as zeroes.
///
/// QBLK_RESIZE_SHRINK must be set for a size below the present one: the bytes beyond it are lost.
/// The one option is "preallocation" (off, metadata, falloc, full): what is done about room for
/// new bytes. `options` may be NULL.
///
/// Returns 0; -EINVAL for a smaller size without the flag, another flag, an option that has no use
/// here; -EROFS on a handle without QBLK_OPEN_RDWR; -EBADF on one that is open for its description
/// only; -ENOTSUP for a device whose size is fixed; -EFBIG, -ENOSPC and other codes of the
/// system. Any thread; other calls on the device may run meanwhile. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_resize2(
    dev: *mut qblk,
    size: u64,
    options: *const qblk_options,
    flags: u32,
) -> c_int {
    // SAFETY: a handle or NULL, and options or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_resize2", dev, |dev| {
            let (shrink, options) = (shrink(flags)?, options_arg(options));
            Ok(image(dev)?.resize(size, &options, shrink)?)
        })
    }
}

/// Write `count` bytes of `buf` at `offset` in compressed form, by the image's compression type.
///
/// `offset` and `count` are bytes, and multiples of the cluster size (qblk_info), but for the image's
/// end, which may cut the last cluster. What there was before is replaced. A cluster that does not
/// get smaller is written as it is; compressed ones share clusters of the host. Compressing is done
/// by the calling thread, and several threads compress at once; qblk_copy() uses as many as there
/// are processors. A later qblk_pwrite() to such a cluster writes it out at full size.
///
/// Returns 0; -ENOTSUP, with nothing written, for a format that has no compression, and for images
/// with encryption or an external data file; -EINVAL for a NULL, for parts of clusters, and for a
/// range that leaves the device; else as qblk_pwrite2(). Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_write_compressed(
    dev: *mut qblk,
    buf: *const c_void,
    count: usize,
    offset: u64,
) -> c_int {
    // SAFETY: a handle or NULL, and memory of `count` bytes, as the manual asks.
    unsafe {
        guard::on("qblk_write_compressed", dev, |dev| {
            let from = OneIov::from_raw(data::memory(buf.cast_mut(), count)?, count);
            Ok(image(dev)?.write_compressed(from.iov(), offset)?)
        })
    }
}

fn shrink(flags: u32) -> Result<bool, Fail> {
    data::known_flags(flags, QBLK_RESIZE_SHRINK)?;
    Ok(flags & QBLK_RESIZE_SHRINK != 0)
}
