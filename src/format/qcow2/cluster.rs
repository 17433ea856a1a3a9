//! A cluster as its L2 entry describes it, whichever kind of entries an image has.
//!
//! An extended entry has a second word, which says of each 32nd of the cluster, a *subcluster*, whether
//! it has data, reads as zeroes, or is not here. A standard entry says the same of the whole cluster;
//! here it is one whose subclusters are all alike, so that what changes entries is written once. (The
//! look-up of a standard entry, which has to be quick, goes by `entry` alone.)
//!
//! With an external data file a cluster lies there where the guest has it. So an offset of 0 may be
//! data, which the COPIED flag tells; and another offset than its own is a contradiction.
//!
//! Source: "Standard Cluster Descriptor", "Extended L2 Entries" and "External data file" of the QCOW2
//! specification; the rule for data files is QEMU's.

use super::discard::Fate;
use super::entry::{self, COMPRESSED, COPIED, Entry, L2_RESERVED, OFFSET_MASK, ZERO};

/// Subclusters in a cluster, as a power of two.
pub const SUB_BITS: u32 = 5;
/// How many those are.
const SUBS: u32 = 1 << SUB_BITS;
/// All of them.
pub const ALL: u32 = u32::MAX;

/// The words of an L2 entry. A standard one has no second: 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raw {
    pub word: u64,
    pub bits: u64,
}

/// How the entries of an image are to be read.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub cluster_bits: u32,
    pub v3: bool,
    /// Entries have subclusters.
    pub extended: bool,
    /// Data lies in another file.
    pub external: bool,
}

/// A cluster that is not compressed. A subcluster that is in neither set is not here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plain {
    /// Where its space on the host is, if it has some.
    pub host: Option<u64>,
    /// Nothing else points there.
    pub copied: bool,
    /// Which subclusters have data there.
    pub alloc: u32,
    /// Which read as zeroes.
    pub zero: u32,
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// `len` bytes at `offset` that inflate to it.
    Compressed { offset: u64, len: u64 },
    /// Anything else.
    Plain(Plain),
}

impl Shape {
    /// Bytes of an entry, as a power of two.
    pub fn entry_bits(self) -> u32 {
        if self.extended { 4 } else { 3 }
    }

    /// Bytes that are data, zeroes or not here as one, as a power of two.
    pub fn grain_bits(self) -> u32 {
        if self.extended { self.cluster_bits - SUB_BITS } else { self.cluster_bits }
    }

    /// Whether the entries are not what [`entry::decode`] alone understands.
    pub fn is_special(self) -> bool {
        self.extended || self.external
    }

    /// The subclusters of `cluster` between two guest offsets.
    pub fn mask(self, cluster: u64, from: u64, to: u64) -> u32 {
        let (start, bits) = (cluster << self.cluster_bits, self.cluster_bits - SUB_BITS);
        let sub = |at: u64| (at.saturating_sub(start) >> bits).min(SUBS.into()) as u32;
        let (first, end) = (sub(from), sub(to));
        let below = |n: u32| ((1u64 << n) - 1) as u32;
        below(end) & !below(first)
    }

    /// The subcluster that a guest offset is in.
    pub fn sub(self, offset: u64) -> u32 {
        (offset >> (self.cluster_bits - SUB_BITS)) as u32 & (SUBS - 1)
    }

    /// What the entry of guest cluster `cluster` says, or what is wrong with it.
    pub fn decode(self, raw: Raw, cluster: u64) -> Result<Cluster, &'static str> {
        if raw.word & COMPRESSED != 0 {
            return self.decode_compressed(raw);
        }
        let host = raw.word & OFFSET_MASK;
        let misplaced = host & ((1 << self.cluster_bits) - 1) != 0;
        let zero = raw.word & ZERO != 0;
        if raw.word & L2_RESERVED != 0 || misplaced || (zero && (self.extended || !self.v3)) {
            return Err(match zero && self.extended {
                true => "has the zero flag, which extended entries do not have",
                false => entry::complaint(raw.word, self.cluster_bits),
            });
        }
        let copied = raw.word & COPIED != 0;
        let here = host != 0 || (self.external && copied && !zero);
        if here && self.external && host != cluster << self.cluster_bits {
            return Err("points to another place of the data file than the guest's");
        }
        let host = here.then_some(host);
        let (zero, alloc) = match (self.extended, zero) {
            (true, _) => ((raw.bits >> 32) as u32, raw.bits as u32),
            (false, true) => (ALL, 0),
            (false, false) => (0, if here { ALL } else { 0 }),
        };
        if zero & alloc != 0 {
            return Err("has subclusters that are both allocated and zeroes");
        }
        if alloc != 0 && !here {
            return Err("has allocated subclusters and no cluster for them");
        }
        Ok(Cluster::Plain(Plain { host, copied, alloc, zero }))
    }

    fn decode_compressed(self, raw: Raw) -> Result<Cluster, &'static str> {
        if self.external {
            return Err("is compressed, which it can not be with an external data file");
        }
        if raw.bits != 0 {
            return Err("is compressed, and has subclusters");
        }
        entry::decode_compressed(raw.word, self.cluster_bits)
            .map(|(offset, len)| Cluster::Compressed { offset, len })
    }

    /// The entry that says so.
    pub fn encode(self, p: Plain) -> Raw {
        let word = p.host.map_or(0, |host| host | if p.copied { COPIED } else { 0 });
        match self.extended {
            true => Raw { word, bits: u64::from(p.zero) << 32 | u64::from(p.alloc) },
            false => Raw { word: word | if p.zero != 0 { ZERO } else { 0 }, bits: 0 },
        }
    }
}

