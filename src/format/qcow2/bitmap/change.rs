//! Adding, removing and changing bitmaps, and what becomes of them when the disk's size changes. One
//! at a time, by a caller that is no call under way; data calls of others go on.
//!
//! Each change is on disk when it returns. One that fails leaves the bitmaps as they were, but for
//! `disable`: what was written meanwhile can not be marked any more, and so the bitmap stays disabled.

use super::directory::{
    GRANULARITY_BITS, MAX_BITMAPS, MAX_DATA, MAX_DIRECTORY, MAX_NAME, data_clusters, entry_size,
};
use super::*;
use crate::log::{Level, log};

/// What a bitmap's granularity is if nobody says, bytes.
const GRANULARITY: u64 = 65536;

impl Qcow2 {
    /// See [`Driver::change_bitmap`].
    pub(in crate::format::qcow2) fn change_bitmaps(&self, change: &BitmapChange<'_>) -> Result<()> {
        self.writer_parts()?;
        match *change {
            BitmapChange::Add { name, granularity, disabled } => {
                self.add_bitmap(name, granularity, disabled)
            }
            BitmapChange::Remove(name) => self.remove_bitmap(name),
            BitmapChange::Enable(name) => self.enable_bitmap(name),
            BitmapChange::Disable(name) => self.disable_bitmap(name),
            BitmapChange::Clear(name) => self.clear_bitmap(name),
            BitmapChange::Merge { target, source } => self.merge_bitmap(target, source),
        }
    }

