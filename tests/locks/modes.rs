//! Every pair of this library's own modes, as two handles of one process: they conflict like two
//! processes, unless they are contexts of one device or both only read.

use std::sync::atomic::{AtomicBool, Ordering::*};

use super::*;

type Mode = (&'static str, OpenFlags, &'static [(&'static str, &'static str)]);

const MODES: [Mode; 7] = [
    ("writer", RW, &[]),
    ("reader", RO, &[]),
    ("shared reader", SHARED, &[]),
    ("info", INFO, &[]),
    ("no lock", OpenFlags(RW.0 | NO_LOCK.0), &[]),
    ("writer alone", RW, &[("lock-exclusive", "on")]),
    ("reader alone", RO, &[("lock-exclusive", "on")]),
];

#[test]
fn every_pair_of_modes() {
    let dir = Tmp::new("locks-pairs");
    for format in ["raw", "qcow2"] {
        let path = dir.join(format);
        create(&path, format, 1 << 20, &[]);
        for (first, flags, opts) in &MODES {
            for (second, flags2, opts2) in &MODES {
                let may = match (*first, *second) {
                    ("info" | "no lock", _) | (_, "info" | "no lock") => true,
                    (a, b) if a.contains("alone") || b.contains("alone") => false,
                    ("shared reader", _) | (_, "shared reader") => true,
                    (a, b) => a == "reader" && b == "reader",
                };
                let what = format!("{format}: {second} while {first} is there");
                let there = open_with(&path, &options(opts), *flags);
                let came = Image::open(path.as_os_str(), &options(opts2), *flags2);
                match may {
                    true => drop(came.unwrap_or_else(|e| panic!("{what}: {e}"))),
                    false => {
                        let text = is_locked(came, &what);
                        let me = format!("this process, {}", std::process::id());
                        assert!(text.contains(&me), "{what}: {text}");
                    }
                }
                drop(there);
                assert_eq!(locked(&path), []);
            }
        }
    }
}

#[test]
fn contexts_of_one_device_do_not_conflict() {
    let dir = Tmp::new("locks-contexts");
    let path = dir.join("disk");
    create(&path, "qcow2", 1 << 20, &[]);
    let one = open(&path, RW);
    let two = one.context(&options(&[]), RW).unwrap();
    let three = one.context(&options(&[]), RO).unwrap();
    assert_eq!(locked(&path), WRITER, "one device, one set of locks");
    one.close().unwrap();
    two.close().unwrap();
    assert_eq!(locked(&path), WRITER, "as long as there is a context");
    is_locked(try_open(&path, RW), "a context is left");
    three.close().unwrap();
    assert_eq!(locked(&path), []);
}

#[test]
fn state_says_locked() {
    let dir = Tmp::new("locks-state");
    let path = dir.join("disk");
    create(&path, "qcow2", 1 << 20, &[]);
    let said = |image: &Image| image.info().unwrap().state & qblk::image::state::LOCKED != 0;
    assert!(!said(&open(&path, INFO)), "nobody has it");
    for flags in [RW, RO, SHARED] {
        let image = open(&path, flags);
        assert!(said(&image));
        // A description says whether anybody has it.
        assert!(said(&open(&path, INFO)));
        assert!(!said(&open(&path, INFO | NO_LOCK)));
    }
    assert!(!said(&open(&path, RW | NO_LOCK)));
    assert!(!said(&open_with(&path, &options(&[("lock", "off")]), RW)));
}

#[test]
fn a_descriptor_of_the_callers_is_locked_on_a_description_of_our_own() {
    let dir = Tmp::new("locks-fd");
    let path = dir.join("disk");
    create(&path, "raw", 1 << 20, &[]);
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let given = || file.try_clone().unwrap().into();
    let raw = options(&[("format", "raw")]);
    let image = Image::open_fd(given(), &raw, RW).unwrap();
    assert_eq!(locked(&path), WRITER);
    // The same description again is still another handle.
    assert!(matches!(Image::open_fd(given(), &raw, RW), Err(Error::Locked { .. })));
    for flags in [RO, RW, RO] {
        image.reopen(None, flags).unwrap();
        let held: &[u64] = if flags == RW { WRITER } else { &[100, 203] };
        assert_eq!(locked(&path), held);
    }
    image.close().unwrap();
    assert_eq!(locked(&path), [], "the caller's descriptor keeps nothing");
    // Opened anew for direct I/O.
    let image = Image::open_fd(given(), &raw, RW | OpenFlags::DIRECT).unwrap();
    assert_eq!(locked(&path), WRITER);
    drop(image);
    assert_eq!(locked(&path), []);
}

