//! Taking clients: limits first, then a thread for each.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::*;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::conn::Conn;
use super::{Inner, Link, handshake, join, shown, socket, spawn};
use crate::log::{Level, log};
use crate::nbd::net::{self, Peer, Stream};

/// How long accepting rests when the process has no descriptors or threads left.
const REST: Duration = Duration::from_millis(50);

/// Accept from all listeners until the server stops.
pub fn run(inner: &Arc<Inner>) {
    while !inner.is_stopping() {
        inner.waker.reset();
        let listeners: Vec<Arc<OwnedFd>> =
            inner.state.lock().listeners.iter().map(|l| l.fd.clone()).collect();
        if inner.is_stopping() {
            break;
        }
        let mut polls: Vec<libc::pollfd> = [inner.waker.as_fd().as_raw_fd()]
            .into_iter()
            .chain(listeners.iter().map(|fd| fd.as_raw_fd()))
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        // SAFETY: as many pollfds as are told, all ours.
        unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, -1) };
        for (poll, listener) in polls.iter().skip(1).zip(&listeners) {
            if poll.revents == 0 || inner.is_stopping() {
                continue;
            }
            match net::accept(listener) {
                Ok(None) => {}
                Ok(Some((fd, peer))) => {
                    if let Err(e) = begin(inner, fd, peer) {
                        log(Level::Warn, format_args!("NBD server: a client was turned away: {e}"));
                    }
                }
                Err(e) => {
                    log(Level::Error, format_args!("NBD server: accepting: {e}"));
                    std::thread::sleep(REST);
                }
            }
        }
    }
    inner.state.lock().accepting = false;
    inner.changed.notify_all();
}

/// Serve a connected socket in a thread of its own.
pub fn begin(inner: &Arc<Inner>, fd: OwnedFd, peer: Peer) -> io::Result<()> {
    let name = shown(&peer, &fd);
    let (id, link) = {
        let mut state = inner.state.lock();
        // Whoever stops the server has the lock later, and sees the connection, or had it before.
        if inner.is_stopping() {
            return Err(io::Error::other("the server is stopped"));
        }
        let settings = inner.settings();
        let same = state.links.values().filter(|l| l.peer == peer).count();
        if state.links.len() >= settings.max_connections || same >= settings.max_per_peer {
            inner.stats.refused.fetch_add(1, Relaxed);
            return Err(io::Error::other(format!(
                "{} connections, {same} of them of {name}: the limits are {} and {}",
                state.links.len(),
                settings.max_connections,
                settings.max_per_peer
            )));
        }
        state.last_link += 1;
        let id = state.last_link;
        let link = Arc::new(Link {
            peer,
            socket: Mutex::new((Some(fd.as_raw_fd()), None)),
            given_up: AtomicBool::new(false),
        });
        state.links.insert(id, link.clone());
        (id, link)
    };
    inner.stats.connections.fetch_add(1, Relaxed);
    let server = inner.clone();
    let thread = spawn("qblk-nbd-conn", move || {
        let _listed = Listed(&server, id);
        serve(&server, fd, &link, name);
    })
    .inspect_err(|_| drop(Listed(inner, id)))?;
    let ended = {
        let mut state = inner.state.lock();
        state.threads.insert(id, thread);
        let state = &mut *state;
        let gone = |id: &u64| !state.links.contains_key(id);
        let ended: Vec<u64> = state.threads.keys().copied().filter(gone).collect();
        ended.iter().filter_map(|id| state.threads.remove(id)).collect::<Vec<_>>()
    };
    // They have nothing left to do but to end.
    ended.into_iter().for_each(join);
    Ok(())
}

/// A connection on the list; struck off when dropped.
struct Listed<'a>(&'a Inner, u64);

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.0.state.lock().links.remove(&self.1);
        self.0.changed.notify_all();
    }
}

/// The socket's number is known to the server; dropped before the socket is closed, for it may be
/// another's soon.
struct Known<'a>(&'a Link);

impl Drop for Known<'_> {
    fn drop(&mut self) {
        *self.0.socket.lock() = (None, None);
    }
}

fn serve(inner: &Arc<Inner>, fd: OwnedFd, link: &Arc<Link>, name: String) {
    let settings = inner.settings();
    let deadline = Instant::now() + settings.handshake_timeout;
    let mut stream = Stream::new(fd, format!("NBD client {name}").into(), Some(deadline));
    // Declared later, so dropped before.
    let known = Known(link);
    let agreed = match handshake::negotiate(inner, &mut stream) {
        Ok(Some(agreed)) => agreed,
        Ok(None) => return,
        Err(e) => return log(Level::Info, format_args!("{e}")),
    };
    link.socket.lock().1 = Some(agreed.export.clone());
    if agreed.export.removed.load(SeqCst) || inner.is_stopping() {
        return;
    }
    let socket = stream.into_parts();
    socket::set_idle(&socket.0, settings.idle_timeout);
    let conn = Conn::new(inner.clone(), link.clone(), agreed, socket, name);
    log(Level::Debug, format_args!("NBD client {}: connected", conn.peer));
    conn.serve();
    drop(known);
    log(Level::Debug, format_args!("NBD client {}: gone", conn.peer));
}
