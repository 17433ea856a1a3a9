//! Everything at once: 64 connections, three exports, operations checked against a model, clients that
//! are killed, and a server that is stopped under load. Nothing that was acknowledged is lost.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use super::certs::Certs;
use super::client::{Client, Reply};
use super::common::*;
use super::scene::{Scene, alone, memory};
use super::wire::*;

const CLIENTS: usize = 64;
const EXPORTS: [&str; 3] = ["raw", "qcow2", "mem"];
/// Parts of the disk that a client has, and the size of the first and the others, bytes: nothing is
/// aligned, so that neighbours share clusters, blocks and pages.
const PARTS: usize = 8;
const LARGE: u64 = 600_001;
const SMALL: u64 = 100_003;
/// All parts of one client.
const SHARE: u64 = LARGE + (PARTS as u64 - 1) * SMALL;
const SIZE: u64 = SHARE * (CLIENTS as u64 / 3 + 1);

/// What a byte may be, when its client was killed before it knew.
struct Doubt {
    at: u64,
    data: Vec<u8>,
}

/// A part of the disk, and what must be there.
struct Part {
    offset: u64,
    bytes: Vec<u8>,
    doubts: Vec<Doubt>,
}

impl Part {
    fn of(client: usize, part: usize) -> Self {
        let before = if part == 0 { 0 } else { LARGE + (part as u64 - 1) * SMALL };
        let offset = (client / EXPORTS.len()) as u64 * SHARE + before;
        let size = if part == 0 { LARGE } else { SMALL };
        Self { offset, bytes: vec![0; size as usize], doubts: Vec::new() }
    }

    fn judge(&self, found: &[u8], what: &str) {
        let mut expected = self.bytes.clone();
        for doubt in &self.doubts {
            // Each byte is the old one or the new one.
            for (i, new) in doubt.data.iter().enumerate() {
                let at = doubt.at as usize + i;
                if found[at] == *new {
                    expected[at] = *new;
                }
            }
        }
        assert_same(found, &expected, self.offset, what);
    }
}

/// A request that is under way.
struct Pending {
    cookie: u64,
    kind: u16,
    /// In the part.
    at: usize,
    len: usize,
    data: Vec<u8>,
}

struct Worker {
    number: usize,
    rng: Rng,
    parts: Vec<Part>,
    tls: Arc<ClientConfig>,
}

/// Why a batch ended.
enum End {
    Done,
    Killed,
    ServerGone,
}

impl Worker {
    fn part(&mut self) -> &mut Part {
        self.parts.last_mut().unwrap()
    }

    fn connect(&mut self, socket: &Path) -> Option<Client> {
        let mut how = How::new(self.rng.pick(&MODES));
        if self.rng.one_in(6) {
            how = how.tls(&self.tls);
        }
        let sock = Sock::unix(socket).ok()?;
        Some(Client::open(sock, EXPORTS[self.number % EXPORTS.len()].as_bytes(), &how))
    }

