//! `qblk bench`: how fast an image is read or written through the library.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use qblk::block::quoted;
use qblk::{Image, OpenFlags, ReqFlags};
use serde_json::{Map, Value, json};

use crate::cli::{BenchArgs, Pattern};
use crate::failure::{Failure, Result};
use crate::histogram::Histogram;
use crate::json;
use crate::signals;
use crate::units::{human, shown};

/// What memory is aligned to, for direct I/O.
const ALIGN: usize = 4096;

/// What all threads share.
struct Plan<'a> {
    args: &'a BenchArgs,
    image: &'a Image,
    /// Begin of the range, and blocks in it.
    offset: u64,
    blocks: u64,
    until: Duration,
    /// Requests left to begin, of all threads.
    left: AtomicU64,
    stop: AtomicBool,
    start: Barrier,
}

/// What one thread, or all, measured.
#[derive(Default)]
struct Measured {
    requests: Histogram,
    flushes: Histogram,
}

pub fn run(args: &BenchArgs) -> Result<()> {
    signals::catch();
    let write = if args.write { OpenFlags::RDWR } else { OpenFlags::default() };
    let image = args.open.open(&args.image, write)?;
    let size = image.size()?;
    let length = args.length.unwrap_or(size.saturating_sub(args.offset));
    if args.offset.checked_add(length).is_none_or(|end| end > size) {
        let (file, offset) = (args.image.clone().into(), args.offset);
        return Err(qblk::Error::Range { file, offset, count: length, size }.into());
    }
    let blocks = length / args.block_size;
    if blocks == 0 {
        return Err(Failure::said(format!(
            "{}: {length} bytes from offset {} on do not hold one block of {} bytes",
            quoted(args.image.as_bytes()),
            args.offset,
            args.block_size
        )));
    }
    let plan = Plan {
        args,
        image: &image,
        offset: args.offset,
        blocks,
        until: match (args.seconds, args.count) {
            (Some(seconds), _) => Duration::from_secs_f64(seconds),
            (None, Some(_)) => Duration::MAX,
            (None, None) => Duration::from_secs(5),
        },
        left: AtomicU64::new(args.count.unwrap_or(u64::MAX)),
        stop: AtomicBool::new(false),
        start: Barrier::new(args.threads as usize + 1),
    };
    let (measured, elapsed) = plan.run()?;
    let flush = Instant::now();
    if args.write {
        image.flush()?;
    }
    let flush = flush.elapsed();
    image.close()?;
    tell(args, &measured, elapsed, flush)?;
    match signals::asked_to_end() {
        Some(signal) => Err(Failure::Signal(signal, Some("measured until then".into()))),
        None => Ok(()),
    }
}

impl Plan<'_> {
    fn run(&self) -> Result<(Measured, Duration)> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.args.threads)
                .map(|i| scope.spawn(move || self.thread(i.into())))
                .collect();
            self.start.wait();
            let begun = Instant::now();
            let mut all = Measured::default();
            let mut failure = None;
            for thread in threads {
                match thread.join() {
                    Ok(Ok(one)) => {
                        all.requests.merge(&one.requests);
                        all.flushes.merge(&one.flushes);
                    }
                    Ok(Err(e)) => drop(failure.get_or_insert(e)),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            match failure {
                Some(e) => Err(e),
                None => Ok((all, begun.elapsed())),
            }
        })
    }

    fn thread(&self, number: u64) -> Result<Measured> {
        let size = self.args.block_size as usize;
        let mut memory = vec![0x5a; size + ALIGN];
        let skip = memory.as_ptr().align_offset(ALIGN);
        let buf = &mut memory[skip..skip + size];
        let mut measured = Measured::default();
        let mut random =
            Random(self.args.seed.wrapping_add(number).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        // One after another, each thread begins in its own part.
        let mut next = self.blocks / u64::from(self.args.threads) * number;
        let mut unflushed = 0;
        self.start.wait();
        let begun = Instant::now();
        let mut before = begun;
        while !self.stop.load(Relaxed) && self.take_one() {
            let block = match self.args.pattern {
                Pattern::Random => random.below(self.blocks),
                Pattern::Sequential => {
                    let block = next;
                    next = (next + 1) % self.blocks;
                    block
                }
            };
            let offset = self.offset + block * self.args.block_size;
            let result = match self.args.write {
                true => self.image.write_at(buf, offset, ReqFlags::NONE),
                false => self.image.read_at(buf, offset),
            };
            let mut now = Instant::now();
            if let Err(e) = result {
                self.stop.store(true, Relaxed);
                return Err(e.into());
            }
            measured.requests.add((now - before).as_nanos() as u64);
            unflushed += 1;
            if Some(unflushed) == self.args.flush_every {
                unflushed = 0;
                let before = now;
                if let Err(e) = self.image.flush() {
                    self.stop.store(true, Relaxed);
                    return Err(e.into());
                }
                now = Instant::now();
                measured.flushes.add((now - before).as_nanos() as u64);
            }
            if now - begun >= self.until || signals::asked_to_end().is_some() {
                self.stop.store(true, Relaxed);
            }
            before = now;
        }
        Ok(measured)
    }

    /// Take one of the requests that are left.
    fn take_one(&self) -> bool {
        if self.args.count.is_none() {
            return true;
        }
        self.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

/// SplitMix64: numbers that are random enough to defeat read-ahead.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((u128::from(z) * u128::from(limit)) >> 64) as u64
    }
}

