//! The machine that traces the flows of a path.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::PoisonError;

use super::flow::{FlowStep, TracedFlow};
use super::route::RouteUpdate;
use super::{ANSWER_AGE_MAX, Finding, Route, TraceReport, TraceSpec, Trigger};
use crate::echo::{ReplyExtensions, RequestContents, RequestExtensions, encode};
use crate::machine::{
    Arrival, HostDrops, IcmpKind, Machine, NotSent, Now, Send, SendId, Step, TimestampSource,
};
use crate::schedule::mix;
use crate::time::Timestamp;
use crate::wire::NtpTime;
use crate::wire::stamp::{self, Mode};

/// Traces the flows of a path to a STAMP responder.
#[derive(Debug)]
pub struct Tracer {
    spec: TraceSpec,
    session: u32,
    flows: Vec<TracedFlow>,
    /// Probes that can still be answered, by sequence number, which grows with time. Packets carry the low
    /// half.
    probes: BTreeMap<u64, SentProbe>,
    next_sequence: u64,
    sent_count: u32,
    reports: VecDeque<TraceReport>,
    is_stopping: bool,
}

/// A probe that can still be answered.
#[derive(Debug, Clone, Copy)]
struct SentProbe {
    flow: u8,
    ttl: u8,
    timestamp: NtpTime,
    at: Timestamp,
    /// Whether it has left the host.
    is_sent: bool,
    /// Whether it was answered: a second answer is ignored.
    is_answered: bool,
}

