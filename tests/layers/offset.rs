//! `offset`.

use qblk::block::{Caps, Extent, ExtentList};
use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

#[test]
fn every_call_is_moved_and_nothing_else() {
    let r = Recorder::new(64 << 10, able());
    let dev = on(&r, "offset", &[("offset", "4096"), ("range", "8k")], true).unwrap();
    assert_eq!(dev.size(), 8192);
    let mut some = [7; 1000];
    dev.write_slice(&some, 24, ReqFlags::FUA).unwrap();
    dev.read_slice(&mut some, 0).unwrap();
    dev.zero(100, 200, ReqFlags::MAY_TRIM).unwrap();
    dev.trim(8191, 1, ReqFlags::NONE).unwrap();
    dev.cache(0, 8192).unwrap();
    dev.flush().unwrap();
    let expected = [
        "open 1 rw",
        "1 write 4120+1000 FUA",
        "1 read 4096+1000",
        "1 zero 4196+200 MAY_TRIM",
        "1 trim 12287+1",
        "1 cache 4096+8192",
        "1 flush",
    ];
    assert_eq!(r.log(), expected);
    // The neighbours are out of reach, also for a driver's own requests.
    dev.driver().write(qblk::OneIov::src(&some).iov(), 8000, ReqFlags::NONE).unwrap_err();
    dev.read_slice(&mut some, u64::MAX).unwrap_err();
    assert!(r.log().is_empty());
}

#[test]
fn a_window_is_a_device() {
    let image =
        Image::open("layers:offset;offset=1000;range=3000001:mem:4M".as_ref(), &Options::new(), RW)
            .unwrap();
    let mut model = vec![0; 3000001];
    model::run(&image, &mut model, 2000, &mut Rng::new(seed("offset")), Default::default());
}

#[test]
fn bytes_are_not_said_to_lie_where_the_window_has_them() {
    let r = Recorder::new(8192, Caps { extents: false, ..able() });
    let dev = on(&r, "offset", &[("offset", "4096")], false).unwrap();
    let mut some = [Extent::default(); 2];
    let mut list = ExtentList::new(&mut some);
    qblk::format::extents(&dev, 0, 4096, &mut list).unwrap();
    assert!(list.len() == 1 && !some[0].has(Extent::HOST), "{some:?}");
}
