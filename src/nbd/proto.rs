//! The NBD wire: numbers and headers, encoded and decoded, no I/O.
//!
//! Specification: doc/proto.md of the NBD project. All numbers are big-endian. Nothing here trusts a
//! length: who receives one checks it before it is used.

/// First word of the server's greeting, "NBDMAGIC".
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// Second word of a newstyle greeting and first of each option, "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second word of an oldstyle greeting.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First word of each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Longest name, description, context or error text in bytes ("The NBD protocol", string lengths).
pub const MAX_STRING: usize = 4096;
/// Largest payload that a peer may rely on where no other was agreed on, bytes.
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;

/// Flags of the greeting and of the client's answer to it.
pub mod hello {
    /// The fixed form of newstyle negotiation.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zeroes after the answer to EXPORT_NAME.
    pub const NO_ZEROES: u16 = 2;
}

/// Options (NBD_OPT_*).
pub mod opt {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options (NBD_REP_*); those with the highest bit set are errors.
pub mod rep {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR + 1;
    pub const ERR_POLICY: u32 = ERROR + 2;
    pub const ERR_INVALID: u32 = ERROR + 3;
    pub const ERR_PLATFORM: u32 = ERROR + 4;
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;
}

/// Kinds of information about an export (NBD_INFO_*).
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export (NBD_FLAG_*).
pub mod flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_RESIZE: u16 = 1 << 9;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STAT_PAYLOAD: u16 = 1 << 12;
}

/// Commands (NBD_CMD_*).
pub mod cmd {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands (NBD_CMD_FLAG_*).
pub mod cmd_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Kinds of chunks of a structured reply (NBD_REPLY_TYPE_*).
pub mod chunk {
    #![allow(missing_docs)]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT + 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1;
}

/// Bits of `base:allocation`.
pub mod alloc {
    /// Not allocated.
    pub const HOLE: u32 = 1;
    /// Reads as zeroes.
    pub const ZERO: u32 = 2;
}

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// How replies look and how long headers are, as was negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Simple replies only.
    #[default]
    Simple,
    /// Structured replies: always to reads, otherwise where there is something to say.
    Structured,
    /// Extended headers, on all requests and replies.
    Extended,
}

impl Mode {
    /// Bytes of a request's header.
    #[inline]
    pub const fn request_len(self) -> usize {
        if matches!(self, Self::Extended) { 32 } else { 28 }
    }

    /// Bytes of a chunk's header.
    #[inline]
    pub const fn chunk_len(self) -> usize {
        if matches!(self, Self::Extended) { 32 } else { 20 }
    }
}

/// A big-endian number at the beginning of `bytes`; what is missing counts as zeroes.
#[inline]
pub fn be16(bytes: &[u8]) -> u16 {
    bytes.first_chunk().map_or(0, |b| u16::from_be_bytes(*b))
}
/// As [`be16`].
#[inline]
pub fn be32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |b| u32::from_be_bytes(*b))
}
/// As [`be16`].
#[inline]
pub fn be64(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |b| u64::from_be_bytes(*b))
}

/// The number of the magic word that was found instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMagic(pub u32);

/// The header of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Bits of [`cmd_flag`].
    pub flags: u16,
    /// One of [`cmd`].
    pub kind: u16,
    /// The client's own number for it.
    pub cookie: u64,
    /// Bytes.
    pub offset: u64,
    /// Bytes: of the range, or of the payload where there is one.
    pub length: u64,
}

