//! The library's C functions are exported from the tool, so that plugins which call them meet the one
//! library that is there: the tool's own.

use std::path::Path;

fn main() {
    let map = Path::new(env!("CARGO_MANIFEST_DIR")).join("../qblk.map");
    println!("cargo:rerun-if-changed={}", map.display());
    println!("cargo:rerun-if-changed=build.rs");
    let text = std::fs::read_to_string(&map).unwrap_or_else(|e| panic!("{}: {e}", map.display()));
    let names = text.lines().filter_map(|l| l.trim().strip_suffix(';'));
    for name in names.filter(|name| name.starts_with("qblk_")) {
        // Taken out of the archive though nobody here calls it, kept, and made visible.
        println!("cargo:rustc-link-arg-bins=-Wl,--undefined={name}");
        println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol={name}");
    }
}
