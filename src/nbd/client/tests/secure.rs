//! The data path through TLS.

use std::io::{IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};

use super::super::Settings;
use super::peer::*;
use super::threads::{hammer, serve_mixed};
use crate::nbd::net::Stream;
use crate::nbd::proto::*;
use crate::nbd::tls::{ClientTls, Pem, ServerTls, Taken, TlsOptions};
use crate::nbd::uri::Address;

fn tls() -> (ClientTls, ServerTls) {
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let own = Pem::Text(own.pem().into());
    let to = Address::Tcp { host: "localhost".into(), port: 1 };
    let client = TlsOptions { ca: Some(own.clone()), ..TlsOptions::default() };
    let key = Some(Pem::Text(key.serialize_pem().into()));
    let server = TlsOptions { certificate: Some(own), key, ..TlsOptions::default() };
    (ClientTls::new(&client, &to).unwrap(), ServerTls::new(&server).unwrap())
}

/// Greet, begin TLS, and carry what follows to and from a server that speaks plain text.
fn unwrap_tls(mut p: Peer, tls: &ServerTls, plain: UnixStream) {
    p.greet(hello::FIXED_NEWSTYLE | hello::NO_ZEROES);
    assert_eq!(p.option().map(|o| o.0), Some(opt::STARTTLS));
    p.answer(opt::STARTTLS, rep::ACK, &[]);
    let mut stream = Stream::new(p.stream.into(), name(), None);
    stream.start_tls(tls.session(&name()).unwrap()).unwrap();
    let (fd, session) = stream.into_parts();
    let (session, outer) = (&*session.unwrap(), &UnixStream::from(fd));
    std::thread::scope(|s| {
        let mut from_server = plain.try_clone().unwrap();
        s.spawn(move || {
            let (mut buf, mut out) = (vec![0; 100_000], Vec::new());
            while let Ok(n @ 1..) = from_server.read(&mut buf) {
                out.clear();
                session.seal(&[IoSlice::new(&buf[..n])], &mut out).unwrap();
                let mut outer = outer;
                if outer.write_all(&out).is_err() {
                    break;
                }
            }
            let _ = outer.shutdown(Shutdown::Both);
        });
        let (mut buf, mut text, mut plain) = (vec![0; 5000], vec![0; 70_000], plain);
        let mut outer = outer;
        // What came with the end of the handshake is in the session already.
        'all: loop {
            loop {
                match session.take(&mut text).unwrap() {
                    Taken::Bytes(n) => plain.write_all(&text[..n]).unwrap(),
                    Taken::Nothing => break,
                    Taken::Closed => break 'all,
                }
            }
            let Ok(n @ 1..) = outer.read(&mut buf) else { break };
            session.feed(&buf[..n]).unwrap();
        }
        let _ = plain.shutdown(Shutdown::Both);
    });
}

fn secured(
    settings: Settings,
    script: impl FnOnce(Peer) + Send,
    client: impl FnOnce(&dyn crate::block::Driver),
) {
    let (for_client, for_server) = tls();
    let settings = Settings { tls: Some(for_client), ..settings };
    connected_with(
        settings,
        |p| {
            let (inner, other) = UnixStream::pair().unwrap();
            std::thread::scope(|s| {
                s.spawn(|| script(Peer::new(inner)));
                unwrap_tls(p, &for_server, other);
            });
        },
        |d| client(&*d.unwrap()),
    );
}

#[test]
fn many_threads_through_tls_get_each_its_own_bytes() {
    for mode in [Mode::Simple, Mode::Extended] {
        let (threads, stripe) = (16, 1 << 18);
        let size = threads * stripe;
        secured(
            settings(),
            move |mut p| {
                assert!(p.agree(&Offer { mode, size, ..Offer::default() }));
                serve_mixed(p, &mut vec![0; size as usize], 5);
            },
            |d| {
                let on = d.describe().properties.contains(&("nbd.tls", b"on".to_vec()));
                assert!(on);
                hammer(d, threads, 60, stripe, 200_000);
                d.close().unwrap();
            },
        );
    }
}

#[test]
fn large_requests_go_through_tls_whole() {
    let size = 24 << 20;
    secured(
        settings(),
        move |mut p| {
            assert!(p.agree(&Offer { size, ..Offer::default() }));
            p.serve(&mut vec![0; size as usize]);
        },
        |d| {
            let data: Vec<u8> =
                (0..20 << 20).map(|i: u32| (i.wrapping_mul(77) >> 8) as u8).collect();
            write(d, 1000, &data).unwrap();
            assert!(read(d, 1000, data.len()).unwrap() == data);
        },
    );
}

#[test]
fn time_limits_hold_through_tls() {
    secured(
        Settings { timeout: Some(Duration::from_millis(200)), ..settings() },
        |mut p| {
            assert!(p.agree(&Offer::default()));
            while p.request().is_some() {}
        },
        |d| assert!(is_errno(&read(d, 0, 512).unwrap_err(), libc::ETIMEDOUT)),
    );
}
