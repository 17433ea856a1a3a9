//! What the room promises, on files in the system's temporary directory.

mod creating;
mod mapping;

use std::ffi::CString;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;

use super::*;
use crate::block::{Device, ErrorKind, Extent, ExtentList, OneIov, Prealloc, ReqFlags};

const RW: How = How { write: true, direct: false, mmap: false };
const RO: How = How { write: false, direct: false, mmap: false };
const MMAP: How = How { write: false, direct: false, mmap: true };
const DIRECT: How = How { write: true, direct: true, mmap: false };

/// A name in the temporary directory, removed at the end.
struct Temp(PathBuf);

impl Temp {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Relaxed);
        // Not UTF-8: names are bytes.
        let mut name = format!("qblk-file-{}-{n}-", std::process::id()).into_bytes();
        name.push(0xff);
        Self(std::env::temp_dir().join(std::ffi::OsStr::from_bytes(&name)))
    }

    fn with(bytes: &[u8]) -> Self {
        let temp = Self::new();
        fs::write(&temp.0, bytes).unwrap();
        temp
    }

    fn name(&self) -> Name {
        Name::from(self.0.clone())
    }

    fn open(&self, how: How) -> Device {
        Device::new(open(&self.name(), how).unwrap())
    }

    fn file(&self) -> fs::File {
        fs::OpenOptions::new().read(true).write(true).open(&self.0).unwrap()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

fn errno<T>(r: Result<T>) -> i32 {
    match r {
        Ok(_) => 0,
        Err(e) => match e.kind() {
            ErrorKind::Errno(n) => n,
            other => panic!("{other:?}: {e}"),
        },
    }
}

fn read(dev: &Device, offset: u64, count: usize) -> Result<Vec<u8>> {
    let mut buf = vec![0xaa; count];
    dev.read_slice(&mut buf, offset)?;
    Ok(buf)
}

fn extents(dev: &Device, offset: u64, count: u64) -> Vec<(u64, u64, bool)> {
    let mut out = [Extent::default(); 16];
    let mut list = ExtentList::new(&mut out);
    dev.driver().extents(offset, count, &mut list).unwrap();
    let n = list.len();
    out[..n].iter().map(|e| (e.offset, e.length, e.has(Extent::DATA))).collect()
}

#[test]
fn what_is_written_is_read_and_the_file_grows() {
    let temp = Temp::with(b"");
    let dev = temp.open(RW);
    dev.write_slice(b"hello", 10, ReqFlags::NONE).unwrap();
    assert_eq!(dev.size(), 15);
    dev.write_slice(b"!", 15, ReqFlags::FUA).unwrap();
    // Behind the end: zeroes.
    assert_eq!(read(&dev, 8, 12).unwrap(), b"\0\0hello!\0\0\0\0");
    assert_eq!(read(&dev, 1 << 40, 3).unwrap(), [0; 3]);
    dev.flush().unwrap();
    assert_eq!(fs::read(&temp.0).unwrap(), b"\0\0\0\0\0\0\0\0\0\0hello!");
    assert_eq!((dev.driver().kind(), dev.caps().fua), ("file", true));
}

#[test]
fn hundreds_of_pieces_are_one_request() {
    let temp = Temp::with(b"");
    let dev = temp.open(RW);
    let data: Vec<u8> = (0..3000u32).map(|n| n as u8).collect();
    let pieces = |base: *const u8| -> Vec<libc::iovec> {
        let piece =
            |i: usize| libc::iovec { iov_base: base.wrapping_add(3 * i) as *mut _, iov_len: 3 };
        (0..1000).map(piece).collect()
    };
    let vecs = pieces(data.as_ptr());
    // SAFETY: the pieces lie in `data`.
    let src = unsafe { crate::block::Src::from_raw(&vecs, 2999) };
    dev.write(src, 7, ReqFlags::NONE).unwrap();
    dev.write(src, 7, ReqFlags::FUA).unwrap();
    let back = vec![0u8; 3000];
    let vecs = pieces(back.as_ptr());
    // SAFETY: the pieces lie in `back`.
    dev.read(unsafe { crate::block::Dst::from_raw(&vecs, 2999) }, 7).unwrap();
    assert_eq!((&back[..2999], back[2999]), (&data[..2999], 0));
    assert_eq!(fs::read(&temp.0).unwrap()[7..], data[..2999]);
}

#[test]
fn offsets_beyond_files_are_refused() {
    let dev = Temp::with(b"x");
    let dev = dev.open(RW);
    for offset in [i64::MAX as u64, i64::MAX as u64 + 1, u64::MAX - 2] {
        assert_eq!(errno(read(&dev, offset, 2)), libc::EFBIG);
        assert_eq!(errno(dev.write_slice(b"xy", offset, ReqFlags::NONE)), libc::EFBIG);
        assert_eq!(errno(dev.driver().zero(offset, 2, ReqFlags::MAY_TRIM)), libc::EFBIG);
        assert_eq!(errno(dev.driver().trim(offset, 2, ReqFlags::NONE)), libc::EFBIG);
        assert_eq!(errno(dev.driver().cache(offset, 2)), libc::EFBIG);
    }
    assert_eq!(errno(dev.driver().resize(u64::MAX, Prealloc::Off, false)), libc::EFBIG);
    assert_eq!(dev.size(), 1);
}

#[test]
fn bytes_that_are_gone_are_eio() {
    let temp = Temp::with(&[7; 10000]);
    let direct = temp.open(How { write: false, ..DIRECT });
    for (dev, count) in [(temp.open(RW), 100), (temp.open(RO), 5000), (direct, 5000)] {
        temp.file().set_len(10000).unwrap();
        assert!(read(&dev, 5000, count).is_ok());
        temp.file().set_len(6000).unwrap();
        // Direct I/O has to fetch the whole of the block that the end is in.
        assert!(read(&dev, 0, if dev.caps().align > 1 { 4096 } else { 6000 }).is_ok());
        assert_eq!(errno(read(&dev, 5990, 20)), libc::EIO);
        assert_eq!(errno(read(&dev, 9999, 1)), libc::EIO);
        assert_eq!(errno(read(&dev, 9999, 10)), libc::EIO);
        assert_eq!(read(&dev, 10240, 10).unwrap(), [0; 10]);
        // A copier has to meet the error, not skip a hole.
        assert!(extents(&dev, 7000, 4000).contains(&(7000, 3000, true)));
    }
}

#[test]
fn bytes_that_another_added_are_read() {
    let temp = Temp::with(b"abc");
    let dev = temp.open(RO);
    temp.file().write_all_at(b"defg", 3).unwrap();
    assert_eq!(read(&dev, 2, 6).unwrap(), b"cdefg\0");
    assert_eq!(dev.size(), 3);
}

#[test]
fn holes_are_told_from_data() {
    let temp = Temp::with(b"");
    temp.file().set_len(1 << 20).unwrap();
    let dev = temp.open(RW);
    dev.write_slice(&[1; 65536], 262144, ReqFlags::NONE).unwrap();
    let all = [(0, 262144, false), (262144, 65536, true), (327680, 720896, false)];
    assert_eq!(extents(&dev, 0, 1 << 20), all);
    assert_eq!(extents(&dev, 270000, 10), [(270000, 10, true)]);
    assert_eq!(extents(&dev, 327000, 1000), [(327000, 680, true), (327680, 320, false)]);
    assert_eq!(extents(&dev, 1 << 21, 10), [(1 << 21, 10, false)]);
    dev.driver().trim(262144, 65536, ReqFlags::NONE).unwrap();
    assert_eq!(extents(&dev, 0, 1 << 20), [(0, 1 << 20, false)]);
    assert_eq!(dev.driver().allocated(), Some(0));
}

#[test]
fn zeroing_keeps_or_gives_back_space_and_grows_the_file() {
    let temp = Temp::with(&[5; 200_000]);
    let dev = temp.open(RW);
    let d = dev.driver();
    // By the device: not every file system can, tmpfs for one.
    dev.zero(0, 65536, ReqFlags::NONE).unwrap();
    assert!(d.allocated() >= Some(200_000));
    d.zero(65536, 65536, ReqFlags::MAY_TRIM).unwrap();
    assert!(d.allocated() < Some(200_000));
    assert_eq!(read(&dev, 0, 131072).unwrap(), vec![0; 131072]);
    assert_eq!(read(&dev, 131072, 4).unwrap(), [5; 4]);
    d.zero(199_999, 100_001, ReqFlags::MAY_TRIM).unwrap();
    assert_eq!((dev.size(), fs::metadata(&temp.0).unwrap().len()), (300_000, 300_000));
    dev.zero(400_000, 10, ReqFlags::NONE).unwrap();
    assert_eq!((dev.size(), fs::metadata(&temp.0).unwrap().len()), (400_010, 400_010));
    d.trim(0, 1 << 40, ReqFlags::NONE).unwrap();
    assert_eq!(dev.size(), 400_010);
    assert_eq!(read(&dev, 0, 400_010).unwrap(), vec![0; 400_010]);
}

#[test]
fn growing_by_zeroes_cuts_off_no_write() {
    // Zeroing behind the end lengthens the file to what it found; writes go on meanwhile.
    let temp = Temp::with(b"");
    let dev = temp.open(RW);
    thread::scope(|s| {
        for t in 0..4u64 {
            let dev = &dev;
            s.spawn(move || {
                for i in 0..500 {
                    let at = (i * 4 + t) * 100;
                    if t < 2 {
                        dev.driver().zero(at, 100, ReqFlags::MAY_TRIM).unwrap();
                    } else {
                        dev.write_slice(&[9; 100], at, ReqFlags::NONE).unwrap();
                    }
                }
            });
        }
    });
    let bytes = fs::read(&temp.0).unwrap();
    assert_eq!((bytes.len(), dev.size()), (200_000, 200_000));
    for (i, part) in bytes.chunks(100).enumerate() {
        assert_eq!(part, [if i % 4 < 2 { 0 } else { 9 }; 100], "part {i}");
    }
}

#[test]
fn a_resize_shrinks_only_when_told_to() {
    let temp = Temp::with(&[1; 5000]);
    let dev = temp.open(RW);
    let d = dev.driver();
    assert_eq!(errno(d.resize(4999, Prealloc::Off, false)), libc::EINVAL);
    d.resize(1000, Prealloc::Off, true).unwrap();
    d.resize(3000, Prealloc::Metadata, false).unwrap();
    assert_eq!((dev.size(), read(&dev, 998, 4).unwrap()), (3000, vec![1, 1, 0, 0]));
    d.resize(1 << 20, Prealloc::Falloc, false).unwrap();
    assert!(d.allocated() >= Some(1 << 20));
    d.resize(9_000_001, Prealloc::Full, false).unwrap();
    assert!(d.allocated() >= Some(9_000_001));
    assert_eq!(extents(&dev, 1 << 20, 9_000_001 - (1 << 20)).len(), 1);
    // What cannot be had leaves the size as it was.
    assert!(d.resize(1 << 60, Prealloc::Falloc, false).is_err());
    assert!(d.resize(1 << 60, Prealloc::Full, false).is_err());
    assert_eq!((dev.size(), fs::metadata(&temp.0).unwrap().len()), (9_000_001, 9_000_001));
    let ro = temp.open(RO);
    assert_eq!(errno(ro.driver().resize(0, Prealloc::Off, true)), libc::EROFS);
}

#[test]
fn only_files_are_opened() {
    let open_err = |path: &str| open(&Name::from(path), RO).err().unwrap();
    assert_eq!(errno::<()>(Err(open_err("/"))), libc::EISDIR);
    assert_eq!(errno::<()>(Err(open_err("/nonexistent/x"))), libc::ENOENT);
    assert_eq!(errno::<()>(Err(open_err("/tmp\0x"))), libc::EINVAL);
    assert!(open_err("/dev/null").to_string().contains("a character device"));
    let dir_err = create(&Name::from("/tmp"), false).err().unwrap();
    assert_eq!(errno::<()>(Err(dir_err)), libc::EISDIR);
}

#[test]
fn a_fifo_or_socket_does_not_hang_and_is_named() {
    let temp = Temp::new();
    let path = CString::new(temp.0.as_os_str().as_bytes()).unwrap();
    // SAFETY: a C string.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    for how in [RO, RW, DIRECT] {
        let e = open(&temp.name(), how).err().unwrap().to_string();
        assert!(e.contains("a FIFO"), "{e}");
    }
    // Also when it comes between the look and the open.
    let e = checked(&temp.name(), open_path(&temp.0, false, 0)).err().unwrap().to_string();
    assert!(e.contains("a FIFO"), "{e}");
    assert!(create(&temp.name(), false).is_err());
    assert!(temp.0.exists());
    let temp = Temp::new();
    let _socket = std::os::unix::net::UnixListener::bind(&temp.0).unwrap();
    let e = open(&temp.name(), RO).err().unwrap().to_string();
    assert!(e.contains("a socket"), "{e}");
}

