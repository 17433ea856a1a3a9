//! What URIs mean, what is refused, and that writing and reading agree.

use super::*;

fn parse(text: &str) -> Uri {
    Uri::parse(text.as_bytes()).unwrap()
}

fn refusal(text: &[u8]) -> String {
    match Uri::parse(text) {
        Err(Error::Invalid(what)) => what,
        other => panic!("{}: {other:?}", quoted(text)),
    }
}

fn tcp(host: &str, port: u16) -> Address {
    Address::Tcp { host: host.into(), port }
}

#[test]
fn the_examples_of_the_specification() {
    for (text, export) in [
        ("nbd://example.com/disk", "disk"),
        ("nbd+unix:///disk?socket=sock", "disk"),
        ("nbd://example.com/", ""),
        ("nbd://example.com", ""),
        ("nbd://example.com//disk", "/disk"),
        ("nbd://example.com/hello%20world", "hello world"),
    ] {
        assert_eq!(parse(text).export, export.as_bytes(), "{text}");
    }
    assert_eq!(parse("nbd://example.com:10810/x").address, tcp("example.com", 10810));
    assert_eq!(parse("nbd+unix:///disk?socket=nbd.sock").address, Address::Unix("nbd.sock".into()));
}

#[test]
fn authorities() {
    assert_eq!(parse("nbd://h").address, tcp("h", 10809));
    assert_eq!(parse("nbd://h:").address, tcp("h", 10809));
    assert_eq!(parse("nbd://:99/x").address, tcp("", 99));
    assert_eq!(parse("nbd:///x").address, tcp("", 10809));
    assert_eq!(parse("nbd:/x").export, b"x");
    assert_eq!(parse("NBDs://[::1]/x").address, tcp("::1", 10809));
    assert_eq!(parse("nbd://[fe80::1%25eth0]:1").address, tcp("fe80::1%eth0", 1));
    assert!(parse("nbds://h").tls && !parse("nbd://h").tls);
    assert_eq!(parse("nbds://alice%40home@h").user.as_deref(), Some("alice@home"));
    assert_eq!(parse("nbd+vsock://3:99/x").address, Address::Vsock { cid: 3, port: 99 });
    assert_eq!(parse("nbds+vsock://3").address, Address::Vsock { cid: 3, port: 10809 });
    assert_eq!(parse("nbd+vsock:///x").address, Address::Vsock { cid: 2, port: 10809 });
    assert_eq!(
        parse("nbd+vsock://4294967295:4294967295").address,
        Address::Vsock { cid: u32::MAX, port: u32::MAX }
    );
}

#[test]
fn parameters() {
    let uri = parse(
        "nbds+unix:?socket=/a%26b&tls-certificates=/c&tls-psk-file=p&tls-hostname=n\
         &tls-verify-peer=off&tls-type=x509&",
    );
    assert_eq!(uri.address, Address::Unix("/a&b".into()));
    assert_eq!(uri.tls_certificates, Some("/c".into()));
    assert_eq!(uri.tls_psk_file, Some("p".into()));
    assert_eq!(uri.tls_hostname.as_deref(), Some("n"));
    assert_eq!(uri.tls_verify_peer, Some(false));
    for (word, on) in [("1", true), ("on", true), ("true", true), ("0", false), ("false", false)] {
        let uri = parse(&format!("nbds://h?tls-verify-peer={word}"));
        assert_eq!(uri.tls_verify_peer, Some(on));
    }
}

#[test]
fn what_is_wrong_is_named_with_what_is_expected() {
    let long_name = [b"nbd://h/".as_slice(), &[b'x'; 4097]].concat();
    let long_path = [b"nbd+unix:///?socket=".as_slice(), &[b'x'; 108]].concat();
    for (text, parts) in [
        (b"nbd://h?tls-verfy-peer=0".as_slice(), ["'tls-verfy-peer'", "tls-verify-peer"]),
        (b"nbd://h?tls-verify-peer=maybe", ["'maybe'", "off"]),
        (b"nbd://h?tls-verify-peer", ["no value", "tls-verify-peer="]),
        (b"nbd://h?tls-hostname=a&tls-hostname=b", ["twice", "once"]),
        (b"nbd://h?tls-hostname=%ff", ["\\xff", "text"]),
        (b"nbd://h?tls-type=psk", ["'psk'", "x509"]),
        (b"nbd://h?socket=/x", ["socket=", "nbd+unix://"]),
        (b"nbd://h/a%zz", ["'%zz'", "hex digits"]),
        (b"nbd://h/a%4", ["'%4'", "hex digits"]),
        (b"nbd://h/a%", ["'%'", "hex digits"]),
        (b"nbd://h/a%00", ["NUL", "export name"]),
        (b"nbd://h/a\0", ["NUL", "export name"]),
        (b"nbd://h/a#b", ["'#b'", "%23"]),
        (&long_name, ["4097", "4096"]),
        (&long_path, ["108", "107"]),
        (b"nbd+unix:///x", ["?socket=PATH", "none"]),
        (b"nbd+unix://h/x?socket=s", ["'h'", "nothing"]),
        (b"nbd+unix:///x?socket=%00abs", ["NUL", "none"]),
        (b"nbd://h:65536", ["'65536'", "0 to 65535"]),
        (b"nbd://h:+1", ["'+1'", "0 to 65535"]),
        (b"nbd://h:99999999999999999999", ["'99999999999999999999'", "0 to 65535"]),
        (b"nbd+vsock://x", ["'x'", "number"]),
        (b"nbd+vsock://4294967296", ["4294967296", "number"]),
        (b"nbd+vsock://3:4294967296", ["4294967296", "4294967295"]),
        (b"nbd://::1", ["'::1'", "brackets"]),
        (b"nbd://[::1", ["'['", "']'"]),
        (b"nbd://[::1]x", ["'x'", ":PORT"]),
        (b"nbd://[h]", ["'h'", "IPv6"]),
        (b"nbd://a b", ["'a b'", "letters"]),
        (b"nbd://%ff", ["\\xff", "UTF-8"]),
        (b"http://h", ["unknown scheme", "nbd+unix:"]),
    ] {
        let what = refusal(text);
        assert!(parts.iter().all(|part| what.contains(part)), "{what}");
    }
    let what = refusal(b"nbds://user:secret@h");
    assert!(what.contains("password") && !what.contains("secret"), "{what}");
}

