//! The header of a qcow2 image: reading it, with every limit checked before a number is used.
//!
//! Source: "Header" and "Header extensions" of the QCOW2 specification (QEMU, docs/interop/qcow2);
//! limits are those that QEMU enforces.

use crate::block::*;
use crate::format::BackingRef;
use crate::format::luks::Area;

use super::cluster::Shape;
use super::entry::{be32, be64};

/// The first bytes of an image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Largest L1 table, bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, bytes.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots.
const MAX_SNAPSHOTS: u32 = 65536;
/// Longest backing file name, bytes.
pub const MAX_BACKING_NAME: u64 = 1023;

/// Incompatible feature bits.
pub mod incompat {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1;
    /// Known to be damaged.
    pub const CORRUPT: u64 = 2;
    /// Data lies in another file.
    pub const DATA_FILE: u64 = 4;
    /// The compression type is not deflate.
    pub const COMPRESSION: u64 = 8;
    /// L2 entries have subclusters.
    pub const EXTENDED_L2: u64 = 16;
    /// All that are known.
    pub const KNOWN: u64 = 31;
}
/// Compatible feature bit: refcounts may be updated late.
pub const COMPAT_LAZY: u64 = 1;
/// Autoclear feature bits: bitmaps are consistent; the data file is a raw image.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// See [`AUTOCLEAR_BITMAPS`].
pub const AUTOCLEAR_RAW: u64 = 2;

/// Header extensions.
pub const EXT_END: u32 = 0;
/// Name of the backing image's format.
pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Where persistent bitmaps are.
pub const EXT_BITMAPS: u32 = 0x2385_2875;
pub const EXT_LUKS: u32 = 0x0537_be77;
/// Name of the external data file.
pub const EXT_DATA_FILE: u32 = 0x4441_5441;

/// Where fields lie that are written by themselves.
pub mod at {
    /// Offset of the backing file's name (8 bytes) and its length (4 bytes).
    pub const BACKING: u64 = 8;
    /// Virtual size, 8 bytes.
    pub const SIZE: u64 = 24;
    /// Entries of the L1 table (4 bytes) and its offset (8 bytes).
    pub const L1: u64 = 36;
    /// Offset of the refcount table (8 bytes) and its clusters (4 bytes).
    pub const REFTABLE: u64 = 48;
    /// Number of snapshots (4 bytes) and the offset of their table (8 bytes).
    pub const SNAPSHOTS: u64 = 60;
    /// Incompatible feature bits, 8 bytes.
    pub const INCOMPATIBLE: u64 = 72;
    /// Compatible feature bits, 8 bytes.
    pub const COMPATIBLE: u64 = 80;
    /// Autoclear feature bits, 8 bytes.
    pub const AUTOCLEAR: u64 = 88;
    /// Width of refcounts, 4 bytes; version 3 only.
    pub const REFCOUNT_ORDER: u64 = 96;
    /// Length of the header, 4 bytes; version 3 only.
    pub const HEADER_LENGTH: u64 = 100;
}

/// A header, checked.
#[derive(Debug, Clone)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Virtual size, bytes; not necessarily whole sectors.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt: u32,
    pub l1_entries: u32,
    pub l1_offset: u64,
    pub reftable_offset: u64,
    pub reftable_clusters: u32,
    pub snapshots: u32,
    /// Where their table lies; means nothing if there are none.
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub refcount_order: u32,
    /// 0 deflate, 1 zstd.
    pub compression: u8,
    pub backing: Option<BackingRef>,
    pub data_file: Option<Vec<u8>>,
    pub has_bitmaps: bool,
    /// The bitmaps extension, as it is.
    pub bitmaps: Option<[u8; super::bitmap::EXTENSION_BYTES]>,
    /// Where the LUKS header and its keys lie: offset and bytes.
    luks: Option<(u64, u64)>,
    /// Incompatible features that nobody here knows, by name.
    unknown: Option<String>,
}

/// Big-endian fields by offset; what lies past the end reads as zero.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        be32(self.0, at)
    }
    fn u64(&self, at: usize) -> u64 {
        be64(self.0, at)
    }
}

impl Header {
    /// Read and check the header of `file`.
    pub fn read(file: &Device) -> Result<Self> {
        Self::read_as(file, true)
    }

    /// Read the header of an image that is to be checked: what can be mended may be wrong.
    pub fn read_to_check(file: &Device) -> Result<Self> {
        Self::read_as(file, false)
    }

