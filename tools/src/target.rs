//! Images that a command makes: never over something that is in the way, never left half-made.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use qblk::block::quoted;

use crate::cli::Setting;
use crate::failure::{Failure, Result};
use crate::open::{FileId, file_id, file_name, options, path_of, value};
use crate::signals;

/// A file that disappears unless it is kept: the target of a command that has not ended yet.
pub struct HalfMade(Option<(PathBuf, FileId)>);

impl HalfMade {
    /// Watch over the file that `name` stands for. A block device is nobody's to remove.
    pub fn new(name: &OsStr) -> Self {
        let found = || {
            // Through symbolic links: it is what they lead to that was made.
            let path = std::fs::canonicalize(path_of(name)?).ok()?;
            std::fs::metadata(&path).ok().filter(|m| m.is_file())?;
            let id = file_id(path.as_os_str())?;
            Some((path, id))
        };
        Self(found())
    }

    /// It is whole.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for HalfMade {
    fn drop(&mut self) {
        if let Some((path, id)) = self.0.take()
            // Only what we made, not what took its place.
            && file_id(&file_name(&path)) == Some(id)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A file named beside the image `name`, as a backing file is.
pub fn beside(name: &OsStr, file: &OsStr) -> PathBuf {
    let file = path_of(file).unwrap_or_else(|| file.into());
    match path_of(name).as_deref().and_then(Path::parent) {
        Some(dir) => dir.join(file),
        None => file,
    }
}

/// Put `--backing` and `--backing-format` among the settings for an image.
pub fn backing_settings(
    settings: &mut Vec<Setting>,
    file: Option<&OsStr>,
    format: Option<&str>,
) -> Result<()> {
    for (key, given) in
        [("backing-file", file.map(OsStr::as_bytes)), ("backing-fmt", format.map(str::as_bytes))]
    {
        let Some(given) = given else { continue };
        if value(settings, key).is_some() {
            return Err(Failure::usage(format!("-o {key}= and the flag for it were both given")));
        }
        settings.push(Setting { key: key.into(), value: given.to_vec() });
    }
    Ok(())
}

/// Make an image. A file that holds something is overwritten only with `force`, and an image never
/// becomes its own backing file.
pub fn create(
    name: &OsStr,
    format: &str,
    size: u64,
    settings: &[Setting],
    force: bool,
) -> Result<()> {
    let mut settings = settings.to_vec();
    let path = path_of(name);
    match path.as_ref().and_then(|p| std::fs::metadata(p).ok()) {
        // Whoever makes it meanwhile keeps it.
        None if value(&settings, "exclusive").is_none() => {
            settings.push(Setting { key: "exclusive".into(), value: b"on".to_vec() });
        }
        Some(meta) if meta.is_file() && meta.len() > 0 && !force => {
            return Err(Failure::said(format!(
                "{}: exists and is not empty (--force overwrites it)",
                quoted(name.as_bytes())
            )));
        }
        Some(meta) if !meta.is_file() && !meta.is_dir() && !meta.file_type().is_block_device() => {
            return Err(Failure::said(format!(
                "{}: neither a regular file nor a block device",
                quoted(name.as_bytes())
            )));
        }
        _ => {}
    }
    if let Some(backing) = value(&settings, "backing-file").filter(|b| !b.is_empty()) {
        let below = beside(name, OsStr::from_bytes(backing));
        if file_id(name).is_some_and(|id| file_id(&file_name(&below)) == Some(id)) {
            return Err(Failure::said(format!(
                "{}: cannot be its own backing file",
                quoted(name.as_bytes())
            )));
        }
    }
    let slow = matches!(value(&settings, "preallocation"), Some(b"falloc" | b"full"));
    if slow {
        return create_interruptibly(name, format, size, settings);
    }
    Ok(qblk::image::create(name, format, size, &options(&settings))?)
}

/// Make an image that takes a while: a signal ends the process at once, and the file goes with it.
fn create_interruptibly(
    name: &OsStr,
    format: &str,
    size: u64,
    settings: Vec<Setting>,
) -> Result<()> {
    signals::catch();
    let (done, wait) = channel();
    let (name, format) = (name.to_owned(), format.to_owned());
    let made = name.clone();
    std::thread::spawn(move || {
        let _ = done.send(qblk::image::create(&name, &format, size, &options(&settings)));
    });
    loop {
        match wait.recv_timeout(Duration::from_millis(50)) {
            Ok(result) => return Ok(result?),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::said(format!(
                    "{}: making it ended early",
                    quoted(made.as_bytes())
                )));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(signal) = signals::asked_to_end() {
            // The other thread goes on writing to a file that has no name any more until we exit.
            drop(HalfMade::new(&made));
            return Err(Failure::Signal(signal, None));
        }
    }
}
