//! Replies: every byte of them checked before it changes anything.
//!
//! Specification: doc/proto.md, "Simple reply message", "Structured reply chunk message", "Extended
//! reply chunk message" and the chunk types. Whatever contradicts it is an error, and the connection
//! is given up: what a peer says afterwards could mean anything.

use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};

use super::cover::Refused;
use super::lane::SLOTS;
use super::rx::{Link, Pending, Rx, broken};
use super::slot::{Described, Failure, Memory, REPLIED, SENT, Slot, Work};
use crate::block::{Error, Result};
use crate::nbd::proto::{self, BadMagic, Mode, Reply, be16, be32, be64, chunk, cmd};

/// Largest payload of an error chunk, bytes: a message and what an unknown kind may add.
const MAX_ERROR: u64 = 64 << 10;
/// Errors in the reply to one request.
const MAX_FAILURES: u32 = 64;
/// Descriptors in the reply to one request, and how many of them are kept: whoever asked looks at
/// the rest by asking again.
const MAX_DESCRIPTORS: u64 = 1 << 22;
const KEPT_DESCRIPTORS: usize = 1 << 16;

/// What was received.
#[derive(Clone, Copy, Default)]
pub(super) struct Came {
    /// Replies that are complete now.
    pub replies: u32,
    /// The slots that are over by them.
    pub over: u64,
}

/// Deal with all that was received, as far as it goes. Adds to `came`.
pub(super) fn drain(rx: &mut Rx, link: &Link, slots: &[Slot], came: &mut Came) -> Result<()> {
    let mut d = Drain { link, slots, came };
    loop {
        match rx.pending {
            Pending::None => {
                if !d.head(rx)? {
                    return Ok(());
                }
            }
            Pending::Data { .. } => {
                rx.copy_pending(slots);
                let Pending::Data { slot, left, done, .. } = rx.pending else { return Ok(()) };
                if left > 0 {
                    return Ok(());
                }
                rx.pending = Pending::None;
                if done {
                    d.finish(slot)?;
                }
            }
            Pending::Status { .. } => {
                if !d.descriptors(rx)? {
                    return Ok(());
                }
            }
        }
    }
}

struct Drain<'a> {
    link: &'a Link,
    slots: &'a [Slot],
    came: &'a mut Came,
}

impl<'a> Drain<'a> {
    fn bad<T>(&self, what: impl Into<String>) -> Result<T> {
        Err(Error::proto(&self.link.peer, what))
    }

    /// The request that a reply is for.
    #[inline]
    fn find(&self, cookie: u64) -> Result<(usize, &'a mut Work)> {
        let index = (cookie & u64::from(u32::MAX)) as usize;
        match self.slots.get(index) {
            Some(slot) if cookie != 0 && slot.cookie.load(Acquire) == cookie => {
                // SAFETY: the cookie says that the request is queued and its reply not complete, so
                // that its `work` is the receiver's, which we are; it is borrowed once at a time.
                Ok((index, unsafe { &mut *slot.work.get() }))
            }
            _ => self.bad(format!("a reply to request {cookie:#x}, which is not under way")),
        }
    }

    /// Deal with a header, if it is there whole with what must be known of its payload.
    #[inline]
    fn head(&mut self, rx: &mut Rx) -> Result<bool> {
        let bytes = rx.bytes();
        let mode = self.link.export.mode;
        match Reply::decode(bytes, mode) {
            Ok(None) => Ok(false),
            Ok(Some((Reply::Simple { error, cookie }, len))) => {
                rx.consume(len);
                self.simple(rx, error, cookie)
            }
            Ok(Some((Reply::Chunk { flags, kind, cookie, offset, length }, len))) => {
                let (slot, work) = self.find(cookie)?;
                if mode == Mode::Extended && offset != work.offset {
                    let at = work.offset;
                    return self.bad(format!("a reply for offset {offset}, asked was {at}"));
                }
                if flags & !chunk::DONE != 0 {
                    return self.bad(format!("a chunk with flags {flags:#x}"));
                }
                let done = flags & chunk::DONE != 0;
                let payload = bytes.get(len..).unwrap_or_default();
                let c = Chunk { kind, slot, length, done };
                match self.chunk(&c, work, payload)? {
                    Next::More => Ok(false),
                    Next::Begin(used, pending) => {
                        rx.consume(len + used);
                        rx.pending = pending;
                        Ok(true)
                    }
                    Next::Finished(used) => {
                        rx.consume(len + used);
                        if done {
                            self.finish(slot)?;
                        }
                        Ok(true)
                    }
                }
            }
            Err(BadMagic(magic)) => self.bad(format!(
                "a reply begins with {magic:#010x} ({mode:?} replies were agreed on)"
            )),
        }
    }

