//! Files and block devices of this host, and memory that behaves like one.
//!
//! Everything here is one driver over an open descriptor. It promises what
//! [`Driver`] asks, and:
//!
//! - Only regular files and block devices are taken; nothing else is ever opened, and no open hangs.
//! - Calls run on the caller's thread; the common read and write are one system call.
//! - What a file had when it was opened (or was given since) and has no more is EIO, not zeroes.
//! - A flush that failed fails for ever (see `flush`).
//! - A file that shrinks under a mapping is an error too, not a signal (see `map`, which says why
//!   `io=mmap` brings a handler for SIGBUS into the process, and that nothing else does).
//! - Names are bytes.
//!
//! After a fork the child may drop what it inherited: that closes descriptors and removes nothing.

mod create;
mod direct;
mod flush;
mod folios;
mod holders;
mod host;
pub(crate) mod lock;
mod map;
mod space;
mod sys;
mod temporary;
#[cfg(test)]
mod tests;

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::block::{Caps, Driver, Error, Name, Result};
use crate::log::{Level, log};
use host::{Host, Seek};
use map::Mapping;

pub(crate) use create::create_locked;
pub use create::{Creating, create};
pub use holders::{Holder, holders};
pub(crate) use lock::{FileLock, Locking, Locks, Permissions, Policy};
pub use temporary::{temporary, temporary_directory};

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// For writing too.
    pub write: bool,
    /// Past the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Serve reads from a mapping where one can be had (read-only opens).
    pub mmap: bool,
}

/// Open the file or block device `name`.
///
/// Errors: [`Error::Os`] with the system's number; `EISDIR` for a directory; [`Error::Invalid`] for
/// anything else that is neither a regular file nor a block device. A file system that has no
/// direct I/O serves `how.direct` through its cache, and the log says so.
pub fn open(name: &Name, how: How) -> Result<Box<dyn Driver>> {
    open_locked(name, how, Locking::OFF, &mut Locks::default())
}

/// [`open`], with a lock, which is one of `locks` from then on.
///
/// Errors: also [`Error::Locked`].
pub(crate) fn open_locked(
    name: &Name,
    how: How,
    lock: Locking,
    locks: &mut Locks,
) -> Result<Box<dyn Driver>> {
    let path = name.as_path();
    // Opening a FIFO or a device can already do something, so look first. If this fails so will
    // the open, which has the better error.
    if let Ok(meta) = path.metadata() {
        check_type(name, meta.file_type())?;
    }
    let source = Source::fresh(name, how, &|flags| open_path(path, how.write, flags))?;
    Ok(Box::new(source.driver(name, how, lock, locks)?))
}

/// Use an open descriptor, which is the driver's from now on. What it shares with the caller's (its
/// position, its flags) is left alone.
///
/// Errors: as [`open`]; [`Error::ReadOnly`] if `how.write` and the descriptor is not for writing.
pub fn from_fd(fd: OwnedFd, name: &Name, how: How) -> Result<Box<dyn Driver>> {
    from_fd_locked(fd, name, how, Locking::OFF, &mut Locks::default())
}

/// [`from_fd`], with a lock, which is one of `locks` from then on. It is on a description of our own
/// if one can be had: the caller's would keep it when we are done.
///
/// Errors: also [`Error::Locked`].
pub(crate) fn from_fd_locked(
    fd: OwnedFd,
    name: &Name,
    how: How,
    lock: Locking,
    locks: &mut Locks,
) -> Result<Box<dyn Driver>> {
    let file = File::from(fd);
    let flags = sys::status_flags(&file).map_err(|e| os("fcntl", name, e))?;
    if flags & libc::O_PATH != 0 || flags & libc::O_ACCMODE == libc::O_WRONLY {
        return Err(os("read", name, libc::EBADF));
    }
    let meta = file.metadata().map_err(|e| os_io("fstat", name, &e))?;
    check_type(name, meta.file_type())?;
    let id = (meta.dev(), meta.ino());
    if how.write && flags & libc::O_ACCMODE != libc::O_RDWR {
        return Err(Error::ReadOnly(name.clone()));
    }
    let is_direct = flags & libc::O_DIRECT != 0;
    // With O_APPEND the kernel writes at the end, whatever offset it is told.
    let appends = how.write && flags & libc::O_APPEND != 0;
    if how.direct != is_direct || appends {
        match Source::fresh(name, how, &|flags| reopen(&file, how.write, flags)) {
            Ok(source) => return Ok(Box::new(source.driver(name, how, lock, locks)?)),
            Err(_) if appends => {
                return Err(Error::invalid(format!(
                    "{name}: the descriptor is open with O_APPEND and cannot be opened anew"
                )));
            }
            // It works as it is, only not in the way that was asked for.
            Err(e) => log(Level::Info, format_args!("{name}: used as it was opened: {e}")),
        }
    }
    let seek = reopen(&file, false, 0).map_or(Seek::Never, |f| Seek::Own(f.into()));
    let align = is_direct.then(|| direct::alignment(&file, is_block(&file)).unwrap_or(direct::ANY));
    let edge = align.and_then(|_| reopen(&file, how.write, 0).ok());
    let source = Source { file: file.into(), id, align, edge, seek };
    Ok(Box::new(source.driver(name, how, lock, locks)?))
}

