//! The export as a driver: requests cut to what the wire takes, answers turned into results.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use super::durable::Lost;
use super::handshake::{ALLOCATION, DEPTH};
use super::pool::{CLOSE, Patience, Pool};
use super::slot::{Described, Failure, Memory, Request};
use super::source::Source;
use super::sys::Deadline;
use crate::block::*;
use crate::nbd::proto::{Mode, alloc, cmd, cmd_flag, flag};

/// Longest request without extended headers that carries no data, bytes: a multiple of every
/// minimum block size.
const LONGEST: u64 = (u32::MAX as u64) & !0xffff;
/// Bytes that one block status asks for, to begin with and at least.
const FIRST_ASKED: u64 = 1 << 30;
const LEAST_ASKED: u64 = 1 << 20;
/// A reply of fewer descriptors than this is no burden.
const FEW: usize = 1024;

/// An open export.
pub(super) struct Nbd {
    pool: Arc<Pool>,
    /// The process that opened it.
    pid: u32,
    /// How many bytes to ask for in a block status: so many that the answer is not thrown away.
    asked: AtomicU64,
}

impl Nbd {
    pub(super) fn open(source: Source) -> Result<Self> {
        let pool = Pool::open(source)?;
        if pool.source.settings.write && pool.export.has(flag::READ_ONLY) {
            return Err(Error::net(pool.name(), "the export is read-only", libc::EROFS));
        }
        Ok(Self { pool, pid: std::process::id(), asked: AtomicU64::new(FIRST_ASKED) })
    }

    fn has(&self, bit: u16) -> bool {
        self.pool.export.has(bit)
    }

    #[cold]
    fn refused(&self, doing: &str, request: &Request<'_>, failure: &Failure) -> Error {
        let mut what = doing.to_owned();
        if request.length > 0 {
            what.push_str(&format!(" of {} bytes at offset {}", request.length, request.offset));
        }
        if failure.text.is_empty() {
            what.push_str(": the server answers with an error");
        } else {
            what.push_str(&format!(": the server says {}", quoted(&failure.text)));
        }
        Error::net(self.pool.name(), what, failure.errno)
    }

    /// Send a request that is answered with yes or an error; for one that changes something, note
    /// that it did.
    #[inline]
    fn ask(
        &self,
        doing: &'static str,
        request: &Request<'_>,
        deadline: Deadline,
        changes: bool,
    ) -> Result<()> {
        let failure = self.pool.run(request, deadline, Patience::Reconnect, |work, losses| {
            let failure = work.failure.take();
            // Also when it failed: part of it may have happened.
            if changes {
                self.pool.durable.wrote(losses);
            }
            failure
        })?;
        match failure {
            None => Ok(()),
            Some(failure) => Err(self.refused(doing, request, &failure)),
        }
    }

    /// Whether writes are refused.
    #[inline]
    fn writable(&self) -> Result<()> {
        if matches!(self.pool.durable.lost(), Lost::Told(_)) {
            return Err(Error::Failed { file: self.pool.name().clone(), errno: libc::EIO });
        }
        Ok(())
    }

    /// The failure of a flush after writes were lost.
    fn lost(&self, why: &str) -> Error {
        Error::net(self.pool.name(), why, libc::EIO)
    }

    fn flush_within(&self, deadline: Deadline, patience: Patience) -> Result<()> {
        let durable = &self.pool.durable;
        if let Lost::Told(why) = durable.tell() {
            return Err(self.lost(&why));
        }
        // If it has to be sent again it covers more than this says.
        let number = durable.flush_begins();
        let request =
            Request { kind: cmd::FLUSH, flags: 0, offset: 0, length: 0, memory: Memory::None };
        let failure = self.pool.run(&request, deadline, patience, |work, _| work.failure.take())?;
        if let Some(failure) = failure {
            let e = self.refused("flush", &request, &failure);
            durable.fail(&super::pool::reason(&e));
            return Err(e);
        }
        // It may have been sent again to a server that never saw the writes.
        if let Lost::Told(why) = durable.tell() {
            return Err(self.lost(&why));
        }
        durable.flush_succeeded(number);
        Ok(())
    }

