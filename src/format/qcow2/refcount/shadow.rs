//! New counts beside the old ones: for what changes the counts of a whole image at once.
//!
//! Every block that changes is made anew in clusters that are free, and so is the refcount table. What
//! is on disk stays as it is until the header names the new table, which [`Shadow::adopt`] then makes
//! the present one. Up to there all can be dropped, and nothing has happened; a cluster that holds
//! anything by the old counts is not used for the new ones.
//!
//! The counts may come out in another width.
//!
//! Source: "Host cluster management" of the QCOW2 specification.

use super::super::header::MAX_REFTABLE_BYTES;
use std::collections::{HashSet, VecDeque};
use std::ops::Range;

use super::*;

/// Bytes of new blocks that are kept in memory.
const MAX_KEPT: usize = 16 << 20;
/// Runs of freed clusters that are remembered; others are free as well, but keep their space on the host.
const MAX_FREED: usize = 1 << 18;

struct Block {
    data: Box<[u8]>,
    dirty: bool,
}

/// Counts that are being made.
pub struct Shadow<'a> {
    old: &'a mut Refcounts,
    file: &'a Device,
    /// Width of a new count: 2^order bits.
    order: u32,
    /// The new table; an entry that is not in `new` is the old one's.
    table: Vec<u64>,
    /// Blocks that were made anew, by their place in the table.
    new: HashSet<u64>,
    /// Those of them that are in memory.
    blocks: HashMap<u64, Block>,
    /// The one used last, and its place.
    hot: Option<(u64, Block)>,
    /// No cluster below is free.
    hint: u64,
    /// Clusters that are being taken.
    reserved: Range<u64>,
    /// Counts that are still to go up or down, and by how much.
    todo: VecDeque<(u64, i64)>,
    freed: Vec<Run>,
}

/// Where the new table lies.
#[derive(Clone, Copy)]
pub struct Placed {
    /// Bytes.
    pub offset: u64,
    /// How many.
    pub clusters: u32,
}

impl<'a> Shadow<'a> {
    /// Begin with the counts as they are, which must be in the file as they are in memory. `order`: the
    /// width of the new ones.
    pub fn new(old: &'a mut Refcounts, file: &'a Device, order: u32) -> Result<Self> {
        if old.is_dirty() {
            return Err(Error::Internal("refcounts are not in the file yet".into()));
        }
        let table = if order == old.order { old.table.clone() } else { Vec::new() };
        let hint = old.hint.max(1);
        Ok(Self {
            old,
            file,
            order,
            table,
            new: HashSet::new(),
            blocks: HashMap::new(),
            hot: None,
            hint,
            reserved: 0..0,
            todo: VecDeque::new(),
            freed: Vec::new(),
        })
    }

    /// Where the counts have another width: make all blocks anew.
    pub fn convert(&mut self, progress: Progress<'_>) -> Result<()> {
        if self.order == self.old.order {
            return Ok(());
        }
        let per_old = 1u64 << self.old.block_bits();
        let all = self.old.table.len() as u64;
        for i in 0..all {
            progress.at(i, all)?;
            let Some(&block) = self.old.table.get(i as usize).filter(|e| **e != 0) else {
                continue;
            };
            let first = i * per_old;
            let (from, to) =
                (first >> self.block_bits(), (first + per_old - 1) >> self.block_bits());
            for index in from..=to {
                // One old block may become many, of which those with nothing in them are not made.
                if !self.new.contains(&index) && self.has_any(index)? {
                    self.make(index)?;
                    self.spill()?;
                }
            }
            self.todo.push_back((block >> self.old.cluster_bits, -1));
            self.work()?;
        }
        Ok(())
    }

    /// Counts in a new block, as a power of two.
    fn block_bits(&self) -> u32 {
        self.old.cluster_bits + 3 - self.order
    }

    fn cluster_bytes(&self) -> usize {
        1 << self.old.cluster_bits
    }

