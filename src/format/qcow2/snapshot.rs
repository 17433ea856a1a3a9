//! Internal snapshots: their table, and making, applying and deleting one.
//!
//! A snapshot is an L1 table of its own; clusters that it shares with the active image, or with other
//! snapshots, have as many references as L1 tables lead to them. All changes go by `rebuild`: the table
//! is written whole to a new place, and the header is switched once. What an entry holds that is not
//! known here is kept.
//!
//! Source: "Snapshots" of the QCOW2 specification; limits are those that QEMU enforces.

use super::entry::{be16, be32, be64};
use super::header::MAX_L1_BYTES;
use super::rebuild::{Plan, Rebuild, Whose};
use super::*;

/// Most snapshots.
const MAX_COUNT: usize = 65536;
/// Largest table, bytes; and where the image is hostile.
const MAX_TABLE: u64 = 64 << 20;
const MAX_UNTRUSTED_TABLE: u64 = 1 << 20;
/// Most extra data in an entry, bytes.
const MAX_EXTRA: u32 = 1024;
/// An entry's fixed part, and the extra data that is known, bytes.
const FIXED: usize = 40;
const KNOWN_EXTRA: usize = 24;
/// Longest ID and name of a new snapshot, bytes: what QEMU shows of one.
const MAX_ID: usize = 127;
const MAX_NAME: usize = 255;
/// Bytes of the table read at a time.
const STEP: usize = 64 << 10;

/// One entry of the table.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Snapshot {
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    pub(super) info: SnapshotInfo,
    /// Extra data behind what is known.
    rest: Vec<u8>,
}

/// The table as it is in the file.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    pub(super) offset: u64,
    /// 0 = there is none.
    pub(super) bytes: u64,
    pub(super) list: Vec<Snapshot>,
}

/// Reads a table from one end to the other.
struct Cursor<'a> {
    file: &'a Device,
    /// Where the bytes at hand begin in the file, and what is used of them.
    at: u64,
    used: usize,
    bytes: Vec<u8>,
    /// No byte of the table may lie here or behind.
    end: u64,
}

impl Cursor<'_> {
    /// Where the next byte lies.
    fn offset(&self) -> u64 {
        self.at + self.used as u64
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&[u8]> {
        if self.end.saturating_sub(self.offset()) < n as u64 {
            return Err(Error::corrupt(
                self.file.name(),
                format!(
                    "the snapshot table: found {n} bytes of {what} at {:#x}, expected them before {:#x}, \
                     the end of the file or of what a table may have",
                    self.offset(),
                    self.end
                ),
            ));
        }
        if self.bytes.len() - self.used < n {
            self.at = self.offset();
            let len = (self.end - self.at).min(n.max(STEP) as u64) as usize;
            self.used = 0;
            self.bytes.resize(len, 0);
            self.file.read_slice(&mut self.bytes, self.at)?;
        }
        let from = self.used;
        self.used += n;
        self.bytes.get(from..from + n).ok_or_else(|| Error::Internal("a short buffer".into()))
    }
}

impl Table {
    /// Read the table of the image in `file`.
    pub(super) fn load(file: &Device, header: &Header, untrusted: bool) -> Result<Self> {
        if header.snapshots == 0 {
            return Ok(Self::default());
        }
        let (start, most) = match untrusted {
            true => (header.snapshots_offset, MAX_UNTRUSTED_TABLE),
            false => (header.snapshots_offset, MAX_TABLE),
        };
        let end = start.saturating_add(most).min(file.size());
        let mut cursor = Cursor { file, at: start, used: 0, bytes: Vec::new(), end };
        let mut list = Vec::with_capacity((header.snapshots as usize).min(1024));
        for i in 0..header.snapshots {
            let skip = (cursor.offset().next_multiple_of(8) - cursor.offset()) as usize;
            cursor.take(skip, "padding")?;
            list.push(Self::entry(&mut cursor, header, i)?);
        }
        Ok(Self { offset: start, bytes: cursor.offset() - start, list })
    }

