//! Replies in wire form.

use crate::block::{Error, ErrorKind};
use crate::nbd::proto::{Mode, Request, chunk, chunk_header, cmd, error_to_wire, simple_reply};

/// Longest header of a read's reply: a chunk's, its offset, and a hole's length.
pub const MAX_HEADER: usize = 32 + 8 + 4;

/// "Done", to a request that asks for nothing else.
pub fn ok(out: &mut Vec<u8>, mode: Mode, to: &Request) {
    let (head, n) = ok_bytes(mode, to);
    out.extend_from_slice(&head[..n]);
}

/// [`ok`] as bytes, and how many count.
pub fn ok_bytes(mode: Mode, to: &Request) -> ([u8; 32], usize) {
    if mode == Mode::Extended {
        return chunk_header(mode, chunk::DONE, chunk::NONE, to, 0);
    }
    let mut b = [0; 32];
    b[..16].copy_from_slice(&simple_reply(0, to.cookie));
    (b, 16)
}

/// The end of a read's reply of which all data are out, and how many bytes count. Not for simple replies.
pub fn end(mode: Mode, to: &Request) -> ([u8; 32], usize) {
    chunk_header(mode, chunk::DONE, chunk::NONE, to, 0)
}

/// An error, with a text where the protocol has room for one.
pub fn error(out: &mut Vec<u8>, mode: Mode, to: &Request, e: &Error) {
    let errno = errno(to.kind, e);
    error_text(out, mode, to, errno, &text(to, errno));
}

/// An error with this text.
pub fn error_text(out: &mut Vec<u8>, mode: Mode, to: &Request, errno: i32, text: &str) {
    let number = error_to_wire(errno);
    if mode == Mode::Simple {
        return out.extend_from_slice(&simple_reply(number, to.cookie));
    }
    let text = &text.as_bytes()[..text.len().min(1024)];
    let (head, n) = chunk_header(mode, chunk::DONE, chunk::ERROR, to, 4 + 2 + text.len() as u64);
    out.extend_from_slice(&head[..n]);
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text);
}

/// The error number that a failure is to a client.
fn errno(kind: u16, e: &Error) -> i32 {
    match e {
        Error::Range { .. } if matches!(kind, cmd::WRITE | cmd::WRITE_ZEROES) => libc::ENOSPC,
        e => match e.kind() {
            ErrorKind::Errno(e) => e,
            ErrorKind::Policy | ErrorKind::NeedKey | ErrorKind::BadKey => libc::EPERM,
            _ => libc::EIO,
        },
    }
}

/// What a client is told: what failed, not what the files of this host are called.
fn text(to: &Request, errno: i32) -> String {
    let what = match to.kind {
        cmd::READ => "reading",
        cmd::WRITE => "writing",
        cmd::FLUSH => return format!("flushing failed: {}", system_text(errno)),
        cmd::TRIM => "trimming",
        cmd::CACHE => "caching",
        cmd::WRITE_ZEROES => "zeroing",
        _ => "describing",
    };
    format!("{what} {} bytes at offset {} failed: {}", to.length, to.offset, system_text(errno))
}

fn system_text(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// What goes before `length` bytes at `offset` of a read's data, and how many bytes of it count.
#[inline]
pub fn read_header(
    mode: Mode,
    flags: u16,
    to: &Request,
    offset: u64,
    length: u64,
) -> ([u8; MAX_HEADER], usize) {
    let mut b = [0; MAX_HEADER];
    if mode == Mode::Simple {
        b[..16].copy_from_slice(&simple_reply(0, to.cookie));
        return (b, 16);
    }
    let (head, n) = chunk_header(mode, flags, chunk::OFFSET_DATA, to, 8 + length);
    b[..n].copy_from_slice(&head[..n]);
    b[n..n + 8].copy_from_slice(&offset.to_be_bytes());
    (b, n + 8)
}

/// A hole, and how many bytes count.
pub fn hole(
    mode: Mode,
    flags: u16,
    to: &Request,
    offset: u64,
    length: u32,
) -> ([u8; MAX_HEADER], usize) {
    let mut b = [0; MAX_HEADER];
    let (head, n) = chunk_header(mode, flags, chunk::OFFSET_HOLE, to, 12);
    b[..n].copy_from_slice(&head[..n]);
    b[n..n + 8].copy_from_slice(&offset.to_be_bytes());
    b[n + 8..n + 12].copy_from_slice(&length.to_be_bytes());
    (b, n + 12)
}

/// The reply to a read whose data are nothing but zeroes, if that may be told so.
#[inline]
pub fn hole_instead(mode: Mode, to: &Request, data: &[u8]) -> Option<([u8; MAX_HEADER], usize)> {
    if mode == Mode::Simple || data.first() != Some(&0) || !is_zero(data) {
        return None;
    }
    let length = u32::try_from(data.len()).ok()?;
    Some(hole(mode, chunk::DONE, to, to.offset, length))
}

/// Whether all bytes are zero.
fn is_zero(data: &[u8]) -> bool {
    // By words of 16 bytes, 128 at a time, which the compiler makes vector instructions of.
    // SAFETY: any bytes are a valid u128.
    let (head, words, tail) = unsafe { data.align_to::<u128>() };
    head.iter().all(|b| *b == 0)
        && tail.iter().all(|b| *b == 0)
        && words.chunks(8).all(|c| c.iter().fold(0, |a, w| a | w) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_byte_anywhere_is_no_hole() {
        let mut data = vec![0; 1000];
        assert!(is_zero(&data[3..]) && is_zero(&[]));
        for at in [3, 4, 500, 999] {
            data[at] = 1;
            assert!(!is_zero(&data[3..]), "{at}");
            data[at] = 0;
        }
    }
}
