use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::support::*;

const MIB: u64 = 1 << 20;

/// 64 MiB with data of all lengths, whole and partial zero blocks in it, and holes.
fn source(dir: &Dir) {
    let (a, b, c) = (noise(1, 3_000_000), noise(2, 100), noise(3, 4096));
    let zeroes = vec![0; 1 << 20];
    dir.sparse(
        "src.raw",
        64 * MIB,
        &[
            (5000, &a),
            (20 * MIB - 50, &b),
            (30 * MIB, &zeroes),
            (31 * MIB, &c),
            (64 * MIB - 7, b"the end"),
        ],
    );
}

#[test]
fn copies_compare_equal_in_every_format() {
    let dir = Dir::new();
    source(&dir);
    dir.qblk("copy src.raw a.raw").good();
    dir.qblk("copy -f raw -O qcow2 src.raw b.qcow2").good();
    dir.qblk("copy b.qcow2 c.qcow2 -o cluster-size=4k -t 5").good();
    dir.qblk("copy -O raw c.qcow2 d.raw -t 1 --direct").good();
    dir.qblk("copy -O qcow2 src.raw e.qcow2 -o cluster-size=2M -S 64k").good();
    for name in ["a.raw", "b.qcow2", "c.qcow2", "d.raw", "e.qcow2"] {
        dir.qemu_img(&format!("compare -q src.raw {name}"));
    }
    for name in ["b.qcow2", "c.qcow2", "e.qcow2"] {
        dir.qemu_img(&format!("check -q {name}"));
    }
    // Without a word the format stays.
    for (name, format) in [("a.raw", "raw"), ("c.qcow2", "qcow2")] {
        assert_eq!(dir.qblk(&format!("info --json {name}")).json()["format"], format);
    }
    // The source wrote zeroes out in one MiB; the copy holds less, nothing but blocks with data.
    assert!(dir.on_disk("a.raw") <= 3_000_000 + 40_000, "{}", dir.on_disk("a.raw"));
    assert!(dir.on_disk("src.raw") >= dir.on_disk("a.raw") + MIB);
    assert!(dir.on_disk("d.raw") <= 3_000_000 + 40_000, "{}", dir.on_disk("d.raw"));
}

/// What was never written in a LUKS image reads as noise, so zeroes have to be written there.
#[test]
fn copies_are_the_same_in_encrypted_images() {
    let dir = Dir::new();
    source(&dir);
    dir.write("key", b"open sesame");
    let luks = "-o key-file=key -o iter-time=10";
    let inside = "-o encrypt.format=luks -o key-file=key -o encrypt.iter-time=10";
    dir.qblk(&format!("copy -O luks src.raw a.luks {luks}")).good();
    dir.qblk(&format!("copy -O qcow2 src.raw b.qcow2 {inside}")).good();
    dir.qblk("copy -O raw --source-option key-file=key a.luks a.raw").good();
    dir.qblk("copy -O raw --source-option key-file=key b.qcow2 b.raw").good();
    for name in ["a.raw", "b.raw"] {
        dir.qemu_img(&format!("compare -q src.raw {name}"));
    }
    dir.qblk("copy -O raw a.luks c.raw").bad(1, &["'a.luks'", "'key-file'"]);
}

#[test]
fn a_copy_reads_through_the_whole_chain() {
    let dir = Dir::new();
    source(&dir);
    dir.qblk("create -b src.raw -F raw mid.qcow2").good();
    dir.qblk("write -q mid.qcow2 1M --pattern 7 --length 700k").good();
    dir.qblk("create -b mid.qcow2 top.qcow2 70M").good();
    dir.qblk("write -q top.qcow2 2M --zero --length 320k").good();
    dir.qblk("write -q top.qcow2 68M --pattern 9 --length 1").good();
    dir.qblk("copy top.qcow2 flat.qcow2").good();
    dir.qemu_img("compare -q top.qcow2 flat.qcow2");
    assert_eq!(
        dir.qblk("info --json flat.qcow2").json()["backing_filename"],
        serde_json::Value::Null
    );
    // Compressed clusters, made by the peer.
    dir.qemu_img("convert -c -O qcow2 flat.qcow2 small.qcow2");
    dir.qblk("copy small.qcow2 large.raw -O raw").good();
    dir.qemu_img("compare -q small.qcow2 large.raw");
    // Only what is in the topmost.
    dir.qblk("copy --no-backing top.qcow2 alone.raw -O raw").good();
    assert_eq!(dir.on_disk("alone.raw"), 4096);
}

