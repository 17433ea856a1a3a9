//! Sockets of this host.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;

use super::sys::Told;
use super::*;
use crate::block::ErrorKind;

/// A path that is removed at the end.
struct Temp(PathBuf);

impl Temp {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Relaxed);
        Self(std::env::temp_dir().join(format!("qblk-net-{}-{n}", std::process::id())))
    }

    fn address(&self) -> Address {
        Address::Unix(self.0.clone())
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn tcp(host: &str, port: u16) -> Address {
    Address::Tcp { host: host.into(), port }
}

fn name() -> Name {
    Name::from("peer")
}

fn number<T>(result: Result<T>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(e) => match e.kind() {
            ErrorKind::Errno(n) => n,
            other => panic!("{other:?}: {e}"),
        },
    }
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(50))
}

/// Long enough for what is to succeed.
fn later() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(20))
}

/// Wait for a connection.
fn accept_one(listener: &OwnedFd) -> (OwnedFd, Peer) {
    loop {
        assert!(sys::poll(&mut [sys::poll_for(listener, libc::POLLIN)], later()).unwrap());
        if let Some(accepted) = accept(listener).unwrap() {
            return accepted;
        }
    }
}

/// Both ends of a connection.
fn pair() -> (Stream, Stream) {
    let temp = Temp::new();
    let listening = listen(&temp.address()).unwrap();
    let a = connect(&temp.address(), &name(), later(), None).unwrap();
    let (b, _) = accept_one(&listening[0].0);
    (Stream::new(a, name(), later()), Stream::new(b, name(), later()))
}

fn flags(fd: &OwnedFd) -> (bool, bool) {
    // SAFETY: no memory is passed.
    let (own, status) = unsafe {
        (libc::fcntl(fd.as_raw_fd(), libc::F_GETFD), libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))
    };
    assert!(own >= 0 && status >= 0);
    (own & libc::FD_CLOEXEC != 0, status & libc::O_NONBLOCK != 0)
}

fn option(fd: &OwnedFd, level: i32, option: i32) -> i32 {
    let (mut value, mut len) = (0i32, 4);
    let at = (&raw mut value).cast();
    // SAFETY: `value` has as much room as `len` says.
    assert_eq!(unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, at, &mut len) }, 0);
    value
}

#[test]
fn addresses_survive_their_structures() {
    for text in ["1.2.3.4:5", "[1:2::3]:65535", "[fe80::1%7]:1"] {
        let at: SocketAddr = text.parse().unwrap();
        assert!(matches!(SockAddr::ip(at).told(), Told::Ip(told) if told == at), "{text}");
    }
    let vsock = SockAddr::vsock(3, 1 << 31).told();
    assert!(matches!(vsock, Told::Vsock { cid: 3, port: 0x8000_0000 }));
    assert!(matches!(SockAddr::unix("/x".as_ref()).unwrap().told(), Told::Unix));
    assert!(SockAddr::unix("x".repeat(107).as_ref()).is_ok());
    let long = SockAddr::unix("x".repeat(108).as_ref()).err().unwrap();
    assert_eq!(errno(&long), libc::ENAMETOOLONG);
}

#[test]
fn tcp_connects_and_tells_who_came() {
    let listening = listen(&tcp("127.0.0.1", 0)).unwrap();
    let [(listener, at)] = &listening[..] else { panic!("{listening:?}") };
    let Address::Tcp { host, port } = at else { panic!("{at:?}") };
    assert!(host == "127.0.0.1" && *port != 0);
    assert_eq!(flags(listener), (true, true));
    assert!(accept(listener).unwrap().is_none());
    let client = connect(at, &name(), later(), None).unwrap();
    let (server, peer) = accept_one(listener);
    assert_eq!(peer, Peer::Ip(Ipv4Addr::LOCALHOST.into()));
    for fd in [&client, &server] {
        assert_eq!(flags(fd), (true, false));
        assert_ne!(option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY), 0);
        assert_ne!(option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE), 0);
    }
    // The server hung up first: its end lingers, and yet the port can be had again.
    let at = at.clone();
    drop((server, listening));
    drop(client);
    listen(&at).unwrap();
}

