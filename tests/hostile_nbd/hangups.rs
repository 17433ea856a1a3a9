//! Clients that go away, at any moment and in any manner, or that stay and take nothing.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use super::certs::Certs;
use super::client::Client;
use super::common::*;
use super::scene::{AT_ONCE, OURS, Scene, alone, honest_bytes, memory};
use super::wire::*;

/// Bytes of the compressed image.
const PACKED: u64 = 8 << 20;

/// What is in the compressed image: not random, or nothing would be compressed.
fn packed_bytes() -> Vec<u8> {
    (0..PACKED).map(|i| ((i >> 6) * 7 + (i >> 12)) as u8).collect()
}

/// Export "packed": a compressed image, whose reads are for the pool.
pub fn add_packed(scene: &Scene) {
    let (raw, image) = (scene.tmp.join("raw"), scene.tmp.join("packed.qcow2"));
    std::fs::write(&raw, packed_bytes()).unwrap();
    qemu_img!("convert", "-q", "-c", "-f", "raw", "-O", "qcow2", raw, image);
    std::fs::remove_file(&raw).unwrap();
    scene.add("packed", &image, RO);
}

fn prepare(scene: &Scene) {
    add_packed(scene);
    scene.add_image(b"w", memory("8M"), false);
}

/// Elsewhere a client that hung up in the middle of negotiation ended the server (CVE-2017-9524,
/// CVE-2017-10664).
#[test]
fn gone_at_every_byte_of_the_negotiation() {
    alone(|| {
        let scene = Scene::new(&[]);
        let how = How::new(Mode::Extended);
        let mut said = script(OURS, &how);
        // The other way in, and requests behind it.
        said.extend_from_slice(&header(Mode::Extended, cmd::READ, 0, 1, 0, 1 << 20));
        let mut other = vec![0, 0, 0, 3];
        other.extend_from_slice(&option_bytes(opt::LIST, &[]));
        other.extend_from_slice(&option_bytes(77, b"unknown"));
        other.extend_from_slice(&option_bytes(opt::EXPORT_NAME, OURS));
        for (said, is_heard) in [(&said, false), (&said, true), (&other, false)] {
            for cut in 0..=said.len() {
                let mut sock = if cut % 2 == 0 { scene.sock() } else { scene.handed_over() };
                sock.write_all(&said[..cut]).unwrap();
                if is_heard {
                    sock.half_close();
                    let mut all = Vec::new();
                    sock.read_to_end(&mut all).unwrap();
                    assert!(all.len() >= 18);
                }
            }
            scene.calm("hanging up in the negotiation");
            scene.honest();
        }
        scene.end();
    });
}

/// A write whose payload did not come whole has not happened.
#[test]
fn gone_at_every_byte_of_a_request() {
    alone(|| {
        let scene = Scene::with(&[], prepare);
        for mode in MODES {
            let mut c = scene.client("w", mode);
            let (mut bytes, _) = c.request(cmd::WRITE, FUA, 4096, 64);
            bytes.extend_from_slice(&[0xaa; 64]);
            drop(c);
            for cut in 0..bytes.len() {
                let mut c = scene.client("w", mode);
                c.say(&bytes[..cut]);
                if cut % 3 == 0 {
                    c.sock().half_close();
                    assert_eq!(c.hear_end(), b"");
                }
            }
            scene.calm("hanging up in a request");
            let mut c = scene.client("w", mode);
            assert_same(&c.ask(cmd::READ, 0, 4096, 64, &[]).data, &[0; 64], 4096, "cut writes");
        }
        scene.end();
    });
}

