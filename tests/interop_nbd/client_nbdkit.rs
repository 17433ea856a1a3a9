//! Our client, with nbdkit: plugins and filters, kinds of handshake, servers that are started.

use std::ffi::OsStr;
use std::fs;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use super::client_model::{exercise, exercise_together};
use super::common::*;
use super::peers::*;
use qblk::block::{Can, ErrorKind};
use qblk::{Extent, Image, ReqFlags};

const SIZE: u64 = 2 << 20;

fn property(image: &Image, key: &str) -> String {
    String::from_utf8(image.property(key).unwrap().unwrap_or_default()).unwrap()
}

fn args(words: &[String]) -> Vec<&dyn AsRef<OsStr>> {
    words.iter().map(|w| w as &dyn AsRef<OsStr>).collect()
}

/// The words of a command line, `FILE` being a file.
fn split(line: &str, file: &str) -> Vec<String> {
    line.split_whitespace().map(|w| w.replace("FILE", file)).collect()
}

#[test]
fn nbdkit_holds_what_a_plain_array_would() {
    let dir = Tmp::in_memory("cli-kit");
    let mut rng = Rng::new(seed("client_nbdkit"));
    let socket = dir.join("k.sock");
    let file = dir.join("file");
    let lines = [
        "memory 2M",
        "memory 2M allocator=malloc",
        "file FILE",
        "--filter=fua file FILE",
        "--filter=fua file FILE fuamode=discard",
        "--filter=fua file FILE fuamode=emulate",
        "--filter=fua file FILE fuamode=force",
        "--filter=noextents file FILE",
        "--filter=nozero file FILE",
        "--filter=nozero file FILE zeromode=emulate",
        "--filter=nozero file FILE zeromode=notrim",
        "--filter=nozero file FILE fastzeromode=none",
        "--filter=nocache file FILE cachemode=emulate",
        "--filter=cow file FILE",
        "--filter=noextents --filter=cache file FILE cache=writethrough",
        "--filter=readahead file FILE",
        "--filter=multi-conn file FILE multi-conn-mode=disable",
        "--filter=multi-conn file FILE multi-conn-mode=emulate",
        "--filter=noparallel file FILE serialize=all-requests",
        "--filter=nofilter --filter=cacheextents file FILE",
        "--filter=blocksize file FILE minblock=4096 maxdata=65536",
        "--filter=blocksize-policy memory 2M blocksize-minimum=4096 blocksize-error-policy=error",
        "--filter=blocksize-policy memory 2M blocksize-minimum=32768 blocksize-preferred=64K \
         blocksize-maximum=256K blocksize-error-policy=error",
        "--filter=blocksize-policy memory 2M blocksize-minimum=512 blocksize-maximum=512 \
         blocksize-preferred=512 blocksize-error-policy=error",
        "--filter=retry --filter=log file FILE logfile=/dev/null",
        "--filter=stats memory 2M statsfile=/dev/null",
        "--no-sr file FILE",
        "--mask-handshake=0 file FILE",
        "--mask-handshake=1 --no-sr memory 2M",
        "-t 1 file FILE",
    ];
    for line in lines {
        eprintln!("nbdkit {line}");
        let mut bytes = vec![0; SIZE as usize];
        if line.contains("FILE") {
            bytes = sparse_bytes(&file, SIZE, &mut rng);
        }
        let words = split(line, &text(&file));
        {
            let _nbdkit = nbdkit(&socket, &args(&words));
            let image = open_uri(&unix(&socket, ""), &[], RW);
            assert_eq!(image.info().unwrap().driver, "nbd");
            exercise(&image, &mut bytes, &mut rng, 60);
            if line.contains("no-sr") || line.contains("handshake=0") {
                assert_eq!(property(&image, "nbd.protocol"), "simple");
                assert_eq!(all_extents(&image, 0, SIZE, 10).len(), 1, "nothing is known");
            } else {
                assert_eq!(property(&image, "nbd.protocol"), "structured");
                exercise_together(&image, &mut bytes, &mut rng, 6);
            }
            image.close().unwrap();
        }
        // What was trimmed may be there still as far as the cache is concerned.
        if line.contains("FILE") && !line.contains("=cow") && !line.contains("=cache ") {
            assert_same(&fs::read(&file).unwrap(), &bytes, 0, line);
        }
    }
}

