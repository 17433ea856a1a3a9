//! The area of a machine's state: what the L1 table has behind the entries for the disk's bytes. Clusters
//! are allocated there as they are for data. A snapshot that is made takes what was written there with
//! it, and applying one brings it back.
//!
//! One call at a time, which no resize and no change of snapshots runs beside: the caller sees to that.
//!
//! Source: "Snapshots" of the QCOW2 specification.

use super::discard::Fate;
use super::header::MAX_L1_BYTES;
use super::*;

/// How much of a machine's state there is.
#[derive(Default)]
pub(super) struct State {
    /// Bytes written since the last snapshot was made or applied: the end of the last of them.
    written: AtomicU64,
    /// Bytes that the snapshot had which was applied, or is shown.
    kept: AtomicU64,
}

impl State {
    /// What a snapshot made now takes with it, bytes.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Acquire)
    }

    /// What there is, bytes.
    pub(super) fn size(&self) -> u64 {
        self.written().max(self.kept.load(Acquire))
    }

    /// A snapshot with so many bytes is what is active now.
    pub(super) fn is_kept(&self, bytes: u64) {
        self.written.store(0, Release);
        self.kept.store(bytes, Release);
    }

    /// There is none any more.
    pub(super) fn forget(&self) {
        self.is_kept(0);
    }
}

impl Qcow2 {
    /// Where the area begins, as an offset behind the guest's; and the end of what an L1 table can have.
    fn vm_state_area(&self) -> (u64, u64) {
        let span = self.cluster_bits + self.l2_bits;
        let first = self.l1_needed(self.size.load(Acquire));
        let end = (MAX_L1_BYTES / 8).min(i64::MAX as u64 >> span);
        (first << span, end << span)
    }

    /// The place of a range of the area.
    fn vm_state_place(&self, offset: u64, count: usize) -> Result<u64> {
        let (start, end) = self.vm_state_area();
        let place = offset.checked_add(start);
        match place.and_then(|p| p.checked_add(count as u64)) {
            Some(to) if to <= end => Ok(to - count as u64),
            _ => Err(Error::TooBig {
                file: self.file.name().clone(),
                what: format!(
                    "{count} bytes at offset {offset} of the machine's state: it has at most {} bytes here",
                    end.saturating_sub(start)
                ),
            }),
        }
    }

    /// See [`Driver::vm_state_write`].
    pub(super) fn write_vm_state(&self, buf: Src<'_>, offset: u64) -> Result<()> {
        let writer = self.writer_parts()?;
        if self.header.incompatible & incompat::DATA_FILE != 0 {
            return Err(Error::unsupported(
                self.file.name(),
                "a machine's state in an image with an external data file",
            ));
        }
        let place = self.vm_state_place(offset, buf.len())?;
        if buf.is_empty() {
            return Ok(());
        }
        let unit = self.unit();
        let (from, to) = (place - place % unit, (place + buf.len() as u64).next_multiple_of(unit));
        let entries = self.l1_needed(to);
        if entries > self.l1().entries.len() as u64 {
            self.grow_l1(writer, entries)?;
        }
        if (from, to) == (place, place + buf.len() as u64) {
            self.write_data(buf, place, ReqFlags::NONE)?;
        } else {
            // Whole sectors are encrypted.
            let mut whole = vec![0; (to - from) as usize];
            self.read_data(OneIov::dst(&mut whole).iov(), from)?;
            buf.copy_to(&mut whole[(place - from) as usize..]);
            self.write_data(OneIov::src(&whole).iov(), from, ReqFlags::NONE)?;
        }
        self.vm_state.written.fetch_max(offset + buf.len() as u64, AcqRel);
        Ok(())
    }

    /// See [`Driver::vm_state_read`].
    pub(super) fn read_vm_state(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let place = self.vm_state_place(offset, buf.len())?;
        let unit = self.unit();
        let (from, to) = (place - place % unit, (place + buf.len() as u64).next_multiple_of(unit));
        if (from, to) == (place, place + buf.len() as u64) {
            return self.read_data(buf, place);
        }
        let mut whole = vec![0; (to - from) as usize];
        self.read_data(OneIov::dst(&mut whole).iov(), from)?;
        buf.copy_from(&whole[(place - from) as usize..]);
        Ok(())
    }

    /// Take away what is in the area.
    pub(super) fn drop_vm_state(&self) -> Result<()> {
        let (start, _) = self.vm_state_area();
        let end = (self.l1().entries.len() as u64) << (self.cluster_bits + self.l2_bits);
        if start < end {
            self.drop_clusters(start, end, Fate::Forget)?;
        }
        self.vm_state.forget();
        Ok(())
    }
}
