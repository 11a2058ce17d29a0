//! The true outcome of requests and replies of any program, from the log of one wire.
//!
//! [`crate::truth`] evaluates echoes by the rules of pathmeter's prober. This module assumes less, and so
//! also handles other protocols.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::frame::{IcmpEchoId, UDP};
use crate::wire::{DatagramHead, LogEntry, Wire, WireDirection};

/// How requests and replies are recognised and matched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExchangeProtocol {
    /// ICMP echoes, by identifier and sequence number.
    Icmp,
    /// STAMP without authentication to this port, by the sender's port and sequence number.
    Stamp(u16),
    /// IRTT without HMAC to this port, by the client's port and sequence number.
    Irtt(u16),
}

/// Identifies a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestId {
    /// Address of the responder.
    pub target: IpAddr,
    /// Port or ICMP identifier of the sending program.
    pub source_id: u16,
    /// The sequence number.
    pub sequence: u32,
}

/// A request, its copies and its replies. Times are CLOCK_REALTIME, in nanoseconds.
#[derive(Debug, Clone, Default)]
pub struct Exchange {
    /// When the request entered the wire.
    pub sent_at: u64,
    /// Bounds of the delivery time of each copy of the request, sorted.
    reached_at: Vec<(u64, u64)>,
    /// When each reply entered the wire, sorted.
    replied_at: Vec<u64>,
    /// Bounds of the delivery time of each copy of a reply, sorted.
    returned_at: Vec<(u64, u64)>,
}

/// Outcome of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestOutcome {
    /// A reply was delivered.
    Answered,
    /// The request was not delivered.
    LostForward,
    /// The request was answered, and no reply was delivered.
    LostReverse,
    /// The request was delivered and not answered: no fault of the wire.
    Ignored,
}

/// A time that datagrams spent on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireTime {
    /// Nanoseconds.
    pub nanos: u64,
    /// Uncertainty in nanoseconds, either way: the clock could only be read before and after the event.
    pub uncertainty: u64,
}

/// The number of requests by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutcomeCounts {
    /// All requests.
    pub sent: u64,
    /// [`RequestOutcome::LostForward`].
    pub lost_forward: u64,
    /// [`RequestOutcome::LostReverse`].
    pub lost_reverse: u64,
    /// [`RequestOutcome::Ignored`].
    pub ignored: u64,
    /// Further copies of replies that were delivered.
    pub duplicates: u64,
    /// First replies that were delivered after one with a higher sequence number (RFC 4737).
    pub reordered: u64,
}

/// All requests that entered a wire in one direction.
#[derive(Debug, Clone, Default)]
pub struct Exchanges(BTreeMap<RequestId, Exchange>);

impl ExchangeProtocol {
    /// Whether the datagram is a reply, and the request's identity; `None` for other datagrams.
    fn read(self, head: &DatagramHead) -> Option<(bool, RequestId)> {
        let datagram = &head.datagram;
        let ends = (datagram.source, datagram.destination);
        let identified = |is_reply: bool, source_id: Option<u16>, sequence: u32| {
            let (own, target) = if is_reply { (ends.1, ends.0) } else { ends };
            let source_id = source_id.unwrap_or_else(|| own.port());
            (is_reply, RequestId { target: target.ip(), source_id, sequence })
        };
        let bytes = |at: usize| [0, 1, 2, 3].map(|offset| head.payload[at + offset]);
        let is_to_or_from = |port: u16| [ends.0.port(), ends.1.port()].contains(&port);
        match self {
            Self::Icmp => {
                let IcmpEchoId { is_reply, identifier, sequence } = datagram.echo?;
                Some(identified(is_reply, Some(identifier), sequence.into()))
            }
            Self::Stamp(port) | Self::Irtt(port) if datagram.protocol != UDP || !is_to_or_from(port) => None,
            Self::Stamp(port) => {
                let is_reply = ends.0.port() == port;
                Some(identified(is_reply, None, u32::from_be_bytes(bytes(if is_reply { 24 } else { 0 }))))
            }
            Self::Irtt(port) => {
                let is_reply = ends.0.port() == port;
                let is_echo = bytes(0)[..3] == IRTT_MAGIC && head.payload[3] & IRTT_OPEN_OR_CLOSE == 0;
                is_echo.then(|| identified(is_reply, None, u32::from_le_bytes(bytes(IRTT_SEQUENCE))))
            }
        }
    }
}

