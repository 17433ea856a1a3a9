//! Changing what an image is like: its version, the width of its refcounts, what it is backed by, and
//! some more.
//!
//! What concerns the header alone is one change of it. A version or a width that changes goes by
//! `rebuild`, so that it happens as a whole or not at all. The image is to be opened anew afterwards:
//! what it has in memory is of the old kind.
//!
//! Source: "Header" and "Cluster mapping" of the QCOW2 specification.

use std::collections::HashMap;

use super::edit::Edit;
use super::entry::first_word;
use super::header::{
    AUTOCLEAR_RAW, COMPAT_LAZY, EXT_BACKING_FORMAT, EXT_FEATURE_NAMES, MAX_BACKING_NAME, at,
};
use super::rebuild::{Plan, Rebuild, Whose};
use super::*;
use crate::log::{Level, log};

/// Bytes of the fixed fields in versions 2 and 3.
const FIELDS_V2: usize = 72;
const FIELDS_V3: usize = 112;
/// The width that version 2 has: 2^4 bits.
const ORDER_V2: u32 = 4;

impl Qcow2 {
    /// See [`Driver::amend`].
    pub(super) fn amend_image(&self, to: &Amend, progress: Progress<'_>) -> Result<bool> {
        let writer = self.writer_parts()?;
        let order = self.order()?;
        let v3 = to.v3.unwrap_or(self.v3);
        // Everything that closing would change in the header is done: it would no more be in its place.
        self.settle()?;
        let new_order = to.refcount_order.unwrap_or(order);
        self.check_amend(to, v3, new_order)?;
        if let Some(keys) = &to.keys {
            self.change_keys(writer, keys)?;
            return Ok(false);
        }
        let change = |head: &mut Edit| self.amend_header(head, to, v3);
        if v3 == self.v3 && new_order == order {
            self.flush_all()?;
            self.edit_header(|head| {
                change(head);
                Ok(())
            })?;
        } else {
            self.rebuild(new_order, progress, |new, plan| {
                if self.v3 && !v3 {
                    new.expand_zeroes(plan)?;
                }
                plan.header = Some(Box::new(change));
                Ok(())
            })?;
        }
        // What is in memory is of the image as it was: nothing may be written by it any more, whatever
        // becomes of the rest.
        writer.failed.store(libc::ESTALE, Release);
        let end = writer.meta.lock().refs.used_end();
        if let Some(end) = end.filter(|end| *end < self.file.size())
            && let Err(e) = self.file.driver().resize(end, Prealloc::Off, true)
        {
            // The image is what it is to be; its file is longer than it need be.
            log(Level::Warn, format_args!("{e}; the end of the file stays"));
        }
        Ok(true)
    }

    /// Refuse what can not be, before anything has changed.
    fn check_amend(&self, to: &Amend, v3: bool, order: u32) -> Result<()> {
        let name = self.file.name();
        if !v3 && order != ORDER_V2 {
            return Err(Error::invalid(format!(
                "{name}: compat=0.10 has refcounts of 16 bits only, not of {}: refcount-bits=16 makes them so",
                1u64 << order
            )));
        }
        if !v3 && to.lazy == Some(true) {
            return Err(Error::invalid(format!("{name}: compat=0.10 has no lazy-refcounts")));
        }
        let has_data_file = self.header.incompatible & incompat::DATA_FILE != 0;
        let is_raw = self.features.autoclear() & AUTOCLEAR_RAW != 0;
        if to.data_file_raw == Some(true) && !(has_data_file && is_raw) {
            return Err(Error::invalid(format!(
                "{name}: data-file-raw=on is for making an image only: what its data file holds now need \
                 not be what the image does"
            )));
        }
        let is_backed = to.backing.as_ref().is_some_and(|b| !b.is_empty());
        if is_backed && has_data_file && is_raw {
            return Err(Error::invalid(format!(
                "{name}: an image whose data file is raw has no backing file"
            )));
        }
        if let Some(long) = to.backing.as_ref().filter(|b| b.len() as u64 > MAX_BACKING_NAME) {
            return Err(Error::invalid(format!(
                "the backing file's name has {} bytes, more than {MAX_BACKING_NAME}",
                long.len()
            )));
        }
        // By what is recorded now: after a rebase that copies nothing this may still stand on what was
        // recorded when it was opened.
        let names_one = || match &to.backing {
            Some(_) => Ok(is_backed),
            None => Header::read(&self.file).map(|header| header.backing.is_some()),
        };
        if to.backing_format.as_ref().is_some_and(|f| !f.is_empty()) && !names_one()? {
            return Err(Error::invalid(format!(
                "{name}: option 'backing-fmt' has no use without a backing file"
            )));
        }
        if to.keys.is_some() && self.header.crypt != 2 {
            return Err(Error::invalid(format!("{name}: has no key slots (it is not LUKS)")));
        }
        if to.keys.is_some() && !to.is_keys_only() {
            return Err(Error::invalid(format!(
                "{name}: key slots and other options change one after the other, not all or nothing: \
                 amend them in two calls"
            )));
        }
        if self.v3 && !v3 { self.check_downgrade() } else { Ok(()) }
    }

