//! A server that does the least a server can do: one raw file, trusted clients, a thread for each
//! connection. All requests of one receive are answered with one send, and in between there is one
//! `pread` or `pwrite` for each. An upper bound, for nothing else: it checks next to nothing.

use std::fs::File;
use std::io::{Read, Result, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use qblk::nbd::proto::{
    GREETING, OPTION_MAGIC, OPTION_REPLY_MAGIC, cmd, flag, hello, info, opt, rep,
};

use super::blast::{REPLY, REPLY_LEN, REQUEST_LEN};
use crate::oracle::at;
use crate::work::Res;

/// Bytes received at a time, at most.
const INPUT: usize = 1 << 20;
/// Longest data of a request, bytes.
const LONGEST: usize = 32 << 20;
/// Replies that are sent together, bytes: more if the last is long.
const OUTPUT: usize = 256 << 10;

struct Export {
    file: File,
    size: u64,
    flags: u16,
}

/// Serve until somebody kills the process.
pub fn serve(socket: &Path, path: &Path, write: bool) -> Res<()> {
    let file = at(path, File::options().read(true).write(write).open(path))?;
    let size = at(path, file.metadata())?.len();
    let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::CAN_MULTI_CONN;
    flags |= if write { 0 } else { flag::READ_ONLY };
    let export = Arc::new(Export { file, size, flags });
    let listener = at(socket, UnixListener::bind(socket))?;
    for stream in listener.incoming() {
        let (stream, export) = (at(socket, stream)?, export.clone());
        let session = move || {
            // A client that hangs up in any way ends its own thread only.
            let _ = negotiate(stream, &export).and_then(|s| s.map_or(Ok(()), |s| work(s, &export)));
        };
        std::thread::Builder::new().spawn(session).map_err(|e| format!("a thread: {e}"))?;
    }
    Ok(())
}

/// To transmission, or `None` if the client only looked.
fn negotiate(mut stream: UnixStream, export: &Export) -> Result<Option<UnixStream>> {
    let mut greeting = Vec::new();
    greeting.extend(GREETING.to_be_bytes());
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend((hello::FIXED_NEWSTYLE | hello::NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting)?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    loop {
        let (mut magic, mut option, mut len) = ([0; 8], [0; 4], [0; 4]);
        stream.read_exact(&mut magic)?;
        stream.read_exact(&mut option)?;
        stream.read_exact(&mut len)?;
        let mut data = vec![0; (u32::from_be_bytes(len) as usize).min(INPUT)];
        stream.read_exact(&mut data)?;
        let option = u32::from_be_bytes(option);
        let mut reply = |kind: u32, data: &[u8]| {
            let mut r = Vec::new();
            r.extend(OPTION_REPLY_MAGIC.to_be_bytes());
            r.extend(option.to_be_bytes());
            r.extend(kind.to_be_bytes());
            r.extend((data.len() as u32).to_be_bytes());
            r.extend(data);
            stream.write_all(&r)
        };
        let mut facts = info::EXPORT.to_be_bytes().to_vec();
        facts.extend(export.size.to_be_bytes());
        facts.extend(export.flags.to_be_bytes());
        match option {
            opt::GO | opt::INFO => {
                reply(rep::INFO, &facts)?;
                reply(rep::ACK, &[])?;
                if option == opt::GO {
                    return Ok(Some(stream));
                }
            }
            opt::EXPORT_NAME => {
                stream.write_all(&facts[2..])?;
                return Ok(Some(stream));
            }
            opt::ABORT => return reply(rep::ACK, &[]).map(|()| None),
            _ => reply(rep::ERR_UNSUP, &[])?,
        }
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn work(mut stream: UnixStream, export: &Export) -> Result<()> {
    // Memory that is never touched costs nothing.
    let mut input = vec![0; INPUT + LONGEST + REQUEST_LEN];
    let mut output = vec![0; OUTPUT + LONGEST + REPLY_LEN];
    let (mut from, mut to, mut out) = (0, 0, 0);
    loop {
        let head = &input[from..to];
        let whole = match head.len() {
            0..REQUEST_LEN => REQUEST_LEN,
            _ if u16::from_be_bytes(field(head, 6)) == cmd::WRITE => {
                REQUEST_LEN + u32::from_be_bytes(field(head, 24)) as usize
            }
            _ => REQUEST_LEN,
        };
        if head.len() < whole {
            stream.write_all(&output[..out])?;
            out = 0;
            input.copy_within(from..to, 0);
            (from, to) = (0, to - from);
            let most = whole.max(INPUT);
            match stream.read(&mut input[to..most])? {
                0 => return Ok(()),
                n => to += n,
            }
            continue;
        }
        let kind = u16::from_be_bytes(field(head, 6));
        let offset = u64::from_be_bytes(field(head, 16));
        let len = u32::from_be_bytes(field(head, 24)) as usize;
        let (reply, data) = output[out..].split_at_mut(REPLY_LEN);
        let result = match kind {
            cmd::READ if len <= LONGEST => export.file.read_exact_at(&mut data[..len], offset),
            cmd::WRITE => export.file.write_all_at(&head[REQUEST_LEN..whole], offset),
            cmd::FLUSH => export.file.sync_data(),
            _ => return stream.write_all(&output[..out]),
        };
        let error = result.map_or_else(|e| e.raw_os_error().unwrap_or(libc::EIO), |()| 0);
        reply[..4].copy_from_slice(&REPLY.to_be_bytes());
        reply[4..8].copy_from_slice(&(error as u32).to_be_bytes());
        reply[8..16].copy_from_slice(&head[8..16]);
        out += REPLY_LEN + if kind == cmd::READ && error == 0 { len } else { 0 };
        from += whole;
        if out >= OUTPUT {
            stream.write_all(&output[..out])?;
            out = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::blast::{Client, Load, Until, run};
    use super::*;

    #[test]
    fn every_request_of_a_load_is_answered() {
        let dir = std::env::temp_dir().join(format!("qblk-bench-mini.{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (socket, path) = (dir.join("sock"), dir.join("disk"));
        let bytes: Vec<u8> = (0..1 << 20).map(|i| (i / 4096) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let (s, p) = (socket.clone(), path.clone());
        std::thread::spawn(move || serve(&s, &p, true));
        let mut client = loop {
            match Client::connect(&socket) {
                Ok(client) => break client,
                Err(_) => std::thread::yield_now(),
            }
        };
        assert_eq!(client.size, 1 << 20);
        let mut buf = vec![0; 8192];
        client.read(&mut buf, 12288).unwrap();
        assert_eq!(buf, bytes[12288..20480]);
        for (write, block, connections) in [(false, 4096, 3), (false, 1 << 19, 1), (true, 65536, 2)]
        {
            let load = Load { block, depth: 7, connections, write };
            let done = run(&socket, &load, Until::Ops(100)).unwrap();
            assert_eq!(done.ops, (100 * connections) as f64);
        }
        // All was written somewhere by the last, with what it fills its requests with.
        assert!(std::fs::read(&path).unwrap().chunks(65536).any(|c| c.iter().all(|b| *b == 0x5a)));
        assert!(client.read(&mut buf, 1 << 20).is_err(), "behind the end");
        let _ = std::fs::remove_dir_all(&dir);
    }
}