#[test]
fn an_empty_host_means_all_addresses_with_one_port() {
    let listening = listen(&tcp("", 0)).unwrap();
    let port = |address: &Address| match address {
        Address::Tcp { port, .. } => *port,
        other => panic!("{other:?}"),
    };
    let first = port(&listening[0].1);
    assert!(first != 0 && listening.iter().all(|(_, at)| port(at) == first));
    let hosts: Vec<_> = listening.iter().map(|(_, at)| at.to_string()).collect();
    assert!(hosts.contains(&format!("0.0.0.0:{first}")), "{hosts:?}");
    for (listener, at) in &listening {
        let (host, ip) = match at.to_string().starts_with('[') {
            true => ("::1", IpAddr::from(Ipv6Addr::LOCALHOST)),
            false => ("127.0.0.1", Ipv4Addr::LOCALHOST.into()),
        };
        let _client = connect(&tcp(host, first), &name(), later(), None).unwrap();
        assert_eq!(accept_one(listener).1, Peer::Ip(ip));
    }
    // Taken.
    assert_eq!(number(listen(&tcp("", first))), libc::EADDRINUSE);
    // An empty host to connect to is this one.
    connect(&tcp("", first), &name(), later(), None).unwrap();
}

#[test]
fn ipv4_has_no_disguise() {
    let mapped = Ipv4Addr::new(1, 2, 3, 4).to_ipv6_mapped();
    assert_eq!(plain_ip(mapped.into()), IpAddr::from(Ipv4Addr::new(1, 2, 3, 4)));
    // A host without IPv6 has no disguise to take off.
    let listening = TcpListener::bind("[::]:0").map(|listener| (listener.local_addr(), listener));
    if let Ok((Ok(at), listener)) = listening
        && let Ok(_client) = TcpStream::connect(("127.0.0.1", at.port()))
    {
        let (_, peer) = accept(&listener).unwrap().unwrap();
        assert_eq!(peer, Peer::Ip(Ipv4Addr::LOCALHOST.into()));
    }
}

#[test]
fn nobody_there() {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    assert_eq!(
        number(connect(&tcp("127.0.0.1", unused), &name(), later(), None)),
        libc::ECONNREFUSED
    );
    let temp = Temp::new();
    assert_eq!(number(connect(&temp.address(), &name(), later(), None)), libc::ENOENT);
    let e = connect(&tcp("host.invalid", 1), &name(), later(), None).unwrap_err();
    assert!(e.to_string().contains("host.invalid"), "{e}");
    let long = Address::Unix("x".repeat(108).into());
    assert_eq!(number(connect(&long, &name(), None, None)), libc::EINVAL);
    assert_eq!(number(listen(&long)), libc::EINVAL);
}

/// A listening socket whose backlog is full: who connects is not answered.
fn black_hole() -> (TcpListener, Vec<TcpStream>, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // SAFETY: no memory is passed.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let at = listener.local_addr().unwrap();
    let mut full = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&at, Duration::from_millis(200)) {
        full.push(stream);
    }
    (listener, full, at)
}

#[test]
fn connecting_gives_up_in_time_and_when_woken() {
    let (_listener, _full, at) = black_hole();
    let address = tcp("127.0.0.1", at.port());
    let begin = Instant::now();
    assert_eq!(number(connect(&address, &name(), soon(), None)), libc::ETIMEDOUT);
    assert!((50..5000).contains(&begin.elapsed().as_millis()));

    let waker = Waker::new().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| waker.wake());
        assert_eq!(number(connect(&address, &name(), None, Some(&waker))), libc::ECANCELED);
    });
    // It stays awake until it is reset.
    assert_eq!(number(connect(&address, &name(), None, Some(&waker))), libc::ECANCELED);
    waker.wake();
    waker.reset();
    assert_eq!(number(connect(&address, &name(), soon(), Some(&waker))), libc::ETIMEDOUT);
}

