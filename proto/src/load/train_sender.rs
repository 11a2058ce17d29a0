//! Sends trains.

use std::time::Duration;

use super::{BATCH_MAX, DATAGRAM_BYTES, Turn};
use crate::bandwidth::rate_cap::RateCap;
use crate::schedule::mix;
use crate::time::{Timestamp, nanos};
use crate::wire::load::TrainPlace;

/// Datagrams of a short train, and number of short trains. Chosen: five dispersions from 120 of 300 kB.
pub(super) const SHORT_TRAIN: u16 = 20;
pub(super) const SHORT_TRAINS: u16 = 5;

/// Datagrams of the long train at most; a run sends no more. Chosen: 3 MB, more than any token bucket that we
/// know lets pass at once.
pub(super) const LONG_TRAIN_MAX: u16 = 2_500;

/// Pause between two trains: at least this, and at most twice as much. Chosen: a short train has left a link
/// of 5 Mbit/s by then.
const TRAIN_PAUSE: Duration = Duration::from_millis(40);

/// How far ahead of its rate a train may be sent. It is within the cap of 100 ms as a whole, so any more
/// would do.
const BURST: Duration = Duration::from_secs(1);

/// Sends trains back to back, with pauses.
#[derive(Debug, Clone)]
pub(super) struct TrainSender {
    /// Number of short trains, and datagrams of the long one after them.
    short: u16,
    long: u16,
    /// The limit of the rate; `None`: there is none.
    cap: Option<RateCap>,
    /// The place of the next datagram. A length of 0: the train has not begun.
    next: TrainPlace,
    /// When the next train may begin.
    begins: Timestamp,
}

impl TrainSender {
    pub(super) fn new(short: u16, long: u16, rate_max: Option<u64>, start: Timestamp) -> Self {
        let cap = rate_max.map(|rate| RateCap::new(rate, BURST, start));
        Self { short, long, cap, next: TrainPlace::default(), begins: start }
    }

    /// What to send of the datagrams that are left.
    pub(super) fn turn(&mut self, now: Timestamp, left: u64) -> Turn {
        if self.next.length == 0 {
            if now < self.begins {
                return Turn::Wait(self.begins);
            }
            let wanted = match self.next.train {
                train if train < self.short => SHORT_TRAIN,
                train if train == self.short => self.long,
                _ => 0,
            };
            // A train that the cap does not admit as a whole is shorter.
            let whole = self.cap.as_ref().map_or(u64::MAX, |cap| cap.window_bytes() / DATAGRAM_BYTES as u64);
            let length = u16::try_from(whole.min(left).min(wanted.into())).unwrap_or(wanted);
            if length == 0 {
                return Turn::Finished;
            }
            let bytes = u64::from(length) * DATAGRAM_BYTES as u64;
            if let Some(Err(again)) = self.cap.as_mut().map(|cap| cap.take(now, bytes)) {
                return Turn::Wait(again.unwrap_or(Timestamp::NEVER));
            }
            self.next = TrainPlace { position: 0, length, ..self.next };
        }
        let count = (self.next.length - self.next.position).min(BATCH_MAX);
        Turn::Send { place: Some(self.next), count }
    }

    pub(super) fn sent(&mut self, count: u16, now: Timestamp) {
        self.next.position = self.next.position.saturating_add(count);
        if self.next.position >= self.next.length {
            // Not in step with anything periodic on the path.
            let more = Duration::from_nanos(mix(now.as_nanos()) % nanos(TRAIN_PAUSE));
            self.begins = now + TRAIN_PAUSE + more;
            self.next = TrainPlace { train: self.next.train.saturating_add(1), ..TrainPlace::default() };
        }
    }
}
