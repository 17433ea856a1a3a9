//! `nozero`.

use qblk::block::{Can, Caps};
use qblk::{Error, Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

const FAST: ReqFlags = ReqFlags::FAST_ZERO;

fn not_supported(result: qblk::Result<()>) {
    assert!(matches!(result, Err(Error::NotSupported(_))), "{result:?}");
}

#[test]
fn each_mode_zeroes_in_its_way() {
    let both = ReqFlags::MAY_TRIM | ReqFlags::FUA;
    for (mode, can, below) in [
        ("write", Can::Emulate, "1 write 100+512 FUA"),
        ("notrim", Can::Native, "1 zero 100+512 FUA"),
        ("pass", Can::Native, "1 zero 100+512 FUA MAY_TRIM"),
    ] {
        let r = Recorder::new(64 << 10, able());
        let dev = on(&r, "nozero", &[("mode", mode)], true).unwrap();
        assert_eq!(dev.can_zero(), can, "{mode}");
        dev.zero(100, 512, both).unwrap();
        assert!(r.bytes()[100..612].iter().all(|b| *b == 0) && r.bytes()[612] != 0);
        assert_eq!(r.log(), ["open 1 rw", below]);
        // All else passes as it is.
        let mut some = [7; 1000];
        dev.write_slice(&some, 24, ReqFlags::FUA).unwrap();
        dev.read_slice(&mut some, 0).unwrap();
        dev.trim(1000, 24, ReqFlags::FUA).unwrap();
        dev.flush().unwrap();
        let expected = ["1 write 24+1000 FUA", "1 read 0+1000", "1 trim 1000+24 FUA", "1 flush"];
        assert_eq!(r.log(), expected);
        r.fail(if mode == "write" { "write" } else { "zero" }, libc::ENOSPC, 1);
        let e = dev.zero(0, 512, ReqFlags::NONE).unwrap_err();
        assert!(e.is_no_space(), "{mode}: {e}");
    }
}

#[test]
fn none_offers_no_zeroing_and_nothing_is_done() {
    for caps in [able(), Caps { zero: false, ..able() }] {
        let r = Recorder::new(64 << 10, caps);
        // It is what one gets without asking.
        let dev = on(&r, "nozero", &[], true).unwrap();
        assert_eq!(dev.can_zero(), Can::Not);
        for flags in [NONE, ReqFlags::MAY_TRIM, FAST, ReqFlags::FUA] {
            not_supported(dev.zero(0, 512, flags));
        }
        dev.write_slice(&[0; 512], 0, NONE).unwrap();
        assert_eq!(r.log(), ["open 1 rw", "1 write 0+512"]);
    }
}

#[test]
fn fast_zeroing_is_as_below_or_fails_at_once() {
    for (mode, fast, works) in [
        ("pass", "on", true),
        ("notrim", "on", true),
        ("pass", "off", false),
        ("notrim", "off", false),
        ("write", "on", false),
        ("none", "on", false),
    ] {
        let r = Recorder::new(64 << 10, able());
        let dev = on(&r, "nozero", &[("mode", mode), ("fast", fast)], true).unwrap();
        r.log();
        if works {
            dev.zero(0, 512, FAST).unwrap();
            assert_eq!(r.log(), ["1 zero 0+512 FAST"]);
        } else {
            not_supported(dev.zero(0, 512, FAST));
            assert!(r.log().is_empty(), "{mode}");
        }
    }
}

#[test]
fn images_are_the_same_in_every_mode_and_copies_do_without() {
    let tmp = Tmp::in_memory("layers-nozero");
    for (mode, can) in [("none", Can::Not), ("write", Can::Emulate), ("notrim", Can::Native)] {
        let name = format!("layers:nozero;mode={mode}:mem:4M");
        let image = Image::open(name.as_ref(), &Options::new(), RW).unwrap();
        assert_eq!(image.info().unwrap().can_zero, can, "{mode}");
        let mut model = vec![0; 4 << 20];
        let without = model::Without { zero: mode == "none", ..Default::default() };
        model::run(&image, &mut model, 500, &mut Rng::new(seed("nozero")), without);
        // A layer above does not offer what is not offered below.
        let above = format!("layers:nozero;mode={mode},offset:mem:4M");
        let above = Image::open(above.as_ref(), &Options::new(), RW).unwrap();
        assert_eq!(above.info().unwrap().can_zero, can, "{mode}");
        if mode == "none" {
            not_supported(above.zero(0, 4096, NONE));
        }
        // Zeroes of a copy find their way nevertheless.
        let path = tmp.join(mode);
        std::fs::write(&path, vec![9; 4 << 20]).unwrap();
        let (from, to) = (Options::new(), Options::new().with("format", "raw"));
        let to = to.with("layers", format!("nozero;mode={mode}"));
        let source = Image::open("mem:4M".as_ref(), &from, RW).unwrap();
        source.write_at(b"data", 1 << 20, NONE).unwrap();
        let target = Image::open(path.as_os_str(), &to, RW).unwrap();
        let progress = qblk::block::Progress::NONE;
        qblk::image::copy(&source, &target, &Options::new(), false, progress).unwrap();
        target.close().unwrap();
        let found = std::fs::read(&path).unwrap();
        assert_eq!(&found[1 << 20..(1 << 20) + 4], b"data");
        assert_eq!(found.iter().filter(|b| **b != 0).count(), 4, "{mode}");
    }
}
