//! The rows of the table: every kind of work, who does it, and what is to be reached.

use std::path::{Path, PathBuf};

use crate::Plan;
use crate::checking;
use crate::contenders::*;
use crate::durable;
use crate::images::{CLUSTER, Images, Kind, On, PIECE, create, overlay};
use crate::oracle::{CopyOnWrite, Oracle, Plain, TwoReads, Zeroes, at};
use crate::plugins;
use crate::process;
use crate::rivals::{Imago, Ours, OursByC};
use crate::row::{Against::*, Contender, Row, Target, Unit, Who};
use crate::work::{Pattern, Res, Work, drive, golden_step};

/// A row, before it is made ready.
pub struct Spec {
    /// Its short name, for `--only`.
    pub id: &'static str,
    /// What is done.
    pub title: &'static str,
    /// Images that it needs.
    pub needs: &'static [(Kind, On)],
    /// Make it ready.
    pub build: for<'a> fn(&'a Images, &'a Plan) -> Res<Row<'a>>,
}

use Kind::*;
use On::{Disk, Tmpfs};

/// All rows, in the order of measuring: those that need the same images stand together.
pub const ROWS: &[Spec] = &[
    Spec {
        id: "read-4k",
        title: "4 KiB random read",
        needs: &[(Full, Tmpfs), (Full, Disk)],
        build: read_4k,
    },
    Spec {
        id: "read-4k-c",
        title: "4 KiB random read, C functions",
        needs: &[(Full, Tmpfs)],
        build: read_4k_c,
    },
    Spec {
        id: "read-4k-2",
        title: "4 KiB random read, two threads, one handle",
        needs: &[(Full, Tmpfs)],
        build: read_4k_2,
    },
    Spec {
        id: "read-4k-mmap",
        title: "4 KiB random read, io=mmap",
        needs: &[(Full, Tmpfs)],
        build: read_4k_mmap,
    },
    Spec {
        id: "overwrite-4k",
        title: "4 KiB overwrite",
        needs: &[(Full, Tmpfs)],
        build: overwrite,
    },
    Spec { id: "read-64k", title: "64 KiB random read", needs: &[(Full, Tmpfs)], build: read_64k },
    Spec {
        id: "read-64k-2",
        title: "64 KiB random read, two threads",
        needs: &[(Full, Tmpfs)],
        build: read_64k_2,
    },
    Spec { id: "read-1m", title: "1 MiB random read", needs: &[(Full, Tmpfs)], build: read_1m },
    Spec {
        id: "read-1m-2",
        title: "1 MiB random read, two threads",
        needs: &[(Full, Tmpfs)],
        build: read_1m_2,
    },
    Spec {
        id: "check",
        title: "check of an image with 256 GiB allocated",
        needs: &[],
        build: checking::time,
    },
    Spec {
        id: "check-memory",
        title: "memory that this check needs",
        needs: &[],
        build: checking::memory,
    },
    Spec { id: "open", title: "open, read 4 KiB, close", needs: &[(Full, Tmpfs)], build: open_one },
    Spec {
        id: "open-chain",
        title: "open, read 4 KiB, close, chain of eight",
        needs: &[(Bottom, Tmpfs)],
        build: open_chain,
    },
    Spec {
        id: "lock",
        title: "what locks add to opening a file",
        needs: &[(Empty, Tmpfs)],
        build: lock_one,
    },
    Spec {
        id: "chain-bottom",
        title: "4 KiB random read, chain of 8, data below",
        needs: &[(Bottom, Tmpfs)],
        build: chain_bottom,
    },
    Spec {
        id: "cow-qcow2",
        title: "4 KiB random write over qcow2 (COW)",
        needs: &[(Full, Tmpfs), (Full, Disk)],
        build: cow_qcow2,
    },
    Spec {
        id: "memory",
        title: "memory, one image open",
        needs: &[(Full, Tmpfs)],
        build: memory_full,
    },
    Spec { id: "info", title: "qblk info, whole process", needs: &[(Full, Tmpfs)], build: info },
    Spec {
        id: "chain-spread",
        title: "4 KiB random read, chain of 8, data in all",
        needs: &[(Spread, Tmpfs)],
        build: chain_spread,
    },
    Spec {
        id: "cow-raw",
        title: "4 KiB random write over raw (COW)",
        needs: &[(Full, Tmpfs), (Raw, Tmpfs), (Raw, Disk)],
        build: cow_raw,
    },
    Spec { id: "new-4k", title: "4 KiB random write, new image", needs: &[], build: new_image },
    Spec {
        id: "new-4k-sub",
        title: "4 KiB random write, new image, extended L2",
        needs: &[],
        build: new_subclusters,
    },
    Spec {
        id: "cow-raw-sub",
        title: "4 KiB random write over raw, extended L2",
        needs: &[(Raw, Tmpfs), (Raw, Disk)],
        build: over_subclusters,
    },
    Spec {
        id: "unallocated-4k",
        title: "4 KiB random read, unallocated",
        needs: &[(Empty, Tmpfs), (Empty, Disk)],
        build: unallocated,
    },
    Spec {
        id: "tib-4k",
        title: "4 KiB random read, 1 TiB, all L2 in use",
        needs: &[(Tib, Tmpfs), (Tib, Disk)],
        build: tib,
    },
    Spec {
        id: "memory-tib",
        title: "memory, 1 TiB image open",
        needs: &[(Tib, Tmpfs)],
        build: memory_tib,
    },
    Spec {
        id: "zlib-64k",
        title: "zlib, 64 KiB random, per core",
        needs: &[(Zlib, Tmpfs), (Zlib, Disk)],
        build: zlib_64k,
    },
    Spec {
        id: "zlib-4k",
        title: "zlib, 4 KiB sequential, per core",
        needs: &[(Zlib, Tmpfs), (Zlib, Disk)],
        build: zlib_4k,
    },
    Spec {
        id: "pack-zlib",
        title: "compressed writing, zlib, all cores, whole process",
        needs: &[(Programs, Tmpfs)],
        build: pack_zlib,
    },
    Spec {
        id: "pack-zstd",
        title: "compressed writing, zstd, all cores, whole process",
        needs: &[(Programs, Tmpfs)],
        build: pack_zstd,
    },
    Spec {
        id: "unpack-zlib",
        title: "reading all back, zlib, all cores, whole process",
        needs: &[(Zlib, Tmpfs)],
        build: unpack_zlib,
    },
    Spec {
        id: "unpack-zstd",
        title: "reading all back, zstd, all cores, whole process",
        needs: &[(Zstd, Tmpfs)],
        build: unpack_zstd,
    },
    Spec {
        id: "zstd-64k",
        title: "zstd, 64 KiB random, per core",
        needs: &[(Zstd, Tmpfs), (Zstd, Disk)],
        build: zstd_64k,
    },
    Spec {
        id: "zstd-4k",
        title: "zstd, 4 KiB sequential, per core",
        needs: &[(Zstd, Tmpfs), (Zstd, Disk)],
        build: zstd_4k,
    },
    Spec {
        id: "overwrite-flush",
        title: "4 KiB overwrite, each flushed, on a disk",
        needs: &[(Full, Disk)],
        build: durable::overwrite,
    },
    Spec {
        id: "flush-16",
        title: "4 KiB overwrite, each flushed, 16 threads, on a disk",
        needs: &[(Full, Disk)],
        build: durable::sixteen,
    },
    Spec {
        id: "new-flush",
        title: "4 KiB random write, new image, each flushed, on a disk",
        needs: &[],
        build: durable::allocate,
    },
    Spec {
        id: "plugin-4k",
        title: "what an empty C plugin adds to a call",
        needs: &[],
        build: plugins::one,
    },
    Spec {
        id: "layers-3",
        title: "what three layers add to a 4 KiB read",
        needs: &[],
        build: plugins::three,
    },
    Spec {
        id: "luks-4k",
        title: "4 KiB random read, LUKS",
        needs: &[(Luks, Tmpfs), (Luks, Disk)],
        build: luks_4k,
    },
    Spec {
        id: "luks-1m",
        title: "1 MiB random read, LUKS",
        needs: &[(Luks, Tmpfs), (Luks, Disk)],
        build: luks_1m,
    },
];

