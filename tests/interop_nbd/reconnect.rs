//! Servers that die and come back, links that are cut: what the caller notices of it.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::common::*;
use super::network::{Network, SERVER};
use super::peers::*;
use qblk::block::ErrorKind;
use qblk::{Image, ReqFlags};

const SIZE: u64 = 1 << 20;
const EIO: ErrorKind = ErrorKind::Errno(libc::EIO);

/// A server of a file that can be killed and started again.
struct Mortal {
    dir: Tmp,
    program: &'static str,
    port: Option<u16>,
    running: Option<Daemon>,
}

impl Mortal {
    fn new(program: &'static str, tcp: bool) -> Self {
        let dir = Tmp::in_memory("reconnect");
        fs::File::create(dir.join("disk")).unwrap().set_len(SIZE).unwrap();
        let mut server = Self { dir, program, port: tcp.then(free_port), running: None };
        server.start();
        server
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("m.sock")
    }

    fn uri(&self) -> String {
        match self.port {
            Some(port) => format!("nbd://127.0.0.1:{port}"),
            None => unix(&self.socket(), ""),
        }
    }

    fn start(&mut self) {
        let disk = self.dir.join("disk");
        let kit: [&dyn AsRef<std::ffi::OsStr>; 2] = [&"file", &disk];
        let qemu: [&dyn AsRef<std::ffi::OsStr>; 5] = [&"-e", &"16", &"-f", &"raw", &disk];
        let args = if self.program == "nbdkit" { &kit[..] } else { &qemu };
        self.running = Some(match (self.port, self.program) {
            (Some(port), program) => on_port(&self.dir, program, port, args),
            (None, "nbdkit") => nbdkit(&self.socket(), args),
            (None, _) => qemu_nbd(&self.socket(), args),
        });
    }

    fn kill(&mut self) {
        self.running.take().unwrap().kill();
    }

    fn daemon(&self) -> &Daemon {
        self.running.as_ref().unwrap()
    }
}

const WAYS: [(&str, bool); 4] =
    [("nbdkit", false), ("nbdkit", true), ("qemu-nbd", false), ("qemu-nbd", true)];

fn timed<R>(work: impl FnOnce() -> R) -> (R, Duration) {
    let begun = Instant::now();
    let result = work();
    (result, begun.elapsed())
}

