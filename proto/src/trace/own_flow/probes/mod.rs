//! Probes on the connection of an echo path.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::FlowPosition;
use super::segments::FlowEnds;
use crate::time::Timestamp;
use crate::trace::{CLAMPED_FOR, DESTINATION};
use crate::wire::tcp::ReceivedSegment;

/// Decides how the probes of a [`Tracer`](crate::trace::Tracer) over TCP are sent: as segments on the
/// connection of the echoes, or, while there is none that can be used, as SYN with other ports.
///
/// Routers answer segments with ICMP errors. The peer answers by repeating its last acknowledgment, which
/// says nothing about which segment it answers, so that only one probe may be in flight.
///
/// Segments are sent only while the connection delivers data. Before the first probe with a limited TTL one
/// segment is sent whose TTL reaches the last router that is expected: all devices on the way see it. If a
/// connection stalls after a segment, twice in a row, the way does not bear them, and for [`CLAMPED_FOR`]
/// none are sent.
#[derive(Debug)]
pub struct ConnectionProbes {
    connection: Option<Connection>,
    /// Number of connections so far.
    opened: u64,
    /// With which packets probes are sent; `None` until that is decided.
    in_use: Option<Packets>,
    /// Since when there is no connection.
    missing_since: Timestamp,
    /// Connections in a row that have stalled after a segment.
    stalls: u32,
    /// The largest TTL of the segments after which the latest one has stalled.
    stalled_ttl: u8,
    given_up_until: Option<Timestamp>,
    /// Whether giving up was not told yet.
    has_given_up: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packets {
    /// Segments on the connection with this number.
    Segments(u64),
    Syn,
}

#[derive(Debug)]
struct Connection {
    ends: FlowEnds,
    /// `None` until a segment was received.
    position: Option<FlowPosition>,
    /// The latest segments, oldest first.
    sent: VecDeque<SentSegment>,
    /// The largest TTL at which a router answered.
    farthest_router: u8,
    /// When the peer last repeated an acknowledgment.
    repeated_at: Option<Timestamp>,
    delivered: Delivered,
    /// When the peer last acknowledged something, or when nothing was in flight.
    progress_at: Timestamp,
    /// Present if data that was sent after the latest segment was not acknowledged yet.
    doubt: Option<Doubt>,
    /// Whether a segment was sent before the first probe.
    is_tested: bool,
    /// Whether it has stalled after a segment.
    has_stalled: bool,
}

/// Segments that the connection may not have borne.
#[derive(Debug, Clone, Copy)]
struct Doubt {
    /// Bytes of data that were sent before the latest one.
    sent: u64,
    /// Their largest TTL.
    ttl: u8,
}

#[derive(Debug)]
struct SentSegment {
    ttl: u8,
    sequence: u32,
    at: Timestamp,
    /// The bytes by which the tracer knows the probe.
    identifier: Vec<u8>,
    is_answered: bool,
}

/// How a connection delivers data, as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Delivered {
    /// Bytes of data that were sent, each counted once.
    pub sent: u64,
    /// Bytes of data that were acknowledged.
    pub acknowledged: u64,
    /// Whether segments are being sent again.
    pub is_recovering: bool,
    /// The minimum RTT; 0 if it is not known.
    pub rtt_min: Duration,
}

/// How a probe is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeStep {
    /// As this segment on the connection, which is reported with [`ConnectionProbes::sent`].
    Segment([u8; 20]),
    /// Not yet: first this segment is sent with this TTL, which is reported with
    /// [`ConnectionProbes::tested`].
    Test {
        /// The TTL.
        ttl: u8,
        /// The segment.
        segment: [u8; 20],
    },
    /// As a SYN with other ports than the connection.
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

/// A change that the tracer must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlowChange {
    /// Probes have other ports from now on.
    Replaced,
    /// Connections have stalled after segments. For [`CLAMPED_FOR`] none are sent.
    GivenUp,
}

/// How long probes wait for a connection before they are sent without one. Chosen: 3 s, in which a connection
/// that has ended is replaced if the path is up.
const CONNECTION_WAIT: Duration = Duration::from_secs(3);

/// Time between two segments that may reach the peer: Linux answers one per half a second
/// (`net.ipv4.tcp_invalid_ratelimit`), and some more so that the second does not come too early.
const REPEAT_SPACING: Duration = Duration::from_millis(550);

/// How long nothing that is in flight must be acknowledged until a connection has stalled. Chosen: 5 s, in
/// which TCP sends a lost segment again four times (RFC 6298, from 200 ms on, doubling), and a full queue is
/// emptied.
const STALLED_AFTER: Duration = Duration::from_secs(5);

