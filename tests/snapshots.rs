//! Internal snapshots, in both directions with QEMU: each makes, applies and deletes what the other has
//! made, and `qemu-img check` finds nothing after any step.

mod common;
#[path = "snapshots/model.rs"]
mod model;

use std::path::Path;

use common::*;
use qblk::block::ErrorKind;
use qblk::{Image, OneIov, OpenFlags, Options};

const MB: u64 = 1 << 20;
const COPIED: u64 = 1 << 63;

fn create_snapshot(image: &Image, name: &str) {
    image
        .snapshot_create(name.as_bytes(), &Options::new())
        .unwrap_or_else(|e| panic!("snapshot {name}: {e}"));
}

fn names(image: &Image) -> Vec<String> {
    let list = image.snapshots().unwrap();
    list.into_iter().map(|s| String::from_utf8(s.name).unwrap()).collect()
}

fn read_snapshot(path: &Path, which: &str) -> Vec<u8> {
    let image = open_with(path, &options(&[("snapshot", which)]), RO);
    read_all(&image)
}

fn write_state(image: &Image, bytes: &[u8], offset: u64) {
    image.vm_state_write(OneIov::src(bytes).iov(), offset).unwrap_or_else(|e| panic!("{e}"));
}

fn read_state(image: &Image, offset: u64, count: usize) -> Vec<u8> {
    let mut out = vec![0xee; count];
    image.vm_state_read(OneIov::dst(&mut out).iov(), offset).unwrap_or_else(|e| panic!("{e}"));
    out
}

#[test]
fn a_snapshot_holds_what_was_there_and_applying_it_brings_it_back() {
    let dir = Tmp::in_memory("snap");
    for (i, opts) in [
        &[("cluster-size", "64k")][..],
        &[("cluster-size", "512"), ("refcount-bits", "2")],
        &[("cluster-size", "4k"), ("compat", "0.10")],
        &[("cluster-size", "2M"), ("refcount-bits", "64")],
        &[("cluster-size", "16k"), ("extended-l2", "on")],
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.join(format!("{i}"));
        create(&path, "qcow2", 8 * MB, opts);
        let image = open(&path, RW);
        let first = Rng::new(1).bytes(MB as usize);
        image.write_at(&first, 3 * MB / 2, NONE).unwrap();
        create_snapshot(&image, "one");
        image.write_at(&[0x22; 100_000], 2 * MB, NONE).unwrap();
        image.zero(MB, MB, NONE).unwrap();
        create_snapshot(&image, "two");
        assert_eq!(names(&image), ["one", "two"]);
        let now = read_all(&image);
        image.close().unwrap();
        check_clean(&path);
        let mut then = vec![0; 8 * MB as usize];
        then[3 * MB as usize / 2..][..MB as usize].copy_from_slice(&first);
        assert_same(&read_snapshot(&path, "one"), &then, 0, "the first snapshot");
        assert_same(&read_snapshot(&path, "2"), &now, 0, "the second, by its ID");
        let image = open(&path, RW);
        image.snapshot_apply(b"one").unwrap();
        assert_same(&read_all(&image), &then, 0, "applied");
        image.write_at(&[0x33; 70_000], 2 * MB + 5, NONE).unwrap();
        then[2 * MB as usize + 5..][..70_000].fill(0x33);
        image.flush().unwrap();
        check_clean_copy(&dir, &path);
        image.snapshot_delete(b"one").unwrap();
        assert_eq!(names(&image), ["two"]);
        assert_same(&read_all(&image), &then, 0, "after deleting what was applied");
        image.snapshot_delete(b"two").unwrap();
        assert_eq!(image.snapshots().unwrap(), []);
        image.close().unwrap();
        check_clean(&path);
        let list = qemu_img!("snapshot", "-l", path);
        assert!(!list.contains("one") && !list.contains("two"), "{list}");
    }
}

/// What is in the file now, without what is in memory: only leaks may be found.
fn check_clean_copy(dir: &Tmp, path: &Path) {
    let copy = dir.join("copy");
    std::fs::copy(path, &copy).unwrap();
    check_no_corruption(&copy);
}

