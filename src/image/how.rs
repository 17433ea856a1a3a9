//! What the flags and options of an open ask for, and what can be refused before anything is opened.

use super::{OpenFlags, Options, Use, remote};
use crate::block::{Error, Result};
use crate::file::{self, Locking, Permissions, Policy};

/// Which files that an image names are opened.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Implicit {
    Deny,
    Local,
    Any,
}

/// What kind of thing carries the bytes, as options see it.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Carrier {
    Local,
    Remote,
    Plugin,
}

/// How a file is opened.
pub(super) struct How {
    pub file: file::How,
    pub lock: Locking,
}

/// What can be refused before anything is opened.
///
/// Of `above` is taken what the options do not say about locks.
pub(super) fn check(
    options: &Options,
    flags: OpenFlags,
    carrier: Carrier,
    above: Locking,
) -> Result<How> {
    options.check(Use::Open)?;
    let unknown = flags.0 & !(OpenFlags::ALL | OpenFlags::WRITE_BELOW).0;
    if unknown != 0 {
        return Err(Error::invalid(format!("unknown open flags {unknown:#x}")));
    }
    let write = flags.has(OpenFlags::RDWR);
    if write && flags.has(OpenFlags::SHARED) {
        return Err(Error::invalid("QBLK_OPEN_SHARED is for read-only opens"));
    }
    if flags.has(OpenFlags::CHECK) && flags.has(OpenFlags::INFO_ONLY) {
        return Err(Error::invalid("QBLK_OPEN_CHECK contradicts QBLK_OPEN_INFO_ONLY"));
    }
    if flags.has(OpenFlags::UNTRUSTED) && options.get("format").is_none() {
        return Err(Error::invalid("QBLK_OPEN_UNTRUSTED needs the option 'format'"));
    }
    for key in remote::KEYS {
        if carrier != Carrier::Remote && options.get(key).is_some() {
            return Err(Error::invalid(format!("option '{key}' has no use here (not an NBD URI)")));
        }
    }
    if carrier != Carrier::Plugin
        && let Some((key, _)) = options.with_prefix("plugin.").next()
    {
        let text = format!("option 'plugin.{key}' has no use here (not plugin:PATH)");
        return Err(Error::invalid(text));
    }
    let mmap = options.one_of("io", &["auto", "mmap"])? == Some(1);
    // A description is read through a plain read-only descriptor, whatever else is asked.
    let info = flags.has(OpenFlags::INFO_ONLY);
    let file = file::How {
        write: write && !info,
        direct: flags.has(OpenFlags::DIRECT) && !info,
        mmap: mmap && !info,
    };
    Ok(How { file, lock: locking(options, flags, above)? })
}

/// Refuse a flag that a caller can not have.
pub(super) fn of_a_caller(flags: OpenFlags) -> Result<()> {
    match flags.has(OpenFlags::WRITE_BELOW) {
        true => Err(Error::invalid(format!("unknown open flags {:#x}", OpenFlags::WRITE_BELOW.0))),
        false => Ok(()),
    }
}

/// How the file of an image is locked; see docs/architecture.md for why so.
pub(super) fn locking(options: &Options, flags: OpenFlags, above: Locking) -> Result<Locking> {
    let policy = match options.one_of("lock", &["off", "auto", "on"])? {
        Some(0) => Policy::Off,
        Some(1) => Policy::Auto,
        Some(_) => Policy::On,
        None => above.policy,
    };
    let wait = options.seconds("lock-wait")?.unwrap_or(above.wait);
    let exclusive = options.switch("lock-exclusive")? == Some(true);
    let wanted = match () {
        _ if flags.has(OpenFlags::INFO_ONLY) => Permissions::NONE,
        _ if flags.has(OpenFlags::RDWR) => Permissions::WRITER,
        _ if flags.has(OpenFlags::SHARED) => Permissions::SHARED,
        // Not known yet is treated as raw until probing has told.
        _ => match options.get("format") {
            None | Some(b"raw") => Permissions::RAW_READER,
            Some(_) => Permissions::READER,
        },
    };
    if exclusive && wanted == Permissions::SHARED {
        return Err(Error::invalid("option 'lock-exclusive' contradicts QBLK_OPEN_SHARED"));
    }
    let alone = exclusive && wanted != Permissions::NONE;
    Ok(Locking {
        policy: if flags.has(OpenFlags::NO_LOCK) { Policy::Off } else { policy },
        wanted: if alone { wanted.below().exclusive() } else { wanted },
        wait,
    })
}

pub(super) fn implicit(options: &Options) -> Result<Implicit> {
    Ok(match options.one_of("implicit-open", &["deny", "local", "any"])? {
        Some(0) => Implicit::Deny,
        Some(2) => Implicit::Any,
        _ => Implicit::Local,
    })
}
