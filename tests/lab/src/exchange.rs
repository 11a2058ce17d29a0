//! What truly happened to the requests and replies of any program, from the log of one wire.
//!
//! [`crate::truth`] judges echoes as our prober must. This asks less, and so also of programs that speak something else.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::frame::{Echo, UDP};
use crate::wire::{Head, Passage, Way, Wire};

/// How requests and replies are recognised, and which belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// ICMP echoes, by identifier and sequence number.
    Icmp,
    /// STAMP without authentication to this port, by the sender's port and sequence number.
    Stamp(u16),
    /// IRTT without HMAC to this port, by the client's port and sequence number.
    Irtt(u16),
}

/// A request's name: who was asked, on whose behalf, and the how manieth it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// The address that was asked.
    pub target: IpAddr,
    /// The asking program's port or identifier.
    pub asker: u16,
    /// The sequence number.
    pub sequence: u32,
}

/// A request and everything that came of it. Times are CLOCK_REALTIME, in nanoseconds.
#[derive(Debug, Clone, Default)]
pub struct Exchange {
    /// When the request entered the wire.
    pub left: u64,
    /// Between which readings of the clock each copy of the request came out, in order.
    reached: Vec<(u64, u64)>,
    /// When each reply entered the wire, in order.
    replied: Vec<u64>,
    /// Between which readings of the clock each copy of a reply came out, in order.
    came: Vec<(u64, u64)>,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// A reply came.
    Answered,
    /// It never came out of the wire.
    LostForward,
    /// It was answered, and no answer came out of the wire.
    LostReverse,
    /// It came out, and nobody answered: no fault of the wire.
    Ignored,
}

/// A time that the wire itself took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Took {
    /// In nanoseconds.
    pub nanos: u64,
    /// By how much it may be off either way: the clock could only be read before and behind the moment.
    pub doubt: u64,
}

/// How many requests had which fate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fates {
    /// All of them.
    pub sent: u64,
    /// [`Fate::LostForward`].
    pub lost_forward: u64,
    /// [`Fate::LostReverse`].
    pub lost_reverse: u64,
    /// [`Fate::Ignored`].
    pub ignored: u64,
    /// Further copies of replies that came out of the wire.
    pub duplicates: u64,
    /// First replies that came behind one with a higher sequence number (RFC 4737).
    pub reordered: u64,
}

/// Every request that entered a wire one way.
#[derive(Debug, Clone, Default)]
pub struct Exchanges(BTreeMap<Name, Exchange>);

impl Protocol {
    /// Whether it is a reply, and the name of the request; `None` for everything else.
    fn read(self, head: &Head) -> Option<(bool, Name)> {
        let datagram = &head.datagram;
        let ends = (datagram.source, datagram.destination);
        let named = |is_reply: bool, asker: Option<u16>, sequence: u32| {
            let (own, target) = if is_reply { (ends.1, ends.0) } else { ends };
            let asker = asker.unwrap_or_else(|| own.port());
            (is_reply, Name { target: target.ip(), asker, sequence })
        };
        let bytes = |at: usize| [0, 1, 2, 3].map(|offset| head.payload[at + offset]);
        let is_to_or_from = |port: u16| [ends.0.port(), ends.1.port()].contains(&port);
        match self {
            Self::Icmp => {
                let Echo { is_reply, identifier, sequence } = datagram.echo?;
                Some(named(is_reply, Some(identifier), sequence.into()))
            }
            Self::Stamp(port) | Self::Irtt(port) if datagram.protocol != UDP || !is_to_or_from(port) => None,
            Self::Stamp(port) => {
                let is_reply = ends.0.port() == port;
                Some(named(is_reply, None, u32::from_be_bytes(bytes(if is_reply { 24 } else { 0 }))))
            }
            Self::Irtt(port) => {
                let is_reply = ends.0.port() == port;
                let is_echo = bytes(0)[..3] == IRTT_MAGIC && head.payload[3] & IRTT_OPEN_OR_CLOSE == 0;
                is_echo.then(|| named(is_reply, None, u32::from_le_bytes(bytes(IRTT_SEQUENCE))))
            }
        }
    }
}

/// The first bytes of every IRTT packet, and which of the flags in the fourth are not of an echo (irtt 0.9, packet.go).
const IRTT_MAGIC: [u8; 3] = [0x14, 0xa7, 0x5b];
const IRTT_OPEN_OR_CLOSE: u8 = 0b101;
/// Behind the magic, the flags and the connection's token of eight bytes.
const IRTT_SEQUENCE: usize = 12;

impl Exchanges {
    /// Reads the log of a wire; `forward` leads to those who are asked.
    ///
    /// # Panics
    /// When two requests have the same name.
    #[must_use]
    pub fn read(wire: &Wire, forward: Way, protocol: Protocol) -> Self {
        let mut all: BTreeMap<Name, Exchange> = BTreeMap::new();
        let mut take = |passage: &Passage| {
            let Some((is_reply, name)) = protocol.read(&passage.head) else { return };
            if is_reply == (passage.way == forward) {
                return;
            }
            let exchange = all.entry(name).or_default();
            match is_reply {
                false => {
                    assert_eq!(exchange.left, 0, "{name:?} was sent twice");
                    exchange.left = passage.at;
                    exchange.reached = exits(passage);
                }
                true => {
                    exchange.replied.push(passage.at);
                    exchange.came.extend(exits(passage));
                    exchange.came.sort_unstable();
                }
            }
        };
        wire.read(|log| log.iter().for_each(&mut take));
        // Replies to what nobody asked here are none of ours.
        all.retain(|_, exchange| exchange.left > 0);
        Self(all)
    }

