//! Sending replies: in whole, in one order, by whoever has them.
//!
//! Two kinds of thread send on a connection: its own, which may wait until the client takes what it
//! asked for, and those of the pool, which never wait for a client. A pool thread leaves its reply in
//! `done`; whoever holds the sending lock sends what is there, so that nobody waits for the lock
//! either. What does not fit the socket then is left to the connection's own thread.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering::*;

use super::conn::{Conn, Cut};
use super::job::Reply;
use crate::block::last_errno;
use crate::nbd::net::polling::asleep;
use crate::nbd::tls::Session;

/// Replies gathered into one system call.
const GATHER: usize = 64;
/// Plain text that is encrypted at a time, bytes: what waits in memory for a slow client.
const SEAL: usize = 256 << 10;

/// What the sending lock guards: what is under way, in this order.
#[derive(Default)]
pub struct Sending {
    /// Records made of what is being sent; empty without TLS.
    cipher: Vec<u8>,
    /// How many bytes of them the socket has taken.
    cipher_taken: usize,
    /// Replies of the pool that the socket did not take yet, or not whole. They count for the limits
    /// of requests and memory as long as they are here.
    rest: VecDeque<Reply>,
    /// Bytes of the first of them that are done with.
    taken: usize,
    /// The connection's own thread is in the middle of a reply: nothing may come between.
    middle: bool,
}

/// Bytes of a file that were promised and can not be had.
pub struct Short {
    pub left: u64,
    pub errno: i32,
}

impl Short {
    fn of(s: &mut Sending, left: u64, errno: i32) -> Self {
        s.middle = true;
        Self { left, errno }
    }
}

impl Sending {
    fn is_empty(&self) -> bool {
        self.rest.is_empty() && self.cipher_taken == self.cipher.len()
    }
}

impl Conn {
    /// Send what waits and then `bytes`, however long the client takes. With `more` the reply is not
    /// whole yet, and the rest follows before anything else.
    pub(super) fn send(&self, bytes: &[u8], more: bool) -> Result<(), Cut> {
        {
            let mut s = self.sending.lock();
            self.finish(&mut s, true)?;
            self.push(&mut s, bytes, more)?;
            s.middle = more;
        }
        if more { Ok(()) } else { self.send_done(true) }
    }

    /// Send `head`, and `count` bytes of a host file after it, which the kernel moves; `more` as for
    /// [`Conn::send`]. Where the file ends or fails before, the rest of them has still to be sent.
    pub(super) fn send_file(
        &self,
        head: &[u8],
        more: bool,
        file: BorrowedFd<'_>,
        mut offset: u64,
        mut count: u64,
    ) -> Result<Option<Short>, Cut> {
        let mut s = self.sending.lock();
        self.finish(&mut s, true)?;
        self.push(&mut s, head, true)?;
        while count > 0 {
            let mut at = offset as libc::off_t;
            let most = count.min(1 << 30) as usize;
            // SAFETY: both descriptors are open, and `at` is ours.
            let n = asleep(|| unsafe {
                libc::sendfile(self.fd.as_raw_fd(), file.as_raw_fd(), &raw mut at, most)
            });
            match n {
                1.. => {
                    offset += n as u64;
                    count -= n as u64;
                }
                // It became shorter.
                0 => return Ok(Some(Short::of(&mut s, count, libc::EIO))),
                _ => match last_errno() {
                    libc::EINTR => {}
                    libc::EINVAL | libc::ENOSYS => {
                        if let Some(short) = self.send_by_hand(&mut s, file, offset, count, more)? {
                            return Ok(Some(short));
                        }
                        break;
                    }
                    // The file's, for sockets have none of these.
                    e @ (libc::EIO | libc::EUCLEAN | libc::EBADMSG | libc::ENODATA) => {
                        return Ok(Some(Short::of(&mut s, count, e)));
                    }
                    e => return Err(Cut::from_send(e)),
                },
            }
        }
        s.middle = more;
        drop(s);
        if !more {
            self.send_done(true)?;
        }
        Ok(None)
    }

    /// Send bytes of a file that the kernel does not move by itself.
    fn send_by_hand(
        &self,
        s: &mut Sending,
        file: BorrowedFd<'_>,
        mut offset: u64,
        mut count: u64,
        more: bool,
    ) -> Result<Option<Short>, Cut> {
        let mut piece = vec![0u8; count.min(128 << 10) as usize];
        while count > 0 {
            let most = count.min(piece.len() as u64) as usize;
            // SAFETY: the memory is ours and has `most` bytes.
            let n = unsafe {
                libc::pread(
                    file.as_raw_fd(),
                    piece.as_mut_ptr().cast(),
                    most,
                    offset as libc::off_t,
                )
            };
            match n {
                1.. => {
                    offset += n as u64;
                    count -= n as u64;
                    self.push(s, &piece[..n as usize], more || count > 0)?;
                }
                0 => return Ok(Some(Short::of(s, count, libc::EIO))),
                _ => match last_errno() {
                    libc::EINTR => {}
                    e => return Ok(Some(Short::of(s, count, e))),
                },
            }
        }
        Ok(None)
    }

    /// A reply made by a thread of the pool: sent now if the socket takes it.
    pub(super) fn complete(&self, reply: Reply) {
        self.done.lock().push_back(reply);
        if self.send_done(false).is_err() {
            self.cut();
            self.wake();
        }
    }

