use crate::support::*;

#[test]
fn bitmaps_are_added_changed_listed_and_removed() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 10M").good();
    assert_eq!(dir.qblk("bitmap list a.qcow2").good(), "a.qcow2: no bitmaps\n");
    dir.qblk("bitmap add a.qcow2 one").good();
    dir.qblk("bitmap add -g 4k --disabled a.qcow2 two").good();
    dir.qblk("write a.qcow2 1M --pattern 1 --length 100").good();
    let list = || dir.qblk("bitmap list --json a.qcow2").json();
    let all = list();
    assert_eq!((&all[0]["name"], &all[0]["dirty"]), (&"one".into(), &65536.into()));
    assert_eq!((&all[0]["enabled"], &all[0]["inconsistent"]), (&true.into(), &false.into()));
    assert_eq!((&all[1]["granularity"], &all[1]["enabled"]), (&4096.into(), &false.into()));
    dir.qblk("bitmap enable a.qcow2 two").good();
    dir.qblk("bitmap disable a.qcow2 one").good();
    dir.qblk("write a.qcow2 5M --pattern 1 --length 100").good();
    dir.qblk("bitmap merge a.qcow2 one two").good();
    let all = list();
    assert_eq!((&all[0]["dirty"], &all[1]["dirty"]), (&131072.into(), &4096.into()));
    let text = dir.qblk("bitmap list a.qcow2").good();
    assert!(text.contains("one   disabled"), "{text}");
    assert!(text.contains("4096  4 KiB (4096 bytes)"), "{text}");
    let info = dir.qblk("info a.qcow2").good();
    assert!(info.contains("one (disabled, 64 KiB)"), "{info}");
    assert!(info.contains("two (enabled, 4 KiB)"), "{info}");
    assert_eq!(dir.qblk("info --json a.qcow2").json()["bitmaps"][1]["name"], "two");
    dir.qblk("bitmap clear a.qcow2 one").good();
    assert_eq!(list()[0]["dirty"], 0);
    dir.qblk("bitmap remove a.qcow2 two").good();
    assert_eq!(list().as_array().unwrap().len(), 1);
    dir.qemu_img("check -q a.qcow2");
    dir.qblk("bitmap remove a.qcow2 two").bad(1, &["'two'", "a.qcow2"]);
    dir.qblk("bitmap add -g 100 a.qcow2 x").bad(2, &["100", "power of two"]);
    dir.qblk("bitmap add a.qcow2").bad(2, &["<NAME>"]);
    dir.qblk("create -f raw a.raw 1M").good();
    dir.qblk("bitmap add -f raw a.raw x").bad(1, &["a.raw", "does not support"]);
}