#[test]
fn an_address_that_does_not_answer_costs_only_a_moment() {
    let (_listener, _full, hole) = black_hole();
    let good = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let addresses = [hole, closed, good.local_addr().unwrap()].map(SockAddr::ip);
    for deadline in [None, later()] {
        let begin = Instant::now();
        race(&addresses, deadline, None).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    }
    // The reason that tells most.
    let addresses = [closed].map(SockAddr::ip);
    assert_eq!(errno(&race(&addresses, None, None).unwrap_err()), libc::ECONNREFUSED);
}

#[test]
fn a_unix_socket_with_a_full_backlog_is_waited_for() {
    let temp = Temp::new();
    let listener = UnixListener::bind(&temp.0).unwrap();
    // SAFETY: no memory is passed.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let mut full = Vec::new();
    let e = loop {
        match connect(&temp.address(), &name(), soon(), None) {
            Ok(fd) => full.push(fd),
            Err(e) => break e,
        }
    };
    assert_eq!(number::<()>(Err(e)), libc::ETIMEDOUT);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| connect(&temp.address(), &name(), later(), None));
        accept(&listener).unwrap().unwrap();
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn unix_sockets_tell_the_user_and_keep_the_umask() {
    let temp = Temp::new();
    let listening = listen(&temp.address()).unwrap();
    assert_eq!(listening[0].1, temp.address());
    assert_eq!(flags(&listening[0].0), (true, true));
    // Made in the same way by std, under the same umask.
    let other = Temp::new();
    let _other = UnixListener::bind(&other.0).unwrap();
    let mode = |path: &PathBuf| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&temp.0), mode(&other.0));
    let client = connect(&temp.address(), &name(), None, None).unwrap();
    let (server, peer) = accept_one(&listening[0].0);
    // SAFETY: no memory is passed.
    assert_eq!(peer, Peer::Uid(unsafe { libc::geteuid() }));
    assert_eq!((flags(&client), flags(&server)), ((true, false), (true, false)));
}

#[test]
fn a_dead_socket_is_taken_over_a_live_one_is_not() {
    let temp = Temp::new();
    // Closing does not remove it.
    drop(UnixListener::bind(&temp.0).unwrap());
    assert!(temp.0.exists());
    let listening = listen(&temp.address()).unwrap();
    assert_eq!(number(listen(&temp.address())), libc::EADDRINUSE);
    connect(&temp.address(), &name(), later(), None).unwrap();
    drop(listening);
    // Of many at once, one wins.
    for _ in 0..20 {
        let won: Vec<_> = thread::scope(|scope| {
            let all: Vec<_> = (0..4).map(|_| scope.spawn(|| listen(&temp.address()))).collect();
            all.into_iter().filter_map(|one| one.join().unwrap().ok()).collect()
        });
        assert_eq!(won.len(), 1);
        connect(&temp.address(), &name(), later(), None).unwrap();
    }
    // What is no socket is nobody's to remove.
    fs::remove_file(&temp.0).unwrap();
    fs::write(&temp.0, "mine").unwrap();
    assert_eq!(number(listen(&temp.address())), libc::EADDRINUSE);
    assert_eq!(fs::read(&temp.0).unwrap(), b"mine");
    fs::remove_file(&temp.0).unwrap();
    std::os::unix::fs::symlink("/nonexistent/qblk", &temp.0).unwrap();
    assert_eq!(number(listen(&temp.address())), libc::EADDRINUSE);
    assert!(temp.0.is_symlink());
}

