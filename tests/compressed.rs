//! Compressed writes: QEMU reads and checks what they make, both write into one image, many threads do
//! at once, and what can not be compressed is refused by name.

mod common;

use std::path::Path;

use common::*;
use qblk::block::{ErrorKind, OneIov};
use qblk::{Extent, Image};

/// Bytes that compress more or less well, or not at all.
fn content(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut bytes = rng.bytes(len);
    match rng.below(5) {
        0 => {}
        1 => bytes.iter_mut().for_each(|b| *b &= 0x0f),
        2 => bytes.iter_mut().enumerate().for_each(|(i, b)| *b = if i % 64 == 0 { *b } else { 7 }),
        3 => {
            // Matches from far back: more than the 4 KiB that QEMU's own deflate looks behind.
            let far = 20_000.min(len / 2);
            let (from, to) = bytes.split_at_mut(len - far);
            let n = far.min(from.len());
            to[..n].copy_from_slice(&from[..n]);
        }
        _ => {
            let one = bytes[0];
            bytes.fill(one);
        }
    }
    bytes
}

fn pack(image: &Image, bytes: &[u8], offset: u64) -> Result<(), qblk::Error> {
    image.write_compressed(OneIov::src(bytes).iov(), offset)
}

/// An image whose clusters are all written in compressed form, and what it holds.
fn packed(
    path: &Path,
    size: u64,
    cluster: u64,
    options: &[(&str, &str)],
    rng: &mut Rng,
) -> Vec<u8> {
    create(path, "qcow2", size, options);
    let image = open(path, RW);
    let mut all = Vec::new();
    while (all.len() as u64) < size {
        let n = (size - all.len() as u64).min(cluster * rng.range(1, 40));
        let mut piece = Vec::new();
        while (piece.len() as u64) < n {
            let len = cluster.min(n - piece.len() as u64);
            piece.extend(content(rng, len as usize));
        }
        pack(&image, &piece, all.len() as u64).unwrap();
        all.extend(piece);
    }
    assert_same(&read_all(&image), &all, 0, "before closing");
    image.close().unwrap();
    all
}

#[test]
fn qemu_reads_what_was_packed_in_every_geometry() {
    let tmp = Tmp::in_memory("packed");
    let mut rng = Rng::new(seed("packed"));
    for kind in ["zlib", "zstd"] {
        for (cluster, size) in
            [(512, 586 * 512), (4096, 1953 * 512), (65536, 17_577 * 512), (2 << 20, 21_485 * 512)]
        {
            for bits in ["1", "2", "16", "64"] {
                let (path, text) = (tmp.join("a.qcow2"), cluster.to_string());
                let options =
                    [("compression-type", kind), ("cluster-size", &text), ("refcount-bits", bits)];
                let all = packed(&path, size, cluster, &options, &mut rng);
                check_clean(&path);
                check_same(&path, "qcow2", &all, &tmp.join("scratch"));
                let image = open(&path, RO);
                assert_same(&read_all(&image), &all, 0, "opened again");
                let compressed = all_extents(&image, 0, size, 64)
                    .iter()
                    .filter(|e| e.has(Extent::COMPRESSED))
                    .map(|e| e.length)
                    .sum::<u64>();
                assert!(compressed > 0, "nothing of {size} bytes is compressed");
                // A reader in small pieces, and scattered ones.
                for _ in 0..50 {
                    let at = rng.below(size);
                    let n = rng.below((size - at).min(200_000)) + 1;
                    let n = n.min(size - at);
                    let got = read_scattered(&image, &mut rng, at, n);
                    assert_same(&got, &all[at as usize..(at + n) as usize], at, "a piece");
                }
            }
        }
    }
}

