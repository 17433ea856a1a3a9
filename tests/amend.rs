//! Amending: the image holds the same before and after, is what it was told to be, and QEMU finds it sound.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use common::disk::{Call, Disk, Epochs, Fault, Left};
use common::workload::{self, About, Scenario, scenarios};
use common::*;
use qblk::block::{Amend, AmendKeys, ErrorKind, InFlight, Progress};
use qblk::crypto::Secret;
use qblk::format::{Params, qcow2};
use qblk::{Image, OneIov, Options, ReqFlags};

const MB: u64 = 1 << 20;

fn amend(image: &Image, pairs: &[(&str, &str)]) -> Result<(), qblk::Error> {
    image.amend(&options(pairs), Progress::NONE)
}

fn about(path: &Path, words: &[&str]) {
    let text = qemu_img!("info", "-f", "qcow2", path);
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}

fn zero_flags(path: &Path) -> String {
    qemu_img!("map", "--output=json", "-f", "qcow2", path)
}

/// An image with data, zeroes of both kinds, compressed clusters, and two snapshots.
fn rich(
    dir: &Tmp,
    name: &str,
    pairs: &[(&str, &str)],
    backed: bool,
) -> (std::path::PathBuf, Vec<u8>) {
    let path = dir.join(name);
    let mut rng = Rng::new(11);
    let mut pairs = pairs.to_vec();
    if backed {
        std::fs::write(dir.join("base"), rng.bytes(6 * MB as usize)).unwrap();
        pairs.extend([("backing-file", "base"), ("backing-fmt", "raw")]);
    }
    create(&path, "qcow2", 5 * MB, &pairs);
    let image = open(&path, RW);
    image.write_at(&rng.bytes(2 * MB as usize), MB / 2, NONE).unwrap();
    image.zero(MB, MB / 4, NONE).unwrap();
    image.zero(3 * MB, MB / 2, qblk::ReqFlags::MAY_TRIM).unwrap();
    image.vm_state_write(OneIov::src(&rng.bytes(300_000)).iov(), 0).unwrap();
    image.snapshot_create(b"one", &Options::new()).unwrap();
    image.write_at(&rng.bytes(MB as usize), 3 * MB + 12345, NONE).unwrap();
    image.zero(MB / 2, MB / 2, NONE).unwrap();
    image.snapshot_create(b"two", &Options::new()).unwrap();
    image.write_at(&rng.bytes(100_000), 4 * MB, NONE).unwrap();
    image.zero(2 * MB, 300_000, NONE).unwrap();
    let bytes = read_all(&image);
    image.close().unwrap();
    check_clean(&path);
    (path, bytes)
}

fn snapshot(path: &Path, name: &str) -> (Vec<u8>, Vec<u8>) {
    let image = open_with(path, &options(&[("snapshot", name)]), RO);
    let mut state = vec![0; 300_000];
    image.vm_state_read(OneIov::dst(&mut state).iov(), 0).unwrap();
    (read_all(&image), state)
}

#[test]
fn versions_change_both_ways_and_everything_reads_as_before() {
    let dir = Tmp::in_memory("amend-compat");
    for (backed, cluster) in [(false, "64k"), (true, "64k"), (false, "512"), (true, "4k")] {
        let name = format!("{backed}-{cluster}");
        let (path, bytes) = rich(&dir, &name, &[("cluster-size", cluster)], backed);
        let (one, two) = (snapshot(&path, "one"), snapshot(&path, "two"));
        let image = open(&path, RW);
        let context = image.context(&Options::new(), RW).unwrap();
        for (compat, word) in [("0.10", "compat: 0.10"), ("1.1", "compat: 1.1"), ("0.10", "0.10")] {
            amend(&image, &[("compat", compat)]).unwrap();
            assert_same(&read_all(&image), &bytes, 0, compat);
            image.flush().unwrap();
            check_no_corruption(&path_copy(&dir, &path));
            about(&path_copy(&dir, &path), &[word]);
            // The contexts are of the same device still.
            context.write_at(&bytes[..1000], 0, NONE).unwrap();
        }
        drop(context);
        image.close().unwrap();
        check_clean(&path);
        check_same(&path, "qcow2", &bytes, &dir.join("model"));
        assert!(zero_flags(&path).contains("data"));
        assert!(snapshot(&path, "one") == one && snapshot(&path, "two") == two);
        let image = open(&path, RW);
        image.snapshot_apply(b"one").unwrap();
        assert_same(&read_all(&image), &one.0, 0, "applied");
        image.snapshot_delete(b"two").unwrap();
        image.close().unwrap();
        check_clean(&path);
    }
}

