//! `cow`.

use qblk::{Error, Extent, Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

fn property(image: &Image, key: &str) -> u64 {
    let value = image.property(key).unwrap().unwrap_or_else(|| panic!("no {key}"));
    String::from_utf8(value).unwrap().parse().unwrap()
}

#[test]
fn only_what_a_block_lacks_is_read_below_and_nothing_is_written_there() {
    for store in ["file", "memory"] {
        let r = Recorder::new(64 << 10, able());
        let dev = on(&r, "cow", &[("store", store)], true).unwrap();
        assert_eq!(r.log(), ["open 1 ro"]);
        let mut some = [7; 8192];
        // Whole blocks, then parts of what is here, by any call.
        dev.write_slice(&some, 4096, ReqFlags::FUA).unwrap();
        dev.write_slice(&[8; 10], 5000, ReqFlags::NONE).unwrap();
        dev.zero(4100, 5, ReqFlags::FUA).unwrap();
        dev.flush().unwrap();
        assert!(r.log().is_empty());
        // Parts of blocks that are not here yet, at both ends; the middle is whole.
        dev.write_slice(&some[..6000], 16000, ReqFlags::NONE).unwrap();
        assert_eq!(r.log(), ["1 read 12288+4096", "1 read 20480+4096"]);
        dev.zero(30000, 10000, ReqFlags::MAY_TRIM).unwrap();
        assert_eq!(r.log(), ["1 read 28672+4096", "1 read 36864+4096"]);
        dev.trim(40000, 9000, ReqFlags::FUA).unwrap();
        // Of zeroes a part is written without a look below.
        dev.write_slice(&[9; 10], 44100, ReqFlags::NONE).unwrap();
        dev.zero(32768, 4096, ReqFlags::FAST_ZERO).unwrap();
        assert!(matches!(dev.zero(32768, 4000, ReqFlags::FAST_ZERO), Err(Error::NotSupported(_))));
        assert!(r.log().is_empty());
        // Reads and bringing near go below where it is not here.
        dev.read_slice(&mut some, 0).unwrap();
        assert_eq!(r.log(), ["1 read 0+4096"]);
        assert_eq!(some[4096..4104], [7, 7, 7, 7, 0, 0, 0, 0]);
        assert_eq!(some[4999..5011], [7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7]);
        dev.cache(0, 16384).unwrap();
        assert_eq!(r.log(), ["1 cache 0+4096"]);
        dev.read_slice(&mut some, 40900).unwrap();
        assert_eq!(r.log(), ["1 read 45056+4036"]);
        let before = Recorder::new(64 << 10, able()).bytes();
        assert_eq!(some[..60], before[40900..40960], "a trim leaves what it has a part of");
        assert!(some[60..3200].iter().all(|b| *b == 0));
        assert_eq!(some[3200..3210], [9; 10]);
        dev.driver().close().unwrap();
        assert!(r.log().is_empty());
        assert!(r.bytes() == before, "what is below is as it was");
        dev.driver().write(qblk::OneIov::src(&some).iov(), 60 << 10, NONE).unwrap_err();
    }
}

#[test]
fn a_failing_read_below_leaves_the_block_as_it_was() {
    let r = Recorder::new(16 << 10, able());
    let dev = on(&r, "cow", &[("block-size", "8k")], true).unwrap();
    r.fail("read", libc::EIO, 1);
    assert!(dev.write_slice(&[1; 100], 50, ReqFlags::NONE).is_err());
    let mut found = [0; 200];
    dev.read_slice(&mut found, 0).unwrap();
    assert_eq!(found[..], r.bytes()[..200]);
    assert_eq!(r.log(), ["open 1 ro", "1 read 0+8192", "1 read 0+200"]);
}

#[test]
fn a_commit_writes_what_changed_and_then_flushes() {
    let r = Recorder::new(3 << 20, able());
    let dev = on(&r, "cow", &[("commit", "on")], true).unwrap();
    dev.write_slice(&vec![7; 2 << 20], 4096, ReqFlags::FUA).unwrap();
    dev.zero((2 << 20) + 8192, 8192, ReqFlags::NONE).unwrap();
    dev.write_slice(&[1; 4], (3 << 20) - 4, ReqFlags::NONE).unwrap();
    dev.flush().unwrap();
    assert_eq!(r.log(), ["open 1 rw", "1 read 3141632+4096"]);
    // One that fails half-way says so and keeps all of it.
    r.fail("zero", libc::EIO, 1);
    let e = dev.driver().close().unwrap_err();
    assert!(e.to_string().contains("layer 'cow': its changes are committed up to byte"), "{e}");
    let body = ["1 write 4096+1048576", "1 write 1052672+1048576", "1 zero 2105344+8192 MAY_TRIM"];
    assert_eq!(r.log(), body);
    r.fail("flush", libc::EIO, 1);
    dev.driver().close().unwrap_err();
    assert_eq!(r.log(), [&body[..], &["1 write 3141632+4096", "1 flush to close"]].concat());
    dev.driver().close().unwrap();
    assert_eq!(r.log(), [&body[..], &["1 write 3141632+4096", "1 flush to close"]].concat());
    // Nothing is left to be done.
    dev.driver().close().unwrap();
    assert_eq!(r.log(), ["1 flush to close"]);
    let mut all = vec![0; 3 << 20];
    dev.read_slice(&mut all, 0).unwrap();
    assert!(all == r.bytes());
    assert_eq!(all[(3 << 20) - 5..], [r.bytes()[(3 << 20) - 5], 1, 1, 1, 1]);
}

#[test]
fn it_is_an_image_above_the_one_below() {
    let r = Recorder::new(64 << 10, able());
    let dev = on(&r, "cow", &[], true).unwrap();
    dev.write_slice(&[1; 4096], 8192, NONE).unwrap();
    dev.zero(12288, 4096, NONE).unwrap();
    let mut some = [Extent::default(); 8];
    let mut list = qblk::block::ExtentList::new(&mut some);
    dev.driver().extents(0, 64 << 10, &mut list).unwrap();
    let n = list.len();
    let found: Vec<_> = some[..n].iter().map(|e| (e.length, e.flags, e.depth)).collect();
    let (own, data, zero) = (Extent::ALLOCATED | Extent::OWNED, Extent::DATA, Extent::ZERO);
    assert_eq!(
        found,
        [(8192, data, 1), (4096, own | data, 0), (4096, own | zero, 0), (49152, data, 1)]
    );
}

#[test]
fn changes_are_dropped_or_committed_and_many_may_write() {
    let tmp = Tmp::new("layers-cow");
    let path = tmp.join("a.img");
    let size = (6 << 20) + 1234;
    let before = Rng::new(seed("layers-cow")).bytes(size);
    for (settings, kept) in [
        ("cow", false),
        ("cow;store=memory;block-size=64k", false),
        ("cow;commit=on;block-size=512", true),
    ] {
        std::fs::write(&path, &before).unwrap();
        let settings = format!("{settings};directory={}", tmp.path().display());
        let settings = match settings.contains("memory") {
            true => settings.split(";directory").next().unwrap().to_owned(),
            false => settings,
        };
        let image = crate::stacked(&path, &settings);
        assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 1, "only the image is seen");
        let mut model = before.clone();
        let rng = &mut Rng::new(seed("layers-cow"));
        model::run(&image, &mut model, 600, rng, Default::default());
        model::run_many(&image, &mut model, 300, 3, seed("layers-cow"));
        assert!(property(&image, "cow.allocated") > 0);
        assert!(property(&image, "cow.zeroed") > 0);
        assert!(std::fs::read(&path).unwrap() == before, "{settings}: nothing below has changed");
        image.close().unwrap();
        let after = std::fs::read(&path).unwrap();
        assert!(after == if kept { model } else { before.clone() }, "{settings}");
    }
}

