//! The qcow2 format, versions 2 and 3.
//!
//! What it promises:
//! * A read of an allocated cluster takes no lock: the L1 table and the cached L2 slices are read
//!   with atomic loads (`l2cache`).
//! * A write is prepare (find or allocate where), move the data, commit (make the mapping visible);
//!   no lock is held while data moves, and an allocation that comes to nothing gives its clusters
//!   back (`write`).
//! * What may point must be on disk before what it points from. Tables change in memory only, and
//!   `flush` alone writes them, in an order that every crash leaves consistent.
//! * A freed cluster is handed out again only when no table on disk and no call under way can still
//!   point to it.
//!
//! Source: the QCOW2 specification (QEMU, docs/interop/qcow2).
//!
//! Lock order: `Bitmaps::state`, `Writer::turn` (one flush at a time), `Writer::meta`, then a fill lock of
//! the L2 cache, then `Features::turn` (one writer of header fields).

mod amend;
mod bitmap;
mod chain;
pub mod check;
mod cluster;
mod compress;
mod compressed;
mod create;
mod data;
mod discard;
mod driver;
mod edit;
mod entry;
mod extended;
mod external;
mod flush;
mod guard;
mod header;
mod l2cache;
mod overlay;
mod rebuild;
mod refcount;
mod resize;
mod snapshot;
mod vmstate;
mod write;

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::*};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};

use super::crypt::Crypt;
use super::{BackingRef, DataRef, Params, luks, walk};
use crate::block::*;
use cluster::Shape;
pub use create::{DataFile, Geometry, create};
use data::Encryption;
use entry::{COPIED, Entry};
pub use header::MAGIC;
use header::{Header, incompat};
use l2cache::{AllDirty, Held, L2Cache};
use refcount::Refcounts;

/// What a hostile image may make us keep of its L1 table (64 TiB in clusters of 64 KiB) and of its L2
/// tables, bytes.
const MAX_UNTRUSTED_L1: u64 = 1 << 20;
const MAX_UNTRUSTED_CACHE: u64 = 8 << 20;

/// The L1 table in memory: entries as numbers.
struct L1 {
    offset: u64,
    entries: Box<[AtomicU64]>,
}

/// What a writable image keeps in memory beside its cached tables.
struct Meta {
    refs: Refcounts,
    /// Guest clusters that a write has allocated and not yet committed: first and end.
    busy: Vec<(u64, u64)>,
    /// Slots of the L2 cache that were changed.
    dirty_slices: Vec<usize>,
    /// Entries of the L1 table that were changed.
    dirty_l1: Vec<u64>,
    /// Host clusters that nothing in memory points to any more, but a table on disk may.
    unmapped: Vec<refcount::Run>,
    /// Those that no table on disk points to either, but a call under way at the mark may.
    limbo: Vec<(u64, Vec<refcount::Run>)>,
    /// The snapshot table, as it is in the file.
    snapshots: snapshot::Table,
}

impl Meta {
    /// Whether the tables on disk say what those in memory do.
    fn tables_written(&self) -> bool {
        self.dirty_slices.is_empty() && self.dirty_l1.is_empty()
    }
}

/// The parts that only a writable image has.
struct Writer {
    meta: Mutex<Meta>,
    /// A write has committed or given up.
    settled: Condvar,
    /// Buffers for copying on write.
    spare: Mutex<Vec<Vec<u8>>>,
    /// One flush at a time.
    turn: Mutex<()>,
    /// Flushes begun, and the number of the last one that ended well.
    begun: AtomicU64,
    ended: AtomicU64,
    /// A mapping has changed since the last flush: a write in place may depend on it.
    changed: AtomicBool,
    /// The error number of a flush that failed, or [`guard::CORRUPT`]: writes are refused from then on.
    failed: AtomicI32,
    /// What was found that makes the image corrupt.
    corrupt: OnceLock<String>,
}

