//! Adding, removing, enabling, disabling, clearing, merging.

use super::common::*;
use super::peers::*;
use qblk::block::{BitmapChange, ErrorKind};

const K: u64 = 1024;

#[test]
fn changes_are_on_disk_when_they_return() {
    watch_log();
    let dir = Tmp::in_memory("bitmaps");
    let (path, copy) = (dir.join("image.qcow2"), dir.join("copy.qcow2"));
    create(&path, "qcow2", 64 * K * K, &[]);
    let image = open(&path, RW);
    add(&image, "a", 0, false);
    add(&image, "b", 4096, false);
    // Another program looks at what is on disk now, as after a power cut.
    let seen = |name: &str| {
        std::fs::copy(&path, &copy).unwrap();
        check_no_corruption(&copy);
        let flags = qemu_flags(&copy, name);
        let runs = (!flags.contains(&"in-use".into())).then(|| qemu_dirty(&copy, name));
        (flags.join(","), runs)
    };
    assert_eq!(seen("a"), ("auto".into(), Some(vec![])));
    image.write_at(&[1; 100], 5 * K * K, NONE).unwrap();
    assert_eq!(seen("a").0, "in-use,auto");
    image.change_bitmap(&BitmapChange::Disable(b"a")).unwrap();
    let five = vec![(5 * K * K, 64 * K)];
    assert_eq!(seen("a"), (String::new(), Some(five.clone())));
    assert_eq!(seen("b").0, "in-use,auto");
    image.write_at(&[1; 100], 6 * K * K, NONE).unwrap();
    assert_eq!(seen("a"), (String::new(), Some(five.clone())));
    assert_eq!(dirty(&image, "b"), [(5 * K * K, 4 * K), (6 * K * K, 4 * K)]);
    image.change_bitmap(&BitmapChange::Merge { target: b"a", source: b"b" }).unwrap();
    assert_eq!(seen("a").1.unwrap(), [(5 * K * K, 64 * K), (6 * K * K, 64 * K)]);
    image.change_bitmap(&BitmapChange::Clear(b"a")).unwrap();
    assert_eq!(seen("a"), (String::new(), Some(vec![])));
    image.change_bitmap(&BitmapChange::Clear(b"b")).unwrap();
    assert_eq!(dirty(&image, "b"), []);
    image.change_bitmap(&BitmapChange::Enable(b"a")).unwrap();
    assert_eq!(seen("a").0, "in-use,auto");
    image.write_at(&[1; 100], 7 * K * K, NONE).unwrap();
    image.change_bitmap(&BitmapChange::Remove(b"b")).unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(qemu_dirty(&path, "a"), [(7 * K * K, 64 * K)]);
    assert_nothing_logged();
}

#[test]
fn merging_keeps_what_either_has_whatever_their_granularities() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", 10 * K * K + 512, &[("cluster-size", "512")]);
    let image = open(&path, RW);
    for (name, granularity) in [("fine", 512), ("coarse", K * K)] {
        add(&image, name, granularity, false);
    }
    image.write_at(&[1; 10], 100, NONE).unwrap();
    image.write_at(&[1; 10], 10 * K * K, NONE).unwrap();
    add(&image, "later", 4096, false);
    image.write_at(&[1; 10], 5 * K * K - 1, NONE).unwrap();
    let merge = |target: &[u8], source: &[u8]| {
        image.change_bitmap(&BitmapChange::Merge { target, source }).unwrap();
    };
    merge(b"later", b"fine");
    let later = vec![(0, 4 * K), (5 * K * K - 4 * K, 8 * K), (10 * K * K, 512)];
    assert_eq!(dirty(&image, "later"), later);
    merge(b"later", b"later");
    assert_eq!(dirty(&image, "later"), later);
    add(&image, "none", 0, true);
    merge(b"later", b"none");
    merge(b"none", b"coarse");
    let coarse = vec![(0, K * K), (4 * K * K, 2 * K * K), (10 * K * K, 512)];
    assert_eq!(dirty(&image, "none"), coarse);
    merge(b"fine", b"coarse");
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(qemu_dirty(&path, "later"), later);
    assert_eq!(qemu_dirty(&path, "fine"), coarse);
    assert_eq!(qemu_dirty(&path, "none"), coarse);
}

/// It used to end all writing, and to leak what had been written for it.
#[test]
fn a_bitmap_for_which_the_header_has_no_room_is_refused_and_all_goes_on() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    let long = format!("{}/{}", "x".repeat(200), "y".repeat(170));
    std::fs::create_dir(dir.join("x".repeat(200))).unwrap();
    std::fs::write(dir.join(&long), [0; 512]).unwrap();
    let how = [("cluster-size", "512"), ("backing-file", &long), ("backing-fmt", "raw")];
    create(&path, "qcow2", K * K, &how);
    let image = open(&path, RW);
    let name = b"a";
    let add = BitmapChange::Add { name, granularity: 0, disabled: false };
    let e = image.change_bitmap(&add).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EFBIG), "{e}");
    image.write_at(&[7; 1000], 0, NONE).unwrap();
    image.flush().unwrap();
    let copy = dir.join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    check_clean(&copy);
    assert!(image.bitmaps().unwrap().is_empty());
    image.close().unwrap();
    check_clean(&path);
}