#[test]
fn abilities_are_those_of_the_server() {
    let dir = Tmp::in_memory("cli-able");
    let socket = dir.join("k.sock");
    let able = |line: &str, flags| {
        let words = split(line, "");
        let _nbdkit = nbdkit(&socket, &args(&words));
        open_uri(&unix(&socket, ""), &[], flags).info().unwrap()
    };
    let info = able("memory 1M", RW);
    assert_eq!(
        (info.can_fua, info.can_zero, info.can_trim),
        (Can::Native, Can::Native, Can::Native)
    );
    assert_eq!((info.can_extents, info.can_cache), (Can::Native, Can::Native));
    let info = able("--filter=fua memory 1M", RW);
    assert_ne!(info.can_fua, Can::Not, "by flushing");
    let info = able("--filter=nozero memory 1M", RW);
    assert_eq!(info.can_zero, Can::Emulate);
    assert_eq!(able("memory 1M", RW).can_fast_zero, Can::Native);
    let slow = "--filter=nozero memory 1M zeromode=plugin fastzeromode=none";
    let info = able(slow, RW);
    // What is not fast fails at once, which takes no server.
    assert_eq!((info.can_zero, info.can_fast_zero), (Can::Native, Can::Emulate));
    let info = able("--filter=noextents --filter=nocache memory 1M", RW);
    assert_eq!(info.can_cache, Can::Emulate);
    let info = able("memory 1M", RO);
    assert_eq!((info.can_zero, info.can_trim), (Can::Not, Can::Not));
    let line = "--filter=blocksize-policy memory 1M blocksize-minimum=4096 blocksize-preferred=64K";
    let info = able(line, RW);
    assert_eq!(info.optimal_io_size, 65536);
    // A disk that turns.
    let words = [
        "eval",
        "get_size=echo 1M",
        "pread=dd if=/dev/zero count=$3 iflag=count_bytes",
        "is_rotational=exit 0",
    ]
    .map(String::from);
    let _nbdkit = nbdkit(&socket, &args(&words));
    let image = open_uri(&unix(&socket, ""), &[], RO);
    assert_ne!(image.info().unwrap().state & qblk::image::state::ROTATIONAL, 0);
    assert_eq!(read_range(&image, 1000, 3000), [0; 3000]);
    assert_eq!(uri_error(&unix(&socket, ""), &[], RW).kind(), ErrorKind::Errno(libc::EROFS));
}

#[test]
fn contents_of_plugins_are_read_to_the_byte() {
    let dir = Tmp::in_memory("cli-plug");
    let socket = dir.join("k.sock");
    let uri = unix(&socket, "");
    {
        // 64-bit numbers, each its own offset.
        let _nbdkit = nbdkit(&socket, &[&"pattern", &"5000001"]);
        let image = open_uri(&uri, &[], RO);
        assert_eq!(image.size().unwrap(), 5_000_001);
        let all = read_all(&image);
        for (n, word) in all.chunks_exact(8).enumerate() {
            assert_eq!(word, (8 * n as u64).to_be_bytes());
        }
        let some = read_range(&image, 1_234_567, 77_777);
        assert_same(&some, &all[1_234_567..][..77_777], 1_234_567, "a part");
    }
    {
        // Very large, sparse; the last byte is there.
        let _nbdkit = nbdkit(&socket, &[&"data", &"@0x7ffffffff000 1*4096"]);
        let image = open_uri(&uri, &[], RO);
        let size = image.size().unwrap();
        assert_eq!(size, 1 << 47);
        assert_eq!(read_range(&image, size - 2, 2), [1, 1]);
        assert_eq!(read_range(&image, size - 5000, 1000)[904..], [1; 96]);
        let mut some = [Extent::default(); 4];
        let n = image.extents(0, 1 << 40, &mut some).unwrap();
        assert!(n >= 1 && some[0].has(Extent::ZERO) && some[0].length >= 1 << 31, "{some:?}");
        let n = image.extents(size - (1 << 20), 1 << 20, &mut some).unwrap();
        assert!(some[..n].iter().any(|e| e.has(Extent::DATA)), "{some:?}");
    }
    {
        let line = split("sparse-random 8M seed=7 percent=20", "");
        let _nbdkit = nbdkit(&socket, &args(&line));
        let image = open_uri(&uri, &[], RO);
        let copy = dir.join("copy");
        peer!("nbdcopy", uri, copy).ok();
        let bytes = fs::read(&copy).unwrap();
        assert_same(&read_all(&image), &bytes, 0, "sparse-random");
        let mut zeroes = 0;
        for e in all_extents(&image, 0, 8 << 20, 50) {
            if e.has(Extent::ZERO) {
                assert!(bytes[e.offset as usize..][..e.length as usize].iter().all(|b| *b == 0));
                zeroes += e.length;
            }
        }
        assert!(zeroes > 4 << 20, "{zeroes}");
    }
    {
        let _nbdkit = nbdkit(&socket, &[&"null", &"1T"]);
        let image = open_uri(&uri, &[], RW);
        image.write_at(&[1; 100_000], (1 << 40) - 100_000, ReqFlags::FUA).unwrap();
        assert_eq!(read_range(&image, (1 << 40) - 10, 10), [0; 10]);
        image.zero(0, 1 << 40, NONE).unwrap();
        image.trim(1, (1 << 40) - 1, NONE).unwrap();
    }
    {
        // Nothing at all.
        let _nbdkit = nbdkit(&socket, &[&"memory", &"0"]);
        let image = open_uri(&uri, &[], RW);
        assert_eq!(image.size().unwrap(), 0);
        image.read_at(&mut [], 0).unwrap();
        image.flush().unwrap();
        image.read_at(&mut [0], 0).unwrap_err();
        image.close().unwrap();
    }
}

