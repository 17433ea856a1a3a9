//! Negotiation: what a client and the server agree on before there are requests.
//!
//! Specification: doc/proto.md, "Newstyle negotiation". A client gets a deadline for all of it, a limit
//! for each option's payload and for the number of options. What was learnt in plain text does not
//! outlive STARTTLS, and where TLS is required nothing but it, a refusal and a goodbye are said
//! without.

use std::sync::Arc;

use super::Inner;
use super::conn::Context;
use super::export::Export;
use super::settings::Encryption;
use crate::block::{BITMAP_CONTEXT, Error, Result, quoted};
use crate::log::{Level, log};
use crate::nbd::net::Stream;
use crate::nbd::proto::*;

/// A longer payload than is allowed is read and forgotten up to this many bytes.
const MAX_SKIP: u32 = 1 << 20;
/// Meta contexts that one client may choose; each makes replies about all of them shorter.
const MAX_CONTEXTS: usize = 64;
/// Meta contexts that are listed.
const MAX_LISTED: usize = 1024;
/// Options of one client.
const MAX_OPTIONS: usize = 256;

/// What was agreed on.
pub struct Agreed {
    pub export: Arc<Export>,
    pub mode: Mode,
    pub contexts: Vec<Context>,
}

/// One negotiation.
struct Talk<'a> {
    server: &'a Inner,
    stream: &'a mut Stream,
    mode: Mode,
    no_zeroes: bool,
    /// What SET_META_CONTEXT chose, and for which export.
    chosen: Option<(Vec<u8>, Vec<Context>)>,
}

/// What an option led to.
enum Next {
    /// Another option.
    Option,
    /// Transmission.
    Go(Arc<Export>),
    /// The client said goodbye.
    End,
}

