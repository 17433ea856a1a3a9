//! fio, by its nbd engine, and nbdcopy: what others load a server with. Both stand on libnbd.

use std::ffi::OsStr;
use std::process::Command;
use std::time::Instant;

use super::{Done, output};
use crate::work::Res;

/// A job for fio.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// fio's word: randread, randwrite, read.
    pub kind: &'static str,
    /// Bytes of a request.
    pub block: usize,
    /// Requests under way on a connection.
    pub depth: usize,
    /// Connections, each with a process of fio's.
    pub connections: usize,
}

/// Run fio for so many seconds on an export of `size` bytes: requests a second.
pub fn run(uri: &str, size: u64, job: &Job, seconds: f64) -> Res<Done> {
    let Job { kind, block, depth, connections } = *job;
    let share = size / connections as u64;
    let share = share - share % block as u64;
    let mut c = Command::new("fio");
    c.args(["--name=bench", "--ioengine=nbd", "--output-format=json", "--group_reporting"]);
    c.arg(format!("--uri={uri}")).arg(format!("--rw={kind}"));
    c.arg(format!("--bs={block}")).arg(format!("--iodepth={depth}"));
    c.arg(format!("--numjobs={connections}"));
    c.args(["--time_based", "--norandommap"]);
    c.arg(format!("--runtime={}ms", (seconds * 1e3).ceil()));
    if kind == "read" {
        // Each connection has a part of its own, so that none reads what another has just read.
        c.arg(format!("--size={share}")).arg(format!("--offset_increment={share}"));
    }
    let said = output(&mut c)?;
    let write = kind.ends_with("write");
    let get = |key| number(&said, if write { "write" } else { "read" }, key);
    let rate = get("iops").ok_or("fio said nothing of requests a second")?;
    let ops = get("total_ios").ok_or("fio said nothing of requests")?;
    match number(&said, "jobs", "error") {
        Some(0.0) if ops > 0.0 => Ok(Done { rate, ops }),
        e => Err(format!("fio failed, error {e:?}")),
    }
}

/// The first number of that name in the first object or list of that name.
fn number(json: &str, object: &str, key: &str) -> Option<f64> {
    let inside = after(json, object)?.trim_start();
    let inside = inside.strip_prefix(['{', '['])?;
    let value = after(inside, key)?.trim_start();
    value[..value.find([',', '\n', '}'])?].trim().parse().ok()
}

/// What follows `"name" :`.
fn after<'a>(json: &'a str, name: &str) -> Option<&'a str> {
    let quoted = format!("\"{name}\"");
    json.match_indices(&quoted)
        .find_map(|(at, _)| json[at + quoted.len()..].trim_start().strip_prefix(':'))
}

/// nbdcopy, one end of it a server; bytes a second, and MiB as requests.
pub fn copy(
    from: impl AsRef<OsStr>,
    to: impl AsRef<OsStr>,
    size: u64,
    connections: usize,
) -> Res<Done> {
    let mut c = Command::new("nbdcopy");
    c.arg(format!("--connections={connections}")).arg(from).arg(to);
    let begun = Instant::now();
    output(&mut c)?;
    let rate = size as f64 / begun.elapsed().as_secs_f64();
    Ok(Done { rate, ops: size as f64 / (1 << 20) as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_object() {
        let said = "fio: connected\n{ \"jobs\" : [ { \"error\" : 0, \"job options\" : {\"rw\" : \"read\" },\
                    \"read\" : { \"iops\" : 12.5, \"lat\" : { \"iops\" : 3 },\n\"total_ios\" : 7 },\
                    \"write\" : { \"iops\" : 99,\n\"total_ios\" : 8 } } ] }";
        assert_eq!(number(said, "jobs", "error"), Some(0.0));
        assert_eq!(number(said, "read", "iops"), Some(12.5));
        assert_eq!(number(said, "read", "total_ios"), Some(7.0));
        assert_eq!(number(said, "write", "total_ios"), Some(8.0));
        assert_eq!(number(said, "trim", "iops"), None);
    }
}
