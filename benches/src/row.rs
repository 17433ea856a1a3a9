//! A row of the table: who does the same work, measured in turns, and what is to be reached.

use crate::images::On;
use crate::nbd::Aio;
use crate::qemu::How;
use crate::work::{Res, Sample};

/// Who did it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Who {
    /// libqblk.
    Ours,
    /// libqblk, with the image on a disk's file system.
    OursDisk,
    /// libqblk where it has less to do: by one thread, on an image without a chain.
    Base,
    /// Plain system calls.
    Limit,
    /// Plain system calls where they have less to do.
    LimitBase,
    /// imago.
    Imago,
    /// `qemu-img bench`.
    Qemu(How, On),
    /// Another program of qemu.
    QemuTool,
    /// qemu-nbd.
    QemuNbd(Aio, On),
    /// nbdkit.
    Nbdkit,
    /// libnbd, by fio.
    Libnbd,
    /// The server that does least.
    Mini,
}

/// What is compared with what ours did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Against {
    /// [`Who::Limit`], by this name.
    Limit(&'static str),
    /// [`Who::Base`], by this name.
    Base(&'static str),
    /// Not ours at all: [`Who::Limit`] over [`Who::LimitBase`], what the machine makes possible.
    Machine(&'static str),
    /// imago.
    Imago,
    /// The better of the ways to run qemu.
    Qemu,
    /// The better of the ways to run qemu-nbd.
    QemuNbd,
    /// nbdkit.
    Nbdkit,
    /// nbdkit or qemu-nbd, whichever is better.
    NbdPeer,
    /// libnbd.
    Libnbd,
    /// The server that does least.
    Mini,
    /// Nobody: ours must not exceed this many of the row's unit.
    AtMost(f64),
}

/// Something to reach, or only to know.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What is compared.
    pub against: Against,
    /// Our rate over the other's must be so much; `None` = it is only shown.
    pub at_least: Option<f64>,
    /// Where less is better: ours as a part of the other's, and `at_least` is at most.
    pub part: bool,
}

/// What a row's figures are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unit {
    /// Requests a second; more is better.
    PerSecond,
    /// Requests a second and processor: what a processor could do if it did nothing else.
    PerCpuSecond,
    /// Microseconds; less is better.
    Micros,
    /// Microseconds of processor time; less is better.
    CpuMicros,
    /// Nanoseconds; less is better.
    Nanos,
    /// Milliseconds; less is better.
    Millis,
    /// MiB; less is better.
    MiB,
    /// Bytes a second; more is better.
    BytesPerSecond,
    /// System calls; fewer are better.
    Calls,
}

impl Unit {
    /// The figure of a sample that counts.
    pub fn of(self, s: &Sample) -> f64 {
        match self {
            Self::PerCpuSecond => 1e6 / s.cpu_us.max(1e-3),
            Self::CpuMicros => s.cpu_us,
            _ => s.value,
        }
    }

    /// The same by processor time, where that means something.
    pub fn by_cpu(self) -> Self {
        match self {
            Self::PerSecond => Self::PerCpuSecond,
            Self::Micros => Self::CpuMicros,
            other => other,
        }
    }

    /// Else less is.
    pub fn more_is_better(self) -> bool {
        matches!(self, Self::PerSecond | Self::PerCpuSecond | Self::BytesPerSecond)
    }

    /// Short, for a table.
    pub fn show(self, v: f64) -> String {
        match self {
            Self::PerSecond | Self::PerCpuSecond if v >= 1e6 => format!("{:.2}M/s", v / 1e6),
            Self::PerSecond | Self::PerCpuSecond if v >= 1e5 => format!("{:.0}k/s", v / 1e3),
            Self::PerSecond | Self::PerCpuSecond if v >= 1e3 => format!("{:.1}k/s", v / 1e3),
            Self::PerSecond | Self::PerCpuSecond => format!("{v:.0}/s"),
            Self::Micros | Self::CpuMicros => format!("{v:.1} µs"),
            Self::Nanos => format!("{v:.0} ns"),
            Self::Millis => format!("{v:.2} ms"),
            Self::MiB => format!("{v:.2} MiB"),
            Self::BytesPerSecond => format!("{:.2} GB/s", v / 1e9),
            Self::Calls => format!("{v:.2}"),
        }
    }

