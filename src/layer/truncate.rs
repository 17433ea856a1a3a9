//! `truncate`: another size than the device below has.
//!
//! What lies beyond the end of the device below reads as zeroes. Zeroes can be written there, and are
//! dropped; anything else is refused, before any of the request is written: nobody could read it again.

use std::sync::Arc;

use super::*;

pub(super) const KIND: Kind = Kind {
    name: "truncate",
    about: "another size: fixed, or rounded up or down",
    keys: &[
        ("size", "size in bytes (as below)"),
        ("round-up", "round it up to a multiple of this many bytes"),
        ("round-down", "round it down to a multiple of this many bytes"),
    ],
    writes_below: always,
    open,
};

/// The size that a device can have at most.
const MOST: u64 = i64::MAX as u64;

struct Truncate {
    next: Device,
    fixed: Option<u64>,
    up: u64,
    down: u64,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let fixed = settings.size("size")?;
    if fixed.is_some_and(|size| size > MOST) {
        return Err(settings.bad("size", "a size below 8E"));
    }
    let round = |key| match settings.size(key)? {
        Some(0) => Err(settings.bad(key, "at least 1 byte")),
        n => Ok(n),
    };
    let (up, down) = (round("round-up")?, round("round-down")?);
    if (fixed, up, down) == (None, None, None) {
        return Err(settings.missing("size", "truncate;size=1G (or round-up, round-down)"));
    }
    let next = source.open(write)?;
    let layer = Truncate { next, fixed, up: up.unwrap_or(1), down: down.unwrap_or(1) };
    if layer.of(layer.next.size()).is_none() {
        return Err(settings.bad("round-up", "a multiple that the size can be rounded up to"));
    }
    Ok(Stacked::boxed(layer))
}

impl Truncate {
    /// The size when that below is `below`; `None` if there is no such size.
    fn of(&self, below: u64) -> Option<u64> {
        let size = self.fixed.unwrap_or(below);
        let size = size.checked_next_multiple_of(self.up).filter(|size| *size <= MOST)?;
        Some(size - size % self.down)
    }

    /// How many bytes of a range are below; the others are beyond its end. A range that leaves this device
    /// is refused though it may be below.
    fn below(&self, offset: u64, count: u64) -> Result<u64> {
        let below = self.next.size();
        let size = self.of(below).unwrap_or(below);
        match offset.checked_add(count) {
            Some(end) if end <= size => Ok(below.saturating_sub(offset).min(count)),
            _ => {
                let file = self.next.name().clone();
                Err(Error::Range { file, offset, count, size })
            }
        }
    }

    fn beyond(&self, offset: u64) -> Error {
        let below = self.next.size();
        let what = format!(
            "layer 'truncate': a write at offset {offset} puts other bytes than zeroes beyond the \
             {below} bytes that are below: make what is below larger"
        );
        Error::Refused { file: self.next.name().clone(), what, errno: libc::ENOSPC }
    }
}

impl Layer for Truncate {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        // What is beyond the end is a hole.
        Caps { extents: true, ..self.next.caps().clone() }
    }
    fn size(&self) -> u64 {
        let below = self.next.size();
        // Rounding went well when this was opened; what has grown since is not hidden.
        self.of(below).unwrap_or(below)
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let there = self.below(offset, buf.len() as u64)?;
        let (there, beyond) = buf.split_at(there as usize);
        beyond.zero_fill();
        self.next.read(there, offset)
    }
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        let there = self.below(offset, buf.len() as u64)?;
        let (there, beyond) = buf.split_at(there as usize);
        beyond.zero_fill();
        Ok(there.is_empty() || self.next.read_now(there, offset)?)
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        let there = self.below(offset, buf.len() as u64)?;
        let (there, beyond) = buf.split_at(there as usize);
        if !beyond.is_zero() {
            return Err(self.beyond(offset));
        }
        if there.is_empty() { Ok(()) } else { self.next.write(there, offset, flags) }
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        match self.below(offset, count)? {
            0 => Ok(()),
            there => self.next.zero(offset, there, flags),
        }
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        match self.below(offset, count)? {
            0 => Ok(()),
            there => self.next.trim(offset, there, flags),
        }
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        match self.below(offset, count)? {
            0 => Ok(()),
            there => self.next.cache(offset, there),
        }
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        let there = self.below(offset, count)?;
        let mut some = [Extent::default(); 32];
        let mut list = ExtentList::new(&mut some);
        if there > 0 {
            self.next.driver().extents(offset, there, &mut list)?;
        }
        let n = list.len();
        let end = some[..n].last().map_or(offset, |e| e.offset.saturating_add(e.length));
        some[..n].iter().for_each(|e| out.push(*e));
        // If not all of it was described, more is asked for from where that ended.
        if end == offset.saturating_add(there) {
            out.push(Extent::hole(end, count - there));
        }
        Ok(())
    }
    fn allocated(&self) -> Option<u64> {
        // Of a part it is not known.
        if self.size() < self.next.size() { None } else { self.next.driver().allocated() }
    }
}
