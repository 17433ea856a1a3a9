//! Repairs: what QEMU can mend is mended, to the same data, and the numbers say so.

use std::fs;
use std::time::Instant;

use super::common::*;
use super::damage::{damage, same};
use super::judge::{ours, qemu, status};
use super::making::make;
use qblk::block::Repair;

/// Whether the refcount table names a block far behind the end of the file.
fn names_blocks_far_out(path: &std::path::Path) -> bool {
    let len = fs::metadata(path).unwrap().len();
    let (at, cluster) = (peek_u64(path, 48), 1u64 << peek_u32(path, 20));
    let entry = |i: u64| if at + 8 * i + 8 <= len { peek_u64(path, at + 8 * i) } else { 0 };
    (0..cluster / 8).map(entry).any(|e| e > len + (1 << 26))
}

#[test]
fn what_qemu_can_mend_is_mended_to_the_same_data() {
    let seed = seed("repair");
    let mut r = Rng::new(seed);
    let dir = Tmp::in_memory("repair");
    let until = deadline(30);
    let (mut tried, mut clean, mut marks) = (0, 0, 0);
    let [a, b] = [dir.join("by-qemu"), dir.join("by-us")];
    while Instant::now() < until || tried < 20 {
        let made = make(&mut r, dir.path(), "image");
        if made.both {
            // QEMU 10 writes the header anew for the bitmaps, before it knows of the snapshots: they are lost.
            continue;
        }
        for i in 0..20 {
            let repair = if r.one_in(4) { Repair::Leaks } else { Repair::All };
            fs::copy(&made.path, &a).unwrap();
            let mut about = format!("seed {seed}, {}, {repair:?}", made.what);
            for _ in 0..if i == 0 { 0 } else { 1 + r.below(3) } {
                about += &format!("; {}", damage(&mut r, &made, &a));
            }
            if names_blocks_far_out(&a) {
                // QEMU makes the file as long as that, and then counts for hours.
                continue;
            }
            // Whoever found it to be damaged said so in its header.
            let marked = peek_u32(&a, 4) == 3 && r.one_in(2);
            if marked {
                poke(&a, 72, &(peek_u64(&a, 72) | 2).to_be_bytes());
                about += "; marked as corrupt";
            }
            fs::copy(&a, &b).unwrap();
            let (_, before, told) = qemu(&a, Repair::Nothing);
            if told.contains("Could not open") {
                continue;
            }
            let (code, want, told) = qemu(&a, repair);
            let found = ours(&b, repair);
            let about =
                format!("{about}\n{before:?}\nQEMU's repair: {told}\n{want:?}\nours: {found:?}");
            // It is not worse than QEMU's.
            let left = status(&found);
            let worse = match code {
                Some(0) => left != 0,
                Some(3) => !matches!(left, 0 | 3),
                Some(2) => left == 1,
                _ => false,
            };
            assert!(!worse, "QEMU's status {code:?}, ours {left}: {about}");
            // The mark stays as long as anything but leaks is left.
            let stays = found.is_err() || matches!(left, 1 | 2);
            let is_marked = peek_u64(&b, 72) & 2 != 0;
            assert!(!marked || is_marked == stays, "left {left}, marked {is_marked}: {about}");
            marks += u32::from(marked && stays);
            // What we say is left is what QEMU finds.
            let (code, then, told) = qemu(&b, Repair::Nothing);
            if told.contains("Cannot allocate memory") {
                // An offset above 2^63 makes it count clusters that no memory is enough for.
                continue;
            }
            if let Ok(found) = &found
                && found.check_errors == 0
            {
                assert_eq!(code, Some(left), "{about}\nafterwards {told}");
                let mut found = *found;
                (found.corruptions_fixed, found.leaks_fixed) = (0, 0);
                same(&found, &then, &format!("{about}\nafterwards {told}"));
            }
            tried += 1;
            if left != 0 || qemu(&a, Repair::Nothing).0 != Some(0) {
                continue;
            }
            clean += 1;
            let bits = peek_u64(&b, 72) & 3;
            assert!(peek_u32(&b, 4) == 2 || bits == 0, "marks are left: {about}");
            let out = run("qemu-img", &[&"compare", &"-f", &"qcow2", &"-F", &"qcow2", &a, &b]);
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            // (What points past the end of a data file can not be read, by either.)
            assert!(out.status.code() != Some(1), "{text}: {about}");
        }
        let _ = fs::remove_file(dir.join("image.data"));
    }
    say(format_args!(
        "{tried} images repaired, {clean} of them wholly, {marks} stay marked, seed {seed}"
    ));
}
