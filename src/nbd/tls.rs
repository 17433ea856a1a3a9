//! TLS by rustls: settings from options, and a session that turns bytes into records and back
//! without doing I/O itself.
//!
//! Relied on: TLS 1.2 and 1.3 (RFC 5246, RFC 8446) by rustls with ring, which is named in every
//! configuration, so that nothing depends on a provider of the process nor sets one: the host program
//! may use rustls too. Promised: a peer is verified unless the caller said otherwise by name, nothing
//! that is secret is ever part of a message, and what a peer can make us keep in memory is bounded.
//!
//! Error numbers: EACCES where a certificate is not accepted, by us or by the peer; EPROTO for all
//! else that goes wrong with TLS.

mod pem;
mod session;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use rustls::{DigitallySignedStruct, SignatureScheme, SupportedProtocolVersion};

use super::uri::Address;
use crate::block::{Error, Name, Result, quoted};
use crate::log::{Level, log};

pub use session::{Session, Taken};

const VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];

/// PEM: a file, or the text itself.
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// A file's name.
    File(PathBuf),
    /// The text.
    Text(Vec<u8>),
}

/// The text may be a private key: it is never shown.
impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Text(text) => write!(f, "Text({} bytes)", text.len()),
        }
    }
}

impl Pem {
    /// The value of an option: text if it begins like PEM, else a file's name.
    pub fn from_option(value: &[u8]) -> Self {
        use std::os::unix::ffi::OsStrExt;
        match value.starts_with(b"-----BEGIN") {
            true => Self::Text(value.to_vec()),
            false => Self::File(std::ffi::OsStr::from_bytes(value).into()),
        }
    }
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

impl TlsOptions {
    /// What a client finds in a directory by the names that libnbd and QEMU use: `ca-cert.pem`,
    /// `client-cert.pem`, `client-key.pem` (`tls-certificates`).
    pub fn from_directory(dir: &Path) -> Result<Self> {
        let options = Self::in_directory(dir, "client-cert.pem", "client-key.pem")?;
        if options.ca.is_none() && options.certificate.is_none() {
            let expected = "expected ca-cert.pem, or client-cert.pem and client-key.pem";
            return Err(nothing_in(dir, expected));
        }
        Ok(options)
    }

    /// What a server finds in such a directory: `ca-cert.pem`, `server-cert.pem`, `server-key.pem`.
    pub fn from_server_directory(dir: &Path) -> Result<Self> {
        let options = Self::in_directory(dir, "server-cert.pem", "server-key.pem")?;
        if options.certificate.is_none() || options.key.is_none() {
            return Err(nothing_in(dir, "expected server-cert.pem and server-key.pem"));
        }
        Ok(options)
    }

    fn in_directory(dir: &Path, certificate: &str, key: &str) -> Result<Self> {
        let find = |name: &str| -> Result<Option<Pem>> {
            let path = dir.join(name);
            match path.try_exists() {
                Ok(there) => Ok(there.then_some(Pem::File(path))),
                Err(e) => Err(pem::os("looking for a file", &path, &e)),
            }
        };
        // To leave it out would be to trust what its owner has revoked.
        if find("ca-crl.pem")?.is_some() {
            let what = "revocation lists (ca-crl.pem in a directory of certificates)".into();
            return Err(Error::Unsupported { file: Name::from(dir), what });
        }
        let (ca, certificate, key) = (find("ca-cert.pem")?, find(certificate)?, find(key)?);
        Ok(Self { certificate, key, ca, ..Self::default() })
    }
}

fn nothing_in(dir: &Path, expected: &str) -> Error {
    use std::os::unix::ffi::OsStrExt;
    let dir = quoted(dir.as_os_str().as_bytes());
    Error::invalid(format!("directory of TLS certificates {dir}: found none, {expected}"))
}

/// A client's settings, checked.
#[derive(Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

/// A server's settings, checked.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
}

impl ClientTls {
    /// Settings for talking to `to`. Files are read now. Logs a warning if the server is not verified:
    /// to be called once per open.
    pub fn new(options: &TlsOptions, to: &Address) -> Result<Self> {
        let provider = provider();
        let verify = options.verify_peer.unwrap_or(true);
        let name = server_name(options, to, verify)?;
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(VERSIONS)
            .map_err(|e| internal(&e))?;
        let builder = if verify {
            let roots = match &options.ca {
                Some(ca) => pem::roots(ca, "tls-ca")?,
                None => system_roots()?,
            };
            builder.with_root_certificates(roots)
        } else {
            let why = "the server's certificate is not checked (tls-verify-peer is off)";
            log(Level::Warn, format_args!("{}: TLS: {why}", quoted(to.to_string().as_bytes())));
            let verifier = Arc::new(AnyServer(provider.signature_verification_algorithms));
            builder.dangerous().with_custom_certificate_verifier(verifier)
        };
        let mut config = match identity(options)? {
            Some((chain, key)) => {
                builder.with_client_auth_cert(chain, key).map_err(|e| bad_identity(options, &e))?
            }
            None => builder.with_no_client_auth(),
        };
        // A connection lives long; tickets would only be kept in memory.
        config.resumption = Resumption::disabled();
        Ok(Self { config: Arc::new(config), name })
    }

