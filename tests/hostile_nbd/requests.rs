//! Requests that mean nothing: each gets its error, and the connection goes on in step: the next
//! request is answered right.

use std::sync::LazyLock;

use super::client::Client;
use super::common::*;
use super::scene::{OURS, SIZE, Scene, alone, honest_bytes, memory};
use super::wire::*;

/// Size of the export that is written to.
const SPACE: u64 = 1 << 20;

/// A server with a writable export "w".
fn scene() -> Scene {
    let prepare = |s: &Scene| {
        let image = memory("1M");
        image.write_at(pattern(), 0, NONE).unwrap();
        s.add_image(b"w", image, false);
    };
    Scene::with(&[], prepare)
}

fn pattern() -> &'static [u8] {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| Rng::new(2).bytes(SPACE as usize));
    &BYTES
}

/// The connection is in step: what is asked next is answered right.
fn in_step(c: &mut Client, expected: &[u8], what: &str) {
    let reply = c.ask(cmd::READ, 0, 100, 3000, &[]);
    assert_eq!(reply.error, 0, "after {what}");
    assert_same(&reply.data, &expected[100..3100], 100, what);
}

#[test]
fn ranges_that_leave_the_export() {
    alone(|| {
        let scene = scene();
        for mode in MODES {
            let mut c = scene.client("w", mode);
            let max = u64::from(u32::MAX);
            let mut bad = vec![(SPACE, 1), (SPACE - 1, 2), (0, SPACE + 1), (1 << 40, 512)];
            bad.extend([(u64::MAX, 1), (u64::MAX - 511, 512), (1 << 63, 1), (i64::MAX as u64, 2)]);
            bad.extend([(0, max), (u64::MAX, max), (u64::MAX - max + 1, max)]);
            if mode == Mode::Extended {
                bad.extend([(0, 1 << 63), (0, u64::MAX), (u64::MAX, u64::MAX), (1, u64::MAX)]);
                bad.extend([(0, 1 << 32), (1 << 63, 1 << 63), (SPACE, u64::MAX - SPACE + 1)]);
            }
            for (offset, length) in bad {
                for kind in [cmd::READ, cmd::TRIM, cmd::WRITE_ZEROES, cmd::CACHE, cmd::BLOCK_STATUS]
                {
                    let error = c.ask(kind, 0, offset, length, &[]).error;
                    let what = format!("{mode:?}: command {kind}, {length}@{offset}");
                    match kind {
                        cmd::WRITE_ZEROES => assert_eq!(error, ENOSPC, "{what}"),
                        _ => assert_eq!(error, EINVAL, "{what}"),
                    }
                }
                // Its payload is not for us to keep.
                if length <= 2 << 20 {
                    let reply = c.ask(cmd::WRITE, 0, offset, length, &vec![7; length as usize]);
                    assert_eq!(reply.error, ENOSPC, "{mode:?}: write {length}@{offset}");
                }
                in_step(&mut c, pattern(), &format!("{mode:?}: {length}@{offset}"));
            }
        }
        scene.end();
    });
}

