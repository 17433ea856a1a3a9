use std::io::Write;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::nbd::Served;
use crate::support::*;

const MIB: usize = 1 << 20;
/// A port of our own for each test.
const ANY: &str = "--uri nbd://127.0.0.1:0";

/// Wait for something that another process does soon.
#[track_caller]
fn wait_until(done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A qcow2 image of 32 MiB, and a raw file with what is in it.
fn image(dir: &Dir) {
    dir.sparse("src.raw", 32 * MIB as u64, &[(MIB as u64, &noise(1, 5 * MIB)), (20 << 20, b"x")]);
    dir.qblk("copy -q -O qcow2 src.raw disk.qcow2").good();
}

#[test]
fn what_is_served_is_read_and_written_by_others() {
    let dir = Dir::new();
    image(&dir);
    let served = dir.serve(&format!("{ANY} disk.qcow2"), 1);
    let uri = served.uri(0).to_owned();
    assert_eq!(served.lines[0], format!("serving disk.qcow2 at {uri}"));
    assert_eq!(dir.nbdinfo(&["--size", &uri]).trim(), "33554432");
    // Whatever name a client asks for, it is the one image.
    assert_eq!(dir.nbdinfo(&["--size", &format!("{uri}/else")]).trim(), "33554432");
    dir.nbdcopy(&uri, "back.raw");
    dir.qemu_img("compare -q -f raw -F raw src.raw back.raw");
    dir.qemu_img(&format!("compare -q -f raw -F raw src.raw {uri}"));
    // Holes are told.
    assert!(dir.nbdinfo(&["--map", &uri]).contains("hole,zero"));
    let new = noise(2, 32 * MIB);
    dir.write("new.raw", &new);
    dir.nbdcopy("new.raw", &uri);
    assert_eq!(served.end(), "");
    dir.qemu_img("compare -q -f raw -F qcow2 new.raw disk.qcow2");
    dir.qemu_img("check -q disk.qcow2");
    assert_eq!(dir.names(), ["back.raw", "disk.qcow2", "new.raw", "src.raw"]);
}

#[test]
fn read_only_is_read_only() {
    let dir = Dir::new();
    image(&dir);
    let before = dir.read("disk.qcow2");
    let served = dir.serve(&format!("{ANY} -r disk.qcow2"), 1);
    let uri = served.uri(0).to_owned();
    assert_eq!(served.lines[0], format!("serving disk.qcow2 read-only at {uri}"));
    assert_eq!(dir.peer("libnbd-bin", "nbdinfo", &["--is", "read-only", &uri]).status, Some(0));
    dir.qblk(&format!("write {uri} 0 --pattern 1 --length 1")).bad(1, &[&uri]);
    served.end();
    assert!(before == dir.read("disk.qcow2"));
}

#[test]
fn several_images_have_the_names_of_their_files() {
    let dir = Dir::new();
    image(&dir);
    let served =
        dir.serve(&format!("{ANY} ./disk.qcow2 -f raw src.raw -e a/b=mem:1M -e =mem:2M"), 4);
    let (disk, other) = (served.uri(0).to_owned(), served.uri(2).to_owned());
    assert!(disk.ends_with("/disk.qcow2") && other.ends_with("/a/b"), "{:?}", served.lines);
    let server = disk.strip_suffix("/disk.qcow2").unwrap();
    assert_eq!(served.uri(3), server);
    assert_eq!(dir.nbdinfo(&["--size", server]).trim(), "2097152");
    assert_eq!(dir.nbdinfo(&["--size", &other]).trim(), "1048576");
    dir.qemu_img(&format!("compare -q -f raw -F raw src.raw {server}/src.raw"));
    let listed = dir.nbdinfo(&["--list", "--json", "--no-content", server]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["exports"].as_array().unwrap().len(), 4);
    assert_eq!(dir.qblk(&format!("list {server}")).good(), "(default)\na/b\ndisk.qcow2\nsrc.raw\n");
    dir.qblk(&format!("info {server}/nothing")).bad(1, &["'nothing'"]);
    served.end();
}

#[test]
fn list_tells_names_and_descriptions() {
    let dir = Dir::new();
    let args = ["serve", "--uri", "nbd://127.0.0.1:0/my%20disk", "--name", "my disk"];
    let mut command = dir.command(args);
    command.args(["mem:1M", "--description", "the small one"]);
    let served = Served::begin(command.stdout(Stdio::piped()).stderr(Stdio::piped()), 1);
    let uri = served.uri(0).to_owned();
    assert!(uri.ends_with("/my%20disk"), "{uri}");
    assert_eq!(dir.qblk(&format!("list {uri}")).good(), "my disk  the small one\n");
    let json = dir.qblk(&format!("list --json {uri}")).json();
    let one = serde_json::json!({"name": "my disk", "description": "the small one", "uri": uri});
    assert_eq!(json, serde_json::json!([one]));
    served.end();
    dir.qblk(&format!("list {uri}")).bad(1, &["refused"]);
    // The default is there once, also if another answers to all other names.
    let served = dir.serve("-U a.sock -e =mem:1M -e *=mem:2M", 2);
    assert_eq!(
        dir.qblk("list --json nbd+unix:///?socket=a.sock").json().as_array().unwrap().len(),
        1
    );
    assert_eq!(dir.nbdinfo(&["--size", "nbd+unix:///?socket=a.sock"]).trim(), "1048576");
    assert_eq!(dir.nbdinfo(&["--size", "nbd+unix:///other?socket=a.sock"]).trim(), "2097152");
    served.end();
    dir.qblk("list disk.qcow2").bad(1, &["'disk.qcow2'", "NBD URI"]);
    dir.qblk("list -o tls-cb=x nbd://localhost").bad(2, &["'tls-cb'"]);
}

#[test]
fn every_place_is_told_with_its_real_port() {
    let dir = Dir::new();
    let args = format!("{ANY} --uri nbd://localhost:0 -U a.sock --pid-file pid mem:3M");
    let served = dir.serve(&args, 3);
    assert_eq!(served.uri(2), "nbd+unix:///?socket=a.sock");
    assert!(served.uri(1).starts_with("nbd://localhost:"), "{}", served.uri(1));
    for place in 0..3 {
        assert_eq!(dir.nbdinfo(&["--size", served.uri(place)]).trim(), "3145728");
    }
    let pid = String::from_utf8(dir.read("pid")).unwrap();
    // SAFETY: signal 0 asks whether there is such a process.
    assert_eq!(unsafe { libc::kill(pid.trim().parse().unwrap(), 0) }, 0);
    served.end();
    assert!(dir.names().is_empty(), "{:?}", dir.names());
}

#[test]
fn a_signal_ends_it_well() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let dir = Dir::new();
        image(&dir);
        let served = dir.serve("-U a.sock disk.qcow2", 1);
        // A client that stays: it wrote, and did not flush.
        let mut client = Command::new("qemu-io");
        client.args(["-f", "raw", served.uri(0)]).current_dir(dir.path(""));
        client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut client = match client.spawn() {
            Ok(client) => client,
            Err(e) => panic!("qemu-io: {e}; this test needs it: apt-get install qemu-utils"),
        };
        let mut to = client.stdin.take().unwrap();
        to.write_all(b"write -P 9 30M 64k\n").unwrap();
        let mut from = std::io::BufReader::new(client.stdout.take().unwrap());
        let mut answer = String::new();
        while !answer.contains("wrote 65536/65536") {
            assert_ne!(std::io::BufRead::read_line(&mut from, &mut answer).unwrap(), 0);
        }
        served.signal(signal);
        assert_eq!(served.wait().good(), "");
        drop((to, from));
        client.wait().unwrap();
        dir.qemu_img("check -q disk.qcow2");
        let read = dir.qblk("read disk.qcow2 30M 65536");
        assert!(read.out == [9; 65536], "{}", read.err);
        assert!(!dir.exists("a.sock"));
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let dir = Dir::new();
    // A disk that takes a minute for each read, and tells when one begins.
    let mut kit = Command::new("nbdkit");
    kit.args(["-f", "-U", "slow.sock", "-P", "kit.pid", "--filter=log", "--filter=delay"]);
    kit.args(["memory", "1M", "rdelay=60", "logfile=kit.log", "--exit-with-parent"]);
    kit.current_dir(dir.path(""));
    let mut kit = match kit.stdin(Stdio::null()).stderr(Stdio::null()).spawn() {
        Ok(kit) => kit,
        Err(e) => panic!("nbdkit: {e}; this test needs it: apt-get install nbdkit"),
    };
    wait_until(|| dir.exists("kit.pid"));
    let line = "-f raw -U a.sock --drain 1000 --stats nbd+unix:///?socket=slow.sock";
    let served = dir.serve(line, 1);
    let mut reader = dir.command(["read", served.uri(0), "0", "512"]);
    let mut reader = reader.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until(|| String::from_utf8_lossy(&dir.read("kit.log")).contains(" Read "));
    served.signal(libc::SIGTERM);
    // It is stopping when nobody can come any more.
    wait_until(|| !dir.exists("a.sock"));
    let begun = Instant::now();
    served.signal(libc::SIGTERM);
    let ran = served.wait();
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(ran.status, None, "{}", ran.err);
    for child in [&mut reader, &mut kit] {
        let _ = child.kill();
        child.wait().unwrap();
    }
}

