//! A plugin's instance as a driver. What the instance can do is asked once; what it cannot is
//! `block::Device`'s to emulate.

mod abilities;
mod quick;

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};

use super::abi::*;
use super::instance::{About, Instance, opaque};
use super::list::ExtentsList;
use super::load::{Plugin, ThreadModel};
use super::name::PluginName;
use crate::block::*;
use quick::Quick;

/// How bytes are read.
#[derive(Clone, Copy)]
enum Reading {
    V1(Read1),
    V2(Read2),
    /// By what a layer stands on.
    Next,
}

/// How bytes are written.
#[derive(Clone, Copy)]
enum Writing {
    Not,
    V1(Write1),
    V2(Write2),
    Next,
}

/// How bytes are flushed.
#[derive(Clone, Copy)]
enum Flushing {
    Not,
    V1(Ask),
    V2(Flush2),
    Next,
}

/// How a range is trimmed.
#[derive(Clone, Copy)]
enum Trimming {
    V1(Trim1),
    V2(Range2),
    Next,
}

/// How a range is zeroed.
#[derive(Clone, Copy)]
enum Zeroing {
    V1(Zero1),
    V2(Range2),
    Next,
}

/// An open instance, as a driver.
pub struct PluginDriver {
    instance: Instance,
    size: u64,
    caps: Caps,
    read: Reading,
    write: Writing,
    flush: Flushing,
    trim: Option<Trimming>,
    zero: Option<Zeroing>,
    cache_next: bool,
    extents_next: bool,
    multi_conn: Option<Can>,
    /// Of a layer.
    kind: Option<&'static str>,
    /// With what a flush failed, once one has; else 0.
    failed: AtomicI32,
    quick_reads: Quick,
    quick_writes: Quick,
}

/// Bytes of a call that it is learnt from whether such calls are quick, at most.
const SMALL: usize = 64 << 10;

impl PluginDriver {
    /// Open an instance of the plugin that `name` leads to, with what the name and the options (which
    /// win) set. `flags` are `QBLK_OPEN_...`, `write` whether it is to be written; `device` tells the
    /// device that will stand on it from others.
    pub fn open(
        name: &PluginName,
        options: &[(String, Vec<u8>)],
        flags: u32,
        write: bool,
        device: usize,
    ) -> Result<Self> {
        let plugin = super::load::find(&name.which, &name.path())?;
        let shown = super::shown(name);
        let Some(open) = plugin.slots.open else {
            let what = "is a layer, which stands on something: name it in the option 'layers'";
            return Err(Error::Refused { file: shown, what: what.into(), errno: libc::EINVAL });
        };
        let settings = merged(name, options);
        // SAFETY: the plugin's function, with what it registered.
        let begin = |p: &Plugin| unsafe { open(p.opaque(), flags) };
        let instance = Instance::open(&plugin, &shown, device, &settings, begin, None)?;
        if !settings.iter().any(|(k, _)| k == "export")
            && let Some(export) = default_export(&instance)?
        {
            instance.set("export", &export)?;
        }
        instance.complete()?;
        Self::new(instance, write, None)
    }

    /// The part of a range that lies on the device.
    fn inside(&self, offset: u64, count: u64) -> u64 {
        count.min(self.size.saturating_sub(offset))
    }

    /// What a method that is passed on is passed to.
    fn next(&self) -> Result<Arc<Device>> {
        self.instance.source.as_ref().and_then(|s| s.next()).ok_or_else(|| {
            let text = "there is nothing to pass methods on to (qblk_layer_set_next)";
            self.instance.error(text.into())
        })
    }

    #[inline(always)]
    fn read_piece(&self, (base, count): (*mut u8, usize), offset: u64) -> Result<()> {
        let handle = self.instance.handle;
        let about = About("pread", Some((offset, count as u64)));
        self.instance.done(about, || {
            // SAFETY: the plugin's function and handle, and memory of `count` bytes; those of version 1
            // are no more than 32 bits (max_transfer).
            unsafe {
                match self.read {
                    Reading::V2(f) => f(handle, base.cast(), count as u64, offset, 0),
                    Reading::V1(f) => f(handle, base.cast(), count as u32, offset),
                    // Not reached: it is not done by pieces.
                    Reading::Next => -libc::EIO,
                }
            }
        })
    }

