//! The server: open devices as NBD exports, from inside the process.
//!
//! Each connection has a thread of its own, which answers what needs not wait (see `conn`), and all
//! connections of a server share a small pool for what must (see `pool`). Nothing a client does makes
//! a thread of another wait: pool threads never wait for a socket, and no lock is held while anything
//! is waited for but a client's own.
//!
//! Lock order: `Inner::state`, then none. Locks of a connection are told of in `conn`.

mod accept;
mod check;
mod conn;
mod export;
mod handshake;
mod input;
mod job;
mod memory;
mod pool;
mod read;
mod reply;
mod send;
mod settings;
mod socket;
mod stats;
mod status;

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::net::{self, Peer, Waker};
use super::tls::ServerTls;
use super::uri::{Address, Uri};
use crate::block::{Error, Result, quoted};
use crate::log::{Level, log};
use crate::nbd::proto::MAX_STRING;
pub use export::Export;
use pool::Pool;
pub use settings::Settings;
pub use stats::{Stats, Totals};

/// What is left to a thread that works for a client which was cut off, at most.
const GRACE: Duration = Duration::from_secs(2);
/// Longest description of an export, bytes.
const MAX_DESCRIPTION: usize = 4096;

/// An NBD server. Dropping it stops it, without draining.
pub struct Server(Arc<Inner>);

/// What the threads of a server share.
pub struct Inner {
    state: Mutex<State>,
    /// Something in `state` changed that somebody may wait for.
    changed: Condvar,
    /// Fixed when the first client may come.
    settings: OnceLock<(Settings, Option<ServerTls>)>,
    stopping: AtomicBool,
    pool: Arc<Pool>,
    /// Requests in the pool, of all connections.
    in_pool: AtomicUsize,
    /// Bytes that these count for.
    memory: AtomicUsize,
    stats: Stats,
    /// Wakes the accepting thread.
    waker: Waker,
}

#[derive(Default)]
struct State {
    settings: Settings,
    exports: BTreeMap<Vec<u8>, Arc<Export>>,
    listeners: Vec<Listener>,
    /// The thread that accepts runs.
    accepting: bool,
    links: BTreeMap<u64, Arc<Link>>,
    /// Threads of connections, by their numbers, until they are seen to have ended.
    threads: BTreeMap<u64, JoinHandle<()>>,
    acceptor: Option<JoinHandle<()>>,
    last_link: u64,
    /// Somebody stops it.
    stopper: bool,
    stopped: bool,
}