/// An open qcow2 image.
pub struct Qcow2 {
    file: Arc<Device>,
    /// What data clusters are read from and written to: `file` or the data file, perhaps seen through a
    /// cipher.
    data: Arc<Device>,
    /// The data file as it is, if the image has one and it is open.
    external: Option<Arc<Device>>,
    /// The data file is always to hold what the guest sees.
    is_raw: bool,
    /// The cipher through which the data file is to be seen when it is attached.
    veil: Option<Crypt>,
    /// The old encryption, which needs to know where the guest has the data.
    aes: Option<Crypt>,
    luks: Mutex<Option<luks::Header>>,
    /// As it was when the image was opened; what may change since is in `features` and `size`.
    header: Header,
    features: edit::Features,
    backing: Option<Device>,
    backing_is_named: bool,
    /// What is below is about to change: zeroes must not depend on it.
    hold_zeroes: AtomicBool,
    /// The header names another image below than it did when this was opened.
    renamed: AtomicBool,
    /// Files of the images below, the one right below first, as far down as is known.
    files_below: Vec<Arc<Device>>,
    cluster_bits: u32,
    /// Entries in an L2 table, as a power of two.
    l2_bits: u32,
    /// Entries in a cached slice of one, as a power of two.
    slice_bits: u32,
    /// How L2 entries are to be read.
    shape: Shape,
    /// They are not plain standard entries.
    is_special: bool,
    v3: bool,
    size: AtomicU64,
    snapshot_count: AtomicU32,
    vm_state: vmstate::State,
    untrusted: bool,
    l1: AtomicPtr<L1>,
    cache: L2Cache,
    compressed: compressed::Store,
    writer: Option<Writer>,
    /// Where metadata is; of a writable image only.
    areas: Arc<guard::Areas>,
    bitmaps: bitmap::Bitmaps,
    calls: Arc<InFlight>,
}

/// What was found for a guest offset.
struct Found {
    /// The first cluster's entry, or what it would be if all of the cluster were as the subcluster is.
    entry: Entry,
    /// Bytes from the offset on for which it goes on alike.
    len: u64,
    /// The L2 table belongs to the active image alone.
    own_table: bool,
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        // SAFETY: made by Box::into_raw; nobody else has the image any more.
        drop(unsafe { Box::from_raw(*self.l1.get_mut()) });
    }
}

impl Qcow2 {
    /// Open the image in `file`; its data file and backing image, if any, are attached afterwards.
    pub fn open(file: Device, params: Params) -> Result<Self> {
        let mut header = Header::read(&file)?;
        if !params.info_only
            && let Some(feature) = header.unsupported()
        {
            return Err(Error::unsupported(file.name(), feature));
        }
        if !params.info_only
            && header.autoclear & header::AUTOCLEAR_RAW != 0
            && header.incompatible & incompat::DATA_FILE == 0
        {
            return Err(Error::corrupt(
                file.name(),
                "the autoclear bit for a raw data file (offset 88, bit 1) is set, but it has no data file",
            ));
        }
        if params.write {
            Self::check_writable(&file, &header)?;
            if header.incompatible & incompat::DIRTY != 0 {
                check::repair_dirty(&file)?;
                header = Header::read(&file)?;
            }
        }
        let shape = header.shape();
        let l2_bits = header.cluster_bits - shape.entry_bits();
        let vm_state = match &params.snapshot {
            Some(which) => Self::choose(&file, &mut header, which, &params, l2_bits)?,
            None => vmstate::State::default(),
        };
        let l1_bytes = u64::from(header.l1_entries) * 8;
        if params.untrusted && l1_bytes > MAX_UNTRUSTED_L1 && !params.info_only {
            return Err(Error::policy(
                file.name(),
                format!(
                    "its L1 table has {l1_bytes} bytes, and QBLK_OPEN_UNTRUSTED allows {MAX_UNTRUSTED_L1}"
                ),
            ));
        }
        let file = Arc::new(file);
        let Encryption { data, aes, luks, veil } = Encryption::open(&file, &header, &params)?;
        let cluster_bits = header.cluster_bits;
        let slice_bits = cluster_bits.min(12) - shape.entry_bits();
        let l1 = if params.info_only {
            L1 { offset: 0, entries: Box::new([]) }
        } else {
            Self::load_l1(&file, &header)?
        };
        let slices = (l1.entries.len() as u64) << (l2_bits - slice_bits);
        let used = header.size.div_ceil(1 << (cluster_bits + slice_bits)).min(slices);
        let expected = if params.write { l1.entries.len() as u64 } else { 0 };
        let areas = Arc::new(guard::Areas::new(expected));
        if params.write {
            file.flush_fails_for_good();
        }
        let writer = match params.write {
            true => Some(Self::writer(&file, &header, params.untrusted, areas.clone())?),
            false => None,
        };
        // An image that can grow gets a cache that can, too: memory is taken as it is used.
        let slice_bytes = slice_bits + shape.entry_bits();
        let used = if params.write { used.max(l2cache::DEFAULT_MAX >> slice_bytes) } else { used };
        let limit = match (params.info_only, params.untrusted) {
            (true, _) => Some(0),
            (_, true) => Some(params.l2_cache.unwrap_or(u64::MAX).min(MAX_UNTRUSTED_CACHE)),
            _ => params.l2_cache,
        };
        let image = Self {
            cluster_bits,
            l2_bits,
            slice_bits,
            shape,
            is_special: shape.is_special(),
            v3: header.version >= 3,
            size: AtomicU64::new(header.size),
            snapshot_count: AtomicU32::new(header.snapshots),
            vm_state,
            untrusted: params.untrusted,
            l1: AtomicPtr::new(Box::into_raw(Box::new(l1))),
            cache: L2Cache::new(file.name(), slice_bytes - 3, used, limit)?,
            compressed: compressed::Store::new(header.compression, cluster_bits),
            file,
            data,
            external: None,
            is_raw: shape.external && header.autoclear & header::AUTOCLEAR_RAW != 0,
            veil,
            aes,
            luks: Mutex::new(luks),
            features: edit::Features::new(&header),
            header,
            backing: None,
            backing_is_named: false,
            hold_zeroes: AtomicBool::new(false),
            renamed: AtomicBool::new(false),
            files_below: Vec::new(),
            writer,
            areas,
            bitmaps: bitmap::Bitmaps::new(params.untrusted),
            calls: params.calls,
        };
        if image.writer.is_some() {
            image.note_l2_tables();
            image.begin_bitmaps()?;
        }
        Ok(image)
    }

