//! Files that cannot be opened, or are no images.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::common::*;
use qblk::block::ErrorKind;
use qblk::image::state;
use qblk::{Image, OpenFlags, Options};

#[test]
fn a_file_that_is_not_there_or_no_file_is_told_apart() {
    let dir = Tmp::in_memory("files");
    for flags in [RO, RW, OpenFlags::INFO_ONLY] {
        let e = open_error(&dir.join("gone"), &Options::new(), flags);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
        assert!(e.to_string().contains("gone"), "{e}");
        let e = open_error(&dir.join("gone/too"), &Options::new(), flags);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
        let e = open_error(dir.path(), &Options::new(), flags);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EISDIR), "{e}");
    }
    fs::write(dir.join("file"), b"x").unwrap();
    let e = open_error(&dir.join("file/in"), &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOTDIR), "{e}");
    std::os::unix::fs::symlink("round", dir.join("round")).unwrap();
    let e = open_error(&dir.join("round"), &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ELOOP), "{e}");
    for bad in ["", "file:", "mem:", "mem:many", "mem:-1"] {
        let e = open_error(bad.as_ref(), &Options::new(), RO);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{bad:?}: {e}");
    }
    let e = open_error("plugin:x.so".as_ref(), &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    let e = open_error("json:{}".as_ref(), &Options::new(), RO);
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
    // A FIFO that nobody writes to must not hang the open.
    let fifo = std::ffi::CString::new(dir.join("fifo").to_str().unwrap()).unwrap();
    // SAFETY: a path that ends with NUL.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    let e = open_error(&dir.join("fifo"), &Options::new(), RO);
    assert!(matches!(e.kind(), ErrorKind::Errno(_) | ErrorKind::Unsupported), "{e}");
}

#[test]
fn what_may_not_be_opened_is_eacces() {
    // Root may open everything: be somebody else, on a thread of its own.
    need_root("what another user may not open is opened as another user");
    let dir = Tmp::in_memory("permission");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, &[]);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let hidden = dir.join("hidden");
    create(&hidden, "raw", 4096, &[]);
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600)).unwrap();
    std::thread::spawn(move || {
        let _dir = dir;
        // SAFETY: the system call changes this thread's user only, which ends with it.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) }, 0);
        let e = open_error(&hidden, &Options::new(), RO);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EACCES), "{e}");
        assert!(e.to_string().contains("hidden"), "{e}");
        let e = open_error(&path, &Options::new(), RW);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EACCES), "{e}");
        open(&path, RO);
        let new = path.with_file_name("new");
        let e = qblk::image::create(new.as_os_str(), "qcow2", 4096, &Options::new()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EACCES), "{e}");
        // SAFETY: as above; back, so that the directory can be removed.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, -1, 0, -1) }, 0);
    })
    .join()
    .unwrap();
}

#[test]
fn an_empty_file_is_a_raw_image_of_no_bytes_and_no_qcow2_image() {
    let dir = Tmp::in_memory("empty");
    let path = dir.join("image");
    fs::write(&path, b"").unwrap();
    let image = open(&path, RW);
    let info = image.info().unwrap();
    assert_eq!((info.size, info.format), (0, "raw"));
    assert_ne!(info.state & state::PROBED, 0);
    image.read_at(&mut [], 0).unwrap();
    image.close().unwrap();
    let e = open_error(&path, &options(&[("format", "qcow2")]), RO);
    assert_eq!(e.kind(), ErrorKind::Format, "{e}");
    assert!(e.to_string().contains("empty"), "{e}");
}