    /// For JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerSecond => "requests/s",
            Self::PerCpuSecond => "requests/cpu-s",
            Self::Micros => "us",
            Self::CpuMicros => "cpu-us",
            Self::Nanos => "ns",
            Self::Millis => "ms",
            Self::MiB => "MiB",
            Self::BytesPerSecond => "bytes/s",
            Self::Calls => "calls",
        }
    }
}

/// One who takes part.
pub struct Contender<'a> {
    /// Who it is.
    pub who: Who,
    /// Take a sample.
    pub run: Box<dyn FnMut() -> Res<Sample> + 'a>,
}

/// A row that can be measured.
pub struct Row<'a> {
    /// What the figures are.
    pub unit: Unit,
    /// All who take part, in turns.
    pub contenders: Vec<Contender<'a>>,
    /// What is to be reached.
    pub targets: Vec<Target>,
    /// What a reader should know.
    pub remarks: Vec<String>,
}

/// What one of them reached.
pub struct Figures {
    /// Who.
    pub who: Who,
    /// All samples, in order.
    pub samples: Vec<Sample>,
}

impl Figures {
    /// The median of what counts.
    pub fn median(&self, unit: Unit) -> f64 {
        median(self.samples.iter().map(|s| unit.of(s)))
    }

    /// The median processor time of a request, microseconds.
    pub fn cpu_us(&self) -> f64 {
        median(self.samples.iter().map(|s| s.cpu_us))
    }

    /// The most that others used of the processors while a sample ran.
    pub fn foreign(&self) -> f64 {
        self.samples.iter().fold(0.0, |m, s| s.foreign.max(m))
    }
}

/// How ours stands to another.
pub struct Verdict {
    /// "× pread(2)".
    pub what: String,
    /// Ratio of medians; for [`Against::AtMost`] the figure itself.
    pub value: f64,
    /// The least and the greatest ratio of two samples that were taken after each other.
    pub spread: (f64, f64),
    /// The words of the target; empty if there is none.
    pub need: String,
    /// How far along: 1 = just reached. `None` = there is no target.
    pub score: Option<f64>,
    /// The figure, in words.
    pub shown: String,
}

impl Verdict {
    /// Whether it is reached, by what is shown: two digits.
    pub fn ok(&self) -> bool {
        self.score.is_none_or(|s| s >= 0.995)
    }
}

/// Where a row is shown: who the others are differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Beside plain calls, imago, qemu-img.
    Images,
    /// Beside the least server, nbdkit, libnbd, qemu-nbd.
    Nbd,
}

/// A measured row.
pub struct Result {
    /// Where it is shown.
    pub table: Table,
    /// Its short name.
    pub id: &'static str,
    /// What was done.
    pub title: &'static str,
    /// What the figures are.
    pub unit: Unit,
    /// What each reached.
    pub figures: Vec<Figures>,
    /// How ours stands to them.
    pub verdicts: Vec<Verdict>,
    /// What a reader should know.
    pub remarks: Vec<String>,
}

impl Result {
    /// What one of them reached.
    pub fn get(&self, who: Who) -> Option<&Figures> {
        self.figures.iter().find(|f| f.who == who)
    }

    /// The run of qemu that ours leads least.
    pub fn best_qemu(&self) -> Option<&Figures> {
        best_qemu(&self.figures, self.unit).map(|(_, q)| q)
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut v: Vec<f64> = values.collect();
    v.sort_by(f64::total_cmp);
    match v.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => v[n / 2],
        n => (v[n / 2 - 1] + v[n / 2]) / 2.0,
    }
}

fn find(figures: &[Figures], who: Who) -> Option<&Figures> {
    figures.iter().find(|f| f.who == who)
}

/// Ours over another: more than 1 = ours is better.
fn lead(unit: Unit, ours: f64, other: f64) -> f64 {
    if unit.more_is_better() { ours / other } else { other / ours }
}

/// The run of qemu that ours leads least, and what of ours it is compared with: that on the same
/// file system.
fn best_qemu(figures: &[Figures], unit: Unit) -> Option<(&Figures, &Figures)> {
    let pairs = figures.iter().filter_map(|q| {
        let ours = match q.who {
            Who::Qemu(_, On::Disk) | Who::QemuNbd(_, On::Disk) => find(figures, Who::OursDisk)?,
            Who::Qemu(..) | Who::QemuNbd(..) | Who::QemuTool => find(figures, Who::Ours)?,
            _ => return None,
        };
        Some((lead(unit, ours.median(unit), q.median(unit)), (ours, q)))
    });
    pairs.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, pair)| pair)
}

