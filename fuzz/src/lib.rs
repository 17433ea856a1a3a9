//! What the fuzz targets do with their input. A target fails by panicking, by taking too long, or by
//! taking too much memory; what the library answers is not judged, the inputs are hostile, unless that is
//! said.
//!
//! * [`luks_header`]: the input is a file. It is described, and opened with a key.
//! * [`qcow2_header`]: the input is a file. It is described, probed and opened.
//! * [`qcow2_ops`]: the input is a script of operations and an image that they are done to.
//! * [`qcow2_snapshots`]: the same, for internal snapshots and amending.
//! * [`bitmaps::qcow2_bitmaps`]: the same, and what is done is done to bitmaps.
//! * [`partition::partition_table`]: the input is a disk, of which a partition is opened. Here the answer is
//!   judged, too: by what the disk's tables say.
//! * [`nbd::handshake`]: the input is what a client says to the NBD server, from its first byte on.
//! * [`nbd::transmission`]: the input is a script of requests after a right negotiation.
//!
//! Nothing that an image names is ever opened: images are opened with `implicit-open=deny`, and with a
//! backing device or a data file in memory or none.

pub mod bitmaps;
pub mod nbd;
pub mod nbd_client;
pub mod partition;
mod snapshots;

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};

use qblk::{Extent, Image, OpenFlags, Options, ReqFlags, Result};
pub use snapshots::qcow2_snapshots;

/// Bytes of one data call, at most: larger ones find nothing more.
const MAX_CALL: u64 = 64 << 10;
/// Bytes of one zero, trim or extents call, and by which an image grows, at most.
const MAX_RANGE: u64 = 4 << 20;
/// Operations, at most.
const MAX_OPS: usize = 32;
/// A command and its arguments.
const OP_BYTES: usize = 6;

/// A file in memory that holds `bytes`.
fn memory_file(bytes: &[u8]) -> Option<OwnedFd> {
    // SAFETY: the name ends with NUL; the descriptor, if there is one, is nobody else's.
    let file = unsafe {
        match libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) {
            fd if fd < 0 => return None,
            fd => File::from_raw_fd(fd),
        }
    };
    (&file).write_all(bytes).ok()?;
    Some(file.into())
}

fn open(bytes: &[u8], options: &Options, flags: OpenFlags) -> Option<Image> {
    let options = options.clone().with("implicit-open", "deny");
    Image::open_fd(memory_file(bytes)?, &options, flags).ok()
}

/// Everything that can be asked without touching data.
fn describe(image: &Image) {
    let _ = image.info();
    if let Ok(Some(names)) = image.property("properties") {
        for name in String::from_utf8_lossy(&names).lines() {
            let _ = image.property(name);
        }
    }
}

/// A file that may be a LUKS image. Trying a key takes as long as the header says, within a limit of
/// seconds: numbers of iterations are made small here, unless they are so large that the limit is met.
pub fn luks_header(data: &[u8]) {
    let mut data = data.to_vec();
    for at in std::iter::once(164).chain((0..8).map(|slot| 212 + 48 * slot)) {
        if let Some([high, rest @ .., _]) = data.get_mut(at..at + 4)
            && *high < 0x80
        {
            *high = 0;
            rest.fill(0);
        }
    }
    let luks = Options::new().with("format", "luks");
    let key = luks.clone().with("key", "open sesame");
    for (options, flags) in [
        (&luks, OpenFlags::INFO_ONLY),
        (&key, OpenFlags::UNTRUSTED),
        (&key, OpenFlags::RDWR),
        (&Options::new(), OpenFlags::INFO_ONLY),
    ] {
        let Some(image) = open(&data, options, flags) else { continue };
        describe(&image);
        let size = image.size().unwrap_or(0);
        let mut buf = [0; 4096];
        for at in [0, size / 2, size.saturating_sub(4096)] {
            let n = (size - at).min(4096) as usize;
            let _ = image.read_at(&mut buf[..n], at);
            let _ = image.write_at(&buf[..n], at, ReqFlags::NONE);
        }
        let _ = image.extents(0, size, &mut [Extent::default(); 8]);
        let _ = image.close();
    }
}

/// A file that may be a qcow2 image.
pub fn qcow2_header(data: &[u8]) {
    let qcow2 = Options::new().with("format", "qcow2");
    for (options, flags) in [
        (&qcow2, OpenFlags::INFO_ONLY),
        (&Options::new(), OpenFlags::NO_BACKING),
        (&qcow2, OpenFlags::UNTRUSTED),
        (&qcow2, OpenFlags::RDWR | OpenFlags::NO_BACKING),
    ] {
        let Some(image) = open(data, options, flags) else { continue };
        describe(&image);
        let size = image.size().unwrap_or(0);
        let mut buf = [0; 4096];
        for at in [0, size / 2, size.saturating_sub(4096)] {
            let n = (size - at).min(4096) as usize;
            let _ = image.read_at(&mut buf[..n], at);
        }
        let _ = image.extents(0, size, &mut [Extent::default(); 8]);
        let _ = image.close();
    }
}

