//! Listening and accepting.

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use super::sys::{self, SockAddr, Told};
use super::{errno, plain_ip, resolve, tcp_address, tune};
use crate::block::{Error, Name, Result};
use crate::nbd::uri::{Address, check_socket_path};

/// Bind and listen; also tells the real addresses (port 0 resolved). A name may have several; an
/// empty one means all addresses of this host. The sockets do not block. A Unix socket's path that a
/// dead process left behind is taken over; one that is alive is EADDRINUSE. Who listens on a path
/// removes it in the end.
pub fn listen(address: &Address) -> Result<Vec<(OwnedFd, Address)>> {
    let name = Name::from(address.to_string());
    let failed = |e: io::Error| Error::net(&name, "listening", errno(&e));
    match address {
        Address::Tcp { host, port } => {
            let mut addresses: Vec<SocketAddr> = match host.as_str() {
                "" => vec![
                    (Ipv6Addr::UNSPECIFIED, *port).into(),
                    (Ipv4Addr::UNSPECIFIED, *port).into(),
                ],
                host => resolve(host, *port, &name, None, None)?,
            };
            // A hosts file may name an address twice.
            let mut seen = Vec::new();
            addresses.retain(|at| !seen.contains(at) && (seen.push(*at), true).1);
            // All get the port that the first is given; another may have that one by chance.
            let mut tries = if *port == 0 && addresses.len() > 1 { 16 } else { 1 };
            loop {
                tries -= 1;
                match listen_tcp(&addresses) {
                    Err(e) if tries > 0 && errno(&e) == libc::EADDRINUSE => {}
                    result => return result.map_err(failed),
                }
            }
        }
        Address::Unix(path) => {
            check_socket_path(path).map_err(Error::invalid)?;
            Ok(vec![(listen_unix(path).map_err(failed)?, address.clone())])
        }
        Address::Vsock { cid, port } => Ok(vec![listen_vsock(*cid, *port).map_err(failed)?]),
    }
}

fn listen_tcp(addresses: &[SocketAddr]) -> io::Result<Vec<(OwnedFd, Address)>> {
    let both =
        addresses.iter().any(SocketAddr::is_ipv4) && addresses.iter().any(SocketAddr::is_ipv6);
    let mut made = Vec::new();
    let mut given = None;
    let mut failure = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    for at in addresses {
        let mut at = *at;
        if let Some(port) = given {
            at.set_port(port);
        }
        match listen_ip(at, both) {
            Ok((fd, real)) => {
                given = Some(real.port());
                made.push((fd, tcp_address(real)));
            }
            // A host without IPv6.
            Err(e)
                if at.is_ipv6()
                    && matches!(errno(&e), libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL) =>
            {
                failure = e;
            }
            Err(e) => return Err(e),
        }
    }
    if made.is_empty() { Err(failure) } else { Ok(made) }
}

