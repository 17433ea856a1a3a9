//! NBD exports by name: what the options say of a connection, and how it is opened.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use super::{OpenFlags, Options, Use};
use crate::block::*;
use crate::nbd::client::{self, Listed, Settings, Target};
use crate::nbd::net::polling;
use crate::nbd::tls::{ClientTls, Pem, TlsOptions};
use crate::nbd::uri::{Address, Uri};
use crate::plugin::{self, PluginName};

/// How long a request may take unless the option `nbd.timeout` says otherwise.
const TIMEOUT: Duration = Duration::from_secs(60);
/// For how long a lost connection is tried again unless `nbd.reconnect` says otherwise.
const RECONNECT: Duration = Duration::from_secs(30);

/// Options that only NBD has a use for.
pub(super) const KEYS: &[&str] = &[
    "argv",
    "nbd.activation",
    "nbd.busy-poll",
    "nbd.connect-timeout",
    "nbd.connections",
    "nbd.contexts",
    "nbd.export",
    "nbd.reconnect",
    "nbd.timeout",
    "tls",
    "tls-ca",
    "tls-certificate",
    "tls-certificates",
    "tls-hostname",
    "tls-key",
    "tls-psk-file",
    "tls-verify-peer",
];

/// An NBD server that a name leads to.
#[derive(Clone, Debug)]
pub(super) enum Remote {
    /// By its URI.
    Uri(Box<Uri>),
    /// The command that the option `argv` tells, started for this; and the export's name.
    Command(Vec<u8>),
}

impl Remote {
    /// For people.
    pub(super) fn name(&self) -> Name {
        match self {
            Self::Uri(uri) => Name::from(uri.to_string()),
            Self::Command(_) => Name::from("nbd+exec:"),
        }
    }

    /// Read a name that begins like an NBD URI; `None` if it does not.
    pub(super) fn parse(name: &[u8]) -> Result<Option<Self>> {
        if let Some(rest) = name.strip_prefix(b"nbd+exec:") {
            let export = match rest {
                [] | b"//" | b"///" => &[][..],
                rest => rest.strip_prefix(b"///").ok_or_else(|| {
                    let text =
                        "expected nbd+exec: or nbd+exec:///EXPORT, and the command in 'argv'";
                    Error::invalid(format!("{}: {text}", quoted(name)))
                })?,
            };
            return Ok(Some(Self::Command(export.to_vec())));
        }
        match Uri::is_one(name) {
            true => Ok(Some(Self::Uri(Box::new(Uri::parse(name)?)))),
            false => Ok(None),
        }
    }

    /// Connect.
    pub(super) fn open(
        &self,
        name: &Name,
        options: &Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        let (target, export, tls) = self.target(options)?;
        client::open(target, &export, name, settings(options, flags, tls)?)
    }

    fn target(&self, options: &Options) -> Result<(Target, Vec<u8>, Option<ClientTls>)> {
        let chosen = options.get("nbd.export").map(<[u8]>::to_vec);
        match self {
            Self::Uri(uri) => {
                no_command(options)?;
                let export = chosen.unwrap_or_else(|| uri.export.clone());
                let tls = tls(options, Some(uri), &uri.address)?;
                Ok((Target::Address(uri.address.clone()), export, tls))
            }
            Self::Command(export) => {
                let Some(text) = options.get("argv") else {
                    return Err(Error::invalid("nbd+exec: needs the command in the option 'argv'"));
                };
                let argv = words(text)?;
                let activation = options.switch("nbd.activation")?.unwrap_or(false);
                let nowhere = Address::Unix(PathBuf::new());
                let tls = tls(options, None, &nowhere)?;
                let export = chosen.unwrap_or_else(|| export.clone());
                Ok((Target::Command { argv, activation }, export, tls))
            }
        }
    }
}

/// What is connected to already is not to be started.
fn no_command(options: &Options) -> Result<()> {
    match ["argv", "nbd.activation"].iter().find(|key| options.get(key).is_some()) {
        Some(key) => Err(Error::invalid(format!("option '{key}' is for nbd+exec: only"))),
        None => Ok(()),
    }
}

/// Use a connected socket, which is the library's now.
pub(super) fn open_socket(
    fd: OwnedFd,
    name: &Name,
    options: &Options,
    flags: OpenFlags,
) -> Result<Box<dyn Driver>> {
    no_command(options)?;
    let export = options.get("nbd.export").unwrap_or_default().to_vec();
    let tls = tls(options, None, &Address::Unix(PathBuf::new()))?;
    client::open(Target::Socket(fd), &export, name, settings(options, flags, tls)?)
}

/// Ask the server at `uri`, or the plugin of that name, what it exports.
pub fn list_exports(uri: &[u8], options: &Options) -> Result<Vec<Listed>> {
    options.check(Use::Open)?;
    if let Some(name) = PluginName::parse(uri)? {
        let found = plugin::list_exports(&name, &super::plugin_settings(options))?;
        return Ok(found
            .into_iter()
            .map(|(name, description)| Listed { name, description })
            .collect());
    }
    let Some(remote) = Remote::parse(uri)? else {
        return Err(Error::invalid(format!("{}: expected an NBD URI or a plugin", quoted(uri))));
    };
    let (target, _, tls) = remote.target(options)?;
    let name = Name::from(OsString::from_vec(uri.to_vec()));
    client::list(target, &name, settings(options, OpenFlags::default(), tls)?)
}

