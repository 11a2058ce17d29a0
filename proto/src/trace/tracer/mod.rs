//! The machine that traces the flows of a path.

mod answers;
mod requests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::PoisonError;
use std::time::Duration;

use super::burst::SPACING;
use super::flow::{FlowStep, TracedFlow};
use super::probe_match;
use super::reachability::Reachability;
use super::reverse::{Fetch, ReverseFlow};
use super::route::RouteUpdate;
use super::{
    ANSWER_AGE_MAX, Answer, DESTINATION, DirectedReport, Direction, Finding, ProbeProtocol, Route,
    TraceReport, TraceSpec, Trigger,
};
use crate::machine::{Arrival, HostDrops, IcmpKind, Machine, NotSent, Now, SendId, Step, TimestampSource};
use crate::schedule::mix;
use crate::time::Timestamp;
use crate::wire::stamp::Mode;
use crate::wire::{NtpTime, ReverseTrace};

/// Traces the flows of a path to a STAMP responder, and back.
#[derive(Debug)]
pub struct Tracer {
    spec: TraceSpec,
    session: u32,
    /// One for each flow.
    forward: Vec<TracedFlow>,
    /// One for each flow; `None` until a reply showed that the responder supports it.
    reverse: Vec<Option<ReverseFlow>>,
    /// Probes that can still be answered, by sequence number, which grows with time. Packets carry the low
    /// half.
    probes: BTreeMap<u64, SentProbe>,
    next_sequence: u64,
    sent_count: u32,
    reports: VecDeque<DirectedReport>,
    /// Traces in a row that did not reach the destination.
    unreached: u8,
    /// Requests have no extensions until then, because the destination did not answer those that have.
    plain_until: Option<Timestamp>,
    /// [Generation](crate::probe_budget::ProbeBudget::generation) of the times that were reserved.
    generation: u64,
    is_stopping: bool,
}

/// A probe that can still be answered.
#[derive(Debug, Clone, Copy)]
struct SentProbe {
    flow: u8,
    direction: Direction,
    /// Of the request in forward direction, of its reply in reverse direction.
    ttl: u8,
    timestamp: NtpTime,
    at: Timestamp,
    /// Whether it has left the host.
    is_sent: bool,
    /// Whether it was answered: a second answer is ignored.
    is_answered: bool,
    /// On the way back: whether the responder has sent the reply.
    is_reply_sent: bool,
}

/// For probes that do not ask for the outcome of others.
const NOTHING_WANTED: [Option<u64>; ReverseTrace::OUTCOMES] = [None; ReverseTrace::OUTCOMES];

