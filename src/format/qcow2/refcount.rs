//! Reference counts of host clusters, and finding free ones.
//!
//! Blocks are cached in slices of at most 4 KiB. All of this lives under the image's `Meta` lock;
//! reading a slice that is not cached is done under it, which holds up only who allocates.
//!
//! Source: "Host cluster management" of the QCOW2 specification.

mod count;
mod grow;
pub mod shadow;

use std::collections::HashMap;
use std::sync::Arc;

use super::guard::{Areas, Kind};
use crate::block::*;
pub(super) use count::{max_count, read_count, write_count};
pub use grow::Host;
pub(super) use grow::{name_table, place_table, write_table};

/// Clean slices kept.
const MAX_CLEAN: usize = 1024;

/// Clusters that follow one another on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index of the first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

struct Slice {
    data: Box<[u8]>,
    dirty: bool,
    /// A copy is being written: the file has not got it yet, so it must not be given up.
    writing: bool,
}

/// Why clusters could not be had.
pub enum Stop {
    /// It failed.
    Failed(Error),
    /// The refcount table must grow first ([`Refcounts::grow_table`]), to have this entry.
    GrowTable(u64),
}

impl From<Error> for Stop {
    fn from(e: Error) -> Self {
        Self::Failed(e)
    }
}

/// Counts of all host clusters, and where to look for free ones.
pub struct Refcounts {
    cluster_bits: u32,
    /// Width of a count: 2^order bits.
    order: u32,
    /// Entries of the refcount table: offsets of blocks, 0 = none.
    table: Vec<u64>,
    table_offset: u64,
    slices: HashMap<u64, Slice>,
    /// How many of them are dirty.
    dirty: usize,
    /// No cluster below is free.
    hint: u64,
    /// Clusters from here on were never handed out nor in the file when it was opened: what the
    /// file has there reads as zeroes.
    virgin: u64,
    /// Clusters that the host can not have: those past the end of a block device.
    limit: u64,
    /// Table entries set since they were last written.
    new_blocks: Vec<usize>,
    /// An entry of the table that is there twice.
    twice: Option<u64>,
    /// Where metadata is: clusters that are never handed out.
    areas: Arc<Areas>,
    /// Where the next compressed bytes go: a cluster that has some already, and how many.
    tail: Option<(u64, u64)>,
}

impl Refcounts {
    /// The counts of an image, its table read and checked.
    pub fn load(
        file: &Device,
        cluster_bits: u32,
        order: u32,
        table_offset: u64,
        table_clusters: u32,
        areas: Arc<Areas>,
    ) -> Result<Self> {
        let mut raw = vec![0; (u64::from(table_clusters) << cluster_bits) as usize];
        if table_offset >= file.size() {
            return Err(Error::corrupt(
                file.name(),
                format!(
                    "the refcount table at {table_offset:#x} lies past the end of the file ({} bytes)",
                    file.size()
                ),
            ));
        }
        file.read_slice(&mut raw, table_offset)?;
        let mut table = Vec::with_capacity(raw.len() / 8);
        let mut twice = None;
        areas.add(Kind::Header, 0);
        let own = Run { first: table_offset >> cluster_bits, count: table_clusters.into() };
        areas.replace(Kind::RefcountTable, &[own]);
        for (i, e) in raw.chunks_exact(8).enumerate() {
            let entry = u64::from_be_bytes(e.try_into().unwrap_or_default());
            if entry & ((1 << cluster_bits) - 1) != 0 || entry >> 56 != 0 {
                return Err(Error::corrupt(
                    file.name(),
                    format!(
                        "refcount table entry {i} at {:#x}: found {entry:#x}, expected a multiple of the \
                         cluster size below 2^56",
                        table_offset + 8 * i as u64
                    ),
                ));
            }
            if entry != 0 {
                let cluster = entry >> cluster_bits;
                if areas.kind_at(cluster) == Some(Kind::RefcountBlock) {
                    twice = Some(entry);
                }
                areas.add(Kind::RefcountBlock, cluster);
            }
            table.push(entry);
        }
        let grows = file.driver().kind() != "host_device";
        let size = file.size();
        Ok(Self {
            cluster_bits,
            order,
            table,
            table_offset,
            slices: HashMap::new(),
            dirty: 0,
            hint: 1,
            virgin: if grows { size.div_ceil(1 << cluster_bits) } else { u64::MAX },
            limit: if grows { 1 << (56 - cluster_bits) } else { size >> cluster_bits },
            new_blocks: Vec::new(),
            twice,
            areas,
            tail: None,
        })
    }

