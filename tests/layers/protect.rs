//! `protect`.

use qblk::block::ErrorKind;
use qblk::{Error, Image, Options, ReqFlags};

use crate::common::*;
use crate::recorder::*;

fn refused(result: qblk::Result<()>) {
    let e = result.expect_err("refused");
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EPERM), "{e}");
    assert!(e.to_string().contains("layer 'protect'"), "{e}");
}

#[test]
fn what_is_protected_is_compared_and_never_written() {
    let r = Recorder::new(64 << 10, able());
    let dev = on(&r, "protect", &[("protect", "1000-2000,8k-")], true).unwrap();
    assert_eq!(r.log(), ["open 1 rw"]);
    let before = r.bytes();
    // Beside it all passes as it is.
    dev.write_slice(&[7; 1000], 0, ReqFlags::FUA).unwrap();
    dev.zero(2000, 6192, ReqFlags::MAY_TRIM | ReqFlags::FAST_ZERO).unwrap();
    dev.trim(2000, 6192, ReqFlags::FUA).unwrap();
    dev.cache(0, 64 << 10).unwrap();
    dev.read_slice(&mut [0; 3000], 0).unwrap();
    dev.flush().unwrap();
    let expected = [
        "1 write 0+1000 FUA",
        "1 zero 2000+6192 MAY_TRIM FAST",
        "1 trim 2000+6192 FUA",
        "1 cache 0+65536",
        "1 read 0+3000",
        "1 flush",
    ];
    assert_eq!(r.log(), expected);
    // A byte of it is enough, and nothing of the call is done.
    refused(dev.write_slice(&[7; 1001], 0, NONE));
    assert_eq!(r.log(), ["1 read 1000+1"]);
    refused(dev.write_slice(&[7; 2], 1999, ReqFlags::FUA));
    assert_eq!(r.log(), ["1 read 1999+1"]);
    refused(dev.zero(900, 200, NONE));
    assert_eq!(r.log(), ["1 read 1000+100"]);
    refused(dev.trim(0, 1001, NONE));
    refused(dev.trim(65535, 1, NONE));
    assert!(r.log().is_empty());
    assert!(matches!(dev.zero(900, 200, ReqFlags::FAST_ZERO), Err(Error::NotSupported(_))));
    assert!(r.log().is_empty());
    // The same bytes as are there may be written: around what is protected.
    let mut same = before[900..2100].to_vec();
    same[..100].fill(1);
    same[1100..].fill(2);
    dev.write_slice(&same, 900, ReqFlags::FUA).unwrap();
    let expected = ["1 read 1000+1000", "1 write 900+100 FUA", "1 write 2000+100 FUA", "1 flush"];
    assert_eq!(r.log(), expected);
    assert!(r.bytes()[1000..2000] == before[1000..2000] && r.bytes()[8192..] == before[8192..]);
    assert_eq!((r.bytes()[999], r.bytes()[2000]), (1, 2));
    // What can not be compared is not written.
    r.fail("read", libc::EIO, 1);
    let e = dev.write_slice(&same, 900, NONE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EIO));
    assert_eq!(r.log(), ["1 read 1000+1000"]);
}

#[test]
fn zeroes_over_zeroes_pass() {
    let r = Recorder::new(200 << 10, able());
    let plain = on(&r, "noextents", &[], true).unwrap();
    plain.zero(0, 200 << 10, NONE).unwrap();
    let dev = on(&r, "protect", &[("protect", "~-1k")], true).unwrap();
    r.log();
    dev.zero(0, 200 << 10, ReqFlags::MAY_TRIM).unwrap();
    let expected = [
        "2 read 1024+65536",
        "2 read 66560+65536",
        "2 read 132096+65536",
        "2 read 197632+7168",
        "2 zero 0+1024 MAY_TRIM",
    ];
    assert_eq!(r.log(), expected);
}

#[test]
fn ranges_that_mean_nothing_are_refused() {
    for (value, what) in [
        (&[][..], "needs the setting 'protect'"),
        (&[("protect", "1M")], "found '1M', expected ranges such as"),
        (&[("protect", "2M-1M")], "expected ranges"),
        (&[("protect", "")], "expected ranges"),
    ] {
        let r = Recorder::new(4096, able());
        let e = on(&r, "protect", value, true).err().unwrap().to_string();
        assert!(e.contains(what), "{e}");
    }
}

/// Random changes: those that reach into what is protected change nothing at all, the others do all.
#[test]
fn a_model_agrees_on_what_is_protected() {
    let name = "layers:protect;protect=~100000-300001%2C150k+1000:mem:400k";
    let image = Image::open(name.as_ref(), &Options::new(), RW).unwrap();
    let (mut rng, size) = (Rng::new(seed("protect")), 400u64 << 10);
    let mut model = vec![0u8; size as usize];
    let protected = |i: u64| !(100_000..300_001).contains(&i) || (153_600..154_600).contains(&i);
    let (mut done, mut refusals) = (0, 0);
    for _ in 0..3000 {
        let at = rng.below(size);
        let n = rng.below(20_000).min(size - at);
        let free = !(at..at + n).any(protected);
        let range = at as usize..(at + n) as usize;
        let flags = if rng.one_in(4) { ReqFlags::FUA } else { NONE };
        let new = match rng.below(3) {
            0 => rng.bytes(n as usize),
            1 => vec![0; n as usize],
            // What is there, but for a byte.
            _ => {
                let mut new = model[range.clone()].to_vec();
                if let Some(b) = new.last_mut() {
                    *b ^= 1;
                }
                new
            }
        };
        let changes =
            (at..at + n).any(|i| protected(i) && model[i as usize] != new[(i - at) as usize]);
        let result = if new.iter().all(|b| *b == 0) && rng.one_in(2) {
            image.zero(at, n, flags)
        } else {
            image.write_at(&new, at, flags)
        };
        match changes {
            true => {
                refused(result);
                refusals += 1;
            }
            false => {
                result.unwrap();
                model[range].copy_from_slice(&new);
                done += usize::from(free);
            }
        }
    }
    assert!(done > 300 && refusals > 300, "{done} {refusals}");
    let mut all = vec![0; model.len()];
    image.read_at(&mut all, 0).unwrap();
    assert!(all == model);
}
