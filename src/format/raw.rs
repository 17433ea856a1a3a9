//! The raw format: the bytes as they are.
//!
//! One thing it guards: an image whose format was found by probing must not become another format
//! by what is written to it, or whoever opens it next would trust a header that a guest wrote.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{Kind, PROBE_LEN, Params, Probe, recognise};
use crate::block::*;

/// A raw image.
pub struct Raw {
    file: Arc<Device>,
    /// Set where writes must not make it another format; held while the first sector changes, so that
    /// what is checked is what comes to be.
    guard: Option<Mutex<()>>,
    calls: Arc<InFlight>,
}

impl Raw {
    /// The raw image in `file`.
    pub fn new(file: Device, params: &Params) -> Self {
        let guard = (params.probed && params.write).then(Mutex::default);
        Self { file: Arc::new(file), guard, calls: params.calls.clone() }
    }

    /// Do `work`, which makes of the first sector what `change` does, if that is no other format.
    fn guarded(
        &self,
        offset: u64,
        change: impl FnOnce(&mut [u8]),
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(guard) = self.guard.as_ref().filter(|_| offset < PROBE_LEN as u64) else {
            return work();
        };
        let _one = guard.lock();
        let mut head = [0; PROBE_LEN];
        let len = self.file.size().min(PROBE_LEN as u64) as usize;
        self.file.read_slice(&mut head[..len], 0)?;
        change(&mut head[offset as usize..]);
        let name = match recognise(&head) {
            Probe::Known(Kind::Raw) => return work(),
            Probe::Foreign(name) => name,
            Probe::Known(Kind::Luks) => "luks",
            Probe::Known(_) => "qcow2",
        };
        Err(Error::policy(
            self.file.name(),
            format!(
                "found to be raw by probing, and this would make its first sector look like format \
                 {name}; open it with option format=raw to allow that"
            ),
        ))
    }
}

/// Zero as many of the bytes as `count` says.
fn clear(head: &mut [u8], count: u64) {
    let len = head.len().min(usize::try_from(count).unwrap_or(usize::MAX));
    head[..len].fill(0);
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
        // Where the file would flush behind a write, it is better done once for all of a request.
        let fua = self.file.can_fua() == Can::Native;
        Caps {
            align: 1,
            mem_align: 1,
            max_transfer: 0,
            max_range: 0,
            fua,
            zero_fua: fua,
            trim_fua: fua,
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
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        self.file.read_now(buf, offset)
    }
    #[inline]
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        if self.guard.is_none() || offset >= PROBE_LEN as u64 {
            return self.file.write(buf, offset, flags);
        }
        let change = |head: &mut [u8]| {
            buf.copy_to(head);
        };
        self.guarded(offset, change, || self.file.write(buf, offset, flags))
    }
    fn writes_at_once(&self, count: usize) -> bool {
        self.file.writes_at_once(count)
    }
    fn flush(&self) -> Result<()> {
        self.file.flush()
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        let change = |head: &mut [u8]| clear(head, count);
        self.guarded(offset, change, || self.file.zero(offset, count, flags))
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        let change = |head: &mut [u8]| clear(head, count);
        self.guarded(offset, change, || self.file.trim(offset, count, flags))
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.file.cache(offset, count)
    }
    fn map(&self, offset: u64, count: u64) -> Result<Run<'_>> {
        Ok(Run { len: count, place: Place::At { dev: &self.file, offset } })
    }
    fn status(
        &self,
        context: &[u8],
        offset: u64,
        count: u64,
        most: usize,
        out: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        self.file.driver().status(context, offset, count, most, out)
    }
    fn files(&self) -> Vec<Arc<Device>> {
        vec![self.file.clone()]
    }
    fn resize(&self, size: u64, prealloc: Prealloc, shrink: bool) -> Result<()> {
        if prealloc == Prealloc::Metadata {
            return Err(Error::invalid("preallocation=metadata: a raw image has no metadata"));
        }
        let file = self.file.driver();
        file.resize(size, prealloc, shrink)?;
        // A write that saw the old end may have made the file longer again since.
        if shrink {
            self.calls.wait();
            if file.size() > size {
                file.resize(size, Prealloc::Off, true)?;
            }
        }
        Ok(())
    }
    fn allocated(&self) -> Option<u64> {
        self.file.driver().allocated()
    }
    fn flush_to_close(&self) -> Result<()> {
        self.file.driver().flush_to_close()
    }
    fn close(&self) -> Result<()> {
        self.file.driver().close()
    }
    fn describe(&self) -> Description {
        Description { format: "raw", ..Description::default() }
    }
}