/// Ours must lead so much.
pub fn to_reach(against: crate::row::Against, at_least: f64) -> Target {
    Target { against, at_least: Some(at_least), part: false }
}

/// It is only shown.
pub fn to_know(against: crate::row::Against) -> Target {
    Target { against, at_least: None, part: false }
}

fn read_4k<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    same_bytes(images, Full, 4096, images.size, &[])?;
    let work = Work::reads(4096, Pattern::Random, images.size);
    let mut row = plain(images, plan, work);
    add_qemu(&mut row, images, plan, Full, work, &[])?;
    row.targets = vec![to_reach(Limit("pread"), 0.95), to_reach(Imago, 1.0), to_reach(Qemu, 2.2)];
    Ok(row)
}

fn read_4k_c<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let work = Work::reads(4096, Pattern::Random, images.size);
    let mut row = plain(images, plan, work);
    row.contenders[0].who = Who::Base;
    let path = images.path(Full, Tmpfs);
    row.contenders.insert(0, anew(Who::Ours, plan, work, move || OursByC::open(&path)));
    row.targets =
        vec![to_reach(Limit("pread"), 0.95), to_reach(Imago, 1.0), to_know(Base("the Rust API"))];
    Ok(row)
}

fn read_4k_2<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    two_threads(images, plan, 4096, 1.9)
}
fn read_64k_2<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    two_threads(images, plan, 65536, 1.8)
}
fn read_1m_2<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    two_threads(images, plan, 1 << 20, 1.8)
}