    /// A request on a range, without data, cut to what the wire takes.
    fn on_range(
        &self,
        doing: &'static str,
        (kind, flags): (u16, u16),
        mut offset: u64,
        mut count: u64,
        changes: bool,
    ) -> Result<()> {
        let deadline = self.pool.deadline();
        let most = match kind {
            // It is "read, and keep": there are servers that do so in memory, and refuse what they would not
            // send.
            cmd::CACHE => self.longest().min(self.pool.export.maximum.into()),
            _ => self.longest(),
        };
        while count > 0 {
            let length = count.min(most);
            let request = Request { kind, flags, offset, length, memory: Memory::None };
            self.ask(doing, &request, deadline, changes)?;
            (offset, count) = (offset + length, count - length);
        }
        Ok(())
    }

    fn longest(&self) -> u64 {
        if self.pool.export.mode == Mode::Extended { i64::MAX as u64 & !0xffff } else { LONGEST }
    }

    /// Part of a range that lies on the device: its end may not.
    fn inside(&self, offset: u64, count: u64) -> u64 {
        count.min(self.pool.export.size.saturating_sub(offset))
    }

    /// Ask for the block status of a range on the device: descriptors of all contexts, from `offset`
    /// on, for at most `count` bytes.
    fn block_status(&self, offset: u64, count: u64, deadline: Deadline) -> Result<Vec<Described>> {
        let minimum = u64::from(self.pool.export.minimum.max(1));
        let before = offset % minimum;
        let offset = offset - before;
        // The size is a multiple of the minimum.
        let length = (before + count).min(self.longest()).next_multiple_of(minimum);
        let request =
            Request { kind: cmd::BLOCK_STATUS, flags: 0, offset, length, memory: Memory::None };
        let answer = self.pool.run(&request, deadline, Patience::Reconnect, |work, _| {
            (work.failure.take(), std::mem::take(&mut work.described))
        })?;
        match answer {
            (None, mut described) => {
                cut_front(&mut described, before);
                Ok(described)
            }
            (Some(failure), _) => Err(self.refused("block status", &request, &failure)),
        }
    }
}

/// Take the first bytes off each context's descriptors.
fn cut_front(described: &mut [Described], before: u64) {
    if before == 0 {
        return;
    }
    // Bytes that each context has still to lose; there are few of them.
    let contexts = described.iter().map(|d| d.context as usize + 1).max().unwrap_or(0);
    let mut left = vec![before; contexts];
    for d in described {
        if let Some(left) = left.get_mut(d.context as usize) {
            let cut = d.length.min(*left);
            (d.length, *left) = (d.length - cut, *left - cut);
        }
    }
}

/// Descriptors of one context, as runs to be taken off the front.
struct Runs<'a> {
    rest: std::slice::Iter<'a, Described>,
    context: usize,
    now: Option<(u64, u64)>,
}

impl<'a> Runs<'a> {
    fn new(described: &'a [Described], context: usize) -> Self {
        let mut runs = Self { rest: described.iter(), context, now: None };
        runs.take(0);
        runs
    }

    /// The present run: bytes and flags.
    fn first(&self) -> Option<(u64, u64)> {
        self.now
    }

    /// Take bytes off the present run.
    fn take(&mut self, n: u64) {
        if let Some((length, _)) = &mut self.now {
            *length = length.saturating_sub(n);
        }
        while self.now.is_none_or(|(length, _)| length == 0) {
            let Some(d) = self.rest.find(|d| d.context as usize == self.context) else {
                self.now = None;
                return;
            };
            self.now = Some((d.length, d.flags));
        }
    }
}

/// What `base:allocation` and, where there is one, the depth say of a run.
fn extent(offset: u64, length: u64, flags: u64, depth: Option<u64>) -> Extent {
    let zero = flags & u64::from(alloc::ZERO) != 0;
    let kind = if zero { Extent::ZERO } else { Extent::DATA };
    let mut e = Extent::new(offset, length, kind | Extent::ALLOCATED | Extent::OWNED);
    match depth {
        None | Some(1) => {}
        Some(0) => e.flags &= !(Extent::ALLOCATED | Extent::OWNED),
        Some(depth) => {
            e.flags &= !Extent::ALLOCATED;
            e.depth = depth.saturating_sub(1).try_into().unwrap_or(u32::MAX);
        }
    }
    e
}

impl Driver for Nbd {
    fn name(&self) -> &Name {
        self.pool.name()
    }

