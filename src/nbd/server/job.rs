//! One request done by a thread of the pool, and its reply.

use std::ops::{Deref, DerefMut};

use super::conn::Conn;
use super::memory::Pages;
use super::reply;
use crate::block::{Error, ReqFlags, Result};
use crate::nbd::proto::{Request, chunk, cmd, cmd_flag};

/// From this many bytes on, memory comes from the system and goes back to it.
const LARGE: usize = 64 << 10;
/// Zeroes at a time, bytes: after each it is looked whether anybody still waits for them.
const ZERO_STEP: u64 = 1 << 30;

/// Memory for a request's data.
pub enum Buffer {
    /// From malloc.
    Small(Vec<u8>),
    /// From the system.
    Large(Pages, usize),
}

impl Buffer {
    /// `len` zeroed bytes; an error where there is no memory.
    pub fn new(len: usize) -> Result<Self> {
        if len < LARGE {
            return Ok(Self::Small(vec![0; len]));
        }
        match Pages::new(len) {
            Ok(pages) => Ok(Self::Large(pages, len)),
            Err(_) => Err(Error::invalid("no memory for the request")),
        }
    }

    fn cut(&mut self, to: usize) {
        match self {
            Self::Small(bytes) => bytes.truncate(to),
            Self::Large(_, len) => *len = to.min(*len),
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Small(bytes) => bytes,
            Self::Large(pages, len) => &pages[..*len],
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Small(bytes) => bytes,
            Self::Large(pages, len) => &mut pages[..*len],
        }
    }
}

/// A request for the pool.
pub struct Job {
    /// The request, checked.
    pub request: Request,
    /// What is to be written.
    pub payload: Option<Buffer>,
    /// Bytes that it counts for until its reply is gone.
    pub budget: usize,
}

/// A reply that waits to be sent.
pub struct Reply {
    buffer: Buffer,
    pub(super) budget: usize,
}

impl Reply {
    /// What goes over the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer
    }
}

impl Conn {
    /// Do a job and see to its reply.
    pub(super) fn run(&self, job: Job) {
        let budget = job.budget;
        let buffer = match self.work(job) {
            Ok(buffer) => buffer,
            Err((request, e)) => {
                let mut out = Vec::new();
                reply::error(&mut out, self.mode, &request, &e);
                self.note_error(&request, &e);
                Buffer::Small(out)
            }
        };
        self.complete(Reply { buffer, budget });
    }

    fn work(&self, job: Job) -> std::result::Result<Buffer, (Request, Error)> {
        let r = job.request;
        if r.kind == cmd::READ {
            return self.read_in_pool(&r).map_err(|e| (r, e));
        }
        if r.kind == cmd::BLOCK_STATUS {
            return self.status(&r, None).map(Buffer::Small).map_err(|e| (r, e));
        }
        self.change(&r, job.payload.as_deref()).map_err(|e| (r, e))?;
        let mut out = Vec::with_capacity(32);
        reply::ok(&mut out, self.mode, &r);
        Ok(Buffer::Small(out))
    }

    /// A request that answers with nothing but success. `payload` is what a write writes.
    pub(super) fn change(&self, r: &Request, payload: Option<&[u8]>) -> Result<()> {
        let mut flags = ReqFlags::NONE;
        let fua = r.flags & cmd_flag::FUA != 0;
        if fua {
            flags = ReqFlags::FUA;
        }
        let export = &self.export;
        match r.kind {
            cmd::WRITE => export.with(|i| i.write_at(payload.unwrap_or(&[]), r.offset, flags)),
            cmd::FLUSH if export.read_only => Ok(()),
            cmd::FLUSH => export.with(|i| i.flush()),
            cmd::TRIM => export.with(|i| i.trim(r.offset, r.length, flags)),
            cmd::CACHE => export.with(|i| i.cache(r.offset, r.length)),
            cmd::WRITE_ZEROES => {
                for (bit, flag, set) in [
                    (cmd_flag::NO_HOLE, ReqFlags::MAY_TRIM, false),
                    (cmd_flag::FAST_ZERO, ReqFlags::FAST_ZERO, true),
                ] {
                    if (r.flags & bit != 0) == set {
                        flags = flags | flag;
                    }
                }
                self.zero(r, flags)
            }
            _ => Err(Error::invalid("unknown command")),
        }
    }

    fn zero(&self, r: &Request, flags: ReqFlags) -> Result<()> {
        let (mut offset, mut left) = (r.offset, r.length);
        while left > 0 {
            if self.is_cut() {
                return Err(Error::invalid("the client is gone"));
            }
            let n = left.min(ZERO_STEP);
            self.export.with(|i| i.zero(offset, n, flags))?;
            offset += n;
            left -= n;
        }
        Ok(())
    }

    /// The whole reply to a read.
    fn read_in_pool(&self, r: &Request) -> Result<Buffer> {
        if self.is_cut() {
            return Err(Error::invalid("the client is gone"));
        }
        let len = usize::try_from(r.length).map_err(|_| Error::invalid("too long"))?;
        let (head, head_len) = reply::read_header(self.mode, chunk::DONE, r, r.offset, r.length);
        let mut buffer = Buffer::new(head_len + len)?;
        self.export.with(|i| i.read_at(&mut buffer[head_len..], r.offset))?;
        if let Some((hole, n)) = reply::hole_instead(self.mode, r, &buffer[head_len..]) {
            buffer[..n].copy_from_slice(&hole[..n]);
            buffer.cut(n);
        } else {
            buffer[..head_len].copy_from_slice(&head[..head_len]);
        }
        Ok(buffer)
    }
}
