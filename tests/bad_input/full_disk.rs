//! A disk that is full in the middle of a write: the write is reported, nothing acknowledged is
//! lost, and when space returns work goes on with the same handle.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::common::*;
use qblk::block::ErrorKind;
use qblk::{Error, Image, Options, ReqFlags};

const ENOSPC: ErrorKind = ErrorKind::Errno(libc::ENOSPC);

/// A small file system of its own.
struct Small {
    mount: PathBuf,
    _dir: Tmp,
}

impl Small {
    fn new(kind: &str, mib: u64) -> Self {
        need_root("a small file system is mounted to be filled");
        let dir = Tmp::new("small");
        let mount = dir.join("mount");
        fs::create_dir(&mount).unwrap();
        if kind == "tmpfs" {
            let size = format!("size={mib}m");
            run_ok("mount", &[&"-t", &"tmpfs", &"-o", &size, &"qblk-test", &mount]);
        } else {
            let disk = dir.join("disk");
            fs::File::create(&disk).unwrap().set_len(mib << 20).unwrap();
            run_ok("mkfs.ext4", &[&"-q", &"-m", &"0", &"-O", &"^has_journal", &disk]);
            run_ok("mount", &[&"-o", &"loop", &disk, &mount]);
        }
        Self { mount, _dir: dir }
    }

    fn join(&self, name: &str) -> PathBuf {
        self.mount.join(name)
    }

    fn free(&self) -> u64 {
        let path = std::ffi::CString::new(self.mount.to_str().unwrap()).unwrap();
        // SAFETY: all zeroes is a value of this plain struct, and the path ends with NUL.
        let stat = unsafe {
            let mut stat: libc::statvfs = std::mem::zeroed();
            assert_eq!(libc::statvfs(path.as_ptr(), &mut stat), 0);
            stat
        };
        stat.f_bavail as u64 * stat.f_frsize as u64
    }

    /// Take all but `leave` bytes.
    fn fill(&self, leave: u64) {
        let path = self.join("filler");
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&path).unwrap();
        while self.free() > leave {
            let n = (self.free() - leave).clamp(4096, 1 << 20) as usize;
            if file.write_all(&vec![0x0f; n]).is_err() {
                break;
            }
            file.sync_all().unwrap();
        }
    }

    /// Take what there is, to the last block.
    fn fill_up(&self) {
        self.fill(0);
        // Where free blocks are not told exactly, writing tells.
        let mut file =
            fs::OpenOptions::new().create(true).append(true).open(self.join("filler")).unwrap();
        while file.write_all(&[0x0f; 512]).is_ok() {}
    }

    fn empty(&self) {
        fs::remove_file(self.join("filler")).unwrap();
        // SAFETY: takes nothing.
        unsafe { libc::sync() };
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let out = run("umount", &[&self.mount]);
        if !out.status.success() {
            run("umount", &[&"-l", &self.mount]);
        }
    }
}

/// Whether something failed for want of room, and for nothing else.
fn is_full(result: &Result<(), Error>) -> bool {
    match result {
        Ok(()) => false,
        Err(e) => {
            assert_eq!(e.kind(), ENOSPC, "{e}");
            true
        }
    }
}

struct Run {
    image: Image,
    model: Vec<u8>,
    rng: Rng,
}

impl Run {
    /// Write a block; a failed one may have left any mix of old and new behind.
    fn write(&mut self, at: u64, n: u64) -> bool {
        let data = self.rng.bytes(n as usize);
        let full = is_full(&self.image.write_at(&data, at, NONE));
        let model = &mut self.model[at as usize..][..n as usize];
        if full {
            let found = read_range(&self.image, at, n);
            for i in 0..n as usize {
                assert!(found[i] == data[i] || found[i] == model[i], "byte {} after failing", at);
            }
            model.copy_from_slice(&found);
        } else {
            model.copy_from_slice(&data);
        }
        !full
    }

    fn verify(&self, what: &str) {
        assert_same(&read_all(&self.image), &self.model, 0, what);
    }
}

