//! Receiving: as much as has come, with one system call, for whoever it is. What belongs into a
//! caller's memory and has not come yet is received right there.

use std::sync::Arc;
use std::time::Duration;

use libc::iovec;
use memmap2::MmapMut;

use super::handshake::Export;
use super::slot::{Memory, Slot};
use super::sys::{self, Errno};
use crate::block::{Dst, Error, Name, Result};
use crate::nbd::net::polling::{Awake, Polling};
use crate::nbd::tls::{Session, Taken};

/// Bytes received ahead: replies to a slot-full of 4 KiB reads. Memory is taken as it is touched.
const BUFFER: usize = 256 << 10;
/// Bytes received ahead while large reads are under way: what lands here of their data is copied.
const SMALL: usize = 4 << 10;
/// Encrypted bytes received at a time.
const CIPHER: usize = 64 << 10;
/// Pieces of a caller's memory in one system call.
const PIECES: usize = 32;
const NO_PIECE: iovec = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// One connected socket, and what was agreed on.
pub(super) struct Link {
    pub fd: std::os::fd::OwnedFd,
    pub tls: Option<Arc<Session>>,
    pub export: Export,
    pub peer: Name,
}

/// A payload of which a part has yet to come.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pending {
    None,
    /// Data for the memory of a slot, from byte `at` of the request on.
    Data {
        slot: usize,
        at: u64,
        left: u64,
        done: bool,
    },
    /// Descriptors of a block status.
    Status {
        slot: usize,
        context: usize,
        left: u64,
        wide: bool,
        done: bool,
    },
}

/// What was received and not yet dealt with. The receiver's alone.
pub(super) struct Rx {
    buf: MmapMut,
    start: usize,
    end: usize,
    pub pending: Pending,
    pub polling: Polling,
    cipher: Vec<u8>,
}

/// Why nothing was received.
pub(super) enum Stopped {
    /// The peer has hung up.
    End,
    Os(Errno),
    Tls(Error),
}

impl Rx {
    pub(super) fn new() -> std::io::Result<Self> {
        let buf = MmapMut::map_anon(BUFFER)?;
        let polling = Polling::default();
        Ok(Self { buf, start: 0, end: 0, pending: Pending::None, polling, cipher: Vec::new() })
    }

    /// Forget everything: another connection begins.
    pub(super) fn reset(&mut self) {
        (self.start, self.end, self.pending) = (0, 0, Pending::None);
    }