    /// `bytes` of blocks in which the first `clusters` counts are one.
    pub fn ones(clusters: u64, order: u32, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        for cluster in 0..clusters {
            write_count(&mut data, cluster, order, 1);
        }
        data
    }

    /// Width of a count: 2^order bits.
    pub fn order(&self) -> u32 {
        self.order
    }

    /// Counts in a block, as a power of two.
    fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.order
    }

    fn slice_bytes(&self) -> usize {
        1 << self.cluster_bits.min(12)
    }

    /// Counts in a slice, as a power of two.
    fn slice_bits(&self) -> u32 {
        self.cluster_bits.min(12) + 3 - self.order
    }

    /// The offset of the block that counts `cluster`, 0 if there is none.
    fn block_offset(&self, cluster: u64) -> u64 {
        usize::try_from(cluster >> self.block_bits())
            .ok()
            .and_then(|i| self.table.get(i))
            .copied()
            .unwrap_or(0)
    }

    fn slice_offset(&self, slice: u64) -> u64 {
        let first = slice << self.slice_bits();
        let block = self.block_offset(first);
        let within = (first & ((1 << self.block_bits()) - 1)) >> self.slice_bits();
        block + within * self.slice_bytes() as u64
    }

    fn slice(&mut self, file: &Device, cluster: u64) -> Result<&mut Slice> {
        let index = cluster >> self.slice_bits();
        if !self.slices.contains_key(&index) {
            if self.slices.len() >= MAX_CLEAN + self.dirty {
                self.slices.retain(|_, s| s.dirty || s.writing);
            }
            let offset = self.slice_offset(index);
            if offset + self.slice_bytes() as u64 > file.size() {
                return Err(Error::corrupt(
                    file.name(),
                    format!(
                        "a refcount block at {offset:#x} reaches past the end of the file ({} bytes)",
                        file.size()
                    ),
                ));
            }
            let mut data = vec![0; self.slice_bytes()].into_boxed_slice();
            file.read_slice(&mut data, offset)?;
            self.slices.insert(index, Slice { data, dirty: false, writing: false });
        }
        self.slices
            .get_mut(&index)
            .ok_or_else(|| Error::Internal("a refcount slice vanished".into()))
    }

    /// How many references `cluster` has.
    pub fn get(&mut self, file: &Device, cluster: u64) -> Result<u64> {
        if self.block_offset(cluster) == 0 {
            return Ok(0);
        }
        let (order, mask) = (self.order, (1 << self.slice_bits()) - 1);
        Ok(read_count(&self.slice(file, cluster)?.data, cluster & mask, order))
    }

    fn set(&mut self, file: &Device, cluster: u64, count: u64) -> Result<()> {
        let (order, mask) = (self.order, (1 << self.slice_bits()) - 1);
        let slice = self.slice(file, cluster)?;
        write_count(&mut slice.data, cluster & mask, order, count);
        let before = std::mem::replace(&mut slice.dirty, true);
        self.dirty += usize::from(!before);
        Ok(())
    }

    /// Take one reference from `cluster`; the count that is left.
    pub fn release(&mut self, file: &Device, cluster: u64) -> Result<u64> {
        let Some(left) = self.get(file, cluster)?.checked_sub(1) else {
            return Err(Error::corrupt(
                file.name(),
                format!(
                    "the cluster at {:#x} is in use but has a refcount of 0",
                    cluster << self.cluster_bits
                ),
            ));
        };
        self.set(file, cluster, left)?;
        if left == 0 {
            self.hint = self.hint.min(cluster.max(1));
            self.close_tail(cluster);
        }
        Ok(left)
    }

    /// Count one more reference to `cluster`, which has some.
    fn add(&mut self, file: &Device, cluster: u64) -> Result<()> {
        let count = self.get(file, cluster)?;
        if count >= self.max() {
            return Err(Error::TooBig {
                file: file.name().clone(),
                what: format!(
                    "the cluster at {:#x} can have no more than {count} references",
                    cluster << self.cluster_bits
                ),
            });
        }
        self.set(file, cluster, count + 1)
    }

    /// The largest count there can be.
    fn max(&self) -> u64 {
        max_count(self.order)
    }

    /// Take `len` bytes, fewer than a cluster has: behind those that were taken last, if their cluster
    /// (or it and a free one behind it) has room. Each cluster that they touch counts a reference.
    pub fn allocate_bytes(&mut self, file: &Device, len: u64) -> std::result::Result<u64, Stop> {
        let (bits, size) = (self.cluster_bits, 1 << self.cluster_bits);
        if let Some((cluster, used)) = self.tail
            && self.get(file, cluster)? < self.max()
        {
            let (at, end) = ((cluster << bits) + used, used + len);
            if end <= size {
                self.add(file, cluster)?;
                self.tail = (end < size).then_some((cluster, end));
                return Ok(at);
            }
            let (next, _) = self.allocate(file, 1)?;
            if next.first == cluster + 1 {
                if let Err(e) = self.add(file, cluster) {
                    self.release(file, next.first)?;
                    return Err(e.into());
                }
                self.tail = Some((next.first, end - size));
                return Ok(at);
            }
            self.tail = Some((next.first, len));
            return Ok(next.first << bits);
        }
        let (run, _) = self.allocate(file, 1)?;
        self.tail = Some((run.first, len));
        Ok(run.first << bits)
    }

    /// Put no more compressed bytes into `cluster`: it is about to be free.
    pub fn close_tail(&mut self, cluster: u64) {
        if self.tail.is_some_and(|t| t.0 == cluster) {
            self.tail = None;
        }
    }

    /// Take up to `want` free clusters that follow one another, the first that are found. Also says
    /// whether the host has nothing but zeroes there.
    pub fn allocate(&mut self, file: &Device, want: u64) -> std::result::Result<(Run, bool), Stop> {
        let (mut at, mut run) = (self.hint, Run { first: 0, count: 0 });
        while run.count < want.max(1) {
            if at >= self.limit {
                break;
            }
            if self.block_offset(at) == 0 {
                if run.count > 0 {
                    break;
                }
                at = self.new_block(file, at)?;
                continue;
            }
            let (next, is_free) = self.next_free(file, at)?;
            if next >= self.limit || (run.count > 0 && next != at) {
                break;
            }
            at = next;
            if is_free {
                if run.count == 0 {
                    run.first = at;
                }
                run.count += 1;
                at += 1;
            }
        }
        if run.count == 0 {
            return Err(no_space(file).into());
        }
        for cluster in run.first..run.first + run.count {
            if self.is_table(cluster, file)? {
                return Err(in_use(file, cluster << self.cluster_bits).into());
            }
        }
        for cluster in run.first..run.first + run.count {
            self.set(file, cluster, 1)?;
        }
        self.hint = run.first + run.count;
        Ok((run, self.hand_out(run)))
    }

    /// Whether `cluster` holds metadata, whatever its count says. Fails where two entries of the table
    /// name the same block.
    fn is_table(&self, cluster: u64, file: &Device) -> Result<bool> {
        match self.twice {
            None => Ok(self.areas.kind_at(cluster).is_some()),
            Some(entry) => Err(Error::corrupt(
                file.name(),
                format!("two refcount table entries point to the block at {entry:#x}"),
            )),
        }
    }

    /// Note where the table and its blocks lie, after they were replaced.
    pub fn note_blocks(&self) {
        let own = Run {
            first: self.table_offset >> self.cluster_bits,
            count: (self.table.len() as u64 * 8) >> self.cluster_bits,
        };
        self.areas.replace(Kind::RefcountTable, &[own]);
        self.areas.replace(Kind::RefcountBlock, &[]);
        for entry in self.table.iter().filter(|e| **e != 0) {
            self.areas.add(Kind::RefcountBlock, entry >> self.cluster_bits);
        }
    }

    /// Where the L1 table lies: clusters that are never handed out.
    pub fn protect(&mut self, l1: Run) {
        self.areas.replace(Kind::L1, &[l1]);
    }

    /// Where the LUKS header and its keys lie; as [`Self::protect`].
    pub fn protect_keys(&mut self, keys: Run) {
        self.areas.replace(Kind::Luks, &[keys]);
    }

    fn hand_out(&mut self, run: Run) -> bool {
        let virgin = run.first >= self.virgin;
        if self.virgin != u64::MAX {
            self.virgin = self.virgin.max(run.first + run.count);
        }
        virgin
    }

    /// The first cluster from `at` on, in the slice of `at`, whose count is 0, and true; or the first
    /// cluster of the next slice, and false.
    fn next_free(&mut self, file: &Device, at: u64) -> Result<(u64, bool)> {
        let (order, bits) = (self.order, self.slice_bits());
        let mask = (1u64 << bits) - 1;
        let data = &self.slice(file, at)?.data;
        let mut i = at & mask;
        while i <= mask && read_count(data, i, order) != 0 {
            i += 1;
        }
        Ok(((at & !mask) + i, i <= mask))
    }

    /// Changed slices, to be written: where they lie and their bytes.
    pub fn take_dirty(&mut self) -> Vec<(u64, Box<[u8]>)> {
        self.dirty = 0;
        let dirty: Vec<u64> =
            self.slices.iter().filter(|(_, s)| s.dirty).map(|(i, _)| *i).collect();
        dirty
            .into_iter()
            .filter_map(|i| {
                let offset = self.slice_offset(i);
                let s = self.slices.get_mut(&i)?;
                (s.dirty, s.writing) = (false, true);
                Some((offset, s.data.clone()))
            })
            .collect()
    }

    /// Whether the table has an entry for block `index`.
    pub fn has_entry(&self, index: u64) -> bool {
        index < self.table.len() as u64
    }

    /// What was taken is in the file.
    pub fn written(&mut self) {
        self.slices.values_mut().for_each(|s| s.writing = false);
    }

    /// Whether some change is not written.
    pub fn is_dirty(&self) -> bool {
        !self.new_blocks.is_empty() || self.dirty > 0
    }

    /// Bytes of changes that are not written.
    pub fn dirty_bytes(&self) -> usize {
        self.dirty * self.slice_bytes()
    }

    /// Table entries that were set since this was last asked: where they lie and their values.
    pub fn take_new_blocks(&mut self) -> Vec<(u64, u64)> {
        let offset = self.table_offset;
        let table = &self.table;
        self.new_blocks
            .drain(..)
            .map(|i| (offset + 8 * i as u64, table.get(i).copied().unwrap_or(0)))
            .collect()
    }

    /// The end of the last cluster that was ever handed out or in the file at first, bytes.
    pub fn used_end(&self) -> Option<u64> {
        (self.virgin != u64::MAX).then(|| self.virgin << self.cluster_bits)
    }
}

fn in_use(file: &Device, offset: u64) -> Error {
    Error::corrupt(
        file.name(),
        format!("the cluster at {offset:#x} holds the header or a table, but its refcount is 0"),
    )
}

fn no_space(file: &Device) -> Error {
    Error::Io {
        op: "allocating a cluster",
        file: file.name().clone(),
        offset: file.size(),
        count: 0,
        errno: libc::ENOSPC,
    }
}
