//! The LUKS1 header: reading it, with every limit checked before a number is used, and writing it.
//!
//! Source: LUKS1 On-Disk Format Specification 1.2.3, section 2.

use crate::block::*;
use crate::crypto::{Hash, SECTOR, Spec};

/// The first bytes of a header.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Bytes of a header.
pub const LEN: usize = 592;
/// Bytes of a salt and of the master key's digest.
pub const SALT: usize = 32;
pub const DIGEST: usize = 20;
/// Pieces that the specification splits a key into. Nobody uses another number; fewer do no harm.
pub const STRIPES: u32 = 4000;
/// Key slots.
pub const SLOTS: usize = 8;
/// Bytes of the longest key: two of AES-256 for XTS.
const MAX_KEY: u32 = 64;
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
const SLOTS_AT: usize = 208;
const SLOT_LEN: usize = 48;

/// What trying a passphrase may cost, in rounds of HMAC: the sum over all that an opening may have to
/// do. A header can ask for 2^32 rounds in each of nine places, hours of computing, so there must be
/// an end. Programs that make images choose numbers for two seconds on their host, 2^22 rounds or
/// so; the limit is 16 times that for each of the eight slots, some minutes, so that who chose much is not
/// refused. A hostile image gets what eight slots by default cost, some ten seconds.
pub const MAX_ROUNDS: u64 = 1 << 29;
const MAX_UNTRUSTED_ROUNDS: u64 = 1 << 25;

/// A key slot.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Slot {
    pub active: bool,
    pub iterations: u32,
    pub salt: [u8; SALT],
    /// Where the split key lies, bytes from the header on.
    pub offset: u64,
    pub stripes: u32,
}

/// A header, checked.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Header {
    /// Names as they are written; for XTS keys have twice the cipher's bytes.
    pub cipher: String,
    pub mode: String,
    pub hash: String,
    /// What those mean, or what of them this build lacks.
    known: std::result::Result<(Spec, Hash), String>,
    /// Where the data begins, bytes from the header on.
    pub payload: u64,
    pub key_len: usize,
    pub digest: [u8; DIGEST],
    pub salt: [u8; SALT],
    pub iterations: u32,
    pub uuid: String,
    pub slots: Vec<Slot>,
}

/// Where in a device a header may be.
#[derive(Clone, Copy)]
pub struct Area {
    /// Where the header begins, bytes.
    pub offset: u64,
    /// Bytes that it and its key slots may take; `None` = up to where it says that the data begins.
    pub len: Option<u64>,
}

impl Area {
    /// The beginning of a device.
    pub const START: Self = Self { offset: 0, len: None };
}

impl Header {
    /// Read and check the header in `area` of `dev`.
    pub fn read(dev: &Device, area: Area) -> Result<Self> {
        let name = dev.name();
        let mut raw = [0; LEN];
        let there = dev.size().saturating_sub(area.offset).min(area.len.unwrap_or(u64::MAX));
        let there = there.min(LEN as u64) as usize;
        dev.read_slice(&mut raw[..there], area.offset)?;
        if there < 8 || raw[..6] != MAGIC {
            let what = match there {
                0 => "not in LUKS format: there is nothing".to_owned(),
                n if n < 8 => format!("not in LUKS format: there are only {n} bytes"),
                _ => format!(
                    "not in LUKS format: found {:02x?} at offset 0, expected {MAGIC:02x?}",
                    &raw[..6]
                ),
            };
            return Err(Error::format(name, what));
        }
        let version = u16::from_be_bytes([raw[6], raw[7]]);
        if version != 1 {
            return Err(Error::unsupported(name, format!("LUKS version {version} (1 is)")));
        }
        if there < LEN {
            let what = format!("the LUKS header is cut off: it has {LEN} bytes, {there} are there");
            return Err(Error::format(name, what));
        }
        Self::parse(name, &raw, area.len)
    }

