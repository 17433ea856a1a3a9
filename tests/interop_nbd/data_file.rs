//! qcow2 whose external data file is an NBD export: named by the caller, or by the image where the open
//! policy lets it. The server is qemu-nbd or ours; QEMU judges what came of it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::client_model::{exercise, exercise_together};
use super::common::*;
use super::peers::*;
use qblk::block::ErrorKind;
use qblk::image::state;
use qblk::{Image, OpenFlags, Options};

/// No multiple of a cluster.
const SIZE: u64 = (2 << 20) + 1536;

/// An image, and its data file, which nobody has written to.
fn make(dir: &Tmp, pairs: &[(&str, &str)]) -> (PathBuf, PathBuf) {
    let (path, data) = (dir.join("image"), dir.join("data"));
    let all = [&[("data-file", "data")], pairs].concat();
    create(&path, "qcow2", SIZE, &all);
    (path, data)
}

/// The image with its data at `uri`, as the caller says.
fn opened(path: &Path, uri: &str, flags: OpenFlags) -> Image {
    // The caller's own word needs no leave.
    open_with(path, &options(&[("data-file", uri), ("implicit-open", "deny")]), flags)
}

/// What `qemu-img` is told of the image with its data at a socket.
fn for_qemu(path: &Path, socket: &Path, export: &str) -> String {
    let (path, socket) = (path.display(), socket.display());
    format!(
        "driver=qcow2,file.driver=file,file.filename={path},data-file.driver=raw,\
         data-file.file.driver=nbd,data-file.file.path={socket},data-file.file.export={export}"
    )
}

/// `qemu-img` finds nothing wrong, and the bytes; by the export, and by the local file that is behind it.
fn judged(dir: &Tmp, path: &Path, socket: &Path, export: &str, bytes: &[u8], raw: bool) {
    let (image, scratch) = (for_qemu(path, socket, export), dir.join("scratch"));
    peer!("qemu-img", "check", "--image-opts", image).ok();
    fs::write(&scratch, bytes).unwrap();
    let other = format!("driver=raw,file.driver=file,file.filename={}", scratch.display());
    peer!("qemu-img", "compare", "--image-opts", image, other).ok();
    if raw {
        let alone = format!("driver=nbd,path={},export={export}", socket.display());
        peer!("qemu-img", "compare", "--image-opts", alone, other).ok();
    }
}

/// Turns of ours and QEMU's, with the image closed between them.
fn turns(dir: &Tmp, path: &Path, uri: &str, socket: &Path, export: &str, raw: bool, rng: &mut Rng) {
    let mut bytes = vec![0; SIZE as usize];
    for turn in 0..3 {
        let image = opened(path, uri, RW);
        assert_ne!(image.info().unwrap().state & state::HAS_DATA_FILE, 0);
        exercise(&image, &mut bytes, rng, 120);
        exercise_together(&image, &mut bytes, rng, 8);
        image.close().unwrap();
        judged(dir, path, socket, export, &bytes, raw);
        let at = rng.below(SIZE / 512 - 300) * 512;
        let n = rng.range(1, 200) * 512;
        let byte = turn + 0x41;
        let (write, zero) = (format!("write -P {byte} {at} {n}"), format!("write -zu {n} 4k"));
        let image = for_qemu(path, socket, export);
        let out = peer!("qemu-io", "--image-opts", "-c", write, "-c", zero, image).ok();
        assert!(!out.contains("failed"), "{out}");
        bytes[at as usize..][..n as usize].fill(byte);
        bytes[n as usize..][..4096].fill(0);
        let image = opened(path, uri, RO);
        assert_same(&read_all(&image), &bytes, 0, "what QEMU wrote");
        image.close().unwrap();
    }
}

