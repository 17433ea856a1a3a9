//! Plugins that are there: shared objects, loaded once each, and structs that the program registered.
//!
//! An object that has proved to be a plugin stays loaded to the end of the process (`RTLD_NODELETE`):
//! whoever calls `dlclose` too often, or has threads of the plugin's own running, takes nothing away. Its
//! ELF constructors and destructors are its beginning and end.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::abi::{self, Struct};
use super::call::Serial;
use crate::block::{Error, Name, Result, quoted};

/// How many calls a plugin takes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadModel {
    /// One in the process.
    Process,
    /// One on each instance.
    Instance,
    /// Any number.
    Parallel,
}

impl ThreadModel {
    /// A number between two that are known counts as the lower: the stricter.
    fn of(number: i32) -> std::result::Result<Self, String> {
        match number {
            ..0 => Err(format!("thread_model is {number}, expected 0, 100 or 200")),
            0..100 => Ok(Self::Process),
            100..200 => Ok(Self::Instance),
            200.. => Ok(Self::Parallel),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Instance => "instance",
            Self::Parallel => "parallel",
        }
    }
}

/// A plugin that is there.
pub struct Plugin {
    /// Its slots.
    pub slots: Struct,
    /// What `open` is given.
    opaque: *mut c_void,
    /// What it calls itself.
    pub name: String,
    /// The version that it tells of itself.
    pub version: Option<String>,
    /// What it says that it is.
    pub description: Option<String>,
    /// How many calls it takes at a time.
    pub model: ThreadModel,
    /// Held during calls where the model is [`ThreadModel::Process`].
    pub serial: Serial,
    /// Tells it, and that lock, from all others.
    pub id: u64,
    /// Its functions were found by their names; it has no struct.
    pub flat: bool,
    /// The bytes of its struct, by its own word.
    pub struct_size: u64,
    /// The object that it is in, unless it was registered.
    pub file: Option<Name>,
}

// SAFETY: what it points to is the plugin's, which says by its thread model how it may be called; its
// texts have been copied.
unsafe impl Send for Plugin {}
// SAFETY: as above.
unsafe impl Sync for Plugin {}

/// Registered by the program, by name.
static REGISTERED: Mutex<BTreeMap<Vec<u8>, Arc<Plugin>>> = Mutex::new(BTreeMap::new());
/// Loaded, by handle.
static LOADED: Mutex<BTreeMap<usize, Arc<Plugin>>> = Mutex::new(BTreeMap::new());

fn refused(name: &Name, what: impl Into<String>, errno: i32) -> Error {
    Error::Refused { file: name.clone(), what: what.into(), errno }
}

/// Whether a name is that of a plugin that was registered.
pub fn is_registered(name: &[u8]) -> bool {
    REGISTERED.lock().contains_key(name)
}

/// The plugin that a name stands for: a registered one, or a file.
pub fn find(which: &[u8], path: &Path) -> Result<Arc<Plugin>> {
    if let Some(plugin) = REGISTERED.lock().get(which) {
        return Ok(plugin.clone());
    }
    load(path)
}

/// Register a struct of the program's own.
///
/// # Safety
/// As [`Struct::read`]; its functions can be called until it is unregistered.
pub unsafe fn register(theirs: *const Struct, opaque: *mut c_void) -> Result<()> {
    // SAFETY: the caller's word.
    let read = unsafe { Struct::read(theirs) };
    let plugin = read.and_then(|slots| Plugin::new(slots, opaque, None, false));
    let plugin =
        plugin.map_err(|why| Error::invalid(format!("cannot register the plugin: {why}")))?;
    let name = plugin.name.clone().into_bytes();
    if name.iter().any(|b| b"/?%".contains(b)) {
        let text = "the name of a plugin that is registered has none of / ? %";
        return Err(Error::invalid(format!("{}: {text}", quoted(&name))));
    }
    let mut all = REGISTERED.lock();
    if all.contains_key(&name) {
        let what = "a plugin of this name is registered already";
        return Err(refused(&plugin.name.into(), what, libc::EEXIST));
    }
    all.insert(name, Arc::new(plugin));
    at_exit();
    Ok(())
}

/// Forget a plugin that was registered, unless it is in use.
pub fn unregister(name: &[u8]) -> Result<()> {
    let mut all = REGISTERED.lock();
    let shown = || Name::from(OsStr::from_bytes(name).to_owned());
    match all.get(name) {
        None => Err(refused(&shown(), "no plugin of this name is registered", libc::ENOENT)),
        // New ones are handed out under the lock that is held.
        Some(plugin) if Arc::strong_count(plugin) > 1 => {
            Err(refused(&shown(), "devices on this plugin are open", libc::EBUSY))
        }
        Some(_) => {
            all.remove(name);
            Ok(())
        }
    }
}

