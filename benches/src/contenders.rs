//! Who takes part in a row: ours, the limit and the rivals, put together for the kinds of work.

use std::path::{Path, PathBuf};

use crate::Plan;
use crate::images::{CLUSTER, Images, Kind, Kind::*, On, On::*, refresh};
use crate::load::have_memory_at_hand;
use crate::oracle::{Oracle, at};
use crate::qemu::{self, How};
use crate::rivals::{Imago, Ours};
use crate::row::{Contender, Row, Unit, Who};
use crate::work::{Device, Pattern, Res, Sample, Work, drive};

/// qemu's ways, and where each is fair.
const QEMU: [(How, On); 6] = {
    const fn how(uring: bool, depth: u32) -> How {
        How { uring, depth }
    }
    [
        (how(false, 1), Tmpfs),
        (how(false, 16), Tmpfs),
        (how(false, 1), Disk),
        (how(false, 16), Disk),
        (how(true, 1), Disk),
        (how(true, 16), Disk),
    ]
};

/// Opened anew for each sample.
pub fn anew<'a, D: Device + 'a>(
    who: Who,
    plan: &'a Plan,
    work: Work,
    open: impl Fn() -> Res<D> + 'a,
) -> Contender<'a> {
    Contender { who, run: Box::new(move || drive(&open()?, &work, plan.seconds)) }
}

/// Opened once.
pub fn kept<'a, D: Device + 'a>(
    who: Who,
    plan: &'a Plan,
    work: Work,
    open: impl Fn() -> Res<D> + 'a,
) -> Contender<'a> {
    let mut device = None;
    let run = move || {
        // What a mapping costs when it is first touched is paid once.
        let (device, work) = match &mut device {
            Some(d) => (&*d, Work { warm: 64, ..work }),
            none => (&*none.insert(open()?), work),
        };
        drive(device, &work, plan.seconds)
    };
    Contender { who, run: Box::new(run) }
}

/// Add qemu in all its ways, and ours on the disk for those of them that are there.
pub fn add_qemu<'a>(
    row: &mut Row<'a>,
    images: &'a Images,
    plan: &'a Plan,
    kind: Kind,
    work: Work,
    options: &'static [(&'static str, &'static str)],
) -> Res<()> {
    let mut ready = Vec::new();
    for &(how, on) in QEMU.iter().filter(|w| w.1 == Tmpfs || images.has_disk()) {
        let path = images.path(kind, on);
        if on == Disk {
            refresh(&path)?;
        }
        let count = qemu::calibrate(&path, &work, how, plan.seconds)?;
        let trial = qemu::bench(&path, &work, how, count)?.value;
        ready.push((trial, path, how, on, count));
    }
    if plan.quick {
        // Only the two that did best are worth their time.
        ready.sort_by(|a, b| b.0.total_cmp(&a.0));
        ready.truncate(2);
    }
    if ready.iter().any(|r| r.3 == Disk) {
        let path = images.path(kind, Disk);
        row.contenders.push(Contender {
            who: Who::OursDisk,
            run: Box::new(move || {
                refresh(&path)?;
                drive(&Ours::open(&path, work.write, options)?, &work, plan.seconds)
            }),
        });
    }
    for (_, path, how, on, count) in ready {
        let idle = idle_cpu(&path, &work, how)?;
        let run = move || {
            if on == Disk {
                refresh(&path)?;
            }
            let mut sample = qemu::bench(&path, &work, how, count)?;
            sample.cpu_us = (sample.cpu_us - idle / count as f64).max(0.001);
            Ok(sample)
        };
        row.contenders.push(Contender { who: Who::Qemu(how, on), run: Box::new(run) });
    }
    Ok(())
}

/// Processor time that qemu-img takes to start and end, microseconds.
fn idle_cpu(path: &Path, work: &Work, how: How) -> Res<f64> {
    let mut least = f64::MAX;
    for _ in 0..3 {
        least = least.min(qemu::bench(path, work, how, 1)?.cpu_us);
    }
    Ok(least)
}

/// Ours, the plain call, imago.
pub fn plain<'a>(images: &'a Images, plan: &'a Plan, work: Work) -> Row<'a> {
    let path = images.path(Full, Tmpfs);
    let (a, b, c) = (path.clone(), path.clone(), path);
    let write = work.write;
    Row {
        unit: Unit::PerSecond,
        contenders: vec![
            anew(Who::Ours, plan, work, move || Ours::open(&a, write, &[])),
            anew(Who::Limit, plan, work, move || {
                Oracle::open(std::slice::from_ref(&b), write, false)
            }),
            anew(Who::Imago, plan, work, move || Imago::open(&c, write)),
        ],
        targets: Vec::new(),
        remarks: Vec::new(),
    }
}

