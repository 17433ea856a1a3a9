//! The manager that ships: leases in a shared directory, one host.

use std::os::unix::fs::PermissionsExt;

use super::*;

pub fn leased(dir: &Path, interval: u32, pairs: &[(&str, &str)]) -> Options {
    managed(lease_manager(), pairs)
        .with("lock-manager.dir", dir.as_os_str().as_encoded_bytes())
        .with("lock-manager.interval", interval.to_string())
}

fn site(what: &str) -> (Tmp, PathBuf, PathBuf) {
    let dir = Tmp::in_memory(what);
    let (leases, path) = (dir.join("leases"), dir.join("disk.qcow2"));
    fs::create_dir(&leases).unwrap();
    create(&path, "qcow2", 1 << 20, &[]);
    (dir, leases, path)
}

fn lease_file(leases: &Path) -> PathBuf {
    let mut all = fs::read_dir(leases).unwrap().map(|e| e.unwrap().path());
    all.find(|p| p.extension().is_some_and(|e| e == "lease")).expect("a lease file")
}

#[test]
fn writers_and_readers_are_kept_apart() {
    let (_dir, leases, path) = site("lease-modes");
    let o = leased(&leases, 20, &[("lock-owner", "first one")]);
    let writer = open_managed(&path, &o, RW).unwrap();
    for flags in [RW, RO] {
        let text = is_locked(open_managed(&path, &o, flags));
        let me = format!("first_one has it for writing (process {}", std::process::id());
        assert!(text.contains(&me), "{text}");
    }
    drop(open_managed(&path, &o, OpenFlags::SHARED).unwrap());
    // For much longer than a lease lasts: it is renewed.
    let text = is_locked(open_managed(&path, &o.clone().with("lock-wait", "0.5"), RW));
    assert!(text.contains("first_one"), "{text}");
    writer.write_at(b"x", 0, NONE).unwrap();
    writer.close().unwrap();
    let readers = [open_managed(&path, &o, RO).unwrap(), open_managed(&path, &o, RO).unwrap()];
    let text = is_locked(open_managed(&path, &o, RW));
    assert!(text.contains("for reading"), "{text}");
    // A reader cannot turn into a writer beside another, and can alone.
    assert_eq!(readers[0].reopen(None, RW).unwrap_err().kind(), ErrorKind::Locked);
    let [one, other] = readers;
    other.close().unwrap();
    one.reopen(None, RW).unwrap();
    is_locked(open_managed(&path, &o, RO));
    one.reopen(None, RO).unwrap();
    drop(open_managed(&path, &o, RO).unwrap());
    // Readable by people.
    let text = fs::read_to_string(lease_file(&leases)).unwrap();
    assert!(text.starts_with("qblk-lease 1 generation=") && text.contains("first_one"), "{text}");
}

#[test]
fn settings_that_mean_nothing_are_refused() {
    let (_dir, leases, path) = site("lease-settings");
    for (key, value, words) in [
        ("dir", "", "the setting dir"),
        ("interval", "0", "interval"),
        ("interval", "1s", "interval"),
        ("takeover", "soon", "takeover=dead|expired"),
        ("colour", "red", "colour=red"),
    ] {
        let mut o = leased(&leases, 20, &[]);
        o.set(&format!("lock-manager.{key}"), Some(value.as_bytes()));
        let e = open_managed(&path, &o, RW).err().unwrap_or_else(|| panic!("{key}={value}"));
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
        assert!(e.to_string().contains(words), "{e}");
    }
    let e = open_managed(&path, &leased(&leases.join("gone"), 20, &[]), RW).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
}

#[test]
fn a_lease_file_that_is_deleted_fences_its_holder_and_is_waited_out() {
    let (_dir, leases, path) = site("lease-deleted");
    let o = leased(&leases, 30, &[]);
    let holder = open_managed(&path, &o, RW).unwrap();
    holder.write_at(b"one", 0, NONE).unwrap();
    fs::remove_file(lease_file(&leases)).unwrap();
    let begun = Instant::now();
    let next = open_managed(&path, &o, RW).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(120), "{:?}", begun.elapsed());
    let e = holder.write_at(b"two", 0, NONE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Locked, "{e}");
    assert!(e.to_string().contains("reopened"), "{e}");
    for e in [holder.flush(), holder.zero(0, 512, NONE), holder.trim(0, 512, NONE)] {
        assert_eq!(e.unwrap_err().kind(), ErrorKind::Locked);
    }
    assert_eq!(read_range(&holder, 0, 3), b"one", "it may still read");
    next.write_at(b"new", 0, NONE).unwrap();
    // Reopened it has to ask again, and gets it when it is free.
    assert_eq!(holder.reopen(None, RW).unwrap_err().kind(), ErrorKind::Locked);
    next.close().unwrap();
    holder.reopen(None, RW).unwrap();
    assert_eq!(read_range(&holder, 0, 3), b"new");
    holder.write_at(b"fin", 0, NONE).unwrap();
    holder.close().unwrap();
    check_clean(&path);
}

/// What a fenced device had in memory only is lost, and must not reach what is another's.
#[test]
fn a_fenced_device_writes_nothing_at_close() {
    let (_dir, leases, path) = site("lease-close");
    let o = leased(&leases, 10, &[]);
    let holder = open_managed(&path, &o, RW).unwrap();
    // Its table is in memory only.
    holder.write_at(&[7; 4096], 1 << 19, NONE).unwrap();
    fs::remove_dir_all(&leases).unwrap();
    wait_for("the fence", || holder.write_at(b"x", 0, NONE).is_err());
    let before = fs::read(&path).unwrap();
    assert_eq!(holder.close().unwrap_err().kind(), ErrorKind::Locked);
    assert!(before == fs::read(&path).unwrap(), "it was written to");
    check_no_corruption(&path);
}

