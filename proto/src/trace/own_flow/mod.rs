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

pub use probes::{ConnectionProbes, Delivered, FlowChange, ProbeAnswer, ProbeStep};
pub use tracer::{OwnFlowSpec, OwnFlowStep, OwnFlowTracer};

use crate::wire::tcp::ReceivedSegment;

/// Where a connection stands, as its latest received segment shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowPosition {
    /// The oldest sequence number of this host that the peer has not acknowledged.
    pub unacknowledged: u32,
    /// The next sequence number of the peer.
    pub expected: u32,
    /// The TTL with which the segment arrived.
    pub arrived_ttl: u8,
}

/// The TTLs with which hosts send.
const INITIAL_TTLS: [u8; 4] = [32, 64, 128, 255];

impl FlowPosition {
    /// The position that a received segment shows.
    #[must_use]
    pub const fn of(segment: ReceivedSegment, arrived_ttl: u8) -> Self {
        Self { unacknowledged: segment.acknowledgment, expected: segment.next_sequence, arrived_ttl }
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

    #[test]
    fn number_of_routers_back_follows_from_the_usual_initial_ttl() {
        let back = |arrived_ttl| FlowPosition { unacknowledged: 0, expected: 0, arrived_ttl }.routers_back();
        assert_eq!([64, 60, 128, 65, 255, 250, 20].map(back), [0, 4, 0, 63, 0, 5, 12]);
    }
}