#[test]
fn qemu_sees_what_was_made_here_and_the_other_way_about() {
    let dir = Tmp::in_memory("snap-both");
    let path = dir.join("image");
    create(&path, "qcow2", 8 * MB, &[]);
    let image = open(&path, RW);
    image.write_at(&[0x11; MB as usize], 0, NONE).unwrap();
    let how = options(&[
        ("id", "seven"),
        ("date", "1700000000.25"),
        ("vm-clock", "3723004000000"),
        ("icount", "99"),
    ]);
    image.snapshot_create("größer".as_bytes(), &how).unwrap();
    image.write_at(&[0x12; MB as usize], 0, NONE).unwrap();
    image.close().unwrap();
    let json = qemu_img!("info", "--output=json", path);
    for words in [
        "\"id\": \"seven\"",
        "\"name\": \"gr\\u00F6\\u00DFer\"",
        "\"date-sec\": 1700000000",
        "\"date-nsec\": 250000000",
        "\"vm-clock-sec\": 3723",
        "\"vm-clock-nsec\": 4000000",
        "\"icount\": 99",
    ] {
        assert!(json.contains(words), "{words} is not in {json}");
    }
    qemu_io(&path, "qcow2", &["read -P 0x12 0 1M"]);
    qemu_img!("snapshot", "-c", "theirs", path);
    qemu_io(&path, "qcow2", &["write -P 0x13 512k 64k", "write -z 640k 64k"]);
    check_clean(&path);
    let image = open(&path, RW);
    let list = image.snapshots().unwrap();
    assert_eq!(names(&image), ["größer", "theirs"]);
    // A number that is more than all there are.
    assert_eq!(list[1].id, b"1");
    assert_eq!((list[0].vm_clock, list[0].icount), (3_723_004_000_000, Some(99)));
    assert_eq!((list[1].disk_size, list[1].vm_state_size), (8 * MB, 0));
    image.snapshot_apply(b"theirs").unwrap();
    assert_eq!(read_range(&image, 0, MB), vec![0x12; MB as usize]);
    image.close().unwrap();
    check_clean(&path);
    qemu_img!("snapshot", "-a", "größer", path);
    check_clean(&path);
    qemu_io(&path, "qcow2", &["read -P 0x11 0 1M"]);
    qemu_img!("snapshot", "-d", "größer", path);
    let image = open(&path, RW);
    assert_eq!(names(&image), ["theirs"]);
    image.snapshot_delete(b"1").unwrap();
    assert_eq!(read_range(&image, 0, MB), vec![0x11; MB as usize]);
    image.close().unwrap();
    check_clean(&path);
}

#[test]
fn the_machines_state_goes_with_its_snapshot() {
    let dir = Tmp::in_memory("snap-state");
    for (i, opts) in [
        &[("cluster-size", "64k")][..],
        &[("cluster-size", "16k"), ("extended-l2", "on")],
        &[("cluster-size", "4k"), ("compat", "0.10")],
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.join(format!("{i}"));
        create(&path, "qcow2", 3 * MB + 512, opts);
        let image = open(&path, RW);
        let mut rng = Rng::new(5);
        image.write_at(&rng.bytes(MB as usize), MB, NONE).unwrap();
        let disk = read_all(&image);
        let state = rng.bytes(5 * MB as usize + 77);
        for (k, part) in state.chunks(700_001).enumerate() {
            write_state(&image, part, k as u64 * 700_001);
        }
        assert_same(&read_state(&image, 0, state.len()), &state, 0, "before the snapshot");
        assert_eq!(read_state(&image, state.len() as u64, 10), [0; 10]);
        assert_same(&read_all(&image), &disk, 0, "the disk beside it");
        create_snapshot(&image, "with");
        assert_eq!(image.snapshots().unwrap()[0].vm_state_size, state.len() as u64);
        // It is the snapshot's now.
        assert_eq!(read_state(&image, 0, 1000), [0; 1000]);
        write_state(&image, &[0x77; 3000], 0);
        create_snapshot(&image, "short");
        image.write_at(&[0x44; 5000], MB, NONE).unwrap();
        create_snapshot(&image, "none");
        image.close().unwrap();
        check_clean(&path);
        let shown = open_with(&path, &options(&[("snapshot", "with")]), RO);
        assert_same(&read_state(&shown, 0, state.len()), &state, 0, "of the snapshot opened");
        assert_same(&read_all(&shown), &disk, 0, "the snapshot's disk");
        drop(shown);
        let list = qemu_img!("snapshot", "-l", path);
        assert!(list.contains("5 MiB") && list.contains("2.93 KiB"), "{list}");
        let image = open(&path, RW);
        image.snapshot_apply(b"with").unwrap();
        assert_same(&read_state(&image, 0, state.len()), &state, 0, "applied");
        assert_eq!(image.property("qcow2.vm-state-size").unwrap().unwrap(), b"5242957");
        // A larger disk has other bytes where the state was; where the format allows it.
        if i < 2 {
            image.resize(9 * MB, &Options::new(), false).unwrap();
            assert_eq!(
                read_range(&image, 3 * MB + 512, 6 * MB - 512),
                vec![0; 6 * MB as usize - 512]
            );
            assert_eq!(read_state(&image, 0, 1000), [0; 1000]);
        }
        image.snapshot_apply(b"short").unwrap();
        assert_eq!(image.size().unwrap(), 3 * MB + 512);
        assert_eq!(read_state(&image, 0, 3000), [0x77; 3000]);
        image.snapshot_delete(b"with").unwrap();
        image.close().unwrap();
        check_clean(&path);
        // QEMU finds it where QEMU looks for it.
        qemu_img!("snapshot", "-a", "short", path);
        let image = open(&path, RO);
        assert_eq!(read_state(&image, 0, 3000), [0x77; 3000]);
    }
}

