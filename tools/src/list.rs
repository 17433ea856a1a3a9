//! `qblk list`: what an NBD server exports.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use qblk::nbd::uri::Uri;
use serde_json::{Map, Value};

use crate::cli::ListArgs;
use crate::failure::Result;
use crate::json;
use crate::open::options;
use crate::units::{shown, shown_bytes};

pub fn run(args: &ListArgs) -> Result<()> {
    let found = qblk::image::list_exports(args.uri.as_bytes(), &options(&args.options))?;
    if args.json {
        // A command's exports have no URI.
        let server = Uri::parse(args.uri.as_bytes()).ok();
        let all = found.iter().map(|e| {
            let mut one = Map::new();
            json::put_name(&mut one, "name", &e.name);
            json::put_name(&mut one, "description", &e.description);
            let uri = server.clone().map(|mut uri| {
                uri.export = e.name.clone();
                uri.to_string()
            });
            one.insert("uri".into(), uri.into());
            Value::Object(one)
        });
        return json::print(&all.collect());
    }
    let names: Vec<_> = found
        .iter()
        .map(|e| if e.name.is_empty() { "(default)".into() } else { shown_bytes(&e.name) })
        .collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for (name, e) in names.iter().zip(&found) {
        let line = format!("{name:<width$}  {}", shown_bytes(&e.description));
        writeln!(out, "{}", line.trim_end())?;
    }
    if found.is_empty() {
        writeln!(out, "{}: no exports", shown(&args.uri))?;
    }
    Ok(out.flush()?)
}
