//! The peers: programs that run for a limited time, servers that end with the test, certificates,
//! and a server of ours.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::common::*;
use qblk::Image;
use qblk::nbd::server::{Export, Server};

/// No peer has more to do than this.
const LIMIT: Duration = Duration::from_secs(100);

/// How a program is installed.
fn package(program: &str) -> &'static str {
    match program {
        "qemu-img" | "qemu-io" | "qemu-nbd" => "qemu-utils",
        "nbdkit" => "nbdkit",
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "nbdsh" => "python3-libnbd",
        "fio" => "fio",
        "openssl" => "openssl",
        "ip" => "iproute2",
        _ => "a package with that program",
    }
}

/// A program, to be started; it dies with the thread that starts it, whatever happens.
pub fn command(program: &str, args: &[&dyn AsRef<OsStr>]) -> Command {
    let mut command = Command::new(program);
    command.args(args.iter().map(|a| a.as_ref())).stdin(Stdio::null());
    // What Debian ships comes first: nbdsh takes the first Python it finds.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/sbin:/usr/bin:/sbin:/bin:{path}"));
    // SAFETY: one system call, between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command
}

fn spawn(command: &mut Command) -> Child {
    let program = command.get_program().to_string_lossy().into_owned();
    match command.spawn() {
        Ok(child) => child,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            panic!("{program} is missing: apt-get install {}", package(&program))
        }
        Err(e) => panic!("{program}: {e}"),
    }
}

/// What a peer did.
pub struct Ran {
    pub shown: String,
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// It must have succeeded; what it printed.
    pub fn ok(self) -> String {
        let Self { shown, code, out, err } = self;
        assert!(code == Some(0), "{shown}: exit {code:?}\n{out}{err}");
        out
    }

    /// It must have failed, and not by a signal; what it printed.
    pub fn fails(self) -> String {
        let Self { shown, code, out, err } = self;
        assert!(code.is_some_and(|c| c != 0), "{shown}: exit {code:?}\n{out}{err}");
        out + &err
    }
}

/// Run a peer to its end. It is killed, and the test fails, if that takes too long.
pub fn run_peer(program: &str, args: &[&dyn AsRef<OsStr>]) -> Ran {
    run_peer_in(Path::new("/"), program, args)
}

/// [`run_peer`] in a directory.
pub fn run_peer_in(dir: &Path, program: &str, args: &[&dyn AsRef<OsStr>]) -> Ran {
    let mut shown = program.to_owned();
    for a in args {
        shown += &format!(" {}", a.as_ref().to_string_lossy());
    }
    let mut command = command(program, args);
    command.current_dir(dir).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Daemon { child: spawn(&mut command), log: None };
    let drain = |mut from: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut all = Vec::new();
            let _ = from.read_to_end(&mut all);
            String::from_utf8_lossy(&all).into_owned()
        })
    };
    let out = drain(Box::new(running.child.stdout.take().unwrap()));
    let err = drain(Box::new(running.child.stderr.take().unwrap()));
    let end = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = running.child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > end {
            running.kill();
            panic!(
                "{shown}: not done in {LIMIT:?}\n{}{}",
                out.join().unwrap(),
                err.join().unwrap()
            );
        }
        std::thread::sleep(Duration::from_millis(3));
    };
    Ran { shown, code: status.code(), out: out.join().unwrap(), err: err.join().unwrap() }
}

/// [`run_peer`] with arguments of any kinds.
macro_rules! peer {
    ($program:expr, $($arg:expr),+ $(,)?) => {
        $crate::peers::run_peer($program, &[$(&$arg as &dyn AsRef<std::ffi::OsStr>),+])
    };
}
pub(crate) use peer;

/// `qemu-io` commands on whatever the arguments name; what it printed. It must succeed.
pub fn qemu_io_at(uri: &str, format: &str, commands: &[&str]) -> String {
    let out = qemu_io_told(uri, format, commands).ok();
    // It says so and exits with 0.
    assert!(!out.contains("failed"), "qemu-io {commands:?}: {out}");
    out
}

