//! The segments of traces on a connection, and what routers report of them.

use std::net::SocketAddr;

use super::FlowPosition;
use crate::wire::icmp::IcmpVersion;
use crate::wire::tcp::{EmptySegment, ExpiredSegment};

/// The addresses and ports of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct FlowEnds {
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
}

/// The window of the segments: what Linux announces on an idle connection. The peer does not read it.
const WINDOW: u16 = 501;

impl FlowEnds {
    /// A segment without data to the peer.
    pub(super) fn segment(self, position: FlowPosition, sequence: u32) -> [u8; 20] {
        let segment = EmptySegment { sequence, acknowledgment: position.expected, window: WINDOW };
        segment.encode(self.local, self.peer)
    }

    /// The segment of this connection whose TTL has ended, as an ICMP message reports it.
    pub(super) fn expired(self, message: &[u8]) -> Option<ExpiredSegment<'_>> {
        let expired = ExpiredSegment::decode(message, IcmpVersion::of(self.peer.ip())).ok()?;
        let is_of_flow =
            expired.source == without_scope(self.local) && expired.destination == without_scope(self.peer);
        is_of_flow.then_some(expired)
    }
}

/// An address as a packet carries it.
fn without_scope(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port())
}
