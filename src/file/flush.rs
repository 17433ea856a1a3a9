//! Flushing: one `fdatasync` for everybody who asks at the same time.
//!
//! Promises: a flush that returns `Ok` covers every write that had returned before it was called;
//! a file that nothing was written to is not synced; flushes that arrive while one is running
//! wait for one that begins after their arrival, and share it. After an `fdatasync` that failed the
//! kernel counts the pages that it could not write as clean, so a second one would succeed and
//! mean nothing: the first failure is the answer for ever.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering::SeqCst};

use parking_lot::Mutex;

use super::folios::Folios;
use super::sys::{self, Errno};

#[derive(Default)]
struct Syncs {
    /// How many syncs were begun.
    begun: u64,
    /// How many of them are over.
    over: u64,
    /// The first one that failed, if one did.
    failed: Option<u64>,
}

/// What was written and not yet synced, and who waits for it.
#[derive(Default)]
pub struct Flusher {
    /// Something was written since the last sync began.
    unsynced: AtomicBool,
    /// The error number of the first sync that failed; 0 = none did.
    errno: AtomicI32,
    syncs: Mutex<Syncs>,
    /// The low bits of `Syncs::over`, to wait for. Who waits for sync n sleeps under bit n modulo 32, so
    /// that nobody is woken in vain: of those who need the next one only whoever is to begin it.
    over: AtomicU32,
    folios: Folios,
}

/// The bit under which those sleep who need sync `number`.
fn bit(number: u64) -> u32 {
    1 << (number % 32)
}

impl Flusher {
    /// Say that something is written: before the write, and again after it, lest a sync that runs
    /// meanwhile takes the first for itself and misses what came later.
    #[inline]
    pub fn dirty(&self) {
        // A store would take the line from the other writers each time.
        if !self.unsynced.load(SeqCst) {
            self.unsynced.store(true, SeqCst);
        }
    }

    /// Say where `count` bytes were written, of a file in the page cache.
    #[inline]
    pub fn wrote(&self, offset: u64, count: u64) {
        self.folios.wrote(offset, count);
    }

    /// A sync failed elsewhere (a write with FUA).
    pub fn fail(&self, errno: Errno) {
        let mut syncs = self.syncs.lock();
        self.note_failure(&mut syncs, errno, 0);
    }

    fn note_failure(&self, syncs: &mut Syncs, errno: Errno, which: u64) {
        // What was not written stays not written.
        self.unsynced.store(true, SeqCst);
        if self.errno.load(SeqCst) == 0 {
            self.errno.store(errno.max(1), SeqCst);
            syncs.failed = Some(which);
        }
    }

    /// Make what was written survive a power cut.
    pub fn flush(&self, file: &File) -> Result<(), Errno> {
        self.flush_by(|| {
            let done = sys::fdatasync(file);
            self.folios.synced(file);
            done
        })
    }

    fn flush_by(&self, sync: impl Fn() -> Result<(), Errno>) -> Result<(), Errno> {
        let mut syncs = self.syncs.lock();
        let running = syncs.begun != syncs.over;
        // The sync that covers all that was written until now: the running one began after the
        // last write if there is nothing unsynced, otherwise it is the next.
        let need = match (self.unsynced.load(SeqCst), running) {
            (false, false) if self.errno.load(SeqCst) == 0 => return Ok(()),
            (false, _) => syncs.begun,
            (true, _) => syncs.begun + 1,
        };
        loop {
            if syncs.failed.is_some_and(|failed| failed <= need) {
                return Err(self.errno.load(SeqCst));
            }
            if syncs.over >= need {
                return Ok(());
            }
            if syncs.begun != syncs.over {
                let over = syncs.over as u32;
                drop(syncs);
                sys::futex_wait(&self.over, over, bit(need));
                syncs = self.syncs.lock();
                continue;
            }
            syncs.begun += 1;
            // Before the sync begins: a write that ends later is for the next.
            self.unsynced.store(false, SeqCst);
            drop(syncs);
            let result = sync();
            syncs = self.syncs.lock();
            syncs.over = syncs.begun;
            let over = syncs.over;
            self.over.store(over as u32, SeqCst);
            if let Err(errno) = result {
                self.note_failure(&mut syncs, errno, over);
            }
            let failed = syncs.failed.is_some();
            drop(syncs);
            // Who begins the next sync first; it runs while the others wake. After a failure nobody
            // does.
            sys::futex_wake(&self.over, if failed { u32::MAX } else { 1 }, bit(over + 1));
            sys::futex_wake(&self.over, u32::MAX, bit(over));
            syncs = self.syncs.lock();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;

    #[test]
    fn a_clean_file_is_not_synced() {
        let (f, n) = (Flusher::default(), AtomicUsize::new(0));
        let sync = || {
            n.fetch_add(1, SeqCst);
            Ok(())
        };
        f.flush_by(sync).unwrap();
        assert_eq!(n.load(SeqCst), 0);
        f.dirty();
        f.flush_by(sync).unwrap();
        f.flush_by(sync).unwrap();
        assert_eq!(n.load(SeqCst), 1);
    }

    #[test]
    fn flushes_that_arrive_during_a_sync_share_the_next() {
        const WAITERS: usize = 8;
        let f = Flusher::default();
        let (count, asked) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (entered, leave) = (Barrier::new(2), Barrier::new(2));
        f.dirty();
        thread::scope(|s| {
            s.spawn(|| {
                f.flush_by(|| {
                    if count.fetch_add(1, SeqCst) == 0 {
                        entered.wait();
                        leave.wait();
                    }
                    Ok(())
                })
                .unwrap();
            });
            entered.wait();
            // Written after the running sync began: the waiters need another.
            f.dirty();
            for _ in 0..WAITERS {
                s.spawn(|| {
                    asked.fetch_add(1, SeqCst);
                    f.flush_by(|| {
                        count.fetch_add(1, SeqCst);
                        Ok(())
                    })
                    .unwrap();
                });
            }
            while asked.load(SeqCst) < WAITERS {
                thread::yield_now();
            }
            leave.wait();
        });
        assert_eq!(count.load(SeqCst), 2, "one that ran, one for all that came meanwhile");
    }

    #[test]
    fn a_failed_sync_is_the_answer_for_ever() {
        let f = Flusher::default();
        f.dirty();
        assert_eq!(f.flush_by(|| Err(libc::EDQUOT)), Err(libc::EDQUOT));
        assert_eq!(f.flush_by(|| Ok(())), Err(libc::EDQUOT));
        f.dirty();
        assert_eq!(f.flush_by(|| Err(libc::EIO)), Err(libc::EDQUOT));
    }

    #[test]
    fn no_write_that_ended_is_missed() {
        // `written` counts writes that ended, `stable` those that a sync saw when it began.
        let f = Flusher::default();
        let (written, stable) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..2000 {
                        f.dirty();
                        let mine = written.fetch_add(1, SeqCst) + 1;
                        f.dirty();
                        f.flush_by(|| {
                            let seen = written.load(SeqCst);
                            thread::yield_now();
                            stable.fetch_max(seen, SeqCst);
                            Ok(())
                        })
                        .unwrap();
                        assert!(stable.load(SeqCst) >= mine);
                    }
                });
            }
        });
    }
}
