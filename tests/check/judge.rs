//! What QEMU says of an image, and what we do.

use std::path::Path;

use super::common::*;
use qblk::block::{CheckReport, Progress, Repair};

/// What `qemu-img check` found; `None` if it gave up.
pub fn qemu(path: &Path, repair: Repair) -> (Option<i32>, CheckReport, String) {
    let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> =
        vec![&"check", &"--output=json", &"-f", &"qcow2"];
    match repair {
        Repair::Nothing => {}
        Repair::Leaks => args.extend([&"-r" as &dyn AsRef<_>, &"leaks"]),
        Repair::All => args.extend([&"-r" as &dyn AsRef<_>, &"all"]),
    }
    args.push(&path);
    let out = run("qemu-img", &args);
    let json = String::from_utf8_lossy(&out.stdout).into_owned();
    let n = |key: &str| number(&json, key);
    let report = CheckReport {
        corruptions: n("corruptions"),
        leaks: n("leaks"),
        corruptions_fixed: n("corruptions-fixed"),
        leaks_fixed: n("leaks-fixed"),
        check_errors: n("check-errors"),
        image_end: n("image-end-offset"),
        total_clusters: n("total-clusters"),
        allocated_clusters: n("allocated-clusters"),
        compressed_clusters: n("compressed-clusters"),
        fragmented_clusters: n("fragmented-clusters"),
        changed: false,
    };
    let told = json.clone() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code(), report, told)
}

/// The number that stands behind a key; QEMU leaves out those that are 0.
fn number(json: &str, key: &str) -> u64 {
    let Some(at) = json.find(&format!("\"{key}\":")) else { return 0 };
    let rest = &json[at + key.len() + 3..];
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

/// What our check finds.
pub fn ours(path: &Path, repair: Repair) -> qblk::Result<CheckReport> {
    let write = if repair == Repair::Nothing { RO } else { RW };
    let options = options(&[("format", "qcow2")]);
    let image = qblk::Image::open(path.as_os_str(), &options, write | qblk::OpenFlags::CHECK)?;
    let report = image.check(repair, Progress::NONE);
    image.close()?;
    report
}

/// The exit status that `qemu-img check` gives to what our check found.
pub fn status(report: &qblk::Result<CheckReport>) -> i32 {
    match report {
        Err(_) => 1,
        Ok(r) if r.check_errors > 0 => 1,
        Ok(r) if r.corruptions > 0 => 2,
        Ok(r) if r.leaks > 0 => 3,
        Ok(_) => 0,
    }
}
