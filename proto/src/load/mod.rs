//! The load of a run over UDP: what is sent when ([`LoadSender`]), and what arrives ([`LoadReceiver`]).
//!
//! [`dispersion`], [`delay_growth`] and [`check`] say what the arrivals mean.

pub mod check;
pub mod delay_growth;
pub mod dispersion;
mod seen;
mod steady_sender;
mod train_sender;

use std::time::Duration;

use self::delay_growth::DelayGrowth;
use self::dispersion::{TrainArrival, Trains};
use self::seen::SeenSequences;
use self::steady_sender::SteadySender;
use self::train_sender::{LONG_TRAIN_MAX, SHORT_TRAIN, SHORT_TRAINS, TrainSender};
use crate::bandwidth::StopReason;
use crate::time::{Timestamp, nanos};
use crate::wire::load::{Load, LoadResult, TrainPlace};

/// Payload of a datagram of the load in bytes. Chosen: what every path carries (QUIC, RFC 9000 section 14.1).
pub const DATAGRAM_BYTES: usize = 1_200;

/// Maximum datagrams that are sent with one system call. Chosen: below 64 KiB with their headers.
pub const BATCH_MAX: u16 = 50;

/// What a run sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Trains of datagrams back to back, with pauses: short ones, then a long one.
    Trains {
        /// Number of short trains.
        short: u16,
        /// Datagrams of the last train; 0: there is none.
        long: u16,
    },
    /// Datagrams at a constant rate.
    Steady {
        /// Bytes of payload per second.
        bytes_per_second: u64,
    },
}

/// The lowest rate in bytes per second at which a short train is within 100 ms.
pub const TRAIN_RATE_MIN: u64 = SHORT_TRAIN as u64 * DATAGRAM_BYTES as u64 * 10;

impl Pattern {
    /// The trains of a run that may send `bytes` of payload.
    #[must_use]
    pub fn trains(bytes: u64) -> Self {
        let datagrams = u16::try_from(bytes / DATAGRAM_BYTES as u64).unwrap_or(u16::MAX);
        let short = (datagrams / SHORT_TRAIN).min(SHORT_TRAINS);
        Self::Trains { short, long: (datagrams - short * SHORT_TRAIN).min(LONG_TRAIN_MAX) }
    }
}

/// Decides what a run sends.
#[derive(Debug, Clone)]
pub struct LoadSender {
    sender: Sender,
    start: Timestamp,
    end: Timestamp,
    /// Datagrams that may still be sent.
    datagrams_left: u64,
    sequence: u32,
}

#[derive(Debug, Clone)]
enum Sender {
    Trains(TrainSender),
    Steady(SteadySender),
}

/// What the sender of a pattern does next.
enum Turn {
    /// Send so many datagrams at once, the first of which has this place in a train.
    Send { place: Option<TrainPlace>, count: u16 },
    /// Nothing is to be sent before this time.
    Wait(Timestamp),
    /// Everything was sent.
    Finished,
}

/// What a sender does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadStep {
    /// Send so many datagrams at once, and call [`LoadSender::sent`].
    Send {
        /// The head of the first one. Sequence number and position increase by one for each.
        first: Load,
        /// Their number, at most [`BATCH_MAX`].
        count: u16,
    },
    /// Nothing is to be sent before this time.
    Wait(Timestamp),
    /// Everything was sent, or the time is over.
    Finished(StopReason),
}

impl LoadSender {
    /// A sender that begins at `start`, sends at most `bytes_max` bytes of payload, at most `rate_max` of
    /// them per second, and ends after `duration`.
    #[must_use]
    pub fn new(
        pattern: Pattern,
        bytes_max: u64,
        rate_max: Option<u64>,
        duration: Duration,
        start: Timestamp,
    ) -> Self {
        let sender = match pattern {
            Pattern::Trains { short, long } => Sender::Trains(TrainSender::new(short, long, rate_max, start)),
            Pattern::Steady { bytes_per_second } => {
                let rate = rate_max.map_or(bytes_per_second, |max| max.min(bytes_per_second));
                Sender::Steady(SteadySender::new(rate, start))
            }
        };
        let datagrams_left = bytes_max / DATAGRAM_BYTES as u64;
        Self { sender, start, end: start + duration, datagrams_left, sequence: 0 }
    }

