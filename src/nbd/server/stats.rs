//! What a server did.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::nbd::proto::{Request, cmd};

/// Counters.
#[derive(Default)]
pub struct Stats {
    pub(super) connections: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) errors: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    others: AtomicU64,
}

/// The counters at some moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Connections taken.
    pub connections: u64,
    /// Connections turned away because of a limit.
    pub refused: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes asked for by reads.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes sent by writes.
    pub write_bytes: u64,
    /// Flushes, trims, zeroes, block status, cache.
    pub others: u64,
}

impl Stats {
    pub(super) fn count(&self, r: &Request) {
        match r.kind {
            cmd::READ => {
                self.reads.fetch_add(1, Relaxed);
                self.read_bytes.fetch_add(r.length, Relaxed);
            }
            cmd::WRITE => {
                self.writes.fetch_add(1, Relaxed);
                self.write_bytes.fetch_add(r.length, Relaxed);
            }
            _ => drop(self.others.fetch_add(1, Relaxed)),
        }
    }

    pub(super) fn totals(&self) -> Totals {
        let get = |n: &AtomicU64| n.load(Relaxed);
        Totals {
            connections: get(&self.connections),
            refused: get(&self.refused),
            errors: get(&self.errors),
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            write_bytes: get(&self.write_bytes),
            others: get(&self.others),
        }
    }
}
