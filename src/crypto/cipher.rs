//! A disk's sectors encrypted one by one.
//!
//! Block ciphers run over many blocks at a call, because that is what processors are fast at: XTS
//! takes eight sectors at a time, with the tweaks of all of them computed first; CBC decrypts a
//! sector at a time and encrypts eight sectors side by side, since within one each block needs the
//! one before it.
//!
//! Sources: IEEE 1619 (XTS), NIST SP 800-38A (CBC, CTR), "dm-crypt" of the Linux kernel (how the
//! initial vector is made from a sector's number: plain, plain64, essiv).

use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use zeroize::{Zeroize, Zeroizing};

use super::Hash;

/// Bytes that one initial vector is for.
pub const SECTOR: usize = 512;
/// Sectors worked on at once.
const BATCH: usize = 8;
/// Most bytes of a block.
const BLOCK: usize = 16;

/// A block cipher with its key.
trait Blocks: Send + Sync {
    /// Encrypt whole blocks, each by itself.
    fn encrypt(&self, data: &mut [u8]);
    /// Decrypt whole blocks, each by itself.
    fn decrypt(&self, data: &mut [u8]);
}

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + Send + Sync> Blocks for C {
    fn encrypt(&self, data: &mut [u8]) {
        self.encrypt_blocks(Array::slice_as_chunks_mut(data).0);
    }
    fn decrypt(&self, data: &mut [u8]) {
        self.decrypt_blocks(Array::slice_as_chunks_mut(data).0);
    }
}

/// A block cipher by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Alg {
    Aes,
    Serpent,
    Twofish,
    Cast5,
}

/// How blocks of a sector hang together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Mode {
    Xts,
    Cbc,
    Ctr,
    Ecb,
}

/// How a sector's number becomes its initial vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ivgen {
    /// Its lower 32 bits.
    Plain,
    /// All 64 bits.
    Plain64,
    /// All 64 bits, encrypted with a hash of the key.
    Essiv(Hash),
}

/// What sectors are encrypted with, but for the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Spec {
    pub alg: Alg,
    pub mode: Mode,
    pub ivgen: Ivgen,
}

impl Alg {
    /// The cipher of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "aes" => Self::Aes,
            "serpent" => Self::Serpent,
            "twofish" => Self::Twofish,
            "cast5" => Self::Cast5,
            _ => return None,
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Serpent => "serpent",
            Self::Twofish => "twofish",
            Self::Cast5 => "cast5",
        }
    }

    /// Bytes of a block.
    fn block(self) -> usize {
        if self == Self::Cast5 { 8 } else { BLOCK }
    }

    /// Whether keys may have this many bytes.
    pub fn has_key_len(self, len: usize) -> bool {
        if self == Self::Cast5 { len == 16 } else { matches!(len, 16 | 24 | 32) }
    }

    /// The cipher with its key, if it may have that many bytes.
    fn with_key(self, key: &[u8]) -> Option<Box<dyn Blocks>> {
        fn boxed<C: KeyInit + Blocks + 'static>(key: &[u8]) -> Option<Box<dyn Blocks>> {
            C::new_from_slice(key).ok().map(|c| Box::new(c) as Box<dyn Blocks>)
        }
        if !self.has_key_len(key.len()) {
            return None;
        }
        match (self, key.len()) {
            (Self::Aes, 16) => boxed::<aes::Aes128>(key),
            (Self::Aes, 24) => boxed::<aes::Aes192>(key),
            (Self::Aes, _) => boxed::<aes::Aes256>(key),
            (Self::Serpent, _) => boxed::<serpent::Serpent>(key),
            (Self::Twofish, _) => boxed::<twofish::Twofish>(key),
            (Self::Cast5, _) => boxed::<cast5::Cast5>(key),
        }
    }
}

impl Mode {
    /// The mode of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "xts" => Self::Xts,
            "cbc" => Self::Cbc,
            "ctr" => Self::Ctr,
            "ecb" => Self::Ecb,
            _ => return None,
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xts => "xts",
            Self::Cbc => "cbc",
            Self::Ctr => "ctr",
            Self::Ecb => "ecb",
        }
    }
}

