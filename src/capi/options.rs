//! Options: key=value settings for a call.

use std::ffi::{CStr, c_char, c_int};

use super::guard::Fail;
use super::*;

/// Make an empty set of options, for qblk_options_set(). Free it with qblk_options_free().
///
/// Returns 0 and the options in `*out`; -EINVAL if `out` is NULL. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_options_new(out: *mut *mut qblk_options) -> c_int {
    guard::call("qblk_options_new", || {
        // SAFETY: as the manual asks.
        let out = unsafe { out_arg(out) }?;
        guard::alive()?;
        *out = Box::into_raw(Box::new(qblk_options(Mutex::new(Options::new()))));
        Ok(())
    })
}

/// Set `key` to a copy of `value`; a NULL value removes the key.
///
/// Keys are lower case with hyphens; an underscore is the same as a hyphen. The call that uses the
/// options is the one that refuses a key which it does not know or has no use for. A value may
/// hold any bytes (a file's name does).
///
/// Returns 0; -EINVAL if `o` or `key` is NULL. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_options_set(
    o: *mut qblk_options,
    key: *const c_char,
    value: *const c_char,
) -> c_int {
    guard::call("qblk_options_set", || {
        // SAFETY: NULL or options, as the manual asks.
        let options = unsafe { o.as_ref() }.ok_or(Fail::Argument("the options are NULL"))?;
        // SAFETY: as the manual asks.
        let key = unsafe { text_arg(key, "the key is NULL") }?;
        // SAFETY: NULL or a string, as the manual asks.
        let value = (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) }.to_bytes());
        guard::alive()?;
        options.0.lock().set(&key.to_string_lossy(), value);
        Ok(())
    })
}

/// Free options; NULL does nothing. No call may be using them.
///
/// Cannot fail. Any thread, also in a child of fork. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_options_free(o: *mut qblk_options) {
    if !o.is_null() {
        // SAFETY: made by qblk_options_new, and this is the last use, as the manual asks.
        drop(unsafe { Box::from_raw(o) });
    }
}

/// A copy of a call's options; NULL is none.
///
/// # Safety
/// `o` is NULL, or options that nobody frees during the call.
pub(super) unsafe fn options_arg(o: *const qblk_options) -> Options {
    if guard::forked() {
        // The call is refused in any case, and who held the lock at fork is not here.
        return Options::new();
    }
    // SAFETY: the caller's word.
    unsafe { o.as_ref() }.map(|o| o.0.lock().clone()).unwrap_or_default()
}

/// A string that the call needs.
///
/// # Safety
/// `text` is NULL, or a string that lives as long as the answer is used.
pub(super) unsafe fn text_arg<'a>(
    text: *const c_char,
    if_null: &'static str,
) -> Result<&'a CStr, Fail> {
    if text.is_null() {
        return Err(Fail::Argument(if_null));
    }
    // SAFETY: the caller's word.
    Ok(unsafe { CStr::from_ptr(text) })
}

/// Where a handle is to be put; NULL is there until it is.
///
/// # Safety
/// `out` is NULL, or good for writing for as long as the answer is used.
pub(super) unsafe fn out_arg<'a, T>(out: *mut *mut T) -> Result<&'a mut *mut T, Fail> {
    if out.is_null() {
        return Err(Fail::Argument("'out', where the handle is to be put, is NULL"));
    }
    // SAFETY: the caller's word. What is there may be uninitialised, so it is written first.
    unsafe {
        out.write(std::ptr::null_mut());
        Ok(&mut *out)
    }
}
