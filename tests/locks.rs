//! File locks: against QEMU's programs, between this library's own modes, under races, kept across
//! reopening. What is locked is read from /proc/locks, byte for byte.

mod common;
#[path = "locks/modes.rs"]
mod modes;
#[path = "locks/peers.rs"]
mod peers;
#[path = "locks/races.rs"]
mod races;
#[path = "locks/told.rs"]
mod told;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use common::*;
use qblk::{Error, Image, OpenFlags};

pub const SHARED: OpenFlags = OpenFlags::SHARED;
pub const INFO: OpenFlags = OpenFlags::INFO_ONLY;
pub const NO_LOCK: OpenFlags = OpenFlags::NO_LOCK;

pub const WRITER: &[u64] = &[100, 101, 103, 201, 203];
pub const READER: &[u64] = &[100, 201, 203];

/// The bytes that are locked on a file, one entry for each lock on each byte, ascending.
pub fn locked(path: &Path) -> Vec<u64> {
    // The kernel hands the list out in pages, between which locks of others come and go and shift what
    // is left: a line may be missed or shown twice. What is seen three times in a row, and agrees with
    // what each byte says for itself, is so.
    let third = Third::new(path);
    let mut seen: Vec<Vec<u64>> = Vec::new();
    loop {
        let list = look(path);
        let mut bytes = list.clone();
        bytes.dedup();
        if bytes == (0..300).filter(|&b| third.sees(b)).collect::<Vec<_>>() {
            seen.push(list);
        }
        if let [.., a, b, c] = &seen[..]
            && a == b
            && b == c
        {
            return c.clone();
        }
        assert!(seen.len() < 1000, "no three looks are alike: {:?}", &seen[990..]);
    }
}

fn look(path: &Path) -> Vec<u64> {
    let inode = fs::metadata(path).unwrap().ino().to_string();
    let mut bytes = Vec::new();
    for line in fs::read_to_string("/proc/locks").unwrap().lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "OFDLCK", _, kind, _, file, start, end] = words[..] else { continue };
        if file.rsplit(':').next() == Some(&*inode) {
            assert_eq!(kind, "READ", "only shared locks are ever held: {line}");
            bytes.extend(start.parse::<u64>().unwrap()..=end.parse::<u64>().unwrap());
        }
    }
    bytes.sort_unstable();
    bytes
}

/// Somebody else who holds bytes of a file, as QEMU's programs do.
pub struct Third(File);

impl Third {
    pub fn new(path: &Path) -> Self {
        Self(File::open(path).unwrap())
    }

    /// Hold bytes, whoever is in the way.
    pub fn hold(path: &Path, bytes: &[u64]) -> Self {
        let third = Self::new(path);
        bytes.iter().for_each(|&b| assert!(third.set(libc::F_RDLCK, b)));
        third
    }

    pub fn set(&self, kind: i32, byte: u64) -> bool {
        let mut lock = range(kind, byte);
        // SAFETY: `lock` is ours.
        unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_OFD_SETLK, &mut lock) == 0 }
    }

    /// Whether somebody else holds the byte.
    pub fn sees(&self, byte: u64) -> bool {
        let mut lock = range(libc::F_WRLCK, byte);
        // SAFETY: `lock` is ours.
        assert_eq!(unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) }, 0);
        lock.l_type != libc::F_UNLCK as libc::c_short
    }

    /// Open for `bytes` as QEMU does: lock all, then test, then (here) let go. Whether it got in.
    pub fn attempt(&self, bytes: &[u64]) -> bool {
        bytes.iter().for_each(|&b| assert!(self.set(libc::F_RDLCK, b)));
        let free = !bytes.iter().any(|&b| self.sees(if b < 200 { b + 100 } else { b - 100 }));
        bytes.iter().for_each(|&b| assert!(self.set(libc::F_UNLCK, b)));
        free
    }
}

impl Drop for Third {
    fn drop(&mut self) {
        // Closing would do, but for a test that is starting a program just now: its child has the
        // description too until it becomes that program.
        let mut all = range(libc::F_UNLCK, 0);
        all.l_len = 0;
        // SAFETY: `all` is ours.
        assert_eq!(unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_OFD_SETLK, &mut all) }, 0);
    }
}

fn range(kind: i32, byte: u64) -> libc::flock {
    // SAFETY: a `flock` of zeroes is a valid one.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_start, lock.l_len) = (kind as _, byte as _, 1);
    lock
}

/// Whether two who hold (and so want) these bytes get on with each other.
pub fn agree(a: &[u64], b: &[u64]) -> bool {
    let clash =
        |x: &[u64], y: &[u64]| x.iter().any(|&u| (100..200).contains(&u) && y.contains(&(u + 100)));
    !clash(a, b) && !clash(b, a)
}

/// A program of QEMU that has an image open until this is dropped.
pub struct Peer {
    child: Child,
    _stdin: Option<ChildStdin>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self._stdin = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Peer {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// qemu-io, which has opened the image; `None` if it could not.
    pub fn try_io(flags: &[&str], format: &str, image: &Path) -> Option<Self> {
        let mut child = Command::new("qemu-io")
            .args(flags)
            .args(["-f", format])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("install qemu-utils (apt-get install qemu-utils)");
        let mut stdin = child.stdin.take().unwrap();
        let _ = stdin.write_all(b"length\n");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        // What it answers is a size; when it could not open, it ends without a word here.
        if !line.contains("iB") && !line.contains("bytes") {
            let _ = child.wait();
            return None;
        }
        Some(Self { child, _stdin: Some(stdin) })
    }

    pub fn io(flags: &[&str], format: &str, image: &Path) -> Self {
        Self::try_io(flags, format, image)
            .unwrap_or_else(|| panic!("qemu-io {flags:?} {format} {} failed", image.display()))
    }

    /// A server that says on a line of its standard output, or by its socket, that it is ready.
    pub fn server(program: &str, args: &[String], socket: &Path) -> Self {
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .expect("install qemu-utils and qemu-system-common (apt-get install ...)");
        let peer = Self { child, _stdin: None };
        let patience = std::time::Instant::now() + std::time::Duration::from_secs(30);
        loop {
            if let Ok(mut stream) = UnixStream::connect(socket) {
                // It listens before it opens the image, and greets when all is done.
                let mut greeting = [0; 8];
                stream.read_exact(&mut greeting).unwrap();
                assert_eq!(&greeting, b"NBDMAGIC");
                break;
            }
            assert!(std::time::Instant::now() < patience, "{program} {args:?} does not listen");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        peer
    }

    pub fn nbd(dir: &Tmp, flags: &[&str], format: &str, image: &Path) -> Self {
        let socket = dir.join(format!("nbd-{}.sock", flags.concat()));
        let _ = fs::remove_file(&socket);
        let mut args: Vec<String> = flags.iter().map(|f| (*f).to_owned()).collect();
        for arg in ["-t", "-e", "9", "-f", format, "-k"] {
            args.push(arg.into());
        }
        args.push(socket.display().to_string());
        args.push(image.display().to_string());
        Self::server("qemu-nbd", &args, &socket)
    }
}

pub fn is_locked(result: Result<Image, Error>, what: &str) -> String {
    match result {
        Ok(_) => panic!("{what}: opened, although it is locked"),
        Err(e @ Error::Locked { .. }) => e.to_string(),
        Err(e) => panic!("{what}: another error: {e}"),
    }
}
