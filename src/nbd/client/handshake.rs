//! The client's half of the negotiation: from the greeting to the export that is then read and
//! written.
//!
//! Specification: doc/proto.md, "Fixed newstyle negotiation" and the option types. Everything a server
//! may send here is bounded: the payload of a reply, its strings, the number of replies; the stream
//! has a deadline for the whole.

use super::{Listed, Settings};
use crate::block::{Error, ErrorKind, Name, Result, quoted};
use crate::log::{Level, log};
use crate::nbd::net::Stream;
use crate::nbd::proto::{self, Mode, be16, be32, be64, flag, hello, info, opt, rep};

/// Largest payload of a reply to an option, bytes. A name and a description fit eight times.
const MAX_PAYLOAD: u32 = 64 << 10;
/// Replies of kind INFO to one option.
const MAX_INFOS: usize = 100;
/// Exports in a list, and bytes of all their names and descriptions.
const MAX_LISTED: usize = 10_000;
const MAX_LISTED_BYTES: usize = 16 << 20;
/// Largest minimum block size, bytes ("Block size constraints": at most 64 KiB).
const MAX_MINIMUM: u32 = 64 << 10;
/// Largest payload that we send or ask for, bytes: what every server takes.
const MAX_TRANSFER: u32 = proto::DEFAULT_MAX_PAYLOAD;

/// The context that tells holes and zeroes.
pub(super) const ALLOCATION: &[u8] = b"base:allocation";
/// The context that tells which image of a chain has the bytes.
pub(super) const DEPTH: &[u8] = b"qemu:allocation-depth";

/// A context that was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Context {
    pub name: Vec<u8>,
    /// The server's number for it on this connection.
    pub id: u32,
}

/// What was agreed on.
#[derive(Clone, Debug, Default)]
pub(super) struct Export {
    pub size: u64,
    /// Bits of [`flag`].
    pub flags: u16,
    pub mode: Mode,
    /// Requests keep to this, bytes; a power of two.
    pub minimum: u32,
    pub preferred: u32,
    /// Largest payload, bytes, a multiple of the minimum.
    pub maximum: u32,
    pub contexts: Vec<Context>,
    pub name: Option<Vec<u8>>,
    pub description: Option<Vec<u8>>,
    pub tls: bool,
}

impl Export {
    pub(super) fn has(&self, bit: u16) -> bool {
        self.flags & bit != 0
    }

    /// The place of a context among those agreed on.
    pub(super) fn context(&self, name: &[u8]) -> Option<usize> {
        self.contexts.iter().position(|c| c.name == name)
    }
}

/// Agree on an export and leave the stream where transmission begins.
pub(super) fn negotiate(stream: &mut Stream, export: &[u8], settings: &Settings) -> Result<Export> {
    let mut talk = Talk::begin(stream, settings)?;
    let mut agreed = Export { tls: talk.stream.is_tls(), ..Export::default() };
    if talk.fixed {
        if talk.ask_simple(opt::EXTENDED_HEADERS)? {
            agreed.mode = Mode::Extended;
        } else if talk.ask_simple(opt::STRUCTURED_REPLY)? {
            agreed.mode = Mode::Structured;
        }
        if agreed.mode != Mode::Simple {
            talk.set_contexts(export, settings, &mut agreed)?;
        }
        if !talk.go(export, &mut agreed)? {
            talk.export_name(export, &mut agreed)?;
        }
    } else {
        talk.export_name(export, &mut agreed)?;
    }
    let peer = talk.peer();
    complete(&mut agreed, &peer)?;
    Ok(agreed)
}

