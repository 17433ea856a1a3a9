//! Entries of the L1 and L2 tables, decoded once, at the door.
//!
//! Source: "Cluster mapping" of the QCOW2 specification.

/// Bits 9 to 55 of an L1 or standard L2 entry: a host offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The refcount of what the entry points to is exactly one.
pub const COPIED: u64 = 1 << 63;
/// What the entry points to inflates to the cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// It reads as zeroes.
pub const ZERO: u64 = 1;
/// Bits 56 to 61, reserved on disk. In the cache of an image that is only read they say in which image
/// below a cluster was found that is not here: 1 = the one right below, [`BELOW_ZERO`] = none, zeroes.
const BELOW_SHIFT: u32 = 56;
const BELOW_MASK: u64 = 63 << BELOW_SHIFT;
const BELOW_ZERO: u64 = 63;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard L2 entry that mean nothing.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// What an L2 entry says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Not here: in the backing image, or zeroes.
    Unallocated,
    /// Reads as zeroes; `host` is space kept for it (0 = none).
    Zero { host: u64, copied: bool },
    /// Data at `host`, which may be written in place if `copied`.
    Normal { host: u64, copied: bool },
    /// Not here; found before to be data at `host` of the file of the image `depth` below.
    Below { depth: u32, host: u64 },
    /// Not here; found before to be zeroes, all the way down.
    BelowZero,
    /// `len` bytes at `offset` that inflate to a cluster.
    Compressed { offset: u64, len: u64 },
}

/// Decode a standard L2 entry; the error says what is wrong with it.
#[inline]
pub fn decode(raw: u64, cluster_bits: u32, v3: bool) -> Result<Entry, &'static str> {
    if raw & COMPRESSED != 0 {
        let (offset, len) = decode_compressed(raw, cluster_bits)?;
        return Ok(Entry::Compressed { offset, len });
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

/// Where the compressed form of a cluster begins, and its bytes.
pub fn decode_compressed(raw: u64, cluster_bits: u32) -> Result<(u64, u64), &'static str> {
    if raw & COPIED != 0 {
        return Err("is compressed and marked as writable in place");
    }
    let x = 62 - (cluster_bits - 8);
    let offset = raw & ((1 << x) - 1);
    if offset >> 56 != 0 {
        return Err("points past 2^56");
    }
    let sectors = (raw & (COMPRESSED - 1)) >> x;
    Ok((offset, (sectors + 1) * 512 - offset % 512))
}

/// What is wrong with a standard entry.
#[cold]
pub fn complaint(raw: u64, cluster_bits: u32) -> &'static str {
    let host = raw & OFFSET_MASK;
    if raw & L2_RESERVED != 0 {
        "has reserved bits set"
    } else if host & ((1 << cluster_bits) - 1) != 0 {
        "points to an offset that is no multiple of the cluster size"
    } else {
        "has the zero flag, which version 2 does not have"
    }
}

/// Decode an entry of a cache that [`sanitize`]d what it read from disk.
#[inline]
pub fn decode_cached(raw: u64, cluster_bits: u32, v3: bool) -> Result<Entry, &'static str> {
    if raw & (BELOW_MASK | COMPRESSED) == 0 || raw & COMPRESSED != 0 {
        return decode(raw, cluster_bits, v3);
    }
    if raw & !(BELOW_MASK | OFFSET_MASK) != 0 {
        return Err("has reserved bits set");
    }
    Ok(match raw >> BELOW_SHIFT {
        BELOW_ZERO => Entry::BelowZero,
        depth => Entry::Below { depth: depth as u32, host: raw & OFFSET_MASK },
    })
}

/// See that no entry of a big-endian slice from disk is taken for one that [`below`] made: such an
/// entry is invalid, and stays so.
pub fn sanitize(slice: &mut [u8]) {
    for entry in slice.chunks_exact_mut(8) {
        if entry[0] & 0x3f != 0 && entry[0] & 0x40 == 0 {
            entry[7] |= 2;
        }
    }
}

/// The entry to remember that a cluster which is not here is data at `host` of the file of the image
/// `depth` below, `None` if that does not fit into an entry.
pub fn below(depth: u32, host: u64) -> Option<u64> {
    let depth = u64::from(depth);
    let fits = host & !OFFSET_MASK == 0 && (1..BELOW_ZERO).contains(&depth);
    fits.then_some(depth << BELOW_SHIFT | host)
}

