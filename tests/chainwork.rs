//! Commit and rebase: what a chain reads as stays the same, QEMU agrees, and whatever fails or is stopped
//! leaves the images whole.

mod common;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::*};

use common::*;
use qblk::block::{ErrorKind, Progress};
use qblk::{Extent, Image, Options};

/// Random writes and zeroes, to the image and to what it should read as.
fn age(image: &Image, rng: &mut Rng, model: &mut [u8], times: u64) {
    let size = model.len() as u64;
    for _ in 0..times {
        let at = rng.below(size);
        let n = (rng.below(150_000) + 1).min(size - at);
        let (from, to) = (at as usize, (at + n) as usize);
        match rng.below(4) {
            0 => {
                image.zero(at, n, NONE).unwrap();
                model[from..to].fill(0);
            }
            _ => {
                let bytes = match rng.below(3) {
                    0 => vec![0; n as usize],
                    _ => rng.bytes(n as usize),
                };
                image.write_at(&bytes, at, NONE).unwrap();
                model[from..to].copy_from_slice(&bytes);
            }
        }
    }
}

/// A new image, over `below` if there is one, aged; what it reads as.
fn layer(
    path: &Path,
    format: &str,
    size: usize,
    below: Option<(&Path, &[u8])>,
    rng: &mut Rng,
    how: &[(&str, &str)],
) -> Vec<u8> {
    let mut model = vec![0; size];
    let mut how = how.to_vec();
    let name = below.map(|b| b.0.file_name().unwrap().to_str().unwrap().to_owned());
    if let (Some(name), Some((_, under))) = (&name, below) {
        how.push(("backing-file", name));
        how.push(("backing-fmt", if name.ends_with(".raw") { "raw" } else { "qcow2" }));
        let n = size.min(under.len());
        model[..n].copy_from_slice(&under[..n]);
    }
    create(path, format, size as u64, &how);
    let image = open_with(path, &options(&[("format", format)]), RW);
    age(&image, rng, &mut model, 12);
    image.close().unwrap();
    model
}

fn equal(path: &Path, model: &[u8], tmp: &Tmp) {
    let format = if path.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
    if format == "qcow2" {
        check_clean(path);
    }
    check_same(path, format, model, &tmp.join("scratch"));
}

fn own_bytes(image: &Image) -> u64 {
    let all = all_extents(image, 0, image.size().unwrap(), 64);
    all.iter().filter(|e| e.has(Extent::ALLOCATED)).map(|e| e.length).sum()
}

#[test]
fn a_commit_moves_everything_one_image_down() {
    let tmp = Tmp::in_memory("commit");
    let mut rng = Rng::new(seed("commit"));
    watch_log();
    let sizes = [(4 << 20, 4 << 20), (3 << 20, 5 << 20), (5 << 20, 3 << 20)];
    for (base_kind, how) in [("base.raw", &[][..]), ("base.qcow2", &[("cluster-size", "4k")])] {
        for (below, size) in sizes {
            for (compat, keep) in [("1.1", false), ("0.10", false), ("1.1", true)] {
                let (base, top) = (tmp.join(base_kind), tmp.join("top.qcow2"));
                let format = if base_kind.ends_with("raw") { "raw" } else { "qcow2" };
                let under = layer(&base, format, below, None, &mut rng, how);
                let mut model = layer(
                    &top,
                    "qcow2",
                    size,
                    Some((&base, &under)),
                    &mut rng,
                    &[("compat", compat)],
                );
                let image = open(&top, RW);
                let context = image.context(&Options::new(), RO).unwrap();
                age(&image, &mut rng, &mut model, 5);
                image.commit(keep, Progress::NONE).unwrap();
                assert_same(&read_all(&image), &model, 0, "after the commit");
                assert_same(&read_all(&context), &model, 0, "by another context");
                if !keep {
                    assert_eq!(own_bytes(&image), 0);
                }
                // It goes on as an image.
                let before = model.clone();
                age(&image, &mut rng, &mut model, 5);
                drop(context);
                image.close().unwrap();
                equal(&top, &model, &tmp);
                let mut expect = before;
                // What the longer base has beyond the overlay stays.
                expect.extend_from_slice(under.get(size..).unwrap_or_default());
                equal(&base, &expect, &tmp);
                let on_host = on_disk(&top);
                let again = open(&top, RW);
                again.commit(false, Progress::NONE).unwrap();
                again.close().unwrap();
                assert!(on_disk(&top) <= 400 << 10, "{on_host} and then {}", on_disk(&top));
                equal(&top, &model, &tmp);
            }
        }
    }
    assert_nothing_logged();
}

