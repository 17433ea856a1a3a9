//! Guards: a table that points where it must not is found before anything is written there, the image
//! is marked, and nothing is written any more.

use std::fs;
use std::path::{Path, PathBuf};

use super::common::*;
use qblk::block::ErrorKind;
use qblk::{Image, ReqFlags};

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
