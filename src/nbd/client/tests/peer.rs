//! A server that does what a test tells it to, right or wrong.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::super::{Settings, Target, open};
use crate::block::{Driver, Error, ErrorKind, Name, OneIov, ReqFlags, Result};
use crate::nbd::proto::*;

/// Both ends of a connection fail rather than hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a server offers.
#[derive(Clone)]
pub struct Offer {
    pub hello: u16,
    pub mode: Mode,
    pub size: u64,
    pub flags: u16,
    pub blocks: Option<(u32, u32, u32)>,
    /// Agreed to where asked for: name and number.
    pub contexts: Vec<(&'static str, u32)>,
    /// GO is not known.
    pub no_go: bool,
}

impl Default for Offer {
    fn default() -> Self {
        use flag::*;
        Self {
            hello: hello::FIXED_NEWSTYLE | hello::NO_ZEROES,
            mode: Mode::Structured,
            size: 1 << 20,
            flags: HAS_FLAGS
                | SEND_FLUSH
                | SEND_FUA
                | SEND_TRIM
                | SEND_WRITE_ZEROES
                | SEND_CACHE
                | SEND_FAST_ZERO,
            blocks: None,
            contexts: vec![],
            no_go: false,
        }
    }
}

impl Offer {
    pub fn mode(mode: Mode) -> Self {
        Self { mode, ..Self::default() }
    }
}

/// The server's end of a connection.
pub struct Peer {
    pub stream: UnixStream,
    pub mode: Mode,
}

impl Peer {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, mode: Mode::Simple }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        // A client that has hung up for good reason is no failure of the test's.
        let _ = self.stream.write_all(bytes);
    }

    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut b = [0; N];
        self.stream.read_exact(&mut b).ok().map(|()| b)
    }

    pub fn take_vec(&mut self, n: usize) -> Option<Vec<u8>> {
        let mut b = vec![0; n];
        self.stream.read_exact(&mut b).ok().map(|()| b)
    }

    pub fn greet(&mut self, flags: u16) {
        let mut b = GREETING.to_be_bytes().to_vec();
        b.extend(OPTION_MAGIC.to_be_bytes());
        b.extend(flags.to_be_bytes());
        self.send(&b);
        let _ = self.take::<4>();
    }

    /// The next option.
    pub fn option(&mut self) -> Option<(u32, Vec<u8>)> {
        let head = self.take::<16>()?;
        assert_eq!(be64(&head), OPTION_MAGIC);
        Some((be32(&head[8..]), self.take_vec(be32(&head[12..]) as usize)?))
    }

    pub fn answer(&mut self, option: u32, kind: u32, payload: &[u8]) {
        let mut b = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        b.extend(option.to_be_bytes());
        b.extend(kind.to_be_bytes());
        b.extend((payload.len() as u32).to_be_bytes());
        b.extend(payload);
        self.send(&b);
    }

    pub fn info(&mut self, kind: u16, rest: &[u8]) {
        let payload = [&kind.to_be_bytes(), rest].concat();
        self.answer(opt::GO, rep::INFO, &payload);
    }

    pub fn info_export(&mut self, size: u64, flags: u16) {
        self.info(info::EXPORT, &[&size.to_be_bytes()[..], &flags.to_be_bytes()].concat());
    }

    /// Negotiate as `offer` says; whether transmission began.
    pub fn negotiate(&mut self, offer: &Offer) -> bool {
        self.greet(offer.hello);
        self.agree(offer)
    }

    /// Negotiate after the greeting.
    pub fn agree(&mut self, offer: &Offer) -> bool {
        while let Some((option, payload)) = self.option() {
            match option {
                opt::EXTENDED_HEADERS if offer.mode == Mode::Extended => {
                    self.mode = Mode::Extended;
                    self.answer(option, rep::ACK, &[]);
                }
                opt::STRUCTURED_REPLY if offer.mode == Mode::Structured => {
                    self.mode = Mode::Structured;
                    self.answer(option, rep::ACK, &[]);
                }
                opt::SET_META_CONTEXT => {
                    let asked = |name: &str| {
                        payload.windows(name.len()).any(|part| part == name.as_bytes())
                    };
                    for (name, id) in offer.contexts.iter().filter(|c| asked(c.0)) {
                        let payload = [&id.to_be_bytes(), name.as_bytes()].concat();
                        self.answer(option, rep::META_CONTEXT, &payload);
                    }
                    self.answer(option, rep::ACK, &[]);
                }
                opt::GO if !offer.no_go => {
                    if let Some((min, preferred, max)) = offer.blocks {
                        let sizes = [min, preferred, max].map(u32::to_be_bytes).concat();
                        self.info(info::BLOCK_SIZE, &sizes);
                    }
                    self.info_export(offer.size, offer.flags);
                    self.answer(option, rep::ACK, &[]);
                    return true;
                }
                opt::EXPORT_NAME => {
                    let mut b = offer.size.to_be_bytes().to_vec();
                    b.extend(offer.flags.to_be_bytes());
                    if offer.hello & hello::NO_ZEROES == 0 {
                        b.extend([0; 124]);
                    }
                    self.send(&b);
                    return true;
                }
                opt::ABORT => return false,
                option => self.answer(option, rep::ERR_UNSUP, b"never heard of it"),
            }
        }
        false
    }

    /// The next request, with the payload of a write.
    pub fn request(&mut self) -> Option<(Request, Vec<u8>)> {
        let head = self.take_vec(self.mode.request_len())?;
        let request = Request::decode(&head, self.mode).expect("a request");
        let n = if request.kind == cmd::WRITE { request.length as usize } else { 0 };
        Some((request, self.take_vec(n)?))
    }

    pub fn simple(&mut self, to: &Request, error: u32, data: &[u8]) {
        let b = [&simple_reply(error, to.cookie)[..], data].concat();
        self.send(&b);
    }

    pub fn chunk(&mut self, to: &Request, flags: u16, kind: u16, payload: &[u8]) {
        let (head, n) = chunk_header(self.mode, flags, kind, to, payload.len() as u64);
        self.send(&[&head[..n], payload].concat());
    }

    /// A chunk of data at an offset of the device.
    pub fn data(&mut self, to: &Request, flags: u16, offset: u64, data: &[u8]) {
        let payload = [&offset.to_be_bytes(), data].concat();
        self.chunk(to, flags, chunk::OFFSET_DATA, &payload);
    }

    pub fn hole(&mut self, to: &Request, flags: u16, offset: u64, len: u32) {
        let payload = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
        self.chunk(to, flags, chunk::OFFSET_HOLE, &payload);
    }

    pub fn error(&mut self, to: &Request, flags: u16, error: u32, text: &[u8]) {
        let len = (text.len() as u16).to_be_bytes();
        let payload = [&error.to_be_bytes()[..], &len, text].concat();
        self.chunk(to, flags, chunk::ERROR, &payload);
    }

    /// "Done", in the way of the mode.
    pub fn ok(&mut self, to: &Request) {
        match self.mode {
            Mode::Simple => self.simple(to, 0, &[]),
            _ => self.chunk(to, chunk::DONE, chunk::NONE, &[]),
        }
    }

    /// Answer requests from `disk` until the client goes; whether it said goodbye.
    pub fn serve(&mut self, disk: &mut [u8]) -> bool {
        while let Some((r, payload)) = self.request() {
            let range = r.offset as usize..(r.offset + r.length) as usize;
            match r.kind {
                cmd::READ => {
                    let data = disk[range].to_vec();
                    match self.mode {
                        Mode::Simple => self.simple(&r, 0, &data),
                        _ => self.data(&r, chunk::DONE, r.offset, &data),
                    }
                }
                cmd::WRITE => {
                    disk[range].copy_from_slice(&payload);
                    self.ok(&r);
                }
                cmd::WRITE_ZEROES => {
                    disk[range].fill(0);
                    self.ok(&r);
                }
                cmd::DISC => return true,
                _ => self.ok(&r),
            }
        }
        false
    }
}

