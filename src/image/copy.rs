//! Copying: what one disk holds into another, in parallel, holes kept holes.
//!
//! Threads take pieces of the source one after another and copy each by itself. A piece never crosses a
//! multiple of 2 MiB, the largest cluster there is, so two threads seldom meet in one cluster; where
//! clusters are compressed they never do. The calling thread waits, and tells how far it is.
//!
//! Committing and rebasing (`chainwork`) are copies, too: of what an image has itself into the one below,
//! or of what it has not from what is below.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use super::{Image, Options, Use};
use crate::block::*;

/// Data is copied in pieces of up to this many bytes, which begin at its multiples.
const PIECE: u64 = 2 << 20;
/// Zeroing a target that may have to write them is done in pieces, so that stopping is heeded.
const ZERO_PIECE: u64 = 256 << 20;
/// Zeroes are looked for, and bytes compared, in blocks of this size.
const BLOCK: usize = 4096;
/// What memory is aligned to, for direct I/O.
const ALIGN: usize = 4096;
/// Threads of one copy, at most.
const MOST_THREADS: u32 = 64;
/// How often it is told how far the work is.
const TELL: Duration = Duration::from_millis(50);
/// Extents asked for at once.
const BATCH: usize = 512;

/// What can be copied from, and to.
pub(super) trait Disk: Sync {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;
    fn write(&self, buf: &[u8], offset: u64) -> Result<()>;
    fn write_compressed(&self, buf: &[u8], offset: u64) -> Result<()>;
    fn zero(&self, offset: u64, count: u64) -> Result<()>;
    fn extents(&self, offset: u64, count: u64, out: &mut [Extent]) -> Result<usize>;
}

impl Disk for Image {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read_at(buf, offset)
    }
    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_at(buf, offset, ReqFlags::NONE)
    }
    fn write_compressed(&self, buf: &[u8], offset: u64) -> Result<()> {
        Image::write_compressed(self, OneIov::src(buf).iov(), offset)
    }
    fn zero(&self, offset: u64, count: u64) -> Result<()> {
        match Image::zero(self, offset, count, ReqFlags::MAY_TRIM) {
            // A device may offer no zeroing at all.
            Err(Error::NotSupported(_)) => write_zeroes(self, offset, count),
            done => done,
        }
    }
    fn extents(&self, offset: u64, count: u64, out: &mut [Extent]) -> Result<usize> {
        Image::extents(self, offset, count, out)
    }
}

fn write_zeroes(to: &Image, offset: u64, count: u64) -> Result<()> {
    let mut done = 0;
    while done < count {
        let n = (count - done).min(ZEROES.0.len() as u64);
        to.write_at(&ZEROES.0[..n as usize], offset + done, ReqFlags::NONE)?;
        done += n;
    }
    Ok(())
}

/// Which of the source's bytes are copied.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Which {
    All,
    /// What it has itself, not what shows from below.
    Own,
    /// What shows from below.
    NotOwn,
}

/// What is copied to where, and how.
pub(super) struct Job<'a> {
    pub(super) from: &'a dyn Disk,
    pub(super) to: &'a dyn Disk,
    /// Bytes of the source, and of the target.
    pub(super) size: u64,
    pub(super) room: u64,
    pub(super) which: Which,
    /// What the source has from images so deep, or deeper, the target has from the same.
    pub(super) same_from: Option<u32>,
    /// What says which bytes the target reads as already; as a rule the target.
    pub(super) shown: &'a dyn Disk,
    /// It reads as zeroes wherever nothing is copied to.
    pub(super) shows_zeroes: bool,
    /// Data is compared with it, too, and what is the same is not written.
    pub(super) compare: bool,
    /// Shortest run of zeroes in data that is not written as data; 0 = all of it is.
    pub(super) sparse: u64,
    /// Clusters of so many bytes are written in compressed form.
    pub(super) compress: Option<u64>,
    pub(super) threads: u32,
}

/// What a part of the source is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Data,
    Zero,
    /// Not to be copied.
    Skip,
}

/// A part of the source that one thread copies.
struct Piece {
    offset: u64,
    length: u64,
    kind: Kind,
}

