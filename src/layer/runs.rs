//! Which state the blocks of a device are in, kept as runs of blocks that are alike.

use std::collections::BTreeMap;

/// Runs of blocks with a state from 1 to 3; whatever is in no run has state 0. What it takes is in proportion
/// to the runs, not to the device.
#[derive(Default)]
pub(super) struct Runs {
    /// By their first block: where they end, and their state.
    map: BTreeMap<u64, (u64, u8)>,
    /// Blocks by state.
    counts: [u64; 4],
}

impl Runs {
    /// The state of block `from`, and where it changes, at the latest `to`.
    pub fn at(&self, from: u64, to: u64) -> (u8, u64) {
        if let Some((_, &(end, state))) = self.map.range(..=from).next_back()
            && end > from
        {
            return (state, end.min(to));
        }
        let next = self.map.range(from..).next().map_or(to, |(start, _)| *start);
        (0, next.min(to))
    }

    /// Put the blocks `from..to` into a state.
    pub fn set(&mut self, from: u64, to: u64, state: u8) {
        if from >= to {
            return;
        }
        let (mut from, mut to) = (from, to);
        let before = self.map.range(..from).next_back().map(|(s, r)| (*s, *r));
        if let Some((start, (end, was))) = before.filter(|b| b.1.0 > from) {
            self.map.insert(start, (from, was));
            if end > to {
                self.map.insert(to, (end, was));
            }
            self.uncount(was, end.min(to) - from);
        }
        while let Some((&start, &(end, was))) = self.map.range(from..to).next() {
            self.map.remove(&start);
            if end > to {
                self.map.insert(to, (end, was));
            }
            self.uncount(was, end.min(to) - start);
        }
        if state == 0 {
            return;
        }
        self.counts[usize::from(state & 3)] += to - from;
        let before = self.map.range(..from).next_back().map(|(s, r)| (*s, *r));
        if let Some((start, _)) = before.filter(|b| b.1 == (from, state)) {
            self.map.remove(&start);
            from = start;
        }
        if let Some(&(end, _)) = self.map.get(&to).filter(|after| after.1 == state) {
            self.map.remove(&to);
            to = end;
        }
        self.map.insert(from, (to, state));
    }

    fn uncount(&mut self, state: u8, blocks: u64) {
        let count = &mut self.counts[usize::from(state & 3)];
        *count = count.saturating_sub(blocks);
    }

    /// Blocks in a state other than 0.
    pub fn count(&self, state: u8) -> u64 {
        self.counts[usize::from(state & 3)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_what_single_blocks_would_be() {
        let (mut runs, mut model) = (Runs::default(), [0u8; 200]);
        let mut x = 1u64;
        for _ in 0..5000 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (from, len) = ((x >> 33) % 200, (x >> 45) % 30);
            let (to, state) = ((from + len).min(200), (x >> 60) as u8 % 4);
            runs.set(from, to, state);
            model[from as usize..to as usize].fill(state);
            let mut at = 0;
            while at < 200 {
                let (state, end) = runs.at(at, 200);
                assert!(end > at && model[at as usize..end as usize].iter().all(|s| *s == state));
                assert!(end == 200 || model[end as usize] != state, "neighbours are one run");
                at = end;
            }
            for state in 1..4 {
                let count = model.iter().filter(|s| **s == state).count() as u64;
                assert_eq!(runs.count(state), count);
            }
        }
    }
}
