//! The traces of one flow.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use super::burst::{Burst, BurstMethod, BurstProbe, BurstStep, SPACING};
use super::hop::{HopHistory, HopState, first_lossy_hop, states};
use super::reachability::Reachability;
use super::rejection;
use super::route::{CONFIRMATIONS, HopRouter, RouteTracker, RouteUpdate};
use super::ttl_clamp::TtlClamp;
use super::{
    Answer, DESTINATION, Direction, Hop, ProbeProtocol, Rejection, TRACE_GAP_MIN, Trace, TraceReport, Trigger,
};
use crate::probe_budget::Expected;
use crate::schedule::mix;
use crate::time::{Timestamp, nanos};

/// The state of one traced flow.
#[derive(Debug)]
pub(super) struct TracedFlow {
    pub(super) index: u8,
    pub(super) direction: Direction,
    protocol: ProbeProtocol,
    /// How long to wait for each answer; `None`: as long as the RTT suggests.
    pub(super) wait: Option<Duration>,
    hops_max: u8,
    interval: Duration,
    seed: u64,
    /// Number of routers up to the destination; `None` until it answered.
    routers: Option<u8>,
    /// The latest RTT of the destination.
    rtt: Option<Duration>,
    /// Index: TTL − 1.
    hops: Vec<HopHistory>,
    destination: HopHistory,
    route: RouteTracker,
    burst: Option<Burst>,
    /// The trigger of the next trace.
    pending: Option<Trigger>,
    /// The trigger of the latest trace.
    last_trigger: Trigger,
    /// When the latest trace began.
    traced_at: Option<Timestamp>,
    /// Hops to probe again, and not before which time.
    retries: VecDeque<Retry>,
    /// The hops of the current round in the order of their probes.
    round: VecDeque<u8>,
    round_began: Timestamp,
    /// When the round after it begins.
    next_round: Timestamp,
    /// The probes of the current round that left the host.
    round_probes: Vec<BurstProbe>,
    rounds: u64,
    /// When the next probe that confirms or refutes a change is due.
    confirm_at: Timestamp,
    /// The TTLs of these probes, until all were sent once.
    confirmations_queued: VecDeque<u8>,
    bursts: u64,
    /// If only one probe may be in flight: the latest one, until it is answered, and until when its answer is
    /// waited for.
    in_flight: Option<(u64, Timestamp)>,
    /// If the number of routers is searched for and not known yet: the largest TTL at which a router
    /// answered, and the smallest one that reached the destination.
    search: (u8, Option<u8>),
    /// The latest rejection that came after its trace was complete. A router that looks for the next host in
    /// vain rejects packets after seconds.
    late_rejection: Option<Rejection>,
    /// What else the answers so far say about the route.
    found_updates: VecDeque<RouteUpdate>,
    pub(super) reachability: Reachability,
    pub(super) ttl_clamp: TtlClamp,
    /// Reports that were not taken yet.
    pub(super) reports: VecDeque<TraceReport>,
}

/// A hop to probe again.
#[derive(Debug, Clone, Copy)]
struct Retry {
    ttl: u8,
    left: u8,
    at: Timestamp,
    /// Whether a token was reserved for that time.
    is_reserved: bool,
}

/// Further probes of a hop that did not answer in a trace.
const RETRIES_MAX: u8 = 2;

/// Time between two probes of a hop that did not answer: routers that limit their answers to one per second
/// answer the second.
const RETRY_SPACING: Duration = Duration::from_millis(1_100);

/// Number of round trips until the answer to a probe is known.
fn round_trips(direction: Direction) -> u32 {
    match direction {
        Direction::Forward => 1,
        Direction::Reverse => 2,
    }
}

/// Maximum delay of a probe in a round, in nanoseconds. At most a quarter of the time between two probes.
const JITTER_MAX: u64 = 1_000_000_000;

/// What a flow does next.
#[derive(Debug, PartialEq)]
pub(super) enum FlowStep {
    /// Send a probe with this TTL.
    Send {
        ttl: u8,
        /// Whether a token was [reserved](crate::probe_budget::ProbeBudget::reserve) for it.
        is_reserved: bool,
    },
    /// Ask the destination, outside of a trace.
    Check,
    /// Wait until this time or an answer.
    Wait(Timestamp),
    /// A trace is complete.
    Traced(Box<Trace>),
    Report(TraceReport),
}

impl TracedFlow {
    pub(super) fn new(
        index: u8,
        direction: Direction,
        protocol: ProbeProtocol,
        hops_max: u8,
        interval: Duration,
        seed: u64,
        at: Timestamp,
    ) -> Self {
        Self {
            index,
            direction,
            protocol,
            wait: None,
            hops_max,
            interval,
            seed: mix(seed ^ mix(u64::from(index))),
            routers: None,
            rtt: None,
            hops: Vec::new(),
            destination: HopHistory::default(),
            route: RouteTracker::new(),
            burst: None,
            pending: Some(Trigger::Start),
            last_trigger: Trigger::Start,
            traced_at: None,
            retries: VecDeque::new(),
            round: VecDeque::new(),
            round_began: at,
            next_round: at,
            round_probes: Vec::new(),
            rounds: 0,
            confirm_at: at,
            confirmations_queued: VecDeque::new(),
            bursts: 0,
            in_flight: None,
            search: (0, None),
            late_rejection: None,
            found_updates: VecDeque::new(),
            reachability: Reachability::new(),
            ttl_clamp: TtlClamp::default(),
            reports: VecDeque::new(),
        }
    }

