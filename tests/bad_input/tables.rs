//! L1, L2 and refcount tables that are wrong: an error for what they say, no panic, no end without
//! an end, and the rest of the image as usable as before.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::common::*;
use qblk::block::ErrorKind;
use qblk::{OpenFlags, Options, ReqFlags};

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// An image with clusters 0 to 3 written: its path, where the L1 table is and where the L2 table.
fn written(dir: &Tmp, compat: &str) -> (PathBuf, u64, u64) {
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, &[("compat", compat)]);
    let image = open(&path, RW);
    image.write_at(&[0x11; 4 * CLUSTER as usize], 0, NONE).unwrap();
    image.close().unwrap();
    let l1 = peek_u64(&path, 40);
    let l2 = peek_u64(&path, l1) & MASK;
    assert_ne!(l2, 0);
    (path, l1, l2)
}

/// Everything that touches `at` is answered with ECORRUPT that has these words, and leaves the tables as
/// they were; through a writable handle it also fences the image.
fn corrupt_at(path: &Path, at: u64, words: &[&str]) {
    let before = fs::read(path).unwrap();
    let copy = path.with_extension("copy");
    type Touch = fn(&qblk::Image, u64) -> Result<(), qblk::Error>;
    let reads: [(&str, Touch); 3] = [
        ("read", |image, at| image.read_at(&mut [0; 100], at + 50)),
        ("whole read", |image, _| image.read_at(&mut vec![0; 1 << 20], 0)),
        ("extents", |image, at| {
            image.extents(at, CLUSTER, &mut [qblk::Extent::default(); 64]).map(drop)
        }),
    ];
    let writes: [(&str, Touch); 4] = [
        ("write", |image, at| image.write_at(&[1; 100], at + 50, NONE)),
        ("whole write", |image, at| image.write_at(&[1; CLUSTER as usize], at, NONE)),
        ("zero", |image, at| image.zero(at, CLUSTER, ReqFlags::MAY_TRIM)),
        ("trim", |image, at| image.trim(at, CLUSTER, NONE)),
    ];
    for flags in [RO, RW] {
        let writes = if flags == RW { &writes[..] } else { &[] };
        for (what, touch) in reads.iter().chain(writes) {
            fs::copy(path, &copy).unwrap();
            let image = open(&copy, flags);
            match touch(&image, at) {
                Ok(()) => panic!("{what} at {at} succeeded, should say {words:?}"),
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
                    for word in words {
                        assert!(e.to_string().contains(word), "{what}: {word:?} not in: {e}");
                    }
                }
            }
            let fenced = flags == RW && image.write_at(&[1; 1], 9 * CLUSTER, NONE).is_err();
            if !fenced {
                assert_eq!(flags, RO, "{what}");
                continue;
            }
            is_fenced(&copy, image);
            // What was refused left the tables as they were, but for the mark.
            let mut after = fs::read(&copy).unwrap();
            after[72..80].copy_from_slice(&before[72..80]);
            let n = before.len().min(after.len());
            assert_same(&after[..n], &before[..n], 0, "after refusals");
        }
    }
}

/// Nothing is written to it any more, and whoever opens it next is told.
fn is_fenced(path: &Path, image: qblk::Image) {
    for e in [image.write_at(&[1; 1], 0, NONE), image.flush(), image.trim(0, CLUSTER, NONE)] {
        let e = e.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        assert!(e.to_string().contains("refuses writes"), "{e}");
    }
    assert_eq!(image.close().unwrap_err().kind(), ErrorKind::Corrupt);
    if peek_u32(path, 4) >= 3 {
        assert_eq!(peek_u64(path, 72) & 2, 2, "the mark");
        let e = open_error(path, &Options::new(), RW);
        assert!(e.to_string().contains("marked as corrupt"), "{e}");
        assert_ne!(open(path, RO).info().unwrap().state & qblk::image::state::CORRUPT, 0);
    }
}

