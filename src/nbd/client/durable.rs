//! What the server has acknowledged and may still lose: writes since the last flush.
//!
//! A server that is gone may have died and taken with it what it kept in memory. As long as one
//! connection survives it has not. When all are lost while there are acknowledged writes that no
//! flush has covered, nobody can tell whether they are still there: the next flush must fail, and
//! writes are refused from then on, as after every flush that failed.
//!
//! How it is known: flushes are numbered. An acknowledged write notes the number of the last flush
//! that began; a flush that succeeds notes its own. A write that has noted `n` saw no later flush
//! begin after it was acknowledged, so a flush that covers it has a number above `n`. All losses are
//! numbered too: a write that was acknowledged on a connection of an earlier number, and notes that
//! only after the loss, reports it itself.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

use parking_lot::Mutex;

/// See the module's text.
#[derive(Default)]
pub(super) struct Durable {
    /// Flushes begun.
    begun: AtomicU64,
    /// Flushes begun, plus 1, when the last write was acknowledged.
    written: AtomicU64,
    /// The highest number of a flush that succeeded.
    flushed: AtomicU64,
    /// How often all connections were lost.
    losses: AtomicU64,
    lost: Mutex<Lost>,
    /// `lost` is not [`Lost::No`].
    failed: AtomicBool,
}

/// Whether acknowledged writes were lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Lost {
    #[default]
    No,
    /// They may have been, for this reason; no flush has told yet.
    Untold(String),
    /// A flush has told.
    Told(String),
}

impl Durable {
    /// The number of losses, to be asked for before a write is sent.
    #[inline]
    pub(super) fn losses(&self) -> u64 {
        self.losses.load(SeqCst)
    }

    /// A write was acknowledged that was sent when there had been so many losses.
    #[inline]
    pub(super) fn wrote(&self, losses: u64) {
        let mark = self.begun.load(SeqCst) + 1;
        if self.written.load(SeqCst) < mark {
            self.written.fetch_max(mark, SeqCst);
        }
        // Either whoever counts a loss sees the mark, or we see the count.
        if self.losses.load(SeqCst) != losses {
            self.note("the connection was lost just after a write was acknowledged");
        }
    }

    /// Whether a flush has something to do.
    pub(super) fn is_dirty(&self) -> bool {
        self.written.load(SeqCst) > self.flushed.load(SeqCst)
    }

    /// A flush begins; its number, for [`Durable::flush_succeeded`].
    pub(super) fn flush_begins(&self) -> u64 {
        self.begun.fetch_add(1, SeqCst) + 1
    }

    /// A flush succeeded on a connection of so many losses.
    pub(super) fn flush_succeeded(&self, number: u64) {
        self.flushed.fetch_max(number, SeqCst);
    }

    /// All connections were lost.
    pub(super) fn all_lost(&self, why: &str) {
        self.losses.fetch_add(1, SeqCst);
        if self.is_dirty() {
            self.note(why);
        }
    }

    fn note(&self, why: &str) {
        let mut lost = self.lost.lock();
        if *lost == Lost::No {
            *lost = Lost::Untold(why.to_owned());
            self.failed.store(true, SeqCst);
        }
    }

    /// A flush failed, and said so.
    pub(super) fn fail(&self, why: &str) {
        *self.lost.lock() = Lost::Told(why.to_owned());
        self.failed.store(true, SeqCst);
    }

    /// Whether acknowledged writes were lost.
    #[inline]
    pub(super) fn lost(&self) -> Lost {
        if self.failed.load(SeqCst) { self.lost.lock().clone() } else { Lost::No }
    }

    /// Whether acknowledged writes were lost, to be told by the flush that asks.
    pub(super) fn tell(&self) -> Lost {
        let mut lost = self.lost.lock();
        if let Lost::Untold(why) = &mut *lost {
            *lost = Lost::Told(std::mem::take(why));
        }
        lost.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_no_flush_covers_is_lost() {
        let d = Durable::default();
        d.all_lost("first");
        assert_eq!(d.lost(), Lost::No, "nothing was written");
        d.wrote(d.losses());
        assert!(d.is_dirty());
        let n = d.flush_begins();
        d.flush_succeeded(n);
        assert!(!d.is_dirty());
        d.all_lost("second");
        assert_eq!(d.lost(), Lost::No);
        let n = d.flush_begins();
        d.wrote(d.losses());
        d.flush_succeeded(n);
        assert!(d.is_dirty(), "acknowledged after the flush began");
        d.all_lost("third");
        assert_eq!(d.lost(), Lost::Untold("third".into()));
        assert_eq!(d.tell(), Lost::Told("third".into()));
    }

    #[test]
    fn a_write_noted_after_the_loss_counts() {
        let d = Durable::default();
        let before = d.losses();
        d.all_lost("gone");
        d.wrote(before);
        assert!(matches!(d.tell(), Lost::Told(_)));
    }
}
