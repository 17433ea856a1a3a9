//! Opening by name: what a name means, what format a file has, and which files an image may bring
//! with it (the open policy of docs/abi.md).

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::how::{Implicit, check, implicit};
use super::managed;
use super::remote::{self, Remote};
use super::{Again, OpenFlags, Options, Tree, key};
use crate::block::*;
use crate::file::{self, Locking, Locks};
pub use crate::format::Probe;
use crate::format::{self, BackingRef, Params};
use crate::lockmgr::{READ_ONLY, Resource, SHARED};

/// Images in a chain, at most.
const MAX_DEPTH: usize = 200;

/// What a name that the caller or an image gave means.
pub(super) enum Source<'a> {
    Path(&'a OsStr),
    Memory(u64),
    Remote(Remote),
}

/// A backing image that an image names, and that may be opened.
enum Allowed {
    Path(PathBuf),
    Remote(Remote),
}

/// One image on its way to being opened, and those above it.
struct Opening<'a> {
    calls: &'a Arc<InFlight>,
    /// Files of the chain so far: device and inode numbers.
    seen: Vec<(u64, u64)>,
    implicit: Implicit,
    /// On the files of the chain so far.
    locks: Locks,
    /// How the image above was locked, where the options say nothing.
    locking: Locking,
    /// The files of the chain so far, as a lock manager is told of them.
    parts: Vec<Resource>,
}

/// Read a name. Unknown schemes are paths.
pub(super) fn parse_name(name: &OsStr) -> Result<Source<'_>> {
    let bytes = name.as_bytes();
    if bytes.is_empty() {
        return Err(Error::invalid("the name is empty"));
    }
    if bytes.contains(&0) {
        return Err(Error::invalid("the name has a NUL byte in it"));
    }
    if let Some(path) = bytes.strip_prefix(b"file:") {
        return match path {
            [] => Err(Error::invalid("file: without a path")),
            path => Ok(Source::Path(OsStr::from_bytes(path))),
        };
    }
    if let Some(size) = bytes.strip_prefix(b"mem:") {
        let size = std::str::from_utf8(size).ok().and_then(super::parse_size);
        return size.map(Source::Memory).ok_or_else(|| {
            Error::invalid(format!("{}: expected mem:SIZE, as in mem:64M", quoted(bytes)))
        });
    }
    if let Some(remote) = Remote::parse(bytes)? {
        return Ok(Source::Remote(remote));
    }
    if let Some(scheme) = foreign_scheme(bytes) {
        return Err(Error::unsupported(
            &name.to_owned().into(),
            format!(
                "names that begin with '{scheme}:' (a file of that name is reached as file:PATH)"
            ),
        ));
    }
    Ok(Source::Path(name))
}

/// A scheme that is not a path's, and that no path should be mistaken for.
fn foreign_scheme(name: &[u8]) -> Option<&'static str> {
    ["plugin", "json"]
        .into_iter()
        .find(|s| name.strip_prefix(s.as_bytes()).is_some_and(|rest| rest.starts_with(b":")))
}

/// Open `name` and what it stands on.
pub(super) fn open(
    name: &OsStr,
    options: &Options,
    flags: OpenFlags,
    calls: &Arc<InFlight>,
) -> Result<Tree> {
    let source = parse_name(name)?;
    check(options, flags, matches!(source, Source::Remote(_)), Locking::default())?;
    let again = match source {
        Source::Remote(remote) => Again::Remote(remote),
        Source::Memory(size) => Again::Memory(file::memory(size)?),
        Source::Path(path) => Again::Path(
            std::path::absolute(Path::new(path)).unwrap_or_else(|_| PathBuf::from(path)),
        ),
    };
    open_source(name.to_owned().into(), again, options, flags, calls, None)
}

/// Use `fd` and open what the image behind it stands on.
pub(super) fn open_fd(
    fd: OwnedFd,
    options: &Options,
    flags: OpenFlags,
    calls: &Arc<InFlight>,
) -> Result<Tree> {
    let is_socket = std::fs::File::from(fd.try_clone().map_err(|e| Error::Os {
        op: "duplicating",
        file: "descriptor".into(),
        errno: e.raw_os_error().unwrap_or(libc::EBADF),
    })?)
    .metadata()
    .is_ok_and(|m| m.file_type().is_socket());
    check(options, flags, is_socket, Locking::default())?;
    // The file's real name: what its backing file is relative to, and what messages show.
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let name = match std::fs::read_link(&link) {
        Ok(path) => Name::from(path.into_os_string()),
        Err(_) => Name::from(format!("descriptor {}", fd.as_raw_fd())),
    };
    if is_socket {
        let driver = remote::open_socket(fd, &name, options, flags)?;
        let mut opening = Opening::new(calls, implicit(options)?, Locks::default());
        return opening.tree(driver, name, Again::Never, options, flags);
    }
    open_source(name, Again::Descriptor(fd), options, flags, calls, None)
}

