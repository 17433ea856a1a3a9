//! Our client with our server: all there is of the protocol, and what neither of the others has.

use std::sync::atomic::{AtomicBool, Ordering::*};
use std::time::{Duration, Instant};

use super::client_model::{exercise, exercise_together};
use super::common::*;
use super::peers::*;
use qblk::block::{Can, ErrorKind};
use qblk::image::list_exports;
use qblk::nbd::server::Server;
use qblk::{Image, Options, ReqFlags};

const SIZE: u64 = 2 << 20;

fn property(image: &Image, key: &str) -> String {
    String::from_utf8(image.property(key).unwrap().unwrap_or_default()).unwrap()
}

fn secure(uri: &str) -> String {
    uri.replacen("nbd", "nbds", 1)
}

#[test]
fn ours_and_ours_hold_what_a_plain_array_would() {
    let dir = Tmp::in_memory("own");
    let mut rng = Rng::new(seed("own"));
    let certs = Certs::new(&dir);
    let pki = text(&certs.dir);
    let files = certs.settings();
    let tls: Vec<(&str, &str)> = files.iter().map(|(k, v)| (*k, &**v)).collect();
    for (format, how, more) in [
        ("raw", "off", &[][..]),
        ("qcow2", "off", &[("max-request", "64k"), ("max-in-flight", "2"), ("threads", "2")]),
        ("raw", "on", &[]),
        ("qcow2", "required", &[("tls-verify-peer", "on")]),
    ] {
        let path = dir.join("disk");
        create(&path, format, SIZE, &[]);
        let below = open_with(&path, &options(&[("format", format)]), RW);
        let mut settings = vec![("tls", how)];
        if how != "off" {
            settings.extend(&tls);
        }
        settings.extend(more);
        let served = Served::new(&dir, &[("x", &below)], &settings);
        let mut bytes = vec![0; SIZE as usize];
        for uri in served.both("x") {
            let mut ways = Vec::new();
            if how != "required" {
                ways.push((uri.clone(), vec![]));
            }
            if how != "off" {
                let pairs = vec![("tls-certificates", &*pki), ("tls-hostname", "localhost")];
                ways.push((secure(&uri), pairs));
            }
            for (uri, mut pairs) in ways {
                for connections in ["1", "7"] {
                    pairs.push(("nbd.connections", connections));
                    let image = open_uri(&uri, &pairs, RW);
                    pairs.pop();
                    assert_eq!(property(&image, "nbd.protocol"), "extended");
                    assert_eq!(property(&image, "nbd.connections"), connections);
                    let info = image.info().unwrap();
                    assert_eq!((info.can_zero, info.can_extents), (Can::Native, Can::Native));
                    exercise(&image, &mut bytes, &mut rng, 40);
                    exercise_together(&image, &mut bytes, &mut rng, 6);
                    image.close().unwrap();
                    assert_same(&read_all(&below), &bytes, 0, "behind the server");
                }
            }
        }
        served.stop();
        below.close().unwrap();
        if format == "qcow2" {
            check_clean(&path);
        }
        check_same(&path, format, &bytes, &dir.join("scratch"));
    }
}

#[test]
fn what_is_refused_says_why() {
    let dir = Tmp::in_memory("own-refuse");
    let certs = Certs::new(&dir);
    let files = certs.settings();
    let mut settings: Vec<(&str, &str)> = files.iter().map(|(k, v)| (*k, &**v)).collect();
    settings.push(("tls", "required"));
    let below = raw_file(&dir.join("raw"), SIZE);
    let tls = Served::new(&dir, &[("x", &below)], &settings);
    let plain = Served::new(&dir, &[("x", &below)], &[]);
    export(&plain.server, "ro", "read only", &below, true);
    let pki = text(&certs.dir);
    for uri in tls.both("x") {
        let e = uri_error(&uri, &[], RO);
        assert!(e.to_string().contains("TLS"), "{e}");
        let pairs = [("tls-hostname", "localhost")];
        let e = uri_error(&secure(&uri), &pairs, RO);
        assert!(e.to_string().to_lowercase().contains("certificate"), "{e}");
    }
    let named = [("tls-certificates", &*pki), ("tls-hostname", "localhost")];
    for uri in plain.both("x") {
        let e = uri_error(&secure(&uri), &named, RO);
        assert!(e.to_string().contains("TLS"), "{e}");
    }
    for uri in plain.both("ro") {
        let e = uri_error(&uri, &[], RW);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EROFS), "{e}");
        assert_eq!(read_range(&open_uri(&uri, &[], RO), 0, 10), [0; 10]);
    }
    for uri in plain.both("none") {
        let e = uri_error(&uri, &[], RO);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    }
    for (uri, pairs) in [(plain.unix(""), &[][..]), (secure(&tls.tcp("")), &named)] {
        let list = list_exports(uri.as_bytes(), &options(pairs)).unwrap();
        let mut names: Vec<_> = list.iter().map(|l| String::from_utf8_lossy(&l.name)).collect();
        names.sort();
        assert_eq!(names, if pairs.is_empty() { &["ro", "x"][..] } else { &["x"] });
    }
}