    #[inline(always)]
    fn write_piece(
        &self,
        (base, count): (*mut u8, usize),
        offset: u64,
        flags: ReqFlags,
    ) -> Result<()> {
        let handle = self.instance.handle;
        let about = About("pwrite", Some((offset, count as u64)));
        self.instance.done(about, || {
            // SAFETY: as in `read_piece`.
            unsafe {
                match self.write {
                    Writing::V2(f) => f(handle, base.cast(), count as u64, offset, flags.0),
                    Writing::V1(f) => f(handle, base.cast(), count as u32, offset),
                    Writing::Not | Writing::Next => -libc::EROFS,
                }
            }
        })
    }

    #[cold]
    #[inline(never)]
    fn read_pieces(&self, buf: Dst<'_>, mut offset: u64) -> Result<()> {
        let there = self.inside(offset, buf.len() as u64);
        // What was never there reads as zeroes.
        let (buf, beyond) = buf.split_at(there as usize);
        beyond.zero_fill();
        if let Reading::Next = self.read {
            return self.next()?.read(buf, offset);
        }
        for piece in buf.pieces() {
            self.read_piece(piece, offset)?;
            offset += piece.1 as u64;
        }
        Ok(())
    }

    /// Whether a call of so many bytes can prove to be quick, or not. Where calls are not parallel a lock may
    /// have to be waited for, whatever they take.
    fn learns_of(&self, count: usize) -> bool {
        count <= SMALL && self.instance.plugin.model == ThreadModel::Parallel
    }

    fn writable(&self, offset: u64, count: u64) -> Result<()> {
        match self.failed.load(Relaxed) {
            0 => {}
            errno => return Err(Error::Failed { file: self.instance.name.clone(), errno }),
        }
        if self.inside(offset, count) < count {
            let what = format!(
                "{count} bytes at offset {offset}: a plugin's {} bytes do not grow",
                self.size
            );
            return Err(Error::Refused {
                file: self.instance.name.clone(),
                what,
                errno: libc::ENOSPC,
            });
        }
        Ok(())
    }

    fn property(&self, key: &str) -> Vec<u8> {
        let plugin = &self.instance.plugin;
        match key {
            "name" => plugin.name.clone().into(),
            "version" => plugin.version.clone().unwrap_or_default().into(),
            "model" => plugin.model.name().into(),
            _ => match plugin.flat {
                true => "functions".into(),
                false => plugin.slots.api_version.to_string().into(),
            },
        }
    }
}

/// The name's settings in their order, but what the options say too; then the options.
pub fn merged(name: &PluginName, options: &[(String, Vec<u8>)]) -> Vec<(String, Vec<u8>)> {
    let own = name.settings.iter().filter(|(key, _)| !options.iter().any(|(k, _)| k == key));
    own.chain(options).cloned().collect()
}

fn default_export(instance: &Instance) -> Result<Option<Vec<u8>>> {
    let Some(f) = instance.plugin.slots.default_export else { return Ok(None) };
    // SAFETY: the plugin's function and handle.
    let text = instance.pointer(About("default_export", None), || unsafe { f(instance.handle) })?;
    // SAFETY: NULL or a C string, by contract.
    Ok(unsafe { super::load::text(text) }.map(String::into_bytes))
}

impl Driver for PluginDriver {
    fn name(&self) -> &Name {
        &self.instance.name
    }