    /// Whether an old count is not 0 of those that new block `index` is for.
    fn has_any(&mut self, index: u64) -> Result<bool> {
        let mut at = index << self.block_bits();
        let end = at + (1 << self.block_bits());
        while at < end {
            if self.old.block_offset(at) == 0 {
                at = ((at >> self.old.block_bits()) + 1) << self.old.block_bits();
                continue;
            }
            if self.old.get(self.file, at)? != 0 {
                return Ok(true);
            }
            at += 1;
        }
        Ok(false)
    }

    /// How many references `cluster` is to have.
    pub fn get(&mut self, cluster: u64) -> Result<u64> {
        let index = cluster >> self.block_bits();
        if !self.new.contains(&index) {
            return self.old.get(self.file, cluster);
        }
        let (order, mask) = (self.order, (1 << self.block_bits()) - 1);
        Ok(read_count(&self.block(index)?.data, cluster & mask, order))
    }

    /// Whether `cluster` is in use at present.
    pub fn was_used(&mut self, cluster: u64) -> Result<bool> {
        Ok(self.old.get(self.file, cluster)? != 0)
    }

    /// One reference more, or one fewer.
    pub fn change(&mut self, cluster: u64, up: bool) -> Result<()> {
        self.change_by(cluster, if up { 1 } else { -1 })
    }

    /// So many references more (or fewer) for `cluster`.
    pub fn change_by(&mut self, cluster: u64, count: i64) -> Result<()> {
        self.todo.push_back((cluster, count));
        self.work()?;
        self.spill()
    }

    /// Keep memory within its limit: nothing names the new blocks yet, so they may be written any time.
    fn spill(&mut self) -> Result<()> {
        if self.blocks.len() * self.cluster_bytes() > MAX_KEPT {
            self.write_blocks()?;
            self.blocks.clear();
        }
        Ok(())
    }

    /// One reference fewer for each cluster of a run.
    pub fn free(&mut self, run: Run) -> Result<()> {
        (run.first..run.first + run.count).try_for_each(|c| self.change(c, false))
    }

    /// Do what is to be done. Making a block changes counts as well: that of its cluster and of the old
    /// one's. Each block is made once, so there is an end to it.
    fn work(&mut self) -> Result<()> {
        while let Some((cluster, change)) = self.todo.pop_front() {
            let (bits, order) = (self.block_bits(), self.order);
            let index = cluster >> bits;
            if !self.new.contains(&index) {
                self.make(index)?;
            }
            let i = cluster & ((1 << bits) - 1);
            let name = self.file.name();
            let at = cluster << self.old.cluster_bits;
            let block = self.block(index)?;
            let count = read_count(&block.data, i, order);
            let count = match count.checked_add_signed(change) {
                Some(count) if count <= max_count(order) => count,
                None if change < 0 => return Err(unused(name, at)),
                _ => return Err(too_many(name, at, order)),
            };
            write_count(&mut block.data, i, order, count);
            block.dirty = true;
            if count == 0 {
                self.note_freed(cluster);
            }
        }
        Ok(())
    }

    fn note_freed(&mut self, cluster: u64) {
        let room = self.freed.len() < MAX_FREED;
        match self.freed.last_mut() {
            Some(last) if last.first + last.count == cluster => last.count += 1,
            _ if room => self.freed.push(Run { first: cluster, count: 1 }),
            _ => {}
        }
    }

    /// Make block `index` anew, with the counts as they are. That its cluster is in use now, and the
    /// old one's is not, is left to be done.
    fn make(&mut self, index: u64) -> Result<()> {
        if index >= MAX_REFTABLE_BYTES / 8 {
            return Err(Error::TooBig {
                file: self.file.name().clone(),
                what: format!("its refcount table would need more than {MAX_REFTABLE_BYTES} bytes"),
            });
        }
        let data = self.present(index)?;
        let place = self.pick()?;
        let at = index as usize;
        if at >= self.table.len() {
            self.table.resize(at + 1, 0);
        }
        let before = std::mem::replace(&mut self.table[at], place << self.old.cluster_bits);
        self.new.insert(index);
        self.blocks.insert(index, Block { data, dirty: true });
        self.todo.push_back((place, 1));
        if before != 0 {
            self.todo.push_back((before >> self.old.cluster_bits, -1));
        }
        Ok(())
    }

