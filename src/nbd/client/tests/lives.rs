//! Connections that are lost, made again, or not; what that means for what was written.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::super::child::{Child, Dir};
use super::super::{Settings, Target, open};
use super::peer::*;
use crate::block::{Driver, Error, OneIov, ReqFlags, Result};
use crate::nbd::proto::*;
use crate::nbd::uri::Address;

/// A server that can be killed, connection by connection or whole, and comes back.
struct Server {
    dir: Dir,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    disk: Mutex<Vec<u8>>,
    offer: Mutex<Offer>,
    connections: Mutex<Vec<UnixStream>>,
    /// Requests of this kind are read and not answered: the connection is closed instead, once.
    trap: Mutex<Option<u16>>,
    /// What was asked for.
    seen: Mutex<Vec<u16>>,
    stop: AtomicBool,
}

impl Server {
    fn start(offer: Offer) -> Self {
        let dir = Dir::new(&name()).unwrap();
        let shared = Arc::new(Shared {
            disk: Mutex::new(vec![0; offer.size as usize]),
            offer: Mutex::new(offer),
            connections: Mutex::default(),
            trap: Mutex::default(),
            seen: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let mut server = Self { dir, shared, thread: None };
        server.listen();
        server
    }

    fn listen(&mut self) {
        let listener = UnixListener::bind(self.dir.0.join("sock")).unwrap();
        let shared = self.shared.clone();
        shared.stop.store(false, SeqCst);
        self.thread = Some(std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stop.load(SeqCst) {
                    return;
                }
                let (stream, shared) = (stream.unwrap(), shared.clone());
                shared.connections.lock().unwrap().push(stream.try_clone().unwrap());
                std::thread::spawn(move || shared.serve(Peer::new(stream)));
            }
        }));
    }

    /// Stop listening. Connections stay.
    fn deafen(&mut self) {
        self.shared.stop.store(true, SeqCst);
        let path = self.dir.0.join("sock");
        drop(UnixStream::connect(&path));
        self.thread.take().unwrap().join().unwrap();
        std::fs::remove_file(path).unwrap();
    }

    /// Cut connections by their number.
    fn cut(&self, which: impl Fn(usize) -> bool) {
        for (i, c) in self.shared.connections.lock().unwrap().iter().enumerate() {
            if which(i) {
                let _ = c.shutdown(Shutdown::Both);
            }
        }
    }

    fn trap(&self, kind: u16) {
        *self.shared.trap.lock().unwrap() = Some(kind);
    }

    fn connections(&self) -> usize {
        self.shared.connections.lock().unwrap().len()
    }

    fn open(&self, settings: Settings) -> Result<Box<dyn Driver>> {
        let address = Address::Unix(self.dir.0.join("sock"));
        open(Target::Address(address), b"disk", &name(), settings)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.deafen();
        }
        self.cut(|_| true);
    }
}

impl Shared {
    fn serve(&self, mut p: Peer) {
        let offer = self.offer.lock().unwrap().clone();
        if !p.negotiate(&offer) {
            return;
        }
        while let Some((r, payload)) = p.request() {
            self.seen.lock().unwrap().push(r.kind);
            let mut trap = self.trap.lock().unwrap();
            if *trap == Some(r.kind) {
                *trap = None;
                // Clones of the socket keep it open.
                let _ = p.stream.shutdown(Shutdown::Both);
                return;
            }
            drop(trap);
            let range = r.offset as usize..(r.offset + r.length) as usize;
            let mut disk = self.disk.lock().unwrap();
            match r.kind {
                cmd::READ => {
                    let data = disk[range].to_vec();
                    drop(disk);
                    p.data(&r, 1, r.offset, &data);
                }
                cmd::WRITE => {
                    disk[range].copy_from_slice(&payload);
                    p.ok(&r);
                }
                cmd::DISC => return,
                _ => p.ok(&r),
            }
        }
    }
}

fn patient() -> Settings {
    Settings { reconnect: Duration::from_secs(20), connections: Some(1), ..settings() }
}

fn multi() -> Offer {
    let offer = Offer::default();
    Offer { flags: offer.flags | flag::CAN_MULTI_CONN, ..offer }
}