/// Connections in a row that stall after a segment before no more are sent. Chosen: 2, because one may have
/// stalled by chance.
const STALLS_MAX: u32 = 2;

/// Time between two looks at how the connection delivers data, while a probe waits for that.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Segments to which answers are recognized. Chosen: more than are sent until an answer is too old.
const SENT_MAX: usize = 64;

/// What the kernel counts as acknowledged for the SYN of a connection that this host has opened.
const SYN: u64 = 1;

impl ConnectionProbes {
    /// There is no connection yet.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        Self {
            connection: None,
            opened: 0,
            in_use: None,
            missing_since: now,
            stalls: 0,
            stalled_ttl: 0,
            given_up_until: None,
            has_given_up: false,
        }
    }

    /// The echoes have a connection, with these addresses and ports of this host and the peer.
    pub fn opened(&mut self, local: SocketAddr, peer: SocketAddr, at: Timestamp) {
        self.opened += 1;
        self.connection = Some(Connection {
            ends: FlowEnds { local, peer },
            position: None,
            sent: VecDeque::new(),
            farthest_router: 0,
            repeated_at: None,
            delivered: Delivered::default(),
            progress_at: at,
            doubt: None,
            is_tested: false,
            has_stalled: false,
        });
    }

    /// The connection has ended.
    pub fn closed(&mut self, at: Timestamp) {
        if let Some(connection) = self.connection.take() {
            // The echoes give it up sooner than it has stalled.
            if let Some(doubt) = connection.doubt
                && connection.delivered.is_in_flight()
                && !connection.has_stalled
            {
                self.stalled(doubt, at);
            }
            self.missing_since = at;
        }
    }

    /// Whether there is a connection.
    #[must_use]
    pub fn has_connection(&self) -> bool {
        self.connection.is_some()
    }

    /// Whether probes are sent on the connection.
    #[must_use]
    pub fn is_on_connection(&self) -> bool {
        matches!(self.in_use, Some(Packets::Segments(_)))
    }

    /// Whether data that was sent after a segment was not acknowledged yet, so that
    /// [`delivered`](Self::delivered) must be called in time.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        self.connection.as_ref().is_some_and(Connection::is_in_doubt)
    }

    /// Takes how the connection delivers data.
    pub fn delivered(&mut self, delivered: Delivered, at: Timestamp) {
        let Some(connection) = &mut self.connection else { return };
        if delivered.acknowledged > connection.delivered.acknowledged || !delivered.is_in_flight() {
            connection.progress_at = at;
        }
        connection.delivered = delivered;
        let Some(doubt) = connection.doubt else { return };
        if delivered.acknowledged > doubt.sent + SYN {
            connection.doubt = None;
            if doubt.ttl >= self.stalled_ttl {
                (self.stalls, self.stalled_ttl) = (0, 0);
            }
        } else if connection.is_stuck(at) && !connection.has_stalled {
            connection.has_stalled = true;
            self.stalled(doubt, at);
        }
    }

    fn stalled(&mut self, doubt: Doubt, at: Timestamp) {
        self.stalls += 1;
        self.stalled_ttl = doubt.ttl;
        if self.stalls >= STALLS_MAX {
            (self.stalls, self.stalled_ttl) = (0, 0);
            self.given_up_until = Some(at + CLAMPED_FOR);
            self.has_given_up = true;
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
        let position = FlowPosition::of(segment, arrived_ttl);
        let earlier = connection.position.replace(position)?;
        let is_repeated = segment.is_empty
            && (earlier.unacknowledged, earlier.expected) == (position.unacknowledged, position.expected);
        if !is_repeated {
            return None;
        }
        connection.repeated_at = Some(at);
        // A segment that comes sooner answers an earlier one.
        let soonest = connection.delivered.rtt_min / 2;
        let latest =
            connection.sent.back_mut().filter(|sent| !sent.is_answered && at >= sent.at + soonest)?;
        latest.is_answered = true;
        Some(ProbeAnswer { identifier: latest.identifier.clone(), router: None, extensions: Vec::new() })
    }

    /// Takes an ICMP message from `router`. Returns the answer to a probe, if it is the first one.
    pub fn message_received(&mut self, message: &[u8], router: IpAddr) -> Option<ProbeAnswer> {
        let connection = self.connection.as_mut()?;
        let expired = connection.ends.expired(message)?;
        let sent = connection.sent.iter_mut().rev().find(|sent| sent.sequence == expired.sequence)?;
        if sent.is_answered || sent.ttl == DESTINATION {
            return None;
        }
        sent.is_answered = true;
        connection.farthest_router = connection.farthest_router.max(sent.ttl);
        let extensions = expired.extensions.unwrap_or_default().to_vec();
        Some(ProbeAnswer { identifier: sent.identifier.clone(), router: Some(router), extensions })
    }

    /// What has changed, before a probe is sent.
    pub fn change(&mut self, now: Timestamp) -> Option<FlowChange> {
        if std::mem::take(&mut self.has_given_up) {
            return Some(FlowChange::GivenUp);
        }
        self.given_up_until = self.given_up_until.filter(|until| *until > now);
        let earlier = self.in_use;
        let is_allowed = self.given_up_until.is_none();
        self.in_use = match &self.connection {
            Some(connection) if is_allowed && connection.is_usable(now) => {
                Some(Packets::Segments(self.opened))
            }
            // It has stalled, or must not be used.
            Some(connection) if !is_allowed || connection.is_stuck(now) => Some(Packets::Syn),
            Some(_) | None if self.missing_since + CONNECTION_WAIT <= now => Some(Packets::Syn),
            Some(_) | None => earlier,
        };
        (earlier.is_some() && earlier != self.in_use).then_some(FlowChange::Replaced)
    }

    /// How a probe with this TTL is sent. [`change`](Self::change) is called before, and
    /// [`delivered`](Self::delivered) with the latest state of the connection.
    #[must_use]
    pub fn step(&self, ttl: u8, now: Timestamp) -> ProbeStep {
        let connection = match self.in_use {
            Some(Packets::Syn) => return ProbeStep::Syn,
            Some(Packets::Segments(number)) if number == self.opened => self.connection.as_ref(),
            Some(Packets::Segments(_)) | None => None,
        };
        let Some((connection, position)) = connection.and_then(|found| Some((found, found.position?))) else {
            return ProbeStep::Wait((self.missing_since + CONNECTION_WAIT).max(now + LOOK_INTERVAL));
        };
        if connection.delivered.is_recovering || connection.is_testing() {
            return ProbeStep::Wait(now + LOOK_INTERVAL);
        }
        if ttl != DESTINATION && !connection.is_tested {
            let ttl = position.routers_back().max(1);
            return ProbeStep::Test { ttl, segment: connection.ends.segment(position, position.below(ttl)) };
        }
        if let Some(repeated_at) = connection.repeated_at
            && ttl > connection.farthest_router
            && repeated_at + REPEAT_SPACING > now
        {
            return ProbeStep::Wait(repeated_at + REPEAT_SPACING);
        }
        ProbeStep::Segment(connection.ends.segment(position, sequence(position, ttl)))
    }

    /// The segment before the first probe was sent.
    pub fn tested(&mut self, ttl: u8) {
        if let Some(connection) = &mut self.connection {
            connection.is_tested = true;
            connection.doubted(ttl);
        }
    }

    /// The segment of a probe was sent.
    pub fn sent(&mut self, ttl: u8, identifier: Vec<u8>, at: Timestamp) {
        let Some(connection) = &mut self.connection else { return };
        let Some(position) = connection.position else { return };
        if connection.sent.len() == SENT_MAX {
            connection.sent.pop_front();
        }
        let sequence = sequence(position, ttl);
        connection.sent.push_back(SentSegment { ttl, sequence, at, identifier, is_answered: false });
        if ttl != DESTINATION {
            connection.doubted(ttl);
        }
    }
}

