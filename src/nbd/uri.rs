//! NBD URIs.
//!
//! Specification: doc/uri.md of the NBD project ("NBD URI format"), RFC 3986 for the rest. Schemes
//! for vsock and the parameters `tls-certificates` and `tls-psk-file` are what libnbd made of it. An
//! unknown parameter is refused: one that is misspelt must not switch a check off in silence.

use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::net::Ipv6Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::proto::MAX_STRING;
use crate::block::{Error, Result, quoted};

/// The port that IANA gave to NBD.
pub const DEFAULT_PORT: u16 = 10809;
/// The context id of the host of a virtual machine.
const CID_HOST: u32 = 2;
/// Longest path of a Unix socket: `sun_path` without the NUL that portable programs put behind it.
pub const MAX_SOCKET_PATH: usize = 107;

/// What is at the other end of a URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// TCP: a host name or address (IPv6 without brackets), and a port.
    Tcp {
        /// Name or address; empty means this host when connecting, all addresses when listening.
        host: String,
        /// 10809 if the URI has none.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
    /// A socket between a virtual machine and its host.
    Vsock {
        /// Context id; 2, the host, if the URI has none.
        cid: u32,
        /// 10809 if the URI has none.
        port: u32,
    },
}

/// For people: `host:port`, the path of a socket, `vsock:cid:port`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

/// An NBD URI, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// `nbds…`: TLS is required.
    pub tls: bool,
    /// Who to talk to.
    pub address: Address,
    /// Name of the export, percent-decoded; empty for the default one.
    pub export: Vec<u8>,
    /// User name (`nbds://user@host`), percent-decoded: for PSK.
    pub user: Option<String>,
    /// `tls-certificates=DIR`.
    pub tls_certificates: Option<PathBuf>,
    /// `tls-psk-file=FILE`.
    pub tls_psk_file: Option<PathBuf>,
    /// `tls-hostname=NAME`.
    pub tls_hostname: Option<String>,
    /// `tls-verify-peer=…`.
    pub tls_verify_peer: Option<bool>,
}

/// A part of a URI, or what is wrong with it.
type Said<T> = std::result::Result<T, String>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Transport {
    Tcp,
    Unix,
    Vsock,
}

const SCHEMES: [(&str, bool, Transport); 6] = [
    ("nbd", false, Transport::Tcp),
    ("nbds", true, Transport::Tcp),
    ("nbd+unix", false, Transport::Unix),
    ("nbds+unix", true, Transport::Unix),
    ("nbd+vsock", false, Transport::Vsock),
    ("nbds+vsock", true, Transport::Vsock),
];

const PARAMETERS: &str =
    "socket, tls-certificates, tls-hostname, tls-psk-file, tls-type, tls-verify-peer";

/// The scheme that `text` begins with, and what stands behind its colon.
fn scheme(text: &[u8]) -> Option<(&'static str, bool, Transport, &[u8])> {
    let colon = text.iter().take(16).position(|b| *b == b':')?;
    let (name, rest) = (&text[..colon], &text[colon + 1..]);
    let (known, tls, transport) =
        SCHEMES.iter().find(|(known, ..)| known.as_bytes().eq_ignore_ascii_case(name))?;
    Some((known, *tls, *transport, rest))
}

impl Uri {
    /// Whether a name begins like an NBD URI (`nbd:`, `nbds+unix:`, …, in any case of letters).
    pub fn is_one(name: &[u8]) -> bool {
        scheme(name).is_some()
    }

    /// The URI of the default export at an address, without TLS.
    pub fn to(address: Address) -> Self {
        Self {
            tls: false,
            address,
            export: Vec::new(),
            user: None,
            tls_certificates: None,
            tls_psk_file: None,
            tls_hostname: None,
            tls_verify_peer: None,
        }
    }

