//! Whether a device may still be written to: until a lease runs out, unless it is renewed.

use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::Duration;

/// A gate that closes by itself. Whoever keeps a lease moves the time; whoever writes looks.
pub struct Fence(AtomicU64);

/// No end.
const OPEN: u64 = u64::MAX;

impl Default for Fence {
    fn default() -> Self {
        Self(AtomicU64::new(OPEN))
    }
}

impl Fence {
    /// Now, in nanoseconds since the system was started, time asleep included: a lease does not wait
    /// for a host that sleeps. Steps of the wall clock are no matter here.
    pub fn now() -> u64 {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `t` is ours; the clock exists since Linux 2.6.39.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut t) };
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }

    /// Whether writes are to be refused. A stopped process that goes on finds it closed at once, before
    /// any thread of ours could have done so: hence the look at the clock.
    #[inline]
    pub fn is_closed(&self) -> bool {
        let until = self.0.load(Relaxed);
        until != OPEN && (until == 0 || Self::now() >= until)
    }

    /// Writes pass for `time` from `since` (of [`Fence::now`]) on; for ever if there is no time.
    pub fn open_for(&self, since: u64, time: Option<Duration>) {
        let end = |t: Duration| since.saturating_add(t.as_nanos() as u64).min(OPEN - 1);
        self.0.store(time.map_or(OPEN, end), SeqCst);
    }

    /// No write passes from now on.
    pub fn close(&self) {
        self.0.store(0, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_closes_by_itself_and_opens_again() {
        let fence = Fence::default();
        assert!(!fence.is_closed());
        fence.open_for(Fence::now(), Some(Duration::from_secs(1000)));
        assert!(!fence.is_closed());
        fence.open_for(Fence::now() - 2_000_000, Some(Duration::from_millis(1)));
        assert!(fence.is_closed());
        fence.open_for(Fence::now(), None);
        assert!(!fence.is_closed());
        fence.close();
        assert!(fence.is_closed());
    }
}