fn two_threads<'a>(images: &'a Images, plan: &'a Plan, block: usize, scale: f64) -> Res<Row<'a>> {
    let one = Work::reads(block, Pattern::Random, images.size);
    let mut row = plain(images, plan, one.by(2));
    let alone = plain(images, plan, one);
    for (mut c, who) in alone.contenders.into_iter().zip([Who::Base, Who::LimitBase]) {
        c.who = who;
        row.contenders.push(c);
    }
    row.targets = vec![
        to_reach(Base("one thread"), scale),
        to_know(Machine("× is what pread makes of it")),
        to_know(Limit("pread by two")),
        to_know(Imago),
    ];
    Ok(row)
}

fn read_4k_mmap<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    const MMAP: &[(&str, &str)] = &[("io", "mmap")];
    same_bytes(images, Full, 4096, images.size, MMAP)?;
    let work = Work::reads(4096, Pattern::Random, images.size).warmed(images.size / CLUSTER * 8);
    let path = images.path(Full, Tmpfs);
    let (a, b, c) = (path.clone(), path.clone(), path);
    Ok(Row {
        unit: Unit::PerSecond,
        contenders: vec![
            kept(Who::Ours, plan, work, move || Ours::open(&a, false, MMAP)),
            kept(Who::Limit, plan, work, move || {
                Oracle::open(std::slice::from_ref(&b), false, true)
            }),
            kept(Who::Imago, plan, work, move || Imago::open(&c, false)),
        ],
        targets: vec![to_reach(Imago, 1.6), to_know(Limit("memcpy"))],
        remarks: vec!["The limit is a memcpy from a mapping of the file.".to_owned()],
    })
}

fn read_64k<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    read_large(images, plan, 65536)
}
fn read_1m<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    read_large(images, plan, 1 << 20)
}

fn read_large<'a>(images: &'a Images, plan: &'a Plan, block: usize) -> Res<Row<'a>> {
    same_bytes(images, Full, block, images.size, &[])?;
    let mut row = plain(images, plan, Work::reads(block, Pattern::Random, images.size));
    row.targets = vec![to_reach(Limit("pread"), 0.97), to_know(Imago)];
    Ok(row)
}

fn overwrite<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let mut row = plain(images, plan, Work::writes(4096, Pattern::Random, images.size));
    row.targets = vec![to_reach(Limit("pwrite"), 0.95), to_reach(Imago, 1.0)];
    Ok(row)
}

fn chain_bottom<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    chain(images, plan, Bottom)
}
fn chain_spread<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    chain(images, plan, Spread)
}

