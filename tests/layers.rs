//! Layers: stacks, what each built-in layer calls below, and each against a model.

#[macro_use]
mod common;
#[path = "layers/model.rs"]
mod model;
// Of what the tests of NBD share only some is needed here.
#[allow(dead_code, unused_imports, unused_macros)]
#[path = "interop_nbd/peers.rs"]
mod peers;
#[path = "layers/recorder.rs"]
mod recorder;

// One file a layer.
#[path = "layers/blocksize.rs"]
mod blocksize;
#[path = "layers/cache.rs"]
mod cache;
#[path = "layers/copy_on_read.rs"]
mod copy_on_read;
#[path = "layers/cow.rs"]
mod cow;
#[path = "layers/delay.rs"]
mod delay;
#[path = "layers/error.rs"]
mod error;
#[path = "layers/fua.rs"]
mod fua;
#[path = "layers/log.rs"]
mod log;
#[path = "layers/multi_conn.rs"]
mod multi_conn;
#[path = "layers/noextents.rs"]
mod noextents;
#[path = "layers/nozero.rs"]
mod nozero;
#[path = "layers/offset.rs"]
mod offset;
#[path = "layers/partition.rs"]
mod partition;
#[path = "layers/protect.rs"]
mod protect;
#[path = "layers/rate.rs"]
mod rate;
#[path = "layers/readahead.rs"]
mod readahead;
#[path = "layers/readonly.rs"]
mod readonly;
#[path = "layers/retry.rs"]
mod retry;
#[path = "layers/stats.rs"]
mod stats;
#[path = "layers/swab.rs"]
mod swab;
#[path = "layers/truncate.rs"]
mod truncate;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use common::*;
use qblk::{Error, Image, OpenFlags, Options};

fn stacked(path: &std::path::Path, layers: &str) -> Image {
    Image::open(path.as_os_str(), &Options::new().with("layers", layers), RW).unwrap()
}

fn qcow2(tmp: &Tmp, size: u64) -> std::path::PathBuf {
    let path = tmp.join("a.qcow2");
    qblk::image::create(path.as_os_str(), "qcow2", size, &Options::new()).unwrap();
    path
}

/// Whether a change was refused because nothing may be changed here.
fn is_read_only<T>(result: Result<T, Error>) -> bool {
    result.is_err_and(|e| e.kind() == qblk::block::ErrorKind::Errno(libc::EROFS))
}

#[test]
fn stacks_are_named_by_option_and_by_name() {
    let tmp = Tmp::new("layers-names");
    let path = qcow2(&tmp, 4 << 20);
    let name = |s: String| Image::open(s.as_ref(), &Options::new(), RW);
    let image =
        name(format!("layers:offset;offset=1M,offset;range=1M:{}", path.display())).unwrap();
    assert_eq!(image.size().unwrap(), 1 << 20);
    image.write_at(b"here", 0, NONE).unwrap();
    assert_eq!(image.property("layers").unwrap().unwrap(), b"offset,offset");
    let (of_image, list) =
        (image.property("qcow2.compat"), image.property("properties").unwrap().unwrap());
    assert_eq!(of_image.unwrap().unwrap(), b"1.1");
    assert!(String::from_utf8(list).unwrap().lines().any(|l| l == "layers"));
    let info = image.info().unwrap();
    assert_eq!((info.format, info.driver), ("qcow2", "file"));
    image.close().unwrap();
    // Settings by options; of those in both places the option counts.
    let options = Options::new().with("layers", "offset;offset=2M").with("offset.offset", "1M");
    let image = Image::open(path.as_os_str(), &options, RO).unwrap();
    let mut found = [0; 4];
    image.read_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"here");
    for (name, what) in [
        ("layers:nothing:mem:1M", "no layer 'nothing'"),
        ("layers:offset", "expected layers:"),
        ("layers:offset;begin=1:mem:1M", "has offset, range"),
        ("layers:offset;offset=2M:mem:1M", "at most the 1048576 bytes"),
        ("layers:offset;range=x:mem:1M", "expected a size"),
        ("layers::mem:1M", "expected a name"),
    ] {
        let e = Image::open(name.as_ref(), &Options::new(), RW).err().unwrap().to_string();
        assert!(e.contains(what), "{name}: {e}");
    }
}

