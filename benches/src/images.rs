//! The images that the bench needs: made by qemu-img and plain writes, so that no library measures
//! itself on its own work; kept in two directories, which go when the bench ends, however it ends.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::oracle::{Oracle, at};
use crate::qemu;
use crate::work::Res;

/// Clusters of all images, bytes.
pub const CLUSTER: u64 = 65536;
/// Where there is data in the 1 TiB image: once in the reach of each 4 KiB of L2 table.
pub const PIECE: u64 = CLUSTER * 512;
/// Images in the chain.
pub const CHAIN: usize = 8;

const TIB: u64 = 1 << 40;

/// Where an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum On {
    /// In memory: nothing takes it from there.
    Tmpfs,
    /// On a disk's file system, in the page cache: where io_uring is at its best.
    Disk,
}

/// An image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Every cluster there, in order.
    Full,
    /// The same bytes, raw.
    Raw,
    /// [`CHAIN`] images of which the lowest is [`Kind::Full`] and the others have nothing.
    Bottom,
    /// [`CHAIN`] images of which each has its share of the clusters.
    Spread,
    /// Nothing there.
    Empty,
    /// 1 TiB, every L2 table full, data at each [`PIECE`].
    Tib,
    /// What the compressed ones hold, raw.
    Programs,
    /// Compressed.
    Zlib,
    /// Compressed.
    Zstd,
    /// The bytes of [`Kind::Raw`], encrypted with LUKS.
    Luks,
    /// Raw, for servers to read.
    Served,
    /// The same bytes as qcow2.
    ServedQcow2,
    /// Raw, for servers to write.
    Taken,
}

impl Kind {
    fn file(self) -> &'static str {
        match self {
            Self::Full => "full.qcow2",
            Self::Raw => "full.raw",
            Self::Bottom => "bottom.qcow2",
            Self::Spread => "spread.qcow2",
            Self::Empty => "empty.qcow2",
            Self::Tib => "tib.qcow2",
            Self::Programs => "programs.raw",
            Self::Zlib => "zlib.qcow2",
            Self::Zstd => "zstd.qcow2",
            Self::Luks => "luks.qcow2",
            Self::Served => "served.raw",
            Self::ServedQcow2 => "served.qcow2",
            Self::Taken => "taken.raw",
        }
    }

    /// What it stands on, which must be there as long as it is.
    fn stands_on(self) -> Option<Self> {
        matches!(self, Self::Bottom | Self::Spread).then_some(Self::Full)
    }
}

/// Directories to remove at the end; a static, for the thread that waits for signals.
static DIRS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Remove what the bench made.
pub fn clean_up() {
    let dirs = DIRS.lock().map(|mut d| std::mem::take(&mut *d)).unwrap_or_default();
    for dir in dirs {
        let _ = std::fs::remove_dir_all(dir);
    }
}

/// All images of a run.
pub struct Images {
    tmpfs: PathBuf,
    disk: Option<PathBuf>,
    /// Size of the plain images, bytes.
    pub size: u64,
    /// Size of the compressed ones, bytes.
    pub small: u64,
    /// Size of those that servers have, bytes.
    pub served: u64,
    made: BTreeSet<(Kind, On)>,
    /// Says what is being made.
    pub note: fn(&str),
}

impl Drop for Images {
    fn drop(&mut self) {
        clean_up();
    }
}

impl Images {
    /// `tmpfs` must be one, `disk` is left out if it is one.
    pub fn new(tmpfs: &Path, disk: &Path, size: u64, small: u64, note: fn(&str)) -> Res<Self> {
        if !is_tmpfs(tmpfs)? {
            return Err(format!("{}: not a tmpfs; option --tmpfs names one", tmpfs.display()));
        }
        let disk = if is_tmpfs(disk)? {
            note(&format!(
                "{}: a tmpfs, where io_uring is slow; option --dir names a directory on a disk. \
                 qemu is measured with its threads only.",
                disk.display()
            ));
            None
        } else {
            Some(disk)
        };
        let images = Self {
            tmpfs: scratch(tmpfs)?,
            disk: disk.map(scratch).transpose()?,
            size,
            small,
            served: size / 4,
            made: BTreeSet::new(),
            note,
        };
        images.room()?;
        Ok(images)
    }