/// Negotiate; `None` if the client said goodbye.
pub fn negotiate(server: &Inner, stream: &mut Stream) -> Result<Option<Agreed>> {
    let mut hello = [0; 18];
    hello[..8].copy_from_slice(&GREETING.to_be_bytes());
    hello[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    let ours = hello::FIXED_NEWSTYLE | hello::NO_ZEROES;
    hello[16..].copy_from_slice(&ours.to_be_bytes());
    stream.write(&hello)?;
    let mut flags = [0; 4];
    stream.read(&mut flags)?;
    let flags = be32(&flags);
    if flags & !u32::from(ours) != 0 {
        return Err(Error::proto(stream.peer(), format!("unknown client flags {flags:#x}")));
    }
    let fixed = flags & u32::from(hello::FIXED_NEWSTYLE) != 0;
    let no_zeroes = flags & u32::from(hello::NO_ZEROES) != 0;
    let mut talk = Talk { server, stream, mode: Mode::Simple, no_zeroes, chosen: None };
    for _ in 0..MAX_OPTIONS {
        match talk.option(fixed)? {
            Next::Option => {}
            Next::End => return Ok(None),
            Next::Go(export) => {
                let contexts = match talk.chosen {
                    Some((name, contexts)) if talk.server.is_same(&name, &export) => contexts,
                    _ => Vec::new(),
                };
                return Ok(Some(Agreed { export, mode: talk.mode, contexts }));
            }
        }
    }
    Err(Error::proto(talk.stream.peer(), format!("more than {MAX_OPTIONS} options")))
}

impl Talk<'_> {
    fn option(&mut self, fixed: bool) -> Result<Next> {
        let mut head = [0; 16];
        self.stream.read(&mut head)?;
        if be64(&head) != OPTION_MAGIC {
            let text = format!("an option begins with {:#018x}", be64(&head));
            return Err(Error::proto(self.stream.peer(), text));
        }
        let (option, length) = (be32(&head[8..]), be32(&head[12..]));
        if !fixed && option != opt::EXPORT_NAME {
            let text = format!("option {option} without fixed newstyle");
            return Err(Error::proto(self.stream.peer(), text));
        }
        let most = self.server.settings().max_option;
        if length > most {
            if length > MAX_SKIP || option == opt::EXPORT_NAME {
                let text = format!("option {option} with {length} bytes, {most} at most");
                return Err(Error::proto(self.stream.peer(), text));
            }
            self.stream.skip(length.into())?;
            let text = format!("{length} bytes, {most} at most");
            return self.refuse(option, rep::ERR_TOO_BIG, &text);
        }
        let must_tls = self.must_tls();
        if must_tls && option != opt::STARTTLS {
            // What it is about is not even looked at.
            self.stream.skip(length.into())?;
            return match option {
                opt::ABORT => self.reply(option, rep::ACK, &[]).map(|()| Next::End),
                opt::EXPORT_NAME => {
                    Err(Error::proto(self.stream.peer(), "EXPORT_NAME without TLS"))
                }
                _ => self.refuse(option, rep::ERR_TLS_REQD, "this server is for TLS only"),
            };
        }
        let mut payload = vec![0; length as usize];
        self.stream.read(&mut payload)?;
        match option {
            opt::EXPORT_NAME => self.export_name(&payload),
            opt::ABORT => {
                // The client may be gone already.
                let _ = self.reply(option, rep::ACK, &[]);
                Ok(Next::End)
            }
            opt::LIST => self.list(&payload),
            opt::STARTTLS => self.starttls(&payload),
            opt::INFO | opt::GO => self.info(option, &payload),
            opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS if !payload.is_empty() => {
                self.refuse(option, rep::ERR_INVALID, "this option has no payload")
            }
            opt::STRUCTURED_REPLY if self.mode == Mode::Extended => {
                self.refuse(option, rep::ERR_EXT_HEADER_REQD, "extended headers are in use")
            }
            opt::STRUCTURED_REPLY => {
                self.mode = Mode::Structured;
                self.ack(option)
            }
            opt::EXTENDED_HEADERS if self.mode == Mode::Extended => {
                self.refuse(option, rep::ERR_INVALID, "extended headers are in use already")
            }
            opt::EXTENDED_HEADERS => {
                self.mode = Mode::Extended;
                self.ack(option)
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.contexts(option, &payload),
            _ => self.refuse(option, rep::ERR_UNSUP, "unknown option"),
        }
    }

    fn must_tls(&self) -> bool {
        self.server.settings().encryption == Encryption::Required && !self.stream.is_tls()
    }

    fn reply(&mut self, option: u32, kind: u32, payload: &[u8]) -> Result<()> {
        let mut out = Vec::with_capacity(20 + payload.len());
        out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        out.extend_from_slice(payload);
        self.stream.write(&out)
    }

    fn ack(&mut self, option: u32) -> Result<Next> {
        self.reply(option, rep::ACK, &[]).map(|()| Next::Option)
    }

    /// Answer with an error, and a text for people.
    fn refuse(&mut self, option: u32, error: u32, text: &str) -> Result<Next> {
        log(
            Level::Debug,
            format_args!("NBD client {}: option {option} refused: {text}", self.stream.peer()),
        );
        self.reply(option, error, text.as_bytes()).map(|()| Next::Option)
    }

    fn export_name(&mut self, name: &[u8]) -> Result<Next> {
        // There is no way to refuse here but to hang up.
        let Some(export) = self.server.find_export(name) else {
            return Err(Error::proto(
                self.stream.peer(),
                format!("EXPORT_NAME of {}, which there is not", quoted(name)),
            ));
        };
        let (info, flags) = export.facts()?;
        let mut out = [0; 134];
        out[..8].copy_from_slice(&info.size.to_be_bytes());
        out[8..10].copy_from_slice(&self.flags(flags).to_be_bytes());
        let n = if self.no_zeroes { 10 } else { 134 };
        self.stream.write(&out[..n])?;
        Ok(Next::Go(export))
    }

    /// An export's flags, with those that depend on what was negotiated.
    fn flags(&self, flags: u16) -> u16 {
        let mut flags = flags;
        if self.mode > Mode::Simple {
            flags |= flag::SEND_DF;
        }
        if self.mode == Mode::Extended {
            flags |= flag::BLOCK_STAT_PAYLOAD;
        }
        flags
    }

    fn list(&mut self, payload: &[u8]) -> Result<Next> {
        if !payload.is_empty() {
            return self.refuse(opt::LIST, rep::ERR_INVALID, "this option has no payload");
        }
        for (name, description) in self.server.list() {
            let mut out = Vec::with_capacity(4 + name.len() + description.len());
            out.extend_from_slice(&(name.len() as u32).to_be_bytes());
            out.extend_from_slice(&name);
            out.extend_from_slice(&description);
            self.reply(opt::LIST, rep::SERVER, &out)?;
        }
        self.ack(opt::LIST)
    }

    fn starttls(&mut self, payload: &[u8]) -> Result<Next> {
        let option = opt::STARTTLS;
        if !payload.is_empty() {
            return self.refuse(option, rep::ERR_INVALID, "this option has no payload");
        }
        if self.stream.is_tls() {
            return self.refuse(option, rep::ERR_INVALID, "TLS is in use already");
        }
        let Some(tls) = self.server.tls() else {
            return self.refuse(option, rep::ERR_POLICY, "this server has no TLS");
        };
        let session = tls.session(self.stream.peer())?;
        self.reply(option, rep::ACK, &[])?;
        self.stream.start_tls(session)?;
        // Whatever was said before may have come from anybody.
        self.mode = Mode::Simple;
        self.chosen = None;
        Ok(Next::Option)
    }

    fn info(&mut self, option: u32, payload: &[u8]) -> Result<Next> {
        let Some((name, wanted)) = info_request(payload) else {
            return self.refuse(option, rep::ERR_INVALID, "the payload's lengths do not add up");
        };
        let Some(export) = self.server.find_export(name) else {
            let text = format!("there is no export {}", quoted(name));
            return self.refuse(option, rep::ERR_UNKNOWN, &text);
        };
        let (facts, flags) = match export.facts() {
            Ok(facts) => facts,
            Err(e) => {
                log(Level::Warn, format_args!("NBD export {}: {e}", quoted(name)));
                return self.refuse(option, rep::ERR_PLATFORM, "the export does not work");
            }
        };
        let mut out = info::EXPORT.to_be_bytes().to_vec();
        out.extend_from_slice(&facts.size.to_be_bytes());
        out.extend_from_slice(&self.flags(flags).to_be_bytes());
        self.reply(option, rep::INFO, &out)?;
        if wanted.contains(&info::NAME) {
            // One that stands for all names is called what the client calls it.
            let known = if export.name == b"*" { name } else { &export.name };
            let out = [&info::NAME.to_be_bytes()[..], known].concat();
            self.reply(option, rep::INFO, &out)?;
        }
        if wanted.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            let out = [&info::DESCRIPTION.to_be_bytes()[..], &export.description].concat();
            self.reply(option, rep::INFO, &out)?;
        }
        let max = self.server.settings().max_request;
        let best = facts.optimal_io_size.max(4096).next_power_of_two().min(max);
        let mut out = info::BLOCK_SIZE.to_be_bytes().to_vec();
        // Any offset and any length will do: what a device asks for is seen to below.
        for size in [1, best, max] {
            out.extend_from_slice(&size.to_be_bytes());
        }
        self.reply(option, rep::INFO, &out)?;
        self.reply(option, rep::ACK, &[])?;
        Ok(if option == opt::GO { Next::Go(export) } else { Next::Option })
    }

    fn contexts(&mut self, option: u32, payload: &[u8]) -> Result<Next> {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            self.chosen = None;
        }
        if set && self.mode == Mode::Simple {
            return self.refuse(option, rep::ERR_INVALID, "structured replies come first");
        }
        let Some((name, queries)) = context_request(payload) else {
            return self.refuse(option, rep::ERR_INVALID, "the payload's lengths do not add up");
        };
        let Some(export) = self.server.find_export(name) else {
            let text = format!("there is no export {}", quoted(name));
            return self.refuse(option, rep::ERR_UNKNOWN, &text);
        };
        let mut all = vec![Context::Allocation, Context::Depth];
        // Names of bitmaps are looked up only for who wants to know them.
        if (!set && queries.is_empty()) || queries.iter().any(|q| q.starts_with(b"qemu:")) {
            all.extend(export.bitmaps());
        }
        let most = if set { MAX_CONTEXTS } else { MAX_LISTED };
        let mut found = Vec::new();
        for c in all {
            let asked = |q: &&[u8]| match *q {
                // The name of a namespace alone asks for what is in it, when listing.
                b"base:" | b"qemu:" | BITMAP_CONTEXT => !set && c.name().starts_with(q),
                q => q == c.name(),
            };
            let wanted = queries.iter().any(asked) || (!set && queries.is_empty());
            if wanted && found.len() < most {
                found.push(c);
            }
        }
        for c in &found {
            let id = if set { c.id() } else { 0 };
            let out = [&id.to_be_bytes()[..], c.name()].concat();
            self.reply(option, rep::META_CONTEXT, &out)?;
        }
        if set {
            self.chosen = Some((name.to_vec(), found));
        }
        self.ack(option)
    }
}

