//! `qblk copy`: an image into another, in parallel, holes kept holes.
//!
//! Threads take pieces of the source one after another and copy each by itself. A piece never crosses
//! a multiple of 2 MiB, the largest cluster there is, so two threads never meet in one cluster. A
//! target that was made here disappears unless the copy was whole, flushed and closed.

use std::ffi::OsStr;
use std::io::{IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qblk::block::quoted;
use qblk::{Extent, Image, OpenFlags, Options, ReqFlags};
use serde_json::{Map, json};

use crate::cli::CopyArgs;
use crate::failure::{Failure, Result};
use crate::json;
use crate::open::{chain, file_id, flags, is_nbd, options, value, with_format};
use crate::signals;
use crate::target::{self, HalfMade, backing_settings};
use crate::units::{human, human_and_exact, percent, shown};

/// Data is copied in pieces of up to this many bytes, which begin at its multiples.
const PIECE: u64 = 2 << 20;
/// Zeroing a target that may have to write them is done in pieces, so that a signal is heeded.
const ZERO_PIECE: u64 = 256 << 20;
/// Zeroes are looked for in blocks of this size.
const BLOCK: usize = 4096;
/// What the target's memory is aligned to, for direct I/O.
const ALIGN: usize = 4096;

/// What is known of the target before anything is copied.
#[derive(Clone, Copy, PartialEq)]
enum Target {
    /// It reads as zeroes: zeroes need not be written.
    Zeroes,
    /// It may hold anything.
    Anything,
    /// It reads as its backing image: what is the same need not be written.
    Overlay,
}

/// A part of the source that one thread copies.
struct Piece {
    offset: u64,
    length: u64,
    zero: bool,
}

/// What all threads share.
struct Work<'a> {
    source: &'a Image,
    target: &'a Image,
    known: Target,
    sparse: u64,
    cursor: Mutex<Cursor>,
    stop: AtomicBool,
    failure: Mutex<Option<Failure>>,
    done: AtomicU64,
    written: AtomicU64,
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

pub fn run(args: &CopyArgs) -> Result<()> {
    signals::catch();
    refuse_to_make_an_export(args)?;
    let source = open_source(args)?;
    let size = source.size()?;
    refuse_to_harm_the_source(args)?;
    let format = match (&args.target_format, is_nbd(&args.target)) {
        (Some(format), _) => Some(format.clone()),
        // What an export holds is a disk; probing would trust what is in it.
        (None, true) => Some("raw".into()),
        (None, false) if args.no_create => None,
        (None, false) => Some(source_format(&source)),
    };
    let half_made = match is_there(args) {
        true => None,
        false => Some(make_target(args, format.as_deref().unwrap_or("raw"), size)?),
    };
    let result = copy_into_target(args, &source, size, format.as_deref());
    match result {
        Ok(written) => {
            if let Some(file) = half_made {
                file.keep();
            }
            tell(args, size, written)
        }
        Err(e) => {
            drop(half_made);
            Err(e)
        }
    }
}

fn open_source(args: &CopyArgs) -> Result<Image> {
    let how = flags([
        (args.untrusted, OpenFlags::UNTRUSTED),
        (args.no_backing, OpenFlags::NO_BACKING),
        (args.direct, OpenFlags::DIRECT),
        (args.shared, OpenFlags::SHARED),
        (args.no_lock, OpenFlags::NO_LOCK),
    ]);
    let settings = with_format(&args.source_option, args.format.as_deref());
    Ok(Image::open(&args.source, &options(&settings), how)?)
}

fn source_format(source: &Image) -> String {
    source.info().map_or("raw", |info| info.format).to_owned()
}

/// The target is not made, only written to.
fn is_there(args: &CopyArgs) -> bool {
    args.no_create || is_nbd(&args.target)
}

/// An NBD export is made by its server, and so nothing can be said of how.
fn refuse_to_make_an_export(args: &CopyArgs) -> Result<()> {
    if is_nbd(&args.target) && args.backing.is_some() {
        return Err(Failure::usage(format!(
            "{}: an NBD export is written to as it is, so --backing makes no sense for it",
            quoted(args.target.as_bytes())
        )));
    }
    Ok(())
}

/// The target must not be the source, nor anything that the source stands on.
fn refuse_to_harm_the_source(args: &CopyArgs) -> Result<()> {
    let id = file_id(&args.target);
    let same = |name: &OsStr| id.is_some() && file_id(name) == id;
    if same(&args.source) || is_nbd(&args.target) && args.source == args.target {
        return Err(Failure::said(format!(
            "{}: source and target are the same",
            quoted(args.target.as_bytes())
        )));
    }
    // What an untrusted source names was not opened, and is not looked for.
    if id.is_none() || args.untrusted || args.no_backing {
        return Ok(());
    }
    let settings = with_format(&args.source_option, args.format.as_deref());
    for link in chain(&args.source, &settings, OpenFlags::default())?.iter().skip(1) {
        if same(&link.name) {
            return Err(Failure::said(format!(
                "{}: is part of the source (in its backing chain)",
                quoted(args.target.as_bytes())
            )));
        }
    }
    Ok(())
}

fn make_target(args: &CopyArgs, format: &str, size: u64) -> Result<HalfMade> {
    let mut settings = args.options.clone();
    backing_settings(&mut settings, args.backing.as_deref(), args.backing_format.as_deref())?;
    target::create(&args.target, format, size, &settings, args.force)?;
    Ok(HalfMade::new(&args.target))
}

/// Copy all, make it durable and close it; answers how many bytes were written.
fn copy_into_target(
    args: &CopyArgs,
    source: &Image,
    size: u64,
    format: Option<&str>,
) -> Result<u64> {
    let mut how = Options::new();
    if is_there(args) {
        how = options(&args.options);
    } else {
        // What it was encrypted with is what opens it.
        for key in ["key", "key-file"] {
            how.set(key, value(&args.options, key));
        }
    }
    if let Some(format) = format {
        how.set("format", Some(format.as_bytes()));
    }
    let how_flags = flags([
        (true, OpenFlags::RDWR),
        (args.direct, OpenFlags::DIRECT),
        (args.no_lock, OpenFlags::NO_LOCK),
    ]);
    let target = Image::open(&args.target, &how, how_flags)?;
    let room = target.size()?;
    if room < size {
        return Err(Failure::said(format!(
            "{}: has {}, too few for the source's {}",
            quoted(args.target.as_bytes()),
            human_and_exact(room),
            human_and_exact(size)
        )));
    }
    let info = target.info()?;
    let overlay = value(&args.options, "backing-file").is_some_and(|b| !b.is_empty());
    let known = if is_there(args) || (info.format == "raw" && info.driver != "file") {
        // A block device is not made, only used.
        Target::Anything
    } else if info.format == "luks" {
        // What is not written there reads as noise.
        Target::Anything
    } else if args.backing.is_some() || overlay {
        Target::Overlay
    } else {
        Target::Zeroes
    };
    let work = Work {
        source,
        target: &target,
        known,
        sparse: args.sparse,
        cursor: Mutex::new(Cursor {
            batch: vec![Extent::default(); 512],
            filled: 0,
            next: 0,
            offset: 0,
            end: size,
        }),
        stop: AtomicBool::new(false),
        failure: Mutex::new(None),
        done: AtomicU64::new(0),
        written: AtomicU64::new(0),
    };
    work.run(args, size)?;
    let written = work.written.load(Relaxed);
    target.flush()?;
    target.close()?;
    if let Some(signal) = signals::asked_to_end() {
        return Err(ended(args, signal));
    }
    Ok(written)
}

fn ended(args: &CopyArgs, signal: i32) -> Failure {
    let left = is_nbd(&args.target)
        || file_id(&args.target).is_some()
            && (args.no_create || std::fs::metadata(&args.target).is_ok_and(|m| !m.is_file()));
    let text = left.then(|| format!("{} is only partly written", quoted(args.target.as_bytes())));
    Failure::Signal(signal, text)
}

fn threads(args: &CopyArgs) -> u32 {
    let cores = std::thread::available_parallelism().map_or(2, |n| n.get() as u32);
    args.threads.unwrap_or(cores.clamp(2, 8))
}

/// Tells the watching thread when the thread that has it ends.
struct Ended<'a> {
    running: &'a AtomicU32,
    watcher: &'a std::thread::Thread,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.running.fetch_sub(1, Release);
        self.watcher.unpark();
    }
}

