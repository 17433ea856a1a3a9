//! What a failing disk leaves behind: whichever read, write or flush of a workload fails, once or from
//! then on, no call panics, calls say what happened, what was flushed is there, and the image is sound.
//!
//! Each workload is run once to count what it asks of the disk, and then again for every one of these
//! calls, failing that one. The steps are the same each time.

mod common;

use common::disk::{Call, Disk, Fault, Files};
use common::workload::{About, Guest, PLAIN, Scenario, Step, judge, read_all, scenarios, take};
use common::*;
use qblk::block::{Device, Prealloc, ReqFlags};

/// One of so many images is looked at by qemu-img as well.
const QEMU_SHARE: u64 = 60;

/// What came of a run on a disk that may fail.
struct Outcome {
    disk: Disk,
    guest: Guest,
    calls: [u64; 3],
    errors: u64,
}

fn go(scenario: &Scenario, new: &Files, steps: &[Step], fault: Option<Fault>) -> Outcome {
    let disk = Disk::new(new.clone());
    let image = scenario.open(&disk, true).unwrap();
    let mut guest = scenario.guest();
    disk.state().fault = fault;
    let mut errors = 0;
    for step in steps {
        if let Err(e) = take(&image, *step, &mut guest, &mut |_| {}) {
            assert!(disk.state().struck, "{step:?} failed, and the disk did not: {e}");
            errors += 1;
        }
    }
    // What was acknowledged reads so, if it can be read at all.
    read_back(&image, &guest, fault.is_some_and(|f| f.call == Call::Read));
    // Closing tells of what could not be kept; nothing is certain that was not before.
    match image.driver().close() {
        Ok(()) => guest.flushed(),
        Err(e) => {
            assert!(disk.state().struck, "closing failed, and the disk did not: {e}");
            errors += 1;
        }
    }
    drop(image);
    let calls = disk.state().calls;
    disk.state().fault = None;
    Outcome { disk, guest, calls, errors }
}

fn read_back(image: &Device, guest: &Guest, may_fail: bool) {
    match read_all(image) {
        Ok(bytes) => guest.judge(&bytes).unwrap_or_else(|e| panic!("read back: {e}")),
        Err(e) => assert!(may_fail, "reading failed, and the disk can be read: {e}"),
    }
}

#[test]
fn whichever_call_to_the_disk_fails_the_image_stays_sound_and_holds_what_was_flushed() {
    let seed = seed("io_errors");
    let mut r = Rng::new(seed);
    let dir = Tmp::in_memory("io-errors");
    std::fs::write(dir.join("below"), [0; 512]).unwrap();
    let (path, mut runs, mut struck, mut told) = (dir.join("failed.qcow2"), 0u64, 0u64, 0u64);
    let until = deadline(30);
    let mut round = 0;
    while round == 0 || std::time::Instant::now() < until {
        round += 1;
        for scenario in scenarios() {
            let steps = scenario.steps(&mut r, 14);
            let new = scenario.create().state().content.clone();
            let sound = go(&scenario, &new, &steps, None);
            assert_eq!(sound.errors, 0);
            for call in [Call::Read, Call::Write, Call::Flush] {
                for nth in 0..sound.calls[call as usize] {
                    for lasts in [false, true] {
                        let fault = Fault { call, nth, lasts };
                        let _about = About(format!(
                            "seed {seed}, round {round}, {}, {fault:?}: {steps:?}",
                            scenario.name
                        ));
                        let outcome = go(&scenario, &new, &steps, Some(fault));
                        let qemu = r.one_in(QEMU_SHARE).then_some(&*path);
                        let content = outcome.disk.state().without_cache(&new);
                        judge(content, &outcome.guest, &scenario, qemu);
                        runs += 1;
                        struck += u64::from(outcome.disk.state().struck);
                        told += u64::from(outcome.errors > 0);
                    }
                }
            }
        }
    }
    say(format_args!("{runs} runs, {struck} met the failure, {told} of them said so, seed {seed}"));
    assert!(runs > 500 && struck > runs / 2 && told > struck / 2);
}

/// Where the mark of late refcounts was cleared, and the flush after that failed, what was written next
/// relied on the mark.
#[test]
fn nothing_is_written_after_a_flush_of_closing_has_failed() {
    let scenario = Scenario { lazy: true, ..PLAIN };
    let mut met = 0;
    for nth in 0.. {
        let disk = scenario.create();
        let image = scenario.open(&disk, true).unwrap();
        image.write_slice(&[1; 5000], 0, ReqFlags::NONE).unwrap();
        image.flush().unwrap();
        let fault = Fault { call: Call::Flush, nth, lasts: false };
        (disk.state().fault, disk.state().calls) = (Some(fault), [0; 3]);
        let closed = image.driver().close();
        if !disk.state().struck {
            closed.unwrap();
            break;
        }
        assert!(closed.is_err(), "flush {nth}");
        let before = disk.state().content.clone();
        assert!(image.write_slice(&[2; 5000], 500_000, ReqFlags::NONE).is_err(), "flush {nth}");
        assert!(image.flush().is_err(), "flush {nth}");
        assert!(disk.state().content == before, "something was written after flush {nth}");
        met += 1;
    }
    assert!(met > 2, "{met} flushes");
}

/// The header says the new size, or does not: one that went on with the other would contradict the disk.
#[test]
fn a_resize_whose_end_could_not_be_written_is_the_end_of_writing() {
    let scenario = Scenario { weights: [1; 7], ..PLAIN };
    let new = scenario.create().state().content.clone();
    for size in [scenario.sectors * 512, 100 * 512] {
        let mut uncertain = 0;
        for call in [Call::Write, Call::Flush] {
            for nth in 0.. {
                let disk = Disk::new(new.clone());
                let image = scenario.open(&disk, true).unwrap();
                image.write_slice(&[1; 4096], 8192, NONE).unwrap();
                disk.state().fault = Some(Fault { call, nth, lasts: false });
                let resized = image.driver().resize(size, Prealloc::Off, true);
                disk.state().fault = None;
                if !disk.state().struck {
                    resized.unwrap();
                    break;
                }
                let on_disk = disk.state().content[0][24..32].to_vec();
                if on_disk != image.size().to_be_bytes() {
                    uncertain += 1;
                    image.write_slice(&[1; 512], 0, NONE).expect_err("it goes on");
                }
            }
        }
        assert!(uncertain > 0, "no failure met the header");
    }
}