#[test]
fn a_stack_ten_deep_is_right_under_mixed_load() {
    let tmp = Tmp::new("layers-ten");
    let path = qcow2(&tmp, 8 << 20);
    let image = stacked(&path, &["offset"; 10].join(","));
    let mut model = vec![0; 8 << 20];
    model::run_many(&image, &mut model, 400, 4, seed("layers-ten"));
    image.close().unwrap();
    let image = Image::open(path.as_os_str(), &Options::new(), RO).unwrap();
    let mut all = vec![0; model.len()];
    image.read_at(&mut all, 0).unwrap();
    assert!(all == model, "what was written through ten layers is in the image");
}

#[test]
fn a_layer_is_pushed_while_calls_are_under_way() {
    let tmp = Tmp::new("layers-push");
    let path = qcow2(&tmp, 8 << 20);
    let image = Image::open(path.as_os_str(), &Options::new(), RW).unwrap();
    let other = image.context(&Options::new(), RW).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        for t in 0..2u64 {
            let (other, done) = (&other, &done);
            s.spawn(move || {
                let (mut n, base) = (0u64, t << 20);
                while !done.load(Relaxed) {
                    let block = [n as u8; 4096];
                    let at = base + n % 200 * 4096;
                    other.write_at(&block, at, NONE).unwrap();
                    let mut found = [0; 4096];
                    other.read_at(&mut found, at).unwrap();
                    assert!(found == block, "at {at}");
                    if n % 16 == 0 {
                        other.trim(at, 4096, NONE).unwrap();
                    }
                    n += 1;
                }
            });
        }
        for _ in 0..12 {
            std::thread::sleep(std::time::Duration::from_millis(10));
            image.push_layer(b"offset", &Options::new().with("offset", "0")).unwrap();
        }
        done.store(true, Relaxed);
    });
    // One that can not be opened leaves all as it was.
    image.push_layer(b"offset;offset=1T", &Options::new()).unwrap_err();
    assert_eq!(other.property("layers").unwrap().unwrap().split(|b| *b == b',').count(), 12);
    other.write_at(b"last", 0, NONE).unwrap();
    image.close().unwrap();
    other.flush().unwrap();
    other.close().unwrap();
    qemu_img!("check", &path);
}

#[test]
fn what_a_stack_can_not_do_is_refused_and_not_done_below() {
    let tmp = Tmp::new("layers-refused");
    let path = qcow2(&tmp, 1 << 20);
    let image = stacked(&path, "offset");
    let refused = |what: &str, r: Result<(), Error>| {
        let e = r.expect_err(what);
        assert!(matches!(e, Error::NotSupported(_)), "{what}: {e}");
    };
    refused("resize", image.resize(2 << 20, &Options::new(), false));
    refused("snapshot", image.snapshot_create(b"s", &Options::new()));
    refused(
        "bitmaps",
        image.change_bitmap(&qblk::block::BitmapChange::Add {
            name: b"b",
            granularity: 65536,
            disabled: false,
        }),
    );
    refused("commit", image.commit(false, qblk::block::Progress::NONE));
    image.close().unwrap();
    assert!(!qemu_img!("info", &path).contains("Snapshot"));
}

#[test]
fn the_end_of_a_handle_waits_for_nobody_through_any_layer() {
    for kind in qblk::layer::KINDS {
        let settings: &[(&str, &str)] = match kind.name {
            "blocksize" => &[("minimum", "512")],
            "cow" => &[("commit", "on")],
            "error" => &[("calls", "read")],
            // It needs a table, and flushes as `offset` does.
            "partition" => continue,
            "protect" => &[("protect", "0-512")],
            "rate" => &[("requests", "1M")],
            "truncate" => &[("size", "8192")],
            _ => &[],
        };
        let r = recorder::Recorder::new(8192, recorder::able());
        let dev = recorder::on(&r, kind.name, settings, kind.name != "readonly").unwrap();
        if kind.name != "readonly" {
            dev.write_slice(&[1; 512], 1024, NONE).unwrap();
        }
        r.log();
        dev.driver().flush_to_close().unwrap();
        dev.driver().close().unwrap();
        let log = r.log();
        assert!(!log.iter().any(|l| l.ends_with(" flush")), "{}: {log:?}", kind.name);
        assert!(log.iter().any(|l| l.ends_with("flush to close")), "{}: {log:?}", kind.name);
    }
}

