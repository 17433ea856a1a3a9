//! `cache`.

use std::sync::Arc;

use qblk::block::{Caps, Device};
use qblk::{Error, Extent, Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

const FUA: ReqFlags = ReqFlags::FUA;

/// Eight blocks of 4 KiB, two of which go below at a time.
fn small(r: &Arc<Recorder>, mode: &str) -> Device {
    let settings = [("mode", mode), ("block-size", "4096"), ("size", "32k")];
    on(r, "cache", &settings, true).unwrap()
}

fn read(dev: &Device, offset: u64, count: usize) -> Vec<u8> {
    let mut some = vec![0xee; count];
    dev.read_slice(&mut some, offset).unwrap();
    some
}

fn number(image: &Image, key: &str) -> u64 {
    String::from_utf8(image.property(key).unwrap().unwrap()).unwrap().parse().unwrap()
}

#[test]
fn what_was_read_or_written_is_not_read_again() {
    let r = Recorder::new(64 << 10, able());
    let before = r.bytes();
    let dev = small(&r, "write-back");
    // A block comes whole, several that follow one another at once.
    assert_eq!(read(&dev, 100, 10), before[100..110]);
    assert_eq!(read(&dev, 0, 8192), before[..8192]);
    assert_eq!(read(&dev, 10000, 10000), before[10000..20000]);
    assert_eq!(read(&dev, 0, 20000), before[..20000]);
    dev.cache(8192, 100).unwrap();
    let brought = ["1 read 0+4096", "1 read 4096+4096", "1 read 8192+8192", "1 read 16384+4096"];
    assert_eq!(r.log(), [&["open 1 rw"], &brought[..]].concat());
    // Bringing near is bringing here.
    dev.cache(20480, 8192).unwrap();
    assert_eq!(read(&dev, 20480, 8192), before[20480..28672]);
    assert_eq!(r.log(), ["1 read 20480+8192"]);
    // Read-only it is a cache of reads.
    let dev = on(&r, "cache", &[], false).unwrap();
    assert_eq!(read(&dev, 1, 2), before[1..3]);
    assert_eq!(read(&dev, 65535, 1), before[65535..]);
    assert_eq!(r.log(), ["open 2 ro", "2 read 0+65536"]);
}

#[test]
fn writes_go_below_when_flushed_together_and_once() {
    let r = Recorder::new(64 << 10, able());
    let dev = small(&r, "write-back");
    r.log();
    dev.write_slice(&[1; 10], 100, NONE).unwrap();
    dev.write_slice(&[2; 10], 110, NONE).unwrap();
    assert_eq!(r.log(), ["1 read 0+4096"], "around a part of a block");
    // Neighbours, one by one and backwards.
    for i in (1..4).rev() {
        dev.write_slice(&[i as u8; 4096], i * 4096, NONE).unwrap();
    }
    assert!(r.log().is_empty());
    assert_eq!(read(&dev, 105, 10), [1, 1, 1, 1, 1, 2, 2, 2, 2, 2]);
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 write 0+8192", "1 write 8192+8192", "1 flush"]);
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 flush"], "nothing is dirty any more");
    // FUA is below when it returns: of a block that is here, of one that is not, of many.
    dev.write_slice(&[3; 10], 200, FUA).unwrap();
    dev.write_slice(&[3; 10], 40000, FUA).unwrap();
    dev.write_slice(&[3; 8192], 20480, FUA).unwrap();
    assert_eq!(r.log(), ["1 write 200+10 FUA", "1 write 40000+10 FUA", "1 write 20480+8192 FUA"]);
    assert_eq!(read(&dev, 198, 4), [r.bytes()[198], r.bytes()[199], 3, 3]);
    assert_eq!(read(&dev, 20480, 8192), [3; 8192]);
    assert!(r.log().is_empty());
    // Of one that is dirty the rest stays so.
    dev.write_slice(&[4; 10], 300, NONE).unwrap();
    dev.write_slice(&[5; 10], 400, FUA).unwrap();
    dev.driver().close().unwrap();
    assert_eq!(r.log(), ["1 write 400+10 FUA", "1 write 0+4096", "1 flush to close"]);
    assert_eq!(r.bytes()[298..302], [r.bytes()[298], r.bytes()[299], 4, 4]);
    // Emulated it is one flush behind it all.
    let r = Recorder::new(64 << 10, Caps { fua: false, zero_fua: false, ..able() });
    let dev = small(&r, "write-back");
    dev.write_slice(&[1; 8192], 0, FUA).unwrap();
    assert_eq!(r.log(), ["open 1 rw", "1 write 0+8192", "1 flush"]);
}

#[test]
fn in_mode_write_through_every_write_goes_below_and_stays_here() {
    let r = Recorder::new(64 << 10, able());
    let dev = small(&r, "write-through");
    r.log();
    // A part of a block that is not here does not bring it; a whole one stays.
    dev.write_slice(&[1; 10], 100, NONE).unwrap();
    dev.write_slice(&[2; 8192], 4096, FUA).unwrap();
    assert_eq!(r.log(), ["1 write 100+10", "1 write 4096+8192 FUA"]);
    assert_eq!(read(&dev, 4096, 8192), [2; 8192]);
    assert!(r.log().is_empty());
    assert_eq!(read(&dev, 98, 4), [98, 99, 1, 1]);
    dev.write_slice(&[3; 10], 104, NONE).unwrap();
    assert_eq!(read(&dev, 102, 4), [1, 1, 3, 3]);
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 read 0+4096", "1 write 104+10", "1 flush"]);
    // One that fails leaves nothing here that is not below.
    r.fail("write", libc::EIO, 1);
    dev.write_slice(&[4; 10], 4096, NONE).unwrap_err();
    assert_eq!(read(&dev, 4096, 10), [2; 10]);
    assert_eq!(r.log(), ["1 write 4096+10", "1 read 4096+4096"]);
}

#[test]
fn zeroes_and_trims_go_below_and_are_here_too() {
    let r = Recorder::new(64 << 10, able());
    let dev = small(&r, "write-back");
    dev.write_slice(&[1; 12288], 0, NONE).unwrap();
    r.log();
    dev.zero(4000, 5000, FUA | ReqFlags::MAY_TRIM).unwrap();
    assert_eq!(r.log(), ["1 zero 4000+5000 FUA MAY_TRIM"]);
    let mut expected = vec![1; 12288];
    expected[4000..9000].fill(0);
    assert_eq!(read(&dev, 0, 12288), expected);
    assert_eq!(r.log(), ["1 read 4096+4096"], "the whole one is below");
    // Trimmed while dirty, it must not come back below.
    dev.trim(0, 4096, FUA).unwrap();
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 zero 0+4096 FUA MAY_TRIM FAST", "1 write 8192+4096", "1 flush"]);
    dev.trim(8192, 8192, NONE).unwrap();
    read(&dev, 8192, 1);
    assert_eq!(r.log(), ["1 trim 8192+8192", "1 read 8192+4096"]);
    // Where that can not be had it reads as before.
    dev.write_slice(&[7; 10], 8192, NONE).unwrap();
    r.log();
    r.fail("zero", libc::ENOTSUP, 1);
    assert!(dev.trim(8192, 4096, NONE).is_err(), "that was another error");
    let r = Recorder::new(64 << 10, Caps { zero: false, ..able() });
    let dev = small(&r, "write-back");
    dev.write_slice(&[7; 4096], 8192, NONE).unwrap();
    dev.trim(8192, 4096, NONE).unwrap();
    assert_eq!(read(&dev, 8192, 4096), [7; 4096]);
    dev.zero(8192, 100, NONE).unwrap();
    assert_eq!(r.log(), ["open 1 rw", "1 trim 8192+4096"], "zeroes are written, into the cache");
    assert_eq!(read(&dev, 8192, 200)[..], [[0; 100], [7; 100]].concat());
}

#[test]
fn a_full_cache_writes_back_what_was_not_used_for_longest() {
    let r = Recorder::new(64 << 10, able());
    let dev = small(&r, "write-back");
    r.log();
    for i in 0..8 {
        dev.write_slice(&[i as u8; 4096], i * 4096, NONE).unwrap();
    }
    assert!(r.log().is_empty());
    dev.write_slice(&[8; 4096], 8 * 4096, NONE).unwrap();
    assert_eq!(r.log(), ["1 write 0+8192"]);
    read(&dev, 9 * 4096, 1);
    assert_eq!(r.log(), ["1 read 36864+4096"], "its neighbour went with it");
    // It is never larger than it may be, and all of it can be had.
    for i in 0..9 {
        assert_eq!(read(&dev, i * 4096, 4096), [i as u8; 4096]);
    }
    dev.flush().unwrap();
    for i in 0..9 {
        assert_eq!(r.bytes()[i * 4096..][..4096], [i as u8; 4096]);
    }
}

#[test]
fn what_can_not_be_written_back_is_kept_and_told_by_every_flush() {
    let r = Recorder::new(64 << 10, able());
    let dev = small(&r, "write-back");
    for i in 0..8 {
        dev.write_slice(&[i as u8 + 1; 4096], i * 8192, NONE).unwrap();
    }
    r.log();
    r.fail("write", libc::EIO, 8);
    let e = dev.flush().unwrap_err();
    assert!(matches!(e, Error::Layer { .. }), "{e}");
    assert!(
        e.to_string().contains("layer 'cache': writing back failed; 32768 bytes are kept"),
        "{e}"
    );
    assert_eq!(e.kind(), qblk::block::ErrorKind::Errno(libc::EIO));
    assert_eq!(r.log().len(), 8, "all are tried, and nothing is flushed below");
    // Calls that need room do without: they go below.
    r.fail("write 0+4096", libc::EIO, 100);
    assert_eq!(read(&dev, 4096, 10), r.bytes()[4096..4106]);
    dev.write_slice(&[9; 10], 5000, NONE).unwrap();
    assert_eq!(r.log(), ["1 read 4096+10", "1 write 5000+10"]);
    for i in 0..8 {
        assert_eq!(read(&dev, i * 8192, 4096), [i as u8 + 1; 4096], "block {i} is here");
    }
    // The next flush tries again; one still fails.
    dev.flush().unwrap_err();
    assert_eq!(r.log().len(), 8);
    let r2 = r.bytes();
    assert_eq!((r2[0], r2[8192], r2[57344]), (0, 2, 8));
    r.forgive();
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 write 0+4096", "1 flush"]);
    assert_eq!(r.bytes()[..4096], [1; 4096]);
    // A flush that fails below fails here.
    r.fail("flush", libc::EIO, 1);
    dev.flush().unwrap_err();
}

#[test]
fn a_bad_sector_makes_only_itself_unreadable_and_can_be_mended() {
    let r = Recorder::new(64 << 10, able());
    let dev = small(&r, "write-back");
    r.log();
    // The block can not be read whole; the part that is wanted can.
    r.fail("read 4096+4096", libc::EIO, 100);
    r.fail("read 4096+8192", libc::EIO, 100);
    assert_eq!(read(&dev, 5000, 10), r.bytes()[5000..5010]);
    assert_eq!(r.log(), ["1 read 4096+4096", "1 read 5000+10"]);
    assert_eq!(read(&dev, 5000, 5000), r.bytes()[5000..10000]);
    assert_eq!(r.log(), ["1 read 4096+8192", "1 read 5000+5000"]);
    // What was wanted and can not be read is an error, also of bringing near.
    r.fail("read 6000+10", libc::EIO, 1);
    dev.read_slice(&mut [0; 10], 6000).unwrap_err();
    dev.cache(6000, 10).unwrap_err();
    dev.read_slice(&mut [0; 4096], 4096).unwrap_err();
    r.log();
    // A part that is written goes below, with the next flush at the latest for good.
    dev.write_slice(&[1; 512], 6144, NONE).unwrap();
    assert_eq!(r.log(), ["1 read 4096+4096", "1 write 6144+512"]);
    assert_eq!(r.bytes()[6144..6656], [1; 512]);
    r.forgive();
    assert_eq!(read(&dev, 6140, 8), [&r.bytes()[6140..6144], &[1; 4]].concat());
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 read 4096+4096", "1 flush"]);
}

#[test]
fn a_block_that_can_not_be_written_back_does_not_keep_its_neighbours() {
    let r = Recorder::new(64 << 10, able());
    let dev = small(&r, "write-back");
    dev.write_slice(&[1; 8192], 0, NONE).unwrap();
    r.log();
    r.fail("write 0+8192", libc::EIO, 100);
    r.fail("write 0+4096", libc::EIO, 100);
    let e = dev.flush().unwrap_err().to_string();
    assert!(e.contains("4096 bytes are kept"), "{e}");
    assert_eq!(r.log(), ["1 write 0+8192", "1 write 0+4096", "1 write 4096+4096"]);
    assert_eq!(r.bytes()[4096..8192], [1; 4096]);
    dev.flush().unwrap_err();
    assert_eq!(r.log(), ["1 write 0+4096"], "only that one is tried again");
    // If all can be written one by one nothing is wrong.
    r.forgive();
    dev.write_slice(&[2; 8192], 0, NONE).unwrap();
    r.fail("write 0+8192", libc::EIO, 1);
    dev.flush().unwrap();
    assert_eq!(r.bytes()[..8192], [2; 8192]);
}

#[test]
fn a_flush_writes_the_rest_of_a_run_whose_first_block_became_clean() {
    // What happened: the flush waited for a write with FUA of the first of two dirty blocks, found that one
    // clean, and passed over the other.
    let r = Recorder::new(64 << 10, able());
    let dev = &small(&r, "write-back");
    dev.write_slice(&[1; 8192], 0, NONE).unwrap();
    r.hold("write 0+4096 FUA");
    std::thread::scope(|s| {
        s.spawn(|| dev.write_slice(&[2; 4096], 0, FUA).unwrap());
        r.wait_held(1);
        let (tell, told) = std::sync::mpsc::channel();
        let flush = s.spawn(move || {
            // SAFETY: asks for nothing but the number of this thread.
            tell.send(unsafe { libc::gettid() }).unwrap();
            dev.flush().unwrap();
        });
        until_asleep(told.recv().unwrap());
        r.release();
        flush.join().unwrap();
        assert_eq!(r.bytes()[4096..8192], [1; 4096], "it was flushed");
    });
    assert_eq!(r.bytes()[..4096], [2; 4096]);
}

/// Wait until a thread waits for something.
fn until_asleep(thread: libc::pid_t) {
    let begin = std::time::Instant::now();
    let asleep = || {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
        stat.rsplit(')').next().unwrap().trim_start().starts_with('S')
    };
    while !asleep() {
        assert!(begin.elapsed().as_secs() < 60, "the thread does not come to wait");
        std::thread::yield_now();
    }
}

#[test]
fn reopened_below_it_has_only_what_is_dirty() {
    let r = Recorder::new(64 << 10, able());
    let dev = small(&r, "write-back");
    read(&dev, 0, 8192);
    dev.write_slice(&[1; 10], 4096, NONE).unwrap();
    // Another writes below, and the device is opened anew.
    r.set_bytes(&[9; 8192]);
    dev.driver().reopened();
    assert_eq!(read(&dev, 0, 4096), [9; 4096]);
    assert_eq!(read(&dev, 4096, 10), [1; 10]);
    dev.flush().unwrap();
    assert_eq!(r.bytes()[4096..4106], [1; 10]);
}

#[test]
fn what_was_acknowledged_before_a_flush_or_with_fua_is_below() {
    let size = 256 << 10;
    for mode in ["write-back", "write-through"] {
        let r = Recorder::new(size, able());
        let dev = small(&r, mode);
        let mut model = r.bytes();
        let rng = &mut Rng::new(seed("layers-cache-crash"));
        for n in 0..3000 {
            let at = rng.below(size as u64) as usize;
            let len = (rng.below(9000) as usize).min(size - at);
            let (range, flags) = (at..at + len, if rng.one_in(4) { FUA } else { NONE });
            match rng.below(8) {
                0..=4 => {
                    model[range.clone()].copy_from_slice(&rng.bytes(len));
                    dev.write_slice(&model[range.clone()], at as u64, flags).unwrap();
                }
                5 => {
                    model[range.clone()].fill(0);
                    dev.zero(at as u64, len as u64, flags).unwrap();
                }
                6 => assert!(read(&dev, at as u64, len) == model[range.clone()], "call {n}"),
                _ => {
                    dev.flush().unwrap();
                    assert!(r.bytes() == model, "call {n}: after a flush all is below");
                }
            }
            if mode == "write-through" {
                assert!(r.bytes() == model, "call {n}");
            }
        }
        // Of each write with FUA alone.
        for _ in 0..500 {
            let at = rng.below(size as u64 - 9000) as usize;
            let n = rng.below(9000) as usize + 1;
            let bytes = rng.bytes(n);
            let flags = if rng.one_in(2) { FUA } else { NONE };
            dev.write_slice(&bytes, at as u64, flags).unwrap();
            if flags == FUA {
                assert!(r.bytes()[at..at + bytes.len()] == bytes);
            }
        }
    }
}

#[test]
fn dirty_blocks_are_data_whatever_is_below() {
    let tmp = Tmp::new("layers-cache-extents");
    let path = tmp.join("a.img");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let image = crate::stacked(&path, "cache");
    image.write_at(&[1; 100], 65536 * 3 + 5, NONE).unwrap();
    assert_eq!(number(&image, "cache.dirty"), 65536);
    let zero = |image: &Image| -> Vec<_> {
        all_extents(image, 0, 1 << 20, 8)
            .iter()
            .map(|e| (e.offset, e.length, e.has(Extent::ZERO)))
            .collect()
    };
    let parts = [(0, 196608, true), (196608, 65536, false), (262144, 786432, true)];
    assert_eq!(zero(&image), parts);
    image.flush().unwrap();
    assert_eq!(number(&image, "cache.dirty"), 0);
    assert!(!zero(&image).iter().any(|e| e.2 && e.0 <= 196608 && 196608 < e.0 + e.1));
    image.close().unwrap();
}

#[test]
fn a_small_cache_is_right_under_mixed_load() {
    let tmp = Tmp::in_memory("layers-cache");
    let dir = tmp.path().display();
    for settings in [
        "cache;size=256k;block-size=4k".to_owned(),
        "cache;size=16k;block-size=4k;mode=write-through".to_owned(),
        format!("cache;size=1M;store=file;directory={dir}"),
        "cache".to_owned(),
    ] {
        let path = crate::qcow2(&tmp, (4 << 20) + 777);
        let image = crate::stacked(&path, &settings);
        let mut model = vec![0; (4 << 20) + 777];
        let rng = &mut Rng::new(seed("layers-cache"));
        model::run(&image, &mut model, 400, rng, Default::default());
        model::run_many(&image, &mut model, 400, 4, seed("layers-cache"));
        assert!(number(&image, "cache.hits") > 0, "{settings}");
        let most = if settings.contains("256k") { 256 << 10 } else { 64 << 20 };
        assert!(number(&image, "cache.allocated") <= most);
        image.close().unwrap();
        assert!(read_all(&open(&path, RO)) == model, "{settings}: closed, all is below");
        check_clean(&path);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn readers_of_blocks_that_are_written_see_one_write_or_the_other() {
    // Blocks come and go all the time while they are written: nothing old comes back.
    let image =
        Image::open("layers:cache;size=32k;block-size=4k:mem:256k".as_ref(), &Options::new(), RW)
            .unwrap();
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let image = &image;
            s.spawn(move || {
                // Each has 1 KiB of every block.
                let mut found = [0; 1024];
                for round in 1..30u8 {
                    for block in 0..64 {
                        let at = block * 4096 + t * 1024;
                        let flags = if block % 7 == t { FUA } else { NONE };
                        image.write_at(&[round; 1024], at, flags).unwrap();
                        image.read_at(&mut found, at).unwrap();
                        assert!(found == [round; 1024], "round {round}, block {block}");
                        if block > 9 {
                            image.read_at(&mut found, at - 9 * 4096).unwrap();
                            assert!(found == [round; 1024], "round {round}, {block}, older");
                        }
                    }
                    image.flush().unwrap();
                }
            });
        }
    });
    image.close().unwrap();
    for (layers, what) in [
        ("cache;size=64k", "2 to 4294967295 blocks of 65536 bytes"),
        ("cache;mode=fast", "write-back, write-through"),
        ("cache;block-size=1000", "a power of two"),
    ] {
        let name = format!("layers:{layers}:mem:1M");
        let e = Image::open(name.as_ref(), &Options::new(), RW).err().unwrap().to_string();
        assert!(e.contains(what), "{layers}: {e}");
    }
}