#[test]
fn applying_a_snapshot_brings_its_size_back() {
    let dir = Tmp::in_memory("snap-size");
    let path = dir.join("image");
    create(&path, "qcow2", 5 * MB, &[("cluster-size", "512")]);
    let image = open(&path, RW);
    image.write_at(&[1; 5 * MB as usize], 0, NONE).unwrap();
    create_snapshot(&image, "five");
    image.resize(40 * MB, &Options::new(), false).unwrap();
    image.write_at(&[2; MB as usize], 39 * MB, NONE).unwrap();
    create_snapshot(&image, "forty");
    image.resize(2 * MB, &Options::new(), true).unwrap();
    create_snapshot(&image, "two");
    image.flush().unwrap();
    check_clean_copy(&dir, &path);
    for (name, size) in [("forty", 40), ("two", 2), ("five", 5), ("forty", 40), ("five", 5)] {
        image.snapshot_apply(name.as_bytes()).unwrap();
        assert_eq!(image.size().unwrap(), size * MB, "{name}");
        let bytes = read_all(&image);
        assert!(bytes[..2 * MB as usize].iter().all(|b| *b == 1));
        if size == 40 {
            assert!(bytes[5 * MB as usize..39 * MB as usize].iter().all(|b| *b == 0));
            assert!(bytes[39 * MB as usize..].iter().all(|b| *b == 2));
        }
        check_clean_copy(&dir, &path);
    }
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(read_snapshot(&path, "two").len() as u64, 2 * MB);
    qemu_img!("snapshot", "-a", "forty", path);
    check_clean(&path);
    assert_eq!(open(&path, RO).size().unwrap(), 40 * MB);
}

#[test]
fn version_2_is_resized_without_snapshots_only() {
    let dir = Tmp::in_memory("snap-v2");
    let path = dir.join("image");
    create(&path, "qcow2", 5 * MB, &[("compat", "0.10")]);
    let image = open(&path, RW);
    create_snapshot(&image, "s");
    for size in [4 * MB, 6 * MB] {
        let e = image.resize(size, &Options::new(), true).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
    }
    image.snapshot_delete(b"s").unwrap();
    image.resize(6 * MB, &Options::new(), false).unwrap();
    image.close().unwrap();
    check_clean(&path);
}

