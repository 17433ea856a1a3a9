//! A server in a process of its own, what it costs before and after, and an honest client who must not
//! notice anything.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use qblk::nbd::server::{Export, Server};
use qblk::{Image, OpenFlags, Options};

use super::client::Client;
use super::common::*;
use super::wire::*;

const CHILD: &str = "QBLK_TEST_HOSTILE";
/// Longest time of a scenario, seconds: then it is killed, and has failed.
const MOST: u32 = 120;
/// An honest client is served within this time, whatever others do.
pub const AT_ONCE: Duration = Duration::from_secs(2);
/// How much memory may be kept that was not there before, bytes: the system's library keeps the stacks
/// of threads for those to come, and a pool has 16.
pub const SLACK: u64 = 16 << 20;
/// The export of the honest.
pub const OURS: &[u8] = b"honest";
/// Its size.
pub const SIZE: u64 = 4 << 20;

/// Run `work`, a test's whole body, in a process of its own, so that all that is counted is its: this
/// program, told to run this test only.
pub fn alone<F: FnOnce()>(work: F) {
    if std::env::var_os(CHILD).is_some() {
        return work();
    }
    // The crate, the module, the function, and the closure in it.
    let path = std::any::type_name::<F>();
    let test = path.split_once("::").unwrap().1.trim_end_matches("::{{closure}}");
    // What it leaves if it is killed goes with this.
    let tmp = Tmp::new("alone");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([test, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"])
        .env("TMPDIR", tmp.path())
        .env(CHILD, "1");
    // SAFETY: alarm(2) may be called after fork; it stays set in the new program.
    unsafe {
        command.pre_exec(|| {
            libc::alarm(MOST);
            Ok(())
        });
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = Vec::new();
    child.stderr.take().unwrap().read_to_end(&mut said).unwrap();
    let mut out = String::new();
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    let status = child.wait().unwrap();
    let said = String::from_utf8_lossy(&said);
    assert!(status.success() && out.contains("1 passed"), "{test}: {status}\n{out}\n{said}");
    eprint!("{said}");
}

/// What the process has.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// Of connections.
    pub conns: usize,
    /// Of the pool.
    pub pool: usize,
    /// All others.
    pub threads: usize,
    pub fds: usize,
    pub rss: u64,
}

pub fn counts() -> Counts {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    let rss: u64 = rss.trim().trim_end_matches(" kB").parse().unwrap();
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let (mut conns, mut pool, mut threads) = (0, 0, 0);
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        // One that ends meanwhile has no name.
        let name = std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default();
        match name.trim() {
            "qblk-nbd-conn" => conns += 1,
            "qblk-nbd-pool" => pool += 1,
            "" => {}
            _ => threads += 1,
        }
    }
    Counts { conns, pool, threads, fds, rss: rss << 10 }
}

/// Wait until `is` what is wanted, within `time`; the last value if it never was.
pub fn until<T>(time: Duration, look: impl Fn() -> T, is: impl Fn(&T) -> bool) -> Result<T, T> {
    let end = Instant::now() + time;
    loop {
        let found = look();
        if is(&found) {
            return Ok(found);
        }
        if Instant::now() > end {
            return Err(found);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Peak of the memory in use, over `work`, above what it is now.
pub fn growth(work: impl FnOnce()) -> u64 {
    let before = counts().rss;
    // Begins the peak anew.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    work();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    (peak << 10).saturating_sub(before)
}

pub struct Scene {
    pub server: Server,
    pub tmp: Tmp,
    before: Counts,
    base: Counts,
    /// The pool's threads, at most.
    threads: usize,
    pub slack: u64,
}

/// A device of `size` bytes in memory.
pub fn memory(size: &str) -> Image {
    Image::open(format!("mem:{size}").as_ref(), &Options::new(), RW).unwrap()
}

/// What the honest export holds.
pub fn honest_bytes() -> &'static [u8] {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| Rng::new(1).bytes(SIZE as usize));
    &BYTES
}

impl Scene {
    /// A server with these settings that listens, and has served an honest client.
    pub fn new(settings: &[(&str, &str)]) -> Self {
        Self::with(settings, |_| {})
    }

    /// As `new`, with what else there is to be before things are counted.
    pub fn with(settings: &[(&str, &str)], prepare: impl FnOnce(&Self)) -> Self {
        let before = counts();
        let server = Server::new().unwrap();
        for (key, value) in settings {
            server.set(key, value.as_bytes()).unwrap();
        }
        let threads =
            settings.iter().find(|s| s.0 == "threads").map_or(16, |s| s.1.parse().unwrap());
        let tmp = Tmp::new("hostile");
        let mut scene = Self { server, tmp, before, base: before, threads, slack: SLACK };
        let image = memory(&SIZE.to_string());
        image.write_at(honest_bytes(), 0, NONE).unwrap();
        scene.add_image(OURS, image, true);
        let uri = format!("nbd+unix:///?socket={}", scene.path().display());
        scene.server.listen(uri.as_bytes()).unwrap();
        prepare(&scene);
        for _ in 0..3 {
            if !settings.contains(&("tls", "required")) {
                scene.honest();
            }
        }
        until(AT_ONCE, counts, |c| c.conns == 0).unwrap();
        scene.base = counts();
        scene
    }

    /// What there was before clients came.
    pub fn base(&self) -> Counts {
        self.base
    }

    pub fn path(&self) -> std::path::PathBuf {
        self.tmp.join("socket")
    }

    pub fn add_image(&self, name: &[u8], image: Image, read_only: bool) {
        let broken = Arc::new(AtomicBool::new(false));
        let export = Export::new(name.to_vec(), b"for tests".to_vec(), image, broken, read_only);
        self.server.add(export.unwrap()).unwrap();
    }

    /// Export a file.
    pub fn add(&self, name: &str, path: &Path, flags: OpenFlags) {
        self.add_image(name.as_bytes(), open(path, flags), flags == RO);
    }

    /// Listen at a port of this host.
    pub fn tcp(&self) -> u16 {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        self.server.listen_fd(listener.into()).unwrap();
        port
    }

    /// A connected socket.
    pub fn sock(&self) -> Sock {
        Sock::unix(&self.path()).unwrap()
    }

    /// One that was not listened for.
    pub fn handed_over(&self) -> Sock {
        let (ours, theirs): (Sock, OwnedFd) = Sock::pair();
        self.server.serve_fd(theirs).unwrap();
        ours
    }

    /// A client that has said nothing.
    pub fn raw(&self) -> Client {
        Client::new(self.sock())
    }

    /// A client with an export.
    pub fn client(&self, export: &str, mode: Mode) -> Client {
        Client::open(self.sock(), export.as_bytes(), &How::new(mode))
    }

    /// Somebody who means well is served, and at once.
    pub fn honest(&self) {
        self.honest_with(&How::new(Mode::Structured));
    }

    pub fn honest_with(&self, how: &How) {
        let begun = Instant::now();
        let mut c = Client::open(self.sock(), OURS, how);
        assert_eq!(c.size, SIZE);
        let reply = c.ask(cmd::READ, 0, 8192, 70_000, &[]);
        assert_eq!(reply.error, 0, "{}", reply.text);
        assert_same(&reply.data, &honest_bytes()[8192..8192 + 70_000], 8192, "the honest read");
        c.send(cmd::DISC, 0, 0, 0, &[]);
        assert_eq!(c.hear_end(), b"");
        let took = begun.elapsed();
        assert!(took < AT_ONCE, "an honest client was served in {took:?}");
    }

    /// All that was taken is given back.
    pub fn calm(&self, what: &str) {
        self.calm_but(what, 0);
    }

    /// As `calm`, while we hold so many descriptors.
    pub fn calm_but(&self, what: &str, ours: usize) {
        let (base, most) = (self.base, self.base.rss + self.slack);
        let fine = |c: &Counts| {
            let fds = c.fds <= base.fds + ours;
            c.conns == 0 && c.pool <= self.threads && c.threads <= base.threads && fds
        };
        let all = |c: &Counts| fine(c) && c.rss <= most;
        let look = || {
            // The clients' own memory is of this process, too, and malloc keeps what it can.
            // SAFETY: it takes a number.
            unsafe { libc::malloc_trim(0) };
            counts()
        };
        if let Err(found) = until(Duration::from_secs(8), look, all) {
            panic!("{what}: found {found:?}, before it was {base:?}");
        }
    }

    /// All is as before, an honest client is served, and the server can be stopped.
    pub fn end(self) {
        self.calm("the end");
        self.honest();
        self.end_without();
    }

    /// As `end`, where an honest client is not wanted.
    pub fn end_without(self) {
        let begun = Instant::now();
        self.server.stop(Duration::from_secs(1)).unwrap();
        let took = begun.elapsed();
        assert!(took < AT_ONCE, "stopping took {took:?}");
        let Self { server, tmp, before, .. } = self;
        drop((server, tmp));
        let fine =
            |c: &Counts| c.threads + c.conns + c.pool <= before.threads && c.fds <= before.fds;
        // Threads of the pool wait for more to do for two seconds.
        if let Err(found) = until(Duration::from_secs(8), counts, fine) {
            panic!("the server is gone: found {found:?}, before it was {before:?}");
        }
    }
}