    fn check_writable(file: &Device, header: &Header) -> Result<()> {
        let name = file.name();
        if header.incompatible & incompat::CORRUPT != 0 {
            return Err(Error::corrupt(
                name,
                "it is marked as corrupt; it can be read, or repaired with qblk check --repair=all",
            ));
        }
        if header.snapshots > 0 && header.incompatible & incompat::DATA_FILE != 0 {
            return Err(Error::unsupported(
                name,
                "writing to an image with both internal snapshots and an external data file",
            ));
        }
        Ok(())
    }

    fn load_l1(file: &Device, header: &Header) -> Result<L1> {
        let bytes = u64::from(header.l1_entries) * 8;
        let end = header.l1_offset.saturating_add(bytes);
        if bytes > 0 && end > file.size() {
            return Err(Error::corrupt(
                file.name(),
                format!(
                    "the L1 table ends at {end:#x}, past the end of the file ({} bytes): is it cut off?",
                    file.size()
                ),
            ));
        }
        let mut raw = vec![0; bytes as usize];
        file.read_slice(&mut raw, header.l1_offset)?;
        let entries = raw
            .chunks_exact(8)
            .map(|e| AtomicU64::new(u64::from_be_bytes(e.try_into().unwrap_or_default())))
            .collect();
        Ok(L1 { offset: header.l1_offset, entries })
    }

    /// Show a snapshot instead of the active image: the header says then what it would if that were it.
    fn choose(
        file: &Device,
        header: &mut Header,
        which: &[u8],
        params: &Params,
        l2_bits: u32,
    ) -> Result<vmstate::State> {
        if params.write {
            return Err(Error::invalid(format!(
                "{}: option 'snapshot' is for opening read-only; a snapshot is applied to be written to",
                file.name()
            )));
        }
        if let Some(feature) = header.unknown_features() {
            return Err(Error::unsupported(file.name(), feature));
        }
        let table = snapshot::Table::load(file, header, params.untrusted)?;
        let i = table.find(file.name(), which)?;
        let chosen = &table.list[i];
        snapshot::check_l1(file, header, chosen, l2_bits)?;
        (header.l1_offset, header.l1_entries) = (chosen.l1_offset, chosen.l1_entries);
        header.size = chosen.info.disk_size;
        // They tell of the active image.
        (header.bitmaps, header.has_bitmaps) = (None, false);
        let state = vmstate::State::default();
        state.is_kept(chosen.info.vm_state_size);
        Ok(state)
    }

