//! Image formats: they answer where bytes live, and one data path does the reading for all.
//!
//! A format is a [`Driver`] whose `map` translates. Reading walks `map` down a chain until it meets
//! a driver that carries bytes itself; extents, copy-on-write and (later) zero-copy sending are built
//! on the same walk.

mod crypt;
pub mod luks;
pub mod qcow2;
pub mod raw;
mod walk;

use std::sync::Arc;

use crate::block::*;
use crate::crypto::Secret;
pub use walk::{Found, extents, locate, read};

/// A format that can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The bytes as they are.
    Raw,
    /// QEMU's.
    Qcow2,
    /// Encrypted, version 1.
    Luks,
}

impl Kind {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Luks => "luks",
        }
    }
}

/// What probing found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A format that can be opened; [`Kind::Raw`] if nothing was recognised.
    Known(Kind),
    /// A format of which only the name is known here.
    Foreign(&'static str),
}

/// How a format is opened.
pub struct Params {
    /// For writing too.
    pub write: bool,
    /// Only described: features that this build lacks do not matter.
    pub info_only: bool,
    /// The format was found by probing.
    pub probed: bool,
    /// Bytes of memory for cached tables; `None` = as much as covers the image, within limits.
    pub l2_cache: Option<u64>,
    /// The image is hostile: limits are tight.
    pub untrusted: bool,
    /// The passphrase, if it is encrypted.
    pub key: Option<Secret>,
    /// The internal snapshot to show instead of the active image, by ID or name.
    pub snapshot: Option<Vec<u8>>,
    /// The calls under way on the chain.
    pub calls: Arc<InFlight>,
}

/// What an image says it is backed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingRef {
    /// As recorded.
    pub name: Vec<u8>,
    /// As recorded, if it is.
    pub format: Option<Vec<u8>>,
}

/// The data file that an image says it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataRef {
    /// As recorded, if it is.
    pub name: Option<Vec<u8>>,
}

/// An image whose own file is open, and whose backing image may be attached.
pub enum Opened {
    /// Raw.
    Raw(raw::Raw),
    /// qcow2.
    Qcow2(Box<qcow2::Qcow2>),
    /// LUKS.
    Luks(Box<luks::Luks>),
    /// qcow2, to be checked only.
    Examined(Box<qcow2::check::driver::Examined>),
}

/// The formats that there are, for messages.
pub const EXPECTED: &str = "expected qcow2, luks or raw";

/// The format of that name.
pub fn by_name(name: &str) -> Option<Kind> {
    [Kind::Raw, Kind::Qcow2, Kind::Luks].into_iter().find(|kind| kind.name() == name)
}

/// Bytes that probing looks at.
pub const PROBE_LEN: usize = 512;

/// Find the format of what `file` holds.
pub fn probe(file: &Device) -> Result<Probe> {
    let mut head = [0; PROBE_LEN];
    let len = file.size().min(PROBE_LEN as u64) as usize;
    file.read_slice(&mut head[..len], 0)?;
    Ok(recognise(&head))
}

/// The format whose first 512 bytes these are.
pub fn recognise(head: &[u8; PROBE_LEN]) -> Probe {
    const FOREIGN: &[(usize, &[u8], &str)] = &[
        (0, b"KDMV", "vmdk"),
        (0, b"COWD", "vmdk"),
        (0, b"# Disk DescriptorFile", "vmdk"),
        (0, b"vhdxfile", "vhdx"),
        (0, b"conectix", "vpc"),
        (0x40, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
        (0, b"QED\0", "qed"),
        (0, b"WithoutFreeSpace", "parallels"),
        (0, b"WithouFreSpacExt", "parallels"),
        (0, b"Bochs Virtual HD Image", "bochs"),
        (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
        (0, b"OOOM", "cow"),
    ];
    if head.starts_with(&qcow2::MAGIC) {
        // Version 1 is another format, "qcow".
        return match head[4..8] {
            [0, 0, 0, 1] => Probe::Foreign("qcow (version 1)"),
            _ => Probe::Known(Kind::Qcow2),
        };
    }
    if head.starts_with(&luks::MAGIC) {
        return Probe::Known(Kind::Luks);
    }
    FOREIGN
        .iter()
        .find(|(at, magic, _)| head[*at..].starts_with(magic))
        .map_or(Probe::Known(Kind::Raw), |(_, _, name)| Probe::Foreign(name))
}

/// Open the image in `file`.
pub fn open(kind: Kind, file: Device, params: Params) -> Result<Opened> {
    if params.snapshot.is_some() && kind != Kind::Qcow2 {
        let what = "option 'snapshot' has no use here (its format has no internal snapshots)";
        return Err(Error::invalid(format!("{}: {what}", file.name())));
    }
    Ok(match kind {
        Kind::Raw => Opened::Raw(raw::Raw::new(file, &params)),
        Kind::Qcow2 => Opened::Qcow2(Box::new(qcow2::Qcow2::open(file, params)?)),
        Kind::Luks => Opened::Luks(Box::new(luks::Luks::open(file, params)?)),
    })
}

/// Open the image in `file` for nothing but to be checked.
pub fn open_to_check(kind: Kind, file: Device, params: Params) -> Result<Opened> {
    match kind {
        Kind::Qcow2 => {
            let examined = qcow2::check::driver::Examined::open(file, params.write)?;
            Ok(Opened::Examined(Box::new(examined)))
        }
        Kind::Raw | Kind::Luks => open(kind, file, params),
    }
}

impl Opened {
    /// What the bytes are kept in.
    pub fn name(&self) -> &Name {
        match self {
            Self::Raw(r) => Driver::name(r),
            Self::Qcow2(q) => Driver::name(&**q),
            Self::Luks(l) => Driver::name(&**l),
            Self::Examined(e) => Driver::name(&**e),
        }
    }

    /// What the image says it is backed by.
    pub fn backing(&self) -> Option<&BackingRef> {
        match self {
            Self::Raw(_) | Self::Luks(_) | Self::Examined(_) => None,
            Self::Qcow2(q) => q.backing_ref(),
        }
    }

    /// The data file that the image needs.
    pub fn data(&self) -> Option<DataRef> {
        match self {
            Self::Raw(_) | Self::Luks(_) | Self::Examined(_) => None,
            Self::Qcow2(q) => q.data_ref(),
        }
    }

    /// Put its data file beneath an image that needs one.
    pub fn attach_data(&mut self, data: Device) {
        if let Self::Qcow2(q) = self {
            q.attach_data(data);
        }
    }

    /// Whether its data is encrypted, so that a key is of use.
    pub fn is_encrypted(&self) -> bool {
        match self {
            Self::Raw(_) => false,
            Self::Qcow2(q) => q.is_encrypted(),
            Self::Luks(_) => true,
            Self::Examined(e) => e.is_encrypted(),
        }
    }

    /// Put the image that it stands on beneath it. Only qcow2 stands on others.
    /// `named`: it is the one that the image names.
    pub fn attach(&mut self, below: Device, named: bool) {
        match self {
            Self::Raw(_) | Self::Luks(_) | Self::Examined(_) => {}
            Self::Qcow2(q) => q.attach(below, named),
        }
    }

    /// All of the chain is open: tell the image that it is in use.
    pub fn into_driver(self) -> Result<Box<dyn Driver>> {
        Ok(match self {
            Self::Raw(r) => Box::new(r),
            Self::Luks(l) => l,
            Self::Examined(e) => e,
            Self::Qcow2(q) => {
                q.clear_autoclear()?;
                q
            }
        })
    }
}
