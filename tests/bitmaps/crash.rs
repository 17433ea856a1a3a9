//! Writers that never close: their bitmaps are inconsistent, the image is not.

use super::common::*;
use super::peers::*;
use qblk::block::{BitmapChange, ErrorKind};

const K: u64 = 1024;

#[test]
fn a_writer_that_goes_away_leaves_its_bitmaps_inconsistent_and_the_image_clean() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", 64 * K * K, &[]);
    let image = open(&path, RW);
    add(&image, "on", 0, false);
    add(&image, "off", 0, true);
    // Before anything is changed nothing is in use, so that losing this costs nothing.
    assert_eq!(qemu_flags(&path, "on"), ["auto"]);
    image.read_at(&mut [0; 100], 0).unwrap();
    drop(image);
    let image = open(&path, RW);
    assert_eq!(dirty(&image, "on"), []);
    image.write_at(&[1; 100], 0, NONE).unwrap();
    image.flush().unwrap();
    drop(image);
    check_no_corruption(&path);
    assert_eq!(qemu_flags(&path, "on"), ["in-use", "auto"]);
    assert_eq!(qemu_flags(&path, "off"), Vec::<String>::new());

    let image = open(&path, RW);
    let b = info(&image, "on");
    assert!(b.inconsistent && b.enabled && b.persistent && b.dirty.is_none(), "{b:?}");
    assert_eq!(info(&image, "off").dirty, Some(0));
    for change in [
        BitmapChange::Enable(b"on"),
        BitmapChange::Disable(b"on"),
        BitmapChange::Clear(b"on"),
        BitmapChange::Merge { target: b"off", source: b"on" },
        BitmapChange::Merge { target: b"on", source: b"off" },
    ] {
        let e = image.change_bitmap(&change).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ESTALE), "{change:?}: {e}");
        assert!(e.to_string().contains("inconsistent"), "{e}");
    }
    assert_eq!(try_dirty(&image, "on").unwrap_err().kind(), ErrorKind::Errno(libc::ESTALE));
    // It stays so, whoever writes and closes.
    image.write_at(&[1; 100], K * K, NONE).unwrap();
    image.resize(65 * K * K, &qblk::Options::new(), false).unwrap();
    image.close().unwrap();
    check_no_corruption(&path);
    assert_eq!(qemu_flags(&path, "on"), ["in-use", "auto"]);
    let image = open(&path, RW);
    image.change_bitmap(&BitmapChange::Remove(b"on")).unwrap();
    image.close().unwrap();
    check_no_corruption(&path);
    qemu_img!("check", "-q", "-r", "leaks", path);
    check_clean(&path);
    assert_eq!(qemu_dirty(&path, "off"), []);
}

#[test]
fn bitmaps_that_another_program_has_outdated_are_dropped() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    qemu_img!("create", "-q", "-f", "qcow2", path, "64M");
    qemu_img!("bitmap", "--add", path, "b");
    // It knows nothing of bitmaps, and so it clears the bit.
    poke(&path, 88, &[0; 8]);
    for flags in [RO, RW] {
        let image = open(&path, flags);
        assert_eq!(image.bitmaps().unwrap(), []);
        image.close().unwrap();
    }
    check_no_corruption(&path);
    qemu_img!("check", "-q", "-r", "leaks", path);
    check_clean(&path);
    // There is room for others.
    let image = open(&path, RW);
    add(&image, "b", 0, false);
    image.write_at(&[1; 10], 0, NONE).unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(qemu_dirty(&path, "b"), [(0, 64 * K)]);
}

#[test]
fn bits_of_the_header_that_say_nothing_true_are_cleared() {
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", K * K, &[]);
    // Bitmaps are consistent, and there are none; and one that nobody knows.
    poke(&path, 88, &(1u64 | 1 << 40).to_be_bytes());
    open(&path, RW).close().unwrap();
    assert_eq!(peek_u64(&path, 88), 0);
    let image = open(&path, RW);
    add(&image, "b", 0, false);
    image.close().unwrap();
    assert_eq!(peek_u64(&path, 88), 1);
    poke(&path, 88, &(1u64 | 1 << 40).to_be_bytes());
    open(&path, RW).close().unwrap();
    assert_eq!(peek_u64(&path, 88), 1);
    check_clean(&path);
}
