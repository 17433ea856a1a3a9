//! Whether a plugin's reads, or its writes, are over at once, so that a thread that others wait for may make
//! them: a disk in memory answers in less time than it takes to hand the call to another thread.
//!
//! Nobody can know before a call how long it takes. But what it costs on the average is known, and calls
//! that cost less than handing them over are best made at once. So each call that is timed earns what a
//! hand-over costs, and pays what it took. As long as there is enough left, calls are made at once. One
//! that hangs for long has to be made up for by many quick ones, which others make meanwhile; a thread that
//! had to give way to another for a moment is no matter.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What a call earns: about what a hand-over to another thread and back costs, nanoseconds.
const EARNED: i64 = 20_000;
/// With so much, calls are quick: at first, sixteen of them prove it.
const ENOUGH: i64 = 16 * EARNED;
/// What can be saved, and what can be owed.
const MOST: i64 = 1_000_000;
const LEAST: i64 = -1_000_000_000;

/// How calls have gone. Of two threads that learn something at a time one may be forgotten.
pub(super) struct Quick(AtomicI64);

impl Quick {
    pub(super) fn new() -> Self {
        Self(AtomicI64::new(0))
    }

    /// Whether the next one will be over at once, as far as anybody can tell.
    #[inline(always)]
    pub(super) fn is_proven(&self) -> bool {
        self.0.load(Relaxed) >= ENOUGH
    }

    /// Make a call and learn from it.
    pub(super) fn watch<R>(&self, call: impl FnOnce() -> R) -> R {
        let begun = Instant::now();
        let result = call();
        self.learn(begun.elapsed());
        result
    }

    fn learn(&self, took: Duration) {
        let took = i64::try_from(took.as_nanos()).unwrap_or(i64::MAX);
        let saved = self.0.load(Relaxed);
        self.0.store((saved + EARNED).saturating_sub(took).clamp(LEAST, MOST), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Duration = Duration::from_micros(1);
    const SLOW: Duration = Duration::from_millis(10);

    fn until_proven(quick: &Quick) -> u32 {
        let mut n = 0;
        while !quick.is_proven() {
            quick.learn(FAST);
            n += 1;
        }
        n
    }

    #[test]
    fn a_slow_call_has_to_be_made_up_for() {
        let quick = Quick::new();
        assert_eq!(until_proven(&quick), 17);
        quick.learn(SLOW);
        assert!(!quick.is_proven());
        // 10 ms and what was missing, 19 us at a time.
        assert_eq!(until_proven(&quick), 526);
        for _ in 0..100 {
            quick.learn(FAST);
        }
        // Had to give way to another thread.
        quick.learn(Duration::from_micros(300));
        assert!(quick.is_proven());
        // What hung for an hour may still come back.
        quick.learn(Duration::from_secs(3600));
        assert_eq!(until_proven(&quick), 52_649);
    }

    #[test]
    fn slow_calls_are_hardly_ever_made_at_once_when_there_are_many() {
        let made = |one_in: u32| {
            let quick = Quick::new();
            let mut at_once = 0;
            for i in 1..=100_000 {
                let slow = i % one_in == 0;
                at_once += u32::from(slow && quick.is_proven());
                quick.learn(if slow { SLOW } else { FAST });
            }
            at_once
        };
        // Only the first, which nobody could expect.
        assert_eq!([2, 10, 100, 400].map(made), [0, 0, 1, 1]);
    }
}
