//! Plugins: devices written in C, by include/qblk-plugin.h.
//!
//! Promises: a plugin that lacks a function, was built for another version, answers nonsense or fails
//! is an error that names it, and never more than that; what it can do by itself is used, and what it
//! cannot is emulated by [`block::Device`](crate::block::Device), nowhere else; it is called by no more threads at a
//! time than it says; a thread that is inside of it is never made to wait for itself. What is not promised
//! is that code which breaks the process's memory does not.
//!
//! A plugin may be a layer, too (`layer`).
//!
//! Relies on `block`, and for layers on what `layer` calls a source.

mod abi;
mod call;
mod driver;
mod instance;
mod layer;
mod list;
mod load;
mod name;
mod order;

use std::ffi::{OsStr, c_void};
use std::os::unix::ffi::OsStrExt;

use crate::block::{Driver, Error, Name, Result};
pub(crate) use call::{is_inside, note_inner, refuse_reentry, set_error, set_error_text};
pub use layer::{LayerPlugin, LayerSource, method};
pub(crate) use list::ExtentsList;
pub use load::ThreadModel;
pub(crate) use load::{set_host, unregister};
pub use name::PluginName;

/// A setting of a plugin: its key and its value.
pub type Setting = (String, Vec<u8>);
/// What a plugin has to offer: names and descriptions, as a callback adds them.
pub(crate) type ExportsList = Vec<(Vec<u8>, Vec<u8>)>;

/// Open an instance of the plugin that `name` leads to; `options` win over what the name sets.
///
/// `device` tells the device that will stand on it from all others, so that its callbacks can be kept
/// from calling it.
pub fn open(
    name: &PluginName,
    options: &[Setting],
    flags: u32,
    write: bool,
    device: usize,
) -> Result<Box<dyn Driver>> {
    Ok(Box::new(driver::PluginDriver::open(name, options, flags, write, device)?))
}

/// What a plugin has to offer: names and descriptions of exports.
pub fn list_exports(name: &PluginName, options: &[Setting]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    driver::exports(name, options, 0)
}

/// Register a struct of the program's own.
///
/// # Safety
/// `plugin` is NULL or a struct of as many bytes as it says; its functions stay callable.
pub(crate) unsafe fn register(plugin: *const c_void, opaque: *mut c_void) -> Result<()> {
    // SAFETY: the caller's word.
    unsafe { load::register(plugin.cast(), opaque) }
}

fn shown(name: &PluginName) -> Name {
    Name::from(OsStr::from_bytes(&name.shown).to_owned())
}

/// What a plugin is, without an instance of it.
#[derive(Clone, Debug)]
pub struct About {
    /// What it calls itself.
    pub name: String,
    /// The object that it is in; `None` of one that was registered.
    pub file: Option<Name>,
    /// Its version, by its own word.
    pub version: Option<String>,
    /// What it says that it is.
    pub description: Option<String>,
    /// The version of the ABI that it was built for; `None` where functions were found by their names.
    pub api_version: Option<i32>,
    /// Bytes of its struct.
    pub struct_size: u64,
    /// How many calls it takes at a time.
    pub thread_model: ThreadModel,
    /// Whether errno tells why a callback failed.
    pub errno_is_preserved: bool,
    /// It stands on something else.
    pub is_layer: bool,
    /// Its functions.
    pub functions: Vec<&'static str>,
    /// Of a layer: the methods that it has passed on to what is below.
    pub passes: Vec<&'static str>,
    /// What it says of its settings.
    pub config_help: Option<String>,
    /// What it tells of itself.
    pub dump: Option<String>,
}

/// Load a plugin and tell what it is.
pub fn describe(which: &[u8]) -> Result<About> {
    if which.is_empty() {
        return Err(Error::invalid("the name is empty; expected the path of a shared object"));
    }
    let name = PluginName { which: which.to_vec(), settings: Vec::new(), shown: which.to_vec() };
    let plugin = load::find(&name.which, &name.path())?;
    let (config_help, dump) = instance::texts(&plugin, &shown(&name))?;
    Ok(About {
        name: plugin.name.clone(),
        file: plugin.file.clone(),
        version: plugin.version.clone(),
        description: plugin.description.clone(),
        api_version: (!plugin.flat).then_some(plugin.slots.api_version),
        struct_size: plugin.struct_size,
        thread_model: plugin.model,
        errno_is_preserved: plugin.slots.errno_is_preserved != 0,
        is_layer: plugin.slots.open_layer.is_some(),
        functions: plugin.slots.filled(),
        passes: layer::method::names(plugin.slots.passes),
        config_help,
        dump,
    })
}
