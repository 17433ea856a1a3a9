//! The library's beginning and end: no start call and no end call for the program.
//!
//! An ELF constructor readies the library; an ELF destructor flushes and closes what the program
//! left open. The shared library is linked with `-z nodelete`, so both run once in a process,
//! however often it is loaded; in the static archive the constructor survives because the archive
//! is one object. Where neither holds (this crate used from Rust), [`ready`] is called by whatever
//! makes a handle.
//!
//! The registry of open handles is used by open, close and the destructor only. Its lock is never
//! held across I/O but at the end of the process, and never taken in a child of `fork`, where its
//! holder may have vanished.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering::*};
use std::time::{Duration, Instant};

use super::*;
use crate::log::{Level, log};
use crate::nbd::server::Server;

/// Addresses of the servers.
static SERVERS: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());
/// Addresses of the open handles.
static OPEN: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());
/// The process that the library was readied in; a child that no handler told us of has another.
static PROCESS: AtomicI32 = AtomicI32::new(0);
/// The destructor has closed what is in [`OPEN`]; changed under its lock.
static ENDED: AtomicBool = AtomicBool::new(false);
/// Threads that are closing a device, which is in [`OPEN`] no more.
static CLOSING: AtomicU32 = AtomicU32::new(0);

/// How long the end of the program waits for a thread that is opening or closing a device.
const PATIENCE: Duration = Duration::from_secs(1);

extern "C" fn constructor() {
    ready();
}

extern "C" fn destructor() {
    // A panic must not leave an extern "C" function.
    let _ = catch_unwind(AssertUnwindSafe(close_all));
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
    });
}

unsafe extern "C" fn in_child() {
    guard::set_forked();
}

/// Make a handle and remember it.
pub(super) fn adopt(image: Image, broken: Arc<AtomicBool>) -> *mut qblk {
    let handle = Box::into_raw(Box::new(qblk { image, broken }));
    OPEN.lock().insert(handle as usize);
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
        let ours = !guard::forked() && {
            let mut open = OPEN.lock();
            let found = open.remove(&(dev as usize)) && !ENDED.load(SeqCst);
            CLOSING.fetch_add(u32::from(found), SeqCst);
            found
        };
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

/// Flush and close what is still open.
fn close_all() {
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
    // Threads may go on calling while the process ends. Held to the end: qblk_close of a handle that
    // is being shut waits here, so that it is not freed meanwhile.
    let Some(open) = OPEN.try_lock_for(PATIENCE) else {
        return;
    };
    for &address in open.iter() {
        // SAFETY: in the registry, so not closed; closing it waits for the lock that is held.
        let dev = unsafe { &*(address as *const qblk) };
        // What is broken must not write: its metadata may be half changed.
        if dev.broken.load(Relaxed) {
            continue;
        }
        if let Err(e) = dev.image.shut() {
            log(Level::Error, format_args!("closing at the program's end: {e}"));
        }
    }
    // Whoever closes one of them now has nothing left to do but free it. They stay listed: a tool
    // that looks for leaks at the end must not take them for some.
    ENDED.store(true, SeqCst);
    drop(open);
    let begun = Instant::now();
    while CLOSING.load(SeqCst) > 0 && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
}
