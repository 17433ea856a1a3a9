//! `noextents`.

use qblk::{Extent, Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

#[test]
fn nothing_is_asked_and_all_else_passes() {
    let r = Recorder::new(64 << 10, able());
    let dev = on(&r, "noextents", &[], true).unwrap();
    let mut some = [qblk::Extent::default(); 8];
    let mut list = qblk::block::ExtentList::for_c(&mut some);
    dev.driver().extents(512, 4096, &mut list).unwrap();
    let n = list.len();
    let all = [Extent::new(512, 4096, Extent::ALLOCATED | Extent::DATA)];
    assert_eq!(some[..n], all);
    let mut some = [7; 1000];
    dev.write_slice(&some, 24, ReqFlags::FUA).unwrap();
    dev.read_slice(&mut some, 0).unwrap();
    dev.zero(100, 200, ReqFlags::MAY_TRIM).unwrap();
    dev.trim(8191, 1, ReqFlags::NONE).unwrap();
    dev.cache(0, 8192).unwrap();
    dev.flush().unwrap();
    let expected = [
        "open 1 rw",
        "1 write 24+1000 FUA",
        "1 read 0+1000",
        "1 zero 100+200 MAY_TRIM",
        "1 trim 8191+1",
        "1 cache 0+8192",
        "1 flush",
    ];
    assert_eq!(r.log(), expected);
}

#[test]
fn holes_are_not_told_and_read_as_before() {
    let open = |name: &str| Image::open(name.as_ref(), &Options::new(), RW).unwrap();
    let flags = |image: &Image| {
        image.write_at(&[1; 4096], 1 << 20, NONE).unwrap();
        let mut some = [Extent::default(); 8];
        let n = image.extents(0, 4 << 20, &mut some).unwrap();
        some[..n].iter().map(|e| (e.offset, e.length, e.flags)).collect::<Vec<_>>()
    };
    assert!(flags(&open("mem:4M")).len() > 1, "without the layer there are holes");
    let image = open("layers:noextents:mem:4M");
    assert_eq!(flags(&image), [(0, 4 << 20, Extent::ALLOCATED | Extent::DATA)]);
    // Neither does one that stands on it.
    let above = open("layers:noextents,offset;offset=4k:mem:4M");
    let mut some = [Extent::default(); 8];
    assert_eq!(above.extents(0, 1 << 20, &mut some).unwrap(), 1);
    assert!(!some[0].has(Extent::ZERO | Extent::HOST));
    image.zero(0, 4 << 20, NONE).unwrap();
    let mut model = vec![0; 4 << 20];
    model::run(&image, &mut model, 300, &mut Rng::new(seed("noextents")), Default::default());
}