#[test]
fn lengths_of_nothing_and_of_too_much() {
    alone(|| {
        let scene = scene();
        for mode in MODES {
            let mut c = scene.client("w", mode);
            for offset in [0, 5, SPACE] {
                for kind in [cmd::READ, cmd::WRITE, cmd::BLOCK_STATUS] {
                    assert_eq!(c.ask(kind, 0, offset, 0, &[]).error, EINVAL, "{mode:?} {kind}");
                }
                for kind in [cmd::TRIM, cmd::WRITE_ZEROES, cmd::CACHE] {
                    // The specification leaves it open; it must do nothing.
                    let error = c.ask(kind, 0, offset, 0, &[]).error;
                    assert!(error == 0 || error == EINVAL, "{mode:?} {kind}: {error}");
                }
                in_step(&mut c, pattern(), "requests for nothing");
            }
            for (offset, length) in [(1, 0), (0, 1), (0, 4096), (u64::MAX, u32::MAX.into())] {
                let error = c.ask(cmd::FLUSH, 0, offset, length, &[]).error;
                assert_eq!(error, EINVAL, "{mode:?}: flush of {length}@{offset}");
            }
            let error = c.ask(cmd::READ, 0, 0, (32 << 20) + 1, &[]).error;
            assert_eq!(error, EINVAL);
            let error =
                c.ask(cmd::READ, DF * u16::from(mode != Mode::Simple), 0, 1 << 31, &[]).error;
            assert_eq!(error, EINVAL);
            in_step(&mut c, pattern(), "too much");
            // More than the largest, but not beyond reason: it is read and forgotten.
            let length = (32 << 20) + 512;
            let reply = c.ask(cmd::WRITE, FUA, 0, length, &vec![9; length as usize]);
            assert_eq!(reply.error, EINVAL);
            in_step(&mut c, pattern(), "a large payload");
        }
        // Beyond reason: no gigabytes are waited for, nor taken.
        for (mode, length) in [
            (Mode::Simple, u64::from(u32::MAX)),
            (Mode::Structured, 1 << 31),
            (Mode::Extended, 1 << 32),
            (Mode::Extended, 1 << 63),
            (Mode::Extended, u64::MAX),
        ] {
            let mut c = scene.client("w", mode);
            let header = c.request(cmd::WRITE, 0, 0, length).0;
            c.say(&header);
            // The error may be told before.
            assert!(c.hear_end().len() < 2000);
            scene.honest();
        }
        let mut c = scene.client("w", Mode::Simple);
        in_step(&mut c, pattern(), "all of that");
        drop(c);
        scene.end();
    });
}

#[test]
fn commands_and_flags_that_there_are_not() {
    alone(|| {
        let scene = scene();
        for mode in MODES {
            let mut c = scene.client("w", mode);
            for kind in [cmd::RESIZE, 9, 10, 255, 256, 0x8000, 0xffff] {
                let error = c.ask(kind, 0, 0, 4096, &[]).error;
                assert_eq!(error, EINVAL, "{mode:?}: command {kind}");
            }
            for kind in 0..=7 {
                if kind == cmd::DISC {
                    continue;
                }
                let known = match kind {
                    cmd::READ if mode != Mode::Simple => DF,
                    cmd::READ | cmd::FLUSH | cmd::CACHE => 0,
                    cmd::WRITE | cmd::TRIM => FUA,
                    cmd::WRITE_ZEROES => FUA | NO_HOLE | FAST_ZERO,
                    _ => REQ_ONE,
                };
                for bit in (0..16).map(|n| 1 << n) {
                    // With extended headers this one means a payload.
                    if known & bit != 0 || (mode == Mode::Extended && bit == PAYLOAD_LEN) {
                        continue;
                    }
                    let length = if kind == cmd::FLUSH { 0 } else { 512 };
                    let data = vec![8; if kind == cmd::WRITE { 512 } else { 0 }];
                    let error = c.ask(kind, bit, 0, length, &data).error;
                    assert_eq!(error, EINVAL, "{mode:?}: command {kind}, flag {bit:#x}");
                }
            }
            in_step(&mut c, pattern(), "unknown flags");
        }
        scene.end();
    });
}