    /// Requests a trace. Of several requests the first one's trigger is kept, unless a user requests it,
    /// which does not wait.
    pub(super) fn trigger(&mut self, trigger: Trigger) {
        if trigger == Trigger::Request {
            self.pending = Some(trigger);
        }
        self.pending.get_or_insert(trigger);
    }

    /// The destination is behind this number of routers, by another measurement. Only before the first trace.
    pub(super) fn learn_destination(&mut self, routers: u8, rtt: Duration) {
        (self.routers, self.rtt) = (Some(routers), Some(rtt));
    }

    /// How long to wait for the answer to a probe. On the way back the responder gets it, and a further probe
    /// has to fetch it there.
    pub(super) fn answer_timeout(&self) -> Duration {
        self.method().timeout(self.rtt)
    }

    pub(super) fn last_trigger(&self) -> Trigger {
        self.last_trigger
    }

    pub(super) fn route(&self) -> &RouteTracker {
        &self.route
    }

    pub(super) fn protocol(&self) -> ProbeProtocol {
        self.protocol
    }

    fn method(&self) -> BurstMethod {
        match self.protocol {
            ProbeProtocol::Udp => BurstMethod::Reported { round_trips: round_trips(self.direction) },
            ProbeProtocol::Icmp | ProbeProtocol::ClosedPort => {
                BurstMethod::Searched { is_serial: false, wait: self.wait }
            }
            ProbeProtocol::Tcp => BurstMethod::Searched { is_serial: true, wait: self.wait },
        }
    }

    /// Whether a probe with this TTL is sent to reach the destination.
    pub(super) fn is_to_destination(&self, ttl: u8) -> bool {
        let nearest = self.search.1.map(|ttl| ttl.saturating_sub(1));
        let farthest = self.routers.max(self.route.unconfirmed_length()).or(nearest);
        let is_behind_routers = farthest.is_some_and(|routers| ttl > routers);
        ttl == DESTINATION || (self.protocol.is_searching() && is_behind_routers)
    }

    /// The router that a probe with this TTL is expected to reach; `None` for probes to the destination.
    pub(super) fn expected(&self, ttl: u8, is_v4: bool) -> Option<Expected> {
        if self.is_to_destination(ttl) {
            return None;
        }
        let known = self.hop(ttl).and_then(HopHistory::last_responder);
        Some(known.map_or(Expected::Unknown { ttl, is_v4 }, |known| Expected::Router(known.address)))
    }

    fn hop(&self, ttl: u8) -> Option<&HopHistory> {
        self.hops.get(usize::from(ttl).checked_sub(1)?)
    }

    /// The first hop, up to a TTL, at which this router answered last.
    fn hop_of(&self, router: IpAddr, ttl_max: u8) -> Option<u8> {
        (1..=ttl_max).zip(&self.hops).find_map(|(ttl, hop)| {
            hop.last_responder().is_some_and(|known| known.address == router).then_some(ttl)
        })
    }

    fn hop_mut(&mut self, ttl: u8) -> &mut HopHistory {
        let index = usize::from(ttl.max(1)) - 1;
        if self.hops.len() <= index {
            self.hops.resize(index + 1, HopHistory::default());
        }
        &mut self.hops[index]
    }

    pub(super) fn step(&mut self, now: Timestamp, drained: Timestamp) -> FlowStep {
        if let Some(report) = self.reports.pop_front() {
            return FlowStep::Report(report);
        }
        self.route.expire(now);
        self.ttl_clamp.expire(now);
        if self.reachability.take_trace(now) {
            self.trigger(Trigger::Unreached);
        }
        if !self.has_rounds() && self.traced_at.is_some_and(|at| at + self.interval <= now) {
            self.trigger(Trigger::Interval);
        }
        if let Some(trigger) = self.pending {
            let earliest = match (trigger, self.traced_at) {
                (Trigger::Start | Trigger::Request, _) | (_, None) => now,
                (_, Some(at)) => at + TRACE_GAP_MIN,
            };
            if self.burst.is_none() && earliest <= now {
                self.pending = None;
                self.begin(trigger, now);
            }
        }
        if let Some((_, until)) = self.in_flight
            && until > drained
        {
            return FlowStep::Wait(until);
        }
        let mut until = match &mut self.burst {
            Some(burst) => match burst.step(now, drained) {
                BurstStep::Send(ttl) => return FlowStep::Send { ttl, is_reserved: false },
                BurstStep::Wait(until) => return FlowStep::Wait(until),
                BurstStep::Complete => return FlowStep::Traced(Box::new(self.complete(now))),
            },
            None => match (self.pending, self.traced_at) {
                (Some(_), Some(at)) => at + TRACE_GAP_MIN,
                (Some(_), None) | (None, _) => Timestamp::NEVER,
            },
        };
        if let Some(trace) = self.end_round(now, drained) {
            return FlowStep::Traced(Box::new(trace));
        }
        match self.reachability.next_check(now) {
            Ok(()) => return FlowStep::Check,
            Err(at) => until = until.min(at),
        }
        for step in [Self::confirm, Self::retry, Self::roll] {
            match step(self, now) {
                Ok((ttl, is_reserved)) => return FlowStep::Send { ttl, is_reserved },
                Err(at) => until = until.min(at),
            }
        }
        FlowStep::Wait(until)
    }

