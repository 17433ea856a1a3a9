//! What an instance can do: asked once, and held against the functions that it has.

use super::*;
use crate::plugin::layer::method;

/// Most bytes of one request of version 1, whose counts have 32 bits: a multiple of every block size.
const MOST_V1: u64 = 0xffff_0000;
/// The largest block that a plugin may ask for.
const LARGEST_BLOCK: u32 = 64 << 10;

impl PluginDriver {
    /// Ask an instance what it can do. `layer`: it is one, of that name.
    pub fn new(instance: Instance, write: bool, layer: Option<&'static str>) -> Result<Self> {
        let next = instance.source.as_ref().and_then(|s| s.next());
        let passes = |bit: u64| layer.is_some() && instance.plugin.slots.passes & bit != 0;
        if layer.is_some() && next.is_none() && instance.plugin.slots.passes != 0 {
            let text = "it passes methods on, but has not called qblk_layer_set_next";
            return Err(instance.error(text.into()));
        }
        let (slots, handle) = (instance.plugin.slots, instance.handle);
        let lacks = |what: &str| instance.error(format!("it lacks the function {what}"));
        let size = match (slots.get_size, &next) {
            // SAFETY: the plugin's function and handle.
            (Some(f), _) => instance.number(About("get_size", None), || unsafe { f(handle) })?,
            (None, Some(next)) => next.size(),
            (None, None) => return Err(lacks("get_size")),
        };
        let read = match (slots.pread, slots.pread_v1) {
            (Some(f), _) => Reading::V2(f),
            (None, Some(f)) => Reading::V1(f),
            (None, None) if passes(method::READ) => Reading::Next,
            (None, None) => return Err(lacks("pread")),
        };
        let write_fn = match (slots.pwrite, slots.pwrite_v1) {
            (Some(f), _) => Writing::V2(f),
            (None, Some(f)) => Writing::V1(f),
            (None, None) if passes(method::WRITE) => Writing::Next,
            (None, None) => Writing::Not,
        };
        let flush_fn = match (slots.flush, slots.flush_v1) {
            (Some(f), _) => Flushing::V2(f),
            (None, Some(f)) => Flushing::V1(f),
            (None, None) if passes(method::FLUSH) => Flushing::Next,
            // Nobody but the layer knows where its writes have gone.
            (None, None) if layer.is_some() && write => {
                return Err(lacks("flush, which a layer that is written must have"));
            }
            (None, None) => Flushing::Not,
        };
        let trim_fn = slots.trim.map(Trimming::V2).or(slots.trim_v1.map(Trimming::V1));
        let trim_fn = trim_fn.or(passes(method::TRIM).then_some(Trimming::Next));
        let zero_fn = slots.zero.map(Zeroing::V2).or(slots.zero_v1.map(Zeroing::V1));
        let zero_fn = zero_fn.or(passes(method::ZERO).then_some(Zeroing::Next));
        let cache_next = slots.cache.is_none() && passes(method::CACHE);
        let extents_next = slots.extents.is_none() && passes(method::EXTENTS);
        // What is passed on is as good as it is there.
        let next_caps = next.as_ref().map(|n| n.caps().clone()).unwrap_or_default();
        let next_fua = next.as_ref().is_some_and(|n| n.can_fua() == Can::Native);

        // An ability that is claimed needs the function; one that is there need not be claimed.
        let says = |what: &'static str, slot: Option<Ask>, there: bool, function: &str| {
            let said = instance.can(what, slot)?;
            match said {
                None => Ok(there),
                Some(Can::Not) => Ok(false),
                // Emulation is the library's.
                Some(Can::Emulate) if !there => Ok(false),
                Some(_) if there => Ok(true),
                Some(_) => Err(instance.error(format!(
                    "{what} says that it can, but it lacks the function {function}"
                ))),
            }
        };
        let can_write =
            says("can_write", slots.can_write, !matches!(write_fn, Writing::Not), "pwrite")?;
        if write && !can_write {
            let what = match write_fn {
                Writing::Not => "is read-only: the plugin has no function pwrite",
                _ => "is read-only: the plugin says so (can_write)",
            };
            return Err(Error::Refused {
                file: instance.name.clone(),
                what: what.into(),
                errno: libc::EROFS,
            });
        }
        let flush =
            says("can_flush", slots.can_flush, !matches!(flush_fn, Flushing::Not), "flush")?;
        let mut caps = Caps {
            read_only: !write,
            flush,
            extents: says(
                "can_extents",
                slots.can_extents,
                slots.extents.is_some() || (extents_next && next_caps.extents),
                "extents",
            )?,
            rotational: match instance.can("is_rotational", slots.is_rotational)? {
                Some(can) => can != Can::Not,
                None => next.is_some() && next_caps.rotational,
            },
            ..Caps::default()
        };
        if write {
            caps.trim = says("can_trim", slots.can_trim, trim_fn.is_some(), "trim")?;
            caps.zero = says("can_zero", slots.can_zero, zero_fn.is_some(), "zero")?;
            fua(&instance, &mut caps, (&write_fn, &zero_fn, &trim_fn), next_fua)?;
            caps.fast_zero = match instance.can("can_fast_zero", slots.can_fast_zero)? {
                Some(Can::Native) if matches!(zero_fn, Some(Zeroing::V2(_) | Zeroing::Next)) => {
                    true
                }
                None if matches!(zero_fn, Some(Zeroing::Next)) => {
                    next_caps.fast_zero && next_caps.zero
                }
                Some(Can::Native) => {
                    return Err(instance.error(
                        "can_fast_zero says that it can, but it lacks a function zero with flags"
                            .into(),
                    ));
                }
                _ => false,
            };
        }
        match instance.can("can_cache", slots.can_cache)? {
            Some(Can::Native) if slots.cache.is_none() && !cache_next => {
                return Err(instance
                    .error("can_cache says that it can, but it lacks the function cache".into()));
            }
            Some(Can::Native) => caps.cache = true,
            Some(Can::Emulate) => {}
            Some(Can::Not) => caps.cache_by_read = false,
            None => caps.cache = slots.cache.is_some() || cache_next,
        }
        let multi_conn = instance.can("can_multi_conn", slots.can_multi_conn)?;
        limits(&instance, &mut caps, size)?;
        let old = matches!(read, Reading::V1(_)) || matches!(write_fn, Writing::V1(_));
        let most = |limit: u64| if limit == 0 { MOST_V1 } else { limit.min(MOST_V1) };
        if old {
            caps.max_transfer = most(caps.max_transfer);
        }
        if matches!(zero_fn, Some(Zeroing::V1(_))) || matches!(trim_fn, Some(Trimming::V1(_))) {
            caps.max_range = most(0);
        }
        Ok(Self {
            size,
            caps,
            read,
            write: write_fn,
            flush: flush_fn,
            trim: trim_fn,
            zero: zero_fn,
            cache_next,
            extents_next,
            multi_conn,
            kind: layer,
            failed: AtomicI32::new(0),
            quick_reads: Quick::new(),
            quick_writes: Quick::new(),
            instance,
        })
    }
}

