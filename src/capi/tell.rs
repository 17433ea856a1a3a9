//! What this room logs: what is done, once per open, close and the like; and each failure.
//!
//! A message costs nothing but a look at the level unless somebody wants it: what it shows is
//! formatted by `Display`, and so not before.

use std::fmt::{self, Display};

use super::*;
use crate::block::quoted;
use crate::log::{Level, log};

/// Something was done to the device or file `name`.
pub(super) fn done(what: &str, name: impl Display, how: impl Display) {
    log(Level::Info, format_args!("{what} {name}{how}"));
}

/// The name of a file, in quotes.
pub(super) struct Name<'a>(pub &'a [u8]);

impl Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&quoted(self.0))
    }
}

/// The name of an open image, in quotes.
pub(super) struct Of<'a>(pub &'a Image);

impl Display for Of<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.property("filename") {
            Ok(Some(name)) => f.write_str(&quoted(&name)),
            _ => f.write_str("a device"),
        }
    }
}

/// Flags of an open, if there are any.
pub(super) struct Flags(pub u32);

impl Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { Ok(()) } else { write!(f, ", flags {:#x}", self.0) }
    }
}
