//! The NBD server inside the process.

use std::ffi::{CStr, c_char, c_int};
use std::time::Duration;

use super::guard::{self, Fail, image};
use super::open::duplicate;
use super::options::{options_arg, out_arg, text_arg};
use super::*;
use crate::image::Use;
use crate::nbd::server::{Export, Server};

/// qblk_server_add_export(): clients can not write to it.
pub const QBLK_EXPORT_RDONLY: u32 = 1;

/// An NBD server inside the process. Any number of them may live at once.
///
/// Any number of threads may call on one at once. Only qblk_server_free() must be the last. A server
/// has threads of its own, which no signal of the program reaches.
pub struct qblk_server {
    server: Server,
}

/// The server of a handle.
///
/// # Safety
/// `srv` is NULL, or a server that nobody frees during the call.
unsafe fn server_arg<'a>(srv: *mut qblk_server) -> Result<&'a Server, Fail> {
    guard::alive()?;
    // SAFETY: the caller's word.
    let srv = unsafe { srv.as_ref() }.ok_or(Fail::Argument("the server handle is NULL"))?;
    Ok(&srv.server)
}

/// Make an NBD server that exports nothing and listens nowhere yet. Free it with qblk_server_free().
///
/// Returns 0 and the server in `*out`; -EINVAL if `out` is NULL; -EMFILE and other codes of the
/// system. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_new(out: *mut *mut qblk_server) -> c_int {
    guard::call("qblk_server_new", || {
        // SAFETY: as the manual asks.
        let out = unsafe { out_arg(out) }?;
        guard::alive()?;
        *out = life::adopt_server(Server::new()?);
        Ok(())
    })
}

/// Set `key` to `value`, before the first qblk_server_listen(), _listen_fd() or _serve_fd().
///
/// Keys: "tls" ("off", "on", "required"), "tls-certificate", "tls-key", "tls-ca" (PEM files, or PEM text
/// that begins with "-----BEGIN"), "tls-certificates" (a directory), "tls-verify-peer" ("on": clients
/// need a certificate too), "max-connections", "max-connections-per-peer", "handshake-timeout",
/// "idle-timeout" (seconds), "max-request", "max-in-flight", "max-in-flight-in-all", "max-memory",
/// "max-memory-per-connection", "max-option", "threads", "busy-poll". docs/options.md tells their
/// meanings and what holds when they are not set.
///
/// Returns 0; -EINVAL for a NULL, an unknown key, a value out of range, or too late. Any thread.
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_set(
    srv: *mut qblk_server,
    key: *const c_char,
    value: *const c_char,
) -> c_int {
    guard::call("qblk_server_set", || {
        // SAFETY: as the manual asks.
        unsafe {
            let server = server_arg(srv)?;
            let key = text_arg(key, "the key is NULL")?;
            let value = text_arg(value, "the value is NULL")?;
            Ok(server.set(&key.to_string_lossy(), value.to_bytes())?)
        }
    })
}

/// Export `dev` under `name`: qblk_server_add_export2() without options.
///
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_add_export(
    srv: *mut qblk_server,
    name: *const c_char,
    dev: *mut qblk,
    flags: u32,
) -> c_int {
    guard::call("qblk_server_add_export", || {
        // SAFETY: as the manual asks.
        unsafe { add_export(srv, name, dev, &Options::new(), flags) }
    })
}

/// Export `dev` under `name`, at any time, also while clients are served.
///
/// The name "" is what clients get that ask for no name. The name "*" is what they get that ask for
/// any name which no other export has. The server holds the device until the export is removed: `dev`
/// may be closed before. Clients can write if `dev` can, unless `flags` has QBLK_EXPORT_RDONLY. The
/// option "description" is a text for people; `options` may be NULL.
///
/// Clients are told of the device's dirty bitmaps as the meta contexts "qemu:dirty-bitmap:NAME"; the
/// option "bitmap" names one that they are told of alone, or ("") keeps them all to itself.
///
/// Returns 0; -EINVAL for a NULL, an unknown flag, a name of more than 4096 bytes; -EEXIST if the name
/// is taken; -ENOENT or -ESTALE for a bitmap that is not there or inconsistent; -EBADF for a device that is open for its description only, and for a server that was
/// stopped. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_add_export2(
    srv: *mut qblk_server,
    name: *const c_char,
    dev: *mut qblk,
    options: *const qblk_options,
    flags: u32,
) -> c_int {
    guard::call("qblk_server_add_export2", || {
        // SAFETY: as the manual asks.
        unsafe { add_export(srv, name, dev, &options_arg(options), flags) }
    })
}

