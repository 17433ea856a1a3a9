//! The same random operations on an NBD device and on a plain array of bytes: both must always hold
//! the same.

use super::common::*;
use qblk::block::{Can, ErrorKind};
use qblk::{Extent, Image, ReqFlags};

/// A device, what it should hold, and what was done to it.
pub struct Model<'a> {
    image: &'a Image,
    pub bytes: &'a mut Vec<u8>,
    rng: Rng,
    log: Vec<String>,
    fua: bool,
}

impl Drop for Model<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let skip = self.log.len().saturating_sub(30);
            eprintln!("the last operations: {:#?}", &self.log[skip..]);
        }
    }
}

/// Do so many random things; both hold the same before and afterwards.
pub fn exercise(image: &Image, bytes: &mut Vec<u8>, rng: &mut Rng, steps: u32) {
    let fua = image.info().unwrap().can_fua != Can::Not;
    let rng = Rng::new(rng.next());
    let mut model = Model { image, bytes, rng, log: Vec::new(), fua };
    model.check_all();
    for _ in 0..steps {
        model.step();
    }
    model.check_all();
    image.flush().unwrap_or_else(|e| panic!("flush: {e}"));
}

/// The same by several threads at a time, each with a context and a part of its own.
pub fn exercise_together(image: &Image, bytes: &mut Vec<u8>, rng: &mut Rng, steps: u32) {
    let mut rest = std::mem::take(bytes);
    let part = rest.len() / 4;
    let mut parts = Vec::new();
    for _ in 0..3 {
        let tail = rest.split_off(part);
        parts.push(std::mem::replace(&mut rest, tail));
    }
    parts.push(rest);
    let before = parts.clone();
    let done: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (n, mut mine) in before.into_iter().enumerate() {
            let (seed, context) = (rng.next(), image.own_context().unwrap());
            threads.push(scope.spawn(move || {
                let mut rng = Rng::new(seed);
                let base = (n * part) as u64;
                for _ in 0..steps {
                    let count = rng.range(1, 100_000.min(mine.len() as u64));
                    let at = rng.below(mine.len() as u64 - count);
                    let range = at as usize..(at + count) as usize;
                    if rng.one_in(2) {
                        let data = rng.bytes(count as usize);
                        context.write_at(&data, base + at, NONE).unwrap();
                        mine[range].copy_from_slice(&data);
                    } else {
                        let found = read_range(&context, base + at, count);
                        assert_same(&found, &mine[range], base + at, "a part");
                    }
                }
                context.close().unwrap();
                mine
            }));
        }
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    *bytes = done.concat();
    assert_same(&read_all(image), bytes, 0, "after all threads");
}

impl Model<'_> {
    fn a_range(&mut self) -> (u64, u64) {
        let size = self.bytes.len() as u64;
        let rng = &mut self.rng;
        let count = match rng.below(8) {
            0 => rng.below(16),
            1 | 2 => rng.range(1, 5000),
            3 => 4096,
            4 => 65536,
            5 => rng.range(1, 300_000),
            6 => rng.range(1, (size / 2).max(2)),
            _ => 512 * rng.range(1, 100),
        }
        .min(size);
        let last = size - count;
        let offset = match rng.below(5) {
            0 => last,
            1 => rng.below(last + 1) / 65536 * 65536,
            2 => rng.below(last + 1) / 512 * 512,
            _ => rng.below(last + 1),
        };
        (offset, count)
    }

    fn flags(&mut self) -> ReqFlags {
        if self.fua && self.rng.one_in(6) { ReqFlags::FUA } else { NONE }
    }

    fn step(&mut self) {
        let (offset, count) = self.a_range();
        let range = offset as usize..(offset + count) as usize;
        let flags = self.flags();
        let image = self.image;
        match self.rng.below(100) {
            0..=39 => {
                let data = self.rng.bytes(count as usize);
                self.log.push(format!("write {count}@{offset} {flags:?}"));
                if self.rng.one_in(3) {
                    write_scattered(image, &mut self.rng, &data, offset, flags).unwrap();
                } else {
                    image.write_at(&data, offset, flags).unwrap_or_else(|e| panic!("write: {e}"));
                }
                self.bytes[range].copy_from_slice(&data);
            }
            40..=51 => {
                let trim = self.rng.one_in(2);
                self.log.push(format!("zero {count}@{offset} {flags:?} may_trim={trim}"));
                let flags = if trim { flags | ReqFlags::MAY_TRIM } else { flags };
                image.zero(offset, count, flags).unwrap_or_else(|e| panic!("zero: {e}"));
                self.bytes[range].fill(0);
            }
            52..=55 => {
                self.log.push(format!("fast zero {count}@{offset}"));
                match image.zero(offset, count, ReqFlags::FAST_ZERO | ReqFlags::MAY_TRIM) {
                    Ok(()) => self.bytes[range].fill(0),
                    Err(e) => {
                        assert_eq!(e.kind(), ErrorKind::Errno(libc::ENOTSUP), "{e}");
                        // QEMU may have zeroed a part before it found that out.
                        self.adopt(offset, count);
                    }
                }
            }
            56..=61 => {
                self.log.push(format!("trim {count}@{offset} {flags:?}"));
                image.trim(offset, count, flags).unwrap_or_else(|e| panic!("trim: {e}"));
                self.adopt(offset, count);
            }
            62..=84 => {
                self.log.push(format!("read {count}@{offset}"));
                let found = match self.rng.one_in(3) {
                    true => read_scattered(image, &mut self.rng, offset, count),
                    false => read_range(image, offset, count),
                };
                assert_same(&found, &self.bytes[range], offset, "read");
            }
            85..=90 => self.check_extents(offset, count),
            91..=94 => {
                self.log.push("flush".into());
                image.flush().unwrap_or_else(|e| panic!("flush: {e}"));
            }
            95 => image.cache(offset, count).unwrap_or_else(|e| panic!("cache: {e}")),
            96 => {
                let size = self.bytes.len() as u64;
                image.write_at(&[1; 2], size - 1, NONE).unwrap_err();
                image.read_at(&mut [0; 2], size - 1).unwrap_err();
            }
            97 => {
                let other = image.own_context().unwrap();
                let found = read_range(&other, offset, count);
                assert_same(&found, &self.bytes[range], offset, "another context");
                other.close().unwrap();
            }
            _ => self.check_all(),
        }
    }

    /// Bytes that are as before or zeroes, and stay so.
    fn adopt(&mut self, offset: u64, count: u64) {
        let now = read_range(self.image, offset, count);
        for (n, new) in (offset..).zip(now) {
            let old = &mut self.bytes[n as usize];
            assert!(new == *old || new == 0, "{new} at {n}");
            *old = new;
        }
    }

    fn check_extents(&mut self, offset: u64, count: u64) {
        if count == 0 {
            return;
        }
        self.log.push(format!("extents {count}@{offset}"));
        let bite = self.rng.range(1, 20) as usize;
        for e in all_extents(self.image, offset, count, bite) {
            let range = e.offset as usize..(e.offset + e.length) as usize;
            if e.has(Extent::ZERO) {
                let zero = self.bytes[range].iter().all(|b| *b == 0);
                assert!(zero, "not all zeroes: {e:?}");
            }
        }
    }

    fn check_all(&mut self) {
        self.log.push("read all".into());
        assert_same(&read_all(self.image), self.bytes, 0, "all of it");
        let size = self.bytes.len() as u64;
        self.check_extents(0, size);
    }
}
