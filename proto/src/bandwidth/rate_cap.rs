//! The rate cap of a run: how many bytes may be sent now.

use std::time::Duration;

use crate::time::{Timestamp, nanos};

/// The window within which a cap holds.
pub const WINDOW: Duration = Duration::from_millis(100);

/// Limits the bytes of every window of 100 ms, and spreads them within it.
///
/// Bytes are counted in slots of 1 ms. A datagram may be sent if it and the bytes of the last 101 slots,
/// which cover every window that ends with it, are within the cap. A token bucket spreads them: without it
/// the bytes of a window would leave at its beginning.
#[derive(Debug, Clone)]
pub struct RateCap {
    bytes_per_second: u64,
    slots: [u64; SLOTS],
    /// Bytes in all slots.
    total: u64,
    /// Number of the newest slot.
    newest: u64,
    /// When the bytes that were sent are paid for at the cap.
    paid_at: Timestamp,
    /// How far ahead of that bytes may be sent.
    burst: Duration,
}

const SLOT: Duration = Duration::from_millis(1);
const SLOTS: usize = 101;

impl RateCap {
    /// A cap in bytes per second; at least 1. The bytes of `burst`, and one datagram, may be sent at once.
    #[must_use]
    pub fn new(bytes_per_second: u64, burst: Duration, now: Timestamp) -> Self {
        let bytes_per_second = bytes_per_second.max(1);
        let newest = now.as_nanos() / nanos(SLOT);
        Self { bytes_per_second, slots: [0; SLOTS], total: 0, newest, paid_at: now, burst }
    }

    /// Bytes that every window may have.
    #[must_use]
    pub fn window_bytes(&self) -> u64 {
        (u128::from(self.bytes_per_second) * WINDOW.as_nanos() / 1_000_000_000).try_into().unwrap_or(u64::MAX)
    }

    /// Counts a datagram that is sent now, or returns when it may be sent: `None` if never, because it is
    /// larger than a window.
    ///
    /// # Errors
    /// The time at which to try again.
    pub fn take(&mut self, now: Timestamp, bytes: u64) -> Result<(), Option<Timestamp>> {
        if bytes > self.window_bytes() {
            return Err(None);
        }
        self.advance(now);
        if self.total + bytes > self.window_bytes() {
            return Err(Some(self.room_at(bytes)));
        }
        if self.paid_at > now + self.burst {
            return Err(Some(self.paid_at - self.burst));
        }
        self.paid_at = self.paid_at.max(now) + self.time_of(bytes);
        self.slots[Self::index(self.newest)] += bytes;
        self.total += bytes;
        Ok(())
    }

    /// How long `bytes` take at the cap.
    fn time_of(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Discards the slots that have left the window.
    fn advance(&mut self, now: Timestamp) {
        let newest = now.as_nanos() / nanos(SLOT);
        let passed = newest.saturating_sub(self.newest).min(SLOTS as u64);
        for step in 1..=passed {
            let slot = &mut self.slots[Self::index(self.newest + step)];
            self.total -= std::mem::take(slot);
        }
        self.newest = self.newest.max(newest);
    }

    /// When enough slots have left the window for `bytes`.
    fn room_at(&self, bytes: u64) -> Timestamp {
        let mut total = self.total + bytes;
        let oldest = self.newest.saturating_sub(SLOTS as u64 - 1);
        let mut number = oldest;
        while total > self.window_bytes() && number <= self.newest {
            total -= self.slots[Self::index(number)];
            number += 1;
        }
        // A slot leaves when the one that takes its place begins.
        Timestamp::from_nanos((number - 1 + SLOTS as u64) * nanos(SLOT))
    }

    fn index(number: u64) -> usize {
        usize::try_from(number % SLOTS as u64).expect("below the number of slots")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// Sends datagrams of `size` as fast as the cap allows, with pauses of the sender by `pause`. Returns the
    /// largest number of bytes in any window, and all bytes.
    fn drive(cap: u64, size: u64, span: Duration, mut pause: impl FnMut(u64) -> Duration) -> (u64, u64) {
        let start = Timestamp::from_nanos(123_456_789);
        let (mut now, mut limit) = (start, RateCap::new(cap, SLOT, start));
        let (mut sent, mut in_window, mut worst, mut all) = (VecDeque::new(), 0, 0, 0);
        let mut step = 0;
        while now < start + span {
            match limit.take(now, size) {
                Ok(()) => {
                    sent.push_back(now);
                    in_window += size;
                    all += size;
                    while now.since(sent[0]) >= WINDOW {
                        sent.pop_front();
                        in_window -= size;
                    }
                    worst = worst.max(in_window);
                }
                Err(again) => {
                    let again = again.expect("a datagram fits in a window");
                    assert!(again > now, "no progress");
                    now = again + pause(step);
                }
            }
            step += 1;
        }
        (worst, all)
    }

    #[test]
    fn no_window_exceeds_the_cap_and_most_of_it_is_used() {
        for cap in [125_000, 1_250_000, 12_500_000, 125_000_000] {
            for size in [125, 1_200, 1_472] {
                for seed in 1..4_u64 {
                    let pause = |step: u64| Duration::from_micros(step * seed * 7 % 900);
                    let (worst, all) = drive(cap, size, Duration::from_secs(2), pause);
                    assert!(worst <= cap / 10, "{cap} {size} {seed}: {worst}");
                    // One datagram of each window may not fit, and one slot in a hundred is lost.
                    let least = (cap / 10 - size) * 19 * 95 / 100;
                    assert!(all >= least, "{cap} {size} {seed}: {all} of {least}");
                }
            }
        }
    }

    #[test]
    fn bytes_of_a_window_are_spread_over_it() {
        let start = Timestamp::from_nanos(5_000_000);
        let mut cap = RateCap::new(10_000_000, SLOT, start);
        let mut at_once = 0;
        while cap.take(start, 1_000).is_ok() {
            at_once += 1;
        }
        // 1 ms at the cap is 10 datagrams; the bucket allows one more.
        assert!((10..=21).contains(&at_once), "{at_once}");
    }

    #[test]
    fn datagram_larger_than_a_window_is_never_sent() {
        let now = Timestamp::from_nanos(0);
        let mut cap = RateCap::new(10_000, SLOT, now);
        assert_eq!(cap.window_bytes(), 1_000);
        assert_eq!(cap.take(now, 1_001), Err(None));
        assert_eq!(cap.take(now, 1_000), Ok(()));
    }
}
