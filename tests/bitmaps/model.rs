//! Random changes by us and by QEMU in turn, against a model of what is dirty; and many threads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use super::common::*;
use super::peers::*;
use qblk::block::BitmapChange;
use qblk::{Image, ReqFlags};

/// A bitmap as it ought to be.
#[derive(Clone, Debug)]
struct Model {
    granularity: u64,
    enabled: bool,
    bits: Vec<bool>,
}

impl Model {
    fn new(size: u64, granularity: u64, enabled: bool) -> Self {
        Self { granularity, enabled, bits: vec![false; size.div_ceil(granularity) as usize] }
    }

    fn set(&mut self, offset: u64, count: u64) {
        if count > 0 {
            let last = (offset + count - 1) / self.granularity;
            (offset / self.granularity..=last).for_each(|i| self.bits[i as usize] = true);
        }
    }

    fn runs(&self, size: u64) -> Runs {
        let mut runs = Runs::new();
        for i in (0..self.bits.len() as u64).filter(|i| self.bits[*i as usize]) {
            let from = i * self.granularity;
            let to = (from + self.granularity).min(size);
            match runs.last_mut() {
                Some(last) if last.0 + last.1 == from => last.1 = to - last.0,
                _ => runs.push((from, to - from)),
            }
        }
        runs
    }
}

struct Scene {
    rng: Rng,
    size: u64,
    all: BTreeMap<String, Model>,
}

impl Scene {
    fn range(&mut self) -> (u64, u64) {
        let offset = self.rng.below(self.size);
        let most = self.rng.pick(&[1, 600, 70_000, 3 << 20]);
        (offset, (1 + self.rng.below(most)).min(self.size - offset))
    }

    fn note(&mut self, (offset, count): (u64, u64)) {
        self.all.values_mut().filter(|m| m.enabled).for_each(|m| m.set(offset, count));
    }

    fn name(&mut self) -> String {
        let names: Vec<_> = self.all.keys().cloned().collect();
        names[self.rng.below(names.len() as u64) as usize].clone()
    }

    fn ours(&mut self, image: &Image) {
        let range = self.range();
        match self.rng.below(16) {
            0..7 => {
                let data = self.rng.bytes(range.1 as usize);
                image.write_at(&data, range.0, NONE).unwrap();
                self.note(range);
            }
            7 => {
                image.zero(range.0, range.1, ReqFlags::MAY_TRIM).unwrap();
                self.note(range);
            }
            8 => {
                image.trim(range.0, range.1, NONE).unwrap();
                self.note(range);
            }
            9 => image.flush().unwrap(),
            10 => {
                let enabled = !self.rng.one_in(3);
                let granularity = 512 << self.rng.below(12);
                let name = format!("ours-{}", self.rng.below(1000));
                if self.all.len() < 6 && !self.all.contains_key(&name) {
                    add(image, &name, granularity, !enabled);
                    self.all.insert(name, Model::new(self.size, granularity, enabled));
                }
            }
            _ if self.all.is_empty() => {}
            11 => {
                let name = self.name();
                image.change_bitmap(&BitmapChange::Clear(name.as_bytes())).unwrap();
                self.all.get_mut(&name).unwrap().bits.fill(false);
            }
            12 => {
                let name = self.name();
                image.change_bitmap(&BitmapChange::Enable(name.as_bytes())).unwrap();
                self.all.get_mut(&name).unwrap().enabled = true;
            }
            13 => {
                let name = self.name();
                image.change_bitmap(&BitmapChange::Disable(name.as_bytes())).unwrap();
                self.all.get_mut(&name).unwrap().enabled = false;
            }
            14 => {
                let (target, source) = (self.name(), self.name());
                let (t, s) = (target.as_bytes(), source.as_bytes());
                image.change_bitmap(&BitmapChange::Merge { target: t, source: s }).unwrap();
                let runs = self.all[&source].runs(self.size);
                let model = self.all.get_mut(&target).unwrap();
                runs.into_iter().for_each(|(offset, count)| model.set(offset, count));
            }
            _ if self.rng.one_in(2) => {
                let name = self.name();
                image.change_bitmap(&BitmapChange::Remove(name.as_bytes())).unwrap();
                self.all.remove(&name);
            }
            _ => {
                let size = self.rng.range(1, 40 << 20).next_multiple_of(512);
                image.resize(size, &qblk::Options::new(), true).unwrap();
                for m in self.all.values_mut() {
                    m.bits.resize(size.div_ceil(m.granularity) as usize, false);
                }
                self.size = size;
            }
        }
    }