#[test]
fn a_command_has_the_server_to_itself() {
    let dir = Dir::new();
    image(&dir);
    let run = |args: &[&str]| -> Ran {
        let mut command = dir.command(["serve"]);
        command
            .args(args)
            .env("TMPDIR", dir.path(""))
            .env("unixsocket", "stale")
            .output()
            .unwrap()
            .into()
    };
    let script = r#"test -S "$unixsocket" && stat -c %a "$(dirname "$unixsocket")" && nbdinfo --size "$uri""#;
    assert_eq!(run(&["disk.qcow2", "--run", script]).good(), "700\n33554432\n");
    assert_eq!(run(&["disk.qcow2", "--run", "exit 7"]).status, Some(7));
    assert_eq!(run(&["disk.qcow2", "--run", "kill -9 $$"]).status, Some(137));
    assert_eq!(run(&["disk.qcow2", "--run", "no-such-command-here"]).status, Some(127));
    // Signals are as they are for anyone (but those from 32 on, which are the C library's own), and
    // no descriptor of ours is open.
    let script = "cat /proc/self/status; ls /proc/self/fd";
    let facts = |out: Vec<u8>| -> Vec<String> {
        let text = String::from_utf8(out).unwrap();
        let mut facts: Vec<_> =
            text.lines().filter(|l| !l.contains(':')).map(str::to_owned).collect();
        for line in text.lines().filter(|l| l.starts_with("SigBlk:") || l.starts_with("SigIgn:")) {
            let set = u64::from_str_radix(line[7..].trim(), 16).unwrap();
            facts.push(format!("{:x}", set & 0x7fff_ffff));
        }
        facts
    };
    let mut plain = Command::new("/bin/sh");
    let plain = plain.args(["-c", script]).stdin(Stdio::null()).output().unwrap().stdout;
    let ours = facts(run(&["mem:1M", "--run", script]).good().into_bytes());
    assert!(ours.len() > 4, "{ours:?}");
    assert_eq!(ours, facts(plain));
    let script = "printf '%s %s' $uri \"$unixsocket\"";
    let said = run(&["mem:1M", "-e", "b=mem:1M", "--uri", "nbd://localhost:0", "--run", script]);
    let said = said.good();
    assert!(said.starts_with("nbd://localhost:") && said.ends_with("/mem:1M "), "{said}");
    // At all addresses: the URI has one of them, and clients come in.
    let said =
        run(&["mem:1M", "--uri", "nbd://:0", "--run", "echo $uri; nbdinfo --size $uri"]).good();
    assert!(said.starts_with("nbd://localhost:") && said.ends_with("\n1048576\n"), "{said}");
    // What it wrote is there when the command has ended.
    dir.write("new.raw", &noise(3, 32 * MIB));
    assert_eq!(run(&["disk.qcow2", "--run", "nbdcopy new.raw $uri"]).good(), "");
    dir.qemu_img("compare -q -f raw -F qcow2 new.raw disk.qcow2");
    assert_eq!(dir.names(), ["disk.qcow2", "new.raw", "src.raw"]);
}