    /// Send the replies that wait in `done`. With `wait`, as long as it takes.
    pub(super) fn send_done(&self, wait: bool) -> Result<(), Cut> {
        // Who adds to `done` while another sends relies on that one to look again.
        while !self.done.lock().is_empty() {
            let Some(mut s) = self.sending.try_lock() else { return Ok(()) };
            if s.middle && !self.is_cut() {
                return Ok(());
            }
            s.rest.append(&mut self.done.lock());
            if !self.finish(&mut s, wait)? {
                drop(s);
                self.wake();
                return Ok(());
            }
        }
        Ok(())
    }

    /// Send all replies of the pool that wait, those first that the socket did not take, however long
    /// the client takes.
    pub(super) fn send_rest(&self) -> Result<(), Cut> {
        self.finish(&mut self.sending.lock(), true)?;
        self.send_done(true)
    }

    /// Send what was left; whether it is gone.
    pub(super) fn finish(&self, s: &mut Sending, wait: bool) -> Result<bool, Cut> {
        loop {
            if self.is_cut() {
                // Nobody takes it any more, nor the end of a reply that was begun.
                s.rest.drain(..).for_each(|reply| self.release(&reply));
                *s = Sending::default();
            }
            while s.cipher_taken < s.cipher.len() {
                let piece = [IoSlice::new(&s.cipher[s.cipher_taken..])];
                match self.write_some(&piece, wait, false)? {
                    Some(n) => s.cipher_taken += n,
                    None => return Ok(false),
                }
            }
            if s.cipher_taken > 0 {
                s.cipher_taken = 0;
                s.cipher.clear();
                s.cipher.shrink_to(32 << 10);
            }
            if s.rest.is_empty() {
                return Ok(true);
            }
            match &self.tls {
                Some(tls) => {
                    let first = s.rest.front().map_or(&[][..], Reply::bytes);
                    let n = (first.len() - s.taken).min(SEAL);
                    seal(tls, &first[s.taken..s.taken + n], &mut s.cipher)?;
                    self.went(s, n);
                }
                None => {
                    let mut slices = [IoSlice::new(&[]); GATHER];
                    let mut skip = s.taken;
                    let count = s.rest.len().min(GATHER);
                    for (slice, reply) in slices.iter_mut().zip(&s.rest) {
                        *slice = IoSlice::new(&reply.bytes()[std::mem::take(&mut skip)..]);
                    }
                    match self.write_some(&slices[..count], wait, false)? {
                        Some(n) => self.went(s, n),
                        None => return Ok(false),
                    }
                }
            }
        }
    }

    /// So many bytes of `rest` are done with.
    fn went(&self, s: &mut Sending, n: usize) {
        s.taken += n;
        while let Some(first) = s.rest.front()
            && s.taken >= first.bytes().len()
        {
            s.taken -= first.bytes().len();
            if let Some(reply) = s.rest.pop_front() {
                self.release(&reply);
            }
        }
    }

    /// Send all of `bytes`, when nothing else is left, however long the client takes.
    fn push(&self, s: &mut Sending, mut bytes: &[u8], more: bool) -> Result<(), Cut> {
        if let Some(tls) = &self.tls {
            for piece in bytes.chunks(SEAL) {
                seal(tls, piece, &mut s.cipher)?;
                self.finish(s, true)?;
            }
            return Ok(());
        }
        while !bytes.is_empty() {
            match self.write_some(&[IoSlice::new(bytes)], true, more)? {
                Some(n) => bytes = &bytes[n..],
                None => return Err(Cut::Closed),
            }
        }
        Ok(())
    }

    /// One system call: how many bytes went, `None` if none did and waiting is not allowed.
    pub(super) fn write_some(
        &self,
        pieces: &[IoSlice<'_>],
        wait: bool,
        more: bool,
    ) -> Result<Option<usize>, Cut> {
        // SAFETY: a message of zeroes is an empty one.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // An IoSlice has the layout of an iovec.
        message.msg_iov = pieces.as_ptr().cast_mut().cast();
        message.msg_iovlen = pieces.len().min(1024) as _;
        let mut flags = libc::MSG_NOSIGNAL;
        flags |= if wait { 0 } else { libc::MSG_DONTWAIT };
        flags |= if more { libc::MSG_MORE } else { 0 };
        loop {
            // SAFETY: the message describes memory that is borrowed for the call.
            let send = || unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const message, flags) };
            let n = if wait { asleep(send) } else { send() };
            match n {
                1.. => return Ok(Some(n as usize)),
                0 => return Err(Cut::Closed),
                _ => match last_errno() {
                    libc::EINTR => {}
                    libc::EAGAIN if !wait => return Ok(None),
                    e => return Err(Cut::from_send(e)),
                },
            }
        }
    }

    /// Whether something is left that the socket did not take.
    pub(super) fn has_left(&self) -> bool {
        !self.sending.lock().is_empty()
    }

    /// Wake the connection's own thread from waiting.
    pub(super) fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    /// Count a request of the pool as over.
    fn release(&self, reply: &Reply) {
        self.server.memory.fetch_sub(reply.budget, Relaxed);
        self.server.in_pool.fetch_sub(1, Relaxed);
        self.bytes.fetch_sub(reply.budget, Relaxed);
        self.in_pool.fetch_sub(1, SeqCst);
        if self.waiting.load(SeqCst) {
            self.wake();
        }
    }
}

fn seal(tls: &Session, plain: &[u8], out: &mut Vec<u8>) -> Result<(), Cut> {
    tls.seal(&[IoSlice::new(plain)], out).map_err(|e| Cut::Failed(e.to_string()))
}
