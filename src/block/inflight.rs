//! Calls under way on a device, counted so cheaply that every read can be, and a way to know that
//! all that began before some moment have ended.
//!
//! Why it is needed: a read looks up where a cluster lies and then reads there without any lock. If
//! the cluster is freed and handed to another writer in between, the read would return the other's
//! bytes (and a write would destroy them). So a freed cluster is handed out again only when every
//! call that may have seen its old place has returned. This is sleepable read-copy-update: two
//! sets of counters, spread over cache lines; new calls count in the current set, and after the
//! sets were swapped twice with the old one found empty each time, all earlier calls are over.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*};

use parking_lot::Mutex;

/// Enough for the cores of a large host to seldom meet on a line.
const STRIPES: usize = 16;

#[repr(align(128))]
#[derive(Default)]
struct Counter(AtomicUsize);

/// The calls under way on one device.
pub struct InFlight {
    /// Tells the device from all others, for as long as the process lives.
    id: usize,
    counters: [[Counter; STRIPES]; 2],
    /// How often the sets were swapped; its lowest bit names the current set.
    phase: AtomicU64,
    advance: Mutex<()>,
}

impl Default for InFlight {
    fn default() -> Self {
        let (counters, phase, advance) = Default::default();
        Self { id: Self::fresh_id(), counters, phase, advance }
    }
}

/// A call under way; ends when dropped.
pub struct Guard<'a>(&'a AtomicUsize);

thread_local! {
    /// The counter of a call of this thread that does not count for [`InFlight::passed`] here.
    static OWN: Cell<*const AtomicUsize> = const { Cell::new(ptr::null()) };
}

/// While it lives, this thread's call does not hold marks back that are asked for in this thread.
pub struct Own(*const AtomicUsize);

impl Guard<'_> {
    /// Say that this call keeps nothing that it has looked up where it asks whether a mark has
    /// passed, so that it need not wait for itself.
    pub fn own(&self) -> Own {
        Own(OWN.replace(self.0))
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        OWN.set(self.0);
    }
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.fetch_sub(1, Release);
    }
}

/// A counter for this thread: threads take them in turn.
#[inline]
fn stripe() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: Cell<usize> = const { Cell::new(usize::MAX) });
    MINE.with(|mine| {
        if mine.get() == usize::MAX {
            mine.set(NEXT.fetch_add(1, Relaxed) % STRIPES);
        }
        mine.get()
    })
}

impl InFlight {
    /// A number that no device has had.
    pub fn fresh_id() -> usize {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        NEXT.fetch_add(1, Relaxed)
    }

    /// The number of the device that was opened with this counter.
    pub fn id(&self) -> usize {
        self.id
    }

    /// Count a call as under way until the guard is dropped. Take it before looking anything up.
    #[inline]
    pub fn enter(&self) -> Guard<'_> {
        let set = self.phase.load(Relaxed) as usize & 1;
        let counter = &self.counters[set][stripe()].0;
        counter.fetch_add(1, SeqCst);
        // Nothing that follows may be read before the count is seen. On x86-64 the addition itself
        // sees to that; elsewhere only its load is ordered.
        #[cfg(not(target_arch = "x86_64"))]
        std::sync::atomic::fence(SeqCst);
        Guard(counter)
    }

    /// A mark to give to [`InFlight::passed`]: "all calls that are under way now".
    pub fn mark(&self) -> u64 {
        // Two swaps that begin after now are needed; the one after the next may be half done.
        self.phase.load(SeqCst) + 2
    }

    /// Whether every call that was under way at `mark` has ended. Never waits.
    pub fn passed(&self, mark: u64) -> bool {
        while self.phase.load(SeqCst) < mark {
            let Some(_one) = self.advance.try_lock() else { return false };
            let phase = self.phase.load(SeqCst);
            // The set that is about to become current must have drained since it was last current.
            let next = (phase as usize + 1) & 1;
            if !self.is_empty(next) {
                return false;
            }
            self.phase.store(phase + 1, SeqCst);
        }
        // The last swap only sent new calls elsewhere: those of the set before it must be gone.
        let old = (self.phase.load(SeqCst) as usize + 1) & 1;
        self.phase.load(SeqCst) > mark || self.is_empty(old)
    }

    fn is_empty(&self, set: usize) -> bool {
        let own = OWN.get();
        self.counters[set]
            .iter()
            .all(|c| c.0.load(SeqCst) == usize::from(ptr::eq(own, &raw const c.0)))
    }

    /// Wait until every call that is under way now has ended. The caller must not be one of them.
    pub fn wait(&self) {
        let mark = self.mark();
        let mut spins = 0u32;
        while !self.passed(mark) {
            spins += 1;
            if spins < 64 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_passes_only_when_earlier_calls_have_ended() {
        let f = InFlight::default();
        let early = f.enter();
        let mark = f.mark();
        assert!(!f.passed(mark));
        let late = f.enter();
        assert!(!f.passed(mark));
        drop(early);
        // `late` may sit in either set, so a mark may have to wait for it, but never for ever.
        drop(late);
        assert!(f.passed(mark));
        f.wait();
    }

    #[test]
    fn a_call_need_not_wait_for_itself() {
        let f = InFlight::default();
        let me = f.enter();
        let mark = f.mark();
        assert!(!f.passed(mark));
        let own = me.own();
        assert!(f.passed(mark));
        let other = std::thread::scope(|s| s.spawn(|| std::mem::forget(f.enter())).join());
        assert!(other.is_ok());
        let mark = f.mark();
        assert!(!f.passed(mark), "another's call still counts");
        drop(own);
    }

    #[test]
    fn calls_of_both_sets_hold_a_mark_back() {
        let f = InFlight::default();
        let a = f.enter();
        let m = f.mark();
        assert!(!f.passed(m), "one swap at most can happen while a is there");
        let b = f.enter();
        let m2 = f.mark();
        drop(a);
        f.passed(m);
        assert!(!f.passed(m2), "b was under way at m2");
        drop(b);
        assert!(f.passed(m2));
    }
}
