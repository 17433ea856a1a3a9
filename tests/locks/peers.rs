//! Against qemu-io, qemu-img, qemu-nbd and the storage daemon: every row of the tables that QEMU's
//! protocol was written down in, in both directions.

use super::*;

/// What each of our modes holds, and how it is opened.
struct Mode {
    name: &'static str,
    flags: OpenFlags,
    options: &'static [(&'static str, &'static str)],
    qcow2: &'static [u64],
    raw: &'static [u64],
}

const MODES: &[Mode] = &[
    Mode { name: "writer", flags: RW, options: &[], qcow2: WRITER, raw: WRITER },
    Mode { name: "reader", flags: RO, options: &[], qcow2: READER, raw: &[100, 203] },
    Mode { name: "shared", flags: SHARED, options: &[], qcow2: &[100], raw: &[100] },
    Mode { name: "info", flags: INFO, options: &[], qcow2: &[], raw: &[] },
    Mode { name: "no lock", flags: NO_LOCK, options: &[], qcow2: &[], raw: &[] },
    Mode { name: "lock=off", flags: RW, options: &[("lock", "off")], qcow2: &[], raw: &[] },
    Mode {
        name: "alone",
        flags: RW,
        options: &[("lock-exclusive", "on")],
        qcow2: &[100, 101, 103, 200, 201, 202, 203],
        raw: &[100, 101, 103, 200, 201, 202, 203],
    },
    Mode {
        name: "reading alone",
        flags: RO,
        options: &[("lock-exclusive", "on")],
        qcow2: &[100, 200, 201, 202, 203],
        raw: &[100, 200, 201, 202, 203],
    },
];

impl Mode {
    fn bytes(&self, format: &str) -> &'static [u64] {
        if format == "raw" { self.raw } else { self.qcow2 }
    }

    fn open(&self, path: &Path, format: Option<&str>) -> Result<Image, Error> {
        let mut options = options(self.options);
        options.set("format", format.map(str::as_bytes));
        Image::open(path.as_os_str(), &options, self.flags)
    }
}

/// With a peer that holds `held`, each of our modes is let in if it may be, and the error names the
/// peer if not.
fn each_mode_beside(peer: &str, pid: Option<u32>, held: &[u64], path: &Path, format: &str) {
    assert_eq!(locked(path), held, "{peer} on {format}");
    for mode in MODES {
        for given in [Some(format), None] {
            let what = format!("{peer} has {held:?} of {format}, {} wants it", mode.name);
            let wanted = mode.bytes(format);
            let opened = mode.open(path, given);
            if agree(held, wanted) {
                let image = opened.unwrap_or_else(|e| panic!("{what}: {e}"));
                let mut all = [held, wanted].concat();
                all.sort_unstable();
                assert_eq!(locked(path), all, "{what}");
                drop(image);
            } else {
                let text = is_locked(opened, &what);
                let name = path.file_name().unwrap().to_str().unwrap();
                assert!(text.contains(name) && text.contains("permission \""), "{text}");
                if let Some(pid) = pid {
                    assert!(text.contains(&format!("process {pid} ('qemu-")), "{what}: {text}");
                }
            }
            assert_eq!(locked(path), held, "{what}, and gave it up");
        }
    }
}

