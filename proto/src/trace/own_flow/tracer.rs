//! A single trace of an established connection.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::FlowPosition;
use super::segments::ConnectionAddresses;
use crate::probe_budget::{Expected, ProbeBudget};
use crate::time::Timestamp;
use crate::trace::burst::SPACING;
use crate::trace::{Answer, AnswerExtensions, Hop, HopState, Trace, Trigger};

/// What to trace.
#[derive(Debug, Clone)]
pub struct OwnFlowSpec {
    /// The address and port of this host.
    pub local: SocketAddr,
    /// The address and port of the peer.
    pub peer: SocketAddr,
    /// Where the connection stands.
    pub position: FlowPosition,
    /// The RTT of the connection.
    pub rtt: Duration,
    /// Largest TTL.
    pub hops_max: u8,
    /// How long to wait for each answer.
    pub answer_wait: Duration,
    /// The limits that all tracers of the agent share.
    pub budget: Arc<Mutex<ProbeBudget>>,
}

/// Traces the routers from this host to the peer of a connection, once.
#[derive(Debug)]
pub struct OwnFlowTracer {
    spec: OwnFlowSpec,
    began: Timestamp,
    /// By TTL.
    probes: BTreeMap<u8, SegmentProbe>,
    send_at: Timestamp,
    check: ConnectionCheck,
}

/// Whether the connection was checked after the first segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ConnectionCheck {
    /// No segment was sent.
    NotDue,
    /// The first segment was sent.
    Due,
    /// The driver was told to check it.
    Requested,
}

#[derive(Debug)]
enum SegmentProbe {
    /// Left out: its router, or the agent, was asked too recently.
    NotProbed,
    /// Not sent: the host refused to.
    NotSent,
    Sent {
        at: Timestamp,
        answer: Option<Answer>,
    },
}

/// What a trace does next.
#[derive(Debug, Clone, PartialEq)]
pub enum OwnFlowStep {
    /// Send this segment with this TTL, and report that with [`OwnFlowTracer::sent`].
    Send {
        /// The TTL.
        ttl: u8,
        /// The segment from its TCP header on.
        segment: Vec<u8>,
    },
    /// Check that the connection still delivers data before the next step: the first segment, whose TTL
    /// reaches the last router that is expected, was sent. Occurs once; never if no segment was sent.
    CheckConnection,
    /// Wait until this time or an answer.
    Wait(Timestamp),
    /// The trace is complete.
    Complete(Box<Trace>),
}

/// Number of hops that are probed behind the last one that answers or is expected. Chosen: 2, because the way
/// to the peer may be longer than the way back.
const MARGIN: u8 = 2;

impl OwnFlowTracer {
    /// A trace that begins at once.
    #[must_use]
    pub fn new(spec: OwnFlowSpec, now: Timestamp) -> Self {
        let (probes, check) = (BTreeMap::new(), ConnectionCheck::NotDue);
        Self { spec, began: now, probes, send_at: now, check }
    }

    /// What to do next.
    pub fn step(&mut self, now: Timestamp) -> OwnFlowStep {
        if self.check == ConnectionCheck::Due {
            self.check = ConnectionCheck::Requested;
            return OwnFlowStep::CheckConnection;
        }
        while let Some(ttl) = self.next_ttl() {
            if self.send_at > now {
                return OwnFlowStep::Wait(self.send_at);
            }
            let expected = Expected::Unknown { ttl, is_v4: self.spec.peer.is_ipv4() };
            let mut budget = self.spec.budget.lock().unwrap_or_else(PoisonError::into_inner);
            let is_allowed = budget.take(expected, now).is_ok();
            drop(budget);
            if !is_allowed {
                self.probes.insert(ttl, SegmentProbe::NotProbed);
                continue;
            }
            self.send_at = now + SPACING;
            // Until it is sent, which the driver reports.
            self.probes.insert(ttl, SegmentProbe::NotSent);
            return OwnFlowStep::Send { ttl, segment: self.segment(ttl, now) };
        }
        match self.waits_until(now) {
            Some(until) => OwnFlowStep::Wait(until),
            None => OwnFlowStep::Complete(Box::new(self.trace(now))),
        }
    }

    /// The TTL to probe next: first that of the last router that is expected, which a device that rewrites
    /// small TTLs is least likely to notice, then all from 1 on. `None`: all were.
    fn next_ttl(&self) -> Option<u8> {
        let last = self.last_ttl();
        match self.probes.is_empty() {
            true => Some(self.spec.position.routers_back().clamp(1, last)),
            false => (1..=last).find(|ttl| !self.probes.contains_key(ttl)),
        }
    }

