//! Reading through a chain of backing images, whose length should cost nothing.
//!
//! Images below never change while they are open. So an image that is only read itself remembers,
//! in its cached L2 slices, where below a cluster was found that it has not got: the next read goes
//! straight to the file that has it. What is remembered is never written anywhere, and a cluster is
//! remembered only if it lies in one piece. (An extended L2 entry has no room for that.) The top image of a writable chain remembers nothing, but
//! the one below it does, so that two look-ups lead to any depth.

use super::*;
use crate::format::walk::Found as Located;

impl Qcow2 {
    /// Read guest data.
    #[inline]
    pub(super) fn read_data(&self, mut buf: Dst<'_>, mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let found = self.lookup(offset, buf.len() as u64)?;
            let in_cluster = offset & (self.cluster_size() - 1);
            let mut len = found.len;
            match found.entry {
                Entry::Normal { host, .. } => {
                    len = self.present(host, in_cluster, len)?;
                    self.read_host(buf.split_at(len as usize).0, host + in_cluster, offset)?;
                }
                Entry::Below { depth, host } => match self.files_below.get(depth as usize - 1) {
                    Some(file) => file.read(buf.split_at(len as usize).0, host + in_cluster)?,
                    None => return Err(Error::Internal("an image below vanished".into())),
                },
                Entry::Zero { .. } | Entry::BelowZero => {
                    buf.split_at(len as usize).0.zero_fill();
                }
                Entry::Compressed { .. } => {
                    self.inflate_into(buf.split_at(len as usize).0, offset)?;
                }
                Entry::Unallocated => len = self.read_below(buf, offset, len)?,
            }
            offset += len;
            buf = buf.split_at(len as usize).1;
        }
        Ok(())
    }

    /// Read guest data if all of it is in memory. A slice of tables is small, and is read in any case.
    pub(super) fn read_data_now(&self, mut buf: Dst<'_>, mut offset: u64) -> Result<bool> {
        while !buf.is_empty() {
            let found = self.lookup(offset, buf.len() as u64)?;
            let in_cluster = offset & (self.cluster_size() - 1);
            let mut len = found.len;
            let part = |len: u64| buf.split_at(len as usize).0;
            let done = match found.entry {
                Entry::Normal { host, .. } => {
                    len = self.present(host, in_cluster, len)?;
                    self.read_host_now(part(len), host + in_cluster, offset)?
                }
                Entry::Below { depth, host } => match self.files_below.get(depth as usize - 1) {
                    Some(file) => file.read_now(part(len), host + in_cluster)?,
                    None => return Err(Error::Internal("an image below vanished".into())),
                },
                Entry::Zero { .. } | Entry::BelowZero => {
                    part(len).zero_fill();
                    true
                }
                Entry::Unallocated => match self.below(offset) {
                    None => {
                        part(len).zero_fill();
                        true
                    }
                    // What is below is looked up, and remembered, by the plain way.
                    Some(_) if self.writer.is_none() && !self.shape.extended => false,
                    Some(below) => {
                        len = len.min(below.size().saturating_sub(offset)).max(1);
                        below.read_now(part(len), offset)?
                    }
                },
                Entry::Compressed { .. } => false,
            };
            if !done {
                return Ok(false);
            }
            offset += len;
            buf = buf.split_at(len as usize).1;
        }
        Ok(true)
    }

    /// Read up to `len` bytes that this image has not got; returns how many were.
    fn read_below(&self, buf: Dst<'_>, offset: u64, mut len: u64) -> Result<u64> {
        let Some(below) = self.below(offset) else {
            buf.split_at(len as usize).0.zero_fill();
            return Ok(len);
        };
        len = len.min(below.size().saturating_sub(offset)).max(1);
        // Without a table there is no slice to note anything in, and finding that out is quick.
        let slice = (offset >> self.cluster_bits) >> self.slice_bits;
        if self.writer.is_some() || self.shape.extended || self.slice_offset(slice)?.is_none() {
            below.read(buf.split_at(len as usize).0, offset)?;
            return Ok(len);
        }
        // One cluster at a time, the first time.
        let start = offset & !(self.cluster_size() - 1);
        len = len.min(start + self.cluster_size() - offset);
        let part = buf.split_at(len as usize).0;
        let found = walk::locate(below.driver(), start, self.cluster_size())?;
        if found.len == self.cluster_size() && start + found.len <= below.size() {
            self.remember(start >> self.cluster_bits, &found);
        }
        walk::read_device(below, part, offset)?;
        Ok(len)
    }

    /// Note in the cache where below `cluster` is.
    fn remember(&self, cluster: u64, found: &Located<'_>) {
        let entry = match found.place {
            Place::Zero { .. } => Some(entry::below_zero()),
            Place::At { dev, offset } => self
                .files_below
                .get(found.depth as usize)
                .filter(|file| ptr::eq(&***file, dev))
                .and_then(|_| entry::below(found.depth + 1, offset)),
            _ => None,
        };
        if let Some(entry) = entry
            && let Ok(Ok(held)) = self.hold(cluster >> self.slice_bits)
            && held.get(cluster as usize) == 0
        {
            held.set(cluster as usize, entry);
        }
    }
}
