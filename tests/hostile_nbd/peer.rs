//! A server that does what a test tells it to, right or wrong, byte by byte; and what a client of the
//! library may cost when it talks to such a one.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use qblk::block::ErrorKind;
use qblk::{Error, Image, OpenFlags, Options, Result};

use super::common::*;
use super::scene::{Counts, counts, growth, until};
use super::wire::*;

pub mod chunk {
    pub const NONE: u16 = 0;
    pub const DATA: u16 = 1;
    pub const HOLE: u16 = 2;
    pub const STATUS: u16 = 5;
    pub const STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = 0x8001;
    pub const ERROR_OFFSET: u16 = 0x8002;
    pub const DONE: u16 = 1;
}

pub const EXPORT_SIZE: u64 = 64 << 20;
/// Of the export: it has flags, and flush, FUA, trim, zeroing and caching.
pub const ABILITIES: u16 = 0b100_0110_1101;
/// What every call may take, and what it takes at most: a machine under load is slow.
pub const LIMIT: &str = "0.5";
pub const BOUNDED: Duration = Duration::from_millis(1400);
/// What a client may need beyond what it had before.
const MOST: u64 = 12 << 20;

pub trait Wire: Read + Write + Send {}
impl<T: Read + Write + Send> Wire for T {}

/// What a server offers.
#[derive(Clone)]
pub struct Offer {
    pub mode: Mode,
    pub size: u64,
    pub flags: u16,
    /// `base:allocation` is number 7.
    pub context: bool,
}

impl Offer {
    pub fn new(mode: Mode) -> Self {
        Self { mode, size: EXPORT_SIZE, flags: ABILITIES, context: mode != Mode::Simple }
    }
}

/// A request that came.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u64,
}

/// The server's end of a connection. Nobody there any more is no failure of the test's.
pub struct Peer {
    pub wire: Box<dyn Wire>,
    pub mode: Mode,
    /// So many bytes may still be said; then it hangs up.
    pub left: usize,
    raw: UnixStream,
    stop: Arc<AtomicBool>,
}

impl Peer {
    /// Say something; whether it was taken.
    pub fn say(&mut self, bytes: &[u8]) -> bool {
        let n = bytes.len().min(self.left);
        let said = self.wire.write_all(&bytes[..n]).is_ok();
        self.left -= n;
        if self.left == 0 {
            let _ = self.raw.shutdown(Shutdown::Both);
        }
        said && self.left > 0
    }

    pub fn take(&mut self, n: usize) -> Option<Vec<u8>> {
        let mut b = vec![0; n];
        self.wire.read_exact(&mut b).ok().map(|()| b)
    }

    /// Say nothing more, for as long as the client stays.
    pub fn silence(&mut self) {
        let mut buf = [0; 4096];
        while matches!(self.wire.read(&mut buf), Ok(1..)) {}
    }

