//! What opening a file of n bytes may cost, whatever is in it: the bounds that docs/limits.md states.
//!
//! Images that QEMU made are damaged at random in the places that numbers are taken from, sizes above
//! all, and opened in all ways. The program's memory is counted by its allocator, and what is read by
//! the disk.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::disk::Disk;
use common::*;
use qblk::block::{Driver, InFlight, Result};
use qblk::format::{Params, luks, qcow2};

/// Memory: n times this, more to write, and some more for what does not depend on the file.
const MEMORY_TIMES: u64 = 4;
const MEMORY_TIMES_TO_WRITE: u64 = 7;
const MEMORY_MORE: u64 = 1 << 20;
/// Bytes read, in the same way.
const READ_TIMES: u64 = 4;
const READ_MORE: u64 = 64 << 10;

/// Bytes that are allocated, and the most that ever were since it was asked.
static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: the system's allocator does the work; counting touches no memory of its own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller's word.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's word.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A way to open.
#[derive(Clone, Copy, Debug)]
struct How {
    write: bool,
    info_only: bool,
    untrusted: bool,
}

const WAYS: [How; 4] = [
    How { write: false, info_only: false, untrusted: false },
    How { write: true, info_only: false, untrusted: false },
    How { write: false, info_only: true, untrusted: false },
    How { write: true, info_only: false, untrusted: true },
];

fn try_to_open(disk: &Disk, how: How) -> Result<()> {
    let params = Params {
        write: how.write,
        info_only: how.info_only,
        probed: false,
        l2_cache: None,
        untrusted: how.untrusted,
        snapshot: None,
        key: Some(qblk::crypto::Secret::new(b"key".to_vec())),
        calls: Arc::new(InFlight::default()),
    };
    let first = disk.state().content[0].first_chunk::<6>().copied().unwrap_or_default();
    if first == luks::MAGIC {
        let image = luks::Luks::open(disk.device(), params)?;
        drop(image.describe());
        return Ok(());
    }
    let image = qcow2::Qcow2::open(disk.device(), params)?;
    drop(image.describe());
    let _ = image.snapshots();
    Ok(())
}

/// Images of all kinds, small ones.
fn images() -> Vec<(&'static str, Vec<u8>)> {
    let dir = Tmp::in_memory("bounds");
    let path = dir.join("image");
    let secret = "secret,id=s,data=key";
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let mut all = Vec::new();
    for (what, options) in [
        ("plain", "cluster_size=65536"),
        ("small clusters", "cluster_size=512"),
        ("large clusters", "cluster_size=2M"),
        ("version 2", "compat=0.10"),
        ("subclusters", "extended_l2=on"),
        ("encrypted", luks),
    ] {
        qemu_img!("create", "-q", "--object", secret, "-f", "qcow2", "-o", options, &path, "8M");
        if what != "encrypted" {
            qemu_io(&path, "qcow2", &["write 1M 100k"]);
            qemu_img!("snapshot", "-c", "one", &path);
        }
        if what == "plain" {
            qemu_img!("bitmap", "--add", &path, "b");
        }
        all.push((what, std::fs::read(&path).unwrap()));
        std::fs::remove_file(&path).unwrap();
    }
    all.push(("an L1 table and little else", mostly_l1(&all[0].1)));
    qemu_img!(
        "create",
        "-q",
        "--object",
        secret,
        "-f",
        "luks",
        "-o",
        "key-secret=s,iter-time=10",
        &path,
        "1M"
    );
    all.push(("luks", std::fs::read(&path).unwrap()));
    all
}

/// An image with an L1 table that names an L2 table in each entry, so many that what is kept of them has
/// just grown.
fn mostly_l1(plain: &[u8]) -> Vec<u8> {
    let mut content = plain.to_vec();
    content.resize(content.len().next_multiple_of(65536), 0);
    let (at, entries) = (content.len() as u64, (7u64 << 15) + 1);
    content.extend((1..=entries).flat_map(|i| (i << 16 | 1 << 63).to_be_bytes()));
    content[36..40].copy_from_slice(&(entries as u32).to_be_bytes());
    content[40..48].copy_from_slice(&at.to_be_bytes());
    content
}

/// Places of numbers: in the header, in its extensions, and in what it leads to.
fn damage(r: &mut Rng, content: &mut Vec<u8>) {
    let value = match r.below(6) {
        0 => u64::MAX,
        1 => 0,
        2 => 1 << r.below(64),
        3 => (1 << r.below(64)) - 1,
        4 => content.len() as u64 & !511,
        _ => r.next(),
    };
    let at = match r.below(4) {
        // A field of the header.
        0 | 1 => 4 * r.below(28),
        2 => r.below(1024),
        _ => r.below(content.len() as u64),
    } as usize;
    let bytes = value.to_be_bytes();
    let n = if r.one_in(2) { 4 } else { 8 };
    for (to, from) in content.iter_mut().skip(at).zip(&bytes[8 - n..]) {
        *to = *from;
    }
    if r.one_in(16) {
        content.truncate(r.below(content.len() as u64 + 1) as usize);
    }
}

#[test]
fn opening_a_file_costs_memory_and_reading_in_proportion_to_its_size() {
    let seed = seed("bounds");
    let mut r = Rng::new(seed);
    let images = images();
    let (mut tried, mut opened) = (0, 0);
    let until = deadline(20);
    while tried < 400 || std::time::Instant::now() < until {
        let (what, content) = &images[r.below(images.len() as u64) as usize];
        let mut content = content.clone();
        for _ in 0..r.below(4) {
            damage(&mut r, &mut content);
        }
        let n = content.len() as u64;
        let disk = Disk::new([content, Vec::new()]);
        for how in WAYS {
            disk.state().bytes_read = 0;
            let before = NOW.load(Relaxed);
            PEAK.store(before, Relaxed);
            let result = try_to_open(&disk, how);
            let memory = (PEAK.load(Relaxed) - before) as u64;
            let read = disk.state().bytes_read;
            let times = if how.write { MEMORY_TIMES_TO_WRITE } else { MEMORY_TIMES };
            let about = || {
                let head = disk.state().content[0].iter().take(112).copied().collect::<Vec<_>>();
                format!("seed {seed}, {what}, {n} bytes, {how:?}: {result:?}, header {head:02x?}")
            };
            assert!(memory <= times * n + MEMORY_MORE, "{memory} bytes of memory: {}", about());
            assert!(read <= READ_TIMES * n + READ_MORE, "{read} bytes read: {}", about());
            tried += 1;
            opened += u64::from(result.is_ok());
        }
    }
    say(format_args!("{tried} files opened or refused ({opened} opened), seed {seed}"));
    assert!(opened > tried / 20 && opened < tried);
}