    /// What to do next.
    pub fn step(&mut self, now: Timestamp) -> LoadStep {
        if now >= self.end {
            return LoadStep::Finished(StopReason::Time);
        }
        let left = self.datagrams_left;
        if left == 0 {
            return LoadStep::Finished(StopReason::Bytes);
        }
        let turn = match &mut self.sender {
            Sender::Trains(sender) => sender.turn(now, left),
            Sender::Steady(sender) => sender.turn(now, left),
        };
        match turn {
            Turn::Send { place, count } => {
                let sent_at = nanos(now.since(self.start));
                LoadStep::Send { first: Load { sequence: self.sequence, sent_at, place }, count }
            }
            Turn::Wait(until) => LoadStep::Wait(until.min(self.end)),
            Turn::Finished => LoadStep::Finished(StopReason::Bytes),
        }
    }

    /// So many datagrams of the last step were sent by now: as many as the kernel has accepted.
    pub fn sent(&mut self, count: u16, now: Timestamp) {
        self.datagrams_left = self.datagrams_left.saturating_sub(count.into());
        self.sequence = self.sequence.wrapping_add(count.into());
        match &mut self.sender {
            Sender::Trains(sender) => sender.sent(count, now),
            Sender::Steady(sender) => sender.sent(count),
        }
    }

    /// Bytes of payload that were sent.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        u64::from(self.sequence) * DATAGRAM_BYTES as u64
    }
}

/// Counts what arrives of a load.
#[derive(Debug, Clone, Default)]
pub struct LoadReceiver {
    seen: SeenSequences,
    bytes: u64,
    bytes_with_duplicates: u64,
    congestion_marks: u32,
    trains: Trains,
    delays: DelayGrowth,
}

impl LoadReceiver {
    /// Counts a datagram. `ecn`: the two lowest bits of its type of service.
    pub fn received(&mut self, load: Load, bytes: usize, ecn: u8, at: Timestamp) {
        self.bytes_with_duplicates += bytes as u64;
        if !self.seen.add(load.sequence) {
            return;
        }
        self.bytes += bytes as u64;
        self.congestion_marks += u32::from(ecn == CE);
        self.delays.add(load.sent_at, at);
        if let Some(place) = load.place {
            self.trains.add(TrainArrival { place, sent_at: load.sent_at, at });
        }
    }

    /// Bytes of payload that have arrived, without duplicates.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The same with duplicates: what the sender has used of the path.
    #[must_use]
    pub fn bytes_with_duplicates(&self) -> u64 {
        self.bytes_with_duplicates
    }

    /// Datagrams that a router has marked because of congestion.
    #[must_use]
    pub fn congestion_marks(&self) -> u32 {
        self.congestion_marks
    }

    /// What was measured so far. `is_host_limited`: whether the host has dropped datagrams.
    #[must_use]
    pub fn result(&self, is_host_limited: bool) -> LoadResult {
        LoadResult {
            congestion_marks: self.congestion_marks,
            is_host_limited,
            delay_growth: self.delays.growth().map(|nanos| i32::try_from(nanos / 1_000).unwrap_or(i32::MAX)),
            dispersion: self.trains.dispersion(DATAGRAM_BYTES as u64),
        }
    }
}