fn survives(kind: &str, by_qemu: bool, cluster: &str, bits: &str, backing: bool) {
    let what = format!("{kind} by_qemu={by_qemu} cluster={cluster} bits={bits} backing={backing}");
    eprintln!("{what}");
    let disk = Small::new(kind, 24);
    let elsewhere = Tmp::in_memory("elsewhere");
    let (path, base) = (disk.join("image"), elsewhere.join("base"));
    let size = 16u64 << 20;
    let mut model = vec![0; size as usize];
    let base_name = base.to_str().unwrap();
    if backing {
        model = Rng::new(12).bytes(size as usize);
        fs::write(&base, &model).unwrap();
    }
    if by_qemu {
        let mut opts = format!("cluster_size={cluster},refcount_bits={bits}");
        if backing {
            opts += &format!(",backing_file={base_name},backing_fmt=raw");
        }
        qemu_img!("create", "-q", "-f", "qcow2", "-o", opts, path, size.to_string());
    } else {
        let mut pairs = vec![("cluster-size", cluster), ("refcount-bits", bits)];
        if backing {
            pairs.extend([("backing-file", base_name), ("backing-fmt", "raw")]);
        }
        create(&path, "qcow2", size, &pairs);
    }
    let mut run = Run { image: open(&path, RW), model, rng: Rng::new(13) };
    run.write(5 << 20, 100_000);
    disk.fill(3 << 20);

    // Until it is full, and some way beyond.
    let step = match cluster {
        // Each takes a whole cluster, most of it copied.
        "65536" | "2M" if backing => 4096,
        _ => 65000,
    };
    let mut failed = Vec::new();
    let mut at = 0;
    while failed.len() < 30 {
        assert!(at + 65536 <= size, "{what}: the disk did not get full");
        if !run.write(at, step) {
            failed.push(at);
            disk.fill_up();
        }
        at += 65536;
    }
    run.verify(&what);
    // What is there can be written over; zeroing, trimming and flushing need no room that is not
    // there. (If they do, they say so, and all goes on.)
    assert!(run.write(5 << 20, 1000), "{what}: overwriting in place");
    is_full(&run.image.flush());
    let zeroed = run.image.zero(5 << 20, 65536, ReqFlags::MAY_TRIM);
    if !is_full(&zeroed) {
        run.model[5 << 20..][..65536].fill(0);
    }
    is_full(&run.image.flush());
    let e = run.image.write_at(&[1], size, NONE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Errno(libc::EINVAL), "{e}");
    run.verify(&what);

    // Space returns.
    disk.empty();
    for at in failed {
        assert!(run.write(at, step), "{what}: there is room again");
    }
    run.image.flush().unwrap_or_else(|e| panic!("{what}: {e}"));
    run.verify(&what);
    run.image.close().unwrap();
    check_clean(&path);
    let image = open(&path, RO);
    assert_same(&read_all(&image), &run.model, 0, &what);
    drop(image);
    check_same(&path, "qcow2", &run.model, &elsewhere.join("model"));
}

/// The same, but closed while there is no room.
fn closed_when_full(kind: &str, by_qemu: bool) {
    let what = format!("{kind}, closed when full, by_qemu={by_qemu}");
    let disk = Small::new(kind, 24);
    let path = disk.join("image");
    let size = 16u64 << 20;
    if by_qemu {
        qemu_img!("create", "-q", "-f", "qcow2", path, size.to_string());
    } else {
        create(&path, "qcow2", size, &[]);
    }
    let mut run = Run { image: open(&path, RW), model: vec![0; size as usize], rng: Rng::new(14) };
    assert!(run.write(0, 1 << 20));
    run.image.flush().unwrap();
    disk.fill(2 << 20);
    let mut at = 1 << 20;
    while run.write(at, 65536) {
        at += 65536;
    }
    disk.fill_up();
    let all = run.model.clone();
    let closed = run.image.close();
    check_no_corruption(&path);
    let image = open(&path, RO);
    // If closing succeeded all that was acknowledged is there; if not, what was flushed.
    let n = if is_full(&closed) { 1 << 20 } else { all.len() };
    assert_same(&read_range(&image, 0, n as u64), &all[..n], 0, &what);
}

#[test]
fn a_full_tmpfs_is_survived() {
    survives("tmpfs", false, "65536", "16", false);
    survives("tmpfs", true, "65536", "16", false);
    survives("tmpfs", false, "512", "64", false);
    survives("tmpfs", false, "65536", "16", true);
    survives("tmpfs", true, "4096", "1", true);
    closed_when_full("tmpfs", false);
    closed_when_full("tmpfs", true);
}

#[test]
fn a_full_ext4_is_survived() {
    survives("ext4", false, "65536", "16", false);
    survives("ext4", true, "65536", "16", false);
    survives("ext4", false, "512", "64", false);
    survives("ext4", false, "65536", "16", true);
    survives("ext4", true, "2M", "16", true);
    closed_when_full("ext4", false);
    closed_when_full("ext4", true);
}