    /// Refuse at once what would end in a full disk.
    fn room(&self) -> Res<()> {
        let needs = 3 * self.size + 2 * TIB / CLUSTER * 8;
        for dir in [Some(&self.tmpfs), self.disk.as_ref()].into_iter().flatten() {
            let free = free_bytes(dir)?;
            if free < needs {
                return Err(format!(
                    "{}: {} MiB are free and the bench needs about {}; --quick needs less",
                    dir.display(),
                    free >> 20,
                    needs >> 20
                ));
            }
        }
        Ok(())
    }

    /// Whether there is a directory on a disk.
    pub fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// The directory for files of a moment.
    pub fn dir(&self, on: On) -> &Path {
        match (on, &self.disk) {
            (On::Disk, Some(disk)) => disk,
            _ => &self.tmpfs,
        }
    }

    /// The image's file.
    pub fn path(&self, kind: Kind, on: On) -> PathBuf {
        self.dir(on).join(kind.file())
    }

    /// The files of a chain from the top down; of any other image, its file.
    pub fn chain(&self, kind: Kind, on: On) -> Vec<PathBuf> {
        let mut all = vec![self.path(kind, on)];
        if matches!(kind, Kind::Bottom | Kind::Spread) {
            all.extend((1..CHAIN - 1).rev().map(|i| self.link(kind, i)));
            all.push(self.path(Kind::Full, on));
        }
        all
    }

    /// The `i`th overlay from below; the topmost has the chain's name.
    fn link(&self, kind: Kind, i: usize) -> PathBuf {
        match i {
            _ if i == CHAIN - 1 => self.path(kind, On::Tmpfs),
            _ => self.tmpfs.join(format!("{i}-{}", kind.file())),
        }
    }

    /// Make the image if it is not there.
    pub fn make(&mut self, kind: Kind, on: On) -> Res<PathBuf> {
        let path = self.path(kind, on);
        if self.made.contains(&(kind, on)) {
            return Ok(path);
        }
        if let Some(below) = kind.stands_on() {
            self.make(below, on)?;
        }
        if on == On::Disk {
            let from = self.make(kind, On::Tmpfs)?;
            (self.note)(&format!("copying {} to the disk", kind.file()));
            copy_sparse(&from, &path)?;
        } else {
            (self.note)(&format!("making {}", kind.file()));
            self.build(kind, &path)?;
        }
        self.made.insert((kind, on));
        Ok(path)
    }

    /// Remove the images that are not among `needed`, which are still to be measured.
    pub fn retain(&mut self, needed: &BTreeSet<(Kind, On)>) {
        let keep = |&(kind, on): &(Kind, On)| {
            needed.iter().any(|&(k, o)| o == on && (k == kind || k.stands_on() == Some(kind)))
        };
        for gone in self.made.iter().filter(|k| !keep(k)).copied().collect::<Vec<_>>() {
            self.made.remove(&gone);
            let _ = std::fs::remove_file(self.path(gone.0, gone.1));
            if matches!(gone.0, Kind::Bottom | Kind::Spread) {
                for i in 1..CHAIN - 1 {
                    let _ = std::fs::remove_file(self.link(gone.0, i));
                }
            }
        }
    }

