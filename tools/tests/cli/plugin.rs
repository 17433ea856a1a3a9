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
    dir.qblk("plugin ./text.so").bad(1, &["text.so", "expected a shared object"]);
    dir.qblk("plugin /dev/null").bad(1, &["'/dev/null'", "neither a regular file"]);
    dir.run(["plugin", ""]).bad(2, &["the name is empty"]);
}

/// What is refused names the device and says what it lacks, whatever is asked of it.
#[test]
fn what_a_plugin_can_not_do_is_said_with_its_name() {
    let dir = Dir::new();
    build(&dir, "examples/plugin-xor.c", "xor.so");
    build(&dir, "examples/plugin-memory.c", "memory.so");
    std::fs::write(dir.path("zeroes.c"), ZEROES).unwrap();
    build(&dir, dir.path("zeroes.c").to_str().expect("a path of letters"), "zeroes.so");
    dir.qblk("write plugin:./zeroes.so 0 --pattern 1 --length 1")
        .bad(1, &["'plugin:./zeroes.so'", "no function pwrite", "Read-only"]);
    dir.qblk("list plugin:./zeroes.so").bad(1, &["'plugin:./zeroes.so'", "list_exports"]);
    dir.qblk("create plugin:./zeroes.so 1M").bad(1, &["'plugin:./zeroes.so'", "open it"]);
    dir.qblk("check plugin:./zeroes.so").bad(1, &["zeroes.so'", "does not support checking"]);
    // A version that it does not tell is no property.
    assert!(!dir.qblk("info plugin:./zeroes.so").good().contains("plugin.version"));
    assert!(dir.qblk("plugin ./xor.so").good().contains("passes on:      flush\n"));
    assert_eq!(dir.qblk("plugin --json ./xor.so").json()["passes"], serde_json::json!(["flush"]));
    dir.qblk("layers ./xor.so").bad(2, &["qblk plugin"]);
}

/// A device that can not be written.
const ZEROES: &str = r#"
#define QBLK_PLUGIN_FUNCTIONS
#include <qblk-plugin.h>
#include <string.h>
void *qblk_plugin_open(void *opaque, uint32_t flags)
{
    (void)opaque, (void)flags;
    return QBLK_PLUGIN_NO_HANDLE;
}
int64_t qblk_plugin_get_size(void *handle)
{
    (void)handle;
    return 1 << 20;
}
int qblk_plugin_pread2(void *handle, void *buf, uint64_t count, uint64_t offset, uint32_t flags)
{
    (void)handle, (void)offset, (void)flags;
    memset(buf, 0, count);
    return 0;
}
"#;

/// The layer of the examples: what is below is the bytes with the key, and zeroes below are not zeroes above.
#[test]
fn the_layer_of_the_examples_changes_every_byte() {
    let dir = Dir::new();
    build(&dir, "examples/plugin-xor.c", "xor.so");
    dir.qblk("create -q -f raw disk 1M").good();
    let above = "layers:./xor.so;key=0x41:disk";
    dir.qblk(&format!("write -q --pattern 0x42 --length 40000 {above} 10")).good();
    let below = dir.qblk("read -f raw disk 9 40002").out;
    assert!(below[0] == 0 && below[40001] == 0 && below[1..40001].iter().all(|b| *b == 3));
    assert_eq!(dir.qblk(&format!("read {above} 8 4")).out, b"AABB");
    dir.qblk(&format!("write -q --zero --length 4096 {above} 0")).good();
    assert_eq!(dir.qblk("read -f raw disk 4094 4").out, [0x41, 0x41, 3, 3]);
    dir.qblk("info layers:./xor.so;key=256:disk").bad(1, &["key is more than 255"]);
    dir.qblk("info layers:./xor.so;kee=2:disk").bad(1, &["'kee'", "there is one, key"]);
}

#[test]
fn a_plugin_is_an_image_and_a_layer_stands_on_one() {
    let dir = Dir::new();
    build(&dir, "examples/plugin-memory.c", "memory.so");
    build(&dir, "capi-tests/plugins/memory2.c", "memory2.so");
    build(&dir, "examples/plugin-xor.c", "xor.so");
    assert_eq!(dir.qblk("read plugin:memory.so?size=1M 4096 16").out, [0; 16]);
    // What a failing plugin says arrives, so it has called the right library.
    dir.qblk("info plugin:memory.so").bad(1, &["size=64M"]);
    assert!(dir.qblk("info plugin:memory.so?size=1M").good().contains("plugin"));
    assert_eq!(dir.qblk("list plugin:memory2.so").good().lines().count(), 3);
    dir.qblk("create -q -f raw disk 1M").good();
    let read = dir.qblk("read -f raw -o layers=./xor.so;key=7 disk 1 2").out;
    assert_eq!(read, [7, 7]);
}
