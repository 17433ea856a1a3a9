//! Both ends of a session in memory, with certificates made for each test.

mod settings;
mod streams;

use std::fs;
use std::io::IoSlice;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

use super::*;
use crate::block::ErrorKind;

/// A directory that is removed at the end.
struct Temp(PathBuf);

impl Temp {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Relaxed);
        let dir = std::env::temp_dir().join(format!("qblk-tls-{}-{n}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn file(&self, name: &str, text: impl AsRef<[u8]>) -> Option<Pem> {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        Some(Pem::File(path))
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    text: String,
}

impl Ca {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        Self::named(&format!("CA {}", COUNT.fetch_add(1, Relaxed)))
    }

    fn named(name: &str) -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let text = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), text }
    }

    fn pem(&self) -> Option<Pem> {
        text(&self.text)
    }

    /// A certificate and its key.
    fn sign(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> TlsOptions {
        let names: Vec<_> = names.iter().map(|n| n.to_string()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        TlsOptions {
            certificate: text(&certificate.pem()),
            key: text(&key.serialize_pem()),
            ..TlsOptions::default()
        }
    }

    fn server(&self) -> TlsOptions {
        self.sign(&["localhost", "127.0.0.1", "::1"], |_| {})
    }

    fn client(&self) -> TlsOptions {
        TlsOptions { ca: self.pem(), ..TlsOptions::default() }
    }
}

fn text(text: &str) -> Option<Pem> {
    Some(Pem::Text(text.into()))
}

fn tcp(host: &str) -> Address {
    Address::Tcp { host: host.into(), port: 10809 }
}

fn sessions(client: &TlsOptions, to: &Address, server: &TlsOptions) -> Result<(Session, Session)> {
    let client = ClientTls::new(client, to)?.session(&Name::from("server"))?;
    Ok((client, ServerTls::new(server)?.session(&Name::from("client"))?))
}

/// Carry all that one end has to say to the other, in pieces of `piece` bytes: whether there was any.
fn carry(from: &Session, to: &Session, piece: usize) -> Result<bool> {
    let mut out = Vec::new();
    from.seal(&[], &mut out)?;
    for piece in out.chunks(piece) {
        to.feed(piece)?;
    }
    Ok(!out.is_empty())
}

/// Shake hands: what the client and the server came to know.
fn shake(client: &Session, server: &Session, piece: usize) -> (Result<()>, Result<()>) {
    let (mut told_client, mut told_server) = (Ok(()), Ok(()));
    loop {
        let mut any = false;
        for (from, to, told) in
            [(client, server, &mut told_server), (server, client, &mut told_client)]
        {
            match carry(from, to, piece) {
                Ok(more) => any |= more,
                // The alert still goes out.
                Err(e) if told.is_ok() => (*told, any) = (Err(e), true),
                Err(_) => {}
            }
        }
        if !any {
            return (told_client, told_server);
        }
    }
}

fn connected(client: &TlsOptions, to: &Address, server: &TlsOptions) -> (Session, Session) {
    let (client, server) = sessions(client, to, server).unwrap();
    let (a, b) = shake(&client, &server, 1 << 20);
    a.unwrap();
    b.unwrap();
    assert!(!client.is_handshaking() && !server.is_handshaking());
    (client, server)
}

fn errno<T>(result: Result<T>) -> (i32, String) {
    match result {
        Ok(_) => (0, String::new()),
        Err(e) => match e.kind() {
            ErrorKind::Errno(n) => (n, e.to_string()),
            other => panic!("{other:?}: {e}"),
        },
    }
}

fn sealed(session: &Session, plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    session.seal(&[IoSlice::new(plain)], &mut out).unwrap();
    out
}

fn take_all(session: &Session) -> Vec<u8> {
    let (mut all, mut buf) = (Vec::new(), [0; 5000]);
    while let Taken::Bytes(n) = session.take(&mut buf).unwrap() {
        all.extend_from_slice(&buf[..n]);
    }
    all
}

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

/// Send `plain` in pieces of all sizes, feed it in pieces of all sizes, take it in pieces of all sizes.
fn send(from: &Session, to: &Session, plain: &[u8], dice: &mut Dice) -> Vec<u8> {
    let (mut got, mut rest) = (Vec::new(), plain);
    let mut buf = vec![0; 300_000];
    while !rest.is_empty() {
        // Up to 40 pieces, of which some are empty.
        let mut pieces = Vec::new();
        for _ in 0..=dice.below(40) {
            let max = [1, 40, 20_000, 300_000][dice.below(4)];
            let (piece, more) = rest.split_at(dice.below(max).min(rest.len()));
            pieces.push(IoSlice::new(piece));
            rest = more;
        }
        let mut cipher = Vec::new();
        from.seal(&pieces, &mut cipher).unwrap();
        let mut cipher = cipher.as_slice();
        while !cipher.is_empty() {
            let max = [5, 3000, 60_000, 700_000][dice.below(4)];
            let (piece, more) = cipher.split_at((dice.below(max) + 1).min(cipher.len()));
            to.feed(piece).unwrap();
            cipher = more;
            loop {
                let max = [1, 20, 20_000, 300_000][dice.below(4)];
                match to.take(&mut buf[..dice.below(max) + 1]).unwrap() {
                    Taken::Bytes(n) => got.extend_from_slice(&buf[..n]),
                    Taken::Nothing => break,
                    Taken::Closed => panic!("closed"),
                }
            }
        }
    }
    got
}

#[test]
fn what_is_sent_arrives_whatever_the_pieces() {
    let ca = Ca::new();
    let (client, server) = connected(&ca.client(), &tcp("localhost"), &ca.server());
    let mut dice = Dice(1);
    let plain: Vec<u8> = (0..10_000_000u32).map(|n| (n ^ (n >> 9)) as u8).collect();
    assert!(send(&client, &server, &plain, &mut dice) == plain);
    assert!(send(&server, &client, &plain, &mut dice) == plain);
    // Changing keys in between, which both ends answer.
    client.state.lock().conn.refresh_traffic_keys().unwrap();
    assert!(send(&client, &server, &plain[..100_000], &mut dice) == plain[..100_000]);
    assert!(send(&server, &client, &plain[..100_000], &mut dice) == plain[..100_000]);
}

#[test]
fn a_handshake_may_come_byte_by_byte() {
    let ca = Ca::new();
    let (client, server) = sessions(&ca.client(), &tcp("127.0.0.1"), &ca.server()).unwrap();
    assert!(client.is_handshaking() && server.is_handshaking());
    assert_eq!(client.take(&mut [0; 8]).unwrap(), Taken::Nothing);
    let mut out = Vec::new();
    assert!(matches!(client.seal(&[IoSlice::new(b"early")], &mut out), Err(Error::Internal(_))));
    let (a, b) = shake(&client, &server, 1);
    a.unwrap();
    b.unwrap();
    assert!(!client.is_handshaking() && !server.is_handshaking());
    server.feed(&sealed(&client, b"late")).unwrap();
    assert_eq!(server.take(&mut []).unwrap(), Taken::Nothing);
    assert_eq!(take_all(&server), b"late");
}

#[test]
fn ciphertext_that_nobody_takes_is_bounded() {
    let ca = Ca::new();
    let (client, server) = connected(&ca.client(), &tcp("localhost"), &ca.server());
    let plain = vec![7; 1 << 20];
    let cipher = sealed(&client, &plain);
    // What one call brings is kept; more is taken until it is too much, and then nothing is lost.
    server.feed(&cipher[..500_000]).unwrap();
    assert!(matches!(server.feed(&cipher[500_000..600_000]), Err(Error::Internal(_))));
    let mut got = take_all(&server);
    server.feed(&cipher[500_000..]).unwrap();
    got.extend(take_all(&server));
    assert!(got == plain);
    let state = server.state.lock();
    assert!(state.held.is_empty());
}

#[test]
fn records_are_full_and_headers_do_not_make_their_own() {
    let ca = Ca::new();
    let (client, _server) = connected(&ca.client(), &tcp("localhost"), &ca.server());
    let (header, data) = ([1; 28], vec![2; (256 << 10) - 28]);
    let mut out = Vec::new();
    client.seal(&[IoSlice::new(&header), IoSlice::new(&data)], &mut out).unwrap();
    let (mut records, mut at) = (0, 0);
    while at < out.len() {
        at += 5 + usize::from(u16::from_be_bytes([out[at + 3], out[at + 4]]));
        records += 1;
    }
    assert_eq!((records, at), (16, out.len()));
}

#[test]
fn closing_is_told_after_all_data() {
    let ca = Ca::new();
    let (client, server) = connected(&ca.client(), &tcp("localhost"), &ca.server());
    let mut cipher = sealed(&client, b"last words");
    client.close(&mut cipher);
    cipher.extend_from_slice(b"not heard any more");
    server.feed(&cipher).unwrap();
    server.feed(b"nor this").unwrap();
    let mut buf = [0; 100];
    assert_eq!(server.take(&mut buf).unwrap(), Taken::Bytes(10));
    for _ in 0..2 {
        assert_eq!(server.take(&mut buf).unwrap(), Taken::Closed);
    }
    // The other direction stays open.
    client.feed(&sealed(&server, b"bye")).unwrap();
    assert_eq!(take_all(&client), b"bye");
}

#[test]
fn another_ca_is_refused_and_both_ends_know_why() {
    let (ca, other) = (Ca::new(), Ca::new());
    let (client, server) = sessions(&other.client(), &tcp("localhost"), &ca.server()).unwrap();
    let (told_client, told_server) = shake(&client, &server, 1 << 20);
    let (number, what) = errno(told_client);
    assert!(number == libc::EACCES && what.contains("tls-ca"), "{number} {what}");
    let (number, what) = errno(told_server);
    assert!(number == libc::EACCES && what.contains("UnknownCA"), "{number} {what}");
    // And it stays so.
    assert_eq!(errno(client.feed(b"x")).0, libc::EACCES);
    assert_eq!(errno(client.take(&mut [0; 1])).0, libc::EACCES);
    assert_eq!(errno(client.seal(&[IoSlice::new(b"x")], &mut Vec::new())).0, libc::EACCES);
}

#[test]
fn a_ca_of_the_same_name_is_still_another() {
    let (ca, other) = (Ca::named("x"), Ca::named("x"));
    let (client, server) = sessions(&other.client(), &tcp("localhost"), &ca.server()).unwrap();
    assert_eq!(errno(shake(&client, &server, 1 << 20).0).0, libc::EACCES);
}

#[test]
fn the_server_must_have_the_name() {
    let ca = Ca::new();
    let refused = |options: &TlsOptions, to: &Address| {
        let (client, server) = sessions(options, to, &ca.server()).unwrap();
        let (number, what) = errno(shake(&client, &server, 1 << 20).0);
        assert!(number == libc::EACCES && what.contains("not valid for name"), "{number} {what}");
    };
    let named = |name: &str| TlsOptions { hostname: Some(name.into()), ..ca.client() };
    refused(&ca.client(), &tcp("example.com"));
    refused(&ca.client(), &tcp("127.0.0.2"));
    refused(&named("example.com"), &tcp("localhost"));
    let unix = Address::Unix("/x".into());
    refused(&named("example.com"), &unix);
    for to in ["localhost", "127.0.0.1", "::1", "::1%lo", ""] {
        connected(&ca.client(), &tcp(to), &ca.server());
    }
    connected(&named("localhost"), &tcp("example.com"), &ca.server());
    connected(&named("::1"), &unix, &ca.server());
}

#[test]
fn without_a_host_name_there_must_be_tls_hostname() {
    let ca = Ca::new();
    for to in [Address::Unix("/x".into()), Address::Vsock { cid: 2, port: 1 }] {
        let (number, what) = errno(ClientTls::new(&ca.client(), &to));
        assert!(number == libc::EINVAL && what.contains("tls-hostname"), "{what}");
        let off = TlsOptions { verify_peer: Some(false), ..TlsOptions::default() };
        connected(&off, &to, &ca.server());
    }
    let (number, what) = errno(ClientTls::new(&ca.client(), &tcp("a b")));
    assert!(number == libc::EINVAL && what.contains("'a b'"), "{what}");
}

#[test]
fn expired_certificates_are_refused() {
    let ca = Ca::new();
    let expired = ca.sign(&["localhost"], |params| {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    });
    let (client, server) = sessions(&ca.client(), &tcp("localhost"), &expired).unwrap();
    let (number, what) = errno(shake(&client, &server, 1 << 20).0);
    assert!(number == libc::EACCES && what.contains("expired"), "{number} {what}");
    // Only who asks for it by name does without.
    let off = TlsOptions { verify_peer: Some(false), ..ca.client() };
    connected(&off, &tcp("example.com"), &expired);
}

#[test]
fn a_server_that_verifies_wants_a_certificate_of_its_ca() {
    let (ca, other) = (Ca::new(), Ca::new());
    let server = TlsOptions { verify_peer: Some(true), ca: ca.pem(), ..ca.server() };
    let with = |identity: TlsOptions| TlsOptions { ca: ca.pem(), ..identity };
    connected(&with(ca.sign(&["me"], |_| {})), &tcp("localhost"), &server);

    let refused = |client: TlsOptions, why: &str, told: &str| {
        let (client, server) = sessions(&client, &tcp("localhost"), &server).unwrap();
        let (told_client, told_server) = shake(&client, &server, 1 << 20);
        let (number, what) = errno(told_server);
        assert!(number == libc::EACCES && what.contains(why), "{number} {what}");
        // The server has the last word in TLS 1.3: the client learns it when it reads.
        let (number, what) = errno(told_client);
        assert!(number == libc::EACCES && what.contains(told), "{number} {what}");
        assert_eq!(errno(server.take(&mut [0; 1])).0, libc::EACCES);
    };
    refused(ca.client(), "no certificate", "tls-certificate");
    refused(with(other.sign(&["me"], |_| {})), "CA", "our certificate");
    // Off unless asked for.
    let server = TlsOptions { ca: ca.pem(), ..ca.server() };
    connected(&ca.client(), &tcp("localhost"), &server);
}

#[test]
fn what_is_no_tls_is_said_to_be_none() {
    let ca = Ca::new();
    for garbage in [
        b"NBDMAGICIHAVEOPT\0\x03".as_slice(),
        b"GET / HTTP/1.0\r\n\r\n",
        b"\0\0\0\0\0\0\0\0",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\0\x04\x01\0\0\0",
        &[0xff; 20_000],
    ] {
        let (client, server) = sessions(&ca.client(), &tcp("localhost"), &ca.server()).unwrap();
        for session in [client, server] {
            let (number, what) = errno(session.feed(garbage));
            assert_eq!(number, libc::EPROTO, "{garbage:?}");
            assert!(what.contains("TLS") && what.len() < 400, "{what}");
        }
    }
    // A record that was changed on its way, behind one that was not.
    let (client, server) = connected(&ca.client(), &tcp("localhost"), &ca.server());
    let good = sealed(&client, b"good");
    let mut bad = sealed(&client, b"bad");
    bad[7] ^= 1;
    let fed = server.feed(&[good, bad].concat());
    assert_eq!(errno(fed).0, libc::EPROTO);
    let mut buf = [0; 100];
    assert_eq!(server.take(&mut buf).unwrap(), Taken::Bytes(4));
    assert_eq!(errno(server.take(&mut buf)).0, libc::EPROTO);
}

#[test]
fn any_bytes_do_no_harm() {
    let ca = Ca::new();
    let (client, server) = (
        ClientTls::new(&ca.client(), &tcp("localhost")).unwrap(),
        ServerTls::new(&ca.server()).unwrap(),
    );
    let mut dice = Dice(3);
    for _ in 0..300 {
        let client = client.session(&Name::from("server")).unwrap();
        let server = server.session(&Name::from("client")).unwrap();
        let mut hello = Vec::new();
        client.seal(&[], &mut hello).unwrap();
        for _ in 0..=dice.below(3) {
            let at = dice.below(hello.len());
            hello[at] = dice.below(256) as u8;
        }
        let mut answer = Vec::new();
        if server.feed(&hello).is_ok() && server.seal(&[], &mut answer).is_ok() {
            for _ in 0..dice.below(3) {
                let at = dice.below(answer.len().max(1));
                answer.iter_mut().skip(at).take(1).for_each(|b| *b ^= 0x41);
            }
            let _ = client.feed(&answer);
        }
        let _ = server.take(&mut [0; 10]);
        let _ = client.take(&mut [0; 10]);
    }
}

#[test]
fn tls_1_2_is_spoken_too() {
    let ca = Ca::new();
    let server = ServerTls::new(&ca.server()).unwrap();
    let mut client = ClientTls::new(&ca.client(), &tcp("localhost")).unwrap();
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .with_root_certificates(pem::roots(&ca.pem().unwrap(), "tls-ca").unwrap())
        .with_no_client_auth();
    client.config = Arc::new(config);
    let client = client.session(&Name::from("server")).unwrap();
    let server = server.session(&Name::from("client")).unwrap();
    let (a, b) = shake(&client, &server, 1 << 20);
    a.unwrap();
    b.unwrap();
    let plain = vec![5; 1_000_000];
    assert!(send(&client, &server, &plain, &mut Dice(2)) == plain);
    assert!(send(&server, &client, &plain, &mut Dice(2)) == plain);
}

#[test]
fn one_thread_receives_while_another_sends() {
    let ca = Ca::new();
    let (client, server) = connected(&ca.client(), &tcp("localhost"), &ca.server());
    let plain: Vec<u8> = (0..2_000_000u32).map(|n| (n % 251) as u8).collect();
    let (cipher, expected) = (sealed(&server, &plain), plain.clone());
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut out = Vec::new();
            for piece in plain.chunks(100_000) {
                client.seal(&[IoSlice::new(piece)], &mut out).unwrap();
            }
            out
        });
        let mut got = Vec::new();
        for piece in cipher.chunks(50_000) {
            client.feed(piece).unwrap();
            got.extend(take_all(&client));
        }
        assert!(got == expected);
        let sent = sender.join().unwrap();
        let mut got = Vec::new();
        for piece in sent.chunks(50_000) {
            server.feed(piece).unwrap();
            got.extend(take_all(&server));
        }
        assert!(got == expected);
    });
}
