//! Limits the rate at which one client's messages are read.

use std::time::Duration;

use pathmeter_proto::time::{Timestamp, nanos};
use pathmeter_proto::token_bucket::{TokenBucket, TokenRate};
use tokio::time::Instant;

/// Delays messages above the rate, but never rejects them.
#[derive(Debug)]
pub(super) struct RateLimit {
    rate: TokenRate,
    bucket: TokenBucket,
    /// The origin of the bucket's times.
    begin: Instant,
}

impl RateLimit {
    /// Returns a full bucket. `rate` is in messages per second and must not be 0.
    pub(super) fn new(rate: u32, now: Instant) -> Self {
        let rate = TokenRate::per_second(rate.into()).expect("a rate is at least 1");
        Self { rate, bucket: TokenBucket::default(), begin: now }
    }

    /// Takes a token for one message. Returns how long to wait before reading the next one.
    pub(super) fn take(&mut self, now: Instant) -> Duration {
        let now = Timestamp::from_nanos(nanos(now.duration_since(self.begin)));
        self.bucket.reserve(self.rate, now).since(now)
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
            let burst = (rate / 4).max(16);
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
