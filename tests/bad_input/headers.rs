//! Each wrong field of a header: the kind of error, and a text that names what was found and what
//! was expected.

use std::fs;
use std::path::PathBuf;

use super::common::*;
use qblk::OpenFlags;
use qblk::block::ErrorKind::{self, *};

struct Case {
    what: &'static str,
    /// Where, and the bytes.
    pokes: Vec<(u64, Vec<u8>)>,
    kind: ErrorKind,
    words: Vec<String>,
    /// It is wrong for a description, too: features that this build lacks are not.
    always: bool,
}

fn case(what: &'static str, pokes: &[(u64, &[u8])], kind: ErrorKind, words: &[&str]) -> Case {
    Case {
        what,
        pokes: pokes.iter().map(|(at, b)| (*at, b.to_vec())).collect(),
        kind,
        words: words.iter().map(|w| w.to_string()).collect(),
        always: kind != Unsupported || what.starts_with("version"),
    }
}

/// Extension bytes: magic, length as it is claimed, data.
fn extension(magic: u32, len: u32, data: &[u8]) -> Vec<u8> {
    let mut out = magic.to_be_bytes().to_vec();
    out.extend(len.to_be_bytes());
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

fn u32b(v: u32) -> Vec<u8> {
    v.to_be_bytes().to_vec()
}

fn u64b(v: u64) -> Vec<u8> {
    v.to_be_bytes().to_vec()
}

fn cases() -> Vec<Case> {
    let one32 =
        |what, at, value: u32, words: &[&str]| case(what, &[(at, &u32b(value))], Corrupt, words);
    let one64 =
        |what, at, value: u64, words: &[&str]| case(what, &[(at, &u64b(value))], Corrupt, words);
    vec![
        case("magic", &[(0, b"QFI\xfa")], Format, &["51, 46, 49, fa", "51, 46, 49, fb"]),
        case("version 0", &[(4, &u32b(0))], Unsupported, &["version 0", "2 and 3"]),
        case("version 1", &[(4, &u32b(1))], Unsupported, &["version 1", "2 and 3"]),
        case("version 4", &[(4, &u32b(4))], Unsupported, &["version 4", "2 and 3"]),
        one64("backing offset", 8, 65537, &["65537", "65536"]),
        one64("backing offset, huge", 8, u64::MAX, &["backing", "65536"]),
        case(
            "backing name length",
            &[(8, &u64b(1000)), (16, &u32b(1024))],
            Corrupt,
            &["1024", "1023"],
        ),
        case(
            "backing name past the cluster",
            &[(8, &u64b(65530)), (16, &u32b(7))],
            Corrupt,
            &["7", "6"],
        ),
        one32("cluster bits 8", 20, 8, &["8", "9 to 21"]),
        one32("cluster bits 22", 20, 22, &["22", "9 to 21"]),
        one32("cluster bits, huge", 20, u32::MAX, &["4294967295", "9 to 21"]),
        one64("size", 24, 1 << 63, &["9223372036854775808", "2^63"]),
        one64("size that L1 does not cover", 24, 1 << 40, &["found 1 ", "2048"]),
        one64("size, largest", 24, i64::MAX as u64, &["found 1 "]),
        case("encryption method", &[(32, &u32b(3))], Unsupported, &["encryption method 3"]),
        one32("L1 entries, none", 36, 0, &["found 0 ", "at least 1"]),
        one32("L1 entries, many", 36, (4 << 20) + 1, &["4194305", "4194304"]),
        one32("L1 entries, huge", 36, u32::MAX, &["4294967295", "4194304"]),
        one64(
            "L1 offset, unaligned",
            40,
            3 * 65536 + 512,
            &["0x30200", "multiple of the cluster size"],
        ),
        one64("L1 offset, none", 40, 0, &["0x0", "L1"]),
        one64("L1 offset, huge", 40, 0xffff_ffff_ffff_0000, &["0xffffffffffff0000"]),
        one64("refcount table, unaligned", 48, 65537, &["0x10001", "multiple of the cluster size"]),
        one64("refcount table, none", 48, 0, &["0x0", "refcount table"]),
        one64("refcount table, huge", 48, 0xffff_ffff_ffff_0000, &["0xffffffffffff0000"]),
        one32("refcount table, no clusters", 56, 0, &["found 0", "1 to 128"]),
        one32("refcount table, many clusters", 56, 129, &["found 129", "1 to 128"]),
        one32("refcount table, very many", 56, u32::MAX, &["4294967295", "128"]),
        one32("snapshots", 60, 65537, &["65537", "65536"]),
        case(
            "snapshot table, unaligned",
            &[(60, &u32b(1)), (64, &u64b(65537))],
            Corrupt,
            &["snapshot", "0x10001"],
        ),
        one32("refcount order", 96, 7, &["7", "at most 6"]),
        one32("refcount order, huge", 96, u32::MAX, &["4294967295", "at most 6"]),
        one32("header length, short", 100, 103, &["103", "104"]),
        one32("header length, odd", 100, 108, &["108", "multiple of 8"]),
        one32("header length, long", 100, 65544, &["65544", "65536"]),
        one32("header length, huge", 100, u32::MAX, &["4294967295"]),
        case("compression type without its bit", &[(104, &[1])], Corrupt, &["found 1", "clear"]),
        case("its bit without compression type", &[(72, &u64b(8))], Corrupt, &["found 0", "set"]),
        case(
            "compression type 2",
            &[(72, &u64b(8)), (104, &[2])],
            Unsupported,
            &["compression type 2"],
        ),
        case("unknown features", &[(72, &u64b(1 << 50 | 1 << 63))], Unsupported, &["50", "63"]),
        case(
            "extension past the cluster",
            &[(112, &extension(0x1234, 65536, &[]))],
            Corrupt,
            &["0x00001234", "65536", "65416"],
        ),
        case(
            "extension, huge",
            &[(112, &extension(0x1234, u32::MAX, &[]))],
            Corrupt,
            &["4294967295"],
        ),
        case(
            "extension into the backing name",
            &[(8, &u64b(136)), (16, &u32b(4)), (112, &extension(0x1234, 17, &[0; 17]))],
            Corrupt,
            &["17", "16"],
        ),
        case(
            "LUKS header without LUKS",
            &[(112, &extension(0x0537_be77, 16, &[0; 16]))],
            Corrupt,
            &["LUKS"],
        ),
        case(
            "subclusters in small clusters",
            &[(20, &u32b(12)), (72, &u64b(16))],
            Corrupt,
            &["12", "at least 14"],
        ),
    ]
}

fn sound(dir: &Tmp) -> PathBuf {
    let path = dir.join("sound");
    create(&path, "qcow2", 1 << 20, &[]);
    path
}

#[test]
fn each_wrong_field_is_named_with_what_was_found_and_expected() {
    let dir = Tmp::in_memory("headers");
    let sound = sound(&dir);
    let path = dir.join("patched");
    let mut wrong = Vec::new();
    for c in cases() {
        fs::copy(&sound, &path).unwrap();
        for (at, bytes) in &c.pokes {
            poke(&path, *at, bytes);
        }
        let before = fs::read(&path).unwrap();
        let mut all = vec![RO, RW];
        if c.always {
            all.push(OpenFlags::INFO_ONLY);
        }
        for flags in all {
            match qblk::Image::open(path.as_os_str(), &options(&[("format", "qcow2")]), flags) {
                Ok(_) => wrong.push(format!("{}: opened ({flags:?})", c.what)),
                Err(e) => {
                    let text = e.to_string();
                    if e.kind() != c.kind {
                        wrong.push(format!("{}: {:?}, not {:?}: {text}", c.what, e.kind(), c.kind));
                    }
                    for word in c.words.iter().map(String::as_str).chain(["patched"]) {
                        if !text.contains(word) {
                            wrong.push(format!("{}: {word:?} is not in: {text}", c.what));
                        }
                    }
                }
            }
        }
        assert!(fs::read(&path).unwrap() == before, "{}: the file was changed", c.what);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn tables_past_the_end_of_the_file_are_reported_at_open() {
    let dir = Tmp::in_memory("past-end");
    let sound = sound(&dir);
    let path = dir.join("patched");
    for (at, what) in [(40, "L1 table"), (48, "refcount table")] {
        fs::copy(&sound, &path).unwrap();
        poke(&path, at, &(1u64 << 40).to_be_bytes());
        let e = open_error(&path, &qblk::Options::new(), RW);
        assert_eq!(e.kind(), Corrupt, "{e}");
        assert!(e.to_string().contains(what) && e.to_string().contains("0x100000"), "{e}");
    }
}

#[test]
fn a_version_2_header_has_no_version_3_fields() {
    // Whatever stands behind byte 72 of a version 2 header is an extension, not a feature.
    let dir = Tmp::in_memory("version-2");
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, &[("compat", "0.10")]);
    let mut bytes = extension(0xffff_ffff, 16, &[0xff; 16]);
    bytes.extend(extension(0, 0, &[]));
    poke(&path, 72, &bytes);
    check_clean(&path);
    let image = open(&path, RW);
    image.write_at(&[1; 1000], 0, NONE).unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(peek(&path, 72, bytes.len()), bytes);
}

#[test]
fn a_header_of_104_bytes_has_its_extensions() {
    // Another implementation reads extensions only behind longer headers, and so loses the backing
    // image's format.
    let dir = Tmp::in_memory("short-header");
    let path = dir.join("image");
    create(&dir.join("inner"), "qcow2", 1 << 20, &[]);
    create(&path, "qcow2", 1 << 20, &[("backing-file", "inner"), ("backing-fmt", "raw")]);
    let head = peek(&path, 0, 4096);
    let name_at = u64::from_be_bytes(head[8..16].try_into().unwrap()) as usize;
    poke(&path, 104, &head[112..name_at]);
    poke(&path, name_at as u64 - 8, &[0; 8]);
    poke(&path, 100, &104u32.to_be_bytes());
    let image = open(&path, RO);
    assert_eq!(image.property("backing-format").unwrap().unwrap(), b"raw");
    assert_eq!(read_range(&image, 0, 4), b"QFI\xfb");
}

#[test]
fn hostile_names_and_feature_names_are_shown_escaped_and_short() {
    let dir = Tmp::in_memory("escape");
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, &[]);
    let mut names = vec![0u8, 40];
    names.extend([0x1b; 46]);
    let mut bytes = extension(0x6803_f857, 48, &names);
    bytes.extend(extension(0, 0, &[]));
    poke(&path, 112, &bytes);
    poke(&path, 72, &(1u64 << 40).to_be_bytes());
    let e = open_error(&path, &qblk::Options::new(), RO);
    assert_eq!(e.kind(), Unsupported, "{e}");
    assert!(!e.to_string().contains('\u{1b}'), "{e:?}");
    // Every byte of a header, at random: never a panic, never more than a moment.
    let sound = fs::read(dir.join("image")).unwrap();
    let mut rng = Rng::new(10);
    for _ in 0..3000 {
        let mut bytes = sound.clone();
        bytes[72..80].fill(0);
        for _ in 0..rng.range(1, 6) {
            let at = rng.below(200) as usize;
            bytes[at] = rng.next() as u8;
        }
        fs::write(&path, &bytes).unwrap();
        let flags = rng.pick(&[RO, RW, OpenFlags::INFO_ONLY]) | OpenFlags::NO_BACKING;
        if let Ok(image) = try_open(&path, flags) {
            let n = image.size().unwrap().min(1 << 16);
            let _ = image.read_at(&mut vec![0; n as usize], 0);
            let _ = image.info();
        }
    }
}