/// A disk without room: a new lease is refused with the reason, one that is held is kept.
#[test]
fn a_full_disk_ends_no_lease_that_is_held() {
    need_root("a small file system is mounted");
    let (dir, _, path) = site("lease-full");
    let small = dir.join("small");
    fs::create_dir(&small).unwrap();
    run_ok("mount", &[&"-t", &"tmpfs", &"-o", &"size=128k", &"none", &small]);
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            run("umount", &[&"-l", &self.0]);
        }
    }
    let mounted = Mounted(small);
    let o = leased(&mounted.0, 20, &[]);
    let holder = open_managed(&path, &o, RW).unwrap();
    let mut room = vec![0u8; 1 << 20];
    room.truncate(1 << 17);
    let _ = fs::write(mounted.0.join("rest"), &room);
    let until = Instant::now() + Duration::from_millis(300);
    while Instant::now() < until {
        holder.write_at(b"x", 0, NONE).unwrap_or_else(|e| panic!("{e}"));
        std::thread::sleep(Duration::from_millis(5));
    }
    let other = dir.join("other");
    create(&other, "raw", 512, &[]);
    let e = open_managed(&other, &o, RW).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOSPC), "{e}");
    fs::remove_file(mounted.0.join("rest")).unwrap();
    drop(open_managed(&other, &o, RW).unwrap());
    assert!(is_locked(open_managed(&path, &o, RW)).contains("for writing"));
    holder.close().unwrap();
}

#[test]
fn a_lease_is_handed_over_for_migration() {
    let (_dir, leases, path) = site("lease-adopt");
    let o = leased(&leases, 20, &[]);
    let source = open_managed(&path, &o, RW).unwrap();
    source.write_at(b"source", 0, NONE).unwrap();
    source.flush().unwrap();
    let lease = source.property("lock-lease").unwrap().unwrap();
    is_locked(open_managed(&path, &o, RW));
    let e = open_managed(&path, &o.clone().with("lock-adopt", "nonsense"), RW).err().unwrap();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    let target = open_managed(&path, &o.clone().with("lock-adopt", &lease), RW).unwrap();
    // By now the source has stopped: it was waited for.
    assert_eq!(source.write_at(b"late", 0, NONE).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(read_range(&target, 0, 6), b"source");
    target.write_at(b"target", 0, NONE).unwrap();
    target.close().unwrap();
    let _ = source.close();
    check_clean(&path);
}

/// A directory that cannot be written for a while: writes stop when the lease runs out, and go on when
/// it is renewed, for nobody else has had it.
#[test]
fn a_lease_that_could_not_be_renewed_is_regained() {
    let (_dir, leases, path) = site("lease-regain");
    let o = leased(&leases, 25, &[]);
    let holder = open_managed(&path, &o, RW).unwrap();
    // Somebody keeps the lease file locked for changing.
    let file = fs::OpenOptions::new().read(true).write(true).open(lease_file(&leases)).unwrap();
    set_update_lock(&file, libc::F_WRLCK);
    wait_for("the fence", || holder.write_at(b"x", 0, NONE).is_err());
    let e = holder.write_at(b"x", 0, NONE).unwrap_err();
    assert!(e.to_string().contains("renewed in time"), "{e}");
    set_update_lock(&file, libc::F_UNLCK);
    wait_for("the lease", || holder.write_at(b"y", 0, NONE).is_ok());
    holder.flush().unwrap();
    holder.close().unwrap();
    check_clean(&path);
}

fn set_update_lock(file: &fs::File, kind: i32) {
    use std::os::fd::AsRawFd;
    wait_for("the lock", || {
        // SAFETY: a `flock` of zeroes is a valid one, and it is ours.
        unsafe {
            let mut lock: libc::flock = std::mem::zeroed();
            (lock.l_type, lock.l_start, lock.l_len) = (kind as _, 1 << 32, 1);
            libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) == 0
        }
    });
}

#[test]
fn a_damaged_lease_file_is_nobodys() {
    let (_dir, leases, path) = site("lease-damaged");
    let o = leased(&leases, 20, &[]);
    drop(open_managed(&path, &o, RW).unwrap());
    poke(&lease_file(&leases), 300, b"?");
    let e = open_managed(&path, &o, RW).err().unwrap();
    assert!(e.to_string().contains("is damaged"), "{e}");
    fs::set_permissions(&leases, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Steps of the wall clock cannot matter to what never asks for it.
#[test]
fn the_wall_clock_is_not_asked() {
    let text = run_ok("nm", &[&"-D", &"-u", &lease_manager()]);
    assert!(text.contains("clock_gettime"), "{text}");
    for name in [" time", "gettimeofday", "timespec_get", "ftime", " clock\n"] {
        assert!(!text.contains(name), "{name} is used: {text}");
    }
    for file in ["lockmgr-lease/lease.c", "lockmgr-lease/record.c", "src/block/fence.rs"] {
        let code = fs::read_to_string(source(file)).unwrap();
        assert!(!code.contains("REALTIME") && !code.contains("SystemTime"), "{file}");
        assert!(!code.contains("st_mtim"), "{file}");
    }
}
