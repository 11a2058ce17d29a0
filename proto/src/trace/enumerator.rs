//! The machine that enumerates the equal-cost paths to a STAMP responder.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use super::enumeration::{Enumeration, EnumerationStep, EqualCostPaths, PathProbe, Reached};
use super::probe_match::{authentic_reply, mode, quoted, replied, wire_sequence};
use super::{ANSWER_AGE_MAX, TraceSpec};
use crate::echo::{Profile, RequestContents, RequestExtensions, encode};
use crate::machine::{
    Arrival, HostDrops, IcmpKind, Machine, NotSent, Now, Send, SendId, Step, TimestampSource,
};
use crate::probe_budget::{Deferral, Expected, ProbeBudget};
use crate::schedule::mix;
use crate::time::Timestamp;
use crate::wire::NtpTime;

/// Enumerates the equal-cost paths to a STAMP responder once, and then finishes.
///
/// It sends as fast as the budget allows, which it shares with all tracers; at most one of its probes waits
/// in the queues of the budget, so that traces do not wait for it. It takes about
/// two minutes for 96 probes that one IPv4 router answers.
#[derive(Debug)]
pub struct Enumerator {
    spec: TraceSpec,
    session: u32,
    enumeration: Enumeration,
    /// Probes that can still be answered, by sequence number, which grows with time. Packets carry the low
    /// half.
    probes: BTreeMap<u64, SentProbe>,
    next_sequence: u64,
    sent_count: u32,
    /// A probe for which a token is reserved, and when that becomes valid.
    reserved: Option<(PathProbe, Timestamp)>,
    reports: VecDeque<EnumerationReport>,
    began: Timestamp,
    is_complete: bool,
    is_stopping: bool,
}

/// What an enumerator reports.
#[derive(Debug, Clone, PartialEq)]
pub enum EnumerationReport {
    /// A probe left the host.
    Sent {
        /// Its TTL.
        ttl: u8,
    },
    /// A probe was answered.
    Answered {
        /// Its TTL.
        ttl: u8,
    },
    /// A probe was not answered within [`ANSWER_AGE_MAX`].
    Unanswered {
        /// Its TTL.
        ttl: u8,
    },
    /// A probe became undecidable: the host was suspended, or the enumerator stopped.
    Withdrawn,
    /// A probe could not be sent.
    SendError(NotSent),
    /// A probe had to wait.
    Deferred(Deferral),
    /// A reply or ICMP error that belongs to no probe.
    Unmatched,
    /// The enumeration has ended. The last report, unless the enumerator was stopped before.
    Enumerated(Box<Enumerated>),
}

/// The result of an enumeration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enumerated {
    /// When it began.
    pub began: Timestamp,
    /// How long it took.
    pub duration: Duration,
    /// What was found.
    pub paths: EqualCostPaths,
}

/// A probe that can still be answered.
#[derive(Debug, Clone, Copy)]
struct SentProbe {
    probe: PathProbe,
    timestamp: NtpTime,
    at: Timestamp,
    /// Whether it has left the host.
    is_sent: bool,
    /// Whether it was answered: a second answer is ignored.
    is_answered: bool,
}

