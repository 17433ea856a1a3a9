//! Our client, with servers that fail, refuse, and are slow; and with TLS.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::client_model::exercise;
use super::common::*;
use super::peers::*;
use qblk::ReqFlags;
use qblk::block::ErrorKind;

const SIZE: u64 = 2 << 20;
const EIO: ErrorKind = ErrorKind::Errno(libc::EIO);

#[test]
fn errors_of_the_server_are_the_callers() {
    let dir = Tmp::in_memory("cli-err");
    let socket = dir.join("k.sock");
    let inject = dir.join("inject");
    for (name, number) in [
        ("EPERM", libc::EPERM),
        ("EIO", libc::EIO),
        ("ENOMEM", libc::ENOMEM),
        ("EINVAL", libc::EINVAL),
        ("ENOSPC", libc::ENOSPC),
        ("ESHUTDOWN", libc::ESHUTDOWN),
    ] {
        let _ = fs::remove_file(&inject);
        let (error, file) = (format!("error={name}"), format!("error-file={}", inject.display()));
        let _nbdkit = nbdkit(
            &socket,
            &[&"--filter=error", &"memory", &"2M", &error, &"error-rate=100%", &file],
        );
        let image = open_uri(&unix(&socket, ""), &[("nbd.reconnect", "0")], RW);
        image.write_at(&[1; 100_000], 50_000, NONE).unwrap();
        fs::write(&inject, "").unwrap();
        let expected = ErrorKind::Errno(number);
        // One that says it is going down is as good as gone.
        if number == libc::ESHUTDOWN {
            assert!(image.read_at(&mut [0; 512], 0).is_err());
            continue;
        }
        for _ in 0..3 {
            assert_eq!(image.read_at(&mut [0; 512], 0).unwrap_err().kind(), expected);
            assert_eq!(image.read_at(&mut vec![0; 300_000], 7).unwrap_err().kind(), expected);
            assert_eq!(image.write_at(&[2; 5000], 60_000, NONE).unwrap_err().kind(), expected);
            assert_eq!(
                image.write_at(&[2; 5000], 60_000, ReqFlags::FUA).unwrap_err().kind(),
                expected
            );
            assert_eq!(image.zero(60_000, 5000, NONE).unwrap_err().kind(), expected);
            assert_eq!(image.trim(60_000, 5000, NONE).unwrap_err().kind(), expected);
            let e = image.extents(0, SIZE, &mut [Default::default(); 4]).unwrap_err();
            assert_eq!(e.kind(), expected, "{e}");
            // The text says what was done, and where.
            let e = image.read_at(&mut [0; 512], 4096).unwrap_err().to_string();
            assert!(e.contains("512") && e.contains("4096") && e.contains("k.sock"), "{e}");
        }
        fs::remove_file(&inject).unwrap();
        // The connection is as good as before, and nothing was changed.
        assert_eq!(read_range(&image, 50_000, 100_000), vec![1; 100_000]);
        image.write_at(&[3; 10], 0, NONE).unwrap();
        image.flush().unwrap();
        image.close().unwrap();
    }
}

#[test]
fn what_fails_now_and_then_is_right_otherwise() {
    let dir = Tmp::in_memory("cli-rate");
    let mut rng = Rng::new(seed("client_rate"));
    let socket = dir.join("k.sock");
    let how = ["error=EIO", "error-rate=20%", "error-extents-rate=0%"];
    let args: Vec<&dyn AsRef<OsStr>> = ["--filter=error", "memory", "2M"]
        .iter()
        .chain(&how)
        .map(|a| a as &dyn AsRef<OsStr>)
        .collect();
    let _nbdkit = nbdkit(&socket, &args);
    let image = open_uri(&unix(&socket, ""), &[("format", "raw")], RW);
    let mut model = vec![0u8; SIZE as usize];
    let (mut failed, mut done) = (0, 0);
    for _ in 0..600 {
        let count = rng.range(1, 40_000);
        let at = rng.below(SIZE - count);
        let range = at as usize..(at + count) as usize;
        let result = match rng.below(3) {
            0 => {
                let data = rng.bytes(count as usize);
                let result = image.write_at(&data, at, NONE);
                // One request, and the filter looks before it does anything.
                if result.is_ok() {
                    model[range].copy_from_slice(&data);
                }
                result
            }
            1 => {
                let mut found = vec![0; count as usize];
                let result = image.read_at(&mut found, at);
                if result.is_ok() {
                    assert_same(&found, &model[range], at, "read");
                }
                result
            }
            _ => {
                let result = image.zero(at, count, NONE);
                if result.is_ok() {
                    model[range].fill(0);
                }
                result
            }
        };
        match result {
            Ok(()) => done += 1,
            Err(e) => {
                assert_eq!(e.kind(), EIO, "{e}");
                failed += 1;
            }
        }
    }
    assert!(failed > 50 && done > 300, "{failed} failed, {done} did not");
    image.flush().unwrap();
}