    fn kind(&self) -> &'static str {
        "nbd"
    }

    fn caps(&self) -> Caps {
        let e = &self.pool.export;
        Caps {
            cached: false,
            align: e.minimum,
            mem_align: 1,
            max_transfer: e.maximum.into(),
            optimal_io: e.preferred,
            read_only: e.has(flag::READ_ONLY) || !self.pool.source.settings.write,
            flush: e.has(flag::SEND_FLUSH),
            fua: e.has(flag::SEND_FUA),
            trim: e.has(flag::SEND_TRIM),
            zero: e.has(flag::SEND_WRITE_ZEROES),
            fast_zero: e.has(flag::SEND_FAST_ZERO),
            cache: e.has(flag::SEND_CACHE),
            extents: e.context(ALLOCATION).is_some(),
            sparse: false,
            rotational: e.has(flag::ROTATIONAL),
            ..Caps::default()
        }
    }

    fn size(&self) -> u64 {
        self.pool.export.size
    }

    #[inline]
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let there = self.inside(offset, buf.len() as u64);
        let (buf, beyond) = buf.split_at(there as usize);
        beyond.zero_fill();
        if there == 0 {
            return Ok(());
        }
        let memory = Memory::Into(buf);
        let request = Request { kind: cmd::READ, flags: 0, offset, length: there, memory };
        self.ask("read", &request, self.pool.deadline(), false)
    }

    #[inline]
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.writable()?;
        let length = buf.len() as u64;
        if self.inside(offset, length) < length {
            let size = self.size();
            let what = format!("write of {length} bytes at offset {offset} of an export of {size}");
            return Err(Error::net(self.pool.name(), what, libc::ENOSPC));
        }
        let fua = flags.has(ReqFlags::FUA) && self.has(flag::SEND_FUA);
        let memory = Memory::From(buf);
        let flags = if fua { cmd_flag::FUA } else { 0 };
        let request = Request { kind: cmd::WRITE, flags, offset, length, memory };
        // One with FUA that was acknowledged is where no power cut reaches it.
        self.ask("write", &request, self.pool.deadline(), !fua)
    }

    fn flush(&self) -> Result<()> {
        if !self.has(flag::SEND_FLUSH) {
            return Ok(());
        }
        self.flush_within(self.pool.deadline(), Patience::Reconnect)
    }

    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        const CANNOT: Error = Error::NotSupported("zeroing by the server");
        if !self.has(flag::SEND_WRITE_ZEROES) {
            return Err(CANNOT);
        }
        self.writable()?;
        let mut wire = if flags.has(ReqFlags::MAY_TRIM) { 0 } else { cmd_flag::NO_HOLE };
        if flags.has(ReqFlags::FAST_ZERO) {
            if !self.has(flag::SEND_FAST_ZERO) {
                return Err(CANNOT);
            }
            wire |= cmd_flag::FAST_ZERO;
        }
        match self.on_range("zeroing", (cmd::WRITE_ZEROES, wire), offset, count, true) {
            Err(Error::Net { errno: libc::ENOTSUP, .. }) => Err(CANNOT),
            result => result,
        }
    }

    fn trim(&self, offset: u64, count: u64, _flags: ReqFlags) -> Result<()> {
        self.writable()?;
        self.on_range("trim", (cmd::TRIM, 0), offset, self.inside(offset, count), true)
    }

    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        let minimum = u64::from(self.pool.export.minimum.max(1));
        let before = offset % minimum;
        let count = before + self.inside(offset, count);
        let count = count.next_multiple_of(minimum);
        self.on_range("caching", (cmd::CACHE, 0), offset - before, count, false)
    }

    fn extents(&self, mut offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        let end = offset.saturating_add(count);
        let Some(allocation) = self.pool.export.context(ALLOCATION) else {
            out.push(Extent::data(offset, count));
            return Ok(());
        };
        let depth = self.pool.export.context(DEPTH);
        let deadline = self.pool.deadline();
        while offset < end && !out.is_full() {
            let there = self.inside(offset, end - offset);
            if there == 0 {
                out.push(Extent::hole(offset, end - offset));
                break;
            }
            let asked = self.asked.load(Relaxed);
            let described = self.block_status(offset, there.min(asked), deadline)?;
            let mut runs = Runs::new(&described, allocation);
            let mut depths = depth.map(|context| Runs::new(&described, context));
            let start = offset;
            while let Some((length, flags)) = runs.first() {
                if out.is_full() || offset >= end {
                    break;
                }
                let depth = match &depths {
                    None => None,
                    Some(depths) => match depths.first() {
                        // Fewer of its descriptors were kept: ask again from here.
                        None => break,
                        found => found,
                    },
                };
                let length = length.min(depth.map_or(u64::MAX, |d| d.0)).min(end - offset);
                out.push(extent(offset, length, flags, depth.map(|d| d.1)));
                offset += length;
                runs.take(length);
                if let Some(depths) = &mut depths {
                    depths.take(length);
                }
            }
            if offset == start {
                return Err(Error::proto(self.name(), "a block status describes nothing"));
            }
            // What was told in vain should not be asked for next time.
            let next = if out.is_full() && described.len() > FEW {
                (offset - start).saturating_mul(2).max(LEAST_ASKED)
            } else if described.len() < FEW {
                asked.saturating_mul(2).min(self.longest())
            } else {
                asked
            };
            self.asked.store(next, Relaxed);
        }
        Ok(())
    }

    fn status(
        &self,
        context: &[u8],
        offset: u64,
        count: u64,
        most: usize,
        out: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        let Some(context) = self.pool.export.context(context) else {
            let name = quoted(context);
            let what = format!("the server has no meta context {name} for this export");
            return Err(Error::net(self.name(), what, libc::ENOTSUP));
        };
        let deadline = self.pool.deadline();
        let (mut offset, mut left) = (offset, self.inside(offset, count));
        // Who wants more asks again.
        while left > 0 && out.len() < most {
            let described = self.block_status(offset, left.min(FIRST_ASKED), deadline)?;
            let mut runs = Runs::new(&described, context);
            let before = left;
            while let Some((length, flags)) = runs.first().filter(|_| left > 0) {
                let n = length.min(left);
                match out.last_mut() {
                    Some(last) if last.1 == flags => last.0 += n,
                    _ => out.push((n, flags)),
                }
                (offset, left) = (offset + n, left - n);
                runs.take(length);
            }
            if left == before {
                return Err(Error::proto(self.name(), "a block status describes nothing"));
            }
        }
        Ok(())
    }

    fn flush_to_close(&self) -> Result<()> {
        self.close()
    }

    fn close(&self) -> Result<()> {
        let limit = self.pool.source.settings.timeout.map_or(CLOSE, |t| t.min(CLOSE));
        let durable = &self.pool.durable;
        let flushes = self.has(flag::SEND_FLUSH)
            && match durable.lost() {
                // A flush has told already.
                Lost::Told(_) => false,
                Lost::Untold(_) => true,
                Lost::No => durable.is_dirty(),
            };
        // The connections stay: who opens the source anew may fail and come back. The goodbye is said
        // when the driver is dropped.
        match flushes {
            true => self.flush_within(Deadline::after(Some(limit)), Patience::None).map_err(|e| {
                // The flush itself may have found out that all connections are lost.
                match durable.tell() {
                    Lost::Told(why) => self.lost(&why),
                    _ => e,
                }
            }),
            false => Ok(()),
        }
    }

    fn describe(&self) -> Description {
        let e = &self.pool.export;
        let protocol = match e.mode {
            Mode::Simple => "simple",
            Mode::Structured => "structured",
            Mode::Extended => "extended",
        };
        let on = |yes: bool| if yes { b"on".to_vec() } else { b"off".to_vec() };
        let contexts: Vec<&[u8]> = e.contexts.iter().map(|c| c.name.as_slice()).collect();
        let mut properties = vec![
            ("nbd.export", e.name.clone().unwrap_or_else(|| self.pool.source.export.clone())),
            ("nbd.protocol", protocol.into()),
            ("nbd.tls", on(e.tls)),
            ("nbd.connections", self.pool.live().to_string().into()),
            ("nbd.contexts", contexts.join(&b',')),
            ("nbd.multi-conn", on(e.has(flag::CAN_MULTI_CONN))),
            ("nbd.df", on(e.has(flag::SEND_DF))),
            ("nbd.fast-zero", on(e.has(flag::SEND_FAST_ZERO))),
            ("nbd.minimum-block", e.minimum.to_string().into()),
            ("nbd.preferred-block", e.preferred.to_string().into()),
            ("nbd.maximum-payload", e.maximum.to_string().into()),
        ];
        if let Some(text) = &e.description {
            properties.push(("nbd.description", text.clone()));
        }
        Description { properties, ..Description::default() }
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        if std::process::id() == self.pid {
            self.pool.close();
            return;
        }
        // In a forked child everything is the parent's, its threads do not exist here and its locks
        // may be held for ever: only the descriptors are ours to close.
        for lane in &self.pool.lanes {
            let fd = lane.take_fd();
            if fd >= 0 {
                // SAFETY: the number is that of a socket of ours, and nobody uses it here: the pool
                // that would close it again is never dropped.
                unsafe { libc::close(fd) };
            }
        }
        std::mem::forget(self.pool.clone());
    }
}
