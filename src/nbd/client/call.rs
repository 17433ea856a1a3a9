//! A call: a request put on a lane by its caller, who then sends, receives or sleeps until it is
//! answered. The rules are told in [`super::lane`] and [`super::slot`].

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;
use std::time::Duration;

use parking_lot::MutexGuard;

use super::lane::{Lane, Tx, fold};
use super::pool::{Pool, TOGETHER};
use super::reply::{self, Came};
use super::rx::{Link, Stopped};
use super::slot::{FAILED, LIVE, Memory, REPLIED, Request, SENT, Slot, Work, is_over};
use super::sys::{self, Deadline, Errno};
use super::tx::{Queue, SendError};
use crate::block::{Error, Name};
use crate::nbd::proto::{self, cmd};

/// How long a request is held back at most.
const HELD: Duration = Duration::from_micros(200);
/// From so many bytes on, the data of a read is not worth receiving ahead.
const LARGE: u64 = 32 << 10;

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
    /// Another call got no answer in time, so the connection was given up: the server may live, and do
    /// later what it was asked.
    GivenUp(Error),
}

/// Where a request went.
enum Submitted {
    /// Nowhere: the connection is gone.
    Refused,
    /// To the server, or to one who is sending.
    Sent,
    /// Into the queue: one who comes later is to send it. The first there has this, for when nobody does.
    Held(Option<Held>),
}

/// The duty to send what is queued if nobody else does: which turn it is, and until when.
#[derive(Clone, Copy)]
struct Held {
    turn: u32,
    until: Deadline,
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

impl<'a> Claim<'a> {
    /// For a slot whose bit was just taken.
    pub(super) fn new(lane: &'a Lane, pool: &'a Pool, index: usize) -> Self {
        Self { lane, pool, index }
    }
}

impl Claim<'_> {
    pub(super) fn link(&self) -> Option<&Link> {
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
        match self.submit(link, slot, &head, &memory, deadline) {
            Submitted::Refused => self.bury(link),
            Submitted::Sent => late = self.wait(link, slot, None, deadline),
            Submitted::Held(held) => late = self.wait(link, slot, held, deadline),
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
            Some(why @ Error::Net { errno: libc::ETIMEDOUT, .. }) => Outcome::GivenUp(why.clone()),
            _ => Outcome::Lost,
        }
    }

    /// Queue a request, and send what is queued unless somebody is at it or soon will be.
    #[inline]
    fn submit(
        &self,
        link: &Link,
        slot: &Slot,
        head: &proto::Request,
        memory: &Memory<'static>,
        deadline: Deadline,
    ) -> Submitted {
        let born = if matches!(memory, Memory::From(_)) { LIVE } else { LIVE | SENT };
        let lane = self.lane;
        let mut tx = lane.tx.0.lock();
        if tx.closed {
            return Submitted::Refused;
        }
        slot.state.store(born, Release);
        slot.cookie.store(head.cookie, Release);
        tx.queue.push(self.index, head, link.export.mode, memory);
        tx.away = tx.away.saturating_sub(1);
        if !tx.sending {
            // Those who were just woken are about to ask for more, or to leave: the last of them sends
            // what is here.
            lane.held.store(true, SeqCst);
            let expected = tx.away > 0 || lane.summoned.load(SeqCst) > 0;
            if expected && tx.queue.len() < self.enough() {
                let first = tx.queue.len() == 1;
                let turn = tx.turn;
                drop(tx);
                let until = || Deadline::after(Some(HELD)).min(deadline);
                return Submitted::Held(first.then(|| Held { turn, until: until() }));
            }
            lane.held.store(false, SeqCst);
            if tx.queue.len() > 1 {
                tx.trust.kept();
            }
            tx.sending = true;
            self.send(tx, link, deadline);
        }
        Submitted::Sent
    }

    /// How many requests are worth a system call of their own, whoever else may come. While other
    /// connections are busy, all that one connection gets; else half of what is under way, so that the
    /// server has the other half to work on.
    fn enough(&self) -> usize {
        let (lane, most) = (self.lane, TOGETHER as usize);
        let busy = |l: &Lane| !std::ptr::eq(l, lane) && l.in_flight() > 0;
        match self.pool.lanes.iter().any(busy) {
            true => most,
            false => most.min(lane.in_flight() as usize / 2),
        }
    }

    /// This caller has found that it was summoned. The last one of those sends what was held back for
    /// the others' requests to come along.
    fn heed(&self, link: &Link, deadline: Deadline) {
        let lane = self.lane;
        if lane.summoned.fetch_sub(1, SeqCst) == 1 && lane.held.load(SeqCst) {
            let tx = lane.tx.0.lock();
            if tx.away == 0 {
                self.send_held(tx, link, deadline);
            }
        }
    }

    /// Send what was held back, since nobody else has.
    fn send_late(&self, held: Held, link: &Link, deadline: Deadline) {
        let mut tx = self.lane.tx.0.lock();
        if tx.turn == held.turn {
            // Those who were woken and have not got to run yet have broken no promise.
            if self.lane.summoned.load(SeqCst) == 0 && tx.away > 0 {
                tx.away = 0;
                tx.trust.broken();
            }
            self.send_held(tx, link, deadline);
        }
    }

