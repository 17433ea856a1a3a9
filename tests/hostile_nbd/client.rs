//! A client that says what it is told to, right or wrong, and takes apart what it hears. What a server
//! must not say fails the test.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::sync::Arc;

use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::wire::*;

enum Io {
    Plain(Sock),
    Tls(Box<StreamOwned<ClientConnection, Sock>>),
}

/// One reply to an option.
#[derive(Debug)]
pub struct Answer {
    pub option: u32,
    pub kind: u32,
    pub payload: Vec<u8>,
}

/// A whole reply to a request.
#[derive(Debug, Default)]
pub struct Reply {
    pub cookie: u64,
    /// 0 = none.
    pub error: u32,
    pub text: String,
    /// What was read, holes as zeroes.
    pub data: Vec<u8>,
    /// By context: lengths and flags.
    pub status: BTreeMap<u32, Vec<(u64, u64)>>,
}

struct Asked {
    kind: u16,
    flags: u16,
    offset: u64,
    length: u64,
    /// Bytes that came already.
    covered: Vec<(u64, u64)>,
    reply: Reply,
}

pub struct Client {
    io: Io,
    pub mode: Mode,
    pub size: u64,
    pub flags: u16,
    /// Ids and names.
    pub contexts: Vec<(u32, String)>,
    cookie: u64,
    asked: HashMap<u64, Asked>,
}

/// The connection, as bytes.
impl Client {
    /// One that has said nothing yet.
    pub fn new(sock: Sock) -> Self {
        let (asked, contexts) = (HashMap::new(), Vec::new());
        let io = Io::Plain(sock);
        Self { io, mode: Mode::Simple, size: 0, flags: 0, contexts, cookie: 0, asked }
    }

    pub fn try_say(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.io {
            Io::Plain(s) => s.write_all(bytes),
            Io::Tls(s) => s.write_all(bytes).and_then(|()| s.flush()),
        }
    }

    pub fn say(&mut self, bytes: &[u8]) {
        self.try_say(bytes).unwrap_or_else(|e| panic!("sending {} bytes: {e}", bytes.len()));
    }

    pub fn try_hear(&mut self, n: usize) -> io::Result<Vec<u8>> {
        let mut out = vec![0; n];
        match &mut self.io {
            Io::Plain(s) => s.read_exact(&mut out),
            Io::Tls(s) => s.read_exact(&mut out),
        }?;
        Ok(out)
    }

    pub fn hear(&mut self, n: usize) -> Vec<u8> {
        self.try_hear(n).unwrap_or_else(|e| panic!("waiting for {n} bytes: {e}"))
    }

    /// All that still comes before the server hangs up, which it must.
    pub fn hear_end(&mut self) -> Vec<u8> {
        let (mut out, mut some) = (Vec::new(), [0; 4096]);
        loop {
            let n = match &mut self.io {
                Io::Plain(s) => s.read(&mut some),
                Io::Tls(s) => s.read(&mut some),
            };
            match n {
                Ok(0) => return out,
                Ok(n) => out.extend_from_slice(&some[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    panic!("the server did not hang up, and said {out:02x?}")
                }
                Err(_) => return out,
            }
        }
    }

    pub fn sock(&self) -> &Sock {
        match &self.io {
            Io::Plain(s) => s,
            Io::Tls(s) => &s.sock,
        }
    }

    pub fn into_sock(self) -> Sock {
        match self.io {
            Io::Plain(s) => s,
            Io::Tls(s) => s.sock,
        }
    }
}

/// Negotiation.
impl Client {
    /// Take the greeting and answer it.
    pub fn greet(&mut self) {
        self.take_greeting();
        self.say(&[0, 0, 0, 3]);
    }

    pub fn take_greeting(&mut self) {
        let hello = self.hear(18);
        assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(be16(&hello[16..]), 3, "fixed newstyle, no zeroes");
    }

    pub fn option(&mut self, option: u32, payload: &[u8]) {
        self.say(&option_bytes(option, payload));
    }

    pub fn answer(&mut self) -> Answer {
        let head = self.hear(20);
        assert_eq!(be64(&head), 0x0003_e889_0455_65a9, "magic of a reply to an option");
        let (option, kind, len) = (be32(&head[8..]), be32(&head[12..]), be32(&head[16..]));
        assert!(len as usize <= 2 * MAX_STRING + 8, "a reply of {len} bytes");
        let payload = self.hear(len as usize);
        if kind >> 31 == 1 {
            assert!(payload.len() <= MAX_STRING, "a text of {} bytes", payload.len());
            let text = String::from_utf8(payload.clone()).expect("a text is UTF-8");
            assert!(!text.chars().any(char::is_control), "control characters: {text:?}");
        }
        Answer { option, kind, payload }
    }

    /// Say an option, and hear all that is answered: the last is ACK or an error.
    pub fn answers(&mut self, option: u32, payload: &[u8]) -> Vec<Answer> {
        self.option(option, payload);
        let mut all = Vec::new();
        loop {
            all.push(self.answer());
            let last = all.last().unwrap();
            assert_eq!(last.option, option, "the option that is answered");
            if last.kind == rep::ACK || last.kind >> 31 == 1 {
                return all;
            }
        }
    }