    fn begin(&mut self, trigger: Trigger, now: Timestamp) {
        self.bursts += 1;
        self.traced_at = Some(now);
        self.last_trigger = trigger;
        self.retries.retain(|retry| retry.is_reserved);
        let seed = mix(self.seed ^ self.bursts);
        let routers = match (self.ttl_clamp.is_found(), self.ttl_clamp.is_ended()) {
            (true, _) => Some(0),
            // Hops behind the known ones show whether a router ends all probes.
            (false, true) => None,
            (false, false) => self.routers,
        };
        self.ttl_clamp.trace_began();
        let rtt = self.rtt;
        let method = self.method();
        self.burst = Some(Burst::new(trigger, now, routers, rtt, method, self.hops_max, seed));
    }

    /// Ends the burst: its record, and the hops to probe again.
    fn complete(&mut self, now: Timestamp) -> Trace {
        let burst = self.burst.take().expect("a burst is complete");
        if let (BurstMethod::Searched { .. }, Some(routers)) =
            (self.method(), burst.routers().or_else(|| self.searched()))
        {
            let update = self.observe_routers(routers, now);
            self.found_updates.extend(update);
        }
        self.examine(burst.probes(), now);
        let routers = burst.routers().or(self.routers);
        let trace = self.record(burst.trigger, burst.began, now, burst.probes(), routers);
        if self.protocol.is_searching() && trace.rtt.is_none() {
            // The way may have become longer than answers are waited for.
            self.rtt = None;
            self.search = (0, None);
        }
        self.establish_route(&trace);
        self.trace_ended(&trace, burst.probes(), now);
        for hop in trace.hops.iter().filter(|hop| hop.answers.is_empty()) {
            if self.hop(hop.ttl).is_none_or(|history| !history.is_silent()) {
                let at = now + RETRY_SPACING;
                self.retries.push_back(Retry { ttl: hop.ttl, left: RETRIES_MAX, at, is_reserved: false });
            }
        }
        self.round.clear();
        self.round_probes.clear();
        self.next_round = now;
        Trace { is_burst: true, route: self.route.current().map(|route| route.id), ..trace }
    }

    /// Sets the first route, as soon as a trace was answered.
    fn establish_route(&mut self, trace: &Trace) {
        let is_empty = trace.is_ttl_clamped || (trace.rtt.is_none() && trace.hops.is_empty());
        if self.route.current().is_some() || is_empty {
            return;
        }
        let routers = trace.hops.iter().map(|hop| match hop.answers.first() {
            Some(answer) => HopRouter::Single(answer.router),
            None => HopRouter::Unknown,
        });
        self.route.establish(routers.collect(), trace.rtt.and(self.routers));
    }

