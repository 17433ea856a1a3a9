//! Headers that lie: each limit with its error, and what opening such a file may cost.

use std::fs;
use std::time::{Duration, Instant};

use qblk::block::ErrorKind::{self, *};

use super::*;

fn slot(i: u64, field: u64) -> u64 {
    208 + 48 * i + field
}

/// Where, what, and the answer with words that its text must have.
type Case<'a> = (u64, &'a [u8], ErrorKind, &'a [&'a str]);

fn patched(path: &Path, from: &[u8], at: u64, bytes: &[u8]) {
    let mut image = from.to_vec();
    image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    fs::write(path, image).unwrap();
}

#[test]
fn each_wrong_field_of_a_header_is_named_with_what_was_expected() {
    let dir = Tmp::in_memory("hostile");
    let (good, path) = (dir.join("good"), dir.join("bad"));
    create(&good, "luks", 64 << 10, &[("key", KEY), ("iter-time", "1")]);
    let image = fs::read(&good).unwrap();
    let long = [b'a'; 32];
    let one = 1u32.to_be_bytes();
    let cases: &[Case] = &[
        (0, b"LUKX", Format, &["not in LUKS format", "[4c, 55, 4b, 58", "expected [4c"]),
        (6, &[0, 2], Unsupported, &["LUKS version 2 (1 is)"]),
        (6, &[0, 0], Unsupported, &["LUKS version 0 (1 is)"]),
        (8, &long, Corrupt, &["cipher name at offset 8", "a text that ends"]),
        (8, b"\n\0", Corrupt, &["cipher name at offset 8", "'\\n"]),
        (8, b"des\0", Unsupported, &["encryption with cipher 'des'"]),
        (40, &long, Corrupt, &["cipher mode at offset 40"]),
        (40, b"lrw-benbi\0\0", Unsupported, &["cipher 'aes-lrw-benbi'"]),
        (40, b"xts-plain65", Unsupported, &["cipher 'aes-xts-plain65'"]),
        (40, b"cbc-plain64", Corrupt, &["aes-cbc-plain64 has no keys of 64 bytes"]),
        (72, b"whirlpool\0", Unsupported, &["hash 'whirlpool'"]),
        (72, &long, Corrupt, &["hash at offset 72"]),
        (104, &0u32.to_be_bytes(), Unsupported, &["header that lies apart"]),
        (104, &one, Corrupt, &["payload offset at offset 104: found 512 bytes", "at least 592"]),
        (104, &8u32.to_be_bytes(), Corrupt, &["key material of key slot 0", "592 and 4096"]),
        (104, &u32::MAX.to_be_bytes(), Corrupt, &["past the end of the file", "cut off"]),
        (108, &0u32.to_be_bytes(), Corrupt, &["key bytes at offset 108: found 0", "1 to 64"]),
        (108, &65u32.to_be_bytes(), Corrupt, &["key bytes at offset 108: found 65", "1 to 64"]),
        (108, &u32::MAX.to_be_bytes(), Corrupt, &["found 4294967295", "1 to 64"]),
        (108, &33u32.to_be_bytes(), Corrupt, &["no keys of 33 bytes"]),
        (164, &0u32.to_be_bytes(), Corrupt, &["digest iterations at offset 164: found 0"]),
        (164, &u32::MAX.to_be_bytes(), Policy, &["rounds of sha256", "536870912"]),
        (slot(0, 0), &one, Corrupt, &["state of key slot 0 at offset 208: found 0x00000001"]),
        (slot(7, 0), &one, Corrupt, &["state of key slot 7 at offset 544"]),
        (slot(0, 4), &0u32.to_be_bytes(), Corrupt, &["iterations of key slot 0 at offset 212"]),
        (slot(0, 4), &u32::MAX.to_be_bytes(), Policy, &["rounds of sha256", "536870912"]),
        (
            slot(0, 40),
            &0u32.to_be_bytes(),
            Corrupt,
            &["key material of key slot 0 at offset 248", "at 0"],
        ),
        (slot(0, 40), &one, Corrupt, &["at 512", "between 592"]),
        (slot(0, 40), &u32::MAX.to_be_bytes(), Corrupt, &["at 2199023255040"]),
        (
            slot(0, 44),
            &0u32.to_be_bytes(),
            Corrupt,
            &["stripes of key slot 0 at offset 252: found 0"],
        ),
        (slot(0, 44), &4001u32.to_be_bytes(), Corrupt, &["found 4001", "1 to 4000"]),
        (slot(0, 44), &u32::MAX.to_be_bytes(), Corrupt, &["found 4294967295", "1 to 4000"]),
        // Believable, and wrong: it is not the key then.
        (112, b"digest", BadKey, &["none of its key slots"]),
        (132, b"salt", BadKey, &["none of its key slots"]),
        (slot(0, 8), b"salt", BadKey, &["none of its key slots"]),
        (slot(0, 44), &3999u32.to_be_bytes(), BadKey, &["none of its key slots"]),
        (slot(0, 0), &0xdeadu32.to_be_bytes(), BadKey, &["none of its key slots"]),
        (4096 + 100_000, b"key material", BadKey, &["none of its key slots"]),
        (40, b"xts-plain\0\0", BadKey, &[]),
        (72, b"sha512", BadKey, &[]),
    ];
    for (at, bytes, kind, words) in cases {
        patched(&path, &image, *at, bytes);
        // A change of the IV's width changes nothing of an image that is so small.
        let result = Image::open(path.as_os_str(), &with_key(KEY).with("format", "luks"), RO);
        let e = match result {
            Ok(_) => {
                assert!(words.is_empty(), "{at} {bytes:?}: opened");
                continue;
            }
            Err(e) => e,
        };
        assert_eq!(e.kind(), *kind, "{at}: {e}");
        for word in *words {
            assert!(e.to_string().contains(word), "{at}: {e}: no {word:?}");
        }
    }
    for len in [0, 3, 7, 8, 100, 591] {
        fs::write(&path, &image[..len]).unwrap();
        let e = error(&path, &with_key(KEY).with("format", "luks"), RO);
        assert_eq!(e.kind(), Format, "{len}: {e}");
    }
    for len in [592, 4096, 5000, 200_000] {
        fs::write(&path, &image[..len]).unwrap();
        let e = error(&path, &with_key(KEY).with("format", "luks"), RO);
        assert!(matches!(e.kind(), Corrupt | BadKey), "{len}: {e}");
    }
}

