//! The rows of NBD.

use super::blast::{self, Load, Until};
use super::fio::{self, Job};
use super::servers::{Aio, Launch, Program, Running, same_bytes};
use super::{Done, calls, client, memory};
use crate::Plan;
use crate::images::{Images, Kind, On, refresh};
use crate::row::{Against::*, Contender, Row, Target, Unit, Who};
use crate::rows::{Spec, to_know, to_reach};
use crate::work::{Res, Sample};
use Kind::{Served, ServedQcow2, Taken};
use On::{Disk, Tmpfs};

/// All rows, in the order of measuring.
pub const ROWS: &[Spec] = &[
    Spec {
        id: "nbd-read-4k",
        title: "NBD: 4 KiB random read, depth 16 (fio)",
        needs: &[(Served, Tmpfs), (Served, Disk)],
        build: read_4k,
    },
    Spec {
        id: "nbd-blast-4k",
        title: "NBD: the same, batching client",
        needs: &[(Served, Tmpfs), (Served, Disk)],
        build: blast_4k,
    },
    Spec {
        id: "nbd-read-4k-x4",
        title: "NBD: the same, four connections (fio)",
        needs: &[(Served, Tmpfs), (Served, Disk)],
        build: read_4k_by_four,
    },
    Spec {
        id: "nbd-cpu",
        title: "NBD: server's time per 4 KiB, depth 16",
        needs: &[(Served, Tmpfs), (Served, Disk)],
        build: cpu,
    },
    Spec {
        id: "nbd-depth-1",
        title: "NBD: 4 KiB random read, depth 1 (fio)",
        needs: &[(Served, Tmpfs), (Served, Disk)],
        build: depth_one,
    },
    Spec {
        id: "nbd-read-1m",
        title: "NBD: 1 MiB reads, depth 4 (fio)",
        needs: &[(Served, Tmpfs), (Served, Disk)],
        build: read_1m,
    },
    Spec {
        id: "nbd-read-1m-x4",
        title: "NBD: the same, four connections (fio)",
        needs: &[(Served, Tmpfs), (Served, Disk)],
        build: read_1m_by_four,
    },
    Spec {
        id: "nbd-copy-out",
        title: "NBD: nbdcopy to null, one connection",
        needs: &[(Served, Tmpfs), (Served, Disk)],
        build: copy_out,
    },
    Spec {
        id: "nbd-copy-out-x4",
        title: "NBD: nbdcopy to null, four connections",
        needs: &[(Served, Tmpfs), (Served, Disk)],
        build: copy_out_by_four,
    },
    Spec {
        id: "nbd-calls-1",
        title: "NBD: server's calls per 4 KiB, depth 1",
        needs: &[(Served, Tmpfs)],
        build: calls_one,
    },
    Spec {
        id: "nbd-calls-16",
        title: "NBD: server's calls per 4 KiB, depth 16",
        needs: &[(Served, Tmpfs)],
        build: calls_many,
    },
    Spec {
        id: "nbd-client-16",
        title: "NBD client: 4 KiB random read, 16 threads",
        needs: &[(Served, Tmpfs)],
        build: client_many,
    },
    Spec {
        id: "nbd-client-1",
        title: "NBD client: 4 KiB random read, depth 1",
        needs: &[(Served, Tmpfs)],
        build: client_one,
    },
    Spec {
        id: "nbd-client-calls-1",
        title: "NBD client: calls per 4 KiB, depth 1",
        needs: &[(Served, Tmpfs)],
        build: client_calls_one,
    },
    Spec {
        id: "nbd-client-calls-16",
        title: "NBD client: calls per 4 KiB, 16 threads",
        needs: &[(Served, Tmpfs)],
        build: client_calls_many,
    },
    Spec {
        id: "nbd-qcow2",
        title: "NBD: qcow2, 4 KiB random read, depth 16",
        needs: &[(ServedQcow2, Tmpfs), (Served, Tmpfs), (ServedQcow2, Disk)],
        build: qcow2,
    },
    Spec {
        id: "nbd-write-4k",
        title: "NBD: 4 KiB random write, depth 16 (fio)",
        needs: &[(Taken, Tmpfs)],
        build: write_4k,
    },
    Spec {
        id: "nbd-copy-in",
        title: "NBD: nbdcopy to the server",
        needs: &[(Taken, Tmpfs), (Served, Tmpfs)],
        build: copy_in,
    },
    Spec {
        id: "nbd-plugin",
        title: "NBD: a memory plugin in C, 4 KiB random read, depth 16 (fio)",
        needs: &[],
        build: crate::plugins::served,
    },
    Spec {
        id: "nbd-memory",
        title: "NBD: memory, 4 × 16 requests of 1 MiB",
        needs: &[(Taken, Tmpfs)],
        build: memory_peak,
    },
    Spec {
        id: "nbd-memory-idle",
        title: "NBD: memory, the same clients idle",
        needs: &[(Taken, Tmpfs)],
        build: memory_idle,
    },
];

