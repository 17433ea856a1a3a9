//! Servers whose replies are wrong: what does not prove itself is an error of the protocol, never
//! bytes that nobody sent, and costs neither time nor memory.

use std::sync::Mutex;
use std::time::Duration;

use qblk::Extent;

use super::peer::*;
use super::scene::alone;
use super::wire::*;

type Lie = fn(&mut Peer, &Asked);

/// What each lie costs a read of 4096 bytes at 8192 in this mode: EPROTO that says `part`.
fn lies_to_reads(mode: Mode, lies: &[(&str, &str, Lie)]) {
    for &(what, part, lie) in lies {
        let what = format!("{mode:?}: {what}");
        let evil = Evil::answering(Offer::new(mode), lie);
        let image = evil.open(&[]).unwrap();
        let mut buf = vec![0xa5; 4096];
        let e = bounded(&what, || image.read_at(&mut buf, 8192)).expect_err(&what);
        assert_proto(&e, part, &what);
        // It is over for good, and says why.
        let again = bounded(&what, || image.read_at(&mut buf, 0)).expect_err(&what);
        assert_decent(&again, &what);
        assert!(again.to_string().contains(part), "{what}: {again}");
        close(image, &what);
        assert_eq!(evil.came(), 1, "{what}");
    }
}

const HALF: &[u8] = &[1; 2048];
const FULL: &[u8] = &[1; 4096];

