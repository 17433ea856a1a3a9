//! LUKS version 1: data encrypted by sectors behind a header with key slots. A format of its own over
//! any device, and what encrypts the data inside a qcow2 image.
//!
//! What it promises:
//! * Data is encrypted on its way out and never in the caller's memory; it is decrypted where it is
//!   wanted.
//! * No trim and no zeroing but by writing: what was never written reads as noise, the same at every
//!   read, as in QEMU and cryptsetup. What a resize adds reads as zeroes, which are written for it.
//! * A header is believed only within limits (`header`), and trying a passphrase costs a bounded time.
//! * Keys are wiped when the image is closed.
//!
//! Source: LUKS1 On-Disk Format Specification 1.2.3.

mod amend;
mod header;
mod keys;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};

use parking_lot::Mutex;

use super::Params;
use super::crypt::{self, Crypt};
use crate::block::*;
use crate::crypto::{Alg, Hash, Ivgen, Mode, SECTOR, Secret, SectorCipher, Spec};
pub use amend::change_keys;
pub use header::{Area, Header, MAGIC};

/// `QBLK_STATE_ENCRYPTED`.
const STATE_ENCRYPTED: u32 = 8;

/// The cipher of the data behind the header in `area` of `dev`, with the master key that `key` opens.
pub fn open_key(
    dev: &Device,
    area: Area,
    header: &Header,
    key: Option<&Secret>,
    untrusted: bool,
) -> Result<Crypt> {
    let (spec, _) = header.known(dev.name())?;
    let passphrase = key.ok_or_else(|| Error::NeedKey(dev.name().clone()))?;
    let master = keys::unlock(dev, area, header, passphrase, untrusted)?;
    let cipher =
        SectorCipher::new(spec, &master).map_err(|what| Error::corrupt(dev.name(), what))?;
    Ok(Crypt::new(cipher))
}

/// An open LUKS image.
pub struct Luks {
    file: Arc<Device>,
    header: Header,
    /// What is told of the encryption: key slots may change.
    shown: Mutex<Header>,
    /// None if it is only described.
    crypt: Option<Crypt>,
    /// Of the data, bytes.
    size: AtomicU64,
    calls: Arc<InFlight>,
}

impl Luks {
    /// Open the image in `file`.
    pub fn open(file: Device, params: Params) -> Result<Self> {
        let header = Header::read(&file, Area::START)?;
        let crypt = if params.info_only {
            None
        } else {
            let key = params.key.as_ref();
            Some(open_key(&file, Area::START, &header, key, params.untrusted)?)
        };
        let Some(size) = file.size().checked_sub(header.payload) else {
            return Err(Error::corrupt(
                file.name(),
                format!(
                    "the data begins at {}, past the end of the file ({} bytes): is it cut off?",
                    header.payload,
                    file.size()
                ),
            ));
        };
        // A part of a sector can not be decrypted.
        let size = AtomicU64::new(size - size % SECTOR as u64);
        let shown = Mutex::new(header.clone());
        Ok(Self { file: Arc::new(file), header, shown, crypt, size, calls: params.calls })
    }

    fn crypt(&self) -> Result<&Crypt> {
        self.crypt.as_ref().ok_or_else(|| Error::NeedKey(self.file.name().clone()))
    }

    fn grow(&self, old: u64, new: u64) -> Result<()> {
        let end = new.checked_add(self.header.payload).filter(|e| *e <= i64::MAX as u64);
        let end = end.ok_or_else(|| Error::TooBig {
            file: self.file.name().clone(),
            what: format!("{new} bytes and a header are more than a file can have"),
        })?;
        self.file.driver().resize(end, Prealloc::Off, false)?;
        // Nobody gets there yet: the size is still the old one.
        let zeroes = OneIov::src(&ZEROES.0);
        let mut at = old;
        while at < new {
            let part = zeroes.iov().split_at((new - at).min(ZEROES.0.len() as u64) as usize).0;
            if let Err(e) = self.write(part, at, ReqFlags::NONE) {
                let back = self.header.payload + old;
                let _ = self.file.driver().resize(back, Prealloc::Off, true);
                return Err(e);
            }
            at += part.len() as u64;
        }
        self.size.store(new, Release);
        Ok(())
    }
}