/// The bytes that ours reads are those that the others read.
pub fn same_bytes(
    images: &Images,
    kind: Kind,
    block: usize,
    size: u64,
    options: &[(&str, &str)],
) -> Res<()> {
    let path = images.path(kind, Tmpfs);
    let ours = Ours::open(&path, false, options)?;
    let other: Box<dyn Device> = match kind {
        Zlib => Box::new(Imago::open(&path, false)?),
        _ => Box::new(Oracle::open(&images.chain(kind, Tmpfs), false, false)?),
    };
    let (mut a, mut b) = (vec![0; block], vec![1; block]);
    let work = Work::reads(block, Pattern::Random, size);
    let mut offsets = crate::work::Offsets::new(&work, 0);
    for _ in 0..64 {
        let offset = offsets.next();
        ours.read(&mut a, offset)?;
        other.read(&mut b, offset)?;
        if a != b {
            return Err(format!(
                "{}: libqblk reads wrong bytes at offset {offset}",
                path.display()
            ));
        }
    }
    Ok(())
}

/// Memory for the clusters that `work` allocates.
pub fn have_memory_for(work: &Work) {
    have_memory_at_hand((work.ops.unwrap_or(0) * CLUSTER).min(1 << 30));
}

/// A fresh image for every sample.
struct Fresh<'a> {
    images: &'a Images,
    on: On,
    /// The bytes of an image that nothing was written to.
    pristine: Vec<u8>,
    work: Work,
}

impl Fresh<'_> {
    fn file(&self) -> PathBuf {
        self.images.dir(self.on).join("fresh.qcow2")
    }

    /// Make one, use it, remove it.
    fn with(&self, use_it: impl FnOnce(&Path) -> Res<Sample>) -> Res<Sample> {
        let file = self.file();
        at(&file, std::fs::write(&file, &self.pristine))?;
        have_memory_for(&self.work);
        let sample = use_it(&file);
        let _ = std::fs::remove_file(&file);
        sample
    }
}

/// Ours, imago, and qemu in its ways, each on a fresh image for every sample. In the first round
/// qemu-img checks what ours wrote.
pub fn fresh_row<'a>(
    images: &'a Images,
    plan: &'a Plan,
    work: Work,
    make: impl Fn(&Path, On) -> Res<()>,
    below: Option<Kind>,
) -> Res<Row<'a>> {
    let places = [Tmpfs, Disk].into_iter().filter(|&on| on == Tmpfs || images.has_disk());
    let mut contenders = Vec::new();
    for on in places {
        let file = images.dir(on).join("fresh.qcow2");
        make(&file, on)?;
        let pristine = at(&file, std::fs::read(&file))?;
        let fresh = std::rc::Rc::new(Fresh { images, on, pristine, work });
        let who = if on == Tmpfs { Who::Ours } else { Who::OursDisk };
        let warm = move || match below {
            Some(kind) if on == Disk => refresh(&images.path(kind, on)),
            _ => Ok(()),
        };
        let mut checked = false;
        let f = fresh.clone();
        let ours = move || {
            warm()?;
            f.with(|file| {
                let sample = drive(&Ours::open(file, true, &[])?, &work, plan.seconds)?;
                if !std::mem::replace(&mut checked, true) {
                    qemu::run(
                        "qemu-img",
                        &[
                            "check".as_ref(),
                            "-q".as_ref(),
                            "-f".as_ref(),
                            "qcow2".as_ref(),
                            file.as_os_str(),
                        ],
                    )?;
                }
                Ok(sample)
            })
        };
        contenders.push(Contender { who, run: Box::new(ours) });
        if on == Tmpfs {
            let f = fresh.clone();
            let imago =
                move || f.with(|file| drive(&Imago::open(file, true)?, &work, plan.seconds));
            contenders.push(Contender { who: Who::Imago, run: Box::new(imago) });
        }
        for &(how, _) in QEMU.iter().filter(|w| w.1 == on && !(plan.quick && w.0.depth == 1)) {
            let f = fresh.clone();
            let run = move || {
                warm()?;
                f.with(|file| qemu::bench(file, &f.work, how, f.work.ops.unwrap_or(1)))
            };
            contenders.push(Contender { who: Who::Qemu(how, on), run: Box::new(run) });
        }
    }
    Ok(Row { unit: Unit::PerSecond, contenders, targets: Vec::new(), remarks: Vec::new() })
}