#[test]
fn a_stack_is_reopened_below_its_layers() {
    let tmp = Tmp::new("layers-reopen");
    let path = qcow2(&tmp, 1 << 20);
    let image = stacked(&path, "offset;offset=64k");
    image.write_at(b"kept", 0, NONE).unwrap();
    image.reopen(None, RO).unwrap();
    assert!(is_read_only(image.write_at(b"x", 0, NONE)));
    image.reopen(None, RW).unwrap();
    let mut found = [0; 4];
    image.read_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"kept");
    image.close().unwrap();
}

#[test]
fn settings_by_option_are_for_all_layers_of_a_name_and_the_image_keeps_its_own() {
    let tmp = Tmp::new("layers-settings");
    let path = qcow2(&tmp, 1 << 20);
    let options = Options::new()
        .with("layers", "offset,cache,offset")
        .with("offset.offset", "4k")
        .with("cache.size", "1M")
        .with("cache.l2-size", "64k");
    let image = Image::open(path.as_os_str(), &options, RW).unwrap();
    assert_eq!(image.size().unwrap(), (1 << 20) - 8192);
}

#[test]
fn who_pushes_a_layer_takes_nobodys_right_to_write() {
    let image = Image::open("mem:1M".as_ref(), &Options::new(), RW).unwrap();
    let reader = image.context(&Options::new(), RO).unwrap();
    reader.push_layer(b"offset", &Options::new()).unwrap();
    image.write_at(b"still", 0, NONE).unwrap();
    assert!(is_read_only(reader.write_at(b"x", 0, NONE)));
    // And one that writes nothing below makes a device writable for those who ask.
    let image = Image::open("mem:1M".as_ref(), &Options::new(), RO).unwrap();
    image.context(&Options::new(), RW).map(drop).unwrap_err();
    image.push_layer(b"cow", &Options::new()).unwrap();
    assert!(is_read_only(image.write_at(b"x", 0, NONE)));
    let writer = image.context(&Options::new(), RW).unwrap();
    writer.write_at(b"mine", 0, NONE).unwrap();
    let mut found = [0; 4];
    image.read_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"mine");
}

#[test]
fn a_stack_is_not_reopened_for_its_description_nor_checked_through_layers() {
    let tmp = Tmp::new("layers-info");
    let path = qcow2(&tmp, 1 << 20);
    let image = stacked(&path, "offset");
    for flags in [OpenFlags::INFO_ONLY, OpenFlags::CHECK] {
        let e = image.reopen(None, flags).unwrap_err().to_string();
        assert!(e.contains("leave its layers out"), "{e}");
    }
    let e = image.check(qblk::block::Repair::Nothing, qblk::block::Progress::NONE).unwrap_err();
    assert!(matches!(e, Error::NotSupported(_)), "{e}");
    image.write_at(b"good", 0, NONE).unwrap();
    image.close().unwrap();
}

#[test]
fn a_stack_on_a_server_that_is_silent_is_closed() {
    let tmp = Tmp::in_memory("layers-silent");
    let (disk, socket) = (tmp.join("disk"), tmp.join("s.sock"));
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let server = peers::nbdkit(&socket, &[&"file", &disk]);
    // A flush would wait for ever.
    let set = Options::new().with("format", "raw").with("nbd.timeout", "0");
    let open = |layers: &str| {
        let mut set = set.clone();
        if !layers.is_empty() {
            set.set("layers", Some(layers.as_bytes()));
        }
        let image = Image::open(peers::unix(&socket, "").as_ref(), &set, RW).unwrap();
        image.write_at(&[1; 1000], 0, NONE).unwrap();
        image
    };
    let all = ["", "offset", "offset,log", "retry", "multi-conn", "fua", "readahead"];
    let images = all.map(open);
    server.freeze(true);
    let (tell, told) = std::sync::mpsc::channel();
    for image in images {
        let tell = tell.clone();
        std::thread::spawn(move || {
            // One that is not the last, and the last.
            let other = image.context(&Options::new(), RW).unwrap();
            let first = other.close();
            let _ = image.close();
            tell.send(first).unwrap();
        });
    }
    let patience = std::time::Duration::from_secs(60);
    let results: Vec<_> = all.iter().map(|_| told.recv_timeout(patience)).collect();
    server.freeze(false);
    for result in results {
        result.expect("all are closed").expect_err("what was written may be lost");
    }
}
