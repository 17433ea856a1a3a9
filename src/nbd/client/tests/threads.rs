//! Many threads on one connection, against a server that answers out of order and in fragments.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::super::Settings;
use super::peer::*;
use crate::block::{Driver, OneIov, ReqFlags};
use crate::nbd::proto::*;

/// A small generator of numbers that are the same at each run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

/// Replies to a request that may be sent in any order: the last one is marked by being sent last.
fn fragments(mode: Mode, r: &Request, disk: &[u8], random: &mut Random) -> Vec<Vec<u8>> {
    let chunk_of = |flags, kind, payload: &[u8]| {
        let (head, n) = chunk_header(mode, flags, kind, r, payload.len() as u64);
        [&head[..n], payload].concat()
    };
    let done = match mode {
        Mode::Simple => simple_reply(0, r.cookie).to_vec(),
        _ => chunk_of(chunk::DONE, chunk::NONE, &[]),
    };
    if r.kind != cmd::READ {
        return vec![done];
    }
    let (from, to) = (r.offset as usize, (r.offset + r.length) as usize);
    if mode == Mode::Simple {
        return vec![[&done, &disk[from..to]].concat()];
    }
    let mut parts = Vec::new();
    let mut at = from;
    while at < to {
        let end = (at + 1 + random.below(r.length.min(5000)) as usize).min(to);
        let offset = (at as u64).to_be_bytes();
        if disk[at..end].iter().all(|b| *b == 0) {
            let len = ((end - at) as u32).to_be_bytes();
            parts.push(chunk_of(0, chunk::OFFSET_HOLE, &[&offset[..], &len].concat()));
        } else {
            parts.push(chunk_of(0, chunk::OFFSET_DATA, &[&offset[..], &disk[at..end]].concat()));
        }
        at = end;
    }
    for i in (1..parts.len()).rev() {
        parts.swap(i, random.below(i as u64 + 1) as usize);
    }
    // To be taken from the end.
    parts.insert(0, done);
    parts
}

/// Serve from `disk`, replies of all requests mixed; ends with the client.
pub fn serve_mixed(p: Peer, disk: &mut [u8], seed: u64) {
    let mode = p.mode;
    let (tx, rx) = mpsc::channel();
    let mut out = Peer { stream: p.stream.try_clone().unwrap(), mode };
    let mut reader = p;
    std::thread::scope(|s| {
        s.spawn(move || {
            while let Some(r) = reader.request() {
                if tx.send(r).is_err() {
                    return;
                }
            }
        });
        let mut random = Random(seed);
        let mut open: Vec<Vec<Vec<u8>>> = Vec::new();
        let mut pending = Vec::new();
        loop {
            // What is here, and, if there is nothing to do, what comes next.
            let next = if open.is_empty() { rx.recv().ok() } else { rx.try_recv().ok() };
            match next {
                Some((r, payload)) => {
                    let range = r.offset as usize..(r.offset + r.length) as usize;
                    match r.kind {
                        cmd::WRITE => disk[range].copy_from_slice(&payload),
                        cmd::WRITE_ZEROES => disk[range].fill(0),
                        _ => {}
                    }
                    open.push(fragments(mode, &r, disk, &mut random));
                    continue;
                }
                None if open.is_empty() => return,
                None => {}
            }
            let i = random.below(open.len() as u64) as usize;
            pending.extend(open[i].pop().unwrap());
            if open[i].is_empty() {
                open.swap_remove(i);
            }
            // Cut anywhere, also within headers.
            let cut = match open.len() {
                0 => pending.len(),
                _ => random.below(pending.len() as u64 + 1) as usize,
            };
            out.send(&pending[..cut]);
            pending.drain(..cut);
        }
    });
}

pub fn hammer(d: &dyn Driver, threads: u64, rounds: u64, stripe: u64, largest: u64) {
    std::thread::scope(|s| {
        for t in 0..threads {
            s.spawn(move || {
                let mut random = Random(t + 1);
                let mut model = vec![0; stripe as usize];
                for round in 0..rounds {
                    let len = 1 + random.below(if round % 7 == 0 { largest } else { 3000 });
                    let at = random.below(stripe - len + 1);
                    let range = at as usize..(at + len) as usize;
                    let offset = t * stripe + at;
                    match random.below(5) {
                        0 => {
                            model[range].fill(0);
                            d.zero(offset, len, ReqFlags::NONE).unwrap();
                        }
                        1 | 2 => {
                            for b in &mut model[range.clone()] {
                                *b = random.below(256) as u8;
                            }
                            // In two pieces of memory.
                            let (a, b) = model[range].split_at(len as usize / 2);
                            let piece = |s: &[u8]| libc::iovec {
                                iov_base: s.as_ptr().cast_mut().cast(),
                                iov_len: s.len(),
                            };
                            let vecs = [piece(a), piece(b)];
                            // SAFETY: the pieces live to the end of the call.
                            let src = unsafe { crate::block::Src::from_raw(&vecs, len as usize) };
                            d.write(src, offset, ReqFlags::NONE).unwrap();
                        }
                        _ => {
                            let mut buf = vec![0xee; len as usize];
                            d.read(OneIov::dst(&mut buf).iov(), offset).unwrap();
                            assert!(buf == model[range], "thread {t}, {len} bytes at {at}");
                        }
                    }
                }
            });
        }
    });
}

#[test]
fn many_threads_get_each_its_own_bytes() {
    for (mode, seed) in [(Mode::Simple, 1), (Mode::Structured, 2), (Mode::Extended, 3)] {
        let (threads, stripe) = (24, 1 << 17);
        let size = threads * stripe;
        let flags = Offer::default().flags;
        opened(
            Offer { mode, size, flags, ..Offer::default() },
            move |p| serve_mixed(p, &mut vec![0; size as usize], seed),
            |d| {
                hammer(d, threads, 150, stripe, 100_000);
                d.close().unwrap();
            },
        );
    }
}

