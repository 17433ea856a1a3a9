//! Ranges as large as the wire allows: what is done to them is done to the byte, and what is told of
//! them is true.

use super::common::*;
use super::scene::{Scene, alone, counts, growth, memory};
use super::wire::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Places to look at: around the ends of a range, and wherever a request might be cut.
fn places(from: u64, to: u64, size: u64) -> Vec<u64> {
    let mut all = vec![0, from, to, from + 64 * MIB, from + 128 * MIB, size - 4096];
    all.extend([from + GIB, from + 2 * GIB, from + 4 * GIB, (from + to) / 2]);
    let mut out: Vec<u64> = all.iter().flat_map(|p| [p.saturating_sub(4096), *p]).collect();
    out.retain(|p| p + 4096 <= size);
    out.iter_mut().for_each(|p| *p &= !4095);
    out.sort_unstable();
    out.dedup();
    out
}

/// Zero `length` bytes at `from` and look whether these and no others are zeroes.
fn zero_and_look(
    scene: &Scene,
    export: &str,
    mode: Mode,
    kind: u16,
    flags: u16,
    from: u64,
    length: u64,
) {
    let mut c = scene.client(export, mode);
    let what = format!("{export}, {mode:?}, command {kind}, flags {flags:#x}: {length}@{from}");
    let looked = places(from, from + length, c.size);
    for at in &looked {
        assert_eq!(c.ask(cmd::WRITE, 0, *at, 4096, &[0xcc; 4096]).error, 0, "{what}");
    }
    let reply = c.ask(kind, flags, from, length, &[]);
    assert_eq!(reply.error, 0, "{what}: {}", reply.text);
    for at in looked {
        let data = c.ask(cmd::READ, 0, at, 4096, &[]).data;
        let is_in = |i: u64| (from..from + length).contains(&(at + i));
        let expected: Vec<u8> = (0..4096).map(|i| if is_in(i) { 0 } else { 0xcc }).collect();
        assert_same(&data, &expected, at, &what);
    }
}

/// D1: where zeroing had to be emulated, elsewhere only the first 64 MiB were zeroed and success was
/// told.
#[test]
fn zeroing_reaches_all_of_a_long_range() {
    alone(|| {
        let shm = Tmp::in_memory("ranges");
        let scene = Scene::with(&[], |s| {
            s.add_image(b"mem", memory("10G"), false);
            // In memory there is no zeroing without a hole: it has to be written.
            let raw = shm.join("raw");
            std::fs::File::create(&raw).unwrap().set_len(10 * GIB).unwrap();
            s.add("raw", &raw, RW);
            // Raw on ext4, as a rule.
            let disk = s.tmp.join("disk");
            std::fs::File::create(&disk).unwrap().set_len(10 * GIB).unwrap();
            s.add("disk", &disk, RW);
            for (name, compat) in [("qcow2", "1.1"), ("old", "0.10")] {
                let path = s.tmp.join(name);
                create(&path, "qcow2", 10 * GIB, &[("compat", compat)]);
                s.add(name, &path, RW);
            }
        });
        for export in ["mem", "raw", "disk", "qcow2"] {
            for mode in MODES {
                zero_and_look(&scene, export, mode, cmd::WRITE_ZEROES, 0, 1000, 128 * MIB + 5);
                zero_and_look(
                    &scene,
                    export,
                    mode,
                    cmd::WRITE_ZEROES,
                    FUA,
                    65_536,
                    4 * GIB - 65_537,
                );
            }
            for (from, length) in [(4097, 5 * GIB + 1), (0, 10 * GIB), (GIB - 1, 8 * GIB)] {
                zero_and_look(&scene, export, Mode::Extended, cmd::WRITE_ZEROES, FUA, from, length);
            }
        }
        // Emulated.
        zero_and_look(&scene, "raw", Mode::Simple, cmd::WRITE_ZEROES, NO_HOLE, 12_345, 200 * MIB);
        zero_and_look(
            &scene,
            "raw",
            Mode::Extended,
            cmd::WRITE_ZEROES,
            NO_HOLE,
            99,
            GIB + 70 * MIB,
        );
        zero_and_look(&scene, "mem", Mode::Structured, cmd::WRITE_ZEROES, NO_HOLE, 7, 130 * MIB);
        zero_and_look(&scene, "old", Mode::Simple, cmd::WRITE_ZEROES, NO_HOLE, 12_345, 200 * MIB);
        // Fast or not at all.
        let mut c = scene.client("raw", Mode::Extended);
        let reply = c.ask(cmd::WRITE_ZEROES, NO_HOLE | FAST_ZERO, 0, 10 * GIB, &[]);
        assert_eq!(reply.error, ENOTSUP);
        // The whole of it: nothing of this takes memory.
        assert_eq!(c.ask(cmd::TRIM, FUA, 0, 10 * GIB, &[]).error, 0);
        drop(c);
        drop(shm);
        let mut c = scene.client("mem", Mode::Extended);
        assert_eq!(c.ask(cmd::TRIM, 0, 0, 10 * GIB, &[]).error, 0);
        drop(c);
        scene.end();
    });
}