    fn entry(cursor: &mut Cursor<'_>, header: &Header, i: u32) -> Result<Snapshot> {
        let place = cursor.offset();
        let fixed: [u8; FIXED] = cursor.take(FIXED, "an entry")?.try_into().unwrap_or([0; FIXED]);
        let extra_len = be32(&fixed, 36);
        if extra_len > MAX_EXTRA {
            return Err(Error::corrupt(
                cursor.file.name(),
                format!(
                    "extra data of snapshot {i} at {:#x}: found {extra_len} bytes, expected at most \
                     {MAX_EXTRA}",
                    place + 36
                ),
            ));
        }
        let extra = cursor.take(extra_len as usize, "extra data")?.to_vec();
        let id = cursor.take(be16(&fixed, 12).into(), "an ID")?.to_vec();
        let name = cursor.take(be16(&fixed, 14).into(), "a name")?.to_vec();
        // What an older program has not written.
        let short = be32(&fixed, 32).into();
        let vm_state_size = if extra.len() >= 8 { be64(&extra, 0) } else { short };
        let disk_size = if extra.len() >= 16 { be64(&extra, 8) } else { header.size };
        let icount = if extra.len() >= 24 { be64(&extra, 16) } else { u64::MAX };
        Ok(Snapshot {
            l1_offset: be64(&fixed, 0),
            l1_entries: be32(&fixed, 8),
            info: SnapshotInfo {
                id,
                name,
                vm_state_size,
                disk_size,
                date: (be32(&fixed, 16).into(), be32(&fixed, 20)),
                vm_clock: be64(&fixed, 24),
                icount: (icount != u64::MAX).then_some(icount),
            },
            rest: extra.get(KNOWN_EXTRA..).unwrap_or_default().to_vec(),
        })
    }

    /// The one with that ID, or else with that name.
    pub(super) fn find(&self, name: &Name, which: &[u8]) -> Result<usize> {
        let by = |f: fn(&SnapshotInfo) -> &[u8]| self.list.iter().position(|s| f(&s.info) == which);
        by(|s| &s.id)
            .or_else(|| by(|s| &s.name))
            .ok_or_else(|| Error::NoSnapshot { file: name.clone(), which: quoted(which) })
    }
}

