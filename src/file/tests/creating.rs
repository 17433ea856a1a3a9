//! Making files, and not making them.

use super::*;

#[test]
fn what_is_created_and_not_kept_is_removed() {
    let temp = Temp::new();
    let creating = create(&temp.name(), true).unwrap();
    creating.open().unwrap().resize(1 << 20, Prealloc::Off, false).unwrap();
    assert!(temp.0.exists());
    drop(creating);
    assert!(!temp.0.exists());

    create(&temp.name(), false).unwrap().keep();
    assert!(temp.0.exists());
    assert_eq!(errno(create(&temp.name(), true)), libc::EEXIST);
    // What was there before stays there, empty.
    fs::write(&temp.0, b"old").unwrap();
    let creating = create(&temp.name(), false).unwrap();
    let dev = Device::new(creating.open().unwrap());
    assert_eq!(dev.size(), 0);
    dev.write_slice(b"half", 0, ReqFlags::NONE).unwrap();
    drop(creating);
    assert_eq!(fs::read(&temp.0).unwrap(), b"");
    // Another file that has come there is not ours to remove.
    fs::remove_file(&temp.0).unwrap();
    let creating = create(&temp.name(), false).unwrap();
    fs::remove_file(&temp.0).unwrap();
    // The first is still open, so its number cannot be given to this one.
    fs::write(&temp.0, b"another").unwrap();
    drop(creating);
    assert_eq!(fs::read(&temp.0).unwrap(), b"another");
}

#[test]
fn creating_through_a_dangling_link_makes_its_target() {
    let (link, target) = (Temp::new(), Temp::new());
    std::os::unix::fs::symlink(target.0.file_name().unwrap(), &link.0).unwrap();
    drop(create(&link.name(), false).unwrap());
    assert!(!target.0.exists() && link.0.is_symlink());
    create(&link.name(), false).unwrap().keep();
    assert!(target.0.exists() && link.0.is_symlink());
}

#[test]
fn a_file_in_use_is_not_overwritten() {
    for (byte, text) in [(101, "byte 101"), (203, "\"resize\" is claimed")] {
        let temp = Temp::with(b"precious");
        let user = temp.file();
        // SAFETY: a `flock` of zeroes is a valid one.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_start, lock.l_len) = (libc::F_RDLCK as _, byte, 1);
        // SAFETY: `lock` is ours.
        assert_eq!(unsafe { libc::fcntl(user.as_raw_fd(), libc::F_OFD_SETLK, &lock) }, 0);
        let e = create(&temp.name(), false).err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Locked);
        assert!(e.to_string().contains(text), "{e}");
        assert_eq!(fs::read(&temp.0).unwrap(), b"precious");
        // By hand: the child of a test that forks just now has the description too.
        lock.l_type = libc::F_UNLCK as _;
        // SAFETY: `lock` is ours.
        assert_eq!(unsafe { libc::fcntl(user.as_raw_fd(), libc::F_OFD_SETLK, &lock) }, 0);
        assert!(create(&temp.name(), false).is_ok());
    }
}

#[test]
fn a_forked_child_removes_nothing() {
    let temp = Temp::new();
    let creating = create(&temp.name(), true).unwrap();
    // SAFETY: the child only drops what it has and leaves.
    match unsafe { libc::fork() } {
        0 => {
            drop(creating);
            // SAFETY: no destructor of the test's is to run.
            unsafe { libc::_exit(0) }
        }
        child => {
            let mut status = 0;
            // SAFETY: `status` is ours.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert!(libc::WIFEXITED(status) && temp.0.exists());
        }
    }
}