/// Microseconds, with a digit where that says something.
fn micro(nanoseconds: u64) -> String {
    match nanoseconds {
        0..100_000 => format!("{:.1}", nanoseconds as f64 / 1e3),
        _ => format!("{:.0}", nanoseconds as f64 / 1e3),
    }
}

fn line(h: &Histogram) -> String {
    let [p50, p99, p999] = [50.0, 99.0, 99.9].map(|p| micro(h.percentile(p)));
    format!(
        "p50 {p50}, p99 {p99}, p99.9 {p999}, max {}, mean {} µs",
        micro(h.max()),
        micro(h.mean())
    )
}

fn latency(h: &Histogram) -> Value {
    json!({
        "count": h.count(),
        "p50_ns": h.percentile(50.0),
        "p99_ns": h.percentile(99.0),
        "p99_9_ns": h.percentile(99.9),
        "max_ns": h.max(),
        "mean_ns": h.mean(),
    })
}

fn tell(args: &BenchArgs, all: &Measured, elapsed: Duration, flush: Duration) -> Result<()> {
    let seconds = elapsed.as_secs_f64().max(1e-9);
    let requests = all.requests.count();
    let bytes = requests * args.block_size;
    let (iops, rate) = (requests as f64 / seconds, bytes as f64 / seconds);
    let what = if args.write { "write" } else { "read" };
    let pattern = match args.pattern {
        Pattern::Random => "random",
        Pattern::Sequential => "sequential",
    };
    if args.json {
        let mut object = Map::new();
        json::put_name(&mut object, "filename", args.image.as_bytes());
        object.extend([
            ("operation".into(), json!(what)),
            ("pattern".into(), json!(pattern)),
            ("block_size".into(), json!(args.block_size)),
            ("threads".into(), json!(args.threads)),
            ("requests".into(), json!(requests)),
            ("bytes".into(), json!(bytes)),
            ("seconds".into(), json!(seconds)),
            ("iops".into(), json!(iops)),
            ("bytes_per_second".into(), json!(rate)),
            ("latency".into(), latency(&all.requests)),
        ]);
        if args.write {
            object.insert("final_flush_seconds".into(), json!(flush.as_secs_f64()));
        }
        if all.flushes.count() > 0 {
            object.insert("flush_latency".into(), latency(&all.flushes));
        }
        return json::print(&object.into());
    }
    let mut out = std::io::stdout().lock();
    let threads =
        if args.threads == 1 { "1 thread".into() } else { format!("{} threads", args.threads) };
    writeln!(
        out,
        "{}: {pattern} {what}s of {}, {threads}, {seconds:.2} s",
        shown(&args.image),
        human(args.block_size)
    )?;
    writeln!(out, "requests:  {requests} ({iops:.0} a second, {:.1} MB/s)", rate / 1e6)?;
    writeln!(out, "latency:   {}", line(&all.requests))?;
    if all.flushes.count() > 0 {
        writeln!(out, "flushes:   {}; {}", all.flushes.count(), line(&all.flushes))?;
    }
    if args.write {
        writeln!(out, "the final flush took {:.3} s more", flush.as_secs_f64())?;
    }
    Ok(out.flush()?)
}
