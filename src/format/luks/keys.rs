//! From a passphrase to the master key and back: PBKDF2, the anti-forensic splitter, the digest.
//!
//! Source: LUKS1 On-Disk Format Specification 1.2.3, sections 2.4 and 4.

use super::header::{Area, DIGEST, Header, MAX_ROUNDS, SALT, SLOTS, Slot};
use crate::block::*;
use crate::crypto::{self, Hash, Secret, SectorCipher};

/// Fewest iterations, whatever the host's speed (as QEMU and cryptsetup have it).
const MIN_ITERATIONS: u64 = 1000;

/// Find the master key of `header` in `area` of `dev` that `passphrase` opens.
pub fn unlock(
    dev: &Device,
    area: Area,
    header: &Header,
    passphrase: &[u8],
    untrusted: bool,
) -> Result<Secret> {
    header.check_cost(dev.name(), untrusted)?;
    for slot in header.slots.iter().filter(|s| s.active) {
        if let Some(key) = try_slot(dev, area, header, slot, passphrase)? {
            return Ok(key);
        }
    }
    Err(Error::BadKey(dev.name().clone()))
}

/// The master key, if `passphrase` opens `slot`.
pub fn try_slot(
    dev: &Device,
    area: Area,
    header: &Header,
    slot: &Slot,
    passphrase: &[u8],
) -> Result<Option<Secret>> {
    let (spec, hash) = header.known(dev.name())?;
    let mut key = crypto::blank(header.key_len);
    let result = (|| {
        let mut split = crypto::blank(header.split_len(slot) as usize);
        dev.read_slice(&mut split, area.offset + slot.offset)?;
        let mut slot_key = crypto::blank(header.key_len);
        hash.pbkdf2(passphrase, &slot.salt, slot.iterations, &mut slot_key);
        let cipher =
            SectorCipher::new(spec, &slot_key).map_err(|what| Error::corrupt(dev.name(), what))?;
        cipher.decrypt(&mut split, 0);
        merge(hash, &split, slot.stripes as usize, &mut key);
        Ok(crypto::same(&digest(hash, header, &key), &header.digest))
    })();
    crypto::wipe_stack();
    Ok(result?.then_some(key))
}

/// Make a master key for `header`, put it into slot 0 under `passphrase`, and write all of it to
/// `area` of `dev`. `ms`: how long trying the passphrase is to take on this host, milliseconds.
pub fn lock(
    dev: &Device,
    area: Area,
    header: &mut Header,
    passphrase: &[u8],
    ms: u64,
) -> Result<Secret> {
    let (_, hash) = header.known(dev.name())?;
    let mut key = crypto::blank(header.key_len);
    fill(&mut key)?;
    fill(&mut header.salt)?;
    // An eighth of the time for the digest, as QEMU has it: it is tried once for each slot.
    header.iterations = clamp(header, hash, hash.iterations_in(ms, DIGEST) / 8);
    header.digest = digest(hash, header, &key);
    put_key(dev, area, header, 0, &key, passphrase, ms)?;
    dev.write_slice(&header.bytes(), area.offset, ReqFlags::NONE)?;
    Ok(key)
}

/// All slots with as much must not be more than an opening takes for honest.
fn clamp(header: &Header, hash: Hash, iterations: u64) -> u32 {
    let blocks = header.key_len.div_ceil(hash.size()) as u64 + 1;
    let most = MAX_ROUNDS / SLOTS as u64 / blocks;
    iterations.clamp(MIN_ITERATIONS, most) as u32
}

/// Put the master key `key` into slot `i` under `passphrase`: what is split is written, the slot's record
/// in the header is not.
pub fn put_key(
    dev: &Device,
    area: Area,
    header: &mut Header,
    i: usize,
    key: &[u8],
    passphrase: &[u8],
    ms: u64,
) -> Result<()> {
    let (spec, hash) = header.known(dev.name())?;
    let mut slot_key = crypto::blank(header.key_len);
    let iterations = clamp(header, hash, hash.iterations_in(ms, header.key_len));
    let no_slot = || Error::Internal(format!("no key slot {i}"));
    let split_len = header.slots.get(i).map(|s| header.split_len(s)).ok_or_else(no_slot)?;
    let slot = header.slots.get_mut(i).ok_or_else(no_slot)?;
    fill(&mut slot.salt)?;
    (slot.active, slot.iterations) = (true, iterations);
    hash.pbkdf2(passphrase, &slot.salt, iterations, &mut slot_key);
    let mut parts = crypto::blank(split_len as usize);
    split(hash, key, slot.stripes as usize, &mut parts)?;
    let cipher = SectorCipher::new(spec, &slot_key).map_err(Error::invalid)?;
    cipher.encrypt(&mut parts, 0);
    dev.write_slice(&parts, area.offset + slot.offset, ReqFlags::NONE)?;
    crypto::wipe_stack();
    Ok(())
}

pub fn fill(out: &mut [u8]) -> Result<()> {
    crypto::random(out).map_err(|errno| Error::Os { op: "getrandom", file: "random".into(), errno })
}

/// A random UUID (RFC 9562, version 4).
pub fn uuid() -> Result<String> {
    let mut b = [0; 16];
    fill(&mut b)?;
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex: String = b.iter().map(|b| format!("{b:02x}")).collect();
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    Ok(parts.join("-"))
}

fn digest(hash: Hash, header: &Header, key: &[u8]) -> [u8; DIGEST] {
    let mut out = [0; DIGEST];
    let salt: &[u8; SALT] = &header.salt;
    hash.pbkdf2(key, salt, header.iterations, &mut out);
    out
}

/// Hash a block so that every bit of it depends on many others.
fn diffuse(hash: Hash, block: &mut [u8]) {
    for (i, part) in block.chunks_mut(hash.size()).enumerate() {
        let from = Secret::new(part.to_vec());
        hash.digest(&[&(i as u32).to_be_bytes(), &from], part);
    }
}

/// Put a key together again from its parts.
fn merge(hash: Hash, parts: &[u8], stripes: usize, key: &mut [u8]) {
    key.fill(0);
    for (i, part) in parts.chunks_exact(key.len()).take(stripes).enumerate() {
        if i > 0 {
            diffuse(hash, key);
        }
        key.iter_mut().zip(part).for_each(|(k, p)| *k ^= p);
    }
}

/// Split a key into parts of which all are needed.
fn split(hash: Hash, key: &[u8], stripes: usize, parts: &mut [u8]) -> Result<()> {
    let last = (stripes - 1) * key.len();
    fill(&mut parts[..last])?;
    let mut mixed = crypto::blank(key.len());
    merge(hash, &parts[..last], stripes - 1, &mut mixed);
    if stripes > 1 {
        diffuse(hash, &mut mixed);
    }
    let to = parts[last..last + key.len()].iter_mut();
    to.zip(key.iter().zip(mixed.iter())).for_each(|(p, (k, m))| *p = k ^ m);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_was_split_is_had_again_from_all_of_its_parts() {
        let key: Vec<u8> = (0..64).collect();
        for (hash, len, stripes) in
            [(Hash::Sha1, 32, 4000), (Hash::Sha256, 64, 7), (Hash::Ripemd160, 16, 1)]
        {
            let mut parts = vec![0; len * stripes];
            split(hash, &key[..len], stripes, &mut parts).unwrap();
            let mut got = vec![0xee; len];
            merge(hash, &parts, stripes, &mut got);
            assert_eq!(got, key[..len]);
            parts[0] ^= 1;
            merge(hash, &parts, stripes, &mut got);
            assert_ne!(got, key[..len]);
        }
    }
}
