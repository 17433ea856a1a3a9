//! Persistent dirty bitmaps: which granules of the disk were changed since some moment.
//!
//! What it promises:
//! * A write marks what it is about to change before its data moves, without a lock; with no bitmap
//!   to mark that costs one load.
//! * A bitmap on disk that says of itself that it can be trusted can be: before the first change the
//!   bitmaps that will be outdated by it are marked as in use, on stable storage (`arm`), and the
//!   mark goes only when all of the guest's data and all of the bitmap are on disk (`store`).
//!   A power cut in between leaves bitmaps that are inconsistent, and an image that is not.
//! * A bitmap that was in use when the image was opened is shown as inconsistent, and never used.
//! * Memory: for a bitmap that is only there, some hundred bytes; for one that is marked, as much as
//!   its bits need, taken where they are set. The file is read when somebody asks.
//!
//! Source: "Bitmaps" of the QCOW2 specification (QEMU, docs/interop/qcow2).
//!
//! Lock order: `Bitmaps::state` before all others of the image. Whoever holds it must not wait for
//! calls under way: one of them may be about to arm.

mod change;
mod directory;
mod marks;
mod store;
mod view;

use parking_lot::MutexGuard;

use super::*;
pub(super) use directory::EXTENSION as EXTENSION_BYTES;
use directory::{AUTO, EXTRA_COMPATIBLE, Entry, Extension, IN_USE, Table};
use marks::{Marks, granules};
use view::View;

/// Bytes of bitmaps that are read to count what is dirty in them.
const MAX_COUNTING: u64 = 64 << 20;
/// What marking bitmaps may need of memory, bytes; and for a hostile image, with its directory.
const MAX_MARKED: u64 = 4 << 30;
const MAX_UNTRUSTED_MARKED: u64 = 64 << 20;
const MAX_UNTRUSTED_DIRECTORY: u64 = 1 << 20;

/// Whether a bitmap can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    Fine,
    /// It was in use when the image was opened: whoever used it never saved it.
    InUse,
    /// It has extra data that one must understand to use it.
    Foreign,
}

/// A bitmap of the image.
struct Bitmap {
    name: Vec<u8>,
    granularity_bits: u32,
    extra: Vec<u8>,
    fit: Fit,
    /// Writes are noted in it.
    enabled: bool,
    /// The directory's flags, as they are on disk.
    flags: u32,
    /// Its table on disk.
    table: Option<Table>,
    /// How many bits of what is on disk count; the rest are zero.
    base: u64,
    /// The disk became smaller: what is on disk has bits past its end.
    cut: bool,
    /// Where writes are marked, if they are.
    active: Option<Arc<Marks>>,
    /// Marks made otherwise, or before.
    older: Vec<Arc<Marks>>,
}

impl Bitmap {
    fn new(entry: Entry, size: u64) -> Self {
        let foreign = !entry.extra.is_empty() && entry.flags & EXTRA_COMPATIBLE == 0;
        let fit = match () {
            _ if entry.flags & IN_USE != 0 => Fit::InUse,
            _ if foreign => Fit::Foreign,
            _ => Fit::Fine,
        };
        Self {
            base: granules(size, entry.granularity_bits),
            enabled: fit == Fit::Fine && entry.flags & AUTO != 0,
            name: entry.name,
            granularity_bits: entry.granularity_bits,
            extra: entry.extra,
            fit,
            flags: entry.flags,
            table: Some(entry.table),
            cut: false,
            active: None,
            older: Vec::new(),
        }
    }

    fn marks(&self) -> Vec<Arc<Marks>> {
        self.older.iter().chain(&self.active).cloned().collect()
    }

    /// Bytes that its marks may need.
    fn needs(&self, size: u64) -> u64 {
        (granules(size, self.granularity_bits) / 8).next_multiple_of(view::PIECE)
    }

    /// The directory's entry for it, with these flags and this table.
    fn entry(&self, flags: u32, table: Table) -> Entry {
        Entry {
            name: self.name.clone(),
            table,
            flags,
            granularity_bits: self.granularity_bits,
            extra: self.extra.clone(),
        }
    }
}

/// The bitmaps as they are in memory.
#[derive(Default)]
struct State {
    loaded: bool,
    /// Where the directory on disk is; none if there are no bitmaps.
    extension: Option<Extension>,
    list: Vec<Bitmap>,
    /// Memory has what the disk lacks, and not only marks.
    unsaved: bool,
    /// Marks that calls under way may still set.
    retired: Vec<Retired>,
}

impl State {
    fn position(&self, file: &Name, name: &[u8]) -> Result<usize> {
        self.list.iter().position(|b| b.name == name).ok_or_else(|| {
            bitmap_error(file, name, "there is no bitmap of that name", libc::ENOENT)
        })
    }