#[test]
fn streams_carry_exactly_what_is_asked_for() {
    let (mut a, mut b) = pair();
    let data: Vec<u8> = (0..3_000_000u32).map(|n| (n % 253) as u8).collect();
    thread::scope(|scope| {
        scope.spawn(|| a.write(&data).unwrap());
        let mut buf = vec![0; 1_000_000];
        b.read(&mut buf).unwrap();
        assert!(buf == data[..1_000_000]);
        b.skip(1_000_000).unwrap();
        b.read(&mut buf[..7]).unwrap();
        assert!(buf[..7] == data[2_000_000..2_000_007]);
        // What was not asked for is still in the socket.
        let (fd, tls) = b.into_parts();
        assert!(tls.is_none() && !flags(&fd).1);
        let mut rest = Vec::new();
        while rest.len() < 999_993 {
            sys::poll(&mut [sys::poll_for(&fd, libc::POLLIN)], later()).unwrap();
            let n = sys::receive(&fd, &mut buf).unwrap();
            rest.extend_from_slice(&buf[..n]);
        }
        assert!(rest == data[2_000_007..]);
    });
}

#[test]
fn streams_give_up_in_time_when_woken_and_when_alone() {
    let (mut a, mut b) = pair();
    let mut buf = [0; 10];
    let begin = Instant::now();
    b.write(b"half").unwrap();
    a.deadline = soon();
    assert_eq!(number(a.read(&mut buf)), libc::ETIMEDOUT);
    assert!(begin.elapsed() < Duration::from_secs(5));
    // Nobody reads.
    a.deadline = soon();
    assert_eq!(number(a.write(&vec![0; 64 << 20])), libc::ETIMEDOUT);
    // One who never stops sending does not get around it either.
    let (mut c, mut d) = pair();
    c.deadline = soon();
    thread::scope(|scope| {
        scope.spawn(move || while d.write(&[0; 65536]).is_ok() {});
        assert_eq!(number(c.skip(u64::MAX)), libc::ETIMEDOUT);
        drop(c);
    });

    let waker = Arc::new(Waker::new().unwrap());
    a.deadline = None;
    a.cancelled_by(waker.clone());
    thread::scope(|scope| {
        scope.spawn(|| waker.wake());
        assert_eq!(number(a.read(&mut buf)), libc::ECANCELED);
    });
    waker.reset();
    drop(b);
    assert_eq!(number(a.read(&mut buf)), libc::ECONNRESET);
    // Not EPIPE, which programs take for a pipe's.
    assert_eq!(number(a.write(&buf)), libc::ECONNRESET);
}

#[test]
fn what_takes_too_long_is_left_alone() {
    let slow = || {
        thread::sleep(Duration::from_secs(20));
        Ok(())
    };
    let begun = Instant::now();
    let late = within(Some(begun + Duration::from_millis(50)), None, slow).unwrap_err();
    assert_eq!(late.raw_os_error(), Some(libc::ETIMEDOUT));
    let waker = Waker::new().unwrap();
    waker.wake();
    let cancelled = within(None, Some(&waker), slow).unwrap_err();
    assert_eq!(cancelled.raw_os_error(), Some(libc::ECANCELED));
    assert!(begun.elapsed() < Duration::from_secs(10));
    // What is done in time is what it would be without.
    let later = Some(Instant::now() + Duration::from_secs(60));
    assert_eq!(within(later, None, || Ok(7)).unwrap(), 7);
    let failed = within(later, None, || Err::<(), _>(io::Error::from_raw_os_error(libc::ENOENT)));
    assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::ENOENT));
    let name = Name::from("nbd://localhost");
    let found = resolve("localhost", 10809, &name, later, None).unwrap();
    assert!(
        !found.is_empty() && found.iter().all(|at| at.ip().is_loopback() && at.port() == 10809)
    );
    let found = resolve("127.0.0.1", 1, &name, None, Some(&waker)).unwrap();
    assert_eq!(found, [SocketAddr::from(([127, 0, 0, 1], 1))]);
}