    /// Do nothing at all, not even read, for so long or until the test is over.
    pub fn sleep(&self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end && !self.stop.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(5).min(time));
        }
    }

    pub fn socket(&self) -> UnixStream {
        self.raw.try_clone().unwrap()
    }

    pub fn greet(&mut self) {
        self.say(b"NBDMAGICIHAVEOPT\0\x03");
        self.take(4);
    }

    /// The next option.
    pub fn option(&mut self) -> Option<(u32, Vec<u8>)> {
        let head = self.take(16)?;
        let payload = self.take(be32(&head[12..]) as usize)?;
        Some((be32(&head[8..]), payload))
    }

    pub fn answer(&mut self, option: u32, kind: u32, payload: &[u8]) -> bool {
        self.announce(option, kind, payload.len() as u32, payload)
    }

    /// A reply that has another length than it says.
    pub fn announce(&mut self, option: u32, kind: u32, length: u32, payload: &[u8]) -> bool {
        self.say(&option_reply(option, kind, length, payload))
    }

    pub fn tell_export(&mut self, size: u64, flags: u16) {
        let told = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
        self.answer(opt::GO, rep::INFO, &told);
    }

    pub fn negotiate(&mut self, offer: &Offer) -> bool {
        self.greet();
        self.agree(offer, 0)
    }

    /// Answer options as `offer` says, up to and without `before` (0: all); whether it came to that.
    pub fn agree(&mut self, offer: &Offer, before: u32) -> bool {
        while let Some((option, _)) = self.option() {
            let wanted = match offer.mode {
                Mode::Simple => 0,
                Mode::Structured => opt::STRUCTURED_REPLY,
                Mode::Extended => opt::EXTENDED_HEADERS,
            };
            match option {
                option if option == before => return true,
                option if option == wanted => {
                    self.mode = offer.mode;
                    self.answer(option, rep::ACK, &[]);
                }
                opt::SET_META_CONTEXT => {
                    if offer.context {
                        self.answer(option, rep::META_CONTEXT, b"\0\0\0\x07base:allocation");
                    }
                    self.answer(option, rep::ACK, &[]);
                }
                opt::GO => {
                    self.tell_export(offer.size, offer.flags);
                    return self.answer(option, rep::ACK, &[]);
                }
                opt::ABORT => return false,
                _ => _ = self.answer(option, rep::ERR_UNSUP, b""),
            }
        }
        false
    }

    /// The next request; the payload of a write is left where it is.
    pub fn header(&mut self) -> Option<Asked> {
        let b = self.take(if self.mode == Mode::Extended { 32 } else { 28 })?;
        let length = match self.mode {
            Mode::Extended => be64(&b[24..]),
            _ => be32(&b[24..]).into(),
        };
        let (kind, cookie, offset) = (be16(&b[6..]), be64(&b[8..]), be64(&b[16..]));
        Some(Asked { kind, cookie, offset, length })
    }

    /// The next request, with its payload.
    pub fn request(&mut self) -> Option<Asked> {
        let r = self.header()?;
        if r.kind == cmd::WRITE {
            self.take(r.length as usize)?;
        }
        Some(r)
    }

    pub fn simple(&mut self, to: &Asked, error: u32, data: &[u8]) -> bool {
        self.say(&simple_bytes(to, error, data))
    }

    pub fn chunk(&mut self, to: &Asked, flags: u16, kind: u16, payload: &[u8]) -> bool {
        self.huge(to, flags, kind, payload.len() as u64, payload)
    }

    /// A chunk that has another length than it says.
    pub fn huge(&mut self, to: &Asked, flags: u16, kind: u16, length: u64, p: &[u8]) -> bool {
        let bytes = chunk_bytes(self.mode, to, flags, kind, length, p);
        self.say(&bytes)
    }

    pub fn data(&mut self, to: &Asked, flags: u16, offset: u64, data: &[u8]) -> bool {
        self.chunk(to, flags, chunk::DATA, &[&offset.to_be_bytes()[..], data].concat())
    }

    pub fn hole(&mut self, to: &Asked, flags: u16, offset: u64, length: u32) -> bool {
        let payload = [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
        self.chunk(to, flags, chunk::HOLE, &payload)
    }

    /// The right answer: reads are of [`right`].
    pub fn right(&mut self, r: &Asked) -> bool {
        let bytes = right_bytes(self.mode, r);
        self.say(&bytes)
    }

    /// Answer rightly until the client goes; whether it said goodbye.
    pub fn serve(&mut self) -> bool {
        while let Some(r) = self.request() {
            if r.kind == cmd::DISC {
                return true;
            }
            self.right(&r);
        }
        false
    }
}

pub fn option_reply(option: u32, kind: u32, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut b = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    [option, kind, length].iter().for_each(|n| b.extend_from_slice(&n.to_be_bytes()));
    b.extend_from_slice(payload);
    b
}

fn simple_bytes(to: &Asked, error: u32, data: &[u8]) -> Vec<u8> {
    let head = [0x6744_6698u32.to_be_bytes(), error.to_be_bytes()].concat();
    [&head[..], &to.cookie.to_be_bytes(), data].concat()
}

fn chunk_bytes(mode: Mode, r: &Asked, flags: u16, kind: u16, length: u64, p: &[u8]) -> Vec<u8> {
    let magic: u32 = if mode == Mode::Extended { 0x6e8a_278c } else { 0x668e_33ef };
    let mut b = magic.to_be_bytes().to_vec();
    b.extend_from_slice(&flags.to_be_bytes());
    b.extend_from_slice(&kind.to_be_bytes());
    b.extend_from_slice(&r.cookie.to_be_bytes());
    if mode == Mode::Extended {
        b.extend_from_slice(&r.offset.to_be_bytes());
        b.extend_from_slice(&length.to_be_bytes());
    } else {
        b.extend_from_slice(&(length as u32).to_be_bytes());
    }
    b.extend_from_slice(p);
    b
}

