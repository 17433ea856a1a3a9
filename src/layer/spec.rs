//! How stacks are written: `NAME;key=value;…,NAME,…`, the lowest layer first.

use super::Settings;
use crate::block::{Error, Result, quoted};

/// Layers in a stack, at most.
const MOST: usize = 32;

/// One layer of a stack that is to be.
#[derive(Clone, Debug)]
pub struct Spec {
    /// A layer's name, or the path of a plugin.
    pub name: String,
    /// Its settings.
    pub settings: Settings,
}

/// Read a stack. A comma, a semicolon or a percent sign within a value is written `%2C`, `%3B`, `%25`.
pub fn parse_list(text: &[u8]) -> Result<Vec<Spec>> {
    let all: Vec<_> = text.split(|b| *b == b',').map(parse_one).collect::<Result<_>>()?;
    match all.len() {
        0..=MOST => Ok(all),
        n => Err(Error::invalid(format!("{n} layers: there may be {MOST}"))),
    }
}

fn parse_one(text: &[u8]) -> Result<Spec> {
    let mut parts = text.split(|b| *b == b';');
    let name = decode(parts.next().unwrap_or_default())?;
    let name = String::from_utf8(name).ok().filter(|n| !n.is_empty()).ok_or_else(|| {
        Error::invalid(format!("layers: found {}, expected a name", quoted(text)))
    })?;
    let mut settings = Settings::new(&name);
    for part in parts {
        let i = part.iter().position(|b| *b == b'=').filter(|i| *i > 0).ok_or_else(|| {
            Error::invalid(format!("layer '{name}': found {}, expected key=value", quoted(part)))
        })?;
        let key = std::str::from_utf8(&part[..i])
            .map_err(|_| Error::invalid(format!("layer '{name}': a key that is no text")))?;
        settings.set(key, &decode(&part[i + 1..])?);
    }
    Ok(Spec { name, settings })
}

/// Undo percent encoding.
fn decode(text: &[u8]) -> Result<Vec<u8>> {
    let bad = || Error::invalid(format!("{}: after % stand two hexadecimal digits", quoted(text)));
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&b, tail)) = rest.split_first() {
        rest = tail;
        if b != b'%' {
            out.push(b);
            continue;
        }
        let digits = rest.get(..2).and_then(|d| std::str::from_utf8(d).ok()).ok_or_else(bad)?;
        let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
        out.push(u8::from_str_radix(digits, 16).ok().filter(|_| plain).ok_or_else(bad)?);
        rest = &rest[2..];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacks_are_read_and_nonsense_is_refused() {
        let all = parse_list(b"offset;offset=1M;range=2M,./my%2Clayer.so;a_b=x%3By%25").unwrap();
        assert_eq!(all[0].name, "offset");
        assert_eq!(all[0].settings.size("range").unwrap(), Some(2 << 20));
        assert_eq!(all[1].name, "./my,layer.so");
        assert_eq!(all[1].settings.get("a-b"), Some(&b"x;y%"[..]));
        for bad in ["", "a,", ";x=1", "a;x", "a;=1", "a;x=%4", "a;x=%zz", "a;x=%+1"] {
            assert!(parse_list(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse_list("a,".repeat(40).as_bytes()).is_err());
    }
}
