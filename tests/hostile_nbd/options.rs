//! Negotiation with somebody who lies about lengths, asks for what there is not, or never gets on.

use super::client::{Client, contexts};
use super::scene::{OURS, Scene, alone, counts, growth};
use super::wire::*;

/// A client that may say options.
fn talk(scene: &Scene) -> Client {
    let mut c = scene.raw();
    c.greet();
    c
}

/// CVE-2017-15118 (a name of more than 256 bytes smashed the stack), CVE-2020-10761 (an error text
/// that quotes a name of 4096 bytes broke an assertion).
#[test]
fn names_of_any_length() {
    alone(|| {
        let scene = Scene::new(&[]);
        for n in [0usize, 1, 255, 256, 257, 1000, 4095, 4096, 4097, 60_000, 65_000] {
            for fill in [b'x', 0xff, b'\n', b'\'', 0] {
                let name = vec![fill; n];
                let mut c = talk(&scene);
                // The only export is not this one, whatever its length.
                let refused = if n > MAX_STRING { rep::ERR_INVALID } else { rep::ERR_UNKNOWN };
                for option in [opt::INFO, opt::GO] {
                    assert_eq!(c.verdict(option, &info_payload(&name, &[])), refused, "{n}");
                    assert_eq!(
                        c.verdict(option, &info_payload(&name, &[1, 2, 3, 9999])),
                        refused,
                        "{n}"
                    );
                }
                let payload = context_payload(&name, &["base:allocation"]);
                assert_eq!(c.verdict(opt::LIST_META_CONTEXT, &payload), refused, "{n}");
                assert_eq!(c.verdict(opt::STRUCTURED_REPLY, &[]), rep::ACK);
                assert_eq!(c.verdict(opt::SET_META_CONTEXT, &payload), refused, "{n}");
                // It goes on all the same.
                assert_eq!(c.verdict(opt::INFO, &info_payload(OURS, &[3])), rep::ACK);
                c.option(opt::EXPORT_NAME, &name);
                assert_eq!(c.hear_end(), b"");
            }
        }
        let mut c = talk(&scene);
        let long = "q".repeat(5000);
        let payload = context_payload(OURS, &[&long]);
        assert_eq!(c.verdict(opt::LIST_META_CONTEXT, &payload), rep::ERR_INVALID);
        drop(c);
        scene.end();
    });
}