impl Work<'_> {
    fn run(&self, args: &CopyArgs, size: u64) -> Result<()> {
        let mut progress = Progress::new(args, size);
        let watcher = std::thread::current();
        let running = AtomicU32::new(threads(args));
        std::thread::scope(|scope| {
            for _ in 0..threads(args) {
                scope.spawn(|| {
                    // Counted also if it panics, or the watcher would watch for ever.
                    let _ended = Ended { running: &running, watcher: &watcher };
                    self.copy_pieces();
                });
            }
            let mut seen = None;
            loop {
                let over = running.load(Acquire) == 0;
                if !over {
                    std::thread::park_timeout(Duration::from_millis(50));
                }
                let done = self.done.load(Relaxed);
                // A copy may be over before anyone has looked.
                if !over || seen != Some(done) {
                    progress.show(done);
                }
                seen = Some(done);
                if over {
                    break;
                }
                if signals::asked_to_end().is_some() {
                    self.stop.store(true, Relaxed);
                }
            }
        });
        progress.end();
        if let Some(failure) = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(failure);
        }
        match signals::asked_to_end() {
            Some(signal) => Err(ended(args, signal)),
            None => Ok(()),
        }
    }

    /// What a thread does: one piece after another until there are none, or all are to stop.
    fn copy_pieces(&self) {
        let mut memory = vec![0; 2 * PIECE as usize + 2 * ALIGN];
        let skip = memory.as_ptr().align_offset(ALIGN);
        let (buf, below) = memory[skip..].split_at_mut(PIECE as usize + ALIGN);
        while !self.stop.load(Relaxed) {
            let result = match self.next_piece() {
                Ok(None) => return,
                Ok(Some(piece)) => self.copy(&piece, buf, below),
                Err(e) => Err(e),
            };
            if let Err(e) = result {
                self.stop.store(true, Relaxed);
                // The first failure is the one that explains.
                self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
            }
        }
    }

    fn next_piece(&self) -> Result<Option<Piece>> {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(first) = cursor.extent(self.source)? else { return Ok(None) };
        let (offset, zero) = (cursor.offset, first.has(Extent::ZERO));
        let limit = match (zero, self.known) {
            // Nothing is done for these, however many.
            (true, Target::Zeroes) if self.sparse > 0 => cursor.end,
            (true, Target::Anything) if self.sparse > 0 => offset.saturating_add(ZERO_PIECE),
            _ => (offset / PIECE + 1) * PIECE,
        }
        .min(cursor.end);
        // Neighbours of one kind go together, wherever each lies.
        while cursor.offset < limit
            && let Some(e) = cursor.extent(self.source)?
            && e.has(Extent::ZERO) == zero
        {
            cursor.offset = limit.min(e.offset.saturating_add(e.length));
        }
        Ok(Some(Piece { offset, length: cursor.offset - offset, zero }))
    }

    fn copy(&self, piece: &Piece, buf: &mut [u8], below: &mut [u8]) -> Result<()> {
        let Piece { offset, length, zero } = *piece;
        match (zero, self.known) {
            (true, Target::Zeroes) if self.sparse > 0 => {}
            (true, Target::Overlay) => self.hide_below(offset, length)?,
            (true, Target::Anything) if self.sparse > 0 => {
                self.target.zero(offset, length, ReqFlags::MAY_TRIM)?;
            }
            _ => {
                let buf = &mut buf[..length as usize];
                if zero {
                    buf.fill(0)
                } else {
                    self.source.read_at(buf, offset)?
                }
                match self.known {
                    Target::Overlay => self.write_what_differs(buf, below, offset)?,
                    _ if self.sparse > 0 => self.write_what_is_not_zero(buf, offset)?,
                    _ => self.write(buf, offset)?,
                }
            }
        }
        self.done.fetch_add(length, Relaxed);
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.target.write_at(buf, offset, ReqFlags::NONE)?;
        self.written.fetch_add(buf.len() as u64, Relaxed);
        Ok(())
    }

    fn write_what_is_not_zero(&self, buf: &[u8], offset: u64) -> Result<()> {
        for (from, to, zero) in runs(buf, self.sparse as usize) {
            let at = offset + from as u64;
            match (zero, self.known) {
                (false, _) => self.write(&buf[from..to], at)?,
                (true, Target::Anything) => {
                    self.target.zero(at, (to - from) as u64, ReqFlags::MAY_TRIM)?;
                }
                (true, _) => {}
            }
        }
        Ok(())
    }

    fn write_what_differs(&self, buf: &[u8], below: &mut [u8], offset: u64) -> Result<()> {
        let below = &mut below[..buf.len()];
        self.target.read_at(below, offset)?;
        let same = |at: usize| {
            let to = buf.len().min(at + BLOCK);
            buf[at..to] == below[at..to]
        };
        let mut from = 0;
        while from < buf.len() {
            let differs = !same(from);
            let mut to = from + BLOCK;
            while to < buf.len() && same(to) != differs {
                to += BLOCK;
            }
            let to = to.min(buf.len());
            if differs {
                self.write(&buf[from..to], offset + from as u64)?;
            }
            from = to;
        }
        Ok(())
    }

    /// Make a range of an overlay read as zeroes, where it does not yet.
    fn hide_below(&self, mut offset: u64, length: u64) -> Result<()> {
        let end = offset + length;
        let mut some = [Extent::default(); 64];
        while offset < end {
            let n = self.target.extents(offset, end - offset, &mut some)?;
            if n == 0 {
                return Ok(self.target.zero(offset, end - offset, ReqFlags::NONE)?);
            }
            for e in &some[..n] {
                if !e.has(Extent::ZERO) {
                    self.target.zero(e.offset, e.length, ReqFlags::NONE)?;
                }
                offset = e.offset + e.length;
            }
        }
        Ok(())
    }
}

