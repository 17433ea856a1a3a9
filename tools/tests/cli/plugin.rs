//! `qblk plugin`, and plugins as images: the library that they call is the one inside the tool.

use std::path::Path;
use std::process::Command;

use crate::support::*;

fn build(dir: &Dir, source: &str, target: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let built = Command::new("cc")
        .args(["-Wall", "-Werror", "-shared", "-fPIC", "-I"])
        .arg(root.join("include"))
        .arg("-o")
        .arg(dir.path(target))
        .arg(root.join(source))
        .status()
        .expect("install a C compiler (apt-get install gcc)");
    assert!(built.success());
}

#[test]
fn plugin_says_what_it_is_and_can_do() {
    let dir = Dir::new();
    build(&dir, "examples/plugin-memory.c", "memory.so");
    let text = dir.qblk("plugin ./memory.so").good();
    for line in [
        "name:           'memory'",
        "is a:           device",
        "interface:      version 2, 320 bytes",
        "thread model:   parallel",
        "settings:       'size=SIZE    of the disk; needed'",
    ] {
        assert!(
            text.lines().any(|l| l.replace('\'', "") == line.replace('\'', "")),
            "{line}: {text}"
        );
    }
    let json = dir.qblk("plugin --json plugin:memory.so").json();
    assert_eq!(json["name"], "memory");
    assert_eq!(json["api_version"], 2);
    assert_eq!((&json["source"], &json["layer"]), (&true.into(), &false.into()));
    assert!(json["functions"].as_array().unwrap().contains(&"config_help".into()));
    dir.qblk("plugin ./gone.so").bad(1, &["gone.so", "No such file"]);
    std::fs::write(dir.path("text.so"), "text").unwrap();
    dir.qblk("plugin ./text.so").bad(1, &["text.so"]);
}

#[test]
fn a_plugin_is_an_image_and_a_layer_stands_on_one() {
    let dir = Dir::new();
    build(&dir, "examples/plugin-memory.c", "memory.so");
    build(&dir, "capi-tests/plugins/memory2.c", "memory2.so");
    build(&dir, "capi-tests/plugins/layer-cipher.c", "cipher.so");
    assert_eq!(dir.qblk("read plugin:memory.so?size=1M 4096 16").out, [0; 16]);
    // What a failing plugin says arrives, so it has called the right library.
    dir.qblk("info plugin:memory.so").bad(1, &["size=64M"]);
    assert!(dir.qblk("info plugin:memory.so?size=1M").good().contains("plugin"));
    assert_eq!(dir.qblk("list plugin:memory2.so").good().lines().count(), 3);
    dir.qblk("create -q -f raw disk 1M").good();
    let read = dir.qblk("read -f raw -o layers=./cipher.so;key=7 disk 1 2").out;
    assert_eq!(read, [7 ^ 167, 7 ^ (334 - 256) as u8]);
}
