//! Work on an image as a whole that is not a resize: internal snapshots, the area of a machine's state.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

use super::{Image, OpenFlags, Options, Shared, Tree, Use, info_only};
use crate::block::*;

/// The tree, taken away from data calls; they get it back when this is dropped.
pub(super) struct Taken<'a> {
    shared: &'a Shared,
    /// What they get back.
    tree: *mut Tree,
}

impl<'a> Taken<'a> {
    /// Take it, and wait until no call has it. `admin` is held: nobody else replaces it, and who finds
    /// none waits for `admin`.
    pub(super) fn new(shared: &'a Shared) -> Self {
        let taken = Self { shared, tree: shared.tree.swap(ptr::null_mut(), SeqCst) };
        shared.calls.get().wait();
        taken
    }

    /// The tree that was taken.
    pub(super) fn tree(&mut self) -> &mut Tree {
        // SAFETY: it was taken out once no call had it any more, and `admin` is held.
        unsafe { &mut *self.tree }
    }

    /// Give them another; the one that was taken, which must outlive what still refers to it.
    pub(super) fn put(&mut self, new: Box<Tree>) -> Box<Tree> {
        let old = std::mem::replace(&mut self.tree, Box::into_raw(new));
        // SAFETY: made by Box::into_raw, and nobody else gets at it any more.
        unsafe { Box::from_raw(old) }
    }
}

impl Taken<'_> {
    /// Give them back what it has become elsewhere, with what counts its calls by now. Null: it was closed.
    pub(super) fn take_back(mut self, tree: *mut Tree, calls: Arc<InFlight>) {
        if tree.is_null() {
            self.shared.closed.store(true, SeqCst);
        }
        self.shared.calls.replace(calls);
        self.tree = tree;
    }

    /// Give them another; what was taken has become somebody else's.
    pub(super) fn give(mut self, new: Box<Tree>) {
        self.tree = Box::into_raw(new);
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.shared.tree.store(self.tree, SeqCst);
    }
}

impl Image {
    /// Work that changes the image while no call is under way on it: those of other threads wait until
    /// it is done.
    pub(crate) fn alone<T>(&self, work: impl FnOnce(&Tree) -> Result<T>) -> Result<T> {
        self.with_tree(true, |tree| {
            let _taken = Taken::new(&self.shared);
            work(tree)
        })
    }

    /// What internal snapshots there are.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        self.call()?.top.driver().snapshots()
    }

    /// Keep the state as it is now in an internal snapshot `name`. Options: `id`, `date`, `vm-clock`,
    /// `icount`. Calls of other threads wait meanwhile.
    pub fn snapshot_create(&self, name: &[u8], options: &Options) -> Result<()> {
        options.check(Use::Snapshot)?;
        let how = NewSnapshot {
            id: options.get("id").map(<[u8]>::to_vec),
            date: options.date("date")?,
            vm_clock: options.whole("vm-clock")?.unwrap_or(0),
            icount: options.whole("icount")?,
        };
        self.alone(|tree| tree.top.driver().snapshot_create(name, &how))
    }

    /// Make everything what it was in the snapshot with that ID, or else that name; the size too. Calls
    /// of other threads wait meanwhile.
    pub fn snapshot_apply(&self, which: &[u8]) -> Result<()> {
        self.alone(|tree| tree.top.driver().snapshot_apply(which))
    }

    /// Forget the snapshot with that ID, or else that name. Calls of other threads wait meanwhile.
    pub fn snapshot_delete(&self, which: &[u8]) -> Result<()> {
        self.alone(|tree| tree.top.driver().snapshot_delete(which))
    }

    /// Write to the area of the machine's state. The next snapshot takes it with it.
    pub fn vm_state_write(&self, buf: Src<'_>, offset: u64) -> Result<()> {
        self.with_tree(true, |tree| tree.top.driver().vm_state_write(buf, offset))
    }

    /// Read from the area of the machine's state, as it was in the snapshot that was applied or opened, or
    /// as it was written since. What was never written reads as zeroes.
    pub fn vm_state_read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.with_tree(false, |tree| match tree.flags.has(OpenFlags::INFO_ONLY) {
            true => Err(info_only(&tree.name)),
            false => tree.top.driver().vm_state_read(buf, offset),
        })
    }
}
