//! Every command on an image that an NBD server has.

use crate::support::*;

const MIB: u64 = 1 << 20;

/// As qemu-nbd is, unless it is told to share.
#[test]
fn a_server_that_takes_one_client_is_enough() {
    let dir = Dir::new();
    dir.sparse("src.raw", MIB, &[(0, b"data")]);
    let mut qemu = std::process::Command::new("qemu-nbd");
    let socket = dir.path("q.sock");
    qemu.args(["-t", "-r", "-f", "raw", "-k"]).arg(&socket).arg(dir.path("src.raw"));
    let mut qemu = qemu.spawn().expect("qemu-nbd; install qemu-utils");
    let begun = std::time::Instant::now();
    while !socket.exists() && begun.elapsed().as_secs() < 20 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let ran = ["map", "info", "read"].map(|command| {
        let rest = if command == "read" { " 0 4 --to out" } else { "" };
        dir.qblk(&format!("{command} -o nbd.timeout=10 {uri}{rest}"))
    });
    let ended = qemu.kill().and_then(|()| qemu.wait());
    ended.unwrap();
    ran.into_iter().for_each(|r| _ = r.good());
    assert_eq!(dir.read("out"), b"data");
}

#[test]
fn every_command_takes_an_nbd_uri_for_an_image() {
    let dir = Dir::new();
    dir.sparse("src.raw", 16 * MIB, &[(MIB, &noise(1, 2 << 20)), (15 * MIB, b"near the end")]);
    let served = dir.serve("-U a.sock -e src=src.raw -e new=mem:16M -f raw", 2);
    let (src, new) = (served.uri(0).to_owned(), served.uri(1).to_owned());

    let text = dir.qblk(&format!("info {src}")).good();
    assert!(text.contains(&src) && text.contains("16 MiB (16777216 bytes)"), "{text}");
    let json = dir.qblk(&format!("info --json --backing-chain {src}")).json();
    assert_eq!((&json[0]["driver"], &json[0]["size"]), (&"nbd".into(), &(16 * MIB).into()));

    assert_eq!(json[0]["properties"]["nbd.export"], "src");

    let json = dir.qblk(&format!("map --json {src}")).json();
    assert_eq!(json["totals"]["data"], 2 * MIB + 4096);
    dir.qblk(&format!("map {src} --svg map.svg")).good();
    assert!(dir.read("map.svg").starts_with(b"<"));

    dir.qblk(&format!("copy -q {src} copy.qcow2 -O qcow2")).good();
    dir.qemu_img("compare -q -f raw -F qcow2 src.raw copy.qcow2");
    dir.qblk(&format!("read {src} 15M 12 --to end")).good();
    assert_eq!(dir.read("end"), b"near the end");

    // An export is there already, whatever it holds.
    dir.qblk(&format!("write -q {new} 0 --pattern 0xee --length 16M")).good();
    let json = dir.qblk(&format!("copy --json copy.qcow2 {new}")).json();
    assert_eq!(
        (&json["target"], &json["written"]),
        (&new.as_str().into(), &(2 * MIB + 4096).into())
    );
    dir.qemu_img(&format!("compare -q -f raw -F raw src.raw {new}"));
    dir.qblk(&format!("write -q {new} 0 --zero --length 16M")).good();
    dir.qblk(&format!("copy -q --no-create {src} {new}")).good();
    dir.qemu_img(&format!("compare -q -f raw -F raw src.raw {new}"));

    dir.qblk(&format!("write -q {new} 3M --pattern 7 --length 1000 --fua")).good();
    assert_eq!(dir.qblk(&format!("read {new} 3M 1000 --raw")).out, [7; 1000]);
    let json = dir.qblk(&format!("bench --json -c 50 {new} --write")).json();
    assert!(json.is_object());
    served.end();
    assert_eq!(dir.names(), ["copy.qcow2", "end", "map.svg", "src.raw"]);
}

#[test]
fn what_an_export_cannot_be_is_said() {
    let dir = Dir::new();
    dir.qblk("create -q -f raw src.raw 2M").good();
    let served = dir.serve("-U a.sock mem:1M", 1);
    let uri = served.uri(0).to_owned();
    dir.qblk(&format!("create {uri} 1M")).bad(1, &[&uri, "made by its server"]);
    dir.qblk(&format!("resize {uri} 2M")).bad(1, &[&uri, "resize"]);
    dir.qblk(&format!("copy src.raw {uri}")).bad(1, &[&uri, "too few"]);
    dir.qblk(&format!("copy -b src.raw src.raw {uri}")).bad(2, &[&uri, "--backing"]);
    dir.qblk(&format!("copy {uri} {uri}")).bad(1, &[&uri, "the same"]);
    dir.qblk(&format!("read {uri} 1M 1")).bad(1, &[&uri]);
    dir.qblk("info nbd+unix:///?socket=gone.sock").bad(1, &["gone.sock", "No such file"]);
    dir.qblk("info nbd://localhost:x").bad(2, &["'x'", "port"]);
    dir.qblk("copy src.raw nbd+unix:///?socket=gone.sock").bad(1, &["gone.sock", "No such file"]);
    served.end();
    // A path that only looks like a URI is still a path.
    dir.write("nbd:x", &[0; 512]);
    assert_eq!(dir.qblk("info --json file:nbd:x").json()["size"], 512);
    assert_eq!(dir.names(), ["nbd:x", "src.raw"]);
}

#[test]
fn the_export_of_a_command_is_an_image_too() {
    let dir = Dir::new();
    let json: Ran = dir
        .command(["info", "--json", "-o", "argv=nbdkit -s memory 3M", "nbd+exec:"])
        .output()
        .unwrap()
        .into();
    assert_eq!(json.json()["size"], 3 * MIB, "apt-get install nbdkit");
}

#[test]
fn an_interrupted_copy_into_an_export_says_that_it_is_partly_written() {
    let dir = Dir::new();
    dir.qblk("create -q -f raw huge.raw 1T").good();
    dir.qblk("create -q -f raw half.raw 1T").good();
    let served = dir.serve("-U a.sock half.raw -f raw", 1);
    let line = format!("copy -f raw -S 0 huge.raw {}", served.uri(0));
    let mut command = dir.command(line.split(' '));
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    let begun = std::time::Instant::now();
    while dir.on_disk("half.raw") < 4 * MIB {
        assert!(begun.elapsed().as_secs() < 60, "the copy does not begin");
        std::thread::yield_now();
    }
    // SAFETY: the child is ours and has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let ran: Ran = child.wait_with_output().unwrap().into();
    ran.bad(130, &["a.sock", "partly written"]);
    served.end();
}
