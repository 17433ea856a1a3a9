//! `blocksize`.

use std::sync::mpsc;
use std::time::Duration;

use qblk::block::*;
use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

fn log_of(r: &Recorder, work: impl FnOnce()) -> Vec<String> {
    r.log();
    work();
    r.log()
}

#[test]
fn parts_of_blocks_are_read_changed_and_written_back() {
    // A tail that is no block can not be reached.
    let r = Recorder::new((16 << 10) + 100, able());
    let dev = on(&r, "blocksize", &[("minimum", "4k")], true).unwrap();
    assert_eq!(r.log(), ["open 1 rw"]);
    assert_eq!(dev.size(), 16 << 10);
    let before = r.bytes();
    let mut some = vec![0; 6000];
    let reads = ["1 read 0+4096", "1 read 4096+4096"];
    assert_eq!(log_of(&r, || dev.read_slice(&mut some[..10], 4090).unwrap()), reads);
    assert_eq!(some[..10], before[4090..4100]);
    let new = [7; 6000];
    let write = |at, len| dev.write_slice(&new[..len], at, ReqFlags::FUA).unwrap();
    assert_eq!(log_of(&r, || write(4096, 4096)), ["1 write 4096+4096 FUA"]);
    assert_eq!(log_of(&r, || write(100, 1)), ["1 read 0+4096", "1 write 0+4096 FUA"]);
    let twice =
        ["1 read 4096+4096", "1 write 4096+4096 FUA", "1 read 8192+4096", "1 write 8192+4096 FUA"];
    assert_eq!(log_of(&r, || write(5000, 6000)), twice);
    // Zeroing: the whole blocks natively, the ends by writing.
    let zeroed = log_of(&r, || dev.zero(4000, 4200, ReqFlags::FUA).unwrap());
    let expected = [
        "1 zero 4096+4096 FUA",
        "1 read 0+4096",
        "1 write 0+4096 FUA",
        "1 read 8192+4096",
        "1 write 8192+4096 FUA",
    ];
    assert_eq!(zeroed, expected);
    assert_eq!(log_of(&r, || dev.trim(1, 9000, ReqFlags::FUA).unwrap()), ["1 trim 4096+4096 FUA"]);
    assert_eq!(log_of(&r, || dev.trim(1, 4096, NONE).unwrap()), [""; 0]);
    assert_eq!(log_of(&r, || dev.cache(4095, 2).unwrap()), ["1 cache 0+8192"]);
    assert_eq!(log_of(&r, || dev.flush().unwrap()), ["1 flush"]);
    let mut found = [Extent::default(); 2];
    let mut list = ExtentList::new(&mut found);
    let extents = log_of(&r, || dev.driver().extents(5000, 10, &mut list).unwrap());
    assert_eq!(extents, ["1 extents 4096+4096"]);
    assert_eq!((found[0].offset, found[0].length), (5000, 10));
    let mut model = before;
    model[4096..8192].fill(7);
    model[100] = 7;
    model[5000..11000].fill(7);
    model[4000..8200].fill(0);
    assert!(r.bytes() == model);
}

#[test]
fn long_requests_are_cut() {
    let r = Recorder::new(64 << 10, Caps { zero: false, ..able() });
    let settings = [("minimum", "512"), ("maximum", "4k"), ("maximum-range", "16k")];
    let dev = on(&r, "blocksize", &settings, true).unwrap();
    assert_eq!(r.log(), ["open 1 rw"]);
    let mut some = vec![0; 9 << 10];
    let reads = ["1 read 512+4096", "1 read 4608+4096", "1 read 8704+1024"];
    assert_eq!(log_of(&r, || dev.read_slice(&mut some, 512).unwrap()), reads);
    let writes = ["1 write 0+4096 FUA", "1 write 4096+4096 FUA", "1 write 8192+1024 FUA"];
    assert_eq!(log_of(&r, || dev.write_slice(&some, 0, ReqFlags::FUA).unwrap()), writes);
    // Zeroes are written where they have to be, and those are cut as any write.
    let zeroes = ["1 write 0+4096", "1 write 4096+4096", "1 write 8192+512"];
    assert_eq!(log_of(&r, || dev.zero(0, 8704, NONE).unwrap()), zeroes);
    let trims = ["1 trim 512+16384", "1 trim 16896+1024"];
    assert_eq!(log_of(&r, || dev.trim(511, 17410, NONE).unwrap()), trims);
    let caches = ["1 cache 0+16384", "1 cache 16384+512"];
    assert_eq!(log_of(&r, || dev.cache(511, 16384).unwrap()), caches);
    // The rest of one that fails is not done.
    r.fail("write 4096+", libc::EIO, 1);
    let failed = log_of(&r, || drop(dev.write_slice(&some, 0, NONE).unwrap_err()));
    assert_eq!(failed, ["1 write 0+4096", "1 write 4096+4096"]);
    r.fail("read 512+", libc::EIO, 1);
    let failed = log_of(&r, || drop(dev.write_slice(&some[..5], 600, NONE).unwrap_err()));
    assert_eq!(failed, ["1 read 512+512"]);
}

#[test]
fn flushes_stand_in_for_fua_once() {
    let plain = Caps { fua: false, zero_fua: false, trim_fua: false, ..able() };
    let r = Recorder::new(64 << 10, plain);
    let dev = on(&r, "blocksize", &[("minimum", "512"), ("maximum", "1k")], true).unwrap();
    let write = log_of(&r, || dev.write_slice(&[1; 2048], 0, ReqFlags::FUA).unwrap());
    assert_eq!(write, ["1 write 0+1024", "1 write 1024+1024", "1 flush"]);
    let zero = log_of(&r, || dev.zero(0, 1536, ReqFlags::FUA).unwrap());
    assert_eq!(zero, ["1 zero 0+1024", "1 zero 1024+512", "1 flush"]);
}

