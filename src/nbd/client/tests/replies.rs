//! Replies, whole and in pieces, honest and not.

use super::peer::*;
use crate::block::{Can, Device, Driver, Error, ErrorKind, Extent, ExtentList, ReqFlags, Result};
use crate::nbd::proto::*;

type Script = fn(&mut Peer, &Request);

const READ: (u64, usize) = (512, 4096);

/// What a read of 4096 bytes at 512 comes to when it is answered by `script`.
fn read_by(mode: Mode, script: Script) -> Result<Vec<u8>> {
    opened(
        Offer::mode(mode),
        move |mut p| {
            let (r, _) = p.request().unwrap();
            assert_eq!((r.kind, r.offset, r.length), (cmd::READ, 512, 4096));
            script(&mut p, &r);
            // Until the client goes: a connection that it gives up is not ours to close first.
            while p.request().is_some() {}
        },
        |d| read(d, READ.0, READ.1),
    )
}

fn assert_proto(what: &str, result: Result<Vec<u8>>) {
    match result {
        Err(e) if e.kind() == ErrorKind::Proto => {}
        other => panic!("{what}: {other:?}"),
    }
}

#[test]
fn chunks_in_any_order_make_a_read() {
    for mode in [Mode::Structured, Mode::Extended] {
        let got = read_by(mode, |p, r| {
            p.data(r, 0, 512 + 1000, &[2; 1000]);
            p.hole(r, 0, 512 + 2000, 96);
            p.data(r, 0, 512, &[1; 1000]);
            p.data(r, chunk::DONE, 512 + 2096, &[3; 2000]);
        });
        let got = got.unwrap();
        assert_eq!(got[..1000], [1; 1000]);
        assert_eq!(got[1000..2000], [2; 1000]);
        assert_eq!(got[2000..2096], [0; 96]);
        assert_eq!(got[2096..], [3; 2000]);
        let got = read_by(mode, |p, r| {
            p.data(r, 0, 512, &[9; 4096]);
            p.ok(r);
        });
        assert_eq!(got.unwrap(), [9; 4096]);
        assert_eq!(read_by(mode, |p, r| p.hole(r, 1, 512, 4096)).unwrap(), [0; 4096]);
    }
}

#[test]
fn a_reply_byte_by_byte_is_the_same_reply() {
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let got = read_by(mode, |p, r| {
            let mut all = Vec::new();
            if p.mode == Mode::Simple {
                all.extend(simple_reply(0, r.cookie));
                all.extend([7; 4096]);
            } else {
                for (at, len) in [(512u64, 96usize), (608, 4000)] {
                    let (head, n) = chunk_header(p.mode, 0, chunk::OFFSET_DATA, r, 8 + len as u64);
                    all.extend(&head[..n]);
                    all.extend(at.to_be_bytes());
                    all.extend(vec![7; len]);
                }
                let (head, n) = chunk_header(p.mode, chunk::DONE, chunk::NONE, r, 0);
                all.extend(&head[..n]);
            }
            for b in all {
                p.send(&[b]);
            }
        });
        assert_eq!(got.unwrap(), [7; 4096]);
    }
}

