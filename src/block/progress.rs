//! How far long work is, told to whoever asked for it, who may have it stopped.

use super::{Error, Result};

/// Who is told: gets what is done and what there is to do (both may change their unit from one piece
/// of work to another, and the whole may grow); `false` asks to stop.
pub type Tell<'a> = dyn Fn(u64, u64) -> bool + Sync + 'a;

/// The way to who is told, if anybody is.
#[derive(Clone, Copy, Default)]
pub struct Progress<'a>(Option<&'a Tell<'a>>);

impl<'a> Progress<'a> {
    /// Nobody is told.
    pub const NONE: Progress<'static> = Progress(None);

    /// `tell` is told.
    pub fn new(tell: &'a Tell<'a>) -> Self {
        Self(Some(tell))
    }

    /// `done` of `total` is done; [`Error::Canceled`] if the work is to stop here.
    pub fn at(&self, done: u64, total: u64) -> Result<()> {
        match self.0 {
            Some(tell) if !tell(done, total) => Err(Error::Canceled),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::*};

    use super::*;

    #[test]
    fn who_is_told_may_stop_the_work() {
        let last = AtomicU64::new(0);
        let tell = |done: u64, total: u64| {
            last.store(done, Relaxed);
            done < total
        };
        let progress = Progress::new(&tell);
        assert!(progress.at(1, 2).is_ok());
        assert!(matches!(progress.at(2, 2), Err(Error::Canceled)));
        assert_eq!(last.load(Relaxed), 2);
        assert!(Progress::NONE.at(9, 9).is_ok());
    }
}
