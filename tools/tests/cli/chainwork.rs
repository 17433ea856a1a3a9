use crate::support::*;

#[test]
fn commit_moves_what_is_above_down_and_says_so() {
    let dir = Dir::new();
    dir.qblk("create -f raw base.raw 4M").good();
    dir.qblk("create -b base.raw -F raw top.qcow2 6M").good();
    dir.qblk("write top.qcow2 1M --pattern 0x22 --length 4M").good();
    dir.qemu_img("convert -O raw top.qcow2 want.raw");
    assert_eq!(dir.qblk("commit --keep top.qcow2").good(), "top.qcow2: committed to 'base.raw'\n");
    dir.qemu_img("compare -f raw -F raw base.raw want.raw");
    dir.qblk("write top.qcow2 2M --pattern 0x33 --length 1000").good();
    dir.qemu_img("convert -O raw top.qcow2 want.raw");
    let json = dir.qblk("commit --json top.qcow2").json();
    assert_eq!((&json["backing_filename"], &json["kept"]), (&"base.raw".into(), &false.into()));
    dir.qemu_img("compare -f raw -F raw base.raw want.raw");
    dir.qemu_img("compare -f qcow2 -F raw top.qcow2 want.raw");
    dir.qemu_img("check -q top.qcow2");
    assert_eq!(dir.qblk("commit -q top.qcow2").good(), "");
    let ran = dir.qblk("commit --progress top.qcow2");
    assert!(ran.status == Some(0) && ran.err.contains("100 %"), "{}", ran.err);
    dir.qblk("create lone.qcow2 1M").good();
    dir.qblk("commit lone.qcow2").bad(1, &["lone.qcow2", "no backing"]);
    dir.qblk("commit missing.qcow2").bad(1, &["missing.qcow2"]);
}

#[test]
fn rebase_keeps_what_is_read_unless_told_otherwise() {
    let dir = Dir::new();
    for (name, pattern) in [("a.raw", 1), ("b.raw", 2)] {
        dir.qblk(&format!("create -f raw {name} 4M")).good();
        dir.qblk(&format!("write -f raw {name} 0 --pattern {pattern} --length 4M")).good();
    }
    dir.qblk("create -b a.raw -F raw top.qcow2 4M").good();
    dir.qblk("write top.qcow2 1M --pattern 0x22 --length 1M").good();
    dir.qemu_img("convert -O raw top.qcow2 want.raw");
    assert_eq!(
        dir.qblk("rebase -b b.raw -F raw top.qcow2").good(),
        "top.qcow2: backing file now b.raw, was a.raw\n"
    );
    dir.qemu_img("compare -f qcow2 -F raw top.qcow2 want.raw");
    let json = dir.qblk("rebase -u -b a.raw -F raw --json top.qcow2").json();
    assert_eq!(json["old_backing_filename"], "b.raw");
    assert_eq!(
        dir.qblk("rebase -t 3 -b= top.qcow2").good(),
        "top.qcow2: backing file now none, was a.raw\n"
    );
    dir.qemu_img("compare -f qcow2 -F raw top.qcow2 want.raw");
    dir.qemu_img("check -q top.qcow2");
    dir.qblk("rebase -b missing.raw top.qcow2").bad(1, &["missing.raw"]);
    dir.qblk("rebase -u -b missing.raw top.qcow2").bad(1, &["missing.raw"]);
    dir.qblk("rebase -q -u -b missing.raw -F raw top.qcow2").good();
    let info = dir.qblk("info --json top.qcow2").json().to_string();
    assert!(info.contains("missing.raw"), "{info}");
}

#[test]
fn a_compressed_copy_is_smaller_and_the_same() {
    let dir = Dir::new();
    dir.qblk("create -f raw a.raw 8M").good();
    dir.qblk("write -f raw a.raw 1M --pattern 0x41 --length 6M").good();
    for kind in ["zlib", "zstd"] {
        let name = format!("{kind}.qcow2");
        dir.qblk(&format!("copy -f raw -O qcow2 -c -o compression-type={kind} a.raw {name}"))
            .good();
        dir.qemu_img(&format!("compare -f raw -F qcow2 a.raw {name}"));
        dir.qemu_img(&format!("check -q {name}"));
        let size = std::fs::metadata(dir.path(&name)).unwrap().len();
        assert!(size < 1 << 20, "{size}");
        // Read back, and compressed on top of a backing file.
        dir.qblk(&format!("copy -O raw {name} {kind}.raw")).good();
        dir.qemu_img(&format!("compare -f raw -F raw a.raw {kind}.raw"));
        dir.qblk(&format!("copy -c -b {name} a.raw -f raw -O qcow2 over-{name}")).good();
        dir.qemu_img(&format!("compare -f raw -F qcow2 a.raw over-{name}"));
    }
    dir.qblk("copy -f raw -O raw -c a.raw b.raw").bad(1, &["compressed writes"]);
    assert!(!dir.exists("b.raw"));
}