#[test]
fn what_can_not_be_done_is_refused_with_a_reason() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", 64 * K * K, &[]);
    let image = open(&path, RW);
    add(&image, "a", 0, false);
    let long = "x".repeat(1024);
    let add = |name: &'static str, granularity| BitmapChange::Add {
        name: name.as_bytes(),
        granularity,
        disabled: false,
    };
    let errno = |e| ErrorKind::Errno(e);
    for (change, kind, word) in [
        (add("a", 0), errno(libc::EEXIST), "'a'"),
        (add("", 0), errno(libc::EINVAL), "1 to 1023"),
        (add("x\0y", 0), errno(libc::EINVAL), "NUL"),
        (add("x", 256), errno(libc::EINVAL), "found 256"),
        (add("x", 1000), errno(libc::EINVAL), "power of two"),
        (add("x", 1 << 32), errno(libc::EINVAL), "512 to 2G"),
        (BitmapChange::Remove(b"x"), errno(libc::ENOENT), "'x'"),
        (BitmapChange::Enable(b"x"), errno(libc::ENOENT), "no bitmap"),
        (BitmapChange::Disable(b""), errno(libc::ENOENT), "no bitmap"),
        (BitmapChange::Clear(b"x"), errno(libc::ENOENT), "no bitmap"),
        (BitmapChange::Merge { target: b"a", source: b"x" }, errno(libc::ENOENT), "'x'"),
        (BitmapChange::Merge { target: b"x", source: b"a" }, errno(libc::ENOENT), "'x'"),
    ] {
        let e = image.change_bitmap(&change).unwrap_err();
        assert_eq!(e.kind(), kind, "{change:?}: {e}");
        assert!(e.to_string().contains(word), "{change:?}: {e}");
    }
    let name = long.as_bytes();
    let e = image.change_bitmap(&BitmapChange::Add { name, granularity: 0, disabled: false });
    assert_eq!(e.unwrap_err().kind(), errno(libc::EINVAL));
    // 512 MiB of bits are the most.
    image.resize(1 << 44, &qblk::Options::new(), false).unwrap();
    let e = image.change_bitmap(&add("x", 512)).unwrap_err();
    assert_eq!(e.kind(), errno(libc::EFBIG), "{e}");
    image.change_bitmap(&add("x", 4096)).unwrap();
    let e = image.resize(1 << 45, &qblk::Options::new(), false).unwrap_err();
    assert_eq!(e.kind(), errno(libc::EFBIG), "{e}");
    image.close().unwrap();
    check_clean(&path);
    let image = open(&path, RO);
    let e = image.change_bitmap(&BitmapChange::Clear(b"a")).unwrap_err();
    assert_eq!(e.kind(), errno(libc::EROFS), "{e}");
    drop(image);
    // QEMU opens no image of no bytes that has bitmaps.
    let image = open(&path, RW);
    let e = image.resize(0, &qblk::Options::new(), true).unwrap_err();
    assert_eq!(e.kind(), errno(libc::EINVAL), "{e}");
    drop(image);
    create(&path, "qcow2", 0, &[]);
    let image = open(&path, RW);
    let e = image.change_bitmap(&add("x", 0)).unwrap_err();
    assert_eq!(e.kind(), errno(libc::EINVAL), "{e}");
    drop(image);
    // Version 2 can have none.
    create(&path, "qcow2", 1 << 20, &[("compat", "0.10")]);
    let image = open(&path, RW);
    let e = image.change_bitmap(&add("x", 0)).unwrap_err();
    assert_eq!(e.kind(), errno(libc::ENOTSUP), "{e}");
    let raw = qblk::Image::open("mem:1M".as_ref(), &qblk::Options::new(), RW).unwrap();
    assert_eq!(raw.bitmaps().unwrap(), []);
    let e = raw.change_bitmap(&add("x", 0)).unwrap_err();
    assert_eq!(e.kind(), errno(libc::ENOTSUP), "{e}");
}

#[test]
fn contexts_share_the_bitmaps_of_a_device() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", 64 * K * K, &[]);
    let image = open(&path, RW);
    let other = image.context(&qblk::Options::new(), RW).unwrap();
    add(&image, "a", 0, false);
    other.write_at(&[1; 10], 0, NONE).unwrap();
    assert_eq!(dirty(&image, "a"), [(0, 64 * K)]);
    other.change_bitmap(&BitmapChange::Clear(b"a")).unwrap();
    image.write_at(&[1; 10], K * K, NONE).unwrap();
    assert_eq!(dirty(&other, "a"), [(K * K, 64 * K)]);
    image.close().unwrap();
    assert!(qemu_flags(&path, "a").contains(&"in-use".into()));
    // Opened anew for reading, and for writing again, nothing is lost.
    other.reopen(None, RO).unwrap();
    assert_eq!(dirty(&other, "a"), [(K * K, 64 * K)]);
    assert_eq!(qemu_flags(&path, "a"), ["auto"]);
    other.reopen(None, RW).unwrap();
    other.write_at(&[1; 10], 2 * K * K, NONE).unwrap();
    other.close().unwrap();
    check_clean(&path);
    assert_eq!(qemu_dirty(&path, "a"), [(K * K, 64 * K), (2 * K * K, 64 * K)]);
}

#[test]
fn many_bitmaps_and_long_names_are_possible() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", 4 * K * K, &[("cluster-size", "512")]);
    let image = open(&path, RW);
    let names: Vec<String> = (0..40).map(|i| format!("{i}-{}", "n".repeat(1020 - i))).collect();
    for name in &names {
        add(&image, name, 0, false);
    }
    image.write_at(&[1; 10], 0, NONE).unwrap();
    image.close().unwrap();
    check_clean(&path);
    let image = open(&path, RW);
    let all = image.bitmaps().unwrap();
    assert_eq!(all.len(), 40);
    for (b, name) in all.iter().zip(&names) {
        assert_eq!((&b.name[..], b.dirty, b.enabled), (name.as_bytes(), Some(64 * K), true));
    }
    for name in &names {
        image.change_bitmap(&BitmapChange::Remove(name.as_bytes())).unwrap();
    }
    image.close().unwrap();
    check_clean(&path);
}
