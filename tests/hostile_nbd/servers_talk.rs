//! Servers that negotiate wrongly: endless, enormous, untrue, or in plain text where TLS is required.

use std::io::Write;
use std::sync::{Arc, Mutex};

use qblk::Error;
use qblk::image::list_exports;

use super::certs::Certs;
use super::peer::*;
use super::scene::alone;
use super::wire::*;

type Lie = fn(&mut Peer);

/// How opening fails when the server does this instead of answering the option.
fn at(option: u32, what: &str, lie: Lie) -> Error {
    let offer = Offer::new(Mode::Structured);
    let evil = Evil::new(move |_, p| {
        p.greet();
        if p.agree(&offer, option) {
            lie(p);
            p.silence();
        }
    });
    bounded(what, || evil.open(&[])).map(drop).expect_err(what)
}

fn listed(what: &str, lie: Lie) -> Error {
    let evil = Evil::new(move |_, p| {
        p.greet();
        assert_eq!(p.option().unwrap().0, opt::LIST);
        lie(p);
        p.silence();
    });
    bounded(what, || list_exports(evil.uri().as_bytes(), &options(&[]))).map(drop).expect_err(what)
}

fn entry(name: &[u8], description: &[u8]) -> Vec<u8> {
    [&string(name)[..], description].concat()
}

/// D13: elsewhere such a server is listened to for ever.
#[test]
fn answers_without_end() {
    alone(|| {
        // A list of 10,000 exports or 16 MiB is taken.
        costs(40 << 20, || {
            let go: &[(&str, &str, Lie)] = &[
                ("names", "more than 100 pieces", |p| {
                    let name = [&[0, 1][..], &[b'x'; 4096]].concat();
                    while p.answer(opt::GO, rep::INFO, &name) {}
                }),
                ("sizes", "more than 100 pieces", |p| {
                    while p.answer(opt::GO, rep::INFO, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]) {}
                }),
                ("unknown kinds", "more than 100 pieces", |p| {
                    while p.answer(opt::GO, rep::INFO, &[0xff; 65536]) {}
                }),
                ("contexts at GO", "has no meaning", |p| {
                    while p.answer(opt::GO, rep::META_CONTEXT, b"\0\0\0\x07base:allocation") {}
                }),
                ("exports at GO", "has no meaning", |p| {
                    while p.answer(opt::GO, rep::SERVER, b"\0\0\0\0") {}
                }),
                ("kind 0 at GO", "has no meaning", |p| while p.answer(opt::GO, 0, b"") {}),
                ("acknowledgements", "size was not told", |p| {
                    while p.answer(opt::GO, rep::ACK, b"") {}
                }),
            ];
            for &(what, part, lie) in go {
                assert_proto(&at(opt::GO, what, lie), part, what);
            }
            let e = at(opt::GO, "errors", |p| while p.answer(opt::GO, rep::ERR_UNKNOWN, b"no") {});
            assert_errno(&e, libc::ENOENT, "errors");
            let e = at(opt::STRUCTURED_REPLY, "acknowledgements", |p| {
                while p.answer(opt::STRUCTURED_REPLY, rep::ACK, b"") {}
            });
            assert_proto(&e, "a reply to option 8 came", "acknowledgements");
            let e = at(opt::SET_META_CONTEXT, "contexts", |p| {
                let context = b"\0\0\0\x07base:allocation";
                while p.answer(opt::SET_META_CONTEXT, rep::META_CONTEXT, context) {}
            });
            assert_proto(&e, "twice", "contexts");
            let e = at(opt::SET_META_CONTEXT, "contexts", |p| {
                p.answer(opt::SET_META_CONTEXT, rep::META_CONTEXT, b"\0\0\0\x07base:\x1b[2J\n");
            });
            assert_proto(&e, "not asked for", "contexts");

            let e = listed("short names", |p| while p.answer(opt::LIST, rep::SERVER, &[0; 4]) {});
            assert_proto(&e, "more than 10000 entries", "short names");
            let e = listed("long names", |p| {
                let entry = entry(&[b'n'; 4096], &[b'd'; 4096]);
                while p.answer(opt::LIST, rep::SERVER, &entry) {}
            });
            assert_proto(&e, "bytes", "long names");
            let e = listed("information", |p| while p.answer(opt::LIST, rep::INFO, &[0; 12]) {});
            assert_proto(&e, "has no meaning", "information");
        });
    });
}

