//! The system calls of sockets. All descriptors are close-on-exec, no call raises SIGPIPE, an
//! interrupted call is repeated.

use std::ffi::OsStr;
use std::io::{Error, Result};
use std::mem::{offset_of, size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::time::{Duration, Instant};

use libc::{c_int, c_void, sockaddr_storage, socklen_t};

/// A call's answer, or its error number.
fn check(answer: c_int) -> Result<c_int> {
    if answer < 0 { Err(Error::last_os_error()) } else { Ok(answer) }
}

/// Repeat a call while it was only interrupted.
fn retry<T>(mut call: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match call() {
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            result => return result,
        }
    }
}

/// The address of one end of a socket.
pub struct SockAddr {
    storage: sockaddr_storage,
    len: socklen_t,
}

/// What an address says.
pub enum Told {
    Ip(SocketAddr),
    Unix,
    Vsock { cid: u32, port: u32 },
    Other,
}

impl SockAddr {
    fn empty() -> Self {
        // SAFETY: a `sockaddr_storage` of zeroes is a valid one, of no family.
        Self { storage: unsafe { zeroed() }, len: size_of::<sockaddr_storage>() as socklen_t }
    }

    /// One with `value` as its bytes; `T` is one of the `sockaddr_…` structures.
    fn with<T: Copy>(value: T, len: usize) -> Self {
        const { assert!(size_of::<T>() <= size_of::<sockaddr_storage>()) };
        let mut this = Self::empty();
        this.len = len.min(size_of::<T>()) as socklen_t;
        // SAFETY: the storage is as large as any address and aligned for all of them.
        unsafe { ptr::write(ptr::from_mut(&mut this.storage).cast::<T>(), value) };
        this
    }

    /// The bytes as a structure of another family; only for plain `sockaddr_…` structures.
    ///
    /// # Safety
    /// Any bytes must make a `T`.
    unsafe fn as_one<T: Copy>(&self) -> Option<T> {
        const { assert!(size_of::<T>() <= size_of::<sockaddr_storage>()) };
        if (self.len as usize) < size_of::<T>() {
            return None;
        }
        // SAFETY: the storage is as large and aligned, and any bytes do by contract.
        Some(unsafe { ptr::read(ptr::from_ref(&self.storage).cast::<T>()) })
    }