/// Ask which exports there are.
pub(super) fn list(stream: &mut Stream, settings: &Settings) -> Result<Vec<Listed>> {
    let mut talk = Talk::begin(stream, settings)?;
    let peer = talk.peer();
    if !talk.fixed {
        let what = "the server is too old to tell which exports it has (unfixed newstyle)";
        return Err(Error::net(&peer, what, libc::ENOTSUP));
    }
    talk.send(opt::LIST, &[])?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    loop {
        match talk.reply(opt::LIST)? {
            Answer::Ack => break,
            Answer::Refused(refused) => return Err(refused.error(&peer, "listing the exports")),
            Answer::Data(rep::SERVER, payload) => {
                let len = be32(&payload) as usize;
                let Some((name, text)) = payload.get(4..).and_then(|p| p.split_at_checked(len))
                else {
                    let what = "the name in a list of exports is longer than the reply";
                    return Err(Error::proto(&peer, what));
                };
                string(name, &peer, "the name of an export")?;
                string(text, &peer, "the description of an export")?;
                bytes += name.len() + text.len();
                if found.len() >= MAX_LISTED || bytes > MAX_LISTED_BYTES {
                    let what = format!(
                        "the list of exports has more than {MAX_LISTED} entries or \
                         {MAX_LISTED_BYTES} bytes"
                    );
                    return Err(Error::proto(&peer, what));
                }
                found.push(Listed { name: name.to_vec(), description: text.to_vec() });
            }
            Answer::Data(kind, _) => return Err(unexpected(&peer, opt::LIST, kind)),
        }
    }
    // A courtesy; whether it arrives changes nothing.
    let _ = talk.send(opt::ABORT, &[]);
    Ok(found)
}

/// Check what was agreed on, and fill in what the specification says where a server is silent.
fn complete(e: &mut Export, peer: &Name) -> Result<()> {
    let bad = |what: String| Err(Error::proto(peer, what));
    if e.size > i64::MAX as u64 {
        return bad(format!("the export has {} bytes, and at most {} can be", e.size, i64::MAX));
    }
    if !e.has(flag::HAS_FLAGS) {
        // The lowest bit vouches for the others.
        e.flags = 0;
    }
    if e.minimum == 0 && e.maximum == 0 {
        (e.minimum, e.preferred, e.maximum) = (1, 4096, MAX_TRANSFER);
    }
    let sizes = format!("{}, {} and {}", e.minimum, e.preferred, e.maximum);
    if !e.minimum.is_power_of_two() || e.minimum > MAX_MINIMUM || e.maximum < e.minimum {
        return bad(format!(
            "block sizes (minimum, preferred, maximum) are {sizes}; the minimum must be a power of \
             two up to {MAX_MINIMUM}, the maximum at least that"
        ));
    }
    e.maximum = e.maximum.min(MAX_TRANSFER);
    e.maximum -= e.maximum % e.minimum;
    e.preferred = e.preferred.clamp(e.minimum, e.maximum);
    if !e.size.is_multiple_of(e.minimum.into()) {
        let what = format!(
            "the export has {} bytes, which is no multiple of its smallest request of {} bytes: its \
             last bytes can not be reached",
            e.size, e.minimum
        );
        return Err(Error::unsupported(peer, what));
    }
    if e.mode == Mode::Simple {
        e.contexts.clear();
    }
    Ok(())
}

/// A refusal of an option, with what the server had to say.
struct Refused {
    kind: u32,
    text: Vec<u8>,
}

impl Refused {
    /// The error for a refusal that ends the negotiation.
    fn error(&self, peer: &Name, doing: &str) -> Error {
        let (why, errno) = match self.kind {
            rep::ERR_UNSUP => ("the server does not know how", libc::ENOTSUP),
            rep::ERR_POLICY => ("the server's policy forbids it", libc::EACCES),
            rep::ERR_INVALID => ("the server calls the request invalid", libc::EINVAL),
            rep::ERR_PLATFORM => ("the server's platform does not support it", libc::ENOTSUP),
            rep::ERR_TLS_REQD => (
                "the server requires TLS: use an nbds:// or nbds+unix:// URI, or the option tls",
                libc::EACCES,
            ),
            rep::ERR_UNKNOWN => ("the server has no export of that name", libc::ENOENT),
            rep::ERR_SHUTDOWN => ("the server is shutting down", libc::ESHUTDOWN),
            rep::ERR_BLOCK_SIZE_REQD => ("the server insists on block sizes", libc::EINVAL),
            rep::ERR_TOO_BIG => ("the server calls the request too big", libc::EINVAL),
            rep::ERR_EXT_HEADER_REQD => ("the server insists on extended headers", libc::ENOTSUP),
            _ => ("the server refuses", libc::EIO),
        };
        let mut what = format!("{doing}: {why}");
        if !self.text.is_empty() {
            what.push_str(&format!(" (it says {})", quoted(&self.text)));
        }
        Error::net(peer, what, errno)
    }

