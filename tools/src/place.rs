//! The places where `qblk serve` listens: URIs, sockets that systemd hands over, a private one.

use std::ffi::{OsStr, OsString};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use qblk::block::quoted;
use qblk::nbd::net;
use qblk::nbd::server::Server;
use qblk::nbd::uri::{Address, MAX_SOCKET_PATH, Uri};

use crate::failure::{Failure, Result};

/// The first descriptor that socket activation hands over.
const FIRST: i32 = 3;

/// A place to listen at.
pub struct Place {
    /// As clients write it; of a socket that was handed over it may not be known.
    pub uri: Option<Uri>,
    /// A socket that was handed over.
    fd: Option<OwnedFd>,
}

impl Place {
    /// What `--uri` names.
    pub fn parse(text: &OsStr) -> Result<Self> {
        let uri = Uri::parse(text.as_bytes())?;
        if uri.tls_psk_file.is_some() || uri.user.is_some() {
            return Err(Failure::usage(format!(
                "{}: keys shared beforehand (PSK) are not supported; use certificates",
                quoted(text.as_bytes())
            )));
        }
        if uri.tls_hostname.is_some() || uri.tls_verify_peer.is_some() {
            return Err(Failure::usage(format!(
                "{}: tls-hostname and tls-verify-peer in a URI tell clients what to verify",
                quoted(text.as_bytes())
            )));
        }
        Ok(Self { uri: Some(uri), fd: None })
    }

    /// A Unix socket.
    pub fn unix(path: &OsStr) -> Self {
        Self { uri: Some(Uri::to(Address::Unix(path.into()))), fd: None }
    }

    /// The path of the Unix socket, if it is one.
    pub fn socket(&self) -> Option<&Path> {
        match &self.uri.as_ref()?.address {
            Address::Unix(path) => Some(path),
            _ => None,
        }
    }

    /// Whether a client needs TLS here.
    pub fn needs_tls(&self) -> bool {
        self.uri.as_ref().is_some_and(|uri| uri.tls)
    }

    /// Listen from now on; the URI has the real port then.
    pub fn listen(&mut self, server: &Server) -> Result<()> {
        if let Some(fd) = self.fd.take() {
            return Ok(server.listen_fd(fd)?);
        }
        let Some(uri) = &mut self.uri else { return Ok(()) };
        let (Address::Tcp { port: 0, .. } | Address::Vsock { port: 0, .. }) = uri.address else {
            return Ok(server.listen(uri.to_string().as_bytes())?);
        };
        // A server tells the port of its first place only, so the sockets are made here.
        for (fd, real) in net::listen(&uri.address)? {
            server.listen_fd(fd)?;
            match (&mut uri.address, real) {
                (Address::Tcp { port, .. }, Address::Tcp { port: given, .. }) => *port = given,
                (Address::Vsock { port, .. }, Address::Vsock { port: given, .. }) => *port = given,
                _ => {}
            }
        }
        Ok(())
    }

    /// The URI of an export here; `None` is one that answers to every name.
    pub fn uri_of(&self, export: Option<&[u8]>, tls: bool) -> Option<String> {
        let mut address = self.uri.as_ref()?.address.clone();
        // All addresses of this host: clients need one.
        if let Address::Tcp { host, .. } = &mut address
            && host.is_empty()
        {
            *host = "localhost".into();
        }
        let mut uri = Uri::to(address);
        uri.tls = tls;
        uri.export = match export {
            Some(name) => name.to_vec(),
            None => self.uri.as_ref()?.export.clone(),
        };
        Some(uri.to_string())
    }
}

/// The sockets that systemd's socket activation hands over (sd_listen_fds(3)), if it is us that it
/// means. To be called before there is another thread.
pub fn handed_over() -> Result<Vec<Place>> {
    let number = |key| std::env::var(key).ok().and_then(|text| text.parse::<u32>().ok());
    let (Some(pid), Some(count)) = (std::env::var_os("LISTEN_PID"), std::env::var_os("LISTEN_FDS"))
    else {
        return Ok(Vec::new());
    };
    if number("LISTEN_PID") != Some(std::process::id()) {
        // Meant for another process; something it is not at all is nobody's.
        let known = pid.to_str().is_some_and(|p| p.bytes().all(|b| b.is_ascii_digit()));
        return match known {
            true => Ok(Vec::new()),
            false => Err(wrong("LISTEN_PID", &pid, "a process id")),
        };
    }
    // As many as a process can have, and no number overflows.
    let Some(count) = number("LISTEN_FDS").filter(|n| (1..=1 << 20).contains(n)) else {
        return Err(wrong("LISTEN_FDS", &count, "the number of sockets that were handed over"));
    };
    for key in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        // Whom we start must not take them for its own.
        // SAFETY: there is no other thread that could read the environment.
        unsafe { std::env::remove_var(key) };
    }
    (FIRST..FIRST + count as i32).map(adopt).collect()
}

fn wrong(key: &str, value: &OsStr, expected: &str) -> Failure {
    Failure::said(format!("{key}: found {}, expected {expected}", quoted(value.as_bytes())))
}

/// Take a socket that was handed over.
fn adopt(fd: i32) -> Result<Place> {
    let get = |option| {
        let mut value: i32 = 0;
        let mut len = size_of::<i32>() as libc::socklen_t;
        let to = (&raw mut value).cast();
        // SAFETY: `value` is ours and has `len` bytes; any number may stand for a descriptor.
        let rc = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, option, to, &raw mut len) };
        (rc == 0).then_some(value)
    };
    if get(libc::SO_ACCEPTCONN) != Some(1) || get(libc::SO_TYPE) != Some(libc::SOCK_STREAM) {
        return Err(Failure::said(format!(
            "descriptor {fd}, handed over by socket activation, is not a listening stream socket"
        )));
    }
    // SAFETY: no memory is passed. Children are not to have it.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    // SAFETY: it is open, as was just seen, and by the protocol it is ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(Place { uri: net::local_address(&fd).map(Uri::to), fd: Some(fd) })
}

/// A directory that is ours alone, with a socket in it; it goes with us.
pub struct Private(PathBuf);

impl Private {
    /// Make one.
    pub fn new() -> Result<Self> {
        let name = "qblk-XXXXXX";
        let mut base = std::env::temp_dir();
        // The path of a socket is short, and where TMPDIR is long there is still /tmp.
        let longest = MAX_SOCKET_PATH - name.len() - "//socket".len();
        if base.as_os_str().len() > longest || !base.is_absolute() {
            base = "/tmp".into();
        }
        let mut template = base.join(name).into_os_string().into_vec();
        template.push(0);
        // SAFETY: a path that ends in a NUL; mkdtemp writes into it and leaves its length.
        if unsafe { libc::mkdtemp(template.as_mut_ptr().cast()) }.is_null() {
            let e = std::io::Error::last_os_error();
            let what = format!("{}: making a directory in it", quoted(base.as_os_str().as_bytes()));
            return Err(Failure::io(what, &e));
        }
        template.pop();
        Ok(Self(OsString::from_vec(template).into()))
    }

    /// The socket in it.
    pub fn place(&self) -> Place {
        Place::unix(self.0.join("socket").as_os_str())
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // Of what is left behind nobody could be told, nor do anything about it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
