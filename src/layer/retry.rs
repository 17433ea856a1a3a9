//! `retry`: what fails is tried again, after what is below was opened anew.
//!
//! One caller at a time opens it anew, for all that failed on what was open before: each call notes how
//! often that was done when it began, and one that failed on something older is just repeated. Between two
//! tries is a pause that doubles. Reads, writes, zeroing, trimming can be repeated: once or twice, the
//! outcome is the same.
//!
//! A flush can not. One that failed says that what was written before may be lost, and one that succeeds
//! on what was opened anew says nothing of it. So it is repeated only if nothing was written since the
//! last one that succeeded; and before something is opened anew on which writes are not flushed they are
//! flushed, and if that fails, the caller's next flush does. From then on writes are refused, as after any
//! failed flush, until the device is reopened.
//!
//! A write that was acknowledged below is noted as not flushed a moment later. If what is below is being
//! opened anew in that moment, its flush may have missed it: such a write is done once more.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::unflushed::Unflushed;
use super::*;
use crate::log::{Level, log};

pub(super) const KIND: Kind = Kind {
    name: "retry",
    about: "repeat what fails, after opening anew what is below",
    keys: &[
        ("retries", "how often a call is repeated, at most (5)"),
        ("delay", "seconds before the first time, doubled each time (2)"),
        ("max-delay", "seconds between two times, at most (60, or delay if that is more)"),
        ("exponential", "off: the delay stays the same (on)"),
        ("time-limit", "seconds after which a call is not repeated any more (no limit)"),
        ("errors", "those that are worth it, as EIO+ETIMEDOUT (errors of I/O and of the network)"),
    ],
    writes_below: always,
    open,
};

/// Errors by name; whether they count where the setting does not say which do.
const ERRORS: &[(&str, i32, bool)] = &[
    ("EAGAIN", libc::EAGAIN, true),
    ("EBUSY", libc::EBUSY, true),
    ("ECONNABORTED", libc::ECONNABORTED, true),
    ("ECONNREFUSED", libc::ECONNREFUSED, true),
    ("ECONNRESET", libc::ECONNRESET, true),
    ("EHOSTDOWN", libc::EHOSTDOWN, true),
    ("EHOSTUNREACH", libc::EHOSTUNREACH, true),
    ("EIO", libc::EIO, true),
    ("ENETDOWN", libc::ENETDOWN, true),
    ("ENETRESET", libc::ENETRESET, true),
    ("ENETUNREACH", libc::ENETUNREACH, true),
    ("ENODEV", libc::ENODEV, true),
    ("ENOENT", libc::ENOENT, false),
    ("ENOLINK", libc::ENOLINK, true),
    ("ENOMEM", libc::ENOMEM, false),
    ("ENOTCONN", libc::ENOTCONN, true),
    ("ENXIO", libc::ENXIO, true),
    ("EPIPE", libc::EPIPE, true),
    ("EREMOTEIO", libc::EREMOTEIO, true),
    ("ESHUTDOWN", libc::ESHUTDOWN, true),
    ("ESTALE", libc::ESTALE, true),
    ("ETIMEDOUT", libc::ETIMEDOUT, true),
];

/// How long the end of a handle waits for somebody else's flush.
const CLOSE: Duration = Duration::from_secs(5);

struct Retry {
    next: Device,
    source: Arc<dyn Source>,
    policy: Policy,
    /// How often what is below was opened anew.
    epoch: AtomicU64,
    /// How often that was begun.
    begun: AtomicU64,
    reopening: Mutex<Reopening>,
    over: Condvar,
    unflushed: Unflushed,
    lost: Mutex<Lost>,
    /// Held while what is below is flushed before it is opened anew, until it is noted what came of that.
    settling: Mutex<()>,
    /// `lost` is not [`Lost::No`].
    is_lost: AtomicBool,
}

struct Policy {
    retries: u64,
    delay: Duration,
    max_delay: Duration,
    exponential: bool,
    time_limit: Option<Duration>,
    errors: Vec<i32>,
}

#[derive(Default)]
struct Reopening {
    /// Somebody is at it.
    busy: bool,
    /// How often somebody was.
    tries: u64,
    /// Why the last one failed, if it did.
    why: String,
}

