//! Our client, with qemu-nbd.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use super::client_model::{exercise, exercise_together};
use super::common::*;
use super::peers::*;
use qblk::block::ErrorKind;
use qblk::{Extent, Image};

const SIZE: u64 = 3 << 20;

fn property(image: &Image, key: &str) -> String {
    String::from_utf8(image.property(key).unwrap().unwrap_or_default()).unwrap()
}

#[test]
fn qemu_nbd_holds_what_a_plain_array_would() {
    let dir = Tmp::in_memory("cli-qemu");
    let mut rng = Rng::new(seed("client_qemu"));
    let socket = dir.join("q.sock");
    for (n, (format, how)) in [
        ("raw", &["-e", "8"][..]),
        ("raw", &["-e", "1", "--discard=unmap", "--detect-zeroes=unmap"]),
        ("raw", &["--cache=writethrough", "-e", "2"]),
        ("qcow2", &["-e", "8", "-A"]),
        ("qcow2", &["-e", "1", "--discard=unmap", "--cache=unsafe"]),
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.join(format!("disk{n}"));
        peer!("qemu-img", "create", "-f", format, path, SIZE.to_string()).ok();
        let mut args: Vec<&dyn AsRef<OsStr>> = vec![&"-f", &format];
        args.extend(how.iter().map(|h| h as &dyn AsRef<OsStr>));
        args.push(&path);
        let mut bytes = vec![0; SIZE as usize];
        {
            let _qemu = qemu_nbd(&socket, &args);
            // One that lets in two says nothing to the third.
            let pairs = if how.contains(&"2") { &[("nbd.connections", "2")][..] } else { &[] };
            let image = open_uri(&unix(&socket, ""), pairs, RW);
            let info = image.info().unwrap();
            assert_eq!((info.driver, info.format, info.size), ("nbd", "raw", SIZE));
            let many = how.contains(&"8") || how.contains(&"2");
            assert_eq!(property(&image, "nbd.multi-conn"), if many { "on" } else { "off" });
            exercise(&image, &mut bytes, &mut rng, 150);
            exercise_together(&image, &mut bytes, &mut rng, 20);
            if !many {
                assert_eq!(property(&image, "nbd.connections"), "1");
            }
            image.close().unwrap();
        }
        {
            // By TCP, a part of the time with fewer connections.
            let port = free_port();
            let _qemu = on_port(&dir, "qemu-nbd", port, &args);
            let uri = format!("nbd://127.0.0.1:{port}");
            for connections in ["1", "2"] {
                let image = open_uri(&uri, &[("nbd.connections", connections)], RW);
                exercise(&image, &mut bytes, &mut rng, 30);
                image.close().unwrap();
            }
        }
        check_same(&path, format, &bytes, &dir.join("scratch"));
        if format == "qcow2" {
            check_clean(&path);
        }
    }
}

#[test]
fn a_read_only_export_of_qemu_nbd() {
    let dir = Tmp::in_memory("cli-qemu-ro");
    let bytes = sparse_bytes(&dir.join("disk"), SIZE, &mut Rng::new(5));
    let socket = dir.join("q.sock");
    let path = dir.join("disk");
    // -e: without it the next client waits until the one before has gone.
    let _qemu = qemu_nbd(
        &socket,
        &[&"-e", &"8", &"-r", &"-f", &"raw", &"-x", &"näme", &"-D", &"text ü", &path],
    );
    let uri = unix(&socket, "n%C3%A4me");
    let e = uri_error(&uri, &[], RW);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EROFS), "{e}");
    let image = open_uri(&uri, &[], RO);
    assert_same(&read_all(&image), &bytes, 0, "read-only");
    assert_eq!(image.write_at(&[1], 0, NONE).unwrap_err().kind(), ErrorKind::Errno(libc::EROFS));
    image.flush().unwrap();
    assert_eq!(property(&image, "nbd.export"), "näme");
    assert_eq!(property(&image, "nbd.description"), "text ü");
    // More at once than the server takes in one request.
    assert_eq!(image.info().unwrap().can_cache, qblk::block::Can::Native);
    let large = dir.join("large");
    fs::File::create(&large).unwrap().set_len(100 << 20).unwrap();
    let other = dir.join("l.sock");
    let _large = qemu_nbd(&other, &[&"-e", &"8", &"-r", &"-f", &"raw", &large]);
    open_uri(&unix(&other, ""), &[], RO).cache(4096, 90 << 20).unwrap();
    let e = uri_error(&unix(&socket, "missing"), &[], RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    assert!(e.to_string().contains("missing"), "{e}");
    let list = qblk::image::list_exports(unix(&socket, "").as_bytes(), &options(&[])).unwrap();
    assert_eq!(list.len(), 1);
    assert_eq!(
        (&list[0].name[..], &list[0].description[..]),
        ("näme".as_bytes(), "text ü".as_bytes())
    );
}