    /// Whether the server goes on without the option, rather than not at all.
    fn is_no(&self) -> bool {
        !matches!(self.kind, rep::ERR_TLS_REQD | rep::ERR_SHUTDOWN)
    }
}

/// One reply to an option.
enum Answer {
    Ack,
    Data(u32, Vec<u8>),
    Refused(Refused),
}

fn unexpected(peer: &Name, option: u32, kind: u32) -> Error {
    Error::proto(peer, format!("reply of kind {kind:#x} to option {option} has no meaning"))
}

fn string(bytes: &[u8], peer: &Name, what: &str) -> Result<()> {
    if bytes.len() > proto::MAX_STRING {
        let what = format!("{what} has {} bytes, of at most {}", bytes.len(), proto::MAX_STRING);
        return Err(Error::proto(peer, what));
    }
    Ok(())
}

/// A negotiation under way.
struct Talk<'a> {
    stream: &'a mut Stream,
    /// The server's form of negotiation allows options to be refused.
    fixed: bool,
    no_zeroes: bool,
}

impl<'a> Talk<'a> {
    /// Greet, and begin TLS if it is required.
    fn begin(stream: &'a mut Stream, settings: &Settings) -> Result<Self> {
        let mut words = [0; 16];
        stream.read(&mut words)?;
        let (first, second) = (be64(&words), be64(&words[8..]));
        if first != proto::GREETING {
            let what = format!(
                "the greeting begins with {}, not with 'NBDMAGIC': this is no NBD server",
                quoted(&words[..8])
            );
            return Err(Error::proto(stream.peer(), what));
        }
        if second == proto::OLDSTYLE_MAGIC {
            let what = "the oldstyle negotiation of NBD servers before 2.9.17";
            return Err(Error::unsupported(stream.peer(), what));
        }
        if second != proto::OPTION_MAGIC {
            let what = format!("the greeting's second word is {second:#x}");
            return Err(Error::proto(stream.peer(), what));
        }
        let mut flags = [0; 2];
        stream.read(&mut flags)?;
        let flags = be16(&flags);
        let fixed = flags & hello::FIXED_NEWSTYLE != 0;
        let no_zeroes = flags & hello::NO_ZEROES != 0;
        let answer = u32::from(flags & (hello::FIXED_NEWSTYLE | hello::NO_ZEROES));
        stream.write(&answer.to_be_bytes())?;
        let mut talk = Self { stream, fixed, no_zeroes };
        if let Some(tls) = &settings.tls {
            talk.start_tls(tls)?;
        }
        Ok(talk)
    }

    fn peer(&self) -> Name {
        self.stream.peer().clone()
    }

    fn start_tls(&mut self, tls: &crate::nbd::tls::ClientTls) -> Result<()> {
        let peer = self.peer();
        let doing = "TLS is required, and asking for it failed";
        if !self.fixed {
            let what = format!("{doing}: the server is too old for it (unfixed newstyle)");
            return Err(Error::net(&peer, what, libc::ENOTSUP));
        }
        self.send(opt::STARTTLS, &[])?;
        match self.reply(opt::STARTTLS)? {
            // Nothing was read ahead, and nothing but the two flags of the greeting was learnt so
            // far: what was sent in plain text can not speak for what comes now.
            Answer::Ack => self.stream.start_tls(tls.session(&peer)?),
            Answer::Refused(refused) => Err(refused.error(&peer, doing)),
            Answer::Data(kind, _) => Err(unexpected(&peer, opt::STARTTLS, kind)),
        }
    }

