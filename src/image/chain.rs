//! Opening by name: what a name means, what format a file has, and which files an image may bring
//! with it (the open policy of docs/abi.md).

use std::cell::Cell;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::how::{Carrier, Implicit, check, implicit};
use super::managed;
pub(super) use super::named::beside;
use super::named::{Role, allowed, may_name, misspelt, named_error, none_of_its_kind};
use super::remote::{self, Remote};
use super::{Again, OpenFlags, Options, Tree, key};
use crate::block::*;
use crate::file::{self, Locking, Locks};
pub use crate::format::Probe;
use crate::format::{self, Params};
use crate::plugin::{self, PluginName};

/// Images in a chain, at most.
const MAX_DEPTH: usize = 200;

/// What a name that the caller or an image gave means.
pub(super) enum Source<'a> {
    Path(&'a OsStr),
    Memory(u64),
    Remote(Remote),
    Plugin(PluginName),
}

impl Source<'_> {
    /// What options have a use for it.
    fn kind(&self) -> Carrier {
        match self {
            Self::Path(_) | Self::Memory(_) => Carrier::Local,
            Self::Remote(_) => Carrier::Remote,
            Self::Plugin(_) => Carrier::Plugin,
        }
    }
}

/// One image on its way to being opened, and those above it.
struct Opening<'a> {
    calls: &'a Arc<InFlight>,
    /// Files of the chain so far: device and inode numbers.
    seen: Vec<(u64, u64)>,
    /// Images of the chain so far.
    images: usize,
    implicit: Implicit,
    /// On the files of the chain so far.
    locks: Locks,
    /// How the image above was locked, where the options say nothing.
    locking: Locking,
    /// The files of the chain so far, as a lock manager is told of them.
    parts: Vec<managed::Noted>,
    /// How many of them belong to the uppermost image.
    own_parts: usize,
    /// And how many with those of the image below.
    parts_to_below: usize,
}

/// A file of a chain that is open, and how the image in it is to be.
struct Part {
    /// Until it is.
    driver: Cell<Option<Box<dyn Driver>>>,
    options: Options,
    flags: OpenFlags,
    /// Its overlay does not record its format: it may name no files of its own.
    guessing: bool,
    /// An image has named it.
    named: bool,
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
    if let Some(plugin) = PluginName::parse(bytes)? {
        return Ok(Source::Plugin(plugin));
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
    ["json"]
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
    check(options, flags, source.kind(), Locking::default())?;
    let again = match source {
        Source::Remote(remote) => Again::Remote(remote),
        Source::Plugin(plugin) => Again::Plugin(plugin.settled()),
        Source::Memory(size) => Again::Memory(file::memory(size)?),
        Source::Path(path) => Again::Path(
            std::path::absolute(Path::new(path)).unwrap_or_else(|_| PathBuf::from(path)),
        ),
    };
    managed::open(name.to_owned().into(), again, options, flags, calls, None)
        .map_err(|e| misspelt(e, name))
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
    let carrier = if is_socket { Carrier::Remote } else { Carrier::Local };
    check(options, flags, carrier, Locking::default())?;
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
    managed::open(name, Again::Descriptor(fd), options, flags, calls, None)
}

/// Whether it can be opened again at all: to be asked while it is still open.
pub(super) fn check_reopen(old: &Tree) -> Result<()> {
    match old.again {
        Again::Never => {
            let text = "opened by a connected socket, which can not be opened again";
            Err(Error::policy(&old.name, text))
        }
        Again::Layer => Err(Error::NotSupported("replacing an image that layers stand on")),
        _ => Ok(()),
    }
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
        Again::Plugin(plugin) => Again::Plugin(plugin.clone()),
        Again::Never | Again::Layer => {
            return Err(Error::Internal("opened again by nothing".into()));
        }
    };
    managed::open(old.name.clone(), again, options, flags, calls, Some(old))
}

