//! How probes are written.

use std::sync::PoisonError;
use std::time::Duration;

use super::{SentProbe, Tracer};
use crate::echo::{Profile, Quirks, RequestContents, RequestExtensions, encode};
use crate::machine::{Now, Send, SendId};
use crate::probe_budget::Expected;
use crate::time::Timestamp;
use crate::trace::probe_match::{self, wire_sequence};
use crate::trace::{DESTINATION, Direction, ProbeProtocol, TraceReport};
use crate::wire::icmp::{IcmpEcho, IcmpVersion};
use crate::wire::{NtpTime, ReplyFate, ReverseOutcome, ReverseTrace};

/// Traces in a row that do not reach the destination before requests are sent without extensions. Chosen: 2,
/// because one reply may be lost.
const UNREACHED_MAX: u8 = 2;

/// How long requests are sent without extensions before these are tried again: as long as echoes are.
const PLAIN_FOR: Duration = Duration::from_secs(600);

impl Tracer {
    /// A trace has ended. A reflector that drops extensions does not answer the first ones.
    pub(super) fn detect_support(&mut self, is_reached: bool, now: Timestamp) {
        if self.plain_until.is_some_and(|until| until <= now) {
            self.plain_until = None;
        }
        self.unreached = if is_reached { 0 } else { self.unreached.saturating_add(1) };
        if self.plain_until.is_none() && self.unreached >= UNREACHED_MAX {
            self.plain_until = Some(now + PLAIN_FOR);
            self.unreached = 0;
        }
    }

    /// The extensions of requests.
    fn extensions(&self) -> RequestExtensions {
        match self.spec.quirks.map(|quirks| quirks.profile) {
            Some(Profile::Detect) if self.plain_until.is_some() => RequestExtensions::None,
            None | Some(Profile::Detect) => RequestExtensions::All,
            Some(Profile::Stamp) => RequestExtensions::ClassOfService,
            Some(Profile::Plain | Profile::TwampLight) => RequestExtensions::None,
        }
    }

    /// Sends the probe, or defers it. `wanted` are the probes whose outcome it asks for.
    pub(super) fn send(
        &mut self,
        (direction, flow): (Direction, u8),
        (ttl, is_reserved): (u8, bool),
        wanted: [Option<u64>; ReverseTrace::OUTCOMES],
        now: Now,
        arena: &mut Vec<u8>,
    ) -> Option<Send> {
        let is_v4 = self.spec.to.is_ipv4();
        let traced = self.traced(direction, flow)?;
        if !is_reserved && traced.retries().is_reserved(ttl) {
            return None;
        }
        let expected = traced.expected(ttl, is_v4);
        // On the way back the responder limits what routers are asked.
        if let (Some(expected), Direction::Forward, false) = (expected, direction, is_reserved) {
            let mut budget = self.spec.budget.lock().unwrap_or_else(PoisonError::into_inner);
            let (at, deferral) = match self.spec.skips_busy_routers {
                true => (None, budget.take(expected, now.at).err()),
                false => {
                    let (at, deferral) = budget.reserve(expected, now.at);
                    (Some(at), deferral)
                }
            };
            drop(budget);
            if let Some(reason) = deferral {
                if let Some(at) = at {
                    self.traced(direction, flow)?.retries_mut().reserve(ttl, at);
                }
                self.report(direction, TraceReport::Deferred(reason));
                return None;
            }
        }
        let sequence = self.next_sequence;
        self.traced(direction, flow)?.queued(sequence, ttl, now.at);
        if let (Direction::Reverse, true) = (direction, ttl != DESTINATION) {
            let reverse = self.reverse.get_mut(usize::from(flow))?.as_mut()?;
            reverse.fetch_after(now.at);
        }
        self.next_sequence = sequence + 1;
        let timestamp = match self.spec.protocol {
            ProbeProtocol::Udp => {
                self.encode_request(sequence, (direction, flow, ttl), expected, wanted, now, arena)
            }
            ProbeProtocol::Icmp => {
                let timestamp = NtpTime::from(now.wall.wall(now.at));
                let (session, ssid) = (self.session, self.spec.ssids[usize::from(flow)]);
                let echo = IcmpEcho { session, timestamp, sequence: wire_sequence(sequence), ssid };
                echo.encode(IcmpVersion::of(self.spec.to.ip()), IcmpEcho::BYTES, arena);
                timestamp
            }
            ProbeProtocol::ClosedPort => {
                let timestamp = NtpTime::from(now.wall.wall(now.at));
                probe_match::encode_datagram(sequence, timestamp, arena);
                timestamp
            }
            ProbeProtocol::Tcp => {
                // The kernel writes the segment; the driver passes this back in its place.
                arena.extend_from_slice(&sequence.to_be_bytes());
                NtpTime::from(now.wall.wall(now.at))
            }
        };
        let probe = SentProbe {
            flow,
            direction,
            ttl,
            timestamp,
            at: now.at,
            is_sent: false,
            is_answered: false,
            is_reply_sent: false,
        };
        self.probes.insert(sequence, probe);
        Some(Send {
            id: SendId(sequence),
            flow,
            from: None,
            to: self.spec.to,
            tos: self.spec.dscp.tos(),
            ttl: if direction == Direction::Forward { ttl } else { DESTINATION },
            dont_fragment: false,
            segment: None,
            timestamp: self.spec.tx_timestamps,
        })
    }

    /// Appends a STAMP request, and returns its T1.
    fn encode_request(
        &self,
        sequence: u64,
        (direction, flow, ttl): (Direction, u8, u8),
        expected: Option<Expected>,
        wanted: [Option<u64>; ReverseTrace::OUTCOMES],
        now: Now,
        arena: &mut Vec<u8>,
    ) -> NtpTime {
        let reply_ttl = if direction == Direction::Reverse && ttl != DESTINATION { ttl } else { 0 };
        let router = expected.and_then(|expected| match expected {
            Expected::Router(router) => Some(router),
            Expected::Unknown { .. } => None,
        });
        let outcome =
            |sequence| ReverseOutcome { sequence: wire_sequence(sequence), fate: ReplyFate::Wanted };
        let outcomes = wanted.map(|sequence| sequence.map(outcome));
        let reverse = ReverseTrace { ttl: reply_ttl, expected: router, outcomes, ..ReverseTrace::default() };
        let is_extended = self.extensions() == RequestExtensions::All;
        let asks_reverse = self.spec.traces_reverse
            && is_extended
            && (direction == Direction::Reverse || ttl == DESTINATION);
        let contents = RequestContents {
            mode: self.mode(),
            sequence: wire_sequence(sequence),
            at: now.wall.wall(now.at),
            ssid: match self.spec.quirks {
                Some(Quirks { profile: Profile::TwampLight, .. }) => 0,
                Some(_) | None => self.spec.ssids[usize::from(flow)],
            },
            flow,
            session: self.session,
            sent: self.sent_count.wrapping_add(1),
            is_brief: true,
            dscp: self.spec.dscp.value(),
            size: None,
            extensions: self.extensions(),
            reverse: asks_reverse.then_some(reverse),
        };
        let key = self.spec.keys.as_ref().map(|keys| keys.current());
        encode(&contents, key, arena).timestamp
    }
}
