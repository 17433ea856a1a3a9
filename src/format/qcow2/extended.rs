//! L2 entries that are more than a standard entry says by itself: those with subclusters, and those of
//! images whose data lies in another file.
//!
//! The look-up of standard entries does not come here. Where tables are changed, all kinds of entries
//! are read and written by what is here, as [`Cluster`]s.
//!
//! A reader without a lock sees both words of an extended entry as they were at one moment: whoever
//! changes them hides the slice meanwhile (`Held::set_pair`).
//!
//! Source: "Extended L2 Entries" of the QCOW2 specification.

use super::cluster::{Cluster, Plain, Raw, SUB_BITS};
use super::entry::be64;
use super::l2cache::Hit;
use super::*;

impl Qcow2 {
    /// Bytes that are data, zeroes or not here as one: a cluster, or a subcluster.
    pub(super) fn grain(&self) -> u64 {
        1 << self.shape.grain_bits()
    }

    /// [`Qcow2::lookup`] where a standard entry alone does not tell.
    #[inline(never)]
    pub(super) fn lookup_special(&self, offset: u64, count: u64, own_table: bool) -> Result<Found> {
        let cluster = offset >> self.cluster_bits;
        let slice = cluster >> self.slice_bits;
        let slice_end = (slice + 1) << self.slice_bits;
        let wanted = (offset + count).div_ceil(self.cluster_size()).min(slice_end);
        loop {
            let Some(hit) = self.cache.find(slice) else {
                if self.load_slice(slice)? {
                    continue;
                }
                return self.lookup_on_disk(offset, count);
            };
            let first = self.found_entry(hit, cluster);
            let found = self.shape.decode(first, cluster).map(|decoded| {
                let (entry, end) = self.run_of(decoded, offset);
                let more = |c| self.shape.decode(self.found_entry(hit, c), c).ok();
                (entry, self.extend_run(entry, end, wanted, more))
            });
            if self.cache.still(hit) {
                let (entry, end) = found.map_err(|what| self.bad_entry_of(cluster, first, what))?;
                return Ok(Found { entry, len: count.min(end - offset), own_table });
            }
        }
    }

    /// Both words of an entry. They mean nothing unless [`L2Cache::still`] holds afterwards.
    #[inline]
    fn found_entry(&self, hit: Hit, cluster: u64) -> Raw {
        if self.shape.extended {
            let at = 2 * cluster as usize;
            return Raw { word: self.cache.entry(hit, at), bits: self.cache.entry(hit, at + 1) };
        }
        Raw { word: self.cache.entry(hit, cluster as usize), bits: 0 }
    }

    /// What is at a guest offset in `cluster`, and where in the cluster it ends to be so.
    fn run_of(&self, cluster: Cluster, offset: u64) -> (Entry, u64) {
        let sub = self.shape.sub(offset);
        let (entry, n) = cluster.run(sub);
        let start = offset & !(self.cluster_size() - 1);
        (entry, start + (u64::from(sub + n) << (self.cluster_bits - SUB_BITS)))
    }

    /// A run that ends at `end` goes on in the clusters behind it, below `limit`, as far as those are
    /// alike; where it ends.
    fn extend_run(
        &self,
        entry: Entry,
        mut end: u64,
        limit: u64,
        cluster: impl Fn(u64) -> Option<Cluster>,
    ) -> u64 {
        let step = |host: u64| host.checked_add(self.cluster_size()).unwrap_or(0);
        let mut last = entry;
        while end & (self.cluster_size() - 1) == 0 && end >> self.cluster_bits < limit {
            let Some(next) = cluster(end >> self.cluster_bits) else { break };
            let (next, to) = self.run_of(next, end);
            let alike = match last {
                Entry::Normal { host, copied } => Entry::Normal { host: step(host), copied },
                Entry::Zero { host, copied } if host != 0 => {
                    Entry::Zero { host: step(host), copied }
                }
                Entry::Compressed { .. } => break,
                other => other,
            };
            if next != alike {
                break;
            }
            (last, end) = (next, to);
        }
        end
    }

    /// Look up one cluster whose slice is not in the cache, and so has no changes that are not written.
    #[cold]
    pub(super) fn lookup_on_disk(&self, offset: u64, count: u64) -> Result<Found> {
        let cluster = offset >> self.cluster_bits;
        let mut raw = [0; 16];
        if let Some(at) = self.slice_offset(cluster >> self.slice_bits)? {
            let index = cluster & ((1 << self.slice_bits) - 1);
            let bits = self.shape.entry_bits();
            let at = at + (index << bits);
            if at + (1 << bits) > self.file.size() {
                return Err(self.cut_off("the end of an L2 table", at));
            }
            self.file.read_slice(&mut raw[..1 << bits], at)?;
        }
        let raw = Raw { word: be64(&raw, 0), bits: be64(&raw, 8) };
        let decoded = self.shape.decode(raw, cluster);
        let decoded = decoded.map_err(|what| self.bad_entry_of(cluster, raw, what))?;
        let (entry, end) = self.run_of(decoded, offset);
        Ok(Found { entry, len: count.min(end - offset), own_table: false })
    }

    /// The entry of a guest cluster in a held slice, as it is.
    pub(super) fn raw_entry(&self, held: &Held<'_>, cluster: u64) -> Raw {
        if self.shape.extended {
            let at = 2 * cluster as usize;
            return Raw { word: held.get(at), bits: held.get(at + 1) };
        }
        Raw { word: held.get(cluster as usize), bits: 0 }
    }

    /// What the entry of a guest cluster in a held slice says.
    pub(super) fn entry_of(&self, held: &Held<'_>, cluster: u64) -> Result<Cluster> {
        let raw = self.raw_entry(held, cluster);
        self.shape.decode(raw, cluster).map_err(|what| self.bad_entry_of(cluster, raw, what))
    }

    /// Change the entry of a guest cluster in a held slice.
    pub(super) fn set_entry(&self, held: &Held<'_>, cluster: u64, new: Plain) {
        self.set_raw(held, cluster, self.shape.encode(new));
    }

    /// [`Qcow2::set_entry`], any words.
    pub(super) fn set_raw(&self, held: &Held<'_>, cluster: u64, raw: Raw) {
        match self.shape.extended {
            true => held.set_pair(2 * cluster as usize, [raw.word, raw.bits]),
            false => held.set(cluster as usize, raw.word),
        }
    }

    #[cold]
    fn bad_entry_of(&self, cluster: u64, raw: Raw, what: &str) -> Error {
        if !self.shape.extended {
            return self.bad_entry(cluster, raw.word, what);
        }
        self.found_corrupt(format!(
            "the L2 entry of guest offset {:#x} {what}: found {:#018x} {:#018x}",
            cluster << self.cluster_bits,
            raw.word,
            raw.bits
        ))
    }
}
