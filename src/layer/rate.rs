//! `rate`: so many bytes and requests a second, and no more.
//!
//! Token buckets, kept as the moment at which what was taken so far will have been paid for. Whoever
//! takes something moves that moment on and sleeps until the one before is no further ahead than the
//! burst. So all wait in the order in which they came, nobody holds a lock while he sleeps, and no
//! thread is needed to fill anything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::*;

pub(super) const KIND: Kind = Kind {
    name: "rate",
    about: "limit bytes and requests per second",
    keys: &[
        ("bytes", "bytes per second, read and written together (no limit)"),
        ("read-bytes", "bytes per second that are read (no limit)"),
        ("write-bytes", "bytes per second that are written (no limit)"),
        ("requests", "requests per second, of all kinds (no limit)"),
        ("read-requests", "reads per second (no limit)"),
        ("write-requests", "writes, zeroings and trims per second (no limit)"),
        ("burst", "what was not used for so many seconds may be used at once (1)"),
    ],
    writes_below: always,
    open,
};

/// Longer than this takes nobody who waits for his turn; large requests are done in pieces.
const TURN: u64 = 8;
/// Pieces are multiples of this, bytes.
const PIECE: u64 = 64 << 10;
/// With fewer bytes per second one piece takes longer than 1000 s. That is a slip: nobody can get out of it.
const FEWEST: u64 = PIECE.div_ceil(1000);
const SECOND: u64 = 1_000_000_000;

struct Bucket {
    per_second: u64,
    /// Nanoseconds.
    burst: u64,
    /// When what was taken is paid for, in nanoseconds since the layer was opened.
    paid: Mutex<u64>,
}

impl Bucket {
    /// Take `amount` at the moment `now`: the moment at which it may be used.
    fn take(&self, amount: u64, now: u64) -> u64 {
        let cost = u128::from(amount) * u128::from(SECOND);
        let cost = u64::try_from(cost.div_ceil(self.per_second.into())).unwrap_or(u64::MAX);
        let mut paid = self.paid.lock();
        let begin = now.max(*paid);
        *paid = begin.saturating_add(cost);
        begin.saturating_sub(self.burst).max(now)
    }
}

/// What is limited for one direction, and for both.
struct Limit {
    read: Option<Bucket>,
    write: Option<Bucket>,
    all: Option<Bucket>,
}

#[derive(Clone, Copy)]
enum Way {
    Read,
    Write,
}

impl Limit {
    fn buckets(&self, way: Way) -> impl Iterator<Item = &Bucket> {
        let own = match way {
            Way::Read => &self.read,
            Way::Write => &self.write,
        };
        own.iter().chain(&self.all)
    }
}

struct Rate {
    next: Device,
    began: Instant,
    bytes: Limit,
    requests: Limit,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let burst = settings.seconds("burst")?.unwrap_or(Duration::from_secs(1));
    let burst = u64::try_from(burst.as_nanos()).unwrap_or(u64::MAX);
    let bucket = |key: &str| {
        let fewest = if key.ends_with("bytes") { FEWEST } else { 1 };
        let expected = format!("a number such as 500, 64k, 10M, and {fewest} at least");
        let limit = settings.parsed(key, &expected, |v| parse_size(v).filter(|n| *n >= fewest))?;
        let bucket = |per_second| Bucket { per_second, burst, paid: Mutex::new(0) };
        Ok::<_, Error>(limit.map(bucket))
    };
    let limit = |read, write, all| {
        Ok::<_, Error>(Limit { read: bucket(read)?, write: bucket(write)?, all: bucket(all)? })
    };
    let bytes = limit("read-bytes", "write-bytes", "bytes")?;
    let requests = limit("read-requests", "write-requests", "requests")?;
    let limits = [Way::Read, Way::Write].into_iter();
    if limits.flat_map(|way| bytes.buckets(way).chain(requests.buckets(way))).next().is_none() {
        return Err(settings.missing("bytes", "rate;bytes=10M, or another limit"));
    }
    Ok(Stacked::boxed(Rate { next: source.open(write)?, began: Instant::now(), bytes, requests }))
}

