//! Opening images as the command line says, and finding the images of a chain by name.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use qblk::block::{BitmapInfo, SnapshotInfo, quoted};
use qblk::nbd::uri::Uri;
use qblk::{Image, Info, OpenFlags, Options};

use crate::cli::{OpenArgs, Setting};
use crate::failure::{Failure, Result};

/// Images in a chain, at most; the library's own limit.
const MAX_DEPTH: usize = 200;

/// The device and inode number of a file: who it is, whatever it is called.
pub type FileId = (u64, u64);

impl OpenArgs {
    /// The flags, for reading.
    pub fn flags(&self) -> OpenFlags {
        flags([
            (self.untrusted, OpenFlags::UNTRUSTED),
            (self.no_backing, OpenFlags::NO_BACKING),
            (self.direct, OpenFlags::DIRECT),
            (self.shared, OpenFlags::SHARED),
            (self.no_lock, OpenFlags::NO_LOCK),
        ])
    }

    /// The settings, with the format among them.
    pub fn settings(&self) -> Vec<Setting> {
        with_format(&self.options, self.format.as_deref())
    }

    /// Open `name` so, with `more` flags.
    pub fn open(&self, name: &OsStr, more: OpenFlags) -> Result<Image> {
        Ok(Image::open(name, &options(&self.settings()), self.flags() | more)?)
    }
}

/// The flags that are set.
pub fn flags<const N: usize>(all: [(bool, OpenFlags); N]) -> OpenFlags {
    all.into_iter().filter(|(on, _)| *on).fold(OpenFlags::default(), |sum, (_, flag)| sum | flag)
}

/// Settings with `-f`, which wins over `-o format=`.
pub fn with_format(settings: &[Setting], format: Option<&str>) -> Vec<Setting> {
    let mut all = settings.to_vec();
    if let Some(format) = format {
        all.push(Setting { key: "format".into(), value: format.into() });
    }
    all
}

/// Settings as the library takes them.
pub fn options(settings: &[Setting]) -> Options {
    let mut options = Options::new();
    for s in settings {
        options.set(&s.key, Some(&s.value));
    }
    options
}

/// The value of a key, the last one given.
pub fn value<'a>(settings: &'a [Setting], key: &str) -> Option<&'a [u8]> {
    settings.iter().rev().find(|s| s.key.replace('_', "-") == key).map(|s| &*s.value)
}

/// The settings of the image below: what stands behind `backing.`.
fn below(settings: &[Setting]) -> Vec<Setting> {
    let strip = |s: &Setting| {
        Some(Setting { key: s.key.strip_prefix("backing.")?.to_owned(), value: s.value.clone() })
    };
    settings.iter().filter_map(strip).collect()
}

/// What the layers in a name stand on: `layers:LAYER,…:NAME` is NAME with layers on it.
pub fn beneath(name: &OsStr) -> &OsStr {
    let within = |name: &'_ [u8]| {
        let rest = name.strip_prefix(b"layers:")?;
        Some(name.len() - rest.len() + rest.iter().position(|b| *b == b':')? + 1)
    };
    let mut bytes = name.as_bytes();
    while let Some(at) = within(bytes) {
        bytes = &bytes[at..];
    }
    OsStr::from_bytes(bytes)
}

/// Whether a name of an image has layers in it.
pub fn has_layers(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"layers:")
}

/// Whether a name of an image is that of an NBD export, which is somebody else's.
pub fn is_nbd(name: &OsStr) -> bool {
    let bytes = beneath(name).as_bytes();
    Uri::is_one(bytes) || bytes.starts_with(b"nbd+exec:")
}

/// The path that a name of an image stands for, if it is one.
pub fn path_of(name: &OsStr) -> Option<PathBuf> {
    let bytes = beneath(name).as_bytes();
    if bytes.starts_with(b"mem:") || bytes.starts_with(b"plugin:") || is_nbd(name) {
        return None;
    }
    Some(PathBuf::from(OsStr::from_bytes(bytes.strip_prefix(b"file:").unwrap_or(bytes))))
}

/// A name of an image for people: that of a plugin without its settings, which may be secret.
pub fn name_of(name: &OsStr) -> &[u8] {
    let bytes = name.as_bytes();
    match bytes.iter().position(|b| *b == b'?') {
        Some(at) if bytes.starts_with(b"plugin:") => &bytes[..at],
        _ => bytes,
    }
}

/// A path as a name that is nothing but a path, whatever it looks like.
pub fn file_name(path: &Path) -> OsString {
    let mut name = OsString::from("file:");
    name.push(path);
    name
}

/// Which file a name of an image stands for, if it is there.
pub fn file_id(name: &OsStr) -> Option<FileId> {
    let meta = std::fs::metadata(path_of(name)?).ok()?;
    Some((meta.dev(), meta.ino()))
}

