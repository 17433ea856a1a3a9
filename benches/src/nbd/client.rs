//! Our client: an export opened like any image.

use super::Done;
use super::servers::Running;
use crate::load::{Load, children};
use crate::rivals::Ours;
use crate::work::{Device, Offsets, Pattern, Res, Sample, Work, drive};

/// Reads of 4 KiB by `threads` threads on one handle.
pub fn reads(
    server: &Running,
    threads: usize,
    connections: Option<u32>,
    seconds: f64,
) -> Res<Sample> {
    let device = Ours::open_nbd(&server.uri(), connections)?;
    let size = device.size()?;
    let cpu = server.cpu();
    let start = std::time::Instant::now();
    let work = Work::reads(4096, Pattern::Random, size).by(threads);
    let mut sample = drive(&device, &work, seconds).map_err(|e| server.explain(e))?;
    let server = (server.cpu() - cpu) / start.elapsed().as_secs_f64();
    sample.foreign = (sample.foreign - server).max(0.0);
    Ok(sample)
}

/// What libnbd does, and the processor time that its program used.
pub fn others(server: &Running, load: impl FnOnce(&Running) -> Res<Done>) -> Res<Sample> {
    let (cpu, mine, start) = (server.cpu(), children(), Load::now());
    let done = load(server).map_err(|e| server.explain(e))?;
    let (used, cpu, mine) = (start.used(), server.cpu() - cpu, children() - mine);
    Ok(Sample {
        value: done.rate,
        cpu_us: mine / done.ops.max(1.0) * 1e6,
        foreign: (used.foreign - cpu / used.wall.max(1e-3)).max(0.0),
    })
}

/// This program as one whose system calls are counted: so many reads of 4 KiB by so many threads.
pub fn requests(uri: &str, threads: &str, ops: &str) -> Res<()> {
    let number = |s: &str| s.parse::<u64>().map_err(|_| format!("{s:?} is no number"));
    let (threads, ops) = (number(threads)?, number(ops)? / number(threads)?.max(1));
    let device = &Ours::open_nbd(uri, None)?;
    let work = Work::reads(4096, Pattern::Random, device.size()?);
    let one = &|thread: u64| -> Res<()> {
        let mut offsets = Offsets::new(&work, thread as usize);
        let mut buf = [0; 4096];
        (0..ops).try_for_each(|_| device.read(&mut buf, offsets.next()))
    };
    if threads == 1 {
        return one(0);
    }
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|t| scope.spawn(move || one(t))).collect();
        handles
            .into_iter()
            .try_for_each(|h| h.join().map_err(|_| "a thread of the bench panicked".to_owned())?)
    })
}
