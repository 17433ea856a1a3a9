//! What can be set of a server, by key.

use std::path::PathBuf;
use std::time::Duration;

use super::super::net::polling;
use super::super::tls::{Pem, ServerTls, TlsOptions};
use crate::block::{Error, Result, quoted};
use crate::image::{parse_seconds, parse_size};

/// Whether connections are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encryption {
    /// TLS is not offered.
    #[default]
    Off,
    /// Clients may ask for it.
    On,
    /// Nothing is served without.
    Required,
}

/// Settings of a server, as they are collected.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `tls`.
    pub encryption: Encryption,
    /// `tls-…`.
    pub tls: TlsOptions,
    /// `tls-certificates`, for what was not set by itself afterwards.
    pub certificates: Option<PathBuf>,
    /// `max-connections`: all together.
    pub max_connections: usize,
    /// `max-connections-per-peer`: of one address, user or virtual machine.
    pub max_per_peer: usize,
    /// `handshake-timeout`: until the export is chosen.
    pub handshake_timeout: Duration,
    /// `idle-timeout`: a client that neither sends nor takes anything for so long is cut off.
    pub idle_timeout: Option<Duration>,
    /// `max-request`: bytes of data in one request.
    pub max_request: u32,
    /// `max-in-flight`: requests of one connection that wait for a disk or a peer.
    pub max_in_flight: usize,
    /// `max-in-flight-in-all`: such requests of all connections together.
    pub max_in_all: usize,
    /// `max-memory`: bytes of data of such requests, of all connections together.
    pub max_memory: usize,
    /// `max-memory-per-connection`: the same, of one connection.
    pub max_memory_each: usize,
    /// `max-option`: bytes of payload of an option during negotiation.
    pub max_option: u32,
    /// `threads`: for what has to wait, shared by all connections.
    pub threads: usize,
    /// `busy-poll`: how long a client is waited for awake.
    pub busy_poll: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            encryption: Encryption::Off,
            tls: TlsOptions::default(),
            certificates: None,
            max_connections: 256,
            max_per_peer: 128,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: None,
            max_request: 32 << 20,
            max_in_flight: 64,
            max_in_all: 1024,
            max_memory: 64 << 20,
            max_memory_each: 8 << 20,
            max_option: 64 << 10,
            threads: 16,
            busy_poll: polling::DEFAULT,
        }
    }
}

/// The keys, with what they take.
const KEYS: &[(&str, &str)] = &[
    ("tls", "off, on or required"),
    ("tls-certificate", "a PEM file or PEM text"),
    ("tls-key", "a PEM file or PEM text"),
    ("tls-ca", "a PEM file or PEM text"),
    (
        "tls-certificates",
        "a directory with server-cert.pem, server-key.pem and, for tls-verify-peer, ca-cert.pem",
    ),
    ("tls-verify-peer", "on or off"),
    ("max-connections", "a number from 1 to 65536"),
    ("max-connections-per-peer", "a number from 1 to 65536"),
    ("handshake-timeout", "seconds from 0.001 to 86400"),
    ("idle-timeout", "seconds up to 31536000; 0 = none"),
    ("max-request", "a size from 64k to 64M"),
    ("max-in-flight", "a number from 1 to 4096"),
    ("max-in-flight-in-all", "a number from 1 to 65536"),
    ("max-memory", "a size from 1M to 64G"),
    ("max-memory-per-connection", "a size from 64k to 4G"),
    ("max-option", "a size from 8k to 1M"),
    ("threads", "a number from 1 to 256"),
    ("busy-poll", "microseconds from 0 to 1000; 0 = never"),
];

impl Settings {
    /// Set one of them.
    pub fn set(&mut self, key: &str, value: &[u8]) -> Result<()> {
        let key = key.replace('_', "-");
        let Some((_, expected)) = KEYS.iter().find(|(k, _)| *k == key) else {
            let all = KEYS.iter().map(|k| k.0).collect::<Vec<_>>().join(", ");
            return Err(Error::invalid(format!(
                "unknown setting {}; there are: {all}",
                quoted(key.as_bytes())
            )));
        };
        self.put(&key, value).ok_or_else(|| {
            // A key's text must not end up in a message.
            let found = if key.starts_with("tls-") { "another".into() } else { quoted(value) };
            Error::invalid(format!("setting '{key}': found {found}, expected {expected}"))
        })
    }

    fn put(&mut self, key: &str, value: &[u8]) -> Option<()> {
        let text = std::str::from_utf8(value).ok();
        let number = |max: usize| {
            text.and_then(|t| t.parse().ok()).filter(|n: &usize| (1..=max).contains(n))
        };
        let size = |min: u64, max: u64| {
            text.and_then(parse_size)
                .filter(|n| (min..=max).contains(n))
                .and_then(|n| usize::try_from(n).ok())
        };
        let pem = || (!value.is_empty()).then(|| Some(Pem::from_option(value)));
        match key {
            "tls" => {
                self.encryption = match text? {
                    "off" => Encryption::Off,
                    "on" => Encryption::On,
                    "required" => Encryption::Required,
                    _ => return None,
                }
            }
            "tls-certificate" => self.tls.certificate = pem()?,
            "tls-key" => self.tls.key = pem()?,
            "tls-ca" => self.tls.ca = pem()?,
            "tls-certificates" => {
                use std::os::unix::ffi::OsStrExt;
                self.certificates = Some(std::ffi::OsStr::from_bytes(value).into());
                (self.tls.certificate, self.tls.key, self.tls.ca) = (None, None, None);
            }
            "tls-verify-peer" => {
                self.tls.verify_peer = match text? {
                    "on" => Some(true),
                    "off" => Some(false),
                    _ => return None,
                }
            }
            "max-connections" => self.max_connections = number(65536)?,
            "max-connections-per-peer" => self.max_per_peer = number(65536)?,
            "handshake-timeout" => {
                let limits = Duration::from_millis(1)..=Duration::from_secs(86400);
                self.handshake_timeout = parse_seconds(text?).filter(|t| limits.contains(t))?;
            }
            "idle-timeout" => {
                let most = Duration::from_secs(31_536_000);
                let time = parse_seconds(text?).filter(|t| *t <= most)?;
                self.idle_timeout = (!time.is_zero()).then_some(time);
            }
            "max-request" => self.max_request = size(64 << 10, 64 << 20)? as u32,
            "max-in-flight" => self.max_in_flight = number(4096)?,
            "max-in-flight-in-all" => self.max_in_all = number(65536)?,
            "max-memory-per-connection" => self.max_memory_each = size(64 << 10, 4 << 30)?,
            "max-option" => self.max_option = size(8 << 10, 1 << 20)? as u32,
            "max-memory" => self.max_memory = size(1 << 20, 64 << 30)?,
            "threads" => self.threads = number(256)?,
            "busy-poll" => {
                let us: u32 = text?.parse().ok()?;
                self.busy_poll = (us <= polling::MOST).then(|| Duration::from_micros(us.into()))?;
            }
            _ => return None,
        }
        Some(())
    }

    /// The server's side of TLS, if it is wanted. Files are looked for and read now.
    pub fn server_tls(&self) -> Result<Option<ServerTls>> {
        if self.encryption == Encryption::Off {
            return Ok(None);
        }
        let mut tls = self.tls.clone();
        if let Some(dir) = &self.certificates {
            let found = TlsOptions::from_server_directory(dir)?;
            tls.certificate = tls.certificate.or(found.certificate);
            tls.key = tls.key.or(found.key);
            tls.ca = tls.ca.or(found.ca);
        }
        ServerTls::new(&tls).map(Some)
    }
}
