//! `qblk layers`: what can be put on an image, and with which settings.

use std::io::Write;

use qblk::block::quoted;
use qblk::layer::{KINDS, Kind, find};
use serde_json::{Map, Value, json};

use crate::failure::{Failure, Result};
use crate::json;

#[derive(clap::Args)]
pub struct LayersArgs {
    /// Tell of this layer only, with its settings [default: all, by name]
    pub name: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &LayersArgs) -> Result<()> {
    let Some(name) = &args.name else {
        return if args.json { json::print(&KINDS.iter().map(as_json).collect()) } else { list() };
    };
    let Some(kind) = find(name) else {
        let all: Vec<_> = KINDS.iter().map(|k| k.name).collect();
        let (name, all) = (quoted(name.as_bytes()), all.join(", "));
        return Err(Failure::usage(format!(
            "there is no layer {name}: there are {all} (of a shared object qblk plugin tells)"
        )));
    };
    if args.json { json::print(&as_json(kind)) } else { one(kind) }
}

fn list() -> Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let width = KINDS.iter().map(|k| k.name.len()).max().unwrap_or(0);
    for kind in KINDS {
        writeln!(out, "{:<width$}  {}", kind.name, kind.about)?;
    }
    Ok(out.flush()?)
}

fn one(kind: &Kind) -> Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    writeln!(out, "{}: {}", kind.name, kind.about)?;
    let width = kind.keys.iter().map(|k| k.0.len()).max().unwrap_or(0);
    for (key, about) in kind.keys {
        writeln!(out, "  {key:<width$}  {about}")?;
    }
    Ok(out.flush()?)
}

fn as_json(kind: &Kind) -> Value {
    let settings: Map<String, Value> =
        kind.keys.iter().map(|(key, about)| ((*key).to_owned(), (*about).into())).collect();
    json!({ "name": kind.name, "about": kind.about, "settings": settings })
}
