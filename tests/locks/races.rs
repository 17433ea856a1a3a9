//! Two who come at the same moment: never both.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering::*};

use super::*;

#[test]
fn of_two_writers_at_the_same_moment_never_both() {
    let dir = Tmp::in_memory("locks-race");
    let path = dir.join("disk");
    create(&path, "qcow2", 1 << 20, &[]);
    let (rounds, threads) = (1000, 3);
    let barrier = Barrier::new(threads);
    let inside = AtomicU32::new(0);
    let (alone, none) = (AtomicU32::new(0), AtomicU32::new(0));
    let won = AtomicU32::new(0);
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                for _ in 0..rounds {
                    if barrier.wait().is_leader() {
                        won.store(0, SeqCst);
                    }
                    barrier.wait();
                    let opened = try_open(&path, RW);
                    match &opened {
                        Ok(_) => {
                            assert_eq!(inside.fetch_add(1, SeqCst), 0, "two writers");
                            won.fetch_add(1, SeqCst);
                        }
                        Err(Error::Locked { .. }) => {}
                        Err(e) => panic!("{e}"),
                    }
                    if barrier.wait().is_leader() {
                        let counter = if won.load(SeqCst) == 0 { &none } else { &alone };
                        counter.fetch_add(1, SeqCst);
                    }
                    if opened.is_ok() {
                        inside.fetch_sub(1, SeqCst);
                    }
                    drop(opened);
                }
            });
        }
    });
    eprintln!("one got in {} times, nobody {} times", alone.into_inner(), none.into_inner());
}

#[test]
fn with_patience_everybody_gets_a_turn() {
    let dir = Tmp::in_memory("locks-turns");
    let path = dir.join("disk");
    create(&path, "raw", 1 << 20, &[]);
    let inside = AtomicU32::new(0);
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                let patient = options(&[("format", "raw"), ("lock-wait", "120")]);
                for _ in 0..25 {
                    let image = open_with(&path, &patient, RW);
                    assert_eq!(inside.fetch_add(1, SeqCst), 0, "two writers");
                    let n = u32::from_le_bytes(read_range(&image, 0, 4).try_into().unwrap());
                    image.write_at(&(n + 1).to_le_bytes(), 0, NONE).unwrap();
                    inside.fetch_sub(1, SeqCst);
                    image.close().unwrap();
                }
            });
        }
    });
    assert_eq!(peek(&path, 0, 4), 100u32.to_le_bytes(), "no turn was lost");
}

#[test]
fn of_qemu_and_us_at_the_same_moment_never_both() {
    let dir = Tmp::in_memory("locks-race-qemu");
    let path = dir.join("disk");
    create(&path, "qcow2", 1 << 20, &[]);
    let (mut theirs, mut ours) = (0, 0);
    for round in 0..40u64 {
        std::thread::scope(|s| {
            let peer = s.spawn(|| Peer::try_io(&[], "qcow2", &path));
            // Around the time that it takes to start.
            let until = std::time::Instant::now() + std::time::Duration::from_micros(round * 1000);
            let mut image = None;
            while image.is_none() && (std::time::Instant::now() < until || !peer.is_finished()) {
                image = try_open(&path, RW).ok();
            }
            let peer = peer.join().unwrap();
            assert!(image.is_none() || peer.is_none(), "two writers in round {round}");
            ours += u32::from(image.is_some());
            theirs += u32::from(peer.is_some());
        });
    }
    eprintln!("we got in {ours} times, qemu-io {theirs} times");
    // The other way about: it is in, and gives up while we try.
    for _ in 0..10 {
        let peer = Peer::io(&[], "qcow2", &path);
        std::thread::scope(|s| {
            s.spawn(|| drop(peer));
            drop(open_with(&path, &options(&[("lock-wait", "60")]), RW));
        });
    }
}
