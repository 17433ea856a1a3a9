//! What a request may ask for.

use super::conn::Own;
use crate::nbd::proto::{Mode, Request, cmd, cmd_flag};

impl Own {
    /// Whether a request means something: else an error and its text.
    pub(super) fn check(&self, r: &Request) -> Result<(), (i32, String)> {
        use cmd_flag::*;
        let conn = &self.conn;
        let extended = conn.mode == Mode::Extended;
        let max = u64::from(conn.server.settings().max_request);
        let known = match r.kind {
            cmd::READ if conn.mode > Mode::Simple => DF,
            cmd::READ => 0,
            cmd::WRITE if extended => FUA | PAYLOAD_LEN,
            cmd::WRITE | cmd::TRIM => FUA,
            cmd::FLUSH | cmd::CACHE => 0,
            cmd::WRITE_ZEROES => FUA | NO_HOLE | FAST_ZERO,
            cmd::BLOCK_STATUS if extended => REQ_ONE | PAYLOAD_LEN,
            cmd::BLOCK_STATUS => REQ_ONE,
            other => return Err((libc::EINVAL, format!("unknown command {other}"))),
        };
        if r.flags & !known != 0 {
            let text = format!("flags {:#x} mean nothing to command {}", r.flags & !known, r.kind);
            return Err((libc::EINVAL, text));
        }
        let changes = matches!(r.kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        if changes && conn.export.read_only {
            return Err((libc::EPERM, "the export is read-only".into()));
        }
        match r.kind {
            cmd::FLUSH if (r.offset, r.length) != (0, 0) => {
                return Err((libc::EINVAL, "a flush has no range".into()));
            }
            cmd::FLUSH => return Ok(()),
            cmd::BLOCK_STATUS if r.flags & PAYLOAD_LEN != 0 => {
                // The number of bytes to describe, and the ids of contexts.
                let most = 8 + 4 * conn.contexts.len() as u64;
                return match r.length {
                    12.. if r.length <= most && r.length.is_multiple_of(4) => Ok(()),
                    n => Err((
                        libc::EINVAL,
                        format!("a payload of {n} bytes, expected 12 to {most}"),
                    )),
                };
            }
            cmd::BLOCK_STATUS if conn.contexts.is_empty() => {
                return Err((libc::EINVAL, "no meta context was negotiated".into()));
            }
            cmd::BLOCK_STATUS | cmd::READ | cmd::WRITE if r.length == 0 => {
                return Err((libc::EINVAL, "a request for no bytes".into()));
            }
            cmd::READ | cmd::WRITE if r.length > max => {
                let text = format!("{} bytes in one request, {max} at most", r.length);
                return Err((libc::EINVAL, text));
            }
            _ => {}
        }
        let size = conn.export.with(|i| i.size()).unwrap_or(0);
        match r.offset.checked_add(r.length) {
            Some(end) if end <= size => Ok(()),
            _ => {
                // The specification counts a trim with the reads here.
                let writes = matches!(r.kind, cmd::WRITE | cmd::WRITE_ZEROES);
                let errno = if writes { libc::ENOSPC } else { libc::EINVAL };
                let text = format!(
                    "{} bytes at offset {} leave the export, which has {size}",
                    r.length, r.offset
                );
                Err((errno, text))
            }
        }
    }
}
