//! What is referred to past the end of the file: refcounts that are made anew must not come to lie there,
//! and count those references that they make the file long enough for.
//!
//! An image that was cut off refers to all that it has lost. Clusters that follow one another and are
//! named equally often are therefore kept as one, and so is what is named again and again; what
//! remains is 32 bytes for each place apart from the others, twice that while it grows.

/// Kept one by one before they are put together.
const MIN_FULL: usize = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    /// Clusters, from the first to behind the last.
    from: u64,
    to: u64,
    /// How often each of them is referred to.
    times: u64,
    /// It is one thing, which is there as a whole or not at all; else clusters that are there each.
    one: bool,
    /// It ends within its last cluster, which then may be there in part.
    partial: bool,
}

/// The places past the end.
#[derive(Default)]
pub struct Beyond {
    any: bool,
    parts: Vec<Part>,
    /// So many of them before they are put together again.
    full: usize,
}

impl Beyond {
    /// Nothing is to be kept but that there is something.
    pub fn note(&mut self) {
        self.any = true;
    }

    /// `times` references to the bytes from `offset` to `end`.
    pub fn push(&mut self, offset: u64, end: u128, times: u64, bits: u32) {
        self.any = true;
        let size = 1u128 << bits;
        let new = Part {
            from: offset >> bits,
            to: end.div_ceil(size) as u64,
            times,
            one: end - u128::from(offset) != size || !end.is_multiple_of(size),
            partial: !end.is_multiple_of(size),
        };
        if let Some(last) = self.parts.last_mut()
            && follows(last, &new)
        {
            last.to = new.to;
            return;
        }
        if self.parts.len() >= self.full.max(MIN_FULL) {
            self.put_together();
            self.full = self.parts.len() * 2;
        }
        self.parts.push(new);
    }

    /// Whether there is something.
    pub fn any(&self) -> bool {
        self.any
    }

    fn put_together(&mut self) {
        self.parts.sort_unstable_by_key(|p| (p.one, p.partial, p.from, p.to));
        self.parts.dedup_by(|next, first| {
            let same = Part { times: first.times, ..*next } == *first;
            if same {
                first.times = first.times.saturating_add(next.times);
            }
            same
        });
        self.parts.dedup_by(|next, first| {
            let follows = follows(first, next);
            if follows {
                first.to = next.to;
            }
            follows
        });
    }

    /// The places in order: clusters, from the first to behind the last.
    pub fn in_order(&mut self) -> impl Iterator<Item = (u64, u64)> {
        self.parts.sort_unstable_by_key(|p| p.from);
        self.parts.iter().map(|p| (p.from, p.to))
    }

    /// What is no longer past the end in a file of `end` clusters: clusters, from the first to behind the
    /// last, and how often.
    pub fn reached(&self, end: u64) -> impl Iterator<Item = (u64, u64, u64)> {
        self.parts.iter().filter_map(move |p| {
            let to = match p.one {
                // (The last cluster may be there in part.)
                true if p.to - u64::from(p.partial) > end => return None,
                true => p.to,
                false => p.to.min(end),
            };
            (p.from < to).then_some((p.from, to, p.times))
        })
    }
}

/// Whether `next` goes on where `first` ends.
fn follows(first: &Part, next: &Part) -> bool {
    !first.one && !next.one && first.to == next.from && first.times == next.times
}

#[cfg(test)]
mod tests {
    use super::*;

    const BITS: u32 = 9;

    fn push(beyond: &mut Beyond, offset: u64, len: u64, times: u64) {
        beyond.push(offset, u128::from(offset + len), times, BITS);
    }

    #[test]
    fn clusters_that_follow_one_another_take_no_more_than_one() {
        let mut beyond = Beyond::default();
        assert!(!beyond.any());
        // Backwards, twice, and some of it again and again.
        for cluster in (1000..400_000).rev().chain(1000..400_000) {
            push(&mut beyond, cluster << BITS, 512, 1);
            assert!(beyond.parts.len() <= MIN_FULL);
        }
        for _ in 0..200_000 {
            push(&mut beyond, 7000 << BITS, 1024, 1);
            assert!(beyond.parts.len() <= MIN_FULL + 1);
        }
        assert!(beyond.any());
        let mut at = 1000;
        for (from, to) in beyond.in_order() {
            assert!(from <= at, "nothing is left out before {from}");
            at = at.max(to);
        }
        assert_eq!(at, 400_000);
        let count = |cluster: u64| -> u64 {
            let all = beyond.reached(350_000);
            all.filter(|p| (p.0..p.1).contains(&cluster)).map(|p| p.2).sum()
        };
        assert_eq!([999, 1000, 6999, 7001, 349_999, 350_000].map(count), [0, 2, 2, 200_002, 2, 0]);
    }

    #[test]
    fn what_is_one_thing_is_reached_as_a_whole() {
        let mut beyond = Beyond::default();
        push(&mut beyond, 10 << BITS, 3 * 512, 1);
        push(&mut beyond, 20 << BITS, 512 + 100, 5);
        let reached = |end| beyond.reached(end).collect::<Vec<_>>();
        assert_eq!(reached(12), []);
        assert_eq!(reached(13), [(10, 13, 1)]);
        assert_eq!(reached(20), [(10, 13, 1)]);
        // A cluster that the file has in part counts.
        assert_eq!(reached(21), [(10, 13, 1), (20, 22, 5)]);
    }
}
