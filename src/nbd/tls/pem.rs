//! Certificates and keys in PEM (RFC 7468). Messages tell names and what was expected, never text
//! of the file: a line that is out of place may be one of a key.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::Pem;
use crate::block::{Error, Name, Result, quoted};

/// A bundle of all CAs of a system has a quarter of this; whoever names a device is told so.
const MAX_FILE: u64 = 4 << 20;

impl Pem {
    /// What messages call it.
    pub(super) fn told(&self, option: &str) -> String {
        match self {
            Self::File(path) => format!("{option} {}", quoted(path.as_os_str().as_bytes())),
            Self::Text(_) => format!("the text of {option}"),
        }
    }

    fn load(&self, option: &str) -> Result<Vec<u8>> {
        let path = match self {
            Self::Text(text) => return Ok(text.clone()),
            Self::File(path) => path,
        };
        let mut text = Vec::new();
        let file = File::open(path).map_err(|e| os("opening a PEM file", path, &e))?;
        file.take(MAX_FILE + 1)
            .read_to_end(&mut text)
            .map_err(|e| os("reading a PEM file", path, &e))?;
        if text.len() as u64 > MAX_FILE {
            let what = format!("found more than {MAX_FILE} bytes, expected a PEM file");
            return Err(Error::invalid(format!("{}: {what}", self.told(option))));
        }
        Ok(text)
    }
}

pub(super) fn os(op: &'static str, path: &Path, e: &io::Error) -> Error {
    Error::Os { op, file: Name::from(path), errno: e.raw_os_error().unwrap_or(libc::EIO) }
}

/// What is wrong with a text, without a word of it.
fn fault(e: &pem::Error) -> &'static str {
    match e {
        pem::Error::MissingSectionEnd { .. } => "found a section without an -----END line",
        pem::Error::IllegalSectionStart { .. } => "found a malformed -----BEGIN line",
        pem::Error::Base64Decode(_) => "found a section that is not base64",
        pem::Error::NoItemsFound => "found no such section",
        _ => "found no PEM",
    }
}

fn bad(pem: &Pem, option: &str, fault: &str, expected: &str) -> Error {
    Error::invalid(format!("{}: {fault}, expected {expected}", pem.told(option)))
}

/// All certificates of a text, at least one.
pub(super) fn certificates(pem: &Pem, option: &str) -> Result<Vec<CertificateDer<'static>>> {
    let expected = "PEM with '-----BEGIN CERTIFICATE-----'";
    let text = pem.load(option)?;
    let found = CertificateDer::pem_slice_iter(&text).collect::<std::result::Result<Vec<_>, _>>();
    let found = found.map_err(|e| bad(pem, option, fault(&e), expected))?;
    if found.is_empty() {
        return Err(bad(pem, option, "found no certificate", expected));
    }
    Ok(found)
}

/// The certificates of a text as those of CAs.
pub(super) fn roots(pem: &Pem, option: &str) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem, option)? {
        roots.add(certificate).map_err(|e| {
            let found = format!("found {}", quoted(e.to_string().as_bytes()));
            bad(pem, option, &found, "certificates of CAs")
        })?;
    }
    Ok(roots)
}

/// The first private key of a text: PKCS #8, PKCS #1 or SEC 1.
pub(super) fn key(pem: &Pem, option: &str) -> Result<PrivateKeyDer<'static>> {
    let expected = "PEM with '-----BEGIN PRIVATE KEY-----' (or RSA, or EC PRIVATE KEY)";
    let text = pem.load(option)?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|e| {
        // Both "ENCRYPTED PRIVATE KEY" and the older header "Proc-Type: 4,ENCRYPTED".
        let encrypted = text.windows(9).any(|w| w == b"ENCRYPTED");
        let fault = if encrypted { "found a key with a passphrase" } else { fault(&e) };
        bad(pem, option, fault, expected)
    })
}
