//! Detection of flows with recent loss.

use std::time::Duration;

use crate::time::Timestamp;

/// Loss counts over the last one to two windows.
#[derive(Debug, Clone, Copy)]
pub struct RecentLoss {
    since: Timestamp,
    current: LossCounts,
    previous: LossCounts,
}

#[derive(Debug, Clone, Copy, Default)]
struct LossCounts {
    decided: u32,
    lost: u32,
}

impl RecentLoss {
    /// Length of a window. Chosen: 30 s, so that loss on a flow shows within one or two scrapes and a flow
    /// that has recovered is no longer lossy after a minute.
    pub const WINDOW: Duration = Duration::from_secs(30);

    /// An estimator without any datagrams.
    #[must_use]
    pub fn new(at: Timestamp) -> Self {
        Self { since: at, current: LossCounts::default(), previous: LossCounts::default() }
    }

    /// Adds the verdict of one datagram at `at`.
    pub fn add(&mut self, at: Timestamp, is_lost: bool) {
        if at.since(self.since) >= Self::WINDOW {
            self.previous = std::mem::take(&mut self.current);
            self.since = at;
        }
        self.current.decided = self.current.decided.saturating_add(1);
        self.current.lost = self.current.lost.saturating_add(u32::from(is_lost));
    }

    /// Whether at least two datagrams and at least 1 % of all were lost; a single loss is not enough.
    #[must_use]
    pub fn is_lossy(&self) -> bool {
        let lost = u64::from(self.current.lost) + u64::from(self.previous.lost);
        let decided = u64::from(self.current.decided) + u64::from(self.previous.decided);
        lost >= 2 && lost * 100 >= decided
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flow_is_lossy_from_the_second_loss_until_two_windows_without_loss() {
        let at = |seconds: u64| Timestamp::from_nanos(seconds * 1_000_000_000);
        let mut loss = RecentLoss::new(at(0));
        loss.add(at(1), true);
        assert!(!loss.is_lossy());
        loss.add(at(2), true);
        assert!(loss.is_lossy());
        loss.add(at(31), false);
        assert!(loss.is_lossy());
        loss.add(at(62), false);
        assert!(!loss.is_lossy());
    }

    #[test]
    fn one_percent_is_lossy_and_less_is_not() {
        let at = |seconds: u64| Timestamp::from_nanos(seconds * 1_000_000_000);
        for (decided, is_lossy) in [(200, true), (201, false)] {
            let mut loss = RecentLoss::new(at(0));
            // Half of them are in the previous window.
            for number in 0..decided {
                let time = if number < decided / 2 { 1 } else { 31 };
                loss.add(at(time), number == 0 || number == decided - 1);
            }
            assert_eq!(loss.is_lossy(), is_lossy, "2 of {decided}");
        }
    }

    #[test]
    fn window_ends_after_thirty_seconds() {
        let at = Timestamp::from_nanos;
        const SECOND: u64 = 1_000_000_000;
        for (second, third, is_lossy) in
            [(30 * SECOND - 1, 60 * SECOND - 2, true), (30 * SECOND, 60 * SECOND, false)]
        {
            let mut loss = RecentLoss::new(at(0));
            loss.add(at(1), true);
            loss.add(at(1), true);
            loss.add(at(second), false);
            loss.add(at(third), false);
            assert_eq!(loss.is_lossy(), is_lossy);
        }
    }
}
