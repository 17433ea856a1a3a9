//! Plugins: registering the program's own, and what plugins call. What a plugin is, is told in
//! include/qblk-plugin.h.

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use super::guard::Fail;
use super::options::{out_arg, text_arg};
use super::*;
use crate::block::quoted;
use crate::log::{Level, log};
use crate::plugin::{self, ExportsList, ExtentsList, LayerSource, method};

/// What a plugin fills: see qblk-plugin.h.
pub struct qblk_plugin(());
/// What a layer stands on: contexts are opened on it by qblk_source_open(). It is the library's, and there
/// from the call of the layer's function open_layer until its function close has returned.
pub struct qblk_source(());
/// Where a plugin puts what it describes: see qblk_plugin_add_extent().
pub struct qblk_extent_list(());
/// Where a plugin puts what it exports: see qblk_plugin_add_export().
pub struct qblk_export_list(());

/// Register a plugin of the program's own, so that "plugin:NAME" opens instances of it.
///
/// `plugin` is a struct as qblk-plugin.h has it (its macro QBLK_REGISTER_PLUGIN sets its size and
/// version and calls this); it is copied. `opaque` is what its function open is given. Names have none of
/// '/', '?' and '%', and come before files of the same name.
///
/// Returns 0; -EEXIST if the name is taken; -EINVAL for a NULL, and for a struct that lacks something or
/// is of another version: qblk_get_error() says what. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_register_plugin(
    plugin: *const qblk_plugin,
    opaque: *mut c_void,
) -> c_int {
    guard::call("qblk_register_plugin", || {
        if plugin.is_null() {
            return Err(Fail::Argument("the plugin is NULL"));
        }
        guard::alive()?;
        // SAFETY: a struct of as many bytes as it says, as the manual asks.
        Ok(unsafe { plugin::register(plugin.cast(), opaque) }?)
    })
}

/// Forget a plugin that was registered. Its functions are not called any more.
///
/// Returns 0; -EBUSY while devices on it are open, and then it stays; -ENOENT if none of that name is
/// registered; -EINVAL for a NULL. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_unregister_plugin(name: *const c_char) -> c_int {
    guard::call("qblk_unregister_plugin", || {
        // SAFETY: as the manual asks.
        let name = unsafe { text_arg(name, "the name is NULL") }?;
        guard::alive()?;
        Ok(plugin::unregister(name.to_bytes())?)
    })
}

/// qblk_plugin.passes: reading goes to what qblk_layer_set_next() was given.
pub const QBLK_METHOD_READ: u64 = 1;
/// qblk_plugin.passes: so does writing.
pub const QBLK_METHOD_WRITE: u64 = 2;
/// qblk_plugin.passes: so does flushing.
pub const QBLK_METHOD_FLUSH: u64 = 4;
/// qblk_plugin.passes: so does trimming.
pub const QBLK_METHOD_TRIM: u64 = 8;
/// qblk_plugin.passes: so does zeroing.
pub const QBLK_METHOD_ZERO: u64 = 16;
/// qblk_plugin.passes: so does bringing near.
pub const QBLK_METHOD_CACHE: u64 = 32;
/// qblk_plugin.passes: so do descriptions of ranges.
pub const QBLK_METHOD_EXTENTS: u64 = 64;

const _: () = {
    assert!(QBLK_METHOD_READ == method::READ && QBLK_METHOD_WRITE == method::WRITE);
    assert!(QBLK_METHOD_FLUSH == method::FLUSH && QBLK_METHOD_TRIM == method::TRIM);
    assert!(QBLK_METHOD_ZERO == method::ZERO && QBLK_METHOD_CACHE == method::CACHE);
    assert!(QBLK_METHOD_EXTENTS == method::EXTENTS);
};

/// Called by a layer: open a context on what it stands on. Any number of them, at any time from its
/// function open_layer until its function close has returned, from any thread, its own too.
///
/// The one flag is QBLK_OPEN_RDWR. What one context writes, the others read. The layer closes it with
/// qblk_close().
///
/// Returns 0 and the context in `*out`; on failure `*out` is NULL: -EROFS where what is below is not open
/// for writing, -EINVAL for a NULL and for another flag. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_source_open(
    source: *mut qblk_source,
    flags: u32,
    out: *mut *mut qblk,
) -> c_int {
    guard::call("qblk_source_open", || {
        // SAFETY: as the manual asks.
        let out = unsafe { out_arg(out) }?;
        guard::alive()?;
        // SAFETY: NULL, or a source that is still there, as the manual asks.
        let source = unsafe { source.cast::<LayerSource>().as_ref() };
        let source = source.ok_or(Fail::Argument("the source is NULL"))?;
        if flags & !QBLK_OPEN_RDWR != 0 {
            return Err(Fail::Argument("a context of a source takes QBLK_OPEN_RDWR only"));
        }
        let handle = source.handle(flags & QBLK_OPEN_RDWR != 0)?.downcast::<Image>();
        let image = handle.map_err(|_| crate::block::Error::Internal("no image".into()))?;
        *out = life::adopt_inner(*image);
        Ok(())
    })
}

