//! What of a header must be kept, and what must be cleared.

use std::path::{Path, PathBuf};

use super::common::*;
use qblk::{Image, OpenFlags, Options};

const AUTOCLEAR: u64 = 88;
const COMPATIBLE: u64 = 80;

/// A header with features and extensions of the future: unknown compatible bits, unknown header
/// fields behind those that are known, unknown extensions, and a backing file.
fn future_image(dir: &Tmp, autoclear: u64) -> PathBuf {
    let path = dir.join("image");
    std::fs::write(dir.join("base"), [0x42; 200_000]).unwrap();
    let args = "compat=1.1,cluster_size=4096,backing_file=base,backing_fmt=raw";
    qemu_img!("create", "-q", "-f", "qcow2", "-o", args, path, "1M");
    let mut head = peek(&path, 0, 4096);
    head[80..88].copy_from_slice(&0x8000_0000_0000_7f10u64.to_be_bytes());
    head[88..96].copy_from_slice(&autoclear.to_be_bytes());
    // Header length 144: 32 bytes that this version has no names for.
    head[100..104].copy_from_slice(&144u32.to_be_bytes());
    head[112..144].copy_from_slice(&[0xd7; 32]);
    let mut at = 144;
    for (magic, data) in [
        (0x1234_5678u32, &b"an odd length"[..]),
        (0xe279_2aca, b"raw"),
        (0xdead_beef, &[]),
        (0x0bad_cafe, &[0xfe; 100]),
        (0, &[]),
    ] {
        head[at..at + 4].copy_from_slice(&magic.to_be_bytes());
        head[at + 4..at + 8].copy_from_slice(&(data.len() as u32).to_be_bytes());
        head[at + 8..at + 8 + data.len()].copy_from_slice(data);
        at = (at + 8 + data.len()).next_multiple_of(8);
    }
    head[8..16].copy_from_slice(&(at as u64).to_be_bytes());
    head[16..20].copy_from_slice(&4u32.to_be_bytes());
    head[at..at + 4].copy_from_slice(b"base");
    // Beyond it lies what only the future knows, too.
    head[at + 4..].fill(0x99);
    poke(&path, 0, &head);
    check_clean(&path);
    path
}

/// The header cluster without the fields that a writer must change.
fn kept(path: &Path) -> Vec<u8> {
    let mut head = peek(path, 0, 4096);
    for (at, len) in [(24, 8), (36, 4), (40, 8), (48, 8), (56, 4)] {
        head[at..at + len].fill(0);
    }
    head
}

fn write_and_resize(image: Image) {
    image.write_at(&[1; 100_000], 50_000, NONE).unwrap();
    // Far enough that L1 and refcount tables move.
    image.resize(20 << 30, &Options::new(), false).unwrap();
    image.write_at(&[2; 5000], (20 << 30) - 5000, NONE).unwrap();
    image.zero(0, 10_000, NONE).unwrap();
    image.flush().unwrap();
    image.resize(1 << 30, &Options::new(), true).unwrap();
    image.close().unwrap();
}

#[test]
fn what_is_unknown_but_compatible_is_kept_byte_for_byte() {
    let dir = Tmp::in_memory("future");
    let path = future_image(&dir, 0);
    let before = kept(&path);
    write_and_resize(open(&path, RW));
    assert_same(&kept(&path), &before, 0, "header after writes and resizes");
    assert_eq!(peek_u64(&path, COMPATIBLE), 0x8000_0000_0000_7f10);
    check_clean(&path);
    let image = open(&path, RO);
    assert_eq!(read_range(&image, 10_000, 10), [0x42; 10], "the backing file is still there");
    assert_eq!(read_range(&image, 50_000, 10), [1; 10]);
}

