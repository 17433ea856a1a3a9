//! Making files, so that what fails leaves nothing behind and what is in use stays as it is.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::lock::{self, FileLock, Locking, Policy};
use super::{How, Source, check_type, checked, open_path, os, os_io, sys};
use crate::block::{Driver, Error, Name, Result};

/// As many as the kernel follows.
const MAX_SYMLINKS: usize = 40;

/// A file that is being made. Unless [`Creating::keep`] is called, dropping it removes the file
/// (or, if it was there before, leaves it empty; a block device is left as it is).
pub struct Creating {
    file: Arc<File>,
    name: Name,
    /// Where the file is to be removed from, if it is new.
    made: Option<PathBuf>,
    emptied: bool,
    kept: bool,
    /// A forked child must not undo what its parent is doing.
    process: u32,
    /// Held until the file is as it should be, or is gone.
    lock: Option<FileLock>,
}

/// Make the file `name`, empty, or open the block device of that name. Symbolic links are followed.
///
/// Errors: [`Error::Os`] (`EEXIST` if `exclusive` and there is anything of that name);
/// [`Error::Locked`] if somebody uses the file, which is then as it was; as for
/// [`open`](super::open) if it is neither a file nor a block device.
pub fn create(name: &Name, exclusive: bool) -> Result<Creating> {
    create_locked(name, exclusive, Locking { policy: Policy::Auto, ..Locking::OFF })
}

/// [`create`], with a lock as `how` says. Even without one, a file that is in use is not overwritten.
pub(crate) fn create_locked(name: &Name, exclusive: bool, how: Locking) -> Result<Creating> {
    let mut creating = make(name, exclusive)?;
    let lock = lock::creating(&creating.file, name, how);
    if matches!(lock, Err(Error::Locked { .. })) && creating.made.is_some() {
        // Somebody has it already: it is theirs now.
        creating.kept = true;
    }
    creating.lock = lock?.filter(|_| how.policy != Policy::Off);
    if creating.made.is_none() {
        let meta = creating.file.metadata().map_err(|e| os_io("fstat", name, &e))?;
        if !meta.file_type().is_block_device() {
            creating.emptied = true;
            sys::ftruncate(&creating.file, 0).map_err(|e| os("ftruncate", name, e))?;
        }
    }
    Ok(creating)
}

fn make(name: &Name, exclusive: bool) -> Result<Creating> {
    let creating = |file: File, made| Creating {
        file: Arc::new(file),
        name: name.clone(),
        made,
        emptied: false,
        kept: false,
        process: std::process::id(),
        lock: None,
    };
    let mut path = name.as_path().to_owned();
    for _ in 0..=MAX_SYMLINKS {
        // What succeeds with O_EXCL is new, and so may be removed.
        match create_new(&path) {
            Ok(file) => {
                let creating = creating(file, Some(path));
                sys::set_status_flags(&creating.file, 0).map_err(|e| os("open", name, e))?;
                return Ok(creating);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && !exclusive => {}
            Err(e) => return Err(os_io("open", name, &e)),
        }
        if let Ok(meta) = path.metadata() {
            check_type(name, meta.file_type())?;
        }
        match open_path(&path, true, 0) {
            // Removed meanwhile, or a link to where nothing is: make that.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if let Ok(target) = fs::read_link(&path) {
                    path = path.parent().unwrap_or(Path::new("")).join(target);
                }
            }
            opened => return Ok(creating(checked(name, opened)?.file, None)),
        }
    }
    Err(os("open", name, libc::ELOOP))
}

fn create_new(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    OpenOptions::new().read(true).write(true).create_new(true).custom_flags(flags).open(path)
}

impl Creating {
    /// A driver for the file, for writing too.
    pub fn open(&self) -> Result<Box<dyn Driver>> {
        let file = self.file.try_clone().map_err(|e| os_io("dup", &self.name, &e))?;
        let how = How { write: true, ..How::default() };
        Ok(Box::new(Source::plain(checked(&self.name, Ok(file))?).unlocked(&self.name, how)?))
    }

    /// The file is as it should be.
    pub fn keep(mut self) {
        self.kept = true;
    }

    fn undo(&self) {
        // Nobody is left to be told of a failure here.
        if let Some(path) = &self.made {
            let same = |there: fs::Metadata, ours: fs::Metadata| {
                (there.dev(), there.ino()) == (ours.dev(), ours.ino())
            };
            if let (Ok(there), Ok(ours)) = (path.symlink_metadata(), self.file.metadata())
                && same(there, ours)
            {
                let _ = fs::remove_file(path);
            }
        } else if self.emptied {
            let _ = sys::ftruncate(&self.file, 0);
        }
    }
}

impl Drop for Creating {
    fn drop(&mut self) {
        if !self.kept && self.process == std::process::id() {
            self.undo();
        }
    }
}
