//! The client: an NBD export as a driver.
//!
//! Specification: doc/proto.md of the NBD project. A call runs on its caller's thread, like those of
//! files: it puts its request on a connection, and receives replies, its own or others', until its
//! own has come (`lane`). Replies are believed only as far as they are proven (`reply`), what
//! breaks the protocol ends the connection, and no call outlasts its time limit.
//!
//! The way down: `driver` cuts requests to what the wire takes; `pool` picks a connection, and
//! another one when that is lost (`revive`, `durable`); `lane` is a connection, `call` a call
//! and `slot` its request under way, `tx` and `rx` send and receive, `reply` reads replies, `cover` knows
//! which bytes have come. `source`, `child` and `handshake` make connections.

mod call;
mod child;
mod cover;
mod driver;
mod durable;
mod handshake;
mod lane;
mod pool;
mod reply;
mod revive;
mod rx;
mod slot;
mod source;
mod sys;
#[cfg(test)]
mod tests;
mod tx;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::proto::MAX_STRING;
use super::tls::ClientTls;
use super::uri::Address;
use crate::block::{Driver, Error, Name, Result};

/// How an export is to be used.
#[derive(Clone, Default)]
pub struct Settings {
    /// Write too.
    pub write: bool,
    /// How many connections, 1 to 64; `None`: 4 where the server says that several are safe. Where it
    /// does not say so there is one, whatever is asked for.
    pub connections: Option<u32>,
    /// How long a call may take from its beginning to its end; `None` = no limit.
    pub timeout: Option<Duration>,
    /// For how long a lost connection is tried to be made again.
    pub reconnect: Duration,
    /// For how long the first connection is tried again while nobody listens; zero: one try. The
    /// whole of connecting and negotiating may take as long as this and `timeout` together, or this and
    /// 30 s if `timeout` is longer.
    pub connect_timeout: Duration,
    /// How long a reply is waited for awake before sleeping; zero: not at all.
    pub busy_poll: Duration,
    /// Meta contexts to ask for beside `base:allocation` and `qemu:allocation-depth`.
    pub contexts: Vec<Vec<u8>>,
    /// TLS, which is then required; `None`: not used.
    pub tls: Option<ClientTls>,
}

/// Who to talk to.
pub enum Target {
    /// A server that listens.
    Address(Address),
    /// A socket that is connected already: one connection, which can not be made again.
    Socket(OwnedFd),
    /// A server to be started, and ended with the device.
    Command {
        /// The program, found as the shell does, and its arguments.
        argv: Vec<OsString>,
        /// Hand it a listening socket, as systemd does, rather than talk over its standard input and
        /// output.
        activation: bool,
    },
}

/// An export, as a server lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What it is opened by.
    pub name: Vec<u8>,
    /// What the server says of it, for people.
    pub description: Vec<u8>,
}

/// Open an export. `name` is what messages and [`Driver::name`] call it.
pub fn open(
    target: Target,
    export: &[u8],
    name: &Name,
    settings: Settings,
) -> Result<Box<dyn Driver>> {
    check(export, &settings, name)?;
    let source = source::Source::new(target, export, name, settings)?;
    Ok(Box::new(driver::Nbd::open(source)?))
}

/// Ask a server which exports it has.
pub fn list(target: Target, name: &Name, settings: Settings) -> Result<Vec<Listed>> {
    check(b"", &settings, name)?;
    source::Source::new(target, b"", name, settings)?.list()
}

fn check(export: &[u8], settings: &Settings, name: &Name) -> Result<()> {
    if settings.connections.is_some_and(|n| !(1..=64).contains(&n)) {
        return Err(Error::invalid(format!("{name}: an export takes 1 to 64 connections")));
    }
    let strings = || settings.contexts.iter().map(Vec::as_slice).chain([export]);
    if strings().any(|s| s.len() > MAX_STRING) || settings.contexts.len() > 64 {
        return Err(Error::invalid(format!(
            "{name}: names of exports and meta contexts have at most {MAX_STRING} bytes, and at most \
             64 contexts can be asked for"
        )));
    }
    Ok(())
}
