//! Images damaged at random: the same is found as QEMU finds.

use std::fs;
use std::path::Path;
use std::time::Instant;

use super::common::*;
use super::judge::{ours, qemu, status};
use super::making::{Made, make};
use qblk::block::{CheckReport, Repair};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// 8 bytes of a file that may have been cut.
fn word(path: &Path, at: u64) -> u64 {
    let there = at + 8 <= fs::metadata(path).unwrap().len();
    if there { peek_u64(path, at) } else { 0 }
}

/// Where entries of 8 bytes lie: of L1 and L2 tables, and of the refcount table.
fn entries(path: &Path) -> (Vec<u64>, Vec<u64>, Vec<u64>) {
    let cluster = 1u64 << peek_u32(path, 20);
    let l1: Vec<u64> =
        (0..u64::from(peek_u32(path, 36))).map(|i| peek_u64(path, 40) + 8 * i).collect();
    let mut l2 = Vec::new();
    for at in &l1 {
        let table = word(path, *at) & OFFSET;
        if table != 0 {
            l2.extend((0..cluster / 8).map(|i| table + 8 * i));
        }
    }
    let reftable = peek_u64(path, 48);
    (l1, l2, (0..cluster / 8).map(|i| reftable + 8 * i).collect())
}

/// Change something in the image; what was changed.
pub fn damage(r: &mut Rng, made: &Made, path: &Path) -> String {
    let (l1, l2, reftable) = entries(path);
    let len = fs::metadata(path).unwrap().len();
    let used = |r: &mut Rng, all: &[u64]| {
        let used: Vec<u64> = all.iter().copied().filter(|at| word(path, *at) != 0).collect();
        if used.is_empty() || r.one_in(6) { r.pick(all) } else { r.pick(&used) }
    };
    let new_value = |r: &mut Rng, old: u64| match r.below(9) {
        0 => old ^ (1 << r.below(64)),
        1 => old ^ (1 << 63),
        2 => old ^ (1 << 62),
        3 => old ^ 1,
        4 => 0,
        5 => (r.below(len / made.cluster + 3) * made.cluster) | (old & (1 << 63)),
        6 => old ^ (made.cluster >> 1).max(512),
        7 => r.next(),
        _ => (old & !OFFSET) | (r.below(len) & !511),
    };
    match r.below(9) {
        which @ 0..=4 => {
            let all = [&l1, &l2, &l2, &l2, &reftable][which as usize];
            if all.is_empty() {
                return "nothing".into();
            }
            let at = used(r, all);
            if at + 8 > len {
                return "nothing".into();
            }
            let old = word(path, at);
            let new = new_value(r, old);
            poke(path, at, &new.to_be_bytes());
            format!(
                "{}: {old:#x} -> {new:#x} at {at:#x}",
                ["L1", "L2", "L2", "L2", "reftable"][which as usize]
            )
        }
        5 | 6 => {
            let block = word(path, used(r, &reftable)) & !(made.cluster - 1);
            if block == 0 {
                return "nothing".into();
            }
            let most = if r.one_in(2) { 64 } else { made.cluster };
            let at = (block + r.below(most)) % len;
            let value = r.pick(&[0u8, 1, 2, 3, 255, 7]);
            poke(path, at, &[value]);
            format!("refcount byte {value} at {at:#x}")
        }
        7 => {
            // The snapshot table.
            let at = peek_u64(path, 64) + r.below(80);
            if peek_u32(path, 60) == 0 || at >= len {
                return "nothing".into();
            }
            let value = r.pick(&[0u8, 1, 2, 255]);
            poke(path, at, &[value]);
            format!("snapshot table byte {value} at {at:#x}")
        }
        _ => {
            let to = len - r.below(len.min(3 * made.cluster));
            fs::OpenOptions::new().write(true).open(path).unwrap().set_len(to).unwrap();
            format!("cut to {to:#x}")
        }
    }
}

/// What QEMU and we find must be the same.
pub fn same(ours: &CheckReport, qemu: &CheckReport, about: &str) {
    // Where tables overlap QEMU counts from the beginning of each what we count from part to part.
    let mut ours = CheckReport { changed: false, ..*ours };
    if about.contains("L1") {
        ours.fragmented_clusters = qemu.fragmented_clusters;
    }
    assert_eq!(ours, *qemu, "ours, QEMU's: {about}");
}

#[test]
fn the_same_is_found_as_qemu_finds() {
    let seed = seed("check");
    let mut r = Rng::new(seed);
    let dir = Tmp::in_memory("check");
    let until = deadline(30);
    let (mut tried, mut gave_up) = (0, 0);
    while Instant::now() < until || tried < 20 {
        let made = make(&mut r, dir.path(), "image");
        let copy = dir.join("copy");
        for i in 0..20 {
            fs::copy(&made.path, &copy).unwrap();
            let mut about = format!("seed {seed}, {}", made.what);
            // Once as it is.
            for _ in 0..if i == 0 { 0 } else { 1 + r.below(3) } {
                about += &format!("; {}", damage(&mut r, &made, &copy));
            }
            let (code, want, told) = qemu(&copy, Repair::Nothing);
            let found = ours(&copy, Repair::Nothing);
            // (An offset above 2^63 makes it count clusters that no memory is enough for.)
            if told.contains("Could not open") || told.contains("Cannot allocate memory") {
                // What can be mended is no reason for us to refuse.
                gave_up += 1;
                continue;
            }
            assert_eq!(Some(status(&found)), code, "{about}: {found:?}\n{told}");
            match found {
                Ok(found) if code != Some(1) => same(&found, &want, &format!("{about}\n{told}")),
                _ => gave_up += 1,
            }
            tried += 1;
        }
        let _ = fs::remove_file(dir.join("image.data"));
    }
    say(format_args!("{tried} images checked, QEMU gave up on {gave_up}, seed {seed}"));
}