    fn parse(name: &Name, raw: &[u8; LEN], area: Option<u64>) -> Result<Self> {
        let bad = |what: String| Error::corrupt(name, format!("LUKS header: {what}"));
        let u32_at = |at: usize| {
            raw.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
        };
        let bytes = |at: usize, out: &mut [u8]| out.copy_from_slice(&raw[at..at + out.len()]);
        let text = |at: usize, len: usize, what: &str| {
            let field = &raw[at..at + len];
            let end = field.iter().position(|&b| b == 0);
            let text = end.map(|n| &field[..n]).filter(|t| t.iter().all(u8::is_ascii_graphic));
            text.map(|t| String::from_utf8_lossy(t).into_owned()).ok_or_else(|| {
                bad(format!(
                    "{what} at offset {at}: found {}, expected a text that ends",
                    quoted(field)
                ))
            })
        };
        let (cipher, mode) = (text(8, 32, "cipher name")?, text(40, 32, "cipher mode")?);
        let hash = text(72, 32, "hash")?;
        let key_len = u32_at(108);
        if key_len == 0 || key_len > MAX_KEY {
            return Err(bad(format!(
                "key bytes at offset 108: found {key_len}, expected 1 to {MAX_KEY}"
            )));
        }
        let known = match (Spec::parse(&cipher, &mode), Hash::by_name(&hash)) {
            (Ok(spec), Some(hash)) => {
                spec.check(key_len as usize).map_err(bad)?;
                Ok((spec, hash))
            }
            (Err(what), _) => Err(format!("encryption with {what}")),
            (_, None) => Err(format!("encryption with hash {}", quoted(hash.as_bytes()))),
        };
        let iterations = u32_at(164);
        if iterations == 0 {
            return Err(
                bad("digest iterations at offset 164: found 0, expected at least 1".into()),
            );
        }
        let payload = u64::from(u32_at(104)) * SECTOR as u64;
        if area.is_none() && payload == 0 {
            return Err(Error::unsupported(
                name,
                "LUKS with a header that lies apart from the data",
            ));
        }
        let limit = area.unwrap_or(payload);
        if limit < LEN as u64 {
            return Err(bad(format!(
                "payload offset at offset 104: found {limit} bytes, expected at least {LEN}"
            )));
        }
        let mut h = Self {
            cipher,
            mode,
            hash,
            known,
            payload,
            key_len: key_len as usize,
            digest: [0; DIGEST],
            salt: [0; SALT],
            iterations,
            uuid: text(168, 40, "UUID").unwrap_or_default(),
            slots: Vec::with_capacity(SLOTS),
        };
        bytes(112, &mut h.digest);
        bytes(132, &mut h.salt);
        for i in 0..SLOTS {
            let at = SLOTS_AT + i * SLOT_LEN;
            let mut slot = Slot {
                active: u32_at(at) == ACTIVE,
                iterations: u32_at(at + 4),
                salt: [0; SALT],
                offset: u64::from(u32_at(at + 40)) * SECTOR as u64,
                stripes: u32_at(at + 44),
            };
            bytes(at + 8, &mut slot.salt);
            if !slot.active && u32_at(at) != INACTIVE {
                return Err(bad(format!(
                    "state of key slot {i} at offset {at}: found {:#010x}, expected {ACTIVE:#010x} or \
                     {INACTIVE:#010x}",
                    u32_at(at)
                )));
            }
            if slot.active {
                h.check_slot(i, &slot, limit).map_err(bad)?;
            }
            h.slots.push(slot);
        }
        Ok(h)
    }

    pub(super) fn check_slot(
        &self,
        i: usize,
        slot: &Slot,
        limit: u64,
    ) -> std::result::Result<(), String> {
        let at = SLOTS_AT + i * SLOT_LEN;
        if slot.iterations == 0 {
            return Err(format!(
                "iterations of key slot {i} at offset {}: found 0, expected at least 1",
                at + 4
            ));
        }
        if slot.stripes == 0 || slot.stripes > STRIPES {
            return Err(format!(
                "stripes of key slot {i} at offset {}: found {}, expected 1 to {STRIPES}",
                at + 44,
                slot.stripes
            ));
        }
        // Both are far below 2^64: a sector number of 32 bits, and 64 times 4000.
        if slot.offset < LEN as u64 || slot.offset + self.split_len(slot) > limit {
            return Err(format!(
                "key material of key slot {i} at offset {}: found {} bytes at {}, expected them between \
                 {LEN} and {limit}",
                at + 40,
                self.split_len(slot),
                slot.offset
            ));
        }
        Ok(())
    }

    /// Bytes of a slot's split key, in whole sectors.
    pub fn split_len(&self, slot: &Slot) -> u64 {
        (self.key_len as u64 * u64::from(slot.stripes)).next_multiple_of(SECTOR as u64)
    }

    /// The cipher and the hash, if this build has them.
    pub fn known(&self, name: &Name) -> Result<(Spec, Hash)> {
        self.known.clone().map_err(|what| Error::unsupported(name, what))
    }