/// Try until it works: for what comes back by itself.
fn soon(what: &str, mut work: impl FnMut() -> Result<(), qblk::Error>) {
    let end = Instant::now() + Duration::from_secs(20);
    while let Err(e) = work() {
        assert!(Instant::now() < end, "{what}: {e}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_was_flushed_survives_the_server() {
    for (program, tcp) in WAYS {
        let mut server = Mortal::new(program, tcp);
        let image = open_uri(&server.uri(), &[("format", "raw")], RW);
        for n in 1..=3u8 {
            image.write_at(&[n; 5000], 100 * u64::from(n), NONE).unwrap();
            if n == 2 {
                // FUA is as good as a flush, for what it wrote.
                image.flush().unwrap();
                image.write_at(&[n; 7], 0, ReqFlags::FUA).unwrap();
            } else {
                image.flush().unwrap();
            }
            server.kill();
            let (tell, told) = mpsc::channel();
            std::thread::scope(|scope| {
                // Calls that are made meanwhile wait.
                let waiting = scope.spawn(|| {
                    tell.send(()).unwrap();
                    read_range(&image, 100 * u64::from(n), 5000)
                });
                told.recv().unwrap();
                server.start();
                assert_eq!(waiting.join().unwrap(), [n; 5000], "{program} tcp={tcp}");
            });
            image.write_at(&[n; 10], SIZE - 10, NONE).unwrap();
            image.zero(600_000, 1000, NONE).unwrap();
            image.flush().unwrap();
            assert!(!all_extents(&image, 0, SIZE, 100).is_empty());
        }
        image.close().unwrap();
        let bytes = fs::read(server.dir.join("disk")).unwrap();
        assert_eq!(bytes[SIZE as usize - 10..], [3; 10]);
    }
}

#[test]
fn what_was_not_flushed_is_told_of() {
    for (program, tcp) in WAYS {
        let mut server = Mortal::new(program, tcp);
        let image = open_uri(&server.uri(), &[("format", "raw")], RW);
        let other = image.own_context().unwrap();
        image.write_at(&[1; 512], 0, NONE).unwrap();
        image.flush().unwrap();
        image.write_at(&[2; 512], 512, NONE).unwrap();
        server.kill();
        server.start();
        // Reads go on; that something is lost is told by the flush, to all.
        assert_eq!(read_range(&image, 0, 512), [1; 512]);
        let e = image.flush().unwrap_err();
        assert_eq!(e.kind(), EIO, "{program} tcp={tcp}: {e}");
        for context in [&image, &other] {
            assert_eq!(context.write_at(&[3], 0, NONE).unwrap_err().kind(), EIO);
            assert_eq!(context.zero(0, 512, NONE).unwrap_err().kind(), EIO);
            assert_eq!(context.flush().unwrap_err().kind(), EIO);
            assert_eq!(read_range(context, 0, 512), [1; 512]);
        }
        image.reopen(None, RW).unwrap();
        image.write_at(&[4; 512], 512, NONE).unwrap();
        other.flush().unwrap();
        other.close().unwrap();
        image.close().unwrap();
    }
}

#[test]
fn a_server_that_stays_away_is_given_up() {
    for tcp in [false, true] {
        // Never tried again.
        let mut server = Mortal::new("nbdkit", tcp);
        let pairs = [("format", "raw"), ("nbd.reconnect", "0"), ("nbd.timeout", "30")];
        let image = open_uri(&server.uri(), &pairs, RW);
        image.write_at(&[1; 512], 0, ReqFlags::FUA).unwrap();
        server.kill();
        for _ in 0..3 {
            let (result, took) = timed(|| image.read_at(&mut [0; 512], 0));
            let e = result.unwrap_err();
            assert!(matches!(e.kind(), ErrorKind::Errno(_)), "{e}");
            assert!(took < Duration::from_secs(5), "{took:?}");
        }
        let (result, took) = timed(|| image.close());
        result.unwrap();
        assert!(took < Duration::from_secs(5), "{took:?}");

        // Tried again for a while; and when somebody wants something, later.
        server.start();
        let pairs = [("format", "raw"), ("nbd.reconnect", "0.5"), ("nbd.timeout", "30")];
        let image = open_uri(&server.uri(), &pairs, RW);
        server.kill();
        let (result, took) = timed(|| image.read_at(&mut [0; 512], 0));
        result.unwrap_err();
        assert!(took >= Duration::from_millis(400) && took < Duration::from_secs(8), "{took:?}");
        let (result, took) = timed(|| image.read_at(&mut [0; 512], 0));
        result.unwrap_err();
        assert!(took < Duration::from_secs(5), "{took:?}");
        server.start();
        soon("reading again", || image.read_at(&mut [0; 512], 0));
        image.write_at(&[2; 512], 0, NONE).unwrap();
        image.close().unwrap();
    }
}

#[test]
fn closing_does_not_wait_for_a_dead_server() {
    let mut server = Mortal::new("nbdkit", false);
    let pairs = [("format", "raw")];
    let (clean, dirty) = (open_uri(&server.uri(), &pairs, RW), open_uri(&server.uri(), &pairs, RW));
    let reader = open_uri(&server.uri(), &pairs, RO);
    clean.write_at(&[1; 512], 0, NONE).unwrap();
    clean.flush().unwrap();
    dirty.write_at(&[1; 512], 512, NONE).unwrap();
    server.kill();
    for (image, works) in [(clean, true), (reader, true), (dirty, false)] {
        let (result, took) = timed(|| image.close());
        assert!(took < Duration::from_secs(6), "{took:?}");
        match result {
            Ok(()) => assert!(works, "a write was lost in silence"),
            Err(e) => assert!(!works && e.kind() == EIO, "{e}"),
        }
    }
}

#[test]
fn a_server_that_hangs_is_waited_for_no_longer_than_asked() {
    for (program, tcp) in WAYS {
        let server = Mortal::new(program, tcp);
        let pairs = [("format", "raw"), ("nbd.timeout", "0.6")];
        let image = open_uri(&server.uri(), &pairs, RW);
        image.write_at(&[1; 512], 0, NONE).unwrap();
        image.flush().unwrap();
        server.daemon().freeze(true);
        for _ in 0..2 {
            let (result, took) = timed(|| image.read_at(&mut [0; 512], 0));
            let e = result.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Errno(libc::ETIMEDOUT), "{program}: {e}");
            let bounds = Duration::from_millis(500)..Duration::from_secs(6);
            assert!(bounds.contains(&took), "{took:?}");
        }
        server.daemon().freeze(false);
        soon("reading again", || image.read_at(&mut [0; 512], 0));
        image.write_at(&[2; 512], 0, NONE).unwrap();
        image.flush().unwrap();
        image.write_at(&[3; 512], 0, NONE).unwrap();
        server.daemon().freeze(true);
        // The flush of closing is bounded, too, and its failure is told.
        let (result, took) = timed(|| image.close());
        result.unwrap_err();
        assert!(took < Duration::from_secs(8), "{took:?}");
    }
}

#[test]
fn opening_waits_for_a_server_that_starts_late() {
    for tcp in [false, true] {
        let mut server = Mortal::new("nbdkit", tcp);
        server.kill();
        let _ = fs::remove_file(server.socket());
        let uri = server.uri();
        let (result, took) = timed(|| try_uri(&uri, &[], RO));
        assert!(result.is_err() && took < Duration::from_secs(5), "{took:?}");
        let (result, took) = timed(|| try_uri(&uri, &[("nbd.connect-timeout", "0.5")], RO));
        assert!(result.is_err(), "nobody is there");
        let bounds = Duration::from_millis(400)..Duration::from_secs(8);
        assert!(bounds.contains(&took), "{took:?}");
        std::thread::scope(|scope| {
            let late = scope.spawn(|| open_uri(&uri, &[("nbd.connect-timeout", "30")], RW));
            // Time for a try or two that find nobody; more or less of them does not matter.
            std::thread::sleep(Duration::from_millis(100));
            server.start();
            late.join().unwrap().write_at(&[1; 512], 0, ReqFlags::FUA).unwrap();
        });
    }
}

#[test]
fn a_server_that_says_nothing_is_left() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbd://{}", silent.local_addr().unwrap());
    let (result, took) = timed(|| try_uri(&uri, &[("nbd.timeout", "0.5")], RO));
    assert!(result.is_err() && took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn reopening_that_fails_leaves_the_device_as_it_was() {
    for tcp in [false, true] {
        let mut server = Mortal::new("nbdkit", tcp);
        let image = open_uri(&server.uri(), &[("format", "raw")], RW);
        image.write_at(&[1; 512], 0, NONE).unwrap();
        image.flush().unwrap();
        server.kill();
        image.reopen(None, RO).unwrap_err();
        server.start();
        assert_eq!(read_range(&image, 0, 512), [1; 512]);
        image.write_at(&[2; 512], 0, NONE).unwrap();
        image.flush().unwrap();
        image.reopen(None, RO).unwrap();
        assert_eq!(read_range(&image, 0, 512), [2; 512]);
        image.write_at(&[3; 512], 0, NONE).unwrap_err();
        image.close().unwrap();
    }
}

#[test]
fn a_child_that_dies_is_told_of() {
    let dir = Tmp::in_memory("reconnect-child");
    let pid = dir.join("pid");
    let argv = format!("nbdkit --exit-with-parent -P {} -s memory 1M", pid.display());
    let image = open_uri("nbd+exec:", &[("argv", &argv), ("format", "raw")], RW);
    image.write_at(&[1; 512], 0, NONE).unwrap();
    image.flush().unwrap();
    let number: i32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    // SAFETY: the server that was started for this device, which is open still.
    assert_eq!(unsafe { libc::kill(number, libc::SIGKILL) }, 0);
    let (result, took) = timed(|| image.read_at(&mut [0; 512], 0));
    result.unwrap_err();
    assert!(took < Duration::from_secs(5), "{took:?}");
    let (_, took) = timed(|| image.close());
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(!PathBuf::from(format!("/proc/{number}")).exists());
}

/// A disk at the other end of the cable, and the test at this one.
fn over_a_cable(name: &str, test: impl FnOnce(&Network, &Tmp, &str) + Send) {
    let dir = Tmp::in_memory(name);
    fs::File::create(dir.join("disk")).unwrap().set_len(SIZE).unwrap();
    let net = Network::new();
    net.as_client(|| test(&net, &dir, &format!("nbd://{SERVER}/")));
}

fn unanswered(image: &Image) {
    let (result, took) = timed(|| image.read_at(&mut [0; 512], 0));
    let e = result.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ETIMEDOUT), "{e}");
    assert!(took < Duration::from_secs(6), "{took:?}");
}

