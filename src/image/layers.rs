//! Layers on an image: stacks by option and name, layers pushed on an open device, and the contexts that
//! layers stand on.
//!
//! A layer is pushed by putting what the device was until now into a [`Shared`] of its own, below, and
//! the layer in its place: all contexts of the device see the layer from then on, and calls wait while it
//! is opened. A stack that is opened as one is an image with its layers pushed one by one.

use std::any::Any;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use super::whole::Taken;
use super::*;
use crate::layer::{self, Settings, Spec};
use crate::plugin::LayerPlugin;

/// Layers on a device, at most: each is a call deeper.
const MOST: usize = 32;

const NO_USE: &str = "layers: what is in an image's header or tables (QBLK_OPEN_INFO_ONLY, \
                      QBLK_OPEN_CHECK) is the image's own; leave its layers out";

/// The layers that an open asks for, the lowest first.
pub(super) struct Stack(Vec<Spec>);

/// Take the layers out of a name and the options of an open.
pub(super) fn split<'a>(name: &'a OsStr, options: &Options) -> Result<(Stack, &'a OsStr, Options)> {
    let mut options = options.clone();
    let mut all = match options.get("layers") {
        Some(list) => layer::parse_list(list)?,
        None => Vec::new(),
    };
    options.set("layers", None);
    let mut names: Vec<String> = all.iter().map(|spec| spec.name.clone()).collect();
    names.dedup();
    for name in names {
        for (key, value) in options.take_prefix(&format!("{name}.")) {
            let of_that_name = all.iter_mut().filter(|spec| spec.name == name);
            of_that_name.for_each(|spec| spec.settings.set(&key, &value));
        }
    }
    let mut name = name;
    // What the name says stands on what the name within says.
    let mut upper = Vec::new();
    while let Some(rest) = name.as_bytes().strip_prefix(b"layers:") {
        let Some(i) = rest.iter().position(|b| *b == b':') else {
            return Err(Error::invalid(format!(
                "{}: expected layers:LAYER,…:NAME",
                quoted(name.as_bytes())
            )));
        };
        upper.push(layer::parse_list(&rest[..i])?);
        name = OsStr::from_bytes(&rest[i + 1..]);
    }
    let mut list: Vec<Spec> = upper.into_iter().rev().flatten().collect();
    list.append(&mut all);
    match list.len() {
        0..=MOST => Ok((Stack(list), name, options)),
        n => Err(Error::invalid(format!("{n} layers: there may be {MOST}"))),
    }
}

impl Stack {
    /// Open an image by `open`, with the flags that the layers need of it, and put the layers on it.
    pub(super) fn open(
        self,
        flags: OpenFlags,
        open: impl FnOnce(OpenFlags) -> Result<Image>,
    ) -> Result<Image> {
        if self.0.is_empty() {
            return open(flags);
        }
        if flags.0 & OpenFlags::NO_DATA != 0 {
            return Err(Error::invalid(NO_USE));
        }
        // Whether each is to be written, from the uppermost down.
        let mut write = flags.has(OpenFlags::RDWR);
        let mut writes = Vec::with_capacity(self.0.len());
        for spec in self.0.iter().rev() {
            writes.push(write);
            write = write && made_of(spec)?.writes_below(&spec.settings)?;
        }
        let below = OpenFlags(flags.0 & !OpenFlags::RDWR.0 | u32::from(write));
        let image = open(below)?;
        for (spec, write) in self.0.iter().zip(writes.into_iter().rev()) {
            if let Err(e) = image.push(spec, Some(write)) {
                // Nothing was written, but what could fail is worth a word.
                if let Err(closing) = image.close() {
                    crate::log::log(crate::log::Level::Warn, format_args!("{closing}"));
                }
                return Err(e);
            }
        }
        let write = flags.has(OpenFlags::RDWR) && image.call()?.flags.has(OpenFlags::RDWR);
        image.write.store(write, Relaxed);
        Ok(image)
    }
}

/// What makes a layer.
enum Made {
    Kind(&'static layer::Kind),
    Plugin(LayerPlugin),
}

fn made_of(spec: &Spec) -> Result<Made> {
    if let Some(kind) = layer::find(&spec.name) {
        return Ok(Made::Kind(kind));
    }
    LayerPlugin::find(&spec.name)?.map(Made::Plugin).ok_or_else(|| {
        let names: Vec<&str> = layer::KINDS.iter().map(|k| k.name).collect();
        Error::invalid(format!(
            "there is no layer {}: there are {}, those that were registered, and shared objects by \
             their paths (with a slash)",
            quoted(spec.name.as_bytes()),
            names.join(", ")
        ))
    })
}

impl Made {
    fn writes_below(&self, settings: &Settings) -> Result<bool> {
        match self {
            Self::Kind(kind) => (kind.writes_below)(settings),
            Self::Plugin(_) => Ok(true),
        }
    }

