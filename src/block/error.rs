//! The one error type of the crate, and how it maps to the codes of the C ABI.

use super::Name;

/// What went wrong, with the file, the place, what was found and what was expected.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{file}: {op}: {}", errno_text(*errno))]
    Os {
        /// What was being done.
        op: &'static str,
        /// To what.
        file: Name,
        /// The system's error number, positive.
        errno: i32,
    },
    /// A system call on a range failed.
    #[error("{file}: {op} of {count} bytes at offset {offset}: {}", errno_text(*errno))]
    Io {
        /// What was being done.
        op: &'static str,
        /// To what.
        file: Name,
        /// Where, bytes.
        offset: u64,
        /// How much, bytes.
        count: u64,
        /// The system's error number, positive.
        errno: i32,
    },
    /// An argument means nothing.
    #[error("{0}")]
    Invalid(String),
    /// A range leaves the device.
    #[error("{file}: {count} bytes at offset {offset} leave the device, which has {size} bytes")]
    Range {
        /// The device.
        file: Name,
        /// Where the range begins, bytes.
        offset: u64,
        /// Its length, bytes.
        count: u64,
        /// The device's size, bytes.
        size: u64,
    },
    /// A change through a read-only handle or driver.
    #[error("{0}: opened read-only (QBLK_OPEN_RDWR opens for writing)")]
    ReadOnly(Name),
    /// The image contradicts its format.
    #[error("{file}: image is corrupt: {what}")]
    Corrupt {
        /// The image.
        file: Name,
        /// What was found where, and what was expected.
        what: String,
    },
    /// Not an image of that format.
    #[error("{file}: {what}")]
    Format {
        /// The file.
        file: Name,
        /// What was found and what was expected.
        what: String,
    },
    /// The image needs something that this build lacks.
    #[error("{file}: not supported by this version of libqblk: {what}")]
    Unsupported {
        /// The image.
        file: Name,
        /// The feature by name.
        what: String,
    },
    /// Another process or handle has it.
    #[error("{file}: in use: {what}")]
    Locked {
        /// The file.
        file: Name,
        /// By whom, how.
        what: String,
    },
    /// A lock manager failed, or cannot be loaded.
    #[error("lock manager {name}: {what}: {}", errno_text(*errno))]
    Manager {
        /// By which it is loaded.
        name: Name,
        /// What was being done, or what is wrong with it.
        what: String,
        /// The number that says so, positive.
        errno: i32,
    },
    /// A plugin failed, or did what no plugin may.
    #[error("{file}: {what}: {}", kind_text(*kind))]
    Plugin {
        /// The device.
        file: Name,
        /// Which plugin, what it was called for, and what it says.
        what: String,
        /// The code that it gave.
        kind: ErrorKind,
    },
    /// An NBD peer broke the protocol.
    #[error("{peer}: the peer broke the NBD protocol: {what}")]
    Proto {
        /// The peer.
        peer: Name,
        /// What was found and what was expected.
        what: String,
    },
    /// A peer answered with an error, or cannot be reached.
    #[error("{peer}: {what}: {}", errno_text(*errno))]
    Net {
        /// The peer.
        peer: Name,
        /// What was being done, and what the peer said.
        what: String,
        /// The system's error number, positive.
        errno: i32,
    },
    /// It is encrypted, and no key was given.
    #[error("{0}: encrypted; the option 'key' or 'key-file' must give its passphrase")]
    NeedKey(Name),
    /// The key that was given is not one of its keys.
    #[error("{0}: the passphrase that was given opens none of its key slots")]
    BadKey(Name),
    /// The open policy forbids it.
    #[error("{file}: {what}")]
    Policy {
        /// The file.
        file: Name,
        /// What is forbidden and what would allow it.
        what: String,
    },
    /// The device cannot do it and it cannot be emulated.
    #[error("this device does not support {0}")]
    NotSupported(&'static str),
    /// The handle is no good for this call.
    #[error("{0}")]
    BadHandle(String),
    /// An image can grow no further.
    #[error("{file}: {what}")]
    TooBig {
        /// The image.
        file: Name,
        /// What limit was met.
        what: String,
    },
    /// What a call names can not be had, or is there already.
    #[error("{file}: {what}: {}", errno_text(*errno))]
    Refused {
        /// The image.
        file: Name,
        /// What it is, and what is wrong with it.
        what: String,
        /// The system's error number for that, positive.
        errno: i32,
    },
    /// An earlier flush failed: what was acknowledged before may be lost.
    #[error("{file}: refuses writes since an earlier flush failed ({}); reopen it", errno_text(*errno))]
    Failed {
        /// The image.
        file: Name,
        /// The system's error number of that failure.
        errno: i32,
    },
    /// An image has no such snapshot.
    #[error("{file}: has no snapshot whose ID or name is {which}")]
    NoSnapshot {
        /// The image.
        file: Name,
        /// As it was asked for, quoted.
        which: String,
    },
    /// An image has such a snapshot already.
    #[error("{file}: has a snapshot with the {which} already")]
    SnapshotExists {
        /// The image.
        file: Name,
        /// What is taken, quoted.
        which: String,
    },
    /// Work that a layer does on its own account failed, or what it was needed for.
    #[error("layer '{layer}': {what}: {because}")]
    Layer {
        /// The layer's name.
        layer: &'static str,
        /// What failed, and what to do.
        what: String,
        /// The failure itself; the code is that one's.
        because: Box<Error>,
    },
    /// Whoever was told how far the work is had it stopped.
    #[error("stopped by its caller")]
    Canceled,
    /// The process was forked from the one that opened it.
    #[error("{0}: not usable in a forked child, which may only close what it inherited")]
    Forked(&'static str),
    /// A panic inside, caught.
    #[error("internal error: {0}")]
    Internal(String),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// A code of the C ABI: either the system's number or one of the library's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// `-errno`.
    Errno(i32),
    /// `QBLK_ECORRUPT`.
    Corrupt,
    /// `QBLK_EFORMAT`.
    Format,
    /// `QBLK_EUNSUPPORTED`.
    Unsupported,
    /// `QBLK_ELOCKED`.
    Locked,
    /// `QBLK_ENEEDKEY`.
    NeedKey,
    /// `QBLK_EBADKEY`.
    BadKey,
    /// `QBLK_EPROTO`.
    Proto,
    /// `QBLK_EPOLICY`.
    Policy,
    /// `QBLK_EINTERNAL`.
    Internal,
}

impl ErrorKind {
    /// What a code of the C ABI means; `None` if there is no such code.
    pub fn of_code(code: i32) -> Option<Self> {
        Some(match code {
            -4095..=-1 => Self::Errno(-code),
            -5001 => Self::Corrupt,
            -5002 => Self::Format,
            -5003 => Self::Unsupported,
            -5004 => Self::Locked,
            -5005 => Self::NeedKey,
            -5006 => Self::BadKey,
            -5007 => Self::Proto,
            -5008 => Self::Policy,
            -5009 => Self::Internal,
            _ => return None,
        })
    }
}

impl Error {
    /// The failure of a system call that has just returned; reads `errno`.
    pub fn os(op: &'static str, file: &Name) -> Self {
        Self::Os { op, file: file.clone(), errno: last_errno() }
    }

    /// The failure of a system call on a range that has just returned; reads `errno`.
    pub fn io(op: &'static str, file: &Name, offset: u64, count: u64) -> Self {
        Self::Io { op, file: file.clone(), offset, count, errno: last_errno() }
    }

    /// An image that contradicts its format.
    pub fn corrupt(file: &Name, what: impl Into<String>) -> Self {
        Self::Corrupt { file: file.clone(), what: what.into() }
    }

    /// A file that is not an image of the format asked for.
    pub fn format(file: &Name, what: impl Into<String>) -> Self {
        Self::Format { file: file.clone(), what: what.into() }
    }

    /// A feature that this build lacks.
    pub fn unsupported(file: &Name, what: impl Into<String>) -> Self {
        Self::Unsupported { file: file.clone(), what: what.into() }
    }

    /// A peer that broke the NBD protocol.
    pub fn proto(peer: &Name, what: impl Into<String>) -> Self {
        Self::Proto { peer: peer.clone(), what: what.into() }
    }

    /// A peer that answered with an error, or cannot be reached.
    pub fn net(peer: &Name, what: impl Into<String>, errno: i32) -> Self {
        Self::Net { peer: peer.clone(), what: what.into(), errno }
    }

    /// Something that the open policy forbids.
    pub fn policy(file: &Name, what: impl Into<String>) -> Self {
        Self::Policy { file: file.clone(), what: what.into() }
    }

    /// An argument that means nothing.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid(what.into())
    }

    /// The system's error number, or `EIO` for what is none of the system's.
    pub fn errno(&self) -> i32 {
        match self.kind() {
            ErrorKind::Errno(n) => n,
            _ => libc::EIO,
        }
    }

    /// Which code of the C ABI this is.
    pub fn kind(&self) -> ErrorKind {
        use ErrorKind as K;
        match self {
            Self::Os { errno, .. }
            | Self::Io { errno, .. }
            | Self::Net { errno, .. }
            | Self::Refused { errno, .. }
            | Self::Manager { errno, .. } => K::Errno(*errno),
            Self::Invalid(_) | Self::Range { .. } => K::Errno(libc::EINVAL),
            Self::ReadOnly(_) => K::Errno(libc::EROFS),
            Self::NotSupported(_) => K::Errno(libc::ENOTSUP),
            Self::BadHandle(_) => K::Errno(libc::EBADF),
            Self::TooBig { .. } => K::Errno(libc::EFBIG),
            Self::Failed { .. } => K::Errno(libc::EIO),
            Self::NoSnapshot { .. } => K::Errno(libc::ENOENT),
            Self::SnapshotExists { .. } => K::Errno(libc::EEXIST),
            Self::Canceled => K::Errno(libc::ECANCELED),
            Self::Forked(_) => K::Errno(libc::ECHILD),
            Self::Layer { because, .. } => because.kind(),
            Self::Corrupt { .. } => K::Corrupt,
            Self::Format { .. } => K::Format,
            Self::Unsupported { .. } => K::Unsupported,
            Self::Locked { .. } => K::Locked,
            Self::NeedKey(_) => K::NeedKey,
            Self::BadKey(_) => K::BadKey,
            Self::Plugin { kind, .. } => *kind,
            Self::Proto { .. } => K::Proto,
            Self::Policy { .. } => K::Policy,
            Self::Internal(_) => K::Internal,
        }
    }

    /// Whether the host has no room (left, allowed or addressable) for what was written.
    pub fn is_no_space(&self) -> bool {
        matches!(self.kind(), ErrorKind::Errno(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
    }
}

/// This thread's `errno`.
pub(crate) fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// The text of a code.
fn kind_text(kind: ErrorKind) -> String {
    match kind {
        ErrorKind::Errno(errno) => return errno_text(errno),
        ErrorKind::Corrupt => "the image is corrupt",
        ErrorKind::Format => "not an image of that format",
        ErrorKind::Unsupported => "a feature that is not supported",
        ErrorKind::Locked => "in use",
        ErrorKind::NeedKey => "encrypted, and no key was given",
        ErrorKind::BadKey => "the key does not open it",
        ErrorKind::Proto => "the NBD peer broke the protocol",
        ErrorKind::Policy => "the open policy forbids it",
        ErrorKind::Internal => "internal error",
    }
    .into()
}

/// The system's text for an error number.
fn errno_text(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    // std appends " (os error N)", which says nothing to a C programmer.
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}
