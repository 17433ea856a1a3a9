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
        let entries = self.l1_needed(place + buf.len() as u64);
        if entries > self.l1().entries.len() as u64 {
            self.grow_l1(writer, entries)?;
        }
        let (mut rest, mut place) = (buf, place);
        while !rest.is_empty() {
            let within = place % self.cluster_size();
            let whole = rest.len() as u64 / self.cluster_size() * self.cluster_size();
            let n = if within == 0 && whole > 0 {
                self.write_data(rest.split_at(whole as usize).0, place, ReqFlags::NONE)?;
                whole as usize
            } else {
                self.write_part(rest, place - within, within as usize)?
            };
            place += n as u64;
            rest = rest.split_at(n).1;
        }
        self.vm_state.written.fetch_max(offset + buf.len() as u64, AcqRel);
        Ok(())
    }

    /// Write the part of `buf` that goes into the cluster at `start`, from `within` on: how much it was.
    /// The cluster is written as a whole, for what surrounds the part is not in the image below, even
    /// if that has bytes there.
    fn write_part(&self, buf: Src<'_>, start: u64, within: usize) -> Result<usize> {
        let mut whole = vec![0; self.cluster_size() as usize];
        self.read_area(OneIov::dst(&mut whole).iov(), start)?;
        let n = buf.copy_to(&mut whole[within..]);
        self.write_data(OneIov::src(&whole).iov(), start, ReqFlags::NONE)?;
        Ok(n)
    }

    /// See [`Driver::vm_state_read`].
    pub(super) fn read_vm_state(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let place = self.vm_state_place(offset, buf.len())?;
        let unit = self.unit();
        let (from, end) = (place - place % unit, place + buf.len() as u64);
        if (from, end.next_multiple_of(unit)) == (place, end) {
            return self.read_area(buf, place);
        }
        // Whole sectors are decrypted.
        let mut whole = vec![0; (end.next_multiple_of(unit) - from) as usize];
        self.read_area(OneIov::dst(&mut whole).iov(), from)?;
        buf.copy_from(&whole[(place - from) as usize..]);
        Ok(())
    }

    /// Read what is here of a range, and zeroes for the rest, whatever is below.
    fn read_area(&self, mut buf: Dst<'_>, mut place: u64) -> Result<()> {
        while !buf.is_empty() {
            let found = self.lookup(place, buf.len() as u64)?;
            let (part, rest) = buf.split_at(found.len as usize);
            match found.entry {
                Entry::Unallocated | Entry::Below { .. } | Entry::BelowZero => part.zero_fill(),
                _ => self.read_data(part, place)?,
            }
            place += part.len() as u64;
            buf = rest;
        }
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