#[test]
fn wrong_l2_entries_are_reported() {
    for (compat, entry, word) in [
        ("1.1", COPIED | (5 * CLUSTER) | 2, "reserved"),
        ("1.1", COPIED | (5 * CLUSTER) | (1 << 56), "reserved"),
        ("1.1", (1 << 61) | (5 * CLUSTER), "reserved"),
        ("1.1", COPIED | (5 * CLUSTER + 512), "multiple of the cluster size"),
        ("0.10", COPIED | (5 * CLUSTER) | 1, "zero flag"),
        ("0.10", 1, "zero flag"),
        ("1.1", COPIED | COMPRESSED | (5 * CLUSTER), "compressed"),
    ] {
        let dir = Tmp::in_memory("l2");
        let (path, _, l2) = written(&dir, compat);
        poke(&path, l2 + 8, &u64::to_be_bytes(entry));
        // (A cache marks what is wrong in the last digit.)
        let found = format!("{entry:#018x}");
        corrupt_at(&path, CLUSTER, &[word, &found[..17], "0x10000"]);
        // Its neighbours are as before.
        let image = open(&path, RW);
        assert_eq!(read_range(&image, 0, 100), [0x11; 100]);
        image.write_at(&[0x22; 100], 2 * CLUSTER, NONE).unwrap();
        image.write_at(&[0x23; 100], 9 * CLUSTER, NONE).unwrap();
        image.close().unwrap();
    }
}

#[test]
fn wrong_l1_entries_are_reported() {
    for (entry, word) in [
        (COPIED | (4 * CLUSTER) | 1, "reserved"),
        (COPIED | (4 * CLUSTER) | (1 << 60), "reserved"),
        (COPIED | (4 * CLUSTER + 1024), "multiple of the cluster size"),
    ] {
        let dir = Tmp::in_memory("l1");
        let (path, l1, _) = written(&dir, "1.1");
        poke(&path, l1, &entry.to_be_bytes());
        corrupt_at(&path, CLUSTER, &[word, &format!("{entry:#018x}"), "L1 entry 0"]);
    }
}

#[test]
fn what_lies_past_the_end_of_the_file_is_reported() {
    let far = 1u64 << 40;
    let dir = Tmp::in_memory("past");
    let (path, _, l2) = written(&dir, "1.1");
    poke(&path, l2 + 8, &(COPIED | far).to_be_bytes());
    let image = open(&path, RW);
    for e in [image.read_at(&mut [0; 10], CLUSTER), image.write_at(&[0; 10], CLUSTER, NONE)] {
        let e = e.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        assert!(e.to_string().contains("0x10000000000"), "{e}");
    }
    assert!(fs::metadata(&path).unwrap().len() < far, "the write made the file longer");
    drop(image);

    let (path, _, l2) = written(&dir, "1.1");
    poke(&path, l2 + 8, &(COMPRESSED | far).to_be_bytes());
    let image = open(&path, RO);
    let e = image.read_at(&mut [0; 10], CLUSTER).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    assert!(e.to_string().contains("compressed cluster"), "{e}");
    drop(image);

    let (path, l1, _) = written(&dir, "1.1");
    poke(&path, l1, &(COPIED | far).to_be_bytes());
    corrupt_at(&path, 0, &["L2 table", "0x1000000", "past the end"]);
}

