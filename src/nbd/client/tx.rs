//! Sending: requests queue up, and one thread at a time sends all that are there with one system
//! call, so that many threads' requests share it.

use std::io::IoSlice;

use libc::iovec;

use super::slot::Memory;
use super::sys::{self, Errno};
use crate::block::Src;
use crate::nbd::proto::{Mode, Request};
use crate::nbd::tls::Session;

/// Requests that can be queued at once: one for each slot.
const ROOM: usize = super::lane::SLOTS;
/// Pieces of memory in one system call; the kernel takes 1024, this many are cheap on the stack.
const PIECES: usize = 128;
const NO_PIECE: iovec = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
/// Plain text that is made into TLS records at a time, bytes: what is kept in memory beside it.
const SEALED: usize = 256 << 10;

/// A request that waits to be sent.
#[derive(Clone, Copy)]
struct Entry {
    slot: u8,
    payload: Option<Src<'static>>,
}

/// Requests in the order in which they are to be sent.
pub(super) struct Queue {
    /// Headers, one after the other.
    bytes: [u8; ROOM * 32],
    entries: [Entry; ROOM],
    len: usize,
    /// Bytes of each header.
    header: usize,
}

impl Queue {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            bytes: [0; ROOM * 32],
            entries: [Entry { slot: 0, payload: None }; ROOM],
            len: 0,
            header: 28,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Add a request. There is room for one of each slot.
    #[inline]
    pub(super) fn push(
        &mut self,
        slot: usize,
        head: &Request,
        mode: Mode,
        memory: &Memory<'static>,
    ) {
        let (bytes, len) = head.encode(mode);
        self.header = len;
        let at = self.len * len;
        let payload = match memory {
            Memory::From(src) => Some(*src),
            _ => None,
        };
        if let (Some(to), Some(entry), Some(from)) =
            (self.bytes.get_mut(at..at + len), self.entries.get_mut(self.len), bytes.get(..len))
        {
            to.copy_from_slice(from);
            *entry = Entry { slot: slot as u8, payload };
            self.len += 1;
        }
    }

    /// The slots of the requests that have a payload.
    pub(super) fn with_payload(&self) -> impl Iterator<Item = usize> {
        let entries = self.entries.get(..self.len).unwrap_or_default();
        entries.iter().filter(|e| e.payload.is_some()).map(|e| usize::from(e.slot))
    }

    /// Every piece of memory of the queue, in order, adjoining headers as one, none of payload longer
    /// than `most`.
    fn pieces(&self, most: usize) -> impl Iterator<Item = (*const u8, usize)> {
        let entries = self.entries.get(..self.len).unwrap_or_default();
        let mut at = 0;
        std::iter::from_fn(move || {
            let from = at;
            if from == entries.len() {
                return None;
            }
            // Up to and including the next request with a payload.
            let with = entries.iter().skip(from).position(|e| e.payload.is_some());
            at = with.map_or(entries.len(), |n| from + n + 1);
            let headers = self.bytes.get(from * self.header..at * self.header).unwrap_or_default();
            let payload = at.checked_sub(1).and_then(|i| entries.get(i)).and_then(|e| e.payload);
            Some((headers, payload))
        })
        .flat_map(move |(headers, payload)| {
            let payload = payload.into_iter().flat_map(move |p| {
                let mut left = p;
                // A window's own iterator borrows it; this one takes it along.
                std::iter::from_fn(move || {
                    let mut one = [NO_PIECE];
                    let (n, bytes) = left.sub(0, most).fill(&mut one);
                    left = left.split_at(bytes).1;
                    (n > 0).then_some((one[0].iov_base.cast_const().cast::<u8>(), bytes))
                })
            });
            std::iter::once((headers.as_ptr(), headers.len())).chain(payload)
        })
    }

    /// Send everything. `tick` is asked whenever the socket has taken nothing for a while: whether
    /// to go on.
    pub(super) fn send(
        &self,
        fd: i32,
        tls: Option<&Session>,
        sealed: &mut Vec<u8>,
        mut tick: impl FnMut() -> bool,
    ) -> Result<(), SendError> {
        let most = if tls.is_some() { SEALED } else { usize::MAX };
        let mut pieces = self.pieces(most).peekable();
        while pieces.peek().is_some() {
            let mut vecs = [NO_PIECE; PIECES];
            let (mut n, mut bytes) = (0, 0);
            while n < PIECES
                && (tls.is_none() || bytes < SEALED)
                && let Some((base, len)) = pieces.next()
            {
                vecs[n] = iovec { iov_base: base.cast_mut().cast(), iov_len: len };
                n += 1;
                bytes += len;
            }
            let vecs = &mut vecs[..n];
            match tls {
                // SAFETY: the pieces are headers of this queue and memory of callers who wait until
                // their slots are SENT.
                None => unsafe { send_all(fd, vecs, &mut tick)? },
                Some(session) => {
                    let mut slices = [IoSlice::new(&[]); PIECES];
                    for (slice, v) in slices.iter_mut().zip(vecs.iter()) {
                        // SAFETY: as above.
                        *slice = IoSlice::new(unsafe {
                            std::slice::from_raw_parts(v.iov_base.cast::<u8>(), v.iov_len)
                        });
                    }
                    sealed.clear();
                    session
                        .seal(slices.get(..n).unwrap_or_default(), sealed)
                        .map_err(SendError::Tls)?;
                    let mut one =
                        [iovec { iov_base: sealed.as_mut_ptr().cast(), iov_len: sealed.len() }];
                    // SAFETY: the piece is `sealed`, which is not touched meanwhile.
                    unsafe { send_all(fd, &mut one, &mut tick)? };
                }
            }
        }
        Ok(())
    }
}

/// Why not everything was sent.
pub(super) enum SendError {
    Os(Errno),
    Tls(crate::block::Error),
}

/// Send all of `vecs`.
///
/// # Safety
/// Every piece must be readable memory.
unsafe fn send_all(
    fd: i32,
    mut vecs: &mut [iovec],
    tick: &mut impl FnMut() -> bool,
) -> Result<(), SendError> {
    while !vecs.is_empty() {
        // SAFETY: the pieces are readable by contract, and what is left of them is.
        let mut n = match unsafe { sys::send(fd, vecs) } {
            Ok(n) => n,
            Err(libc::EINTR) => continue,
            Err(libc::EAGAIN) if tick() => continue,
            Err(errno) => return Err(SendError::Os(errno)),
        };
        while let Some(first) = vecs.first_mut() {
            if n < first.iov_len {
                // SAFETY: still inside the piece.
                first.iov_base = unsafe { first.iov_base.cast::<u8>().add(n) }.cast();
                first.iov_len -= n;
                break;
            }
            n -= first.iov_len;
            vecs = std::mem::take(&mut vecs).split_first_mut().map_or(&mut [], |v| v.1);
        }
    }
    Ok(())
}
