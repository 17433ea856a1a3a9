//! Sockets that the program brings, and what is set of a client's.

use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use crate::block::{Error, Result};
use crate::nbd::net::Peer;
use crate::nbd::uri::Address;

/// A name of a socket, as the system has it.
type Get = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

fn name(fd: &OwnedFd, get: Get) -> Option<(libc::sockaddr_storage, usize)> {
    // SAFETY: a socket's name of zeroes is a valid one.
    let mut name: libc::sockaddr_storage = unsafe { zeroed() };
    let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: the name is ours, and `len` is its size.
    let rc = unsafe { get(fd.as_raw_fd(), (&raw mut name).cast(), &raw mut len) };
    (rc == 0).then_some((name, len as usize))
}

/// The IP address and port in a name.
fn ip(name: &libc::sockaddr_storage) -> Option<(IpAddr, u16)> {
    match i32::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says what it is.
            let v4 = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Some((ip.into(), u16::from_be(v4.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr).to_canonical();
            Some((ip, u16::from_be(v6.sin6_port)))
        }
        _ => None,
    }
}

/// Where a socket listens.
pub fn local_address(fd: &OwnedFd) -> Option<Address> {
    let (name, len) = name(fd, libc::getsockname)?;
    match i32::from(name.ss_family) {
        libc::AF_UNIX => {
            // SAFETY: the family says what it is.
            let unix = unsafe { &*(&raw const name).cast::<libc::sockaddr_un>() };
            let path = unix.sun_path.map(|c| c as u8);
            let room = len.saturating_sub(size_of::<libc::sa_family_t>()).min(path.len());
            let path = path[..room].split(|b| *b == 0).next().filter(|p| !p.is_empty())?;
            Some(Address::Unix(std::ffi::OsStr::from_bytes(path).into()))
        }
        libc::AF_VSOCK => {
            // SAFETY: as above.
            let vm = unsafe { &*(&raw const name).cast::<libc::sockaddr_vm>() };
            Some(Address::Vsock { cid: vm.svm_cid, port: vm.svm_port })
        }
        _ => ip(&name).map(|(ip, port)| Address::Tcp { host: ip.to_string(), port }),
    }
}

/// Who is at the other end.
pub fn peer(fd: &OwnedFd) -> Peer {
    let Some((name, _)) = name(fd, libc::getpeername) else { return Peer::Unknown };
    match i32::from(name.ss_family) {
        libc::AF_UNIX => {
            let mut who = libc::ucred { pid: 0, uid: 0, gid: 0 };
            let mut len = size_of::<libc::ucred>() as libc::socklen_t;
            // SAFETY: the memory is ours, and `len` is its size.
            let rc = unsafe {
                libc::getsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_PEERCRED,
                    (&raw mut who).cast(),
                    &raw mut len,
                )
            };
            if rc == 0 { Peer::Uid(who.uid) } else { Peer::Unknown }
        }
        libc::AF_VSOCK => {
            // SAFETY: the family says what it is.
            let vm = unsafe { &*(&raw const name).cast::<libc::sockaddr_vm>() };
            Peer::Cid(vm.svm_cid)
        }
        _ => ip(&name).map_or(Peer::Unknown, |(ip, _)| Peer::Ip(ip)),
    }
}

/// An option of the socket that is a number; else why there is none (ENOTSOCK).
fn option(fd: &OwnedFd, option: i32) -> Result<i32> {
    let mut value = 0i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the memory is ours, and `len` is its size.
    let rc = unsafe {
        let value = (&raw mut value).cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, value, &raw mut len)
    };
    let name = || format!("descriptor {}", fd.as_raw_fd()).into();
    if rc == 0 { Ok(value) } else { Err(Error::os("getsockopt", &name())) }
}

/// Refuse what is no stream socket, and one that listens or does not, as `listens` says.
pub fn check(fd: &OwnedFd, listens: bool) -> Result<()> {
    let kind = option(fd, libc::SO_TYPE)?;
    let accepts = option(fd, libc::SO_ACCEPTCONN)? != 0;
    let what = match () {
        _ if kind != libc::SOCK_STREAM => "it is not a stream socket",
        _ if listens && !accepts => "it does not listen",
        _ if !listens && accepts => "it listens, and is not connected",
        _ => return Ok(()),
    };
    Err(Error::invalid(format!("the socket on descriptor {}: {what}", fd.as_raw_fd())))
}

/// Whether calls on it wait.
pub fn set_nonblocking(fd: &OwnedFd, on: bool) -> Result<()> {
    // SAFETY: no memory is passed.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    let new = if on { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, new) } < 0 {
        return Err(Error::os("fcntl", &"socket".into()));
    }
    Ok(())
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
