use crate::support::*;

#[test]
fn resize_grows_shrinks_and_says_so() {
    let dir = Dir::new();
    for (name, format) in [("a.qcow2", "qcow2"), ("a.raw", "raw")] {
        dir.qblk(&format!("create -f {format} {name} 10M")).good();
        dir.qblk(&format!("write {name} 0 --pattern 0x11 --length 10M")).good();
        let size = || dir.qblk(&format!("info --json {name}")).json()["size"].as_u64().unwrap();
        let text = dir.qblk(&format!("resize -f {format} {name} +6M")).good();
        assert_eq!(
            text,
            format!("{name}: now 16 MiB (16777216 bytes), was 10 MiB (10485760 bytes)\n")
        );
        assert_eq!(size(), 16 << 20);
        // What was there stays, what came reads as zeroes.
        let ran = dir.qblk(&format!("read {name} 0 16M"));
        assert!(ran.out[..10 << 20].iter().all(|b| *b == 0x11));
        assert!(ran.out[10 << 20..].iter().all(|b| *b == 0));
        for smaller in ["-1M", "15M"] {
            dir.qblk(&format!("resize {name} {smaller}")).bad(1, &[name, "15728640", "--shrink"]);
        }
        assert_eq!(size(), 16 << 20);
        let json = dir.qblk(&format!("resize {name} -11M --shrink --json")).json();
        assert_eq!((&json["old_size"], &json["size"]), (&(16 << 20).into(), &(5 << 20).into()));
        assert_eq!(size(), 5 << 20);
        dir.qblk(&format!("resize {name} 6M -q")).good();
        let ran = dir.qblk(&format!("read {name} 5M 1M"));
        assert!(ran.out.iter().all(|b| *b == 0), "what was cut off came back");
        dir.qblk(&format!("resize {name} -7M --shrink")).bad(1, &[name]);
        dir.qblk(&format!("resize {name} +16E")).bad(2, &["+16E"]);
        dir.qblk(&format!("resize {name} +15E")).bad(1, &[name]);
        assert_eq!(size(), 6 << 20);
    }
    dir.qemu_img("check -q a.qcow2");
}

#[test]
fn resize_preallocates() {
    let dir = Dir::new();
    dir.qblk("create -f raw a.raw 1M").good();
    dir.qblk("resize -f raw a.raw 9M --preallocation full").good();
    assert!(dir.on_disk("a.raw") >= 8 << 20);
    dir.qblk("create a.qcow2 1M").good();
    dir.qblk("resize a.qcow2 9M --preallocation metadata").good();
    dir.qemu_img("check -q a.qcow2");
}