pub fn name() -> Name {
    Name::from("peer")
}

pub fn settings() -> Settings {
    Settings { write: true, timeout: Some(PATIENCE), ..Settings::default() }
}

/// Run a script at one end of a connection and a client at the other.
pub fn connected<T>(
    script: impl FnOnce(Peer) + Send,
    client: impl FnOnce(Result<Box<dyn Driver>>) -> T,
) -> T {
    connected_with(settings(), script, client)
}

pub fn connected_with<T>(
    settings: Settings,
    script: impl FnOnce(Peer) + Send,
    client: impl FnOnce(Result<Box<dyn Driver>>) -> T,
) -> T {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|s| {
        s.spawn(move || script(Peer::new(theirs)));
        client(open(Target::Socket(ours.into()), b"disk", &name(), settings))
    })
}

/// A connection that is negotiated as `offer` says before the script begins.
pub fn opened<T>(
    offer: Offer,
    script: impl FnOnce(Peer) + Send,
    client: impl FnOnce(&dyn Driver) -> T,
) -> T {
    connected(
        move |mut peer| {
            assert!(peer.negotiate(&offer));
            script(peer);
        },
        |driver| client(&*driver.expect("an open export")),
    )
}

pub fn read(d: &dyn Driver, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut buf = vec![0xa5; len];
    d.read(OneIov::dst(&mut buf).iov(), offset).map(|()| buf)
}

pub fn write(d: &dyn Driver, offset: u64, bytes: &[u8]) -> Result<()> {
    d.write(OneIov::src(bytes).iov(), offset, ReqFlags::NONE)
}

pub fn is_errno(e: &Error, errno: i32) -> bool {
    e.kind() == ErrorKind::Errno(errno)
}
