//! Compressed clusters, how they are read (how they are written: `compress`): inflating them, and keeping the last few inflated.
//!
//! A program that reads a compressed image in small pieces would otherwise inflate a whole cluster
//! for every piece. Codecs: libdeflate for deflate (any window; twice as fast as zlib), zstd's own
//! library for zstd.
//!
//! Source: "Compressed Clusters Descriptor" of the QCOW2 specification.

use std::sync::Arc;

use parking_lot::Mutex;

use super::compress::Press;
use super::{Entry, Qcow2};
use crate::block::*;

/// Inflated clusters kept, at most, and their bytes.
const KEEP: usize = 8;
const KEEP_BYTES: usize = 4 << 20;

/// A codec with its working memory.
enum Codec {
    Deflate(Box<libdeflater::Decompressor>),
    Zstd(zstd_safe::DCtx<'static>),
}

/// What a cluster is inflated with: a codec, and room for its compressed form.
struct Bench {
    codec: Codec,
    input: Vec<u8>,
}

/// Inflated clusters and idle benches.
pub(super) struct Store {
    /// 0 deflate, 1 zstd.
    pub(super) kind: u8,
    cluster_bytes: usize,
    keep: usize,
    /// The latest used first. The key is where the compressed form lies.
    kept: Mutex<Vec<(u64, Arc<Vec<u8>>)>>,
    idle: Mutex<Vec<Bench>>,
    /// Idle ones for the other direction.
    pub(super) presses: Mutex<Vec<Press>>,
}

impl Store {
    pub(super) fn new(kind: u8, cluster_bits: u32) -> Self {
        let cluster_bytes = 1usize << cluster_bits;
        Self {
            kind,
            cluster_bytes,
            keep: (KEEP_BYTES / cluster_bytes).clamp(2, KEEP),
            kept: Mutex::new(Vec::new()),
            idle: Mutex::new(Vec::new()),
            presses: Mutex::new(Vec::new()),
        }
    }

    fn find(&self, key: u64) -> Option<Arc<Vec<u8>>> {
        let mut kept = self.kept.lock();
        let i = kept.iter().position(|(k, _)| *k == key)?;
        kept[..=i].rotate_right(1);
        Some(kept[0].1.clone())
    }

    /// Memory for a cluster: that of the one used longest ago, if nobody reads it.
    fn room(&self) -> Vec<u8> {
        let mut kept = self.kept.lock();
        if kept.len() >= self.keep
            && let Some((_, old)) = kept.pop()
            && let Ok(room) = Arc::try_unwrap(old)
        {
            return room;
        }
        vec![0; self.cluster_bytes]
    }

    fn keep(&self, key: u64, data: Arc<Vec<u8>>) {
        let mut kept = self.kept.lock();
        if !kept.iter().any(|(k, _)| *k == key) {
            kept.insert(0, (key, data));
            kept.truncate(self.keep);
        }
    }

    /// Forget what was inflated: its place may come to hold something else.
    pub(super) fn forget(&self) {
        self.kept.lock().clear();
    }

    fn take_bench(&self) -> Bench {
        if let Some(bench) = self.idle.lock().pop() {
            return bench;
        }
        let codec = match self.kind {
            0 => Codec::Deflate(Box::new(libdeflater::Decompressor::new())),
            _ => Codec::Zstd(zstd_safe::DCtx::create()),
        };
        Bench { codec, input: Vec::new() }
    }

    fn give_bench(&self, bench: Bench) {
        let mut idle = self.idle.lock();
        if idle.len() < KEEP {
            idle.push(bench);
        }
    }
}

impl Bench {
    /// Inflate `self.input` to exactly `out`.
    fn inflate(&mut self, out: &mut [u8]) -> std::result::Result<(), String> {
        match &mut self.codec {
            Codec::Deflate(d) => match d.deflate_decompress(&self.input, out) {
                Ok(n) if n == out.len() => Ok(()),
                Ok(n) => Err(format!("inflates to {n} bytes, expected {}", out.len())),
                Err(e) => Err(format!("does not inflate ({e})")),
            },
            Codec::Zstd(ctx) => {
                // Frames follow one another until the cluster is full; behind them lies padding.
                let (mut from, mut done) = (&self.input[..], 0);
                while done < out.len() {
                    let code = |c| zstd_safe::get_error_name(c);
                    let frame = zstd_safe::find_frame_compressed_size(from)
                        .map_err(|c| format!("has no zstd frame ({})", code(c)))?;
                    let n = ctx
                        .decompress(&mut out[done..], from.get(..frame).unwrap_or(from))
                        .map_err(|c| format!("does not inflate ({})", code(c)))?;
                    if n == 0 && frame == 0 {
                        return Err("has an empty zstd frame".into());
                    }
                    from = from.get(frame..).unwrap_or(&[]);
                    done += n;
                }
                Ok(())
            }
        }
    }
}

impl Qcow2 {
    /// Read compressed clusters into `buf`; the caller has seen that those are at `offset`, but they
    /// may have been written over since.
    pub(super) fn inflate_into(&self, mut buf: Dst<'_>, mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let found = self.lookup(offset, buf.len() as u64)?;
            let in_cluster = (offset & (self.cluster_size() - 1)) as usize;
            let Entry::Compressed { offset: host, len } = found.entry else {
                // Written meanwhile: the ordinary way leads to its new place.
                return super::walk::read(self, buf, offset);
            };
            let n = (self.cluster_size() as usize - in_cluster).min(buf.len());
            let (part, rest) = buf.split_at(n);
            self.inflate_one(part, in_cluster, host, len, offset)?;
            offset += n as u64;
            buf = rest;
        }
        Ok(())
    }

    fn inflate_one(
        &self,
        part: Dst<'_>,
        from: usize,
        host: u64,
        len: u64,
        offset: u64,
    ) -> Result<()> {
        let store = &self.compressed;
        if let Some(data) = store.find(host) {
            part.copy_from(data.get(from..).unwrap_or_default());
            return Ok(());
        }
        if host >= self.file.size() {
            return Err(self.cut_off("a compressed cluster", host));
        }
        let mut bench = store.take_bench();
        bench.input.resize(len as usize, 0);
        self.file.read_slice(&mut bench.input, host)?;
        let bad = |what: String| {
            Error::corrupt(
                self.file.name(),
                format!("the compressed cluster of guest offset {offset:#x} at {host:#x} {what}"),
            )
        };
        let whole = part.len() == store.cluster_bytes;
        let result = match part.as_single() {
            // A whole cluster is inflated to where it is wanted, and not kept: whoever reads whole
            // clusters does not read them again in pieces.
            Some((to, n)) if whole => {
                // SAFETY: a piece of a Dst is writable memory of n bytes.
                bench.inflate(unsafe { std::slice::from_raw_parts_mut(to, n) })
            }
            _ => {
                let mut room = store.room();
                let done = bench.inflate(&mut room);
                if done.is_ok() {
                    let data = Arc::new(room);
                    part.copy_from(data.get(from..).unwrap_or_default());
                    store.keep(host, data);
                }
                done
            }
        };
        store.give_bench(bench);
        result.map_err(bad)
    }
}
