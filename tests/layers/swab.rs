//! `swab`.

use qblk::block::{Caps, Extent, ExtentList};
use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

fn swapped(bytes: &[u8], word: usize) -> Vec<u8> {
    bytes.chunks_exact(word).flat_map(|w| w.iter().rev().copied()).collect()
}

#[test]
fn words_are_swapped_and_zeroes_pass() {
    for (bits, word) in [("16", 2usize), ("32", 4), ("64", 8)] {
        // A tail that is no word can not be reached.
        let r = Recorder::new(4096 + word - 1, able());
        let dev = on(&r, "swab", &[("bits", bits)], true).unwrap();
        assert_eq!(dev.size(), 4096);
        let before = r.bytes();
        let mut found = vec![0; 4096];
        dev.read_slice(&mut found, 0).unwrap();
        assert_eq!(found, swapped(&before, word));
        let new: Vec<u8> = (0..64).collect();
        dev.write_slice(&new, 128, ReqFlags::FUA).unwrap();
        assert_eq!(r.bytes()[128..192], swapped(&new, word));
        dev.write_slice(&[200], 1025, NONE).unwrap();
        assert_eq!(r.bytes()[1024 + word - 2], 200);
        let mut one = [0];
        dev.read_slice(&mut one, 1025).unwrap();
        assert_eq!(one, [200]);
        dev.zero(1024, 64, ReqFlags::MAY_TRIM).unwrap();
        dev.trim(1024, 64, ReqFlags::FUA).unwrap();
        dev.cache(1024, 64).unwrap();
        dev.flush().unwrap();
        let part = format!("1024+{word}");
        let expected = [
            "open 1 rw",
            "1 read 0+4096",
            "1 write 128+64 FUA",
            &format!("1 read {part}"),
            &format!("1 write {part}"),
            &format!("1 read {part}"),
            "1 zero 1024+64 MAY_TRIM",
            "1 trim 1024+64 FUA",
            "1 cache 1024+64",
            "1 flush",
        ];
        assert_eq!(r.log(), expected);
        r.fail("read", libc::EIO, 1);
        dev.write_slice(&[1], 1, NONE).unwrap_err();
        assert_eq!(r.log(), [format!("1 read 0+{word}")]);
    }
    let r = Recorder::new(4096, able());
    let e = on(&r, "swab", &[("bits", "8")], true).err().unwrap().to_string();
    assert!(e.contains("expected 16, 32, 64"), "{e}");
}

#[test]
fn long_writes_are_swapped_in_pieces() {
    let r = Recorder::new(3 << 20, Caps { fua: false, ..able() });
    let dev = on(&r, "swab", &[], true).unwrap();
    let new = Rng::new(seed("swab-long")).bytes((2 << 20) + 6);
    dev.write_slice(&new, 2, ReqFlags::FUA).unwrap();
    let expected = [
        "open 1 rw",
        "1 write 2+1048576",
        "1 write 1048578+1048576",
        "1 write 2097154+6",
        "1 flush",
    ];
    assert_eq!(r.log(), expected);
    assert!(r.bytes()[2..2 + new.len()] == swapped(&new, 2));
    r.fail("write 1048578+", libc::EIO, 1);
    dev.write_slice(&new, 2, NONE).unwrap_err();
    assert_eq!(r.log(), ["1 write 2+1048576", "1 write 1048578+1048576"]);
}

#[test]
fn a_swapped_device_is_a_device() {
    let tmp = Tmp::new("swab");
    let path = tmp.join("a.qcow2");
    create(&path, "qcow2", 1 << 20, &[]);
    let image = open_with(&path, &options(&[("layers", "swab;bits=64")]), RW);
    let mut model = vec![0; 1 << 20];
    // The parts of the threads meet inside a word.
    model.truncate(349_523 * 3);
    model::run_many(&image, &mut model, 500, 3, seed("swab"));
    assert!(all_extents(&image, 0, 1 << 20, 5).iter().all(|e| !e.has(Extent::HOST)));
    image.close().unwrap();
    let below = read_range(&open(&path, RO), 0, 1 << 20);
    assert!(swapped(&below, 8)[..model.len()] == model);
    // Twice is as not at all.
    let options = Options::new().with("layers", "swab;bits=32,swab;bits=32");
    let image = Image::open(path.as_os_str(), &options, RO).unwrap();
    assert!(read_all(&image) == below);
}

#[test]
fn where_bytes_lie_is_not_told() {
    let r = Recorder::new(4096, Caps { extents: false, ..able() });
    let dev = on(&r, "swab", &[], false).unwrap();
    assert!(dev.caps().extents, "else all would be said to be where it is not");
    let mut some = [Extent::default(); 2];
    let mut list = ExtentList::new(&mut some);
    dev.driver().extents(0, 4096, &mut list).unwrap();
    assert!(!some[0].has(Extent::HOST));
}
