//! `qblk snapshot`: internal snapshots of an image, listed, made, applied and deleted.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use qblk::block::{SnapshotInfo, quoted};
use qblk::{Image, OpenFlags};
use serde_json::{Map, Value, json};

use crate::cli::{SnapshotAction as Action, SnapshotArgs};
use crate::failure::{Failure, Result};
use crate::json;
use crate::open::options;
use crate::units::{human, shown, shown_bytes};

pub fn run(args: &SnapshotArgs) -> Result<()> {
    let name = match (args.action, &args.name) {
        (Action::List, None) => return list(args),
        (Action::List, Some(_)) => return Err(Failure::usage("listing takes no name")),
        (_, Some(name)) => name,
        (_, None) => return Err(Failure::usage("the snapshot's name is needed: IMAGE NAME")),
    };
    if args.action != Action::Create && !args.set.is_empty() {
        return Err(Failure::usage("--set is for making a snapshot"));
    }
    let image = args.open.open(&args.image, OpenFlags::RDWR)?;
    let done = match args.action {
        Action::Create => image.snapshot_create(name.as_bytes(), &options(&args.set)),
        Action::Apply => image.snapshot_apply(name.as_bytes()),
        _ => image.snapshot_delete(name.as_bytes()),
    };
    done.map_err(|e| failed(args, e))?;
    let made = match args.action {
        Action::Create => image.snapshots()?.pop(),
        _ => None,
    };
    let size = image.size()?;
    image.close()?;
    told(args, name.as_bytes(), made, size)
}

/// Devices without snapshots do not say their name.
fn failed(args: &SnapshotArgs, e: qblk::Error) -> Failure {
    match e {
        qblk::Error::NotSupported(what) => {
            let name = quoted(args.image.as_bytes());
            Failure::said(format!("{name}: its format does not support {what}"))
        }
        e => e.into(),
    }
}

fn told(args: &SnapshotArgs, name: &[u8], made: Option<SnapshotInfo>, size: u64) -> Result<()> {
    if args.told.json {
        let mut all = Map::new();
        json::put_name(&mut all, "filename", args.image.as_bytes());
        json::put_name(&mut all, "snapshot", name);
        if let Some(made) = made {
            json::put_name(&mut all, "id", &made.id);
        }
        all.insert("size".into(), json!(size));
        return json::print(&all.into());
    }
    if !args.told.quiet {
        let (image, name) = (shown(&args.image), quoted(name));
        let mut out = std::io::stdout().lock();
        match args.action {
            Action::Create => {
                let id = made.map(|s| shown_bytes(&s.id)).unwrap_or_default();
                writeln!(out, "{image}: made snapshot {name}, ID {id}")?;
            }
            Action::Apply => writeln!(out, "{image}: is what it was in snapshot {name}")?,
            _ => writeln!(out, "{image}: deleted snapshot {name}")?,
        }
    }
    Ok(())
}

fn list(args: &SnapshotArgs) -> Result<()> {
    let flags = args.open.flags() | OpenFlags::INFO_ONLY;
    let image = Image::open(&args.image, &options(&args.open.settings()), flags)?;
    let all = image.snapshots().map_err(|e| failed(args, e))?;
    if args.told.json {
        return json::print(&all.iter().map(as_json).collect());
    }
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if all.is_empty() {
        writeln!(out, "{}: no snapshots", shown(&args.image))?;
        return Ok(out.flush()?);
    }
    let rows: Vec<[String; 6]> = all
        .iter()
        .map(|s| {
            [
                shown_bytes(&s.id),
                shown_bytes(&s.name),
                date(s),
                human(s.disk_size),
                state(s),
                clock(s.vm_clock),
            ]
        })
        .collect();
    let head = ["ID", "NAME", "DATE", "DISK", "STATE", "RUN FOR"].map(str::to_owned);
    let width = |i: usize| {
        let all = rows.iter().chain([&head]);
        all.map(|r| r[i].chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    for row in [&head].into_iter().chain(&rows) {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(out.flush()?)
}

fn state(s: &SnapshotInfo) -> String {
    match s.vm_state_size {
        0 => "none".into(),
        n => human(n),
    }
}

/// When it was made, in the time of this place.
fn date(s: &SnapshotInfo) -> String {
    let mut text = [0u8; 64];
    // SAFETY: the structure is plain numbers, and is written before it is read; the text has the room
    // that is said.
    let len = unsafe {
        let mut parts = std::mem::zeroed();
        let time = s.date.0 as libc::time_t;
        if libc::localtime_r(&time, &mut parts).is_null() {
            0
        } else {
            let form = c"%Y-%m-%d %H:%M:%S".as_ptr();
            libc::strftime(text.as_mut_ptr().cast(), text.len(), form, &parts)
        }
    };
    match std::str::from_utf8(&text[..len]) {
        Ok(text) if len > 0 => text.to_owned(),
        _ => s.date.0.to_string(),
    }
}

/// How long a machine had run, as `12:34:56.789`.
fn clock(ns: u64) -> String {
    let (ms, s) = (ns / 1_000_000 % 1000, ns / 1_000_000_000);
    format!("{}:{:02}:{:02}.{ms:03}", s / 3600, s / 60 % 60, s % 60)
}

/// A snapshot in one line.
pub fn line(s: &SnapshotInfo) -> String {
    let state = match s.vm_state_size {
        0 => String::new(),
        n => format!(", with {} of a machine's state", human(n)),
    };
    let (id, name) = (shown_bytes(&s.id), quoted(&s.name));
    format!("{id} {name} of {}, {}{state}", date(s), human(s.disk_size))
}

/// A snapshot as an object.
pub fn as_json(s: &SnapshotInfo) -> Value {
    let mut all = Map::new();
    json::put_name(&mut all, "id", &s.id);
    json::put_name(&mut all, "name", &s.name);
    all.extend([
        ("vm_state_size".into(), json!(s.vm_state_size)),
        ("disk_size".into(), json!(s.disk_size)),
        ("date_sec".into(), json!(s.date.0)),
        ("date_nsec".into(), json!(s.date.1)),
        ("vm_clock_nsec".into(), json!(s.vm_clock)),
        ("icount".into(), json!(s.icount)),
    ]);
    all.into()
}
