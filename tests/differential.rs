//! The same random operations on an image and on a plain array of bytes: both must always hold the
//! same, and what qemu-img says of the image must be "no errors".
//!
//! `QBLK_TEST_SEED` repeats a run (it is printed at the start), `QBLK_TEST_SECONDS` prolongs it,
//! `QBLK_TEST_KEEP` keeps the files of a failure.

mod common;
#[path = "differential/geometry.rs"]
mod geometry;
#[path = "differential/threads.rs"]
mod threads;

use std::path::PathBuf;
use std::time::Instant;

use common::*;
use geometry::{Chain, Data, Setup, data_file};
use qblk::block::ErrorKind;
use qblk::{Extent, Image, Options, ReqFlags};

/// A round: an image, what it should hold, and what was done to it.
struct Round {
    rng: Rng,
    setup: Setup,
    dir: Tmp,
    path: PathBuf,
    image: Option<Image>,
    model: Vec<u8>,
    /// What internal snapshots hold, by name.
    snapshots: Vec<(String, Vec<u8>)>,
    log: Vec<String>,
    seed: u64,
}

impl Drop for Round {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let skip = self.log.len().saturating_sub(40);
            eprintln!("round with seed {}: {:#?}", self.seed, self.setup);
            for line in &self.log[skip..] {
                eprintln!("  {line}");
            }
        }
    }
}

#[test]
fn an_image_holds_what_a_plain_array_would() {
    watch_log();
    let mut rounds = Rng::new(seed("differential"));
    let end = deadline(60);
    let mut n = 0;
    while n == 0 || Instant::now() < end {
        let seed = rounds.next();
        Round::new(seed).run(end);
        assert_nothing_logged();
        n += 1;
    }
    eprintln!("differential: {n} rounds");
}

