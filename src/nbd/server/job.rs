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
/// Data begin at a multiple of this many bytes, for direct I/O.
const ALIGN: usize = 4096;

/// Memory that direct I/O likes.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; ALIGN]);

enum Memory {
    /// From malloc.
    Small(Vec<Page>),
    /// From the system.
    Large(Pages),
}

/// Memory for a request's data, with room for a header before them.
pub struct Buffer {
    memory: Memory,
    start: usize,
    end: usize,
}

impl Buffer {
    /// `len` zeroed bytes, aligned; an error where there is no memory.
    pub fn new(len: usize) -> Result<Self> {
        Self::with_room(0, len)
    }

    /// The same, with `room` bytes before them, at most a page: they are not part of it yet.
    fn with_room(room: usize, len: usize) -> Result<Self> {
        let start = if room > 0 { ALIGN } else { 0 };
        let end = start + len;
        let memory = if end < LARGE {
            Memory::Small(vec![Page([0; ALIGN]); end.div_ceil(ALIGN)])
        } else {
            let none = |_| Error::invalid("no memory for the request");
            Memory::Large(Pages::new(end).map_err(none)?)
        };
        Ok(Self { memory, start, end })
    }

    /// Put a header before what there is, into the room for it.
    fn prepend(&mut self, header: &[u8]) {
        self.start -= header.len();
        self[..header.len()].copy_from_slice(header);
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        let mut memory = vec![Page([0; ALIGN]); bytes.len().div_ceil(ALIGN)];
        for (page, bytes) in memory.iter_mut().zip(bytes.chunks(ALIGN)) {
            page.0[..bytes.len()].copy_from_slice(bytes);
        }
        Self { memory: Memory::Small(memory), start: 0, end: bytes.len() }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.memory {
            Memory::Small(pages) => {
                // SAFETY: pages are bytes without gaps, and as many as there are.
                let all = unsafe {
                    std::slice::from_raw_parts(pages.as_ptr().cast::<u8>(), pages.len() * ALIGN)
                };
                &all[self.start..self.end]
            }
            Memory::Large(pages) => &pages[self.start..self.end],
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Small(pages) => {
                let len = pages.len() * ALIGN;
                // SAFETY: as above.
                let all =
                    unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast::<u8>(), len) };
                &mut all[self.start..self.end]
            }
            Memory::Large(pages) => &mut pages[self.start..self.end],
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
                out.into()
            }
        };
        self.complete(Reply { buffer, budget });
    }

    fn work(&self, job: Job) -> std::result::Result<Buffer, (Request, Error)> {
        let r = job.request;
        // Nobody was told that it is done, and nobody will be: the client may have sent it again by
        // another connection, and this one must not come after what that client did since. (One that
        // said goodbye sends nothing again.)
        if self.is_given_up() {
            return Err((r, Error::invalid("the client is gone")));
        }
        if r.kind == cmd::READ {
            return self.read_in_pool(&r).map_err(|e| (r, e));
        }
        if r.kind == cmd::BLOCK_STATUS {
            return self.status(&r, None).map(Buffer::from).map_err(|e| (r, e));
        }
        self.change(&r, job.payload.as_deref()).map_err(|e| (r, e))?;
        let mut out = Vec::with_capacity(32);
        reply::ok(&mut out, self.mode, &r);
        Ok(out.into())
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
            if self.is_given_up() {
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
        let len = usize::try_from(r.length).map_err(|_| Error::invalid("too long"))?;
        let mut buffer = Buffer::with_room(reply::MAX_HEADER, len)?;
        self.export.with(|i| i.read_at(&mut buffer, r.offset))?;
        if let Some((hole, n)) = reply::hole_instead(self.mode, r, &buffer) {
            return Ok(hole[..n].to_vec().into());
        }
        let (head, n) = reply::read_header(self.mode, chunk::DONE, r, r.offset, r.length);
        buffer.prepend(&head[..n]);
        Ok(buffer)
    }
}