/// How far the source was looked at.
struct Cursor {
    batch: Vec<Extent>,
    /// Extents of the batch that are valid, and the next of them.
    filled: usize,
    next: usize,
    offset: u64,
    end: u64,
}

/// What all threads share.
struct Work<'a> {
    job: &'a Job<'a>,
    cursor: Mutex<Cursor>,
    stop: AtomicBool,
    /// Of several the first, which explains.
    failure: Mutex<Option<Error>>,
    done: AtomicU64,
    written: AtomicU64,
}

/// Memory of a thread.
struct Memory {
    bytes: Vec<u8>,
    skip: usize,
}

impl Memory {
    fn new() -> Self {
        let bytes = vec![0; 2 * PIECE as usize + ALIGN];
        let skip = bytes.as_ptr().align_offset(ALIGN).min(ALIGN);
        Self { bytes, skip }
    }

    /// Two pieces of it.
    fn halves(&mut self) -> (&mut [u8], &mut [u8]) {
        self.bytes[self.skip..].split_at_mut(PIECE as usize)
    }
}

/// Tells the waiting thread when the thread that has it ends, however it does.
struct Ended<'a> {
    running: &'a AtomicU32,
    waiting: &'a thread::Thread,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.running.fetch_sub(1, Release);
        self.waiting.unpark();
    }
}

/// Copy all bytes of `from` to the beginning of `to`; with `shallow` only those that `from` has itself,
/// not those that show from images below. Answers how many bytes had to be written.
pub fn copy(
    from: &Image,
    to: &Image,
    options: &Options,
    shallow: bool,
    progress: Progress<'_>,
) -> Result<u64> {
    options.check(Use::Copy)?;
    let compress = options.switch("compress")?.unwrap_or(false);
    let sparse = options.size("sparse")?.unwrap_or(BLOCK as u64);
    if !sparse.is_multiple_of(BLOCK as u64) {
        return Err(Error::invalid(format!(
            "option 'sparse': found {sparse}, expected a multiple of {BLOCK}, or 0"
        )));
    }
    let threads = threads(options)?;
    drop((from.data_call(0, 0)?, to.write_call(0, 0)?));
    let (size, room) = (from.size()?, to.size()?);
    refuse_the_same(from, to)?;
    let info = to.info()?;
    if room < size {
        return Err(Error::invalid(format!(
            "the target has {room} bytes, too few for the source's {size}"
        )));
    }
    if compress {
        // Asks whether it can be done at all.
        to.write_compressed(OneIov::src(&[]).iov(), 0)?;
    }
    let job = Job {
        from,
        to,
        size,
        room,
        which: if shallow { Which::Own } else { Which::All },
        same_from: None,
        shown: to,
        shows_zeroes: options.switch("target-is-zero")?.unwrap_or(false),
        compare: options.switch("compare")?.unwrap_or(false),
        sparse,
        compress: compress.then_some(u64::from(info.cluster_size.max(512))),
        threads,
    };
    job.run(progress)
}

/// The option `threads`: one for each processor, unless it says otherwise.
pub(super) fn threads(options: &Options) -> Result<u32> {
    let cores = thread::available_parallelism().map_or(2, |n| n.get() as u32);
    Ok(options.number("threads", 1..=MOST_THREADS)?.unwrap_or(cores.clamp(2, MOST_THREADS)))
}

/// A target must not be the source, nor what the source stands on.
fn refuse_the_same(from: &Image, to: &Image) -> Result<()> {
    let refused = |name: &Name| {
        Err(Error::invalid(format!("{name}: the target is the source, or part of its chain")))
    };
    let (source, target) = (from.call()?, to.call()?);
    if Arc::ptr_eq(&from.shared, &to.shared) {
        return refused(&target.name);
    }
    let id = target.files.first().and_then(|f| f.driver().identity());
    match id.is_some() && source.files.iter().any(|f| f.driver().identity() == id) {
        true => refused(&target.name),
        false => Ok(()),
    }
}

