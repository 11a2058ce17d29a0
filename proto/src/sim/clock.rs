//! The clocks of a simulated host.

use crate::time::{Timestamp, WallTime};

/// A monotonic clock with a constant frequency error, and a wall clock derived from it that is stepped.
#[derive(Debug, Clone, Default)]
pub struct HostClock {
    /// Frequency error of the monotonic clock in parts per million; positive: it runs fast.
    pub skew_ppm: i64,
    /// Reading of the monotonic clock at true time 0, in nanoseconds.
    pub origin: u64,
    /// Steps of the wall clock: true time and size, both in nanoseconds. Sorted by time.
    pub steps: Vec<(u64, i64)>,
}

/// Wall time at true time 0: 2026-01-01.
const EPOCH: u64 = 1_767_225_600_000_000_000;

impl HostClock {
    /// Reading of the monotonic clock at a true time.
    #[must_use]
    pub fn monotonic(&self, truth: u64) -> Timestamp {
        let drift = i128::from(truth) * i128::from(self.skew_ppm) / 1_000_000;
        let reading = i128::from(self.origin) + i128::from(truth) + drift;
        Timestamp::from_nanos(u64::try_from(reading).expect("simulations last days"))
    }

    /// Reading of the wall clock at a true time.
    #[must_use]
    pub fn wall(&self, truth: u64) -> WallTime {
        let stepped: i64 = self.steps.iter().take_while(|(at, _)| *at <= truth).map(|(_, by)| by).sum();
        WallTime::from_nanos((EPOCH + self.monotonic(truth).as_nanos()).saturating_add_signed(stepped))
    }

    /// The first true time at which the monotonic clock reads `reading` or more.
    #[must_use]
    pub fn truth(&self, reading: Timestamp) -> u64 {
        let elapsed = i128::from(reading.as_nanos()) - i128::from(self.origin);
        let guess = elapsed * 1_000_000 / (1_000_000 + i128::from(self.skew_ppm));
        let mut truth = u64::try_from(guess).unwrap_or(0).saturating_sub(2);
        while self.monotonic(truth) < reading {
            truth += 1;
        }
        truth
    }
}
