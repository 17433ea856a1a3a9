//! Tables that may overlap, gone through once.
//!
//! Nothing keeps a hostile image from naming the same table a million times, or tables that lie half
//! over one another. What has been named is therefore collected first, and then each place in the file
//! is looked at once, for as many tables as lie over it: the time that this takes is bound by what the
//! file has, not by how often that is named.

use std::cell::OnceCell;

/// How often something is named: by the active image, and by all (the active one included).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// By the active image.
    pub active: u32,
    /// By all.
    pub all: u32,
}

impl Times {
    /// Once, by the active image or by a snapshot.
    pub fn once(active: bool) -> Self {
        Self { active: active.into(), all: 1 }
    }

    fn add(&mut self, other: Self) {
        self.active = self.active.saturating_add(other.active);
        self.all = self.all.saturating_add(other.all);
    }
}

/// Part of the file, under the same tables from end to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins, bytes.
    pub from: u64,
    /// Where it ends, bytes.
    pub to: u64,
    /// How many tables lie here.
    pub times: Times,
}

/// Ranges of the file with how often they are named, turned into parts that do not overlap.
pub fn segments(ranges: impl Iterator<Item = (u64, u64, Times)>) -> Vec<Segment> {
    let mut edges = Vec::new();
    for (from, to, times) in ranges.filter(|r| r.0 < r.1) {
        let (active, all) = (i64::from(times.active), i64::from(times.all));
        edges.push((from, active, all));
        edges.push((to, -active, -all));
    }
    edges.sort_unstable_by_key(|e| e.0);
    let mut out: Vec<Segment> = Vec::new();
    let (mut active, mut all, mut at) = (0i64, 0i64, 0);
    let cap = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
    for (edge, a, n) in edges {
        if edge > at && all > 0 {
            let times = Times { active: cap(active), all: cap(all) };
            out.push(Segment { from: at, to: edge, times });
        }
        at = edge;
        active += a;
        all += n;
    }
    out
}

/// Places in the file that are asked for, which may overlap.
#[derive(Default)]
pub struct Places {
    ranges: Vec<(u64, u64)>,
    /// In order and without overlaps; made when it is needed.
    ordered: OnceCell<Vec<Segment>>,
}

impl Places {
    /// From where to where, bytes.
    pub fn add(&mut self, range: (u64, u64)) {
        self.ranges.push(range);
        self.ordered = OnceCell::new();
    }

    /// Whether one of them has a byte in `from..to`.
    pub fn touch(&self, from: u64, to: u64) -> bool {
        let ordered = self
            .ordered
            .get_or_init(|| segments(self.ranges.iter().map(|r| (r.0, r.1, Times::once(false)))));
        let i = ordered.partition_point(|p| p.to <= from);
        ordered.get(i).is_some_and(|p| p.from < to)
    }
}

/// The tables of one kind that there are: all of the same length and aligned to it, or parts of such as
/// are not.
pub enum Plan {
    /// Offsets of tables, each once, in order.
    Tables { named: Vec<(u64, Times)>, len: u64 },
    /// Parts.
    Parts(Vec<Segment>),
}

impl Default for Plan {
    fn default() -> Self {
        Self::Parts(Vec::new())
    }
}

impl Plan {
    /// For tables of `len` bytes, named at these offsets, which are multiples of that.
    pub fn new(mut named: Vec<(u64, Times)>, len: u64) -> Self {
        named.sort_unstable_by_key(|n| n.0);
        named.dedup_by(|next, first| {
            let same = next.0 == first.0;
            if same {
                first.1.add(next.1);
            }
            same
        });
        Self::Tables { named, len }
    }

    /// These, and others of the same length that lie anywhere.
    pub fn with(&self, askew: &[(u64, Times)], len: u64) -> Self {
        let here = (0..self.len()).filter_map(|i| self.get(i)).map(|p| (p.from, p.to, p.times));
        let more = askew.iter().map(|(at, times)| (*at, at.saturating_add(len), *times));
        Self::Parts(segments(here.chain(more)))
    }

    /// How many parts.
    pub fn len(&self) -> usize {
        match self {
            Self::Tables { named, .. } => named.len(),
            Self::Parts(parts) => parts.len(),
        }
    }

    /// One of them.
    pub fn get(&self, i: usize) -> Option<Segment> {
        match self {
            Self::Tables { named, len } => {
                let (from, times) = *named.get(i)?;
                Some(Segment { from, to: from.saturating_add(*len), times })
            }
            Self::Parts(parts) => parts.get(i).copied(),
        }
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Tables { named, len } => named.len() as u64 * len,
            Self::Parts(parts) => parts.iter().map(|p| p.to - p.from).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_for_as_many_ranges_as_lie_over_them() {
        let (a, s) = (Times::once(true), Times::once(false));
        let both = Times { active: 1, all: 2 };
        let got = segments([(10, 20, a), (15, 30, s), (30, 40, s), (50, 50, s)].into_iter());
        let want = [(10, 15, a), (15, 20, both), (20, 30, s), (30, 40, s)];
        let want = want.map(|(from, to, times)| Segment { from, to, times });
        assert_eq!(got, want);
    }

    #[test]
    fn a_table_that_is_named_often_is_gone_through_once() {
        let named =
            vec![(64, Times::once(true)), (0, Times::once(false)), (64, Times::once(false))];
        let plan = Plan::new(named, 32);
        let both = Times { active: 1, all: 2 };
        assert_eq!((plan.len(), plan.bytes()), (2, 64));
        assert_eq!(plan.get(1), Some(Segment { from: 64, to: 96, times: both }));
        // Askew, they are cut where they overlap.
        let plan =
            Plan::new(vec![(64, Times::once(true))], 32).with(&[(80, Times::once(true))], 32);
        let times = |all| Times { active: all, all };
        let want = [(64, 80, 1), (80, 96, 2), (96, 112, 1)];
        let got: Vec<_> = (0..plan.len()).filter_map(|i| plan.get(i)).collect();
        assert_eq!(got, want.map(|(from, to, n)| Segment { from, to, times: times(n) }));
    }
}
