//! One TLS connection, in memory.

use std::io::{BufRead, IoSlice, Read, Write};

use parking_lot::{Mutex, MutexGuard};
use rustls::{AlertDescription, CertificateError, Connection};

use crate::block::{Error, Name, Result, quoted};

/// How much plain text is sealed before another thread may have the lock: four records, which are
/// copied out while they are still in the processor's cache.
const BATCH: usize = 64 << 10;
/// Pieces of plain text that go into one batch.
const PIECES: usize = 16;
/// What more is taken in while earlier ciphertext still waits for [`Session::take`].
const MAX_HELD: usize = 64 << 10;

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
pub struct Session {
    pub(super) state: Mutex<State>,
    peer: Name,
}

pub(super) struct State {
    pub(super) conn: Connection,
    /// Ciphertext that rustls has no room for yet: it keeps about 16 KiB of plain text.
    pub(super) held: Vec<u8>,
    /// How much of `held` is used up.
    used: usize,
    /// Why the session is over.
    failed: Option<Error>,
}

impl Session {
    pub(super) fn new(mut conn: Connection, peer: &Name) -> Self {
        // `seal` takes all out at once: there is nothing to bound.
        conn.set_buffer_limit(None);
        let state = State { conn, held: Vec::new(), used: 0, failed: None };
        Self { state: Mutex::new(state), peer: peer.clone() }
    }

    /// Take in what came from the socket. It may have made output: see [`Session::seal`]; so it may
    /// if it fails, then a word to the peer about the failure. Take all out before feeding again: what
    /// does not fit rustls is kept here, but no more than 64 KiB on top of what one call brought.
    pub fn feed(&self, cipher: &[u8]) -> Result<()> {
        let state = &mut *self.state.lock();
        if state.held.is_empty() {
            let used = state.ingest(cipher, &self.peer)?;
            state.held.extend_from_slice(&cipher[used..]);
            return Ok(());
        }
        let used = std::mem::take(&mut state.used);
        state.held.drain(..used);
        if state.held.len().saturating_add(cipher.len()) > MAX_HELD {
            let what = "TLS: fed with more before what had come was taken";
            return Err(Error::Internal(what.into()));
        }
        state.held.extend_from_slice(cipher);
        state.refill(&self.peer)
    }

    /// Take out plain text that was received. Plain text that came before a failure is still given
    /// out, then the failure.
    pub fn take(&self, out: &mut [u8]) -> Result<Taken> {
        let state = &mut *self.state.lock();
        let mut filled = 0;
        while filled < out.len() {
            match state.conn.reader().read(&mut out[filled..]) {
                // The end, which comes again next time.
                Ok(0) if filled == 0 => return Ok(Taken::Closed),
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(_) if state.held.is_empty() || state.failed.is_some() => break,
                // A failure is told when all before it has been taken.
                Err(_) => drop(state.refill(&self.peer)),
            }
        }
        match (&state.failed, filled) {
            (Some(e), 0) if !out.is_empty() => Err(e.clone()),
            (_, 0) => Ok(Taken::Nothing),
            (_, n) => Ok(Taken::Bytes(n)),
        }
    }

    /// Put `plain` and whatever else is due into records, appended to `out`, to be sent in this order:
    /// who calls this from several threads keeps its own lock from here to the end of sending. The
    /// session's lock is given to whoever waits for it every 64 KiB.
    pub fn seal(&self, plain: &[IoSlice<'_>], out: &mut Vec<u8>) -> Result<()> {
        let mut state = self.state.lock();
        let total: usize = plain.iter().map(|piece| piece.len()).sum();
        if total > 0 {
            if let Some(e) = &state.failed {
                return Err(e.clone());
            }
            if state.conn.is_handshaking() {
                return Err(Error::Internal("TLS: sending before the handshake is over".into()));
            }
            // Records of 16 KiB have a header of 5 bytes, a nonce of up to 8, a type and a tag of 16.
            out.reserve(total + (total >> 14).saturating_add(2) * 32);
        }
        let mut rest = Cursor { plain, at: 0 };
        loop {
            let mut batch = [IoSlice::new(&[]); PIECES];
            let count = rest.batch(&mut batch);
            if count == 0 {
                break;
            }
            let before = out.len();
            let n = state.conn.writer().write_vectored(&batch[..count]).unwrap_or(0);
            state.drain(out);
            // TLS 1.2 has no new keys to offer when the old ones have served their time: rustls then
            // drops what it is given and says so to its log only.
            if n == 0 || out.len() - before < n {
                let what = "TLS: the keys of this connection are used up";
                let e = Error::net(&self.peer, what, libc::ECONNRESET);
                state.failed.get_or_insert_with(|| e.clone());
                return Err(e);
            }
            // It may have stopped short, to change keys.
            rest.advance(n);
            MutexGuard::bump(&mut state);
        }
        state.drain(out);
        Ok(())
    }

    /// Say that nothing more will be sent, appended to `out`.
    pub fn close(&self, out: &mut Vec<u8>) {
        let mut state = self.state.lock();
        state.conn.send_close_notify();
        state.drain(out);
    }

    /// Whether the handshake is still going on.
    pub fn is_handshaking(&self) -> bool {
        self.state.lock().conn.is_handshaking()
    }

    /// Whether this end is the client.
    pub fn is_client(&self) -> bool {
        matches!(self.state.lock().conn, Connection::Client(_))
    }
}

impl State {
    /// Give rustls as much as it takes: how many bytes. It takes all unless there is plain text.
    fn ingest(&mut self, cipher: &[u8], peer: &Name) -> Result<usize> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        let mut rest = cipher;
        // Without bytes `read_tls` would believe that the peer had hung up.
        while !rest.is_empty() {
            match self.conn.read_tls(&mut rest) {
                // What comes after the peer said that nothing would come is dropped.
                Ok(0) => return Ok(cipher.len()),
                Ok(_) => {}
                Err(_) if self.has_plain() => break,
                Err(e) => {
                    let e = rustls::Error::General(e.to_string());
                    return Err(self.fail(&e, peer));
                }
            }
            if let Err(e) = self.conn.process_new_packets() {
                return Err(self.fail(&e, peer));
            }
        }
        Ok(cipher.len() - rest.len())
    }