/// A payload where none belongs is passed over; a write without the flag still has one.
#[test]
fn payloads_where_none_belong() {
    alone(|| {
        let scene = scene();
        let mut c = scene.client("w", Mode::Extended);
        for kind in [cmd::READ, cmd::FLUSH, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES, 8, 99] {
            for length in [0, 1, 512, 100_000] {
                let error = c.ask(kind, PAYLOAD_LEN, 0, length, &vec![1; length as usize]).error;
                assert_eq!(error, EINVAL, "command {kind} with a payload of {length}");
            }
            in_step(&mut c, pattern(), "a payload");
        }
        // Block status of some contexts: the number of bytes, then ids.
        let ids: Vec<u32> = c.contexts.iter().map(|x| x.0).collect();
        let ask = |length: u64, ids: &[u32]| {
            let mut payload = length.to_be_bytes().to_vec();
            ids.iter().for_each(|id| payload.extend_from_slice(&id.to_be_bytes()));
            payload
        };
        for (payload, offset, error) in [
            (ask(4096, &ids[..1]), 0, 0),
            (ask(SPACE, &ids), 0, 0),
            (vec![], 0, EINVAL),
            (vec![0; 8], 0, EINVAL),
            (vec![0; 11], 0, EINVAL),
            (ask(4096, &[]), 0, EINVAL),
            (ask(4096, &[77]), 0, EINVAL),
            (ask(4096, &[ids[0], ids[0], ids[0]]), 0, EINVAL),
            (ask(0, &ids), 0, EINVAL),
            (ask(u64::MAX, &ids), 0, EINVAL),
            (ask(SPACE + 1, &ids), 0, EINVAL),
            (ask(1 << 63, &ids), 1, EINVAL),
            (ask(512, &ids), SPACE, EINVAL),
            (ask(512, &ids), u64::MAX, EINVAL),
            (vec![3; 70_000], 0, EINVAL),
        ] {
            let n = payload.len() as u64;
            let reply = c.ask(cmd::BLOCK_STATUS, PAYLOAD_LEN, offset, n, &payload);
            assert_eq!(
                reply.error,
                error,
                "payload {:02x?} at {offset}",
                &payload[..payload.len().min(20)]
            );
            let told: u64 = reply.status.values().flatten().map(|d| d.0).sum();
            assert!(error == 0 || told == 0);
            in_step(&mut c, pattern(), "block status");
        }
        // Without the flag, as clients do that are older than the specification.
        let (offset, length) = (SPACE - 512, 512);
        c.expect(7, cmd::WRITE, 0, offset, length);
        let bytes = header(Mode::Extended, cmd::WRITE, 0, 7, offset, length);
        c.say(&[bytes, pattern()[SPACE as usize - 512..].to_vec()].concat());
        let error = c.reply().error;
        assert!(error == 0 || error == EINVAL, "{error}");
        in_step(&mut c, pattern(), "a write without the flag");
        drop(c);
        scene.end();
    });
}

#[test]
fn nothing_is_changed_through_a_read_only_export() {
    alone(|| {
        let scene = scene();
        for mode in MODES {
            let mut c = Client::open(scene.sock(), OURS, &How::new(mode));
            for flags in [0, FUA] {
                for length in [1, 512, 300_000, SIZE] {
                    let reply = c.ask(cmd::WRITE, flags, 0, length, &vec![0; length as usize]);
                    assert_eq!(reply.error, EPERM);
                }
                assert_eq!(c.ask(cmd::TRIM, flags, 0, 4096, &[]).error, EPERM);
                assert_eq!(c.ask(cmd::WRITE_ZEROES, flags, 0, 4096, &[]).error, EPERM);
            }
            assert_eq!(c.ask(cmd::FLUSH, 0, 0, 0, &[]).error, 0);
            in_step(&mut c, honest_bytes(), "writes to what is read-only");
        }
        scene.end();
    });
}

/// What does not begin like a request ends the connection, and only it.
#[test]
fn requests_that_are_none() {
    alone(|| {
        let scene = scene();
        for mode in MODES {
            let good = header(mode, cmd::READ, 0, 1, 0, 512);
            let other = if mode == Mode::Extended { Mode::Simple } else { Mode::Extended };
            let mut bad = vec![vec![0; 32], vec![0xff; 32], b"IHAVEOPT".repeat(4)];
            bad.push([header(other, cmd::READ, 0, 1, 0, 512), vec![0; 8]].concat());
            for bit in 0..32 {
                let mut flipped = good.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                bad.push(flipped);
            }
            for bytes in bad {
                let mut c = scene.client("w", mode);
                in_step(&mut c, pattern(), "nothing yet");
                c.say(&bytes);
                assert_eq!(c.hear_end(), b"", "{mode:?}: {bytes:02x?}");
            }
        }
        scene.end();
    });
}

