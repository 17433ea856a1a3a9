//! Copying: what arrives is what was there, in every direction, with what is known of holes kept; it can
//! be stopped, and refuses what would harm.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::*};

use common::*;
use qblk::block::{ErrorKind, Progress};
use qblk::image::copy;
use qblk::{Extent, Image, OpenFlags, Options};

fn copy_all(from: &Image, to: &Image, how: &[(&str, &str)]) -> u64 {
    copy(from, to, &options(how), false, Progress::NONE).unwrap_or_else(|e| panic!("copy: {e}"))
}

/// Data, holes, zeroes that are written, and words, at all kinds of offsets.
fn disk(rng: &mut Rng, size: usize) -> Vec<u8> {
    let mut all = vec![0; size];
    let mut at = 0;
    while at < size {
        let n = (rng.below(600_000) as usize + 1).min(size - at);
        match rng.below(4) {
            0 => {}
            1 => all[at..at + n].copy_from_slice(&rng.bytes(n)),
            2 => all[at..at + n].fill(rng.below(256) as u8),
            _ => {
                for b in all[at..at + n].chunks_mut(4096) {
                    let n = b.len();
                    if !rng.one_in(3) {
                        b.copy_from_slice(&vec![rng.below(250) as u8 + 1; n]);
                    }
                }
            }
        }
        at += n;
    }
    all
}

fn equal(path: &Path, format: &str, all: &[u8], tmp: &Tmp) {
    if format == "qcow2" {
        check_clean(path);
    }
    check_same(path, format, all, &tmp.join("scratch"));
}

#[test]
fn every_format_copies_to_every_format() {
    let tmp = Tmp::in_memory("copy");
    let mut rng = Rng::new(seed("copy"));
    type Pairs = &'static [(&'static str, &'static str)];
    let kinds: [(&str, Pairs, Pairs); 7] = [
        ("raw", &[], &[]),
        ("qcow2", &[], &[]),
        ("qcow2", &[("cluster-size", "512")], &[("threads", "1")]),
        ("qcow2", &[("cluster-size", "2M")], &[("threads", "7"), ("sparse", "0")]),
        ("qcow2", &[("compression-type", "zstd")], &[("compress", "on"), ("threads", "5")]),
        ("qcow2", &[("cluster-size", "2M")], &[("compress", "on"), ("target-is-zero", "on")]),
        ("qcow2", &[("cluster-size", "4k"), ("compat", "0.10")], &[("compress", "on")]),
    ];
    for size in [0, 1024, 10_000 * 512, 21_001 * 512] {
        let all = disk(&mut rng, size);
        let (raw, mut last) = (tmp.join("first.raw"), tmp.join("first.raw"));
        std::fs::write(&raw, &all).unwrap();
        let mut from = "raw";
        for (i, (format, made, how)) in kinds.into_iter().enumerate() {
            let path = tmp.join(format!("{i}.{format}"));
            create(&path, format, size as u64, made);
            let source = open_with(&last, &options(&[("format", from)]), RO);
            let target = open_with(&path, &options(&[("format", format)]), RW);
            copy_all(&source, &target, how);
            assert_same(&read_all(&target), &all, 0, "copied");
            target.close().unwrap();
            equal(&path, format, &all, &tmp);
            (last, from) = (path, format);
        }
        // QEMU makes one, and takes one.
        let theirs = tmp.join("theirs");
        qemu_img!("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", last, theirs);
        let source = open(&theirs, RO);
        let path = tmp.join("last.raw");
        create(&path, "raw", size as u64, &[]);
        let target = open_with(&path, &options(&[("format", "raw")]), RW);
        copy_all(&source, &target, &[]);
        target.close().unwrap();
        assert_same(&std::fs::read(&path).unwrap(), &all, 0, "from QEMU's");
    }
}

