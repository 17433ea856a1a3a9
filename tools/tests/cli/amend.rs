use crate::support::*;

#[test]
fn amend_changes_what_an_image_is_like() {
    let dir = Dir::new();
    dir.qblk("create -f raw base.raw 1M -q").good();
    dir.qblk("create -o compat=0.10 a.qcow2 1M -b base.raw -F raw -q").good();
    dir.qblk("write a.qcow2 0 --pattern 0x11 --length 300k -q").good();
    let text =
        dir.qblk("amend a.qcow2 -o compat=1.1 -o refcount-bits=64 -o lazy-refcounts=on").good();
    assert_eq!(text, "a.qcow2: amended\n");
    let about = dir.qemu_img("info a.qcow2");
    for words in ["compat: 1.1", "refcount bits: 64", "lazy refcounts: true"] {
        assert!(about.contains(words), "{about}");
    }
    // What it stands on need not be there.
    dir.qblk("amend a.qcow2 -o backing-file=elsewhere -o backing-fmt=qcow2 -q").good();
    let json = dir.qblk("info --json a.qcow2").json();
    assert_eq!(json["backing_filename"], "elsewhere");
    assert_eq!(json["backing_format"], "qcow2");
    let json = dir.qblk("amend a.qcow2 -o backing-file= --json").json();
    assert_eq!(json["filename"], "a.qcow2");
    assert_eq!(dir.qblk("info --json a.qcow2").json()["backing_filename"], serde_json::Value::Null);
    dir.qemu_img("check -q a.qcow2");
}

#[test]
fn what_amend_is_asked_wrongly_it_says() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 1M -q").good();
    dir.qblk("create -f raw a.raw 1M -q").good();
    dir.qblk("amend a.qcow2").bad(2, &["-o"]);
    dir.qblk("amend a.qcow2 -o cluster-size=4k").bad(2, &["'cluster-size'", "amending"]);
    dir.qblk("amend a.qcow2 -o compat=2").bad(2, &["'compat'"]);
    dir.qblk("amend a.qcow2 -o refcount-bits=1 -o compat=0.10").bad(1, &["a.qcow2", "16 bits"]);
    dir.qblk("amend a.qcow2 -o encrypt.state=active").bad(1, &["a.qcow2", "key slots"]);
    dir.qblk("amend -f raw a.raw -o compat=1.1").bad(1, &["a.raw", "amending"]);
}
