//! Negotiations, good and bad.

use std::os::unix::net::UnixStream;

use super::super::{Listed, Settings, Target, list};
use super::peer::*;
use crate::block::{Driver, Error, ErrorKind, Result};
use crate::nbd::proto::*;
use crate::nbd::tls::{ClientTls, TlsOptions};
use crate::nbd::uri::Address;

fn property(d: &dyn Driver, key: &str) -> String {
    let all = d.describe().properties;
    let found = all.into_iter().find(|p| p.0 == key).expect("the property");
    String::from_utf8(found.1).unwrap()
}

/// Open against a script that need not come to an end; the failure.
fn refused(script: impl FnOnce(Peer) + Send) -> Error {
    connected(script, |driver| match driver {
        Ok(_) => panic!("it opened"),
        Err(e) => e,
    })
}

fn is_proto(e: &Error) -> bool {
    e.kind() == ErrorKind::Proto
}

#[test]
fn every_form_of_newstyle_reads() {
    let forms = [
        (Offer::mode(Mode::Extended), "extended"),
        (Offer::mode(Mode::Structured), "structured"),
        (Offer::mode(Mode::Simple), "simple"),
        (Offer { no_go: true, ..Offer::default() }, "structured"),
        (Offer { no_go: true, hello: hello::FIXED_NEWSTYLE, ..Offer::default() }, "structured"),
        (Offer { hello: hello::NO_ZEROES, mode: Mode::Simple, ..Offer::default() }, "simple"),
        (Offer { hello: 0, mode: Mode::Simple, ..Offer::default() }, "simple"),
    ];
    for (offer, protocol) in forms {
        let mut disk: Vec<u8> = (0..1 << 20).map(|i: u32| ((i * 7) >> 5) as u8).collect();
        let expected = disk.clone();
        opened(
            offer,
            move |mut p| assert!(p.serve(&mut disk), "no goodbye"),
            |d| {
                assert_eq!(property(d, "nbd.protocol"), protocol);
                assert_eq!(d.size(), 1 << 20);
                assert_eq!(read(d, 4097, 70_000).unwrap(), expected[4097..74_097]);
                write(d, 5, b"hello").unwrap();
                assert_eq!(read(d, 4, 7).unwrap()[1..6], *b"hello");
                d.close().unwrap();
            },
        );
    }
}

#[test]
fn block_sizes_and_flags_become_limits() {
    let offer = Offer {
        blocks: Some((512, 65536, 1 << 30)),
        flags: flag::HAS_FLAGS | flag::ROTATIONAL,
        ..Offer::default()
    };
    opened(offer, drop, |d| {
        let caps = d.caps();
        assert_eq!((caps.align, caps.optimal_io, caps.max_transfer), (512, 65536, 32 << 20));
        assert!(caps.rotational);
        assert!(!caps.flush && !caps.fua && !caps.trim && !caps.zero && !caps.cache);
    });
    opened(Offer { flags: flag::SEND_TRIM, ..Offer::default() }, drop, |d| {
        assert!(!d.caps().trim, "flags without HAS_FLAGS mean nothing");
    });
    let read_only = Offer { flags: flag::HAS_FLAGS | flag::READ_ONLY, ..Offer::default() };
    let e = refused(move |mut p| {
        p.negotiate(&read_only);
    });
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EROFS), "opened for writing: {e}");
}

#[test]
fn impossible_exports_are_refused() {
    let offers = [
        Offer { size: 1 << 63, ..Offer::default() },
        Offer { blocks: Some((3, 4096, 1 << 20)), ..Offer::default() },
        Offer { blocks: Some((0, 4096, 1 << 20)), ..Offer::default() },
        Offer { blocks: Some((1 << 17, 1 << 17, 1 << 20)), ..Offer::default() },
        Offer { blocks: Some((512, 4096, 256)), ..Offer::default() },
        Offer {
            contexts: vec![("base:allocation", 1), ("base:allocation", 2)],
            ..Offer::default()
        },
        Offer {
            contexts: vec![("base:allocation", 1), ("qemu:allocation-depth", 1)],
            ..Offer::default()
        },
    ];
    for (i, offer) in offers.into_iter().enumerate() {
        let e = refused(move |mut p| {
            p.negotiate(&offer);
        });
        assert!(is_proto(&e), "{i}: {e}");
    }
    let odd = Offer { size: 1000, blocks: Some((512, 512, 512)), ..Offer::default() };
    let e = refused(move |mut p| {
        p.negotiate(&odd);
    });
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
}

