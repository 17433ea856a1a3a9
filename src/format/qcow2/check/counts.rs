//! How often each host cluster is referred to: four bits a cluster, however large the counts.
//!
//! Counts up to 14 are kept in half a byte; 15 there says that the count is in a map beside. What is
//! kept is sized by the file, not by what its tables claim. Where that is little it is one run of
//! memory, of which the host gives only the pages that are used; where it is much, as with a sparse
//! file that says to be huge, only what lies around clusters that are referred to. A single reference,
//! which takes 8 bytes in the image, costs about 110 bytes there at most.

use std::collections::BTreeMap;

use memmap2::{MmapMut, MmapOptions};

/// Counts in one run of memory take no more than this, bytes.
const MAX_FLAT: u64 = 64 << 20;
/// Clusters in a piece of the sparse form, as a power of two.
const PIECE_BITS: u32 = 7;
const PIECE_BYTES: usize = 1 << (PIECE_BITS - 1);
/// A piece of counts that are all 0.
static NOTHING: [u8; PIECE_BYTES] = [0; PIECE_BYTES];
/// Half a byte that says: look into the map.
const LARGE: u8 = 15;

enum Store {
    Flat(MmapMut),
    Pieces(BTreeMap<u64, [u8; PIECE_BYTES]>),
}

/// Counts of clusters; all are 0 at first.
pub struct Counts {
    store: Store,
    large: BTreeMap<u64, u64>,
    /// Largest count that can be had.
    max: u64,
    /// Some cluster was referred to more than once.
    shared: bool,
}

impl Counts {
    /// For a file of so many clusters, with counts up to `max`.
    pub fn new(clusters: u64, max: u64) -> Self {
        Self::with_limit(clusters, max, MAX_FLAT)
    }

    fn with_limit(clusters: u64, max: u64, limit: u64) -> Self {
        let bytes = clusters / 2 + 1;
        let flat = (bytes <= limit)
            .then(|| MmapOptions::new().len(bytes as usize).no_reserve_swap().map_anon().ok())
            .flatten();
        let store = flat.map_or_else(|| Store::Pieces(BTreeMap::new()), Store::Flat);
        Self { store, large: BTreeMap::new(), max, shared: false }
    }

    /// The largest count that can be had.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// Whether some cluster was referred to more than once, by [`Counts::add`].
    pub fn any_shared(&self) -> bool {
        self.shared
    }

    /// How often `cluster` is referred to.
    #[inline]
    pub fn get(&self, cluster: u64) -> u64 {
        match self.nibble(cluster) {
            LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            n => n.into(),
        }
    }

    #[inline]
    fn nibble(&self, cluster: u64) -> u8 {
        let shift = (cluster & 1) * 4;
        let byte = match &self.store {
            Store::Flat(map) => map.get((cluster >> 1) as usize).copied(),
            Store::Pieces(pieces) => {
                pieces.get(&(cluster >> PIECE_BITS)).map(|p| p[byte_in_piece(cluster)])
            }
        };
        byte.map_or(0, |b| (b >> shift) & 15)
    }

    fn byte(&mut self, cluster: u64) -> &mut u8 {
        // Clusters behind the end of a flat store (a reference may reach one past the file's end).
        let out = match &self.store {
            Store::Flat(map) => (cluster >> 1) as usize >= map.len(),
            Store::Pieces(_) => false,
        };
        if out {
            self.lengthen(cluster);
        }
        match &mut self.store {
            Store::Flat(map) => &mut map[(cluster >> 1) as usize],
            Store::Pieces(pieces) => {
                let piece = pieces.entry(cluster >> PIECE_BITS).or_insert([0; PIECE_BYTES]);
                &mut piece[byte_in_piece(cluster)]
            }
        }
    }

    #[cold]
    fn lengthen(&mut self, cluster: u64) {
        let mut pieces = BTreeMap::new();
        let Store::Flat(map) = &self.store else { return };
        let len = (cluster >> 1) as usize + 4096;
        if len as u64 <= MAX_FLAT
            && let Ok(mut longer) = MmapOptions::new().len(len).no_reserve_swap().map_anon()
        {
            longer[..map.len()].copy_from_slice(map);
            self.store = Store::Flat(longer);
            return;
        }
        for (i, chunk) in map.chunks(PIECE_BYTES).enumerate() {
            if chunk.iter().any(|b| *b != 0) {
                let mut piece = [0; PIECE_BYTES];
                piece[..chunk.len()].copy_from_slice(chunk);
                pieces.insert(i as u64, piece);
            }
        }
        self.store = Store::Pieces(pieces);
    }

    /// Count `times` references to `cluster`. Returns how many of them did not fit.
    #[inline]
    pub fn add(&mut self, cluster: u64, times: u64) -> u64 {
        // By far the most: the only reference.
        if times == 1
            && let Store::Flat(map) = &mut self.store
            && let Some(byte) = map.get_mut((cluster >> 1) as usize)
        {
            let shift = (cluster & 1) * 4;
            if (*byte >> shift) & 15 == 0 {
                *byte |= 1 << shift;
                return 0;
            }
        }
        self.add_slowly(cluster, times)
    }