/// A descriptor of `size` bytes of memory, none of which cost anything until they are written.
pub fn memory(size: u64) -> Result<OwnedFd> {
    let name = Name::from(format!("mem:{size}"));
    if size > sys::MAX_SIZE {
        let what = format!("{size} bytes are more than a file can have, {}", sys::MAX_SIZE);
        return Err(Error::TooBig { file: name, what });
    }
    if size > sys::size_limit() {
        return Err(os("ftruncate", &name, libc::EFBIG));
    }
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"qblk".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(os_io("memfd_create", &name, &io::Error::last_os_error()));
    }
    // SAFETY: a descriptor that was just made, and is nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    sys::ftruncate(&file, size).map_err(|e| os("ftruncate", &name, e))?;
    Ok(file.into())
}

/// A driver on what [`memory`] made, or on a duplicate of it.
pub fn from_memory(fd: OwnedFd) -> Result<Box<dyn Driver>> {
    let file = File::from(fd);
    let meta = file.metadata().map_err(|e| os_io("fstat", &Name::from("mem:"), &e))?;
    let how = How { write: true, ..How::default() };
    let name = Name::from(format!("mem:{}", meta.len()));
    let mut host = Source::plain(Checked::new(file, &meta)).unlocked(&name, how)?;
    host.kind = "mem";
    Ok(Box::new(host))
}

/// What a driver is made of.
struct Source {
    file: Arc<File>,
    /// Device and inode numbers.
    id: (u64, u64),
    /// Of requests and of memory, with direct I/O.
    align: Option<(u32, u32)>,
    edge: Option<File>,
    seek: Seek,
}

impl Source {
    /// A file that nobody else has the description of.
    fn plain(Checked { file, id }: Checked) -> Self {
        Self { file: Arc::new(file), id, align: None, edge: None, seek: Seek::Main }
    }

    /// Open with `open`, which is given flags to add, in the way that `how` asks for.
    fn fresh(name: &Name, how: How, open: &dyn Fn(i32) -> io::Result<File>) -> Result<Self> {
        let buffered = || checked(name, open(0));
        if how.direct {
            match open(libc::O_DIRECT) {
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {}
                opened => {
                    let found = checked(name, opened)?;
                    let file = &found.file;
                    if let Some(align) = direct::alignment(file, is_block(file)) {
                        // By its descriptor it is the same file for sure; by its path only if
                        // nobody has put another there.
                        let edge = reopen(file, how.write, 0).ok();
                        let again = || buffered().ok().filter(|e| e.id == found.id).map(|e| e.file);
                        let edge = edge.or_else(again);
                        return Ok(Self { align: Some(align), edge, ..Self::plain(found) });
                    }
                }
            }
            log(Level::Info, format_args!("{name}: no direct I/O here, using the page cache"));
        }
        Ok(Self::plain(buffered()?))
    }

    fn unlocked(self, name: &Name, how: How) -> Result<Host> {
        self.driver(name, how, Locking::OFF, &mut Locks::default())
    }

