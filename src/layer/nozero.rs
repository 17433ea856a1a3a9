//! `nozero`: zeroing is not offered, or is writing, or leaves no holes.

use std::sync::Arc;

use super::*;

pub(super) const KIND: Kind = Kind {
    name: "nozero",
    about: "not offer zeroing, do it by writing, or let it leave no holes",
    keys: &[
        ("mode", "none, write, notrim or pass (none)"),
        ("fast", "off: fast zeroing always fails (on)"),
    ],
    writes_below: always,
    open,
};

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    /// Zeroing fails.
    None,
    /// Zeroes are written.
    Write,
    /// As below, but never by a hole.
    NoTrim,
    /// As below.
    Pass,
}

struct NoZero {
    next: Device,
    mode: Mode,
    fast: bool,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let mode = match settings.one_of("mode", &["none", "write", "notrim", "pass"])? {
        None | Some(0) => Mode::None,
        Some(1) => Mode::Write,
        Some(2) => Mode::NoTrim,
        Some(_) => Mode::Pass,
    };
    let fast = settings.switch("fast")?.unwrap_or(true);
    Ok(Stacked::boxed(NoZero { next: source.open(write)?, mode, fast }))
}

impl Layer for NoZero {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        let below = self.next.caps().clone();
        Caps {
            // What the driver does not do is done by writing, unless that is not to be.
            zero: below.zero && matches!(self.mode, Mode::NoTrim | Mode::Pass),
            zero_by_write: below.zero_by_write && self.mode != Mode::None,
            fast_zero: below.fast_zero && self.fast,
            ..below
        }
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        match self.mode {
            Mode::Pass => self.next.zero(offset, count, flags),
            Mode::NoTrim => self.next.zero(offset, count, flags.without(ReqFlags::MAY_TRIM)),
            // Its caps say so already.
            Mode::None | Mode::Write => Err(Error::NotSupported("zeroing")),
        }
    }
}