#[test]
fn replies_to_reads_that_prove_nothing_are_eproto() {
    let scripts: &[(&str, Script)] = &[
        ("a gap", |p, r| p.data(r, 1, 512, &[1; 4095])),
        ("nothing", |p, r| p.ok(r)),
        ("a gap in the middle", |p, r| {
            p.data(r, 0, 512, &[1; 2000]);
            p.data(r, 1, 512 + 2001, &[1; 2095]);
        }),
        ("the same half twice", |p, r| {
            p.data(r, 0, 512, &[1; 2048]);
            p.data(r, 1, 512, &[1; 2048]);
        }),
        ("an overlap of one byte", |p, r| {
            p.data(r, 0, 512, &[1; 2048]);
            p.data(r, 1, 512 + 2047, &[1; 2049]);
        }),
        ("a hole over data", |p, r| {
            p.data(r, 0, 512, &[1; 4096]);
            p.hole(r, 1, 600, 1);
        }),
        ("before the range", |p, r| p.data(r, 1, 511, &[1; 4096])),
        ("beyond the range", |p, r| p.data(r, 1, 513, &[1; 4096])),
        ("far away", |p, r| p.data(r, 1, u64::MAX - 10, &[1; 4096])),
        ("no bytes", |p, r| p.data(r, 0, 512, &[])),
        ("a payload of 4 bytes", |p, r| p.chunk(r, 0, chunk::OFFSET_DATA, &[0; 4])),
        ("a hole of 0 bytes", |p, r| p.hole(r, 0, 512, 0)),
        ("a hole beyond", |p, r| p.hole(r, 0, 512, 4097)),
        ("a hole of 4 GiB", |p, r| p.hole(r, 0, 512, u32::MAX)),
        ("a hole told in 11 bytes", |p, r| p.chunk(r, 0, chunk::OFFSET_HOLE, &[0; 11])),
        ("a hole told in 13 bytes", |p, r| p.chunk(r, 0, chunk::OFFSET_HOLE, &[0; 13])),
        ("NONE that is not the last", |p, r| p.chunk(r, 0, chunk::NONE, &[])),
        ("NONE with a payload", |p, r| p.chunk(r, 1, chunk::NONE, &[0])),
        ("a block status", |p, r| p.chunk(r, 1, chunk::BLOCK_STATUS, &[0; 12])),
        ("an unknown kind", |p, r| p.chunk(r, 1, 77, &[0; 12])),
        ("unknown flags", |p, r| p.chunk(r, 3, chunk::NONE, &[])),
        ("an error without a number", |p, r| p.error(r, 1, 0, b"hm")),
        ("an error of 5 bytes", |p, r| p.chunk(r, 1, chunk::ERROR, &[0, 0, 0, 5, 0])),
        ("a text longer than its chunk", |p, r| {
            p.chunk(r, 1, chunk::ERROR, &[0, 0, 0, 5, 0, 9, b'x']);
        }),
        ("a text shorter than its chunk", |p, r| {
            p.chunk(r, 1, chunk::ERROR, &[0, 0, 0, 5, 0, 0, b'x']);
        }),
        ("a text of 4097 bytes", |p, r| p.error(r, 1, 5, &[b'x'; 4097])),
        ("an error chunk of 64 KiB + 1", |p, r| p.chunk(r, 1, 0x8063, &[1; 65537])),
        ("an error elsewhere", |p, r| {
            let payload = [&[0, 0, 0, 5, 0, 0][..], &511u64.to_be_bytes()].concat();
            p.chunk(r, 1, chunk::ERROR_OFFSET, &payload);
        }),
        ("errors without end", |p, r| (0..65).for_each(|_| p.error(r, 0, 5, b""))),
        ("a wrong slot", |p, r| p.ok(&Request { cookie: r.cookie + 1, ..*r })),
        ("a wrong generation", |p, r| p.ok(&Request { cookie: r.cookie + (1 << 32), ..*r })),
        ("cookie 0", |p, r| p.ok(&Request { cookie: 0, ..*r })),
        ("a slot that is none", |p, r| p.ok(&Request { cookie: r.cookie | 0xffff, ..*r })),
        ("no magic", |p, _| p.send(&[0; 40])),
        ("zillions of pieces", |p, r| {
            for i in (1..4096).step_by(2) {
                p.data(r, 0, 512 + i, &[1]);
            }
        }),
    ];
    for (what, script) in scripts {
        for mode in [Mode::Structured, Mode::Extended] {
            assert_proto(what, read_by(mode, *script));
        }
    }
    let structured = read_by(Mode::Structured, |p, r| p.simple(r, 0, &[1; 4096]));
    assert_proto("a simple reply to a read", structured);
    let structured = read_by(Mode::Structured, |p, r| p.simple(r, 5, &[]));
    assert_proto("a simple error to a read", structured);
    assert_proto("a simple reply", read_by(Mode::Extended, |p, r| p.simple(r, 0, &[1; 4096])));
    assert_proto(
        "another offset",
        read_by(Mode::Extended, |p, r| {
            p.data(&Request { offset: 0, ..*r }, 1, 512, &[1; 4096]);
        }),
    );
    assert_proto(
        "a chunk",
        read_by(Mode::Simple, |p, r| {
            p.mode = Mode::Structured;
            p.data(r, 1, 512, &[1; 4096]);
        }),
    );
}

