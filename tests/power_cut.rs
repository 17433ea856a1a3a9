//! What a power cut leaves behind: every state of the file that one could leave must be an image
//! without corruption that holds everything that was flushed.
//!
//! A device under the format keeps every write and flush. Then, for every moment of the run, files are
//! made of what was written before the last flush that had ended by then, and of all, none, and random
//! choices of the writes since, some of them torn in the middle: that is what a disk with a volatile
//! cache may have. Each is checked (leaks are allowed), and each byte must read as it was at the last
//! flush of the guest's that had ended, or as something written since.

mod common;

use common::disk::{Epochs, Left};
use common::workload::{About, Guest, Scenario, judge, scenarios, take};
use common::*;

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