#[test]
fn unknown_autoclear_bits_are_cleared_by_the_first_writable_open_only() {
    let dir = Tmp::in_memory("autoclear");
    let bits = 0xffff_0000_0000_00f0;
    let path = future_image(&dir, bits);
    let file = std::fs::read(&path).unwrap();
    for flags in [RO, OpenFlags::INFO_ONLY, RW | OpenFlags::INFO_ONLY, OpenFlags::NO_BACKING] {
        let image = open(&path, flags);
        if !flags.has(OpenFlags::INFO_ONLY) {
            read_all(&image);
        }
        image.close().unwrap();
        assert!(std::fs::read(&path).unwrap() == file, "{flags:?} changed the file");
    }
    let image = open(&path, RW);
    assert_eq!(peek_u64(&path, AUTOCLEAR), 0, "before anything can be written");
    image.close().unwrap();
    let mut expected = file;
    expected[88..96].fill(0);
    assert_same(&std::fs::read(&path).unwrap()[..4096], &expected[..4096], 0, "only those");
    check_clean(&path);
}

#[test]
fn a_read_only_open_never_changes_the_file() {
    let dir = Tmp::in_memory("read-only");
    let path = dir.join("image");
    create(&path, "qcow2", 10 << 20, &[("lazy-refcounts", "on")]);
    qemu_io(&path, "qcow2", &["write -P 1 0 1M", "write -c -P 2 2M 64k", "write -z 3M 64k"]);
    let before = std::fs::read(&path).unwrap();
    let image = open(&path, RO);
    read_all(&image);
    all_extents(&image, 0, 10 << 20, 3);
    image.cache(0, 10 << 20).unwrap();
    for e in [
        image.write_at(&[1], 0, NONE),
        image.zero(0, 1, NONE),
        image.trim(0, 1, NONE),
        image.resize(1, &Options::new(), true),
    ] {
        assert_eq!(e.unwrap_err().kind(), qblk::block::ErrorKind::Errno(libc::EROFS));
    }
    image.flush().unwrap();
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn what_is_created_is_described_alike_by_qemu() {
    let dir = Tmp::in_memory("describe");
    std::fs::write(dir.join("base"), [1; 1000]).unwrap();
    let path = dir.join("image");
    create(
        &path,
        "qcow2",
        10 << 20,
        &[
            ("backing-file", "base"),
            ("backing-fmt", "raw"),
            ("cluster-size", "128k"),
            ("refcount-bits", "8"),
            ("lazy-refcounts", "on"),
            ("compression-type", "zstd"),
        ],
    );
    let told = qemu_img!("info", "-f", "qcow2", "--output=json", path);
    for part in [
        "\"virtual-size\": 10485760",
        "\"cluster-size\": 131072",
        "\"backing-filename-format\": \"raw\"",
        "\"backing-filename\": \"base\"",
        "\"compat\": \"1.1\"",
        "\"compression-type\": \"zstd\"",
        "\"lazy-refcounts\": true",
        "\"refcount-bits\": 8",
        "\"corrupt\": false",
        "\"extended-l2\": false",
    ] {
        assert!(told.contains(part), "{part} is not in {told}");
    }
    // Lazily or not, after closing nothing is left to repair.
    let image = open(&path, RW);
    image.write_at(&[7; 300_000], 100_000, NONE).unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(peek_u64(&path, 72) & 1, 0, "the dirty bit");
    for value in ["qcow2.lazy-refcounts=on", "qcow2.compression-type=zstd", "backing-format=raw"] {
        let (key, value) = value.split_once('=').unwrap();
        let found = open(&path, RO).property(key).unwrap().unwrap();
        assert_eq!(String::from_utf8(found).unwrap(), value, "{key}");
    }
    // An unknown feature is called by the name that the image has for it.
    let path = dir.join("large");
    create(&path, "qcow2", 10 << 20, &[]);
    let names = peek(&path, 0, 4096);
    let place = names.windows(19).position(|w| w == b"extended L2 entries").unwrap() as u64;
    poke(&path, place - 1, b"\x2afrobnication\0\0\0\0\0\0\0");
    poke(&path, 72, &(1u64 << 42).to_be_bytes());
    let e = open_error(&path, &Options::new(), RO);
    assert_eq!(e.kind(), qblk::block::ErrorKind::Unsupported);
    assert!(e.to_string().contains("frobnication"), "{e}");
}
