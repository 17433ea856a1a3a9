//! Several hosts that share a directory: processes, each with a network, a name, a boot id and clocks of
//! its own. They write while they may, are killed, stopped for longer than a lease lasts, and find
//! their lease file deleted; and the image itself shows whether two ever wrote at once.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use super::lease::leased;
use super::*;

/// What a host does.
struct Plan {
    dir: PathBuf,
    interval: u32,
    takeover: &'static str,
    /// It stops itself between two writes now and then.
    stops: bool,
}

struct Host {
    child: Child,
    told: std::thread::JoinHandle<Told>,
}

/// What a host has told.
#[derive(Default)]
struct Told {
    /// How often it got the image.
    taken: u64,
    /// Writes that its fence refused.
    fenced: u64,
    /// Signs that somebody wrote at the same time.
    bad: Vec<String>,
}

impl Told {
    fn add(&mut self, other: Self) {
        self.taken += other.taken;
        self.fenced += other.fenced;
        self.bad.extend(other.bad);
    }
}

impl Plan {
    fn start(&self, seed: u64) -> Host {
        let mut command = Command::new("unshare");
        // Hours that differ, as uptimes do.
        let offset = (seed % 1000 * 3600).to_string();
        command.args(["--net", "--uts", "--mount", "--time", "--boottime", &offset]);
        command.args(["--monotonic", &offset, "--fork", "--kill-child=KILL"]);
        command.arg(std::env::current_exe().unwrap());
        command.args(["--exact", "hosts::a_host", "--nocapture"]);
        command.env("QBLK_TEST_HOST", &self.dir).env("QBLK_TEST_SEED", seed.to_string());
        command.env("QBLK_TEST_INTERVAL", self.interval.to_string());
        command.env("QBLK_TEST_TAKEOVER", self.takeover);
        command.env("QBLK_TEST_STOPS", if self.stops { "1" } else { "0" });
        command.env("QBLK_TEST_MANAGER", lease_manager());
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("install util-linux (apt-get install util-linux)");
        let out = BufReader::new(child.stdout.take().unwrap());
        let told = std::thread::spawn(move || {
            let mut told = Told::default();
            for line in out.lines().map_while(Result::ok) {
                match line.split_once(' ').map_or(&*line, |(word, _)| word) {
                    "TAKEN" => told.taken += 1,
                    "FENCED" => told.fenced += 1,
                    "BAD" => told.bad.push(line),
                    _ => {}
                }
            }
            told
        });
        Host { child, told }
    }
}

impl Host {
    /// The process behind `unshare`, which waits for it.
    fn pid(&self) -> Option<i32> {
        let path = format!("/proc/{0}/task/{0}/children", self.child.id());
        fs::read_to_string(path).ok()?.split_whitespace().next()?.parse().ok()
    }

    fn signal(&self, signal: i32) {
        if let Some(pid) = self.pid() {
            // SAFETY: a child of a child of ours, which is not waited for by anybody else.
            unsafe { libc::kill(pid, signal) };
        }
    }

    fn end(mut self) -> Told {
        self.signal(libc::SIGCONT);
        self.signal(libc::SIGKILL);
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.told.join().unwrap()
    }
}

/// Not a test of its own: what a host runs.
#[test]
fn a_host() {
    let Some(dir) = std::env::var_os("QBLK_TEST_HOST") else { return };
    let dir = PathBuf::from(dir);
    let number = |name: &str| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let mut rng = Rng::new(number("QBLK_TEST_SEED"));
    become_a_host(&dir, rng.next());
    let takeover = std::env::var("QBLK_TEST_TAKEOVER").unwrap();
    let interval = number("QBLK_TEST_INTERVAL") as u32;
    let stops = number("QBLK_TEST_STOPS") == 1;
    let blind = takeover == "nobody";
    let flags = if blind { RW | OpenFlags::NO_LOCK } else { RW };
    let o = leased(&dir.join("leases"), interval, &[("format", "raw"), ("lock-wait", "5")])
        .with("lock-manager.takeover", takeover);
    let path = dir.join("disk.raw");
    loop {
        let image = match open_managed(&path, &o, flags) {
            Ok(image) => image,
            Err(Error::Locked { .. }) => continue,
            Err(e) => {
                println!("BAD {e}");
                return;
            }
        };
        println!("TAKEN");
        // Nobody else writes as long as ours succeed. So each finds what the one before it wrote; else
        // somebody wrote in between, and this one may only fail.
        let me = rng.next();
        let mut last: Option<[u8; 16]> = None;
        for n in 0..rng.below(60) {
            let mut found = [0; 16];
            image.read_at(&mut found, 0).unwrap();
            let mut record = [0; 16];
            record[..8].copy_from_slice(&me.to_le_bytes());
            record[8..].copy_from_slice(&n.to_le_bytes());
            match image.write_at(&record, 0, NONE) {
                Ok(()) => {
                    if last.is_some_and(|last| last != found) {
                        println!("BAD {me:x} write {n}: {found:x?} was there, {last:x?} was ours");
                    }
                    last = Some(record);
                }
                Err(Error::Locked { .. }) => {
                    println!("FENCED");
                    last = None;
                    if rng.one_in(2) {
                        break;
                    }
                }
                Err(e) => println!("BAD {e}"),
            }
            if stops && rng.one_in(40) {
                // SAFETY: whoever started us lets us go on.
                unsafe { libc::raise(libc::SIGSTOP) };
            }
            match rng.below(8) {
                0 => std::thread::sleep(Duration::from_micros(rng.below(3000))),
                1 => std::thread::yield_now(),
                _ => {}
            }
        }
        // As a crash would, some leave it to the system; a closed device after a loss is an error.
        let _ = image.close();
    }
}

