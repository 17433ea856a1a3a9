//! Sockets: connecting, listening, accepting, and waiting no longer than a deadline.
//!
//! Everything made here is close-on-exec, and nothing sent here raises SIGPIPE. Waiting is `poll` on
//! the socket and on a [`Waker`], so that another thread can end it.

mod listen;
pub mod polling;
mod stream;
mod sys;
mod trust;

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use self::sys::SockAddr;
use super::uri::{Address, check_socket_path};
use crate::block::{Error, Name, Result};

pub use listen::{Peer, accept, listen, local_address, peer};
pub use stream::Stream;
pub use sys::{get_option, is_taken, set_nonblocking};
pub use trust::Trust;

/// When an address has not answered for so long, the next one is tried beside it (RFC 8305 asks for
/// 250 ms): one that is a black hole costs no more than that.
const HEAD_START: Duration = Duration::from_millis(250);
/// How often a Unix socket is tried whose backlog is full; the system offers nothing to wait for.
const UNIX_RETRY: Duration = Duration::from_millis(10);

/// Wakes a thread that waits in [`connect`], [`Stream`] or `poll` (an eventfd).
#[derive(Debug)]
pub struct Waker(OwnedFd);

impl Waker {
    /// One that nobody has woken yet.
    pub fn new() -> Result<Self> {
        sys::eventfd().map(Self).map_err(|e| Error::Os {
            op: "making an eventfd",
            file: Name::from("waker"),
            errno: errno(&e),
        })
    }

    /// Wake whoever waits, now and from now on.
    pub fn wake(&self) {
        // It fails only if the counter is full, and then it is awake.
        let _ = sys::eventfd_add(&self.0);
    }

    /// Take back what [`Waker::wake`] did.
    pub fn reset(&self) {
        // It fails only if nobody woke it.
        let _ = sys::eventfd_clear(&self.0);
    }
}

/// Readable while it is awake.
impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn errno(e: &io::Error) -> i32 {
    e.raw_os_error().unwrap_or(libc::EIO)
}

/// The addresses of a host. The system's resolver knows neither deadlines nor wakers, so a thread asks it that
/// is left to itself when it takes too long.
fn resolve(
    host: &str,
    port: u16,
    name: &Name,
    deadline: Option<Instant>,
    cancel: Option<&Waker>,
) -> Result<Vec<SocketAddr>> {
    let ask = {
        let host = host.to_owned();
        move || (host.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>)
    };
    // An address needs nobody to be asked.
    let found = match host.parse::<IpAddr>().is_ok() || (deadline.is_none() && cancel.is_none()) {
        true => ask(),
        false => within(deadline, cancel, ask),
    };
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(Error::net(name, format!("host {host} has no address"), libc::EHOSTUNREACH)),
        Err(e) => {
            let what = format!("looking for the address of host {host}: {e}");
            Err(Error::net(name, what, e.raw_os_error().unwrap_or(libc::EHOSTUNREACH)))
        }
    }
}

/// Do what may take longer than until the deadline (ETIMEDOUT) or until `cancel` wakes (ECANCELED) in a thread
/// that nobody waits for then.
fn within<T: Send + 'static>(
    deadline: Option<Instant>,
    cancel: Option<&Waker>,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = Arc::new(Waker(sys::eventfd()?));
    let result = Arc::new(Mutex::new(None));
    let (tell, put) = (done.clone(), result.clone());
    crate::thread::spawn("qblk-resolve", None, move || {
        let found = work();
        *put.lock() = Some(found);
        tell.wake();
    })?;
    loop {
        let mut fds = vec![sys::poll_for(&*done, libc::POLLIN)];
        fds.extend(cancel.map(|waker| sys::poll_for(waker, libc::POLLIN)));
        sys::poll(&mut fds, deadline)?;
        if let Some(found) = result.lock().take() {
            return found;
        }
        if fds.get(1).is_some_and(|waker| waker.revents != 0) {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        if deadline.is_some_and(|at| at <= Instant::now()) {
            return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
        }
    }
}

