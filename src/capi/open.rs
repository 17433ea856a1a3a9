//! Opening, closing, contexts.

use std::ffi::{CStr, OsStr, c_char, c_int};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use super::guard::{Fail, image};
use super::options::{options_arg, out_arg, text_arg};
use super::*;
use crate::block::{Error, Name};

const NO_NAME: &str = "the name is NULL";

/// Open the device `name`: qblk_open2() without options.
///
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_open(name: *const c_char, flags: u32, out: *mut *mut qblk) -> c_int {
    guard::call("qblk_open", || {
        // SAFETY: as the manual asks.
        let (out, name) = unsafe { (out_arg(out)?, text_arg(name, NO_NAME)?) };
        open(name, &Options::new(), flags, out)
    })
}

/// Open the device `name`, with `options` (NULL: none) and flags (QBLK_OPEN_...).
///
/// `name` is a path, "file:PATH" (needed when a path begins like a URI), "mem:SIZE" (memory that
/// begins as zeroes and goes when it is closed), an NBD URI ("nbd://HOST:PORT/EXPORT",
/// "nbd+unix:///EXPORT?socket=PATH", "nbd+vsock://CID:PORT/EXPORT"; "nbds..." with TLS),
/// "nbd+exec:///EXPORT" (a server that is started: option "argv"), or a plugin ("plugin:PATH?KEY=VALUE&...",
/// "plugin:NAME" of one that was registered; see qblk-plugin.h). It need not be UTF-8. Without the
/// option "format" the format is found by probing; a raw image found so refuses a write that would make
/// its first sector look like another format.
///
/// Returns 0 and the device in `*out`, to be closed with qblk_close(). On failure `*out` is
/// NULL, and the code is -EINVAL (a NULL, an unknown flag, an unknown option or one that has no use
/// here, QBLK_OPEN_UNTRUSTED without a format), the system's (-ENOENT, -EACCES, -EISDIR...),
/// QBLK_EFORMAT, QBLK_ECORRUPT, QBLK_EUNSUPPORTED, QBLK_ELOCKED or QBLK_EPOLICY (a backing
/// chain that is a loop, or goes where it may not); of an NBD export also -ENOENT (no such export),
/// -ECONNREFUSED and others of connecting, -EACCES (TLS, or the server's policy), -EROFS (read-only,
/// opened for writing), QBLK_EPROTO. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_open2(
    name: *const c_char,
    options: *const qblk_options,
    flags: u32,
    out: *mut *mut qblk,
) -> c_int {
    guard::call("qblk_open2", || {
        // SAFETY: as the manual asks.
        let (out, name) = unsafe { (out_arg(out)?, text_arg(name, NO_NAME)?) };
        // SAFETY: as the manual asks.
        open(name, &unsafe { options_arg(options) }, flags, out)
    })
}

fn open(name: &CStr, options: &Options, flags: u32, out: &mut *mut qblk) -> Result<(), Fail> {
    guard::alive()?;
    let image = Image::open(OsStr::from_bytes(name.to_bytes()), options, OpenFlags(flags))?;
    tell::done("opened", tell::Name(name.to_bytes()), tell::Flags(flags));
    *out = life::adopt(image);
    Ok(())
}

/// Open the file or block device behind the descriptor `fd`, as qblk_open2() opens a name; or, if it
/// is a connected socket, the export of the NBD server at its other end that the option "nbd.export"
/// names.
///
/// The library works on a duplicate; `fd` stays the caller's and may be closed at once. For
/// QBLK_OPEN_RDWR a file must be open for writing. A socket is one connection, which can not be made
/// again when it is lost.
///
/// Returns as qblk_open2(); -EBADF if `fd` is none. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_open_fd(
    fd: c_int,
    options: *const qblk_options,
    flags: u32,
    out: *mut *mut qblk,
) -> c_int {
    guard::call("qblk_open_fd", || {
        // SAFETY: as the manual asks.
        let (out, options) = unsafe { (out_arg(out)?, options_arg(options)) };
        guard::alive()?;
        let image = Image::open_fd(duplicate(fd)?, &options, OpenFlags(flags))?;
        tell::done("opened descriptor", fd, tell::Flags(flags));
        *out = life::adopt(image);
        Ok(())
    })
}