impl Cursor {
    /// The extent at `offset`, `None` at the end.
    fn extent(&mut self, source: &Image) -> Result<Option<Extent>> {
        if self.offset >= self.end {
            return Ok(None);
        }
        while self.next < self.filled {
            let e = self.batch[self.next];
            if e.offset + e.length > self.offset {
                return Ok(Some(e));
            }
            self.next += 1;
        }
        let n = source.extents(self.offset, self.end - self.offset, &mut self.batch)?;
        (self.filled, self.next) = (n, 0);
        match self.batch[..n].first() {
            Some(e) => Ok(Some(*e)),
            // A source that cannot tell is read.
            None => Ok(Some(Extent::data(self.offset, self.end - self.offset))),
        }
    }
}

/// Runs of `buf` that are all zeroes (of at least `sparse` bytes) and that are not.
fn runs(buf: &[u8], sparse: usize) -> Vec<(usize, usize, bool)> {
    static ZEROES: [u8; BLOCK] = [0; BLOCK];
    let mut runs: Vec<(usize, usize, bool)> = Vec::new();
    for at in (0..buf.len()).step_by(BLOCK) {
        let block = &buf[at..buf.len().min(at + BLOCK)];
        let zero = *block == ZEROES[..block.len()];
        match runs.last_mut() {
            Some((_, to, last)) if *last == zero => *to = at + block.len(),
            _ => runs.push((at, at + block.len(), zero)),
        }
    }
    // A run of zeroes that is too short is written with what surrounds it.
    let whole = runs.len() == 1;
    let mut out: Vec<(usize, usize, bool)> = Vec::with_capacity(runs.len());
    for (from, to, zero) in runs {
        let zero = zero && (to - from >= sparse || whole);
        match out.last_mut() {
            Some((_, end, last)) if *last == zero => *end = to,
            _ => out.push((from, to, zero)),
        }
    }
    out
}