    /// A parameter that is there and says something of TLS.
    pub fn tls_parameter(&self) -> Option<&'static str> {
        [
            ("tls-certificates", self.tls_certificates.is_some()),
            ("tls-psk-file", self.tls_psk_file.is_some()),
            ("tls-hostname", self.tls_hostname.is_some()),
            ("tls-verify-peer", self.tls_verify_peer.is_some()),
        ]
        .iter()
        .find_map(|(key, there)| there.then_some(*key))
    }

    /// Read a URI. All that can be wrong with one is [`Error::Invalid`].
    pub fn parse(text: &[u8]) -> Result<Self> {
        let bad = |what: String| Error::invalid(format!("NBD URI {}: {what}", quoted(text)));
        let Some((name, tls, transport, rest)) = scheme(text) else {
            let schemes = SCHEMES.map(|(name, ..)| name).join(":, ");
            return Err(bad(format!("unknown scheme, expected one of {schemes}:")));
        };
        if let Some(at) = rest.iter().position(|b| *b == b'#') {
            let what = format!("found a fragment {}, expected none", quoted(&rest[at..]));
            return Err(bad(format!("{what} ('#' in a name is written %23)")));
        }
        let (rest, query) = split(rest, b'?');
        let (authority, path) = match rest.strip_prefix(b"//") {
            Some(rest) => {
                let slash = rest.iter().position(|b| *b == b'/').unwrap_or(rest.len());
                rest.split_at(slash)
            }
            // RFC 3986: a URI need not have an authority.
            None if rest.is_empty() && query.is_some() || rest.starts_with(b"/") => (&[][..], rest),
            None => return Err(bad(old_form(name, transport, rest))),
        };

        let (user, host_port) = match authority.iter().rposition(|b| *b == b'@') {
            Some(at) => (&authority[..at], &authority[at + 1..]),
            None => (&[][..], authority),
        };
        if user.contains(&b':') {
            // It is not repeated: a message is no place for it either.
            let what = "found a password before '@', expected only a user name".to_owned();
            return Err(Error::invalid(format!("NBD URI: {what} (':' in one is written %3A)")));
        }
        let export = path.strip_prefix(b"/").unwrap_or(path);
        let export = decode(export, "the export name").map_err(bad)?;
        if export.len() > MAX_STRING {
            let what = format!("the export name has {} bytes", export.len());
            return Err(bad(format!("{what}, expected at most {MAX_STRING}")));
        }
        // The address is told below.
        let mut uri = Self { tls, export, ..Self::to(Address::Unix(PathBuf::new())) };
        let socket = uri.set_parameters(query.unwrap_or(b"")).map_err(bad)?;
        if transport == Transport::Unix {
            if !authority.is_empty() {
                let what = format!("found {} behind {name}://", quoted(authority));
                return Err(bad(format!("{what}, expected nothing: the socket is ?socket=PATH")));
            }
            let path = socket.ok_or_else(|| bad("expected ?socket=PATH, found none".into()))?;
            check_socket_path(&path).map_err(bad)?;
            uri.address = Address::Unix(path);
            return Ok(uri);
        }
        if socket.is_some() {
            return Err(bad(format!("socket= has no use with {name}://, expected {name}+unix://")));
        }
        if !user.is_empty() {
            uri.user = Some(decode_text(user, "the user name").map_err(bad)?);
        }
        uri.address = match transport {
            Transport::Vsock => vsock(host_port).map_err(bad)?,
            _ => tcp(host_port).map_err(bad)?,
        };
        Ok(uri)
    }

    /// Take the settings of a query; tells the value of `socket`.
    fn set_parameters(&mut self, query: &[u8]) -> Said<Option<PathBuf>> {
        let mut socket = None;
        let mut seen = Vec::new();
        for parameter in query.split(|b| *b == b'&').filter(|p| !p.is_empty()) {
            let (key, value) = split(parameter, b'=');
            let key = decode(key, "a parameter's name")?;
            let key = String::from_utf8_lossy(&key).into_owned();
            let what = format!("parameter {}", quoted(key.as_bytes()));
            let value = decode(value.unwrap_or(b""), &what)?;
            let shown = quoted(&value);
            let path = |value: Vec<u8>| PathBuf::from(OsString::from_vec(value));
            if value.is_empty() {
                return Err(format!("{what}: found no value, expected {key}=…"));
            }
            if seen.contains(&key) {
                return Err(format!("{what}: found twice, expected once"));
            }
            match key.as_str() {
                "socket" => socket = Some(path(value)),
                "tls-certificates" => self.tls_certificates = Some(path(value)),
                "tls-psk-file" => self.tls_psk_file = Some(path(value)),
                "tls-hostname" => {
                    let name = String::from_utf8(value);
                    self.tls_hostname =
                        Some(name.map_err(|_| format!("{what}: {shown}: no text"))?);
                }
                "tls-verify-peer" => {
                    self.tls_verify_peer = Some(match value.as_slice() {
                        b"1" | b"on" | b"true" => true,
                        b"0" | b"off" | b"false" => false,
                        _ => {
                            let expected = "1, on, true, 0, off or false";
                            return Err(format!("{what}: found {shown}, expected {expected}"));
                        }
                    });
                }
                // The only kind there is here, so that naming it changes nothing.
                "tls-type" if value == b"x509" => {}
                "tls-type" => return Err(format!("{what}: found {shown}, expected x509")),
                _ => return Err(format!("unknown {what}, expected one of {PARAMETERS}")),
            }
            seen.push(key);
        }
        Ok(socket)
    }
}