#[test]
fn the_old_form_is_refused_with_the_new_one() {
    for (old, new) in [
        ("nbd:unix:/run/x y:exportname=d", "nbd+unix:///d?socket=/run/x%20y"),
        ("nbd:unix:/run/x", "nbd+unix:///?socket=/run/x"),
        ("nbd:localhost:10810", "nbd://localhost:10810"),
        ("nbd:localhost:10809:exportname=a", "nbd://localhost/a"),
        ("nbd:[::1]:1", "nbd://[::1]:1"),
    ] {
        let what = refusal(old.as_bytes());
        assert!(what.ends_with(&format!("expected {new}")), "{what}");
        assert!(Uri::is_one(old.as_bytes()));
        parse(new);
    }
    for text in ["nbd:", "nbd+unix:/", "nbds+vsock:3:4", "nbd:unix:"] {
        refusal(text.as_bytes());
    }
}

#[test]
fn names_of_uris() {
    for yes in ["nbd:x", "NBD://", "nbds:", "nbd+unix:", "Nbds+Unix:", "nbd+vsock:", "nbds+vsock:"]
    {
        assert!(Uri::is_one(yes.as_bytes()), "{yes}");
    }
    for no in ["nbd", "nbd.img", "./nbd:x", "nbdx:", "", ":", "nbd+ssh:", "nbd+unix"] {
        assert!(!Uri::is_one(no.as_bytes()), "{no}");
    }
}

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
    fn bytes(&mut self, max: u64) -> Vec<u8> {
        let len = self.below(max) + 1;
        (0..len).map(|_| self.below(255) as u8 + 1).collect()
    }
    fn text(&mut self) -> String {
        (0..=self.below(9))
            .map(|_| ['a', '@', ':', '%', '/', '?', 'é', '&'][self.below(8) as usize])
            .collect()
    }
    fn maybe<T>(&mut self, value: T) -> Option<T> {
        (self.below(2) == 0).then_some(value)
    }
    fn uri(&mut self) -> Uri {
        let port = self.below(65535) as u32 + 1;
        let address = match self.below(5) {
            0 => tcp("", 10809),
            1 => tcp("host-1.example_x~", port as u16),
            2 => tcp("fe80::1%eth0", port as u16),
            3 => Address::Unix(OsString::from_vec(self.bytes(107)).into()),
            _ => Address::Vsock { cid: self.below(1 << 32) as u32, port: port * 9999 },
        };
        let (dir, file) = (self.bytes(50), self.bytes(50));
        let (user, name) = (self.text(), self.text());
        Uri {
            tls: self.below(2) == 0,
            user: self.maybe(user).filter(|_| !matches!(address, Address::Unix(_))),
            address,
            export: self.bytes(4096).split_off(1),
            tls_certificates: self.maybe(OsString::from_vec(dir).into()),
            tls_psk_file: self.maybe(OsString::from_vec(file).into()),
            tls_hostname: self.maybe(name),
            tls_verify_peer: self.maybe(port.is_multiple_of(2)),
        }
    }
}

#[test]
fn what_is_written_is_read_back() {
    let mut dice = Dice(1);
    for _ in 0..500 {
        let uri = dice.uri();
        let text = uri.to_string();
        assert!(text.bytes().all(|b| b.is_ascii_graphic()), "{text}");
        assert_eq!(Uri::parse(text.as_bytes()).unwrap(), uri, "{text}");
    }
}

#[test]
fn bytes_that_mean_nothing_do_no_harm() {
    let mut dice = Dice(2);
    for _ in 0..2000 {
        let mut text = dice.uri().to_string().into_bytes();
        text.truncate(200);
        for _ in 0..=dice.below(4) {
            let at = dice.below(text.len() as u64) as usize;
            match dice.below(3) {
                0 => text[at] = dice.below(256) as u8,
                1 => text.truncate(at + 1),
                _ => text.insert(at, b":/?[]@%&#="[dice.below(10) as usize]),
            }
        }
        if let Ok(uri) = Uri::parse(&text) {
            assert_eq!(parse(&uri.to_string()), uri, "{}", quoted(&text));
        }
    }
}
