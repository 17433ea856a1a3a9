//! Our server, with nbdinfo, nbdcopy, and nbdkit as a proxy.

use std::fs;

use super::common::*;
use super::peers::*;
use qblk::Image;

const SIZE: u64 = 8 << 20;

/// A name as it stands in a URI.
fn encoded(name: &str) -> String {
    name.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => {
                char::from(b).to_string()
            }
            _ => format!("%{b:02X}"),
        })
        .collect()
}

/// A raw image with some data, and its bytes.
fn sparse(dir: &Tmp, name: &str, rng: &mut Rng) -> (Image, Vec<u8>) {
    let path = dir.join(name);
    let bytes = sparse_bytes(&path, SIZE, rng);
    (open_with(&path, &options(&[("format", "raw")]), RW), bytes)
}

#[test]
fn nbdinfo_tells_all_about_an_export() {
    let dir = Tmp::new("nbd-info");
    let image = raw_file(&dir.join("raw"), SIZE);
    let small = raw_file(&dir.join("small"), 12345);
    let served = Served::new(&dir, &[("first", &image)], &[]);
    export(&served.server, "second", "A small disk: ünï \"quoted\"", &small, true);
    for uri in served.both("first") {
        let told = peer!("nbdinfo", "--json", uri).ok();
        for line in [
            "\"protocol\": \"newstyle-fixed\"",
            "\"TLS\": false",
            "\"structured\": true",
            "\"export-name\": \"first\"",
            "\"base:allocation\"",
            "\"qemu:allocation-depth\"",
            "\"is_read_only\": false",
            "\"can_cache\": true",
            "\"can_df\": true",
            "\"can_fast_zero\": true",
            "\"can_flush\": true",
            "\"can_fua\": true",
            "\"can_multi_conn\": true",
            "\"can_trim\": true",
            "\"can_zero\": true",
            "\"block_size_minimum\": 1,",
            "\"block_size_maximum\": 33554432,",
            &format!("\"export-size\": {SIZE},"),
        ] {
            assert!(told.contains(line), "{line} not in {told}");
        }
        assert!(!told.contains("\"description\""), "{told}");
        let text = peer!("nbdinfo", uri).ok();
        assert!(text.contains("export-size: 8388608 (8M)"), "{text}");
    }
    for uri in served.both("second") {
        let told = peer!("nbdinfo", "--json", uri).ok();
        for line in [
            "\"description\": \"A small disk: ünï \\\"quoted\\\"\"",
            "\"is_read_only\": true",
            "\"can_trim\": false",
            "\"can_zero\": false",
            "\"can_flush\": true",
            "\"can_multi_conn\": true",
            // To the byte.
            "\"export-size\": 12345,",
        ] {
            assert!(told.contains(line), "{line} not in {told}");
        }
        assert_eq!(peer!("nbdinfo", "--size", uri).ok().trim(), "12345");
        peer!("nbdinfo", "--is", "read-only", uri).ok();
        peer!("nbdinfo", "--is", "rotational", uri).fails();
        peer!("nbdinfo", "--can", "df", uri).ok();
        peer!("nbdinfo", "--can", "write", uri).fails();
    }
    for uri in served.both("") {
        let told = peer!("nbdinfo", "--list", uri).ok();
        for part in ["export=\"first\":", "export=\"second\":", "description: A small disk"] {
            assert!(told.contains(part), "{part} not in {told}");
        }
        // No export has the empty name.
        let told = peer!("nbdinfo", uri).fails();
        assert!(told.contains("export"), "{told}");
    }
    assert_eq!(served.server.stats().refused, 0);
}

