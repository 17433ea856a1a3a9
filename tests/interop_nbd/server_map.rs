//! What our server says of the blocks of an export, beside what our extents and qemu-nbd say.

use std::path::Path;

use super::common::*;
use super::peers::*;
use qblk::{Extent, Image};

/// Where a run begins, how long it is, and what is said of it.
type Run = (u64, u64, u32);

fn merge(all: impl IntoIterator<Item = Run>) -> Vec<Run> {
    let mut out: Vec<Run> = Vec::new();
    for (at, len, what) in all {
        match out.last_mut() {
            Some(last) if last.2 == what => last.1 += len,
            _ => out.push((at, len, what)),
        }
    }
    out
}

/// A context, as nbdinfo tells it: a line for each run with offset, length, type, description.
fn by_nbdinfo(uri: &str, context: &str) -> Vec<Run> {
    let text = peer!("nbdinfo", format!("--map={context}"), uri).ok();
    merge(text.lines().map(|line| {
        let n: Vec<u64> = line.split_whitespace().take(3).map(|w| w.parse().unwrap()).collect();
        (n[0], n[1], n[2] as u32)
    }))
}

/// `base:allocation` as qemu-img understood it.
fn by_qemu_img(uri: &str) -> Vec<Run> {
    let text = peer!("qemu-img", "map", "-f", "raw", "--output=json", uri).ok();
    let field = |line: &str, name: &str| -> String {
        let rest = line.split(&format!("\"{name}\": ")).nth(1).unwrap();
        rest.split([',', '}']).next().unwrap().trim().to_owned()
    };
    merge(text.lines().filter(|l| l.contains("\"start\"")).map(|l| {
        let bit = |name: &str, bit: u32| if field(l, name) == "true" { bit } else { 0 };
        let number = |name: &str| field(l, name).parse::<u64>().unwrap();
        (number("start"), number("length"), (1 ^ bit("data", 1)) | bit("zero", 2))
    }))
}

/// `base:allocation` as our extents have it: 1 = hole, 2 = zero.
fn by_us(image: &Image) -> Vec<Run> {
    let all = all_extents(image, 0, image.size().unwrap(), 100);
    merge(all.iter().map(|e| {
        let hole = u32::from(!e.has(Extent::DATA));
        (e.offset, e.length, hole | if e.has(Extent::ZERO) { 2 } else { 0 })
    }))
}

/// Our server says of a file what our extents say, and what qemu-nbd says of it.
fn judge(dir: &Tmp, path: &Path, format: &str, read_only: bool) -> usize {
    let flags = if read_only { RO } else { RW };
    let image = open_with(path, &options(&[("format", format)]), flags);
    let served = Served::new(dir, &[("x", &image)], &[]);
    let expected = by_us(&image);
    let mut depths = Vec::new();
    for uri in served.both("x") {
        assert_eq!(by_nbdinfo(&uri, "base:allocation"), expected, "{format} base:allocation");
        assert_eq!(by_qemu_img(&uri), expected, "{format} qemu-img map");
        depths = by_nbdinfo(&uri, "qemu:allocation-depth");
    }
    served.stop();
    image.close().unwrap();
    let theirs = dir.join("theirs.sock");
    let args: [&dyn AsRef<std::ffi::OsStr>; 5] = [&"-r", &"-A", &"-f", &format, &path];
    let _qemu = qemu_nbd(&theirs, &args);
    let uri = unix(&theirs, "");
    assert_eq!(by_nbdinfo(&uri, "base:allocation"), expected, "{format} beside qemu-nbd");
    assert_eq!(depths, by_nbdinfo(&uri, "qemu:allocation-depth"), "{format} depth");
    expected.len()
}

#[test]
fn maps_of_sparse_files() {
    let dir = Tmp::new("nbd-map-raw");
    let mut rng = Rng::new(seed("map_raw"));
    for round in 0..3 {
        let path = dir.join(format!("raw{round}"));
        let size = rng.range(3000, 20_000) * 512;
        sparse_bytes(&path, size, &mut rng);
        assert!(judge(&dir, &path, "raw", round == 0) > 1);
    }
    // Nothing but a hole, nothing but data, nothing at all.
    for (size, data) in [(1 << 20, 0), (65536, 65536), (0, 0)] {
        let path = dir.join("plain");
        let image = raw_file(&path, size);
        image.write_at(&vec![1; data], 0, NONE).unwrap();
        image.close().unwrap();
        if size > 0 {
            assert_eq!(judge(&dir, &path, "raw", false), 1);
        } else {
            let image = open_with(&path, &options(&[("format", "raw")]), RW);
            let served = Served::new(&dir, &[("", &image)], &[]);
            assert_eq!(by_nbdinfo(&served.tcp(""), "base:allocation"), []);
        }
    }
}

#[test]
fn maps_of_chains_and_zero_clusters() {
    let dir = Tmp::new("nbd-map-chain");
    let mut rng = Rng::new(seed("map_chain"));
    for cluster in ["512", "4k", "64k"] {
        let size = 6 << 20;
        // As long as what stands on it: behind the end of a shorter one QEMU counts the zeroes as its.
        sparse_bytes(&dir.join("base"), size, &mut rng);
        let mut below = ("base".to_owned(), "raw");
        for n in 0..3 {
            let name = format!("{n}.qcow2");
            let pairs =
                [("backing-file", &*below.0), ("backing-fmt", below.1), ("cluster-size", cluster)];
            create(&dir.join(&name), "qcow2", size, &pairs);
            let image = open(&dir.join(&name), RW);
            for _ in 0..10 {
                let n = rng.range(1, 300_000);
                let at = rng.below(size - n);
                match rng.below(4) {
                    0 => image.zero(at, n, NONE).unwrap(),
                    1 => image.zero(at, n, qblk::ReqFlags::MAY_TRIM).unwrap(),
                    2 => image.trim(at, n, NONE).unwrap(),
                    _ => image.write_at(&rng.bytes(n as usize), at, NONE).unwrap(),
                }
            }
            image.close().unwrap();
            below = (name, "qcow2");
        }
        assert!(judge(&dir, &dir.join(&below.0), "qcow2", cluster == "4k") > 5);
    }
}

#[test]
fn the_map_of_a_large_image_is_told_in_pieces() {
    let dir = Tmp::new("nbd-map-large");
    // More than 32 bits hold, data at both ends.
    let path = dir.join("large");
    let size = (9 << 30) + 4096;
    let image = raw_file(&path, size);
    image.write_at(&[1; 4096], 0, NONE).unwrap();
    image.write_at(&[1; 4096], size - 4096, NONE).unwrap();
    image.close().unwrap();
    assert_eq!(judge(&dir, &path, "raw", false), 3);
    // Many small runs: more than one reply holds.
    let path = dir.join("comb.qcow2");
    create(&path, "qcow2", 32 << 20, &[("cluster-size", "512")]);
    let image = open(&path, RW);
    for n in 0..10_000 {
        image.write_at(&[n as u8; 512], n * 1024, NONE).unwrap();
    }
    image.close().unwrap();
    assert_eq!(judge(&dir, &path, "qcow2", false), 20_000);
}
