//! What is measured by whole operations or whole processes: opening and closing, memory, the tool.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::Plan;
use crate::load::Load;
use crate::qemu;
use crate::work::{Buffer, Offsets, Pattern, Res, Sample, Work};

/// Open, read 4 KiB somewhere, close, again and again.
pub fn visits(plan: &Plan, size: u64, visit: &dyn Fn(&mut [u8], u64) -> Res<()>) -> Res<Sample> {
    let mut buf = Buffer::new(4096);
    let mut offsets = Offsets::new(&Work::reads(4096, Pattern::Random, size), 0);
    for _ in 0..16 {
        visit(&mut buf, offsets.next())?;
    }
    let start = Load::now();
    let mut done = 0.0;
    while start.elapsed() < plan.seconds {
        for _ in 0..16 {
            visit(&mut buf, offsets.next())?;
        }
        done += 16.0;
    }
    let used = start.used();
    Ok(Sample {
        value: used.wall / done * 1e6,
        cpu_us: used.own / done * 1e6,
        foreign: used.foreign,
    })
}

/// Start a program, wait for its end, again and again.
pub fn whole(plan: &Plan, program: &Path, args: &[PathBuf]) -> Res<Sample> {
    let shown = program.display().to_string();
    let start = Load::now();
    let mut times = Vec::new();
    while start.elapsed() < plan.seconds || times.len() < 5 {
        let began = Instant::now();
        let status = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .map_err(|e| qemu::missing(&shown, &e))?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
        if !status.success() {
            return Err(format!("{shown} failed: {status}"));
        }
    }
    let used = start.used();
    // A start that was disturbed takes several times as long, so the median counts and not the mean.
    times.sort_by(f64::total_cmp);
    let cpu_us = used.own / times.len() as f64 * 1e6;
    Ok(Sample { value: times[times.len() / 2], cpu_us, foreign: used.foreign })
}

/// Let a program make a file, once.
pub fn makes(program: &Path, args: &[PathBuf], file: &Path) -> Res<Sample> {
    let shown = program.display().to_string();
    let _ = std::fs::remove_file(file);
    let start = Load::now();
    let status = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|e| qemu::missing(&shown, &e))?;
    let used = start.used();
    match status.success() && file.exists() {
        true => {
            Ok(Sample { value: used.wall * 1e3, cpu_us: used.own * 1e6, foreign: used.foreign })
        }
        false => Err(format!("{shown} failed: {status}")),
    }
}

/// The memory, MiB, of a small program that has `image` open; see bin/one-image.rs.
pub fn resident(program: &Path, image: Option<&Path>) -> Res<Sample> {
    let out = Command::new(program)
        .args(image)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| qemu::missing(&program.display().to_string(), &e))?;
    let said = String::from_utf8_lossy(&out.stdout);
    match said.trim().parse::<f64>() {
        Ok(kib) if out.status.success() => {
            Ok(Sample { value: kib / 1024.0, cpu_us: 0.0, foreign: 0.0 })
        }
        _ => {
            Err(format!("measuring memory failed: {}", String::from_utf8_lossy(&out.stderr).trim()))
        }
    }
}

/// A program of this workspace that lies beside the bench, built with the same settings.
pub fn built(package: &str, name: &str) -> Res<PathBuf> {
    let me = std::env::current_exe().map_err(|e| format!("the bench's own program: {e}"))?;
    let program = me.with_file_name(name);
    // Cargo says where it is when it runs us; without it, what is there is taken.
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build.args([
            "build",
            "--quiet",
            "--release",
            "-p",
            package,
            "--bin",
            name,
            "--manifest-path",
        ]);
        build.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"));
        if let Some(target) = me.parent().and_then(Path::parent) {
            build.arg("--target-dir").arg(target);
        }
        match build.status() {
            Ok(status) if status.success() => {}
            _ => return Err(format!("building {name} failed")),
        }
    }
    match program.exists() {
        true => Ok(program),
        false => {
            Err(format!("{name} is not built: cargo build --release -p {package} --bin {name}"))
        }
    }
}
