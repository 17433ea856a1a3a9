//! `qblk amend`: another version, another width of refcounts, other keys, and the like.

use std::io::{IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use qblk::OpenFlags;
use qblk::block::{Progress, quoted};
use serde_json::Map;

use crate::cli::AmendArgs;
use crate::failure::{Failure, Result};
use crate::json;
use crate::open::options;
use crate::signals;
use crate::units::shown;

pub fn run(args: &AmendArgs) -> Result<()> {
    if args.options.is_empty() {
        return Err(Failure::usage("nothing to change: give -o KEY=VALUE"));
    }
    // What it stands on does not matter, and need not be there.
    let image = args.open(OpenFlags::RDWR | OpenFlags::NO_BACKING)?;
    signals::catch();
    let bar = !args.told.quiet && std::io::stderr().is_terminal();
    let last = AtomicU64::new(u64::MAX);
    let tell = |done: u64, total: u64| {
        let percent = done * 100 / total.max(1);
        if bar && last.swap(percent, Relaxed) != percent {
            let _ = write!(std::io::stderr(), "\r{percent:3} %");
        }
        signals::asked_to_end().is_none()
    };
    let done = image.amend(&options(&args.options), Progress::new(&tell));
    if bar && last.load(Relaxed) != u64::MAX {
        let _ = write!(std::io::stderr(), "\r     \r");
    }
    done.map_err(|e| match (e, signals::asked_to_end()) {
        (qblk::Error::Canceled, Some(signal)) => {
            let text = format!("{}: is as it was", quoted(args.image.as_bytes()));
            Failure::Signal(signal, Some(text))
        }
        (qblk::Error::NotSupported(what), _) => Failure::said(format!(
            "{}: its format does not support {what}",
            quoted(args.image.as_bytes())
        )),
        (e, _) => e.into(),
    })?;
    image.close()?;
    if args.told.json {
        let mut all = Map::new();
        json::put_name(&mut all, "filename", args.image.as_bytes());
        return json::print(&all.into());
    }
    if !args.told.quiet {
        writeln!(std::io::stdout().lock(), "{}: amended", shown(&args.image))?;
    }
    Ok(())
}
