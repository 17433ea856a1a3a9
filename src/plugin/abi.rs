//! The struct that a plugin fills, as include/qblk-plugin.h has it, and what it may be.
//!
//! The rule by which it grows: a new slot is appended, and a slot never changes its place, its type or
//! its meaning. What a plugin hands over is copied into a zeroed struct of our own, as far as both
//! reach: what an older plugin does not have is NULL, what a newer one has beyond ours is not seen.

use std::ffi::{c_char, c_int, c_void};
use std::mem::{offset_of, size_of};

/// A plugin's handle on one of its instances.
pub type Handle = *mut c_void;
pub type Open = unsafe extern "C" fn(*mut c_void, u32) -> Handle;
pub type OpenLayer = unsafe extern "C" fn(*mut c_void, *mut c_void, u32) -> Handle;
pub type Config = unsafe extern "C" fn(Handle, *const c_char, *const c_char) -> c_int;
pub type Ask = unsafe extern "C" fn(Handle) -> c_int;
pub type Help = unsafe extern "C" fn(*mut c_void) -> *const c_char;
pub type Dump = unsafe extern "C" fn(Handle, *mut c_char, usize) -> i64;
pub type Close = unsafe extern "C" fn(Handle);
pub type Size = unsafe extern "C" fn(Handle) -> i64;
pub type Read1 = unsafe extern "C" fn(Handle, *mut c_void, u32, u64) -> c_int;
pub type Write1 = unsafe extern "C" fn(Handle, *const c_void, u32, u64) -> c_int;
pub type Trim1 = unsafe extern "C" fn(Handle, u32, u64) -> c_int;
pub type Zero1 = unsafe extern "C" fn(Handle, u32, u64, c_int) -> c_int;
pub type Read2 = unsafe extern "C" fn(Handle, *mut c_void, u64, u64, u32) -> c_int;
pub type Write2 = unsafe extern "C" fn(Handle, *const c_void, u64, u64, u32) -> c_int;
pub type Range2 = unsafe extern "C" fn(Handle, u64, u64, u32) -> c_int;
pub type Flush2 = unsafe extern "C" fn(Handle, u32) -> c_int;
pub type Extents = unsafe extern "C" fn(Handle, u64, u64, u32, *mut c_void) -> c_int;
pub type Block = unsafe extern "C" fn(Handle, *mut u32, *mut u32, *mut u64) -> c_int;
pub type Exports = unsafe extern "C" fn(Handle, *mut c_void) -> c_int;
pub type Default = unsafe extern "C" fn(Handle) -> *const c_char;

