//! Bitmap directories and tables that are wrong: opening for writing is refused where the directory
//! can not be relied on, with what it says and where; the guest's data can be read all the same; and
//! nothing costs more memory or time than the file's size allows.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::common::*;
use qblk::block::{BitmapChange, ErrorKind};
use qblk::{Extent, OpenFlags, Options};

const CLUSTER: u64 = 65536;
const K: u64 = 1024;

/// An image of 64 MiB with a bitmap "b" that has one granule dirty: where its extension's data, its
/// directory and its table are.
struct Made {
    path: PathBuf,
    extension: u64,
    directory: u64,
    table: u64,
}

fn made(dir: &Tmp) -> Made {
    let path = dir.join("image");
    create(&path, "qcow2", 64 * K * K, &[]);
    let image = open(&path, RW);
    image.write_at(&[0x11; 10], 0, NONE).unwrap();
    let add = BitmapChange::Add { name: b"b", granularity: 0, disabled: false };
    image.change_bitmap(&add).unwrap();
    image.write_at(&[0x11; 10], K * K, NONE).unwrap();
    image.close().unwrap();
    let head = peek(&path, 0, 4096);
    let magic = 0x2385_2875u32.to_be_bytes();
    let extension = head.windows(4).position(|w| w == magic).unwrap() as u64 + 8;
    let directory = peek_u64(&path, extension + 16);
    let table = peek_u64(&path, directory);
    Made { path, extension, directory, table }
}

/// Writing is refused with ECORRUPT and these words; so is asking about bitmaps; reading is not.
fn refused(path: &Path, words: &[&str]) {
    let told = |e: qblk::Error, what: &str| {
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
        for word in words {
            assert!(e.to_string().contains(word), "{what}: {word:?} not in: {e}");
        }
    };
    told(open_error(path, &Options::new(), RW), "opening");
    for flags in [RO, OpenFlags::INFO_ONLY] {
        let image = open(path, flags);
        told(image.bitmaps().unwrap_err(), "list");
        if flags == RO {
            assert_eq!(read_range(&image, 0, 10), [0x11; 10]);
            let mut some = [Extent::default(); 4];
            let e = image.dirty_extents(b"b", true, 0, K * K, &mut some).unwrap_err();
            told(e, "extents");
        }
        image.close().unwrap();
    }
}

#[test]
fn wrong_directories_are_reported() {
    let far = 1u64 << 40;
    type Poke<'a> = (&'a str, u64, Vec<u8>, &'a [&'a str]);
    let dir = Tmp::in_memory("directory");
    let good = made(&dir);
    let (e, d) = (good.extension, good.directory);
    let be32 = |n: u32| n.to_be_bytes().to_vec();
    let be64 = |n: u64| n.to_be_bytes().to_vec();
    let all: Vec<Poke<'_>> = vec![
        ("no bitmaps", e, be32(0), &["found 0 bitmaps", "1 to 65535"]),
        ("too many", e, be32(65536), &["found 65536 bitmaps"]),
        ("fewer than said", e, be32(2), &["found 1 entries, expected 2"]),
        ("reserved field", e + 4, be32(1), &["reserved field", "0x1"]),
        ("a huge directory", e + 8, be64(1 << 30), &["directory size", "1073741824", "67107840"]),
        ("a directory past the end", e + 8, be64(1 << 24), &["past the end", "16777216"]),
        ("a directory of a few bytes", e + 8, be64(8), &["found 8 bytes", "at least 24"]),
        ("a directory of no bytes", e + 8, be64(0), &["found 0 entries, expected 1"]),
        ("a directory nowhere", e + 16, be64(0), &["directory offset", "found 0x0"]),
        ("a directory off its cluster", e + 16, be64(d + 512), &["directory offset", "multiple"]),
        ("a directory far away", e + 16, be64(far), &["past the end", "0x10000000000"]),
        ("a directory that overflows", e + 16, be64(!0xffff), &["past the end"]),
        ("no table", d, be64(0), &["table offset", "0x0"]),
        ("a table off its cluster", d, be64(good.table + 512), &["table offset"]),
        ("a table far away", d, be64(far), &["table", "past the end"]),
        ("an empty table", d + 8, be32(0), &["found 0 entries"]),
        ("a table of too much data", d + 8, be32(8193), &["536936448 bytes", "536870912"]),
        ("the longest table", d + 8, be32(u32::MAX), &["4294967295 entries"]),
        ("unknown flags", d + 12, be32(8), &["flags: found 0x8"]),
        ("another type", d + 16, vec![0], &["type: found 0, expected 1"]),
        ("too fine", d + 17, vec![8], &["granularity bits: found 8, expected 9 to 31"]),
        ("too coarse", d + 17, vec![32], &["granularity bits: found 32"]),
        ("no name", d + 18, vec![0, 0], &["name size: found 0"]),
        ("a long name", d + 18, vec![4, 0], &["name size: found 1024"]),
        ("a name past the end", d + 18, vec![3, 255], &["found 1047 bytes", "32 left"]),
        ("much extra data", d + 20, be32(u32::MAX), &["left of the directory"]),
        ("a NUL in the name", d + 24, vec![0], &["NUL"]),
    ];
    let before = fs::read(&good.path).unwrap();
    for (what, at, bytes, words) in all {
        eprintln!("{what}");
        fs::write(&good.path, &before).unwrap();
        poke(&good.path, at, &bytes);
        refused(&good.path, words);
    }
    // A table that is too small for the disk.
    fs::write(&good.path, &before).unwrap();
    poke(&good.path, 24, &(1u64 << 40).to_be_bytes());
    poke(&good.path, 36, &2048u32.to_be_bytes());
    let e = open_error(&good.path, &Options::new(), RW);
    assert!(e.to_string().contains("found 1 entries, expected 32"), "{e}");
}

