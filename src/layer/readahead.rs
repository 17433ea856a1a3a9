//! `readahead`: whoever reads in order finds the next bytes in memory.
//!
//! A stream is recognised by reads that follow one another; several are told apart. From the second read on
//! a thread of the layer's reads ahead of it, on a context of its own, by and by further, up to a window. What
//! it brings are segments that do not overlap. One that was read to its end is dropped, and the oldest ones
//! make room for others. Nothing depends on the thread but speed: a read takes a segment that is not begun
//! upon itself, and waits only for one that is being read.
//!
//! A change drops the segments that it touches, also those being read, and none is begun there until it is
//! over: so that no segment has bytes from before a change that has returned.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::*;
use crate::log::{Level, log};

pub(super) const KIND: Kind = Kind {
    name: "readahead",
    about: "read ahead of whoever reads in order, in the background",
    keys: &[
        ("window", "how far ahead of a stream, bytes (2M)"),
        ("size", "memory for all streams, bytes (16M)"),
        ("streams", "how many are told apart (8)"),
    ],
    writes_below: always,
    open,
};

/// Bytes that are read ahead at a time, at least and at most.
const SEGMENT: (u64, u64) = (4096, 1 << 20);
/// Reads whose length is the measure for the first window.
const FIRST: u64 = 4;
/// Entries of the queue that may be stale.
const QUEUE: usize = 1024;
/// Bytes of the thread's stack: what is below runs on it.
const STACK: Option<usize> = None;

struct ReadAhead {
    next: Device,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Where the thread is.
    process: u32,
}

/// What the layer and its thread share.
struct Shared {
    /// The thread's context.
    ahead: Device,
    window: u64,
    segment: u64,
    size: u64,
    streams: usize,
    state: Mutex<State>,
    /// A segment was planned, or is not being read any more, or the thread is to end.
    changed: Condvar,
    /// Bytes read ahead, and bytes of them that somebody wanted.
    read: AtomicU64,
    used: AtomicU64,
}

#[derive(Default)]
struct State {
    /// By their first byte.
    segments: BTreeMap<u64, Segment>,
    /// Those that the thread is to read, by first byte and number, in order.
    queue: VecDeque<(u64, u64)>,
    streams: Vec<Stream>,
    /// Ranges that are being changed, by number.
    changing: Vec<(u64, u64, u64)>,
    /// Of all segments.
    bytes: u64,
    /// Counts whatever needs a number, and the age of things.
    ticks: u64,
    /// There is a thread.
    started: bool,
    /// There can be none any more.
    ended: bool,
}

struct Segment {
    number: u64,
    end: u64,
    bytes: Bytes,
}

enum Bytes {
    Planned,
    Reading,
    Ready(Arc<Vec<u8>>),
}

struct Stream {
    /// Where it goes on.
    next: u64,
    /// To where was planned for it.
    ahead: u64,
    window: u64,
    used: u64,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let window = settings.size("window")?.unwrap_or(2 << 20);
    if !(SEGMENT.0..=1 << 30).contains(&window) {
        return Err(settings.bad("window", "4k to 1G"));
    }
    let size = settings.size("size")?.unwrap_or((16 << 20).max(window.saturating_mul(2)));
    if size < window || size > 1 << 40 {
        return Err(settings.bad("size", "at least the window, at most 1T"));
    }
    let streams = settings.number("streams", 1..=1024)?.unwrap_or(8) as usize;
    let next = source.open(write)?;
    let shared = Shared {
        ahead: source.open(false)?,
        window,
        segment: (window / 4).clamp(SEGMENT.0, SEGMENT.1),
        size,
        streams,
        state: Default::default(),
        changed: Condvar::new(),
        read: 0.into(),
        used: 0.into(),
    };
    Ok(Stacked::boxed(ReadAhead {
        next,
        shared: Arc::new(shared),
        thread: Mutex::new(None),
        process: std::process::id(),
    }))
}

impl State {
    fn tick(&mut self) -> u64 {
        self.ticks += 1;
        self.ticks
    }

    /// The segment that has byte `at`, by its first byte.
    fn with(&self, at: u64) -> Option<(u64, &Segment)> {
        let (start, segment) = self.segments.range(..=at).next_back()?;
        (segment.end > at).then_some((*start, segment))
    }

    fn touches(&self, from: u64, to: u64) -> bool {
        let last =
            from < to && self.segments.range(..to).next_back().is_some_and(|s| s.1.end > from);
        last || self.changing.iter().any(|c| c.0 < to && from < c.1)
    }

    fn forget(&mut self, start: u64) {
        if let Some(segment) = self.segments.remove(&start) {
            self.bytes = self.bytes.saturating_sub(segment.end - start);
        }
    }

    /// Forget all segments that a range touches.
    fn forget_range(&mut self, from: u64, to: u64) {
        while let Some((start, _)) =
            self.segments.range(..to).next_back().filter(|s| s.1.end > from).map(|s| (*s.0, ()))
        {
            self.forget(start);
        }
    }

