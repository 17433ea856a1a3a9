//! Whether waiting for somebody is worth it.

/// Whether what is waited for comes in time.
#[derive(Default)]
pub struct Trust {
    /// Occasions on which nothing is waited for.
    skip: u32,
    /// How many that will be the next time.
    penalty: u32,
}

impl Trust {
    /// An occasion to wait: whether to.
    pub fn ask(&mut self) -> bool {
        let ready = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        ready
    }

    /// It came.
    pub fn kept(&mut self) {
        self.penalty /= 2;
    }

    /// It was waited for in vain.
    pub fn broken(&mut self) {
        self.penalty = (2 * self.penalty).clamp(4, 1024);
        self.skip = self.penalty;
    }
}

#[cfg(test)]
mod tests {
    use super::Trust;

    #[test]
    fn what_does_not_come_is_waited_for_seldom() {
        let mut trust = Trust::default();
        let mut waited = 0;
        for _ in 0..10_000 {
            if trust.ask() {
                waited += 1;
                trust.broken();
            }
        }
        assert!((1..=20).contains(&waited), "waited {waited} times");
        // Once it does, it is again, and being late now and then is forgiven.
        (0..2048).for_each(|_| _ = trust.ask());
        let mut waited = 0;
        for n in 0..1000 {
            let asked = trust.ask();
            waited += u32::from(asked);
            if asked && n % 100 == 99 {
                trust.broken();
            } else {
                trust.kept();
            }
        }
        assert!(waited > 900, "waited {waited} times");
    }
}
