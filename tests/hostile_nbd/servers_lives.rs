//! Servers that are silent, slow, or come and go: no call outlasts its limit, nothing is tried without
//! pause, closing waits for nobody.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use qblk::block::ErrorKind;
use qblk::{Image, ReqFlags};

use super::peer::*;
use super::scene::{alone, counts, until};
use super::wire::*;

fn offer() -> Offer {
    Offer::new(Mode::Structured)
}

/// Several at a time: they wait for the most part.
fn together<T: Sync>(all: &[T], work: impl Fn(&T) + Sync) {
    std::thread::scope(|s| {
        let started: Vec<_> = all.iter().map(|one| s.spawn(|| work(one))).collect();
        // One that has failed has told why.
        started.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// Time of the processor that this process has used.
fn cpu() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// D8, D13: silence after so many bytes of a reply.
#[test]
fn silence_in_the_middle_of_a_reply() {
    alone(|| {
        costs_little(|| {
            let all: Vec<_> = MODES
                .iter()
                .flat_map(|m| [0, 1, 4, 15, 16, 19, 20, 27, 28, 40, 4000].map(|n| (*m, n)))
                .collect();
            together(&all, |&(mode, n)| {
                let what = format!("{mode:?}, {n} bytes");
                let evil = Evil::answering(Offer::new(mode), move |p, r| {
                    let reply = right_bytes(p.mode, r);
                    p.say(&reply[..n.min(reply.len() - 1)]);
                    p.silence();
                });
                let image = evil.open(&[]).unwrap();
                let mut buf = [0; 4096];
                let e = bounded(&what, || image.read_at(&mut buf, 512)).expect_err(&what);
                assert_errno(&e, libc::ETIMEDOUT, &what);
                let e = bounded(&what, || image.flush()).expect_err(&what);
                assert_errno(&e, libc::ETIMEDOUT, &what);
                close(image, &what);
            });
        });
    });
}

/// A server that always says a little more: at no time has it been silent for long.
#[test]
fn a_byte_at_a_time() {
    alone(|| {
        costs_little(|| {
            together(&[1, 20, 60, 110, 1000], |&pause| {
                let what = format!("a byte in {pause} ms");
                let evil = Evil::answering(offer(), move |p, r| {
                    for byte in right_bytes(p.mode, r) {
                        p.sleep(Duration::from_millis(pause));
                        if !p.say(&[byte]) {
                            break;
                        }
                    }
                });
                let image = evil.open(&[]).unwrap();
                let e = bounded(&what, || image.read_at(&mut [0; 4096], 512)).expect_err(&what);
                assert_errno(&e, libc::ETIMEDOUT, &what);
                close(image, &what);
            });
        });
    });
}

/// A server that reads a little of a write, always a little more.
#[test]
fn writes_that_are_read_slowly() {
    alone(|| {
        let data = vec![1; 16 << 20];
        costs(160 << 20, || {
            together(
                &[(64 << 10, 20), (4 << 10, 5), (1, 50), (200 << 10, 100)],
                |&(bytes, pause)| {
                    let what = format!("{bytes} bytes in {pause} ms");
                    let evil = Evil::answering(offer(), move |p, _| {
                        while p.take(bytes).is_some() {
                            p.sleep(Duration::from_millis(pause));
                        }
                    });
                    let image = evil.open(&[]).unwrap();
                    let e = bounded(&what, || image.write_at(&data, 0, ReqFlags::NONE))
                        .expect_err(&what);
                    assert_errno(&e, libc::ETIMEDOUT, &what);
                    close(image, &what);
                },
            );
        });
    });
}

/// 32 threads call a server that has negotiated and says nothing more, or never spoke at all when the
/// connection was to be made again.
#[test]
fn many_threads_and_silence() {
    alone(|| {
        costs(24 << 20, || {
            let evil = Evil::answering(offer(), |p, _| p.silence());
            let image = evil.open(&[]).unwrap();
            call_32_times(&image);
            close(image, "silent");
            drop(evil);

            let evil = Evil::new(|n, p| {
                if n == 0 && p.negotiate(&offer()) {
                    p.request();
                } else {
                    p.silence();
                }
            });
            let image = evil.open(&[("nbd.reconnect", "30")]).unwrap();
            let before = counts().threads;
            call_32_times(&image);
            // The one that makes connections, and at most two of the server's.
            // Those that were joined may take a moment to be gone.
            let few = until(Duration::from_secs(5), counts, |c| c.threads <= before + 3);
            assert!(few.is_ok(), "{few:?}, before {before}");
            assert!(evil.came() <= 3, "{} connections", evil.came());
            close(image, "never spoke");
        });
    });
}

fn call_32_times(image: &Image) {
    std::thread::scope(|s| {
        for i in 0..32 {
            s.spawn(move || {
                let e = bounded("a call", || match i % 4 {
                    0 => image.read_at(&mut [0; 4096], i * 4096),
                    1 => image.write_at(&[1; 4096], i * 4096, ReqFlags::NONE),
                    2 => image.zero(i * 4096, 4096, ReqFlags::NONE),
                    _ => image.block_status(b"base:allocation", 0, 1 << 20, 1000).map(drop),
                });
                assert_errno(&e.expect_err("an answer of nobody"), libc::ETIMEDOUT, "a call");
            });
        }
    });
}

/// How a handshake can stop: the number says where.
fn stop_at(stage: usize, p: &mut Peer) {
    let offer = offer();
    match stage {
        0 => {}
        1 => _ = p.say(b"NBDMAGIC"),
        2 => _ = p.say(b"NBDMAGICIHAVEOPT\0\x03"),
        3..=6 => {
            let option =
                [opt::EXTENDED_HEADERS, opt::STRUCTURED_REPLY, opt::SET_META_CONTEXT, opt::GO];
            p.greet();
            p.agree(&offer, option[stage - 3]);
        }
        7 => {
            p.greet();
            p.agree(&offer, opt::GO);
            // The size and no end of it; in the middle of a reply.
            p.tell_export(offer.size, offer.flags);
            p.say(&[0, 3, 0xe8]);
        }
        8 => {
            p.greet();
            p.agree(&offer, opt::GO);
            p.announce(opt::GO, rep::INFO, 12, &[0, 0, 0]);
        }
        // A byte at a time.
        _ => {
            p.greet();
            p.option();
            let words = [b'x'; 600];
            for byte in option_reply(opt::EXTENDED_HEADERS, rep::ERR_UNSUP, 60_000, &words) {
                p.sleep(Duration::from_millis(100));
                if !p.say(&[byte]) {
                    return;
                }
            }
        }
    }
    p.silence();
}
const STAGES: [usize; 10] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9];

/// Silent in the middle of the handshake, when a connection is to be made again: calls keep to their
/// limit, trying to the time for it, and closing waits for neither.
#[test]
fn silence_when_connecting_again() {
    alone(|| {
        costs(24 << 20, || {
            together(&STAGES, |&stage| {
                let what = format!("stage {stage}");
                let evil = Evil::new(move |n, p| match n {
                    0 => {
                        p.negotiate(&offer());
                        p.request();
                    }
                    _ => stop_at(stage, p),
                });
                let image = evil.open(&[("nbd.reconnect", "1")]).unwrap();
                let mut buf = [0; 512];
                let e = bounded(&what, || image.read_at(&mut buf, 0)).expect_err(&what);
                assert_errno(&e, libc::ETIMEDOUT, &what);
                assert_eq!(evil.came(), 2, "{what}");
                // The time for it is over: that is known at once, and why.
                std::thread::sleep(Duration::from_millis(700));
                let begun = Instant::now();
                let e = image.read_at(&mut buf, 0).expect_err(&what);
                assert!(begun.elapsed() < BOUNDED, "{what}");
                assert_decent(&e, &what);
                assert!(e.to_string().contains("cannot be made again"), "{what}: {e}");
                assert_eq!(evil.came(), 2, "{what}");
                // A call that asks for another try, and closing meanwhile.
                std::thread::sleep(Duration::from_millis(500));
                let result = bounded(&what, || image.read_at(&mut buf, 0));
                assert_decent(&result.expect_err(&what), &what);
                close(image, &what);
            });
        });
    });
}

/// As above, when the first connection is made: `nbd.timeout` bounds that, too (30 seconds do where it is
/// longer, which takes too long to be tried here).
#[test]
fn silence_when_connecting_first() {
    alone(|| {
        costs(24 << 20, || {
            together(&STAGES, |&stage| {
                let evil = Evil::new(move |_, p| stop_at(stage, p));
                let begun = Instant::now();
                let e = evil.open(&[]).map(drop).unwrap_err();
                let took = begun.elapsed();
                assert_eq!(e.kind(), ErrorKind::Errno(libc::ETIMEDOUT), "stage {stage}: {e}");
                assert!((0.5..5.0).contains(&took.as_secs_f64()), "stage {stage}: {took:?}");
            });
        });
    });
}

/// Servers that hang up again and again, at once or a little later: each time there is a longer pause
/// before the next try.
#[test]
fn storms_of_connections() {
    alone(|| {
        costs(24 << 20, || {
            let scripts: [fn(usize, &mut Peer); 4] = [
                // At once.
                |n, p| {
                    if n == 0 && p.negotiate(&offer()) {
                        p.request();
                    }
                },
                // After the handshake.
                |_, p| _ = p.negotiate(&offer()),
                // When asked for something.
                |_, p| {
                    if p.negotiate(&offer()) {
                        p.request();
                    }
                },
                // With something that no server says.
                |n, p| {
                    if n == 0 && p.negotiate(&offer()) {
                        p.request();
                    } else {
                        p.say(&[0; 64]);
                    }
                },
            ];
            for (i, script) in scripts.into_iter().enumerate() {
                let evil = Evil::new(script);
                let image = evil.open(&[("nbd.reconnect", "30"), ("nbd.timeout", "1")]).unwrap();
                let (begun, used) = (Instant::now(), cpu());
                let result = image.read_at(&mut [0; 512], 0);
                let e = result.expect_err("an answer of nobody");
                let (took, used) = (begun.elapsed(), cpu() - used);
                assert_errno(&e, libc::ETIMEDOUT, "a storm");
                assert!(took < Duration::from_millis(1900), "{i}: {took:?}");
                // 10, 20, 40, … ms.
                assert!(evil.came() < 14, "{i}: {} connections in a second", evil.came());
                assert!(used < Duration::from_millis(250), "{i}: {used:?} of the processor");
                close(image, "a storm");
            }
        });
    });
}

/// A server that comes back after a while is found, whatever storm there was before.
#[test]
fn after_a_storm_all_is_well() {
    alone(|| {
        costs_little(|| {
            let evil = Evil::new(|n, p| {
                if p.negotiate(&offer()) {
                    match n {
                        0..5 => _ = p.request(),
                        _ => _ = p.serve(),
                    }
                }
            });
            let image = evil.open(&[("nbd.reconnect", "30"), ("nbd.timeout", "5")]).unwrap();
            let begun = Instant::now();
            let mut buf = [0; 5000];
            image.read_at(&mut buf, 12345).unwrap();
            assert_eq!(buf[..], right(12345, 5000));
            assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
            assert_eq!(evil.came(), 6);
            image.close().unwrap();
        });
    });
}

/// The export that comes back is not the one that was: nothing of it is taken for the old one.
#[test]
fn another_export_comes_back() {
    alone(|| {
        costs_little(|| {
            type Change = (&'static str, fn(&mut Offer));
            let changes: [Change; 6] = [
                ("its size is 512 bytes", |o| o.size = 512),
                ("its size is", |o| o.size += 1 << 40),
                ("read-only", |o| o.flags |= 2),
                ("lacks", |o| o.flags &= !4),
                ("replies are Simple", |o| *o = Offer::new(Mode::Simple)),
                ("meta context", |o| o.context = false),
            ];
            for (part, change) in changes {
                let evil = Evil::new(move |n, p| {
                    let mut offer = offer();
                    if n > 0 {
                        change(&mut offer);
                    }
                    let begun = p.negotiate(&offer);
                    if n > 0 {
                        p.silence();
                    } else if begun {
                        p.request();
                    }
                });
                let image = evil.open(&[("nbd.reconnect", "30")]).unwrap();
                std::thread::scope(|s| {
                    for i in 0..8 {
                        let image = &image;
                        s.spawn(move || {
                            let result = match i % 2 {
                                0 => image.read_at(&mut [0; 4096], i * 4096),
                                _ => image.write_at(&[1; 4096], i * 4096, ReqFlags::NONE),
                            };
                            let e = result.expect_err(part);
                            assert_errno(&e, libc::ESTALE, part);
                            assert!(e.to_string().contains(part), "{e}");
                        });
                    }
                });
                assert_eq!(image.size().unwrap(), EXPORT_SIZE);
                let e = image.flush().expect_err(part);
                assert_errno(&e, libc::ESTALE, part);
                // No third try.
                assert_eq!(evil.came(), 2, "{part}");
                close(image, part);
            }
        });
    });
}

/// Dies at each byte of a reply, and is back at once: what was under way is asked again, and the
/// answer is right.
#[test]
fn asked_again_after_each_byte() {
    alone(|| {
        costs_little(|| {
            for mode in MODES {
                let at = std::sync::Arc::new(AtomicUsize::new(0));
                let limit = at.clone();
                let whole = Mutex::new(false);
                let evil = Evil::new(move |_, p| {
                    if !p.negotiate(&Offer::new(mode)) {
                        return;
                    }
                    while let Some(r) = p.request().filter(|r| r.kind != cmd::DISC) {
                        let reply = right_bytes(mode, &r);
                        let n = limit.load(SeqCst);
                        // Every other one is whole.
                        let mut whole = whole.lock().unwrap();
                        *whole = !*whole;
                        if *whole {
                            p.say(&reply[..n.min(reply.len() - 1)]);
                            break;
                        }
                        p.say(&reply);
                    }
                });
                let image = evil.open(&[("nbd.reconnect", "5"), ("nbd.timeout", "5")]).unwrap();
                for n in 0..48 {
                    at.store(n, SeqCst);
                    let mut buf = [0; 16];
                    image.read_at(&mut buf, n as u64).unwrap();
                    assert_eq!(buf[..], right(n as u64, 16), "{mode:?}, {n} bytes");
                }
                assert_eq!(evil.came(), 49);
                close(image, "after all of it");
            }
        });
    });
}
