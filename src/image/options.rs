//! `key=value` settings of a call: which keys there are, what each call has a use for, and how
//! values are read. docs/options.md tells them all to the user.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use crate::block::{Error, Result, quoted};
pub use crate::block::{parse_seconds, parse_size};
use crate::crypto::Secret;

/// What a key may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Opening an image.
    Open,
    /// Making a context of an open one.
    Context,
    /// Making an image.
    Create,
    /// Changing an image's size.
    Resize,
    /// Exporting a device.
    Export,
    /// Copying.
    Copy,
    /// Making an internal snapshot.
    Snapshot,
    /// Changing what an image is like.
    Amend,
    /// Putting another image below.
    Rebase,
}

const OPEN: u16 = 1;
const CREATE: u16 = 2;
const RESIZE: u16 = 4;
const EXPORT: u16 = 8;
const COPY: u16 = 16;
const SNAPSHOT: u16 = 32;
const AMEND: u16 = 64;
const REBASE: u16 = 128;

/// Every key, with the calls that have a use for it.
const KEYS: &[(&str, u16)] = &[
    ("argv", OPEN),
    ("backing-file", OPEN | CREATE | AMEND),
    ("backing-fmt", OPEN | CREATE | AMEND | REBASE),
    ("bitmap", EXPORT),
    ("cache.l2-size", OPEN),
    ("cipher-alg", CREATE),
    ("cipher-mode", CREATE),
    ("cluster-size", CREATE),
    ("compare", COPY),
    ("compat", CREATE | AMEND),
    ("compress", COPY),
    ("compression-type", CREATE),
    ("data-file", OPEN | CREATE),
    ("data-file-raw", CREATE | AMEND),
    ("date", SNAPSHOT),
    ("description", EXPORT),
    ("encrypt.cipher-alg", CREATE),
    ("encrypt.cipher-mode", CREATE),
    ("encrypt.format", CREATE),
    ("encrypt.hash-alg", CREATE),
    ("encrypt.iter-time", CREATE | AMEND),
    ("encrypt.ivgen-alg", CREATE),
    ("encrypt.ivgen-hash-alg", CREATE),
    ("encrypt.keyslot", AMEND),
    ("encrypt.new-secret", AMEND),
    ("encrypt.new-secret-file", AMEND),
    ("encrypt.old-secret", AMEND),
    ("encrypt.old-secret-file", AMEND),
    ("encrypt.state", AMEND),
    ("encryption", CREATE),
    ("exclusive", CREATE),
    ("extended-l2", CREATE),
    ("format", OPEN),
    ("hash-alg", CREATE),
    ("icount", SNAPSHOT),
    ("id", SNAPSHOT),
    ("implicit-open", OPEN),
    ("io", OPEN),
    ("iter-time", CREATE | AMEND),
    ("ivgen-alg", CREATE),
    ("ivgen-hash-alg", CREATE),
    ("key", OPEN | CREATE | AMEND),
    ("key-file", OPEN | CREATE | AMEND),
    ("keyslot", AMEND),
    ("layers", OPEN),
    ("lazy-refcounts", CREATE | AMEND),
    ("lock", OPEN | CREATE),
    ("lock-adopt", OPEN),
    ("lock-exclusive", OPEN),
    ("lock-manager", OPEN | CREATE),
    ("lock-manager-timeout", OPEN | CREATE),
    ("lock-owner", OPEN | CREATE),
    ("lock-owner-uuid", OPEN | CREATE),
    ("lock-wait", OPEN | CREATE),
    ("nbd.activation", OPEN),
    ("nbd.busy-poll", OPEN),
    ("nbd.connect-timeout", OPEN),
    ("nbd.connections", OPEN),
    ("nbd.contexts", OPEN),
    ("nbd.export", OPEN),
    ("nbd.reconnect", OPEN),
    ("nbd.timeout", OPEN),
    ("new-secret", AMEND),
    ("new-secret-file", AMEND),
    ("old-secret", AMEND),
    ("old-secret-file", AMEND),
    ("preallocation", CREATE | RESIZE),
    ("refcount-bits", CREATE | AMEND),
    ("snapshot", OPEN),
    ("sparse", COPY),
    ("state", AMEND),
    ("target-is-zero", COPY),
    ("threads", COPY | REBASE),
    ("tls", OPEN),
    ("tls-ca", OPEN),
    ("tls-certificate", OPEN),
    ("tls-certificates", OPEN),
    ("tls-hostname", OPEN),
    ("tls-key", OPEN),
    ("tls-psk-file", OPEN),
    ("tls-verify-peer", OPEN),
    ("vm-clock", SNAPSHOT),
];

