//! In which order layers hold the locks of plugins that take one call at a time in the process.
//!
//! A layer is called with its plugin's lock held, and calls what is below, which may hold another. So the
//! stacks that are open together set an order. A layer that would contradict it is refused when it is put
//! on, lest threads wait for each other for ever when it is used.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::Mutex;

use crate::block::Held;

/// Which lock is held while which is taken, and how many stacks say so.
static PAIRS: Mutex<BTreeMap<(u64, u64), usize>> = Mutex::new(BTreeMap::new());

/// The place of a layer in a stack, until it is dropped.
pub struct Place(Vec<(u64, u64)>);

impl Place {
    /// Take the lock `upper` to be held while those `below` are taken. `Err`: the one that is that lock
    /// itself, or is held somewhere while `upper` is taken.
    pub fn take(upper: u64, below: &[Held]) -> Result<Self, &Held> {
        let mut pairs = PAIRS.lock();
        if let Some(other) = below.iter().find(|lower| reaches(&pairs, lower.id, upper)) {
            return Err(other);
        }
        let own: BTreeSet<(u64, u64)> = below.iter().map(|lower| (upper, lower.id)).collect();
        for pair in &own {
            *pairs.entry(*pair).or_default() += 1;
        }
        Ok(Self(own.into_iter().collect()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut pairs = PAIRS.lock();
        for pair in &self.0 {
            match pairs.get_mut(pair) {
                Some(n) if *n > 1 => *n -= 1,
                _ => drop(pairs.remove(pair)),
            }
        }
    }
}

/// Whether `to` is `from`, or may be taken while it is held.
fn reaches(pairs: &BTreeMap<(u64, u64), usize>, from: u64, to: u64) -> bool {
    let (mut seen, mut open) = (BTreeSet::from([from]), vec![from]);
    while let Some(at) = open.pop() {
        if at == to {
            return true;
        }
        let next = pairs.range((at, 0)..=(at, u64::MAX)).map(|(&(_, lower), _)| lower);
        open.extend(next.filter(|lower| seen.insert(*lower)));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(ids: &[u64]) -> Vec<Held> {
        ids.iter().map(|&id| Held { id, name: id.to_string() }).collect()
    }

    #[test]
    fn an_order_holds_as_long_as_a_stack_that_has_it() {
        // Other tests have plugins of small numbers.
        const A: u64 = 1 << 40;
        const B: u64 = A + 1;
        const C: u64 = A + 2;
        let refused = |upper, below: &[u64]| Place::take(upper, &held(below)).err().map(|h| h.id);
        assert_eq!(refused(A, &[B, A]), Some(A));
        let one = Place::take(A, &held(&[B, B])).ok().unwrap();
        let two = Place::take(A, &held(&[B])).ok().unwrap();
        let three = Place::take(B, &held(&[C])).ok().unwrap();
        assert_eq!(refused(B, &[A]), Some(A));
        assert_eq!(refused(C, &[A]), Some(A));
        assert_eq!(refused(A, &[C, B]), None);
        drop(one);
        assert_eq!(refused(B, &[A]), Some(A));
        drop(two);
        assert_eq!(refused(B, &[A]), None);
        assert_eq!(refused(C, &[B]), Some(B));
        drop(three);
        assert_eq!(refused(C, &[B]), None);
    }
}