/// How far it is, for whoever waits.
enum Progress {
    Bar(ProgressBar),
    Lines { size: u64, begun: Instant, shown: Instant },
    None,
}

impl Progress {
    fn new(args: &CopyArgs, size: u64) -> Self {
        if args.told.quiet {
            return Self::None;
        }
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(size), ProgressDrawTarget::stderr());
            let look = "{wide_bar} {percent:>3}%  {binary_bytes} of {binary_total_bytes}  \
                        {binary_bytes_per_sec}  {eta} left";
            if let Ok(style) = ProgressStyle::with_template(look) {
                bar.set_style(style.progress_chars("=> "));
            }
            return Self::Bar(bar);
        }
        let now = Instant::now();
        match args.progress {
            true => Self::Lines { size, begun: now, shown: now },
            false => Self::None,
        }
    }

    fn show(&mut self, done: u64) {
        match self {
            Self::Bar(bar) => bar.set_position(done),
            Self::Lines { size, begun, shown } => {
                if done >= *size || shown.elapsed() >= Duration::from_secs(1) {
                    *shown = Instant::now();
                    let text = format!(
                        "{} of {} ({}) after {:.0} s\n",
                        human(done),
                        human(*size),
                        percent(done, *size),
                        begun.elapsed().as_secs_f64()
                    );
                    // Whoever wanted to watch may have gone; the copy goes on.
                    let _ = std::io::stderr().write_all(text.as_bytes());
                }
            }
            Self::None => {}
        }
    }

    fn end(self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn tell(args: &CopyArgs, size: u64, written: u64) -> Result<()> {
    if args.told.json {
        let mut all = Map::new();
        json::put_name(&mut all, "source", args.source.as_bytes());
        json::put_name(&mut all, "target", args.target.as_bytes());
        all.insert("size".into(), json!(size));
        all.insert("written".into(), json!(written));
        return json::print(&all.into());
    }
    if !args.told.quiet {
        let mut out = std::io::stdout().lock();
        let (name, size, written) = (shown(&args.target), human_and_exact(size), human(written));
        writeln!(out, "{name}: {size} copied, of which {written} had to be written")?;
    }
    Ok(())
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
        let all = [
            (0, b, true),
            (b, 2 * b, false),
            (2 * b, 3 * b, true),
            (3 * b, 4 * b, false),
            (4 * b, 5 * b + 100, true),
        ];
        assert_eq!(runs(&buf, b), all);
        assert_eq!(runs(&buf, 2 * b), [(0, 5 * b + 100, false)]);
        assert_eq!(runs(&buf[4 * b..], 1 << 20), [(0, b + 100, true)]);
        assert_eq!(runs(&[], b), []);
    }
}
