//! Entries of the L1 and L2 tables, decoded once, at the door.
//!
//! Source: "Cluster mapping" of the QCOW2 specification.

/// Bits 9 to 55 of an L1 or standard L2 entry: a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The refcount of what the entry points to is exactly one.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// What an L2 entry says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Not here: in the backing image, or zeroes.
    Unallocated,
    /// Reads as zeroes; `host` is space kept for it (0 = none).
    Zero { host: u64, copied: bool },
    /// Data at `host`, which may be written in place if `copied`.
    Normal { host: u64, copied: bool },
    /// `len` bytes at `offset` that inflate to a cluster.
    Compressed { offset: u64, len: u64 },
}

/// Decode a standard L2 entry; the error says what is wrong with it.
#[inline]
pub fn decode(raw: u64, cluster_bits: u32, v3: bool) -> Result<Entry, &'static str> {
    if raw & COMPRESSED != 0 {
        return decode_compressed(raw, cluster_bits);
    }
    let host = raw & OFFSET_MASK;
    if raw & L2_RESERVED != 0 || host & ((1 << cluster_bits) - 1) != 0 || (raw & ZERO != 0 && !v3) {
        return Err(complaint(raw, cluster_bits));
    }
    let copied = raw & COPIED != 0;
    Ok(match (raw & ZERO != 0, host) {
        (true, _) => Entry::Zero { host, copied },
        (false, 0) => Entry::Unallocated,
        (false, _) => Entry::Normal { host, copied },
    })
}

fn decode_compressed(raw: u64, cluster_bits: u32) -> Result<Entry, &'static str> {
    if raw & COPIED != 0 {
        return Err("is compressed and marked as writable in place");
    }
    let x = 62 - (cluster_bits - 8);
    let offset = raw & ((1 << x) - 1);
    if offset >> 56 != 0 {
        return Err("points past 2^56");
    }
    let sectors = (raw & (COMPRESSED - 1)) >> x;
    Ok(Entry::Compressed { offset, len: (sectors + 1) * 512 - offset % 512 })
}

#[cold]
fn complaint(raw: u64, cluster_bits: u32) -> &'static str {
    let host = raw & OFFSET_MASK;
    if raw & L2_RESERVED != 0 {
        "has reserved bits set"
    } else if host & ((1 << cluster_bits) - 1) != 0 {
        "points to an offset that is no multiple of the cluster size"
    } else {
        "has the zero flag, which version 2 does not have"
    }
}

/// The L2 table that an L1 entry points to (0 = none), and whether it may be changed in place.
#[inline]
pub fn decode_l1(raw: u64, cluster_bits: u32) -> Result<(u64, bool), &'static str> {
    let offset = raw & OFFSET_MASK;
    if raw & L1_RESERVED != 0 {
        return Err("has reserved bits set");
    }
    if offset & ((1 << cluster_bits) - 1) != 0 {
        return Err("points to an offset that is no multiple of the cluster size");
    }
    Ok((offset, raw & COPIED != 0))
}

/// The entry of a data cluster or L2 table that only this entry points to.
#[inline]
pub fn normal(host: u64) -> u64 {
    host | COPIED
}

/// The entry of a cluster that reads as zeroes, with space kept at `host` (0 = none).
#[inline]
pub fn zero(host: u64) -> u64 {
    if host == 0 { ZERO } else { host | COPIED | ZERO }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_decode_as_the_specification_says() {
        assert_eq!(decode(0, 16, true), Ok(Entry::Unallocated));
        let at = 5 << 16;
        assert_eq!(decode(normal(at), 16, true), Ok(Entry::Normal { host: at, copied: true }));
        assert_eq!(decode(1, 16, true), Ok(Entry::Zero { host: 0, copied: false }));
        assert_eq!(decode(zero(at), 16, true), Ok(Entry::Zero { host: at, copied: true }));
        assert!(decode(1, 16, false).is_err());
        assert!(decode(at | 2, 16, true).is_err());
        assert!(decode(512, 16, true).is_err());
        // 64 KiB clusters: x = 54; 3 further sectors from byte offset 0x12345.
        let raw = COMPRESSED | 3 << 54 | 0x12345;
        let len = 4 * 512 - 0x12345 % 512;
        assert_eq!(decode(raw, 16, true), Ok(Entry::Compressed { offset: 0x12345, len }));
        assert!(decode(raw | COPIED, 16, true).is_err());
    }
}
