//! Bitmaps made, changed and written through by QEMU, and by us.

use super::common::*;
use super::peers::*;
use qblk::block::BitmapChange;
use qblk::{Extent, ReqFlags};

const K: u64 = 1024;

#[test]
fn a_bitmap_of_qemus_is_kept_right_by_our_writes() {
    watch_log();
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    qemu_img!("create", "-q", "-f", "qcow2", path, "100M");
    qemu_img!("bitmap", "--add", path, "on");
    qemu_img!("bitmap", "--add", "--disable", "-g", "4k", path, "off");
    qemu_io(&path, "qcow2", &["write 1M 64k"]);
    let image = open(&path, RW);
    assert_eq!(dirty(&image, "on"), [(K * K, 64 * K)]);
    image.write_at(&[1; 10], 5 * K * K - 5, NONE).unwrap();
    image.zero(10 * K * K, 3, NONE).unwrap();
    image.zero(20 * K * K, 64 * K, ReqFlags::MAY_TRIM).unwrap();
    image.trim(30 * K * K, 256 * K, NONE).unwrap();
    let want = [
        (K * K, 64 * K),
        (5 * K * K - 64 * K, 128 * K),
        (10 * K * K, 64 * K),
        (20 * K * K, 64 * K),
        (30 * K * K, 256 * K),
    ];
    assert_eq!(dirty(&image, "on"), want);
    assert_eq!(info(&image, "on").dirty, Some(total(&want.to_vec())));
    assert_eq!(dirty(&image, "off"), []);
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(qemu_flags(&path, "on"), ["auto"]);
    assert_eq!(qemu_dirty(&path, "on"), want);
    assert_eq!(qemu_dirty(&path, "off"), []);
    qemu_io(&path, "qcow2", &["write 40M 1k"]);
    let image = open(&path, RO);
    assert_eq!(dirty(&image, "on")[5..], [(40 * K * K, 64 * K)]);
    assert_nothing_logged();
}

#[test]
fn a_bitmap_of_ours_is_kept_right_by_qemus_writes() {
    watch_log();
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    for cluster in ["512", "4k", "64k", "2M"] {
        create(&path, "qcow2", 70 * K * K + 512, &[("cluster-size", cluster)]);
        let image = open(&path, RW);
        add(&image, "fine", 512, false);
        add(&image, "coarse", 1 << 20, false);
        add(&image, "off", 0, true);
        image.write_at(&[7; 1000], 3 * K, NONE).unwrap();
        image.close().unwrap();
        check_clean(&path);
        let list = [("fine", vec!["auto"]), ("coarse", vec!["auto"]), ("off", vec![])];
        for (name, flags) in list {
            assert_eq!(qemu_flags(&path, name), flags, "{name}");
        }
        assert_eq!(qemu_dirty(&path, "fine"), [(3 * K, 1024)]);
        qemu_io(&path, "qcow2", &["write 70M 512", "write 64k 1"]);
        let image = open(&path, RW);
        assert_eq!(dirty(&image, "fine"), [(3 * K, 1024), (64 * K, 512), (70 * K * K, 512)]);
        assert_eq!(dirty(&image, "coarse"), [(0, K * K), (70 * K * K, 512)]);
        assert_eq!(info(&image, "coarse").dirty, Some(K * K + 512));
        assert_eq!(dirty(&image, "off"), []);
        // All of it, so that whole clusters of the bitmaps are full.
        image.zero(0, 70 * K * K + 512, NONE).unwrap();
        image.close().unwrap();
        check_clean(&path);
        let all = [(0, 70 * K * K + 512)];
        assert_eq!(qemu_dirty(&path, "fine"), all, "{cluster}");
        assert_eq!(qemu_dirty(&path, "coarse"), all, "{cluster}");
        qemu_img!("bitmap", "--clear", path, "fine");
        qemu_img!("bitmap", "--remove", path, "coarse");
        check_clean(&path);
        let image = open(&path, RW);
        assert_eq!(dirty(&image, "fine"), []);
        assert_eq!(image.bitmaps().unwrap().len(), 2);
        image.change_bitmap(&BitmapChange::Remove(b"off")).unwrap();
        image.change_bitmap(&BitmapChange::Remove(b"fine")).unwrap();
        image.close().unwrap();
        check_clean(&path);
        let text = qemu_img!("info", path);
        assert!(!text.contains("bitmaps:"), "{text}");
        qemu_img!("bitmap", "--add", path, "again");
        check_clean(&path);
    }
    assert_nothing_logged();
}