    /// Some requests at once, whose ranges do not meet.
    fn batch(&mut self, c: &mut Client, kill: bool) -> End {
        let count = self.rng.range(1, 9) as usize;
        let slot = self.part().bytes.len() / count;
        let (mut out, mut pending) = (Vec::new(), Vec::new());
        for i in 0..count {
            let most = if self.rng.one_in(4) { slot as u64 } else { 9000.min(slot as u64) };
            let len = self.rng.range(1, most + 1) as usize;
            let at = i * slot + self.rng.below((slot - len + 1) as u64) as usize;
            let fua = if self.rng.one_in(4) { FUA } else { 0 };
            let (kind, flags) = match self.rng.below(16) {
                0..5 => (cmd::WRITE, fua),
                5 => (cmd::WRITE_ZEROES, fua),
                6 => (cmd::WRITE_ZEROES, fua | NO_HOLE),
                7 => (cmd::TRIM, fua),
                8 => (cmd::FLUSH, 0),
                9 => (cmd::CACHE, 0),
                10 if c.mode != Mode::Simple => (cmd::BLOCK_STATUS, 0),
                11 if c.mode != Mode::Simple => (cmd::READ, DF),
                _ => (cmd::READ, 0),
            };
            let data = match kind {
                cmd::WRITE => self.rng.bytes(len),
                cmd::WRITE_ZEROES | cmd::TRIM => vec![0; len],
                _ => Vec::new(),
            };
            let offset = self.part().offset + at as u64;
            let flush = kind == cmd::FLUSH;
            let (place, n) = if flush { (0, 0) } else { (offset, len as u64) };
            let (bytes, cookie) = c.request(kind, flags, place, n);
            out.extend_from_slice(&bytes);
            if kind == cmd::WRITE {
                out.extend_from_slice(&data);
            }
            pending.push(Pending { cookie, kind, at, len, data });
        }
        let cut = if kill { self.rng.below(out.len() as u64 + 1) as usize } else { out.len() };
        let said = c.try_say(&out[..cut]);
        let replies = if kill { self.rng.below(count as u64) as usize } else { count };
        let mut end = if kill { End::Killed } else { End::Done };
        if said.is_err() {
            end = End::ServerGone;
        }
        // What the rest of a request is waited for is never answered.
        let replies = if cut < out.len() { 0 } else { replies };
        for _ in 0..replies {
            let Ok(reply) = c.try_reply() else {
                end = End::ServerGone;
                break;
            };
            let i = pending.iter().position(|p| p.cookie == reply.cookie).unwrap();
            let done = pending.swap_remove(i);
            self.answered(c, done, reply);
        }
        for p in pending {
            if !p.data.is_empty() {
                self.part().doubts.push(Doubt { at: p.at as u64, data: p.data });
            }
        }
        end
    }

    fn answered(&mut self, c: &Client, p: Pending, reply: Reply) {
        let what = format!("client {}, command {}, {:?}", self.number, p.kind, c.mode);
        assert_eq!(reply.error, 0, "{what}: {}", reply.text);
        let part = self.part();
        let model = &mut part.bytes[p.at..p.at + p.len];
        match p.kind {
            cmd::READ => assert_same(&reply.data, model, part.offset + p.at as u64, &what),
            cmd::WRITE | cmd::WRITE_ZEROES => model.copy_from_slice(&p.data),
            // What it left is looked at with the next batch.
            cmd::TRIM => part.doubts.push(Doubt { at: p.at as u64, data: p.data }),
            cmd::BLOCK_STATUS => {
                let base = c.contexts.iter().find(|x| x.1 == "base:allocation").unwrap().0;
                let mut at = 0;
                for (n, flags) in &reply.status[&base] {
                    let told = &model[at..at + *n as usize];
                    let is_zero = told.iter().all(|b| *b == 0);
                    assert!(flags & 2 == 0 || is_zero, "{what}: zeroes are told of data");
                    at += *n as usize;
                }
            }
            _ => {}
        }
    }

    /// After a trim each byte is what it was or zero, and stays so.
    fn look_at_trims(&mut self, c: &mut Client) -> End {
        while let Some(doubt) = self.part().doubts.pop() {
            let offset = self.part().offset + doubt.at;
            let (request, _) = c.request(cmd::READ, 0, offset, doubt.data.len() as u64);
            let reply = c.try_say(&request).and_then(|()| c.try_reply());
            let Ok(reply) = reply else {
                self.part().doubts.push(doubt);
                return End::ServerGone;
            };
            let what = format!("client {}: after a trim", self.number);
            let part = self.part();
            let model = &mut part.bytes[doubt.at as usize..][..doubt.data.len()];
            for (was, is) in model.iter_mut().zip(&reply.data) {
                assert!(*is == *was || *is == 0, "{what}");
                *was = *is;
            }
        }
        End::Done
    }

