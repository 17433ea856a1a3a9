//! What a guest does to a qcow2 image on a [`Disk`], and what it may count on afterwards.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;

use qblk::block::{
    BitmapChange, Device, ErrorKind, InFlight, NewSnapshot, OneIov, Prealloc, Progress, Repair,
    ReqFlags, Result,
};
use qblk::crypto::Secret;
use qblk::format::{BackingRef, Params, luks, qcow2};

use super::disk::{Disk, Files, SECTOR};
use super::{Rng, run};

/// What the guest does; places are sectors.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    Write(u64, u64, u8, ReqFlags),
    Zero(u64, u64, ReqFlags),
    Trim(u64, u64),
    Flush,
    Resize(u64),
    /// Make an internal snapshot, apply one or delete one; the number says which.
    Snapshot(u64),
    /// Whole clusters, in compressed form.
    Pack(u64, u64, u8),
    Bitmap(Bitmap),
}

/// What is done about dirty bitmaps. There is one from the beginning that is only marked; this is about
/// another, but for the saving of all.
#[derive(Clone, Copy, Debug)]
pub enum Bitmap {
    Save,
    Add,
    Remove,
    Clear,
    Merge,
    Enable,
    Disable,
}

/// What an image is made like, and how often each kind of step is taken.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub v3: bool,
    pub cluster_bits: u32,
    pub refcount_order: u32,
    pub encrypted: bool,
    /// L2 entries with subclusters.
    pub extended: bool,
    /// Data lies in another file; `true`: which is always what the guest sees.
    pub data_file: Option<bool>,
    pub backing: bool,
    /// How often something is done about bitmaps; 0: there are none.
    pub bitmaps: u64,
    /// Refcounts are written late: an image that was not closed is to be repaired first.
    pub lazy: bool,
    /// Largest size, sectors.
    pub sectors: u64,
    /// Largest write, sectors.
    pub most: u64,
    /// write, write with FUA, zero, zero and trim, trim, flush, resize.
    pub weights: [u64; 7],
    /// How often a snapshot is made, applied or deleted, beside those.
    pub snapshots: u64,
    /// How often clusters are written in compressed form, beside those.
    pub pack: u64,
}

/// An image with the defaults of `qemu-img create`, but small, that is written to.
pub const PLAIN: Scenario = Scenario {
    name: "allocating writes",
    v3: true,
    cluster_bits: 12,
    refcount_order: 4,
    encrypted: false,
    extended: false,
    data_file: None,
    backing: false,
    bitmaps: 0,
    lazy: false,
    sectors: 2048,
    most: 64,
    weights: [6, 1, 0, 0, 0, 2, 0],
    snapshots: 0,
    pack: 0,
};