/// Called by a layer: the methods that its struct passes on (`passes`) go to the context `next` from now
/// on, and its size is that of `next` if it has no function get_size. NULL: to none.
///
/// `next` is a context of this source. The library opens one of its own beside it; `next` stays the layer's
/// to close. To be called before config_complete returns (or open_layer, where there is none); called again
/// it swaps them, while requests run.
///
/// Returns 0; -EINVAL for a NULL source, and for a context of anything else. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_layer_set_next(source: *mut qblk_source, next: *mut qblk) -> c_int {
    guard::call("qblk_layer_set_next", || {
        guard::alive()?;
        // SAFETY: NULL, or a source that is still there, as the manual asks.
        let source = unsafe { source.cast::<LayerSource>().as_ref() };
        let source = source.ok_or(Fail::Argument("the source is NULL"))?;
        // SAFETY: NULL or a handle, as the manual asks.
        let next = match unsafe { next.as_ref() } {
            None => None,
            Some(next) => {
                let next = guard::image(next)?;
                // Methods passed on to the device that stands on the layer would come back for ever.
                if !source.has(next) {
                    return Err(Fail::Argument("next is no context of this source"));
                }
                let context = crate::image::context_of(next.own_context()?)?;
                Some(crate::block::Device::new(context))
            }
        };
        source.set_next(next);
        Ok(())
    })
}

/// Called by a plugin's function before it returns -1: the code that the call is to fail with, an errno
/// (of either sign) or QBLK_E... The last of several counts. Outside of such a function it does nothing.
///
/// Cannot fail. Any thread that is in a function of a plugin. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn qblk_plugin_set_error(code: c_int) {
    plugin::set_error(code);
}

/// Called by a plugin's function before it fails: why, in words (at most 1024 bytes are kept). It becomes
/// part of what qblk_get_error() says. qblk-plugin.h has qblk_plugin_error(), which formats as printf()
/// does. NULL takes it back.
///
/// Cannot fail. Any thread that is in a function of a plugin. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_plugin_set_error_text(text: *const c_char) {
    // SAFETY: NULL or a string, as the manual asks.
    let text = if text.is_null() { c"" } else { unsafe { CStr::from_ptr(text) } };
    plugin::set_error_text(text.to_bytes());
}

/// Send a line to the log at the level QBLK_LOG_DEBUG: see qblk_set_log(). qblk-plugin.h has
/// qblk_plugin_debug(), which formats as printf() does.
///
/// Cannot fail; NULL does nothing. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_plugin_debug_text(text: *const c_char) {
    let _ = guard::guarded("qblk_plugin_debug_text", None, || {
        if !text.is_null() {
            // SAFETY: a string, as the manual asks.
            let text = unsafe { CStr::from_ptr(text) }.to_bytes();
            log(Level::Debug, format_args!("plugin: {}", quoted(text)));
        }
        Ok(())
    });
}

fn setting(key: *const c_char) -> String {
    // SAFETY: NULL or a string, as the manuals of the callers ask.
    let key = if key.is_null() { c"" } else { unsafe { CStr::from_ptr(key) } };
    quoted(key.to_bytes())
}

fn parsed<T>(
    key: *const c_char,
    value: *const c_char,
    expected: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T, Fail> {
    // SAFETY: NULL or a string, as the manuals of the callers ask.
    let value = unsafe { text_arg(value, "the value is NULL") }?;
    value.to_str().ok().and_then(parse).ok_or_else(|| {
        let found = quoted(value.to_bytes());
        Fail::Code(-libc::EINVAL, format!("{}: found {found}, expected {expected}", setting(key)))
    })
}

/// Read a size in bytes: a whole number, and k, M, G, T, P or E (times 1024 each) behind it.
///
/// `key` is named in the error's text; NULL is "".
///
/// Returns 0 and the bytes in `*out`; -EINVAL for anything else, and for a NULL. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_plugin_parse_size(
    key: *const c_char,
    value: *const c_char,
    out: *mut u64,
) -> c_int {
    guard::call("qblk_plugin_parse_size", || {
        // SAFETY: as the manual asks.
        let out = unsafe { out.as_mut() }.ok_or(Fail::Argument("out is NULL"))?;
        let expected = "a size such as 512, 64k, 2M, 1G";
        *out = parsed(key, value, expected, crate::image::parse_size)?;
        Ok(())
    })
}