    fn send(&mut self, option: u32, payload: &[u8]) -> Result<()> {
        let mut out = Vec::with_capacity(16 + payload.len());
        out.extend(proto::OPTION_MAGIC.to_be_bytes());
        out.extend(option.to_be_bytes());
        // Our own payloads are a few strings of at most 4096 bytes.
        out.extend((payload.len() as u32).to_be_bytes());
        out.extend(payload);
        self.stream.write(&out)
    }

    fn reply(&mut self, option: u32) -> Result<Answer> {
        let mut head = [0; 20];
        self.stream.read(&mut head)?;
        let (magic, to, kind, len) =
            (be64(&head), be32(&head[8..]), be32(&head[12..]), be32(&head[16..]));
        let bad = |what: String| Err(Error::proto(self.stream.peer(), what));
        if magic != proto::OPTION_REPLY_MAGIC {
            return bad(format!("the reply to option {option} begins with {magic:#x}"));
        }
        if to != option {
            return bad(format!("a reply to option {to} came, option {option} was sent"));
        }
        if len > MAX_PAYLOAD {
            let most = MAX_PAYLOAD;
            return bad(format!("the reply to option {option} has {len} bytes, of at most {most}"));
        }
        if kind == rep::ACK && len != 0 {
            return bad(format!("the acknowledgement of option {option} has {len} bytes"));
        }
        let mut payload = vec![0; len as usize];
        self.stream.read(&mut payload)?;
        Ok(match kind {
            rep::ACK => Answer::Ack,
            kind if kind & rep::ERROR != 0 => Answer::Refused(Refused { kind, text: payload }),
            kind => Answer::Data(kind, payload),
        })
    }

    /// Send an option that has no payload and is answered with yes or no.
    fn ask_simple(&mut self, option: u32) -> Result<bool> {
        self.send(option, &[])?;
        match self.reply(option)? {
            Answer::Ack => Ok(true),
            Answer::Refused(refused) if refused.is_no() => Ok(false),
            Answer::Refused(refused) => Err(refused.error(&self.peer(), "opening the export")),
            Answer::Data(kind, _) => Err(unexpected(&self.peer(), option, kind)),
        }
    }

    fn set_contexts(
        &mut self,
        export: &[u8],
        settings: &Settings,
        agreed: &mut Export,
    ) -> Result<()> {
        let peer = self.peer();
        let mut asked: Vec<&[u8]> = vec![ALLOCATION, DEPTH];
        for more in &settings.contexts {
            if !asked.contains(&more.as_slice()) {
                asked.push(more);
            }
        }
        let mut payload = Vec::new();
        payload.extend((export.len() as u32).to_be_bytes());
        payload.extend(export);
        payload.extend((asked.len() as u32).to_be_bytes());
        for name in &asked {
            payload.extend((name.len() as u32).to_be_bytes());
            payload.extend(*name);
        }
        self.send(opt::SET_META_CONTEXT, &payload)?;
        loop {
            match self.reply(opt::SET_META_CONTEXT)? {
                Answer::Ack => return Ok(()),
                Answer::Refused(refused) if refused.is_no() => {
                    // Also when the export is unknown: GO tells that better.
                    agreed.contexts.clear();
                    return Ok(());
                }
                Answer::Refused(refused) => return Err(refused.error(&peer, "opening the export")),
                Answer::Data(rep::META_CONTEXT, payload) => {
                    let Some((id, name)) = payload.split_first_chunk::<4>() else {
                        return Err(Error::proto(&peer, "a meta context has no number"));
                    };
                    let context = Context { name: name.to_vec(), id: u32::from_be_bytes(*id) };
                    let twice = agreed
                        .contexts
                        .iter()
                        .any(|c| c.id == context.id || c.name == context.name);
                    if twice || !asked.contains(&name) {
                        let why = if twice { "twice" } else { "that was not asked for" };
                        let name = quoted(name);
                        let what = format!("a meta context {why}: {} {name}", context.id);
                        return Err(Error::proto(&peer, what));
                    }
                    agreed.contexts.push(context);
                }
                Answer::Data(kind, _) => {
                    return Err(unexpected(&peer, opt::SET_META_CONTEXT, kind));
                }
            }
        }
    }