#[test]
fn options_that_mean_nothing_are_refused_with_the_nearest_that_does() {
    let dir = Tmp::in_memory("options");
    let path = dir.join("image");
    create(&path, "qcow2", 1 << 20, &[]);
    for (key, value, words) in [
        ("fromat", "raw", "'format'"),
        ("cluster-size", "64k", "no use"),
        ("format", "vmdk", "qcow2"),
        ("cache.l2-size", "much", "size"),
        ("io", "fast", "mmap"),
        ("implicit-open", "yes", "deny"),
    ] {
        let e = open_error(&path, &options(&[(key, value)]), RO);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{key}: {e}");
        assert!(e.to_string().contains(words), "{key}: {e}");
    }
    for (key, value) in [
        ("cluster-size", "1000"),
        ("cluster-size", "256"),
        ("cluster-size", "4M"),
        ("refcount-bits", "3"),
        ("compat", "2.0"),
        ("preallocation", "some"),
        ("compression-type", "lzma"),
        ("lazy-refcounts", "yes"),
        ("backing-fmt", "raw"),
        ("format", "raw"),
    ] {
        let new = dir.join("new");
        let opts = options(&[(key, value)]);
        let e = qblk::image::create(new.as_os_str(), "qcow2", 1 << 20, &opts).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{key}={value}: {e}");
        assert!(!new.exists(), "{key}={value} left a file");
    }
    let e = open_error(&path, &Options::new(), OpenFlags(1 << 20));
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    let e = open_error(&path, &Options::new(), RW | OpenFlags::SHARED);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
}

#[test]
fn creating_leaves_what_was_there_if_it_must_not_be_replaced() {
    let dir = Tmp::in_memory("exclusive");
    let path = dir.join("image");
    fs::write(&path, b"precious").unwrap();
    let opts = options(&[("exclusive", "on")]);
    let e = qblk::image::create(path.as_os_str(), "qcow2", 1 << 20, &opts).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EEXIST), "{e}");
    let opts = options(&[("cluster-size", "1000")]);
    qblk::image::create(path.as_os_str(), "qcow2", 1 << 20, &opts).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

/// A sound image with everything in it, to be cut off.
fn whole(dir: &Tmp) -> (std::path::PathBuf, Vec<u8>) {
    let path = dir.join("whole");
    create(&path, "qcow2", 4 << 20, &[("cluster-size", "4096")]);
    let mut data = Rng::new(9).bytes(2 << 20);
    data.resize(4 << 20, 0);
    let image = open(&path, RW);
    image.write_at(&data[..2 << 20], 0, NONE).unwrap();
    image.close().unwrap();
    qemu_io(&path, "qcow2", &["write -c -P 3 3M 4k", "write -z 3200k 64k"]);
    data[3 << 20..(3 << 20) + 4096].fill(3);
    (path, data)
}

#[test]
fn an_image_that_is_cut_off_anywhere_is_reported_or_read_rightly() {
    let dir = Tmp::in_memory("cut");
    let (path, data) = whole(&dir);
    let bytes = fs::read(&path).unwrap();
    let cut = dir.join("cut");
    let mut lengths: Vec<usize> = (0..150).collect();
    lengths.extend((150..bytes.len()).step_by(bytes.len() / 150));
    for cluster in 1..12 {
        lengths.extend([cluster * 4096 - 1, cluster * 4096, cluster * 4096 + 1]);
    }
    let (mut opened, mut refused) = (0, 0);
    for n in lengths {
        fs::write(&cut, &bytes[..n]).unwrap();
        for flags in [RO, RW] {
            let image = match Image::open(cut.as_os_str(), &options(&[("format", "qcow2")]), flags)
            {
                Ok(image) => image,
                Err(e) => {
                    refused += 1;
                    let fine = matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Format);
                    assert!(fine, "cut to {n}: {e}");
                    assert!(e.to_string().contains("cut"), "cut to {n}: {e}");
                    continue;
                }
            };
            opened += 1;
            for at in (0..data.len()).step_by(4096) {
                let mut found = [0xee; 4096];
                match image.read_at(&mut found, at as u64) {
                    // The last cluster may be there in part; what is gone of it reads as zeroes.
                    Ok(()) => {
                        let expected = &data[at..at + 4096];
                        let bad = (0..4096).find(|&i| found[i] != expected[i] && found[i] != 0);
                        assert!(bad.is_none(), "cut to {n}: wrong bytes at {at}");
                    }
                    Err(e) => {
                        assert_eq!(e.kind(), ErrorKind::Corrupt, "cut to {n}: {e}");
                    }
                }
                if flags == RW && at % 65536 == 0 {
                    let _ = image.write_at(&[1; 100], at as u64, NONE);
                }
            }
            let mut some = [qblk::Extent::default(); 16];
            let _ = image.extents(0, data.len() as u64, &mut some);
            let _ = image.close();
        }
    }
    assert!(opened > 100 && refused > 100, "{opened} {refused}");
}
