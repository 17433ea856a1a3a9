//! `readahead`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use qblk::block::Device;
use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

const SMALL: [(&str, &str); 2] = [("window", "64k"), ("size", "64k")];

fn property(dev: &Device, key: &str) -> u64 {
    let all = dev.driver().describe().properties;
    let value = all.into_iter().find(|p| p.0 == key).unwrap_or_else(|| panic!("no {key}")).1;
    String::from_utf8(value).unwrap().parse().unwrap()
}

fn number(image: &Image, key: &str) -> u64 {
    String::from_utf8(image.property(key).unwrap().unwrap()).unwrap().parse().unwrap()
}

/// Wait until so many bytes have been read ahead.
fn until_read(dev: &Device, bytes: u64) {
    let begin = Instant::now();
    while property(dev, "readahead.read") < bytes {
        assert!(begin.elapsed() < Duration::from_secs(60), "{bytes} bytes are not read ahead");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Read, and compare with what is below.
fn read(r: &Arc<Recorder>, dev: &Device, offset: u64, count: usize) {
    let mut some = vec![0xee; count];
    dev.read_slice(&mut some, offset).unwrap();
    assert!(some == r.bytes()[offset as usize..][..count], "{count} bytes at {offset}");
}

#[test]
fn the_second_read_in_order_has_the_next_ones_read_by_another_context() {
    let r = Recorder::new(1 << 20, able());
    let dev = on(&r, "readahead", &SMALL, true).unwrap();
    read(&r, &dev, 0, 4096);
    read(&r, &dev, 500_000, 100);
    assert_eq!(r.log(), ["open 1 rw", "open 2 ro", "1 read 0+4096", "1 read 500000+100"]);
    read(&r, &dev, 4096, 4096);
    until_read(&dev, 16384);
    let mut log = r.log();
    log.sort();
    assert_eq!(log, ["1 read 4096+4096", "2 read 8192+16384"]);
    // What is there is not read again; half-way it goes on, further than before.
    read(&r, &dev, 8192, 4096);
    until_read(&dev, 32768);
    read(&r, &dev, 12288, 4096);
    read(&r, &dev, 16384, 8192);
    until_read(&dev, 65536);
    read(&r, &dev, 24576, 8192);
    assert_eq!(r.log(), ["2 read 24576+16384", "2 read 40960+16384", "2 read 57344+16384"]);
    assert!(property(&dev, "readahead.allocated") <= 65536);
    assert_eq!(property(&dev, "readahead.used"), 24576);
    // Two reads of it at odd places, one of them half beyond.
    read(&r, &dev, 33000, 10000);
    assert!(r.log().iter().all(|call| call.starts_with("2 read")));
    drop(dev);
    let log = r.log();
    assert_eq!(log[log.len() - 2..], ["close 1", "close 2"], "the thread has ended");
}

#[test]
fn a_change_drops_what_was_read_ahead() {
    for change in 0..3 {
        let r = Recorder::new(1 << 20, able());
        let dev = on(&r, "readahead", &SMALL, true).unwrap();
        read(&r, &dev, 0, 4096);
        read(&r, &dev, 4096, 4096);
        until_read(&dev, 16384);
        r.log();
        let flags = ReqFlags::FUA;
        match change {
            0 => dev.write_slice(&[1; 10], 10000, flags).unwrap(),
            1 => dev.zero(10000, 10, flags | ReqFlags::MAY_TRIM).unwrap(),
            _ => dev.trim(10000, 10, flags).unwrap(),
        }
        dev.flush().unwrap();
        read(&r, &dev, 9000, 2000);
        let changed =
            ["1 write 10000+10 FUA", "1 zero 10000+10 FUA MAY_TRIM", "1 trim 10000+10 FUA"];
        let log: Vec<_> = r.log().into_iter().filter(|c| !c.starts_with('2')).collect();
        assert_eq!(log, [changed[change], "1 flush", "1 read 9000+2000"]);
    }
}

#[test]
fn a_failure_in_the_background_is_told_to_nobody_who_did_not_ask() {
    let r = Recorder::new(128 << 10, able());
    let dev = on(&r, "readahead", &SMALL, true).unwrap();
    read(&r, &dev, 0, 4096);
    r.fail("read 8192+16384", libc::EIO, 1);
    read(&r, &dev, 4096, 4096);
    // Whether the thread has come to it by now or not, the bytes are read.
    read(&r, &dev, 8192, 4096);
    // What fails for the reader is told.
    r.fail("read 100000", libc::EIO, 1);
    let mut some = [0; 10];
    dev.read_slice(&mut some, 100_000).unwrap_err();
    drop(dev);
    // So does a context that can not be opened, at once.
    r.fail("open", libc::EMFILE, 1);
    assert!(on(&r, "readahead", &SMALL, true).is_err());
    for (key, value) in [("window", "1k"), ("size", "1M"), ("streams", "0")] {
        let e = on(&r, "readahead", &[(key, value)], true).err().unwrap().to_string();
        assert!(e.contains(&format!("layer 'readahead': {key}: found '{value}'")), "{e}");
    }
}

#[test]
fn several_streams_are_told_apart_and_random_reads_cost_nothing() {
    let r = Recorder::new(4 << 20, able());
    let dev = on(&r, "readahead", &[("window", "64k"), ("size", "1M")], true).unwrap();
    // No two of these follow one another.
    for i in 0..200u64 {
        read(&r, &dev, i * 7919 % 200 * 20000, 512);
    }
    assert!(r.log().iter().all(|call| !call.starts_with("2 read")), "nobody reads in order");
    let mut at = [0u64; 4];
    for round in 0..32 {
        for (i, at) in at.iter_mut().enumerate() {
            read(&r, &dev, ((i as u64) << 20) + *at, 8192);
            *at += 8192;
        }
        if round == 1 {
            until_read(&dev, 4 * 32768);
            r.log();
        }
    }
    // Later a read may be there before the thread is, and do it itself.
    assert!(property(&dev, "readahead.used") >= 4 * 32768);
}

#[test]
fn readers_in_order_beside_writers_never_see_what_was_before() {
    let tmp = Tmp::in_memory("layers-readahead");
    let path = tmp.join("a.img");
    let size = 2u64 << 20;
    std::fs::write(&path, vec![0; size as usize]).unwrap();
    let image = crate::stacked(&path, "readahead;window=128k;size=256k");
    let failed = AtomicBool::new(false);
    std::thread::scope(|s| {
        for t in 0..3u64 {
            let (image, failed) = (&image, &failed);
            s.spawn(move || {
                // Each has a part, in which it writes a little ahead of where it reads.
                let (base, part) = (t * (size / 4), size / 4);
                let mut block = vec![0; 4096];
                for round in 1..=20u8 {
                    for at in (0..part).step_by(4096) {
                        let ahead = base + (at + 16384) % part;
                        image.write_at(&[round; 4096], ahead, NONE).unwrap();
                        image.read_at(&mut block, base + at).unwrap();
                        let now = if at >= 16384 { round } else { round - 1 };
                        if block != [now; 4096] {
                            failed.store(true, Relaxed);
                        }
                    }
                }
            });
        }
    });
    assert!(!failed.load(Relaxed), "a read was answered with bytes from before a write");
    let mut model = read_all(&image);
    model::run_many(&image, &mut model, 400, 4, seed("layers-readahead"));
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == model);
}

#[test]
fn a_device_is_read_in_order_by_the_background() {
    let tmp = Tmp::new("layers-readahead-qcow2");
    let path = crate::qcow2(&tmp, 8 << 20);
    let bytes = Rng::new(seed("layers-readahead-qcow2")).bytes(8 << 20);
    let image = open(&path, RW);
    image.write_at(&bytes, 0, NONE).unwrap();
    image.close().unwrap();
    let options = Options::new().with("layers", "readahead;window=256k");
    let image = Image::open(path.as_os_str(), &options, RO).unwrap();
    let mut found = vec![0; bytes.len()];
    for (i, block) in found.chunks_mut(16384).enumerate() {
        image.read_at(block, i as u64 * 16384).unwrap();
        let begin = Instant::now();
        while i == 1 && number(&image, "readahead.read") < 65536 {
            assert!(begin.elapsed() < Duration::from_secs(60), "nothing is read ahead");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(found == bytes);
    assert!(number(&image, "readahead.used") >= 65536);
    image.close().unwrap();
}

#[test]
fn what_was_being_read_ahead_while_it_was_changed_is_not_used() {
    let r = Recorder::new(1 << 20, able());
    let dev = on(&r, "readahead", &SMALL, true).unwrap();
    r.hold("read 8192+16384");
    read(&r, &dev, 0, 4096);
    read(&r, &dev, 4096, 4096);
    r.wait_held(1);
    std::thread::scope(|s| {
        // Somebody waits for it, and is let go by the change.
        let waits = s.spawn(|| read(&r, &dev, 8192, 100));
        dev.write_slice(&[9; 100], 20000, NONE).unwrap();
        waits.join().unwrap();
    });
    let mut found = [0; 100];
    dev.read_slice(&mut found, 20000).unwrap();
    assert_eq!(found, [9; 100]);
    r.release();
    // Nor once it has come.
    for _ in 0..3 {
        read(&r, &dev, 20000, 100);
    }
    drop(dev);
}

#[test]
fn reopened_below_it_reads_again() {
    let r = Recorder::new(1 << 20, able());
    let dev = on(&r, "readahead", &SMALL, true).unwrap();
    read(&r, &dev, 0, 4096);
    read(&r, &dev, 4096, 4096);
    until_read(&dev, 16384);
    // Another writes below, and the device is opened anew.
    r.set_bytes(&[9; 32768]);
    dev.driver().reopened();
    assert_eq!(property(&dev, "readahead.allocated"), 0);
    read(&r, &dev, 8192, 16384);
}
