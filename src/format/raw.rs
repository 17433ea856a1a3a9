//! The raw format: the bytes as they are.
//!
//! One thing it guards: an image whose format was found by probing must not become another format
//! by what is written to it, or whoever opens it next would trust a header that a guest wrote.

use super::{Kind, PROBE_LEN, Probe, recognise};
use crate::block::*;

/// A raw image.
pub struct Raw {
    file: Device,
    guard_probe: bool,
}

impl Raw {
    /// The raw image in `file`; `guard_probe` refuses writes that would make it another format.
    pub fn new(file: Device, guard_probe: bool) -> Self {
        Self { file, guard_probe }
    }

    #[cold]
    fn check_probe(&self, buf: Src<'_>, offset: u64) -> Result<()> {
        let mut head = [0; PROBE_LEN];
        let len = self.file.size().min(PROBE_LEN as u64) as usize;
        self.file.read_slice(&mut head[..len], 0)?;
        buf.copy_to(&mut head[offset as usize..]);
        match recognise(&head) {
            Probe::Known(Kind::Raw) => Ok(()),
            found => {
                let name = match found {
                    Probe::Foreign(name) => name,
                    Probe::Known(_) => "qcow2",
                };
                Err(Error::policy(
                    self.file.name(),
                    format!(
                        "found to be raw by probing, and this write would make its first sector look \
                         like format {name}; open it with option format=raw to allow that"
                    ),
                ))
            }
        }
    }
}

impl Driver for Raw {
    fn name(&self) -> &Name {
        self.file.name()
    }
    fn kind(&self) -> &'static str {
        "raw"
    }
    fn caps(&self) -> Caps {
        // The file's own emulation stands below: any request can be passed to it.
        Caps {
            align: 1,
            mem_align: 1,
            max_transfer: 0,
            fua: self.file.can_fua() != Can::Not,
            ..self.file.caps().clone()
        }
    }
    fn size(&self) -> u64 {
        self.file.size()
    }
    #[inline]
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.file.read(buf, offset)
    }
    #[inline]
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        if self.guard_probe && offset < PROBE_LEN as u64 {
            self.check_probe(buf, offset)?;
        }
        self.file.write(buf, offset, flags)
    }
    fn flush(&self) -> Result<()> {
        self.file.flush()
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.file.zero(offset, count, flags)
    }
    fn trim(&self, offset: u64, count: u64) -> Result<()> {
        self.file.trim(offset, count, ReqFlags::NONE)
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.file.cache(offset, count)
    }
    fn map(&self, offset: u64, count: u64) -> Result<Run<'_>> {
        Ok(Run { len: count, place: Place::At { dev: &self.file, offset } })
    }
    fn resize(&self, size: u64, prealloc: Prealloc, shrink: bool) -> Result<()> {
        if prealloc == Prealloc::Metadata {
            return Err(Error::invalid("preallocation=metadata: a raw image has no metadata"));
        }
        self.file.driver().resize(size, prealloc, shrink)
    }
    fn allocated(&self) -> Option<u64> {
        self.file.driver().allocated()
    }
    fn close(&self) -> Result<()> {
        self.file.driver().close()
    }
    fn describe(&self) -> Description {
        Description { format: "raw", ..Description::default() }
    }
}
