//! `qblk read`: bytes of the disk, as they are or as a hexadecimal dump.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;

use qblk::block::quoted;
use qblk::{Image, OpenFlags};

use crate::cli::ReadArgs;
use crate::failure::{Failure, Result};
use crate::open::{chain, file_id};
use crate::target::HalfMade;

/// Bytes read at a time.
const PIECE: u64 = 1 << 20;
/// Bytes in a line of a dump.
const LINE: usize = 16;

pub fn run(args: &ReadArgs) -> Result<()> {
    let image = args.open.open(&args.image, OpenFlags::default())?;
    let size = image.size()?;
    let (offset, count) = (args.offset, args.length.unwrap_or(size.saturating_sub(args.offset)));
    if offset.checked_add(count).is_none_or(|end| end > size) {
        let file = args.image.clone().into();
        return Err(qblk::Error::Range { file, offset, count, size }.into());
    }
    let Some(to) = &args.to else {
        let out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
        let hex = args.hex || (!args.raw && io::stdout().is_terminal());
        return pour(&image, offset, count, hex, out, Failure::from);
    };
    let name = || quoted(to.as_bytes());
    if let Some(id) = file_id(to) {
        let (settings, flags) = (args.open.settings(), args.open.flags());
        let alone = args.open.no_backing || args.open.untrusted;
        let harms = file_id(&args.image) == Some(id)
            || !alone
                && chain(&args.image, &settings, flags)?
                    .iter()
                    .any(|l| file_id(&l.name) == Some(id));
        if harms {
            return Err(Failure::said(format!(
                "{}: is what is read from; not overwritten",
                name()
            )));
        }
    }
    let file = File::create(to).map_err(|e| Failure::io(name(), &e))?;
    let half = HalfMade::new(to);
    pour(&image, offset, count, args.hex, BufWriter::new(file), |e| Failure::io(name(), &e))?;
    half.keep();
    Ok(())
}

/// Bring `count` bytes from `offset` on to `out`.
fn pour(
    image: &Image,
    offset: u64,
    count: u64,
    hex: bool,
    mut out: impl Write,
    failed: impl Fn(io::Error) -> Failure,
) -> Result<()> {
    let mut buf = vec![0; count.min(PIECE) as usize];
    let mut dump = Dump::default();
    let (mut at, end) = (offset, offset + count);
    while at < end {
        let n = (end - at).min(PIECE) as usize;
        let bytes = &mut buf[..n];
        image.read_at(bytes, at)?;
        match hex {
            true => dump.lines(bytes, at, &mut out).map_err(&failed)?,
            false => out.write_all(bytes).map_err(&failed)?,
        }
        at += n as u64;
    }
    if hex && count > 0 {
        writeln!(out, "{end:010x}").map_err(&failed)?;
    }
    out.flush().map_err(&failed)
}

/// A dump as `hexdump -C` makes it: lines that repeat are one star.
#[derive(Default)]
struct Dump {
    last: Option<[u8; LINE]>,
    starred: bool,
}

impl Dump {
    fn lines(&mut self, bytes: &[u8], offset: u64, out: &mut impl Write) -> io::Result<()> {
        for (i, line) in bytes.chunks(LINE).enumerate() {
            let full: Option<[u8; LINE]> = line.try_into().ok();
            if full.is_some() && full == self.last {
                if !self.starred {
                    self.starred = true;
                    writeln!(out, "*")?;
                }
                continue;
            }
            (self.last, self.starred) = (full, false);
            writeln!(out, "{}", dump_line(line, offset + (i * LINE) as u64))?;
        }
        Ok(())
    }
}

fn dump_line(line: &[u8], offset: u64) -> String {
    use std::fmt::Write;
    let mut text = format!("{offset:010x} ");
    for i in 0..LINE {
        if i % 8 == 0 {
            text.push(' ');
        }
        match line.get(i) {
            Some(byte) => drop(write!(text, "{byte:02x} ")),
            None => text.push_str("   "),
        }
    }
    text.push_str(" |");
    text.extend(line.iter().map(|&b| if (b' '..=b'~').contains(&b) { b as char } else { '.' }));
    text.push('|');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_stars_what_repeats_even_across_pieces() {
        let mut out = Vec::new();
        let mut dump = Dump::default();
        dump.lines(&[0; 32], 0, &mut out).unwrap();
        dump.lines(&[0; 16], 32, &mut out).unwrap();
        dump.lines(b"Hello\x00", 48, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[1], "*");
        assert_eq!(lines[2], format!("{:<62}|Hello.|", "0000000030  48 65 6c 6c 6f 00"));
    }
}
