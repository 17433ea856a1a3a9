//! The refcounts that are on disk: the table, and where the blocks lie.

use std::cell::OnceCell;

use super::super::header::MAX_REFTABLE_BYTES;
use super::*;

/// Bits 9 to 63 of an entry of the refcount table: the offset of a block.
const OFFSET: u64 = !0x1ff;

/// Files have no bytes from here on (QEMU reads none there).
const MAX_OFFSET: u64 = i64::MAX as u64 & !((1 << 30) - 1);

/// The refcount table of an image, whatever it is like.
#[derive(Default)]
pub struct Disk {
    table: Vec<u64>,
    /// Where it lies: offset and bytes.
    pub place: (u64, u64),
    /// Counts in a block, as a power of two.
    pub block_bits: u32,
    pub order: u32,
    /// Where blocks lie, in order; made when it is needed.
    sorted: OnceCell<Vec<u64>>,
}

/// What an entry of the refcount table says.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// All counts are 0.
    None,
    At(u64),
    /// It can not be had: the entry is wrong.
    Bad,
}

impl Disk {
    /// Read the table that the header names. If it can not be one it is taken for empty.
    pub fn load(
        file: &Device,
        header: &Header,
        report: &mut CheckReport,
        rebuild: &mut bool,
    ) -> Result<Self> {
        let bits = header.cluster_bits;
        let mut disk = Self {
            block_bits: bits + 3 - header.refcount_order,
            order: header.refcount_order,
            ..Self::default()
        };
        let (offset, len) = (header.reftable_offset, u64::from(header.reftable_clusters) << bits);
        let end = offset.checked_add(len).filter(|end| *end <= i64::MAX as u64);
        if !offset.is_multiple_of(1 << bits) || len > MAX_REFTABLE_BYTES || end.is_none() {
            report.corruptions += 1;
            *rebuild = true;
            return Ok(disk);
        }
        disk.place = (offset, len);
        let mut raw = vec![0; len as usize];
        read_there(file, file.size(), &mut raw, offset)?;
        let used = raw.chunks_exact(8).rposition(|e| e.iter().any(|b| *b != 0));
        disk.table =
            raw.chunks_exact(8).take(used.map_or(0, |i| i + 1)).map(|e| be64(e, 0)).collect();
        Ok(disk)
    }

    /// Entries of the table, without zeroes at its end.
    pub fn entries(&self) -> u64 {
        self.table.len() as u64
    }

    /// Entry `index` of the table as it is.
    pub fn raw(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|i| self.table.get(i)).copied().unwrap_or(0)
    }

    /// The block that counts the clusters from `index` << `block_bits` on.
    pub fn block(&self, index: u64, cluster_bits: u32) -> Block {
        match self.raw(index) & OFFSET {
            0 => Block::None,
            offset if offset & ((1 << cluster_bits) - 1) != 0 || offset >= MAX_OFFSET => Block::Bad,
            offset => Block::At(offset),
        }
    }

    /// Bytes of the blocks that count the first `clusters` clusters.
    pub fn bytes(&self, clusters: u64, cluster_bits: u32) -> u64 {
        let blocks = clusters.div_ceil(1 << self.block_bits).min(self.entries());
        self.table.iter().take(blocks as usize).filter(|e| **e != 0).count() as u64
            * (1 << cluster_bits)
    }

    /// Whether a block lies (in part) in `from..to`.
    pub fn has_block_at(&self, from: u64, to: u64, cluster_bits: u32) -> bool {
        let sorted = self.sorted.get_or_init(|| {
            let mut all: Vec<u64> =
                self.table.iter().map(|e| e & OFFSET).filter(|o| *o != 0).collect();
            all.sort_unstable();
            all
        });
        let first = sorted.partition_point(|o| o.saturating_add(1 << cluster_bits) <= from);
        sorted.get(first).is_some_and(|o| *o < to)
    }
}

impl Check<'_> {
    /// Count the refcount blocks, each of which must have a cluster of its own.
    pub(super) fn count_blocks(&mut self) -> Result<()> {
        for i in 0..self.disk.entries() {
            let entry = self.disk.raw(i);
            if entry == 0 {
                continue;
            }
            if entry & !OFFSET != 0 || entry & (self.cluster() - 1) != 0 {
                self.report.corruptions += 1;
                self.rebuild = true;
                self.tell(format_args!("refcount table entry {i} is wrong: {entry:#018x}"));
                continue;
            }
            let cluster = entry >> self.bits;
            if cluster >= self.clusters {
                self.report.corruptions += 1;
                // QEMU makes the file as long as that; here it is not believed.
                self.rebuild |= self.repair == Repair::All;
                self.tell(format_args!("the refcount block at {entry:#x} lies past the end"));
                continue;
            }
            self.refer("a refcount block", entry, self.cluster(), 1);
            if self.counts.get(cluster) != 1 {
                self.report.corruptions += 1;
                self.rebuild = true;
                self.tell(format_args!("the refcount block at {entry:#x} is not alone there"));
            }
        }
        Ok(())
    }
}