#[test]
fn a_target_that_held_something_holds_the_copy_only() {
    let tmp = Tmp::in_memory("copy-over");
    let mut rng = Rng::new(seed("copy-over"));
    for how in [
        &[][..],
        &[("compress", "on")],
        &[("compare", "on")],
        &[("sparse", "0")],
        &[("compare", "on"), ("compress", "on")],
    ] {
        for backed in [false, true] {
            let size = 12_345 * 512;
            let (all, before) = (disk(&mut rng, size), disk(&mut rng, size));
            let (source, path) = (tmp.join("a.raw"), tmp.join("b.qcow2"));
            std::fs::write(&source, &all).unwrap();
            std::fs::write(tmp.join("base.raw"), &before).unwrap();
            match backed {
                true => create(
                    &path,
                    "qcow2",
                    size as u64,
                    &[("backing-file", "base.raw"), ("backing-fmt", "raw")],
                ),
                false => create(&path, "qcow2", size as u64, &[]),
            }
            let target = open(&path, RW);
            if !backed {
                target.write_at(&before, 0, NONE).unwrap();
            }
            let from = open_with(&source, &options(&[("format", "raw")]), RO);
            let written = copy_all(&from, &target, how);
            assert!(written <= size as u64);
            // All of it is there by now, so nothing is written again.
            let again = [how, &[("compare", "on")]].concat();
            assert_eq!(copy_all(&from, &target, &again), 0);
            target.close().unwrap();
            equal(&path, "qcow2", &all, &tmp);
        }
    }
}

#[test]
fn holes_stay_holes() {
    let tmp = Tmp::in_memory("copy-holes");
    let size = 1u64 << 36;
    let (a, b) = (tmp.join("a.qcow2"), tmp.join("b.raw"));
    create(&a, "qcow2", size, &[]);
    create(&b, "raw", size, &[]);
    let source = open(&a, RW);
    for at in [0, 5 << 30, size - 8192] {
        source.write_at(&[1; 8192], at, NONE).unwrap();
    }
    let target = open_with(&b, &options(&[("format", "raw")]), RW);
    let written = copy_all(&source, &target, &[]);
    assert_eq!(written, 3 * 8192);
    target.close().unwrap();
    assert!(on_disk(&b) <= 64 << 10, "{}", on_disk(&b));
    // Compressed, from there: clusters as a whole, and nothing for the holes.
    let c = tmp.join("c.qcow2");
    create(&c, "qcow2", size, &[]);
    let (source, target) = (open_with(&b, &options(&[("format", "raw")]), RO), open(&c, RW));
    assert_eq!(copy_all(&source, &target, &[("compress", "on")]), 3 * 65536);
    let extents = all_extents(&target, 0, size, 100);
    assert!(extents.iter().filter(|e| e.has(Extent::COMPRESSED)).count() == 3, "{extents:?}");
    target.close().unwrap();
    check_clean(&c);
    let text = qemu_img!("compare", "-f", "raw", "-F", "qcow2", b, c);
    assert!(text.contains("identical"), "{text}");
}