    fn build(&self, kind: Kind, path: &Path) -> Res<()> {
        match kind {
            Kind::Empty => create(path, self.size, &[]),
            Kind::Full | Kind::ServedQcow2 => {
                let size = if kind == Kind::Full { self.size } else { self.served };
                create(path, size, &["preallocation=metadata"])?;
                let map = Oracle::open(&[path.to_owned()], false, false)?;
                let file = at(path, File::options().write(true).open(path))?;
                for offset in (0..size).step_by(CLUSTER as usize) {
                    let host = map.host(offset)?.ok_or("preallocation left a cluster out")?;
                    at(path, file.write_all_at(&noise(offset, CLUSTER as usize), host))?;
                }
                Ok(())
            }
            Kind::Raw | Kind::Served | Kind::Taken => {
                let size = if kind == Kind::Raw { self.size } else { self.served };
                let mut file = at(path, File::create(path))?;
                for offset in (0..size).step_by(CLUSTER as usize) {
                    at(path, file.write_all(&noise(offset, CLUSTER as usize)))?;
                }
                Ok(())
            }
            Kind::Luks => {
                let raw = self.tmpfs.join("plain.raw");
                self.build(Kind::Raw, &raw)?;
                let made = qemu::encrypt(&raw, path, self.size);
                let _ = std::fs::remove_file(raw);
                made
            }
            Kind::Tib => {
                create(path, TIB, &["preallocation=metadata"])?;
                let map = Oracle::open(&[path.to_owned()], false, false)?;
                let file = at(path, File::options().write(true).open(path))?;
                for offset in (0..TIB).step_by(PIECE as usize) {
                    let host = map.host(offset)?.ok_or("preallocation left a cluster out")?;
                    at(path, file.write_all_at(&noise(offset, 4096), host))?;
                }
                Ok(())
            }
            Kind::Bottom | Kind::Spread => {
                let mut below = self.path(Kind::Full, On::Tmpfs);
                for i in 1..CHAIN {
                    let link = self.link(kind, i);
                    overlay(&link, &below, "qcow2")?;
                    if kind == Kind::Spread {
                        qemu::io_script(&link, &self.share(i))?;
                    }
                    below = link;
                }
                Ok(())
            }
            Kind::Programs => write_programs(path, self.small),
            Kind::Zlib | Kind::Zstd => {
                let raw = self.tmpfs.join("to-compress.raw");
                write_programs(&raw, self.small)?;
                let how = if kind == Kind::Zlib {
                    "compression_type=zlib"
                } else {
                    "compression_type=zstd"
                };
                let made = qemu::run(
                    "qemu-img",
                    &[
                        "convert".as_ref(),
                        "-c".as_ref(),
                        "-f".as_ref(),
                        "raw".as_ref(),
                        "-O".as_ref(),
                        "qcow2".as_ref(),
                        "-o".as_ref(),
                        how.as_ref(),
                        "-m".as_ref(),
                        "8".as_ref(),
                        "-W".as_ref(),
                        raw.as_os_str(),
                        path.as_os_str(),
                    ],
                );
                let _ = std::fs::remove_file(raw);
                made.map(drop)
            }
        }
    }

    /// A file that is made by what is measured.
    pub fn output(&self, name: &str) -> PathBuf {
        self.tmpfs.join(name)
    }

    /// What the `i`th image of [`Kind::Spread`] has: every cluster is in one of them.
    fn share(&self, i: usize) -> String {
        let clusters = 0..self.size / CLUSTER;
        let mine = clusters.filter(|c| (c.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61) as usize == i);
        mine.map(|c| format!("write -q -P {} {} {CLUSTER}\n", i + 1, c * CLUSTER)).collect()
    }
}

/// An own directory under `dir`, and the end of those that killed runs left there.
fn scratch(dir: &Path) -> Res<PathBuf> {
    let prefix = "qblk-bench.";
    for entry in at(dir, std::fs::read_dir(dir))?.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|n| n.strip_prefix(prefix)?.parse::<libc::pid_t>().ok());
        // SAFETY: signal 0 is none; it only asks whether the process is there.
        if let Some(pid) = pid
            && unsafe { libc::kill(pid, 0) } != 0
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    let own = dir.join(format!("{prefix}{}", std::process::id()));
    if let Ok(mut dirs) = DIRS.lock() {
        dirs.push(own.clone());
    }
    at(&own, std::fs::create_dir(&own))?;
    Ok(own)
}

fn statfs(path: &Path) -> Res<libc::statfs> {
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: a C string, and room for the answer, of which all-zero is a valid one.
    unsafe {
        let mut answer: libc::statfs = std::mem::zeroed();
        match libc::statfs(name.as_ptr(), &mut answer) {
            0 => Ok(answer),
            _ => at(path, Err(std::io::Error::last_os_error())),
        }
    }
}

fn is_tmpfs(path: &Path) -> Res<bool> {
    Ok(statfs(path)?.f_type == libc::TMPFS_MAGIC)
}

fn free_bytes(path: &Path) -> Res<u64> {
    let s = statfs(path)?;
    Ok(s.f_bavail.saturating_mul(s.f_bsize as u64))
}

/// `qemu-img create` of a qcow2 image.
pub fn create(path: &Path, size: u64, options: &[&str]) -> Res<()> {
    let size = size.to_string();
    let mut args: Vec<&std::ffi::OsStr> = ["create", "-q", "-f", "qcow2"].map(AsRef::as_ref).into();
    for o in options {
        args.extend(["-o".as_ref(), std::ffi::OsStr::new(o)]);
    }
    args.extend([path.as_os_str(), size.as_ref()]);
    qemu::run("qemu-img", &args).map(drop)
}

/// `qemu-img create` of a qcow2 image over another.
pub fn overlay(path: &Path, backing: &Path, format: &str) -> Res<()> {
    let args: [&std::ffi::OsStr; 9] = [
        "create".as_ref(),
        "-q".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        "-b".as_ref(),
        backing.as_os_str(),
        "-F".as_ref(),
        format.as_ref(),
        path.as_os_str(),
    ];
    qemu::run("qemu-img", &args).map(drop)
}

