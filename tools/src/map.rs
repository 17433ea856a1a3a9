//! `qblk map`: where an image's bytes live, as a table, as JSON or as a picture.

use std::ffi::OsStr;
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;

use qblk::block::quoted;
use qblk::{Extent, Image, OpenFlags};
use serde_json::{Map, Value, json};

use crate::cli::MapArgs;
use crate::failure::{Failure, Result};
use crate::json::put_name;
use crate::open::{Link, beneath, chain, file_id, has_layers};
use crate::svg::Picture;
use crate::tally::{Class, Kind, Totals, for_each_extent};
use crate::units::{human, human_and_exact, shown};

pub fn run(args: &MapArgs) -> Result<()> {
    // Before it is opened: there are NBD servers that take one client.
    let links = links(args)?;
    let image = args.open.open(&args.image, OpenFlags::default())?;
    let size = image.size()?;
    let length = args.length.unwrap_or(size.saturating_sub(args.offset));
    let end = match args.offset.checked_add(length) {
        Some(end) if end <= size => end,
        _ => {
            let (offset, file) = (args.offset, args.image.clone().into());
            return Err(qblk::Error::Range { file, offset, count: length, size }.into());
        }
    };
    match &args.svg {
        Some(file) => draw(args, &image, &links, size, end, file),
        None if args.json => print_json(args, &image, &links, size, end),
        None => print(args, &image, &links, end),
    }
}

/// The images of the chain, for their names.
fn links(args: &MapArgs) -> Result<Vec<Link>> {
    let (settings, flags) = (args.open.settings(), args.open.flags());
    let mut links = match args.open.no_backing {
        true => vec![Link::read(&args.image, &settings, flags)?],
        false => chain(&args.image, &settings, flags)?,
    };
    // A layer that keeps changes is an image above the one that it stands on: what is there lies deeper.
    let layers = links[0].properties.iter().find(|(key, _)| key == "layers");
    let names = layers.map(|(_, names)| String::from_utf8_lossy(names).into_owned());
    let overlays = names.iter().flat_map(|n| n.split(',')).filter(|n| *n == "cow").count();
    if overlays > 0 {
        let mut image = links[0].clone();
        image.name = beneath(&args.image).to_owned();
        let mut overlay = image.clone();
        overlay.name = "layer cow".into();
        let below = std::iter::repeat_n(overlay, overlays - 1).chain([image]);
        links.splice(1..1, below);
        if !has_layers(&args.image) {
            links[0].name = "layer cow".into();
        }
    }
    Ok(links)
}

/// The name of the image at a depth.
pub fn name_at(links: &[Link], depth: u32) -> String {
    match links.get(depth as usize) {
        Some(link) => shown(&link.name),
        None => format!("image {depth} below"),
    }
}

/// Go through the extents as far as the command line says; answers where it stopped short.
fn walk(
    args: &MapArgs,
    image: &Image,
    end: u64,
    mut each: impl FnMut(&Extent) -> Result<()>,
) -> Result<Option<u64>> {
    let mut left = args.max_extents.unwrap_or(u64::MAX);
    let mut stopped = None;
    for_each_extent(image, args.offset, end, |e| {
        each(e)?;
        left -= 1;
        let next = e.offset + e.length;
        if left == 0 && next < end {
            stopped = Some(next);
        }
        Ok(left > 0)
    })?;
    Ok(stopped)
}

