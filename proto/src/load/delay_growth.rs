//! How much longer datagrams take at the end of a load than at its beginning: whether a queue grows.

use std::time::Duration;

use crate::time::{Timestamp, nanos};

/// The delay of the datagrams of a load over its time. The clocks of the ends need not agree.
#[derive(Debug, Clone, Default)]
pub struct DelayGrowth {
    /// Arrival minus departure of the first datagram, which is the zero of all delays.
    reference: Option<i64>,
    /// The shortest delay in each interval of [`BIN`], in nanoseconds; `None`: nothing arrived.
    bins: Vec<Option<i64>>,
}

/// The shortest delay of so much time counts. Chosen: a busy receiver reads later at times, and rarely for so
/// long.
const BIN: Duration = Duration::from_millis(10);

/// Maximum intervals; later ones are ignored. Chosen: those of the longest run.
const BINS_MAX: usize = 30_000;

/// Intervals in which datagrams must have arrived for a result.
const BINS_MIN: usize = 8;

impl DelayGrowth {
    /// Adds an arrival. `sent_at`: nanoseconds by the sender's clock, from its start.
    pub fn add(&mut self, sent_at: u64, at: Timestamp) {
        let delay = i64::try_from(at.as_nanos()).unwrap_or(i64::MAX).saturating_sub_unsigned(sent_at);
        let delay = delay.saturating_sub(*self.reference.get_or_insert(delay));
        let Ok(index) = usize::try_from(sent_at / nanos(BIN)) else { return };
        if index >= BINS_MAX {
            return;
        }
        if self.bins.len() <= index {
            self.bins.resize(index + 1, None);
        }
        let shortest = self.bins[index].get_or_insert(delay);
        *shortest = delay.min(*shortest);
    }

    /// The median delay in the last quarter of the time, minus that in the first quarter, in nanoseconds;
    /// `None` if too little arrived.
    #[must_use]
    pub fn growth(&self) -> Option<i64> {
        let known: Vec<i64> = self.bins.iter().copied().flatten().collect();
        if known.len() < BINS_MIN {
            return None;
        }
        let quarter = known.len() / 4;
        let median = |part: &[i64]| {
            let mut sorted = part.to_vec();
            sorted.sort_unstable();
            sorted.get(sorted.len() / 2).copied()
        };
        Some(median(&known[known.len() - quarter..])?.saturating_sub(median(&known[..quarter])?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_arrivals_tell_nothing() {
        let mut found = DelayGrowth::default();
        for number in 0..7 {
            found.add(number * 10_000_000, Timestamp::from_nanos(number * 11_000_000));
        }
        assert_eq!(found.growth(), None);
        found.add(u64::MAX, Timestamp::from_nanos(0));
        found.add(80_000_000, Timestamp::from_nanos(u64::MAX));
        assert!(found.growth().is_some_and(|growth| growth > i64::MAX / 2), "the last arrival is absurd");
    }
}
