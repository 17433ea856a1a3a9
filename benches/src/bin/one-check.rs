//! A small program that checks one image, through the functions that a C program calls, and says how much
//! memory of it was resident at most, KiB. Without an image it says so of a program that does nothing.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;

fn main() {
    if let Some(image) = std::env::args_os().nth(1) {
        let name = CString::new(image.as_bytes()).unwrap_or_default();
        let mut dev = std::ptr::null_mut();
        let mut result = MaybeUninit::uninit();
        // SAFETY: a C string, room for a handle, then the handle and room for the result.
        let code = unsafe {
            match qblk::capi::qblk_open(name.as_ptr(), qblk::capi::QBLK_OPEN_CHECK, &mut dev) {
                0 => qblk::capi::qblk_check(dev, 0, result.as_mut_ptr()),
                code => code,
            }
        };
        // SAFETY: a handle or NULL, and its last call.
        unsafe { qblk::capi::qblk_close(dev) };
        if code != 0 {
            eprintln!("{}: error {code}", image.display());
            std::process::exit(1);
        }
    }
    println!("{}", peak_kib());
}

/// The most that was resident at any moment.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
