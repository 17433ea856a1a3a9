//! qemu-img, as a process: `qemu-img bench`, whose own clock is used, and the commands that make
//! images.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::load::{Load, children};
use crate::work::{Pattern, Res, Sample, Work};

/// How `qemu-img bench` does its I/O.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct How {
    /// `-i io_uring`; else its threads.
    pub uring: bool,
    /// Requests at once.
    pub depth: u32,
}

impl How {
    /// Short, for a table: t1, t16, u1, u16.
    pub fn short(self) -> String {
        format!("{}{}", if self.uring { 'u' } else { 't' }, self.depth)
    }
}

/// Run a command to its end; what it printed.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Res<String> {
    let out = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| missing(program, &e))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        return Err(format!("{program} failed: {}", said.trim()));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Programs that are measured beside, and the packages that have them.
const PACKAGES: [(&str, &str); 4] =
    [("nbdkit", "nbdkit"), ("nbdcopy", "libnbd-bin"), ("fio", "fio"), ("strace", "strace")];

/// Why a program did not start.
pub fn missing(program: &str, e: &std::io::Error) -> String {
    let package = match program {
        _ if program.starts_with("qemu") => Some("qemu-utils"),
        _ => PACKAGES.iter().find(|p| p.0 == program).map(|p| p.1),
    };
    match package {
        Some(package) if e.kind() == std::io::ErrorKind::NotFound => format!(
            "{program} is missing, and the bench measures beside it: apt-get install {package} (as root)"
        ),
        _ => format!("{program}: {e}"),
    }
}

/// Feed a script to `qemu-io` on a qcow2 image.
pub fn io_script(image: &Path, script: &str) -> Res<()> {
    use std::io::Write;
    let mut child = Command::new("qemu-io")
        .args(["-f", "qcow2", "-t", "writeback"])
        .arg(image)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| missing("qemu-io", &e))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).map_err(|e| format!("qemu-io: {e}"))?;
    }
    let out = child.wait_with_output().map_err(|e| format!("qemu-io: {e}"))?;
    match out.status.success() {
        true => Ok(()),
        false => Err(format!("qemu-io failed: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

/// One run of `count` requests. Its own time is what counts, so that starting the program does not.
pub fn bench(image: &Path, work: &Work, how: How, count: u64) -> Res<Sample> {
    let step = match work.pattern {
        Pattern::Sequential => work.block as u64,
        Pattern::Random => crate::work::golden_step(work.size, work.block as u64),
        Pattern::Walk(step) => step,
        // Steps end at 2 GiB: as many pieces as fit, an odd number to meet them all.
        Pattern::Pieces(piece) => ((i32::MAX as u64 / piece - 1) | 1) * piece,
    };
    let mut cmd = Command::new("qemu-img");
    cmd.args(["bench", "-f", "qcow2", "-t", "writeback"]);
    cmd.args(["-i", if how.uring { "io_uring" } else { "threads" }]);
    cmd.args(["-c", &count.to_string(), "-d", &how.depth.to_string()]);
    cmd.args(["-s", &work.block.to_string(), "-S", &step.to_string()]);
    if work.write {
        cmd.arg("-w");
    }
    cmd.arg(image).stdin(Stdio::null());
    let (before, start) = (children(), Load::now());
    let out = cmd.output().map_err(|e| missing("qemu-img", &e))?;
    let used = start.used();
    let cpu = children() - before;
    let said = String::from_utf8_lossy(&out.stdout);
    let seconds = said.lines().find_map(|l| {
        l.strip_prefix("Run completed in ")?.strip_suffix(" seconds.")?.parse::<f64>().ok()
    });
    match seconds {
        Some(seconds) if out.status.success() => Ok(Sample {
            value: count as f64 / seconds.max(1e-3),
            cpu_us: cpu / count as f64 * 1e6,
            foreign: used.foreign,
        }),
        _ => Err(format!("qemu-img bench failed: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

/// How many requests fill `seconds`, found by a short run.
pub fn calibrate(image: &Path, work: &Work, how: How, seconds: f64) -> Res<u64> {
    let mut count = if work.block > 65536 { 64 } else { 512 };
    loop {
        let rate = bench(image, work, how, count)?.value;
        let took = count as f64 / rate;
        if took >= 0.05_f64.min(seconds / 2.0) {
            return Ok(((rate * seconds) as u64).max(count));
        }
        count *= 8;
    }
}
