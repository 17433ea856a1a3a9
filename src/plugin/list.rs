//! What a plugin is asked to describe, gathered while it is called.

use crate::block::Extent;

/// Extents of one call, kept at most.
const MOST: usize = 4096;

/// The extents of a range, as a callback adds them.
pub struct ExtentsList {
    /// Where the next one begins.
    next: u64,
    /// What was asked for: whole blocks, from here on.
    asked: u64,
    /// The range that is of interest.
    from: u64,
    to: u64,
    /// Bytes of a block.
    block: u64,
    found: Vec<Extent>,
    wrong: Option<String>,
}

impl ExtentsList {
    /// For a callback that is asked in blocks of `block` bytes, from that of `from` on; of interest is
    /// `from..to`.
    pub fn new(block: u64, from: u64, to: u64) -> Self {
        let asked = from - from % block;
        Self { next: asked, asked, from, to, block, found: Vec::new(), wrong: None }
    }

    /// Add an extent. The error says what is wrong with it.
    pub fn add(&mut self, offset: u64, length: u64, flags: u32) -> Result<(), String> {
        if let Some(wrong) = &self.wrong {
            return Err(wrong.clone());
        }
        let known = Extent::ALLOCATED | Extent::ZERO | Extent::DATA;
        let end = offset.checked_add(length).filter(|_| length > 0);
        let wrong = match end {
            None => format!("an extent of {length} bytes at offset {offset}"),
            Some(_) if flags & !known != 0 => {
                format!(
                    "flags {flags:#x} of the extent at offset {offset}, expected {known:#x} at most"
                )
            }
            // The first may begin before what was asked for.
            Some(end) if self.found.is_empty() && offset <= self.next && end <= self.next => {
                return Ok(());
            }
            Some(_) if offset > self.next || (offset < self.next && !self.found.is_empty()) => {
                format!("an extent at offset {offset}, expected one at {}", self.next)
            }
            Some(end) => {
                self.keep(end, flags);
                return Ok(());
            }
        };
        self.wrong = Some(wrong.clone());
        Err(wrong)
    }

    fn keep(&mut self, end: u64, flags: u32) {
        let (begin, cut) = (self.next.max(self.from), end.min(self.to));
        if begin < cut && self.found.len() < MOST {
            let kind = match flags & (Extent::ZERO | Extent::DATA) {
                0 => Extent::DATA,
                kind => kind,
            };
            self.found.push(Extent::new(
                begin,
                cut - begin,
                kind | Extent::ALLOCATED | Extent::OWNED,
            ));
        }
        self.next = end;
    }

    /// What was found: at least one, from the beginning of the range on.
    pub fn finish(self) -> Result<Vec<Extent>, String> {
        match (self.wrong, self.found.is_empty()) {
            (Some(wrong), _) => Err(wrong),
            (None, false) => Ok(self.found),
            // It stopped short of the range, within the block that the range begins in: of the rest of
            // that block nothing is known, and asking again would bring the same.
            (None, true) if self.next > self.asked => {
                let end = self.asked.saturating_add(self.block).min(self.to);
                let flags = Extent::DATA | Extent::ALLOCATED | Extent::OWNED;
                Ok(vec![Extent::new(self.from, end - self.from, flags)])
            }
            (None, true) => Err("nothing was described".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(list: ExtentsList) -> Vec<(u64, u64, u32)> {
        let found = list.finish().unwrap();
        found
            .iter()
            .map(|e| (e.offset, e.length, e.flags & (Extent::ZERO | Extent::DATA)))
            .collect()
    }

    #[test]
    fn what_surrounds_the_range_is_cut_off() {
        let mut list = ExtentsList::new(512, 600, 2000);
        list.add(0, 400, Extent::DATA).unwrap();
        list.add(400, 700, Extent::ZERO).unwrap();
        list.add(1100, 5000, 0).unwrap();
        list.add(6100, 100, Extent::ZERO).unwrap();
        assert_eq!(spans(list), [(600, 500, Extent::ZERO), (1100, 900, Extent::DATA)]);
    }

    #[test]
    fn a_description_that_ends_before_the_range_is_a_short_one() {
        for (to, length) in [(9000, 4096 - 600), (700, 100)] {
            let mut list = ExtentsList::new(4096, 600, to);
            list.add(0, 512, Extent::ZERO).unwrap();
            assert_eq!(spans(list), [(600, length, Extent::DATA)]);
        }
        // What lies before all that was asked for is no description.
        let mut list = ExtentsList::new(4096, 5000, 9000);
        list.add(0, 4096, Extent::ZERO).unwrap();
        assert!(list.finish().is_err());
    }

    #[test]
    fn gaps_overlaps_and_nonsense_are_errors_that_stay() {
        let new = || ExtentsList::new(1, 0, 4096);
        for bad in [(1, 10, 0), (0, 0, 0), (0, u64::MAX, 64), (u64::MAX, 2, 0)] {
            let mut list = new();
            assert!(list.add(bad.0, bad.1, bad.2).is_err(), "{bad:?}");
            assert!(list.add(0, 4096, 0).is_err());
            assert!(list.finish().is_err());
        }
        for second in [5, 11] {
            let mut list = new();
            list.add(0, 10, 0).unwrap();
            assert!(list.add(second, 10, 0).unwrap_err().contains("expected one at 10"));
        }
        assert!(new().finish().is_err());
    }
}
