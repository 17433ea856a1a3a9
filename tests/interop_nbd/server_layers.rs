//! Our server over devices with layers, with the clients of QEMU and libnbd.

use std::fs;

use super::common::*;
use super::peers::*;
use qblk::{Image, Options};

const SIZE: u64 = 8 << 20;
/// Where the export begins in the image, and its size.
const AT: u64 = 1 << 20;
const PART: u64 = 6 << 20;

fn layered(path: &std::path::Path, layers: &str, pairs: &[(&str, &str)]) -> Image {
    let options =
        pairs.iter().fold(Options::new().with("layers", layers), |o, (k, v)| o.with(k, *v));
    Image::open(path.as_os_str(), &options, RW).unwrap()
}

/// Reads in every way the server has: tried at once, in the pool, by `sendfile`, as holes.
#[test]
fn clients_read_a_stack_and_see_its_holes() {
    let dir = Tmp::in_memory("nbd-layers-read");
    let mut rng = Rng::new(seed("server_layers"));
    let bytes = sparse_bytes(&dir.join("raw"), SIZE, &mut rng);
    let part = &bytes[AT as usize..(AT + PART) as usize];
    fs::write(dir.join("part"), part).unwrap();
    let stack =
        format!("offset;offset={AT};range={PART},stats,log;file={}", dir.join("log").display());
    let image = layered(&dir.join("raw"), &stack, &[("format", "raw")]);
    let full = layered(
        &dir.join("raw"),
        &format!("noextents,{stack}"),
        &[("format", "raw"), ("lock", "off")],
    );
    let served = Served::new(&dir, &[("", &image), ("full", &full)], &[]);
    for (i, uri) in served.both("").into_iter().enumerate() {
        peer!("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, dir.join("part")).ok();
        let copy = dir.join(format!("copy{i}"));
        peer!("nbdcopy", "--requests=32", uri, copy).ok();
        assert_same(&fs::read(&copy).unwrap(), part, 0, "nbdcopy");
        assert!(on_disk(&copy) < PART, "holes stay holes");
        let small = dir.join(format!("small{i}"));
        peer!("nbdcopy", "--request-size=4096", uri, small).ok();
        assert_same(&fs::read(&small).unwrap(), part, 0, "nbdcopy in small requests");
    }
    let map = peer!("qemu-img", "map", "--output=json", "-f", "raw", served.unix("")).ok();
    assert!(map.matches("\"zero\": true").count() > 3, "{map}");
    let map = peer!("qemu-img", "map", "--output=json", "-f", "raw", served.unix("full")).ok();
    assert!(!map.contains("\"zero\": true"), "{map}");
    // Nothing went around the layers: they counted what the server did.
    let count = |key: &str| -> u64 {
        String::from_utf8(image.property(key).unwrap().unwrap()).unwrap().parse().unwrap()
    };
    let holes = part.chunks(4096).filter(|c| c.iter().all(|b| *b == 0)).count() as u64 * 4096;
    assert!(count("stats.read.bytes") >= 5 * (PART - holes), "{}", count("stats.read.bytes"));
    assert!(count("stats.extents.count") > 0);
    let log = fs::read_to_string(dir.join("log")).unwrap();
    assert!(log.contains(" read offset=") && log.contains(" extents offset="));
    served.stop();
}

#[test]
fn clients_write_into_a_stack_and_it_is_in_the_image() {
    let dir = Tmp::in_memory("nbd-layers-write");
    let mut rng = Rng::new(seed("server_layers_write"));
    let source = dir.join("source");
    let bytes = sparse_bytes(&source, PART, &mut rng);
    let range = format!("offset;offset={AT};range={PART}");
    for layers in [
        format!("{range},stats"),
        format!("fua;mode=force,{range},stats"),
        format!("fua;mode=emulate,nozero;mode=write,{range},stats"),
        format!("fua,nozero,{range},stats"),
    ] {
        let path = dir.join("disk.qcow2");
        create(&path, "qcow2", SIZE, &[]);
        let image = layered(&path, &layers, &[]);
        let served = Served::new(&dir, &[("disk", &image)], &[]);
        for (i, uri) in served.both("disk").into_iter().enumerate() {
            image.write_at(&rng.bytes(PART as usize), 0, NONE).unwrap();
            match i {
                0 => drop(
                    peer!("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri).ok(),
                ),
                _ => drop(peer!("nbdcopy", "--flush", source, uri).ok()),
            }
            assert_same(&read_all(&image), &bytes, 0, &layers);
            let commands = ["write -f -P 1 0 64k", "write -z 64k 64k", "discard 128k 64k", "flush"];
            if !layers.contains("fua,") {
                qemu_io_at(&uri, "raw", &commands);
            }
        }
        let get = |key: &str| -> u64 {
            String::from_utf8(image.property(key).unwrap().unwrap()).unwrap().parse().unwrap()
        };
        assert!(get("stats.write.count") > 0 && get("stats.flush.count") > 0, "{layers}");
        assert_eq!(get("stats.write.errors") + get("stats.flush.errors"), 0, "{layers}");
        let now = read_all(&image);
        served.stop();
        image.close().unwrap();
        check_clean(&path);
        // Where the layers say, and nothing beside it.
        let plain = Image::open(path.as_os_str(), &Options::new(), RO).unwrap();
        let all = read_all(&plain);
        assert_same(&all[AT as usize..(AT + PART) as usize], &now, 0, &layers);
        assert!(all[..AT as usize].iter().chain(&all[(AT + PART) as usize..]).all(|b| *b == 0));
    }
}

#[test]
fn clients_are_told_what_layers_do_not_offer() {
    let dir = Tmp::in_memory("nbd-layers-flags");
    let offered = |layers: &str| {
        let path = dir.join("raw");
        fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let image = layered(&path, layers, &[("format", "raw")]);
        let served = Served::new(&dir, &[("", &image)], &[]);
        let told = peer!("nbdinfo", "--json", served.unix("")).ok();
        served.stop();
        let on = |key: &str| match (
            told.contains(&format!("\"{key}\": true")),
            told.contains(&format!("\"{key}\": false")),
        ) {
            (true, false) => true,
            (false, true) => false,
            _ => panic!("{key}: {told}"),
        };
        ["can_fua", "can_zero", "can_fast_zero", "can_flush", "is_read_only"].map(on)
    };
    assert_eq!(offered("stats"), [true, true, true, true, false]);
    // In nbdkit's filter of this name that mode was an error.
    assert_eq!(offered("fua;mode=none"), [false, true, true, true, false]);
    assert_eq!(offered("fua;mode=emulate"), [true, true, true, true, false]);
    assert_eq!(offered("nozero"), [true, false, false, true, false]);
    assert_eq!(offered("nozero;mode=write"), [true, true, true, true, false]);
}

#[test]
fn what_layers_refuse_is_an_error_of_the_request() {
    let dir = Tmp::in_memory("nbd-layers-errors");
    let path = dir.join("raw");
    fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let layers = "protect;protect=1M-2M,error;calls=read;range=4M-5M,delay;flush=5ms";
    let image = layered(&path, layers, &[("format", "raw")]);
    let served = Served::new(&dir, &[("", &image)], &[]);
    for uri in served.both("") {
        nbdsh(
            &uri,
            "
import errno
def fails(number, work):
    try:
        work()
    except nbd.Error as e:
        assert e.errnum == number, e
        return
    raise Exception('it did not fail')
fails(errno.EPERM, lambda: h.pwrite(b'x' * 512, 1048576))
fails(errno.EPERM, lambda: h.trim(4096, 1048576 - 512))
h.zero(4096, 1048576)
h.pwrite(b'y' * 512, 2097152, nbd.CMD_FLAG_FUA)
h.pwrite(b'z' * 512, 4194304 + 100)
fails(errno.EIO, lambda: h.pread(512, 4194304))
fails(errno.EIO, lambda: h.pread(1 << 20, 4194304))
assert h.pread(512, 2097152) == b'y' * 512
h.flush()
",
        );
    }
    served.stop();
    assert!(first_bytes(&image, 4 << 20)[1 << 20..2 << 20].iter().all(|b| *b == 0));
}

/// The first `n` bytes.
fn first_bytes(image: &Image, n: usize) -> Vec<u8> {
    let mut all = vec![0; n];
    image.read_at(&mut all, 0).unwrap();
    all
}

/// What can not be read is an error of the request that asked for it, however large, and of no other.
#[test]
fn large_reads_that_fail_end_no_connection() {
    let dir = Tmp::in_memory("nbd-large-errors");
    let raw = dir.join("raw");
    let bytes = Rng::new(seed("server_large_errors")).bytes(SIZE as usize);
    fs::write(&raw, &bytes).unwrap();
    let faulty = layered(&raw, "error;calls=read;range=5M-6M", &[("format", "raw")]);
    // One of which the end is gone: the kernel finds that out while it sends.
    let short = dir.join("short");
    fs::write(&short, &bytes).unwrap();
    let shrunk = Image::open(short.as_os_str(), &Options::new().with("format", "raw"), RW).unwrap();
    let served = Served::new(&dir, &[("faulty", &faulty), ("shrunk", &shrunk)], &[]);
    fs::OpenOptions::new().write(true).open(&short).unwrap().set_len(5 << 20).unwrap();
    for export in ["faulty", "shrunk"] {
        for uri in served.both(export) {
            let image = open_uri(&uri, &[("nbd.connections", "1")], qblk::OpenFlags::default());
            let mut buf = vec![0; 4 << 20];
            for (at, count) in [(4 << 20, 4 << 20), (4 << 20, 3 << 20), (3 << 20, 2200 << 10)] {
                let begun = std::time::Instant::now();
                let e = image.read_at(&mut buf[..count], at).unwrap_err();
                assert_eq!(e.kind(), qblk::block::ErrorKind::Errno(libc::EIO), "{uri}: {e}");
                assert!(begun.elapsed().as_secs() < 10, "{uri}: {:?}", begun.elapsed());
                image.read_at(&mut buf[..4 << 20], 1 << 20).unwrap();
                assert_same(&buf, &bytes[1 << 20..5 << 20], 1 << 20, &uri);
            }
            nbdsh(
                &uri,
                "for at, count in ((4 << 20, 4 << 20), (3 << 20, 2200 << 10)):
    try:
        h.pread(count, at)
        raise SystemExit('it was read')
    except nbd.Error as e:
        assert e.errno == 'EIO', e
    assert len(h.pread(4 << 20, 1 << 20)) == 4 << 20
",
            );
        }
    }
    served.stop();
}
