//! Numbers that look random, the same from the same seed, for any number of threads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::Settings;
use crate::block::Result;

/// SplitMix64.
pub(super) struct Random(AtomicU64);

impl Random {
    /// From the seed that `key` sets, or another one each time.
    pub(super) fn setting(settings: &Settings, key: &str) -> Result<Self> {
        let seed = match settings.number(key, 0..=u64::MAX)? {
            Some(seed) => seed,
            None => {
                let mut some = [0; 8];
                // Any number will do where there are none to be had.
                let _ = getrandom::fill(&mut some);
                u64::from_ne_bytes(some)
            }
        };
        Ok(Self(AtomicU64::new(seed)))
    }

    fn next(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.0.fetch_add(STEP, Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 up to, not including, 1.
    pub(super) fn unit(&self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