#[test]
fn what_can_not_be_counted_fails_and_changes_nothing() {
    let dir = Tmp::in_memory("snap-narrow");
    let path = dir.join("image");
    create(&path, "qcow2", 5 * MB, &[("refcount-bits", "2"), ("cluster-size", "4k")]);
    let image = open(&path, RW);
    image.write_at(&[1; 3 * MB as usize], 0, NONE).unwrap();
    create_snapshot(&image, "a");
    create_snapshot(&image, "b");
    image.flush().unwrap();
    let before = std::fs::read(&path).unwrap();
    let e = image.snapshot_create(b"c", &Options::new()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    assert!(e.to_string().contains("refcount") && e.to_string().contains("2 bits"), "{e}");
    let after = std::fs::read(&path).unwrap();
    assert_eq!(before[..4096], after[..4096], "the header has changed");
    assert_eq!(names(&image), ["a", "b"]);
    // Applying needs no room for both.
    image.snapshot_apply(b"a").unwrap();
    image.write_at(&[2; MB as usize], 0, NONE).unwrap();
    image.snapshot_delete(b"b").unwrap();
    create_snapshot(&image, "c");
    image.close().unwrap();
    check_clean(&path);

    let path = dir.join("one-bit");
    create(&path, "qcow2", 5 * MB, &[("refcount-bits", "1")]);
    let image = open(&path, RW);
    image.write_at(&[1; 100], 0, NONE).unwrap();
    let e = image.snapshot_create(b"c", &Options::new()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    image.write_at(&[1; 100], MB, NONE).unwrap();
    image.close().unwrap();
    check_clean(&path);
}

#[test]
fn what_is_asked_wrongly_is_refused() {
    let dir = Tmp::in_memory("snap-wrong");
    let path = dir.join("image");
    create(&path, "qcow2", MB, &[]);
    let image = open(&path, RW);
    create_snapshot(&image, "s");
    let no = Options::new();
    let long = vec![b'x'; 256];
    let errno = |e: qblk::Error| match e.kind() {
        ErrorKind::Errno(n) => n,
        other => panic!("{other:?}: {e}"),
    };
    for (name, opts, expected) in [
        (&b"s"[..], &no, libc::EEXIST),
        (b"t", &options(&[("id", "1")]), libc::EEXIST),
        (b"", &no, libc::EINVAL),
        (b"a\0b", &no, libc::EINVAL),
        (&long, &no, libc::EINVAL),
        (b"t", &options(&[("id", "")]), libc::EINVAL),
        (b"t", &options(&[("date", "yesterday")]), libc::EINVAL),
        (b"t", &options(&[("date", "4294967296")]), libc::EINVAL),
        (b"t", &options(&[("compat", "1.1")]), libc::EINVAL),
    ] {
        assert_eq!(errno(image.snapshot_create(name, opts).unwrap_err()), expected, "{name:?}");
    }
    // There is no number after the last.
    let last = u64::MAX.to_string();
    image.snapshot_create(b"last", &options(&[("id", &last)])).unwrap();
    assert_eq!(errno(image.snapshot_create(b"t", &no).unwrap_err()), libc::EEXIST);
    image.snapshot_create(b"after", &options(&[("id", "7")])).unwrap();
    image.snapshot_delete(b"after").unwrap();
    image.snapshot_delete(b"last").unwrap();
    for e in [image.snapshot_apply(b"t"), image.snapshot_delete(b"")] {
        let e = e.unwrap_err();
        assert!(e.to_string().contains("no snapshot"), "{e}");
        assert_eq!(errno(e), libc::ENOENT);
    }
    let reader = image.context(&no, RO).unwrap();
    assert_eq!(names(&reader), ["s"]);
    for e in [
        reader.snapshot_create(b"t", &no),
        reader.snapshot_apply(b"s"),
        reader.snapshot_delete(b"s"),
        reader.vm_state_write(OneIov::src(&[0; 9]).iov(), 0),
    ] {
        assert_eq!(errno(e.unwrap_err()), libc::EROFS);
    }
    let e = image.vm_state_write(OneIov::src(&[0; 9]).iov(), u64::MAX - 4).unwrap_err();
    assert_eq!(errno(e), libc::EFBIG);
    drop(reader);
    image.close().unwrap();
    let e = open_error(&path, &options(&[("snapshot", "s")]), RW);
    assert_eq!(errno(e), libc::EINVAL);
    let e = open_error(&path, &options(&[("snapshot", "t")]), RO);
    assert_eq!(errno(e), libc::ENOENT);
    let info = open(&path, OpenFlags::INFO_ONLY);
    assert_eq!(names(&info), ["s"]);
    let raw = dir.join("raw");
    create(&raw, "raw", MB, &[]);
    let e = open_error(&raw, &options(&[("snapshot", "s"), ("format", "raw")]), RO);
    assert_eq!(errno(e), libc::EINVAL);
    let e = open(&raw, RW).snapshot_create(b"s", &no).unwrap_err();
    assert_eq!(errno(e), libc::ENOTSUP);
}

#[test]
fn extra_data_that_is_not_known_is_kept() {
    let dir = Tmp::in_memory("snap-extra");
    let path = dir.join("image");
    create(&path, "qcow2", MB, &[]);
    let image = open(&path, RW);
    create_snapshot(&image, "first");
    image.close().unwrap();
    // 40 bytes more than is known, as a later version of the format might have.
    let at = peek_u64(&path, 64);
    let mut entry = peek(&path, at, 40);
    entry[36..40].copy_from_slice(&64u32.to_be_bytes());
    entry.extend(peek(&path, at + 40, 24));
    entry.extend([0x5a; 40]);
    entry.extend(b"1first");
    poke(&path, at, &entry);
    let image = open(&path, RW);
    assert_eq!(names(&image), ["first"]);
    create_snapshot(&image, "second");
    image.close().unwrap();
    check_clean(&path);
    let at = peek_u64(&path, 64);
    assert_eq!(peek(&path, at + 64, 46), [&[0x5a; 40][..], b"1first"].concat());
    qemu_img!("snapshot", "-d", "second", path);
    let at = peek_u64(&path, 64);
    assert_eq!(peek(&path, at + 64, 46), [&[0x5a; 40][..], b"1first"].concat());
}

#[test]
fn marks_of_the_only_reference_are_as_the_counts_are() {
    let dir = Tmp::in_memory("snap-marks");
    let path = dir.join("image");
    create(&path, "qcow2", 4 * MB, &[]);
    let image = open(&path, RW);
    image.write_at(&[1; MB as usize], 0, NONE).unwrap();
    image.flush().unwrap();
    let mark = || peek_u64(&path, peek_u64(&path, 40)) & COPIED != 0;
    assert!(mark());
    create_snapshot(&image, "s");
    assert!(!mark(), "the L2 table is shared");
    image.write_at(&[2; 512], 0, NONE).unwrap();
    image.flush().unwrap();
    assert!(mark(), "the L2 table was copied");
    image.snapshot_delete(b"s").unwrap();
    assert!(mark());
    let l2 = peek_u64(&path, peek_u64(&path, 40)) & !COPIED;
    for i in 0..16 {
        assert_ne!(peek_u64(&path, l2 + 8 * i) & COPIED, 0, "cluster {i} belongs to nobody else");
    }
    image.close().unwrap();
    check_clean(&path);
}

#[test]
fn space_comes_back_when_snapshots_go() {
    let dir = Tmp::new("snap-space");
    let path = dir.join("image");
    create(&path, "qcow2", 64 * MB, &[]);
    let image = open(&path, RW);
    image.write_at(&vec![1; 16 * MB as usize], 0, NONE).unwrap();
    create_snapshot(&image, "s");
    image.write_at(&vec![2; 16 * MB as usize], 0, NONE).unwrap();
    image.flush().unwrap();
    assert!(on_disk(&path) >= 32 * MB);
    image.snapshot_delete(b"s").unwrap();
    assert!(on_disk(&path) < 18 * MB, "{} bytes", on_disk(&path));
    // And the file does not creep.
    for _ in 0..20 {
        create_snapshot(&image, "s");
        image.snapshot_delete(b"s").unwrap();
    }
    image.close().unwrap();
    check_clean(&path);
    assert!(on_disk(&path) < 18 * MB, "{} bytes", on_disk(&path));
}

#[test]
fn a_snapshot_of_an_overlay_hides_and_shows_what_is_below_as_it_did() {
    let dir = Tmp::in_memory("snap-chain");
    let (base, path) = (dir.join("base"), dir.join("top"));
    create(&base, "raw", 6 * MB, &[]);
    let mut model = Rng::new(9).bytes(6 * MB as usize);
    std::fs::write(&base, &model).unwrap();
    // Shorter than what it stands on: its state area lies where the base has bytes.
    create(
        &path,
        "qcow2",
        2 * MB,
        &[("backing-file", "base"), ("backing-fmt", "raw"), ("cluster-size", "512")],
    );
    model.truncate(2 * MB as usize);
    let image = open(&path, RW);
    image.zero(0, MB, NONE).unwrap();
    model[..MB as usize].fill(0);
    write_state(&image, &[7; 700], 100);
    assert_eq!(read_state(&image, 0, 100), [0; 100]);
    assert_eq!(read_state(&image, 800, 4000), [0; 4000]);
    create_snapshot(&image, "s");
    image.write_at(&[5; MB as usize], MB / 2, NONE).unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_same(&read_snapshot(&path, "s"), &model, 0, "the snapshot");
    let image = open(&path, RW);
    image.snapshot_apply(b"s").unwrap();
    assert_same(&read_all(&image), &model, 0, "applied");
    assert_eq!(read_state(&image, 100, 700), [7; 700]);
}

#[test]
fn encrypted_images_have_snapshots_too() {
    let dir = Tmp::in_memory("snap-luks");
    let path = dir.join("image");
    let opts = [("encrypt.format", "luks"), ("encrypt.iter-time", "10"), ("key", "secret")];
    create(&path, "qcow2", 4 * MB, &opts);
    let key = options(&[("key", "secret")]);
    let image = open_with(&path, &key, RW);
    let mut rng = Rng::new(3);
    image.write_at(&rng.bytes(MB as usize), 777, NONE).unwrap();
    let then = read_all(&image);
    write_state(&image, &[9; 12345], 1);
    create_snapshot(&image, "s");
    image.write_at(&rng.bytes(MB as usize), MB, NONE).unwrap();
    image.close().unwrap();
    let shown = open_with(&path, &key.clone().with("snapshot", "s"), RO);
    assert_same(&read_all(&shown), &then, 0, "the snapshot");
    assert_eq!(read_state(&shown, 1, 12345), [9; 12345]);
    drop(shown);
    let image = open_with(&path, &key, RW);
    image.snapshot_apply(b"s").unwrap();
    assert_same(&read_all(&image), &then, 0, "applied");
    image.snapshot_delete(b"s").unwrap();
    image.close().unwrap();
    let opts = format!(
        "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename={}",
        path.display()
    );
    run_ok(
        "qemu-img",
        &[&"check", &"--object", &"secret,id=s,data=secret", &"--image-opts", &opts],
    );
}

#[test]
fn other_threads_write_while_snapshots_are_made() {
    let dir = Tmp::in_memory("snap-threads");
    let path = dir.join("image");
    const PART: u64 = MB;
    create(&path, "qcow2", 4 * PART, &[("cluster-size", "4k")]);
    let image = open(&path, RW);
    let over = std::sync::atomic::AtomicBool::new(false);
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    let models: Vec<Vec<u8>> = std::thread::scope(|s| {
        let threads: Vec<_> = (0..3u64)
            .map(|t| {
                let (image, over) = (&image, &over);
                s.spawn(move || {
                    let (mut rng, mut model) = (Rng::new(t), vec![0; PART as usize]);
                    while !over.load(relaxed) {
                        let n = rng.range(1, 20_000);
                        let at = rng.below(PART - n);
                        let data = rng.bytes(n as usize);
                        image.write_at(&data, t * PART + at, NONE).unwrap();
                        model[at as usize..][..n as usize].copy_from_slice(&data);
                        let at = rng.below(PART - 5000);
                        let found = read_range(image, t * PART + at, 5000);
                        assert_same(&found, &model[at as usize..][..5000], at, "meanwhile");
                    }
                    model
                })
            })
            .collect();
        let fourth = vec![4; PART as usize];
        for i in 0..30u64 {
            image.write_at(&vec![i as u8; PART as usize], 3 * PART, NONE).unwrap();
            create_snapshot(&image, &format!("s{i}"));
            if i >= 3 {
                image.snapshot_delete(format!("s{}", i - 3).as_bytes()).unwrap();
            }
        }
        image.write_at(&fourth, 3 * PART, NONE).unwrap();
        over.store(true, relaxed);
        threads.into_iter().map(|t| t.join().unwrap()).chain([fourth]).collect()
    });
    assert_same(&read_all(&image), &models.concat(), 0, "at the end");
    image.close().unwrap();
    check_clean(&path);
    for i in 27..30 {
        let bytes = read_snapshot(&path, &format!("s{i}"));
        assert!(bytes[3 * PART as usize..].iter().all(|b| *b == i), "snapshot s{i}");
    }
}
