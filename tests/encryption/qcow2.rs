//! Encryption inside qcow2: LUKS, and the old AES which numbers sectors as the guest does.

use std::fs;

use qblk::Extent;
use qblk::block::ErrorKind;

use super::*;

fn own(opts: &str) -> Vec<(&str, &str)> {
    let given = opts.split(',').filter(|o| !o.is_empty()).map(|o| o.split_once('=').unwrap());
    given.chain([("encrypt.format", "luks"), ("encrypt.iter-time", "10"), ("key", KEY)]).collect()
}

fn check(path: &Path) {
    // A check reads tables only, so it needs no key; QEMU wants one all the same.
    let (secret, image) = (secret(KEY), image_opts(path, kind(path)));
    run_ok("qemu-img", &[&"check", &"--object", &secret, &"--image-opts", &image]);
}

/// "aes" or "luks", as the header says.
fn kind(path: &Path) -> &'static str {
    let head = fs::read(path).unwrap();
    if head[35] == 1 { "aes" } else { "qcow2" }
}

#[test]
fn images_of_both_kinds_are_read_and_written_as_qemu_does() {
    let rng = &mut Rng::new(seed("images_of_both_kinds"));
    let dir = Tmp::in_memory("crypt");
    for (format, opts) in [
        ("luks", "compat=1.1"),
        ("luks", "compat=0.10,cluster_size=4096"),
        ("luks", "cluster_size=512"),
        ("luks", "cluster_size=2M,refcount_bits=1"),
        ("luks", "encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv"),
        ("luks", "preallocation=metadata"),
        ("luks", "extended_l2=on,cluster_size=16k"),
        ("luks", "extended_l2=on,cluster_size=2M,data_file=@"),
        ("luks", "data_file=@,data_file_raw=on"),
        ("aes", "extended_l2=on,data_file=@"),
        ("aes", "compat=1.1"),
        ("aes", "compat=0.10,cluster_size=512"),
        ("aes", "cluster_size=2M"),
        ("aes", "cluster_size=4k,preallocation=metadata"),
    ] {
        eprintln!("{format} {opts}");
        let path = dir.join("image");
        let time = if format == "luks" { ",encrypt.iter-time=10" } else { "" };
        let opts = opts.replace('@', dir.join("data").to_str().unwrap());
        let all = format!("{opts},encrypt.format={format},encrypt.key-secret=s{time}");
        qemu_create(&path, "qcow2", &all, "5M");
        let how = kind(&path);
        qemu_io_key(
            &path,
            how,
            &["write -P 3 1M 1M", "write -P 4 3000k 512", "write -z 1500k 64k"],
        );
        let image = open_key(&path, RW);
        assert_ne!(image.info().unwrap().state & qblk::image::state::ENCRYPTED, 0);
        let mut model = read_all(&image);
        assert!(model[1 << 20..1500 << 10].iter().all(|b| *b == 3));
        assert!(model[1500 << 10..][..64 << 10].iter().all(|b| *b == 0));
        assert!(model[3000 << 10..][..512].iter().all(|b| *b == 4));
        for _ in 0..3 {
            scribble(&image, &mut model, rng, 60);
            image.flush().unwrap();
        }
        image.close().unwrap();
        check(&path);
        qemu_reads(&path, how, &model, &dir.join("raw"));
        // And back: what QEMU writes between is read here.
        qemu_io_key(&path, how, &["write -P 5 7k 100k", "discard 2M 512k"]);
        let image = open_key(&path, RW);
        model[7 << 10..][..100 << 10].fill(5);
        assert!(read_range(&image, 0, 2 << 20) == model[..2 << 20]);
        model = read_all(&image);
        image.resize(6 << 20, &Options::new(), false).unwrap();
        model.resize(6 << 20, 0);
        scribble(&image, &mut model, rng, 60);
        image.resize(4 << 20, &Options::new(), true).unwrap();
        model.truncate(4 << 20);
        scribble(&image, &mut model, rng, 30);
        image.close().unwrap();
        check(&path);
        qemu_reads(&path, how, &model, &dir.join("raw"));
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn images_made_here_are_sound_and_the_same_in_qemu() {
    let rng = &mut Rng::new(seed("images_made_here"));
    let dir = Tmp::in_memory("crypt");
    for opts in [
        "",
        "compat=0.10",
        "cluster-size=512,encrypt.hash-alg=sha1",
        "cluster-size=2M,refcount-bits=1",
        "preallocation=metadata",
        "preallocation=full,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
        "preallocation=falloc,compression-type=zstd",
        "extended-l2=on",
        "data-file=@",
        "data-file=@,data-file-raw=on,extended-l2=on,cluster-size=16k",
    ] {
        eprintln!("{opts}");
        let path = dir.join("image");
        let opts = &opts.replace('@', dir.join("data").to_str().unwrap());
        create(&path, "qcow2", 3_000_320, &own(opts));
        check(&path);
        let zeroes = vec![0; 3_000_320];
        qemu_reads(&path, "qcow2", &zeroes, &dir.join("raw"));
        let image = open_key(&path, RW);
        let mut model = zeroes;
        scribble(&image, &mut model, rng, 100);
        image.close().unwrap();
        check(&path);
        qemu_reads(&path, "qcow2", &model, &dir.join("raw"));
        fs::remove_file(&path).unwrap();
    }
    // A size that is no whole number of sectors; QEMU shows its whole sectors.
    let data = format!("data-file={}", dir.join("odd.data").display());
    for opts in ["", &data] {
        let path = dir.join("odd");
        create(&path, "qcow2", 100_001, &own(opts));
        let image = open_key(&path, RW);
        let mut model = vec![0; 100_001];
        scribble(&image, &mut model, rng, 60);
        image.close().unwrap();
        check(&path);
        assert!(read_all(&open_key(&path, RO)) == model);
        qemu_reads(&path, "qcow2", &model[..100_001 / 512 * 512], &dir.join("raw"));
    }
}

#[test]
fn what_is_written_is_nowhere_in_the_file_as_it_was() {
    let dir = Tmp::in_memory("crypt");
    for format in ["luks", "aes"] {
        let path = dir.join(format);
        let opts = format!("encrypt.format={format},encrypt.key-secret=s");
        let time = if format == "luks" { ",encrypt.iter-time=10" } else { "" };
        qemu_create(&path, "qcow2", &(opts + time), "4M");
        let image = open_key(&path, RW);
        let text = b"this must not be found!!".repeat(100);
        for at in [0, 65_530, 1 << 20, (2 << 20) - 700, 3_000_001] {
            image.write_at(&text, at, NONE).unwrap();
        }
        let mut extents = [Extent::default(); 16];
        let n = image.extents(0, 4 << 20, &mut extents).unwrap();
        assert!(extents[..n].iter().any(|e| e.has(Extent::DATA)));
        // Nobody is told where to find the bytes, since they are not there as they are.
        assert!(extents[..n].iter().all(|e| !e.has(Extent::HOST) || !e.has(Extent::DATA)));
        image.close().unwrap();
        let file = fs::read(&path).unwrap();
        assert!(!file.windows(24).any(|w| w == b"this must not be found!!"));
    }
}

#[test]
fn chains_with_encrypted_members_take_a_key_for_each() {
    let rng = &mut Rng::new(seed("chains_with_encrypted"));
    let dir = Tmp::in_memory("crypt");
    let (raw, luks, base) = (dir.join("raw"), dir.join("base.luks"), dir.join("base.qcow2"));
    let size = 2 << 20;
    let bytes = rng.bytes(size - 1000);
    fs::write(&raw, &bytes).unwrap();
    create(&luks, "luks", size as u64, &[("key", "below"), ("iter-time", "10")]);
    let below = Options::new().with("key", "below");
    open_with(&luks, &below, RW).write_at(&bytes, 0, NONE).unwrap();
    let pairs = [("encrypt.format", "luks"), ("encrypt.iter-time", "10"), ("key", "below")];
    create(&base, "qcow2", size as u64, &pairs);
    let image = open_with(&base, &below, RW);
    image.write_at(&bytes, 0, NONE).unwrap();
    image.close().unwrap();
    // The tail that the raw image has not got reads as zeroes above it.
    let mut expect = bytes.clone();
    expect.resize(size, 0);
    for (below, format, key) in
        [(&raw, "raw", None), (&luks, "luks", Some("below")), (&base, "qcow2", Some("below"))]
    {
        let tail = if format == "luks" {
            let low = open_with(below, &with_key("below"), RO);
            read_range(&low, size as u64 - 1000, 1000)
        } else {
            vec![0; 1000]
        };
        expect[size - 1000..].copy_from_slice(&tail);
        for top in ["plain", "luks", "aes"] {
            eprintln!("{top} over {format}");
            let path = dir.join(format!("{top}-{format}"));
            let on = [("backing-file", below.to_str().unwrap()), ("backing-fmt", format)];
            match top {
                "plain" => create(&path, "qcow2", size as u64, &on),
                "luks" => create(&path, "qcow2", size as u64, &[&own("")[..], &on].concat()),
                _ => {
                    let opts = "encrypt.format=aes,encrypt.key-secret=s";
                    qemu_create(&path, "qcow2", opts, "2M");
                    let (secret, image) = (secret(KEY), image_opts(&path, "aes"));
                    let mut args: Vec<&dyn AsRef<OsStr>> = vec![&"rebase", &"-u"];
                    args.extend([&"--object" as &dyn AsRef<OsStr>, &secret, &"--image-opts"]);
                    args.extend([&"-F" as &dyn AsRef<OsStr>, &format, &"-b", below, &image]);
                    run_ok("qemu-img", &args);
                }
            }
            let mut how = Options::new();
            if top != "plain" {
                how = how.with("key", KEY);
            }
            if let Some(key) = key {
                let e = error(&path, &how, RW);
                assert_eq!(e.kind(), ErrorKind::NeedKey, "{e}");
                assert!(e.to_string().contains(below.to_str().unwrap()), "{e}");
                how = how.with("backing.key", key);
            }
            let image = open_with(&path, &how, RW);
            let mut model = read_all(&image);
            assert!(model == expect);
            scribble(&image, &mut model, rng, 80);
            image.close().unwrap();
            let image = open_with(&path, &how, RO);
            for _ in 0..2 {
                assert!(read_all(&image) == model);
                let at = rng.below(size as u64 - 5000);
                assert!(read_range(&image, at, 5000) == model[at as usize..][..5000]);
            }
        }
    }
    // What lies below was not touched.
    assert!(fs::read(&raw).unwrap() == bytes);
    assert!(read_range(&open_with(&luks, &below, RO), 0, bytes.len() as u64) == bytes);
}

#[test]
fn snapshots_keep_their_bytes_when_the_image_is_written() {
    let rng = &mut Rng::new(seed("snapshots_keep"));
    let dir = Tmp::in_memory("crypt");
    for format in ["luks", "aes"] {
        let path = dir.join(format);
        let opts = format!("encrypt.format={format},encrypt.key-secret=s");
        let time = if format == "luks" { ",encrypt.iter-time=10" } else { "" };
        qemu_create(&path, "qcow2", &(opts + time), "2M");
        let how = kind(&path);
        qemu_io_key(&path, how, &["write -P 8 0 1500k"]);
        let (secret, opts) = (secret(KEY), image_opts(&path, how));
        run_ok(
            "qemu-img",
            &[&"snapshot", &"--object", &secret, &"--image-opts", &opts, &"-c", &"one"],
        );
        let image = open_key(&path, RW);
        let mut model = read_all(&image);
        assert!(model[..1500 << 10].iter().all(|b| *b == 8));
        scribble(&image, &mut model, rng, 60);
        image.close().unwrap();
        check(&path);
        qemu_reads(&path, how, &model, &dir.join("raw"));
        run_ok(
            "qemu-img",
            &[&"snapshot", &"--object", &secret, &"--image-opts", &opts, &"-a", &"one"],
        );
        let old = read_all(&open_key(&path, RO));
        assert!(
            old[..1500 << 10].iter().all(|b| *b == 8) && old[1500 << 10..].iter().all(|b| *b == 0)
        );
    }
}

#[test]
fn a_key_is_asked_for_and_checked() {
    let dir = Tmp::in_memory("crypt");
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, &own(""));
    for flags in [RO, RW] {
        assert_eq!(error(&path, &Options::new(), flags).kind(), ErrorKind::NeedKey);
        assert_eq!(error(&path, &with_key("wrong"), flags).kind(), ErrorKind::BadKey);
    }
    let info = open_with(&path, &Options::new(), OpenFlags::INFO_ONLY);
    let about = info.info().unwrap();
    assert_eq!((about.format, about.size), ("qcow2", 1 << 20));
    assert_ne!(about.state & qblk::image::state::ENCRYPTED, 0);
    assert_eq!(info.property("qcow2.encryption").unwrap().unwrap(), b"luks");
    assert_eq!(info.property("luks.cipher-mode").unwrap().unwrap(), b"xts-plain64");
    for (pairs, what) in [
        (&[("key", KEY)][..], "encrypt.format"),
        (&[("encrypt.iter-time", "10")], "encrypt.format"),
        (&[("encrypt.format", "luks"), ("key", KEY), ("cipher-alg", "aes-128")], "'encrypt.'"),
        (&[("encrypt.format", "lock"), ("key", KEY)], "'lock'"),
        (&[("encrypt.format", "luks"), ("key", KEY), ("encrypt.cipher-alg", "aes-512")], "aes-512"),
        (&[("encrypt.format", "luks"), ("key", KEY), ("encrypt.iter-time", "0")], "iter-time"),
    ] {
        let path = dir.join("not");
        let e =
            qblk::image::create(path.as_os_str(), "qcow2", 1 << 20, &options(pairs)).unwrap_err();
        assert!(e.kind() == ErrorKind::Errno(libc::EINVAL) && e.to_string().contains(what), "{e}");
        assert!(!path.exists());
    }
    let pairs = [("encrypt.format", "luks")];
    let e = qblk::image::create(dir.join("not").as_os_str(), "qcow2", 1 << 20, &options(&pairs));
    assert_eq!(e.unwrap_err().kind(), ErrorKind::NeedKey);
    let e = qblk::image::create(
        dir.join("not").as_os_str(),
        "qcow2",
        1 << 20,
        &options(&[("encryption", "on"), ("key", KEY)]),
    );
    assert_eq!(e.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn many_threads_write_one_encrypted_image() {
    let dir = Tmp::in_memory("crypt");
    for format in ["luks", "aes"] {
        let path = dir.join(format);
        let opts = format!("encrypt.format={format},encrypt.key-secret=s,cluster_size=4k");
        let time = if format == "luks" { ",encrypt.iter-time=10" } else { "" };
        qemu_create(&path, "qcow2", &(opts + time), "2M");
        let image = open_key(&path, RW);
        // Pieces of 100 bytes, so that neighbours share sectors and clusters.
        let expect = Rng::new(7).bytes(400_000);
        std::thread::scope(|s| {
            for t in 0..4 {
                let (image, expect) = (&image, &expect);
                s.spawn(move || {
                    for i in (t..4000).step_by(4) {
                        image.write_at(&expect[i * 100..][..100], i as u64 * 100, NONE).unwrap();
                    }
                });
            }
        });
        assert!(read_range(&image, 0, 400_000) == expect);
        image.close().unwrap();
        check(&path);
        assert!(read_range(&open_key(&path, RO), 0, 400_000) == expect);
    }
}