/// The table as it is on disk.
pub(super) fn serialize(list: &[Snapshot], name: &Name) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for s in list {
        let info = &s.info;
        out.extend(s.l1_offset.to_be_bytes());
        out.extend(s.l1_entries.to_be_bytes());
        out.extend((info.id.len() as u16).to_be_bytes());
        out.extend((info.name.len() as u16).to_be_bytes());
        out.extend((info.date.0 as u32).to_be_bytes());
        out.extend(info.date.1.to_be_bytes());
        out.extend(info.vm_clock.to_be_bytes());
        // Where it does not fit, a program that knows no more takes the snapshot for one of the disk
        // alone.
        out.extend(u32::try_from(info.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend(((KNOWN_EXTRA + s.rest.len()) as u32).to_be_bytes());
        out.extend(info.vm_state_size.to_be_bytes());
        out.extend(info.disk_size.to_be_bytes());
        out.extend(info.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend(&s.rest);
        out.extend(&info.id);
        out.extend(&info.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    if list.len() > MAX_COUNT || out.len() as u64 > MAX_TABLE {
        return Err(Error::TooBig {
            file: name.clone(),
            what: format!(
                "no more snapshots: it would have {} in {} bytes, more than {MAX_COUNT} or {MAX_TABLE}",
                list.len(),
                out.len()
            ),
        });
    }
    Ok(out)
}

/// Read the L1 table of a snapshot, checked: it must cover the disk as it was.
pub(super) fn load_l1(
    file: &Device,
    header: &Header,
    s: &Snapshot,
    l2_bits: u32,
) -> Result<Vec<u64>> {
    check_l1(file, header, s, l2_bits)?;
    let mut raw = vec![0; s.l1_entries as usize * 8];
    file.read_slice(&mut raw, s.l1_offset)?;
    Ok(raw.chunks_exact(8).map(|e| be64(e, 0)).collect())
}

/// See that a snapshot's L1 table is where it can be, and covers the disk as it was.
pub(super) fn check_l1(file: &Device, header: &Header, s: &Snapshot, l2_bits: u32) -> Result<()> {
    let bits = header.cluster_bits;
    let which = quoted(&s.info.id);
    let bad = |what: String| Err(Error::corrupt(file.name(), format!("snapshot {which}: {what}")));
    let bytes = u64::from(s.l1_entries) * 8;
    if bytes > MAX_L1_BYTES {
        let most = MAX_L1_BYTES / 8;
        return bad(format!("L1 table: found {} entries, expected at most {most}", s.l1_entries));
    }
    if s.info.disk_size > i64::MAX as u64 {
        return bad(format!("disk size: found {}, expected below 2^63", s.info.disk_size));
    }
    let needed = s.info.disk_size.div_ceil(1 << (bits + l2_bits));
    if u64::from(s.l1_entries) < needed {
        return bad(format!(
            "L1 table: found {} entries, expected at least {needed} for {} bytes",
            s.l1_entries, s.info.disk_size
        ));
    }
    if s.l1_entries > 0 && (s.l1_offset == 0 || !s.l1_offset.is_multiple_of(1 << bits)) {
        return bad(format!(
            "L1 table offset: found {:#x}, expected a multiple of the cluster size",
            s.l1_offset
        ));
    }
    if s.l1_offset.checked_add(bytes).is_none_or(|end| end > file.size()) && bytes > 0 {
        return bad(format!(
            "its L1 table of {bytes} bytes at {:#x} lies past the end of the file ({} bytes): is it cut \
             off?",
            s.l1_offset,
            file.size()
        ));
    }
    Ok(())
}

/// Whether a name or an ID is one that a new snapshot may have.
fn check_text(what: &str, text: &[u8], most: usize) -> Result<()> {
    if text.is_empty() || text.len() > most || text.contains(&0) {
        return Err(Error::invalid(format!(
            "the snapshot's {what}: found {}, expected 1 to {most} bytes without a NUL",
            quoted(text)
        )));
    }
    Ok(())
}

impl Qcow2 {
    /// What snapshots there are.
    pub(super) fn list_snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        let table = match &self.writer {
            Some(writer) => writer.meta.lock().snapshots.clone(),
            None => {
                if let Some(feature) = self.header.unknown_features() {
                    return Err(Error::unsupported(self.file.name(), feature));
                }
                Table::load(&self.file, &self.header, self.untrusted)?
            }
        };
        Ok(table.list.into_iter().map(|s| s.info).collect())
    }

    /// What keeps an image from having snapshots at all.
    fn may_have_snapshots(&self) -> Result<()> {
        if self.header.incompatible & incompat::DATA_FILE != 0 {
            return Err(Error::unsupported(
                self.file.name(),
                "internal snapshots of an image with an external data file",
            ));
        }
        Ok(())
    }

    fn position(&self, which: &[u8]) -> Result<usize> {
        self.writer_parts()?.meta.lock().snapshots.find(self.file.name(), which)
    }

    /// Keep the state as it is now. What was written to the area of the machine's state goes with it.
    pub(super) fn create_snapshot(&self, name: &[u8], how: &NewSnapshot) -> Result<()> {
        self.may_have_snapshots()?;
        check_text("name", name, MAX_NAME)?;
        if let Some(id) = &how.id {
            check_text("ID", id, MAX_ID)?;
        }
        let date = how.when();
        if date.0 > u32::MAX.into() || date.1 >= 1_000_000_000 {
            return Err(Error::invalid(format!(
                "the snapshot's date: found {}.{:09} seconds, expected at most {}",
                date.0,
                date.1,
                u32::MAX
            )));
        }
        let info = SnapshotInfo {
            id: self.new_id(how.id.as_deref(), name)?,
            name: name.to_vec(),
            vm_state_size: self.vm_state.written(),
            disk_size: self.size.load(Acquire),
            date,
            vm_clock: how.vm_clock,
            icount: how.icount,
        };
        self.rebuild(self.order()?, Progress::NONE, |new, plan| {
            // What is read is the active image's.
            Whose::Active.judge(self, new.create(plan, info))
        })?;
        // It is in the snapshot, and in the active image no more.
        self.vm_state.forget();
        Ok(())
    }

    /// The ID that was asked for, or the next number, if neither it nor the name is taken.
    fn new_id(&self, asked: Option<&[u8]>, name: &[u8]) -> Result<Vec<u8>> {
        let meta = self.writer_parts()?.meta.lock();
        let list = &meta.snapshots.list;
        let taken = |what: &str, text: &[u8]| Error::SnapshotExists {
            file: self.file.name().clone(),
            which: format!("{what} {}", quoted(text)),
        };
        if list.iter().any(|s| s.info.name == name) {
            return Err(taken("name", name));
        }
        let Some(id) = asked else {
            let number = |s: &Snapshot| std::str::from_utf8(&s.info.id).ok()?.parse::<u64>().ok();
            let last = list.iter().filter_map(number).max().unwrap_or(0);
            let next =
                last.checked_add(1).ok_or_else(|| taken("ID", last.to_string().as_bytes()))?;
            return Ok(next.to_string().into_bytes());
        };
        match list.iter().any(|s| s.info.id == id) {
            true => Err(taken("ID", id)),
            false => Ok(id.to_vec()),
        }
    }

    /// Width of refcounts, as a power of two.
    pub(super) fn order(&self) -> Result<u32> {
        Ok(self.writer_parts()?.meta.lock().refs.order())
    }

    /// Make the disk, and the machine's state, what they were in a snapshot.
    pub(super) fn apply_snapshot(&self, which: &[u8]) -> Result<()> {
        self.may_have_snapshots()?;
        let i = self.position(which)?;
        let vanished = || Error::Internal("a snapshot vanished".into());
        let new_size = {
            let meta = self.writer_parts()?.meta.lock();
            meta.snapshots.list.get(i).ok_or_else(vanished)?.info.disk_size
        };
        // All that is on the disk may be another's then.
        let resized = new_size != self.size.load(Acquire);
        if resized {
            self.bitmaps_resizing(new_size)?;
        }
        self.note_change(0, self.size.load(Acquire).max(new_size))?;
        let mut state = 0;
        let applied = self.rebuild(self.order()?, Progress::NONE, |new, plan| {
            let chosen = plan.snapshots.get(i).cloned().ok_or_else(vanished)?;
            state = chosen.info.vm_state_size;
            new.apply(plan, &chosen)
        });
        if resized {
            self.bitmaps_resized();
        }
        applied?;
        self.vm_state.is_kept(state);
        Ok(())
    }

    /// Forget a snapshot.
    pub(super) fn delete_snapshot(&self, which: &[u8]) -> Result<()> {
        let i = self.position(which)?;
        self.rebuild(self.order()?, Progress::NONE, |new, plan| {
            if i >= plan.snapshots.len() {
                return Err(Error::Internal("a snapshot vanished".into()));
            }
            let gone = plan.snapshots.remove(i);
            new.delete(plan, &gone)
        })
    }
}

impl Rebuild<'_> {
    fn create(&mut self, plan: &mut Plan<'_>, info: SnapshotInfo) -> Result<()> {
        let needed = self.image.l1_needed(plan.size) as usize;
        let has_state = info.vm_state_size > 0;
        let mut active = std::mem::take(&mut plan.l1);
        // The machine's state moves to the snapshot: its references only change hands.
        let behind = match has_state {
            true => active.split_off(needed.min(active.len())),
            false => Vec::new(),
        };
        let whole = active.len() + behind.len();
        // The tables themselves are counted last: some of them move.
        self.count_clusters(&active, true)?;
        self.mark_entries(&mut active, Whose::Active)?;
        self.count_tables(&active, true)?;
        let mut kept: Vec<u64> = active.iter().chain(&behind).map(|e| e & !COPIED).collect();
        let used = kept.iter().rposition(|e| *e != 0).map_or(0, |last| last + 1);
        kept.truncate(used.max(needed));
        self.mark_tables(&mut active, Whose::Active)?;
        active.resize(whole, 0);
        let run = self.write_l1(&kept)?;
        plan.l1 = active;
        plan.snapshots.push(Snapshot {
            l1_offset: run.first << self.image.cluster_bits,
            l1_entries: kept.len() as u32,
            info,
            rest: Vec::new(),
        });
        Ok(())
    }

    fn apply(&mut self, plan: &mut Plan<'_>, chosen: &Snapshot) -> Result<()> {
        let image = self.image;
        let mut l1 = load_l1(&image.file, &image.header, chosen, image.l2_bits)?;
        // References go before they come: where counts are narrow there is no room for both.
        Whose::Active.judge(image, self.count_clusters(&plan.l1, false))?;
        Whose::Active.judge(image, self.count_tables(&plan.l1, false))?;
        self.count_clusters(&l1, true)?;
        self.count_tables(&l1, true)?;
        self.mark_entries(&mut l1, Whose::Snapshots)?;
        self.mark_tables(&mut l1, Whose::Snapshots)?;
        // As much room as there was.
        l1.resize(l1.len().max(plan.l1.len()), 0);
        plan.l1 = l1;
        plan.size = chosen.info.disk_size;
        Ok(())
    }

    fn delete(&mut self, plan: &mut Plan<'_>, gone: &Snapshot) -> Result<()> {
        let image = self.image;
        let l1 = load_l1(&image.file, &image.header, gone, image.l2_bits)?;
        self.count_clusters(&l1, false)?;
        self.count_tables(&l1, false)?;
        if !l1.is_empty() {
            self.shadow.free(image.clusters_of(gone.l1_offset, l1.len() as u64 * 8))?;
        }
        self.mark_entries(&mut plan.l1, Whose::Active)?;
        self.mark_tables(&mut plan.l1, Whose::Active)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, rest: &[u8]) -> Snapshot {
        Snapshot {
            l1_offset: 5 << 16,
            l1_entries: 3,
            info: SnapshotInfo {
                id: id.into(),
                name: format!("name of {id}").into(),
                vm_state_size: 5 << 32,
                disk_size: 1 << 30,
                date: (1_700_000_000, 999_999_999),
                vm_clock: 17,
                icount: Some(4),
            },
            rest: rest.to_vec(),
        }
    }

    #[test]
    fn a_table_reads_back_with_what_is_not_known() {
        let list = vec![entry("1", b""), entry("22", b"from the future"), entry("x", &[7; 1000])];
        let bytes = serialize(&list, &Name::from("t")).unwrap();
        let file = tests_file(&bytes, 65536);
        let header = tests_header(list.len() as u32);
        let table = Table::load(&file, &header, false).unwrap();
        assert_eq!(table.list, list);
        assert_eq!(table.bytes.next_multiple_of(8), bytes.len() as u64);
        assert_eq!(table.find(file.name(), b"22").unwrap(), 1);
        assert_eq!(table.find(file.name(), b"name of x").unwrap(), 2);
        assert!(table.find(file.name(), b"y").is_err());
    }

    #[test]
    fn short_extra_data_of_older_programs_is_read() {
        let mut bytes = serialize(&[entry("1", b"")], &Name::from("t")).unwrap();
        // No extra data: the state's size in 32 bits, the disk's is the image's.
        bytes.drain(40..64);
        bytes[36..40].copy_from_slice(&0u32.to_be_bytes());
        bytes[32..36].copy_from_slice(&77u32.to_be_bytes());
        let table = Table::load(&tests_file(&bytes, 65536), &tests_header(1), false).unwrap();
        let info = &table.list[0].info;
        assert_eq!((info.vm_state_size, info.disk_size, info.icount), (77, 4096, None));
        assert_eq!(info.id, b"1");
    }

    #[test]
    fn tables_of_nonsense_are_refused() {
        let good = serialize(&[entry("1", b"")], &Name::from("t")).unwrap();
        for (at, value, word) in [(36, 1025u32, "1025"), (36, u32::MAX, "4294967295")] {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            let e = Table::load(&tests_file(&bytes, 65536), &tests_header(1), false).unwrap_err();
            assert!(e.to_string().contains(word), "{e}");
        }
        // More of them than there are bytes.
        let e = Table::load(&tests_file(&good, 65536), &tests_header(65536), false).unwrap_err();
        assert!(e.to_string().contains("end of the file"), "{e}");
        let mut bytes = good.clone();
        bytes[12..16].copy_from_slice(&[0xff; 4]);
        let e = Table::load(&tests_file(&bytes, 65536), &tests_header(1), false).unwrap_err();
        assert!(e.to_string().contains("65535 bytes of an ID"), "{e}");
    }

    fn tests_header(snapshots: u32) -> Header {
        let mut head = vec![0; 512];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(4, &2u32.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(24, &4096u64.to_be_bytes());
        put(36, &1u32.to_be_bytes());
        put(40, &(3u64 << 16).to_be_bytes());
        put(48, &(1u64 << 16).to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(60, &snapshots.to_be_bytes());
        put(64, &65536u64.to_be_bytes());
        Header::read(&tests_file(&head, 0)).unwrap()
    }

    fn tests_file(bytes: &[u8], at: usize) -> Device {
        let driver = crate::file::from_memory(crate::file::memory(0).unwrap()).unwrap();
        let file = Device::new(driver);
        file.write_slice(bytes, at as u64, ReqFlags::NONE).unwrap();
        file
    }
}