    /// A segment was sent.
    pub fn sent(&mut self, ttl: u8, at: Timestamp) {
        self.probes.insert(ttl, SegmentProbe::Sent { at, answer: None });
        if self.check == ConnectionCheck::NotDue {
            self.check = ConnectionCheck::Due;
        }
    }

    /// An ICMP message was received from `from`. Returns the hop and its answer, if it is the first answer to
    /// one of the segments.
    pub fn received(&mut self, message: &[u8], from: IpAddr, at: Timestamp) -> Option<(u8, Answer)> {
        let expired = self.addresses().expired(message)?;
        let below = self.spec.position.unacknowledged.wrapping_sub(expired.sequence);
        let ttl = u8::try_from(below).ok()?;
        let Some(SegmentProbe::Sent { at: sent_at, answer }) = self.probes.get_mut(&ttl) else {
            return None;
        };
        if answer.is_some() {
            return None;
        }
        let extensions = expired.extensions.and_then(AnswerExtensions::read).map(Arc::new);
        let found = Answer { router: from, rtt: at.since(*sent_at), extensions };
        *answer = Some(found.clone());
        self.spec.budget.lock().unwrap_or_else(PoisonError::into_inner).answered(ttl, from);
        Some((ttl, found))
    }

    fn addresses(&self) -> ConnectionAddresses {
        ConnectionAddresses { local: self.spec.local, peer: self.spec.peer }
    }

    fn segment(&self, ttl: u8, now: Timestamp) -> Vec<u8> {
        let position = self.spec.position;
        self.addresses().segment(position, position.below(ttl), now)
    }

    fn answer(&self, ttl: u8) -> Option<&Answer> {
        match self.probes.get(&ttl)? {
            SegmentProbe::Sent { answer, .. } => answer.as_ref(),
            SegmentProbe::NotProbed | SegmentProbe::NotSent => None,
        }
    }

    /// The largest TTL at which a router has answered; 0: none.
    fn last_answered(&self) -> u8 {
        self.probes.keys().rev().copied().find(|ttl| self.answer(*ttl).is_some()).unwrap_or(0)
    }

    /// The largest TTL at which a router is expected or has answered.
    fn last_expected(&self) -> u8 {
        self.spec.position.routers_back().max(self.last_answered())
    }

    /// The largest TTL to probe.
    fn last_ttl(&self) -> u8 {
        self.last_expected().saturating_add(MARGIN).min(self.spec.hops_max)
    }

    /// When the last probe has waited long enough; `None`: all have. The peer does not answer, so behind the
    /// expected routers an answer is waited for only as long as its RTT suggests.
    fn waits_until(&self, now: Timestamp) -> Option<Timestamp> {
        let routers = self.last_expected();
        let short = (self.spec.rtt * 5 / 4 + Duration::from_millis(30)).min(self.spec.answer_wait);
        let waiting = self.probes.iter().filter_map(|(ttl, probe)| match probe {
            SegmentProbe::Sent { at, answer: None } if *ttl > routers => Some(*at + short),
            SegmentProbe::Sent { at, answer: None } => Some(*at + self.spec.answer_wait),
            SegmentProbe::Sent { .. } | SegmentProbe::NotProbed | SegmentProbe::NotSent => None,
        });
        waiting.filter(|until| *until > now).max()
    }

    /// Number of routers up to the peer: those that answer, unless the way back is longer. Then routers may
    /// be silent, or the ways differ.
    fn routers(&self) -> Option<u8> {
        let last = self.last_answered();
        (self.spec.position.routers_back() <= last).then_some(last)
    }