/// A string with its length before it, and what follows.
fn string(b: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = b.split_at_checked(4)?;
    let len = be32(len) as usize;
    if len > MAX_STRING {
        return None;
    }
    rest.split_at_checked(len)
}

/// The payload of INFO and GO: a name, and kinds of information.
fn info_request(b: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (name, rest) = string(b)?;
    let (count, rest) = rest.split_at_checked(2)?;
    (rest.len() == 2 * usize::from(be16(count)))
        .then(|| (name, rest.chunks_exact(2).map(be16).collect()))
}

/// The payload of the options for meta contexts: a name, and queries.
fn context_request(b: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (name, rest) = string(b)?;
    let (count, mut rest) = rest.split_at_checked(4)?;
    let mut queries = Vec::new();
    for _ in 0..be32(count) {
        let query;
        (query, rest) = string(rest)?;
        queries.push(query);
    }
    rest.is_empty().then_some((name, queries))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_that_do_not_add_up_are_refused() {
        let good = b"\0\0\0\x03abc\0\x02\0\x01\0\x03";
        assert_eq!(info_request(good), Some((&b"abc"[..], vec![1, 3])));
        for cut in 0..good.len() {
            assert_eq!(info_request(&good[..cut]), None, "{cut}");
        }
        assert_eq!(info_request(&[0xff; 64]), None);
        let good = b"\0\0\0\x01a\0\0\0\x02\0\0\0\x01x\0\0\0\0";
        assert_eq!(context_request(good), Some((&b"a"[..], vec![&b"x"[..], b""])));
        for cut in 0..good.len() {
            assert_eq!(context_request(&good[..cut]), None, "{cut}");
        }
        assert_eq!(context_request(b"\0\0\0\0\xff\xff\xff\xff"), None);
    }
}
