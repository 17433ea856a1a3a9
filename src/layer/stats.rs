//! `stats`: how many calls, of how many bytes, and how long they took.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Seek, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use super::around::{Around, Call, What};
use super::*;
use crate::log::{Level, log};

pub(super) const KIND: Kind = Kind {
    name: "stats",
    about: "count calls, bytes and errors, and how long calls take: properties stats.…",
    keys: &[("file", "a file that they are written to at the end")],
    writes_below: always,
    open,
};

/// Times are counted in buckets, four to each doubling.
const FINE: u64 = 4;
const FINE_BITS: u32 = FINE.trailing_zeros();
const BUCKETS: usize = FINE as usize * (65 - FINE_BITS as usize);

/// Of one kind of calls.
struct Counts {
    bytes: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
    max: AtomicU64,
    /// How many calls took so long; see [`bucket`].
    times: [AtomicU64; BUCKETS],
}

struct Stats {
    next: Device,
    began: Instant,
    /// By [`Call`].
    counts: Box<[Counts; Call::COUNT]>,
    file: Option<(File, Name)>,
    written: AtomicBool,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    // What can not be written is better known before than when all has been counted.
    let path = around::path(settings, "file")?;
    let file = path.map(|path| around::file(KIND.name, &path, false)).transpose()?;
    let next = source.open(write)?;
    let counts = Box::new(std::array::from_fn(|_| Counts::new()));
    let (began, written) = (Instant::now(), AtomicBool::new(false));
    Ok(around::boxed(Stats { next, began, counts, file, written }))
}

fn bucket(value: u64) -> usize {
    if value < FINE {
        return value as usize;
    }
    let doubling = value.ilog2() - FINE_BITS;
    let place = (value >> doubling) as usize - FINE as usize;
    (doubling as usize + 1) * FINE as usize + place
}

/// The largest time that is counted in a bucket.
fn longest(bucket: usize) -> u64 {
    let (doubling, place) = (bucket / FINE as usize, bucket % FINE as usize);
    let Some(doubling) = doubling.checked_sub(1) else { return bucket as u64 };
    let next = (u128::from(FINE) + place as u128 + 1) << doubling;
    (next - 1).min(u64::MAX.into()) as u64
}