#[test]
fn an_image_that_may_not_be_written_can_be_written_over() {
    let tmp = Tmp::new("layers-cow-ro");
    let path = tmp.join("a.img");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let below = Options::new().with("layers", "readonly,cow;store=memory");
    let image = Image::open(path.as_os_str(), &below, RW).unwrap();
    image.write_at(b"here", 100, NONE).unwrap();
    let mut found = [0; 6];
    image.read_at(&mut found, 99).unwrap();
    assert_eq!(&found, b"\x01here\x01");
    // It takes no more than a reader's lock.
    let other = Image::open(path.as_os_str(), &Options::new(), RO).unwrap();
    other.close().unwrap();
    image.close().unwrap();
    // With commit it has to be written.
    let options = Options::new().with("layers", "readonly,cow;commit=on");
    let e = Image::open(path.as_os_str(), &options, RW).err().unwrap();
    assert!(matches!(e, Error::ReadOnly(_)), "{e}");
    for (layers, what) in [
        ("cow;block-size=5000", "a power of two"),
        ("cow;store=tape", "file, memory"),
        ("cow;store=memory;directory=/tmp", "none with store=memory"),
        ("cow;directory=/nowhere", "in /nowhere': make a temporary file"),
    ] {
        let options = Options::new().with("layers", layers);
        let e = Image::open(path.as_os_str(), &options, RW).err().unwrap().to_string();
        assert!(e.contains(what), "{layers}: {e}");
    }
    // Opened read-only it changes nothing and reads all.
    let image = Image::open(path.as_os_str(), &Options::new().with("layers", "cow"), RO).unwrap();
    assert!(crate::is_read_only(image.write_at(b"x", 0, NONE)));
    assert!(read_all(&image) == vec![1; 1 << 20]);
}

#[test]
fn a_device_larger_than_any_file_costs_what_is_written() {
    let open = |layers| Image::open(layers, &Options::new(), RW).unwrap();
    let image = open("layers:cow;store=memory:mem:1E".as_ref());
    image.zero(1000, (1 << 60) - 2000, NONE).unwrap();
    image.write_at(b"far", (1 << 60) - 3, ReqFlags::FUA).unwrap();
    let mut found = [1; 6];
    image.read_at(&mut found, (1 << 60) - 6).unwrap();
    assert_eq!(&found, b"\0\0\0far");
    assert!(property(&image, "cow.allocated") <= 3 * 4096);
    image.close().unwrap();
}