    pub fn ip(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(v4) => {
                // SAFETY: a `sockaddr_in` of zeroes is a valid one.
                let mut one: libc::sockaddr_in = unsafe { zeroed() };
                one.sin_family = libc::AF_INET as _;
                one.sin_port = v4.port().to_be();
                one.sin_addr.s_addr = u32::from(*v4.ip()).to_be();
                Self::with(one, size_of::<libc::sockaddr_in>())
            }
            SocketAddr::V6(v6) => {
                // SAFETY: a `sockaddr_in6` of zeroes is a valid one.
                let mut one: libc::sockaddr_in6 = unsafe { zeroed() };
                one.sin6_family = libc::AF_INET6 as _;
                one.sin6_port = v6.port().to_be();
                one.sin6_flowinfo = v6.flowinfo();
                one.sin6_addr.s6_addr = v6.ip().octets();
                one.sin6_scope_id = v6.scope_id();
                Self::with(one, size_of::<libc::sockaddr_in6>())
            }
        }
    }

    /// ENAMETOOLONG if the path does not fit.
    pub fn unix(path: &Path) -> Result<Self> {
        // SAFETY: a `sockaddr_un` of zeroes is a valid one.
        let mut one: libc::sockaddr_un = unsafe { zeroed() };
        one.sun_family = libc::AF_UNIX as _;
        let bytes = path.as_os_str().as_bytes();
        // The last byte stays NUL.
        if bytes.len() >= one.sun_path.len() {
            return Err(Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        for (to, from) in one.sun_path.iter_mut().zip(bytes) {
            *to = *from as _;
        }
        Ok(Self::with(one, offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1))
    }

    pub fn vsock(cid: u32, port: u32) -> Self {
        // SAFETY: a `sockaddr_vm` of zeroes is a valid one.
        let mut one: libc::sockaddr_vm = unsafe { zeroed() };
        one.svm_family = libc::AF_VSOCK as _;
        one.svm_cid = cid;
        one.svm_port = port;
        Self::with(one, size_of::<libc::sockaddr_vm>())
    }

    pub fn family(&self) -> c_int {
        self.storage.ss_family.into()
    }

    /// The path of a Unix socket that has one.
    pub fn path(&self) -> Option<PathBuf> {
        let at = offset_of!(libc::sockaddr_un, sun_path);
        let len = (self.len as usize).min(size_of::<libc::sockaddr_un>());
        if self.family() != libc::AF_UNIX || len <= at {
            return None;
        }
        // SAFETY: the storage is at least as large as a `sockaddr_un`, and all of it was written.
        let bytes = unsafe {
            let all = ptr::from_ref(&self.storage).cast::<u8>();
            std::slice::from_raw_parts(all.add(at), len - at)
        };
        let path = bytes.split(|b| *b == 0).next().filter(|p| !p.is_empty())?;
        Some(OsStr::from_bytes(path).into())
    }

    pub fn told(&self) -> Told {
        let told = match self.family() {
            // SAFETY: a `sockaddr_in` is numbers only.
            libc::AF_INET => unsafe { self.as_one::<libc::sockaddr_in>() }.map(|one| {
                let ip = Ipv4Addr::from(u32::from_be(one.sin_addr.s_addr));
                Told::Ip(SocketAddrV4::new(ip, u16::from_be(one.sin_port)).into())
            }),
            // SAFETY: a `sockaddr_in6` is numbers only.
            libc::AF_INET6 => unsafe { self.as_one::<libc::sockaddr_in6>() }.map(|one| {
                let ip = Ipv6Addr::from(one.sin6_addr.s6_addr);
                let port = u16::from_be(one.sin6_port);
                let (flow, scope) = (one.sin6_flowinfo, one.sin6_scope_id);
                Told::Ip(SocketAddrV6::new(ip, port, flow, scope).into())
            }),
            libc::AF_UNIX => Some(Told::Unix),
            // SAFETY: a `sockaddr_vm` is numbers only.
            libc::AF_VSOCK => unsafe { self.as_one::<libc::sockaddr_vm>() }
                .map(|one| Told::Vsock { cid: one.svm_cid, port: one.svm_port }),
            _ => None,
        };
        told.unwrap_or(Told::Other)
    }
}

/// A descriptor that a call just made.
fn own(fd: c_int) -> OwnedFd {
    // SAFETY: the caller got it from the system and gave it to nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A stream socket that does not block.
pub fn socket(family: c_int) -> Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is passed.
    check(unsafe { libc::socket(family, kind, 0) }).map(own)
}

/// `connect`, once: after an interruption it goes on by itself, as if the socket did not block.
pub fn connect(fd: &OwnedFd, to: &SockAddr) -> Result<()> {
    let at = ptr::from_ref(&to.storage).cast();
    // SAFETY: the address is as long as it says.
    check(unsafe { libc::connect(fd.as_raw_fd(), at, to.len) }).map(drop)
}

pub fn bind(fd: &OwnedFd, to: &SockAddr) -> Result<()> {
    let at = ptr::from_ref(&to.storage).cast();
    // SAFETY: the address is as long as it says.
    check(unsafe { libc::bind(fd.as_raw_fd(), at, to.len) }).map(drop)
}

/// `listen` with room for as many as the system allows.
pub fn listen(fd: &OwnedFd) -> Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::listen(fd.as_raw_fd(), libc::SOMAXCONN) }).map(drop)
}

/// `accept4`: a socket that blocks, and who it is connected to.
pub fn accept(listener: BorrowedFd<'_>) -> Result<(OwnedFd, SockAddr)> {
    let mut from = SockAddr::empty();
    let fd = retry(|| {
        from = SockAddr::empty();
        let at = ptr::from_mut(&mut from.storage).cast();
        // SAFETY: the address has as much room as it says.
        check(unsafe { libc::accept4(listener.as_raw_fd(), at, &mut from.len, libc::SOCK_CLOEXEC) })
    })?;
    Ok((own(fd), from))
}

/// The socket's own address.
pub fn local_address(fd: &OwnedFd) -> Result<SockAddr> {
    let mut this = SockAddr::empty();
    let at = ptr::from_mut(&mut this.storage).cast();
    // SAFETY: the address has as much room as it says.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), at, &mut this.len) })?;
    Ok(this)
}

/// The address of the other end.
pub fn peer_address(fd: &OwnedFd) -> Result<SockAddr> {
    let mut that = SockAddr::empty();
    let at = ptr::from_mut(&mut that.storage).cast();
    // SAFETY: the address has as much room as it says.
    check(unsafe { libc::getpeername(fd.as_raw_fd(), at, &mut that.len) })?;
    Ok(that)
}

pub fn set_option(fd: &OwnedFd, level: c_int, option: c_int, value: c_int) -> Result<()> {
    let len = size_of::<c_int>() as socklen_t;
    // SAFETY: the option takes a number, `len` is its length.
    check(unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, option, ptr::from_ref(&value).cast(), len)
    })
    .map(drop)
}

