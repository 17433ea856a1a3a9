//! A lane: one connection at a time, and the requests under way on it.
//!
//! No thread belongs to a lane. Callers do the work themselves, in two roles that one thread each
//! holds at a time: the *sender* sends all requests that have queued up ([`super::tx`]), the
//! *receiver* receives whatever comes and completes the requests of all. A caller who finds the
//! receiver's role free takes it until its own reply has come, and then hands it to one who waits;
//! the others sleep on one word, so that any number of them is woken with one system call. A lone
//! caller sends once, receives once, and meets nobody.
//!
//! Requests are sent together where that costs little time: a thread whose reply has come will mostly
//! ask for more. So a request that is queued while others have been woken and not run yet is left for
//! the last of them to send. And after replies that came together the lane waits for all of their
//! callers to come back, so that their next requests travel together, and the replies to those come
//! together again: each call then sleeps once, and many share the rest. Whoever queued first sends after
//! all when a moment has passed; and where callers turn out not to come back, they are not waited for any
//! more, or seldom ([`Trust`]).
//!
//! What keeps a request from being forgotten:
//! - Whoever gives up the receiver's role looks for sleepers afterwards and wakes one; whoever goes to
//!   sleep says so and then looks whether the role is free. Both in sequentially consistent order, so
//!   one of them sees the other. Everybody looks again when it leaves, in case the role was
//!   offered to it and it needs it no more, or it has sent for others.
//! - Nobody receives while all that is queued is held back. Who sends it counts it first, in `flying`,
//!   and then waits itself, or looks for sleepers as it leaves.
//! - The first whose request is held back has the duty to send what is queued in the end. It
//!   cannot leave before, for its own is there.
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
use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::call::Claim;
use super::pool::Pool;
use super::rx::{Link, Rx};
use super::slot::Slot;
use super::sys::{self, Deadline};
use super::tx::Queue;
use crate::block::Error;
use crate::nbd::net::Trust;
use crate::nbd::proto::{self, cmd};

/// Requests that can be under way on one connection.
pub(super) const SLOTS: usize = 64;

/// What everybody writes to, on a cache line of its own.
#[repr(align(128))]
pub(super) struct Apart<T>(pub T);

pub(super) struct Tx {
    /// Nothing is queued any more.
    pub(super) closed: bool,
    /// A thread is sending.
    pub(super) sending: bool,
    pub(super) queue: Box<Queue>,
    /// The other queue, while nobody is sending.
    pub(super) spare: Option<Box<Queue>>,
    /// For TLS records. The sender's, while there is one.
    pub(super) sealed: Vec<u8>,
    /// Counts what was sent: who holds a request back knows by it whether that has gone.
    pub(super) turn: u32,
    /// Callers whose replies came together, and who are expected to ask for more.
    pub(super) away: u32,
    /// Whether they come back together.
    pub(super) trust: Trust,
}

/// See the module's text.
pub(super) struct Lane {
    /// A bit for each slot that is free.
    pub(super) free: Apart<AtomicU64>,
    /// A bit for each caller that sleeps and could take the receiver's role.
    pub(super) waiting: Apart<AtomicU64>,
    /// What callers sleep on; counts wake-ups.
    pub(super) epoch: AtomicU32,
    /// Callers that were taken out of `waiting` and do not know it yet.
    pub(super) summoned: AtomicU32,
    /// Requests are queued that nobody sends: one who was summoned, or who comes back, will.
    pub(super) held: AtomicBool,
    /// Somebody is the receiver.
    pub(super) receiving: AtomicBool,
    /// Requests that were sent, or are about to be, and whose replies have not come.
    pub(super) flying: AtomicU32,
    /// Large reads under way.
    pub(super) large: AtomicU32,
    /// Requests are taken.
    pub(super) up: AtomicBool,
    /// The connection is broken; see `reason`.
    pub(super) dead: AtomicBool,
    pub(super) reason: Mutex<Option<Error>>,
    /// The connection was good for something: a request was answered.
    pub(super) answered: AtomicBool,
    pub(super) tx: Apart<Mutex<Tx>>,
    /// The sender has stopped.
    pub(super) idle: Condvar,
    pub(super) rx: UnsafeCell<Rx>,
    pub(super) link: UnsafeCell<Option<Link>>,
    /// The link's descriptor, -1 without: for a forked child, which may only close it.
    pub(super) fd: AtomicI32,
    pub(super) slots: Box<[Slot]>,
}