#[test]
fn a_commit_in_the_middle_of_a_chain_leaves_what_is_below() {
    let tmp = Tmp::in_memory("commit-chain");
    let mut rng = Rng::new(seed("commit-chain"));
    let size = 2 << 20;
    let paths: Vec<PathBuf> = (0..4)
        .map(|i| tmp.join(if i == 0 { "0.raw".into() } else { format!("{i}.qcow2") }))
        .collect();
    let mut models = vec![layer(&paths[0], "raw", size, None, &mut rng, &[])];
    for i in 1..4 {
        let below = (paths[i - 1].as_path(), &models[i - 1].clone()[..]);
        models.push(layer(&paths[i], "qcow2", size, Some(below), &mut rng, &[]));
    }
    let image = open(&paths[3], RW);
    image.commit(false, Progress::NONE).unwrap();
    image.close().unwrap();
    equal(&paths[3], &models[3], &tmp);
    equal(&paths[2], &models[3], &tmp);
    equal(&paths[1], &models[1], &tmp);
    equal(&paths[0], &models[0], &tmp);
    // QEMU commits what is left to commit, and we go on from there.
    qemu_img!("commit", "-f", "qcow2", paths[2]);
    let image = open(&paths[3], RW);
    assert_same(&read_all(&image), &models[3], 0, "after QEMU's");
    image.close().unwrap();
    equal(&paths[1], &models[3], &tmp);
}

#[test]
fn a_commit_that_can_not_be_is_refused_and_all_goes_on() {
    let tmp = Tmp::in_memory("commit-refused");
    let mut rng = Rng::new(7);
    let (base, top, other) = (tmp.join("base.raw"), tmp.join("top.qcow2"), tmp.join("other.qcow2"));
    let under = layer(&base, "raw", 1 << 20, None, &mut rng, &[]);
    let model = layer(&top, "qcow2", 1 << 20, Some((&base, &under)), &mut rng, &[]);
    layer(&other, "qcow2", 1 << 20, Some((&base, &under)), &mut rng, &[]);
    let refused = |image: &Image, kind: ErrorKind, word: &str| {
        let e = image.commit(false, Progress::NONE).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(word), "{e}");
    };
    // Somebody else stands on it.
    let neighbour = open(&other, RO);
    let image = open(&top, RW);
    refused(&image, ErrorKind::Locked, "base.raw");
    assert_same(&read_all(&image), &model, 0, "it goes on");
    image.write_at(&[1; 10], 0, NONE).unwrap();
    image.write_at(&model[..10], 0, NONE).unwrap();
    drop(neighbour);
    // The image below was locked again as it was: nobody else may write it.
    let e = open_error(&base, &options(&[("format", "raw")]), RW);
    assert_eq!(e.kind(), ErrorKind::Locked, "{e}");
    // Stopped at once and midway.
    for after in [0, 1] {
        let calls = AtomicU64::new(0);
        let tell = |_, _| calls.fetch_add(1, Relaxed) < after;
        let e = image.commit(false, Progress::new(&tell)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ECANCELED), "{e}");
        assert_same(&read_all(&image), &model, 0, "stopped");
    }
    image.commit(false, Progress::NONE).unwrap();
    image.close().unwrap();
    equal(&base, &model, &tmp);
    equal(&top, &model, &tmp);

    let image = open(&top, RO);
    refused(&image, ErrorKind::Errno(libc::EROFS), "read-only");
    drop(image);
    let lone = tmp.join("lone.qcow2");
    create(&lone, "qcow2", 1 << 20, &[]);
    refused(&open(&lone, RW), ErrorKind::Errno(libc::EINVAL), "no backing");
    let image = open(&top, RW | qblk::OpenFlags::NO_BACKING);
    refused(&image, ErrorKind::Errno(libc::EINVAL), "no backing");
}