/// A context as nbdinfo tells it, neighbours merged.
fn by_nbdinfo(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let text = peer!("nbdinfo", format!("--map={context}"), uri).ok();
    let mut out: Vec<(u64, u64, u64)> = Vec::new();
    for line in text.lines() {
        let n: Vec<u64> = line.split_whitespace().take(3).map(|w| w.parse().unwrap()).collect();
        add(&mut out, n[0], n[1], n[2]);
    }
    out
}

fn add(out: &mut Vec<(u64, u64, u64)>, at: u64, len: u64, what: u64) {
    match out.last_mut() {
        Some(last) if last.2 == what => last.1 += len,
        _ => out.push((at, len, what)),
    }
}

/// The same by our client.
fn by_us(image: &Image, context: &str) -> Vec<(u64, u64, u64)> {
    let (mut out, mut at, end) = (Vec::new(), 0, image.size().unwrap());
    while at < end {
        let runs = image.block_status(context.as_bytes(), at, end - at, 1000).unwrap();
        assert!(!runs.is_empty(), "{context} at {at}");
        for (len, what) in runs {
            add(&mut out, at, len, what);
            at += len;
        }
    }
    out
}

fn chain(dir: &Tmp) {
    let (base, mid, top) = (dir.join("base"), dir.join("mid"), dir.join("top"));
    sparse_bytes(&base, SIZE, &mut Rng::new(seed("contexts")));
    for (path, below, format) in [(&mid, &base, "raw"), (&top, &mid, "qcow2")] {
        peer!("qemu-img", "create", "-f", "qcow2", "-b", below, "-F", format, path).ok();
    }
    qemu_io(&mid, "qcow2", &["write -P 3 100k 300k", "write -z 1M 200k"]);
    qemu_io(&top, "qcow2", &["write -P 4 300k 100k", "write -z 2M 64k", "write -P 5 1100k 1k"]);
}

#[test]
fn contexts_of_qemu_nbd_are_understood() {
    let dir = Tmp::in_memory("cli-qemu-ctx");
    chain(&dir);
    let top = dir.join("top");
    for bitmap in ["b0", "b1"] {
        peer!("qemu-img", "bitmap", "-f", "qcow2", "--add", "-g", "64k", top, bitmap).ok();
        qemu_io(&top, "qcow2", &["write -P 6 512k 10k", "write -P 7 2560k 130k"]);
        peer!("qemu-img", "bitmap", "-f", "qcow2", "--disable", top, bitmap).ok();
        qemu_io(&top, "qcow2", &["write -P 8 768k 1k"]);
    }
    let socket = dir.join("q.sock");
    let args: [&dyn AsRef<OsStr>; 11] =
        [&"-e", &"8", &"-r", &"-A", &"-B", &"b0", &"-B", &"b1", &"-f", &"qcow2", &top];
    let _qemu = qemu_nbd(&socket, &args);
    let uri = unix(&socket, "");
    let (b0, b1) = ("qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1");
    let asked = format!("{b0},nobody:knows,{b1}");
    let image = open_uri(&uri, &[("nbd.contexts", &asked)], RO);
    for context in ["base:allocation", "qemu:allocation-depth", b0, b1] {
        let theirs = by_nbdinfo(&uri, context);
        assert_eq!(by_us(&image, context), theirs, "{context}");
        assert!(theirs.len() > 2, "{context}: {theirs:?}");
    }
    assert!(by_us(&image, b0).contains(&(512 << 10, 64 << 10, 1)));
    image.block_status(b"nobody:knows", 0, 512, 1000).unwrap_err();
    let told = property(&image, "nbd.contexts");
    assert!(told.contains(b1) && !told.contains("nobody"), "{told}");
    // Extents: those of the chain that qemu-nbd has open, as far as NBD can tell them.
    let depths = by_us(&image, "qemu:allocation-depth");
    let allocation = by_us(&image, "base:allocation");
    for e in all_extents(&image, 0, SIZE, 7) {
        let at = |runs: &[(u64, u64, u64)]| runs.iter().rfind(|r| r.0 <= e.offset).unwrap().2;
        assert_eq!(u64::from(e.has(Extent::ZERO)), at(&allocation) >> 1, "{e:?}");
        // Zeroes that take room, QEMU calls both.
        if !e.has(Extent::ZERO) {
            assert_eq!(u64::from(!e.has(Extent::DATA)), at(&allocation) & 1, "{e:?}");
        }
        match at(&depths) {
            0 => assert!(!e.has(Extent::ALLOCATED), "{e:?}"),
            d => {
                assert_eq!((u64::from(e.depth), e.has(Extent::ALLOCATED)), (d - 1, d == 1), "{e:?}")
            }
        }
    }
}

