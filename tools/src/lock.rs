//! `qblk lock`: who holds which lock on an image's file.

use std::ffi::OsString;
use std::io::Write;

use qblk::block::quoted;
use qblk::file::{Holder, holders};
use serde_json::{Map, Value, json};

use crate::failure::{Failure, Result};
use crate::json;
use crate::open::{name_of, path_of};

#[derive(clap::Args)]
pub struct LockArgs {
    /// The image
    pub image: OsString,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &LockArgs) -> Result<()> {
    let Some(path) = path_of(&args.image) else {
        let name = quoted(name_of(&args.image));
        return Err(Failure::said(format!(
            "{name}: is not a file here, and only files have locks"
        )));
    };
    let found = holders(&path.into_os_string().into())?;
    match args.json {
        true => json::print(&found.iter().map(as_json).collect::<Vec<_>>().into()),
        false => print(&found),
    }
}

fn print(found: &[Holder]) -> Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if found.is_empty() {
        writeln!(out, "not locked")?;
        return Ok(out.flush()?);
    }
    writeln!(out, "{:<5} {:<27} {:<8} COMMAND", "BYTE", "PERMISSION", "PID")?;
    for holder in found {
        let how = if holder.used { "used" } else { "not shared" };
        let permission = format!("{}, {how}", holder.permission);
        let pid = holder.pid.map_or("?".into(), |pid| pid.to_string());
        let command = match &holder.command[..] {
            [] => "(cannot be seen from here)".into(),
            command => quoted(command),
        };
        writeln!(out, "{:<5} {permission:<27} {pid:<8} {command}", holder.byte)?;
    }
    Ok(out.flush()?)
}

fn as_json(holder: &Holder) -> Value {
    let mut all = Map::new();
    all.extend([
        ("byte".into(), json!(holder.byte)),
        ("permission".into(), json!(holder.permission)),
        ("used".into(), json!(holder.used)),
        ("pid".into(), json!(holder.pid)),
    ]);
    match &holder.command[..] {
        [] => drop(all.insert("command".into(), Value::Null)),
        command => json::put_name(&mut all, "command", command),
    }
    all.into()
}
