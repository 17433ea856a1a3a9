//! Reads: small ones are gathered with other replies, the data of large ones go from a host file to
//! the socket inside the kernel, and holes are told instead of sent.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::conn::{Cut, JOB, OUTPUT, Own};
use super::reply;
use super::send::Short;
use crate::block::{Device, Error, Extent, OneIov, Result};
use crate::nbd::proto::{Mode, Request, chunk, cmd_flag};

/// From this many bytes on, data are sent from the file.
const LARGE: u64 = 64 << 10;
/// Data that are copied at a time, bytes.
const PIECE: usize = OUTPUT;
/// Extents that are looked up at a time.
const EXTENTS: usize = 32;

impl Own {
    pub(super) fn read(&mut self, r: &Request) -> std::result::Result<(), Cut> {
        if r.length >= LARGE {
            return self.read_large(r);
        }
        let len = r.length as usize;
        self.room(reply::MAX_HEADER + len)?;
        let mode = self.conn.mode;
        let (head, n) = reply::read_header(mode, chunk::DONE, r, r.offset, r.length);
        let data = &mut self.out[self.len + n..self.len + n + len];
        match self.conn.export.with(|i| i.read_now(OneIov::dst(data).iov(), r.offset)) {
            Ok(true) => {
                if let Some((hole, n)) = reply::hole_instead(mode, r, data) {
                    return self.put(&hole[..n]);
                }
                self.out[self.len..self.len + n].copy_from_slice(&head[..n]);
                self.len += n + len;
                Ok(())
            }
            Ok(false) => self.submit(*r, None, len),
            Err(e) => self.fail(r, &e),
        }
    }

    fn read_large(&mut self, r: &Request) -> std::result::Result<(), Cut> {
        // One chunk only: holes inside it can not be told.
        let single = self.conn.mode == Mode::Simple || r.flags & cmd_flag::DF != 0;
        let (mut offset, end) = (r.offset, r.offset + r.length);
        let mut begun = false;
        while offset < end {
            let mut extents = [Extent::default(); EXTENTS];
            let found = self.conn.export.with(|i| {
                let n = i.extents_owned(offset, end - offset, &mut extents)?;
                Ok((n, i.host_file(extents[0].depth)?))
            });
            let (n, file) = match found {
                Ok(found) => found,
                // Its length is promised.
                Err(e) if single && begun => return Err(Cut::Failed(e.to_string())),
                // The whole of a reply, or the last chunk of one whose first ones are out.
                Err(e) => return self.fail(r, &e),
            };
            if single && !begun {
                // Zeroes as a whole are one hole.
                if self.conn.mode != Mode::Simple && n == 1 && is_hole(&extents[0], r) {
                    return self.tell_hole(r, chunk::DONE, r.offset, r.length);
                }
                let (head, n) =
                    reply::read_header(self.conn.mode, chunk::DONE, r, r.offset, r.length);
                if !self.is_near(&extents[..1], file.as_ref()) && r.length <= JOB {
                    return self.submit(*r, None, r.length as usize);
                }
                self.put(&head[..n])?;
                begun = true;
            }
            for e in extents.iter().take(n) {
                let len = e.length.min(end - offset);
                let last = if offset + len == end { chunk::DONE } else { 0 };
                if e.has(Extent::ZERO) && !single {
                    self.tell_hole(r, last, offset, len)?;
                } else {
                    let file = match file.as_ref() {
                        Some(f) if e.depth == extents[0].depth && is_plain(e) => Some(f),
                        _ => None,
                    };
                    if !begun && r.length <= JOB && !self.is_near(std::slice::from_ref(e), file) {
                        return self.submit(*r, None, r.length as usize);
                    }
                    let more = single && offset + len < end;
                    let sent = match self.host(file, e, (offset, len)) {
                        Some((fd, host)) => {
                            self.whole(r, fd, host, (offset, len), (single, more, last))?
                        }
                        None if single => self.data(offset, len)?,
                        None => self.chunks(r, offset, len, last)?,
                    };
                    match sent {
                        Ok(()) => {}
                        // Its length is promised.
                        Err(e) if single => return Err(Cut::Failed(e.to_string())),
                        Err(e) => return self.fail(r, &e),
                    }
                }
                begun = true;
                offset += len;
            }
        }
        Ok(())
    }

    fn tell_hole(
        &mut self,
        r: &Request,
        flags: u16,
        offset: u64,
        len: u64,
    ) -> std::result::Result<(), Cut> {
        // A request's length was checked: it fits.
        let (hole, n) = reply::hole(self.conn.mode, flags, r, offset, len as u32);
        self.put(&hole[..n])
    }