#[test]
fn a_cable_that_is_pulled_for_a_moment_is_not_noticed() {
    over_a_cable("cable-moment", |net, dir, uri| {
        let _nbdkit = net.nbdkit(dir, &[&"file", &dir.join("disk")]);
        let image = open_uri(uri, &[("format", "raw")], RW);
        image.write_at(&[1; 512], 0, NONE).unwrap();
        for n in 0..3u8 {
            let (tell, told) = mpsc::channel();
            std::thread::scope(|scope| {
                net.cut(true);
                let waiting = scope.spawn(|| {
                    tell.send(()).unwrap();
                    image.write_at(&[n; 100_000], 1000, NONE)
                });
                told.recv().unwrap();
                net.cut(false);
                waiting.join().unwrap().unwrap();
            });
            // Nothing was lost, though it was not flushed.
            assert_eq!(read_range(&image, 1000, 100_000), vec![n; 100_000]);
            image.flush().unwrap();
        }
        image.close().unwrap();
    });
}

#[test]
fn a_cable_that_is_pulled_for_long() {
    over_a_cable("cable-long", |net, dir, uri| {
        let _nbdkit = net.nbdkit(dir, &[&"file", &dir.join("disk")]);
        let pairs = [("format", "raw"), ("nbd.timeout", "0.7"), ("nbd.connections", "1")];
        let image = open_uri(uri, &pairs, RW);
        image.write_at(&[1; 512], 0, NONE).unwrap();
        image.flush().unwrap();
        // Flushed: it goes on.
        net.cut(true);
        unanswered(&image);
        unanswered(&image);
        net.cut(false);
        soon("reading again", || image.read_at(&mut [0; 512], 0));
        image.write_at(&[2; 512], 512, NONE).unwrap();
        // Not flushed: nobody knows whether that was the same server.
        net.cut(true);
        unanswered(&image);
        net.cut(false);
        soon("reading again", || image.read_at(&mut [0; 512], 0));
        assert_eq!(read_range(&image, 0, 512), [1; 512]);
        assert_eq!(image.flush().unwrap_err().kind(), EIO);
        assert_eq!(image.write_at(&[3], 0, NONE).unwrap_err().kind(), EIO);
        soon("opening again", || image.reopen(None, RW));
        image.write_at(&[4; 512], 512, NONE).unwrap();
        // Closing while it is cut ends, and tells.
        net.cut(true);
        let (result, took) = timed(|| image.close());
        result.unwrap_err();
        assert!(took < Duration::from_secs(8), "{took:?}");
    });
}

