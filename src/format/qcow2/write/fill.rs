//! Filling granted clusters: what is written, and around it what the clusters held before.

use libc::iovec;

use super::*;

/// Buffers for copying kept for the next write, and the bytes of one that is worth keeping.
const SPARES: usize = 4;
const SPARE_BYTES: usize = 2 << 20;
/// Pieces of memory in one write that need no allocation.
const FEW: usize = 64;
impl Qcow2 {
    /// Put `part`, and around it what its clusters held before, into granted clusters.
    pub(super) fn fill(&self, grant: &Grant<'_>, part: Src<'_>, offset: u64) -> Result<()> {
        let part_end = offset + part.len() as u64;
        // A data file ends where the guest does (or did, when the write began).
        let (start, end) = (grant.start, grant.end.min(self.data_end().max(part_end)));
        let host = grant.host_of(start);
        if start == offset && end == part_end {
            return self.write_host(part, host, offset, ReqFlags::NONE);
        }
        // A small write into a cluster: let the kernel copy the cluster, then write over it.
        let small = end - start == self.cluster_size()
            && start.is_multiple_of(end - start)
            && part.len() as u64 <= self.cluster_size() / 4;
        if small && self.copy_whole(start, host)? {
            return self.write_host(part, host + (offset - start), offset, ReqFlags::NONE);
        }
        let mut around = Around::default();
        self.around(&mut around, grant.blank, start, offset)?;
        let head = around.pieces.len();
        self.around(&mut around, grant.blank, part_end, end)?;
        let done = self.write_around(&around, head, part, host, start, offset);
        if (1..=SPARE_BYTES).contains(&around.bytes.len()) {
            let mut spare = grant.writer.spare.lock();
            if spare.len() < SPARES {
                spare.push(around.bytes);
            }
        }
        done
    }

    /// Copy what the guest cluster at `start` holds to the host cluster at `host`, if it lies as it is
    /// in one piece of a file that the kernel can copy from.
    fn copy_whole(&self, start: u64, host: u64) -> Result<bool> {
        if self.is_encrypted() {
            return Ok(false);
        }
        let found = walk::locate(self, start, self.cluster_size())?;
        match found.place {
            Place::At { dev, offset } if found.len == self.cluster_size() => {
                match self.data.driver().copy_from(dev.driver(), offset, host, found.len) {
                    Ok(()) => Ok(true),
                    Err(Error::NotSupported(_)) => Ok(false),
                    Err(e) => Err(e),
                }
            }
            _ => Ok(false),
        }
    }

    fn write_around(
        &self,
        around: &Around,
        head: usize,
        part: Src<'_>,
        host: u64,
        start: u64,
        offset: u64,
    ) -> Result<()> {
        let none = iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        let (before, after) = around.pieces.split_at(head);
        let own = part.pieces().count();
        let total = before.len() + own + after.len();
        let (mut few, mut many) = ([none; FEW], Vec::new());
        let vecs = if total <= FEW {
            &mut few[..total]
        } else {
            many.resize(total, none);
            &mut many[..]
        };
        let mut len = part.len();
        for (slot, piece) in vecs.iter_mut().zip(before) {
            *slot = around.iovec(piece);
            len += slot.iov_len;
        }
        part.fill(&mut vecs[before.len()..before.len() + own]);
        for (slot, piece) in vecs[before.len() + own..].iter_mut().zip(after) {
            *slot = around.iovec(piece);
            len += slot.iov_len;
        }
        let skip = if before.is_empty() { offset - start } else { 0 };
        // SAFETY: the pieces are the caller's memory, the static zeroes and `around`'s own bytes.
        let all = unsafe { Src::from_raw(vecs, len) };
        self.write_host(all, host + skip, start + skip, ReqFlags::NONE)
    }

    /// Gather what guest range `from..to` holds at present, nothing if it is zeroes and the host has
    /// zeroes already.
    fn around(&self, out: &mut Around, blank: bool, from: u64, to: u64) -> Result<()> {
        // Zeroes are noted when something follows them, so that nothing is if nothing does.
        let (mut at, mut zeroes) = (from, 0);
        let mut all_zero = true;
        while at < to {
            let run = walk::locate(self, at, to - at)?;
            let len = run.len.min(to - at);
            if let Place::Zero { .. } = run.place {
                zeroes += len;
                at += len;
                continue;
            }
            all_zero = false;
            out.zeroes(std::mem::take(&mut zeroes));
            if out.bytes.is_empty() {
                out.bytes = self.writer_parts()?.spare.lock().pop().unwrap_or_default();
            }
            let room = out.room(len as usize);
            walk::read(self, OneIov::dst(&mut out.bytes[room..out.used]).iov(), at)?;
            at += len;
        }
        if !(all_zero && blank) {
            out.zeroes(zeroes);
        }
        Ok(())
    }
}

/// What surrounds a write in its clusters: pieces of memory in order.
#[derive(Default)]
struct Around {
    pieces: Vec<Piece>,
    /// Bytes that had to be read: the first `used` of these.
    bytes: Vec<u8>,
    used: usize,
}

enum Piece {
    Zeroes(usize),
    /// Range of `Around::bytes`.
    Read(usize, usize),
}

impl Around {
    fn zeroes(&mut self, mut len: u64) {
        while len > 0 {
            let n = len.min(ZEROES.0.len() as u64);
            self.pieces.push(Piece::Zeroes(n as usize));
            len -= n;
        }
    }

    /// Room for `len` more bytes: where it begins.
    fn room(&mut self, len: usize) -> usize {
        let at = self.used;
        self.used += len;
        // Memory that was used before is not cleared anew.
        if self.bytes.len() < self.used {
            self.bytes.resize(self.used, 0);
        }
        self.pieces.push(Piece::Read(at, len));
        at
    }

    fn iovec(&self, piece: &Piece) -> iovec {
        let (base, iov_len) = match *piece {
            Piece::Zeroes(n) => (ZEROES.0.as_ptr(), n),
            Piece::Read(at, n) => (self.bytes[at..].as_ptr(), n),
        };
        iovec { iov_base: base.cast_mut().cast(), iov_len }
    }
}
