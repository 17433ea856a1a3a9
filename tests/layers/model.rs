//! Random calls on a device, by one thread or several, compared with a row of bytes.

use std::sync::Mutex;

use qblk::{Image, ReqFlags};

use crate::common::*;

/// What a model test does not do.
#[derive(Clone, Copy, Default)]
pub struct Without {
    /// Bytes that were trimmed are read again: what they are then is taken over (and must stay so).
    pub trim: bool,
    /// Zeroes are written, not zeroed.
    pub zero: bool,
    /// Neither FUA nor flush.
    pub flush: bool,
}

/// Do `calls` random calls on `image` and compare what is read with `model`, which begins as what the
/// device holds and is left as what it holds in the end.
pub fn run(image: &Image, model: &mut [u8], calls: usize, rng: &mut Rng, without: Without) {
    part(image, model, 0, calls, rng, without);
    let mut all = vec![0; model.len()];
    image.read_at(&mut all, 0).unwrap();
    assert_eq!(first_difference(&all, model), None, "at the end");
}

/// [`run`] by several threads, each on its own part of the device; parts meet inside a block.
pub fn run_many(image: &Image, model: &mut [u8], calls: usize, threads: usize, seed: u64) {
    let each = model.len() / threads;
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|s| {
        for (i, part_of) in model.chunks_mut(each).enumerate() {
            let failed = &failed;
            s.spawn(move || {
                let mut rng = Rng::new(seed.wrapping_add(i as u64));
                let work = std::panic::AssertUnwindSafe(|| {
                    let base = (i * each) as u64;
                    part(image, part_of, base, calls, &mut rng, Without::default());
                });
                if std::panic::catch_unwind(work).is_err() {
                    failed.lock().unwrap().push(i);
                }
            });
        }
    });
    assert!(failed.lock().unwrap().is_empty(), "threads that failed: {failed:?}");
    let mut all = vec![0; model.len()];
    image.read_at(&mut all, 0).unwrap();
    assert_eq!(first_difference(&all, model), None, "at the end");
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

fn part(image: &Image, model: &mut [u8], base: u64, calls: usize, rng: &mut Rng, without: Without) {
    for n in 0..calls {
        let at = rng.below(model.len() as u64) as usize;
        // Small ranges as a rule, now and then a large one; odd edges as a rule.
        let most = if rng.below(8) == 0 { model.len() } else { 9000 };
        let mut len = rng.below(most as u64 + 1) as usize;
        len = len.min(model.len() - at);
        let (offset, count) = (base + at as u64, len as u64);
        let fua = if !without.flush && rng.below(8) == 0 { ReqFlags::FUA } else { NONE };
        let range = at..at + len;
        match rng.below(10) {
            0..=3 => {
                let mut found = vec![0xaa; len];
                image.read_at(&mut found, offset).unwrap();
                if let Some(i) = first_difference(&found, &model[range.clone()]) {
                    panic!("call {n}: read {offset}+{count}: byte {} differs", offset + i as u64);
                }
            }
            4..=6 => {
                model[range.clone()].copy_from_slice(&rng.bytes(len));
                image.write_at(&model[range], offset, fua).unwrap();
            }
            7 => {
                model[range.clone()].fill(0);
                if without.zero {
                    image.write_at(&model[range], offset, fua).unwrap();
                } else {
                    let trim = if rng.below(2) == 0 { ReqFlags::MAY_TRIM } else { NONE };
                    image.zero(offset, count, fua | trim).unwrap();
                }
            }
            8 if !without.trim => {
                image.trim(offset, count, fua).unwrap();
                let mut now = vec![0; len];
                image.read_at(&mut now, offset).unwrap();
                for (i, (now, before)) in now.iter().zip(&model[range.clone()]).enumerate() {
                    let fits = now == before || *now == 0;
                    assert!(fits, "call {n}: byte {} after a trim", offset + i as u64);
                }
                model[range].copy_from_slice(&now);
            }
            8 => image.cache(offset, count).unwrap(),
            _ if !without.flush => image.flush().unwrap(),
            _ => {}
        }
    }
}