impl Spec {
    /// Read a LUKS header's names: "aes" and "xts-plain64", "cbc-essiv:sha256". The error is what of
    /// it is not known.
    pub fn parse(cipher: &str, mode: &str) -> Result<Self, String> {
        let unknown = |what: &str| Err(format!("cipher {}", crate::block::quoted(what.as_bytes())));
        let Some(alg) = Alg::by_name(cipher) else { return unknown(cipher) };
        let whole = format!("{cipher}-{mode}");
        let (mode, iv) = mode.split_once('-').unwrap_or((mode, ""));
        let Some(mode) = Mode::by_name(mode) else { return unknown(&whole) };
        let ivgen = match iv.split_once(':') {
            None if iv == "plain" => Ivgen::Plain,
            None if iv == "plain64" => Ivgen::Plain64,
            None if iv.is_empty() && mode == Mode::Ecb => Ivgen::Plain,
            Some(("essiv", hash)) => match Hash::by_name(hash) {
                Some(hash) => Ivgen::Essiv(hash),
                None => return unknown(&whole),
            },
            _ => return unknown(&whole),
        };
        Ok(Self { alg, mode, ivgen })
    }

    /// The mode as LUKS headers name it.
    pub fn mode_name(&self) -> String {
        let mode = self.mode.name();
        match self.ivgen {
            Ivgen::Plain => format!("{mode}-plain"),
            Ivgen::Plain64 => format!("{mode}-plain64"),
            Ivgen::Essiv(hash) => format!("{mode}-essiv:{}", hash.name()),
        }
    }

    /// Refuse what can not be: the error says why keys of `key_len` bytes do not fit.
    pub fn check(&self, key_len: usize) -> Result<(), String> {
        let own = if self.mode == Mode::Xts { key_len / 2 } else { key_len };
        let name = format!("{}-{}", self.alg.name(), self.mode_name());
        if self.mode == Mode::Xts && self.alg.block() != BLOCK {
            return Err(format!("{name}: XTS is for ciphers with blocks of {BLOCK} bytes"));
        }
        if !self.alg.has_key_len(own) || (self.mode == Mode::Xts && !key_len.is_multiple_of(2)) {
            return Err(format!("{name} has no keys of {key_len} bytes"));
        }
        match self.ivgen {
            Ivgen::Essiv(hash) if !self.alg.has_key_len(hash.size()) => Err(format!(
                "{name}: a digest of {} bytes is no key of {}",
                hash.size(),
                self.alg.name()
            )),
            _ => Ok(()),
        }
    }
}

/// Encrypts and decrypts sectors. Its keys are wiped when it is dropped.
pub struct SectorCipher {
    spec: Spec,
    block: usize,
    main: Box<dyn Blocks>,
    /// XTS: what makes the tweak.
    tweak: Option<Box<dyn Blocks>>,
    /// ESSIV: what makes the initial vector.
    essiv: Option<Box<dyn Blocks>>,
}

/// One block for each sector of a batch.
type Ivs = [[u8; BLOCK]; BATCH];

impl SectorCipher {
    /// The cipher that `spec` names with `key`; the error is that of [`Spec::check`].
    pub fn new(spec: Spec, key: &[u8]) -> Result<Self, String> {
        spec.check(key.len())?;
        let make =
            |key: &[u8]| spec.alg.with_key(key).ok_or_else(|| String::from("no such key length"));
        let (own, tweak) = match spec.mode {
            Mode::Xts => {
                let (own, tweak) = key.split_at(key.len() / 2);
                (own, Some(make(tweak)?))
            }
            _ => (key, None),
        };
        let essiv = match spec.ivgen {
            Ivgen::Essiv(hash) => {
                let mut salt = Zeroizing::new(vec![0; hash.size()]);
                hash.digest(&[key], &mut salt);
                Some(make(&salt)?)
            }
            _ => None,
        };
        let cipher = Self { spec, block: spec.alg.block(), main: make(own)?, tweak, essiv };
        super::wipe_stack();
        Ok(cipher)
    }

    /// Encrypt sectors from number `sector` on, where they are. A last one may be shorter, but must
    /// have whole blocks.
    pub fn encrypt(&self, data: &mut [u8], sector: u64) {
        self.batches(data, sector, true);
    }

    /// Decrypt sectors; see [`SectorCipher::encrypt`].
    pub fn decrypt(&self, data: &mut [u8], sector: u64) {
        self.batches(data, sector, false);
    }

    fn batches(&self, data: &mut [u8], mut sector: u64, encrypt: bool) {
        debug_assert!(data.len().is_multiple_of(self.block));
        for batch in data.chunks_mut(BATCH * SECTOR) {
            let n = batch.len().div_ceil(SECTOR);
            let mut ivs = self.ivs(sector, n);
            match (self.spec.mode, encrypt) {
                (Mode::Xts, _) => self.xts(batch, &mut ivs, n, encrypt),
                (Mode::Cbc, true) => self.cbc_encrypt(batch, &mut ivs, n),
                (Mode::Cbc, false) => self.cbc_decrypt(batch, &ivs),
                (Mode::Ctr, _) => self.ctr(batch, &ivs),
                (Mode::Ecb, true) => self.main.encrypt(batch),
                (Mode::Ecb, false) => self.main.decrypt(batch),
            }
            sector = sector.wrapping_add(n as u64);
        }
    }

