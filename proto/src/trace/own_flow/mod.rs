//! Traces on an established TCP connection, with segments that the peer ignores.
//!
//! A segment without data whose sequence number is below the receive window is not accepted by the peer,
//! which at most repeats its last acknowledgment, and changes nothing in the connection (RFC 9293 section
//! 3.10.7.4). A keep-alive (RFC 1122 section 4.2.3.6) is such a segment. With a limited TTL it shows a router
//! of the connection's own flow: the addresses and ports are the same. The sequence number is as far below
//! the oldest unacknowledged one as the TTL says, so that a router's answer, which quotes it, names the hop.
//!
//! [`OwnFlowTracer`] traces the connection of a client once, all hops together. [`ConnectionProbes`] sends
//! the probes of a [`Tracer`](super::Tracer), one at a time, on the connection of an echo path.

mod probes;
mod segments;
mod tracer;

pub use probes::{
    ConnectionEnd, ConnectionProbes, Delivered, FlowChange, OwnFlowRefusal, ProbeAnswer, ProbeStep,
};
pub use tracer::{OwnFlowSpec, OwnFlowStep, OwnFlowTracer};

use std::time::Duration;

use crate::time::Timestamp;
use crate::wire::tcp::{ReceivedSegment, SegmentTimestamps};

/// Where a connection stands, as its latest received segment shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowPosition {
    /// The oldest sequence number of this host that the peer has not acknowledged.
    pub unacknowledged: u32,
    /// The next sequence number of the peer.
    pub expected: u32,
    /// The timestamps of that segment; `None`: the connection has none.
    pub timestamps: Option<SegmentTimestamps>,
    /// When it arrived.
    pub seen_at: Timestamp,
    /// The TTL with which the segment arrived.
    pub arrived_ttl: u8,
}

/// How much later than the clock of this host the timestamps of segments are at least. Chosen: 1 s, more than
/// the RTT of nearly all connections, by which the echoed time is old when it arrives.
const TIMESTAMP_MARGIN: Duration = Duration::from_secs(1);

/// The TTLs with which hosts send.
const INITIAL_TTLS: [u8; 4] = [32, 64, 128, 255];

impl FlowPosition {
    /// The position that a received segment shows.
    #[must_use]
    pub const fn of(segment: ReceivedSegment, arrived_ttl: u8, seen_at: Timestamp) -> Self {
        let ReceivedSegment { acknowledgment: unacknowledged, next_sequence: expected, timestamps, .. } =
            segment;
        Self { unacknowledged, expected, timestamps, seen_at, arrived_ttl }
    }

    /// The timestamps of a segment that is sent now.
    ///
    /// The peer discards it if the value is earlier than the latest that it has received (RFC 7323 section
    /// 5.3), which may be later than the one that it has echoed. It accepts any later value, and does not
    /// keep that of a segment below its window. The clock of Linux has ticks of a millisecond.
    fn timestamps_to_send(&self, now: Timestamp) -> Option<SegmentTimestamps> {
        let SegmentTimestamps { value: echo, echo: value } = self.timestamps?;
        let since = now.since(self.seen_at) + TIMESTAMP_MARGIN;
        #[expect(clippy::cast_possible_truncation, reason = "the clock wraps around")]
        let value = value.wrapping_add(since.as_millis() as u32);
        Some(SegmentTimestamps { value, echo })
    }

    /// The sequence number that names a TTL.
    const fn below(self, ttl: u8) -> u32 {
        self.unacknowledged.wrapping_sub(ttl as u32)
    }

    /// Number of routers on the way back, if the peer sends with a usual TTL. It is also how many are
    /// expected on the way to the peer.
    fn routers_back(&self) -> u8 {
        let initial = INITIAL_TTLS.into_iter().find(|initial| *initial >= self.arrived_ttl);
        initial.expect("the largest TTL is one of them") - self.arrived_ttl
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(timestamps: Option<SegmentTimestamps>, arrived_ttl: u8) -> FlowPosition {
        let seen_at = Timestamp::from_nanos(1_000_000_000);
        FlowPosition { unacknowledged: 0, expected: 0, timestamps, seen_at, arrived_ttl }
    }

    #[test]
    fn timestamps_that_are_sent_are_later_than_those_of_the_kernel() {
        let seen = SegmentTimestamps { value: 7, echo: u32::MAX - 499 };
        let position = position(Some(seen), 60);
        let sent = |after| position.timestamps_to_send(position.seen_at + Duration::from_millis(after));
        assert_eq!(sent(0), Some(SegmentTimestamps { value: 500, echo: 7 }), "they wrap around");
        assert_eq!(sent(40), Some(SegmentTimestamps { value: 540, echo: 7 }));
        assert_eq!(FlowPosition { timestamps: None, ..position }.timestamps_to_send(position.seen_at), None);
    }

    #[test]
    fn number_of_routers_back_follows_from_the_usual_initial_ttl() {
        let back = |arrived_ttl| position(None, arrived_ttl).routers_back();
        assert_eq!([64, 60, 128, 65, 255, 250, 20].map(back), [0, 4, 0, 63, 0, 5, 12]);
    }
}
