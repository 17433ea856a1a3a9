//! GUID partition tables. Specification: UEFI, chapter 5.3.

use libdeflater::Crc;

use super::*;

/// Bytes of the array of entries, at most: 128 entries take 16 KiB.
const MOST: u64 = 4 << 20;
/// Bytes of it that are read at a time.
const CHUNK: u64 = 256 << 10;

/// Which of the two headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In sector 1.
    First,
    /// The backup, in the last sector.
    Last,
}

/// A table whose header and entries are what their sums say.
pub(super) struct Table {
    /// Where the entries begin, bytes.
    entries: u64,
    count: u32,
    /// Bytes of one.
    size: u32,
    /// Sectors that partitions may have: first and last.
    usable: (u64, u64),
}

impl Table {
    pub(super) fn read(disk: &Disk<'_>, place: Place) -> Result<Self> {
        let (at, which) = match place {
            Place::First => (1, "GPT header"),
            Place::Last => (disk.sectors().saturating_sub(1), "backup GPT header"),
        };
        let refuse = |what: String| disk.refuse(format!("{which} in sector {at}: {what}"));
        let differs = |what: &str, found: u64, expected: u64| {
            refuse(format!("{what}: found {found:#x}, expected {expected:#x}"))
        };
        let header = disk.read(at)?;
        if header.get(..8) != Some(b"EFI PART") {
            let found = quoted(header.get(..8).unwrap_or_default());
            return Err(refuse(format!("found {found}, expected 'EFI PART'")));
        }
        let length = number(&header, 12, 4);
        if !(92..=disk.sector).contains(&length) {
            let sector = disk.sector;
            return Err(refuse(format!(
                "its length: found {length} bytes, expected 92 to {sector}"
            )));
        }
        let mut summed = header.get(..length as usize).unwrap_or_default().to_vec();
        if let Some(own) = summed.get_mut(16..20) {
            own.fill(0);
        }
        let sum = u64::from(libdeflater::crc32(&summed));
        if number(&header, 16, 4) != sum {
            return Err(differs("its sum (CRC-32)", number(&header, 16, 4), sum));
        }
        if number(&header, 24, 8) != at {
            return Err(differs("the sector that it says it is in", number(&header, 24, 8), at));
        }
        let (count, size) = (number(&header, 80, 4), number(&header, 84, 4));
        let bytes = count * size;
        if size < 128 || !size.is_power_of_two() || count == 0 || bytes > MOST {
            return Err(refuse(format!(
                "found {count} entries of {size} bytes, expected a power of two from 128 bytes on and at \
                 most {MOST} bytes for all"
            )));
        }
        let usable = (number(&header, 40, 8), number(&header, 48, 8));
        let from = number(&header, 72, 8);
        let taken = bytes.div_ceil(disk.sector);
        // On the disk, neither over a header nor over what partitions may have.
        let end = from.checked_add(taken).filter(|end| *end <= disk.sectors());
        let apart = end.is_some_and(|end| from > usable.1 || end <= usable.0);
        let Some(entries) = from.checked_mul(disk.sector).filter(|_| apart && from > 1) else {
            let (first, last) = usable;
            return Err(refuse(format!(
                "found its entries in {taken} sectors from {from} on, expected them on the disk outside \
                 of the usable sectors {first} to {last}"
            )));
        };
        let (mut crc, mut done) = (Crc::new(), 0);
        while done < bytes {
            let mut chunk = vec![0; (bytes - done).min(CHUNK) as usize];
            disk.dev.read_slice(&mut chunk, entries + done)?;
            crc.update(&chunk);
            done += chunk.len() as u64;
        }
        let sum = u64::from(crc.sum());
        if number(&header, 88, 4) != sum {
            return Err(differs("the sum of its entries (CRC-32)", number(&header, 88, 4), sum));
        }
        // Both fit: their product is at most MOST, and neither is 0.
        Ok(Self { entries, count: count as u32, size: size as u32, usable })
    }

    fn entry(&self, disk: &Disk<'_>, index: u32) -> Result<[u8; 128]> {
        let mut entry = [0; 128];
        let at = self.entries + u64::from(index) * u64::from(self.size);
        disk.dev.read_slice(&mut entry, at)?;
        Ok(entry)
    }

    pub(super) fn part(&self, disk: &Disk<'_>, wanted: u32) -> Result<Part> {
        let entry = match wanted.checked_sub(1).filter(|i| *i < self.count) {
            Some(index) => self.entry(disk, index)?,
            None => [0; 128],
        };
        if entry[..16] == [0; 16] {
            let mut there = Vec::new();
            for index in 0..self.count {
                if self.entry(disk, index)?[..16] != [0; 16] {
                    there.push(index + 1);
                    if there.len() >= 16 {
                        break;
                    }
                }
            }
            return Err(disk.none(wanted, "GPT", &there));
        }
        let (start, last) = (number(&entry, 32, 8), number(&entry, 40, 8));
        let inside = start >= self.usable.0 && last <= self.usable.1;
        let Some(count) = last.checked_sub(start).filter(|_| inside).and_then(|n| n.checked_add(1))
        else {
            let (from, to) = self.usable;
            return Err(disk.refuse(format!(
                "partition {wanted}: found sectors {start} to {last}, expected some among the usable ones, \
                 {from} to {to}"
            )));
        };
        let about = vec![
            ("partition.table", b"gpt".to_vec()),
            ("partition.type", guid(&entry, 0)),
            ("partition.uuid", guid(&entry, 16)),
            ("partition.name", name(&entry)),
        ];
        Ok(Part { start, count, about })
    }
}

/// A GUID as people write it: its first three numbers are little-endian.
fn guid(entry: &[u8], at: usize) -> Vec<u8> {
    let n = |from, len| number(entry, at + from, len);
    let tail: String = (10..16).map(|i| format!("{:02x}", n(i, 1))).collect();
    let (a, b, c) = (n(0, 4), n(4, 2), n(6, 2));
    format!("{a:08x}-{b:04x}-{c:04x}-{:02x}{:02x}-{tail}", n(8, 1), n(9, 1)).into_bytes()
}

/// The partition's name, from UTF-16.
fn name(entry: &[u8]) -> Vec<u8> {
    let units = (56..128).step_by(2).map(|at| number(entry, at, 2) as u16);
    let text = char::decode_utf16(units.take_while(|u| *u != 0));
    text.map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect::<String>().into_bytes()
}