impl Tracer {
    /// A tracer that begins with a trace of every flow.
    #[must_use]
    pub fn new(spec: TraceSpec, at: Timestamp) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "32 well-mixed bits are wanted")]
        let session = mix(spec.seed ^ mix(0x7472_6163)) as u32;
        let count = u8::try_from(spec.ssids.len()).unwrap_or(u8::MAX);
        let TraceSpec { protocol, hops_max, interval, seed, .. } = spec;
        let generation = spec.budget.lock().unwrap_or_else(PoisonError::into_inner).generation();
        let flow = |index| {
            let mut flow = TracedFlow::new(index, Direction::Forward, protocol, hops_max, interval, seed, at);
            flow.wait = spec.answer_wait;
            if let Some(since) = spec.missed_since.get(usize::from(index)).copied().flatten() {
                flow.reachability = Reachability::missed(since, at);
            }
            flow
        };
        Self {
            session,
            forward: (0..count).map(flow).collect(),
            reverse: (0..count).map(|_| None).collect(),
            probes: BTreeMap::new(),
            // Not known to somebody who forges errors that quote too little to contain T1.
            next_sequence: mix(spec.seed ^ mix(0x7365_7175)) >> 32,
            sent_count: 0,
            reports: VecDeque::new(),
            unreached: 0,
            plain_until: None,
            is_stopping: false,
            generation,
            spec,
        }
    }

    /// Reserves again what was reserved under other limits.
    fn renew_reservations(&mut self, now: Timestamp) {
        if !self.forward.iter().any(|traced| traced.retries().has_reserved()) {
            return;
        }
        let generation = self.spec.budget.lock().unwrap_or_else(PoisonError::into_inner).generation();
        if std::mem::replace(&mut self.generation, generation) != generation {
            self.forward.iter_mut().for_each(|traced| traced.retries_mut().cancel_reserved(now));
        }
    }

    /// Requests a trace of a flow, or of all flows, in both directions.
    pub fn trigger(&mut self, flow: Option<u8>, trigger: Trigger) {
        let reverse = self.reverse.iter_mut().flatten().map(|reverse| &mut reverse.traced);
        let all = self.forward.iter_mut().chain(reverse);
        all.filter(|traced| flow.is_none_or(|flow| flow == traced.index))
            .for_each(|traced| traced.trigger(trigger));
    }

    /// The flows whose latest trace did not reach the destination, which has answered before, and since when
    /// it has not answered.
    pub fn missed(&self) -> impl Iterator<Item = (u8, Timestamp)> + '_ {
        self.forward.iter().filter_map(|traced| Some((traced.index, traced.reachability.missed_since()?)))
    }

    /// An echo of a flow that was sent since the flow [was missed](Self::missed) was answered at `at`.
    pub fn echo_answered(&mut self, flow: u8, at: Timestamp) {
        if let Some(traced) = self.traced(Direction::Forward, flow) {
            traced.echo_answered(at);
        }
    }

    /// Takes what the echoes of the same flows show.
    pub fn observe(&mut self, finding: Finding, at: Timestamp) {
        match finding {
            Finding::Trigger { flow, trigger } => self.trigger(flow, trigger),
            Finding::FlowReplaced { flow } => self.replaced(flow, at),
            Finding::LossyFlow { flow, echoes, clean } => {
                let [forward_hop, reverse_hop] = Direction::ALL.map(|direction| {
                    let routes: Vec<Option<&Route>> = self.routes(direction).collect();
                    let route = |flow: u8| routes.get(usize::from(flow)).copied().flatten();
                    let others: Vec<&Route> = clean.iter().filter_map(|flow| route(*flow)).collect();
                    route(flow)?.leaves_at(&others)
                });
                let report = TraceReport::LossyFlow { flow, echoes, forward_hop, reverse_hop };
                self.report(Direction::Forward, report);
                self.trigger(Some(flow), Trigger::Loss);
            }
            // Replies without the TTL on arrival show a number only by guessing the initial TTL.
            Finding::Routers { .. } if self.spec.protocol.is_searching() => {}
            Finding::Routers { flow, direction, routers } => {
                let Some(traced) = self.traced(direction, flow) else { return };
                if let Some(update) = traced.observe_routers(routers, at) {
                    self.report_route(direction, flow, update);
                }
            }
        }
    }

    /// The packets of a flow have other ports: what is in flight says nothing about its route.
    fn replaced(&mut self, flow: u8, at: Timestamp) {
        let probes = std::mem::take(&mut self.probes).into_iter();
        let (earlier, others): (Vec<_>, Vec<_>) = probes.partition(|(_, probe)| probe.flow == flow);
        self.probes = others.into_iter().collect();
        for (_, probe) in earlier.into_iter().filter(|(_, probe)| probe.is_sent && !probe.is_answered) {
            self.report(probe.direction, TraceReport::Withdrawn);
        }
        if let Some(traced) = self.traced(Direction::Forward, flow) {
            traced.replaced(at);
        }
    }

    /// The current route of each flow in one direction; `None` before its first trace is complete.
    pub fn routes(&self, direction: Direction) -> impl Iterator<Item = Option<&Route>> + Clone {
        let forward = self.forward.iter().map(Some);
        let reverse = self.reverse.iter().map(|flow| flow.as_ref().map(|flow| &flow.traced));
        let traced = forward.zip(reverse).map(move |(forward, reverse)| match direction {
            Direction::Forward => forward,
            Direction::Reverse => reverse,
        });
        traced.map(|traced| traced?.route().shown())
    }

    fn traced(&mut self, direction: Direction, flow: u8) -> Option<&mut TracedFlow> {
        let index = usize::from(flow);
        match direction {
            Direction::Forward => self.forward.get_mut(index),
            Direction::Reverse => Some(&mut self.reverse.get_mut(index)?.as_mut()?.traced),
        }
    }

    fn report(&mut self, direction: Direction, report: TraceReport) {
        self.reports.push_back(DirectedReport { direction, report });
    }

    /// Whether a reply, or an ICMP error and its quotation, belongs to a probe of this tracer. An error that
    /// quotes too little is taken for one if the TTL has ended, because only tracers limit it.
    #[must_use]
    pub fn owns(&self, datagram: &[u8], arrival: &Arrival) -> bool {
        let found = match &arrival.icmp {
            Some(icmp) => match icmp.quotation(datagram) {
                quoted if quoted.len() < self.quoted_bytes_min() => {
                    return icmp.kind == IcmpKind::TtlExceeded;
                }
                quoted => self.quoted(quoted),
            },
            None => self.replied(datagram),
        };
        found.is_some_and(|sequence| {
            self.probes.get(&sequence).is_some_and(|probe| probe.flow == arrival.flow)
        })
    }

    fn mode(&self) -> Mode {
        probe_match::mode(&self.spec)
    }

    /// Whether an agent answers, which sets the TTL of its replies and reports that of requests.
    fn is_of_agent(&self) -> bool {
        self.spec.protocol == ProbeProtocol::Udp && self.spec.quirks.is_none()
    }

    fn quoted_bytes_min(&self) -> usize {
        probe_match::quoted_bytes_min(self.spec.protocol)
    }

    fn quoted(&self, quoted: &[u8]) -> Option<u64> {
        let timestamp = |sequence: u64| Some(self.probes.get(&sequence)?.timestamp);
        probe_match::quoted(quoted, &self.spec, self.session, self.next_sequence, timestamp)
    }

    fn replied(&self, datagram: &[u8]) -> Option<u64> {
        let timestamp = |sequence: u64| Some(self.probes.get(&sequence)?.timestamp);
        probe_match::replied(datagram, &self.spec, self.session, self.next_sequence, timestamp)
    }

    fn extend(&self, low: u32) -> Option<u64> {
        probe_match::extend(low, self.next_sequence)
    }

    fn report_destination(&mut self, direction: Direction, flow: u8, ttl: u8, answer: Answer) {
        self.report(direction, TraceReport::Answered { flow, ttl, answer, is_destination: true });
    }

    fn report_route(&mut self, direction: Direction, flow: u8, update: RouteUpdate) {
        let Some(traced) = self.traced(direction, flow) else { return };
        let (trigger, since) = (traced.last_trigger(), traced.route().changed_since());
        self.report(direction, TraceReport::Route { flow, update: Box::new(update), trigger, since });
    }

    /// Decides the probes that were not answered in time. Probes are in the order in which they were sent.
    fn expire(&mut self, drained: Timestamp) {
        while let Some(first) = self.probes.first_entry() {
            let (first_sequence, probe) = (*first.key(), *first.get());
            if !probe.is_sent || probe.at + ANSWER_AGE_MAX > drained {
                break;
            }
            first.remove();
            if !probe.is_answered {
                let SentProbe { flow, direction, ttl, .. } = probe;
                // On the way back it may also have been lost before its reply was sent.
                let is_known = direction == Direction::Forward || ttl == DESTINATION || probe.is_reply_sent;
                if let Some(traced) = self.traced(direction, flow).filter(|_| is_known) {
                    traced.probe_expired(first_sequence, ttl);
                }
                let unanswered = TraceReport::Unanswered { ttl };
                self.report(direction, if is_known { unanswered } else { TraceReport::Withdrawn });
            }
        }
    }

    /// The probes of a flow on the way back whose outcome is asked for next.
    fn wanted(&self, flow: u8, from: u64) -> [Option<u64>; ReverseTrace::OUTCOMES] {
        let waiting = self.probes.range(from..).filter(|(_, probe)| {
            let is_reverse = probe.flow == flow && probe.direction == Direction::Reverse;
            is_reverse && probe.ttl != DESTINATION && !probe.is_answered
        });
        let mut waiting = waiting.map(|(sequence, _)| *sequence);
        std::array::from_fn(|_| waiting.next())
    }

    /// The responder supports traces of the way back, which passes this number of routers.
    fn begin_reverse(&mut self, flow: u8, routers: u8, rtt: Duration, at: Timestamp) {
        let TraceSpec { protocol, hops_max, interval, seed, .. } = self.spec;
        let Some(slot) = self.reverse.get_mut(usize::from(flow)) else { return };
        slot.get_or_insert_with(|| {
            let mut traced =
                TracedFlow::new(flow, Direction::Reverse, protocol, hops_max, interval, !seed, at);
            traced.learn_destination(routers, rtt);
            ReverseFlow::new(traced)
        });
    }

    /// Steps one flow in one direction until it waits. Appends a datagram that is sent to `arena`.
    fn step_flow(
        &mut self,
        direction: Direction,
        flow: u8,
        now: Now,
        arena: &mut Vec<u8>,
    ) -> Step<DirectedReport> {
        loop {
            let Some(traced) = self.traced(direction, flow) else { return Step::Wait(Timestamp::NEVER) };
            if let Some(update) = traced.take_found_update() {
                self.report_route(direction, flow, update);
                continue;
            }
            match traced.step(now.at, now.drained) {
                FlowStep::Send { ttl, is_reserved } => {
                    if let Some(send) =
                        self.send((direction, flow), (ttl, is_reserved), NOTHING_WANTED, now, arena)
                    {
                        return Step::Send(send);
                    }
                }
                FlowStep::Traced(trace) => {
                    if direction == Direction::Forward {
                        self.detect_support(trace.rtt.is_some(), now.at);
                    }
                    return Step::Report(DirectedReport { direction, report: TraceReport::Traced(trace) });
                }
                FlowStep::Check => {
                    let check = (DESTINATION, false);
                    if let Some(send) = self.send((direction, flow), check, NOTHING_WANTED, now, arena) {
                        if let Some(traced) = self.traced(direction, flow) {
                            traced.check_queued(send.id.0);
                        }
                        return Step::Send(send);
                    }
                }
                FlowStep::Report(report) => return Step::Report(DirectedReport { direction, report }),
                FlowStep::Wait(until) => return Step::Wait(until),
            }
        }
    }

    /// Fetches the answers of routers on the way back, if the time for that has come.
    fn fetch(&mut self, flow: u8, now: Now, arena: &mut Vec<u8>) -> Step<DirectedReport> {
        let index = usize::from(flow);
        let Some(from) = self.reverse[index].as_ref().map(|reverse| reverse.fetched) else {
            return Step::Wait(Timestamp::NEVER);
        };
        let wanted = self.wanted(flow, from);
        let Some(reverse) = &mut self.reverse[index] else { return Step::Wait(Timestamp::NEVER) };
        match reverse.fetch(wanted[0].is_some(), now.at) {
            Fetch::Wait(until) => Step::Wait(until),
            Fetch::Send => {
                reverse.fetched = wanted.iter().flatten().max().map_or(from, |last| last + 1);
                let sent = self.send((Direction::Reverse, flow), (DESTINATION, false), wanted, now, arena);
                sent.map_or(Step::Wait(now.at + SPACING), Step::Send)
            }
        }
    }
}