/// How FUA is done.
fn fua(
    instance: &Instance,
    caps: &mut Caps,
    (write, zero, trim): (&Writing, &Option<Zeroing>, &Option<Trimming>),
    next: bool,
) -> Result<()> {
    let carries = match write {
        Writing::V2(_) => true,
        Writing::Next => next,
        _ => false,
    };
    let how = match instance.can("can_fua", instance.plugin.slots.can_fua)? {
        None if carries => Can::Native,
        None if caps.flush => Can::Emulate,
        None => Can::Not,
        Some(Can::Native) if !carries => {
            let text = "can_fua says native, but it lacks a function pwrite with flags";
            return Err(instance.error(text.into()));
        }
        Some(Can::Emulate) if !caps.flush => {
            let text = "can_fua says emulate, but it can not be flushed";
            return Err(instance.error(text.into()));
        }
        Some(how) => how,
    };
    caps.fua = how == Can::Native;
    let zero = match zero {
        Some(Zeroing::V2(_)) => true,
        Some(Zeroing::Next) => next,
        _ => false,
    };
    let trim = match trim {
        Some(Trimming::V2(_)) => true,
        Some(Trimming::Next) => next,
        _ => false,
    };
    (caps.zero_fua, caps.trim_fua) = (caps.fua && zero, caps.fua && trim);
    caps.fua_by_flush = how != Can::Not;
    Ok(())
}

/// What it asks of requests.
fn limits(instance: &Instance, caps: &mut Caps, size: u64) -> Result<()> {
    let Some(f) = instance.plugin.slots.block_size else { return Ok(()) };
    let (mut least, mut preferred, mut most) = (1u32, caps.optimal_io, 0u64);
    instance.done(About("block_size", None), || {
        // SAFETY: the plugin's function and handle, and places for three numbers.
        unsafe { f(instance.handle, &mut least, &mut preferred, &mut most) }
    })?;
    let least = least.max(1);
    let why = if !least.is_power_of_two() || least > LARGEST_BLOCK {
        "the minimum is to be a power of two, 64 KiB at most"
    } else if !preferred.is_power_of_two() || preferred < least {
        "what is preferred is to be a power of two, and not below the minimum"
    } else if most != 0 && (most < u64::from(least) || most % u64::from(least) != 0) {
        "the maximum is to be a multiple of the minimum, or 0 for none"
    } else if !size.is_multiple_of(u64::from(least)) {
        "the size of the device is no multiple of the minimum"
    } else {
        (caps.align, caps.optimal_io, caps.max_transfer) = (least, preferred, most);
        return Ok(());
    };
    Err(instance.error(format!(
        "block_size gave {least} (minimum), {preferred} (preferred), {most} (maximum) for a device of \
         {size} bytes: {why}"
    )))
}
