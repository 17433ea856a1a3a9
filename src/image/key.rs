//! Passphrases, as the options `key` and `key-file` give them.

use std::fs::File;
use std::io::Read;

use super::Options;
use crate::block::*;
use crate::crypto::{self, Secret};

/// Longest passphrase, bytes. (cryptsetup has the same limit for key files.)
const MAX_LEN: usize = 8 << 20;

/// A key for an image that has no lock.
pub(super) fn no_use(name: &Name) -> Error {
    let what = "options 'key' and 'key-file' have no use here (it is not encrypted)";
    Error::invalid(format!("{name}: {what}"))
}

/// The passphrase that the options give, if they do. A file's bytes are taken as they are, a newline
/// at its end too, as QEMU does.
pub(super) fn read(options: &Options) -> Result<Option<Secret>> {
    read_from(options, "key", "key-file")
}

/// [`read`], by options of other names.
pub(super) fn read_from(options: &Options, text: &str, file: &str) -> Result<Option<Secret>> {
    match (options.get(text), options.os(file)) {
        (None, None) => Ok(None),
        (Some(key), None) => Ok(Some(Secret::new(key.to_vec()))),
        (Some(_), Some(_)) => Err(Error::invalid(format!(
            "the options '{text}' and '{file}' were both given: one is the key"
        ))),
        (None, Some(file)) => {
            let name = Name::from(file.to_owned());
            let failed = |op| {
                let file = name.clone();
                move |e: std::io::Error| {
                    let errno = e.raw_os_error().unwrap_or(libc::EINVAL);
                    Error::Os { op, file: file.clone(), errno }
                }
            };
            let mut from = File::open(file).map_err(failed("opening the key file"))?;
            // Read in place: memory that grows leaves copies behind.
            let mut room = crypto::blank(64 << 10);
            let mut len = 0;
            loop {
                if len == room.len() {
                    let mut more = crypto::blank(2 * len);
                    more[..len].copy_from_slice(&room);
                    room = more;
                }
                match from.read(&mut room[len..]) {
                    Ok(0) => break,
                    Ok(n) => len += n,
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(failed("reading the key file")(e)),
                }
                if len > MAX_LEN {
                    let what = format!("{name}: a key file has at most {MAX_LEN} bytes");
                    return Err(Error::invalid(what));
                }
            }
            Ok(Some(Secret::new(room[..len].to_vec())))
        }
    }
}