/// Connect, trying all addresses that the host name has. `name` is for messages. The socket is
/// close-on-exec, blocking, TCP_NODELAY. ETIMEDOUT at the deadline, ECANCELED when `cancel` wakes. An
/// empty host means this one.
pub fn connect(
    address: &Address,
    name: &Name,
    deadline: Option<Instant>,
    cancel: Option<&Waker>,
) -> Result<OwnedFd> {
    let addresses = match address {
        Address::Tcp { port: 0, .. } => {
            let text = format!("{name}: port 0 is for listening only; a server has one above");
            return Err(Error::invalid(text));
        }
        Address::Tcp { host, port } => {
            let host = if host.is_empty() { "localhost" } else { host };
            resolve(host, *port, name, deadline, cancel)?.into_iter().map(SockAddr::ip).collect()
        }
        Address::Unix(path) => {
            check_socket_path(path).map_err(Error::invalid)?;
            vec![SockAddr::unix(path).map_err(|e| Error::net(name, "connecting", errno(&e)))?]
        }
        Address::Vsock { cid, port } => vec![SockAddr::vsock(*cid, *port)],
    };
    let what = format!("connecting to {address}");
    race(&addresses, deadline, cancel).map_err(|e| Error::net(name, what, errno(&e)))
}

/// Connect to whichever address answers first. Each gets a head start over the next.
fn race(
    addresses: &[SockAddr],
    deadline: Option<Instant>,
    cancel: Option<&Waker>,
) -> io::Result<OwnedFd> {
    let mut rest = addresses.iter().peekable();
    let mut waiting: Vec<OwnedFd> = Vec::new();
    let mut failure = Failure(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL));
    let mut next = Instant::now();
    loop {
        let mut busy = false;
        if let Some(to) = rest.peek()
            && (waiting.is_empty() || next <= Instant::now())
        {
            match start(to) {
                Ok((fd, true)) => return finish(fd),
                Ok((fd, false)) => waiting.push(fd),
                // A Unix socket whose backlog is full: again, a little later.
                Err(e) if errno(&e) == libc::EAGAIN && to.family() == libc::AF_UNIX => busy = true,
                Err(e) => failure.learn(e),
            }
            next = Instant::now() + if busy { UNIX_RETRY } else { HEAD_START };
            if !busy {
                rest.next();
            }
        }
        if waiting.is_empty() && !busy {
            match rest.peek() {
                Some(_) => continue,
                None => return Err(failure.0),
            }
        }

        let mut fds: Vec<_> = waiting.iter().map(|fd| sys::poll_for(fd, libc::POLLOUT)).collect();
        fds.extend(cancel.map(|waker| sys::poll_for(waker, libc::POLLIN)));
        let until = match (deadline, rest.peek()) {
            (Some(at), Some(_)) => Some(at.min(next)),
            (None, Some(_)) => Some(next),
            (at, None) => at,
        };
        sys::poll(&mut fds, until)?;
        if cancel.is_some() && fds.last().is_some_and(|waker| waker.revents != 0) {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        // From behind, so that removing leaves the others where they are.
        for at in (0..waiting.len()).rev() {
            if fds[at].revents == 0 {
                continue;
            }
            let fd = waiting.remove(at);
            match sys::take_error(&fd) {
                Ok(()) => return finish(fd),
                Err(e) => failure.learn(e),
            }
            // No need to wait before the next is tried.
            next = Instant::now();
        }
        if deadline.is_some_and(|at| at <= Instant::now()) {
            return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
        }
    }
}

/// Begin to connect: whether it is done already.
fn start(to: &SockAddr) -> io::Result<(OwnedFd, bool)> {
    let fd = sys::socket(to.family())?;
    match sys::connect(&fd, to) {
        Ok(()) => Ok((fd, true)),
        Err(e) if matches!(errno(&e), libc::EINPROGRESS | libc::EINTR) => Ok((fd, false)),
        Err(e) => Err(e),
    }
}

/// A connected socket as the others want it.
fn finish(fd: OwnedFd) -> io::Result<OwnedFd> {
    sys::set_nonblocking(&fd, false)?;
    tune(&fd);
    Ok(fd)
}

/// TCP: send at once (what leaves in two parts must not wait for word of the first), and notice some day
/// that the peer's host is gone. Hints; other sockets do not take them.
pub fn tune(fd: &OwnedFd) {
    if sys::set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1).is_ok() {
        let _ = sys::set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
    }
}

/// Why connecting failed: of several reasons the one that tells most.
struct Failure(io::Error);

impl Failure {
    fn learn(&mut self, e: io::Error) {
        // A host without IPv6 says these of each IPv6 address.
        let dull = |e: &io::Error| {
            matches!(errno(e), libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::EAFNOSUPPORT)
        };
        if dull(&self.0) || !dull(&e) {
            self.0 = e;
        }
    }
}

/// An address as listening tells it.
fn tcp_address(at: SocketAddr) -> Address {
    let host = match at {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
        other => other.ip().to_string(),
    };
    Address::Tcp { host, port: at.port() }
}

/// An address without the disguise that IPv4 has on a socket of both families.
fn plain_ip(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

#[cfg(test)]
mod tests;
