//! The COPIED flags of the active image: set where the refcount is exactly one, and only there. A flag
//! too many lets a write destroy what a snapshot has; one too few costs a copy.

use super::cover::Segment;
use super::tables::{COPIED, Form, Kind, OFFSET};
use super::*;

/// Entries that are read from an L1 table at once.
const L1_CHUNK: u64 = 64 << 10;

impl Check<'_> {
    /// Compare the flags with the refcounts that are on disk now.
    pub(super) fn check_copied(&mut self) -> Result<()> {
        // The rule: all that is there has the flag, and each refcount is one, on disk too.
        let plain = !self.uncopied
            && !self.differs
            && !self.counts.any_shared()
            && !self.beyond.any()
            && self.unknown.is_empty();
        if plain {
            return Ok(());
        }
        let r = &self.report;
        let mend = match self.repair {
            Repair::All => true,
            // Then the refcounts are right.
            Repair::Leaks => r.check_errors == 0 && r.corruptions == 0 && r.leaks == 0,
            Repair::Nothing => false,
        };
        let before = self.report.corruptions_fixed;
        // They may have been written since.
        self.near.set(None);
        self.copied_l1(mend)?;
        let form = self.form();
        self.with_tables(
            // (An L1 entry of 0 with flags names no table.)
            |part| part.times.active > 0 && part.from != 0,
            |check, part, bytes| check.copied_l2(form, part, bytes, mend),
        )?;
        if self.report.corruptions_fixed > before {
            self.report.changed = true;
            self.file.flush()?;
        }
        Ok(())
    }

    fn copied_l1(&mut self, mend: bool) -> Result<()> {
        let (offset, len) = (self.header.l1_offset, u64::from(self.header.l1_entries) * 8);
        let end = offset.saturating_add(len).min(self.file_size);
        let mut bytes = vec![0; len.min(L1_CHUNK) as usize];
        let mut at = offset;
        while at < end {
            let n = (end - at).min(L1_CHUNK) as usize;
            self.read(&mut bytes[..n], at)?;
            // The entries that change, from the first to the last.
            let (mut first, mut last, mut changed) = (usize::MAX, 0, 0);
            // (The file may end within an entry, which then is none.)
            for i in (0..n / 8 * 8).step_by(8) {
                let entry = be64(&bytes, i);
                let table = entry & OFFSET;
                if table == 0 {
                    continue;
                }
                let Some(one) = self.is_one(table >> self.bits)? else { continue };
                if one == (entry & COPIED != 0) {
                    continue;
                }
                self.tell(format_args!("the flag of the L1 entry {entry:#018x} is wrong"));
                if !mend {
                    self.report.corruptions += 1;
                    continue;
                }
                bytes[i..i + 8].copy_from_slice(&(entry ^ COPIED).to_be_bytes());
                (first, last, changed) = (first.min(i), i + 8, changed + 1);
            }
            let place = at.saturating_add(first as u64);
            if changed > 0 && self.is_free_to_mend_l1(place, (last - first) as u64) {
                self.file.write_slice(&bytes[first..last], place, ReqFlags::NONE)?;
                self.report.corruptions_fixed += changed;
            } else if changed > 0 {
                self.report.corruptions += changed;
                self.trouble(format_args!(
                    "the L1 table lies where other metadata is, at {place:#x}"
                ));
            }
            at += n as u64;
        }
        Ok(())
    }

    fn copied_l2(&mut self, form: Form, part: Segment, bytes: &mut [u8], mend: bool) -> Result<()> {
        let times = u64::from(part.times.active);
        // The entries that change, from the first to the last.
        let (mut first, mut last, mut changed) = (usize::MAX, 0, 0);
        for i in (0..bytes.len()).step_by(form.size()) {
            let raw = be64(bytes, i);
            if raw == 0 || !matches!(form.kind(raw), Kind::Normal | Kind::ZeroAllocated) {
                continue;
            }
            let copied = raw & COPIED != 0;
            let one = match form.data_file {
                true => Some(true),
                false => self.is_one((raw & OFFSET) >> self.bits)?,
            };
            if one.is_none_or(|one| one == copied) {
                continue;
            }
            self.tell(format_args!("the flag of the L2 entry {raw:#018x} is wrong"));
            if !mend {
                self.report.corruptions += times;
                continue;
            }
            bytes[i..i + 8].copy_from_slice(&(raw ^ COPIED).to_be_bytes());
            (first, last, changed) = (first.min(i), i + 8, changed + 1);
        }
        if changed == 0 {
            return Ok(());
        }
        let at = part.from + first as u64;
        if self.is_free_to_mend(at, (last - first) as u64) {
            self.file.write_slice(&bytes[first..last], at, ReqFlags::NONE)?;
            self.report.corruptions_fixed += changed;
        } else {
            self.report.corruptions += changed * times;
            self.trouble(format_args!("an L2 table lies where other metadata is, at {at:#x}"));
        }
        Ok(())
    }
}
