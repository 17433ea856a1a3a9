//! What locks cost at open: the same open with and without them, in turns within each sample, so that
//! what else an open costs, and what the machine does meanwhile, cancels out.

use std::path::Path;
use std::time::Instant;

use qblk::{Image, OpenFlags, Options};

use crate::Plan;
use crate::load::Load;
use crate::row::{Against::*, Contender, Row, Target, Unit, Who};
use crate::work::{Res, Sample};

/// Opens of each sort in a turn.
const TURN: u32 = 50;

/// Microseconds that locks may add to one file.
const AT_MOST: f64 = 20.0;

/// The row: opening and closing an image of one file for writing.
pub fn row(plan: &Plan, image: std::path::PathBuf) -> Row<'_> {
    let run = move || cost(plan, &image);
    Row {
        unit: Unit::Micros,
        contenders: vec![Contender { who: Who::Ours, run: Box::new(run) }],
        targets: vec![Target { against: AtMost(AT_MOST), at_least: Some(AT_MOST), part: false }],
        remarks: Vec::new(),
    }
}

fn cost(plan: &Plan, image: &Path) -> Res<Sample> {
    let (with, without) = (Options::new(), Options::new().with("lock", "off"));
    opens(image, &with)?;
    let start = Load::now();
    let (mut wall, mut cpu) = (Vec::new(), Vec::new());
    while start.elapsed() < plan.seconds || wall.len() < 5 {
        let (locked, plain) = (opens(image, &with)?, opens(image, &without)?);
        wall.push(locked.0 - plain.0);
        cpu.push(locked.1 - plain.1);
    }
    let middle = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    Ok(Sample { value: middle(wall), cpu_us: middle(cpu), foreign: start.used().foreign })
}

/// Microseconds of one open and close: by the clock, and of the processor.
fn opens(image: &Path, options: &Options) -> Res<(f64, f64)> {
    let (begun, cpu) = (Instant::now(), thread_seconds());
    for _ in 0..TURN {
        let image = Image::open(image.as_os_str(), options, OpenFlags::RDWR);
        image.and_then(Image::close).map_err(|e| e.to_string())?;
    }
    let each = |seconds: f64| seconds * 1e6 / f64::from(TURN);
    Ok((each(begun.elapsed().as_secs_f64()), each(thread_seconds() - cpu)))
}

/// Processor time of this thread.
fn thread_seconds() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}
