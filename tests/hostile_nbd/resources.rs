//! What clients can make the server hold: memory for what they announce and for what they do not take,
//! threads, descriptors, time.

use std::time::{Duration, Instant};

use qblk::OpenFlags;

use super::client::Client;
use super::common::*;
use super::hangups::add_packed;
use super::scene::{AT_ONCE, OURS, Scene, alone, counts, growth, memory, until};
use super::wire::*;

/// A raw file around the page cache: what is written to it is for the pool.
fn add_direct(scene: &Scene) {
    let path = scene.tmp.join("direct.raw");
    std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
    scene.add("direct", &path, RW | OpenFlags::DIRECT);
}

/// D12: elsewhere such clients cost 341 threads and 649 MiB.
#[test]
fn announced_and_never_sent() {
    alone(|| {
        let scene =
            Scene::with(&[("max-connections", "200"), ("max-connections-per-peer", "200")], |s| {
                s.add_image(b"w", memory("64M"), false);
                add_direct(s);
            });
        let mut silent: Vec<Client> = Vec::new();
        let before = counts();
        let grown = growth(|| {
            for i in 0..100 {
                let export = if i % 2 == 0 { "w" } else { "direct" };
                let mut c = scene.client(export, MODES[i % 3]);
                // 64 of them, of which the first is all that is looked at.
                for _ in 0..64 {
                    let length = if i % 4 < 2 { 32 << 20 } else { 1 << 20 };
                    let header = c.request(cmd::WRITE, 0, 0, length).0;
                    c.say(&header);
                }
                silent.push(c);
            }
            std::thread::sleep(Duration::from_millis(200));
            let now = counts();
            assert_eq!(now.conns, 100, "a thread for each connection");
            assert!(now.pool <= 16 && now.threads == before.threads, "{now:?}");
            assert!(now.fds <= before.fds + 300, "{now:?}");
            scene.honest();
        });
        assert!(grown < 24 << 20, "{grown} bytes for what was announced");
        drop(silent);
        scene.end();
    });
}

/// Clients that send most of their writes: what the server holds of them has a limit for all together.
#[test]
fn sent_but_for_the_last_byte() {
    alone(|| {
        let scene = Scene::with(&[], |s| {
            s.add_image(b"w", memory("64M"), false);
            add_direct(s);
        });
        let data = vec![5; 8 << 20];
        let mut silent: Vec<Client> = Vec::new();
        // The memory of the device itself counts, too.
        let mut first = scene.client("w", Mode::Simple);
        assert_eq!(first.ask(cmd::WRITE, 0, 0, 8 << 20, &data).error, 0);
        drop(first);
        let grown = growth(|| {
            for i in 0..80 {
                let export = if i % 2 == 0 { "w" } else { "direct" };
                let mut c = scene.client(export, MODES[i % 3]);
                let length: u64 = if i % 4 < 2 { 8 << 20 } else { 1 << 20 };
                let header = c.request(cmd::WRITE, 0, 0, length).0;
                c.say(&header);
                c.say(&data[..length as usize - 1]);
                silent.push(c);
            }
            scene.honest();
        });
        // 256 KiB of input each; 1 MiB each where it is to be written at once.
        assert!(grown < 56 << 20, "{grown} bytes for 80 writes that are not whole");
        drop((silent, data));
        let mut c = scene.client("direct", Mode::Simple);
        assert_eq!(c.ask(cmd::READ, 0, (8 << 20) - 4096, 4096, &[]).error, 0);
        drop(c);
        scene.end();
    });
}

/// D7: elsewhere an idle connection kept 1 GiB after a burst of large reads.
#[test]
fn a_burst_of_large_reads_leaves_nothing() {
    alone(|| {
        let scene = Scene::with(&[], |s| {
            add_packed(s);
            let image = memory("64M");
            image.write_at(&vec![3; 64 << 20], 0, NONE).unwrap();
            s.add_image(b"full", image, false);
        });
        let mut idle = Vec::new();
        for i in 0..24 {
            let (export, length) =
                if i % 2 == 0 { ("full", 32u64 << 20) } else { ("packed", 1 << 20) };
            let mut c = scene.client(export, MODES[i % 3]);
            for _ in 0..4 {
                let request = c.request(cmd::READ, 0, 0, length).0;
                c.say(&request);
            }
            // Taken as bytes, so that our own memory stays small.
            let mut left = 4 * (length as usize + 16);
            while left > 0 {
                let n = left.min(64 << 10);
                match c.try_hear(n) {
                    Ok(_) => left -= n,
                    Err(e) => panic!("{left} bytes are missing: {e}"),
                }
            }
            idle.push(c);
        }
        // The connections are still there, and need little.
        let most = scene.base().rss + (8 << 20);
        // Without malloc_trim(3): it has to come back by itself.
        let shrunk = until(Duration::from_secs(5), counts, |c| c.rss <= most);
        assert!(shrunk.is_ok(), "found {shrunk:?}, before it was {:?}", scene.base());
        assert_eq!(counts().conns, idle.len());
        drop(idle);
        scene.end();
    });
}

