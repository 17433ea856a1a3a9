//! `multi-conn`.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Barrier, Mutex};

use qblk::block::*;
use qblk::layer::{Settings, Source, find};
use qblk::{Image, ReqFlags};

use crate::common::*;
use crate::model;
use crate::peers;
use crate::recorder::*;

/// While a write of block 0 is under way on the first context.
fn while_the_first_is_busy(r: &Recorder, dev: &Device, work: impl FnOnce()) {
    r.hold("write 0+");
    std::thread::scope(|s| {
        s.spawn(|| dev.write_slice(&[1; 512], 0, NONE).unwrap());
        r.wait_held(1);
        work();
        r.release();
    });
}

#[test]
fn calls_are_spread_and_flushes_go_where_was_written() {
    let r = Recorder::new(8192, able());
    let dev = on(&r, "multi-conn", &[("contexts", "3")], true).unwrap();
    assert_eq!(r.log(), ["open 1 rw", "open 2 rw", "open 3 rw"]);
    let mut some = [0; 512];
    // One at a time: all on the first.
    dev.write_slice(&some, 512, NONE).unwrap();
    dev.flush().unwrap();
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 write 512+512", "1 flush", "1 flush"]);
    while_the_first_is_busy(&r, &dev, || {
        dev.write_slice(&some, 512, NONE).unwrap();
        dev.read_slice(&mut some, 512).unwrap();
        dev.cache(0, 1).unwrap();
        let mut extents = [Extent::default(); 1];
        dev.driver().extents(0, 512, &mut ExtentList::new(&mut extents)).unwrap();
        dev.flush().unwrap();
        dev.zero(512, 512, ReqFlags::MAY_TRIM).unwrap();
        dev.flush().unwrap();
        dev.trim(512, 512, NONE).unwrap();
        dev.flush().unwrap();
        // With FUA, and without a change, there is nothing to flush there; any context will do.
        dev.write_slice(&some, 512, ReqFlags::FUA).unwrap();
        dev.flush().unwrap();
        let expected = [
            "1 write 0+512",
            "2 write 512+512",
            "2 read 512+512",
            "2 cache 0+1",
            "2 extents 0+512",
            "2 flush",
            "2 zero 512+512 MAY_TRIM",
            "2 flush",
            "2 trim 512+512",
            "2 flush",
            "2 write 512+512 FUA",
            "1 flush",
        ];
        assert_eq!(r.log(), expected);
        dev.write_slice(&some, 512, NONE).unwrap();
    });
    dev.flush().unwrap();
    assert_eq!(r.log(), ["2 write 512+512", "1 flush", "2 flush"]);
    drop(dev);
    assert_eq!(r.log(), ["close 1", "close 2", "close 3"]);
}

#[test]
fn a_flush_that_fails_is_told_and_the_others_are_done() {
    let r = Recorder::new(8192, Caps { fua: false, ..able() });
    let dev = on(&r, "multi-conn", &[], true).unwrap();
    let some = [0; 512];
    while_the_first_is_busy(&r, &dev, || dev.write_slice(&some, 512, NONE).unwrap());
    r.log();
    r.fail("flush", libc::EIO, 1);
    assert_eq!(dev.flush().unwrap_err().kind(), ErrorKind::Errno(libc::EIO));
    assert_eq!(r.log(), ["1 flush", "2 flush"]);
    // The one that failed is not taken for flushed.
    while_the_first_is_busy(&r, &dev, || {
        // A write that failed may have happened in part. FUA is done by a flush of all.
        r.fail("write 512+", libc::EIO, 1);
        dev.write_slice(&some, 512, NONE).unwrap_err();
        dev.write_slice(&some, 1024, ReqFlags::FUA).unwrap();
    });
    let expected = ["1 write 0+512", "2 write 512+512", "2 write 1024+512", "1 flush", "2 flush"];
    assert_eq!(r.log(), expected);
}

