//! `truncate`.

use qblk::block::{Caps, ErrorKind, Extent, ExtentList};
use qblk::{Image, OneIov, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

const ENOSPC: ErrorKind = ErrorKind::Errno(libc::ENOSPC);

#[test]
fn beyond_the_end_are_zeroes_and_nothing_is_called_below() {
    let r = Recorder::new(5000, able());
    let dev = on(&r, "truncate", &[("round-up", "4k")], true).unwrap();
    assert_eq!(dev.size(), 8192);
    let before = r.bytes();
    let mut found = [9; 1000];
    dev.read_slice(&mut found, 4500).unwrap();
    assert_eq!(found[..500], before[4500..]);
    assert!(found[500..].iter().all(|b| *b == 0));
    dev.read_slice(&mut found, 6000).unwrap();
    assert_eq!(found, [0; 1000]);
    dev.write_slice(&[0; 1000], 4500, ReqFlags::FUA).unwrap();
    dev.write_slice(&[0; 100], 5000, ReqFlags::FUA).unwrap();
    dev.write_slice(&[5; 100], 4900, NONE).unwrap();
    dev.zero(4999, 3193, ReqFlags::FUA).unwrap();
    dev.zero(5000, 3192, NONE).unwrap();
    dev.trim(4000, 4192, ReqFlags::FUA).unwrap();
    dev.trim(5000, 1, NONE).unwrap();
    dev.cache(4000, 2000).unwrap();
    dev.cache(5000, 2000).unwrap();
    dev.flush().unwrap();
    let expected = [
        "open 1 rw",
        "1 read 4500+500",
        "1 write 4500+500 FUA",
        "1 write 4900+100",
        "1 zero 4999+1 FUA",
        "1 trim 4000+1000 FUA",
        "1 cache 4000+1000",
        "1 flush",
    ];
    assert_eq!(r.log(), expected);
    // Whole or nothing: what could be kept of such a write is not written.
    let mut some = [0; 200];
    some[199] = 1;
    let e = dev.write_slice(&some, 4900, NONE).unwrap_err();
    assert_eq!(e.kind(), ENOSPC);
    assert!(e.to_string().contains("the 5000 bytes that are below"), "{e}");
    assert_eq!(dev.write_slice(&[1], 8191, NONE).unwrap_err().kind(), ENOSPC);
    assert!(r.log().is_empty());
    let mut all = [Extent::default(); 4];
    let mut list = ExtentList::new(&mut all);
    dev.driver().extents(4000, 4000, &mut list).unwrap();
    assert_eq!(list.len(), 2);
    assert_eq!((all[0].offset, all[0].length, all[0].has(Extent::DATA)), (4000, 1000, true));
    assert_eq!((all[1].offset, all[1].length, all[1].has(Extent::ZERO)), (5000, 3000, true));
    assert_eq!(r.log(), ["1 extents 4000+1000"]);
    r.fail("read", libc::EIO, 1);
    dev.read_slice(&mut found, 4500).unwrap_err();
    assert_eq!(r.log(), ["1 read 4500+500"]);
}

#[test]
fn what_is_cut_off_is_out_of_reach() {
    let r = Recorder::new(5000, Caps { extents: false, ..able() });
    let dev = on(&r, "truncate", &[("round-down", "4k")], true).unwrap();
    assert_eq!(dev.size(), 4096);
    assert_eq!(r.log(), ["open 1 rw"]);
    let mut one = [1; 2];
    // Also for a driver's own requests.
    dev.driver().read(OneIov::dst(&mut one).iov(), 4095).unwrap_err();
    dev.driver().write(OneIov::src(&one).iov(), 4095, NONE).unwrap_err();
    dev.driver().zero(4095, 2, NONE).unwrap_err();
    dev.driver().trim(4096, 1, NONE).unwrap_err();
    dev.driver().cache(4096, 1).unwrap_err();
    dev.driver().read(OneIov::dst(&mut one).iov(), u64::MAX).unwrap_err();
    assert!(r.log().is_empty());
}

#[test]
fn sizes_are_what_was_asked_for() {
    let size = |below, settings: &[(&str, &str)]| {
        let r = Recorder::new(below, able());
        on(&r, "truncate", settings, false).map(|dev| dev.size()).map_err(|e| e.to_string())
    };
    assert_eq!(size(5000, &[("size", "100")]), Ok(100));
    assert_eq!(size(5000, &[("size", "1T")]), Ok(1 << 40));
    assert_eq!(size(5000, &[("size", "0")]), Ok(0));
    assert_eq!(size(0, &[("round-up", "512")]), Ok(0));
    assert_eq!(size(5000, &[("round-up", "1000")]), Ok(5000));
    assert_eq!(size(5001, &[("round-up", "1000")]), Ok(6000));
    assert_eq!(size(5001, &[("round-down", "1000")]), Ok(5000));
    assert_eq!(size(5001, &[("round-up", "1000"), ("round-down", "4k")]), Ok(4096));
    assert_eq!(size(5001, &[("size", "700"), ("round-up", "512")]), Ok(1024));
    for (settings, what) in [
        (&[][..], "needs the setting 'size'"),
        (&[("size", "8E")], "a size below 8E"),
        (&[("round-up", "0")], "at least 1 byte"),
        (&[("round-down", "0")], "at least 1 byte"),
        (&[("round-up", "15E")], "round-up: found '15E'"),
        (&[("size", "7E"), ("round-up", "6E")], "round-up: found '6E'"),
    ] {
        let e = size(5000, settings).unwrap_err();
        assert!(e.contains(what), "{settings:?}: {e}");
    }
}

#[test]
fn a_size_that_changes_below_is_followed() {
    let tmp = Tmp::new("truncate");
    let path = tmp.join("a.raw");
    create(&path, "raw", 5000, &[]);
    let image = Image::open(path.as_os_str(), &Options::new().with("format", "raw"), RW).unwrap();
    image.write_at(&[1; 5000], 0, NONE).unwrap();
    image.push_layer(b"truncate;round-up=4096", &Options::new()).unwrap();
    assert_eq!(image.size().unwrap(), 8192);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(3000).unwrap();
    image.reopen(None, RW).unwrap();
    assert_eq!(image.size().unwrap(), 4096);
    let mut found = [7; 4096];
    image.read_at(&mut found, 0).unwrap();
    assert!(found[..3000].iter().all(|b| *b == 1) && found[3000..].iter().all(|b| *b == 0));
    image.close().unwrap();
}

#[test]
fn the_part_that_is_there_is_a_device() {
    let tmp = Tmp::new("truncate-model");
    let path = tmp.join("a.qcow2");
    create(&path, "qcow2", 2 << 20, &[]);
    let options = options(&[("layers", "truncate;size=1000001")]);
    let image = Image::open(path.as_os_str(), &options, RW).unwrap();
    let mut model = vec![0; 1_000_001];
    model::run(&image, &mut model, 1500, &mut Rng::new(seed("truncate")), Default::default());
    image.close().unwrap();
    let image = open(&path, RO);
    let all = read_all(&image);
    assert!(all[..model.len()] == model && all[model.len()..].iter().all(|b| *b == 0));
}

#[test]
fn extents_cover_both_sides_of_the_end() {
    let tmp = Tmp::new("truncate-extents");
    let path = tmp.join("a.qcow2");
    create(&path, "qcow2", 8 << 20, &[]);
    let image = open(&path, RW);
    // More extents than are looked up at a time.
    (0..64u64).for_each(|i| image.write_at(&[1; 100], i << 17, NONE).unwrap());
    image.push_layer(b"truncate;size=9M", &Options::new()).unwrap();
    let all = all_extents(&image, 0, 9 << 20, 3);
    assert_eq!(all.len(), 129);
    let last = all.last().unwrap();
    assert_eq!((last.offset, last.length), (8 << 20, 1 << 20));
    assert!(all.iter().all(|e| e.has(Extent::ZERO) != e.has(Extent::DATA)));
    image.close().unwrap();
}
