//! Sockets: connecting, listening, accepting, and waiting no longer than a deadline.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use super::uri::Address;
use crate::block::{Name, Result};

/// Wakes a thread that waits in [`connect`], [`Stream`] or [`accept`] (an eventfd).
pub struct Waker(OwnedFd);

impl Waker {
    /// One that nobody has woken yet.
    pub fn new() -> Result<Self> {
        todo!()
    }
    /// Wake whoever waits, now and from now on.
    pub fn wake(&self) {
        todo!()
    }
    /// Take back what [`Waker::wake`] did.
    pub fn reset(&self) {
        todo!()
    }
}

/// Connect, trying all addresses that the host name has. `name` is for messages. The socket is
/// close-on-exec, blocking, TCP_NODELAY. ETIMEDOUT at the deadline, ECANCELED when `cancel` wakes.
pub fn connect(
    _address: &Address,
    _name: &Name,
    _deadline: Option<Instant>,
    _cancel: Option<&Waker>,
) -> Result<OwnedFd> {
    todo!()
}

/// Bind and listen; also tells the real addresses (port 0 resolved). A name may have several. A Unix
/// socket's path that a dead process left behind is taken over; one that is alive is EADDRINUSE.
pub fn listen(_address: &Address) -> Result<Vec<(OwnedFd, Address)>> {
    todo!()
}

/// Who is at the other end of an accepted connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// An IP address.
    Ip(std::net::IpAddr),
    /// A user of this host.
    Uid(u32),
    /// A virtual machine.
    Cid(u32),
    /// There is no telling.
    Unknown,
}

/// Accept one connection of a listening socket that is ready; `None` if there is none after all.
/// Close-on-exec, blocking, TCP_NODELAY.
pub fn accept(_listener: impl AsFd) -> std::io::Result<Option<(OwnedFd, Peer)>> {
    todo!()
}

/// A connected stream during negotiation: exact reads and writes, plain or through TLS, none of which
/// outlasts the deadline. Nothing is read ahead, so that what a peer sent in plain text before TLS
/// began can not be taken for part of what comes after.
pub struct Stream {
    fd: OwnedFd,
    tls: Option<std::sync::Arc<super::tls::Session>>,
    /// For messages.
    peer: Name,
    /// When reading and writing give up (ETIMEDOUT).
    pub deadline: Option<Instant>,
}

impl Stream {
    /// A stream over a connected socket, plain.
    pub fn new(fd: OwnedFd, peer: Name, deadline: Option<Instant>) -> Self {
        Self { fd, tls: None, peer, deadline }
    }
    /// Give up with ECANCELED when `cancel` wakes.
    pub fn cancelled_by(&mut self, _cancel: std::sync::Arc<Waker>) {
        todo!()
    }
    /// Fill `buf`. A peer that hangs up is ECONNRESET.
    pub fn read(&mut self, _buf: &mut [u8]) -> Result<()> {
        todo!()
    }
    /// Read and forget `count` bytes.
    pub fn skip(&mut self, _count: u64) -> Result<()> {
        todo!()
    }
    /// Send all of `buf`.
    pub fn write(&mut self, _buf: &[u8]) -> Result<()> {
        todo!()
    }
    /// Shake hands for TLS; from now on all goes through it.
    pub fn start_tls(&mut self, _session: super::tls::Session) -> Result<()> {
        todo!()
    }
    /// Whether TLS is on.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }
    /// The peer's name, for messages.
    pub fn peer(&self) -> &Name {
        &self.peer
    }
    /// The socket (blocking again) and the session, for transmission.
    pub fn into_parts(self) -> (OwnedFd, Option<std::sync::Arc<super::tls::Session>>) {
        (self.fd, self.tls)
    }
}
