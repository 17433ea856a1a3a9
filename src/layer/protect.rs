//! `protect`: ranges of the device that can not be changed.

use std::sync::Arc;

use super::ranges::Ranges;
use super::*;

pub(super) const KIND: Kind = Kind {
    name: "protect",
    about: "refuse changes of some ranges of the device",
    keys: &[("protect", "ranges: 1M-2M, 1M-, -2M, 1M+512, ~1M-2M (all but), with commas")],
    writes_below: always,
    open,
};

/// Bytes compared at a time.
const PIECE: usize = 64 << 10;

struct Protect {
    next: Device,
    ranges: Ranges,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let Some(ranges) = Ranges::setting(settings, "protect")? else {
        return Err(settings.missing("protect", "protect;protect=0-1M"));
    };
    Ok(Stacked::boxed(Protect { next: source.open(write)?, ranges }))
}

impl Protect {
    fn refused(&self, op: &str, offset: u64, count: u64) -> Error {
        let what = format!(
            "layer 'protect': {op} of {count} bytes at offset {offset} would change what is protected"
        );
        Error::Refused { file: self.next.name().clone(), what, errno: libc::EPERM }
    }

    fn touches(&self, offset: u64, count: u64) -> bool {
        self.ranges.within(offset, count).next().is_some()
    }

    /// Whether what is protected of these bytes already is what `same` is given to compare it with:
    /// bytes, and where in the range they lie.
    fn is_so(&self, offset: u64, count: u64, same: impl Fn(&[u8], usize) -> bool) -> Result<bool> {
        let mut scratch = Vec::new();
        for (mut from, to) in self.ranges.within(offset, count) {
            while from < to {
                let n = usize::try_from(to - from).unwrap_or(PIECE).min(PIECE);
                scratch.resize(n, 0);
                self.next.read_slice(&mut scratch, from)?;
                if !same(&scratch, (from - offset) as usize) {
                    return Ok(false);
                }
                from += n as u64;
            }
        }
        Ok(true)
    }

    /// Do `work` with each part of the range that is not protected, and nothing with the others: what
    /// was compared a moment ago may be changing in the caller's memory.
    fn around(
        &self,
        offset: u64,
        count: u64,
        flags: ReqFlags,
        work: impl Fn(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut at = offset;
        for (from, to) in self.ranges.within(offset, count) {
            if at < from {
                work(at, from - at)?;
            }
            at = to;
        }
        let left = offset.saturating_add(count).saturating_sub(at);
        if left > 0 {
            work(at, left)?;
        }
        // Also what is as it was is to be so after a power cut.
        if flags.has(ReqFlags::FUA) { self.next.flush() } else { Ok(()) }
    }
}

impl Layer for Protect {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        let count = buf.len() as u64;
        if !self.touches(offset, count) {
            return self.next.write(buf, offset, flags);
        }
        let same = |now: &[u8], at: usize| {
            let mut new = vec![0; now.len()];
            buf.sub(at, now.len()).copy_to(&mut new);
            new == now
        };
        if !self.is_so(offset, count, same)? {
            return Err(self.refused("a write", offset, count));
        }
        self.around(offset, count, flags, |at, n| {
            self.next.write(buf.sub((at - offset) as usize, n as usize), at, flags)
        })
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        if !self.touches(offset, count) {
            return self.next.zero(offset, count, flags);
        }
        // Looking whether they are zeroes already may take long.
        if flags.has(ReqFlags::FAST_ZERO) {
            return Err(Error::NotSupported("fast zeroing of what is protected"));
        }
        if !self.is_so(offset, count, |now, _| now.iter().all(|b| *b == 0))? {
            return Err(self.refused("zeroing", offset, count));
        }
        self.around(offset, count, flags, |at, n| self.next.zero(at, n, flags))
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        match self.touches(offset, count) {
            false => self.next.trim(offset, count, flags),
            true => Err(self.refused("a trim", offset, count)),
        }
    }
}