/// The workloads by name.
pub fn scenarios() -> Vec<Scenario> {
    let all = [4, 1, 1, 1, 1, 2, 1];
    vec![
        PLAIN,
        Scenario { name: "copy on write", backing: true, cluster_bits: 13, ..PLAIN },
        Scenario { name: "zero", weights: [3, 1, 3, 3, 0, 2, 0], ..PLAIN },
        Scenario { name: "trim", weights: [3, 1, 0, 1, 4, 2, 0], ..PLAIN },
        Scenario { name: "resize", weights: [3, 1, 0, 0, 0, 2, 3], cluster_bits: 9, ..PLAIN },
        Scenario { name: "everything over a backing file", backing: true, weights: all, ..PLAIN },
        Scenario { name: "version 2", v3: false, backing: true, weights: all, ..PLAIN },
        Scenario {
            name: "refcount growth",
            cluster_bits: 9,
            refcount_order: 6,
            sectors: 12288,
            most: 2048,
            weights: all,
            ..PLAIN
        },
        Scenario { name: "refcounts of 1 bit", refcount_order: 0, weights: all, ..PLAIN },
        Scenario { name: "large clusters", cluster_bits: 16, weights: all, ..PLAIN },
        Scenario { name: "subclusters", extended: true, cluster_bits: 14, weights: all, ..PLAIN },
        Scenario {
            name: "subclusters over a backing file",
            extended: true,
            cluster_bits: 16,
            backing: true,
            weights: all,
            most: 16,
            ..PLAIN
        },
        Scenario { name: "snapshots", weights: all, snapshots: 4, ..PLAIN },
        Scenario {
            name: "snapshots of version 2",
            v3: false,
            backing: true,
            cluster_bits: 9,
            weights: [4, 1, 1, 1, 1, 2, 0],
            snapshots: 4,
            ..PLAIN
        },
        Scenario {
            name: "snapshots with subclusters",
            extended: true,
            cluster_bits: 14,
            backing: true,
            weights: all,
            snapshots: 4,
            ..PLAIN
        },
        Scenario { name: "data file", data_file: Some(false), weights: all, ..PLAIN },
        Scenario {
            name: "data file over a backing file, subclusters",
            data_file: Some(false),
            extended: true,
            cluster_bits: 14,
            backing: true,
            weights: all,
            ..PLAIN
        },
        Scenario { name: "raw data file", data_file: Some(true), weights: all, ..PLAIN },
        Scenario { name: "compressed", pack: 8, ..PLAIN },
        Scenario {
            name: "compressed, with everything else, over a backing file",
            pack: 5,
            backing: true,
            weights: all,
            ..PLAIN
        },
        Scenario {
            name: "compressed, refcounts of 2 bits",
            pack: 8,
            refcount_order: 1,
            weights: all,
            cluster_bits: 10,
            ..PLAIN
        },
        Scenario {
            name: "compressed, with snapshots",
            pack: 5,
            weights: all,
            snapshots: 3,
            ..PLAIN
        },
        Scenario { name: "late refcounts", lazy: true, weights: all, ..PLAIN },
        Scenario {
            name: "late refcounts, with snapshots, over a backing file",
            lazy: true,
            backing: true,
            weights: all,
            snapshots: 3,
            ..PLAIN
        },
        Scenario { name: "encrypted", encrypted: true, weights: all, ..PLAIN },
        Scenario {
            name: "bitmaps over a backing file",
            bitmaps: 4,
            backing: true,
            weights: [4, 1, 1, 1, 1, 2, 0],
            ..PLAIN
        },
        Scenario {
            name: "bitmaps",
            bitmaps: 6,
            cluster_bits: 9,
            weights: [4, 1, 1, 1, 1, 2, 2],
            ..PLAIN
        },
        Scenario {
            name: "bitmaps with snapshots and compressed data",
            bitmaps: 4,
            snapshots: 3,
            pack: 2,
            weights: [4, 1, 1, 1, 1, 2, 2],
            ..PLAIN
        },
    ]
}

impl Scenario {
    /// A walk of `count` steps, the same for the same numbers.
    pub fn steps(&self, r: &mut Rng, count: usize) -> Vec<Step> {
        (0..count).map(|_| self.step(r)).collect()
    }

    fn step(&self, r: &mut Rng) -> Step {
        let from = r.below(self.sectors);
        let most = if r.one_in(8) { self.sectors } else { self.most };
        let to = from + 1 + r.below((self.sectors - from).min(most));
        let value = r.below(255) as u8 + 1;
        if r.below(self.weights.iter().sum::<u64>() + self.pack) < self.pack {
            return Step::Pack(from, to, value);
        }
        if r.below(self.weights.iter().sum::<u64>() + self.bitmaps) < self.bitmaps {
            use Bitmap::*;
            let all = [Save, Save, Add, Add, Remove, Clear, Merge, Enable, Disable];
            return Step::Bitmap(r.pick(&all));
        }
        let mut roll = r.below(self.weights.iter().sum::<u64>() + self.snapshots);
        let kind = self.weights.iter().position(|w| {
            let hit = roll < *w;
            roll = roll.saturating_sub(*w);
            hit
        });
        match kind {
            None => Step::Snapshot(r.next()),
            Some(0) => Step::Write(from, to, value, ReqFlags::NONE),
            Some(1) => Step::Write(from, to, value, ReqFlags::FUA),
            Some(2) => Step::Zero(from, to, ReqFlags::NONE),
            Some(3) => Step::Zero(from, to, ReqFlags::MAY_TRIM),
            Some(4) => Step::Trim(from, to),
            Some(5) => Step::Flush,
            _ => Step::Resize(to),
        }
    }

    /// The size that the image is made with, sectors.
    fn first_size(&self) -> u64 {
        self.sectors / 2
    }

    /// What the image below holds.
    fn below(&self) -> Option<Vec<u8>> {
        self.backing.then(|| (0..self.sectors / 3 * SECTOR).map(below_byte).collect())
    }