fn kinds(server: &Server) -> Vec<u16> {
    server.shared.seen.lock().unwrap().clone()
}

#[test]
fn what_was_not_acknowledged_is_sent_again() {
    let server = Server::start(Offer::default());
    let d = server.open(patient()).unwrap();
    for kind in [cmd::READ, cmd::WRITE, cmd::WRITE_ZEROES, cmd::TRIM, cmd::CACHE, cmd::FLUSH] {
        d.flush().unwrap();
        server.trap(kind);
        match kind {
            cmd::READ => drop(read(&*d, 0, 512).unwrap()),
            cmd::WRITE => write(&*d, 0, b"again").unwrap(),
            cmd::WRITE_ZEROES => d.zero(512, 512, ReqFlags::NONE).unwrap(),
            cmd::TRIM => d.trim(512, 512, ReqFlags::NONE).unwrap(),
            cmd::CACHE => d.cache(512, 512).unwrap(),
            _ => d.flush().unwrap(),
        }
        assert!(kinds(&server).iter().rev().take_while(|k| **k == kind).count() >= 2);
    }
    assert_eq!(server.connections(), 7);
    assert_eq!(&server.shared.disk.lock().unwrap()[..5], b"again");
    d.close().unwrap();
}

#[test]
fn acknowledged_writes_that_no_flush_covered_are_told_of() {
    let server = Server::start(Offer::default());
    let d = server.open(patient()).unwrap();
    write(&*d, 0, b"precious").unwrap();
    server.cut(|_| true);
    // Reads go on.
    read(&*d, 0, 512).unwrap();
    assert_eq!(server.connections(), 2);
    let e = d.flush().unwrap_err();
    assert!(is_errno(&e, libc::EIO) && e.to_string().contains("may be lost"), "{e}");
    assert!(matches!(write(&*d, 0, b"more"), Err(Error::Failed { .. })));
    assert!(d.zero(0, 1, ReqFlags::NONE).is_err() && d.trim(0, 1, ReqFlags::NONE).is_err());
    assert!(
        is_errno(&d.flush().unwrap_err(), libc::EIO),
        "it does not become true by asking twice"
    );
    read(&*d, 0, 512).unwrap();
}

#[test]
fn a_flush_that_was_under_way_fails_with_what_it_covers() {
    let server = Server::start(Offer::default());
    let d = server.open(patient()).unwrap();
    write(&*d, 0, b"precious").unwrap();
    server.trap(cmd::FLUSH);
    assert!(is_errno(&d.flush().unwrap_err(), libc::EIO));
    assert!(matches!(write(&*d, 0, b"more"), Err(Error::Failed { .. })));
}

#[test]
fn closing_tells_of_lost_writes() {
    let server = Server::start(Offer::default());
    let d = server.open(patient()).unwrap();
    write(&*d, 0, b"precious").unwrap();
    server.cut(|_| true);
    read(&*d, 0, 512).unwrap();
    assert!(is_errno(&d.close().unwrap_err(), libc::EIO));
}

#[test]
fn what_is_on_stable_storage_is_not_lost() {
    let server = Server::start(Offer::default());
    let d = server.open(patient()).unwrap();
    write(&*d, 0, b"flushed").unwrap();
    d.flush().unwrap();
    d.write(OneIov::src(b"forced").iov(), 512, ReqFlags::FUA).unwrap();
    server.cut(|_| true);
    read(&*d, 0, 512).unwrap();
    d.flush().unwrap();
    // Not acknowledged when the connection went: sent again, and flushed after.
    server.trap(cmd::WRITE);
    write(&*d, 0, b"again").unwrap();
    d.flush().unwrap();
    d.close().unwrap();
}

#[test]
fn a_failed_flush_ends_writing() {
    opened(
        Offer::default(),
        |mut p| {
            let (r, _) = p.request().unwrap();
            p.error(&r, 1, 5, b"disk on fire");
            while p.request().is_some() {}
        },
        |d| {
            let e = d.flush().unwrap_err();
            assert!(is_errno(&e, libc::EIO) && e.to_string().contains("'disk on fire'"), "{e}");
            assert!(matches!(write(d, 0, b"x"), Err(Error::Failed { .. })));
        },
    );
}

