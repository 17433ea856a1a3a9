//! Checking an image as a whole.

use std::sync::atomic::Ordering::*;

use super::life::close_tree;
use super::whole::Taken;
use super::{Image, OpenFlags, chain, info_only};
use crate::block::*;

impl Image {
    /// Check the image (not those below it), and mend what `repair` says.
    ///
    /// On one that is open for writing, calls of other threads wait meanwhile; when something was mended
    /// it is opened anew beneath all contexts.
    pub fn check(&self, repair: Repair, progress: Progress<'_>) -> Result<CheckReport> {
        let _admin = self.shared.admin.lock();
        let old = self.shared.tree.load(SeqCst);
        if old.is_null() {
            return Err(Error::BadHandle("the device is closed".into()));
        }
        // SAFETY: the tree is replaced and freed under `admin` only, which is held.
        let tree = unsafe { &*old };
        if tree.flags.has(OpenFlags::INFO_ONLY) {
            return Err(info_only(&tree.name));
        }
        if repair != Repair::Nothing {
            if !self.write.load(Relaxed) || !tree.flags.has(OpenFlags::RDWR) {
                return Err(Error::ReadOnly(tree.name.clone()));
            }
            tree.may_write()?;
        }
        if tree.below.is_some() {
            return Err(Error::NotSupported("checking an image through layers"));
        }
        if !tree.flags.has(OpenFlags::RDWR) || tree.flags.has(OpenFlags::CHECK) {
            // Nobody changes it, or has it in memory.
            return tree.top.driver().check(repair, progress);
        }
        if repair != Repair::Nothing {
            chain::check_reopen(tree)?;
        }
        let mut taken = Taken::new(&self.shared);
        self.check_alone(&mut taken, repair, progress)
    }

    /// With nobody else at it. What is taken may come to be another tree.
    fn check_alone(
        &self,
        taken: &mut Taken<'_>,
        repair: Repair,
        progress: Progress<'_>,
    ) -> Result<CheckReport> {
        let tree = taken.tree();
        match close_tree(tree) {
            Ok(()) => {}
            // Nothing is written any more, and what is in memory only is lost: the file is what there is.
            Err(Error::Failed { .. } | Error::Corrupt { .. }) => {}
            Err(e) => return Err(e),
        }
        let result = tree.top.driver().check(repair, progress);
        let changed = match &result {
            Ok(report) => report.changed,
            // Who knows how far it came.
            Err(_) => repair != Repair::Nothing,
        };
        if !changed {
            return result;
        }
        match chain::reopen(tree, &tree.options, tree.flags, &self.shared.calls.shared()) {
            Ok(new) => {
                drop(taken.put(Box::new(new)));
                result
            }
            Err(e) => {
                // What it knows is not true any more: good for another check, or to be reopened.
                tree.flags = tree.flags | OpenFlags::CHECK;
                result.and(Err(e))
            }
        }
    }
}
