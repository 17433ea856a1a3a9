//! What is said: by errors, in the log, and about waiting.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;

#[test]
fn the_error_names_file_permission_byte_process_and_command() {
    let dir = Tmp::new("locks-error");
    let path = dir.join("disk.qcow2");
    create(&path, "qcow2", 1 << 20, &[]);
    let peer = Peer::io(&[], "qcow2", &path);
    let text = is_locked(try_open(&path, RW), "qemu-io has it");
    for part in [
        path.to_str().unwrap(),
        "in use",
        "permission \"write\"",
        "byte 201",
        &format!("process {} ('qemu-io -f qcow2 {}')", peer.pid(), path.display()),
    ] {
        assert!(text.contains(part), "{part:?} is missing: {text}");
    }
    let text = is_locked(try_open(&path, RO), "qemu-io has it");
    assert!(text.contains("byte 101") && text.contains("QBLK_OPEN_SHARED"), "{text}");
    let e = try_open(&path, RW).err().unwrap();
    assert_eq!(e.kind(), qblk::block::ErrorKind::Locked);

    let listed = qblk::file::holders(&path.clone().into_os_string().into()).unwrap();
    let bytes: Vec<u64> = listed.iter().map(|h| h.byte).collect();
    assert_eq!(bytes, WRITER);
    for holder in &listed {
        assert_eq!(holder.pid, Some(peer.pid() as i32));
        assert!(holder.command.starts_with(b"qemu-io -f qcow2 "));
        assert_eq!(holder.used, holder.byte < 200);
    }
    assert_eq!(locked(&path), WRITER, "listing leaves nothing behind");
}

#[test]
fn waiting_ends_when_the_other_lets_go_or_time_is_up() {
    let dir = Tmp::new("locks-wait");
    let path = dir.join("disk");
    create(&path, "qcow2", 1 << 20, &[]);
    let holder = open(&path, RW);
    let begun = Instant::now();
    let opened = Image::open(path.as_os_str(), &options(&[("lock-wait", "0.25")]), RO);
    let text = is_locked(opened, "somebody has it");
    assert!(begun.elapsed() >= Duration::from_millis(250), "{:?}", begun.elapsed());
    assert!(text.contains("waited 0."), "{text}");
    // Without the option nobody waits, and nothing is said of it.
    let text = is_locked(try_open(&path, RO), "somebody has it");
    assert!(!text.contains("waited"), "{text}");

    std::thread::scope(|s| {
        let waiter = s.spawn(|| open_with(&path, &options(&[("lock-wait", "60")]), RW));
        std::thread::sleep(Duration::from_millis(30));
        assert!(!waiter.is_finished());
        holder.close().unwrap();
        waiter.join().unwrap();
    });
    // Creating waits as well.
    let holder = open(&path, RO);
    let make =
        |wait| qblk::image::create(path.as_os_str(), "raw", 1, &options(&[("lock-wait", wait)]));
    assert!(make("0.05").unwrap_err().to_string().contains("waited"));
    std::thread::scope(|s| {
        let waiter = s.spawn(|| make("60"));
        std::thread::sleep(Duration::from_millis(20));
        drop(holder);
        waiter.join().unwrap().unwrap();
    });
    for bad in ["soon", "-1", ""] {
        let e = open_error(&path, &options(&[("lock-wait", bad)]), RO);
        assert!(e.to_string().contains("lock-wait"), "{e}");
    }
    let e = open_error(&path, &options(&[("lock-exclusive", "on")]), SHARED);
    assert!(e.to_string().contains("lock-exclusive"), "{e}");
}

/// Make every OFD lock of this thread fail, as on a file system that has none.
fn take_locks_away() {
    const OFD_GETLK: u32 = libc::F_OFD_GETLK as u32;
    const OFD_SETLK: u32 = libc::F_OFD_SETLK as u32;
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let jump = |k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt,
        jf,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let ret = libc::BPF_RET | libc::BPF_K;
    let mut filter = [
        statement(load, 0),
        jump(libc::SYS_fcntl as u32, 0, 4),
        // The low half of the second argument.
        statement(load, if cfg!(target_endian = "big") { 28 } else { 24 }),
        jump(OFD_GETLK, 1, 0),
        jump(OFD_SETLK, 0, 1),
        statement(ret, libc::SECCOMP_RET_ERRNO | libc::ENOLCK as u32),
        statement(ret, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: a well-formed filter, which the kernel copies; it holds for this thread.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let rc = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program);
        assert_eq!(rc, 0, "no seccomp filters here");
    }
}

#[test]
fn a_file_system_without_locks_is_said_so_once() {
    let dir = Tmp::new("locks-none");
    let path = dir.join("disk");
    create(&path, "qcow2", 1 << 20, &[]);
    let said = Arc::new(Mutex::new(Vec::new()));
    let sink = said.clone();
    let path = &path;
    std::thread::scope(|s| {
        s.spawn(move || {
            take_locks_away();
            qblk::log::set_sink(
                Some(Box::new(move |level, text| {
                    sink.lock().unwrap().push((level, text.to_owned()))
                })),
                2,
            );
            let first = open(path, RW);
            let second = open(path, RW);
            for image in [&first, &second] {
                let state = image.info().unwrap().state;
                assert_eq!(state & qblk::image::state::LOCKED, 0);
            }
            second.reopen(None, RO).unwrap();
            create(path, "raw", 512, &[]);
            qblk::log::set_sink(None, 0);
            let e = open_error(path, &options(&[("lock", "on")]), RO);
            assert_eq!(e.kind(), qblk::block::ErrorKind::Errno(libc::ENOLCK), "{e}");
        });
    });
    let said = said.lock().unwrap();
    let warnings: Vec<_> = said.iter().filter(|(_, t)| t.contains("has no locks")).collect();
    assert_eq!(warnings.len(), 1, "{said:?}");
    assert_eq!(warnings[0].0, qblk::log::Level::Warn);
    // With locks it is as it should be.
    let on = options(&[("lock", "on")]);
    let image = open_with(path, &on, RW);
    is_locked(Image::open(path.as_os_str(), &on, RW), "lock=on");
    drop(image);
}
