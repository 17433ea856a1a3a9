//! `error`.

use qblk::block::{Device, ErrorKind};
use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::recorder::*;

/// Every kind of call once: which of them fail, and with what.
fn failing(dev: &Device) -> Vec<(&'static str, i32)> {
    let mut some = [qblk::Extent::default(); 8];
    let mut list = qblk::block::ExtentList::for_c(&mut some);
    let results = [
        ("read", dev.read_slice(&mut [0; 512], 0)),
        ("write", dev.write_slice(&[7; 512], 512, NONE)),
        ("zero", dev.zero(1024, 512, NONE)),
        ("trim", dev.trim(2048, 512, NONE)),
        ("flush", dev.flush()),
        ("cache", dev.cache(0, 4096)),
        ("extents", dev.driver().extents(0, 4096, &mut list)),
    ];
    let errno = |r: qblk::Result<()>| match r.err()?.kind() {
        ErrorKind::Errno(n) => Some(n),
        other => panic!("{other:?}"),
    };
    results.into_iter().filter_map(|(name, r)| Some((name, errno(r)?))).collect()
}

/// Which of `n` writes fail.
fn writes(dev: &Device, n: usize) -> Vec<usize> {
    (0..n).filter(|_| dev.write_slice(&[7; 512], 512, NONE).is_err()).collect()
}

const ALL: [&str; 7] = ["read", "write", "zero", "trim", "flush", "cache", "extents"];

#[test]
fn a_call_that_fails_is_not_made_and_the_others_are() {
    for which in ALL {
        let r = Recorder::new(64 << 10, able());
        let dev = on(&r, "error", &[("calls", which), ("errno", "ENOSPC")], true).unwrap();
        assert_eq!(r.log(), ["open 1 rw"]);
        assert_eq!(failing(&dev), [(which, libc::ENOSPC)]);
        let log = r.log();
        let made: Vec<_> = log.iter().map(|l| l.split(' ').nth(1).unwrap()).collect();
        let others: Vec<_> = ALL.into_iter().filter(|c| *c != which).collect();
        assert_eq!(made, others);
        // Also not by a side door.
        let mut some = [0; 512];
        let now = dev.read_now(qblk::OneIov::dst(&mut some).iov(), 0).unwrap();
        assert!(!now && r.log().is_empty());
    }
    let r = Recorder::new(64 << 10, able());
    let dev = on(&r, "error", &[("calls", "flush+write")], true).unwrap();
    assert_eq!(failing(&dev), [("write", libc::EIO), ("flush", libc::EIO)]);
    let dev = on(&r, "error", &[("errno", "121")], true).unwrap();
    assert_eq!(failing(&dev), ALL.map(|c| (c, 121)));
    let e = dev.write_slice(&[7; 512], 512, NONE).unwrap_err().to_string();
    assert!(e.contains("layer 'error': write of 512 bytes at offset 512 was made to fail"), "{e}");
    assert!(dev.driver().close().is_err(), "closing flushes");
}

#[test]
fn emulation_above_meets_the_error() {
    // Zeroing by writing, and FUA by flushing, as they are done over any device.
    let caps =
        qblk::block::Caps { zero: false, fua: false, zero_fua: false, trim_fua: false, ..able() };
    let r = Recorder::new(64 << 10, caps);
    let dev = on(&r, "error", &[("calls", "write"), ("after", "1"), ("times", "1")], true).unwrap();
    dev.zero(0, 512, ReqFlags::FUA).unwrap();
    assert_eq!(r.log(), ["open 1 rw", "1 write 0+512", "1 flush"]);
    dev.zero(0, 512, ReqFlags::FUA).unwrap_err();
    assert!(r.log().is_empty(), "nor is what was not written flushed");
    let dev = on(&r, "error", &[("calls", "flush")], true).unwrap();
    dev.write_slice(&[7; 512], 0, ReqFlags::FUA).unwrap_err();
    assert_eq!(r.log(), ["open 2 rw", "2 write 0+512"]);
}

