//! One instance of a plugin: opened, configured, asked what it can do, and closed exactly once.

use std::ffi::{CString, c_int, c_void};
use std::sync::Arc;

use parking_lot::Mutex;

use super::abi::Handle;
use super::call::{Frame, Serial};
use super::layer::LayerSource;
use super::load::{Plugin, ThreadModel};
use super::order::Place;
use crate::block::*;
use crate::log::{Level, log};

/// What an instance uses.
type Used = (Arc<Plugin>, Option<Arc<LayerSource>>);
/// What instances use that could not be closed.
static LEFT_OPEN: Mutex<Vec<Used>> = Mutex::new(Vec::new());

/// An open instance.
pub struct Instance {
    pub plugin: Arc<Plugin>,
    pub handle: Handle,
    /// Of messages.
    pub name: Name,
    /// The device that stands on it, by which calls from inside out are found.
    device: usize,
    serial: Serial,
    /// The process that opened it.
    pid: u32,
    /// What it stands on, if it is a layer: until it is closed.
    pub source: Option<Arc<LayerSource>>,
    /// Its place in the order of locks, likewise.
    pub place: Option<Place>,
}

// SAFETY: the handle is the plugin's, which says by its thread model how it may be called.
unsafe impl Send for Instance {}
// SAFETY: as above.
unsafe impl Sync for Instance {}