    /// The record of a trace with these probes.
    fn record(
        &self,
        trigger: Trigger,
        began: Timestamp,
        now: Timestamp,
        probes: &[BurstProbe],
        routers: Option<u8>,
    ) -> Trace {
        let is_ttl_clamped = self.ttl_clamp.is_found();
        let routers = routers.filter(|_| !is_ttl_clamped);
        let by_router = |probe: &&BurstProbe| !probe.is_reached;
        let answered =
            |ttl: u8| probes.iter().filter(by_router).any(|probe| probe.ttl == ttl && probe.answer.is_some());
        let rtt = probes.iter().filter(|probe| probe.is_reached);
        let rtt = rtt.filter_map(|probe| Some(probe.answer.as_ref()?.rtt)).min();
        let last_answered = (1..=self.hops_max).rev().find(|ttl| answered(*ttl)).unwrap_or(0);
        let late = self.late_rejection.filter(|_| rtt.is_none());
        let rejection = rejection::nearest(probes, late, |router, ttl_max| self.hop_of(router, ttl_max));
        // TTLs that are rewritten say nothing about the hop.
        let rejected_at = rejection.and_then(|rejection| rejection.ttl).filter(|_| !is_ttl_clamped);
        let rejection = rejection.map(|rejection| Rejection { ttl: rejected_at, ..rejection });
        let length = match (rtt, routers, rejected_at) {
            _ if is_ttl_clamped => 0,
            (Some(_), Some(routers), _) => routers,
            // The rejecting router ends the route as a destination does.
            (None, _, Some(ttl)) => last_answered.max(ttl - 1),
            (None, Some(routers), None) => routers.min(last_answered.saturating_add(1)),
            (_, None, _) => last_answered,
        };
        let length = length.min(self.hops_max);
        let mut states = states(&self.hops, &self.destination);
        states.resize(usize::from(length), HopState::Unanswered);
        let hops = (1..=length).map(|ttl| {
            let of_hop = probes.iter().filter(by_router).filter(|probe| probe.ttl == ttl);
            let answers: Vec<_> = of_hop.clone().filter_map(|probe| probe.answer.clone()).collect();
            let responder = self.hop(ttl).and_then(HopHistory::last_responder).cloned();
            let sent = u16::try_from(of_hop.count()).unwrap_or(u16::MAX);
            let state = match self.route.router(ttl) {
                HopRouter::Balanced(_) => HopState::Balanced,
                _ if sent == 0 && responder.is_some() => HopState::Inherited,
                _ if sent == 0 => HopState::NotProbed,
                HopRouter::Unknown | HopRouter::Single(_) => states[usize::from(ttl) - 1],
            };
            Hop { ttl, state, sent, answers, responder }
        });
        let hops: Vec<Hop> = hops.collect();
        let last_answer = probes.iter().filter_map(|probe| Some(probe.sent_at + probe.rtt()?)).max();
        let is_full = probes.iter().all(|probe| probe.rtt().is_some());
        let ended = last_answer.filter(|_| is_full).unwrap_or(now);
        Trace {
            flow: self.index,
            trigger,
            began,
            duration: ended.since(began),
            is_burst: false,
            rtt,
            routers,
            first_lossy_hop: first_lossy_hop(&states),
            hops,
            route: self.route.current().map(|route| route.id),
            is_ttl_clamped,
            rejection,
        }
    }

    /// The next probe that confirms or refutes a change of the route.
    fn confirm(&mut self, now: Timestamp) -> Result<(u8, bool), Timestamp> {
        let is_open = self.route.has_unconfirmed_length() || self.route.unconfirmed_hops().next().is_some();
        if !is_open {
            self.confirmations_queued.clear();
            return Err(Timestamp::NEVER);
        }
        if self.confirm_at > now {
            return Err(self.confirm_at);
        }
        if self.confirmations_queued.is_empty() {
            self.confirmations_queued.extend(self.route.unconfirmed_hops());
            match (self.route.unconfirmed_length(), self.routers) {
                // With this TTL a probe reaches the destination on the shorter route, and a router on the
                // longer one.
                (Some(other), Some(known)) if self.protocol.is_searching() => {
                    self.confirmations_queued.push_back(other.min(known).saturating_add(1));
                }
                // The destination answers all of them at once.
                (Some(_), _) => {
                    self.confirmations_queued.extend((0..CONFIRMATIONS).map(|_| DESTINATION));
                }
                (None, _) => {}
            }
        }
        let ttl = self.confirmations_queued.pop_front().expect("there is something to confirm");
        let is_last = self.confirmations_queued.is_empty();
        self.confirm_at = now + if is_last { self.answer_timeout() } else { SPACING };
        Ok((ttl, false))
    }

    /// The next probe of a hop that did not answer.
    fn retry(&mut self, now: Timestamp) -> Result<(u8, bool), Timestamp> {
        let Some(index) = (0..self.retries.len()).min_by_key(|index| self.retries[*index].at) else {
            return Err(Timestamp::NEVER);
        };
        let retry = &mut self.retries[index];
        if retry.at > now {
            return Err(retry.at);
        }
        let due = *retry;
        *retry = Retry { left: due.left - 1, at: now + RETRY_SPACING, is_reserved: false, ..due };
        if retry.left == 0 {
            self.retries.remove(index);
        }
        Ok((due.ttl, due.is_reserved))
    }

    /// When the probes of the round have waited long enough.
    fn round_ends(&self) -> Timestamp {
        let last = self.round_probes.iter().map(|probe| probe.sent_at).max();
        last.map_or(Timestamp::NEVER, |last| last + self.answer_timeout())
    }

    /// The trace that a complete round makes.
    fn end_round(&mut self, now: Timestamp, drained: Timestamp) -> Option<Trace> {
        if !self.round.is_empty() || self.round_probes.is_empty() || self.round_ends() > drained {
            return None;
        }
        let probes = std::mem::take(&mut self.round_probes);
        // Probes that confirm a change may come before the round.
        let first = probes.iter().map(|probe| probe.sent_at).min();
        let began = first.map_or(self.round_began, |first| self.round_began.min(first));
        self.examine(&probes, now);
        let trace = self.record(Trigger::Interval, began, now, &probes, self.routers);
        self.establish_route(&trace);
        self.trace_ended(&trace, &probes, now);
        Some(Trace { route: self.route.current().map(|route| route.id), ..trace })
    }

    /// Whether hops are probed one after the other. Without a destination the whole trace is repeated
    /// instead.
    fn has_rounds(&self) -> bool {
        self.routers.is_some_and(|routers| routers > 0)
    }

