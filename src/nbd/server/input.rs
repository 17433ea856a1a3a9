//! Bytes from a client: taken from the socket as many at a time as there are.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use super::conn::Cut;
use super::memory::Pages;
use crate::block::last_errno;
use crate::nbd::net::Waker;
use crate::nbd::tls::{Session, Taken};

/// Bytes of the buffer. Those that are never used cost nothing.
const CAPACITY: usize = 256 << 10;
/// Ciphertext taken at a time, bytes.
const CIPHER: usize = 64 << 10;

/// Received bytes.
pub struct Input {
    memory: Pages,
    start: usize,
    end: usize,
    high: usize,
    cipher: Vec<u8>,
}

impl Input {
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { memory: Pages::new(CAPACITY)?, start: 0, end: 0, high: 0, cipher: Vec::new() })
    }

    /// The bytes that are there.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }

    /// How many there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// How many can be at once.
    pub fn capacity(&self) -> usize {
        CAPACITY
    }

    /// Most bytes of memory used since it was given back.
    pub fn high(&self) -> usize {
        self.high
    }

    /// Be done with the first `n`.
    #[inline]
    pub fn consume(&mut self, n: usize) {
        self.start += n.min(self.len());
    }

    /// Give the memory back, if nothing is in it.
    pub fn release(&mut self) {
        if self.len() == 0 {
            self.memory.release();
            self.high = 0;
            self.cipher = Vec::new();
        }
    }

    /// Whether there is something to receive, before `time` has passed.
    pub fn is_ready(&self, fd: &OwnedFd, time: Duration) -> bool {
        ready(fd, time)
    }

    /// Take what a session has decrypted already: whether there was something.
    pub fn take(&mut self, tls: &Session) -> Result<bool, Cut> {
        self.make_room();
        match tls.take(&mut self.memory[self.end..]) {
            Ok(Taken::Bytes(n)) => {
                self.end += n;
                self.high = self.high.max(self.end);
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(e) => Err(Cut::Protocol(e.to_string())),
        }
    }

    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            // A beginning of something that has not come whole: little, as a rule.
            self.memory.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.len());
        }
    }

    /// Receive what there is without waiting; `None` if there is nothing.
    pub fn receive_now(
        &mut self,
        fd: &OwnedFd,
        tls: Option<&Session>,
    ) -> Result<Option<bool>, Cut> {
        match self.receive_as(fd, tls, libc::MSG_DONTWAIT) {
            Err(Cut::Idle) => Ok(None),
            result => result.map(Some),
        }
    }

    /// Receive what there is, waiting for at least one byte; `false` at the end. There must be room.
    pub fn receive(&mut self, fd: &OwnedFd, tls: Option<&Session>) -> Result<bool, Cut> {
        self.receive_as(fd, tls, 0)
    }

    fn receive_as(&mut self, fd: &OwnedFd, tls: Option<&Session>, flags: i32) -> Result<bool, Cut> {
        self.make_room();
        let n = match tls {
            None => recv(fd, &mut self.memory[self.end..], flags)?,
            Some(tls) => self.receive_sealed(fd, tls, flags)?,
        };
        self.end += n;
        self.high = self.high.max(self.end);
        Ok(n > 0)
    }

    fn receive_sealed(&mut self, fd: &OwnedFd, tls: &Session, flags: i32) -> Result<usize, Cut> {
        let failed = |e: crate::block::Error| Cut::Protocol(e.to_string());
        loop {
            match tls.take(&mut self.memory[self.end..]).map_err(failed)? {
                Taken::Bytes(n) => return Ok(n),
                Taken::Closed => return Ok(0),
                Taken::Nothing => {}
            }
            if self.cipher.is_empty() {
                self.cipher.resize(CIPHER, 0);
            }
            let n = recv(fd, &mut self.cipher, flags)?;
            if n == 0 {
                return Ok(0);
            }
            tls.feed(&self.cipher[..n]).map_err(failed)?;
        }
    }
}

fn ready(fd: &OwnedFd, time: Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let ms = time.as_millis().clamp(1, 60_000) as i32;
    // SAFETY: one pollfd of ours.
    unsafe { libc::poll(&raw mut poll, 1, ms) != 0 }
}

/// Receive and forget something, if it comes before `time` has passed; whether more may come.
pub fn discard(fd: &OwnedFd, time: Duration) -> bool {
    let mut some = [0; 4096];
    ready(fd, time) && recv(fd, &mut some, 0).is_ok_and(|n| n > 0)
}

fn recv(fd: &OwnedFd, into: &mut [u8], flags: i32) -> Result<usize, Cut> {
    loop {
        // SAFETY: the memory is ours and has that many bytes.
        let n = unsafe { libc::recv(fd.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), flags) };
        match n {
            0.. => return Ok(n as usize),
            _ => match last_errno() {
                libc::EINTR => {}
                libc::EAGAIN => return Err(Cut::Idle),
                libc::ECONNRESET | libc::ETIMEDOUT | libc::EHOSTUNREACH => return Err(Cut::Closed),
                e => {
                    let e = std::io::Error::from_raw_os_error(e);
                    return Err(Cut::Failed(format!("receiving: {e}")));
                }
            },
        }
    }
}

/// Wait until the peer has hung up for good (a half-closed one has not) or the waker wakes; whether it
/// is the peer.
pub fn hangs_up(fd: Option<&OwnedFd>, waker: &Waker) -> bool {
    let mut polls = [
        libc::pollfd { fd: fd.map_or(-1, |fd| fd.as_raw_fd()), events: 0, revents: 0 },
        libc::pollfd { fd: waker.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 },
    ];
    // SAFETY: two pollfds of ours; a negative descriptor is passed over.
    unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) > 0 && polls[0].revents != 0 }
}

/// Wait until the socket has something or the waker wakes; whether it is the socket.
pub fn wait(fd: Option<&OwnedFd>, waker: &Waker, time: Option<Duration>) -> bool {
    let socket = fd.map_or(-1, |fd| fd.as_raw_fd());
    let mut polls = [
        libc::pollfd { fd: socket, events: libc::POLLIN, revents: 0 },
        libc::pollfd { fd: waker.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 },
    ];
    let ms = time.map_or(-1, |t| t.as_millis().clamp(1, 60_000) as i32);
    // SAFETY: two pollfds of ours; a negative descriptor is passed over.
    let n = unsafe { libc::poll(polls.as_mut_ptr(), 2, ms) };
    n > 0 && polls[0].revents != 0 && polls[1].revents == 0
}