    /// The counts that block `index` is for, as they are, in the new width.
    fn present(&mut self, index: u64) -> Result<Box<[u8]>> {
        let mut data = vec![0; self.cluster_bytes()].into_boxed_slice();
        let first = index << self.block_bits();
        if self.order == self.old.order {
            let offset = self.old.block_offset(first);
            if offset == 0 {
                return Ok(data);
            }
            if offset + data.len() as u64 > self.file.size() {
                return Err(Error::corrupt(
                    self.file.name(),
                    format!(
                        "a refcount block at {offset:#x} reaches past the end of the file ({} bytes)",
                        self.file.size()
                    ),
                ));
            }
            self.file.read_slice(&mut data, offset)?;
            return Ok(data);
        }
        for i in 0..1u64 << self.block_bits() {
            let count = self.old.get(self.file, first + i)?;
            if count > max_count(self.order) {
                let at = (first + i) << self.old.cluster_bits;
                return Err(too_many(self.file.name(), at, self.order));
            }
            if count != 0 {
                write_count(&mut data, i, self.order, count);
            }
        }
        Ok(data)
    }

    /// A new block.
    fn block(&mut self, index: u64) -> Result<&mut Block> {
        if self.hot.as_ref().is_none_or(|(i, _)| *i != index) {
            if let Some((i, block)) = self.hot.take() {
                self.blocks.insert(i, block);
            }
            let block = match self.blocks.remove(&index) {
                Some(block) => block,
                None => {
                    let mut data = vec![0; self.cluster_bytes()].into_boxed_slice();
                    let offset = self.table.get(index as usize).copied().unwrap_or(0);
                    self.file.read_slice(&mut data, offset)?;
                    Block { data, dirty: false }
                }
            };
            self.hot = Some((index, block));
        }
        let lost = || Error::Internal("a refcount block vanished".into());
        self.hot.as_mut().map(|(_, block)| block).ok_or_else(lost)
    }

    /// The first cluster from `at` on that is free by the old counts.
    fn unused(&mut self, mut at: u64) -> Result<u64> {
        loop {
            if at >= self.old.limit {
                return Err(no_space(self.file));
            }
            if self.old.block_offset(at) == 0 {
                return Ok(at);
            }
            let (next, is_free) = self.old.next_free(self.file, at)?;
            if is_free {
                return Ok(next);
            }
            at = next;
        }
    }

    /// A cluster that is free by the old counts and by the new ones. It is not counted yet.
    fn pick(&mut self) -> Result<u64> {
        loop {
            let cluster = self.unused(self.hint)?;
            self.hint = cluster + 1;
            if self.reserved.contains(&cluster) || self.get(cluster)? != 0 {
                continue;
            }
            self.claim(Run { first: cluster, count: 1 })?;
            return Ok(cluster);
        }
    }

    /// See that nothing known lies in a run that is free by its counts, and that nobody takes the file's
    /// end there for zeroes any more.
    fn claim(&mut self, run: Run) -> Result<()> {
        for cluster in run.first..run.first + run.count {
            if self.old.is_table(cluster, self.file)? {
                return Err(in_use(self.file, cluster << self.old.cluster_bits));
            }
        }
        self.old.hand_out(run);
        Ok(())
    }

    /// Take `count` free clusters that follow one another.
    pub fn take(&mut self, count: u64) -> Result<Run> {
        if count == 1 {
            // The search goes on where the last one ended: many are taken one by one.
            let first = self.pick()?;
            self.change(first, true)?;
            return Ok(Run { first, count });
        }
        let mut first = self.unused(self.hint)?;
        let mut have = 0;
        while have < count {
            let at = first + have;
            if at >= self.old.limit {
                return Err(no_space(self.file));
            }
            let next = self.unused(at)?;
            if next != at {
                (first, have) = (next, 0);
            } else if self.get(at)? != 0 {
                (first, have) = (at + 1, 0);
            } else {
                have += 1;
            }
        }
        let run = Run { first, count };
        self.claim(run)?;
        self.reserved = first..first + count;
        self.todo.extend((first..first + count).map(|c| (c, 1)));
        let done = self.work();
        self.reserved = 0..0;
        done.map(|()| run)
    }