#[test]
fn extents_say_what_is_dirty_and_where_bytes_are() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", 10 * K * K, &[]);
    let image = open(&path, RW);
    image.write_at(&[1; 256 * K as usize], 0, NONE).unwrap();
    add(&image, "b", 0, false);
    image.write_at(&[1; 64 * K as usize], 64 * K, NONE).unwrap();
    image.zero(1024 * K, 64 * K, NONE).unwrap();
    let mut out = [Extent::default(); 16];
    let n = image.dirty_extents(b"b", false, 0, 10 * K * K, &mut out).unwrap();
    let data = Extent::ALLOCATED | Extent::DATA | Extent::HOST;
    let flags: Vec<_> = out[..n].iter().map(|e| (e.offset / K, e.length / K, e.flags)).collect();
    let zero = Extent::ZERO | Extent::DIRTY;
    let want = [
        (0, 64, data),
        (64, 64, data | Extent::DIRTY),
        (128, 128, data),
        (256, 768, Extent::ZERO),
        (1024, 64, zero),
        (1088, 9152, Extent::ZERO),
    ];
    assert_eq!(flags, want);
    assert_eq!(image.dirty_extents(b"b", true, 0, 0, &mut out).unwrap(), 0);
    let e = image.dirty_extents(b"none", true, 0, 0, &mut out).unwrap_err();
    assert_eq!(e.kind(), qblk::block::ErrorKind::Errno(libc::ENOENT));
    assert!(e.to_string().contains("'none'"), "{e}");
}

#[test]
fn resizing_does_to_bitmaps_what_qemu_does() {
    watch_log();
    let dir = Tmp::in_memory("bitmaps");
    let (ours, theirs) = (dir.join("ours.qcow2"), dir.join("theirs.qcow2"));
    create(&ours, "qcow2", K * K, &[("cluster-size", "512")]);
    let image = open(&ours, RW);
    for (name, granularity, disabled) in [("a", 512, false), ("b", 65536, false), ("c", 1024, true)]
    {
        add(&image, name, granularity, disabled);
    }
    image.write_at(&[1; 100], 60 * K, NONE).unwrap();
    image.write_at(&[1; 100], K * K - 100, NONE).unwrap();
    image.change_bitmap(&BitmapChange::Merge { target: b"c", source: b"a" }).unwrap();
    image.close().unwrap();
    check_clean(&ours);
    std::fs::copy(&ours, &theirs).unwrap();
    for (i, size) in [2048u64, 40_000, 1000, 60, 61, 100_000].into_iter().enumerate() {
        let size = size * K;
        let image = open(&ours, RW);
        // Both with bitmaps that are marked already, and with such that are not.
        if i % 2 == 1 {
            image.write_at(&[2; 100], 7 * K, NONE).unwrap();
            qemu_io(&theirs, "qcow2", &["write 7k 100"]);
        }
        image.resize(size, &qblk::Options::new(), true).unwrap();
        for name in ["a", "b", "c"] {
            let _ = dirty(&image, name);
        }
        image.close().unwrap();
        qemu_img!("resize", "-q", "--shrink", "-f", "qcow2", theirs, size.to_string());
        check_clean(&ours);
        let again = open(&ours, RO);
        for name in ["a", "b", "c"] {
            let want = qemu_dirty(&theirs, name);
            assert_eq!(qemu_dirty(&ours, name), want, "{name}, {size}");
            assert_eq!(dirty(&again, name), want, "{name}, {size}");
        }
    }
    assert_nothing_logged();
}

#[test]
fn applying_a_snapshot_makes_everything_dirty() {
    watch_log();
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", 10 * K * K, &[]);
    let image = open(&path, RW);
    image.write_at(&[1; 100], 0, NONE).unwrap();
    image.snapshot_create(b"small", &Default::default()).unwrap();
    image.resize(20 * K * K, &qblk::Options::new(), false).unwrap();
    add(&image, "b", 0, false);
    add(&image, "off", 0, true);
    image.snapshot_create(b"large", &Default::default()).unwrap();
    assert_eq!(dirty(&image, "b"), []);
    image.snapshot_apply(b"large").unwrap();
    assert_eq!(dirty(&image, "b"), [(0, 20 * K * K)]);
    image.change_bitmap(&BitmapChange::Clear(b"b")).unwrap();
    image.snapshot_apply(b"small").unwrap();
    assert_eq!(dirty(&image, "b"), [(0, 10 * K * K)]);
    image.change_bitmap(&BitmapChange::Clear(b"b")).unwrap();
    image.snapshot_apply(b"large").unwrap();
    assert_eq!(dirty(&image, "b"), [(0, 20 * K * K)]);
    image.snapshot_delete(b"small").unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(qemu_dirty(&path, "b"), [(0, 20 * K * K)]);
    assert_eq!(qemu_dirty(&path, "off"), []);
    // A snapshot has no bitmaps of its own.
    let old = open_with(&path, &options(&[("snapshot", "large")]), RO);
    assert_eq!(old.bitmaps().unwrap(), []);
    assert_nothing_logged();
}

#[test]
fn compressed_writes_are_noted() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", 10 * K * K, &[]);
    let image = open(&path, RW);
    add(&image, "b", 0, false);
    image.write_compressed(qblk::block::OneIov::src(&[1; 65536]).iov(), 64 * K).unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(qemu_dirty(&path, "b"), [(64 * K, 64 * K)]);
}
