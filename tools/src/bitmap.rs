//! `qblk bitmap`: the dirty bitmaps of an image.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use qblk::block::{BitmapChange, BitmapInfo, quoted};
use qblk::{Image, OpenFlags};
use serde_json::{Map, Value, json};

use crate::cli::OpenArgs;
use crate::failure::{Failure, Result};
use crate::json;
use crate::units::{human_and_exact, parse_nonzero_size, shown, shown_bytes};

#[derive(clap::Args)]
pub struct BitmapArgs {
    #[command(subcommand)]
    pub action: Action,
}

#[derive(clap::Subcommand)]
pub enum Action {
    /// List the bitmaps
    List(ListArgs),
    /// Add a bitmap, in which what is written from now on is noted
    Add(AddArgs),
    /// Remove a bitmap
    Remove(OneArgs),
    /// Note what is written from now on
    Enable(OneArgs),
    /// Note nothing more
    Disable(OneArgs),
    /// Make nothing dirty
    Clear(OneArgs),
    /// Make dirty what is dirty in another bitmap
    Merge(MergeArgs),
}

#[derive(clap::Args)]
pub struct ListArgs {
    /// The image
    pub image: OsString,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub open: OpenArgs,
}

#[derive(clap::Args)]
pub struct AddArgs {
    /// The image
    pub image: OsString,
    /// The bitmap's name
    pub name: OsString,
    /// Bytes that one bit stands for, a power of two from 512 to 2G [default: 64k]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_nonzero_size)]
    pub granularity: Option<u64>,
    /// Note nothing in it until it is enabled
    #[arg(long)]
    pub disabled: bool,
    #[command(flatten)]
    pub open: OpenArgs,
}

#[derive(clap::Args)]
pub struct OneArgs {
    /// The image
    pub image: OsString,
    /// The bitmap's name
    pub name: OsString,
    #[command(flatten)]
    pub open: OpenArgs,
}

#[derive(clap::Args)]
pub struct MergeArgs {
    /// The image
    pub image: OsString,
    /// The bitmap that changes
    pub name: OsString,
    /// The bitmap whose dirty parts become dirty in it, too
    pub source: OsString,
    #[command(flatten)]
    pub open: OpenArgs,
}

pub fn run(args: &BitmapArgs) -> Result<()> {
    let one = |a: &OneArgs, change: BitmapChange<'_>| apply(&a.image, &a.open, &change);
    match &args.action {
        Action::List(a) => list(a),
        Action::Add(a) => {
            let granularity = a.granularity.unwrap_or(0);
            let (name, disabled) = (a.name.as_bytes(), a.disabled);
            apply(&a.image, &a.open, &BitmapChange::Add { name, granularity, disabled })
        }
        Action::Remove(a) => one(a, BitmapChange::Remove(a.name.as_bytes())),
        Action::Enable(a) => one(a, BitmapChange::Enable(a.name.as_bytes())),
        Action::Disable(a) => one(a, BitmapChange::Disable(a.name.as_bytes())),
        Action::Clear(a) => one(a, BitmapChange::Clear(a.name.as_bytes())),
        Action::Merge(a) => {
            let (target, source) = (a.name.as_bytes(), a.source.as_bytes());
            apply(&a.image, &a.open, &BitmapChange::Merge { target, source })
        }
    }
}

fn apply(name: &OsString, open: &OpenArgs, change: &BitmapChange<'_>) -> Result<()> {
    let image = open.open(name, OpenFlags::RDWR)?;
    image.change_bitmap(change).map_err(|e| match e {
        qblk::Error::NotSupported(what) => {
            Failure::said(format!("{}: does not support {what}", quoted(name.as_bytes())))
        }
        e => e.into(),
    })?;
    Ok(image.close()?)
}

fn list(args: &ListArgs) -> Result<()> {
    let image: Image = args.open.open(&args.image, OpenFlags::default())?;
    let found = image.bitmaps()?;
    if args.json {
        return json::print(&found.iter().map(as_json).collect());
    }
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if found.is_empty() {
        writeln!(out, "{}: no bitmaps", shown(&args.image))?;
        return Ok(out.flush()?);
    }
    let names: Vec<_> = found.iter().map(|b| shown_bytes(&b.name)).collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(4);
    writeln!(out, "{:<width$}  {:<12}  {:>11}  DIRTY", "NAME", "STATE", "GRANULARITY")?;
    for (name, b) in names.iter().zip(&found) {
        let dirty = b.dirty.map_or("not known".into(), human_and_exact);
        writeln!(out, "{name:<width$}  {:<12}  {:>11}  {dirty}", state(b), b.granularity)?;
    }
    Ok(out.flush()?)
}

/// What matters most of a bitmap, in a word.
pub fn state(b: &BitmapInfo) -> &'static str {
    match (b.inconsistent, b.enabled) {
        (true, _) => "inconsistent",
        (_, true) => "enabled",
        _ => "disabled",
    }
}

/// A bitmap as JSON.
pub fn as_json(b: &BitmapInfo) -> Value {
    let mut all = Map::new();
    json::put_name(&mut all, "name", &b.name);
    all.extend([
        ("granularity".into(), json!(b.granularity)),
        ("dirty".into(), json!(b.dirty)),
        ("enabled".into(), json!(b.enabled)),
        ("inconsistent".into(), json!(b.inconsistent)),
        ("persistent".into(), json!(b.persistent)),
    ]);
    all.into()
}
