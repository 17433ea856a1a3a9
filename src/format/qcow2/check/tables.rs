//! L1 and L2 tables: which clusters they refer to, and which of their entries can not be right.
//!
//! L2 tables are read by a thread of their own, a few of them at a time, while those before are
//! counted.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::cover::{Segment, Times, segments};
use super::*;

/// Bits 9 to 55 of an entry: a host offset.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// Largest L1 table, bytes.
const MAX_L1: u64 = super::super::header::MAX_L1_BYTES;
/// Bytes that are read at once.
const CHUNK: u64 = 1 << 20;
/// Buffers that are filled or emptied at any moment.
const BUFFERS: usize = 3;
/// Ranges that are no shorter are looked at for holes first.
const HOLES: u64 = 4 << 20;

/// What an L2 entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Unallocated,
    ZeroPlain,
    ZeroAllocated,
    Normal,
    Compressed,
}

/// How entries of L2 tables are read.
#[derive(Clone, Copy)]
pub struct Form {
    pub bits: u32,
    /// With subclusters: an entry is two words.
    pub extended: bool,
    pub data_file: bool,
}

impl Form {
    /// Bytes of an entry.
    pub fn size(&self) -> usize {
        if self.extended { 16 } else { 8 }
    }

    /// What an entry is, whether it may be so or not.
    pub fn kind(&self, raw: u64) -> Kind {
        if raw & COMPRESSED != 0 {
            return Kind::Compressed;
        }
        match (raw & ZERO != 0 && !self.extended, raw & OFFSET != 0) {
            (true, true) => Kind::ZeroAllocated,
            (true, false) => Kind::ZeroPlain,
            (false, true) => Kind::Normal,
            // With a data file the first cluster's offset is 0.
            (false, false) if self.data_file && raw & COPIED != 0 => Kind::Normal,
            (false, false) => Kind::Unallocated,
        }
    }

    /// Where the bytes of a compressed cluster lie: offset and length.
    fn compressed(&self, raw: u64) -> (u64, u64) {
        let x = 62 - (self.bits - 8);
        let offset = raw & ((1 << x) - 1);
        let sectors = (raw & (COMPRESSED - 1)) >> x;
        (offset, (sectors + 1) * 512 - offset % 512)
    }
}

/// Pieces of tables that were read together.
pub struct Batch {
    parts: Vec<Segment>,
    bytes: Vec<u8>,
}

