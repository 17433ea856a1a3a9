//! A load: requests of one size at random places, so many at a time on each connection. Replies are
//! taken as many as one system call gives, and as many new requests are sent with one.
//!
//! It checks what it gets, and answers to all it asked for are waited for before it hangs up: nbdkit
//! 1.32 aborts when a client goes away with requests under way.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use qblk::nbd::proto::{
    GREETING, OPTION_MAGIC, OPTION_REPLY_MAGIC, cmd, flag, hello, info, opt, rep,
};

use super::Done;
use crate::work::{Offsets, Pattern, Res, Work};

/// First words of requests and of simple replies.
pub const REQUEST: u32 = 0x2560_9513;
pub const REPLY: u32 = 0x6744_6698;
/// Bytes of these headers.
pub const REQUEST_LEN: usize = 28;
pub const REPLY_LEN: usize = 16;
/// How long a server may take for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Bytes of a request.
    pub block: usize,
    /// Requests under way on a connection.
    pub depth: usize,
    pub connections: usize,
    pub write: bool,
}

/// When it is enough.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    Seconds(f64),
    /// So many requests on each connection.
    Ops(u64),
}

fn io(e: std::io::Error) -> String {
    format!("NBD load: {e}")
}

fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}
fn be32(b: &[u8], at: usize) -> u32 {
    u32::from(be16(b, at)) << 16 | u32::from(be16(b, at + 2))
}
fn be64(b: &[u8], at: usize) -> u64 {
    u64::from(be32(b, at)) << 32 | u64::from(be32(b, at + 4))
}

/// A connection in transmission, with simple replies.
pub struct Client {
    stream: UnixStream,
    /// Of the export, bytes.
    pub size: u64,
    /// Transmission flags.
    flags: u16,
}

