//! Guards: a table that points where it must not is found before anything is written there, the image
//! is marked, and nothing is written any more.

use std::fs;
use std::path::{Path, PathBuf};

use super::common::*;
use qblk::block::ErrorKind;
use qblk::{Image, Options, ReqFlags};

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An image with two snapshots and a bitmap's worth of everything, and where its parts lie.
fn image(dir: &Tmp) -> (PathBuf, Vec<(&'static str, u64)>) {
    let path = dir.join("image");
    qemu_img!("create", "-q", "-f", "qcow2", path, "2G");
    qemu_io(&path, "qcow2", &["write -P 1 0 256k", "write -P 2 1G 64k"]);
    qemu_img!("snapshot", "-c", "one", path);
    qemu_io(&path, "qcow2", &["write -P 3 0 256k", "write -P 4 1G 64k"]);
    let l1 = peek_u64(&path, 40);
    let reftable = peek_u64(&path, 48);
    let snapshots = peek_u64(&path, 64);
    let parts = vec![
        ("the header", 0),
        ("the L1 table", l1),
        // Of another part of the disk.
        ("an L2 table", peek_u64(&path, l1 + 8 * 2) & OFFSET),
        ("the refcount table", reftable),
        ("a refcount block", peek_u64(&path, reftable)),
        ("the snapshot table", snapshots),
        ("a snapshot's L1 table", peek_u64(&path, snapshots)),
    ];
    assert!(parts[1..].iter().all(|p| p.1 != 0), "{parts:?}");
    (path, parts)
}

/// The file is as it was but for the mark, and the handle says why.
fn refused(path: &Path, before: &[u8], image: Image, result: qblk::Result<()>, words: &[&str]) {
    let e = result.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    for word in words {
        assert!(e.to_string().contains(word), "{word:?} not in: {e}");
    }
    let e = image.write_at(&[1; 1], 128 << 10, NONE).unwrap_err();
    assert!(e.to_string().contains("refuses writes"), "{e}");
    assert!(image.flush().is_err());
    // What is elsewhere can be read.
    assert_eq!(read_range(&image, 128 << 10, 10), [3; 10]);
    assert!(image.close().is_err());
    let mut after = fs::read(path).unwrap();
    assert_eq!(after[79], 2, "the mark");
    after[79] = before[79];
    assert_same(&after[..before.len()], before, 0, "the file");
}

#[test]
fn data_is_not_written_over_metadata() {
    let dir = Tmp::in_memory("guards");
    let (made, parts) = image(&dir);
    let path = dir.join("copy");
    for (what, at) in parts {
        // The entry of the first cluster: there, and ours alone.
        let l2 = peek_u64(&made, peek_u64(&made, 40)) & OFFSET;
        if at == 0 {
            continue; // an entry of 0 is none
        }
        type Touch = fn(&Image) -> qblk::Result<()>;
        let touches: [(&str, Touch); 3] = [
            ("write", |i| i.write_at(&[9; 100], 50, NONE)),
            ("whole", |i| i.write_at(&[9; 2 * CLUSTER as usize], 0, NONE)),
            ("part", |i| i.zero(10, 100, NONE)),
        ];
        for (how, touch) in touches {
            fs::copy(&made, &path).unwrap();
            poke(&path, l2, &(at | COPIED).to_be_bytes());
            let before = fs::read(&path).unwrap();
            let image = open(&path, RW);
            let result = touch(&image);
            refused(&path, &before, image, result, &["data is to be written", what]);
            println!("{how} over {what}: refused");
        }
    }
}

#[test]
fn metadata_is_not_freed_as_data() {
    let dir = Tmp::in_memory("guards-free");
    let (made, parts) = image(&dir);
    let path = dir.join("copy");
    let l2 = peek_u64(&made, peek_u64(&made, 40)) & OFFSET;
    for (what, at) in parts.into_iter().filter(|p| p.1 != 0) {
        fs::copy(&made, &path).unwrap();
        poke(&path, l2, &(at | COPIED).to_be_bytes());
        let before = fs::read(&path).unwrap();
        let image = open(&path, RW);
        let _ = image.trim(0, CLUSTER, NONE);
        for _ in 0..3 {
            let _ = image.flush();
        }
        assert!(image.close().is_err(), "{what}");
        let after = fs::read(&path).unwrap();
        assert_eq!(after[79] & 2, 2, "the mark: {what}");
        let part = at as usize..(at + CLUSTER) as usize;
        let same = after[part.clone()] == before[part];
        // (The L1 table and refcounts may have changed on the way, but are not gone.)
        assert!(same || what.contains("refcount"), "{what} is gone");
    }
}

#[test]
fn tables_are_not_written_over_other_tables() {
    let dir = Tmp::in_memory("guards-tables");
    let (made, parts) = image(&dir);
    let path = dir.join("copy");
    let l1 = peek_u64(&made, 40);
    for (what, at) in parts.into_iter().filter(|p| p.1 != 0) {
        fs::copy(&made, &path).unwrap();
        // The L2 table of the second half gigabyte, which has none, is said to be there.
        poke(&path, l1 + 8, &(at | COPIED).to_be_bytes());
        let before = fs::read(&path).unwrap();
        let image = open(&path, RW);
        // What is there may not look like entries at all, which is found first.
        let result = image.write_at(&[9; 100], 768 << 20, NONE).and_then(|()| image.flush());
        let e = result.expect_err(what);
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        drop(image);
        let after = fs::read(&path).unwrap();
        assert_eq!(after[79] & 2, 2, "the mark: {what}");
        let part = at as usize..(at + CLUSTER) as usize;
        assert_same(&after[part.clone()], &before[part], at, what);
    }
}

#[test]
fn a_cluster_that_is_in_use_is_not_handed_out_whatever_its_refcount_says() {
    let dir = Tmp::in_memory("guards-free-counts");
    let (made, parts) = image(&dir);
    let path = dir.join("copy");
    for (what, at) in parts {
        fs::copy(&made, &path).unwrap();
        let block = peek_u64(&path, peek_u64(&path, 48));
        poke(&path, block + 2 * (at / CLUSTER), &[0, 0]);
        let before = fs::read(&path).unwrap();
        let image = open(&path, RW);
        let result = image
            .write_at(&[9; 100], 512 << 10, NONE)
            .and_then(|()| image.zero(1 << 20, 1 << 20, ReqFlags::NONE))
            .and_then(|()| image.write_at(&vec![8; 1 << 20], 8 << 20, NONE));
        // (The header's is never looked at.)
        if at == 0 && result.is_ok() {
            image.close().unwrap();
            continue;
        }
        let e = result.expect_err(what);
        assert!(e.to_string().contains("refcount is 0"), "{what}: {e}");
        drop(image);
        let after = fs::read(&path).unwrap();
        let part = at as usize..(at + CLUSTER) as usize;
        if at != 0 {
            assert_same(&after[part.clone()], &before[part], at, what);
        }
    }
}

/// Only what was found while a single cluster was taken marked the image.
#[test]
fn what_is_found_while_tables_grow_or_are_rebuilt_marks_the_image_too() {
    let dir = Tmp::in_memory("guards-grow");
    let (made, parts) = image(&dir);
    let path = dir.join("copy");
    type Touch = fn(&Image) -> qblk::Result<()>;
    let touches: [(&str, Touch); 2] = [
        ("resize", |i| i.resize(16 << 40, &Options::new(), false)),
        ("snapshot", |i| i.snapshot_create(b"more", &Options::new())),
    ];
    for (how, touch) in touches {
        for &(what, at) in parts.iter().filter(|p| p.1 != 0) {
            fs::copy(&made, &path).unwrap();
            let block = peek_u64(&path, peek_u64(&path, 48));
            poke(&path, block + 2 * (at / CLUSTER), &[0, 0]);
            let before = fs::read(&path).unwrap();
            let image = open(&path, RW);
            let e = touch(&image).expect_err(what);
            assert_eq!(e.kind(), ErrorKind::Corrupt, "{how}, {what}: {e}");
            let e = image.write_at(&[1; 1], 128 << 10, NONE).unwrap_err();
            assert!(e.to_string().contains("refuses writes"), "{how}, {what}: {e}");
            assert!(image.close().is_err());
            let after = fs::read(&path).unwrap();
            assert_eq!(after[79] & 2, 2, "{how}, {what}: the mark");
            let part = at as usize..(at + CLUSTER) as usize;
            assert_same(&after[part.clone()], &before[part], at, what);
        }
    }
}

/// Clusters beside the one that was found to be a table were given back to the host.
#[test]
fn nothing_is_given_back_once_the_image_is_found_to_be_corrupt() {
    let dir = Tmp::in_memory("guards-give-back");
    let (path, _) = image(&dir);
    let l2 = peek_u64(&path, peek_u64(&path, 40)) & OFFSET;
    let next = peek_u64(&path, l2 + 8) & OFFSET;
    poke(&path, l2, &(peek_u64(&path, 48) | COPIED).to_be_bytes());
    let image = open(&path, RW);
    image.trim(0, 2 * CLUSTER, NONE).unwrap();
    let _ = image.flush();
    assert!(image.close().is_err());
    assert_eq!(peek(&path, next, CLUSTER as usize), vec![3; CLUSTER as usize]);
}

/// Flags were mended wherever the header said that the L1 table was.
#[test]
fn a_repair_mends_no_flags_where_other_metadata_is() {
    let dir = Tmp::in_memory("guards-l1");
    let path = dir.join("image");
    qemu_img!("create", "-q", "-f", "qcow2", path, "1M");
    // A name that looks like L1 entries with a flag.
    qemu_img!("snapshot", "-c", "\u{e9}".repeat(40), path);
    let table = peek_u64(&path, 64);
    let before = peek(&path, table, 144);
    assert!(before[72..].iter().step_by(8).any(|b| b & 0x80 != 0), "{before:02x?}");
    poke(&path, 40, &table.to_be_bytes());
    poke(&path, 36, &18u32.to_be_bytes());
    let found = super::judge::ours(&path, qblk::block::Repair::All).unwrap();
    assert!(found.corruptions > 0 && found.check_errors > 0, "{found:?}");
    assert_same(&peek(&path, table, 144), &before, table, "the snapshot table");
}

/// What a buffer had from before was taken for the rest of an entry that the file has in part.
#[test]
fn a_repair_makes_up_no_entry_where_the_file_ends() {
    let dir = Tmp::in_memory("guards-end");
    let path = dir.join("image");
    qemu_img!("create", "-q", "-f", "qcow2", path, format!("{}", 8193u64 << 29));
    let (l1, entries) = (peek_u64(&path, 40), peek_u32(&path, 36));
    assert!(entries == 8193, "{entries} entries");
    // They all name the table itself, and say that nothing else does.
    let bytes: Vec<u8> = (0..8193).flat_map(|_| (l1 | COPIED).to_be_bytes()).collect();
    poke(&path, l1, &bytes);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(l1 + 8 * 8192 + 4).unwrap();
    let found = super::judge::ours(&path, qblk::block::Repair::All).unwrap();
    assert!(found.corruptions_fixed > 8192, "{found:?}");
    assert_eq!(file.metadata().unwrap().len(), l1 + 8 * 8192 + 4);
}

/// An entry of the snapshot table claimed 16 MiB of extra data: that was not counted, since it reaches past
/// the end, and then was to be freed.
#[test]
fn a_snapshot_table_that_reaches_past_the_end_is_mended_without_freeing_what_is_there() {
    let dir = Tmp::in_memory("guards-long-table");
    let (path, _) = image(&dir);
    let active = read_range(&open(&path, RO), 0, 2 << 20);
    poke(&path, peek_u64(&path, 64) + 36, &[1]);
    let found = super::judge::ours(&path, qblk::block::Repair::All).unwrap();
    assert!(found.changed && found.check_errors == 0, "{found:?}");
    let again = super::judge::ours(&path, qblk::block::Repair::Nothing).unwrap();
    assert_eq!((again.corruptions, again.leaks), (0, 0), "{again:?}");
    assert_eq!(read_range(&open(&path, RO), 0, 2 << 20), active);
}
