//! Sending replies: in whole, in one order, by whoever has them.
//!
//! Two kinds of thread send on a connection: its own, which may wait until the client takes what it
//! asked for, and those of the pool, which never wait for a client. A pool thread leaves its reply in
//! `done`; whoever holds the sending lock sends what is there, so that nobody waits for the lock
//! either. What does not fit the socket then is left to the connection's own thread.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering::*;

use super::conn::{Conn, Cut};
use super::job::Reply;

/// Replies gathered into one system call.
const GATHER: usize = 64;
/// Plain text that is encrypted at a time, bytes: what waits in memory for a slow client.
const SEAL: usize = 256 << 10;

/// What the sending lock guards.
#[derive(Default)]
pub struct Sending {
    /// Records made of what is being sent; empty without TLS.
    cipher: Vec<u8>,
    /// Bytes on their way that the socket did not take yet.
    left: Vec<u8>,
    /// How many of them it has taken.
    taken: usize,
    /// The connection's own thread is in the middle of a reply: nothing may come between.
    middle: bool,
}

impl Conn {
    /// Send what waits and then `bytes`, however long the client takes. With `more` the reply is not
    /// whole yet, and the rest follows before anything else.
    pub(super) fn send(&self, bytes: &[u8], more: bool) -> Result<(), Cut> {
        {
            let mut s = self.sending.lock();
            self.finish(&mut s, true)?;
            self.push(&mut s, &mut [IoSlice::new(bytes)], true, more)?;
            s.middle = more;
        }
        if more { Ok(()) } else { self.send_done(true) }
    }

    /// Send `head`, and `count` bytes of a host file after it, which the kernel moves; `more` as for
    /// [`Conn::send`].
    pub(super) fn send_file(
        &self,
        head: &[u8],
        more: bool,
        file: BorrowedFd<'_>,
        mut offset: u64,
        mut count: u64,
    ) -> Result<(), Cut> {
        let mut s = self.sending.lock();
        self.finish(&mut s, true)?;
        self.push(&mut s, &mut [IoSlice::new(head)], true, true)?;
        while count > 0 {
            let mut at = offset as libc::off_t;
            let most = count.min(1 << 30) as usize;
            // SAFETY: both descriptors are open, and `at` is ours.
            let n =
                unsafe { libc::sendfile(self.fd.as_raw_fd(), file.as_raw_fd(), &raw mut at, most) };
            match n {
                1.. => {
                    offset += n as u64;
                    count -= n as u64;
                }
                // The length was promised: all that is left is to hang up.
                0 => return Err(Cut::Failed("the file became shorter while it was sent".into())),
                _ => match errno() {
                    libc::EINTR => {}
                    libc::EINVAL | libc::ENOSYS => {
                        self.send_by_hand(&mut s, file, offset, count)?;
                        break;
                    }
                    e => return Err(Cut::from_send(e)),
                },
            }
        }
        s.middle = more;
        drop(s);
        if more { Ok(()) } else { self.send_done(true) }
    }

    /// Send bytes of a file that the kernel does not move by itself.
    fn send_by_hand(
        &self,
        s: &mut Sending,
        file: BorrowedFd<'_>,
        mut offset: u64,
        mut count: u64,
    ) -> Result<(), Cut> {
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
                    self.push(s, &mut [IoSlice::new(&piece[..n as usize])], true, true)?;
                    offset += n as u64;
                    count -= n as u64;
                }
                0 => return Err(Cut::Failed("the file became shorter while it was sent".into())),
                _ if errno() == libc::EINTR => {}
                _ => {
                    return Err(Cut::Failed("the file could not be read while it was sent".into()));
                }
            }
        }
        Ok(())
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
            if !self.finish(&mut s, wait)? {
                drop(s);
                self.wake();
                return Ok(());
            }
            let batch: Vec<Reply> = {
                let mut done = self.done.lock();
                let n = done.len().min(GATHER);
                done.drain(..n).collect()
            };
            let mut slices: Vec<IoSlice<'_>> =
                batch.iter().map(|r| IoSlice::new(r.bytes())).collect();
            let sent =
                if self.is_cut() { Ok(true) } else { self.push(&mut s, &mut slices, wait, false) };
            drop(slices);
            drop(s);
            for reply in batch {
                self.release(reply.budget);
            }
            if !sent? {
                self.wake();
                return Ok(());
            }
        }
        Ok(())
    }

    /// Send what was left; whether it is gone.
    pub(super) fn finish(&self, s: &mut Sending, wait: bool) -> Result<bool, Cut> {
        if self.is_cut() {
            // Nobody takes it any more, nor the end of a reply that was begun.
            *s = Sending::default();
        }
        while s.taken < s.left.len() {
            match self.write_some(&[IoSlice::new(&s.left[s.taken..])], wait, false)? {
                Some(n) => s.taken += n,
                None => return Ok(false),
            }
        }
        if s.taken > 0 {
            s.taken = 0;
            s.left.clear();
            s.left.shrink_to(4096);
        }
        Ok(true)
    }

    /// Send all of `pieces`, or leave what the socket does not take in `left`: whether all went.
    fn push(
        &self,
        s: &mut Sending,
        mut pieces: &mut [IoSlice<'_>],
        wait: bool,
        more: bool,
    ) -> Result<bool, Cut> {
        if let Some(tls) = &self.tls {
            return self.push_sealed(s, tls, pieces, wait);
        }
        IoSlice::advance_slices(&mut pieces, 0);
        while !pieces.is_empty() {
            match self.write_some(pieces, wait, more)? {
                Some(n) => IoSlice::advance_slices(&mut pieces, n),
                None => {
                    pieces.iter().for_each(|p| s.left.extend_from_slice(p));
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn push_sealed(
        &self,
        s: &mut Sending,
        tls: &super::super::tls::Session,
        pieces: &[IoSlice<'_>],
        wait: bool,
    ) -> Result<bool, Cut> {
        let mut all = true;
        for piece in pieces.iter().flat_map(|p| p.chunks(SEAL)) {
            s.cipher.clear();
            tls.seal(&[IoSlice::new(piece)], &mut s.cipher)
                .map_err(|e| Cut::Failed(e.to_string()))?;
            let mut at = 0;
            while all && at < s.cipher.len() {
                match self.write_some(&[IoSlice::new(&s.cipher[at..])], wait, false)? {
                    Some(n) => at += n,
                    None => all = false,
                }
            }
            if !all {
                s.left.extend_from_slice(&s.cipher[at..]);
            }
        }
        s.cipher.clear();
        s.cipher.shrink_to(32 << 10);
        Ok(all)
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
            let n = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const message, flags) };
            match n {
                1.. => return Ok(Some(n as usize)),
                0 => return Err(Cut::Closed),
                _ => match errno() {
                    libc::EINTR => {}
                    libc::EAGAIN if !wait => return Ok(None),
                    e => return Err(Cut::from_send(e)),
                },
            }
        }
    }

    /// Whether bytes are left that the socket did not take.
    pub(super) fn has_left(&self) -> bool {
        let s = self.sending.lock();
        s.taken < s.left.len()
    }

    /// Wake the connection's own thread from waiting.
    pub(super) fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    /// Count a request of the pool as over.
    fn release(&self, budget: usize) {
        self.server.memory.fetch_sub(budget, Relaxed);
        self.server.in_pool.fetch_sub(1, Relaxed);
        self.bytes.fetch_sub(budget, Relaxed);
        self.in_pool.fetch_sub(1, SeqCst);
        if self.waiting.load(SeqCst) {
            self.wake();
        }
    }
}

pub(super) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}
