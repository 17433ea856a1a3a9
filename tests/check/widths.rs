//! Refcounts of every width: written, grown, and far out.

use std::fs;

use super::common::*;
use super::judge::{ours, status};
use qblk::OpenFlags;
use qblk::block::{Progress, Repair};

const WIDTHS: [&str; 7] = ["1", "2", "4", "8", "16", "32", "64"];

#[test]
fn refcounts_of_every_width_are_kept() {
    let mut r = Rng::new(5);
    for bits in WIDTHS {
        let dir = Tmp::in_memory("widths");
        let path = dir.join("image");
        let settings = [("refcount-bits", bits), ("cluster-size", "1k")];
        create(&path, "qcow2", 4 << 20, &settings);
        let mut model = vec![0; 4 << 20];
        for _ in 0..4 {
            let image = open(&path, RW);
            for _ in 0..30 {
                let at = r.below(model.len() as u64);
                let n = r.below(100_000).min(model.len() as u64 - at);
                let range = at as usize..(at + n) as usize;
                if r.one_in(3) {
                    image.zero(at, n, qblk::ReqFlags::MAY_TRIM).unwrap();
                    model[range].fill(0);
                } else {
                    let bytes = r.bytes(n as usize);
                    image.write_at(&bytes, at, NONE).unwrap();
                    model[range].copy_from_slice(&bytes);
                }
            }
            image.close().unwrap();
            check_clean(&path);
            assert_eq!(status(&ours(&path, Repair::Nothing)), 0);
        }
        check_same(&path, "qcow2", &model, &dir.join("raw"));
    }
}

#[test]
fn refcount_tables_of_every_width_grow() {
    for bits in WIDTHS {
        let dir = Tmp::in_memory("growth");
        let path = dir.join("image");
        // A table of one cluster has 64 blocks of 512 bytes.
        let covers = 64 * 4096 / bits.parse::<u64>().unwrap() * 512;
        let settings = [("refcount-bits", bits), ("cluster-size", "512")];
        create(&path, "qcow2", 2 * covers, &settings);
        let before = peek_u32(&path, 56);
        let image = open(&path, RW);
        let mut at = 0;
        while at < covers + covers / 4 {
            image.write_at(&[0x31; 1 << 16], at, NONE).unwrap();
            at += 1 << 16;
        }
        image.close().unwrap();
        assert!(peek_u32(&path, 56) > before, "{bits} bits");
        check_clean(&path);
        assert_eq!(status(&ours(&path, Repair::Nothing)), 0);
    }
}

#[test]
fn an_image_reaches_beyond_2_to_the_32_clusters() {
    let dir = Tmp::in_memory("far");
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, &[("cluster-size", "4k"), ("refcount-bits", "1")]);
    let image = open(&path, RW);
    image.write_at(&[0x41; 8192], 0, NONE).unwrap();
    image.close().unwrap();
    // The second cluster is moved out: 2^33 clusters from the beginning.
    let far = 1u64 << 45;
    let l2 = peek_u64(&path, peek_u64(&path, 40)) & 0x00ff_ffff_ffff_fe00;
    poke(&path, l2 + 8, &(far | 1 << 63).to_be_bytes());
    poke(&path, far, &[0x42; 4096]);
    let found = ours(&path, Repair::Nothing).unwrap();
    // The one out there is not counted, and the one before is not used.
    assert_eq!((found.leaks, found.check_errors), (1, 0), "{found:?}");
    assert!(found.corruptions >= 1, "{found:?}");
    assert_eq!(found.image_end, far + 4096);
    let mended = ours(&path, Repair::All).unwrap();
    assert_eq!(mended.corruptions + mended.leaks + mended.check_errors, 0, "{mended:?}");
    // The refcounts lie out there now, too.
    assert!(peek_u64(&path, 48) > far);
    let image = open(&path, RW);
    assert_eq!(read_range(&image, 4096, 4096), [0x42; 4096]);
    image.write_at(&[0x43; 100_000], 100_000, NONE).unwrap();
    image.write_at(&[0x44; 100], 4096, NONE).unwrap();
    image.zero(0, 4096, qblk::ReqFlags::MAY_TRIM).unwrap();
    image.close().unwrap();
    let again = ours(&path, Repair::Nothing).unwrap();
    assert_eq!(again.corruptions + again.leaks + again.check_errors, 0, "{again:?}");
    let image = open(&path, OpenFlags::RDWR);
    assert_eq!(read_range(&image, 4096, 100), [0x44; 100]);
    assert_eq!(read_range(&image, 100_000, 100_000), vec![0x43; 100_000]);
    // Through a handle that writes, as well.
    assert_eq!(image.check(Repair::All, Progress::NONE).unwrap().corruptions, 0);
    image.close().unwrap();
    assert!(fs::metadata(&path).unwrap().len() > far);
}
