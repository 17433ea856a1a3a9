//! Layers written in C: what they stand on, and what they let through.

use std::any::Any;
use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::driver::PluginDriver;
use super::instance::Instance;
use super::load::{Plugin, ThreadModel};
use super::order::Place;
use crate::block::*;
use crate::layer::{Settings, Source};

/// A method of a layer that goes to the context below as it is. The values are those of the C ABI
/// (`QBLK_METHOD_...`).
pub mod method {
    /// `pread`.
    pub const READ: u64 = 1;
    /// `pwrite`.
    pub const WRITE: u64 = 2;
    /// `flush`.
    pub const FLUSH: u64 = 4;
    /// `trim`.
    pub const TRIM: u64 = 8;
    /// `zero`.
    pub const ZERO: u64 = 16;
    /// `cache`.
    pub const CACHE: u64 = 32;
    /// `extents`.
    pub const EXTENTS: u64 = 64;

    /// The names of those that are set.
    pub fn names(mask: u64) -> Vec<&'static str> {
        const ALL: [(u64, &str); 7] = [
            (READ, "read"),
            (WRITE, "write"),
            (FLUSH, "flush"),
            (TRIM, "trim"),
            (ZERO, "zero"),
            (CACHE, "cache"),
            (EXTENTS, "extents"),
        ];
        ALL.iter().filter(|(bit, _)| mask & bit != 0).map(|(_, name)| *name).collect()
    }
}

/// What a layer in C is given to open contexts on: from its function open_layer until its function close
/// has returned, by any thread.
pub struct LayerSource {
    source: Arc<dyn Source>,
    next: RwLock<Option<Arc<Device>>>,
}

impl LayerSource {
    /// A context as the room above knows it.
    pub(crate) fn handle(&self, write: bool) -> Result<Box<dyn Any + Send>> {
        self.source.handle(write)
    }

    /// Whether `context`, as the room above knows it, is one of this source.
    pub(crate) fn has(&self, context: &dyn Any) -> bool {
        self.source.has(context)
    }

    /// Let methods that are passed on go here from now on; those under way end where they began.
    pub(crate) fn set_next(&self, next: Option<Device>) {
        *self.next.write() = next.map(Arc::new);
    }

    /// Where methods that are passed on go.
    pub fn next(&self) -> Option<Arc<Device>> {
        self.next.read().clone()
    }
}

/// A plugin as a layer.
#[derive(Clone)]
pub struct LayerPlugin(Arc<Plugin>);

impl LayerPlugin {
    /// The plugin that a layer's name stands for: one that was registered, or a path; `None` if it is
    /// neither.
    pub fn find(name: &str) -> Result<Option<Self>> {
        if !name.contains('/') && !super::load::is_registered(name.as_bytes()) {
            return Ok(None);
        }
        let plugin = super::load::find(name.as_bytes(), std::path::Path::new(name))?;
        if plugin.slots.open_layer.is_none() {
            let what = "is no layer: it lacks the function open_layer".into();
            return Err(Error::Refused { file: name.into(), what, errno: libc::EINVAL });
        }
        Ok(Some(Self(plugin)))
    }

    /// Put an instance on a source. `device` tells the device that it will be the top of from others;
    /// `below` are the locks that calls of the source take.
    pub fn open(
        &self,
        settings: &Settings,
        source: Arc<dyn Source>,
        write: bool,
        device: usize,
        below: &[Held],
    ) -> Result<Box<dyn Driver>> {
        let plugin = &self.0;
        let Some(open) = plugin.slots.open_layer else {
            return Err(Error::Internal("a layer that is none".into()));
        };
        let shown = source.name().clone();
        let place = match plugin.model {
            ThreadModel::Process => {
                Some(Place::take(plugin.id, below).map_err(|other| self.disorder(other, &shown))?)
            }
            _ => None,
        };
        let source = Arc::new(LayerSource { source, next: RwLock::new(None) });
        let settings: Vec<_> = settings.all().map(|(k, v)| (k.to_owned(), v.to_vec())).collect();
        // QBLK_OPEN_RDWR.
        let flags = u32::from(write);
        let given = Arc::as_ptr(&source).cast_mut().cast();
        // SAFETY: the plugin's function, with what it registered, and a source that is kept for as long
        // as the instance is.
        let begin = |p: &Plugin| unsafe { open(p.opaque(), given, flags) };
        let mut instance = Instance::open(plugin, &shown, device, &settings, begin, Some(source))?;
        instance.place = place;
        instance.complete()?;
        Ok(Box::new(PluginDriver::new(instance, write, Some(interned(&plugin.name)))?))
    }

    #[cold]
    fn disorder(&self, other: &Held, stack: &Name) -> Error {
        let name = quoted(self.0.name.as_bytes());
        let what = if other.id == self.0.id {
            format!(
                "plugin {name} takes one call at a time in the process (QBLK_THREAD_PROCESS), and is in \
                 this stack already: calls would wait for themselves"
            )
        } else {
            format!(
                "plugin {name} cannot be put above plugin {}, which stands above it in stacks that are \
                 open: each takes one call at a time in the process (QBLK_THREAD_PROCESS), and calls would \
                 wait for each other",
                quoted(other.name.as_bytes())
            )
        };
        Error::Refused { file: stack.clone(), what, errno: libc::EDEADLK }
    }
}

/// A name that lives for ever. There are as many as layers with different names.
fn interned(name: &str) -> &'static str {
    static ALL: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut all = ALL.lock();
    if let Some(name) = all.get(name) {
        return name;
    }
    let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
    all.insert(name);
    name
}