/// Open anew what `old` has open, in another way.
pub(super) fn reopen(
    old: &Tree,
    options: &Options,
    flags: OpenFlags,
    calls: &Arc<InFlight>,
) -> Result<Tree> {
    let again = match &old.again {
        Again::Path(path) => Again::Path(path.clone()),
        Again::Descriptor(fd) => Again::Descriptor(duplicate(fd, &old.name)?),
        Again::Memory(fd) => Again::Memory(duplicate(fd, &old.name)?),
        Again::Remote(remote) => Again::Remote(remote.clone()),
        Again::Never => {
            let text = "opened by a connected socket, which can not be opened again";
            return Err(Error::policy(&old.name, text));
        }
    };
    open_source(old.name.clone(), again, options, flags, calls, Some(old))
}

fn duplicate(fd: &OwnedFd, name: &Name) -> Result<OwnedFd> {
    let failed = |e: std::io::Error| Error::Os {
        op: "duplicating its descriptor",
        file: name.clone(),
        errno: e.raw_os_error().unwrap_or(libc::EMFILE),
    };
    fd.try_clone().map_err(failed)
}

/// How often it is tried again when a chain has changed while it was being leased.
const CHANGES: u32 = 5;

/// Open, by leave of a lock manager if there is one. `old` is the chain that is to be replaced.
fn open_source(
    name: Name,
    again: Again,
    options: &Options,
    flags: OpenFlags,
    calls: &Arc<InFlight>,
    old: Option<&Tree>,
) -> Result<Tree> {
    let locks = || old.map_or_else(Locks::default, |old| Locks::replacing(&old.locks));
    let local = matches!(again, Again::Path(_) | Again::Descriptor(_));
    check(options, flags, matches!(again, Again::Remote(_)), Locking::default())?;
    let request = if local { managed::request(options, flags)? } else { None };
    let Some(request) = request else {
        return open_now(name, &again, options, flags, calls, locks()).map(|t| t.by(again));
    };
    let keep = old.and_then(|old| old.lease.as_ref());
    let keep = keep.filter(|lease| !lease.is_lost() && request.is_of(lease));
    for _ in 0..CHANGES {
        let look =
            OpenFlags(flags.0 & !(OpenFlags::RDWR | OpenFlags::DIRECT | OpenFlags::SHARED).0);
        let survey = Arc::new(InFlight::default());
        let look = look | OpenFlags::NO_LOCK;
        let found = open_now(name.clone(), &again, options, look, &survey, Locks::default())?;
        let wanted = found.resources(flags);
        drop(found);
        let mut locks = locks();
        let (lease, change) = match keep {
            Some(lease) => (lease.clone(), Some(lease.extend(&wanted)?)),
            None => {
                let fence = Arc::new(Fence::default());
                let (request, calls) = (request.clone(), calls.clone());
                (request.acquire(&name, wanted.clone(), fence, calls)?, None)
            }
        };
        locks.set_fence(lease.fence().clone());
        let tree = open_now(name.clone(), &again, options, flags, calls, locks)?;
        if tree.resources(flags) == wanted {
            if let Some(change) = change {
                change.settle(&wanted);
            }
            return Ok(Tree { lease: Some(lease), ..tree.by(again) });
        }
    }
    Err(Error::Locked { file: name, what: "its chain changes while it is being leased".into() })
}

