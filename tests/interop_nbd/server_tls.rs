//! Our server with TLS, with nbdinfo, nbdcopy, nbdsh, qemu-img and nbdkit.

use std::fs;
use std::path::Path;

use super::common::*;
use super::peers::*;

const SIZE: u64 = 4 << 20;

struct Setup {
    dir: Tmp,
    certs: Certs,
    bytes: Vec<u8>,
    image: qblk::Image,
}

impl Setup {
    fn new(name: &str) -> Self {
        let dir = Tmp::new(name);
        let bytes = sparse_bytes(&dir.join("raw"), SIZE, &mut Rng::new(seed(name)));
        let image = open_with(&dir.join("raw"), &options(&[("format", "raw")]), RW);
        Self { certs: Certs::new(&dir), dir, bytes, image }
    }

    fn serve(&self, tls: &str, more: &[(&str, &str)]) -> Served {
        let certs = self.certs.settings();
        let mut settings = vec![("tls", tls)];
        settings.extend(certs.iter().map(|(k, v)| (*k, &**v)));
        settings.extend(more);
        Served::new(&self.dir, &[("x", &self.image)], &settings)
    }
}

/// A URI with TLS, and the certificates in a directory.
fn secure(uri: &str, certs: &Path) -> String {
    let uri = uri.replacen("nbd", "nbds", 1);
    let glue = if uri.contains('?') { '&' } else { '?' };
    format!("{uri}{glue}tls-certificates={}", certs.display())
}

/// `qemu-img convert` with TLS, out of the export.
fn qemu(served: &Served, unix: bool, certs: &Path, to: &Path) -> Ran {
    let tls = format!("tls-creds-x509,id=t,endpoint=client,dir={}", certs.display());
    let (host, port) = served.host.split_once(':').unwrap();
    let server = match unix {
        true => format!("server.type=unix,server.path={}", served.socket.display()),
        false => format!("server.type=inet,server.host={host},server.port={port}"),
    };
    let name = "export=x,tls-creds=t,tls-hostname=localhost";
    let from = format!("driver=nbd,{server},{name}");
    peer!("qemu-img", "convert", "--object", tls, "--image-opts", "-O", "raw", from, to)
}

#[test]
fn tls_on_serves_both_kinds() {
    let s = Setup::new("nbd-tls-on");
    let served = s.serve("on", &[]);
    let (file, back) = (s.dir.join("file"), s.dir.join("back"));
    for uri in served.both("x") {
        assert!(peer!("nbdinfo", "--json", uri).ok().contains("\"TLS\": false"));
        let uri = secure(&uri, &s.certs.anonymous);
        let told = peer!("nbdinfo", "--json", uri).ok();
        assert!(told.contains("\"TLS\": true") && told.contains("\"structured\": true"), "{told}");
        let _ = fs::remove_file(&file);
        peer!("nbdcopy", "-C", "4", "-T", "4", uri, file).ok();
        assert_same(&fs::read(&file).unwrap(), &s.bytes, 0, "nbdcopy by TLS");
        s.image.zero(0, SIZE, NONE).unwrap();
        peer!("nbdcopy", "-C", "2", file, uri).ok();
        assert_same(&read_all(&s.image), &s.bytes, 0, "nbdcopy by TLS, back");
        let list = peer!("nbdinfo", "--list", uri.replace("/x", "/")).ok();
        assert!(list.contains("export=\"x\""), "{list}");
        let script = format!(
            "h.set_uri_allow_local_file(True)\nh.connect_uri({uri:?})\n\
             assert h.get_tls_negotiated()\nn = h.get_size()\nb = h.pread(n, 0)\nh.pwrite(b, 0)\n\
             assert h.pread(n, 0) == b\nh.flush()"
        );
        peer!("nbdsh", "-c", script).ok();
    }
    for unix in [true, false] {
        qemu(&served, unix, &s.certs.anonymous, &back).ok();
        assert_same(&fs::read(&back).unwrap(), &s.bytes, 0, "qemu-img by TLS");
    }
}