/// [`qemu_io_at`], whether it succeeds or not.
pub fn qemu_io_told(uri: &str, format: &str, commands: &[&str]) -> Ran {
    let mut args: Vec<&dyn AsRef<OsStr>> = vec![&"-f", &format];
    for c in commands {
        args.push(&"-c");
        args.push(c);
    }
    args.push(&uri);
    run_peer("qemu-io", &args)
}

/// `nbdsh` on a URI.
pub fn nbdsh(uri: &str, script: &str) {
    peer!("nbdsh", "-u", uri, "-c", script).ok();
}

/// A program in the background: killed at the end of the test, however it ends.
pub struct Daemon {
    child: Child,
    log: Option<PathBuf>,
}

impl Daemon {
    /// Start a server, and wait until it wrote the file `ready` (as nbdkit -P and qemu-nbd --pid-file do).
    pub fn start(program: &str, args: &[&dyn AsRef<OsStr>], ready: &Path) -> Self {
        Self::start_command(command(program, args), ready)
    }

    /// The same, of a command that is made up already.
    pub fn start_command(mut command: Command, ready: &Path) -> Self {
        let _ = fs::remove_file(ready);
        let log = ready.with_extension("log");
        let file = fs::File::create(&log).unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        // What one that is killed leaves goes with the test's directory.
        command.env("TMPDIR", ready.parent().unwrap());
        let mut daemon = Self { child: spawn(&mut command), log: Some(log) };
        let end = Instant::now() + LIMIT;
        while fs::read(ready).map_or(true, |b| !b.ends_with(b"\n")) {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("{command:?}: {status}\n{}", daemon.told());
            }
            assert!(Instant::now() < end, "{command:?}: not ready in {LIMIT:?}\n{}", daemon.told());
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }

    /// What it printed so far.
    pub fn told(&self) -> String {
        self.log.as_ref().map_or(String::new(), |l| fs::read_to_string(l).unwrap_or_default())
    }

    /// Kill it now, without a chance to finish anything.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn is_frozen(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        tasks.flatten().all(|task| {
            // The state stands behind the name, which is in parentheses.
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|s| s.starts_with('T'))
        })
    }

    /// Freeze it, or let it go on.
    pub fn freeze(&self, yes: bool) {
        let signal = if yes { libc::SIGSTOP } else { libc::SIGCONT };
        // SAFETY: our child, which nobody has waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
        // Its threads stop one after the other.
        let end = Instant::now() + LIMIT;
        while yes && !self.is_frozen() {
            assert!(Instant::now() < end, "a server does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() && self.log.is_some() {
            eprintln!("a server of this test said: {}", self.told());
        }
        // Asked first, with patience on a busy machine: nbdkit has files in /tmp, whatever TMPDIR says,
        // which it removes.
        let end = Instant::now() + Duration::from_secs(10);
        for signal in [libc::SIGTERM, libc::SIGCONT] {
            if matches!(self.child.try_wait(), Ok(None)) {
                // SAFETY: our child, which nobody has waited for.
                unsafe { libc::kill(self.child.id() as i32, signal) };
            }
        }
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.kill();
    }
}

/// `nbdkit` with these arguments, listening at the Unix socket `socket`.
pub fn nbdkit(socket: &Path, args: &[&dyn AsRef<OsStr>]) -> Daemon {
    let pid = socket.with_extension("pid");
    let _ = fs::remove_file(socket);
    let mut all: Vec<&dyn AsRef<OsStr>> = vec![&"-f", &"-P", &pid, &"-U", &socket];
    all.extend(args);
    Daemon::start("nbdkit", &all, &pid)
}

/// `qemu-nbd` with these arguments, listening at the Unix socket `socket`.
pub fn qemu_nbd(socket: &Path, args: &[&dyn AsRef<OsStr>]) -> Daemon {
    let pid = socket.with_extension("pid");
    let _ = fs::remove_file(socket);
    let mut all: Vec<&dyn AsRef<OsStr>> = vec![&"-t", &"--pid-file", &pid, &"-k", &socket];
    all.extend(args);
    Daemon::start("qemu-nbd", &all, &pid)
}

