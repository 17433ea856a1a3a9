//! The snapshot table: which L1 tables it names, and what of it is dropped or completed when all is
//! mended.
//!
//! Dropped are snapshots beyond what a table may have, and extra data that nobody knows beyond what an
//! entry may have. Entries of version 3 must have 16 bytes of extra data; those that are too short are
//! completed.

use std::sync::Arc;

use super::super::guard::Areas;
use super::super::header::at::SNAPSHOTS as POINTER;
use super::super::refcount::{self, Refcounts, Run};
use super::*;

const MAX_SNAPSHOTS: u32 = 65536;
/// Largest table, and largest extra data of an entry, bytes.
const MAX_TABLE: u64 = 64 << 20;
const MAX_EXTRA: u32 = 1024;
/// Bytes of an entry without its extra data and names; extra data that is known.
const ENTRY: u64 = 40;
const KNOWN_EXTRA: usize = 24;

/// An entry.
pub struct Snapshot {
    pub l1_offset: u64,
    pub l1_entries: u32,
    /// Where it lies, and the length of its extra data and its names.
    at: u64,
    extra: u32,
    names: u32,
}

/// The snapshots of an image.
#[derive(Default)]
pub struct Snapshots {
    pub list: Vec<Snapshot>,
    /// Where the table lies: offset and bytes.
    pub place: Option<(u64, u64)>,
    /// What is wrong with it.
    wrong: u64,
}

