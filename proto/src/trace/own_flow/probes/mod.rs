//! Probes on the connection of an echo path.

mod stalls;

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use self::stalls::Stalls;
use super::FlowPosition;
use super::segments::ConnectionAddresses;
use crate::time::Timestamp;
use crate::trace::DESTINATION;
use crate::wire::tcp::ReceivedSegment;

/// Decides how the probes of a [`Tracer`](crate::trace::Tracer) over TCP are sent: as segments on the
/// connection of the echoes, or else as SYN from another source port.
///
/// Routers answer segments with ICMP errors. The peer answers by repeating its last acknowledgment. That does
/// not name the segment, so only one probe is in flight, and two that may reach the peer are
/// half a second apart.
///
/// A device on the path may drop what follows a segment with a small TTL. Therefore a segment that reaches
/// the last expected router is sent first, and probes follow only after echoes that were sent later were
/// acknowledged. If connections stall after segments all the same, none are sent for a day.
#[derive(Debug)]
pub struct ConnectionProbes {
    /// Largest TTL.
    hops_max: u8,
    connection: Option<Connection>,
    /// With which packets probes are sent; `None` until that is decided.
    in_use: Option<Packets>,
    /// Since when there is no connection that can be used.
    missing_since: Timestamp,
    /// Whether the latest connection has ended before [`AGE_MIN`].
    are_short_lived: bool,
    stalls: Stalls,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packets {
    /// Segments on the connection with this number.
    Segments(u64),
    Syn,
}

#[derive(Debug)]
struct Connection {
    number: u64,
    opened_at: Timestamp,
    addresses: ConnectionAddresses,
    /// `None` until a segment was received.
    position: Option<FlowPosition>,
    /// The latest probes, oldest first.
    sent: VecDeque<SentSegment>,
    /// TTLs whose latest probe a router answered.
    router_ttls: BTreeSet<u8>,
    /// The latest segment that may have reached the peer, by its sequence number, and when it was sent.
    /// `None`: a router has answered it, or there was none.
    asked_peer: Option<(u32, Timestamp)>,
    /// When the peer last repeated an acknowledgment.
    repeated_at: Option<Timestamp>,
    /// Unlimited probes that were sent since the peer has answered one.
    unanswered: u32,
    /// Until when no segments are sent because the peer does not answer them; `None`: they are.
    silent_until: Option<Timestamp>,
    delivered: Delivered,
    /// When the peer last acknowledged something, or when nothing was in flight.
    progress_at: Timestamp,
    verification: Verification,
}

/// Whether a connection still delivers data after segments with limited TTLs.
#[derive(Debug, Clone)]
enum Verification {
    /// None was sent.
    Untested,
    /// The first one was sent.
    Testing(UnverifiedSegments),
    /// It does.
    Verified,
    /// It did, and further ones were sent.
    Unverified(UnverifiedSegments),
    /// It did not for [`STALLED_AFTER`].
    Stalled(UnverifiedSegments),
}

/// Segments after which no data was acknowledged yet.
#[derive(Debug, Clone)]
struct UnverifiedSegments {
    /// Bytes of data that were sent before the latest one.
    sent: u64,
    ttls: BTreeSet<u8>,
    /// When the latest one was sent.
    at: Timestamp,
}

#[derive(Debug)]
struct SentSegment {
    ttl: u8,
    sequence: u32,
    at: Timestamp,
    /// The bytes by which the tracer knows the probe.
    identifier: Vec<u8>,
    may_reach_peer: bool,
    is_answered: bool,
}

/// How a connection delivers data, as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Delivered {
    /// Bytes of data that were sent, each counted once.
    pub sent: u64,
    /// Bytes of data that were acknowledged, and one for the SYN.
    pub acknowledged: u64,
    /// Whether segments are being sent again.
    pub is_recovering: bool,
}

/// Why a connection has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionEnd {
    /// The echoes were not answered in time.
    TimedOut,
    /// It was reset.
    Reset,
    /// It was closed by one of its ends, or can no longer be used for probes.
    Closed,
}