fn chain<'a>(images: &'a Images, plan: &'a Plan, kind: Kind) -> Res<Row<'a>> {
    same_bytes(images, kind, 4096, images.size, &[])?;
    let work = Work::reads(4096, Pattern::Random, images.size);
    let (a, b, c) = (images.path(kind, Tmpfs), images.path(Full, Tmpfs), images.path(kind, Tmpfs));
    let files = images.chain(kind, Tmpfs);
    Ok(Row {
        unit: Unit::PerSecond,
        contenders: vec![
            anew(Who::Ours, plan, work, move || Ours::open(&a, false, &[])),
            anew(Who::Base, plan, work, move || Ours::open(&b, false, &[])),
            anew(Who::Limit, plan, work, move || Oracle::open(&files, false, false)),
            anew(Who::Imago, plan, work, move || Imago::open(&c, false)),
        ],
        targets: vec![to_reach(Base("no chain"), 0.9), to_know(Limit("pread")), to_know(Imago)],
        remarks: Vec::new(),
    })
}

fn unallocated<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let work = Work::reads(4096, Pattern::Random, images.size);
    let (a, c) = (images.path(Empty, Tmpfs), images.path(Empty, Tmpfs));
    let mut row = Row {
        unit: Unit::PerSecond,
        contenders: vec![
            anew(Who::Ours, plan, work, move || Ours::open(&a, false, &[])),
            anew(Who::Limit, plan, work, || Ok(Zeroes)),
            anew(Who::Imago, plan, work, move || Imago::open(&c, false)),
        ],
        targets: vec![to_reach(Imago, 1.0), to_reach(Qemu, 3.0), to_know(Limit("memset"))],
        remarks: vec!["The limit is a memset.".to_owned()],
    };
    add_qemu(&mut row, images, plan, Empty, work, &[])?;
    Ok(row)
}

fn tib<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    // As many requests first as it takes for every cache to be as full as it gets.
    let work = Work::reads(4096, Pattern::Pieces(PIECE), 1 << 40).warmed((1 << 40) / PIECE * 2);
    let (a, b, c) = (images.path(Tib, Tmpfs), images.path(Tib, Tmpfs), images.path(Tib, Tmpfs));
    let mut row = Row {
        unit: Unit::PerSecond,
        contenders: vec![
            anew(Who::Ours, plan, work, move || Ours::open(&a, false, &[])),
            anew(Who::Limit, plan, work, move || TwoReads::open(&b)),
            anew(Who::Imago, plan, Work { warm: 64, ..work }, move || Imago::open(&c, false)),
        ],
        targets: vec![to_reach(Qemu, 3.0), to_know(Limit("two preads")), to_know(Imago)],
        remarks: vec![
            "The limit is two preads of 4 KiB, of an L2 table and of the data.".to_owned(),
        ],
    };
    add_qemu(&mut row, images, plan, Tib, work, &[])?;
    Ok(row)
}

fn zlib_64k<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    compressed(images, plan, Zlib, 65536, Pattern::Random, 2.0)
}
fn zlib_4k<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    compressed(images, plan, Zlib, 4096, Pattern::Sequential, 20.0)
}
fn zstd_64k<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    compressed(images, plan, Zstd, 65536, Pattern::Random, 1.5)
}
fn zstd_4k<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    compressed(images, plan, Zstd, 4096, Pattern::Sequential, 10.0)
}

fn luks_4k<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    luks(images, plan, 4096, 2.0)
}
fn luks_1m<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    luks(images, plan, 1 << 20, 1.3)
}

fn luks<'a>(images: &'a Images, plan: &'a Plan, block: usize, lead: f64) -> Res<Row<'a>> {
    const KEY: &[(&str, &str)] = &[("key", crate::qemu::KEY)];
    let work = Work::reads(block, Pattern::Random, images.size);
    let path = images.path(Luks, Tmpfs);
    let mut row = Row {
        unit: Unit::PerSecond,
        contenders: vec![anew(Who::Ours, plan, work, move || Ours::open(&path, false, KEY))],
        targets: vec![to_reach(Qemu, lead)],
        remarks: vec!["LUKS in qcow2, aes-256 xts-plain64, made by qemu-img.".to_owned()],
    };
    add_qemu(&mut row, images, plan, Luks, work, KEY)?;
    Ok(row)
}