fn print(args: &MapArgs, image: &Image, links: &[Link], end: u64) -> Result<()> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut totals = Totals::default();
    let width = end.to_string().len().max(6);
    writeln!(
        out,
        "{:>width$}  {:>width$}  {:>11}  {:<11}  {:>width$}  in",
        "offset", "length", "", "what", "there at"
    )?;
    let stopped = walk(args, image, end, |e| {
        totals.add(e);
        let class = Class::of(e);
        let host = if e.has(Extent::HOST) { e.host_offset.to_string() } else { "-".into() };
        let name =
            if class.kind == Kind::Unallocated { "-".into() } else { name_at(links, class.depth) };
        let (offset, length) = (e.offset, e.length);
        let (about, word) = (human(length), class.kind.word());
        writeln!(
            out,
            "{offset:>width$}  {length:>width$}  {about:>11}  {word:<11}  {host:>width$}  {name}"
        )?;
        Ok(())
    })?;
    writeln!(out)?;
    for (class, &bytes) in &totals.bytes {
        let place = match class.kind {
            Kind::Unallocated => String::new(),
            _ => format!(" in {}", name_at(links, class.depth)),
        };
        writeln!(out, "{}{place}: {}", class.kind.word(), human_and_exact(bytes))?;
    }
    if let Some(next) = stopped {
        writeln!(out, "stopped after {} extents, at offset {next}", totals.extents)?;
    }
    Ok(out.flush()?)
}

/// Extents may be millions, so they are written as they are found.
fn print_json(args: &MapArgs, image: &Image, links: &[Link], size: u64, end: u64) -> Result<()> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut head = Map::new();
    put_name(&mut head, "filename", args.image.as_bytes());
    writeln!(out, "{{")?;
    for (key, value) in &head {
        writeln!(out, "  {}: {value},", json!(key))?;
    }
    writeln!(out, "  \"size\": {size},\n  \"images\": [")?;
    for (depth, link) in links.iter().enumerate() {
        let mut one = Map::new();
        one.insert("depth".into(), json!(depth));
        put_name(&mut one, "filename", link.name.as_bytes());
        one.insert("format".into(), json!(link.info.format));
        writeln!(
            out,
            "    {}{}",
            Value::Object(one),
            if depth + 1 < links.len() { "," } else { "" }
        )?;
    }
    write!(out, "  ],\n  \"extents\": [")?;
    let mut totals = Totals::default();
    let stopped = walk(args, image, end, |e| {
        write!(out, "{}\n    {}", if totals.extents > 0 { "," } else { "" }, extent_json(e))?;
        totals.add(e);
        Ok(())
    })?;
    let sums: Map<String, Value> = [Kind::Data, Kind::Compressed, Kind::Zero, Kind::Unallocated]
        .map(|kind| (kind.word().into(), json!(totals.of_kind(kind))))
        .into_iter()
        .collect();
    writeln!(out, "\n  ],\n  \"totals\": {},", Value::Object(sums))?;
    writeln!(out, "  \"next_offset\": {}\n}}", json!(stopped))?;
    Ok(out.flush()?)
}

fn extent_json(e: &Extent) -> Value {
    let mut one = Map::new();
    one.insert("offset".into(), json!(e.offset));
    one.insert("length".into(), json!(e.length));
    one.insert("kind".into(), json!(Class::of(e).kind.word()));
    one.insert("depth".into(), json!(e.depth));
    for (key, bit) in [
        ("allocated", Extent::ALLOCATED),
        ("zero", Extent::ZERO),
        ("data", Extent::DATA),
        ("compressed", Extent::COMPRESSED),
    ] {
        one.insert(key.into(), json!(e.has(bit)));
    }
    if e.has(Extent::HOST) {
        one.insert("host_offset".into(), json!(e.host_offset));
    }
    one.into()
}

fn draw(
    args: &MapArgs,
    image: &Image,
    links: &[Link],
    size: u64,
    end: u64,
    file: &OsStr,
) -> Result<()> {
    let shown_file = || quoted(file.as_bytes());
    if let Some(id) = file_id(file)
        && links.iter().any(|link| file_id(&link.name) == Some(id))
    {
        return Err(Failure::said(format!(
            "{}: is an image of the chain; not overwritten",
            shown_file()
        )));
    }
    let mut picture = Picture::new(args.offset, end);
    for_each_extent(image, args.offset, end, |e| {
        picture.add(e);
        Ok(true)
    })?;
    let text = picture.render(links, size);
    if file == "-" {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        return Ok(out.flush()?);
    }
    std::fs::write(file, text).map_err(|e| Failure::io(shown_file(), &e))
}
