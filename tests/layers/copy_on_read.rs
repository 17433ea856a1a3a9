//! `copy-on-read`.

use qblk::block::Caps;
use qblk::{Extent, Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

const BLOCK: [(&str, &str); 1] = [("block-size", "4096")];

#[test]
fn what_lies_further_down_is_written_here_once() {
    let r = Recorder::new(64 << 10, able());
    r.lower(0, 64 << 10, Extent::DATA | Extent::OWNED);
    let before = r.bytes();
    let dev = on(&r, "copy-on-read", &BLOCK, true).unwrap();
    let mut some = [0; 5000];
    let mut calls = |offset: u64, count: usize| {
        r.log();
        dev.read_slice(&mut some[..count], offset).unwrap();
        assert_eq!(some[..count], r.bytes()[offset as usize..][..count]);
        r.log()
    };
    // Looked up, and once more when it is held.
    let copied = ["1 extents 0+4096", "1 extents 0+4096", "1 read 0+4096", "1 write 0+4096"];
    assert_eq!(calls(100, 200), [&copied[..], &["1 read 100+200"]].concat());
    assert_eq!(calls(4000, 96), ["1 read 4000+96"]);
    // Only what is not here yet.
    assert_eq!(
        calls(4000, 5000),
        [
            "1 extents 0+12288",
            "1 extents 0+12288",
            "1 read 4096+8192",
            "1 write 4096+8192",
            "1 read 4000+5000",
        ]
    );
    // What was written stays, around it is copied.
    dev.write_slice(&[1; 10], 20000, ReqFlags::FUA).unwrap();
    assert_eq!(
        calls(20000, 10),
        [
            "1 extents 16384+4096",
            "1 extents 16384+4096",
            "1 read 16384+3616",
            "1 write 16384+3616",
            "1 read 20010+470",
            "1 write 20010+470",
            "1 read 20000+10",
        ]
    );
    // Zeroes are made so; what nobody has needs nothing.
    r.lower(28672, 32768, Extent::ZERO | Extent::OWNED);
    r.lower(32768, 36864, Extent::ZERO);
    dev.zero(28672, 0, ReqFlags::NONE).unwrap();
    r.log();
    dev.cache(28672, 8192).unwrap();
    assert_eq!(
        r.log(),
        [
            "1 extents 28672+8192",
            "1 extents 28672+8192",
            "1 zero 28672+4096 MAY_TRIM",
            "1 cache 28672+8192",
        ]
    );
    // A trim may give it back: it is looked up again.
    dev.trim(0, 4096, ReqFlags::FUA).unwrap();
    dev.flush().unwrap();
    dev.zero(4096, 100, ReqFlags::MAY_TRIM).unwrap();
    assert_eq!(r.log(), ["1 trim 0+4096 FUA", "1 flush", "1 zero 4096+100 MAY_TRIM"]);
    assert_eq!(calls(0, 512), ["1 extents 0+4096", "1 read 0+512"]);
    let mut expected = before;
    expected[20000..20010].fill(1);
    expected[4096..4196].fill(0);
    expected[28672..32768].fill(0);
    assert!(r.bytes() == expected, "copies change nothing");
}

#[test]
fn a_copy_that_fails_is_no_failure_of_the_read() {
    let r = Recorder::new(64 << 10, able());
    r.lower(0, 64 << 10, Extent::DATA | Extent::OWNED);
    let dev = on(&r, "copy-on-read", &BLOCK, true).unwrap();
    let mut some = [0; 10];
    // The block can not be read, the part can: it is tried again the next time.
    r.fail("read 4096+4096", libc::EIO, 1);
    r.fail("extents", libc::EIO, 1);
    dev.read_slice(&mut some, 5000).unwrap();
    dev.read_slice(&mut some, 5000).unwrap();
    let held = ["1 extents 4096+4096", "1 extents 4096+4096", "1 read 4096+4096"];
    let tried = ["1 extents 4096+4096", "1 read 5000+10"];
    assert_eq!(r.log()[1..], [&tried[..], &held, &["1 read 5000+10"]].concat());
    // There is no room for it: that is the end of copying.
    r.fail("write", libc::ENOSPC, 1);
    dev.read_slice(&mut some, 5000).unwrap();
    assert_eq!(r.log(), [&held[..], &["1 write 4096+4096", "1 read 5000+10"]].concat());
    dev.read_slice(&mut some, 9000).unwrap();
    dev.cache(9000, 1).unwrap();
    assert_eq!(r.log(), ["1 read 9000+10", "1 cache 9000+1"]);
    // The part itself can not be read.
    r.fail("read", libc::EIO, 1);
    dev.read_slice(&mut some, 9000).unwrap_err();
    // Without zeroing they are written.
    let r = Recorder::new(4096, Caps { zero: false, ..able() });
    r.lower(0, 4096, Extent::ZERO | Extent::OWNED);
    let dev = on(&r, "copy-on-read", &BLOCK, true).unwrap();
    dev.read_slice(&mut some, 0).unwrap();
    assert_eq!(r.log()[3..], ["1 read 0+4096", "1 write 0+4096", "1 read 0+10"]);
    // Read-only nothing is copied.
    let dev = on(&r, "copy-on-read", &BLOCK, false).unwrap();
    r.lower(0, 4096, Extent::DATA | Extent::OWNED);
    dev.read_slice(&mut some, 0).unwrap();
    assert_eq!(r.log(), ["open 2 ro", "2 read 0+10"]);
}

/// An image of random bytes and an empty one above it.
fn pair(tmp: &Tmp, bytes: &[u8]) -> std::path::PathBuf {
    let (base, top) = (tmp.join("base.img"), tmp.join("top.qcow2"));
    std::fs::write(&base, bytes).unwrap();
    let _ = std::fs::remove_file(&top);
    let name = base.display().to_string();
    create(&top, "qcow2", bytes.len() as u64, &[("backing-file", &name), ("backing-fmt", "raw")]);
    top
}

#[test]
fn an_image_that_was_read_needs_the_one_below_no_more() {
    let tmp = Tmp::new("layers-cor");
    let mut bytes = Rng::new(seed("layers-cor")).bytes((4 << 20) + 12345);
    // Holes of the one below are known without it afterwards, too.
    bytes[1 << 20..2 << 20].fill(0);
    let top = pair(&tmp, &bytes);
    let image = crate::stacked(&top, "copy-on-read");
    assert!(read_all(&image) == bytes);
    let copied = image.property("copy-on-read.copied").unwrap().unwrap();
    let copied: usize = String::from_utf8(copied).unwrap().parse().unwrap();
    assert!(copied >= bytes.len() - (1 << 20), "{copied}");
    image.close().unwrap();
    std::fs::write(tmp.join("base.img"), vec![0xee; bytes.len()]).unwrap();
    check_clean(&top);
    assert!(read_all(&open(&top, RO)) == bytes, "all is in the upper image");
    // A part costs a part, and reading through a read-only handle none.
    let top = pair(&tmp, &bytes);
    let image = crate::stacked(&top, "copy-on-read");
    read_range(&image, 100_000, 1);
    image.close().unwrap();
    let flags = |at| all_extents(&open(&top, RO), at, 65536, 8)[0].flags & Extent::ALLOCATED;
    assert_eq!((flags(0), flags(65536), flags(131072)), (0, Extent::ALLOCATED, 0));
    let before = std::fs::read(&top).unwrap();
    let image =
        Image::open(top.as_os_str(), &Options::new().with("layers", "copy-on-read"), RO).unwrap();
    assert!(read_all(&image) == bytes);
    image.close().unwrap();
    assert!(std::fs::read(&top).unwrap() == before);
}

#[test]
fn copies_and_writes_side_by_side_lose_nothing() {
    let tmp = Tmp::in_memory("layers-cor-race");
    let mut rng = Rng::new(seed("layers-cor-race"));
    let size = 4 << 20;
    for _ in 0..8 {
        let bytes = rng.bytes(size);
        let top = pair(&tmp, &bytes);
        let image = crate::stacked(&top, "copy-on-read");
        // Every cluster is written in part while it is read, and so copied.
        std::thread::scope(|s| {
            for t in 0..2u64 {
                let image = &image;
                s.spawn(move || {
                    for cluster in 0..64u64 {
                        let at = cluster * 65536 + t * 20000 + 100;
                        image.write_at(&[0x55; 300], at, NONE).unwrap();
                    }
                });
                s.spawn(move || {
                    let mut some = vec![0; 65536];
                    for cluster in 0..64u64 {
                        image.read_at(&mut some, cluster * 65536).unwrap();
                    }
                });
            }
        });
        let mut expected = bytes;
        for cluster in 0..64 {
            for t in 0..2 {
                expected[cluster * 65536 + t * 20000 + 100..][..300].fill(0x55);
            }
        }
        assert_same(&read_all(&image), &expected, 0, "after a race");
        model::run_many(&image, &mut expected, 100, 4, rng.next());
        image.close().unwrap();
        assert_same(&read_all(&open(&top, RO)), &expected, 0, "in the image");
        check_clean(&top);
    }
}

#[test]
fn above_an_overlay_it_keeps_a_local_copy() {
    let name = "layers:cow;store=memory,copy-on-read:mem:1M";
    let image = Image::open(name.as_ref(), &Options::new(), RW).unwrap();
    read_range(&image, 0, 1000);
    let kept = |key| String::from_utf8(image.property(key).unwrap().unwrap()).unwrap();
    // Memory that was never written is a hole: it is noted as zeroes, not kept.
    assert_eq!((kept("cow.allocated"), kept("cow.zeroed")), ("0".into(), "65536".into()));
    image.close().unwrap();
}

#[test]
fn a_write_waits_for_a_copy_of_its_range_and_for_no_other() {
    let r = Recorder::new(64 << 10, able());
    r.lower(0, 64 << 10, Extent::DATA | Extent::OWNED);
    let dev = &on(&r, "copy-on-read", &BLOCK, true).unwrap();
    r.hold("read 0+4096");
    std::thread::scope(|s| {
        let mut found = [0; 10];
        s.spawn(move || dev.read_slice(&mut found, 0).unwrap());
        r.wait_held(1);
        let write = s.spawn(move || dev.write_slice(&[1; 10], 100, NONE).unwrap());
        dev.write_slice(&[1; 10], 5000, NONE).unwrap();
        dev.read_slice(&mut [0; 10], 9000).unwrap();
        assert!(!write.is_finished());
        r.release();
    });
    let log = r.log();
    let at = |call: &str| log.iter().position(|c| c == call).unwrap_or_else(|| panic!("{call}"));
    assert!(at("1 write 0+4096") < at("1 write 100+10"), "{log:?}");
    assert!(at("1 write 5000+10") < at("1 write 0+4096"), "{log:?}");
    assert_eq!(r.bytes()[99..111], [99, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 110]);
}

#[test]
fn reopened_below_it_looks_again_what_is_here() {
    let r = Recorder::new(64 << 10, able());
    r.lower(0, 8192, Extent::DATA | Extent::OWNED);
    let dev = on(&r, "copy-on-read", &BLOCK, true).unwrap();
    let mut some = [0; 4096];
    dev.read_slice(&mut some, 0).unwrap();
    r.log();
    // Another gives it back, and the device is opened anew.
    r.lower(0, 4096, Extent::DATA | Extent::OWNED);
    dev.driver().reopened();
    dev.read_slice(&mut some, 0).unwrap();
    assert!(r.log().contains(&"1 write 0+4096".to_owned()), "it is copied again");
}
