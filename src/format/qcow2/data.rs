//! Data clusters: where their bytes lie, and as what.
//!
//! Tables are read from and written to the image's file; data goes by way of `data`. That is the file
//! as well (or the external data file), or, where LUKS encrypts the data, that file seen through the cipher: sectors are numbered
//! by their place on the host, so that one device serves for all clusters. The old AES encryption
//! numbers sectors as the guest does; a device by host offsets can not know that number, and so it is
//! done here.
//!
//! Either way nobody copies encrypted bytes: they are good for one place only.
//!
//! Source: "LUKS-encrypted images" and "crypt_method" of the QCOW2 specification.

use libc::iovec;

use super::*;
use crate::crypto::{self, Alg, Ivgen, Mode, SECTOR, SectorCipher, Spec};
use crate::format::crypt::{Crypt, Veiled};
use crate::format::luks;

/// Bytes of the key of the old encryption.
const AES_KEY: usize = 16;

/// What data goes by.
pub(super) struct Encryption {
    pub(super) data: Arc<Device>,
    /// The old encryption.
    pub(super) aes: Option<Crypt>,
    /// The header of LUKS.
    pub(super) luks: Option<luks::Header>,
    /// What an external data file is to be seen through.
    pub(super) veil: Option<Crypt>,
}

impl Encryption {
    /// Find out how the data of the image in `file` is encrypted.
    pub(super) fn open(file: &Arc<Device>, header: &Header, params: &Params) -> Result<Self> {
        let external = header.incompatible & incompat::DATA_FILE != 0;
        let data = if external { external::missing(file.name()) } else { file.clone() };
        let plain = Self { data, aes: None, luks: None, veil: None };
        let name = file.name();
        match header.crypt {
            0 => Ok(plain),
            _ if params.info_only => {
                let area = header.luks_area(file).ok();
                let luks = area.and_then(|area| luks::Header::read(file, area).ok());
                Ok(Self { luks, ..plain })
            }
            1 => {
                // QEMU, which made it, shows whole sectors only.
                if !header.size.is_multiple_of(SECTOR as u64) {
                    let what = "AES encryption of a size that is no multiple of 512";
                    return Err(Error::unsupported(name, what));
                }
                let given = params.key.as_ref().ok_or_else(|| Error::NeedKey(name.clone()))?;
                let mut key = crypto::blank(AES_KEY);
                key.iter_mut().zip(given.iter()).for_each(|(k, g)| *k = *g);
                let spec = Spec { alg: Alg::Aes, mode: Mode::Cbc, ivgen: Ivgen::Plain64 };
                let cipher = SectorCipher::new(spec, &key).map_err(Error::invalid)?;
                Ok(Self { aes: Some(Crypt::new(cipher)), ..plain })
            }
            _ => {
                let area = header.luks_area(file)?;
                let luks = luks::Header::read(file, area)?;
                let key = params.key.as_ref();
                let crypt = luks::open_key(file, area, &luks, key, params.untrusted)?;
                let luks = Some(luks);
                if external {
                    return Ok(Self { luks, veil: Some(crypt), ..plain });
                }
                let data = Device::new(Box::new(Veiled::new(file.clone(), crypt)));
                Ok(Self { data: Arc::new(data), luks, ..plain })
            }
        }
    }
}

impl Qcow2 {
    /// Whether its data is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.header.crypt != 0
    }

    /// What the sizes and offsets of requests are multiples of.
    pub(super) fn unit(&self) -> u64 {
        if self.aes.is_some() { SECTOR as u64 } else { 1 }
    }

    /// The place of data at `host`.
    #[inline]
    pub(super) fn place_of(&self, host: u64) -> Place<'_> {
        match &self.aes {
            None => Place::At { dev: &self.data, offset: host },
            Some(_) => Place::Encrypted { dev: &self.data, offset: host },
        }
    }

    /// Read data of the guest offset `guest` from `host`.
    #[inline]
    pub(super) fn read_host(&self, buf: Dst<'_>, host: u64, guest: u64) -> Result<()> {
        match &self.aes {
            None => self.data.read(buf, host),
            Some(aes) => aes.read(&self.data, buf, host, guest / SECTOR as u64),
        }
    }

    /// [`Qcow2::read_host`] if nothing has to be waited for.
    pub(super) fn read_host_now(&self, buf: Dst<'_>, host: u64, guest: u64) -> Result<bool> {
        match &self.aes {
            None => self.data.read_now(buf, host),
            Some(aes) => aes.read_now(&self.data, buf, host, guest / SECTOR as u64),
        }
    }

    /// Write data of the guest offset `guest` to `host`.
    #[inline]
    pub(super) fn write_host(
        &self,
        buf: Src<'_>,
        host: u64,
        guest: u64,
        flags: ReqFlags,
    ) -> Result<()> {
        match &self.aes {
            None => self.data.write(buf, host, flags),
            Some(aes) => aes.write(&self.data, buf, host, guest / SECTOR as u64, flags),
        }
    }

    /// Write `bytes` zeroes.
    pub(super) fn write_zeroes(&self, mut host: u64, mut guest: u64, bytes: u64) -> Result<()> {
        let end = host + bytes;
        let mut vecs = [iovec { iov_base: ptr::null_mut(), iov_len: 0 }; 64];
        while host < end {
            let (n, len) = zero_iovecs(&mut vecs, end - host);
            // SAFETY: the pieces lie in the static zeroes, which are only read.
            let zeroes = unsafe { Src::from_raw(&vecs[..n], len) };
            self.write_host(zeroes, host, guest, ReqFlags::NONE)?;
            host += len as u64;
            guest += len as u64;
        }
        Ok(())
    }
}
