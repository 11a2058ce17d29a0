//! Whether a path carries a rate: a steady load passes without loss and without a queue that grows.

use std::time::Duration;

use super::DATAGRAM_BYTES;
use crate::time::nanos;
use crate::wire::load::LoadResult;

/// A load that was sent to find out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckedLoad {
    /// The rate that is asked about, in bytes of payload per second.
    pub rate: u64,
    /// Bytes of payload that were sent.
    pub sent: u64,
    /// How long that took.
    pub duration: Duration,
    /// Bytes of payload that have arrived, without duplicates.
    pub received: u64,
}

/// Whether the path carries the rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CheckVerdict {
    /// It does.
    Passed,
    /// It does not: more was lost than [`LOSS_ONE_IN`] allows.
    Loss,
    /// It does not: a queue grew.
    Delay,
    /// It does not: routers marked as many datagrams as stop a run, because of congestion.
    Congestion,
    /// Unknown: the sender was slower than the rate.
    Sender,
    /// Unknown: the receiver's host dropped datagrams, or too few arrived.
    Receiver,
    /// Unknown: the run ended before it could tell.
    Stopped,
}

/// Routers report congestion if this many datagrams, and one in so many, are marked. Chosen: more than other
/// traffic causes on a path that is not full.
const MARKS_MIN: u64 = 10;
const MARKED_ONE_IN: u64 = 100;

/// Whether so many marks of so many datagrams are congestion.
#[must_use]
pub const fn is_congested(marks: u64, datagrams: u64) -> bool {
    marks >= MARKS_MIN && marks.saturating_mul(MARKED_ONE_IN) >= datagrams
}

/// A path may lose one byte in so many. Chosen: what radio links lose without being full.
pub const LOSS_ONE_IN: u64 = 1_000;

/// A queue has grown if datagrams take this much longer at the end. Chosen: a busy receiver varies by less.
pub const GROWTH_MIN: Duration = Duration::from_millis(2);

/// Clocks of two hosts may drift apart by one part in so many. Chosen: twice what a quartz does.
const DRIFT_ONE_IN: u32 = 5_000;

/// The sender was fast enough if it sent this part of the rate, in percent.
const SENT_PERCENT: u128 = 97;

impl CheckVerdict {
    /// The verdict about a load.
    #[must_use]
    pub fn of(load: &CheckedLoad, result: &LoadResult) -> Self {
        let CheckedLoad { rate, sent, duration, received } = *load;
        let lost = sent.saturating_sub(received);
        if result.is_host_limited {
            return Self::Receiver;
        }
        if lost.saturating_mul(LOSS_ONE_IN) > sent {
            return Self::Loss;
        }
        let growth = result.delay_growth.and_then(|micros| u64::try_from(micros).ok());
        if growth.map(Duration::from_micros) >= Some(GROWTH_MIN + duration / DRIFT_ONE_IN) {
            return Self::Delay;
        }
        if is_congested(result.congestion_marks.into(), received / DATAGRAM_BYTES as u64) {
            return Self::Congestion;
        }
        let wanted = u128::from(rate) * u128::from(nanos(duration)) / 1_000_000_000;
        if u128::from(sent) * 100 < wanted * SENT_PERCENT {
            return Self::Sender;
        }
        if result.delay_growth.is_none() { Self::Receiver } else { Self::Passed }
    }

    /// Whether the path carries the rate; `None`: unknown.
    #[must_use]
    pub const fn has_passed(self) -> Option<bool> {
        match self {
            Self::Passed => Some(true),
            Self::Loss | Self::Delay | Self::Congestion => Some(false),
            Self::Sender | Self::Receiver | Self::Stopped => None,
        }
    }

    /// The value of the JSON field `check`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Loss => "loss",
            Self::Delay => "delay",
            Self::Congestion => "congestion",
            Self::Sender => "sender",
            Self::Receiver => "receiver",
            Self::Stopped => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: CheckedLoad = CheckedLoad {
        rate: 1_000_000,
        sent: 495_000,
        duration: Duration::from_millis(500),
        received: 495_000,
    };
    const RESULT: LoadResult =
        LoadResult { congestion_marks: 0, is_host_limited: false, delay_growth: Some(0), dispersion: None };

    #[test]
    fn verdict_names_what_was_seen() {
        let of = |load: CheckedLoad, result: LoadResult| CheckVerdict::of(&load, &result);
        assert_eq!(of(LOAD, RESULT), CheckVerdict::Passed);
        assert_eq!(of(CheckedLoad { received: 494_505, ..LOAD }, RESULT), CheckVerdict::Passed);
        assert_eq!(of(CheckedLoad { received: 494_504, ..LOAD }, RESULT), CheckVerdict::Loss);
        let grown = |micros| LoadResult { delay_growth: Some(micros), ..RESULT };
        assert_eq!(of(LOAD, grown(2_099)), CheckVerdict::Passed);
        assert_eq!(of(LOAD, grown(2_100)), CheckVerdict::Delay);
        assert_eq!(of(LOAD, grown(-5_000)), CheckVerdict::Passed);
        assert_eq!(of(LOAD, LoadResult { congestion_marks: 9, ..RESULT }), CheckVerdict::Passed);
        assert_eq!(of(LOAD, LoadResult { congestion_marks: 10, ..RESULT }), CheckVerdict::Congestion);
        let slow = CheckedLoad { sent: 484_999, received: 484_999, ..LOAD };
        assert_eq!(of(slow, RESULT), CheckVerdict::Sender);
        assert_eq!(of(slow, grown(9_000)), CheckVerdict::Delay, "not even what was sent is carried");
        assert_eq!(of(LOAD, LoadResult { is_host_limited: true, ..grown(9_000) }), CheckVerdict::Receiver);
        let marked = LoadResult { congestion_marks: 10, ..grown(9_000) };
        assert_eq!(of(LOAD, marked), CheckVerdict::Delay);
        assert_eq!(of(CheckedLoad { received: 400_000, ..LOAD }, marked), CheckVerdict::Loss);
        assert_eq!(of(slow, LoadResult { congestion_marks: 10, ..RESULT }), CheckVerdict::Congestion);
        assert_eq!(of(CheckedLoad { received: 0, ..LOAD }, RESULT), CheckVerdict::Loss);
        assert_eq!(of(LOAD, LoadResult { delay_growth: None, ..RESULT }), CheckVerdict::Receiver);
    }

    #[test]
    fn clocks_that_drift_apart_are_no_queue() {
        let long = CheckedLoad {
            sent: 100_000_000,
            received: 100_000_000,
            duration: Duration::from_secs(100),
            ..LOAD
        };
        let drifted = LoadResult { delay_growth: Some(20_000), ..RESULT };
        assert_eq!(CheckVerdict::of(&long, &drifted), CheckVerdict::Passed);
    }
}
