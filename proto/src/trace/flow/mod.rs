//! The traces of one flow.

mod answers;
mod confirmations;
mod distance_search;
mod record;
mod reports;
mod retries;
mod rounds;

use std::collections::VecDeque;
use std::time::Duration;

use self::confirmations::Confirmations;
use self::distance_search::DistanceSearch;
pub(super) use self::reports::DestinationReply;
pub(super) use self::retries::Retries;
use self::rounds::Rounds;
use super::burst::{Burst, BurstMethod, BurstProbe, BurstStep};
use super::hop::HopHistory;
use super::reachability::Reachability;
use super::rejection::LatestRejection;
use super::route::{CONFIRMATIONS, RouteTracker, RouteUpdate};
use super::ttl_clamp::TtlClamp;
use super::{DESTINATION, Direction, ProbeProtocol, TRACE_GAP_MIN, Trace, TraceReport, Trigger};
use crate::probe_budget::Expected;
use crate::schedule::mix;
use crate::time::Timestamp;

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
    /// Whether the destination has ever answered.
    has_answered: bool,
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
    retries: Retries,
    rounds: Rounds,
    confirmations: Confirmations,
    bursts: u64,
    /// If only one probe may be in flight: the latest one, until it is answered, and until when its answer is
    /// waited for.
    in_flight: Option<(u64, Timestamp)>,
    /// Used where the number of routers is searched for, until it is known.
    search: DistanceSearch,
    latest_rejection: LatestRejection,
    /// What else the answers so far say about the route.
    found_updates: VecDeque<RouteUpdate>,
    pub(super) reachability: Reachability,
    pub(super) ttl_clamp: TtlClamp,
    /// Reports that were not taken yet.
    pub(super) reports: VecDeque<TraceReport>,
}