#[test]
fn a_forked_child_gives_nothing_back_and_keeps_nothing() {
    let dir = Tmp::new("locks-fork");
    let path = dir.join("disk");
    create(&path, "qcow2", 1 << 20, &[]);
    let image = open(&path, RW);
    let mut pipe = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    // SAFETY: the child frees what it inherited, waits and leaves.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: descriptors and memory of the child's own; nothing of the test's is to run.
        unsafe {
            libc::close(pipe[1]);
            // Its copies of the descriptors stay open until it ends.
            let mut byte = 0u8;
            libc::read(pipe[0], (&raw mut byte).cast(), 1);
            drop(image);
            libc::read(pipe[0], (&raw mut byte).cast(), 1);
            libc::_exit(0);
        }
    }
    assert_eq!(locked(&path), WRITER);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::write(pipe[1], b"x".as_ptr().cast(), 1) }, 1);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(locked(&path), WRITER, "a child that frees its copy unlocks nothing");
    image.close().unwrap();
    assert_eq!(locked(&path), [], "a child that lives on keeps nothing");
    drop(open(&path, RW));
    // SAFETY: as above.
    unsafe {
        libc::close(pipe[1]);
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
    }
}

#[test]
fn reopening_takes_the_locks_over() {
    let dir = Tmp::new("locks-reopen");
    for (format, reader) in [("qcow2", READER), ("raw", &[100, 203])] {
        let path = dir.join(format);
        create(&path, format, 1 << 20, &[]);
        let image = open(&path, RO);
        for (flags, held) in [
            (RW, WRITER),
            (RO, reader),
            (SHARED, &[100][..]),
            (RW, WRITER),
            (SHARED, &[100]),
            (RO, reader),
            (NO_LOCK, &[]),
            (RW, WRITER),
            (RW, WRITER),
        ] {
            image.reopen(None, flags).unwrap();
            assert_eq!(locked(&path), held, "{format} reopened with {flags:?}");
        }
        // A failure leaves what was, also when it is found after the locks were taken.
        let bad = options(&[("format", if format == "raw" { "qcow2" } else { "raw" })]);
        let bad = bad.with("cache.l2-size", "none");
        image.reopen(Some(&bad), RO).unwrap_err();
        assert_eq!(locked(&path), WRITER);
        image.write_at(b"still", 0, NONE).unwrap();
        image.close().unwrap();
    }
    // An upgrade that another reader is against.
    let path = dir.join("qcow2");
    let (image, other) = (open(&path, RO), open(&path, RO));
    let e = image.reopen(None, RW).unwrap_err();
    assert!(matches!(e, Error::Locked { .. }), "{e}");
    assert_eq!(locked(&path), [100, 100, 201, 201, 203, 203]);
    read_range(&image, 0, 512);
    drop(other);
    image.reopen(None, RW).unwrap();
    assert_eq!(locked(&path), WRITER);
}

/// A chain whose lower file fails: the upper one, which had been taken over already, is given back.
#[test]
fn reopening_that_fails_below_gives_back_what_is_above() {
    let dir = Tmp::new("locks-below");
    let (base, top) = (dir.join("base"), dir.join("top"));
    create(&base, "qcow2", 1 << 20, &[]);
    create(&top, "qcow2", 1 << 20, &[("backing-file", "base"), ("backing-fmt", "qcow2")]);
    let image = open_with(&top, &options(&[("backing.lock", "off")]), RO);
    assert_eq!((locked(&top), locked(&base)), (READER.to_vec(), vec![]));
    let writer = open(&base, RW);
    let e = image.reopen(Some(&options(&[])), RW).unwrap_err();
    assert!(e.to_string().contains("base"), "{e}");
    assert_eq!((locked(&top), locked(&base)), (READER.to_vec(), WRITER.to_vec()));
    drop(writer);
    image.reopen(Some(&options(&[])), RW).unwrap();
    assert_eq!((locked(&top), locked(&base)), (WRITER.to_vec(), READER.to_vec()));
}

/// While a device is reopened again and again, somebody as eager as can be never gets in.
#[test]
fn reopening_leaves_no_gap() {
    let dir = Tmp::in_memory("locks-gap");
    let path = dir.join("disk");
    create(&path, "qcow2", 1 << 20, &[]);
    let image = open_with(&path, &options(&[("lock-wait", "60")]), RO);
    let done = AtomicBool::new(false);
    let tries = std::thread::scope(|s| {
        let prober = s.spawn(|| {
            let third = Third::new(&path);
            let mut tries = 0u64;
            while !done.load(Relaxed) {
                assert!(!third.attempt(WRITER), "a writer got in");
                tries += 1;
                // As often as not somebody must be let through, or nothing would ever be reopened.
                if tries.is_multiple_of(8) {
                    std::thread::sleep(std::time::Duration::from_micros(200));
                }
            }
            tries
        });
        for i in 0..400 {
            let flags = if i % 2 == 0 { RW } else { RO };
            image.reopen(None, flags).unwrap();
            if flags == RW {
                image.write_at(&[i as u8; 512], 0, NONE).unwrap();
                // One that comes to nothing, in between.
                let bad = options(&[("cache.l2-size", "none"), ("lock-wait", "60")]);
                image.reopen(Some(&bad), RO).unwrap_err();
            }
        }
        done.store(true, Relaxed);
        prober.join().unwrap()
    });
    eprintln!("{tries} attempts to get in");
    assert!(tries > 100, "too few attempts to prove anything");
}
