//! Files that an image names: whether they may be opened (the open policy of docs/abi.md), and where
//! they are.

use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::OpenFlags;
use super::chain::Source;
use super::how::Implicit;
use super::remote::Remote;
use crate::block::*;

/// What an image names another file for.
#[derive(Clone, Copy)]
pub(super) enum Role {
    Backing,
    Data,
}

impl Role {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Backing => "backing file",
            Self::Data => "data file",
        }
    }

    /// What lets an image be opened whose file is not.
    fn settles(self) -> &'static str {
        match self {
            Self::Backing => "QBLK_OPEN_NO_BACKING or the option 'backing-file' settles it",
            Self::Data => "the option 'data-file' settles it",
        }
    }
}

/// A file that an image names, and that may be opened.
pub(super) enum Allowed {
    Path(PathBuf),
    Remote(Remote),
}

impl Allowed {
    /// As a name that the caller gave.
    pub(super) fn source(&self) -> Source<'_> {
        match self {
            Self::Path(path) => Source::Path(path.as_os_str()),
            Self::Remote(remote) => Source::Remote(remote.clone()),
        }
    }
}

/// Refuse what an image names if it must not name anything. `guessing`: its overlay does not record its
/// format.
pub(super) fn may_name(
    name: &Name,
    recorded: &[u8],
    role: Role,
    flags: OpenFlags,
    guessing: bool,
) -> Result<()> {
    let (what, settles, recorded) = (role.name(), role.settles(), quoted(recorded));
    if flags.has(OpenFlags::UNTRUSTED) {
        return Err(Error::policy(
            name,
            format!(
                "names the {what} {recorded}, which QBLK_OPEN_UNTRUSTED does not open; {settles}"
            ),
        ));
    }
    if guessing {
        return Err(Error::policy(
            name,
            format!(
                "its overlay does not record its format, so it must not name the {what} {recorded}; \
                 option backing-fmt says the format"
            ),
        ));
    }
    Ok(())
}

/// What leads to the file that an image names, if the policy lets it be opened.
pub(super) fn allowed(
    name: &Name,
    recorded: &[u8],
    role: Role,
    implicit: Implicit,
) -> Result<Allowed> {
    let what = role.name();
    let denied = |why: &str| {
        Error::policy(
            name,
            format!(
                "names the {what} {}, {why}; option implicit-open, {}",
                quoted(recorded),
                role.settles()
            ),
        )
    };
    if implicit == Implicit::Deny {
        return Err(denied("which implicit-open=deny does not open"));
    }
    if recorded.starts_with(b"plugin:") {
        return Err(Error::policy(
            name,
            format!(
                "names the {what} {}: no image has code loaded, whatever implicit-open says; {}",
                quoted(recorded),
                role.settles()
            ),
        ));
    }
    let bytes = recorded.strip_prefix(b"file:").unwrap_or(recorded);
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(denied("which is no file name"));
    }
    if recorded == bytes && looks_like_uri(bytes) {
        // Never a command: what an image names does not start programs.
        if implicit == Implicit::Any
            && let Ok(Some(remote @ Remote::Uri(_))) = Remote::parse(bytes)
        {
            return Ok(Allowed::Remote(remote));
        }
        return Err(match implicit {
            Implicit::Any => {
                Error::unsupported(name, format!("the {what} {}: not a path", quoted(recorded)))
            }
            _ => denied("which is not a local file"),
        });
    }
    Ok(Allowed::Path(beside(name.as_path(), Path::new(OsStr::from_bytes(bytes)))))
}

/// What an image names is there, but neither a regular file nor a block device.
pub(super) fn none_of_its_kind(e: Error, name: &Name, role: Role) -> Error {
    match e {
        Error::Invalid(what) => {
            Error::policy(name, format!("names a {} that is none: {what}", role.name()))
        }
        e => e,
    }
}

/// Say whose file it was that could not be opened.
pub(super) fn named_error(e: Error, above: &Name, role: Role) -> Error {
    let role = role.name();
    match e {
        Error::Os { op: _, file, errno } => {
            let name =
                format!("{} ({role} of {})", file.as_path().display(), above.as_path().display());
            Error::Os { op: "open", file: Name::from(name), errno }
        }
        Error::Locked { file, what } => {
            let what = format!("{what} ({role} of {})", above.as_path().display());
            Error::Locked { file, what }
        }
        e => e,
    }
}

/// Whether a name that an image gives is something other than a path: `scheme:` before any slash.
fn looks_like_uri(name: &[u8]) -> bool {
    let end = name.iter().position(|&b| b == b'/').unwrap_or(name.len());
    match name[..end].iter().position(|&b| b == b':') {
        None | Some(0) => false,
        Some(i) => name[..i].iter().all(|&b| b.is_ascii_alphanumeric() || b"+-.".contains(&b)),
    }
}

/// A path that an image gives, seen from the directory that the image is in.
pub(super) fn beside(image: &Path, path: &Path) -> PathBuf {
    let image = image.as_os_str().as_bytes();
    let image = Path::new(OsStr::from_bytes(image.strip_prefix(b"file:").unwrap_or(image)));
    match image.parent() {
        Some(dir) if path.is_relative() && !dir.as_os_str().is_empty() => dir.join(path),
        _ => PathBuf::from(std::ffi::OsString::from_vec(path.as_os_str().as_bytes().to_vec())),
    }
}

/// What is not there and begins like a scheme may be one that was misspelt.
pub(super) fn misspelt(e: Error, name: &OsStr) -> Error {
    let Error::Os { errno: errno @ libc::ENOENT, file, .. } = &e else {
        return e;
    };
    let scheme = name.as_bytes().split(|b| *b == b':').next().unwrap_or_default();
    let like_one = scheme.len() < name.len()
        && scheme.first().is_some_and(u8::is_ascii_alphabetic)
        && scheme.iter().all(|b| b.is_ascii_alphanumeric() || b"+-".contains(b));
    if file.as_os_str() != name || !like_one || scheme == b"file" {
        return e;
    }
    let what = format!(
        "open: there is no such file, and no scheme {} (there are file:, mem:, nbd:// and its kin, \
         plugin: and layers:)",
        quoted(scheme)
    );
    Error::Refused { file: file.clone(), what, errno: *errno }
}
