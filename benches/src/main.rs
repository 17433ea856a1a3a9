//! The yardsticks: libqblk beside plain `pread` and `pwrite`, `qemu-img bench` and imago, and over NBD
//! beside qemu-nbd, nbdkit and libnbd; in one run and in turns (A B A B …), so that what the machine does meanwhile meets all alike. What counts is
//! the ratio of medians; the spread of the ratios of neighbours tells how much it is worth.
//!
//! Images lie on a tmpfs, from where nothing takes them; those for io_uring on a disk's file system,
//! read again before each sample if they left the page cache. A sample during which other programs
//! used more than half a processor is taken again.

mod checking;
mod contenders;
mod durable;
mod images;
mod load;
mod locking;
mod machine;
mod nbd;
mod oracle;
mod plugins;
mod process;
mod qemu;
mod report;
mod rivals;
mod row;
mod rows;
mod svg;
mod work;

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use images::{Images, On};
use row::{Contender, Figures, Result as Measured, Table};
use rows::{ROWS, Spec};
use work::{Res, Sample};

const USAGE: &str = "\
usage: qblk-bench [OPTION]...     (make bench BENCH_ARGS='OPTION...')

Measures libqblk beside plain system calls, qemu-img bench and imago, and over NBD beside qemu-nbd,
nbdkit and libnbd (rows nbd-…).

  --quick            images of 1 GiB and short samples: rough figures, sooner
  --only PATTERN     only rows with PATTERN in their short name; may be repeated
  --list             the rows and their short names
  --samples N        samples of each (7, with --quick 5)
  --seconds S        length of a sample (0.5, with --quick 0.2)
  --patience N       how often a disturbed sample is taken again (6, with --quick 2)
  --cpu              judge by processor time, not by the clock: for a machine that others use
  --alone            libqblk only, for a profiler
  --json FILE        write all figures
  --svg FILE         write the drawing
  --md FILE          write the page
                     A whole run that is not --quick writes docs/bench/bench.svg and results.md.
  --dir DIR          a directory on a disk, for qemu's io_uring (default: the one for temporary files)
  --tmpfs DIR        a directory on a tmpfs (default: /dev/shm)
";

/// A signal ends the program.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Used by others while a sample runs, at most, processors.
const QUIET: f64 = 0.5;

/// How thoroughly to measure.
pub struct Plan {
    /// Rough figures, soon.
    pub quick: bool,
    /// Length of a sample.
    pub seconds: f64,
    /// Samples of each.
    pub samples: usize,
    /// How often a disturbed sample is taken again.
    pub patience: usize,
    /// Judge by processor time.
    pub cpu: bool,
    /// Leave all others out.
    pub alone: bool,
}

struct Args {
    plan: Plan,
    only: Vec<String>,
    list: bool,
    json: Option<PathBuf>,
    svg: Option<PathBuf>,
    md: Option<PathBuf>,
    dir: PathBuf,
    tmpfs: PathBuf,
}