fn settings(options: &Options, flags: OpenFlags, tls: Option<ClientTls>) -> Result<Settings> {
    let timeout = options.seconds("nbd.timeout")?.unwrap_or(TIMEOUT);
    let contexts = options.get("nbd.contexts").unwrap_or_default();
    Ok(Settings {
        write: flags.has(OpenFlags::RDWR) && !flags.has(OpenFlags::INFO_ONLY),
        connections: match flags.has(OpenFlags::INFO_ONLY) {
            true => Some(1),
            false => options.number("nbd.connections", 1..=64)?,
        },
        timeout: (!timeout.is_zero()).then_some(timeout),
        reconnect: options.seconds("nbd.reconnect")?.unwrap_or(RECONNECT),
        connect_timeout: options.seconds("nbd.connect-timeout")?.unwrap_or_default(),
        busy_poll: match options.number("nbd.busy-poll", 0..=polling::MOST)? {
            Some(us) => Duration::from_micros(us.into()),
            None => polling::DEFAULT,
        },
        contexts: contexts
            .split(|b| *b == b',')
            .filter(|c| !c.is_empty())
            .map(<[u8]>::to_vec)
            .collect(),
        tls,
    })
}

/// What the URI and the options say of TLS; the options win.
fn tls(options: &Options, uri: Option<&Uri>, to: &Address) -> Result<Option<ClientTls>> {
    let wanted = uri.is_some_and(|u| u.tls);
    let on = match options.one_of("tls", &["off", "required", "on"])? {
        None => wanted,
        Some(0) if wanted => {
            return Err(Error::invalid("option 'tls' is off, and the URI requires it (nbds)"));
        }
        Some(0) => false,
        Some(_) => true,
    };
    let psk = uri.is_some_and(|u| u.tls_psk_file.is_some());
    if psk || options.get("tls-psk-file").is_some() {
        let text = "tls-psk-file: TLS with keys shared beforehand (PSK); use certificates";
        return Err(Error::unsupported(&"NBD".into(), text));
    }
    if let Some(user) = uri.and_then(|u| u.user.as_ref()) {
        let text = format!(
            "{}@: the name of a key that was shared beforehand (PSK), for TLS; use certificates",
            quoted(user.as_bytes())
        );
        return Err(Error::unsupported(&"NBD".into(), text));
    }
    let used: Vec<_> =
        KEYS.iter().filter(|k| k.starts_with("tls-") && options.get(k).is_some()).collect();
    if !on {
        return match used.first() {
            Some(key) => Err(Error::invalid(format!(
                "option '{key}' has no use without TLS (nbds, or tls=required)"
            ))),
            None => match uri.and_then(Uri::tls_parameter) {
                Some(key) => Err(Error::invalid(format!(
                    "'{key}' in the URI has no use without TLS (nbds, or tls=required)"
                ))),
                None => Ok(None),
            },
        };
    }
    let directory = match options.os("tls-certificates") {
        Some(dir) => Some(PathBuf::from(dir)),
        None => uri.and_then(|u| u.tls_certificates.clone()),
    };
    let mut all = match directory {
        Some(dir) => TlsOptions::from_directory(&dir)?,
        None => TlsOptions::default(),
    };
    for (key, to) in [
        ("tls-ca", &mut all.ca),
        ("tls-certificate", &mut all.certificate),
        ("tls-key", &mut all.key),
    ] {
        if let Some(value) = options.get(key) {
            *to = Some(Pem::from_option(value));
        }
    }
    all.verify_peer = options.switch("tls-verify-peer")?.or(uri.and_then(|u| u.tls_verify_peer));
    all.hostname = match options.text("tls-hostname")? {
        Some(name) => Some(name.to_owned()),
        None => uri.and_then(|u| u.tls_hostname.clone()),
    };
    ClientTls::new(&all, to).map(Some)
}

/// The words of a command, as a shell takes them apart: spaces, quotes and backslashes, nothing more.
fn words(text: &[u8]) -> Result<Vec<OsString>> {
    let mut all: Vec<Vec<u8>> = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut quote = None;
    let mut bytes = text.iter().copied();
    while let Some(b) = bytes.next() {
        match (quote, b) {
            (None, b' ' | b'\t' | b'\n') => all.extend(word.take()),
            (None, b'\'' | b'"') => {
                quote = Some(b);
                word.get_or_insert_default();
            }
            (Some(q), b) if q == b => quote = None,
            (None | Some(b'"'), b'\\') => match bytes.next() {
                Some(next) => word.get_or_insert_default().push(next),
                None => return Err(Error::invalid("option 'argv' ends in a backslash")),
            },
            (_, b) => word.get_or_insert_default().push(b),
        }
    }
    if quote.is_some() {
        return Err(Error::invalid("option 'argv': a quote is not closed"));
    }
    all.extend(word);
    match all.is_empty() {
        true => Err(Error::invalid("option 'argv' is empty")),
        false => Ok(all.into_iter().map(OsString::from_vec).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_taken_apart_as_a_shell_does() {
        let split = |t: &str| words(t.as_bytes()).unwrap();
        assert_eq!(split("nbdkit -s  memory 1M"), ["nbdkit", "-s", "memory", "1M"]);
        assert_eq!(split(r#"a 'b c' "d \" e" f\ g '' "#), ["a", "b c", "d \" e", "f g", ""]);
        for bad in ["", "  ", "'a", "a\\"] {
            assert!(words(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
