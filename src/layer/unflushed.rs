//! What was written and not flushed yet.
//!
//! Flushes are numbered. A write notes the number of the next flush, which is the first that can cover it;
//! a flush that succeeds notes its own.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// See the module's text.
#[derive(Default)]
pub(super) struct Unflushed {
    /// Flushes begun.
    begun: AtomicU64,
    /// The first flush that covers all writes; 0 = nothing was written.
    written: AtomicU64,
    /// The highest number of a flush that succeeded.
    flushed: AtomicU64,
}

impl Unflushed {
    /// Something is written: to be said when the write is over, before its caller knows.
    #[inline]
    pub(super) fn wrote(&self) {
        let covered = self.begun.load(SeqCst) + 1;
        if self.written.load(SeqCst) < covered {
            self.written.fetch_max(covered, SeqCst);
        }
    }

    /// Whether a flush has something to do.
    #[inline]
    pub(super) fn any(&self) -> bool {
        self.written.load(SeqCst) > self.flushed.load(SeqCst)
    }

    /// A flush begins; its number.
    pub(super) fn begin(&self) -> u64 {
        self.begun.fetch_add(1, SeqCst) + 1
    }

    /// The flush of that number succeeded.
    pub(super) fn flushed(&self, number: u64) {
        self.flushed.fetch_max(number, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_written_before_it_began() {
        let u = Unflushed::default();
        assert!(!u.any());
        u.wrote();
        let first = u.begin();
        u.wrote();
        u.flushed(first);
        assert!(u.any(), "written while the flush ran");
        let (second, third) = (u.begin(), u.begin());
        u.flushed(third);
        assert!(!u.any());
        u.flushed(second);
        assert!(!u.any());
    }
}
