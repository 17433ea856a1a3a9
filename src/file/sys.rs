//! The system calls of this room that std has no word for. Each answers with the error number, so
//! that the caller decides what it means; an interrupted call is repeated.

use std::fs::File;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::AtomicU32;

use libc::{c_int, iovec, off_t};

use crate::block::last_errno;

/// A system call's error number, positive.
pub type Errno = i32;

// Offsets are passed on as `off_t`; a libc with a 32 bit one would cut them.
const _: () = assert!(size_of::<off_t>() == 8);

/// The largest offset, and so the largest size, that a file can have.
pub const MAX_SIZE: u64 = i64::MAX as u64;

/// Repeat a call that answers -1 for an error while it was only interrupted.
pub fn retry<T: Copy + PartialEq + From<i8>>(mut call: impl FnMut() -> T) -> Result<T, Errno> {
    loop {
        let n = call();
        if n != T::from(-1) {
            return Ok(n);
        }
        match last_errno() {
            libc::EINTR => {}
            errno => return Err(errno),
        }
    }
}

/// One `preadv`: how many bytes came, 0 at the end of the file.
///
/// # Safety
/// Every piece must be writable memory.
pub unsafe fn preadv(file: &File, vecs: &[iovec], offset: u64) -> Result<usize, Errno> {
    let count = vecs.len() as c_int;
    // SAFETY: the pieces are good by contract, `vecs` is a slice.
    retry(|| unsafe { libc::preadv(file.as_raw_fd(), vecs.as_ptr(), count, offset as off_t) })
        .map(|n| n as usize)
}

/// One `preadv2` that does not wait: how many bytes were in memory; EAGAIN if none was.
///
/// # Safety
/// Every piece must be writable memory.
pub unsafe fn preadv_now(file: &File, vecs: &[iovec], offset: u64) -> Result<usize, Errno> {
    let (fd, count) = (file.as_raw_fd(), vecs.len() as c_int);
    // SAFETY: the pieces are good by contract, `vecs` is a slice.
    retry(|| unsafe { libc::preadv2(fd, vecs.as_ptr(), count, offset as off_t, libc::RWF_NOWAIT) })
        .map(|n| n as usize)
}

/// Copy `count` bytes from file to file in the kernel: how many went, fewer only at the source's end.
pub fn copy(
    from: BorrowedFd<'_>,
    mut at: u64,
    to: BorrowedFd<'_>,
    mut offset: u64,
    count: u64,
) -> Result<u64, Errno> {
    let mut done = 0;
    while done < count {
        let (mut from_at, mut to_at) = (at as libc::loff_t, offset as libc::loff_t);
        let left = (count - done).min(1 << 30) as usize;
        let n = retry(|| {
            // SAFETY: the positions are our own numbers.
            unsafe {
                libc::copy_file_range(
                    from.as_raw_fd(),
                    &mut from_at,
                    to.as_raw_fd(),
                    &mut to_at,
                    left,
                    0,
                )
            }
        })? as u64;
        if n == 0 {
            break;
        }
        (at, offset, done) = (at + n, offset + n, done + n);
    }
    Ok(done)
}

/// One `pwritev2`, or `pwritev` when there are no flags: how many bytes went.
///
/// # Safety
/// Every piece must be readable memory.
pub unsafe fn pwritev(
    file: &File,
    vecs: &[iovec],
    offset: u64,
    flags: c_int,
) -> Result<usize, Errno> {
    let (fd, count, at) = (file.as_raw_fd(), vecs.len() as c_int, offset as off_t);
    retry(|| match flags {
        // SAFETY: the pieces are good by contract, `vecs` is a slice.
        0 => unsafe { libc::pwritev(fd, vecs.as_ptr(), count, at) },
        // SAFETY: as above.
        _ => unsafe { libc::pwritev2(fd, vecs.as_ptr(), count, at, flags) },
    })
    .map(|n| n as usize)
}

/// `fallocate`.
pub fn fallocate(file: &File, mode: c_int, offset: u64, count: u64) -> Result<(), Errno> {
    // SAFETY: no memory is passed.
    retry(|| unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as off_t, count as off_t) })
        .map(drop)
}

