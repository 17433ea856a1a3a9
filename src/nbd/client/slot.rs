//! One request under way: what the three who deal with it (its caller, the thread that sends, the
//! thread that receives) know of it, and who may touch what when.
//!
//! A slot belongs to the caller who claimed its bit in the lane's set of free slots. Its life:
//!
//! 1. The caller alone fills [`Work`].
//! 2. It queues the request and sets [`LIVE`], both under the lane's `tx` lock. From now on `Work`
//!    is the receiver's, whoever holds that role, as long as `cookie` is the request's.
//! 3. The sender sets [`SENT`] when the system call that took the request's payload has returned: then
//!    nobody reads the caller's memory any more. (Requests without payload are born SENT: their
//!    header lies in the queue.)
//! 4. The receiver clears `cookie` and sets [`REPLIED`] when the reply is complete: it touches neither
//!    `Work` nor the caller's memory again. A server may answer before it has read all, so 3 and 4
//!    come in any order.
//! 5. With both set, or with [`FAILED`], the slot is its caller's again. FAILED is set by the
//!    receiver only, on a dead connection, when no thread is sending on it nor ever will.
//!
//! A caller stays in its call from 1 to 5, however the connection fares; so the memory that `Work`
//! points to is good as long as anybody may touch it. All bits of the state are changed with at
//! least release order and read with acquire.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::cover::Cover;
use crate::block::{Dst, Src};

/// The request is queued or under way.
pub(super) const LIVE: u32 = 1;
/// Nobody reads the caller's memory for sending (any more).
pub(super) const SENT: u32 = 2;
/// The reply is complete.
pub(super) const REPLIED: u32 = 4;
/// The connection is dead; the reply never comes.
pub(super) const FAILED: u32 = 8;

/// Whether a slot in this state is its caller's again.
#[inline]
pub(super) fn is_over(state: u32) -> bool {
    state & FAILED != 0 || state & (SENT | REPLIED) == SENT | REPLIED
}

/// A request, as its caller puts it.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    /// One of [`cmd`](crate::nbd::proto::cmd).
    pub kind: u16,
    /// Bits of [`cmd_flag`](crate::nbd::proto::cmd_flag).
    pub flags: u16,
    pub offset: u64,
    pub length: u64,
    pub memory: Memory<'a>,
}

/// The caller's memory of a request.
#[derive(Clone, Copy)]
pub(super) enum Memory<'a> {
    None,
    /// Read into.
    Into(Dst<'a>),
    /// Written from.
    From(Src<'a>),
}

impl Memory<'_> {
    /// The same memory, for as long as the caller stays in its call.
    ///
    /// # Safety
    /// The result must not be used after the memory's own lifetime: see the module's text.
    pub(super) unsafe fn unbound(self) -> Memory<'static> {
        // SAFETY: the types differ in the lifetime only.
        unsafe { std::mem::transmute::<Self, Memory<'static>>(self) }
    }
}

/// What an error said.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub errno: i32,
    /// The server's words, if it had any.
    pub text: Vec<u8>,
}

/// One descriptor of a block status: of which context (by its place among those agreed on), bytes,
/// flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Described {
    pub context: u32,
    pub length: u64,
    pub flags: u64,
}

/// What the receiver needs to know of a request, and what it has found out.
pub(super) struct Work {
    /// Counts the requests of this slot: the upper half of cookies.
    pub generation: u32,
    pub kind: u16,
    pub offset: u64,
    pub length: u64,
    pub memory: Memory<'static>,
    pub cover: Cover,
    /// The first error that was told, and how many were.
    pub failure: Option<Failure>,
    pub failures: u32,
    /// Descriptors so far; bytes described and whether the chunk has come, by context.
    pub described: Vec<Described>,
    pub contexts: Vec<(u64, bool)>,
    /// Descriptors so far, also those that were not kept.
    pub descriptors: u64,
}

/// See the module's text.
#[repr(align(128))]
pub(super) struct Slot {
    pub state: AtomicU32,
    /// The cookie that a reply is expected with; 0 = none is.
    pub cookie: AtomicU64,
    pub work: UnsafeCell<Work>,
}

// SAFETY: `work` is touched by one thread at a time, handed on by `state` and `cookie`, as the
// module's text tells.
unsafe impl Sync for Slot {}
// SAFETY: the pointers in `work` are into memory of a caller who waits.
unsafe impl Send for Slot {}

impl Slot {
    pub(super) fn new() -> Self {
        Self {
            state: AtomicU32::new(0),
            cookie: AtomicU64::new(0),
            work: UnsafeCell::new(Work {
                generation: 0,
                kind: 0,
                offset: 0,
                length: 0,
                memory: Memory::None,
                cover: Cover::default(),
                failure: None,
                failures: 0,
                described: Vec::new(),
                contexts: Vec::new(),
                descriptors: 0,
            }),
        }
    }
}

impl Work {
    /// Take in a request; its cookie for the slot's number.
    #[inline]
    pub(super) fn begin(&mut self, request: &Request<'_>, contexts: usize, slot: usize) -> u64 {
        // 0 is no generation: a cookie is never 0.
        self.generation = self.generation.wrapping_add(1).max(1);
        self.kind = request.kind;
        self.offset = request.offset;
        self.length = request.length;
        // SAFETY: the caller stays in its call until the slot is over, and nobody uses the memory
        // of a slot that is over.
        self.memory = unsafe { request.memory.unbound() };
        self.cover.clear();
        self.failure = None;
        self.failures = 0;
        if request.kind == crate::nbd::proto::cmd::BLOCK_STATUS {
            self.described.clear();
            self.contexts.clear();
            self.contexts.resize(contexts, (0, false));
            self.descriptors = 0;
        }
        u64::from(self.generation) << 32 | slot as u64
    }
}
