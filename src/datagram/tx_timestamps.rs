//! Which datagram a transmit stamp belongs to.

use std::collections::VecDeque;
use std::time::Duration;

use pathmeter_proto::machine::SendId;
use pathmeter_proto::time::Timestamp;

use super::socket::TimestampMatching;

/// The datagrams whose stamps have not come yet, in the order in which they were handed over.
#[derive(Debug)]
pub(super) struct PendingTimestamps {
    by: TimestampMatching,
    queue: VecDeque<PendingTimestamp>,
    /// Name of the first in the queue.
    first: u32,
}

/// A datagram whose stamp has not come yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct PendingTimestamp {
    pub(super) slot: usize,
    pub(super) life: u32,
    pub(super) id: SendId,
    /// When it was handed over.
    pub(super) handed: Timestamp,
    head: [u8; HEAD],
}

/// Bytes by which looped datagrams are told apart: sequence number, timestamp and session of both STAMP modes, and of echoes.
const HEAD: usize = 28;

impl PendingTimestamps {
    /// Stamps that are awaited; at the limit the oldest is given up.
    const LIMIT: usize = 65_536;
    /// A stamp that has not come by then never will.
    const PATIENCE: Duration = Duration::from_millis(500);

    pub(super) fn new(by: TimestampMatching) -> Self {
        Self { by, queue: VecDeque::new(), first: 0 }
    }

    /// Whether datagrams are to be given their names.
    pub(super) fn by_name(&self) -> bool {
        self.by == TimestampMatching::ById
    }

    /// Expects a stamp for a datagram that is about to be handed over, of which `payload` is what UDP carries, or what stands
    /// behind the header of ICMP; returns its name.
    pub(super) fn expect(
        &mut self,
        slot: usize,
        life: u32,
        id: SendId,
        at: Timestamp,
        payload: &[u8],
    ) -> u32 {
        while self.queue.front().is_some_and(|entry| at.since(entry.handed) > Self::PATIENCE)
            || self.queue.len() >= Self::LIMIT
        {
            self.queue.pop_front();
            self.first = self.first.wrapping_add(1);
        }
        let offset = u32::try_from(self.queue.len()).expect("below the limit");
        self.queue.push_back(PendingTimestamp { slot, life, id, handed: at, head: head(payload) });
        self.first.wrapping_add(offset)
    }

    /// The datagram of a stamp, by its name or by the looped frame.
    pub(super) fn find(&mut self, name: u32, frame: &[u8]) -> Option<PendingTimestamp> {
        match self.by {
            TimestampMatching::ById => self.queue.get(name.wrapping_sub(self.first) as usize).copied(),
            TimestampMatching::ByPayload => {
                // They come in order but for those that were lost: the first is nearly always it, and is then done with.
                let head = head(payload_of(frame)?);
                let place = self.queue.iter().position(|entry| entry.head == head)?;
                self.queue.remove(place)
            }
        }
    }
}

fn head(payload: &[u8]) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    let length = payload.len().min(HEAD);
    head[..length].copy_from_slice(&payload[..length]);
    head
}

/// Bytes of a header of UDP, and of ICMP's echoes.
pub(super) const HEADER: usize = 8;

/// The payload of a frame as the kernel loops it: with or without a link header, then IPv4 or IPv6, then UDP or ICMP.
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
        packet.get(header + HEADER..)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Timestamp {
        Timestamp::from_nanos(millis * 1_000_000)
    }

    #[test]
    fn a_stamp_finds_its_datagram_by_name() {
        let mut awaited = PendingTimestamps::new(TimestampMatching::ById);
        let names: Vec<u32> = (0..5).map(|i| awaited.expect(7, 1, SendId(i), at(i), &[])).collect();
        assert_eq!(awaited.find(names[3], &[]).map(|entry| entry.id), Some(SendId(3)));
        awaited.expect(7, 1, SendId(9), at(503), &[]);
        assert!(awaited.find(names[1], &[]).is_none(), "given up");
        assert_eq!(awaited.find(names[4], &[]).map(|entry| entry.id), Some(SendId(4)));
    }

    #[test]
    fn a_stamp_finds_its_datagram_in_the_looped_frame() {
        let mut awaited = PendingTimestamps::new(TimestampMatching::ByPayload);
        for id in 0..3_u8 {
            awaited.expect(7, 1, SendId(id.into()), at(0), &[id; 60]);
        }
        let mut v4 = vec![0; 14];
        v4.extend_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17]);
        v4.resize(14 + 20 + 8, 0);
        v4.extend_from_slice(&[2; 60]);
        assert_eq!(awaited.find(0, &v4).map(|entry| entry.id), Some(SendId(2)));
        let mut v6 = vec![0x60, 0, 0, 0, 0, 0, 17, 64];
        v6.resize(40 + 8, 0);
        v6.extend_from_slice(&[1; 60]);
        assert_eq!(awaited.find(0, &v6).map(|entry| entry.id), Some(SendId(1)));
        assert!(awaited.find(0, &[]).is_none());
        // An echo: the kernel has written over its header.
        let mut icmp = vec![0x60, 0, 0, 0, 0, 0, 58, 64];
        icmp.resize(40 + 8, 7);
        icmp.extend_from_slice(&[0; 60]);
        assert_eq!(awaited.find(0, &icmp).map(|entry| entry.id), Some(SendId(0)));
    }
}