/// The right answer to a request.
pub fn right_bytes(mode: Mode, r: &Asked) -> Vec<u8> {
    let chunk = |kind, p: &[u8]| chunk_bytes(mode, r, chunk::DONE, kind, p.len() as u64, p);
    match (r.kind, mode) {
        (cmd::READ, Mode::Simple) => simple_bytes(r, 0, &right(r.offset, r.length)),
        (cmd::READ, _) => {
            let data = right(r.offset, r.length);
            chunk(chunk::DATA, &[&r.offset.to_be_bytes()[..], &data].concat())
        }
        (cmd::BLOCK_STATUS, Mode::Extended) => chunk(chunk::STATUS_EXT, &wide(7, &[(r.length, 0)])),
        (cmd::BLOCK_STATUS, _) => chunk(chunk::STATUS, &narrow(7, &[(r.length as u32, 0)])),
        (_, Mode::Simple) => simple_bytes(r, 0, &[]),
        _ => chunk(chunk::NONE, &[]),
    }
}

/// Payloads of block statuses: context, and runs of so many bytes with these flags.
pub fn narrow(context: u32, runs: &[(u32, u32)]) -> Vec<u8> {
    let mut p = context.to_be_bytes().to_vec();
    runs.iter().for_each(|r| p.extend_from_slice(&[r.0.to_be_bytes(), r.1.to_be_bytes()].concat()));
    p
}

pub fn wide(context: u32, runs: &[(u64, u64)]) -> Vec<u8> {
    let mut p = [context.to_be_bytes(), (runs.len() as u32).to_be_bytes()].concat();
    runs.iter().for_each(|r| p.extend_from_slice(&[r.0.to_be_bytes(), r.1.to_be_bytes()].concat()));
    p
}

/// What the export holds: no byte of it is 0.
pub fn right(offset: u64, length: u64) -> Vec<u8> {
    (offset..offset + length).map(|at| (at % 251) as u8 + 1).collect()
}

type Script = Arc<dyn Fn(usize, &mut Peer) + Send + Sync>;

/// Such a server: each connection has a thread that follows the script, told which connection it is
/// (from 0 on), and then hangs up.
pub struct Evil {
    pub path: PathBuf,
    pub came: Arc<AtomicUsize>,
    tmp: Option<Tmp>,
    stop: Arc<AtomicBool>,
    socks: Arc<Mutex<Vec<UnixStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl Evil {
    pub fn new(script: impl Fn(usize, &mut Peer) + Send + Sync + 'static) -> Self {
        let tmp = Tmp::new("evil");
        let path = tmp.join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let (came, stop): (Arc<AtomicUsize>, Arc<AtomicBool>) = Default::default();
        let socks: Arc<Mutex<Vec<UnixStream>>> = Arc::default();
        let (script, counted, ends, all): (Script, _, _, _) =
            (Arc::new(script), came.clone(), stop.clone(), socks.clone());
        let thread = std::thread::spawn(move || {
            let mut threads = Vec::new();
            while let Ok((raw, _)) = listener.accept() {
                if ends.load(SeqCst) {
                    break;
                }
                let n = counted.fetch_add(1, SeqCst);
                let (script, stop) = (script.clone(), ends.clone());
                let wire = Box::new(raw.try_clone().unwrap());
                {
                    let mut all = all.lock().unwrap();
                    // Most of a storm is over by now.
                    if n > 64 {
                        all.clear();
                    }
                    all.push(raw.try_clone().unwrap());
                }
                let mode = Mode::Simple;
                let mut peer = Peer { wire, mode, left: usize::MAX, raw, stop };
                threads.push(std::thread::spawn(move || {
                    script(n, &mut peer);
                    let _ = peer.raw.shutdown(Shutdown::Both);
                }));
                threads.retain(|t| !t.is_finished());
            }
            all.lock().unwrap().iter().for_each(|s| drop(s.shutdown(Shutdown::Both)));
            for thread in threads {
                // A panic of a script is the test's.
                thread.join().unwrap();
            }
        });
        Self { path, came, tmp: Some(tmp), stop, socks, thread: Some(thread) }
    }

    /// A server that negotiates as it should, and then follows the script with each request.
    pub fn answering(
        offer: Offer,
        script: impl Fn(&mut Peer, &Asked) + Send + Sync + 'static,
    ) -> Self {
        Self::new(move |_, p| {
            if p.negotiate(&offer) {
                while let Some(r) = p.header().filter(|r| r.kind != cmd::DISC) {
                    script(p, &r);
                }
            }
        })
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.path.display())
    }

