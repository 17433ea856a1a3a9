//! External data files: which are opened and which are not, what lies in them, and that a raw one is
//! always what the guest sees.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::common::*;
use qblk::block::ErrorKind;
use qblk::image::state;
use qblk::{Extent, OpenFlags, Options, ReqFlags};

const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 65536;

/// An image that names `data`, with that file made as it says.
fn with_data(dir: &Tmp, name: &str, data: &str, raw: bool) -> PathBuf {
    let path = dir.join(name);
    let on_off = if raw { "on" } else { "off" };
    create(&path, "qcow2", SIZE, &[("data-file", data), ("data-file-raw", on_off)]);
    path
}

/// An image whose header names whatever is asked for, in as many bytes as `data` has.
fn names(dir: &Tmp, name: &str, data: &str) -> PathBuf {
    let filler = "x".repeat(data.len());
    let path = with_data(dir, name, &filler, false);
    fs::remove_file(dir.join(&filler)).unwrap();
    let head = fs::read(&path).unwrap();
    let at = head.windows(filler.len()).position(|w| w == filler.as_bytes()).unwrap();
    poke(&path, at as u64, data.as_bytes());
    path
}

/// Opening is refused by the policy; a description can be had, and touches nothing else.
fn policy(path: &Path, opts: &Options, flags: OpenFlags, words: &[&str]) {
    let e = open_error(path, opts, flags);
    assert_eq!(e.kind(), ErrorKind::Policy, "{e}");
    for word in words {
        assert!(e.to_string().contains(word), "{word:?} not in: {e}");
    }
    let image = open(path, OpenFlags::INFO_ONLY);
    assert_ne!(image.info().unwrap().state & state::HAS_DATA_FILE, 0);
    assert_eq!(image.info().unwrap().size, SIZE);
}