/// The first bytes of every IRTT packet, and the flags in the fourth byte that mark packets other than echoes
/// (irtt 0.9, packet.go).
const IRTT_MAGIC: [u8; 3] = [0x14, 0xa7, 0x5b];
const IRTT_OPEN_OR_CLOSE: u8 = 0b101;
/// After the magic, the flags and the connection token of eight bytes.
const IRTT_SEQUENCE: usize = 12;

impl Exchanges {
    /// Reads the log of a wire; `forward` is the direction of requests.
    ///
    /// # Panics
    /// When two requests have the same identity.
    #[must_use]
    pub fn read(wire: &Wire, forward: WireDirection, protocol: ExchangeProtocol) -> Self {
        let mut all: BTreeMap<RequestId, Exchange> = BTreeMap::new();
        let mut add_entry = |entry: &LogEntry| {
            let Some((is_reply, id)) = protocol.read(&entry.head) else { return };
            if is_reply == (entry.direction == forward) {
                return;
            }
            let exchange = all.entry(id).or_default();
            match is_reply {
                false => {
                    assert_eq!(exchange.sent_at, 0, "{id:?} was sent twice");
                    exchange.sent_at = entry.at;
                    exchange.reached_at = deliveries(entry);
                }
                true => {
                    exchange.replied_at.push(entry.at);
                    exchange.returned_at.extend(deliveries(entry));
                    exchange.returned_at.sort_unstable();
                }
            }
        };
        wire.read(|log| log.iter().for_each(&mut add_entry));
        // Replies without a request on this wire are ignored.
        all.retain(|_, exchange| exchange.sent_at > 0);
        Self(all)
    }

    /// The requests that entered the wire before a time.
    #[must_use]
    pub fn before(&self, end: u64) -> Self {
        let early = self.0.iter().filter(|(_, exchange)| exchange.sent_at < end);
        Self(early.map(|(id, exchange)| (*id, exchange.clone())).collect())
    }

    /// All requests, by identity.
    pub fn iter(&self) -> impl Iterator<Item = (&RequestId, &Exchange)> {
        self.0.iter()
    }

    /// Counts the requests by outcome.
    #[must_use]
    pub fn counts(&self) -> OutcomeCounts {
        let mut counts = OutcomeCounts { reordered: self.reordered(), ..OutcomeCounts::default() };
        for exchange in self.0.values() {
            counts.sent += 1;
            counts.duplicates += exchange.returned_at.len().saturating_sub(1) as u64;
            match exchange.outcome() {
                RequestOutcome::Answered => {}
                RequestOutcome::LostForward => counts.lost_forward += 1,
                RequestOutcome::LostReverse => counts.lost_reverse += 1,
                RequestOutcome::Ignored => counts.ignored += 1,
            }
        }
        counts
    }

    fn reordered(&self) -> u64 {
        let first = |(id, exchange): (&RequestId, &Exchange)| Some((*exchange.returned_at.first()?, *id));
        let mut arrivals: Vec<_> = self.0.iter().filter_map(first).collect();
        arrivals.sort_unstable();
        let mut expected: BTreeMap<(IpAddr, u16), u32> = BTreeMap::new();
        let mut reordered = 0;
        for (_, RequestId { target, source_id, sequence }) in arrivals {
            let next = expected.entry((target, source_id)).or_default();
            if sequence < *next { reordered += 1 } else { *next = sequence + 1 }
        }
        reordered
    }
}

