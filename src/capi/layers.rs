//! Layers on open devices.

use std::ffi::{c_char, c_int};

use super::guard::image;
use super::options::{options_arg, text_arg};
use super::*;

/// Put a layer on the device: all of its contexts see it from then on.
///
/// `layer` is the layer's name, with settings if need be ("offset;offset=1M;range=64k", as in the option
/// "layers"); `options` (NULL: none) are more of its settings, without the name in front. `flags` is 0.
/// Other calls on the device wait while the layer is opened. There is no way to take it off but closing
/// the device. A handle that may not write gets no right to by this; where the layer makes a device
/// writable that was not ("cow"), qblk_context_open() with QBLK_OPEN_RDWR makes one that may.
///
/// Returns 0; on failure the device is what it was, and the code is -EINVAL (a NULL, a flag, no such layer,
/// a setting that it has not or that means nothing, too many layers), -EBADF on a handle that is open for
/// its description or to be checked only, or what opening the layer came to. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_layer_push(
    dev: *mut qblk,
    layer: *const c_char,
    options: *const qblk_options,
    flags: u32,
) -> c_int {
    // SAFETY: a handle or NULL, text or NULL, and options or NULL, as the manual asks.
    unsafe {
        guard::on("qblk_layer_push", dev, |dev| {
            data::known_flags(flags, 0)?;
            let layer = text_arg(layer, "the layer is NULL")?;
            Ok(image(dev)?.push_layer(layer.to_bytes(), &options_arg(options))?)
        })
    }
}