    /// Connections so far.
    pub fn came(&self) -> usize {
        self.came.load(SeqCst)
    }

    /// Open it, with these options beside the usual.
    pub fn open(&self, more: &[(&str, &str)]) -> Result<Image> {
        self.open_at(&self.uri(), more)
    }

    pub fn open_at(&self, uri: &str, more: &[(&str, &str)]) -> Result<Image> {
        Image::open(uri.as_ref(), &options(more), OpenFlags::RDWR)
    }
}

pub fn options(more: &[(&str, &str)]) -> Options {
    let mut options = Options::new();
    let usual = [("nbd.timeout", LIMIT), ("nbd.reconnect", "0"), ("format", "raw")];
    for (key, value) in usual.iter().chain(more) {
        options.set(key, Some(value.as_bytes()));
    }
    options
}

impl Drop for Evil {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        self.socks.lock().unwrap().iter().for_each(|s| drop(s.shutdown(Shutdown::Both)));
        let _ = UnixStream::connect(&self.path);
        let joined = self.thread.take().unwrap().join();
        drop(self.tmp.take());
        if !std::thread::panicking() {
            joined.expect("a script");
        }
    }
}

/// Do `work` with what is made once made before, and see that nothing of it stays: memory in use
/// never grows by more than `most`, and threads and descriptors are as many as before.
pub fn costs(most: u64, work: impl FnOnce()) {
    let evil = Evil::answering(Offer::new(Mode::Structured), |p, r| _ = p.right(r));
    let image = evil.open(&[]).unwrap();
    image.read_at(&mut [0; 4096], 0).unwrap();
    image.close().unwrap();
    drop(evil);
    let all = |c: &Counts| c.threads + c.conns + c.pool;
    let before = counts();
    let grown = growth(work);
    let same = |c: &Counts| all(c) <= all(&before) && c.fds <= before.fds;
    if let Err(found) = until(Duration::from_secs(5), counts, same) {
        panic!("found {found:?}, before it was {before:?}");
    }
    assert!(grown < most, "{grown} bytes more were in use");
}

/// As [`costs`], of little memory.
pub fn costs_little(work: impl FnOnce()) {
    costs(MOST, work);
}

/// Close, which must take no longer than a call.
pub fn close(image: Image, what: &str) {
    let begun = Instant::now();
    // What it says is another matter: a flush may fail.
    let _ = image.close();
    let took = begun.elapsed();
    assert!(took < BOUNDED, "{what}: closing took {took:?}");
}

/// Time of the work, which must be bounded.
pub fn bounded<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let result = work();
    let took = begun.elapsed();
    assert!(took < BOUNDED, "{what}: took {took:?}");
    result
}

/// An error's text is for people and terminals, however long and strange what the server said is.
pub fn assert_decent(e: &Error, what: &str) {
    let text = e.to_string();
    assert!(!text.chars().any(char::is_control), "{what}: {text:?}");
    assert!(!text.contains(['\u{202e}', '\u{2066}']), "{what}: {text:?}");
    assert!(text.len() < 1800, "{what}: {} bytes of text", text.len());
}

pub fn assert_proto(e: &Error, part: &str, what: &str) {
    assert_decent(e, what);
    assert_eq!(e.kind(), ErrorKind::Proto, "{what}: {e}");
    assert!(e.to_string().contains(part), "{what}: {e}");
}

pub fn assert_errno(e: &Error, errno: i32, what: &str) {
    assert_decent(e, what);
    assert_eq!(e.kind(), ErrorKind::Errno(errno), "{what}: {e}");
}
