//! Compressed writes: clusters are compressed by the caller's thread, under no lock, and their compressed
//! forms are packed byte by byte into host clusters that they share.
//!
//! A cluster is on its way in three steps, as in `write`: bytes on the host are taken for it (and a
//! reference is counted to each host cluster that they touch), they are written, and the L2 entry is made
//! to point there. What a shared cluster held before is never written again: those behind are other
//! bytes, which nothing points to before they are there. So a power cut finds what was flushed, and at
//! worst a reference too many.
//!
//! Deflate is done by libdeflate, whose window is 32 KiB, where QEMU's own writer uses 4 KiB. Every reader
//! inflates a cluster in one go into memory for all of it, and then no window limits how far back a
//! match may lie; the specification sets no limit but that of RFC 1951, which is 32 KiB.
//!
//! Source: "Compressed Clusters Descriptor" of the QCOW2 specification.

use super::cluster::Raw;
use zstd_safe::CParameter;

use super::compressed::Store;
use super::refcount::Stop;
use super::write::Change;
use super::*;

/// Compresses better than the default of zlib, which QEMU has, at several times its speed.
const DEFLATE_LEVEL: i32 = 5;
/// The default, which QEMU has.
const ZSTD_LEVEL: i32 = 3;
/// Shorter matches than that level looks for: a tenth slower, but then it is a few hundredths smaller.
const ZSTD_MATCH: u32 = 4;
/// Guest bytes that are compressed before they are written, at most (or a cluster, if that is more).
const MAX_BATCH: u64 = 2 << 20;

/// A codec with its working memory.
enum Codec {
    Deflate(Box<libdeflater::Compressor>),
    Zstd(zstd_safe::CCtx<'static>),
}

/// What clusters are compressed with.
pub(super) struct Press {
    codec: Codec,
    /// Compressed forms, one behind the other: the first `used` bytes.
    out: Vec<u8>,
    used: usize,
    /// The lengths of these.
    lens: Vec<usize>,
    /// A cluster in one piece, where the caller's memory has none.
    whole: Vec<u8>,
}

impl Press {
    pub(super) fn new(kind: u8) -> Self {
        let codec = match kind {
            0 => {
                let level = libdeflater::CompressionLvl::new(DEFLATE_LEVEL).unwrap_or_default();
                Codec::Deflate(Box::new(libdeflater::Compressor::new(level)))
            }
            _ => {
                let mut ctx = zstd_safe::CCtx::create();
                for parameter in
                    [CParameter::CompressionLevel(ZSTD_LEVEL), CParameter::MinMatch(ZSTD_MATCH)]
                {
                    // Both are within what the library takes; without them it does as it likes.
                    let _ = ctx.set_parameter(parameter);
                }
                Codec::Zstd(ctx)
            }
        };
        Self { codec, out: Vec::new(), used: 0, lens: Vec::new(), whole: Vec::new() }
    }

    fn clear(&mut self) {
        self.used = 0;
        self.lens.clear();
    }

    /// Compress a cluster of `size` bytes, of which `part` has the first and the rest are zeroes; `false`
    /// if that makes it no smaller.
    fn add(&mut self, part: Src<'_>, size: usize) -> bool {
        let data = match part.as_single() {
            // SAFETY: a piece of a Src is readable memory of n bytes.
            Some((base, n)) if n == size => unsafe { std::slice::from_raw_parts(base, n) },
            _ => {
                self.whole.clear();
                self.whole.resize(size, 0);
                part.copy_to(&mut self.whole);
                &self.whole[..]
            }
        };
        // Memory that was used before is not cleared anew.
        let end = self.used + size - 1;
        if self.out.len() < end {
            self.out.resize(end, 0);
        }
        let to = &mut self.out[self.used..end];
        let len = match &mut self.codec {
            Codec::Deflate(c) => c.deflate_compress(data, to).ok(),
            Codec::Zstd(c) => c.compress2(to, data).ok(),
        };
        self.used += len.unwrap_or(0);
        self.lens.extend(len);
        len.is_some()
    }
}

/// Bytes on the host for compressed clusters, not visible yet. Gives them back when dropped.
struct Packed<'a> {
    image: &'a Qcow2,
    writer: &'a Writer,
    /// First guest cluster.
    first: u64,
    /// The claim on guest clusters: at least those of `places`.
    end: u64,
    /// Where the compressed forms go, and their lengths.
    places: Vec<(u64, usize)>,
    committed: bool,
}

