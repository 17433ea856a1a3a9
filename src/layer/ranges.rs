//! Ranges of bytes in settings: `1M-2M`, `1M-`, `-2M`, `1M+512`, `~1M-2M`, several with commas.

use super::Settings;
use crate::block::{Result, parse_size};

/// Ranges in order, which neither overlap nor touch.
#[derive(Debug, PartialEq)]
pub(super) struct Ranges(Vec<(u64, u64)>);

/// How they are to be written.
const EXPECTED: &str = "ranges such as 1M-2M, 1M-, -2M, 1M+512 or ~1M-2M, with commas";
/// In one setting, at most.
const MOST: usize = 1000;

impl Ranges {
    /// What `key` says, if it is set.
    pub(super) fn setting(settings: &Settings, key: &str) -> Result<Option<Self>> {
        settings.parsed(key, EXPECTED, parse)
    }

    /// The parts of these `count` bytes at `offset` that are in here.
    pub(super) fn within(&self, offset: u64, count: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let end = offset.saturating_add(count);
        let first = self.0.partition_point(move |r| r.1 <= offset);
        self.0[first..]
            .iter()
            .take_while(move |r| r.0 < end)
            .map(move |r| (r.0.max(offset), r.1.min(end)))
            .filter(|r| r.0 < r.1)
    }
}

fn parse(text: &str) -> Option<Ranges> {
    let mut all = Vec::new();
    for part in text.split(',') {
        match part.strip_prefix('~') {
            None => all.push(one(part)?),
            Some(kept) => {
                let (from, to) = one(kept)?;
                all.extend([(0, from), (to, u64::MAX)]);
            }
        }
        if all.len() > MOST {
            return None;
        }
    }
    all.retain(|r| r.0 < r.1);
    all.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(all.len());
    for r in all {
        match merged.last_mut() {
            Some(last) if r.0 <= last.1 => last.1 = last.1.max(r.1),
            _ => merged.push(r),
        }
    }
    Some(Ranges(merged))
}

/// One range, which may not be empty: that would be a slip, and protect nothing.
fn one(text: &str) -> Option<(u64, u64)> {
    let (from, to) = if let Some((from, count)) = text.split_once('+') {
        let from = parse_size(from)?;
        (from, from.checked_add(parse_size(count)?)?)
    } else {
        match text.split_once('-')? {
            ("", "") => return None,
            ("", to) => (0, parse_size(to)?),
            (from, "") => (parse_size(from)?, u64::MAX),
            (from, to) => (parse_size(from)?, parse_size(to)?),
        }
    };
    (from < to).then_some((from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_nonsense_is_refused() {
        let read = |text| parse(text).map(|r| r.0);
        assert_eq!(read("1M-2M"), Some(vec![(1 << 20, 2 << 20)]));
        assert_eq!(read("8-,-2,2+2"), Some(vec![(0, 4), (8, u64::MAX)]));
        assert_eq!(read("~4-8"), Some(vec![(0, 4), (8, u64::MAX)]));
        assert_eq!(read("~-8"), Some(vec![(8, u64::MAX)]));
        assert_eq!(read("9-12,1-10,30-31"), Some(vec![(1, 12), (30, 31)]));
        for bad in ["", "-", "4", "8-4", "4-4", "4+0", "1-2,", "~", "a-b", "1-2-3", "15E+15E"] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(read(&vec!["1-2"; 1001].join(",")), None);
    }

    #[test]
    fn what_of_a_range_is_within() {
        let ranges = parse("10-20,30-40").unwrap();
        let within = |offset, count| ranges.within(offset, count).collect::<Vec<_>>();
        assert_eq!(within(0, 10), []);
        assert_eq!(within(0, 11), [(10, 11)]);
        assert_eq!(within(15, 100), [(15, 20), (30, 40)]);
        assert_eq!(within(20, 10), []);
        assert_eq!(within(39, u64::MAX), [(39, 40)]);
        assert_eq!(within(15, 0), []);
    }
}