#[test]
fn data_at_qemu_nbd_is_what_the_disk_holds() {
    let dir = Tmp::in_memory("nbd-data-qemu");
    let mut rng = Rng::new(seed("nbd_data_qemu"));
    let socket = dir.join("q.sock");
    for (pairs, raw) in [
        (&[][..], false),
        (&[("data-file-raw", "on")], true),
        (&[("extended-l2", "on"), ("cluster-size", "16k")], false),
        (&[("cluster-size", "512")], false),
    ] {
        let (path, data) = make(&dir, pairs);
        let _qemu = qemu_nbd(
            &socket,
            &[&"-e", &"8", &"--discard=unmap", &"-f", &"raw", &"-x", &"d", &data],
        );
        turns(&dir, &path, &unix(&socket, "d"), &socket, "d", raw, &mut rng);
    }
}

#[test]
fn data_at_our_server_is_what_the_disk_holds() {
    let dir = Tmp::in_memory("nbd-data-own");
    let mut rng = Rng::new(seed("nbd_data_own"));
    for (pairs, raw) in [(&[][..], false), (&[("data-file-raw", "on")], true)] {
        let (path, data) = make(&dir, pairs);
        let below = open_with(&data, &options(&[("format", "raw")]), RW);
        let served = Served::new(&dir, &[("d", &below)], &[]);
        turns(&dir, &path, &served.unix("d"), &served.socket, "d", raw, &mut rng);
        let image = opened(&path, &served.tcp("d"), RW);
        let held = read_all(&image);
        image.close().unwrap();
        served.stop();
        below.close().unwrap();
        // The local file is the same bytes.
        assert_same(&read_all(&open(&path, RO)), &held, 0, "without a server");
    }
}

#[test]
fn encrypted_data_at_a_server() {
    let dir = Tmp::in_memory("nbd-data-luks");
    let mut rng = Rng::new(seed("nbd_data_luks"));
    let luks = [("encrypt.format", "luks"), ("encrypt.iter-time", "10"), ("key", "open sesame")];
    let (path, data) = make(&dir, &luks);
    let below = open_with(&data, &options(&[("format", "raw")]), RW);
    let served = Served::new(&dir, &[("d", &below)], &[]);
    let opts = options(&[("data-file", &served.unix("d")), ("key", "open sesame")]);
    let mut bytes = vec![0; SIZE as usize];
    for _ in 0..2 {
        let image = open_with(&path, &opts, RW);
        exercise(&image, &mut bytes, &mut rng, 100);
        image.write_at(b"in plain words", 70_000, NONE).unwrap();
        bytes[70_000..70_014].copy_from_slice(b"in plain words");
        image.close().unwrap();
    }
    assert_same(&read_all(&open_with(&path, &opts, RO)), &bytes, 0, "opened again");
    let there = read_all(&below);
    assert!(there.iter().any(|b| *b != 0) && !there.windows(14).any(|w| w == b"in plain words"));
    served.stop();
}

/// Change the name of the data file that the image records to one that is as long.
fn rename_data(path: &Path, old: &str, new: &str) {
    let head = fs::read(path).unwrap();
    let at = head.windows(old.len()).position(|w| w == old.as_bytes()).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(new.as_bytes(), at as u64).unwrap();
}

