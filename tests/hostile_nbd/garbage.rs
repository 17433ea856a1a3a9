//! Random sessions, and exports that come and go while they are used.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::certs::Certs;
use super::client::Client;
use super::common::*;
use super::scene::{AT_ONCE, OURS, Scene, alone, memory};
use super::wire::*;

/// A number as peers who mean no good choose it.
fn number(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => 0,
        1 => rng.below(4096),
        2 => 1 << rng.below(64),
        3 => (1 << rng.below(64)) - 1,
        4 => u64::MAX - rng.below(4096),
        5 => (1 << 20) - rng.below(8192),
        6 => rng.below(1 << 20),
        _ => rng.next(),
    }
}

/// Bytes that are sometimes like requests.
fn nonsense(rng: &mut Rng, mode: Mode) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..rng.range(1, 12) {
        if rng.one_in(8) {
            let n = rng.below(200) as usize;
            out.extend_from_slice(&rng.bytes(n));
            continue;
        }
        let kind = if rng.one_in(16) { rng.next() as u16 } else { rng.below(9) as u16 };
        let flags = match rng.below(4) {
            0 | 1 => 0,
            2 => rng.below(64) as u16,
            _ => rng.next() as u16,
        };
        let length = number(rng);
        let mut bytes = header(mode, kind, flags, rng.next(), number(rng), length);
        if rng.one_in(20) {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << rng.below(8);
        }
        out.extend_from_slice(&bytes);
        if kind == cmd::WRITE || flags & PAYLOAD_LEN != 0 {
            let n = rng.bytes(length.min(5000) as usize);
            out.extend_from_slice(&n);
        }
    }
    out
}

#[test]
fn random_bytes_instead_of_requests() {
    alone(|| {
        let certs = Certs::new();
        let mut scene = Scene::with(&certs.settings("on"), |s| {
            s.add_image(b"w", memory("1M"), false);
            let path = s.tmp.join("q");
            create(&path, "qcow2", 1 << 20, &[("cluster-size", "4k")]);
            s.add("q", &path, RW);
        });
        scene.slack += 24 << 20;
        let config = certs.client(false);
        let mut rng = Rng::new(seed("random_bytes_instead_of_requests"));
        for i in 0..2000 {
            let mode = rng.pick(&MODES);
            let how = if rng.one_in(10) { How::new(mode).tls(&config) } else { How::new(mode) };
            let sock = if rng.one_in(2) { scene.sock() } else { scene.handed_over() };
            let mut c = Client::open(sock, rng.pick(&[&b"w"[..], b"q", OURS]), &how);
            c.sock().patience(Duration::from_millis(20));
            let bytes = nonsense(&mut rng, mode);
            let _ = c.try_say(&bytes);
            if rng.one_in(3) {
                c.sock().half_close();
                let _ = c.try_hear(1 << 20);
            }
            drop(c);
            if i % 500 == 499 {
                scene.calm("random sessions");
                scene.honest();
            }
        }
        scene.end();
    });
}

#[test]
fn random_options() {
    alone(|| {
        let scene = Scene::new(&[]);
        let mut rng = Rng::new(seed("random_options"));
        for i in 0..1500 {
            let mut c = scene.raw();
            c.take_greeting();
            let mut out =
                if rng.one_in(8) { rng.bytes(4) } else { vec![0, 0, 0, rng.below(4) as u8] };
            for _ in 0..rng.below(12) {
                let option = if rng.one_in(8) { rng.next() as u32 } else { rng.below(13) as u32 };
                let name = rng.pick(&[OURS, b"", b"x"]);
                let mut payload = match rng.below(5) {
                    0 => Vec::new(),
                    1 => info_payload(name, &[rng.below(5) as u16, 3]),
                    2 => context_payload(name, &["base:", "base:allocation", ""]),
                    3 => name.to_vec(),
                    _ => {
                        let n = rng.below(100) as usize;
                        rng.bytes(n)
                    }
                };
                if rng.one_in(4) && !payload.is_empty() {
                    let at = rng.below(payload.len() as u64) as usize;
                    payload[at] = rng.next() as u8;
                }
                let mut bytes = option_bytes(option, &payload);
                if rng.one_in(6) {
                    let at = rng.below(bytes.len() as u64) as usize;
                    bytes[at] = rng.next() as u8;
                }
                out.extend_from_slice(&bytes);
            }
            let _ = c.try_say(&out);
            c.sock().half_close();
            if rng.one_in(2) {
                // All that it says about it.
                c.hear_end();
            }
            drop(c);
            if i % 500 == 499 {
                scene.calm("random options");
                scene.honest();
            }
        }
        scene.end();
    });
}

/// What the `n`th write writes; 0 is what was there before.
fn mark(n: u64) -> u8 {
    if n == 0 { 0 } else { (n % 251) as u8 + 1 }
}