    /// Send what was held back, if it still is.
    fn send_held<'b>(&'b self, mut tx: MutexGuard<'b, Tx>, link: &Link, deadline: Deadline) {
        self.lane.held.store(false, SeqCst);
        if !tx.queue.is_empty() && !tx.sending && !tx.closed {
            tx.sending = true;
            self.send(tx, link, deadline);
        }
    }

    /// The sender's role: send until nothing is queued.
    fn send<'b>(&'b self, mut tx: MutexGuard<'b, Tx>, link: &Link, deadline: Deadline) {
        let lane = self.lane;
        loop {
            let spare = tx.spare.take().unwrap_or_else(Queue::new);
            let mut queue = std::mem::replace(&mut tx.queue, spare);
            let mut sealed = std::mem::take(&mut tx.sealed);
            tx.turn = tx.turn.wrapping_add(1);
            lane.flying.fetch_add(queue.len() as u32, SeqCst);
            drop(tx);
            let go_on = || {
                if deadline.passed() {
                    lane.die(self.pool.too_late(), link);
                }
                !lane.dead.load(Acquire)
            };
            let fd = link.fd.as_raw_fd();
            let result = queue.send(fd, link.tls.as_deref(), &mut sealed, deadline, go_on);
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

    /// Wait until the slot is over; whether the deadline passed before. A request that is `held` back
    /// is sent in any case after a little while: those who should may not get to run.
    fn wait(&self, link: &Link, slot: &Slot, mut held: Option<Held>, deadline: Deadline) -> bool {
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
            if for_role && lane.wants_receiver() && !lane.receiving.swap(true, SeqCst) {
                self.receive(link, slot, held.take(), deadline, &mut late);
                continue;
            }
            if for_role {
                listed = true;
                lane.waiting.0.fetch_or(bit, SeqCst);
                fence(SeqCst);
            } else if listed {
                // The role may have been offered to this one.
                lane.offer();
            }
            let now = slot.state.load(SeqCst);
            let stay = !is_over(now)
                && (!for_role
                    || (now & REPLIED == state & REPLIED
                        && (lane.receiving.load(SeqCst) || !lane.wants_receiver())));
            if stay {
                let until = if late { Deadline::NEVER } else { deadline };
                let most = held.map_or(Deadline::NEVER, |h| h.until);
                sys::futex_wait(&lane.epoch, epoch, fold(bit), until.min(most));
                if let Some(h) = held
                    && h.until.passed()
                {
                    held = None;
                    self.send_late(h, link, deadline);
                }
            }
            if for_role && lane.waiting.0.fetch_and(!bit, SeqCst) & bit == 0 {
                self.heed(link, deadline);
            }
            if stay && !late && !is_over(slot.state.load(Acquire)) && deadline.passed() {
                late = true;
                lane.die(self.pool.too_late(), link);
            }
        }
        lane.offer();
        late
    }

    /// The receiver's role: until the slot's own reply has come.
    fn receive(
        &self,
        link: &Link,
        slot: &Slot,
        mut held: Option<Held>,
        deadline: Deadline,
        late: &mut bool,
    ) {
        let lane = self.lane;
        let _role = Role { claim: self, link };
        // SAFETY: the receiver's alone, which we are until `_role` is dropped.
        let rx = unsafe { &mut *lane.rx.get() };
        loop {
            if lane.dead.load(Acquire) {
                return self.fail_all(link);
            }
            if slot.state.load(Acquire) & (REPLIED | FAILED) != 0 {
                return;
            }
            if let Some(h) = held
                && !sys::is_readable(link.fd.as_raw_fd(), h.until)
            {
                if h.until.passed() {
                    held = None;
                    self.send_late(h, link, deadline);
                }
                continue;
            }
            let mut came = Came::default();
            let large = lane.large.load(Relaxed) > 0;
            let mut check = false;
            // Callers who are about to run have better use for a processor.
            let limit = match held.is_none() && lane.summoned.load(Relaxed) == 0 {
                true => self.pool.source.settings.busy_poll,
                false => Duration::ZERO,
            };
            match rx.fill_soon(link, &lane.slots, large, limit) {
                Ok(soon) => {
                    if let Err(why) = reply::drain(rx, link, &lane.slots, &mut came) {
                        lane.die(why, link);
                    }
                    let left =
                        lane.flying.fetch_sub(came.replies, SeqCst).wrapping_sub(came.replies);
                    if soon {
                        // Replies that come one by one had better come together.
                        rx.polling.found(|| left == 0);
                    }
                    if came.replies > 0 && !lane.answered.load(Relaxed) {
                        lane.answered.store(true, Relaxed);
                    }
                    // Others may be served for as long as they like, and our own reply may come a
                    // byte at a time.
                    check = deadline.passed_lately();
                }
                Err(Stopped::Os(libc::EINTR | libc::EAGAIN)) => check = true,
                Err(why) => lane.die(stop_error(why, link), link),
            }
            let sleepers = came.over & lane.waiting.0.load(SeqCst);
            if came.replies > 1 {
                let mut tx = lane.tx.0.lock();
                if tx.trust.ask() {
                    tx.away += came.replies;
                }
            }
            if sleepers != 0 {
                lane.summon(sleepers);
            }
            if check && !*late && deadline.passed() {
                *late = true;
                lane.die(self.pool.too_late(), link);
            }
        }
    }

    /// See to it that a dead connection is reported, also if nobody waits on it any more.
    fn bury(&self, link: &Link) {
        if self.lane.dead.load(SeqCst) && !self.lane.receiving.swap(true, Acquire) {
            let _role = Role { claim: self, link };
            self.fail_all(link);
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
        lane.summon(u64::MAX);
        // Also those that are not on the list.
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