impl Counts {
    fn new() -> Self {
        Self {
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
            max: AtomicU64::new(0),
            times: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    fn add(&self, bytes: Option<u64>, nanoseconds: u64) {
        match bytes {
            Some(bytes) => drop(self.bytes.fetch_add(bytes, Relaxed)),
            None => drop(self.errors.fetch_add(1, Relaxed)),
        }
        self.nanoseconds.fetch_add(nanoseconds, Relaxed);
        if self.max.load(Relaxed) < nanoseconds {
            self.max.fetch_max(nanoseconds, Relaxed);
        }
        if let Some(n) = self.times.get(bucket(nanoseconds)) {
            n.fetch_add(1, Relaxed);
        }
    }

    /// What is told of them, in the order of [`NAMES`].
    fn told(&self) -> [String; FIELDS] {
        let times: Vec<u64> = self.times.iter().map(|n| n.load(Relaxed)).collect();
        let count: u64 = times.iter().sum();
        let max = self.max.load(Relaxed);
        let percentile = |thousandths: u64| {
            let rank = (u128::from(count) * u128::from(thousandths)).div_ceil(1000).max(1);
            let mut seen = 0;
            let reached = |n: &u64| {
                seen += u128::from(*n);
                seen >= rank
            };
            times.iter().position(reached).map_or(0, |i| longest(i).min(max)).to_string()
        };
        let mut histogram = String::new();
        for (i, n) in times.iter().enumerate().filter(|t| *t.1 > 0) {
            let space = if histogram.is_empty() { "" } else { " " };
            // Writing into a string does not fail.
            let _ = write!(histogram, "{space}{}:{n}", longest(i));
        }
        [
            count.to_string(),
            self.bytes.load(Relaxed).to_string(),
            self.errors.load(Relaxed).to_string(),
            (self.nanoseconds.load(Relaxed) / count.max(1)).to_string(),
            percentile(500),
            percentile(900),
            percentile(990),
            percentile(999),
            max.to_string(),
            histogram,
        ]
    }
}

/// What is told of each kind of calls.
const FIELDS: usize = 10;

macro_rules! names {
    ($($call:literal),+) => {
        [$([
            concat!("stats.", $call, ".count"),
            concat!("stats.", $call, ".bytes"),
            concat!("stats.", $call, ".errors"),
            concat!("stats.", $call, ".mean-ns"),
            concat!("stats.", $call, ".p50-ns"),
            concat!("stats.", $call, ".p90-ns"),
            concat!("stats.", $call, ".p99-ns"),
            concat!("stats.", $call, ".p99.9-ns"),
            concat!("stats.", $call, ".max-ns"),
            concat!("stats.", $call, ".histogram-ns"),
        ]),+]
    };
}

/// By [`Call`]: their properties.
const NAMES: [[&str; FIELDS]; Call::COUNT] =
    names!("read", "write", "zero", "trim", "flush", "cache", "extents");

impl Stats {
    fn told(&self) -> Vec<(&'static str, Vec<u8>)> {
        let seconds = format!("{:.3}", self.began.elapsed().as_secs_f64());
        let mut all = vec![("stats.seconds", seconds.into_bytes())];
        for (names, counts) in NAMES.iter().zip(self.counts.iter()) {
            all.extend(names.iter().copied().zip(counts.told().map(String::into_bytes)));
        }
        all
    }

    fn count(&self, what: What, began: Instant, good: bool) {
        let nanoseconds = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counts[what.call as usize].add(good.then_some(what.count), nanoseconds);
    }

    fn write(&self) -> Result<()> {
        let Some((file, name)) = &self.file else { return Ok(()) };
        if self.written.swap(true, Relaxed) {
            return Ok(());
        }
        let mut text = Vec::new();
        for (key, value) in self.told() {
            text.extend([key.as_bytes(), b"=", &value, b"\n"].concat());
        }
        let mut file = file;
        file.rewind()
            .and_then(|()| file.write_all(&text))
            .and_then(|()| file.set_len(text.len() as u64))
            .map_err(|e| around::file_error(KIND.name, "write", name, &e))
    }
}

impl Drop for Stats {
    fn drop(&mut self) {
        // Of a device that was only read nobody is asked for last words before.
        if let Err(e) = self.write() {
            log(Level::Warn, format_args!("{e}"));
        }
    }
}

impl Around for Stats {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn around(&self, what: What, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let began = Instant::now();
        let result = work();
        self.count(what, began, result.is_ok());
        result
    }
    fn at_once(&self, what: What, work: impl FnOnce() -> Result<bool>) -> Result<bool> {
        let began = Instant::now();
        let result = work();
        // One that would wait is made again as a usual read.
        if !matches!(result, Ok(false)) {
            self.count(what, began, result.is_ok());
        }
        result
    }
    fn end(&self) -> Result<()> {
        self.write()
    }
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        self.told()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_falls_in_a_bucket_near_it() {
        let mut before = None;
        for i in 0..BUCKETS {
            let t = longest(i);
            assert_eq!(bucket(t), i);
            assert!(before.is_none_or(|b| b < t), "{t}");
            before = Some(t);
        }
        assert_eq!(before, Some(u64::MAX));
        for (name, call) in NAMES.iter().zip(Call::ALL) {
            assert!(name.iter().all(|n| n.split('.').nth(1) == Some(call.1)), "{name:?}");
        }
    }

    #[test]
    fn counts_are_told() {
        let counts = Counts::new();
        for i in 1..=1000 {
            counts.add(if i % 10 == 0 { None } else { Some(3) }, i * 1000);
        }
        let told = counts.told();
        assert_eq!(told[..4], ["1000", "2700", "100", "500500"]);
        for (found, expected) in told[4..8].iter().zip([500_000, 900_000, 990_000, 999_000]) {
            let found: u64 = found.parse().unwrap();
            assert!(found >= expected && found - expected <= expected / 4, "{found} {expected}");
        }
        assert_eq!(told[8], "1000000");
        let all: u64 =
            told[9].split(' ').map(|t| t.split_once(':').unwrap().1.parse::<u64>().unwrap()).sum();
        assert_eq!(all, 1000);
        let none = Counts::new().told();
        assert!(none[..9].iter().all(|n| n == "0") && none[9].is_empty());
    }
}
