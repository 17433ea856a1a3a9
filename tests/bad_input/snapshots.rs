//! Snapshot tables, and what they lead to, that contradict the format: each with the error that it gets,
//! and no harm to the image.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::common::*;
use qblk::block::{ErrorKind, Progress};
use qblk::{Image, OneIov, OpenFlags, Options};

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;
const MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// An image with two snapshots: its path, and where their table lies.
fn with_snapshots(dir: &Tmp) -> (PathBuf, u64) {
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, &[]);
    let image = open(&path, RW);
    for (name, byte) in [(&b"first"[..], 1), (b"second", 2)] {
        image.write_at(&[byte; 3 * CLUSTER as usize], 0, NONE).unwrap();
        image.snapshot_create(name, &Options::new()).unwrap();
    }
    image.close().unwrap();
    let table = peek_u64(&path, 64);
    (path, table)
}

fn no() -> Options {
    Options::new()
}

fn expect(what: &str, e: qblk::Error, kind: ErrorKind, words: &[&str]) {
    assert_eq!(e.kind(), kind, "{what}: {e}");
    for word in words {
        assert!(e.to_string().contains(word), "{what}: {word:?} not in: {e}");
    }
}

#[test]
fn wrong_snapshot_tables_are_reported_with_what_was_found() {
    let u32b = |v: u32| v.to_be_bytes().to_vec();
    for (what, header, table, words) in [
        (
            "past the end",
            vec![(64, (1u64 << 40).to_be_bytes().to_vec())],
            vec![],
            vec!["an entry", "0x10000000000"],
        ),
        ("more than there are", vec![(60, u32b(65536))], vec![], vec!["extra data of snapshot"]),
        ("much extra data", vec![], vec![(36, u32b(1025))], vec!["snapshot 0", "1025", "1024"]),
        ("very much extra data", vec![], vec![(36, u32b(u32::MAX))], vec!["4294967295", "1024"]),
        ("a long ID and name", vec![], vec![(12, vec![0xff; 4])], vec!["65535 bytes of a"]),
    ] {
        let dir = Tmp::in_memory("snap-table");
        let (path, at) = with_snapshots(&dir);
        header.iter().for_each(|(offset, bytes)| poke(&path, *offset, bytes));
        table.iter().for_each(|(offset, bytes)| poke(&path, at + offset, bytes));
        let before = fs::read(&path).unwrap();
        expect(what, open_error(&path, &no(), RW), ErrorKind::Corrupt, &words);
        let shown = options(&[("snapshot", "first")]);
        expect(what, open_error(&path, &shown, RO), ErrorKind::Corrupt, &words);
        // Reading the active image needs no snapshots.
        for flags in [RO, OpenFlags::INFO_ONLY] {
            let image = open(&path, flags);
            expect(what, image.snapshots().unwrap_err(), ErrorKind::Corrupt, &words);
        }
        assert_eq!(read_range(&open(&path, RO), 0, 10), [2; 10], "{what}");
        assert!(fs::read(&path).unwrap() == before, "{what}: the file has changed");
    }
}

#[test]
fn a_table_that_claims_much_is_read_as_far_as_a_table_may_reach() {
    let dir = Tmp::in_memory("snap-large");
    let (path, _) = with_snapshots(&dir);
    // A hole of zeroes: entries without a name, without end.
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    poke(&path, 64, &(1u64 << 30).to_be_bytes());
    poke(&path, 60, &65536u32.to_be_bytes());
    let begin = Instant::now();
    assert_eq!(open(&path, RO).snapshots().unwrap().len(), 65536);
    // With long names it is too long.
    for i in 0..2000u64 {
        poke(&path, (1 << 30) + i * 65576 + 14, &[0xff, 0xff]);
    }
    let e = open(&path, RO).snapshots().unwrap_err();
    expect("too long", e, ErrorKind::Corrupt, &["a name", "0x44000000"]);
    let hostile = OpenFlags::UNTRUSTED;
    let image = open_with(&path, &options(&[("format", "qcow2")]), hostile);
    let e = image.snapshots().unwrap_err();
    expect("hostile", e, ErrorKind::Corrupt, &["0x40100000"]);
    assert!(begin.elapsed() < Duration::from_secs(10), "took {:?}", begin.elapsed());
}