/// Compare what was measured with what is to be reached. A rival that could not take part has no
/// verdict.
pub fn judge(figures: &[Figures], unit: Unit, targets: &[Target]) -> Vec<Verdict> {
    targets.iter().filter_map(|t| verdict(figures, unit, t)).collect()
}

fn verdict(figures: &[Figures], unit: Unit, target: &Target) -> Option<Verdict> {
    let ours = find(figures, Who::Ours)?;
    let (what, ours, other) = match target.against {
        Against::AtMost(most) => {
            let value = ours.median(unit);
            let all = ours.samples.iter().map(|s| unit.of(s));
            return Some(Verdict {
                what: String::new(),
                value,
                spread: (all.clone().fold(f64::MAX, f64::min), all.fold(0.0, f64::max)),
                need: format!("≤ {}", short_number(most, unit)),
                score: Some(most / value),
                shown: unit.show(value),
            });
        }
        Against::Limit(name) => (format!("× {name}"), ours, find(figures, Who::Limit)?),
        Against::Base(name) => (format!("× {name}"), ours, find(figures, Who::Base)?),
        Against::Machine(name) => {
            let (two, one) = (find(figures, Who::Limit)?, find(figures, Who::LimitBase)?);
            (name.to_owned(), two, one)
        }
        Against::Imago => ("× imago".to_owned(), ours, find(figures, Who::Imago)?),
        Against::Qemu => {
            let (ours, other) = best_qemu(figures, unit)?;
            ("× qemu".to_owned(), ours, other)
        }
        Against::QemuNbd => {
            let (ours, other) = best_qemu(figures, unit)?;
            ("× qemu-nbd".to_owned(), ours, other)
        }
        Against::Nbdkit => ("× nbdkit".to_owned(), ours, find(figures, Who::Nbdkit)?),
        Against::Libnbd => ("× libnbd".to_owned(), ours, find(figures, Who::Libnbd)?),
        Against::Mini => ("× mini".to_owned(), ours, find(figures, Who::Mini)?),
        Against::NbdPeer => {
            let by_nbdkit = find(figures, Who::Nbdkit).map(|n| ("× nbdkit", ours, n));
            let by_qemu = best_qemu(figures, unit).map(|(o, q)| ("× qemu-nbd", o, q));
            let led = |p: &(_, &Figures, &Figures)| lead(unit, p.1.median(unit), p.2.median(unit));
            let (name, ours, other) = [by_nbdkit, by_qemu]
                .into_iter()
                .flatten()
                .min_by(|a, b| led(a).total_cmp(&led(b)))?;
            (name.to_owned(), ours, other)
        }
    };
    let lead = |unit, ours: f64, other: f64| {
        if target.part { ours / other } else { lead(unit, ours, other) }
    };
    let value = lead(unit, ours.median(unit), other.median(unit));
    let pairs = ours.samples.iter().zip(&other.samples);
    let ratios: Vec<f64> = pairs.map(|(a, b)| lead(unit, unit.of(a), unit.of(b))).collect();
    let spread = (
        ratios.iter().copied().fold(f64::MAX, f64::min),
        ratios.iter().copied().fold(0.0, f64::max),
    );
    let shown = format!("{} {what}", two_digits(value));
    let sign = if target.part { "≤" } else { "≥" };
    let need = target.at_least.map(|n| format!("{sign} {n}")).unwrap_or_default();
    let score = target.at_least.map(|n| if target.part { n / value } else { value / n });
    Some(Verdict { what, value, spread, need, score, shown })
}

fn short_number(v: f64, unit: Unit) -> String {
    match unit {
        Unit::Micros | Unit::CpuMicros => format!("{v:.0} µs"),
        Unit::Nanos => format!("{v} ns"),
        Unit::Millis => format!("{v} ms"),
        Unit::Calls => v.to_string(),
        _ => format!("{v} MiB"),
    }
}

/// A ratio with as many digits as mean something.
pub fn two_digits(v: f64) -> String {
    match v {
        _ if v >= 10.0 => format!("{v:.0}"),
        _ if v >= 3.0 => format!("{v:.1}"),
        _ => format!("{v:.2}"),
    }
}