#[test]
fn one_flush_for_all_where_that_is_asked_for() {
    let r = Recorder::new(8192, able());
    let dev = on(&r, "multi-conn", &[("contexts", "2"), ("flush", "one")], true).unwrap();
    while_the_first_is_busy(&r, &dev, || dev.write_slice(&[0; 512], 512, NONE).unwrap());
    r.log();
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 flush"]);
    let r = Recorder::new(8192, able());
    on(&r, "multi-conn", &[("contexts", "2")], false).unwrap();
    assert_eq!(r.log(), ["open 1 ro", "open 2 ro", "close 1", "close 2"]);
    for (settings, what) in [
        (("contexts", "0"), "a number from 1 to 64"),
        (("contexts", "65"), "a number from 1 to 64"),
        (("flush", "all"), "expected written, one"),
    ] {
        let e = on(&r, "multi-conn", &[settings], true).err().unwrap().to_string();
        assert!(e.contains(what), "{e}");
    }
    // What was opened before one that fails is closed.
    let r = Recorder::new(8192, able());
    r.fail("open", libc::EMFILE, 1);
    on(&r, "multi-conn", &[], true).err().unwrap();
    assert_eq!(r.log(), ["open 1 rw"]);
}

/// A source each of whose contexts keeps what is written through it until it is flushed, as a server does
/// that does not promise more: a power cut leaves what was flushed, on that context.
struct Volatile {
    name: Name,
    bytes: Mutex<Bytes>,
    /// Where writes wait for each other, so that each has a context of its own.
    meet: Barrier,
}

#[derive(Default)]
struct Bytes {
    now: Vec<u8>,
    flushed: Vec<u8>,
    contexts: usize,
    used: BTreeSet<usize>,
}

struct On(Arc<Volatile>);
struct OneContext(Arc<Volatile>, usize, Mutex<BTreeMap<u64, Vec<u8>>>);

impl Source for On {
    fn name(&self) -> &Name {
        &self.0.name
    }
    fn can_write(&self) -> bool {
        true
    }
    fn open(&self, _write: bool) -> Result<Device> {
        let mut bytes = self.0.bytes.lock().unwrap();
        bytes.contexts += 1;
        let context = OneContext(self.0.clone(), bytes.contexts, Mutex::default());
        Ok(Device::new(Box::new(context)))
    }
    fn reopen(&self) -> Result<()> {
        Err(Error::NotSupported("reopening"))
    }
    fn handle(&self, _write: bool) -> Result<Box<dyn Any + Send>> {
        Err(Error::NotSupported("handles"))
    }
}

impl Driver for OneContext {
    fn name(&self) -> &Name {
        &self.0.name
    }
    fn kind(&self) -> &'static str {
        "volatile"
    }
    fn caps(&self) -> Caps {
        Caps::default()
    }
    fn size(&self) -> u64 {
        self.0.bytes.lock().unwrap().now.len() as u64
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        buf.copy_from(&self.0.bytes.lock().unwrap().now[offset as usize..]);
        Ok(())
    }
    fn write(&self, buf: Src<'_>, offset: u64, _flags: ReqFlags) -> Result<()> {
        self.0.meet.wait();
        let mut data = vec![0; buf.len()];
        buf.copy_to(&mut data);
        let mut bytes = self.0.bytes.lock().unwrap();
        bytes.used.insert(self.1);
        bytes.now[offset as usize..][..data.len()].copy_from_slice(&data);
        self.2.lock().unwrap().insert(offset, data);
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        let mine = std::mem::take(&mut *self.2.lock().unwrap());
        let mut bytes = self.0.bytes.lock().unwrap();
        for (offset, data) in mine {
            bytes.flushed[offset as usize..][..data.len()].copy_from_slice(&data);
        }
        Ok(())
    }
}

