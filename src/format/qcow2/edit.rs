//! Changing the header: the first cluster is loaded, changed in memory and written back, with all that
//! is not known here kept as it is.
//!
//! A power cut may tear the write between sectors. So everything behind the first sector is written
//! first, at places where what the old header means does not lie: a changed backing file name goes to
//! sectors of its own, and the table of feature names, which is for messages only, comes last of the
//! extensions (unless others lie behind it in the second sector already: they stay where they are). Then
//! one write of one sector switches over.
//!
//! Source: "Header" and "Header extensions" of the QCOW2 specification.

use super::entry::be32;
use super::header::{EXT_END, EXT_FEATURE_NAMES, Header, MAX_BACKING_NAME, at};
use super::*;

/// What a disk writes whole or not at all, bytes.
const SECTOR: usize = 512;

/// A header to be changed. Nothing is on disk before [`Edit::store`].
pub(super) struct Edit {
    cluster: usize,
    /// The cluster as it is on disk.
    head: Vec<u8>,
    /// The fixed fields, with those that are not known here.
    fields: Vec<u8>,
    extensions: Vec<(u32, Vec<u8>)>,
    /// What is not only for messages reaches behind the first sector: it must not move there.
    long: bool,
    backing: Option<Vec<u8>>,
    /// The name as it is on disk, and where; it may stay there.
    old_name: (usize, Vec<u8>),
}

impl Edit {
    /// The header of `file`, which was found good when the image was opened.
    pub(super) fn load(file: &Device, cluster_bits: u32) -> Result<Self> {
        let cluster = 1usize << cluster_bits;
        let mut head = vec![0; cluster];
        let there = file.size().min(cluster as u64) as usize;
        file.read_slice(&mut head[..there], 0)?;
        // Another program may have written to it since: look again before believing it.
        Header::read(file)?;
        let bad = || Error::corrupt(file.name(), "the header has changed since it was opened");
        let word = |at: usize| be32(&head, at);
        let length = if word(4) == 2 { 72 } else { word(100) as usize };
        let name_at = ((word(8) as usize) << 32) | word(12) as usize;
        let name_len = word(16) as usize;
        let end = if name_at == 0 { cluster } else { name_at.min(cluster) };
        let (mut extensions, mut long) = (Vec::new(), false);
        let mut at = length;
        while at + 8 <= end && word(at) != EXT_END {
            let len = word(at + 4) as usize;
            let data = head.get(at + 8..).and_then(|d| d.get(..len)).ok_or_else(bad)?;
            extensions.push((word(at), data.to_vec()));
            long |= word(at) != EXT_FEATURE_NAMES && at + 8 + len > SECTOR;
            at = (at + 8 + len).next_multiple_of(8);
        }
        let name = match name_at {
            0 => &[][..],
            _ => head.get(name_at..).and_then(|n| n.get(..name_len)).ok_or_else(bad)?,
        };
        Ok(Self {
            cluster,
            fields: head.get(..length).ok_or_else(bad)?.to_vec(),
            extensions,
            long,
            backing: (!name.is_empty()).then(|| name.to_vec()),
            old_name: (name_at, name.to_vec()),
            head,
        })
    }

    /// Set a field of 4 bytes.
    pub(super) fn set_u32(&mut self, at: u64, value: u32) {
        self.set(at, &value.to_be_bytes());
    }

    /// Set a field of 8 bytes.
    pub(super) fn set_u64(&mut self, at: u64, value: u64) {
        self.set(at, &value.to_be_bytes());
    }