#[test]
fn a_relative_name_is_seen_from_the_image() {
    let dir = Tmp::in_memory("data-relative");
    fs::create_dir_all(dir.join("deep/data")).unwrap();
    let path = with_data(&dir, "deep/image", "data/file", false);
    let image = open(&path, RW);
    image.write_at(&[0x61; 100], 5 * CLUSTER, NONE).unwrap();
    assert_eq!(image.property("data-file").unwrap().unwrap(), b"data/file");
    image.close().unwrap();
    let data = dir.join("deep/data/file");
    assert_eq!(peek(&data, 5 * CLUSTER, 101), [&[0x61; 100][..], &[0]].concat());
    assert_eq!(fs::metadata(&data).unwrap().len(), SIZE);
    // By another way, and by descriptor.
    let way = dir.join("deep/../deep/image");
    assert_eq!(read_range(&open(&way, RO), 5 * CLUSTER, 1), [0x61]);
    let fd = fs::File::open(&path).unwrap().into();
    let image = qblk::Image::open_fd(fd, &Options::new(), RO).unwrap();
    assert_eq!(read_range(&image, 5 * CLUSTER, 1), [0x61]);
    drop(image);
    // With a scheme, and as an absolute path.
    let absolute = format!("file:{}", data.display());
    let path = names(&dir, "with-scheme", &absolute);
    assert_eq!(read_range(&open(&path, RO), 0, 1), [0]);
    // The caller's word goes.
    fs::rename(&data, dir.join("elsewhere")).unwrap();
    let path = dir.join("deep/image");
    let e = open_error(&path, &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    assert!(e.to_string().contains("data/file (data file of "), "{e}");
    let chosen = options(&[("data-file", dir.join("elsewhere").to_str().unwrap())]);
    assert_eq!(read_range(&open_with(&path, &chosen, RO), 5 * CLUSTER, 1), [0x61]);
    let chosen = chosen.with("implicit-open", "deny");
    assert_eq!(read_range(&open_with(&path, &chosen, RO), 5 * CLUSTER, 1), [0x61]);
    let image = open_with(&path, &chosen.with("format", "qcow2"), RW | OpenFlags::UNTRUSTED);
    assert_eq!(read_range(&image, 5 * CLUSTER, 1), [0x61]);
    drop(image);
    // Where there is none to choose, choosing is a mistake.
    for format in ["raw", "qcow2"] {
        let path = dir.join(format);
        create(&path, format, SIZE, &[]);
        let e = open_error(&path, &options(&[("data-file", "x"), ("format", format)]), RO);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
        assert!(e.to_string().contains("'data-file'"), "{e}");
    }
}

#[test]
fn what_is_no_local_file_is_not_opened() {
    let dir = Tmp::in_memory("data-policy");
    let good = with_data(&dir, "good", "data", false);
    let deny = options(&[("implicit-open", "deny")]);
    policy(&good, &deny, RO, &["implicit-open=deny", "data file", "'data-file'"]);
    let untrusted = options(&[("format", "qcow2")]);
    policy(&good, &untrusted, OpenFlags::UNTRUSTED, &["data file", "QBLK_OPEN_UNTRUSTED"]);
    let both = OpenFlags::UNTRUSTED | OpenFlags::NO_BACKING;
    policy(&good, &untrusted, both, &["data file", "QBLK_OPEN_UNTRUSTED"]);
    for name in ["nbd://localhost:1/", "json:{}", "https://example.org/x", "nbd+exec:x"] {
        let path = names(&dir, "remote", name);
        policy(&path, &Options::new(), RO, &["data file", "not a local file"]);
    }
    let any = options(&[("implicit-open", "any")]);
    let e = open_error(&names(&dir, "remote", "json:{}"), &any, RO);
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
    let path = names(&dir, "nul", "a\0b");
    policy(&path, &Options::new(), RO, &["no file name"]);
    // A FIFO must not hang the opening, a directory is none.
    let fifo = std::ffi::CString::new(dir.join("fifo").to_str().unwrap()).unwrap();
    // SAFETY: a path that ends with NUL.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    policy(&names(&dir, "on-fifo", "fifo"), &Options::new(), RO, &["data file", "FIFO"]);
    policy(&names(&dir, "on-null", "/dev/null"), &Options::new(), RW, &["character device"]);
    // No name at all.
    let path = names(&dir, "nameless", "gone");
    let head = fs::read(&path).unwrap();
    let at = head.windows(4).position(|w| w == b"gone").unwrap() as u64;
    poke(&path, at - 4, &0u32.to_be_bytes());
    poke(&path, at, &[0; 8]);
    let e = open_error(&path, &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    assert!(e.to_string().contains("'data-file'"), "{e}");
    let data = dir.join("data");
    open_with(&path, &options(&[("data-file", data.to_str().unwrap())]), RO);
}

#[test]
fn a_file_is_in_a_chain_once() {
    let dir = Tmp::in_memory("data-loop");
    policy(&names(&dir, "itself", "itself"), &Options::new(), RW, &["loop", "itself"]);
    fs::write(dir.join("base"), [0x33; 70_000]).unwrap();
    let path = dir.join("top");
    create(
        &path,
        "qcow2",
        SIZE,
        &[("backing-file", "base"), ("backing-fmt", "raw"), ("data-file", "data")],
    );
    assert_eq!(read_range(&open(&path, RO), 0, 2), [0x33; 2]);
    let same = options(&[("data-file", dir.join("base").to_str().unwrap())]);
    let e = open_error(&path, &same, RO);
    assert_eq!(e.kind(), ErrorKind::Policy, "{e}");
    assert!(e.to_string().contains("loop"), "{e}");
    // Nor is an image made that could be its own.
    let opts = options(&[("data-file", "new")]);
    let e = qblk::image::create(dir.join("new").as_os_str(), "qcow2", SIZE, &opts).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    assert!(!dir.join("new").exists());
}

#[test]
fn a_backing_image_brings_its_data_file_if_its_format_is_recorded() {
    let dir = Tmp::in_memory("data-below");
    // (QEMU looks for it from where it is run.)
    let data = dir.join("data");
    let base = with_data(&dir, "base", data.to_str().unwrap(), false);
    let image = open(&base, RW);
    image.write_at(&[0x55; 1000], 3 * CLUSTER, NONE).unwrap();
    image.close().unwrap();
    let path = dir.join("top");
    create(&path, "qcow2", SIZE, &[("backing-file", "base"), ("backing-fmt", "qcow2")]);
    let image = open(&path, RW);
    assert_eq!(read_range(&image, 3 * CLUSTER, 1001)[999..], [0x55, 0]);
    image.write_at(&[0x66; 100], 3 * CLUSTER + 500, NONE).unwrap();
    image.close().unwrap();
    check_clean(&path);
    // It is only read: the same bytes as before.
    assert_eq!(peek(&data, 3 * CLUSTER, 1000), [0x55; 1000]);
    let moved = dir.join("moved");
    fs::rename(&data, &moved).unwrap();
    let e = open_error(&path, &Options::new(), RO);
    assert!(e.to_string().contains("data file of"), "{e}");
    let opts = options(&[("backing.data-file", moved.to_str().unwrap())]);
    let image = open_with(&path, &opts, RO);
    assert_eq!(read_range(&image, 3 * CLUSTER + 499, 2), [0x55, 0x66]);
    // What was only guessed to be an image names no files.
    let head = fs::read(&path).unwrap();
    let at = head.windows(4).position(|w| w == 0xe279_2acau32.to_be_bytes()).unwrap() as u64;
    poke(&path, at, &0x1234_5678u32.to_be_bytes());
    fs::rename(&moved, &data).unwrap();
    let e = open_error(&path, &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Policy, "{e}");
    assert!(e.to_string().contains("does not record its format"), "{e}");
}

#[test]
fn the_data_file_is_locked_as_the_image_is() {
    let dir = Tmp::new("data-locks");
    let one = with_data(&dir, "one", "data", false);
    let two = dir.join("two");
    fs::copy(&one, &two).unwrap();
    let image = open(&one, RW);
    for flags in [RO, RW] {
        let e = open_error(&two, &Options::new(), flags);
        assert_eq!(e.kind(), ErrorKind::Locked, "{e}");
        assert!(e.to_string().contains("data file of"), "{e}");
    }
    let out = run("qemu-io", &[&"-f", &"raw", &"-c", &"write 0 512", &dir.join("data")]);
    assert!(!out.status.success(), "QEMU wrote to it");
    // Nor is it emptied to be another's.
    let opts = options(&[("data-file", "data")]);
    let e = qblk::image::create(dir.join("three").as_os_str(), "qcow2", SIZE, &opts).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Locked, "{e}");
    assert!(!dir.join("three").exists());
    assert_eq!(fs::metadata(dir.join("data")).unwrap().len(), SIZE);
    open(&two, RO | OpenFlags::SHARED).close().unwrap();
    image.close().unwrap();
    let (one, two) = (open(&one, RO), open(&two, RO));
    one.close().unwrap();
    two.close().unwrap();
}

#[test]
fn a_raw_data_file_is_what_the_guest_sees() {
    for (cluster, extended, by_qemu) in
        [("512", "off", false), ("64k", "off", true), ("64k", "on", false), ("2M", "on", true)]
    {
        let mut rng = Rng::new(11);
        let dir = Tmp::new("data-raw");
        let (path, data) = (dir.join("image"), dir.join("data"));
        let size = (3 << 20) + 512;
        let mut model = vec![0; size as usize];
        let name = data.to_str().unwrap();
        if by_qemu {
            let opts = format!(
                "data_file={name},data_file_raw=on,cluster_size={cluster},extended_l2={extended}"
            );
            qemu_img!("create", "-q", "-f", "qcow2", "-o", opts, path, size.to_string());
        } else {
            let pairs = [
                ("data-file", name),
                ("data-file-raw", "on"),
                ("cluster-size", cluster),
                ("extended-l2", extended),
            ];
            create(&path, "qcow2", size, &pairs);
        }
        for round in 0..4 {
            let image = open(&path, RW);
            for _ in 0..60 {
                let n = rng.pick(&[1, 512, 4096, 70_000, 400_000]).min(model.len() as u64);
                let at = rng.below(model.len() as u64 - n + 1);
                let range = at as usize..(at + n) as usize;
                match rng.below(6) {
                    0 => image.zero(at, n, NONE).unwrap(),
                    1 => image.zero(at, n, ReqFlags::MAY_TRIM).unwrap(),
                    2 => {
                        image.trim(at, n, NONE).unwrap();
                        model[range].copy_from_slice(&read_range(&image, at, n));
                        continue;
                    }
                    _ => {
                        let bytes = rng.bytes(n as usize);
                        image.write_at(&bytes, at, NONE).unwrap();
                        model[range].copy_from_slice(&bytes);
                        continue;
                    }
                }
                model[range].fill(0);
            }
            image.flush().unwrap();
            // (QEMU makes it some whole clusters long.)
            let now = fs::read(&data).unwrap();
            let (guest, behind) = now.split_at(model.len());
            assert_same(guest, &model, 0, "the data file when flushed");
            assert!(by_qemu || behind.is_empty(), "{} bytes too many", behind.len());
            let new = if round % 2 == 0 { size + (1 << 20) } else { size - 70_144 };
            image.resize(new, &Options::new(), true).unwrap();
            model.resize(new as usize, 0);
            // Its holes are told.
            image.trim(0, 1 << 20, NONE).unwrap();
            model[..1 << 20].copy_from_slice(&read_range(&image, 0, 1 << 20));
            let extents = all_extents(&image, 0, 1 << 20, 10);
            // (QEMU reserves subclusters, but does not map them.)
            let mapped = extents.iter().all(|e| e.has(Extent::ALLOCATED));
            assert!(mapped || by_qemu, "{extents:?}");
            if model[..1 << 20].iter().all(|b| *b == 0) {
                assert!(extents.iter().all(|e| e.has(Extent::ZERO)), "{extents:?}");
            }
            image.close().unwrap();
            check_clean(&path);
            assert_same(&fs::read(&data).unwrap(), &model, 0, "the data file when closed");
            check_same(&path, "qcow2", &model, &dir.join("model"));
            // QEMU takes clusters away from the tables; they come back, zeroes in the file as well.
            // (What it discards it leaves in the file.)
            let commands = ["write -P 9 130k 3k", "write -z -u 256k 256k"];
            qemu_io(&path, "qcow2", &commands);
            model[130 << 10..133 << 10].fill(9);
            model[256 << 10..512 << 10].fill(0);
            let image = open(&path, RW);
            image.write_at(&[1], (256 << 10) + 7, NONE).unwrap();
            model[(256 << 10) + 7] = 1;
            image.close().unwrap();
            assert_same(&fs::read(&data).unwrap(), &model, 0, "the data file after QEMU");
            // The bit that promises it is still there.
            assert_eq!(peek_u64(&path, 88), 2);
        }
    }
}

#[test]
fn a_plain_data_file_has_clusters_where_the_guest_has_them() {
    let dir = Tmp::new("data-plain");
    let (path, data) = (dir.join("image"), dir.join("data"));
    let name = data.to_str().unwrap();
    create(&path, "qcow2", SIZE, &[("data-file", name)]);
    // What is in it where the image says nothing is nobody's.
    fs::write(&data, vec![0xaa; SIZE as usize]).unwrap();
    let image = open(&path, RW);
    assert_eq!(read_all(&image), vec![0; SIZE as usize]);
    for at in [0, 7 * CLUSTER, SIZE - 100] {
        image.write_at(&[0x11; 100], at, NONE).unwrap();
        let mut some = [Extent::default(); 1];
        image.extents(at, 1, &mut some).unwrap();
        assert_eq!((some[0].host_offset, some[0].has(Extent::HOST)), (at, true));
    }
    let mut expected = vec![0; SIZE as usize];
    for at in [0, 7 * CLUSTER, SIZE - 100] {
        expected[at as usize..][..100].fill(0x11);
    }
    assert_same(&read_all(&image), &expected, 0, "beside what was there");
    // What is on the host is that of both files.
    let both = on_disk(&path) + on_disk(&data);
    assert_eq!(image.info().unwrap().allocated, Some(both));
    // Trimmed space goes back at once.
    let before = on_disk(&data);
    image.trim(CLUSTER, 4 * CLUSTER, NONE).unwrap();
    assert_eq!(on_disk(&data), before, "what is not the image's is left alone");
    image.trim(7 * CLUSTER, CLUSTER, NONE).unwrap();
    assert_eq!(on_disk(&data), before - CLUSTER);
    expected[7 * CLUSTER as usize..][..CLUSTER as usize].fill(0);
    image.close().unwrap();
    check_clean(&path);
    check_same(&path, "qcow2", &expected, &dir.join("model"));
    // QEMU and this library in turn.
    qemu_io(&path, "qcow2", &["write -P 3 3k 70k", "write -z 64k 64k", "write -zu 128k 64k"]);
    expected[3 << 10..73 << 10].fill(3);
    expected[64 << 10..192 << 10].fill(0);
    let image = open(&path, RW);
    assert_same(&read_all(&image), &expected, 0, "written by QEMU");
    image.write_at(&[4; 10], 65 << 10, NONE).unwrap();
    expected[65 << 10..][..10].fill(4);
    image.close().unwrap();
    check_clean(&path);
    check_same(&path, "qcow2", &expected, &dir.join("model"));
}

#[test]
fn a_data_file_may_be_memory_or_an_export() {
    let dir = Tmp::in_memory("data-elsewhere");
    let path = with_data(&dir, "image", "data", false);
    let image = open_with(&path, &options(&[("data-file", "mem:1M")]), RW);
    image.write_at(&[0x77; 1000], 1000, NONE).unwrap();
    assert_eq!(read_range(&image, 999, 3), [0, 0x77, 0x77]);
    drop(image);
    let server = qblk::Image::open("mem:1M".as_ref(), &Options::new(), RW).unwrap();
    server.write_at(&[0x12; 4096], 0, NONE).unwrap();
    assert_eq!(read_range(&server, 0, 1), [0x12]);
}

#[test]
fn what_can_not_be_made_is_refused_and_leaves_no_file() {
    let dir = Tmp::in_memory("data-create");
    fs::write(dir.join("base"), [0; 512]).unwrap();
    for (pairs, words) in [
        (&[("data-file-raw", "on")][..], "'data-file-raw'"),
        (&[("data-file", "")], "empty"),
        (&[("data-file", "data"), ("compat", "0.10")], "compat=0.10"),
        (
            &[
                ("data-file", "data"),
                ("data-file-raw", "on"),
                ("backing-file", "base"),
                ("backing-fmt", "raw"),
            ],
            "'backing-file'",
        ),
        (&[("extended-l2", "on"), ("compat", "0.10")], "compat=0.10"),
        (&[("extended-l2", "on"), ("cluster-size", "8k")], "16k"),
    ] {
        let opts = options(pairs);
        let e = qblk::image::create(dir.join("new").as_os_str(), "qcow2", SIZE, &opts);
        let e = e.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
        assert!(e.to_string().contains(words), "{words:?} not in: {e}");
        let opts = options(&[("data-file", "nbd://localhost/")]);
        let e = qblk::image::create(dir.join("new").as_os_str(), "qcow2", SIZE, &opts);
        assert_eq!(e.unwrap_err().kind(), ErrorKind::Unsupported);
    }
    // One of the two can not be made.
    let opts = options(&[("data-file", "gone/data")]);
    let e = qblk::image::create(dir.join("new").as_os_str(), "qcow2", SIZE, &opts).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    let opts = options(&[("data-file", dir.join("data").to_str().unwrap())]);
    let e = qblk::image::create(dir.join("gone/new").as_os_str(), "qcow2", SIZE, &opts);
    assert_eq!(e.unwrap_err().kind(), ErrorKind::Errno(libc::ENOENT));
    // A name that does not fit into the header.
    let long = "n".repeat(600);
    let opts = options(&[("data-file", &long), ("cluster-size", "512")]);
    let e = qblk::image::create(dir.join("new").as_os_str(), "qcow2", SIZE, &opts).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["base"]);
}