#[test]
fn a_flush_that_failed_is_the_end_of_writing() {
    let dir = Tmp::in_memory("cli-flush");
    let socket = dir.join("k.sock");
    let (disk, broken) = (dir.join("disk"), dir.join("broken"));
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let at = |op: &str, how: &str| format!("{op}={}", how.replace("DISK", &text(&disk)));
    let words = [
        "eval".to_owned(),
        at("get_size", "stat -c %s DISK"),
        at("pread", "dd if=DISK skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none"),
        at("pwrite", "dd of=DISK seek=$4 conv=notrunc oflag=seek_bytes status=none"),
        at("can_write", "exit 0"),
        at("can_flush", "exit 0"),
        at("can_fua", "echo none"),
        format!(
            "flush=if [ -e {} ]; then echo EIO the disk is gone >&2; exit 1; fi",
            text(&broken)
        ),
    ];
    let args: Vec<&dyn AsRef<OsStr>> = words.iter().map(|w| w as &dyn AsRef<OsStr>).collect();
    let _nbdkit = nbdkit(&socket, &args);
    let image = open_uri(&unix(&socket, ""), &[], RW);
    image.write_at(&[1; 3000], 1000, NONE).unwrap();
    image.flush().unwrap();
    // Zeroing and FUA are emulated here.
    image.zero(2000, 500, NONE).unwrap();
    image.write_at(&[2; 100], 5000, ReqFlags::FUA).unwrap();
    fs::write(&broken, "").unwrap();
    image.write_at(&[3; 100], 6000, NONE).unwrap();
    let e = image.flush().unwrap_err();
    assert_eq!(e.kind(), EIO, "{e}");
    let other = image.own_context().unwrap();
    for context in [&image, &other] {
        assert_eq!(context.write_at(&[4], 0, NONE).unwrap_err().kind(), EIO);
        assert_eq!(context.flush().unwrap_err().kind(), EIO);
        assert_eq!(read_range(context, 4999, 2), [0, 2]);
    }
    fs::remove_file(&broken).unwrap();
    assert!(image.write_at(&[4], 0, NONE).is_err(), "until it is reopened");
    image.reopen(None, RW).unwrap();
    image.write_at(&[4; 10], 0, NONE).unwrap();
    image.flush().unwrap();
    other.close().unwrap();
    image.close().unwrap();
    assert_eq!(fs::read(&disk).unwrap()[..12], [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 0, 0]);
}

#[test]
fn a_slow_server_is_waited_for_no_longer_than_asked() {
    let dir = Tmp::in_memory("cli-slow");
    let socket = dir.join("k.sock");
    let how = ["--filter=delay", "memory", "2M", "rdelay=700ms", "wdelay=0"];
    let args: Vec<&dyn AsRef<OsStr>> = how.iter().map(|w| w as &dyn AsRef<OsStr>).collect();
    let _nbdkit = nbdkit(&socket, &args);
    {
        let image = open_uri(&unix(&socket, ""), &[("nbd.timeout", "0.2"), ("format", "raw")], RW);
        image.write_at(&[1; 512], 0, NONE).unwrap();
        image.flush().unwrap();
        let begun = Instant::now();
        let e = image.read_at(&mut [0; 512], 0).unwrap_err();
        let took = begun.elapsed();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ETIMEDOUT), "{e}");
        assert!(took >= Duration::from_millis(190), "{took:?}");
        // It goes on, by another connection.
        image.write_at(&[2; 512], 0, NONE).unwrap();
        image.close().unwrap();
    }
    // Slow is not dead: with time enough it works, and requests do not wait for one another.
    let image = open_uri(&unix(&socket, ""), &[("nbd.timeout", "30"), ("format", "raw")], RW);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for n in 0..16u64 {
            let image = &image;
            scope.spawn(move || {
                let byte = if n == 0 { 2 } else { 0 };
                assert_eq!(read_range(image, n * 512, 512), [byte; 512]);
            });
        }
    });
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_millis(700) && took < Duration::from_millis(16 * 700),
        "{took:?}"
    );
}

/// What a client with TLS is told.
fn tls<'a>(dir: &'a str, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut pairs = vec![("tls-certificates", dir)];
    pairs.extend(more);
    pairs
}

fn secure(uri: &str) -> String {
    uri.replacen("nbd", "nbds", 1)
}

