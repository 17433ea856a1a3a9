//! Locks on byte ranges, for read-modify-write of blocks that several requests share.
//!
//! Any number of ordinary writes may hold overlapping ranges together; a read-modify-write holds
//! its range alone. Held across I/O by purpose: it orders only requests that touch the same block.

use parking_lot::{Condvar, Mutex};

#[derive(Clone, Copy, PartialEq)]
struct Held {
    start: u64,
    end: u64,
    alone: bool,
}

/// The ranges held at present.
#[derive(Default)]
pub struct RangeLock {
    held: Mutex<Vec<Held>>,
    freed: Condvar,
}

/// A held range; given back when dropped.
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    mine: Held,
}

impl RangeLock {
    /// Hold `start..end`, waiting for holders that are in the way; `alone` keeps all others out.
    pub fn lock(&self, start: u64, end: u64, alone: bool) -> RangeGuard<'_> {
        let mine = Held { start, end, alone };
        let mut held = self.held.lock();
        while held.iter().any(|h| h.start < end && start < h.end && (alone || h.alone)) {
            self.freed.wait(&mut held);
        }
        held.push(mine);
        RangeGuard { lock: self, mine }
    }

    /// [`RangeLock::lock`] if nobody has to be waited for.
    pub fn try_lock(&self, start: u64, end: u64, alone: bool) -> Option<RangeGuard<'_>> {
        let mine = Held { start, end, alone };
        let mut held = self.held.lock();
        let free = !held.iter().any(|h| h.start < end && start < h.end && (alone || h.alone));
        free.then(|| {
            held.push(mine);
            RangeGuard { lock: self, mine }
        })
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = self.lock.held.lock();
        if let Some(i) = held.iter().position(|h| *h == self.mine) {
            held.swap_remove(i);
        }
        drop(held);
        self.lock.freed.notify_all();
    }
}
