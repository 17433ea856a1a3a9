//! `rate`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

fn seconds(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64()
}

fn open(settings: &str) -> Image {
    let name = format!("layers:rate;{settings}:mem:8M");
    Image::open(name.as_ref(), &Options::new(), RW).unwrap()
}

#[test]
fn calls_pass_as_they_are_and_large_ones_in_pieces() {
    let r = Recorder::new(1 << 20, able());
    let dev = on(&r, "rate", &[("bytes", "100M"), ("requests", "1M")], true).unwrap();
    let mut some = vec![7; 1000];
    dev.write_slice(&some, 24, ReqFlags::FUA).unwrap();
    dev.read_slice(&mut some, 0).unwrap();
    dev.zero(0, 1 << 20, ReqFlags::MAY_TRIM).unwrap();
    dev.trim(0, 1 << 20, ReqFlags::FUA).unwrap();
    dev.cache(0, 1 << 20).unwrap();
    dev.flush().unwrap();
    let expected = [
        "open 1 rw",
        "1 write 24+1000 FUA",
        "1 read 0+1000",
        "1 zero 0+1048576 MAY_TRIM",
        "1 trim 0+1048576 FUA",
        "1 cache 0+1048576",
        "1 flush",
    ];
    assert_eq!(r.log(), expected);
    // Where a piece takes an eighth of a second; one that fails is the last.
    let dev = on(&r, "rate", &[("write-bytes", "1600k"), ("burst", "9")], true).unwrap();
    let some = vec![7; 500_000];
    dev.write_slice(&some, 100, ReqFlags::FUA).unwrap();
    let pieces =
        ["2 write 100+196608 FUA", "2 write 196708+196608 FUA", "2 write 393316+106784 FUA"];
    assert_eq!(r.log()[1..], pieces);
    dev.read_slice(&mut vec![0; 500_000], 0).unwrap();
    assert_eq!(r.log(), ["2 read 0+500000"], "what is not limited is not cut");
    r.fail("write 196708", libc::ENOSPC, 1);
    dev.write_slice(&some, 100, NONE).unwrap_err();
    assert_eq!(r.log().len(), 2);
    // Nothing slips past.
    let mut some = [0; 512];
    assert!(!dev.read_now(qblk::OneIov::dst(&mut some).iov(), 0).unwrap() && !dev.caps().cached);
}

#[test]
fn bytes_take_their_time_and_the_burst_does_not() {
    let (mut buf, data) = (vec![0; 4 << 20], vec![1; 1 << 20]);
    // After the burst a piece may begin at once, and the last is not waited for.
    let image = open("bytes=1M;burst=1");
    let first = seconds(|| image.write_at(&data, 0, NONE).unwrap());
    assert!(first < 0.7, "{first}: all of that is burst");
    let both = first
        + seconds(|| {
            image.read_at(&mut buf[..1 << 20], 0).unwrap();
            image.write_at(&data, 0, NONE).unwrap();
        });
    assert!((1.87..9.0).contains(&both), "{both}: both share what there is");
    let image = open("read-bytes=4M;burst=0");
    let took = seconds(|| (0..4).for_each(|i| image.write_at(&data, i << 20, NONE).unwrap()));
    assert!(took < 0.8, "{took}: writes are not limited");
    let took = seconds(|| image.read_at(&mut buf, 0).unwrap());
    assert!((0.87..9.0).contains(&took), "{took}: 7 of 8 pieces are waited for");
}

#[test]
fn requests_take_their_time() {
    let image = open("requests=100;burst=0");
    let took = seconds(|| {
        for i in 0..10 {
            image.write_at(&[1; 8], i, NONE).unwrap();
            image.zero(i, 1, NONE).unwrap();
            image.read_at(&mut [0; 8], i).unwrap();
            image.trim(i, 1, NONE).unwrap();
            image.flush().unwrap();
        }
    });
    assert!((0.39..5.0).contains(&took), "{took}: 40 requests, of which the first is free");
    let image = open("write-requests=10;burst=0");
    let took = seconds(|| (0..100).for_each(|_| image.read_at(&mut [0; 8], 0).unwrap()));
    assert!(took < 5.0, "{took}: reads are not limited");
    let took = seconds(|| (0..4).for_each(|_| image.write_at(&[0; 8], 0, NONE).unwrap()));
    assert!((0.3..5.0).contains(&took), "{took}");
}

#[test]
fn contexts_share_one_limit_and_nobody_starves() {
    let image = open("bytes=2M;burst=0");
    let done = AtomicBool::new(false);
    let counts: Vec<AtomicU64> = (0..5).map(|_| AtomicU64::new(0)).collect();
    let began = Instant::now();
    std::thread::scope(|s| {
        for (i, count) in counts.iter().enumerate() {
            let context = image.context(&Options::new(), RW).unwrap();
            let done = &done;
            s.spawn(move || {
                // The first takes large pieces, and many at a time.
                let size = if i == 0 { 1 << 20 } else { 16 << 10 };
                let data = vec![1; size];
                while !done.load(Relaxed) {
                    context.write_at(&data, (i as u64) << 20, NONE).unwrap();
                    count.fetch_add(1, Relaxed);
                }
            });
        }
        while began.elapsed() < Duration::from_secs(3) {
            std::thread::sleep(Duration::from_millis(20));
        }
        done.store(true, Relaxed);
    });
    let took = began.elapsed().as_secs_f64();
    let counts: Vec<u64> = counts.iter().map(|c| c.load(Relaxed)).collect();
    let bytes = counts[0] * (1 << 20) + counts[1..].iter().sum::<u64>() * (16 << 10);
    // The last pieces were not waited for.
    assert!(
        bytes as f64 <= took * (2 << 20) as f64 + 5.0 * (256 << 10) as f64,
        "{bytes} in {took}"
    );
    // A turn of all five takes about 0.16 s: one piece of 256 KiB and four of 16 KiB.
    assert!(counts[1..].iter().all(|n| *n >= 5), "{counts:?}");
    let (least, most) = (counts[1..].iter().min().unwrap(), counts[1..].iter().max().unwrap());
    assert!(most - least <= 3 + most / 4, "turns are alike: {counts:?}");
}

#[test]
fn bytes_are_those_below() {
    let image = open("bytes=2G;requests=1M;read-requests=1M;write-bytes=1G");
    let mut model = vec![0; 8 << 20];
    model::run_many(&image, &mut model, 150, 4, seed("rate"));
}

#[test]
fn limits_that_mean_nothing_are_refused() {
    for (settings, what) in [
        (&[][..], "needs the setting 'bytes'"),
        (&[("bytes", "0")], "a number such as 500, 64k, 10M, and 66 at least"),
        // The first piece would take its reader half an hour.
        (&[("read-bytes", "32")], "and 66 at least"),
        (&[("write-bytes", "65")], "and 66 at least"),
        (&[("requests", "-1")], "and 1 at least"),
        (&[("read-requests", "0")], "and 1 at least"),
        (&[("burst", "1")], "needs the setting"),
        (&[("bytes", "1M"), ("burst", "x")], "seconds"),
    ] {
        let e = on(&Recorder::new(512, able()), "rate", settings, true).err().unwrap().to_string();
        assert!(e.contains("layer 'rate'") && e.contains(what), "{e}");
    }
    // As slow, and as fast, as can be said.
    let slow = open("bytes=66;requests=1;read-requests=15E;burst=1000000");
    slow.read_at(&mut [0; 4096], 0).unwrap();
}
