//! `error`: calls fail, by a rule.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::around::{Around, Call, Calls, What};
use super::random::Random;
use super::ranges::Ranges;
use super::*;

pub(super) const KIND: Kind = Kind {
    name: "error",
    about: "let calls fail, by a rule, for tests",
    keys: &[
        ("calls", "which: all, or some of read, write, zero, …, as in write+flush (all)"),
        ("errno", "with which error: EIO, ENOSPC, … or a number (EIO)"),
        ("probability", "how often, of 1 or in per cent: 0.1, 10% (1)"),
        ("every", "only every so many of them (1)"),
        ("after", "only once so many have gone well (0)"),
        ("times", "only so many of them (no limit)"),
        ("range", "only those that touch these bytes, as in 1M-2M (all)"),
        ("file", "only while this file exists"),
        ("seed", "what is random is the same again with the same number"),
    ],
    writes_below: always,
    open,
};

/// Error numbers by name. Others can be given as numbers.
const NAMES: [(&str, i32); 36] = [
    ("EACCES", libc::EACCES),
    ("EAGAIN", libc::EAGAIN),
    ("EBADF", libc::EBADF),
    ("EBADMSG", libc::EBADMSG),
    ("EBUSY", libc::EBUSY),
    ("ECANCELED", libc::ECANCELED),
    ("ECONNREFUSED", libc::ECONNREFUSED),
    ("ECONNRESET", libc::ECONNRESET),
    ("EDQUOT", libc::EDQUOT),
    ("EEXIST", libc::EEXIST),
    ("EFAULT", libc::EFAULT),
    ("EFBIG", libc::EFBIG),
    ("EILSEQ", libc::EILSEQ),
    ("EINTR", libc::EINTR),
    ("EINVAL", libc::EINVAL),
    ("EIO", libc::EIO),
    ("EMFILE", libc::EMFILE),
    ("ENODATA", libc::ENODATA),
    ("ENODEV", libc::ENODEV),
    ("ENOENT", libc::ENOENT),
    ("ENOLINK", libc::ENOLINK),
    ("ENOMEM", libc::ENOMEM),
    ("ENOSPC", libc::ENOSPC),
    ("ENOTCONN", libc::ENOTCONN),
    ("ENOTSUP", libc::ENOTSUP),
    ("ENXIO", libc::ENXIO),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
    ("EOVERFLOW", libc::EOVERFLOW),
    ("EPERM", libc::EPERM),
    ("EPIPE", libc::EPIPE),
    ("EREMOTEIO", libc::EREMOTEIO),
    ("EROFS", libc::EROFS),
    ("ESHUTDOWN", libc::ESHUTDOWN),
    ("ESTALE", libc::ESTALE),
    ("ETIMEDOUT", libc::ETIMEDOUT),
    ("EUCLEAN", libc::EUCLEAN),
];
/// The largest that the kernel has.
const MAX_ERRNO: i32 = 4095;

struct Failing {
    next: Device,
    rule: Rule,
}

struct Rule {
    calls: Calls,
    errno: i32,
    probability: f64,
    every: u64,
    after: u64,
    times: u64,
    ranges: Option<Ranges>,
    file: Option<PathBuf>,
    random: Random,
    /// Calls that it was about.
    met: AtomicU64,
    /// Those of them that failed.
    failed: AtomicU64,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let errno = settings.parsed("errno", "a name such as EIO, or a number", parse_errno)?;
    let probability = settings.parsed("probability", "0 to 1, or 0% to 100%", parse_probability)?;
    let number = |key, least, default| {
        Ok::<_, Error>(settings.number(key, least..=u64::MAX)?.unwrap_or(default))
    };
    let rule = Rule {
        calls: Calls::setting(settings, "calls")?,
        errno: errno.unwrap_or(libc::EIO),
        probability: probability.unwrap_or(1.0),
        every: number("every", 1, 1)?,
        after: number("after", 0, 0)?,
        times: number("times", 0, u64::MAX)?,
        ranges: Ranges::setting(settings, "range")?,
        file: around::path(settings, "file")?,
        random: Random::setting(settings, "seed")?,
        met: AtomicU64::new(0),
        failed: AtomicU64::new(0),
    };
    Ok(around::boxed(Failing { next: source.open(write)?, rule }))
}

fn parse_errno(text: &str) -> Option<i32> {
    let named = NAMES.iter().find(|n| n.0.eq_ignore_ascii_case(text)).map(|n| n.1);
    named.or_else(|| text.parse().ok().filter(|n| (1..=MAX_ERRNO).contains(n)))
}

fn parse_probability(text: &str) -> Option<f64> {
    let (number, most) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 100.0));
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let p: f64 = number.parse().ok().filter(|_| plain)?;
    (p <= most).then(|| p / most)
}

impl Rule {
    /// Whether a call is to fail.
    fn strikes(&self, what: What) -> bool {
        if !self.calls.has(what.call) {
            return false;
        }
        // A flush has no range: a rule that has one is not about it.
        if let Some(ranges) = &self.ranges
            && ranges.within(what.offset, what.count).next().is_none()
        {
            return false;
        }
        if self.file.as_ref().is_some_and(|file| std::fs::symlink_metadata(file).is_err()) {
            return false;
        }
        let Some(nth) = (self.met.fetch_add(1, Relaxed) + 1).checked_sub(self.after) else {
            return false;
        };
        if nth == 0 || !nth.is_multiple_of(self.every) {
            return false;
        }
        if self.probability < 1.0 && self.random.unit() >= self.probability {
            return false;
        }
        let counted = |n| (n < self.times).then_some(n + 1);
        self.failed.fetch_update(Relaxed, Relaxed, counted).is_ok()
    }
}

impl Failing {
    fn error(&self, what: What) -> Error {
        let call = what.call.name();
        let place = match what.call {
            Call::Flush => String::new(),
            _ => format!(" of {} bytes at offset {}", what.count, what.offset),
        };
        Error::Refused {
            file: self.next.name().clone(),
            what: format!("layer 'error': {call}{place} was made to fail"),
            errno: self.rule.errno,
        }
    }
}

impl Around for Failing {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn around(&self, what: What, work: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.rule.strikes(what) { Err(self.error(what)) } else { work() }
    }
    fn at_once(&self, what: What, work: impl FnOnce() -> Result<bool>) -> Result<bool> {
        // Each read is to meet the rule once.
        if self.rule.calls.has(what.call) { Ok(false) } else { work() }
    }
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        let text = |n: &AtomicU64| n.load(Relaxed).to_string().into_bytes();
        vec![("error.calls", text(&self.rule.met)), ("error.errors", text(&self.rule.failed))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_errno("EIO"), Some(libc::EIO));
        assert_eq!(parse_errno("enospc"), Some(libc::ENOSPC));
        assert_eq!(parse_errno("4095"), Some(4095));
        for bad in ["", "0", "-5", "4096", "ENOTHING", "99999999999"] {
            assert_eq!(parse_errno(bad), None, "{bad}");
        }
        assert_eq!(parse_probability("25%"), Some(0.25));
        assert_eq!(parse_probability("0.125"), Some(0.125));
        assert_eq!(parse_probability("0"), Some(0.0));
        for bad in ["", "%", "1.1", "101%", "-1", "inf", "nan", "1e-3", ".", "1.2.3"] {
            assert_eq!(parse_probability(bad), None, "{bad}");
        }
        let sorted = NAMES.windows(2).all(|w| w[0].0 < w[1].0);
        assert!(sorted);
    }
}