    fn set(&mut self, at: u64, bytes: &[u8]) {
        if let Some(to) = self.fields.get_mut(at as usize..at as usize + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    }

    /// Make the fixed fields `len` bytes long (72 in version 2, 104 and more in version 3); what is
    /// new is zero.
    pub(super) fn set_fields_len(&mut self, len: usize) {
        self.fields.resize(len, 0);
    }

    /// The data of an extension, if there is one.
    #[cfg(test)]
    fn extension(&self, magic: u32) -> Option<&[u8]> {
        self.extensions.iter().find(|e| e.0 == magic).map(|e| &e.1[..])
    }

    /// Where the data of each extension lies in the header on disk.
    fn places(&self) -> impl Iterator<Item = (u32, u64)> {
        self.extensions.iter().scan(self.fields.len(), |at, (magic, data)| {
            let place = *at + 8;
            *at = (place + data.len()).next_multiple_of(8);
            Some((*magic, place as u64))
        })
    }

    /// Where the data of an extension lies on disk. To be asked before anything is changed.
    pub(super) fn place_of(&self, magic: u32) -> Option<u64> {
        self.places().find(|e| e.0 == magic).map(|e| e.1)
    }

    /// The last extension, and where its data lies, as [`Edit::place_of`].
    pub(super) fn last_place(&self) -> Option<(u32, u64)> {
        self.places().last()
    }

    /// Give an extension other data, add it, or (`None`) take it away.
    pub(super) fn set_extension(&mut self, magic: u32, data: Option<Vec<u8>>) {
        let place = self.extensions.iter_mut().find(|e| e.0 == magic);
        match (place, data) {
            (Some(place), Some(data)) => place.1 = data,
            (None, Some(data)) => self.extensions.push((magic, data)),
            (_, None) => self.extensions.retain(|e| e.0 != magic),
        }
    }

    /// Name another backing file, or (`None`) none. Its format is an extension.
    pub(super) fn set_backing(&mut self, name: Option<&[u8]>) {
        self.backing = name.filter(|n| !n.is_empty()).map(<[u8]>::to_vec);
    }

    /// The whole first cluster.
    fn bytes(&self, name: &Name) -> Result<Vec<u8>> {
        let too_big = |what: &str| Error::TooBig {
            file: name.clone(),
            what: format!("{what} does not fit into the header cluster of {} bytes", self.cluster),
        };
        let mut out = self.fields.clone();
        // Names of features matter least.
        let (last, first): (Vec<_>, Vec<_>) =
            self.extensions.iter().partition(|e| e.0 == EXT_FEATURE_NAMES && !self.long);
        for (magic, data) in first.into_iter().chain(last) {
            out.extend(magic.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend([0; 8]); // EXT_END
        if out.len() > self.cluster {
            return Err(too_big("what the header has to say"));
        }
        // What else is there stays: until the first sector is written the old header needs it.
        let mut bytes = self.head.clone();
        bytes[..out.len()].copy_from_slice(&out);
        let mut place = (0, 0);
        if let Some(text) = &self.backing {
            if text.len() as u64 > MAX_BACKING_NAME {
                return Err(Error::invalid(format!(
                    "the backing file's name has {} bytes, more than {MAX_BACKING_NAME}",
                    text.len()
                )));
            }
            let at = self.name_place(out.len(), text).ok_or_else(|| too_big("the backing name"))?;
            bytes[at..at + text.len()].copy_from_slice(text);
            place = (at as u64, text.len() as u32);
        }
        let at = at::BACKING as usize;
        bytes[at..at + 8].copy_from_slice(&place.0.to_be_bytes());
        bytes[at + 8..at + 12].copy_from_slice(&place.1.to_be_bytes());
        Ok(bytes)
    }

    /// Where the name goes if the extensions end at `end`.
    fn name_place(&self, end: usize, name: &[u8]) -> Option<usize> {
        let (old_at, old) = &self.old_name;
        let fits = |at: usize| (at + name.len() <= self.cluster).then_some(at);
        if name == old && *old_at >= end {
            return Some(*old_at);
        }
        // Apart from the old one, if there is room; before it, if that is so.
        let apart = (old_at + old.len()).max(end).max(SECTOR).next_multiple_of(SECTOR);
        let before = end.max(SECTOR).next_multiple_of(SECTOR);
        let is_before = before + name.len() <= old_at - old_at % SECTOR;
        fits(if is_before { before } else { apart }).or_else(|| fits(end))
    }

    /// Whether it fits, before anything depends on it.
    pub(super) fn check(&self, name: &Name) -> Result<()> {
        self.bytes(name).map(drop)
    }

    /// Write it, and make it last.
    pub(super) fn store(&self, file: &Device) -> Result<()> {
        let bytes = self.bytes(file.name())?;
        let (first, rest) = bytes.split_at(SECTOR.min(bytes.len()));
        if !rest.is_empty() {
            file.write_slice(rest, SECTOR as u64, ReqFlags::NONE)?;
            file.flush()?;
        }
        file.write_slice(first, 0, ReqFlags::NONE)?;
        file.flush()
    }
}

/// The feature bits as they are on disk now.
pub(super) struct Features {
    incompatible: AtomicU64,
    compatible: AtomicU64,
    autoclear: AtomicU64,
    /// Who writes header fields; the last lock of all.
    pub(super) turn: Mutex<()>,
}

impl Features {
    pub(super) fn new(header: &Header) -> Self {
        Self {
            incompatible: AtomicU64::new(header.incompatible),
            compatible: AtomicU64::new(header.compatible),
            autoclear: AtomicU64::new(header.autoclear),
            turn: Mutex::new(()),
        }
    }
    pub(super) fn incompatible(&self) -> u64 {
        self.incompatible.load(Acquire)
    }
    pub(super) fn compatible(&self) -> u64 {
        self.compatible.load(Acquire)
    }
    pub(super) fn autoclear(&self) -> u64 {
        self.autoclear.load(Acquire)
    }

    /// Set or clear `bits` of the word at `at` on disk, and make that last.
    fn change(&self, file: &Device, at: u64, bits: u64, on: bool) -> Result<()> {
        let word = match at {
            at::INCOMPATIBLE => &self.incompatible,
            _ => &self.autoclear,
        };
        let _turn = self.turn.lock();
        let old = word.load(Acquire);
        let new = if on { old | bits } else { old & !bits };
        if new != old {
            file.write_slice(&new.to_be_bytes(), at, ReqFlags::NONE)?;
            file.flush()?;
            word.store(new, Release);
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Set or clear an incompatible feature bit on disk; only images of version 3 have any.
    pub(super) fn set_incompatible(&self, bit: u64, on: bool) -> Result<()> {
        self.features.change(&self.file, at::INCOMPATIBLE, bit, on)
    }

    /// Set or clear autoclear feature bits on disk, as [`Qcow2::set_incompatible`].
    pub(super) fn set_autoclear(&self, bits: u64, on: bool) -> Result<()> {
        self.features.change(&self.file, at::AUTOCLEAR, bits, on)
    }

    /// Change the header as a whole: `change` is given it as it is on disk. What fails before anything
    /// is written leaves the image good to go on with; what fails then is remembered for good. Under no
    /// lock of the image but, if any, `Writer::turn` and `Writer::meta`.
    pub(super) fn edit_header(&self, change: impl FnOnce(&mut Edit) -> Result<()>) -> Result<()> {
        let _turn = self.features.turn.lock();
        let mut edit = Edit::load(&self.file, self.cluster_bits)?;
        change(&mut edit)?;
        edit.check(self.file.name())?;
        self.or_fail(self.writer_parts()?, edit.store(&self.file))
    }
}

#[cfg(test)]
mod tests {
    use super::super::header::EXT_BACKING_FORMAT;
    use super::*;

    /// A file in memory.
    struct Kept(Name, Mutex<Vec<u8>>);

    impl Driver for Kept {
        fn name(&self) -> &Name {
            &self.0
        }
        fn kind(&self) -> &'static str {
            "file"
        }
        fn caps(&self) -> Caps {
            Caps::default()
        }
        fn size(&self) -> u64 {
            self.1.lock().len() as u64
        }
        fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
            buf.copy_from(&self.1.lock()[offset as usize..]);
            Ok(())
        }
        fn write(&self, buf: Src<'_>, offset: u64, _: ReqFlags) -> Result<()> {
            buf.copy_to(&mut self.1.lock()[offset as usize..offset as usize + buf.len()]);
            Ok(())
        }
        fn flush(&self) -> Result<()> {
            Ok(())
        }
    }

    /// A version 3 header with an extension that nobody knows, a backing file, and feature names.
    fn image() -> Vec<u8> {
        let mut head = vec![0; 65536];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(4, &3u32.to_be_bytes());
        put(8, &600u64.to_be_bytes());
        put(16, &4u32.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(48, &65536u64.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        put(112, &EXT_FEATURE_NAMES.to_be_bytes());
        put(116, &48u32.to_be_bytes());
        put(168, &0x1234_5678u32.to_be_bytes());
        put(172, &3u32.to_be_bytes());
        put(176, b"abc");
        put(600, b"base");
        head
    }

    fn device(head: Vec<u8>) -> Device {
        Device::new(Box::new(Kept(Name::from("kept"), Mutex::new(head))))
    }

    #[test]
    fn what_is_not_known_is_kept() {
        let file = device(image());
        let mut edit = Edit::load(&file, 16).unwrap();
        edit.set_extension(EXT_BACKING_FORMAT, Some(b"raw".to_vec()));
        edit.set_u64(at::COMPATIBLE, 1);
        edit.store(&file).unwrap();
        let again = Edit::load(&file, 16).unwrap();
        assert_eq!(again.extension(0x1234_5678), Some(&b"abc"[..]));
        assert_eq!(again.extension(EXT_BACKING_FORMAT), Some(&b"raw"[..]));
        assert_eq!(again.extension(EXT_FEATURE_NAMES).map(<[u8]>::len), Some(48));
        assert_eq!(again.backing.as_deref(), Some(&b"base"[..]));
        let header = Header::read(&file).unwrap();
        assert_eq!(header.compatible, 1);
    }

    #[test]
    fn a_name_that_changes_is_there_before_the_header_names_it() {
        let file = device(image());
        for name in [&b"another"[..], b"x", b"a third that is longer than the others", b"base"] {
            let old = Header::read(&file).unwrap().backing.unwrap().name;
            let mut edit = Edit::load(&file, 16).unwrap();
            edit.set_backing(Some(name));
            let bytes = edit.bytes(file.name()).unwrap();
            // The power goes before the first sector is written.
            let mut torn = bytes.clone();
            let mut first = [0; SECTOR];
            file.read_slice(&mut first, 0).unwrap();
            torn[..SECTOR].copy_from_slice(&first);
            let seen = Header::read(&device(torn)).unwrap().backing.unwrap().name;
            assert_eq!(seen, old);
            edit.store(&file).unwrap();
            assert_eq!(Header::read(&file).unwrap().backing.unwrap().name, name);
        }
    }

    #[test]
    fn what_reaches_into_the_second_sector_stays_where_it_is() {
        let mut head = image();
        // As QEMU writes it: names first, then bitmaps across the border.
        head[112..600].fill(0);
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(112, &EXT_FEATURE_NAMES.to_be_bytes());
        put(116, &384u32.to_be_bytes());
        put(504, &0x1234_5678u32.to_be_bytes());
        put(508, &24u32.to_be_bytes());
        put(512, &[7; 24]);
        let file = device(head.clone());
        let mut edit = Edit::load(&file, 16).unwrap();
        edit.set_backing(Some(b"elsewhere"));
        let mut torn = edit.bytes(file.name()).unwrap();
        torn[..SECTOR].copy_from_slice(&head[..SECTOR]);
        let seen = Edit::load(&device(torn), 16).unwrap();
        assert_eq!(seen.extension(0x1234_5678), Some(&[7; 24][..]));
        assert_eq!(seen.backing.as_deref(), Some(&b"base"[..]));
    }
}