    /// Those that entered the wire before a time.
    #[must_use]
    pub fn before(&self, end: u64) -> Self {
        let early = self.0.iter().filter(|(_, exchange)| exchange.left < end);
        Self(early.map(|(name, exchange)| (*name, exchange.clone())).collect())
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &Exchange)> {
        self.0.iter()
    }

    /// Counts all fates.
    #[must_use]
    pub fn fates(&self) -> Fates {
        let mut fates = Fates { reordered: self.reordered(), ..Fates::default() };
        for exchange in self.0.values() {
            fates.sent += 1;
            fates.duplicates += exchange.came.len().saturating_sub(1) as u64;
            match exchange.fate() {
                Fate::Answered => {}
                Fate::LostForward => fates.lost_forward += 1,
                Fate::LostReverse => fates.lost_reverse += 1,
                Fate::Ignored => fates.ignored += 1,
            }
        }
        fates
    }

    fn reordered(&self) -> u64 {
        let first = |(name, exchange): (&Name, &Exchange)| Some((*exchange.came.first()?, *name));
        let mut arrivals: Vec<_> = self.0.iter().filter_map(first).collect();
        arrivals.sort_unstable();
        let mut expected: BTreeMap<(IpAddr, u16), u32> = BTreeMap::new();
        let mut reordered = 0;
        for (_, Name { target, asker, sequence }) in arrivals {
            let next = expected.entry((target, asker)).or_default();
            if sequence < *next { reordered += 1 } else { *next = sequence + 1 }
        }
        reordered
    }
}

impl Exchange {
    /// What became of it.
    #[must_use]
    pub fn fate(&self) -> Fate {
        match (self.came.is_empty(), self.reached.is_empty(), self.replied.is_empty()) {
            (false, ..) => Fate::Answered,
            (true, true, _) => Fate::LostForward,
            (true, false, false) => Fate::LostReverse,
            (true, false, true) => Fate::Ignored,
        }
    }

    /// The time that the wire took for both ways, without what the responder took in between. `None` unless there was
    /// exactly one copy of everything.
    #[must_use]
    pub fn round_trip(&self) -> Option<Took> {
        let ([(before, after)], [replied], [(came_after, came_before)]) =
            (&self.reached[..], &self.replied[..], &self.came[..])
        else {
            return None;
        };
        // A kernel answers while the wire still hands it the request.
        let reached = (*before, (*after).min(*replied));
        let width = (reached.1 - reached.0) + (came_before - came_after);
        let least = (reached.0 - self.left) + (came_after - replied);
        Some(Took { nanos: least + width / 2, doubt: width.div_ceil(2) })
    }
}

fn exits(passage: &Passage) -> Vec<(u64, u64)> {
    let copies = passage.outcome.iter().flatten().flatten();
    let mut exits: Vec<_> =
        copies.filter(|exit| exit.damage.is_none()).filter_map(|exit| exit.left).collect();
    exits.sort_unstable();
    exits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange() -> Exchange {
        Exchange {
            left: 1_000,
            reached: vec![(3_000, 3_040)],
            replied: vec![4_000],
            came: vec![(6_000, 6_020)],
        }
    }

    #[test]
    fn a_round_trip_is_without_the_responders_time() {
        assert_eq!(exchange().round_trip(), Some(Took { nanos: 4_030, doubt: 30 }));
    }

    #[test]
    fn a_reply_that_leaves_while_its_request_arrives_narrows_the_doubt() {
        let exchange = Exchange { replied: vec![3_010], ..exchange() };
        assert_eq!(exchange.round_trip(), Some(Took { nanos: 2_000 + 2_990 + 15, doubt: 15 }));
    }

    #[test]
    fn a_round_trip_of_which_there_are_two_copies_is_not_told() {
        let twice = Exchange { came: vec![(6_000, 6_020), (7_000, 7_020)], ..exchange() };
        assert_eq!((twice.round_trip(), twice.fate()), (None, Fate::Answered));
    }

    #[test]
    fn every_exchange_has_one_fate() {
        let no_reply = Exchange { came: Vec::new(), ..exchange() };
        assert_eq!(no_reply.fate(), Fate::LostReverse);
        let ignored = Exchange { replied: Vec::new(), ..no_reply };
        assert_eq!(ignored.fate(), Fate::Ignored);
        let lost = Exchange { reached: Vec::new(), ..ignored };
        assert_eq!(lost.fate(), Fate::LostForward);
    }

    #[test]
    fn replies_that_overtake_are_reordered_and_further_copies_are_duplicates() {
        let target = IpAddr::from([10, 0, 0, 1]);
        let came = [(vec![50]), vec![30, 90], vec![40], vec![]];
        let of = |(sequence, came): (u32, Vec<u64>)| {
            let came = came.into_iter().map(|at| (at, at)).collect();
            (Name { target, asker: 7, sequence }, Exchange { came, ..exchange() })
        };
        let fates = Exchanges((0..).zip(came).map(of).collect()).fates();
        assert_eq!((fates.sent, fates.duplicates, fates.reordered, fates.lost_reverse), (4, 1, 1, 1));
    }
}
