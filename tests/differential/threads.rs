//! Several threads on one image, each on bytes of its own that lie between those of the others, so
//! that they share clusters and tables.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Instant;

use super::common::*;
use qblk::{Extent, Image, OpenFlags, Options, ReqFlags};

const THREADS: u64 = 4;

/// Which bytes a thread owns: every fourth stripe.
#[derive(Clone, Copy)]
struct Stripes {
    thread: u64,
    stripe: u64,
    size: u64,
}

impl Stripes {
    fn count(&self) -> u64 {
        self.size / self.stripe / THREADS
    }

    fn offset(&self, n: u64) -> u64 {
        (n * THREADS + self.thread) * self.stripe
    }
}

#[test]
fn threads_that_share_clusters_each_find_what_they_wrote() {
    let mut rng = Rng::new(seed("threads"));
    let end = deadline(45);
    let mut rounds = 0;
    while rounds == 0 || Instant::now() < end {
        round(&mut rng);
        rounds += 1;
    }
    eprintln!("threads: {rounds} rounds");
}

fn round(rng: &mut Rng) {
    let dir = Tmp::in_memory("threads");
    let (path, base) = (dir.join("top"), dir.join("base"));
    let cluster_bits = rng.pick(&[9, 12, 14, 16, 16, 18, 21]);
    let v3 = !rng.one_in(4);
    let extended = v3 && cluster_bits >= 14 && rng.one_in(2);
    let data = if v3 { rng.below(4) } else { 9 };
    let stripe = 4096 << rng.below(5);
    let size = stripe * THREADS * (8 << 20 >> 12) / (stripe >> 12) / THREADS;
    let cluster = (1u64 << cluster_bits).to_string();
    let mut pairs =
        vec![("cluster-size", &cluster[..]), ("compat", if v3 { "1.1" } else { "0.10" })];
    if extended {
        pairs.push(("extended-l2", "on"));
    }
    let data_file = dir.join("data").to_str().unwrap().to_owned();
    if data < 2 {
        pairs.push(("data-file", &data_file));
    }
    if data == 0 {
        pairs.push(("data-file-raw", "on"));
    }
    let mut model = vec![0; size as usize];
    if data != 0 && rng.one_in(2) {
        let data = rng.bytes(size as usize * 3 / 4);
        model[..data.len()].copy_from_slice(&data);
        std::fs::write(&base, &data).unwrap();
        pairs.extend([("backing-file", "base"), ("backing-fmt", "raw")]);
    }
    let l2_cache = rng.pick(&["1", "1", "64k", "16M"]);
    let resizes = rng.one_in(2);
    let seed = rng.next();
    let what = format!("{pairs:?} stripe {stripe} l2 {l2_cache} resizes {resizes} seed {seed}");
    eprintln!("threads: {what}");
    create(&path, "qcow2", size, &pairs);
    let image = open_with(&path, &options(&[("cache.l2-size", l2_cache)]), RW);

    let ops = if cluster_bits >= 18 { 150 } else { 600 };
    let busy = AtomicBool::new(true);
    let models: Vec<Vec<u8>> = std::thread::scope(|s| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let mine = Stripes { thread, stripe, size };
                let (image, model) = (&image, model.clone());
                s.spawn(move || work(image, Rng::new(seed ^ thread), mine, model, ops))
            })
            .collect();
        let helpers = [
            s.spawn(|| {
                while busy.load(SeqCst) {
                    image.flush().unwrap();
                }
            }),
            s.spawn(|| {
                while busy.load(SeqCst) {
                    all_extents(&image, 0, size, 64);
                    read_range(&image, 0, size);
                }
            }),
            s.spawn(|| {
                // Past what the workers own the image grows and shrinks.
                let mut rng = Rng::new(seed ^ 99);
                while resizes && busy.load(SeqCst) {
                    let new = size + rng.below(4 << 20);
                    image.resize(new, &Options::new(), true).unwrap();
                    if new > size {
                        image.write_at(&[7], new - 1, NONE).unwrap();
                    }
                }
            }),
        ];
        // The helpers must end whatever becomes of the workers.
        let done: Vec<_> = workers.into_iter().map(|w| w.join()).collect();
        busy.store(false, SeqCst);
        for h in helpers {
            h.join().unwrap_or_else(|_| panic!("a helper failed: {what}"));
        }
        done.into_iter().map(|d| d.unwrap_or_else(|_| panic!("a worker failed: {what}"))).collect()
    });
    image.resize(size, &Options::new(), true).unwrap();
    for (thread, theirs) in models.iter().enumerate() {
        let mine = Stripes { thread: thread as u64, stripe, size };
        for n in 0..mine.count() {
            let at = mine.offset(n) as usize;
            model[at..at + stripe as usize].copy_from_slice(&theirs[at..at + stripe as usize]);
        }
    }
    assert_same(&read_all(&image), &model, 0, &what);
    image.close().unwrap();
    check_clean(&path);
    check_same(&path, "qcow2", &model, &dir.join("model"));
    if data == 0 {
        assert_same(&std::fs::read(&data_file).unwrap(), &model, 0, "the raw data file");
    }
}

