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
    feed(Command::new("qemu-io").args(["-f", "qcow2", "-t", "writeback"]).arg(image), script)
}

/// Run `qemu-io` with these commands.
fn feed(command: &mut Command, script: &str) -> Res<()> {
    use std::io::Write;
    let mut child = command
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

/// The key of images that are encrypted.
pub const KEY: &str = "secret";

/// What an encrypted image is named by.
fn encrypted(image: &Path) -> Option<(String, String)> {
    image.file_name()?.to_str()?.starts_with("luks").then(|| {
        let opts = format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", image.display());
        (format!("secret,id=s,data={KEY}"), opts)
    })
}

/// An image encrypted with LUKS that holds the bytes of the raw file `from`.
pub fn encrypt(from: &Path, image: &Path, size: u64) -> Res<()> {
    let (secret, opts) = encrypted(image).ok_or("not named as an encrypted image")?;
    let how = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let (from, image) = (from.display().to_string(), image.display().to_string());
    let size = size.to_string();
    run(
        "qemu-img",
        &["create", "-q", "--object", &secret, "-f", "qcow2", "-o", how, &image, &size],
    )?;
    let args = ["convert", "-n", "--object", &secret, "--target-image-opts", "-f", "raw"];
    run("qemu-img", &[&args[..], &[&from, &opts]].concat()).map(drop)
}

/// One run of `count` requests. Its own time is what counts, so that starting the program does not.
pub fn bench(image: &Path, work: &Work, how: How, count: u64) -> Res<Sample> {
    if let Some((secret, opts)) = encrypted(image) {
        return io_bench(&secret, &opts, work, how, count);
    }
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
    if work.flush {
        cmd.arg("--flush-interval=1");
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

/// As [`bench()`], by `qemu-io`, since `qemu-img bench` can not be given a key. It reads its commands
/// from a file; what it needs to start and end, most of it for the key, is measured and taken off.
fn io_bench(secret: &str, opts: &str, work: &Work, how: How, count: u64) -> Res<Sample> {
    let mut offsets = crate::work::Offsets::new(work, 0);
    let mut script = String::new();
    for i in 1..=count {
        let verb = if how.depth > 1 { "aio_read" } else { "read" };
        script += &format!("{verb} -q {} {}\n", offsets.next(), work.block);
        if how.depth > 1 && i % u64::from(how.depth) == 0 {
            script += "aio_flush\n";
        }
    }
    let aio = if how.uring { "io_uring" } else { "threads" };
    let args = ["-r", "-t", "writeback", "-i", aio, "--object", secret, "--image-opts", opts];
    let once = |script: &str| -> Res<(f64, f64, f64)> {
        let (before, start) = (children(), Load::now());
        feed(Command::new("qemu-io").args(args), script)?;
        let used = start.used();
        Ok((used.wall, children() - before, used.foreign))
    };
    let (idle_wall, idle_cpu, _) = once("")?;
    let (wall, cpu, foreign) = once(&script)?;
    Ok(Sample {
        value: count as f64 / (wall - idle_wall).max(1e-3),
        cpu_us: (cpu - idle_cpu).max(0.0) / count as f64 * 1e6,
        foreign,
    })
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