    /// Make room by forgetting the oldest segments that lie outside of a range. Whether there is.
    fn make_room(&mut self, count: u64, size: u64, keep: (u64, u64)) -> bool {
        while self.bytes.saturating_add(count) > size {
            let outside = |s: &(&u64, &Segment)| {
                matches!(s.1.bytes, Bytes::Ready(_)) && (*s.0 >= keep.1 || s.1.end <= keep.0)
            };
            let oldest = self.segments.iter().filter(outside).min_by_key(|s| s.1.number);
            let Some(start) = oldest.map(|s| *s.0) else { return false };
            self.forget(start);
        }
        true
    }

    /// The stream that a read continues. Requests of one reader may overtake each other.
    fn stream(&mut self, offset: u64, len: u64) -> Option<usize> {
        let slack = len.saturating_mul(2);
        self.streams.iter().position(|s| {
            offset <= s.next.saturating_add(slack) && s.next <= offset.saturating_add(slack)
        })
    }
}

impl Shared {
    /// Take note of a read, and plan what comes next. Whether there is something for the thread to do.
    fn plan(&self, offset: u64, end: u64, limit: u64) -> bool {
        let len = end - offset;
        let mut state = self.state.lock();
        let now = state.tick();
        let Some(i) = state.stream(offset, len) else {
            if state.streams.len() >= self.streams
                && let Some((i, _)) = state.streams.iter().enumerate().min_by_key(|s| s.1.used)
            {
                state.streams.swap_remove(i);
            }
            state.streams.push(Stream { next: end, ahead: end, window: 0, used: now });
            return false;
        };
        let s = &mut state.streams[i];
        s.used = now;
        if end <= s.next {
            return false;
        }
        s.next = end;
        s.ahead = s.ahead.max(end);
        if s.window == 0 {
            s.window = len.saturating_mul(FIRST).max(self.segment).min(self.window);
        }
        let (next, mut ahead, window) = (s.next, s.ahead, s.window);
        if ahead - next > window / 2 || state.ended {
            return false;
        }
        let goal = next.saturating_add(window).min(limit);
        let mut planned = false;
        while ahead < goal {
            let to = ahead.saturating_add(self.segment).min(limit);
            if to > goal {
                break;
            }
            if let Some((_, there)) = state.with(ahead) {
                ahead = there.end;
                continue;
            }
            if state.touches(ahead, to) || !state.make_room(to - ahead, self.size, (offset, ahead))
            {
                break;
            }
            let number = state.tick();
            let segment = Segment { number, end: to, bytes: Bytes::Planned };
            state.segments.insert(ahead, segment);
            state.bytes += to - ahead;
            state.queue.push_back((ahead, number));
            // Those that were forgotten meanwhile must not pile up behind a read that hangs.
            if state.queue.len() > QUEUE {
                let State { segments, queue, .. } = &mut *state;
                queue.retain(|q| segments.get(&q.0).is_some_and(|s| s.number == q.1));
            }
            planned = true;
            ahead = to;
        }
        let s = &mut state.streams[i];
        s.ahead = ahead;
        if planned {
            s.window = window.saturating_mul(2).min(self.window);
            self.changed.notify_all();
        }
        planned
    }

    /// Bytes from `at` on, if there are some; else to where there are none, at the latest `end`.
    fn find(&self, at: u64, end: u64) -> std::result::Result<(u64, Arc<Vec<u8>>), u64> {
        let mut state = self.state.lock();
        loop {
            let Some((start, segment)) = state.with(at) else {
                let next = state.segments.range(at..end).next();
                return Err(next.map_or(end, |s| *s.0));
            };
            let stop = segment.end;
            match &segment.bytes {
                Bytes::Ready(bytes) => return Ok((start, bytes.clone())),
                Bytes::Reading => self.changed.wait(&mut state),
                Bytes::Planned => {
                    state.forget(start);
                    return Err(stop.min(end));
                }
            }
        }
    }

    /// `count` bytes of a segment were used, up to `end`; one that was read to its end is not needed any more.
    fn used(&self, start: u64, bytes: &Arc<Vec<u8>>, count: u64, end: u64) {
        self.used.fetch_add(count, Relaxed);
        if end < start + bytes.len() as u64 {
            return;
        }
        let mut state = self.state.lock();
        // It may have been dropped, and another put there, meanwhile.
        let same = state
            .segments
            .get(&start)
            .is_some_and(|s| matches!(&s.bytes, Bytes::Ready(there) if Arc::ptr_eq(there, bytes)));
        if same {
            state.forget(start);
        }
    }