impl Tracer {
    /// A tracer that begins with a trace of every flow.
    #[must_use]
    pub fn new(spec: TraceSpec, at: Timestamp) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "32 well-mixed bits are wanted")]
        let session = mix(spec.seed ^ mix(0x7472_6163)) as u32;
        let flow = |index| TracedFlow::new(index, spec.hops_max, spec.interval, spec.seed, at);
        let flows = (0..u8::try_from(spec.ssids.len()).unwrap_or(u8::MAX)).map(flow).collect();
        Self {
            session,
            flows,
            probes: BTreeMap::new(),
            // Not known to somebody who forges errors that quote too little to contain T1.
            next_sequence: mix(spec.seed ^ mix(0x7365_7175)) >> 32,
            sent_count: 0,
            reports: VecDeque::new(),
            is_stopping: false,
            spec,
        }
    }

    /// Requests a trace of a flow, or of all flows.
    pub fn trigger(&mut self, flow: Option<u8>, trigger: Trigger) {
        let is_meant = |traced: &&mut TracedFlow| flow.is_none_or(|flow| flow == traced.index);
        self.flows.iter_mut().filter(is_meant).for_each(|flow| flow.trigger(trigger));
    }

    /// Takes what the echoes of the same flows show.
    pub fn observe(&mut self, finding: Finding, at: Timestamp) {
        match finding {
            Finding::Trigger { flow, trigger } => self.trigger(flow, trigger),
            Finding::Routers { flow, routers } => {
                let Some(traced) = self.flows.get_mut(usize::from(flow)) else { return };
                if let Some(update) = traced.observe_routers(routers, at) {
                    self.report_route(flow, update);
                }
            }
        }
    }

    /// The current route of each flow; `None` before its first trace is complete.
    pub fn routes(&self) -> impl Iterator<Item = Option<&Route>> {
        self.flows.iter().map(|flow| flow.route().current())
    }

    /// Whether a reply, or an ICMP error and its quotation, belongs to a probe of this tracer. An error that
    /// quotes too little is taken for one if the TTL has ended, because only tracers limit it.
    #[must_use]
    pub fn owns(&self, datagram: &[u8], arrival: &Arrival) -> bool {
        let found = match &arrival.icmp {
            Some(icmp) if datagram.len() < 4 => return icmp.kind == IcmpKind::TtlExceeded,
            Some(_) => self.quoted(datagram),
            None => self.replied(datagram),
        };
        found.is_some_and(|sequence| {
            self.probes.get(&sequence).is_some_and(|probe| probe.flow == arrival.flow)
        })
    }

    fn mode(&self) -> Mode {
        if self.spec.keys.is_some() { Mode::Authenticated } else { Mode::Open }
    }

    /// The probe that a quotation begins with. Routers quote at least eight bytes after the IP header, which
    /// is only the UDP header; the bytes here begin after that.
    fn quoted(&self, quoted: &[u8]) -> Option<u64> {
        let (sequence, timestamp) = stamp::quoted_request(quoted, self.mode())?;
        let sequence = self.extend(sequence)?;
        let probe = self.probes.get(&sequence)?;
        timestamp.is_none_or(|timestamp| timestamp == probe.timestamp).then_some(sequence)
    }

    fn replied(&self, datagram: &[u8]) -> Option<u64> {
        let reply = stamp::Reply::decode(datagram, self.mode()).ok()?;
        let sequence = self.extend(reply.sender_sequence)?;
        let probe = self.probes.get(&sequence)?;
        (probe.timestamp == reply.sender_timestamp).then_some(sequence)
    }

    /// The latest sequence number with this low half.
    fn extend(&self, low: u32) -> Option<u64> {
        let last = self.next_sequence.checked_sub(1)?;
        last.checked_sub(wire_sequence(last).wrapping_sub(low).into())
    }

    /// A router, or the destination's host, reports that a probe did not arrive.
    fn error_received(
        &mut self,
        quoted: &[u8],
        arrival: &Arrival,
        router: IpAddr,
        kind: IcmpKind,
    ) -> Option<()> {
        let sequence = match quoted.len() {
            // Only the UDP header was quoted: the router tells which hop it was.
            0..4 => self.waiting_for(arrival.flow, router)?,
            _ => self.quoted(quoted)?,
        };
        let probe = self.probes.get_mut(&sequence).filter(|probe| probe.flow == arrival.flow)?;
        match kind {
            IcmpKind::TtlExceeded => {}
            // Whoever sends these rejected the packet; at which hop, they do not say.
            IcmpKind::PortUnreachable
            | IcmpKind::Unreachable
            | IcmpKind::Prohibited
            | IcmpKind::TooBig
            | IcmpKind::Other => return Some(()),
        }
        if std::mem::replace(&mut probe.is_answered, true) {
            return Some(());
        }
        let SentProbe { flow, ttl, at, .. } = *probe;
        self.reports.push_back(TraceReport::Answered { ttl });
        self.spec.budget.lock().unwrap_or_else(PoisonError::into_inner).answered(ttl, router);
        let rtt = arrival.at.since(at);
        let update = self.flows[usize::from(flow)].answered(sequence, ttl, router, rtt, arrival.at);
        if let Some(update) = update {
            self.report_route(flow, update);
        }
        Some(())
    }

    /// The only unanswered probe of the flow to a hop at which the router has answered before.
    fn waiting_for(&self, flow: u8, router: IpAddr) -> Option<u64> {
        let expected = super::Expected::Router(router);
        let traced = self.flows.get(usize::from(flow))?;
        let mut found = self.probes.iter().filter(|(_, probe)| {
            let is_waiting = probe.flow == flow && probe.is_sent && !probe.is_answered;
            is_waiting && traced.expected(probe.ttl, router.is_ipv4()) == Some(expected)
        });
        let (sequence, _) = found.next()?;
        found.next().is_none().then_some(*sequence)
    }

    fn reply_received(&mut self, datagram: &[u8], arrival: &Arrival) -> Option<()> {
        let mode = self.mode();
        let reply = stamp::Reply::decode(datagram, mode).ok()?;
        if let Some(keys) = &self.spec.keys {
            stamp::verify(datagram, keys).ok()?;
        }
        ReplyExtensions::read(datagram, mode, self.spec.keys.as_deref()).ok()?;
        let sequence = self.replied(datagram)?;
        let probe = self.probes.get_mut(&sequence).filter(|probe| probe.flow == arrival.flow)?;
        if std::mem::replace(&mut probe.is_answered, true) {
            return Some(());
        }
        let SentProbe { flow, ttl, at, .. } = *probe;
        self.reports.push_back(TraceReport::Answered { ttl });
        let turnaround = u64::try_from(reply.turnaround()).unwrap_or(0);
        let rtt = arrival.at.since(at).saturating_sub(std::time::Duration::from_nanos(turnaround));
        let Some(routers) = ttl.checked_sub(reply.sender_ttl) else { return Some(()) };
        let from = arrival.from.ip();
        let update = self.flows[usize::from(flow)].reached(sequence, ttl, from, rtt, routers, arrival.at);
        if let Some(update) = update {
            self.report_route(flow, update);
        }
        Some(())
    }

    fn report_route(&mut self, flow: u8, update: RouteUpdate) {
        let trigger = self.flows[usize::from(flow)].last_trigger();
        self.reports.push_back(TraceReport::Route { flow, update: Box::new(update), trigger });
    }

    /// Decides the probes that were not answered in time. Probes are in the order in which they were sent.
    fn expire(&mut self, drained: Timestamp) {
        while let Some(first) = self.probes.first_entry() {
            let probe = *first.get();
            if !probe.is_sent || probe.at + ANSWER_AGE_MAX > drained {
                break;
            }
            first.remove();
            if !probe.is_answered {
                self.flows[usize::from(probe.flow)].unanswered(probe.ttl);
                self.reports.push_back(TraceReport::Unanswered { ttl: probe.ttl });
            }
        }
    }

    /// Sends the probe, or defers it.
    fn send(
        &mut self,
        flow: usize,
        ttl: u8,
        is_reserved: bool,
        now: Now,
        arena: &mut Vec<u8>,
    ) -> Option<Send> {
        let traced = &mut self.flows[flow];
        if let Some(expected) = traced.expected(ttl, self.spec.to.is_ipv4()).filter(|_| !is_reserved) {
            if traced.is_waiting(ttl) {
                return None;
            }
            let mut budget = self.spec.budget.lock().unwrap_or_else(PoisonError::into_inner);
            if let (at, Some(reason)) = budget.reserve(expected, now.at) {
                traced.reserve(ttl, at);
                self.reports.push_back(TraceReport::Deferred(reason));
                return None;
            }
        }
        let (sequence, index) = (self.next_sequence, traced.index);
        traced.queued(sequence, ttl, now.at);
        self.next_sequence = sequence + 1;
        let contents = RequestContents {
            mode: self.mode(),
            sequence: wire_sequence(sequence),
            at: now.wall.wall(now.at),
            ssid: self.spec.ssids[flow],
            flow: index,
            session: self.session,
            sent: self.sent_count.wrapping_add(1),
            is_brief: true,
            dscp: self.spec.dscp.value(),
            size: None,
            extensions: RequestExtensions::All,
        };
        let key = self.spec.keys.as_ref().map(|keys| keys.current());
        let timestamp = encode(&contents, key, arena).timestamp;
        let (is_sent, is_answered) = (false, false);
        let probe = SentProbe { flow: index, ttl, timestamp, at: now.at, is_sent, is_answered };
        self.probes.insert(sequence, probe);
        Some(Send {
            id: SendId(sequence),
            flow: index,
            from: None,
            to: self.spec.to,
            tos: self.spec.dscp.tos(),
            ttl,
            dont_fragment: false,
            segment: None,
            timestamp: self.spec.tx_timestamps,
        })
    }
}

