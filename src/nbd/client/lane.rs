//! A lane: one connection at a time, and the requests under way on it.
//!
//! No thread belongs to a lane. Callers do the work themselves, in two roles that one thread each
//! holds at a time: the *sender* sends all requests that have queued up ([`super::tx`]), the
//! *receiver* receives whatever comes and completes the requests of all. A caller who finds the
//! receiver's role free takes it until its own reply has come, and then hands it to one who waits;
//! the others sleep on one word, so that any number of them is woken with one system call. A lone
//! caller sends once, receives once, and meets nobody.
//!
//! What keeps a request from being forgotten:
//! - Whoever gives up the receiver's role looks for sleepers afterwards and wakes one; whoever goes to
//!   sleep says so and then looks whether the role is free. Both in sequentially consistent order, so
//!   one of them sees the other. Whoever was asleep looks again when it leaves, in case the role was
//!   offered to it and it needs it no more.
//! - The same goes for a reply that completes while its caller goes to sleep.
//!
//! How a connection dies: whoever finds it broken notes why and shuts the socket down, which ends
//! every system call on it. The receiver (or whoever takes the role next) then closes the queue, waits
//! until nobody sends, reports the loss, and fails what was under way ([`super::slot`] says why this
//! order). Callers leave, and when all slots are free again the lane may get another connection: all
//! slots together are the right to change what all share.
//!
//! Locks: `reason` may be taken under `tx`, nothing else under either. Neither is held while waiting,
//! but for the wait for the sender of a dead connection, which gives `tx` up.

use std::cell::UnsafeCell;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, fence};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::pool::Pool;
use super::reply;
use super::rx::{Link, Rx, Stopped};
use super::slot::{FAILED, LIVE, Memory, REPLIED, Request, SENT, Slot, Work, is_over};
use super::sys::{self, Deadline, Errno};
use super::tx::{Queue, SendError};
use crate::block::{Error, Name};
use crate::nbd::proto::{self, cmd};

/// Requests that can be under way on one connection.
pub(super) const SLOTS: usize = 64;
/// From so many bytes on, the data of a read is not worth receiving ahead.
const LARGE: u64 = 32 << 10;

/// What everybody writes to, on a cache line of its own.
#[repr(align(128))]
struct Apart<T>(T);

struct Tx {
    /// Nothing is queued any more.
    closed: bool,
    /// A thread is sending.
    sending: bool,
    queue: Box<Queue>,
    /// The other queue, while nobody is sending.
    spare: Option<Box<Queue>>,
    /// For TLS records. The sender's, while there is one.
    sealed: Vec<u8>,
}

/// See the module's text.
pub(super) struct Lane {
    /// A bit for each slot that is free.
    free: Apart<AtomicU64>,
    /// A bit for each caller that sleeps and could take the receiver's role.
    waiting: Apart<AtomicU64>,
    /// What callers sleep on; counts wake-ups.
    epoch: AtomicU32,
    /// Somebody is the receiver.
    receiving: AtomicBool,
    /// Large reads under way.
    large: AtomicU32,
    /// Requests are taken.
    up: AtomicBool,
    /// The connection is broken; see `reason`.
    dead: AtomicBool,
    reason: Mutex<Option<Error>>,
    tx: Apart<Mutex<Tx>>,
    /// The sender has stopped.
    idle: Condvar,
    rx: UnsafeCell<Rx>,
    link: UnsafeCell<Option<Link>>,
    /// The link's descriptor, -1 without: for a forked child, which may only close it.
    fd: AtomicI32,
    slots: Box<[Slot]>,
}

// SAFETY: `rx` is touched by the receiver alone, `link` is changed only by who has claimed all slots
// and read only by who has claimed one.
unsafe impl Sync for Lane {}
// SAFETY: nothing in it is bound to a thread.
unsafe impl Send for Lane {}

/// What became of a request.
pub(super) enum Outcome {
    /// A reply came: see [`Claim::work`].
    Over,
    /// The connection was lost before one came.
    Lost,
    /// The deadline passed, and the connection was given up.
    Late,
    /// The peer broke the protocol, and the connection was given up.
    Broken(Error),
}

