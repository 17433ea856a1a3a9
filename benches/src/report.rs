//! The table, the page and the figures for machines.

use std::fmt::Write;

use crate::Plan;
use crate::images::On;
use crate::machine::Machine;
use crate::nbd::Aio;
use crate::row::{Figures, Result, Table, Unit, Verdict, Who};

/// A column's text, cut or filled to its width in characters.
fn column(text: &str, width: usize) -> String {
    format!("{text:<width$}")
}

const WIDTHS: [usize; 8] = [43, 11, 13, 10, 15, 41, 10, 5];

fn print_cells(cells: [&str; 8]) {
    let cells: Vec<String> = cells.iter().zip(WIDTHS).map(|(c, w)| column(c, w)).collect();
    println!("{}", cells.join(" ").trim_end());
}

/// Who the columns of a table are.
fn columns(table: Table) -> [&'static str; 4] {
    match table {
        Table::Images => ["ours", "pread/pwrite", "imago", "qemu"],
        Table::Nbd => ["ours", "mini", "nbdkit/libnbd", "qemu-nbd"],
    }
}

/// A table's head.
pub fn head(table: Table) {
    let [ours, limit, peer, qemu] = columns(table);
    println!();
    print_cells(["work", ours, limit, peer, qemu, "ratio (of neighbours)", "to reach", ""]);
    println!("{}", "-".repeat(WIDTHS.iter().sum::<usize>() + WIDTHS.len()));
}

/// One row of the table; a line for each thing to reach.
pub fn line(r: &Result) {
    let [ours, limit, imago, qemu] = cells(r);
    let mut first = [r.title, &ours, &limit, &imago, &qemu];
    for v in &r.verdicts {
        let ratio = with_spread(v);
        print_cells([first[0], first[1], first[2], first[3], first[4], &ratio, &v.need, mark(v)]);
        first = [""; 5];
    }
}

fn mark(v: &Verdict) -> &'static str {
    match v.score {
        None => "",
        Some(_) if v.ok() => "ok",
        Some(_) => "SHORT",
    }
}

fn with_spread(v: &Verdict) -> String {
    let (low, high) = v.spread;
    match v.what.is_empty() {
        true => v.shown.clone(),
        false => format!(
            "{} ({}…{})",
            v.shown,
            crate::row::two_digits(low),
            crate::row::two_digits(high)
        ),
    }
}

/// Who is in the second and third column.
fn limit_and_peer(r: &Result) -> (Option<&Figures>, Option<&Figures>) {
    match r.table {
        Table::Images => (r.get(Who::Limit), r.get(Who::Imago)),
        Table::Nbd => (r.get(Who::Mini), r.get(Who::Nbdkit).or(r.get(Who::Libnbd))),
    }
}

/// What each reached, as [`columns`] has them.
fn cells(r: &Result) -> [String; 4] {
    let show = |f: Option<&Figures>| f.map_or("-".to_owned(), |f| r.unit.show(f.median(r.unit)));
    let qemu = r.best_qemu().map_or("-".to_owned(), |q| {
        let way = match q.who {
            Who::Qemu(how, on) => {
                format!(" {}{}", how.short(), if on == On::Disk { "*" } else { "" })
            }
            Who::QemuNbd(aio, on) => {
                format!(" {}{}", letter(aio), if on == On::Disk { "*" } else { "" })
            }
            _ => String::new(),
        };
        format!("{}{way}", r.unit.show(q.median(r.unit)))
    });
    let (limit, peer) = limit_and_peer(r);
    [show(r.get(Who::Ours)), show(limit), show(peer), qemu]
}

/// Short, for a table.
fn letter(aio: Aio) -> char {
    match aio {
        Aio::Threads => 't',
        Aio::Uring => 'u',
        Aio::Native => 'n',
    }
}

/// What is short of its target, and where the machine was not quiet.
pub fn summary(results: &[Result]) {
    println!(
        "\nqemu: t1, t16 = threads, depth 1 and 16; u = io_uring; n = native, past the page cache; * = on a disk's file system, and compared with ours there."
    );
    let (met, short) = count(results);
    println!("{met} of {} targets reached.", met + short);
    for r in results {
        for v in r.verdicts.iter().filter(|v| !v.ok()) {
            println!("  short: {}: {}, to reach {}", r.title, v.shown, v.need);
        }
    }
    let noisy: Vec<&str> =
        results.iter().filter(|r| noise(r) > crate::QUIET).map(|r| r.id).collect();
    if !noisy.is_empty() {
        println!(
            "Not quiet: other programs used more than half a processor during samples of {}. \
             The figures of these rows are rough.",
            noisy.join(", ")
        );
    }
}

