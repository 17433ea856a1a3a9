//! NBD URIs.
//!
//! Specification: doc/uri.md of the NBD project ("NBD URI format"), RFC 3986 for the rest.

use std::path::PathBuf;

use crate::block::Result;

/// What is at the other end of a URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// TCP: a host name or address (IPv6 without brackets), and a port.
    Tcp {
        /// Name or address; empty when listening means all addresses.
        host: String,
        /// 10809 if the URI has none.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
    /// A socket between a virtual machine and its host.
    Vsock {
        /// Context id.
        cid: u32,
        /// 10809 if the URI has none.
        port: u32,
    },
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

impl Uri {
    /// Whether a name begins like an NBD URI (`nbd:`, `nbds+unix:`, …, in any case of letters).
    pub fn is_one(_name: &[u8]) -> bool {
        todo!()
    }
    /// Read a URI.
    pub fn parse(_text: &[u8]) -> Result<Self> {
        todo!()
    }
}

impl std::fmt::Display for Uri {
    fn fmt(&self, _f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        todo!()
    }
}