/// Number of round trips until the answer to a probe is known.
fn round_trips(direction: Direction) -> u32 {
    match direction {
        Direction::Forward => 1,
        Direction::Reverse => 2,
    }
}

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
        let seed = mix(seed ^ mix(u64::from(index)));
        Self {
            index,
            direction,
            protocol,
            wait: None,
            hops_max,
            interval,
            seed,
            routers: None,
            rtt: None,
            has_answered: false,
            hops: Vec::new(),
            destination: HopHistory::default(),
            route: RouteTracker::new(),
            burst: None,
            pending: Some(Trigger::Start),
            last_trigger: Trigger::Start,
            traced_at: None,
            retries: Retries::default(),
            rounds: Rounds::new(interval, seed, at),
            confirmations: Confirmations::new(at),
            bursts: 0,
            in_flight: None,
            search: DistanceSearch::default(),
            latest_rejection: LatestRejection::default(),
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

    /// The packets of the flow have other ports, and may take another route, which is no change: it is found
    /// anew. Whether the destination answers is still known.
    pub(super) fn replaced(&mut self, now: Timestamp) {
        self.routers = None;
        self.hops.clear();
        self.search = DistanceSearch::default();
        self.route.replaced();
        self.burst = None;
        self.in_flight = None;
        self.retries.clear();
        self.confirmations.clear();
        self.rounds.restart(now);
        self.found_updates.clear();
        if self.pending != Some(Trigger::Request) {
            self.pending = Some(Trigger::Connection);
        }
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
        let farthest =
            self.routers.max(self.route.unconfirmed_length()).or_else(|| self.search.routers_max());
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
        if !self.has_rounds() && self.traced_at.is_some_and(|at| at + self.repeated_after() <= now) {
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
        for step in [Self::confirm, |flow: &mut Self, now| flow.retries.next(now), Self::roll] {
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
        self.retries.trace_began();
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
        // The first probe may have waited in the driver.
        let began = burst.probes().iter().map(|probe| probe.sent_at).min().unwrap_or(burst.began);
        let trace = self.record(burst.trigger, began, now, burst.probes(), routers);
        if self.protocol.is_searching() && trace.rtt.is_none() {
            // The way may have become longer than answers are waited for.
            self.rtt = None;
            self.search = DistanceSearch::default();
        }
        self.establish_route(&trace);
        self.trace_ended(&trace, burst.probes(), now);
        for hop in trace.hops.iter().filter(|hop| hop.answers.is_empty()) {
            if self.hop(hop.ttl).is_none_or(|history| !history.is_silent()) {
                self.retries.add(hop.ttl, now);
            }
        }
        self.rounds.restart(now);
        Trace { is_burst: true, route: self.route.current().map(|route| route.id), ..trace }
    }

    /// The next probe that confirms or refutes a change of the route.
    fn confirm(&mut self, now: Timestamp) -> Result<(u8, bool), Timestamp> {
        let is_open = self.route.has_unconfirmed_length() || self.route.unconfirmed_hops().next().is_some();
        if !is_open {
            self.confirmations.clear();
            return Err(Timestamp::NEVER);
        }
        let (answer_timeout, is_searching) = (self.answer_timeout(), self.protocol.is_searching());
        let (route, known) = (&self.route, self.routers);
        let batch = || {
            let mut ttls: Vec<u8> = route.unconfirmed_hops().collect();
            match (route.unconfirmed_length(), known) {
                // With this TTL a probe reaches the destination on the shorter route, and a router on the
                // longer one.
                (Some(other), Some(known)) if is_searching => ttls.push(other.min(known).saturating_add(1)),
                // The destination answers all of them at once.
                (Some(_), _) => ttls.extend((0..CONFIRMATIONS).map(|_| DESTINATION)),
                (None, _) => {}
            }
            ttls
        };
        Ok((self.confirmations.next(now, answer_timeout, batch)?, false))
    }

    /// The trace that a complete round makes.
    fn end_round(&mut self, now: Timestamp, drained: Timestamp) -> Option<Trace> {
        let (probes, began) = self.rounds.take_complete(self.answer_timeout(), drained)?;
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

    /// Time from a trace to its repetition, where there are no rounds. Until the destination has answered it
    /// doubles from [`TRACE_GAP_MIN`] up to the interval: a single lost probe must not cost a long interval.
    fn repeated_after(&self) -> Duration {
        if self.has_answered {
            return self.interval;
        }
        let doublings = u32::try_from(self.bursts.saturating_sub(1)).unwrap_or(u32::MAX);
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        TRACE_GAP_MIN.saturating_mul(factor).min(self.interval)
    }

    /// The next probe of the rounds in which every hop is probed once per interval.
    fn roll(&mut self, now: Timestamp) -> Result<(u8, bool), Timestamp> {
        let Some(routers) = self.routers.filter(|_| self.has_rounds()) else {
            return Err(match self.pending {
                Some(_) => Timestamp::NEVER,
                None => self.traced_at.map_or(Timestamp::NEVER, |at| at + self.repeated_after()),
            });
        };
        if self.rounds.is_sent() {
            if !self.rounds.is_over() {
                // The last probes of the round may still be answered.
                return Err(self.rounds.ends(self.answer_timeout()));
            }
            self.ttl_clamp.trace_began();
            let destination =
                if self.protocol.is_searching() { routers.saturating_add(1) } else { DESTINATION };
            self.rounds.begin(routers.min(self.hops_max), destination, now);
        }
        Ok((self.rounds.next(now)?, false))
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
            self.rounds.queued(probe);
        }
    }

    /// A probe left the host at that time.
    pub(super) fn sent(&mut self, sequence: u64, at: Timestamp) {
        // It may have waited in the driver.
        let timeout = self.answer_timeout();
        if let Some((_, until)) = self.in_flight.as_mut().filter(|(latest, _)| *latest == sequence) {
            *until = at + timeout;
        }
        if let Some(probe) = self.probe_mut(sequence) {
            probe.sent_at = at;
        }
    }

    /// A probe did not leave the host.
    pub(super) fn not_sent(&mut self, sequence: u64) {
        self.in_flight.take_if(|(latest, _)| *latest == sequence);
        self.exclude(sequence);
    }

    /// A probe is of no trace.
    fn exclude(&mut self, sequence: u64) {
        if let Some(burst) = &mut self.burst {
            burst.not_sent(sequence);
        }
        self.rounds.not_sent(sequence);
    }

    fn probe_mut(&mut self, sequence: u64) -> Option<&mut BurstProbe> {
        let of_burst = self.burst.iter_mut().flat_map(Burst::probes_mut);
        of_burst.chain(self.rounds.probes_mut()).find(|probe| probe.sequence == sequence)
    }

    /// Sends no limited probes any more, and forgets the number of routers.
    pub(super) fn stop_limited_probes(&mut self) {
        self.routers = None;
        self.route.forget_length();
        self.retries.clear();
        self.rounds.clear();
        if let Some(burst) = &mut self.burst {
            burst.skip_hops();
        }
    }

    /// Hops to probe again between traces.
    pub(super) fn retries(&self) -> &Retries {
        &self.retries
    }

    /// [`Self::retries`], mutable.
    pub(super) fn retries_mut(&mut self) -> &mut Retries {
        &mut self.retries
    }
}

#[cfg(test)]
mod tests;
