//! Checking an image with 256 GiB allocated: how long it takes as a process, and what memory it needs.

use std::path::PathBuf;

use crate::Plan;
use crate::images::{Images, On, create};
use crate::process;
use crate::row::{Against::*, Contender, Row, Unit, Who};
use crate::rows::{to_know, to_reach};
use crate::work::Res;

/// Bytes of the disk, each cluster of which is allocated (and a hole: nobody looks at data).
const SIZE: u64 = 256 << 30;

fn image(images: &Images) -> Res<PathBuf> {
    let path = images.dir(On::Tmpfs).join("checked.qcow2");
    if !path.exists() {
        create(&path, SIZE, &["preallocation=metadata"])?;
    }
    Ok(path)
}

/// From start to end.
pub fn time<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let tool = process::built("qblk-tool", "qblk")?;
    let path = image(images)?;
    let spawn = |who, program: PathBuf| {
        let args = vec!["check".into(), "-q".into(), path.clone()];
        Contender { who, run: Box::new(move || process::whole(plan, &program, &args)) }
    };
    Ok(Row {
        unit: Unit::Millis,
        contenders: vec![spawn(Who::Ours, tool), spawn(Who::QemuTool, "qemu-img".into())],
        targets: vec![to_reach(Qemu, 5.0)],
        remarks: vec!["Tables in memory; whole processes.".to_owned()],
    })
}

/// The most that it needs at any moment.
pub fn memory<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    let path = image(images)?;
    let program = process::built("qblk-bench", "one-check")?;
    let run = |who, check: bool| {
        let (program, path) = (program.clone(), path.clone());
        let run = move || process::resident(&program, check.then_some(path.as_path()));
        Contender { who, run: Box::new(run) }
    };
    Ok(Row {
        unit: Unit::MiB,
        contenders: vec![run(Who::Ours, true), run(Who::Limit, false)],
        targets: vec![to_reach(AtMost(32.0), 32.0), to_know(Limit("nothing open"))],
        remarks: vec!["The limit is the same program that checks nothing.".to_owned()],
    })
}
