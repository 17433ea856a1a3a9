//! The end of an open chain, and its replacement by another.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::time::Duration;

use super::{Image, OpenFlags, Options, Shared, Tree, chain};
use crate::block::{Error, Result};
use crate::log::{Level, log};

impl Image {
    /// Open the source anew with other flags (and options, or the same as before), beneath all of
    /// its contexts. Calls wait meanwhile; if it fails, all stays as it was.
    pub fn reopen(&self, options: Option<&Options>, flags: OpenFlags) -> Result<()> {
        super::how::of_a_caller(flags)?;
        let _admin = self.shared.admin.lock();
        let old = self.shared.tree.load(SeqCst);
        if old.is_null() {
            return Err(Error::BadHandle("the device is closed".into()));
        }
        // SAFETY: the tree is replaced and freed under `admin` only, which is held.
        if let Some(below) = unsafe { &(*old).below } {
            // SAFETY: as above.
            super::layers::reopen_below(unsafe { &*old }, below, options, flags)?;
            self.write.store(flags.has(OpenFlags::RDWR), Relaxed);
            return Ok(());
        }
        // SAFETY: the tree is replaced and freed under `admin` only, which is held.
        chain::check_reopen(unsafe { &*old })?;
        self.shared.tree.store(ptr::null_mut(), SeqCst);
        self.shared.calls.get().wait();
        // SAFETY: we took it out, and no call uses it any more.
        let old = unsafe { Box::from_raw(old) };
        let new = (|| {
            // What the old one still holds in memory must be in the file before the new one reads
            // it. One that refuses writes holds nothing that it could still give.
            match close_tree(&old) {
                Ok(()) | Err(Error::Failed { .. } | Error::Corrupt { .. }) => {}
                // Neither does one that has lost its lease.
                Err(Error::Locked { .. }) if old.lease.as_ref().is_some_and(|l| l.is_lost()) => {}
                Err(e) => return Err(e),
            }
            let options = options.unwrap_or(&old.options);
            // It takes the locks over from the old one, and gives them back if it comes to nothing.
            chain::reopen(&old, options, flags, &self.shared.calls.shared())
        })();
        let (tree, result) = match new {
            Ok(new) => {
                self.write.store(flags.has(OpenFlags::RDWR), Relaxed);
                (Box::new(new), Ok(()))
            }
            Err(e) => (old, Err(e)),
        };
        self.shared.tree.store(Box::into_raw(tree), SeqCst);
        result
    }

    /// Flush, and close the source if this is its last context. The handle answers nothing more.
    pub fn close(self) -> Result<()> {
        // Closing the last context flushes, in its own way where a peer may be dead.
        let last = Arc::strong_count(&self.shared) == 1;
        let result = if last { Ok(()) } else { self.flush_for_close() };
        // Of two contexts that are closed at once exactly one is the last.
        match Arc::into_inner(self.shared) {
            Some(shared) => {
                let closed = shared.close();
                result.and(closed)
            }
            None => result,
        }
    }

    /// Flush because this handle, or a layer that stands on it, is closed: nobody is kept waiting by a peer
    /// that does not answer.
    pub(super) fn flush_for_close(&self) -> Result<()> {
        let call = self.call()?;
        if call.flags.0 & OpenFlags::NO_DATA != 0 || !call.flags.has(OpenFlags::RDWR) {
            return Ok(());
        }
        call.may_write()?;
        let _own = call.guard.own();
        call.top.driver().flush_to_close()
    }

    /// Flush and close now, whoever still has the handle: its calls answer `EBADF` from then on.
    /// For the end of the program.
    pub(crate) fn shut(&self) -> Result<()> {
        // Whoever ends the program from within a call must not wait for that call here.
        self.end(Some(Duration::from_secs(1)))
    }

    /// Flush and close, once the calls under way are over; `patience`: they are not waited for beyond a
    /// moment, nor is other work on the device beyond so long.
    fn end(&self, patience: Option<Duration>) -> Result<()> {
        let admin = &self.shared.admin;
        let held = match patience {
            None => Some(admin.lock()),
            Some(patience) => admin.try_lock_for(patience),
        };
        let Some(_admin) = held else {
            if let Some(call) = self.try_call() {
                tell_lost(&call, "work on it does not end");
            }
            return Ok(());
        };
        self.shared.closed.store(true, SeqCst);
        let tree = self.shared.tree.swap(ptr::null_mut(), SeqCst);
        if tree.is_null() {
            return Ok(());
        }
        if patience.is_none() {
            self.shared.calls.get().wait();
            // SAFETY: we took it out, and no call uses it any more.
            return end_tree(unsafe { Box::from_raw(tree) }, patience);
        }
        // A call that hangs must not keep the program from ending: what is under way is not waited
        // for beyond a moment, and then its tree is left to it.
        let mark = self.shared.calls.get().mark();
        for _ in 0..200 {
            if self.shared.calls.get().passed(mark) {
                // SAFETY: we took it out, and no call uses it any more.
                return end_tree(unsafe { Box::from_raw(tree) }, patience);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // SAFETY: never freed.
        let tree = unsafe { &*tree };
        let flushed = tree.may_write().and_then(|()| tree.top.driver().flush_to_close());
        // With what the layers above have just given it.
        tell_lost(tree, "a call on it does not end");
        flushed
    }
}

impl Shared {
    fn close(mut self) -> Result<()> {
        let tree = std::mem::replace(self.tree.get_mut(), ptr::null_mut());
        if tree.is_null() {
            return Ok(());
        }
        // SAFETY: made by Box::into_raw; this was the last context.
        end_tree(unsafe { Box::from_raw(tree) }, None)
    }
}

/// Close a tree that nobody uses any more, from the top down.
fn end_tree(mut tree: Box<Tree>, patience: Option<Duration>) -> Result<()> {
    let Some(below) = tree.below.take() else { return close_tree(&tree) };
    // What the layer still has goes to what is below; then its threads end and its contexts go. Only then
    // nobody uses what is below any more, which is closed in any case.
    let own = if tree.flags.has(OpenFlags::RDWR) { tree.top.driver().close() } else { Ok(()) };
    drop(tree);
    own.and(below.end(patience))
}

/// Say what the layers of a tree keep that is lost, for they can not be closed.
fn tell_lost(tree: &Tree, why: &str) {
    if let Some(what) = tree.top.driver().kept_until_closed() {
        log(
            Level::Error,
            format_args!("{}: {why}, so it is not closed: {what} are lost", tree.name),
        );
    }
    if let Some(below) = &tree.below
        && let Some(call) = below.try_call()
    {
        tell_lost(&call, why);
    }
}

/// Have everything that a tree without layers holds in its files. It stays usable.
pub(super) fn close_tree(tree: &Tree) -> Result<()> {
    if tree.flags.has(OpenFlags::CHECK) {
        // Its driver may know what is not true any more (see `Image::check`): only what is in the file
        // already is made to last.
        return if tree.flags.has(OpenFlags::RDWR) { tree.top.flush() } else { Ok(()) };
    }
    if tree.flags.has(OpenFlags::RDWR) && !tree.flags.has(OpenFlags::INFO_ONLY) {
        // What is not in the file yet is lost; writing it might harm what is another's now.
        tree.may_write()?;
        tree.top.driver().close()
    } else {
        Ok(())
    }
}