fn rebase(image: &Image, name: &str, how: &[(&str, &str)], blind: bool) -> Result<(), qblk::Error> {
    image.rebase(OsStr::new(name), &options(how), blind, Progress::NONE)
}

#[test]
fn a_safe_rebase_changes_nothing_that_is_read() {
    let tmp = Tmp::in_memory("rebase");
    let mut rng = Rng::new(seed("rebase"));
    watch_log();
    for round in 0..12 {
        let compat = if round % 3 == 2 { "0.10" } else { "1.1" };
        let cluster = rng.pick(&["512", "4k", "64k"]);
        let subclusters = round % 4 == 1 && compat == "1.1";
        let (cluster, extended) = if subclusters { ("16k", "on") } else { (cluster, "off") };
        let mut size = || (rng.range(1, 6) << 19) as usize;
        let (a, b, c) = (size(), size(), size());
        let (first, second, top) = (tmp.join("a.raw"), tmp.join("b.qcow2"), tmp.join("top.qcow2"));
        let under = layer(&first, "raw", a, None, &mut rng, &[]);
        let beside = match round % 2 {
            0 => layer(&second, "qcow2", b, None, &mut rng, &[]),
            _ => layer(&second, "qcow2", b, Some((&first, &under)), &mut rng, &[]),
        };
        let lazy = if round % 3 == 1 { "on" } else { "off" };
        let mut model = layer(
            &top,
            "qcow2",
            c,
            Some((&first, &under)),
            &mut rng,
            &[
                ("lazy-refcounts", lazy),
                ("compat", compat),
                ("cluster-size", cluster),
                ("extended-l2", extended),
            ],
        );
        if compat == "1.1" {
            qemu_img!("bitmap", "--add", "-f", "qcow2", top, "changes");
        }
        let image = open(&top, RW);
        age(&image, &mut rng, &mut model, 3);
        // To another, to none, and back to the first.
        for (name, named) in [("b.qcow2", "b.qcow2"), ("", ""), ("a.raw", "a.raw")] {
            let how: &[_] = if name == "a.raw" { &[("backing-fmt", "raw")] } else { &[] };
            rebase(&image, name, how, false).unwrap();
            assert_same(&read_all(&image), &model, 0, name);
            let found = image.property("backing-filename").unwrap().unwrap_or_default();
            assert_eq!(String::from_utf8_lossy(&found), named);
            image.flush().unwrap();
            std::fs::copy(&top, tmp.join("now.qcow2")).unwrap();
            check_no_corruption(&tmp.join("now.qcow2"));
            age(&image, &mut rng, &mut model, 2);
        }
        image.close().unwrap();
        equal(&top, &model, &tmp);
        equal(&second, &beside, &tmp);
        equal(&first, &under, &tmp);
        if compat == "1.1" {
            let info = qemu_img!("info", "-f", "qcow2", top);
            assert!(info.contains("changes") && !info.contains("in-use"), "{info}");
        }
        // QEMU does the same to it, and we agree.
        qemu_img!("rebase", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", top);
        let image = open(&top, RW);
        assert_same(&read_all(&image), &model, 0, "after QEMU's");
        rebase(&image, "", &[], false).unwrap();
        image.close().unwrap();
        std::fs::remove_file(&first).unwrap();
        equal(&top, &model, &tmp);
    }
    assert_nothing_logged();
}

#[test]
fn a_rebase_to_an_image_further_down_copies_only_what_lies_between() {
    let tmp = Tmp::in_memory("rebase-down");
    let mut rng = Rng::new(seed("rebase-down"));
    let size = 8 << 20;
    let (base, middle, top) = (tmp.join("0.raw"), tmp.join("1.qcow2"), tmp.join("2.qcow2"));
    for middle_size in [size, size / 2] {
        let under = layer(&base, "raw", size, None, &mut rng, &[]);
        let between = layer(&middle, "qcow2", middle_size, Some((&base, &under)), &mut rng, &[]);
        let model = layer(&top, "qcow2", size, Some((&middle, &between)), &mut rng, &[]);
        let image = open(&middle, RO);
        let moved = own_bytes(&image) + (size - middle_size) as u64;
        drop(image);
        let image = open(&top, RW);
        let had = own_bytes(&image);
        rebase(&image, "0.raw", &[("backing-fmt", "raw")], false).unwrap();
        assert_same(&read_all(&image), &model, 0, "over what was two below");
        assert!(own_bytes(&image) <= had + moved, "{} and {had} + {moved}", own_bytes(&image));
        image.close().unwrap();
        equal(&top, &model, &tmp);
    }
}

#[test]
fn an_unsafe_rebase_changes_the_name_only() {
    let tmp = Tmp::in_memory("rebase-unsafe");
    let mut rng = Rng::new(3);
    let (a, b, top) = (tmp.join("a.raw"), tmp.join("b.raw"), tmp.join("top.qcow2"));
    let under = layer(&a, "raw", 1 << 20, None, &mut rng, &[]);
    let model = layer(&top, "qcow2", 1 << 20, Some((&a, &under)), &mut rng, &[]);
    std::fs::rename(&a, &b).unwrap();
    let alone = qblk::OpenFlags::NO_BACKING;
    let image = open(&top, RW | alone);
    // Not there, and of no known format; then not there.
    let e = rebase(&image, "c.raw", &[], true).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    rebase(&image, "c.raw", &[("backing-fmt", "qcow2")], true).unwrap();
    let property = |key| String::from_utf8(image.property(key).unwrap().unwrap()).unwrap();
    assert_eq!(
        (property("backing-filename"), property("backing-format")),
        ("c.raw".into(), "qcow2".into())
    );
    rebase(&image, "b.raw", &[("backing-fmt", "raw")], true).unwrap();
    image.close().unwrap();
    equal(&top, &model, &tmp);
    let image = open(&top, RW);
    assert_same(&read_all(&image), &model, 0, "moved");
    // The handle goes on with what it can open.
    rebase(&image, "nowhere.raw", &[("backing-fmt", "raw")], true).unwrap();
    assert_same(&read_all(&image), &model, 0, "the old one");
    rebase(&image, "b.raw", &[("backing-fmt", "raw")], true).unwrap();
    image.close().unwrap();
    equal(&top, &model, &tmp);
}

#[test]
fn amending_after_an_unsafe_rebase_goes_by_what_is_recorded() {
    let tmp = Tmp::in_memory("rebase-amend");
    let (path, aside) = (tmp.join("top.qcow2"), tmp.join("aside"));
    std::fs::write(tmp.join("a.raw"), vec![0xa; 1 << 20]).unwrap();
    let set = |image: &Image, format: &str| {
        image.amend(&options(&[("backing-fmt", format)]), Progress::NONE)
    };
    let recorded = || {
        let image = open(&path, qblk::OpenFlags::INFO_ONLY);
        let text =
            |key| String::from_utf8(image.property(key).unwrap().unwrap_or_default()).unwrap();
        (text("backing-filename"), text("backing-format"))
    };
    // It stood on nothing, and goes on so: what it is to stand on is still to come.
    create(&path, "qcow2", 1 << 20, &[]);
    let image = open(&path, RW);
    set(&image, "raw").unwrap_err();
    rebase(&image, "b.raw", &[("backing-fmt", "qcow2")], true).unwrap();
    assert_eq!(read_range(&image, 0, 1), [0]);
    std::fs::rename(tmp.join("a.raw"), tmp.join("b.raw")).unwrap();
    set(&image, "raw").unwrap();
    assert_eq!(recorded(), ("b.raw".into(), "raw".into()));
    assert_eq!(read_range(&image, 0, 1), [0xa]);
    // It stood on something, which it names no more; it could not be opened without.
    std::fs::rename(&path, &aside).unwrap();
    rebase(&image, "", &[], true).unwrap();
    std::fs::rename(&aside, &path).unwrap();
    assert_eq!(read_range(&image, 0, 1), [0xa]);
    assert_eq!(recorded().0, "");
    let e = set(&image, "raw").unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    assert!(e.to_string().contains("'backing-fmt'"), "{e}");
    image.write_at(&[1], 0, NONE).unwrap();
    image.close().unwrap();
    assert_eq!(recorded(), (String::new(), String::new()));
    check_clean(&path);
}

#[test]
fn a_rebase_that_can_not_be_is_refused_and_all_goes_on() {
    let tmp = Tmp::in_memory("rebase-refused");
    let mut rng = Rng::new(11);
    let (a, b, top) = (tmp.join("a.raw"), tmp.join("b.qcow2"), tmp.join("top.qcow2"));
    let under = layer(&a, "raw", 4 << 20, None, &mut rng, &[]);
    let model = layer(&top, "qcow2", 4 << 20, Some((&a, &under)), &mut rng, &[]);
    let image = open(&top, RW);
    let refused = |name: &str, how: &[(&str, &str)], kind: ErrorKind, word: &str| {
        let e = rebase(&image, name, how, false).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(word), "{e}");
        assert_same(&read_all(&image), &model, 0, word);
        let named = image.property("backing-filename").unwrap().unwrap();
        assert_eq!(named, b"a.raw");
    };
    let einval = ErrorKind::Errno(libc::EINVAL);
    refused("none", &[], ErrorKind::Errno(libc::ENOENT), "none");
    refused("", &[("backing-fmt", "raw")], einval, "backing-fmt");
    refused("a.raw", &[("backing-file", "x")], einval, "rebasing");
    refused("a.raw", &[("backing-fmt", "vmdk")], einval, "vmdk");
    refused("a.raw", &[("backing-fmt", "qcow2")], ErrorKind::Format, "a.raw");
    // Itself, and what stands on it.
    let e = rebase(&image, "top.qcow2", &[], false).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Locked, "{e}");
    create(&b, "qcow2", 1 << 20, &[]);
    qemu_img!("rebase", "-u", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", b);
    let e = rebase(&image, "b.qcow2", &[], false).unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::Locked | ErrorKind::Policy), "{e}");
    let e = rebase(&image, "b.qcow2", &[], true).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Policy, "{e}");
    // A name that is too long.
    let long = "x".repeat(2000);
    let e = rebase(&image, &long, &[("backing-fmt", "raw")], true).unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::Errno(libc::EINVAL | libc::ENAMETOOLONG)), "{e}");
    // Stopped.
    let tell = |_, _| false;
    let e = image.rebase(OsStr::new(""), &Options::new(), false, Progress::new(&tell)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ECANCELED), "{e}");
    assert_same(&read_all(&image), &model, 0, "stopped");
    image.close().unwrap();
    equal(&top, &model, &tmp);
    // Without its chain nothing is known of what it holds.
    let image = open(&top, RW | qblk::OpenFlags::NO_BACKING);
    let e = rebase(&image, "", &[], false).unwrap_err();
    assert_eq!(e.kind(), einval, "{e}");
    drop(image);
    let raw = open_with(&a, &options(&[("format", "raw")]), RW);
    let e = rebase(&raw, "", &[], false).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOTSUP), "{e}");
}

