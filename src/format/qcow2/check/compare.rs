//! The counts that were made, beside those on disk.

use super::super::refcount::{read_count, write_count};
use super::disk::Block;
use super::*;

/// Bits of counts that are read at once, one by one asked for.
const NEAR_BITS: u64 = 512;
/// So many.
pub type Near = [u8; (NEAR_BITS / 8) as usize];

/// What a count on disk is, other than it should be.
enum Verdict {
    Leave,
    Fix,
}

impl Check<'_> {
    /// Compare all counts, and mend those that may be mended one by one.
    pub(super) fn compare(&mut self, fix: Repair) -> Result<()> {
        self.highest = 0;
        self.flips = None;
        self.differs = false;
        self.unknown.clear();
        let per_block = 1u64 << self.disk.block_bits;
        let mut bytes = vec![0; self.cluster() as usize];
        let (mut at, mut written) = (0, false);
        while at < self.clusters {
            let index = at >> self.disk.block_bits;
            let end = (at + per_block).min(self.clusters);
            match self.disk.block(index, self.bits) {
                Block::None => {
                    // As far as there are no blocks.
                    let mut last = index + 1;
                    while last < self.disk.entries()
                        && self.disk.block(last, self.bits) == Block::None
                    {
                        last += 1;
                    }
                    let end = match last < self.disk.entries() {
                        true => (last << self.disk.block_bits).min(self.clusters),
                        false => self.clusters,
                    };
                    self.compare_none(at, end);
                    at = end;
                }
                Block::Bad => {
                    self.report.check_errors += end - at;
                    self.unknown.push((at, end));
                    self.tell(format_args!("no refcounts of the clusters {at} to {end}"));
                    at = end;
                }
                Block::At(offset) => {
                    let len = ((end - at) << self.disk.order).div_ceil(8) as usize;
                    let bytes = &mut bytes[..len];
                    self.read(bytes, offset)?;
                    if self.compare_block(at, end, bytes, fix) {
                        self.file.write_slice(bytes, offset, ReqFlags::NONE)?;
                        written = true;
                    }
                    if fix == Repair::Nothing {
                        self.step(len as u64)?;
                    }
                    at = end;
                }
            }
        }
        if written {
            self.report.changed = true;
            // Flags say next what these say now.
            self.file.flush()?;
        }
        Ok(())
    }

    /// Where there is no block nothing may be in use.
    fn compare_none(&mut self, from: u64, to: u64) {
        let mut at = from;
        while let Some(cluster) = self.counts.next_used(at, to) {
            self.highest = self.highest.max(cluster);
            self.differ(cluster, 0, self.counts.get(cluster), Repair::Nothing);
            at = cluster + 1;
        }
    }

    /// Compare a block, whose counts are in `bytes`; whether they were changed.
    fn compare_block(&mut self, from: u64, to: u64, bytes: &mut [u8], fix: Repair) -> bool {
        match self.disk.order {
            0 => self.compare_counts::<0>(from, to, bytes, fix),
            1 => self.compare_counts::<1>(from, to, bytes, fix),
            2 => self.compare_counts::<2>(from, to, bytes, fix),
            3 => self.compare_counts::<3>(from, to, bytes, fix),
            4 => self.compare_counts::<4>(from, to, bytes, fix),
            5 => self.compare_counts::<5>(from, to, bytes, fix),
            _ => self.compare_counts::<6>(from, to, bytes, fix),
        }
    }

    /// One for each width, so that reading a count takes a few instructions.
    fn compare_counts<const ORDER: u32>(
        &mut self,
        from: u64,
        to: u64,
        bytes: &mut [u8],
        fix: Repair,
    ) -> bool {
        let (mut changed, mut last, mut at) = (false, None, from);
        while at < to {
            // As long as both agree, which is nearly always.
            let (first, window) = self.counts.window(at);
            let end = to.min(first + 2 * window.len() as u64);
            while at < end {
                let i = at - first;
                let own = window.get((i / 2) as usize).map_or(0, |b| (b >> (i % 2 * 4)) & 15);
                let disk = read_count(bytes, at - from, ORDER);
                if disk != u64::from(own) || own == 15 {
                    break;
                }
                if own != 0 {
                    last = Some(at);
                }
                at += 1;
            }
            if at == end {
                continue;
            }
            let (own, disk) = (self.counts.get(at), read_count(bytes, at - from, ORDER));
            if own | disk != 0 {
                last = Some(at);
            }
            if own != disk
                && let Verdict::Fix = self.differ(at, disk, own, fix)
            {
                write_count(bytes, at - from, ORDER, own);
                changed = true;
            }
            at += 1;
        }
        self.highest = self.highest.max(last.unwrap_or(0));
        changed
    }

    /// A count on disk is wrong.
    #[cold]
    fn differ(&mut self, cluster: u64, disk: u64, own: u64, fix: Repair) -> Verdict {
        self.differs = true;
        let r = &mut self.report;
        let may_fix = match () {
            // Its block may not be what it seems.
            _ if disk == 0 => {
                self.rebuild = true;
                false
            }
            _ if disk > own => fix >= Repair::Leaks,
            _ => fix == Repair::All,
        };
        let number = match (may_fix, disk > own) {
            (true, true) => &mut r.leaks_fixed,
            (true, false) => &mut r.corruptions_fixed,
            (false, true) => &mut r.leaks,
            (false, false) => &mut r.corruptions,
        };
        *number += 1;
        self.tell(format_args!(
            "the cluster at {:#x} has the refcount {disk}, and is referred to {own} times",
            cluster << self.bits
        ));
        if may_fix {
            return Verdict::Fix;
        }
        // (Nobody asks for the flag of what nobody refers to, but where a reference was not counted since it
        // reaches past the end.)
        if (own > 0 || self.beyond.any()) && (disk == 1) != (own == 1) {
            let clusters = self.clusters;
            self.flips.get_or_insert_with(|| Counts::new(clusters, 1)).set(cluster, 1);
        }
        Verdict::Leave
    }

    /// Whether the count on disk is exactly one; `None` if that can not be known.
    pub(super) fn is_one(&self, cluster: u64) -> Result<Option<bool>> {
        if cluster < self.clusters {
            let i = self.unknown.partition_point(|u| u.1 <= cluster);
            if self.unknown.get(i).is_some_and(|u| u.0 <= cluster) {
                return Ok(None);
            }
            let one = self.counts.get(cluster) == 1;
            return Ok(Some(one != self.flips.as_ref().is_some_and(|f| f.get(cluster) != 0)));
        }
        match self.disk.block(cluster >> self.disk.block_bits, self.bits) {
            Block::None => Ok(Some(false)),
            Block::Bad => Ok(None),
            Block::At(offset) => {
                let bit = (cluster & ((1 << self.disk.block_bits) - 1)) << self.disk.order;
                let at = offset + bit / NEAR_BITS * (NEAR_BITS / 8);
                let near = match self.near.get() {
                    // Those beside it are asked for next.
                    Some((where_, near)) if where_ == at => near,
                    _ => {
                        let mut near = [0; (NEAR_BITS / 8) as usize];
                        self.read(&mut near, at)?;
                        self.near.set(Some((at, near)));
                        near
                    }
                };
                let i = (bit % NEAR_BITS) >> self.disk.order;
                Ok(Some(read_count(&near, i, self.disk.order) == 1))
            }
        }
    }
}