/// A server on a TCP port of this machine.
pub fn on_port(dir: &Tmp, program: &str, port: u16, args: &[&dyn AsRef<OsStr>]) -> Daemon {
    let pid = dir.join(format!("port-{port}.pid"));
    let number = port.to_string();
    let mut all: Vec<&dyn AsRef<OsStr>> = match program {
        "nbdkit" => vec![&"-f", &"-P", &pid, &"-i", &"127.0.0.1", &"-p", &number],
        _ => vec![&"-t", &"--pid-file", &pid, &"-b", &"127.0.0.1", &"-p", &number],
    };
    all.extend(args);
    Daemon::start(program, &all, &pid)
}

/// A port that nobody uses, outside of the range from which the kernel gives them out.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let n =
            NEXT.fetch_add(1, Relaxed).wrapping_add((std::process::id() as u16).wrapping_mul(37));
        let port = 20_000 + n % 12_000;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// A URI of a Unix socket; `export` as it stands in a URI.
pub fn unix(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

/// Open by name, which must work.
pub fn open_uri(uri: &str, pairs: &[(&str, &str)], flags: qblk::OpenFlags) -> Image {
    try_uri(uri, pairs, flags).unwrap_or_else(|e| panic!("open {uri}: {e}"))
}

pub fn try_uri(
    uri: &str,
    pairs: &[(&str, &str)],
    flags: qblk::OpenFlags,
) -> Result<Image, qblk::Error> {
    Image::open(OsStr::new(uri), &options(pairs), flags)
}

/// The error of opening, which must fail.
pub fn uri_error(uri: &str, pairs: &[(&str, &str)], flags: qblk::OpenFlags) -> qblk::Error {
    match try_uri(uri, pairs, flags) {
        Ok(_) => panic!("{uri} was opened"),
        Err(e) => e,
    }
}

/// A server of ours, at a Unix socket and a TCP port.
pub struct Served {
    pub server: Server,
    pub socket: PathBuf,
    /// `127.0.0.1:PORT`
    pub host: String,
}

impl Served {
    /// Export these images, by name.
    pub fn new(dir: &Tmp, exports: &[(&str, &Image)], settings: &[(&str, &str)]) -> Self {
        let server = Server::new().unwrap();
        for (key, value) in settings {
            server.set(key, value.as_bytes()).unwrap_or_else(|e| panic!("{key}={value}: {e}"));
        }
        for (name, image) in exports {
            export(&server, name, "", image, false);
        }
        server.listen(b"nbd://127.0.0.1:0").unwrap();
        let uri = String::from_utf8(server.uri().unwrap()).unwrap();
        let host = uri.split("//").nth(1).unwrap().split('/').next().unwrap().to_owned();
        static COUNT: AtomicU16 = AtomicU16::new(0);
        let socket = dir.join(format!("own{}.sock", COUNT.fetch_add(1, Relaxed)));
        server.listen(unix(&socket, "").as_bytes()).unwrap();
        Self { server, socket, host }
    }

    /// A URI by the Unix socket; `export` as it stands in a URI.
    pub fn unix(&self, export: &str) -> String {
        unix(&self.socket, export)
    }

    /// A URI by TCP.
    pub fn tcp(&self, export: &str) -> String {
        format!("nbd://{}/{export}", self.host)
    }

    /// Both.
    pub fn both(&self, export: &str) -> [String; 2] {
        [self.unix(export), self.tcp(export)]
    }

    /// Stop it, orderly.
    pub fn stop(self) {
        self.server.stop(Duration::from_secs(5)).unwrap_or_else(|e| panic!("stop: {e}"));
    }
}

/// Add an export of an image.
pub fn export(server: &Server, name: &str, description: &str, image: &Image, read_only: bool) {
    let context = image.own_context().unwrap();
    let (name, description) = (name.as_bytes().to_vec(), description.as_bytes().to_vec());
    let export = Export::new(name, description, context, Default::default(), read_only).unwrap();
    server.add(export).unwrap();
}

/// Serve a raw file of this many bytes that is sparse but for what is written by the caller.
pub fn raw_file(path: &Path, size: u64) -> Image {
    fs::File::create(path).unwrap().set_len(size).unwrap();
    open_with(path, &options(&[("format", "raw")]), RW)
}

/// A file with some data between holes, of a size that is a multiple of 512; its bytes.
pub fn sparse_bytes(path: &Path, size: u64, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    fs::File::create(path).unwrap().set_len(size).unwrap();
    let mut at = rng.below(200_000);
    while at < size {
        let n = rng.range(1, 300_000).min(size - at);
        let data = rng.bytes(n as usize);
        poke(path, at, &data);
        bytes[at as usize..][..n as usize].copy_from_slice(&data);
        at += n + rng.below(700_000);
    }
    bytes
}

/// Certificates: of an authority, a server (localhost, 127.0.0.1), a client, and another authority's
/// client. Names of the files are those that QEMU, nbdkit and libnbd look for.
pub struct Certs {
    /// With both server's and client's.
    pub dir: PathBuf,
    /// With the authority only.
    pub anonymous: PathBuf,
    /// With a client's from another authority.
    pub stranger: PathBuf,
}

impl Certs {
    pub fn new(tmp: &Tmp) -> Self {
        let make = |name: &str, who: &[&str]| {
            let dir = tmp.join(name);
            fs::create_dir_all(&dir).unwrap();
            authority(&dir);
            for w in who {
                signed(&dir, w);
            }
            dir
        };
        let dir = make("pki", &["server", "client"]);
        let stranger = make("stranger", &["client"]);
        let anonymous = tmp.join("anonymous");
        fs::create_dir_all(&anonymous).unwrap();
        for to in [&anonymous, &stranger] {
            fs::copy(dir.join("ca-cert.pem"), to.join("ca-cert.pem")).unwrap();
        }
        Self { dir, anonymous, stranger }
    }

    /// What a server of ours needs.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let file = |name: &str| self.dir.join(name).display().to_string();
        vec![
            ("tls-certificate", file("server-cert.pem")),
            ("tls-key", file("server-key.pem")),
            ("tls-ca", file("ca-cert.pem")),
        ]
    }
}

const KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];

fn openssl(dir: &Path, args: &[&str]) {
    let args: Vec<&dyn AsRef<OsStr>> = args.iter().map(|a| a as &dyn AsRef<OsStr>).collect();
    run_peer_in(dir, "openssl", &args).ok();
}

fn authority(dir: &Path) {
    let mut args = vec!["req", "-x509", "-days", "2", "-subj", "/CN=qblk test authority"];
    args.extend(KEY);
    args.extend(["-keyout", "ca-key.pem", "-out", "ca-cert.pem"]);
    args.extend(["-addext", "keyUsage=critical,keyCertSign"]);
    openssl(dir, &args);
}

fn signed(dir: &Path, who: &str) {
    let (key, cert) = (format!("{who}-key.pem"), format!("{who}-cert.pem"));
    let (request, extensions) = (format!("{who}.csr"), format!("{who}.ext"));
    let subject = format!("/CN={who}");
    let text = format!(
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\n\
         extendedKeyUsage={who}Auth\nsubjectAltName=DNS:localhost,IP:127.0.0.1,IP:10.213.7.1\n"
    );
    fs::write(dir.join(&extensions), text).unwrap();
    let mut args = vec!["req", "-new", "-subj", &subject];
    args.extend(KEY);
    args.extend(["-keyout", &key, "-out", &request]);
    openssl(dir, &args);
    let mut args = vec!["x509", "-req", "-days", "2", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"];
    args.extend(["-CAcreateserial", "-in", &request, "-out", &cert, "-extfile", &extensions]);
    openssl(dir, &args);
}

/// Text of a name of a file.
pub fn text(path: &Path) -> String {
    OsString::from(path).into_string().unwrap()
}