fn path_copy(dir: &Tmp, path: &Path) -> std::path::PathBuf {
    let copy = dir.join("copy");
    std::fs::copy(path, &copy).unwrap();
    copy
}

#[test]
fn what_qemu_made_is_amended_and_what_was_amended_qemu_amends() {
    let dir = Tmp::in_memory("amend-qemu");
    let path = dir.join("image");
    qemu_img!("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "8M");
    qemu_io(&path, "qcow2", &["write -P 1 0 3M", "write -z 1M 64k", "discard 2M 512k"]);
    qemu_img!("snapshot", "-c", "s", path);
    qemu_io(&path, "qcow2", &["write -P 2 1M 1M"]);
    let image = open(&path, RW);
    let bytes = read_all(&image);
    amend(&image, &[("compat", "1.1"), ("lazy-refcounts", "on")]).unwrap();
    image.close().unwrap();
    check_clean(&path);
    about(&path, &["compat: 1.1", "lazy refcounts: true"]);
    qemu_io(&path, "qcow2", &["write -z 1M 512k"]);
    qemu_img!("amend", "-f", "qcow2", "-o", "compat=0.10", path);
    qemu_img!("amend", "-f", "qcow2", "-o", "compat=1.1,refcount_bits=64", path);
    let image = open(&path, RW);
    amend(&image, &[("refcount-bits", "16")]).unwrap();
    amend(&image, &[("compat", "0.10")]).unwrap();
    image.close().unwrap();
    check_clean(&path);
    let mut model = bytes;
    model[MB as usize..][..MB as usize / 2].fill(0);
    check_same(&path, "qcow2", &model, &dir.join("model"));
    qemu_img!("snapshot", "-a", "s", path);
    check_clean(&path);
}

#[test]
fn refcounts_get_every_width_that_holds_them() {
    let dir = Tmp::in_memory("amend-width");
    for cluster in ["512", "64k"] {
        let (path, bytes) = rich(&dir, cluster, &[("cluster-size", cluster)], false);
        let one = snapshot(&path, "one");
        let image = open(&path, RW);
        for bits in ["2", "64", "4", "32", "8", "16"] {
            amend(&image, &[("refcount-bits", bits)]).unwrap();
            assert_eq!(image.property("qcow2.refcount-bits").unwrap().unwrap(), bits.as_bytes());
            image.write_at(&bytes[..100_000], 0, NONE).unwrap();
            image.flush().unwrap();
            check_no_corruption(&path_copy(&dir, &path));
        }
        let before = std::fs::read(&path).unwrap();
        let e = amend(&image, &[("refcount-bits", "1")]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
        assert!(e.to_string().contains("1 bits"), "{e}");
        assert_same(&std::fs::read(&path).unwrap()[..512], &before[..512], 0, "the header");
        assert_same(&read_all(&image), &bytes, 0, "all");
        image.snapshot_delete(b"one").unwrap();
        image.snapshot_delete(b"two").unwrap();
        amend(&image, &[("refcount-bits", "1")]).unwrap();
        image.write_at(&bytes[..100_000], 0, NONE).unwrap();
        amend(&image, &[("refcount-bits", "16"), ("compat", "0.10")]).unwrap();
        image.close().unwrap();
        check_clean(&path);
        check_same(&path, "qcow2", &bytes, &dir.join("model"));
        drop(one);
    }
}

#[test]
fn version_2_takes_no_image_that_it_can_not_describe() {
    let dir = Tmp::in_memory("amend-refused");
    for (pairs, word) in [
        (&[("compression-type", "zstd")][..], "compression"),
        (&[("refcount-bits", "8")], "16 bits"),
    ] {
        let path = dir.join(word.split(' ').next().unwrap());
        create(&path, "qcow2", MB, pairs);
        let image = open(&path, RW);
        let e = amend(&image, &[("compat", "0.10")]).unwrap_err();
        assert!(e.to_string().contains(word), "{e}");
        image.write_at(&[1; 1000], 0, NONE).unwrap();
        image.close().unwrap();
        about(&path, &["compat: 1.1"]);
    }
    let path = dir.join("size");
    create(&path, "qcow2", MB, &[]);
    let image = open(&path, RW);
    image.snapshot_create(b"s", &Options::new()).unwrap();
    image.resize(2 * MB, &Options::new(), false).unwrap();
    let e = amend(&image, &[("compat", "0.10")]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
    let e = amend(&image, &[("compat", "0.10"), ("lazy-refcounts", "on")]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    for pairs in [
        &[("data-file-raw", "on")][..],
        &[("backing-fmt", "raw")],
        &[("backing-fmt", "floppy"), ("backing-file", "x")],
        &[("cluster-size", "4k")],
        &[("state", "active")],
        &[("encrypt.keyslot", "1")],
        &[("key", "x")],
    ] {
        let e = amend(&image, pairs).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{pairs:?}: {e}");
    }
    let e = image.context(&Options::new(), RO).unwrap().amend(&Options::new(), Progress::NONE);
    assert_eq!(e.unwrap_err().kind(), ErrorKind::Errno(libc::EROFS));
    let raw = dir.join("raw");
    create(&raw, "raw", MB, &[]);
    let e = amend(&open(&raw, RW), &[("compat", "1.1")]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOTSUP), "{e}");
}

#[test]
fn the_backing_file_that_is_recorded_is_what_the_handle_stands_on() {
    let dir = Tmp::in_memory("amend-backing");
    std::fs::write(dir.join("a"), vec![0xa; MB as usize]).unwrap();
    std::fs::write(dir.join("b"), vec![0xb; MB as usize]).unwrap();
    let path = dir.join("image");
    create(&path, "qcow2", MB, &[("backing-file", "a"), ("backing-fmt", "raw")]);
    let image = open(&path, RW);
    assert_eq!(read_range(&image, 5, 1), [0xa]);
    amend(&image, &[("backing-file", "b")]).unwrap();
    assert_eq!(read_range(&image, 5, 1), [0xb]);
    amend(&image, &[("backing-file", "")]).unwrap();
    assert_eq!(read_range(&image, 5, 1), [0]);
    // What is not there: it is recorded, and the handle can only be reopened without it.
    let e = amend(&image, &[("backing-file", "c"), ("backing-fmt", "raw")]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    image.write_at(&[1], 0, NONE).unwrap_err();
    let no_backing = options(&[("backing-file", "")]);
    image.reopen(Some(&no_backing), RW).unwrap();
    image.write_at(&[1], 0, NONE).unwrap();
    image.close().unwrap();
    about(&path, &["backing file: c", "backing file format: raw"]);
    std::fs::rename(dir.join("a"), dir.join("c")).unwrap();
    check_clean(&path);
}

#[test]
fn who_is_told_may_stop_it_and_the_image_is_as_it_was() {
    let dir = Tmp::in_memory("amend-cancel");
    let (path, bytes) = rich(&dir, "image", &[("cluster-size", "512")], false);
    let image = open(&path, RW);
    let before = std::fs::read(&path).unwrap();
    for pairs in [[("compat", "0.10")], [("refcount-bits", "64")]] {
        let asked = AtomicU64::new(0);
        let tell = |done: u64, total: u64| {
            assert!(done <= total, "{done} of {total}");
            asked.fetch_add(1, Relaxed) < 5
        };
        let e = image.amend(&options(&pairs), Progress::new(&tell)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ECANCELED), "{e}");
        assert_eq!(std::fs::read(&path).unwrap()[..512], before[..512]);
    }
    image.write_at(&bytes[..5000], 0, NONE).unwrap();
    assert_same(&read_all(&image), &bytes, 0, "all");
    image.close().unwrap();
    check_clean(&path);
}

/// qemu-img on an encrypted image, with a passphrase that opens it.
fn opens(path: &Path, format: &str, key: &str) -> bool {
    let secret = format!("secret,id=s,data={key}");
    let name = if format == "luks" { "key-secret" } else { "encrypt.key-secret" };
    let more = if format == "luks" { "" } else { ",encrypt.format=luks" };
    let opts =
        format!("driver={format}{more},{name}=s,file.driver=file,file.filename={}", path.display());
    let out =
        run("qemu-io", &[&"--object", &secret, &"--image-opts", &opts, &"-c", &"read -P 7 0 4k"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(!text.contains("Pattern verification failed"), "{text}");
    out.status.success()
}

#[test]
fn key_slots_come_and_go() {
    let dir = Tmp::in_memory("amend-luks");
    for (format, prefix) in [("qcow2", "encrypt."), ("luks", "")] {
        let path = dir.join(format);
        let fast = format!("{prefix}iter-time");
        let mut pairs = vec![("key", "first"), (&fast, "10")];
        if format == "qcow2" {
            pairs.push(("encrypt.format", "luks"));
        }
        create(&path, format, MB, &pairs);
        let key = |key: &str| options(&[("format", format), ("key", key)]);
        let image = open_with(&path, &key("first"), RW);
        image.write_at(&[7; 4096], 0, NONE).unwrap();
        image.flush().unwrap();
        let amend = |pairs: &[(&str, &str)]| {
            let all = pairs.iter().fold(Options::new(), |o, (k, v)| match *k {
                "key" => o.with(k, v),
                _ => o.with(&format!("{prefix}{k}"), v),
            });
            image.amend(&all, Progress::NONE)
        };
        let errno = |e: Result<(), qblk::Error>| e.unwrap_err().kind();
        let (invalid, bad) = (ErrorKind::Errno(libc::EINVAL), ErrorKind::BadKey);
        let add = |new: &str, slot: &str| {
            let mut all = vec![("state", "active"), ("new-secret", new), ("iter-time", "10")];
            if !slot.is_empty() {
                all.push(("keyslot", slot));
            }
            amend(&all)
        };
        add("second", "").unwrap();
        add("third", "6").unwrap();
        assert_eq!(image.property("luks.key-slots").unwrap().unwrap(), b"0,1,6");
        assert_eq!(errno(add("fourth", "6")), invalid);
        assert_eq!(errno(add("fourth", "8")), invalid);
        for key in ["first", "second", "third"] {
            assert!(opens_closed(&path, format, key), "{format}: {key}");
        }
        assert!(!opens_closed(&path, format, "fourth"));
        let take = |old: &str| amend(&[("state", "inactive"), ("old-secret", old)]);
        assert_eq!(errno(take("fourth")), bad);
        assert_eq!(errno(amend(&[("state", "inactive")])), invalid);
        assert_eq!(errno(amend(&[("state", "inactive"), ("keyslot", "3")])), invalid);
        let both = [("state", "inactive"), ("keyslot", "1"), ("old-secret", "first")];
        assert_eq!(errno(amend(&both)), bad);
        take("first").unwrap();
        amend(&[("state", "inactive"), ("keyslot", "6")]).unwrap();
        assert_eq!(errno(take("second")), invalid, "{format}: the last one");
        assert_eq!(image.property("luks.key-slots").unwrap().unwrap(), b"1");
        // What the image was opened with is gone; another must be given.
        assert_eq!(errno(add("fifth", "")), bad);
        let all =
            [("state", "active"), ("new-secret", "fifth"), ("iter-time", "10"), ("key", "second")];
        amend(&all).unwrap();
        assert_eq!(read_range(&image, 0, 4096), [7; 4096]);
        image.close().unwrap();
        assert!(!opens(&path, format, "first") && !opens(&path, format, "third"));
        assert!(opens(&path, format, "second") && opens(&path, format, "fifth"));
        drop(open_with(&path, &key("fifth"), RW));
        // And what QEMU adds and takes away.
        let opts = match format {
            "luks" => "state=active,new-secret=n,iter-time=10",
            _ => "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10",
        };
        let name = if format == "luks" { "key-secret" } else { "encrypt.key-secret" };
        let more = if format == "luks" { "" } else { "encrypt.format=luks," };
        let file = path.display();
        let image_opts =
            format!("driver={format},{more}{name}=s,file.driver=file,file.filename={file}");
        let (s, n) = ("secret,id=s,data=second", "secret,id=n,data=sixth");
        run_ok(
            "qemu-img",
            &[
                &"amend",
                &"--object",
                &s,
                &"--object",
                &n,
                &"-o",
                &opts,
                &"--image-opts",
                &image_opts,
            ],
        );
        drop(open_with(&path, &key("sixth"), RW));
    }
}

/// [`opens`], of an image that is open here.
fn opens_closed(path: &Path, format: &str, key: &str) -> bool {
    let copy = path.with_extension("copy");
    std::fs::copy(path, &copy).unwrap();
    opens(&copy, format, key)
}

/// What [`whenever_the_power_goes_an_amended_image_is_whole`] does to an image.
fn amended(disk: &Disk, scenario: &Scenario, to: &Amend) -> Vec<u8> {
    let image = scenario.open(disk, true).unwrap();
    image.driver().amend(to, Progress::NONE).unwrap();
    drop(image);
    let image = scenario.open(disk, false).unwrap();
    workload::read_all(&image).unwrap()
}

#[test]
fn whenever_the_power_goes_an_amended_image_is_whole() {
    let mut rng = Rng::new(seed("amend power cuts"));
    let dir = Tmp::in_memory("amend-cut");
    std::fs::write(dir.join("below"), [0; 512]).unwrap();
    let path = dir.join("cut.qcow2");
    let mut tried = 0;
    let to = |v3: Option<bool>, refcount_order: Option<u32>| Amend {
        v3,
        refcount_order,
        lazy: v3.filter(|v3| *v3),
        ..Amend::default()
    };
    let named = Amend {
        backing: Some(b"below".to_vec()),
        backing_format: Some(b"raw".to_vec()),
        ..Amend::default()
    };
    for (name, v3, to) in [
        ("snapshots", true, to(Some(false), None)),
        ("snapshots", true, to(None, Some(6))),
        ("snapshots", true, to(None, Some(3))),
        ("snapshots of version 2", false, to(Some(true), None)),
        ("snapshots of version 2", false, to(Some(true), Some(5))),
        ("snapshots", true, named),
    ] {
        let scenario = scenarios().into_iter().find(|s| s.name == name).unwrap();
        let mut scenario = Scenario { v3, ..scenario };
        // A size that changes would not do for version 2.
        scenario.weights[6] = 0;
        let disk = scenario.create();
        let image = scenario.open(&disk, true).unwrap();
        let mut guest = scenario.guest();
        for step in scenario.steps(&mut rng, 40) {
            workload::take(&image, step, &mut guest, &mut |_| {}).unwrap();
        }
        image.driver().close().unwrap();
        let bytes = workload::read_all(&image).unwrap();
        drop(image);
        let first = disk.state().ops.len();
        assert_same(&amended(&disk, &scenario, &to), &bytes, 0, name);
        let all = std::mem::take(&mut disk.state().ops);
        let count = all.len();
        let mut epochs = Epochs::new(all, Default::default());
        for ops in first..=count {
            for left in [Left::All, Left::Nothing, Left::Some, Left::Some] {
                let content = epochs.cut(&mut rng, ops, left);
                let about = About(format!("{name}: after {} of {}", ops - first, count - first));
                if left as u8 == Left::Some as u8 || rng.one_in(10) {
                    std::fs::write(&path, &content[0]).unwrap();
                    check_no_corruption(&path);
                }
                let image = scenario.open(&Disk::new(content), false).unwrap();
                assert_same(&workload::read_all(&image).unwrap(), &bytes, 0, "cut");
                drop(about);
                tried += 1;
            }
        }
    }
    say(format_args!("amend: {tried} states of a cut-off disk tried"));
}

#[test]
fn whenever_the_power_goes_an_encrypted_image_opens_by_a_key_that_it_should() {
    let mut rng = Rng::new(seed("keys and power cuts"));
    let scenario = scenarios().into_iter().find(|s| s.encrypted).unwrap();
    let disk = scenario.create();
    let secret = |text: &[u8]| Some(Secret::new(text.to_vec()));
    let slot = |activate, new, old, slot| Amend {
        keys: Some(AmendKeys { activate, slot, new, old, unlock: secret(b"key"), ms: 1 }),
        ..Amend::default()
    };
    // Slot 6 lies across the border of two sectors.
    for (to, before, after) in [
        (slot(true, secret(b"new"), None, Some(6)), &[&b"key"[..]][..], &[&b"key"[..], b"new"][..]),
        (slot(false, None, secret(b"new"), None), &[b"key", b"new"], &[b"key"]),
    ] {
        let first = disk.state().ops.len();
        let image = scenario.open(&disk, true).unwrap();
        image.driver().amend(&to, Progress::NONE).unwrap();
        drop(image);
        let ops = disk.state().ops.clone();
        let count = ops.len();
        let mut epochs = Epochs::new(ops, Default::default());
        for ops in first..=count {
            for left in [Left::All, Left::Nothing, Left::Some, Left::Some] {
                let disk = Disk::new(epochs.cut(&mut rng, ops, left));
                let opens = |key: &[u8]| open_disk(&disk, key).is_ok();
                let both = |list: &[&[u8]], key: &[u8]| list.contains(&key);
                for key in [&b"key"[..], b"new", b"none"] {
                    let (was, is) = (both(before, key), both(after, key));
                    let found = opens(key);
                    assert!(
                        !(was && is) || found,
                        "{key:?} does not open it after {ops}, {left:?}"
                    );
                    assert!(was || is || !found, "{key:?} opens it");
                }
            }
        }
    }
}

fn open_disk(disk: &Disk, key: &[u8]) -> Result<qcow2::Qcow2, qblk::Error> {
    let params = Params {
        write: false,
        info_only: false,
        probed: false,
        l2_cache: None,
        untrusted: false,
        key: Some(Secret::new(key.to_vec())),
        snapshot: None,
        calls: Arc::new(InFlight::default()),
    };
    qcow2::Qcow2::open(disk.device(), params)
}

#[test]
fn refcounts_that_are_late_are_in_time_when_an_image_is_amended() {
    let dir = Tmp::in_memory("amend-lazy");
    let path = dir.join("image");
    create(&path, "qcow2", 8 * MB, &[("lazy-refcounts", "on"), ("cluster-size", "4k")]);
    let image = open(&path, RW);
    let mut model = Rng::new(4).bytes(8 * MB as usize);
    for (i, pairs) in [
        &[("refcount-bits", "64")][..],
        &[("lazy-refcounts", "off")],
        &[("lazy-refcounts", "on")],
        &[("refcount-bits", "16"), ("compat", "0.10")],
    ]
    .into_iter()
    .enumerate()
    {
        let at = i * MB as usize;
        image.write_at(&model[at..at + MB as usize], at as u64, NONE).unwrap();
        image.flush().unwrap();
        image.snapshot_create(format!("s{i}").as_bytes(), &Options::new()).unwrap();
        image.write_at(&[7; 5000], 6 * MB, NONE).unwrap();
        image.flush().unwrap();
        amend(&image, pairs).unwrap();
        check_clean(&path_copy(&dir, &path));
    }
    model[4 * MB as usize..].fill(0);
    model[6 * MB as usize..][..5000].fill(7);
    image.snapshot_apply(b"s2").unwrap();
    image.snapshot_delete(b"s3").unwrap();
    model[3 * MB as usize..4 * MB as usize].fill(0);
    image.close().unwrap();
    check_clean(&path);
    check_same(&path, "qcow2", &model, &dir.join("model"));
}

/// The version that the header on a disk says.
fn version_on(disk: &Disk) -> u8 {
    disk.state().content[0][7]
}

/// What was opened as one version writes nothing any more into an image that the header says is of
/// another, whatever failed after the header had been switched.
#[test]
fn whichever_write_of_an_amendment_fails_the_image_is_of_one_version_and_whole() {
    let mut rng = Rng::new(seed("amend write errors"));
    let scenario = Scenario { most: 32, ..workload::PLAIN };
    let disk = scenario.create();
    let image = scenario.open(&disk, true).unwrap();
    for i in 0..120 {
        image.write_slice(&[rng.next() as u8; 4096], i << 12, NONE).unwrap();
    }
    image.zero(40 << 12, 10 << 12, NONE).unwrap();
    // What it takes now is given up by the next, and is the end of the file then.
    let wide = Amend { refcount_order: Some(5), ..Amend::default() };
    image.driver().amend(&wide, Progress::NONE).unwrap();
    drop(image);
    let image = scenario.open(&disk, true).unwrap();
    image.zero(60 << 12, 40 << 12, ReqFlags::MAY_TRIM).unwrap();
    image.driver().close().unwrap();
    let bytes = workload::read_all(&image).unwrap();
    drop(image);
    let content = disk.state().content.clone();
    let to = Amend { v3: Some(false), refcount_order: Some(4), ..Amend::default() };
    let (mut nth, mut after) = (0, 0);
    loop {
        let disk = Disk::new(content.clone());
        let image = scenario.open(&disk, true).unwrap();
        disk.state().fault = Some(Fault { call: Call::Write, nth, lasts: false });
        let amended = image.driver().amend(&to, Progress::NONE);
        let struck = disk.state().struck;
        disk.state().fault = None;
        let about = About(format!("write {nth} fails: {amended:?}"));
        let mut model = bytes.clone();
        if image.zero(0, 64 << 10, NONE).is_ok() {
            assert_eq!(version_on(&disk), 3, "it goes on as what it is");
            model[..64 << 10].fill(0);
        }
        if version_on(&disk) == 2 {
            after += u64::from(struck);
            let e = image.write_slice(&[1; 512], 0, NONE).unwrap_err();
            assert!(e.to_string().contains("reopen"), "{e}");
        }
        // It is fenced, or has nothing to complain of.
        let _ = image.driver().close();
        drop(image);
        let image = scenario.open(&disk, false).unwrap();
        assert_same(&workload::read_all(&image).unwrap(), &model, 0, "reopened");
        drop(about);
        if !struck {
            amended.unwrap();
            break;
        }
        nth += 1;
    }
    assert!(nth > 3 && after > 0, "{nth} writes, {after} failed after the switch");
}

/// What fails before anything is written used to end all writing.
#[test]
fn a_name_that_does_not_fit_the_header_is_refused_and_all_goes_on() {
    let dir = Tmp::in_memory("amend-long");
    let path = dir.join("image");
    create(&path, "qcow2", MB, &[("cluster-size", "512")]);
    let image = open(&path, RW);
    let long = "x".repeat(500);
    let e = amend(&image, &[("backing-file", &long), ("backing-fmt", "raw")]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EFBIG), "{e}");
    image.write_at(&[7; 1000], 0, NONE).unwrap();
    let e = image.rebase(long.as_ref(), &options(&[("backing-fmt", "raw")]), true, Progress::NONE);
    assert!(e.is_err());
    image.write_at(&[7; 1000], 1000, NONE).unwrap();
    image.close().unwrap();
    check_clean(&path);
    assert_eq!(read_range(&open(&path, RO), 0, 2000), [7; 2000]);
}

/// A header that is on its way to the disk, and may be there or not, is nothing to go on with.
#[test]
fn where_the_header_could_not_be_written_nothing_is_any_more() {
    let scenario = Scenario { backing: true, ..workload::PLAIN };
    let new = scenario.create().state().content.clone();
    for call in [Call::Write, Call::Flush] {
        let mut nth = 0;
        loop {
            let disk = Disk::new(new.clone());
            let image = scenario.open(&disk, true).unwrap();
            disk.state().fault = Some(Fault { call, nth, lasts: false });
            let done = image.driver().set_backing(Some((b"another", Some(b"raw"))));
            disk.state().fault = None;
            if !disk.state().struck {
                done.unwrap();
                break;
            }
            done.unwrap_err();
            let e = image.write_slice(&[1; 512], 0, NONE).expect_err("it goes on");
            assert!(e.to_string().contains("reopen"), "{call:?} {nth}: {e}");
            nth += 1;
        }
        assert!(nth >= 2, "{nth} of {call:?}");
    }
}

#[test]
fn a_refcount_that_no_image_can_have_is_refused_and_not_counted_to() {
    let dir = Tmp::in_memory("amend-refs");
    let path = dir.join("image");
    create(&path, "qcow2", MB, &[]);
    let image = open(&path, RW);
    image.write_at(&[1; 1000], 0, NONE).unwrap();
    image.zero(0, 64 << 10, NONE).unwrap();
    image.close().unwrap();
    // The L2 table's.
    let mut bytes = std::fs::read(&path).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let l2 = be64(be64(40)) & 0x00ff_ffff_ffff_fe00;
    let at = be64(be64(48)) + 2 * (l2 >> 16);
    assert_eq!(bytes[at..at + 2], [0, 1]);
    bytes[at..at + 2].fill(0xff);
    std::fs::write(&path, &bytes).unwrap();
    let image = open(&path, RW);
    let e = amend(&image, &[("compat", "0.10")]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    assert!(e.to_string().contains("65535, expected at most 1"), "{e}");
}

#[test]
fn key_slots_change_alone() {
    let dir = Tmp::in_memory("amend-keys-alone");
    let path = dir.join("image");
    let how = [("encrypt.format", "luks"), ("encrypt.iter-time", "10"), ("key", "one")];
    create(&path, "qcow2", MB, &how);
    let image = open_with(&path, &options(&[("key", "one")]), RW);
    let before = std::fs::read(&path).unwrap();
    let slot = [("encrypt.state", "active"), ("encrypt.new-secret", "two")];
    let both = [&slot[..], &[("encrypt.iter-time", "10"), ("lazy-refcounts", "on")]].concat();
    let e = amend(&image, &both).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    assert!(e.to_string().contains("two calls"), "{e}");
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "nothing has changed");

    // A slot that is written in part is on the disk, or not: nothing else is written then.
    let scenario = scenarios().into_iter().find(|s| s.encrypted).unwrap();
    let new = scenario.create().state().content.clone();
    let secret = |text: &[u8]| Some(Secret::new(text.to_vec()));
    let keys = AmendKeys {
        activate: true,
        slot: None,
        new: secret(b"two"),
        old: None,
        unlock: secret(b"key"),
        ms: 1,
    };
    let to = Amend { keys: Some(keys), ..Amend::default() };
    let mut nth = 0;
    loop {
        let disk = Disk::new(new.clone());
        let image = scenario.open(&disk, true).unwrap();
        disk.state().fault = Some(Fault { call: Call::Write, nth, lasts: false });
        let done = image.driver().amend(&to, Progress::NONE);
        disk.state().fault = None;
        if !disk.state().struck {
            done.unwrap();
            break;
        }
        done.unwrap_err();
        image.write_slice(&[1; 512], 0, NONE).expect_err("it goes on");
        nth += 1;
    }
    assert!(nth >= 3, "{nth} writes");
}
