//! `qblk copy`: an image into another, in parallel, holes kept holes. The copying itself is the library's.
//!
//! A target that was made here disappears unless the copy was whole, flushed and closed.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use qblk::block::quoted;
use qblk::{Image, OpenFlags, Options};
use serde_json::{Map, json};

use crate::cli::CopyArgs;
use crate::failure::{Failure, Result};
use crate::json;
use crate::open::{chain, file_id, flags, has_layers, is_nbd, options, value, with_format};
use crate::progress;
use crate::signals;
use crate::target::{self, HalfMade, backing_settings};
use crate::units::{human, human_and_exact, shown};

pub fn run(args: &CopyArgs) -> Result<()> {
    signals::catch();
    refuse_to_make_an_export(args)?;
    refuse_to_make_layers(args)?;
    let source = open_source(args)?;
    let size = source.size()?;
    refuse_to_harm_the_source(args)?;
    let format = match (&args.target_format, is_nbd(&args.target)) {
        (Some(format), _) => Some(format.clone()),
        // What an export holds is a disk; probing would trust what is in it.
        (None, true) => Some("raw".into()),
        (None, false) if args.no_create => None,
        (None, false) => Some(source_format(&source)),
    };
    let half_made = match is_there(args) {
        true => None,
        false => Some(make_target(args, format.as_deref().unwrap_or("raw"), size)?),
    };
    let result = copy_into_target(args, &source, size, format.as_deref());
    match result {
        Ok(written) => {
            if let Some(file) = half_made {
                file.keep();
            }
            tell(args, size, written)
        }
        Err(e) => {
            drop(half_made);
            Err(e)
        }
    }
}

fn open_source(args: &CopyArgs) -> Result<Image> {
    let how = flags([
        (args.untrusted, OpenFlags::UNTRUSTED),
        (args.no_backing, OpenFlags::NO_BACKING),
        (args.direct, OpenFlags::DIRECT),
        (args.shared, OpenFlags::SHARED),
        (args.no_lock, OpenFlags::NO_LOCK),
    ]);
    let settings = with_format(&args.source_option, args.format.as_deref());
    Ok(Image::open(&args.source, &options(&settings), how)?)
}

fn source_format(source: &Image) -> String {
    source.info().map_or("raw", |info| info.format).to_owned()
}

/// The target is not made, only written to.
fn is_there(args: &CopyArgs) -> bool {
    args.no_create || is_nbd(&args.target)
}

/// An NBD export is made by its server, and so nothing can be said of how.
fn refuse_to_make_an_export(args: &CopyArgs) -> Result<()> {
    if is_nbd(&args.target) && args.backing.is_some() {
        return Err(Failure::usage(format!(
            "{}: an NBD export is written to as it is, so --backing makes no sense for it",
            quoted(args.target.as_bytes())
        )));
    }
    Ok(())
}

/// Layers stand on an image, and say nothing of how that is made.
fn refuse_to_make_layers(args: &CopyArgs) -> Result<()> {
    let layered = has_layers(&args.target) || value(&args.options, "layers").is_some();
    if layered && !is_there(args) {
        return Err(Failure::usage(format!(
            "{}: layers stand on an image that is there: make it (qblk create), and copy with --no-create",
            quoted(args.target.as_bytes())
        )));
    }
    Ok(())
}

/// The target must not be the source, nor anything that the source stands on.
fn refuse_to_harm_the_source(args: &CopyArgs) -> Result<()> {
    let id = file_id(&args.target);
    let same = |name: &OsStr| id.is_some() && file_id(name) == id;
    if same(&args.source) || is_nbd(&args.target) && args.source == args.target {
        return Err(Failure::said(format!(
            "{}: source and target are the same",
            quoted(args.target.as_bytes())
        )));
    }
    // What an untrusted source names was not opened, and is not looked for.
    if id.is_none() || args.untrusted || args.no_backing {
        return Ok(());
    }
    let settings = with_format(&args.source_option, args.format.as_deref());
    for link in chain(&args.source, &settings, OpenFlags::default())?.iter().skip(1) {
        if same(&link.name) {
            return Err(Failure::said(format!(
                "{}: is part of the source (in its backing chain)",
                quoted(args.target.as_bytes())
            )));
        }
    }
    Ok(())
}