    /// Where the bitmap `name` is, which must be one that can be used.
    fn usable(&self, file: &Name, name: &[u8]) -> Result<usize> {
        let at = self.position(file, name)?;
        let what = match self.list.get(at).map(|b| b.fit) {
            Some(Fit::Fine) => return Ok(at),
            Some(Fit::Foreign) => "it has extra data that this version does not know",
            _ => "it is inconsistent (it was in use and never saved); it can only be removed",
        };
        Err(bitmap_error(file, name, what, libc::ESTALE))
    }
}

fn bitmap_error(file: &Name, name: &[u8], what: &str, errno: i32) -> Error {
    let what = format!("bitmap {}: {what}", quoted(name));
    Error::Refused { file: file.clone(), what, errno }
}

/// The bitmaps of an image.
pub(super) struct Bitmaps {
    /// Where writes are marked: those of all enabled bitmaps. NULL if there is none. Replaced under
    /// `state`; what was there is freed when no call is under way that may have seen it.
    active: AtomicPtr<Vec<Arc<Marks>>>,
    /// The disk says of all enabled bitmaps that they are in use.
    armed: AtomicBool,
    untrusted: bool,
    state: Mutex<State>,
}

impl Drop for Bitmaps {
    fn drop(&mut self) {
        drop(Retired(std::mem::replace(self.active.get_mut(), ptr::null_mut())));
    }
}

/// Marks taken out of [`Bitmaps::active`]. To be dropped when no call is under way that may have seen
/// them there.
struct Retired(*mut Vec<Arc<Marks>>);

// SAFETY: owns what it points to, which is Send.
unsafe impl Send for Retired {}

impl Drop for Retired {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by Box::into_raw in `activate`, and nobody has it any more.
            drop(unsafe { Box::from_raw(self.0) });
        }
    }
}

impl Bitmaps {
    /// None known yet.
    pub(super) fn new(untrusted: bool) -> Self {
        Self {
            active: AtomicPtr::new(ptr::null_mut()),
            armed: AtomicBool::new(false),
            untrusted,
            state: Mutex::default(),
        }
    }

    /// Let writes be marked in all bitmaps that are enabled now.
    fn activate(&self, state: &mut State) {
        let all: Vec<_> =
            state.list.iter().filter(|b| b.enabled).filter_map(|b| b.active.clone()).collect();
        let new = if all.is_empty() { ptr::null_mut() } else { Box::into_raw(Box::new(all)) };
        state.retired.push(Retired(self.active.swap(new, SeqCst)));
    }
}

impl Qcow2 {
    /// A change of the guest's data is about to be made: mark it.
    #[inline]
    pub(super) fn note_change(&self, offset: u64, count: u64) -> Result<()> {
        match self.bitmaps.active.load(Acquire).is_null() {
            true => Ok(()),
            false => self.mark(offset, count),
        }
    }

    #[inline(never)]
    fn mark(&self, offset: u64, count: u64) -> Result<()> {
        if !self.bitmaps.armed.load(Acquire) {
            self.arm(false)?;
        }
        // Looked at again: until they are armed, bitmaps may be saved and begun anew.
        // SAFETY: NULL, or marks that are freed only when no call is under way that may have seen
        // them, and who changes data is one.
        if let Some(active) = unsafe { self.bitmaps.active.load(Acquire).as_ref() } {
            active.iter().for_each(|marks| marks.set(offset, count));
        }
        Ok(())
    }

    /// Let go of `state`, and wait until nobody sets marks any more that are not active. The caller is
    /// no call under way.
    fn retire(&self, mut state: MutexGuard<'_, State>) {
        let old = std::mem::take(&mut state.retired);
        drop(state);
        self.calls.wait();
        drop(old);
    }

    /// The bitmaps, read if they were not yet.
    fn bitmap_state(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = self.bitmaps.state.lock();
        if !state.loaded {
            self.load_state(&mut state)?;
        }
        Ok(state)
    }

    fn load_state(&self, state: &mut State) -> Result<()> {
        let consistent = self.features.autoclear() & header::AUTOCLEAR_BITMAPS != 0;
        let (file, size) = (&self.file, self.size.load(Acquire));
        if let Some(raw) = self.header.bitmaps.as_ref().filter(|_| consistent) {
            let extension = Extension::read(file, raw, self.cluster_bits)?;
            if self.bitmaps.untrusted && extension.size > MAX_UNTRUSTED_DIRECTORY {
                return Err(Error::policy(
                    file.name(),
                    format!(
                        "its bitmap directory has {} bytes, and QBLK_OPEN_UNTRUSTED allows \
                         {MAX_UNTRUSTED_DIRECTORY}",
                        extension.size
                    ),
                ));
            }
            let entries = directory::read(file, &extension, self.cluster_bits, size)?;
            state.list = entries.into_iter().map(|e| Bitmap::new(e, size)).collect();
            state.extension = Some(extension);
        }
        state.loaded = true;
        Ok(())
    }

