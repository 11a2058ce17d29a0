//! When messages of a stream arrived, from what the kernel stamps: segments.
//!
//! A segment that comes while one in front of it is missing waits in the kernel, and keeps the stamp of when it came; once
//! the missing one is there, the kernel may even put both together under that earlier stamp. For whoever reads the stream
//! neither had arrived before the missing one.

use std::io;
use std::time::Duration;

use pathmeter_proto::machine::TimestampSource;
use pathmeter_proto::time::{Timestamp, WallTime};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::kernel;
use crate::clock::Clock;

/// A stamp that is this much older than our look at it is doubted. Chosen: what waits for a missing segment waits for a
/// round trip at least, and a shorter one is not worth a system call.
const SUSPECT_AGE: Duration = Duration::from_millis(1);

/// Arrivals on one connection.
#[derive(Debug)]
pub(super) struct Arrivals {
    /// The socket was empty then, or later: what comes arrived after that.
    empty_at: Timestamp,
    /// When the message in front of the next one arrived.
    latest: Timestamp,
    /// Segments that had come out of order when a stamp was last doubted.
    out_of_order: u64,
    /// Whether there have been more since, and the socket has not been empty.
    is_out_of_order: bool,
}

impl Arrivals {
    /// None until now.
    pub(super) fn new(at: Timestamp) -> Self {
        Self { empty_at: at, latest: at, out_of_order: 0, is_out_of_order: false }
    }

    /// Reads what is there into `room`, as [`kernel::receive`] does, where the runtime knows of something to read.
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

    /// When a message arrived that has just been read, by the stamp of its last byte or else by our own clock, and by which.
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
        // In order: nothing arrives before what is in front of it.
        self.latest = at.max(self.latest).min(now);
        (self.latest, by)
    }

    /// Whether a stamp may be from before something that was missing in front of it had come.
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