#[test]
fn tls_required_refuses_plain_clients() {
    let s = Setup::new("nbd-tls-req");
    let served = s.serve("required", &[]);
    assert!(served.server.uri().unwrap().starts_with(b"nbds://127.0.0.1"));
    for uri in served.both("x") {
        let told = peer!("nbdinfo", uri).fails();
        assert!(told.contains("TLS"), "{told}");
        peer!("nbdinfo", "--list", uri).fails();
        let told = peer!("qemu-img", "info", uri).fails();
        assert!(told.contains("TLS"), "{told}");
        // Refused, not hung up on: a client may think better of it.
        let script = format!(
            "h.set_opt_mode(True)\nh.connect_uri({uri:?})\nfor f in [h.opt_go, h.opt_info]:\n\
             \x20 try:\n    f()\n  except nbd.Error as e:\n    assert e.errnum == 95, str(e)\n\
             \x20 else:\n    assert False\nh.opt_abort()"
        );
        peer!("nbdsh", "-c", script).ok();
        let uri = secure(&uri, &s.certs.anonymous);
        peer!("nbdinfo", uri).ok();
        peer!("nbdinfo", "--map", uri).ok();
    }
    // One of another authority is not believed by the client.
    let other = s.dir.join("other");
    fs::create_dir(&other).unwrap();
    let dir = Tmp::new("nbd-tls-other");
    fs::copy(Certs::new(&dir).dir.join("ca-cert.pem"), other.join("ca-cert.pem")).unwrap();
    let told = peer!("nbdinfo", secure(&served.tcp("x"), &other)).fails();
    assert!(told.contains("certificate"), "{told}");
    qemu(&served, false, &other, &s.dir.join("out")).fails();
    // The server goes on.
    peer!("nbdinfo", secure(&served.tcp("x"), &s.certs.anonymous)).ok();
}

#[test]
fn a_client_shows_its_certificate_if_asked() {
    let s = Setup::new("nbd-tls-peer");
    let served = s.serve("required", &[("tls-verify-peer", "on")]);
    let out = s.dir.join("out");
    for (n, uri) in served.both("x").iter().enumerate() {
        peer!("nbdinfo", secure(uri, &s.certs.dir)).ok();
        peer!("nbdinfo", secure(uri, &s.certs.anonymous)).fails();
        peer!("nbdinfo", secure(uri, &s.certs.stranger)).fails();
        let _ = fs::remove_file(&out);
        peer!("nbdcopy", "-C", "4", "-T", "4", secure(uri, &s.certs.dir), out).ok();
        assert_same(&fs::read(&out).unwrap(), &s.bytes, 0, "nbdcopy");
        peer!("nbdcopy", secure(uri, &s.certs.anonymous), "null:").fails();
        qemu(&served, n == 0, &s.certs.dir, &out).ok();
        assert_same(&fs::read(&out).unwrap(), &s.bytes, 0, "qemu-img");
        qemu(&served, n == 0, &s.certs.anonymous, &out).fails();
        qemu(&served, n == 0, &s.certs.stranger, &out).fails();
    }
}

#[test]
fn nbdkit_passes_our_tls_export_on() {
    let s = Setup::new("nbd-tls-proxy");
    let served = s.serve("required", &[("tls-verify-peer", "on")]);
    let proxy = s.dir.join("proxy.sock");
    let (host, port) = served.host.split_once(':').unwrap();
    let (host, port) = (format!("hostname={host}"), format!("port={port}"));
    let certs = format!("tls-certificates={}", s.certs.dir.display());
    let _nbdkit = nbdkit(&proxy, &[&"nbd", &host, &port, &"export=x", &"tls=require", &certs]);
    let out = s.dir.join("out");
    peer!("nbdcopy", unix(&proxy, ""), out).ok();
    assert_same(&fs::read(&out).unwrap(), &s.bytes, 0, "through nbdkit");
    qemu_io_at(&unix(&proxy, ""), "raw", &["write -P 3 1M 1M", "flush"]);
    assert_eq!(read_range(&s.image, 1 << 20, 1 << 20), vec![3; 1 << 20]);
}
