//! Counting the calls under way on a device that layers come onto.

use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering::SeqCst};

use parking_lot::Mutex;

use crate::block::InFlight;

/// Who counts the calls under way. It changes when a layer is pushed: what was the tree until then, and
/// knows its counter, goes below with it.
pub(super) struct Calls {
    now: AtomicPtr<InFlight>,
    /// That one, and those before: who has just read `now` may still count there.
    all: Mutex<Vec<Arc<InFlight>>>,
}

impl Calls {
    pub(super) fn new(calls: Arc<InFlight>) -> Self {
        let now = AtomicPtr::new(Arc::as_ptr(&calls).cast_mut());
        Self { now, all: Mutex::new(vec![calls]) }
    }

    #[inline]
    pub(super) fn get(&self) -> &InFlight {
        // SAFETY: it is in `all`, from which nothing is taken.
        unsafe { &*self.now.load(SeqCst) }
    }

    pub(super) fn shared(&self) -> Arc<InFlight> {
        // The last is the present one.
        self.all.lock().last().cloned().unwrap_or_default()
    }

    /// Count in another from now on. Whoever counts in the old one must be gone, or find no tree.
    pub(super) fn replace(&self, new: Arc<InFlight>) {
        let mut all = self.all.lock();
        self.now.store(Arc::as_ptr(&new).cast_mut(), SeqCst);
        all.push(new);
    }
}
