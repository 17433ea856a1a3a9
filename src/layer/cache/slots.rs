//! Which block lies in which slot of the store, and which slot is given up for another block: CLOCK, which
//! passes over a slot that was used since it last came by.

use std::collections::{BTreeSet, HashMap};

/// A place in the store.
pub(super) type Slot = u32;

#[derive(Clone, Copy, Default)]
struct State {
    block: u64,
    /// It holds `block`; else it is free, or taken for one that is to come.
    filled: bool,
    /// Calls that read or write it now.
    pins: u32,
    used: bool,
    /// It could not be written back: it is no victim until a flush has.
    stuck: bool,
}

/// The slots, at most so many.
pub(super) struct Slots {
    most: u32,
    all: Vec<State>,
    free: Vec<Slot>,
    at: HashMap<u64, Slot>,
    /// Blocks that are not below yet.
    dirty: BTreeSet<u64>,
    hand: usize,
}

/// What [`Slots::take`] found.
#[derive(Debug, PartialEq)]
pub(super) enum Take {
    /// A slot, the caller's until it is filled or given back.
    Slot(Slot),
    /// Another try is worth it once this block is written back.
    Dirty(u64),
    /// All are in use, or can not be written back.
    None,
}

impl Slots {
    pub fn new(most: u32) -> Self {
        Self {
            most,
            all: Vec::new(),
            free: Vec::new(),
            at: HashMap::new(),
            dirty: BTreeSet::new(),
            hand: 0,
        }
    }

    /// A slot for a new block.
    pub fn take(&mut self) -> Take {
        if let Some(slot) = self.free.pop() {
            return Take::Slot(slot);
        }
        if (self.all.len() as u64) < u64::from(self.most) {
            self.all.push(State::default());
            return Take::Slot(self.all.len() as u32 - 1);
        }
        // After one round all that nobody uses have been marked as not used.
        for _ in 0..2 * self.all.len() {
            let state = &mut self.all[self.hand];
            let idle = state.filled && state.pins == 0 && !state.stuck;
            if idle && !std::mem::take(&mut state.used) {
                let block = state.block;
                if self.dirty.contains(&block) {
                    // The hand stays: it is the next to go.
                    return Take::Dirty(block);
                }
                state.filled = false;
                self.at.remove(&block);
                let slot = self.hand as u32;
                self.advance();
                return Take::Slot(slot);
            }
            self.advance();
        }
        Take::None
    }

    fn advance(&mut self) {
        self.hand = (self.hand + 1) % self.all.len().max(1);
    }

    /// Give back a slot that was taken.
    pub fn give_back(&mut self, slot: Slot) {
        self.free.push(slot);
    }

    /// A slot that was taken holds `block` now.
    pub fn fill(&mut self, slot: Slot, block: u64, dirty: bool) {
        if let Some(state) = self.all.get_mut(slot as usize) {
            *state = State { block, filled: true, used: true, ..State::default() };
            self.at.insert(block, slot);
            if dirty {
                self.dirty.insert(block);
            }
        }
    }

    /// Where a block is. It stays there until [`Slots::unpin`].
    pub fn pin(&mut self, block: u64) -> Option<Slot> {
        let slot = self.pin_to_go(block)?;
        self.all.get_mut(slot as usize)?.used = true;
        Some(slot)
    }

    /// [`Slots::pin`] to write a block back, which makes it no later victim.
    pub fn pin_to_go(&mut self, block: u64) -> Option<Slot> {
        let slot = *self.at.get(&block)?;
        self.all.get_mut(slot as usize)?.pins += 1;
        Some(slot)
    }

    /// [`Slots::pin`] all blocks `from..to`, or none.
    pub fn pin_all(&mut self, from: u64, to: u64) -> Option<Vec<Slot>> {
        if !(from..to).all(|block| self.at.contains_key(&block)) {
            return None;
        }
        Some((from..to).filter_map(|block| self.pin(block)).collect())
    }

    /// The slot is not used by a call any more.
    pub fn unpin(&mut self, slot: Slot) {
        if let Some(state) = self.all.get_mut(slot as usize) {
            state.pins = state.pins.saturating_sub(1);
        }
    }

