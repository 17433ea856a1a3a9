//! The bitmap directory: reading it, with every limit checked before a number is used, and writing it.
//!
//! Source: "Bitmaps extension" and "Bitmap directory" of the QCOW2 specification; limits are those
//! that QEMU enforces.

use super::marks::granules;
use crate::block::*;
use crate::format::qcow2::entry::{be16, be32, be64};

/// Most bitmaps of an image.
pub const MAX_BITMAPS: u32 = 65535;
/// Largest directory, bytes.
pub const MAX_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;
/// Longest name, bytes.
pub const MAX_NAME: usize = 1023;
/// Most bytes of a bitmap's data, in whole clusters.
pub const MAX_DATA: u64 = 512 << 20;
/// Most entries of a bitmap's table.
const MAX_TABLE: u32 = 0x800_0000;
/// Granularities: 2^9 to 2^31 bytes.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;

/// Bytes of an entry before its extra data and its name.
const FIXED: usize = 24;

/// The bitmap was not saved, or is being changed.
pub const IN_USE: u32 = 1;
/// Writes are to be noted in it.
pub const AUTO: u32 = 2;
/// It may be used although its extra data is not understood.
pub const EXTRA_COMPATIBLE: u32 = 4;

/// The header extension, which says where the directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extension {
    pub bitmaps: u32,
    /// The directory's size, bytes.
    pub size: u64,
    pub offset: u64,
}

/// Bytes of the extension.
pub const EXTENSION: usize = 24;

/// A bitmap as the directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: Vec<u8>,
    /// Where its table lies.
    pub table: Table,
    pub flags: u32,
    pub granularity_bits: u32,
    /// Of no use to us, and kept.
    pub extra: Vec<u8>,
}

/// Where the table of a bitmap lies: entries of 8 bytes, one for each cluster of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    pub offset: u64,
    pub entries: u32,
}

impl Extension {
    /// Read the extension's 24 bytes, and check what they say against the image they are in.
    pub fn read(file: &Device, data: &[u8], cluster_bits: u32) -> Result<Self> {
        let bad = |what: String| {
            Err(Error::corrupt(file.name(), format!("bitmaps header extension: {what}")))
        };
        let e = Self { bitmaps: be32(data, 0), size: be64(data, 8), offset: be64(data, 16) };
        if be32(data, 4) != 0 {
            return bad(format!("reserved field: found {:#x}, expected 0", be32(data, 4)));
        }
        if !(1..=MAX_BITMAPS).contains(&e.bitmaps) {
            return bad(format!("found {} bitmaps, expected 1 to {MAX_BITMAPS}", e.bitmaps));
        }
        if e.size > MAX_DIRECTORY {
            return bad(format!(
                "directory size: found {} bytes, expected at most {MAX_DIRECTORY}",
                e.size
            ));
        }
        if e.offset == 0 || !e.offset.is_multiple_of(1 << cluster_bits) {
            return bad(format!(
                "directory offset: found {:#x}, expected a multiple of the cluster size",
                e.offset
            ));
        }
        if e.offset.checked_add(e.size).is_none_or(|end| end > file.size()) {
            return bad(format!(
                "the directory of {} bytes at {:#x} lies past the end of the file ({} bytes): is it cut off?",
                e.size,
                e.offset,
                file.size()
            ));
        }
        Ok(e)
    }

    /// As it is in the header.
    pub fn encode(&self) -> [u8; EXTENSION] {
        let mut out = [0; EXTENSION];
        out[..4].copy_from_slice(&self.bitmaps.to_be_bytes());
        out[8..16].copy_from_slice(&self.size.to_be_bytes());
        out[16..].copy_from_slice(&self.offset.to_be_bytes());
        out
    }
}

/// Read the directory of an image of `size` bytes.
pub fn read(file: &Device, e: &Extension, cluster_bits: u32, size: u64) -> Result<Vec<Entry>> {
    let mut bytes = vec![0; e.size as usize];
    file.read_slice(&mut bytes, e.offset)?;
    // An entry has 32 bytes at least, so that this is no more than the directory is worth.
    let expected = u64::from(e.bitmaps).min(e.size / 32) as usize;
    let (mut entries, mut rest) = (Vec::with_capacity(expected), &bytes[..]);
    while !rest.is_empty() {
        let at = e.offset + (bytes.len() - rest.len()) as u64;
        let bad = |what: String| {
            Error::corrupt(file.name(), format!("bitmap directory entry at {at:#x}: {what}"))
        };
        if entries.len() as u32 >= e.bitmaps {
            return Err(bad(format!("found more entries than the {} expected", e.bitmaps)));
        }
        let (entry, len) = decode(rest).map_err(bad)?;
        check(&entry, file, cluster_bits, size).map_err(bad)?;
        entries.push(entry);
        rest = rest.get(len..).unwrap_or_default();
    }
    if entries.len() as u32 != e.bitmaps {
        return Err(Error::corrupt(
            file.name(),
            format!("bitmap directory: found {} entries, expected {}", entries.len(), e.bitmaps),
        ));
    }
    let mut names: Vec<&[u8]> = entries.iter().map(|e| &e.name[..]).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let what = format!("bitmap directory: two bitmaps are called {}", quoted(pair[0]));
        return Err(Error::corrupt(file.name(), what));
    }
    Ok(entries)
}

