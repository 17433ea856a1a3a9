//! Files that nobody else sees and that are gone when they are closed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{How, Source, checked, memory, os_io};
use crate::block::{Driver, Name, Result};

/// Names that are tried where the file system makes no files without one.
const TRIES: usize = 16;

/// Where temporary files are made that may become large: `TMPDIR`, or `/var/tmp`.
pub fn temporary_directory() -> PathBuf {
    std::env::var_os("TMPDIR").filter(|d| !d.is_empty()).map_or("/var/tmp".into(), PathBuf::from)
}

/// A driver on an empty file in `directory` that has no name, or, without a directory, on memory. It grows
/// as it is written; `name` is for messages.
///
/// Errors: [`Error::Os`](crate::block::Error::Os) if no file can be made there.
pub fn temporary(directory: Option<&Path>, name: &Name) -> Result<Box<dyn Driver>> {
    let file = match directory {
        Some(dir) => unnamed(dir).map_err(|e| os_io("make a temporary file", name, &e))?,
        None => memory(0)?.into(),
    };
    let how = How { write: true, ..How::default() };
    Ok(Box::new(Source::plain(checked(name, Ok(file))?).unlocked(name, how)?))
}

fn unnamed(directory: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    // With O_EXCL it can not be given a name later either.
    match options.clone().custom_flags(libc::O_TMPFILE | libc::O_EXCL).open(directory) {
        // Older kernels take the flag for the directory itself.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {}
        opened => return opened,
    }
    let mut last = io::Error::from_raw_os_error(libc::EEXIST);
    for _ in 0..TRIES {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|e| io::Error::other(e.to_string()))?;
        let path = directory.join(format!(".qblk-{:016x}", u64::from_ne_bytes(random)));
        match options.clone().create_new(true).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Device, ReqFlags};

    #[test]
    fn temporary_files_leave_nothing_in_their_directory() {
        let dir = std::env::temp_dir().join(format!("qblk-temporary-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for dir in [Some(dir.as_path()), None] {
            let dev = Device::new(temporary(dir, &Name::from("kept")).unwrap());
            dev.write_slice(b"far", 1 << 40, ReqFlags::NONE).unwrap();
            let mut found = [1; 5];
            dev.read_slice(&mut found, (1 << 40) - 1).unwrap();
            assert_eq!(&found, b"\0far\0", "grown, and zeroes around it");
        }
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        std::fs::remove_dir(&dir).unwrap();
        let missing = temporary(Some(&dir), &Name::from("kept")).err().unwrap().to_string();
        assert!(missing.contains("temporary file: No such file"), "{missing}");
    }
}