/// What came of opening anew what is below.
enum Outcome {
    Done,
    Failed(String),
    /// There is no time left to do so.
    TooLate,
    /// It can not be done at all.
    Never(Error),
}

/// Whether writes that were acknowledged were lost.
#[derive(Clone, Default)]
enum Lost {
    #[default]
    No,
    /// They may have been, and no flush has told.
    Untold(Error),
    /// A flush has told.
    Told(i32),
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let errors = match settings.text("errors")? {
        None => ERRORS.iter().filter(|e| e.2).map(|e| e.1).collect(),
        Some(text) => {
            let names = text.split(['+', ',']).map(str::trim);
            let by_name = |name| ERRORS.iter().find(|e| e.0 == name).map(|e| e.1);
            let all: Option<Vec<i32>> = names.map(by_name).collect();
            all.ok_or_else(|| {
                let names: Vec<&str> = ERRORS.iter().map(|e| e.0).collect();
                settings.bad("errors", &format!("some of {} with + between", names.join(", ")))
            })?
        }
    };
    // Longer is a slip: the call can not be got out of it.
    let pause = |key: &str| {
        settings.parsed(key, "seconds such as 5 or 0.5, at most 1000", |v| {
            parse_seconds(v).filter(|t| *t <= Duration::from_secs(1000))
        })
    };
    let delay = pause("delay")?.unwrap_or(Duration::from_secs(2));
    let max_delay = pause("max-delay")?;
    let policy = Policy {
        retries: settings.number("retries", 0..=1_000_000)?.unwrap_or(5),
        delay,
        max_delay: max_delay.unwrap_or(delay.max(Duration::from_secs(60))),
        exponential: settings.switch("exponential")?.unwrap_or(true),
        time_limit: settings.seconds("time-limit")?,
        errors,
    };
    let next = source.open(write)?;
    if write {
        // What was written before the layer was put there is none of its business any more.
        next.flush()?;
    }
    Ok(Stacked::boxed(Retry {
        next,
        source,
        policy,
        epoch: AtomicU64::new(0),
        begun: AtomicU64::new(0),
        reopening: Mutex::default(),
        over: Condvar::new(),
        unflushed: Unflushed::default(),
        lost: Mutex::default(),
        settling: Mutex::default(),
        is_lost: AtomicBool::new(false),
    }))
}

impl Policy {
    /// Whether the same call may succeed later, or on what is opened anew.
    fn counts(&self, e: &Error) -> bool {
        match e {
            // The peer may be another after the next connect.
            Error::Proto { .. } => self.errors.contains(&libc::EIO),
            other => {
                matches!(other.kind(), ErrorKind::Errno(errno) if self.errors.contains(&errno))
            }
        }
    }

    /// How long to wait before the repetition of that number, from 0.
    fn pause(&self, number: u64) -> Duration {
        let doubled = if self.exponential { number.min(30) as u32 } else { 0 };
        self.delay.saturating_mul(1 << doubled).min(self.max_delay)
    }
}

impl Retry {
    /// Do `work` until it succeeds, fails for good, or was tried often enough.
    fn often<T>(&self, work: impl Fn(&Device) -> Result<T>) -> Result<T> {
        let epoch = self.epoch.load(SeqCst);
        match work(&self.next) {
            Err(e) if self.policy.counts(&e) => self.again(epoch, e, work),
            result => result,
        }
    }

    #[cold]
    fn again<T>(
        &self,
        mut epoch: u64,
        mut failure: Error,
        work: impl Fn(&Device) -> Result<T>,
    ) -> Result<T> {
        let begun = Instant::now();
        let end = self.policy.time_limit.and_then(|limit| begun.checked_add(limit));
        let (mut tries, mut reopening) = (0, None);
        while tries < self.policy.retries {
            log(Level::Warn, format_args!("layer 'retry': {failure}: will be tried again"));
            match self.reopened_since(epoch, self.policy.pause(tries), end) {
                Outcome::Done => {}
                Outcome::Failed(why) => {
                    log(Level::Warn, format_args!("layer 'retry': opening anew: {why}"));
                    (tries, reopening) = (tries + 1, Some(why));
                    continue;
                }
                Outcome::TooLate => break,
                Outcome::Never(e) => {
                    reopening = Some(e.to_string());
                    break;
                }
            }
            (tries, reopening) = (tries + 1, None);
            epoch = self.epoch.load(SeqCst);
            match work(&self.next) {
                Err(e) if self.policy.counts(&e) => failure = e,
                result => return result,
            }
        }
        Err(self.given_up(failure, tries, begun.elapsed(), reopening))
    }