fn pack_zlib<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    pack(images, "zlib", 2.0)
}
fn pack_zstd<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    pack(images, "zstd", 1.7)
}

/// `qblk copy -c` beside `qemu-img convert -c`, from a raw file in memory to a file in memory.
fn pack<'a>(images: &'a Images, kind: &'static str, lead: f64) -> Res<Row<'a>> {
    let raw = images.path(Programs, Tmpfs);
    let (a, b) = (images.output("packed-ours.qcow2"), images.output("packed-qemu.qcow2"));
    let tool = process::built("qblk-tool", "qblk")?;
    let how = format!("compression_type={kind}");
    let ours = ["copy", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", &how];
    let theirs = ["convert", "-c", "-m", "8", "-W", "-f", "raw", "-O", "qcow2", "-o", &how];
    let mut row = converts((tool, &ours, raw.clone(), a.clone()), (&theirs, raw, b.clone()), lead)?;
    // Each is made once before the clock runs, and the sizes must be right.
    let mut sizes = Vec::new();
    for (contender, file) in row.contenders.iter_mut().zip([&a, &b]) {
        (contender.run)()?;
        sizes.push(at(file, file.metadata())?.len());
    }
    if sizes[0] > sizes[1] {
        return Err(format!("{kind}: {} bytes, qemu-img makes {}", sizes[0], sizes[1]));
    }
    let part = |n: u64| n as f64 * 100.0 / images.small as f64;
    row.remarks = vec![format!(
        "{} MiB of programs and libraries to {:.1} %, by qemu-img to {:.1} %.",
        images.small >> 20,
        part(sizes[0]),
        part(sizes[1])
    )];
    Ok(row)
}

fn unpack_zlib<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    unpack(images, Zlib, 2.5)
}
fn unpack_zstd<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    unpack(images, Zstd, 2.0)
}

fn unpack<'a>(images: &'a Images, kind: Kind, lead: f64) -> Res<Row<'a>> {
    let (image, tool) = (images.path(kind, Tmpfs), process::built("qblk-tool", "qblk")?);
    let (a, b) = (images.output("unpacked-ours.raw"), images.output("unpacked-qemu.raw"));
    let ours = ["copy", "-q", "-f", "qcow2", "-O", "raw"];
    let theirs = ["convert", "-m", "8", "-W", "-f", "qcow2", "-O", "raw"];
    let mut row = converts((tool, &ours, image.clone(), a), (&theirs, image, b), lead)?;
    row.remarks = vec!["An image that qemu-img has made, to a raw file.".to_owned()];
    Ok(row)
}

/// Our tool and qemu-img, each of which makes a file of another.
fn converts<'a>(
    (tool, ours, our_source, our_target): (PathBuf, &[&str], PathBuf, PathBuf),
    (theirs, their_source, their_target): (&[&str], PathBuf, PathBuf),
    lead: f64,
) -> Res<Row<'a>> {
    let args = |words: &[&str], from: PathBuf, to: &Path| -> Vec<PathBuf> {
        words.iter().map(PathBuf::from).chain([from, to.to_owned()]).collect()
    };
    let one = |who, program: PathBuf, args: Vec<PathBuf>, file: PathBuf| Contender {
        who,
        run: Box::new(move || process::makes(&program, &args, &file)),
    };
    let our_args = args(ours, our_source, &our_target);
    let their_args = args(theirs, their_source, &their_target);
    Ok(Row {
        unit: Unit::Millis,
        contenders: vec![
            one(Who::Ours, tool, our_args, our_target),
            one(Who::QemuTool, "qemu-img".into(), their_args, their_target),
        ],
        targets: vec![to_reach(Qemu, lead)],
        remarks: Vec::new(),
    })
}