#[test]
fn descriptors_are_not_inherited_and_not_nonblocking() {
    let temp = Temp::with(b"x");
    let file = open_path(&temp.0, true, 0).unwrap();
    assert_eq!(sys::status_flags(&file).unwrap() & libc::O_NONBLOCK, 0);
    // SAFETY: no memory is passed.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) };
    assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
}

#[test]
fn a_descriptor_is_used_as_far_as_it_goes() {
    let temp = Temp::with(b"0123456789");
    let given = |file: &fs::File| file.as_fd().try_clone_to_owned().unwrap();
    let ro = fs::File::open(&temp.0).unwrap();
    let name = Name::from("fd");
    assert_eq!(errno(from_fd(given(&ro), &name, RW)), libc::EROFS);
    let dev = Device::new(from_fd(given(&ro), &name, RO).unwrap());
    assert!(dev.caps().read_only);
    assert_eq!(errno(dev.write_slice(b"x", 0, ReqFlags::NONE)), libc::EROFS);
    assert_eq!(read(&dev, 3, 3).unwrap(), b"345");
    // The caller's position stays where it is.
    assert_eq!(extents(&dev, 0, 10), [(0, 10, true)]);
    assert_eq!(sys::lseek(&ro, 0, libc::SEEK_CUR), Ok(0));

    let wo = fs::OpenOptions::new().write(true).open(&temp.0).unwrap();
    assert_eq!(errno(from_fd(given(&wo), &name, RO)), libc::EBADF);
    let append = fs::OpenOptions::new().read(true).append(true).open(&temp.0).unwrap();
    let dev = Device::new(from_fd(given(&append), &name, RW).unwrap());
    dev.write_slice(b"ab", 0, ReqFlags::NONE).unwrap();
    assert_eq!(fs::read(&temp.0).unwrap(), b"ab23456789");

    let rw = temp.file();
    let dev = Device::new(from_fd(given(&rw), &name, DIRECT).unwrap());
    dev.write_slice(b"cd", 5, ReqFlags::NONE).unwrap();
    assert_eq!(sys::status_flags(&rw).unwrap() & libc::O_DIRECT, 0);
    assert_eq!(fs::read(&temp.0).unwrap(), b"ab234cd789");
    // One that is direct and is not to be.
    let direct = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&temp.0);
    if let Ok(direct) = direct {
        let dev = Device::new(from_fd(given(&direct), &name, RO).unwrap());
        assert_eq!((dev.caps().align, read(&dev, 1, 2).unwrap()), (1, b"b2".to_vec()));
    }
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let e = from_fd(socket.into(), &name, RO).err().unwrap().to_string();
    assert!(e.contains("a socket"), "{e}");
}

