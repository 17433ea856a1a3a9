//! `qblk create`: a new, empty image.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use qblk::block::quoted;
use serde_json::{Map, json};

use crate::cli::CreateArgs;
use crate::failure::{Failure, Result};
use crate::json;
use crate::open::{Link, file_name};
use crate::target::{self, backing_settings};
use crate::units::{human_and_exact, shown};

pub fn run(args: &CreateArgs) -> Result<()> {
    let mut settings = args.options.clone();
    backing_settings(&mut settings, args.backing.as_deref(), args.backing_format.as_deref())?;
    let size = match (args.size, &args.backing) {
        (Some(size), _) => size,
        (None, Some(backing)) => backing_size(args, backing)?,
        (None, None) => {
            return Err(Failure::usage("a size is needed where there is no backing file"));
        }
    };
    target::create(&args.image, &args.format, size, &settings, args.force)?;
    if args.told.json {
        let mut all = Map::new();
        json::put_name(&mut all, "filename", args.image.as_bytes());
        all.insert("format".into(), json!(args.format));
        all.insert("size".into(), json!(size));
        return json::print(&all.into());
    }
    if !args.told.quiet {
        use std::io::Write;
        let mut out = std::io::stdout().lock();
        writeln!(
            out,
            "{}: new {} image, {}",
            shown(&args.image),
            args.format,
            human_and_exact(size)
        )?;
    }
    Ok(())
}

/// The size of the backing file, which is what an overlay of it has unless told otherwise.
fn backing_size(args: &CreateArgs, backing: &OsStr) -> Result<u64> {
    let path = target::beside(&args.image, backing);
    let how = crate::open::with_format(&[], args.backing_format.as_deref());
    let link = Link::read(&file_name(&path), &how, Default::default())?;
    if link.info.size == 0 {
        return Err(Failure::said(format!("{}: is empty", quoted(path.as_os_str().as_bytes()))));
    }
    Ok(link.info.size)
}
