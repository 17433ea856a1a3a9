//! Random work on an image with snapshots, by this library and by QEMU in turn, against plain arrays of
//! bytes.

use std::path::PathBuf;
use std::time::Instant;

use super::*;

/// A snapshot as it should be.
struct Kept {
    name: String,
    disk: Vec<u8>,
    state: Vec<u8>,
}

struct Round {
    rng: Rng,
    dir: Tmp,
    path: PathBuf,
    image: Option<Image>,
    cluster: u64,
    v3: bool,
    disk: Vec<u8>,
    /// What was written to the state area since the last snapshot was made or applied.
    state: Vec<u8>,
    kept: Vec<Kept>,
    /// Most that refcounts can count.
    most: usize,
    /// Enough for host clusters that compressed ones share.
    wide: bool,
    made: u32,
    log: Vec<String>,
    seed: u64,
}

impl Drop for Round {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("round with seed {}", self.seed);
            let skip = self.log.len().saturating_sub(40);
            self.log[skip..].iter().for_each(|line| eprintln!("  {line}"));
        }
    }
}

#[test]
fn an_image_and_its_snapshots_hold_what_plain_arrays_would() {
    watch_log();
    let mut rounds = Rng::new(seed("snapshots"));
    let end = deadline(20);
    let mut n = 0;
    while n == 0 || Instant::now() < end {
        // One round again: as it was told when it failed.
        let again = std::env::var("QBLK_TEST_ROUND").ok().map(|s| s.parse().unwrap());
        let seed = again.unwrap_or_else(|| rounds.next());
        let mut round = Round::new(seed);
        for _ in 0..60 {
            round.step();
        }
        round.judge();
        assert_nothing_logged();
        n += 1;
    }
    eprintln!("snapshots: {n} rounds");
}

