//! One connection after negotiation: requests are taken from the socket, many at a time, and what
//! needs not wait is answered at once by this thread, many replies in one system call. What would wait
//! goes to the pool.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::export::Export;
use super::handshake::Agreed;
use super::input::Input;
use super::job::{Buffer, Job, Reply};
use super::memory::Pages;
use super::send::Sending;
use super::{Inner, Link, reply};
use crate::block::{Error, quoted};
use crate::log::{Level, log};
use crate::nbd::net::polling::{Awake, Polling, asleep};
use crate::nbd::net::{self, Waker};
use crate::nbd::proto::{Mode, Request, cmd, cmd_flag};
use crate::nbd::tls::Session;

/// Bytes of replies that are gathered before they are sent.
pub(super) const OUTPUT: usize = 256 << 10;
/// Most data of one request that the pool has, bytes. Larger requests are done in pieces by the
/// connection's own thread: what that costs is shared by all of the bytes.
pub(super) const JOB: u64 = 2 << 20;
/// A payload of a refused request that is read and forgotten rather than hung up on, bytes.
const SKIP: u64 = 256 << 20;

/// Requests that came together and are answered in two halves, so that a client that is awake by then has
/// the first to work on while the second is done.
const HALVES: usize = 16;

/// How long a client that is said goodbye to may take to hang up.
const LINGER: Duration = Duration::from_millis(500);

/// A meta context that was negotiated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:allocation-depth`.
    Depth,
    /// `qemu:dirty-bitmap:` and a name: the whole, and the id.
    Bitmap(Vec<u8>, u32),
}

impl Context {
    /// The number by which replies name it.
    pub fn id(&self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Depth => 2,
            Self::Bitmap(_, id) => *id,
        }
    }

    /// What it is asked for by.
    pub fn name(&self) -> &[u8] {
        match self {
            Self::Allocation => b"base:allocation",
            Self::Depth => b"qemu:allocation-depth",
            Self::Bitmap(name, _) => name,
        }
    }
}

/// Why a connection ends.
pub enum Cut {
    /// The client hung up, or we did.
    Closed,
    /// It was silent, or took nothing, for too long.
    Idle,
    /// It broke the protocol.
    Protocol(String),
    /// Something failed in the middle of a reply.
    Failed(String),
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the connection was closed"),
            Self::Idle => f.write_str("silent for longer than idle-timeout allows"),
            Self::Protocol(what) => write!(f, "broke the protocol: {what}"),
            Self::Failed(what) => f.write_str(what),
        }
    }
}

impl Cut {
    /// The meaning of a failure of sending.
    pub fn from_send(errno: i32) -> Self {
        match errno {
            libc::EAGAIN => Self::Idle,
            libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN | libc::ESHUTDOWN => Self::Closed,
            e => Self::Failed(format!("sending: {}", io::Error::from_raw_os_error(e))),
        }
    }
}

/// A connection in transmission, as its own thread and those of the pool see it.
pub struct Conn {
    pub(super) server: Arc<Inner>,
    link: Arc<Link>,
    pub(super) export: Arc<Export>,
    pub(super) fd: OwnedFd,
    pub(super) tls: Option<Arc<Session>>,
    pub(super) mode: Mode,
    pub(super) contexts: Vec<Context>,
    /// For messages.
    pub(super) peer: String,
    pub(super) sending: Mutex<Sending>,
    /// Replies that wait to be sent. Lock order: alone, or inside `sending`.
    pub(super) done: Mutex<VecDeque<Reply>>,
    /// Requests in the pool, and replies in `done`.
    pub(super) in_pool: AtomicUsize,
    /// Bytes that these count for.
    pub(super) bytes: AtomicUsize,
    /// The connection's thread waits for one of them.
    pub(super) waiting: AtomicBool,
    pub(super) waker: OnceLock<Waker>,
    /// Threads of the pool that work for it.
    pub(super) running: AtomicUsize,
    cut: AtomicBool,
    /// The client has said goodbye: what it asked for is done whether it waits for the replies or not.
    leaving: AtomicBool,
}