impl Machine for Tracer {
    type Report = TraceReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        let found = match arrival.icmp {
            Some(icmp) => self.error_received(datagram, arrival, icmp.router, icmp.kind),
            None => self.reply_received(datagram, arrival),
        };
        if found.is_none() {
            self.reports.push_back(TraceReport::Unmatched);
        }
    }

    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource) {
        let sequence = id.0;
        let Some(probe) = self.probes.get_mut(&sequence) else { return };
        probe.at = at;
        let SentProbe { flow, ttl, .. } = *probe;
        if !std::mem::replace(&mut probe.is_sent, true) || by == TimestampSource::User {
            self.sent_count = self.sent_count.wrapping_add(1);
            self.reports.push_back(TraceReport::Sent { ttl });
        }
        self.flows[usize::from(flow)].sent(sequence, at);
    }

    fn not_sent(&mut self, id: SendId, why: NotSent) {
        let sequence = id.0;
        if let Some(probe) = self.probes.remove(&sequence) {
            self.flows[usize::from(probe.flow)].not_sent(sequence);
            self.reports.push_back(TraceReport::SendError(why));
        }
    }

    fn stop(&mut self) {
        self.is_stopping = true;
    }

    fn withdraw(&mut self) {
        let withdrawn = self.probes.values().filter(|probe| probe.is_sent && !probe.is_answered).count();
        self.reports.extend((0..withdrawn).map(|_| TraceReport::Withdrawn));
        self.probes.clear();
    }

    /// No effect: a route does not depend on whether the peer answers, and a trace without an answer of the
    /// destination is no change.
    fn peer_leaving(&mut self, _: Timestamp) {}

    fn in_flight(&self) -> usize {
        self.probes.values().filter(|probe| probe.is_sent && !probe.is_answered).count()
    }

    fn step(&mut self, now: Now, _: &mut HostDrops, arena: &mut Vec<u8>) -> Step<TraceReport> {
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(report);
        }
        self.expire(now.drained);
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(report);
        }
        if self.is_stopping {
            self.withdraw();
            return self.reports.pop_front().map_or(Step::Finished, Step::Report);
        }
        let mut until = Timestamp::NEVER;
        for flow in 0..self.flows.len() {
            loop {
                match self.flows[flow].step(now.at, now.drained) {
                    FlowStep::Send { ttl, is_reserved } => {
                        if let Some(send) = self.send(flow, ttl, is_reserved, now, arena) {
                            return Step::Send(send);
                        }
                    }
                    FlowStep::Traced(trace) => return Step::Report(TraceReport::Traced(trace)),
                    FlowStep::Wait(at) => {
                        until = until.min(at);
                        break;
                    }
                }
            }
        }
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(report);
        }
        let oldest = self.probes.values().next().map(|probe| probe.at + ANSWER_AGE_MAX);
        Step::Wait(until.min(oldest.unwrap_or(Timestamp::NEVER)))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the wire carries the low half")]
const fn wire_sequence(sequence: u64) -> u32 {
    sequence as u32
}