impl Enumerator {
    /// An enumerator that begins at once, with as many flows as `spec` has session identifiers, at most
    /// [`Enumeration::FLOWS_MAX`]. The `interval` of `spec` and whether it traces the way back do not matter.
    #[must_use]
    pub fn new(spec: TraceSpec, at: Timestamp) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "32 well-mixed bits are wanted")]
        let session = mix(spec.seed ^ mix(0x656e_756d)) as u32;
        let flows = u8::try_from(spec.ssids.len()).unwrap_or(u8::MAX);
        Self {
            session,
            enumeration: Enumeration::new(flows, spec.hops_max),
            probes: BTreeMap::new(),
            // Not known to somebody who forges errors that quote too little to contain T1.
            next_sequence: mix(spec.seed ^ mix(0x6571_7561)) >> 32,
            sent_count: 0,
            reserved: None,
            reports: VecDeque::new(),
            began: at,
            is_complete: false,
            is_stopping: false,
            spec,
        }
    }

    /// Whether a reply, or an ICMP error and its quotation, belongs to a probe of this enumerator. An error
    /// that quotes too little is taken for one if the TTL has ended and a single probe of the flow waits for
    /// an answer.
    #[must_use]
    pub fn owns(&self, datagram: &[u8], arrival: &Arrival) -> bool {
        let bytes = carried(datagram, arrival);
        let is_quoted =
            arrival.icmp.is_none_or(|icmp| bytes.len() >= QUOTED_MIN || icmp.kind == IcmpKind::TtlExceeded);
        is_quoted && self.found(bytes, arrival).is_some()
    }

    /// The sequence number of the probe to which a reply or a quotation belongs.
    fn found(&self, datagram: &[u8], arrival: &Arrival) -> Option<u64> {
        let timestamp = |sequence: u64| Some(self.probes.get(&sequence)?.timestamp);
        let (spec, session, next) = (&self.spec, self.session, self.next_sequence);
        let sequence = match arrival.icmp {
            // Only the UDP header was quoted, which tells the flow.
            Some(_) if datagram.len() < QUOTED_MIN => self.only_in_flight(arrival.flow),
            Some(_) => quoted(datagram, spec, session, next, timestamp),
            None => replied(datagram, spec, session, next, timestamp),
        }?;
        self.probes.get(&sequence).filter(|sent| sent.probe.flow == arrival.flow).map(|_| sequence)
    }

    /// The only unanswered probe of a flow.
    fn only_in_flight(&self, flow: u8) -> Option<u64> {
        let is_waiting = |sent: &SentProbe| sent.probe.flow == flow && sent.is_sent && !sent.is_answered;
        let mut found = self.probes.iter().filter(|(_, sent)| is_waiting(sent));
        let (sequence, _) = found.next()?;
        found.next().is_none().then_some(*sequence)
    }

    /// `None`: the answer belongs to no probe.
    fn answer_received(&mut self, datagram: &[u8], arrival: &Arrival) -> Option<()> {
        let datagram = carried(datagram, arrival);
        let reached = match arrival.icmp {
            Some(icmp) if icmp.kind == IcmpKind::TtlExceeded => Reached::Router(icmp.router),
            // The sender of these errors rejected the packet at an unknown hop.
            Some(_) if datagram.len() < QUOTED_MIN => return None,
            Some(_) => return self.found(datagram, arrival).map(|_| ()),
            None => {
                authentic_reply(datagram, &self.spec)?;
                Reached::Destination
            }
        };
        let sequence = self.found(datagram, arrival)?;
        let sent = self.probes.get_mut(&sequence)?;
        if std::mem::replace(&mut sent.is_answered, true) {
            return Some(());
        }
        // Its answer came before the driver's report that it was sent.
        let (probe, was_sent) = (sent.probe, std::mem::replace(&mut sent.is_sent, true));
        if !was_sent {
            self.left(probe);
        }
        if let Reached::Router(router) = reached {
            self.budget().answered(probe.ttl, router);
        }
        self.enumeration.answered(probe, reached);
        self.reports.push_back(EnumerationReport::Answered { ttl: probe.ttl });
        Some(())
    }

    fn left(&mut self, probe: PathProbe) {
        self.sent_count = self.sent_count.wrapping_add(1);
        self.reports.push_back(EnumerationReport::Sent { ttl: probe.ttl });
    }

    fn budget(&self) -> MutexGuard<'_, ProbeBudget> {
        self.spec.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides the probes that were not answered in time. Probes are in the order in which they were sent.
    fn expire(&mut self, drained: Timestamp) {
        while let Some(first) = self.probes.first_entry() {
            let SentProbe { probe, at, is_sent, is_answered, .. } = *first.get();
            if !is_sent || at + ANSWER_AGE_MAX > drained {
                break;
            }
            first.remove();
            if !is_answered {
                self.enumeration.unanswered(probe);
                self.reports.push_back(EnumerationReport::Unanswered { ttl: probe.ttl });
            }
        }
    }

    /// When the token for a probe becomes valid, and why not now.
    fn reserve(&self, probe: PathProbe, now: Timestamp) -> (Timestamp, Option<Deferral>) {
        let known = self.enumeration.expected(probe);
        let unknown = Expected::Unknown { ttl: probe.ttl, is_v4: self.spec.to.is_ipv4() };
        self.budget().reserve(known.map_or(unknown, Expected::Router), now)
    }

    fn send(&mut self, probe: PathProbe, now: Now, arena: &mut Vec<u8>) -> Send {
        let sequence = self.next_sequence;
        self.next_sequence = sequence + 1;
        let ssid = self.spec.ssids.get(usize::from(probe.flow)).copied().unwrap_or(0);
        let profile = self.spec.quirks.map(|quirks| quirks.profile);
        let contents = RequestContents {
            mode: mode(&self.spec),
            sequence: wire_sequence(sequence),
            at: now.wall.wall(now.at),
            ssid: if profile == Some(Profile::TwampLight) { 0 } else { ssid },
            flow: probe.flow,
            session: self.session,
            sent: self.sent_count.wrapping_add(1),
            is_brief: true,
            dscp: self.spec.dscp.value(),
            size: None,
            extensions: match profile {
                None => RequestExtensions::All,
                Some(Profile::Stamp) => RequestExtensions::ClassOfService,
                // A reflector that drops requests with extensions would not answer.
                Some(Profile::Detect | Profile::Plain | Profile::TwampLight) => RequestExtensions::None,
            },
            reverse: None,
        };
        let key = self.spec.keys.as_ref().map(|keys| keys.current());
        let timestamp = encode(&contents, key, arena).timestamp;
        let sent = SentProbe { probe, timestamp, at: now.at, is_sent: false, is_answered: false };
        self.probes.insert(sequence, sent);
        Send {
            id: SendId(sequence),
            flow: probe.flow,
            from: None,
            to: self.spec.to,
            tos: self.spec.dscp.tos(),
            ttl: probe.ttl,
            dont_fragment: false,
            segment: None,
            timestamp: self.spec.tx_timestamps,
        }
    }
}