impl Machine for Tracer {
    type Report = DirectedReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        let found = match arrival.icmp {
            Some(icmp) => self.error_received(datagram, arrival, &icmp),
            None => self.reply_received(datagram, arrival),
        };
        if found.is_none() {
            self.report(Direction::Forward, TraceReport::Unmatched);
        }
    }

    fn sent(&mut self, id: SendId, at: Timestamp, _: TimestampSource) {
        let sequence = id.0;
        let Some(probe) = self.probes.get_mut(&sequence) else { return };
        // Its RTT was measured from the time that was known when the answer came.
        if !probe.is_answered {
            probe.at = at;
        }
        let SentProbe { flow, direction, ttl, at, .. } = *probe;
        // The kernel's time comes later than the driver's, for the same datagram.
        if !std::mem::replace(&mut probe.is_sent, true) {
            self.sent_count = self.sent_count.wrapping_add(1);
            self.report(direction, TraceReport::Sent { ttl });
        }
        if let Some(traced) = self.traced(direction, flow) {
            traced.sent(sequence, at);
        }
    }

    fn not_sent(&mut self, id: SendId, why: NotSent) {
        let sequence = id.0;
        // A probe that has left is decided by its answer or its age.
        let Some(SentProbe { flow, direction, is_sent: false, .. }) = self.probes.get(&sequence).copied()
        else {
            return;
        };
        self.probes.remove(&sequence);
        if let Some(traced) = self.traced(direction, flow) {
            traced.not_sent(sequence);
        }
        self.report(direction, TraceReport::SendError(why));
    }

    fn stop(&mut self) {
        self.is_stopping = true;
    }

    fn withdraw(&mut self) {
        for (_, probe) in std::mem::take(&mut self.probes) {
            if probe.is_sent && !probe.is_answered {
                self.report(probe.direction, TraceReport::Withdrawn);
            }
        }
    }

    /// That the destination does not answer is not reported until it has answered again. A route does not
    /// depend on that.
    fn peer_leaving(&mut self, at: Timestamp) {
        self.forward.iter_mut().for_each(|traced| traced.reachability.peer_leaving(at));
    }

    fn in_flight(&self) -> usize {
        self.probes.values().filter(|probe| probe.is_sent && !probe.is_answered).count()
    }

    fn step(&mut self, now: Now, _: &mut HostDrops, arena: &mut Vec<u8>) -> Step<DirectedReport> {
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
        self.renew_reservations(now.at);
        let mut until = Timestamp::NEVER;
        for flow in (0..).take(self.forward.len()) {
            for direction in Direction::ALL {
                match self.step_flow(direction, flow, now, arena) {
                    Step::Wait(at) => until = until.min(at),
                    step @ (Step::Send(_) | Step::Report(_) | Step::Finished) => return step,
                }
            }
            match self.fetch(flow, now, arena) {
                Step::Wait(at) => until = until.min(at),
                step @ (Step::Send(_) | Step::Report(_) | Step::Finished) => return step,
            }
        }
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(report);
        }
        let oldest = self.probes.values().next().map(|probe| probe.at + ANSWER_AGE_MAX);
        Step::Wait(until.min(oldest.unwrap_or(Timestamp::NEVER)))
    }
}