    /// A session that has not begun.
    pub fn session(&self, peer: &Name) -> Result<Session> {
        let conn = ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(|e| internal(&e))?;
        Ok(Session::new(conn.into(), peer))
    }
}

impl ServerTls {
    /// Settings: a certificate and a key are needed; a CA where peers are verified. Files are read now.
    pub fn new(options: &TlsOptions) -> Result<Self> {
        let provider = provider();
        let Some((chain, key)) = identity(options)? else {
            let expected = "expected options tls-certificate and tls-key";
            return Err(Error::invalid(format!("TLS for a server: {expected}, found none")));
        };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(VERSIONS)
            .map_err(|e| internal(&e))?;
        let builder = if options.verify_peer == Some(true) {
            let Some(ca) = &options.ca else {
                let what = "option tls-verify-peer is on, expected option tls-ca with it";
                return Err(Error::invalid(format!("TLS for a server: {what}")));
            };
            let roots = Arc::new(pem::roots(ca, "tls-ca")?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .build()
                .map_err(|e| Error::invalid(format!("option tls-ca: {e}")))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let mut config =
            builder.with_single_cert(chain, key).map_err(|e| bad_identity(options, &e))?;
        // Nothing is resumed, see the client's.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config) })
    }

    /// A session that has not begun.
    pub fn session(&self, peer: &Name) -> Result<Session> {
        let conn = ServerConnection::new(Arc::clone(&self.config)).map_err(|e| internal(&e))?;
        Ok(Session::new(conn.into(), peer))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn internal(e: &rustls::Error) -> Error {
    Error::Internal(format!("TLS: {e}"))
}

/// Our own certificate with those that lead to its CA, and its key.
fn identity(
    options: &TlsOptions,
) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>> {
    match (&options.certificate, &options.key) {
        (None, None) => Ok(None),
        (Some(certificate), Some(key)) => {
            let chain = pem::certificates(certificate, "tls-certificate")?;
            Ok(Some((chain, pem::key(key, "tls-key")?)))
        }
        (Some(_), None) => {
            Err(Error::invalid("option tls-certificate is set, expected option tls-key with it"))
        }
        (None, Some(_)) => {
            Err(Error::invalid("option tls-key is set, expected option tls-certificate with it"))
        }
    }
}

fn bad_identity(options: &TlsOptions, e: &rustls::Error) -> Error {
    let names = [("tls-certificate", &options.certificate), ("tls-key", &options.key)];
    let names = names.map(|(option, pem)| pem.as_ref().map_or(String::new(), |p| p.told(option)));
    let what = match e {
        rustls::Error::InconsistentKeys(_) => "the key is not that of the certificate".to_owned(),
        // Of the key itself these texts tell nothing but that it cannot be used.
        e => quoted(e.to_string().as_bytes()),
    };
    Error::invalid(format!("{}, {}: {what}", names[0], names[1]))
}

/// The name that the server's certificate has to have.
fn server_name(options: &TlsOptions, to: &Address, verify: bool) -> Result<ServerName<'static>> {
    let (host, from) = match (&options.hostname, to) {
        (Some(name), _) => (name.as_str(), "option tls-hostname"),
        (None, Address::Tcp { host, .. }) if host.is_empty() => ("localhost", "host"),
        // What stands behind '%' is an interface of this host.
        (None, Address::Tcp { host, .. }) => (host.split('%').next().unwrap_or(""), "host"),
        (None, _) if verify => {
            let what = "this sort of address has no host name to check the certificate against";
            let expected = "expected option tls-hostname (or tls-verify-peer=off)";
            return Err(Error::invalid(format!("TLS with {to}: {what}, {expected}")));
        }
        (None, _) => ("", ""),
    };
    match ServerName::try_from(host.to_owned()) {
        Ok(name) => Ok(name),
        // An IP address is not sent to the server, and nobody looks at this one.
        Err(_) if !verify && options.hostname.is_none() => {
            Ok(ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()))
        }
        Err(_) => {
            let host = quoted(host.as_bytes());
            Err(Error::invalid(format!(
                "TLS: {from}: found {host}, expected a DNS name or an IP address"
            )))
        }
    }
}

/// The CAs that this host trusts.
fn system_roots() -> Result<RootCertStore> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Some systems come with certificates that nobody can read.
    roots.add_parsable_certificates(found.certs);
    if !roots.is_empty() {
        return Ok(roots);
    }
    let why = found
        .errors
        .first()
        .map_or(String::new(), |e| format!(" ({})", quoted(e.to_string().as_bytes())));
    Err(Error::invalid(format!(
        "TLS: found no CA certificates of this system{why}, expected option tls-ca"
    )))
}

/// Accepts any certificate, as long as the server has its key.
#[derive(Debug)]
struct AnyServer(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