#[test]
fn an_overlay_holds_only_what_differs() {
    let dir = Dir::new();
    source(&dir);
    dir.qblk("copy src.raw new.raw -q").good();
    dir.qblk("write -q -f raw new.raw 40M --pattern 3 --length 10k").good();
    dir.qblk("write -q -f raw new.raw 1M --zero --length 1M").good();
    let json = dir.qblk("copy --json -O qcow2 -b src.raw -F raw new.raw diff.qcow2").json();
    assert_eq!(json["written"], 12288);
    dir.qemu_img("compare -q new.raw diff.qcow2");
    dir.qemu_img("check -q diff.qcow2");
    assert!(dir.on_disk("diff.qcow2") < MIB);
    assert_eq!(dir.qblk("info --json diff.qcow2").json()["backing_filename"], "src.raw");
}

#[test]
fn writing_into_an_existing_target_replaces_all_of_it() {
    let dir = Dir::new();
    source(&dir);
    for (name, format) in [("old.qcow2", "qcow2"), ("old.raw", "raw")] {
        dir.qblk(&format!("create -f {format} {name} 64M")).good();
        dir.qblk(&format!("write -q -f {format} {name} 0 --pattern 0xee --length 64M")).good();
        dir.qblk(&format!("copy --no-create -O {format} src.raw {name}")).good();
        dir.qemu_img(&format!("compare -q src.raw {name}"));
        // The holes are given back.
        if format == "raw" {
            assert!(dir.on_disk(name) <= 3_000_000 + 40_000, "{}", dir.on_disk(name));
        }
    }
    dir.qemu_img("check -q old.qcow2");
    dir.qblk("create small.qcow2 63M").good();
    dir.qblk("copy --no-create src.raw small.qcow2")
        .bad(1, &["'small.qcow2'", "66060288", "67108864"]);
    dir.qblk("copy --no-create src.raw gone.qcow2").bad(1, &["'gone.qcow2'"]);
    assert!(!dir.exists("gone.qcow2") && dir.exists("small.qcow2"));
}

#[test]
fn sparse_0_writes_all_out() {
    let dir = Dir::new();
    source(&dir);
    dir.qblk("copy -S 0 src.raw full.raw").good();
    dir.qemu_img("compare -q src.raw full.raw");
    assert!(dir.on_disk("full.raw") >= 64 * MIB);
}

#[test]
fn a_copy_never_harms_its_source() {
    let dir = Dir::new();
    source(&dir);
    dir.qblk("create -b src.raw -F raw mid.qcow2").good();
    dir.qblk("create -b mid.qcow2 top.qcow2").good();
    std::fs::hard_link(dir.path("top.qcow2"), dir.path("same.qcow2")).unwrap();
    std::os::unix::fs::symlink("src.raw", dir.path("link.raw")).unwrap();
    let before = ["src.raw", "mid.qcow2", "top.qcow2"].map(|n| dir.read(n));
    for target in
        ["top.qcow2", "same.qcow2", "file:./top.qcow2", "mid.qcow2", "src.raw", "link.raw"]
    {
        for how in ["--force", "--no-create", ""] {
            dir.qblk(&format!("copy {how} top.qcow2 {target}")).bad(1, &[target]);
        }
    }
    assert!(before == ["src.raw", "mid.qcow2", "top.qcow2"].map(|n| dir.read(n)));
}