/// Ways to run qemu-nbd, and where each is fair.
const WAYS: [(Aio, On); 4] =
    [(Aio::Threads, Tmpfs), (Aio::Uring, Tmpfs), (Aio::Native, Tmpfs), (Aio::Uring, Disk)];

/// A C plugin behind our server, and nbdkit with its own disk in memory, of `size` bytes each.
pub fn memory_disks<'a>(
    images: &'a Images,
    plan: &'a Plan,
    plugin: &str,
    size: u64,
) -> Vec<Contender<'a>> {
    let launch = |program, file: &str| Launch {
        program,
        file: file.into(),
        format: "raw",
        write: false,
        dir: images.dir(Tmpfs).to_owned(),
    };
    let disks = [
        (Who::Ours, launch(Program::Ours, plugin)),
        (Who::Nbdkit, launch(Program::NbdkitMemory, &size.to_string())),
    ];
    let disks = disks.into_iter().filter(|(who, _)| !plan.alone || *who == Who::Ours);
    disks.map(|(who, l)| contender(who, l, Tmpfs, with_fio(images, plan, FIO))).collect()
}

/// Ours may take so much of what another does.
fn to_take(against: crate::row::Against, at_most: f64) -> Target {
    Target { part: true, ..to_reach(against, at_most) }
}

/// What a server is to serve.
fn launch(images: &Images, program: Program, (kind, on): (Kind, On)) -> Launch {
    Launch {
        program,
        file: images.path(kind, on),
        format: if kind == ServedQcow2 { "qcow2" } else { "raw" },
        write: kind == Taken,
        dir: images.dir(Tmpfs).to_owned(),
    }
}

/// A server by itself and a load on it.
fn sample(launch: &Launch, on: On, load: &impl Fn(&Running) -> Res<Done>) -> Res<Sample> {
    if on == Disk {
        refresh(&launch.file)?;
    }
    let server = launch.start()?;
    server.warm_up(launch.write)?;
    server.measure(load)
}

fn contender<'a>(
    who: Who,
    launch: Launch,
    on: On,
    load: impl Fn(&Running) -> Res<Done> + 'a,
) -> Contender<'a> {
    let run = move || {
        let first = sample(&launch, on, &load);
        // nbdkit is known to abort now and then when a client hangs up: that ends no bench.
        match first {
            Err(_) if matches!(who, Who::Nbdkit | Who::QemuNbd(..)) => sample(&launch, on, &load),
            first => first,
        }
    };
    Contender { who, run: Box::new(run) }
}

/// Ours, and the others that can serve such a file, under one load.
fn servers<'a>(
    images: &'a Images,
    plan: &'a Plan,
    kind: Kind,
    unit: Unit,
    load: impl Fn(&Running) -> Res<Done> + Copy + 'a,
) -> Res<Row<'a>> {
    let of = |program, on| launch(images, program, (kind, on));
    if kind != Taken {
        same_bytes(&of(Program::Ours, Tmpfs), &images.path(Served, Tmpfs))?;
    }
    let mut contenders = vec![contender(Who::Ours, of(Program::Ours, Tmpfs), Tmpfs, load)];
    if kind == ServedQcow2 {
        let raw = launch(images, Program::Ours, (Served, Tmpfs));
        contenders.push(contender(Who::Base, raw, Tmpfs, load));
    } else {
        for (who, program) in [(Who::Mini, Program::Mini), (Who::Nbdkit, Program::Nbdkit)] {
            contenders.push(contender(who, of(program, Tmpfs), Tmpfs, load));
        }
    }
    let mut row = Row { unit, contenders, targets: Vec::new(), remarks: Vec::new() };
    if plan.alone {
        return Ok(row);
    }
    let mut ways = Vec::new();
    for (aio, on) in WAYS {
        // What is written to a disk's file system is written back at some time: not measured.
        if on == Disk && (kind == Taken || !images.has_disk()) {
            continue;
        }
        let launch = of(Program::Qemu(aio), on);
        // Every way is tried, and those that do best are measured.
        match sample(&launch, on, &load) {
            Ok(trial) => ways.push((unit.of(&trial), launch, aio, on)),
            Err(e) if aio == Aio::Threads => return Err(e),
            Err(_) => row.remarks.push(format!("qemu-nbd does not serve it by {aio:?}.")),
        }
    }
    ways.sort_by(|a, b| match unit.more_is_better() {
        true => b.0.total_cmp(&a.0),
        false => a.0.total_cmp(&b.0),
    });
    ways.truncate(if plan.quick { 1 } else { 2 });
    if ways.iter().any(|w| w.3 == Disk) {
        row.contenders.push(contender(Who::OursDisk, of(Program::Ours, Disk), Disk, load));
    }
    for (_, launch, aio, on) in ways {
        row.contenders.push(contender(Who::QemuNbd(aio, on), launch, on, load));
    }
    Ok(row)
}

