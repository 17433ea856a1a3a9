//! A disk in memory: it remembers every write and flush, can be cut off at any moment, and can fail; a
//! flush that fails loses some of what it was to keep, as a host's does.
//! It has two files, each with flushes of its own: an image, and its data file where it has one.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

use qblk::block::{Caps, Device, Driver, Dst, Error, Name, Prealloc, ReqFlags, Result, Src};

use super::Rng;

/// The unit in which the guest writes and in which writes tear, bytes.
pub const SECTOR: u64 = 512;

/// What the files hold: the image, and its data file.
pub type Files = [Vec<u8>; 2];

/// What was done to a file.
#[derive(Clone)]
pub enum Op {
    Write(u64, Vec<u8>),
    Resize(u64),
    Flush,
}

/// What may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Read,
    /// Writing, zeroing, resizing.
    Write,
    Flush,
}

/// The `nth` call of a kind fails, and if it is to last, all later ones of the kind.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub call: Call,
    pub nth: u64,
    pub lasts: bool,
}

#[derive(Default)]
pub struct State {
    pub content: Files,
    /// With the file that each was done to.
    pub ops: Vec<(usize, Op)>,
    pub fault: Option<Fault>,
    /// Calls of each kind since the fault was set.
    pub calls: [u64; 3],
    /// Whether it has struck.
    pub struck: bool,
    /// Bytes asked for by reads.
    pub bytes_read: u64,
    /// Which of `ops` a flush that failed has lost. Reading shows them still: they are in the cache.
    lost: HashSet<usize>,
}

impl State {
    fn add(&mut self, file: usize, op: Op) {
        apply(&mut self.content[file], &op);
        self.ops.push((file, op));
    }

    /// A flush of a file has failed: of what was written since the last one, some is lost, whatever later
    /// flushes say.
    fn lose(&mut self, file: usize) {
        let ended = |op: &(usize, Op)| op.0 == file && matches!(op.1, Op::Flush);
        let since = self.ops.iter().rposition(ended).map_or(0, |i| i + 1);
        let mut r = Rng::new(self.ops.len() as u64);
        for i in since..self.ops.len() {
            let (of, op) = &self.ops[i];
            if *of == file && matches!(op, Op::Write(..)) && r.one_in(2) {
                self.lost.insert(i);
            }
        }
    }

    /// What the files hold when the cache is gone, if they held `base` at first.
    pub fn without_cache(&self, base: &Files) -> Files {
        if self.lost.is_empty() {
            return self.content.clone();
        }
        let mut content = base.clone();
        for (_, (file, op)) in self.ops.iter().enumerate().filter(|(i, _)| !self.lost.contains(i)) {
            apply(&mut content[*file], op);
        }
        content
    }

    fn fails(&mut self, call: Call) -> bool {
        let n = self.calls[call as usize];
        self.calls[call as usize] += 1;
        let fails =
            self.fault.is_some_and(|f| f.call == call && (n == f.nth || (f.lasts && n > f.nth)));
        self.struck |= fails;
        fails
    }
}

fn apply(content: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(at, data) => {
            let end = *at as usize + data.len();
            grow(content, end);
            content[*at as usize..end].copy_from_slice(data);
        }
        Op::Resize(size) => {
            content.truncate(*size as usize);
            grow(content, *size as usize);
        }
        Op::Flush => {}
    }
}

/// By the block, which is quicker than `resize` where tests are not optimised.
fn grow(content: &mut Vec<u8>, size: usize) {
    content.extend_from_slice(&vec![0; size.saturating_sub(content.len())]);
}

/// The disk.
#[derive(Clone)]
pub struct Disk(Arc<Mutex<State>>);

impl Disk {
    pub fn new(content: Files) -> Self {
        Self(Arc::new(Mutex::new(State { content, ..State::default() })))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A device on the image.
    pub fn device(&self) -> Device {
        Device::new(Box::new(Recorder(Name::from("disk"), self.0.clone(), 0)))
    }

    /// A device on the data file.
    pub fn data(&self) -> Device {
        Device::new(Box::new(Recorder(Name::from("data"), self.0.clone(), 1)))
    }
}

/// How much of what was not flushed a cut leaves.
#[derive(Clone, Copy, Debug)]
pub enum Left {
    All,
    Nothing,
    /// A random choice, some of it torn.
    Some,
}

/// What a file holds when the power goes, if it certainly holds `base` and `since` was done since.
fn cut<'a>(r: &mut Rng, base: &[u8], since: impl Iterator<Item = &'a Op>, left: Left) -> Vec<u8> {
    let mut content = base.to_vec();
    for op in since {
        let (whole, torn) = match left {
            Left::All => (true, false),
            Left::Nothing => (false, false),
            Left::Some => (r.one_in(2), r.one_in(4)),
        };
        match op {
            Op::Write(at, data) if torn && data.len() as u64 > SECTOR => {
                let n = (r.below(data.len() as u64 / SECTOR) * SECTOR) as usize;
                let half = match r.below(2) {
                    0 => Op::Write(*at, data[..n].to_vec()),
                    _ => Op::Write(at + n as u64, data[n..].to_vec()),
                };
                apply(&mut content, &half);
            }
            op if whole => apply(&mut content, op),
            _ => {}
        }
    }
    content
}