    /// Whether data are in memory, as far as a glance shows: the first and the last byte of each extent.
    fn is_near(&self, extents: &[Extent], file: Option<&Arc<Device>>) -> bool {
        extents.iter().all(|e| {
            e.has(Extent::ZERO)
                || match file {
                    Some(file) if is_plain(e) => {
                        let glance = |at: u64| {
                            let mut byte = [0];
                            file.read_now(OneIov::dst(&mut byte).iov(), at).unwrap_or(false)
                        };
                        glance(e.host_offset) && glance(e.host_offset + e.length - 1)
                    }
                    _ => {
                        let mut byte = [0];
                        let read =
                            |i: &crate::Image| i.read_now(OneIov::dst(&mut byte).iov(), e.offset);
                        self.conn.export.with(read).unwrap_or(false)
                    }
                }
        })
    }

    /// The host file that the kernel can send `len` bytes from, and where they are in it.
    fn host<'a>(
        &self,
        file: Option<&'a Arc<Device>>,
        e: &Extent,
        (offset, len): (u64, u64),
    ) -> Option<(BorrowedFd<'a>, u64)> {
        let fd = file.and_then(|f| f.driver().file())?;
        let kernel = len >= LARGE / 2 && self.conn.tls.is_none();
        kernel.then(|| (fd, e.host_offset + (offset - e.offset)))
    }

    /// Send data from a host file: `len` bytes that are at `host` there. As a chunk with the flags `last`, or in
    /// a reply that goes on with `more`. The outer error is the connection's, here as below.
    ///
    /// That all is well is known when it is out. Where nobody has looked whether the data are near, they are
    /// not the last chunk, so that an error can follow; where they are, that would be one more for nothing.
    fn whole(
        &mut self,
        r: &Request,
        fd: BorrowedFd<'_>,
        host: u64,
        (offset, len): (u64, u64),
        (single, more, last): (bool, bool, u16),
    ) -> std::result::Result<Result<()>, Cut> {
        let mode = self.conn.mode;
        let promised = single || (last != 0 && r.length <= JOB);
        if !single {
            let flags = if promised { last } else { 0 };
            let (head, n) = reply::read_header(mode, flags, r, offset, len);
            self.put(&head[..n])?;
        }
        let n = std::mem::take(&mut self.len);
        if let Some(Short { mut left, errno }) =
            self.conn.send_file(&self.out[..n], more, fd, host, len)?
        {
            let e = Error::Os { op: "read", file: "an export's file".into(), errno };
            if promised {
                return Err(Cut::Failed(e.to_string()));
            }
            // The chunk is made whole with zeroes, which the error behind it takes back.
            while left > 0 {
                let zeroes = [0; 4096];
                let n = left.min(4096);
                left -= n;
                self.conn.send(&zeroes[..n as usize], left > 0)?;
            }
            return Ok(Err(e));
        }
        if !promised && last != 0 {
            let (bytes, n) = reply::end(mode, r);
            self.put(&bytes[..n])?;
        }
        Ok(Ok(()))
    }

    /// Send data of a reply whose header is out: `len` bytes at `offset`.
    fn data(&mut self, mut offset: u64, mut len: u64) -> std::result::Result<Result<()>, Cut> {
        while len > 0 {
            let n = len.min(PIECE as u64) as usize;
            // What is there goes first, so that pieces stay large.
            if self.len + n > OUTPUT {
                self.flush_more()?;
            }
            self.high = self.high.max(self.len + n);
            let to = &mut self.out[self.len..self.len + n];
            if let Err(e) = self.conn.export.with(|i| i.read_at(to, offset)) {
                return Ok(Err(e));
            }
            self.len += n;
            offset += n as u64;
            len -= n as u64;
        }
        Ok(Ok(()))
    }

    /// Send data as chunks, each of which is read before it is begun; the last of them has the flags `last`.
    fn chunks(
        &mut self,
        r: &Request,
        mut offset: u64,
        mut len: u64,
        last: u16,
    ) -> std::result::Result<Result<()>, Cut> {
        while len > 0 {
            let n = len.min((PIECE - reply::MAX_HEADER) as u64);
            self.room(reply::MAX_HEADER + n as usize)?;
            let flags = if n == len { last } else { 0 };
            let (head, h) = reply::read_header(self.conn.mode, flags, r, offset, n);
            let to = &mut self.out[self.len + h..self.len + h + n as usize];
            if let Err(e) = self.conn.export.with(|i| i.read_at(to, offset)) {
                return Ok(Err(e));
            }
            self.out[self.len..self.len + h].copy_from_slice(&head[..h]);
            self.len += h + n as usize;
            offset += n;
            len -= n;
        }
        Ok(Ok(()))
    }

    /// Send what was gathered while a reply is not whole yet: none of another may come between.
    fn flush_more(&mut self) -> std::result::Result<(), Cut> {
        let n = std::mem::take(&mut self.len);
        self.conn.send(&self.out[..n], true)
    }
}

fn is_hole(e: &Extent, r: &Request) -> bool {
    e.has(Extent::ZERO) && e.length >= r.length
}

/// Whether the bytes lie in a host file as they are.
fn is_plain(e: &Extent) -> bool {
    e.has(Extent::HOST) && e.has(Extent::DATA) && !e.has(Extent::COMPRESSED)
}