    /// What version 2 does not have.
    fn check_downgrade(&self) -> Result<()> {
        let lacks = |what: &str| {
            Err(Error::unsupported(
                self.file.name(),
                format!("compat=0.10 of an image with {what}"),
            ))
        };
        let bits = self.header.incompatible;
        for (bit, what) in [
            (incompat::DATA_FILE, "an external data file"),
            (incompat::COMPRESSION, "compression that is not zlib"),
            (incompat::EXTENDED_L2, "extended L2 entries"),
        ] {
            if bits & bit != 0 {
                return lacks(what);
            }
        }
        if self.has_bitmaps() {
            return lacks("persistent dirty bitmaps");
        }
        let meta = self.writer_parts()?.meta.lock();
        let size = self.size.load(Acquire);
        for s in &meta.snapshots.list {
            if s.info.disk_size != size {
                return lacks("a snapshot of another size");
            }
            if s.info.vm_state_size > u32::MAX.into() {
                return lacks("a snapshot of a machine's state of 4 GiB and more");
            }
        }
        Ok(())
    }

    fn amend_header(&self, head: &mut Edit, to: &Amend, v3: bool) {
        if let Some(name) = &to.backing {
            head.set_backing(Some(name));
            if name.is_empty() {
                head.set_extension(EXT_BACKING_FORMAT, None);
            }
        }
        if let Some(format) = &to.backing_format {
            let format = Some(format.clone()).filter(|f| !f.is_empty());
            head.set_extension(EXT_BACKING_FORMAT, format);
        }
        if !v3 {
            head.set_u32(4, 2);
            head.set_fields_len(FIELDS_V2);
            head.set_extension(EXT_FEATURE_NAMES, None);
            return;
        }
        if !self.v3 {
            head.set_fields_len(FIELDS_V3);
            head.set_u32(4, 3);
            head.set_u32(at::REFCOUNT_ORDER, to.refcount_order.unwrap_or(ORDER_V2));
            head.set_u32(at::HEADER_LENGTH, FIELDS_V3 as u32);
            if self.cluster_bits > 12 {
                head.set_extension(EXT_FEATURE_NAMES, Some(create::feature_names()));
            }
        }
        if let Some(lazy) = to.lazy {
            let others = self.features.compatible() & !COMPAT_LAZY;
            head.set_u64(at::COMPATIBLE, others | if lazy { COMPAT_LAZY } else { 0 });
        }
        if to.data_file_raw == Some(false) {
            head.set_u64(at::AUTOCLEAR, self.features.autoclear() & !AUTOCLEAR_RAW);
        }
    }

    fn change_keys(&self, writer: &Writer, keys: &AmendKeys) -> Result<()> {
        let area = self.header.luks_area(&self.file)?;
        match luks::change_keys(&self.file, area, keys) {
            Ok(header) => *self.luks.lock() = Some(header),
            // What is on disk is not known.
            Err(e @ (Error::Io { .. } | Error::Os { .. })) => return self.or_fail(writer, Err(e)),
            Err(e) => return Err(e),
        }
        Ok(())
    }
}

