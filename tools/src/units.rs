//! Sizes as people write and read them, and names as they can be shown.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Read a size: a whole number, with k, M, G, T, P or E (times 1024 each) behind it; `10GiB` is the
/// same as `10G`. Also hexadecimal, as in `0x200000`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || "expected a number of bytes, or a size such as 64k, 2M, 10G".to_owned();
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).map_err(|_| wrong());
    }
    let short = match text.strip_suffix("iB") {
        Some(short) if short.ends_with(|c: char| c.is_ascii_alphabetic()) => short,
        _ => text,
    };
    qblk::image::parse_size(short).ok_or_else(wrong)
}

/// A size that is not 0.
pub fn parse_nonzero_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("expected more than 0".into()),
        size => Ok(size),
    }
}

/// One byte: `0` to `255`, or hexadecimal as in `0x5a`.
pub fn parse_byte(text: &str) -> Result<u8, String> {
    let value = match text.strip_prefix("0x") {
        Some(hex) => u8::from_str_radix(hex, 16),
        None => text.parse(),
    };
    value.map_err(|_| "expected a byte: 0 to 255, or 0x00 to 0xff".to_owned())
}

/// A size in the largest unit that leaves a number of at least 1: `10 GiB`, `1.5 MiB`, `512 bytes`.
pub fn human(bytes: u64) -> String {
    let power = (63 - bytes.max(1).leading_zeros() as usize) / 10;
    let unit = 1u64 << (10 * power);
    if bytes.is_multiple_of(unit) {
        return match bytes {
            1 => "1 byte".into(),
            _ => format!("{} {}", bytes / unit, UNITS[power]),
        };
    }
    let value = bytes as f64 / unit as f64;
    let digits = if value < 10.0 { 2 } else { 1 };
    let text = format!("{value:.digits$}");
    // 1.00 would claim to be exact.
    let text =
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    let about = if text.contains('.') { "" } else { "~" };
    format!("{about}{text} {}", UNITS[power])
}

/// `10 GiB (10737418240 bytes)`.
pub fn human_and_exact(bytes: u64) -> String {
    match bytes {
        0..1024 => human(bytes),
        _ => format!("{} ({bytes} bytes)", human(bytes)),
    }
}

/// A share in per cent, such that only nothing is 0 % and only everything is 100 %.
pub fn percent(part: u64, whole: u64) -> String {
    if part == 0 || whole == 0 {
        return "0 %".into();
    }
    if part >= whole {
        return "100 %".into();
    }
    match part as f64 / whole as f64 * 100.0 {
        share if share < 0.1 => "< 0.1 %".into(),
        share if share < 10.0 => format!("{share:.1} %"),
        share if share > 99.9 => "> 99.9 %".into(),
        share if share > 99.0 => format!("{share:.1} %"),
        share => format!("{share:.0} %"),
    }
}

/// A name fit for a terminal or a picture: what is not text is replaced.
pub fn shown(name: &OsStr) -> String {
    shown_bytes(name.as_bytes())
}

/// [`shown`], for bytes.
pub fn shown_bytes(name: &[u8]) -> String {
    let replace = |c: char| match c {
        // Bidirectional controls can make a name read as another.
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        c if c.is_control() => '\u{fffd}',
        c => c,
    };
    String::from_utf8_lossy(name).chars().map(replace).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(parse_size("10G"), Ok(10 << 30));
        assert_eq!(parse_size("10GiB"), Ok(10 << 30));
        assert_eq!(parse_size("0x10000"), Ok(65536));
        for bad in ["", "iB", "10iB", "0x", "ten", "1.5G", "-1", "10 G", "18446744073709551616"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert!(parse_nonzero_size("0").is_err());
        assert_eq!(parse_byte("0xff"), Ok(255));
        assert!(parse_byte("256").is_err());
    }

    #[test]
    fn sizes_are_shown_in_a_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) + 1, "~1 MiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "~16 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
        assert_eq!(human_and_exact(1 << 40), "1 TiB (1099511627776 bytes)");
    }

    #[test]
    fn only_nothing_is_no_per_cent_and_only_all_is_a_hundred() {
        assert_eq!(percent(0, 100), "0 %");
        assert_eq!(percent(1, 1 << 40), "< 0.1 %");
        assert_eq!(percent((1 << 40) - 1, 1 << 40), "> 99.9 %");
        assert_eq!(percent(50, 100), "50 %");
        assert_eq!(percent(100, 100), "100 %");
        assert_eq!(percent(0, 0), "0 %");
    }
}