#[test]
fn packed_clusters_take_no_more_room_than_those_of_qemu() {
    let tmp = Tmp::new("packed-size");
    let mut rng = Rng::new(5);
    let size = 16 << 20;
    let mut all = Vec::new();
    let words: Vec<Vec<u8>> = (0..500).map(|i| rng.bytes(3 + i % 9)).collect();
    while all.len() < size {
        all.extend(&words[rng.below(500) as usize]);
    }
    all.truncate(size);
    let raw = tmp.join("raw");
    std::fs::write(&raw, &all).unwrap();
    for kind in ["zlib", "zstd"] {
        let (ours, theirs) = (tmp.join("ours"), tmp.join("theirs"));
        create(&ours, "qcow2", size as u64, &[("compression-type", kind)]);
        let image = open(&ours, RW);
        for (i, piece) in all.chunks(1 << 20).enumerate() {
            pack(&image, piece, (i << 20) as u64).unwrap();
        }
        image.close().unwrap();
        let how = format!("compression_type={kind}");
        qemu_img!("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", how, raw, theirs);
        check_clean(&ours);
        check_same(&ours, "qcow2", &all, &tmp.join("scratch"));
        let (a, b) = (on_disk(&ours), on_disk(&theirs));
        eprintln!("{kind}: {a} bytes, QEMU {b}");
        assert!(a <= b, "{kind}: {a} bytes, QEMU needs {b}");
    }
}

/// One random change, to the image and to the model of clusters `first..end`.
fn change(image: &Image, rng: &mut Rng, model: &mut [u8], base: u64, cluster: u64, size: u64) {
    let clusters = (model.len() as u64).div_ceil(cluster);
    let from = rng.below(clusters) * cluster;
    match rng.below(10) {
        0..5 => {
            let to = (from + cluster * rng.range(1, 6)).min(model.len() as u64);
            let mut bytes = Vec::new();
            for at in (from..to).step_by(cluster as usize) {
                bytes.extend(content(rng, cluster.min(to - at) as usize));
            }
            pack(image, &bytes, base + from).unwrap();
            model[from as usize..to as usize].copy_from_slice(&bytes);
        }
        5..8 => {
            let at = rng.below(model.len() as u64);
            let n = (rng.below(3 * cluster) + 1).min(model.len() as u64 - at);
            let bytes = content(rng, n as usize);
            image.write_at(&bytes, base + at, NONE).unwrap();
            model[at as usize..(at + n) as usize].copy_from_slice(&bytes);
        }
        8 => {
            let at = rng.below(model.len() as u64);
            let n = (rng.below(4 * cluster) + 1).min(model.len() as u64 - at);
            let how = if rng.one_in(2) { NONE } else { qblk::ReqFlags::MAY_TRIM };
            image.zero(base + at, n, how).unwrap();
            model[at as usize..(at + n) as usize].fill(0);
        }
        _ if rng.one_in(4) => image.flush().unwrap(),
        _ => {
            let at = rng.below(model.len() as u64);
            let n = (rng.below(2 * cluster) + 1).min(model.len() as u64 - at);
            let got = read_range(image, base + at, n);
            assert_same(&got, &model[at as usize..(at + n) as usize], base + at, "read");
        }
    }
    assert!(base + model.len() as u64 <= size);
}