#[test]
fn rules_choose_among_the_calls() {
    let r = Recorder::new(64 << 10, able());
    let with = |settings: &[(&str, &str)]| on(&r, "error", settings, true).unwrap();
    assert_eq!(writes(&with(&[("every", "3")]), 10), [2, 5, 8]);
    assert_eq!(writes(&with(&[("after", "7")]), 10), [7, 8, 9]);
    assert_eq!(writes(&with(&[("after", "2"), ("every", "3")]), 10), [4, 7]);
    assert_eq!(writes(&with(&[("after", "2"), ("times", "3")]), 10), [2, 3, 4]);
    assert_eq!(writes(&with(&[("times", "0")]), 10), []);
    assert_eq!(writes(&with(&[("probability", "0")]), 100), []);
    assert_eq!(writes(&with(&[("probability", "100%")]), 100).len(), 100);
    let some = writes(&with(&[("probability", "0.3"), ("seed", "5")]), 1000);
    assert!((200..400).contains(&some.len()), "{}", some.len());
    assert_eq!(some, writes(&with(&[("probability", "30%"), ("seed", "5")]), 1000));
    assert_ne!(some, writes(&with(&[("probability", "30%"), ("seed", "6")]), 1000));
    // What is not about a call does not count it.
    let dev = with(&[("calls", "read"), ("every", "2")]);
    assert_eq!(writes(&dev, 5), []);
    dev.read_slice(&mut [0; 512], 0).unwrap();
    dev.read_slice(&mut [0; 512], 0).unwrap_err();
}

#[test]
fn a_range_is_met_by_what_touches_it_and_never_by_a_flush() {
    let r = Recorder::new(64 << 10, able());
    let dev = on(&r, "error", &[("range", "1000-2000,8k+1")], true).unwrap();
    let fails = |at, n: usize| dev.write_slice(&vec![7; n], at, NONE).is_err();
    assert!(!fails(0, 1000) && fails(0, 1001) && fails(1999, 1) && !fails(2000, 6192));
    assert!(fails(2000, 6193) && fails(8192, 1) && !fails(8193, 512));
    dev.flush().unwrap();
    dev.zero(500, 5000, NONE).unwrap_err();
    dev.trim(0, 1000, NONE).unwrap();
}

#[test]
fn a_file_switches_it_on_and_off() {
    let tmp = Tmp::new("layers-error");
    let flag = tmp.join("a, b; c");
    let options = Options::new().with("layers", "error;calls=write");
    let options = options.with("error.file", flag.to_str().unwrap());
    let image = Image::open("mem:1M".as_ref(), &options, RW).unwrap();
    let write = || image.write_at(b"x", 0, NONE);
    write().unwrap();
    std::fs::write(&flag, b"").unwrap();
    write().unwrap_err();
    write().unwrap_err();
    std::fs::remove_file(&flag).unwrap();
    write().unwrap();
    let count = |key| String::from_utf8(image.property(key).unwrap().unwrap()).unwrap();
    assert_eq!((count("error.calls"), count("error.errors")), ("2".into(), "2".into()));
}

#[test]
fn what_fails_changes_nothing_and_what_does_not_does_all() {
    let options =
        Options::new().with("layers", "error;probability=20%25;calls=write+zero+read+flush");
    let image = Image::open("mem:1M".as_ref(), &options, RW).unwrap();
    let (mut model, mut rng) = (vec![0u8; 1 << 20], Rng::new(seed("error")));
    let mut errors = 0;
    for _ in 0..2000 {
        let at = rng.below(1 << 20);
        let n = rng.below(9000).min((1 << 20) - at);
        let range = at as usize..(at + n) as usize;
        let result = match rng.below(4) {
            0 => {
                let new = rng.bytes(n as usize);
                let result = image.write_at(&new, at, NONE);
                if result.is_ok() {
                    model[range].copy_from_slice(&new);
                }
                result
            }
            1 => {
                let result = image.zero(at, n, ReqFlags::MAY_TRIM);
                if result.is_ok() {
                    model[range].fill(0);
                }
                result
            }
            2 => image.flush(),
            _ => {
                let mut found = vec![0; n as usize];
                let result = image.read_at(&mut found, at);
                assert!(result.is_err() || found == model[range]);
                result
            }
        };
        errors += usize::from(result.is_err());
    }
    assert!((200..700).contains(&errors), "{errors}");
}

#[test]
fn rules_that_mean_nothing_are_refused() {
    for (key, value, what) in [
        ("calls", "write+open", "some of read, write"),
        ("errno", "ENOTHING", "a name such as EIO"),
        ("probability", "2", "0 to 1"),
        ("every", "0", "a number from 1"),
        ("range", "5", "ranges such as"),
        ("file", "", "the name of a file"),
        ("rate", "1", "has no setting 'rate'"),
    ] {
        let e = on(&Recorder::new(512, able()), "error", &[(key, value)], true);
        let e = e.err().unwrap_or_else(|| panic!("{key}={value}")).to_string();
        assert!(e.contains("layer 'error'") && e.contains(what), "{e}");
    }
}