    fn trace(&self, now: Timestamp) -> Trace {
        let last = self.last_expected();
        let hops = self.probes.iter().take_while(|(ttl, _)| **ttl <= last).map(|(&ttl, probe)| {
            let (state, sent) = match probe {
                SegmentProbe::Sent { answer: Some(_), .. } => (HopState::Answered, 1),
                SegmentProbe::Sent { answer: None, .. } => (HopState::Unanswered, 1),
                SegmentProbe::NotProbed | SegmentProbe::NotSent => (HopState::NotProbed, 0),
            };
            Hop {
                ttl,
                state,
                sent,
                answers: self.answer(ttl).cloned().into_iter().collect(),
                responder: None,
            }
        });
        Trace {
            flow: 0,
            trigger: Trigger::Start,
            began: self.began,
            duration: now.since(self.began),
            is_burst: true,
            rtt: Some(self.spec.rtt),
            routers: self.routers(),
            hops: hops.collect(),
            route: None,
            first_lossy_hop: None,
            is_ttl_clamped: false,
            rejection: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::segments::tests::time_exceeded;
    use super::*;
    use crate::probe_budget::{ProbeLimits, TokenRate};
    use crate::wire::tcp::ReceivedSegment;

    const LOCAL: ([u8; 4], u16) = ([192, 0, 2, 1], 9_862);
    const PEER: ([u8; 4], u16) = ([198, 51, 100, 7], 50_000);
    const RTT: Duration = Duration::from_millis(10);

    fn at(microseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + microseconds * 1_000)
    }

    fn unlimited() -> ProbeBudget {
        let none = TokenRate::UNLIMITED;
        ProbeBudget::new(ProbeLimits { router_v4: none, router_v6: none, agent: none, others: none })
    }

    fn tracer(arrived_ttl: u8, budget: ProbeBudget) -> OwnFlowTracer {
        // The sequence numbers wrap around within the trace.
        let position =
            FlowPosition { unacknowledged: 3, expected: 77, timestamps: None, seen_at: at(0), arrived_ttl };
        let spec = OwnFlowSpec {
            local: LOCAL.into(),
            peer: PEER.into(),
            position,
            rtt: RTT,
            hops_max: 30,
            answer_wait: Duration::from_millis(1_200),
            budget: Arc::new(Mutex::new(budget)),
        };
        OwnFlowTracer::new(spec, at(0))
    }

    /// What a router reports of a segment.
    fn report(segment: &[u8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
        time_exceeded([LOCAL.0, PEER.0], segment, change)
    }

    fn router(ttl: u8) -> IpAddr {
        [10, 0, 0, ttl].into()
    }

    /// Runs a trace over a number of routers, of which some do not answer. Returns it and the TTLs sent.
    fn run(mut tracer: OwnFlowTracer, routers: u8, silent: &[u8]) -> (Trace, Vec<u8>, Timestamp) {
        let (mut now, mut sent, mut answers) = (at(0), Vec::new(), Vec::new());
        loop {
            answers.retain(|(due, ttl, message): &(Timestamp, u8, Vec<u8>)| {
                let is_due = *due <= now;
                if is_due {
                    let found = tracer.received(message, router(*ttl), *due);
                    assert_eq!(found, Some((*ttl, Answer::new(router(*ttl), RTT))));
                    assert_eq!(tracer.received(message, router(9), *due), None, "only the first answer");
                }
                !is_due
            });
            match tracer.step(now) {
                OwnFlowStep::Send { ttl, segment } => {
                    sent.push(ttl);
                    tracer.sent(ttl, now);
                    if ttl <= routers && !silent.contains(&ttl) {
                        answers.push((now + RTT, ttl, report(&segment, |_| {})));
                    }
                }
                // What is sent on the connection takes an RTT, as an answer does.
                OwnFlowStep::CheckConnection => now = now + RTT,
                OwnFlowStep::Wait(until) => {
                    assert!(until > now);
                    now = answers.iter().map(|(due, ..)| *due).min().unwrap_or(until).min(until).max(now);
                }
                OwnFlowStep::Complete(trace) => return (*trace, sent, now),
            }
        }
    }

    #[test]
    fn all_routers_are_found_in_little_more_than_two_round_trips() {
        let (trace, sent, ended) = run(tracer(64 - 4, unlimited()), 4, &[]);
        assert_eq!(sent, [4, 1, 2, 3, 5, 6], "and two behind them");
        assert_eq!((trace.routers, trace.rtt, trace.hops.len()), (Some(4), Some(RTT), 4));
        assert!(trace.hops.iter().all(|hop| hop.state == HopState::Answered));
        assert_eq!(
            trace.hops.iter().map(|hop| hop.answers[0].router).collect::<Vec<_>>(),
            [1, 2, 3, 4].map(router)
        );
        assert!(ended <= at(55_000), "{ended:?}");
    }

    #[test]
    fn way_that_is_longer_than_the_way_back_is_followed() {
        for arrived in [64, 126] {
            let (trace, sent, _) = run(tracer(arrived, unlimited()), 11, &[9]);
            let mut probed = sent.clone();
            probed.sort_unstable();
            assert_eq!(probed, (1..=13).collect::<Vec<u8>>(), "{arrived}");
            assert_eq!((trace.routers, trace.hops.len()), (Some(11), 11));
            assert_eq!(trace.hops[8].state, HopState::Unanswered);
        }
        let (trace, sent, _) = run(tracer(64, unlimited()), 200, &[]);
        assert_eq!((sent.len(), trace.hops.len()), (30, 30), "the largest TTL");
    }

    #[test]
    fn number_of_routers_is_not_known_if_the_last_ones_are_silent() {
        let (trace, _, ended) = run(tracer(64 - 4, unlimited()), 4, &[4]);
        assert_eq!((trace.routers, trace.hops.len()), (None, 4));
        assert_eq!(trace.hops[3].state, HopState::Unanswered);
        assert!(ended >= at(1_200_000), "its answer was waited for");
    }

    #[test]
    fn silent_routers_stay_in_the_record() {
        let (trace, _, _) = run(tracer(64 - 3, unlimited()), 3, &[1, 2, 3]);
        assert_eq!(trace.routers, None);
        let states: Vec<_> = trace.hops.iter().map(|hop| (hop.ttl, hop.state)).collect();
        assert_eq!(states, [1, 2, 3].map(|ttl| (ttl, HopState::Unanswered)));
    }

    #[test]
    fn connection_is_checked_once_and_only_if_a_segment_was_sent() {
        let mut refusing = tracer(64 - 2, unlimited());
        let (mut now, mut checks) = (at(0), 0);
        loop {
            match refusing.step(now) {
                OwnFlowStep::Send { .. } => {}
                OwnFlowStep::CheckConnection => checks += 1,
                OwnFlowStep::Wait(until) => now = until,
                OwnFlowStep::Complete(trace) => {
                    assert!(trace.hops.iter().all(|hop| hop.state == HopState::NotProbed));
                    break;
                }
            }
        }
        assert_eq!(checks, 0, "this host has refused all segments");
    }

    #[test]
    fn peer_without_routers_is_reached() {
        let (trace, sent, _) = run(tracer(64, unlimited()), 0, &[]);
        assert_eq!((sent, trace.routers, trace.hops.len()), (vec![1, 2], Some(0), 0));
    }

    #[test]
    fn router_that_was_asked_too_recently_is_left_out() {
        let once = TokenRate { spacing: Duration::from_secs(60), burst: 1 };
        let limits = ProbeLimits { router_v4: once, ..ProbeLimits::default() };
        let mut budget = ProbeBudget::new(limits);
        budget.take(Expected::Unknown { ttl: 2, is_v4: true }, at(0)).unwrap();
        let (trace, sent, _) = run(tracer(64 - 3, budget), 3, &[]);
        assert_eq!(sent, [3, 1, 4, 5]);
        assert_eq!((trace.hops[1].state, trace.hops[1].sent), (HopState::NotProbed, 0));
        assert_eq!(trace.routers, Some(3));
    }

    #[test]
    fn answer_must_quote_addresses_ports_and_sequence_number() {
        let mut tracer = tracer(63, unlimited());
        let OwnFlowStep::Send { ttl: 1, segment } = tracer.step(at(0)) else { panic!() };
        assert_eq!(tracer.received(&report(&segment, |_| {}), router(1), at(5)), None, "it was not sent");
        tracer.sent(1, at(10));
        // Addresses from byte 20, ports from 28, and the sequence number from 32 on.
        for byte in 20..36 {
            let forged = report(&segment, |message| message[byte] ^= 1);
            assert_eq!(tracer.received(&forged, router(1), at(20)), None, "byte {byte}");
        }
        let answer = Answer::new(router(1), Duration::from_micros(30));
        assert_eq!(tracer.received(&report(&segment, |_| {}), router(1), at(40)), Some((1, answer)));
    }

    #[test]
    fn segments_are_below_the_window() {
        let mut tracer = tracer(60, unlimited());
        let mut now = at(0);
        for expected in [4, 1, 2, 3, 5, 6] {
            if expected == 1 {
                assert_eq!(tracer.step(now), OwnFlowStep::CheckConnection);
            }
            let OwnFlowStep::Send { ttl, segment } = tracer.step(now) else { panic!() };
            let found = ReceivedSegment::decode(&segment).unwrap();
            assert_eq!((ttl, found.next_sequence), (expected, 3_u32.wrapping_sub(expected.into())));
            assert_eq!(found.acknowledgment, 77);
            tracer.sent(ttl, now);
            now = now + SPACING;
        }
    }
}