/// Refuse what can not be the path of a socket.
pub(super) fn check_socket_path(path: &Path) -> Said<()> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > MAX_SOCKET_PATH {
        let what = format!("the path of the Unix socket has {} bytes", bytes.len());
        return Err(format!("{what}, expected at most {MAX_SOCKET_PATH}"));
    }
    if bytes.is_empty() {
        return Err("found an empty path for the Unix socket, expected one with a name".into());
    }
    if bytes.contains(&0) {
        return Err("found a NUL byte in the path of the Unix socket, expected none".into());
    }
    Ok(())
}

/// What is before the first `at`, and what is behind it.
fn split(text: &[u8], at: u8) -> (&[u8], Option<&[u8]>) {
    match text.iter().position(|b| *b == at) {
        Some(i) => (&text[..i], Some(&text[i + 1..])),
        None => (text, None),
    }
}

fn hex(digit: Option<&u8>) -> Option<u8> {
    (*digit? as char).to_digit(16).map(|d| d as u8)
}

/// Undo percent-encoding.
fn decode(text: &[u8], what: &str) -> Said<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(&b) = text.get(at) {
        at += 1;
        let mut byte = b;
        if b == b'%' {
            let (Some(high), Some(low)) = (hex(text.get(at)), hex(text.get(at + 1))) else {
                let found = quoted(&text[at - 1..text.len().min(at + 2)]);
                return Err(format!("{what}: found {found}, expected % and two hex digits"));
            };
            byte = high << 4 | low;
            at += 2;
        }
        if byte == 0 {
            return Err(format!("{what}: found a NUL byte, expected none"));
        }
        out.push(byte);
    }
    Ok(out)
}

fn decode_text(text: &[u8], what: &str) -> Said<String> {
    let bytes = decode(text, what)?;
    String::from_utf8(bytes).map_err(|e| format!("{what}: {}: not UTF-8", quoted(e.as_bytes())))
}

/// A host and what is behind its colon, if there is any.
fn host_and_port(text: &[u8]) -> Said<(String, Option<&[u8]>)> {
    if let Some(rest) = text.strip_prefix(b"[") {
        let (literal, Some(behind)) = split(rest, b']') else {
            return Err(format!("host {}: found '[', expected a ']' behind it", quoted(text)));
        };
        let literal = decode_text(literal, "the host")?;
        // What stands behind '%' is an interface, which only the system can tell.
        let (address, zone) = match literal.split_once('%') {
            Some((address, zone)) => (address, Some(zone)),
            None => (literal.as_str(), None),
        };
        if address.parse::<Ipv6Addr>().is_err() || zone.is_some_and(|zone| !is_host(zone)) {
            let found = quoted(literal.as_bytes());
            return Err(format!("found {found} in brackets, expected an IPv6 address"));
        }
        let port = match behind {
            b"" => None,
            [b':', port @ ..] => Some(port),
            _ => return Err(format!("found {} behind ']', expected :PORT", quoted(behind))),
        };
        return Ok((literal, port));
    }
    let (host, port) = split(text, b':');
    if port.is_some_and(|port| port.contains(&b':')) {
        let found = quoted(text);
        return Err(format!("found host {found}, expected an IPv6 address to be in brackets"));
    }
    let host = decode_text(host, "the host")?;
    if !host.is_empty() && !is_host(&host) {
        let found = quoted(host.as_bytes());
        return Err(format!("found host {found}, expected letters, digits and .-_~ only"));
    }
    Ok((host, port))
}

fn is_host(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(is_unreserved)
}

fn tcp(text: &[u8]) -> Said<Address> {
    let (host, port) = host_and_port(text)?;
    // Port 0 is for listening: any that is free.
    Ok(Address::Tcp { host, port: number(port, DEFAULT_PORT, 0, u16::MAX.into())? })
}

fn vsock(text: &[u8]) -> Said<Address> {
    let (cid, port) = split(text, b':');
    let found = || format!("found context id {}, expected a number", quoted(cid));
    // libnbd writes context ids as they are, some write them like IPv6 addresses.
    let digits = cid.strip_prefix(b"[").and_then(|c| c.strip_suffix(b"]")).unwrap_or(cid);
    let cid = match digits {
        b"" => CID_HOST,
        digits => digits_of(digits).and_then(|n| u32::try_from(n).ok()).ok_or_else(found)?,
    };
    Ok(Address::Vsock { cid, port: number(port, DEFAULT_PORT.into(), 0, u32::MAX)? })
}

