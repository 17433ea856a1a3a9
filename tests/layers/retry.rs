//! `retry`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use qblk::block::*;
use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::peers;
use crate::recorder::*;

const EIO: ErrorKind = ErrorKind::Errno(libc::EIO);

/// The layer that does not wait, with nothing in the log.
fn eager(r: &Arc<Recorder>, retries: &str) -> Device {
    let dev = on(r, "retry", &[("retries", retries), ("delay", "0")], true).unwrap();
    assert_eq!(r.log(), ["open 1 rw", "1 flush"]);
    dev
}

#[test]
fn what_fails_is_repeated_after_opening_anew() {
    let r = Recorder::new(8192, able());
    let dev = eager(&r, "2");
    let mut some = [0; 512];
    for (what, work) in [
        ("read 0+512", &mut (|| dev.read_slice(&mut some, 0)) as &mut dyn FnMut() -> Result<()>),
        ("cache 0+512", &mut || dev.cache(0, 512)),
        ("flush", &mut || dev.flush()),
        ("write 0+512 FUA", &mut || dev.write_slice(&[1; 512], 0, ReqFlags::FUA)),
        ("zero 0+512 FUA", &mut || dev.zero(0, 512, ReqFlags::FUA)),
        ("trim 0+512 FUA", &mut || dev.trim(0, 512, ReqFlags::FUA)),
        ("extents 0+512", &mut || {
            let mut found = [Extent::default(); 2];
            let mut list = ExtentList::new(&mut found);
            dev.driver().extents(0, 512, &mut list)?;
            assert_eq!((list.len(), found[0].length), (1, 512));
            Ok(())
        }),
        // From here on something is not flushed.
        ("write 0+512", &mut || {
            dev.write_slice(&[1; 512], 0, NONE)?;
            dev.flush()
        }),
        ("zero 0+512", &mut || {
            dev.zero(0, 512, NONE)?;
            dev.flush()
        }),
        ("trim 0+512", &mut || {
            dev.trim(0, 512, NONE)?;
            dev.flush()
        }),
    ] {
        let call = format!("1 {what}");
        let flushed = (what != "flush" && !what.contains("FUA"))
            && ["write", "zero", "trim"].iter().any(|w| what.starts_with(w));
        let tail: &[&str] = if flushed { &["1 flush"] } else { &[] };
        let with = |head: &[&str]| -> Vec<String> {
            head.iter().chain(tail).map(|line| line.to_string()).collect()
        };
        r.fail(what, libc::EIO, 1);
        work().unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(r.log(), with(&[&call, "0 reopen", &call]));
        // Opening anew fails, too, and counts.
        r.fail(what, libc::EPIPE, 1);
        r.fail("reopen", libc::ENOENT, 1);
        work().unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(r.log(), with(&[&call, "0 reopen", "0 reopen", &call]));
        // Often enough.
        r.fail(what, libc::ETIMEDOUT, 3);
        let e = work().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Errno(libc::ETIMEDOUT));
        assert!(e.to_string().contains("'retry' has given up after 2 more tries"), "{e}");
        assert_eq!(r.log(), [&call, "0 reopen", &call, "0 reopen", &call]);
        r.fail(what, libc::EIO, 1);
        r.fail("reopen", libc::ECONNREFUSED, 2);
        let e = work().unwrap_err();
        assert_eq!(e.kind(), EIO);
        assert!(e.to_string().contains("opened anew: 'below': a call that is to"), "{e}");
        assert_eq!(r.log(), [&call, "0 reopen", "0 reopen"]);
        // What means the same every time is not repeated.
        for errno in
            [libc::EINVAL, libc::ENOSPC, libc::EROFS, libc::EPERM, libc::EFBIG, libc::EACCES]
        {
            r.fail(what, errno, 1);
            assert_eq!(work().unwrap_err().kind(), ErrorKind::Errno(errno));
            assert_eq!(r.log(), [&*call], "errno {errno}");
        }
    }
}