fn make_target(args: &CopyArgs, format: &str, size: u64) -> Result<HalfMade> {
    let mut settings = args.options.clone();
    backing_settings(&mut settings, args.backing.as_deref(), args.backing_format.as_deref())?;
    target::create(&args.target, format, size, &settings, args.force)?;
    Ok(HalfMade::new(&args.target))
}

/// Copy all, make it durable and close it; answers how many bytes were written.
fn copy_into_target(
    args: &CopyArgs,
    source: &Image,
    size: u64,
    format: Option<&str>,
) -> Result<u64> {
    let mut how = Options::new();
    if is_there(args) {
        how = options(&args.options);
    } else {
        // What it was encrypted with is what opens it.
        for key in ["key", "key-file"] {
            how.set(key, value(&args.options, key));
        }
    }
    if let Some(format) = format {
        how.set("format", Some(format.as_bytes()));
    }
    let how_flags = flags([
        (true, OpenFlags::RDWR),
        (args.direct, OpenFlags::DIRECT),
        (args.no_lock, OpenFlags::NO_LOCK),
    ]);
    let target = Image::open(&args.target, &how, how_flags)?;
    let room = target.size()?;
    if room < size {
        return Err(Failure::said(format!(
            "{}: has {}, too few for the source's {}",
            quoted(args.target.as_bytes()),
            human_and_exact(room),
            human_and_exact(size)
        )));
    }
    let info = target.info()?;
    let mut how = Options::new();
    how.set("sparse", Some(args.sparse.to_string().as_bytes()));
    if args.compress {
        how.set("compress", Some(b"on"));
    }
    if let Some(threads) = args.threads {
        how.set("threads", Some(threads.to_string().as_bytes()));
    }
    let overlay = value(&args.options, "backing-file").is_some_and(|b| !b.is_empty());
    if is_there(args) || (info.format == "raw" && info.driver != "file") || info.format == "luks" {
        // A block device is not made, only used; and what is not written to LUKS reads as noise.
    } else if args.backing.is_some() || overlay {
        how.set("compare", Some(b"on"));
    } else {
        how.set("target-is-zero", Some(b"on"));
    }
    let written = copy_all(args, source, &target, &how, size)?;
    target.flush()?;
    target.close()?;
    if let Some(signal) = signals::asked_to_end() {
        return Err(ended(args, signal));
    }
    Ok(written)
}

fn ended(args: &CopyArgs, signal: i32) -> Failure {
    let left = is_nbd(&args.target)
        || file_id(&args.target).is_some()
            && (args.no_create || std::fs::metadata(&args.target).is_ok_and(|m| !m.is_file()));
    let text = left.then(|| format!("{} is only partly written", quoted(args.target.as_bytes())));
    Failure::Signal(signal, text)
}

/// Copy all of it, and show how far that is.
fn copy_all(
    args: &CopyArgs,
    source: &Image,
    target: &Image,
    how: &Options,
    size: u64,
) -> Result<u64> {
    let copied = progress::watched(args.told.quiet, args.progress, Some(size), |progress| {
        qblk::image::copy(source, target, how, false, progress)
    });
    match (copied, signals::asked_to_end()) {
        (Err(qblk::Error::Canceled) | Ok(_), Some(signal)) => Err(ended(args, signal)),
        (copied, _) => Ok(copied?),
    }
}

fn tell(args: &CopyArgs, size: u64, written: u64) -> Result<()> {
    if args.told.json {
        let mut all = Map::new();
        json::put_name(&mut all, "source", args.source.as_bytes());
        json::put_name(&mut all, "target", args.target.as_bytes());
        all.insert("size".into(), json!(size));
        all.insert("written".into(), json!(written));
        return json::print(&all.into());
    }
    if !args.told.quiet {
        let mut out = std::io::stdout().lock();
        let (name, size, written) = (shown(&args.target), human_and_exact(size), human(written));
        writeln!(out, "{name}: {size} copied, of which {written} had to be written")?;
    }
    Ok(())
}