#[test]
fn a_raw_image_survives_a_full_disk() {
    for kind in ["tmpfs", "ext4"] {
        let disk = Small::new(kind, 16);
        let path = disk.join("image");
        create(&path, "raw", 32 << 20, &[]);
        let opts = options(&[("format", "raw")]);
        let image = open_with(&path, &opts, RW);
        let mut run = Run { image, model: vec![0; 32 << 20], rng: Rng::new(15) };
        let mut at = 0;
        while run.write(at, 65536) {
            at += 65536;
        }
        run.verify(kind);
        disk.fill_up();
        assert!(!run.write(20 << 20, 65536));
        assert!(run.write(0, 65536), "{kind}: overwriting in place");
        disk.empty();
        run.image.trim(0, 1 << 20, NONE).unwrap();
        run.model[..1 << 20].copy_from_slice(&read_range(&run.image, 0, 1 << 20));
        assert!(run.write(20 << 20, 65536), "{kind}: there is room again");
        run.image.flush().unwrap();
        run.verify(kind);
        run.image.close().unwrap();
    }
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n != "lost+found" && n != "filler")
        .collect();
    names.sort();
    names
}

#[test]
fn creating_on_a_full_disk_leaves_no_half_file() {
    for kind in ["tmpfs", "ext4"] {
        let disk = Small::new(kind, 16);
        let path = disk.join("image");
        let mut cases: Vec<(&str, Vec<(&str, &str)>)> = vec![
            ("raw", vec![("preallocation", "falloc")]),
            ("raw", vec![("preallocation", "full")]),
            ("qcow2", vec![("preallocation", "falloc")]),
            ("qcow2", vec![("preallocation", "full")]),
            ("qcow2", vec![("preallocation", "full"), ("cluster-size", "512")]),
        ];
        let free = disk.free();
        let create = |format: &str, pairs: &[(&str, &str)]| {
            let opts = options(pairs);
            match qblk::image::create(path.as_os_str(), format, 64 << 20, &opts) {
                Ok(()) => panic!("{kind} {format} {pairs:?} succeeded"),
                Err(e) => assert_eq!(e.kind(), ENOSPC, "{kind} {format} {pairs:?}: {e}"),
            }
            assert_eq!(files(&disk.mount), [""; 0], "{kind} {format} {pairs:?}");
        };
        for (format, pairs) in &cases {
            create(format, pairs);
            // ext4 gives blocks back in its own time, and a child that another test is about to start may
            // have the descriptor for a moment.
            let begun = std::time::Instant::now();
            loop {
                // SAFETY: takes nothing.
                unsafe { libc::sync() };
                if disk.free() + 65536 >= free {
                    break;
                }
                assert!(begun.elapsed().as_secs() < 10, "{kind} {format} {pairs:?}: space is gone");
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
        disk.fill_up();
        cases = vec![("qcow2", vec![]), ("qcow2", vec![("cluster-size", "2M")])];
        for (format, pairs) in &cases {
            create(format, pairs);
        }
        disk.empty();
        qblk::image::create(path.as_os_str(), "qcow2", 64 << 20, &Options::new()).unwrap();
        check_clean(&path);
    }
}

#[test]
fn growing_on_a_full_disk_leaves_the_image_as_it_was() {
    for kind in ["tmpfs", "ext4"] {
        let disk = Small::new(kind, 16);
        let path = disk.join("image");
        create(&path, "qcow2", 1 << 20, &[("cluster-size", "4096")]);
        let image = open(&path, RW);
        let data = Rng::new(16).bytes(1 << 20);
        image.write_at(&data, 0, NONE).unwrap();
        image.flush().unwrap();
        for how in ["full", "falloc"] {
            let opts = options(&[("preallocation", how)]);
            let e = image.resize(64 << 20, &opts, false).unwrap_err();
            assert_eq!(e.kind(), ENOSPC, "{kind} {how}: {e}");
            assert_eq!(image.size().unwrap(), 1 << 20, "{kind} {how}");
            assert_same(&read_all(&image), &data, 0, how);
        }
        disk.fill_up();
        // An L1 table for 100 GiB has no room.
        let grown = image.resize(100 << 30, &Options::new(), false);
        if !is_full(&grown) {
            image.resize(1 << 20, &Options::new(), true).unwrap();
        }
        assert_same(&read_all(&image), &data, 0, kind);
        disk.empty();
        image.resize(3 << 20, &Options::new(), false).unwrap();
        image.write_at(&data, 2 << 20, NONE).unwrap();
        image.close().unwrap();
        check_clean(&path);
        let mut model = data.clone();
        model.resize(2 << 20, 0);
        model.extend(&data);
        assert_same(&read_all(&open(&path, RO)), &model, 0, kind);
    }
}