    /// Read the bitmaps of an image that is to be written, and be ready to mark what is.
    pub(super) fn begin_bitmaps(&self) -> Result<()> {
        let mut state = self.bitmap_state()?;
        self.note_bitmap_directory(state.extension.as_ref().map(|e| (e.offset, e.size)));
        let size = self.size.load(Acquire);
        self.check_memory(&state, size, 0)?;
        for b in state.list.iter_mut().filter(|b| b.enabled) {
            b.active = Some(Arc::new(Marks::new(size, b.granularity_bits)));
        }
        self.bitmaps.activate(&mut state);
        Ok(())
    }

    /// Refuse what would need too much memory: marks of all enabled bitmaps, and `more`.
    fn check_memory(&self, state: &State, size: u64, more: u64) -> Result<()> {
        let limit = if self.bitmaps.untrusted { MAX_UNTRUSTED_MARKED } else { MAX_MARKED };
        let enabled = state.list.iter().filter(|b| b.enabled);
        let needed = enabled.fold(more, |sum, b| sum.saturating_add(b.needs(size)));
        match needed > limit {
            true => Err(Error::policy(
                self.file.name(),
                format!(
                    "marking in its bitmaps may need {needed} bytes of memory, and {limit} are allowed; \
                     disabled bitmaps need none"
                ),
            )),
            false => Ok(()),
        }
    }

    /// Say on disk, and make it last, that bitmaps are in use: the enabled ones, or all (`every`)
    /// because the disk's size is to change.
    fn arm(&self, every: bool) -> Result<()> {
        let mut state = self.bitmap_state()?;
        if self.bitmaps.armed.load(Acquire) && !every {
            return Ok(());
        }
        let writer = self.writer_parts()?;
        let mut changed = false;
        for b in &mut state.list {
            // Those that must not be used are left as they are, but for this: they are outdated, too.
            let outdated = every || b.enabled || (b.fit == Fit::Foreign && b.flags & AUTO != 0);
            changed |= outdated && b.flags & IN_USE == 0;
            b.flags |= if outdated { IN_USE } else { 0 };
        }
        if changed {
            self.or_fail(writer, self.write_flags(&state))?;
        }
        self.bitmaps.armed.store(true, Release);
        Ok(())
    }

    /// Whether there are bitmaps.
    pub(super) fn has_bitmaps(&self) -> bool {
        let state = self.bitmaps.state.lock();
        if state.loaded { !state.list.is_empty() } else { self.header.has_bitmaps }
    }

    /// See [`Driver::bitmaps`].
    pub(super) fn bitmap_infos(&self, count: bool) -> Result<Vec<BitmapInfo>> {
        let size = self.size.load(Acquire);
        let (mut infos, mut budget) = (Vec::new(), MAX_COUNTING);
        loop {
            // What is read is read without the lock, for who writes may need it; the call that asks
            // keeps what it reads from being given up.
            let state = self.bitmap_state()?;
            let Some(b) = state.list.get(infos.len()) else { return Ok(infos) };
            let live = b.fit == Fit::Fine;
            let view = (live && count).then(|| View::new(self, b, size));
            let mut info = BitmapInfo {
                name: b.name.clone(),
                granularity: 1 << b.granularity_bits,
                dirty: None,
                enabled: if live { b.enabled } else { b.flags & AUTO != 0 },
                inconsistent: !live,
                persistent: true,
            };
            drop(state);
            if let Some(mut view) = view {
                info.dirty = match view.dirty_bytes(size, budget) {
                    // It is said of the bitmap that is asked for; this is about all.
                    Err(Error::Corrupt { .. }) => None,
                    dirty => dirty?,
                };
                budget = budget.saturating_sub(view.read);
            }
            infos.push(info);
        }
    }

    /// See [`Driver::status`]: of the contexts of bitmaps.
    pub(super) fn bitmap_status(
        &self,
        context: &[u8],
        offset: u64,
        count: u64,
        most: usize,
        out: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        let Some(name) = context.strip_prefix(BITMAP_CONTEXT) else {
            return Err(Error::NotSupported("meta contexts other than qemu:dirty-bitmap:NAME"));
        };
        let state = self.bitmap_state()?;
        let at = state.usable(self.file.name(), name)?;
        let Some(bitmap) = state.list.get(at) else { return Ok(()) };
        let mut view = View::new(self, bitmap, self.size.load(Acquire));
        drop(state);
        view.runs(offset, count, |len, dirty| {
            out.push((len, dirty.into()));
            out.len() < most
        })
    }
}
