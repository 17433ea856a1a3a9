//! Making all refcounts anew: a new table and new blocks, written behind the end of all that is there,
//! then named by one write of the header. What was there before is free afterwards.
//!
//! Nothing that is there is written over before the header has changed, so that a power cut leaves
//! either the old refcounts or the new ones.

use super::super::header::MAX_REFTABLE_BYTES;
use super::super::refcount::{write_count, write_table};
use super::*;

/// Where the new ones go, in clusters.
struct Place {
    /// Indices of the blocks that are needed, in order.
    blocks: Vec<u64>,
    /// Where each of them goes.
    at: Vec<u64>,
    /// Where the table goes, and how many clusters it has.
    table: (u64, u64),
}

impl Check<'_> {
    /// Make all refcounts anew, then look at the image as it is now.
    pub(super) fn rebuild_all(&mut self) -> Result<()> {
        let before = self.report;
        let place = self.find_place()?;
        self.write_anew(&place)?;
        self.report.changed = true;
        log(Level::Info, format_args!("{}: all refcounts were made anew", self.file.name()));
        self.look_again()?;
        self.count_all()?;
        let counted = self.report;
        self.report = CheckReport::default();
        // The old ones are free now.
        self.compare(Repair::Leaks)?;
        let left = self.report.leaks;
        self.report = counted;
        if self.rebuild {
            self.trouble(format_args!("the refcounts are still wrong after they were made anew"));
        }
        self.report.corruptions_fixed += before.corruptions.saturating_sub(self.report.corruptions);
        self.report.leaks_fixed += before.leaks.saturating_sub(self.report.leaks);
        self.report.leaks += left;
        Ok(())
    }

    /// Forget what was found but what was mended.
    fn look_again(&mut self) -> Result<()> {
        let old = self.report;
        self.report = CheckReport {
            corruptions_fixed: old.corruptions_fixed,
            leaks_fixed: old.leaks_fixed,
            changed: true,
            ..CheckReport::default()
        };
        self.header = Header::read_to_check(self.file)?;
        self.file_size = self.file.size();
        self.clusters = self.file_size.div_ceil(1 << self.bits);
        self.counts = Counts::new(self.clusters, self.counts.max());
        self.rebuild = false;
        self.done = 0;
        self.disk = Disk::load(self.file, &self.header, &mut self.report, &mut self.rebuild)?;
        Ok(())
    }

    /// Find room for the blocks that are needed (those that count what is used, and those that count
    /// themselves and the table), and for the table.
    fn find_place(&mut self) -> Result<Place> {
        let block_bits = self.disk.block_bits;
        let mut blocks = Vec::new();
        let mut at = 0;
        while let Some(used) = self.counts.next_used(at, self.clusters) {
            let index = used >> block_bits;
            blocks.push(index);
            at = (index + 1) << block_bits;
        }
        let used = blocks.len();
        let can_grow = self.file.driver().kind() != "host_device";
        let mut table = 1;
        loop {
            let place = match can_grow {
                true => self.clusters_behind(blocks.len() as u64, table),
                false => self.free_clusters(blocks.len() as u64, table)?,
            };
            let mut wanted: Vec<u64> = blocks[..used].to_vec();
            wanted.extend(place.iter().map(|c| c >> block_bits));
            let end = place.last().map_or(0, |c| c + 1);
            // What this makes the file long enough for is zeroes.
            for (from, to, _) in self.beyond.reached(end) {
                wanted.extend((from >> block_bits)..=((to - 1) >> block_bits));
            }
            wanted.sort_unstable();
            wanted.dedup();
            let entries = wanted.last().map_or(1, |i| i + 1);
            let clusters = (entries * 8).div_ceil(self.cluster());
            if clusters << self.bits > MAX_REFTABLE_BYTES {
                return Err(Error::TooBig {
                    file: self.file.name().clone(),
                    what: format!("its refcount table would need {entries} entries"),
                });
            }
            if wanted.len() <= blocks.len() && clusters <= table {
                let (at, rest) = place.split_at(blocks.len());
                let first = rest.first().copied().unwrap_or(0);
                // Fewer may do than were planned for.
                let at = at[..wanted.len()].to_vec();
                return Ok(Place { blocks: wanted, at, table: (first, table) });
            }
            // It only grows, and each cluster more counts many.
            (blocks, table) = (wanted, table.max(clusters));
        }
    }

    /// Clusters behind the end of the file, but none that something refers to already: whoever follows
    /// that must not come upon refcounts. `table` that follow one another come last.
    fn clusters_behind(&mut self, blocks: u64, table: u64) -> Vec<u64> {
        let (mut out, mut at, mut end) = (Vec::new(), self.clusters, 0);
        let mut beyond = self.beyond.in_order().peekable();
        while (out.len() as u64) < blocks + table {
            // Those that begin before here: up to where they reach.
            while let Some((_, to)) = beyond.next_if(|b| b.0 <= at) {
                end = end.max(to);
            }
            if at < end {
                // What was begun of the table does not follow on.
                out.truncate(out.len().min(blocks as usize));
                at = end;
                continue;
            }
            out.push(at);
            at += 1;
        }
        out
    }

    /// Clusters that nothing refers to, on a device that can not grow: `table` that follow one another
    /// come last.
    fn free_clusters(&self, blocks: u64, table: u64) -> Result<Vec<u64>> {
        let limit = self.file_size >> self.bits;
        let (mut out, mut run) = (Vec::new(), Vec::new());
        let mut at = 1;
        while at < limit && (out.len() as u64) < blocks + table {
            if self.counts.get(at) != 0 {
                run.clear();
            } else if (out.len() as u64) < blocks {
                out.push(at);
            } else {
                run.push(at);
                if run.len() as u64 == table {
                    out.append(&mut run);
                }
            }
            at += 1;
        }
        if (out.len() as u64) < blocks + table {
            return Err(Error::Io {
                op: "finding room for new refcounts",
                file: self.file.name().clone(),
                offset: self.file_size,
                count: (blocks + table) << self.bits,
                errno: libc::ENOSPC,
            });
        }
        Ok(out)
    }

    fn write_anew(&mut self, place: &Place) -> Result<()> {
        let (table, len) = place.table;
        for cluster in place.at.iter().copied().chain(table..table + len) {
            self.clusters = self.clusters.max(cluster + 1);
            self.counts.add(cluster, 1);
        }
        for (from, to, times) in self.beyond.reached(self.clusters).collect::<Vec<_>>() {
            for cluster in from..to {
                self.counts.add(cluster, times);
            }
        }
        let mut entries = vec![0; (len << self.bits) as usize];
        let mut block = vec![0; self.cluster() as usize];
        let order = self.disk.order;
        for (index, at) in place.blocks.iter().zip(&place.at) {
            block.fill(0);
            let first = index << self.disk.block_bits;
            let (mut from, to) = (first, first + (1 << self.disk.block_bits));
            while let Some(used) = self.counts.next_used(from, to) {
                write_count(&mut block, used - first, order, self.counts.get(used));
                from = used + 1;
            }
            self.file.write_slice(&block, at << self.bits, ReqFlags::NONE)?;
            if let Some(entry) = entries.get_mut(*index as usize * 8..*index as usize * 8 + 8) {
                entry.copy_from_slice(&(at << self.bits).to_be_bytes());
            }
            self.progress.at(self.done.min(self.todo), self.todo + 1)?;
        }
        write_table(self.file, table << self.bits, len, &entries)
    }
}