    fn open(
        &self,
        settings: &Settings,
        source: Arc<dyn layer::Source>,
        write: bool,
        device: usize,
        below: &[Held],
    ) -> Result<Box<dyn Driver>> {
        match self {
            Self::Plugin(plugin) => plugin.open(settings, source, write, device, below),
            Self::Kind(kind) => {
                settings.check(kind.keys)?;
                (kind.open)(settings, source, write)
            }
        }
    }
}

impl Image {
    /// Put a layer, with its settings, on the device: all of its contexts see it from then on. Calls of
    /// other threads wait meanwhile; if it fails, all stays as it was.
    pub fn push_layer(&self, layer: &[u8], options: &Options) -> Result<()> {
        let mut specs = layer::parse_list(layer)?;
        let (Some(mut spec), true) = (specs.pop(), specs.is_empty()) else {
            return Err(Error::invalid("one layer is pushed at a time"));
        };
        for (key, value) in options.all() {
            spec.settings.set(key, value);
        }
        self.push(&spec, None)
    }

    /// `write`: the layer is to be written; `None`: if it can be, for which of the contexts may write is
    /// another matter.
    fn push(&self, spec: &Spec, write: Option<bool>) -> Result<()> {
        let made = made_of(spec)?;
        // A layer that never changes what is below may be written though that is not.
        let writes_below = made.writes_below(&spec.settings)?;
        let _admin = self.shared.admin.lock();
        let tree = self.shared.tree.load(SeqCst);
        if tree.is_null() {
            return Err(Error::BadHandle("the device is closed".into()));
        }
        // SAFETY: the tree is replaced and freed under `admin` only, which is held.
        let now = unsafe { &*tree };
        if now.flags.0 & OpenFlags::NO_DATA != 0 {
            return Err(no_data(now));
        }
        if depth(now) >= MOST {
            return Err(Error::invalid(format!("there are {MOST} layers already")));
        }
        let (name, options, probed) = (now.name.clone(), now.options.clone(), now.probed);
        let (flags, driver) = (now.flags, now.driver);
        let write = write.unwrap_or(flags.has(OpenFlags::RDWR) || !writes_below);
        if write && writes_below && !flags.has(OpenFlags::RDWR) {
            return Err(Error::ReadOnly(name));
        }
        let below_holds = held(now);
        let taken = Taken::new(&self.shared);
        // What counts its calls goes with it.
        let below = Arc::new(Shared {
            // Plugins that it stands on know the one that the program has.
            device: InFlight::fresh_id(),
            calls: Calls::new(self.shared.calls.shared()),
            tree: AtomicPtr::new(tree),
            admin: Mutex::new(()),
            closed: AtomicBool::new(false),
            broken: self.shared.broken.clone(),
        });
        let mut lent = Lent { taken: Some(taken), below: below.clone() };
        let own = Image { shared: below.clone(), write: flags.has(OpenFlags::RDWR).into() };
        let source = Arc::new(Below { shared: below.clone(), name: name.clone() });
        let device = self.shared.device;
        let top = made.open(&spec.settings, source, write, device, &below_holds)?;
        let top = Device::new(top);
        let writable = write && !top.caps().read_only;
        let flags = OpenFlags(flags.0 & !OpenFlags::RDWR.0 | u32::from(writable));
        let layered = Tree {
            top,
            files: Vec::new(),
            name,
            options,
            flags,
            probed,
            driver,
            again: Again::Layer,
            locks: Vec::new(),
            parts: Vec::new(),
            own_parts: 0,
            parts_to_below: 0,
            lease: None,
            in_use: false,
            below: Some(own),
        };
        if let Some(taken) = lent.taken.take() {
            self.shared.calls.replace(Arc::default());
            taken.give(Box::new(layered));
        }
        Ok(())
    }
}

/// A tree that is with what is below a layer while that is opened. Where that comes to nothing, by a panic
/// too, it is taken back, as it is by then: a layer may have had it reopened, or put layers on it.
struct Lent<'a> {
    taken: Option<Taken<'a>>,
    below: Arc<Shared>,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let Some(taken) = self.taken.take() else { return };
        let _admin = self.below.admin.lock();
        // What the layer may have left open of it answers nothing more.
        self.below.closed.store(true, SeqCst);
        let tree = self.below.tree.swap(ptr::null_mut(), SeqCst);
        self.below.calls.get().wait();
        taken.take_back(tree, self.below.calls.shared());
    }
}

/// How many layers there are.
fn depth(tree: &Tree) -> usize {
    let below = tree.below.as_ref().and_then(|b| b.call().ok().map(|call| depth(&call)));
    below.map_or(0, |n| n + 1)
}

/// The locks that calls take which are shared with other devices.
fn held(tree: &Tree) -> Vec<Held> {
    let below = tree.below.as_ref().and_then(|b| b.call().ok().map(|call| held(&call)));
    let drivers = [&tree.top].into_iter().chain(tree.files.iter().map(|file| &**file));
    drivers.filter_map(|d| d.driver().held()).chain(below.into_iter().flatten()).collect()
}

/// The names of the layers, the lowest first, with commas.
pub(super) fn names(tree: &Tree) -> Vec<u8> {
    let Some(below) = &tree.below else { return Vec::new() };
    let mut all = below.call().map(|call| names(&call)).unwrap_or_default();
    if !all.is_empty() {
        all.push(b',');
    }
    all.extend(tree.top.driver().kind().as_bytes());
    all
}