fn work(image: &Image, mut rng: Rng, mine: Stripes, mut model: Vec<u8>, ops: u64) -> Vec<u8> {
    for _ in 0..ops {
        let n = rng.below(mine.count());
        let (from, count) = match rng.below(3) {
            0 => (0, mine.stripe),
            1 => (512 * rng.below(mine.stripe / 512), 512),
            _ => {
                let from = rng.below(mine.stripe);
                (from, rng.range(1, mine.stripe - from + 1))
            }
        };
        let at = mine.offset(n) + from;
        let bytes = &mut model[at as usize..(at + count) as usize];
        let what = format!("thread {}: {count}@{at}", mine.thread);
        match rng.below(10) {
            0..=4 => {
                let data = rng.bytes(count as usize);
                let fua = if rng.one_in(30) { ReqFlags::FUA } else { NONE };
                image.write_at(&data, at, fua).unwrap_or_else(|e| panic!("write {what}: {e}"));
                bytes.copy_from_slice(&data);
            }
            5 => {
                let flags = if rng.one_in(2) { ReqFlags::MAY_TRIM } else { NONE };
                image.zero(at, count, flags).unwrap_or_else(|e| panic!("zero {what}: {e}"));
                bytes.fill(0);
            }
            6 => {
                image.trim(at, count, NONE).unwrap_or_else(|e| panic!("trim {what}: {e}"));
                let found = read_range(image, at, count);
                for (m, f) in bytes.iter_mut().zip(&found) {
                    assert!(*f == *m || *f == 0, "trim {what}: byte is {f:#x}, was {m:#x}");
                    *m = *f;
                }
            }
            7 => {
                let mut some = [Extent::default(); 4];
                image.extents(at, count, &mut some).unwrap();
            }
            _ => assert_same(&read_range(image, at, count), bytes, at, &format!("read {what}")),
        }
    }
    model
}

/// What byte `offset` may be: zero, or a tag that tells its place, with two bits that tell versions
/// apart. Whoever finds the tag of another place has read or written the wrong cluster.
fn tag(offset: u64) -> u8 {
    let block = (offset >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58;
    (block as u8) << 2 | 3
}

fn tagged(offset: u64, count: u64, version: u8) -> Vec<u8> {
    (offset..offset + count)
        .map(|o| tag(o) & (0xfc | version) | u8::from(version == 0) << 1)
        .collect()
}

fn check_tags(found: &[u8], offset: u64, what: &str) {
    for (i, byte) in found.iter().enumerate() {
        let at = offset + i as u64;
        let fine = *byte == 0 || *byte & 0xfc == tag(at) & 0xfc;
        assert!(fine, "{what}: found {byte:#x} at {at}, which is of another place");
    }
}

#[test]
fn threads_that_write_over_one_another_never_meet_bytes_of_another_place() {
    let mut rng = Rng::new(seed("racing"));
    let end = deadline(40);
    let mut rounds = 0;
    while rounds == 0 || Instant::now() < end {
        race(&mut rng);
        rounds += 1;
    }
    eprintln!("racing: {rounds} rounds");
}

fn race(rng: &mut Rng) {
    let dir = Tmp::in_memory("racing");
    let (path, base) = (dir.join("top"), dir.join("base"));
    let size = 1u64 << 20;
    let cluster = rng.pick(&["512", "512", "4096", "65536"]);
    let compat = rng.pick(&["0.10", "1.1", "1.1"]);
    let mut pairs = vec![("cluster-size", cluster), ("compat", compat)];
    if rng.one_in(2) {
        std::fs::write(&base, tagged(0, size / 2, 0)).unwrap();
        pairs.extend([("backing-file", "base"), ("backing-fmt", "raw")]);
    }
    let seed = rng.next();
    let what = format!("{pairs:?} seed {seed}");
    create(&path, "qcow2", size, &pairs);
    if rng.one_in(3) {
        // Compressed and shared clusters are given up piece by piece.
        let unit = if cluster == "65536" { 65536 } else { 4096 };
        std::fs::write(dir.join("flat"), tagged(0, size, 0)).unwrap();
        let opts = format!("cluster_size={unit}");
        qemu_img!("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", opts, dir.join("flat"), path);
        if rng.one_in(2) {
            qemu_img!("snapshot", "-c", "s", path);
        }
    }
    let image = open_with(&path, &options(&[("cache.l2-size", "1")]), RW | OpenFlags::NO_LOCK);
    let busy = AtomicBool::new(true);
    std::thread::scope(|s| {
        let workers: Vec<_> = (0..3)
            .map(|thread| {
                let image = &image;
                s.spawn(move || rush(image, Rng::new(seed ^ thread), size))
            })
            .collect();
        for _ in 0..2 {
            s.spawn(|| {
                while busy.load(SeqCst) {
                    check_tags(&read_range(&image, 0, size), 0, "read");
                }
            });
        }
        s.spawn(|| {
            while busy.load(SeqCst) {
                image.flush().unwrap();
            }
        });
        let done: Vec<_> = workers.into_iter().map(|w| w.join()).collect();
        busy.store(false, SeqCst);
        for d in done {
            d.unwrap_or_else(|_| panic!("a worker failed: {what}"));
        }
    });
    let last = read_all(&image);
    check_tags(&last, 0, &what);
    image.close().unwrap();
    check_clean(&path);
    check_same(&path, "qcow2", &last, &dir.join("model"));
}

fn rush(image: &Image, mut rng: Rng, size: u64) {
    for _ in 0..1500 {
        let count = rng.pick(&[100, 512, 4096, 5000, 65536]);
        // Few places, so that they meet.
        let at = rng.below(16) * 65536 + rng.below(2) * 512 * rng.below(100);
        let count = count.min(size - at);
        match rng.below(9) {
            0..=3 => {
                let data = tagged(at, count, rng.below(3) as u8 + 1);
                image.write_at(&data, at, NONE).unwrap();
            }
            4 => image.zero(at, count, NONE).unwrap(),
            5 => image.zero(at, count, ReqFlags::MAY_TRIM).unwrap(),
            6 => image.trim(at, count, NONE).unwrap(),
            _ => check_tags(&read_range(image, at, count), at, "read by a worker"),
        }
    }
}