/// D2, D3: elsewhere the first is a copy with exit status 0 and half the data missing, the second a
/// read that succeeds with the rest of the buffer as it was.
const STRUCTURED: &[(&str, &str, Lie)] = &[
    ("half, and done", "ends without byte 2048", |p, r| _ = p.data(r, 1, r.offset, HALF)),
    ("half, then nothing", "ends without byte 2048", |p, r| {
        p.data(r, 0, r.offset, HALF);
        p.chunk(r, 1, chunk::NONE, &[]);
    }),
    ("the second half", "ends without byte 0", |p, r| _ = p.data(r, 1, r.offset + 2048, HALF)),
    ("half a hole", "ends without byte 2048", |p, r| _ = p.hole(r, 1, r.offset, 2048)),
    ("no data at all", "ends without byte 0", |p, r| _ = p.chunk(r, 1, chunk::NONE, &[])),
    ("the first half twice", "twice", |p, r| {
        p.data(r, 0, r.offset, HALF);
        p.data(r, 1, r.offset, HALF);
    }),
    ("a hole over data", "twice", |p, r| {
        p.data(r, 0, r.offset, FULL);
        p.hole(r, 1, r.offset + 100, 8);
    }),
    ("data that overlaps by one", "twice", |p, r| {
        p.hole(r, 0, r.offset + 2047, 2049);
        p.data(r, 1, r.offset, HALF);
    }),
    ("a gap", "ends without byte 1024", |p, r| {
        p.data(r, 0, r.offset, &HALF[..1024]);
        p.data(r, 1, r.offset + 2048, HALF);
    }),
    ("before what was asked", "at offset 8191", |p, r| _ = p.data(r, 1, r.offset - 1, FULL)),
    ("one beyond", "at offset 8193", |p, r| _ = p.data(r, 1, r.offset + 1, FULL)),
    ("too long", "4097 bytes at offset", |p, r| _ = p.data(r, 1, r.offset, &[0; 4097])),
    ("at the end of all", "in reply to a read", |p, r| _ = p.data(r, 1, u64::MAX, &[0])),
    ("a hole that wraps", "in reply to a read", |p, r| {
        p.hole(r, 1, u64::MAX - 8, 4096);
    }),
    ("a hole of 4 GiB", "4294967295 bytes", |p, r| _ = p.hole(r, 1, r.offset, u32::MAX)),
    ("a hole of nothing", "0 bytes", |p, r| _ = p.hole(r, 0, r.offset, 0)),
    ("data of nothing", "8 bytes of payload", |p, r| _ = p.data(r, 0, r.offset, &[])),
    ("data without offset", "7 bytes of payload", |p, r| {
        p.chunk(r, 1, chunk::DATA, &[0; 7]);
    }),
    ("a short hole", "11 bytes of payload", |p, r| _ = p.chunk(r, 1, chunk::HOLE, &[0; 11])),
    ("nothing, not done", "not the last", |p, r| _ = p.chunk(r, 0, chunk::NONE, &[])),
    ("flags that there are not", "flags 0x3", |p, r| _ = p.chunk(r, 3, chunk::NONE, &[])),
    ("a kind that there is not", "kind 99", |p, r| _ = p.chunk(r, 1, 99, &[])),
    ("a status", "kind 5", |p, r| _ = p.chunk(r, 1, chunk::STATUS, &narrow(7, &[(4096, 0)]))),
    ("an error that is none", "without an error", |p, r| {
        p.chunk(r, 1, chunk::ERROR, &[0; 6]);
    }),
    ("errors for ever", "more than 64 errors", |p, r| {
        while p.chunk(r, 0, chunk::ERROR, &[0, 0, 0, 5, 0, 0]) {}
    }),
    ("an error's text beyond its payload", "text of 65535 bytes", |p, r| {
        p.chunk(r, 1, chunk::ERROR, &[0, 0, 0, 5, 255, 255, b'x']);
    }),
    ("an error with too long a text", "text of 4097 bytes", |p, r| {
        let payload = [&[0, 0, 0, 5, 0x10, 1][..], &[b'x'; 4097]].concat();
        p.chunk(r, 1, chunk::ERROR, &payload);
    }),
    ("an error elsewhere", "outside of the request", |p, r| {
        p.chunk(r, 1, chunk::ERROR_OFFSET, &[0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }),
    ("a simple reply", "simple reply", |p, r| _ = p.simple(r, 0, FULL)),
    ("a cookie never given", "not under way", |p, r| {
        p.data(&Asked { cookie: !r.cookie, ..*r }, 1, r.offset, FULL);
    }),
    ("the cookie 0", "not under way", |p, r| {
        p.data(&Asked { cookie: 0, ..*r }, 1, r.offset, FULL);
    }),
    ("another slot's cookie", "not under way", |p, r| {
        p.data(&Asked { cookie: r.cookie ^ 1, ..*r }, 1, r.offset, FULL);
    }),
    ("words", "begins with 0x48545450", |p, _| _ = p.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
];

#[test]
fn structured_reads_that_prove_nothing() {
    alone(|| costs_little(|| lies_to_reads(Mode::Structured, STRUCTURED)));
}

#[test]
fn simple_and_extended_reads_that_prove_nothing() {
    alone(|| {
        costs_little(|| {
            lies_to_reads(
                Mode::Simple,
                &[
                    ("a chunk", "begins with", |p, r| _ = p.data(r, 1, r.offset, FULL)),
                    ("a cookie never given", "not under way", |p, r| {
                        p.simple(&Asked { cookie: r.cookie + (1 << 32), ..*r }, 0, FULL);
                    }),
                ],
            );
            lies_to_reads(
                Mode::Extended,
                &[
                    ("half, and done", "ends without", |p, r| _ = p.data(r, 1, r.offset, HALF)),
                    ("twice", "twice", |p, r| {
                        p.data(r, 0, r.offset, HALF);
                        p.data(r, 1, r.offset, HALF);
                    }),
                    ("another offset", "a reply for offset 0", |p, r| {
                        p.data(&Asked { offset: 0, ..*r }, 1, r.offset, FULL);
                    }),
                    ("a structured chunk", "begins with", |p, r| {
                        p.mode = Mode::Structured;
                        p.data(r, 1, r.offset, FULL);
                    }),
                    ("2^64 - 1 bytes of data", "in reply to a read", |p, r| {
                        p.huge(r, 1, chunk::DATA, u64::MAX, &r.offset.to_be_bytes());
                    }),
                    ("2^63 bytes of error", "bytes of payload", |p, r| {
                        p.huge(r, 1, chunk::ERROR, 1 << 63, &[0; 6]);
                    }),
                ],
            );
        });
    });
}

/// Each kind of chunk with 4 GiB of payload that come for ever: refused by the header alone.
#[test]
fn payloads_of_four_gibibytes() {
    alone(|| {
        costs_little(|| {
            for mode in [Mode::Structured, Mode::Extended] {
                for call in [cmd::READ, cmd::WRITE, cmd::FLUSH, cmd::TRIM, cmd::BLOCK_STATUS] {
                    for kind in [0, 1, 2, 5, 6, 7, 0x7fff, 0x8001, 0x8002, 0xffff] {
                        let what = format!("{mode:?}, command {call}, kind {kind:#x}");
                        let evil = Evil::new(move |_, p| {
                            assert!(p.negotiate(&Offer::new(mode)));
                            let Some(r) = p.request() else { return };
                            p.huge(&r, 0, kind, u32::MAX.into(), &r.offset.to_be_bytes());
                            while p.say(&[0; 16384]) {}
                        });
                        let image = evil.open(&[]).unwrap();
                        let e = bounded(&what, || match call {
                            cmd::READ => image.read_at(&mut [0; 4096], 8192),
                            cmd::WRITE => image.write_at(&[1; 4096], 8192, qblk::ReqFlags::NONE),
                            cmd::FLUSH => image.flush(),
                            cmd::TRIM => image.trim(8192, 4096, qblk::ReqFlags::NONE),
                            _ => image.block_status(b"base:allocation", 8192, 4096, 1000).map(drop),
                        });
                        assert_proto(&e.expect_err(&what), "", &what);
                        close(image, &what);
                    }
                }
            }
        });
    });
}

fn status_of(mode: Mode, lie: impl Fn(&mut Peer, &Asked) + Send + Sync + 'static) -> Status {
    let evil = Evil::answering(Offer::new(mode), lie);
    let image = evil.open(&[]).unwrap();
    let runs = bounded("a status", || image.block_status(b"base:allocation", 8192, 65536, 1000));
    let mut extents = [Extent::data(0, 0); 16];
    let found = bounded("extents", || image.extents(8192, 65536, &mut extents));
    close(image, "after a status");
    (runs, found.map(|n| extents[..n].to_vec()))
}
type Status = (qblk::Result<Vec<(u64, u64)>>, qblk::Result<Vec<Extent>>);

/// CVE-2023-5871: what has 64 bits elsewhere ran into an assertion.
#[test]
fn block_statuses_of_64_bits() {
    alone(|| {
        costs_little(|| {
            for flags in [1 << 63, u64::MAX, 1 << 32, !3] {
                let (runs, extents) = status_of(Mode::Extended, move |p, r| {
                    let payload = wide(7, &[(4096, flags), (u64::MAX - 4096, flags)]);
                    p.chunk(r, 1, chunk::STATUS_EXT, &payload);
                });
                assert_eq!(runs.unwrap(), [(65536, flags)], "{flags:#x}");
                let extents = extents.unwrap();
                assert_eq!(extents[0].offset, 8192);
                assert_eq!(extents.iter().map(|e| e.length).sum::<u64>(), 65536, "{extents:?}");
            }
            // 32 bits: the last may reach beyond what was asked, and no further than it can.
            let (runs, _) = status_of(Mode::Structured, |p, r| {
                p.chunk(r, 1, chunk::STATUS, &narrow(7, &[(512, 3), (u32::MAX, u32::MAX)]));
            });
            assert_eq!(runs.unwrap(), [(512, 3), (65024, u32::MAX.into())]);
        });
    });
}

#[test]
fn block_statuses_that_prove_nothing() {
    alone(|| {
        costs_little(|| {
            let lies: &[(&str, &str, Mode, Lie)] = &[
                ("of nothing", "describes 0 bytes", Mode::Structured, |p, r| {
                    p.chunk(r, 1, chunk::STATUS, &narrow(7, &[(0, 0), (65536, 0)]));
                }),
                ("of nothing, wide", "describes 0 bytes", Mode::Extended, |p, r| {
                    p.chunk(r, 1, chunk::STATUS_EXT, &wide(7, &[(0, 0)]));
                }),
                ("too long", "describes more than", Mode::Structured, |p, r| {
                    p.chunk(r, 1, chunk::STATUS, &narrow(7, &[(u32::MAX, 0), (1, 0)]));
                }),
                ("too long, wide", "describes more than", Mode::Extended, |p, r| {
                    p.chunk(r, 1, chunk::STATUS_EXT, &wide(7, &[(u64::MAX, 0), (u64::MAX, 0)]));
                }),
                ("without descriptors", "bytes of payload", Mode::Structured, |p, r| {
                    p.chunk(r, 1, chunk::STATUS, &narrow(7, &[]));
                }),
                ("of a broken descriptor", "bytes of payload", Mode::Structured, |p, r| {
                    p.chunk(r, 1, chunk::STATUS, &[0, 0, 0, 7, 1, 2, 3]);
                }),
                ("that counts wrongly", "tells another number", Mode::Extended, |p, r| {
                    p.chunk(r, 1, chunk::STATUS_EXT, &{
                        let mut payload = wide(7, &[(65536, 0)]);
                        payload[4..8].fill(255);
                        payload
                    });
                }),
                ("of a context unknown", "not agreed on", Mode::Structured, |p, r| {
                    p.chunk(r, 1, chunk::STATUS, &narrow(8, &[(65536, 0)]));
                }),
                ("twice", "two block statuses", Mode::Structured, |p, r| {
                    p.chunk(r, 0, chunk::STATUS, &narrow(7, &[(65536, 0)]));
                    p.chunk(r, 1, chunk::STATUS, &narrow(7, &[(65536, 0)]));
                }),
                ("for ever", "two block statuses", Mode::Structured, |p, r| {
                    while p.chunk(r, 0, chunk::STATUS, &narrow(7, &[(65536, 0)])) {}
                }),
                ("never", "leaves out a context", Mode::Structured, |p, r| {
                    p.chunk(r, 1, chunk::NONE, &[]);
                }),
                ("of the other kind", "block status of kind 6", Mode::Structured, |p, r| {
                    p.chunk(r, 1, chunk::STATUS_EXT, &wide(7, &[(65536, 0)]));
                }),
                ("simple", "simple reply", Mode::Structured, |p, r| _ = p.simple(r, 0, &[])),
            ];
            for &(what, part, mode, lie) in lies {
                let (runs, extents) = status_of(mode, lie);
                assert_proto(&runs.expect_err(what), part, what);
                // The connection is gone by then, for the same reason.
                let e = extents.expect_err(what);
                assert!(e.to_string().contains(part), "{what}: {e}");
            }
        });
    });
}

/// A million descriptors of one byte: taken in, and no more kept than is of use.
#[test]
fn a_million_descriptors() {
    alone(|| {
        costs_little(|| {
            let evil = Evil::answering(Offer::new(Mode::Structured), |p, r| {
                let runs: Vec<_> = (0..1 << 17).map(|i| (1, i & 3)).collect();
                p.chunk(r, 1, chunk::STATUS, &narrow(7, &runs));
            });
            let image = evil.open(&[("nbd.timeout", "20")]).unwrap();
            let mut extents = [Extent::data(0, 0); 16];
            for i in 0..8 {
                assert_eq!(image.extents(i << 20, 1 << 20, &mut extents).unwrap(), 16);
            }
            close(image, "after many descriptors");
        });
    });
}

/// A server that answers what was not asked, or was asked before.
#[test]
fn replies_to_requests_never_sent() {
    alone(|| {
        costs_little(|| {
            // Before anything was asked: found out by the first call.
            let evil = Evil::new(|_, p| {
                assert!(p.negotiate(&Offer::new(Mode::Structured)));
                let cookie = 1 << 32;
                p.chunk(&Asked { kind: 0, cookie, offset: 0, length: 0 }, 1, chunk::NONE, &[]);
                p.silence();
            });
            let image = evil.open(&[]).unwrap();
            // It may happen to be the cookie of the first request: then it is a reply without data.
            let e = image.read_at(&mut [0; 512], 0).unwrap_err();
            assert_proto(&e, "", "too early");
            close(image, "too early");

            // The last reply once more, with the next request on its way.
            let last = Mutex::new(None);
            let evil = Evil::answering(Offer::new(Mode::Structured), move |p, r| {
                match last.lock().unwrap().replace(*r) {
                    None => _ = p.right(r),
                    Some(old) => _ = p.right(&old),
                }
            });
            let image = evil.open(&[]).unwrap();
            image.read_at(&mut [0; 512], 0).unwrap();
            let e = image.read_at(&mut [0; 512], 0).unwrap_err();
            assert_proto(&e, "not under way", "again");
            close(image, "again");
        });
    });
}

/// A reply to a write comes before the write was read: it counts when all was sent, and not before.
#[test]
fn early_replies_to_writes() {
    alone(|| {
        costs(64 << 20, || {
            let data = vec![1; 8 << 20];
            let evil = Evil::new(|_, p| {
                assert!(p.negotiate(&Offer::new(Mode::Structured)));
                let r = p.header().unwrap();
                p.right(&r);
                p.sleep(Duration::from_secs(20));
            });
            let image = evil.open(&[]).unwrap();
            let result = bounded("never read", || image.write_at(&data, 0, qblk::ReqFlags::NONE));
            assert_errno(&result.unwrap_err(), libc::ETIMEDOUT, "never read");
            close(image, "never read");
            drop(evil);

            let evil = Evil::answering(Offer::new(Mode::Structured), |p, r| {
                p.right(r);
                p.sleep(Duration::from_millis(100));
                if r.kind == cmd::WRITE {
                    p.take(r.length as usize);
                }
            });
            let image = evil.open(&[("nbd.timeout", "20")]).unwrap();
            image.write_at(&data, 0, qblk::ReqFlags::NONE).unwrap();
            image.flush().unwrap();
            image.close().unwrap();

            // Answered with data, and twice.
            let lies: [(&str, Lie); 3] = [
                ("kind 1", |p, r| _ = p.data(r, 1, r.offset, FULL)),
                ("kind 2", |p, r| _ = p.hole(r, 1, r.offset, 4096)),
                ("not under way", |p, r| {
                    p.right(r);
                    p.right(r);
                }),
            ];
            for (part, lie) in lies {
                let evil = Evil::new(move |_, p| {
                    assert!(p.negotiate(&Offer::new(Mode::Structured)));
                    while let Some(r) = p.request().filter(|r| r.kind == cmd::WRITE) {
                        lie(p, &r);
                    }
                });
                let image = evil.open(&[]).unwrap();
                let write = || image.write_at(FULL, 4096, qblk::ReqFlags::NONE);
                let e = write().and_then(|()| write()).unwrap_err();
                // What came twice may have ended the connection before the second call began.
                assert_decent(&e, part);
                assert!(e.to_string().contains(part), "{e}");
                close(image, part);
            }
        });
    });
}

/// What a server says of an error is for people: escaped, and not too long.
#[test]
fn words_of_errors() {
    alone(|| {
        costs_little(|| {
            let texts: [Vec<u8>; 5] = [
                b"\x1b[2J\x1b]0;owned\x07\r\n\0".to_vec(),
                b"\xff\xfe\x80".repeat(1365),
                vec![0x1b; 4096],
                "\u{202e}\u{2066}".repeat(600).into_bytes(),
                b"%s%n'\\".repeat(600),
            ];
            for text in texts {
                let said = text.clone();
                let evil = Evil::answering(Offer::new(Mode::Structured), move |p, r| {
                    let length = (said.len() as u16).to_be_bytes();
                    let payload = [&[0, 0, 0, 28][..], &length, &said].concat();
                    p.chunk(r, 1, chunk::ERROR, &payload);
                });
                let image = evil.open(&[]).unwrap();
                let e = image.read_at(&mut [0; 512], 0).unwrap_err();
                assert_errno(&e, libc::ENOSPC, "a text");
                assert!(e.to_string().contains("the server says"), "{e}");
                // The connection is as good as before.
                assert_errno(&image.flush().unwrap_err(), libc::ENOSPC, "a text");
                assert_eq!(evil.came(), 1);
                image.close().unwrap();
            }
        });
    });
}
