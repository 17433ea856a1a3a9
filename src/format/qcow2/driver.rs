//! A qcow2 image as a driver: what it answers, and what it tells of itself.

use super::*;

impl Driver for Qcow2 {
    fn name(&self) -> &Name {
        self.file.name()
    }
    fn kind(&self) -> &'static str {
        "qcow2"
    }
    fn caps(&self) -> Caps {
        let below = self.data.caps();
        let tables = self.file.caps();
        Caps {
            align: self.unit() as u32,
            read_only: self.writer.is_none(),
            optimal_io: self.cluster_size() as u32,
            fua: self.file.can_fua() != Can::Not && self.data.can_fua() != Can::Not,
            flush: below.flush && tables.flush,
            trim: true,
            zero: true,
            cache: true,
            extents: true,
            rotational: below.rotational,
            cached: below.cached && tables.cached,
            sparse: self.is_raw && self.external.is_some() && !self.is_encrypted(),
            ..Caps::default()
        }
    }
    #[inline]
    fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    #[inline]
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.read_data(buf, offset)
    }

    fn read_now(&self, buf: Dst<'_>, offset: u64) -> Result<bool> {
        self.read_data_now(buf, offset)
    }

    fn files(&self) -> Vec<Arc<Device>> {
        let mut files = vec![self.data.clone()];
        files.extend_from_slice(&self.files_below);
        files
    }

    #[inline]
    fn map(&self, offset: u64, count: u64) -> Result<Run<'_>> {
        let found = self.lookup(offset, count)?;
        let in_cluster = offset & (self.cluster_size() - 1);
        let mut len = found.len;
        let place = match found.entry {
            Entry::Normal { host, .. } => {
                len = self.present(host, in_cluster, len)?;
                self.place_of(host + in_cluster)
            }
            Entry::Zero { host: 0, .. } => Place::Zero { allocated: true, kept: None },
            Entry::Zero { host, .. } => {
                Place::Zero { allocated: true, kept: Some((&self.data, host + in_cluster)) }
            }
            Entry::Compressed { offset, .. } => Place::Compressed { dev: &self.file, offset },
            Entry::Unallocated | Entry::Below { .. } | Entry::BelowZero => match self.below(offset)
            {
                Some(below) => {
                    len = len.min(below.size().saturating_sub(offset)).max(1);
                    Place::Below(below)
                }
                None => Place::Zero { allocated: false, kept: None },
            },
        };
        Ok(Run { len, place })
    }

    fn read_compressed(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.inflate_into(buf, offset)
    }

    fn write(&self, buf: Src<'_>, offset: u64, flags: ReqFlags) -> Result<()> {
        self.note_change(offset, buf.len() as u64)?;
        self.write_data(buf, offset, flags)
    }

    fn write_compressed(&self, buf: Src<'_>, offset: u64) -> Result<()> {
        self.note_change(offset, buf.len() as u64)?;
        self.pack(buf, offset)
    }

    fn flush(&self) -> Result<()> {
        self.flush_all()
    }

    fn zero(&self, offset: u64, count: u64, flags: ReqFlags) -> Result<()> {
        self.note_change(offset, count)?;
        self.zero_range(offset, count, flags)
    }

    fn trim(&self, offset: u64, count: u64, _flags: ReqFlags) -> Result<()> {
        self.note_change(offset, count)?;
        self.trim_range(offset, count)
    }

    fn cache(&self, mut offset: u64, count: u64) -> Result<()> {
        let end = offset + count;
        while offset < end {
            let found = walk::locate(self, offset, end - offset)?;
            if let Place::At { dev, offset } = found.place {
                dev.cache(offset, found.len)?;
            }
            offset += found.len;
        }
        Ok(())
    }

    fn resize(&self, size: u64, prealloc: Prealloc, _shrink: bool) -> Result<()> {
        self.change_size(size, prealloc)
    }

    fn check(&self, repair: Repair, progress: Progress<'_>) -> Result<CheckReport> {
        // (It is closed before: what was in memory is in the file.)
        super::check::run(&self.file, repair, progress)
    }
    fn bitmaps(&self, count: bool) -> Result<Vec<BitmapInfo>> {
        self.bitmap_infos(count)
    }

    fn change_bitmap(&self, change: &BitmapChange<'_>) -> Result<()> {
        self.change_bitmaps(change)
    }

    fn status(
        &self,
        context: &[u8],
        offset: u64,
        count: u64,
        most: usize,
        out: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        self.bitmap_status(context, offset, count, most, out)
    }

    fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        self.list_snapshots()
    }

    fn snapshot_create(&self, name: &[u8], how: &NewSnapshot) -> Result<()> {
        self.create_snapshot(name, how)
    }

    fn snapshot_apply(&self, which: &[u8]) -> Result<()> {
        self.apply_snapshot(which)
    }

    fn snapshot_delete(&self, which: &[u8]) -> Result<()> {
        self.delete_snapshot(which)
    }

    fn amend(&self, to: &Amend, progress: Progress<'_>) -> Result<bool> {
        self.amend_image(to, progress)
    }

    fn vm_state_write(&self, buf: Src<'_>, offset: u64) -> Result<()> {
        self.write_vm_state(buf, offset)
    }

    fn vm_state_read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        self.read_vm_state(buf, offset)
    }
    fn make_empty(&self) -> Result<()> {
        self.forget_all()
    }

    fn hold_zeroes(&self, on: bool) {
        self.hold_zeroes.store(on, Release);
    }

    fn set_backing(&self, backing: Option<(&[u8], Option<&[u8]>)>) -> Result<()> {
        self.rename_backing(backing)
    }

    fn allocated(&self) -> Option<u64> {
        let data = match &self.external {
            Some(data) => data.driver().allocated()?,
            None => 0,
        };
        self.file.driver().allocated()?.checked_add(data)
    }

    fn close(&self) -> Result<()> {
        self.settle()
    }

    fn backing(&self) -> Option<&Device> {
        self.backing.as_ref()
    }

    fn describe(&self) -> Description {
        let h = &self.header;
        let mut state = 0;
        for (on, bit) in [
            (self.features.incompatible() & incompat::DIRTY != 0, 2),
            (self.features.incompatible() & incompat::CORRUPT != 0, 4),
            (h.crypt != 0, 8),
            (h.backing.is_some(), 16),
            (h.incompatible & incompat::DATA_FILE != 0, 32),
        ] {
            state |= if on { bit } else { 0 };
        }
        let on_off = |on: bool| (if on { "on" } else { "off" }).as_bytes().to_vec();
        let mut properties = Vec::new();
        if let Some(b) = &h.backing {
            properties.push(("backing-filename", b.name.clone()));
            properties.push(("backing-format", b.format.clone().unwrap_or_default()));
        }
        if h.incompatible & incompat::DATA_FILE != 0 {
            properties.push(("data-file", h.data_file.clone().unwrap_or_default()));
        }
        let compat = if self.v3 { "1.1" } else { "0.10" };
        let compression = ["zlib", "zstd", "unknown"][usize::from(h.compression.min(2))];
        let encryption = ["none", "aes", "luks", "unknown"][(h.crypt as usize).min(3)];
        properties.extend([
            ("qcow2.compat", compat.into()),
            (
                "qcow2.refcount-bits",
                1u64.checked_shl(h.refcount_order).unwrap_or(0).to_string().into_bytes(),
            ),
            ("qcow2.compression-type", compression.into()),
            ("qcow2.lazy-refcounts", on_off(self.features.compatible() & header::COMPAT_LAZY != 0)),
            ("qcow2.extended-l2", on_off(h.incompatible & incompat::EXTENDED_L2 != 0)),
            ("qcow2.data-file-raw", on_off(self.features.autoclear() & header::AUTOCLEAR_RAW != 0)),
            ("qcow2.encryption", encryption.into()),
            ("qcow2.bitmaps", on_off(self.has_bitmaps())),
            ("qcow2.snapshots", self.snapshot_count.load(Acquire).to_string().into_bytes()),
            ("qcow2.vm-state-size", self.vm_state.size().to_string().into_bytes()),
        ]);
        properties.extend(self.luks.lock().iter().flat_map(luks::Header::properties));
        Description { state, cluster_size: self.cluster_size() as u32, format: "qcow2", properties }
    }
}