impl Round {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let setup = Setup::random(&mut rng);
        let dir = if setup.direct { Tmp::new("diff") } else { Tmp::in_memory("diff") };
        let (path, model) = setup.build(&mut rng, &dir);
        let (image, snapshots, log) = (None, Vec::new(), Vec::new());
        let mut round = Self { rng, setup, dir, path, image, model, snapshots, log, seed };
        round.open();
        round
    }

    fn options(&self) -> Options {
        let mut o = options(&[("format", self.setup.format)]);
        if self.setup.format == "qcow2"
            && let Some(cache) = self.setup.l2_cache
        {
            o.set("cache.l2-size", Some(cache.as_bytes()));
        }
        if self.setup.chain != Chain::None && self.rng.clone().one_in(3) {
            o.set("backing.io", Some(b"mmap"));
        }
        o
    }

    fn open(&mut self) {
        let flags = self.setup.flags();
        let opts = self.options();
        self.image = Some(open_with(&self.path, &opts, flags));
        assert_eq!(self.image().size().unwrap(), self.model.len() as u64, "size after opening");
    }

    fn close(&mut self) {
        if let Some(image) = self.image.take() {
            image.close().unwrap_or_else(|e| panic!("close: {e}"));
        }
    }

    fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    fn run(&mut self, end: Instant) {
        // Large clusters move more bytes for an operation.
        let steps = if self.setup.cluster_bits >= 18 { 150 } else { 400 };
        for _ in 0..steps {
            self.step();
            if Instant::now() > end {
                break;
            }
        }
        self.judge();
        self.judge_snapshots();
    }

    fn note(&mut self, text: String) {
        self.log.push(text);
    }

    /// A range, of a kind that is interesting: tiny, at cluster borders, huge, at the end.
    fn a_range(&mut self) -> (u64, u64) {
        let size = self.model.len() as u64;
        let cluster = 1 << self.setup.cluster_bits;
        let count = match self.rng.below(12) {
            0 => self.rng.below(16),
            1..=3 => self.rng.range(1, 4097),
            4 | 5 => cluster,
            6 | 7 => self.rng.range(1, 2 * cluster),
            8 => cluster * self.rng.range(1, 20),
            9 => self.rng.range(1, (size / 4).max(2)),
            10 => 512 * self.rng.range(1, 64),
            _ => self.rng.below(65536),
        }
        .min(size);
        let last = size - count;
        let offset = match self.rng.below(8) {
            0 => last,
            1 | 2 => last - last % cluster,
            3 | 4 => self.rng.below(last + 1) / cluster * cluster,
            5 => self.rng.below(last + 1) / 512 * 512,
            _ => self.rng.below(last + 1),
        };
        // One operation of the whole, now and then.
        if self.rng.one_in(60) { (0, size) } else { (offset, count) }
    }

    fn fua(&mut self) -> ReqFlags {
        if self.rng.one_in(8) { ReqFlags::FUA } else { NONE }
    }

    fn step(&mut self) {
        match self.rng.below(100) {
            0..=39 => self.write(),
            40..=51 => self.zero(),
            52..=57 => self.trim(),
            58..=75 => self.check_read(),
            76..=80 => self.check_extents(),
            81..=84 => self.resize(),
            85..=87 => {
                self.note("flush".into());
                self.image().flush().unwrap();
            }
            88..=90 => {
                self.note("close, open".into());
                self.close();
                self.open();
            }
            91 => self.reopen(),
            92 | 93 => self.other_context(),
            94 => self.refused(),
            95 | 96 => self.judge(),
            97 => self.by_qemu(),
            98 => match self.rng.below(3) {
                0 => self.snapshot(),
                1 => self.cache_hint(),
                _ => self.crash(),
            },
            _ => self.write_fua_and_crash(),
        }
    }

    fn write(&mut self) {
        let (offset, count) = self.a_range();
        let flags = self.fua();
        let data = match self.rng.one_in(10) {
            true => vec![0; count as usize],
            false => self.rng.bytes(count as usize),
        };
        let vectored = self.rng.one_in(3);
        self.note(format!("write {count}@{offset} {flags:?} vectored={vectored}"));
        let image = self.image.as_ref().unwrap();
        let done = if vectored {
            write_scattered(image, &mut self.rng, &data, offset, flags)
        } else {
            image.write_at(&data, offset, flags)
        };
        done.unwrap_or_else(|e| panic!("write: {e}"));
        self.model[offset as usize..][..count as usize].copy_from_slice(&data);
    }

    fn zero(&mut self) {
        let (offset, count) = self.a_range();
        let mut flags = self.fua();
        if self.rng.one_in(2) {
            flags = flags | ReqFlags::MAY_TRIM;
        }
        let fast = self.rng.one_in(6);
        if fast {
            flags = flags | ReqFlags::FAST_ZERO;
        }
        self.note(format!("zero {count}@{offset} {flags:?}"));
        match self.image().zero(offset, count, flags) {
            Ok(()) => self.model[offset as usize..][..count as usize].fill(0),
            Err(e) if fast && e.kind() == ErrorKind::Errno(libc::ENOTSUP) => {
                self.note("  not fast".into());
            }
            Err(e) => panic!("zero: {e}"),
        }
        self.compare_range(offset, count);
    }

    fn trim(&mut self) {
        let (offset, count) = self.a_range();
        let flags = self.fua();
        self.note(format!("trim {count}@{offset} {flags:?}"));
        self.image().trim(offset, count, flags).unwrap();
        let found = read_range(self.image(), offset, count);
        let model = &mut self.model[offset as usize..][..count as usize];
        for (i, (m, f)) in model.iter_mut().zip(&found).enumerate() {
            assert!(
                *f == *m || *f == 0,
                "after a trim byte {} is {f:#x}; it was {m:#x}",
                offset + i as u64
            );
            *m = *f;
        }
    }

    fn compare_range(&mut self, offset: u64, count: u64) {
        let found = read_range(self.image(), offset, count);
        let model = &self.model[offset as usize..][..count as usize];
        assert_same(&found, model, offset, "read");
    }

    fn check_read(&mut self) {
        let (offset, count) = self.a_range();
        self.note(format!("read {count}@{offset}"));
        if self.rng.one_in(3) {
            let image = self.image.as_ref().unwrap();
            let found = read_scattered(image, &mut self.rng, offset, count);
            let model = &self.model[offset as usize..][..count as usize];
            assert_same(&found, model, offset, "scattered read");
        } else {
            self.compare_range(offset, count);
        }
    }

    fn check_extents(&mut self) {
        let (offset, count) = self.a_range();
        let bite = self.rng.pick(&[1, 2, 7, 100]);
        self.note(format!("extents {count}@{offset} in bites of {bite}"));
        let depth = self.image().info().unwrap().backing_depth;
        for e in all_extents(self.image(), offset, count, bite) {
            let bytes = &self.model[e.offset as usize..][..e.length as usize];
            if e.has(Extent::ZERO) {
                assert!(bytes.iter().all(|b| *b == 0), "not all zeroes, as it says: {e:?}");
                assert!(!e.has(Extent::DATA), "zeroes and data: {e:?}");
            } else {
                assert!(e.has(Extent::DATA), "neither zeroes nor data: {e:?}");
            }
            assert!(e.depth <= depth, "deeper than the chain: {e:?}");
            assert!(e.depth == 0 || !e.has(Extent::ALLOCATED), "allocated below: {e:?}");
        }
    }

    fn resize(&mut self) {
        let old = self.model.len() as u64;
        let cluster = 1u64 << self.setup.cluster_bits;
        let new = match self.rng.below(6) {
            0 => old + self.rng.below(3 * cluster),
            1 => old.saturating_sub(self.rng.below(3 * cluster)).max(1),
            2 => self.rng.range(1, self.setup.max_size()),
            3 => old / cluster * cluster,
            4 => old + 1,
            _ => old.next_multiple_of(cluster) + cluster * self.rng.below(30),
        }
        .clamp(1, self.setup.max_size());
        let how = match self.setup.format {
            "qcow2" => self.rng.pick(&["", "", "", "off", "metadata", "falloc", "full"]),
            _ => self.rng.pick(&["", "", "off", "falloc", "full"]),
        };
        let opts = if how.is_empty() { Options::new() } else { options(&[("preallocation", how)]) };
        self.note(format!("resize {old} to {new}, preallocation {how:?}"));
        if new < old {
            let e = self.image().resize(new, &Options::new(), false).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
        }
        match self.image().resize(new, &opts, true) {
            Ok(()) => self.model.resize(new as usize, 0),
            Err(e) if e.kind() == ErrorKind::Unsupported && !self.snapshots.is_empty() => {
                self.note("  not with snapshots".into());
            }
            Err(e) => panic!("resize: {e}"),
        }
        assert_eq!(self.image().size().unwrap(), self.model.len() as u64);
        let from = old.min(new).saturating_sub(4096);
        self.compare_range(from, self.model.len() as u64 - from);
    }

    fn reopen(&mut self) {
        self.note("reopen".into());
        // A context that stays open meanwhile must see the same afterwards.
        let other = self.image().context(&Options::new(), RO).unwrap();
        self.image().reopen(None, self.setup.flags()).unwrap();
        let (offset, count) = self.a_range();
        let found = read_range(&other, offset, count);
        let model = &self.model[offset as usize..][..count as usize];
        assert_same(&found, model, offset, "read by a context after reopening");
        other.close().unwrap();
    }

    fn other_context(&mut self) {
        let (offset, count) = self.a_range();
        self.note(format!("by another context: write {count}@{offset}"));
        let data = self.rng.bytes(count as usize);
        let writing = self.image().context(&Options::new(), RW).unwrap();
        let reading = self.image().context(&Options::new(), RO).unwrap();
        writing.write_at(&data, offset, NONE).unwrap();
        if self.rng.one_in(2) {
            writing.close().unwrap();
        }
        self.model[offset as usize..][..count as usize].copy_from_slice(&data);
        let found = read_range(&reading, offset, count);
        assert_same(&found, &data, offset, "read by a third context");
        let e = reading.write_at(&data[..data.len().min(1)], offset, NONE);
        if count > 0 {
            assert_eq!(e.unwrap_err().kind(), ErrorKind::Errno(libc::EROFS));
        }
    }

    /// What leaves the device touches nothing.
    fn refused(&mut self) {
        let size = self.model.len() as u64;
        let (offset, count) =
            self.rng.pick(&[(size, 1), (size - 1, 2), (size + 1, 0), (u64::MAX, 1), (0, size + 1)]);
        self.note(format!("refused: {count}@{offset}"));
        let data = vec![0xab; count as usize];
        let mut room = data.clone();
        let image = self.image();
        let errors = [
            image.write_at(&data, offset, NONE),
            image.read_at(&mut room, offset),
            image.zero(offset, count, NONE),
            image.trim(offset, count, NONE),
        ];
        for e in errors {
            assert_eq!(e.unwrap_err().kind(), ErrorKind::Errno(libc::EINVAL));
        }
        image.write_at(&[], size, NONE).unwrap();
        image.zero(size, 0, ReqFlags::MAY_TRIM).unwrap();
        image.trim(size, 0, NONE).unwrap();
        self.compare_range(size.saturating_sub(4096), size.min(4096));
    }

    fn cache_hint(&mut self) {
        let (offset, count) = self.a_range();
        self.note(format!("cache {count}@{offset}"));
        self.image().cache(offset, count).unwrap();
    }

    /// Close, and let qemu-img say whether all is well.
    fn judge(&mut self) {
        self.note("check".into());
        let size = self.model.len() as u64;
        self.compare_range(0, size);
        self.close();
        if self.setup.format == "qcow2" {
            check_clean(&self.path);
            if self.setup.data == Data::Raw {
                // QEMU makes it some whole clusters long.
                let mut data = std::fs::read(data_file(&self.path)).unwrap();
                assert!(self.setup.by_qemu || data.len() == self.model.len());
                data.truncate(self.model.len());
                assert_same(&data, &self.model, 0, "the raw data file");
            }
        } else {
            assert_eq!(std::fs::metadata(&self.path).unwrap().len(), size);
        }
        // QEMU sees whole sectors of a qcow2 image only.
        let seen = if self.setup.format == "qcow2" { size - size % 512 } else { size };
        let scratch = self.dir.join("model");
        check_same(&self.path, self.setup.format, &self.model[..seen as usize], &scratch);
        self.read_only();
        self.open();
        self.compare_range(0, size);
    }

    /// An image that is only read may remember more: asked again, it must say the same.
    fn read_only(&mut self) {
        let image = open_with(&self.path, &self.options(), RO);
        for _ in 0..30 {
            let (offset, count) = self.a_range();
            let found = read_range(&image, offset, count);
            let model = &self.model[offset as usize..][..count as usize];
            assert_same(&found, model, offset, "read-only");
        }
        for _ in 0..2 {
            assert_same(&read_all(&image), &self.model, 0, "read-only, all");
            for e in all_extents(&image, 0, self.model.len() as u64, 20) {
                let bytes = &self.model[e.offset as usize..][..e.length as usize];
                let zero = bytes.iter().all(|b| *b == 0);
                assert!(zero || !e.has(Extent::ZERO), "not all zeroes, as it says: {e:?}");
            }
        }
        image.close().unwrap();
    }

    /// What is in the file at this moment is what a killed process leaves behind.
    fn crash_copy(&self) -> PathBuf {
        let copy = self.dir.join("crashed");
        std::fs::copy(&self.path, &copy).unwrap();
        if self.setup.data != Data::InImage {
            let data = data_file(&copy);
            std::fs::copy(data_file(&self.path), &data).unwrap();
            check_no_corruption_with(&copy, &data);
        } else if self.setup.format == "qcow2" {
            check_no_corruption(&copy);
        }
        copy
    }

    /// What [`Self::crash_copy`] has made.
    fn open_crashed(&self, copy: &std::path::Path) -> Image {
        let mut opts = self.options();
        if self.setup.data != Data::InImage {
            opts.set("data-file", Some(data_file(copy).as_os_str().as_encoded_bytes()));
        }
        open_with(copy, &opts, RO)
    }

    fn crash(&mut self) {
        let flush = self.rng.one_in(2);
        self.note(format!("crash, flush={flush}"));
        if flush {
            self.image().flush().unwrap();
        }
        let copy = self.crash_copy();
        if flush {
            let image = self.open_crashed(&copy);
            assert_same(&read_all(&image), &self.model, 0, "flushed, then crashed");
        }
    }

    /// A write with FUA is on disk, and so is the way to it.
    fn write_fua_and_crash(&mut self) {
        let (offset, count) = self.a_range();
        self.note(format!("write {count}@{offset} twice, the second part of it with FUA, crash"));
        let data = self.rng.bytes(count as usize);
        // The first one may allocate, which the second must then make durable.
        self.image().write_at(&data, offset, NONE).unwrap();
        self.model[offset as usize..][..count as usize].copy_from_slice(&data);
        let (from, n) = (offset + count / 3, count - count / 3);
        let data = self.rng.bytes(n as usize);
        self.image().write_at(&data, from, ReqFlags::FUA).unwrap();
        self.model[from as usize..][..n as usize].copy_from_slice(&data);
        let copy = self.crash_copy();
        let image = self.open_crashed(&copy);
        assert_same(&read_range(&image, from, n), &data, from, "written with FUA, then crashed");
    }

    /// QEMU writes meanwhile.
    fn by_qemu(&mut self) {
        self.close();
        let sectors = self.model.len() as u64 / 512;
        let count = self.rng.range(1, 200).min(sectors) * 512;
        let offset = self.rng.below(sectors - count / 512 + 1) * 512;
        let byte = self.rng.range(1, 256) as u8;
        // Where QEMU sees the end too early it zeroes what lies behind that.
        let whole = self.model.len().is_multiple_of(512);
        let (command, byte) = match self.rng.below(3) * u64::from(whole) {
            1 => (format!("write -z {offset} {count}"), 0),
            2 => (format!("write -zu {offset} {count}"), 0),
            _ => (format!("write -P {byte} {offset} {count}"), byte),
        };
        self.note(format!("qemu-io {command}"));
        if count > 0 {
            qemu_io(&self.path, self.setup.format, &[&command]);
            self.model[offset as usize..][..count as usize].fill(byte);
        }
        self.open();
        self.compare_range(0, self.model.len() as u64);
    }

    fn snapshot(&mut self) {
        let s = &self.setup;
        let can = s.format == "qcow2" && s.data == Data::InImage && s.refcount_bits >= 4;
        if !can || self.snapshots.len() >= 2 {
            return;
        }
        let name = format!("s{}", self.snapshots.len());
        self.note(format!("snapshot {name}"));
        self.close();
        qemu_img!("snapshot", "-c", name, self.path);
        let whole = self.model.len() / 512 * 512;
        self.snapshots.push((name, self.model[..whole].to_vec()));
        self.open();
    }

    /// What was written since is no part of a snapshot.
    fn judge_snapshots(&mut self) {
        self.close();
        for (name, bytes) in &self.snapshots {
            let out = self.dir.join("snapshot.raw");
            qemu_img!("convert", "-f", "qcow2", "-l", name, "-O", "raw", self.path, out);
            // QEMU gives it the size that the image has now.
            let found = std::fs::read(&out).unwrap();
            let both = found.len().min(bytes.len());
            assert_same(&found[..both], &bytes[..both], 0, &format!("snapshot {name}"));
        }
    }
}