/// A server with TLS required, that asks for the client's certificate if `verify`.
fn tls_server(
    dir: &Tmp,
    program: &str,
    certs: &Path,
    verify: bool,
    socket: &Path,
) -> (Daemon, Daemon, u16) {
    let port = free_port();
    let words: Vec<String> = match program {
        "nbdkit" => {
            let mut w =
                vec![format!("--tls-certificates={}", certs.display()), "--tls=require".into()];
            w.extend(verify.then(|| "--tls-verify-peer".into()));
            w.extend(["memory".into(), "2M".into()]);
            w
        }
        _ => {
            let on = if verify { "on" } else { "off" };
            let object = format!(
                "tls-creds-x509,id=t,endpoint=server,dir={},verify-peer={on}",
                certs.display()
            );
            let disk = dir.join("disk");
            fs::File::create(&disk).unwrap().set_len(SIZE).unwrap();
            let words = ["-e", "8", "-f", "raw", "--object", &object, "--tls-creds", "t"];
            words.map(String::from).into_iter().chain([text(&disk)]).collect()
        }
    };
    let args: Vec<&dyn AsRef<OsStr>> = words.iter().map(|w| w as &dyn AsRef<OsStr>).collect();
    let at_socket =
        if program == "nbdkit" { nbdkit(socket, &args) } else { qemu_nbd(socket, &args) };
    // QEMU locks the file that both have.
    let mut shared = args;
    let image = format!(
        "driver=raw,file.driver=file,file.locking=off,file.filename={}",
        text(&dir.join("disk"))
    );
    let option = "--image-opts";
    if program != "nbdkit" {
        shared.retain(|a| a.as_ref() != "-f" && a.as_ref() != "raw");
        shared.pop();
        shared.extend([&option as &dyn AsRef<OsStr>, &image]);
    }
    let at_port = on_port(dir, program, port, &shared);
    (at_socket, at_port, port)
}

#[test]
fn servers_with_tls_are_used_and_checked() {
    let dir = Tmp::in_memory("cli-tls");
    let mut rng = Rng::new(seed("client_tls"));
    let certs = Certs::new(&dir);
    let (own, anonymous, stranger) =
        (text(&certs.dir), text(&certs.anonymous), text(&certs.stranger));
    let other_authority = Tmp::in_memory("cli-tls-other");
    let other_authority = text(&Certs::new(&other_authority).anonymous);
    let socket = dir.join("s.sock");
    for (program, verify) in
        [("nbdkit", false), ("qemu-nbd", false), ("nbdkit", true), ("qemu-nbd", true)]
    {
        let (_a, _b, port) = tls_server(&dir, program, &certs.dir, verify, &socket);
        let export = "";
        let by_port = format!("nbd://127.0.0.1:{port}/{export}");
        let by_name = format!("nbds://localhost:{port}/{export}");
        let by_socket = unix(&socket, export);
        let mine = if verify { &own } else { &anonymous };
        let named = [("tls-hostname", "localhost")];
        for (uri, pairs) in [
            (&secure(&by_port), tls(mine, &[])),
            (&by_name, tls(mine, &[])),
            (&by_port, tls(mine, &[("tls", "required")])),
            (&secure(&by_socket), tls(mine, &named)),
        ] {
            let image = open_uri(uri, &pairs, RW);
            let on = image.property("nbd.tls").unwrap().unwrap();
            assert_eq!(on, b"on", "{uri}");
            let mut bytes = read_all(&image);
            exercise(&image, &mut bytes, &mut rng, 25);
            image.close().unwrap();
        }
        // Without TLS: refused, and the text says why.
        for uri in [&by_port, &by_socket] {
            let e = uri_error(uri, &[], RO);
            assert!(e.to_string().contains("TLS"), "{e}");
        }
        // Whoever cannot be checked is not believed.
        let at_port = secure(&by_port);
        for (uri, pairs) in [
            (&at_port, tls(&other_authority, &[])),
            (&at_port, tls(mine, &[("tls-hostname", "elsewhere.example")])),
            (&at_port, vec![]),
        ] {
            let e = uri_error(uri, &pairs, RO);
            assert!(e.to_string().to_lowercase().contains("certificate"), "{e}");
        }
        open_uri(
            &at_port,
            &tls(mine, &[("tls-verify-peer", "off"), ("tls-hostname", "x.example")]),
            RO,
        );
        if verify {
            for who in [&anonymous, &stranger] {
                uri_error(&at_port, &tls(who, &[]), RO);
            }
        }
        let list =
            qblk::image::list_exports(at_port.as_bytes(), &options(&tls(mine, &[]))).unwrap();
        assert_eq!(list.len(), 1, "{program}");
    }
    // TLS is asked for where there is none.
    let _plain = nbdkit(&socket, &[&"memory", &"1M"]);
    let e =
        uri_error(&secure(&unix(&socket, "")), &tls(&own, &[("tls-hostname", "localhost")]), RO);
    assert!(e.to_string().contains("TLS"), "{e}");
}
