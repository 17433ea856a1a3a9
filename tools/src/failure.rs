//! Why a command failed, and the exit status that this gives.

use std::fmt::Display;
use std::io;

use crate::signals;

/// Exit status of a command that was called wrongly.
pub const USAGE: u8 = 2;

/// Why a command failed.
pub enum Failure {
    /// The library says so.
    Library(qblk::Error),
    /// The tool itself does, in these words.
    Said(String),
    /// The call makes no sense.
    Usage(String),
    /// Whoever read our output has gone. Nobody is left to be told, and it is no mistake.
    OutputGone,
    /// A signal asked us to end; there may be something to say about it.
    Signal(i32, Option<String>),
    /// A command that we ran ended with this status, and has said why itself.
    Command(u8),
}

/// The result of a command or a part of it.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure in our own words.
    pub fn said(text: impl Into<String>) -> Self {
        Self::Said(text.into())
    }

    /// A call that makes no sense.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    /// Input or output on something that is not an image and not standard output.
    pub fn io(what: impl Display, e: &io::Error) -> Self {
        Self::Said(format!("{what}: {}", io_text(e)))
    }

    /// What to tell the user.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Library(e) => Some(e.to_string()),
            Self::Said(text) | Self::Usage(text) => Some(text.clone()),
            Self::OutputGone | Self::Command(_) => None,
            Self::Signal(signal, text) => {
                let name = signals::name(*signal);
                Some(text.as_ref().map_or(name.to_owned(), |text| format!("{name}: {text}")))
            }
        }
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Usage(_) => USAGE,
            Self::Library(e) if is_usage(e) => USAGE,
            Self::Library(_) | Self::Said(_) => 1,
            Self::OutputGone => 0,
            Self::Signal(signal, _) => 128 + *signal as u8,
            Self::Command(status) => *status,
        }
    }
}

/// Whether an error is about what was asked for (an unknown option, a value out of place) rather than
/// about the file: `Invalid` is said of both, and of a file it begins with its quoted name.
fn is_usage(e: &qblk::Error) -> bool {
    matches!(e, qblk::Error::Invalid(text) if !text.starts_with('\''))
}

impl From<qblk::Error> for Failure {
    fn from(e: qblk::Error) -> Self {
        Self::Library(e)
    }
}

/// For `?` on standard output; failures of other files are made with [`Failure::io`].
impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Self::OutputGone,
            _ => Self::io("standard output", &e),
        }
    }
}

/// The system's text, without the number that std appends.
fn io_text(e: &io::Error) -> String {
    let text = e.to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}