#[test]
fn closing_flushes_and_says_goodbye() {
    let server = Server::start(Offer::default());
    let d = server.open(patient()).unwrap();
    write(&*d, 0, b"last").unwrap();
    d.close().unwrap();
    // Whoever opens it anew may fail, and come back to this one.
    read(&*d, 0, 1).unwrap();
    drop(d);
    let until = Instant::now() + Duration::from_secs(10);
    while kinds(&server) != [cmd::WRITE, cmd::FLUSH, cmd::READ, cmd::DISC] && Instant::now() < until
    {
        std::thread::yield_now();
    }
    assert_eq!(kinds(&server), [cmd::WRITE, cmd::FLUSH, cmd::READ, cmd::DISC]);
}

#[test]
fn without_reconnecting_a_loss_is_the_reason_of_every_failure() {
    let server = Server::start(Offer::default());
    let d = server.open(Settings { reconnect: Duration::ZERO, ..patient() }).unwrap();
    server.cut(|_| true);
    for _ in 0..3 {
        let e = read(&*d, 0, 512).unwrap_err();
        assert!(e.to_string().contains("lost") && e.to_string().contains("hung up"), "{e}");
    }
    assert_eq!(server.connections(), 1);
}

#[test]
fn when_the_time_is_over_calls_fail_until_the_server_is_back() {
    let mut server = Server::start(Offer::default());
    let window = Duration::from_millis(100);
    let d = server.open(Settings { reconnect: window, ..patient() }).unwrap();
    server.deafen();
    server.cut(|_| true);
    let e = read(&*d, 0, 512).unwrap_err();
    assert!(e.to_string().contains("lost") && e.to_string().contains("connecting"), "{e}");
    let begin = Instant::now();
    assert!(read(&*d, 0, 512).is_err());
    assert!(begin.elapsed() < Duration::from_millis(900), "at once");
    server.listen();
    let until = Instant::now() + Duration::from_secs(15);
    while read(&*d, 0, 512).is_err() {
        assert!(Instant::now() < until, "it never came back");
        std::thread::sleep(Duration::from_millis(20));
    }
    d.close().unwrap();
}

