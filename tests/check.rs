//! Checking and repairing, beside QEMU: the same numbers for images that were damaged at random, and
//! after a repair an image that QEMU finds sound.
//!
//! `QBLK_TEST_SEED` repeats a run (it is printed at the start), `QBLK_TEST_SECONDS` prolongs it.

mod common;
#[path = "check/damage.rs"]
mod damage;
#[path = "check/guards.rs"]
mod guards;
#[path = "check/hostile.rs"]
mod hostile;
#[path = "check/judge.rs"]
mod judge;
#[path = "check/lazy.rs"]
mod lazy;
#[path = "check/making.rs"]
mod making;
#[path = "check/repair.rs"]
mod repair;
#[path = "check/widths.rs"]
mod widths;