/// One image of a chain, described but not opened for its data.
#[derive(Clone)]
pub struct Link {
    /// By which it was opened.
    pub name: OsString,
    /// What it is.
    pub info: Info,
    /// Its properties, without those that are fields here.
    pub properties: Vec<(String, Vec<u8>)>,
    /// The backing file that it names.
    pub backing: Option<Vec<u8>>,
    /// The format that it records for it.
    pub backing_format: Option<Vec<u8>>,
    /// The data file that it names.
    pub data_file: Option<Vec<u8>>,
    /// Its dirty bitmaps, or why they can not be told.
    pub bitmaps: std::result::Result<Vec<BitmapInfo>, String>,
    /// Its internal snapshots, as far as they can be read.
    pub snapshots: Vec<SnapshotInfo>,
}

impl Link {
    /// Describe the image `name`.
    pub fn read(name: &OsStr, settings: &[Setting], flags: OpenFlags) -> Result<Self> {
        // Layers are known by what they do, for which there must be something to do it with.
        let layered = has_layers(name) || value(settings, "layers").is_some();
        let how = if layered { flags } else { flags | OpenFlags::INFO_ONLY };
        let image = Image::open(name, &options(settings), how)?;
        let keys = image.property("properties")?.unwrap_or_default();
        let mut link = Self {
            name: name.to_owned(),
            info: image.info()?,
            properties: Vec::new(),
            backing: None,
            backing_format: None,
            data_file: None,
            bitmaps: image.bitmaps().map_err(|e| e.to_string()),
            // A table that is no such is not what matters here; `qblk snapshot list` tells.
            snapshots: image.snapshots().unwrap_or_default(),
        };
        for key in String::from_utf8_lossy(&keys).lines() {
            let Some(value) = image.property(key)? else { continue };
            match key {
                "filename" => {}
                "backing-filename" => link.backing = Some(value).filter(|v| !v.is_empty()),
                "backing-format" => link.backing_format = Some(value).filter(|v| !v.is_empty()),
                "data-file" => link.data_file = Some(value).filter(|v| !v.is_empty()),
                _ => link.properties.push((key.to_owned(), value)),
            }
        }
        Ok(link)
    }

    /// The image below, by the name that opens it, and the settings for it.
    fn next(&self, settings: &[Setting]) -> Result<Option<(OsString, Vec<Setting>)>> {
        let mut how = below(settings);
        let recorded = match value(settings, "backing-fmt") {
            Some(format) => Some(format),
            None if value(settings, "backing-file").is_some() => None,
            None => self.backing_format.as_deref(),
        };
        if value(&how, "format").is_none()
            && let Some(format) = recorded
        {
            how.push(Setting { key: "format".into(), value: format.to_vec() });
        }
        let name = match (value(settings, "backing-file"), &self.backing) {
            (Some([]), _) | (None, None) => return Ok(None),
            (Some(chosen), _) => OsString::from_vec(chosen.to_vec()),
            (None, Some(recorded)) => self.beside(recorded)?,
        };
        Ok(Some((name, how)))
    }

    /// The path of a backing file that this image names, seen from its own directory.
    fn beside(&self, recorded: &[u8]) -> Result<OsString> {
        let path = recorded.strip_prefix(b"file:").unwrap_or(recorded);
        let dir =
            path_of(&self.name).and_then(|p| p.parent().map(Path::to_owned)).unwrap_or_default();
        let path = dir.join(OsStr::from_bytes(path));
        // Opening a FIFO would wait for a writer, and a name with a scheme is no path.
        let here = std::fs::metadata(&path).map(|m| m.file_type());
        match here {
            Ok(kind) if kind.is_fifo() || kind.is_socket() || kind.is_char_device() => {
                Err(Failure::said(format!(
                    "{}: names the backing file {}, which is neither a regular file nor a block device",
                    quoted(self.name.as_bytes()),
                    quoted(recorded)
                )))
            }
            // A path that begins like a scheme must not be taken for one.
            _ => Ok(file_name(&path)),
        }
    }
}

/// Describe the image `name` and those below it, from the top down.
pub fn chain(name: &OsStr, settings: &[Setting], flags: OpenFlags) -> Result<Vec<Link>> {
    let mut links = vec![Link::read(name, settings, flags)?];
    let mut seen: Vec<FileId> = file_id(name).into_iter().collect();
    let mut settings = settings.to_vec();
    while let Some((name, how)) = links[links.len() - 1].next(&settings)? {
        let above = &links[links.len() - 1].name;
        if links.len() > MAX_DEPTH {
            return Err(Failure::said(format!(
                "{}: its chain is deeper than {MAX_DEPTH} images",
                quoted(above.as_bytes())
            )));
        }
        if let Some(id) = file_id(&name) {
            if seen.contains(&id) {
                return Err(Failure::said(format!(
                    "{}: its backing chain is a loop: {} is in it already",
                    quoted(above.as_bytes()),
                    quoted(name.as_bytes())
                )));
            }
            seen.push(id);
        }
        let link = Link::read(&name, &how, OpenFlags::default()).map_err(|e| match e {
            Failure::Library(e) => {
                Failure::said(format!("{e} (backing file of {})", quoted(above.as_bytes())))
            }
            e => e,
        })?;
        links.push(link);
        settings = how;
    }
    // The names that were made up to be unambiguous are not for showing.
    for link in links.iter_mut().skip(1) {
        if let Some(path) = link.name.as_bytes().strip_prefix(b"file:") {
            link.name = OsString::from_vec(path.to_vec());
        }
    }
    Ok(links)
}