/// Requests of every kind, for both kinds of thread, in one piece.
fn many_requests(c: &mut Client, rng: &mut Rng, read_only: bool) -> Vec<u8> {
    let mut all = Vec::new();
    for _ in 0..64 {
        let at = rng.below(PACKED - (1 << 20));
        let (kind, flags, at, n) = match rng.below(10) {
            0 | 1 => (cmd::READ, 0, at, 1 << 20),
            2 => (cmd::READ, 0, 0, PACKED),
            3 | 4 => (cmd::READ, 0, at, rng.range(1, 200_000)),
            5 => (cmd::FLUSH, 0, 0, 0),
            6 => (cmd::CACHE, 0, at, 4096),
            7 if c.mode != Mode::Simple => (cmd::BLOCK_STATUS, 0, at, 1 << 20),
            8 if !read_only => (cmd::WRITE_ZEROES, 0, at, 70_000),
            9 if !read_only => (cmd::WRITE, FUA, at, 5000),
            _ => (cmd::READ, if c.mode == Mode::Simple { 0 } else { DF }, 0, 4 << 20),
        };
        all.extend_from_slice(&c.request(kind, flags, at, n).0);
        if kind == cmd::WRITE {
            all.extend_from_slice(&vec![0x77; n as usize]);
        }
    }
    all
}

/// Ask for much, and be gone.
fn go_away(sock: Sock, how: &How, rng: &mut Rng) {
    let read_only = rng.one_in(2);
    let export: &[u8] = if read_only { b"packed" } else { b"w" };
    let mut c = Client::open(sock, export, how);
    let bytes = many_requests(&mut c, rng, read_only);
    let cut = if rng.one_in(3) { rng.below(bytes.len() as u64) } else { bytes.len() as u64 };
    // The server may wait for us to read before it takes all that we say.
    c.sock().patience(Duration::from_millis(50));
    let _ = c.try_say(&bytes[..cut as usize]);
    match rng.below(5) {
        0 => drop(c),
        1 => {
            let n = rng.below(200_000) as usize;
            let _ = c.try_hear(n);
        }
        2 => c.into_sock().reset(),
        3 => {
            let _ = c.try_hear(100);
            c.into_sock().reset();
        }
        _ => {
            c.sock().half_close();
            std::thread::sleep(Duration::from_millis(rng.below(5)));
        }
    }
}

/// D11: elsewhere a client that went away with requests in flight aborted the server in 3 of 4 tries.
#[test]
fn gone_with_requests_in_flight() {
    alone(|| {
        let certs = Certs::new();
        let mut port = 0;
        let mut scene = Scene::with(&certs.settings("on"), |s| {
            prepare(s);
            port = s.tcp();
        });
        scene.slack += 40 << 20;
        let config = certs.client(false);
        let mut rng = Rng::new(seed("gone_with_requests_in_flight"));
        for i in 0..500 {
            let sock = if i % 2 == 0 { Sock::tcp(port).unwrap() } else { scene.sock() };
            let mut how = How::new(MODES[i % 3]);
            if i % 5 == 4 {
                how = how.tls(&config);
            }
            go_away(sock, &how, &mut rng);
            if i % 100 == 99 {
                scene.calm("clients that went away");
                scene.honest();
            }
        }
        scene.end();
    });
}

/// Who says that nothing more will come still gets all that was asked for, however slowly it is taken.
#[test]
fn a_half_closed_client_gets_its_replies() {
    alone(|| {
        let certs = Certs::new();
        let mut scene = Scene::with(&certs.settings("on"), prepare);
        scene.slack += 40 << 20;
        let config = certs.client(false);
        let expected = packed_bytes();
        for i in 0..12 {
            let mode = MODES[i % 3];
            let is_tls = i % 4 == 3;
            let how = if is_tls { How::new(mode).tls(&config) } else { How::new(mode) };
            let sock = scene.sock();
            sock.narrow();
            let mut c = Client::open(sock, b"packed", &how);
            let reads: Vec<u64> = (0..8).map(|n| n * 1_000_000).collect();
            let mut asked = Vec::new();
            for at in &reads {
                asked.push((c.send(cmd::READ, 0, *at, 300_000, &[]), *at as usize));
            }
            c.sock().half_close();
            // All replies are made long before they are taken.
            std::thread::sleep(Duration::from_millis(100));
            for _ in &reads {
                let reply = c.reply();
                assert_eq!(reply.error, 0);
                let at = asked.iter().find(|a| a.0 == reply.cookie).unwrap().1;
                assert_same(&reply.data, &expected[at..at + 300_000], at as u64, "half closed");
            }
            assert_eq!(c.hear_end(), b"");
        }
        scene.end();
    });
}