fn parse(mut args: impl Iterator<Item = std::ffi::OsString>) -> Res<Args> {
    let mut a = Args {
        plan: Plan {
            quick: false,
            seconds: 0.0,
            samples: 0,
            patience: usize::MAX,
            cpu: false,
            alone: false,
        },
        only: Vec::new(),
        list: false,
        json: None,
        svg: None,
        md: None,
        dir: std::env::temp_dir(),
        tmpfs: "/dev/shm".into(),
    };
    while let Some(option) = args.next() {
        let option = option.to_string_lossy().into_owned();
        let mut value = || args.next().ok_or_else(|| format!("{option} needs a value"));
        fn number<T: std::str::FromStr>(option: &str, v: std::ffi::OsString) -> Res<T> {
            v.to_str()
                .and_then(|v| v.parse().ok())
                .ok_or_else(|| format!("{option}: {v:?} is no number"))
        }
        match option.as_str() {
            "--quick" => a.plan.quick = true,
            "--cpu" => a.plan.cpu = true,
            "--alone" => a.plan.alone = true,
            "--list" => a.list = true,
            "--only" => a.only.push(value()?.to_string_lossy().into_owned()),
            "--samples" => a.plan.samples = number(&option, value()?)?,
            "--seconds" => a.plan.seconds = number(&option, value()?)?,
            "--patience" => a.plan.patience = number(&option, value()?)?,
            "--json" => a.json = Some(value()?.into()),
            "--svg" => a.svg = Some(value()?.into()),
            "--md" => a.md = Some(value()?.into()),
            "--dir" => a.dir = value()?.into(),
            "--tmpfs" => a.tmpfs = value()?.into(),
            _ => return Err(format!("unknown option {option}\n\n{USAGE}")),
        }
    }
    let p = &mut a.plan;
    if p.samples == 0 {
        p.samples = if p.quick { 5 } else { 7 };
    }
    if p.seconds <= 0.0 {
        p.seconds = if p.quick { 0.2 } else { 0.5 };
    }
    if p.patience == usize::MAX {
        p.patience = if p.quick { 2 } else { 6 };
    }
    Ok(a)
}

fn main() -> ExitCode {
    let all: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(result) = nbd::part(&all) {
        return end(result);
    }
    let mut args = all.into_iter().peekable();
    if args.peek().is_some_and(|a| a == "--help" || a == "-h") {
        print!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match parse(args) {
        Ok(args) if args.list => {
            specs().for_each(|(_, r)| println!("{:<20} {}", r.id, r.title));
            ExitCode::SUCCESS
        }
        Ok(args) => end(bench(&args)),
        Err(e) => {
            eprintln!("qblk-bench: {e}");
            ExitCode::from(2)
        }
    }
}

fn end(result: Res<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Without its images nothing goes on; the thread that removed them ends the program.
            while ENDING.load(SeqCst) {
                std::thread::park();
            }
            eprintln!("qblk-bench: {e}");
            ExitCode::FAILURE
        }
    }
}

/// All rows, and where they are shown.
fn specs() -> impl Iterator<Item = (Table, &'static Spec)> {
    let images = ROWS.iter().map(|r| (Table::Images, r));
    images.chain(nbd::ROWS.iter().map(|r| (Table::Nbd, r)))
}

/// What is going on, on a line of its own, and only for people: a log wants the table.
fn note(text: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{text}");
    }
}

fn bench(args: &Args) -> Res<()> {
    let chosen: Vec<(Table, &Spec)> = specs()
        .filter(|(_, r)| {
            args.only.is_empty() || args.only.iter().any(|o| r.id.contains(o.as_str()))
        })
        .collect();
    if chosen.is_empty() {
        return Err(format!("no row has {:?} in its name; --list shows them", args.only));
    }
    let mut machine = machine::Machine::look()?;
    if chosen.iter().any(|c| c.0 == Table::Nbd) && !args.plan.alone {
        machine.nbd = Some(nbd::look()?);
    }
    clean_up_on_signals()?;
    let (size, small) = if args.plan.quick { (1 << 30, 128 << 20) } else { (4 << 30, 512 << 20) };
    let mut images = Images::new(&args.tmpfs, &args.dir, size, small, note)?;
    println!("{machine}");
    let mut results = Vec::new();
    let mut table = None;
    for (i, &(where_to, spec)) in chosen.iter().enumerate() {
        if table.replace(where_to) != Some(where_to) {
            report::head(where_to);
        }
        let needed: BTreeSet<_> = chosen[i..].iter().flat_map(|s| s.1.needs).copied().collect();
        images.retain(&needed);
        for &(kind, on) in spec.needs {
            if on == On::Tmpfs || images.has_disk() {
                images.make(kind, on)?;
            }
        }
        note(&format!("{}: getting ready", spec.id));
        let result = measure((where_to, spec), &images, &args.plan)
            .map_err(|e| format!("{}: {e}", spec.id))?;
        note("");
        report::line(&result);
        results.push(result);
    }
    drop(images);
    report::summary(&results);
    write_out(args, &machine, &results)
}

