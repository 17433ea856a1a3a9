//! What a bitmap says: its data in the file, and the marks made since. Read piece by piece, so that
//! a bitmap of any size costs a few KiB of memory.
//!
//! Source: "Bitmap table" and "Bitmap data" of the QCOW2 specification.

use super::directory::Table;
use super::marks::{CHUNK_BITS, Found, Marks, WORDS, Words, cut};
use super::*;

/// Bytes of a chunk.
pub const PIECE: u64 = WORDS as u64 * 8;
/// What looking at a chunk costs at least, in bytes that might have been read instead.
const LOOK: u64 = 64;
/// Entries of a table that are read at a time.
const WINDOW: u64 = 512;
/// An entry of a table: where a cluster of data lies; what must be zero; without a cluster, all bits
/// are set.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const RESERVED: u64 = 0xff00_0000_0000_01fe;
pub const ALL_ONES: u64 = 1;

/// A bitmap, at one moment.
pub struct View<'a> {
    image: &'a Qcow2,
    name: Vec<u8>,
    table: Option<Table>,
    /// Bits of the file's that count.
    base: u64,
    marks: Vec<Arc<Marks>>,
    /// How many bits there are.
    bits: u64,
    granularity_bits: u32,
    /// Entries of the table that were read last, and which is the first.
    window: (u64, Vec<u64>),
    words: Box<Words>,
    /// Bytes of tables and data that were read, or what else cost as much.
    pub read: u64,
}

impl<'a> View<'a> {
    /// As `bitmap` is now, on a disk of `size` bytes.
    pub fn new(image: &'a Qcow2, bitmap: &Bitmap, size: u64) -> Self {
        Self {
            image,
            name: bitmap.name.clone(),
            table: bitmap.table,
            base: bitmap.base,
            marks: bitmap.marks(),
            bits: granules(size, bitmap.granularity_bits),
            granularity_bits: bitmap.granularity_bits,
            window: (0, Vec::new()),
            words: Box::new([0; WORDS]),
            read: 0,
        }
    }

    /// Entry `index` of the table, checked: where its cluster lies, or 0, or [`ALL_ONES`].
    pub fn entry(&mut self, index: u64) -> Result<u64> {
        let (first, entries) = &self.window;
        let known = index.checked_sub(*first).and_then(|i| entries.get(i as usize)).copied();
        let raw = match known {
            Some(raw) => raw,
            None => self.read_window(index)?,
        };
        let offset = raw & OFFSET;
        let what = match () {
            _ if raw & RESERVED != 0 => "has reserved bits set",
            _ if offset != 0 && raw & ALL_ONES != 0 => {
                "has both an offset and the bit for all ones"
            }
            _ if offset & (self.image.cluster_size() - 1) != 0 => {
                "points to an offset that is no multiple of the cluster size"
            }
            _ if offset >= self.image.file.size() => "points past the end of the file",
            _ => return Ok(raw),
        };
        Err(Error::corrupt(
            self.image.file.name(),
            format!(
                "entry {index} of the table of bitmap {} {what}: found {raw:#018x}",
                quoted(&self.name)
            ),
        ))
    }

    fn read_window(&mut self, index: u64) -> Result<u64> {
        let Some(table) = self.table.filter(|t| index < u64::from(t.entries)) else { return Ok(0) };
        let first = index - index % WINDOW;
        let count = WINDOW.min(u64::from(table.entries) - first);
        let mut raw = vec![0; count as usize * 8];
        self.image.file.read_slice(&mut raw, table.offset + first * 8)?;
        self.read += raw.len() as u64;
        let entries = raw.chunks_exact(8).map(|e| e.try_into().map_or(0, u64::from_be_bytes));
        self.window = (first, entries.collect());
        Ok(self.window.1.get((index - first) as usize).copied().unwrap_or(0))
    }

    /// How many bits chunk `index` has.
    fn bits_in(&self, index: u64) -> u64 {
        self.bits.saturating_sub(index << CHUNK_BITS).min(1 << CHUNK_BITS)
    }

