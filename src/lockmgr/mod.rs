//! Lock managers: shared objects that decide who may have an image, where locks of the file system
//! cannot (include/qblk-lockmgr.h is the contract, docs/lockmgr.md the guide).
//!
//! Promises: a manager that lacks a function, fails or hangs is an error that names it, and never more
//! than that; the resources of a chain are asked for together and in one order; what was got is given
//! back if anything later fails; a lease that was lost, or could not be renewed in time, closes the
//! device's [`Fence`](crate::block::Fence) before anybody else may have the image.
//!
//! A lease has a thread, from which all calls on it come (see `lease`). The program's own threads only
//! ever wait for it, and no longer than they were told to.

mod ffi;
mod lease;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use crate::block::{Error, Name, Result, quoted};
pub use lease::{Change, Lease, Request};

/// A file of a chain, as a manager is told of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Resource {
    /// Absolute, links resolved.
    pub path: CString,
    /// "qcow2", "raw".
    pub format: CString,
    /// Bits of `QBLK_LOCKMGR_...`.
    pub flags: u32,
}

/// It is only read.
pub const READ_ONLY: u32 = 1;
/// It is read whatever others do.
pub const SHARED: u32 = 2;

/// Who wants to have an image.
#[derive(Clone, Debug)]
pub struct Owner {
    /// In words.
    pub name: CString,
    /// Of a virtual machine, say.
    pub uuid: [u8; 16],
}

/// A manager that was loaded.
pub struct Manager {
    handle: *mut c_void,
    name: Name,
    functions: ffi::Functions,
    /// Settings that it was loaded with, for all leases.
    settings: Vec<(String, Vec<u8>)>,
    number: u64,
}

// SAFETY: the handle is given to dlclose once; functions may be called from any thread by contract.
unsafe impl Send for Manager {}
// SAFETY: as above.
unsafe impl Sync for Manager {}

/// The managers that were loaded by themselves, to be named by options.
static LOADED: Mutex<BTreeMap<u64, Weak<Manager>>> = Mutex::new(BTreeMap::new());

impl Manager {
    /// Load the shared object `path`, with settings for all leases.
    pub fn load(path: &[u8], settings: Vec<(String, Vec<u8>)>) -> Result<Arc<Self>> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let name = Name::from(std::ffi::OsStr::from_bytes(path).to_owned());
        let failed = |what: String, errno| Error::Manager { name: name.clone(), what, errno };
        let Ok(c_path) = CString::new(path) else {
            return Err(Error::invalid("the lock manager's name has a NUL byte in it"));
        };
        if path.is_empty() {
            return Err(Error::invalid("the lock manager's name is empty"));
        }
        let _ = dl_error();
        // SAFETY: a C string. What the object's constructor does is the program's choice.
        let handle = unsafe { libc::dlopen(c_path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            let missing = path.contains(&b'/') && !name.as_path().exists();
            let errno = if missing { libc::ENOENT } else { libc::ELIBACC };
            return Err(failed(format!("loading it: {}", quoted(&dl_error())), errno));
        }
        // SAFETY: a good handle; the functions are of the types that the contract says.
        match unsafe { ffi::Functions::find(handle) } {
            Ok(functions) => {
                let number = NUMBER.fetch_add(1, Relaxed);
                let manager = Arc::new(Self { handle, name, functions, settings, number });
                LOADED.lock().insert(number, Arc::downgrade(&manager));
                Ok(manager)
            }
            Err(missing) => {
                // SAFETY: nothing of it is in use.
                unsafe { libc::dlclose(handle) };
                let what = format!("is no lock manager: it lacks the function {missing}");
                Err(failed(what, libc::ELIBBAD))
            }
        }
    }

    /// The value of the option `lock-manager` that stands for this one while it is loaded.
    pub fn option(&self) -> String {
        format!("loaded:{}", self.number)
    }

    /// The manager that a value of the option `lock-manager` names.
    pub fn named(value: &[u8]) -> Result<Arc<Self>> {
        if let Some(number) = value.strip_prefix(b"loaded:") {
            let number = std::str::from_utf8(number).ok().and_then(|n| n.parse().ok());
            let found = number.and_then(|n: u64| LOADED.lock().get(&n).and_then(Weak::upgrade));
            return found.ok_or_else(|| {
                let text = "option 'lock-manager': the manager that was set has been freed";
                Error::invalid(text)
            });
        }
        Self::load(value, Vec::new())
    }

    /// Settings that it was loaded with.
    pub fn settings(&self) -> &[(String, Vec<u8>)] {
        &self.settings
    }

    fn error(&self, what: impl Into<String>, errno: i32) -> Error {
        Error::Manager { name: self.name.clone(), what: what.into(), errno }
    }

    /// Whether the manager can change what a lease is for while it is held.
    fn can_change(&self) -> bool {
        self.functions.add.is_some() && self.functions.remove.is_some()
    }

    /// What the code of a failed call means.
    fn refused(&self, image: &Name, what: &str, code: c_int, text: &[u8]) -> Error {
        let why = if text.is_empty() { String::new() } else { format!(": {}", quoted(text)) };
        match code {
            libc::EBUSY | libc::EAGAIN | libc::ETIMEDOUT | libc::ESTALE => Error::Locked {
                file: image.clone(),
                what: match why.as_str() {
                    "" => format!("the lock manager {} says that somebody else has it", self.name),
                    why => format!("the lock manager {} says{why}", self.name),
                },
            },
            // A success of a call that has not given anything, or a number that is no errno.
            code => self.error(format!("{what}{why}"), if code > 0 { code } else { libc::EPROTO }),
        }
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        LOADED.lock().remove(&self.number);
        // SAFETY: nobody has it any more: leases, and calls that hang, keep the manager.
        unsafe { libc::dlclose(self.handle) };
    }
}

fn dl_error() -> Vec<u8> {
    // SAFETY: NULL, or a string that is good until this thread's next call of this sort.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() { Vec::new() } else { CStr::from_ptr(text).to_bytes().to_vec() }
    }
}

/// Seconds that a manager may take to answer, beyond those that it was told to wait.
pub const PATIENCE: Duration = Duration::from_secs(10);