/// Every length inside a payload, one more and one less than there is, and as large as can be.
#[test]
fn lengths_that_do_not_add_up() {
    alone(|| {
        let scene = Scene::new(&[]);
        let mut c = talk(&scene);
        assert_eq!(c.verdict(opt::STRUCTURED_REPLY, &[]), rep::ACK);
        let info = info_payload(OURS, &[1, 3]);
        let context = context_payload(OURS, &["base:allocation", "x"]);
        let lengths: [(u32, &[u8], &[usize]); 4] = [
            (opt::INFO, &info, &[0]),
            (opt::GO, &info, &[0]),
            (opt::LIST_META_CONTEXT, &context, &[0, 10, 14, 33]),
            (opt::SET_META_CONTEXT, &context, &[0, 10, 14, 33]),
        ];
        for (option, good, places) in lengths {
            for place in places {
                let right = be32(&good[*place..]);
                let lies =
                    [0, right - 1, right + 1, 0x7fff_ffff, 0x8000_0000, 0xffff_fffc, 0xffff_ffff];
                for lie in lies.into_iter().filter(|lie| *lie != right) {
                    let mut bad = good.to_vec();
                    bad[*place..*place + 4].copy_from_slice(&lie.to_be_bytes());
                    assert_eq!(
                        c.verdict(option, &bad),
                        rep::ERR_INVALID,
                        "{option}: {lie} at {place}"
                    );
                }
            }
            for cut in 0..good.len() {
                assert_eq!(
                    c.verdict(option, &good[..cut]),
                    rep::ERR_INVALID,
                    "{option} cut to {cut}"
                );
                if cut % 40 == 39 {
                    c = talk(&scene);
                    assert_eq!(c.verdict(opt::STRUCTURED_REPLY, &[]), rep::ACK);
                }
            }
            let longer = [good, b"x"].concat();
            assert_eq!(c.verdict(option, &longer), rep::ERR_INVALID, "{option}: one byte more");
            c = talk(&scene);
            assert_eq!(c.verdict(opt::STRUCTURED_REPLY, &[]), rep::ACK);
        }
        // The count of kinds of information.
        for lie in [0u16, 1, 3, 0x7fff, 0xffff] {
            let mut bad = info.clone();
            let at = bad.len() - 6;
            bad[at..at + 2].copy_from_slice(&lie.to_be_bytes());
            assert_eq!(c.verdict(opt::INFO, &bad), rep::ERR_INVALID, "{lie} kinds");
        }
        for option in [opt::LIST, opt::STARTTLS, opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS] {
            assert_eq!(c.verdict(option, b"x"), rep::ERR_INVALID, "{option} with a payload");
        }
        // 32,760 kinds of information that are all the same one.
        let answers = c.answers(opt::INFO, &info_payload(OURS, &vec![1; 32_760]));
        assert!(answers.len() < 8, "{} answers", answers.len());
        // 16,380 empty queries, and as many that ask for the same.
        let answers = c.answers(opt::LIST_META_CONTEXT, &context_payload(OURS, &vec![""; 16_000]));
        assert_eq!(contexts(&answers), []);
        let many = vec!["base:allocation"; 3_400];
        let answers = c.answers(opt::SET_META_CONTEXT, &context_payload(OURS, &many));
        assert_eq!(contexts(&answers).len(), 1);
        drop(c);
        scene.end();
    });
}

/// CVE-2017-15119 and D6: nothing is allocated for a length that is only announced, and none is
/// waited for without end.
#[test]
fn options_of_gigabytes() {
    alone(|| {
        let scene = Scene::new(&[]);
        let all = [
            opt::EXPORT_NAME,
            opt::ABORT,
            opt::LIST,
            opt::STARTTLS,
            opt::INFO,
            opt::GO,
            opt::STRUCTURED_REPLY,
            opt::LIST_META_CONTEXT,
            opt::SET_META_CONTEXT,
            opt::EXTENDED_HEADERS,
            0,
            4,
            12,
            0x8000_0000,
            0xffff_ffff,
        ];
        let grown = growth(|| {
            let mut silent = Vec::new();
            for option in all {
                for length in [0x0400_0000u32, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff] {
                    let mut c = talk(&scene);
                    c.say(&option_header(option, length));
                    assert_eq!(c.hear_end(), b"", "option {option} with {length} bytes");
                }
                // The longest that is taken.
                let mut c = talk(&scene);
                c.say(&option_header(option, 64 << 10));
                silent.push(c);
            }
            assert!(silent.len() == all.len());
        });
        assert!(grown < 8 << 20, "{grown} bytes more");
        // What is somewhat too long is passed over.
        let mut c = talk(&scene);
        for option in [opt::LIST, opt::INFO, 77] {
            assert_eq!(c.verdict(option, &vec![0; 300_000]), rep::ERR_TOO_BIG);
        }
        assert_eq!(c.verdict(opt::ABORT, &[]), rep::ACK);
        drop(c);
        scene.end();
    });
}

/// D6: 10 sockets that send 20 MiB of an option of 64 MiB cost 211 MB elsewhere.
#[test]
fn a_large_option_costs_nothing() {
    alone(|| {
        let scene = Scene::new(&[]);
        let grown = growth(|| {
            let mut clients: Vec<Client> = (0..10).map(|_| talk(&scene)).collect();
            for c in &mut clients {
                c.say(&option_header(opt::INFO, 64 << 20));
                let piece = vec![0; 64 << 10];
                // We are hung up on, sooner or later.
                let sent = (0..320).take_while(|_| c.try_say(&piece).is_ok()).count();
                assert!(sent < 64, "{sent} pieces of 64 KiB were taken");
            }
            scene.honest();
        });
        assert!(grown < 8 << 20, "{grown} bytes more");
        scene.end();
    });
}

