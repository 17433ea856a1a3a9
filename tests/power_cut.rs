//! What a power cut leaves behind: every state of the file that one could leave must be an image
//! without corruption that holds everything that was flushed.
//!
//! A device under the format keeps every write and flush. Then, for every moment of the run, files are
//! made of what was written before the last flush that had ended by then, and of all, none, and random
//! choices of the writes since, some of them torn in the middle: that is what a disk with a volatile
//! cache may have. Each is checked (leaks are allowed), and each byte must read as it was at the last
//! flush of the guest's that had ended, or as something written since.

mod common;

use common::disk::{Disk, Epochs, Files, Left};
use common::workload::{About, Guest, PLAIN, Scenario, judge, read_all, scenarios, take};
use common::*;
use qblk::block::{CheckReport, Progress, Repair};
use qblk::format::qcow2::check;

/// One of so many states is looked at by qemu-img as well.
const QEMU_SHARE: u64 = 40;

/// The state at some moment: operations on the file so far, and what the guest may count on.
struct Moment {
    ops: usize,
    guest: usize,
}

struct Run {
    epochs: Epochs,
    guests: Vec<Guest>,
    moments: Vec<Moment>,
}

fn run_through(r: &mut Rng, scenario: &Scenario, steps: usize) -> Run {
    let disk = scenario.create();
    // The image is made by what was done; what its data file holds was there before.
    let base = [Vec::new(), disk.state().content[1].clone()];
    let image = scenario.open(&disk, true).unwrap();
    let mut guest = scenario.guest();
    let (mut guests, mut moments) = (vec![guest.clone()], Vec::new());
    let mut last = disk.state().ops.len();
    for step in scenario.steps(r, steps) {
        let mut during = None;
        take(&image, step, &mut guest, &mut |g| during = Some(g.clone()))
            .unwrap_or_else(|e| panic!("{}: {step:?}: {e}", scenario.name));
        let ops = disk.state().ops.len();
        // In the middle of a step the guest may count on what it could before it.
        guests.extend(during);
        let middle = guests.len() - 1;
        moments.extend((last + 1..ops).map(|ops| Moment { ops, guest: middle }));
        guests.push(guest.clone());
        moments.push(Moment { ops, guest: middle + 1 });
        last = ops;
    }
    // And while it is closed.
    image.driver().close().unwrap_or_else(|e| panic!("{}: closing: {e}", scenario.name));
    let ops = disk.state().ops.len();
    let before = guests.len() - 1;
    moments.extend((last + 1..ops).map(|ops| Moment { ops, guest: before }));
    guest.flushed();
    guests.push(guest);
    moments.push(Moment { ops, guest: before + 1 });
    let epochs = Epochs::new(std::mem::take(&mut disk.state().ops), base);
    Run { epochs, guests, moments }
}

