//! Partition tables of PCs: the master boot record, and the chain of extended boot records (EBR) that
//! logical partitions are in. There is no specification; what Linux and fdisk do is followed.

use std::collections::HashSet;

use super::*;

/// Entries of a boot record begin here, 16 bytes each.
const ENTRIES: usize = 446;
/// Logical partitions of a disk, at most: no system numbers as many.
const MOST: usize = 1024;

#[derive(Clone, Copy)]
struct Entry {
    boot: u8,
    kind: u8,
    start: u64,
    count: u64,
}

impl Entry {
    fn parse(sector: &[u8], index: usize) -> Self {
        let at = ENTRIES + 16 * index;
        let byte = |i| number(sector, at + i, 1) as u8;
        let (start, count) = (number(sector, at + 8, 4), number(sector, at + 12, 4));
        Self { boot: byte(0), kind: byte(4), start, count }
    }

    fn is_empty(&self) -> bool {
        self.kind == 0 || self.count == 0
    }

    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn part(&self, base: u64) -> Part {
        let kind = format!("0x{:02x}", self.kind).into_bytes();
        let about = vec![("partition.table", b"mbr".to_vec()), ("partition.type", kind)];
        // 32 bits each, on a disk whose sectors count at most 55.
        Part { start: base.saturating_add(self.start), count: self.count, about }
    }
}

/// The table in the first sector.
pub(super) struct Table<'a> {
    disk: &'a Disk<'a>,
    entries: [Entry; 4],
}

fn is_signed(sector: &[u8]) -> bool {
    sector.get(510..512) == Some(&[0x55, 0xaa])
}

impl<'a> Table<'a> {
    pub(super) fn parse(disk: &'a Disk<'a>, sector: &[u8]) -> Result<Self> {
        if !is_signed(sector) {
            let found = number(sector, 510, 2).swap_bytes() >> 48;
            return Err(disk.refuse(format!(
                "no partition table: found {found:04x} at byte 510, expected 55aa"
            )));
        }
        let entries = [0, 1, 2, 3].map(|i| Entry::parse(sector, i));
        // The first sector of a file system ends the same way; what is here then is part of a program.
        if let Some(e) = entries.iter().find(|e| e.boot & 0x7f != 0) {
            let boot = e.boot;
            return Err(disk.refuse(format!(
                "no partition table: found a boot flag of {boot:#04x}, expected 0x00 or 0x80 (a file \
                 system without partitions?)"
            )));
        }
        Ok(Self { disk, entries })
    }

    /// Whether it only says that there is a GPT.
    pub(super) fn is_protective(&self) -> bool {
        self.entries.iter().any(|e| e.kind == 0xee)
    }

    pub(super) fn part(&self, wanted: u32) -> Result<Part> {
        let mut there = Vec::new();
        for (e, number) in self.entries.iter().zip(1..).filter(|(e, _)| !e.is_empty()) {
            if number == wanted {
                if e.is_extended() {
                    return Err(self.disk.refuse(format!(
                        "partition {number} is an extended one: the logical partitions in it have the \
                         numbers from 5 on"
                    )));
                }
                return Ok(e.part(0));
            }
            there.push(number);
        }
        let mut logical = 5;
        let mut visited = HashSet::new();
        for e in self.entries.iter().filter(|e| !e.is_empty() && e.is_extended()) {
            // A small number is none of a logical partition: its table need not even be sound.
            if wanted < 5 {
                break;
            }
            if let Some(part) = self.in_extended(e, wanted, &mut logical, &mut visited)? {
                return Ok(part);
            }
        }
        there.extend(5..logical);
        Err(self.disk.none(wanted, "MBR", &there))
    }

    /// Walk the chain of one extended partition.
    fn in_extended(
        &self,
        extended: &Entry,
        wanted: u32,
        logical: &mut u32,
        visited: &mut HashSet<u64>,
    ) -> Result<Option<Part>> {
        let disk = self.disk;
        let (base, mut at) = (extended.start, extended.start);
        let end = base + extended.count;
        loop {
            if !visited.insert(at) {
                return Err(disk.refuse(format!(
                    "the chain of logical partitions comes to sector {at} a second time"
                )));
            }
            if visited.len() > MOST {
                return Err(disk.refuse(format!("more than {MOST} logical partitions")));
            }
            let sector = disk.read(at)?;
            if !is_signed(&sector) {
                // As behind the last partition that a tool has written: an extended one may be empty.
                if at == base && sector.iter().all(|b| *b == 0) {
                    return Ok(None);
                }
                let found = number(&sector, 510, 2).swap_bytes() >> 48;
                return Err(disk.refuse(format!(
                    "the boot record of logical partition {logical} in sector {at}: found {found:04x} \
                     at byte 510, expected 55aa"
                )));
            }
            let entries = [0, 1].map(|i| Entry::parse(&sector, i));
            for e in entries.iter().filter(|e| !e.is_empty() && !e.is_extended()) {
                if *logical == wanted {
                    let part = e.part(at);
                    if part.start + part.count > end || part.start <= at {
                        let (from, to) = (part.start, part.start + part.count);
                        return Err(disk.refuse(format!(
                            "logical partition {wanted} leaves the extended one: found sectors {from} to \
                             {to}, expected them behind {at} and before {end}"
                        )));
                    }
                    return Ok(Some(part));
                }
                *logical += 1;
            }
            let Some(link) = entries.iter().find(|e| !e.is_empty() && e.is_extended()) else {
                return Ok(None);
            };
            at = base + link.start;
            if at >= end {
                return Err(disk.refuse(format!(
                    "the chain of logical partitions leaves the extended one: found a link to sector {at}, \
                     expected it before {end}"
                )));
            }
        }
    }
}