    /// The next probe of the rounds in which every hop is probed once per interval.
    fn roll(&mut self, now: Timestamp) -> Result<(u8, bool), Timestamp> {
        let Some(routers) = self.routers.filter(|_| self.has_rounds()) else {
            return Err(match self.pending {
                Some(_) => Timestamp::NEVER,
                None => self.traced_at.map_or(Timestamp::NEVER, |at| at + self.interval),
            });
        };
        if self.round.is_empty() {
            if !self.round_probes.is_empty() {
                // The last probes of the round may still be answered.
                return Err(self.round_ends());
            }
            self.rounds += 1;
            self.ttl_clamp.trace_began();
            let is_late = now.since(self.next_round) > self.interval;
            self.round_began = if is_late { now } else { self.next_round };
            self.next_round = self.round_began + self.interval;
            let mut ttls: Vec<u8> = (1..=routers.min(self.hops_max)).collect();
            // The same order in every round, so that no hop waits longer than an interval.
            ttls.sort_by_key(|ttl| mix(self.seed ^ u64::from(*ttl)));
            ttls.push(if self.protocol.is_searching() { routers.saturating_add(1) } else { DESTINATION });
            self.round.extend(ttls);
        }
        let count = u64::from(routers.min(self.hops_max)) + 1;
        let index = count - u64::try_from(self.round.len()).unwrap_or(count).min(count);
        let slot = nanos(self.interval) / count;
        let jitter = mix(self.seed ^ mix(self.rounds ^ index << 32)) % (slot / 4).clamp(1, JITTER_MAX);
        let due = self.round_began + Duration::from_nanos(slot * index + jitter);
        if due > now {
            return Err(due);
        }
        Ok((self.round.pop_front().expect("the round has hops"), false))
    }

    /// The probe that was requested is on its way to the kernel.
    pub(super) fn queued(&mut self, sequence: u64, ttl: u8, at: Timestamp) {
        if self.protocol == ProbeProtocol::Tcp {
            self.in_flight = Some((sequence, at + self.answer_timeout()));
        }
        let probe = BurstProbe::new(sequence, ttl, at);
        if let Some(burst) = &mut self.burst {
            burst.queued(probe);
        } else if self.has_rounds() {
            self.round_probes.push(probe);
        }
    }

    /// A probe left the host at that time.
    pub(super) fn sent(&mut self, sequence: u64, at: Timestamp) {
        if let Some(probe) = self.probe_mut(sequence) {
            probe.sent_at = at;
        }
    }

    /// A probe did not leave the host.
    pub(super) fn not_sent(&mut self, sequence: u64) {
        self.in_flight.take_if(|(latest, _)| *latest == sequence);
        if let Some(burst) = &mut self.burst {
            burst.not_sent(sequence);
        }
        self.round_probes.retain(|probe| probe.sequence != sequence);
    }

    fn probe_mut(&mut self, sequence: u64) -> Option<&mut BurstProbe> {
        let of_burst = self.burst.iter_mut().flat_map(Burst::probes_mut);
        of_burst.chain(&mut self.round_probes).find(|probe| probe.sequence == sequence)
    }

    fn answer(&mut self, sequence: u64, answer: Answer, is_reached: bool) {
        self.in_flight.take_if(|(latest, _)| *latest == sequence);
        if let Some(probe) = self.probe_mut(sequence) {
            probe.answer.get_or_insert(answer);
            probe.is_reached = is_reached;
        }
    }

    /// A probe was rejected. It counts as unanswered: the TTL of a rejected probe says nothing about a hop.
    pub(super) fn rejected(&mut self, sequence: u64, ttl: u8, rejection: Rejection) {
        self.in_flight.take_if(|(latest, _)| *latest == sequence);
        let Some(probe) = self.probe_mut(sequence) else {
            self.late_rejection = Some(rejection);
            return;
        };
        probe.rejection.get_or_insert(rejection);
        if let Some(burst) = &mut self.burst {
            burst.rejected(ttl);
        }
    }

    /// What is known about the route besides the latest answer.
    pub(super) fn take_found_update(&mut self) -> Option<RouteUpdate> {
        self.found_updates.pop_front()
    }

    /// A probe with a limited TTL reached the destination, or a router although the destination was searched
    /// for there. This supports one of two lengths, or shows that the length must be measured again.
    fn length_shown(&mut self, ttl: u8, is_reached: bool, at: Timestamp) -> Option<RouteUpdate> {
        let Some(known) = self.routers else { return self.search_answered(ttl, is_reached, at) };
        if let Some(other) = self.route.unconfirmed_length() {
            let (shorter, longer) = (known.min(other), known.max(other));
            let distinguishes = shorter < ttl && ttl <= longer;
            return distinguishes
                .then(|| self.observe_routers(if is_reached { shorter } else { longer }, at))?;
        }
        let contradicts = is_reached == (ttl <= known);
        if contradicts && self.burst.is_none() {
            self.trigger(Trigger::Length);
        }
        None
    }