#[test]
fn wrong_refcount_tables_are_reported_before_anything_is_written() {
    let dir = Tmp::in_memory("refcounts");
    let table = CLUSTER;
    for (entry, word) in [
        (2 * CLUSTER + 512, "multiple of the cluster size"),
        ((1 << 56) | (2 * CLUSTER), "2^56"),
        (2 * CLUSTER + 1, "multiple of the cluster size"),
    ] {
        let (path, ..) = written(&dir, "1.1");
        poke(&path, table, &u64::to_be_bytes(entry));
        let e = open_error(&path, &Options::new(), RW);
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        let found = format!("{entry:#x}");
        assert!(e.to_string().contains(word) && e.to_string().contains(&found), "{e}");
        // Reading needs no refcounts.
        assert_eq!(read_range(&open(&path, RO), 0, 10), [0x11; 10]);
    }
    // A block past the end of the file: found when it is needed.
    let (path, ..) = written(&dir, "1.1");
    poke(&path, table, &(1u64 << 40).to_be_bytes());
    let image = open(&path, RW);
    let e = image.write_at(&[1; 10], 8 * CLUSTER, NONE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    assert!(e.to_string().contains("refcount block"), "{e}");
    assert_eq!(read_range(&image, 0, 10), [0x11; 10]);
    is_fenced(&path, image);
    assert!(fs::metadata(&path).unwrap().len() < 1 << 30);
}

/// Use an image in every way, whatever comes of it, and soon.
fn use_it(path: &Path, rng: &mut Rng) {
    let begin = Instant::now();
    for flags in [RO, RW, RW | OpenFlags::NO_BACKING] {
        let opened = qblk::Image::open(path.as_os_str(), &options(&[("format", "qcow2")]), flags);
        let Ok(image) = opened else { continue };
        let size = image.size().unwrap();
        for _ in 0..12 {
            let at = rng.below(size);
            let n = rng.below(3 * CLUSTER).min(size - at);
            let _ = match rng.below(6) {
                0 => image.write_at(&vec![1; n as usize], at, NONE),
                1 => image.zero(at, n, rng.pick(&[NONE, ReqFlags::MAY_TRIM])),
                2 => image.trim(at, n, NONE),
                3 => image.flush(),
                4 => image.extents(at, n, &mut [qblk::Extent::default(); 8]).map(drop),
                _ => image.read_at(&mut vec![0; n as usize], at),
            };
        }
        let _ = image.resize(size + (1 << 20), &Options::new(), false);
        let _ = image.close();
    }
    assert!(begin.elapsed() < Duration::from_secs(10), "took {:?}", begin.elapsed());
}

#[test]
fn tables_that_point_at_tables_do_no_harm_to_the_program() {
    let mut rng = Rng::new(11);
    let dir = Tmp::in_memory("loops");
    for owned in [0, COPIED] {
        let (path, l1, l2) = written(&dir, "1.1");
        let targets = [0, CLUSTER, 2 * CLUSTER, l1, l2];
        for target in targets {
            // L2 tables that are the header, the refcounts, the L1 table, or in use twice.
            fs::copy(&path, dir.join("copy")).unwrap();
            poke(&dir.join("copy"), l1, &(owned | target).to_be_bytes());
            use_it(&dir.join("copy"), &mut rng);
            // Data clusters that are such.
            fs::copy(&path, dir.join("copy")).unwrap();
            for i in 0..16 {
                poke(&dir.join("copy"), l2 + 8 * i, &(owned | target).to_be_bytes());
            }
            use_it(&dir.join("copy"), &mut rng);
            // Refcount blocks that are such.
            fs::copy(&path, dir.join("copy")).unwrap();
            poke(&dir.join("copy"), CLUSTER, &target.to_be_bytes());
            use_it(&dir.join("copy"), &mut rng);
        }
        // A refcount table that is the header, the L1 table.
        for target in targets {
            fs::copy(&path, dir.join("copy")).unwrap();
            poke(&dir.join("copy"), 48, &target.to_be_bytes());
            use_it(&dir.join("copy"), &mut rng);
            fs::copy(&path, dir.join("copy")).unwrap();
            poke(&dir.join("copy"), 40, &target.to_be_bytes());
            use_it(&dir.join("copy"), &mut rng);
        }
    }
}

#[test]
fn random_tables_do_no_harm_to_the_program() {
    let mut rng = Rng::new(seed("random tables"));
    let dir = Tmp::in_memory("random-tables");
    let (path, l1, l2) = written(&dir, "1.1");
    let sound = fs::read(&path).unwrap();
    let end = deadline(10);
    while Instant::now() < end {
        let mut bytes = sound.clone();
        for _ in 0..rng.range(1, 20) {
            let table = rng.pick(&[l1, l2, l2, CLUSTER, 2 * CLUSTER]);
            let at = (table + 8 * rng.below(20)) as usize;
            let value = match rng.below(5) {
                0 => rng.next(),
                1 => rng.below(12) * CLUSTER,
                2 => COPIED | (rng.below(12) * CLUSTER),
                3 => COMPRESSED | rng.below(1 << 20) | (rng.below(256) << 54),
                _ => COPIED | (rng.next() & MASK),
            };
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        fs::write(&path, &bytes).unwrap();
        use_it(&path, &mut rng);
        let len = fs::metadata(&path).unwrap().len();
        assert!(len < 1 << 57, "the file has {len} bytes");
    }
}