/// How a probe is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeStep {
    /// As this segment on the connection, which is reported with [`ConnectionProbes::sent`].
    Segment(Vec<u8>),
    /// As a SYN from another source port than that of the connection.
    Syn,
    /// Not before this time, or the next input.
    Wait(Timestamp),
}

/// An answer to a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeAnswer {
    /// The bytes that were passed to [`ConnectionProbes::sent`].
    pub identifier: Vec<u8>,
    /// The router at which the TTL ended; `None`: the peer has answered.
    pub router: Option<IpAddr>,
    /// What the router attached (RFC 4884); empty if nothing.
    pub extensions: Vec<u8>,
}

/// A change that others must know of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlowChange {
    /// The source port of the probes has changed.
    Replaced,
    /// Connections have stalled after segments. For [`CLAMPED_FOR`](crate::trace::CLAMPED_FOR) none are sent.
    Stalled,
}

/// Why probes are not sent on the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OwnFlowRefusal {
    /// There is no connection.
    #[error("the probe has no connection")]
    NoConnection,
    /// It is too new: it has carried too few messages, or the one before has ended soon.
    #[error("the connection is too new")]
    TooNew,
    /// The kernel does not report how it delivers data.
    #[error("the kernel does not count the bytes of connections: Linux 4.19 does")]
    NotCounted,
    /// Nothing that is in flight is acknowledged.
    #[error("the connection delivers nothing at present")]
    NotDelivering,
    /// The peer does not answer unlimited probes.
    #[error("the peer does not answer segments below its window")]
    NotAnswered,
    /// Connections have stalled.
    #[error("connections have stalled when they were traced: they are left alone for 24 h")]
    Stalled,
}

/// How long probes wait for a connection before they are sent without one. Chosen: 3 s, in which a connection
/// that has ended is replaced if the path is up and messages are frequent.
const CONNECTION_WAIT: Duration = Duration::from_secs(3);

/// Age from which on a connection is used if the one before has not become that old. Chosen: 10 s, the time
/// between two traces, because a connection that ends sooner is not traced to the end.
const AGE_MIN: Duration = Duration::from_secs(10);

/// Time between two segments that may reach the peer: Linux answers one per half a second
/// (`net.ipv4.tcp_invalid_ratelimit`), and some more so that the second does not come too early.
const REPEAT_SPACING: Duration = Duration::from_millis(550);

/// How long nothing that is in flight must be acknowledged until a connection has stalled. Chosen: 5 s, in
/// which TCP sends a lost segment again four times (RFC 6298, from 200 ms on, doubling), and a full queue is
/// emptied.
const STALLED_AFTER: Duration = Duration::from_secs(5);

/// A reset this soon after a segment is taken for an answer to it. Chosen: 1 s, longer than nearly all RTTs.
const RESET_WITHIN: Duration = Duration::from_secs(1);

/// Unlimited probes in a row without an answer before no more segments are sent on a connection for
/// [`SILENT_FOR`]. Chosen: 6, so that random loss of 10 % in each direction is mistaken for that once in
/// 20,000 times.
const UNANSWERED_MAX: u32 = 6;

/// How long no segments are sent to a peer that does not answer them. Chosen: an hour.
const SILENT_FOR: Duration = Duration::from_secs(3_600);

/// Time between two looks at how the connection delivers data, while a probe waits for that. Chosen: 20 ms, a
/// fraction of the time between two probes of a round.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Segments to which answers are recognized. Chosen: more than are sent until an answer is too old.
const SENT_MAX: usize = 64;

/// How far a segment may be ahead of the latest one to be taken for one of the connection, in bytes and in
/// what it acknowledges. Chosen: 16 MiB, more than is in flight on most paths; who forges segments without
/// knowing the sequence numbers succeeds once in 65,536 times.
const AHEAD_MAX: u32 = 1 << 24;

/// What the kernel counts as acknowledged for the SYN of a connection that this host has opened.
const SYN: u64 = 1;

