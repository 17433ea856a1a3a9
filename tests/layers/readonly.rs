//! `readonly`.

use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::recorder::*;

#[test]
fn nothing_is_changed_and_the_image_is_not_even_open_for_writing() {
    let r = Recorder::new(4096, able());
    let dev = on(&r, "readonly", &[], true).unwrap();
    let mut some = [0; 512];
    dev.read_slice(&mut some, 512).unwrap();
    for result in [
        dev.write_slice(&some, 0, ReqFlags::NONE),
        dev.zero(0, 512, ReqFlags::NONE),
        dev.trim(0, 512, ReqFlags::NONE),
    ] {
        assert!(crate::is_read_only(result));
    }
    assert_eq!(r.log(), ["open 1 ro", "1 read 512+512"]);
    let image = Image::open("layers:readonly:mem:1M".as_ref(), &Options::new(), RW).unwrap();
    assert!(crate::is_read_only(image.write_at(b"x", 0, NONE)));
}