impl Check<'_> {
    pub(super) fn read_snapshots(&mut self) -> Result<()> {
        let (number, offset) = (be32(&self.head, 60), be64(&self.head, 64));
        if number == 0 {
            return Ok(());
        }
        let all = self.repair == Repair::All;
        if !offset.is_multiple_of(self.cluster())
            || offset > i64::MAX as u64 - MAX_TABLE
            || (number > MAX_SNAPSHOTS && !all)
        {
            self.blind = true;
            self.trouble(format_args!("{number} snapshots at {offset:#x} can not be"));
            return Ok(());
        }
        let mut keep = number.min(MAX_SNAPSHOTS);
        let (mut at, mut len) = (offset, 0u64);
        let mut entry = [0; ENTRY as usize];
        for i in 0..keep {
            let begin = at.next_multiple_of(8);
            self.read(&mut entry, begin)?;
            let (id, name) = (be16(&entry, 12), be16(&entry, 14));
            let (extra, names) = (be32(&entry, 36), u32::from(id) + u32::from(name));
            let end = begin.saturating_add(ENTRY + u64::from(extra) + u64::from(names));
            len = len.next_multiple_of(8)
                + ENTRY
                + u64::from(extra.min(MAX_EXTRA))
                + u64::from(names);
            let too_long = len > MAX_TABLE || end - offset > i32::MAX as u64;
            if (extra > MAX_EXTRA || too_long) && !all {
                self.blind = true;
                self.trouble(format_args!(
                    "snapshot {i} has {extra} bytes of extra data, or is one too many"
                ));
                self.snapshots = Snapshots::default();
                return Ok(());
            }
            if too_long {
                keep = i;
                break;
            }
            self.snapshots.wrong += u64::from(extra > MAX_EXTRA);
            if self.header.version >= 3 && extra < 16 {
                self.snapshots.wrong += 1;
                self.tell(format_args!("snapshot {i} has too little extra data"));
            }
            let (l1_offset, l1_entries) = (be64(&entry, 0), be32(&entry, 8));
            self.snapshots.list.push(Snapshot { l1_offset, l1_entries, at: begin, extra, names });
            at = end;
        }
        self.snapshots.place = Some((offset, at - offset));
        if keep < number {
            // Now, so that what follows finds the same in the header.
            self.file.write_slice(&keep.to_be_bytes(), POINTER, ReqFlags::NONE)?;
            self.file.flush()?;
            self.report.changed = true;
            self.report.corruptions_fixed += u64::from(number - keep);
            log(
                Level::Warn,
                format_args!("{}: {} snapshots dropped", self.file.name(), number - keep),
            );
        }
        Ok(())
    }

    /// Write the table anew, where it has to be and may be.
    pub(super) fn mend_snapshots(&mut self) -> Result<()> {
        let wrong = self.snapshots.wrong;
        let sound = !self.rebuild && !self.blind && self.report.check_errors == 0;
        if wrong > 0 && self.repair == Repair::All && sound {
            let table = self.new_table()?;
            self.put_table(&table)?;
            self.report.corruptions_fixed += wrong;
            self.report.changed = true;
        } else {
            self.report.corruptions += wrong;
        }
        Ok(())
    }

    fn new_table(&self) -> Result<Vec<u8>> {
        let mut table = Vec::new();
        for s in &self.snapshots.list {
            table.resize(table.len().next_multiple_of(8), 0);
            let (begin, kept) = (table.len(), s.extra.min(MAX_EXTRA) as usize);
            table.resize(begin + ENTRY as usize + kept, 0);
            self.read(&mut table[begin..], s.at)?;
            let known = kept.max(KNOWN_EXTRA);
            table[begin + 36..begin + 40].copy_from_slice(&(known as u32).to_be_bytes());
            // What is missing: the state's size (which the entry has), the disk's, no instructions counted.
            let state = u64::from(be32(&table, begin + 32)).to_be_bytes();
            let missing = [state, self.header.size.to_be_bytes(), u64::MAX.to_be_bytes()].concat();
            // A field that is there in part only counts as missing.
            let whole = kept - kept % 8;
            if kept < KNOWN_EXTRA {
                table.truncate(begin + ENTRY as usize + whole);
                table.extend(&missing[whole..]);
            }
            let names = table.len();
            table.resize(names + s.names as usize, 0);
            self.read(&mut table[names..], s.at + ENTRY + u64::from(s.extra))?;
        }
        Ok(table)
    }

    /// Put the table to a new place, and name it in one write of the header.
    fn put_table(&mut self, table: &[u8]) -> Result<()> {
        let (file, bits) = (self.file, self.bits);
        let host = Bare { file, bits };
        let h = Header::read_to_check(file)?;
        let areas = Arc::new(Areas::new(0));
        let (order, offset, clusters) = (h.refcount_order, h.reftable_offset, h.reftable_clusters);
        let mut refs = Refcounts::load(file, bits, order, offset, clusters, areas)?;
        let l1 = (u64::from(h.l1_entries) * 8).div_ceil(1 << bits);
        refs.protect(Run { first: h.l1_offset >> bits, count: l1 });
        let run = refs.allocate_all(&host, (table.len() as u64).div_ceil(1 << bits))?;
        refs.publish(file)?;
        file.write_slice(table, run.first << bits, ReqFlags::NONE)?;
        file.flush()?;
        file.write_slice(&(run.first << bits).to_be_bytes(), POINTER + 4, ReqFlags::NONE)?;
        file.flush()?;
        // (What reached past the end was not counted: what is there is another's.)
        let limit = self.file_size.saturating_add(self.cluster());
        let counted =
            self.snapshots.place.filter(|(offset, len)| offset.saturating_add(*len) < limit);
        if let Some((offset, len)) = counted {
            for cluster in offset >> bits..(offset + len).div_ceil(1 << bits) {
                refs.release(file, cluster)?;
            }
            refs.publish(file)?;
        }
        file.flush()
    }
}

/// An image that is not open otherwise.
struct Bare<'a> {
    file: &'a Device,
    bits: u32,
}

impl refcount::Host for Bare<'_> {
    fn file(&self) -> &Device {
        self.file
    }

    fn switch_table(&self, run: Run, content: &[u8]) -> Result<()> {
        refcount::write_table(self.file, run.first << self.bits, run.count, content)
    }
}