macro_rules! slots {
    ($($(#[$doc:meta])* $name:ident: $type:ty),* $(,)?) => {
        /// `qblk_plugin`.
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct Struct {
            pub struct_size: u64,
            pub api_version: i32,
            pub thread_model: i32,
            pub errno_is_preserved: i32,
            pub reserved: i32,
            pub passes: u64,
            pub name: *const c_char,
            pub version: *const c_char,
            pub description: *const c_char,
            $($(#[$doc])* pub $name: Option<$type>),*
        }

        impl Struct {
            /// One that says nothing.
            pub const NONE: Self = Self {
                struct_size: 0,
                api_version: 0,
                thread_model: 0,
                errno_is_preserved: 0,
                reserved: 0,
                passes: 0,
                name: std::ptr::null(),
                version: std::ptr::null(),
                description: std::ptr::null(),
                $($name: None),*
            };

            /// The slots that are filled, by the names that the header has for them.
            pub fn filled(&self) -> Vec<&'static str> {
                let mut names = Vec::new();
                $(if self.$name.is_some() {
                    names.push(stringify!($name));
                })*
                names
            }
        }
    };
}

slots! {
    open: Open,
    open_layer: OpenLayer,
    config: Config,
    config_complete: Ask,
    config_help: Help,
    dump: Dump,
    close: Close,
    get_size: Size,
    can_write: Ask,
    can_flush: Ask,
    can_trim: Ask,
    can_zero: Ask,
    is_rotational: Ask,
    pread_v1: Read1,
    pwrite_v1: Write1,
    flush_v1: Ask,
    trim_v1: Trim1,
    zero_v1: Zero1,
    // Version 2.
    can_fua: Ask,
    can_fast_zero: Ask,
    can_cache: Ask,
    can_extents: Ask,
    can_multi_conn: Ask,
    block_size: Block,
    pread: Read2,
    pwrite: Write2,
    flush: Flush2,
    trim: Range2,
    zero: Range2,
    cache: Range2,
    extents: Extents,
    list_exports: Exports,
    default_export: Default,
}

/// The newest version of the ABI.
pub const NEWEST: i32 = 2;
/// Bytes that every plugin's struct has: those of version 1.
pub const LEAST: usize = offset_of!(Struct, can_fua);
/// Bytes that none's has.
pub const MOST: u64 = 64 << 10;

// For ever, as the header asserts for whoever compiles it.
const _: () = {
    let word = size_of::<*const c_char>();
    assert!(offset_of!(Struct, api_version) == 8 && offset_of!(Struct, thread_model) == 12);
    assert!(offset_of!(Struct, errno_is_preserved) == 16 && offset_of!(Struct, passes) == 24);
    assert!(offset_of!(Struct, name) == 32 && offset_of!(Struct, open) == 32 + 3 * word);
    assert!(offset_of!(Struct, get_size) == 32 + 10 * word);
    assert!(offset_of!(Struct, pread_v1) == 32 + 16 * word);
    assert!(offset_of!(Struct, can_fua) == 32 + 21 * word);
    assert!(offset_of!(Struct, pread) == 32 + 27 * word);
    assert!(offset_of!(Struct, default_export) == 32 + 35 * word);
    assert!(size_of::<Struct>() == 32 + 36 * word);
};

impl Struct {
    /// Copy what a plugin has handed over, if it is one that can be understood; what is wrong with it
    /// otherwise.
    ///
    /// # Safety
    /// `theirs` is NULL, or a struct of as many bytes as its first field says.
    pub unsafe fn read(theirs: *const Struct) -> Result<Self, String> {
        if theirs.is_null() {
            return Err("it hands over NULL instead of a struct qblk_plugin".into());
        }
        // SAFETY: every version begins with these two, by contract.
        let (size, version) = unsafe {
            (
                (&raw const (*theirs).struct_size).read_unaligned(),
                (&raw const (*theirs).api_version).read_unaligned(),
            )
        };
        if size == 0 && version == 0 {
            let text = "its struct qblk_plugin says neither a size nor a version (QBLK_PLUGIN_REGISTER \
                        and QBLK_REGISTER_PLUGIN set them)";
            return Err(text.into());
        }
        if !(1..=NEWEST).contains(&version) {
            return Err(format!(
                "it was built for version {version} of the plugin ABI; this libqblk knows 1 to {NEWEST}"
            ));
        }
        if size < LEAST as u64 || size > MOST {
            return Err(format!(
                "its struct qblk_plugin has {size} bytes by its own word; expected {LEAST} (version 1) \
                 to {MOST}"
            ));
        }
        // A slot that is there in part would be a pointer to anywhere.
        if !size.is_multiple_of(size_of::<usize>() as u64) {
            return Err(format!(
                "its struct qblk_plugin has {size} bytes by its own word; expected a multiple of {}, the \
                 bytes of a pointer",
                size_of::<usize>()
            ));
        }
        let mut ours = Self::NONE;
        let common = size_of::<Self>().min(size as usize);
        // SAFETY: as many bytes as both have; any bits are a number, a pointer or an Option of a
        // function.
        unsafe {
            std::ptr::copy_nonoverlapping(
                theirs.cast::<u8>(),
                (&raw mut ours).cast::<u8>(),
                common,
            );
        }
        if version == 1 {
            // It does not know of them; what is there is not meant.
            ours.forget_version_2();
        }
        Ok(ours)
    }

    fn forget_version_2(&mut self) {
        let mut bare = Self::NONE;
        // SAFETY: the bytes of version 1, of one of our own structs into another.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (&raw const *self).cast::<u8>(),
                (&raw mut bare).cast::<u8>(),
                LEAST,
            );
        }
        *self = bare;
    }

    /// What every plugin must have, and this one lacks.
    pub fn missing(&self) -> Option<&'static str> {
        match () {
            _ if self.open.is_none() && self.open_layer.is_none() => {
                Some("the function open (or open_layer)")
            }
            _ if self.open_layer.is_some()
                && self.pread.is_none()
                && self.pread_v1.is_none()
                && self.passes & super::layer::method::READ == 0 =>
            {
                Some("the function pread (or QBLK_METHOD_READ in passes)")
            }
            _ if self.open.is_some() && self.get_size.is_none() => Some("the function get_size"),
            _ if self.open.is_some() && self.pread.is_none() && self.pread_v1.is_none() => {
                Some("the function pread")
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(s: &Struct) -> Result<Struct, String> {
        // SAFETY: a struct of our own, which has at least the bytes that the test says or is refused.
        unsafe { Struct::read(s) }
    }

    unsafe extern "C" fn yes(_: Handle) -> c_int {
        1
    }

    #[test]
    fn sizes_and_versions_that_make_no_sense_are_refused_with_both_numbers() {
        let sized = |struct_size, api_version| Struct { struct_size, api_version, ..Struct::NONE };
        for (size, version, text) in [
            (0, 0, "neither a size nor a version"),
            (size_of::<Struct>() as u64, 0, "version 0"),
            (size_of::<Struct>() as u64, 3, "version 3"),
            (1 << 40, -1, "version -1"),
            (LEAST as u64 - 1, 1, "199 bytes"),
            (MOST + 1, 2, "65537 bytes"),
            (LEAST as u64 + 4, 2, "multiple of 8"),
            (size_of::<Struct>() as u64 + 1, 2, "multiple of 8"),
        ] {
            let e = read(&sized(size, version)).err().unwrap();
            assert!(e.contains(text), "{e}");
        }
        // SAFETY: NULL is looked for.
        assert!(unsafe { Struct::read(std::ptr::null()) }.is_err());
    }

    #[test]
    fn what_lies_beyond_either_struct_is_not_seen() {
        let full = Struct {
            struct_size: size_of::<Struct>() as u64,
            api_version: 2,
            is_rotational: Some(yes),
            can_fua: Some(yes),
            can_cache: Some(yes),
            ..Struct::NONE
        };
        assert_eq!(read(&full).unwrap().filled(), ["is_rotational", "can_fua", "can_cache"]);
        let one_slot = Struct { struct_size: LEAST as u64 + 8, ..full };
        assert_eq!(read(&one_slot).unwrap().filled(), ["is_rotational", "can_fua"]);
        let old = Struct { api_version: 1, ..full };
        assert_eq!(read(&old).unwrap().filled(), ["is_rotational"]);
        let mut longer = vec![0xffu8; 4096];
        // SAFETY: the bytes of a struct of our own, into memory that is longer.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (&raw const full).cast(),
                longer.as_mut_ptr(),
                size_of::<Struct>(),
            );
        }
        longer[..8].copy_from_slice(&4096u64.to_ne_bytes());
        // SAFETY: 4096 bytes, as they say.
        let seen = unsafe { Struct::read(longer.as_ptr().cast()) }.unwrap();
        assert_eq!(seen.filled(), full.filled());
    }
}