    #[inline]
    fn simple(&mut self, rx: &mut Rx, error: u32, cookie: u64) -> Result<bool> {
        let (slot, work) = self.find(cookie)?;
        if work.kind == cmd::READ && self.link.export.mode != Mode::Simple {
            return self.bad("a simple reply to a read, though structured ones were agreed on");
        }
        if error != 0 {
            work.failure = Some(Failure { errno: proto::error_from_wire(error), text: Vec::new() });
            return self.finish(slot).map(|()| true);
        }
        match work.kind {
            cmd::READ => {
                let left = work.length;
                self.cover(work, 0, left)?;
                rx.pending = Pending::Data { slot, at: 0, left, done: true };
                Ok(true)
            }
            cmd::BLOCK_STATUS => self.bad("a simple reply to a block status, without an error"),
            _ => self.finish(slot).map(|()| true),
        }
    }

    fn chunk(&mut self, c: &Chunk, work: &mut Work, payload: &[u8]) -> Result<Next> {
        let Chunk { kind, slot, length, done } = *c;
        match kind {
            chunk::OFFSET_DATA if work.kind == cmd::READ => {
                if length <= 8 {
                    return self.bad(format!("a data chunk with {length} bytes of payload"));
                }
                let Some(offset) = payload.first_chunk::<8>() else { return Ok(Next::More) };
                let left = length - 8;
                let at = self.place(work, u64::from_be_bytes(*offset), left)?;
                Ok(Next::Begin(8, Pending::Data { slot, at, left, done }))
            }
            chunk::OFFSET_HOLE if work.kind == cmd::READ => {
                if length != 12 {
                    return self.bad(format!("a hole chunk with {length} bytes of payload"));
                }
                let Some(hole) = payload.first_chunk::<12>() else { return Ok(Next::More) };
                let len = u64::from(be32(&hole[8..]));
                if len == 0 {
                    return self.bad("a hole chunk that tells of 0 bytes");
                }
                let at = self.place(work, be64(hole), len)?;
                if let Memory::Into(dst) = work.memory {
                    dst.sub(at as usize, len as usize).zero_fill();
                }
                Ok(Next::Finished(12))
            }
            chunk::NONE => {
                if length != 0 || !done {
                    return self.bad(format!(
                        "an empty chunk with {length} bytes of payload that is {}the last",
                        if done { "" } else { "not " }
                    ));
                }
                Ok(Next::Finished(0))
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT if work.kind == cmd::BLOCK_STATUS => {
                self.status(c, work, payload)
            }
            kind if kind & chunk::ERROR_BIT != 0 => self.failure(c, work, payload),
            kind => self.bad(format!("a chunk of kind {kind} in reply to command {}", work.kind)),
        }
    }

    /// Where in the request a part of it lies that must not have come before.
    fn place(&self, work: &mut Work, offset: u64, length: u64) -> Result<u64> {
        match offset.checked_sub(work.offset) {
            Some(at) if at.checked_add(length).is_some_and(|end| end <= work.length) => {
                self.cover(work, at, length)?;
                Ok(at)
            }
            _ => self.bad(format!(
                "{length} bytes at offset {offset} in reply to a read of {} at {}",
                work.length, work.offset
            )),
        }
    }

    #[inline]
    fn cover(&self, work: &mut Work, at: u64, length: u64) -> Result<()> {
        let what = match work.cover.add(at, at + length) {
            Ok(()) => return Ok(()),
            Err(Refused::Overlap) => "twice",
            Err(Refused::Pieces) => "in too many pieces",
        };
        self.bad(format!("bytes of a read of {} at {} come {what}", work.length, work.offset))
    }

    fn failure(&self, c: &Chunk, work: &mut Work, payload: &[u8]) -> Result<Next> {
        let &Chunk { kind, length, .. } = c;
        if !(6..=MAX_ERROR).contains(&length) {
            return self.bad(format!("an error chunk with {length} bytes of payload"));
        }
        let Some(payload) = payload.get(..length as usize) else { return Ok(Next::More) };
        let error = be32(payload);
        let said = usize::from(be16(payload.get(4..).unwrap_or_default()));
        let Some(text) = payload.get(6..).and_then(|p| p.get(..said)) else {
            return self.bad(format!("an error's text of {said} bytes in a payload of {length}"));
        };
        let rest = payload.get(6 + said..).unwrap_or_default();
        let fits = match kind {
            chunk::ERROR => rest.is_empty(),
            chunk::ERROR_OFFSET => rest.len() == 8,
            _ => true,
        };
        if !fits || said > proto::MAX_STRING {
            return self.bad(format!("an error's text of {said} bytes in a payload of {length}"));
        }
        if kind == chunk::ERROR_OFFSET {
            let at = be64(rest);
            let end = work.offset.saturating_add(work.length);
            if !(work.offset..end).contains(&at) {
                return self.bad(format!("an error at offset {at}, outside of the request"));
            }
        }
        if error == 0 {
            return self.bad("an error chunk without an error");
        }
        work.failures += 1;
        if work.failures > MAX_FAILURES {
            return self.bad(format!("more than {MAX_FAILURES} errors in one reply"));
        }
        if work.failure.is_none() {
            work.failure =
                Some(Failure { errno: proto::error_from_wire(error), text: text.to_vec() });
        }
        Ok(Next::Finished(length as usize))
    }

    fn status(&self, c: &Chunk, work: &mut Work, payload: &[u8]) -> Result<Next> {
        let &Chunk { kind, slot, length, done } = c;
        let extended = self.link.export.mode == Mode::Extended;
        let wide = kind == chunk::BLOCK_STATUS_EXT;
        if wide != extended {
            return self.bad(format!(
                "a block status of kind {kind}, {} extended headers",
                if extended { "with" } else { "without" }
            ));
        }
        let (head, each) = if wide { (8, 16) } else { (4, 8) };
        if length < head + each || (length - head) % each != 0 {
            return self.bad(format!("a block status with {length} bytes of payload"));
        }
        let Some(first) = payload.get(..head as usize) else { return Ok(Next::More) };
        let count = (length - head) / each;
        if wide && u64::from(be32(first.get(4..).unwrap_or_default())) != count {
            return self.bad(format!("a block status of {count} descriptors tells another number"));
        }
        let id = be32(first);
        let Some(context) = self.link.export.contexts.iter().position(|c| c.id == id) else {
            return self.bad(format!("a block status of context {id}, which was not agreed on"));
        };
        match work.contexts.get_mut(context) {
            Some((_, seen @ false, _)) => *seen = true,
            _ => return self.bad(format!("two block statuses of context {id}")),
        }
        work.descriptors = work.descriptors.saturating_add(count);
        if work.descriptors > MAX_DESCRIPTORS {
            return self.bad(format!("more than {MAX_DESCRIPTORS} descriptors in a block status"));
        }
        let pending = Pending::Status { slot, context, left: length - head, wide, done };
        Ok(Next::Begin(head as usize, pending))
    }

    /// Take in descriptors; whether the chunk's last one has come.
    fn descriptors(&mut self, rx: &mut Rx) -> Result<bool> {
        let Pending::Status { slot, context, mut left, wide, done } = rx.pending else {
            return Ok(true);
        };
        let each = if wide { 16 } else { 8 };
        let Some(s) = self.slots.get(slot) else { return Ok(true) };
        // SAFETY: a payload is pending only for a slot whose reply is not complete: its `work` is
        // the receiver's, which we are.
        let work = unsafe { &mut *s.work.get() };
        let bytes = rx.bytes();
        let have = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut used = 0;
        for d in bytes.get(..have).unwrap_or_default().chunks_exact(each) {
            let (length, flags) = match wide {
                true => (be64(d), be64(&d[8..])),
                false => (be32(d).into(), be32(&d[4..]).into()),
            };
            self.describe(work, context, length, flags)?;
            used += each;
        }
        rx.consume(used);
        left -= used as u64;
        if left > 0 {
            rx.pending = Pending::Status { slot, context, left, wide, done };
            return Ok(false);
        }
        rx.pending = Pending::None;
        if done {
            self.finish(slot)?;
        }
        Ok(true)
    }

    fn describe(&self, work: &mut Work, context: usize, length: u64, flags: u64) -> Result<()> {
        let minimum = u64::from(self.link.export.minimum.max(1));
        let Some((so_far, _, kept)) = work.contexts.get_mut(context) else { return Ok(()) };
        if length == 0 || !length.is_multiple_of(minimum) {
            return self.bad(format!("a block status describes {length} bytes"));
        }
        // Only the last descriptor may reach beyond what was asked.
        let Some(left) = work.length.checked_sub(*so_far).filter(|n| *n > 0) else {
            let asked = work.length;
            return self.bad(format!("a block status describes more than the {asked} bytes asked"));
        };
        *so_far = so_far.saturating_add(length);
        *kept += 1;
        if *kept <= KEPT_DESCRIPTORS {
            let (context, length) = (context as u32, length.min(left));
            work.described.push(Described { context, length, flags });
        }
        Ok(())
    }

    /// The reply to a request has come whole.
    #[inline]
    fn finish(&mut self, index: usize) -> Result<()> {
        let Some(slot) = self.slots.get(index) else { return Ok(()) };
        // SAFETY: the reply is not complete before the end of this function: `work` is ours.
        let work = unsafe { &mut *slot.work.get() };
        if work.failure.is_none() {
            if work.kind == cmd::READ
                && let Some(at) = work.cover.missing(work.length)
            {
                return broken(
                    &self.link.peer,
                    format!(
                        "the reply to a read of {} at {} ends without byte {at}",
                        work.length, work.offset
                    ),
                );
            }
            if work.kind == cmd::BLOCK_STATUS && work.contexts.iter().any(|c| !c.1) {
                return self.bad("a block status leaves out a context that was agreed on");
            }
        }
        slot.cookie.store(0, Relaxed);
        self.came.replies += 1;
        if slot.state.fetch_or(REPLIED, SeqCst) & SENT != 0 {
            self.came.over |= 1 << (index % SLOTS);
        }
        Ok(())
    }
}

struct Chunk {
    kind: u16,
    slot: usize,
    length: u64,
    done: bool,
}

/// What follows the beginning of a chunk.
enum Next {
    /// Too little of it has come.
    More,
    /// So many bytes of its payload were used; the rest is this.
    Begin(usize, Pending),
    /// So many bytes of payload were all.
    Finished(usize),
}
