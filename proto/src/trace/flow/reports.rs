//! What a flow reports besides its traces and its route: whether the destination answers, and whether TTLs
//! are rewritten.

use std::net::IpAddr;

use super::TracedFlow;
use crate::time::Timestamp;
use crate::trace::burst::BurstProbe;
use crate::trace::reachability::ReachabilityChange;
use crate::trace::ttl_clamp::TtlRewriting;
use crate::trace::{DESTINATION, Direction, Trace, TraceReport};

/// A reply of the destination to a probe of a flow.
#[derive(Debug, Clone, Copy)]
pub(in crate::trace) struct DestinationReply {
    pub(in crate::trace) sequence: u64,
    /// The TTL with which the probe was sent.
    pub(in crate::trace) sent_ttl: u8,
    /// The TTL with which it arrived; `None` if it is not known for sure.
    pub(in crate::trace) arrived_ttl: Option<u8>,
    /// When the probe was sent.
    pub(in crate::trace) sent_at: Timestamp,
    pub(in crate::trace) at: Timestamp,
}

impl TracedFlow {
    /// The destination answered a probe. Comes before the number of routers is learned from that.
    pub(in crate::trace) fn destination_answered(&mut self, reply: DestinationReply) {
        let DestinationReply { sequence, sent_ttl, arrived_ttl, sent_at, at } = reply;
        if self.shows_reachability()
            && let Some(since) = self.reachability.answered(sequence, sent_at)
        {
            self.report_reachability(since, Some(at));
        }
        if let Some(rewriting) = arrived_ttl.and_then(|arrived| self.ttl_clamp.reached(sent_ttl, arrived)) {
            self.clamp_found(rewriting, at);
        }
    }

    /// A probe was not answered in time.
    pub(in crate::trace) fn probe_expired(&mut self, sequence: u64, ttl: u8) {
        if !self.reachability.is_check(sequence) {
            self.unanswered(ttl);
        }
        // One of each trace, and the checks: others are sent together and lost together.
        if ttl == DESTINATION
            && self.shows_reachability()
            && let Some(since) = self.reachability.unanswered(sequence)
        {
            self.report_reachability(since, None);
        }
    }

    /// An echo of this flow that was sent after the first missed probe was answered at `at`.
    pub(in crate::trace) fn echo_answered(&mut self, at: Timestamp) {
        if let Some(since) = self.reachability.echo_answered() {
            self.report_reachability(since, Some(at));
        }
    }

    /// The probe that was requested last is a check and of no trace.
    pub(in crate::trace) fn check_queued(&mut self, sequence: u64) {
        self.exclude(sequence);
        self.reachability.check_queued(sequence);
    }

    /// Looks for rewritten TTLs in the probes of a complete trace.
    pub(in crate::trace) fn examine(&mut self, probes: &[BurstProbe], now: Timestamp) {
        if self.protocol().is_searching() {
            // Only an agent sets and reports TTLs, which shows whether they are rewritten.
            return;
        }
        let answers = probes.iter().filter(|probe| probe.ttl != DESTINATION);
        let answers = answers.filter_map(|probe| Some((probe.ttl, probe.answer.as_ref()?.router)));
        let is_reached = probes.iter().any(|probe| probe.ttl == DESTINATION && probe.answer.is_some());
        if let Some(rewriting) = self.ttl_clamp.trace_ended(answers, is_reached) {
            self.clamp_found(rewriting, now);
        }
    }

    /// A trace with these probes is complete.
    pub(in crate::trace) fn trace_ended(&mut self, trace: &Trace, probes: &[BurstProbe], now: Timestamp) {
        if self.shows_reachability() {
            // A router that answers one of them shows a longer route.
            let is_unknown =
                |probe: &&BurstProbe| self.is_to_destination(probe.ttl) && probe.answer.is_none();
            let sent = probes.iter().filter(is_unknown).map(|probe| probe.sent_at).min();
            if let Some(since) = self.reachability.traced(trace, sent, now) {
                self.report_reachability(since, None);
            }
        }
    }

    /// The TTL of an unlimited probe ended at a router.
    pub(in crate::trace) fn unlimited_ended(&mut self, router: IpAddr) {
        self.ttl_clamp.ended(router);
    }

    /// Whether probes to the destination show if it can be reached. Both directions show the same.
    fn shows_reachability(&self) -> bool {
        self.direction == Direction::Forward
    }

    fn clamp_found(&mut self, rewriting: TtlRewriting, now: Timestamp) {
        if self.ttl_clamp.found(now) {
            let trigger = self.last_trigger();
            self.reports.push_back(TraceReport::TtlClamped { flow: self.index, rewriting, trigger });
        }
        self.stop_limited_probes();
    }

    fn report_reachability(&mut self, since: Timestamp, answered: Option<Timestamp>) {
        let change = ReachabilityChange {
            flow: self.index,
            route: self.route().shown().cloned(),
            last_hop: self.reachability.last_hop(),
            rejection: self.reachability.rejection(),
            trigger: self.last_trigger(),
            since,
            lasted: answered.map(|at| at.since(since)),
        };
        self.reports.push_back(TraceReport::Reachability(Box::new(change)));
    }
}