type Script = Box<dyn FnOnce(&mut Peer) + Send>;

/// A script that negotiates well up to GO, and there does something else.
fn at_go(then: impl FnOnce(&mut Peer) + Send) -> Error {
    refused(|mut p| {
        p.greet(hello::FIXED_NEWSTYLE);
        while let Some((option, _)) = p.option() {
            if option == opt::GO {
                return then(&mut p);
            }
            p.answer(option, rep::ERR_UNSUP, &[]);
        }
    })
}

#[test]
fn refusals_have_their_codes_and_words() {
    let codes = [
        (rep::ERR_UNKNOWN, libc::ENOENT),
        (rep::ERR_POLICY, libc::EACCES),
        (rep::ERR_TLS_REQD, libc::EACCES),
        (rep::ERR_SHUTDOWN, libc::ESHUTDOWN),
        (rep::ERR_INVALID, libc::EINVAL),
        (rep::ERR_BLOCK_SIZE_REQD, libc::EINVAL),
        (rep::ERR_TOO_BIG, libc::EINVAL),
        (rep::ERR_PLATFORM, libc::ENOTSUP),
        (rep::ERR_EXT_HEADER_REQD, libc::ENOTSUP),
        (rep::ERROR + 99, libc::EIO),
    ];
    for (kind, errno) in codes {
        let e = at_go(move |p| p.answer(opt::GO, kind, b"no\x1b such"));
        assert!(is_errno(&e, errno), "{kind:#x}: {e}");
        assert!(e.to_string().contains("'no\\u{1b} such'"), "{e}");
        if kind == rep::ERR_TLS_REQD {
            assert!(e.to_string().contains("nbds://"), "{e}");
        }
    }
}

#[test]
fn tls_required_by_the_server_is_said_at_the_first_option() {
    let e = refused(|mut p| {
        p.greet(hello::FIXED_NEWSTYLE);
        if let Some((option, _)) = p.option() {
            p.answer(option, rep::ERR_TLS_REQD, &[]);
        }
    });
    assert!(is_errno(&e, libc::EACCES) && e.to_string().contains("nbds://"), "{e}");
}

#[test]
fn broken_negotiations_are_eproto() {
    let scripts: Vec<(&str, Script)> = vec![
        ("a payload of 64 KiB + 1", Box::new(|p| p.answer(opt::GO, rep::INFO, &[0; 65537]))),
        ("another option's reply", Box::new(|p| p.answer(opt::LIST, rep::ACK, &[]))),
        ("an ACK with a payload", Box::new(|p| p.answer(opt::GO, rep::ACK, &[0]))),
        ("an ACK without a size", Box::new(|p| p.answer(opt::GO, rep::ACK, &[]))),
        ("a kind that means nothing", Box::new(|p| p.answer(opt::GO, rep::SERVER, &[0; 4]))),
        ("an INFO of one byte", Box::new(|p| p.answer(opt::GO, rep::INFO, &[0]))),
        ("a size of 9 bytes", Box::new(|p| p.info(info::EXPORT, &[0; 9]))),
        ("a size of 11 bytes", Box::new(|p| p.info(info::EXPORT, &[0; 11]))),
        ("block sizes of 11 bytes", Box::new(|p| p.info(info::BLOCK_SIZE, &[1; 11]))),
        ("a long name", Box::new(|p| p.info(info::NAME, &[b'x'; 4097]))),
        ("a long description", Box::new(|p| p.info(info::DESCRIPTION, &[b'x'; 4097]))),
        ("information without end", Box::new(|p| (0..102).for_each(|_| p.info_export(1, 1)))),
        ("no magic", Box::new(|p| p.send(&[7; 20]))),
    ];
    for (what, script) in scripts {
        let e = at_go(script);
        assert!(is_proto(&e), "{what}: {e}");
    }
    let e = refused(|mut p| p.send(b"SSH-2.0-OpenSSH_9.2p1\r\n"));
    assert!(is_proto(&e) && e.to_string().contains("'SSH-2.0-'"), "{e}");
    let e = refused(|mut p| {
        p.send(&[GREETING.to_be_bytes(), OLDSTYLE_MAGIC.to_be_bytes()].concat());
    });
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("oldstyle"), "{e}");
    let e = refused(|mut p| p.greet(0));
    assert!(is_errno(&e, libc::ENOENT) && e.to_string().contains("'disk'"), "{e}");
}

