//! Room for more counts: new blocks, a larger table, runs of a certain length.

use super::super::guard::{Kind, misplaced};
use super::super::header::{MAX_REFTABLE_BYTES, at};
use super::*;
use crate::log::{Level, log};

/// Runs that are looked at for one of a certain length.
const MAX_TRIES: usize = 64;

/// What [`Refcounts::allocate`] needs of the image around it.
pub trait Host {
    /// The image's file.
    fn file(&self) -> &Device;
    /// Write a larger table: `content` at cluster `run`, then make the header name it.
    fn switch_table(&self, run: Run, content: &[u8]) -> Result<()>;
}

impl Refcounts {
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
        let index = used.max(self.first_block_behind());
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
        self.expect_no_table(file, Run { first, count: blocks + count })?;
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

    /// The first block that counts nothing of what the file has.
    fn first_block_behind(&self) -> u64 {
        let end = if self.virgin == u64::MAX { 0 } else { self.virgin };
        end.div_ceil(1 << self.block_bits())
    }

    /// Refuse to write where a table is known to be: the refcount table may be too short to count what
    /// there is.
    fn expect_no_table(&self, file: &Device, run: Run) -> Result<()> {
        for cluster in run.first..run.first + run.count {
            if self.is_table(cluster, file)? {
                return Err(in_use(file, cluster << self.cluster_bits));
            }
        }
        Ok(())
    }

