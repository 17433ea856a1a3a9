//! The system calls of the data path that std has no word for: futexes with a deadline, and sockets
//! with several pieces of memory at once. Each answers with the error number.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use libc::{c_int, iovec};

use crate::block::last_errno;

/// A system call's error number, positive.
pub(super) type Errno = i32;

/// A point on the monotonic clock in nanoseconds; `u64::MAX` = never.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Deadline(u64);

impl Deadline {
    pub(super) const NEVER: Self = Self(u64::MAX);

    /// So long from now.
    #[inline]
    pub(super) fn after(time: Option<Duration>) -> Self {
        match time {
            None => Self::NEVER,
            Some(t) => Self(now().saturating_add(t.as_nanos().try_into().unwrap_or(u64::MAX))),
        }
    }

    /// Whether it has passed.
    #[inline]
    pub(super) fn passed(self) -> bool {
        self.0 != u64::MAX && now() >= self.0
    }

    /// As [`Deadline::passed`], told some milliseconds late, for a fraction of its price.
    #[inline]
    pub(super) fn passed_lately(self) -> bool {
        self.0 != u64::MAX && clock(libc::CLOCK_MONOTONIC_COARSE) >= self.0
    }

    /// How long until then, at least 0.
    pub(super) fn left(self) -> Option<Duration> {
        (self.0 != u64::MAX).then(|| Duration::from_nanos(self.0.saturating_sub(now())))
    }
}

#[inline]
fn now() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

#[inline]
fn clock(which: libc::clockid_t) -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is ours; both clocks are always there.
    unsafe { libc::clock_gettime(which, &mut t) };
    (t.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(t.tv_nsec as u64)
}

/// Sleep while `word` is `value`, until somebody wakes one of the bits in `mask` or the deadline
/// passes. May also return for no reason.
#[inline]
pub(super) fn futex_wait(word: &AtomicU32, value: u32, mask: u32, deadline: Deadline) {
    let until = libc::timespec {
        tv_sec: (deadline.0 / 1_000_000_000) as libc::time_t,
        tv_nsec: (deadline.0 % 1_000_000_000) as libc::c_long,
    };
    let until = if deadline.0 == u64::MAX { std::ptr::null() } else { &raw const until };
    // SAFETY: `word` outlives the call, `until` is null or a timespec of ours (absolute, for this
    // operation).
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG,
            value,
            until,
            std::ptr::null::<u32>(),
            mask,
        );
    }
}

/// Wake all that sleep on `word` with one of the bits in `mask`.
#[inline]
pub(super) fn futex_wake(word: &AtomicU32, mask: u32) {
    // SAFETY: a wake-up reads no memory.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE_BITSET | libc::FUTEX_PRIVATE_FLAG,
            i32::MAX,
            std::ptr::null::<libc::timespec>(),
            std::ptr::null::<u32>(),
            mask,
        );
    }
}

/// Send from several pieces of memory what there is room for, without waiting: how many bytes went.
/// (A send that waits does so for every buffer-full of it: a peer that always reads a little could keep
/// it for ever.)
///
/// # Safety
/// Every piece must be readable memory.
#[inline]
pub(super) unsafe fn send(fd: c_int, vecs: &[iovec]) -> Result<usize, Errno> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    let n = match vecs {
        // SAFETY: the piece is readable by contract.
        [v] => unsafe { libc::send(fd, v.iov_base, v.iov_len, flags) },
        _ => {
            let msg = message(vecs);
            // SAFETY: the pieces are readable by contract, and the message holds nothing else.
            unsafe { libc::sendmsg(fd, &msg, flags) }
        }
    };
    if n >= 0 { Ok(n as usize) } else { Err(last_errno()) }
}

/// Receive into several pieces of memory: how many bytes came, 0 at the end. Without `wait`, EAGAIN if
/// nothing is there.
///
/// # Safety
/// Every piece must be writable memory.
#[inline]
pub(super) unsafe fn recv(fd: c_int, vecs: &[iovec], wait: bool) -> Result<usize, Errno> {
    let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
    let n = match vecs {
        // SAFETY: the piece is writable by contract.
        [v] => unsafe { libc::recv(fd, v.iov_base, v.iov_len, flags) },
        _ => {
            let mut msg = message(vecs);
            // SAFETY: the pieces are writable by contract, and the message holds nothing else.
            unsafe { libc::recvmsg(fd, &mut msg, flags) }
        }
    };
    if n >= 0 { Ok(n as usize) } else { Err(last_errno()) }
}

/// Whether there is something to receive (or to find out about the connection), before the deadline.
pub(super) fn is_readable(fd: c_int, deadline: Deadline) -> bool {
    let left = deadline.left().unwrap_or_default();
    let time = libc::timespec {
        tv_sec: left.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(left.subsec_nanos() as i32),
    };
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd and one timespec, which are ours.
    unsafe { libc::ppoll(&mut poll, 1, &time, std::ptr::null()) > 0 }
}

/// Wait for room to send (or for the end of the connection), no longer than until the deadline.
pub(super) fn wait_writable(fd: c_int, deadline: Deadline) {
    poll(fd, libc::POLLOUT, deadline.left());
}

fn poll(fd: c_int, events: libc::c_short, within: Option<Duration>) -> bool {
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    // Not a moment before it.
    let within = within
        .map_or(-1, |t| c_int::try_from(t.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX));
    // SAFETY: one pollfd, which is ours.
    unsafe { libc::poll(&mut poll, 1, within) > 0 }
}

fn message(vecs: &[iovec]) -> libc::msghdr {
    // SAFETY: a msghdr of zeroes is a valid one: no name, no pieces, no control data.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = vecs.as_ptr().cast_mut();
    msg.msg_iovlen = vecs.len() as _;
    msg
}

/// Send what there is room for, without waiting; for what is not missed.
pub(super) fn send_if_room(fd: c_int, bytes: &[u8]) {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: `bytes` is a slice.
    unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags) };
}

/// End a connection in both directions: whoever sends or receives on it returns at once.
pub(super) fn shutdown(fd: c_int) {
    // SAFETY: no memory is passed.
    unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
}

/// Let calls that receive return after so long, so that deadlines are looked at.
pub(super) fn set_tick(fd: &OwnedFd, tick: Option<Duration>) {
    let tick = tick.unwrap_or_default();
    let t = libc::timeval {
        tv_sec: tick.as_secs() as libc::time_t,
        tv_usec: libc::suseconds_t::from(tick.subsec_micros()),
    };
    // SAFETY: the option takes a timeval, which it only reads.
    unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const t).cast(),
            std::mem::size_of::<libc::timeval>() as libc::socklen_t,
        );
    }
}
