//! Which bytes of a read have come: every byte exactly once, or the reply is not believed.
//!
//! A count of bytes is not enough: a server that sends one half twice and the other never has sent
//! the right number of them.

/// How many runs that touch no other a reply may have at a time. A server sends the chunks of one
/// read in order, or a few threads of it do; this is far beyond either.
const MAX_RUNS: usize = 1024;

/// The bytes of one request that were received, as offsets within it.
#[derive(Default)]
pub(super) struct Cover {
    /// All bytes before this one: what comes in order stays here and costs nothing.
    prefix: u64,
    /// Runs behind the prefix, sorted, that neither touch each other nor it. Kept from request to
    /// request for its memory.
    runs: Vec<(u64, u64)>,
}

/// Why a chunk is not believed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Some of its bytes have come before.
    Overlap,
    /// The reply is in too many pieces.
    Pieces,
}

impl Cover {
    /// Nothing has come.
    pub(super) fn clear(&mut self) {
        self.prefix = 0;
        self.runs.clear();
    }

    /// Take note of bytes `from..to`, of which there is at least one.
    pub(super) fn add(&mut self, from: u64, to: u64) -> Result<(), Refused> {
        if from == self.prefix && self.runs.is_empty() {
            self.prefix = to;
            return Ok(());
        }
        if from < self.prefix {
            return Err(Refused::Overlap);
        }
        // The first run that begins behind `from`.
        let at = self.runs.partition_point(|r| r.0 <= from);
        let before = at.checked_sub(1).and_then(|i| self.runs.get(i).copied());
        let after = self.runs.get(at).copied();
        if before.is_some_and(|r| r.1 > from) || after.is_some_and(|r| r.0 < to) {
            return Err(Refused::Overlap);
        }
        let (joins_before, joins_after) =
            (before.is_some_and(|r| r.1 == from), after.is_some_and(|r| r.0 == to));
        let start = if joins_before { before.map_or(from, |r| r.0) } else { from };
        let end = if joins_after { after.map_or(to, |r| r.1) } else { to };
        let first = at - usize::from(joins_before);
        let last = at + usize::from(joins_after);
        if start == self.prefix {
            // Sorted and apart: nothing can lie between the prefix and this run.
            self.prefix = end;
            self.runs.drain(first..last);
        } else if first < last {
            self.runs.splice(first..last, [(start, end)]);
        } else if self.runs.len() < MAX_RUNS {
            self.runs.insert(at, (start, end));
        } else {
            return Err(Refused::Pieces);
        }
        Ok(())
    }

    /// The first byte of `length` that did not come.
    pub(super) fn missing(&self, length: u64) -> Option<u64> {
        (self.prefix < length).then_some(self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_any_order_cover_the_whole_once() {
        // A small generator: the order of pieces differs by seed, the outcome does not.
        for seed in 1..200u64 {
            let (mut x, mut pieces, mut at) = (seed, Vec::new(), 0);
            while at < 1000 {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let to = (at + 1 + (x >> 33) % 90).min(1000);
                pieces.push((at, to));
                at = to;
            }
            for i in (1..pieces.len()).rev() {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                pieces.swap(i, (x >> 33) as usize % (i + 1));
            }
            let mut c = Cover::default();
            for (i, &(from, to)) in pieces.iter().enumerate() {
                assert!(c.missing(1000).is_some());
                c.add(from, to).unwrap();
                for &(f, t) in &pieces[..=i] {
                    assert_eq!(c.add(f, t), Err(Refused::Overlap), "{f}..{t} again");
                    assert_eq!(c.add(f, f + 1), Err(Refused::Overlap));
                    assert_eq!(c.add(t - 1, t + 1), Err(Refused::Overlap));
                }
            }
            assert_eq!(c.missing(1000), None);
            assert!(c.runs.is_empty());
        }
    }

    #[test]
    fn a_gap_is_named_and_pieces_are_bounded() {
        let mut c = Cover::default();
        c.add(0, 10).unwrap();
        c.add(20, 30).unwrap();
        assert_eq!(c.missing(30), Some(10));
        c.clear();
        for i in 0..MAX_RUNS as u64 {
            c.add(1 + 2 * i, 2 + 2 * i).unwrap();
        }
        assert_eq!(c.add(5000, 5001), Err(Refused::Pieces));
        // What joins others needs no room.
        c.add(2, 3).unwrap();
    }
}