#[test]
fn a_copy_that_fails_leaves_nothing_half_made() {
    let dir = Dir::new();
    dir.write("src.raw", &noise(1, 8 << 20));
    // No file may become larger than 1 MiB: the copy fails in the middle.
    let tool = env!("CARGO_BIN_EXE_qblk");
    for format in ["raw", "qcow2"] {
        let script = format!("ulimit -f 2048; exec '{tool}' copy -O {format} src.raw half.img");
        let mut sh = std::process::Command::new("sh");
        sh.args(["-c", &script]).current_dir(dir.path(""));
        let ran: Ran = sh.output().unwrap().into();
        ran.bad(1, &["'half.img'", "File too large"]);
        assert_eq!(dir.names(), ["src.raw"]);
    }
    // A source that turns out to be broken.
    dir.qblk("copy -O qcow2 src.raw broken.qcow2").good();
    let end = std::fs::metadata(dir.path("broken.qcow2")).unwrap().len();
    assert!(end > 8 << 20);
    let l2 = u64::from_be_bytes(dir.read("broken.qcow2")[40..48].try_into().unwrap());
    let mut bytes = dir.read("broken.qcow2");
    let table =
        u64::from_be_bytes(bytes[l2 as usize..][..8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    // Its twentieth cluster lies far beyond every limit, and where no cluster begins.
    bytes[table as usize + 20 * 8..][..8].copy_from_slice(&0x80ff_ffff_ffff_fe00_u64.to_be_bytes());
    dir.write("broken.qcow2", &bytes);
    dir.qblk("copy broken.qcow2 half.img").bad(1, &["'broken.qcow2'"]);
    assert!(!dir.exists("half.img"));
}

/// A copy that goes on for as long as it is let: all zeroes of a huge image are written out.
fn endless(dir: &Dir, args: &str) -> std::process::Child {
    dir.qblk("create -f raw huge.raw 1T").good();
    let line = format!("copy -f raw -S 0 huge.raw half.img {args}");
    let child = dir
        .command(line.split_whitespace())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let grown =
        || std::fs::metadata(dir.path("half.img")).is_ok_and(|m| m.blocks() * 512 > 4 * MIB);
    while !grown() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the copy does not begin");
        std::thread::yield_now();
    }
    child
}

#[test]
fn an_interrupted_copy_removes_its_target() {
    for (signal, status, word) in
        [(libc::SIGINT, 130, "interrupted"), (libc::SIGTERM, 143, "terminated")]
    {
        let dir = Dir::new();
        let child = endless(&dir, "");
        // SAFETY: the child is ours and has not been waited for.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
        let ran: Ran = child.wait_with_output().unwrap().into();
        ran.bad(status, &[word]);
        assert_eq!(dir.names(), ["huge.raw"]);
    }
}

#[test]
fn an_interrupted_copy_into_an_existing_target_says_that_it_is_partly_written() {
    let dir = Dir::new();
    dir.qblk("create -f raw half.img 1T").good();
    let child = endless(&dir, "--no-create -O raw");
    // SAFETY: the child is ours and has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let ran: Ran = child.wait_with_output().unwrap().into();
    ran.bad(130, &["'half.img'", "partly written"]);
    assert!(dir.exists("half.img"));
}

#[test]
fn progress_is_shown_only_where_someone_looks() {
    let dir = Dir::new();
    source(&dir);
    // `good` demands that stderr, which is no terminal here, stays empty.
    let text = dir.qblk("copy src.raw a.raw").good();
    assert!(text.starts_with("a.raw: 64 MiB (67108864 bytes) copied"), "{text}");
    assert_eq!(dir.qblk("copy -q src.raw b.raw").good(), "");
    let ran = dir.qblk("copy --progress src.raw c.raw");
    assert_eq!(ran.status, Some(0));
    assert!(ran.err.contains("64 MiB of 64 MiB (100 %)"), "{}", ran.err);
    dir.qblk("copy --progress -q src.raw d.raw").bad(2, &["--quiet"]);
    let json = dir.qblk("copy --json src.raw e.raw").json();
    assert_eq!(json["size"], 64 * MIB);
}

#[test]
fn a_bar_is_drawn_on_a_terminal() {
    let dir = Dir::new();
    source(&dir);
    // SAFETY: openpty fills in two descriptors, which become ours.
    let (master, slave) = unsafe {
        use std::os::fd::{FromRawFd, OwnedFd};
        let (mut m, mut s) = (0, 0);
        let null = std::ptr::null_mut();
        assert_eq!(libc::openpty(&mut m, &mut s, null, std::ptr::null(), std::ptr::null()), 0);
        (std::fs::File::from_raw_fd(m), OwnedFd::from_raw_fd(s))
    };
    let mut copy = dir.command(["copy", "src.raw", "a.raw"]);
    let status =
        copy.env("TERM", "xterm").stderr(slave).stdout(std::process::Stdio::null()).status();
    assert_eq!(status.unwrap().code(), Some(0));
    drop(copy);
    // What was drawn waits in the terminal; after it comes the error of a terminal that has closed.
    let mut drawn = Vec::new();
    let _ = std::io::Read::read_to_end(&mut &master, &mut drawn);
    let drawn = String::from_utf8_lossy(&drawn);
    assert!(drawn.contains("of 64.00 MiB") && drawn.contains('%'), "{drawn:?}");
}