impl ConnectionProbes {
    /// There is no connection yet. No segments have larger TTLs than `hops_max`, except for those that are
    /// not limited.
    #[must_use]
    pub fn new(hops_max: u8, now: Timestamp) -> Self {
        Self {
            hops_max,
            connection: None,
            in_use: None,
            missing_since: now,
            are_short_lived: false,
            stalls: Stalls::default(),
        }
    }

    /// The echoes have a connection, with these addresses and ports of this host and the peer. `number` is
    /// different for each connection.
    pub fn opened(&mut self, number: u64, local: SocketAddr, peer: SocketAddr, at: Timestamp) {
        self.connection = Some(Connection {
            number,
            opened_at: at,
            addresses: ConnectionAddresses { local, peer },
            position: None,
            sent: VecDeque::new(),
            router_ttls: BTreeSet::new(),
            asked_peer: None,
            repeated_at: None,
            unanswered: 0,
            silent_until: None,
            delivered: Delivered::default(),
            progress_at: at,
            verification: Verification::Untested,
        });
    }

    /// The connection has ended.
    pub fn ended(&mut self, end: ConnectionEnd, at: Timestamp) {
        let Some(connection) = self.connection.take() else { return };
        self.are_short_lived = at.since(connection.opened_at) < AGE_MIN;
        if self.in_use == Some(Packets::Segments(connection.number)) {
            self.missing_since = at;
        }
        if let Verification::Testing(latest) | Verification::Unverified(latest) = &connection.verification {
            let is_stalled = match end {
                ConnectionEnd::TimedOut => connection.delivered.is_in_flight(),
                ConnectionEnd::Reset => at.since(latest.at) <= RESET_WITHIN,
                ConnectionEnd::Closed => false,
            };
            if is_stalled {
                self.stalls.add(&latest.ttls, at);
            }
        }
    }

    /// Whether probes are sent on the connection.
    #[must_use]
    pub fn is_on_connection(&self) -> bool {
        matches!(self.in_use, Some(Packets::Segments(_)))
    }

