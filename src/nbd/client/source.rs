//! Where connections come from: an address, a socket that is connected already, a server that is
//! started for the purpose.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::child::Child;
use super::handshake::{self, Export};
use super::rx::Link;
use super::{Listed, Settings, Target, sys};
use crate::block::{Error, ErrorKind, Name, Result};
use crate::nbd::net::{self, Stream, Waker};
use crate::nbd::uri::Address;

/// Between two tries of a first connect.
const PAUSE: Duration = Duration::from_millis(20);
/// For so many pauses a server that was started and has hung up is waited for to end.
const LAST_WORDS: u32 = 10;
/// A server that was just started gets at least so long to listen.
const START: Duration = Duration::from_secs(10);
/// Connecting and negotiating may take so long, once there is a server.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// See the module's text.
pub(super) struct Source {
    from: From,
    /// The server that was started, if one was.
    child: Option<Mutex<Child>>,
    pub name: Name,
    pub export: Vec<u8>,
    pub settings: Settings,
}

enum From {
    /// As often as is wanted.
    Address(Address),
    /// Once.
    Socket(Mutex<Option<OwnedFd>>),
}

impl Source {
    /// Get ready, starting a server if that is asked for.
    pub(super) fn new(
        target: Target,
        export: &[u8],
        name: &Name,
        settings: Settings,
    ) -> Result<Self> {
        let (from, child) = match target {
            Target::Address(address) => (From::Address(address), None),
            Target::Socket(fd) => (From::Socket(Mutex::new(Some(fd))), None),
            Target::Command { argv, activation: false } => {
                let (child, fd) = Child::over_stdio(&argv, name)?;
                (From::Socket(Mutex::new(Some(fd))), Some(child))
            }
            Target::Command { argv, activation: true } => {
                let (child, path) = Child::activated(&argv, name)?;
                (From::Address(Address::Unix(path)), Some(child))
            }
        };
        let (name, export) = (name.clone(), export.to_vec());
        Ok(Self { from, child: child.map(Mutex::new), name, export, settings })
    }

    /// Whether there can be more than one connection.
    pub(super) fn is_repeatable(&self) -> bool {
        matches!(self.from, From::Address(_))
    }

    /// The first connection: tried again for as long as the settings say.
    pub(super) fn first(&self) -> Result<Link> {
        let stream = self.first_stream()?;
        self.negotiate(stream).map_err(|e| self.because_it_ended(e))
    }

    /// A server that was started and hangs up is about to end, as a rule: how tells more.
    fn because_it_ended(&self, e: Error) -> Error {
        let (Some(child), ErrorKind::Errno(libc::ECONNRESET)) = (&self.child, e.kind()) else {
            return e;
        };
        for _ in 0..LAST_WORDS {
            if let Some(how) = child.lock().ended() {
                let what = format!("the server that was started {how}");
                return Error::net(&self.name, what, libc::ECONNRESET);
            }
            std::thread::sleep(PAUSE);
        }
        e
    }

    /// The exports that the server has.
    pub(super) fn list(&self) -> Result<Vec<Listed>> {
        let mut stream = self.first_stream()?;
        handshake::list(&mut stream, &self.settings)
    }

    fn first_stream(&self) -> Result<Stream> {
        let begin = Instant::now();
        let patience = match self.child {
            Some(_) => self.settings.connect_timeout.max(START),
            None => self.settings.connect_timeout,
        };
        // A call's limit is one of opening, too: it is how long an answer may take.
        let limit = self.settings.timeout.map_or(HANDSHAKE, |t| t.min(HANDSHAKE));
        let end = begin.checked_add(patience).and_then(|t| t.checked_add(limit));
        loop {
            match self.connect(end, None) {
                Err(e) if begin.elapsed() < patience && may_come(&e) => {
                    self.still_there()?;
                    std::thread::sleep(PAUSE.min(patience.saturating_sub(begin.elapsed())));
                }
                stream => return stream,
            }
        }
    }

    /// A server that was started and has ended will never listen.
    fn still_there(&self) -> Result<()> {
        match self.child.as_ref().and_then(|c| c.lock().ended()) {
            Some(how) => {
                let what = format!("the server that was started {how}");
                Err(Error::net(&self.name, what, libc::ECONNREFUSED))
            }
            None => Ok(()),
        }
    }

    /// One more connection.
    pub(super) fn another(&self, end: Option<Instant>, cancel: Option<Arc<Waker>>) -> Result<Link> {
        let stream = self.connect(end, cancel)?;
        self.negotiate(stream)
    }

    fn connect(&self, end: Option<Instant>, cancel: Option<Arc<Waker>>) -> Result<Stream> {
        let fd = match &self.from {
            From::Address(address) => net::connect(address, &self.name, end, cancel.as_deref())?,
            From::Socket(once) => {
                let fd = once.lock().take().ok_or_else(|| {
                    let what = "a socket that was handed over can not be connected again";
                    Error::net(&self.name, what, libc::ENOTCONN)
                })?;
                net::tune(&fd);
                fd
            }
        };
        let mut stream = Stream::new(fd, self.name.clone(), end);
        if let Some(cancel) = cancel {
            stream.cancelled_by(cancel);
        }
        Ok(stream)
    }

    fn negotiate(&self, mut stream: Stream) -> Result<Link> {
        let export: Export = handshake::negotiate(&mut stream, &self.export, &self.settings)?;
        let (fd, tls) = stream.into_parts();
        sys::set_tick(&fd, tick(self.settings.timeout));
        Ok(Link { fd, tls, export, peer: self.name.clone() })
    }

    /// End the server that was started, if one was.
    pub(super) fn end(&self) {
        if let Some(child) = &self.child {
            child.lock().end();
        }
    }
}

/// How often a call that receives looks at its deadline when nothing comes. Where requests have none, the
/// flush of closing has.
fn tick(timeout: Option<Duration>) -> Option<Duration> {
    const MOST: Duration = Duration::from_secs(1);
    Some(timeout.map_or(MOST, |t| (t / 4).clamp(Duration::from_millis(1), MOST)))
}

/// Whether a server may yet come to listen there.
fn may_come(e: &Error) -> bool {
    matches!(
        e.kind(),
        ErrorKind::Errno(
            libc::ECONNREFUSED
                | libc::ENOENT
                | libc::ECONNRESET
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::EAGAIN
                | libc::ENODEV
        )
    )
}
