//! Dirty bitmaps of an image: listed, changed, and asked where they are dirty.

use super::Image;
use crate::block::*;

/// Runs of a bitmap that are looked at in one go.
const MOST: usize = 4096;

impl Image {
    /// The bitmaps of the image. On one that is open for its description only it is not counted what
    /// is dirty in them.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        let call = self.call()?;
        let count = !call.flags.has(super::OpenFlags::INFO_ONLY);
        call.top.driver().bitmaps(count)
    }

    /// The bitmaps of the image, without counting what is dirty in them.
    pub(crate) fn bitmaps_uncounted(&self) -> Result<Vec<BitmapInfo>> {
        self.call()?.top.driver().bitmaps(false)
    }

    /// Change a bitmap; on disk when it returns.
    pub fn change_bitmap(&self, change: &BitmapChange<'_>) -> Result<()> {
        self.with_tree(true, |tree| tree.top.driver().change_bitmap(change))
    }

    /// Whether bitmap `name` can be asked: the reason if not.
    pub(crate) fn check_bitmap(&self, name: &[u8]) -> Result<()> {
        self.dirty_extents(name, true, 0, 0, &mut []).map(drop)
    }

    /// [`Image::extents`], with [`Extent::DIRTY`] where bitmap `name` is dirty; `only` that, nothing else
    /// about where bytes are.
    pub fn dirty_extents(
        &self,
        name: &[u8],
        only: bool,
        mut offset: u64,
        count: u64,
        out: &mut [Extent],
    ) -> Result<usize> {
        let call = self.data_call(offset, count)?;
        // One more shows that the last one is whole.
        let most = out.len().saturating_add(1).min(MOST);
        let (end, mut list) = (offset + count, ExtentList::for_c(out));
        let context = [BITMAP_CONTEXT, name].concat();
        let mut runs = Vec::new();
        loop {
            // Asked once at least, so that a bitmap that is not there is known to be not.
            runs.clear();
            call.top.driver().status(&context, offset, end - offset, most, &mut runs)?;
            let before = offset;
            for &(len, flags) in &runs {
                let len = len.min(end - offset);
                let dirty = if flags & 1 != 0 { Extent::DIRTY } else { 0 };
                if only {
                    list.push(Extent::new(offset, len, dirty));
                } else {
                    list.mark(dirty);
                    crate::format::extents(&call.top, offset, len, &mut list)?;
                }
                offset += len;
                if list.is_full() {
                    break;
                }
            }
            if list.is_full() || offset >= end {
                return Ok(list.len());
            }
            if offset == before {
                return Err(Error::Internal("a driver described nothing of a bitmap".into()));
            }
        }
    }
}