#[test]
fn nonsense_is_refused() {
    let r = Recorder::new(4096, able());
    for (settings, what) in [
        (&[][..], "needs the setting 'minimum'"),
        (&[("minimum", "1000")], "a power of two up to 1M"),
        (&[("minimum", "0")], "a power of two"),
        (&[("minimum", "2M")], "a power of two up to 1M"),
        (&[("minimum", "512"), ("maximum", "1000")], "a multiple of the 512 bytes"),
        (&[("maximum", "0")], "a multiple of the 1 bytes"),
        (&[("minimum", "512"), ("maximum-range", "513")], "maximum-range: found '513'"),
    ] {
        let e = on(&r, "blocksize", settings, true).err().unwrap().to_string();
        assert!(e.contains(what), "{settings:?}: {e}");
    }
}

#[test]
fn below_sees_whole_blocks_only_whatever_is_asked_above() {
    let r = Recorder::new(256 << 10, able());
    let settings = [("minimum", "1k"), ("maximum", "3k"), ("maximum-range", "8k")];
    let dev = on(&r, "blocksize", &settings, true).unwrap();
    r.log();
    let mut rng = Rng::new(seed("blocksize-whole"));
    let mut model = r.bytes();
    for _ in 0..3000 {
        let at = rng.below(model.len() as u64) as usize;
        let len = (rng.below(20_000) as usize).min(model.len() - at);
        let (offset, count) = (at as u64, len as u64);
        match rng.below(5) {
            0 => {
                model[at..at + len].copy_from_slice(&rng.bytes(len));
                dev.write_slice(&model[at..at + len], offset, NONE).unwrap();
            }
            1 => {
                let mut found = vec![0; len];
                dev.read_slice(&mut found, offset).unwrap();
                assert_same(&found, &model[at..at + len], offset, "read");
            }
            2 => {
                model[at..at + len].fill(0);
                dev.zero(offset, count, NONE).unwrap();
            }
            3 => dev.trim(offset, count, NONE).unwrap(),
            _ => dev.cache(offset, count).unwrap(),
        }
        for line in r.log() {
            let (_, call) = line.split_once(' ').unwrap();
            let (what, range) = call.split_once(' ').unwrap();
            let (at, len) = range.split_once('+').unwrap();
            let (at, len): (u64, u64) = (at.parse().unwrap(), len.parse().unwrap());
            let most = if matches!(what, "read" | "write") { 3 << 10 } else { 8 << 10 };
            assert!(at % 1024 == 0 && len % 1024 == 0 && len > 0 && len <= most, "{line}");
        }
    }
    assert!(r.bytes() == model);
}

#[test]
fn parts_that_meet_inside_a_block_lose_nothing() {
    let tmp = Tmp::new("blocksize");
    let path = tmp.join("a.qcow2");
    // Neither the size nor the parts of the threads are multiples of the block.
    create(&path, "qcow2", 1_000_003, &[]);
    let options = options(&[("layers", "blocksize;minimum=64k;maximum=128k")]);
    let image = Image::open(path.as_os_str(), &options, RW).unwrap();
    let mut model = vec![0; image.size().unwrap() as usize];
    assert_eq!(model.len(), 983_040);
    let (each, threads) = (model.len() / 7, 7);
    assert!(each % 65536 != 0);
    model.truncate(each * threads);
    model::run_many(&image, &mut model, 300, threads, seed("blocksize"));
    image.close().unwrap();
    let image = Image::open(path.as_os_str(), &Options::new(), RO).unwrap();
    let mut all = vec![0; model.len()];
    image.read_at(&mut all, 0).unwrap();
    assert!(all == model);
}

/// Once a write of part of block 0 has read it, `second` must not reach what is below before it is
/// written back; one on another block does.
fn waits_for_the_block(second: impl Fn(&Device) + Sync, waits: &[&str]) {
    let r = Recorder::new(64 << 10, able());
    let dev = on(&r, "blocksize", &[("minimum", "4k")], true).unwrap();
    r.log();
    r.hold("write 0+4096");
    let (done, is_done) = mpsc::channel();
    std::thread::scope(|s| {
        s.spawn(|| dev.write_slice(&[1; 10], 0, NONE).unwrap());
        r.wait_held(1);
        let (dev, second) = (&dev, &second);
        s.spawn(move || {
            second(dev);
            done.send(()).unwrap();
        });
        dev.write_slice(&[3; 10], 4096, NONE).unwrap();
        // That it waits can not be waited for; if it did not it would be below by now.
        is_done.recv_timeout(Duration::from_millis(100)).unwrap_err();
        let first = ["1 read 0+4096", "1 write 0+4096", "1 read 4096+4096", "1 write 4096+4096"];
        assert_eq!(r.log(), first);
        r.release();
        is_done.recv_timeout(Duration::from_secs(60)).unwrap();
    });
    assert_eq!(r.log(), waits);
}

#[test]
fn a_block_that_is_being_changed_is_waited_for() {
    let write = |dev: &Device| dev.write_slice(&[2; 10], 100, NONE).unwrap();
    waits_for_the_block(write, &["1 read 0+4096", "1 write 0+4096"]);
    let whole = |dev: &Device| dev.write_slice(&[2; 4096], 0, NONE).unwrap();
    waits_for_the_block(whole, &["1 write 0+4096"]);
    // What was read before a block is zeroed must not be written behind that.
    waits_for_the_block(|dev| dev.zero(0, 4096, NONE).unwrap(), &["1 zero 0+4096"]);
    waits_for_the_block(|dev| dev.trim(0, 4096, NONE).unwrap(), &["1 trim 0+4096"]);
}