#[test]
fn exports_are_chosen_by_name() {
    let dir = Tmp::in_memory("cli-name");
    let socket = dir.join("k.sock");
    {
        // An export whose content is its name.
        let _nbdkit = nbdkit(&socket, &[&"info", &"mode=exportname"]);
        for (in_uri, name) in [
            ("plain", "plain"),
            ("a%20b%2Fc", "a b/c"),
            ("sub/dir", "sub/dir"),
            ("100%25", "100%"),
            ("%E6%97%A5%E6%9C%AC", "日本"),
            ("%3Fq%3D1%26x%23y", "?q=1&x#y"),
        ] {
            let image = open_uri(&unix(&socket, in_uri), &[], RO);
            assert_eq!(read_all(&image), name.as_bytes());
            let image = open_uri(&unix(&socket, "other"), &[("nbd.export", name)], RO);
            assert_eq!(read_all(&image), name.as_bytes());
        }
        let long = "y".repeat(4096);
        let image = open_uri(&unix(&socket, ""), &[("nbd.export", &long)], RO);
        assert_eq!(read_all(&image), long.as_bytes());
        let too_long = "y".repeat(4097);
        let e = uri_error(&unix(&socket, ""), &[("nbd.export", &too_long)], RO);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    }
    // A directory of files, each an export.
    let files = dir.join("files");
    fs::create_dir(&files).unwrap();
    for n in 1..=3u8 {
        fs::write(files.join(format!("f{n} ü")), vec![n; 512 * usize::from(n)]).unwrap();
    }
    {
        let _nbdkit = nbdkit(&socket, &[&"file", &format!("dir={}", files.display())]);
        let uri = unix(&socket, "");
        let mut list: Vec<_> = qblk::image::list_exports(uri.as_bytes(), &options(&[])).unwrap();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        let names: Vec<_> =
            list.iter().map(|l| String::from_utf8(l.name.clone()).unwrap()).collect();
        assert_eq!(names, ["f1 ü", "f2 ü", "f3 ü"]);
        for (n, name) in (1..).zip(&names) {
            let image = open_uri(&uri, &[("nbd.export", name)], RW);
            assert_eq!(read_all(&image), vec![n; 512 * usize::from(n)]);
        }
        let e = uri_error(&unix(&socket, "f4"), &[], RO);
        assert!(e.to_string().contains("f4"), "{e}");
    }
    {
        let strict = split(
            "--filter=exportname memory 1M exportname=one exportname-list=explicit \
             exportname-strict=true exportdesc=fixed:text",
            "",
        );
        let _nbdkit = nbdkit(&socket, &args(&strict));
        let list = qblk::image::list_exports(unix(&socket, "").as_bytes(), &options(&[])).unwrap();
        assert_eq!(list.len(), 1);
        assert_eq!((&list[0].name[..], &list[0].description[..]), (&b"one"[..], &b"text"[..]));
        open_uri(&unix(&socket, "one"), &[], RW);
        let e = uri_error(&unix(&socket, "two"), &[], RO);
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    }
    {
        // The server says which one it took for no name.
        let words = split("--filter=exportname memory 1M default-export=one", "");
        let _nbdkit = nbdkit(&socket, &args(&words));
        let image = open_uri(&unix(&socket, ""), &[], RO);
        assert_eq!(property(&image, "nbd.export"), "one");
    }
}

