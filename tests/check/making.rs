//! Images with everything in them that has clusters: snapshots, bitmaps, compressed clusters, tables of
//! every width.

use std::path::{Path, PathBuf};

use super::common::*;

/// An image, and what qemu must be told to open it.
pub struct Made {
    pub path: PathBuf,
    pub cluster: u64,
    pub what: String,
    /// It has both bitmaps and snapshots.
    pub both: bool,
}

/// Bytes of the disks.
pub const SIZE: u64 = 4 << 20;

/// An image at random, made by QEMU.
pub fn make(r: &mut Rng, dir: &Path, name: &str) -> Made {
    let path = dir.join(name);
    let v3 = !r.one_in(4);
    let extended = v3 && r.one_in(4);
    let data_file = v3 && r.one_in(8);
    let cluster: u64 = match extended {
        true => r.pick(&[16384, 65536]),
        false => r.pick(&[512, 1024, 4096, 65536]),
    };
    let bits = if v3 { r.pick(&[1, 2, 4, 8, 16, 16, 32, 64]) } else { 16 };
    let mut options = format!("cluster_size={cluster},compat={}", if v3 { "1.1" } else { "0.10" });
    if v3 {
        options += &format!(",refcount_bits={bits}");
    }
    if extended {
        options += ",extended_l2=on";
    }
    if data_file {
        options += &format!(",data_file={}", dir.join(format!("{name}.data")).display());
    }
    let size = SIZE.to_string();
    qemu_img!("create", "-f", "qcow2", "-o", options, path, size);
    let writes = |r: &mut Rng, n: u64| {
        let mut commands = Vec::new();
        for _ in 0..n {
            let at = r.below(SIZE / 512) * 512;
            let len = (1 + r.below(64)) * 512;
            let len = len.min(SIZE - at);
            commands.push(match r.below(5) {
                0 => format!("write -z {at} {len}"),
                1 => format!("discard {at} {len}"),
                // Those that share a cluster may be more than few bits can count.
                2 if !data_file && bits > 2 => {
                    let at = at / cluster * cluster;
                    format!("write -c -P {} {at} {cluster}", r.below(256))
                }
                _ => format!("write -P {} {at} {len}", r.below(256)),
            });
        }
        // Some fail: QEMU refuses to compress over what is there in part.
        let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"-f", &"qcow2"];
        for c in &commands {
            args.extend([&"-c" as &dyn AsRef<_>, c]);
        }
        args.push(&path);
        run("qemu-io", &args);
    };
    writes(r, 12);
    let bitmaps = v3 && r.one_in(3);
    if bitmaps {
        for i in 0..1 + r.below(2) {
            qemu_img!("bitmap", "--add", "-g", "64k", path, format!("b{i}"));
            writes(r, 3);
        }
    }
    if bits > 2 && !data_file && !r.one_in(3) {
        for i in 0..1 + r.below(3) {
            // Too many for a width of two bits.
            run("qemu-img", &[&"snapshot", &"-c", &format!("s{i}"), &path]);
            writes(r, 4);
        }
    }
    let both = bitmaps && peek_u32(&path, 60) != 0;
    Made { path, cluster, what: options, both }
}
