//! What arrived, from sequence numbers alone.

/// The record of one session's arrivals, on 32-bit sequence numbers that may wrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceivedSequences {
    /// The first sequence number that arrived. About lower ones a clear bit says nothing.
    pub first: u32,
    /// The highest so far.
    pub highest: u32,
    /// Bit `i` is set when `highest − i` arrived.
    pub bitmap: u128,
    /// Different sequence numbers that arrived.
    pub unique: u32,
    /// Further copies (RFC 5560).
    pub duplicates: u32,
    /// Arrivals behind a higher sequence number (RFC 4737 section 3).
    pub reordered: u32,
}

/// Where an arrival stands among the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArrivalOrder {
    /// Higher than all before it.
    InOrder,
    /// Behind a higher one, for the first time.
    Reordered,
    /// Arrived before.
    Duplicate,
    /// So far behind that nobody remembers whether it arrived before; counted nowhere.
    Ancient,
}

impl ReceivedSequences {
    /// The record that begins with `sequence`.
    #[must_use]
    pub fn new(sequence: u32) -> Self {
        Self { first: sequence, highest: sequence, bitmap: 1, unique: 1, duplicates: 0, reordered: 0 }
    }

    /// Takes another arrival.
    pub fn add(&mut self, sequence: u32) -> ArrivalOrder {
        let ahead = sequence.wrapping_sub(self.highest);
        if ahead != 0 && ahead < 1 << 31 {
            self.bitmap = self.bitmap.checked_shl(ahead).unwrap_or(0) | 1;
            self.highest = sequence;
            self.unique = self.unique.wrapping_add(1);
            return ArrivalOrder::InOrder;
        }
        let behind = self.highest.wrapping_sub(sequence);
        let Some(bit) = 1_u128.checked_shl(behind) else { return ArrivalOrder::Ancient };
        if self.bitmap & bit != 0 {
            self.duplicates = self.duplicates.wrapping_add(1);
            return ArrivalOrder::Duplicate;
        }
        self.bitmap |= bit;
        self.unique = self.unique.wrapping_add(1);
        self.reordered = self.reordered.wrapping_add(1);
        ArrivalOrder::Reordered
    }

    /// Whether `sequence` would be the highest.
    #[must_use]
    pub fn is_newest(&self, sequence: u32) -> bool {
        let ahead = sequence.wrapping_sub(self.highest);
        ahead != 0 && ahead < 1 << 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_that_others_get_wrong() {
        // 1 5 2 3 4: three are reordered, as RFC 4737 counts; comparing with the previous arrival finds one.
        let mut received = ReceivedSequences::new(1);
        let orders: Vec<ArrivalOrder> = [5, 2, 3, 4, 3].iter().map(|s| received.add(*s)).collect();
        use ArrivalOrder::{Duplicate, InOrder, Reordered};
        assert_eq!(orders, [InOrder, Reordered, Reordered, Reordered, Duplicate]);
        assert_eq!((received.unique, received.duplicates, received.reordered), (5, 1, 3));
        assert_eq!(received.bitmap, 0b11111);
    }

    #[test]
    fn the_record_agrees_with_a_set_across_the_wrap() {
        for seed in 0..300_u64 {
            let start = u32::MAX - 100;
            let mut received = ReceivedSequences::new(start);
            let mut all = std::collections::BTreeSet::from([0_u64]);
            let (mut highest, mut duplicates, mut reordered) = (0_u64, 0, 0);
            for i in 0..400_u64 {
                let random = crate::schedule::mix(seed * 1_000 + i);
                let offset = (i + random % 60).saturating_sub(30);
                let order = received.add(start.wrapping_add(u32::try_from(offset).unwrap()));
                let expected = match (all.insert(offset), offset > highest) {
                    (false, _) => ArrivalOrder::Duplicate,
                    (true, true) => ArrivalOrder::InOrder,
                    (true, false) => ArrivalOrder::Reordered,
                };
                assert_eq!(order, expected, "seed {seed} arrival {i}");
                highest = highest.max(offset);
                duplicates += u32::from(order == ArrivalOrder::Duplicate);
                reordered += u32::from(order == ArrivalOrder::Reordered);
            }
            assert_eq!(received.unique as usize, all.len(), "seed {seed}");
            assert_eq!((received.duplicates, received.reordered), (duplicates, reordered), "seed {seed}");
            for behind in 0..128_u64.min(highest) {
                let bit = received.bitmap >> behind & 1 == 1;
                assert_eq!(bit, all.contains(&(highest - behind)), "seed {seed} {behind} behind");
            }
        }
    }

    #[test]
    fn what_lies_128_behind_is_ancient() {
        let mut received = ReceivedSequences::new(1_000);
        assert_eq!(received.add(1_000 - 128), ArrivalOrder::Ancient);
        assert_eq!(received.add(1_000 - 127), ArrivalOrder::Reordered);
        assert_eq!(received.add(5_000), ArrivalOrder::InOrder);
        assert_eq!(received.bitmap, 1);
    }
}
