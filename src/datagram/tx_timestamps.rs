//! Matches transmit timestamps to datagrams.

use std::collections::VecDeque;
use std::time::Duration;

use pathmeter_proto::machine::SendId;
use pathmeter_proto::time::Timestamp;

use super::socket::TimestampMatching;

/// The datagrams whose transmit timestamps are pending, in sending order.
#[derive(Debug)]
pub(super) struct PendingTimestamps {
    matching: TimestampMatching,
    queue: VecDeque<PendingTimestamp>,
    /// Identifier of the first entry in the queue.
    first_id: u32,
}

/// A datagram whose transmit timestamp is pending.
#[derive(Debug, Clone, Copy)]
pub(super) struct PendingTimestamp {
    pub(super) slot: usize,
    pub(super) generation: u32,
    pub(super) id: SendId,
    /// When it was passed to the kernel.
    pub(super) handed_over_at: Timestamp,
    prefix: [u8; PREFIX_BYTES],
}

/// Bytes that identify a looped datagram: they include sequence number, timestamp and session of both STAMP
/// modes and of ICMP echo.
const PREFIX_BYTES: usize = 28;

impl PendingTimestamps {
    /// Maximum number of pending timestamps; at the limit the oldest is discarded.
    const PENDING_MAX: usize = 65_536;
    /// A timestamp that is later than this is not expected any more.
    const TIMEOUT: Duration = Duration::from_millis(500);

    pub(super) fn new(matching: TimestampMatching) -> Self {
        Self { matching, queue: VecDeque::new(), first_id: 0 }
    }

    /// Whether datagrams are sent with their identifiers.
    pub(super) fn uses_ids(&self) -> bool {
        self.matching == TimestampMatching::ById
    }

    /// Adds a datagram that is about to be sent, and returns its identifier. `payload` is the UDP payload, or
    /// the ICMP message without its header.
    pub(super) fn add(
        &mut self,
        slot: usize,
        generation: u32,
        id: SendId,
        at: Timestamp,
        payload: &[u8],
    ) -> u32 {
        while self.queue.front().is_some_and(|entry| at.since(entry.handed_over_at) > Self::TIMEOUT)
            || self.queue.len() >= Self::PENDING_MAX
        {
            self.queue.pop_front();
            self.first_id = self.first_id.wrapping_add(1);
        }
        let offset = u32::try_from(self.queue.len()).expect("below the limit");
        self.queue.push_back(PendingTimestamp {
            slot,
            generation,
            id,
            handed_over_at: at,
            prefix: prefix(payload),
        });
        self.first_id.wrapping_add(offset)
    }

    /// Returns the datagram of a timestamp, by its identifier or by the looped frame.
    pub(super) fn find(&mut self, id: u32, frame: &[u8]) -> Option<PendingTimestamp> {
        match self.matching {
            TimestampMatching::ById => self.queue.get(id.wrapping_sub(self.first_id) as usize).copied(),
            TimestampMatching::ByPayload => {
                // Timestamps arrive in order, except for lost ones: nearly always the first entry matches.
                let prefix = prefix(payload_of(frame)?);
                let index = self.queue.iter().position(|entry| entry.prefix == prefix)?;
                self.queue.remove(index)
            }
        }
    }
}

fn prefix(payload: &[u8]) -> [u8; PREFIX_BYTES] {
    let mut prefix = [0; PREFIX_BYTES];
    let length = payload.len().min(PREFIX_BYTES);
    prefix[..length].copy_from_slice(&payload[..length]);
    prefix
}

/// Length of a UDP header, and of an ICMP echo header.
pub(super) const HEADER_BYTES: usize = 8;

/// The payload of a looped frame: with or without a link header, then IPv4 or IPv6, then UDP or ICMP.
fn payload_of(frame: &[u8]) -> Option<&[u8]> {
    const V4: [u8; 2] = [17, 1];
    const V6: [u8; 2] = [17, 58];
    const LINK_HEADERS: [usize; 3] = [14, 0, 18];
    LINK_HEADERS.iter().find_map(|link| {
        let packet = frame.get(*link..)?;
        let header = match packet.first()? >> 4 {
            4 if V4.contains(packet.get(9)?) => usize::from(packet[0] & 15) * 4,
            6 if V6.contains(packet.get(6)?) => 40,
            _ => return None,
        };
        packet.get(header + HEADER_BYTES..)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Timestamp {
        Timestamp::from_nanos(millis * 1_000_000)
    }

    #[test]
    fn timestamp_is_matched_by_id() {
        let mut pending = PendingTimestamps::new(TimestampMatching::ById);
        let ids: Vec<u32> = (0..5).map(|i| pending.add(7, 1, SendId(i), at(i), &[])).collect();
        assert_eq!(pending.find(ids[3], &[]).map(|entry| entry.id), Some(SendId(3)));
        pending.add(7, 1, SendId(9), at(503), &[]);
        assert!(pending.find(ids[1], &[]).is_none(), "discarded");
        assert_eq!(pending.find(ids[4], &[]).map(|entry| entry.id), Some(SendId(4)));
    }

    #[test]
    fn timestamp_is_matched_by_the_looped_frame() {
        let mut pending = PendingTimestamps::new(TimestampMatching::ByPayload);
        for id in 0..3_u8 {
            pending.add(7, 1, SendId(id.into()), at(0), &[id; 60]);
        }
        let mut v4 = vec![0; 14];
        v4.extend_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17]);
        v4.resize(14 + 20 + 8, 0);
        v4.extend_from_slice(&[2; 60]);
        assert_eq!(pending.find(0, &v4).map(|entry| entry.id), Some(SendId(2)));
        let mut v6 = vec![0x60, 0, 0, 0, 0, 0, 17, 64];
        v6.resize(40 + 8, 0);
        v6.extend_from_slice(&[1; 60]);
        assert_eq!(pending.find(0, &v6).map(|entry| entry.id), Some(SendId(1)));
        assert!(pending.find(0, &[]).is_none());
        // An ICMP echo: the kernel has overwritten its header.
        let mut icmp = vec![0x60, 0, 0, 0, 0, 0, 58, 64];
        icmp.resize(40 + 8, 7);
        icmp.extend_from_slice(&[0; 60]);
        assert_eq!(pending.find(0, &icmp).map(|entry| entry.id), Some(SendId(0)));
    }
}
