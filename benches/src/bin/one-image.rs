//! A small program that has one image open, through the functions that a C program calls, and says
//! how much memory of it is resident, KiB. Without an image it says so of a program that does
//! nothing.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

fn main() {
    let mut dev = std::ptr::null_mut();
    if let Some(image) = std::env::args_os().nth(1) {
        let name = CString::new(image.as_bytes()).unwrap_or_default();
        let mut buf = [0u8; 4096];
        // SAFETY: a C string, room for a handle, then the handle and memory of that size.
        let code = unsafe {
            match qblk::capi::qblk_open(name.as_ptr(), 0, &mut dev) {
                0 => qblk::capi::qblk_pread(dev, buf.as_mut_ptr().cast(), buf.len(), 0),
                code => code,
            }
        };
        if code != 0 {
            eprintln!("{}: error {code}", image.display());
            std::process::exit(1);
        }
    }
    println!("{}", resident_kib());
    // SAFETY: a handle or NULL, and its last call.
    unsafe { qblk::capi::qblk_close(dev) };
}

include!("../resident.rs");