impl Connection {
    fn is_usable(&self, now: Timestamp) -> bool {
        // Kernels before 4.19 do not count what is sent, so that a stall could not be seen.
        self.position.is_some() && self.delivered.sent > 0 && !self.is_stuck(now)
    }

    /// Whether nothing that is in flight is acknowledged.
    fn is_stuck(&self, now: Timestamp) -> bool {
        self.delivered.is_in_flight() && self.progress_at + STALLED_AFTER <= now
    }

    fn is_in_doubt(&self) -> bool {
        self.doubt.is_some()
    }

    /// Whether it is not known yet whether it bears segments.
    fn is_testing(&self) -> bool {
        self.is_tested && self.is_in_doubt() && self.sent.iter().all(|sent| sent.ttl == DESTINATION)
    }

    fn doubted(&mut self, ttl: u8) {
        let ttl = self.doubt.map_or(ttl, |earlier| earlier.ttl.max(ttl));
        self.doubt = Some(Doubt { sent: self.delivered.sent, ttl });
    }
}

impl Delivered {
    const fn is_in_flight(&self) -> bool {
        self.acknowledged < self.sent
    }
}

/// The sequence number of a probe. A probe that is not limited has that of a keep-alive.
const fn sequence(position: FlowPosition, ttl: u8) -> u32 {
    position.below(if ttl == DESTINATION { 1 } else { ttl })
}

#[cfg(test)]
mod tests;