#[test]
fn other_threads_wait_for_a_commit_and_go_on() {
    let tmp = Tmp::in_memory("commit-threads");
    let mut rng = Rng::new(23);
    let (base, top) = (tmp.join("base.raw"), tmp.join("top.qcow2"));
    let (size, threads) = (8 << 20, 4);
    let under = layer(&base, "raw", size, None, &mut rng, &[]);
    let model = layer(&top, "qcow2", size, Some((&base, &under)), &mut rng, &[]);
    let image = open(&top, RW);
    let share = size / threads;
    let parts: Vec<Vec<u8>> = std::thread::scope(|s| {
        let writers: Vec<_> = (0..threads)
            .map(|t| {
                let (image, mut part) = (&image, model[t * share..(t + 1) * share].to_vec());
                s.spawn(move || {
                    let mut rng = Rng::new(t as u64 + 100);
                    for _ in 0..150 {
                        let at = rng.below(share as u64 - 10_000) as usize;
                        let bytes = rng.bytes(10_000);
                        image.write_at(&bytes, (t * share + at) as u64, NONE).unwrap();
                        part[at..at + 10_000].copy_from_slice(&bytes);
                        let got = read_range(image, (t * share) as u64, share as u64);
                        assert_same(&got, &part, 0, "meanwhile");
                    }
                    part
                })
            })
            .collect();
        for _ in 0..3 {
            image.commit(false, Progress::NONE).unwrap();
            rebase(&image, "", &[], false).unwrap();
            rebase(&image, "base.raw", &[("backing-fmt", "raw")], false).unwrap();
        }
        writers.into_iter().map(|w| w.join().unwrap()).collect()
    });
    image.close().unwrap();
    equal(&top, &parts.concat(), &tmp);
}

