//! Our server, with qemu-img and qemu-io.

use std::fs;

use super::common::*;
use super::peers::*;
use qblk::Options;

const SIZE: u64 = 8 << 20;

/// A qcow2 image of ours with a raw backing file; what both hold together.
fn chain(dir: &Tmp, rng: &mut Rng) -> (qblk::Image, Vec<u8>) {
    let mut bytes = sparse_bytes(&dir.join("base"), SIZE, rng);
    let pairs = [("backing-file", "base"), ("backing-fmt", "raw")];
    create(&dir.join("top.qcow2"), "qcow2", SIZE, &pairs);
    let image = open(&dir.join("top.qcow2"), RW);
    for _ in 0..5 {
        let n = rng.range(1, 200_000);
        let at = rng.below(SIZE - n);
        let data = rng.bytes(n as usize);
        image.write_at(&data, at, NONE).unwrap();
        bytes[at as usize..][..n as usize].copy_from_slice(&data);
    }
    image.zero(1 << 20, 1 << 20, NONE).unwrap();
    bytes[1 << 20..2 << 20].fill(0);
    (image, bytes)
}

#[test]
fn qemu_img_sees_what_the_export_holds() {
    let dir = Tmp::new("nbd-qimg");
    let mut rng = Rng::new(seed("qemu_img"));
    let (image, bytes) = chain(&dir, &mut rng);
    let raw = raw_file(&dir.join("raw"), 0);
    raw.resize(1_000_000 / 512 * 512, &Options::new(), false).unwrap();
    let served = Served::new(&dir, &[("", &image), ("raw", &raw)], &[]);
    let plain = dir.join("plain");
    fs::write(&plain, &bytes).unwrap();
    for uri in served.both("") {
        let info = peer!("qemu-img", "info", uri).ok();
        assert!(info.contains(&format!("({SIZE} bytes)")), "{info}");
        assert!(info.contains("file format: raw"), "{info}");
        peer!("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, plain).ok();
        // Out of the export, in formats that keep holes.
        for format in ["raw", "qcow2", "vmdk"] {
            let copy = dir.join(format!("copy.{format}"));
            peer!("qemu-img", "convert", "-f", "raw", "-O", format, uri, copy).ok();
            peer!("qemu-img", "compare", "-f", format, "-F", "raw", copy, plain).ok();
        }
        let copy = dir.join("copy.raw");
        assert_same(&fs::read(&copy).unwrap(), &bytes, 0, "convert");
        assert!(on_disk(&copy) < SIZE, "holes stay holes");
        // Many requests at a time, out of order.
        peer!("qemu-img", "convert", "-m", "16", "-W", "-f", "raw", "-O", "raw", uri, copy).ok();
        assert_same(&fs::read(&copy).unwrap(), &bytes, 0, "convert -m 16 -W");
    }
    for uri in served.both("raw") {
        let info = peer!("qemu-img", "info", "--output=json", uri).ok();
        assert!(info.contains(&format!("\"virtual-size\": {}", raw.size().unwrap())), "{info}");
        let measured = peer!("qemu-img", "measure", "-f", "raw", "-O", "qcow2", uri).ok();
        assert!(measured.contains("required size"), "{measured}");
    }
    peer!("qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "16", served.unix("")).ok();
    let stats = served.server.stats();
    assert_eq!((stats.errors, stats.refused), (0, 0));
    assert!(stats.connections > 16 && stats.reads > 50, "{stats:?}");
    served.stop();
    image.close().unwrap();
    check_clean(&dir.join("top.qcow2"));
}

#[test]
fn qemu_img_converts_into_an_export() {
    let dir = Tmp::new("nbd-qimg-in");
    let mut rng = Rng::new(seed("qemu_img_in"));
    let source = dir.join("source");
    let bytes = sparse_bytes(&source, SIZE, &mut rng);
    for format in ["raw", "qcow2"] {
        let path = dir.join(format!("disk.{format}"));
        create(&path, format, SIZE, &[]);
        let image = open_with(&path, &options(&[("format", format)]), RW);
        let served = Served::new(&dir, &[("disk", &image)], &[]);
        for (n, uri) in served.both("disk").into_iter().enumerate() {
            // What was there before is to go.
            image.write_at(&rng.bytes(SIZE as usize), 0, NONE).unwrap();
            let mut how = vec!["convert", "-n", "-f", "raw", "-O", "raw"];
            if n == 1 {
                how.extend(["-m", "8", "-W", "-S", "64k"]);
            }
            let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> =
                how.iter().map(|a| a as &dyn AsRef<std::ffi::OsStr>).collect();
            args.extend([&source as &dyn AsRef<std::ffi::OsStr>, &uri]);
            run_peer("qemu-img", &args).ok();
            assert_same(&read_all(&image), &bytes, 0, format);
            peer!("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, source).ok();
        }
        let stats = served.server.stats();
        // An attempt at fast zeroes may be refused, and is none of the client's errors.
        assert!(stats.writes > 0 && stats.others > 0, "{stats:?}");
        served.stop();
        image.close().unwrap();
        check_same(&path, format, &bytes, &dir.join("scratch"));
        if format == "qcow2" {
            check_clean(&path);
            assert!(on_disk(&path) < SIZE, "zeroes are not stored");
        }
    }
}

#[test]
fn a_qcow2_image_lives_inside_a_raw_export() {
    let dir = Tmp::new("nbd-inside");
    let image = raw_file(&dir.join("raw"), SIZE);
    let served = Served::new(&dir, &[("", &image)], &[]);
    for uri in served.both("") {
        image.zero(0, SIZE, NONE).unwrap();
        peer!("qemu-img", "create", "-f", "qcow2", uri, "16M").ok();
        let commands = ["write -P 0x51 1M 700k", "write -z 3M 1M", "discard 1M 64k", "flush"];
        qemu_io_at(&uri, "qcow2", &commands);
        peer!("qemu-img", "snapshot", "-c", "one", uri).ok();
        qemu_io_at(&uri, "qcow2", &["write -P 0x52 1M 100k", "read -P 0x51 1248k 400k"]);
        let out = peer!("qemu-img", "check", "-f", "qcow2", uri).ok();
        assert!(out.contains("No errors were found"), "{out}");
        let info = peer!("qemu-img", "info", uri).ok();
        assert!(info.contains("file format: qcow2") && info.contains("one"), "{info}");
    }
    served.stop();
    // And we find it there, too.
    image.close().unwrap();
    let inner = open_with(&dir.join("raw"), &options(&[("format", "qcow2")]), RO);
    assert_eq!(inner.size().unwrap(), 16 << 20);
    assert_eq!(read_range(&inner, 1 << 20, 100 << 10), vec![0x52; 100 << 10]);
}

#[test]
fn qemu_io_does_everything_it_can() {
    let dir = Tmp::new("nbd-qio");
    let mut rng = Rng::new(seed("qemu_io"));
    for format in ["raw", "qcow2"] {
        let path = dir.join(format!("disk.{format}"));
        create(&path, format, SIZE, &[]);
        let image = open_with(&path, &options(&[("format", format)]), RW);
        let served = Served::new(&dir, &[("d", &image)], &[]);
        let mut model = vec![0u8; SIZE as usize];
        for (round, uri) in served.both("d").into_iter().enumerate() {
            let mut commands: Vec<String> = Vec::new();
            for n in 0..60 {
                let align = rng.pick(&[1, 1, 512, 4096, 65536]);
                let count = rng.pick(&[1, 511, 512, 4096, 65536, 70_000, 1 << 20]);
                let at = rng.below(SIZE - count) / align * align;
                let byte = (n + 1 + 100 * round) as u8;
                let fua = if rng.one_in(3) { "-f " } else { "" };
                let range = at as usize..(at + count) as usize;
                match rng.below(8) {
                    0 => commands.push("flush".into()),
                    1 => {
                        commands.push(format!("write -z {fua}{at} {count}"));
                        model[range].fill(0);
                    }
                    2 => {
                        commands.push(format!("write -z -u {fua}{at} {count}"));
                        model[range].fill(0);
                    }
                    3 => {
                        // Reads as before or as zeroes: written at once.
                        let (at, count) = (at / 512 * 512, count.div_ceil(512) * 512);
                        let count = count.min(SIZE - at);
                        commands.push(format!("discard {at} {count}"));
                        commands.push(format!("write -P {byte} {at} {count}"));
                        model[at as usize..][..count as usize].fill(byte);
                    }
                    4 => {
                        commands.push(format!("aio_write {fua}-P {byte} {at} {count}"));
                        commands.push("aio_flush".into());
                        model[range].fill(byte);
                    }
                    5 => {
                        let half = count / 2;
                        commands.push(format!("writev -P {byte} {at} {half} {}", count - half));
                        model[range].fill(byte);
                    }
                    _ => {
                        commands.push(format!("write {fua}-P {byte} {at} {count}"));
                        commands.push(format!("read -P {byte} {at} {count}"));
                        model[range].fill(byte);
                    }
                }
            }
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            qemu_io_at(&uri, "raw", &commands);
            assert_same(&read_all(&image), &model, 0, format);
        }
        // All of it at once: longer than a request may be.
        qemu_io_at(&served.unix("d"), "raw", &["write -P 9 0 8M", "read -P 9 0 8M", "flush"]);
        let stats = served.server.stats();
        assert_eq!(stats.errors, 0, "{stats:?}");
        served.stop();
        image.close().unwrap();
        if format == "qcow2" {
            check_clean(&path);
        }
    }
}

#[test]
fn a_read_only_export_is_that_to_qemu() {
    let dir = Tmp::new("nbd-qro");
    let image = raw_file(&dir.join("raw"), SIZE);
    image.write_at(&[7; 4096], 4096, NONE).unwrap();
    let served = Served::new(&dir, &[], &[]);
    export(&served.server, "ro", "cannot be written", &image, true);
    for uri in served.both("ro") {
        let told = qemu_io_told(&uri, "raw", &["write 0 512"]).fails();
        assert!(told.contains("Permission denied"), "{told}");
        let out = peer!("qemu-io", "-r", "-f", "raw", "-c", "read -P 7 4k 4k", uri).ok();
        assert!(!out.contains("failed") && !out.contains("mismatch"), "{out}");
        let told = peer!("qemu-img", "info", uri.replace("/ro", "/none")).fails();
        assert!(told.contains("none") || told.contains("export"), "{told}");
    }
}

#[test]
fn a_new_size_is_told_to_new_connections() {
    let dir = Tmp::new("nbd-resize");
    let image = raw_file(&dir.join("raw"), SIZE);
    let served = Served::new(&dir, &[("", &image)], &[]);
    let uri = served.tcp("");
    let size = |uri: &str| peer!("nbdinfo", "--size", uri).ok().trim().parse::<u64>().unwrap();
    assert_eq!(size(&uri), SIZE);
    let old = open_uri(&uri, &[], RO);
    image.resize(2 * SIZE + 512, &Options::new(), false).unwrap();
    assert_eq!(size(&uri), 2 * SIZE + 512);
    qemu_io_at(&uri, "raw", &["write -P 3 16M 512", "read -P 0 8M 8M"]);
    assert_eq!(read_range(&image, 2 * SIZE, 512), [3; 512]);
    // One that is there already goes on with what it was told.
    assert_eq!(old.size().unwrap(), SIZE);
    assert_eq!(read_range(&old, SIZE - 512, 512), [0; 512]);
    // Smaller: what is beyond is answered with an error, and the connection stays.
    image.resize(SIZE / 2, &Options::new(), true).unwrap();
    assert_eq!(size(&uri), SIZE / 2);
    let mut buf = [0; 512];
    old.read_at(&mut buf, SIZE - 512).unwrap_err();
    old.read_at(&mut buf, 0).unwrap();
    peer!("qemu-img", "info", uri).ok();
}