#[test]
fn wrong_l1_tables_of_snapshots_are_reported_and_change_nothing() {
    for (what, at, bytes, words) in [
        ("unaligned", 0, (5 * CLUSTER + 512).to_be_bytes().to_vec(), vec!["0x50200", "multiple"]),
        ("none", 0, vec![0; 8], vec!["0x0", "multiple"]),
        ("past the end", 0, (1u64 << 40).to_be_bytes().to_vec(), vec!["past the end"]),
        ("huge", 8, u32::MAX.to_be_bytes().to_vec(), vec!["4294967295", "4194304"]),
        ("short", 8, vec![0; 4], vec!["found 0 entries", "at least 1"]),
        ("a huge disk", 48, (1u64 << 63).to_be_bytes().to_vec(), vec!["disk size", "2^63"]),
        ("a large disk", 48, (1u64 << 40).to_be_bytes().to_vec(), vec!["at least 2048"]),
    ] {
        let dir = Tmp::in_memory("snap-l1");
        let (path, table) = with_snapshots(&dir);
        poke(&path, table + at, &bytes);
        let shown = options(&[("snapshot", "1")]);
        expect(what, open_error(&path, &shown, RO), ErrorKind::Corrupt, &words);
        let image = open(&path, RW);
        expect(what, image.snapshot_apply(b"1").unwrap_err(), ErrorKind::Corrupt, &words);
        expect(what, image.snapshot_delete(b"1").unwrap_err(), ErrorKind::Corrupt, &words);
        assert_eq!(image.snapshots().unwrap().len(), 2, "{what}");
        // The other one is as good as ever.
        image.snapshot_apply(b"second").unwrap();
        assert_eq!(read_range(&image, 0, 10), [2; 10]);
        image.snapshot_delete(b"second").unwrap();
        image.close().unwrap();
    }
}

#[test]
fn what_tables_lead_to_must_be_counted_and_once_only() {
    let dir = Tmp::in_memory("snap-counts");
    let (path, table) = with_snapshots(&dir);
    let l1 = peek_u64(&path, table);
    let l2 = peek_u64(&path, l1) & MASK;
    let good = fs::read(&path).unwrap();
    let free = good.len() as u64 + (1 << 20);
    let entries = |at: u64, value: u64| {
        fs::write(&path, &good).unwrap();
        poke(&path, at, &value.to_be_bytes());
    };
    for (what, at, value, word) in [
        ("free data", l2, free / CLUSTER * CLUSTER, "refcount of 0"),
        ("far data", l2, MASK & !0xffff, "refcount of 0"),
        ("reserved bits", l2, (5 * CLUSTER) | 2, "reserved"),
        ("unaligned data", l2, 5 * CLUSTER + 512, "multiple"),
        ("reserved bits in L1", l1, (5 * CLUSTER) | 1, "L1 entry 0"),
        ("an L2 table past the end", l1, 1 << 40, "past the end"),
    ] {
        entries(at, value);
        let image = open(&path, RW);
        let e = image.snapshot_apply(b"1").unwrap_err();
        expect(what, e, ErrorKind::Corrupt, &[word]);
        let e = image.snapshot_delete(b"1").unwrap_err();
        expect(what, e, ErrorKind::Corrupt, &[word]);
        assert_eq!(read_range(&image, 0, 10), [2; 10], "{what}");
        // The image goes on without it.
        image.write_at(&[3; 10], 0, NONE).unwrap();
        image.close().unwrap();
        assert!(!is_marked(&path), "{what}");
    }
    // Two L1 entries with one table: an image of many entries would take for ever.
    let path = dir.join("twice");
    create(&path, "qcow2", 2 << 30, &[]);
    let image = open(&path, RW);
    image.write_at(&[1; 100], 0, NONE).unwrap();
    image.close().unwrap();
    let l1 = peek_u64(&path, 40);
    let l2 = peek_u64(&path, l1);
    poke(&path, l1 + 8, &l2.to_be_bytes());
    let image = open(&path, RW);
    let e = image.snapshot_create(b"s", &no()).unwrap_err();
    expect("twice", e, ErrorKind::Corrupt, &["two L1 entries", &format!("{:#x}", l2 & !COPIED)]);
}

