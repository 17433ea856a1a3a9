//! Writes that are flushed one by one, where a flush costs something: on a disk's file system.

use std::path::{Path, PathBuf};

use crate::Plan;
use crate::contenders::anew;
use crate::images::{CLUSTER, Images, Kind, On, create, refresh};
use crate::oracle::{Plain, at};
use crate::qemu::{self, How};
use crate::rivals::{Imago, Ours};
use crate::row::{Against::*, Contender, Row, Unit, Who};
use crate::rows::{to_know, to_reach};
use crate::work::{Device, Pattern, Res, Sample, Work, drive, golden_step};

/// `qemu-img bench` flushes each write only if they follow one another.
const QEMU: [How; 2] = [How { uring: false, depth: 1 }, How { uring: true, depth: 1 }];

/// What is done to an image.
type OnImage<'a> = Box<dyn Fn(&Path) -> Res<Sample> + 'a>;

/// Everybody is on the disk: qemu is compared with the only one of ours that there is.
const BESIDE: On = On::Tmpfs;

fn disk(images: &Images, name: Option<Kind>) -> Res<PathBuf> {
    match (images.has_disk(), name) {
        (false, _) => Err("this needs a directory on a disk: option --dir".to_owned()),
        (_, Some(kind)) => Ok(images.path(kind, On::Disk)),
        _ => Ok(images.dir(On::Disk).to_owned()),
    }
}

/// Overwrites in place, each flushed.
pub fn overwrite<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let path = disk(images, Some(Kind::Full))?;
    let work = Work::writes(4096, Pattern::Random, images.size).flushed();
    refresh(&path)?;
    let [a, b] = [path.clone(), path.clone()];
    let plain = path.with_extension("plain");
    let limit = move || {
        // A copy, so that nothing of the image is harmed.
        at(&plain, std::fs::copy(&b, &plain))?;
        at(&plain, std::fs::File::open(&plain).and_then(|f| f.sync_all()))?;
        let sample = drive(&Plain::open(&plain)?, &work, plan.seconds);
        let _ = std::fs::remove_file(&plain);
        sample
    };
    let c = path.clone();
    let mut contenders = vec![
        anew(Who::Ours, plan, work, move || Ours::open(&a, true, &[])),
        Contender { who: Who::Limit, run: Box::new(limit) },
        anew(Who::Imago, plan, work, move || Imago::open(&c, true)),
    ];
    for how in QEMU {
        let count = qemu::calibrate(&path, &work, how, plan.seconds)?;
        let path = path.clone();
        let run = move || qemu::bench(&path, &work, how, count);
        contenders.push(Contender { who: Who::Qemu(how, BESIDE), run: Box::new(run) });
    }
    Ok(Row {
        unit: Unit::PerSecond,
        contenders,
        targets: vec![
            to_reach(Imago, 1.3),
            to_reach(Qemu, 2.0),
            to_know(Limit("pwrite, fdatasync")),
        ],
        remarks: Vec::new(),
    })
}

/// The same by sixteen threads on one handle: their flushes are one.
pub fn sixteen<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let path = disk(images, Some(Kind::Full))?;
    let one = Work::writes(4096, Pattern::Random, images.size).flushed();
    refresh(&path)?;
    let (a, b) = (path.clone(), path);
    Ok(Row {
        unit: Unit::PerSecond,
        contenders: vec![
            anew(Who::Ours, plan, one.by(16), move || Ours::open(&a, true, &[])),
            anew(Who::Base, plan, one, move || Ours::open(&b, true, &[])),
        ],
        targets: vec![to_reach(Base("one thread"), 4.0)],
        remarks: Vec::new(),
    })
}

/// Writes that allocate, each flushed, to a fresh image for every sample.
pub fn allocate<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let dir = disk(images, None)?;
    let ops = if plan.quick { 512 } else { 4096 }.min(images.size / CLUSTER / 2);
    let step = golden_step(images.size, 4096);
    let work = Work::writes(4096, Pattern::Walk(step), images.size).exactly(ops).flushed();
    let fresh = dir.join("durable.qcow2");
    create(&fresh, images.size, &[])?;
    let pristine = at(&fresh, std::fs::read(&fresh))?;
    let pristine = std::rc::Rc::new(pristine);
    let contender = |who, run: OnImage<'a>| {
        let (fresh, pristine) = (fresh.clone(), pristine.clone());
        let run = move || {
            at(&fresh, std::fs::write(&fresh, &**pristine))?;
            at(&fresh, std::fs::File::open(&fresh).and_then(|f| f.sync_all()))?;
            let sample = run(&fresh);
            let _ = std::fs::remove_file(&fresh);
            sample
        };
        Contender { who, run: Box::new(run) }
    };
    fn with<'a, D: Device + 'a>(work: Work, open: impl Fn(&Path) -> Res<D> + 'a) -> OnImage<'a> {
        Box::new(move |file| drive(&open(file)?, &work, 0.0))
    }
    let mut contenders = vec![
        contender(Who::Ours, with(work, |file| Ours::open(file, true, &[]))),
        contender(Who::Imago, with(work, |file| Imago::open(file, true))),
    ];
    for how in QEMU {
        let run = move |file: &Path| qemu::bench(file, &work, how, ops);
        contenders.push(contender(Who::Qemu(how, BESIDE), Box::new(run)));
    }
    Ok(Row {
        unit: Unit::PerSecond,
        contenders,
        targets: vec![to_reach(Imago, 1.5), to_reach(Qemu, 2.0)],
        remarks: vec![
            "imago orders nothing for a power cut: it needs one fdatasync where two keep the image \
             sound."
                .to_owned(),
        ],
    })
}