#[test]
fn a_server_that_is_replaced_while_the_cable_is_pulled() {
    over_a_cable("cable-kill", |net, dir, uri| {
        let disk = dir.join("disk");
        let mut server = net.nbdkit(dir, &[&"file", &disk]);
        let pairs = [("format", "raw"), ("nbd.timeout", "20")];
        let image = open_uri(uri, &pairs, RW);
        for n in 1..=2u8 {
            image.write_at(&[n; 4096], 0, NONE).unwrap();
            image.flush().unwrap();
            net.cut(true);
            // It dies, and its farewell does not arrive.
            server.kill();
            server = net.nbdkit(dir, &[&"file", &disk]);
            let (tell, told) = mpsc::channel();
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| {
                    tell.send(()).unwrap();
                    read_range(&image, 0, 4096)
                });
                told.recv().unwrap();
                net.cut(false);
                assert_eq!(waiting.join().unwrap(), [n; 4096]);
            });
        }
        image.close().unwrap();
    });
}

#[test]
fn our_own_server_at_the_other_end_of_the_cable() {
    over_a_cable("cable-own", |net, dir, uri| {
        let below = open_with(&dir.join("disk"), &options(&[("format", "raw")]), RW);
        let server = qblk::nbd::server::Server::new().unwrap();
        server.set("idle-timeout", b"1").unwrap();
        export(&server, "", "", &below, false);
        net.as_server(|| server.listen(uri.as_bytes()).unwrap());
        let pairs = [("format", "raw"), ("nbd.timeout", "0.7")];
        let image = open_uri(uri, &pairs, RW);
        image.write_at(&[1; 512], 0, NONE).unwrap();
        image.flush().unwrap();
        net.cut(true);
        unanswered(&image);
        net.cut(false);
        soon("reading again", || image.read_at(&mut [0; 512], 0));
        image.write_at(&[2; 512], 0, ReqFlags::FUA).unwrap();
        image.close().unwrap();
        // The server does not wait for those who were lost.
        net.cut(true);
        let (result, took) = timed(|| server.stop(Duration::from_millis(200)));
        result.unwrap();
        assert!(took < Duration::from_secs(8), "{took:?}");
        assert_eq!(read_range(&below, 0, 512), [2; 512]);
    });
}