    /// Work until the server is gone. A part is left behind when its client is killed: what was under
    /// way may still be done.
    fn run(mut self, socket: &Path, stopping: &AtomicBool, batches: &AtomicU64) -> Self {
        let number = self.number;
        while let Some(mut c) = self.connect_until(socket, stopping) {
            loop {
                let kill = self.parts.len() < PARTS && self.rng.one_in(150);
                let mut end = self.batch(&mut c, kill);
                if let End::Done = end {
                    end = self.look_at_trims(&mut c);
                }
                batches.fetch_add(1, SeqCst);
                match end {
                    End::Done if self.rng.one_in(100) => break,
                    End::Done => {}
                    End::ServerGone => {
                        assert!(stopping.load(SeqCst), "client {number} was cut off");
                        return self;
                    }
                    End::Killed => {
                        if self.rng.one_in(2) {
                            c.into_sock().reset();
                        }
                        let next = Part::of(number, self.parts.len());
                        self.parts.push(next);
                        break;
                    }
                }
            }
        }
        self
    }

    /// `None` if the server is being stopped.
    fn connect_until(&mut self, socket: &Path, stopping: &AtomicBool) -> Option<Client> {
        let client = std::panic::AssertUnwindSafe(|| self.connect(socket));
        // The server may go while we negotiate: then the client gives up, which is a panic.
        match std::panic::catch_unwind(client) {
            Ok(Some(c)) => Some(c),
            _ if stopping.load(SeqCst) => None,
            _ => panic!("client {} did not come in", self.number),
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost() {
    alone(|| {
        let seed = seed("nothing_acknowledged_is_lost");
        let certs = Certs::new();
        let mem = memory(&SIZE.to_string());
        let kept = mem.context(&qblk::Options::new(), RO).unwrap();
        let (dir, mut mem) = (Tmp::new("load"), Some(mem));
        let (raw, qcow2) = (dir.join("raw"), dir.join("qcow2"));
        std::fs::File::create(&raw).unwrap().set_len(SIZE).unwrap();
        create(&qcow2, "qcow2", SIZE, &[]);
        let scene = Scene::with(&certs.settings("on"), |s| {
            s.add("raw", &raw, RW);
            s.add("qcow2", &qcow2, RW);
            s.add_image(b"mem", mem.take().unwrap(), false);
        });
        let socket = scene.path();
        let shared = Arc::new((AtomicBool::new(false), AtomicU64::new(0)));
        let workers: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (socket, shared) = (socket.clone(), shared.clone());
                let rng = Rng::new(seed ^ (number as u64) << 32);
                let parts = vec![Part::of(number, 0)];
                let worker = Worker { number, rng, parts, tls: certs.client(false) };
                std::thread::spawn(move || worker.run(&socket, &shared.0, &shared.1))
            })
            .collect();
        let end = deadline(12);
        while Instant::now() < end && !workers.iter().any(|w| w.is_finished()) {
            std::thread::sleep(Duration::from_millis(200));
            scene.honest();
        }
        shared.0.store(true, SeqCst);
        let begun = Instant::now();
        scene.server.stop(Duration::from_secs(3)).unwrap();
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(3), "stopping took {took:?}");
        let workers: Vec<Worker> = workers.into_iter().map(|w| w.join().unwrap()).collect();
        let kills: usize = workers.iter().map(|w| w.parts.len() - 1).sum();
        eprintln!("{} batches, {kills} clients killed, stopped in {took:?}", shared.1.load(SeqCst));
        // All that the server held is given up; what is on disk counts.
        scene.end_without();
        check_clean(&qcow2);
        for (e, image) in [open(&raw, RO), open(&qcow2, RO), kept].into_iter().enumerate() {
            for w in workers.iter().filter(|w| w.number % EXPORTS.len() == e) {
                for part in &w.parts {
                    let found = read_range(&image, part.offset, part.bytes.len() as u64);
                    part.judge(&found, &format!("{}, client {}", EXPORTS[e], w.number));
                }
            }
        }
    });
}
