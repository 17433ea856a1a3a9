//! `qblk commit` and `qblk rebase`: what an image has into the one below, another image below it.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use clap::Args;
use qblk::block::quoted;
use qblk::{Error, OpenFlags, Options};
use serde_json::{Map, json};

use crate::cli::{OpenArgs, Told};
use crate::failure::{Failure, Result};
use crate::units::shown;
use crate::{json, progress, signals};

#[derive(Args)]
pub struct CommitArgs {
    /// The image
    pub image: OsString,
    /// Keep what the image has, do not empty it
    #[arg(long)]
    pub keep: bool,
    /// Show progress even if standard error is no terminal (as lines)
    #[arg(short, long, conflicts_with = "quiet")]
    pub progress: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub told: Told,
}

#[derive(Args)]
pub struct RebaseArgs {
    /// The image
    pub image: OsString,
    /// The new backing file, seen from the image's directory; empty for none
    #[arg(short, long, value_name = "FILE")]
    pub backing: OsString,
    /// Format of the backing file [default: found by probing, now, and recorded]
    #[arg(short = 'F', long, value_name = "FMT")]
    pub backing_format: Option<String>,
    /// Change the name only: the new file holds what the old one did, or nobody needs that
    #[arg(short = 'u', long = "unsafe")]
    pub blind: bool,
    /// Threads that compare and copy [default: one a processor, at least 2]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: Option<u32>,
    /// Show progress even if standard error is no terminal (as lines)
    #[arg(short, long, conflicts_with = "quiet")]
    pub progress: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub told: Told,
}

pub fn commit(args: &CommitArgs) -> Result<()> {
    signals::catch();
    let image = args.open.open(&args.image, OpenFlags::RDWR)?;
    let below = named(&image)?;
    let done = progress::watched(args.told.quiet, args.progress, None, |progress| {
        image.commit(args.keep, progress)
    });
    ended(done)?;
    image.close()?;
    if args.told.json {
        let mut all = Map::new();
        json::put_name(&mut all, "filename", args.image.as_bytes());
        json::put_name(&mut all, "backing_filename", &below);
        all.insert("kept".into(), json!(args.keep));
        return json::print(&all.into());
    }
    if !args.told.quiet {
        let (name, below) = (shown(&args.image), quoted(&below));
        writeln!(std::io::stdout().lock(), "{name}: committed to {below}")?;
    }
    Ok(())
}

pub fn rebase(args: &RebaseArgs) -> Result<()> {
    signals::catch();
    let alone = if args.blind { OpenFlags::NO_BACKING } else { OpenFlags::default() };
    let image = args.open.open(&args.image, OpenFlags::RDWR | alone)?;
    let mut how = Options::new();
    if let Some(format) = &args.backing_format {
        how.set("backing-fmt", Some(format.as_bytes()));
    }
    if let Some(threads) = args.threads {
        how.set("threads", Some(threads.to_string().as_bytes()));
    }
    let old = named(&image)?;
    let done = progress::watched(args.told.quiet, args.progress, None, |progress| {
        image.rebase(&args.backing, &how, args.blind, progress)
    });
    ended(done)?;
    image.close()?;
    if args.told.json {
        let mut all = Map::new();
        json::put_name(&mut all, "filename", args.image.as_bytes());
        for (key, name) in
            [("old_backing_filename", &old[..]), ("backing_filename", args.backing.as_bytes())]
        {
            if !name.is_empty() {
                json::put_name(&mut all, key, name);
            }
        }
        return json::print(&all.into());
    }
    if !args.told.quiet {
        let text = |name: &[u8]| match name {
            [] => "none".to_owned(),
            name => shown(OsStr::from_bytes(name)).to_string(),
        };
        let (now, was) = (text(args.backing.as_bytes()), text(&old));
        writeln!(
            std::io::stdout().lock(),
            "{}: backing file now {now}, was {was}",
            shown(&args.image)
        )?;
    }
    Ok(())
}

/// What the image names as its backing file.
fn named(image: &qblk::Image) -> Result<Vec<u8>> {
    Ok(image.property("backing-filename")?.unwrap_or_default())
}

/// What came of the work; a signal that stopped it is why.
fn ended(done: std::result::Result<(), Error>) -> Result<()> {
    match (done, signals::asked_to_end()) {
        (Err(Error::Canceled), Some(signal)) => {
            Err(Failure::Signal(signal, Some("the image reads as before".into())))
        }
        (done, _) => Ok(done?),
    }
}