#[test]
fn a_reply_that_comes_twice_is_eproto() {
    opened(
        Offer::mode(Mode::Simple),
        |mut p| {
            let (first, _) = p.request().unwrap();
            p.simple(&first, 0, &[1; 512]);
            let (second, _) = p.request().unwrap();
            p.simple(&first, 0, &[1; 512]);
            p.simple(&second, 0, &[2; 512]);
            while p.request().is_some() {}
        },
        |d| {
            assert_eq!(read(d, 0, 512).unwrap(), [1; 512]);
            assert_proto("stale", read(d, 0, 512));
            // It stays given up, and says why.
            let e = read(d, 0, 512).unwrap_err();
            assert!(e.to_string().contains("not under way"), "{e}");
        },
    );
}

#[test]
fn errors_keep_the_first_number_and_the_words() {
    let e = read_by(Mode::Structured, |p, r| {
        p.data(r, 0, 512, &[1; 100]);
        p.error(r, 0, 28, b"full of \"eels\"\n");
        p.error(r, 0, 5, b"and more");
        p.chunk(r, 1, chunk::NONE, &[]);
    });
    let e = e.unwrap_err();
    assert!(is_errno(&e, libc::ENOSPC), "{e}");
    assert!(e.to_string().contains("the server says 'full of \"eels\"\\n'"), "{e}");
    assert!(e.to_string().contains("4096 bytes at offset 512"), "{e}");
    // An error of a kind that is not known yet is an error all the same.
    let e = read_by(Mode::Extended, |p, r| {
        p.chunk(r, 1, chunk::ERROR_BIT + 99, &[0, 0, 0, 1, 0, 1, b'x', 1, 2, 3]);
    });
    assert!(is_errno(&e.unwrap_err(), libc::EPERM));
    let e = read_by(Mode::Structured, |p, r| {
        let payload = [&[0, 0, 0, 5, 0, 0][..], &600u64.to_be_bytes()].concat();
        p.chunk(r, 1, chunk::ERROR_OFFSET, &payload);
    });
    assert!(is_errno(&e.unwrap_err(), libc::EIO));
    let e = read_by(Mode::Simple, |p, r| p.simple(r, 1234, &[]));
    assert!(is_errno(&e.unwrap_err(), libc::EINVAL));
}

#[test]
fn changes_take_only_answers_without_data() {
    let scripts: [(Script, bool); 5] = [
        (|p, r| p.ok(r), true),
        (|p, r| p.simple(r, 0, &[]), true),
        (|p, r| p.data(r, 1, r.offset, &[0; 4]), false),
        (|p, r| p.hole(r, 1, r.offset, 4), false),
        (|p, r| p.chunk(r, 1, chunk::BLOCK_STATUS, &[0; 12]), false),
    ];
    for (script, good) in scripts {
        opened(
            Offer::default(),
            move |mut p| {
                let (r, payload) = p.request().unwrap();
                assert_eq!((r.kind, r.offset, payload.as_slice()), (cmd::WRITE, 8, &b"data"[..]));
                script(&mut p, &r);
                while p.request().is_some() {}
            },
            |d| {
                let result = write(d, 8, b"data");
                assert_eq!(result.is_ok(), good, "{result:?}");
                assert!(result.is_ok_and(|()| good) || !good);
            },
        );
    }
}

#[test]
fn zeroing_says_what_the_caller_allows() {
    opened(
        Offer { size: 1 << 40, ..Offer::default() },
        |mut p| {
            let mut flags = Vec::new();
            let mut lengths = Vec::new();
            while let Some((r, _)) = p.request() {
                if r.kind == cmd::WRITE_ZEROES {
                    flags.push(r.flags);
                    lengths.push(r.length);
                    if r.flags & cmd_flag::FAST_ZERO != 0 {
                        p.error(&r, 1, 95, b"slow here");
                        continue;
                    }
                }
                p.ok(&r);
            }
            assert_eq!(flags[..3], [cmd_flag::NO_HOLE, 0, cmd_flag::FAST_ZERO]);
            assert_eq!(lengths[3..].iter().sum::<u64>(), 1 << 33);
            assert!(lengths[3..].iter().all(|n| *n <= u32::MAX.into() && n % 65536 == 0));
        },
        |d| {
            d.zero(0, 512, ReqFlags::NONE).unwrap();
            d.zero(0, 512, ReqFlags::MAY_TRIM).unwrap();
            let slow = d.zero(0, 512, ReqFlags::FAST_ZERO | ReqFlags::MAY_TRIM);
            assert!(matches!(slow, Err(Error::NotSupported(_))), "{slow:?}");
            d.zero(1 << 20, 1 << 33, ReqFlags::MAY_TRIM).unwrap();
        },
    );
    let plain = flag::HAS_FLAGS | flag::SEND_WRITE_ZEROES;
    opened(Offer { flags: plain, ..Offer::default() }, drop, |d| {
        let e = d.zero(0, 512, ReqFlags::FAST_ZERO);
        assert!(matches!(e, Err(Error::NotSupported(_))), "asked though it cannot: {e:?}");
    });
}