    /// Give rustls what was held back.
    fn refill(&mut self, peer: &Name) -> Result<()> {
        let mut held = std::mem::take(&mut self.held);
        let result = self.ingest(held.get(self.used..).unwrap_or(&[]), peer);
        match result {
            Ok(n) if self.used + n < held.len() => self.used += n,
            // Used up; or the session is over.
            _ => {
                held.clear();
                self.used = 0;
            }
        }
        self.held = held;
        result.map(drop)
    }

    fn has_plain(&mut self) -> bool {
        self.conn.reader().fill_buf().is_ok_and(|plain| !plain.is_empty())
    }

    /// Append all records that are due.
    fn drain(&mut self, out: &mut Vec<u8>) {
        // Writing to memory does not fail; it takes some calls if there are many records.
        while self.conn.wants_write() && self.conn.write_tls(out).is_ok_and(|n| n > 0) {}
    }

    fn fail(&mut self, e: &rustls::Error, peer: &Name) -> Error {
        let (what, errno) = explain(e, self.conn.is_handshaking());
        let e = Error::net(peer, what, errno);
        self.failed = Some(e.clone());
        e
    }
}

/// Where in some pieces of plain text one is.
struct Cursor<'a> {
    plain: &'a [IoSlice<'a>],
    /// Used of the first piece.
    at: usize,
}

impl<'a> Cursor<'a> {
    /// The next pieces, [`BATCH`] bytes at most: how many.
    fn batch(&self, pieces: &mut [IoSlice<'a>; PIECES]) -> usize {
        let (mut left, mut count, mut at) = (BATCH, 0, self.at);
        for piece in self.plain {
            let piece = piece.get(at..).unwrap_or(&[]);
            at = 0;
            if left == 0 || count == PIECES {
                break;
            }
            if !piece.is_empty() {
                let piece = &piece[..piece.len().min(left)];
                pieces[count] = IoSlice::new(piece);
                (left, count) = (left - piece.len(), count + 1);
            }
        }
        count
    }

    fn advance(&mut self, mut n: usize) {
        while let Some(first) = self.plain.first() {
            let left = first.len().saturating_sub(self.at);
            if n < left {
                self.at += n;
                return;
            }
            n -= left;
            (self.plain, self.at) = (&self.plain[1..], 0);
        }
    }
}

/// A failure in words, and its error number.
fn explain(e: &rustls::Error, handshaking: bool) -> (String, i32) {
    use AlertDescription as A;
    use rustls::Error as E;
    let text = quoted(e.to_string().as_bytes());
    match e {
        E::InvalidCertificate(CertificateError::UnknownIssuer) => {
            let what = "the peer's certificate is not from a CA that we trust (tls-ca)";
            (format!("TLS: {what}: {text}"), libc::EACCES)
        }
        E::InvalidCertificate(_) => {
            (format!("TLS: the peer's certificate is not accepted: {text}"), libc::EACCES)
        }
        E::NoCertificatesPresented => {
            ("TLS: the peer showed no certificate, expected one".into(), libc::EACCES)
        }
        E::AlertReceived(A::CertificateRequired) => {
            let what = "the peer wants a certificate, and we showed none (tls-certificate)";
            (format!("TLS: {what}"), libc::EACCES)
        }
        E::AlertReceived(
            alert @ (A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateRevoked
            | A::CertificateExpired
            | A::CertificateUnknown
            | A::UnknownCA
            | A::AccessDenied),
        ) => (format!("TLS: the peer does not accept our certificate: {alert:?}"), libc::EACCES),
        E::AlertReceived(alert) => (format!("TLS: the peer gave up: {alert:?}"), libc::EPROTO),
        E::InvalidMessage(_) if handshaking => {
            (format!("TLS: what the peer sent is no TLS handshake: {text}"), libc::EPROTO)
        }
        _ => (format!("TLS: {text}"), libc::EPROTO),
    }
}