/// Whether the image says that it is corrupt.
fn is_marked(path: &Path) -> bool {
    peek_u64(path, 72) & 2 != 0
}

/// What is wrong with the active image's tables is found by whatever walks over them: the image is marked and
/// fenced, and can be read.
#[test]
fn wrong_tables_of_the_active_image_are_a_fault_of_the_image() {
    let dir = Tmp::in_memory("snap-active");
    let (path, _) = with_snapshots(&dir);
    let image = open(&path, RW);
    image.write_at(&[3; 10], 2 * CLUSTER, NONE).unwrap();
    image.close().unwrap();
    let l1 = peek_u64(&path, 40);
    let l2 = peek_u64(&path, l1) & MASK;
    let good = fs::read(&path).unwrap();
    let free = (good.len() as u64).next_multiple_of(CLUSTER) + CLUSTER;
    type Work = fn(&Image) -> Result<(), qblk::Error>;
    let apply: Work = |image| image.snapshot_apply(b"1");
    let delete: Work = |image| image.snapshot_delete(b"1");
    let old: Work = |image| image.amend(&options(&[("compat", "0.10")]), Progress::NONE);
    for (what, at, value, word, works) in [
        ("free data", l2 + 16, free, "refcount of 0", &[apply, delete, old][..]),
        ("reserved bits", l2 + 16, (5 * CLUSTER) | 2, "reserved", &[apply, delete, old]),
        ("unaligned data", l2 + 16, 5 * CLUSTER + 512, "multiple", &[apply, delete, old]),
        ("a free table", l1, free, "", &[apply, delete, old]),
        ("reserved bits in L1", l1, (5 * CLUSTER) | 1, "L1 entry 0", &[apply, delete, old]),
        ("a table past the end", l1, 1 << 40, "past the end", &[apply, delete, old]),
    ] {
        for work in works {
            fs::write(&path, &good).unwrap();
            poke(&path, at, &value.to_be_bytes());
            let image = open(&path, RW);
            expect(what, work(&image).unwrap_err(), ErrorKind::Corrupt, &[word]);
            let e = image.write_at(&[4; 10], CLUSTER, NONE).unwrap_err();
            expect(what, e, ErrorKind::Corrupt, &["refuses writes"]);
            drop(image);
            assert!(is_marked(&path), "{what}");
            // The snapshot has all it had.
            let shown = options(&[("snapshot", "second")]);
            assert_eq!(read_range(&open_with(&path, &shown, RO), 0, 10), [2; 10], "{what}");
        }
    }
}

