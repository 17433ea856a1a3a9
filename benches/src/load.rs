//! Clocks: wall time, processor time of this process, and what all others used meanwhile.
//!
//! The machine may be shared. A sample is only worth something if nobody else used the processors
//! while it ran, so every sample knows how much they did: busy time of the whole machine
//! (/proc/stat, steps of 10 ms) less our own and our children's (`getrusage`).

use std::time::Instant;

/// A moment, with what had been used until then.
pub struct Load {
    at: Instant,
    /// Processor seconds of this process and of its children that were waited for.
    own: f64,
    /// Processor seconds that all of the machine was busy.
    busy: f64,
}

/// What happened since a [`Load`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// Wall time, seconds.
    pub wall: f64,
    /// Processor time of this process and its children, seconds.
    pub own: f64,
    /// Processors that others used, on average; 0.5 is half of one.
    pub foreign: f64,
}

impl Load {
    /// Now.
    pub fn now() -> Self {
        let busy = busy_seconds();
        Self {
            own: rusage(libc::RUSAGE_SELF) + rusage(libc::RUSAGE_CHILDREN),
            busy,
            at: Instant::now(),
        }
    }

    /// Wall time since, seconds.
    pub fn elapsed(&self) -> f64 {
        self.at.elapsed().as_secs_f64()
    }

    /// What was used since.
    pub fn used(&self) -> Used {
        let wall = self.elapsed();
        let now = Self::now();
        let own = now.own - self.own;
        let foreign = ((now.busy - self.busy - own) / wall.max(1e-3)).max(0.0);
        Used { wall, own, foreign }
    }
}

fn seconds(t: libc::timeval) -> f64 {
    t.tv_sec as f64 + t.tv_usec as f64 * 1e-6
}

fn rusage(who: libc::c_int) -> f64 {
    // SAFETY: all-zero is a valid rusage, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(who, &mut usage);
        usage
    };
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Processor time of the children that were waited for, seconds.
pub fn children() -> f64 {
    rusage(libc::RUSAGE_CHILDREN)
}

/// Busy time of all processors since boot: all but idle, waiting for I/O, and what was stolen.
fn busy_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<f64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .skip(1)
        .map(|f| f.parse().unwrap_or(0.0))
        .collect();
    // user nice system idle iowait irq softirq steal
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|&i| fields.get(i)).sum();
    // SAFETY: sysconf has no conditions.
    busy / unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as f64
}

/// Take so much memory, touch it, and give it back, so that the kernel has it at hand. In a virtual
/// machine pages that were free for a while may be the host's again: the first touch of each then
/// costs several microseconds, and it is luck which sample pays for that.
pub fn have_memory_at_hand(bytes: u64) {
    // SAFETY: a mapping of our own, that nothing but the kernel touches, made and removed here.
    unsafe {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let flags = flags | libc::MAP_POPULATE;
        let base = libc::mmap(std::ptr::null_mut(), bytes as usize, prot, flags, -1, 0);
        if base != libc::MAP_FAILED {
            libc::munmap(base, bytes as usize);
        }
    }
}