#[test]
fn a_failed_flush_is_never_repeated_into_silence() {
    let r = Recorder::new(8192, able());
    let dev = eager(&r, "5");
    dev.write_slice(&[1; 512], 0, NONE).unwrap();
    r.fail("flush", libc::EIO, 1);
    assert_eq!(dev.flush().unwrap_err().kind(), EIO);
    assert_eq!(r.log(), ["1 write 0+512", "1 flush"]);
    // As after every failed flush.
    for result in [
        dev.flush(),
        dev.write_slice(&[1; 512], 0, ReqFlags::FUA),
        dev.zero(0, 512, NONE),
        dev.trim(0, 512, NONE),
    ] {
        assert!(matches!(result, Err(Error::Failed { errno: libc::EIO, .. })), "{result:?}");
    }
    dev.driver().close().unwrap();
    assert!(r.log().is_empty());
    // Not healed by what is opened anew for others, only by whoever was told.
    r.fail("read", libc::EIO, 1);
    dev.read_slice(&mut [0; 512], 0).unwrap();
    assert!(dev.flush().is_err());
    dev.driver().reopened();
    dev.write_slice(&[1; 512], 0, NONE).unwrap();
    dev.flush().unwrap();
    let last = ["1 read 0+512", "1 flush", "0 reopen", "1 read 0+512", "1 write 0+512", "1 flush"];
    assert_eq!(r.log(), last);
}

#[test]
fn writes_that_are_lost_when_it_is_opened_anew_are_told_by_the_next_flush() {
    let r = Recorder::new(8192, able());
    let dev = eager(&r, "5");
    let mut some = [0; 512];
    dev.write_slice(&[1; 512], 0, NONE).unwrap();
    // Flushed before it is opened anew: all is well.
    r.fail("read", libc::EIO, 1);
    dev.read_slice(&mut some, 0).unwrap();
    dev.flush().unwrap();
    let well = ["1 write 0+512", "1 read 0+512", "1 flush", "0 reopen", "1 read 0+512", "1 flush"];
    assert_eq!(r.log(), well);
    // Now that fails.
    dev.write_slice(&[1; 512], 0, NONE).unwrap();
    r.fail("flush", libc::EPIPE, 1);
    r.fail("read", libc::EIO, 2);
    dev.read_slice(&mut some, 0).unwrap();
    let lost = [
        "1 write 0+512",
        "1 read 0+512",
        "1 flush",
        "0 reopen",
        "1 read 0+512",
        "0 reopen",
        "1 read 0+512",
    ];
    assert_eq!(r.log(), lost);
    // Whoever reopens the device in between is told all the same.
    dev.driver().reopened();
    dev.write_slice(&[1; 512], 0, NONE).unwrap();
    assert_eq!(dev.flush().unwrap_err().kind(), ErrorKind::Errno(libc::EPIPE));
    assert!(matches!(dev.write_slice(&some, 0, NONE), Err(Error::Failed { .. })));
    dev.driver().reopened();
    dev.flush().unwrap();
    assert_eq!(r.log(), ["1 write 0+512", "1 flush"]);
}

/// Open it anew, flushing in vain before that.
fn lose(r: &Recorder, dev: &Device) {
    r.fail("flush", libc::EPIPE, 1);
    r.fail("read", libc::EIO, 1);
    dev.read_slice(&mut [0; 512], 0).unwrap();
}

/// A flush by a thread, which tells that writes were lost, and is not waited for without end.
fn flush_in_thread(dev: &Arc<Device>) -> impl FnOnce() {
    let (tell, told) = mpsc::channel();
    let dev = dev.clone();
    std::thread::spawn(move || tell.send(dev.flush()));
    move || {
        let result = told.recv_timeout(Duration::from_secs(60)).expect("the flush hangs");
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Errno(libc::EPIPE));
    }
}

