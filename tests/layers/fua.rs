//! `fua`.

use qblk::block::{Can, Caps, Device};
use qblk::{Error, Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

/// No FUA, but a flush that does for it.
fn flushing() -> Caps {
    Caps { fua: false, zero_fua: false, trim_fua: false, ..able() }
}

/// Neither.
fn careless() -> Caps {
    Caps { flush: false, fua_by_flush: false, ..flushing() }
}

fn opened(caps: Caps, mode: &str) -> (std::sync::Arc<Recorder>, Device) {
    let r = Recorder::new(64 << 10, caps);
    let dev = on(&r, "fua", &[("mode", mode)], true).unwrap();
    let opened: &[&str] = if mode == "force" { &["open 1 rw", "1 flush"] } else { &["open 1 rw"] };
    assert_eq!(r.log(), opened, "{mode}");
    (r, dev)
}

/// Write, zero and trim with these flags, and what is called below for each.
fn changes(r: &Recorder, dev: &Device, flags: ReqFlags) -> [Vec<String>; 3] {
    let some = [7; 512];
    dev.write_slice(&some, 100, flags).unwrap();
    let write = r.log();
    dev.zero(200, 300, flags | ReqFlags::MAY_TRIM).unwrap();
    let zero = r.log();
    dev.trim(1000, 500, flags).unwrap();
    [write, zero, r.log()]
}

fn refused(result: qblk::Result<()>) {
    assert!(matches!(result, Err(Error::NotSupported("FUA"))), "{result:?}");
}

#[test]
fn none_offers_no_fua_and_everything_else() {
    for caps in [able(), flushing()] {
        let (r, dev) = opened(caps, "none");
        assert_eq!(dev.can_fua(), Can::Not);
        refused(dev.write_slice(&[7; 512], 0, ReqFlags::FUA));
        refused(dev.zero(0, 512, ReqFlags::FUA));
        refused(dev.trim(0, 512, ReqFlags::FUA));
        assert!(r.log().is_empty(), "nothing is done of what is refused");
        let [write, zero, trim] = changes(&r, &dev, ReqFlags::NONE);
        assert_eq!(write, ["1 write 100+512"]);
        assert_eq!(zero, ["1 zero 200+300 MAY_TRIM"]);
        assert_eq!(trim, ["1 trim 1000+500"]);
        dev.flush().unwrap();
        assert_eq!(r.log(), ["1 flush"]);
    }
    // It is what one gets without asking.
    let r = Recorder::new(4096, able());
    assert_eq!(on(&r, "fua", &[], true).unwrap().can_fua(), Can::Not);
}

#[test]
fn emulate_flushes_after_the_change_whatever_is_below() {
    for caps in [able(), flushing()] {
        let (r, dev) = opened(caps, "emulate");
        assert_eq!(dev.can_fua(), Can::Emulate);
        let [write, zero, trim] = changes(&r, &dev, ReqFlags::FUA);
        assert_eq!(write, ["1 write 100+512", "1 flush"]);
        assert_eq!(zero, ["1 zero 200+300 MAY_TRIM", "1 flush"]);
        assert_eq!(trim, ["1 trim 1000+500", "1 flush"]);
        let [write, zero, trim] = changes(&r, &dev, ReqFlags::NONE);
        assert_eq!((write.len(), zero.len(), trim.len()), (1, 1, 1), "no flush unasked");
        dev.flush().unwrap();
        assert_eq!(r.log(), ["1 flush"]);
        // What was not done is not flushed, and a flush that fails is told.
        r.fail("write", libc::ENOSPC, 1);
        dev.write_slice(&[7; 512], 0, ReqFlags::FUA).unwrap_err();
        r.fail("flush", libc::EIO, 1);
        dev.zero(0, 512, ReqFlags::FUA).unwrap_err();
        assert_eq!(r.log(), ["1 write 0+512", "1 zero 0+512", "1 flush"]);
    }
}

#[test]
fn native_leaves_it_to_what_is_below() {
    let (r, dev) = opened(able(), "native");
    assert_eq!(dev.can_fua(), Can::Native);
    let [write, zero, trim] = changes(&r, &dev, ReqFlags::FUA);
    assert_eq!(write, ["1 write 100+512 FUA"]);
    assert_eq!(zero, ["1 zero 200+300 FUA MAY_TRIM"]);
    assert_eq!(trim, ["1 trim 1000+500 FUA"]);
    let [write, zero, trim] = changes(&r, &dev, ReqFlags::NONE);
    assert_eq!(write, ["1 write 100+512"]);
    assert_eq!(zero, ["1 zero 200+300 MAY_TRIM"]);
    assert_eq!(trim, ["1 trim 1000+500"]);
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 flush"]);
}

#[test]
fn force_has_fua_on_every_change_and_nothing_left_to_flush() {
    let (r, dev) = opened(able(), "force");
    for flags in [ReqFlags::FUA, ReqFlags::NONE] {
        let [write, zero, trim] = changes(&r, &dev, flags);
        assert_eq!(write, ["1 write 100+512 FUA"]);
        assert_eq!(zero, ["1 zero 200+300 FUA MAY_TRIM"]);
        assert_eq!(trim, ["1 trim 1000+500 FUA"]);
    }
    dev.flush().unwrap();
    assert!(r.log().is_empty());
    dev.driver().close().unwrap();
    assert_eq!(r.log(), ["1 flush to close"]);
    // Where FUA is a flush, that follows each change.
    let (r, dev) = opened(flushing(), "force");
    let [write, zero, trim] = changes(&r, &dev, ReqFlags::NONE);
    assert_eq!(write, ["1 write 100+512", "1 flush"]);
    assert_eq!(zero, ["1 zero 200+300 MAY_TRIM", "1 flush"]);
    assert_eq!(trim, ["1 trim 1000+500", "1 flush"]);
    r.fail("flush", libc::EIO, 1);
    dev.write_slice(&[7; 512], 0, ReqFlags::NONE).unwrap_err();
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 write 0+512", "1 flush"]);
}

#[test]
fn zeroes_that_are_written_carry_what_the_mode_says() {
    // In pieces of 4 MiB: FUA on each, or one flush after all.
    let at = |size: usize, caps: Caps, mode| {
        let r = Recorder::new(size, Caps { zero: false, ..caps });
        let dev = on(&r, "fua", &[("mode", mode)], true).unwrap();
        r.log();
        dev.zero(0, size as u64, ReqFlags::FUA).unwrap();
        assert!(r.bytes().iter().all(|b| *b == 0));
        r.log()
    };
    let (first, second) = ("1 write 0+4194304", "1 write 4194304+1048576");
    let fua = |s: &str| format!("{s} FUA");
    assert_eq!(at(5 << 20, able(), "emulate"), [first, second, "1 flush"]);
    assert_eq!(at(5 << 20, able(), "native"), [fua(first), fua(second)]);
    assert_eq!(at(5 << 20, able(), "force"), [fua(first), fua(second)]);
    let forced = at(5 << 20, flushing(), "force");
    assert_eq!(forced, [first, "1 flush", second, "1 flush"]);
}

#[test]
fn a_mode_that_can_not_be_is_refused_when_it_is_opened() {
    for (caps, mode, what) in [
        (flushing(), "native", "FUA of its own"),
        (careless(), "native", "FUA of its own"),
        (careless(), "emulate", "can be flushed"),
        (careless(), "force", "FUA, or a flush"),
        (able(), "some", "expected none, emulate, native, force"),
    ] {
        let r = Recorder::new(4096, caps);
        let e = on(&r, "fua", &[("mode", mode)], true).err().unwrap().to_string();
        assert!(e.contains("layer 'fua': mode") && e.contains(what), "{mode}: {e}");
    }
    // What is only read can be in any.
    for mode in ["none", "emulate", "native", "force"] {
        let r = Recorder::new(4096, careless());
        on(&r, "fua", &[("mode", mode)], false).unwrap();
        assert_eq!(r.log()[0], "open 1 ro");
    }
    // One that can not be flushed is still a device.
    let (r, dev) = opened(careless(), "none");
    changes(&r, &dev, ReqFlags::NONE);
}

#[test]
fn images_tell_and_carry_every_mode() {
    let tmp = Tmp::in_memory("layers-fua");
    for (mode, can) in [("none", Can::Not), ("emulate", Can::Emulate), ("force", Can::Native)] {
        let path = tmp.join(format!("{mode}.qcow2"));
        qblk::image::create(path.as_os_str(), "qcow2", 4 << 20, &Options::new()).unwrap();
        let options = Options::new().with("layers", "fua").with("fua.mode", mode);
        let image = Image::open(path.as_os_str(), &options, RW).unwrap();
        assert_eq!(image.info().unwrap().can_fua, can, "{mode}");
        let mut model = vec![0; 4 << 20];
        let without = model::Without { flush: mode == "none", ..Default::default() };
        model::run(&image, &mut model, 300, &mut Rng::new(seed("fua")), without);
        image.close().unwrap();
        check_clean(&path);
    }
}