/// # Safety
/// As the manual of [`qblk_server_add_export2`] asks.
unsafe fn add_export(
    srv: *mut qblk_server,
    name: *const c_char,
    dev: *mut qblk,
    options: &Options,
    flags: u32,
) -> Result<(), Fail> {
    // SAFETY: the caller's word.
    let (server, name, dev) =
        unsafe { (server_arg(srv)?, text_arg(name, "the name is NULL")?, dev.as_ref()) };
    let dev = dev.ok_or(Fail::Argument("the device handle is NULL"))?;
    if flags & !QBLK_EXPORT_RDONLY != 0 {
        return Err(Fail::Argument("flags has bits that mean nothing to this call"));
    }
    options.check(Use::Export)?;
    let image = image(dev)?.own_context()?;
    let description = options.get("description").unwrap_or_default().to_vec();
    let read_only = flags & QBLK_EXPORT_RDONLY != 0;
    let name = name.to_bytes().to_vec();
    let mut export = Export::new(name, description, image, dev.broken.clone(), read_only)?;
    if let Some(bitmap) = options.get("bitmap") {
        export.show_bitmap(bitmap)?;
    }
    Ok(server.add(export)?)
}

/// Export `name` no more. Its clients get the answers that are under way and are hung up on; then what
/// they wrote is flushed, and the server lets go of the device.
///
/// Returns 0; -EINVAL for a NULL; -ENOENT if there is no such export; what the flush answered. Any
/// thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_remove_export(
    srv: *mut qblk_server,
    name: *const c_char,
) -> c_int {
    guard::call("qblk_server_remove_export", || {
        // SAFETY: as the manual asks.
        unsafe {
            let (server, name) = (server_arg(srv)?, text_arg(name, "the name is NULL")?);
            Ok(server.remove(name.to_bytes())?)
        }
    })
}

/// Listen at an address, and serve whoever connects, in the background.
///
/// `uri` is "nbd+unix:///?socket=PATH", "nbd://127.0.0.1:0" (port 0: any that is free; no host: all
/// addresses), or "nbd+vsock://CID:PORT". May be called several times.
///
/// Returns 0; -EINVAL for a NULL and for what is no such URI; -EADDRINUSE, -EACCES and other codes of
/// the system; an error of the "tls-..." settings; -EBADF for a server that was stopped. Any thread.
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_listen(srv: *mut qblk_server, uri: *const c_char) -> c_int {
    guard::call("qblk_server_listen", || {
        // SAFETY: as the manual asks.
        unsafe {
            let (server, uri) = (server_arg(srv)?, text_arg(uri, "the URI is NULL")?);
            Ok(server.listen(uri.to_bytes())?)
        }
    })
}

/// Serve whoever connects to `fd`, a socket that listens already, as socket activation hands over.
///
/// The library works on a duplicate; `fd` stays the caller's. It is made non-blocking.
///
/// Returns 0; -EBADF if `fd` is none, and for a server that was stopped; -ENOTSOCK if it is no socket;
/// -EINVAL if it does not listen; an error of the "tls-..." settings. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_listen_fd(srv: *mut qblk_server, fd: c_int) -> c_int {
    guard::call("qblk_server_listen_fd", || {
        // SAFETY: as the manual asks.
        let server = unsafe { server_arg(srv) }?;
        Ok(server.listen_fd(duplicate(fd)?)?)
    })
}

/// Serve one client on `fd`, a connected socket, in the background.
///
/// The library works on a duplicate; the caller closes `fd`, or the client is not told when the
/// server hangs up. It is made blocking.
///
/// Returns 0; -EBADF if `fd` is none, and for a server that was stopped; -ENOTSOCK if it is no socket;
/// -EINVAL if it listens; -EAGAIN when a limit of connections is reached; an error of the "tls-..."
/// settings. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_serve_fd(srv: *mut qblk_server, fd: c_int) -> c_int {
    guard::call("qblk_server_serve_fd", || {
        // SAFETY: as the manual asks.
        let server = unsafe { server_arg(srv) }?;
        Ok(server.serve_fd(duplicate(fd)?)?)
    })
}

/// Tell where clients find the server: a URI, as text in `buf`, with the real port.
///
/// It is the first address that is listened at; with the name of the export if there is just one.
/// `size` is that of `buf` in bytes; `buf` may be NULL if it is 0.
///
/// Returns the length of the URI in bytes without the NUL, as snprintf() does: a result of `size` or
/// more means that it was cut. -ENOENT if the server listens nowhere; -EINVAL for a NULL. Any thread.
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_get_uri(
    srv: *mut qblk_server,
    buf: *mut c_char,
    size: usize,
) -> i64 {
    guard::call("qblk_server_get_uri", || {
        // SAFETY: as the manual asks.
        let server = unsafe { server_arg(srv) }?;
        if buf.is_null() && size > 0 {
            return Err(Fail::Argument("the buffer is NULL"));
        }
        let Some(uri) = server.uri() else {
            return Err(Fail::Code(-libc::ENOENT, "the server listens nowhere".into()));
        };
        // SAFETY: memory of `size` bytes, as the manual asks.
        unsafe { info::put_text(&uri, buf, size) };
        Ok(uri.len() as i64)
    })
}