/// A port; one that is empty counts as none (RFC 3986, 3.2.3).
fn number<T: TryFrom<u64>>(port: Option<&[u8]>, default: T, min: u32, max: u32) -> Said<T> {
    let Some(port) = port.filter(|p| !p.is_empty()) else { return Ok(default) };
    let number = digits_of(port).filter(|n| (u64::from(min)..=u64::from(max)).contains(n));
    number.and_then(|n| T::try_from(n).ok()).ok_or_else(|| {
        format!("found port {}, expected a number from {min} to {max}", quoted(port))
    })
}

/// A number of decimal digits only: `parse` would allow a sign.
fn digits_of(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Say how a name in the old form of QEMU (`nbd:host:port:exportname=x`, `nbd:unix:path`) is
/// written as a URI.
fn old_form(name: &str, transport: Transport, rest: &[u8]) -> String {
    let mut uri = Uri::to(Address::Unix(PathBuf::new()));
    uri.tls = name.starts_with("nbds");
    const MARK: &[u8] = b":exportname=";
    let mut rest = rest;
    if let Some(at) = rest.windows(MARK.len()).position(|w| w == MARK) {
        uri.export = rest[at + MARK.len()..].to_vec();
        rest = &rest[..at];
    }
    let address = match rest.strip_prefix(b"unix:") {
        Some(path) => {
            let path = PathBuf::from(OsString::from_vec(path.to_vec()));
            check_socket_path(&path).map(|()| Address::Unix(path))
        }
        None => tcp(rest),
    };
    match (transport, address) {
        (Transport::Tcp, Ok(address)) if !rest.is_empty() => {
            uri.address = address;
            let text = uri.to_string();
            let cut = text.len() > 1024;
            let text = text.get(..text.len().min(1024)).unwrap_or("");
            format!("found the old form of QEMU, expected {text}{}", if cut { "…" } else { "" })
        }
        _ => format!("expected {name}://"),
    }
}

fn is_unreserved(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"-._~".contains(&b)
}

/// Bytes, with all escaped that are neither unreserved nor among `also`.
struct Encoded<'a>(&'a [u8], &'a [u8]);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &b in self.0 {
            if is_unreserved(b) || self.1.contains(&b) {
                f.write_char(b.into())?;
            } else {
                write!(f, "%{b:02X}")?;
            }
        }
        Ok(())
    }
}

/// What a path may have as it is. Of a query's value '+' is left out too: some take it for a space.
const PATH: &[u8] = b"/:@!$'()*,;=+&";
const VALUE: &[u8] = b"/:@,";

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "nbds" } else { "nbd" })?;
        f.write_str(match self.address {
            Address::Tcp { .. } => "://",
            Address::Unix(_) => "+unix://",
            Address::Vsock { .. } => "+vsock://",
        })?;
        if let Some(user) = &self.user {
            write!(f, "{}@", Encoded(user.as_bytes(), b""))?;
        }
        let mut parameters = Vec::new();
        match &self.address {
            Address::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "[{}]", Encoded(host.as_bytes(), b":"))?;
                } else {
                    write!(f, "{}", Encoded(host.as_bytes(), b""))?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
            }
            Address::Unix(path) => parameters.push(("socket", path.as_os_str().as_bytes())),
            Address::Vsock { cid, port } => {
                write!(f, "{cid}")?;
                if *port != DEFAULT_PORT.into() {
                    write!(f, ":{port}")?;
                }
            }
        }
        if let Some(dir) = &self.tls_certificates {
            parameters.push(("tls-certificates", dir.as_os_str().as_bytes()));
        }
        if let Some(file) = &self.tls_psk_file {
            parameters.push(("tls-psk-file", file.as_os_str().as_bytes()));
        }
        if let Some(name) = &self.tls_hostname {
            parameters.push(("tls-hostname", name.as_bytes()));
        }
        if let Some(on) = self.tls_verify_peer {
            parameters.push(("tls-verify-peer", if on { b"1" } else { b"0" }));
        }
        if !self.export.is_empty() || !parameters.is_empty() {
            write!(f, "/{}", Encoded(&self.export, PATH))?;
        }
        for (i, (key, value)) in parameters.into_iter().enumerate() {
            write!(f, "{}{key}={}", if i == 0 { '?' } else { '&' }, Encoded(value, VALUE))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