/// What the connection's own thread has.
pub(super) struct Own {
    pub(super) conn: Arc<Conn>,
    pub(super) input: Input,
    pub(super) out: Pages,
    /// Bytes in `out`.
    pub(super) len: usize,
    /// Most bytes that were there since the memory was given back.
    pub(super) high: usize,
    /// Writes are copies in memory.
    cached: bool,
    polling: Polling,
    /// When no more than so many bytes of input are left, the replies that were gathered are sent. 0: when
    /// none is.
    half: usize,
}

impl Conn {
    /// A connection that was just negotiated.
    pub fn new(
        server: Arc<Inner>,
        link: Arc<Link>,
        agreed: Agreed,
        (fd, tls): (OwnedFd, Option<Arc<Session>>),
        peer: String,
    ) -> Arc<Self> {
        let Agreed { export, mode, contexts } = agreed;
        Arc::new(Self {
            server,
            link,
            export,
            fd,
            tls,
            mode,
            contexts,
            peer,
            sending: Mutex::default(),
            done: Mutex::default(),
            in_pool: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            waiting: AtomicBool::new(false),
            waker: OnceLock::new(),
            running: AtomicUsize::new(0),
            cut: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
        })
    }

    /// Serve until the client disconnects, the server stops, or something is wrong.
    pub fn serve(self: &Arc<Self>) {
        let cached = self.export.with(|i| i.is_cached()).unwrap_or(false);
        let _awake = Awake::begin();
        let result = match (Input::new(), Pages::new(OUTPUT)) {
            (Ok(input), Ok(out)) => {
                let (conn, polling) = (self.clone(), Polling::default());
                Own { conn, input, out, len: 0, high: 0, cached, polling, half: 0 }.serve()
            }
            _ => Err(Cut::Failed("no memory".into())),
        };
        match result {
            Ok(()) | Err(Cut::Closed) => {}
            Err(why) => {
                let level = match why {
                    Cut::Idle => Level::Info,
                    _ => Level::Warn,
                };
                log(level, format_args!("NBD client {}: cut off: {why}", self.peer));
            }
        }
        self.cut();
        // The pool may still work for this connection: its replies go nowhere now.
        self.await_pool(0);
    }

    /// Hang up.
    pub fn cut(&self) {
        self.cut.store(true, SeqCst);
        // SAFETY: the descriptor is open.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
    }

    /// Whether the connection was hung up on.
    pub(super) fn is_cut(&self) -> bool {
        self.cut.load(Relaxed)
    }

    /// Whether what was asked for, and has not begun, is not to be done any more.
    pub(super) fn is_given_up(&self) -> bool {
        let left = self.is_cut() && !self.leaving.load(SeqCst);
        left || self.link.given_up.load(SeqCst)
    }

    /// Let the client have what was sent: closing a TCP connection on which something was received that
    /// nobody read would take back replies that are on their way.
    fn linger(&self) {
        if let Some(tls) = &self.tls {
            let mut farewell = Vec::new();
            tls.close(&mut farewell);
            let _ = self.write_some(&[io::IoSlice::new(&farewell)], false, false);
        }
        // SAFETY: the descriptor is open.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_WR) };
        let end = Instant::now() + LINGER;
        while let Some(left) = end.checked_duration_since(Instant::now())
            && asleep(|| super::input::discard(&self.fd, left))
        {}
    }

    /// Wait until at most `most` requests are in the pool.
    fn await_pool(&self, most: usize) {
        let Some(waker) = self.waker.get() else { return };
        self.waiting.store(true, SeqCst);
        while self.in_pool.load(SeqCst) > most {
            if self.has_left() || !self.done.lock().is_empty() {
                if self.send_rest().is_err() {
                    self.cut();
                }
                continue;
            }
            // A client that is gone for good wants nothing any more, unless it said goodbye.
            let looks = !self.is_cut() && !self.leaving.load(SeqCst);
            let socket = looks.then_some(&self.fd);
            if asleep(|| super::input::hangs_up(socket, waker)) {
                self.cut();
            }
            waker.reset();
        }
        self.waiting.store(false, SeqCst);
    }