fn listen_ip(at: SocketAddr, both: bool) -> io::Result<(OwnedFd, SocketAddr)> {
    let at = SockAddr::ip(at);
    let fd = sys::socket(at.family())?;
    // Otherwise connections of an earlier server keep the port for a minute.
    sys::set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    if both && at.family() == libc::AF_INET6 {
        sys::set_option(&fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    sys::bind(&fd, &at)?;
    sys::listen(&fd)?;
    match sys::local_address(&fd)?.told() {
        Told::Ip(real) => Ok((fd, real)),
        _ => Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
    }
}

fn listen_vsock(cid: u32, port: u32) -> io::Result<(OwnedFd, Address)> {
    let fd = sys::socket(libc::AF_VSOCK)?;
    let port = if port == 0 { libc::VMADDR_PORT_ANY } else { port };
    sys::bind(&fd, &SockAddr::vsock(cid, port))?;
    sys::listen(&fd)?;
    match sys::local_address(&fd)?.told() {
        Told::Vsock { cid, port } => Ok((fd, Address::Vsock { cid, port })),
        _ => Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
    }
}

fn listen_unix(path: &Path) -> io::Result<OwnedFd> {
    let at = SockAddr::unix(path)?;
    // Two that take over the same path at once must not remove each other's new socket, nor take one
    // that is bound and does not listen yet for dead.
    let _lock = lock_directory(path);
    let fd = sys::socket(libc::AF_UNIX)?;
    match sys::bind(&fd, &at) {
        Err(e) if errno(&e) == libc::EADDRINUSE && is_dead(path, &at) => {
            fs::remove_file(path)?;
            sys::bind(&fd, &at)?;
        }
        result => result?,
    }
    if let Err(e) = sys::listen(&fd) {
        let _ = fs::remove_file(path);
        return Err(e);
    }
    Ok(fd)
}

/// Keep other servers of this library out of the directory for a moment; held while the file is. A
/// stranger who holds the lock is not waited for long.
fn lock_directory(path: &Path) -> Option<File> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let dir = File::open(dir.unwrap_or(Path::new("."))).ok()?;
    for _ in 0..100 {
        match sys::try_lock(&dir) {
            Err(e) if errno(&e) == libc::EWOULDBLOCK => {
                std::thread::sleep(Duration::from_millis(5));
            }
            _ => break,
        }
    }
    Some(dir)
}

/// Whether a path is a socket that nobody listens on.
fn is_dead(path: &Path, at: &SockAddr) -> bool {
    // Connecting to a file of another sort is refused too.
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let refused = || {
        let fd = sys::socket(libc::AF_UNIX)?;
        sys::connect(&fd, at)
    };
    is_socket && refused().is_err_and(|e| errno(&e) == libc::ECONNREFUSED)
}

/// Who is at the other end of an accepted connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// An IP address.
    Ip(IpAddr),
    /// A user of this host.
    Uid(u32),
    /// A virtual machine.
    Cid(u32),
    /// There is no telling.
    Unknown,
}

/// Who is at the other end of a connected socket.
pub fn peer(fd: &OwnedFd) -> Peer {
    sys::peer_address(fd).map_or(Peer::Unknown, |from| peer_at(fd, &from))
}

fn peer_at(fd: &OwnedFd, from: &SockAddr) -> Peer {
    match from.told() {
        Told::Ip(at) => Peer::Ip(plain_ip(at.ip())),
        Told::Unix => sys::peer_uid(fd).map_or(Peer::Unknown, Peer::Uid),
        Told::Vsock { cid, .. } => Peer::Cid(cid),
        Told::Other => Peer::Unknown,
    }
}

/// Where a socket listens that somebody else made; `None` if it has no address that a client could
/// write.
pub fn local_address(fd: &OwnedFd) -> Option<Address> {
    let this = sys::local_address(fd).ok()?;
    match this.told() {
        Told::Ip(mut at) => {
            if let plain @ IpAddr::V4(_) = plain_ip(at.ip()) {
                at.set_ip(plain);
            }
            Some(tcp_address(at))
        }
        Told::Unix => this.path().map(Address::Unix),
        Told::Vsock { cid, port } => Some(Address::Vsock { cid, port }),
        Told::Other => None,
    }
}

/// Accept one connection of a listening socket that is ready; `None` if there is none after all.
/// Close-on-exec, blocking, TCP_NODELAY. An error (EMFILE, ENOMEM, …) leaves the connection waiting:
/// who polls for the next one finds it at once, and had better rest a moment.
pub fn accept(listener: impl AsFd) -> io::Result<Option<(OwnedFd, Peer)>> {
    let (fd, from) = match sys::accept(listener.as_fd()) {
        Ok(accepted) => accepted,
        Err(e) => {
            return match errno(&e) {
                // It went away while it waited; or an error of the network, which Linux tells here
                // as if it were the listening socket's; or a firewall's word.
                libc::EAGAIN
                | libc::ECONNABORTED
                | libc::ENETDOWN
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
                | libc::EPERM => Ok(None),
                _ => Err(e),
            };
        }
    };
    tune(&fd);
    let peer = peer_at(&fd, &from);
    Ok(Some((fd, peer)))
}
