//! The library's beginning and end: no start call and no end call for the program.
//!
//! An ELF constructor readies the library; an ELF destructor flushes and closes what the program
//! left open. The shared library is linked with `-z nodelete`, so both run once in a process,
//! however often it is loaded; in the static archive the constructor survives because the archive
//! is one object. Where neither holds (this crate used from Rust), [`ready`] is called by whatever
//! makes a handle.
//!
//! What stands on plugins is closed a little earlier, before anything of a plugin is taken down (see
//! `plugin::set_host`). Handles that plugins have opened from within a call come last: whoever stands above
//! needs them to flush, and closes them then.
//!
//! The registry of open handles is used by open, close and the end of the process only. Its lock is never
//! held across I/O, for a plugin may close a handle meanwhile, and never taken in a child of `fork`, where
//! its holder may have vanished.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::*};
use std::time::{Duration, Instant};

use super::*;
use crate::log::{Level, log};
use crate::nbd::server::Server;
use crate::plugin;

/// Addresses of the servers.
static SERVERS: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());
/// The open handles, by their addresses.
static OPEN: Mutex<BTreeMap<usize, State>> = Mutex::new(BTreeMap::new());
/// The process that the library was readied in; a child that no handler told us of has another.
static PROCESS: AtomicI32 = AtomicI32::new(0);
/// Threads that are closing a device, which is in [`OPEN`] no more.
static CLOSING: AtomicU32 = AtomicU32::new(0);

/// How far an open handle is.
#[derive(Clone, Copy, PartialEq)]
enum State {
    Open,
    /// The end of the process is at it, on another thread or further up on this one.
    Shutting,
    /// There is nothing left to do but to free it. (It stays listed: a tool that looks for leaks at the
    /// end must not take it for one.)
    Shut,
}

/// How long the end of the program waits for a thread that is opening or closing a device.
const PATIENCE: Duration = Duration::from_secs(1);

extern "C" fn constructor() {
    ready();
}

extern "C" fn destructor() {
    // A panic must not leave an extern "C" function.
    let _ = catch_unwind(AssertUnwindSafe(|| close_all(|_| true)));
}

/// The end of the process, before anything of a plugin is taken down.
extern "C" fn before_plugins_go(_: *mut c_void) {
    // As above.
    let _ = catch_unwind(AssertUnwindSafe(|| close_all(|dev| dev.image.is_on_plugin())));
}

// SAFETY: the sections hold pointers to functions of this type, which the loader calls (with
// arguments that a C function may ignore); neither function relies on anything but std.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;
// SAFETY: as above.
#[used]
#[unsafe(link_section = ".fini_array")]
static DESTRUCTOR: extern "C" fn() = destructor;

/// Ready the library; any number of times.
pub(super) fn ready() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: getpid has no conditions.
        PROCESS.store(unsafe { libc::getpid() }, Relaxed);
        // SAFETY: the handler stores to an atomic, which is safe in a forked child. Should there be
        // no memory for it, a child is still kept from the destructor's work by its process id.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        guard::install_hook();
        plugin::set_host(qblk_plugin_set_error_text as *const c_void, before_plugins_go);
    });
}

unsafe extern "C" fn in_child() {
    guard::set_forked();
}

/// Make a handle and remember it.
pub(super) fn adopt(image: Image) -> *mut qblk {
    adopt_as(image, plugin::is_inside())
}

/// Make a handle that a layer has opened on what it stands on.
pub(super) fn adopt_inner(image: Image) -> *mut qblk {
    adopt_as(image, true)
}

fn adopt_as(image: Image, inner: bool) -> *mut qblk {
    let broken = image.broken();
    let handle = Box::into_raw(Box::new(qblk { image, broken, inner }));
    OPEN.lock().insert(handle as usize, State::Open);
    handle
}

/// Make a server's handle and remember it.
pub(super) fn adopt_server(server: Server) -> *mut qblk_server {
    let handle = Box::into_raw(Box::new(qblk_server::new(server)));
    SERVERS.lock().insert(handle as usize);
    handle
}