#[test]
fn names_of_exports_may_be_odd() {
    let dir = Tmp::new("nbd-names");
    let image = raw_file(&dir.join("raw"), 4096);
    let served = Served::new(&dir, &[], &[]);
    let long = "x".repeat(2000);
    let names =
        ["", "a b", "ünï", "100%", "?q=1&x#y", "\"quoted\"\\", "日本語", "a/b", "dot.-_~", &long];
    for (n, name) in names.iter().enumerate() {
        image.write_at(&[n as u8 + 1; 512], 0, NONE).unwrap();
        // Each of another size, so that they cannot be mistaken for one another.
        let path = dir.join(format!("raw{n}"));
        let one = raw_file(&path, 512 * (n as u64 + 1));
        export(&served.server, name, &format!("number {n}"), &one, false);
    }
    for (n, name) in names.iter().enumerate() {
        let size = 512 * (n + 1);
        for uri in served.both(&encoded(name)) {
            let told = peer!("nbdinfo", "--size", uri).ok();
            assert_eq!(told.trim(), size.to_string(), "{uri}");
            let command = format!("write -P 5 {} 512", size - 512);
            qemu_io_at(&uri, "raw", &[&command]);
            let own = open_uri(&uri, &[], RO);
            assert_eq!(own.size().unwrap(), size as u64, "{uri}");
        }
        // Our server's own idea of its URI is that of a client's.
        let copy = raw_file(&dir.join("one"), 512);
        let single = Served::new(&dir, &[(name, &copy)], &[]);
        let uri = String::from_utf8(single.server.uri().unwrap()).unwrap();
        assert_eq!(peer!("nbdinfo", "--size", uri).ok().trim(), "512", "{uri}");
    }
    let listed = peer!("nbdinfo", "--list", "--json", served.tcp("")).ok();
    for n in 0..names.len() {
        assert!(listed.contains(&format!("\"number {n}\"")), "{n} in {listed}");
    }
    // One name for all others.
    let any = raw_file(&dir.join("any"), 1 << 20);
    export(&served.server, "*", "", &any, false);
    assert_eq!(peer!("nbdinfo", "--size", served.tcp("whatever")).ok().trim(), "1048576");
    assert_eq!(peer!("nbdinfo", "--size", served.tcp("a%20b")).ok().trim(), "1024");
}

#[test]
fn nbdcopy_goes_both_ways() {
    let dir = Tmp::new("nbd-copy");
    let mut rng = Rng::new(seed("nbdcopy"));
    let (from, bytes) = sparse(&dir, "from", &mut rng);
    let to = raw_file(&dir.join("to"), SIZE);
    let pairs = [("cluster-size", "64k")];
    create(&dir.join("q.qcow2"), "qcow2", SIZE, &pairs);
    let qcow2 = open(&dir.join("q.qcow2"), RW);
    let served = Served::new(&dir, &[("from", &from), ("to", &to), ("q", &qcow2)], &[]);
    let file = dir.join("file");
    for (n, (a, b)) in served.both("from").iter().zip(served.both("to")).enumerate() {
        for how in [
            &["-C", "1"][..],
            &["-C", "4", "-T", "4"],
            &["-S", "4096", "-R", "4"],
            &["--flush", "-T", "3"],
        ] {
            let _ = fs::remove_file(&file);
            let run = |x: &dyn AsRef<std::ffi::OsStr>, y: &dyn AsRef<std::ffi::OsStr>| {
                let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> =
                    how.iter().map(|h| h as &dyn AsRef<std::ffi::OsStr>).collect();
                args.extend([x, y]);
                run_peer("nbdcopy", &args).ok();
            };
            run(a, &file);
            assert_same(&fs::read(&file).unwrap(), &bytes, 0, "to a file");
            assert!(on_disk(&file) < SIZE, "holes stay holes");
            to.write_at(&rng.bytes(SIZE as usize), 0, NONE).unwrap();
            run(&file, &b);
            assert_same(&read_all(&to), &bytes, 0, "from a file");
            assert!(on_disk(&dir.join("to")) < SIZE, "holes stay holes");
            // From export to export, into an image with tables.
            qcow2.write_at(&rng.bytes(SIZE as usize), 0, NONE).unwrap();
            run(a, &served.both("q")[n]);
            assert_same(&read_all(&qcow2), &bytes, 0, "from export to export");
        }
        let _ = fs::remove_file(&file);
        peer!("nbdcopy", "--allocated", a, file).ok();
        assert_same(&fs::read(&file).unwrap(), &bytes, 0, "--allocated");
        to.zero(0, SIZE, NONE).unwrap();
        peer!("nbdcopy", "--destination-is-zero", "-C", "4", "-T", "4", a, b).ok();
        assert_same(&read_all(&to), &bytes, 0, "--destination-is-zero");
        // Without extents and in tiny requests.
        peer!("nbdcopy", "--no-extents", "--request-size=4096", "-C", "2", a, b).ok();
        assert_same(&read_all(&to), &bytes, 0, "--no-extents");
        peer!("nbdcopy", a, "null:").ok();
    }
    let stats = served.server.stats();
    assert!(stats.connections >= 2 * (4 + 4), "{stats:?}");
    served.stop();
    qcow2.close().unwrap();
    check_clean(&dir.join("q.qcow2"));
    check_same(&dir.join("q.qcow2"), "qcow2", &bytes, &dir.join("scratch"));
}