/// Clients that take nothing, and one that takes a byte now and then: others do not notice, and the
/// server can be stopped.
#[test]
fn clients_that_take_nothing() {
    alone(|| {
        let certs = Certs::new();
        let mut scene = Scene::with(&certs.settings("on"), prepare);
        scene.slack += 64 << 20;
        let config = certs.client(false);
        let mut rng = Rng::new(seed("clients_that_take_nothing"));
        let mut deaf = Vec::new();
        for i in 0..60 {
            let mode = MODES[i % 3];
            let how = if i % 5 == 4 { How::new(mode).tls(&config) } else { How::new(mode) };
            let export: &[u8] = if i % 2 == 0 { b"packed" } else { b"w" };
            let mut c = Client::open(scene.sock(), export, &how);
            let bytes = many_requests(&mut c, &mut rng, i % 2 == 0);
            c.sock().patience(Duration::from_millis(10));
            let _ = c.try_say(&bytes);
            deaf.push(c);
            if i % 10 == 9 {
                scene.honest();
                scene.honest_with(&How::new(Mode::Extended).tls(&config));
                // One byte of each.
                for c in &mut deaf {
                    let _ = c.try_hear(1);
                }
            }
        }
        // What they can read and write is not held up either.
        for export in ["packed", "w"] {
            let begun = Instant::now();
            let mut c = scene.client(export, Mode::Structured);
            assert_eq!(c.ask(cmd::READ, 0, 70_000, 200_000, &[]).error, 0);
            assert_eq!(c.ask(cmd::FLUSH, 0, 0, 0, &[]).error, 0);
            assert!(begun.elapsed() < AT_ONCE, "{export}: {:?}", begun.elapsed());
        }
        scene.honest();
        let begun = Instant::now();
        scene.server.stop(Duration::from_millis(500)).unwrap();
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(3), "stopping took {took:?}");
        // We did not hang up; the server did.
        scene.calm_but("deaf clients", deaf.len());
        drop(deaf);
    });
}

/// What was acknowledged before the server stopped is there, and no reply is cut short by stopping
/// as long as the client takes them.
#[test]
fn stopped_under_load() {
    alone(|| {
        for round in 0..5 {
            let scene = Scene::with(&[], prepare);
            let clients: Vec<_> = (0..8)
                .map(|i| {
                    let sock = scene.sock();
                    std::thread::spawn(move || {
                        let how = How::new(MODES[i % 3]);
                        let mut c =
                            Client::open(sock, if i % 2 == 0 { b"packed" } else { b"w" }, &how);
                        let mut done = 0u64;
                        loop {
                            let at = (done * 65_536) % PACKED;
                            for (kind, n) in
                                [(cmd::READ, 65_536), (cmd::FLUSH, 0), (cmd::CACHE, 512)]
                            {
                                let at = if kind == cmd::FLUSH { 0 } else { at };
                                let request = c.request(kind, 0, at, n).0;
                                if c.try_say(&request).is_err() {
                                    return done;
                                }
                            }
                            for _ in 0..3 {
                                match c.try_reply() {
                                    Ok(reply) => assert_eq!(reply.error, 0),
                                    Err(_) => return done,
                                }
                            }
                            done += 1;
                        }
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(100 + 30 * round));
            let begun = Instant::now();
            scene.server.stop(Duration::from_secs(2)).unwrap();
            assert!(begun.elapsed() < AT_ONCE, "stopping took {:?}", begun.elapsed());
            for client in clients {
                assert!(client.join().unwrap() > 0, "a client was never served");
            }
            assert!(Sock::unix(&scene.path()).is_err());
        }
    });
}

/// The process' own threads and descriptors, however often clients come and go.
#[test]
fn a_thousand_come_and_go() {
    alone(|| {
        let scene = Scene::with(&[], prepare);
        for i in 0..1000 {
            let mut c = Client::open(scene.sock(), OURS, &How::new(MODES[i % 3]));
            if i % 2 == 0 {
                let reply = c.ask(cmd::READ, 0, 0, 100_000, &[]);
                assert_same(&reply.data, &honest_bytes()[..100_000], 0, "a read");
            }
        }
        scene.end();
    });
}