#[test]
fn a_flush_tells_what_is_lost_while_it_is_under_way() {
    for idle in [false, true] {
        let r = Recorder::new(8192, able());
        let dev = Arc::new(eager(&r, "5"));
        let write = || dev.write_slice(&[1; 512], 0, NONE).unwrap();
        if !idle {
            write();
        }
        r.hold_first("flush");
        let tells = flush_in_thread(&dev);
        r.wait_held(1);
        if idle {
            write();
        }
        lose(&r, &dev);
        r.release();
        tells();
        assert!(matches!(dev.flush(), Err(Error::Failed { errno: libc::EPIPE, .. })));
    }
}

#[test]
fn a_flush_that_succeeds_waits_for_the_one_of_whoever_opens_anew() {
    let r = Recorder::new(8192, able());
    let dev = Arc::new(eager(&r, "5"));
    dev.write_slice(&[1; 512], 0, NONE).unwrap();
    r.hold_first("flush");
    r.fail("read", libc::EIO, 1);
    std::thread::scope(|s| {
        s.spawn(|| dev.read_slice(&mut [0; 512], 0).unwrap());
        r.wait_held(1);
        assert_eq!(r.log(), ["1 write 0+512", "1 read 0+512", "1 flush"]);
        let tells = flush_in_thread(&dev);
        while r.log() != ["1 flush"] {
            std::thread::sleep(Duration::from_millis(1));
        }
        // That one is past all that can fail, and the one of the reader is not.
        r.fail("flush", libc::EPIPE, 1);
        r.release();
        tells();
    });
}

#[test]
fn the_end_of_a_handle_repeats_nothing() {
    let r = Recorder::new(8192, able());
    let dev = eager(&r, "5");
    // A write may take long.
    let cached = Recorder::new(512, Caps { cached: true, ..able() });
    assert!(!on(&cached, "retry", &[], true).unwrap().caps().cached);
    r.fail("flush to close", libc::EIO, 1);
    dev.driver().flush_to_close().unwrap_err();
    dev.write_slice(&[1; 512], 0, NONE).unwrap();
    r.fail("flush to close", libc::EIO, 1);
    assert_eq!(dev.driver().flush_to_close().unwrap_err().kind(), EIO);
    assert_eq!(r.log(), ["1 flush to close", "1 write 0+512", "1 flush to close"]);
    assert!(matches!(dev.flush(), Err(Error::Failed { errno: libc::EIO, .. })));
}

#[test]
fn a_write_that_is_acknowledged_while_it_is_opened_anew_is_done_again() {
    let r = Recorder::new(8192, able());
    let dev = eager(&r, "5");
    r.hold("write");
    std::thread::scope(|s| {
        s.spawn(|| dev.write_slice(&[1; 512], 0, NONE).unwrap());
        r.wait_held(1);
        r.fail("read", libc::EIO, 1);
        dev.read_slice(&mut [0; 512], 0).unwrap();
        // It was not known then that there would be something to flush.
        let log = r.log();
        assert_eq!(log, ["1 write 0+512", "1 read 0+512", "0 reopen", "1 read 0+512"]);
        r.release();
    });
    assert_eq!(r.log(), ["1 write 0+512"]);
}

#[test]
fn one_opens_anew_for_all_that_failed_on_the_same() {
    const THREADS: usize = 8;
    let r = Recorder::new(8192, able());
    let dev = eager(&r, "5");
    r.hold("read");
    std::thread::scope(|s| {
        for t in 0..THREADS {
            r.fail(&format!("read {}+", t * 512), libc::EIO, 1);
            let dev = &dev;
            s.spawn(move || dev.read_slice(&mut [0; 512], t as u64 * 512).unwrap());
        }
        r.wait_held(THREADS);
        r.release();
    });
    let log = r.log();
    assert_eq!(log.iter().filter(|l| *l == "0 reopen").count(), 1, "{log:#?}");
    assert_eq!(log.len(), 2 * THREADS + 1);
}