    fn write_blocks(&mut self) -> Result<()> {
        if let Some((i, block)) = self.hot.take() {
            self.blocks.insert(i, block);
        }
        let table = &self.table;
        let mut dirty: Vec<_> = self
            .blocks
            .iter_mut()
            .filter(|(_, b)| b.dirty)
            .map(|(i, b)| (table.get(*i as usize).copied().unwrap_or(0), b))
            .collect();
        dirty.sort_unstable_by_key(|(offset, _)| *offset);
        for (offset, block) in dirty {
            self.file.write_slice(&block.data, offset, ReqFlags::NONE)?;
            block.dirty = false;
        }
        Ok(())
    }

    /// Write everything, the table too. It is not synced, and nothing names it yet.
    pub fn write(&mut self) -> Result<Placed> {
        let bits = self.old.cluster_bits;
        let per_cluster = 1u64 << (bits - 3);
        let before = (self.old.table.len() as u64).div_ceil(per_cluster);
        self.free(Run { first: self.old.table_offset >> bits, count: before })?;
        let needed = |table: &[u64]| (table.len() as u64).div_ceil(per_cluster).max(1);
        let run = loop {
            let run = self.take(needed(&self.table))?;
            // Taking it may have made blocks of higher places.
            if needed(&self.table) <= run.count {
                break run;
            }
            self.free(run)?;
        };
        if run.count << bits > MAX_REFTABLE_BYTES {
            return Err(Error::TooBig {
                file: self.file.name().clone(),
                what: format!("its refcount table would need {} bytes", run.count << bits),
            });
        }
        self.table.resize((run.count * per_cluster) as usize, 0);
        self.write_blocks()?;
        let content: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
        let offset = run.first << bits;
        self.file.write_slice(&content, offset, ReqFlags::NONE)?;
        Ok(Placed { offset, clusters: run.count as u32 })
    }

    /// The header names the new table: it is the present one from now on. Returns what may have become
    /// free; some of it may be in use again.
    pub fn adopt(self, placed: Placed) -> Vec<Run> {
        let old = self.old;
        old.order = self.order;
        old.table = self.table;
        old.table_offset = placed.offset;
        old.slices.clear();
        old.dirty = 0;
        old.new_blocks.clear();
        old.twice = None;
        // Others may share it now, or nobody has it any more.
        old.tail = None;
        old.hint = self.freed.iter().map(|r| r.first).fold(old.hint, u64::min).max(1);
        if self.freed.len() == MAX_FREED {
            old.hint = 1;
        }
        self.freed
    }
}

fn too_many(name: &Name, offset: u64, order: u32) -> Error {
    Error::invalid(format!(
        "{name}: the cluster at {offset:#x} would have more references than its refcounts of {} bits can \
         count; refcount-bits says how many they have",
        1u32 << order
    ))
}