    /// The number of routers, if the TTLs before and behind the last one were answered, though not in one
    /// trace.
    fn searched(&self) -> Option<u8> {
        let (farthest, nearest) = self.search;
        (self.routers.is_none() && nearest? == farthest + 1).then_some(farthest)
    }

    /// A probe of a search for the number of routers was answered. Answers that contradict each other are of
    /// different routes.
    fn search_answered(&mut self, ttl: u8, is_reached: bool, at: Timestamp) -> Option<RouteUpdate> {
        let (farthest, nearest) = self.search;
        let (farthest, nearest) = match is_reached {
            true => (farthest, Some(nearest.map_or(ttl, |nearest| nearest.min(ttl)))),
            false => (farthest.max(ttl), nearest),
        };
        let is_consistent = nearest.is_none_or(|nearest| farthest < nearest);
        self.search = if is_consistent { (farthest, nearest) } else { (0, None) };
        // The burst has a number of its own when it is complete.
        let routers = self.searched().filter(|_| self.burst.is_none())?;
        self.observe_routers(routers, at)
    }

    /// A router answered a probe.
    pub(super) fn answered(
        &mut self,
        sequence: u64,
        ttl: u8,
        answer: Answer,
        at: Timestamp,
    ) -> Option<RouteUpdate> {
        let from = answer.router;
        self.retries.retain(|retry| retry.ttl != ttl || retry.is_reserved);
        let is_new = self.hop(ttl).and_then(HopHistory::last_responder).is_some_and(|r| r.address != from);
        let answer = self.hop_mut(ttl).answered(answer, at);
        self.answer(sequence, answer, false);
        // A search behind the known length, because probes to the destination end before it.
        let is_beyond = self.ttl_clamp.is_ended() && self.routers.is_some_and(|routers| ttl > routers);
        if self.ttl_clamp.is_found() || is_beyond {
            return None;
        }
        let mut update = self.route.answered(ttl, from, at);
        if self.protocol.is_searching() {
            if let Some(burst) = &mut self.burst {
                burst.passed(ttl, at);
            }
            match (&update, self.length_shown(ttl, false, at)) {
                (None, length) => update = length,
                (Some(_), length) => self.found_updates.extend(length),
            }
        }
        if is_new && self.burst.is_none() && self.route.unconfirmed_hops().any(|hop| hop == ttl) {
            self.trigger(Trigger::Router);
        }
        update
    }

    /// The destination answered a probe. `routers` is the number of routers that the probe passed; `None` if
    /// the TTL on arrival is not known.
    pub(super) fn reached(
        &mut self,
        sequence: u64,
        ttl: u8,
        from: IpAddr,
        rtt: Duration,
        routers: Option<u8>,
        at: Timestamp,
    ) -> Option<RouteUpdate> {
        let is_searching = self.protocol.is_searching();
        let is_reached = ttl == DESTINATION || is_searching;
        if is_reached {
            // Checks come when the destination is missed, so they do not show the usual loss.
            if !self.reachability.is_check(sequence) {
                self.destination.answered(Answer::new(from, rtt), at);
            }
            self.rtt = Some(rtt);
            self.late_rejection = None;
        }
        self.answer(sequence, Answer::new(from, rtt), is_reached);
        if is_searching {
            if let Some(burst) = &mut self.burst {
                burst.reached(ttl);
            }
            return (ttl != DESTINATION).then(|| self.length_shown(ttl, true, at))?;
        }
        let routers = routers.filter(|_| !self.ttl_clamp.is_found())?;
        if let Some(burst) = &mut self.burst {
            burst.learn_routers(routers);
        }
        self.observe_routers(routers, at)
    }

    /// The number of routers, from a reply to this tracer or to an echo.
    pub(super) fn observe_routers(&mut self, routers: u8, at: Timestamp) -> Option<RouteUpdate> {
        if self.ttl_clamp.is_found() {
            return None;
        }
        if self.protocol.is_searching() && self.route.shorten(routers) {
            self.routers = Some(routers);
            return None;
        }
        let is_new = self.routers.is_some_and(|known| known != routers);
        let update = self.route.reached(routers, at);
        if self.routers.is_none() || !self.route.has_unconfirmed_length() {
            self.routers = self.route.current().and_then(|route| route.routers).or(Some(routers));
        }
        if is_new && self.burst.is_none() && self.route.has_unconfirmed_length() {
            self.trigger(Trigger::Length);
        }
        update
    }

    /// A probe was not answered in time.
    pub(super) fn unanswered(&mut self, ttl: u8) {
        if self.is_to_destination(ttl) {
            self.destination.unanswered();
        } else {
            self.hop_mut(ttl).unanswered();
        }
    }

    /// Sends no limited probes any more, and forgets the number of routers.
    pub(super) fn stop_limited_probes(&mut self) {
        self.routers = None;
        self.route.forget_length();
        self.retries.clear();
        self.confirmations_queued.clear();
        self.round.clear();
        self.round_probes.clear();
        if let Some(burst) = &mut self.burst {
            burst.skip_hops();
        }
    }

