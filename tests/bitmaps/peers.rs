//! What QEMU says of bitmaps, and what we do.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::common::*;
use qblk::block::{BitmapChange, BitmapInfo};
use qblk::{Error, Extent, Image};

/// Runs that are dirty: offset and length.
pub type Runs = Vec<(u64, u64)>;

/// A program that is ended with the test.
pub struct Peer(pub Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Wait until a socket takes connections.
pub fn wait_for(socket: &Path) {
    let late = Instant::now() + Duration::from_secs(30);
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < late, "nobody listens at {}", socket.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What QEMU finds dirty in a bitmap that an NBD server tells of.
pub fn map_over_nbd(socket: &Path, bitmap: &str) -> Runs {
    // QEMU 10 shows flags of the context asked for as those of base:allocation: 1 is "no data".
    let how = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let text = qemu_img!("map", "--output=json", "--image-opts", how);
    let mut runs: Runs = Vec::new();
    // An extent a line.
    for line in text.lines() {
        let number = |key: &str| -> u64 {
            let at = line.find(key).unwrap_or_else(|| panic!("{key} not in {line}")) + key.len();
            let digits: String = line[at..].chars().take_while(char::is_ascii_digit).collect();
            digits.parse().unwrap()
        };
        if line.contains("\"data\": false") {
            let (offset, len) = (number("\"start\": "), number("\"length\": "));
            match runs.last_mut() {
                Some(last) if last.0 + last.1 == offset => last.1 += len,
                _ => runs.push((offset, len)),
            }
        }
    }
    runs
}

/// What QEMU finds dirty in a bitmap of an image.
pub fn qemu_dirty(image: &Path, bitmap: &str) -> Runs {
    let socket = image.with_extension("sock");
    let _ = std::fs::remove_file(&socket);
    let args = ["-r", "-t", "-f", "qcow2", "-e", "9", "-B", bitmap, "-k"];
    let mut command = Command::new("qemu-nbd");
    command.args(args).arg(&socket).arg(image).stderr(Stdio::null());
    let server = Peer(command.spawn().expect("install qemu-utils (apt-get install qemu-utils)"));
    wait_for(&socket);
    let runs = map_over_nbd(&socket, bitmap);
    drop(server);
    runs
}

/// What we find dirty in a bitmap of an open image.
pub fn dirty(image: &Image, bitmap: &str) -> Runs {
    try_dirty(image, bitmap).unwrap_or_else(|e| panic!("{bitmap}: {e}"))
}

pub fn try_dirty(image: &Image, bitmap: &str) -> Result<Runs, Error> {
    let (size, mut at, mut runs) = (image.size()?, 0, Runs::new());
    while at < size {
        let mut some = [Extent::default(); 61];
        let n = image.dirty_extents(bitmap.as_bytes(), true, at, size - at, &mut some)?;
        assert!(n > 0);
        for e in &some[..n] {
            assert_eq!(e.offset, at);
            assert!(e.flags & !Extent::DIRTY == 0, "{e:?}");
            if e.has(Extent::DIRTY) {
                match runs.last_mut() {
                    Some(last) if last.0 + last.1 == e.offset => last.1 += e.length,
                    _ => runs.push((e.offset, e.length)),
                }
            }
            at += e.length;
        }
    }
    Ok(runs)
}

pub fn add(image: &Image, name: &str, granularity: u64, disabled: bool) {
    let name = name.as_bytes();
    image.change_bitmap(&BitmapChange::Add { name, granularity, disabled }).unwrap();
}

pub fn info(image: &Image, name: &str) -> BitmapInfo {
    let all = image.bitmaps().unwrap();
    all.into_iter().find(|b| b.name == name.as_bytes()).unwrap_or_else(|| panic!("no {name}"))
}

/// The flags of a bitmap as QEMU reads them from the image.
pub fn qemu_flags(image: &Path, name: &str) -> Vec<String> {
    let text = qemu_img!("info", "-U", "-f", "qcow2", image);
    let mut flags = Vec::new();
    // Flags, and then the name that they are of.
    for line in text.lines().map(str::trim) {
        match line.split_once(": ") {
            _ if line == "flags:" => flags.clear(),
            Some(("name", found)) if found == name => return flags,
            Some((key, flag)) if key.starts_with('[') => flags.push(flag.to_owned()),
            _ => {}
        }
    }
    panic!("{name}: {text}");
}

/// Bytes in runs.
pub fn total(runs: &Runs) -> u64 {
    runs.iter().map(|r| r.1).sum()
}
