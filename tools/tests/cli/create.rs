use crate::support::*;

#[test]
fn create_makes_what_was_asked_for() {
    let dir = Dir::new();
    let text = dir.qblk("create disk.qcow2 10G").good();
    assert_eq!(text, "disk.qcow2: new qcow2 image, 10 GiB (10737418240 bytes)\n");
    dir.qemu_img("check -q disk.qcow2");
    let info = dir.qemu_img("info --output=json disk.qcow2");
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], 10u64 << 30);

    assert_eq!(dir.qblk("create -q -f raw disk.raw 1000k").good(), "");
    assert_eq!(std::fs::metadata(dir.path("disk.raw")).unwrap().len(), 1_024_000);
    assert_eq!(dir.on_disk("disk.raw"), 0);

    let line = "create --json -o cluster_size=4k -o compat=0.10 -o refcount-bits=16 old.qcow2 5M";
    let json = dir.qblk(line).json();
    assert_eq!((&json["filename"], &json["size"]), (&"old.qcow2".into(), &(5 << 20).into()));
    let json = dir.qblk("info --json old.qcow2").json();
    assert_eq!(json["cluster_size"], 4096);
    assert_eq!(json["properties"]["qcow2.compat"], "0.10");
}

#[test]
fn an_overlay_takes_its_size_from_its_backing_file() {
    let dir = Dir::new();
    std::fs::create_dir(dir.path("sub")).unwrap();
    dir.sparse("sub/base.raw", 5_000_192, &[(4096, b"hello")]);
    // Relative to where the overlay is, as it is recorded.
    dir.qblk("create -b base.raw -F raw sub/top.qcow2").good();
    let json = dir.qblk("info --json sub/top.qcow2").json();
    assert_eq!(json["size"], 5_000_192);
    assert_eq!(
        (&json["backing_filename"], &json["backing_format"]),
        (&"base.raw".into(), &"raw".into())
    );
    assert_eq!(dir.qblk("read sub/top.qcow2 4k 5").good(), "hello");
    // A size of its own wins; a format that is not given is found, and recorded.
    dir.qblk("create -b top.qcow2 sub/more.qcow2 1G").good();
    let json = dir.qblk("info --json sub/more.qcow2").json();
    assert_eq!((&json["size"], &json["backing_format"]), (&(1 << 30).into(), &"qcow2".into()));
}

#[test]
fn what_holds_something_is_overwritten_only_by_force() {
    let dir = Dir::new();
    dir.write("precious.img", b"do not lose me");
    for line in ["create precious.img 1M", "copy mem:1M precious.img"] {
        dir.qblk(line).bad(1, &["'precious.img'", "--force"]);
        assert_eq!(dir.read("precious.img"), b"do not lose me");
    }
    dir.qblk("create --force precious.img 1M").good();
    assert_eq!(dir.qblk("info --json precious.img").json()["format"], "qcow2");
    // An empty file, as mktemp makes them, is nothing to lose.
    dir.write("empty.img", b"");
    dir.qblk("create empty.img 1M").good();
    // Nor can force make an image its own backing file.
    dir.qblk("create -b empty.img --force empty.img").bad(1, &["'empty.img'", "own backing file"]);
    assert_eq!(dir.qblk("info --json empty.img").json()["size"], 1 << 20);
}

#[test]
fn a_create_that_fails_leaves_nothing() {
    let dir = Dir::new();
    dir.qblk("create -o preallocation=metadata -f raw a.raw 1M").bad(2, &["preallocation"]);
    dir.qblk("create -f raw a.raw 8E").bad(1, &["a.raw"]);
    dir.qblk("create -o data-file=none/x a.qcow2 1M").bad(1, &["none/x"]);
    assert_eq!(dir.names(), [""; 0]);
}

#[test]
fn preallocated_space_is_there() {
    let dir = Dir::new();
    dir.qblk("create -f raw -o preallocation=full full.raw 4M").good();
    assert!(dir.on_disk("full.raw") >= 4 << 20);
    dir.qblk("create -o preallocation=falloc f.qcow2 4M").good();
    assert!(dir.on_disk("f.qcow2") >= 4 << 20);
    dir.qemu_img("check -q f.qcow2");
}
