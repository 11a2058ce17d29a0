//! One direction of a bad link.

use super::random::Random;

/// What a link does to datagrams. Times in nanoseconds, shares between 0 and 1.
#[derive(Debug, Clone)]
pub struct Link {
    /// The least delay.
    pub delay: u64,
    /// Further delay, uniform up to this; more than the gap between datagrams reorders them.
    pub jitter: u64,
    /// Which are lost.
    pub loss: Loss,
    /// Share that arrives twice, each copy with its own delay.
    pub duplicates: f64,
    /// Share that arrives with one bit changed, as if the checksum had missed it.
    pub corruption: f64,
    /// Whether the bad state of [`Loss::Bursts`] holds.
    bad: bool,
}

/// Which datagrams are lost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// Each with this probability.
    Random(f64),
    /// The two states of Gilbert (1960): the chance to enter and to leave the bad state, in which all is lost.
    Bursts {
        /// Chance to enter the bad state, for each datagram.
        enter: f64,
        /// Chance to leave it.
        leave: f64,
    },
    /// Everything between two true times.
    Blackout {
        /// From.
        from: u64,
        /// To, exclusive.
        to: u64,
    },
}

/// A copy of a datagram that comes out at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// When, in true nanoseconds.
    pub at: u64,
    /// The bit that was changed.
    pub flipped: Option<usize>,
}

impl Link {
    /// A link that only delays.
    #[must_use]
    pub fn perfect(delay: u64) -> Self {
        Self { delay, jitter: 0, loss: Loss::Random(0.0), duplicates: 0.0, corruption: 0.0, bad: false }
    }

    /// What becomes of a datagram of `bytes` bytes that enters at `now`: no copy, one, or two.
    pub fn pass(&mut self, random: &mut Random, now: u64, bytes: usize) -> [Option<Delivery>; 2] {
        if self.loses(random, now) {
            return [None, None];
        }
        let copies = if random.chance(self.duplicates) { 2 } else { 1 };
        let mut deliver = |copy: usize| {
            let at = now + self.delay + random.below(self.jitter + 1);
            let bits = bytes as u64 * 8;
            #[expect(clippy::cast_possible_truncation, reason = "below the datagram's bits")]
            let flipped = random.chance(self.corruption).then(|| random.below(bits) as usize);
            (copy < copies).then_some(Delivery { at, flipped })
        };
        [deliver(0), deliver(1)]
    }

    fn loses(&mut self, random: &mut Random, now: u64) -> bool {
        match self.loss {
            Loss::Random(share) => random.chance(share),
            Loss::Bursts { enter, leave } => {
                self.bad = if self.bad { !random.chance(leave) } else { random.chance(enter) };
                self.bad
            }
            Loss::Blackout { from, to } => (from..to).contains(&now),
        }
    }
}