/// The disk as it was at the end of every epoch: after how many operations a flush ended, and what
/// was certainly there then.
pub struct Epochs {
    ops: Vec<(usize, Op)>,
    /// Operations that the present base of each file holds.
    done: [usize; 2],
    base: Files,
}

impl Epochs {
    pub fn new(ops: Vec<(usize, Op)>, base: Files) -> Self {
        Self { ops, done: [0; 2], base }
    }

    /// What the disk holds if the power goes after `count` operations. Moments must be asked for in
    /// rising order, which spares beginning anew for each.
    pub fn cut(&mut self, r: &mut Rng, count: usize, left: Left) -> Files {
        [0, 1].map(|file| {
            let of_file = |ops: &'_ &(usize, Op)| ops.0 == file;
            let ended = |op: &(usize, Op)| op.0 == file && matches!(op.1, Op::Flush);
            let flushed = self.ops[..count].iter().rposition(ended);
            let flushed = flushed.map_or(0, |i| i + 1).max(self.done[file]);
            for (_, op) in self.ops[self.done[file]..flushed].iter().filter(of_file) {
                apply(&mut self.base[file], op);
            }
            self.done[file] = flushed;
            let since = self.ops[flushed..count].iter().filter(of_file).map(|op| &op.1);
            cut(r, &self.base[file], since, left)
        })
    }
}

struct Recorder(Name, Arc<Mutex<State>>, usize);

impl Recorder {
    fn call(&self, call: Call, op: &'static str, offset: u64) -> Result<MutexGuard<'_, State>> {
        let mut state = self.1.lock().unwrap();
        if state.fails(call) {
            let file = self.0.clone();
            return Err(Error::Io { op, file, offset, count: 0, errno: libc::EIO });
        }
        Ok(state)
    }
}

impl Driver for Recorder {
    fn name(&self) -> &Name {
        &self.0
    }
    fn kind(&self) -> &'static str {
        "file"
    }
    fn caps(&self) -> Caps {
        Caps { trim: true, zero: true, ..Caps::default() }
    }
    fn size(&self) -> u64 {
        self.1.lock().unwrap().content[self.2].len() as u64
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let mut file = self.call(Call::Read, "reading", offset)?;
        file.bytes_read += buf.len() as u64;
        let from = file.content[self.2].get(offset as usize..).unwrap_or_default();
        let n = buf.copy_from(&from[..from.len().min(buf.len())]);
        buf.split_at(n).1.zero_fill();
        Ok(())
    }
    fn write(&self, buf: Src<'_>, offset: u64, _: ReqFlags) -> Result<()> {
        let mut data = vec![0; buf.len()];
        buf.copy_to(&mut data);
        self.call(Call::Write, "writing", offset)?.add(self.2, Op::Write(offset, data));
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        match self.call(Call::Flush, "flushing", 0) {
            Ok(mut file) => file.add(self.2, Op::Flush),
            Err(e) => {
                self.1.lock().unwrap().lose(self.2);
                return Err(e);
            }
        }
        Ok(())
    }
    fn zero(&self, offset: u64, count: u64, _: ReqFlags) -> Result<()> {
        let op = Op::Write(offset, vec![0; count as usize]);
        self.call(Call::Write, "zeroing", offset)?.add(self.2, op);
        Ok(())
    }
    fn trim(&self, offset: u64, count: u64, _flags: ReqFlags) -> Result<()> {
        let mut file = self.call(Call::Write, "trimming", offset)?;
        let count = count.min((file.content[self.2].len() as u64).saturating_sub(offset));
        file.add(self.2, Op::Write(offset, vec![0; count as usize]));
        Ok(())
    }
    fn resize(&self, size: u64, _: Prealloc, shrink: bool) -> Result<()> {
        let mut file = self.call(Call::Write, "resizing", size)?;
        if size < file.content[self.2].len() as u64 && !shrink {
            return Err(Error::invalid("would shrink"));
        }
        file.add(self.2, Op::Resize(size));
        Ok(())
    }
}
