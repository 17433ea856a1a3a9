//! Internal snapshots, which must stay what they are, and features that nobody knows, which must be
//! refused by name.

use std::path::Path;

use super::common::*;
use qblk::block::ErrorKind;
use qblk::image::state;
use qblk::{OpenFlags, Options, ReqFlags};

#[test]
fn what_a_snapshot_holds_stays_when_the_image_is_written() {
    for (compat, cluster, compressed) in [
        ("0.10", "65536", false),
        ("1.1", "512", false),
        ("1.1", "65536", true),
        ("1.1", "2M", false),
    ] {
        let dir = Tmp::in_memory("snapshot");
        let (path, flat, out) = (dir.join("image"), dir.join("flat"), dir.join("out"));
        let size = 6usize << 20;
        let mut rng = Rng::new(7);
        let mut model = rng.bytes(size);
        model[1 << 20..2 << 20].fill(0);
        model[2 << 20..3 << 20].iter_mut().for_each(|b| *b &= 1);
        std::fs::write(&flat, &model).unwrap();
        let opts = format!("compat={compat},cluster_size={cluster}");
        if compressed {
            qemu_img!("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", opts, flat, path);
        } else {
            qemu_img!("convert", "-f", "raw", "-O", "qcow2", "-o", opts, flat, path);
        }
        let mut snapshots = Vec::new();
        for name in ["one", "two"] {
            qemu_img!("snapshot", "-c", name, path);
            snapshots.push((name, model.clone()));
            let image = open(&path, RW);
            for i in 0..60 {
                let at = rng.below(size as u64);
                let n = rng.pick(&[1, 4096, 65536, 400_000]).min(size as u64 - at);
                let range = at as usize..(at + n) as usize;
                match i % 6 {
                    0 => {
                        image.zero(at, n, rng.pick(&[NONE, ReqFlags::MAY_TRIM])).unwrap();
                        model[range].fill(0);
                    }
                    1 => {
                        image.trim(at, n, NONE).unwrap();
                        model[range].copy_from_slice(&read_range(&image, at, n));
                    }
                    _ => {
                        let data = rng.bytes(n as usize);
                        image.write_at(&data, at, NONE).unwrap();
                        model[range].copy_from_slice(&data);
                    }
                }
                if i % 20 == 0 {
                    image.flush().unwrap();
                }
            }
            assert_same(&read_all(&image), &model, 0, "the active image");
            image.close().unwrap();
            check_clean(&path);
            check_same(&path, "qcow2", &model, &dir.join("model"));
            for (name, bytes) in &snapshots {
                qemu_img!("convert", "-f", "qcow2", "-l", name, "-O", "raw", path, out);
                let found = std::fs::read(&out).unwrap();
                assert_same(&found, bytes, 0, &format!("snapshot {name}, {opts}"));
            }
        }
        // Going back to one, and without them.
        qemu_img!("snapshot", "-a", "one", path);
        assert_same(&read_all(&open(&path, RO)), &snapshots[0].1, 0, "applied");
        qemu_img!("snapshot", "-d", "one", path);
        qemu_img!("snapshot", "-d", "two", path);
        check_clean(&path);
    }
}

/// Opening for `flags` is refused with an error that has these words; a description can be had.
fn refused(path: &Path, flags: OpenFlags, kind: ErrorKind, words: &[&str]) {
    let before = std::fs::read(path).unwrap();
    let e = open_error(path, &Options::new(), flags);
    assert_eq!(e.kind(), kind, "{e}");
    let name = path.file_name().unwrap().to_str().unwrap();
    for word in words.iter().chain([&name]) {
        assert!(
            e.to_string().to_lowercase().contains(&word.to_lowercase()),
            "{word:?} not in: {e}"
        );
    }
    let image = open(path, flags | OpenFlags::INFO_ONLY);
    assert_eq!(image.info().unwrap().format, "qcow2");
    assert_eq!(image.size().unwrap(), 1 << 20);
    let e = image.read_at(&mut [0], 0).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EBADF), "{e}");
    drop(image);
    assert!(std::fs::read(path).unwrap() == before, "refusing changed the file");
}

fn state_of(path: &Path) -> u32 {
    open(path, OpenFlags::INFO_ONLY).info().unwrap().state
}

#[test]
fn what_is_locked_or_not_known_is_refused_by_name() {
    let dir = Tmp::in_memory("refused");
    let path = dir.join("luks");
    let secret = "secret,id=s,data=secret";
    let opts = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    qemu_img!("create", "-q", "-f", "qcow2", "--object", secret, "-o", opts, path, "1M");
    for flags in [RO, RW] {
        refused(&path, flags, ErrorKind::NeedKey, &["encrypted", "'key-file'"]);
    }
    assert_ne!(state_of(&path) & state::ENCRYPTED, 0);

    let path = dir.join("aes");
    create(&path, "qcow2", 1 << 20, &[]);
    poke(&path, 32, &1u32.to_be_bytes());
    refused(&path, RO, ErrorKind::NeedKey, &["encrypted", "'key-file'"]);

    let path = dir.join("unknown");
    create(&path, "qcow2", 1 << 20, &[]);
    poke(&path, 72, &(1u64 << 60).to_be_bytes());
    for flags in [RO, RW] {
        let e = open_error(&path, &Options::new(), flags);
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.to_string().contains("60"), "{e}");
    }
}

#[test]
fn what_would_damage_the_image_is_refused_for_writing_and_read_all_the_same() {
    let dir = Tmp::in_memory("read-only-features");
    let make = |name: &str| {
        let path = dir.join(name);
        create(&path, "qcow2", 1 << 20, &[]);
        qemu_io(&path, "qcow2", &["write -P 0x31 64k 64k"]);
        path
    };
    let reads = |path: &Path| {
        let image = open(path, RO);
        assert_eq!(read_range(&image, 65536, 65536), [0x31; 65536]);
        image.close().unwrap();
    };
    let path = make("dirty");
    poke(&path, 72, &1u64.to_be_bytes());
    reads(&path);
    assert_ne!(state_of(&path) & state::DIRTY, 0);
    // Opening it for writing repairs it.
    open(&path, RW).close().unwrap();
    reads(&path);
    assert_eq!(state_of(&path) & state::DIRTY, 0);
    check_clean(&path);

    let path = make("corrupt");
    poke(&path, 72, &2u64.to_be_bytes());
    refused(&path, RW, ErrorKind::Corrupt, &["marked as corrupt"]);
    reads(&path);
    assert_ne!(state_of(&path) & state::CORRUPT, 0);

    let path = make("bitmaps");
    qemu_img!("bitmap", "--add", "-f", "qcow2", path, "b0");
    // They are kept while it is written to.
    open(&path, RW).close().unwrap();
    reads(&path);
    check_clean(&path);
    let image = open(&path, OpenFlags::INFO_ONLY);
    assert_eq!(image.property("qcow2.bitmaps").unwrap().unwrap(), b"on");
}
