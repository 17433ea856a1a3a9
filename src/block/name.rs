//! Names of files and exports as they appear in messages.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

/// How many bytes of a text from outside a message shows.
const MAX_SHOWN: usize = 256;

/// The name of a device: bytes, not necessarily UTF-8. Cheap to clone; shown quoted.
#[derive(Clone, PartialEq, Eq)]
pub struct Name(Arc<OsStr>);

impl Name {
    /// The name as the system takes it.
    pub fn as_os_str(&self) -> &OsStr {
        &self.0
    }

    /// The name as a path.
    pub fn as_path(&self) -> &Path {
        Path::new(&*self.0)
    }

    /// The name's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl<T: Into<OsString>> From<T> for Name {
    fn from(s: T) -> Self {
        Self(Arc::from(s.into()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&quoted(self.as_bytes()))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text from outside, fit for a message: in quotes, control characters and what is not UTF-8
/// escaped, its length bounded.
pub fn quoted(bytes: &[u8]) -> String {
    let cut = bytes.len() > MAX_SHOWN;
    let mut out = String::with_capacity(bytes.len().min(MAX_SHOWN) + 8);
    out.push('\'');
    for chunk in bytes[..bytes.len().min(MAX_SHOWN)].utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\'' | '\\' => out.extend(['\\', c]),
                // Bidirectional controls can make a message read as another.
                '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => out.extend(c.escape_unicode()),
                c if c.is_control() => out.extend(c.escape_default()),
                c => out.push(c),
            }
        }
        for b in chunk.invalid() {
            out.push_str(&format!("\\x{b:02x}"));
        }
    }
    out.push_str(if cut { "'…" } else { "'" });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_is_escaped_and_bounded() {
        assert_eq!(quoted(b"a\n\x1b[31m\xff'b"), "'a\\n\\u{1b}[31m\\xff\\'b'");
        let long = quoted(&[b'x'; 5000]);
        assert!(long.len() < 300 && long.ends_with('…'), "{long}");
    }
}
