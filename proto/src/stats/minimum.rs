//! The recent minimum of a series.

use std::time::Duration;

use crate::time::Timestamp;

/// The minimum over the last one to two windows. When all values become larger, the minimum follows within
/// two windows.
#[derive(Debug, Clone, Copy)]
pub struct WindowedMinimum {
    since: Timestamp,
    current: Option<Duration>,
    previous: Option<Duration>,
}

impl WindowedMinimum {
    /// Length of a window. Chosen: 60 s, several times the life of a queue and a fraction of the life of a
    /// route.
    pub const WINDOW: Duration = Duration::from_secs(60);

    /// A minimum without values.
    #[must_use]
    pub fn new(at: Timestamp) -> Self {
        Self { since: at, current: None, previous: None }
    }

    /// Adds a value and returns the minimum including it.
    pub fn add(&mut self, at: Timestamp, value: Duration) -> Duration {
        if at.since(self.since) >= Self::WINDOW {
            let is_recent = at.since(self.since) < 2 * Self::WINDOW;
            self.previous = self.current.filter(|_| is_recent);
            self.current = None;
            self.since = at;
        }
        let current = self.current.map_or(value, |least| least.min(value));
        self.current = Some(current);
        self.previous.map_or(current, |least| least.min(current))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minimum_follows_a_longer_path_within_two_windows() {
        let mut minimum = WindowedMinimum::new(Timestamp::from_nanos(0));
        let ms = Duration::from_millis;
        let at = |seconds: u64| Timestamp::from_nanos(seconds * 1_000_000_000);
        assert_eq!(minimum.add(at(1), ms(10)), ms(10));
        assert_eq!(minimum.add(at(2), ms(12)), ms(10));
        assert_eq!(minimum.add(at(61), ms(20)), ms(10));
        assert_eq!(minimum.add(at(122), ms(25)), ms(20));
        assert_eq!(minimum.add(at(500), ms(30)), ms(30));
    }

    #[test]
    fn value_is_discarded_after_one_to_two_windows() {
        let ms = Duration::from_millis;
        let minute = 60_000_000_000;
        let least = |second: u64, third: u64| {
            let mut minimum = WindowedMinimum::new(Timestamp::from_nanos(0));
            minimum.add(Timestamp::from_nanos(1), ms(10));
            minimum.add(Timestamp::from_nanos(second), ms(20));
            minimum.add(Timestamp::from_nanos(third), ms(30))
        };
        assert_eq!(least(minute, 2 * minute - 1), ms(10));
        assert_eq!(least(minute, 2 * minute), ms(20));
        assert_eq!(least(minute - 1, minute), ms(10), "the first two share a window");
        assert_eq!(least(2 * minute - 1, 2 * minute), ms(10));
        assert_eq!(least(2 * minute, 2 * minute), ms(20));
    }
}