impl Exchange {
    /// The outcome of the request.
    #[must_use]
    pub fn outcome(&self) -> RequestOutcome {
        match (self.returned_at.is_empty(), self.reached_at.is_empty(), self.replied_at.is_empty()) {
            (false, ..) => RequestOutcome::Answered,
            (true, true, _) => RequestOutcome::LostForward,
            (true, false, false) => RequestOutcome::LostReverse,
            (true, false, true) => RequestOutcome::Ignored,
        }
    }

    /// The time on the wire both ways, without the responder's time. `None` unless there was exactly one copy
    /// of request and reply.
    #[must_use]
    pub fn round_trip(&self) -> Option<WireTime> {
        let ([(before, after)], [replied_at], [(came_after, came_before)]) =
            (&self.reached_at[..], &self.replied_at[..], &self.returned_at[..])
        else {
            return None;
        };
        // A kernel may reply before the wire has read the clock after delivering the request.
        let reached_at = (*before, (*after).min(*replied_at));
        let width = (reached_at.1 - reached_at.0) + (came_before - came_after);
        let least = (reached_at.0 - self.sent_at) + (came_after - replied_at);
        Some(WireTime { nanos: least + width / 2, uncertainty: width.div_ceil(2) })
    }
}

fn deliveries(entry: &LogEntry) -> Vec<(u64, u64)> {
    let copies = entry.outcome.iter().flatten().flatten();
    let mut deliveries: Vec<_> =
        copies.filter(|exit| exit.damage.is_none()).filter_map(|exit| exit.delivered_at).collect();
    deliveries.sort_unstable();
    deliveries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange() -> Exchange {
        Exchange {
            sent_at: 1_000,
            reached_at: vec![(3_000, 3_040)],
            replied_at: vec![4_000],
            returned_at: vec![(6_000, 6_020)],
        }
    }

    #[test]
    fn round_trip_excludes_the_responders_time() {
        assert_eq!(exchange().round_trip(), Some(WireTime { nanos: 4_030, uncertainty: 30 }));
    }

    #[test]
    fn early_reply_narrows_the_uncertainty() {
        let exchange = Exchange { replied_at: vec![3_010], ..exchange() };
        assert_eq!(exchange.round_trip(), Some(WireTime { nanos: 2_000 + 2_990 + 15, uncertainty: 15 }));
    }

    #[test]
    fn round_trip_with_two_copies_is_none() {
        let twice = Exchange { returned_at: vec![(6_000, 6_020), (7_000, 7_020)], ..exchange() };
        assert_eq!((twice.round_trip(), twice.outcome()), (None, RequestOutcome::Answered));
    }

    #[test]
    fn every_exchange_has_one_outcome() {
        let no_reply = Exchange { returned_at: Vec::new(), ..exchange() };
        assert_eq!(no_reply.outcome(), RequestOutcome::LostReverse);
        let ignored = Exchange { replied_at: Vec::new(), ..no_reply };
        assert_eq!(ignored.outcome(), RequestOutcome::Ignored);
        let lost = Exchange { reached_at: Vec::new(), ..ignored };
        assert_eq!(lost.outcome(), RequestOutcome::LostForward);
    }

    #[test]
    fn overtaken_replies_are_reordered_and_further_copies_are_duplicates() {
        let target = IpAddr::from([10, 0, 0, 1]);
        let returned_at = [(vec![50]), vec![30, 90], vec![40], vec![]];
        let entry_of = |(sequence, returned_at): (u32, Vec<u64>)| {
            let returned_at = returned_at.into_iter().map(|at| (at, at)).collect();
            (RequestId { target, source_id: 7, sequence }, Exchange { returned_at, ..exchange() })
        };
        let counts = Exchanges((0..).zip(returned_at).map(entry_of).collect()).counts();
        assert_eq!((counts.sent, counts.duplicates, counts.reordered, counts.lost_reverse), (4, 1, 1, 1));
    }
}