#[test]
fn two_bitmaps_of_one_name_are_reported() {
    let dir = Tmp::in_memory("directory");
    let good = made(&dir);
    let entry = peek(&good.path, good.directory, 32);
    poke(&good.path, good.directory + 32, &entry);
    poke(&good.path, good.extension, &2u32.to_be_bytes());
    poke(&good.path, good.extension + 8, &64u64.to_be_bytes());
    refused(&good.path, &["two bitmaps", "'b'"]);
}

#[test]
fn wrong_table_entries_are_reported_and_cost_that_bitmap_only() {
    for (entry, word) in [
        ((1u64 << 63) | (5 * CLUSTER), "reserved"),
        ((5 * CLUSTER) | 2, "reserved"),
        ((5 * CLUSTER) | 1, "all ones"),
        (5 * CLUSTER + 512, "multiple of the cluster size"),
        (1 << 40, "past the end"),
    ] {
        let dir = Tmp::in_memory("table");
        let good = made(&dir);
        let image = open(&good.path, RW);
        let add = BitmapChange::Add { name: b"other", granularity: 0, disabled: false };
        image.change_bitmap(&add).unwrap();
        image.close().unwrap();
        poke(&good.path, good.table, &entry.to_be_bytes());
        let image = open(&good.path, RW);
        let mut some = [Extent::default(); 4];
        let found = format!("{entry:#018x}");
        let check = |e: qblk::Error, what: &str| {
            assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
            for word in [word, &found, "'b'"] {
                assert!(e.to_string().contains(word), "{what}: {word:?} not in: {e}");
            }
        };
        check(image.dirty_extents(b"b", true, 0, K * K, &mut some).unwrap_err(), "extents");
        assert_eq!(image.bitmaps().unwrap()[0].dirty, None);
        let merge = BitmapChange::Merge { target: b"other", source: b"b" };
        check(image.change_bitmap(&merge).unwrap_err(), "merge");
        image.write_at(&[1; 10], 3 * K * K, NONE).unwrap();
        // It can not be saved, and so it stays in use; the other one is.
        check(image.close().unwrap_err(), "close");
        let image = open(&good.path, RW);
        let all = image.bitmaps().unwrap();
        assert!(all[0].inconsistent && all[0].name == b"b");
        assert_eq!((all[1].inconsistent, all[1].dirty), (false, Some(CLUSTER)));
        image.change_bitmap(&BitmapChange::Remove(b"b")).unwrap();
        image.close().unwrap();
        check_no_corruption(&good.path);
    }
}