impl Client {
    /// Connect and choose the export without a name.
    pub fn connect(socket: &Path) -> std::io::Result<Self> {
        let broken = |why: String| std::io::Error::other(why);
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if be64(&greeting, 0) != GREETING || be64(&greeting, 8) != OPTION_MAGIC {
            return Err(broken("no newstyle server".into()));
        }
        let mut ask = Vec::new();
        ask.extend(u32::from(hello::FIXED_NEWSTYLE | hello::NO_ZEROES).to_be_bytes());
        ask.extend(OPTION_MAGIC.to_be_bytes());
        ask.extend(opt::GO.to_be_bytes());
        // A name of 0 bytes, and no information asked for by number.
        ask.extend(6u32.to_be_bytes());
        ask.extend([0; 6]);
        stream.write_all(&ask)?;
        let (mut size, mut flags) = (0, 0);
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            let (kind, len) = (be32(&head, 12), be32(&head, 16) as usize);
            if be64(&head, 0) != OPTION_REPLY_MAGIC || len > 65536 {
                return Err(broken("no reply to an option".into()));
            }
            let mut data = vec![0; len];
            stream.read_exact(&mut data)?;
            match kind {
                rep::INFO if len >= 12 && be16(&data, 0) == info::EXPORT => {
                    (size, flags) = (be64(&data, 2), be16(&data, 10));
                }
                rep::INFO => {}
                rep::ACK if size > 0 => return Ok(Self { stream, size, flags }),
                other => return Err(broken(format!("reply {other:#x} to NBD_OPT_GO"))),
            }
        }
    }

    /// One read.
    pub fn read(&mut self, buf: &mut [u8], offset: u64) -> Res<()> {
        let mut request = [0; REQUEST_LEN];
        header(&mut request, cmd::READ, 1, offset, buf.len());
        self.stream.write_all(&request).map_err(io)?;
        let mut head = [0; REPLY_LEN];
        self.stream.read_exact(&mut head).map_err(io)?;
        check(&head)?;
        self.stream.read_exact(buf).map_err(io)
    }

    /// Ask on and on; how many answers came before the end, in how much time.
    fn blast(&mut self, load: &Load, thread: usize, until: Until) -> Res<(u64, f64)> {
        let Load { block, depth, write, .. } = *load;
        let work = Work::reads(block, Pattern::Random, self.size);
        let mut offsets = Offsets::new(&work, thread);
        let (ask_len, reply_len) = match write {
            true => (REQUEST_LEN + block, REPLY_LEN),
            false => (REQUEST_LEN, REPLY_LEN + block),
        };
        // What is written does not matter; that there is something in each page does.
        let mut ask = vec![0x5a; ask_len * depth];
        let mut got =
            vec![0; (reply_len * depth).clamp(2 * reply_len, (4 << 20).max(2 * reply_len))];
        let (mut have, mut under_way, mut issued, mut done) = (0, 0, 0, 0);
        let (most, seconds) = match until {
            Until::Ops(n) => (n, f64::MAX),
            Until::Seconds(s) => (u64::MAX, s),
        };
        let begun = Instant::now();
        // At the end: what was done then, and when.
        let mut end = None;
        loop {
            let free = match end {
                None => (depth - under_way).min((most - issued).min(depth as u64) as usize),
                Some(_) => 0,
            };
            if free > 0 {
                let kind = if write { cmd::WRITE } else { cmd::READ };
                for slot in ask.chunks_exact_mut(ask_len).take(free) {
                    header(slot, kind, issued, offsets.next(), block);
                    issued += 1;
                }
                self.stream.write_all(&ask[..ask_len * free]).map_err(io)?;
                under_way += free;
            }
            if under_way == 0 {
                return Ok(end.unwrap_or((done, begun.elapsed().as_secs_f64())));
            }
            match self.stream.read(&mut got[have..]).map_err(io)? {
                0 => return Err("the server hung up".into()),
                n => have += n,
            }
            let mut at = 0;
            while have - at >= reply_len {
                check(&got[at..])?;
                at += reply_len;
                under_way -= 1;
                done += 1;
            }
            got.copy_within(at..have, 0);
            have -= at;
            let passed = begun.elapsed().as_secs_f64();
            if end.is_none() && passed >= seconds {
                end = Some((done, passed));
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut request = [0; REQUEST_LEN];
        header(&mut request, cmd::DISC, 0, 0, 0);
        let _ = self.stream.write_all(&request);
    }
}

fn header(to: &mut [u8], kind: u16, cookie: u64, offset: u64, len: usize) {
    to[..4].copy_from_slice(&REQUEST.to_be_bytes());
    to[4..6].fill(0);
    to[6..8].copy_from_slice(&kind.to_be_bytes());
    to[8..16].copy_from_slice(&cookie.to_be_bytes());
    to[16..24].copy_from_slice(&offset.to_be_bytes());
    to[24..28].copy_from_slice(&(len as u32).to_be_bytes());
}

fn check(reply: &[u8]) -> Res<()> {
    match (be32(reply, 0), be32(reply, 4)) {
        (REPLY, 0) => Ok(()),
        (REPLY, e) => Err(format!("a request ended with error {e}")),
        (other, _) => Err(format!("a reply begins with {other:#010x}")),
    }
}

/// The connections of a load.
pub struct Clients(Vec<Client>);

impl Clients {
    /// Connect as many as the load has.
    pub fn connect(socket: &Path, load: &Load) -> Res<Self> {
        let all: Res<Vec<_>> = (0..load.connections)
            .map(|_| Client::connect(socket).map_err(|e| format!("{}: {e}", socket.display())))
            .collect();
        let all = all?;
        if all.iter().any(|c| c.size < load.block as u64) {
            return Err("the export is smaller than a request".into());
        }
        if load.write && all.iter().any(|c| c.flags & flag::READ_ONLY != 0) {
            return Err("the export is read-only".into());
        }
        Ok(Self(all))
    }

    /// Do it, all at once. The connections are there afterwards, with nothing under way.
    pub fn run(&mut self, load: &Load, until: Until) -> Res<Done> {
        let go = Barrier::new(self.0.len());
        std::thread::scope(|scope| {
            let go = &go;
            let mut handles = Vec::new();
            for (i, client) in self.0.iter_mut().enumerate() {
                handles.push(scope.spawn(move || {
                    go.wait();
                    client.blast(load, i, until)
                }));
            }
            let mut sum = Done { rate: 0.0, ops: 0.0 };
            for handle in handles {
                let (done, time) =
                    handle.join().map_err(|_| "a thread of the load panicked".to_owned())??;
                sum.rate += done as f64 / time.max(1e-6);
                sum.ops += done as f64;
            }
            Ok(sum)
        })
    }
}

/// Connect, do it, hang up.
pub fn run(socket: &Path, load: &Load, until: Until) -> Res<Done> {
    Clients::connect(socket, load)?.run(load, until)
}

/// For somebody who looks at one server: SOCKET DEPTH BLOCK SECONDS.
pub fn by_hand(socket: &Path, depth: &str, block: &str, seconds: &str) -> Res<()> {
    let number = |s: &str| s.parse::<f64>().map_err(|_| format!("{s:?} is no number"));
    let (depth, block) = (number(depth)? as usize, number(block)? as usize);
    let load = Load { block, depth: depth.max(1), connections: 1, write: false };
    let done = run(socket, &load, Until::Seconds(number(seconds)?))?;
    println!("{:.0} requests/s", done.rate);
    Ok(())
}