impl Rebuild<'_> {
    /// Give every cluster that reads as zeroes by a flag, which version 2 does not have, zeroes of its own,
    /// or take it away where nothing below can show: in the active image and in all snapshots.
    fn expand_zeroes(&mut self, plan: &mut Plan<'_>) -> Result<()> {
        // Tables that several L1 tables have, by their old places.
        let mut moved = HashMap::new();
        let image = self.image;
        Whose::Active.judge(image, self.expand_in(&mut plan.l1, &mut moved))?;
        for s in &mut plan.snapshots {
            let mut l1 = snapshot::load_l1(&image.file, &image.header, s, image.l2_bits)?;
            if !self.expand_in(&mut l1, &mut moved)? {
                continue;
            }
            let bytes = l1.len() as u64 * 8;
            self.shadow.free(image.clusters_of(s.l1_offset, bytes))?;
            let run = self.write_l1(&l1)?;
            s.l1_offset = run.first << image.cluster_bits;
        }
        self.mark_entries(&mut plan.l1, Whose::Active)?;
        self.mark_tables(&mut plan.l1, Whose::Active)
    }

    /// [`Rebuild::expand_zeroes`] in one L1 table: whether it has changed.
    fn expand_in(&mut self, l1: &mut [u64], moved: &mut HashMap<u64, u64>) -> Result<bool> {
        self.expect(self.tables(l1)?.len());
        let mut changed = false;
        for (i, slot) in l1.iter_mut().enumerate() {
            let table = *slot & !COPIED;
            if table == 0 {
                continue;
            }
            let new = match moved.get(&table) {
                Some(new) => *new,
                None => {
                    let new = self.expand_table(table, (i as u64) << self.image.l2_bits)?;
                    moved.insert(table, new);
                    // Should another name it, it is what it is to be.
                    moved.insert(new, new);
                    new
                }
            };
            if new != table {
                *slot = new;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// [`Rebuild::expand_zeroes`] in one L2 table, whose first entry is of guest cluster `first`: where it
    /// lies then.
    fn expand_table(&mut self, table: u64, first: u64) -> Result<u64> {
        let bits = self.image.cluster_bits;
        let mut bytes = self.read_table(table)?;
        // So many L1 tables lead here, and so to all that it points to.
        let refs = self.shadow.get(table >> bits)?;
        let most = u64::from(self.image.snapshot_count.load(Acquire)) + 1;
        if refs > most {
            return Err(Error::corrupt(
                self.image.file.name(),
                format!(
                    "the L2 table at {table:#x}: found a refcount of {refs}, expected at most {most}: one \
                     for the active image and for each snapshot"
                ),
            ));
        }
        let mut changed = false;
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            let (raw, cluster) = (first_word(word), first + i as u64);
            let old = entry::decode(raw, bits, true)
                .map_err(|what| self.image.bad_entry(cluster, raw, what))?;
            let Entry::Zero { host, .. } = old else { continue };
            let new = self.without_flag(host, cluster << bits, refs)?;
            word.copy_from_slice(&new.to_be_bytes());
            changed = true;
        }
        if !changed {
            return Ok(table);
        }
        let new = self.move_table(table, &bytes)?;
        if refs > 1 {
            self.shadow.change_by(new >> bits, refs as i64 - 1)?;
            self.shadow.change_by(table >> bits, 1 - refs as i64)?;
        }
        Ok(new)
    }

    /// The entry for the cluster at guest offset `guest` that takes the place of one with the zero flag and
    /// space at `host` (0 = none). `refs` L1 tables lead to it.
    fn without_flag(&mut self, host: u64, guest: u64, refs: u64) -> Result<u64> {
        let (image, bits) = (self.image, self.image.cluster_bits);
        let mut host = host;
        if host != 0 && self.shadow.get(host >> bits)? != refs {
            // What others see there is not zeroes.
            self.shadow.change_by(host >> bits, -(refs as i64))?;
            host = 0;
        }
        if host == 0 {
            if !image.may_show_below(guest) {
                return Ok(0);
            }
            host = self.take(1)?.first << bits;
            if refs > 1 {
                self.shadow.change_by(host >> bits, refs as i64 - 1)?;
            }
        }
        // Nobody can see yet what is written here.
        match image.is_encrypted() {
            true => image.write_zeroes(host, guest, image.cluster_size())?,
            false => image.data.zero(host, image.cluster_size(), ReqFlags::NONE)?,
        }
        Ok(if refs == 1 { entry::normal(host) } else { host })
    }
}