/// D5, CVE-2025-47711: one request for the block status of 4 GiB - 1 bytes of a large disk aborted the
/// server.
#[test]
fn block_status_of_anything() {
    alone(|| {
        let scene = Scene::with(&[], |s| {
            s.add_image(b"mem", memory("1T"), false);
            let path = s.tmp.join("qcow2");
            create(&path, "qcow2", 1 << 40, &[]);
            s.add("qcow2", &path, RW);
        });
        const SIZE: u64 = 1 << 40;
        let max = u64::from(u32::MAX);
        for export in ["mem", "qcow2"] {
            let mut w = scene.client(export, Mode::Simple);
            for at in [SIZE / 2, SIZE - 4096, 5 * GIB] {
                assert_eq!(w.ask(cmd::WRITE, 0, at, 4096, &[1; 4096]).error, 0);
            }
            for mode in [Mode::Structured, Mode::Extended] {
                let mut c = scene.client(export, mode);
                let mut ranges =
                    vec![(0, 1), (1, 1), (SIZE - 1, 1), (0, max), (1, max), (max, max)];
                ranges.extend([
                    (SIZE - max, max),
                    (0, max - 1),
                    (SIZE / 2 - 1, max),
                    (4097, 1 << 31),
                ]);
                if mode == Mode::Extended {
                    ranges.extend([(0, 1 << 32), (0, SIZE), (1, SIZE - 1), (7, 1 << 39)]);
                }
                for (offset, length) in ranges {
                    for flags in [0, REQ_ONE] {
                        let reply = c.ask(cmd::BLOCK_STATUS, flags, offset, length, &[]);
                        let what = format!("{export}, {mode:?}, {length}@{offset}, flags {flags}");
                        assert_eq!(reply.error, 0, "{what}: {}", reply.text);
                        assert_eq!(reply.status.len(), 2);
                        for list in reply.status.values() {
                            let all: u64 = list.iter().map(|d| d.0).sum();
                            assert!(all <= length, "{what}: {all} bytes are told of");
                            // Getting on has to be possible.
                            assert!(all > 0, "{what}");
                        }
                        // What is told to be zeroes is.
                        let zero = |d: &(u64, u64)| d.1 & 2 != 0;
                        let mut at = offset;
                        for d in &reply.status[&1] {
                            for data in [SIZE / 2, SIZE - 4096, 5 * GIB] {
                                let inside = at <= data + 4095 && data < at + d.0;
                                assert!(!(inside && zero(d)), "{what}: data at {data} are hidden");
                            }
                            at += d.0;
                        }
                    }
                }
                if mode == Mode::Extended {
                    let bad =
                        [(0, 1 << 63), (0, SIZE + 1), (SIZE, 1), (1 << 63, 1 << 63), (0, u64::MAX)];
                    for (offset, length) in bad {
                        for flags in [0, REQ_ONE] {
                            let error = c.ask(cmd::BLOCK_STATUS, flags, offset, length, &[]).error;
                            assert_eq!(error, EINVAL, "{length}@{offset}");
                        }
                    }
                }
            }
        }
        scene.end();
    });
}

/// A disk in as many pieces as can be: a reply about it has a limit, and asking on gets it all.
#[test]
fn block_status_of_many_pieces() {
    alone(|| {
        let scene = Scene::with(&[], |s| {
            let image = memory("256M");
            for i in 0..20_000u64 {
                image.write_at(&[1], i * 8192, NONE).unwrap();
            }
            s.add_image(b"pieces", image, true);
        });
        for mode in [Mode::Structured, Mode::Extended] {
            let mut c = scene.client("pieces", mode);
            let grown = growth(|| {
                // Many such requests in one go.
                for _ in 0..20 {
                    let request = c.request(cmd::BLOCK_STATUS, 0, 0, 256 * MIB).0;
                    c.say(&request);
                }
                for _ in 0..20 {
                    let reply = c.reply();
                    assert!(reply.status[&1].len() > 1000, "{}", reply.status[&1].len());
                }
            });
            assert!(grown < 16 * MIB, "{grown} bytes");
            let mut at = 0;
            while at < 256 * MIB {
                let reply = c.ask(cmd::BLOCK_STATUS, 0, at, 256 * MIB - at, &[]);
                for (n, flags) in &reply.status[&1] {
                    let data = at % 8192 == 0 && at < 20_000 * 8192;
                    assert_eq!(flags & 2 == 0, data, "{n}@{at}");
                    at += n;
                }
            }
            assert_eq!(at, 256 * MIB);
        }
        scene.end();
    });
}

/// Asking for a terabyte to be brought near brings none of it.
#[test]
fn hints_of_a_terabyte() {
    alone(|| {
        let scene = Scene::with(&[], |s| {
            s.add_image(b"mem", memory("1T"), false);
            let path = s.tmp.join("qcow2");
            create(&path, "qcow2", 1 << 40, &[]);
            s.add("qcow2", &path, RW);
        });
        let before = counts();
        for export in ["mem", "qcow2"] {
            let mut c = scene.client(export, Mode::Extended);
            let grown = growth(|| {
                assert_eq!(c.ask(cmd::CACHE, 0, 0, 1 << 40, &[]).error, 0);
                assert_eq!(c.ask(cmd::TRIM, 0, 0, 1 << 40, &[]).error, 0);
                assert_eq!(c.ask(cmd::WRITE_ZEROES, 0, 0, 1 << 40, &[]).error, 0);
            });
            assert!(grown < 140 * MIB, "{export}: {grown} bytes");
        }
        let on_disk = on_disk(&scene.tmp.join("qcow2"));
        assert!(on_disk < 4 * MIB, "trimming what is empty made {on_disk} bytes of tables");
        assert!(counts().rss < before.rss + 140 * MIB);
        scene.end_without();
    });
}