/// Clients that ask for much and take nothing: what waits for them has a limit.
#[test]
fn replies_that_nobody_takes() {
    alone(|| {
        let scene = Scene::with(&[], |s| {
            add_packed(s);
            s.add_image(b"w", memory("64M"), false);
            add_direct(s);
        });
        let mut deaf = Vec::new();
        let grown = growth(|| {
            for i in 0..60u64 {
                let export = ["packed", "packed", "direct", "w"][i as usize % 4];
                let mut c = scene.client(export, MODES[i as usize % 3]);
                for n in 0..64 {
                    let request = c.request(cmd::READ, 0, (n % 7) << 20, 1 << 20).0;
                    c.say(&request);
                }
                deaf.push(c);
            }
            scene.honest();
            std::thread::sleep(Duration::from_secs(1));
            scene.honest();
        });
        eprintln!("60 deaf clients: {} MiB", grown >> 20);
        // The setting max-memory is 64 MiB; a connection with nothing under way always gets on with
        // one request, here of 1 MiB, and keeps 256 KiB for input and for output.
        assert!(grown < (64 + 60 + 60) << 20, "{grown} bytes for what nobody takes");
        drop(deaf);
        scene.end();
    });
}

#[test]
fn limits_of_connections() {
    alone(|| {
        let mut port = 0;
        let settings = [("max-connections", "12"), ("max-connections-per-peer", "8")];
        let scene = Scene::with(&settings, |s| port = s.tcp());
        for round in 0..3 {
            // Of one user, then of one address: each has its share, and all together have theirs.
            let mut unix: Vec<Client> =
                (0..8).map(|_| scene.client("honest", Mode::Simple)).collect();
            for _ in 0..5 {
                assert_eq!(scene.raw().hear_end(), b"", "a ninth of this user");
            }
            let tcp: Vec<Client> = (0..4)
                .map(|_| Client::open(Sock::tcp(port).unwrap(), OURS, &How::new(Mode::Extended)))
                .collect();
            for _ in 0..5 {
                let mut c = Client::new(Sock::tcp(port).unwrap());
                assert_eq!(c.hear_end(), b"", "a thirteenth of all");
            }
            // Those who are in are served.
            for c in &mut unix {
                assert_eq!(c.ask(cmd::READ, 0, 0, 512, &[]).error, 0);
            }
            assert_eq!(counts().conns, 12);
            drop((unix, tcp));
            scene.calm(&format!("round {round}"));
            scene.honest();
        }
        assert!(scene.server.stats().refused >= 30);
        scene.end();
    });
}

#[test]
fn idle_clients_are_cut_off() {
    alone(|| {
        let prepare = |s: &Scene| {
            add_packed(s);
            s.add_image(b"w", memory("64M"), false);
        };
        let scene = Scene::with(&[("idle-timeout", "0.7")], prepare);
        let begun = Instant::now();
        let mut silent: Vec<Client> = Vec::new();
        for i in 0..20 {
            let mut c = scene.client(if i % 2 == 0 { "packed" } else { "w" }, MODES[i % 3]);
            match i % 5 {
                0 => {}
                1 => drop(c.ask(cmd::FLUSH, 0, 0, 0, &[])),
                2 => {
                    // The beginning of a header, of a payload.
                    let header = c.request(cmd::WRITE, 0, 0, 1 << 20).0;
                    c.say(&header[..7]);
                }
                3 => {
                    let header = c.request(cmd::WRITE, 0, 0, 1 << 20).0;
                    c.say(&[&header[..], &[0; 70_000]].concat());
                }
                _ => {
                    // Replies that are not taken.
                    for _ in 0..64 {
                        let request = c.request(cmd::READ, 0, 0, 1 << 20).0;
                        c.say(&request);
                    }
                }
            }
            silent.push(c);
        }
        // One that is not idle, though slow.
        let mut busy = scene.client("w", Mode::Structured);
        while begun.elapsed() < Duration::from_millis(2500) {
            assert_eq!(busy.ask(cmd::READ, 0, 0, 512, &[]).error, 0, "a busy client was cut off");
            std::thread::sleep(Duration::from_millis(200));
        }
        let left = until(Duration::from_secs(8), counts, |c| c.conns <= 1);
        assert!(left.is_ok(), "{left:?}: idle clients are still there");
        drop((busy, silent));
        scene.end();
    });
}

/// The process has no descriptors left: clients wait, nothing breaks, and afterwards it goes on.
#[test]
fn no_descriptors_left() {
    alone(|| {
        let scene = Scene::new(&[]);
        let mut hoard = Vec::new();
        let limit = |n: u64| {
            let limit = libc::rlimit { rlim_cur: n, rlim_max: 4096 };
            // SAFETY: the limit is ours.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
        };
        limit(64);
        while let Ok(sock) = Sock::unix(&scene.path()) {
            hoard.push(sock);
            assert!(hoard.len() < 64);
        }
        // Somebody who is in already would be served; nobody else can come in.
        std::thread::sleep(Duration::from_millis(300));
        let begun = counts_of_time();
        std::thread::sleep(Duration::from_millis(500));
        let used = counts_of_time() - begun;
        assert!(used < Duration::from_millis(250), "accepting goes round without rest: {used:?}");
        drop(hoard);
        limit(4096);
        let begun = Instant::now();
        scene.honest();
        assert!(begun.elapsed() < AT_ONCE);
        scene.end();
    });
}

/// Time that the processor spent for this process.
fn counts_of_time() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut t) };
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}
