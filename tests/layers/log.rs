//! `log`.

use qblk::block::{Device, ErrorKind};
use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

fn lines(path: &std::path::Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

/// Lines without what differs each time: when, and how long.
fn plain(path: &std::path::Path) -> Vec<String> {
    let steady = |line: &String| {
        let (when, rest) = line.split_once(' ').unwrap();
        assert!(when.len() == 27 && when.ends_with('Z') && when.starts_with("20"), "{line}");
        let seconds = |word: &&str| match word.strip_prefix("seconds=") {
            Some(n) => n.parse::<f64>().is_err(),
            None => true,
        };
        rest.split(' ').filter(seconds).collect::<Vec<_>>().join(" ")
    };
    lines(path).iter().map(steady).collect()
}

fn all_calls(dev: &Device) {
    let mut some = [qblk::Extent::default(); 8];
    let mut list = qblk::block::ExtentList::for_c(&mut some);
    dev.read_slice(&mut [0; 512], 0).unwrap();
    dev.write_slice(&[7; 512], 512, ReqFlags::FUA).unwrap();
    dev.zero(1024, 512, ReqFlags::MAY_TRIM | ReqFlags::FAST_ZERO).unwrap();
    dev.trim(2048, 512, NONE).unwrap();
    dev.cache(0, 4096).unwrap();
    dev.driver().extents(0, 4096, &mut list).unwrap();
    dev.flush().unwrap();
}

#[test]
fn each_call_is_a_line_and_passes_as_it_is() {
    let tmp = Tmp::new("layers-log");
    let path = tmp.join("log");
    let r = Recorder::new(64 << 10, able());
    let dev = on(&r, "log", &[("file", path.to_str().unwrap())], true).unwrap();
    all_calls(&dev);
    r.fail("write", libc::ENOSPC, 1);
    dev.write_slice(&[7; 512], 0, NONE).unwrap_err();
    let mut some = [0; 512];
    assert!(!dev.read_now(qblk::OneIov::dst(&mut some).iov(), 0).unwrap());
    drop(dev);
    let below = [
        "open 1 rw",
        "1 read 0+512",
        "1 write 512+512 FUA",
        "1 zero 1024+512 MAY_TRIM FAST",
        "1 trim 2048+512",
        "1 cache 0+4096",
        "1 extents 0+4096",
        "1 flush",
        "1 write 0+512",
        "close 1",
    ];
    assert_eq!(r.log(), below);
    let expected = [
        "open 'below' size=65536 write=1",
        "read offset=0 count=512 result=ok",
        "write offset=512 count=512 flags=fua result=ok",
        "zero offset=1024 count=512 flags=may-trim+fast-zero result=ok",
        "trim offset=2048 count=512 result=ok",
        "cache offset=0 count=4096 result=ok",
        "extents offset=0 count=4096 result=ok",
        "flush result=ok",
        "write offset=0 count=512 result='\\'below\\': a call that is to fail: No space left on device'",
        "close 'below'",
    ];
    assert_eq!(plain(&path), expected);
    // It is added to, and only with what is asked for.
    let settings = [("file", path.to_str().unwrap()), ("calls", "flush+trim")];
    let dev = on(&r, "log", &settings, false).unwrap();
    dev.read_slice(&mut [0; 512], 0).unwrap();
    dev.flush().unwrap();
    drop(dev);
    let added = ["open 'below' size=65536 write=0", "flush result=ok", "close 'below'"];
    assert_eq!(plain(&path)[expected.len()..], added);
}

#[test]
fn a_file_is_bounded_and_the_calls_go_on() {
    let tmp = Tmp::new("layers-log-max");
    let path = tmp.join("log");
    let options = Options::new().with("layers", "log;max-size=4k");
    let options = options.with("log.file", path.to_str().unwrap());
    let image = Image::open("mem:1M".as_ref(), &options, RW).unwrap();
    std::thread::scope(|s| {
        for t in 0..4 {
            let image = &image;
            s.spawn(move || {
                (0..100).for_each(|i| image.write_at(&[1; 8], t * 4096 + i, NONE).unwrap())
            });
        }
    });
    let size = std::fs::metadata(&path).unwrap().len();
    assert!((3800..4096 + 100).contains(&size), "{size}");
    let all = lines(&path);
    assert_eq!(all.iter().filter(|l| l.contains("full: no more")).count(), 1);
    // Whole lines, of several threads.
    assert_eq!(plain(&path).iter().filter(|l| l.starts_with("write ")).count(), all.len() - 2);
    let dropped: usize = String::from_utf8(image.property("log.dropped").unwrap().unwrap())
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(dropped, 400 - (all.len() - 2));
}

#[test]
fn names_and_errors_from_outside_make_no_lines_of_their_own() {
    let tmp = Tmp::new("layers-log-names");
    let (path, log) = (tmp.join("a\nforged write\x1b[2J\u{202e}.img"), tmp.join("log"));
    std::fs::write(&path, vec![0; 4096]).unwrap();
    let options = Options::new().with("format", "raw").with("layers", "error;calls=read,log");
    let options = options.with("log.file", log.to_str().unwrap());
    let image = Image::open(path.as_os_str(), &options, RO).unwrap();
    image.read_at(&mut [0; 512], 0).unwrap_err();
    drop(image);
    let all = plain(&log);
    assert_eq!(all.len(), 3, "{all:?}");
    assert!(all[1].contains("was made to fail: Input/output error"), "{all:?}");
    let bytes = std::fs::read(&log).unwrap();
    assert!(bytes.iter().all(|b| *b == b'\n' || (b' '..=b'~').contains(b)), "{all:?}");
}

#[test]
fn only_a_regular_file_is_written_and_nobody_hangs() {
    let tmp = Tmp::new("layers-log-fifo");
    let fifo = tmp.join("fifo");
    run_ok("mkfifo", &[&fifo]);
    let missing = tmp.join("no/such");
    for (settings, what) in [
        (vec![("file", fifo.to_str().unwrap())], ""),
        (vec![("file", tmp.path().to_str().unwrap())], "Is a directory"),
        (vec![("file", "/dev/null")], "no regular file"),
        (vec![("file", missing.to_str().unwrap())], "No such file"),
        (vec![("file", "x"), ("level", "warn")], "lines go to a file"),
        (vec![("max-size", "1k")], "lines go to no file"),
        (vec![("level", "loud")], "expected error, warn"),
        (vec![("calls", "")], "some of read, write"),
    ] {
        let e = on(&Recorder::new(512, able()), "log", &settings, true);
        let e = e.err().unwrap_or_else(|| panic!("{settings:?}")).to_string();
        assert!(e.contains("layer 'log'") && e.contains(what), "{e}");
    }
    assert!(!std::path::Path::new("x").exists());
}

#[test]
fn a_log_that_can_not_be_written_harms_nobody() {
    let r = Recorder::new(4096, able());
    let tmp = Tmp::new("layers-log-lost");
    let path = tmp.join("log");
    let dev = on(&r, "log", &[("file", path.to_str().unwrap())], true).unwrap();
    std::fs::remove_file(&path).unwrap();
    r.fail("flush", libc::EIO, 1);
    let e = dev.flush().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EIO), "the error is the one from below");
    let (log, image) = (tmp.join("many"), "mem:2M");
    let options = Options::new().with("layers", "log");
    let options = options.with("log.file", log.to_str().unwrap());
    let image = Image::open(image.as_ref(), &options, RW).unwrap();
    let mut model = vec![0; 2 << 20];
    model::run_many(&image, &mut model, 300, 4, seed("log"));
    drop(image);
    assert!(plain(&log).len() > 1000);
}
