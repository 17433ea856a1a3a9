//! What the figures were measured on: without it they say nothing.

use std::fmt;

use crate::qemu;
use crate::work::Res;

/// The machine, the day, the versions.
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_gib: u64,
    pub kernel: String,
    pub system: String,
    pub date: String,
    pub qblk: String,
    pub qemu: String,
    pub imago: String,
    /// Peers of NBD with their versions, where they were measured.
    pub nbd: Option<String>,
}

impl Machine {
    /// Look around.
    pub fn look() -> Res<Self> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let after = |text: &str, key: &str, separator: char| {
            let line = text.lines().find(|l| l.starts_with(key))?;
            Some(line.split_once(separator)?.1.trim().trim_matches('"').to_owned())
        };
        let unknown = || "unknown".to_owned();
        let kib = after(&read("/proc/meminfo"), "MemTotal", ':')
            .and_then(|v| v.split(' ').next()?.parse::<u64>().ok());
        let qemu = qemu::run("qemu-img", &["--version"])?;
        Ok(Self {
            cpu: after(&read("/proc/cpuinfo"), "model name", ':').unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: kib.unwrap_or(0).div_ceil(1 << 20),
            kernel: format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
            system: after(&read("/etc/os-release"), "PRETTY_NAME", '=').unwrap_or_else(unknown),
            date: today(),
            qblk: qblk_version(),
            qemu: qemu.split_whitespace().nth(2).unwrap_or("unknown").to_owned(),
            imago: locked("imago"),
            nbd: None,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { cpu, cores, memory_gib, kernel, system, date, qblk, qemu, imago, nbd } = self;
        writeln!(f, "{date} · {cpu}, {cores} cores, {memory_gib} GiB · {kernel} · {system}")?;
        write!(f, "libqblk {qblk} · qemu {qemu} · imago {imago} (sync)")?;
        nbd.as_ref().map_or(Ok(()), |nbd| write!(f, "\n{nbd}"))
    }
}

fn qblk_version() -> String {
    // SAFETY: the function answers a static text.
    let version = unsafe { std::ffi::CStr::from_ptr(qblk::capi::qblk_version_string()) };
    version.to_string_lossy().into_owned()
}

/// The version of a crate that this was built with.
fn locked(name: &str) -> String {
    let lock = include_str!("../../Cargo.lock");
    let mut lines = lock.lines().skip_while(|l| *l != format!("name = \"{name}\""));
    let version = lines.nth(1).and_then(|l| l.strip_prefix("version = "));
    version.unwrap_or("unknown").trim_matches('"').to_owned()
}

/// The date in UTC, YYYY-MM-DD.
fn today() -> String {
    // SAFETY: room for the answers, of which all-zero is a valid one.
    let tm = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut tm: libc::tm = std::mem::zeroed();
        libc::gmtime_r(&now, &mut tm);
        tm
    };
    format!("{:04}-{:02}-{:02}", tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday)
}