    /// The failure of a call that is not repeated any more, with what was done about it.
    fn given_up(&self, e: Error, tries: u64, took: Duration, reopening: Option<String>) -> Error {
        let ErrorKind::Errno(errno) = e.kind() else { return e };
        if tries == 0 && reopening.is_none() {
            return e;
        }
        let mut what = format!(
            "layer 'retry' has given up after {tries} more tries in {:.1} s",
            took.as_secs_f64()
        );
        if let Some(why) = reopening {
            what += &format!(" (what is below can not be opened anew: {why})");
        }
        what += &format!(": {e}");
        Error::Refused { file: self.source.name().clone(), what, errno }
    }

    /// Wait until what is below was opened anew since `epoch`, or do it.
    fn reopened_since(&self, epoch: u64, pause: Duration, end: Option<Instant>) -> Outcome {
        let mut state = self.reopening.lock();
        let tries = state.tries;
        // Whoever is at it is so for this call, too.
        while state.busy && self.epoch.load(SeqCst) == epoch && state.tries == tries {
            match end {
                None => self.over.wait(&mut state),
                Some(end) => {
                    if self.over.wait_until(&mut state, end).timed_out() {
                        return Outcome::TooLate;
                    }
                }
            }
        }
        if self.epoch.load(SeqCst) != epoch {
            return Outcome::Done;
        }
        if state.tries != tries {
            return Outcome::Failed(state.why.clone());
        }
        let until = Instant::now().checked_add(pause);
        if end.is_some_and(|end| until.is_none_or(|until| until > end)) {
            return Outcome::TooLate;
        }
        state.busy = true;
        drop(state);
        // However this ends, the others are told.
        let mut turn = Turn(self, "given up".into());
        std::thread::sleep(pause);
        match self.reopen() {
            Ok(()) => {
                self.epoch.fetch_add(1, SeqCst);
                Outcome::Done
            }
            Err(
                e @ (Error::Policy { .. }
                | Error::Invalid(_)
                | Error::NotSupported(_)
                | Error::BadHandle(_)
                | Error::Forked(_)),
            ) => {
                turn.1 = e.to_string();
                Outcome::Never(e)
            }
            // Whatever it is: it was open before, so it may be again.
            Err(e) => {
                turn.1 = e.to_string();
                Outcome::Failed(e.to_string())
            }
        }
    }

    fn reopen(&self) -> Result<()> {
        let settling = self.settling.lock();
        // Before it is asked what is not flushed: a write that is noted later sees this.
        self.begun.fetch_add(1, SeqCst);
        if self.unflushed.any() {
            let number = self.unflushed.begin();
            match self.next.flush() {
                Ok(()) => self.unflushed.flushed(number),
                Err(e) => {
                    self.note_lost(e);
                    // What is lost is told once.
                    self.unflushed.flushed(number);
                }
            }
        }
        drop(settling);
        self.source.reopen()
    }

    fn note_lost(&self, e: Error) {
        let mut lost = self.lost.lock();
        if matches!(*lost, Lost::No) {
            *lost = Lost::Untold(e);
            self.is_lost.store(true, SeqCst);
        }
    }

    /// Whether a flush has failed: the number of that error.
    fn told(&self) -> Option<i32> {
        if !self.is_lost.load(SeqCst) {
            return None;
        }
        match *self.lost.lock() {
            Lost::Told(errno) => Some(errno),
            _ => None,
        }
    }

    /// Fail if writes may be lost: that a flush tells of it is noted.
    fn nothing_lost(&self) -> Result<()> {
        if !self.is_lost.load(SeqCst) {
            return Ok(());
        }
        let mut lost = self.lost.lock();
        match &*lost {
            Lost::No => Ok(()),
            Lost::Told(errno) => {
                Err(Error::Failed { file: self.source.name().clone(), errno: *errno })
            }
            Lost::Untold(e) => {
                let e = e.clone();
                *lost = Lost::Told(e.errno());
                Err(e)
            }
        }
    }