/// The first entry, and how many bytes it takes.
fn decode(bytes: &[u8]) -> std::result::Result<(Entry, usize), String> {
    if bytes.len() < FIXED {
        return Err(format!("found {} bytes, expected at least {FIXED}", bytes.len()));
    }
    let (kind, granularity_bits) = (bytes[16], u32::from(bytes[17]));
    let name_size = usize::from(be16(bytes, 18));
    let extra_size = be32(bytes, 20) as usize;
    if !(1..=MAX_NAME).contains(&name_size) {
        return Err(format!("name size: found {name_size}, expected 1 to {MAX_NAME}"));
    }
    let end = FIXED.saturating_add(extra_size).saturating_add(name_size);
    let len = end.checked_next_multiple_of(8).filter(|n| *n <= bytes.len()).ok_or_else(|| {
        format!("found {end} bytes, expected at most the {} left of the directory", bytes.len())
    })?;
    if kind != 1 {
        return Err(format!("type: found {kind}, expected 1 (dirty tracking)"));
    }
    let entry = Entry {
        name: bytes.get(end - name_size..end).unwrap_or_default().to_vec(),
        table: Table { offset: be64(bytes, 0), entries: be32(bytes, 8) },
        flags: be32(bytes, 12),
        granularity_bits,
        extra: bytes.get(FIXED..FIXED + extra_size).unwrap_or_default().to_vec(),
    };
    Ok((entry, len))
}

fn check(
    e: &Entry,
    file: &Device,
    cluster_bits: u32,
    size: u64,
) -> std::result::Result<(), String> {
    let known = IN_USE | AUTO | EXTRA_COMPATIBLE;
    if e.flags & !known != 0 {
        return Err(format!("flags: found {:#x}, expected none but {known:#x}", e.flags));
    }
    if e.name.contains(&0) {
        return Err("the name has a NUL byte in it".into());
    }
    if !GRANULARITY_BITS.contains(&e.granularity_bits) {
        return Err(format!(
            "granularity bits: found {}, expected {} to {}",
            e.granularity_bits,
            GRANULARITY_BITS.start(),
            GRANULARITY_BITS.end()
        ));
    }
    let Table { offset, entries } = e.table;
    if !(1..=MAX_TABLE).contains(&entries) {
        return Err(format!("table size: found {entries} entries, expected 1 to {MAX_TABLE}"));
    }
    let data = u64::from(entries) << cluster_bits;
    if data > MAX_DATA {
        return Err(format!(
            "table size: found {entries} entries for {data} bytes of data, expected at most {MAX_DATA}"
        ));
    }
    if offset == 0 || !offset.is_multiple_of(1 << cluster_bits) {
        return Err(format!(
            "table offset: found {offset:#x}, expected a multiple of the cluster size"
        ));
    }
    if offset.checked_add(u64::from(entries) * 8).is_none_or(|end| end > file.size()) {
        return Err(format!(
            "the table of {entries} entries at {offset:#x} lies past the end of the file ({} bytes): \
             is it cut off?",
            file.size()
        ));
    }
    // One in use may be out of date in this, too.
    let needed = data_clusters(size, e.granularity_bits, cluster_bits);
    if e.flags & IN_USE == 0 && u64::from(entries) < needed {
        return Err(format!(
            "table size: found {entries} entries, expected {needed} for a disk of {size} bytes"
        ));
    }
    Ok(())
}

/// Clusters that the data of a bitmap has: entries of its table. There is one at least.
pub fn data_clusters(size: u64, granularity_bits: u32, cluster_bits: u32) -> u64 {
    granules(size, granularity_bits).div_ceil(8 << cluster_bits).max(1)
}

/// Bytes of an entry.
pub fn entry_size(name: &[u8], extra: &[u8]) -> u64 {
    (FIXED + extra.len() + name.len()).next_multiple_of(8) as u64
}

/// Add an entry to a directory.
pub fn encode(e: &Entry, out: &mut Vec<u8>) {
    out.extend(e.table.offset.to_be_bytes());
    out.extend(e.table.entries.to_be_bytes());
    out.extend(e.flags.to_be_bytes());
    out.extend([1, e.granularity_bits as u8]);
    out.extend((e.name.len() as u16).to_be_bytes());
    out.extend((e.extra.len() as u32).to_be_bytes());
    out.extend(&e.extra);
    out.extend(&e.name);
    out.resize(out.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_they_were_written() {
        let table = Table { offset: 5 << 16, entries: 1 };
        let mut out = Vec::new();
        let mut all = Vec::new();
        for (name, extra) in [("a", ""), ("bitmap-nr-2", "123"), ("x".repeat(1023).as_str(), "")] {
            let (name, extra) = (name.as_bytes().to_vec(), extra.as_bytes().to_vec());
            let e = Entry { name, table, flags: AUTO, granularity_bits: 16, extra };
            let before = out.len() as u64;
            encode(&e, &mut out);
            assert_eq!(out.len() as u64 - before, entry_size(&e.name, &e.extra));
            all.push(e);
        }
        let mut rest = &out[..];
        for e in &all {
            let (found, len) = decode(rest).unwrap();
            assert_eq!(found, *e);
            for cut in 0..len {
                assert!(decode(&rest[..cut]).is_err(), "cut to {cut}");
            }
            rest = &rest[len..];
        }
        assert!(rest.is_empty());
        assert!(decode(&[0xff; 64]).is_err() && decode(&[0; 24]).is_err());
    }

    #[test]
    fn a_bitmap_has_as_many_clusters_as_its_bits_need() {
        assert_eq!(data_clusters(0, 16, 16), 1);
        assert_eq!(data_clusters(1 << 35, 16, 16), 1);
        assert_eq!(data_clusters((1 << 35) + 1, 16, 16), 2);
        assert_eq!(data_clusters(i64::MAX as u64, 9, 9), 1 << 42);
    }
}
