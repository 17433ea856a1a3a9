//! Who holds the locks on a file, as far as the system tells.
//!
//! /proc/locks lists every lock, and for OFD locks not whose they are; /proc/PID/fdinfo lists the locks
//! of each descriptor that we may look at. Both name a file by numbers that need not be those of
//! `stat` (on a union or a snapshotting file system), so the name is learnt from our own descriptor.
//!
//! All of it is for people who read a message: what cannot be read is left out, and it is bounded.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::lock::{NAMES, UNSHARED, USED, meaning};
use super::{How, Source, os_io, sys};
use crate::block::{Name, Result, quoted};

/// A byte that no protocol uses, locked for a moment to see by which numbers a lock shows us.
const MARK: u64 = i64::MAX as u64 - 1;
/// No longer than this is looked for who it is.
const PATIENCE: Duration = Duration::from_millis(500);

/// One lock byte of an image, and who has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// 100 + n: permission n is used; 200 + n: it is not shared.
    pub byte: u64,
    /// The permission, in words.
    pub permission: &'static str,
    /// It is used; otherwise it is not shared with others.
    pub used: bool,
    /// The process, if it can be seen from here.
    pub pid: Option<i32>,
    /// Its command line, its arguments separated by blanks; empty if it is not known.
    pub command: Vec<u8>,
}

/// A lock as /proc shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    file: String,
    pid: i32,
    start: u64,
    end: u64,
}

/// Who has locked which permission of the file `name`. Takes none of those locks itself.
pub fn holders(name: &Name) -> Result<Vec<Holder>> {
    let source = Source::fresh(name, How::default(), &|flags| {
        super::open_path(name.as_path(), false, flags)
    })?;
    let meta = source.file.metadata().map_err(|e| os_io("fstat", name, &e))?;
    let found = find(&source.file, (meta.dev(), meta.ino()), None);
    let mut all = Vec::new();
    for base in [USED, UNSHARED] {
        for byte in base..base + NAMES.len() as u64 {
            let Some((permission, used)) = meaning(byte) else { continue };
            for (_, pid) in found.iter().filter(|(l, _)| l.start <= byte && byte <= l.end) {
                let command = pid.map(command).unwrap_or_default();
                all.push(Holder { byte, permission, used, pid: *pid, command });
            }
        }
    }
    all.dedup();
    Ok(all)
}

/// Who has locked `byte` of the file, in words. `pid` is set where the system has told it.
pub(super) fn who(file: &File, id: (u64, u64), byte: u64, pid: Option<i32>) -> String {
    let mut pids: Vec<Option<i32>> = match pid {
        Some(pid) => vec![Some(pid)],
        None => find(file, id, Some(byte))
            .into_iter()
            .filter(|(l, _)| l.start <= byte && byte <= l.end)
            .map(|(_, pid)| pid)
            .collect(),
    };
    pids.sort_unstable();
    pids.dedup();
    // Those that are known first.
    pids.reverse();
    match pids.first() {
        None => "a process that has just let go of it or cannot be seen from here".into(),
        Some(None) => "a process that cannot be seen from here".into(),
        Some(Some(pid)) => {
            let this = *pid == std::process::id() as i32;
            let mut text = format!("{} {pid}", if this { "this process," } else { "process" });
            let command = command(*pid);
            if !command.is_empty() {
                text += &format!(" ({})", quoted(&command));
            }
            if pids.len() > 1 {
                text += &format!(" and {} more", pids.len() - 1);
            }
            text
        }
    }
}

/// The locks of others on the file, with the process where it can be seen. `known`: a byte that somebody is
/// known to have locked.
fn find(file: &File, id: (u64, u64), known: Option<u64>) -> Vec<(Line, Option<i32>)> {
    let Some(key) = key(file, id) else { return Vec::new() };
    let (all, is_whole) = list();
    let interesting =
        |l: &Line| l.file == key && l.end >= USED && l.start < UNSHARED + NAMES.len() as u64;
    let lines: Vec<Line> = all.lines().filter_map(parse).filter(interesting).collect();
    let mut owners: Vec<(Line, i32)> = Vec::new();
    let misses = known.is_some_and(|b| !lines.iter().any(|l| l.start <= b && b <= l.end));
    if misses || !is_whole || lines.iter().any(|l| l.pid <= 0) {
        owners = scan(&|l| interesting(l));
    }
    // A range that is listed n times has n holders, some of whom may not be seen.
    let mut unseen: BTreeMap<(u64, u64), usize> = BTreeMap::new();
    let mut found = Vec::new();
    for line in lines {
        if line.pid > 0 {
            found.push((line.clone(), Some(line.pid)));
        } else {
            *unseen.entry((line.start, line.end)).or_default() += 1;
        }
    }
    for (line, pid) in owners {
        let count = unseen.entry((line.start, line.end)).or_default();
        *count = count.saturating_sub(1);
        found.push((line, Some(pid)));
    }
    for ((start, end), count) in unseen {
        for _ in 0..count {
            found.push((Line { file: key.clone(), pid: -1, start, end }, None));
        }
    }
    found
}

