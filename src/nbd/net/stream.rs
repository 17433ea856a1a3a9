//! A connected stream that gives up in time.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use super::{Waker, errno, sys};
use crate::block::{Error, ErrorKind, Name, Result};
use crate::nbd::tls::{Session, Taken};

/// How much is received at once where more than was asked for may be: a TLS record.
const CHUNK: usize = 16 << 10;

/// A connected stream during negotiation: exact reads and writes, plain or through TLS, none of which
/// outlasts the deadline. Nothing is read ahead, so that what a peer sent in plain text before TLS
/// began can not be taken for part of what comes after.
pub struct Stream {
    fd: OwnedFd,
    tls: Option<Arc<Session>>,
    /// For messages.
    peer: Name,
    cancel: Option<Arc<Waker>>,
    /// Something came through TLS.
    heard: bool,
    /// When reading and writing give up (ETIMEDOUT).
    pub deadline: Option<Instant>,
}

impl Stream {
    /// A stream over a connected socket, plain.
    pub fn new(fd: OwnedFd, peer: Name, deadline: Option<Instant>) -> Self {
        Self { fd, tls: None, peer, cancel: None, heard: false, deadline }
    }

    /// Give up with ECANCELED when `cancel` wakes.
    pub fn cancelled_by(&mut self, cancel: Arc<Waker>) {
        self.cancel = Some(cancel);
    }

    /// Fill `buf`. A peer that hangs up is ECONNRESET.
    pub fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            filled += match &self.tls {
                None => self.receive(rest, "reading")?,
                Some(tls) => match tls.take(rest)? {
                    Taken::Bytes(n) => {
                        self.heard = true;
                        n
                    }
                    Taken::Nothing => {
                        self.receive_tls(tls, "reading")?;
                        0
                    }
                    Taken::Closed => return Err(self.hung_up("reading")),
                },
            };
        }
        Ok(())
    }

    /// Read and forget `count` bytes.
    pub fn skip(&mut self, mut count: u64) -> Result<()> {
        let mut buf = [0; CHUNK];
        while count > 0 {
            let n = count.min(CHUNK as u64) as usize;
            self.read(&mut buf[..n])?;
            count -= n as u64;
        }
        Ok(())
    }

    /// Send all of `buf`.
    pub fn write(&mut self, buf: &[u8]) -> Result<()> {
        match &self.tls {
            None => self.send(buf, "sending"),
            Some(tls) => {
                let mut out = Vec::new();
                tls.seal(&[io::IoSlice::new(buf)], &mut out)?;
                let sent = self.send(&out, "sending");
                sent.map_err(|e| match e.kind() {
                    ErrorKind::Errno(libc::ECONNRESET) => self.last_words(tls).unwrap_or(e),
                    _ => e,
                })
            }
        }
    }

    /// Shake hands for TLS; from now on all goes through it.
    pub fn start_tls(&mut self, session: Session) -> Result<()> {
        if self.tls.is_some() {
            return Err(Error::Internal("TLS within TLS".into()));
        }
        const WHAT: &str = "TLS handshake";
        let session = Arc::new(session);
        loop {
            let mut out = Vec::new();
            session.seal(&[], &mut out)?;
            self.send(&out, WHAT)?;
            if !session.is_handshaking() {
                break;
            }
            self.receive_tls(&session, WHAT)?;
        }
        self.tls = Some(session);
        Ok(())
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
    pub fn into_parts(self) -> (OwnedFd, Option<Arc<Session>>) {
        // It does not fail on a descriptor that is open.
        let _ = sys::set_nonblocking(&self.fd, false);
        (self.fd, self.tls)
    }

    /// Hang up. With TLS the peer is told before that this is the end, if that can be sent at once.
    pub fn close(self) {
        if let Some(tls) = &self.tls {
            let mut out = Vec::new();
            tls.close(&mut out);
            let _ = sys::send(&self.fd, &out);
        }
    }

    /// Why the peer hung up, if it said so before.
    fn last_words(&self, tls: &Session) -> Option<Error> {
        let mut cipher = [0; CHUNK];
        // A peer that is gone can have left no more than what the socket holds.
        while let Ok(n @ 1..) = sys::receive(&self.fd, &mut cipher) {
            match tls.feed(&cipher[..n]) {
                Ok(()) => {}
                Err(e @ Error::Net { .. }) => return Some(e),
                Err(_) => break,
            }
        }
        None
    }

    fn fail(&self, what: &str, e: &io::Error) -> Error {
        match errno(e) {
            libc::EPIPE | libc::ECONNRESET => self.hung_up(what),
            errno => Error::net(&self.peer, what, errno),
        }
    }

    fn hung_up(&self, what: &str) -> Error {
        // In TLS 1.3 a client's certificate is looked at when the handshake is over for the client, and
        // not every server says what it did not like.
        let unheard = !self.heard && self.tls.as_ref().is_some_and(|tls| tls.is_client());
        let hint =
            " after the TLS handshake, for want of a certificate that it likes (tls-certificate)?";
        let hint = if unheard { hint } else { "" };
        Error::net(&self.peer, format!("{what}: the peer hung up{hint}"), libc::ECONNRESET)
    }

    /// Wait until the socket is ready. What is ready already does not get around the deadline: a peer
    /// may never stop sending.
    fn wait(&self, events: libc::c_short, what: &str) -> Result<()> {
        let late = || self.fail(what, &io::Error::from_raw_os_error(libc::ETIMEDOUT));
        if self.deadline.is_some_and(|at| at <= Instant::now()) {
            return Err(late());
        }
        let mut fds = vec![sys::poll_for(&self.fd, events)];
        fds.extend(self.cancel.iter().map(|waker| sys::poll_for(&**waker, libc::POLLIN)));
        let ready = sys::poll(&mut fds, self.deadline).map_err(|e| self.fail(what, &e))?;
        if fds.get(1).is_some_and(|waker| waker.revents != 0) {
            return Err(Error::net(&self.peer, what, libc::ECANCELED));
        }
        if ready { Ok(()) } else { Err(late()) }
    }

    /// Some bytes, at least 1 and not more than there is room for.
    fn receive(&self, buf: &mut [u8], what: &str) -> Result<usize> {
        loop {
            self.wait(libc::POLLIN, what)?;
            match sys::receive(&self.fd, buf) {
                Ok(0) => return Err(self.hung_up(what)),
                Ok(n) => return Ok(n),
                Err(e) if errno(&e) == libc::EAGAIN => {}
                Err(e) => return Err(self.fail(what, &e)),
            }
        }
    }

    fn send(&self, mut buf: &[u8], what: &str) -> Result<()> {
        while !buf.is_empty() {
            self.wait(libc::POLLOUT, what)?;
            match sys::send(&self.fd, buf) {
                Ok(n) => buf = buf.get(n..).unwrap_or(&[]),
                Err(e) if errno(&e) == libc::EAGAIN => {}
                Err(e) => return Err(self.fail(what, &e)),
            }
        }
        Ok(())
    }

    /// Feed the session with what has come, and send what it answers.
    fn receive_tls(&self, tls: &Session, what: &str) -> Result<()> {
        let mut cipher = [0; CHUNK];
        let n = self.receive(&mut cipher, what)?;
        let fed = tls.feed(&cipher[..n]);
        let mut out = Vec::new();
        let sealed = tls.seal(&[], &mut out);
        match fed {
            Ok(()) => {
                sealed?;
                self.send(&out, what)
            }
            Err(e) => {
                // Why we give up; the peer may be gone.
                let _ = self.send(&out, what);
                Err(e)
            }
        }
    }
}
