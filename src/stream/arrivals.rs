//! Arrival times of the messages of a stream, from the kernel's timestamps of TCP segments.
//!
//! A segment that arrives while an earlier one is missing waits in the kernel and keeps its own timestamp.
//! When the missing segment arrives, the kernel may even merge both under the earlier timestamp. For the
//! reader of the stream, neither had arrived before the missing one.

use std::io;
use std::time::Duration;

use pathmeter_proto::machine::TimestampSource;
use pathmeter_proto::time::{Timestamp, WallTime};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::kernel;
use crate::clock::Clock;

/// A younger timestamp is believed whatever the order of the segments. Chosen: a segment that waits for a
/// missing one waits for at least one RTT, and on shorter ones the error is as small.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// Computes arrival times on one connection.
#[derive(Debug)]
pub(super) struct Arrivals {
    /// The socket was last seen empty at or after this time: data that is read now arrived later.
    empty_at: Timestamp,
    /// Arrival time of the previous message.
    latest: Timestamp,
    /// Segments that had arrived out of order by the last read of a message.
    out_of_order: Option<u64>,
    /// The same by a moment before the socket was last empty.
    out_of_order_before: Option<u64>,
}

impl Arrivals {
    /// Starts with an empty socket at `at`.
    pub(super) fn new(at: Timestamp) -> Self {
        Self { empty_at: at, latest: at, out_of_order: Some(0), out_of_order_before: Some(0) }
    }

    /// Reads available data into `buffer`, as [`kernel::receive`] does, if the runtime reports the socket as
    /// readable.
    pub(super) fn receive(
        &mut self,
        stream: &TcpStream,
        buffer: &mut [u8],
    ) -> io::Result<(usize, Option<WallTime>)> {
        stream.try_io(Interest::READABLE, || {
            let read_at = Clock::now();
            let received = kernel::receive(stream, buffer);
            if received.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                self.empty_at = read_at;
                self.out_of_order_before = self.out_of_order;
            }
            received
        })
    }

    /// Returns when the message that was just read arrived, and the source of this time: the kernel timestamp
    /// of its last byte, or else this process's clock.
    pub(super) fn arrival(
        &mut self,
        stream: &TcpStream,
        timestamp: Option<WallTime>,
        clock: &mut Clock,
    ) -> (Timestamp, TimestampSource) {
        let (now, _) = clock.read();
        self.out_of_order = kernel::out_of_order(stream);
        let timestamped = timestamp.map(|timestamp| clock.monotonic_of(timestamp, self.empty_at, now));
        let (at, by) = match timestamped {
            Some(at) if !self.is_misleading(at.max(self.latest), now) => (at, TimestampSource::Kernel),
            Some(_) | None => (now, TimestampSource::User),
        };
        // Messages are in order: none arrives before its predecessor.
        self.latest = at.max(self.latest).min(now);
        (self.latest, by)
    }

    /// Whether a timestamp may be earlier than the arrival of preceding data that was missing.
    fn is_misleading(&self, at: Timestamp, now: Timestamp) -> bool {
        if now.since(at) < WAIT_MIN {
            return false;
        }
        at < self.empty_at || self.out_of_order != self.out_of_order_before
    }
}
