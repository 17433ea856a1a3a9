//! The work that is measured: a pattern of requests, driven against something that reads and writes.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::sync::Barrier;
use std::time::Instant;

use crate::load::Load;

/// What failed, in words. The bench ends with the first.
pub type Res<T> = Result<T, String>;

/// Something that can be read and written at offsets, by any number of threads.
pub trait Device: Sync {
    /// Fill `buf` from `offset` on.
    fn read(&self, buf: &mut [u8], offset: u64) -> Res<()>;
    /// Write `buf` at `offset`.
    fn write(&self, buf: &[u8], offset: u64) -> Res<()>;
    /// Make what was written survive a power cut.
    fn flush(&self) -> Res<()> {
        Err("does not flush".to_owned())
    }
}

/// Which offsets, in which order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// Any block of the device, at random.
    Random,
    /// One block after the other, round and round.
    Sequential,
    /// Steps of so many bytes around the device. `qemu-img bench` has no other way to be random.
    Walk(u64),
    /// The beginnings of pieces of so many bytes, at random.
    Pieces(u64),
}

/// One kind of work.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Bytes of one request.
    pub block: usize,
    /// Where the requests go.
    pub pattern: Pattern,
    /// Size of the device, bytes.
    pub size: u64,
    /// Write, not read.
    pub write: bool,
    /// Flush after each write.
    pub flush: bool,
    /// How many requests; `None` = as many as fit in the time of a sample.
    pub ops: Option<u64>,
    /// Requests before the clock starts, at least.
    pub warm: u64,
    /// Threads on one handle.
    pub threads: usize,
}

