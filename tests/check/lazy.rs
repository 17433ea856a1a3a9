//! Lazy refcounts: nothing is lost when a program ends without closing, and the next repairs.

use std::fs;
use std::path::Path;

use super::common::*;
use super::judge::qemu;
use qblk::block::Repair;

fn is_dirty(path: &Path) -> bool {
    peek_u64(path, 72) & 1 != 0
}

/// An image after a flush and without an end: the file as the next program finds it.
fn left_open(dir: &Tmp, cluster: &str) -> std::path::PathBuf {
    let (path, copy) = (dir.join("image"), dir.join("left"));
    create(&path, "qcow2", 8 << 20, &[("lazy-refcounts", "on"), ("cluster-size", cluster)]);
    let image = open(&path, RW);
    assert!(!is_dirty(&path), "nothing was written yet");
    image.write_at(&[0x11; 300_000], 70_000, NONE).unwrap();
    image.write_at(&[0x12; 5000], 4 << 20, NONE).unwrap();
    image.flush().unwrap();
    image.trim(100_000, 100_000, NONE).unwrap();
    image.flush().unwrap();
    assert!(is_dirty(&path));
    fs::copy(&path, &copy).unwrap();
    image.close().unwrap();
    assert!(!is_dirty(&path), "closed cleanly");
    check_clean(&path);
    copy
}

fn holds(image: &qblk::Image) {
    assert_eq!(read_range(image, 70_000, 30_000), [0x11; 30_000]);
    assert_eq!(read_range(image, 200_000, 170_000), [0x11; 170_000]);
    assert_eq!(read_range(image, 4 << 20, 5000), [0x12; 5000]);
}

#[test]
fn an_image_that_was_left_open_is_repaired_when_it_is_written_to_next() {
    for cluster in ["512", "64k"] {
        let dir = Tmp::in_memory("lazy");
        let left = left_open(&dir, cluster);
        // The refcounts were left out, which is what it is for.
        assert_eq!(qemu(&left, Repair::Nothing).0, Some(2));
        let for_qemu = dir.join("for-qemu");
        fs::copy(&left, &for_qemu).unwrap();
        // Reading changes nothing.
        holds(&open(&left, RO));
        assert!(is_dirty(&left));
        let image = open(&left, RW);
        assert!(!is_dirty(&left), "repaired");
        holds(&image);
        image.write_at(&[0x13; 1000], 6 << 20, NONE).unwrap();
        image.close().unwrap();
        check_clean(&left);
        // QEMU does the same.
        qemu_io(&for_qemu, "qcow2", &["read -P 0x11 70000 30000", "write -P 0x13 6M 1000"]);
        check_clean(&for_qemu);
    }
}

#[test]
fn an_image_that_qemu_left_open_is_repaired() {
    let dir = Tmp::in_memory("lazy-qemu");
    let path = dir.join("image");
    qemu_img!("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "8M");
    let args: [&dyn AsRef<std::ffi::OsStr>; 9] =
        [&"-f", &"qcow2", &"-c", &"write -P 0x21 1M 1M", &"-c", &"flush", &"-c", &"abort", &path];
    run("qemu-io", &args);
    assert!(is_dirty(&path), "qemu-io closed it after all");
    let image = open(&path, RW);
    assert_eq!(read_range(&image, 1 << 20, 1 << 20), vec![0x21; 1 << 20]);
    image.write_at(&[0x22; 100], 0, NONE).unwrap();
    image.close().unwrap();
    assert!(!is_dirty(&path));
    check_clean(&path);
}

#[test]
fn what_can_not_be_repaired_is_not_written_to() {
    let dir = Tmp::in_memory("lazy-broken");
    let left = left_open(&dir, "64k");
    // An entry that is askew, with data: nobody can know where that is.
    let l2 = peek_u64(&left, peek_u64(&left, 40)) & 0x00ff_ffff_ffff_fe00;
    let entry = peek_u64(&left, l2 + 8);
    poke(&left, l2 + 8, &(entry + 512).to_be_bytes());
    let e = open_error(&left, &qblk::Options::new(), RW);
    assert_eq!(e.kind(), qblk::block::ErrorKind::Corrupt, "{e}");
    assert!(e.to_string().contains("not closed cleanly"), "{e}");
    assert!(is_dirty(&left));
    assert_eq!(read_range(&open(&left, RO), 4 << 20, 5000), [0x12; 5000]);
}