fn with_contexts() -> Offer {
    let contexts = vec![("base:allocation", 7), ("qemu:allocation-depth", 9)];
    Offer { contexts, ..Offer::default() }
}

fn status(p: &mut Peer, r: &Request, flags: u16, id: u32, runs: &[(u32, u32)]) {
    let mut payload = id.to_be_bytes().to_vec();
    if p.mode == Mode::Extended {
        payload.extend((runs.len() as u32).to_be_bytes());
    }
    for (length, bits) in runs {
        if p.mode == Mode::Extended {
            payload.extend(u64::from(*length).to_be_bytes());
            payload.extend(u64::from(*bits).to_be_bytes());
        } else {
            payload.extend(length.to_be_bytes());
            payload.extend(bits.to_be_bytes());
        }
    }
    let wide = p.mode == Mode::Extended;
    let kind = if wide { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
    p.chunk(r, flags, kind, &payload);
}

fn extents(d: &dyn Driver, offset: u64, count: u64) -> Result<Vec<Extent>> {
    let mut some = [Extent::default(); 16];
    let mut out = ExtentList::new(&mut some);
    d.extents(offset, count, &mut out)?;
    let n = out.len();
    Ok(some[..n].to_vec())
}

#[test]
fn block_status_becomes_extents() {
    for mode in [Mode::Structured, Mode::Extended] {
        let found = opened(
            Offer { mode, ..with_contexts() },
            |mut p| {
                let (r, _) = p.request().unwrap();
                assert_eq!((r.kind, r.offset, r.length), (cmd::BLOCK_STATUS, 1000, 9000));
                // A server may tell less than was asked for, and more at the end.
                status(&mut p, &r, 0, 9, &[(1000, 1), (1000, 2), (50_000, 0)]);
                status(&mut p, &r, 1, 7, &[(1500, 0), (1500, 1), (2000, 3)]);
                let (r, _) = p.request().unwrap();
                assert_eq!((r.offset, r.length), (6000, 4000));
                status(&mut p, &r, 0, 7, &[(1 << 20, 2)]);
                status(&mut p, &r, 1, 9, &[(1 << 20, 1)]);
            },
            |d| extents(d, 1000, 9000).unwrap(),
        );
        let flags = |e: &Extent| e.flags & !Extent::OWNED;
        let told: Vec<_> = found.iter().map(|e| (e.offset, e.length, flags(e), e.depth)).collect();
        let (data, zero, here) = (Extent::DATA, Extent::ZERO, Extent::ALLOCATED);
        assert_eq!(
            told,
            [
                (1000, 1000, data | here, 0),
                (2000, 1000, data, 1),
                // A hole that does not read as zeroes is not known to be one.
                (3000, 1000, data, 0),
                (4000, 2000, zero, 0),
                (6000, 4000, zero | here, 0),
            ]
        );
    }
}

#[test]
fn a_context_is_told_as_it_is() {
    opened(
        Offer { blocks: Some((512, 512, 1 << 20)), ..with_contexts() },
        |mut p| {
            let (r, _) = p.request().unwrap();
            assert_eq!((r.offset, r.length), (512, 2048));
            status(&mut p, &r, 0, 7, &[(2048, 0)]);
            status(&mut p, &r, 1, 9, &[(512, 4), (512, 5), (1024, 6)]);
        },
        |d| {
            let mut out = Vec::new();
            d.status(b"qemu:allocation-depth", 600, 1500, 64, &mut out).unwrap();
            assert_eq!(out, [(424, 4), (512, 5), (564, 6)]);
            assert!(d.status(b"base:nothing", 0, 512, 64, &mut out).is_err());
        },
    );
}

#[test]
fn block_statuses_that_prove_nothing_are_eproto() {
    let scripts: &[(&str, Script)] = &[
        ("an unknown context", |p, r| status(p, r, 1, 8, &[(9000, 0)])),
        ("a context twice", |p, r| {
            status(p, r, 0, 7, &[(9000, 0)]);
            status(p, r, 1, 7, &[(9000, 0)]);
        }),
        ("a context missing", |p, r| status(p, r, 1, 7, &[(9000, 0)])),
        ("0 bytes", |p, r| status(p, r, 1, 7, &[(0, 0)])),
        ("no descriptors", |p, r| status(p, r, 1, 7, &[])),
        ("more than the range", |p, r| status(p, r, 1, 7, &[(9216, 0), (512, 0)])),
        ("half a descriptor", |p, r| p.chunk(r, 1, chunk::BLOCK_STATUS, &[0, 0, 0, 7, 0, 0, 1, 1])),
        ("no multiple of a block", |p, r| status(p, r, 1, 7, &[(1000, 0)])),
        ("another width", |p, r| {
            let kinds = [chunk::BLOCK_STATUS_EXT, chunk::BLOCK_STATUS];
            let kind = kinds[usize::from(p.mode == Mode::Extended)];
            p.chunk(
                r,
                1,
                kind,
                &[0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            );
        }),
        ("another number", |p, r| {
            let b = [0, 0, 0, 7, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            p.chunk(r, 1, chunk::BLOCK_STATUS_EXT, &b);
        }),
        ("a simple yes", |p, r| p.simple(r, 0, &[])),
        ("an empty yes", |p, r| p.ok(r)),
        ("data", |p, r| p.data(r, 1, 0, &[0; 512])),
    ];
    for (what, script) in scripts {
        for mode in [Mode::Structured, Mode::Extended] {
            let result = opened(
                Offer { mode, blocks: Some((512, 512, 1 << 20)), ..with_contexts() },
                move |mut p| {
                    let (r, _) = p.request().unwrap();
                    script(&mut p, &r);
                    while p.request().is_some() {}
                },
                |d| extents(d, 0, 9216),
            );
            assert_eq!(result.map_err(|e| e.kind()), Err(ErrorKind::Proto), "{what} {mode:?}");
        }
    }
}

#[test]
fn large_requests_are_cut_to_what_the_server_takes() {
    let mut disk: Vec<u8> = (0..1 << 20).map(|i: u32| (i >> 9) as u8).collect();
    let expected = disk.clone();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut p = Peer::new(theirs);
        p.negotiate(&Offer { blocks: Some((512, 4096, 65536)), ..Offer::default() });
        p.serve(&mut disk)
    });
    let target = super::super::Target::Socket(ours.into());
    let dev = Device::new(super::super::open(target, b"", &name(), settings()).unwrap());
    assert_eq!(dev.can_fua(), Can::Native);
    let mut buf = vec![0; 300_001];
    dev.read_slice(&mut buf, 777).unwrap();
    assert_eq!(buf, expected[777..300_778]);
    dev.write_slice(&[5; 1000], 100, ReqFlags::FUA).unwrap();
    dev.read_slice(&mut buf, 0).unwrap();
    assert!(buf[..100] == expected[..100] && buf[100..1100] == [5; 1000]);
    assert!(buf[1100..] == expected[1100..300_001]);
    dev.driver().close().unwrap();
    drop(dev);
    assert!(server.join().unwrap(), "no goodbye");
}

#[test]
fn beyond_the_end_are_zeroes_and_no_room() {
    opened(
        Offer { size: 1000, ..Offer::default() },
        |mut p| {
            p.serve(&mut [3; 1000]);
        },
        |d| {
            let got = read(d, 900, 200).unwrap();
            assert!(got[..100] == [3; 100] && got[100..] == [0; 100]);
            assert_eq!(read(d, 5000, 10).unwrap(), [0; 10]);
            assert!(is_errno(&write(d, 999, b"xy").unwrap_err(), libc::ENOSPC));
        },
    );
}