impl Check<'_> {
    pub(super) fn form(&self) -> Form {
        Form {
            bits: self.bits,
            extended: self.header.incompatible & incompat::EXTENDED_L2 != 0,
            data_file: self.header.incompatible & incompat::DATA_FILE != 0,
        }
    }

    /// Count the L1 tables, the active one (offset and bytes) first, and note which L2 tables they name.
    pub(super) fn count_l1(&mut self, active: (u64, u64)) -> Result<()> {
        let mut tables = vec![(active.0, active.1, Times::once(true))];
        if self.form().data_file && !self.snapshots.list.is_empty() {
            self.report.corruptions += 1;
            self.tell(format_args!("snapshots in an image with a data file"));
        }
        for (i, s) in self.snapshots.list.iter().enumerate() {
            let (offset, len) = (s.l1_offset, u64::from(s.l1_entries) * 8);
            if !offset.is_multiple_of(self.cluster()) || len > MAX_L1 {
                self.report.corruptions += 1;
                self.tell(format_args!(
                    "snapshot {i} has an L1 table of {len} bytes at {offset:#x}"
                ));
                continue;
            }
            tables.push((offset, len, Times::once(false)));
        }
        tables.iter().for_each(|t| self.note_l1(t.0, t.1));
        self.refer_tables("an L1 table", &tables);
        let parts = segments(tables.into_iter().filter_map(|(at, len, times)| {
            Some((at, at.checked_add(len)?.min(self.file_size), times))
        }));
        let (mut named, mut askew) = (Vec::new(), Vec::new());
        for part in parts {
            self.read_l1(part, &mut named, &mut askew)?;
        }
        let (size, tables) = (self.cluster(), Plan::new(named, self.cluster()));
        for table in (0..tables.len()).filter_map(|i| tables.get(i)) {
            self.refer("an L2 table", table.from, size, table.times.all.into());
        }
        self.tables = if askew.is_empty() { tables } else { tables.with(&askew, size) };
        self.todo = self.tables.bytes() * 2 + self.disk.bytes(self.clusters, self.bits);
        Ok(())
    }

    /// Read entries of L1 tables.
    fn read_l1(
        &mut self,
        part: Segment,
        named: &mut Vec<(u64, Times)>,
        askew: &mut Vec<(u64, Times)>,
    ) -> Result<()> {
        let mut bytes = vec![0; (part.to - part.from).min(CHUNK) as usize];
        let mut at = part.from;
        while at < part.to {
            if part.to - at >= HOLES {
                at = self.data_from(at, part.to)?;
            }
            let n = (part.to - at).min(CHUNK);
            let bytes = &mut bytes[..n as usize];
            self.read(bytes, at)?;
            for entry in bytes.chunks_exact(8).map(|e| be64(e, 0)).filter(|e| *e != 0) {
                if entry & L1_RESERVED != 0 {
                    self.report.corruptions += u64::from(part.times.all);
                    self.tell(format_args!("an L1 entry has reserved bits set: {entry:#018x}"));
                }
                let table = entry & OFFSET;
                self.uncopied |= entry & COPIED == 0;
                if table & (self.cluster() - 1) == 0 {
                    named.push((table, part.times));
                    continue;
                }
                let times = u64::from(part.times.all);
                self.report.corruptions += times;
                self.tell(format_args!("an L1 entry is askew: {entry:#018x}"));
                self.refer("an L2 table", table, self.cluster(), times);
                askew.push((table, part.times));
            }
            self.progress.at(0, 1)?;
            at += n;
        }
        Ok(())
    }

    /// Where the file has data again, from `at` on.
    fn data_from(&self, at: u64, to: u64) -> Result<u64> {
        let mut some = [Extent::default(); 2];
        let mut list = ExtentList::new(&mut some);
        let end = to.min(self.file_size);
        if at >= end {
            return Ok(to);
        }
        self.file.driver().extents(at, end - at, &mut list)?;
        let n = list.len();
        Ok(match some[..n].first() {
            Some(e) if e.has(Extent::ZERO) => (at + e.length).min(to),
            _ => at,
        })
    }

    /// Count what the L2 tables refer to.
    pub(super) fn count_tables(&mut self) -> Result<()> {
        let form = self.form();
        self.with_tables(|_| true, |check, part, bytes| check.count_entries(form, part, bytes))
    }

    /// Read all L2 tables that `wanted` says, and have `work` done on each part.
    pub(super) fn with_tables(
        &mut self,
        wanted: impl Fn(&Segment) -> bool + Sync,
        mut work: impl FnMut(&mut Self, Segment, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let plan = std::mem::take(&mut self.tables);
        let (file, size) = (self.file, self.file_size);
        let result = std::thread::scope(|scope| {
            let (full, batches) = sync_channel::<Result<Batch>>(BUFFERS);
            let (empty, buffers) = sync_channel::<Batch>(BUFFERS);
            for _ in 0..BUFFERS {
                let _ = empty.send(Batch { parts: Vec::new(), bytes: Vec::new() });
            }
            let (plan, wanted) = (&plan, &wanted);
            let read = move || read_plan(file, size, plan, wanted, buffers, full);
            let reader = std::thread::Builder::new().name("qblk-check".into());
            if let Err(e) = crate::thread::deaf(|| reader.spawn_scoped(scope, read)) {
                let errno = e.raw_os_error().unwrap_or(libc::EAGAIN);
                return Err(Error::Os { op: "start a thread", file: file.name().clone(), errno });
            }
            while let Ok(batch) = batches.recv() {
                let mut batch = batch?;
                let mut at = 0;
                for part in &batch.parts {
                    let len = (part.to - part.from) as usize;
                    let Some(bytes) = batch.bytes.get_mut(at..at + len) else { break };
                    work(self, *part, bytes)?;
                    at += len;
                }
                self.step(at as u64)?;
                let _ = empty.send(batch);
            }
            Ok(())
        });
        self.tables = plan;
        result
    }

    /// Count what the entries in `bytes` refer to.
    fn count_entries(&mut self, form: Form, part: Segment, bytes: &mut [u8]) -> Result<()> {
        let (times, mask) = (u64::from(part.times.all), self.cluster() - 1);
        let active = u64::from(part.times.active);
        let plain = OFFSET & !mask;
        // Where the next cluster would lie if it followed the one before.
        let mut next = 0;
        let (mut allocated, mut fragmented) = (0, 0);
        // Set as long as all have the flag.
        let mut copied = COPIED;
        for i in (0..bytes.len()).step_by(form.size()) {
            let raw = be64(bytes, i);
            if raw == 0 && !form.extended {
                continue;
            }
            let host = raw & OFFSET;
            // By far the most: data that lies as it should.
            let usual = raw & !(plain | COPIED) == 0
                && host != 0
                && host >> self.bits < self.clusters
                && !form.data_file
                && !form.extended;
            if usual {
                if host < self.file_size {
                    let lost = self.counts.add(host >> self.bits, times);
                    if lost > 0 {
                        self.report.corruptions += lost;
                    }
                } else {
                    self.refer("a data cluster", host, self.cluster(), times);
                }
                copied &= raw;
                allocated += 1;
                fragmented += u64::from(next != 0 && next != host);
                next = host + self.cluster();
                continue;
            }
            let at = part.from + i as u64;
            match self.count_entry(form, at, times, &mut bytes[i..i + form.size()])? {
                Counted::Nothing => {}
                Counted::Compressed => {
                    allocated += 1;
                    fragmented += 1;
                    self.report.compressed_clusters += active;
                }
                Counted::Cluster(host) => {
                    copied &= raw;
                    allocated += 1;
                    fragmented += u64::from(next != 0 && next != host);
                    next = host + self.cluster();
                }
            }
        }
        self.uncopied |= copied == 0;
        self.report.allocated_clusters += allocated * active;
        self.report.fragmented_clusters += fragmented * active;
        Ok(())
    }

    /// Count what one entry, in the file at `at`, refers to.
    fn count_entry(
        &mut self,
        form: Form,
        at: u64,
        times: u64,
        bytes: &mut [u8],
    ) -> Result<Counted> {
        let raw = be64(bytes, 0);
        let map = if form.extended { be64(bytes, 8) } else { 0 };
        let kind = form.kind(raw);
        let wrong = |check: &mut Self, what: &str| {
            check.report.corruptions += times;
            check.tell(format_args!("the L2 entry {raw:#018x} at {at:#x} {what}"));
        };
        if kind != Kind::Compressed && raw & L2_RESERVED != 0 {
            wrong(self, "has reserved bits set");
        }
        match kind {
            Kind::Compressed => {
                if raw & COPIED != 0 {
                    wrong(self, "is compressed and marked as writable in place");
                }
                if form.data_file {
                    wrong(self, "is compressed, and the image has a data file");
                    return Ok(Counted::Nothing);
                }
                if map != 0 {
                    wrong(self, "is compressed and has subclusters");
                    return Ok(Counted::Nothing);
                }
                let (offset, len) = form.compressed(raw);
                self.refer("a compressed cluster", offset, len, times);
                Ok(Counted::Compressed)
            }
            Kind::ZeroAllocated | Kind::Normal => {
                let host = raw & OFFSET;
                if (map >> 32) & map & 0xffff_ffff != 0 {
                    wrong(self, "has subclusters that are both data and zeroes");
                }
                if host & (self.cluster() - 1) != 0 {
                    wrong(self, "is askew");
                    let has_data = match form.extended {
                        true => map & 0xffff_ffff != 0,
                        false => raw & ZERO == 0,
                    };
                    if !has_data
                        && self.repair == Repair::All
                        && self.mend_entry(form, at, bytes)?
                    {
                        self.report.corruptions -= times;
                        self.report.corruptions_fixed += 1;
                        return Ok(Counted::Nothing);
                    }
                }
                if !form.data_file {
                    self.refer("a data cluster", host, self.cluster(), times);
                }
                Ok(Counted::Cluster(host))
            }
            Kind::ZeroPlain => Ok(Counted::Nothing),
            Kind::Unallocated => {
                if map & 0xffff_ffff != 0 {
                    wrong(self, "has subclusters with data, but no cluster");
                }
                Ok(Counted::Nothing)
            }
        }
    }

    /// Make an entry that has space somewhere it can not have it, and no data, one without space.
    fn mend_entry(&mut self, form: Form, at: u64, bytes: &mut [u8]) -> Result<bool> {
        if !self.is_free_to_mend(at, bytes.len() as u64) {
            self.trouble(format_args!("an L2 table lies where other metadata is, at {at:#x}"));
            return Ok(false);
        }
        let (mut raw, map) = (ZERO, if form.extended { be64(bytes, 8) } else { 0 });
        if form.extended {
            raw = 0;
            // Data that was there, if any, is taken for zeroes.
            let zero = (map | map << 32) & 0xffff_ffff_0000_0000;
            bytes[8..16].copy_from_slice(&zero.to_be_bytes());
        }
        bytes[..8].copy_from_slice(&raw.to_be_bytes());
        self.file.write_slice(bytes, at, ReqFlags::NONE)?;
        self.report.changed = true;
        Ok(true)
    }
}

