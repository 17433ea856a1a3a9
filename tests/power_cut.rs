//! What a power cut leaves behind: every state of the file that one could leave must be an image
//! without corruption that holds everything that was flushed.
//!
//! A device under the format keeps every write and flush. Then, for moments all through the run, a
//! file is made of what was written before the last flush that had ended by then, and of a random
//! choice of the writes since, some of them torn in the middle: that is what a disk with a volatile
//! cache may have. `qemu-img check` looks at each (leaks are allowed), and each byte must read as
//! it was at the last flush of the guest's that had ended, or as something written since.

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use qblk::block::{
    Caps, Device, Driver, Dst, Error, InFlight, Name, Prealloc, ReqFlags, Result, Src,
};
use qblk::crypto::Secret;
use qblk::format::{Params, luks, qcow2};
use qblk::image::Options;
use qblk::{Image, OpenFlags};

/// The unit in which the guest writes and in which writes tear, bytes.
const SECTOR: u64 = 512;

#[derive(Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Resize(u64),
    Flush,
}

#[derive(Default)]
struct Recorded {
    content: Vec<u8>,
    ops: Vec<Op>,
}

impl Recorded {
    fn apply(content: &mut Vec<u8>, op: &Op) {
        match op {
            Op::Write(at, data) => {
                let end = *at as usize + data.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*at as usize..end].copy_from_slice(data);
            }
            Op::Resize(size) => content.resize(*size as usize, 0),
            Op::Flush => {}
        }
    }

    fn add(&mut self, op: Op) {
        Self::apply(&mut self.content, &op);
        self.ops.push(op);
    }
}

/// A file in memory that remembers how it came to be.
struct Recorder(Name, Arc<Mutex<Recorded>>);

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
        self.1.lock().unwrap().content.len() as u64
    }
    fn read(&self, buf: Dst<'_>, offset: u64) -> Result<()> {
        let file = self.1.lock().unwrap();
        let from = file.content.get(offset as usize..).unwrap_or_default();
        let n = buf.copy_from(&from[..from.len().min(buf.len())]);
        buf.split_at(n).1.zero_fill();
        Ok(())
    }
    fn write(&self, buf: Src<'_>, offset: u64, _: ReqFlags) -> Result<()> {
        let mut data = vec![0; buf.len()];
        buf.copy_to(&mut data);
        self.1.lock().unwrap().add(Op::Write(offset, data));
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        self.1.lock().unwrap().add(Op::Flush);
        Ok(())
    }
    fn zero(&self, offset: u64, count: u64, _: ReqFlags) -> Result<()> {
        self.1.lock().unwrap().add(Op::Write(offset, vec![0; count as usize]));
        Ok(())
    }
    fn trim(&self, offset: u64, count: u64) -> Result<()> {
        let mut file = self.1.lock().unwrap();
        let count = count.min((file.content.len() as u64).saturating_sub(offset));
        file.add(Op::Write(offset, vec![0; count as usize]));
        Ok(())
    }
    fn resize(&self, size: u64, _: Prealloc, shrink: bool) -> Result<()> {
        let mut file = self.1.lock().unwrap();
        if size < file.content.len() as u64 && !shrink {
            return Err(Error::invalid("would shrink"));
        }
        file.add(Op::Resize(size));
        Ok(())
    }
}

/// What each sector of the guest may be: as at the last flush, and everything written since.
#[derive(Clone)]
struct Guest {
    may_be: Vec<Vec<u8>>,
}

impl Guest {
    fn new(sectors: u64) -> Self {
        Self { may_be: vec![vec![0]; sectors as usize] }
    }
    fn set(&mut self, from: u64, to: u64, value: u8) {
        for sector in &mut self.may_be[from as usize..to as usize] {
            sector.push(value);
        }
    }
    fn flushed(&mut self) {
        for sector in &mut self.may_be {
            sector.drain(..sector.len() - 1);
        }
    }
}

/// The state at some moment: operations on the file so far, and what the guest may count on.
struct Moment {
    ops: usize,
    guest: Guest,
}

fn workload(r: &mut Rng, geometry: &qcow2::Geometry, size: u64) -> (Vec<Op>, Vec<Moment>) {
    let file = Arc::new(Mutex::new(Recorded::default()));
    let device = || Device::new(Box::new(Recorder(Name::from("recorded"), file.clone())));
    qcow2::create(&device(), size, geometry).unwrap();
    let calls = Arc::new(InFlight::default());
    let params = Params {
        write: true,
        info_only: false,
        probed: false,
        l2_cache: Some([0, 1 << 20][r.below(2) as usize]),
        untrusted: false,
        snapshot: None,
        key: geometry.encrypt.as_ref().map(|_| key()),
        calls: calls.clone(),
    };
    let image = Device::new(Box::new(qcow2::Qcow2::open(device(), params).unwrap()));
    let sectors = size / SECTOR;
    let mut guest = Guest::new(sectors);
    let made = file.lock().unwrap().ops.len();
    let mut moments = Vec::new();
    for _ in 0..120 {
        let from = r.below(sectors);
        let most = if r.below(4) == 0 { sectors } else { 64 };
        let to = from + 1 + r.below((sectors - from).min(most));
        let (offset, count) = (from * SECTOR, (to - from) * SECTOR);
        let value = r.below(255) as u8 + 1;
        let before = guest.clone();
        match r.below(8) {
            0..=3 => {
                guest.set(from, to, value);
                image.write_slice(&vec![value; count as usize], offset, NONE).unwrap();
            }
            4 => {
                guest.set(from, to, 0);
                image.zero(offset, count, NONE).unwrap();
            }
            5 => {
                guest.set(from, to, 0);
                image.zero(offset, count, ReqFlags::MAY_TRIM).unwrap();
            }
            6 => {
                image.trim(offset, count, NONE).unwrap();
                // What became zeroes did so by sectors: ask which.
                let mut now = vec![0; count as usize];
                image.read_slice(&mut now, offset).unwrap();
                for (i, sector) in now.chunks(SECTOR as usize).enumerate() {
                    let at = from + i as u64;
                    guest.set(at, at + 1, sector[0]);
                }
            }
            _ => {
                image.flush().unwrap();
                guest.flushed();
            }
        }
        // In the middle of the operation the guest may count on what it could before it.
        let ops = file.lock().unwrap().ops.len();
        let last = moments.last().map_or(made, |m: &Moment| m.ops);
        let mut during = guest.clone();
        for (now, before) in during.may_be.iter_mut().zip(&before.may_be) {
            now.extend(before);
        }
        moments.extend((last + 1..ops).map(|ops| Moment { ops, guest: during.clone() }));
        moments.push(Moment { ops, guest: guest.clone() });
    }
    let ops = file.lock().unwrap().ops.clone();
    (ops, moments)
}

