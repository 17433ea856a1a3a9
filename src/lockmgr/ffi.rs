//! The functions and structs of include/qblk-lockmgr.h.

use std::ffi::{CString, c_char, c_int, c_void};
use std::mem::{offset_of, transmute};

use super::{Owner, Resource};

/// `qblk_lockmgr_resource`.
#[repr(C)]
pub struct CResource {
    path: *const c_char,
    format: *const c_char,
    uuid: [u8; 16],
    flags: u32,
    reserved: [u8; 44 - 2 * size_of::<usize>()],
}

/// `qblk_lockmgr_owner`.
#[repr(C)]
pub struct COwner {
    id: u64,
    name: *const c_char,
    uuid: [u8; 16],
    pid: i32,
    reserved: [u8; 36 - size_of::<usize>()],
}

const _: () = {
    assert!(size_of::<CResource>() == 64 && size_of::<COwner>() == 64);
    assert!(offset_of!(CResource, uuid) == 2 * size_of::<usize>());
    assert!(offset_of!(CResource, flags) == 2 * size_of::<usize>() + 16);
    assert!(offset_of!(COwner, uuid) == 8 + size_of::<usize>());
};

impl Resource {
    /// For C, as long as `self` lives.
    pub fn as_c(&self) -> CResource {
        CResource {
            path: self.path.as_ptr(),
            format: self.format.as_ptr(),
            uuid: [0; 16],
            flags: self.flags,
            reserved: [0; _],
        }
    }
}

impl Owner {
    /// For C, as long as `self` lives.
    pub fn as_c(&self, id: u64) -> COwner {
        let (name, pid) = (self.name.as_ptr(), std::process::id() as i32);
        COwner { id, name, uuid: self.uuid, pid, reserved: [0; _] }
    }
}

/// `KEY=VALUE` strings with a NULL behind them, as long as `strings` live.
pub fn list(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
}

pub type Strings = *const *const c_char;
pub type Acquire = unsafe extern "C" fn(
    *const COwner,
    *const CResource,
    usize,
    Strings,
    *mut *mut c_void,
) -> c_int;
pub type Acquire2 = unsafe extern "C" fn(
    *const COwner,
    *const CResource,
    usize,
    Strings,
    u32,
    *mut c_char,
    usize,
    *mut *mut c_void,
) -> c_int;
pub type Adopt = unsafe extern "C" fn(
    *const COwner,
    *const CResource,
    usize,
    Strings,
    *const c_char,
    u32,
    *mut c_char,
    usize,
    *mut *mut c_void,
) -> c_int;
pub type Release = unsafe extern "C" fn(*mut c_void) -> c_int;
pub type Renew = unsafe extern "C" fn(*mut c_void, *mut u32, *mut u32) -> c_int;
pub type Change = unsafe extern "C" fn(*mut c_void, *const CResource) -> c_int;
pub type Inquire = unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int;

/// What a manager has.
pub struct Functions {
    pub acquire: Acquire,
    pub acquire2: Option<Acquire2>,
    pub release: Release,
    pub renew: Option<Renew>,
    pub add: Option<Change>,
    pub remove: Option<Change>,
    pub inquire: Option<Inquire>,
    pub adopt: Option<Adopt>,
}

impl Functions {
    /// Find them; the name of one that must be there and is not.
    ///
    /// # Safety
    /// `handle` is of a loaded object, whose functions of these names are of these types.
    pub unsafe fn find(handle: *mut c_void) -> Result<Self, &'static str> {
        let find = |name: &std::ffi::CStr| {
            // SAFETY: the handle is good, by contract.
            let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
            (!found.is_null()).then_some(found)
        };
        let acquire = find(c"qblk_lockmgr_acquire").ok_or("qblk_lockmgr_acquire")?;
        let release = find(c"qblk_lockmgr_release").ok_or("qblk_lockmgr_release")?;
        // SAFETY: pointers to functions of these types, by contract.
        unsafe {
            Ok(Self {
                acquire: transmute::<*mut c_void, Acquire>(acquire),
                release: transmute::<*mut c_void, Release>(release),
                acquire2: find(c"qblk_lockmgr_acquire2").map(|f| transmute::<_, Acquire2>(f)),
                renew: find(c"qblk_lockmgr_renew").map(|f| transmute::<_, Renew>(f)),
                add: find(c"qblk_lockmgr_add").map(|f| transmute::<_, Change>(f)),
                remove: find(c"qblk_lockmgr_remove").map(|f| transmute::<_, Change>(f)),
                inquire: find(c"qblk_lockmgr_inquire").map(|f| transmute::<_, Inquire>(f)),
                adopt: find(c"qblk_lockmgr_adopt").map(|f| transmute::<_, Adopt>(f)),
            })
        }
    }
}