impl Rate {
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Take from one bucket after the other: waiting for one must not keep others from the next.
    fn take(&self, limit: &Limit, way: Way, amount: u64) {
        for bucket in limit.buckets(way) {
            let now = self.now();
            let at = bucket.take(amount, now);
            if at > now {
                std::thread::sleep(Duration::from_nanos(at - now));
            }
        }
    }

    /// How many bytes are taken at a time.
    fn piece(&self, way: Way) -> u64 {
        let each = self.bytes.buckets(way).map(|b| b.per_second / TURN);
        each.min().map_or(u64::MAX, |n| (n - n % PIECE).max(PIECE))
    }

    /// One request, in pieces: `work` is given where in the request a piece begins, and its length.
    fn in_pieces(
        &self,
        way: Way,
        len: usize,
        work: impl Fn(usize, usize) -> Result<()>,
    ) -> Result<()> {
        self.take(&self.requests, way, 1);
        let piece = usize::try_from(self.piece(way)).unwrap_or(usize::MAX);
        let mut at = 0;
        while at < len {
            let n = (len - at).min(piece);
            self.take(&self.bytes, way, n as u64);
            work(at, n)?;
            at += n;
        }
        Ok(())
    }
}

impl Layer for Rate {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        Caps { cached: false, ..self.next.caps().clone() }
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.in_pieces(Way::Read, buf.len(), |at, n| {
            self.next.read(buf.sub(at, n), offset.saturating_add(at as u64))
        })
    }
    fn read_now(&self, _buf: Dst<'_>, _offset: u64) -> Result<bool> {
        // It may have to wait.
        Ok(false)
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.in_pieces(Way::Write, buf.len(), |at, n| {
            self.next.write(buf.sub(at, n), offset.saturating_add(at as u64), flags)
        })
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.take(&self.requests, Way::Write, 1);
        self.next.zero(offset, count, flags)
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.take(&self.requests, Way::Write, 1);
        self.next.trim(offset, count, flags)
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.take(&self.requests, Way::Read, 1);
        self.next.cache(offset, count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(per_second: u64, burst: u64) -> Bucket {
        Bucket { per_second, burst, paid: Mutex::new(0) }
    }

    #[test]
    fn what_is_taken_is_paid_for_in_turn() {
        let b = bucket(100, 0);
        // Each waits for those before, and not for itself.
        assert_eq!(b.take(10, 0), 0);
        assert_eq!(b.take(200, 0), SECOND / 10);
        assert_eq!(b.take(1, 0), SECOND / 10 * 21);
        assert_eq!(b.take(1, SECOND), SECOND / 100 * 211);
        // Nothing is saved up without a burst.
        assert_eq!(b.take(50, 9 * SECOND), 9 * SECOND);
        assert_eq!(b.take(1, 9 * SECOND), SECOND / 2 * 19);
    }

    #[test]
    fn a_burst_is_had_again_after_a_pause() {
        let b = bucket(100, SECOND);
        for _ in 0..2 {
            let begin = 50 * SECOND * (*b.paid.lock()).min(1);
            for _ in 0..100 {
                assert_eq!(b.take(1, begin), begin);
            }
            assert_eq!(b.take(1, begin), begin);
            assert_eq!(b.take(1, begin), begin + SECOND / 100);
        }
    }

    #[test]
    fn absurd_numbers_neither_overflow_nor_stop_the_clock() {
        let b = bucket(1, u64::MAX);
        assert_eq!(b.take(u64::MAX, 5), 5);
        assert_eq!(b.take(u64::MAX, 6), 6);
        let b = bucket(u64::MAX, 0);
        assert_eq!((b.take(1, 0), b.take(1, 0), b.take(1, 9)), (0, 1, 9));
    }
}