/// Four threads write, one flushes: whether all of it survives, and how many contexts were used.
fn survives(flush: &str) -> (bool, usize) {
    const THREADS: usize = 4;
    let blank = vec![0; THREADS * 4096];
    let bytes = Bytes { now: blank.clone(), flushed: blank, ..Bytes::default() };
    let source = Arc::new(Volatile {
        name: "volatile".into(),
        bytes: Mutex::new(bytes),
        meet: Barrier::new(THREADS),
    });
    let mut settings = Settings::new("multi-conn");
    settings.set("flush", flush.as_bytes());
    let open = find("multi-conn").unwrap().open;
    let dev = Device::new(open(&settings, Arc::new(On(source.clone())), true).unwrap());
    for round in 1..=20u8 {
        std::thread::scope(|s| {
            for t in 0..THREADS {
                let dev = &dev;
                s.spawn(move || dev.write_slice(&[round; 4096], t as u64 * 4096, NONE).unwrap());
            }
        });
        dev.flush().unwrap();
        let bytes = source.bytes.lock().unwrap();
        if bytes.flushed != bytes.now {
            return (false, bytes.used.len());
        }
    }
    let bytes = source.bytes.lock().unwrap();
    (true, bytes.used.len())
}

#[test]
fn what_was_written_through_any_context_is_flushed() {
    assert_eq!(survives("written"), (true, 4));
    // It is the layer that sees to it.
    assert_eq!(survives("one"), (false, 4));
}

#[test]
fn a_device_of_several_contexts_is_a_device() {
    let tmp = Tmp::new("multi-conn");
    let path = tmp.join("a.qcow2");
    create(&path, "qcow2", 4 << 20, &[]);
    let image = open_with(&path, &options(&[("layers", "multi-conn;contexts=3")]), RW);
    let mut model = vec![0; 4 << 20];
    model::run_many(&image, &mut model, 300, 4, seed("multi-conn"));
    image.close().unwrap();
    assert!(read_all(&open(&path, RO)) == model);
    check_clean(&path);
}

/// What a flush has reached, by the log of nbdkit: its connections that wrote and were not flushed after
/// that, and all that were flushed after the last write of all.
fn not_flushed(log: &str) -> (BTreeSet<String>, usize) {
    let (mut dirty, mut after) = (BTreeSet::new(), 0);
    for line in log.lines() {
        let Some(connection) = line.split("connection=").nth(1) else { continue };
        let (number, what) = connection.split_once(' ').unwrap();
        if what.starts_with("...Write ") {
            dirty.insert(number.to_owned());
            after = 0;
        } else if what.starts_with("...Flush ") {
            dirty.remove(number);
            after += 1;
        }
    }
    (dirty, after)
}

#[test]
fn over_nbd_a_flush_reaches_every_connection_or_one_that_counts_for_all() {
    for (mode, multi) in [("auto", true), ("disable", false)] {
        let tmp = Tmp::in_memory("multi-conn-nbd");
        let (disk, log, socket) = (tmp.join("disk"), tmp.join("log"), tmp.join("s.sock"));
        std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let disk = format!("file={}", disk.display());
        let (logfile, mode) =
            (format!("logfile={}", log.display()), format!("multi-conn-mode={mode}"));
        let filters = [&"--filter=log", &"--filter=multi-conn", &"file"];
        let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> = Vec::new();
        filters.iter().for_each(|a| args.push(*a));
        args.extend([&disk as &dyn AsRef<_>, &logfile, &mode]);
        let server = peers::nbdkit(&socket, &args);
        let layers = [("layers", "multi-conn"), ("format", "raw"), ("nbd.connections", "4")];
        let image = peers::open_uri(&peers::unix(&socket, ""), &layers, RW);
        assert_eq!(image.property("nbd.multi-conn").unwrap().unwrap() == b"on", multi);
        for round in 0..5 {
            std::thread::scope(|s| {
                for t in 0..8u64 {
                    let image: &Image = &image;
                    s.spawn(move || {
                        for n in 0..8 {
                            image.write_at(&[t as u8; 16384], (t * 8 + n) * 16384, NONE).unwrap();
                        }
                    });
                }
            });
            let before = std::fs::read_to_string(&log).unwrap();
            assert!(not_flushed(&before).0.len() == 1 || multi, "one connection only");
            assert!(!not_flushed(&before).0.is_empty());
            image.flush().unwrap();
            let (dirty, after) = not_flushed(&std::fs::read_to_string(&log).unwrap());
            assert!(after > 0 && (multi || dirty.is_empty()), "round {round}: {dirty:?}");
        }
        image.close().unwrap();
        drop(server);
    }
}