impl Job<'_> {
    /// Do it. Answers how many bytes were written.
    pub(super) fn run(&self, progress: Progress<'_>) -> Result<u64> {
        let cursor = Cursor {
            batch: vec![Extent::default(); BATCH],
            filled: 0,
            next: 0,
            offset: 0,
            end: self.size,
        };
        let work = Work {
            job: self,
            cursor: Mutex::new(cursor),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
            done: AtomicU64::new(0),
            written: AtomicU64::new(0),
        };
        progress.at(0, self.size)?;
        work.in_threads(progress)?;
        progress.at(self.size, self.size)?;
        Ok(work.written.into_inner())
    }
}

impl Work<'_> {
    fn in_threads(&self, progress: Progress<'_>) -> Result<()> {
        let useful = self.job.size.div_ceil(PIECE).clamp(1, self.job.threads.max(1).into()) as u32;
        let (waiting, running) = (thread::current(), AtomicU32::new(0));
        let canceled = thread::scope(|scope| {
            for i in 0..useful {
                running.fetch_add(1, Relaxed);
                let (waiting, running) = (&waiting, &running);
                let made = crate::thread::deaf(|| {
                    thread::Builder::new().name("qblk-copy".into()).spawn_scoped(scope, move || {
                        let _ended = Ended { running, waiting };
                        self.copy_pieces();
                    })
                });
                if let Err(e) = made {
                    running.fetch_sub(1, Relaxed);
                    // With fewer it takes longer; with none it is not done at all.
                    if i == 0 {
                        let errno = e.raw_os_error().unwrap_or(libc::EAGAIN);
                        let file = Name::from("copying");
                        self.fail(Error::Os { op: "starting a thread", file, errno });
                    }
                    break;
                }
            }
            while running.load(Acquire) > 0 {
                thread::park_timeout(TELL);
                let told = progress.at(self.done.load(Relaxed), self.job.size);
                if told.is_err() && running.load(Acquire) > 0 {
                    self.stop.store(true, Relaxed);
                    return true;
                }
            }
            false
        });
        match self.failure.lock().take() {
            Some(e) => Err(e),
            None if canceled => Err(Error::Canceled),
            None => Ok(()),
        }
    }

    fn fail(&self, e: Error) {
        self.stop.store(true, Relaxed);
        self.failure.lock().get_or_insert(e);
    }

    /// What a thread does: one piece after another until there are none, or all are to stop.
    fn copy_pieces(&self) {
        let mut memory = Memory::new();
        let all = catch_unwind(AssertUnwindSafe(|| {
            while !self.stop.load(Relaxed) {
                let Some(piece) = self.next_piece()? else { break };
                self.copy(&piece, &mut memory)?;
                self.done.fetch_add(piece.length, Relaxed);
            }
            Ok(())
        }));
        match all {
            Ok(Ok(())) => {}
            Ok(Err(e)) => self.fail(e),
            Err(_) => self.fail(Error::Internal("a thread that copies met a defect".into())),
        }
    }

    fn kind(&self, e: &Extent) -> Kind {
        let own = e.has(Extent::ALLOCATED);
        match self.job.which {
            Which::Own if !own => Kind::Skip,
            Which::NotOwn if own => Kind::Skip,
            _ if self.job.same_from.is_some_and(|depth| e.depth >= depth) => Kind::Skip,
            _ if e.has(Extent::ZERO) => Kind::Zero,
            _ => Kind::Data,
        }
    }

    fn next_piece(&self) -> Result<Option<Piece>> {
        let mut cursor = self.cursor.lock();
        let Some(first) = cursor.extent(self.job.from)? else { return Ok(None) };
        let (offset, kind) = (cursor.offset, self.kind(&first));
        let next = (offset / PIECE + 1) * PIECE;
        let limit = match kind {
            // Nothing is done for these, however many.
            Kind::Skip => cursor.end,
            Kind::Zero if self.job.sparse > 0 && self.job.shows_zeroes => cursor.end,
            Kind::Zero if self.job.sparse > 0 => offset.saturating_add(ZERO_PIECE),
            _ => next,
        }
        .min(cursor.end);
        // Neighbours of one kind go together, wherever each lies.
        while cursor.offset < limit
            && let Some(e) = cursor.extent(self.job.from)?
            && self.kind(&e) == kind
        {
            cursor.offset = limit.min(e.offset.saturating_add(e.length));
        }
        // Clusters that are compressed are copied as a whole, with what zeroes are in them.
        let mut kind = kind;
        if let (Some(grain), Which::All) = (self.job.compress, self.job.which)
            && cursor.offset < cursor.end
        {
            let (down, up) = (cursor.offset - cursor.offset % grain, cursor.end);
            let up = cursor.offset.next_multiple_of(grain).min(up);
            cursor.offset = match kind {
                Kind::Data => up,
                _ if down > offset => down,
                _ => {
                    kind = Kind::Data;
                    up
                }
            };
        }
        Ok(Some(Piece { offset, length: cursor.offset - offset, kind }))
    }

    fn copy(&self, piece: &Piece, memory: &mut Memory) -> Result<()> {
        let Piece { offset, length, kind } = *piece;
        let job = self.job;
        match kind {
            Kind::Skip => Ok(()),
            Kind::Zero if job.sparse > 0 && job.shows_zeroes => Ok(()),
            Kind::Zero if job.sparse > 0 => self.hide(offset, length),
            _ => {
                let (buf, other) = memory.halves();
                let buf = &mut buf[..length as usize];
                match kind {
                    Kind::Zero => buf.fill(0),
                    _ => job.from.read(buf, offset)?,
                }
                if job.compare {
                    job.shown.read(&mut other[..buf.len()], offset)?;
                }
                let other = job.compare.then_some(&other[..buf.len()]);
                match job.compress {
                    Some(cluster) => self.write_clusters(buf, other, offset, cluster),
                    None => self.write_runs(buf, other, offset),
                }
            }
        }
    }

    /// Write what must be of `buf`; `other` is what is there.
    fn write_runs(&self, buf: &[u8], other: Option<&[u8]>, offset: u64) -> Result<()> {
        let at = |from: usize| offset + from as u64;
        if let Some(other) = other {
            for (from, to, same) in runs(buf, 0, |from, to| buf[from..to] == other[from..to]) {
                match same {
                    true => {}
                    false if self.job.sparse > 0 && is_zero(&buf[from..to]) => {
                        self.job.to.zero(at(from), (to - from) as u64)?;
                    }
                    false => self.write(&buf[from..to], at(from))?,
                }
            }
            return Ok(());
        }
        if self.job.sparse == 0 {
            return self.write(buf, offset);
        }
        let sparse = usize::try_from(self.job.sparse).unwrap_or(usize::MAX);
        for (from, to, zero) in runs(buf, sparse, |from, to| is_zero(&buf[from..to])) {
            match zero {
                true if self.job.shows_zeroes => {}
                true => self.hide(at(from), (to - from) as u64)?,
                false => self.write(&buf[from..to], at(from))?,
            }
        }
        Ok(())
    }

    /// As [`Work::write_runs`], compressed: whole clusters, several at a time. Only where the source has
    /// parts of clusters may `buf` begin or end within one.
    fn write_clusters(
        &self,
        buf: &[u8],
        other: Option<&[u8]>,
        offset: u64,
        cluster: u64,
    ) -> Result<()> {
        let head = offset.next_multiple_of(cluster) - offset;
        let head = usize::try_from(head).unwrap_or(usize::MAX).min(buf.len());
        let end = offset + buf.len() as u64;
        let tail = if end == self.job.room { 0 } else { (end % cluster) as usize };
        let stop = buf.len() - tail.min(buf.len() - head);
        for (from, to) in [(0, head), (stop, buf.len())] {
            if from < to {
                let other = other.map(|o| &o[from..to]);
                self.write_runs(&buf[from..to], other, offset + from as u64)?;
            }
        }
        // What is to be done with a cluster: nothing, zero it, write it.
        let fate = |from: usize, to: usize| match other {
            Some(other) if buf[from..to] == other[from..to] => 0,
            _ if self.job.sparse > 0 && is_zero(&buf[from..to]) => 1,
            _ => 2,
        };
        let step = cluster as usize;
        let mut from = head;
        while from < stop {
            let what = fate(from, stop.min(from + step));
            let mut to = stop.min(from + step);
            while to < stop && fate(to, stop.min(to + step)) == what {
                to = stop.min(to + step);
            }
            let at = offset + from as u64;
            match what {
                2 => {
                    self.job.to.write_compressed(&buf[from..to], at)?;
                    self.written.fetch_add((to - from) as u64, Relaxed);
                }
                1 if !self.job.shows_zeroes => self.hide(at, (to - from) as u64)?,
                _ => {}
            }
            from = to;
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.job.to.write(buf, offset)?;
        self.written.fetch_add(buf.len() as u64, Relaxed);
        Ok(())
    }

    /// Make a range of the target read as zeroes, where it does not yet.
    fn hide(&self, mut offset: u64, length: u64) -> Result<()> {
        let (job, end) = (self.job, offset + length);
        let mut some = [Extent::default(); 64];
        while offset < end {
            let n = job.shown.extents(offset, end - offset, &mut some)?;
            // One that can not tell is zeroed.
            if n == 0 {
                return job.to.zero(offset, end - offset);
            }
            for e in &some[..n] {
                if !e.has(Extent::ZERO) {
                    job.to.zero(e.offset, e.length)?;
                }
                offset = e.offset + e.length;
            }
        }
        Ok(())
    }
}