/// An export that is removed: who uses it gets what was asked for already, or is hung up on, and
/// nobody else notices.
#[test]
fn removed_while_it_is_used() {
    alone(|| {
        let scene = Scene::new(&[]);
        for round in 0..30 {
            let image = memory("4M");
            let watch = image.context(&qblk::Options::new(), RO).unwrap();
            scene.add_image(b"gone", image, false);
            let mut clients: Vec<Client> =
                (0..6).map(|i| scene.client("gone", MODES[i % 3])).collect();
            let users: Vec<_> = clients
                .drain(..)
                .enumerate()
                .map(|(i, mut c)| {
                    std::thread::spawn(move || {
                        // How often its block was written, and that was acknowledged.
                        let mut n = 0u64;
                        loop {
                            let request = c.request(cmd::WRITE, FUA, i as u64 * 512, 512).0;
                            let data = [mark(n + 1); 512];
                            if c.try_say(&[&request[..], &data].concat()).is_err() {
                                return n;
                            }
                            match c.try_reply() {
                                Ok(reply) => assert_eq!(reply.error, 0),
                                Err(_) => return n,
                            }
                            n += 1;
                        }
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(5 + round));
            let begun = Instant::now();
            scene.server.remove(b"gone").unwrap();
            assert!(begun.elapsed() < AT_ONCE, "removing took {:?}", begun.elapsed());
            for (i, user) in users.into_iter().enumerate() {
                let n = user.join().unwrap();
                let found = read_range(&watch, i as u64 * 512, 1)[0];
                let fine = found == mark(n) || found == mark(n + 1);
                assert!(fine, "acknowledged {n}, found {found}");
            }
            let mut c = scene.raw();
            c.greet();
            assert_eq!(c.verdict(opt::INFO, &info_payload(b"gone", &[])), rep::ERR_UNKNOWN);
            drop((c, watch));
            scene.honest();
        }
        // One who takes nothing is not waited for without end.
        let image = memory("4M");
        image.write_at(&vec![1; 4 << 20], 0, NONE).unwrap();
        scene.add_image(b"gone", image, false);
        let mut deaf = scene.client("gone", Mode::Simple);
        for _ in 0..64 {
            let request = deaf.request(cmd::READ, 0, 0, 4 << 20).0;
            deaf.say(&request);
        }
        let begun = Instant::now();
        scene.server.remove(b"gone").unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5), "removing took {:?}", begun.elapsed());
        drop(deaf);
        scene.end();
    });
}

/// Exports are added and removed by several threads while clients use and list them, and the server is
/// stopped in the middle of it.
#[test]
fn exports_come_and_go() {
    alone(|| {
        let scene = Scene::new(&[]);
        let (over, served) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|s| {
            for t in 0..4u64 {
                let (scene, over) = (&scene, &over);
                s.spawn(move || {
                    let mut rng = Rng::new(t);
                    while !over.load(Relaxed) {
                        let name = [b'e', b'0' + rng.below(3) as u8];
                        let broken = Default::default();
                        let export = qblk::nbd::server::Export::new(
                            name.to_vec(),
                            Vec::new(),
                            memory("1M"),
                            broken,
                            rng.one_in(2),
                        );
                        // It may be there already, or no more, or the server is stopped.
                        let _ = scene.server.add(export.unwrap());
                        std::thread::sleep(Duration::from_millis(rng.below(5)));
                        let begun = Instant::now();
                        let _ = scene.server.remove(&[b'e', b'0' + rng.below(3) as u8]);
                        assert!(begun.elapsed() < AT_ONCE, "removing: {:?}", begun.elapsed());
                    }
                });
            }
            for t in 0..8u64 {
                let (scene, over, served) = (&scene, &over, &served);
                s.spawn(move || {
                    let mut rng = Rng::new(100 + t);
                    while !over.load(Relaxed) {
                        let Ok(sock) = Sock::unix(&scene.path()) else { return };
                        let mut c = Client::new(sock);
                        let name = [b'e', b'0' + rng.below(3) as u8];
                        let mode = rng.pick(&MODES);
                        let said = script(&name, &How::new(mode));
                        let ask = header(mode, cmd::READ, 0, 1, 0, 512);
                        if c.try_say(&[&said[..], &option_bytes(opt::LIST, &[]), &ask].concat())
                            .is_ok()
                            && let Ok(_) = c.try_hear(200)
                        {
                            served.fetch_add(1, Relaxed);
                        }
                    }
                });
            }
            for _ in 0..4 {
                std::thread::sleep(Duration::from_millis(500));
                scene.honest();
            }
            scene.server.stop(Duration::from_secs(1)).unwrap();
            over.store(true, Relaxed);
        });
        assert!(served.load(Relaxed) > 100, "{served:?} sessions only");
        scene.calm("exports that come and go");
        scene.end_without();
    });
}