fn compressed<'a>(
    images: &'a Images,
    plan: &'a Plan,
    kind: Kind,
    block: usize,
    pattern: Pattern,
    lead: f64,
) -> Res<Row<'a>> {
    let work = Work::reads(block, pattern, images.small);
    let (a, c) = (images.path(kind, Tmpfs), images.path(kind, Tmpfs));
    let bytes = at(&a, a.metadata())?.len();
    let part = bytes as f64 * 100.0 / images.small as f64;
    let mut row = Row {
        unit: Unit::PerCpuSecond,
        contenders: vec![anew(Who::Ours, plan, work, move || Ours::open(&a, false, &[]))],
        targets: vec![to_reach(Imago, lead), to_reach(Qemu, lead)],
        remarks: vec![format!("Compressed to {part:.0} %: programs and libraries.")],
    };
    if kind == Zlib {
        same_bytes(images, kind, block, images.small, &[])?;
        row.contenders.push(anew(Who::Imago, plan, work, move || Imago::open(&c, false)));
    } else if let Err(why) = Imago::open(&c, false) {
        row.remarks
            .push(format!("imago does not open it ({}).", why.rsplit(": ").next().unwrap_or("")));
    }
    add_qemu(&mut row, images, plan, kind, work, &[])?;
    Ok(row)
}

fn new_image<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    // Few enough that nearly every write is the first one to its cluster.
    let ops = images.size / CLUSTER * 3 / 8 / 32 * 32;
    let work =
        Work::writes(4096, Pattern::Walk(golden_step(images.size, 4096)), images.size).exactly(ops);
    let mut row = fresh_row(images, plan, work, |file, _| create(file, images.size, &[]), None)?;
    let sparse = images.dir(Tmpfs).join("sparse.raw");
    let limit = move || {
        have_memory_for(&work);
        let sample = drive(&Plain::sparse(&sparse, images.size)?, &work, plan.seconds);
        let _ = std::fs::remove_file(&sparse);
        sample
    };
    row.contenders.insert(1, Contender { who: Who::Limit, run: Box::new(limit) });
    row.targets =
        vec![to_reach(Imago, 1.3), to_reach(Qemu, 4.0), to_reach(Limit("a sparse raw file"), 0.8)];
    row.remarks = vec!["The limit is a sparse raw file. Every write allocates.".to_owned()];
    Ok(row)
}

/// Clusters of which a subcluster is what one write fills.
const SUBCLUSTERS: &str = "extended_l2=on,cluster_size=128k";

fn new_subclusters<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let make = |file: &Path, _| create(file, images.size, &[SUBCLUSTERS]);
    subclusters(images, plan, make, None)
}
fn over_subclusters<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let make = |file: &Path, on| {
        let below = format!("backing_file={},backing_fmt=raw", images.path(Raw, on).display());
        create(file, images.size, &[SUBCLUSTERS, &below])
    };
    subclusters(images, plan, make, Some(Raw))
}

fn subclusters<'a>(
    images: &'a Images,
    plan: &'a Plan,
    make: impl Fn(&Path, On) -> Res<()>,
    below: Option<Kind>,
) -> Res<Row<'a>> {
    // Every write is the first to its subcluster, some are to their cluster.
    let ops = if plan.quick { 4096 } else { 16384 }.min(images.size / 4096 / 8);
    let work =
        Work::writes(4096, Pattern::Walk(golden_step(images.size, 4096)), images.size).exactly(ops);
    let mut row = fresh_row(images, plan, work, make, below)?;
    // It does not open such images.
    row.contenders.retain(|c| !matches!(c.who, Who::Imago));
    row.targets = vec![to_reach(Qemu, 3.0)];
    row.remarks =
        vec!["Clusters of 128 KiB, subclusters of 4 KiB; each write fills one.".to_owned()];
    Ok(row)
}

fn cow_raw<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    cow(images, plan, Raw, "raw")
}
fn cow_qcow2<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    cow(images, plan, Full, "qcow2")
}