/// Open anew what a layer stands on, for a handle that asks for these flags.
pub(super) fn reopen_below(
    tree: &Tree,
    below: &Image,
    options: Option<&Options>,
    flags: OpenFlags,
) -> Result<()> {
    if flags.0 & OpenFlags::NO_DATA != 0 {
        return Err(Error::invalid(NO_USE));
    }
    if flags.has(OpenFlags::RDWR) && !tree.flags.has(OpenFlags::RDWR) {
        let what =
            "layers that were not to be written can not be reopened for writing: open them anew";
        return Err(Error::invalid(what));
    }
    // The layers go on writing below, whatever this handle may.
    let write = below.call()?.flags.0 & OpenFlags::RDWR.0;
    below.reopen(options, OpenFlags(flags.0 & !OpenFlags::RDWR.0 | write))?;
    tree.top.driver().reopened();
    Ok(())
}

/// What a layer is given to open contexts on.
struct Below {
    shared: Arc<Shared>,
    name: Name,
}

impl Below {
    fn context(&self, write: bool) -> Result<Image> {
        let image = Image { shared: self.shared.clone(), write: write.into() };
        if write && !image.call()?.flags.has(OpenFlags::RDWR) {
            return Err(Error::ReadOnly(self.name.clone()));
        }
        Ok(image)
    }
}

impl layer::Source for Below {
    fn name(&self) -> &Name {
        &self.name
    }

    fn can_write(&self) -> bool {
        let image = Image { shared: self.shared.clone(), write: true.into() };
        image.call().is_ok_and(|call| call.flags.has(OpenFlags::RDWR))
    }

    fn open(&self, write: bool) -> Result<Device> {
        Ok(Device::new(context_of(self.context(write)?)?))
    }

    fn reopen(&self) -> Result<()> {
        let image = self.context(false)?;
        let flags = image.call()?.flags;
        image.reopen(None, flags)
    }

    fn handle(&self, write: bool) -> Result<Box<dyn Any + Send>> {
        Ok(Box::new(self.context(write)?))
    }

    fn has(&self, context: &dyn Any) -> bool {
        let image = context.downcast_ref::<Image>();
        image.is_some_and(|image| Arc::ptr_eq(&image.shared, &self.shared))
    }
}

/// A context as a driver, for what stands on it.
pub fn context_of(image: Image) -> Result<Box<dyn Driver>> {
    let info = image.info()?;
    let native = |can| can == Can::Native;
    let (name, cached) = {
        let call = image.call()?;
        (call.name.clone(), call.top.caps().cached)
    };
    let caps = Caps {
        // Contexts take any request.
        align: 1,
        mem_align: 1,
        max_transfer: 0,
        optimal_io: info.optimal_io_size,
        read_only: info.state & state::READ_ONLY != 0,
        flush: native(info.can_flush),
        // What would be emulated below is better emulated above, once for all pieces of a request.
        fua: native(info.can_fua),
        zero_fua: native(info.can_fua),
        trim_fua: native(info.can_fua),
        fua_by_flush: info.can_fua == Can::Emulate,
        trim: native(info.can_trim),
        zero: native(info.can_zero),
        zero_by_write: info.can_zero != Can::Not,
        fast_zero: native(info.can_fast_zero),
        max_range: 0,
        cache: native(info.can_cache),
        cache_by_read: info.can_cache == Can::Emulate,
        extents: native(info.can_extents),
        sparse: false,
        rotational: info.state & state::ROTATIONAL != 0,
        cached,
    };
    Ok(Box::new(Context { image, name, caps }))
}

struct Context {
    image: Image,
    name: Name,
    caps: Caps,
}

impl Driver for Context {
    fn name(&self) -> &Name {
        &self.name
    }
    fn kind(&self) -> &'static str {
        "context"
    }
    fn caps(&self) -> Caps {
        self.caps.clone()
    }
    #[inline]
    fn size(&self) -> u64 {
        self.image.size().unwrap_or(0)
    }
    #[inline]
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.image.read(buf, offset)
    }
    #[inline]
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        self.image.read_now(buf, offset)
    }
    #[inline]
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.image.write(buf, offset, flags)
    }
    fn flush(&self) -> Result<()> {
        self.image.flush()
    }
    fn flush_to_close(&self) -> Result<()> {
        self.image.flush_for_close()
    }
    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.image.zero(offset, count, flags)
    }
    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.image.trim(offset, count, flags)
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.image.cache(offset, count)
    }
    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        let mut some = [Extent::default(); 32];
        let n = self.image.extents_owned(offset, count, &mut some)?;
        some[..n].iter().for_each(|e| out.push(*e));
        Ok(())
    }
    fn allocated(&self) -> Option<u64> {
        self.image.info().ok().and_then(|info| info.allocated)
    }
    fn describe(&self) -> Description {
        // State and properties are asked for by themselves.
        let Ok(call) = self.image.call() else { return Description::default() };
        let about = call.top.driver().describe();
        Description { properties: Vec::new(), ..about }
    }
}
