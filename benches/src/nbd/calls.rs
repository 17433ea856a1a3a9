//! System calls of a request, counted by `strace -c -f`. Two runs of different length are counted and
//! compared, so that what a process does once does not count.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::blast::{self, Load, Until};
use super::servers::{Launch, Running};
use super::{Guard, output, with_us};
use crate::oracle::at;
use crate::qemu::missing;
use crate::work::Res;

/// Calls by name.
type Calls = BTreeMap<String, f64>;

/// Requests of the shorter run; the longer one has three times as many.
const OPS: u64 = 2048;

/// Calls of a server for each of its requests of 4 KiB, `depth` of them under way on a connection.
pub fn of_server(launch: &Launch, depth: usize) -> Res<Calls> {
    let load = Load { block: 4096, depth, connections: 1, write: false };
    let count = |ops| {
        let server = launch.start()?;
        let table = launch.dir.join("strace.txt");
        let strace = attach(&server, &table)?;
        blast::run(&server.socket, &load, Until::Ops(ops)).map_err(|e| server.explain(e))?;
        // strace ends with what it looks at.
        drop(server);
        ended(strace)?;
        parse(&table)
    };
    difference(count(OPS)?, count(3 * OPS)?)
}

/// The same of our client, in a process of its own.
pub fn of_client(server: &Running, dir: &Path, threads: usize) -> Res<Calls> {
    let own = std::env::current_exe().map_err(|e| format!("the bench's own program: {e}"))?;
    let table = dir.join("strace.txt");
    let count = |ops: u64| {
        let mut c = Command::new("strace");
        c.args(["-c", "-f", "-qq", "-o"]).arg(&table).arg(&own);
        c.args(["--nbd-client", &server.uri(), &threads.to_string(), &ops.to_string()]);
        output(&mut c).map_err(|e| server.explain(e))?;
        parse(&table)
    };
    difference(count(OPS)?, count(3 * OPS)?)
}

fn difference(short: Calls, mut long: Calls) -> Res<Calls> {
    for (name, n) in &mut long {
        *n = (*n - short.get(name).unwrap_or(&0.0)) / (2 * OPS) as f64;
    }
    match long.values().sum::<f64>() {
        sum if sum > 0.0 => Ok(long),
        _ => Err("strace counted nothing".into()),
    }
}

/// Have strace count the calls of a server from now on.
fn attach(server: &Running, table: &Path) -> Res<Guard> {
    let _ = std::fs::remove_file(table);
    let pid = server.pid().to_string();
    let mut c = Command::new("strace");
    c.args(["-c", "-f", "-qq", "-p", &pid, "-o"]).arg(table);
    let child = with_us(&mut c)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| missing("strace", &e))?;
    let mut strace = Guard(child);
    let begun = Instant::now();
    // All threads are looked at when the first is seen to be.
    while !traced(&pid) {
        if begun.elapsed() > Duration::from_secs(5) || matches!(strace.0.try_wait(), Ok(Some(_))) {
            return Err("strace may not look into a process: be root, or allow ptrace".into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(strace)
}

fn traced(pid: &str) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let statuses: Vec<String> = tasks
        .map(|t| std::fs::read_to_string(t.path().join("status")).unwrap_or_default())
        .collect();
    !statuses.is_empty()
        && statuses.iter().all(|s| {
            s.lines().any(|l| l.strip_prefix("TracerPid:").is_some_and(|p| p.trim() != "0"))
        })
}

fn ended(mut strace: Guard) -> Res<()> {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(10) {
        if let Ok(Some(_)) = strace.0.try_wait() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err("strace does not end".into())
}

/// "% time seconds usecs/call calls errors syscall", a line for each name.
fn parse(table: &Path) -> Res<Calls> {
    let text = at(table, std::fs::read_to_string(table))?;
    let mut calls = Calls::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [_, _, _, n, .., name] = words[..]
            && let Ok(n) = n.parse::<f64>()
            && name != "total"
        {
            calls.insert(name.to_owned(), n);
        }
    }
    Ok(calls)
}

/// All together.
pub fn sum(calls: &Calls) -> f64 {
    calls.values().sum()
}

/// "1.00 recvfrom, 0.12 sendmsg": those that matter.
pub fn show(calls: &Calls) -> String {
    let mut all: Vec<_> = calls.iter().filter(|c| *c.1 >= 0.005).collect();
    all.sort_by(|a, b| b.1.total_cmp(a.1));
    all.iter().map(|(name, n)| format!("{n:.2} {name}")).collect::<Vec<_>>().join(", ")
}
