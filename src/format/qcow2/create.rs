//! Making an empty image: header, refcount table and blocks, L1 table.

use super::header::*;
use super::refcount::Refcounts;
use crate::block::*;
use crate::format::BackingRef;
use crate::format::luks::Locking;

/// What an image is made like.
#[derive(Clone, Debug)]
pub struct Geometry {
    /// Version 3, else 2.
    pub v3: bool,
    /// Cluster size, as a power of two: 9 to 21.
    pub cluster_bits: u32,
    /// Width of a refcount: 2^order bits, order at most 6.
    pub refcount_order: u32,
    /// Refcounts may be updated late.
    pub lazy: bool,
    /// Compress with zstd, else deflate.
    pub zstd: bool,
    /// What the data is encrypted with.
    pub encrypt: Option<Locking>,
    /// The image below.
    pub backing: Option<BackingRef>,
    /// What is allocated at once.
    pub prealloc: Prealloc,
    /// L2 entries with subclusters.
    pub extended: bool,
    /// Data lies in another file.
    pub data_file: Option<DataFile>,
}

/// The data file that a new image names.
#[derive(Clone, Debug)]
pub struct DataFile {
    /// As recorded.
    pub name: Vec<u8>,
    /// It is always to hold what the guest sees.
    pub raw: bool,
}

/// Where a new image's parts lie.
#[derive(Clone, Copy, Default)]
struct Places {
    l1: u64,
    reftable: u64,
    reftable_clusters: u64,
    luks: u64,
}

impl Geometry {
    fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.table_bits())
    }

    /// Bytes that an L2 table maps, as a power of two.
    fn table_bits(&self) -> u32 {
        2 * self.cluster_bits - if self.extended { 4 } else { 3 }
    }

    /// Refuse what no image can be.
    pub fn check(&self, name: &Name, size: u64) -> Result<()> {
        if self.l1_entries(size) * 8 > MAX_L1_BYTES {
            return Err(Error::TooBig {
                file: name.clone(),
                what: format!(
                    "{size} bytes are too many for clusters of {} bytes (at most {}); larger clusters \
                     allow more",
                    1u64 << self.cluster_bits,
                    (MAX_L1_BYTES / 8) << self.table_bits()
                ),
            });
        }
        if let Some(b) = &self.backing
            && b.name.len() as u64 > MAX_BACKING_NAME
        {
            return Err(Error::invalid(format!(
                "the backing file's name has {} bytes, more than {MAX_BACKING_NAME}",
                b.name.len()
            )));
        }
        // Without any names it always fits.
        if self.header(Places::default(), size).len() > 1 << self.cluster_bits {
            return Err(Error::invalid(format!(
                "the name of the backing file or of the data file does not fit into a header cluster of \
                 {} bytes",
                1u64 << self.cluster_bits
            )));
        }
        Ok(())
    }

    /// The header with its extensions and the backing file's name.
    fn header(&self, places: Places, size: u64) -> Vec<u8> {
        let mut h = Vec::with_capacity(1024);
        let lazy = if self.lazy { COMPAT_LAZY } else { 0 };
        let incompatible = if self.zstd { incompat::COMPRESSION } else { 0 }
            | if self.extended { incompat::EXTENDED_L2 } else { 0 }
            | if self.data_file.is_some() { incompat::DATA_FILE } else { 0 };
        let is_raw = self.data_file.as_ref().is_some_and(|d| d.raw);
        let autoclear = if is_raw { AUTOCLEAR_RAW } else { 0 };
        h.extend(MAGIC);
        h.extend((if self.v3 { 3u32 } else { 2 }).to_be_bytes());
        h.extend([0; 12]); // the backing file's name: below
        h.extend(self.cluster_bits.to_be_bytes());
        h.extend(size.to_be_bytes());
        h.extend((if self.encrypt.is_some() { 2u32 } else { 0 }).to_be_bytes());
        h.extend((self.l1_entries(size) as u32).to_be_bytes());
        h.extend(places.l1.to_be_bytes());
        h.extend(places.reftable.to_be_bytes());
        h.extend((places.reftable_clusters as u32).to_be_bytes());
        h.extend([0; 12]); // no snapshots
        if self.v3 {
            h.extend(incompatible.to_be_bytes());
            h.extend(lazy.to_be_bytes());
            h.extend(autoclear.to_be_bytes());
            h.extend(self.refcount_order.to_be_bytes());
            h.extend(112u32.to_be_bytes());
            h.extend([u8::from(self.zstd), 0, 0, 0, 0, 0, 0, 0]);
        }
        let mut extension = |magic: u32, data: &[u8]| {
            h.extend(magic.to_be_bytes());
            h.extend((data.len() as u32).to_be_bytes());
            h.extend(data);
            h.resize(h.len().next_multiple_of(8), 0);
        };
        if let Some(format) = self.backing.as_ref().and_then(|b| b.format.as_ref()) {
            extension(EXT_BACKING_FORMAT, format);
        }
        if let Some(locking) = &self.encrypt {
            let (at, len) = (places.luks.to_be_bytes(), locking.header_len().to_be_bytes());
            extension(EXT_LUKS, &[at, len].concat());
        }
        if let Some(data) = &self.data_file {
            extension(EXT_DATA_FILE, &data.name);
        }
        if self.v3 && self.cluster_bits > 12 {
            extension(EXT_FEATURE_NAMES, &feature_names());
        }
        extension(EXT_END, &[]);
        if let Some(b) = &self.backing {
            let at = h.len() as u64;
            h[8..16].copy_from_slice(&at.to_be_bytes());
            h[16..20].copy_from_slice(&(b.name.len() as u32).to_be_bytes());
            h.extend(&b.name);
        }
        h
    }
}

