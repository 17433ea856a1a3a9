//! Servers as processes: ours, the least one, nbdkit, qemu-nbd.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use qblk::nbd::server::{Export, Server as OurServer};
use qblk::{Image, OpenFlags, Options};

use super::blast::{self, Client, Load, Until};
use super::{Done, Guard, with_us};
use crate::load;
use crate::oracle::at;
use crate::qemu::missing;
use crate::work::{Offsets, Pattern, Res, Sample, Work};

/// How qemu-nbd does its I/O.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Aio {
    /// `--aio=threads`, its default.
    Threads,
    /// `--aio=io_uring`.
    Uring,
    /// `--aio=native --cache=none`, past the page cache.
    Native,
}

/// A server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Program {
    Ours,
    Mini,
    Nbdkit,
    /// nbdkit's own disk in memory; the file is its size.
    NbdkitMemory,
    Qemu(Aio),
}

/// What is served, how.
#[derive(Clone, Debug)]
pub struct Launch {
    pub program: Program,
    pub file: PathBuf,
    /// raw or qcow2.
    pub format: &'static str,
    pub write: bool,
    /// Where the socket is made.
    pub dir: PathBuf,
}

/// This program as our server.
pub fn serve(socket: &str, file: &str, format: &str, write: bool) -> Res<()> {
    let text = |e: qblk::Error| e.to_string();
    let flags = if write { OpenFlags::RDWR } else { OpenFlags::default() };
    let image =
        Image::open(file.as_ref(), &Options::new().with("format", format), flags).map_err(text)?;
    let broken = Arc::new(AtomicBool::new(false));
    let server = OurServer::new().map_err(text)?;
    let export = Export::new(Vec::new(), Vec::new(), image, broken, !write).map_err(text)?;
    server.add(export).map_err(text)?;
    server.listen(uri(socket.as_ref()).as_bytes()).map_err(text)?;
    server.wait(None);
    Ok(())
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

/// A server that runs; killed at the end.
pub struct Running {
    process: Guard,
    pub socket: PathBuf,
    clock: libc::clockid_t,
    log: PathBuf,
}

impl Launch {
    fn command(&self, socket: &Path) -> Res<Command> {
        let own = || std::env::current_exe().map_err(|e| format!("the bench's own program: {e}"));
        let rights = if self.write { "rw" } else { "ro" };
        let mut c;
        match self.program {
            Program::Ours => {
                c = Command::new(own()?);
                c.arg("--nbd-serve").arg(socket).arg(&self.file).args([self.format, rights]);
            }
            Program::Mini => {
                c = Command::new(own()?);
                c.arg("--nbd-mini").arg(socket).arg(&self.file).arg(rights);
            }
            Program::Nbdkit => {
                c = Command::new("nbdkit");
                c.args(["--foreground", "--exit-with-parent"]);
                c.args((!self.write).then_some("--readonly"));
                c.arg("--unix").arg(socket).arg("file").arg(&self.file);
            }
            Program::NbdkitMemory => {
                c = Command::new("nbdkit");
                c.args(["--foreground", "--exit-with-parent"]);
                c.arg("--unix").arg(socket).arg("memory").arg(&self.file);
            }
            Program::Qemu(aio) => {
                let (aio, cache) = match aio {
                    Aio::Threads => ("threads", "writeback"),
                    Aio::Uring => ("io_uring", "writeback"),
                    Aio::Native => ("native", "none"),
                };
                c = Command::new("qemu-nbd");
                c.args(["--persistent", "--shared=16", "--format", self.format]);
                c.arg(format!("--aio={aio}")).arg(format!("--cache={cache}"));
                c.args((!self.write).then_some("--read-only"));
                c.arg("--socket").arg(socket).arg(&self.file);
            }
        }
        Ok(c)
    }

    /// Start it and wait until it serves.
    pub fn start(&self) -> Res<Running> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Relaxed);
        let socket = self.dir.join(format!("nbd{n}.sock"));
        let log = self.dir.join(format!("nbd{n}.log"));
        let said = at(&log, File::create(&log))?;
        let mut command = self.command(&socket)?;
        let program = command.get_program().to_string_lossy().into_owned();
        let child = with_us(&mut command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            .spawn()
            .map_err(|e| missing(&program, &e))?;
        let clock = cpu_clock(child.id());
        let mut running = Running { process: Guard(child), socket, clock: clock?, log };
        let begun = Instant::now();
        loop {
            match Client::connect(&running.socket) {
                Ok(_) => return Ok(running),
                Err(e) => {
                    let ended = running.process.0.try_wait().ok().flatten();
                    if ended.is_some() || begun.elapsed() > Duration::from_secs(10) {
                        let how = ended.map_or("does not serve".to_owned(), |s| s.to_string());
                        return Err(format!("{program}: {how} ({e}): {}", running.said()));
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn cpu_clock(pid: u32) -> Res<libc::clockid_t> {
    let mut clock = 0;
    // SAFETY: room for the answer.
    match unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut clock) } {
        0 => Ok(clock),
        e => Err(format!("the clock of a server: {}", std::io::Error::from_raw_os_error(e))),
    }
}

impl Running {
    pub fn uri(&self) -> String {
        uri(&self.socket)
    }

    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Processor time so far, of all its threads, seconds.
    pub fn cpu(&self) -> f64 {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: room for the answer; the process is not waited for yet, so it is still this one's.
        unsafe { libc::clock_gettime(self.clock, &raw mut t) };
        t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
    }

    /// What it complained of.
    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default().trim().to_owned()
    }

    /// A line of /proc/PID/status, KiB.
    pub fn status_kib(&self, key: &str) -> Res<u64> {
        let path = format!("/proc/{}/status", self.pid());
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|l| l.split_whitespace().next()?.parse().ok())
            .ok_or_else(|| format!("{path}: no {key}"))
    }

    /// A load on it, and what the server used meanwhile.
    pub fn measure(&self, work: impl FnOnce(&Self) -> Res<Done>) -> Res<Sample> {
        let (cpu, start) = (self.cpu(), load::Load::now());
        let done = work(self).map_err(|e| self.explain(e))?;
        let (used, cpu) = (start.used(), self.cpu() - cpu);
        Ok(Sample {
            value: done.rate,
            cpu_us: cpu / done.ops.max(1.0) * 1e6,
            foreign: (used.foreign - cpu / used.wall.max(1e-3)).max(0.0),
        })
    }

    /// A client's error, with the server's last words.
    pub fn explain(&self, e: String) -> String {
        match self.said() {
            said if said.is_empty() => e,
            said => format!("{e}; the server said: {}", said.lines().last().unwrap_or_default()),
        }
    }

    /// Threads, memory and clocks as they are after a while.
    pub fn warm_up(&self, write: bool) -> Res<()> {
        let load = Load { block: 4096, depth: 16, connections: 1, write };
        blast::run(&self.socket, &load, Until::Seconds(0.05)).map(drop).map_err(|e| self.explain(e))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for file in [&self.socket, &self.log] {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// What is read of a server is what is in the raw file.
pub fn same_bytes(launch: &Launch, raw: &Path) -> Res<()> {
    use std::os::unix::fs::FileExt;
    let server = launch.start()?;
    let mut client =
        Client::connect(&server.socket).map_err(|e| format!("{:?}: {e}", launch.program))?;
    let file = at(raw, File::open(raw))?;
    if client.size != at(raw, file.metadata())?.len() {
        return Err(format!("{:?} serves {} bytes", launch.program, client.size));
    }
    for block in [4096, 1 << 20] {
        let (mut a, mut b) = (vec![0; block], vec![1; block]);
        let mut offsets = Offsets::new(&Work::reads(block, Pattern::Random, client.size), 0);
        for _ in 0..32 {
            let offset = offsets.next();
            client.read(&mut a, offset).map_err(|e| server.explain(e))?;
            at(raw, file.read_exact_at(&mut b, offset))?;
            if a != b {
                return Err(format!("{:?} serves wrong bytes at offset {offset}", launch.program));
            }
        }
    }
    Ok(())
}