impl Lane {
    /// A lane without a connection.
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            free: Apart(AtomicU64::new(u64::MAX)),
            waiting: Apart(AtomicU64::new(0)),
            epoch: AtomicU32::new(0),
            receiving: AtomicBool::new(false),
            large: AtomicU32::new(0),
            up: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            reason: Mutex::new(None),
            tx: Apart(Mutex::new(Tx {
                closed: true,
                sending: false,
                queue: Queue::new(),
                spare: Some(Queue::new()),
                sealed: Vec::new(),
            })),
            idle: Condvar::new(),
            rx: UnsafeCell::new(Rx::new()?),
            link: UnsafeCell::new(None),
            fd: AtomicI32::new(-1),
            slots: (0..SLOTS).map(|_| Slot::new()).collect(),
        })
    }

    /// Whether requests are taken.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(SeqCst)
    }

    /// Take no more requests; whether any were taken before.
    pub(super) fn take_down(&self) -> bool {
        self.up.swap(false, SeqCst)
    }

    /// Requests under way, more or less.
    pub(super) fn in_flight(&self) -> u32 {
        self.free.0.load(Relaxed).count_zeros()
    }

    /// The descriptor for a forked child to close, once.
    pub(super) fn take_fd(&self) -> i32 {
        self.fd.swap(-1, Relaxed)
    }

    /// Take a slot, if the lane is up and one is free.
    #[inline]
    pub(super) fn claim<'a>(&'a self, pool: &'a Pool) -> Option<Claim<'a>> {
        let mut free = self.free.0.load(Relaxed);
        loop {
            if free == 0 || !self.up.load(Acquire) {
                return None;
            }
            let index = free.trailing_zeros() as usize;
            match self.free.0.compare_exchange_weak(free, free & (free - 1), SeqCst, Relaxed) {
                Ok(_) if self.up.load(SeqCst) => return Some(Claim { lane: self, pool, index }),
                Ok(_) => {
                    // It has gone down, and may be about to get another connection.
                    self.free.0.fetch_or(1 << index, SeqCst);
                    return None;
                }
                Err(now) => free = now,
            }
        }
    }

    /// Take all slots that are free. Whoever has come to have all of a lane that is down may give it
    /// another connection.
    pub(super) fn collect(&self) -> u64 {
        self.free.0.swap(0, SeqCst)
    }

    /// Give slots back that [`Lane::collect`] took.
    pub(super) fn give_back(&self, slots: u64) {
        self.free.0.fetch_or(slots, SeqCst);
    }

    /// Close what is left of the last connection.
    ///
    /// # Safety
    /// The caller has collected all slots.
    pub(super) unsafe fn unlink(&self) {
        self.fd.store(-1, Relaxed);
        // SAFETY: who has all slots may change what all share.
        unsafe { *self.link.get() = None };
    }

    /// Begin with a new connection.
    ///
    /// # Safety
    /// The caller has collected all slots, which are free from now on.
    pub(super) unsafe fn install(&self, link: Link) {
        // SAFETY: who has all slots is alone: sending, receiving and reading `link` take one.
        unsafe {
            (*self.rx.get()).reset();
            self.fd.store(link.fd.as_raw_fd(), Relaxed);
            *self.link.get() = Some(link);
        }
        let mut tx = self.tx.0.lock();
        tx.queue.clear();
        (tx.closed, tx.sending) = (false, false);
        drop(tx);
        self.waiting.0.store(0, Relaxed);
        self.large.store(0, Relaxed);
        *self.reason.lock() = None;
        self.dead.store(false, SeqCst);
        self.up.store(true, SeqCst);
        self.free.0.store(u64::MAX, SeqCst);
    }

    /// Say goodbye, so that the server need not find out. Nobody else uses the lane any more, or not
    /// for longer than until `deadline`.
    pub(super) fn goodbye(&self, pool: &Pool, deadline: Deadline) {
        let Some(claim) = self.claim(pool) else {
            // All slots are taken by callers that nobody has answered in time.
            return self.cut();
        };
        self.up.store(false, SeqCst);
        if let Some(link) = claim.link() {
            let mut tx = self.tx.0.lock();
            while tx.sending && !deadline.passed() {
                self.wait_idle(&mut tx, deadline);
            }
            let quiet = !tx.closed && !tx.sending && tx.queue.is_empty();
            tx.closed = true;
            if quiet {
                let head = proto::Request { kind: cmd::DISC, ..Default::default() };
                let (bytes, len) = head.encode(link.export.mode);
                let mut out = bytes.get(..len).unwrap_or_default().to_vec();
                if let Some(session) = &link.tls {
                    let plain = std::mem::take(&mut out);
                    // What can not be sent is not missed: the socket is closed next.
                    let _ = session.seal(&[std::io::IoSlice::new(&plain)], &mut out);
                    session.close(&mut out);
                }
                sys::send_if_room(link.fd.as_raw_fd(), &out);
            }
            drop(tx);
            self.die(Error::BadHandle(format!("{}: closed", link.peer)), link);
        }
    }

    /// End what is under way, if anything can be. The device is closing: no connection is installed
    /// any more.
    pub(super) fn cut(&self) {
        if self.take_down() {
            sys::shutdown(self.fd.load(Relaxed));
        }
    }

    fn wait_idle(&self, tx: &mut MutexGuard<'_, Tx>, deadline: Deadline) {
        match deadline.left() {
            None => self.idle.wait(tx),
            Some(left) => drop(self.idle.wait_for(tx, left)),
        }
    }

    /// Give the connection up: note why, and end all system calls on it.
    fn die(&self, why: Error, link: &Link) {
        self.reason.lock().get_or_insert(why);
        self.dead.store(true, SeqCst);
        sys::shutdown(link.fd.as_raw_fd());
        // Also those that wait for the sender only: one of all must become the receiver.
        self.wake(u64::MAX);
    }

    /// Wake the callers that sleep and whose bit is in `slots`.
    #[inline]
    fn wake(&self, slots: u64) {
        self.epoch.fetch_add(1, SeqCst);
        sys::futex_wake(&self.epoch, fold(slots));
    }

    /// Offer the receiver's role to one who sleeps.
    #[inline]
    fn offer(&self) {
        loop {
            let waiting = self.waiting.0.load(SeqCst);
            let one = waiting & waiting.wrapping_neg();
            if one == 0 {
                return;
            }
            if self.waiting.0.fetch_and(!one, SeqCst) & one != 0 {
                return self.wake(one);
            }
        }
    }
}

