//! TLS: nothing of what was said before it survives it, nothing is served without it where it is
//! required, and a handshake that never ends, ends.

use std::time::{Duration, Instant};

use super::certs::Certs;
use super::client::Client;
use super::common::*;
use super::scene::{OURS, Scene, alone, growth, honest_bytes, memory};
use super::wire::*;

fn talk(scene: &Scene) -> Client {
    let mut c = scene.raw();
    c.greet();
    c
}

/// CVE-2021-3716: a man in the middle says options in plain text, and the client that then begins TLS
/// would find itself with them.
#[test]
fn what_was_said_in_plain_text_is_forgotten() {
    alone(|| {
        let certs = Certs::new();
        let mut scene = Scene::new(&certs.settings("on"));
        // Tables and names of the TLS library stay.
        scene.slack += 8 << 20;
        let config = certs.client(false);
        let payload = context_payload(OURS, &["base:allocation"]);
        for option in [opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS] {
            let mut c = talk(&scene);
            assert_eq!(c.verdict(option, &[]), rep::ACK);
            assert_eq!(c.verdict(opt::SET_META_CONTEXT, &payload), rep::ACK);
            assert_eq!(c.verdict(opt::STARTTLS, &[]), rep::ACK);
            let mut c = c.encrypt(&config);
            assert_eq!(c.verdict(opt::SET_META_CONTEXT, &payload), rep::ERR_INVALID);
            assert_eq!(c.verdict(opt::STARTTLS, &[]), rep::ERR_INVALID);
            // Simple replies: `Client` takes no others in this mode.
            c.go(OURS, &How { mode: Mode::Simple, contexts: &[], tls: None });
            assert_eq!(c.ask(cmd::BLOCK_STATUS, 0, 0, 512, &[]).error, EINVAL);
            assert_same(&c.ask(cmd::READ, 0, 0, 512, &[]).data, &honest_bytes()[..512], 0, "read");
        }
        // Contexts alone, which would come to life when structured replies are agreed on anew.
        let mut c = talk(&scene);
        assert_eq!(c.verdict(opt::STRUCTURED_REPLY, &[]), rep::ACK);
        assert_eq!(c.verdict(opt::SET_META_CONTEXT, &payload), rep::ACK);
        assert_eq!(c.verdict(opt::STARTTLS, &[]), rep::ACK);
        let mut c = c.encrypt(&config);
        c.go(OURS, &How { mode: Mode::Structured, contexts: &[], tls: None });
        assert_eq!(c.ask(cmd::BLOCK_STATUS, 0, 0, 512, &[]).error, EINVAL);
        drop(c);
        scene.honest_with(&How::new(Mode::Extended).tls(&config));
        scene.end();
    });
}

/// The other half of it: what is sent in plain text right behind STARTTLS is not taken for something
/// said through TLS.
#[test]
fn plain_text_behind_starttls_ends_the_connection() {
    alone(|| {
        let certs = Certs::new();
        let mut scene = Scene::new(&certs.settings("on"));
        scene.slack += 8 << 20;
        let config = certs.client(false);
        let go = option_bytes(opt::GO, &info_payload(OURS, &[]));
        for injected in [
            option_bytes(opt::LIST, &[]),
            option_bytes(opt::STRUCTURED_REPLY, &[]),
            option_bytes(opt::ABORT, &[]),
            go.clone(),
            [&go[..], &header(Mode::Simple, cmd::READ, 0, 1, 0, 512)].concat(),
            vec![0],
            vec![0x16],
        ] {
            let mut c = talk(&scene);
            c.say(&[&option_bytes(opt::STARTTLS, &[])[..], &injected].concat());
            assert_eq!(c.answer().kind, rep::ACK);
            let mut c = c.encrypt(&config);
            let result = c.try_say(&option_bytes(opt::LIST, &[])).and_then(|()| c.try_hear(1));
            assert!(result.is_err(), "{injected:02x?} did not disturb the handshake");
        }
        scene.honest_with(&How::new(Mode::Structured).tls(&config));
        scene.end();
    });
}

