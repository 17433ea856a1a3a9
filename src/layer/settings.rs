//! The settings of one layer: text by key, read as what the layer needs.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::block::{Error, Result, parse_seconds, parse_size, quoted};

/// `key=value` settings, of one layer.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    layer: String,
    pairs: Vec<(String, Vec<u8>)>,
}

impl Settings {
    /// None yet, of the layer of that name (for error texts).
    pub fn new(layer: &str) -> Self {
        Self { layer: layer.to_owned(), pairs: Vec::new() }
    }

    /// Set `key`; what was set before is replaced. An underscore is the same as a hyphen.
    pub fn set(&mut self, key: &str, value: &[u8]) {
        let key = key.replace('_', "-");
        self.pairs.retain(|p| p.0 != key);
        self.pairs.push((key, value.to_vec()));
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.pairs.iter().map(|p| (p.0.as_str(), p.1.as_slice()))
    }

    /// Refuse keys that are not among `known`.
    pub fn check(&self, known: &[(&str, &str)]) -> Result<()> {
        let Some((key, _)) = self.all().find(|(k, _)| known.iter().all(|known| known.0 != *k))
        else {
            return Ok(());
        };
        let keys: Vec<&str> = known.iter().map(|k| k.0).collect();
        let has = match keys.is_empty() {
            true => "it has none".to_owned(),
            false => format!("it has {}", keys.join(", ")),
        };
        Err(Error::invalid(format!(
            "layer '{}' has no setting {}: {has}",
            self.layer,
            quoted(key.as_bytes())
        )))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.pairs.iter().find(|p| p.0 == key).map(|p| p.1.as_slice())
    }

    /// The value of `key` as text.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        let as_text = |v| std::str::from_utf8(v).map_err(|_| self.bad(key, "text"));
        self.get(key).map(as_text).transpose()
    }

    /// The value of `key` as what `parse` makes of it.
    pub fn parsed<T>(
        &self,
        key: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = std::str::from_utf8(value).ok().and_then(parse);
        found.map(Some).ok_or_else(|| self.bad(key, expected))
    }

    /// The value of `key` as a size in bytes.
    pub fn size(&self, key: &str) -> Result<Option<u64>> {
        self.parsed(key, "a size such as 512, 64k, 2M, 1G", parse_size)
    }

    /// The value of `key` as a time in seconds.
    pub fn seconds(&self, key: &str) -> Result<Option<Duration>> {
        self.parsed(key, "seconds such as 5 or 0.5", parse_seconds)
    }

    /// The value of `key` as a switch.
    pub fn switch(&self, key: &str) -> Result<Option<bool>> {
        Ok(self.one_of(key, &["off", "on"])?.map(|i| i == 1))
    }

    /// The value of `key` as a whole number of that range.
    pub fn number(&self, key: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        self.parsed(key, &expected, |v| v.parse().ok().filter(|n| range.contains(n)))
    }

    /// The value of `key` as one of `names`: its place among them.
    pub fn one_of(&self, key: &str, names: &[&str]) -> Result<Option<usize>> {
        self.parsed(key, &names.join(", "), |v| names.iter().position(|n| *n == v))
    }

    /// The value of `key` as a block size in bytes, a power of two from 512 to 64 MiB.
    pub fn block_size(&self, key: &str, default: u64) -> Result<u64> {
        let fits = |n: &u64| n.is_power_of_two() && (512..=64 << 20).contains(n);
        let found =
            self.parsed(key, "a power of two from 512 to 64M", |v| parse_size(v).filter(fits))?;
        Ok(found.unwrap_or(default))
    }

    /// The value of `key` as the name of a file.
    pub fn path(&self, key: &str) -> Option<PathBuf> {
        self.get(key).map(|v| PathBuf::from(OsStr::from_bytes(v)))
    }

    /// The layer that they are of.
    pub fn layer(&self) -> &str {
        &self.layer
    }

    /// The error for a value that means nothing.
    pub fn bad(&self, key: &str, expected: &str) -> Error {
        let found = quoted(self.get(key).unwrap_or_default());
        Error::invalid(format!("layer '{}': {key}: found {found}, expected {expected}", self.layer))
    }

    /// The error for a setting that the layer can not do without.
    pub fn missing(&self, key: &str, example: &str) -> Error {
        Error::invalid(format!("layer '{}' needs the setting '{key}', as in {example}", self.layer))
    }
}