#[test]
fn a_shallow_copy_has_what_the_image_itself_has() {
    let tmp = Tmp::in_memory("copy-shallow");
    let mut rng = Rng::new(seed("copy-shallow"));
    for how in [&[][..], &[("compress", "on")]] {
        for cluster in ["4k", "64k", "1M"] {
            let size = 4 << 20;
            let (base, top, copied) =
                (tmp.join("base.raw"), tmp.join("top.qcow2"), tmp.join("copy.qcow2"));
            let mut all = rng.bytes(size);
            std::fs::write(&base, &all).unwrap();
            let backing = [("backing-file", "base.raw"), ("backing-fmt", "raw")];
            create(&top, "qcow2", size as u64, &backing);
            let image = open(&top, RW);
            for _ in 0..12 {
                let at = rng.below(size as u64 - 200_000);
                let n = rng.below(200_000) as usize;
                if rng.one_in(3) {
                    image.zero(at, n as u64, NONE).unwrap();
                    all[at as usize..at as usize + n].fill(0);
                } else {
                    let bytes = vec![rng.below(255) as u8 + 1; n];
                    image.write_at(&bytes, at, NONE).unwrap();
                    all[at as usize..at as usize + n].copy_from_slice(&bytes);
                }
            }
            create(
                &copied,
                "qcow2",
                size as u64,
                &[&backing[..], &[("cluster-size", cluster)]].concat(),
            );
            let target = open(&copied, RW);
            // What is below matters not: it is not even open.
            let alone = Image::context(&image, &Options::new(), RO).unwrap();
            copy(&alone, &target, &options(how), true, Progress::NONE).unwrap();
            drop(alone);
            assert_same(&read_all(&target), &all, 0, "shallow");
            let own = |image: &Image| {
                let all = all_extents(image, 0, size as u64, 64);
                all.iter().filter(|e| e.has(Extent::ALLOCATED)).map(|e| e.length).sum::<u64>()
            };
            if cluster != "1M" {
                assert_eq!(own(&target), own(&image), "{cluster}");
                assert!(own(&target) < size as u64);
            }
            target.close().unwrap();
            check_clean(&copied);
            check_same(&copied, "qcow2", &all, &tmp.join("scratch"));
        }
    }
}

#[test]
fn progress_is_told_and_stops_the_copy() {
    let tmp = Tmp::in_memory("copy-progress");
    let size = 64u64 << 20;
    let a = tmp.join("a.qcow2");
    create(&a, "qcow2", size, &[]);
    let source = open(&a, RW);
    let mut rng = Rng::new(29);
    for at in (0..size).step_by(1 << 20) {
        source.write_at(&rng.bytes(1 << 20), at, NONE).unwrap();
    }
    let b = tmp.join("b.qcow2");
    create(&b, "qcow2", size, &[]);
    let target = open(&b, RW);
    let last = AtomicU64::new(0);
    let tell = |done, total| {
        assert_eq!(total, size);
        assert!(done >= last.swap(done, Relaxed), "it goes on only");
        true
    };
    copy(&source, &target, &Options::new(), false, Progress::new(&tell)).unwrap();
    assert_eq!(last.load(Relaxed), size);
    assert_same(&read_all(&target), &read_all(&source), 0, "all");
    target.close().unwrap();
    check_clean(&b);
    // Stopped at once.
    let stop = |_, _| false;
    for compress in ["on", "off"] {
        let (done, left) = copied_in_part(&source, &tmp, compress, Progress::new(&stop));
        assert_eq!((done, left), (0, 32));
    }
    // Stopped midway. The copy may be faster than it is told of: then once more.
    let stop = |done, total| done == 0 || done == total;
    let midway = (0..20).any(|_| {
        let (done, left) = copied_in_part(&source, &tmp, "on", Progress::new(&stop));
        done > 0 && left > 0
    });
    assert!(midway, "20 copies were not stopped midway");
}

/// Copy to a new image, see that what came of it is whole, and answer how many pieces are there, and how
/// many are not.
fn copied_in_part(source: &Image, tmp: &Tmp, compress: &str, tell: Progress<'_>) -> (u32, u32) {
    let path = tmp.join("part.qcow2");
    create(&path, "qcow2", source.size().unwrap(), &[]);
    let target = open(&path, RW);
    let how = options(&[("compress", compress), ("threads", "1")]);
    let (mut done, mut left) = (0, 0);
    let stopped = copy(source, &target, &how, false, tell);
    for (all, piece) in read_all(source).chunks(2 << 20).zip(read_all(&target).chunks(2 << 20)) {
        match piece == all {
            true => done += 1,
            false => {
                assert!(piece.iter().all(|b| *b == 0), "a piece that is done in part");
                left += 1;
            }
        }
    }
    match stopped {
        Ok(_) => assert_eq!(left, 0),
        Err(e) => assert_eq!(e.kind(), ErrorKind::Errno(libc::ECANCELED), "{e}"),
    }
    target.close().unwrap();
    check_clean(&path);
    (done, left)
}

