//! Extended L2 entries and data files that contradict themselves: the exact error, no panic, and the
//! rest of the image as usable as before.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::common::*;
use qblk::block::ErrorKind;
use qblk::{Extent, Options, ReqFlags};

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// An image with clusters 0 to 3 written: its path, and where its L2 table is.
fn written(dir: &Tmp, pairs: &[(&str, &str)]) -> (PathBuf, u64) {
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, pairs);
    let image = open(&path, RW);
    image.write_at(&[0x11; 4 * CLUSTER as usize], 0, NONE).unwrap();
    image.close().unwrap();
    let l2 = peek_u64(&path, peek_u64(&path, 40)) & MASK;
    (path, l2)
}

/// Everything that touches cluster 1 is answered with ECORRUPT that has these words, and changes
/// nothing but that it fences what is open for writing; the others are as before.
fn corrupt(path: &Path, words: &[&str]) {
    let before = fs::read(path).unwrap();
    let copy = path.with_extension("copy");
    type Touch = fn(&qblk::Image) -> Result<(), qblk::Error>;
    let reads: [(&str, Touch); 3] = [
        ("read", |image| image.read_at(&mut [0; 100], CLUSTER + 50)),
        ("whole read", |image| image.read_at(&mut vec![0; 1 << 20], 0)),
        ("extents", |image| {
            image.extents(CLUSTER, CLUSTER, &mut [Extent::default(); 64]).map(drop)
        }),
    ];
    let writes: [(&str, Touch); 3] = [
        ("write", |image| image.write_at(&[1; 100], CLUSTER + 50, NONE)),
        ("zero", |image| image.zero(CLUSTER, CLUSTER, ReqFlags::MAY_TRIM)),
        ("trim", |image| image.trim(CLUSTER, CLUSTER, NONE)),
    ];
    for flags in [RO, RW] {
        let writes = if flags == RW { &writes[..] } else { &[] };
        for (what, touch) in reads.iter().chain(writes) {
            fs::copy(path, &copy).unwrap();
            let image = open(&copy, flags);
            let e = touch(&image).expect_err(what);
            assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
            for word in words {
                assert!(e.to_string().contains(word), "{what}: {word:?} not in: {e}");
            }
            assert_eq!(read_range(&image, 0, 100), [0x11; 100]);
            assert_eq!(read_range(&image, 2 * CLUSTER, 100), [0x11; 100]);
            if flags == RW {
                let e = image.write_at(&[1; 100], 0, NONE).unwrap_err();
                assert!(e.to_string().contains("refuses writes"), "{e}");
            }
            assert_eq!(image.close().is_err(), flags == RW);
            let mut after = fs::read(&copy).unwrap();
            assert_eq!(after[79] & 2 != 0, flags == RW, "the mark");
            after[79] = before[79];
            let n = before.len().min(after.len());
            assert_same(&after[..n], &before[..n], 0, "after refusals");
        }
    }
}

#[test]
fn subclusters_that_contradict_themselves_are_reported() {
    let host = 9 * CLUSTER;
    for (word, bits, what) in [
        (COPIED | host, 1 << 32 | 1, "both allocated and zeroes"),
        (COPIED | host, u64::MAX, "both allocated and zeroes"),
        (0, 1 << 31, "no cluster for them"),
        (COPIED, 1, "no cluster for them"),
        (COPIED | host | 1, 0xffff_ffff, "zero flag"),
        (1, 0, "zero flag"),
        (COPIED | host | 2, 0xffff_ffff, "reserved"),
        (1 << 60 | host, 0xffff_ffff, "reserved"),
        (COPIED | (host + 2048), 0xffff_ffff, "multiple of the cluster size"),
        (COMPRESSED | host, 1, "compressed, and has subclusters"),
        (COMPRESSED | host, 1 << 63, "compressed, and has subclusters"),
        (COMPRESSED | COPIED | host, 0, "writable in place"),
    ] {
        let dir = Tmp::in_memory("sub-hostile");
        let (path, l2) = written(&dir, &[("extended-l2", "on")]);
        poke(&path, l2 + 16, &word.to_be_bytes());
        poke(&path, l2 + 24, &bits.to_be_bytes());
        corrupt(&path, &[what, "0x10000", &format!("{word:#018x}"), &format!("{bits:#018x}")]);
    }
}

#[test]
fn entries_that_a_data_file_can_not_have_are_reported() {
    for (word, what) in [
        (COPIED, "another place"),
        (COPIED | (2 * CLUSTER), "another place"),
        (COMPRESSED | CLUSTER, "external data file"),
        (COPIED | CLUSTER | 2, "reserved"),
    ] {
        for extended in ["off", "on"] {
            let dir = Tmp::in_memory("data-hostile");
            let pairs = [("data-file", "data"), ("extended-l2", extended)];
            let (path, l2) = written(&dir, &pairs);
            let entry = if extended == "on" { 16 } else { 8 };
            poke(&path, l2 + entry, &word.to_be_bytes());
            corrupt(&path, &[what, "0x10000", &format!("{word:#018x}")]);
        }
    }
}

#[test]
fn subclusters_need_clusters_of_16_kib() {
    let dir = Tmp::in_memory("sub-small");
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, &[("cluster-size", "8k")]);
    poke(&path, 72, &16u64.to_be_bytes());
    let e = open_error(&path, &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    assert!(e.to_string().contains("at least 14"), "{e}");
}

#[test]
fn random_entries_do_no_harm_to_the_program() {
    let mut rng = Rng::new(seed("random extended entries"));
    let end = deadline(10);
    for (extended, data) in [(true, false), (true, true), (false, true)].into_iter().cycle() {
        if Instant::now() > end {
            break;
        }
        let dir = Tmp::in_memory("random-extended");
        let mut pairs = vec![("extended-l2", if extended { "on" } else { "off" })];
        if data {
            pairs.push(("data-file", "data"));
        }
        let (path, l2) = written(&dir, &pairs);
        for _ in 0..rng.range(1, 20) {
            let cluster = rng.below(16);
            let word = match rng.below(5) {
                0 => rng.next(),
                1 => (cluster * CLUSTER) | COPIED,
                2 => (rng.below(12) * CLUSTER) | COPIED,
                3 => COMPRESSED | rng.below(1 << 20) | (rng.below(256) << 54),
                _ => 0,
            };
            let bits = match rng.below(4) {
                0 => rng.next(),
                1 => rng.next() & rng.next() & 0xffff_ffff,
                2 => rng.next() << 32,
                _ => 0,
            };
            let size = if extended { 16 } else { 8 };
            poke(&path, l2 + size * cluster, &word.to_be_bytes());
            if extended {
                poke(&path, l2 + size * cluster + 8, &bits.to_be_bytes());
            }
        }
        for flags in [RO, RW] {
            let image = open(&path, flags);
            let mut some = [Extent::default(); 100];
            let _ = image.extents(0, 1 << 20, &mut some);
            for _ in 0..40 {
                let count = rng.pick(&[1, 512, 5000, CLUSTER, 200_000]);
                let at = rng.below((1 << 20) - count);
                let mut room = vec![0; count as usize];
                let _ = match rng.below(6) {
                    0 => image.zero(at, count, NONE),
                    1 => image.zero(at, count, ReqFlags::MAY_TRIM),
                    2 => image.trim(at, count, NONE),
                    3 => image.write_at(&room, at, NONE),
                    _ => image.read_at(&mut room, at),
                };
            }
            let _ = image.close();
        }
    }
}
