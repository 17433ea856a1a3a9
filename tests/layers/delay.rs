//! `delay`.

use std::time::{Duration, Instant};

use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

/// Every call once.
fn all_calls(dev: &qblk::block::Device) -> [qblk::Result<()>; 7] {
    let mut some = [qblk::Extent::default(); 8];
    let mut list = qblk::block::ExtentList::for_c(&mut some);
    [
        dev.read_slice(&mut [0; 512], 0),
        dev.write_slice(&[7; 512], 512, ReqFlags::FUA),
        dev.zero(1024, 512, ReqFlags::MAY_TRIM),
        dev.trim(2048, 512, ReqFlags::FUA),
        dev.flush(),
        dev.cache(0, 4096),
        dev.driver().extents(0, 4096, &mut list),
    ]
}

const ALL: [&str; 7] = [
    "1 read 0+512",
    "1 write 512+512 FUA",
    "1 zero 1024+512 MAY_TRIM",
    "1 trim 2048+512 FUA",
    "1 flush",
    "1 cache 0+4096",
    "1 extents 0+4096",
];

#[test]
fn each_kind_of_call_waits_for_its_time_and_passes_as_it_is() {
    let ms = Duration::from_millis;
    for (i, key) in
        ["read", "write", "zero", "trim", "flush", "cache", "extents"].iter().enumerate()
    {
        let r = Recorder::new(64 << 10, able());
        let dev = on(&r, "delay", &[(key, "40ms-60ms"), ("all", "0")], true).unwrap();
        assert_eq!(r.log(), ["open 1 rw"]);
        let began = Instant::now();
        all_calls(&dev).into_iter().for_each(|result| result.unwrap());
        assert!(began.elapsed() >= ms(40), "{key}");
        assert_eq!(r.log(), ALL);
        // The others go on at once, also with errors.
        r.fail(ALL[i].split_once(' ').unwrap().1, libc::EIO, 1);
        let results = all_calls(&dev);
        assert!(results.iter().enumerate().all(|(n, r)| r.is_err() == (n == i)), "{results:?}");
        assert_eq!(r.log(), ALL);
    }
    let r = Recorder::new(64 << 10, able());
    let began = Instant::now();
    let dev =
        on(&r, "delay", &[("all", "0.02"), ("open", "50ms"), ("close", "70ms")], true).unwrap();
    assert!(began.elapsed() >= ms(50));
    let began = Instant::now();
    all_calls(&dev).into_iter().for_each(|result| result.unwrap());
    assert!(began.elapsed() >= ms(7 * 20));
    r.log();
    let began = Instant::now();
    dev.driver().close().unwrap();
    assert!(began.elapsed() >= ms(90), "a flush, and what closing takes");
    assert_eq!(r.log(), ["1 flush to close"]);
}

#[test]
fn a_read_that_is_to_wait_for_nothing_does_not_slip_past() {
    let r = Recorder::new(4096, able());
    let slow = on(&r, "delay", &[("read", "1")], true).unwrap();
    let mut some = [0; 512];
    assert!(!slow.read_now(qblk::OneIov::dst(&mut some).iov(), 0).unwrap());
    assert!(!slow.caps().cached);
    assert_eq!(r.log(), ["open 1 rw"]);
}

#[test]
fn calls_wait_side_by_side() {
    let image = Image::open("layers:delay;all=300ms:mem:1M".as_ref(), &Options::new(), RW).unwrap();
    let began = Instant::now();
    std::thread::scope(|s| {
        for i in 0..20 {
            let image = &image;
            s.spawn(move || image.write_at(&[1; 512], i * 512, NONE).unwrap());
        }
    });
    let took = began.elapsed();
    let one_by_one = Duration::from_millis(300) * 20;
    assert!(took >= one_by_one / 20 && took < one_by_one / 2, "{took:?}");
}

#[test]
fn bytes_are_those_below() {
    let name = "layers:delay;all=0-200us;seed=1:mem:1M";
    let image = Image::open(name.as_ref(), &Options::new(), RW).unwrap();
    let mut model = vec![0; 1 << 20];
    model::run_many(&image, &mut model, 200, 4, seed("delay"));
    for (bad, what) in
        [("read=1001", "at most 1000s"), ("write=2-1", "a time such as"), ("seed=x", "number")]
    {
        let name = format!("layers:delay;{bad}:mem:1M");
        let e = Image::open(name.as_ref(), &Options::new(), RW).err().unwrap().to_string();
        assert!(e.contains("layer 'delay'") && e.contains(what), "{e}");
    }
}
