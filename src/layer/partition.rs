//! `partition`: one partition of a disk, by its number.
//!
//! The table is read once, when the layer is opened. It comes from whoever made the disk: what of it is
//! used is checked first, walks over it are bounded, and a partition that is not wholly on the disk is
//! refused. A disk whose MBR says that there is a GPT (a "protective" entry) is read by that or not at
//! all: what the MBR has beside it is for machines that know no better.

mod gpt;
mod mbr;

use std::sync::Arc;

use super::offset::Window;
use super::*;
use crate::log::{Level, log};

pub(super) const KIND: Kind = Kind {
    name: "partition",
    about: "one partition of a disk (MBR, GPT)",
    keys: &[
        ("partition", "its number, from 1; logical partitions of an MBR are numbered from 5"),
        ("sector-size", "bytes of a sector: 512, 4096 (found out for GPT, else 512)"),
    ],
    writes_below: always,
    open,
};

/// A disk, read by sectors.
struct Disk<'a> {
    dev: &'a Device,
    /// Bytes.
    sector: u64,
}

/// A partition, in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    start: u64,
    count: u64,
    /// What the table tells of it, as properties.
    about: Vec<(&'static str, Vec<u8>)>,
}

impl Disk<'_> {
    /// Sectors of the disk.
    fn sectors(&self) -> u64 {
        self.dev.size() / self.sector
    }

    /// One sector, if the disk has it.
    fn read(&self, number: u64) -> Result<Vec<u8>> {
        if number >= self.sectors() {
            let (has, size) = (self.sectors(), self.sector);
            return Err(self.refuse(format!(
                "the table leads to sector {number}: the disk has {has} of {size} bytes"
            )));
        }
        let mut bytes = vec![0; self.sector as usize];
        self.dev.read_slice(&mut bytes, number * self.sector)?;
        Ok(bytes)
    }

    fn refuse(&self, what: impl Into<String>) -> Error {
        Error::format(self.dev.name(), what)
    }

    /// The error for a number that no partition has.
    fn none(&self, number: u32, table: &str, there: &[u32]) -> Error {
        let there: Vec<String> = there.iter().take(16).map(u32::to_string).collect();
        let has = match there.len() {
            0 => "has no partitions".to_owned(),
            16 => format!("has {}, …", there.join(", ")),
            _ => format!("has {}", there.join(", ")),
        };
        self.refuse(format!("there is no partition {number}: its table ({table}) {has}"))
    }
}

fn open(settings: &Settings, source: Arc<dyn Source>, write: bool) -> Result<Box<dyn Driver>> {
    let Some(number) = settings.number("partition", 1..=u64::from(u32::MAX))? else {
        return Err(settings.missing("partition", "partition;partition=1"));
    };
    let sector = settings.one_of("sector-size", &["512", "4096"])?.map(|i| [512, 4096][i]);
    let next = source.open(write)?;
    let number = number.try_into().unwrap_or(u32::MAX);
    let (part, sector) = find_part(&next, number, sector)?;
    let (start, size) = match (part.start.checked_mul(sector), part.count.checked_mul(sector)) {
        (Some(start), Some(size)) if start.checked_add(size).is_some_and(|e| e <= next.size()) => {
            (start, size)
        }
        _ => {
            let (first, count, has) = (part.start, part.count, next.size());
            let what = format!(
                "partition {number} is not on the disk: {count} sectors of {sector} bytes from sector \
                 {first} on, and the disk has {has} bytes"
            );
            return Err(Error::format(next.name(), what));
        }
    };
    Ok(Stacked::boxed(Window::of_partition(next, KIND.name, start, size, part.about)))
}

/// A partition, and the bytes of a sector.
fn find_part(dev: &Device, number: u32, sector: Option<u64>) -> Result<(Part, u64)> {
    let disk = Disk { dev, sector: sector.unwrap_or(512) };
    if disk.sectors() == 0 {
        return Err(disk.refuse("too small for a partition table"));
    }
    let first = disk.read(0)?;
    let table = mbr::Table::parse(&disk, &first)?;
    if !table.is_protective() {
        return Ok((table.part(number)?, disk.sector));
    }
    let sizes = match sector {
        Some(one) => vec![one],
        None => vec![512, 4096],
    };
    let mut found = Vec::new();
    for sector in sizes {
        let disk = Disk { dev, sector };
        match gpt::Table::read(&disk, gpt::Place::First) {
            Ok(table) => return Ok((table.part(&disk, number)?, sector)),
            Err(first) if is_io(&first) => return Err(first),
            Err(first) => found.push((sector, first)),
        }
    }
    // No first one that is whole: the one at the end, then.
    let mut bad = String::new();
    for (sector, first) in found {
        let disk = Disk { dev, sector };
        match gpt::Table::read(&disk, gpt::Place::Last) {
            Ok(table) => {
                let file = dev.name();
                log(Level::Warn, format_args!("{first}: the backup of the GPT is used ({file})"));
                return Ok((table.part(&disk, number)?, sector));
            }
            Err(last) if is_io(&last) => return Err(last),
            Err(last) => {
                bad += &format!("; with sectors of {sector}: {}, {}", text(&first), text(&last))
            }
        }
    }
    Err(disk.refuse(format!("the MBR says that there is a GPT, and none is whole{bad}")))
}

/// Whether reading failed, rather than what was read.
fn is_io(e: &Error) -> bool {
    !matches!(e, Error::Format { .. })
}

/// What an error says without naming the disk again.
fn text(e: &Error) -> String {
    match e {
        Error::Format { what, .. } => what.clone(),
        other => other.to_string(),
    }
}

/// A number of a table, little-endian, at most 8 bytes; 0 where there are none.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let some = bytes.get(at..).unwrap_or_default().iter().take(len);
    some.rev().fold(0, |n, b| n << 8 | u64::from(*b))
}