    fn kind(&self) -> &'static str {
        self.kind.unwrap_or("plugin")
    }

    fn is_foreign(&self) -> bool {
        true
    }

    fn held(&self) -> Option<Held> {
        let plugin = &self.instance.plugin;
        (plugin.model == ThreadModel::Process)
            .then(|| Held { id: plugin.id, name: plugin.name.clone() })
    }

    fn caps(&self) -> Caps {
        self.caps.clone()
    }

    #[inline]
    fn size(&self) -> u64 {
        self.size
    }

    #[inline]
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        match buf.as_single() {
            Some(piece)
                if self.inside(offset, piece.1 as u64) == piece.1 as u64
                    && !matches!(self.read, Reading::Next) =>
            {
                match self.quick_reads.is_proven() || !self.learns_of(piece.1) {
                    true => self.read_piece(piece, offset),
                    false => self.quick_reads.watch(|| self.read_piece(piece, offset)),
                }
            }
            _ => self.read_pieces(buf, offset),
        }
    }

    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        if let Reading::Next = self.read {
            let count = buf.len() as u64;
            return match self.inside(offset, count) == count {
                true => self.next()?.read_now(buf, offset),
                false => Ok(false),
            };
        }
        let piece = match buf.as_single() {
            Some(piece) if self.learns_of(piece.1) => piece,
            _ => return Ok(false),
        };
        let whole = self.inside(offset, piece.1 as u64) == piece.1 as u64;
        if !(whole && self.quick_reads.is_proven()) {
            return Ok(false);
        }
        self.quick_reads.watch(|| self.read_piece(piece, offset))?;
        Ok(true)
    }

    fn write(&self, buf: Src<'_>, mut offset: u64, flags: ReqFlags) -> Result<()> {
        self.writable(offset, buf.len() as u64)?;
        if let Writing::Next = self.write {
            return self.next()?.write(buf, offset, flags);
        }
        let whole = buf.len();
        let mut pieces = || -> Result<()> {
            for piece in buf.pieces() {
                self.write_piece(piece, offset, flags)?;
                offset += piece.1 as u64;
            }
            Ok(())
        };
        match self.learns_of(whole) && !flags.has(ReqFlags::FUA) {
            true => self.quick_writes.watch(pieces),
            false => pieces(),
        }
    }

    fn writes_at_once(&self, count: usize) -> bool {
        self.learns_of(count) && self.quick_writes.is_proven()
    }

    fn flush(&self) -> Result<()> {
        let failed = self.failed.load(Relaxed);
        if failed != 0 {
            return Err(Error::Failed { file: self.instance.name.clone(), errno: failed });
        }
        if let Flushing::Next = self.flush {
            return self.next()?.flush();
        }
        let handle = self.instance.handle;
        let result = self.instance.done(About("flush", None), || {
            // SAFETY: the plugin's function and handle.
            unsafe {
                match self.flush {
                    Flushing::V2(f) => f(handle, 0),
                    Flushing::V1(f) => f(handle),
                    Flushing::Not | Flushing::Next => 0,
                }
            }
        });
        // What was written before may be lost, whatever a later flush says. Not so when the call was never
        // made.
        if let Err(e @ Error::Plugin { .. }) = &result {
            self.failed.store(e.errno(), Relaxed);
        }
        result
    }

    fn flush_to_close(&self) -> Result<()> {
        match self.flush {
            Flushing::Next => self.next()?.flush_to_close(),
            _ => self.flush(),
        }
    }

    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        const CANNOT: Error = Error::NotSupported("zeroing by the plugin");
        self.writable(offset, count)?;
        let (handle, may_trim) = (self.instance.handle, flags.has(ReqFlags::MAY_TRIM));
        let Some(zero) = self.zero else { return Err(CANNOT) };
        if let Zeroing::Next = zero {
            return self.next()?.zero(offset, count, flags);
        }
        let result = self.instance.done(About("zero", Some((offset, count))), || {
            // SAFETY: the plugin's function and handle; a count of version 1 has 32 bits (max_range).
            unsafe {
                match zero {
                    Zeroing::V2(f) => f(handle, count, offset, flags.0),
                    Zeroing::V1(f) => f(handle, count as u32, offset, c_int::from(may_trim)),
                    Zeroing::Next => -libc::ENOTSUP,
                }
            }
        });
        match result {
            Err(e) if e.kind() == ErrorKind::Errno(libc::ENOTSUP) => Err(CANNOT),
            result => result,
        }
    }

    fn trim(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        let count = self.inside(offset, count);
        let Some(trim) = self.trim.filter(|_| count > 0) else { return Ok(()) };
        self.writable(offset, count)?;
        if let Trimming::Next = trim {
            return self.next()?.trim(offset, count, flags);
        }
        let handle = self.instance.handle;
        self.instance.done(About("trim", Some((offset, count))), || {
            // SAFETY: as in `zero`.
            unsafe {
                match trim {
                    Trimming::V2(f) => f(handle, count, offset, flags.0),
                    Trimming::V1(f) => f(handle, count as u32, offset),
                    Trimming::Next => 0,
                }
            }
        })
    }

    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        if self.cache_next {
            return self.next()?.cache(offset, self.inside(offset, count));
        }
        let align = u64::from(self.caps.align);
        let before = offset % align;
        let offset = offset - before;
        let count = self.inside(offset, (before + count).next_multiple_of(align));
        let Some(cache) = self.instance.plugin.slots.cache.filter(|_| count > 0) else {
            return Ok(());
        };
        self.instance.done(About("cache", Some((offset, count))), || {
            // SAFETY: the plugin's function and handle.
            unsafe { cache(self.instance.handle, count, offset, 0) }
        })
    }

    fn extents(&self, offset: u64, count: u64, out: &mut ExtentList<'_>) -> Result<()> {
        let there = self.inside(offset, count);
        if self.extents_next && there > 0 {
            return self.next()?.driver().extents(offset, there, out);
        }
        let Some(f) = self.instance.plugin.slots.extents.filter(|_| there > 0) else {
            out.push(Extent::hole(offset, count));
            return Ok(());
        };
        let align = u64::from(self.caps.align);
        // Whole blocks are asked for; what surrounds the range is cut off again.
        let from = offset - offset % align;
        let to = (offset + there).next_multiple_of(align).min(self.size);
        let mut list = ExtentsList::new(align, offset, offset + there);
        let about = About("extents", Some((from, to - from)));
        self.instance.done(about, || {
            // SAFETY: the plugin's function and handle, and a list that lives as long as the call.
            unsafe { f(self.instance.handle, to - from, from, 0, opaque(&mut list)) }
        })?;
        let found = list.finish().map_err(|why| {
            self.instance.error(format!("extents of {there} bytes at offset {offset}: {why}"))
        })?;
        for e in found {
            out.push(e);
        }
        Ok(())
    }

    fn describe(&self) -> Description {
        // What a layer stands on tells more of it.
        let below = self.instance.source.as_ref().and_then(|s| s.next());
        let about = below.map(|next| next.driver().describe()).unwrap_or_default();
        let mut properties = vec![
            ("plugin.name", self.property("name")),
            ("plugin.api-version", self.property("api")),
            ("plugin.thread-model", self.property("model")),
        ];
        if self.instance.plugin.version.is_some() {
            properties.insert(1, ("plugin.version", self.property("version")));
        }
        if let Some(can) = self.multi_conn {
            properties
                .push(("plugin.multi-conn", if can == Can::Not { "off" } else { "on" }.into()));
        }
        Description { properties, ..about }
    }

    fn properties_on_demand(&self, key: &str) -> Vec<(&'static str, Vec<u8>)> {
        if !matches!(key, "plugin.dump" | "properties") {
            return Vec::new();
        }
        match dump(&self.instance) {
            Ok(Some(text)) => vec![("plugin.dump", text)],
            _ => Vec::new(),
        }
    }
}