    /// What was received and not consumed.
    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        self.buf.get(self.start..self.end).unwrap_or_default()
    }

    /// Bytes of [`Rx::bytes`] were dealt with.
    #[inline]
    pub(super) fn consume(&mut self, n: usize) {
        self.start = (self.start + n).min(self.end);
    }

    /// As [`Rx::fill`], looking for a moment before sleeping; whether that was enough.
    pub(super) fn fill_soon(
        &mut self,
        link: &Link,
        slots: &[Slot],
        large: bool,
        limit: Duration,
    ) -> std::result::Result<bool, Stopped> {
        // It is not to be had while `self` is lent to its closure.
        let mut polling = std::mem::take(&mut self.polling);
        let awake = Awake::begin();
        let look = || match self.fill(link, slots, large, false) {
            Ok(()) => Ok(Some(())),
            Err(Stopped::Os(libc::EAGAIN)) => Ok(None),
            Err(why) => Err(why),
        };
        let found = polling.look(limit, look);
        drop(awake);
        self.polling = polling;
        match found? {
            Some(()) => Ok(true),
            None => self.fill(link, slots, large, true).map(|()| false),
        }
    }

    /// Receive more with one system call (with TLS, as many as make plain text of it).
    pub(super) fn fill(
        &mut self,
        link: &Link,
        slots: &[Slot],
        large: bool,
        wait: bool,
    ) -> std::result::Result<(), Stopped> {
        if self.start > 0 {
            // A few bytes: the beginning of a header or of a short payload.
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if let Some(session) = &link.tls {
            return self.fill_tls(link, session, slots, wait);
        }
        use std::os::fd::AsRawFd;
        let mut vecs = [NO_PIECE; PIECES + 1];
        let (mut n, mut direct) = (0, 0);
        let mut room = true;
        if let Some(dst) = self.target(slots) {
            (n, direct) = dst.fill(vecs.get_mut(..PIECES).unwrap_or_default());
            room = direct == dst.len();
        }
        if room && let Some(v) = vecs.get_mut(n) {
            let most = if large { SMALL } else { BUFFER };
            let free = self.buf.get_mut(self.end..).unwrap_or_default();
            *v = iovec { iov_base: free.as_mut_ptr().cast(), iov_len: free.len().min(most) };
            n += 1;
        }
        // SAFETY: the pieces are memory of a caller who waits for this reply, and our own buffer.
        let got =
            unsafe { sys::recv(link.fd.as_raw_fd(), vecs.get(..n).unwrap_or_default(), wait) };
        match got {
            Ok(0) => Err(Stopped::End),
            Ok(n) => {
                self.arrived(n.min(direct));
                self.end = (self.end + n.saturating_sub(direct)).min(BUFFER);
                Ok(())
            }
            Err(errno) => Err(Stopped::Os(errno)),
        }
    }

    /// The caller's memory for what is still to come of a payload.
    fn target(&self, slots: &[Slot]) -> Option<Dst<'static>> {
        let Pending::Data { slot, at, left, .. } = self.pending else { return None };
        // SAFETY: a payload is pending only for a slot whose reply is not complete: its `work` is
        // the receiver's, which we are.
        let memory = unsafe { (*slots.get(slot)?.work.get()).memory };
        match memory {
            // The range was checked against the request when the payload was announced.
            Memory::Into(dst) => Some(dst.sub(at as usize, left as usize)),
            _ => None,
        }
    }

    /// So many bytes of the pending data have come.
    pub(super) fn arrived(&mut self, n: usize) {
        if let Pending::Data { at, left, .. } = &mut self.pending {
            *at += n as u64;
            *left = left.saturating_sub(n as u64);
        }
    }

    /// Copy pending data that lies in the buffer to where it belongs.
    pub(super) fn copy_pending(&mut self, slots: &[Slot]) {
        if let Some(dst) = self.target(slots) {
            let n = dst.copy_from(self.bytes());
            self.consume(n);
            self.arrived(n);
        }
    }

    fn fill_tls(
        &mut self,
        link: &Link,
        session: &Session,
        slots: &[Slot],
        wait: bool,
    ) -> std::result::Result<(), Stopped> {
        use std::os::fd::AsRawFd;
        let mut fed = 0;
        loop {
            let mut piece = [NO_PIECE; 1];
            let direct = self.target(slots).is_some_and(|dst| dst.fill(&mut piece).0 == 1);
            let out = if direct {
                // SAFETY: memory of a caller who waits for this reply, writable by contract.
                unsafe {
                    std::slice::from_raw_parts_mut(piece[0].iov_base.cast(), piece[0].iov_len)
                }
            } else {
                self.buf.get_mut(self.end..).unwrap_or_default()
            };
            match session.take(out).map_err(Stopped::Tls)? {
                Taken::Bytes(n) if direct => {
                    self.arrived(n);
                    return Ok(());
                }
                Taken::Bytes(n) => {
                    self.end = (self.end + n).min(BUFFER);
                    return Ok(());
                }
                Taken::Closed => return Err(Stopped::End),
                // Part of a record: whoever waits is to look at the time.
                Taken::Nothing if fed > 0 => return Err(Stopped::Os(libc::EAGAIN)),
                Taken::Nothing => {}
            }
            self.cipher.resize(CIPHER, 0);
            let cipher =
                [iovec { iov_base: self.cipher.as_mut_ptr().cast(), iov_len: self.cipher.len() }];
            // SAFETY: the piece is ours, and nobody else touches it meanwhile.
            let got =
                unsafe { sys::recv(link.fd.as_raw_fd(), &cipher, wait) }.map_err(Stopped::Os)?;
            if got == 0 {
                return Err(Stopped::End);
            }
            session.feed(self.cipher.get(..got).unwrap_or_default()).map_err(Stopped::Tls)?;
            fed += 1;
        }
    }
}

/// An error of the protocol, on this link.
pub(super) fn broken(peer: &Name, what: impl Into<String>) -> Result<()> {
    Err(Error::proto(peer, what))
}