impl Request {
    /// The header in wire form, and how many of its bytes count. Without extended headers the length
    /// must fit 32 bits.
    #[inline]
    pub fn encode(&self, mode: Mode) -> ([u8; 32], usize) {
        let mut b = [0; 32];
        b[4..6].copy_from_slice(&self.flags.to_be_bytes());
        b[6..8].copy_from_slice(&self.kind.to_be_bytes());
        b[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        b[16..24].copy_from_slice(&self.offset.to_be_bytes());
        if mode == Mode::Extended {
            b[..4].copy_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
            b[24..32].copy_from_slice(&self.length.to_be_bytes());
        } else {
            b[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            b[24..28].copy_from_slice(&(self.length as u32).to_be_bytes());
        }
        (b, mode.request_len())
    }

    /// Read a header of [`Mode::request_len`] bytes.
    #[inline]
    pub fn decode(b: &[u8], mode: Mode) -> Result<Self, BadMagic> {
        let extended = mode == Mode::Extended;
        let expected = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        if b.len() < 28 || be32(b) != expected {
            return Err(BadMagic(be32(b)));
        }
        let length = match (extended, b.get(24..32)) {
            (false, _) => be32(&b[24..]).into(),
            (true, Some(long)) => be64(long),
            (true, None) => return Err(BadMagic(0)),
        };
        Ok(Self {
            flags: be16(&b[4..]),
            kind: be16(&b[6..]),
            cookie: be64(&b[8..]),
            offset: be64(&b[16..]),
            length,
        })
    }
}

/// The header of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A simple reply; the data of a read that succeeded follows.
    Simple {
        /// An NBD error number; 0 = none.
        error: u32,
        /// That of the request.
        cookie: u64,
    },
    /// A chunk; `length` bytes of payload follow.
    Chunk {
        /// [`chunk::DONE`].
        flags: u16,
        /// One of [`chunk`].
        kind: u16,
        /// That of the request.
        cookie: u64,
        /// That of the request (extended headers only, else 0).
        offset: u64,
        /// Bytes of payload.
        length: u64,
    },
}

/// Bytes of a simple reply's header.
pub const SIMPLE_LEN: usize = 16;

impl Reply {
    /// Read a reply's header from the beginning of `b`, and tell its length in bytes; `None` if there
    /// are too few bytes to tell.
    #[inline]
    pub fn decode(b: &[u8], mode: Mode) -> Result<Option<(Self, usize)>, BadMagic> {
        if b.len() < 4 {
            return Ok(None);
        }
        match (be32(b), mode) {
            (SIMPLE_REPLY_MAGIC, Mode::Simple | Mode::Structured) => {
                if b.len() < SIMPLE_LEN {
                    return Ok(None);
                }
                let reply = Self::Simple { error: be32(&b[4..]), cookie: be64(&b[8..]) };
                Ok(Some((reply, SIMPLE_LEN)))
            }
            (STRUCTURED_REPLY_MAGIC, Mode::Structured) | (EXTENDED_REPLY_MAGIC, Mode::Extended) => {
                let len = mode.chunk_len();
                if b.len() < len {
                    return Ok(None);
                }
                let extended = mode == Mode::Extended;
                let reply = Self::Chunk {
                    flags: be16(&b[4..]),
                    kind: be16(&b[6..]),
                    cookie: be64(&b[8..]),
                    offset: if extended { be64(&b[16..]) } else { 0 },
                    length: if extended { be64(&b[24..]) } else { be32(&b[16..]).into() },
                };
                Ok(Some((reply, len)))
            }
            (other, _) => Err(BadMagic(other)),
        }
    }
}

/// A simple reply's header in wire form.
#[inline]
pub fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_LEN] {
    let mut b = [0; SIMPLE_LEN];
    b[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    b[4..8].copy_from_slice(&error.to_be_bytes());
    b[8..].copy_from_slice(&cookie.to_be_bytes());
    b
}

/// The header of a chunk in reply to `to`, in wire form, and how many of its bytes count.
#[inline]
pub fn chunk_header(
    mode: Mode,
    flags: u16,
    kind: u16,
    to: &Request,
    length: u64,
) -> ([u8; 32], usize) {
    let mut b = [0; 32];
    b[4..6].copy_from_slice(&flags.to_be_bytes());
    b[6..8].copy_from_slice(&kind.to_be_bytes());
    b[8..16].copy_from_slice(&to.cookie.to_be_bytes());
    if mode == Mode::Extended {
        b[..4].copy_from_slice(&EXTENDED_REPLY_MAGIC.to_be_bytes());
        b[16..24].copy_from_slice(&to.offset.to_be_bytes());
        b[24..32].copy_from_slice(&length.to_be_bytes());
    } else {
        b[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        b[16..20].copy_from_slice(&(length as u32).to_be_bytes());
    }
    (b, mode.chunk_len())
}

/// NBD's number for an error of the system ("Error values"). Those are Linux's numbers, of which only
/// some may be sent.
pub fn error_to_wire(errno: i32) -> u32 {
    match errno {
        libc::EPERM | libc::EROFS | libc::EACCES => 1,
        libc::ENOMEM => 12,
        libc::EINVAL => 22,
        libc::ENOSPC | libc::EFBIG | libc::EDQUOT => 28,
        libc::EOVERFLOW => 75,
        libc::ENOTSUP => 95,
        libc::ESHUTDOWN => 108,
        _ => 5,
    }
}

/// The system's number for an error that a peer sent; one that it may not send is EINVAL, as the
/// specification asks.
pub fn error_from_wire(error: u32) -> i32 {
    match error {
        1 => libc::EPERM,
        5 => libc::EIO,
        12 => libc::ENOMEM,
        22 => libc::EINVAL,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::ENOTSUP,
        108 => libc::ESHUTDOWN,
        _ => libc::EINVAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire() {
        let r = Request { flags: 9, kind: 7, cookie: 1 << 40, offset: 1 << 50, length: 1 << 20 };
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            let (b, n) = r.encode(mode);
            assert_eq!(Request::decode(&b[..n], mode), Ok(r));
            assert_eq!(Request::decode(&[0; 32], mode), Err(BadMagic(0)));
        }
        let long = Request { length: 1 << 40, ..r };
        let (b, n) = long.encode(Mode::Extended);
        assert_eq!(Request::decode(&b[..n], Mode::Extended), Ok(long));
        for mode in [Mode::Structured, Mode::Extended] {
            let (b, n) = chunk_header(mode, 1, 5, &r, 12);
            let Ok(Some((Reply::Chunk { flags: 1, kind: 5, cookie, length: 12, .. }, len))) =
                Reply::decode(&b, mode)
            else {
                panic!("not read back");
            };
            assert_eq!((cookie, len), (r.cookie, n));
            assert_eq!(Reply::decode(&b[..n - 1], mode), Ok(None));
        }
        assert!(Reply::decode(&simple_reply(0, 1), Mode::Extended).is_err());
    }
}