/// Targets reached, and not.
pub fn count(results: &[Result]) -> (usize, usize) {
    let with_target = || results.iter().flat_map(|r| &r.verdicts).filter(|v| v.score.is_some());
    let met = with_target().filter(|v| v.ok()).count();
    (met, with_target().count() - met)
}

fn noise(r: &Result) -> f64 {
    r.figures.iter().map(Figures::foreign).fold(0.0, f64::max)
}

/// docs/bench/results.md.
pub fn page(machine: &Machine, results: &[Result], plan: &Plan) -> String {
    let (met, short) = count(results);
    let mut p = String::new();
    let _ = writeln!(
        p,
        "# What libqblk reaches\n\n\
         Written by `make bench`; the drawing of the same figures is [bench.svg](bench.svg).\n\n\
         | | |\n|---|---|\n\
         | date | {} |\n| processor | {}, {} cores |\n| memory | {} GiB |\n| system | {}, {} |\n\
         | libqblk | {} |\n| qemu-img | {} |\n| imago | {}, feature `sync` |",
        machine.date,
        machine.cpu,
        machine.cores,
        machine.memory_gib,
        machine.system,
        machine.kernel,
        machine.qblk,
        machine.qemu,
        machine.imago
    );
    if let Some(nbd) = &machine.nbd {
        let _ = writeln!(p, "| NBD | {nbd} |");
    }
    let _ = writeln!(p, "\n{met} of {} targets reached.", met + short);
    let (size, small, served) = match plan.quick {
        true => ("1 GiB", "128 MiB", "256 MiB"),
        false => ("4 GiB", "512 MiB", "1 GiB"),
    };
    let how = format!(
        "Medians of {} samples of {} s, taken in turns. In brackets the least and the greatest ratio \
         of two samples that were taken one after the other.",
        plan.samples, plan.seconds
    );
    let images = format!(
        "Images have {size} (compressed ones {small}) in clusters of 64 KiB and lie in memory. {how} \
         qemu: `qemu-img bench` by its own clock, the way that does best of t1, t16 (threads, depth 1 \
         and 16) and u1, u16 (io_uring); \\* is on a disk's file system, compared with libqblk there. \
         \"Per core\": requests per second of processor time."
    );
    let nbd = format!(
        "Servers are processes at a Unix socket that serve a raw file of {served}, in memory, and are \
         started anew for each sample. {how} mini: a server that does the least a server can do, and \
         checks nothing; the batching client sends and receives many requests at a time, where fio and \
         nbdcopy end where libnbd ends. qemu-nbd: the way that does best of t (threads), u (io_uring), n \
         (native, past the page cache); \\* is on a disk's file system, compared with libqblk there."
    );
    for (table, title, text) in [(Table::Images, "Images", images), (Table::Nbd, "Over NBD", nbd)] {
        let rows: Vec<&Result> = results.iter().filter(|r| r.table == table).collect();
        if !rows.is_empty() {
            let _ = writeln!(p, "\n## {title}\n");
            ratios(&mut p, table, &rows);
            let _ = writeln!(p, "\n{text}");
        }
    }
    if plan.cpu {
        p.push_str(
            "\nThe machine was shared, so ratios are of requests per second of processor time, but \
             for those of two threads.\n",
        );
    }
    for (table, title) in [
        (Table::Images, "Processor time of one request, and notes"),
        (Table::Nbd, "Over NBD: the server's processor time of one request or MiB, and notes"),
    ] {
        let rows: Vec<&Result> = results.iter().filter(|r| r.table == table).collect();
        if !rows.is_empty() {
            let _ = writeln!(p, "\n## {title}\n");
            times(&mut p, table, &rows);
        }
    }
    p
}

fn ratios(p: &mut String, table: Table, results: &[&Result]) {
    let _ = writeln!(
        p,
        "| work | {} | ratio of medians (of neighbours) | to reach | |",
        columns(table).join(" | ")
    );
    p.push_str("|---|---|---|---|---|---|---|---|\n");
    for r in results {
        let [ours, limit, imago, qemu] = cells(r).map(|c| c.replace('*', "\\*"));
        let mut first = [r.title, &ours, &limit, &imago, &qemu];
        for v in &r.verdicts {
            let _ = writeln!(
                p,
                "| {} | {} | {} | {} | {} | {} | {} | {} |",
                first[0],
                first[1],
                first[2],
                first[3],
                first[4],
                with_spread(v),
                v.need,
                mark(v)
            );
            first = [""; 5];
        }
    }
}