#[test]
fn requests_come_in_any_pieces() {
    alone(|| {
        let scene = scene();
        for mode in MODES {
            // One byte at a time.
            let mut c = scene.client("w", mode);
            let mut bytes = Vec::new();
            let expected = pattern();
            let mut write = c.request(cmd::WRITE, FUA, 4096, 100).0;
            write.extend_from_slice(&expected[4096..4196]);
            for piece in [write, c.request(cmd::READ, 0, 100, 3000).0] {
                bytes.extend_from_slice(&piece);
            }
            for byte in bytes {
                c.say(&[byte]);
            }
            let (a, b) = (c.reply(), c.reply());
            let read = if a.data.is_empty() { b } else { a };
            assert_same(&read.data, &expected[100..3100], 100, "byte by byte");
            // Ten thousand in one.
            let mut all = Vec::new();
            for i in 0..10_000u64 {
                let (kind, offset) = match i % 10 {
                    0 => (cmd::FLUSH, 0),
                    1 => (cmd::CACHE, i),
                    _ => (cmd::READ, (i * 37) % (SPACE - 8)),
                };
                let n = if kind == cmd::FLUSH { 0 } else { 8 };
                all.extend_from_slice(&c.request(kind, 0, offset, n).0);
            }
            let sock = c.sock().twin();
            let sender = std::thread::spawn(move || Client::new(sock).say(&all));
            for _ in 0..10_000 {
                assert_eq!(c.reply().error, 0);
            }
            sender.join().unwrap();
            assert_eq!(c.open_requests(), 0);
            in_step(&mut c, expected, "ten thousand requests");
        }
        scene.end();
    });
}

/// Cookies are the client's own: two that are the same get two replies.
#[test]
fn two_requests_with_the_same_cookie() {
    alone(|| {
        let scene = scene();
        for mode in MODES {
            let mut c = scene.client("w", mode);
            for kind in [cmd::READ, cmd::CACHE] {
                let one = header(mode, kind, 0, u64::MAX, 100, 3000);
                c.say(&one.repeat(2));
                for _ in 0..2 {
                    c.expect(u64::MAX, kind, 0, 100, 3000);
                    let reply = c.reply();
                    assert_eq!(reply.error, 0);
                    if kind == cmd::READ {
                        assert_same(&reply.data, &pattern()[100..3100], 100, "the same cookie");
                    }
                }
            }
            in_step(&mut c, pattern(), "the same cookie");
        }
        scene.end();
    });
}

/// What is under way when the client says goodbye is done; what comes after goodbye is not.
#[test]
fn goodbye_in_the_middle_of_things() {
    alone(|| {
        let scene = scene();
        for mode in MODES {
            for _ in 0..20 {
                let mut c = scene.client("w", mode);
                let mut all = Vec::new();
                for i in 0..64 {
                    let at = i * 16384;
                    let mut write = c.request(cmd::WRITE, 0, at, 100).0;
                    write.extend_from_slice(&pattern()[at as usize..][..100]);
                    all.extend_from_slice(&write);
                    all.extend_from_slice(&c.request(cmd::FLUSH, 0, 0, 0).0);
                }
                all.extend_from_slice(&c.request(cmd::DISC, 0, 0, 0).0);
                all.extend_from_slice(&c.request(cmd::WRITE, 0, 0, 8).0);
                all.extend_from_slice(&[0xee; 8]);
                c.say(&all);
                let mut answered = 0;
                while c.try_reply().is_ok() {
                    answered += 1;
                }
                assert_eq!(answered, 128, "{mode:?}: replies before the end");
            }
            let mut c = scene.client("w", mode);
            in_step(&mut c, pattern(), "goodbye");
            assert_same(&c.ask(cmd::READ, 0, 0, 8, &[]).data, &pattern()[..8], 0, "after goodbye");
        }
        scene.end();
    });
}
