//! A writer that is killed: the image has no corruption, and what was flushed is there.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::common::*;
use qblk::{Options, ReqFlags};

const BLOCK: u64 = 512;
const SIZE: u64 = 6 << 20;

/// What operation `seq` puts into a block; odd ones of every seven are zeroing.
fn content(seq: u64, block: u64) -> [u8; BLOCK as usize] {
    let mut out = [0; BLOCK as usize];
    if !zeroes(seq) {
        out.copy_from_slice(&Rng::new(seq << 32 | block).bytes(BLOCK as usize));
    }
    out
}

fn zeroes(seq: u64) -> bool {
    seq == 0 || seq % 7 == 3
}

/// The process that is killed. Not a test: it is started by one, with a path in the environment.
#[test]
#[ignore = "started by a_killed_writer_loses_nothing_that_was_flushed"]
fn writes_until_it_is_killed() {
    let Some(path) = std::env::var_os("QBLK_TEST_VICTIM") else { return };
    let mut rng = Rng::new(std::env::var("QBLK_TEST_VICTIM_SEED").unwrap().parse().unwrap());
    let image = open(Path::new(&path), RW);
    let mut say = std::io::stdout().lock();
    let mut size = SIZE;
    for seq in 1.. {
        let n = rng.pick(&[1, 1, 8, 100, 700]);
        let first = rng.below(SIZE / BLOCK - n);
        // Announced before it is done, a flush after.
        writeln!(say, "@ {seq} {first} {n}").unwrap();
        if zeroes(seq) {
            let flags = rng.pick(&[NONE, ReqFlags::MAY_TRIM]);
            image.zero(first * BLOCK, n * BLOCK, flags).unwrap();
        } else {
            let data: Vec<u8> = (first..first + n).flat_map(|b| content(seq, b)).collect();
            let flags = if rng.one_in(20) { ReqFlags::FUA } else { NONE };
            image.write_at(&data, first * BLOCK, flags).unwrap();
            if flags == ReqFlags::FUA {
                writeln!(say, "@ fua {seq}").unwrap();
            }
        }
        if rng.one_in(12) {
            image.flush().unwrap();
            writeln!(say, "@ flushed {seq}").unwrap();
        }
        if rng.one_in(40) {
            size += rng.below(3 << 20);
            image.resize(size, &Options::new(), false).unwrap();
        }
    }
}

#[test]
fn a_killed_writer_loses_nothing_that_was_flushed() {
    let mut rng = Rng::new(seed("killed"));
    for round in 0..20 {
        // On a disk as well as in memory: the time that a sync takes is part of it.
        let dir = if round % 4 == 0 { Tmp::new("killed") } else { Tmp::in_memory("killed") };
        let path = dir.join("image");
        let cluster = rng.pick(&["512", "512", "4096", "65536", "2097152"]);
        let compat = rng.pick(&["0.10", "1.1", "1.1"]);
        let mut pairs = vec![("cluster-size", cluster), ("compat", compat)];
        let mut base = vec![0; SIZE as usize];
        if rng.one_in(2) {
            base = rng.bytes(SIZE as usize);
            std::fs::write(dir.join("base"), &base).unwrap();
            pairs.extend([("backing-file", "base"), ("backing-fmt", "raw")]);
        }
        create(&path, "qcow2", SIZE, &pairs);
        let what = format!("round {round}: {pairs:?}");
        let (writes, flushed) = run_and_kill(&path, &mut rng);
        eprintln!("{what}: {} writes, flushed up to {flushed:?}", writes.len());

        check_no_corruption(&path);
        let image = open(&path, RW);
        assert!(image.size().unwrap() >= SIZE);
        let found = read_range(&image, 0, SIZE);
        judge(&found, &base, &writes, &flushed, &what);
        // Whoever comes next can go on with it.
        image.write_at(&base, 0, NONE).unwrap();
        image.close().unwrap();
        check_no_corruption(&path);
        let image = open(&path, RO);
        assert_same(&read_range(&image, 0, SIZE), &base, 0, &what);
    }
}

/// What the victim said: operations as (number, first block, blocks), and the number of the last
/// one that a flush covers, with those that were on stable storage by themselves.
type Said = (Vec<(u64, u64, u64)>, (u64, Vec<u64>));

fn run_and_kill(path: &Path, rng: &mut Rng) -> Said {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["killed::writes_until_it_is_killed", "--exact", "--ignored", "--nocapture"])
        .env("QBLK_TEST_VICTIM", path)
        .env("QBLK_TEST_VICTIM_SEED", rng.next().to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    let pid = child.id() as i32;
    let wait = Duration::from_millis(rng.range(20, 400));
    let (mut writes, mut flushed, mut fua) = (Vec::new(), 0, Vec::new());
    let mut killer = None;
    for line in out.split(b'\n') {
        let line = String::from_utf8(line.unwrap()).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |i: usize| words[i].parse::<u64>().unwrap();
        match words[..] {
            ["@", "flushed", _] => flushed = number(2),
            ["@", "fua", _] => fua.push(number(2)),
            ["@", _, _, _] => writes.push((number(1), number(2), number(3))),
            _ => {}
        }
        if killer.is_none() && !writes.is_empty() {
            killer = Some(std::thread::spawn(move || {
                std::thread::sleep(wait);
                // SAFETY: our own child, which is not waited for before this thread has ended.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }));
        }
    }
    killer.expect("the victim wrote nothing").join().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    (writes, (flushed, fua))
}

fn judge(
    found: &[u8],
    base: &[u8],
    writes: &[(u64, u64, u64)],
    flushed: &(u64, Vec<u64>),
    what: &str,
) {
    let mut touched: HashMap<u64, Vec<u64>> = HashMap::new();
    for (seq, first, n) in writes {
        for block in *first..first + n {
            touched.entry(block).or_default().push(*seq);
        }
    }
    for block in 0..SIZE / BLOCK {
        let at = (block * BLOCK) as usize;
        let is = &found[at..at + BLOCK as usize];
        let Some(all) = touched.get(&block) else {
            assert!(is == &base[at..at + BLOCK as usize], "{what}: block {block} was not written");
            continue;
        };
        // The last that was made stable, or anything later.
        let stable = all.iter().rposition(|s| *s <= flushed.0 || flushed.1.contains(s));
        let mut allowed: Vec<Vec<u8>> =
            all[stable.unwrap_or(0)..].iter().map(|s| content(*s, block).to_vec()).collect();
        if stable.is_none() {
            allowed.push(base[at..at + BLOCK as usize].to_vec());
        }
        assert!(
            allowed.iter().any(|a| a == is),
            "{what}: block {block}, written by {all:?}, flushed {flushed:?}: found {:02x?}",
            &is[..16]
        );
    }
}