impl Work {
    /// Reads of `block` bytes until the time is up, by one thread.
    pub fn reads(block: usize, pattern: Pattern, size: u64) -> Self {
        Self { block, pattern, size, write: false, flush: false, ops: None, warm: 64, threads: 1 }
    }
    /// Writes of `block` bytes until the time is up, by one thread.
    pub fn writes(block: usize, pattern: Pattern, size: u64) -> Self {
        Self { write: true, ..Self::reads(block, pattern, size) }
    }
    /// `ops` requests exactly, the first of them measured too.
    pub fn exactly(self, ops: u64) -> Self {
        Self { ops: Some(ops), warm: 0, ..self }
    }
    /// Each followed by a flush.
    pub fn flushed(self) -> Self {
        Self { flush: true, ..self }
    }
    /// By `threads` threads on one handle.
    pub fn by(self, threads: usize) -> Self {
        Self { threads, ..self }
    }
    /// With `warm` requests before the clock starts.
    pub fn warmed(self, warm: u64) -> Self {
        Self { warm, ..self }
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// In the unit of the row: requests a second, or a time, or a size.
    pub value: f64,
    /// Processor time of one request, microseconds; 0 = has no meaning here.
    pub cpu_us: f64,
    /// Processors that others used meanwhile.
    pub foreign: f64,
}

/// Offsets of a pattern, one by one.
pub struct Offsets {
    pattern: Pattern,
    block: u64,
    size: u64,
    at: u64,
    random: u64,
}

impl Offsets {
    /// For the `thread`th of `work.threads`.
    pub fn new(work: &Work, thread: usize) -> Self {
        let block = work.block as u64;
        let share = work.size / work.threads as u64;
        let at = thread as u64 * (share - share % block);
        let random =
            (0x9e37_79b9_7f4a_7c15u64.wrapping_mul(2 * thread as u64 + 1)) ^ 88_172_645_463_325_252;
        Self { pattern: work.pattern, block, size: work.size, at, random }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// The next one.
    #[inline]
    pub fn next(&mut self) -> u64 {
        let step = match self.pattern {
            Pattern::Random => return self.random() % (self.size / self.block) * self.block,
            Pattern::Pieces(piece) => return self.random() % (self.size / piece) * piece,
            Pattern::Sequential => self.block,
            Pattern::Walk(step) => step,
        };
        let now = self.at;
        self.at = (now + step) % self.size;
        now
    }
}

/// An odd number of blocks, about 0.38 of the device: a walk in such steps meets every block once
/// before it meets one again, and two that follow each other are far apart.
pub fn golden_step(size: u64, block: u64) -> u64 {
    let blocks = (size as f64 * 0.381_966) as u64 / block;
    (blocks | 1) * block
}

/// Page-aligned memory, filled once so that no page of it is missing when the clock runs.
pub struct Buffer {
    base: *mut u8,
    len: usize,
}

// SAFETY: it owns its memory, as a Box does.
unsafe impl Send for Buffer {}

impl Buffer {
    /// `len` bytes, not 0.
    pub fn new(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout is not empty, and what is given is filled before it is used.
        let base = unsafe { alloc(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: `len` bytes were given.
        unsafe { base.write_bytes(0x5a, len) };
        Self { base, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), 4096).unwrap_or(Layout::new::<u8>())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: given by alloc with this layout.
        unsafe { dealloc(self.base, Self::layout(self.len)) };
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes, all written, ours.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }
}

/// Do `work` on `device` for `seconds`, or as many requests as it has, and measure.
pub fn drive(device: &dyn Device, work: &Work, seconds: f64) -> Res<Sample> {
    // The warm-up is long enough for the processor's clock and caches, and for what an image looks
    // up once: its metadata.
    let warm_seconds = if work.warm > 0 { seconds * 0.15 } else { 0.0 };
    let ready = Barrier::new(work.threads + 1);
    let go = Barrier::new(work.threads + 1);
    let one_thread = |thread: usize| -> Res<u64> {
        let mut buf = Buffer::new(work.block);
        let mut offsets = Offsets::new(work, thread);
        let mut failure = run(device, work, &mut offsets, &mut buf, work.warm, warm_seconds).err();
        ready.wait();
        go.wait();
        let mut done = 0;
        if failure.is_none() {
            let (ops, seconds) = match work.ops {
                Some(ops) => (ops / work.threads as u64, 0.0),
                None => (1, seconds),
            };
            match run(device, work, &mut offsets, &mut buf, ops, seconds) {
                Ok(n) => done = n,
                Err(e) => failure = Some(e),
            }
        }
        failure.map_or(Ok(done), Err)
    };
    let (ops, used) = std::thread::scope(|scope| -> Res<_> {
        // One thread is a thread too, so that both cases begin alike.
        let handles: Vec<_> =
            (0..work.threads).map(|t| scope.spawn(move || one_thread(t))).collect();
        ready.wait();
        let start = Load::now();
        go.wait();
        let mut ops = 0;
        for handle in handles {
            ops += handle.join().map_err(|_| "a thread of the bench panicked".to_owned())??;
        }
        Ok((ops, start.used()))
    })?;
    Ok(Sample {
        value: ops as f64 / used.wall,
        cpu_us: used.own / ops.max(1) as f64 * 1e6,
        foreign: used.foreign,
    })
}

/// At least `ops` requests and at least `seconds` long; how many there were.
fn run(
    device: &dyn Device,
    work: &Work,
    offsets: &mut Offsets,
    buf: &mut [u8],
    ops: u64,
    seconds: f64,
) -> Res<u64> {
    if ops == 0 {
        return Ok(0);
    }
    // The clock is read once in so many requests that it does not count.
    let batch = if work.block > 65536 { 4 } else { 32 }.min(ops);
    let start = Instant::now();
    let mut done = 0;
    loop {
        for _ in 0..batch {
            let offset = offsets.next();
            if work.write {
                device.write(buf, offset)?
            } else {
                device.read(buf, offset)?
            };
            if work.flush {
                device.flush()?;
            }
        }
        done += batch;
        if done >= ops && start.elapsed().as_secs_f64() >= seconds {
            return Ok(done);
        }
    }
}
