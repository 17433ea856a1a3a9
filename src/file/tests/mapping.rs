//! Reads by memory, and files that shrink under it.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::*;

#[test]
fn mapped_reads_are_the_file() {
    let data: Vec<u8> = (0..100_000u32).map(|n| (n / 7) as u8).collect();
    let temp = Temp::with(&data);
    let dev = temp.open(MMAP);
    assert_eq!(read(&dev, 0, 100_000).unwrap(), data);
    assert_eq!(read(&dev, 12345, 6789).unwrap(), data[12345..12345 + 6789]);
    // At and over the mapping's end.
    assert_eq!(read(&dev, 99_999, 3).unwrap(), [data[99_999], 0, 0]);
    temp.file().write_all_at(b"new", 100_000).unwrap();
    assert_eq!(read(&dev, 99_999, 4).unwrap()[1..], *b"new");
    assert_eq!(read(&Temp::with(b"").open(MMAP), 0, 2).unwrap(), [0, 0]);
}

#[test]
fn a_file_that_shrinks_under_a_mapping_is_eio_and_no_signal() {
    for to in [40_000, 8192, 1, 0] {
        let temp = Temp::with(&[7; 100_000]);
        let dev = temp.open(MMAP);
        assert_eq!(read(&dev, 50_000, 4096).unwrap(), [7; 4096]);
        temp.file().set_len(to).unwrap();
        // In the page of the end there is no fault.
        if to % 4096 != 0 {
            assert_eq!(errno(read(&dev, to, 5)), libc::EIO, "{to}");
        }
        assert_eq!(errno(read(&dev, 50_000, 4096)), libc::EIO);
        assert_eq!(errno(read(&dev, 99_999, 1)), libc::EIO);
        assert_eq!(errno(read(&dev, 0, 100_000)), libc::EIO);
        assert_eq!(read(&dev, 0, to as usize).unwrap(), vec![7; to as usize]);
        // What comes back is read again.
        temp.file().write_all_at(&[8; 100_000], 0).unwrap();
        assert_eq!(read(&dev, 0, 100_000).unwrap(), vec![8; 100_000]);
    }
}

#[test]
fn many_mappings_shrink_under_many_readers() {
    thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for round in 0..20u64 {
                    let temp = Temp::with(&[7; 1 << 20]);
                    let dev = temp.open(MMAP);
                    // The kernel zeroes what it cuts off of a page before anyone can know, so a read
                    // that runs at that very moment, by `pread` too, may see some of it.
                    let left = AtomicU64::new(1 << 20);
                    thread::scope(|s| {
                        for reader in 0..2u64 {
                            let (dev, left) = (&dev, &left);
                            s.spawn(move || {
                                let mut dice = Dice(round * 2 + reader);
                                for _ in 0..300 {
                                    let at = dice.below((1 << 20) - 5000);
                                    match read(dev, at, 5000) {
                                        Ok(bytes) => {
                                            let left = left.load(SeqCst).saturating_sub(at);
                                            let (there, cut) =
                                                bytes.split_at(left.min(5000) as usize);
                                            assert!(there.iter().all(|b| *b == 7));
                                            assert!(cut.iter().all(|b| *b == 7 || *b == 0));
                                        }
                                        Err(e) => assert_eq!(errno::<()>(Err(e)), libc::EIO),
                                    }
                                }
                            });
                        }
                        let file = temp.file();
                        let mut dice = Dice(round);
                        let mut len = 1 << 20;
                        while len > 1000 {
                            left.store(len, SeqCst);
                            file.set_len(len).unwrap();
                            len -= dice.below(len / 2);
                        }
                    });
                }
            });
        }
    });
}

#[test]
fn a_fault_that_is_not_ours_does_what_it_did_before() {
    let (ours, other) = (Temp::with(&[7; 8192]), Temp::with(&[7; 8192]));
    let dev = ours.open(MMAP);
    let file = other.file();
    let theirs = Mapping::for_kernel(&file, 8192).unwrap();
    let at = theirs.at(4096, 1).unwrap();
    file.set_len(0).unwrap();
    // SAFETY: the child reads an address and is gone.
    match unsafe { libc::fork() } {
        0 => {
            let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: see above.
            unsafe {
                libc::setrlimit(libc::RLIMIT_CORE, &no_core);
                at.read_volatile();
                libc::_exit(0)
            }
        }
        child => {
            let mut status = 0;
            // SAFETY: `status` is ours.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS);
        }
    }
    assert_eq!(read(&dev, 0, 8192).unwrap(), [7; 8192]);
}

#[test]
fn files_copy_from_files_in_the_kernel_and_say_where_they_cannot() {
    let temp = Temp::with(&[7; 10_000]);
    let (from, to) = (temp.open(RO), Temp::with(&[1; 20_000]));
    let dev = to.open(RW);
    dev.driver().copy_from(from.driver(), 100, 500, 9_000).unwrap();
    let bytes = read(&dev, 0, 20_000).unwrap();
    assert_eq!((bytes[499], &bytes[500..9_500], bytes[9_500]), (1, &[7; 9_000][..], 1));
    dev.driver().copy_from(from.driver(), 0, 20_000, 10_000).unwrap();
    assert_eq!(dev.size(), 30_000);
    // What the source has not got is not made up.
    let cannot = dev.driver().copy_from(from.driver(), 5_000, 0, 6_000);
    assert!(matches!(cannot, Err(Error::NotSupported(_))));
}