#[test]
fn preallocation_reserves_space_in_the_data_file() {
    for how in ["off", "metadata", "falloc", "full"] {
        let dir = Tmp::new("data-prealloc");
        let (path, data) = (dir.join("image"), dir.join("data"));
        let pairs = [("data-file", data.to_str().unwrap()), ("preallocation", how)];
        create(&path, "qcow2", 4 << 20, &pairs);
        check_clean(&path);
        let reserved = on_disk(&data);
        match how {
            "falloc" | "full" => assert!(reserved >= 4 << 20, "{how}: {reserved}"),
            _ => assert_eq!(reserved, 0, "{how}"),
        }
        let image = open(&path, RO);
        assert_eq!(read_all(&image), vec![0; 4 << 20]);
        image.close().unwrap();
        check_same(&path, "qcow2", &vec![0; 4 << 20], &dir.join("model"));
    }
}

#[test]
fn a_raw_bit_without_a_data_file_and_snapshots_with_one_are_refused() {
    let dir = Tmp::in_memory("data-bits");
    let path = dir.join("image");
    create(&path, "qcow2", SIZE, &[]);
    poke(&path, 88, &2u64.to_be_bytes());
    let e = open_error(&path, &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    assert!(e.to_string().contains("no data file"), "{e}");
    open(&path, OpenFlags::INFO_ONLY);

    let path = with_data(&dir, "with", "data", false);
    poke(&path, 60, &1u32.to_be_bytes());
    poke(&path, 64, &(4 * CLUSTER).to_be_bytes());
    let e = open_error(&path, &Options::new(), RW);
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
    assert!(e.to_string().contains("snapshots"), "{e}");
}

#[test]
fn a_data_file_that_is_cut_off_is_reported() {
    let dir = Tmp::in_memory("data-short");
    let path = with_data(&dir, "image", "data", false);
    let image = open(&path, RW);
    image.write_at(&[1; 3 * CLUSTER as usize], 0, NONE).unwrap();
    image.close().unwrap();
    let file = fs::OpenOptions::new().write(true).open(dir.join("data")).unwrap();
    file.set_len(CLUSTER + 100).unwrap();
    let image = open(&path, RW);
    // What is left of a cluster counts, the rest of it is zeroes.
    assert_eq!(read_range(&image, CLUSTER + 99, 2), [1, 0]);
    for result in
        [image.read_at(&mut [0; 10], 2 * CLUSTER), image.write_at(&[2], 2 * CLUSTER, NONE)]
    {
        let e = result.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        assert!(e.to_string().contains("data") && e.to_string().contains("0x20000"), "{e}");
    }
    // What is not mapped may be written, and makes it longer.
    image.write_at(&[3; 10], 5 * CLUSTER, NONE).unwrap();
    assert_eq!(read_range(&image, 5 * CLUSTER, 11)[9..], [3, 0]);
    image.close().unwrap();
    let mut one = [0];
    fs::File::open(dir.join("data")).unwrap().read_exact_at(&mut one, 5 * CLUSTER).unwrap();
    assert_eq!(one, [3]);
}
