//! Version, features, codes and log.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use super::*;
use crate::log::{Level, Sink, set_sink};

/// The header's version, as three numbers. qblk_version() is that of the library that is loaded.
pub const QBLK_VERSION_MAJOR: u32 = 0;
/// The header's version, second number.
pub const QBLK_VERSION_MINOR: u32 = 1;
/// The header's version, third number.
pub const QBLK_VERSION_MICRO: u32 = 0;
/// The header's version as one number, to compare with qblk_version().
pub const QBLK_VERSION: u32 =
    (QBLK_VERSION_MAJOR << 24) | (QBLK_VERSION_MINOR << 16) | QBLK_VERSION_MICRO;

// Cargo.toml has the version; these can not leave it.
const _: () = {
    assert!(QBLK_VERSION_MAJOR == number(env!("CARGO_PKG_VERSION_MAJOR")));
    assert!(QBLK_VERSION_MINOR == number(env!("CARGO_PKG_VERSION_MINOR")));
    assert!(QBLK_VERSION_MICRO == number(env!("CARGO_PKG_VERSION_PATCH")));
};

const fn number(text: &str) -> u32 {
    match u32::from_str_radix(text, 10) {
        Ok(n) => n,
        Err(_) => panic!("not a number"),
    }
}

const VERSION_STRING: &CStr =
    match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(s) => s,
        Err(_) => panic!("a NUL in the version"),
    };

/// What this build can do.
const FEATURES: &[&str] = &[
    "bitmaps",
    "compress:deflate",
    "compress:zlib",
    "compress:zstd",
    "file",
    "encrypt:aes",
    "encrypt:luks",
    "format:luks",
    "format:qcow2",
    "format:raw",
    "io:mmap",
    "layers",
    "mem",
    "nbd",
    "nbd:client",
    "nbd:server",
    "nbd:tls",
    "plugins",
];

/// The version of the library that is loaded: major << 24 | minor << 16 | micro.
///
/// Cannot fail. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn qblk_version() -> u32 {
    QBLK_VERSION
}

/// The version of the library that is loaded, as text: "0.1.0". Valid for ever.
///
/// Cannot fail. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn qblk_version_string() -> *const c_char {
    VERSION_STRING.as_ptr()
}

/// Whether the library that is loaded can do `feature`: 1 or 0.
///
/// Features are named "format:qcow2", "format:raw", "format:luks", "encrypt:luks", "compress:zlib",
/// "compress:zstd", "io:mmap", "mem", "file", "bitmaps", "nbd:client", "nbd:server", "nbd:tls",
/// "layers", "plugins". What it does not know, and NULL, is 0.
///
/// Cannot fail. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_supports(feature: *const c_char) -> c_int {
    if feature.is_null() {
        return 0;
    }
    // SAFETY: not NULL, so a string, as the manual asks.
    let feature = unsafe { CStr::from_ptr(feature) }.to_bytes();
    FEATURES.iter().any(|f| f.as_bytes() == feature).into()
}

/// The fixed text of a code that a call answered: one of QBLK_E..., or -errno. Valid for ever.
///
/// 0 and above are "success". It never answers NULL. qblk_get_error() tells more.
///
/// Cannot fail. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn qblk_strerror(code: c_int) -> *const c_char {
    let text = match code {
        0.. => c"success",
        QBLK_ECORRUPT => c"the image is corrupt",
        QBLK_EFORMAT => c"not an image of that format",
        QBLK_EUNSUPPORTED => c"the image needs a feature that this version lacks",
        QBLK_ELOCKED => c"in use by another process or handle",
        QBLK_ENEEDKEY => c"the image is encrypted and no key was given",
        QBLK_EBADKEY => c"the key does not open the image",
        QBLK_EPROTO => c"the NBD peer broke the protocol",
        QBLK_EPOLICY => c"the open policy forbids it",
        QBLK_EINTERNAL => c"internal error of libqblk",
        -4095..0 => return system_text(-code),
        _ => c"unknown error code",
    };
    text.as_ptr()
}

/// The system's text for an error number, one that lives for ever. (`strerror` of glibc does not
/// promise that.)
fn system_text(errno: c_int) -> *const c_char {
    #[cfg(target_env = "gnu")]
    let text = {
        unsafe extern "C" {
            safe fn strerrordesc_np(errno: c_int) -> *const c_char;
        }
        strerrordesc_np(errno)
    };
    // SAFETY: other libraries' strerror (musl's) answers static texts.
    #[cfg(not(target_env = "gnu"))]
    let text = unsafe { libc::strerror(errno) }.cast_const();
    if text.is_null() { c"unknown error number".as_ptr() } else { text }
}

/// This thread's last failure in full: function, file, what was found, what was expected.
///
/// UTF-8, at most 1023 bytes. Texts that come from an image or a peer stand in quotes, with
/// control characters escaped. Each call that can fail clears it first; it is "" then, never NULL.
/// The text is valid until this thread's next call that can fail.
///
/// Cannot fail. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn qblk_get_error() -> *const c_char {
    guard::last_error()
}

/// Send the library's messages to `fn`, with `opaque`; NULL sends them nowhere.
///
/// `level` is the least grave kind of message wanted, QBLK_LOG_ERROR to QBLK_LOG_TRACE. When the
/// call returns, the function that was there before is called no more. The environment
/// variable QBLK_LOG (error, warn, info, debug, trace) logs to stderr until this is called.
///
/// Returns 0; -EINVAL for an unknown level; -EDEADLK from inside such a function, which may make
/// all other calls (what these would log is left out). Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_set_log(
    r#fn: qblk_log_fn,
    opaque: *mut c_void,
    level: c_int,
) -> c_int {
    guard::call("qblk_set_log", || {
        let sink = match r#fn {
            None => None,
            Some(_) if !(QBLK_LOG_ERROR..=QBLK_LOG_TRACE).contains(&level) => {
                return Err(guard::Fail::Argument("the level is not one of QBLK_LOG_..."));
            }
            Some(f) => Some(sink(f, opaque)),
        };
        guard::alive()?;
        if guard::is_in_sink() {
            let text = "called from inside the function that receives messages".into();
            return Err(guard::Fail::Code(-libc::EDEADLK, text));
        }
        set_sink(sink, level);
        Ok(())
    })
}

fn sink(f: unsafe extern "C" fn(*mut c_void, c_int, *const c_char), opaque: *mut c_void) -> Sink {
    struct Opaque(*mut c_void);
    // SAFETY: never looked into; that it may go to any thread is what the manual tells its owner.
    unsafe impl Send for Opaque {}
    // SAFETY: as above.
    unsafe impl Sync for Opaque {}
    let opaque = Opaque(opaque);
    Box::new(move |level: Level, text: &str| {
        let opaque = &opaque;
        if let Ok(text) = CString::new(text.replace(['\0', '\n'], " ")) {
            // SAFETY: the program's own function, called as its type says.
            guard::in_sink(|| unsafe { f(opaque.0, level as c_int, text.as_ptr()) });
        }
    })
}
