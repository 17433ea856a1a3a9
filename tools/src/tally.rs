//! Extents, one after another to the end, and how many bytes there are of each kind.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use qblk::{Extent, Image};

use crate::failure::{Failure, Result};

/// Extents asked for at a time.
const BATCH: usize = 1024;

/// What bytes are, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Kept as they are.
    Data,
    /// Kept in compressed form.
    Compressed,
    /// The image says that they are zeroes (in a raw file: a hole).
    Zero,
    /// Nothing says what they are, so they read as zeroes.
    Unallocated,
}

/// A kind, and in which image of the chain (0 = the topmost) where that matters. In order: what is
/// stored, from the top image down, then what is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// How many images below the first; 0 for what is nowhere.
    pub depth: u32,
    /// What it is.
    pub kind: Kind,
}

impl Kind {
    /// The word for it, in every output.
    pub fn word(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Compressed => "compressed",
            Self::Zero => "zero",
            Self::Unallocated => "unallocated",
        }
    }

    /// Whether its bytes are kept somewhere.
    pub fn is_stored(self) -> bool {
        matches!(self, Self::Data | Self::Compressed)
    }
}

impl Class {
    /// The class of an extent.
    pub fn of(e: &Extent) -> Self {
        let kind = if e.has(Extent::ZERO) {
            if e.has(Extent::ALLOCATED) { Kind::Zero } else { Kind::Unallocated }
        } else if e.has(Extent::COMPRESSED) {
            Kind::Compressed
        } else {
            Kind::Data
        };
        Self { kind, depth: if kind.is_stored() { e.depth } else { 0 } }
    }
}

impl Ord for Class {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |c: &Self| (!c.kind.is_stored(), c.depth, c.kind);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Class {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Bytes by class, and how many extents there were.
#[derive(Default)]
pub struct Totals {
    /// Bytes.
    pub bytes: BTreeMap<Class, u64>,
    /// Extents.
    pub extents: u64,
}

impl Totals {
    /// Count an extent.
    pub fn add(&mut self, e: &Extent) {
        self.add_as(Class::of(e), e);
    }

    /// Count an extent under another class than its own.
    pub fn add_as(&mut self, class: Class, e: &Extent) {
        *self.bytes.entry(class).or_default() += e.length;
        self.extents += 1;
    }

    /// Bytes of a kind, in whatever image.
    pub fn of_kind(&self, kind: Kind) -> u64 {
        self.bytes.iter().filter(|(class, _)| class.kind == kind).map(|(_, bytes)| bytes).sum()
    }
}

/// Call `each` with the extents of `offset..end` in order, neighbours that are alike merged, until
/// it answers `false`.
pub fn for_each_extent(
    image: &Image,
    offset: u64,
    end: u64,
    mut each: impl FnMut(&Extent) -> Result<bool>,
) -> Result<()> {
    let mut batch = vec![Extent::default(); BATCH];
    let mut at = offset;
    // The last extent of a batch may go on in the next one.
    let mut held: Option<Extent> = None;
    while at < end {
        let n = image.extents(at, end - at, &mut batch)?;
        for e in &batch[..n] {
            match &mut held {
                Some(last) if continues(last, e) => last.length += e.length,
                _ => {
                    if let Some(last) = held.replace(*e)
                        && !each(&last)?
                    {
                        return Ok(());
                    }
                }
            }
            at = e.offset + e.length;
        }
        if n == 0 {
            return Err(Failure::said(format!("no extent is described at offset {at}")));
        }
    }
    match held {
        Some(last) => each(&last).map(drop),
        None => Ok(()),
    }
}

fn continues(a: &Extent, b: &Extent) -> bool {
    let host_goes_on = || {
        !a.has(Extent::HOST)
            || a.has(Extent::COMPRESSED)
            || a.host_offset.checked_add(a.length) == Some(b.host_offset)
    };
    a.offset + a.length == b.offset && a.flags == b.flags && a.depth == b.depth && host_goes_on()
}