#[test]
fn every_state_that_a_power_cut_can_leave_is_sound_and_holds_what_was_flushed() {
    let seed = seed("power_cut");
    let mut r = Rng::new(seed);
    let dir = Tmp::in_memory("power-cut");
    let (path, mut tried, mut seen) = (dir.join("cut.qcow2"), 0u64, 0u64);
    // What images say they are backed by; here nobody reads it.
    std::fs::write(dir.join("below"), [0; 512]).unwrap();
    let until = deadline(30);
    let mut round = 0;
    while round == 0 || std::time::Instant::now() < until {
        round += 1;
        for scenario in scenarios() {
            let steps = 30;
            let mut run = run_through(&mut r, &scenario, steps);
            for moment in &run.moments {
                for left in [Left::All, Left::Nothing, Left::Some, Left::Some] {
                    let content = run.epochs.cut(&mut r, moment.ops, left);
                    let guest = &run.guests[moment.guest];
                    let qemu = r.one_in(QEMU_SHARE);
                    let _about = About(format!(
                        "seed {seed}, round {round}, {}, after {} operations, {left:?} left",
                        scenario.name, moment.ops
                    ));
                    judge(content, guest, &scenario, qemu.then_some(&*path));
                    tried += 1;
                    seen += u64::from(qemu);
                }
            }
        }
    }
    say(format_args!(
        "{tried} states of a cut-off disk tried, {seen} by qemu-img as well, seed {seed}"
    ));
    assert!(tried > 5000 && seen > 50);
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

/// Something that is wrong with an image, with refcounts of 16 bits.
struct Harm {
    what: &'static str,
    /// It can be read as it is.
    readable: bool,
    work: fn(&mut Rng, &mut Vec<u8>),
}

const HARMS: [Harm; 5] = [
    Harm { what: "as it was left", readable: true, work: |_, _| {} },
    Harm {
        what: "no refcounts",
        readable: true,
        work: |_, image| {
            let table = word(image, 48) as usize;
            image[table..table + 8].fill(0);
        },
    },
    Harm {
        what: "refcounts that are too large",
        readable: true,
        work: |r, image| {
            for (host, _) in data(image) {
                let more = r.below(3) as u16;
                count(image, host, |n| n + more);
            }
        },
    },
    Harm {
        what: "flags of all kinds",
        readable: true,
        work: |r, image| {
            for (_, at) in data(image) {
                let flip = if r.one_in(2) { COPIED } else { 0 };
                let entry = word(image, at as u64) ^ flip;
                image[at..at + 8].copy_from_slice(&entry.to_be_bytes());
            }
            image[79] |= 2;
        },
    },
    Harm {
        what: "zeroes that are askew, and counted",
        readable: false,
        work: |_, image| {
            let all = data(image);
            let cluster = 1 << word32(image, 20);
            let (table, host) = (all[0].1 & !(cluster as usize - 1), all[0].0);
            let at = (table..).step_by(8).find(|at| word(image, *at as u64) == 0).unwrap();
            image[at..at + 8].copy_from_slice(&((host + 512) | 1).to_be_bytes());
            count(image, host, |n| n + 1);
            count(image, host + cluster, |n| n + 1);
        },
    },
];

fn word(image: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(image[at as usize..at as usize + 8].try_into().unwrap())
}

fn word32(image: &[u8], at: u64) -> u64 {
    word(image, at) >> 32
}

/// Clusters with data of the active image, and where the entries lie that name them.
fn data(image: &[u8]) -> Vec<(u64, usize)> {
    let mut all = Vec::new();
    for i in 0..word32(image, 36) {
        let table = word(image, word(image, 40) + 8 * i) & OFFSET;
        let entries = if table == 0 { 0 } else { (1 << word32(image, 20)) / 8 };
        for at in (0..entries).map(|i| table + 8 * i) {
            let entry = word(image, at);
            if entry & OFFSET != 0 && entry & 1 == 0 {
                all.push((entry & OFFSET, at as usize));
            }
        }
    }
    all
}

fn count(image: &mut [u8], host: u64, change: impl Fn(u16) -> u16) {
    let bits = word32(image, 20);
    let per_block = 1 << (bits - 1);
    let cluster = host >> bits;
    let block = word(image, word(image, 48) + 8 * (cluster / per_block));
    let at = (block + 2 * (cluster % per_block)) as usize;
    let old = u16::from_be_bytes([image[at], image[at + 1]]);
    image[at..at + 2].copy_from_slice(&change(old).to_be_bytes());
}

fn repair(content: Files, how: Repair) -> (Disk, CheckReport) {
    let disk = Disk::new(content);
    let report = check::run(&disk.device(), how, Progress::NONE).unwrap_or_else(|e| panic!("{e}"));
    (disk, report)
}

#[test]
fn a_repair_that_is_cut_off_makes_nothing_worse_and_can_be_done_again() {
    let seed = seed("power_cut_repair");
    let mut r = Rng::new(seed);
    let dir = Tmp::in_memory("power-cut-repair");
    let (path, mut tried, mut mended) = (dir.join("cut.qcow2"), 0u64, 0u64);
    let all = [4, 1, 1, 1, 1, 2, 1];
    let scenarios = [
        Scenario { weights: all, ..PLAIN },
        Scenario { weights: all, cluster_bits: 9, ..PLAIN },
        Scenario { weights: all, snapshots: 3, ..PLAIN },
        Scenario { weights: all, lazy: true, ..PLAIN },
    ];
    let until = deadline(15);
    let mut round = 0;
    while round == 0 || std::time::Instant::now() < until {
        round += 1;
        for scenario in &scenarios {
            let disk = scenario.create();
            let image = scenario.open(&disk, true).unwrap();
            let mut guest = scenario.guest();
            let mut steps = scenario.steps(&mut r, 20);
            steps.push(common::workload::Step::Write(0, 8, 7, qblk::block::ReqFlags::NONE));
            for step in steps {
                take(&image, step, &mut guest, &mut |_| {}).unwrap();
            }
            image.flush().unwrap();
            guest.flushed();
            // Late refcounts are left so.
            if !scenario.lazy {
                image.driver().close().unwrap();
            }
            let sound = disk.state().content.clone();
            for harm in HARMS.iter().filter(|h| !scenario.lazy || h.what == HARMS[0].what) {
                let mut bad = sound.clone();
                (harm.work)(&mut r, &mut bad[0]);
                let (_, before) = repair(bad.clone(), Repair::Nothing);
                let (disk, report) = repair(bad.clone(), Repair::All);
                let clean = report.corruptions + report.leaks + report.check_errors == 0;
                assert!(clean, "{}: {report:?}", harm.what);
                mended += u64::from(report.changed);
                let ops = std::mem::take(&mut disk.state().ops);
                let mut epochs = Epochs::new(ops.clone(), bad);
                for count in 0..=ops.len() {
                    for left in [Left::All, Left::Nothing, Left::Some, Left::Some] {
                        let _about = About(format!(
                            "seed {seed}, round {round}, {}, {scenario:?}, after {count} operations of {}, \
                             {left:?} left",
                            harm.what,
                            ops.len()
                        ));
                        let content = epochs.cut(&mut r, count, left);
                        if harm.readable {
                            let disk = Disk::new(content.clone());
                            let image = scenario.open(&disk, false).unwrap();
                            guest.judge(&read_all(&image).unwrap()).unwrap();
                        }
                        let (_, found) = repair(content.clone(), Repair::Nothing);
                        assert!(
                            found.corruptions <= before.corruptions
                                && found.check_errors <= before.check_errors,
                            "{before:?} has become {found:?}"
                        );
                        let (disk, report) = repair(content, Repair::All);
                        assert!(report.corruptions + report.check_errors == 0, "{report:?}");
                        let content = disk.state().content.clone();
                        judge(content, &guest, scenario, r.one_in(QEMU_SHARE).then_some(&*path));
                        tried += 1;
                    }
                }
            }
        }
    }
    say(format_args!("{tried} states of {mended} repairs that were cut off tried, seed {seed}"));
    assert!(tried > 200 && mended >= 8);
}
