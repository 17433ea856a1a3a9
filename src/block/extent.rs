//! What a range of a device is: data, hole, zeroes, in which image of a chain.

/// One extent; the layout of `qblk_extent` in the C ABI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Extent {
    /// Where it begins on the device, bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Where it begins in the file that holds it, bytes; valid with [`Extent::HOST`].
    pub host_offset: u64,
    /// Bits of [`Extent::ALLOCATED`] and the others.
    pub flags: u32,
    /// 0 = this image, 1 = its backing image, …
    pub depth: u32,
    /// Zero.
    pub reserved: [u8; 16],
}

impl Extent {
    /// In this image, not below.
    pub const ALLOCATED: u32 = 1;
    /// Reads as zeroes.
    pub const ZERO: u32 = 2;
    /// Bytes are kept for it.
    pub const DATA: u32 = 4;
    /// Kept compressed.
    pub const COMPRESSED: u32 = 8;
    /// `host_offset` is valid.
    pub const HOST: u32 = 16;
    /// Changed since some moment, as a bitmap says that was asked for.
    pub const DIRTY: u32 = 32;
    /// Inside the library only: the image at `depth` has it, as data or as zeroes.
    pub const OWNED: u32 = 1 << 31;

    /// An extent of depth 0.
    pub fn new(offset: u64, length: u64, flags: u32) -> Self {
        Self { offset, length, flags, ..Self::default() }
    }

    /// Plain data that lies in a file at the same offset.
    pub fn data(offset: u64, length: u64) -> Self {
        let flags = Self::ALLOCATED | Self::DATA | Self::HOST | Self::OWNED;
        Self { host_offset: offset, ..Self::new(offset, length, flags) }
    }

    /// A hole of a raw device: there, and zeroes.
    pub fn hole(offset: u64, length: u64) -> Self {
        Self::new(offset, length, Self::ALLOCATED | Self::ZERO | Self::OWNED)
    }

    /// Whether any of `flags` is set.
    pub fn has(&self, flags: u32) -> bool {
        self.flags & flags != 0
    }

    /// The part of it that lies in `from..to`, if any does.
    pub fn within(&self, from: u64, to: u64) -> Option<Self> {
        let (start, end) = (self.offset.max(from), self.end().min(to));
        let length = end.checked_sub(start).filter(|n| *n > 0)?;
        let mut part = Self { offset: start, length, ..*self };
        // Where compressed bytes lie says nothing about any one of them.
        if self.has(Self::HOST) && !self.has(Self::COMPRESSED) {
            part.host_offset = self.host_offset.saturating_add(start - self.offset);
        }
        Some(part)
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// Whether `next` continues this one, so that both are one extent.
    fn continues_as(&self, next: &Extent) -> bool {
        self.end() == next.offset
            && self.flags == next.flags
            && self.depth == next.depth
            && (!self.has(Self::HOST)
                || self.has(Self::COMPRESSED)
                || self.host_offset.checked_add(self.length) == Some(next.host_offset))
    }
}

/// Extents in order, neighbours that are alike merged, at most as many as there is room for.
pub struct ExtentList<'a> {
    out: &'a mut [Extent],
    len: usize,
    full: bool,
    /// Flags that are kept.
    keep: u32,
    /// Flags that are added.
    mark: u32,
}

impl<'a> ExtentList<'a> {
    /// An empty list over `out`, which keeps [`Extent::OWNED`].
    pub fn new(out: &'a mut [Extent]) -> Self {
        let full = out.is_empty();
        Self { out, len: 0, full, keep: u32::MAX, mark: 0 }
    }

    /// An empty list of what the C ABI knows.
    pub fn for_c(out: &'a mut [Extent]) -> Self {
        Self { keep: !Extent::OWNED, ..Self::new(out) }
    }

    /// Let extents that are added from now on have these flags, too.
    pub fn mark(&mut self, flags: u32) {
        self.mark = flags;
    }

    /// Add an extent that begins where the last one ended. What finds no room is dropped.
    pub fn push(&mut self, mut e: Extent) {
        e.flags = e.flags & self.keep | self.mark;
        if self.keep & Extent::HOST == 0 {
            e.host_offset = 0;
        }
        if self.full || e.length == 0 {
            return;
        }
        if let Some(last) = self.len.checked_sub(1).and_then(|i| self.out.get_mut(i))
            && last.continues_as(&e)
        {
            last.length += e.length;
            return;
        }
        match self.out.get_mut(self.len) {
            Some(slot) => {
                *slot = e;
                self.len += 1;
            }
            None => self.full = true,
        }
    }

    /// No extent says where it lies in a file from now on: that is no place of the device's own.
    pub fn without_host(mut self) -> Self {
        self.keep &= !Extent::HOST;
        self
    }

    /// Add what `describe` says of a device whose byte `start` is this one's first. It may be less than
    /// the whole range.
    pub fn shifted(
        &mut self,
        start: u64,
        describe: impl FnOnce(&mut ExtentList<'_>) -> crate::block::Result<()>,
    ) -> crate::block::Result<()> {
        let mut some = [Extent::default(); 32];
        let mut list = ExtentList::new(&mut some);
        describe(&mut list)?;
        let n = list.len;
        for e in &some[..n] {
            self.push(Extent { offset: e.offset.saturating_sub(start), ..*e });
        }
        Ok(())
    }

    /// Whether an extent had to be dropped: more need not be looked up.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// How many extents there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