    fn driver(self, name: &Name, how: How, lock: Locking, locks: &mut Locks) -> Result<Host> {
        let Self { file, id, align, edge, seek } = self;
        // Before anything is asked that whoever has the file may be about to change.
        locks.take(if let Seek::Own(file) = &seek { file } else { &file }, id, name, lock)?;
        let meta = file.metadata().map_err(|e| os_io("fstat", name, &e))?;
        let is_block = meta.file_type().is_block_device();
        let (len, optimal) = if is_block {
            let len = sys::block_size64(&file).map_err(|e| os("BLKGETSIZE64", name, e))?;
            (len, sys::optimal_io(&file))
        } else {
            (meta.len(), u32::try_from(meta.blksize()).ok())
        };
        let defaults = Caps::default();
        let (align, mem_align) = align.unwrap_or((1, 1));
        let caps = Caps {
            align,
            mem_align,
            optimal_io: optimal.filter(|n| *n > 0).unwrap_or(defaults.optimal_io),
            read_only: !how.write,
            fua: how.write,
            trim: how.write,
            zero: how.write,
            cache: true,
            extents: !is_block && !matches!(seek, Seek::Never),
            rotational: is_block && sys::rotational(&file),
            cached: align == 1,
            ..defaults
        };
        let mut map = None;
        if how.mmap && !how.write && align == 1 && len > 0 {
            match Mapping::for_reading(&file, len) {
                Ok(made) => map = Some(made),
                Err(errno) => {
                    let e = io::Error::from_raw_os_error(errno);
                    log(Level::Debug, format_args!("{name}: not mapped, read instead: {e}"));
                }
            }
        }
        Ok(Host {
            logical: if is_block { sys::logical_block(&file).into() } else { 1 },
            limit: if is_block || !how.write { sys::MAX_SIZE } else { sys::size_limit() },
            in_memory: !is_block && sys::file_system(&file) == sys::TMPFS,
            file,
            edge,
            seek: if is_block { Seek::Never } else { seek },
            name: name.clone(),
            kind: if is_block { "host_device" } else { "file" },
            is_block,
            identity: id,
            caps,
            len: len.into(),
            flusher: Default::default(),
            growing: RwLock::new(()),
            cannot: Default::default(),
            holes: Default::default(),
            data_run: Default::default(),
            map,
            fence: locks.fence().filter(|_| how.write),
        })
    }
}

fn os(op: &'static str, name: &Name, errno: i32) -> Error {
    Error::Os { op, file: name.clone(), errno }
}

fn os_io(op: &'static str, name: &Name, e: &io::Error) -> Error {
    // Without a number it was std that refused: a name with a NUL in it.
    os(op, name, e.raw_os_error().unwrap_or(libc::EINVAL))
}

/// Only what has bytes at offsets.
fn check_type(name: &Name, t: FileType) -> Result<()> {
    let what = match () {
        _ if t.is_file() || t.is_block_device() => return Ok(()),
        _ if t.is_dir() => return Err(os("open", name, libc::EISDIR)),
        _ if t.is_fifo() => "a FIFO or pipe",
        _ if t.is_socket() => "a socket",
        _ if t.is_char_device() => "a character device",
        _ => "no file",
    };
    Err(Error::invalid(format!("{name}: is {what}, not a regular file or block device")))
}

/// A file that has bytes at offsets, with its device and inode numbers.
struct Checked {
    file: File,
    id: (u64, u64),
}

impl Checked {
    fn new(file: File, meta: &Metadata) -> Self {
        Self { file, id: (meta.dev(), meta.ino()) }
    }
}

fn checked(name: &Name, opened: io::Result<File>) -> Result<Checked> {
    let file = opened.map_err(|e| os_io("open", name, &e))?;
    let meta = file.metadata().map_err(|e| os_io("fstat", name, &e))?;
    check_type(name, meta.file_type())?;
    Ok(Checked::new(file, &meta))
}

fn open_path(path: &Path, write: bool, flags: i32) -> io::Result<File> {
    // Should a FIFO have come there since anyone looked, opening it must not wait for its other end.
    let flags = flags | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)?;
    // Of what can be changed only O_DIRECT was asked for.
    sys::set_status_flags(&file, flags & libc::O_DIRECT).map_err(io::Error::from_raw_os_error)?;
    Ok(file)
}

/// Another opening of the same file, with flags and a position of its own.
fn reopen(file: &File, write: bool, flags: i32) -> io::Result<File> {
    open_path(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())), write, flags)
}

fn is_block(file: &File) -> bool {
    file.metadata().is_ok_and(|m| m.file_type().is_block_device())
}
