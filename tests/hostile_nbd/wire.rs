//! The wire as the specification has it (doc/proto.md), not as the library has it: numbers, and what
//! goes over it; and a socket that gives up in time.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;

/// How long a client waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub mod opt {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
    pub const RESIZE: u16 = 8;
}

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const FAST_ZERO: u16 = 16;
pub const PAYLOAD_LEN: u16 = 32;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const EOVERFLOW: u32 = 75;
pub const ENOTSUP: u32 = 95;
/// All that may be said ("Error values").
pub const ERRORS: [u32; 8] = [EPERM, EIO, 12, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, 108];

const OPTION: u64 = 0x4948_4156_454f_5054;
/// Longest string ("The NBD protocol").
pub const MAX_STRING: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Simple,
    Structured,
    Extended,
}

pub const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// A connected socket that gives up after [`PATIENCE`].
#[derive(Debug)]
pub struct Sock(OwnedFd);

impl Sock {
    pub fn new(fd: impl Into<OwnedFd>) -> Self {
        let sock = Self(fd.into());
        sock.patience(PATIENCE);
        sock
    }

    pub fn unix(path: &Path) -> io::Result<Self> {
        std::os::unix::net::UnixStream::connect(path).map(Self::new)
    }

    pub fn tcp(port: u16) -> io::Result<Self> {
        std::net::TcpStream::connect(("127.0.0.1", port)).map(Self::new)
    }

    /// Two ends: ours, and one to give away.
    pub fn pair() -> (Self, OwnedFd) {
        let mut fds = [0; 2];
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
        // SAFETY: room for two descriptors, which are nobody else's.
        unsafe {
            assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
            (Self::new(OwnedFd::from_raw_fd(fds[0])), OwnedFd::from_raw_fd(fds[1]))
        }
    }

    fn set<T>(&self, level: i32, option: i32, value: T) {
        let size = size_of::<T>() as libc::socklen_t;
        // SAFETY: `value` has that size.
        let rc = unsafe {
            libc::setsockopt(self.0.as_raw_fd(), level, option, (&raw const value).cast(), size)
        };
        assert_eq!(rc, 0, "{}", io::Error::last_os_error());
    }

    pub fn patience(&self, time: Duration) {
        let tv = libc::timeval { tv_sec: time.as_secs() as _, tv_usec: time.subsec_micros() as _ };
        self.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, tv);
        self.set(libc::SOL_SOCKET, libc::SO_SNDTIMEO, tv);
    }

    /// Take little from the server before it has to wait.
    pub fn narrow(&self) {
        self.set(libc::SOL_SOCKET, libc::SO_RCVBUF, 4096i32);
    }

    /// The same socket once more.
    pub fn twin(&self) -> Self {
        Self(self.0.try_clone().unwrap())
    }

    /// Nothing more will be sent.
    pub fn half_close(&self) {
        // SAFETY: the descriptor is open.
        unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_WR) };
    }

    /// Close with RST (TCP).
    pub fn reset(self) {
        self.set(libc::SOL_SOCKET, libc::SO_LINGER, libc::linger { l_onoff: 1, l_linger: 0 });
    }
}

impl Read for Sock {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the memory is borrowed for the call.
        let n = unsafe { libc::recv(self.0.as_raw_fd(), to.as_mut_ptr().cast(), to.len(), 0) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }
}

impl Write for Sock {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let (p, n) = (from.as_ptr().cast(), from.len());
        // SAFETY: as above.
        let n = unsafe { libc::send(self.0.as_raw_fd(), p, n, libc::MSG_NOSIGNAL) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How to negotiate.
#[derive(Clone)]
pub struct How {
    pub mode: Mode,
    pub contexts: &'static [&'static str],
    pub tls: Option<Arc<ClientConfig>>,
}

impl How {
    pub fn new(mode: Mode) -> Self {
        let contexts: &[_] = match mode {
            Mode::Simple => &[],
            _ => &["base:allocation", "qemu:allocation-depth"],
        };
        Self { mode, contexts, tls: None }
    }

    pub fn tls(mut self, config: &Arc<ClientConfig>) -> Self {
        self.tls = Some(config.clone());
        self
    }
}

pub fn be16(b: &[u8]) -> u16 {
    u16::from_be_bytes(b[..2].try_into().unwrap())
}
pub fn be32(b: &[u8]) -> u32 {
    u32::from_be_bytes(b[..4].try_into().unwrap())
}
pub fn be64(b: &[u8]) -> u64 {
    u64::from_be_bytes(b[..8].try_into().unwrap())
}

/// A string with its length before it.
pub fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}

/// The payload of INFO and GO.
pub fn info_payload(name: &[u8], kinds: &[u16]) -> Vec<u8> {
    let mut out = string(name);
    out.extend_from_slice(&(kinds.len() as u16).to_be_bytes());
    kinds.iter().for_each(|k| out.extend_from_slice(&k.to_be_bytes()));
    out
}

/// The payload of the options for meta contexts.
pub fn context_payload(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut out = string(name);
    out.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|q| out.extend_from_slice(&string(q.as_bytes())));
    out
}

/// An option as it goes over the wire.
pub fn option_bytes(option: u32, payload: &[u8]) -> Vec<u8> {
    [&option_header(option, payload.len() as u32)[..], payload].concat()
}

pub fn option_header(option: u32, length: u32) -> Vec<u8> {
    [&OPTION.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// A request's header.
pub fn header(mode: Mode, kind: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let extended = mode == Mode::Extended;
    let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
    let mut b = magic.to_be_bytes().to_vec();
    b.extend_from_slice(&flags.to_be_bytes());
    b.extend_from_slice(&kind.to_be_bytes());
    b.extend_from_slice(&cookie.to_be_bytes());
    b.extend_from_slice(&offset.to_be_bytes());
    match extended {
        true => b.extend_from_slice(&length.to_be_bytes()),
        false => b.extend_from_slice(&(length as u32).to_be_bytes()),
    }
    b
}

/// All that a client says before requests, in one piece.
pub fn script(export: &[u8], how: &How) -> Vec<u8> {
    let mut out = vec![0, 0, 0, 3];
    out.extend_from_slice(&match how.mode {
        Mode::Simple => Vec::new(),
        Mode::Structured => option_bytes(opt::STRUCTURED_REPLY, &[]),
        Mode::Extended => option_bytes(opt::EXTENDED_HEADERS, &[]),
    });
    if !how.contexts.is_empty() {
        let payload = context_payload(export, how.contexts);
        out.extend_from_slice(&option_bytes(opt::SET_META_CONTEXT, &payload));
    }
    out.extend_from_slice(&option_bytes(opt::GO, &info_payload(export, &[1, 2, 3])));
    out
}
