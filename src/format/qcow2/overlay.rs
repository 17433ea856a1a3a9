//! What an image has to do with the one below: giving up all that it has itself, once that is below, and
//! naming another.
//!
//! Source: "Header" and "Header extensions" (backing file name, backing file format) of the QCOW2
//! specification.

use super::discard::Fate;
use super::guard::Kind;
use super::header::{AUTOCLEAR_RAW, EXT_BACKING_FORMAT};
use super::refcount::Run;
use super::*;

impl Qcow2 {
    /// See [`Driver::make_empty`].
    ///
    /// First the entries of all clusters go, then the tables. Either step is written as any other change:
    /// what points goes before what it points to.
    pub(super) fn forget_all(&self) -> Result<()> {
        let writer = self.writer_parts()?;
        let end = self.size.load(Acquire).next_multiple_of(self.cluster_size());
        self.drop_clusters(0, end, Fate::Forget)?;
        self.with_all_written(writer, |meta| {
            // No L2 table of the guest's area has an entry left, and no cached slice of one. What lies behind
            // it (the state of a machine) has tables of its own.
            let tables = end.div_ceil(self.cluster_size() << self.l2_bits);
            for (i, slot) in (0..tables).zip(self.l1().entries.iter()) {
                let decoded = entry::decode_l1(slot.load(Acquire), self.cluster_bits);
                let (table, own) =
                    decoded.map_err(|what| self.found_corrupt(format!("L1 entry {i} {what}")))?;
                if table == 0 || !own {
                    continue;
                }
                writer.changed.store(true, Release);
                slot.store(0, Release);
                self.areas.remove(Kind::L2, table >> self.cluster_bits);
                meta.dirty_l1.push(i);
                meta.unmapped.push(Run { first: table >> self.cluster_bits, count: 1 });
            }
            Ok(())
        })?;
        self.flush_all()
    }

    /// Whether something else is to be below than what is open there: only zeroes of this image's own last.
    pub(super) fn holds_zeroes(&self) -> bool {
        self.hold_zeroes.load(Acquire) || self.renamed.load(Acquire)
    }

    /// See [`Driver::set_backing`].
    pub(super) fn rename_backing(&self, backing: Option<(&[u8], Option<&[u8]>)>) -> Result<()> {
        self.writer_parts()?;
        if backing.is_some() && self.features.autoclear() & AUTOCLEAR_RAW != 0 {
            return Err(Error::NotSupported("a backing file beside a raw data file"));
        }
        // What was copied from the old one is there for good before it is no longer named.
        self.flush_all()?;
        self.edit_header(|edit| {
            edit.set_backing(backing.map(|b| b.0));
            let format = backing.and_then(|b| b.1).map(<[u8]>::to_vec);
            edit.set_extension(EXT_BACKING_FORMAT, format);
            Ok(())
        })?;
        // What is open below tells no more what will show where this image has nothing itself.
        self.renamed.store(true, Release);
        Ok(())
    }
}