fn unused(name: &Name, offset: u64) -> Error {
    Error::corrupt(name, format!("the cluster at {offset:#x} is in use but has a refcount of 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BITS: u32 = 9;

    fn areas() -> Arc<Areas> {
        Arc::new(Areas::new(0))
    }

    /// Header, table and one block of 256 counts, which counts them and `used` clusters more.
    fn counted(used: u64) -> (Device, Refcounts) {
        let driver = crate::file::from_memory(crate::file::memory(0).unwrap()).unwrap();
        let file = Device::new(driver);
        let mut bytes = vec![0; 512 * (3 + used as usize)];
        bytes[512..520].copy_from_slice(&1024u64.to_be_bytes());
        bytes[1024..1536].copy_from_slice(&Refcounts::ones(3 + used, 4, 512));
        file.write_slice(&bytes, 0, ReqFlags::NONE).unwrap();
        let refs = Refcounts::load(&file, BITS, 4, 512, 1, areas()).unwrap();
        (file, refs)
    }

    fn read_all(file: &Device) -> Vec<u8> {
        let mut bytes = vec![0; file.size() as usize];
        file.read_slice(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn what_is_not_adopted_has_not_happened() {
        let (file, mut refs) = counted(20);
        let before = read_all(&file);
        let mut new = Shadow::new(&mut refs, &file, 4).unwrap();
        new.change(5, true).unwrap();
        new.free(Run { first: 6, count: 3 }).unwrap();
        new.take(4).unwrap();
        assert_eq!((new.get(5).unwrap(), new.get(7).unwrap()), (2, 0));
        new.write().unwrap();
        drop(new);
        assert_eq!(read_all(&file)[..before.len()], before[..]);
        let again =
            |c| Refcounts::load(&file, BITS, 4, 512, 1, areas()).unwrap().get(&file, c).unwrap();
        assert_eq!((again(5), again(7), again(23)), (1, 1, 0));
        assert_eq!(refs.get(&file, 5).unwrap(), 1);
    }

    #[test]
    fn what_is_adopted_is_in_the_file() {
        for order in 0..=6 {
            let (file, mut refs) = counted(20);
            let mut new = Shadow::new(&mut refs, &file, order).unwrap();
            new.convert(Progress::NONE).unwrap();
            if order > 0 {
                new.change(5, true).unwrap();
            }
            new.change(6, false).unwrap();
            let run = new.take(3).unwrap();
            // Nothing that holds anything, now or then.
            assert!(run.first >= 23, "{run:?}");
            let placed = new.write().unwrap();
            let freed = new.adopt(placed);
            assert!(freed.contains(&Run { first: 6, count: 1 }), "{freed:?}");
            let mut loaded =
                Refcounts::load(&file, BITS, order, placed.offset, placed.clusters, areas())
                    .unwrap();
            for refs in [&mut loaded, &mut refs] {
                let mut get = |c| refs.get(&file, c).unwrap();
                assert_eq!(get(5), if order > 0 { 2 } else { 1 });
                assert_eq!((get(0), get(6), get(7)), (1, 0, 1));
                // The old table and block are free, the new table is not.
                assert_eq!((get(1), get(2)), (0, 0));
                assert_eq!(get(placed.offset >> BITS), 1);
                assert_eq!(get(run.first + 2), 1);
                // Each cluster of what there is has one reference, and nothing else has one.
                let total: u64 = (0..file.size() >> BITS).map(&mut get).sum();
                let blocks = refs.table.iter().filter(|e| **e != 0).count() as u64;
                let twice = u64::from(order > 0);
                let all = 1 + 20 + twice - 1 + 3 + blocks + u64::from(placed.clusters);
                assert_eq!(total, all, "order {order}");
            }
        }
    }

    #[test]
    fn counts_that_do_not_fit_are_refused() {
        let (file, mut refs) = counted(20);
        let mut new = Shadow::new(&mut refs, &file, 4).unwrap();
        new.change(5, true).unwrap();
        let placed = new.write().unwrap();
        new.adopt(placed);
        let mut new = Shadow::new(&mut refs, &file, 0).unwrap();
        let e = new.convert(Progress::NONE).unwrap_err();
        assert!(e.to_string().contains("0xa00") && e.to_string().contains("1 bits"), "{e}");
        let (file, mut refs) = counted(20);
        let mut new = Shadow::new(&mut refs, &file, 4).unwrap();
        assert!(new.change(200, false).unwrap_err().to_string().contains("refcount of 0"));
    }

    #[test]
    fn many_blocks_are_made_where_clusters_are_few() {
        // 64 counts of 8 bytes to a block: blocks that count blocks.
        let (file, mut refs) = counted(200);
        let mut new = Shadow::new(&mut refs, &file, 6).unwrap();
        new.convert(Progress::NONE).unwrap();
        for _ in 0..300 {
            new.take(1).unwrap();
        }
        let long = new.take(150).unwrap();
        let placed = new.write().unwrap();
        new.adopt(placed);
        for c in (3..203).chain(long.first..long.first + 150) {
            assert_eq!(refs.get(&file, c).unwrap(), 1, "cluster {c}");
        }
    }
}