#[test]
fn a_tebibyte_of_memory_costs_nothing() {
    let dev = Device::new(from_memory(memory(1 << 40).unwrap()).unwrap());
    assert_eq!((dev.size(), dev.driver().kind()), (1 << 40, "mem"));
    assert_eq!(dev.name().as_bytes(), b"mem:1099511627776");
    assert_eq!(dev.driver().allocated(), Some(0));
    dev.write_slice(b"end", (1 << 40) - 3, ReqFlags::FUA).unwrap();
    dev.write_slice(&[3; 8192], 1 << 30, ReqFlags::NONE).unwrap();
    assert_eq!(read(&dev, (1 << 40) - 4, 4).unwrap(), b"\0end");
    assert!(dev.driver().allocated() < Some(1 << 20));
    assert_eq!(
        extents(&dev, 1 << 30, 16384),
        [(1 << 30, 8192, true), ((1 << 30) + 8192, 8192, false)]
    );
    dev.zero(1 << 30, 8192, ReqFlags::MAY_TRIM).unwrap();
    assert_eq!(read(&dev, 1 << 30, 8192).unwrap(), [0; 8192]);
    dev.zero((1 << 40) - 3, 3, ReqFlags::NONE).unwrap();
    assert_eq!(read(&dev, (1 << 40) - 4, 4).unwrap(), [0; 4]);
    dev.flush().unwrap();
    assert!(memory(0).is_ok());
    assert_eq!(errno(memory(u64::MAX)), libc::EFBIG);
}