    #[inline(never)]
    fn add_slowly(&mut self, cluster: u64, times: u64) -> u64 {
        let old = self.get(cluster);
        self.shared |= old.saturating_add(times) > 1;
        let new = old.saturating_add(times).min(self.max);
        self.set(cluster, new);
        times - (new - old)
    }

    /// Say how often `cluster` is referred to.
    pub fn set(&mut self, cluster: u64, count: u64) {
        let count = count.min(self.max);
        let nibble = count.min(LARGE.into()) as u8;
        let before = self.nibble(cluster);
        if before == nibble && nibble != LARGE {
            return;
        }
        match (nibble, before) {
            (LARGE, _) => drop(self.large.insert(cluster, count)),
            (_, LARGE) => drop(self.large.remove(&cluster)),
            _ => {}
        }
        let shift = (cluster & 1) * 4;
        let byte = self.byte(cluster);
        *byte = *byte & !(15 << shift) | nibble << shift;
    }

    /// The first cluster of `from..to` that is referred to.
    pub fn next_used(&self, from: u64, to: u64) -> Option<u64> {
        let mut at = from;
        while at < to {
            match &self.store {
                Store::Flat(map) => {
                    if at & 1 != 0 && self.nibble(at) != 0 {
                        return Some(at);
                    }
                    let first = at.div_ceil(2) as usize;
                    let last = (to.div_ceil(2) as usize).min(map.len());
                    let found = first + map.get(first..last)?.iter().position(|b| *b != 0)?;
                    let cluster = found as u64 * 2 + u64::from(map[found] & 15 == 0);
                    return (cluster < to).then_some(cluster);
                }
                Store::Pieces(pieces) => {
                    let (&piece, bytes) = pieces.range(at >> PIECE_BITS..).next()?;
                    let begin = at.max(piece << PIECE_BITS);
                    let end = (piece + 1) << PIECE_BITS;
                    let nibble = |c: &u64| (bytes[byte_in_piece(*c)] >> ((c & 1) * 4)) & 15;
                    if let Some(cluster) = (begin..end).find(|c| nibble(c) != 0) {
                        return (cluster < to).then_some(cluster);
                    }
                    at = end;
                }
            }
        }
        None
    }

    /// Counts around `cluster`, as bytes with two each, 15 for those that are larger; and which cluster
    /// the first of them is of.
    pub fn window(&self, cluster: u64) -> (u64, &[u8]) {
        let first = cluster & !((1 << PIECE_BITS) - 1);
        match &self.store {
            Store::Flat(map) if cluster / 2 < map.len() as u64 => (0, map),
            Store::Flat(_) => (first, &NOTHING),
            Store::Pieces(pieces) => {
                (first, pieces.get(&(cluster >> PIECE_BITS)).map_or(&NOTHING[..], |p| &p[..]))
            }
        }
    }
}

fn byte_in_piece(cluster: u64) -> usize {
    ((cluster & ((1 << PIECE_BITS) - 1)) >> 1) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same operations on counts of either form and on a plain map.
    #[test]
    fn both_forms_count_as_a_map_would() {
        for (limit, max) in [(1 << 20, u64::MAX), (0, u64::MAX), (1 << 20, 3), (0, 1), (0, 255)] {
            let mut counts = Counts::with_limit(5000, max, limit);
            let mut plain: BTreeMap<u64, u64> = BTreeMap::new();
            let mut x = 12345u64;
            for _ in 0..20_000 {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let cluster = (x >> 33) % 5100;
                let times = if x >> 60 == 0 { 1 << 20 } else { 1 };
                let old = plain.get(&cluster).copied().unwrap_or(0);
                let new = (old + times).min(max);
                assert_eq!(counts.add(cluster, times), times - (new - old));
                plain.insert(cluster, new);
                if x >> 61 == 1 {
                    counts.set(cluster, 0);
                    plain.remove(&cluster);
                }
            }
            for cluster in 0..5800 {
                let want = plain.get(&cluster).copied().unwrap_or(0);
                assert_eq!(
                    counts.get(cluster),
                    want,
                    "cluster {cluster}, limit {limit}, max {max}"
                );
                let next = plain.range(cluster..5800).next().map(|(c, _)| *c);
                assert_eq!(counts.next_used(cluster, 5800), next, "after {cluster}");
            }
        }
    }

    #[test]
    fn a_reference_far_out_takes_little() {
        let mut counts = Counts::new(1 << 47, u64::MAX);
        assert_eq!(counts.add((1 << 47) - 1, 20), 0);
        assert_eq!(counts.add(1 << 40, 1), 0);
        assert_eq!(counts.get((1 << 47) - 1), 20);
        assert_eq!(counts.next_used(0, u64::MAX), Some(1 << 40));
        assert_eq!(counts.next_used((1 << 40) + 1, u64::MAX), Some((1 << 47) - 1));
    }
}