    /// Whether the limits allow another request of so many bytes beside `n` in the pool.
    fn has_room(&self, n: usize, budget: usize) -> bool {
        let settings = self.server.settings();
        n < settings.max_in_flight
            && self.bytes.load(Relaxed) + budget <= settings.max_memory_each
            && self.server.in_pool.load(Relaxed) < settings.max_in_all
            && self.server.memory.load(Relaxed) + budget <= settings.max_memory
    }

    pub(super) fn note_error(&self, r: &Request, e: &Error) {
        self.server.stats.errors.fetch_add(1, Relaxed);
        log(
            Level::Info,
            format_args!(
                "NBD client {}, export {}: command {} at {} of {}: {e}",
                self.peer,
                quoted(&self.export.name),
                r.kind,
                r.offset,
                r.length
            ),
        );
    }
}

impl Own {
    fn serve(mut self) -> Result<(), Cut> {
        let header = self.conn.mode.request_len();
        loop {
            while self.input.len() < header {
                self.flush()?;
                if self.conn.server.is_stopping() || self.conn.export.removed.load(Relaxed) {
                    return self.goodbye();
                }
                if !self.receive()? {
                    return self.goodbye();
                }
                if self.input.len() >= HALVES * header {
                    self.half = self.input.len() / 2;
                }
            }
            let r = Request::decode(self.input.bytes(), self.conn.mode).map_err(|magic| {
                Cut::Protocol(format!("a request begins with {:#010x}", magic.0))
            })?;
            self.input.consume(header);
            if r.kind == cmd::DISC {
                self.conn.leaving.store(true, SeqCst);
                return self.goodbye();
            }
            self.request(&r)?;
            if self.half > 0 && self.input.len() <= self.half {
                self.half = 0;
                self.flush()?;
            }
        }
    }

    /// All that was asked for is answered, and then no more.
    fn goodbye(&mut self) -> Result<(), Cut> {
        self.flush()?;
        self.conn.await_pool(0);
        self.conn.send_rest()?;
        self.conn.linger();
        Ok(())
    }

    /// Send the replies that were gathered.
    pub(super) fn flush(&mut self) -> Result<(), Cut> {
        if self.len > 0 {
            let n = std::mem::take(&mut self.len);
            self.conn.send(&self.out[..n], false)?;
        }
        Ok(())
    }