#[test]
fn a_qcow2_image_is_opened_through_nbd() {
    let dir = Tmp::in_memory("cli-inside");
    let mut rng = Rng::new(seed("client_inside"));
    // A file that is as long as the image may become.
    let disk = dir.join("disk.qcow2");
    create(&disk, "qcow2", SIZE, &[("cluster-size", "4k")]);
    fs::OpenOptions::new().write(true).open(&disk).unwrap().set_len(3 * SIZE).unwrap();
    let socket = dir.join("k.sock");
    let mut bytes = vec![0; SIZE as usize];
    for _ in 0..2 {
        let _nbdkit = nbdkit(&socket, &[&"file", &disk]);
        let uri = unix(&socket, "");
        let image = open_uri(&uri, &[("format", "qcow2")], RW);
        assert_eq!(image.info().unwrap().driver, "nbd");
        exercise(&image, &mut bytes, &mut rng, 120);
        image.close().unwrap();
        // Found by probing, too.
        let image = open_uri(&uri, &[], RO);
        assert_eq!((image.info().unwrap().format, image.size().unwrap()), ("qcow2", SIZE));
        assert_same(&read_all(&image), &bytes, 0, "probed");
    }
    check_no_corruption(&disk);
    check_same(&disk, "qcow2", &bytes, &dir.join("scratch"));
}

#[test]
fn an_overlay_stands_on_an_export() {
    let dir = Tmp::in_memory("cli-backing");
    let mut rng = Rng::new(seed("client_backing"));
    let base = dir.join("base");
    let before = sparse_bytes(&base, SIZE, &mut rng);
    let socket = dir.join("k.sock");
    let _nbdkit = nbdkit(&socket, &[&"-r", &"file", &base]);
    let uri = unix(&socket, "");
    // One that names the export itself.
    let named = dir.join("named");
    peer!("qemu-img", "create", "-f", "qcow2", "-b", uri, "-F", "raw", named).ok();
    let e = open_error(&named, &options(&[]), RW);
    assert_eq!(e.kind(), ErrorKind::Policy, "{e}");
    assert!(e.to_string().contains("implicit-open"), "{e}");
    // And one that is told.
    let plain = dir.join("plain");
    create(&plain, "qcow2", SIZE, &[]);
    let told = dir.join("told");
    create(&told, "qcow2", SIZE, &[("backing-file", "base"), ("backing-fmt", "raw")]);
    let any = [("implicit-open", "any"), ("backing.nbd.connections", "2")];
    let given = [("backing-file", &*uri), ("backing-fmt", "raw")];
    let cases: [(&Path, &[(&str, &str)]); 2] = [(&named, &any), (&told, &given)];
    for (path, pairs) in cases {
        let mut bytes = before.clone();
        let image = open_with(path, &options(pairs), RW);
        assert_eq!(image.info().unwrap().backing_depth, 1);
        exercise(&image, &mut bytes, &mut rng, 100);
        image.close().unwrap();
        check_clean(path);
        check_same(path, "qcow2", &bytes, &dir.join("scratch"));
    }
    assert_same(&fs::read(&base).unwrap(), &before, 0, "the base is untouched");
}
