//! `offset`: a part of what is below, from some byte on.

use std::sync::Arc;

use super::*;

pub(super) const KIND: Kind = Kind {
    name: "offset",
    about: "a part of the device below",
    keys: &[
        ("offset", "where it begins, bytes (0)"),
        ("range", "how long it is, bytes (all that follows)"),
    ],
    writes_below: always,
    open,
};

/// A window on a device. Also what a partition is.
pub(super) struct Window {
    next: Device,
    kind: &'static str,
    start: u64,
    size: u64,
    /// Properties.
    about: Vec<(&'static str, Vec<u8>)>,
}

impl Window {
    /// `size` bytes of `next` from `start` on, which it has.
    pub(super) fn new(next: Device, kind: &'static str, start: u64, size: u64) -> Self {
        Self { next, kind, start, size, about: Vec::new() }
    }

    /// The same, with something to tell of it.
    pub(super) fn of_partition(
        next: Device,
        kind: &'static str,
        start: u64,
        size: u64,
        about: Vec<(&'static str, Vec<u8>)>,
    ) -> Self {
        Self { about, ..Self::new(next, kind, start, size) }
    }

    /// Where a range lies below. A driver may be asked for what is past its end, the neighbour must not.
    fn below(&self, offset: u64, count: u64) -> Result<u64> {
        match offset.checked_add(count) {
            Some(end) if end <= self.size => Ok(self.start + offset),
            _ => {
                let file = self.next.name().clone();
                Err(Error::Range { file, offset, count, size: self.size })
            }
        }
    }
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let next = source.open(write)?;
    let start = settings.size("offset")?.unwrap_or(0);
    let Some(rest) = next.size().checked_sub(start) else {
        let has = next.size();
        return Err(settings.bad("offset", &format!("at most the {has} bytes that are below")));
    };
    let size = settings.size("range")?.unwrap_or(rest);
    if size > rest {
        return Err(settings.bad("range", &format!("at most the {rest} bytes that follow")));
    }
    Ok(Stacked::boxed(Window::new(next, KIND.name, start, size)))
}

impl Layer for Window {
    fn kind(&self) -> &'static str {
        self.kind
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        // Else all bytes would be said to lie in a file where they do on this device.
        Caps { extents: true, ..self.next.caps().clone() }
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let at = self.below(offset, buf.len() as u64)?;
        self.next.read(buf, at)
    }
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        let at = self.below(offset, buf.len() as u64)?;
        self.next.read_now(buf, at)
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        let at = self.below(offset, buf.len() as u64)?;
        self.next.write(buf, at, flags)
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.next.zero(self.below(offset, count)?, count, flags)
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.next.trim(self.below(offset, count)?, count, flags)
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.next.cache(self.below(offset, count)?, count)
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        let at = self.below(offset, count)?;
        out.shifted(self.start, |out| self.next.driver().extents(at, count, out))
    }
    fn allocated(&self) -> Option<u64> {
        None
    }
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        self.about.clone()
    }
}