    /// Make the block that counts `cluster`, inside what it counts, where nothing can be in use.
    /// The block counts itself. Returns where to go on looking.
    pub(super) fn new_block(
        &mut self,
        file: &Device,
        cluster: u64,
    ) -> std::result::Result<u64, Stop> {
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
        // The new table lies at the end of what the old one covers and of what the file has (an image may
        // say that its table is shorter than it was), behind blocks that count both.
        let first_block = (self.table.len() as u64).max(self.first_block_behind());
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
        self.expect_no_table(file, all)?;
        // Nothing points here yet: on failure the file is only longer.
        file.zero(first << self.cluster_bits, all.count << self.cluster_bits, ReqFlags::NONE)?;
        for b in 0..blocks {
            table[(first_block + b) as usize] = (first + b) << self.cluster_bits;
        }
        let before = std::mem::replace(&mut self.table, table);
        (first..first + blocks).for_each(|c| self.areas.add(Kind::RefcountBlock, c));
        let counted = (first..first + all.count).try_for_each(|c| self.set(file, c, 1));
        let switched = counted.and_then(|()| self.write_blocks(file)).and_then(|()| {
            let content: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
            host.switch_table(Run { first: first + blocks, count: clusters }, &content)
        });
        if let Err(e) = switched {
            self.table = before;
            (first..first + blocks).for_each(|c| self.areas.remove(Kind::RefcountBlock, c));
            self.forget_slices_from(first_block);
            return Err(e);
        }
        self.hand_out(all);
        self.new_blocks.clear();
        let own = Run { first: first + blocks, count: clusters };
        self.areas.replace(Kind::RefcountTable, &[own]);
        self.table_offset = (first + blocks) << self.cluster_bits;
        self.hint = self.hint.max(first + all.count);
        for cluster in old.0..old.0 + old.1 {
            // The table has grown whatever comes of this: where it fails a cluster is leaked.
            if let Err(e) = self.release(file, cluster) {
                log(Level::Error, format_args!("{e}"));
            }
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
        let dirty = || self.slices.iter().filter(|(_, s)| s.dirty);
        for (i, _) in dirty() {
            self.expect_place(file, Kind::RefcountBlock, self.slice_offset(*i))?;
        }
        for (i, slice) in dirty() {
            file.write_slice(&slice.data, self.slice_offset(*i), ReqFlags::NONE)?;
        }
        file.flush()
    }

    /// Refuse to write counts, or the table, over anything else.
    fn expect_place(&self, file: &Device, kind: Kind, offset: u64) -> Result<()> {
        match self.areas.conflict(kind, offset >> self.cluster_bits) {
            None => Ok(()),
            Some(other) => Err(Error::corrupt(file.name(), misplaced(kind.name(), offset, other))),
        }
    }

    /// Write the counts that have changed, and make them last: what they count may be pointed to then.
    pub fn publish(&mut self, file: &Device) -> Result<()> {
        let (blocks, entries) = (self.take_dirty(), self.take_new_blocks());
        for (offset, _) in &blocks {
            self.expect_place(file, Kind::RefcountBlock, *offset)?;
        }
        for (offset, _) in &entries {
            self.expect_place(file, Kind::RefcountTable, *offset)?;
        }
        for (offset, block) in blocks {
            file.write_slice(&block, offset, ReqFlags::NONE)?;
        }
        self.written();
        file.flush()?;
        for (offset, entry) in entries {
            file.write_slice(&entry.to_be_bytes(), offset, ReqFlags::NONE)?;
        }
        file.flush()
    }
}

/// Write a refcount table of `clusters` clusters to `offset`, and make the header name it.
pub(in super::super) fn write_table(
    file: &Device,
    offset: u64,
    clusters: u64,
    content: &[u8],
) -> Result<()> {
    place_table(file, offset, content)?;
    name_table(file, offset, clusters)
}

/// The first half of [`write_table`]. Where it fails nothing has happened: nobody names the table.
pub(in super::super) fn place_table(file: &Device, offset: u64, content: &[u8]) -> Result<()> {
    file.write_slice(content, offset, ReqFlags::NONE)?;
    file.flush()
}

/// The second half of [`write_table`]. Where it fails nobody knows which table the header names.
pub(in super::super) fn name_table(file: &Device, offset: u64, clusters: u64) -> Result<()> {
    let mut field = [0; 12];
    field[..8].copy_from_slice(&offset.to_be_bytes());
    field[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
    file.write_slice(&field, at::REFTABLE, ReqFlags::NONE)?;
    file.flush()
}

#[cfg(test)]
mod tests {
    use super::super::super::guard::Areas;
    use super::*;

    const CLUSTER: u64 = 512;
    /// What a refcount table of one cluster counts: 64 blocks of 256.
    const COVERED: u64 = 64 * 256;

    struct Image(Device);

    impl Host for Image {
        fn file(&self) -> &Device {
            &self.0
        }
        fn switch_table(&self, run: Run, content: &[u8]) -> Result<()> {
            write_table(&self.0, run.first * CLUSTER, run.count, content)
        }
    }

    /// Header, table, a block that counts them, and the same byte up to `clusters`.
    fn counted(clusters: u64) -> (Image, Refcounts, Arc<Areas>) {
        let driver = crate::file::from_memory(crate::file::memory(0).unwrap()).unwrap();
        let file = Device::new(driver);
        file.write_slice(&vec![0x55; (clusters * CLUSTER) as usize], 0, ReqFlags::NONE).unwrap();
        let mut tables = vec![0; 2 * CLUSTER as usize];
        tables[..8].copy_from_slice(&(2 * CLUSTER).to_be_bytes());
        tables[512..].copy_from_slice(&Refcounts::ones(3, 4, 512));
        file.write_slice(&tables, CLUSTER, ReqFlags::NONE).unwrap();
        let areas = Arc::new(Areas::new(0));
        let refs = Refcounts::load(&file, 9, 4, CLUSTER, 1, areas.clone()).unwrap();
        (Image(file), refs, areas)
    }

    /// The growth that is tested: of the table, and of what lies behind all that is counted.
    type Growth = fn(&mut Refcounts, &Image) -> Result<()>;
    const WAYS: [Growth; 2] = [
        |refs, image| refs.grow_table(image, 64),
        |refs, image| refs.allocate_all(image, 300).map(drop),
    ];

    fn is_untouched(image: &Image, from: u64, to: u64) -> bool {
        let mut bytes = vec![0; ((to - from) * CLUSTER) as usize];
        image.0.read_slice(&mut bytes, from * CLUSTER).unwrap();
        bytes.iter().all(|b| *b == 0x55)
    }

    /// The header had been made to name a shorter refcount table: what lay behind what that counts was
    /// wiped by growing it.
    #[test]
    fn growth_leaves_what_the_file_has_behind_a_table_that_is_too_short() {
        for grow in WAYS {
            let (image, mut refs, _) = counted(COVERED + 100);
            grow(&mut refs, &image).unwrap();
            assert!(is_untouched(&image, COVERED, COVERED + 100));
        }
    }

    #[test]
    fn growth_writes_over_no_table_that_is_known() {
        for (grow, at) in WAYS.into_iter().zip([COVERED, 256]) {
            let (image, mut refs, areas) = counted(200);
            // Behind the end of the file, where an L1 table may say that there is one.
            areas.add(Kind::L2, at + 1);
            let e = grow(&mut refs, &image).unwrap_err();
            assert!(e.to_string().contains("holds the header or a table"), "{e}");
            // And where the block or the table itself would be.
            areas.add(Kind::L2, at);
            assert!(grow(&mut refs, &image).is_err());
            assert!(image.0.size() <= at * CLUSTER, "something was written there");
            areas.replace(Kind::L2, &[]);
            grow(&mut refs, &image).unwrap();
        }
    }

    #[test]
    fn counts_are_not_written_over_other_tables() {
        for publish in [true, false] {
            let (image, mut refs, areas) = counted(200);
            refs.release(&image.0, 2).unwrap();
            areas.add(Kind::L2, 2);
            let before = image.0.size();
            let done = match publish {
                true => refs.publish(&image.0),
                false => refs.grow_table(&image, 64),
            };
            let e = done.unwrap_err().to_string();
            assert!(e.contains("a refcount block is to be written at 0x400"), "{e}");
            let mut count = [0; 2];
            image.0.read_slice(&mut count, 2 * CLUSTER + 4).unwrap();
            assert_eq!(count, [0, 1], "as it was");
            if publish {
                assert_eq!(image.0.size(), before);
            } else {
                assert_eq!(areas.kind_at(COVERED), None, "a block that came to nothing");
            }
        }
    }
}