/// `lseek`, of which only the answer is used: nobody here reads or writes at the file's position.
pub fn lseek(file: &File, offset: u64, whence: c_int) -> Result<u64, Errno> {
    // SAFETY: no memory is passed.
    retry(|| unsafe { libc::lseek(file.as_raw_fd(), offset as off_t, whence) }).map(|n| n as u64)
}

/// `fdatasync`.
pub fn fdatasync(file: &File) -> Result<(), Errno> {
    // SAFETY: no memory is passed.
    retry(|| unsafe { libc::fdatasync(file.as_raw_fd()) }).map(drop)
}

/// Wait until somebody calls [`futex_wake`] for `word` with one of `bits`, unless it is not `value` (any
/// more). May also return for no reason.
pub fn futex_wait(word: &AtomicU32, value: u32, bits: u32) {
    // SAFETY: the kernel looks at `word`, which outlives the call; no timeout is given.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG,
            value,
            std::ptr::null::<libc::timespec>(),
            std::ptr::null::<u32>(),
            bits,
        )
    };
}

/// Wake up to `most` of those who wait for `word` with one of `bits`.
pub fn futex_wake(word: &AtomicU32, most: u32, bits: u32) {
    // SAFETY: the address is only a name here.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE_BITSET | libc::FUTEX_PRIVATE_FLAG,
            most.min(i32::MAX as u32),
            std::ptr::null::<libc::timespec>(),
            std::ptr::null::<u32>(),
            bits,
        )
    };
}

/// Let the kernel forget what it keeps of a range in memory, where that is on disk. A hint.
pub fn drop_cache(file: &File, offset: u64, count: u64) {
    let (offset, count) = (offset as off_t, count as off_t);
    // SAFETY: no memory is passed.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, count, libc::POSIX_FADV_DONTNEED) };
}

/// `ftruncate`.
pub fn ftruncate(file: &File, size: u64) -> Result<(), Errno> {
    // SAFETY: no memory is passed.
    retry(|| unsafe { libc::ftruncate(file.as_raw_fd(), size as off_t) }).map(drop)
}

/// `fstat`.
pub fn fstat(file: &File) -> Result<libc::stat, Errno> {
    // SAFETY: a `stat` of zeroes is a valid one.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `st` is ours.
    retry(|| unsafe { libc::fstat(file.as_raw_fd(), &mut st) }).map(|_| st)
}

/// The present size of a regular file.
pub fn file_size(file: &File) -> Result<u64, Errno> {
    Ok(fstat(file)?.st_size.max(0) as u64)
}

/// What [`file_system`] says of tmpfs.
pub const TMPFS: u64 = 0x0102_1994;

/// The magic number of the file system, 0 if there is no telling.
pub fn file_system(file: &File) -> u64 {
    // SAFETY: a `statfs` of zeroes is a valid one.
    let mut st: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `st` is ours.
    match retry(|| unsafe { libc::fstatfs(file.as_raw_fd(), &mut st) }) {
        Ok(_) => st.f_type as u32 as u64,
        Err(_) => 0,
    }
}

/// The descriptor's status flags (`O_APPEND`, the access mode, …).
pub fn status_flags(file: &File) -> Result<c_int, Errno> {
    // SAFETY: no memory is passed.
    retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })
}

/// Change the descriptor's status flags. They belong to the open file: never on a duplicate.
pub fn set_status_flags(file: &File, flags: c_int) -> Result<(), Errno> {
    // SAFETY: no memory is passed.
    retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// Ask the page cache for a range; a hint.
pub fn will_need(file: &File, offset: u64, count: u64) {
    // SAFETY: no memory is passed.
    unsafe {
        libc::posix_fadvise(
            file.as_raw_fd(),
            offset as off_t,
            count as off_t,
            libc::POSIX_FADV_WILLNEED,
        );
    }
}

/// Lock bytes for the open file (`F_RDLCK`), or unlock them (`F_UNLCK`). Never waits.
pub fn lock_bytes(file: &File, kind: c_int, start: u64, count: u64) -> Result<(), Errno> {
    let mut lock = byte_range(kind, start, count);
    // SAFETY: `lock` is ours.
    retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &mut lock) }).map(drop)
}