    /// Have room for `n` more bytes of replies (at most [`OUTPUT`]).
    pub(super) fn room(&mut self, n: usize) -> Result<(), Cut> {
        if self.len + n > OUTPUT {
            self.flush()?;
        }
        self.high = self.high.max(self.len + n);
        Ok(())
    }

    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<(), Cut> {
        self.room(bytes.len())?;
        self.out[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        Ok(())
    }

    pub(super) fn ok(&mut self, r: &Request) -> Result<(), Cut> {
        let (bytes, n) = reply::ok_bytes(self.conn.mode, r);
        self.put(&bytes[..n])
    }

    pub(super) fn fail(&mut self, r: &Request, e: &Error) -> Result<(), Cut> {
        self.conn.note_error(r, e);
        let mut out = Vec::new();
        reply::error(&mut out, self.conn.mode, r, e);
        self.put(&out)
    }

    /// Receive more; `false` when the client sends no more.
    pub(super) fn receive(&mut self) -> Result<bool, Cut> {
        if let Some(tls) = &self.conn.tls
            && self.input.take(tls)?
        {
            return Ok(true);
        }
        let settings = self.conn.server.settings();
        let quiet = Duration::from_secs(1);
        let quiet = quiet.min(settings.idle_timeout.unwrap_or(quiet));
        if self.conn.in_pool.load(SeqCst) == 0 && !self.conn.has_left() {
            let (fd, tls) = (&self.conn.fd, self.conn.tls.as_deref());
            let had = self.input.len();
            let look = || self.input.receive_now(fd, tls);
            if let Some(more) = self.polling.look(settings.busy_poll, look)? {
                match self.input.len() - had >= self.conn.mode.request_len() {
                    // A client that has not taken all replies yet does not wait.
                    true => self.polling.found(|| net::is_taken(fd)),
                    false => self.polling.vain(),
                }
                return Ok(more);
            }
        }
        loop {
            let waits = self.conn.in_pool.load(SeqCst) > 0;
            // Large memory is not kept for a client that is silent.
            if !waits && self.high.max(self.input.high()) > 128 << 10 && !self.conn.has_left() {
                if self.conn.tls.is_none()
                    && let Some(more) = self.input.receive_now(&self.conn.fd, None)?
                {
                    return Ok(more);
                }
                if !asleep(|| self.input.is_ready(&self.conn.fd, quiet)) {
                    if self.len == 0 {
                        self.out.release();
                        self.high = 0;
                    }
                    self.input.release();
                }
            }
            if let Some(waker) = self.conn.waker.get()
                && (waits || self.conn.has_left())
            {
                // Replies of the pool that the socket did not take are for this thread to finish.
                // Nobody else looks again for a reply that came while `has_left` had the lock.
                if self.conn.has_left() || !self.conn.done.lock().is_empty() {
                    self.conn.send_rest()?;
                    continue;
                }
                // When the pool is done nobody says so: a client that is idle then is one like others.
                if !asleep(|| super::input::wait(Some(&self.conn.fd), waker, Some(quiet))) {
                    waker.reset();
                    continue;
                }
            }
            return asleep(|| self.input.receive(&self.conn.fd, self.conn.tls.as_deref()));
        }
    }

    /// Do one request, or have it done.
    fn request(&mut self, r: &Request) -> Result<(), Cut> {
        let mode = self.conn.mode;
        let has_payload = r.kind == cmd::WRITE
            || (mode == Mode::Extended && r.flags & cmd_flag::PAYLOAD_LEN != 0);
        self.conn.server.stats.count(r);
        if let Err((errno, why)) = self.check(r) {
            if has_payload {
                self.skip(r)?;
            }
            let mut out = Vec::new();
            reply::error_text(&mut out, mode, r, errno, &why);
            self.conn.server.stats.errors.fetch_add(1, Relaxed);
            return self.put(&out);
        }
        match r.kind {
            cmd::READ => self.read(r),
            cmd::WRITE => self.write(r),
            cmd::BLOCK_STATUS if has_payload => self.status_of_some(r),
            cmd::BLOCK_STATUS if self.cached => match self.conn.status(r, None) {
                Ok(out) => self.put(&out),
                Err(e) => self.fail(r, &e),
            },
            cmd::FLUSH if self.conn.export.read_only => self.ok(r),
            _ => self.submit(*r, None, 0),
        }
    }

    /// Block status of the contexts that the payload names.
    fn status_of_some(&mut self, r: &Request) -> Result<(), Cut> {
        let mut payload = vec![0; r.length as usize];
        self.take(&mut payload)?;
        let (length, ids) = payload.split_at(8);
        let length = u64::from_be_bytes(length.try_into().unwrap_or_default());
        let ids: Vec<u32> = ids.as_chunks::<4>().0.iter().map(|b| u32::from_be_bytes(*b)).collect();
        let ask = Request { length, ..*r };
        let known = ids.iter().all(|id| self.conn.contexts.iter().any(|c| c.id() == *id));
        let size = self.conn.export.with(|i| i.size()).unwrap_or(0);
        let inside = length > 0 && r.offset.checked_add(length).is_some_and(|end| end <= size);
        let status = match known && inside {
            true => self.conn.status(&ask, Some(&ids)),
            false => {
                Err(Error::invalid("contexts that were not negotiated, or a range that is none"))
            }
        };
        match status {
            Ok(out) => self.put(&out),
            Err(e) => self.fail(r, &e),
        }
    }

    /// Read and forget the payload of a refused request.
    fn skip(&mut self, r: &Request) -> Result<(), Cut> {
        if r.length > SKIP {
            return Err(Cut::Protocol(format!("a payload of {} bytes", r.length)));
        }
        let mut left = r.length as usize;
        while left > 0 {
            let n = self.some(left)?;
            self.input.consume(n);
            left -= n;
        }
        Ok(())
    }

    /// Have some bytes of payload, at most `most`: how many there are.
    fn some(&mut self, most: usize) -> Result<usize, Cut> {
        while self.input.len() == 0 {
            self.flush()?;
            if !self.receive()? {
                return Err(Cut::Closed);
            }
        }
        Ok(self.input.len().min(most))
    }

    /// Fill `to` with payload.
    fn take(&mut self, to: &mut [u8]) -> Result<(), Cut> {
        let mut at = 0;
        while at < to.len() {
            let n = self.some(to.len() - at)?;
            to[at..at + n].copy_from_slice(&self.input.bytes()[..n]);
            self.input.consume(n);
            at += n;
        }
        Ok(())
    }

    fn write(&mut self, r: &Request) -> Result<(), Cut> {
        let at_once = || self.conn.export.with(|i| i.writes_at_once(r.length as usize));
        // Of FUA somebody waits for a disk: many at a time share that in the pool.
        let waits = r.flags & cmd_flag::FUA != 0 || !at_once().unwrap_or(false);
        if waits && r.length <= JOB {
            self.await_room(r.length as usize)?;
            let mut payload = match Buffer::new(r.length as usize) {
                Ok(payload) => payload,
                Err(e) => {
                    self.skip(r)?;
                    return self.fail(r, &e);
                }
            };
            self.take(&mut payload)?;
            return self.submit(*r, Some(payload), r.length as usize);
        }
        // In pieces, as they come: no more of it is ever held than the input has room for.
        let whole = self.input.capacity();
        let fits = r.length <= whole as u64;
        let (mut offset, mut left, mut result) = (r.offset, r.length, Ok(()));
        while left > 0 {
            let wanted = (left as usize).min(whole);
            while self.input.len() < wanted {
                self.flush()?;
                if !self.receive()? {
                    return Err(Cut::Closed);
                }
            }
            if result.is_ok() {
                // FUA of pieces is one flush after the last.
                let flags = if fits { r.flags } else { r.flags & !cmd_flag::FUA };
                let piece = Request { offset, length: wanted as u64, flags, ..*r };
                result = self.conn.change(&piece, Some(&self.input.bytes()[..wanted]));
            }
            self.input.consume(wanted);
            offset += wanted as u64;
            left -= wanted as u64;
        }
        if result.is_ok() && !fits && r.flags & cmd_flag::FUA != 0 {
            result = self.conn.export.with(|i| i.flush());
        }
        match result {
            Ok(()) => self.ok(r),
            Err(e) => self.fail(r, &e),
        }
    }

    /// Hand a request to the pool, when there is room for it.
    pub(super) fn submit(
        &mut self,
        request: Request,
        payload: Option<Buffer>,
        budget: usize,
    ) -> Result<(), Cut> {
        self.await_room(budget)?;
        let conn = &self.conn;
        conn.in_pool.fetch_add(1, SeqCst);
        conn.server.in_pool.fetch_add(1, Relaxed);
        conn.bytes.fetch_add(budget, Relaxed);
        conn.server.memory.fetch_add(budget, Relaxed);
        let threads = conn.server.settings().threads;
        conn.server.pool.submit(conn, Job { request, payload, budget }, threads);
        Ok(())
    }

    /// Wait until the limits allow another request of so many bytes in the pool.
    fn await_room(&mut self, budget: usize) -> Result<(), Cut> {
        if self.conn.waker.get().is_none() {
            let waker = Waker::new().map_err(|e| Cut::Failed(e.to_string()))?;
            let _ = self.conn.waker.set(waker);
        }
        loop {
            let n = self.conn.in_pool.load(SeqCst);
            // A connection with nothing under way always gets on, whatever the others hold.
            if n == 0 || self.conn.has_room(n, budget) {
                return Ok(());
            }
            self.flush()?;
            self.conn.await_pool(n - 1);
            if self.conn.is_cut() {
                return Err(Cut::Closed);
            }
        }
    }
}