#[test]
fn direct_io_of_any_alignment_is_what_a_model_says() {
    let temp = Temp::with(b"");
    let dev = temp.open(DIRECT);
    let mut model: Vec<u8> = Vec::new();
    let mut dice = Dice(42);
    for step in 0..600u32 {
        let at = match dice.below(3) {
            0 => dice.below(100) * 512,
            _ => dice.below(50_000),
        };
        let count = match dice.below(3) {
            0 => dice.below(20) * 512,
            _ => 1 + dice.below(9_000),
        } as usize;
        let end = at as usize + count;
        match dice.below(6) {
            0..=2 => {
                let bytes: Vec<u8> = (0..count).map(|i| (step as usize + i) as u8).collect();
                let flags = if step % 16 == 0 { ReqFlags::FUA } else { ReqFlags::NONE };
                let skew = dice.below(2) as usize;
                let mut memory = vec![0; skew];
                memory.extend(&bytes);
                dev.write(OneIov::src(&memory[skew..]).iov(), at, flags).unwrap();
                if count > 0 {
                    model.resize(model.len().max(end), 0);
                    model[at as usize..end].copy_from_slice(&bytes);
                }
            }
            3 => {
                let flags = if step % 2 == 0 { ReqFlags::MAY_TRIM } else { ReqFlags::NONE };
                dev.zero(at, count as u64, flags).unwrap();
                if count > 0 {
                    model.resize(model.len().max(end), 0);
                    model[at as usize..end].fill(0);
                }
            }
            _ => {
                let mut want = model.clone();
                want.resize(want.len().max(end), 0);
                assert_eq!(read(&dev, at, count).unwrap(), want[at as usize..end], "step {step}");
            }
        }
        assert_eq!(dev.size(), model.len() as u64, "step {step}");
    }
    dev.flush().unwrap();
    assert_eq!(fs::read(&temp.0).unwrap(), model);
}