/// Neither unknown options nor known ones can be said for ever.
#[test]
fn options_without_end() {
    alone(|| {
        let scene = Scene::new(&[]);
        for (option, payload) in [
            (77, vec![1; 100]),
            (opt::LIST, vec![]),
            (opt::STRUCTURED_REPLY, vec![]),
            (opt::INFO, info_payload(OURS, &[1, 2, 3])),
            (opt::STARTTLS, vec![]),
        ] {
            let mut c = talk(&scene);
            let bytes = option_bytes(option, &payload);
            let mut said = 0;
            // All answers are taken, so that nobody waits.
            while said < 10_000 && c.try_say(&bytes).is_ok() {
                said += 1;
                let Ok(mut head) = c.try_hear(20) else { break };
                while c.try_hear(be32(&head[16..]) as usize).is_ok()
                    && be32(&head[12..]) & !rep::ACK != 0
                    && be32(&head[12..]) >> 31 == 0
                {
                    let Ok(next) = c.try_hear(20) else { break };
                    head = next;
                }
            }
            assert!((32..1000).contains(&said), "option {option} was taken {said} times");
        }
        // Nobody reads the answers.
        let mut c = talk(&scene);
        let bytes = option_bytes(opt::LIST, &[]).repeat(255);
        c.say(&bytes);
        scene.honest();
        drop(c);
        scene.end();
    });
}

/// A magic number that is none, and flags that there are not.
#[test]
fn what_is_no_negotiation() {
    alone(|| {
        let scene = Scene::new(&[]);
        for flags in [4u32, 0x8000_0000, 0xffff_ffff, 0x0001_0003] {
            let mut c = scene.raw();
            c.take_greeting();
            c.say(&flags.to_be_bytes());
            assert_eq!(c.hear_end(), b"", "client flags {flags:#x}");
        }
        for bad in [
            &b"IHAVEOPU"[..],
            b"NBDMAGIC",
            &[0; 8],
            &[0xff; 8],
            &[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0],
        ] {
            let mut c = talk(&scene);
            c.say(&[bad, &[0, 0, 0, 3, 0, 0, 0, 0]].concat());
            assert_eq!(c.hear_end(), b"", "an option that begins with {bad:02x?}");
        }
        scene.end();
    });
}

/// Without fixed newstyle EXPORT_NAME is all there is.
#[test]
fn the_old_way_of_negotiating() {
    alone(|| {
        let scene = Scene::new(&[]);
        for option in [opt::LIST, opt::GO, opt::ABORT, 77] {
            let mut c = scene.raw();
            c.take_greeting();
            c.say(&[0; 4]);
            c.option(option, &[]);
            assert_eq!(c.hear_end(), b"");
        }
        let mut c = scene.raw();
        c.take_greeting();
        c.say(&[0; 4]);
        c.option(opt::EXPORT_NAME, OURS);
        let facts = c.hear(134);
        assert_eq!(&facts[10..], &[0; 124], "zeroes, for they were not declined");
        assert_eq!(c.ask(cmd::READ, 0, 0, 512, &[]).error, 0);
        drop(c);
        scene.end();
    });
}