/// A snapshot that points to what is the active image's alone, by its counts, must not take it along.
#[test]
fn a_snapshot_takes_nothing_along_that_is_the_active_images() {
    let dir = Tmp::in_memory("snap-claims");
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, &[("compression-type", "zlib")]);
    let image = open(&path, RW);
    image.write_at(&[1; CLUSTER as usize], 0, NONE).unwrap();
    image.snapshot_create(b"s", &no()).unwrap();
    image.write_at(&[2; CLUSTER as usize], 0, NONE).unwrap();
    let pattern: Vec<u8> = (0..CLUSTER).map(|i| (i % 251) as u8).collect();
    image.write_compressed(OneIov::src(&pattern).iov(), CLUSTER).unwrap();
    image.close().unwrap();
    let good = fs::read(&path).unwrap();
    let of_snapshot = peek_u64(&path, peek_u64(&path, peek_u64(&path, 64))) & MASK;
    let l1 = peek_u64(&path, 40);
    let active = peek_u64(&path, l1) & MASK;
    let plain = peek_u64(&path, active) & MASK;
    let packed = peek_u64(&path, active + 8);
    for (what, at, value) in [
        ("its data", of_snapshot, plain),
        ("its compressed data", of_snapshot + 8, packed),
        ("its table", peek_u64(&path, peek_u64(&path, 64)), active),
    ] {
        fs::write(&path, &good).unwrap();
        poke(&path, at, &value.to_be_bytes());
        let image = open(&path, RW);
        let e = image.snapshot_delete(b"s").unwrap_err();
        expect(what, e, ErrorKind::Corrupt, &["would have a refcount of 0"]);
        image.write_at(&[4; 10], 5 * CLUSTER, NONE).unwrap();
        assert_eq!(read_range(&image, 0, 10), [2; 10], "{what}");
        assert_same(&read_range(&image, CLUSTER, CLUSTER), &pattern, CLUSTER, what);
        image.close().unwrap();
        assert!(!is_marked(&path), "{what}");
        // Once the counts are mended it goes.
        let image = open(&path, RW | OpenFlags::CHECK);
        let report = image.check(qblk::block::Repair::All, Progress::NONE).unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {report:?}");
        image.close().unwrap();
        let image = open(&path, RW);
        image.snapshot_delete(b"s").unwrap();
        assert_eq!(read_range(&image, 0, 10), [2; 10], "{what}");
        assert_same(&read_range(&image, CLUSTER, CLUSTER), &pattern, CLUSTER, what);
        image.close().unwrap();
        check_clean(&path);
    }
}

/// Everything that has to do with snapshots, whatever comes of it, and soon.
fn use_it(path: &Path) {
    let begin = Instant::now();
    for which in ["1", "second"] {
        let shown = options(&[("snapshot", which), ("format", "qcow2")]);
        let Ok(image) = Image::open(path.as_os_str(), &shown, RO) else { continue };
        let size = image.size().unwrap().min(1 << 20);
        let _ = image.read_at(&mut vec![0; size as usize], 0);
        let _ = image.vm_state_read(OneIov::dst(&mut [0; 5000]).iov(), 0);
        let _ = image.close();
    }
    let opened = Image::open(path.as_os_str(), &options(&[("format", "qcow2")]), RW);
    let Ok(image) = opened else { return };
    let _ = image.snapshots();
    let _ = image.snapshot_create(b"third", &no());
    let _ = image.write_at(&[3; 100_000], 1000, NONE);
    let _ = image.snapshot_apply(b"1");
    let _ = image.vm_state_write(OneIov::src(&[4; 5000]).iov(), 77);
    let _ = image.snapshot_delete(b"second");
    let _ = image.amend(&options(&[("refcount-bits", "8")]), Progress::NONE);
    let _ = image.amend(&options(&[("refcount-bits", "16"), ("compat", "0.10")]), Progress::NONE);
    let _ = image.close();
    assert!(begin.elapsed() < Duration::from_secs(10), "took {:?}", begin.elapsed());
}

#[test]
fn random_snapshot_tables_do_no_harm_to_the_program() {
    let mut rng = Rng::new(seed("random snapshots"));
    let dir = Tmp::in_memory("snap-random");
    let (path, table) = with_snapshots(&dir);
    let sound = fs::read(&path).unwrap();
    let l1 = peek_u64(&path, table);
    let l2 = peek_u64(&path, l1) & MASK;
    let active = peek_u64(&path, 40);
    let end = deadline(10);
    while Instant::now() < end {
        let mut bytes = sound.clone();
        for _ in 0..rng.range(1, 12) {
            let place = rng.pick(&[table, table, l1, l2, active, CLUSTER]);
            let at = (place + 8 * rng.below(20)) as usize;
            let value = match rng.below(6) {
                0 => rng.next(),
                1 => rng.below(20) * CLUSTER,
                2 => COPIED | (rng.below(20) * CLUSTER),
                3 => rng.below(300),
                4 => rng.below(300) << 32,
                _ => 1 << rng.below(64),
            };
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        fs::write(&path, &bytes).unwrap();
        use_it(&path);
        let len = fs::metadata(&path).unwrap().len();
        assert!(len < 1 << 57, "the file has {len} bytes");
    }
}