#[test]
fn settings_say_how_often_how_long_and_what_for() {
    let settings = |all: &[(&str, &str)]| {
        let r = Recorder::new(8192, able());
        on(&r, "retry", all, false).map(|dev| (r, dev)).map_err(|e| e.to_string())
    };
    let failing = |all: &[(&str, &str)], errno, times| {
        let (r, dev) = settings(all).unwrap();
        r.fail("read", errno, times);
        let begun = Instant::now();
        let result = dev.read_slice(&mut [0; 512], 0);
        let reads = r.log().iter().filter(|l| l.contains("read")).count();
        (result.is_ok(), reads, begun.elapsed())
    };
    let ms = Duration::from_millis;
    let (done, reads, took) = failing(&[("delay", "0.04")], libc::EIO, 3);
    assert!(done && reads == 4 && took >= ms(40 + 80 + 160), "{took:?}");
    let (done, _, took) = failing(&[("delay", "0.04"), ("max-delay", "0.05")], libc::EIO, 3);
    assert!(done && took >= ms(40 + 50 + 50), "{took:?}");
    let same = [("delay", "0.04"), ("exponential", "off"), ("retries", "12")];
    let (done, reads, took) = failing(&same, libc::EIO, 12);
    assert!(done && reads == 13 && took >= ms(12 * 40), "{took:?}");
    // A pause that would not end in time is not begun.
    let (done, reads, took) = failing(&[("delay", "300"), ("time-limit", "200")], libc::EIO, 1);
    assert!(!done && reads == 1 && took < ms(200_000), "{took:?}");
    assert_eq!(failing(&[("retries", "0")], libc::EIO, 1).1, 1);
    let errors = [("delay", "0"), ("errors", "ETIMEDOUT+EPIPE")];
    assert_eq!(failing(&errors, libc::EPIPE, 1).1, 2);
    assert_eq!(failing(&errors, libc::EIO, 1).1, 1);
    for (setting, what) in [
        (("errors", "EINVAL"), "some of EAGAIN, "),
        (("errors", ""), "some of EAGAIN, "),
        (("retries", "-1"), "a number from 0"),
        (("delay", "1h"), "seconds such as"),
        (("delay", "1001"), "at most 1000"),
        (("max-delay", "1000.1"), "at most 1000"),
    ] {
        let e = settings(&[setting]).err().unwrap();
        assert!(e.contains(what), "{e}");
    }
}