    fn read_as(file: &Device, sound: bool) -> Result<Self> {
        let name = file.name();
        let file_size = file.size();
        let mut head = vec![0; file_size.min(4096) as usize];
        file.read_slice(&mut head, 0)?;
        if head.len() < 8 || head[..4] != MAGIC {
            return Err(Error::format(
                name,
                match head.len() {
                    0 => "not in qcow2 format: the file is empty".to_owned(),
                    n if n < 8 => format!("not in qcow2 format: the file has only {n} bytes"),
                    _ => format!(
                        "not in qcow2 format: found {:02x?} at offset 0, expected {MAGIC:02x?}",
                        &head[..4]
                    ),
                },
            ));
        }
        let version = Fields(&head).u32(4);
        if version != 2 && version != 3 {
            return Err(Error::unsupported(name, format!("qcow2 version {version} (2 and 3 are)")));
        }
        let least = if version == 2 { 72 } else { 104 };
        if head.len() < least {
            return Err(Error::format(
                name,
                format!(
                    "the header is cut off: a version {version} header has {least} bytes, the file {}",
                    head.len()
                ),
            ));
        }
        let cluster_bits = Fields(&head).u32(20);
        let bad = |what: String| Err(Error::corrupt(name, what));
        if !(9..=21).contains(&cluster_bits) {
            return bad(format!(
                "cluster bits at offset 20: found {cluster_bits}, expected 9 to 21"
            ));
        }
        let cluster_size = 1u64 << cluster_bits;
        // Extensions and the backing file's name lie in the first cluster.
        if cluster_size > head.len() as u64 && file_size > head.len() as u64 && needs_more(&head) {
            head.resize(cluster_size.min(file_size) as usize, 0);
            file.read_slice(&mut head, 0)?;
        }
        head.truncate(cluster_size as usize);
        Self::parse(name, &head, version, cluster_bits, sound)
    }

    fn parse(
        name: &Name,
        head: &[u8],
        version: u32,
        cluster_bits: u32,
        sound: bool,
    ) -> Result<Self> {
        let f = Fields(head);
        let cluster_size = 1u64 << cluster_bits;
        let bad = |what: String| Err(Error::corrupt(name, what));
        let v3 = version >= 3;
        let mut h = Self {
            version,
            cluster_bits,
            size: f.u64(24),
            crypt: f.u32(32),
            l1_entries: f.u32(36),
            l1_offset: f.u64(40),
            reftable_offset: f.u64(48),
            reftable_clusters: f.u32(56),
            snapshots: f.u32(60),
            snapshots_offset: f.u64(64),
            incompatible: if v3 { f.u64(72) } else { 0 },
            compatible: if v3 { f.u64(80) } else { 0 },
            autoclear: if v3 { f.u64(88) } else { 0 },
            refcount_order: if v3 { f.u32(96) } else { 4 },
            compression: 0,
            backing: None,
            data_file: None,
            has_bitmaps: false,
            bitmaps: None,
            luks: None,
            unknown: None,
        };
        let length = if v3 { f.u32(100) } else { 72 };
        if v3 && (length < 104 || length % 8 != 0 || u64::from(length) > cluster_size) {
            return bad(format!(
                "header length at offset 100: found {length}, expected a multiple of 8 from 104 to the \
                 cluster size {cluster_size}"
            ));
        }
        if length > 104 {
            h.compression = head.get(104).copied().unwrap_or(0);
        }
        let name_offset = f.u64(8);
        let name_length = u64::from(f.u32(16));
        if name_offset > cluster_size {
            return bad(format!(
                "backing file offset at offset 8: found {name_offset}, expected at most the cluster size \
                 {cluster_size}"
            ));
        }
        if name_offset != 0
            && name_length > MAX_BACKING_NAME.min(cluster_size.saturating_sub(name_offset))
        {
            return bad(format!(
                "backing file name length at offset 16: found {name_length}, expected at most {} from \
                 offset {name_offset} of the first cluster",
                MAX_BACKING_NAME.min(cluster_size - name_offset)
            ));
        }
        // The extension area ends where the backing file's name begins.
        let end = if name_offset == 0 { cluster_size } else { name_offset };
        let mut features: &[u8] = &[];
        let mut backing_format = None;
        h.extensions(name, head, u64::from(length), end, &mut features, &mut backing_format)?;
        if name_offset != 0 && name_length != 0 {
            let range = name_offset as usize..(name_offset + name_length) as usize;
            let Some(text) = head.get(range) else {
                return bad(format!("the backing file's name at offset {name_offset} is cut off"));
            };
            h.backing = Some(BackingRef { name: text.to_vec(), format: backing_format });
        }
        let unknown = h.incompatible & !incompat::KNOWN;
        if unknown != 0 {
            h.unknown = Some(feature_names(unknown, features));
            // What such an image's other fields mean can not be known.
            return Ok(h);
        }
        h.check(name)?;
        if sound {
            h.check_mendable(name)?;
        }
        Ok(h)
    }

