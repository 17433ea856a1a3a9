use crate::support::*;

#[test]
fn what_is_written_is_read_in_any_way() {
    let dir = Dir::new();
    let data = noise(3, 3_000_001);
    dir.write("data.bin", &data);
    dir.qblk("create -o cluster-size=4k a.qcow2 8M").good();
    let text = dir.qblk("write a.qcow2 12345 --from data.bin").good();
    assert_eq!(text, "a.qcow2: 2.86 MiB (3000001 bytes) written at offset 12345\n");
    assert!(dir.qblk("read a.qcow2 12345 3000001").out == data);
    dir.with_input("write a.qcow2 0x400000 --fua -q", &data).good();
    assert!(dir.qblk("read a.qcow2 4M 3000001").out == data);
    dir.with_input("write a.qcow2 4M --from - --length 10 -q", &noise(9, 100)).good();
    assert_eq!(dir.qblk("read a.qcow2 4M 11").out, [&noise(9, 10)[..], &data[10..11]].concat());
    dir.qblk("read a.qcow2 12345 3000001 --to out.bin").good();
    assert!(dir.read("out.bin") == data);
    // Without a length: to the end.
    assert_eq!(dir.qblk("read a.qcow2 8388600").out, [0; 8]);
    assert_eq!(dir.qblk("read a.qcow2").out.len(), 8 << 20);
    assert_eq!(dir.qblk("read a.qcow2 8M").out, b"");
    dir.qemu_img("check -q a.qcow2");
}

#[test]
fn patterns_zeroes_and_trims() {
    let dir = Dir::new();
    dir.qblk("create -f raw a.raw 4M").good();
    dir.qblk("write -f raw a.raw 0 --pattern 0xa5 --length 4M").good();
    assert!(dir.read("a.raw").iter().all(|b| *b == 0xa5));
    dir.qblk("write -f raw a.raw 1M --zero --length 1M").good();
    assert!(dir.on_disk("a.raw") >= 4 << 20, "zero without --may-trim keeps the space");
    let json = dir.qblk("write -f raw a.raw 1M --zero --may-trim --length 1M --json").json();
    assert_eq!((&json["done"], &json["length"]), (&"zeroed".into(), &(1 << 20).into()));
    assert!(dir.on_disk("a.raw") <= 3 << 20, "zero with --may-trim leaves a hole");
    dir.qblk("write -f raw a.raw 2M --trim --length 1M").good();
    assert!(dir.on_disk("a.raw") <= 2 << 20);
    let bytes = dir.read("a.raw");
    assert!(bytes[1 << 20..2 << 20].iter().all(|b| *b == 0));
    assert!(bytes[..1 << 20].iter().chain(&bytes[3 << 20..]).all(|b| *b == 0xa5));
}

#[test]
fn a_range_that_leaves_the_image_touches_nothing() {
    let dir = Dir::new();
    dir.write("two.bin", &noise(1, 2 << 20));
    dir.qblk("create -f raw a.raw 1M").good();
    for line in [
        "write a.raw 0 --from two.bin",
        "write a.raw 1 --pattern 1 --length 1M",
        "write a.raw 1 --zero --length 1M",
        "write a.raw 0xffffffffffffffff --pattern 1 --length 2",
        "read a.raw 1 1M",
        "read a.raw 2M",
        "read a.raw 0xffffffffffffffff 2 --to out.bin",
    ] {
        dir.qblk(line).bad(1, &["'a.raw'", "1048576"]);
    }
    assert_eq!(dir.on_disk("a.raw"), 0);
    assert!(!dir.exists("out.bin"));
}

#[test]
fn input_that_ends_early_is_an_error() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 1M").good();
    dir.with_input("write a.qcow2 0 --length 100", b"short")
        .bad(1, &["standard input", "5 of 100"]);
    dir.qblk("write a.qcow2 0 --from missing.bin").bad(1, &["'missing.bin'"]);
}

#[test]
fn a_dump_is_readable() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 1M").good();
    dir.with_input("write -q a.qcow2 65530", b"Hello, disk!").good();
    let text = dir.qblk("read --hex a.qcow2 65520 64").good();
    let expected = "\
000000fff0  00 00 00 00 00 00 00 00  00 00 48 65 6c 6c 6f 2c  |..........Hello,|
0000010000  20 64 69 73 6b 21 00 00  00 00 00 00 00 00 00 00  | disk!..........|
0000010010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|
*
0000010030
";
    assert_eq!(text, expected);
}

#[test]
fn reading_never_overwrites_what_is_read() {
    let dir = Dir::new();
    dir.qblk("create -f raw base.raw 1M").good();
    dir.qblk("write -q -f raw base.raw 0 --pattern 7 --length 1M").good();
    dir.qblk("create -b base.raw -F raw top.qcow2").good();
    dir.qblk("read top.qcow2 --to base.raw").bad(1, &["'base.raw'"]);
    dir.qblk("read top.qcow2 --to ./top.qcow2").bad(1, &["top.qcow2"]);
    assert!(dir.read("base.raw").iter().all(|b| *b == 7));
}

#[test]
fn open_flags_reach_the_library() {
    let dir = Dir::new();
    dir.qblk("create -f raw base.raw 1M").good();
    dir.qblk("write -q -f raw base.raw 0 --pattern 66 --length 1M").good();
    dir.qblk("create -b base.raw -F raw top.qcow2").good();
    assert_eq!(dir.qblk("read top.qcow2 0 4").good(), "BBBB");
    assert_eq!(dir.qblk("read --no-backing top.qcow2 0 4").good(), "\0\0\0\0");
    assert_eq!(dir.qblk("read --direct --no-lock --shared top.qcow2 3 4").good(), "BBBB");
    assert_eq!(dir.qblk("read -o io=mmap -o cache.l2_size=1M top.qcow2 3 4").good(), "BBBB");
    dir.qblk("read --untrusted -f qcow2 top.qcow2 0 4").bad(1, &["'top.qcow2'", "base.raw"]);
    assert_eq!(dir.qblk("read --untrusted -f qcow2 --no-backing top.qcow2 0 2").good(), "\0\0");
    // A guest's header must not turn a raw image into another format unasked.
    dir.with_input("write base.raw 0", b"QFI\xfb\0\0\0\x03").bad(1, &["'base.raw'", "format=raw"]);
    dir.with_input("write -q -f raw base.raw 0", b"QFI\xfb\0\0\0\x03").good();
}
