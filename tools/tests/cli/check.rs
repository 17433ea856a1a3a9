use std::io::{Seek, SeekFrom, Write};

use crate::support::*;

/// Overwrite bytes of a file.
fn poke(dir: &Dir, name: &str, at: u64, bytes: &[u8]) {
    let mut file = std::fs::OpenOptions::new().write(true).open(dir.path(name)).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(bytes).unwrap();
}

#[test]
fn check_has_the_exit_status_of_qemu_img_and_repairs() {
    let dir = Dir::new();
    dir.qblk("create -f qcow2 a.qcow2 1M").good();
    dir.qblk("write a.qcow2 0 --pattern 0x11 --length 128k").good();
    let text = dir.qblk("check a.qcow2").good();
    assert!(text.contains("no errors were found"), "{text}");
    assert!(text.contains("2 of 16 clusters allocated"), "{text}");

    // A cluster behind the last, which nobody has.
    std::fs::copy(dir.path("a.qcow2"), dir.path("leak.qcow2")).unwrap();
    poke(&dir, "leak.qcow2", 8 * 65536 - 1, &[1]);
    poke(&dir, "leak.qcow2", 2 * 65536 + 2 * 7, &[0, 1]);
    assert_eq!(dir.qblk("check leak.qcow2").status, Some(3));
    dir.qblk("check leak.qcow2 --repair=leaks").good();
    dir.qblk("check leak.qcow2").good();

    // No refcounts at all, and marked as corrupt: it can be opened to be repaired only.
    poke(&dir, "a.qcow2", 65536, &[0; 8]);
    poke(&dir, "a.qcow2", 79, &[2]);
    assert_eq!(dir.qblk("check a.qcow2").status, Some(2));
    assert_eq!(dir.qblk("check a.qcow2 --repair=leaks").status, Some(1));
    dir.qblk("write a.qcow2 0 --pattern 0x12 --length 1k").bad(1, &["corrupt"]);
    let json = dir.qblk("check a.qcow2 --repair=all --json").json();
    assert_eq!((&json["corruptions"], &json["check_errors"]), (&0.into(), &0.into()));
    assert!(json["corruptions_fixed"].as_u64().unwrap() > 5, "{json}");
    dir.qemu_img("check -q a.qcow2");
    dir.qblk("write a.qcow2 0 --pattern 0x12 --length 1k").good();

    dir.qblk("create -f raw a.raw 1M").good();
    dir.qblk("check a.raw").bad(1, &["a.raw", "check"]);
    dir.qblk("check").bad(1, &[]);
    dir.qblk("check a.qcow2 --repair=some").bad(1, &["some"]);
    dir.qblk("check nothing.qcow2").bad(1, &["nothing.qcow2"]);
}
