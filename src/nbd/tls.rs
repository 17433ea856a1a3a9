//! TLS by rustls: settings from options, and a session that turns bytes into records and back
//! without doing I/O itself.

use std::io::IoSlice;
use std::path::PathBuf;

use super::uri::Address;
use crate::block::{Name, Result};

/// PEM: a file, or the text itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pem {
    /// A file's name.
    File(PathBuf),
    /// The text.
    Text(Vec<u8>),
}

/// What options say of TLS; the names are the options'.
#[derive(Clone, Debug, Default)]
pub struct TlsOptions {
    /// `tls-certificate`.
    pub certificate: Option<Pem>,
    /// `tls-key`.
    pub key: Option<Pem>,
    /// `tls-ca`.
    pub ca: Option<Pem>,
    /// `tls-verify-peer`. Clients: on unless set; servers: off unless set.
    pub verify_peer: Option<bool>,
    /// `tls-hostname` (clients).
    pub hostname: Option<String>,
}

/// A client's settings, checked.
#[derive(Clone)]
pub struct ClientTls {}

/// A server's settings, checked.
#[derive(Clone)]
pub struct ServerTls {}

impl ClientTls {
    /// Settings for talking to `to`.
    pub fn new(_options: &TlsOptions, _to: &Address) -> Result<Self> {
        todo!()
    }
    /// A session that has not begun.
    pub fn session(&self, _peer: &Name) -> Result<Session> {
        todo!()
    }
}

impl ServerTls {
    /// Settings: a certificate and a key are needed; a CA where peers are verified.
    pub fn new(_options: &TlsOptions) -> Result<Self> {
        todo!()
    }
    /// A session that has not begun.
    pub fn session(&self, _peer: &Name) -> Result<Session> {
        todo!()
    }
}

/// What [`Session::take`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// So many bytes of plain text, at least 1.
    Bytes(usize),
    /// None: feed it more.
    Nothing,
    /// The peer said that it sends no more.
    Closed,
}

/// A TLS session. It holds its lock for work in memory only; receiving and sending are the caller's,
/// and may be done by two threads at once.
pub struct Session {}

impl Session {
    /// Take in what came from the socket. It may have made output: see [`Session::seal`].
    pub fn feed(&self, _cipher: &[u8]) -> Result<()> {
        todo!()
    }
    /// Take out plain text that was received.
    pub fn take(&self, _out: &mut [u8]) -> Result<Taken> {
        todo!()
    }
    /// Put `plain` and whatever else is due into records, appended to `out`, to be sent in this order:
    /// who calls this from several threads keeps its own lock from here to the end of sending.
    pub fn seal(&self, _plain: &[IoSlice<'_>], _out: &mut Vec<u8>) -> Result<()> {
        todo!()
    }
    /// Say that nothing more will be sent, appended to `out`.
    pub fn close(&self, _out: &mut Vec<u8>) {
        todo!()
    }
    /// Whether the handshake is still going on.
    pub fn is_handshaking(&self) -> bool {
        todo!()
    }
}