/// Read a whole number, decimal or with 0x before it.
///
/// Returns as qblk_plugin_parse_size(). Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_plugin_parse_uint64(
    key: *const c_char,
    value: *const c_char,
    out: *mut u64,
) -> c_int {
    guard::call("qblk_plugin_parse_uint64", || {
        // SAFETY: as the manual asks.
        let out = unsafe { out.as_mut() }.ok_or(Fail::Argument("out is NULL"))?;
        *out = parsed(key, value, "a whole number such as 10 or 0x1f", |text| {
            let plain = |digits: &str| digits.bytes().all(|b| b.is_ascii_hexdigit());
            match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
                Some(digits) => u64::from_str_radix(digits, 16).ok().filter(|_| plain(digits)),
                None => text.parse().ok().filter(|_| plain(text)),
            }
        })?;
        Ok(())
    })
}

/// Read a switch: on, true, yes, 1 or off, false, no, 0, in letters of either case.
///
/// Returns as qblk_plugin_parse_size(), with 1 or 0 in `*out`. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_plugin_parse_bool(
    key: *const c_char,
    value: *const c_char,
    out: *mut c_int,
) -> c_int {
    guard::call("qblk_plugin_parse_bool", || {
        // SAFETY: as the manual asks.
        let out = unsafe { out.as_mut() }.ok_or(Fail::Argument("out is NULL"))?;
        *out = parsed(key, value, "on or off", |text| match text.to_ascii_lowercase().as_str() {
            "on" | "true" | "yes" | "1" => Some(1),
            "off" | "false" | "no" | "0" => Some(0),
            _ => None,
        })?;
        Ok(())
    })
}

/// Make a path independent of the working directory, which need not be the same later. The file need not
/// be there, and links are left as they are.
///
/// Returns 0 and the path in `*out`, to be freed with free(); -EINVAL for a NULL or an empty path;
/// -ENOMEM; on failure `*out` is NULL. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_plugin_absolute_path(
    path: *const c_char,
    out: *mut *mut c_char,
) -> c_int {
    guard::call("qblk_plugin_absolute_path", || {
        // SAFETY: as the manual asks.
        let (out, path) = unsafe { (out_arg(out)?, text_arg(path, "the path is NULL")?) };
        let path = Path::new(OsStr::from_bytes(path.to_bytes()));
        let whole = std::path::absolute(path).map_err(|e| {
            let errno = e.raw_os_error().unwrap_or(libc::EINVAL);
            Fail::Code(-errno, format!("{}: {e}", quoted(path.as_os_str().as_bytes())))
        })?;
        let whole = CString::new(whole.into_os_string().into_vec());
        let whole = whole.map_err(|_| Fail::Argument("the path has a NUL byte in it"))?;
        // SAFETY: a C string; what it answers is the caller's to free.
        *out = unsafe { libc::strdup(whole.as_ptr()) };
        match out.is_null() {
            true => Err(Fail::Code(-libc::ENOMEM, "no memory for a path".into())),
            false => Ok(()),
        }
    })
}

/// Called by a plugin's function extents: the next extent of what it was asked to describe.
///
/// Extents follow one another; the first begins at the offset that was asked for, or before it, and the
/// last ends where the range does, or behind it (if it ends before, the rest is asked for again). `offset`
/// and `length` are bytes. `flags`: QBLK_EXTENT_DATA, or QBLK_EXTENT_ZERO for a hole, or both for zeroes
/// that take space.
///
/// Returns 0; -EINVAL for a NULL, and for an extent that does not follow the one before: the whole call
/// fails then. In the function extents only, on its thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_plugin_add_extent(
    list: *mut qblk_extent_list,
    offset: u64,
    length: u64,
    flags: u32,
) -> c_int {
    guard::call("qblk_plugin_add_extent", || {
        // SAFETY: NULL, or the list that the function was given, as the manual asks.
        let list = unsafe { list.cast::<ExtentsList>().as_mut() };
        let list = list.ok_or(Fail::Argument("the list is NULL"))?;
        list.add(offset, length, flags).map_err(|why| Fail::Code(-libc::EINVAL, why))
    })
}

/// Called by a plugin's function list_exports: another export, by its name, and in words (NULL: none).
///
/// Returns 0; -EINVAL for a NULL; -E2BIG for the 65537th. In the function list_exports only, on its
/// thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_plugin_add_export(
    list: *mut qblk_export_list,
    name: *const c_char,
    description: *const c_char,
) -> c_int {
    guard::call("qblk_plugin_add_export", || {
        // SAFETY: NULL, or the list that the function was given, as the manual asks.
        let list = unsafe { list.cast::<ExportsList>().as_mut() };
        let list = list.ok_or(Fail::Argument("the list is NULL"))?;
        // SAFETY: NULL or strings, as the manual asks.
        let (name, description) = unsafe {
            let text = if description.is_null() { c"" } else { CStr::from_ptr(description) };
            (text_arg(name, "the name is NULL")?, text)
        };
        if list.len() >= 65536 {
            return Err(Fail::Code(-libc::E2BIG, "more than 65536 exports".into()));
        }
        list.push((name.to_bytes().to_vec(), description.to_bytes().to_vec()));
        Ok(())
    })
}
