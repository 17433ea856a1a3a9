//! `qblk info`: what an image is, readable at a glance or as JSON.
//!
//! Only headers are read, so that it works on any image, whatever its features.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use qblk::image::state;
use serde_json::{Map, Value, json};

use crate::bitmap;
use crate::cli::InfoArgs;
use crate::failure::Result;
use crate::json;
use crate::open::{Link, chain};
use crate::snapshot;
use crate::units::{human, human_and_exact, shown, shown_bytes};

/// The states that are the image's own; that we opened it read-only is not one.
const STATES: [(u32, &str); 7] = [
    (state::DIRTY, "dirty"),
    (state::CORRUPT, "corrupt"),
    (state::ENCRYPTED, "encrypted"),
    (state::HAS_BACKING, "has-backing"),
    (state::HAS_DATA_FILE, "has-data-file"),
    (state::PROBED, "probed"),
    (state::LOCKED, "locked"),
];

pub fn run(args: &InfoArgs) -> Result<()> {
    let settings = args.open.settings();
    if !args.backing_chain {
        let link = Link::read(&args.image, &settings, args.open.flags())?;
        return match args.json {
            true => json::print(&as_json(&link)),
            false => print(&[link]),
        };
    }
    let links = chain(&args.image, &settings, args.open.flags())?;
    match args.json {
        true => json::print(&links.iter().map(as_json).collect()),
        false => print(&links),
    }
}

fn states(link: &Link) -> Vec<&'static str> {
    STATES.iter().filter(|(bit, _)| link.info.state & bit != 0).map(|(_, word)| *word).collect()
}

fn print(links: &[Link]) -> Result<()> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for (depth, link) in links.iter().enumerate() {
        if depth > 0 {
            writeln!(out, "\nbacked by, {depth} below:")?;
        }
        for (key, value) in rows(link) {
            // The colon belongs to the key: it is looked for by programs such as grep.
            writeln!(out, "{:<27} {value}", format!("{key}:"))?;
        }
    }
    Ok(out.flush()?)
}

fn rows(link: &Link) -> Vec<(&str, String)> {
    let info = &link.info;
    let mut rows = vec![("image", shown(&link.name))];
    let probed_raw = info.state & state::PROBED != 0 && info.format == "raw";
    rows.push((
        "format",
        match probed_raw {
            true => "raw (no other format was recognised)".into(),
            false => info.format.into(),
        },
    ));
    if info.driver != "file" {
        rows.push(("kept in", info.driver.into()));
    }
    rows.push(("size", human_and_exact(info.size)));
    rows.push(("in use on the host", info.allocated.map_or("not known".into(), human_and_exact)));
    if info.cluster_size > 0 {
        rows.push(("cluster size", human_and_exact(info.cluster_size.into())));
    }
    // What has a line of its own is not said twice.
    let own_line = ["has-backing", "has-data-file", "probed"];
    let words: Vec<_> = states(link).into_iter().filter(|w| !own_line.contains(w)).collect();
    if !words.is_empty() {
        rows.push(("state", words.join(", ")));
    }
    if let Some(backing) = &link.backing {
        let format = match &link.backing_format {
            Some(format) => shown_bytes(format),
            None => "format not recorded".into(),
        };
        rows.push(("backing file", format!("{} ({format})", shown_bytes(backing))));
    }
    if let Some(data) = &link.data_file {
        rows.push(("data file", shown_bytes(data)));
    }
    match &link.bitmaps {
        Ok(all) => rows.extend(all.iter().map(|b| {
            let granularity = human(b.granularity);
            ("bitmap", format!("{} ({}, {granularity})", shown_bytes(&b.name), bitmap::state(b)))
        })),
        Err(e) => rows.push(("bitmaps", format!("not known: {e}"))),
    }
    rows.extend(link.snapshots.iter().map(|s| ("snapshot", snapshot::line(s))));
    rows.extend(link.properties.iter().map(|(key, value)| (key.as_str(), shown_bytes(value))));
    rows
}

fn as_json(link: &Link) -> Value {
    let info = &link.info;
    let mut all = Map::new();
    json::put_name(&mut all, "filename", link.name.as_bytes());
    let properties: Map<String, Value> = link
        .properties
        .iter()
        .map(|(key, value)| (key.clone(), String::from_utf8_lossy(value).into()))
        .collect();
    all.extend([
        ("format".into(), json!(info.format)),
        ("driver".into(), json!(info.driver)),
        ("size".into(), json!(info.size)),
        ("allocated".into(), json!(info.allocated)),
        ("cluster_size".into(), json!(info.cluster_size)),
        ("state".into(), json!(states(link))),
        ("snapshots".into(), link.snapshots.iter().map(snapshot::as_json).collect()),
        ("properties".into(), properties.into()),
        (
            "bitmaps".into(),
            link.bitmaps
                .as_ref()
                .map_or(Value::Null, |all| all.iter().map(bitmap::as_json).collect()),
        ),
    ]);
    for (key, name) in [
        ("backing_filename", &link.backing),
        ("backing_format", &link.backing_format),
        ("data_file", &link.data_file),
    ] {
        match name {
            Some(name) => json::put_name(&mut all, key, name),
            None => drop(all.insert(key.into(), Value::Null)),
        }
    }
    all.into()
}