    /// Look at chunk `index`. Of a mixed one `words` are the bits, none set past the end.
    pub fn chunk(&mut self, index: u64) -> Result<Found> {
        let mut found = self.base_chunk(index)?;
        let bits = self.bits_in(index);
        for marks in &self.marks {
            found = match (found, marks.add_to(index, &mut self.words)) {
                (Found::Ones, _) | (_, Found::Ones) => Found::Ones,
                (found, Found::Zeroes) => found,
                _ => Found::Mixed,
            };
        }
        if found == Found::Mixed {
            cut(&mut self.words, bits);
        }
        Ok(found)
    }

    /// What the file has of chunk `index`, with what does not count taken away.
    fn base_chunk(&mut self, index: u64) -> Result<Found> {
        self.words.fill(0);
        let start = index << CHUNK_BITS;
        let counts = self.base.saturating_sub(start).min(1 << CHUNK_BITS);
        if counts == 0 {
            return Ok(Found::Zeroes);
        }
        let cluster = self.image.cluster_size();
        let (at, end) = (index * PIECE, index * PIECE + counts.div_ceil(8));
        let (mut zeroes, mut ones) = (true, true);
        let mut bytes = [0; PIECE as usize];
        let mut from = at;
        while from < end {
            let next = (from - from % cluster + cluster).min(at + PIECE);
            let entry = self.entry(from / cluster)?;
            let part = bytes.get_mut((from - at) as usize..(next - at) as usize);
            let part = part.unwrap_or_default();
            match entry {
                0 => ones = false,
                ALL_ONES => {
                    zeroes = false;
                    part.fill(0xff);
                }
                entry => {
                    (zeroes, ones) = (false, false);
                    self.image.file.read_slice(part, (entry & OFFSET) + from % cluster)?;
                    self.read += part.len() as u64;
                }
            }
            from = next;
        }
        if zeroes {
            return Ok(Found::Zeroes);
        }
        for (word, bytes) in self.words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = bytes.try_into().map_or(0, u64::from_le_bytes);
        }
        if ones && counts == self.bits_in(index) {
            return Ok(Found::Ones);
        }
        cut(&mut self.words, counts);
        Ok(Found::Mixed)
    }

    /// What the last chunk that was looked at holds, as it is in a file: of `found`.
    pub fn bytes(&self, index: u64, found: Found, out: &mut [u8]) {
        match found {
            Found::Zeroes => out.fill(0),
            Found::Mixed => fill(&self.words, out),
            Found::Ones => {
                let mut words = [u64::MAX; WORDS];
                cut(&mut words, self.bits_in(index));
                fill(&words, out);
            }
        }
    }

    /// Set in `marks`, which are for a disk of `size` bytes, what is set here.
    pub fn add_to(&mut self, marks: &Marks, size: u64) -> Result<()> {
        if marks.granularity_bits() == self.granularity_bits {
            for index in 0..self.bits.div_ceil(1 << CHUNK_BITS) {
                let found = self.chunk(index)?;
                marks.add(index, found, &self.words);
            }
            return Ok(());
        }
        let mut at = 0;
        self.runs(0, size, |len, dirty| {
            if dirty {
                marks.set(at, len);
            }
            at += len;
            true
        })
    }

    /// The runs of a range of the disk that are alike, from `offset` on: bytes, and whether they are
    /// dirty. Neighbours alternate. `each` answers whether to go on.
    pub fn runs(
        &mut self,
        offset: u64,
        count: u64,
        mut each: impl FnMut(u64, bool) -> bool,
    ) -> Result<()> {
        let end = offset.saturating_add(count);
        let (mut at, mut run) = (offset, None::<(u64, bool)>);
        while at < end {
            let bit = at >> self.granularity_bits;
            let index = bit >> CHUNK_BITS;
            let found = self.chunk(index)?;
            let chunk_end = (index + 1) << CHUNK_BITS;
            let mut bit = bit;
            while bit < chunk_end && at < end {
                let (next, dirty) = match found {
                    Found::Zeroes => (chunk_end, false),
                    Found::Ones => (chunk_end, true),
                    Found::Mixed => {
                        let i = (bit % (1 << CHUNK_BITS)) as usize;
                        let (n, set) = stretch(&self.words, i);
                        (bit + n as u64, set)
                    }
                };
                // The end of the last granule may lie past all that there can be.
                let to = u128::from(next) << self.granularity_bits;
                let to = u64::try_from(to).unwrap_or(u64::MAX).min(end);
                run = match run {
                    Some((len, was)) if was == dirty => Some((len + (to - at), was)),
                    Some((len, was)) => {
                        if !each(len, was) {
                            return Ok(());
                        }
                        Some((to - at, dirty))
                    }
                    None => Some((to - at, dirty)),
                };
                (at, bit) = (to, next);
            }
        }
        if let Some((len, dirty)) = run {
            each(len, dirty);
        }
        Ok(())
    }

    /// How many bytes of a disk of `size` bytes are dirty; `None` if more than `limit` bytes would have
    /// to be read to know.
    pub fn dirty_bytes(&mut self, size: u64, limit: u64) -> Result<Option<u64>> {
        let (mut count, mut last) = (0, false);
        for index in 0..self.bits.div_ceil(1 << CHUNK_BITS) {
            if self.read > limit {
                return Ok(None);
            }
            self.read += LOOK;
            let (found, bits) = (self.chunk(index)?, self.bits_in(index));
            let at = bits.saturating_sub(1);
            (count, last) = match found {
                Found::Zeroes => (count, false),
                Found::Ones => (count + bits, true),
                Found::Mixed => {
                    let set: u64 = self.words.iter().map(|w| u64::from(w.count_ones())).sum();
                    let word = self.words.get(at as usize / 64).copied().unwrap_or(0);
                    (count + set, word >> (at % 64) & 1 != 0)
                }
            };
        }
        // The last granule may reach past the end of the disk.
        let beyond =
            (u128::from(self.bits) << self.granularity_bits).saturating_sub(u128::from(size));
        let bytes = u128::from(count) << self.granularity_bits;
        let bytes = if last { bytes.saturating_sub(beyond) } else { bytes };
        Ok(Some(u64::try_from(bytes).unwrap_or(u64::MAX)))
    }
}