/// Load a shared object, or find it loaded.
fn load(path: &Path) -> Result<Arc<Plugin>> {
    let name = Name::from(path.to_owned());
    let meta = std::fs::metadata(path).map_err(|e| Error::Os {
        op: "loading a plugin",
        file: name.clone(),
        errno: e.raw_os_error().unwrap_or(libc::EINVAL),
    })?;
    if !meta.is_file() {
        // dlopen would wait at a FIFO.
        if meta.is_dir() {
            return Err(Error::Os { op: "loading a plugin", file: name, errno: libc::EISDIR });
        }
        let what = "loading a plugin: neither a regular file nor a plugin that was registered";
        return Err(refused(&name, what, libc::EACCES));
    }
    let c_path = CString::new(path.as_os_str().as_bytes());
    let c_path = c_path.map_err(|_| Error::invalid("the plugin's name has a NUL byte in it"))?;
    // Not under the lock: the object's constructors may do what they like, even register a plugin.
    let object = Object::open(&c_path, &name)?;
    let key = object.0 as usize;
    if let Some(plugin) = LOADED.lock().get(&key) {
        return Ok(plugin.clone());
    }
    let not_one = |why: String| refused(&name, format!("is no plugin: {why}"), libc::ELIBBAD);
    object.same_library().map_err(|why| refused(&name, why, libc::ELIBBAD))?;
    let (slots, flat) = object.slots().map_err(not_one)?;
    let plugin =
        Plugin::new(slots, std::ptr::null_mut(), Some(name.clone()), flat).map_err(not_one)?;
    // From now on it stays. (Of two threads that load it at once one is later here, and that is all.)
    // SAFETY: a C string.
    let kept = unsafe {
        let flags = libc::RTLD_NOW | libc::RTLD_LOCAL | libc::RTLD_NOLOAD | libc::RTLD_NODELETE;
        libc::dlopen(c_path.as_ptr(), flags)
    };
    if kept.is_null() {
        let what = format!("keeping it loaded: {}", quoted(&dl_error()));
        return Err(refused(&name, what, libc::ELIBACC));
    }
    at_exit();
    let mut all = LOADED.lock();
    let plugin = all.entry(kept as usize).or_insert_with(|| Arc::new(plugin));
    std::mem::forget(object);
    Ok(plugin.clone())
}

/// What the library's border to C tells of itself.
struct Host {
    /// Where its `qblk_plugin_set_error_text` is.
    symbol: usize,
    /// What is to be done when the process ends, before anything of any plugin is taken down.
    at_exit: extern "C" fn(*mut c_void),
}

static HOST: OnceLock<Host> = OnceLock::new();

/// Tell where this library's own `qblk_plugin_set_error_text` is, and what to call when the process
/// ends, before the destructors of plugins.
pub fn set_host(symbol: *const c_void, at_exit: extern "C" fn(*mut c_void)) {
    let _ = HOST.set(Host { symbol: symbol as usize, at_exit });
}

/// Have the end of the process begin with what stands on plugins: before what has been taken note of
/// until now is taken down.
fn at_exit() {
    unsafe extern "C" {
        fn __cxa_atexit(f: extern "C" fn(*mut c_void), arg: *mut c_void, dso: *mut c_void)
        -> c_int;
    }
    if let Some(host) = HOST.get() {
        // SAFETY: a function that stays, for the library is never unloaded. Handlers run in the reverse
        // order of their making, so this one before those that the plugin's constructors have made; if
        // there is no memory for it the library's own destructor does the work, later.
        unsafe { __cxa_atexit(host.at_exit, std::ptr::null_mut(), std::ptr::null_mut()) };
    }
}

/// A shared object, given back when it is dropped.
struct Object(*mut c_void);

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: a handle that dlopen gave, given back once.
        unsafe { libc::dlclose(self.0) };
    }
}