#[test]
fn a_block_that_is_written_back_can_be_read_and_is_not_changed_meanwhile() {
    let r = Recorder::new(64 << 10, able());
    let dev = &small(&r, "write-back");
    dev.write_slice(&[1; 4096], 0, NONE).unwrap();
    r.hold("write");
    std::thread::scope(|s| {
        s.spawn(|| dev.flush().unwrap());
        r.wait_held(1);
        assert_eq!(read(dev, 0, 100), [1; 100]);
        assert!(!dev.read_now(qblk::OneIov::dst(&mut [0; 10]).iov(), 4096).unwrap());
        let write = s.spawn(|| dev.write_slice(&[2; 10], 0, NONE).unwrap());
        assert_eq!(read(dev, 8192, 1), [r.bytes()[8192]], "others go on");
        assert!(!write.is_finished());
        r.release();
    });
    assert_eq!(r.bytes()[..12], [1; 12], "what came later is not below by an earlier flush");
    dev.flush().unwrap();
    assert_eq!(r.bytes()[..12], [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1]);
}

#[test]
fn of_two_readers_of_a_block_that_is_not_here_one_reads_it() {
    let r = Recorder::new(64 << 10, able());
    let dev = &small(&r, "write-back");
    r.log();
    r.hold("read 0+4096");
    std::thread::scope(|s| {
        s.spawn(|| read(dev, 0, 10));
        r.wait_held(1);
        s.spawn(|| read(dev, 100, 10));
        assert_eq!(read(dev, 4096, 1), [r.bytes()[4096]], "others go on");
        r.release();
    });
    let mut log = r.log();
    log.sort();
    assert_eq!(log, ["1 read 0+4096", "1 read 4096+4096"]);
}

#[test]
fn layers_that_keep_bytes_stand_on_each_other() {
    let tmp = Tmp::in_memory("layers-keeping");
    let path = crate::qcow2(&tmp, 4 << 20);
    for layers in [
        "cache;size=256k;block-size=8k,readahead;window=64k",
        "readahead;window=64k,cache;size=512k;mode=write-through",
        "cow;store=memory;commit=on,copy-on-read,cache;size=128k;block-size=4k,readahead",
        "copy-on-read,cow;store=memory;commit=on;block-size=512,cache;size=1M",
    ] {
        let mut model = read_all(&open(&path, RO));
        let image = crate::stacked(&path, layers);
        model::run(&image, &mut model, 300, &mut Rng::new(seed("keeping")), Default::default());
        model::run_many(&image, &mut model, 200, 3, seed("layers-keeping"));
        image.close().unwrap();
        assert!(read_all(&open(&path, RO)) == model, "{layers}: closed, all is below");
        check_clean(&path);
    }
}
