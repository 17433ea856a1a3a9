//! Images that are made to make a check take for ever, or all memory.

use std::path::Path;
use std::time::{Duration, Instant};

use super::common::*;
use super::judge::ours;
use qblk::block::Repair;

const COPIED: u64 = 1 << 63;

/// Peak memory of this process, bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Nothing of it may take long, or much.
fn soon(path: &Path, what: &str) {
    for repair in [Repair::Nothing, Repair::Leaks, Repair::All] {
        let (begin, before) = (Instant::now(), peak());
        let found = ours(path, repair);
        let (took, memory) = (begin.elapsed(), peak().saturating_sub(before));
        println!("{what}, {repair:?}: {took:?}, {} KiB more: {found:?}", memory >> 10);
        assert!(took < Duration::from_secs(60), "{what}: {took:?}");
        assert!(memory < 160 << 20, "{what}: {memory} bytes");
    }
}

/// An image of 512-byte clusters with an L1 table of so many entries, at 1 MiB.
fn with_l1(path: &Path, entries: u32, entry: impl Fn(u64) -> u64) {
    create(path, "qcow2", 1 << 20, &[("cluster-size", "512")]);
    let bytes: Vec<u8> = (0..u64::from(entries)).flat_map(|i| entry(i).to_be_bytes()).collect();
    poke(path, 1 << 20, &bytes);
    poke(path, 36, &entries.to_be_bytes());
    poke(path, 40, &(1u64 << 20).to_be_bytes());
}

#[test]
fn tables_that_are_named_a_million_times_take_no_longer() {
    let dir = Tmp::in_memory("hostile");
    let path = dir.join("image");
    // The same L2 table over and over; the L1 table itself; tables that lie half over one another.
    with_l1(&path, 1 << 18, |_| 0x4000 | COPIED);
    soon(&path, "one L2 table");
    with_l1(&path, 1 << 18, |i| ((1 << 20) + i / 64 * 512) | COPIED);
    soon(&path, "the L1 table as L2 tables");

    create(&path, "qcow2", 1 << 40, &[("cluster-size", "2M")]);
    let l1 = peek_u64(&path, 40);
    let bytes: Vec<u8> =
        (0..65536u64).flat_map(|i| ((l1 + i * 512) | COPIED).to_be_bytes()).collect();
    poke(&path, l1, &bytes);
    poke(&path, 36, &65536u32.to_be_bytes());
    soon(&path, "L2 tables askew");
}

#[test]
fn snapshots_that_share_their_tables_take_no_longer() {
    let dir = Tmp::in_memory("hostile-snapshots");
    let path = dir.join("image");
    // 65536 snapshots with L1 tables of 32 MiB, all over one another.
    with_l1(&path, 32, |i| if i == 0 { 0x4000 | COPIED } else { 0 });
    let mut table = Vec::new();
    for i in 0..65536u64 {
        table.extend(((8 << 20) + i % 1024 * 512).to_be_bytes());
        table.extend((4u32 << 20).to_be_bytes());
        table.extend([0; 24]);
        table.extend(16u32.to_be_bytes());
        table.extend([0; 16]);
    }
    poke(&path, 64 << 20, &table);
    poke(&path, 60, &65536u32.to_be_bytes());
    poke(&path, 64, &(64u64 << 20).to_be_bytes());
    let entry = |i: u64| (0x8000 + i * 512).to_be_bytes();
    poke(&path, 8 << 20, &(0..(1 << 16)).flat_map(entry).collect::<Vec<u8>>());
    soon(&path, "snapshots");
}

/// Each table was gone through by itself, for each entry of the directory that named it.
#[test]
fn bitmaps_that_share_a_table_take_no_longer() {
    let dir = Tmp::in_memory("hostile-bitmaps");
    let path = dir.join("image");
    with_l1(&path, 32, |i| if i == 0 { 0x4000 | COPIED } else { 0 });
    // A table of 8 MiB, which 65535 bitmaps have.
    let mut directory = Vec::new();
    for i in 0..65535u64 {
        directory.extend((8u64 << 20).to_be_bytes());
        directory.extend((1u32 << 20).to_be_bytes());
        directory.extend([0, 0, 0, 0, 1, 16, 0, 8, 0, 0, 0, 0]);
        directory.extend(i.to_be_bytes());
    }
    poke(&path, 16 << 20, &directory);
    poke(&path, 88, &1u64.to_be_bytes());
    let mut extension = Vec::new();
    extension.extend(0x2385_2875u32.to_be_bytes());
    extension.extend(24u32.to_be_bytes());
    extension.extend(65535u32.to_be_bytes());
    extension.extend([0; 4]);
    extension.extend((directory.len() as u64).to_be_bytes());
    extension.extend((16u64 << 20).to_be_bytes());
    extension.extend([0; 8]);
    poke(&path, peek_u32(&path, 100).into(), &extension);
    assert_eq!(ours(&path, Repair::Nothing).unwrap().check_errors, 0, "its bitmaps are looked at");
    soon(&path, "bitmaps");
    // At the end of all offsets.
    let entry: Vec<u8> = (0..65535u64)
        .flat_map(|i| {
            let mut entry = directory[(i * 32) as usize..][..32].to_vec();
            entry[..8].copy_from_slice(&(u64::MAX << 9).to_be_bytes());
            entry
        })
        .collect();
    poke(&path, 16 << 20, &entry);
    soon(&path, "bitmaps far out");
}

/// What is named past the end was kept one by one, for 48 bytes each.
#[test]
fn a_file_that_was_cut_off_takes_what_is_left_of_it() {
    let dir = Tmp::in_memory("hostile-cut");
    let path = dir.join("image");
    const MB: u64 = 1 << 20;
    for (what, tables, host) in [
        ("all that followed", 16, (|i| (1 << 40) + i * 2 * MB) as fn(u64) -> u64),
        ("the same again and again", 16, |i| (1 << 40) + i % 3 * 2 * MB),
        ("each apart from the others", 4, |i| (1 << 54) + i * 4 * MB),
    ] {
        create(&path, "qcow2", tables << 39, &[("cluster-size", "2M")]);
        let l1 = peek_u64(&path, 40);
        for table in 0..tables {
            let at = (32 + 2 * table) * MB;
            poke(&path, l1 + 8 * table, &(at | COPIED).to_be_bytes());
            let entry = |i: u64| (host(table << 18 | i) | COPIED).to_be_bytes();
            poke(&path, at, &(0..1 << 18).flat_map(entry).collect::<Vec<u8>>());
        }
        soon(&path, what);
        let found = ours(&path, Repair::Nothing).unwrap();
        assert!(found.corruptions >= tables << 18, "{found:?}");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_file_that_says_to_be_huge_takes_what_it_has() {
    let dir = Tmp::in_memory("hostile-huge");
    let path = dir.join("image");
    with_l1(&path, 1 << 14, |i| (i << 39) | COPIED);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    if file.set_len(1 << 54).is_ok() {
        soon(&path, "a huge file");
    }
    // One block for all.
    let entries: Vec<u8> = (0..1u64 << 15).flat_map(|_| 0x400u64.to_be_bytes()).collect();
    poke(&path, 4 << 20, &entries);
    poke(&path, 48, &(4u64 << 20).to_be_bytes());
    poke(&path, 56, &512u32.to_be_bytes());
    soon(&path, "one refcount block");
}
