//! The segments of traces on a connection, and what routers report of them.

use std::net::SocketAddr;

use super::FlowPosition;
use crate::time::Timestamp;
use crate::wire::icmp::IcmpVersion;
use crate::wire::tcp::{EmptySegment, ExpiredSegment};

/// The addresses and ports of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionAddresses {
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
}

/// The window of the segments: what Linux announces on an idle connection. The peer does not read it.
const WINDOW: u16 = 501;

impl ConnectionAddresses {
    /// A segment without data to the peer.
    pub(super) fn segment(self, position: FlowPosition, sequence: u32, now: Timestamp) -> Vec<u8> {
        let (acknowledgment, timestamps) = (position.expected, position.timestamps_to_send(now));
        let segment = EmptySegment { sequence, acknowledgment, window: WINDOW, timestamps };
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

#[cfg(test)]
pub(super) mod tests {
    /// What a router reports of a segment from `source` to `destination`. `change` may forge it.
    pub(in super::super) fn time_exceeded(
        [source, destination]: [[u8; 4]; 2],
        segment: &[u8],
        change: impl FnOnce(&mut [u8]),
    ) -> Vec<u8> {
        let mut message = vec![11, 0, 0, 0, 0, 0, 0, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 1, 6, 0, 0];
        message.extend([source, destination].concat());
        message.extend(&segment[..8]);
        change(&mut message);
        let words = message.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum: u32 = words.sum();
        let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        message
    }
}
