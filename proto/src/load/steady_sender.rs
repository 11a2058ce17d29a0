//! Sends datagrams at a constant rate.

use std::time::Duration;

use super::{BATCH_MAX, DATAGRAM_BYTES, Turn};
use crate::bandwidth::rate_cap::RateCap;
use crate::time::Timestamp;

/// What is late by more than this, because its host paused, is not sent any more. Chosen: a burst of as much
/// is smaller than the queue of any router.
const LATENESS_MAX: Duration = Duration::from_millis(5);

/// Pauses may be made up for: a window of 100 ms has at most this part of its rate, in percent, and one
/// datagram.
const WINDOW_PERCENT: u64 = 101;
const WINDOWS_PER_SECOND: u64 = 10;

/// The shortest pause. Chosen: 2,000 wake-ups per second, with room for one that is late.
const PAUSE: Duration = Duration::from_micros(500);

/// Sends datagrams when they are due.
#[derive(Debug, Clone)]
pub(super) struct SteadySender {
    cap: RateCap,
    /// Time between two datagrams.
    gap: Duration,
    /// When the next one is due.
    due: Timestamp,
    /// Datagrams that the cap has admitted and that were not sent yet.
    admitted: u16,
}

impl SteadySender {
    /// `rate`: in bytes of payload per second.
    pub(super) fn new(rate: u64, start: Timestamp) -> Self {
        let datagram = DATAGRAM_BYTES as u64;
        let more = datagram * WINDOWS_PER_SECOND;
        let most = (rate.saturating_mul(WINDOW_PERCENT) / 100).saturating_add(more);
        Self {
            cap: RateCap::new(most, LATENESS_MAX, start),
            gap: Duration::from_nanos(datagram * 1_000_000_000 / rate.max(1)),
            due: start,
            admitted: 0,
        }
    }

    /// What to send of the datagrams that are left.
    pub(super) fn turn(&mut self, now: Timestamp, left: u64) -> Turn {
        self.due = self.due.max(now - LATENESS_MAX);
        if now < self.due {
            return Turn::Wait(self.due.max(now + PAUSE));
        }
        let due = now.since(self.due).as_nanos().checked_div(self.gap.as_nanos()).unwrap_or(u128::MAX);
        let most = u128::from(left).min(BATCH_MAX.into());
        let count = u16::try_from(due.saturating_add(1).min(most)).unwrap_or(BATCH_MAX);
        while self.admitted < count {
            match self.cap.take(now, DATAGRAM_BYTES as u64) {
                Ok(()) => self.admitted += 1,
                Err(again) if self.admitted == 0 => {
                    return Turn::Wait(again.unwrap_or(Timestamp::NEVER).max(now + PAUSE));
                }
                Err(_) => break,
            }
        }
        Turn::Send { place: None, count: self.admitted }
    }

    pub(super) fn sent(&mut self, count: u16) {
        self.due = self.due + self.gap * count.into();
        self.admitted = self.admitted.saturating_sub(count);
    }
}
