//! What else has clusters: the LUKS header, and persistent bitmaps.

use super::cover::{Times, segments};
use super::*;
use crate::format::qcow2::header::{AUTOCLEAR_BITMAPS, EXT_BITMAPS, EXT_END, EXT_LUKS};

/// Largest header of LUKS that is believed, bytes: eight keys of 64 bytes in a million stripes.
const MAX_LUKS: u64 = 512 << 20;
/// Limits of bitmaps: how many, bytes of the directory, entries of a table, bytes of a bitmap.
const MAX_BITMAPS: u64 = 65535;
const MAX_DIRECTORY: u64 = 1024 * MAX_BITMAPS;
const MAX_TABLE: u32 = 0x800_0000;
const MAX_BITMAP: u64 = 512 << 20;
/// Bytes of an entry of the directory without its name.
const ENTRY: u64 = 24;
/// A bitmap is being written, and what is in it means nothing.
const IN_USE: u32 = 1;
const FLAGS_RESERVED: u32 = !7;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bytes of tables that are read at once.
const CHUNK: u64 = 1 << 20;

impl Check<'_> {
    /// The data of a header extension.
    fn extension(&self, magic: u32) -> Option<&[u8]> {
        let mut at = if self.header.version < 3 { 72 } else { be32(&self.head, 100) as usize };
        let name = be64(&self.head, 8) as usize;
        let end = if name == 0 { self.head.len() } else { name.min(self.head.len()) };
        while at + 8 <= end && be32(&self.head, at) != EXT_END {
            let len = be32(&self.head, at + 4) as usize;
            if be32(&self.head, at) == magic {
                return self.head.get(at + 8..at + 8 + len);
            }
            at = (at + 8 + len).next_multiple_of(8);
        }
        None
    }

    /// Count the clusters of a LUKS header.
    pub(super) fn count_luks(&mut self) {
        if self.header.crypt != 2 {
            return;
        }
        let place = self.extension(EXT_LUKS).map(|e| (be64(e, 0), be64(e, 8)));
        match place {
            Some((offset, len)) if offset.is_multiple_of(self.cluster()) && len <= MAX_LUKS => {
                self.refer("the LUKS header", offset, len, 1);
                self.note_metadata(offset, len);
            }
            _ => self.lost_owner("where the LUKS header lies is not known"),
        }
    }

    /// Clusters that have an owner can not be told from those that have none.
    fn lost_owner(&mut self, what: &str) {
        self.report.corruptions += 1;
        self.blind = true;
        self.trouble(format_args!("{what}"));
    }

    /// Count the clusters of bitmaps: the directory, their tables, their data.
    pub(super) fn count_bitmaps(&mut self) -> Result<()> {
        if self.header.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return Ok(());
        }
        let Some(e) = self.extension(EXT_BITMAPS) else { return Ok(()) };
        let (number, len, offset) = (u64::from(be32(e, 0)), be64(e, 8), be64(e, 16));
        let good = (1..=MAX_BITMAPS).contains(&number)
            && (1..=MAX_DIRECTORY).contains(&len)
            && offset.is_multiple_of(self.cluster());
        if !good {
            self.lost_owner("where the bitmap directory lies is not known");
            return Ok(());
        }
        self.refer("the bitmap directory", offset, len, 1);
        self.note_metadata(offset, len);
        let Some(tables) = self.directory(offset, len, number)? else {
            self.lost_owner("the bitmap directory is wrong");
            return Ok(());
        };
        tables.iter().for_each(|t| self.note_metadata(t.0, t.1));
        self.refer_tables("a bitmap table", &tables);
        let end = |t: &(u64, u64, Times)| t.0.saturating_add(t.1).min(self.file_size);
        let parts = segments(tables.iter().map(|t| (t.0, end(t), t.2)));
        for part in parts {
            let mut bytes = vec![0; (part.to - part.from).min(CHUNK) as usize];
            let mut at = part.from;
            while at < part.to {
                let n = (part.to - at).min(CHUNK) as usize;
                self.read(&mut bytes[..n], at)?;
                self.progress.at(self.done.min(self.todo), self.todo + 1)?;
                if !self.count_bitmap(&bytes[..n], part.times.all.into()) {
                    self.lost_owner("a bitmap table is wrong");
                    return Ok(());
                }
                at += n as u64;
            }
        }
        Ok(())
    }

    /// Where the tables of all bitmaps lie, if the directory is as it must be.
    fn directory(
        &self,
        offset: u64,
        len: u64,
        number: u64,
    ) -> Result<Option<Vec<(u64, u64, Times)>>> {
        let mut tables = Vec::new();
        let mut entry = [0; ENTRY as usize];
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            if end - at < ENTRY || tables.len() as u64 == number {
                return Ok(None);
            }
            self.read(&mut entry, at)?;
            let (table, entries, flags) = (be64(&entry, 0), be32(&entry, 8), be32(&entry, 12));
            let (kind, granularity) = (entry[16], entry[17]);
            let (name, extra) = (u64::from(be16(&entry, 18)), be32(&entry, 20));
            let size = u64::from(entries) << self.bits;
            // How much of the disk a bitmap of that size is for.
            let covers =
                size.checked_mul(8).map_or(u128::MAX, |b| u128::from(b) << (granularity & 63));
            let good = entries != 0
                && entries <= MAX_TABLE
                && table != 0
                && table.is_multiple_of(self.cluster())
                && (9..=31).contains(&granularity)
                && flags & FLAGS_RESERVED == 0
                && name <= 1023
                && kind == 1
                && extra == 0
                && size <= MAX_BITMAP
                && (flags & IN_USE != 0 || u128::from(self.header.size & !511) <= covers);
            if !good {
                return Ok(None);
            }
            tables.push((table, u64::from(entries) * 8, Times::once(false)));
            at = at.saturating_add((ENTRY + name).next_multiple_of(8));
        }
        Ok((at == end && tables.len() as u64 == number).then_some(tables))
    }

    /// Count what entries of a bitmap table refer to; `false` if one can not be.
    fn count_bitmap(&mut self, entries: &[u8], times: u64) -> bool {
        for entry in entries.chunks_exact(8).map(|e| be64(e, 0)).filter(|e| *e != 0) {
            let offset = entry & OFFSET;
            let wrong = entry & TABLE_RESERVED != 0
                || (offset != 0 && (entry & 1 != 0 || offset & (self.cluster() - 1) != 0));
            if wrong {
                self.tell(format_args!("the bitmap table entry {entry:#018x} is wrong"));
                return false;
            }
            if offset != 0 {
                self.refer("a bitmap", offset, self.cluster(), times);
            }
        }
        true
    }
}
