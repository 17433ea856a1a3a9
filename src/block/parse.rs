//! How sizes and times are written, everywhere.

use std::time::Duration;

/// A time: seconds, with a fraction if there is one.
pub fn parse_seconds(s: &str) -> Option<Duration> {
    let plain = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let seconds: f64 = s.parse().ok().filter(|_| plain)?;
    // Longer than anybody waits, and still a time that can be added to now.
    (seconds <= 1e9).then(|| Duration::from_secs_f64(seconds))
}

/// A size in bytes: a whole number, and one of k, M, G, T, P, E (times 1024 each) behind it.
pub fn parse_size(s: &str) -> Option<u64> {
    let digits = s.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = s[..digits].parse().ok()?;
    let shift = match &s[digits..] {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes_and_limits() {
        assert_eq!(parse_size("64k"), Some(65536));
        assert_eq!(parse_size("1T"), Some(1 << 40));
        assert_eq!(parse_size("15E"), Some(15 << 60));
        for bad in ["", "k", "16E", "-1", "1.5G", "1 G", "0x10", "99999999999999999999"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }
}