impl Cursor {
    /// The extent at `offset`, `None` at the end.
    fn extent(&mut self, source: &dyn Disk) -> Result<Option<Extent>> {
        if self.offset >= self.end {
            return Ok(None);
        }
        while self.next < self.filled {
            let e = self.batch[self.next];
            if e.offset.saturating_add(e.length) > self.offset {
                return Ok(Some(e));
            }
            self.next += 1;
        }
        let n = source.extents(self.offset, self.end - self.offset, &mut self.batch)?;
        (self.filled, self.next) = (n.min(self.batch.len()), 0);
        match self.batch[..self.filled].first() {
            Some(e) if e.offset <= self.offset && e.offset + e.length > self.offset => Ok(Some(*e)),
            // A source that cannot tell is read.
            _ => {
                self.filled = 0;
                Ok(Some(Extent::data(self.offset, self.end - self.offset)))
            }
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZEROES.0.len()).all(|c| *c == ZEROES.0[..c.len()])
}

/// Runs of blocks of `buf` that `test` says yes to (if they have at least `least` bytes) and of others.
fn runs(
    buf: &[u8],
    least: usize,
    test: impl Fn(usize, usize) -> bool,
) -> Vec<(usize, usize, bool)> {
    let mut runs: Vec<(usize, usize, bool)> = Vec::new();
    for from in (0..buf.len()).step_by(BLOCK) {
        let end = buf.len().min(from + BLOCK);
        let yes = test(from, end);
        match runs.last_mut() {
            Some((_, to, last)) if *last == yes => *to = end,
            _ => runs.push((from, end, yes)),
        }
    }
    // A run that is too short goes with what surrounds it.
    let whole = runs.len() == 1;
    let mut out: Vec<(usize, usize, bool)> = Vec::with_capacity(runs.len());
    for (from, to, yes) in runs {
        let yes = yes && (to - from >= least || whole);
        match out.last_mut() {
            Some((_, end, last)) if *last == yes => *end = to,
            _ => out.push((from, to, yes)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_split_at_zeroes_that_are_long_enough() {
        let mut buf = vec![0; 5 * BLOCK + 100];
        buf[BLOCK] = 1;
        buf[3 * BLOCK] = 1;
        let b = BLOCK;
        let zeroes = |buf: &[u8], least| runs(buf, least, |from, to| is_zero(&buf[from..to]));
        let all = [
            (0, b, true),
            (b, 2 * b, false),
            (2 * b, 3 * b, true),
            (3 * b, 4 * b, false),
            (4 * b, 5 * b + 100, true),
        ];
        assert_eq!(zeroes(&buf, b), all);
        assert_eq!(zeroes(&buf, 2 * b), [(0, 5 * b + 100, false)]);
        assert_eq!(zeroes(&buf[4 * b..], 1 << 20), [(0, b + 100, true)]);
        assert_eq!(zeroes(&[], b), []);
    }
}
