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

/// A timestamp that is this much older than the read is checked for reordering. Chosen: a segment that waits
/// for a missing one waits for at least one RTT, and shorter RTTs are not worth a system call.
const SUSPECT_AGE: Duration = Duration::from_millis(1);

/// Computes arrival times on one connection.
#[derive(Debug)]
pub(super) struct Arrivals {
    /// The socket was last seen empty at or after this time: data that is read now arrived later.
    empty_at: Timestamp,
    /// Arrival time of the previous message.
    latest: Timestamp,
    /// Out-of-order segments as of the last check.
    out_of_order: u64,
    /// Whether more segments arrived out of order since the socket was last empty.
    is_out_of_order: bool,
}

impl Arrivals {
    /// Starts with an empty socket at `at`.
    pub(super) fn new(at: Timestamp) -> Self {
        Self { empty_at: at, latest: at, out_of_order: 0, is_out_of_order: false }
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
                self.is_out_of_order = false;
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
        let timestamped = timestamp.map(|timestamp| clock.monotonic_of(timestamp, self.empty_at, now));
        let (at, by) = match timestamped {
            Some(at) if !self.is_misleading(stream, at.max(self.latest), now) => {
                (at, TimestampSource::Kernel)
            }
            Some(_) | None => (now, TimestampSource::User),
        };
        // Messages are in order: none arrives before its predecessor.
        self.latest = at.max(self.latest).min(now);
        (self.latest, by)
    }

    /// Whether a timestamp may be earlier than the arrival of preceding data that was missing.
    fn is_misleading(&mut self, stream: &TcpStream, at: Timestamp, now: Timestamp) -> bool {
        if now.since(at) < SUSPECT_AGE {
            return false;
        }
        if at < self.empty_at {
            return true;
        }
        let out_of_order = kernel::out_of_order(stream).unwrap_or(self.out_of_order);
        self.is_out_of_order |= out_of_order != std::mem::replace(&mut self.out_of_order, out_of_order);
        self.is_out_of_order
    }
}