/// What /proc/locks has. The kernel hands it out in pages, between which locks come and go and shift the
/// rest, so that a line may be missed or shown twice; so until two looks are alike: whether there were two.
fn list() -> (String, bool) {
    let look = || fs::read_to_string("/proc/locks").unwrap_or_default();
    let mut last = look();
    for _ in 0..10 {
        let next = look();
        if next == last {
            return (last, true);
        }
        last = next;
    }
    (last, false)
}

/// By which numbers locks on this file are listed.
fn key(file: &File, id: (u64, u64)) -> Option<String> {
    let marked = sys::lock_bytes(file, libc::F_RDLCK, MARK, 1).is_ok();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()));
    if marked {
        let _ = sys::lock_bytes(file, libc::F_UNLCK, MARK, 1);
    }
    let shown = info.ok()?;
    let mut locks = shown.lines().filter_map(|l| parse(l.strip_prefix("lock:")?));
    let from_stat = || {
        let (major, minor) = (libc::major(id.0), libc::minor(id.0));
        format!("{major:02x}:{minor:02x}:{}", id.1)
    };
    Some(locks.next().map_or_else(from_stat, |l| l.file))
}

/// Go through all descriptors of all processes that we may look at.
fn scan(wanted: &dyn Fn(&Line) -> bool) -> Vec<(Line, i32)> {
    let begun = Instant::now();
    let mut found = Vec::new();
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    for process in processes.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Ok(descriptors) = fs::read_dir(process.path().join("fdinfo")) else { continue };
        for descriptor in descriptors.flatten() {
            if begun.elapsed() > PATIENCE {
                return found;
            }
            let Ok(info) = fs::read_to_string(descriptor.path()) else { continue };
            let locks = info.lines().filter_map(|l| parse(l.strip_prefix("lock:")?));
            found.extend(locks.filter(|l| wanted(l)).map(|l| (l, pid)));
        }
    }
    found
}

/// Read a line such as `1: OFDLCK ADVISORY  READ -1 fe:00:10018474 100 101`.
fn parse(line: &str) -> Option<Line> {
    let mut words = line.split_whitespace().skip(1);
    let kind = words.next()?;
    // Who waits ("->") has nothing yet; flock() and leases are other worlds.
    if kind != "OFDLCK" && kind != "POSIX" {
        return None;
    }
    let pid = words.nth(2)?.parse().ok()?;
    let file = words.next()?.to_owned();
    let start = words.next()?.parse().ok()?;
    let end = match words.next()? {
        "EOF" => u64::MAX,
        end => end.parse().ok()?,
    };
    Some(Line { file, pid, start, end })
}

/// The command line of a process, its arguments separated by blanks; else its name in brackets.
fn command(pid: i32) -> Vec<u8> {
    let proc = Path::new("/proc").join(pid.to_string());
    let mut line = fs::read(proc.join("cmdline")).unwrap_or_default();
    while line.last() == Some(&0) {
        line.pop();
    }
    for byte in &mut line {
        if *byte == 0 {
            *byte = b' ';
        }
    }
    if line.is_empty()
        && let Ok(name) = fs::read_to_string(proc.join("comm"))
    {
        line = format!("[{}]", name.trim_end()).into_bytes();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_understood() {
        let line = |text| parse(text).map(|l| (l.file, l.pid, l.start, l.end));
        let ofd = line("7: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101");
        assert_eq!(ofd, Some(("fe:00:1234".into(), -1, 100, 101)));
        let posix = line("3: POSIX  ADVISORY  WRITE 77 08:01:9 0 EOF");
        assert_eq!(posix, Some(("08:01:9".into(), 77, 0, u64::MAX)));
        assert_eq!(line("3: -> POSIX  ADVISORY  WRITE 77 08:01:9 0 EOF"), None);
        assert_eq!(line("1: FLOCK  ADVISORY  WRITE 77 08:01:9 0 EOF"), None);
        assert_eq!(line("1: OFDLCK"), None);
        assert_eq!(line(""), None);
    }
}
