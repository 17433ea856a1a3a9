//! `delay`: calls take longer.

use std::sync::Arc;
use std::time::Duration;

use super::around::{Around, Call, What};
use super::random::Random;
use super::*;

pub(super) const KIND: Kind = Kind {
    name: "delay",
    about: "let calls take longer, by a fixed or a random time",
    keys: &[
        ("all", "every call below that has no time of its own: 0.5, 20ms, 10ms-50ms"),
        ("read", "reads"),
        ("write", "writes"),
        ("zero", "zeroing"),
        ("trim", "trims"),
        ("flush", "flushes"),
        ("cache", "bringing near"),
        ("extents", "asking for extents"),
        ("open", "opening (not among all)"),
        ("close", "closing what was written (not among all)"),
        ("seed", "random times are the same again with the same number"),
    ],
    writes_below: always,
    open,
};

/// From so long to so long.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Span(Duration, Duration);

struct Delay {
    next: Device,
    /// By [`Call`].
    spans: [Option<Span>; Call::COUNT],
    close: Option<Span>,
    random: Random,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let span = |key: &str| {
        settings.parsed(key, "a time such as 0.5, 20ms or 10ms-50ms, at most 1000s", parse_span)
    };
    let all = span("all")?;
    let mut spans = [None; Call::COUNT];
    for (slot, (_, name)) in spans.iter_mut().zip(Call::ALL) {
        *slot = span(name)?.or(all);
    }
    let random = Random::setting(settings, "seed")?;
    let (opening, close) = (span("open")?, span("close")?);
    let next = source.open(write)?;
    let layer = Delay { next, spans, close, random };
    layer.wait(opening);
    Ok(around::boxed(layer))
}

fn parse_span(text: &str) -> Option<Span> {
    let (from, to) = text.split_once('-').unwrap_or((text, text));
    let (from, to) = (parse_time(from)?, parse_time(to)?);
    (from <= to).then_some(Span(from, to))
}

/// Seconds, or with a unit.
fn parse_time(text: &str) -> Option<Duration> {
    let (number, parts) = [("ms", 1000), ("us", 1_000_000), ("s", 1)]
        .iter()
        .find_map(|(unit, parts)| Some((text.strip_suffix(unit)?, *parts)))
        .unwrap_or((text, 1));
    // Longer is a slip: nothing could be done with the device meanwhile, not even close it.
    Some(parse_seconds(number)? / parts).filter(|t| *t <= Duration::from_secs(1000))
}

impl Delay {
    fn wait(&self, span: Option<Span>) {
        let Some(Span(from, to)) = span else { return };
        let more = if from < to { (to - from).mul_f64(self.random.unit()) } else { Duration::ZERO };
        std::thread::sleep(from + more);
    }
}

impl Around for Delay {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        Caps { cached: false, ..self.next.caps().clone() }
    }
    fn around(&self, what: What, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.wait(self.spans[what.call as usize]);
        work()
    }
    fn at_once(&self, what: What, work: impl FnOnce() -> Result<bool>) -> Result<bool> {
        match self.spans[what.call as usize] {
            None => work(),
            Some(_) => Ok(false),
        }
    }
    fn end(&self) -> Result<()> {
        self.wait(self.close);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units_and_ranges() {
        let ms = Duration::from_millis;
        let span = |from, to| Some(Span(ms(from), ms(to)));
        assert_eq!(parse_span("0.5"), span(500, 500));
        assert_eq!(parse_span("20ms"), span(20, 20));
        assert_eq!(parse_span("1500us-2s"), Some(Span(Duration::from_micros(1500), ms(2000))));
        assert_eq!(parse_span("0"), span(0, 0));
        for bad in ["", "-", "1-", "2-1", "1m", "ms", "-1", "1e3", "1001", "nan", "1-2-3"] {
            assert_eq!(parse_span(bad), None, "{bad}");
        }
    }

    #[test]
    fn random_times_fill_their_range_and_can_be_had_again() {
        let all = |seed: &str| {
            let mut settings = Settings::new("delay");
            settings.set("seed", seed.as_bytes());
            let random = Random::setting(&settings, "seed").unwrap();
            (0..1000).map(|_| random.unit()).collect::<Vec<_>>()
        };
        let some = all("7");
        assert!(some.iter().all(|x| (0.0..1.0).contains(x)));
        for tenth in 0..10 {
            let n = some.iter().filter(|x| (**x * 10.0) as i32 == tenth).count();
            assert!((50..200).contains(&n), "{tenth}: {n}");
        }
        assert!(some == all("7") && some != all("8"));
    }
}
