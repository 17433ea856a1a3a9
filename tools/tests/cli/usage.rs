use std::io::Read;
use std::process::Stdio;

use crate::support::*;

pub const COMMANDS: [&str; 19] = [
    "info", "create", "map", "copy", "check", "resize", "snapshot", "amend", "commit", "rebase",
    "read", "write", "bench", "bitmap", "lock", "serve", "list", "layers", "plugin",
];

#[test]
fn help_and_version_are_answers() {
    let dir = Dir::new();
    let help = dir.qblk("--help").good();
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{help}");
        assert!(dir.qblk(&format!("{command} --help")).good().contains("Usage: qblk"));
    }
    assert!(dir.qblk("--version").good().starts_with("qblk 0."));
}

#[test]
fn wrong_usage_is_status_2() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 1M").good();
    for (line, words) in [
        ("inof a.qcow2", vec!["inof", "info"]),
        ("info", vec!["<IMAGE>"]),
        ("info a.qcow2 b.qcow2", vec!["b.qcow2"]),
        ("info --jsno a.qcow2", vec!["--jsno", "--json"]),
        ("info -o nonsense=1 a.qcow2", vec!["'nonsense'", "nearest"]),
        ("info -o cache.l2-size a.qcow2", vec!["KEY=VALUE"]),
        ("info -o =1 a.qcow2", vec!["KEY=VALUE"]),
        ("info -o io=quickly a.qcow2", vec!["'io'", "'quickly'", "mmap"]),
        ("info -f floppy a.qcow2", vec!["'floppy'", "qcow2"]),
        ("info --untrusted a.qcow2", vec!["--format"]),
        ("create b.qcow2", vec!["<SIZE>"]),
        ("create b.qcow2 ten", vec!["ten", "10G"]),
        ("create b.qcow2 1.5G", vec!["1.5G"]),
        ("create b.qcow2 99999999999999999999", vec!["9999"]),
        ("create -F raw b.qcow2 1M", vec!["--backing"]),
        ("create -f vhs b.qcow2 1M", vec!["'vhs'"]),
        ("create -o cluster-size=63k b.qcow2 1M", vec!["cluster-size", "64512"]),
        ("create -o clutser-size=64k b.qcow2 1M", vec!["'clutser-size'", "'cluster-size'"]),
        ("map --max-extents 0 a.qcow2", vec!["--max-extents"]),
        ("copy a.qcow2", vec!["<TARGET>"]),
        ("copy -S 5000 a.qcow2 b.qcow2", vec!["--sparse", "4k"]),
        ("copy -o backing-fmt=raw -b a.qcow2 -F qcow2 a.qcow2 b.qcow2", vec!["backing-fmt"]),
        ("resize a.qcow2", vec!["<SIZE>"]),
        ("resize a.qcow2 +", vec!["'+'"]),
        ("resize a.qcow2 1M --shrnk", vec!["--shrnk"]),
        ("resize --preallocation=some a.qcow2 2M", vec!["preallocation", "'some'"]),
        ("read a.qcow2 x", vec!["'x'"]),
        ("write a.qcow2 0 --pattern 1", vec!["--length"]),
        ("write a.qcow2 0 --pattern 256 --length 1", vec!["256"]),
        ("write a.qcow2 0 --zero --pattern 1 --length 1", vec!["--zero", "--pattern"]),
        ("write a.qcow2 0 --may-trim", vec!["--zero"]),
        ("bench -b 0 a.qcow2", vec!["--block-size"]),
        ("bench -s nan a.qcow2", vec!["nan"]),
        ("bench --flush-every 2 a.qcow2", vec!["--write"]),
        ("bench -p zigzag a.qcow2", vec!["zigzag", "sequential"]),
    ] {
        dir.qblk(line).bad(2, &words);
    }
    // Without a command there is nothing wrong to name: the help comes instead.
    let ran = dir.qblk("");
    assert_eq!(ran.status, Some(2));
    assert!(ran.err.contains("Commands:") && ran.out.is_empty());
    assert_eq!(dir.names(), ["a.qcow2"]);
}

#[test]
fn what_cannot_be_opened_is_named() {
    let dir = Dir::new();
    dir.write("garbage.qcow2", &noise(1, 70000));
    std::fs::create_dir(dir.path("folder")).unwrap();
    dir.write("truncated.qcow2", b"QFI\xfb\0\0\0\x03");
    dir.fifo("fifo");
    for command in ["info", "map", "read", "bench"] {
        dir.qblk(&format!("{command} missing.img")).bad(1, &["'missing.img'", "No such file"]);
        // Opening it would wait for a writer for ever.
        dir.qblk(&format!("{command} fifo")).bad(1, &["'fifo'"]);
        dir.qblk(&format!("{command} folder")).bad(1, &["'folder'"]);
        dir.qblk(&format!("{command} -f qcow2 garbage.qcow2")).bad(1, &["'garbage.qcow2'"]);
        dir.qblk(&format!("{command} truncated.qcow2")).bad(1, &["'truncated.qcow2'"]);
    }
    dir.qblk("resize missing.img 1G").bad(1, &["'missing.img'"]);
    dir.qblk("write missing.img 0 --zero --length 1").bad(1, &["'missing.img'"]);
    dir.qblk("copy missing.img b.img").bad(1, &["'missing.img'"]);
    dir.qblk("create nowhere/b.img 1M").bad(1, &["'nowhere/b.img'", "No such file"]);
    dir.qblk("create folder 1M").bad(1, &["'folder'"]);
    dir.qblk("create -b missing.img b.img").bad(1, &["missing.img"]);
    assert!(!dir.exists("b.img") && !dir.exists("missing.img"));
}

#[test]
fn a_reader_that_goes_away_ends_us_quietly() {
    let dir = Dir::new();
    dir.qblk("create -f raw big.img 64M").good();
    dir.qblk("write big.img 0 --pattern 65 --length 64M").good();
    for line in ["read big.img --raw", "read big.img --hex", "map big.img", "map --json big.img"] {
        let mut child = dir
            .command(line.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0; 8];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        // The pipe is closed now, with most of `read`'s output still to come.
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!((child.wait().unwrap().code(), &*err), (Some(0), ""), "{line}");
    }
}

#[test]
fn a_full_output_device_is_an_error() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 1M").good();
    for line in ["info a.qcow2", "info --json a.qcow2", "map a.qcow2", "read a.qcow2"] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let ran: Ran = dir.command(line.split_whitespace()).stdout(full).output().unwrap().into();
        ran.bad(1, &["standard output", "No space left"]);
    }
}