/// Bytes that nothing compresses, the same ones for the same offset.
fn noise(offset: u64, len: usize) -> Vec<u8> {
    let mut x = (offset ^ 0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A file of what disk images hold: this system's programs and libraries, one after the other, from
/// the first again if they are too few. What text of a made-up sort would deflate to, and how fast,
/// says little: literals cost some decoders far more than matches.
fn write_programs(path: &Path, size: u64) -> Res<()> {
    let mut files = Vec::new();
    for dir in ["/usr/bin", "/usr/lib"] {
        list_files(Path::new(dir), &mut files);
    }
    files.sort();
    let mut to = at(path, File::create(path))?;
    let mut left = size;
    while left > 0 {
        let before = left;
        for file in &files {
            let mut from = match File::open(file) {
                Ok(f) => std::io::Read::take(f, left),
                Err(_) => continue,
            };
            left -= at(path, std::io::copy(&mut from, &mut to))?;
        }
        if left == before {
            return Err(
                "/usr/bin, /usr/lib: nothing to read there, to fill compressed images with"
                    .to_owned(),
            );
        }
    }
    Ok(())
}

fn list_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        // Links are not followed: they might go round.
        match entry.file_type() {
            Ok(t) if t.is_dir() => list_files(&entry.path(), files),
            Ok(t) if t.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
}

/// Copy a file, holes kept, by writes of 1 MiB at most: how a file on ext4 was written decides what
/// small writes to it cost later, so it is always done alike.
fn copy_sparse(from: &Path, to: &Path) -> Res<()> {
    let source = at(from, File::open(from))?;
    let target = at(to, File::create(to))?;
    let len = at(from, source.metadata())?.len();
    at(to, target.set_len(len))?;
    let mut buf = vec![0; 1 << 20];
    let mut pos = 0;
    while pos < len {
        // SAFETY: a descriptor and numbers.
        let (data, end) = unsafe {
            let data = libc::lseek(source.as_raw_fd(), pos as i64, libc::SEEK_DATA);
            (data, libc::lseek(source.as_raw_fd(), data.max(0), libc::SEEK_HOLE))
        };
        if data < 0 {
            break;
        }
        pos = data as u64;
        while pos < end as u64 {
            let n = (end as u64 - pos).min(buf.len() as u64) as usize;
            at(from, source.read_exact_at(&mut buf[..n], pos))?;
            at(to, target.write_all_at(&buf[..n], pos))?;
            pos += n as u64;
        }
    }
    // Writing back must not happen while samples run.
    at(to, target.sync_all())
}

/// Read a file again if any of it has left the page cache: files go cold within minutes on some
/// machines, and a disk is not what is measured.
pub fn refresh(path: &Path) -> Res<()> {
    let file = at(path, File::open(path))?;
    let len = at(path, file.metadata())?.len();
    let mut buf = vec![0; 1 << 20];
    let mut pos = 0;
    while pos < len {
        // SAFETY: a descriptor and numbers.
        let (data, end) = unsafe {
            let data = libc::lseek(file.as_raw_fd(), pos as i64, libc::SEEK_DATA);
            (data, libc::lseek(file.as_raw_fd(), data.max(0), libc::SEEK_HOLE))
        };
        if data < 0 {
            break;
        }
        if !resident(&file, data as u64, end as u64) {
            let mut at_byte = data as u64;
            while at_byte < end as u64 {
                let n = (end as u64 - at_byte).min(buf.len() as u64) as usize;
                at(path, file.read_exact_at(&mut buf[..n], at_byte))?;
                at_byte += n as u64;
            }
        }
        pos = end as u64;
    }
    Ok(())
}

/// Whether all pages of a range are in memory.
fn resident(file: &File, from: u64, to: u64) -> bool {
    let from = from - from % 4096;
    let len = (to - from) as usize;
    let mut pages = vec![0u8; len.div_ceil(4096)];
    // SAFETY: a mapping of our own that nobody touches, and a byte for each page of it.
    unsafe {
        let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED);
        let base =
            libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), from as i64);
        if base == libc::MAP_FAILED {
            return false;
        }
        let told = libc::mincore(base, len, pages.as_mut_ptr()) == 0;
        libc::munmap(base, len);
        told && pages.iter().all(|p| p & 1 == 1)
    }
}