#[test]
fn more_threads_than_slots_take_turns() {
    opened(
        Offer { size: 200 << 12, ..Offer::default() },
        |p| serve_mixed(p, &mut vec![0; 200 << 12], 7),
        |d| {
            hammer(d, 200, 30, 1 << 12, 4096);
            d.close().unwrap();
        },
    );
}

#[test]
fn all_threads_learn_that_the_connection_broke() {
    for _ in 0..20 {
        opened(
            Offer::default(),
            |mut p| {
                for _ in 0..100 {
                    let Some((r, _)) = p.request() else { return };
                    p.data(&r, 1, r.offset, &[1; 512]);
                }
                p.send(&[0; 64]);
                while p.request().is_some() {}
            },
            |d| {
                std::thread::scope(|s| {
                    for _ in 0..16 {
                        s.spawn(|| while read(d, 0, 512).is_ok() {});
                    }
                });
            },
        );
    }
}

#[test]
fn an_early_reply_does_not_end_a_write_before_it_is_sent() {
    const SIZE: usize = 8 << 20;
    let (begun, read_all) = (AtomicBool::new(false), AtomicBool::new(false));
    opened(
        Offer { size: SIZE as u64, ..Offer::default() },
        |mut p| {
            let head = p.take_vec(p.mode.request_len()).unwrap();
            let r = Request::decode(&head, p.mode).unwrap();
            let first = p.take_vec(1000).unwrap();
            begun.store(true, SeqCst);
            p.ok(&r);
            // The client must not take this for the end of its call. Requests of others may still be
            // answered, though what they ask is behind the rest of the payload.
            std::thread::sleep(Duration::from_millis(50));
            read_all.store(true, SeqCst);
            let rest = p.take_vec(SIZE - 1000).unwrap();
            assert!(first.iter().chain(&rest).all(|b| *b == 0x77));
            let (r, _) = p.request().unwrap();
            p.data(&r, 1, r.offset, &[2; 512]);
            while p.request().is_some() {}
        },
        |d| {
            let written = AtomicBool::new(false);
            std::thread::scope(|s| {
                s.spawn(|| {
                    write(d, 0, &vec![0x77; SIZE]).unwrap();
                    assert!(read_all.load(SeqCst), "memory given back while it is being sent");
                    written.store(true, SeqCst);
                });
                // One that waits for its reply while the other sends.
                s.spawn(|| {
                    while !begun.load(SeqCst) {
                        std::thread::yield_now();
                    }
                    assert_eq!(read(d, 0, 512).unwrap(), [2; 512]);
                });
            });
            assert!(written.load(SeqCst));
        },
    );
}

#[test]
fn a_reply_to_a_write_that_was_never_read_is_not_believed() {
    opened(
        Offer { size: 64 << 20, ..Offer::default() },
        |mut p| {
            let head = p.take_vec(p.mode.request_len()).unwrap();
            let r = Request::decode(&head, p.mode).unwrap();
            p.ok(&r);
        },
        |d| assert!(write(d, 0, &vec![0x77; 16 << 20]).is_err()),
    );
}

fn hurried() -> Settings {
    Settings { timeout: Some(Duration::from_millis(200)), ..settings() }
}

/// All of these calls end with ETIMEDOUT or with the loss that another's timeout caused, in time.
fn all_late(script: impl FnOnce(Peer) + Send, call: impl Fn(&dyn Driver, u64) + Sync) {
    let begin = Instant::now();
    connected_with(
        hurried(),
        |mut p| {
            p.negotiate(&Offer { size: 64 << 20, ..Offer::default() });
            script(p);
        },
        |d| {
            let d = &*d.unwrap();
            std::thread::scope(|s| {
                (0..8).for_each(|t| {
                    drop(s.spawn({
                        let call = &call;
                        move || call(d, t)
                    }))
                })
            });
        },
    );
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[test]
fn no_call_outlasts_its_time() {
    // A server that reads and says nothing.
    all_late(|mut p| while p.request().is_some() {}, |d, _| assert!(read(d, 0, 512).is_err()));
    // One that does not even read.
    all_late(
        |p| {
            // Until the client hangs up, which is told without being asked for.
            let fd = std::os::fd::AsRawFd::as_raw_fd(&p.stream);
            let mut poll = libc::pollfd { fd, events: 0, revents: 0 };
            // SAFETY: one pollfd, which is ours.
            assert_eq!(unsafe { libc::poll(&mut poll, 1, 20_000) }, 1);
        },
        |d, _| assert!(write(d, 0, &vec![1; 4 << 20]).is_err()),
    );
    // One that stops in the middle of a reply.
    all_late(
        |mut p| {
            let (r, _) = p.request().unwrap();
            let (head, n) = chunk_header(p.mode, 1, chunk::OFFSET_DATA, &r, 8 + 512);
            p.send(&head[..n]);
            p.send(&0u64.to_be_bytes());
            p.send(&[1; 100]);
            while p.request().is_some() {}
        },
        |d, _| assert!(read(d, 0, 512).is_err()),
    );
    // One that answers all but one.
    all_late(
        |mut p| {
            while let Some((r, _)) = p.request() {
                if r.offset != 0 {
                    p.data(&r, 1, r.offset, &[1; 512]);
                }
            }
        },
        |d, t| {
            if t == 0 {
                assert!(is_errno(&read(d, 0, 512).unwrap_err(), libc::ETIMEDOUT));
            } else {
                while read(d, 512 * t, 512).is_ok() {}
            }
        },
    );
}