/// Whether somebody else has one of these bytes locked (`fcntl` locks of either sort): which byte,
/// and the process, where the system names it.
pub fn locked_by_other(
    file: &File,
    start: u64,
    count: u64,
) -> Result<Option<(u64, Option<i32>)>, Errno> {
    in_the_way(file, libc::F_WRLCK, start, count)
}

/// The same for bytes that somebody else has locked for himself alone.
pub fn write_locked_by_other(
    file: &File,
    start: u64,
    count: u64,
) -> Result<Option<(u64, Option<i32>)>, Errno> {
    in_the_way(file, libc::F_RDLCK, start, count)
}

fn in_the_way(
    file: &File,
    kind: c_int,
    start: u64,
    count: u64,
) -> Result<Option<(u64, Option<i32>)>, Errno> {
    let mut lock = byte_range(kind, start, count);
    // SAFETY: `lock` is ours.
    retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) })?;
    if lock.l_type == libc::F_UNLCK as libc::c_short {
        return Ok(None);
    }
    let pid = (lock.l_pid > 0).then_some(lock.l_pid);
    Ok(Some((lock.l_start.max(start as off_t) as u64, pid)))
}

fn byte_range(kind: c_int, start: u64, count: u64) -> libc::flock {
    // SAFETY: a `flock` of zeroes is a valid one.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as _;
    lock.l_whence = libc::SEEK_SET as _;
    lock.l_start = start as off_t;
    lock.l_len = count as off_t;
    lock
}

/// How far this process may let a file grow (`RLIMIT_FSIZE`). The system ends a process that goes
/// beyond with SIGXFSZ, so it has to be known before.
pub fn size_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is ours.
    unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) };
    // `RLIM_INFINITY` is the largest number there is.
    limit.rlim_cur.min(MAX_SIZE)
}

/// `statx` with `STATX_DIOALIGN`: alignment of memory and of offsets that direct I/O wants, 0 where
/// it is not to be had at all; `None` where the system does not tell.
pub fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // `struct statx` is 256 bytes; libc has it for some targets only. By words of 32 bits: 0 is
    // stx_mask, 38 is stx_dio_mem_align, 39 is stx_dio_offset_align.
    const STATX_DIOALIGN: libc::c_uint = 0x2000;
    let mut words = [0u32; 64];
    // SAFETY: the path is a C string, `words` is as large as the kernel's structure.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_statx,
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            STATX_DIOALIGN,
            words.as_mut_ptr(),
        )
    };
    (rc == 0 && words[0] & STATX_DIOALIGN != 0).then_some((words[38], words[39]))
}

fn ioctl_get<T: Default>(file: &File, request: libc::Ioctl) -> Option<T> {
    let mut value = T::default();
    // SAFETY: the callers pair each request with the type it fills.
    let rc = retry(|| unsafe { libc::ioctl(file.as_raw_fd(), request, &mut value) });
    rc.is_ok().then_some(value)
}

/// Size of a block device, bytes.
pub fn block_size64(file: &File) -> Result<u64, Errno> {
    ioctl_get::<u64>(file, libc::_IOR::<usize>(0x12, 114)).ok_or_else(last_errno)
}

/// Logical block size of a block device, bytes.
pub fn logical_block(file: &File) -> u32 {
    match ioctl_get::<c_int>(file, libc::BLKSSZGET) {
        Some(n) if n > 0 && (n as u32).is_power_of_two() => n as u32,
        _ => 512,
    }
}

/// What a block device likes requests to be a multiple of, bytes.
pub fn optimal_io(file: &File) -> Option<u32> {
    let told = |request| ioctl_get::<libc::c_uint>(file, request).filter(|n| *n > 0);
    told(libc::BLKIOOPT).or_else(|| told(libc::BLKPBSZGET))
}

/// Whether a block device turns.
pub fn rotational(file: &File) -> bool {
    ioctl_get::<libc::c_ushort>(file, libc::_IO(0x12, 126)).is_some_and(|n| n != 0)
}

/// `BLKZEROOUT`: the kernel writes the zeroes if the device cannot do better.
pub fn block_zero_out(file: &File, offset: u64, count: u64) -> Result<(), Errno> {
    let range = [offset, count];
    // SAFETY: the request takes an array of two u64, which it only reads.
    retry(|| unsafe { libc::ioctl(file.as_raw_fd(), libc::_IO(0x12, 127), range.as_ptr()) })
        .map(drop)
}
