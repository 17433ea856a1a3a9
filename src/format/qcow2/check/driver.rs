//! An image that is open to be checked, and for nothing else: its tables may be too broken to be used.

use super::*;

/// The driver of an image that is open with `OpenFlags::CHECK`.
pub struct Examined {
    file: Device,
    header: Header,
    write: bool,
}

impl Examined {
    /// Take the image in `file`. `write`: it may be mended.
    pub fn open(file: Device, write: bool) -> Result<Self> {
        let header = Header::read_to_check(&file)?;
        if let Some(feature) = header.not_checkable() {
            return Err(Error::unsupported(file.name(), feature));
        }
        Ok(Self { file, header, write })
    }

    /// Whether its data is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.header.crypt != 0
    }

    fn refuse<T>(&self) -> Result<T> {
        Err(Error::BadHandle(format!("{}: open to be checked only", self.file.name())))
    }
}

impl Driver for Examined {
    fn name(&self) -> &Name {
        self.file.name()
    }
    fn kind(&self) -> &'static str {
        "qcow2"
    }
    fn caps(&self) -> Caps {
        Caps { read_only: !self.write, ..Caps::default() }
    }
    fn size(&self) -> u64 {
        self.header.size
    }
    fn read(&self, _: Dst<'_>, _: u64) -> Result<()> {
        self.refuse()
    }
    fn write(&self, _: Src<'_>, _: u64, _: ReqFlags) -> Result<()> {
        self.refuse()
    }
    fn map(&self, _: u64, _: u64) -> Result<Run<'_>> {
        self.refuse()
    }
    fn flush(&self) -> Result<()> {
        if self.write { self.file.flush() } else { Ok(()) }
    }
    fn close(&self) -> Result<()> {
        if self.write { self.file.driver().close() } else { Ok(()) }
    }
    fn check(&self, repair: Repair, progress: Progress<'_>) -> Result<CheckReport> {
        if repair != Repair::Nothing && !self.write {
            return Err(Error::ReadOnly(self.file.name().clone()));
        }
        run(&self.file, repair, progress)
    }
    fn allocated(&self) -> Option<u64> {
        self.file.driver().allocated()
    }
    fn describe(&self) -> Description {
        // As it is now: a repair may have cleared it.
        let h = Header::read_to_check(&self.file).unwrap_or_else(|_| self.header.clone());
        let mut state = 0;
        for (on, bit) in [
            (h.incompatible & incompat::DIRTY != 0, 2),
            (h.incompatible & incompat::CORRUPT != 0, 4),
            (h.crypt != 0, 8),
            (h.backing.is_some(), 16),
            (h.incompatible & incompat::DATA_FILE != 0, 32),
        ] {
            state |= if on { bit } else { 0 };
        }
        Description {
            state,
            cluster_size: 1 << self.header.cluster_bits,
            format: "qcow2",
            properties: Vec::new(),
        }
    }
}