    fn writer(
        file: &Device,
        header: &Header,
        untrusted: bool,
        areas: Arc<guard::Areas>,
    ) -> Result<Writer> {
        let mut refs = Refcounts::load(
            file,
            header.cluster_bits,
            header.refcount_order,
            header.reftable_offset,
            header.reftable_clusters,
            areas.clone(),
        )?;
        let snapshots = snapshot::Table::load(file, header, untrusted)?;
        guard::note_snapshots(&areas, &snapshots, file, header.cluster_bits);
        refs.protect(refcount::Run {
            first: header.l1_offset >> header.cluster_bits,
            count: (u64::from(header.l1_entries) * 8).div_ceil(1 << header.cluster_bits),
        });
        if header.crypt == 2 {
            let area = header.luks_area(file)?;
            refs.protect_keys(refcount::Run {
                first: area.offset >> header.cluster_bits,
                count: area.len.unwrap_or(0).div_ceil(1 << header.cluster_bits),
            });
        }
        Ok(Writer {
            meta: Mutex::new(Meta {
                refs,
                busy: Vec::new(),
                dirty_slices: Vec::new(),
                dirty_l1: Vec::new(),
                unmapped: Vec::new(),
                limbo: Vec::new(),
                snapshots,
            }),
            settled: Condvar::new(),
            spare: Mutex::new(Vec::new()),
            turn: Mutex::new(()),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            changed: AtomicBool::new(false),
            failed: AtomicI32::new(0),
            corrupt: OnceLock::new(),
        })
    }

    /// Clear the autoclear bits that a program which does not know them must clear before it writes.
    /// To be called when nothing else can fail any more.
    pub(super) fn clear_autoclear(&self) -> Result<()> {
        if self.writer.is_none() {
            return Ok(());
        }
        // Bitmaps and a raw data file are kept right while writing; nothing else is, so all other bits
        // go.
        let mut kept = if self.header.has_bitmaps { header::AUTOCLEAR_BITMAPS } else { 0 };
        kept |= if self.is_raw { header::AUTOCLEAR_RAW } else { 0 };
        self.set_autoclear(!kept, false)?;
        self.drop_stale_bitmaps()
    }

    /// What the image says it is backed by.
    pub fn backing_ref(&self) -> Option<&BackingRef> {
        self.header.backing.as_ref()
    }