/// Take a server's handle back from C, and free it.
///
/// # Safety
/// `srv` came from [`adopt_server`], and this is the last call on it.
pub(super) unsafe fn forget_server(srv: *mut qblk_server) {
    if guard::forked() {
        // Its threads are the parent's, and so is what its sockets say.
        // SAFETY: the caller's word.
        return unsafe { Box::from_raw(srv) }.abandon();
    }
    SERVERS.lock().remove(&(srv as usize));
    // SAFETY: the caller's word; the destructor can not find it any more.
    drop(unsafe { Box::from_raw(srv) });
}

/// A handle that C has given back, which the end of the program waits for.
pub(super) struct Closing(Box<qblk>);

impl Closing {
    /// Take a handle back from C. `None` if there is nothing to flush: in a child of `fork`, and
    /// after the destructor has done it.
    ///
    /// # Safety
    /// `dev` came from [`adopt`], and this is the last call on it.
    pub(super) unsafe fn begin(dev: *mut qblk) -> Option<Self> {
        let ours = !guard::forked() && take(dev as usize);
        // SAFETY: the caller's word; the destructor can not find it any more.
        let dev = unsafe { Box::from_raw(dev) };
        ours.then_some(Self(dev))
    }

    /// Flush and close.
    pub(super) fn finish(self) -> Result<(), guard::Fail> {
        struct Done;
        impl Drop for Done {
            fn drop(&mut self) {
                CLOSING.fetch_sub(1, SeqCst);
            }
        }
        let _done = Done;
        // What is broken is not flushed: its metadata may be half changed.
        tell::done("closing", tell::Of(guard::image(&self.0)?), "");
        Ok(self.0.image.close()?)
    }
}

/// Strike a handle off the list; whether there is something to flush in it.
fn take(handle: usize) -> bool {
    loop {
        let mut open = OPEN.lock();
        if open.get(&handle) != Some(&State::Shutting) {
            let found = open.remove(&handle) == Some(State::Open);
            CLOSING.fetch_add(u32::from(found), SeqCst);
            return found;
        }
        // The end of the process uses it, which will not take long.
        drop(open);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Flush and close what is still open and of the kind.
fn close_all(which: impl Fn(&qblk) -> bool) {
    // SAFETY: getpid has no conditions.
    if guard::forked() || PROCESS.load(Relaxed) != unsafe { libc::getpid() } {
        // A child owes its parent's devices nothing.
        return;
    }
    // First, so that what their clients wrote is flushed with the rest.
    if let Some(servers) = SERVERS.try_lock_for(PATIENCE) {
        for &address in servers.iter() {
            // SAFETY: in the registry, so not freed; freeing it waits for the lock that is held.
            let server = unsafe { &*(address as *const qblk_server) }.get();
            if let Err(e) = server.stop(PATIENCE) {
                log(Level::Error, format_args!("stopping a server at the program's end: {e}"));
            }
        }
    }
    for inner in [false, true] {
        let Some(open) = OPEN.try_lock_for(PATIENCE) else { return };
        let all: Vec<usize> = open.keys().copied().collect();
        drop(open);
        // Now they may be closed by whoever stands on them, or be new: each is looked at again.
        for &address in &all {
            shut(address, |dev| dev.inner == inner && which(dev));
        }
    }
    let begun = Instant::now();
    while CLOSING.load(SeqCst) > 0 && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Flush and close one that is still open, if it is of the kind. Threads may go on calling meanwhile.
fn shut(address: usize, which: impl FnOnce(&qblk) -> bool) {
    {
        let Some(mut open) = OPEN.try_lock_for(PATIENCE) else { return };
        let Some(state @ State::Open) = open.get_mut(&address) else { return };
        // SAFETY: in the registry, so not closed; closing it waits for the lock that is held.
        if !which(unsafe { &*(address as *const qblk) }) {
            return;
        }
        *state = State::Shutting;
    }
    /// Whatever happens: who closes it must not wait for ever.
    struct Mark(usize);
    impl Drop for Mark {
        fn drop(&mut self) {
            if let Some(state) = OPEN.lock().get_mut(&self.0) {
                *state = State::Shut;
            }
        }
    }
    let _mark = Mark(address);
    // SAFETY: closing it waits until it is marked as shut.
    let dev = unsafe { &*(address as *const qblk) };
    // What is broken must not write: its metadata may be half changed.
    if !dev.broken.load(Relaxed)
        && let Err(e) = dev.image.shut()
    {
        log(Level::Error, format_args!("closing at the program's end: {e}"));
    }
}