/// Bytes of a quoted request that identify it: its sequence number.
const QUOTED_MIN: usize = 4;

/// A reply, or the quotation of an error.
fn carried<'a>(datagram: &'a [u8], arrival: &Arrival) -> &'a [u8] {
    arrival.icmp.map_or(datagram, |icmp| icmp.quotation(datagram))
}

impl Machine for Enumerator {
    type Report = EnumerationReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        if self.answer_received(datagram, arrival).is_none() {
            self.reports.push_back(EnumerationReport::Unmatched);
        }
    }

    fn sent(&mut self, id: SendId, at: Timestamp, _: TimestampSource) {
        let Some(sent) = self.probes.get_mut(&id.0) else { return };
        sent.at = at;
        // The kernel's time comes later than the driver's, for the same datagram.
        let (probe, was_sent) = (sent.probe, std::mem::replace(&mut sent.is_sent, true));
        if !was_sent {
            self.left(probe);
        }
    }

    fn not_sent(&mut self, id: SendId, why: NotSent) {
        // A probe that has left is decided by its answer or its age.
        let Some(SentProbe { probe, is_sent: false, .. }) = self.probes.get(&id.0).copied() else { return };
        self.probes.remove(&id.0);
        self.enumeration.not_sent(probe);
        self.reports.push_back(EnumerationReport::SendError(why));
    }

    fn stop(&mut self) {
        self.is_stopping = true;
    }

    fn withdraw(&mut self) {
        for sent in std::mem::take(&mut self.probes).into_values().filter(|sent| !sent.is_answered) {
            self.enumeration.withdrawn(sent.probe);
            if sent.is_sent {
                self.reports.push_back(EnumerationReport::Withdrawn);
            }
        }
    }

    /// No effect: routers answer although the peer does not.
    fn peer_leaving(&mut self, _: Timestamp) {}

    fn in_flight(&self) -> usize {
        self.probes.values().filter(|sent| sent.is_sent && !sent.is_answered).count()
    }

    fn step(&mut self, now: Now, _: &mut HostDrops, arena: &mut Vec<u8>) -> Step<EnumerationReport> {
        if self.reports.is_empty() {
            self.expire(now.drained);
        }
        if self.is_stopping && self.reports.is_empty() {
            self.withdraw();
        }
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(report);
        }
        if self.is_stopping || self.is_complete {
            return Step::Finished;
        }
        let (probe, until) = match self.reserved.take() {
            Some((probe, at)) => (probe, at),
            None => match self.enumeration.step() {
                EnumerationStep::Probe(probe) => {
                    let (at, deferral) = self.reserve(probe, now.at);
                    if let Some(reason) = deferral {
                        self.reserved = Some((probe, at));
                        return Step::Report(EnumerationReport::Deferred(reason));
                    }
                    (probe, now.at)
                }
                EnumerationStep::Wait => {
                    let oldest = self.probes.values().next().map(|sent| sent.at + ANSWER_AGE_MAX);
                    return Step::Wait(oldest.unwrap_or(Timestamp::NEVER));
                }
                EnumerationStep::Finished(paths) => {
                    self.is_complete = true;
                    let (began, duration) = (self.began, now.at.since(self.began));
                    let enumerated = Enumerated { began, duration, paths: *paths };
                    return Step::Report(EnumerationReport::Enumerated(Box::new(enumerated)));
                }
            },
        };
        if until > now.at {
            self.reserved = Some((probe, until));
            let oldest = self.probes.values().next().map(|sent| sent.at + ANSWER_AGE_MAX);
            return Step::Wait(oldest.map_or(until, |oldest| oldest.min(until)));
        }
        Step::Send(self.send(probe, now, arena))
    }
}