/// What was counted for an entry.
enum Counted {
    Nothing,
    Compressed,
    /// A cluster at this offset.
    Cluster(u64),
}

/// Read the parts of a plan, as many at a time as go into a buffer.
fn read_plan(
    file: &Device,
    size: u64,
    plan: &Plan,
    wanted: &(impl Fn(&Segment) -> bool + Sync),
    buffers: Receiver<Batch>,
    full: SyncSender<Result<Batch>>,
) {
    let mut i = 0;
    while i < plan.len() {
        let Ok(mut batch) = buffers.recv() else { return };
        batch.parts.clear();
        let mut len = 0;
        while let Some(part) = plan.get(i) {
            let more = part.to - part.from;
            if len > 0 && len + more > CHUNK {
                break;
            }
            if wanted(&part) {
                batch.parts.push(part);
                len += more;
            }
            i += 1;
        }
        let sent = full.send(read_parts(file, size, &mut batch, len as usize).map(|()| batch));
        if sent.is_err() {
            return;
        }
    }
}

fn read_parts(file: &Device, size: u64, batch: &mut Batch, len: usize) -> Result<()> {
    if batch.bytes.len() < len {
        batch.bytes.resize(len, 0);
    }
    let (mut i, mut at) = (0, 0);
    while let Some(first) = batch.parts.get(i) {
        // Those that lie beside one another are read together.
        let mut end = first.to;
        i += 1;
        while batch.parts.get(i).is_some_and(|p| p.from == end) {
            end = batch.parts[i].to;
            i += 1;
        }
        let n = (end - first.from) as usize;
        read_there(file, size, &mut batch.bytes[at..at + n], first.from)?;
        at += n;
    }
    Ok(())
}
