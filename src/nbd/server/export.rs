//! An export: a device under a name.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::time::Duration;

use super::super::proto::flag;
use super::conn::Context;
use crate::block::{BITMAP_CONTEXT, Can, Error, Result};
use crate::image::{Image, Info, state};
use crate::log::{Level, log};

/// How often it is looked whether the last user has gone, 5 ms apart.
const LETTING_GO: u32 = 100;

/// A device under a name.
pub struct Export {
    pub(super) name: Vec<u8>,
    pub(super) description: Vec<u8>,
    /// A context of our own: the device stays open for as long as it is exported.
    pub(super) image: Image,
    pub(super) read_only: bool,
    /// A call on the device ended in a panic; shared with its handles.
    broken: Arc<AtomicBool>,
    /// Nobody may begin to use it any more.
    pub(super) removed: AtomicBool,
    /// Threads of the pool that work on it.
    running: AtomicUsize,
    /// Whether other exports want threads, too.
    pub(super) is_one_of_many: AtomicBool,
    /// Which dirty bitmaps clients are told of.
    bitmaps: Shown,
}

/// Which dirty bitmaps clients are told of: all that are consistent, this one, or none.
enum Shown {
    All,
    One(Vec<u8>),
    None,
}

/// The first id of the context of a bitmap.
const FIRST_ID: u32 = 3;

impl Export {
    /// Export a context; `broken` is set when a call on it panics, and it is used no more then.
    pub fn new(
        name: Vec<u8>,
        description: Vec<u8>,
        image: Image,
        broken: Arc<AtomicBool>,
        read_only: bool,
    ) -> Result<Self> {
        let read_only = read_only || image.info()?.state & state::READ_ONLY != 0;
        Ok(Self {
            name,
            description,
            image,
            read_only,
            broken,
            removed: AtomicBool::new(false),
            running: AtomicUsize::new(0),
            is_one_of_many: AtomicBool::new(false),
            bitmaps: Shown::All,
        })
    }

    /// Tell clients of the dirty bitmap `name` only, which must be there; of none if that is empty.
    pub fn show_bitmap(&mut self, name: &[u8]) -> Result<()> {
        self.bitmaps = Shown::None;
        if !name.is_empty() {
            self.image.check_bitmap(name)?;
            self.bitmaps = Shown::One(name.to_vec());
        }
        Ok(())
    }

    /// The meta contexts of the dirty bitmaps that clients are told of.
    pub(super) fn bitmaps(&self) -> Vec<Context> {
        let all = match self.bitmaps {
            Shown::None => return Vec::new(),
            _ => self.with(Image::bitmaps_uncounted),
        };
        let all = all.unwrap_or_else(|e| {
            let name = crate::block::quoted(&self.name);
            log(Level::Warn, format_args!("NBD export {name}: its bitmaps: {e}"));
            Vec::new()
        });
        let shown = |name: &[u8]| match &self.bitmaps {
            Shown::One(one) => one == name,
            _ => true,
        };
        all.iter()
            .filter(|b| !b.inconsistent && shown(&b.name))
            .zip(FIRST_ID..)
            .map(|(b, id)| Context::Bitmap([BITMAP_CONTEXT, &b.name].concat(), id))
            .collect()
    }

    /// Do something with the device. A panic in it breaks the device and is an error of this request.
    pub fn with<R>(&self, work: impl FnOnce(&Image) -> Result<R>) -> Result<R> {
        if self.broken.load(Relaxed) {
            return Err(Error::Internal("an earlier request met an internal error".into()));
        }
        catch_unwind(AssertUnwindSafe(|| work(&self.image))).unwrap_or_else(|_| {
            self.broken.store(true, Relaxed);
            Err(Error::Internal("a request ended in a panic".into()))
        })
    }

    /// Nobody is to use it any more: flush the device, and close this context of it.
    pub(super) fn let_go(mut export: Arc<Self>) -> Result<()> {
        // A thread of the pool may be about to let go, too.
        for _ in 0..LETTING_GO {
            export = match Arc::try_unwrap(export) {
                // What is broken must not write: its metadata may be half changed.
                Ok(e) if e.broken.load(Relaxed) => return Ok(()),
                Ok(e) => return e.image.close(),
                Err(shared) => shared,
            };
            std::thread::sleep(Duration::from_millis(5));
        }
        let text = "a request to the device does not end, and the device is left to it";
        let name = format!("NBD export {}", crate::block::quoted(&export.name));
        Err(Error::net(&name.into(), text, libc::ETIMEDOUT))
    }

    /// Size in bytes and transmission flags, as of now.
    pub fn facts(&self) -> Result<(Info, u16)> {
        let info = self.with(Image::info)?;
        let zero = !self.read_only && info.can_zero != Can::Not;
        let mut flags =
            flag::HAS_FLAGS | flag::CAN_MULTI_CONN | flag::SEND_CACHE | flag::SEND_FLUSH;
        for (on, bit) in [
            (self.read_only, flag::READ_ONLY),
            (info.state & state::ROTATIONAL != 0, flag::ROTATIONAL),
            (!self.read_only && info.can_fua != Can::Not, flag::SEND_FUA),
            (!self.read_only, flag::SEND_TRIM),
            (zero, flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO),
        ] {
            flags |= if on { bit } else { 0 };
        }
        Ok((info, flags))
    }

    /// Take one of `most` threads, if that leaves some to others.
    pub(super) fn running_begins(&self, most: usize) -> bool {
        let many = self.is_one_of_many.load(Relaxed);
        let share = if many { (most / 2).max(1) } else { most };
        self.running.fetch_update(Relaxed, Relaxed, |n| (n < share).then_some(n + 1)).is_ok()
    }

    pub(super) fn running_ended(&self) {
        self.running.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{OpenFlags, Options};

    #[test]
    fn a_panic_ends_its_request_and_nothing_else() {
        let image = Image::open("mem:1M".as_ref(), &Options::new(), OpenFlags::RDWR).unwrap();
        let broken = Arc::new(AtomicBool::new(false));
        let export = Export::new(b"x".to_vec(), Vec::new(), image, broken.clone(), false).unwrap();
        assert_eq!(export.with(Image::size).unwrap(), 1 << 20);
        let panicked = export.with(|_| -> Result<()> { panic!("on purpose") });
        assert!(matches!(panicked, Err(Error::Internal(_))), "{panicked:?}");
        // What it left behind is not to be trusted, by the handles of the device neither.
        assert!(broken.load(Relaxed) && export.with(Image::size).is_err());
        Export::let_go(Arc::new(export)).unwrap();
    }
}