fn times(p: &mut String, table: Table, results: &[&Result]) {
    let _ = writeln!(p, "| work | {} | |\n|---|---|---|---|---|---|", columns(table).join(" | "));
    for r in results {
        let cpu = |f: Option<&Figures>| match f.map(Figures::cpu_us) {
            Some(us) if us >= 100.0 => format!("{us:.0} µs"),
            Some(us) if us > 0.0 => format!("{us:.2} µs"),
            _ => "-".to_owned(),
        };
        let mut remarks = r.remarks.join(" ");
        if noise(r) > crate::QUIET {
            remarks.push_str(" The machine was not quiet.");
        }
        let (limit, peer) = limit_and_peer(r);
        let _ = writeln!(
            p,
            "| {} | {} | {} | {} | {} | {} |",
            r.title,
            cpu(r.get(Who::Ours)),
            cpu(limit),
            cpu(peer),
            cpu(r.best_qemu()),
            remarks.trim()
        );
    }
}

/// All figures, for machines.
pub fn json(machine: &Machine, results: &[Result]) -> String {
    let text = |s: &str| format!("\"{}\"", s.replace('\\', "\\\\").replace('"', "\\\""));
    let number = |v: f64| if v.is_finite() { format!("{v:.4}") } else { "null".to_owned() };
    let rows: Vec<String> = results
        .iter()
        .map(|r| {
            let figures: Vec<String> = r
                .figures
                .iter()
                .map(|f| {
                    let of = |get: fn(&crate::work::Sample) -> f64| {
                        f.samples.iter().map(|s| number(get(s))).collect::<Vec<_>>().join(",")
                    };
                    format!(
                        "{{\"who\":{},\"median\":{},\"samples\":[{}],\"cpu_us\":[{}],\"foreign_cpus\":[{}]}}",
                        text(&name(f.who)),
                        number(f.median(r.unit)),
                        of(|s| s.value),
                        of(|s| s.cpu_us),
                        of(|s| s.foreign)
                    )
                })
                .collect();
            let verdicts: Vec<String> = r
                .verdicts
                .iter()
                .map(|v| {
                    format!(
                        "{{\"against\":{},\"value\":{},\"low\":{},\"high\":{},\"need\":{},\"ok\":{}}}",
                        text(v.what.trim_start_matches("× ")),
                        number(v.value),
                        number(v.spread.0),
                        number(v.spread.1),
                        text(&v.need),
                        v.ok()
                    )
                })
                .collect();
            format!(
                "{{\"id\":{},\"work\":{},\"unit\":{},\"figures\":[{}],\"verdicts\":[{}]}}",
                text(r.id),
                text(r.title),
                text(Unit::name(r.unit)),
                figures.join(","),
                verdicts.join(",")
            )
        })
        .collect();
    let m = machine;
    let about: Vec<String> = [
        ("date", &m.date),
        ("cpu", &m.cpu),
        ("kernel", &m.kernel),
        ("system", &m.system),
        ("qblk", &m.qblk),
        ("qemu", &m.qemu),
        ("imago", &m.imago),
    ]
    .iter()
    .map(|(k, v)| format!("\"{k}\":{}", text(v)))
    .collect();
    format!(
        "{{\"machine\":{{{},\"cores\":{},\"memory_gib\":{}}},\"rows\":[\n{}\n]}}\n",
        about.join(","),
        m.cores,
        m.memory_gib,
        rows.join(",\n")
    )
}

/// A name for machines.
fn name(who: Who) -> String {
    match who {
        Who::Ours => "ours".to_owned(),
        Who::OursDisk => "ours@disk".to_owned(),
        Who::Base => "base".to_owned(),
        Who::Limit => "limit".to_owned(),
        Who::LimitBase => "limit-base".to_owned(),
        Who::Imago => "imago".to_owned(),
        Who::Qemu(how, On::Tmpfs) => format!("qemu-{}", how.short()),
        Who::Qemu(how, On::Disk) => format!("qemu-{}@disk", how.short()),
        Who::QemuTool => "qemu-img".to_owned(),
        Who::QemuNbd(aio, On::Tmpfs) => format!("qemu-nbd-{}", letter(aio)),
        Who::QemuNbd(aio, On::Disk) => format!("qemu-nbd-{}@disk", letter(aio)),
        Who::Nbdkit => "nbdkit".to_owned(),
        Who::Libnbd => "libnbd".to_owned(),
        Who::Mini => "mini".to_owned(),
    }
}