#[test]
fn nothing_without_tls_where_it_is_required() {
    alone(|| {
        let certs = Certs::new();
        let settings = certs.settings("required");
        let mut scene = Scene::new(&settings);
        scene.slack += 8 << 20;
        let config = certs.client(false);
        let how = How::new(Mode::Structured).tls(&config);
        let info = info_payload(OURS, &[1, 2, 3]);
        let context = context_payload(OURS, &["base:allocation"]);
        let mut c = talk(&scene);
        for (option, payload) in [
            (opt::LIST, &[][..]),
            (opt::INFO, &info),
            (opt::GO, &info),
            (opt::GO, b"\xff\xff\xff\xff"),
            (opt::INFO, &info_payload(b"nothing", &[])),
            (opt::STRUCTURED_REPLY, &[]),
            (opt::EXTENDED_HEADERS, &[]),
            (opt::LIST_META_CONTEXT, &context),
            (opt::SET_META_CONTEXT, &context),
            (4, &[]),
            (77, b"what?"),
        ] {
            // Whether there is such an export is not to be learnt.
            let answer = c.answers(option, payload).pop().unwrap();
            assert_eq!(answer.kind, rep::ERR_TLS_REQD, "option {option}");
        }
        // What was refused has not happened.
        assert_eq!(c.verdict(opt::STARTTLS, &[]), rep::ACK);
        let mut c = c.encrypt(&config);
        assert_eq!(c.verdict(opt::SET_META_CONTEXT, &context), rep::ERR_INVALID);
        c.go(OURS, &How { mode: Mode::Simple, contexts: &[], tls: None });
        assert_eq!(c.ask(cmd::READ, 0, 0, 512, &[]).error, 0);
        for name in [OURS, b"nothing", b""] {
            let mut c = talk(&scene);
            c.option(opt::EXPORT_NAME, name);
            assert_eq!(c.hear_end(), b"");
        }
        let mut other = talk(&scene);
        assert_eq!(other.verdict(opt::ABORT, &[]), rep::ACK);
        assert_eq!(other.hear_end(), b"");
        drop((c, other));
        scene.calm("after plain text");
        scene.honest_with(&how);
        scene.end_without();
    });
}

/// Garbage instead of a hello, and a hello that never ends: the deadline of the handshake holds.
#[test]
fn handshakes_that_lead_nowhere() {
    alone(|| {
        let certs = Certs::new();
        let settings = [&certs.settings("on")[..], &[("handshake-timeout", "1")]].concat();
        let mut scene = Scene::new(&settings);
        scene.slack += 8 << 20;
        let config = certs.client(false);
        let mut rng = Rng::new(seed("handshakes_that_lead_nowhere"));
        let tls = || {
            let mut c = talk(&scene);
            assert_eq!(c.verdict(opt::STARTTLS, &[]), rep::ACK);
            c
        };
        for n in [1, 5, 100, 5000, 70_000] {
            let mut c = tls();
            let _ = c.try_say(&rng.bytes(n));
            c.hear_end();
            // A record's header, then what is none.
            let mut c = tls();
            let _ = c.try_say(&[&[0x16, 3, 1, 0x40, 0][..], &rng.bytes(n)].concat());
            c.hear_end();
        }
        let begun = Instant::now();
        let mut stalled: Vec<Client> = (0..40).map(|_| tls()).collect();
        for (i, c) in stalled.iter_mut().enumerate() {
            // The beginning of a record of 16 KiB, and nothing, or some of it.
            let _ = c.try_say(&[0x16, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc][..i % 10]);
        }
        scene.honest();
        scene.honest_with(&How::new(Mode::Structured).tls(&config));
        // One that goes on for ever, a byte at a time, of a hello of 16 MiB.
        let mut slow = tls();
        let grown = growth(|| {
            let fragment =
                [&[0x16, 3, 1, 0x40, 0][..], &[1, 0xff, 0xff, 0xff], &[0; 16380]].concat();
            while slow.try_say(&fragment).is_ok() {
                assert!(begun.elapsed() < Duration::from_secs(8));
            }
        });
        assert!(grown < 8 << 20, "a hello of 16 MiB took {grown} bytes");
        for mut c in stalled {
            c.hear_end();
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(6), "cut off after {took:?}");
        drop(slow);
        scene.end();
    });
}