    fn geometry(&self) -> qcow2::Geometry {
        qcow2::Geometry {
            v3: self.v3,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            lazy: self.lazy,
            zstd: false,
            encrypt: self.encrypted.then(locking),
            backing: self
                .backing
                .then(|| BackingRef { name: b"below".to_vec(), format: Some(b"raw".to_vec()) }),
            prealloc: Prealloc::Off,
            extended: self.extended,
            data_file: self.data_file.map(|raw| qcow2::DataFile { name: b"data".to_vec(), raw }),
        }
    }

    /// Make the image.
    pub fn create(&self) -> Disk {
        // What is in a data file at first is nobody's.
        let data = if self.data_file == Some(false) { 0xee } else { 0 };
        let len = if self.data_file.is_some() { self.first_size() * SECTOR } else { 0 };
        let disk = Disk::new([Vec::new(), vec![data; len as usize]]);
        qcow2::create(&disk.device(), self.first_size() * SECTOR, &self.geometry()).unwrap();
        if self.bitmaps > 0 {
            let image = self.open(&disk, true).unwrap();
            let add = BitmapChange::Add { name: b"all", granularity: 512, disabled: false };
            image.driver().change_bitmap(&add).unwrap();
            image.driver().close().unwrap();
        }
        disk
    }

    /// Open the image on `disk`, with what is below it.
    pub fn open(&self, disk: &Disk, write: bool) -> Result<Device> {
        self.open_as(disk, write, None)
    }

    /// Open the image, or a snapshot of it.
    fn open_as(&self, disk: &Disk, write: bool, snapshot: Option<Vec<u8>>) -> Result<Device> {
        let params = Params {
            write,
            info_only: false,
            probed: false,
            l2_cache: Some(0),
            untrusted: false,
            snapshot,
            key: self.encrypted.then(key),
            calls: Arc::new(InFlight::default()),
        };
        let mut image = qcow2::Qcow2::open(disk.device(), params)?;
        if self.data_file.is_some() {
            image.attach_data(disk.data());
        }
        if let Some(content) = self.below() {
            image.attach(Disk::new([content, Vec::new()]).device(), true);
        }
        Ok(Device::new(Box::new(image)))
    }

    /// What the guest may count on in a new image.
    pub fn guest(&self) -> Guest {
        let below = self.below().unwrap_or_default();
        let byte = |i: u64| below.get((i * SECTOR) as usize).copied().unwrap_or(0);
        let size = self.first_size();
        Guest {
            sectors: (0..size).map(|i| vec![(byte(i), true)]).collect(),
            below: (0..self.sectors).map(byte).collect(),
            sizes: vec![(size, true)],
            snapshots: Vec::new(),
        }
    }
}

fn below_byte(at: u64) -> u8 {
    (at / SECTOR % 255) as u8 + 1
}

pub fn key() -> Secret {
    Secret::new(b"key".to_vec())
}

fn locking() -> luks::Locking {
    luks::Locking::new(&luks::Names::default(), 1, key()).unwrap()
}

