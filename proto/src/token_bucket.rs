//! Token buckets: how fast something may happen in the long run, and how often at once.

use std::time::Duration;

use crate::time::Timestamp;

/// A rate limit. It applies in the long run; a burst is what may happen at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRate {
    /// Average time between two tokens; zero: no limit.
    pub spacing: Duration,
    /// Number of tokens that may be taken without a pause; at least 1.
    pub burst: u32,
}

impl TokenRate {
    /// No limit.
    pub const UNLIMITED: Self = Self { spacing: Duration::ZERO, burst: 1 };

    /// Smallest burst of messages and requests, for low rates.
    const BURST_MIN: u64 = 16;

    /// The limit of messages or requests per second: a burst has those of a quarter of a second, and at least
    /// 16. `None` if the rate is 0, which allows nothing.
    #[must_use]
    pub fn per_second(rate: u64) -> Option<Self> {
        let spacing = 1_000_000_000_u64.checked_div(rate)?;
        let is_exact = spacing.checked_mul(rate) == Some(1_000_000_000);
        let burst = u32::try_from((rate / 4).max(Self::BURST_MIN)).unwrap_or(u32::MAX);
        Some(Self { spacing: Duration::from_nanos(spacing + u64::from(!is_exact)), burst })
    }

    /// Time until a bucket that was just emptied is full again.
    fn capacity(self) -> Duration {
        self.spacing.saturating_mul(self.burst.max(1))
    }
}

/// A token bucket. Its state is the time at which it will be full again (the generic cell rate algorithm,
/// ITU-T I.371).
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenBucket {
    full_at: Timestamp,
}

impl TokenBucket {
    /// When the next token becomes valid, at least `now`.
    #[must_use]
    pub fn available_at(&self, rate: TokenRate, now: Timestamp) -> Timestamp {
        now.max(self.full_at + rate.spacing - rate.capacity())
    }

    /// Takes a token; returns when it becomes valid, at least `now`.
    pub fn reserve(&mut self, rate: TokenRate, now: Timestamp) -> Timestamp {
        let at = self.available_at(rate, now);
        self.full_at = self.full_at.max(now) + rate.spacing;
        at
    }

    /// Takes back the tokens that are not valid yet.
    pub fn cancel(&mut self, rate: TokenRate, now: Timestamp) {
        self.full_at = self.full_at.min(now + rate.capacity());
    }

    /// Takes over the tokens that were taken from another bucket.
    pub(crate) fn inherit(&mut self, other: Self) {
        self.full_at = self.full_at.max(other.full_at);
    }

    /// Whether no token was taken recently.
    pub(crate) fn is_full(&self, now: Timestamp) -> bool {
        self.full_at <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_nanos(5_000_000_000);

    fn take(bucket: &mut TokenBucket, rate: TokenRate, now: Timestamp) -> bool {
        let is_available = bucket.available_at(rate, now) == now;
        is_available && bucket.reserve(rate, now) == now
    }

    #[test]
    fn bucket_holds_tokens_of_a_quarter_second_and_at_least_sixteen() {
        let full = |rate| {
            let Some(rate) = TokenRate::per_second(rate) else { return 0 };
            let mut bucket = TokenBucket::default();
            (0..10_000).take_while(|_| take(&mut bucket, rate, NOW)).count()
        };
        assert_eq!([0, 1, 63, 64, 68, 400, 4_000].map(full), [0, 16, 16, 16, 17, 100, 1_000]);
    }

    #[test]
    fn empty_bucket_refills_one_token_per_interval_of_the_rate() {
        let (mut bucket, rate) = (TokenBucket::default(), TokenRate::per_second(3).unwrap());
        assert!((0..100).any(|_| !take(&mut bucket, rate, NOW)));
        let interval = Duration::from_nanos(333_333_334);
        assert!(!take(&mut bucket, rate, NOW + (interval - Duration::from_nanos(1))));
        assert!(take(&mut bucket, rate, NOW + interval));
        assert!(!take(&mut bucket, rate, NOW + interval));
    }

    #[test]
    fn rate_above_one_per_nanosecond_is_one_per_nanosecond() {
        assert_eq!(TokenRate::per_second(u64::MAX).unwrap().spacing, Duration::from_nanos(1));
        assert_eq!(TokenRate::per_second(1_000).unwrap().spacing, Duration::from_millis(1));
    }
}
