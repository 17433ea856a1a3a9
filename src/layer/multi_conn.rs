//! `multi-conn`: several contexts below, requests spread over them, and flush kept right over them all.
//!
//! A call goes to the first context that has none under way, or to the one that has the fewest: one caller
//! at a time stays on the first, and many are spread. A flush goes to every context that was written
//! through since it was last flushed. Thus it does not matter whether a flush on one context covers what
//! was written through another.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::unflushed::Unflushed;
use super::*;

pub(super) const KIND: Kind = Kind {
    name: "multi-conn",
    about: "spread requests over several contexts, and flush them all",
    keys: &[
        ("contexts", "how many, 1 to 64 (4)"),
        ("flush", "written: each that was written through; one: any, which covers all (written)"),
    ],
    writes_below: always,
    open,
};

#[repr(align(128))]
struct Context {
    dev: Device,
    /// Calls under way.
    calls: AtomicUsize,
    unflushed: Unflushed,
}

struct MultiConn {
    first: Context,
    more: Vec<Context>,
    /// A flush on one context covers all.
    one: bool,
    read_only: bool,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let count = settings.number("contexts", 1..=64)?.unwrap_or(4);
    let one = settings.one_of("flush", &["written", "one"])? == Some(1);
    let context = || -> Result<Context> {
        let dev = source.open(write)?;
        Ok(Context { dev, calls: AtomicUsize::new(0), unflushed: Unflushed::default() })
    };
    let first = context()?;
    let more = (1..count).map(|_| context()).collect::<Result<Vec<_>>>()?;
    Ok(Stacked::boxed(MultiConn { first, more, one, read_only: !write }))
}

/// A call on a context.
struct Call<'a>(&'a Context);

impl Drop for Call<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Relaxed);
    }
}

impl MultiConn {
    fn all(&self) -> impl Iterator<Item = &Context> {
        std::iter::once(&self.first).chain(&self.more)
    }

    /// A context for a call. Two callers may come to the same one; that is slower and no more.
    #[inline]
    fn pick(&self) -> Call<'_> {
        let (mut best, mut fewest) = (&self.first, usize::MAX);
        for context in self.all() {
            let calls = context.calls.load(Relaxed);
            if calls < fewest {
                (best, fewest) = (context, calls);
            }
            if calls == 0 {
                break;
            }
        }
        best.calls.fetch_add(1, Relaxed);
        Call(best)
    }

    /// Change something through a context. What was acknowledged with FUA needs no flush; of what failed
    /// a part may have happened.
    #[inline]
    fn change(&self, flags: ReqFlags, work: impl FnOnce(&Device) -> Result<()>) -> Result<()> {
        let call = self.pick();
        let result = work(&call.0.dev);
        let nothing = matches!(result, Err(Error::NotSupported(_)));
        if !nothing && (result.is_err() || !flags.has(ReqFlags::FUA)) {
            call.0.unflushed.wrote();
        }
        result
    }

    /// Flush all that was written through, each by `flush`.
    fn flush_by(&self, flush: impl Fn(&Device) -> Result<()>) -> Result<()> {
        if self.one || self.read_only {
            return flush(&self.first.dev);
        }
        // All of them, also if one fails. One that failed stays to be flushed, and its failure is told
        // again by what is below.
        let mut result = Ok(());
        let mut none = true;
        for context in self.all().filter(|c| c.unflushed.any()) {
            none = false;
            let flushed = context.flush(&flush);
            result = result.and(flushed);
        }
        // Whoever flushes may mean what was written before this layer was put there.
        if none { flush(&self.first.dev) } else { result }
    }
}

impl Context {
    fn flush(&self, flush: impl FnOnce(&Device) -> Result<()>) -> Result<()> {
        let number = self.unflushed.begin();
        flush(&self.dev)?;
        self.unflushed.flushed(number);
        Ok(())
    }
}

impl Layer for MultiConn {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.first.dev
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.pick().0.dev.read(buf, offset)
    }
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        self.pick().0.dev.read_now(buf, offset)
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.change(flags, |dev| dev.write(buf, offset, flags))
    }
    fn flush(&self) -> Result<()> {
        self.flush_by(Device::flush)
    }
    fn flush_to_close(&self) -> Result<()> {
        self.flush_by(Device::flush_to_close)
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.change(flags, |dev| dev.zero(offset, count, flags))
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.change(flags, |dev| dev.trim(offset, count, flags))
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.pick().0.dev.cache(offset, count)
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        self.pick().0.dev.driver().extents(offset, count, out)
    }
}