    /// The thread's work, until the layer is dropped.
    fn run(&self) {
        // Should what is below panic, nobody must wait for this thread.
        struct Ended<'a>(&'a Shared);
        impl Drop for Ended<'_> {
            fn drop(&mut self) {
                self.0.end();
            }
        }
        let _ended = Ended(self);
        loop {
            let (start, number, end) = {
                let mut state = self.state.lock();
                loop {
                    if state.ended {
                        return;
                    }
                    match state.queue.pop_front() {
                        None => self.changed.wait(&mut state),
                        Some((start, number)) => {
                            if let Some(s) = state.segments.get_mut(&start)
                                && s.number == number
                            {
                                s.bytes = Bytes::Reading;
                                break (start, number, s.end);
                            }
                        }
                    }
                }
            };
            let mut bytes = vec![0; (end - start) as usize];
            let read = self.ahead.read_slice(&mut bytes, start);
            let mut state = self.state.lock();
            match (read, state.segments.get_mut(&start)) {
                (Ok(()), Some(s)) if s.number == number => {
                    s.bytes = Bytes::Ready(Arc::new(bytes));
                    self.read.fetch_add(end - start, Relaxed);
                }
                (Err(e), Some(s)) if s.number == number => {
                    // Whoever needs these bytes reads them, and is told.
                    log(Level::Debug, format_args!("layer '{}': {e}", KIND.name));
                    state.forget(start);
                }
                // A change came in between.
                _ => {}
            }
            self.changed.notify_all();
        }
    }

    /// Read ahead no more.
    fn end(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        state.segments.clear();
        state.queue.clear();
        state.bytes = 0;
        self.changed.notify_all();
    }
}

/// A range that is being changed.
struct Changing<'a>(&'a Shared, u64);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.state.lock().changing.retain(|c| c.2 != self.1);
    }
}

impl ReadAhead {
    fn change(&self, offset: u64, count: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let _changing = {
            let mut state = self.shared.state.lock();
            let (end, number) = (offset.saturating_add(count), state.tick());
            state.forget_range(offset, end);
            state.changing.push((offset, end, number));
            // Who waits for a segment that is gone reads by itself.
            self.shared.changed.notify_all();
            Changing(&self.shared, number)
        };
        work()
    }

    fn plan(&self, offset: u64, end: u64) {
        if self.shared.plan(offset, end, self.next.size()) {
            self.start();
        }
    }

    /// Start the thread, the first time that there is something for it.
    fn start(&self) {
        if std::mem::replace(&mut self.shared.state.lock().started, true) {
            return;
        }
        let shared = self.shared.clone();
        match crate::thread::spawn("qblk-readahead", STACK, move || shared.run()) {
            Ok(thread) => *self.thread.lock() = Some(thread),
            Err(e) => {
                log(Level::Warn, format_args!("layer '{}': no thread: {e}", KIND.name));
                self.shared.end();
            }
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            if self.thread.try_lock().is_none_or(|thread| thread.is_some()) {
                // In a forked child there is no thread, only the count of the parent's.
                std::mem::forget(self.thread.get_mut().take());
                // SAFETY: the count that the thread holds; it never runs in this process, so nobody else
                // gives it back.
                unsafe { Arc::decrement_strong_count(Arc::as_ptr(&self.shared)) };
            }
            return;
        }
        self.shared.end();
        if let Some(thread) = self.thread.get_mut().take() {
            // It ends when the read that it is at has returned. What it panicked with was told.
            let _ = thread.join();
        }
    }
}

impl Layer for ReadAhead {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn read(&self, mut buf: Dst<'_>, offset: u64) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        self.plan(offset, end);
        let mut at = offset;
        while at < end {
            let to = match self.shared.find(at, end) {
                Ok((start, bytes)) => {
                    let to = end.min(start + bytes.len() as u64);
                    let (part, rest) = buf.split_at((to - at) as usize);
                    part.copy_from(&bytes[(at - start) as usize..]);
                    self.shared.used(start, &bytes, to - at, to);
                    buf = rest;
                    to
                }
                Err(to) => {
                    let (part, rest) = buf.split_at((to - at) as usize);
                    self.next.read(part, at)?;
                    buf = rest;
                    to
                }
            };
            at = to;
        }
        Ok(())
    }
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        let end = offset.saturating_add(buf.len() as u64);
        let found = {
            let state = self.shared.state.lock();
            match state.with(offset) {
                Some((start, Segment { end: stop, bytes: Bytes::Ready(bytes), .. }))
                    if *stop >= end =>
                {
                    Some((start, bytes.clone()))
                }
                Some(_) => return Ok(false),
                None if state.segments.range(offset..end).next().is_some() => return Ok(false),
                None => None,
            }
        };
        let Some((start, bytes)) = found else {
            // What is near needs no reading ahead; if it is not, the read that follows is noted.
            return self.next.read_now(buf, offset);
        };
        buf.copy_from(&bytes[(offset - start) as usize..]);
        self.shared.used(start, &bytes, end - offset, end);
        self.plan(offset, end);
        Ok(true)
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.change(offset, buf.len() as u64, || self.next.write(buf, offset, flags))
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.change(offset, count, || self.next.zero(offset, count, flags))
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.change(offset, count, || self.next.trim(offset, count, flags))
    }
    fn reopened(&self) {
        // Others may have changed what is below.
        self.shared.state.lock().forget_range(0, u64::MAX);
        // Who waits for a segment that is gone reads by itself.
        self.shared.changed.notify_all();
    }
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        let text = |n: u64| n.to_string().into_bytes();
        let held = self.shared.state.lock().bytes;
        vec![
            ("readahead.allocated", text(held)),
            ("readahead.read", text(self.shared.read.load(Relaxed))),
            ("readahead.used", text(self.shared.used.load(Relaxed))),
        ]
    }
}