#[test]
fn extents_are_those_behind_the_server() {
    let dir = Tmp::new("own-extents");
    let mut rng = Rng::new(seed("own_extents"));
    sparse_bytes(&dir.join("base"), SIZE, &mut rng);
    let pairs = [("backing-file", "base"), ("backing-fmt", "raw")];
    create(&dir.join("top"), "qcow2", SIZE, &pairs);
    let top = open(&dir.join("top"), RW);
    for _ in 0..8 {
        let n = rng.range(1, 100_000);
        let at = rng.below(SIZE - n);
        match rng.below(3) {
            0 => top.zero(at, n, NONE).unwrap(),
            _ => top.write_at(&rng.bytes(n as usize), at, NONE).unwrap(),
        }
    }
    let served = Served::new(&dir, &[("", &top)], &[]);
    let what = |image: &Image, bite| -> Vec<(u64, u32, u32)> {
        let mut runs: Vec<(u64, u32, u32)> = Vec::new();
        for e in all_extents(image, 0, SIZE, bite) {
            // Where zeroes come from that nobody has is told by no context.
            let allocated = e.flags & 1;
            let depth = if e.flags & 2 != 0 && allocated == 0 { 0 } else { e.depth };
            let flags = if e.flags & 2 != 0 && allocated == 0 { 2 } else { e.flags & 7 };
            match runs.last_mut() {
                Some(last) if (last.1, last.2) == (flags, depth) => last.0 += e.length,
                _ => runs.push((e.length, flags, depth)),
            }
        }
        runs
    };
    for uri in served.both("") {
        let far = open_uri(&uri, &[], RO);
        for bite in [1, 5, 1000] {
            assert_eq!(what(&far, bite), what(&top, bite));
        }
    }
}

#[test]
fn two_clients_see_each_others_writes() {
    let dir = Tmp::in_memory("own-two");
    let below = raw_file(&dir.join("raw"), SIZE);
    let served = Served::new(&dir, &[("", &below)], &[]);
    let (a, b) = (open_uri(&served.unix(""), &[], RW), open_uri(&served.tcp(""), &[], RW));
    for n in 0..200u64 {
        let (x, y) = if n % 2 == 0 { (&a, &b) } else { (&b, &a) };
        x.write_at(&n.to_be_bytes(), 8 * n, ReqFlags::FUA).unwrap();
        assert_eq!(read_range(y, 8 * n, 8), n.to_be_bytes());
    }
    a.flush().unwrap();
    b.close().unwrap();
    a.close().unwrap();
}

#[test]
fn a_server_that_stops_and_comes_back() {
    let dir = Tmp::in_memory("own-stop");
    let below = raw_file(&dir.join("raw"), SIZE);
    let uri = unix(&dir.join("own.sock"), "");
    let start = || {
        let server = Server::new().unwrap();
        export(&server, "", "", &below, false);
        server.listen(uri.as_bytes()).unwrap();
        server
    };
    let mut server = start();
    let image = open_uri(&uri, &[], RW);
    image.write_at(&[1; 4096], 0, NONE).unwrap();
    image.flush().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Reads go on all the time, as if nothing happened.
        let reader = scope.spawn(|| {
            let mut n = 0;
            while !stop.load(Relaxed) {
                assert_eq!(read_range(&image, 0, 4096), [1; 4096]);
                n += 1;
            }
            n
        });
        for _ in 0..5 {
            let before = server.stats().reads;
            let end = Instant::now() + Duration::from_secs(20);
            while server.stats().reads < before + 20 {
                assert!(Instant::now() < end, "no reads arrive");
                std::thread::yield_now();
            }
            server.stop(Duration::from_secs(5)).unwrap();
            server = start();
        }
        let before = server.stats().reads;
        let end = Instant::now() + Duration::from_secs(20);
        while server.stats().reads < before + 5 {
            assert!(Instant::now() < end, "no reads arrive");
            std::thread::yield_now();
        }
        stop.store(true, Relaxed);
        assert!(reader.join().unwrap() > 100);
    });
    image.write_at(&[2; 100], 100, NONE).unwrap();
    image.close().unwrap();
    assert_eq!(read_range(&below, 99, 2), [1, 2]);
}

#[test]
fn an_export_that_changed_is_not_what_it_was() {
    let dir = Tmp::in_memory("own-stale");
    let below = raw_file(&dir.join("raw"), SIZE);
    let server = Server::new().unwrap();
    let uri = unix(&dir.join("own.sock"), "");
    export(&server, "", "", &below, false);
    server.listen(uri.as_bytes()).unwrap();
    let image = open_uri(&uri, &[("nbd.timeout", "20"), ("format", "raw")], RW);
    image.write_at(&[1; 512], 0, NONE).unwrap();
    image.flush().unwrap();
    below.resize(2 * SIZE, &Options::new(), false).unwrap();
    server.remove(b"").unwrap();
    export(&server, "", "", &below, false);
    let e = image.read_at(&mut [0; 512], 0).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ESTALE), "{e}");
    assert!(e.to_string().contains("size"), "{e}");
    drop(image);
    assert_eq!(open_uri(&uri, &[], RO).size().unwrap(), 2 * SIZE);
}