    /// Flush by `flush`, or by `idle` if nothing was written since the last one. However that ends, it says
    /// nothing of what somebody who opens it anew meanwhile flushes in vain: that is asked behind it, once
    /// `settled` has the lock under which it is noted.
    fn flush_by<'a>(
        &'a self,
        flush: impl FnOnce(&Device) -> Result<()>,
        idle: impl FnOnce() -> Result<()>,
        settled: impl FnOnce() -> Result<MutexGuard<'a, ()>>,
    ) -> Result<()> {
        self.nothing_lost()?;
        let number = if self.unflushed.any() {
            let number = self.unflushed.begin();
            flush(&self.next).map_err(|e| self.tell(e))?;
            Some(number)
        } else {
            idle()?;
            None
        };
        drop(settled()?);
        self.nothing_lost()?;
        if let Some(number) = number {
            self.unflushed.flushed(number);
        }
        Ok(())
    }

    /// Tell that a flush failed: now, and to all who write.
    fn tell(&self, e: Error) -> Error {
        *self.lost.lock() = Lost::Told(e.errno());
        self.is_lost.store(true, SeqCst);
        e
    }

    /// Change something.
    fn change(&self, flags: ReqFlags, work: impl Fn(&Device) -> Result<()>) -> Result<()> {
        if let Some(errno) = self.told() {
            return Err(Error::Failed { file: self.source.name().clone(), errno });
        }
        if flags.has(ReqFlags::FUA) {
            return self.often(work);
        }
        let begun = Cell::new(0);
        loop {
            self.often(|next| {
                begun.set(self.begun.load(SeqCst));
                work(next)
            })?;
            self.unflushed.wrote();
            // Either whoever opens it anew sees the note, or we see that it was begun.
            if self.begun.load(SeqCst) == begun.get() {
                return Ok(());
            }
        }
    }
}

/// The turn of whoever opens anew what is below.
struct Turn<'a>(&'a Retry, String);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.0.reopening.lock();
        state.busy = false;
        state.tries += 1;
        state.why = std::mem::take(&mut self.1);
        drop(state);
        self.0.over.notify_all();
    }
}

impl Layer for Retry {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        // A write may take as long as all its repetitions.
        Caps { cached: false, ..self.next.caps().clone() }
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.often(|next| next.read(buf, offset))
    }
    /// What fails at once is read the long way.
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        match self.next.read_now(buf, offset) {
            Err(e) if self.policy.counts(&e) => Ok(false),
            result => result,
        }
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.change(flags, |next| next.write(buf, offset, flags))
    }
    fn flush(&self) -> Result<()> {
        self.flush_by(Device::flush, || self.often(Device::flush), || Ok(self.settling.lock()))
    }
    /// Without repeating anything: if nothing was written there is nothing to lose.
    fn flush_to_close(&self) -> Result<()> {
        let flush = Device::flush_to_close;
        self.flush_by(
            flush,
            || flush(&self.next),
            || {
                self.settling.try_lock_for(CLOSE).ok_or_else(|| Error::Os {
                    op: "flush",
                    file: self.source.name().clone(),
                    errno: libc::ETIMEDOUT,
                })
            },
        )
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.change(flags, |next| next.zero(offset, count, flags))
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.change(flags, |next| next.trim(offset, count, flags))
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.often(|next| next.cache(offset, count))
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        // By themselves first: of a call that fails some may have been told.
        let (n, some) = self.often(|next| {
            let mut some = [Extent::default(); 32];
            let mut list = ExtentList::new(&mut some);
            next.driver().extents(offset, count, &mut list)?;
            Ok((list.len(), some))
        })?;
        some[..n].iter().for_each(|e| out.push(*e));
        Ok(())
    }
    fn close(&self) -> Result<()> {
        // What a flush has told already is not told again.
        if self.told().is_some() { Ok(()) } else { self.flush_to_close() }
    }
    fn reopened(&self) {
        let mut lost = self.lost.lock();
        if matches!(*lost, Lost::Told(_)) {
            *lost = Lost::No;
            self.is_lost.store(false, SeqCst);
        }
    }
}