/// Wait until the server is stopped (by qblk_server_stop() in another thread), for at most
/// `timeout_ms` milliseconds; -1 waits for ever.
///
/// Returns 0; -ETIMEDOUT; -EINVAL for a NULL. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_wait(srv: *mut qblk_server, timeout_ms: c_int) -> c_int {
    guard::call("qblk_server_wait", || {
        // SAFETY: as the manual asks.
        let server = unsafe { server_arg(srv) }?;
        let time = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        match server.wait(time) {
            true => Ok(()),
            false => Err(Fail::Code(-libc::ETIMEDOUT, "the server still serves".into())),
        }
    })
}

/// Stop: take no more clients and requests, let those that are under way finish for at most `drain_ms`
/// milliseconds (-1: for as long as it takes), hang up, and flush all exports.
///
/// Returns 0; what the first flush that failed answered; -ETIMEDOUT if a device did not answer a
/// request even then; -EINVAL for a NULL. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_stop(srv: *mut qblk_server, drain_ms: c_int) -> c_int {
    guard::call("qblk_server_stop", || {
        // SAFETY: as the manual asks.
        let server = unsafe { server_arg(srv) }?;
        let drain = u64::try_from(drain_ms).map_or(Duration::MAX, Duration::from_millis);
        Ok(server.stop(drain)?)
    })
}

/// Stop a server without draining, unless it is stopped, and free it. NULL does nothing.
///
/// Cannot fail. Any thread, as the last call on this server. In a child of fork it only frees.
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_server_free(srv: *mut qblk_server) {
    let _ = guard::guarded("qblk_server_free", None, || {
        if !srv.is_null() {
            // SAFETY: a server, and the last call on it, as the manual asks.
            unsafe { life::forget_server(srv) };
        }
        Ok(())
    });
}

impl qblk_server {
    /// A handle's content.
    pub(super) fn new(server: Server) -> Self {
        Self { server }
    }
    /// The server.
    pub(super) fn get(&self) -> &Server {
        &self.server
    }
    /// Free the memory and close nothing: in a child of fork.
    pub(super) fn abandon(self) {
        std::mem::forget(self.server);
    }
}

/// Receives what qblk_nbd_list() finds: the name and the description of an export, valid during the
/// call. Anything but 0 ends the list.
pub type qblk_nbd_list_fn = Option<
    unsafe extern "C" fn(
        opaque: *mut c_void,
        name: *const c_char,
        description: *const c_char,
    ) -> c_int,
>;

/// Ask the NBD server at `uri` for its exports, and call `fn` with `opaque` for each. `uri` may also be
/// that of a plugin ("plugin:PATH?KEY=VALUE"): what it offers are values of its setting "export".
///
/// `options` are those of qblk_open2() for NBD ("tls-ca", "nbd.timeout"...) or for the plugin; NULL: none.
/// The export's name in the URI does not matter.
///
/// Returns how many there are; -EACCES or -EPERM when the server does not tell; else as qblk_open2().
/// Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qblk_nbd_list(
    uri: *const c_char,
    options: *const qblk_options,
    r#fn: qblk_nbd_list_fn,
    opaque: *mut c_void,
) -> i64 {
    guard::call("qblk_nbd_list", || {
        // SAFETY: as the manual asks.
        let (uri, options) = unsafe { (text_arg(uri, "the URI is NULL")?, options_arg(options)) };
        let each = r#fn.ok_or(Fail::Argument("the function is NULL"))?;
        guard::alive()?;
        let found = crate::image::list_exports(uri.to_bytes(), &options)?;
        for e in &found {
            // A peer's text with a NUL in it was refused.
            let (name, text) = (to_c(&e.name), to_c(&e.description));
            // SAFETY: the program's own function, called as its type says.
            if unsafe { each(opaque, name.as_ptr(), text.as_ptr()) } != 0 {
                break;
            }
        }
        Ok(found.len() as i64)
    })
}

fn to_c(text: &[u8]) -> std::ffi::CString {
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    std::ffi::CString::new(&text[..end]).unwrap_or_else(|_| <&CStr>::default().into())
}