// SAFETY: `rx` is touched by the receiver alone, `link` is changed only by who has claimed all slots
// and read only by who has claimed one.
unsafe impl Sync for Lane {}
// SAFETY: nothing in it is bound to a thread.
unsafe impl Send for Lane {}

impl Lane {
    /// A lane without a connection.
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            free: Apart(AtomicU64::new(u64::MAX)),
            waiting: Apart(AtomicU64::new(0)),
            epoch: AtomicU32::new(0),
            summoned: AtomicU32::new(0),
            held: AtomicBool::new(false),
            receiving: AtomicBool::new(false),
            flying: AtomicU32::new(0),
            large: AtomicU32::new(0),
            up: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            reason: Mutex::new(None),
            answered: AtomicBool::new(false),
            tx: Apart(Mutex::new(Tx {
                closed: true,
                sending: false,
                queue: Queue::new(),
                spare: Some(Queue::new()),
                sealed: Vec::new(),
                turn: 0,
                away: 0,
                trust: Trust::default(),
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
                Ok(_) if self.up.load(SeqCst) => return Some(Claim::new(self, pool, index)),
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
        (tx.closed, tx.sending, tx.away) = (false, false, 0);
        drop(tx);
        self.waiting.0.store(0, Relaxed);
        self.large.store(0, Relaxed);
        self.flying.store(0, Relaxed);
        self.summoned.store(0, Relaxed);
        self.held.store(false, Relaxed);
        *self.reason.lock() = None;
        self.answered.store(false, Relaxed);
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

    pub(super) fn wait_idle(&self, tx: &mut MutexGuard<'_, Tx>, deadline: Deadline) {
        match deadline.left() {
            None => self.idle.wait(tx),
            Some(left) => drop(self.idle.wait_for(tx, left)),
        }
    }

    /// Give the connection up: note why, and end all system calls on it.
    pub(super) fn die(&self, why: Error, link: &Link) {
        self.reason.lock().get_or_insert(why);
        self.dead.store(true, SeqCst);
        sys::shutdown(link.fd.as_raw_fd());
        // Also those that wait for the sender only: one of all must become the receiver.
        self.wake(u64::MAX);
    }

    /// Wake the callers that sleep and whose bit is in `slots`.
    #[inline]
    pub(super) fn wake(&self, slots: u64) {
        self.epoch.fetch_add(1, SeqCst);
        sys::futex_wake(&self.epoch, fold(slots));
    }

    /// Take callers out of `waiting` and wake them; whether there were any.
    #[inline]
    pub(super) fn summon(&self, slots: u64) -> bool {
        let found = self.waiting.0.fetch_and(!slots, SeqCst) & slots;
        if found != 0 {
            self.summoned.fetch_add(found.count_ones(), SeqCst);
            self.wake(found);
        }
        found != 0
    }

    /// Whether somebody has to receive.
    #[inline]
    pub(super) fn wants_receiver(&self) -> bool {
        self.flying.load(SeqCst) > 0 || self.dead.load(SeqCst)
    }

    /// Offer the receiver's role to one who sleeps, if there is something to receive and nobody has it.
    #[inline]
    pub(super) fn offer(&self) {
        if !self.wants_receiver() || self.receiving.load(SeqCst) {
            return;
        }
        loop {
            let waiting = self.waiting.0.load(SeqCst);
            let one = waiting & waiting.wrapping_neg();
            if one == 0 {
                return;
            }
            if self.summon(one) {
                return;
            }
        }
    }
}

/// The bits of slots as a futex has them: two slots share one, and wake together.
#[inline]
pub(super) fn fold(slots: u64) -> u32 {
    (slots as u32) | (slots >> 32) as u32
}