impl Round {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let dir = Tmp::in_memory("snap-model");
        let path = dir.join("image");
        let v3 = !rng.one_in(4);
        let bits = rng.pick(&[9, 9, 10, 12, 14, 16]);
        let cluster = 1u64 << bits;
        let width = if v3 { rng.pick(&[2, 4, 8, 16, 16, 32, 64]) } else { 16 };
        let size = rng.range(1, if bits < 12 { 1 << 20 } else { 6 << 20 }).next_multiple_of(512);
        let (size_text, bits_text) = (cluster.to_string(), width.to_string());
        let mut opts =
            vec![("cluster-size", &size_text[..]), ("compat", if v3 { "1.1" } else { "0.10" })];
        if v3 {
            opts.push(("refcount-bits", &bits_text));
            opts.push(("extended-l2", if bits >= 14 && rng.one_in(2) { "on" } else { "off" }));
        }
        let mut disk = vec![0; size as usize];
        if rng.one_in(3) {
            let base = rng.bytes(rng.clone().range(1, 2 * size).next_multiple_of(512) as usize);
            std::fs::write(dir.join("base"), &base).unwrap();
            opts.extend([("backing-file", "base"), ("backing-fmt", "raw")]);
            let n = base.len().min(disk.len());
            disk[..n].copy_from_slice(&base[..n]);
        }
        create(&path, "qcow2", size, &opts);
        let log = vec![format!("{size} bytes, {opts:?}")];
        let most = if width == 2 { 2 } else { 6 };
        let image = Some(open(&path, RW));
        let (state, kept) = (Vec::new(), Vec::new());
        let (wide, made) = (width >= 16, 0);
        Self { rng, dir, path, image, cluster, v3, disk, state, kept, most, wide, made, log, seed }
    }

    fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    fn note(&mut self, what: String) {
        self.log.push(what);
    }

    fn a_range(&mut self) -> (u64, u64) {
        let size = self.disk.len() as u64;
        let count = match self.rng.below(4) {
            0 => self.cluster,
            1 => self.rng.range(1, 4 * self.cluster),
            2 => self.rng.range(1, 40 * self.cluster),
            _ => self.rng.range(1, 5000),
        }
        .min(size);
        let at = self.rng.below(size - count + 1);
        (if self.rng.one_in(2) { at / self.cluster * self.cluster } else { at }, count)
    }

    fn step(&mut self) {
        match self.rng.below(20) {
            0..=4 => self.write(),
            5 => self.pack(),
            6 | 7 => self.zero(),
            8 => {
                self.note("flush".into());
                self.image().flush().unwrap();
            }
            9 | 10 => self.write_state(),
            11..=13 => self.create(),
            14 => self.apply(),
            15 => self.delete(),
            16 => self.resize(),
            17 => self.crash(),
            18 => self.by_qemu(),
            _ => self.judge(),
        }
    }

    fn write(&mut self) {
        let (at, n) = self.a_range();
        self.note(format!("write {n}@{at}"));
        let data = self.rng.bytes(n as usize);
        self.image().write_at(&data, at, NONE).unwrap();
        self.disk[at as usize..][..n as usize].copy_from_slice(&data);
    }

    /// Compressed clusters share host clusters, with those of snapshots too.
    fn pack(&mut self) {
        if !self.wide {
            return;
        }
        let clusters = (self.disk.len() as u64).div_ceil(self.cluster);
        let first = self.rng.below(clusters);
        let to = (first + self.rng.range(1, 9)).min(clusters) * self.cluster;
        let at = first * self.cluster;
        let n = to.min(self.disk.len() as u64) - at;
        self.note(format!("write compressed {n}@{at}"));
        let byte = self.rng.next() as u8;
        let data: Vec<u8> = (0..n).map(|i| byte.wrapping_add((i / 60) as u8)).collect();
        self.image().write_compressed(OneIov::src(&data).iov(), at).unwrap();
        self.disk[at as usize..][..n as usize].copy_from_slice(&data);
    }

    fn zero(&mut self) {
        let (at, n) = self.a_range();
        let flags = self.rng.pick(&[NONE, qblk::ReqFlags::MAY_TRIM]);
        self.note(format!("zero {n}@{at} {flags:?}"));
        self.image().zero(at, n, flags).unwrap();
        self.disk[at as usize..][..n as usize].fill(0);
    }

    fn write_state(&mut self) {
        let n = self.rng.range(1, 30 * self.cluster) as usize;
        let at = self.rng.below(self.state.len() as u64 + self.cluster) as usize;
        self.note(format!("state: write {n}@{at}"));
        let data = self.rng.bytes(n);
        super::write_state(self.image(), &data, at as u64);
        // What was there before the last snapshot may show between; it is nobody's.
        let from = self.state.len();
        if at > from {
            let between = read_state(self.image(), from as u64, at - from);
            self.state.extend(between);
        }
        if self.state.len() < at + n {
            self.state.resize(at + n, 0);
        }
        self.state[at..at + n].copy_from_slice(&data);
        let found = read_state(self.image(), 0, self.state.len());
        assert_same(&found, &self.state, 0, "state");
    }

    fn create(&mut self) {
        if self.kept.len() >= self.most {
            return;
        }
        self.made += 1;
        let name = format!("s{}", self.made);
        let mut state = std::mem::take(&mut self.state);
        let by_qemu = state.is_empty() && self.rng.one_in(3);
        self.note(format!("create {name}, by QEMU: {by_qemu}"));
        if by_qemu {
            self.outside(|path| drop(qemu_img!("snapshot", "-c", name, path)));
        } else {
            create_snapshot(self.image(), &name);
        }
        state.shrink_to_fit();
        self.kept.push(Kept { name, disk: self.disk.clone(), state });
    }

    /// Closed meanwhile; the state that was written and is in no snapshot goes on to be there, but not
    /// to be known.
    fn outside(&mut self, work: impl FnOnce(&Path)) {
        self.image.take().unwrap().close().unwrap();
        check_clean(&self.path);
        work(&self.path);
        check_clean(&self.path);
        self.image = Some(open(&self.path, RW));
        self.state.clear();
    }

    fn apply(&mut self) {
        if self.kept.is_empty() {
            return;
        }
        let i = self.rng.below(self.kept.len() as u64) as usize;
        let name = self.kept[i].name.clone();
        // Where the size changes QEMU leaks a state that is in the active image; and it counts up
        // before it counts down.
        let same = self.kept[i].disk.len() == self.disk.len() && self.most > 2;
        let by_qemu = same && self.rng.one_in(2);
        self.note(format!("apply {name}, by QEMU: {by_qemu}"));
        if by_qemu {
            self.outside(|path| drop(qemu_img!("snapshot", "-a", name, path)));
        } else {
            self.image().snapshot_apply(name.as_bytes()).unwrap();
        }
        self.disk = self.kept[i].disk.clone();
        self.state.clear();
        let state = read_state(self.image(), 0, self.kept[i].state.len());
        assert_same(&state, &self.kept[i].state, 0, "state after applying");
        assert_eq!(self.image().size().unwrap(), self.disk.len() as u64);
        assert_same(&read_all(self.image()), &self.disk, 0, "after applying");
    }

    fn delete(&mut self) {
        if self.kept.is_empty() {
            return;
        }
        let gone = self.kept.remove(self.rng.clone().below(self.kept.len() as u64) as usize);
        let by_qemu = self.rng.one_in(3);
        self.note(format!("delete {}, by QEMU: {by_qemu}", gone.name));
        if by_qemu {
            self.outside(|path| drop(qemu_img!("snapshot", "-d", gone.name, path)));
        } else {
            self.image().snapshot_delete(gone.name.as_bytes()).unwrap();
        }
    }

    fn resize(&mut self) {
        let most = if self.cluster < 4096 { 1 << 20 } else { 6 << 20 };
        let size = self.rng.range(1, most).next_multiple_of(512);
        self.note(format!("resize {} to {size}", self.disk.len()));
        match self.image().resize(size, &Options::new(), true) {
            Ok(()) => self.disk.resize(size as usize, 0),
            Err(e) => assert!(!self.v3 && !self.kept.is_empty(), "{e}"),
        }
        if self.v3 || self.kept.is_empty() {
            self.state.clear();
        }
        assert_same(&read_all(self.image()), &self.disk, 0, "after resizing");
    }

    fn crash(&mut self) {
        self.note("crash".into());
        self.image().flush().unwrap();
        let copy = self.dir.join("crashed");
        std::fs::copy(&self.path, &copy).unwrap();
        check_no_corruption(&copy);
        let image = open(&copy, RO);
        assert_same(&read_all(&image), &self.disk, 0, "flushed, then crashed");
    }

    fn by_qemu(&mut self) {
        let sectors = self.disk.len() as u64 / 512;
        let n = self.rng.range(1, 400).min(sectors);
        let at = self.rng.below(sectors - n + 1) * 512;
        let n = n * 512;
        let (what, byte) = match self.rng.below(3) {
            0 => (format!("write -z {at} {n}"), 0),
            1 => (format!("write -zu {at} {n}"), 0),
            _ => (format!("write -P 0xa5 {at} {n}"), 0xa5),
        };
        self.note(format!("qemu-io {what}"));
        self.outside(|path| drop(qemu_io(path, "qcow2", &[&what])));
        self.disk[at as usize..][..n as usize].fill(byte);
    }

    fn judge(&mut self) {
        self.note("judge".into());
        assert_same(&read_all(self.image()), &self.disk, 0, "all");
        let (disk, scratch) = (self.disk.clone(), self.dir.join("model"));
        self.outside(|path| check_same(path, "qcow2", &disk, &scratch));
        self.image.take().unwrap().close().unwrap();
        for kept in &self.kept {
            let image = open_with(&self.path, &options(&[("snapshot", &kept.name)]), RO);
            assert_same(&read_all(&image), &kept.disk, 0, &kept.name);
            let state = read_state(&image, 0, kept.state.len());
            assert_same(&state, &kept.state, 0, &format!("state of {}", kept.name));
            drop(image);
            let out = self.dir.join("snapshot.raw");
            qemu_img!("convert", "-f", "qcow2", "-l", kept.name, "-O", "raw", self.path, out);
            // QEMU gives it the size that the image has now.
            let found = std::fs::read(&out).unwrap();
            let n = found.len().min(kept.disk.len());
            assert_same(&found[..n], &kept.disk[..n], 0, &format!("{} by QEMU", kept.name));
        }
        self.image = Some(open(&self.path, RW));
    }
}