    fn add_bitmap(&self, name: &[u8], granularity: u64, disabled: bool) -> Result<()> {
        let file = self.file.name();
        if !self.v3 {
            // Without autoclear bits nobody could tell that a program without bitmaps had written.
            return Err(Error::NotSupported("bitmaps in an image of version 2"));
        }
        if !(1..=MAX_NAME).contains(&name.len()) || name.contains(&0) {
            return Err(Error::invalid(format!(
                "bitmap {}: a name has 1 to {MAX_NAME} bytes, none of them NUL",
                quoted(name)
            )));
        }
        let granularity = if granularity == 0 { GRANULARITY } else { granularity };
        let granularity_bits = granularity.trailing_zeros();
        if !granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&granularity_bits) {
            return Err(Error::invalid(format!(
                "granularity: found {granularity}, expected a power of two from 512 to 2G"
            )));
        }
        let mut state = self.bitmap_state()?;
        if state.list.iter().any(|b| b.name == name) {
            return Err(bitmap_error(
                file,
                name,
                "there is one of that name already",
                libc::EEXIST,
            ));
        }
        let size = self.size.load(Acquire);
        self.check_bitmap_data(name, granularity_bits, size)?;
        let directory = state.list.iter().map(|b| entry_size(&b.name, &b.extra)).sum::<u64>()
            + entry_size(name, &[]);
        if state.list.len() >= MAX_BITMAPS as usize || directory > MAX_DIRECTORY {
            return Err(Error::TooBig {
                file: file.clone(),
                what: format!(
                    "an image has at most {MAX_BITMAPS} bitmaps, and {MAX_DIRECTORY} bytes of directory"
                ),
            });
        }
        let mut bitmap = Bitmap {
            name: name.to_vec(),
            granularity_bits,
            extra: Vec::new(),
            fit: Fit::Fine,
            enabled: !disabled,
            flags: 0,
            table: None,
            base: 0,
            cut: false,
            active: None,
            older: Vec::new(),
        };
        if bitmap.enabled {
            self.check_memory(&state, size, bitmap.needs(size))?;
            bitmap.active = Some(Arc::new(Marks::new(size, granularity_bits)));
        }
        state.list.push(bitmap);
        if let Err(e) = self.save(&mut state, false, None) {
            state.list.pop();
            return Err(e);
        }
        self.bitmaps.activate(&mut state);
        self.retire(state);
        Ok(())
    }

    /// Refuse a bitmap whose data would be too large, or none at all: QEMU would refuse the image.
    fn check_bitmap_data(&self, name: &[u8], granularity_bits: u32, size: u64) -> Result<()> {
        if size == 0 {
            let what = "a disk of no bytes can have no bitmaps";
            return Err(bitmap_error(self.file.name(), name, what, libc::EINVAL));
        }
        let clusters = data_clusters(size, granularity_bits, self.cluster_bits);
        match clusters > MAX_DATA >> self.cluster_bits {
            true => Err(Error::TooBig {
                file: self.file.name().clone(),
                what: format!(
                    "bitmap {}: with a granularity of {} bytes it would have more than {MAX_DATA} bytes \
                     for a disk of {size}; a larger granularity needs less",
                    quoted(name),
                    1u64 << granularity_bits
                ),
            }),
            false => Ok(()),
        }
    }

    fn remove_bitmap(&self, name: &[u8]) -> Result<()> {
        let mut state = self.bitmap_state()?;
        let at = state.position(self.file.name(), name)?;
        let bitmap = state.list.remove(at);
        if let Err(e) = self.save(&mut state, false, Some(&bitmap)) {
            state.list.insert(at, bitmap);
            return Err(e);
        }
        self.bitmaps.activate(&mut state);
        self.retire(state);
        Ok(())
    }

    fn enable_bitmap(&self, name: &[u8]) -> Result<()> {
        let mut state = self.bitmap_state()?;
        let at = state.usable(self.file.name(), name)?;
        let size = self.size.load(Acquire);
        let needs = state.list.get(at).filter(|b| !b.enabled).map(|b| b.needs(size));
        let Some(needs) = needs else { return Ok(()) };
        self.check_memory(&state, size, needs)?;
        let set = |state: &mut State, on: bool| {
            if let Some(b) = state.list.get_mut(at) {
                b.enabled = on;
                b.active = on.then(|| Arc::new(Marks::new(size, b.granularity_bits)));
            }
        };
        set(&mut state, true);
        if let Err(e) = self.save(&mut state, false, None) {
            set(&mut state, false);
            return Err(e);
        }
        // Of what is under way now it could not be said whether it was marked.
        self.retire(state);
        Ok(())
    }

    fn disable_bitmap(&self, name: &[u8]) -> Result<()> {
        let mut state = self.bitmap_state()?;
        let at = state.usable(self.file.name(), name)?;
        let Some(b) = state.list.get_mut(at).filter(|b| b.enabled) else { return Ok(()) };
        b.enabled = false;
        b.older.extend(b.active.take());
        state.unsaved = true;
        self.bitmaps.activate(&mut state);
        // What is under way may still mark.
        self.retire(state);
        let mut state = self.bitmap_state()?;
        let saved = self.save(&mut state, false, None);
        self.retire(state);
        saved
    }

    fn clear_bitmap(&self, name: &[u8]) -> Result<()> {
        let mut state = self.bitmap_state()?;
        let (size, at) = (self.size.load(Acquire), state.usable(self.file.name(), name)?);
        let Some(b) = state.list.get_mut(at) else { return Ok(()) };
        let new = b.enabled.then(|| Arc::new(Marks::new(size, b.granularity_bits)));
        let before = (b.base, b.cut, std::mem::take(&mut b.older), b.active.clone());
        (b.base, b.active) = (0, new);
        state.unsaved = true;
        self.bitmaps.activate(&mut state);
        // Whoever reads what was changed before this returns must find it all there: of what is
        // under way it is not known whether it was marked before or after.
        self.retire(state);
        let mut state = self.bitmap_state()?;
        let saved = self.save(&mut state, false, None);
        if saved.is_err()
            && let Some(b) = state.list.get_mut(at)
        {
            let (base, cut, older, active) = before;
            (b.base, b.cut) = (base, cut);
            b.older.extend(older.into_iter().chain(active));
        }
        self.retire(state);
        saved
    }

    fn merge_bitmap(&self, target: &[u8], source: &[u8]) -> Result<()> {
        let size = self.size.load(Acquire);
        let file = self.file.name();
        let state = self.bitmap_state()?;
        let (to, from) = (state.usable(file, target)?, state.usable(file, source)?);
        if to == from {
            return Ok(());
        }
        let (Some(to_bitmap), Some(from_bitmap)) = (state.list.get(to), state.list.get(from))
        else {
            return Ok(());
        };
        self.check_memory(&state, size, to_bitmap.needs(size))?;
        let marks = Arc::new(Marks::new(size, to_bitmap.granularity_bits));
        let mut view = View::new(self, from_bitmap, size);
        drop(state);
        view.add_to(&marks, size)?;
        let mut state = self.bitmap_state()?;
        if let Some(b) = state.list.get_mut(to) {
            b.older.push(marks.clone());
        }
        let saved = self.save(&mut state, false, None);
        if let Some(b) = state.list.get_mut(to) {
            // Where it was not saved now, because it is marked all the time, one layer is enough.
            let kept = b.older.iter().position(|m| Arc::ptr_eq(m, &marks));
            if let Some(at) = kept {
                b.older.remove(at);
            }
            if let (Some(_), Ok(()), Some(active)) = (kept, &saved, &b.active) {
                active.absorb(&marks);
            }
        }
        self.bitmaps.activate(&mut state);
        self.retire(state);
        saved
    }

    /// The disk is about to have another size: refuse what its bitmaps can not have, and say on disk
    /// that they are in use. They fit the new size when [`Qcow2::bitmaps_resized`] has been called.
    pub(in crate::format::qcow2) fn bitmaps_resizing(&self, new: u64) -> Result<()> {
        let state = self.bitmap_state()?;
        if state.list.is_empty() {
            return Ok(());
        }
        for b in state.list.iter().filter(|b| b.fit == Fit::Fine) {
            self.check_bitmap_data(&b.name, b.granularity_bits, new)?;
        }
        self.check_memory(&state, new, 0)?;
        drop(state);
        self.arm(true)?;
        // Before anybody can write past the old end there must be bits for it.
        if new > self.size.load(Acquire) { self.fit_marks(new) } else { Ok(()) }
    }

    /// The disk has another size, or has kept its old one. What can not be saved of its bitmaps now is
    /// saved when the image is closed; until then they are in use.
    pub(in crate::format::qcow2) fn bitmaps_resized(&self) {
        if let Err(e) = self.fit_bitmaps() {
            log(Level::Warn, format_args!("bitmaps are not saved yet: {e}"));
        }
    }

    fn fit_bitmaps(&self) -> Result<()> {
        let mut state = self.bitmap_state()?;
        if state.list.is_empty() {
            return Ok(());
        }
        let size = self.size.load(Acquire);
        for b in state.list.iter_mut().filter(|b| b.fit == Fit::Fine) {
            let bits = granules(size, b.granularity_bits);
            b.cut |= b.base > bits;
            b.base = b.base.min(bits);
        }
        state.unsaved = true;
        drop(state);
        self.fit_marks(size)?;
        let mut state = self.bitmap_state()?;
        let saved = self.save(&mut state, false, None);
        self.retire(state);
        saved
    }

    /// Give enabled bitmaps marks for a disk of `size` bytes, with those that they have.
    fn fit_marks(&self, size: u64) -> Result<()> {
        let mut state = self.bitmap_state()?;
        let mut all = Vec::new();
        for b in state.list.iter_mut() {
            if let Some(active) = &b.active {
                let new = Arc::new(Marks::new(size, b.granularity_bits));
                all.push((new.clone(), active.clone()));
                b.older.push(active.clone());
                b.active = Some(new);
            }
        }
        self.bitmaps.activate(&mut state);
        self.retire(state);
        let mut state = self.bitmap_state()?;
        for (new, old) in &all {
            new.absorb(old);
        }
        for b in &mut state.list {
            b.older.retain(|m| !all.iter().any(|(_, old)| Arc::ptr_eq(m, old)));
        }
        Ok(())
    }
}