impl Object {
    fn open(path: &CStr, name: &Name) -> Result<Self> {
        let _ = dl_error();
        // SAFETY: a C string. What the object's constructor does is the program's choice.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if !handle.is_null() {
            return Ok(Self(handle));
        }
        let text = dl_error();
        let says = |words: &str| text.windows(words.len()).any(|w| w == words.as_bytes());
        let hint = match () {
            _ if says("undefined symbol") => {
                " (a plugin that calls libqblk is linked with it, -lqblk; a program that has libqblk \
                     built in exports it to plugins with -rdynamic)"
            }
            _ if says("file too short") || says("invalid ELF header") => {
                " (expected a shared object, as cc -shared -fPIC makes it)"
            }
            _ => "",
        };
        Err(refused(name, format!("loading the plugin: {}{hint}", quoted(&text)), libc::ELIBACC))
    }

    /// A function of the object's own: not of what it depends on.
    fn own(&self, symbol: &CStr) -> Option<*mut c_void> {
        let (mut ours, mut theirs) = (std::ptr::null_mut::<c_void>(), std::ptr::null_mut());
        // SAFETY: zeroes are valid in it.
        let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
        // SAFETY: the handle is good; the places are for what the calls give: a link map each.
        unsafe {
            let found = libc::dlsym(self.0, symbol.as_ptr());
            if found.is_null()
                || libc::dlinfo(self.0, libc::RTLD_DI_LINKMAP, (&raw mut ours).cast()) != 0
                || libc::dladdr1(found, &mut info, &mut theirs, RTLD_DL_LINKMAP) == 0
                || ours != theirs
            {
                return None;
            }
            Some(found)
        }
    }

    /// Refuse an object that would call another copy of this library: handles and errors of one mean
    /// nothing to the other.
    fn same_library(&self) -> std::result::Result<(), String> {
        let symbol = c"qblk_plugin_set_error_text";
        // SAFETY: the handle is good. What is global is found first, as when the object was bound.
        let theirs = unsafe {
            let _ = dl_error();
            let global = libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr());
            if global.is_null() { libc::dlsym(self.0, symbol.as_ptr()) } else { global }
        };
        let Some(host) = HOST.get() else { return Ok(()) };
        match theirs.is_null() || theirs as usize == host.symbol {
            true => Ok(()),
            false => Err(
                "it brings a libqblk of its own beside that of the program, which has it built \
                          in; link the program with -rdynamic, or with the shared library"
                    .into(),
            ),
        }
    }

    /// The struct that the object hands over, or its functions by their names.
    fn slots(&self) -> std::result::Result<(Struct, bool), String> {
        if let Some(init) = self.own(c"qblk_plugin_init") {
            type Init = unsafe extern "C" fn() -> *const Struct;
            // SAFETY: a function of this type, by contract.
            let slots = unsafe { Struct::read(std::mem::transmute::<*mut c_void, Init>(init)()) }?;
            return Ok((slots, false));
        }
        let mut s = Struct {
            struct_size: size_of::<Struct>() as u64,
            api_version: abi::NEWEST,
            ..Struct::NONE
        };
        macro_rules! find {
            ($($slot:ident: $type:ty = $symbol:literal),* $(,)?) => {
                $(
                    // SAFETY: a function of this type, by contract.
                    s.$slot = self.own($symbol).map(|f| unsafe { std::mem::transmute::<*mut c_void, $type>(f) });
                )*
            };
        }
        find! {
            open: abi::Open = c"qblk_plugin_open",
            open_layer: abi::OpenLayer = c"qblk_plugin_open_layer",
            config: abi::Config = c"qblk_plugin_config",
            config_complete: abi::Ask = c"qblk_plugin_config_complete",
            config_help: abi::Help = c"qblk_plugin_config_help",
            dump: abi::Dump = c"qblk_plugin_dump",
            close: abi::Close = c"qblk_plugin_close",
            get_size: abi::Size = c"qblk_plugin_get_size",
            can_write: abi::Ask = c"qblk_plugin_can_write",
            can_flush: abi::Ask = c"qblk_plugin_can_flush",
            can_trim: abi::Ask = c"qblk_plugin_can_trim",
            can_zero: abi::Ask = c"qblk_plugin_can_zero",
            is_rotational: abi::Ask = c"qblk_plugin_is_rotational",
            pread_v1: abi::Read1 = c"qblk_plugin_pread",
            pwrite_v1: abi::Write1 = c"qblk_plugin_pwrite",
            flush_v1: abi::Ask = c"qblk_plugin_flush",
            trim_v1: abi::Trim1 = c"qblk_plugin_trim",
            zero_v1: abi::Zero1 = c"qblk_plugin_zero",
            can_fua: abi::Ask = c"qblk_plugin_can_fua",
            can_fast_zero: abi::Ask = c"qblk_plugin_can_fast_zero",
            can_cache: abi::Ask = c"qblk_plugin_can_cache",
            can_extents: abi::Ask = c"qblk_plugin_can_extents",
            can_multi_conn: abi::Ask = c"qblk_plugin_can_multi_conn",
            block_size: abi::Block = c"qblk_plugin_block_size",
            pread: abi::Read2 = c"qblk_plugin_pread2",
            pwrite: abi::Write2 = c"qblk_plugin_pwrite2",
            flush: abi::Flush2 = c"qblk_plugin_flush2",
            trim: abi::Range2 = c"qblk_plugin_trim2",
            zero: abi::Range2 = c"qblk_plugin_zero2",
            cache: abi::Range2 = c"qblk_plugin_cache",
            extents: abi::Extents = c"qblk_plugin_extents",
            list_exports: abi::Exports = c"qblk_plugin_list_exports",
            default_export: abi::Default = c"qblk_plugin_default_export",
        }
        if s.filled().is_empty() {
            return Err("it has neither qblk_plugin_init (QBLK_PLUGIN_REGISTER makes it) nor \
                        qblk_plugin_open and the other functions"
                .into());
        }
        type Number = unsafe extern "C" fn() -> c_int;
        type Words = unsafe extern "C" fn() -> *const c_char;
        let number = |symbol| {
            // SAFETY: a function of this type, by contract.
            self.own(symbol).map(|f| unsafe { std::mem::transmute::<*mut c_void, Number>(f)() })
        };
        let words = |symbol| {
            // SAFETY: as above.
            let f =
                self.own(symbol).map(|f| unsafe { std::mem::transmute::<*mut c_void, Words>(f)() });
            f.unwrap_or(std::ptr::null())
        };
        s.thread_model = number(c"qblk_plugin_thread_model").unwrap_or(0);
        s.errno_is_preserved = number(c"qblk_plugin_errno_is_preserved").unwrap_or(0);
        type Bits = unsafe extern "C" fn() -> u64;
        // SAFETY: as above.
        let bits = |f| unsafe { std::mem::transmute::<*mut c_void, Bits>(f)() };
        s.passes = self.own(c"qblk_plugin_passes").map_or(0, bits);
        s.name = words(c"qblk_plugin_name");
        s.version = words(c"qblk_plugin_version");
        s.description = words(c"qblk_plugin_description");
        Ok((s, true))
    }
}