/// A load by fio.
fn with_fio<'a>(
    images: &'a Images,
    plan: &'a Plan,
    job: Job,
) -> impl Fn(&Running) -> Res<Done> + Copy + 'a {
    move |server: &Running| fio::run(&server.uri(), images.served, &job, plan.seconds)
}

const FIO: Job = Job { kind: "randread", block: 4096, depth: 16, connections: 1 };

fn by_fio<'a>(
    images: &'a Images,
    plan: &'a Plan,
    kind: Kind,
    job: Job,
    targets: &[Target],
) -> Res<Row<'a>> {
    let mut row = servers(images, plan, kind, Unit::PerSecond, with_fio(images, plan, job))?;
    row.targets = targets.to_vec();
    Ok(row)
}

fn read_4k<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let targets = [to_reach(Nbdkit, 1.35), to_reach(QemuNbd, 2.2), to_know(Mini)];
    by_fio(images, plan, Served, FIO, &targets)
}

fn read_4k_by_four<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let targets = [to_reach(Nbdkit, 1.5), to_reach(QemuNbd, 2.5), to_know(Mini)];
    by_fio(images, plan, Served, Job { connections: 4, ..FIO }, &targets)
}

fn depth_one<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let targets = [to_reach(Nbdkit, 1.2), to_know(QemuNbd), to_know(Mini)];
    by_fio(images, plan, Served, Job { depth: 1, ..FIO }, &targets)
}

fn write_4k<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let targets = [to_reach(Nbdkit, 1.0), to_reach(QemuNbd, 2.0), to_know(Mini)];
    by_fio(images, plan, Taken, Job { kind: "randwrite", ..FIO }, &targets)
}

fn read_1m<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    large(images, plan, 1, 1.4)
}
fn read_1m_by_four<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    large(images, plan, 4, 1.6)
}

fn large<'a>(images: &'a Images, plan: &'a Plan, connections: usize, lead: f64) -> Res<Row<'a>> {
    let job = Job { kind: "read", block: 1 << 20, depth: 4, connections };
    by_fio(images, plan, Served, job, &[to_reach(NbdPeer, lead), to_know(Mini)])
}

fn qcow2<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let targets = [to_reach(QemuNbd, 2.2), to_reach(Base("raw"), 0.95)];
    by_fio(images, plan, ServedQcow2, FIO, &targets)
}

fn blast_4k<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let load = Load { block: 4096, depth: 16, connections: 1, write: false };
    let load = move |s: &Running| blast::run(&s.socket, &load, Until::Seconds(plan.seconds));
    let mut row = servers(images, plan, Served, Unit::PerSecond, load)?;
    row.targets = vec![to_reach(Nbdkit, 2.0), to_reach(QemuNbd, 3.0), to_reach(Mini, 0.9)];
    Ok(row)
}

fn cpu<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let mut row = servers(images, plan, Served, Unit::CpuMicros, with_fio(images, plan, FIO))?;
    row.targets =
        vec![to_take(Nbdkit, 0.6), to_take(QemuNbd, 0.3), Target { part: true, ..to_know(Mini) }];
    Ok(row)
}

fn copy_out<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    copy_to_null(images, plan, 1, 1.3)
}
fn copy_out_by_four<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    copy_to_null(images, plan, 4, 1.7)
}

fn copy_to_null<'a>(
    images: &'a Images,
    plan: &'a Plan,
    connections: usize,
    lead: f64,
) -> Res<Row<'a>> {
    let load = move |s: &Running| fio::copy(s.uri(), "null:", images.served, connections);
    let mut row = servers(images, plan, Served, Unit::BytesPerSecond, load)?;
    row.targets = vec![to_reach(NbdPeer, lead), to_know(Mini)];
    Ok(row)
}

fn copy_in<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let load = move |s: &Running| fio::copy(images.path(Served, Tmpfs), s.uri(), images.served, 4);
    let mut row = servers(images, plan, Taken, Unit::BytesPerSecond, load)?;
    row.targets = vec![to_reach(NbdPeer, 1.1), to_know(Mini)];
    Ok(row)
}

fn client_many<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    clients(images, plan, 16, 1.4)
}
fn client_one<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    clients(images, plan, 1, 1.1)
}

/// A sample of a client at a server.
type Measuring<'a> = Box<dyn Fn(&Running) -> Res<Sample> + 'a>;