fn duplicate(fd: &OwnedFd, name: &Name) -> Result<OwnedFd> {
    let failed = |e: std::io::Error| Error::Os {
        op: "duplicating its descriptor",
        file: name.clone(),
        errno: e.raw_os_error().unwrap_or(libc::EMFILE),
    };
    fd.try_clone().map_err(failed)
}

/// Open a chain, without asking a lock manager.
pub(super) fn open_now(
    name: Name,
    again: &Again,
    options: &Options,
    flags: OpenFlags,
    calls: &Arc<InFlight>,
    locks: Locks,
) -> Result<Tree> {
    let how = check(options, flags, again.carrier(), Locking::default())?;
    let mut opening = Opening::new(calls, implicit(options)?, locks);
    opening.locking = how.lock;
    let locks = &mut opening.locks;
    let driver = match again {
        Again::Memory(fd) => file::from_memory(duplicate(fd, &name)?)?,
        Again::Descriptor(fd) => {
            file::from_fd_locked(duplicate(fd, &name)?, &name, how.file, how.lock, locks)?
        }
        Again::Remote(remote) => remote.open(&name, options, flags)?,
        Again::Plugin(name) => open_plugin(name, options, flags, calls)?,
        Again::Never | Again::Layer => {
            return Err(Error::Internal("opened again by nothing".into()));
        }
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

/// An instance of a plugin, with the settings that the options have for it.
fn open_plugin(
    name: &PluginName,
    options: &Options,
    flags: OpenFlags,
    calls: &Arc<InFlight>,
) -> Result<Box<dyn Driver>> {
    let write = flags.has(OpenFlags::RDWR) && !flags.has(OpenFlags::INFO_ONLY);
    let told = OpenFlags::INFO_ONLY | OpenFlags::SHARED | OpenFlags::DIRECT;
    let told = flags.0 & told.0 | if write { OpenFlags::RDWR.0 } else { 0 };
    plugin::open(name, &super::plugin_settings(options), told, write, calls.id())
}

/// The file that a name stands for.
pub(super) fn file_of(name: &Name) -> Name {
    match name.as_bytes().strip_prefix(b"file:") {
        Some(path) => Name::from(OsStr::from_bytes(path).to_owned()),
        None => name.clone(),
    }
}

/// Refuse `target` as a new image on top of `below` if it is `below` or in its chain.
pub(super) fn refuse_loop(target: &Name, below: &OsStr, options: &Options) -> Result<()> {
    let calls = Arc::new(InFlight::default());
    let mut opening = Opening::new(&calls, Implicit::Local, Locks::default());
    let Ok(meta) = std::fs::metadata(target.as_path()) else { return Ok(()) };
    opening.seen.push((meta.dev(), meta.ino()));
    let below = Source::Path(below);
    let found = opening.below(target, below, options, OpenFlags::NO_LOCK, false, false);
    match found.and_then(|below| opening.image(below)) {
        Err(e @ Error::Policy { .. }) => Err(e),
        // What can not be opened here may yet be a good backing file elsewhere.
        _ => Ok(()),
    }
}

impl<'a> Opening<'a> {
    fn new(calls: &'a Arc<InFlight>, implicit: Implicit, locks: Locks) -> Self {
        Self {
            calls,
            seen: Vec::new(),
            images: 0,
            implicit,
            locks,
            locking: Locking::default(),
            parts: Vec::new(),
            own_parts: 0,
            parts_to_below: 0,
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
        let (driver, own) = (Some(driver).into(), options.clone());
        let part = Part { driver, options: own, flags, guessing: false, named: false };
        let (top, probed) = self.image(Box::new(part))?;
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
            own_parts: self.own_parts,
            parts_to_below: self.parts_to_below,
            below: None,
        })
    }

    /// Remember a file of the chain; refuse one that is there already.
    fn note(&mut self, id: Option<(u64, u64)>, path: &Name, named_by: &Name) -> Result<()> {
        if let Some(id) = id {
            if self.seen.contains(&id) {
                return Err(Error::policy(
                    named_by,
                    format!("its chain is a loop: {path} is in it already"),
                ));
            }
            self.seen.push(id);
        }
        Ok(())
    }

    /// Open the image in a file and, below it, what it stands on.
    ///
    /// It calls itself for the image below, as deep as chains may be: what it has on the stack is little,
    /// and what takes more room is done in functions that return before that.
    fn image(&mut self, this: Box<Part>) -> Result<(Device, bool)> {
        let (mut opened, probed) = self.one(&this)?;
        if let Some(data) = self.data(&opened, &this)? {
            opened.attach_data(data);
        }
        let next = match this.flags.0 & OpenFlags::NO_DATA != 0 {
            true => None,
            false => self.backing(&opened, &this)?,
        };
        if let Some(next) = next {
            let (named, above) = (next.named, opened.name().clone());
            match self.image(next) {
                Ok((device, _)) => {
                    opened.attach(device, this.options.get("backing-file").is_none());
                }
                Err(e) if named => return Err(none_of_its_kind(e, &above, Role::Backing)),
                Err(e) => return Err(e),
            }
        }
        Ok((Device::new(opened.into_driver()?), probed))
    }

    /// Open the image in a file, alone. Also whether its format was found by probing.
    #[inline(never)]
    fn one(&mut self, this: &Part) -> Result<(Box<format::Opened>, bool)> {
        let (options, flags) = (&this.options, this.flags);
        let driver = this.driver.take();
        let driver = driver.ok_or_else(|| Error::Internal("opened twice".into()))?;
        let file = Device::new(driver);
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
        self.images += 1;
        self.note_part(&file, kind);
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
            snapshot: options.get("snapshot").map(<[u8]>::to_vec),
            calls: self.calls.clone(),
        };
        let opened = match flags.has(OpenFlags::CHECK) {
            true => format::open_to_check(kind, file, params)?,
            false => format::open(kind, file, params)?,
        };
        if has_key && !opened.is_encrypted() {
            return Err(key::no_use(opened.name()));
        }
        Ok((Box::new(opened), probed))
    }

    /// Open the file of what an image stands on, if anything.
    #[inline(never)]
    fn backing(&mut self, opened: &format::Opened, this: &Part) -> Result<Option<Box<Part>>> {
        let (name, recorded) = (&opened.name().clone(), opened.backing());
        let (options, flags) = (&this.options, this.flags);
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
            return self.below(name, parse_name(chosen)?, &below, flags, false, false).map(Some);
        }
        let Some(recorded) = recorded else {
            return Ok(None);
        };
        may_name(name, &recorded.name, Role::Backing, flags, this.guessing)?;
        let allowed = allowed(name, &recorded.name, Role::Backing, self.implicit)?;
        let source = allowed.source();
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
        let below = self.below(name, source, &below, flags, guess, true);
        below.map(Some).map_err(|e| none_of_its_kind(e, name, Role::Backing))
    }

    /// Tell a lock manager of a file of the image that was opened last.
    fn note_part(&mut self, file: &Device, format: format::Kind) {
        managed::note(&mut self.parts, file, format);
        match self.images {
            1 => self.own_parts = self.parts.len(),
            2 => self.parts_to_below = self.parts.len(),
            _ => {}
        }
    }

    /// Open the data file of an image that has one: for writing, if the image is.
    #[inline(never)]
    fn data(&mut self, opened: &format::Opened, this: &Part) -> Result<Option<Device>> {
        let (name, options, flags) = (&opened.name().clone(), &this.options, this.flags);
        if flags.has(OpenFlags::CHECK) {
            return Ok(None);
        }
        let chosen = options.os("data-file");
        let Some(data) = opened.data() else {
            return match chosen {
                None => Ok(None),
                Some(_) => Err(Error::invalid(format!(
                    "{name}: option 'data-file' has no use here (the image has no external data file)"
                ))),
            };
        };
        if flags.has(OpenFlags::INFO_ONLY) {
            return Ok(None);
        }
        if let Some(chosen) = chosen {
            return self.open_data(name, parse_name(chosen)?, options, flags).map(Some);
        }
        let Some(recorded) = data.name.filter(|n| !n.is_empty()) else {
            return Err(Error::invalid(format!(
                "{name}: has an external data file and does not name it; the option 'data-file' does"
            )));
        };
        may_name(name, &recorded, Role::Data, flags, this.guessing)?;
        let allowed = allowed(name, &recorded, Role::Data, self.implicit)?;
        let file = self.open_data(name, allowed.source(), options, flags);
        file.map(Some).map_err(|e| none_of_its_kind(e, name, Role::Data))
    }

    fn open_data(
        &mut self,
        above: &Name,
        source: Source<'_>,
        options: &Options,
        flags: OpenFlags,
    ) -> Result<Device> {
        let driver = match source {
            Source::Memory(size) => file::from_memory(file::memory(size)?)?,
            Source::Remote(remote) => remote.open(&remote.name(), &Options::new(), flags)?,
            Source::Plugin(name) => open_plugin(&name, &Options::new(), flags, self.calls)?,
            Source::Path(path) => {
                let how = file::How {
                    write: flags.has(OpenFlags::RDWR),
                    direct: flags.has(OpenFlags::DIRECT),
                    mmap: options.get("io") == Some(b"mmap"),
                };
                // As the image itself, whose bytes these are.
                let lock = Locking { wanted: self.locking.wanted.below(), ..self.locking };
                file::open_locked(&Name::from(path.to_owned()), how, lock, &mut self.locks)
                    .map_err(|e| named_error(e, above, Role::Data))?
            }
        };
        self.note(driver.identity(), driver.name(), above)?;
        let file = Device::new(driver);
        self.note_part(&file, format::Kind::Raw);
        Ok(file)
    }

    fn below(
        &mut self,
        above: &Name,
        source: Source<'_>,
        options: &Options,
        flags: OpenFlags,
        guessing: bool,
        named: bool,
    ) -> Result<Box<Part>> {
        if self.images >= MAX_DEPTH {
            return Err(Error::policy(
                above,
                format!("its chain is deeper than {MAX_DEPTH} images"),
            ));
        }
        let keep =
            OpenFlags::DIRECT | OpenFlags::UNTRUSTED | OpenFlags::NO_LOCK | OpenFlags::SHARED;
        let write = flags.has(OpenFlags::WRITE_BELOW);
        let mut flags = OpenFlags(flags.0 & keep.0 | if write { OpenFlags::RDWR.0 } else { 0 });
        // The caller chose this one; whether to trust what it names is asked again there.
        if options.get("format").is_none() {
            flags.0 &= !OpenFlags::UNTRUSTED.0;
        }
        let mut how = check(options, flags, source.kind(), self.locking)?;
        // Others may read it too, and nobody may write what an overlay relies on.
        how.lock.wanted = how.lock.wanted.below();
        self.locking = how.lock;
        if options.get("implicit-open").is_some() {
            self.implicit = implicit(options)?;
        }
        let driver = match source {
            Source::Memory(size) => file::from_memory(file::memory(size)?)?,
            Source::Remote(remote) => remote.open(&remote.name(), options, flags)?,
            Source::Plugin(name) => open_plugin(&name, options, flags, self.calls)?,
            Source::Path(path) => {
                let path = Name::from(path.to_owned());
                file::open_locked(&path, how.file, how.lock, &mut self.locks)
                    .map_err(|e| named_error(e, above, Role::Backing))?
            }
        };
        self.note(driver.identity(), driver.name(), above)?;
        let (driver, options) = (Some(driver).into(), options.clone());
        Ok(Box::new(Part { driver, options, flags, guessing, named }))
    }
}