#[test]
fn an_old_handshake_is_refused_with_its_name() {
    let dir = Tmp::in_memory("cli-old");
    let socket = dir.join("k.sock");
    let _nbdkit = nbdkit(&socket, &[&"-o", &"memory", &"1M"]);
    let e = uri_error(&unix(&socket, ""), &[], RO);
    assert!(e.to_string().contains("oldstyle"), "{e}");
    assert_ne!(e.kind(), ErrorKind::Internal);
    // Something that is no NBD server at all.
    let path = dir.join("web.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let web = std::thread::spawn(move || {
        use std::io::Write;
        let (mut s, _) = listener.accept().unwrap();
        let _ = s.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
    });
    let e = uri_error(&unix(&path, ""), &[], RO);
    assert_eq!(e.kind(), ErrorKind::Proto, "{e}");
    web.join().unwrap();
    let e = uri_error(&unix(&dir.join("nobody.sock"), ""), &[], RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    let e = uri_error(&format!("nbd://127.0.0.1:{}", free_port()), &[], RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ECONNREFUSED), "{e}");
}

#[test]
fn a_connected_socket_is_a_device() {
    let dir = Tmp::in_memory("cli-fd");
    let mut rng = Rng::new(seed("client_fd"));
    let socket = dir.join("k.sock");
    let _nbdkit = nbdkit(&socket, &[&"memory", &"2M"]);
    let port = free_port();
    let _tcp = on_port(&dir, "nbdkit", port, &[&"info", &"mode=exportname"]);
    let mut bytes = vec![0; SIZE as usize];
    let fd = UnixStream::connect(&socket).unwrap().into();
    let image = Image::open_fd(fd, &options(&[]), RW).unwrap();
    assert_eq!(property(&image, "nbd.connections"), "1");
    exercise(&image, &mut bytes, &mut rng, 60);
    assert!(image.reopen(None, RO).is_err(), "it is good for one connection");
    assert_same(&read_all(&image), &bytes, 0, "as before");
    image.close().unwrap();
    let fd = TcpStream::connect(("127.0.0.1", port)).unwrap().into();
    let image = Image::open_fd(fd, &options(&[("nbd.export", "by name")]), RO).unwrap();
    assert_eq!(read_all(&image), b"by name");
}

/// Whether a process is there, by the file in which it wrote its number.
fn is_there(pid: &std::path::Path) -> bool {
    let number = fs::read_to_string(pid).unwrap();
    fs::metadata(format!("/proc/{}", number.trim())).is_ok()
}

#[test]
fn a_server_is_started_and_ended_with_the_device() {
    let dir = Tmp::in_memory("cli-exec");
    let mut rng = Rng::new(seed("client_exec"));
    let pid = dir.join("pid");
    let file = dir.join("with space");
    sparse_bytes(&file, SIZE, &mut rng);
    let file_text = text(&file);
    let pid_text = text(&pid);
    let kit = format!("nbdkit --exit-with-parent -P {pid_text}");
    let qemu = format!("qemu-nbd -e 8 --pid-file {pid_text} -f raw '{file_text}'");
    for (argv, more) in [
        (format!("{kit} -s memory 2M"), &[][..]),
        (format!("{kit} -s file \"{file_text}\""), &[]),
        (format!("{kit} -f memory 2M"), &[("nbd.activation", "on")]),
        (format!("{kit} -f file '{file_text}'"), &[("nbd.activation", "on")]),
        (qemu, &[("nbd.activation", "on"), ("nbd.connections", "3")]),
    ] {
        let mut pairs = vec![("argv", &*argv)];
        pairs.extend(more);
        let image = open_uri("nbd+exec:", &pairs, RW);
        let mut bytes =
            if argv.contains("memory") { vec![0; SIZE as usize] } else { fs::read(&file).unwrap() };
        exercise(&image, &mut bytes, &mut rng, 60);
        assert!(is_there(&pid));
        image.close().unwrap();
        assert!(!is_there(&pid), "{argv}");
        if !argv.contains("memory") {
            assert_same(&fs::read(&file).unwrap(), &bytes, 0, &argv);
        }
    }
    // By name of an export, and read-only.
    let image = open_uri(
        "nbd+exec:///a%20name",
        &[("argv", "nbdkit --exit-with-parent -s info mode=exportname")],
        RO,
    );
    assert_eq!(read_all(&image), b"a%20name");
    drop(image);
    // One that there is not, and one that fails.
    let e = uri_error("nbd+exec:", &[("argv", "/nowhere/nbdkit -s null")], RO);
    assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOENT), "{e}");
    let e = uri_error("nbd+exec:", &[("argv", "sh -c 'exit 3'")], RO);
    assert!(matches!(e.kind(), ErrorKind::Errno(_)), "{e}");
}