fn open_now(
    name: Name,
    again: &Again,
    options: &Options,
    flags: OpenFlags,
    calls: &Arc<InFlight>,
    locks: Locks,
) -> Result<Tree> {
    let how = check(options, flags, matches!(again, Again::Remote(_)), Locking::default())?;
    let mut opening = Opening::new(calls, implicit(options)?, locks);
    opening.locking = how.lock;
    let locks = &mut opening.locks;
    let driver = match again {
        Again::Memory(fd) => file::from_memory(duplicate(fd, &name)?)?,
        Again::Descriptor(fd) => {
            file::from_fd_locked(duplicate(fd, &name)?, &name, how.file, how.lock, locks)?
        }
        Again::Remote(remote) => remote.open(&name, options, flags)?,
        Again::Never => return Err(Error::Internal("opened again by nothing".into())),
        Again::Path(path) => {
            // Shown, and used for what the image names beside itself, as the caller gave it.
            let shown = match parse_name(name.as_os_str()) {
                Ok(Source::Path(given)) if std::path::absolute(given).is_ok_and(|p| p == *path) => {
                    Name::from(given.to_owned())
                }
                _ => Name::from(path.clone()),
            };
            file::open_locked(&shown, how.file, how.lock, locks)?
        }
    };
    opening.tree(driver, name, Again::Never, options, flags)
}

/// Refuse `target` as a new image on top of `below` if it is `below` or in its chain.
pub(super) fn refuse_loop(target: &Name, below: &OsStr, options: &Options) -> Result<()> {
    let calls = Arc::new(InFlight::default());
    let mut opening = Opening::new(&calls, Implicit::Local, Locks::default());
    let Ok(meta) = std::fs::metadata(target.as_path()) else { return Ok(()) };
    opening.seen.push((meta.dev(), meta.ino()));
    let below = Source::Path(below);
    match opening.below(target, below, options, OpenFlags::NO_LOCK, false) {
        Err(e @ Error::Policy { .. }) => Err(e),
        // What can not be opened here may yet be a good backing file elsewhere.
        _ => Ok(()),
    }
}

impl Tree {
    /// With how it is opened again.
    fn by(self, again: Again) -> Self {
        Self { again, ..self }
    }

    /// What a lock manager is asked for, if the chain is (to be) opened with `flags`.
    fn resources(&self, flags: OpenFlags) -> Vec<Resource> {
        let mut parts = self.parts.clone();
        for (i, part) in parts.iter_mut().enumerate() {
            // Only the uppermost is written.
            let write = i == 0 && flags.has(OpenFlags::RDWR);
            part.flags = if write { 0 } else { READ_ONLY };
            part.flags |= if flags.has(OpenFlags::SHARED) { SHARED } else { 0 };
        }
        managed::in_order(parts)
    }
}

impl<'a> Opening<'a> {
    fn new(calls: &'a Arc<InFlight>, implicit: Implicit, locks: Locks) -> Self {
        Self {
            calls,
            seen: Vec::new(),
            implicit,
            locks,
            locking: Locking::default(),
            parts: Vec::new(),
        }
    }

    /// The whole chain on top of `driver`, opened by the caller.
    fn tree(
        &mut self,
        driver: Box<dyn Driver>,
        name: Name,
        again: Again,
        options: &Options,
        flags: OpenFlags,
    ) -> Result<Tree> {
        self.note(driver.identity(), driver.name(), &name)?;
        let kind = driver.kind();
        let (top, probed) = self.image(driver, options, flags, false)?;
        let files = top.driver().files();
        let in_use = self.locks.in_use();
        Ok(Tree {
            top,
            files,
            name,
            options: options.clone(),
            flags,
            probed,
            driver: kind,
            again,
            locks: std::mem::take(&mut self.locks).settle(),
            in_use,
            lease: None,
            parts: std::mem::take(&mut self.parts),
        })
    }

    /// Remember a file of the chain; refuse one that is there already.
    fn note(&mut self, id: Option<(u64, u64)>, path: &Name, named_by: &Name) -> Result<()> {
        if let Some(id) = id {
            if self.seen.contains(&id) {
                return Err(Error::policy(
                    named_by,
                    format!("its backing chain is a loop: {path} is in it already"),
                ));
            }
            self.seen.push(id);
        }
        Ok(())
    }

