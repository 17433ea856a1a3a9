//! Times, counted so that percentiles cost nothing while measuring and are right to 2 %.

/// Buckets in each doubling.
const FINE: usize = 64;
const FINE_BITS: u32 = FINE.trailing_zeros();

/// How often each time, in nanoseconds, was seen.
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    max: u64,
    sum: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; FINE * (65 - FINE_BITS as usize)], count: 0, max: 0, sum: 0 }
    }
}

fn bucket(value: u64) -> usize {
    if value < FINE as u64 {
        return value as usize;
    }
    let doubling = value.ilog2() - FINE_BITS;
    let place = (value >> doubling) as usize - FINE;
    (doubling as usize + 1) * FINE + place
}

/// The largest value that falls into a bucket.
fn top(bucket: usize) -> u64 {
    if bucket < FINE {
        return bucket as u64;
    }
    let (doubling, place) = (bucket / FINE - 1, bucket % FINE);
    let next = ((FINE + place + 1) as u128) << doubling;
    (next - 1).min(u64::MAX.into()) as u64
}

impl Histogram {
    /// Count a time.
    pub fn add(&mut self, nanoseconds: u64) {
        self.buckets[bucket(nanoseconds)] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(nanoseconds);
        self.max = self.max.max(nanoseconds);
    }

    /// Count all of another's.
    pub fn merge(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(a, b)| *a += b);
        self.count += other.count;
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest, exactly.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The average.
    pub fn mean(&self) -> u64 {
        self.sum / self.count.max(1)
    }

    /// The time that `percent` per cent did not exceed.
    pub fn percentile(&self, percent: f64) -> u64 {
        let rank = (self.count as f64 * percent / 100.0).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return top(i).min(self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_falls_in_a_bucket_near_it() {
        for shift in 0..64 {
            for value in
                [1u64 << shift, (1u64 << shift) + (1u64 << shift) / 3, u64::MAX >> (63 - shift)]
            {
                let t = top(bucket(value));
                assert!(t >= value && t - value <= value / 32, "{value}: {t}");
            }
        }
        assert_eq!(top(bucket(u64::MAX)), u64::MAX);
    }

    #[test]
    fn percentiles_are_where_they_should_be() {
        let mut h = Histogram::default();
        (1..=1000).for_each(|i| h.add(i * 1000));
        for (percent, expected) in [(50.0, 500_000), (99.0, 990_000), (99.9, 999_000)] {
            let found = h.percentile(percent);
            assert!(found.abs_diff(expected) <= expected / 32, "{percent}: {found}");
        }
        assert_eq!((h.percentile(100.0), h.max(), h.count()), (1_000_000, 1_000_000, 1000));
    }
}