/// Our client and libnbd, by fio, at the server that does least.
fn clients<'a>(images: &'a Images, plan: &'a Plan, depth: usize, lead: f64) -> Res<Row<'a>> {
    let mini = launch(images, Program::Mini, (Served, Tmpfs));
    let at_mini = |who, load: Measuring<'a>| {
        let launch = mini.clone();
        let run = move || {
            let server = launch.start()?;
            server.warm_up(false)?;
            load(&server)
        };
        Contender { who, run: Box::new(run) }
    };
    let ours = |connections| {
        Box::new(move |s: &Running| client::reads(s, depth, connections, plan.seconds))
    };
    let fio = with_fio(images, plan, Job { depth, ..FIO });
    let mut contenders = vec![
        at_mini(Who::Ours, ours(None)),
        at_mini(Who::Libnbd, Box::new(move |s| client::others(s, fio))),
    ];
    let mut targets = vec![to_reach(Libnbd, lead)];
    if depth > 1 {
        // What is due to several connections, which ours opens by itself, is seen from this.
        contenders.push(at_mini(Who::Base, ours(Some(1))));
        targets.push(to_know(Base("by one connection")));
    }
    let remarks = vec![
        "Threads on one handle beside fio with libnbd, at mini. Processor time: the client's."
            .to_owned(),
    ];
    Ok(Row { unit: Unit::PerSecond, contenders, targets, remarks })
}

fn calls_one<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    server_calls(images, 1, 3.0)
}
fn calls_many<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    server_calls(images, 16, 1.3)
}

fn counted(calls: Res<std::collections::BTreeMap<String, f64>>) -> Res<Sample> {
    calls.map(|c| Sample { value: calls::sum(&c), cpu_us: 0.0, foreign: 0.0 })
}

fn server_calls<'a>(images: &'a Images, depth: usize, at_most: f64) -> Res<Row<'a>> {
    let ours = launch(images, Program::Ours, (Served, Tmpfs));
    let kit = launch(images, Program::Nbdkit, (Served, Tmpfs));
    let remark = calls::show(&calls::of_server(&ours, depth)?);
    let ours = move || counted(calls::of_server(&ours, depth));
    let kit = move || counted(calls::of_server(&kit, depth));
    Ok(Row {
        unit: Unit::Calls,
        contenders: vec![
            Contender { who: Who::Ours, run: Box::new(ours) },
            Contender { who: Who::Nbdkit, run: Box::new(kit) },
        ],
        targets: vec![to_reach(AtMost(at_most), at_most), Target { part: true, ..to_know(Nbdkit) }],
        remarks: vec![format!("By strace, batching client: {remark}.")],
    })
}

fn client_calls_one<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    client_calls(images, 1, 2.0)
}
fn client_calls_many<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    client_calls(images, 16, 0.5)
}

fn client_calls<'a>(images: &'a Images, threads: usize, at_most: f64) -> Res<Row<'a>> {
    let mini = launch(images, Program::Mini, (Served, Tmpfs));
    let count = move || calls::of_client(&mini.start()?, &mini.dir, threads);
    let remark = calls::show(&count()?);
    let ours = move || counted(count());
    Ok(Row {
        unit: Unit::Calls,
        contenders: vec![Contender { who: Who::Ours, run: Box::new(ours) }],
        targets: vec![to_reach(AtMost(at_most), at_most)],
        remarks: vec![format!("By strace: {remark}.")],
    })
}

fn memory_peak<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    memory_of(images, false, 15.0)
}
fn memory_idle<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    memory_of(images, true, 8.0)
}

fn memory_of<'a>(images: &'a Images, idle: bool, at_most: f64) -> Res<Row<'a>> {
    let of = |program| launch(images, program, (Taken, Tmpfs));
    let files = memory::needed(&of(Program::Ours), false)?.files as f64 / 1024.0;
    let run = |who, program| {
        let launch = of(program);
        let run = move || {
            let needed = memory::needed(&launch, idle)?;
            Ok(memory::sample(if idle { needed.idle } else { needed.peak }))
        };
        Contender { who, run: Box::new(run) as Box<dyn FnMut() -> Res<Sample>> }
    };
    Ok(Row {
        unit: Unit::MiB,
        contenders: vec![
            run(Who::Ours, Program::Ours),
            run(Who::Nbdkit, Program::Nbdkit),
            run(Who::QemuNbd(Aio::Threads, Tmpfs), Program::Qemu(Aio::Threads)),
        ],
        targets: vec![
            to_reach(AtMost(at_most), at_most),
            Target { part: true, ..to_know(Nbdkit) },
            Target { part: true, ..to_know(QemuNbd) },
        ],
        remarks: vec![format!(
            "Reads, then writes. Resident; {files:.1} MiB of ours are the program and its libraries."
        )],
    })
}