#[test]
fn concurrent_unaligned_direct_writes_lose_nothing() {
    const THREADS: usize = 4;
    const PART: usize = 37;
    let temp = Temp::with(b"");
    let dev = temp.open(DIRECT);
    // Thread t writes every fourth part: all blocks are shared by all threads, and the file grows.
    thread::scope(|s| {
        for t in 0..THREADS {
            let dev = &dev;
            s.spawn(move || {
                for i in 0..150 {
                    let at = (i * THREADS + t) * PART;
                    dev.write_slice(&[t as u8 + 1; PART], at as u64, ReqFlags::NONE).unwrap();
                }
            });
        }
    });
    dev.flush().unwrap();
    let bytes = fs::read(&temp.0).unwrap();
    assert_eq!(bytes.len(), 150 * THREADS * PART);
    for (i, part) in bytes.chunks(PART).enumerate() {
        assert_eq!(part, [(i % THREADS) as u8 + 1; PART], "part {i}");
    }
    assert_eq!(read(&dev, 0, bytes.len()).unwrap(), bytes);
}

#[test]
fn writes_and_a_full_disk_are_told_apart() {
    // /dev/full is a character device; a limit of this process would be every test's. So: a file
    // system's largest file, which ext4 and tmpfs both have.
    let temp = Temp::with(b"x");
    let dev = temp.open(RW);
    let e = dev.write_slice(b"x", i64::MAX as u64 - 1, ReqFlags::NONE);
    if let Err(e) = e {
        assert!(e.is_no_space(), "{e}");
        assert!(e.to_string().contains("write of 1 bytes at offset 9223372036854775806"), "{e}");
        let e = dev.write_slice(b"x", i64::MAX as u64 - 1, ReqFlags::FUA).err().unwrap();
        assert!(e.is_no_space(), "{e}");
    }
    // Nothing that was acknowledged is lost.
    dev.flush().unwrap();
    dev.driver().close().unwrap();
    dev.driver().close().unwrap();
}