impl Plain {
    /// What becomes of it when the subclusters of `mask` are dropped. `below`: an image below may have
    /// data there.
    pub fn dropped(self, mask: u32, how: Fate, below: bool) -> Self {
        let gone = match how {
            Fate::Forget => return Self::default(),
            // What is not here is as good as gone.
            Fate::Trim => self.alloc & mask,
            _ if self.host.is_none() && !below => 0,
            _ => mask,
        };
        let mut new = Self { alloc: self.alloc & !mask, zero: self.zero | gone, ..self };
        // Space that others share is no use to this image.
        let keep = how == Fate::ZeroKeep && (self.copied || self.alloc == 0);
        if new.alloc == 0 && new.host.is_some() && !keep {
            // Nothing at all is as good as zeroes where nothing is below.
            new = Self { zero: if below { new.zero } else { 0 }, ..Self::default() };
        }
        new
    }
}

impl Cluster {
    /// What a compressed cluster that is dropped as a whole becomes; see [`Plain::dropped`].
    pub fn deflated(how: Fate, below: bool) -> Plain {
        let zero = if below && how != Fate::Forget { ALL } else { 0 };
        Plain { zero, ..Plain::default() }
    }

    /// What subcluster `sub` is, and how many from it on are the same.
    pub fn run(self, sub: u32) -> (Entry, u32) {
        let Plain { host, copied, alloc, zero } = match self {
            Self::Compressed { offset, len } => {
                return (Entry::Compressed { offset, len }, SUBS - sub);
            }
            Self::Plain(p) => p,
        };
        let (host, bit) = (host.unwrap_or(0), 1 << sub);
        let (entry, alike) = match () {
            _ if alloc & bit != 0 => (Entry::Normal { host, copied }, alloc),
            _ if zero & bit != 0 => (Entry::Zero { host, copied }, zero),
            _ => (Entry::Unallocated, !(alloc | zero)),
        };
        (entry, (alike >> sub).trailing_ones())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 5 << 16;
    const EXTENDED: Shape = Shape { cluster_bits: 16, v3: true, extended: true, external: false };
    const EXTERNAL: Shape = Shape { extended: false, external: true, ..EXTENDED };
    const STANDARD: Shape = Shape { extended: false, ..EXTENDED };

    fn plain(host: Option<u64>, copied: bool, alloc: u32, zero: u32) -> Plain {
        Plain { host, copied, alloc, zero }
    }

    #[test]
    fn extended_entries_decode_as_the_specification_says() {
        let decode = |word, bits| EXTENDED.decode(Raw { word, bits }, 9);
        for p in [
            plain(None, false, 0, 0),
            plain(None, false, 0, 0xff00),
            plain(Some(AT), true, 0, 0),
            plain(Some(AT), false, 1 << 31, 1),
            plain(Some(AT), true, !1, 1),
        ] {
            let raw = EXTENDED.encode(p);
            assert_eq!(decode(raw.word, raw.bits), Ok(Cluster::Plain(p)));
        }
        assert_eq!(
            EXTENDED.encode(plain(Some(AT), true, 0xc, 0x30)),
            Raw { word: AT | COPIED, bits: 0x30_0000_000c }
        );
        for (word, bits, what) in [
            (AT, 1 << 32 | 1, "both allocated and zeroes"),
            (0, 1, "no cluster"),
            (COPIED, 1, "no cluster"),
            (AT | 1, 0, "zero flag"),
            (AT | 2, 0, "reserved"),
            (AT + 512, 0, "multiple of the cluster size"),
            (COMPRESSED | AT, 1, "compressed, and has subclusters"),
            (COMPRESSED | COPIED | AT, 0, "writable in place"),
        ] {
            let e = decode(word, bits).unwrap_err();
            assert!(e.contains(what), "{word:#x} {bits:#x}: {e}");
        }
    }

    #[test]
    fn standard_entries_are_clusters_whose_subclusters_are_alike() {
        for (raw, p) in [
            (0, plain(None, false, 0, 0)),
            (AT, plain(Some(AT), false, ALL, 0)),
            (AT | COPIED, plain(Some(AT), true, ALL, 0)),
            (ZERO, plain(None, false, 0, ALL)),
            (AT | COPIED | ZERO, plain(Some(AT), true, 0, ALL)),
        ] {
            let raw = Raw { word: raw, bits: 0 };
            assert_eq!(STANDARD.decode(raw, 9), Ok(Cluster::Plain(p)));
            assert_eq!(STANDARD.encode(p), raw);
            // And what the quick way makes of them is the same.
            let quick = entry::decode(raw.word, 16, true).unwrap();
            assert_eq!(Cluster::Plain(p).run(0), (quick, 32));
        }
    }

    #[test]
    fn a_cluster_lies_in_the_data_file_where_the_guest_has_it() {
        let decode = |word, cluster| EXTERNAL.decode(Raw { word, bits: 0 }, cluster);
        let here = |host| Ok(Cluster::Plain(plain(Some(host), true, ALL, 0)));
        assert_eq!(decode(COPIED, 0), here(0));
        assert_eq!(decode(COPIED | AT, 5), here(AT));
        assert_eq!(decode(0, 0), Ok(Cluster::Plain(Plain::default())));
        assert!(decode(COPIED, 1).unwrap_err().contains("another place"));
        assert!(decode(COPIED | AT, 6).unwrap_err().contains("another place"));
        assert!(decode(COMPRESSED | AT, 5).unwrap_err().contains("external data file"));
        assert_eq!(EXTERNAL.encode(plain(Some(0), true, ALL, 0)).word, COPIED);
    }

    #[test]
    fn runs_end_where_subclusters_differ() {
        let c = Cluster::Plain(plain(Some(AT), true, 0b1110, 0b1_0000));
        assert_eq!(c.run(0), (Entry::Unallocated, 1));
        assert_eq!(c.run(1), (Entry::Normal { host: AT, copied: true }, 3));
        assert_eq!(c.run(3), (Entry::Normal { host: AT, copied: true }, 1));
        assert_eq!(c.run(4), (Entry::Zero { host: AT, copied: true }, 1));
        assert_eq!(c.run(5), (Entry::Unallocated, 27));
        let all = Cluster::Plain(plain(Some(AT), true, ALL, 0));
        assert_eq!(all.run(31).1, 1);
        assert_eq!(all.run(0).1, 32);
    }

    #[test]
    fn masks_are_of_one_cluster() {
        let sub = 1 << 11;
        assert_eq!(EXTENDED.mask(3, 3 << 16, 4 << 16), ALL);
        assert_eq!(EXTENDED.mask(3, 0, u64::MAX), ALL);
        assert_eq!(EXTENDED.mask(3, (3 << 16) + sub, (3 << 16) + 3 * sub), 0b110);
        assert_eq!(EXTENDED.mask(3, (3 << 16) + 31 * sub, 9 << 16), 1 << 31);
        assert_eq!(EXTENDED.mask(3, 0, (3 << 16) + sub), 1);
        assert_eq!(EXTENDED.mask(3, 0, 3 << 16), 0);
        assert_eq!(EXTENDED.mask(3, 4 << 16, 5 << 16), 0);
    }

    #[test]
    fn what_is_dropped_becomes_zeroes_or_nothing() {
        use Fate::*;
        let own = plain(Some(AT), true, 0b1111, 0);
        // A part: the space stays, and what was not here is hidden where it has to be.
        assert_eq!(own.dropped(0b11, Trim, true), plain(Some(AT), true, 0b1100, 0b11));
        assert_eq!(own.dropped(0b110000, Trim, true), own);
        assert_eq!(own.dropped(0b110000, ZeroFree, true), plain(Some(AT), true, 0b1111, 0b110000));
        // The last data goes: so does the space, unless it is to be kept.
        assert_eq!(own.dropped(0b1111, Trim, true), plain(None, false, 0, 0b1111));
        assert_eq!(own.dropped(0b1111, Trim, false), Plain::default());
        assert_eq!(own.dropped(ALL, ZeroFree, true), plain(None, false, 0, ALL));
        assert_eq!(own.dropped(ALL, ZeroKeep, false), plain(Some(AT), true, 0, ALL));
        let shared = Plain { copied: false, ..own };
        assert_eq!(shared.dropped(ALL, ZeroKeep, true), plain(None, false, 0, ALL));
        assert_eq!(shared.dropped(0b1, ZeroKeep, true), plain(Some(AT), false, 0b1110, 1));
        // What is not here needs no flag where nothing is below.
        let nothing = Plain::default();
        assert_eq!(nothing.dropped(0b1, ZeroKeep, false), nothing);
        assert_eq!(nothing.dropped(0b1, ZeroFree, true), plain(None, false, 0, 1));
        assert_eq!(nothing.dropped(ALL, Trim, true), nothing);
        assert_eq!(own.dropped(ALL, Forget, true), nothing);
        assert_eq!(Cluster::deflated(Trim, true), plain(None, false, 0, ALL));
        assert_eq!(Cluster::deflated(ZeroKeep, false), nothing);
    }
}