/// Zeroes that were acknowledged after the image had been put on a file that is not there yet were lost:
/// they read so already, as there was nothing below.
#[test]
fn zeroes_last_over_a_backing_file_that_is_still_to_come() {
    let tmp = Tmp::in_memory("rebase-to-come");
    let size = 1 << 20;
    for compat in ["1.1", "0.10"] {
        let (top, later) = (tmp.join("top.qcow2"), tmp.join("later.raw"));
        create(&top, "qcow2", size, &[("compat", compat)]);
        let image = open(&top, RW);
        rebase(&image, "later.raw", &[("backing-fmt", "raw")], true).unwrap();
        image.zero(0, 256 << 10, NONE).unwrap();
        image.zero(300_000, 100_000, qblk::ReqFlags::MAY_TRIM).unwrap();
        // Once more: it is not forgotten that the first has been named.
        rebase(&image, "", &[], false).unwrap();
        rebase(&image, "later.raw", &[("backing-fmt", "raw")], true).unwrap();
        image.zero(512 << 10, 64 << 10, NONE).unwrap();
        image.write_at(&[0; 1000], 600_000, NONE).unwrap();
        image.resize(size + (128 << 10), &Options::new(), false).unwrap();
        image.close().unwrap();
        std::fs::write(&later, vec![5; size as usize * 2]).unwrap();
        check_clean(&top);
        let image = open(&top, RO);
        let bytes = read_all(&image);
        let zero =
            |from: usize, to: usize| assert_same(&bytes[from..to], &vec![0; to - from], 0, compat);
        zero(0, 256 << 10);
        zero(300_000, 400_000);
        zero(512 << 10, 576 << 10);
        zero(600_000, 601_000);
        zero(size as usize, bytes.len());
        assert_eq!(bytes[size as usize - 1], 5, "what has nothing shows what is below");
        drop(image);
        std::fs::remove_file(&later).unwrap();
    }
}