/// The layer whose setting `key` would be, if there is one of that name.
fn of_layer(key: &str) -> Option<&str> {
    let (layer, _) = key.split_once('.')?;
    crate::layer::find(layer).map(|kind| kind.name)
}

/// Settings for a call. Keys are kept in lower case with hyphens; values are bytes, which are wiped
/// when they go, since some are passphrases.
#[derive(Clone, Default)]
pub struct Options(BTreeMap<String, Secret>);

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Options {
    /// No settings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Set `key` to a copy of `value`, or remove it. An underscore in a key is the same as a hyphen.
    pub fn set(&mut self, key: &str, value: Option<&[u8]>) {
        let key = key.replace('_', "-");
        match value {
            Some(v) => drop(self.0.insert(key, Secret::new(v.to_vec()))),
            None => drop(self.0.remove(&key)),
        }
    }

    /// [`Options::set`] in a chain.
    pub fn with(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.set(key, Some(value.as_ref()));
        self
    }

    /// Refuse keys that there are not, or that a call has no use for.
    pub(crate) fn check(&self, what: Use) -> Result<()> {
        let bit = match what {
            Use::Open => OPEN,
            Use::Context => 0,
            Use::Create => CREATE,
            Use::Resize => RESIZE,
            Use::Export => EXPORT,
            Use::Copy => COPY,
            Use::Snapshot => SNAPSHOT,
            Use::Amend => AMEND,
            Use::Rebase => REBASE,
        };
        for full in self.0.keys() {
            let mut key = full.as_str();
            while what == Use::Open
                && let Some(rest) = key.strip_prefix("backing.")
            {
                key = rest;
            }
            // What it means is the manager's to know.
            if bit & (OPEN | CREATE) != 0 && full.starts_with("lock-manager.") {
                continue;
            }
            // And the plugin's.
            if what == Use::Open && key.strip_prefix("plugin.").is_some_and(|key| !key.is_empty()) {
                continue;
            }
            match KEYS.iter().find(|(k, _)| *k == key) {
                Some((_, uses)) if uses & bit != 0 => {}
                Some(_) => {
                    return Err(Error::invalid(format!(
                        "option {} has no use here ({})",
                        quoted(full.as_bytes()),
                        match what {
                            Use::Open => "opening",
                            Use::Context => "making a context",
                            Use::Create => "creating",
                            Use::Resize => "resizing",
                            Use::Export => "exporting",
                            Use::Copy => "copying",
                            Use::Snapshot => "making a snapshot",
                            Use::Amend => "amending",
                            Use::Rebase => "rebasing",
                        }
                    )));
                }
                None => {
                    let option = quoted(full.as_bytes());
                    let layer = of_layer(key).filter(|_| what == Use::Open);
                    return Err(Error::invalid(match layer {
                        Some(layer) => format!(
                            "option {option} has no use here (there is no layer '{layer}' in the option \
                             'layers')"
                        ),
                        None => format!(
                            "unknown option {option}; the nearest known one is '{}'",
                            nearest(key, bit)
                        ),
                    }));
                }
            }
        }
        Ok(())
    }

    /// Refuse keys that this call has a use for, but not with `what`.
    pub(crate) fn refuse(&self, what: &str, keys: &[&[&str]]) -> Result<()> {
        match keys.iter().copied().flatten().find(|key| self.get(key).is_some()) {
            Some(key) => Err(Error::invalid(format!("option '{key}' has no use here ({what})"))),
            None => Ok(()),
        }
    }

    /// The settings of the backing image: what stands behind `backing.`.
    pub(crate) fn for_backing(&self) -> Self {
        Self(
            self.0
                .iter()
                .filter_map(|(k, v)| Some((k.strip_prefix("backing.")?.to_owned(), v.clone())))
                .collect(),
        )
    }

    /// Take away the settings whose keys begin with `prefix`, by what follows it.
    pub(crate) fn take_prefix(&mut self, prefix: &str) -> Vec<(String, Vec<u8>)> {
        // An image's own setting (`cache.l2-size`) is none of a layer that is called like its group.
        let theirs = |k: &str| k.starts_with(prefix) && KEYS.iter().all(|(known, _)| *known != k);
        let short = |k: &str| k[prefix.len()..].to_owned();
        let of_them = self.0.iter().filter(|(k, _)| theirs(k));
        let taken = of_them.map(|(k, v)| (short(k), v.as_slice().to_vec())).collect();
        self.0.retain(|k, _| !theirs(k));
        taken
    }

    /// All settings, by key.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.with_prefix("")
    }

    /// All but what is said of the backing image.
    pub(crate) fn without_backing(&self) -> Self {
        let of_backing =
            |k: &str| matches!(k, "backing-file" | "backing-fmt") || k.starts_with("backing.");
        let rest = self.0.iter().filter(|(k, _)| !of_backing(k));
        Self(rest.map(|(k, v)| (k.clone(), v.clone())).collect())
    }

    /// The settings whose keys begin with `prefix`, by what follows it.
    pub(crate) fn with_prefix<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.0.iter().filter_map(move |(k, v)| Some((k.strip_prefix(prefix)?, v.as_slice())))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.0.get(key).map(|v| v.as_slice())
    }

    /// The value of `key` as a name of a file.
    pub(crate) fn os(&self, key: &str) -> Option<&OsStr> {
        self.get(key).map(OsStr::from_bytes)
    }

    /// The value of `key` as text.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key).map(|v| std::str::from_utf8(v).map_err(|_| bad(key, v, "text"))).transpose()
    }

    /// The value of `key` as one of `names`: its place among them.
    pub(crate) fn one_of(&self, key: &str, names: &[&str]) -> Result<Option<usize>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        match names.iter().position(|n| n.as_bytes() == v) {
            Some(i) => Ok(Some(i)),
            None => Err(bad(key, v, &names.join(", "))),
        }
    }

    /// The value of `key` as a switch.
    pub(crate) fn switch(&self, key: &str) -> Result<Option<bool>> {
        Ok(self.one_of(key, &["off", "on"])?.map(|i| i == 1))
    }

    /// The value of `key` as a time in seconds.
    pub(crate) fn seconds(&self, key: &str) -> Result<Option<Duration>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        let time = std::str::from_utf8(v).ok().and_then(parse_seconds);
        time.map(Some).ok_or_else(|| bad(key, v, "seconds such as 5 or 0.5"))
    }

    /// The value of `key` as a whole number.
    pub(crate) fn number(&self, key: &str, range: RangeInclusive<u32>) -> Result<Option<u32>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        let number = std::str::from_utf8(v).ok().and_then(|v| v.parse().ok());
        number.filter(|n| range.contains(n)).map(Some).ok_or_else(|| {
            bad(key, v, &format!("a number from {} to {}", range.start(), range.end()))
        })
    }

    /// The value of `key` as a whole number of any size.
    pub(crate) fn whole(&self, key: &str) -> Result<Option<u64>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        let number = std::str::from_utf8(v).ok().and_then(|v| v.parse().ok());
        number.map(Some).ok_or_else(|| bad(key, v, "a whole number"))
    }

    /// The value of `key` as a moment: seconds since 1970, with up to nine digits of a fraction.
    pub(crate) fn date(&self, key: &str) -> Result<Option<(u64, u32)>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        let parse = |text: &str| {
            let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
            let digits = fraction.bytes().all(|b| b.is_ascii_digit());
            let fits = (1..=9).contains(&fraction.len()) && digits;
            Some((whole.parse().ok()?, format!("{fraction:0<9}").parse().ok().filter(|_| fits)?))
        };
        let date = std::str::from_utf8(v).ok().and_then(parse);
        date.map(Some).ok_or_else(|| bad(key, v, "seconds since 1970 such as 1700000000.5"))
    }

    /// The value of `key` as a size in bytes.
    pub(crate) fn size(&self, key: &str) -> Result<Option<u64>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        let size = std::str::from_utf8(v).ok().and_then(parse_size);
        size.map(Some).ok_or_else(|| bad(key, v, "a size such as 512, 64k, 2M, 1G"))
    }
}

fn bad(key: &str, value: &[u8], expected: &str) -> Error {
    Error::invalid(format!("option '{key}': found {}, expected {expected}", quoted(value)))
}

/// The known key, with a use of `bit`, that takes the fewest edits to reach.
fn nearest(key: &str, bit: u16) -> &'static str {
    let usable = || KEYS.iter().filter(|(_, uses)| uses & bit != 0 || bit == 0);
    let short: &str = key.get(..key.len().min(64)).unwrap_or("");
    usable().min_by_key(|(k, _)| distance(k, short)).map_or("", |(k, _)| k)
}

/// Levenshtein distance in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.bytes().enumerate() {
            let next = (diagonal + usize::from(ca != cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_key_is_answered_with_the_nearest() {
        let e = Options::new().with("clutser_size", "1").check(Use::Create).unwrap_err();
        assert!(e.to_string().contains("'cluster-size'"), "{e}");
        let e = Options::new().with("compat", "1.1").check(Use::Open).unwrap_err();
        assert!(e.to_string().contains("no use"), "{e}");
        Options::new().with("backing.backing.io", "mmap").check(Use::Open).unwrap();
    }
}