    /// As `answers`, only how it ended.
    pub fn verdict(&mut self, option: u32, payload: &[u8]) -> u32 {
        self.answers(option, payload).pop().unwrap().kind
    }

    /// Begin TLS, after STARTTLS was acknowledged. The handshake is made when something is said.
    pub fn encrypt(mut self, config: &Arc<ClientConfig>) -> Self {
        let Io::Plain(sock) = self.io else { panic!("TLS within TLS") };
        let name = "localhost".try_into().unwrap();
        let conn = ClientConnection::new(config.clone(), name).unwrap();
        self.io = Io::Tls(Box::new(StreamOwned::new(conn, sock)));
        self
    }

    /// Choose contexts and go into transmission.
    pub fn go(&mut self, export: &[u8], how: &How) {
        let option = match how.mode {
            Mode::Simple => None,
            Mode::Structured => Some(opt::STRUCTURED_REPLY),
            Mode::Extended => Some(opt::EXTENDED_HEADERS),
        };
        if let Some(option) = option {
            assert_eq!(self.verdict(option, &[]), rep::ACK);
        }
        self.mode = how.mode;
        if !how.contexts.is_empty() {
            let payload = context_payload(export, how.contexts);
            let answers = self.answers(opt::SET_META_CONTEXT, &payload);
            assert_eq!(answers.last().unwrap().kind, rep::ACK);
            self.contexts = contexts(&answers);
        }
        let answers = self.answers(opt::GO, &info_payload(export, &[3]));
        let end = answers.last().unwrap();
        assert_eq!(end.kind, rep::ACK, "{}", String::from_utf8_lossy(&end.payload));
        let facts = answers.iter().find(|a| a.kind == rep::INFO && a.payload.starts_with(&[0, 0]));
        let facts = &facts.expect("NBD_INFO_EXPORT").payload;
        (self.size, self.flags) = (be64(&facts[2..]), be16(&facts[10..]));
    }

    /// An honest client, ready for requests.
    pub fn open(sock: Sock, export: &[u8], how: &How) -> Self {
        let mut c = Self::new(sock);
        c.greet();
        if let Some(config) = &how.tls {
            assert_eq!(c.verdict(opt::STARTTLS, &[]), rep::ACK);
            c = c.encrypt(config);
        }
        c.go(export, how);
        c
    }
}

/// Contexts that were set or listed.
pub fn contexts(answers: &[Answer]) -> Vec<(u32, String)> {
    let of = |a: &Answer| (be32(&a.payload), String::from_utf8(a.payload[4..].to_vec()).unwrap());
    answers.iter().filter(|a| a.kind == rep::META_CONTEXT).map(of).collect()
}

/// Transmission.
impl Client {
    /// A request's bytes; it is remembered, its cookie is the second.
    pub fn request(&mut self, kind: u16, flags: u16, offset: u64, length: u64) -> (Vec<u8>, u64) {
        self.cookie += 1;
        let cookie = self.cookie << 8 | u64::from(kind);
        // Every write of a client with extended headers says that it has a payload.
        let extended_write = self.mode == Mode::Extended && kind == cmd::WRITE;
        let flags = flags | if extended_write { PAYLOAD_LEN } else { 0 };
        self.expect(cookie, kind, flags, offset, length);
        (header(self.mode, kind, flags, cookie, offset, length), cookie)
    }

    /// Expect a reply to a request that is sent by other means.
    pub fn expect(&mut self, cookie: u64, kind: u16, flags: u16, offset: u64, length: u64) {
        let reply = Reply { cookie, ..Reply::default() };
        let asked = Asked { kind, flags, offset, length, covered: Vec::new(), reply };
        self.asked.insert(cookie, asked);
    }

    /// Send a request and its payload; its cookie.
    pub fn send(&mut self, kind: u16, flags: u16, offset: u64, length: u64, data: &[u8]) -> u64 {
        let (mut bytes, cookie) = self.request(kind, flags, offset, length);
        bytes.extend_from_slice(data);
        self.say(&bytes);
        cookie
    }

    /// Send a request and wait for its reply, which must be the next one that is whole.
    pub fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u64, data: &[u8]) -> Reply {
        let cookie = self.send(kind, flags, offset, length, data);
        let reply = self.reply();
        assert_eq!(reply.cookie, cookie, "the reply to the only request");
        reply
    }

    /// The next whole reply.
    pub fn reply(&mut self) -> Reply {
        self.try_reply().unwrap_or_else(|e| panic!("waiting for a reply: {e}"))
    }

