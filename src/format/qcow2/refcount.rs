//! Reference counts of host clusters, and finding free ones.
//!
//! Blocks are cached in slices of at most 4 KiB. All of this lives under the image's `Meta` lock;
//! reading a slice that is not cached is done under it, which holds up only who allocates.
//!
//! Source: "Host cluster management" of the QCOW2 specification.

pub mod shadow;

use std::collections::HashMap;
use std::sync::Arc;

use super::guard::{Areas, Kind};
use super::header::{MAX_REFTABLE_BYTES, at};
use crate::block::*;

/// Clean slices kept.
const MAX_CLEAN: usize = 1024;
/// Runs that are looked at for one of a certain length.
const MAX_TRIES: usize = 64;

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

/// What [`Refcounts::allocate`] needs of the image around it.
pub trait Host {
    /// The image's file.
    fn file(&self) -> &Device;
    /// Write a larger table: `content` at cluster `run`, then make the header name it.
    fn switch_table(&self, run: Run, content: &[u8]) -> Result<()>;
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
        u64::MAX >> (64 - (1 << self.order))
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

    /// Take exactly `count` free clusters that follow one another, wherever they are.
    /// The table is grown where it must be, so no flush may be under way.
    pub fn allocate_all(&mut self, host: &dyn Host, count: u64) -> Result<Run> {
        let mut skipped = Vec::new();
        let found = loop {
            // A new block takes the first cluster of what it counts, so no run is longer than the
            // rest; and where the image is in small pieces looking on is not worth it.
            if count >= 1 << self.block_bits() || skipped.len() >= MAX_TRIES {
                break self.allocate_span(host, count);
            }
            let (run, _) = match self.allocate(host.file(), count) {
                Ok(found) => found,
                Err(Stop::GrowTable(index)) => match self.grow_table(host, index) {
                    Ok(()) => continue,
                    Err(e) => break Err(e),
                },
                Err(Stop::Failed(e)) => break Err(e),
            };
            if run.count == count {
                break Ok(run);
            }
            skipped.push(run);
        };
        for run in skipped {
            for cluster in run.first..run.first + run.count {
                self.release(host.file(), cluster)?;
            }
        }
        found
    }