/// A listening socket.
struct Listener {
    fd: Arc<OwnedFd>,
    /// As a client would write it; `None` if it is not known.
    address: Option<Address>,
    /// TLS was asked for in the URI.
    tls: bool,
    /// The export that the URI named.
    export: Vec<u8>,
    /// We made it.
    own: bool,
    /// A path to remove at the end.
    path: Option<std::path::PathBuf>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.own {
            // Also in children of fork, which have it still: nobody is to wait there for ever.
            // SAFETY: the descriptor is open.
            unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
        }
        if let Some(path) = &self.path {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A connection, as the server sees it.
struct Link {
    peer: Peer,
    /// The socket while it is open, and what it is used for.
    socket: Mutex<(Option<RawFd>, Option<Arc<Export>>)>,
    /// There is no more time for what was asked for on it.
    given_up: AtomicBool,
}

impl Link {
    /// Shut the socket down, if it is open still. `how`: as for shutdown(2).
    fn shut(&self, how: i32) {
        if how == libc::SHUT_RDWR {
            self.given_up.store(true, SeqCst);
        }
        if let Some(fd) = self.socket.lock().0 {
            // SAFETY: open as long as it is there.
            unsafe { libc::shutdown(fd, how) };
        }
    }
}

impl Server {
    /// A server that listens nowhere yet.
    pub fn new() -> Result<Self> {
        Ok(Self(Arc::new(Inner {
            state: Mutex::default(),
            changed: Condvar::new(),
            settings: OnceLock::new(),
            stopping: AtomicBool::new(false),
            pool: Arc::default(),
            in_pool: AtomicUsize::new(0),
            memory: AtomicUsize::new(0),
            stats: Stats::default(),
            waker: Waker::new()?,
        })))
    }

    /// Set `key`, before the first client may come.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let mut state = self.0.state.lock();
        if self.0.settings.get().is_some() {
            return Err(Error::invalid("settings are made before the first listen"));
        }
        state.settings.set(key, value)
    }

    /// Export a device. The name "*" stands for every name that no other export has.
    pub fn add(&self, export: Export) -> Result<()> {
        if export.name.len() > MAX_STRING || export.description.len() > MAX_DESCRIPTION {
            return Err(Error::invalid(format!(
                "a name of {} bytes and a description of {}: {MAX_STRING} at most",
                export.name.len(),
                export.description.len()
            )));
        }
        if export.name.contains(&0) || export.description.contains(&0) {
            return Err(Error::invalid("a NUL byte in the name or the description of an export"));
        }
        let mut state = self.0.state.lock();
        if state.stopped || self.0.is_stopping() {
            return Err(stopped());
        }
        if state.exports.contains_key(&export.name) {
            return Err(Error::net(
                &"NBD server".into(),
                format!("export {}", quoted(&export.name)),
                libc::EEXIST,
            ));
        }
        state.exports.insert(export.name.clone(), Arc::new(export));
        let many = state.exports.len() > 1;
        state.exports.values().for_each(|e| e.is_one_of_many.store(many, Relaxed));
        Ok(())
    }

    /// Export it no more: clients that have it get the answers that are under way, and are hung up on.
    pub fn remove(&self, name: &[u8]) -> Result<()> {
        let mut state = self.0.state.lock();
        let Some(export) = state.exports.remove(name) else {
            return Err(Error::net(
                &"NBD server".into(),
                format!("export {}", quoted(name)),
                libc::ENOENT,
            ));
        };
        export.removed.store(true, SeqCst);
        let uses =
            |link: &Link| link.socket.lock().1.as_ref().is_some_and(|e| Arc::ptr_eq(e, &export));
        let begun = Instant::now();
        let mut cut = false;
        loop {
            let users: Vec<_> = state.links.values().filter(|l| uses(l)).cloned().collect();
            if users.is_empty() || begun.elapsed() > 2 * GRACE {
                break;
            }
            cut |= begun.elapsed() > GRACE;
            users.iter().for_each(|l| l.shut(if cut { libc::SHUT_RDWR } else { libc::SHUT_RD }));
            self.0.changed.wait_for(&mut state, Duration::from_millis(100));
        }
        drop(state);
        Export::let_go(export)
    }

    /// Listen at a URI, from now on.
    pub fn listen(&self, uri: &[u8]) -> Result<()> {
        let uri = Uri::parse(uri)?;
        self.begin()?;
        let tls = self.0.tls().is_some();
        if uri.tls && !tls {
            return Err(Error::invalid(format!("{uri}: the setting 'tls' is off")));
        }
        if self.0.is_stopping() {
            return Err(stopped());
        }
        for (fd, address) in net::listen(&uri.address)? {
            let path = match &address {
                Address::Unix(path) => Some(path.clone()),
                _ => None,
            };
            let (fd, export) = (Arc::new(fd), uri.export.clone());
            let tls = uri.tls || self.0.settings().encryption == settings::Encryption::Required;
            self.add_listener(Listener {
                fd,
                address: Some(address),
                tls,
                export,
                own: true,
                path,
            })?;
        }
        Ok(())
    }

    /// Accept clients from a socket that listens already.
    pub fn listen_fd(&self, fd: OwnedFd) -> Result<()> {
        socket::check(&fd, true)?;
        self.begin()?;
        let address = net::local_address(&fd);
        let tls = self.0.settings().encryption == settings::Encryption::Required;
        set_nonblocking(&fd, true)?;
        let fd = Arc::new(fd);
        self.add_listener(Listener { fd, address, tls, export: Vec::new(), own: false, path: None })
    }

    /// Serve one connected socket, in the background.
    pub fn serve_fd(&self, fd: OwnedFd) -> Result<()> {
        socket::check(&fd, false)?;
        self.begin()?;
        if self.0.is_stopping() {
            return Err(stopped());
        }
        set_nonblocking(&fd, false)?;
        net::tune(&fd);
        let peer = net::peer(&fd);
        accept::begin(&self.0, fd, peer).map_err(|e| {
            Error::net(
                &"NBD server".into(),
                "serving a connection",
                e.raw_os_error().unwrap_or(libc::EAGAIN),
            )
        })
    }

    /// Where a client finds it: the first address that is listened at, as a URI.
    pub fn uri(&self) -> Option<Vec<u8>> {
        let state = self.0.state.lock();
        let listener = state.listeners.iter().find(|l| l.address.is_some())?;
        let mut export = listener.export.clone();
        if export.is_empty() && state.exports.len() == 1 {
            export = state.exports.keys().next().cloned().unwrap_or_default();
            if export == b"*" {
                export.clear();
            }
        }
        let to = listener.address.clone()?;
        let uri = Uri { tls: listener.tls, export, ..Uri::to(to) };
        Some(uri.to_string().into_bytes())
    }

    /// Wait until it is stopped; `false` if `time` passed before (`None`: never).
    pub fn wait(&self, time: Option<Duration>) -> bool {
        let end = time.map(|t| Instant::now() + t);
        let mut state = self.0.state.lock();
        while !state.stopped {
            match end {
                Some(end) => {
                    if self.0.changed.wait_until(&mut state, end).timed_out() {
                        return state.stopped;
                    }
                }
                None => self.0.changed.wait(&mut state),
            }
        }
        true
    }

    /// Take no more clients and requests, let those under way finish for at most `drain`, hang up, and
    /// flush all exports. ETIMEDOUT if a device did not answer even then.
    pub fn stop(&self, drain: Duration) -> Result<()> {
        let inner = &self.0;
        inner.stopping.store(true, SeqCst);
        inner.waker.wake();
        let mut state = inner.state.lock();
        state.listeners.clear();
        if std::mem::replace(&mut state.stopper, true) {
            // Somebody is at it, and flushes.
            while !state.stopped {
                inner.changed.wait(&mut state);
            }
            return Ok(());
        }
        let begun = Instant::now();
        let end = begun.checked_add(drain).unwrap_or(begun + Duration::from_secs(86400 * 365));
        let mut hung = false;
        while !state.links.is_empty() || state.accepting {
            let now = Instant::now();
            hung = now > end + GRACE;
            if hung {
                break;
            }
            let how = if now >= end { libc::SHUT_RDWR } else { libc::SHUT_RD };
            // A client that is still negotiating has nothing under way.
            for link in state.links.values() {
                let negotiating = link.socket.lock().1.is_none();
                link.shut(if negotiating { libc::SHUT_RDWR } else { how });
            }
            let pause = Duration::from_millis(50).min(end.saturating_duration_since(now));
            inner.changed.wait_for(&mut state, pause.max(Duration::from_millis(5)));
        }
        let exports = std::mem::take(&mut state.exports);
        let mut threads: Vec<_> = std::mem::take(&mut state.threads).into_iter().collect();
        threads.retain(|(id, _)| !state.links.contains_key(id));
        let acceptor = state.acceptor.take().filter(|_| !state.accepting);
        drop(state);
        threads.into_iter().map(|t| t.1).chain(acceptor).for_each(join);
        inner.pool.end(!hung);
        let mut result = Ok(());
        for export in exports.into_values() {
            result = result.and(Export::let_go(export));
        }
        inner.state.lock().stopped = true;
        inner.changed.notify_all();
        if hung {
            let text = "stopping: a device did not answer, and its connections are left to it";
            return Err(Error::net(&"NBD server".into(), text, libc::ETIMEDOUT));
        }
        result
    }

    /// What it did so far.
    pub fn stats(&self) -> Totals {
        self.0.stats.totals()
    }

    /// Fix the settings.
    fn begin(&self) -> Result<()> {
        let state = self.0.state.lock();
        if self.0.settings.get().is_none() {
            let tls = state.settings.server_tls()?;
            let _ = self.0.settings.set((state.settings.clone(), tls));
        }
        Ok(())
    }

    fn add_listener(&self, listener: Listener) -> Result<()> {
        let mut state = self.0.state.lock();
        if self.0.is_stopping() {
            return Err(stopped());
        }
        if !state.accepting {
            let inner = self.0.clone();
            let thread = spawn("qblk-nbd-accept", move || accept::run(&inner)).map_err(|e| {
                let errno = e.raw_os_error().unwrap_or(libc::EAGAIN);
                Error::net(&"NBD server".into(), "making a thread", errno)
            })?;
            state.acceptor = Some(thread);
            state.accepting = true;
        }
        state.listeners.push(listener);
        self.0.waker.wake();
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.0.state.lock().stopped
            && let Err(e) = self.stop(Duration::ZERO)
        {
            log(Level::Error, format_args!("{e}"));
        }
    }
}

impl Inner {
    fn settings(&self) -> &Settings {
        static DEFAULT: OnceLock<Settings> = OnceLock::new();
        self.settings.get().map_or_else(|| DEFAULT.get_or_init(Settings::default), |s| &s.0)
    }