#[test]
fn packing_in_turn_with_everything_else_agrees_with_a_model() {
    let tmp = Tmp::in_memory("packed-model");
    let mut rng = Rng::new(seed("packed-model"));
    watch_log();
    let until = deadline(8);
    while std::time::Instant::now() < until {
        let (cluster, size) =
            rng.pick(&[(512, 195 * 512), (4096, 1367 * 512), (65536, 9765 * 512)]);
        let kind = rng.pick(&["zlib", "zstd"]);
        let bits = rng.pick(&["1", "4", "16"]);
        let (path, text) = (tmp.join("a.qcow2"), cluster.to_string());
        let mut options =
            vec![("compression-type", kind), ("cluster-size", &text[..]), ("refcount-bits", bits)];
        if cluster == 65536 && rng.one_in(2) {
            options.push(("extended-l2", "on"));
        }
        let below = tmp.join("below.raw");
        let mut model = vec![0; size as usize];
        if rng.one_in(2) {
            model = rng.bytes(size as usize);
            std::fs::write(&below, &model).unwrap();
            options.extend([("backing-file", "below.raw"), ("backing-fmt", "raw")]);
        }
        create(&path, "qcow2", size, &options);
        for _ in 0..4 {
            let image = open(&path, RW);
            for _ in 0..rng.range(5, 60) {
                change(&image, &mut rng, &mut model, 0, cluster, size);
            }
            assert_same(&read_all(&image), &model, 0, "all");
            if rng.one_in(3) {
                // As a program that dies: what was flushed is there, and nothing is damaged.
                image.flush().unwrap();
                drop(image);
                check_no_corruption(&path);
                qemu_img!("check", "-r", "leaks", "-f", "qcow2", path);
            } else {
                image.close().unwrap();
                check_clean(&path);
            }
            check_same(&path, "qcow2", &model, &tmp.join("scratch"));
            // QEMU takes its turn: clusters that are packed are written to, others packed beside.
            let at = rng.below(size / 512 - 1) * 512;
            let n = 512 * rng.range(1, 4).min((size - at) / 512);
            qemu_io(&path, "qcow2", &[&format!("write -P 0x5a {at} {n}")]);
            model[at as usize..(at + n) as usize].fill(0x5a);
            let whole = rng.below(size / cluster) * cluster;
            qemu_io(&path, "qcow2", &[&format!("discard {whole} {cluster}")]);
            let image = open(&path, RO);
            let got = read_range(&image, whole, cluster);
            model[whole as usize..(whole + cluster) as usize].copy_from_slice(&got);
            assert_same(&read_all(&image), &model, 0, "after QEMU");
        }
    }
    assert_nothing_logged();
}