fn images(dir: &Tmp) -> [(&'static str, std::path::PathBuf); 2] {
    let (raw, qcow2) = (dir.join("disk.raw"), dir.join("disk.qcow2"));
    create(&raw, "raw", 1 << 20, &[]);
    create(&qcow2, "qcow2", 1 << 20, &[]);
    [("raw", raw), ("qcow2", qcow2)]
}

#[test]
fn qemu_io_first() {
    let dir = Tmp::new("locks-io");
    let [(_, raw), (_, qcow2)] = images(&dir);
    for (flags, format, path, held) in [
        (&[][..], "qcow2", &qcow2, WRITER),
        (&["-r"], "qcow2", &qcow2, READER),
        (&["-r", "-U"], "qcow2", &qcow2, &[100]),
        (&[], "raw", &raw, &[100, 101]),
        (&["-r"], "raw", &raw, &[100]),
        (&["-r", "-U"], "raw", &raw, &[100]),
    ] {
        let peer = Peer::io(flags, format, path);
        each_mode_beside(&format!("qemu-io {flags:?}"), Some(peer.pid()), held, path, format);
    }
}

#[test]
fn qemu_nbd_first() {
    let dir = Tmp::new("locks-nbd");
    let [(_, raw), (_, qcow2)] = images(&dir);
    for (flags, format, path, held) in [
        (&[][..], "qcow2", &qcow2, WRITER),
        (&["-r"], "qcow2", &qcow2, READER),
        (&[], "raw", &raw, &[100, 101, 203]),
        (&["-r"], "raw", &raw, &[100, 203]),
    ] {
        let peer = Peer::nbd(&dir, flags, format, path);
        each_mode_beside(&format!("qemu-nbd {flags:?}"), Some(peer.pid()), held, path, format);
    }
}

#[test]
fn the_storage_daemon_first() {
    let dir = Tmp::new("locks-qsd");
    let [(_, raw), (_, qcow2)] = images(&dir);
    for (format, path, writable, held) in [
        ("raw", &raw, "on", &[100, 101, 203][..]),
        ("raw", &raw, "none", &[]),
        ("qcow2", &qcow2, "on", WRITER),
    ] {
        let socket = dir.join(format!("{format}-{writable}.sock"));
        let file = format!("driver=file,node-name=f,filename={}", path.display());
        let node = if format == "qcow2" { "q" } else { "f" };
        let server = format!("addr.type=unix,addr.path={}", socket.display());
        let mut args = vec!["--blockdev".to_owned(), file];
        if format == "qcow2" {
            args.extend(["--blockdev".into(), "driver=qcow2,node-name=q,file=f".into()]);
        }
        args.extend(["--nbd-server".into(), server]);
        // A node that nobody uses holds nothing.
        if writable != "none" {
            let export = format!("type=nbd,id=e,node-name={node},writable={writable}");
            args.extend(["--export".into(), export]);
        }
        let peer = Peer::server("qemu-storage-daemon", &args, &socket);
        each_mode_beside("qemu-storage-daemon", Some(peer.pid()), held, path, format);
    }
}

#[test]
fn every_other_holder_that_is_known_first() {
    let dir = Tmp::new("locks-third");
    for (format, path) in images(&dir) {
        for (who, held) in [
            ("qemu-img info", &[201, 203][..]),
            ("creating a file", &[101, 103, 203]),
            ("a running machine, share-rw=off", &[100, 101, 201]),
            ("a running machine that never resizes", &[100, 101, 201, 203]),
            ("qemu up to 6.1", &[100, 101, 103, 104, 201, 203]),
            ("all for itself", &[100, 101, 103, 200, 201, 202, 203]),
            ("libvirt", &[0]),
        ] {
            let third = Third::hold(&path, held);
            each_mode_beside(who, None, held, &path, format);
            drop(third);
        }
    }
}

#[test]
fn a_lock_for_one_alone_is_in_the_way_too() {
    let dir = Tmp::new("locks-write");
    for (_, path) in images(&dir) {
        for byte in [100, 201] {
            let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let third = Third(file);
            assert!(third.set(libc::F_WRLCK, byte));
            let text = is_locked(try_open(&path, RW), "a write lock");
            assert!(text.contains(&format!("byte {byte}")), "{text}");
            third.set(libc::F_UNLCK, byte);
            drop(open(&path, RW));
        }
    }
}

/// Whether a program of QEMU did what it was asked to; if not, it must be for a lock.
fn did(program: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) -> bool {
    let out = run(program, args);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    let text = text + &String::from_utf8_lossy(&out.stdout);
    let refused = text.contains("Failed to get") && text.contains("lock");
    assert!(out.status.success() != refused, "{program}: {} {text}", out.status);
    !refused
}

#[test]
fn we_first() {
    let dir = Tmp::new("locks-we");
    let list = images(&dir);
    for (format, path) in &list {
        for mode in MODES {
            let ours = mode.bytes(format);
            let image = mode.open(path, Some(format)).unwrap();
            assert_eq!(locked(path), ours, "{} on {format}", mode.name);
            let may = |what: &str, theirs: &[u64], did: bool| {
                assert_eq!(did, agree(ours, theirs), "we are {}, {what} of {format}", mode.name);
            };
            let raw = *format == "raw";
            let rw: &[u64] = if raw { &[100, 101] } else { WRITER };
            let ro: &[u64] = if raw { &[100] } else { READER };
            let io = |flags: &[&str]| Peer::try_io(flags, format, path).is_some();
            may("qemu-io", rw, io(&[]));
            may("qemu-io -r", ro, io(&["-r"]));
            may("qemu-io -r -U", &[100], io(&["-r", "-U"]));
            let did_resize = did("qemu-img", &[&"resize", &"-f", format, path, &"+1M"]);
            may("qemu-img resize", &[100, 101, 103, 201, 203], did_resize);
            if !raw {
                let did_check = did("qemu-img", &[&"check", &"-r", &"all", &"-f", format, path]);
                may("qemu-img check -r", WRITER, did_check);
            }
            let info: &[u64] = if raw { &[] } else { &[201, 203] };
            may("qemu-img info", info, did("qemu-img", &[&"info", path]));
            may("qemu-img info -U", &[], did("qemu-img", &[&"info", &"-U", path]));
            let made = did("qemu-img", &[&"create", &"-q", &"-f", format, path, &"2M"]);
            may("qemu-img create", &[101, 103, 203], made);
            drop(image);
            assert_eq!(locked(path), []);
        }
    }
}

#[test]
fn each_file_of_a_chain_is_locked() {
    let dir = Tmp::new("locks-chain");
    let (base, middle, top) = (dir.join("base.raw"), dir.join("middle"), dir.join("top"));
    create(&base, "raw", 1 << 20, &[]);
    create(&middle, "qcow2", 1 << 20, &[("backing-file", "base.raw"), ("backing-fmt", "raw")]);
    create(&top, "qcow2", 1 << 20, &[("backing-file", "middle"), ("backing-fmt", "qcow2")]);
    let bytes = || [locked(&top), locked(&middle), locked(&base)];

    let peer = Peer::io(&[], "qcow2", &top);
    let theirs = bytes();
    drop(peer);
    let image = open(&top, RW);
    assert_eq!(bytes()[..2], theirs[..2], "as QEMU does");
    // QEMU lets others write into a raw base (it holds 100 only), and with it change what every overlay
    // reads. Here nobody may.
    assert_eq!(bytes(), [WRITER, READER, READER]);
    // Two overlays may stand on one base; nobody may write into it, here or there.
    let other = dir.join("other");
    create(&other, "qcow2", 1 << 20, &[("backing-file", "middle"), ("backing-fmt", "qcow2")]);
    drop(open(&other, RW));
    let text = is_locked(try_open(&base, RW), "a base that is in use");
    assert!(text.contains("base.raw"), "{text}");
    assert!(Peer::try_io(&[], "raw", &base).is_none());
    image.close().unwrap();
    assert_eq!(bytes(), [&[] as &[u64]; 3]);

    // Of the file in the chain that is in use the error says so, and of which image it is the base.
    let peer = Peer::io(&[], "raw", &base);
    let text = is_locked(try_open(&top, RO), "a base that is written");
    assert!(text.contains("base.raw") && text.contains("backing file of"), "{text}");
    assert_eq!(bytes(), [&[] as &[u64], &[], &[100, 101]], "nothing is left of the failure");
    drop(open_with(&top, &options(&[("backing.backing.lock", "off")]), RO));
    drop(open(&top, SHARED));
    drop(peer);
    drop(open_with(&top, &options(&[("lock", "off")]), RW));
    let image = open(&top, SHARED);
    assert_eq!(bytes(), [[100]; 3]);
    drop(image);
}

#[test]
fn a_file_is_locked_while_it_is_made() {
    let dir = Tmp::new("locks-create");
    let path = dir.join("new");
    let name = qblk::block::Name::from(path.clone().into_os_string());
    for _ in 0..2 {
        let creating = qblk::file::create(&name, false).unwrap();
        assert_eq!(locked(&path), [101, 103, 203]);
        assert!(Peer::try_io(&[], "raw", &path).is_some(), "as QEMU's creating lets it");
        assert!(!did("qemu-img", &[&"create", &"-q", &"-f", &"raw", &path, &"1M"]));
        assert!(matches!(qblk::file::create(&name, false), Err(Error::Locked { .. })));
        is_locked(try_open(&path, RW), "a file that is being made");
        creating.keep();
        assert_eq!(locked(&path), []);
    }
    // What others have open in any way is not overwritten, and stays as it is.
    create(&path, "qcow2", 1 << 20, &[]);
    let before = fs::read(&path).unwrap();
    for flags in [&[][..], &["-r"], &["-r", "-U"]] {
        let _peer = Peer::io(flags, "qcow2", &path);
        let made = qblk::image::create(path.as_os_str(), "raw", 1, &options(&[]));
        assert!(matches!(made, Err(Error::Locked { .. })), "{made:?}");
    }
    assert!(before == fs::read(&path).unwrap());
}