    fn extensions<'a>(
        &mut self,
        name: &Name,
        head: &'a [u8],
        from: u64,
        end: u64,
        features: &mut &'a [u8],
        backing_format: &mut Option<Vec<u8>>,
    ) -> Result<()> {
        let (mut at, end) = (from, end.min(head.len() as u64));
        while at + 8 <= end {
            let f = Fields(&head[at as usize..]);
            let (magic, len) = (f.u32(0), u64::from(f.u32(4)));
            if magic == EXT_END {
                break;
            }
            if len > end - at - 8 {
                return Err(Error::corrupt(
                    name,
                    format!(
                        "header extension {magic:#010x} at offset {at}: found {len} bytes, expected at \
                         most {} before the end of the header area",
                        end - at - 8
                    ),
                ));
            }
            let data = &head[at as usize + 8..(at + 8 + len) as usize];
            match magic {
                EXT_BACKING_FORMAT => *backing_format = Some(data.to_vec()),
                EXT_BITMAPS => {
                    self.has_bitmaps = true;
                    self.bitmaps = self.bitmaps.or(data.try_into().ok());
                }
                EXT_LUKS if len == 16 => {
                    self.luks = Some((Fields(data).u64(0), Fields(data).u64(8)));
                }
                EXT_DATA_FILE => self.data_file = Some(data.to_vec()),
                EXT_FEATURE_NAMES => *features = data,
                _ => {}
            }
            let exact = match magic {
                EXT_BITMAPS => 24,
                EXT_LUKS => 16,
                _ => len,
            };
            if len != exact {
                return Err(Error::corrupt(
                    name,
                    format!(
                        "header extension {magic:#010x} at offset {at}: found {len} bytes, expected {exact}"
                    ),
                ));
            }
            if magic == EXT_LUKS && self.crypt != 2 {
                return Err(Error::corrupt(name, "LUKS header extension, but no LUKS encryption"));
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(())
    }

    /// What does not depend on the rest of the file.
    fn check(&self, name: &Name) -> Result<()> {
        let bad = |what: String| Err(Error::corrupt(name, what));
        let cluster_size = 1u64 << self.cluster_bits;
        let aligned = |offset: u64| offset.is_multiple_of(cluster_size);
        if self.refcount_order > 6 {
            return bad(format!(
                "refcount order at offset 96: found {}, expected at most 6",
                self.refcount_order
            ));
        }
        let zstd_bit = self.incompatible & incompat::COMPRESSION != 0;
        if zstd_bit != (self.compression != 0) {
            return bad(format!(
                "compression type at offset 104: found {}, but the incompatible feature bit for it is {}",
                self.compression,
                if zstd_bit { "set" } else { "clear" }
            ));
        }
        let entry_bits = self.shape().entry_bits();
        if self.shape().extended && self.cluster_bits < 14 {
            return bad(format!(
                "cluster bits at offset 20: found {}, expected at least 14 with subclusters",
                self.cluster_bits
            ));
        }
        let l2_span = 2 * self.cluster_bits - entry_bits;
        if self.size > i64::MAX as u64 {
            return bad(format!("size at offset 24: found {}, expected below 2^63", self.size));
        }
        let needed = self.size.div_ceil(1 << l2_span);
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return bad(format!(
                "L1 table size at offset 36: found {} entries, expected at most {}",
                self.l1_entries,
                MAX_L1_BYTES / 8
            ));
        }
        if u64::from(self.l1_entries) < needed {
            return bad(format!(
                "L1 table size at offset 36: found {} entries, expected at least {needed} for {} bytes",
                self.l1_entries, self.size
            ));
        }
        if self.l1_entries > 0
            && (self.l1_offset == 0
                || !aligned(self.l1_offset)
                || self.l1_offset > i64::MAX as u64 - l1_bytes)
        {
            return bad(format!(
                "L1 table offset at offset 40: found {:#x}, expected a multiple of the cluster size",
                self.l1_offset
            ));
        }
        Ok(())
    }

    /// What a repair can make right: where the refcounts and the snapshots are said to be.
    fn check_mendable(&self, name: &Name) -> Result<()> {
        let bad = |what: String| Err(Error::corrupt(name, what));
        let aligned = |offset: u64| offset.is_multiple_of(1 << self.cluster_bits);
        let reftable_bytes = u64::from(self.reftable_clusters) << self.cluster_bits;
        if self.reftable_clusters == 0 || reftable_bytes > MAX_REFTABLE_BYTES {
            return bad(format!(
                "refcount table clusters at offset 56: found {}, expected 1 to {}",
                self.reftable_clusters,
                MAX_REFTABLE_BYTES >> self.cluster_bits
            ));
        }
        if self.reftable_offset == 0
            || !aligned(self.reftable_offset)
            || self.reftable_offset > i64::MAX as u64 - reftable_bytes
        {
            return bad(format!(
                "refcount table offset at offset 48: found {:#x}, expected a multiple of the cluster size",
                self.reftable_offset
            ));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return bad(format!(
                "number of snapshots at offset 60: found {}, expected at most {MAX_SNAPSHOTS}",
                self.snapshots
            ));
        }
        if self.snapshots > 0 && (self.snapshots_offset == 0 || !aligned(self.snapshots_offset)) {
            return bad(format!(
                "snapshot table offset at offset 64: found {:#x}, expected a multiple of the cluster \
                 size",
                self.snapshots_offset
            ));
        }
        Ok(())
    }

    /// How its L2 entries are to be read.
    pub fn shape(&self) -> Shape {
        Shape {
            cluster_bits: self.cluster_bits,
            v3: self.version >= 3,
            extended: self.incompatible & incompat::EXTENDED_L2 != 0,
            external: self.incompatible & incompat::DATA_FILE != 0,
        }
    }

    /// Where the LUKS header of the image in `file` may lie.
    pub fn luks_area(&self, file: &Device) -> Result<Area> {
        let bad = |what: String| Err(Error::corrupt(file.name(), what));
        let Some((offset, len)) = self.luks else {
            return bad("LUKS encryption, but no LUKS header extension".into());
        };
        if offset == 0 || !offset.is_multiple_of(1 << self.cluster_bits) {
            return bad(format!(
                "LUKS header offset: found {offset:#x}, expected a multiple of the cluster size"
            ));
        }
        if offset.checked_add(len).is_none_or(|end| end > file.size()) {
            return bad(format!(
                "the LUKS header of {len} bytes at {offset:#x} lies past the end of the file ({} bytes): \
                 is it cut off?",
                file.size()
            ));
        }
        Ok(Area { offset, len: Some(len) })
    }

    /// The first feature without which an image can not be checked, by name.
    pub fn not_checkable(&self) -> Option<String> {
        match self.crypt {
            _ if self.unknown.is_some() => self.unknown.clone(),
            0..=2 => None,
            other => Some(format!("encryption method {other}")),
        }
    }

    /// Incompatible features that nobody here knows, by name: what else the header says is not known then.
    pub fn unknown_features(&self) -> Option<&str> {
        self.unknown.as_deref()
    }

    /// The first feature of the image that this build lacks, by name.
    pub fn unsupported(&self) -> Option<String> {
        if self.unknown.is_some() {
            return self.unknown.clone();
        }
        match () {
            _ if self.crypt > 2 => Some(format!("encryption method {}", self.crypt)),
            _ if self.compression > 1 => Some(format!("compression type {}", self.compression)),
            _ => None,
        }
    }
}

