//! `qblk resize`: another size.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use qblk::block::quoted;
use qblk::{OpenFlags, Options};
use serde_json::{Map, json};

use crate::cli::{NewSize, ResizeArgs};
use crate::failure::{Failure, Result};
use crate::json;
use crate::units::{human_and_exact, shown};

pub fn run(args: &ResizeArgs) -> Result<()> {
    let image = args.open.open(&args.image, OpenFlags::RDWR)?;
    let old = image.size()?;
    let name = || quoted(args.image.as_bytes());
    let new = match args.size {
        NewSize::To(size) => Some(size),
        NewSize::By(more) => old.checked_add(more),
        NewSize::Less(less) => old.checked_sub(less),
    };
    let new = new.ok_or_else(|| {
        Failure::said(format!("{}: has {old} bytes; the new size would be no size", name()))
    })?;
    if new < old && !args.shrink {
        return Err(Failure::said(format!(
            "{}: {new} bytes are fewer than the present {old}; --shrink allows to lose what lies beyond",
            name()
        )));
    }
    let mut options = Options::new();
    if let Some(how) = &args.preallocation {
        options.set("preallocation", Some(how.as_bytes()));
    }
    image.resize(new, &options, args.shrink).map_err(|e| match e {
        qblk::Error::NotSupported(what) => {
            Failure::said(format!("{}: does not support {what}", name()))
        }
        e => e.into(),
    })?;
    image.flush()?;
    image.close()?;
    if args.told.json {
        let mut all = Map::new();
        json::put_name(&mut all, "filename", args.image.as_bytes());
        all.insert("old_size".into(), json!(old));
        all.insert("size".into(), json!(new));
        return json::print(&all.into());
    }
    if !args.told.quiet {
        let mut out = std::io::stdout().lock();
        writeln!(
            out,
            "{}: now {}, was {}",
            shown(&args.image),
            human_and_exact(new),
            human_and_exact(old)
        )?;
    }
    Ok(())
}