    /// As `reply`; an error if the connection ends.
    pub fn try_reply(&mut self) -> io::Result<Reply> {
        loop {
            let head = self.try_hear(16)?;
            let cookie = be64(&head[8..]);
            let asked = self.asked.get(&cookie).map(|a| (a.kind, a.offset, a.length));
            let Some((kind, offset, length)) = asked else {
                panic!("a reply to nothing: {head:02x?}")
            };
            if be32(&head) == 0x6744_6698 {
                assert!(self.mode != Mode::Extended, "a simple reply");
                assert!(self.mode == Mode::Simple || kind != cmd::READ, "a simple reply to READ");
                let mut reply = self.asked.remove(&cookie).unwrap().reply;
                reply.error = be32(&head[4..]);
                assert!(reply.error == 0 || ERRORS.contains(&reply.error), "{reply:?}");
                if kind == cmd::READ && reply.error == 0 {
                    reply.data = self.try_hear(length as usize)?;
                }
                return Ok(reply);
            }
            let extended = self.mode == Mode::Extended;
            let magic = if extended { 0x6e8a_278c } else { 0x668e_33ef };
            assert_eq!(be32(&head), magic, "magic of a chunk");
            assert!(self.mode != Mode::Simple, "a chunk");
            let rest = self.try_hear(if extended { 16 } else { 4 })?;
            let len = if extended { be64(&rest[8..]) } else { be32(&rest).into() };
            assert!(!extended || be64(&rest) == offset, "the offset in a chunk");
            assert!(len <= (64 << 20) + 8, "a chunk of {len} bytes");
            let payload = self.try_hear(len as usize)?;
            let (flags, kind) = (be16(&head[4..]), be16(&head[6..]));
            assert!(flags <= 1, "flags of a chunk: {flags:#x}");
            let asked = self.asked.get_mut(&cookie).unwrap();
            asked.chunk(kind, &payload, extended);
            if flags == 1 {
                return Ok(self.asked.remove(&cookie).unwrap().finish(&self.contexts));
            }
            assert!(kind != 0, "an empty chunk that is not the last");
        }
    }

    /// Requests without a whole reply.
    pub fn open_requests(&self) -> usize {
        self.asked.len()
    }
}

impl Asked {
    fn chunk(&mut self, kind: u16, p: &[u8], extended: bool) {
        match kind {
            0 => assert!(p.is_empty()),
            1 | 2 => {
                assert_eq!(self.kind, cmd::READ);
                let at = be64(p);
                let len = if kind == 1 { p.len() as u64 - 8 } else { be32(&p[8..]).into() };
                assert!(kind == 1 || p.len() == 12);
                let fits = len > 0 && at >= self.offset && at + len <= self.offset + self.length;
                assert!(fits, "data {len}@{at}, asked for {}@{}", self.length, self.offset);
                let overlaps = |(a, n): &(u64, u64)| at < a + n && *a < at + len;
                assert!(!self.covered.iter().any(overlaps), "{at} twice");
                assert!(self.covered.is_empty() || self.flags & DF == 0, "a fragment");
                self.covered.push((at, len));
                self.reply.data.resize(self.length as usize, 0);
                let from = (at - self.offset) as usize;
                if kind == 1 {
                    self.reply.data[from..from + len as usize].copy_from_slice(&p[8..]);
                }
            }
            5 | 6 => {
                assert_eq!((self.kind, kind == 6), (cmd::BLOCK_STATUS, extended));
                let list: Vec<(u64, u64)> = if extended {
                    assert_eq!(be32(&p[4..]) as usize, (p.len() - 8) / 16);
                    p[8..].chunks(16).map(|d| (be64(d), be64(&d[8..]))).collect()
                } else {
                    let one = |d: &[u8]| (be32(d).into(), be32(&d[4..]).into());
                    p[4..].chunks(8).map(one).collect()
                };
                assert!(!list.is_empty() && list.iter().all(|(n, _)| *n > 0), "{list:?}");
                assert!(list.len() == 1 || self.flags & REQ_ONE == 0, "REQ_ONE");
                assert!(self.reply.status.insert(be32(p), list).is_none(), "a context twice");
            }
            0x8001 | 0x8002 => {
                let n = usize::from(be16(&p[4..]));
                assert_eq!(p.len(), 6 + n + if kind == 0x8002 { 8 } else { 0 });
                self.reply.error = be32(p);
                assert!(ERRORS.contains(&self.reply.error));
                self.reply.text = String::from_utf8(p[6..6 + n].to_vec()).expect("UTF-8");
                assert!(!self.reply.text.chars().any(char::is_control));
            }
            other => panic!("a chunk of kind {other}"),
        }
    }

    /// The reply, if it says all that was asked for.
    fn finish(self, contexts: &[(u32, String)]) -> Reply {
        if self.reply.error == 0 {
            let all: u64 = self.covered.iter().map(|c| c.1).sum();
            assert!(self.kind != cmd::READ || all == self.length, "{all} of {}", self.length);
            let some = self.flags & PAYLOAD_LEN != 0;
            let whole = some || self.reply.status.len() == contexts.len();
            assert!(self.kind != cmd::BLOCK_STATUS || whole, "{:?}", self.reply.status);
        }
        self.reply
    }
}