/// Whether what matters of the header may reach past these bytes.
fn needs_more(head: &[u8]) -> bool {
    let f = Fields(head);
    let end = f.u64(8).saturating_add(u64::from(f.u32(16)));
    if end > head.len() as u64 {
        return true;
    }
    let mut at = if f.u32(4) == 2 { 72 } else { f.u32(100) as u64 };
    while at + 8 <= head.len() as u64 {
        let e = Fields(&head[at as usize..]);
        if e.u32(0) == EXT_END {
            return false;
        }
        at += 8 + u64::from(e.u32(4)).next_multiple_of(8);
    }
    true
}

/// The unknown incompatible features by name, as far as the image's table has names: entries of a
/// type (0 = incompatible), a bit, and 46 bytes of name.
fn feature_names(unknown: u64, table: &[u8]) -> String {
    let mut out = String::from("incompatible feature");
    for bit in (0..64u8).filter(|b| unknown >> b & 1 != 0) {
        match table.chunks_exact(48).find(|e| e[..2] == [0, bit]) {
            Some(entry) => {
                let text = entry[2..].split(|&b| b == 0).next().unwrap_or_default();
                out.push_str(&format!(" {} (bit {bit})", quoted(text)));
            }
            None => out.push_str(&format!(" bit {bit}")),
        }
    }
    out
}