#[test]
fn a_command_gets_our_signals() {
    for (signal, status) in [(libc::SIGTERM, 15), (libc::SIGINT, 2), (libc::SIGHUP, 1)] {
        let dir = Dir::new();
        // A shell that is waiting for a child acts on the signal when that has ended.
        let script = format!(
            "trap 'echo trapped {status}; exit 40' {status}; echo ready; while :; do sleep 0.1; done"
        );
        let mut command = dir.command(["serve", "mem:1M", "--run", &script]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let served = Served::begin(&mut command, 1);
        assert_eq!(served.lines, ["ready"]);
        served.signal(signal);
        let ran = served.wait();
        assert_eq!((ran.status, &*ran.err), (Some(40), ""));
        assert_eq!(ran.out, format!("trapped {status}\n").as_bytes());
    }
}

/// Start the tool as systemd does: with a socket as descriptor 3, told of in the environment.
fn activated(dir: &Dir, socket: OwnedFd, environment: &str, args: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    let tool = env!("CARGO_BIN_EXE_qblk");
    let script = format!("{environment}; exec 3<&0 </dev/null; exec '{tool}' serve {args}");
    command.args(["-c", &script]).stdin(socket).current_dir(dir.path(""));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

const ENVIRONMENT: &str = "export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=nbd";

#[test]
fn sockets_are_taken_over_from_systemd() {
    let dir = Dir::new();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    let mut command = activated(&dir, tcp.into(), ENVIRONMENT, "mem:1M");
    let served = Served::begin(&mut command, 1);
    drop(command);
    assert_eq!(served.uri(0), format!("nbd://127.0.0.1:{port}"));
    assert_eq!(dir.nbdinfo(&["--size", served.uri(0)]).trim(), "1048576");
    served.end();

    let unix = UnixListener::bind(dir.path("their.sock")).unwrap();
    let args = "mem:2M -q --run 'nbdinfo --size $uri; echo $LISTEN_PID$LISTEN_FDS$LISTEN_FDNAMES'";
    let ran: Ran = activated(&dir, unix.into(), ENVIRONMENT, args).output().unwrap().into();
    assert_eq!(ran.good(), "2097152\n\n");
    // It is theirs to remove.
    assert_eq!(dir.names(), ["their.sock"]);
}

#[test]
fn sockets_that_are_none_or_not_for_us_are_not_taken() {
    let dir = Dir::new();
    let socket = || -> OwnedFd { TcpListener::bind("127.0.0.1:0").unwrap().into() };
    let run = |socket, environment: &str, args: &str| -> Ran {
        activated(&dir, socket, environment, args).output().unwrap().into()
    };
    let file = || -> OwnedFd { tempfile::tempfile().unwrap().into() };
    run(file(), ENVIRONMENT, "mem:1M").bad(1, &["descriptor 3", "socket activation"]);
    let pair = || -> OwnedFd { std::os::unix::net::UnixStream::pair().unwrap().0.into() };
    run(pair(), ENVIRONMENT, "mem:1M").bad(1, &["descriptor 3", "listening"]);
    let two = ENVIRONMENT.replace("FDS=1", "FDS=2");
    run(socket(), &two, "mem:1M").bad(1, &["descriptor 4"]);
    let odd = ENVIRONMENT.replace("FDS=1", "FDS=-1");
    run(socket(), &odd, "mem:1M").bad(1, &["LISTEN_FDS", "'-1'"]);
    let odd = ENVIRONMENT.replace("$$", "me");
    run(socket(), &odd, "mem:1M").bad(1, &["LISTEN_PID", "'me'"]);
    // Somebody else's, perhaps our child's: they are left alone.
    let other = ENVIRONMENT.replace("$$", "1");
    let args = "mem:1M --run 'echo $LISTEN_PID $LISTEN_FDS $uri'";
    let said = run(socket(), &other, args).good();
    assert!(said.starts_with("1 1 nbd+unix:///?socket="), "{said}");
}

#[test]
fn stats_tell_what_was_done() {
    let dir = Dir::new();
    dir.write("new.raw", &noise(4, MIB));
    let line = "serve mem:1M --stats --run";
    let mut command = dir.command(line.split(' '));
    let ran: Ran = command.arg("nbdcopy new.raw $uri").output().unwrap().into();
    assert_eq!((ran.status, &*ran.out), (Some(0), &b""[..]), "{}", ran.err);
    let writes = ran.err.lines().find(|l| l.starts_with("writes: ")).unwrap_or_default();
    assert!(writes.ends_with(" 1 MiB (1048576 bytes)"), "{}", ran.err);
    assert!(ran.err.contains("connections: ") && ran.err.contains("(0 refused)"), "{}", ran.err);

    let served = dir.serve(&format!("{ANY} -q --stats --json mem:1M --pid-file pid"), 0);
    wait_until(|| dir.exists("pid"));
    served.signal(libc::SIGTERM);
    let json = served.wait().json();
    assert_eq!(json["connections"], 0);
    assert_eq!(json["write_bytes"], 0);

    let mut command = dir.command(line.split(' '));
    let ran: Ran = command.args(["nbdcopy new.raw $uri", "--json"]).output().unwrap().into();
    assert_eq!(ran.json()["write_bytes"], MIB);
}

#[test]
fn a_reader_of_what_is_served_may_go() {
    let dir = Dir::new();
    let mut command = dir.command("serve -U a.sock mem:1M --pid-file pid".split(' '));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    wait_until(|| dir.exists("pid"));
    assert_eq!(dir.nbdinfo(&["--size", "nbd+unix:///?socket=a.sock"]).trim(), "1048576");
    // SAFETY: the child is ours and has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
    let ran: Ran = child.wait_with_output().unwrap().into();
    assert_eq!((ran.status, &*ran.err), (Some(0), ""));
}

#[test]
fn nonsense_is_refused_before_anything_is_served() {
    let dir = Dir::new();
    image(&dir);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("serve --uri nbd://{} mem:1M", taken.local_addr().unwrap());
    dir.qblk("create -q ro.qcow2 1M").good();
    for (line, status, words) in [
        ("serve", 2, vec!["IMAGE"]),
        ("serve gone.qcow2", 1, vec!["'gone.qcow2'", "No such file"]),
        ("serve --uri http://localhost mem:1M", 2, vec!["http://localhost", "nbd"]),
        ("serve --uri nbd:localhost:10809 mem:1M", 2, vec!["nbd://localhost"]),
        ("serve --uri nbd://localhost:99999 mem:1M", 2, vec!["99999", "port"]),
        ("serve --uri nbd+unix:/// mem:1M", 2, vec!["?socket=PATH"]),
        ("serve --uri nbd://localhost/x --name y mem:1M", 2, vec!["'y'", "no export"]),
        ("serve --uri nbds://localhost?tls-psk-file=k mem:1M", 2, vec!["PSK"]),
        ("serve --uri nbd+unix:///?socket=nowhere/s mem:1M", 1, vec!["nowhere/s", "No such"]),
        ("serve --tls off --uri nbds://localhost mem:1M", 2, vec!["nbds", "off"]),
        ("serve --tls on --uri nbds://localhost mem:1M", 2, vec!["nbds", "required"]),
        ("serve --tls maybe mem:1M", 2, vec!["'tls'", "'maybe'", "required"]),
        ("serve --tls required mem:1M", 2, vec!["tls-certificate"]),
        ("serve --tls-key gone.pem mem:1M", 2, vec!["tls-certificate"]),
        ("serve --set max-conections=1 mem:1M", 2, vec!["'max-conections'", "max-connections"]),
        ("serve --set threads=none mem:1M", 2, vec!["'threads'", "'none'"]),
        ("serve --set threads mem:1M", 2, vec!["KEY=VALUE"]),
        ("serve --name x mem:1M mem:2M", 2, vec!["--name", "--export"]),
        ("serve --description x mem:1M mem:2M", 2, vec!["--description"]),
        ("serve mem:1M mem:1M", 2, vec!["'mem:1M'", "--export"]),
        ("serve -e x mem:1M", 2, vec!["NAME=IMAGE"]),
        ("serve -e x= mem:1M", 2, vec!["NAME=IMAGE"]),
        ("serve --shared disk.qcow2", 2, vec!["--read-only"]),
        ("serve --drain=-1 mem:1M", 2, vec!["--drain"]),
        ("serve --json mem:1M", 2, vec!["--stats"]),
        ("serve -o nonsense=1 disk.qcow2", 2, vec!["'nonsense'"]),
        (&taken, 1, vec!["Address already in use", "--uri"]),
    ] {
        dir.qblk(line).bad(status, &words);
    }
    assert_eq!(dir.names(), ["disk.qcow2", "ro.qcow2", "src.raw"]);
}

/// A directory with an authority, and a certificate of it for this host.
fn certificates(dir: &Dir) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    dir.write("ext", b"subjectAltName=DNS:localhost,IP:127.0.0.1");
    for line in [
        format!("req -x509 {key} -keyout ca-key.pem -out ca-cert.pem -subj /CN=tests -days 2"),
        format!("req {key} -keyout server-key.pem -out server.csr -subj /CN=localhost"),
        "x509 -req -in server.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial \
         -out server-cert.pem -days 2 -extfile ext"
            .into(),
    ] {
        let args: Vec<_> = line.split_whitespace().collect();
        let ran = dir.peer("openssl", "openssl", &args);
        assert_eq!(ran.status, Some(0), "{}", ran.err);
    }
}

#[test]
fn whoever_names_certificates_is_not_served_in_the_clear() {
    let dir = Dir::new();
    certificates(&dir);
    let files = "--tls-certificate server-cert.pem --tls-key server-key.pem";
    for how in [
        format!("--uri nbd://127.0.0.1:0 {files}"),
        format!("--uri nbds://127.0.0.1:0 {files}"),
        "--uri nbds://127.0.0.1:0 --tls-certificates . --tls-verify-peer off".into(),
        "--uri nbds://127.0.0.1:0?tls-certificates=. --set tls-verify-peer=off".into(),
    ] {
        let served = dir.serve(&format!("{how} mem:1M"), 1);
        let uri = served.uri(0).to_owned();
        assert!(uri.starts_with("nbds://127.0.0.1:"), "{uri}");
        let size = format!("{uri}/?tls-certificates={}", dir.path("").display());
        assert_eq!(dir.nbdinfo(&["--size", &size]).trim(), "1048576", "{how}");
        let json = dir.qblk(&format!("info --json -o tls-ca=ca-cert.pem {uri}")).json();
        assert_eq!(json["size"], 1048576);
        assert_eq!(dir.qblk(&format!("list -o tls-ca=ca-cert.pem {uri}")).good(), "(default)\n");
        dir.qblk(&format!("list {uri}")).bad(1, &[&uri, "certificate"]);
        let plain = uri.replace("nbds:", "nbd:");
        dir.qblk(&format!("info {plain}")).bad(1, &["TLS"]);
        served.end();
    }
    // In the clear only if that is said.
    let served = dir.serve(&format!("{ANY} --tls on {files} mem:1M"), 1);
    assert!(served.uri(0).starts_with("nbd://127.0.0.1:"));
    assert_eq!(dir.nbdinfo(&["--size", served.uri(0)]).trim(), "1048576");
    served.end();
}
