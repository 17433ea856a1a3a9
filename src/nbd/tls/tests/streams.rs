//! Sessions on sockets.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::*;
use crate::nbd::net::Stream;

/// Both ends of a connection of this host.
fn streams(deadline: Duration) -> (Stream, Stream) {
    let (a, b) = UnixStream::pair().unwrap();
    let deadline = Some(Instant::now() + deadline);
    let stream = |end: UnixStream, name: &str| Stream::new(end.into(), Name::from(name), deadline);
    (stream(a, "server"), stream(b, "client"))
}

#[test]
fn streams_go_on_in_tls_where_plain_text_ended() {
    let ca = Ca::new();
    let (client_session, server_session) =
        sessions(&ca.client(), &tcp("localhost"), &ca.server()).unwrap();
    let (mut client, mut server) = streams(Duration::from_secs(20));
    let data: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            client.write(b"plain").unwrap();
            client.start_tls(client_session).unwrap();
            assert!(client.is_tls());
            client.write(&data).unwrap();
            let mut buf = [0; 8];
            client.read(&mut buf).unwrap();
            assert_eq!(&buf, b"received");
            client.close();
        });
        // The hello is there already, and stays in the socket.
        let mut buf = vec![0; 999_990];
        server.read(&mut buf[..5]).unwrap();
        assert_eq!(&buf[..5], b"plain");
        server.start_tls(server_session).unwrap();
        server.read(&mut buf).unwrap();
        assert!(buf == data[..999_990]);
        server.write(b"received").unwrap();
        server.skip(3).unwrap();
        server.read(&mut buf[..7]).unwrap();
        assert!(buf[..7] == data[999_993..]);
        assert_eq!(errno(server.read(&mut buf)).0, libc::ECONNRESET);
    });
    let again = ServerTls::new(&ca.server()).unwrap().session(&Name::from("x")).unwrap();
    assert!(matches!(server.start_tls(again), Err(Error::Internal(_))));
}

#[test]
fn a_handshake_ends_with_its_deadline_its_peer_or_its_reason() {
    let (ca, other) = (Ca::new(), Ca::new());
    let both = |trusted: &Ca| sessions(&trusted.client(), &tcp("localhost"), &ca.server()).unwrap();
    let (mut client, server) = streams(Duration::from_millis(50));
    assert_eq!(errno(client.start_tls(both(&ca).0)).0, libc::ETIMEDOUT);
    drop(server);
    let (mut client, server) = streams(Duration::from_secs(20));
    drop(server);
    let (number, what) = errno(client.start_tls(both(&ca).0));
    assert!(number == libc::ECONNRESET && what.contains("hung up"), "{number} {what}");
    // The other end is told why.
    let (mut client, mut server) = streams(Duration::from_secs(20));
    let (client_session, server_session) = both(&other);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            assert_eq!(errno(client.start_tls(client_session)).0, libc::EACCES);
        });
        let (number, what) = errno(server.start_tls(server_session));
        assert!(number == libc::EACCES && what.contains("UnknownCA"), "{number} {what}");
    });
}

#[test]
fn a_client_that_was_let_in_by_mistake_learns_why_it_is_out() {
    let ca = Ca::new();
    let strict = TlsOptions { verify_peer: Some(true), ca: ca.pem(), ..ca.server() };
    // Whether it reads or writes, and whether the server has a word for it or just hangs up.
    for (reads, says) in [(true, true), (false, true), (true, false)] {
        let options = if says { &strict } else { &ca.server() };
        let (client_session, server_session) =
            sessions(&ca.client(), &tcp("localhost"), options).unwrap();
        let (mut client, mut server) = streams(Duration::from_secs(20));
        let (number, what) = std::thread::scope(|scope| {
            let told = scope.spawn(move || server.start_tls(server_session));
            client.start_tls(client_session).unwrap();
            assert_eq!(told.join().unwrap().is_err(), says);
            let mut buf = [0; 1];
            errno(if reads { client.read(&mut buf) } else { client.write(&buf) })
        });
        assert_eq!(number, if says { libc::EACCES } else { libc::ECONNRESET }, "{what}");
        assert!(what.contains("tls-certificate"), "{what}");
    }
}
