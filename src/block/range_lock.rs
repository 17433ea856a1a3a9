//! Locks on byte ranges, for read-modify-write of blocks that several requests share.
//!
//! Any number of ordinary writes may hold overlapping ranges together; a read-modify-write holds
//! its range alone. Held across I/O by purpose: it orders only requests that touch the same block.
//!
//! Of two that are in each other's way the one that came first goes first, so that nobody waits for ever
//! behind others that take turns. Whoever holds a range must therefore not ask the same lock for another.

use parking_lot::{Condvar, Mutex};

#[derive(Clone, Copy, PartialEq)]
struct Range {
    start: u64,
    end: u64,
    alone: bool,
}

impl Range {
    fn is_in_the_way_of(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end && (self.alone || other.alone)
    }
}

#[derive(Default)]
struct State {
    held: Vec<Range>,
    /// By number, in the order in which they came.
    waiting: Vec<(u64, Range)>,
    numbers: u64,
}

impl State {
    /// Whether a range can be held now by who has this number.
    fn is_free(&self, mine: &Range, number: u64) -> bool {
        let before = self.waiting.iter().take_while(|w| w.0 < number).map(|w| &w.1);
        !self.held.iter().chain(before).any(|other| other.is_in_the_way_of(mine))
    }
}

/// The ranges held at present, and who waits for some.
#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
    freed: Condvar,
}

/// A held range; given back when dropped.
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    mine: Range,
}

impl RangeLock {
    /// Hold `start..end`, waiting for holders that are in the way, and for those who wait since before;
    /// `alone` keeps all others out.
    pub fn lock(&self, start: u64, end: u64, alone: bool) -> RangeGuard<'_> {
        let mine = Range { start, end, alone };
        let mut state = self.state.lock();
        if !state.is_free(&mine, u64::MAX) {
            let number = state.numbers;
            state.numbers += 1;
            state.waiting.push((number, mine));
            while !state.is_free(&mine, number) {
                self.freed.wait(&mut state);
            }
            state.waiting.retain(|w| w.0 != number);
        }
        state.held.push(mine);
        RangeGuard { lock: self, mine }
    }

    /// [`RangeLock::lock`] if nobody has to be waited for.
    pub fn try_lock(&self, start: u64, end: u64, alone: bool) -> Option<RangeGuard<'_>> {
        let mine = Range { start, end, alone };
        let mut state = self.state.lock();
        state.is_free(&mine, u64::MAX).then(|| {
            state.held.push(mine);
            RangeGuard { lock: self, mine }
        })
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.lock.state.lock();
        if let Some(i) = state.held.iter().position(|h| *h == self.mine) {
            state.held.swap_remove(i);
        }
        drop(state);
        self.lock.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_to_hold_alone_is_not_overtaken_by_those_who_share() {
        let lock = RangeLock::default();
        let order = Mutex::new(Vec::new());
        let waiting = |n: usize| {
            while lock.state.lock().waiting.len() < n {
                std::thread::yield_now();
            }
        };
        let shared = lock.lock(0, 10, false);
        std::thread::scope(|s| {
            s.spawn(|| {
                let _alone = lock.lock(5, 15, true);
                order.lock().push("alone");
            });
            waiting(1);
            assert!(lock.try_lock(5, 6, false).is_none(), "it is in the way of who waits");
            s.spawn(|| {
                let _shared = lock.lock(5, 6, false);
                order.lock().push("shared");
            });
            waiting(2);
            assert!(lock.try_lock(0, 5, false).is_some(), "beside it others go on");
            assert!(lock.try_lock(15, 20, true).is_some());
            drop(shared);
        });
        assert_eq!(*order.lock(), ["alone", "shared"]);
        assert!(lock.try_lock(0, u64::MAX, true).is_some(), "nothing is left");
    }
}
