use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use crate::support::*;

#[test]
fn info_says_what_an_image_is() {
    let dir = Dir::new();
    dir.qemu_img("create -q -f raw base.raw 3M");
    dir.qemu_img(
        "create -q -f qcow2 -b base.raw -F raw -o cluster_size=32k,lazy_refcounts=on top.qcow2 10G",
    );
    let text = dir.qblk("info top.qcow2").good();
    for line in [
        "image: top.qcow2",
        "format: qcow2",
        "size: 10 GiB (10737418240 bytes)",
        "cluster size: 32 KiB (32768 bytes)",
        "backing file: base.raw (raw)",
        "qcow2.lazy-refcounts: on",
    ] {
        let found =
            text.lines().any(|l| l.split_whitespace().collect::<Vec<_>>().join(" ") == line);
        assert!(found, "{line:?} is not in\n{text}");
    }
    assert!(!text.contains("backed by"), "{text}");
    let json = dir.qblk("info --json top.qcow2").json();
    assert_eq!(json["filename"], "top.qcow2");
    assert_eq!(json["format"], "qcow2");
    assert_eq!(json["size"], 10u64 << 30);
    assert_eq!(json["cluster_size"], 32768);
    assert_eq!(json["backing_filename"], "base.raw");
    assert_eq!(json["backing_format"], "raw");
    assert_eq!(json["allocated"], dir.on_disk("top.qcow2"));
    assert_eq!(json["properties"]["qcow2.lazy-refcounts"], "on");
    assert!(json["state"].as_array().unwrap().contains(&"has-backing".into()), "{json}");
}

#[test]
fn info_follows_a_chain_from_other_directories() {
    let dir = Dir::new();
    std::fs::create_dir(dir.path("sub")).unwrap();
    dir.qemu_img("create -q -f raw sub/base.raw 3M");
    dir.qemu_img("create -q -f qcow2 -b base.raw -F raw sub/mid.qcow2");
    dir.qemu_img("create -q -f qcow2 -b sub/mid.qcow2 -F qcow2 top.qcow2");
    let text = dir.qblk("info --backing-chain top.qcow2").good();
    assert_eq!(text.matches("image:").count(), 3, "{text}");
    assert!(text.contains("backed by, 2 below:"), "{text}");
    let json = dir.qblk("info --backing-chain --json top.qcow2").json();
    let names: Vec<_> = json.as_array().unwrap().iter().map(|i| i["filename"].clone()).collect();
    assert_eq!(names, ["top.qcow2", "sub/mid.qcow2", "sub/base.raw"]);
    // Another backing file by option, and its own.
    dir.qemu_img("create -q -f raw other.raw 5M");
    let json = dir
        .qblk("info --backing-chain --json -o backing-file=other.raw -o backing-fmt=raw top.qcow2");
    let json = json.json();
    assert_eq!((json.as_array().unwrap().len(), &json[1]["size"]), (2, &(5 << 20).into()));
}

#[test]
fn a_chain_that_loops_or_breaks_is_an_error() {
    let dir = Dir::new();
    dir.qemu_img("create -q -f qcow2 a.qcow2 1M");
    dir.qemu_img("create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2");
    dir.qemu_img("rebase -q -u -f qcow2 -b b.qcow2 -F qcow2 a.qcow2");
    dir.qblk("info --backing-chain a.qcow2").bad(1, &["loop"]);
    dir.qblk("info a.qcow2").good();
    dir.qemu_img("rebase -q -u -f qcow2 -b gone.qcow2 -F qcow2 a.qcow2");
    dir.qblk("info --backing-chain a.qcow2").bad(1, &["gone.qcow2", "a.qcow2"]);
    dir.qblk("info a.qcow2").good();
    // What would wait for ever is not opened.
    dir.fifo("fifo");
    dir.qemu_img("rebase -q -u -f qcow2 -b fifo -F raw a.qcow2");
    dir.qblk("info --backing-chain a.qcow2").bad(1, &["'fifo'", "a.qcow2"]);
}

#[test]
fn info_describes_what_cannot_be_opened() {
    let dir = Dir::new();
    dir.qemu_img("create -q -f qcow2 -o extended_l2=on,cluster_size=128k x.qcow2 1G");
    assert!(dir.qblk("info x.qcow2").good().contains("qcow2.extended-l2:"));
    let json = dir.qblk("info --json x.qcow2").json();
    assert_eq!(json["properties"]["qcow2.extended-l2"], "on");
    dir.qemu_img("create -q -f qcow2 -o data_file=bytes.raw d.qcow2 1G");
    let json = dir.qblk("info --json d.qcow2").json();
    assert_eq!(json["data_file"], "bytes.raw");
    assert!(json["state"].as_array().unwrap().contains(&"has-data-file".into()));
}

#[test]
fn names_that_are_not_text_work() {
    let dir = Dir::new();
    let name = OsStr::from_bytes(b"disk\xff \n<&>.qcow2");
    dir.run([OsStr::new("create"), name, OsStr::new("1M")]).good();
    assert!(dir.path(name).exists());
    let json = dir.run([OsStr::new("info"), name, OsStr::new("--json")]).json();
    assert_eq!(json["filename"], "disk\u{fffd} \n<&>.qcow2");
    assert_eq!(json["filename_bytes"][4], 0xff);
    let text = dir.run([OsStr::new("info"), name]).good();
    assert!(text.contains("disk\u{fffd} \u{fffd}<&>.qcow2"), "{text}");
    let overlay = OsStr::from_bytes(b"over\xfe.qcow2");
    dir.run([OsStr::new("create"), OsStr::new("-b"), name, overlay]).good();
    dir.run([OsStr::new("map"), overlay]).good();
    let gone = dir.run([OsStr::new("info"), OsStr::from_bytes(b"no\xff")]);
    gone.bad(1, &["'no\\xff'"]);
}

#[test]
fn a_path_with_a_colon_is_reached() {
    let dir = Dir::new();
    dir.qblk("create file:nbd:disk 1M").good();
    assert!(dir.exists("nbd:disk"));
    assert_eq!(dir.qblk("info --json file:nbd:disk").json()["size"], 1 << 20);
    assert_eq!(dir.qblk("info --json mem:64M").json()["size"], 64 << 20);
}