/// What the disk may hold when the power goes after `ops`.
fn cut(r: &mut Rng, ops: &[Op]) -> Vec<u8> {
    let flushed = ops.iter().rposition(|op| matches!(op, Op::Flush)).map_or(0, |i| i + 1);
    let mut content = Vec::new();
    for op in &ops[..flushed] {
        Recorded::apply(&mut content, op);
    }
    let keep = r.below(5);
    for op in &ops[flushed..] {
        // All, none, or some of the writes since, whole or torn.
        let (whole, torn) = match keep {
            0 => (true, false),
            1 => (false, false),
            _ => (r.below(2) == 0, r.below(4) == 0),
        };
        match op {
            Op::Write(at, data) if torn && data.len() as u64 > SECTOR => {
                let n = (r.below(data.len() as u64 / SECTOR) * SECTOR) as usize;
                let half = match r.below(2) {
                    0 => Op::Write(*at, data[..n].to_vec()),
                    _ => Op::Write(at + n as u64, data[n..].to_vec()),
                };
                Recorded::apply(&mut content, &half);
            }
            op if whole => Recorded::apply(&mut content, op),
            _ => {}
        }
    }
    content
}

fn key() -> Secret {
    Secret::new(b"key".to_vec())
}

fn locking() -> luks::Locking {
    luks::Locking::new(&luks::Names::default(), 1, key()).unwrap()
}

fn check(path: &std::path::Path, encrypted: bool) -> std::process::Output {
    if !encrypted {
        return run("qemu-img", &[&"check", &"-f", &"qcow2", &path]);
    }
    let opts = format!(
        "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename={}",
        path.display()
    );
    let secret = "secret,id=s,data=key";
    run("qemu-img", &[&"check", &"--object", &secret, &"--image-opts", &opts])
}

#[test]
fn every_state_that_a_power_cut_can_leave_is_sound_and_holds_what_was_flushed() {
    let seed = seed("power_cut");
    let mut r = Rng::new(seed);
    let dir = Tmp::in_memory("power-cut");
    let (path, mut tried) = (dir.join("cut.qcow2"), 0u64);
    let until = deadline(20);
    while std::time::Instant::now() < until {
        let cluster_bits = 9 + r.below(8) as u32;
        let v3 = r.below(4) != 0;
        let geometry = qcow2::Geometry {
            v3,
            cluster_bits,
            refcount_order: if v3 { r.below(7) as u32 } else { 4 },
            lazy: false,
            zstd: false,
            encrypt: (r.below(8) == 0).then(locking),
            backing: None,
            prealloc: Prealloc::Off,
        };
        let size = (1 + r.below(4 << 20) / SECTOR) * SECTOR;
        let (ops, moments) = workload(&mut r, &geometry, size);
        for _ in 0..12 {
            let moment = &moments[r.below(moments.len() as u64) as usize];
            let content = cut(&mut r, &ops[..moment.ops]);
            std::fs::write(&path, &content).unwrap();
            let about = format!("seed {seed}, {geometry:?}, size {size}, after {}", moment.ops);
            let check = check(&path, geometry.encrypt.is_some());
            // 0 is sound, 3 has leaks only.
            let sound = matches!(check.status.code(), Some(0 | 3));
            assert!(sound, "{about}: {}", String::from_utf8_lossy(&check.stdout));
            let mut options = Options::new().with("format", "qcow2");
            if geometry.encrypt.is_some() {
                options.set("key", Some(&key()));
            }
            let image = Image::open(path.as_os_str(), &options, OpenFlags(0)).unwrap();
            let mut bytes = vec![0; size as usize];
            image.read_at(&mut bytes, 0).unwrap_or_else(|e| panic!("{about}: {e}"));
            for (i, sector) in bytes.chunks(SECTOR as usize).enumerate() {
                let may_be = &moment.guest.may_be[i];
                let ok = sector.iter().all(|b| may_be.contains(b));
                assert!(ok, "{about}: sector {i} is {:?}, may be {may_be:?}", &sector[..4]);
            }
            tried += 1;
        }
    }
    println!("{tried} states of a cut-off disk tried, seed {seed}");
    assert!(tried > 50);
}