/// What an instance tells of itself, if it does.
pub fn dump(instance: &Instance) -> Result<Option<Vec<u8>>> {
    let Some(f) = instance.plugin.slots.dump else { return Ok(None) };
    let mut text = vec![0u8; 64 << 10];
    let len = instance.number(About("dump", None), || {
        // SAFETY: the plugin's function and handle, and memory of so many bytes.
        unsafe { f(instance.handle, text.as_mut_ptr().cast(), text.len()) }
    })?;
    text.truncate(usize::try_from(len).unwrap_or(usize::MAX).min(text.len() - 1));
    Ok(Some(text))
}

/// The plugin behind a driver's name, for whoever wants to look into it.
pub fn exports(
    name: &PluginName,
    options: &[(String, Vec<u8>)],
    flags: u32,
) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let plugin: Arc<Plugin> = super::load::find(&name.which, &name.path())?;
    let (Some(open), Some(list)) = (plugin.slots.open, plugin.slots.list_exports) else {
        return Err(Error::Refused {
            file: super::shown(name),
            what: "the plugin has no function list_exports".into(),
            errno: libc::ENOTSUP,
        });
    };
    // SAFETY: the plugin's function, with what it registered.
    let begin = |p: &Plugin| unsafe { open(p.opaque(), flags) };
    let settings = merged(name, options);
    let instance = Instance::open(&plugin, &super::shown(name), 0, &settings, begin, None)?;
    let mut found: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    instance.done(About("list_exports", None), || {
        // SAFETY: the plugin's function and handle, and a list that lives as long as the call.
        unsafe { list(instance.handle, opaque(&mut found)) }
    })?;
    Ok(found)
}
