//! The smallest value of late.

use std::time::Duration;

use crate::time::Timestamp;

/// The minimum over the last one to two windows: a path that became longer is believed after two windows at most.
#[derive(Debug, Clone, Copy)]
pub struct WindowedMinimum {
    since: Timestamp,
    current: Option<Duration>,
    previous: Option<Duration>,
}

impl WindowedMinimum {
    /// Length of a window. Chosen: 60 s, several times what queues stand, a fraction of what routes stand.
    pub const WINDOW: Duration = Duration::from_secs(60);

    /// An empty one.
    #[must_use]
    pub fn new(at: Timestamp) -> Self {
        Self { since: at, current: None, previous: None }
    }

    /// Takes a value and returns the minimum that includes it.
    pub fn add(&mut self, at: Timestamp, value: Duration) -> Duration {
        if at.since(self.since) >= Self::WINDOW {
            let fresh = at.since(self.since) < 2 * Self::WINDOW;
            self.previous = self.current.filter(|_| fresh);
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
    fn a_longer_path_is_believed_after_two_windows() {
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
    fn window_ends_after_a_minute_and_the_one_before_is_forgotten_after_two() {
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