    fn theirs(&mut self, path: &std::path::Path) {
        let (offset, count) = self.range();
        qemu_io(path, "qcow2", &[&format!("write -P 3 {offset} {count}")]);
        self.note((offset, count));
        if self.all.is_empty() || self.rng.one_in(2) {
            let name = format!("theirs-{}", self.rng.below(1000));
            if self.all.len() < 6 && !self.all.contains_key(&name) {
                qemu_img!("bitmap", "--add", "-g", "8192", path, name);
                self.all.insert(name, Model::new(self.size, 8192, true));
            }
        } else {
            let name = self.name();
            qemu_img!("bitmap", "--clear", path, name);
            self.all.get_mut(&name).unwrap().bits.fill(false);
        }
    }
}

#[test]
fn what_is_dirty_is_what_was_changed() {
    watch_log();
    let mut rng = Rng::new(seed("what_is_dirty_is_what_was_changed"));
    let until = deadline(20);
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    while Instant::now() < until {
        let cluster = rng.pick(&["512", "2k", "4k", "64k", "1M"]);
        let size = rng.range(1, 40 << 20).next_multiple_of(512);
        create(&path, "qcow2", size, &[("cluster-size", cluster)]);
        let mut scene = Scene { rng: rng.clone(), size, all: BTreeMap::new() };
        rng.next();
        for _ in 0..3 {
            let image = open(&path, RW);
            for _ in 0..scene.rng.range(1, 40) {
                scene.ours(&image);
                if scene.rng.one_in(4) {
                    for (name, model) in &scene.all {
                        assert_eq!(dirty(&image, name), model.runs(scene.size), "{name}");
                    }
                }
            }
            image.close().unwrap();
            check_clean(&path);
            let list = open(&path, RO).bitmaps().unwrap();
            assert_eq!(list.len(), scene.all.len());
            for b in &list {
                let name = std::str::from_utf8(&b.name).unwrap();
                let model = &scene.all[name];
                assert_eq!(b.dirty, Some(total(&model.runs(scene.size))), "{b:?}");
                assert_eq!((b.enabled, b.granularity), (model.enabled, model.granularity));
            }
            if let Some((name, model)) = scene.all.iter().next() {
                assert_eq!(qemu_dirty(&path, name), model.runs(scene.size), "{name}");
            }
            scene.theirs(&path);
            check_clean(&path);
        }
    }
    assert_nothing_logged();
}

#[test]
fn no_write_escapes_a_bitmap_that_is_changed_meanwhile() {
    // A copy is kept right by what the bitmap says: whatever is written while bitmaps come, are
    // cleared and go, in the end the copy is the disk.
    const SIZE: u64 = 8 << 20;
    let dir = Tmp::in_memory("bitmaps");
    let path = dir.join("image.qcow2");
    create(&path, "qcow2", SIZE, &[("cluster-size", "4k")]);
    let image = open(&path, RW);
    add(&image, "copy", 4096, false);
    let (done, mut copy) = (AtomicBool::new(false), vec![0; SIZE as usize]);
    let update = |copy: &mut Vec<u8>| {
        // What was dirty is taken over to another bitmap, and the first begins anew.
        add(&image, "taken", 512, true);
        image.change_bitmap(&BitmapChange::Disable(b"copy")).unwrap();
        add(&image, "next", 4096, false);
        image.change_bitmap(&BitmapChange::Merge { target: b"taken", source: b"copy" }).unwrap();
        image.change_bitmap(&BitmapChange::Clear(b"copy")).unwrap();
        image.change_bitmap(&BitmapChange::Enable(b"copy")).unwrap();
        image.change_bitmap(&BitmapChange::Merge { target: b"copy", source: b"next" }).unwrap();
        image.change_bitmap(&BitmapChange::Remove(b"next")).unwrap();
        for (offset, len) in dirty(&image, "taken") {
            let part = read_range(&image, offset, len);
            copy[offset as usize..(offset + len) as usize].copy_from_slice(&part);
        }
        image.change_bitmap(&BitmapChange::Remove(b"taken")).unwrap();
    };
    // Between disabling one and adding the next nothing may be lost: so writers hold still then.
    let gate = std::sync::RwLock::new(());
    std::thread::scope(|s| {
        for t in 0..3 {
            let (image, done, gate) = (&image, &done, &gate);
            s.spawn(move || {
                let mut rng = Rng::new(t);
                while !done.load(Relaxed) {
                    let _open = gate.read().unwrap();
                    let offset = rng.below(SIZE - 10_000);
                    let len = 1 + rng.below(10_000) as usize;
                    let data = rng.bytes(len);
                    image.write_at(&data, offset, NONE).unwrap();
                }
            });
        }
        for round in 0..20 {
            if round % 2 == 0 {
                let _shut = gate.write().unwrap();
                update(&mut copy);
            } else {
                // Clearing needs no gate: what a write changed is read now, or dirty afterwards.
                image.change_bitmap(&BitmapChange::Clear(b"copy")).unwrap();
                copy = read_range(&image, 0, SIZE);
            }
        }
        done.store(true, Relaxed);
    });
    update(&mut copy);
    assert_same(&copy, &read_all(&image), 0, "the copy");
    image.close().unwrap();
    check_clean(&path);
}
