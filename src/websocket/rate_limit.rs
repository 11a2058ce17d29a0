//! Limits the rate at which one client's messages are read.

use std::time::Duration;

use tokio::time::Instant;

/// Token bucket with a burst of a quarter of a second's messages (at least [`BURST`]), stored as the time at
/// which it is full again (generic cell rate algorithm, ITU-T I.371). It delays messages but never rejects
/// them.
#[derive(Debug)]
pub(super) struct RateLimit {
    cost: Duration,
    depth: Duration,
    full_at: Instant,
}

/// Minimum burst, for low rates.
const BURST: u32 = 16;

impl RateLimit {
    /// Returns a full bucket. `rate` is in messages per second and must not be 0.
    pub(super) fn new(rate: u32, now: Instant) -> Self {
        let cost = Duration::from_secs(1) / rate;
        Self { cost, depth: cost * (rate / 4).max(BURST), full_at: now }
    }

    /// Takes a token for one message. Returns how long to wait before reading the next one.
    pub(super) fn take(&mut self, now: Instant) -> Duration {
        self.full_at = self.full_at.max(now) + self.cost;
        self.full_at.duration_since(now).saturating_sub(self.depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_limited_and_slower_clients_are_not_delayed() {
        for rate in [1, 10, 1000, 1_000_000] {
            let begin = Instant::now();
            let (mut rate_limit, mut now) = (RateLimit::new(rate, begin), begin);
            let burst = (rate / 4).max(BURST);
            for _ in 0..burst {
                assert_eq!(rate_limit.take(now), Duration::ZERO, "{rate}/s");
            }
            for _ in 0..rate {
                now += rate_limit.take(now);
            }
            let took = now - begin;
            assert!(
                took <= Duration::from_secs(1) && took >= Duration::from_millis(990),
                "{rate}/s: {took:?}"
            );

            let mut calm = RateLimit::new(rate, begin);
            let mut now = begin;
            for _ in 0..100 {
                assert_eq!(calm.take(now), Duration::ZERO, "{rate}/s");
                now += Duration::from_secs(1) / rate;
            }
        }
    }
}
