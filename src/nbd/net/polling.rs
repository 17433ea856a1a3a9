//! Busy polling: a thread looks for what its peer sends for a moment before it sleeps.
//!
//! Sleeping and being woken costs both sides some microseconds each time, more than a small request
//! itself, and most of all in virtual machines, where waking another processor leaves the guest. A peer
//! that answers at once is therefore better waited for awake. Three things keep this from wasting a
//! processor that others have use for:
//! - It lasts some microseconds at most, and happens only after something came: an idle connection sleeps.
//! - Where it is in vain, or gains nothing, it is done more and more seldom ([`Trust`]): a peer that is slow
//!   costs one moment in a thousand waits.
//! - No more threads are awake for it than half of the processors: the peer may be on this machine, too.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::Trust;

/// How long to look, unless it is set otherwise.
pub const DEFAULT: Duration = Duration::from_micros(50);
/// The longest that can be set, microseconds.
pub const MOST: u32 = 1000;
/// Between two looks, which are system calls, the processor rests for so many turns.
const REST: u32 = 10;

/// Of so many successes, one is asked about at least.
const FAITH: u32 = 1023;

/// Threads that are awake for peers: they look, or do what they were asked for.
static AWAKE: AtomicUsize = AtomicUsize::new(0);

/// Whether so many threads leave enough processors to others.
fn leaves_room(awake: usize) -> bool {
    static HALF: OnceLock<usize> = OnceLock::new();
    let half =
        *HALF.get_or_init(|| std::thread::available_parallelism().map_or(0, |n| n.get() / 2));
    awake <= half
}

/// A thread that is awake for a peer, as long as this exists.
pub struct Awake(());

impl Awake {
    /// From now on.
    pub fn begin() -> Self {
        AWAKE.fetch_add(1, Relaxed);
        Self(())
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        AWAKE.fetch_sub(1, Relaxed);
    }
}

/// A thread that is [`Awake`] is not while it does this, which may wait.
pub fn asleep<T>(wait: impl FnOnce() -> T) -> T {
    struct Back;
    impl Drop for Back {
        fn drop(&mut self) {
            AWAKE.fetch_add(1, Relaxed);
        }
    }
    AWAKE.fetch_sub(1, Relaxed);
    let _back = Back;
    wait()
}

/// Busy polling of one connection.
#[derive(Default)]
pub struct Polling {
    trust: Trust,
    /// Successes of which it is not asked whether they are worth it.
    unasked: u32,
    /// How many that will be the next time.
    faith: u32,
}

impl Polling {
    /// Look again and again for something to come, for `limit` at most; `None` if it is to be slept for.
    /// The thread is [`Awake`]. Of what was found the caller says afterwards whether it was [`worth`] it.
    ///
    /// [`worth`]: Self::found
    pub fn look<T, E>(
        &mut self,
        limit: Duration,
        look: impl FnMut() -> Result<Option<T>, E>,
    ) -> Result<Option<T>, E> {
        self.look_while(|| leaves_room(AWAKE.load(Relaxed)), limit, look)
    }

    fn look_while<T, E>(
        &mut self,
        has_room: impl Fn() -> bool,
        limit: Duration,
        mut look: impl FnMut() -> Result<Option<T>, E>,
    ) -> Result<Option<T>, E> {
        if limit.is_zero() || !has_room() || !self.trust.ask() {
            return Ok(None);
        }
        let begin = Instant::now();
        loop {
            if let Some(found) = look()? {
                return Ok(Some(found));
            }
            if !has_room() {
                return Ok(None);
            }
            if begin.elapsed() >= limit {
                self.trust.broken();
                return Ok(None);
            }
            (0..REST).for_each(|_| std::hint::spin_loop());
        }
    }

    /// What came in time was too little to look for.
    pub fn vain(&mut self) {
        self.faith = 0;
        self.unasked = 0;
        self.trust.broken();
    }

    /// Something came in time. It was `worth` looking for if the peer waits for us, rather than being busy
    /// with what it has: then, sleeping lets more of its requests or replies come together. The question is
    /// asked the more seldom the more often the answer was yes.
    pub fn found(&mut self, worth: impl FnOnce() -> bool) {
        if self.unasked > 0 {
            self.unasked -= 1;
        } else if worth() {
            self.faith = (2 * self.faith + 1).min(FAITH);
            self.unasked = self.faith;
        } else {
            return self.vain();
        }
        self.trust.kept();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const LIMIT: Duration = Duration::from_nanos(1);

    /// How many of `waits` waits are looked for, in which `found` comes and is or is not `worth` it.
    fn looks(polling: &mut Polling, waits: u32, found: Option<()>, worth: bool) -> u32 {
        let mut looked = 0;
        for _ in 0..waits {
            let mut once = 0;
            let look = || {
                once = 1;
                Ok::<_, ()>(found)
            };
            if polling.look_while(|| true, LIMIT, look) == Ok(Some(())) {
                polling.found(|| worth);
            }
            looked += once;
        }
        looked
    }

    #[test]
    fn what_does_not_come_is_looked_for_seldom() {
        let mut polling = Polling::default();
        assert!((1..=20).contains(&looks(&mut polling, 10_000, None, true)));
        assert_eq!(looks(&mut polling, 1100, Some(()), true).min(70), 70);
        assert_eq!(looks(&mut polling, 1000, Some(()), true), 1000);
    }

    #[test]
    fn a_peer_that_does_not_wait_is_not_looked_for_long() {
        let mut polling = Polling::default();
        assert!((1..=20).contains(&looks(&mut polling, 10_000, Some(()), false)));
        assert!(looks(&mut polling, 100_000, Some(()), true) > 90_000);
        // It is not asked about each time: that costs a system call.
        let asked = Cell::new(0);
        for _ in 0..10_000 {
            polling.found(|| {
                asked.set(asked.get() + 1);
                true
            });
        }
        assert!((1..=20).contains(&asked.get()), "asked {} times", asked.get());
        assert!(looks(&mut polling, 10_000, Some(()), false) < 2000);
    }

    #[test]
    fn nothing_is_looked_for_when_others_need_the_processor_or_it_is_off() {
        let mut polling = Polling::default();
        let look = || -> Result<Option<()>, ()> { unreachable!("it looked") };
        assert_eq!(polling.look_while(|| false, LIMIT, look), Ok(None));
        assert_eq!(polling.look_while(|| true, Duration::ZERO, look), Ok(None));
        // Nor is it looked on when they come to need it: that says nothing against looking again.
        let room = Cell::new(true);
        let look = || {
            room.set(false);
            Ok::<Option<()>, ()>(None)
        };
        assert_eq!(polling.look_while(|| room.get(), DEFAULT, look), Ok(None));
        assert_eq!(looks(&mut polling, 10, Some(()), true), 10);
        assert_eq!(polling.look_while(|| true, LIMIT, || Err::<Option<()>, _>(5)), Err(5));
    }
}