#[test]
fn what_the_image_names_is_connected_to_by_leave_only() {
    let dir = Tmp::in_memory("nbd-data-policy");
    let (path, data) = (dir.join("image"), dir.join("data"));
    let below = raw_file(&data, SIZE);
    let served = Served::new(&dir, &[("d", &below)], &[]);
    let uri = served.tcp("d");
    let filler = "x".repeat(uri.len());
    create(&path, "qcow2", SIZE, &[("data-file", &filler)]);
    fs::remove_file(dir.join(&filler)).unwrap();
    rename_data(&path, &filler, &uri);
    let asked = || served.server.stats().connections;
    for (pairs, flags) in [
        (&[][..], RW),
        (&[], RO),
        (&[("implicit-open", "local")], RO),
        (&[("implicit-open", "deny")], RO),
        (&[("implicit-open", "any"), ("format", "qcow2")], OpenFlags::UNTRUSTED),
    ] {
        let e = open_error(&path, &options(pairs), flags);
        assert_eq!(e.kind(), ErrorKind::Policy, "{pairs:?}: {e}");
        assert!(e.to_string().contains("data file") && e.to_string().contains(&uri), "{e}");
    }
    assert_eq!(asked(), 0, "the server was asked");
    let any = options(&[("implicit-open", "any")]);
    let image = open_with(&path, &any, RW);
    image.write_at(b"named", 99, NONE).unwrap();
    image.close().unwrap();
    assert!(asked() > 0);
    // The caller's word goes where the image's does not.
    let hostile = options(&[("data-file", &uri), ("format", "qcow2"), ("implicit-open", "deny")]);
    let image = open_with(&path, &hostile, OpenFlags::UNTRUSTED);
    assert_eq!(read_range(&image, 99, 5), b"named");
    // A program is never what an image names.
    let exec = format!("{:x<1$}", "nbd+exec:", uri.len());
    rename_data(&path, &uri, &exec);
    let e = open_error(&path, &any, RO);
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
    assert!(e.to_string().contains("not a path"), "{e}");
}

#[test]
fn an_export_that_does_not_fit_says_so() {
    let dir = Tmp::in_memory("nbd-data-fit");
    let (path, data) = make(&dir, &[]);
    let below = open_with(&data, &options(&[("format", "raw")]), RW);
    let short = raw_file(&dir.join("short"), SIZE / 2);
    let served = Served::new(&dir, &[("d", &below), ("short", &short)], &[]);
    export(&served.server, "ro", "", &below, true);
    // Not to be written, and not there.
    let with = |name: &str| options(&[("data-file", &served.unix(name))]);
    let e = open_error(&path, &with("ro"), RW);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EROFS), "{e}");
    assert_eq!(read_range(&open_with(&path, &with("ro"), RO), 0, 3), [0; 3]);
    let e = open_error(&path, &with("none"), RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    // A disk that is longer than its data has room for, and its bytes that were there.
    let image = opened(&path, &served.unix("d"), RW);
    image.write_at(&[7; 100], SIZE - 100, NONE).unwrap();
    image.close().unwrap();
    let image = opened(&path, &served.unix("short"), RW);
    let mut buf = [0; 100];
    let e = image.read_at(&mut buf, SIZE - 100).unwrap_err();
    assert!(e.to_string().contains("past the end"), "{e}");
    assert_eq!(read_range(&image, 100, 100), [0; 100]);
    drop(image);
    // An export is as long as it is: a disk can shrink in it, and grow as far as it reaches.
    let image = opened(&path, &served.unix("d"), RW);
    let grow = image.resize(SIZE + 65536, &Options::new(), false).unwrap_err();
    assert_eq!(grow.kind(), ErrorKind::Errno(libc::ENOTSUP), "{grow}");
    assert_eq!(image.size().unwrap(), SIZE);
    image.resize(SIZE / 2, &Options::new(), true).unwrap();
    assert_eq!((image.size().unwrap(), below.size().unwrap()), (SIZE / 2, SIZE));
    image.resize(SIZE, &Options::new(), false).unwrap();
    assert_eq!(read_range(&image, SIZE - 100, 100), [0; 100]);
    image.write_at(&[8; 100], SIZE - 100, NONE).unwrap();
    image.close().unwrap();
    let mut bytes = vec![0; SIZE as usize];
    bytes[SIZE as usize - 100..].fill(8);
    judged(&dir, &path, &served.socket, "d", &bytes, false);
    // Nor is one made by making an image.
    let opts = options(&[("data-file", &served.unix("d"))]);
    let e = qblk::image::create(OsStr::new("new"), "qcow2", SIZE, &opts).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
    assert!(!Path::new("new").exists());
}