/// The codepoint of ECN that says that congestion was experienced.
const CE: u8 = 0b11;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::mix;

    const START: Timestamp = Timestamp::from_nanos(7_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);

    /// Sends everything to a receiver on the same host, with pauses of the host. Returns the reason of the
    /// end, and the times and lengths of the batches.
    fn run(mut sender: LoadSender, receiver: &mut LoadReceiver, seed: u64) -> (StopReason, Vec<(u64, u16)>) {
        let (mut now, mut batches) = (START, Vec::new());
        for step in 0.. {
            match sender.step(now) {
                LoadStep::Finished(reason) => return (reason, batches),
                LoadStep::Wait(until) => {
                    assert!(until > now, "no progress");
                    now = until + Duration::from_nanos(mix(seed ^ step) % 700_000 * (seed % 2));
                }
                LoadStep::Send { first, count } => {
                    assert!((1..=BATCH_MAX).contains(&count));
                    // The kernel does not always accept all of them.
                    let accepted = if seed.is_multiple_of(3) { count } else { count.div_ceil(2) };
                    for index in 0..accepted {
                        let place =
                            first.place.map(|place| TrainPlace { position: place.position + index, ..place });
                        let load = Load { sequence: first.sequence + u32::from(index), place, ..first };
                        receiver.received(load, DATAGRAM_BYTES, 0, now);
                    }
                    batches.push((now.as_nanos(), accepted));
                    sender.sent(accepted, now);
                    assert_eq!(sender.bytes(), receiver.bytes());
                }
            }
        }
        unreachable!()
    }

    #[test]
    fn steady_load_has_its_rate_and_never_more() {
        for rate in [125_000, 1_250_000, 125_000_000, 1_250_000_000] {
            for seed in 0..20 {
                let pattern = Pattern::Steady { bytes_per_second: rate };
                let mut receiver = LoadReceiver::default();
                let sender = LoadSender::new(pattern, u64::MAX, None, SECOND, START);
                let (reason, batches) = run(sender, &mut receiver, seed);
                assert_eq!(reason, StopReason::Time);
                let bytes = receiver.bytes();
                let least = rate - rate / 100 - 2_400;
                assert!(bytes <= rate + 1_200 && bytes >= least, "{rate} {seed}: {bytes}");
                let in_window = |from: u64| -> u64 {
                    let within = batches.iter().filter(|(at, _)| (from..from + 100_000_000).contains(at));
                    within.map(|(_, count)| u64::from(*count) * DATAGRAM_BYTES as u64).sum()
                };
                let step = (batches.len() / 200).max(1);
                let worst = batches.iter().step_by(step).map(|(at, _)| in_window(*at)).max().unwrap();
                assert!(worst <= rate / 10 * 101 / 100 + 1_200, "{rate} {seed}: {worst}");
            }
        }
    }

    #[test]
    fn trains_are_sent_at_once_and_within_the_cap() {
        for (rate_max, bytes, expected) in [
            (None, 300_000, vec![20, 20, 20, 20, 20, 150]),
            (None, 130_000, vec![20, 20, 20, 20, 20, 8]),
            (None, 100_000, vec![20, 20, 20, 20, 3]),
            // 40 datagrams in 100 ms.
            (Some(480_000), 300_000, vec![20, 20, 20, 20, 20, 40]),
        ] {
            for seed in 0..6 {
                let mut receiver = LoadReceiver::default();
                let sender = LoadSender::new(Pattern::trains(bytes), bytes, rate_max, 5 * SECOND, START);
                let (reason, batches) = run(sender, &mut receiver, seed);
                assert_eq!(reason, StopReason::Bytes);
                let trains = batches.chunk_by(|a, b| a.0 == b.0);
                let lengths: Vec<u16> =
                    trains.map(|train| train.iter().map(|(_, count)| count).sum()).collect();
                assert_eq!(lengths, expected, "{rate_max:?} {bytes}");
                let begins: Vec<u64> = batches.chunk_by(|a, b| a.0 == b.0).map(|train| train[0].0).collect();
                assert!(begins.windows(2).all(|pair| pair[1] - pair[0] >= 40_000_000), "{begins:?}");
                let in_window = |from: u64| -> u64 {
                    let within = batches.iter().filter(|(at, _)| (from..from + 100_000_000).contains(at));
                    within.map(|(_, count)| u64::from(*count) * DATAGRAM_BYTES as u64).sum()
                };
                let most = rate_max.map_or(u64::MAX, |rate| rate / 10);
                assert!(begins.iter().all(|at| in_window(*at) <= most), "{rate_max:?} {begins:?}");
            }
        }
    }

    #[test]
    fn run_ends_with_its_bytes_or_its_time() {
        let pattern = Pattern::Steady { bytes_per_second: 12_000_000 };
        let mut receiver = LoadReceiver::default();
        let sender = LoadSender::new(pattern, 600_000, None, SECOND, START);
        assert_eq!(run(sender, &mut receiver, 0).0, StopReason::Bytes);
        assert_eq!(receiver.bytes(), 600_000);
        let nothing = LoadSender::new(pattern, 1_199, None, SECOND, START);
        assert_eq!(run(nothing, &mut LoadReceiver::default(), 0).0, StopReason::Bytes);
    }

    #[test]
    fn repeated_datagrams_do_not_count() {
        let mut receiver = LoadReceiver::default();
        for sequence in [0, 1, 1, 3, 2, 3, 0] {
            let ecn = u8::try_from(sequence).unwrap();
            receiver.received(Load { sequence, ..Load::default() }, 100, ecn, START);
        }
        assert_eq!((receiver.bytes(), receiver.bytes_with_duplicates()), (400, 700));
        assert_eq!(
            receiver.result(true),
            LoadResult { congestion_marks: 1, is_host_limited: true, ..LoadResult::default() }
        );
    }
}
