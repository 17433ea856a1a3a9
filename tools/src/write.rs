//! `qblk write`: bytes into the disk, from a file, a pattern, or zeroes; flushed at the end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;

use qblk::block::quoted;
use qblk::{Image, OpenFlags, ReqFlags};
use serde_json::{Map, json};

use crate::cli::WriteArgs;
use crate::failure::{Failure, Result};
use crate::json;
use crate::units::{human_and_exact, shown};

/// Bytes written at a time.
const PIECE: u64 = 1 << 20;

pub fn run(args: &WriteArgs) -> Result<()> {
    let image = args.open.open(&args.image, OpenFlags::RDWR)?;
    let flags = if args.fua { ReqFlags::FUA } else { ReqFlags::NONE };
    let (what, count) = match args.length {
        Some(length) if args.zero => {
            let trim = if args.may_trim { ReqFlags::MAY_TRIM } else { ReqFlags::NONE };
            image.zero(args.offset, length, flags | trim)?;
            ("zeroed", length)
        }
        Some(length) if args.trim => {
            image.trim(args.offset, length, flags)?;
            ("trimmed", length)
        }
        length => {
            let count = match (args.pattern, length) {
                (Some(byte), Some(length)) => pattern(args, &image, byte, length, flags)?,
                _ => from_file(args, &image, length, flags)?,
            };
            ("written", count)
        }
    };
    image.flush()?;
    image.close()?;
    if args.told.json {
        let mut all = Map::new();
        json::put_name(&mut all, "filename", args.image.as_bytes());
        all.insert("offset".into(), json!(args.offset));
        all.insert("length".into(), json!(count));
        all.insert("done".into(), json!(what));
        return json::print(&all.into());
    }
    if !args.told.quiet {
        let mut out = std::io::stdout().lock();
        let name = shown(&args.image);
        writeln!(out, "{name}: {} {what} at offset {}", human_and_exact(count), args.offset)?;
    }
    Ok(())
}

/// Refuse a range that leaves the image before any of it is written.
fn check_range(args: &WriteArgs, image: &Image, count: u64) -> Result<()> {
    let (offset, size) = (args.offset, image.size()?);
    if offset.checked_add(count).is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(qblk::Error::Range { file: args.image.clone().into(), offset, count, size }.into())
}

fn pattern(args: &WriteArgs, image: &Image, byte: u8, length: u64, flags: ReqFlags) -> Result<u64> {
    check_range(args, image, length)?;
    let buf = vec![byte; length.min(PIECE) as usize];
    let mut done = 0;
    while done < length {
        let n = (length - done).min(PIECE);
        image.write_at(&buf[..n as usize], args.offset + done, flags)?;
        done += n;
    }
    Ok(length)
}

fn from_file(args: &WriteArgs, image: &Image, length: Option<u64>, flags: ReqFlags) -> Result<u64> {
    let from = args.from.as_deref().filter(|name| *name != "-");
    let name = || from.map_or("standard input".to_owned(), |name| quoted(name.as_bytes()));
    let mut input: Box<dyn Read> = match from {
        None => Box::new(io::stdin().lock()),
        Some(path) => {
            let file = File::open(path).map_err(|e| Failure::io(name(), &e))?;
            let meta = file.metadata().map_err(|e| Failure::io(name(), &e))?;
            if meta.is_file() {
                check_range(args, image, length.unwrap_or(meta.len()))?;
            }
            Box::new(file)
        }
    };
    // What comes from a pipe has no length beforehand; it is checked piece by piece.
    check_range(args, image, length.unwrap_or(0))?;
    let limit = length.unwrap_or(u64::MAX);
    let mut buf = vec![0; limit.min(PIECE) as usize];
    let mut done = 0;
    while done < limit {
        let want = (limit - done).min(PIECE) as usize;
        let n = fill(&mut input, &mut buf[..want]).map_err(|e| Failure::io(name(), &e))?;
        image.write_at(&buf[..n], args.offset + done, flags)?;
        done += n as u64;
        if n < want {
            break;
        }
    }
    match length {
        Some(length) if done < length => Err(Failure::said(format!(
            "{}: ended after {done} of {length} bytes, which were written",
            name()
        ))),
        _ => Ok(done),
    }
}

/// Read until `buf` is full or the input ends.
fn fill(input: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match input.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