    /// Put the image that it stands on beneath it.
    /// `named`: it is the one that the header names.
    pub fn attach(&mut self, below: Device, named: bool) {
        self.files_below = below.driver().files();
        self.backing = Some(below);
        self.backing_is_named = named;
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    #[inline]
    fn l1(&self) -> &L1 {
        // SAFETY: a table that is replaced is freed only when no call is under way any more, and
        // whoever gets here is one, or replaces tables itself (resize).
        unsafe { &*self.l1.load(Acquire) }
    }

    /// The writable parts; an image opened read-only has none.
    fn writer_parts(&self) -> Result<&Writer> {
        let writer =
            self.writer.as_ref().ok_or_else(|| Error::ReadOnly(self.file.name().clone()))?;
        match writer.failed.load(Acquire) {
            0 => Ok(writer),
            guard::CORRUPT => Err(guard::fenced(self.file.name(), writer.corrupt.get())),
            errno => Err(Error::Failed { file: self.file.name().clone(), errno }),
        }
    }

    /// Whether nothing is written any more.
    fn is_fenced(&self) -> bool {
        self.writer.as_ref().is_some_and(|w| w.failed.load(Acquire) != 0)
    }

    /// Look up a guest offset: the entry of its cluster, and how far it goes on alike.
    #[inline]
    fn lookup(&self, offset: u64, count: u64) -> Result<Found> {
        let cluster = offset >> self.cluster_bits;
        let l1_index = cluster >> self.l2_bits;
        let raw = match self.l1().entries.get(l1_index as usize) {
            Some(entry) => entry.load(Acquire),
            None => 0,
        };
        if raw & !COPIED == 0 {
            let span = self.cluster_size() << self.l2_bits;
            let len = count.min(span - (offset & (span - 1)));
            return Ok(Found { entry: Entry::Unallocated, len, own_table: false });
        }
        let own_table = raw & COPIED != 0;
        if self.is_special {
            return self.lookup_special(offset, count, own_table);
        }
        let slice = cluster >> self.slice_bits;
        let index = (cluster & ((1 << self.slice_bits) - 1)) as usize;
        let in_cluster = offset & (self.cluster_size() - 1);
        let wanted = (in_cluster + count).div_ceil(self.cluster_size());
        let most = (wanted as usize).min((1 << self.slice_bits) - index);
        loop {
            let Some(hit) = self.cache.find(slice) else {
                if self.load_slice(slice)? {
                    continue;
                }
                return self.lookup_on_disk(offset, count);
            };
            let first = self.cache.entry(hit, index);
            // Only where nothing is written is a slice sanitized, and may it have such entries.
            let entry = match self.writer {
                None => entry::decode_cached(first, self.cluster_bits, self.v3),
                Some(_) => entry::decode(first, self.cluster_bits, self.v3),
            };
            let step = match entry {
                Ok(Entry::Normal { .. } | Entry::Below { .. }) => self.cluster_size(),
                Ok(Entry::Zero { host, .. }) if host != 0 => self.cluster_size(),
                _ => 0,
            };
            let mut n = 1;
            if !matches!(entry, Ok(Entry::Compressed { .. })) {
                let mut expect = first.wrapping_add(step);
                while n < most && self.cache.entry(hit, index + n) == expect {
                    expect = expect.wrapping_add(step);
                    n += 1;
                }
            }
            if self.cache.still(hit) {
                let entry = entry.map_err(|what| self.bad_entry(cluster, first, what))?;
                let len = count.min(((n as u64) << self.cluster_bits) - in_cluster);
                return Ok(Found { entry, len, own_table });
            }
        }
    }

    #[cold]
    fn bad_entry(&self, cluster: u64, raw: u64, what: &str) -> Error {
        self.found_corrupt(format!(
            "the L2 entry of guest offset {:#x} {what}: found {raw:#018x}",
            cluster << self.cluster_bits
        ))
    }

    /// Bring a slice into the cache; `false` if there is no room for it, ever again, because changes
    /// can not be written. Who writes is told; reading goes on without.
    #[cold]
    fn load_slice(&self, slice: u64) -> Result<bool> {
        while self.hold(slice)?.is_err() {
            if self.writeback().is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Hold the set of a slice with the slice in it.
    fn hold(&self, slice: u64) -> Result<std::result::Result<Held<'_>, AllDirty>> {
        self.cache.hold(slice, |bytes| {
            let Some(offset) = self.slice_offset(slice)? else {
                bytes.fill(0);
                return Ok(());
            };
            if offset + bytes.len() as u64 > self.file.size() {
                let cut = self.cut_off("the end of an L2 table", offset + bytes.len() as u64);
                return self.or_corrupt(Err(cut));
            }
            self.file.read_slice(bytes, offset)?;
            if self.writer.is_none() && !self.shape.extended {
                entry::sanitize(bytes);
            }
            Ok(())
        })
    }

    /// Where a slice lies in the file, if its table is there.
    fn slice_offset(&self, slice: u64) -> Result<Option<u64>> {
        let l1_index = slice >> (self.l2_bits - self.slice_bits);
        let raw = self.l1().entries.get(l1_index as usize).map_or(0, |e| e.load(Acquire));
        let (table, _) = entry::decode_l1(raw, self.cluster_bits).map_err(|what| {
            self.found_corrupt(format!("L1 entry {l1_index} {what}: found {raw:#018x}"))
        })?;
        let within = slice & ((1 << (self.l2_bits - self.slice_bits)) - 1);
        let bytes = self.slice_bits + self.shape.entry_bits();
        Ok((table != 0).then(|| table + (within << bytes)))
    }

    /// How much of a run of data clusters from `host` on, of which the first `skip` bytes do not
    /// matter, is in the file that holds them. A last cluster that is only partly there counts: the rest is zeroes.
    #[inline]
    fn present(&self, host: u64, skip: u64, len: u64) -> Result<u64> {
        let size = self.data.size();
        if host >= size {
            return Err(self.data_cut_off(host));
        }
        let end = size.checked_next_multiple_of(self.cluster_size()).unwrap_or(u64::MAX);
        Ok(len.min(end - host - skip))
    }

    #[cold]
    fn cut_off(&self, what: &str, offset: u64) -> Error {
        Error::corrupt(
            self.file.name(),
            format!(
                "{what} at {offset:#x} lies past the end of the file ({} bytes): is it cut off?",
                self.file.size()
            ),
        )
    }

    /// Whether another program may see something below a cluster that is not here: what the header
    /// names counts, not what is open now.
    fn may_show_below(&self, offset: u64) -> bool {
        match &self.backing {
            _ if self.holds_zeroes() => true,
            Some(b) if self.backing_is_named => offset < b.size(),
            open => open.is_some() || self.header.backing.is_some(),
        }
    }

    /// The image below, if it reaches to `offset`.
    fn below(&self, offset: u64) -> Option<&Device> {
        self.backing.as_ref().filter(|b| offset < b.size())
    }
}

impl refcount::Host for Qcow2 {
    fn file(&self) -> &Device {
        &self.file
    }

    fn switch_table(&self, run: refcount::Run, content: &[u8]) -> Result<()> {
        let offset = run.first << self.cluster_bits;
        // Until the header names it nothing has happened, and the image goes on.
        refcount::place_table(&self.file, offset, content)?;
        let writer = self.writer_parts()?;
        self.or_fail(writer, refcount::name_table(&self.file, offset, run.count))
    }
}