/// The bits of slots as a futex has them: two slots share one, and wake together.
#[inline]
fn fold(slots: u64) -> u32 {
    (slots as u32) | (slots >> 32) as u32
}

/// A slot of a lane, claimed. While it exists, the lane keeps its connection.
pub(super) struct Claim<'a> {
    lane: &'a Lane,
    pool: &'a Pool,
    index: usize,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.lane.slots.get(self.index) {
            slot.state.store(0, Relaxed);
        }
        self.lane.free.0.fetch_or(1 << self.index, SeqCst);
        self.pool.slot_freed(self.lane);
    }
}

impl Claim<'_> {
    fn link(&self) -> Option<&Link> {
        // SAFETY: it is changed only by who has all slots, and this one is ours.
        unsafe { (*self.lane.link.get()).as_ref() }
    }

    fn slot(&self) -> Option<&Slot> {
        self.lane.slots.get(self.index)
    }

    /// What is known of the request, after [`Outcome::Over`].
    pub(super) fn work(&mut self) -> Option<&mut Work> {
        let slot = self.slot()?;
        // SAFETY: the slot is over or was never used: it is its caller's, who we are.
        is_over(slot.state.load(Acquire)).then(|| unsafe { &mut *slot.work.get() })
    }

    /// Send a request and wait for its reply.
    pub(super) fn exchange(&mut self, request: &Request<'_>, deadline: Deadline) -> Outcome {
        let (Some(link), Some(slot)) = (self.link(), self.slot()) else { return Outcome::Lost };
        // SAFETY: the slot is not LIVE: it is its caller's, who we are.
        let work = unsafe { &mut *slot.work.get() };
        let cookie = work.begin(request, link.export.contexts.len(), self.index);
        let memory = work.memory;
        let head = proto::Request {
            flags: request.flags,
            kind: request.kind,
            cookie,
            offset: request.offset,
            length: request.length,
        };
        let large = request.kind == cmd::READ && request.length >= LARGE;
        if large {
            self.lane.large.fetch_add(1, Relaxed);
        }
        let mut late = false;
        if self.submit(link, slot, &head, &memory, deadline) {
            late = self.wait(link, slot, deadline);
        }
        if large {
            self.lane.large.fetch_sub(1, Relaxed);
        }
        let state = slot.state.load(Acquire);
        if is_over(state) && state & FAILED == 0 {
            return Outcome::Over;
        }
        match &*self.lane.reason.lock() {
            Some(why @ Error::Proto { .. }) if state & FAILED != 0 => Outcome::Broken(why.clone()),
            _ if late => Outcome::Late,
            _ => Outcome::Lost,
        }
    }

    /// Queue a request, and send what is queued unless somebody is at it. `false` if the connection
    /// is gone: then the request was not queued.
    #[inline]
    fn submit(
        &self,
        link: &Link,
        slot: &Slot,
        head: &proto::Request,
        memory: &Memory<'static>,
        deadline: Deadline,
    ) -> bool {
        let born = if matches!(memory, Memory::From(_)) { LIVE } else { LIVE | SENT };
        let mut tx = self.lane.tx.0.lock();
        if tx.closed {
            return false;
        }
        slot.state.store(born, Release);
        slot.cookie.store(head.cookie, Release);
        tx.queue.push(self.index, head, link.export.mode, memory);
        if !tx.sending {
            tx.sending = true;
            self.send(tx, link, deadline);
        }
        true
    }

    /// The sender's role: send until nothing is queued.
    fn send<'b>(&'b self, mut tx: MutexGuard<'b, Tx>, link: &Link, deadline: Deadline) {
        let lane = self.lane;
        loop {
            let spare = tx.spare.take().unwrap_or_else(Queue::new);
            let mut queue = std::mem::replace(&mut tx.queue, spare);
            let mut sealed = std::mem::take(&mut tx.sealed);
            drop(tx);
            let tick = || {
                if deadline.passed() {
                    lane.die(self.pool.too_late(), link);
                }
                !lane.dead.load(Acquire)
            };
            let result = queue.send(link.fd.as_raw_fd(), link.tls.as_deref(), &mut sealed, tick);
            if result.is_ok() {
                for slot in queue.with_payload() {
                    let Some(s) = lane.slots.get(slot) else { continue };
                    if s.state.fetch_or(SENT, SeqCst) & REPLIED != 0 {
                        // Its caller may sleep until now: nobody else was to wake it.
                        lane.wake(1 << slot);
                    }
                }
            }
            tx = lane.tx.0.lock();
            queue.clear();
            (tx.spare, tx.sealed) = (Some(queue), sealed);
            if let Err(why) = &result {
                tx.closed = true;
                lane.die(send_error(why, link), link);
            }
            if tx.queue.is_empty() || tx.closed {
                tx.sending = false;
                if tx.closed {
                    lane.idle.notify_all();
                }
                return;
            }
        }
    }

    /// Wait until the slot is over; whether the deadline passed before.
    fn wait(&self, link: &Link, slot: &Slot, deadline: Deadline) -> bool {
        let (lane, bit) = (self.lane, 1u64 << self.index);
        let (mut late, mut listed) = (false, false);
        loop {
            let epoch = lane.epoch.load(Acquire);
            let state = slot.state.load(Acquire);
            if is_over(state) {
                break;
            }
            // One whose reply has come waits for the sender only: the receiver's role would keep it
            // until the next reply. On a dead connection there is none, and anybody will do.
            let for_role = state & REPLIED == 0 || lane.dead.load(SeqCst);
            if for_role && !lane.receiving.swap(true, Acquire) {
                self.receive(link, slot, deadline, &mut late);
                continue;
            }
            if for_role {
                listed = true;
                lane.waiting.0.fetch_or(bit, SeqCst);
                fence(SeqCst);
            } else if listed && !lane.receiving.load(SeqCst) {
                // The role may have been offered to this one.
                lane.offer();
            }
            let now = slot.state.load(SeqCst);
            let stay = !is_over(now)
                && (!for_role || (now & REPLIED == state & REPLIED && lane.receiving.load(SeqCst)));
            if stay {
                let until = if late { Deadline::NEVER } else { deadline };
                sys::futex_wait(&lane.epoch, epoch, fold(bit), until);
            }
            if for_role {
                lane.waiting.0.fetch_and(!bit, SeqCst);
            }
            if stay && !late && !is_over(slot.state.load(Acquire)) && deadline.passed() {
                late = true;
                lane.die(self.pool.too_late(), link);
            }
        }
        if listed && !lane.receiving.load(SeqCst) {
            lane.offer();
        }
        late
    }

    /// The receiver's role: until the slot's own reply has come.
    fn receive(&self, link: &Link, slot: &Slot, deadline: Deadline, late: &mut bool) {
        let lane = self.lane;
        let _role = Role { claim: self, link };
        // SAFETY: the receiver's alone, which we are until `_role` is dropped.
        let rx = unsafe { &mut *lane.rx.get() };
        let mut rounds = 0u32;
        loop {
            if lane.dead.load(Acquire) {
                return self.fail_all(link);
            }
            if slot.state.load(Acquire) & (REPLIED | FAILED) != 0 {
                return;
            }
            let mut over = 0;
            let large = lane.large.load(Relaxed) > 0;
            let mut check = false;
            match rx.fill(link, &lane.slots, large) {
                Ok(()) => {
                    if let Err(why) = reply::drain(rx, link, &lane.slots, &mut over) {
                        lane.die(why, link);
                    }
                    // Others may be served for as long as they like.
                    rounds = rounds.wrapping_add(1);
                    check = rounds.is_multiple_of(16);
                }
                Err(Stopped::Os(libc::EINTR | libc::EAGAIN)) => check = true,
                Err(why) => lane.die(stop_error(why, link), link),
            }
            let sleepers = over & lane.waiting.0.load(SeqCst);
            if sleepers != 0 {
                lane.waiting.0.fetch_and(!sleepers, SeqCst);
                lane.wake(sleepers);
            }
            if check && !*late && deadline.passed() {
                *late = true;
                lane.die(self.pool.too_late(), link);
            }
        }
    }

    /// Fail everything that is under way on a dead connection. The receiver's.
    fn fail_all(&self, link: &Link) {
        let lane = self.lane;
        let mut tx = lane.tx.0.lock();
        tx.closed = true;
        while tx.sending {
            self.lane.idle.wait(&mut tx);
        }
        tx.queue.clear();
        drop(tx);
        let why = lane.reason.lock().clone();
        let why = why.unwrap_or_else(|| Error::net(&link.peer, "lost", libc::ECONNRESET));
        // Before any caller can see its request failed.
        self.pool.lost(lane, &why);
        for slot in &lane.slots {
            let state = slot.state.load(Acquire);
            if state & LIVE != 0 && !is_over(state) {
                slot.cookie.store(0, Relaxed);
                slot.state.fetch_or(FAILED, SeqCst);
            }
        }
        lane.waiting.0.store(0, SeqCst);
        lane.wake(u64::MAX);
    }
}

