//! Gives the library that plain cargo makes its SONAME; the installed one is linked by the Makefile.
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libqblk.so.1");
}