#[test]
fn contexts_that_were_not_asked_for_are_eproto() {
    let bad: [(&[u8], bool); 4] = [
        (b"\0\0\0\x01base:allocation", true),
        (b"\0\0\0\x01base:other", false),
        (b"\0\0", false),
        (b"\0\0\0\x01", false),
    ];
    for (payload, good) in bad {
        let e = connected(
            |mut p| {
                p.greet(hello::FIXED_NEWSTYLE);
                while let Some((option, _)) = p.option() {
                    match option {
                        opt::SET_META_CONTEXT => {
                            p.answer(option, rep::META_CONTEXT, payload);
                            p.answer(option, rep::ACK, &[]);
                        }
                        opt::GO => {
                            p.info_export(4096, 1);
                            p.answer(option, rep::ACK, &[]);
                            return;
                        }
                        _ => p.answer(option, rep::ACK, &[]),
                    }
                }
            },
            |d| d.map(drop),
        );
        assert_eq!(e.is_ok(), good, "{e:?}");
        assert!(e.is_ok() || e.is_err_and(|e| is_proto(&e)));
    }
}

#[test]
fn tls_that_is_required_is_never_done_without() {
    let to = Address::Tcp { host: "localhost".into(), port: 1 };
    let options = TlsOptions { verify_peer: Some(false), ..TlsOptions::default() };
    let tls = ClientTls::new(&options, &to).expect("TLS settings");
    let with = || Settings { tls: Some(tls.clone()), ..settings() };
    let opened: [(fn(Peer), i32); 3] = [
        (
            |mut p| {
                p.greet(hello::FIXED_NEWSTYLE);
                assert_eq!(p.option().map(|o| o.0), Some(opt::STARTTLS));
                p.answer(opt::STARTTLS, rep::ERR_UNSUP, b"not me");
            },
            libc::ENOTSUP,
        ),
        (
            |mut p| {
                p.greet(hello::FIXED_NEWSTYLE);
                assert_eq!(p.option().map(|o| o.0), Some(opt::STARTTLS));
                p.answer(opt::STARTTLS, rep::ERR_POLICY, &[]);
            },
            libc::EACCES,
        ),
        (|mut p| p.greet(0), libc::ENOTSUP),
    ];
    for (script, errno) in opened {
        let e = connected_with(with(), script, |d| d.map(drop).unwrap_err());
        assert!(is_errno(&e, errno), "{e}");
    }
}

fn listed(script: impl FnOnce(Peer) + Send) -> Result<Vec<Listed>> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|s| {
        s.spawn(move || script(Peer::new(theirs)));
        list(Target::Socket(ours.into()), &name(), settings())
    })
}

#[test]
fn exports_are_listed_within_bounds() {
    fn entry(p: &mut Peer, name: &[u8], text: &[u8]) {
        let payload = [&(name.len() as u32).to_be_bytes()[..], name, text].concat();
        p.answer(opt::LIST, rep::SERVER, &payload);
    }
    let found = listed(|mut p| {
        p.greet(hello::FIXED_NEWSTYLE);
        assert_eq!(p.option().map(|o| o.0), Some(opt::LIST));
        entry(&mut p, b"a", b"first");
        entry(&mut p, b"", b"");
        p.answer(opt::LIST, rep::ACK, &[]);
        assert_eq!(p.option().map(|o| o.0), Some(opt::ABORT));
    });
    let found = found.unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!((&*found[0].name, &*found[0].description), (&b"a"[..], &b"first"[..]));
    let bad: [fn(&mut Peer); 4] = [
        |p| (0..10_001).for_each(|_| entry(p, b"x", b"")),
        |p| entry(p, &[b'x'; 4097], b""),
        |p| p.answer(opt::LIST, rep::SERVER, &[0xff; 8]),
        |p| p.answer(opt::LIST, rep::SERVER, &[0; 3]),
    ];
    for script in bad {
        let e = listed(|mut p| {
            p.greet(hello::FIXED_NEWSTYLE);
            let _ = p.option();
            script(&mut p);
            p.answer(opt::LIST, rep::ACK, &[]);
        });
        assert!(is_proto(&e.clone().unwrap_err()), "{e:?}");
    }
    let e = listed(|mut p| {
        p.greet(hello::FIXED_NEWSTYLE);
        let _ = p.option();
        p.answer(opt::LIST, rep::ERR_POLICY, &[]);
    });
    assert!(is_errno(&e.unwrap_err(), libc::EACCES));
}