    /// Refuse a header that makes trying a passphrase cost too much.
    pub fn check_cost(&self, name: &Name, untrusted: bool) -> Result<()> {
        let (_, hash) = self.known(name)?;
        let blocks = |len: usize| len.div_ceil(hash.size()) as u64;
        let digest = u64::from(self.iterations) * blocks(DIGEST);
        let rounds: u64 = self
            .slots
            .iter()
            .filter(|s| s.active)
            .map(|s| u64::from(s.iterations) * blocks(self.key_len) + digest)
            .sum();
        let limit = if untrusted { MAX_UNTRUSTED_ROUNDS } else { MAX_ROUNDS };
        if rounds <= limit {
            return Ok(());
        }
        let who = if untrusted { "QBLK_OPEN_UNTRUSTED allows" } else { "the limit is" };
        Err(Error::policy(
            name,
            format!("its key slots ask for {rounds} rounds of {}, and {who} {limit}", hash.name()),
        ))
    }

    /// Where the record of slot `i` lies, bytes from the header on, and what it is.
    pub(super) fn slot_record(&self, i: usize) -> (u64, Vec<u8>) {
        let at = SLOTS_AT + i.min(SLOTS - 1) * SLOT_LEN;
        (at as u64, self.bytes()[at..at + SLOT_LEN].to_vec())
    }

    /// The header as it is on disk.
    pub fn bytes(&self) -> [u8; LEN] {
        let mut raw = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        let sectors = |bytes: u64| ((bytes / SECTOR as u64) as u32).to_be_bytes();
        put(0, &MAGIC);
        put(6, &1u16.to_be_bytes());
        put(8, self.cipher.as_bytes());
        put(40, self.mode.as_bytes());
        put(72, self.hash.as_bytes());
        put(104, &sectors(self.payload));
        put(108, &(self.key_len as u32).to_be_bytes());
        put(112, &self.digest);
        put(132, &self.salt);
        put(164, &self.iterations.to_be_bytes());
        put(168, self.uuid.as_bytes());
        for (i, slot) in self.slots.iter().enumerate().take(SLOTS) {
            let at = SLOTS_AT + i * SLOT_LEN;
            put(at, &(if slot.active { ACTIVE } else { INACTIVE }).to_be_bytes());
            put(at + 4, &slot.iterations.to_be_bytes());
            put(at + 8, &slot.salt);
            put(at + 40, &sectors(slot.offset));
            put(at + 44, &slot.stripes.to_be_bytes());
        }
        raw
    }

    /// A header for new data, with no key in any slot yet.
    pub fn new(spec: Spec, hash: Hash, key_len: usize, uuid: String) -> Self {
        let mut h = Self {
            cipher: spec.alg.name().into(),
            mode: spec.mode_name(),
            hash: hash.name().into(),
            known: Ok((spec, hash)),
            payload: 0,
            key_len,
            digest: [0; DIGEST],
            salt: [0; SALT],
            iterations: 0,
            uuid,
            slots: Vec::with_capacity(SLOTS),
        };
        // As QEMU lays them out: each key on pages of its own, the data behind the last.
        let mut at = PAGE;
        for _ in 0..SLOTS {
            let salt = [0; SALT];
            let slot = Slot { active: false, iterations: 0, salt, offset: at, stripes: STRIPES };
            at += h.split_len(&slot).next_multiple_of(PAGE);
            h.slots.push(slot);
        }
        h.payload = at;
        h
    }

    /// What can be told of the encryption.
    pub fn properties(&self) -> Vec<(&'static str, Vec<u8>)> {
        let half = if self.mode.starts_with("xts") { 2 } else { 1 };
        let used: Vec<String> =
            (0..SLOTS).filter(|&i| self.slots[i].active).map(|i| i.to_string()).collect();
        vec![
            ("luks.cipher-alg", format!("{}-{}", self.cipher, self.key_len * 8 / half).into()),
            ("luks.cipher-mode", self.mode.clone().into()),
            ("luks.hash-alg", self.hash.clone().into()),
            ("luks.key-slots", used.join(",").into()),
            ("luks.payload-offset", self.payload.to_string().into()),
            ("luks.uuid", self.uuid.clone().into()),
        ]
    }
}

/// What places in a new header are multiples of, bytes.
const PAGE: u64 = 4096;