#[test]
fn many_threads_pack_into_one_image() {
    let tmp = Tmp::in_memory("packed-threads");
    let first = seed("packed-threads");
    watch_log();
    for (round, kind) in ["zlib", "zstd"].into_iter().enumerate() {
        let (threads, cluster) = (8u64, if round == 0 { 4096 } else { 65536 });
        let (share, path) = (cluster * 40, tmp.join("a.qcow2"));
        let size = share * threads;
        create(
            &path,
            "qcow2",
            size,
            &[("compression-type", kind), ("cluster-size", &cluster.to_string())],
        );
        let image = open(&path, RW);
        let until = deadline(4);
        let parts: Vec<Vec<u8>> = std::thread::scope(|s| {
            let all: Vec<_> = (0..threads)
                .map(|t| {
                    let image = &image;
                    s.spawn(move || {
                        let mut rng = Rng::new(first ^ (t + 1).wrapping_mul(0x1234_5678_9abc));
                        let mut model = vec![0; share as usize];
                        while std::time::Instant::now() < until {
                            change(image, &mut rng, &mut model, t * share, cluster, size);
                        }
                        model
                    })
                })
                .collect();
            all.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let model = parts.concat();
        assert_same(&read_all(&image), &model, 0, "while open");
        image.close().unwrap();
        check_clean(&path);
        check_same(&path, "qcow2", &model, &tmp.join("scratch"));
    }
    assert_nothing_logged_of("packed-threads");
}

#[test]
fn threads_that_pack_the_same_clusters_leave_one_or_the_other() {
    let tmp = Tmp::in_memory("packed-race");
    let path = tmp.join("a.qcow2");
    let (cluster, size) = (65536, 8 * 65536);
    create(&path, "qcow2", size, &[]);
    let image = open(&path, RW);
    std::thread::scope(|s| {
        for t in 0..6u8 {
            let image = &image;
            s.spawn(move || {
                let mut rng = Rng::new(u64::from(t) + 1);
                for i in 0..300u64 {
                    let at = rng.below(8) * cluster;
                    let bytes = vec![t * 32 + (i % 32) as u8 + 1; cluster as usize];
                    match t {
                        0 => image.write_at(&bytes, at, NONE).unwrap(),
                        1 => image.zero(at, cluster, NONE).unwrap(),
                        _ => pack(image, &bytes, at).unwrap(),
                    }
                    if rng.one_in(40) {
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    let all = read_all(&image);
    for cluster in all.chunks(cluster as usize) {
        assert!(cluster.iter().all(|b| *b == cluster[0]), "a cluster of two writes");
    }
    image.close().unwrap();
    check_clean(&path);
    check_same(&path, "qcow2", &all, &tmp.join("scratch"));
}

#[test]
fn what_can_not_be_packed_is_refused_and_left_alone() {
    let tmp = Tmp::in_memory("packed-refused");
    let not_supported = |e: qblk::Error, word: &str| {
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOTSUP), "{e}");
        assert!(e.to_string().contains(word), "{e}");
    };
    let bytes = vec![1; 65536];
    let raw = tmp.join("a.raw");
    create(&raw, "raw", 1 << 20, &[]);
    let image = open_with(&raw, &options(&[("format", "raw")]), RW);
    not_supported(pack(&image, &bytes, 0).unwrap_err(), "compressed writes");
    drop(image);
    let path = tmp.join("a.qcow2");
    create(
        &path,
        "qcow2",
        1 << 20,
        &[("encrypt.format", "luks"), ("encrypt.iter-time", "10"), ("key", "k")],
    );
    let image = open_with(&path, &options(&[("key", "k")]), RW);
    not_supported(pack(&image, &bytes, 0).unwrap_err(), "encryption");
    drop(image);

    let data = tmp.join("a.data");
    create(&path, "qcow2", 1 << 20, &[("data-file", data.to_str().unwrap())]);
    let image = open(&path, RW);
    not_supported(pack(&image, &bytes, 0).unwrap_err(), "data file");
    drop(image);

    create(&path, "qcow2", 100_000, &[]);
    let image = open(&path, RW);
    let invalid = |offset: u64, len: usize| {
        let e = pack(&image, &bytes[..len], offset).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    };
    invalid(0, 65535);
    invalid(1, 65535);
    invalid(512, 512);
    invalid(65536, 65536);
    invalid(65536, 34463);
    pack(&image, &bytes[..34464], 65536).unwrap();
    pack(&image, &[], 0).unwrap();
    image.close().unwrap();
    let image = open(&path, RO);
    let e = pack(&image, &bytes, 0).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EROFS), "{e}");
    let mut model = vec![0; 100_000];
    model[65536..].fill(1);
    assert_same(&read_all(&image), &model, 0, "only the whole one was written");
}

#[test]
fn entries_that_lie_are_named_and_counts_that_lie_do_no_further_harm() {
    let tmp = Tmp::in_memory("packed-hostile");
    let mut rng = Rng::new(9);
    let path = tmp.join("a.qcow2");
    let all = packed(&path, 40 * 65536, 65536, &[], &mut rng);
    let l2 = peek_u64(&path, peek_u64(&path, 40)) & 0x00ff_ffff_ffff_fe00;
    let good = peek(&path, l2 + 8 * 5, 8);
    // Marked as writable in place; a plain one with reserved bits.
    for bad in [3u64 << 62 | 0x50000, 1 << 60 | 0x50000] {
        poke(&path, l2 + 8 * 5, &bad.to_be_bytes());
        let image = open(&path, RW);
        let e = pack(&image, &all[..65536], 5 * 65536).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        let text = e.to_string();
        assert!(text.contains("0x50000") && text.contains(&format!("{bad:#018x}")), "{text}");
        drop(image);
        // A reader says the same.
        let e = open(&path, RO).read_at(&mut [0; 10], 5 * 65536).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        poke(&path, l2 + 8 * 5, &good);
        // Who found it may have marked the image, as QEMU does.
        qemu_img!("check", "-q", "-r", "all", "-f", "qcow2", path);
    }
    // Nothing is counted that is in use: what is freed can not be counted down, and stays.
    let blocks = peek_u64(&path, peek_u64(&path, 48));
    let entry = peek_u64(&path, l2);
    let host = (entry & ((1 << 54) - 1)) >> 16;
    poke(&path, blocks + 2 * host, &[0, 0]);
    let image = open(&path, RW);
    let _ = pack(&image, &all[65536..2 * 65536], 0);
    let _ = image.flush();
    let got = read_range(&image, 65536, 65536);
    assert_same(&got, &all[65536..2 * 65536], 65536, "its neighbour");
    drop(image);
}