/// A name, a boot id: what makes others believe that this is another machine.
fn become_a_host(dir: &Path, id: u64) {
    use std::ffi::CString;
    let name = format!("host-{:04x}", id & 0xffff);
    // SAFETY: a name and its length; the namespace is our own.
    assert_eq!(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }, 0);
    let boot = dir.join(format!("boot-{id:016x}"));
    let text = format!("{:08x}-0000-4000-8000-{:012x}\n", id as u32, id >> 16 & 0xffff_ffff_ffff);
    fs::write(&boot, text).unwrap();
    let from = CString::new(boot.as_os_str().as_encoded_bytes()).unwrap();
    let to = c"/proc/sys/kernel/random/boot_id";
    // SAFETY: C strings; the mount namespace is our own (unshare makes it private).
    let rc = unsafe {
        libc::mount(from.as_ptr(), to.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null())
    };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    let _ = fs::remove_file(&boot);
}

fn run_hosts(what: &str, takeover: &'static str, stops: bool, seconds: u64) -> Told {
    need_root("hosts are namespaces");
    let dir = Tmp::in_memory(what);
    fs::create_dir(dir.join("leases")).unwrap();
    create(&dir.join("disk.raw"), "raw", 1 << 20, &[]);
    let plan = Plan { dir: dir.path().to_owned(), interval: 5, takeover, stops };
    let mut rng = Rng::new(seed(what));
    let mut hosts: Vec<Host> = (0..4).map(|_| plan.start(rng.next())).collect();
    let until = deadline(seconds);
    let (mut kills, mut pauses, mut deletes) = (0, 0, 0);
    let mut told = Told::default();
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(rng.below(15)));
        let i = rng.below(hosts.len() as u64) as usize;
        match rng.below(16) {
            0 => {
                kills += 1;
                told.add(std::mem::replace(&mut hosts[i], plan.start(rng.next())).end());
            }
            // Longer than a lease lasts, as often as not.
            1..=5 if !stops => {
                pauses += 1;
                hosts[i].signal(libc::SIGSTOP);
                std::thread::sleep(Duration::from_millis(rng.below(60)));
                hosts[i].signal(libc::SIGCONT);
            }
            6 if rng.one_in(3) && takeover == "dead" && !stops => {
                // With everybody awake: one who is stopped would not see it.
                deletes += 1;
                let _ = fs::read_dir(dir.join("leases")).unwrap().flatten().try_for_each(|e| {
                    if e.path().extension().is_some_and(|x| x == "lease") {
                        fs::remove_file(e.path())?;
                    }
                    std::io::Result::Ok(())
                });
            }
            _ if stops => {
                // Those that have stopped themselves.
                std::thread::sleep(Duration::from_millis(rng.below(40)));
                hosts.iter().for_each(|h| h.signal(libc::SIGCONT));
            }
            _ => {}
        }
    }
    for host in hosts {
        told.add(host.end());
    }
    let (taken, fenced) = (told.taken, told.fenced);
    eprintln!(
        "{what}: taken {taken} times, {fenced} writes fenced; {kills} killed, {pauses} stopped, {deletes} deleted"
    );
    assert!(taken > seconds, "the image was taken {taken} times only");
    told
}

#[test]
fn two_hosts_never_write_at_once() {
    let told = run_hosts("hosts-dead", "dead", false, 20);
    assert!(told.bad.is_empty(), "{:#?}", told.bad);
}

/// Holders that stop between two writes for longer than their lease, and are not waited for.
#[test]
fn a_holder_that_was_stopped_is_fenced_when_it_goes_on() {
    let told = run_hosts("hosts-expired", "expired", true, 15);
    assert!(told.bad.is_empty(), "{:#?}", told.bad);
    assert!(told.fenced > 0, "nobody was ever fenced");
}

/// The checker has eyes: without leases it sees at once what it is there for.
#[test]
fn hosts_that_ask_nobody_are_seen_to_write_at_once() {
    let told = run_hosts("hosts-blind", "nobody", false, 2);
    assert!(!told.bad.is_empty(), "two writers at once were not seen");
}
