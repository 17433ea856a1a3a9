//! `blocksize`: any request above, whole blocks of a bounded length below.
//!
//! The layer says what the requests below must be like; the emulation that every driver stands behind
//! does the rest: it cuts what is too long, and reads, changes and writes back the blocks of which a
//! request has only a part. Locks on ranges of blocks, held while that is done, keep two requests that
//! meet inside a block from losing each other's bytes.

use std::sync::Arc;

use super::*;

pub(super) const KIND: Kind = Kind {
    name: "blocksize",
    about: "whole blocks of a bounded length below, any request above",
    keys: &[
        ("minimum", "requests below are multiples of this many bytes, a power of two up to 1M (1)"),
        ("maximum", "bytes of a read or a write below, at most, a multiple of minimum (no limit)"),
        ("maximum-range", "the same of zeroing, trimming and caching (maximum)"),
    ],
    writes_below: always,
    open,
};

/// The largest block: what a request that is no multiple of it may have to read and write back.
const LARGEST: u64 = 1 << 20;

struct BlockSize {
    next: Device,
    minimum: u32,
    /// 0 = no limit.
    maximum: u64,
    maximum_range: u64,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let keys = ["minimum", "maximum", "maximum-range"];
    if keys.iter().all(|k| settings.get(k).is_none()) {
        return Err(settings.missing("minimum", "blocksize;minimum=4k"));
    }
    let expected = "a power of two up to 1M";
    let minimum = settings.size("minimum")?.unwrap_or(1);
    if !minimum.is_power_of_two() || minimum > LARGEST {
        return Err(settings.bad("minimum", expected));
    }
    let multiple = |key| match settings.size(key)? {
        Some(n) if n == 0 || n % minimum != 0 => {
            Err(settings.bad(key, &format!("a multiple of the {minimum} bytes of 'minimum'")))
        }
        n => Ok(n),
    };
    let maximum = multiple("maximum")?.unwrap_or(0);
    let maximum_range = multiple("maximum-range")?.unwrap_or(maximum);
    let minimum = minimum.try_into().map_err(|_| settings.bad("minimum", expected))?;
    Ok(Stacked::boxed(BlockSize { next: source.open(write)?, minimum, maximum, maximum_range }))
}

impl BlockSize {
    /// A range widened to whole blocks.
    fn blocks(&self, offset: u64, count: u64) -> (u64, u64) {
        let minimum = u64::from(self.minimum);
        let end = offset.saturating_add(count).min(self.size());
        // The size is a multiple: no end is rounded beyond it.
        (offset - offset % minimum, end.checked_next_multiple_of(minimum).unwrap_or(end))
    }
}

impl Layer for BlockSize {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        let below = self.next.caps();
        Caps {
            align: self.minimum,
            max_transfer: self.maximum,
            max_range: self.maximum_range,
            optimal_io: below.optimal_io.max(self.minimum),
            ..below.clone()
        }
    }
    /// Whole blocks only: what follows the last can not be reached by them.
    fn size(&self) -> u64 {
        let size = self.next.size();
        size - size % u64::from(self.minimum)
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        let (mut at, end) = self.blocks(offset, count);
        let most = if self.maximum_range == 0 { u64::MAX } else { self.maximum_range };
        while at < end {
            let n = (end - at).min(most);
            self.next.cache(at, n)?;
            at += n;
        }
        Ok(())
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        let (from, to) = self.blocks(offset, count);
        let end = offset.saturating_add(count);
        let mut some = [Extent::default(); 32];
        let mut list = ExtentList::new(&mut some);
        if from < to {
            self.next.driver().extents(from, to - from, &mut list)?;
        }
        let n = list.len();
        some[..n].iter().filter_map(|e| e.within(offset, end)).for_each(|e| out.push(e));
        Ok(())
    }
}