    fn tls(&self) -> Option<&ServerTls> {
        self.settings.get()?.1.as_ref()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Relaxed)
    }

    /// The export that a client means by `name`.
    fn find_export(&self, name: &[u8]) -> Option<Arc<Export>> {
        let state = self.state.lock();
        state.exports.get(name).or_else(|| state.exports.get(&b"*"[..])).cloned()
    }

    /// Whether a client may mean `export` by `name`.
    fn is_same(&self, name: &[u8], export: &Arc<Export>) -> bool {
        self.find_export(name).is_some_and(|e| Arc::ptr_eq(&e, export))
    }

    /// Names and descriptions.
    fn list(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let state = self.state.lock();
        let shown = |e: &Export| {
            let name = if e.name == b"*" { Vec::new() } else { e.name.clone() };
            (name, e.description.clone())
        };
        // What answers to every name is the default, unless another is.
        let default = state.exports.contains_key(&b""[..]);
        let all = state.exports.values().filter(|e| !(default && e.name == b"*"));
        all.map(|e| shown(e)).collect()
    }
}

/// Wait for a thread that is about to end, unless it is this one.
fn join(thread: JoinHandle<()>) {
    if thread.thread().id() != std::thread::current().id() {
        // What it may have panicked with was told when it did.
        let _ = thread.join();
    }
}

/// Run `work` in a thread of its own.
fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    crate::thread::spawn(name, Some(STACK), work)
}

/// Stack of a thread, bytes; only what is used of it costs memory.
const STACK: usize = 1 << 20;

fn set_nonblocking(fd: &OwnedFd, on: bool) -> Result<()> {
    net::set_nonblocking(fd, on).map_err(|e| Error::Os {
        op: "fcntl",
        file: "socket".into(),
        errno: e.raw_os_error().unwrap_or(libc::EBADF),
    })
}

fn stopped() -> Error {
    Error::BadHandle("the server is stopped".into())
}

/// For messages.
fn shown(peer: &Peer, fd: &OwnedFd) -> String {
    match peer {
        Peer::Ip(ip) => ip.to_string(),
        Peer::Uid(uid) => format!("of user {uid}"),
        Peer::Cid(cid) => format!("of virtual machine {cid}"),
        Peer::Unknown => format!("on descriptor {}", fd.as_raw_fd()),
    }
}