#[test]
fn nbdkit_passes_our_export_on() {
    let dir = Tmp::new("nbd-proxy");
    let mut rng = Rng::new(seed("nbdkit_proxy"));
    let (image, mut bytes) = sparse(&dir, "raw", &mut rng);
    let served = Served::new(&dir, &[("x", &image)], &[]);
    for uri in served.both("x") {
        let proxy = dir.join("proxy.sock");
        let _nbdkit = nbdkit(&proxy, &[&"nbd", &format!("uri={uri}")]);
        let through = unix(&proxy, "");
        let direct = peer!("nbdinfo", "--map", uri).ok();
        assert_eq!(peer!("nbdinfo", "--map", through).ok(), direct);
        let commands = [
            "write -P 0x61 3M 100k",
            "write -z -u 5M 300k",
            "discard 6M 64k",
            "write -P 4 6M 64k",
            "flush",
        ];
        qemu_io_at(&through, "raw", &commands);
        bytes[3 << 20..][..100 << 10].fill(0x61);
        bytes[5 << 20..][..300 << 10].fill(0);
        bytes[6 << 20..][..64 << 10].fill(4);
        assert_same(&read_all(&image), &bytes, 0, "through nbdkit");
        let copy = dir.join("copy");
        peer!("qemu-img", "convert", "-f", "raw", "-O", "qcow2", through, copy).ok();
        peer!("qemu-img", "compare", "-f", "qcow2", "-F", "raw", copy, uri).ok();
        // And our client at the far end of it.
        let far = open_uri(&through, &[], RW);
        far.write_at(&[9; 700], 12_345, qblk::ReqFlags::FUA).unwrap();
        bytes[12_345..][..700].fill(9);
        assert_same(&read_all(&far), &bytes, 0, "at the far end");
        far.close().unwrap();
        assert_same(&read_all(&image), &bytes, 0, "through nbdkit");
    }
    // Several connections from one.
    let proxy = dir.join("multi.sock");
    let uri = format!("uri={}", served.tcp("x"));
    let before = served.server.stats().connections;
    let _nbdkit = nbdkit(&proxy, &[&"nbd", &uri, &"shared=false", &"retry=2"]);
    peer!("nbdcopy", "-C", "4", "-T", "4", unix(&proxy, ""), dir.join("file")).ok();
    assert_same(&fs::read(dir.join("file")).unwrap(), &bytes, 0, "four connections");
    let after = served.server.stats().connections;
    assert!(after >= before + 4, "{before}, {after}");
}

#[test]
fn qemu_nbd_passes_our_export_on() {
    let dir = Tmp::new("nbd-proxy-q");
    let mut rng = Rng::new(seed("qemu_proxy"));
    let (image, mut bytes) = sparse(&dir, "raw", &mut rng);
    let served = Served::new(&dir, &[("x", &image)], &[]);
    let proxy = dir.join("proxy.sock");
    let _qemu = qemu_nbd(&proxy, &[&"-f", &"raw", &"-e", &"4", &served.unix("x")]);
    peer!("nbdcopy", "-C", "4", "-T", "4", unix(&proxy, ""), dir.join("file")).ok();
    assert_same(&fs::read(dir.join("file")).unwrap(), &bytes, 0, "out");
    let far = open_uri(&unix(&proxy, ""), &[], RW);
    let data = rng.bytes(3 << 20);
    far.write_at(&data, 1_000_001, NONE).unwrap();
    far.flush().unwrap();
    bytes[1_000_001..][..3 << 20].copy_from_slice(&data);
    assert_same(&read_all(&image), &bytes, 0, "in");
    assert_same(&read_all(&far), &bytes, 0, "back");
}