    /// How many of the blocks `from..to` are in no slot.
    pub fn missing(&self, from: u64, to: u64) -> usize {
        (from..to).filter(|block| !self.at.contains_key(block)).count()
    }

    /// Forget a block. Nobody uses its slot.
    pub fn forget(&mut self, block: u64) {
        self.dirty.remove(&block);
        if let Some(slot) = self.at.remove(&block)
            && let Some(state) = self.all.get_mut(slot as usize)
        {
            state.filled = false;
            self.free.push(slot);
        }
    }

    /// Which of the blocks `from..to` are in slots.
    pub fn within(&self, from: u64, to: u64) -> Vec<u64> {
        if to.saturating_sub(from) < self.at.len() as u64 {
            return (from..to).filter(|block| self.at.contains_key(block)).collect();
        }
        self.at.keys().copied().filter(|block| (from..to).contains(block)).collect()
    }

    pub fn is_dirty(&self, block: u64) -> bool {
        self.dirty.contains(&block)
    }

    /// Whether a block that is here is not below yet. One that is can not be stuck.
    pub fn set_dirty(&mut self, block: u64, dirty: bool) {
        if dirty {
            if self.at.contains_key(&block) {
                self.dirty.insert(block);
            }
        } else {
            self.dirty.remove(&block);
            self.set_stuck(block, false);
        }
    }

    /// Whether a block could (not) be written back.
    pub fn set_stuck(&mut self, block: u64, stuck: bool) {
        if let Some(slot) = self.at.get(&block)
            && let Some(state) = self.all.get_mut(*slot as usize)
        {
            state.stuck = stuck;
        }
    }

    /// The first dirty block of `from..to`, and the first after it that is not dirty.
    pub fn dirty_run(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        if from >= to {
            return None;
        }
        let mut blocks = self.dirty.range(from..to);
        let first = *blocks.next()?;
        let more = blocks.zip(first + 1..).take_while(|(block, next)| *block == next).count();
        Some((first, first + 1 + more as u64))
    }

    pub fn dirty_blocks(&self) -> u64 {
        self.dirty.len() as u64
    }

    pub fn most(&self) -> u64 {
        self.most.into()
    }

    pub fn filled(&self) -> u64 {
        self.at.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slot_that_was_not_used_goes_first_and_dirty_ones_are_named() {
        let mut slots = Slots::new(3);
        for block in 0..3 {
            let Take::Slot(slot) = slots.take() else { panic!("there are three") };
            slots.fill(slot, block, block == 1);
        }
        // All were used once; block 0 is used again after the hand has passed.
        assert_eq!(slots.take(), Take::Slot(0));
        slots.fill(0, 10, false);
        assert_eq!(slots.take(), Take::Dirty(1));
        assert_eq!(slots.take(), Take::Dirty(1), "until it is written back");
        slots.set_stuck(1, true);
        assert_eq!(slots.take(), Take::Slot(2));
        slots.fill(2, 12, false);
        slots.set_dirty(1, false);
        let pin = slots.pin(10).unwrap();
        assert_eq!(slots.take(), Take::Slot(1));
        assert_eq!(slots.take(), Take::Slot(2));
        assert_eq!(slots.take(), Take::None, "the last is in use");
        slots.unpin(pin);
        assert_eq!(slots.take(), Take::Slot(0));
        assert_eq!((slots.filled(), slots.dirty_blocks()), (0, 0));
        slots.set_dirty(1, true);
        assert_eq!(slots.dirty_blocks(), 0, "what is not here is not dirty");
    }

    #[test]
    fn runs_of_dirty_blocks_end_where_one_is_clean() {
        let mut slots = Slots::new(8);
        for block in [3, 4, 5, 7] {
            let Take::Slot(slot) = slots.take() else { panic!("there are eight") };
            slots.fill(slot, block, true);
        }
        assert_eq!(slots.dirty_run(0, 100), Some((3, 6)));
        assert_eq!(slots.dirty_run(4, 5), Some((4, 5)));
        assert_eq!(slots.dirty_run(6, u64::MAX), Some((7, 8)));
        assert_eq!(slots.dirty_run(8, 100), None);
        slots.forget(4);
        assert_eq!(slots.dirty_run(0, 100), Some((3, 4)));
        assert_eq!((slots.missing(3, 8), slots.within(0, 5)), (2, vec![3]));
    }
}