#[test]
fn a_hostile_image_may_cost_only_so_much_time() {
    let dir = Tmp::in_memory("hostile");
    let (good, path) = (dir.join("good"), dir.join("bad"));
    create(&good, "luks", 64 << 10, &[("key", KEY), ("iter-time", "1")]);
    let image = fs::read(&good).unwrap();
    // Under the limit for all, above that for hostile images: not even begun there.
    patched(&path, &image, slot(0, 4), &20_000_000u32.to_be_bytes());
    let how = with_key(KEY).with("format", "luks");
    let start = Instant::now();
    let e = error(&path, &how, OpenFlags::UNTRUSTED);
    assert!(
        e.kind() == Policy && e.to_string().contains("QBLK_OPEN_UNTRUSTED allows 33554432"),
        "{e}"
    );
    patched(&path, &image, slot(0, 4), &u32::MAX.to_be_bytes());
    assert_eq!(error(&path, &how, RO).kind(), Policy);
    assert!(start.elapsed() < Duration::from_secs(5));
    // What is honest opens either way.
    open_with(&good, &how, OpenFlags::UNTRUSTED);
}

#[test]
fn the_luks_header_of_a_qcow2_image_stays_in_its_place() {
    let dir = Tmp::in_memory("hostile");
    let (good, path) = (dir.join("good"), dir.join("bad"));
    let pairs = [("encrypt.format", "luks"), ("encrypt.iter-time", "1"), ("key", KEY)];
    create(&good, "qcow2", 1 << 20, &pairs);
    let image = fs::read(&good).unwrap();
    let magic = 0x0537_be77u32.to_be_bytes();
    let at = image[..4096].windows(4).position(|w| w == magic).unwrap() as u64;
    let cases: &[Case] = &[
        (32, &3u32.to_be_bytes(), Corrupt, &["LUKS header extension"]),
        (32, &0u32.to_be_bytes(), Corrupt, &["LUKS header extension, but no LUKS encryption"]),
        (at, &[1], Corrupt, &["no LUKS header extension"]),
        (at + 8, &0u64.to_be_bytes(), Corrupt, &["LUKS header offset: found 0x0"]),
        (at + 8, &0x40200u64.to_be_bytes(), Corrupt, &["LUKS header offset: found 0x40200"]),
        (at + 8, &(!0xffffu64).to_be_bytes(), Corrupt, &["past the end of the file"]),
        (at + 8, &0u64.wrapping_sub(1 << 16).to_be_bytes(), Corrupt, &["past the end"]),
        (at + 8, &(1u64 << 16).to_be_bytes(), Format, &["not in LUKS format"]),
        (at + 16, &u64::MAX.to_be_bytes(), Corrupt, &["past the end of the file"]),
        (at + 16, &0u64.to_be_bytes(), Format, &["there is nothing"]),
        (at + 16, &300u64.to_be_bytes(), Format, &["cut off", "592"]),
        (at + 16, &4096u64.to_be_bytes(), Corrupt, &["key material of key slot 0"]),
    ];
    for (at, bytes, kind, words) in cases {
        patched(&path, &image, *at, bytes);
        for flags in [RO, RW] {
            let e = error(&path, &with_key(KEY), flags);
            assert_eq!(e.kind(), *kind, "{at}: {e}");
            for word in *words {
                assert!(e.to_string().contains(word), "{at}: {e}: no {word:?}");
            }
        }
    }
    // The old encryption asks for a key whatever the rest is, and can not tell a wrong one.
    create(&path, "qcow2", 1 << 20, &[]);
    let plain = fs::read(&path).unwrap();
    patched(&path, &plain, 32, &1u32.to_be_bytes());
    assert_eq!(error(&path, &Options::new(), RO).kind(), NeedKey);
    open_with(&path, &with_key("anything"), RW).close().unwrap();
    patched(&path, &plain, 32, &1u32.to_be_bytes());
    let mut odd = fs::read(&path).unwrap();
    odd[24..32].copy_from_slice(&1_000_001u64.to_be_bytes());
    fs::write(&path, odd).unwrap();
    let e = error(&path, &with_key(KEY), RO);
    assert!(e.kind() == Unsupported && e.to_string().contains("multiple of 512"), "{e}");
}
