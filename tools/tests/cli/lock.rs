//! `qblk lock`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use crate::support::*;

#[test]
fn lock_lists_who_holds_what() {
    let dir = Dir::new();
    dir.qemu_img("create -q -f qcow2 a.qcow2 1M");
    assert_eq!(dir.qblk("lock a.qcow2").good(), "not locked\n");
    assert_eq!(dir.qblk("lock --json a.qcow2").json(), serde_json::json!([]));
    let mut peer = Command::new("qemu-io")
        .args(["-f", "qcow2", "a.qcow2"])
        .current_dir(dir.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("install qemu-utils (apt-get install qemu-utils)");
    let mut input = peer.stdin.take().unwrap();
    input.write_all(b"length\n").unwrap();
    let mut answer = String::new();
    BufReader::new(peer.stdout.take().unwrap()).read_line(&mut answer).unwrap();

    let text = dir.qblk("lock a.qcow2").good();
    let line = |byte: &str| {
        let found = text.lines().find(|l| l.starts_with(byte));
        found.unwrap_or_else(|| panic!("{byte} is not in\n{text}")).to_owned()
    };
    assert_eq!(text.lines().count(), 6, "{text}");
    let pid = peer.id().to_string();
    for (byte, permission) in [
        ("100", "consistent read, used"),
        ("101", "write, used"),
        ("103", "resize, used"),
        ("201", "write, not shared"),
        ("203", "resize, not shared"),
    ] {
        let line = line(byte);
        assert!(line.contains(permission) && line.contains(&pid), "{line}");
        assert!(line.contains("'qemu-io -f qcow2 a.qcow2'"), "{line}");
    }
    let json = dir.qblk("lock --json a.qcow2").json();
    assert_eq!(json[0]["byte"], 100);
    assert_eq!(json[0]["permission"], "consistent read");
    assert_eq!((&json[0]["used"], &json[4]["used"]), (&true.into(), &false.into()));
    assert_eq!(json[0]["pid"], peer.id());
    assert_eq!(json[0]["command"], "qemu-io -f qcow2 a.qcow2");
    // And so it is said by whoever wants the image.
    dir.qblk("read a.qcow2 0 1").bad(1, &["in use", "write", &pid, "qemu-io"]);
    let state = dir.qblk("info --json a.qcow2").json()["state"].clone();
    assert!(state.as_array().unwrap().contains(&"locked".into()), "{state}");
    drop(input);
    peer.wait().unwrap();
    assert_eq!(dir.qblk("lock a.qcow2").good(), "not locked\n");
    dir.qblk("lock gone").bad(1, &["gone", "No such file"]);
    dir.qblk("lock mem:1M").bad(1, &["mem:1M"]);
}