#[test]
fn many_threads_on_what_fails_all_the_time_lose_nothing() {
    const PART: usize = 8192;
    let r = Recorder::new(4 * PART, able());
    let dev = on(&r, "retry", &[("retries", "1000000"), ("delay", "0")], true).unwrap();
    let (done, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    let seed = seed("retry-many");
    let parts = std::thread::scope(|s| {
        let chaos = s.spawn(|| {
            let mut rng = Rng::new(seed);
            while !done.load(SeqCst) {
                // Not flushes: what those may have lost must be told.
                let what = rng.pick(&["read", "write", "zero", "trim", "reopen", "extents"]);
                r.fail(what, libc::EIO, rng.range(1, 4) as usize);
                rounds.fetch_add(1, SeqCst);
                std::thread::sleep(Duration::from_micros(300));
                r.log();
            }
        });
        let threads: Vec<_> = (0..4)
            .map(|t| {
                let (dev, rounds) = (&dev, &rounds);
                s.spawn(move || {
                    let mut rng = Rng::new(seed + 1 + t);
                    let base = t * PART as u64;
                    let mut model = vec![0; PART];
                    dev.write_slice(&model, base, NONE).unwrap();
                    let mut calls = 0;
                    while calls < 500 || rounds.load(SeqCst) < 50 {
                        calls += 1;
                        let at = rng.below(PART as u64) as usize;
                        let len = rng.below((PART - at) as u64 + 1) as usize;
                        let offset = base + at as u64;
                        let fua = rng.pick(&[NONE, ReqFlags::FUA]);
                        match rng.below(5) {
                            0 => {
                                model[at..at + len].fill(0);
                                dev.zero(offset, len as u64, fua).unwrap();
                            }
                            // The recorder's bytes stay.
                            1 => dev.trim(offset, len as u64, fua).unwrap(),
                            2 => dev.flush().unwrap(),
                            3 => {
                                let mut found = vec![0; len];
                                dev.read_slice(&mut found, offset).unwrap();
                                assert_same(&found, &model[at..at + len], offset, "read");
                            }
                            _ => {
                                model[at..at + len].copy_from_slice(&rng.bytes(len));
                                dev.write_slice(&model[at..at + len], offset, fua).unwrap();
                            }
                        }
                    }
                    model
                })
            })
            .collect();
        let parts: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
        done.store(true, SeqCst);
        chaos.join().unwrap();
        parts
    });
    let all: Vec<u8> = parts.into_iter().flat_map(|p| p.unwrap()).collect();
    assert!(r.bytes() == all);
}

/// A server of a file that dies and comes back, under a client that does not reconnect by itself.
#[test]
fn a_server_that_comes_back_is_found_and_what_it_may_have_lost_is_told() {
    let tmp = Tmp::in_memory("retry-nbd");
    let (disk, socket) = (tmp.join("disk"), tmp.join("s.sock"));
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let start = || peers::nbdkit(&socket, &[&"file", &disk]);
    let open = |layers: &str| {
        let set = Options::new().with("format", "raw").with("nbd.reconnect", "0");
        let set = if layers.is_empty() { set } else { set.with("layers", layers) };
        Image::open(peers::unix(&socket, "").as_ref(), &set, RW).unwrap()
    };
    let mut server = start();
    let without = open("");
    let image = open("retry;delay=0.02;max-delay=0.1;retries=1000");
    image.write_at(&[1; 1000], 0, NONE).unwrap();
    image.flush().unwrap();
    server.kill();
    without.read_at(&mut [0; 10], 0).unwrap_err();
    let mut found = [0; 1000];
    // A read and a write, side by side, over the time that nobody is there.
    let (begun, is_begun) = mpsc::channel();
    let mut server = std::thread::scope(|s| {
        let (reads, writes) = (begun.clone(), begun);
        let image = &image;
        let reader = s.spawn(move || {
            reads.send(()).unwrap();
            read_range(image, 0, 1000)
        });
        s.spawn(move || {
            writes.send(()).unwrap();
            image.write_at(&[2; 1000], 5000, NONE).unwrap();
        });
        is_begun.iter().take(2).for_each(drop);
        std::thread::sleep(Duration::from_millis(100));
        // It lives as long as the thread that starts it.
        let server = start();
        assert_eq!(reader.join().unwrap(), [1; 1000]);
        server
    });
    // Nothing that was acknowledged had not been flushed.
    image.flush().unwrap();
    server.kill();
    let mut server = start();
    image.read_at(&mut found, 5000).unwrap();
    assert_eq!(found, [2; 1000]);
    // Acknowledged and not flushed when the server dies: whether it is there nobody can know.
    image.write_at(&[3; 1000], 0, NONE).unwrap();
    server.kill();
    let _server = start();
    image.read_at(&mut found, 5000).unwrap();
    assert_eq!(image.flush().unwrap_err().kind(), EIO);
    assert!(matches!(image.write_at(&[4; 10], 0, NONE), Err(Error::Failed { .. })));
    image.read_at(&mut found, 5000).unwrap();
    image.reopen(None, RW).unwrap();
    image.write_at(&[4; 10], 0, NONE).unwrap();
    image.flush().unwrap();
    image.close().unwrap();
    drop(without);
}
