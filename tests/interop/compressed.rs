//! Compressed clusters that QEMU does not make itself, but reads.

use std::path::PathBuf;

use super::common::*;
use qblk::Extent;
use qblk::block::ErrorKind;

const CLUSTER: usize = 65536;

/// An image with one allocated cluster: its path, where the L2 entry is, and where the cluster is.
fn one_cluster(dir: &Tmp, name: &str, zstd: bool) -> (PathBuf, u64, u64) {
    let path = dir.join(name);
    let kind = if zstd { "zstd" } else { "zlib" };
    create(&path, "qcow2", 4 * CLUSTER as u64, &[("compression-type", kind)]);
    let image = open(&path, RW);
    image.write_at(&[0xff; CLUSTER], CLUSTER as u64, NONE).unwrap();
    image.close().unwrap();
    let mask = 0x00ff_ffff_ffff_fe00;
    let l2 = peek_u64(&path, peek_u64(&path, 40)) & mask;
    let entry = l2 + 8;
    let host = peek_u64(&path, entry) & mask;
    assert!(l2 != 0 && host != 0);
    (path, entry, host)
}

/// Put a stream in the cluster's place.
fn compress(path: &std::path::Path, entry: u64, host: u64, stream: &[u8]) {
    assert!(stream.len() <= CLUSTER);
    poke(path, host, stream);
    let sectors = (stream.len() as u64).div_ceil(512) - 1;
    // 64 KiB clusters: the number of further sectors begins at bit 62 - (16 - 8).
    poke(path, entry, &(1 << 62 | sectors << 54 | host).to_be_bytes());
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut c = libdeflater::Compressor::new(libdeflater::CompressionLvl::best());
    let mut out = vec![0; c.deflate_compress_bound(bytes.len())];
    let n = c.deflate_compress(bytes, &mut out).unwrap();
    out.truncate(n);
    out
}

/// A cluster whose end repeats what was 20000 bytes before.
fn far_repeats() -> Vec<u8> {
    let once = Rng::new(6).bytes(20_000);
    once.iter().copied().cycle().take(CLUSTER).collect()
}

fn holds(path: &std::path::Path, dir: &Tmp, cluster: &[u8]) {
    let mut model = vec![0; 4 * CLUSTER];
    model[CLUSTER..2 * CLUSTER].copy_from_slice(cluster);
    check_clean(path);
    check_same(path, "qcow2", &model, &dir.join("model"));
    let image = open(path, RW);
    for at in [CLUSTER, CLUSTER + 1, 2 * CLUSTER - 513] {
        assert_same(
            &read_range(&image, at as u64, 513),
            &model[at..at + 513],
            at as u64,
            "a piece",
        );
    }
    assert_same(&read_all(&image), &model, 0, "all");
    let all = all_extents(&image, 0, 4 * CLUSTER as u64, 10);
    let compressed: Vec<_> = all.iter().filter(|e| e.has(Extent::COMPRESSED)).collect();
    assert_eq!(compressed.len(), 1);
    assert_eq!((compressed[0].offset, compressed[0].length), (CLUSTER as u64, CLUSTER as u64));
    // Written to, it is a plain cluster.
    image.write_at(&[1, 2, 3], CLUSTER as u64 + 7, NONE).unwrap();
    model[CLUSTER + 7..CLUSTER + 10].copy_from_slice(&[1, 2, 3]);
    assert_same(&read_all(&image), &model, 0, "after a write");
    image.close().unwrap();
    check_clean(path);
    check_same(path, "qcow2", &model, &dir.join("model"));
}

#[test]
fn deflate_with_a_window_of_32_kib_is_read() {
    let dir = Tmp::in_memory("deflate");
    let (path, entry, host) = one_cluster(&dir, "image", false);
    let cluster = far_repeats();
    let stream = deflate(&cluster);
    assert!(stream.len() < 25_000, "matches are found only at a distance of 20000");
    compress(&path, entry, host, &stream);
    holds(&path, &dir, &cluster);
}

#[test]
fn a_cluster_of_several_zstd_frames_is_read() {
    let dir = Tmp::in_memory("zstd");
    let (path, entry, host) = one_cluster(&dir, "image", true);
    let cluster = far_repeats();
    let mut stream = Vec::new();
    for part in [&cluster[..100], &cluster[100..30_000], &cluster[30_000..]] {
        let mut frame = vec![0; CLUSTER + 1000];
        let n = zstd_safe::compress(&mut frame[..], part, 3).unwrap();
        stream.extend(&frame[..n]);
    }
    compress(&path, entry, host, &stream);
    holds(&path, &dir, &cluster);
}

#[test]
fn a_stream_that_is_no_cluster_is_reported_as_corrupt() {
    let dir = Tmp::in_memory("bad-stream");
    let cluster = far_repeats();
    let good = deflate(&cluster);
    let mut broken = good.clone();
    broken[10..200].fill(0xff);
    let cases: [(&str, Vec<u8>, bool); 5] = [
        ("short", deflate(&cluster[..1000]), false),
        ("broken", broken, false),
        ("zeroes", vec![0; 1000], false),
        ("cut", good[..good.len() / 2].to_vec(), false),
        ("not zstd", good, true),
    ];
    for (what, stream, zstd) in cases {
        let (path, entry, host) = one_cluster(&dir, what, zstd);
        // Nothing of a longer stream is to lie behind a shorter one.
        poke(&path, host, &[0xff; CLUSTER]);
        compress(&path, entry, host, &stream);
        let image = open(&path, RW);
        for (at, n) in [(CLUSTER, CLUSTER), (CLUSTER + 5, 10)] {
            let e = image.read_at(&mut vec![0; n], at as u64).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
            assert!(e.to_string().contains("compressed cluster"), "{what}: {e}");
        }
        let e = image.write_at(&[1], CLUSTER as u64, NONE).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
        // The rest of the image is as usable as before, and the whole cluster can be replaced.
        image.write_at(&[5; 100], 0, NONE).unwrap();
        image.write_at(&[6; CLUSTER], CLUSTER as u64, NONE).unwrap();
        image.close().unwrap();
        check_clean(&path);
        let image = open(&path, RO);
        assert_eq!(read_range(&image, CLUSTER as u64, 100), [6; 100]);
    }
}
