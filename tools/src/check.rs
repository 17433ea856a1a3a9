//! `qblk check`: whether an image is sound, and repairing it.

use std::io::{IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qblk::block::{CheckReport, Progress, Repair, quoted};
use qblk::{Error, OpenFlags};
use serde_json::{Map, json};

use crate::cli::CheckArgs;
use crate::failure::{Failure, Result};
use crate::json;
use crate::signals;
use crate::units::{percent, shown};

pub fn run(args: &CheckArgs) -> Result<()> {
    signals::catch();
    let repair = match args.repair.as_deref() {
        None => Repair::Nothing,
        Some("leaks") => Repair::Leaks,
        Some(_) => Repair::All,
    };
    let write = if repair == Repair::Nothing { OpenFlags::default() } else { OpenFlags::RDWR };
    let image = args.open.open(&args.image, OpenFlags::CHECK | write)?;
    let bar = bar(args);
    let tell = |done: u64, total: u64| {
        if let Some(bar) = &bar {
            bar.set_length(total);
            bar.set_position(done);
        }
        signals::asked_to_end().is_none()
    };
    let found = image.check(repair, Progress::new(&tell));
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let report = match (found, signals::asked_to_end()) {
        (Err(Error::Canceled), Some(signal)) => return Err(Failure::Signal(signal, None)),
        (Err(Error::NotSupported(what)), _) => {
            return Err(Failure::said(format!(
                "{}: does not support {what}",
                quoted(args.image.as_bytes())
            )));
        }
        (found, _) => found?,
    };
    image.close()?;
    tell_of(args, &report)?;
    match status(&report) {
        0 => Ok(()),
        status => Err(Failure::Command(status)),
    }
}

/// As `qemu-img check` has it.
fn status(r: &CheckReport) -> u8 {
    match () {
        _ if r.check_errors > 0 => 1,
        _ if r.corruptions > 0 => 2,
        _ if r.leaks > 0 => 3,
        _ => 0,
    }
}

fn bar(args: &CheckArgs) -> Option<ProgressBar> {
    if args.told.quiet || !std::io::stderr().is_terminal() {
        return None;
    }
    let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {percent:>3}%  {eta} left") {
        bar.set_style(style.progress_chars("=> "));
    }
    Some(bar)
}

fn tell_of(args: &CheckArgs, r: &CheckReport) -> Result<()> {
    let numbers = [
        ("corruptions", r.corruptions),
        ("leaks", r.leaks),
        ("corruptions_fixed", r.corruptions_fixed),
        ("leaks_fixed", r.leaks_fixed),
        ("check_errors", r.check_errors),
        ("image_end", r.image_end),
        ("total_clusters", r.total_clusters),
        ("allocated_clusters", r.allocated_clusters),
        ("compressed_clusters", r.compressed_clusters),
        ("fragmented_clusters", r.fragmented_clusters),
    ];
    if args.told.json {
        let mut all = Map::new();
        json::put_name(&mut all, "filename", args.image.as_bytes());
        numbers.into_iter().for_each(|(key, n)| drop(all.insert(key.into(), json!(n))));
        return json::print(&all.into());
    }
    if args.told.quiet {
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    if r.corruptions_fixed + r.leaks_fixed > 0 {
        let (corruptions, leaks) = (r.corruptions_fixed, r.leaks_fixed);
        writeln!(out, "{}: repaired {corruptions} corruptions, {leaks} leaks", shown(&args.image))?;
    }
    let left = match () {
        _ if r.corruptions + r.leaks + r.check_errors == 0 => "no errors were found".to_owned(),
        _ => {
            let mut text = format!("{} corruptions, {} leaks", r.corruptions, r.leaks);
            if r.check_errors > 0 {
                text += &format!("; {} places could not be looked at or repaired", r.check_errors);
            }
            text
        }
    };
    writeln!(out, "{}: {left}", shown(&args.image))?;
    writeln!(
        out,
        "{} of {} clusters allocated ({}), {} of them compressed, {} fragmented; in use up to byte {}",
        r.allocated_clusters,
        r.total_clusters,
        percent(r.allocated_clusters, r.total_clusters),
        r.compressed_clusters,
        r.fragmented_clusters,
        r.image_end
    )?;
    Ok(())
}
