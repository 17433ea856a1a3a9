//! `log`: what is called, with what, and what came of it.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::around::{Around, Call, Calls, What};
use super::*;
use crate::log::{Level, log};

pub(super) const KIND: Kind = Kind {
    name: "log",
    about: "log each call: offset, count, flags, result, duration",
    keys: &[
        ("file", "a file that lines are appended to (the library's log)"),
        ("max-size", "the file grows no further than this, bytes (100M)"),
        ("calls", "which: all, or some of read, write, zero, …, as in write+flush (all)"),
        ("level", "of messages to the library's log: error, warn, info, debug, trace (trace)"),
    ],
    writes_below: always,
    open,
};

/// Bytes of a log file, unless said otherwise.
const MAX_SIZE: u64 = 100 << 20;
const LEVELS: [(&str, Level); 5] = [
    ("error", Level::Error),
    ("warn", Level::Warn),
    ("info", Level::Info),
    ("debug", Level::Debug),
    ("trace", Level::Trace),
];

struct Log {
    next: Device,
    calls: Calls,
    to: To,
    /// Lines that found no room, or could not be written.
    dropped: AtomicU64,
}

enum To {
    Library(Level),
    File { file: File, size: AtomicU64, max: u64, full: AtomicBool, failed: AtomicBool },
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let calls = Calls::setting(settings, "calls")?;
    let max = settings.size("max-size")?;
    let level = settings.one_of("level", &LEVELS.map(|l| l.0))?;
    let to = match around::path(settings, "file")? {
        Some(path) => {
            if level.is_some() {
                return Err(settings.bad("level", "none, for the lines go to a file"));
            }
            to_file(&path, max.unwrap_or(MAX_SIZE))?
        }
        None if max.is_some() => {
            return Err(settings.bad("max-size", "none, for the lines go to no file"));
        }
        None => To::Library(level.map_or(Level::Trace, |i| LEVELS[i].1)),
    };
    let next = source.open(write)?;
    let layer = Log { next, calls, to, dropped: AtomicU64::new(0) };
    let (name, size) = (layer.next.name(), layer.next.size());
    layer.line(format_args!("open {name} size={size} write={}", u8::from(write)));
    Ok(around::boxed(layer))
}

fn to_file(path: &Path, max: u64) -> Result<To> {
    let (file, name) = around::file(KIND.name, path, true)?;
    let meta = file.metadata().map_err(|e| around::file_error(KIND.name, "fstat", &name, &e))?;
    let size = AtomicU64::new(meta.len());
    let (full, failed) = (AtomicBool::new(false), AtomicBool::new(false));
    Ok(To::File { file, size, max, full, failed })
}

/// The flags of a call, as the log has them.
struct Flags(ReqFlags);

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (ReqFlags::FUA, "fua"),
            (ReqFlags::MAY_TRIM, "may-trim"),
            (ReqFlags::FAST_ZERO, "fast-zero"),
        ];
        let mut before = " flags=";
        for (_, name) in names.iter().filter(|n| self.0.has(n.0)) {
            write!(f, "{before}{name}")?;
            before = "+";
        }
        Ok(())
    }
}

/// A moment, as UTC.
struct At(Duration);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, rest) = (self.0.as_secs() / 86400, self.0.as_secs() % 86400);
        // Years begin with March here, so that a leap day is the last: 400 of them have 146097 days.
        let days = days + 719_468;
        let (era, day) = (days / 146_097, days % 146_097);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = era * 400 + year + u64::from(month <= 2);
        let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
        let micros = self.0.subsec_micros();
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
    }
}

impl Log {
    /// Log a line. Nobody's call fails because that does.
    fn line(&self, text: fmt::Arguments<'_>) {
        let To::File { file, size, max, full, failed } = &self.to else {
            if let To::Library(level) = self.to {
                log(level, format_args!("layer 'log': {text}"));
            }
            return;
        };
        let now = At(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
        let line = format!("{now} {text}\n");
        let end = size.fetch_add(line.len() as u64, Relaxed).saturating_add(line.len() as u64);
        let line = match end > *max {
            false => line,
            true => {
                // It must not come to be large enough again for what is shorter.
                size.store(u64::MAX / 2, Relaxed);
                self.dropped.fetch_add(1, Relaxed);
                if full.swap(true, Relaxed) {
                    return;
                }
                format!("{now} full: no more is logged here (max-size={max})\n")
            }
        };
        // One call, at the file's end: lines of several threads, and of several logs, stay whole.
        let written = (&*file).write(line.as_bytes());
        if !matches!(written, Ok(n) if n == line.len()) {
            self.dropped.fetch_add(1, Relaxed);
            if !failed.swap(true, Relaxed) {
                let why = written.err().map_or("no room".into(), |e| e.to_string());
                log(Level::Warn, format_args!("layer 'log': lines are lost: {why}"));
            }
        }
    }

    fn call(&self, what: What, began: Instant, result: &Result<()>) {
        let took = began.elapsed().as_secs_f64();
        let What { call, offset, count, flags } = what;
        let result: &dyn fmt::Display = match result {
            Ok(()) => &"ok",
            // It may tell of names from outside.
            Err(e) => &quoted(e.to_string().as_bytes()),
        };
        let name = call.name();
        match call {
            Call::Flush => self.line(format_args!("{name} seconds={took:.6} result={result}")),
            _ => self.line(format_args!(
                "{name} offset={offset} count={count}{} seconds={took:.6} result={result}",
                Flags(flags)
            )),
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.line(format_args!("close {}", self.next.name()));
    }
}

impl Around for Log {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        // Who takes a message, or holds a file, may keep a call waiting.
        Caps { cached: false, ..self.next.caps().clone() }
    }
    fn around(&self, what: What, work: impl FnOnce() -> Result<()>) -> Result<()> {
        if !self.calls.has(what.call) {
            return work();
        }
        let began = Instant::now();
        let result = work();
        self.call(what, began, &result);
        result
    }
    fn at_once(&self, what: What, work: impl FnOnce() -> Result<bool>) -> Result<bool> {
        // One that would wait is made again as a usual read.
        if self.calls.has(what.call) { Ok(false) } else { work() }
    }
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        vec![("log.dropped", self.dropped.load(Relaxed).to_string().into_bytes())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_as_the_calendar_has_them() {
        let at = |seconds, micros: u32| At(Duration::new(seconds, micros * 1000)).to_string();
        // As date -u -d @N says.
        for (seconds, shown) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (951_868_800, "2000-03-01T00:00:00"),
            (1_709_251_199, "2024-02-29T23:59:59"),
            (1_767_225_599, "2025-12-31T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            assert_eq!(at(seconds, 7), format!("{shown}.000007Z"));
        }
    }
}