    /// The initial vectors of `n` sectors, packed: one after the other in blocks of this cipher's size.
    fn ivs(&self, sector: u64, n: usize) -> Ivs {
        let mut ivs = [[0; BLOCK]; BATCH];
        let bytes = ivs.as_flattened_mut();
        for (i, iv) in bytes.chunks_exact_mut(self.block).take(n).enumerate() {
            let number = sector.wrapping_add(i as u64);
            let number =
                if self.spec.ivgen == Ivgen::Plain { number & 0xffff_ffff } else { number };
            iv[..8].copy_from_slice(&number.to_le_bytes());
        }
        if let Some(essiv) = &self.essiv {
            essiv.encrypt(&mut bytes[..n * self.block]);
        }
        ivs
    }

    fn xts(&self, data: &mut [u8], ivs: &mut Ivs, n: usize, encrypt: bool) {
        const PER_SECTOR: usize = SECTOR / BLOCK;
        let Some(tweak) = &self.tweak else { return };
        tweak.encrypt(ivs[..n].as_flattened_mut());
        let mut tweaks = [[0u128; PER_SECTOR]; BATCH];
        for (iv, tweaks) in ivs[..n].iter().zip(&mut tweaks) {
            let mut t = u128::from_le_bytes(*iv);
            for slot in tweaks {
                *slot = t;
                // Times x in GF(2^128).
                t = (t << 1) ^ ((t as i128 >> 127) as u128 & 0x87);
            }
        }
        let tweaks = &tweaks.as_flattened()[..data.len() / BLOCK];
        xor(data, tweaks);
        if encrypt {
            self.main.encrypt(data);
        } else {
            self.main.decrypt(data);
        }
        xor(data, tweaks);
    }

    fn cbc_encrypt(&self, data: &mut [u8], ivs: &mut Ivs, n: usize) {
        let block = self.block;
        let state = &mut ivs.as_flattened_mut()[..n * block];
        for at in (0..SECTOR).step_by(block) {
            // The last sector may end before the others.
            let there = data.chunks_mut(SECTOR).take_while(|s| at < s.len()).count();
            let state = &mut state[..there * block];
            for (sector, state) in data.chunks(SECTOR).zip(state.chunks_mut(block)) {
                state.iter_mut().zip(&sector[at..at + block]).for_each(|(s, d)| *s ^= d);
            }
            self.main.encrypt(state);
            for (sector, state) in data.chunks_mut(SECTOR).zip(state.chunks(block)) {
                sector[at..at + block].copy_from_slice(state);
            }
        }
    }

    fn cbc_decrypt(&self, data: &mut [u8], ivs: &Ivs) {
        let block = self.block;
        for (sector, iv) in data.chunks_mut(SECTOR).zip(ivs.as_flattened().chunks(block)) {
            let mut chain = [0; BLOCK + SECTOR];
            chain[..block].copy_from_slice(iv);
            chain[block..block + sector.len()].copy_from_slice(sector);
            self.main.decrypt(sector);
            sector.iter_mut().zip(&chain).for_each(|(d, c)| *d ^= c);
        }
    }

    fn ctr(&self, data: &mut [u8], ivs: &Ivs) {
        let block = self.block;
        for (sector, iv) in data.chunks_mut(SECTOR).zip(ivs.as_flattened().chunks(block)) {
            let mut stream = [0; SECTOR];
            let mut counter = [0; BLOCK];
            counter[BLOCK - block..].copy_from_slice(iv);
            let mut counter = u128::from_be_bytes(counter);
            for slot in stream[..sector.len()].chunks_exact_mut(block) {
                slot.copy_from_slice(&counter.to_be_bytes()[BLOCK - block..]);
                counter = counter.wrapping_add(1);
            }
            self.main.encrypt(&mut stream[..sector.len()]);
            sector.iter_mut().zip(&stream).for_each(|(d, s)| *d ^= s);
            stream.zeroize();
        }
    }
}

/// Change whole blocks by the tweaks.
#[inline]
fn xor(data: &mut [u8], tweaks: &[u128]) {
    for (block, tweak) in data.as_chunks_mut::<BLOCK>().0.iter_mut().zip(tweaks) {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
    }
}

#[cfg(test)]
mod tests;
