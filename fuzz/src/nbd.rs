//! The NBD server, fed through one end of a socket pair: what is fuzzed is what a client meets, threads
//! and all. The input is sent whole, then the socket is half-closed, so that nothing is waited for.
//!
//! A session fails by a panic (a thread's panic ends the process, see [`strict`]), by a server that can
//! not be stopped, or by taking too long.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::time::Duration;

use qblk::nbd::server::{Export, Server};
use qblk::{Image, OpenFlags, Options};

/// Bytes of the device.
const SIZE: u64 = 256 << 10;
/// Bytes of one input; they fit a socket's buffer, so that sending never waits.
const MAX_INPUT: usize = 64 << 10;
/// Payload of one request, at most.
const MAX_PAYLOAD: u64 = 4096;

/// The server catches panics, to keep its host alive; here they are what is looked for.
fn strict() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            told(info);
            std::process::abort();
        }));
    });
}

/// A server of a small device in memory that speaks to a client which says `bytes`.
fn session(bytes: &[u8], read_only: bool) {
    strict();
    let made = || -> Option<(Server, UnixStream)> {
        let server = Server::new().ok()?;
        server.set("threads", b"2").ok()?;
        server.set("max-request", b"64k").ok()?;
        let image =
            Image::open(format!("mem:{SIZE}").as_ref(), &Options::new(), OpenFlags::RDWR).ok()?;
        let _ = image.write_at(&[1; 5000], 60_000, qblk::ReqFlags::NONE);
        let broken = Default::default();
        let export =
            Export::new(b"x".to_vec(), b"of a fuzzer".to_vec(), image, broken, read_only).ok()?;
        server.add(export).ok()?;
        let (ours, theirs) = UnixStream::pair().ok()?;
        server.serve_fd(theirs.into()).ok()?;
        Some((server, ours))
    };
    // Where there are no descriptors or threads nothing is found.
    let Some((server, mut ours)) = made() else { return };
    let _ = ours.set_write_timeout(Some(Duration::from_secs(5)));
    // The server may have hung up before it heard all.
    let _ = ours.write_all(&bytes[..bytes.len().min(MAX_INPUT)]);
    let _ = ours.shutdown(Shutdown::Write);
    let mut some = [0; 16384];
    while ours.read(&mut some).is_ok_and(|n| n > 0) {}
    drop(ours);
    server.stop(Duration::from_secs(1)).expect("the server stops");
}

/// What a client says from its first byte on.
pub fn handshake(data: &[u8]) {
    session(data, false);
}

fn option(out: &mut Vec<u8>, number: u32, payload: &[u8]) {
    out.extend_from_slice(b"IHAVEOPT");
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
}

/// A number from a few bytes, near those where something changes.
fn number(how: u8, low: [u8; 2]) -> u64 {
    let low = u64::from(u16::from_le_bytes(low));
    let base = [0, 0, SIZE, SIZE - 4096, 65_536, 1 << 32, 1 << 63, 0];
    let base = base[usize::from(how & 7)];
    if how & 8 == 0 { base.wrapping_add(low) } else { base.wrapping_sub(low) }
}

/// After a right negotiation: a byte that says how, then requests of nine bytes each (command and
/// flags, how the numbers are meant, offset, length, a byte of the payload), or plain bytes.
pub fn transmission(data: &[u8]) {
    let Some((&how, rest)) = data.split_first() else { return };
    let extended = how & 3 == 2;
    let mut out = vec![0, 0, 0, 3];
    if how & 3 != 0 {
        option(&mut out, if extended { 11 } else { 8 }, &[]);
        let contexts = [
            &b"\0\0\0\x01x\0\0\0\x02\0\0\0\x0fbase:allocation"[..],
            b"\0\0\0\x15qemu:allocation-depth",
        ];
        option(&mut out, 10, &contexts.concat());
    }
    option(&mut out, 7, b"\0\0\0\x01x\0\0");
    if how & 0x20 != 0 {
        out.extend_from_slice(rest);
        return session(&out, how & 0x10 != 0);
    }
    for (cookie, op) in (0u64..).zip(rest.chunks_exact(9)) {
        let &[command, flags, wide, o0, o1, how_long, l0, l1, fill] = op else { continue };
        let (offset, length) = (number(wide, [o0, o1]), number(how_long, [l0, l1]));
        let command = u16::from(command & 15);
        let flags = u16::from(flags & 0x7f);
        out.extend_from_slice(if extended {
            &[0x21, 0xe4, 0x1c, 0x71]
        } else {
            &[0x25, 0x60, 0x95, 0x13]
        });
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&command.to_be_bytes());
        out.extend_from_slice(&cookie.to_be_bytes());
        out.extend_from_slice(&offset.to_be_bytes());
        match extended {
            true => out.extend_from_slice(&length.to_be_bytes()),
            false => out.extend_from_slice(&(length as u32).to_be_bytes()),
        }
        // Payloads are what they are said to be, unless they are long.
        if command == 1 || (extended && flags & 0x20 != 0) {
            let n = length.min(MAX_PAYLOAD) as usize;
            let payload: Vec<u8> = [&[0; 7][..], &[fill], &[0, 0, 0, 1, 0, 0, 0, 2]].concat();
            out.extend(payload.into_iter().cycle().take(n));
        }
        if out.len() > MAX_INPUT {
            break;
        }
    }
    session(&out, how & 0x10 != 0);
}