/// What a reply announces is not made room for.
#[test]
fn replies_of_four_gibibytes() {
    alone(|| {
        costs_little(|| {
            let offer = Offer::new(Mode::Structured);
            for option in
                [opt::EXTENDED_HEADERS, opt::STRUCTURED_REPLY, opt::SET_META_CONTEXT, opt::GO]
            {
                for kind in [0, 1, 2, 3, 4, 5, 0x8000_0001, 0x8000_0006, u32::MAX] {
                    for length in [u32::MAX, 1 << 31, (64 << 10) + 1] {
                        let (what, offer) =
                            (format!("option {option}, kind {kind}"), offer.clone());
                        let evil = Evil::new(move |_, p| {
                            p.greet();
                            assert!(p.agree(&offer, option));
                            p.announce(option, kind, length, &[]);
                            while p.say(&[0; 16384]) {}
                        });
                        let e = bounded(&what, || evil.open(&[])).map(drop).expect_err(&what);
                        assert_proto(&e, "bytes, of at most", &what);
                    }
                }
            }
            let e = listed("a list", |p| _ = p.announce(opt::LIST, rep::SERVER, u32::MAX, &[]));
            assert_proto(&e, "bytes, of at most", "a list");
        });
    });
}

#[test]
fn exports_that_can_not_be() {
    alone(|| {
        costs_little(|| {
            // CVE-2023-5215: elsewhere a negative size. By GO and by EXPORT_NAME.
            for size in [1 << 63, u64::MAX, (1 << 63) + 4096] {
                for old in [false, true] {
                    let evil = Evil::new(move |_, p| {
                        if old {
                            p.say(b"NBDMAGICIHAVEOPT\0\x02");
                            p.take(4);
                            assert_eq!(p.option().unwrap().0, opt::EXPORT_NAME);
                            p.say(
                                &[&u64::to_be_bytes(size)[..], &ABILITIES.to_be_bytes()].concat(),
                            );
                        } else {
                            p.negotiate(&Offer { size, ..Offer::new(Mode::Structured) });
                        }
                        p.silence();
                    });
                    let e = evil.open(&[]).map(drop).unwrap_err();
                    assert_proto(&e, &size.to_string(), "the size");
                }
            }
            let lies: &[(&str, &str, Lie)] = &[
                ("no size", "size was not told", |p| _ = p.answer(opt::GO, rep::ACK, &[])),
                ("a short size", "is told in", |p| _ = p.answer(opt::GO, rep::INFO, &[0; 9])),
                ("a long size", "is told in", |p| _ = p.answer(opt::GO, rep::INFO, &[0; 13])),
                ("information of nothing", "of what kind", |p| {
                    p.answer(opt::GO, rep::INFO, &[0]);
                }),
                ("a long name", "name of the export has 4097", |p| {
                    p.answer(opt::GO, rep::INFO, &[&[0, 1][..], &[b'x'; 4097]].concat());
                }),
                ("a long description", "description of the export has 5000", |p| {
                    p.answer(opt::GO, rep::INFO, &[&[0, 2][..], &[0x1b; 5000]].concat());
                }),
                ("requests of nothing", "block size is 0", |p| {
                    p.answer(opt::GO, rep::INFO, &[0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                }),
                ("requests of 3 bytes", "power of two", |p| {
                    p.answer(opt::GO, rep::INFO, &[0, 3, 0, 0, 0, 3, 0, 0, 16, 0, 1, 0, 0, 0]);
                    p.tell_export(EXPORT_SIZE, ABILITIES);
                    p.answer(opt::GO, rep::ACK, &[]);
                }),
                ("another option's reply", "a reply to option 3 came", |p| {
                    p.answer(opt::LIST, rep::ACK, &[]);
                }),
                ("a wrong magic", "begins with", |p| _ = p.say(&[0xee; 20])),
                ("a yes with words", "acknowledgement of option 7", |p| {
                    p.answer(opt::GO, rep::ACK, b"yes");
                }),
            ];
            for &(what, part, lie) in lies {
                assert_proto(&at(opt::GO, what, lie), part, what);
            }
            for hello in
                [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"SSH-2.0-\x1b[31mxx\n0123", &[0; 64]]
            {
                let evil = Evil::new(move |_, p| {
                    p.say(hello);
                    p.silence();
                });
                assert_proto(&evil.open(&[]).map(drop).unwrap_err(), "no NBD server", "hello");
            }
            let e = listed("a name too long", |p| {
                p.answer(opt::LIST, rep::SERVER, &entry(&[b'n'; 4097], b""));
            });
            assert_proto(&e, "4097 bytes", "a name too long");
            let e = listed("a name beyond the reply", |p| {
                p.answer(opt::LIST, rep::SERVER, &[255, 255, 255, 255, b'x']);
            });
            assert_proto(&e, "longer than the reply", "a name beyond the reply");
        });
    });
}

/// What a server says when it refuses.
#[test]
fn words_of_refusals() {
    alone(|| {
        costs_little(|| {
            for words in [
                b"\x1b]0;owned\x07\x1b[2J\r\n\0\x7f".to_vec(),
                vec![0xff; 4096],
                "\u{202e}\u{9b}31m".repeat(800).into_bytes(),
                vec![b'\n'; 65536],
            ] {
                for option in [opt::STRUCTURED_REPLY, opt::SET_META_CONTEXT, opt::GO] {
                    let words = words.clone();
                    let evil = Evil::new(move |_, p| {
                        p.greet();
                        assert!(p.agree(&Offer::new(Mode::Structured), option));
                        p.answer(option, rep::ERR_TLS_REQD, &words);
                        p.silence();
                    });
                    let e = evil.open(&[]).map(drop).unwrap_err();
                    assert_errno(&e, libc::EACCES, "a refusal");
                    assert!(e.to_string().contains("it says"), "{e}");
                }
            }
        });
    });
}

/// The server hangs up after every number of bytes that a handshake and a first reply have.
#[test]
fn a_server_dies_at_every_byte() {
    alone(|| {
        costs_little(|| {
            for mode in MODES {
                let mut limit = 1;
                loop {
                    let evil = Evil::new(move |_, p| {
                        p.left = limit;
                        if p.negotiate(&Offer::new(mode)) {
                            p.serve();
                        }
                    });
                    let what = format!("{mode:?}, {limit} bytes");
                    let mut buf = [0xa5; 64];
                    let result = bounded(&what, || evil.open(&[])).and_then(|image| {
                        let result = bounded(&what, || image.read_at(&mut buf, 0));
                        close(image, &what);
                        result
                    });
                    match result {
                        Ok(()) => {
                            assert_eq!(buf[..], right(0, 64), "{what}");
                            break;
                        }
                        Err(e) => assert_errno(&e, libc::ECONNRESET, &what),
                    }
                    limit += 1;
                }
                assert!(limit > 150, "{limit} bytes were all");
            }
        });
    });
}

/// What becomes of a client that was told to use TLS, and which options it said in plain text after
/// STARTTLS (`u32::MAX`: something else).
fn tls(
    certs: &Certs,
    more: &[(&str, &str)],
    script: impl Fn(&mut Peer) + Send + Sync + 'static,
) -> (qblk::Result<(qblk::Image, Evil)>, Vec<u32>) {
    let heard: Arc<Mutex<Vec<u32>>> = Arc::default();
    let heard_too = heard.clone();
    let evil = Evil::new(move |_, p| {
        p.greet();
        assert_eq!(p.option().unwrap().0, opt::STARTTLS);
        script(p);
        // In plain text.
        while let Some(head) = p.take(16) {
            let option = if head.starts_with(b"IHAVEOPT") { be32(&head[8..]) } else { u32::MAX };
            heard_too.lock().unwrap().push(option);
        }
    });
    let uri = evil.uri().replace("nbd+", "nbds+");
    let mut all = vec![("tls-ca", certs.ca_pem()), ("tls-hostname", "localhost")];
    all.extend(more);
    let result = bounded("TLS", || evil.open_at(&uri, &all));
    let result = result.map(|image| (image, evil));
    // Where it failed the server is gone now, and has heard all.
    let heard = heard.lock().unwrap().clone();
    (result, heard)
}

/// CVE-2019-14842: elsewhere a refusal was as good as TLS.
#[test]
fn tls_is_never_done_without() {
    alone(|| {
        let certs = Certs::new();
        costs_little(|| {
            for kind in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0xffff].map(|k| 0x8000_0000u32 + k) {
                let refuse = move |p: &mut Peer| {
                    p.answer(opt::STARTTLS, kind, b"no TLS here");
                };
                let (result, heard) = tls(&certs, &[], refuse);
                let e = result.map(drop).expect_err("without TLS");
                assert_decent(&e, "refused");
                assert!(e.to_string().contains("TLS is required"), "{kind:#x}: {e}");
                assert!(
                    heard.iter().all(|o| *o == opt::ABORT),
                    "{kind:#x}: {heard:?} in plain text"
                );
            }
            let (result, heard) = tls(&certs, &[], |p| {
                p.answer(opt::STARTTLS, rep::INFO, &[0; 12]);
            });
            assert_proto(&result.map(drop).unwrap_err(), "has no meaning", "information");
            assert_eq!(heard, []);
            // One that knows of no options at all.
            let evil = Evil::new(|_, p| {
                p.say(b"NBDMAGICIHAVEOPT\0\x02");
                p.take(4);
                assert_eq!(p.take(1), None, "something in plain text");
            });
            let uri = evil.uri().replace("nbd+", "nbds+");
            let known = [("tls-ca", certs.ca_pem()), ("tls-hostname", "localhost")];
            let e = evil.open_at(&uri, &known).map(drop).unwrap_err();
            assert_errno(&e, libc::ENOTSUP, "unfixed newstyle");
        });
    });
}

#[test]
fn what_follows_starttls_is_tls_or_nothing() {
    alone(|| {
        let certs = Certs::new();
        let ack = || option_reply(opt::STARTTLS, rep::ACK, 0, &[]);
        // All that a server would say to a client which goes on in plain text.
        let plain = [
            option_reply(opt::EXTENDED_HEADERS, rep::ERR_UNSUP, 0, &[]),
            option_reply(opt::STRUCTURED_REPLY, rep::ACK, 0, &[]),
            option_reply(opt::GO, rep::INFO, 12, &[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]),
            option_reply(opt::GO, rep::ACK, 0, &[]),
        ];
        let plain = plain.concat();
        costs(24 << 20, || {
            let mut record = vec![0x16, 3, 3, 0xff, 0xff];
            record.resize(70_000, 0x16);
            for garbage in [plain.clone(), vec![0; 64], vec![0xff; 64], record, b"GET /".repeat(9)]
            {
                let bytes = [&ack()[..], &garbage].concat();
                let (result, heard) = tls(&certs, &[], move |p| _ = p.say(&bytes));
                let e = result.map(drop).expect_err("garbage");
                assert_errno(&e, libc::EPROTO, "garbage");
                assert!(heard.iter().all(|o| *o == u32::MAX), "options in plain text: {heard:?}");
            }
            // Plain text first, then a handshake as it should be.
            let config = certs.server();
            let (server, bytes) = (config.clone(), [&ack()[..], &plain].concat());
            let (result, _) = tls(&certs, &[], move |p| {
                p.say(&bytes);
                encrypt(p, &server);
                p.agree(&Offer::new(Mode::Structured), 0);
            });
            assert_errno(&result.map(drop).unwrap_err(), libc::EPROTO, "injected");
            // Plain text into the encrypted stream.
            let server = config.clone();
            let (result, _) = tls(&certs, &[], move |p| {
                p.say(&ack());
                encrypt(p, &server);
                p.option();
                let _ = p.socket().write_all(&plain);
            });
            assert_errno(&result.map(drop).unwrap_err(), libc::EPROTO, "in between");
            // It hangs up at some byte of the handshake.
            for n in [0, 1, 5, 6, 100, 500] {
                let (result, _) = tls(&certs, &[], move |p| {
                    let hello = [&[0x16, 3, 3, 2, 0, 2, 0, 1, 0xfc, 3, 3][..], &[7; 600]].concat();
                    p.say(&[&ack()[..], &hello[..n]].concat());
                    let _ = p.socket().shutdown(std::net::Shutdown::Write);
                });
                let e = result.map(drop).unwrap_err();
                assert_decent(&e, "hung up");
                assert!(e.to_string().contains("TLS"), "{n}: {e}");
            }
        });
    });
}

/// Go on through TLS.
fn encrypt(p: &mut Peer, config: &Arc<rustls::ServerConfig>) {
    let session = rustls::ServerConnection::new(config.clone()).unwrap();
    p.wire = Box::new(rustls::StreamOwned::new(session, p.socket()));
}

/// CVE-2024-7383: elsewhere the name in the certificate did not matter.
#[test]
fn the_certificate_must_be_the_servers() {
    alone(|| {
        let (certs, others) = (Certs::new(), Certs::new());
        costs(24 << 20, || {
            let script = |certs: &Certs| {
                let config = certs.server();
                move |p: &mut Peer| {
                    p.answer(opt::STARTTLS, rep::ACK, &[]);
                    encrypt(p, &config);
                    if p.agree(&Offer::new(Mode::Structured), 0) {
                        p.serve();
                    }
                }
            };
            for name in ["example.org", "localhost.example.org", "127.0.0.1", "client"] {
                let (result, _) = tls(&certs, &[("tls-hostname", name)], script(&certs));
                let e = result.map(drop).expect_err(name);
                assert_errno(&e, libc::EACCES, name);
                assert!(e.to_string().contains("certificate"), "{name}: {e}");
            }
            // The right name, and nobody that is known vouches for it.
            let (result, _) = tls(&certs, &[], script(&others));
            assert_errno(&result.map(drop).unwrap_err(), libc::EACCES, "another authority");
        });
        // Not for nothing: all of this is well with the right name.
        let config = certs.server();
        let (result, _) = tls(&certs, &[], move |p| {
            p.answer(opt::STARTTLS, rep::ACK, &[]);
            encrypt(p, &config);
            if p.agree(&Offer::new(Mode::Structured), 0) {
                p.serve();
            }
        });
        let (image, _evil) = result.unwrap();
        let mut buf = [0; 5000];
        image.read_at(&mut buf, 77).unwrap();
        assert_eq!(buf[..], right(77, 5000));
        image.close().unwrap();
    });
}