#[test]
fn waiting_for_a_connection_is_part_of_the_time() {
    let mut server = Server::start(Offer::default());
    let timeout = Some(Duration::from_millis(300));
    let d = server.open(Settings { timeout, ..patient() }).unwrap();
    server.deafen();
    server.cut(|_| true);
    let begin = Instant::now();
    assert!(is_errno(&read(&*d, 0, 512).unwrap_err(), libc::ETIMEDOUT));
    assert!(begin.elapsed() < Duration::from_secs(5));
    // Closing waits for none of it.
    let begin = Instant::now();
    d.close().unwrap();
    drop(d);
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

#[test]
fn another_export_is_not_taken_for_the_old_one() {
    let changes: [fn(&mut Offer); 5] = [
        |o| o.size += 512,
        |o| o.flags |= flag::READ_ONLY,
        |o| o.flags &= !flag::SEND_FLUSH,
        |o| o.blocks = Some((512, 4096, 1 << 25)),
        |o| o.mode = Mode::Simple,
    ];
    for change in changes {
        let server = Server::start(Offer::default());
        let d = server.open(patient()).unwrap();
        change(&mut server.shared.offer.lock().unwrap());
        server.cut(|_| true);
        let e = read(&*d, 0, 512).unwrap_err();
        assert!(is_errno(&e, libc::ESTALE), "{e}");
        assert!(is_errno(&read(&*d, 0, 512).unwrap_err(), libc::ESTALE), "for good");
    }
}

fn two() -> Settings {
    Settings { connections: Some(2), ..patient() }
}

#[test]
fn one_connection_that_survives_proves_the_server_alive() {
    let server = Server::start(multi());
    let d = server.open(two()).unwrap();
    assert_eq!(server.connections(), 2);
    write(&*d, 0, b"precious").unwrap();
    server.cut(|i| i == 0);
    read(&*d, 0, 512).unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while server.connections() < 3 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
    d.flush().unwrap();
    d.close().unwrap();
}

#[test]
fn an_idle_connection_that_died_too_proves_nothing() {
    let server = Server::start(multi());
    let d = server.open(two()).unwrap();
    write(&*d, 0, b"precious").unwrap();
    // The second one was never used: nobody has noticed.
    server.cut(|_| true);
    read(&*d, 0, 512).unwrap();
    assert!(is_errno(&d.flush().unwrap_err(), libc::EIO));
}

#[test]
fn fewer_connections_than_wished_for_will_do() {
    let server = Server::start(Offer::default());
    let d = server.open(Settings { connections: Some(8), ..patient() }).unwrap();
    assert_eq!(server.connections(), 1, "the server did not say that several are safe");
    read(&*d, 0, 512).unwrap();
}

#[test]
fn a_forked_child_leaves_the_connection_alone() {
    let server = Server::start(multi());
    let d = server.open(two()).unwrap();
    write(&*d, 0, b"parent").unwrap();
    // SAFETY: the child only drops what it inherited, and ends without running anything else.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        drop(d);
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: the child is ours.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    assert_eq!(status, 0);
    assert_eq!(&read(&*d, 0, 6).unwrap(), b"parent");
    d.flush().unwrap();
    assert_eq!(server.connections(), 2);
    assert!(!kinds(&server).contains(&cmd::DISC));
    d.close().unwrap();
}

#[test]
fn a_first_connection_is_waited_for() {
    let mut server = Server::start(Offer::default());
    server.deafen();
    assert!(is_errno(&server.open(patient()).map(drop).unwrap_err(), libc::ENOENT));
    std::thread::scope(|s| {
        let path = server.dir.0.join("sock");
        let late = s.spawn(move || {
            let connect_timeout = Duration::from_secs(20);
            let settings = Settings { connect_timeout, ..patient() };
            let d = open(Target::Address(Address::Unix(path)), b"disk", &name(), settings);
            read(&*d.unwrap(), 0, 512).unwrap();
        });
        std::thread::sleep(Duration::from_millis(50));
        server.listen();
        late.join().unwrap();
    });
}

#[test]
fn a_server_that_is_started_gets_a_socket_as_systemd_gives_it() {
    let dir = Dir::new(&name()).unwrap();
    // It is removed with the directory.
    let told = dir.0.join("sock");
    let script = "ls -l /proc/$$/fd/3 >\"$1.new\"; echo $LISTEN_FDS $LISTEN_PID $$ >>\"$1.new\"; \
                  mv \"$1.new\" \"$1\"; exec sleep 100";
    let argv = ["/bin/sh", "-c", script, "sh"].map(Into::into);
    let argv = [&argv[..], &[told.clone().into_os_string()]].concat();
    let (mut child, path) = Child::activated(&argv, &name()).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while !told.exists() {
        assert!(Instant::now() < until, "the server did not start");
        std::thread::sleep(Duration::from_millis(1));
    }
    let text = std::fs::read_to_string(&told).unwrap();
    let words: Vec<&str> = text.lines().last().unwrap().split(' ').collect();
    assert!(text.contains("socket:") && words[0] == "1" && words[1] == words[2], "{text}");
    assert!(UnixStream::connect(&path).is_ok() && child.ended().is_none());
    child.end();
    assert!(!path.exists() && !path.parent().unwrap().exists());
}

#[test]
fn a_server_on_stdio_ends_with_its_connection() {
    let argv = ["/bin/cat"].map(Into::into);
    let (mut child, fd) = Child::over_stdio(&argv, &name()).unwrap();
    let mut stream = UnixStream::from(fd);
    std::io::Write::write_all(&mut stream, b"echo").unwrap();
    let mut b = [0; 4];
    stream.read_exact(&mut b).unwrap();
    assert_eq!(&b, b"echo");
    drop(stream);
    child.end();
    let argv = ["/nonexistent/server"].map(Into::into);
    let e = Child::over_stdio(&argv, &name()).map(drop).unwrap_err();
    assert!(is_errno(&e, libc::ENOENT) && e.to_string().contains("'/nonexistent/server'"), "{e}");
    let argv = ["/bin/false"].map(Into::into);
    let target = Target::Command { argv: argv.into(), activation: true };
    let e = open(target, b"", &name(), settings()).map(drop).unwrap_err();
    assert!(e.to_string().contains("status 1") || is_errno(&e, libc::ECONNRESET), "{e}");
}
