//! The NBD client, fed through one end of a socket pair with what a server may say: all of it is sent
//! before the client begins, then the socket is half-closed, so that nothing is waited for.
//!
//! A session fails by a panic or by taking too long; what the client answers is checked where there is
//! one right answer: a read that succeeds has every byte from the server.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use qblk::{Extent, Image, OpenFlags, Options, ReqFlags};

/// Bytes of the export.
const SIZE: u64 = 1 << 20;
/// Bytes of one input; they fit a socket's buffer, so that sending never waits.
const MAX_INPUT: usize = 96 << 10;
/// Bytes of data in one reply, at most.
const MAX_DATA: usize = 8192;

/// A client of a server that says `bytes`, whatever it is asked.
fn session(bytes: &[u8]) {
    // Where there are no descriptors nothing is found.
    let Ok((mut server, client)) = UnixStream::pair() else { return };
    if server.write_all(&bytes[..bytes.len().min(MAX_INPUT)]).is_err() {
        return;
    }
    let _ = server.shutdown(Shutdown::Write);
    let options = Options::new()
        .with("format", "raw")
        .with("nbd.timeout", "2")
        .with("nbd.contexts", "fuzz:context");
    let Ok(image) = Image::open_fd(client.into(), &options, OpenFlags::RDWR) else { return };
    let mut buf = vec![0xee; 70_000];
    let mut extents = [Extent::default(); 64];
    for round in 0..3u64 {
        let _ = image.read_at(&mut buf[..4096], round * 4096);
        let _ = image.read_at(&mut buf, 1000);
        if let Ok(n) = image.extents(0, SIZE, &mut extents) {
            let mut end = 0;
            for e in &extents[..n] {
                assert_eq!(e.offset, end, "extents follow one another");
                assert!(e.length > 0);
                end += e.length;
            }
            assert!(end <= SIZE);
        }
        let _ = image.block_status(b"fuzz:context", 4096, 65536, 1000);
        let _ = image.write_at(&buf[..1000], 5000, ReqFlags::FUA);
        let _ = image.zero(0, 65536, ReqFlags::MAY_TRIM);
        let _ = image.trim(4096, 4096, ReqFlags::NONE);
        let _ = image.cache(0, 4096);
        let _ = image.flush();
    }
    let _ = image.close();
}

/// What a server says from its first byte on.
pub fn handshake(data: &[u8]) {
    session(data);
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[u8]) {
    out.extend_from_slice(&0x0003_e889_0455_65a9u64.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
}

/// A negotiation that succeeds: 0 simple, 1 structured, 2 extended replies.
pub fn welcome(mode: u8) -> Vec<u8> {
    const ACK: u32 = 1;
    const UNSUP: u32 = 0x8000_0001;
    let mut out = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    reply(&mut out, 11, if mode == 2 { ACK } else { UNSUP }, &[]);
    if mode != 2 {
        reply(&mut out, 8, if mode == 1 { ACK } else { UNSUP }, &[]);
    }
    if mode != 0 {
        for (id, name) in
            [(1u32, "base:allocation"), (2, "qemu:allocation-depth"), (3, "fuzz:context")]
        {
            reply(&mut out, 10, 4, &[&id.to_be_bytes()[..], name.as_bytes()].concat());
        }
        reply(&mut out, 10, ACK, &[]);
    }
    // All there is: flush, FUA, trim, zeroes, DF, cache, fast zero.
    let export = [&[0, 0][..], &SIZE.to_be_bytes(), &0x0cedu16.to_be_bytes()].concat();
    reply(&mut out, 7, 3, &export);
    reply(&mut out, 7, ACK, &[]);
    out
}

/// After a right negotiation: a byte that says which, then replies of eight bytes each (what it is, to
/// which request, offset, length, flags), or plain bytes.
pub fn transmission(data: &[u8]) {
    let Some((&how, rest)) = data.split_first() else { return };
    let mode = (how & 3) % 3;
    let mut out = welcome(mode);
    if how & 0x20 != 0 {
        out.extend_from_slice(rest);
        return session(&out);
    }
    for (n, op) in (1u64..).zip(rest.chunks_exact(8)) {
        let &[kind, to, o0, o1, l0, l1, flags, fill] = op else { continue };
        // Requests of one thread have the same slot, one generation after the other.
        let generation = if to & 0x80 == 0 { n } else { u64::from(to & 0x3f) };
        let cookie = generation << 32 | u64::from(to >> 6 & 1);
        let offset = u64::from(u16::from_le_bytes([o0, o1])) * 4;
        let length = u32::from(u16::from_le_bytes([l0, l1])) * 4;
        if kind & 0x80 != 0 || mode == 0 {
            out.extend_from_slice(&0x6744_6698u32.to_be_bytes());
            out.extend_from_slice(&u32::from(flags & 0x1f).to_be_bytes());
            out.extend_from_slice(&cookie.to_be_bytes());
            let data = (length as usize).min(MAX_DATA);
            out.extend(std::iter::repeat_n(fill, data));
            continue;
        }
        let number = |n: u32| n.to_be_bytes();
        let mut payload: Vec<u8> = match kind & 7 {
            0 => Vec::new(),
            1 => {
                let data = vec![fill; (length as usize).min(MAX_DATA)];
                [&offset.to_be_bytes()[..], &data].concat()
            }
            2 => [&offset.to_be_bytes()[..], &number(length)].concat(),
            5 => [number(u32::from(fill & 3)), number(length), number(flags.into())].concat(),
            6 => {
                let run = [u64::from(length), u64::from(flags)].map(u64::to_be_bytes).concat();
                [&number(u32::from(fill & 3))[..], &number(1), &run].concat()
            }
            _ => [&number(u32::from(fill & 0x1f))[..], &[0, 4], b"text"].concat(),
        };
        let kind = match kind & 7 {
            3 => 0x8001u16,
            4 => 0x8002,
            7 => 0x8100,
            kind => kind.into(),
        };
        if kind == 0x8002 {
            payload.extend_from_slice(&offset.to_be_bytes());
        }
        let extended = mode == 2;
        out.extend_from_slice(&number(if extended { 0x6e8a_278c } else { 0x668e_33ef }));
        out.extend_from_slice(&u16::from(flags & 1).to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&cookie.to_be_bytes());
        if extended {
            // What the request was for, as often as not.
            let of = [0, 1000, 0, 4096, 5000, 0, 4096, 0][(n as usize - 1) % 8];
            out.extend_from_slice(&u64::to_be_bytes(of));
            out.extend_from_slice(&(payload.len() as u64).to_be_bytes());
        } else {
            out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        }
        out.extend_from_slice(&payload);
        if out.len() > MAX_INPUT {
            break;
        }
    }
    session(&out);
}