#[test]
fn extra_data_that_must_be_understood_makes_a_bitmap_useless_and_is_kept() {
    let dir = Tmp::in_memory("extra");
    let good = made(&dir);
    // 8 bytes of extra data between the fixed part and the name; also with the flag that says that
    // they may be ignored.
    for (flags, usable) in [(2u32, false), (6, true)] {
        let mut entry = peek(&good.path, good.directory, 24);
        entry[12..16].copy_from_slice(&flags.to_be_bytes());
        entry[20..24].copy_from_slice(&8u32.to_be_bytes());
        entry.extend(b"whatever");
        entry.extend(b"b\0\0\0\0\0\0\0");
        poke(&good.path, good.directory, &entry);
        poke(&good.path, good.extension + 8, &(entry.len() as u64).to_be_bytes());
        let image = open(&good.path, RW);
        let all = image.bitmaps().unwrap();
        assert_eq!((all.len(), all[0].inconsistent), (1, !usable));
        if usable {
            assert_eq!(all[0].dirty, Some(CLUSTER));
            image.write_at(&[1; 10], 3 * K * K, NONE).unwrap();
            image.close().unwrap();
            let image = open(&good.path, RO);
            assert_eq!(image.bitmaps().unwrap()[0].dirty, Some(2 * CLUSTER));
        } else {
            let e = image.change_bitmap(&BitmapChange::Clear(b"b")).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Errno(libc::ESTALE), "{e}");
            assert!(e.to_string().contains("extra data"), "{e}");
        }
        let directory = peek_u64(&good.path, good.extension + 16);
        assert_eq!(peek(&good.path, directory + 24, 9), b"whateverb");
    }
}

/// Bytes of memory that this process has now.
fn memory() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn a_bitmap_that_claims_much_costs_little() {
    let dir = Tmp::in_memory("much");
    let path = dir.join("image");
    // Clusters of 2 MiB, so that 256 entries of a table are 512 MiB of bits; all lead to one cluster.
    create(&path, "qcow2", 1 << 40, &[("cluster-size", "2M")]);
    let image = open(&path, RW);
    let add = BitmapChange::Add { name: b"b", granularity: 512, disabled: true };
    let e = image.change_bitmap(&add).map(drop);
    e.unwrap();
    image.close().unwrap();
    let head = peek(&path, 0, 4096);
    let at = head.windows(4).position(|w| w == 0x2385_2875u32.to_be_bytes()).unwrap() as u64 + 8;
    let directory = peek_u64(&path, at + 16);
    let table = peek_u64(&path, directory);
    assert_eq!(peek_u32(&path, directory + 8), 128);
    for i in 0..128 {
        poke(&path, table + 8 * i, &directory.to_be_bytes());
    }
    let (before, began) = (memory(), Instant::now());
    let image = open(&path, RW);
    // 256 MiB of bits are more than are counted.
    assert_eq!(image.bitmaps().unwrap()[0].dirty, None);
    let mut some = [Extent::default(); 100];
    assert!(image.dirty_extents(b"b", true, 0, 1 << 40, &mut some).unwrap() > 1);
    image.write_at(&[1; 10], 1 << 39, NONE).unwrap();
    assert!(memory() < before + (48 << 20), "{} bytes more", memory() - before);
    assert!(began.elapsed() < Duration::from_secs(30));
    image.close().unwrap();
    // One that is enabled could come to cost as much as it claims: not with a hostile image.
    poke(&path, directory + 12, &2u32.to_be_bytes());
    let untrusted = options(&[("format", "qcow2")]);
    let e = open_error(&path, &untrusted, RW | OpenFlags::UNTRUSTED);
    assert_eq!(e.kind(), ErrorKind::Policy, "{e}");
    for word in ["268435456", "67108864"] {
        assert!(e.to_string().contains(word), "{e}");
    }
    open_with(&path, &untrusted, OpenFlags::UNTRUSTED).close().unwrap();
}
