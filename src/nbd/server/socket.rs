//! Sockets that the program brings, and what is set of a client's.

use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use crate::block::{Error, Result};
use crate::nbd::net;

/// Refuse what is no stream socket, and one that listens or does not, as `listens` says.
pub fn check(fd: &OwnedFd, listens: bool) -> Result<()> {
    let option = |which| {
        net::get_option(fd, which).map_err(|e| Error::Os {
            op: "getsockopt",
            file: format!("descriptor {}", fd.as_raw_fd()).into(),
            errno: e.raw_os_error().unwrap_or(libc::ENOTSOCK),
        })
    };
    let kind = option(libc::SO_TYPE)?;
    let accepts = option(libc::SO_ACCEPTCONN)? != 0;
    let what = match () {
        _ if kind != libc::SOCK_STREAM => "it is not a stream socket",
        _ if listens && !accepts => "it does not listen",
        _ if !listens && accepts => "it listens, and is not connected",
        _ => return Ok(()),
    };
    Err(Error::invalid(format!("the socket on descriptor {}: {what}", fd.as_raw_fd())))
}

/// How long receiving and sending wait, and that a peer which vanished is noticed at all.
pub fn set_idle(fd: &OwnedFd, idle: Option<Duration>) {
    let time = idle.map_or(libc::timeval { tv_sec: 0, tv_usec: 0 }, |t| libc::timeval {
        tv_sec: t.as_secs() as _,
        tv_usec: t.subsec_micros() as _,
    });
    let set = |level, option, value: *const libc::c_void, size: usize| {
        // SAFETY: `value` has `size` bytes. Where an option is not known there is nothing to do.
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, value, size as libc::socklen_t) };
    };
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        set(libc::SOL_SOCKET, option, (&raw const time).cast(), size_of::<libc::timeval>());
    }
    let put = |level, option, value: i32| {
        set(level, option, (&raw const value).cast(), size_of::<i32>());
    };
    put(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
    put(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 60);
    put(libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 15);
    put(libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 4);
    // Bytes that a vanished peer does not acknowledge, milliseconds.
    put(libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 120_000);
}