/// What a call was about, for messages.
#[derive(Clone, Copy)]
pub struct About(pub &'static str, pub Option<(u64, u64)>);

/// What a callback answers.
enum Answer {
    /// As good as it gets.
    Done,
    /// It failed with this, and says no more.
    Code(c_int),
    /// It failed and says elsewhere with what.
    Failed,
    /// What no callback may answer.
    Garbage(i64),
}

impl Instance {
    /// Open one, with settings in their order. `device`: see [`super::call::refuse_reentry`].
    pub fn open(
        plugin: &Arc<Plugin>,
        name: &Name,
        device: usize,
        settings: &[(String, Vec<u8>)],
        begin: impl FnOnce(&Plugin) -> Handle,
        source: Option<Arc<LayerSource>>,
    ) -> Result<Self> {
        let mut this = Self {
            plugin: plugin.clone(),
            handle: std::ptr::null_mut(),
            name: name.clone(),
            device,
            serial: Serial::new(),
            pid: std::process::id(),
            source,
            place: None,
        };
        let about = About("open", None);
        this.handle = this.call(
            about,
            || begin(plugin),
            |h| match h.is_null() {
                true => Answer::Failed,
                false => Answer::Done,
            },
        )?;
        for (key, value) in settings {
            this.set(key, value)?;
        }
        Ok(this)
    }

    /// Hand over a setting.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let Some(config) = self.plugin.slots.config else {
            return Err(Error::invalid(format!(
                "{}: plugin {} takes no settings; found {}",
                self.name,
                quoted(self.plugin.name.as_bytes()),
                quoted(key.as_bytes())
            )));
        };
        let text = |bytes: &[u8]| {
            CString::new(bytes)
                .map_err(|_| Error::invalid("a plugin's setting has a NUL byte in it"))
        };
        let (c_key, value) = (text(key.as_bytes())?, text(value)?);
        self.done(About("config", None), || {
            // SAFETY: the plugin's function, its handle, and C strings.
            unsafe { config(self.handle, c_key.as_ptr(), value.as_ptr()) }
        })
        .map_err(|e| self.of_setting(e, key))
    }

    fn of_setting(&self, e: Error, key: &str) -> Error {
        match e {
            Error::Plugin { file, what, kind } => Error::Plugin {
                file,
                what: format!("setting {}: {what}", quoted(key.as_bytes())),
                kind,
            },
            e => e,
        }
    }

    /// All settings are there.
    pub fn complete(&self) -> Result<()> {
        match self.plugin.slots.config_complete {
            // SAFETY: the plugin's function and handle.
            Some(f) => self.done(About("config_complete", None), || unsafe { f(self.handle) }),
            None => Ok(()),
        }
    }

    /// Call the plugin: with what is said of a failure gathered, and one at a time where it wants that.
    #[inline(always)]
    fn call<R: Copy>(
        &self,
        about: About,
        f: impl FnOnce() -> R,
        answer: impl FnOnce(R) -> Answer,
    ) -> Result<R> {
        let serial = match self.plugin.model {
            ThreadModel::Parallel => None,
            ThreadModel::Instance => Some(&self.serial),
            ThreadModel::Process => Some(&self.plugin.serial),
        };
        let frame = Frame::new(self.device, serial);
        let inside = frame.enter(serial)?;
        let preserved = self.plugin.slots.errno_is_preserved != 0;
        if preserved {
            // SAFETY: this thread's errno.
            unsafe { *libc::__errno_location() = 0 };
        }
        let result = f();
        match answer(result) {
            Answer::Done => Ok(result),
            bad => {
                let errno = if preserved { last_errno() } else { 0 };
                drop(inside);
                Err(self.failed(&frame, about, bad, errno))
            }
        }
    }

    /// A call that answers 0 or fails.
    #[inline(always)]
    pub fn done(&self, about: About, f: impl FnOnce() -> c_int) -> Result<()> {
        self.call(about, f, |rc| match rc {
            0 => Answer::Done,
            -1 => Answer::Failed,
            ..-1 => Answer::Code(rc),
            1.. => Answer::Garbage(rc.into()),
        })?;
        Ok(())
    }

    /// A call that answers a number, or fails.
    pub fn number(&self, about: About, f: impl FnOnce() -> i64) -> Result<u64> {
        let n = self.call(about, f, |n| match n {
            0.. => Answer::Done,
            -1 => Answer::Failed,
            ..-1 => c_int::try_from(n).map_or(Answer::Garbage(n), Answer::Code),
        })?;
        Ok(n as u64)
    }

    /// A call that gives a pointer, or NULL.
    pub fn pointer<T>(&self, about: About, f: impl FnOnce() -> *const T) -> Result<*const T> {
        self.call(about, f, |_| Answer::Done)
    }

    /// What it says of one of its abilities, if it says anything.
    pub fn can(&self, what: &'static str, slot: Option<super::abi::Ask>) -> Result<Option<Can>> {
        let Some(f) = slot else { return Ok(None) };
        // SAFETY: the plugin's function and handle.
        let n = self.number(About(what, None), || i64::from(unsafe { f(self.handle) }))?;
        match n {
            0 => Ok(Some(Can::Not)),
            1 => Ok(Some(Can::Emulate)),
            2 => Ok(Some(Can::Native)),
            n => Err(self.error(format!(
                "{what} returned {n}, expected 0 (QBLK_CAN_NOT), 1 (QBLK_CAN_EMULATE) or 2 (QBLK_CAN_NATIVE)"
            ))),
        }
    }

    /// An error of the plugin's making that no callback has told of.
    pub fn error(&self, what: String) -> Error {
        self.fail(what, ErrorKind::Errno(libc::EIO))
    }

    fn fail(&self, what: String, kind: ErrorKind) -> Error {
        let what = format!("plugin {}: {what}", quoted(self.plugin.name.as_bytes()));
        Error::Plugin { file: self.name.clone(), what, kind }
    }

    #[cold]
    #[inline(never)]
    fn failed(&self, frame: &Frame, about: About, answer: Answer, errno: c_int) -> Error {
        let About(op, range) = about;
        let mut what = op.to_owned();
        if let Some((offset, count)) = range {
            what.push_str(&format!(" of {count} bytes at offset {offset}"));
        }
        let (inner, inner_text) = frame.inner();
        let code = match answer {
            Answer::Garbage(n) => {
                what.push_str(&format!(" returned {n}, expected 0 or a negative code"));
                return self.error(what);
            }
            Answer::Code(code) => code,
            _ => match (frame.code(), errno, inner) {
                (0, 0, 0) => -libc::EIO,
                (0, 0, inner) => inner,
                (0, errno, _) => errno.checked_neg().unwrap_or(-libc::EIO),
                (code, ..) => code,
            },
        };
        let Some(kind) = ErrorKind::of_code(code) else {
            what.push_str(&format!(" failed with {code}, which is neither -errno nor QBLK_E…"));
            return self.error(what);
        };
        let text = frame.text();
        if !text.is_empty() {
            what.push_str(&format!(": {}", quoted(&text)));
        } else if inner != 0 && inner == code {
            // The library's own words: what is from outside stands in quotes there already.
            what.push_str(&format!(": {}", String::from_utf8_lossy(&inner_text)));
        }
        self.fail(what, kind)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // In a forked child it is the parent's, and so are the locks that it may have.
        let Some(close) = self.plugin.slots.close else { return };
        if self.handle.is_null() || std::process::id() != self.pid {
            return;
        }
        let about = About("close", None);
        // SAFETY: the plugin's function and handle, which nobody uses any more.
        if let Err(e) = self.call(about, || unsafe { close(self.handle) }, |()| Answer::Done) {
            // Only from within a call of it. Then it stays open, and what threads of its own use stays there.
            log(Level::Error, format_args!("closing: {e}"));
            LEFT_OPEN.lock().push((self.plugin.clone(), self.source.clone()));
        }
    }
}

/// What a plugin says of its settings and of itself, without an instance.
pub fn texts(plugin: &Arc<Plugin>, name: &Name) -> Result<(Option<String>, Option<String>)> {
    // An instance that was never opened, and so is not closed.
    let nobody = Instance {
        plugin: plugin.clone(),
        handle: std::ptr::null_mut(),
        name: name.clone(),
        device: 0,
        serial: Serial::new(),
        pid: std::process::id(),
        source: None,
        place: None,
    };
    let help = match plugin.slots.config_help {
        // SAFETY: the plugin's function, with what it registered.
        Some(f) => nobody.pointer(About("config_help", None), || unsafe { f(plugin.opaque()) })?,
        None => std::ptr::null(),
    };
    // SAFETY: NULL or a C string, by contract.
    let help = unsafe { super::load::text(help) };
    let dump = super::driver::dump(&nobody)?;
    Ok((help, dump.map(|text| String::from_utf8_lossy(&text).into_owned())))
}

/// The address of a list, for a callback that hands it back while it is called.
pub fn opaque<T>(list: &mut T) -> *mut c_void {
    std::ptr::from_mut(list).cast()
}