    /// Whether data that was sent after a segment was not acknowledged yet, so that
    /// [`delivered`](Self::delivered) must be called in time.
    #[must_use]
    pub fn has_unverified_segments(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.verification.latest().is_some())
    }

    /// Why probes are not sent on the connection; `None`: they are, or may be soon.
    #[must_use]
    pub fn refusal(&self, now: Timestamp) -> Option<OwnFlowRefusal> {
        if self.stalls.is_disabled(now) {
            return Some(OwnFlowRefusal::Stalled);
        }
        let Some(connection) = &self.connection else { return Some(OwnFlowRefusal::NoConnection) };
        if connection.is_stuck(now) {
            return Some(OwnFlowRefusal::NotDelivering);
        }
        if connection.silent_until.is_some_and(|until| until > now) {
            return Some(OwnFlowRefusal::NotAnswered);
        }
        match connection.verification {
            _ if self.are_short_lived && now.since(connection.opened_at) < AGE_MIN => {
                Some(OwnFlowRefusal::TooNew)
            }
            Verification::Verified | Verification::Unverified(_) => None,
            Verification::Untested if connection.position.is_some() && connection.delivered.sent == 0 => {
                Some(OwnFlowRefusal::NotCounted)
            }
            Verification::Untested | Verification::Testing(_) => Some(OwnFlowRefusal::TooNew),
            Verification::Stalled(_) => Some(OwnFlowRefusal::NotDelivering),
        }
    }

    /// Takes how the connection delivers data.
    pub fn delivered(&mut self, delivered: Delivered, at: Timestamp) {
        let Some(connection) = &mut self.connection else { return };
        if delivered.acknowledged > connection.delivered.acknowledged || !delivered.is_in_flight() {
            connection.progress_at = at;
        }
        connection.delivered = delivered;
        let Some(latest) = connection.verification.latest() else { return };
        if delivered.acknowledged > latest.sent + SYN {
            self.stalls.survived(&latest.ttls, at);
            connection.verification = Verification::Verified;
        } else if connection.is_stuck(at) && !matches!(connection.verification, Verification::Stalled(_)) {
            self.stalls.add(&latest.ttls, at);
            connection.verification = Verification::Stalled(latest.clone());
        }
    }

    /// Takes a segment that was received on the connection, with the TTL with which it has arrived. Returns
    /// the answer to the latest probe, if it is one.
    pub fn received(
        &mut self,
        segment: ReceivedSegment,
        arrived_ttl: u8,
        at: Timestamp,
    ) -> Option<ProbeAnswer> {
        let connection = self.connection.as_mut()?;
        let found = FlowPosition::of(segment, arrived_ttl, at);
        let Some(known) = connection.position else {
            connection.position = Some(found);
            return None;
        };
        let is_repeated = segment.is_empty
            && (known.unacknowledged, known.expected) == (found.unacknowledged, found.expected);
        // Segments that were overtaken, and keep-alives of the peer, show an earlier position, forged ones
        // any.
        let is_ahead = |found: u32, known: u32| found.wrapping_sub(known) <= AHEAD_MAX;
        if is_ahead(found.unacknowledged, known.unacknowledged) && is_ahead(found.expected, known.expected) {
            connection.position = Some(found);
        }
        // After loss or reordering acknowledgments are repeated, too, and say what has arrived.
        if !is_repeated || segment.has_sack {
            return None;
        }
        connection.repeated_at = Some(at);
        let latest = connection.sent.back_mut().filter(|sent| {
            let is_in_time = sent.at <= at && at.since(sent.at) <= REPEAT_SPACING;
            sent.may_reach_peer && !sent.is_answered && is_in_time
        })?;
        latest.is_answered = true;
        connection.unanswered = 0;
        Some(ProbeAnswer { identifier: latest.identifier.clone(), router: None, extensions: Vec::new() })
    }

    /// Takes an ICMP message from `router`. Returns the answer to a probe, if it is the first one.
    pub fn message_received(&mut self, message: &[u8], router: IpAddr) -> Option<ProbeAnswer> {
        let connection = self.connection.as_mut()?;
        let expired = connection.addresses.expired(message)?;
        connection.asked_peer.take_if(|(sequence, _)| *sequence == expired.sequence);
        let sent = connection.sent.iter_mut().rev().find(|sent| sent.sequence == expired.sequence)?;
        if std::mem::replace(&mut sent.is_answered, true) {
            return None;
        }
        connection.router_ttls.insert(sent.ttl);
        let extensions = expired.extensions.unwrap_or_default().to_vec();
        Some(ProbeAnswer { identifier: sent.identifier.clone(), router: Some(router), extensions })
    }

    /// What has changed, before a probe is sent.
    pub fn change(&mut self, now: Timestamp) -> Option<FlowChange> {
        if self.stalls.take_report() {
            return Some(FlowChange::Stalled);
        }
        let earlier = self.in_use;
        self.in_use = match (&self.connection, self.refusal(now)) {
            (Some(connection), None) => Some(Packets::Segments(connection.number)),
            (None, _) | (_, Some(OwnFlowRefusal::NoConnection | OwnFlowRefusal::TooNew)) => {
                let is_missing = self.missing_since + CONNECTION_WAIT <= now;
                if is_missing { Some(Packets::Syn) } else { earlier }
            }
            (Some(_), Some(_)) => Some(Packets::Syn),
        };
        let is_replaced = earlier.is_some() && earlier != self.in_use;
        if let (true, Some(connection)) = (is_replaced, &mut self.connection) {
            // The tracer no longer knows earlier probes.
            connection.sent.clear();
        }
        is_replaced.then_some(FlowChange::Replaced)
    }

    /// The segment that shows whether the connection can be used, and its TTL. It is sent once, and reported
    /// with [`tested`](Self::tested); `None`: not now.
    #[must_use]
    pub fn test(&self, now: Timestamp) -> Option<(u8, Vec<u8>)> {
        let connection = self.connection.as_ref().filter(|_| !self.stalls.is_disabled(now))?;
        let position = connection.position?;
        let is_due = matches!(connection.verification, Verification::Untested);
        if !is_due || connection.delivered.is_recovering || connection.delivered.sent == 0 {
            return None;
        }
        let ttl = position.routers_back().clamp(1, self.hops_max);
        Some((ttl, connection.addresses.segment(position, position.below(ttl), now)))
    }

    /// That segment was sent.
    pub fn tested(&mut self, ttl: u8, at: Timestamp) {
        let Some(connection) = &mut self.connection else { return };
        let Some(position) = connection.position else { return };
        connection.asked_peer = Some((position.below(ttl), at));
        connection.verification = Verification::Testing(connection.unverified(ttl, at));
    }

    /// How a probe with this TTL is sent. [`change`](Self::change) is called before, and
    /// [`delivered`](Self::delivered) with the latest state of the connection.
    #[must_use]
    pub fn step(&self, ttl: u8, now: Timestamp) -> ProbeStep {
        let connection = match self.in_use {
            Some(Packets::Syn) => return ProbeStep::Syn,
            Some(Packets::Segments(number)) => {
                self.connection.as_ref().filter(|connection| connection.number == number)
            }
            None => None,
        };
        let Some((connection, position)) = connection.and_then(|found| Some((found, found.position?))) else {
            return ProbeStep::Wait((self.missing_since + CONNECTION_WAIT).max(now + LOOK_INTERVAL));
        };
        if connection.delivered.is_recovering {
            return ProbeStep::Wait(now + LOOK_INTERVAL);
        }
        let asked_at = connection.asked_peer.map(|(_, at)| at).max(connection.repeated_at);
        let earliest = asked_at.filter(|_| connection.may_reach_peer(ttl)).map(|at| at + REPEAT_SPACING);
        match earliest.filter(|earliest| *earliest > now) {
            Some(earliest) => ProbeStep::Wait(earliest),
            None => ProbeStep::Segment(connection.addresses.segment(position, position.below(ttl), now)),
        }
    }

    /// The segment of a probe was sent.
    pub fn sent(&mut self, ttl: u8, identifier: Vec<u8>, at: Timestamp) {
        let Some(connection) = &mut self.connection else { return };
        let Some(position) = connection.position else { return };
        let (sequence, may_reach_peer) = (position.below(ttl), connection.may_reach_peer(ttl));
        // Until it has answered again, the route may have become shorter.
        connection.router_ttls.remove(&ttl);
        if may_reach_peer {
            connection.asked_peer = Some((sequence, at));
        }
        if ttl == DESTINATION {
            connection.unanswered += 1;
            if connection.unanswered > UNANSWERED_MAX {
                (connection.unanswered, connection.silent_until) = (0, Some(at + SILENT_FOR));
            }
        } else {
            connection.verification = Verification::Unverified(connection.unverified(ttl, at));
        }
        if connection.sent.len() == SENT_MAX {
            connection.sent.pop_front();
        }
        let is_answered = false;
        connection.sent.push_back(SentSegment { ttl, sequence, at, identifier, may_reach_peer, is_answered });
    }
}

impl Connection {
    /// Whether nothing that is in flight is acknowledged.
    fn is_stuck(&self, now: Timestamp) -> bool {
        self.delivered.is_in_flight() && self.progress_at + STALLED_AFTER <= now
    }

    /// Whether no router has answered the latest probe with this TTL.
    fn may_reach_peer(&self, ttl: u8) -> bool {
        !self.router_ttls.contains(&ttl)
    }

    /// The unverified segments after one with this TTL.
    fn unverified(&self, ttl: u8, at: Timestamp) -> UnverifiedSegments {
        let mut ttls = self.verification.latest().map_or_else(BTreeSet::new, |earlier| earlier.ttls.clone());
        ttls.insert(ttl);
        UnverifiedSegments { sent: self.delivered.sent, ttls, at }
    }
}

impl Verification {
    const fn latest(&self) -> Option<&UnverifiedSegments> {
        match self {
            Self::Untested | Self::Verified => None,
            Self::Testing(latest) | Self::Unverified(latest) | Self::Stalled(latest) => Some(latest),
        }
    }
}

impl Delivered {
    const fn is_in_flight(&self) -> bool {
        self.acknowledged < self.sent
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