#[test]
fn a_certificate_that_is_missing() {
    alone(|| {
        let (certs, others) = (Certs::new(), Certs::new());
        let settings = [&certs.settings("required")[..], &[("tls-verify-peer", "on")]].concat();
        let mut scene = Scene::new(&settings);
        scene.slack += 8 << 20;
        for config in [certs.client(false), certs.mixed_client(&others)] {
            let mut c = talk(&scene);
            assert_eq!(c.verdict(opt::STARTTLS, &[]), rep::ACK);
            let mut c = c.encrypt(&config);
            // With TLS 1.3 the client's side of the handshake is over before it is judged.
            let ask = option_bytes(opt::LIST, &[]);
            assert!(c.try_say(&ask).and_then(|()| c.try_hear(20)).is_err(), "it was served");
        }
        scene.calm("clients without a certificate");
        scene.honest_with(&How::new(Mode::Extended).tls(&certs.client(true)));
        scene.end_without();
    });
}

/// D4: elsewhere a write that was refused broke the TLS connection, for its payload was read around
/// TLS.
#[test]
fn a_refused_write_does_not_break_tls() {
    alone(|| {
        let certs = Certs::new();
        let prepare = |s: &Scene| s.add_image(b"w", memory("1M"), false);
        let mut scene = Scene::with(&certs.settings("on"), prepare);
        scene.slack += 40 << 20;
        let config = certs.client(false);
        for mode in MODES {
            let how = How::new(mode).tls(&config);
            let next = |c: &mut Client, expected: &[u8]| {
                let reply = c.ask(cmd::READ, 0, 0, 4096, &[]);
                assert_eq!(reply.error, 0);
                assert_same(&reply.data, expected, 0, "the next request");
            };
            let mut c = Client::open(scene.sock(), OURS, &how);
            for n in [1u64, 16_000, 17_000, 300_000, 5_000_000] {
                let data = vec![9; n as usize];
                assert_eq!(c.ask(cmd::WRITE, 0, 0, n, &data).error, EPERM);
                next(&mut c, &honest_bytes()[..4096]);
            }
            let mut c = Client::open(scene.sock(), b"w", &how);
            let data = vec![9; (32 << 20) + 1];
            for (offset, n, error) in [
                ((1u64 << 20) - 100, 101, ENOSPC),
                (1 << 20, 70_000, ENOSPC),
                (u64::MAX, 1000, ENOSPC),
                (0, (32 << 20) + 1, EINVAL),
            ] {
                assert_eq!(c.ask(cmd::WRITE, FUA, offset, n as u64, &data[..n]).error, error);
                next(&mut c, &[0; 4096]);
                // A flag that means nothing.
                assert_eq!(c.ask(cmd::WRITE, DF, 0, 20_000, &data[..20_000]).error, EINVAL);
                next(&mut c, &[0; 4096]);
            }
        }
        scene.end();
    });
}

/// Requests and replies of all sizes through TLS, records cut anywhere by what carries them.
#[test]
fn records_in_pieces() {
    alone(|| {
        let certs = Certs::new();
        let mut scene = Scene::new(&certs.settings("on"));
        scene.slack += 16 << 20;
        let how = How::new(Mode::Structured).tls(&certs.client(false));
        let mut c = Client::open(scene.sock(), OURS, &how);
        c.sock().narrow();
        let mut rng = Rng::new(3);
        let mut asked = Vec::new();
        for _ in 0..200 {
            let n = [1, 100, 4096, 70_000][rng.below(4) as usize];
            let at = rng.below(4 << 20) & !0xfff;
            let n = n.min((4 << 20) - at);
            asked.push((c.send(cmd::READ, 0, at, n, &[]), at as usize, n as usize));
        }
        for _ in 0..200 {
            let reply = c.reply();
            let (_, at, n) = asked.iter().find(|a| a.0 == reply.cookie).unwrap();
            assert_same(&reply.data, &honest_bytes()[*at..at + n], *at as u64, "through TLS");
        }
        // Goodbye in the middle of a record.
        let mut sock = c.into_sock();
        std::io::Write::write_all(&mut sock, &[0x17, 3, 3, 0x20, 0, 1, 2, 3]).unwrap();
        drop(sock);
        scene.end();
    });
}