#[test]
fn what_can_not_be_copied_is_refused_before_anything_is_written() {
    let tmp = Tmp::in_memory("copy-refused");
    let (a, b) = (tmp.join("a.qcow2"), tmp.join("b.qcow2"));
    create(&a, "qcow2", 1 << 20, &[]);
    create(&b, "qcow2", (1 << 20) - 1, &[]);
    let (source, target) = (open(&a, RW), open(&b, RW));
    source.write_at(&[1; 100_000], 0, NONE).unwrap();
    let refused = |from: &Image, to: &Image, how: &[(&str, &str)], errno: i32, word: &str| {
        let e = copy(from, to, &options(how), false, Progress::NONE).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(errno), "{e}");
        assert!(e.to_string().contains(word), "{e}");
    };
    refused(&source, &target, &[], libc::EINVAL, "too few");
    assert!(read_all(&target).iter().all(|b| *b == 0));
    refused(&source, &source, &[], libc::EINVAL, "the target is the source");
    let context = source.context(&Options::new(), RW).unwrap();
    refused(&source, &context, &[], libc::EINVAL, "the target is the source");
    target.resize(2 << 20, &Options::new(), false).unwrap();
    refused(&source, &target, &[("threads", "0")], libc::EINVAL, "threads");
    refused(&source, &target, &[("sparse", "100")], libc::EINVAL, "4096");
    refused(&source, &target, &[("cluster-size", "64k")], libc::EINVAL, "copying");
    let raw = tmp.join("c.raw");
    create(&raw, "raw", 1 << 20, &[]);
    let raw = open_with(&raw, &options(&[("format", "raw")]), RW);
    refused(&source, &raw, &[("compress", "on")], libc::ENOTSUP, "compressed writes");
    assert!(read_all(&raw).iter().all(|b| *b == 0));
    // A larger target keeps what it has beyond.
    target.write_at(&[9; 1 << 20], 1 << 20, NONE).unwrap();
    copy_all(&source, &target, &[("compress", "on")]);
    assert_same(&read_range(&target, 0, 1 << 20), &read_all(&source), 0, "copied");
    assert!(read_range(&target, 1 << 20, 1 << 20).iter().all(|b| *b == 9));
    // A target that is below the source.
    let over = tmp.join("over.qcow2");
    drop(target);
    create(&over, "qcow2", 1 << 20, &[("backing-file", "b.qcow2")]);
    let over = open(&over, RO);
    let below = open(&b, OpenFlags(RW.0 | OpenFlags::NO_LOCK.0));
    refused(&over, &below, &[], libc::EINVAL, "part of its chain");
}

#[test]
fn a_damaged_source_ends_the_copy_with_its_error() {
    let tmp = Tmp::in_memory("copy-damaged");
    let (a, b) = (tmp.join("a.qcow2"), tmp.join("b.raw"));
    let size = 8 << 20;
    create(&a, "qcow2", size, &[]);
    let image = open(&a, RW);
    for at in (0..size).step_by(65536) {
        image.write_compressed(qblk::block::OneIov::src(&vec![at as u8; 65536]).iov(), at).unwrap();
    }
    image.close().unwrap();
    // The compressed form of some cluster is noise.
    let l1 = peek_u64(&a, 40);
    let l2 = peek_u64(&a, l1) & 0x00ff_ffff_ffff_fe00;
    let entry = peek_u64(&a, l2 + 8 * 70);
    assert_ne!(entry & 1 << 62, 0);
    poke(&a, entry & ((1 << 54) - 1), &[0xff; 40]);
    create(&b, "raw", size, &[]);
    let source = open(&a, RO);
    let target = open_with(&b, &options(&[("format", "raw")]), RW);
    let e = copy(&source, &target, &Options::new(), false, Progress::NONE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    assert!(e.to_string().contains("compressed cluster"), "{e}");
}