    /// Take `count` clusters behind everything that is counted, with new blocks in front of them that
    /// count both. As [`Refcounts::allocate_all`].
    fn allocate_span(&mut self, host: &dyn Host, count: u64) -> Result<Run> {
        let file = host.file();
        let used = self.table.iter().rposition(|e| *e != 0).map_or(0, |i| i as u64 + 1);
        let end = if self.virgin == u64::MAX { 0 } else { self.virgin };
        let index = used.max(end.div_ceil(1 << self.block_bits()));
        let per_block = 1u64 << self.block_bits();
        // One block more for every block's worth of blocks and clusters.
        let mut blocks = (count + 1).div_ceil(per_block);
        while blocks + count > blocks * per_block {
            blocks += 1;
        }
        let last = index + blocks - 1;
        if !self.has_entry(last) {
            // The table takes its place behind everything, too: look again.
            self.grow_table(host, last + blocks)?;
            return self.allocate_span(host, count);
        }
        let first = index << self.block_bits();
        if first + blocks + count > self.limit {
            return Err(no_space(file));
        }
        file.zero(first << self.cluster_bits, blocks << self.cluster_bits, ReqFlags::NONE)?;
        for b in 0..blocks {
            self.table[(index + b) as usize] = (first + b) << self.cluster_bits;
        }
        if let Err(e) = (first..first + blocks + count).try_for_each(|c| self.set(file, c, 1)) {
            // Blocks that do not count themselves must not come into the table on disk.
            self.table[index as usize..=last as usize].fill(0);
            self.forget_slices_from(index);
            return Err(e);
        }
        (first..first + blocks).for_each(|c| self.areas.add(Kind::RefcountBlock, c));
        self.new_blocks.extend((index..=last).map(|b| b as usize));
        self.hand_out(Run { first, count: blocks + count });
        Ok(Run { first: first + blocks, count })
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

    /// Make the block that counts `cluster`, inside what it counts, where nothing can be in use.
    /// The block counts itself. Returns where to go on looking.
    fn new_block(&mut self, file: &Device, cluster: u64) -> std::result::Result<u64, Stop> {
        let index = cluster >> self.block_bits();
        if index >= self.table.len() as u64 {
            return Err(Stop::GrowTable(index));
        }
        let first = index << self.block_bits();
        if first >= self.limit {
            return Err(no_space(file).into());
        }
        if index == 0 || self.is_table(first, file)? {
            return Err(in_use(file, first << self.cluster_bits).into());
        }
        // What the file has there is of no use to anyone; the block must read as zeroes.
        file.zero(first << self.cluster_bits, 1 << self.cluster_bits, ReqFlags::NONE)?;
        self.hand_out(Run { first, count: 1 });
        // Its first slice is known: nothing can fail from here on, or the block would not be counted.
        let data = vec![0; self.slice_bytes()].into_boxed_slice();
        let slice = Slice { data, dirty: false, writing: false };
        self.slices.insert(first >> self.slice_bits(), slice);
        self.table[index as usize] = first << self.cluster_bits;
        self.areas.add(Kind::RefcountBlock, first);
        self.new_blocks.push(index as usize);
        self.set(file, first, 1)?;
        self.hint = self.hint.max(first + 1);
        Ok(first + 1)
    }

    /// Replace the table by one with an entry for block `index`. Everything needed is written and
    /// synced before the header names the new table; the old one's clusters are free afterwards. No
    /// flush may be under way: it might write to the old one.
    pub fn grow_table(&mut self, host: &dyn Host, index: u64) -> Result<()> {
        let file = host.file();
        let per_cluster = 1u64 << (self.cluster_bits - 3);
        // The new table lies at the end of what the old one covers, behind blocks that count both.
        let first_block = self.table.len() as u64;
        let first = first_block << self.block_bits();
        let want = (index + 1).max(first_block + first_block / 2 + 1);
        let (mut blocks, mut clusters) = (1, 0);
        for _ in 0..64 {
            clusters = (want + blocks).div_ceil(per_cluster);
            let needed = (clusters + blocks).div_ceil(1 << self.block_bits());
            if needed == blocks {
                break;
            }
            blocks = needed.max(blocks);
        }
        if clusters << self.cluster_bits > MAX_REFTABLE_BYTES
            || first + blocks + clusters > self.limit
        {
            return Err(Error::TooBig {
                file: file.name().clone(),
                what: format!(
                    "the image can grow no further: its refcount table would exceed {MAX_REFTABLE_BYTES} \
                     bytes or the host's end"
                ),
            });
        }
        let mut table = self.table.clone();
        table.resize((clusters * per_cluster) as usize, 0);
        let all = Run { first, count: blocks + clusters };
        let old = (self.table_offset >> self.cluster_bits, self.table.len() as u64 / per_cluster);
        // Nothing points here yet: on failure the file is only longer.
        file.zero(first << self.cluster_bits, all.count << self.cluster_bits, ReqFlags::NONE)?;
        for b in 0..blocks {
            table[(first_block + b) as usize] = (first + b) << self.cluster_bits;
        }
        let before = std::mem::replace(&mut self.table, table);
        let counted = (first..first + all.count).try_for_each(|c| self.set(file, c, 1));
        let switched = counted.and_then(|()| self.write_blocks(file)).and_then(|()| {
            let content: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
            host.switch_table(Run { first: first + blocks, count: clusters }, &content)
        });
        if let Err(e) = switched {
            self.table = before;
            self.forget_slices_from(first_block);
            return Err(e);
        }
        self.hand_out(all);
        self.new_blocks.clear();
        let own = Run { first: first + blocks, count: clusters };
        self.areas.replace(Kind::RefcountTable, &[own]);
        (first..first + blocks).for_each(|c| self.areas.add(Kind::RefcountBlock, c));
        self.table_offset = (first + blocks) << self.cluster_bits;
        self.hint = self.hint.max(first + all.count);
        for cluster in old.0..old.0 + old.1 {
            self.release(file, cluster)?;
        }
        Ok(())
    }

    /// Give up what is cached of the block of table entry `index` and those after it.
    fn forget_slices_from(&mut self, index: u64) {
        let per_block = self.block_bits() - self.slice_bits();
        self.slices.retain(|s, _| s >> per_block < index);
        self.dirty = self.slices.values().filter(|s| s.dirty).count();
    }

    /// Write all changed slices, and sync: a table names blocks that are in the file. They stay dirty,
    /// which costs writing them again.
    fn write_blocks(&mut self, file: &Device) -> Result<()> {
        for (i, slice) in self.slices.iter().filter(|(_, s)| s.dirty) {
            file.write_slice(&slice.data, self.slice_offset(*i), ReqFlags::NONE)?;
        }
        file.flush()
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

/// Write a refcount table of `clusters` clusters to `offset`, and make the header name it.
pub(super) fn write_table(file: &Device, offset: u64, clusters: u64, content: &[u8]) -> Result<()> {
    file.write_slice(content, offset, ReqFlags::NONE)?;
    file.flush()?;
    name_table(file, offset, clusters)
}

/// The second half of [`write_table`]. Where it fails nobody knows which table the header names.
pub(super) fn name_table(file: &Device, offset: u64, clusters: u64) -> Result<()> {
    let mut field = [0; 12];
    field[..8].copy_from_slice(&offset.to_be_bytes());
    field[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
    file.write_slice(&field, at::REFTABLE, ReqFlags::NONE)?;
    file.flush()
}

/// Count `index` of a slice; counts below a byte fill a byte from its low end.
pub(super) fn read_count(data: &[u8], index: u64, order: u32) -> u64 {
    let i = index as usize;
    match order {
        0..3 => {
            let (bits, per) = (1 << order, 8 >> order);
            let byte = data.get(i / per).copied().unwrap_or(0);
            u64::from(byte >> (i % per * bits)) & ((1 << bits) - 1)
        }
        _ => {
            let n = 1 << (order - 3);
            let bytes = data.get(i * n..(i + 1) * n).unwrap_or_default();
            bytes.iter().fold(0, |v, b| v << 8 | u64::from(*b))
        }
    }
}

pub(super) fn write_count(data: &mut [u8], index: u64, order: u32, count: u64) {
    let i = index as usize;
    match order {
        0..3 => {
            let (bits, per) = (1 << order, 8 >> order);
            let shift = i % per * bits;
            if let Some(byte) = data.get_mut(i / per) {
                *byte = *byte & !(((1u32 << bits) - 1) << shift) as u8 | (count << shift) as u8;
            }
        }
        _ => {
            let n = 1 << (order - 3);
            if let Some(bytes) = data.get_mut(i * n..(i + 1) * n) {
                bytes.copy_from_slice(&count.to_be_bytes()[8 - n..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_read_back_and_leave_neighbours_alone() {
        for order in 0..=6 {
            let mut data = vec![0; 64];
            let max = if order == 6 { u64::MAX } else { (1u64 << (1u32 << order)) - 1 };
            let n = (64 * 8) >> order;
            write_count(&mut data, 3, order, max);
            write_count(&mut data, 5, order, 1);
            for i in 0..n {
                let want = match i {
                    3 => max,
                    5 => 1,
                    _ => 0,
                };
                assert_eq!(read_count(&data, i, order), want, "order {order} index {i}");
            }
            write_count(&mut data, 3, order, 0);
            assert_eq!(read_count(&data, 3, order), 0);
        }
        // Low end first, as the specification has it.
        let mut data = [0u8; 1];
        write_count(&mut data, 0, 2, 0xa);
        assert_eq!(data, [0x0a]);
    }
}
