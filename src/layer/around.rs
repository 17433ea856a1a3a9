//! Layers that do the same with every call: something before it, something after it.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::*;

/// Kinds of calls, as settings name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Read,
    Write,
    Zero,
    Trim,
    Flush,
    Cache,
    Extents,
}

impl Call {
    /// How many there are.
    pub(super) const COUNT: usize = 7;
    /// All of them, by name.
    pub(super) const ALL: [(Self, &'static str); Self::COUNT] = [
        (Self::Read, "read"),
        (Self::Write, "write"),
        (Self::Zero, "zero"),
        (Self::Trim, "trim"),
        (Self::Flush, "flush"),
        (Self::Cache, "cache"),
        (Self::Extents, "extents"),
    ];

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// Some kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Calls(u8);

impl Calls {
    /// What `key` says; all calls if it is not set.
    pub(super) fn setting(settings: &Settings, key: &str) -> Result<Self> {
        let expected =
            "all, or some of read, write, zero, trim, flush, cache, extents, as in write+flush";
        let all = Self((1 << Call::COUNT) - 1);
        Ok(settings.parsed(key, expected, Self::parse)?.unwrap_or(all))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut some = 0;
        for name in text.split(['+', ',']) {
            some |= match Call::ALL.iter().find(|c| c.1 == name) {
                Some((call, _)) => 1 << *call as u8,
                None if name == "all" => (1 << Call::COUNT) - 1,
                None => return None,
            };
        }
        Some(Self(some))
    }

    /// Whether that kind is among them.
    pub(super) fn has(self, call: Call) -> bool {
        self.0 & 1 << call as u8 != 0
    }
}

/// A call. Of a flush offset and count are 0.
#[derive(Clone, Copy)]
pub(super) struct What {
    pub(super) call: Call,
    pub(super) offset: u64,
    pub(super) count: u64,
    pub(super) flags: ReqFlags,
}

/// A layer that does the same with every call. What it does not write is as for [`Layer`].
pub(super) trait Around: Send + Sync + 'static {
    /// Its name in `layers=`.
    fn kind(&self) -> &'static str;
    /// The context below.
    fn next(&self) -> &Device;
    /// Do `work`, which makes the call below, or do not.
    fn around(&self, what: What, work: impl FnOnce() -> Result<()>) -> Result<()>;
    /// The same for a read that is to wait for nothing.
    fn at_once(&self, what: What, work: impl FnOnce() -> Result<bool>) -> Result<bool>;
    /// What it can do.
    fn caps(&self) -> Caps {
        self.next().caps().clone()
    }
    /// It is to be used no more: its last words. What was written has been flushed.
    fn end(&self) -> Result<()> {
        Ok(())
    }
    /// Properties of its own.
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        Vec::new()
    }
}

/// Such a layer as a driver.
pub(super) fn boxed(layer: impl Around) -> Box<dyn Driver> {
    Stacked::boxed(Wrapped(layer))
}

struct Wrapped<A>(A);

impl<A: Around> Wrapped<A> {
    fn ranged(
        &self,
        call: Call,
        offset: u64,
        count: u64,
        flags: ReqFlags,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.0.around(What { call, offset, count, flags }, work)
    }
}

impl<A: Around> Layer for Wrapped<A> {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }
    fn next(&self) -> &Device {
        self.0.next()
    }
    fn caps(&self) -> Caps {
        self.0.caps()
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let count = buf.len() as u64;
        self.ranged(Call::Read, offset, count, ReqFlags::NONE, || self.next().read(buf, offset))
    }
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        let (call, count, flags) = (Call::Read, buf.len() as u64, ReqFlags::NONE);
        let what = What { call, offset, count, flags };
        self.0.at_once(what, || self.next().read_now(buf, offset))
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        let count = buf.len() as u64;
        self.ranged(Call::Write, offset, count, flags, || self.next().write(buf, offset, flags))
    }
    fn flush(&self) -> Result<()> {
        self.ranged(Call::Flush, 0, 0, ReqFlags::NONE, || self.next().flush())
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.ranged(Call::Zero, offset, count, flags, || self.next().zero(offset, count, flags))
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.ranged(Call::Trim, offset, count, flags, || self.next().trim(offset, count, flags))
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.ranged(Call::Cache, offset, count, ReqFlags::NONE, || self.next().cache(offset, count))
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        self.ranged(Call::Extents, offset, count, ReqFlags::NONE, || {
            self.next().driver().extents(offset, count, out)
        })
    }
    fn flush_to_close(&self) -> Result<()> {
        self.ranged(Call::Flush, 0, 0, ReqFlags::NONE, || self.next().flush_to_close())
    }
    fn close(&self) -> Result<()> {
        let flushed = self.flush_to_close();
        let ended = self.0.end();
        flushed.and(ended)
    }
    fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        self.0.properties()
    }
}

/// The path that `key` sets, made independent of the working directory.
pub(super) fn path(settings: &Settings, key: &str) -> Result<Option<PathBuf>> {
    let Some(name) = settings.get(key) else { return Ok(None) };
    let path = std::path::absolute(OsStr::from_bytes(name));
    path.map(Some).map_err(|_| settings.bad(key, "the name of a file"))
}

/// A file that a layer writes for people, a regular one, made if need be; as it is or to be added to.
pub(super) fn file(layer: &'static str, path: &Path, append: bool) -> Result<(File, Name)> {
    let name = Name::from(path.as_os_str());
    let mut how = OpenOptions::new();
    // A pipe that nobody reads must not hold up the open.
    how.create(true).mode(0o666).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = match append {
        true => how.append(true).open(path),
        false => how.write(true).truncate(false).open(path),
    };
    let file = file.map_err(|e| file_error(layer, "open", &name, &e))?;
    let meta = file.metadata().map_err(|e| file_error(layer, "fstat", &name, &e))?;
    match meta.is_file() {
        true => Ok((file, name)),
        false => Err(Error::invalid(format!("layer '{layer}': file: {name} is no regular file"))),
    }
}

/// The failure of a call on such a file.
pub(super) fn file_error(layer: &str, op: &str, name: &Name, e: &std::io::Error) -> Error {
    let errno = e.raw_os_error().unwrap_or(libc::EIO);
    Error::Refused { file: name.clone(), what: format!("layer '{layer}': {op}"), errno }
}