/// Split an input: a byte that says how to open, a byte that says how many operations there are,
/// those, and the image.
fn split(data: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[how, count], rest) = data.split_first_chunk()?;
    let script = usize::from(count).min(MAX_OPS) * OP_BYTES;
    let (script, image) = rest.split_at_checked(script)?;
    Some((how, script, image))
}

/// An image and what is done to it.
pub fn qcow2_ops(data: &[u8]) {
    let Some((how, script, bytes)) = split(data) else { return };
    let mut options = Options::new().with("format", "qcow2");
    let mut flags = OpenFlags::RDWR;
    match how & 3 {
        0 => flags = flags | OpenFlags::NO_BACKING,
        1 => flags = flags | OpenFlags::NO_BACKING | OpenFlags::UNTRUSTED,
        // Something below that reads as zeroes.
        2 => options = options.with("backing-file", "mem:1M").with("backing.format", "raw"),
        _ => flags = OpenFlags::NO_BACKING,
    }
    if how & 4 != 0 {
        options = options.with("cache.l2-size", "1");
    }
    // Of use where the header asks for the old AES; any key opens that.
    if how & 8 != 0 {
        options = options.with("key", "open sesame");
    }
    // Of use where the header asks for one; elsewhere that is a mistake.
    if how & 16 != 0 {
        options = options.with("data-file", "mem:1M");
    }
    let Some(image) = open(bytes, &options, flags) else { return };
    let mut buf = vec![how; MAX_CALL as usize];
    for op in script.chunks_exact(OP_BYTES) {
        let _ = step(&image, op, &mut buf);
    }
    describe(&image);
    let _ = image.close();
}

/// One operation: command, four bytes of offset, a byte of length.
fn step(image: &Image, op: &[u8], buf: &mut [u8]) -> Result<()> {
    let &[command, o0, o1, o2, o3, len] = op else { return Ok(()) };
    let size = image.size()?;
    // Near the beginning, where small images have their clusters, near the end, or anywhere.
    let raw = u64::from(u32::from_le_bytes([o0, o1, o2, o3]));
    let offset = match command >> 6 {
        0 => raw & 0xf_ffff,
        1 => size.saturating_sub(raw & 0xf_ffff),
        2 => ((u128::from(size) * u128::from(raw)) >> 32) as u64,
        _ => raw << 9,
    }
    .min(size);
    // Odd lengths are bytes, even ones sectors or more.
    let most = match len & 3 {
        0 => u64::from(len) * 512,
        1 | 3 => u64::from(len),
        _ => u64::from(len) * 16384,
    }
    .min(size - offset);
    let n = most.min(MAX_CALL) as usize;
    let range = most.min(MAX_RANGE);
    match command & 15 {
        0 | 1 => image.write_at(&buf[..n], offset, ReqFlags::NONE),
        2 => image.write_at(&buf[..n], offset, ReqFlags::FUA),
        3 => image.zero(offset, range, ReqFlags::NONE),
        4 => image.zero(offset, range, ReqFlags::MAY_TRIM),
        5 => image.zero(offset, range, ReqFlags::FAST_ZERO | ReqFlags::FUA),
        6 => image.trim(offset, range, ReqFlags::NONE),
        7 => image.flush(),
        8 => image.extents(offset, most, &mut [Extent::default(); 16]).map(drop),
        9 => image.resize((size + (raw & 0x3f_ffff)).min(size + MAX_RANGE), &Options::new(), false),
        10 => image.resize(offset, &Options::new(), true),
        11 => {
            let how = ["metadata", "falloc", "full", "off"][usize::from(len & 3)];
            let options = Options::new().with("preallocation", how);
            image.resize(size + (raw & 0x3_ffff), &options, false)
        }
        12 => image.cache(offset, range),
        13 => {
            let other = image.context(&Options::new(), OpenFlags(u32::from(len & 1)))?;
            other.write_at(&buf[..n], offset, ReqFlags::NONE)?;
            other.close()
        }
        _ => image.read_at(&mut buf[..n], offset),
    }
}

/// Run `target` on the files (and directories of files) that the command line names.
pub fn run_files(target: fn(&[u8])) -> std::io::Result<()> {
    let mut names: Vec<_> = std::env::args_os().skip(1).map(std::path::PathBuf::from).collect();
    if names.is_empty() {
        eprintln!("usage: TARGET FILE... (fuzz/run.sh SECONDS fuzzes)");
        std::process::exit(2);
    }
    let mut count = 0;
    while let Some(name) = names.pop() {
        if name.is_dir() {
            for entry in std::fs::read_dir(&name)? {
                names.push(entry?.path());
            }
            continue;
        }
        target(&std::fs::read(&name)?);
        count += 1;
    }
    println!("{count} inputs, no crash");
    Ok(())
}
