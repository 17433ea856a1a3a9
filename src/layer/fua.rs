//! `fua`: how FUA is done, whatever the device below does by itself.

use std::sync::Arc;

use super::*;

pub(super) const KIND: Kind = Kind {
    name: "fua",
    about: "not offer FUA, do it by flushing, pass it on, or have it on every change",
    keys: &[("mode", "none, emulate, native or force (none)")],
    writes_below: always,
    open,
};

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    /// There is no FUA here.
    None,
    /// The change, then one flush.
    Emulate,
    /// As the device below does it, which must.
    Native,
    /// On every change, asked for or not; a flush has nothing left to do.
    Force,
}

struct Fua {
    next: Device,
    mode: Mode,
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let mode = match settings.one_of("mode", &["none", "emulate", "native", "force"])? {
        None | Some(0) => Mode::None,
        Some(1) => Mode::Emulate,
        Some(2) => Mode::Native,
        Some(_) => Mode::Force,
    };
    let next = source.open(write)?;
    // Of one that is only read nothing is asked.
    let lacks = match mode {
        _ if !write => None,
        Mode::Emulate if !next.caps().flush => Some("a device that can be flushed"),
        Mode::Native if next.can_fua() != Can::Native => Some("a device with FUA of its own"),
        Mode::Force if next.can_fua() == Can::Not => Some("a device with FUA, or a flush"),
        _ => None,
    };
    if let Some(what) = lacks {
        return Err(settings.bad("mode", &format!("one that this device can do: it takes {what}")));
    }
    if mode == Mode::Force && write {
        // From here on nothing is written that a flush would have to see to; before, something may
        // have been.
        next.flush()?;
    }
    Ok(Stacked::boxed(Fua { next, mode }))
}

impl Fua {
    /// The flags for what is below.
    fn flags(&self, flags: ReqFlags) -> ReqFlags {
        if self.mode == Mode::Force { flags | ReqFlags::FUA } else { flags }
    }
}

impl Layer for Fua {
    fn kind(&self) -> &'static str {
        KIND.name
    }
    fn next(&self) -> &Device {
        &self.next
    }
    fn caps(&self) -> Caps {
        let below = self.next.caps().clone();
        let carried = matches!(self.mode, Mode::Native | Mode::Force);
        Caps {
            fua: carried,
            zero_fua: carried,
            trim_fua: carried,
            fua_by_flush: self.mode == Mode::Emulate,
            // A write that is forced waits for the medium.
            cached: below.cached && self.mode != Mode::Force,
            ..below
        }
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.next.write(buf, offset, self.flags(flags))
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.next.zero(offset, count, self.flags(flags))
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.next.trim(offset, count, self.flags(flags))
    }
    fn flush(&self) -> Result<()> {
        match self.mode {
            // What was acknowledged is on the medium already.
            Mode::Force => Ok(()),
            _ => self.next.flush(),
        }
    }
}
