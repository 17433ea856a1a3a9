//! Certificates and keys from files and texts, and what is said of bad ones.

use std::process::Command;

use super::*;

#[test]
fn files_and_directories() {
    let (temp, ca) = (Temp::new(), Ca::new());
    let refused = |result: Result<TlsOptions>, part: &str| match result {
        Err(e @ (Error::Invalid(_) | Error::Unsupported { .. })) => {
            assert!(e.to_string().contains(part), "{e}")
        }
        other => panic!("{other:?}"),
    };
    refused(TlsOptions::from_directory(&temp.0), "ca-cert.pem");
    refused(TlsOptions::from_server_directory(&temp.0), "server-key.pem");
    temp.file("ca-cert.pem", &ca.text);
    refused(TlsOptions::from_server_directory(&temp.0), "server-key.pem");
    for (side, options) in [("server", ca.server()), ("client", ca.sign(&["me"], |_| {}))] {
        for (kind, pem) in [("cert", options.certificate), ("key", options.key)] {
            let Some(Pem::Text(text)) = pem else { panic!() };
            temp.file(&format!("{side}-{kind}.pem"), text);
        }
    }
    let client = TlsOptions::from_directory(&temp.0).unwrap();
    let mut server = TlsOptions::from_server_directory(&temp.0).unwrap();
    server.verify_peer = Some(true);
    connected(&client, &tcp("localhost"), &server);
    temp.file("ca-crl.pem", "");
    refused(TlsOptions::from_directory(&temp.0), "ca-crl.pem");
}

#[test]
fn bad_settings_are_named() {
    let (temp, ca) = (Temp::new(), Ca::new());
    let to = tcp("localhost");
    let good = ca.server();
    let no_key = TlsOptions { key: None, ..good.clone() };
    let no_certificate = TlsOptions { certificate: None, ..good.clone() };
    let key_of_another = TlsOptions { key: ca.server().key, ..good.clone() };
    let no_ca = TlsOptions { verify_peer: Some(true), ..good.clone() };
    let key = |pem| TlsOptions { key: pem, ..good.clone() };
    let encrypted =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----";
    let end_missing = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n";
    for (options, parts) in [
        (TlsOptions::default(), ["tls-certificate", "tls-key"]),
        (no_key, ["tls-certificate is set", "tls-key"]),
        (no_certificate, ["tls-key is set", "tls-certificate"]),
        (key_of_another, ["tls-key", "not that of the certificate"]),
        (no_ca, ["tls-verify-peer", "tls-ca"]),
        (key(temp.file("none.pem", "hello")), ["none.pem'", "PRIVATE KEY"]),
        (key(temp.file("locked.pem", encrypted)), ["locked.pem'", "passphrase"]),
        (key(temp.file("half.pem", end_missing)), ["half.pem'", "-----END"]),
        (
            key(text("-----BEGIN PRIVATE KEY-----\n***\n-----END PRIVATE KEY-----\n")),
            ["text of", "base64"],
        ),
        (
            key(text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")),
            ["text of", "tls-key"],
        ),
        (key(text("-----BEGIN PRIVATE KEY c2VjcmV0\n")), ["text of", "-----BEGIN"]),
        (key(good.certificate.clone()), ["tls-key", "PRIVATE KEY"]),
        (
            TlsOptions { certificate: good.key.clone(), ..good.clone() },
            ["tls-certificate", "CERTIFICATE"],
        ),
    ] {
        let (number, what) = errno(ServerTls::new(&options));
        assert_eq!(number, libc::EINVAL, "{what}");
        assert!(parts.iter().all(|part| what.contains(part)), "{what}");
        assert!(!what.contains("c2VjcmV0") && !what.contains("secret"), "{what}");
    }
    let missing =
        TlsOptions { ca: Some(Pem::File(temp.0.join("missing"))), ..TlsOptions::default() };
    let (number, what) = errno(ClientTls::new(&missing, &to));
    assert!(number == libc::ENOENT && what.contains("missing'"), "{what}");
    let not_ca = TlsOptions { ca: temp.file("ca", "x"), ..TlsOptions::default() };
    let (number, what) = errno(ClientTls::new(&not_ca, &to));
    assert!(number == libc::EINVAL && what.contains("CERTIFICATE"), "{what}");
    let endless = TlsOptions { ca: Some(Pem::File("/dev/zero".into())), ..TlsOptions::default() };
    assert_eq!(errno(ClientTls::new(&endless, &to)).0, libc::EINVAL);
}

#[test]
fn keys_are_not_shown() {
    let secret = TlsOptions {
        key: text("secret"),
        ca: Some(Pem::File("/ca".into())),
        ..TlsOptions::default()
    };
    let shown = format!("{secret:?}");
    assert!(
        !shown.contains("secret") && !shown.contains("115") && shown.contains("/ca"),
        "{shown}"
    );
}

/// Run the `openssl` command.
fn openssl(temp: &Temp, args: &str) {
    let run = Command::new("openssl").args(args.split(' ')).current_dir(&temp.0).output();
    let out = run.expect("this test needs the openssl command; as root: apt-get install openssl");
    assert!(out.status.success(), "{args}: {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn keys_may_be_pkcs8_pkcs1_or_sec1() {
    let temp = Temp::new();
    for (kind, traditional) in [("rsa:2048", "rsa"), ("ec -pkeyopt ec_paramgen_curve:P-256", "ec")]
    {
        openssl(
            &temp,
            &format!(
                "req -x509 -newkey {kind} -nodes -days 2 -subj /CN=x -keyout key.pem -out cert.pem \
                 -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE"
            ),
        );
        let pkcs8 = fs::read_to_string(temp.0.join("key.pem")).unwrap();
        assert!(pkcs8.contains("BEGIN PRIVATE KEY"), "{kind}");
        let form = if traditional == "rsa" { " -traditional" } else { "" };
        openssl(&temp, &format!("{traditional} -in key.pem -out old.pem{form}"));
        let old = fs::read_to_string(temp.0.join("old.pem")).unwrap();
        assert!(old.contains(&format!("BEGIN {} PRIVATE KEY", traditional.to_uppercase())));
        for key in ["key.pem", "old.pem"] {
            let pem = |name: &str| Some(Pem::File(temp.0.join(name)));
            let server =
                TlsOptions { certificate: pem("cert.pem"), key: pem(key), ..TlsOptions::default() };
            // One that nobody signed is its own CA.
            let client = TlsOptions { ca: pem("cert.pem"), ..TlsOptions::default() };
            connected(&client, &tcp("localhost"), &server);
        }
    }
}