fn fill(words: &Words, out: &mut [u8]) {
    for (to, word) in out.chunks_mut(8).zip(words) {
        let bytes = word.to_le_bytes();
        to.copy_from_slice(bytes.get(..to.len()).unwrap_or_default());
    }
}

/// How many bits from bit `from` on are alike, up to the end of the words, and whether they are set.
fn stretch(words: &Words, from: usize) -> (usize, bool) {
    let bit = |i: usize| words.get(i / 64).is_some_and(|w| w >> (i % 64) & 1 != 0);
    let set = bit(from);
    let mut at = from;
    while let Some(word) = words.get(at / 64) {
        // Bits that are as the first are zeroes now.
        let rest = (if set { !word } else { *word }) >> (at % 64);
        if rest != 0 {
            return (at + rest.trailing_zeros() as usize - from, set);
        }
        at += 64 - at % 64;
    }
    (at - from, set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_end_where_bits_change() {
        let mut words = [0; WORDS];
        words[1] = 0xff00;
        words[2] = u64::MAX;
        assert_eq!(stretch(&words, 0), (72, false));
        assert_eq!(stretch(&words, 72), (8, true));
        assert_eq!(stretch(&words, 75), (5, true));
        assert_eq!(stretch(&words, 80), (48, false));
        assert_eq!(stretch(&words, 128), (64, true));
        assert_eq!(stretch(&words, 192), (WORDS * 64 - 192, false));
        cut(&mut words, 140);
        assert_eq!(stretch(&words, 128), (12, true));
        assert_eq!((words[1], words[3]), (0xff00, 0));
    }
}