/// Take all samples of a row, in turns.
fn measure((table, spec): (Table, &Spec), images: &Images, plan: &Plan) -> Res<Measured> {
    let mut row = (spec.build)(images, plan)?;
    // Two threads need no less processor time than one, so there the clock it is.
    let by_threads = row.contenders.iter().any(|c| c.who == row::Who::LimitBase);
    if plan.cpu && !by_threads {
        row.unit = row.unit.by_cpu();
    }
    if plan.alone {
        row.contenders.retain(|c| matches!(c.who, row::Who::Ours | row::Who::OursDisk));
    }
    let mut figures: Vec<Figures> =
        row.contenders.iter().map(|c| Figures { who: c.who, samples: Vec::new() }).collect();
    for round in 0..plan.samples {
        // Who comes first changes, for what one leaves in the caches meets the next.
        for turn in 0..figures.len() {
            let i = (round + turn) % figures.len();
            let (contender, figures) = (&mut row.contenders[i], &mut figures[i]);
            note(&format!(
                "{}: sample {} of {}, {:?}",
                spec.id,
                round + 1,
                plan.samples,
                contender.who
            ));
            figures.samples.push(quiet_sample(contender, plan)?);
        }
    }
    let verdicts = row::judge(&figures, row.unit, &row.targets);
    let remarks = std::mem::take(&mut row.remarks);
    Ok(Measured {
        table,
        id: spec.id,
        title: spec.title,
        unit: row.unit,
        figures,
        verdicts,
        remarks,
    })
}

/// A sample while the machine was ours, or the quietest of some.
fn quiet_sample(contender: &mut Contender, plan: &Plan) -> Res<Sample> {
    let mut best = (contender.run)()?;
    for _ in 0..plan.patience {
        if best.foreign <= QUIET {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        let again = (contender.run)()?;
        if again.foreign < best.foreign {
            best = again;
        }
    }
    Ok(best)
}

fn write_out(args: &Args, machine: &machine::Machine, results: &[Measured]) -> Res<()> {
    let p = &args.plan;
    let whole = args.only.is_empty() && !p.quick && !p.cpu && !p.alone;
    let docs = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/bench"));
    if whole {
        oracle::at(docs, std::fs::create_dir_all(docs))?;
    }
    let target = |given: &Option<PathBuf>, name: &str| {
        given.clone().or_else(|| whole.then(|| docs.join(name)))
    };
    let drawing = svg::draw(machine, results);
    let page = report::page(machine, results, &args.plan);
    for (path, text) in [
        (args.json.clone(), report::json(machine, results)),
        (target(&args.svg, "bench.svg"), drawing),
        (target(&args.md, "results.md"), page),
    ] {
        if let Some(path) = path {
            oracle::at(&path, std::fs::write(&path, text))?;
        }
    }
    Ok(())
}

/// A thread that waits for what ends a program, removes the images, and ends it.
fn clean_up_on_signals() -> Res<()> {
    // SAFETY: the set is filled by sigemptyset before it is used; threads made later inherit it.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
            libc::sigaddset(&mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    };
    let wait = move || {
        let mut signal = 0;
        // SAFETY: a set, and room for the answer.
        if unsafe { libc::sigwait(&set, &mut signal) } == 0 {
            ENDING.store(true, SeqCst);
            images::clean_up();
            eprintln!("\nqblk-bench: ended by signal {signal}; its images are removed");
            // Not exit(): the rest of the program is still at work.
            // SAFETY: ends the process.
            unsafe { libc::_exit(128 + signal) };
        }
    };
    std::thread::Builder::new()
        .spawn(wait)
        .map(drop)
        .map_err(|e| format!("a thread for signals: {e}"))
}