pub(super) fn duplicate(fd: c_int) -> Result<OwnedFd, Fail> {
    // SAFETY: fcntl looks at a number, which may be any.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(Error::os("duplicate", &Name::from(format!("descriptor {fd}"))).into());
    }
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Flush and close a device. NULL is a success that does nothing.
///
/// The handle is freed whatever the answer is. A device is closed with its last context.
///
/// Returns 0; or the first failure to write that was not reported yet: what was written since the
/// last qblk_flush() may then be lost. In a child of fork it only frees, and answers 0.
/// Any thread, as the last call on this handle. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_close(dev: *mut qblk) -> c_int {
    guard::guarded("qblk_close", None, || {
        if dev.is_null() {
            return Ok(());
        }
        if crate::plugin::is_inside() {
            // SAFETY: a handle, as the manual asks.
            unsafe { &*dev }.image.refuse_reentry()?;
        }
        // SAFETY: a handle, and the last call on it, as the manual asks.
        unsafe { life::Closing::begin(dev) }.map_or(Ok(()), life::Closing::finish)
    })
}

/// Open another context of the device that `dev` is a context of.
///
/// It is a handle with its own flags (QBLK_OPEN_RDWR, QBLK_OPEN_SHARED, QBLK_OPEN_NO_LOCK) that
/// shares all state of the image: what one writes, the other reads. Closing one leaves the other
/// working. `options` may be NULL.
///
/// Returns 0 and the context in `*out`; on failure `*out` is NULL: -EROFS for QBLK_OPEN_RDWR on
/// a device that is not open for writing, -EINVAL for other flags and for options that have no
/// use here. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_context_open(
    dev: *mut qblk,
    options: *const qblk_options,
    flags: u32,
    out: *mut *mut qblk,
) -> c_int {
    // SAFETY: a handle or NULL, as the manual asks; so are the other arguments.
    unsafe {
        if dev.is_null() && !out.is_null() {
            out.write(std::ptr::null_mut());
        }
        guard::on("qblk_context_open", dev, |dev| {
            let (out, options) = (out_arg(out)?, options_arg(options));
            let context = image(dev)?.context(&options, OpenFlags(flags))?;
            tell::done("another context of", tell::Of(&context), tell::Flags(flags));
            *out = life::adopt(context);
            Ok(())
        })
    }
}

/// Open the device anew with other flags, beneath the handle and all its contexts: qblk_reopen2()
/// with the options that it was opened with.
///
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_reopen(dev: *mut qblk, flags: u32) -> c_int {
    // SAFETY: a handle or NULL, as the manual asks.
    unsafe { guard::on("qblk_reopen", dev, |dev| Ok(image(dev)?.reopen(None, OpenFlags(flags))?)) }
}

/// Open the device anew with other options and flags, beneath the handle and all its contexts.
///
/// The new one is opened first; calls on the device wait meanwhile. NULL options are those that
/// it was opened with. A device that refuses writes because a flush failed takes them again.
///
/// A device that was opened by descriptor is opened anew by a duplicate of it.
///
/// Returns 0; on failure, as qblk_open2(), all stays as it was. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_reopen2(
    dev: *mut qblk,
    options: *const qblk_options,
    flags: u32,
) -> c_int {
    // SAFETY: a handle or NULL, as the manual asks; so are the options.
    unsafe {
        guard::on("qblk_reopen2", dev, |dev| {
            let options = (!options.is_null()).then(|| options_arg(options));
            reopen(image(dev)?, options.as_ref(), flags)
        })
    }
}

fn reopen(image: &Image, options: Option<&Options>, flags: u32) -> Result<(), Fail> {
    image.reopen(options, OpenFlags(flags))?;
    tell::done("reopened", tell::Of(image), tell::Flags(flags));
    Ok(())
}