/// What was negotiated counts for the export that it was negotiated for, and as it was at last.
#[test]
fn contexts_that_do_not_count() {
    alone(|| {
        let scene = Scene::new(&[]);
        let how = How { mode: Mode::Simple, contexts: &[], tls: None };
        let payload = context_payload(OURS, &["base:allocation"]);
        {
            let mut c = talk(&scene);
            // Contexts before structured replies.
            assert_eq!(c.verdict(opt::SET_META_CONTEXT, &payload), rep::ERR_INVALID);
            assert_eq!(c.verdict(opt::EXTENDED_HEADERS, &[]), rep::ACK);
            assert_eq!(c.verdict(opt::EXTENDED_HEADERS, &[]), rep::ERR_INVALID);
            assert_eq!(c.verdict(opt::STRUCTURED_REPLY, &[]), rep::ERR_EXT_HEADER_REQD);
            // The last choice counts, though it was a bad one: there are no contexts then.
            assert_eq!(c.verdict(opt::SET_META_CONTEXT, &payload), rep::ACK);
            let unknown = context_payload(b"nothing", &["base:allocation"]);
            assert_eq!(c.verdict(opt::SET_META_CONTEXT, &unknown), rep::ERR_UNKNOWN);
            c.go(OURS, &how);
            c.mode = Mode::Extended;
            assert_eq!(c.ask(cmd::BLOCK_STATUS, 0, 0, 512, &[]).error, EINVAL);
        }
        // Contexts of another export do not count for this one.
        scene.add_image(b"other", super::scene::memory("1M"), false);
        {
            let mut c = talk(&scene);
            assert_eq!(c.verdict(opt::STRUCTURED_REPLY, &[]), rep::ACK);
            assert_eq!(c.verdict(opt::SET_META_CONTEXT, &payload), rep::ACK);
            c.go(b"other", &how);
            c.mode = Mode::Structured;
            assert_eq!(c.ask(cmd::BLOCK_STATUS, 0, 0, 512, &[]).error, EINVAL);
        }
        scene.server.remove(b"other").unwrap();
        scene.end();
    });
}

/// Names with control characters are told as they are where they are names, and are harmless where
/// they are part of a text (`Client::answer` looks).
#[test]
fn names_that_are_no_text() {
    alone(|| {
        let scene = Scene::new(&[]);
        let names: [&[u8]; 4] =
            [b"a\nb\x1b[2J", &[0xff, 0xfe], "\u{202e}evil".as_bytes(), b"'; rm -rf /"];
        for name in names {
            scene.add_image(name, super::scene::memory("64k"), false);
        }
        let mut c = talk(&scene);
        let listed: Vec<Vec<u8>> = c
            .answers(opt::LIST, &[])
            .iter()
            .filter(|a| a.kind == rep::SERVER)
            .map(|a| a.payload[4..4 + be32(&a.payload) as usize].to_vec())
            .collect();
        for name in names {
            assert!(listed.iter().any(|n| n == name), "{listed:?}");
            assert_eq!(c.verdict(opt::INFO, &info_payload(name, &[1])), rep::ACK);
            assert_eq!(
                c.verdict(opt::INFO, &info_payload(&[name, b"\n"].concat(), &[1])),
                rep::ERR_UNKNOWN
            );
            scene.server.remove(name).unwrap();
        }
        drop(c);
        scene.end();
    });
}

/// D6 and CVE-2024-7409: 200 silent sockets are cut off when their time is over, also those that say a
/// byte now and then.
#[test]
fn silence_ends() {
    alone(|| {
        let settings = [
            ("handshake-timeout", "1"),
            ("max-connections", "300"),
            ("max-connections-per-peer", "300"),
        ];
        let scene = Scene::new(&settings);
        let begun = std::time::Instant::now();
        let mut silent: Vec<Client> = (0..200).map(|_| scene.raw()).collect();
        let held = counts();
        assert!(held.conns <= 200);
        for (i, c) in silent.iter_mut().enumerate() {
            match i % 4 {
                0 => {}
                1 => c.greet(),
                2 => c.say(&[0]),
                _ => {
                    c.greet();
                    c.say(&option_bytes(opt::GO, &info_payload(OURS, &[]))[..20]);
                }
            }
        }
        scene.honest();
        // One of them keeps talking: that gives it no more time.
        let mut talker = talk(&scene);
        while talker.try_say(&option_bytes(opt::LIST, &[])[..1]).is_ok() {
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(begun.elapsed().as_secs() < 10, "a client that says nonsense is still there");
        }
        for mut c in silent {
            c.hear_end();
        }
        let took = begun.elapsed();
        assert!(took.as_millis() > 900 && took.as_secs() < 6, "cut off after {took:?}");
        drop(talker);
        scene.end();
    });
}