    /// Whether a probe with this TTL already waits for its turn.
    pub(super) fn is_waiting(&self, ttl: u8) -> bool {
        self.retries.iter().any(|retry| retry.ttl == ttl && retry.is_reserved)
    }

    pub(super) fn has_reserved(&self) -> bool {
        self.retries.iter().any(|retry| retry.is_reserved)
    }

    /// Reserved times are no longer valid: reserves again at once.
    pub(super) fn cancel_reserved(&mut self, now: Timestamp) {
        for retry in self.retries.iter_mut().filter(|retry| retry.is_reserved) {
            (retry.at, retry.is_reserved) = (now, false);
        }
    }

    /// A token was reserved for a later time: the hop is left out of the trace, and probed then.
    pub(super) fn reserve(&mut self, ttl: u8, at: Timestamp) {
        match self.retries.iter_mut().find(|retry| retry.ttl == ttl) {
            Some(retry) => *retry = Retry { at, is_reserved: true, ..*retry },
            None => self.retries.push_back(Retry { ttl, left: 1, at, is_reserved: true }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
    }

    fn milliseconds(at_time: Timestamp) -> u64 {
        u64::try_from(at_time.since(at(0)).as_millis()).unwrap()
    }

    /// A flow over three routers, of which some do not answer, with an RTT of 10 ms.
    struct TestFlow {
        flow: TracedFlow,
        silent: Vec<u8>,
        next_sequence: u64,
        /// Probes that will be answered.
        answers: VecDeque<(Timestamp, u64, u8)>,
        traces: Vec<Trace>,
    }

    const RTT: Duration = Duration::from_millis(10);

    impl TestFlow {
        fn new(silent: &[u8]) -> Self {
            let flow = TracedFlow::new(
                0,
                Direction::Forward,
                ProbeProtocol::Udp,
                30,
                Duration::from_secs(30),
                1,
                at(0),
            );
            let (answers, traces) = (VecDeque::new(), Vec::new());
            Self { flow, silent: silent.to_vec(), next_sequence: 0, answers, traces }
        }

        /// Lets the time pass and answers probes. Returns their TTLs and times.
        fn run(&mut self, from: u64, until: u64) -> Vec<(u8, u64)> {
            let (mut time, mut sent) = (at(from), Vec::new());
            loop {
                while let Some((due, sequence, ttl)) =
                    self.answers.front().copied().filter(|(due, ..)| *due <= time)
                {
                    self.answers.pop_front();
                    match ttl {
                        DESTINATION => {
                            self.flow.reached(sequence, ttl, [10, 0, 0, 9].into(), RTT, Some(3), due)
                        }
                        _ => self.flow.answered(sequence, ttl, Answer::new([10, 0, 0, ttl].into(), RTT), due),
                    };
                }
                match self.flow.step(time, time) {
                    FlowStep::Send { ttl, .. } => {
                        sent.push((ttl, milliseconds(time)));
                        self.flow.queued(self.next_sequence, ttl, time);
                        if !self.silent.contains(&ttl) {
                            self.answers.push_back((time + RTT, self.next_sequence, ttl));
                        }
                        self.next_sequence += 1;
                    }
                    FlowStep::Check => {
                        self.flow.queued(self.next_sequence, DESTINATION, time);
                        self.flow.check_queued(self.next_sequence);
                        self.next_sequence += 1;
                    }
                    FlowStep::Traced(trace) => self.traces.push(*trace),
                    FlowStep::Report(report) => panic!("{report:?}"),
                    FlowStep::Wait(next) => {
                        let next = self.answers.front().map_or(next, |(due, ..)| next.min(*due));
                        if next > at(until) {
                            return sent;
                        }
                        assert!(next > time, "it waits for a later time");
                        time = next;
                    }
                }
            }
        }
    }

    fn times_of(sent: &[(u8, u64)], ttl: u8) -> Vec<u64> {
        sent.iter().filter(|(found, _)| *found == ttl).map(|(_, time)| *time).collect()
    }

    #[test]
    fn hop_without_an_answer_is_probed_twice_more_and_not_if_it_is_known_to_be_silent() {
        let mut test = TestFlow::new(&[2]);
        let sent = test.run(0, 3_000);
        let complete = milliseconds(test.traces[0].began + test.traces[0].duration);
        assert_eq!(times_of(&sent, 2), [10, complete + 1_100, complete + 2_200]);
        (0..5).for_each(|_| test.flow.unanswered(2));
        test.flow.trigger(Trigger::Request);
        let sent = test.run(3_000, 5_999);
        assert_eq!(times_of(&sent, 2).len(), 1, "{sent:?}");
    }

    #[test]
    fn every_hop_and_the_destination_are_probed_once_in_an_interval() {
        let mut test = TestFlow::new(&[]);
        test.run(0, 100);
        let sent = test.run(100, 30_000);
        for ttl in [1, 2, 3, DESTINATION] {
            assert_eq!(times_of(&sent, ttl).len(), 1, "{sent:?}");
        }
        assert_eq!(sent[3].0, DESTINATION);
        let later = test.run(30_000, 60_000);
        assert!(later.iter().map(|(ttl, _)| ttl).eq(sent.iter().map(|(ttl, _)| ttl)), "{later:?}");
        let [burst, first, second] = &test.traces[..] else { panic!("{:?}", test.traces) };
        assert_eq!([burst, first, second].map(|trace| trace.is_burst), [true, false, false]);
        assert_eq!([burst, first, second].map(|trace| trace.trigger), {
            [Trigger::Start, Trigger::Interval, Trigger::Interval]
        });
        assert_eq!(second.began.since(first.began), Duration::from_secs(30));
        for trace in [burst, first, second] {
            assert!(trace.hops.iter().all(|hop| hop.answers.len() == 1 && hop.state == HopState::Answered));
            assert_eq!((trace.hops.len(), trace.routers, trace.rtt), (3, Some(3), Some(RTT)));
            assert!(trace.route.is_some());
        }
    }

    #[test]
    fn traces_are_ten_seconds_apart_except_on_request() {
        let mut test = TestFlow::new(&[]);
        test.run(0, 100);
        test.flow.trigger(Trigger::Loss);
        test.flow.trigger(Trigger::Rtt);
        test.run(100, 10_100);
        test.flow.trigger(Trigger::Request);
        test.run(10_200, 10_300);
        let bursts = test.traces.iter().filter(|trace| trace.is_burst);
        let found: Vec<_> = bursts.map(|trace| (trace.trigger, milliseconds(trace.began))).collect();
        let expected = [(Trigger::Start, 0), (Trigger::Loss, 10_000), (Trigger::Request, 10_200)];
        assert_eq!(found, expected, "of two triggers the first is kept");
        assert_eq!(test.flow.last_trigger(), Trigger::Request);
    }

    #[test]
    fn trace_without_a_destination_ends_at_the_last_hop_that_answers_and_is_repeated() {
        let mut test = TestFlow::new(&[DESTINATION, 1]);
        (4..=30).for_each(|ttl| test.silent.push(ttl));
        test.run(0, 29_999);
        test.run(30_000, 32_000);
        let [first, second] = &test.traces[..] else { panic!("{:?}", test.traces) };
        for trace in [first, second] {
            assert_eq!((trace.hops.len(), trace.routers, trace.rtt), (3, None, None));
            let states = trace.hops.iter().map(|hop| hop.state);
            assert!(states.eq([HopState::Unanswered, HopState::Answered, HopState::Answered]));
            assert!(trace.is_burst);
        }
        assert_eq!((second.trigger, milliseconds(second.began)), (Trigger::Interval, 30_000));
    }

    #[test]
    fn hop_whose_probe_was_deferred_shows_its_last_answer() {
        let mut test = TestFlow::new(&[]);
        test.run(0, 100);
        assert!(!test.flow.is_waiting(2));
        test.flow.reserve(2, at(20_000));
        assert!(test.flow.is_waiting(2) && !test.flow.is_waiting(1));
        test.flow.trigger(Trigger::Request);
        let mut sequence = 100;
        let trace = loop {
            match test.flow.step(at(100 + sequence), at(100 + sequence)) {
                // The tracer leaves out hops that wait for their turn.
                FlowStep::Send { ttl: 2, .. } => {}
                FlowStep::Send { ttl, .. } => {
                    test.flow.queued(sequence, ttl, at(100 + sequence));
                    match ttl {
                        DESTINATION => {
                            test.flow.reached(sequence, ttl, [10, 0, 0, 9].into(), RTT, Some(3), at(200))
                        }
                        _ => test.flow.answered(
                            sequence,
                            ttl,
                            Answer::new([10, 0, 0, ttl].into(), RTT),
                            at(200),
                        ),
                    };
                }
                FlowStep::Traced(trace) => break trace,
                FlowStep::Wait(_) => {}
                step @ (FlowStep::Check | FlowStep::Report(_)) => panic!("{step:?}"),
            }
            sequence += 1;
        };
        let states: Vec<HopState> = trace.hops.iter().map(|hop| hop.state).collect();
        assert_eq!(states, [HopState::Answered, HopState::Inherited, HopState::Answered]);
    }

    #[test]
    fn other_router_at_a_known_hop_is_confirmed_and_leads_to_a_trace() {
        let mut test = TestFlow::new(&[]);
        test.run(0, 12_000);
        let other = [10, 0, 0, 77].into();
        assert_eq!(test.flow.answered(1_000, 2, Answer::new(other, RTT), at(12_000)), None);
        test.silent.push(2);
        let sent = test.run(12_000, 12_200);
        assert!(test.traces.iter().any(|trace| trace.trigger == Trigger::Router && trace.is_burst));
        assert!(times_of(&sent, 2).len() > 3, "every answer timeout: {sent:?}");
        let updates =
            (0..15).filter_map(|_| test.flow.answered(1_001, 2, Answer::new(other, RTT), at(12_300)));
        assert!(matches!(updates.collect::<Vec<_>>()[..], [RouteUpdate::Changed { .. }]));
        assert!(times_of(&test.run(12_300, 13_000), 2).is_empty());
    }
}