fn cow<'a>(images: &'a Images, plan: &'a Plan, below: Kind, format: &'static str) -> Res<Row<'a>> {
    let ops = if plan.quick { 4096 } else { 12288 };
    let work =
        Work::writes(4096, Pattern::Walk(golden_step(images.size, 4096)), images.size).exactly(ops);
    let make = |file: &Path, on| overlay(file, &images.path(below, on), format);
    let mut row = fresh_row(images, plan, work, make, Some(below))?;
    let (from, to) = (images.path(Full, Tmpfs), images.dir(Tmpfs).join("copies.raw"));
    let limit = move || {
        have_memory_for(&work);
        let sample = drive(&CopyOnWrite::new(&from, &to)?, &work, plan.seconds);
        let _ = std::fs::remove_file(&to);
        sample
    };
    row.contenders.insert(1, Contender { who: Who::Limit, run: Box::new(limit) });
    row.targets =
        vec![to_reach(Imago, 1.2), to_reach(Qemu, 2.0), to_know(Limit("pread and pwrite"))];
    row.remarks = vec!["The limit is a pread and a pwrite of 64 KiB.".to_owned()];
    Ok(row)
}

fn open_one<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let mut row = visits(images, plan, Full, 30.0);
    let path = images.path(Full, Tmpfs);
    let limit = move || process::visits(plan, images.size, &|buf, at| Plain::visit(&path, buf, at));
    row.contenders.push(Contender { who: Who::Limit, run: Box::new(limit) });
    Ok(row)
}
fn lock_one<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    Ok(crate::locking::row(plan, images.path(Empty, Tmpfs)))
}
fn open_chain<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    Ok(visits(images, plan, Bottom, 100.0))
}

fn visits<'a>(images: &'a Images, plan: &'a Plan, kind: Kind, at_most: f64) -> Row<'a> {
    let (a, c) = (images.path(kind, Tmpfs), images.path(kind, Tmpfs));
    let ours = move || process::visits(plan, images.size, &|buf, at| Ours::visit(&a, buf, at));
    let imago = move || process::visits(plan, images.size, &|buf, at| Imago::visit(&c, buf, at));
    Row {
        unit: Unit::Micros,
        contenders: vec![
            Contender { who: Who::Ours, run: Box::new(ours) },
            Contender { who: Who::Imago, run: Box::new(imago) },
        ],
        targets: vec![to_reach(AtMost(at_most), at_most), to_know(Imago)],
        remarks: Vec::new(),
    }
}

fn memory_full<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    memory(images, Full, 3.0)
}
fn memory_tib<'a>(images: &'a Images, _: &'a Plan) -> Res<Row<'a>> {
    memory(images, Tib, 4.0)
}

fn memory<'a>(images: &'a Images, kind: Kind, at_most: f64) -> Res<Row<'a>> {
    let path = images.path(kind, Tmpfs);
    let program = |name| process::built("qblk-bench", name);
    let run = |who, program: PathBuf, open: bool| {
        let path = path.clone();
        let run = move || process::resident(&program, open.then_some(path.as_path()));
        Contender { who, run: Box::new(run) }
    };
    Ok(Row {
        unit: Unit::MiB,
        contenders: vec![
            run(Who::Ours, program("one-image")?, true),
            run(Who::Limit, program("one-image")?, false),
            run(Who::Imago, program("one-image-imago")?, true),
        ],
        targets: vec![to_reach(AtMost(at_most), at_most), to_know(Imago)],
        remarks: vec![
            "Resident after one read of 4 KiB; the limit is the same program with nothing open."
                .to_owned(),
        ],
    })
}

fn info<'a>(images: &'a Images, plan: &'a Plan) -> Res<Row<'a>> {
    let tool = process::built("qblk-tool", "qblk")?;
    let path = images.path(Full, Tmpfs);
    let spawn = |who, program: PathBuf, args: Vec<PathBuf>| Contender {
        who,
        run: Box::new(move || process::whole(plan, &program, &args)),
    };
    Ok(Row {
        unit: Unit::Millis,
        contenders: vec![
            spawn(Who::Ours, tool, vec!["info".into(), path.clone()]),
            spawn(Who::Limit, "true".into(), vec![]),
            spawn(Who::QemuTool, "qemu-img".into(), vec!["info".into(), path]),
        ],
        targets: vec![to_reach(AtMost(2.0), 2.0), to_know(Qemu)],
        remarks: vec!["The limit is a process that does nothing, true(1).".to_owned()],
    })
}