/// `dladdr1` gives the link map.
const RTLD_DL_LINKMAP: c_int = 2;

fn dl_error() -> Vec<u8> {
    // SAFETY: NULL, or a string that is good until this thread's next call of this sort.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() { Vec::new() } else { CStr::from_ptr(text).to_bytes().to_vec() }
    }
}

/// A text of a plugin's, cut to what anybody wants to read.
///
/// # Safety
/// NULL or a C string.
pub unsafe fn text(text: *const c_char) -> Option<String> {
    const LONGEST: usize = 64 << 10;
    if text.is_null() {
        return None;
    }
    // SAFETY: a string, by contract, of which no byte behind the NUL is read.
    let bytes = unsafe {
        let len = libc::strnlen(text, LONGEST);
        std::slice::from_raw_parts(text.cast::<u8>(), len)
    };
    Some(String::from_utf8_lossy(bytes).into_owned())
}

impl Plugin {
    fn new(
        slots: Struct,
        opaque: *mut c_void,
        file: Option<Name>,
        flat: bool,
    ) -> std::result::Result<Self, String> {
        if let Some(missing) = slots.missing() {
            return Err(format!("it lacks {missing}, which every plugin has"));
        }
        // SAFETY: NULL or C strings, by contract.
        let (name, version, description) =
            unsafe { (text(slots.name), text(slots.version), text(slots.description)) };
        // What is found by its functions need not have one.
        let of_file = || {
            let stem = file.as_ref().filter(|_| flat)?.as_path().file_stem()?.to_owned();
            String::from_utf8(stem.into_vec()).ok()
        };
        let name = name.filter(|n| !n.is_empty()).or_else(of_file);
        let Some(name) = name.filter(|n| n.len() <= 256) else {
            return Err("it has no name, or one of more than 256 bytes".into());
        };
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            slots,
            opaque,
            name,
            version,
            description,
            model: ThreadModel::of(slots.thread_model)?,
            serial: Serial::new(),
            id: NEXT.fetch_add(1, Relaxed),
            flat,
            struct_size: slots.struct_size,
            file,
        })
    }

    /// What `open` and `config_help` are given.
    pub fn opaque(&self) -> *mut c_void {
        self.opaque
    }
}
