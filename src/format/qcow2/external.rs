//! An external data file: guest data lies in another file, at the offsets that the guest has.
//!
//! Nothing counts references there: space is not allocated in it but is where it is. What the guest
//! drops is given back at once, while nobody else can write to the clusters; a write that looked its
//! place up before that is one that overlaps with the dropping, and nobody sees what it leaves.
//!
//! A *raw* data file is also to be good without the image: it must always hold what the guest sees. So
//! such an image keeps its clusters mapped, as it was made, and zeroing and trimming are done to the
//! data file alone.
//!
//! The data file is synced before any table that points to it is written (`flush`).
//!
//! Source: "External data file", "Autoclear features" of the QCOW2 specification.

use super::*;
use crate::crypto::SECTOR;
use crate::format::crypt::Veiled;

/// Stands for a data file that was not attached.
struct Missing(Name);

/// A device where data would be, had it been attached.
pub(super) fn missing(name: &Name) -> Arc<Device> {
    Arc::new(Device::new(Box::new(Missing(name.clone()))))
}

impl Missing {
    fn error(&self) -> Error {
        Error::BadHandle(format!("{}: its data file is not open", self.0))
    }
}

impl Driver for Missing {
    fn name(&self) -> &Name {
        &self.0
    }
    fn kind(&self) -> &'static str {
        "none"
    }
    fn caps(&self) -> Caps {
        Caps::default()
    }
    fn size(&self) -> u64 {
        // Not too small to have what is looked for.
        1 << 63
    }
    fn read(&self, _: Dst<'_>, _: u64) -> Result<()> {
        Err(self.error())
    }
    fn write(&self, _: Src<'_>, _: u64, _: ReqFlags) -> Result<()> {
        Err(self.error())
    }
    fn flush(&self) -> Result<()> {
        Err(self.error())
    }
    fn map(&self, _: u64, _: u64) -> Result<Run<'_>> {
        Err(self.error())
    }
}

impl Qcow2 {
    /// The data file that it needs, by the name in its header if that has one.
    pub fn data_ref(&self) -> Option<DataRef> {
        self.shape.external.then(|| DataRef { name: self.header.data_file.clone() })
    }

    /// Put its data file beneath it.
    pub fn attach_data(&mut self, data: Device) {
        data.flush_fails_for_good();
        let data = Arc::new(data);
        self.external = Some(data.clone());
        self.data = match self.veil.take() {
            Some(crypt) => Arc::new(Device::new(Box::new(Veiled::new(data, crypt)))),
            None => data,
        };
    }

    /// Make what was written to the image's file, and to its data file, survive a power cut.
    pub(super) fn sync(&self) -> Result<()> {
        if let Some(data) = &self.external {
            data.flush()?;
        }
        self.file.flush()
    }

    /// The data file ends before a cluster that should be in it.
    #[cold]
    pub(super) fn data_cut_off(&self, offset: u64) -> Error {
        Error::corrupt(
            self.data.name(),
            format!(
                "a data cluster at {offset:#x} lies past the end of the file ({} bytes): is it cut off?",
                self.data.size()
            ),
        )
    }

    /// Zero in a raw data file: there, and where the image says nothing of it, also by the tables.
    pub(super) fn zero_raw(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        if self.aes.is_none() {
            self.data.zero(offset, count, flags)?;
        } else if flags.has(ReqFlags::FAST_ZERO) {
            return Err(Error::NotSupported("fast zeroing of encrypted data"));
        }
        // Of a sound image all clusters are mapped, and none is below. Else what would show is hidden.
        if self.aes.is_some() || self.may_show_below(offset) {
            self.zero_part(offset, offset + count)?;
        }
        Ok(())
    }

    /// Give space of the data file (or of subclusters) back to the host. That it can not be is no error.
    pub(super) fn punch(&self, holes: &[(u64, u64)]) {
        for &(host, len) in holes {
            let end = (host + len).min(self.data.size());
            if let Err(e) = self.data.trim(host, end.saturating_sub(host), ReqFlags::NONE) {
                crate::log::log(crate::log::Level::Warn, format_args!("{e}"));
            }
        }
    }

    /// Bytes that the data file has for a guest of `size` bytes: whole sectors, if they are encrypted.
    pub(super) fn data_len(&self, size: u64) -> u64 {
        match (self.shape.external, self.is_encrypted()) {
            (false, _) => u64::MAX,
            (true, false) => size,
            (true, true) => size.next_multiple_of(SECTOR as u64),
        }
    }

    /// Where data ends in a data file; elsewhere there is no end.
    pub(super) fn data_end(&self) -> u64 {
        match self.shape.external {
            true => self.data_len(self.size.load(Acquire)),
            false => u64::MAX,
        }
    }

    /// Before the image grows: make the data file as long as the guest will see it, zeroes at its end.
    pub(super) fn grow_data(&self, old: u64, new: u64) -> Result<()> {
        let Some(data) = &self.external else { return Ok(()) };
        let (size, new) = (data.size(), self.data_len(new));
        // What it has past the old end was never the guest's.
        if self.is_raw && old < size {
            self.data.zero(old, size.min(new) - old, ReqFlags::MAY_TRIM)?;
        }
        if size < new { data.driver().resize(new, Prealloc::Off, false) } else { Ok(()) }
    }

    /// After the image has shrunk: cut the data file off where it ends. A device or an export stays as long
    /// as it is.
    pub(super) fn shrink_data(&self, new: u64) -> Result<()> {
        let new = self.data_len(new);
        match &self.external {
            Some(data) if data.driver().kind() != "host_device" && data.size() > new => {
                match data.driver().resize(new, Prealloc::Off, true) {
                    Err(Error::NotSupported(_)) => Ok(()),
                    done => done,
                }
            }
            _ => Ok(()),
        }
    }
}