    /// Open the image in `file` and, below it, what it stands on. `guessing` is set for a backing
    /// image whose format its overlay does not record: such an image may name no files of its own.
    fn image(
        &mut self,
        file: Box<dyn Driver>,
        options: &Options,
        flags: OpenFlags,
        guessing: bool,
    ) -> Result<(Device, bool)> {
        let file = Device::new(file);
        let asked = match options.text("format")? {
            None => None,
            Some(name) => Some(format::by_name(name).ok_or_else(|| {
                Error::invalid(format!("format {}: {}", quoted(name.as_bytes()), format::EXPECTED))
            })?),
        };
        let probed = asked.is_none();
        let kind = match asked {
            Some(kind) => kind,
            None => match format::probe(&file)? {
                Probe::Known(kind) => kind,
                Probe::Foreign(name) => {
                    return Err(Error::unsupported(
                        file.name(),
                        format!(
                            "format {name} (found by probing; option format=raw opens its bytes as they are)"
                        ),
                    ));
                }
            },
        };
        if kind != format::Kind::Raw {
            self.locks.tighten(file.driver().identity(), self.locking)?;
        }
        managed::note(&mut self.parts, &file, &format!("{kind:?}").to_lowercase());
        let info_only = flags.has(OpenFlags::INFO_ONLY);
        let key = if info_only { None } else { key::read(options)? };
        let has_key = key.is_some();
        let params = Params {
            write: flags.has(OpenFlags::RDWR) && !info_only,
            info_only,
            probed,
            l2_cache: options.size("cache.l2-size")?,
            untrusted: flags.has(OpenFlags::UNTRUSTED),
            key,
            calls: self.calls.clone(),
        };
        let mut opened = format::open(kind, file, params)?;
        if has_key && !opened.is_encrypted() {
            return Err(key::no_use(opened.name()));
        }
        if info_only {
            return Ok((Device::new(opened.into_driver()?), probed));
        }
        let name = opened.name().clone();
        let backing = self.backing(&name, opened.backing(), options, flags, guessing)?;
        if let Some(device) = backing {
            opened.attach(device, options.get("backing-file").is_none());
        }
        Ok((Device::new(opened.into_driver()?), probed))
    }

    /// Open what the image `name` stands on, if anything.
    fn backing(
        &mut self,
        name: &Name,
        recorded: Option<&BackingRef>,
        options: &Options,
        flags: OpenFlags,
        guessing: bool,
    ) -> Result<Option<Device>> {
        if flags.has(OpenFlags::NO_BACKING) {
            return Ok(None);
        }
        let mut below = options.for_backing();
        if below.get("format").is_none()
            && let Some(fmt) = options.get("backing-fmt")
        {
            below.set("format", Some(fmt));
        }
        // Chosen by the caller: opened as the caller says.
        if let Some(chosen) = options.os("backing-file") {
            if chosen.is_empty() {
                return Ok(None);
            }
            return self.below(name, parse_name(chosen)?, &below, flags, false).map(Some);
        }
        let Some(recorded) = recorded else {
            return Ok(None);
        };
        if flags.has(OpenFlags::UNTRUSTED) {
            return Err(Error::policy(
                name,
                format!(
                    "names the backing file {}, which QBLK_OPEN_UNTRUSTED does not open; \
                     QBLK_OPEN_NO_BACKING or the option 'backing-file' settles it",
                    quoted(&recorded.name)
                ),
            ));
        }
        if guessing {
            return Err(Error::policy(
                name,
                format!(
                    "its overlay does not record its format, so it must not name the backing file {}; \
                     option backing-fmt says the format",
                    quoted(&recorded.name)
                ),
            ));
        }
        let allowed = self.allowed(name, recorded)?;
        let source = match &allowed {
            Allowed::Path(path) => Source::Path(path.as_os_str()),
            Allowed::Remote(remote) => Source::Remote(remote.clone()),
        };
        if below.get("format").is_none()
            && let Some(fmt) = recorded.format.as_ref().filter(|f| !f.is_empty())
        {
            if std::str::from_utf8(fmt).ok().and_then(format::by_name).is_none() {
                return Err(Error::unsupported(
                    name,
                    format!("backing file {} of format {}", quoted(&recorded.name), quoted(fmt)),
                ));
            }
            below.set("format", Some(fmt));
        }
        let guess = below.get("format").is_none();
        match self.below(name, source, &below, flags, guess) {
            // What is there, but neither a regular file nor a block device.
            Err(Error::Invalid(what)) => {
                Err(Error::policy(name, format!("names a backing file that is none: {what}")))
            }
            other => other.map(Some),
        }
    }

