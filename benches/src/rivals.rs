//! The libraries that are measured: ours by its Rust API and by its C ABI, and imago.

use std::ffi::{CString, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qblk::{Image, OpenFlags, Options, ReqFlags, capi};

use crate::work::{Device, Res};

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// libqblk, by [`Image`].
pub struct Ours(Image);

impl Ours {
    /// Open a qcow2 image, with further options `KEY=VALUE`.
    pub fn open(path: &Path, write: bool, options: &[(&str, &str)]) -> Res<Self> {
        let mut all = Options::new().with("format", "qcow2");
        for (key, value) in options {
            all.set(key, Some(value.as_bytes()));
        }
        let flags = if write { OpenFlags::RDWR } else { OpenFlags::default() };
        Image::open(path.as_os_str(), &all, flags).map(Self).map_err(text)
    }

    /// Open an NBD export to read, by so many connections or as many as the library takes.
    pub fn open_nbd(uri: &str, connections: Option<u32>) -> Res<Self> {
        let mut options = Options::new().with("format", "raw");
        if let Some(n) = connections {
            options.set("nbd.connections", Some(n.to_string().as_bytes()));
        }
        Image::open(uri.as_ref(), &options, OpenFlags::default()).map(Self).map_err(text)
    }

    /// Of the device, bytes.
    pub fn size(&self) -> Res<u64> {
        self.0.size().map_err(text)
    }

    /// Open, read `buf` at `offset`, close.
    pub fn visit(path: &Path, buf: &mut [u8], offset: u64) -> Res<()> {
        let image = Self::open(path, false, &[])?;
        image.read(buf, offset)?;
        image.0.close().map_err(text)
    }
}

impl Device for Ours {
    fn read(&self, buf: &mut [u8], offset: u64) -> Res<()> {
        self.0.read_at(buf, offset).map_err(text)
    }
    fn write(&self, buf: &[u8], offset: u64) -> Res<()> {
        self.0.write_at(buf, offset, ReqFlags::NONE).map_err(text)
    }
    fn flush(&self) -> Res<()> {
        self.0.flush().map_err(text)
    }
}

/// libqblk, by the functions that a C program calls.
pub struct OursByC(*mut capi::qblk);

// SAFETY: every function of the C ABI may be called from any thread.
unsafe impl Send for OursByC {}
// SAFETY: as above, at any time.
unsafe impl Sync for OursByC {}

impl OursByC {
    /// Open an image, found to be what it is by probing.
    pub fn open(path: &Path) -> Res<Self> {
        let name = CString::new(path.as_os_str().as_bytes()).map_err(text)?;
        let mut dev = std::ptr::null_mut();
        // SAFETY: a C string, and room for a handle.
        check(unsafe { capi::qblk_open(name.as_ptr(), 0, &mut dev) })?;
        Ok(Self(dev))
    }
}

fn check(code: c_int) -> Res<()> {
    match code {
        0 => Ok(()),
        // SAFETY: never NULL, and valid until this thread's next call.
        _ => Err(unsafe { std::ffi::CStr::from_ptr(capi::qblk_get_error()) }
            .to_string_lossy()
            .into_owned()),
    }
}

impl Device for OursByC {
    fn read(&self, buf: &mut [u8], offset: u64) -> Res<()> {
        // SAFETY: a handle that is open, and memory of that size.
        check(unsafe { capi::qblk_pread(self.0, buf.as_mut_ptr().cast(), buf.len(), offset) })
    }
    fn write(&self, buf: &[u8], offset: u64) -> Res<()> {
        // SAFETY: as above.
        check(unsafe { capi::qblk_pwrite(self.0, buf.as_ptr().cast(), buf.len(), offset) })
    }
}

impl Drop for OursByC {
    fn drop(&mut self) {
        // SAFETY: the last call on this handle.
        unsafe { capi::qblk_close(self.0) };
    }
}

/// imago.
pub struct Imago(FormatAccess<File>);

impl Imago {
    /// Open a qcow2 image and what it stands on.
    pub fn open(path: &Path, write: bool) -> Res<Self> {
        let image = Qcow2::<File>::builder_path(path)
            .write(write)
            .open(PermissiveImplicitOpenGate::default())
            .map_err(|e| format!("imago: {}: {e}", path.display()))?;
        Ok(Self(FormatAccess::new(image)))
    }

    /// Open, read `buf` at `offset`, close.
    pub fn visit(path: &Path, buf: &mut [u8], offset: u64) -> Res<()> {
        Self::open(path, false)?.read(buf, offset)
    }
}

impl Device for Imago {
    fn read(&self, buf: &mut [u8], offset: u64) -> Res<()> {
        self.0.read(buf, offset).map_err(text)
    }
    fn write(&self, buf: &[u8], offset: u64) -> Res<()> {
        self.0.write(buf, offset).map_err(text)
    }
    fn flush(&self) -> Res<()> {
        // The first writes what it keeps in memory, the second makes the host write it.
        self.0.flush().and_then(|()| self.0.sync()).map_err(text)
    }
}