/// The entry to remember that a cluster is nowhere below.
pub fn below_zero() -> u64 {
    BELOW_ZERO << BELOW_SHIFT
}

/// The big-endian number of 8 bytes at `at`; one that is not there whole is 0.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

/// [`be64`], of 4 bytes.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// [`be64`], of 2 bytes.
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
}

/// The first 8 bytes of an L2 entry as it is on disk.
pub fn first_word(entry: &[u8]) -> u64 {
    be64(entry, 0)
}

/// The host clusters that an L2 entry refers to, whatever it says of them: the first and how many, none
/// if it has no offset.
pub fn clusters(raw: u64, cluster_bits: u32) -> Result<Option<(u64, u64)>, &'static str> {
    if raw & COMPRESSED != 0 {
        let (offset, len) = decode_compressed(raw, cluster_bits)?;
        let (first, last) = (offset >> cluster_bits, (offset + len - 1) >> cluster_bits);
        return Ok(Some((first, last - first + 1)));
    }
    let host = raw & OFFSET_MASK;
    if raw & L2_RESERVED != 0 || host & ((1 << cluster_bits) - 1) != 0 {
        return Err(complaint(raw, cluster_bits));
    }
    Ok((host != 0).then_some((host >> cluster_bits, 1)))
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

/// The entry of a cluster whose compressed form is `len` bytes (fewer than a cluster) at `offset`, `None`
/// if that lies too far out for an entry.
pub fn compressed(offset: u64, len: u64, cluster_bits: u32) -> Option<u64> {
    let x = 62 - (cluster_bits - 8);
    let sectors = ((offset + len - 1) >> 9) - (offset >> 9);
    let fits = (offset + len) >> x.min(56) == 0;
    fits.then_some(COMPRESSED | sectors << x | offset)
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
        assert_eq!(decode(normal(at) | ZERO, 16, true), Ok(Entry::Zero { host: at, copied: true }));
        assert!(decode(1, 16, false).is_err());
        assert!(decode(at | 2, 16, true).is_err());
        assert!(decode(512, 16, true).is_err());
        // 64 KiB clusters: x = 54; 3 further sectors from byte offset 0x12345.
        let raw = COMPRESSED | 3 << 54 | 0x12345;
        let len = 4 * 512 - 0x12345 % 512;
        assert_eq!(decode(raw, 16, true), Ok(Entry::Compressed { offset: 0x12345, len }));
        assert!(decode(raw | COPIED, 16, true).is_err());
    }

    #[test]
    fn entries_of_compressed_clusters_decode_to_whole_sectors() {
        for bits in 9..=21 {
            let size = 1u64 << bits;
            for offset in [size, size + 1, size + 511, 2 * size - 1, 77 * size + 513] {
                for len in [1, 2, 511, size - 1] {
                    let raw = compressed(offset, len, bits).unwrap();
                    let Ok(Entry::Compressed { offset: o, len: l }) = decode(raw, bits, true)
                    else {
                        panic!("{raw:#x}")
                    };
                    assert_eq!(o, offset);
                    assert_eq!(o + l, (offset + len).next_multiple_of(512));
                }
            }
        }
        assert_eq!(compressed(1 << 56, 100, 16), None);
        assert_eq!(compressed(1 << 49, 100, 21), None);
        assert!(compressed((1 << 49) - 512, 100, 21).is_some());
    }

    #[test]
    fn what_was_found_below_is_remembered_and_never_believed_from_disk() {
        let raw = below(7, 5 << 16).unwrap();
        assert_eq!(decode_cached(raw, 16, true), Ok(Entry::Below { depth: 7, host: 5 << 16 }));
        assert_eq!(decode_cached(below_zero(), 16, true), Ok(Entry::BelowZero));
        assert_eq!(below(63, 0), None);
        assert_eq!(below(0, 0), None);
        assert_eq!(below(1, 1 << 56), None);
        assert!(decode(raw, 16, true).is_err());
        for raw in [raw, below_zero()] {
            let mut slice = raw.to_be_bytes();
            sanitize(&mut slice);
            assert!(decode_cached(u64::from_be_bytes(slice), 16, true).is_err());
        }
        let compressed = (COMPRESSED | 3 << 54 | 0x12345).to_be_bytes();
        let mut slice = compressed;
        sanitize(&mut slice);
        assert_eq!(slice, compressed);
    }
}
