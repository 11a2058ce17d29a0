//! Arrival record of a session, from sequence numbers alone.

/// Arrival record of one session, with 32-bit sequence numbers that may wrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceivedSequences {
    /// The first sequence number that arrived. For lower ones, a clear bit does not mean that they are
    /// missing.
    pub first: u32,
    /// The highest sequence number that arrived.
    pub highest: u32,
    /// Bit `i` is set if sequence number `highest − i` arrived.
    pub bitmap: u128,
    /// Number of distinct sequence numbers that arrived.
    pub unique: u32,
    /// Number of duplicate arrivals (RFC 5560).
    pub duplicates: u32,
    /// Number of arrivals after a higher sequence number (RFC 4737 section 3).
    pub reordered: u32,
}

/// Position of an arrival relative to the earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArrivalOrder {
    /// Higher than all earlier ones.
    InOrder,
    /// After a higher one, for the first time.
    Reordered,
    /// Has arrived before.
    Duplicate,
    /// So far below the highest that the record does not cover it; not counted.
    Ancient,
}

impl ReceivedSequences {
    /// A record whose first arrival is `sequence`.
    #[must_use]
    pub fn new(sequence: u32) -> Self {
        Self { first: sequence, highest: sequence, bitmap: 1, unique: 1, duplicates: 0, reordered: 0 }
    }

    /// Adds an arrival.
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

    /// Whether `sequence` is higher than all arrivals so far.
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
    fn reordering_is_counted_against_the_highest_and_not_the_previous_arrival() {
        // 1 5 2 3 4: RFC 4737 counts three reordered arrivals; comparing only with the previous arrival finds
        // one.
        let mut received = ReceivedSequences::new(1);
        let orders: Vec<ArrivalOrder> = [5, 2, 3, 4, 3].iter().map(|s| received.add(*s)).collect();
        use ArrivalOrder::{Duplicate, InOrder, Reordered};
        assert_eq!(orders, [InOrder, Reordered, Reordered, Reordered, Duplicate]);
        assert_eq!((received.unique, received.duplicates, received.reordered), (5, 1, 3));
        assert_eq!(received.bitmap, 0b11111);
    }

    #[test]
    fn record_agrees_with_a_set_across_the_wrap() {
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
    fn arrival_128_below_the_highest_is_ancient() {
        let mut received = ReceivedSequences::new(1_000);
        assert_eq!(received.add(1_000 - 128), ArrivalOrder::Ancient);
        assert_eq!(received.add(1_000 - 127), ArrivalOrder::Reordered);
        assert_eq!(received.add(5_000), ArrivalOrder::InOrder);
        assert_eq!(received.bitmap, 1);
    }

    #[test]
    fn number_half_the_range_away_is_not_newer() {
        let mut received = ReceivedSequences::new(5);
        assert!(received.is_newest(5 + (1 << 31) - 1));
        assert!(!received.is_newest(5 + (1 << 31)));
        assert_eq!(received.add(5 + (1 << 31)), ArrivalOrder::Ancient);
        assert_eq!(received.add(5 + (1 << 31) - 1), ArrivalOrder::InOrder);
    }
}