/// The same file in another format is not what was below.
#[test]
fn a_rebase_onto_what_is_below_in_another_format_changes_nothing_that_is_read() {
    let tmp = Tmp::in_memory("rebase-format");
    let mut rng = Rng::new(17);
    let size = 1 << 20;
    let (base, top) = (tmp.join("base.qcow2"), tmp.join("top.qcow2"));
    let under = layer(&base, "qcow2", size, None, &mut rng, &[]);
    let model = layer(&top, "qcow2", size, Some((&base, &under)), &mut rng, &[]);
    let image = open(&top, RW);
    rebase(&image, "base.qcow2", &[("backing-fmt", "raw")], false).unwrap();
    assert_same(&read_all(&image), &model, 0, "over the raw bytes of what was below");
    image.close().unwrap();
    equal(&top, &model, &tmp);
}

/// An image below that an option had put upon another than it names is not the same by its name.
#[test]
fn a_rebase_onto_what_an_option_stood_on_something_else_changes_nothing_that_is_read() {
    let tmp = Tmp::in_memory("rebase-option");
    let size = 1 << 20;
    for (name, value) in [("named.raw", 1), ("given.raw", 2)] {
        std::fs::write(tmp.join(name), vec![value; size]).unwrap();
    }
    for (name, below, format, at) in
        [("middle.qcow2", "named.raw", "raw", 0), ("top.qcow2", "middle.qcow2", "qcow2", 256 << 10)]
    {
        let how = [("backing-file", below), ("backing-fmt", format)];
        create(&tmp.join(name), "qcow2", size as u64, &how);
        let image = open(&tmp.join(name), RW);
        image.write_at(&[7; 128 << 10], at, NONE).unwrap();
        image.close().unwrap();
    }
    let (given, top) = (tmp.join("given.raw"), tmp.join("top.qcow2"));
    let given = given.to_str().unwrap();
    let how = options(&[("backing.backing-file", given), ("backing.backing-fmt", "raw")]);
    let image = open_with(&top, &how, RW);
    let seen = read_all(&image);
    assert!(seen.contains(&2) && !seen.contains(&1));
    rebase(&image, "middle.qcow2", &[], false).unwrap();
    assert_same(&read_all(&image), &seen, 0, "over what the image below names");
    image.close().unwrap();
    equal(&top, &seen, &tmp);
}