    /// What leads to the backing file that an image names, if the policy lets it be opened.
    fn allowed(&self, name: &Name, recorded: &BackingRef) -> Result<Allowed> {
        let denied = |why: &str| {
            Error::policy(
                name,
                format!(
                    "names the backing file {}, {why}; option implicit-open, QBLK_OPEN_NO_BACKING or \
                     the option 'backing-file' settles it",
                    quoted(&recorded.name)
                ),
            )
        };
        if self.implicit == Implicit::Deny {
            return Err(denied("which implicit-open=deny does not open"));
        }
        let bytes = recorded.name.strip_prefix(b"file:").unwrap_or(&recorded.name);
        if bytes.is_empty() || bytes.contains(&0) {
            return Err(denied("which is no file name"));
        }
        if recorded.name == bytes && looks_like_uri(bytes) {
            // Never a command: what an image names does not start programs.
            if self.implicit == Implicit::Any
                && let Ok(Some(remote @ Remote::Uri(_))) = Remote::parse(bytes)
            {
                return Ok(Allowed::Remote(remote));
            }
            return Err(match self.implicit {
                Implicit::Any => Error::unsupported(
                    name,
                    format!("the backing file {}: not a path", quoted(&recorded.name)),
                ),
                _ => denied("which is not a local file"),
            });
        }
        Ok(Allowed::Path(beside(name.as_path(), Path::new(OsStr::from_bytes(bytes)))))
    }

    fn below(
        &mut self,
        above: &Name,
        source: Source<'_>,
        options: &Options,
        flags: OpenFlags,
        guess: bool,
    ) -> Result<Device> {
        if self.seen.len() >= MAX_DEPTH {
            return Err(Error::policy(
                above,
                format!("its chain is deeper than {MAX_DEPTH} images"),
            ));
        }
        let keep =
            OpenFlags::DIRECT | OpenFlags::UNTRUSTED | OpenFlags::NO_LOCK | OpenFlags::SHARED;
        let mut flags = OpenFlags(flags.0 & keep.0);
        // The caller chose this one; whether to trust what it names is asked again there.
        if options.get("format").is_none() {
            flags.0 &= !OpenFlags::UNTRUSTED.0;
        }
        let mut how = check(options, flags, matches!(source, Source::Remote(_)), self.locking)?;
        // Others may read it too, and nobody may write what an overlay relies on.
        how.lock.wanted = how.lock.wanted.below();
        self.locking = how.lock;
        if options.get("implicit-open").is_some() {
            self.implicit = implicit(options)?;
        }
        let driver = match source {
            Source::Memory(size) => file::from_memory(file::memory(size)?)?,
            Source::Remote(remote) => {
                let name = match &remote {
                    Remote::Uri(uri) => Name::from(uri.to_string()),
                    Remote::Command(_) => Name::from("nbd+exec:"),
                };
                remote.open(&name, options, flags)?
            }
            Source::Path(path) => {
                let path = Name::from(path.to_owned());
                file::open_locked(&path, how.file, how.lock, &mut self.locks)
                    .map_err(|e| backing_error(e, above))?
            }
        };
        self.note(driver.identity(), driver.name(), above)?;
        Ok(self.image(driver, options, flags, guess)?.0)
    }
}

/// Say whose backing file it was that could not be opened.
fn backing_error(e: Error, above: &Name) -> Error {
    match e {
        Error::Os { op: _, file, errno } => {
            let name = format!(
                "{} (backing file of {})",
                file.as_path().display(),
                above.as_path().display()
            );
            Error::Os { op: "open", file: Name::from(name), errno }
        }
        Error::Locked { file, what } => {
            let what = format!("{what} (backing file of {})", above.as_path().display());
            Error::Locked { file, what }
        }
        e => e,
    }
}

/// Whether a name that an image gives is something other than a path: `scheme:` before any slash.
fn looks_like_uri(name: &[u8]) -> bool {
    let end = name.iter().position(|&b| b == b'/').unwrap_or(name.len());
    match name[..end].iter().position(|&b| b == b':') {
        None | Some(0) => false,
        Some(i) => name[..i].iter().all(|&b| b.is_ascii_alphanumeric() || b"+-.".contains(&b)),
    }
}

/// A path that an image gives, seen from the directory that the image is in.
pub(super) fn beside(image: &Path, path: &Path) -> PathBuf {
    let image = image.as_os_str().as_bytes();
    let image = Path::new(OsStr::from_bytes(image.strip_prefix(b"file:").unwrap_or(image)));
    match image.parent() {
        Some(dir) if path.is_relative() && !dir.as_os_str().is_empty() => dir.join(path),
        _ => PathBuf::from(std::ffi::OsString::from_vec(path.as_os_str().as_bytes().to_vec())),
    }
}