impl Packed<'_> {
    /// Let other writes at the guest clusters.
    fn settle(&self, meta: &mut Meta) {
        let mine = (self.first, self.end);
        if let Some(i) = meta.busy.iter().position(|b| *b == mine) {
            meta.busy.swap_remove(i);
        }
        self.writer.settled.notify_all();
    }
}

impl Drop for Packed<'_> {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        let mut meta = self.writer.meta.lock();
        for &(host, len) in &self.places {
            self.image.release_bytes(&mut meta, host, len as u64);
        }
        self.settle(&mut meta);
    }
}

impl Qcow2 {
    /// See [`Driver::write_compressed`].
    pub(super) fn pack(&self, buf: Src<'_>, offset: u64) -> Result<()> {
        let writer = self.writer_parts()?;
        self.refuse_to_pack(offset, buf.len() as u64)?;
        let mut press = self.compressed.take_press();
        let done = self.pack_with(writer, &mut press, buf, offset);
        self.compressed.give_press(press);
        done
    }

    fn refuse_to_pack(&self, offset: u64, count: u64) -> Result<()> {
        if self.is_encrypted() {
            return Err(Error::NotSupported("compressed writes to an image with encryption"));
        }
        if self.header.incompatible & incompat::DATA_FILE != 0 {
            return Err(Error::NotSupported("compressed writes to an image with a data file"));
        }
        let (size, end) = (self.cluster_size(), offset + count);
        let whole = end.is_multiple_of(size) || end == self.size.load(Acquire);
        if offset.is_multiple_of(size) && whole {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{}: {count} bytes at offset {offset}: compressed writes are of whole clusters of {size} bytes, \
             but at the end of the image",
            self.file.name()
        )))
    }

    fn pack_with(
        &self,
        writer: &Writer,
        press: &mut Press,
        mut buf: Src<'_>,
        mut offset: u64,
    ) -> Result<()> {
        let size = self.cluster_size();
        while !buf.is_empty() {
            // An L2 slice at a time, so that the entries change together.
            let span = size << self.slice_bits;
            let most = MAX_BATCH.max(size).min(span - (offset & (span - 1)));
            let (batch, _) = buf.split_at(most as usize);
            press.clear();
            let (mut at, mut plain) = (0, 0);
            while at < batch.len() && plain == 0 {
                let part = batch.sub(at, size as usize);
                match press.add(part, size as usize) {
                    true => at += part.len(),
                    false => plain = part.len(),
                }
            }
            self.write_packed(writer, offset >> self.cluster_bits, press)?;
            if plain > 0 {
                let part = batch.sub(at, plain);
                self.write_data(part, offset + at as u64, ReqFlags::NONE)?;
            }
            offset += (at + plain) as u64;
            buf = buf.split_at(at + plain).1;
        }
        Ok(())
    }

    /// Write what is in `press`, for the guest clusters from `first` on.
    fn write_packed(&self, writer: &Writer, first: u64, press: &Press) -> Result<()> {
        let (mut out, mut lens) = (&press.out[..press.used], &press.lens[..]);
        let (mut first, mut retried) = (first, false);
        while !lens.is_empty() {
            let done = match self.or_grow(self.place_packed(writer, first, lens)) {
                Ok(Some(Some(packed))) => {
                    let bytes: usize = packed.places.iter().map(|p| p.1).sum();
                    self.write_places(&packed.places, out).map(|()| (packed, bytes))
                }
                Ok(_) => continue,
                Err(e) => Err(e),
            };
            match done {
                Ok((packed, bytes)) => {
                    let n = packed.places.len();
                    self.commit_packed(packed)?;
                    first += n as u64;
                    (out, lens) = (&out[bytes..], &lens[n..]);
                }
                // What was freed may not have been given back to the host yet.
                Err(e) if e.is_no_space() && !retried => {
                    self.make_room(e)?;
                    retried = true;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Take places for compressed forms of these lengths, or for the first of them; `None`: things
    /// changed, try again.
    fn place_packed<'a>(
        &'a self,
        writer: &'a Writer,
        first: u64,
        lens: &[usize],
    ) -> Change<Option<Packed<'a>>> {
        let mut meta = writer.meta.lock();
        if meta.busy.iter().any(|b| (b.0..b.1).contains(&first)) {
            writer.settled.wait(&mut meta);
            return Ok(None);
        }
        let end = first + lens.len() as u64;
        let end = meta.busy.iter().map(|b| b.0).filter(|b| *b > first).fold(end, u64::min);
        self.own_table(&mut meta, first >> self.l2_bits)?;
        let Ok(held) = self.hold(first >> self.slice_bits)? else {
            drop(meta);
            self.writeback()?;
            return Ok(None);
        };
        for cluster in first..end {
            // What is there is replaced as a whole; still, nothing is built on entries that mean nothing.
            self.entry_of(&held, cluster)?;
        }
        drop(held);
        let mut places = Vec::with_capacity(lens.len());
        let mut stopped = None;
        for &len in &lens[..(end - first) as usize] {
            match self.place(&mut meta, len as u64) {
                Ok(host) => places.push((host, len)),
                Err(e) => {
                    stopped = Some(e);
                    break;
                }
            }
        }
        match stopped {
            // What was had already is written; the next turn meets what was in the way.
            Some(e) if places.is_empty() => return Err(e),
            _ => {}
        }
        meta.busy.push((first, end));
        Ok(Some(Packed { image: self, writer, first, end, places, committed: false }))
    }

    /// Take `len` bytes for a compressed form, and make the file long enough for them.
    fn place(&self, meta: &mut Meta, len: u64) -> Change<u64> {
        let host = meta.refs.allocate_bytes(&self.file, len)?;
        let end = (host + len).next_multiple_of(self.cluster_size());
        let fits = match entry::compressed(host, len, self.cluster_bits) {
            Some(_) => self.lengthen(end),
            None => Err(Error::TooBig {
                file: self.file.name().clone(),
                what: format!("no compressed cluster can lie at offset {host:#x}"),
            }),
        };
        if let Err(e) = fits {
            self.release_bytes(meta, host, len);
            return Err(Stop::Failed(e));
        }
        Ok(host)
    }

    /// Take away the references of a compressed form.
    fn release_bytes(&self, meta: &mut Meta, host: u64, len: u64) {
        for cluster in host >> self.cluster_bits..=(host + len - 1) >> self.cluster_bits {
            self.release_or_leak(meta, cluster);
        }
    }

    /// Write compressed forms, which follow one another in `bytes`, to their places: those that do so
    /// there as well together.
    fn write_places(&self, places: &[(u64, usize)], mut bytes: &[u8]) -> Result<()> {
        let mut rest = places;
        while let Some((&(host, len), next)) = rest.split_first() {
            let (mut end, mut n) = (host + len as u64, 0);
            while next.get(n).is_some_and(|p| p.0 == end) {
                end += next[n].1 as u64;
                n += 1;
            }
            let (now, later) = bytes.split_at((end - host) as usize);
            self.file.write_slice(now, host, ReqFlags::NONE)?;
            (bytes, rest) = (later, &next[n..]);
        }
        Ok(())
    }

    /// Make packed clusters visible.
    fn commit_packed(&self, mut packed: Packed<'_>) -> Result<()> {
        let writer = packed.writer;
        let (slice, mut meta) = (packed.first >> self.slice_bits, writer.meta.lock());
        let held = self.hold_to_change(&mut meta, slice)?;
        // All of them are looked at before one is changed: a place that an entry names is not given back.
        let mut changes = Vec::with_capacity(packed.places.len());
        for (cluster, &(host, len)) in (packed.first..).zip(&packed.places) {
            let Some(word) = entry::compressed(host, len as u64, self.cluster_bits) else {
                return Err(Error::Internal("a place that no entry can name".into()));
            };
            changes.push((cluster, word, self.entry_of(&held, cluster)?));
        }
        // Before the entries: who sees one must also see that it is not on disk yet.
        self.dirtied(writer, &mut meta, &held);
        for (cluster, word, old) in changes {
            self.set_raw(&held, cluster, Raw { word, bits: 0 });
            self.unmap(&mut meta, old);
        }
        drop(held);
        packed.committed = true;
        packed.settle(&mut meta);
        let much = self.much_waits(&meta);
        drop(meta);
        if much { self.writeback() } else { Ok(()) }
    }
}

impl Store {
    fn take_press(&self) -> Press {
        let press = self.presses.lock().pop();
        press.unwrap_or_else(|| Press::new(self.kind))
    }

    fn give_press(&self, press: Press) {
        let mut presses = self.presses.lock();
        if presses.len() < MOST_PRESSES {
            presses.push(press);
        }
    }
}

/// Idle ones that are kept.
const MOST_PRESSES: usize = 16;