/// The receiver's role, given up when dropped.
struct Role<'a> {
    claim: &'a Claim<'a>,
    link: &'a Link,
}

impl Drop for Role<'_> {
    fn drop(&mut self) {
        let lane = self.claim.lane;
        if std::thread::panicking() {
            lane.die(Error::Internal("a panic while receiving".into()), self.link);
        }
        lane.receiving.store(false, SeqCst);
        fence(SeqCst);
        lane.offer();
    }
}

fn os_error(errno: Errno, doing: &str, peer: &Name) -> Error {
    match errno {
        libc::EPIPE | libc::ECONNRESET => hung_up(peer),
        errno => Error::net(peer, doing, errno),
    }
}

fn hung_up(peer: &Name) -> Error {
    Error::net(peer, "the server hung up", libc::ECONNRESET)
}

fn send_error(why: &SendError, link: &Link) -> Error {
    match why {
        SendError::Os(errno) => os_error(*errno, "sending", &link.peer),
        SendError::Tls(e) => e.clone(),
    }
}

fn stop_error(why: Stopped, link: &Link) -> Error {
    match why {
        Stopped::End => hung_up(&link.peer),
        Stopped::Os(errno) => os_error(errno, "receiving", &link.peer),
        Stopped::Tls(e) => e,
    }
}