    /// Choose the export and begin transmission; `false` if the server does not know how.
    fn go(&mut self, export: &[u8], agreed: &mut Export) -> Result<bool> {
        let peer = self.peer();
        let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
        let mut payload = Vec::with_capacity(12 + export.len());
        payload.extend((export.len() as u32).to_be_bytes());
        payload.extend(export);
        payload.extend((wanted.len() as u16).to_be_bytes());
        for kind in wanted {
            payload.extend(kind.to_be_bytes());
        }
        self.send(opt::GO, &payload)?;
        let mut told = false;
        for _ in 0..=MAX_INFOS {
            match self.reply(opt::GO)? {
                Answer::Ack if told => return Ok(true),
                Answer::Ack => {
                    return Err(Error::proto(&peer, "the export's size was not told"));
                }
                Answer::Refused(Refused { kind: rep::ERR_UNSUP, .. }) => return Ok(false),
                Answer::Refused(refused) => {
                    let doing = format!("opening the export {}", quoted(export));
                    return Err(refused.error(&peer, &doing));
                }
                Answer::Data(rep::INFO, payload) => {
                    told |= take_info(&payload, agreed, &peer)?;
                }
                Answer::Data(kind, _) => return Err(unexpected(&peer, opt::GO, kind)),
            }
        }
        Err(Error::proto(&peer, format!("more than {MAX_INFOS} pieces of information")))
    }

    /// Choose the export in the way that every newstyle server knows, and that has no answer for an
    /// export that is not there.
    fn export_name(&mut self, export: &[u8], agreed: &mut Export) -> Result<()> {
        log(Level::Debug, format_args!("{}: opening by EXPORT_NAME", self.stream.peer()));
        let mut answer = [0; 10];
        let result = match self.send(opt::EXPORT_NAME, export) {
            Ok(()) => self.stream.read(&mut answer),
            failed => failed,
        };
        result.map_err(|e| match e.kind() {
            ErrorKind::Errno(libc::ECONNRESET | libc::EPIPE) => {
                let what = format!(
                    "the server hung up when asked for the export {}: it may have none of that \
                     name, or require TLS",
                    quoted(export)
                );
                Error::net(self.stream.peer(), what, libc::ENOENT)
            }
            _ => e,
        })?;
        agreed.size = be64(&answer);
        agreed.flags = be16(&answer[8..]);
        if !self.no_zeroes {
            self.stream.skip(124)?;
        }
        Ok(())
    }
}

/// Take in one piece of information; whether it is the export's size and flags.
fn take_info(payload: &[u8], agreed: &mut Export, peer: &Name) -> Result<bool> {
    let Some((kind, rest)) = payload.split_first_chunk::<2>() else {
        return Err(Error::proto(peer, "a piece of information that does not say of what kind"));
    };
    let bad =
        |what: &str| Err(Error::proto(peer, format!("{what} is told in {} bytes", payload.len())));
    match u16::from_be_bytes(*kind) {
        info::EXPORT => {
            let [size @ .., f1, f2] = rest else { return bad("the export's size") };
            if size.len() != 8 {
                return bad("the export's size");
            }
            (agreed.size, agreed.flags) = (be64(size), u16::from_be_bytes([*f1, *f2]));
            return Ok(true);
        }
        info::NAME => {
            string(rest, peer, "the name of the export")?;
            agreed.name = Some(rest.to_vec());
        }
        info::DESCRIPTION => {
            string(rest, peer, "the description of the export")?;
            agreed.description = Some(rest.to_vec());
        }
        info::BLOCK_SIZE => {
            if rest.len() != 12 {
                return bad("the block size");
            }
            (agreed.minimum, agreed.preferred, agreed.maximum) =
                (be32(rest), be32(&rest[4..]), be32(&rest[8..]));
            if agreed.minimum == 0 {
                return Err(Error::proto(peer, "the minimum block size is 0"));
            }
        }
        // Kinds that were not asked for may come, and are to be passed over.
        _ => {}
    }
    Ok(false)
}