/// An option's value.
///
/// # Safety
/// Any bytes must make a `T`.
unsafe fn get_as<T: Copy>(fd: &OwnedFd, option: c_int, mut value: T) -> Result<T> {
    let mut len = size_of::<T>() as socklen_t;
    let at = ptr::from_mut(&mut value).cast::<c_void>();
    // SAFETY: `value` has as much room as `len` says.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, at, &mut len) })?;
    Ok(value)
}

/// An option of the socket that is a number.
pub fn get_option(fd: &OwnedFd, option: c_int) -> Result<c_int> {
    // SAFETY: a number is any bytes.
    unsafe { get_as(fd, option, 0) }
}

/// Whether the peer has taken all that was sent: its system only, unless the socket is a Unix socket.
pub fn is_taken(fd: &OwnedFd) -> bool {
    let mut left: c_int = 0;
    // SAFETY: the request stores one int.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut left) };
    // Where it is not known, nothing speaks against it.
    result != 0 || left == 0
}

/// How connecting ended.
pub fn take_error(fd: &OwnedFd) -> Result<()> {
    match get_option(fd, libc::SO_ERROR)? {
        0 => Ok(()),
        errno => Err(Error::from_raw_os_error(errno)),
    }
}

/// The user who connected a Unix socket.
pub fn peer_uid(fd: &OwnedFd) -> Result<u32> {
    let none = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    // SAFETY: a `ucred` is numbers only.
    unsafe { get_as(fd, libc::SO_PEERCRED, none) }.map(|who| who.uid)
}

/// Whether calls on the socket return rather than wait.
pub fn set_nonblocking(fd: &OwnedFd, on: bool) -> Result<()> {
    // SAFETY: no memory is passed.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    let new = if on { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
    if new != flags {
        // SAFETY: no memory is passed.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, new) })?;
    }
    Ok(())
}

/// What has come, without waiting: how many bytes, 0 if the peer hung up.
pub fn receive(fd: &OwnedFd, buf: &mut [u8]) -> Result<usize> {
    retry(|| {
        let (at, len) = (buf.as_mut_ptr().cast(), buf.len());
        // SAFETY: `buf` is a slice.
        let n = unsafe { libc::recv(fd.as_raw_fd(), at, len, libc::MSG_DONTWAIT) };
        usize::try_from(n).map_err(|_| Error::last_os_error())
    })
}

/// Send what there is room for, without waiting: how many bytes.
pub fn send(fd: &OwnedFd, buf: &[u8]) -> Result<usize> {
    retry(|| {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `buf` is a slice.
        let n = unsafe { libc::send(fd.as_raw_fd(), buf.as_ptr().cast(), buf.len(), flags) };
        usize::try_from(n).map_err(|_| Error::last_os_error())
    })
}

/// One to wait for.
pub fn poll_for(fd: impl AsFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd: fd.as_fd().as_raw_fd(), events, revents: 0 }
}

/// Wait until one of `fds` is ready or `deadline` has come: whether one is ready.
pub fn poll(fds: &mut [libc::pollfd], deadline: Option<Instant>) -> Result<bool> {
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        // Rounded up, so as not to wake before the deadline and turn in circles.
        let ms = left.map_or(-1, |left| {
            let ms = left.as_millis() + u128::from(left.subsec_nanos() % 1_000_000 != 0);
            c_int::try_from(ms).unwrap_or(c_int::MAX)
        });
        // SAFETY: `fds` is a slice.
        match check(unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, ms) }) {
            Ok(0) if left == Some(Duration::ZERO) => return Ok(false),
            Ok(0) => {}
            Ok(_) => return Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// A counter that a thread can wait for.
pub fn eventfd() -> Result<OwnedFd> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }).map(own)
}

/// Add one to it.
pub fn eventfd_add(fd: &OwnedFd) -> Result<()> {
    let one = 1u64.to_ne_bytes();
    retry(|| {
        // SAFETY: `one` is an array.
        let n = unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        if n < 0 { Err(Error::last_os_error()) } else { Ok(()) }
    })
}

/// Make it zero.
pub fn eventfd_clear(fd: &OwnedFd) -> Result<()> {
    let mut count = [0u8; 8];
    retry(|| {
        // SAFETY: `count` is an array.
        let n = unsafe { libc::read(fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        if n < 0 { Err(Error::last_os_error()) } else { Ok(()) }
    })
}

/// Lock a directory against others who do the same, if that is to be had at once.
pub fn try_lock(dir: &std::fs::File) -> Result<()> {
    // SAFETY: no memory is passed.
    retry(|| check(unsafe { libc::flock(dir.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }))
        .map(drop)
}