/// What the guest may find: for each sector the values that were written to it since the last flush,
/// and the last one before; and whether the write has ended well, so that it can not be undone.
#[derive(Clone)]
pub struct Guest {
    sectors: Vec<Vec<(u8, bool)>>,
    /// What the image below has.
    below: Vec<u8>,
    /// Sizes of the image, sectors, in the same way.
    sizes: Vec<(u64, bool)>,
    /// Internal snapshots: their names, and what the sectors were.
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Guest {
    fn set(&mut self, from: u64, to: u64, value: u8) {
        let to = to.min(self.sectors.len() as u64);
        for sector in &mut self.sectors[from.min(to) as usize..to as usize] {
            sector.push((value, false));
        }
    }

    /// The last change of these sectors has ended well. `fua`: and is on stable storage.
    fn done(&mut self, from: u64, to: u64, fua: bool) {
        let to = to.min(self.sectors.len() as u64);
        for sector in &mut self.sectors[from.min(to) as usize..to as usize] {
            if let Some(last) = sector.last_mut() {
                last.1 = true;
            }
            if fua {
                settle(sector);
            }
        }
    }

    /// Everything that has ended well is on stable storage.
    pub fn flushed(&mut self) {
        self.sectors.iter_mut().for_each(settle);
        settle(&mut self.sizes);
    }

    /// Everything is about to become what it was in a snapshot.
    fn go_back(&mut self, to: &[u8]) {
        let all = self.sectors.len().max(to.len());
        self.sectors.resize(all, vec![(0, true)]);
        for (i, sector) in self.sectors.iter_mut().enumerate() {
            sector.push((to.get(i).copied().unwrap_or(0), false));
        }
        self.sizes.push((to.len() as u64, false));
    }

    /// What is going on has ended well, and is on stable storage.
    fn all_done(&mut self) {
        self.sectors.iter_mut().filter_map(|s| s.last_mut()).for_each(|s| s.1 = true);
        self.sizes.last_mut().into_iter().for_each(|s| s.1 = true);
        self.flushed();
    }

    fn size(&self) -> u64 {
        self.sizes.last().map_or(0, |s| s.0)
    }

    /// Whether `bytes` are what may be found.
    pub fn judge(&self, bytes: &[u8]) -> std::result::Result<(), String> {
        let size = bytes.len() as u64 / SECTOR;
        if !self.sizes.iter().any(|s| s.0 == size) {
            return Err(format!("size {size}, may be {:?}", self.sizes));
        }
        for (i, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            let Some(may_be) = self.sectors.get(i) else { break };
            if !may_be.iter().any(|m| sector == [m.0; SECTOR as usize]) {
                return Err(format!("sector {i} is {:?}.., may be {may_be:?}", &sector[..4]));
            }
        }
        Ok(())
    }
}

/// Forget what came before the last that is certain.
fn settle<T>(values: &mut Vec<(T, bool)>) {
    let certain = values.iter().rposition(|v| v.1).unwrap_or(0);
    values.drain(..certain);
}

/// Take a step. `guest` says what may be found; `begun` is given it as it is in the middle.
pub fn take(
    image: &Device,
    step: Step,
    guest: &mut Guest,
    begun: &mut dyn FnMut(&Guest),
) -> Result<()> {
    let size = guest.size();
    let range = |from: u64, to: u64| {
        let to = to.min(size);
        (from.min(to), to)
    };
    match step {
        Step::Write(from, to, value, flags) => {
            let (from, to) = range(from, to);
            guest.set(from, to, value);
            begun(guest);
            let data = vec![value; ((to - from) * SECTOR) as usize];
            image.write_slice(&data, from * SECTOR, flags)?;
            guest.done(from, to, flags.has(ReqFlags::FUA));
        }
        Step::Pack(from, to, value) => {
            // The clusters that are touched, as far as there are any.
            let cluster = u64::from(image.driver().describe().cluster_size).max(SECTOR) / SECTOR;
            let (from, to) = range(from - from % cluster, to.next_multiple_of(cluster));
            guest.set(from, to, value);
            begun(guest);
            let data = vec![value; ((to - from) * SECTOR) as usize];
            let data = OneIov::src(&data);
            if from < to {
                image.driver().write_compressed(data.iov(), from * SECTOR)?;
            }
            guest.done(from, to, false);
        }
        Step::Zero(from, to, flags) => {
            let (from, to) = range(from, to);
            guest.set(from, to, 0);
            begun(guest);
            image.zero(from * SECTOR, (to - from) * SECTOR, flags)?;
            guest.done(from, to, false);
        }
        Step::Trim(from, to) => {
            let (from, to) = range(from, to);
            guest.set(from, to, 0);
            begun(guest);
            image.trim(from * SECTOR, (to - from) * SECTOR, ReqFlags::NONE)?;
            // What became zeroes did so by sectors: ask which.
            let mut now = vec![0; ((to - from) * SECTOR) as usize];
            image.read_slice(&mut now, from * SECTOR)?;
            for (i, sector) in now.chunks(SECTOR as usize).enumerate() {
                let at = from + i as u64;
                guest.set(at, at + 1, sector[0]);
            }
            guest.done(from, to, false);
        }
        Step::Flush => {
            begun(guest);
            image.flush()?;
            guest.flushed();
        }
        Step::Snapshot(n) => snapshot(image, n, guest, begun)?,
        Step::Resize(new) => {
            guest.sizes.push((new, false));
            let all = guest.sectors.len() as u64;
            // What is cut off is gone, and zero should it come back; while it goes, what is below it
            // may show.
            for i in new.min(size)..all {
                guest.set(i, i + 1, guest.below[i as usize]);
            }
            guest.set(new.min(size), all, 0);
            guest.sectors.resize((new.max(all)) as usize, vec![(0, true)]);
            begun(guest);
            let done = image.driver().resize(new * SECTOR, Prealloc::Off, true);
            if done.is_err() {
                // Either; what is asked for next stays within both.
                guest.sizes.push((image.size() / SECTOR, false));
                return done;
            }
            guest.sizes.last_mut().into_iter().for_each(|s| s.1 = true);
            guest.done(new.min(size), all, false);
        }
        Step::Bitmap(what) => {
            begun(guest);
            return about_bitmaps(image, what, guest);
        }
    }
    Ok(())
}

/// [`Step::Snapshot`].
fn snapshot(
    image: &Device,
    n: u64,
    guest: &mut Guest,
    begun: &mut dyn FnMut(&Guest),
) -> Result<()> {
    let (driver, count) = (image.driver(), guest.snapshots.len() as u64);
    match n % 3 {
        _ if count == 0 || (n.is_multiple_of(3) && count < 3) => {
            begun(guest);
            let name = format!("s{}", n >> 8);
            driver.snapshot_create(name.as_bytes(), &NewSnapshot::default())?;
            // What failed before may have come to be or not: what it has become stays.
            let now = read_all(image)?.chunks(SECTOR as usize).map(|s| s[0]).collect::<Vec<_>>();
            for (sector, value) in guest.sectors.iter_mut().zip(&now) {
                *sector = vec![(*value, true)];
            }
            guest.flushed();
            guest.snapshots.push((name, now));
        }
        1 => {
            let (name, then) = guest.snapshots[(n / 3 % count) as usize].clone();
            guest.go_back(&then);
            begun(guest);
            let done = driver.snapshot_apply(name.as_bytes());
            if done.is_err() {
                guest.sizes.push((image.size() / SECTOR, false));
                return done;
            }
            guest.all_done();
        }
        _ => {
            let (name, _) = guest.snapshots[(n / 3 % count) as usize].clone();
            begun(guest);
            driver.snapshot_delete(name.as_bytes())?;
            guest.snapshots.retain(|s| s.0 != name);
            guest.flushed();
        }
    }
    Ok(())
}

fn about_bitmaps(image: &Device, what: Bitmap, guest: &mut Guest) -> Result<()> {
    let change = match what {
        Bitmap::Save => {
            image.driver().close()?;
            guest.flushed();
            return Ok(());
        }
        Bitmap::Add => BitmapChange::Add { name: b"some", granularity: 4096, disabled: false },
        Bitmap::Remove => BitmapChange::Remove(b"some"),
        Bitmap::Clear => BitmapChange::Clear(b"some"),
        Bitmap::Merge => BitmapChange::Merge { target: b"some", source: b"all" },
        Bitmap::Enable => BitmapChange::Enable(b"some"),
        Bitmap::Disable => BitmapChange::Disable(b"some"),
    };
    match image.driver().change_bitmap(&change) {
        // It is there already, or not.
        Err(e) if matches!(e.kind(), ErrorKind::Errno(libc::EEXIST | libc::ENOENT)) => Ok(()),
        done => done,
    }
}

/// Everything the guest can read.
pub fn read_all(image: &Device) -> Result<Vec<u8>> {
    let mut bytes = vec![0; image.size() as usize];
    image.read_slice(&mut bytes, 0)?;
    Ok(bytes)
}

/// The image that `content` is must be sound, by qemu-img's judgement too if it is given a place for
/// it, and hold what the guest may count on.
pub fn judge(content: Files, guest: &Guest, scenario: &Scenario, qemu: Option<&Path>) {
    if let Some(path) = qemu {
        fs::write(path, &content[0]).unwrap();
        let data = path.with_extension("data");
        fs::write(&data, &content[1]).unwrap();
        if to_be_repaired(&content, scenario) {
            run("qemu-img", &[&"check", &"-r", &"all", &"-f", &"qcow2", &path]);
        }
        let out = qemu_check(path, scenario, &data);
        // 0 is sound, 3 has leaks only.
        let sound = matches!(out.status.code(), Some(0 | 3));
        let told = |text: &[u8]| String::from_utf8_lossy(text).into_owned();
        assert!(sound, "{}{}", told(&out.stdout), told(&out.stderr));
    }
    let disk = Disk::new(content);
    if to_be_repaired(&disk.state().content, scenario) {
        // It can be read as it is, and is sound once it is repaired.
        let image = scenario.open(&disk, false).unwrap_or_else(|e| panic!("{e}"));
        let bytes = read_all(&image).unwrap_or_else(|e| panic!("{e}"));
        guest.judge(&bytes).unwrap_or_else(|e| panic!("{e}"));
        let done = qcow2::check::run(&disk.device(), Repair::All, Progress::NONE);
        done.unwrap_or_else(|e| panic!("{e}"));
    }
    let found = qcow2::check::run(&disk.device(), Repair::Nothing, Progress::NONE);
    let found = found.unwrap_or_else(|e| panic!("{e}"));
    assert!(found.corruptions == 0 && found.check_errors == 0, "{found:?}");
    let image = scenario.open(&disk, false).unwrap_or_else(|e| panic!("{e}"));
    let bytes = read_all(&image).unwrap_or_else(|e| panic!("{e}"));
    guest.judge(&bytes).unwrap_or_else(|e| panic!("{e}"));
    judge_snapshots(&disk, &image, guest, scenario);
    if scenario.bitmaps > 0 {
        judge_bitmaps(&image, &bytes, scenario);
    }
}

/// Whether the image says that its refcounts may be late.
fn to_be_repaired(content: &Files, scenario: &Scenario) -> bool {
    scenario.lazy && content[0].get(79).is_some_and(|bits| bits & 1 != 0)
}

/// Bitmaps that say of themselves that they can be trusted can be: whatever is not as it was in the
/// beginning is dirty in the one that was there then.
fn judge_bitmaps(image: &Device, bytes: &[u8], scenario: &Scenario) {
    let all = image.driver().bitmaps(true).unwrap_or_else(|e| panic!("{e}"));
    let b = all.iter().find(|b| b.name == b"all").expect("the bitmap is gone");
    if b.inconsistent {
        return;
    }
    let mut dirty = vec![false; bytes.len() / SECTOR as usize];
    let (mut at, mut runs) = (0, Vec::new());
    let context = b"qemu:dirty-bitmap:all";
    image.driver().status(context, 0, bytes.len() as u64, usize::MAX, &mut runs).unwrap();
    for (len, flags) in runs {
        dirty[(at / SECTOR) as usize..((at + len) / SECTOR) as usize].fill(flags == 1);
        at += len;
    }
    let before = scenario.guest();
    for (i, sector) in bytes.chunks(SECTOR as usize).enumerate() {
        let was = before.sectors.get(i).map_or(0, |s| s[0].0);
        assert!(
            dirty[i] || sector == [was; SECTOR as usize],
            "sector {i} has changed, and is clean"
        );
    }
}

/// Snapshots are there, but perhaps one that is just being deleted, and hold what they are to.
fn judge_snapshots(disk: &Disk, image: &Device, guest: &Guest, scenario: &Scenario) {
    let list = image.driver().snapshots().unwrap_or_else(|e| panic!("{e}"));
    let mut found = 0;
    for name in list.into_iter().map(|s| s.name) {
        let Some((_, then)) = guest.snapshots.iter().find(|s| s.0.as_bytes() == name) else {
            continue;
        };
        let shown = scenario.open_as(disk, false, Some(name)).unwrap_or_else(|e| panic!("{e}"));
        let bytes = read_all(&shown).unwrap_or_else(|e| panic!("{e}"));
        let now: Vec<u8> = bytes.chunks(SECTOR as usize).map(|s| s[0]).collect();
        assert!(now == *then, "a snapshot holds {now:?}, and is to hold {then:?}");
        found += 1;
    }
    assert!(found + 1 >= guest.snapshots.len(), "{found} of {} snapshots", guest.snapshots.len());
}

/// Says what was being looked at should that panic.
pub struct About(pub String);

impl Drop for About {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

fn qemu_check(path: &Path, scenario: &Scenario, data: &Path) -> Output {
    if scenario.data_file.is_some() {
        let opts = format!(
            "driver=qcow2,file.driver=file,file.filename={},data-file.driver=file,data-file.filename={}",
            path.display(),
            data.display()
        );
        return run("qemu-img", &[&"check", &"--image-opts", &opts]);
    }
    if !scenario.encrypted {
        return run("qemu-img", &[&"check", &"-f", &"qcow2", &path]);
    }
    let opts = format!(
        "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename={}",
        path.display()
    );
    let secret = "secret,id=s,data=key";
    run("qemu-img", &[&"check", &"--object", &secret, &"--image-opts", &opts])
}