/// The table that lets a program which does not know a feature say its name.
pub(super) fn feature_names() -> Vec<u8> {
    let names: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut out = Vec::with_capacity(names.len() * 48);
    for (kind, bit, name) in names {
        out.extend([kind, bit]);
        out.extend(name.as_bytes());
        out.resize(out.len().next_multiple_of(48), 0);
    }
    out
}

/// Write an empty image of `size` bytes into `file`. The header comes last: until then it is no image.
pub fn create(file: &Device, size: u64, geometry: &Geometry) -> Result<()> {
    geometry.check(file.name(), size)?;
    let bits = geometry.cluster_bits;
    let cluster = 1u64 << bits;
    let l1_clusters = (geometry.l1_entries(size) * 8).div_ceil(cluster);
    let luks_clusters = geometry.encrypt.as_ref().map_or(0, |l| l.header_len().div_ceil(cluster));
    let fixed = 1 + l1_clusters + luks_clusters;
    // The blocks count themselves, so their number is found by trying.
    let per_block = (cluster * 8) >> geometry.refcount_order;
    let (mut blocks, mut table) = (1, 1);
    loop {
        let all = table + blocks + fixed;
        let need_blocks = all.div_ceil(per_block);
        let need_table = (need_blocks * 8).div_ceil(cluster);
        if need_blocks <= blocks && need_table <= table {
            break;
        }
        (blocks, table) = (need_blocks.max(blocks), need_table.max(table));
    }
    let total = table + blocks + fixed;
    let (table_at, blocks_at) = (cluster, (1 + table) * cluster);
    let l1_at = blocks_at + blocks * cluster;
    if file.driver().kind() == "host_device" && total * cluster > file.size() {
        return Err(Error::TooBig {
            file: file.name().clone(),
            what: format!(
                "the device has {} bytes, an empty image needs {}",
                file.size(),
                total * cluster
            ),
        });
    }
    let mut entries = vec![0; (table * cluster) as usize];
    for (i, entry) in entries.chunks_exact_mut(8).take(blocks as usize).enumerate() {
        entry.copy_from_slice(&(blocks_at + i as u64 * cluster).to_be_bytes());
    }
    // Tables are written, not left as holes: writing entries must not run out of space later.
    file.write_slice(&entries, table_at, ReqFlags::NONE)?;
    let counts = Refcounts::ones(total, geometry.refcount_order, (blocks * cluster) as usize);
    file.write_slice(&counts, blocks_at, ReqFlags::NONE)?;
    if l1_clusters > 0 {
        file.zero(l1_at, l1_clusters * cluster, ReqFlags::NONE)?;
    }
    let luks_at = l1_at + l1_clusters * cluster;
    if let Some(locking) = &geometry.encrypt {
        file.zero(luks_at, luks_clusters * cluster, ReqFlags::NONE)?;
        locking.write(file, luks_at)?;
    }
    file.flush()?;
    let l1 = if l1_clusters > 0 { l1_at } else { 0 };
    let places = Places { l1, reftable: table_at, reftable_clusters: table, luks: luks_at };
    let mut header = geometry.header(places, size);
    header.resize(cluster as usize, 0);
    file.write_slice(&header, 0, ReqFlags::NONE)?;
    file.flush()
}