impl Driver for Luks {
    fn name(&self) -> &Name {
        self.file.name()
    }
    fn kind(&self) -> &'static str {
        "luks"
    }
    fn caps(&self) -> Caps {
        crypt::caps(&self.file)
    }
    fn size(&self) -> u64 {
        self.size.load(Acquire)
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let host = self.header.payload + offset;
        self.crypt()?.read(&self.file, buf, host, offset / SECTOR as u64)
    }
    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        let host = self.header.payload + offset;
        self.crypt()?.read_now(&self.file, buf, host, offset / SECTOR as u64)
    }
    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        let host = self.header.payload + offset;
        self.crypt()?.write(&self.file, buf, host, offset / SECTOR as u64, flags)
    }
    fn flush(&self) -> Result<()> {
        self.file.flush()
    }
    fn cache(&self, offset: u64, count: u64) -> Result<()> {
        self.file.cache(self.header.payload + offset, count)
    }
    fn map(&self, offset: u64, count: u64) -> Result<Run<'_>> {
        let offset = self.header.payload + offset;
        Ok(Run { len: count, place: Place::Encrypted { dev: &self.file, offset } })
    }
    fn resize(&self, size: u64, prealloc: Prealloc, shrink: bool) -> Result<()> {
        if !size.is_multiple_of(SECTOR as u64) {
            return Err(Error::invalid(format!(
                "{size} bytes: an encrypted image has whole sectors of {SECTOR} bytes"
            )));
        }
        if prealloc == Prealloc::Metadata {
            return Err(Error::invalid("preallocation=metadata: a LUKS image has no metadata"));
        }
        let old = self.size.load(Acquire);
        if size == old {
            return Ok(());
        }
        if size > old {
            // All of it is written, so it is allocated whatever was asked for.
            return self.grow(old, size);
        }
        self.size.store(size, Release);
        self.calls.wait();
        let end = self.header.payload + size;
        let done = self.file.driver().resize(end, Prealloc::Off, shrink);
        if done.is_err() {
            self.size.store(old, Release);
        }
        done
    }
    fn allocated(&self) -> Option<u64> {
        self.file.driver().allocated()
    }
    fn amend(&self, to: &Amend, _progress: Progress<'_>) -> Result<bool> {
        if !to.is_keys_only() {
            return Err(Error::NotSupported("amending anything but key slots"));
        }
        if let Some(keys) = &to.keys {
            *self.shown.lock() = change_keys(&self.file, Area::START, keys)?;
        }
        Ok(false)
    }
    fn close(&self) -> Result<()> {
        self.file.driver().close()
    }
    fn describe(&self) -> Description {
        Description {
            state: STATE_ENCRYPTED,
            format: "luks",
            properties: self.shown.lock().properties(),
            ..Description::default()
        }
    }
}

/// What new data is encrypted with. The values of text are `qemu-img create`'s.
#[derive(Clone)]
pub struct Locking {
    spec: Spec,
    hash: Hash,
    key_len: usize,
    /// How long trying the passphrase is to take, milliseconds.
    ms: u64,
    passphrase: Secret,
}

/// The names that [`Locking`] is made from, each as it was given.
#[derive(Default)]
#[allow(missing_docs)]
pub struct Names<'a> {
    pub cipher_alg: Option<&'a str>,
    pub cipher_mode: Option<&'a str>,
    pub ivgen_alg: Option<&'a str>,
    pub ivgen_hash_alg: Option<&'a str>,
    pub hash_alg: Option<&'a str>,
}

impl std::fmt::Debug for Locking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the passphrase.
        f.debug_struct("Locking").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl Locking {
    /// Encrypt as `names` say (by default AES-256 in XTS with plain64 and sha256), under `passphrase`.
    pub fn new(names: &Names<'_>, ms: u64, passphrase: Secret) -> Result<Self> {
        let unknown = |what: &str, given: &str, expected: &str| {
            let given = quoted(given.as_bytes());
            Error::invalid(format!("option '{what}': found {given}, expected {expected}"))
        };
        let alg = names.cipher_alg.unwrap_or("aes-256");
        let (cipher, bits) = alg
            .split_once('-')
            .and_then(|(name, bits)| Some((Alg::by_name(name)?, bits.parse::<usize>().ok()?)))
            .filter(|(cipher, bits)| bits % 8 == 0 && cipher.has_key_len(bits / 8))
            .ok_or_else(|| {
                let expected =
                    "aes-256 or another of aes, serpent, twofish (-128, -192, -256), cast5-128";
                unknown("cipher-alg", alg, expected)
            })?;
        let mode = names.cipher_mode.unwrap_or("xts");
        let mode = Mode::by_name(mode)
            .ok_or_else(|| unknown("cipher-mode", mode, "xts, cbc, ctr or ecb"))?;
        let hash = |what: &str, name: &str| {
            Hash::by_name(name).ok_or_else(|| unknown(what, name, &Hash::NAMES.join(", ")))
        };
        let ivgen = match names.ivgen_alg.unwrap_or("plain64") {
            "plain" => Ivgen::Plain,
            "plain64" => Ivgen::Plain64,
            "essiv" => {
                Ivgen::Essiv(hash("ivgen-hash-alg", names.ivgen_hash_alg.unwrap_or("sha256"))?)
            }
            other => return Err(unknown("ivgen-alg", other, "plain, plain64 or essiv")),
        };
        if names.ivgen_hash_alg.is_some() && !matches!(ivgen, Ivgen::Essiv(_)) {
            return Err(Error::invalid("option 'ivgen-hash-alg' has no use here (not essiv)"));
        }
        let hash = hash("hash-alg", names.hash_alg.unwrap_or("sha256"))?;
        let spec = Spec { alg: cipher, mode, ivgen };
        let key_len = bits / 8 * if mode == Mode::Xts { 2 } else { 1 };
        spec.check(key_len).map_err(Error::invalid)?;
        Ok(Self { spec, hash, key_len, ms, passphrase })
    }

    /// Bytes that the header and the key slots take.
    pub fn header_len(&self) -> u64 {
        Header::new(self.spec, self.hash, self.key_len, String::new()).payload
    }

    /// Write a header with a new master key to `offset` of `dev`.
    pub fn write(&self, dev: &Device, offset: u64) -> Result<()> {
        let mut header = Header::new(self.spec, self.hash, self.key_len, keys::uuid()?);
        let area = Area { offset, len: None };
        keys::lock(dev, area, &mut header, &self.passphrase, self.ms).map(drop)
    }
}
