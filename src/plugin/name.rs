//! Names of plugins and of what they are asked for: `plugin:PATH?key=value&…` or `plugin:NAME?…`.

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::block::{Error, Result, quoted};

/// A plugin, and the settings that its name carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginName {
    /// A path if it has a slash; else the name of one that was registered, or a file here.
    pub which: Vec<u8>,
    /// In the order in which they are given.
    pub settings: Vec<(String, Vec<u8>)>,
    /// As it was given, for people: without the settings, of which some may be secret.
    pub shown: Vec<u8>,
}

impl PluginName {
    /// Read a name; `None` if it does not begin with `plugin:`.
    pub fn parse(name: &[u8]) -> Result<Option<Self>> {
        let Some(rest) = name.strip_prefix(b"plugin:") else { return Ok(None) };
        let (path, query) = match rest.iter().position(|&b| b == b'?') {
            Some(at) => (&rest[..at], &rest[at + 1..]),
            None => (rest, &[][..]),
        };
        let bad = |why: &str| {
            let text = "expected plugin:PATH or plugin:NAME, and ?KEY=VALUE&KEY=VALUE behind it";
            // What follows may be a password.
            Error::invalid(format!("{}: {why}; {text}", quoted(&name[..name.len() - query.len()])))
        };
        let which =
            decode(path).ok_or_else(|| bad("a % without two hexadecimal digits behind it"))?;
        if which.is_empty() {
            return Err(bad("no plugin is named"));
        }
        if which.contains(&0) {
            return Err(bad("a NUL byte (%00)"));
        }
        let mut settings = Vec::new();
        for part in query.split(|&b| b == b'&').filter(|p| !p.is_empty()) {
            let at =
                part.iter().position(|&b| b == b'=').ok_or_else(|| bad("a setting without ="))?;
            let text = |part| decode(part).ok_or_else(|| bad("a % without two hexadecimal digits"));
            let (key, value) = (text(&part[..at])?, text(&part[at + 1..])?);
            if key.is_empty() || key.contains(&0) || value.contains(&0) {
                return Err(bad("a setting without a key, or with a NUL byte"));
            }
            let key = String::from_utf8(key).map_err(|_| bad("a key that is no text"))?;
            // As in options.
            settings.push((key.replace('_', "-"), value));
        }
        let shown = [b"plugin:", which.as_slice()].concat();
        Ok(Some(Self { which, settings, shown }))
    }

    /// The file that it is, unless it is one that was registered.
    pub fn path(&self) -> PathBuf {
        let path = PathBuf::from(std::ffi::OsString::from_vec(self.which.clone()));
        // Never looked for along the path of libraries.
        if self.which.contains(&b'/') { path } else { PathBuf::from(".").join(path) }
    }

    /// The same, independent of the working directory and of what is registered later.
    pub fn settled(mut self) -> Self {
        if !super::load::is_registered(&self.which)
            && let Ok(path) = std::path::absolute(self.path())
        {
            self.which = path.into_os_string().into_vec();
        }
        self
    }
}

/// Undo percent-encoding.
fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(&b) = bytes.next() {
        if b == b'%' {
            let mut digit = || char::from(*bytes.next()?).to_digit(16);
            let value = digit()? * 16 + digit()?;
            out.push(value as u8);
        } else {
            out.push(b);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Result<Option<PluginName>> {
        PluginName::parse(name.as_bytes())
    }

    #[test]
    fn names_and_settings_are_taken_apart_and_decoded() {
        assert_eq!(parse("file:x").unwrap(), None);
        let p =
            parse("plugin:./a%3fb.so?size=1M&the_key=a%26b%3D&empty=&size=2M").unwrap().unwrap();
        assert_eq!(p.which, b"./a?b.so");
        let set = |k: &str, v: &str| (k.to_owned(), v.as_bytes().to_vec());
        let all = [set("size", "1M"), set("the-key", "a&b="), set("empty", ""), set("size", "2M")];
        assert_eq!(p.settings, all);
        assert_eq!(p.shown, b"plugin:./a?b.so");
        assert_eq!(parse("plugin:mem").unwrap().unwrap().path(), PathBuf::from("./mem"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_without_telling_secrets() {
        for bad in [
            "plugin:",
            "plugin:?a=b",
            "plugin:a?secret",
            "plugin:a%2",
            "plugin:a%zz?secret=1",
            "plugin:a?=secret",
            "plugin:a?secret=%00",
            "plugin:%00",
            "plugin:a?secret%ff=1",
        ] {
            let e = parse(bad).unwrap_err().to_string();
            assert!(e.contains("expected plugin:PATH"), "{e}");
            assert!(!e.contains("secret"), "{e}");
        }
    }
}
