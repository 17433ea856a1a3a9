//! `qblk plugin`: what a plugin is and can do.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use clap::Args;
use qblk::plugin::{About, describe};
use serde_json::{Map, Value, json};

use crate::failure::Result;
use crate::json;
use crate::units::{shown, shown_bytes};

#[derive(Args)]
pub struct PluginArgs {
    /// The shared object (plugin:PATH does as well)
    pub plugin: OsString,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &PluginArgs) -> Result<()> {
    let bytes = args.plugin.as_bytes();
    let about = describe(bytes.strip_prefix(b"plugin:").unwrap_or(bytes))?;
    match args.json {
        true => json::print(&as_json(args, &about)),
        false => print(args, &about),
    }
}

fn kind(about: &About) -> &'static str {
    let source = about.functions.contains(&"open");
    match (source, about.is_layer) {
        (true, true) => "device and layer",
        (false, true) => "layer",
        _ => "device",
    }
}

fn print(args: &PluginArgs, about: &About) -> Result<()> {
    let api = match about.api_version {
        Some(version) => format!("version {version}, {} bytes", about.struct_size),
        None => "functions by their names".into(),
    };
    let errno = if about.errno_is_preserved { "says why it failed" } else { "says nothing" };
    let mut rows = vec![
        ("plugin", shown(&args.plugin)),
        ("name", shown_bytes(about.name.as_bytes())),
        ("is a", kind(about).into()),
    ];
    let text = |text: &Option<String>| text.as_ref().map(|t| shown_bytes(t.as_bytes()));
    rows.extend(text(&about.version).map(|v| ("version", v)));
    rows.extend(text(&about.description).map(|d| ("description", d)));
    rows.push(("interface", api));
    rows.push(("thread model", about.thread_model.name().into()));
    rows.push(("errno", errno.into()));
    rows.push(("functions", about.functions.join(" ")));
    if about.is_layer {
        let none = about.passes.is_empty();
        rows.push(("passes on", if none { "nothing".into() } else { about.passes.join(" ") }));
    }
    for (key, lines) in [("settings", &about.config_help), ("tells", &about.dump)] {
        let lines = lines.iter().flat_map(|text| text.lines());
        rows.extend(lines.map(|line| (key, shown_bytes(line.as_bytes()))));
    }
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for (key, value) in rows {
        writeln!(out, "{:<15} {value}", format!("{key}:"))?;
    }
    Ok(out.flush()?)
}

fn as_json(args: &PluginArgs, about: &About) -> Value {
    let mut all = Map::new();
    json::put_name(&mut all, "plugin", args.plugin.as_bytes());
    all.extend([
        ("name".into(), json!(about.name)),
        ("source".into(), json!(about.functions.contains(&"open"))),
        ("layer".into(), json!(about.is_layer)),
        ("version".into(), json!(about.version)),
        ("description".into(), json!(about.description)),
        ("api_version".into(), json!(about.api_version)),
        ("struct_size".into(), json!(about.api_version.map(|_| about.struct_size))),
        ("thread_model".into(), json!(about.thread_model.name())),
        ("errno_is_preserved".into(), json!(about.errno_is_preserved)),
        ("functions".into(), json!(about.functions)),
        ("passes".into(), json!(about.passes)),
        ("config_help".into(), json!(about.config_help)),
        ("dump".into(), json!(about.dump)),
    ]);
    all.into()
}
