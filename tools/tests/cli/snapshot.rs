use crate::support::*;

#[test]
fn snapshots_are_made_listed_applied_and_deleted() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 4M").good();
    assert_eq!(dir.qblk("snapshot list a.qcow2").good(), "a.qcow2: no snapshots\n");
    dir.qblk("write a.qcow2 0 --pattern 0x11 --length 1M -q").good();
    let text = dir.qblk("snapshot create a.qcow2 before").good();
    assert_eq!(text, "a.qcow2: made snapshot 'before', ID 1\n");
    dir.qblk("write a.qcow2 0 --pattern 0x22 --length 1M -q").good();
    let line = "snapshot create a.qcow2 after --set id=x --set date=86400.5 --set vm-clock=3723004000000 \
                --json";
    let json = dir.qblk(line).json();
    assert_eq!((&json["id"], &json["snapshot"]), (&"x".into(), &"after".into()));
    let all = dir.qblk("snapshot list a.qcow2 --json").json();
    assert_eq!(all[0]["name"], "before");
    assert_eq!(all[1]["date_nsec"], 500_000_000);
    assert_eq!(all[1]["disk_size"], 4 << 20);
    assert_eq!(all[1]["icount"], serde_json::Value::Null);
    let text = dir.qblk("snapshot list a.qcow2").good();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("ID  NAME    DATE"), "{text}");
    assert!(lines[2].starts_with("x   after   1970-01-0"), "{text}");
    assert!(lines[2].ends_with("4 MiB  none   1:02:03.004"), "{text}");
    let info = dir.qblk("info a.qcow2").good();
    assert!(info.contains("1 'before' of 2"), "{info}");
    assert_eq!(dir.qblk("info --json a.qcow2").json()["snapshots"], all);
    // One can be looked into.
    let byte = |line: &str| dir.qblk(line).out[0];
    assert_eq!(byte("read -o snapshot=before a.qcow2 0 1 --raw"), 0x11);
    assert_eq!(byte("read a.qcow2 0 1 --raw"), 0x22);
    dir.qblk("copy -q --source-option snapshot=1 a.qcow2 b.qcow2").good();
    assert_eq!(byte("read b.qcow2 0 1 --raw"), 0x11);
    let text = dir.qblk("snapshot apply a.qcow2 before").good();
    assert_eq!(text, "a.qcow2: is what it was in snapshot 'before'\n");
    assert_eq!(byte("read a.qcow2 0 1 --raw"), 0x11);
    dir.qblk("snapshot delete a.qcow2 1 -q").good();
    assert_eq!(dir.qblk("snapshot list a.qcow2 --json").json()[0]["name"], "after");
    dir.qemu_img("check -q a.qcow2");
}

#[test]
fn what_snapshot_is_asked_wrongly_it_says() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 1M -q").good();
    dir.qblk("create -f raw a.raw 1M -q").good();
    dir.qblk("snapshot create a.qcow2 s -q").good();
    dir.qblk("snapshot create a.qcow2 s").bad(1, &["a.qcow2", "'s'", "already"]);
    dir.qblk("snapshot apply a.qcow2 t").bad(1, &["a.qcow2", "'t'", "no snapshot"]);
    dir.qblk("snapshot delete a.qcow2 t").bad(1, &["a.qcow2", "'t'"]);
    dir.qblk("snapshot create -f raw a.raw s").bad(1, &["a.raw", "internal snapshots"]);
    dir.qblk("snapshot list -f raw a.raw").bad(1, &["a.raw", "internal snapshots"]);
    dir.qblk("snapshot create a.qcow2").bad(2, &["NAME"]);
    dir.qblk("snapshot list a.qcow2 s").bad(2, &["name"]);
    dir.qblk("snapshot burn a.qcow2 s").bad(2, &["burn", "create"]);
    dir.qblk("snapshot apply a.qcow2 s --set id=1").bad(2, &["--set"]);
    dir.qblk("snapshot create a.qcow2 t --set when=now").bad(2, &["'when'"]);
    dir.qblk("write -o snapshot=s a.qcow2 0 --pattern 1 --length 1")
        .bad(1, &["a.qcow2", "read-only"]);
}
