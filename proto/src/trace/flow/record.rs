//! What a trace of a flow shows.

use super::TracedFlow;
use crate::time::Timestamp;
use crate::trace::burst::BurstProbe;
use crate::trace::hop::{HopHistory, HopState, first_lossy_hop, states};
use crate::trace::rejection;
use crate::trace::route::HopRouter;
use crate::trace::{Hop, Rejection, Trace, Trigger};

impl TracedFlow {
    /// The record of a trace with these probes.
    pub(super) fn record(
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
        let rejection = match (rejection::nearest(probes), rtt) {
            (found, None) => self.latest_rejection.of_trace(found, now),
            (found, Some(_)) => found,
        };
        let rejection = rejection.map(|rejection| match is_ttl_clamped {
            true => Rejection { ttl: None, ..rejection },
            false => Rejection { ttl: self.hop_of(&rejection).or(rejection.ttl), ..rejection },
        });
        let rejected_at = rejection.and_then(|rejection| rejection.ttl);
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

    /// The first hop, up to the TTL of a rejection, at which the rejecting router has answered last: one that
    /// checks its rules only after the TTL rejects probes of the next hop.
    fn hop_of(&self, rejection: &Rejection) -> Option<u8> {
        let ttls = 1..=rejection.ttl.unwrap_or(self.hops_max);
        ttls.zip(&self.hops).find_map(|(ttl, hop)| {
            hop.last_responder().is_some_and(|known| known.address == rejection.address).then_some(ttl)
        })
    }

    /// Sets the first route, as soon as a trace was answered.
    pub(super) fn establish_route(&mut self, trace: &Trace) {
        let is_empty = trace.is_ttl_clamped || (trace.rtt.is_none() && trace.hops.is_empty());
        // That of earlier ports says more than a route that does not reach the destination.
        let is_kept = self.route.shown().is_some() && trace.rtt.is_none();
        if self.route.current().is_some() || is_empty || is_kept {
            return;
        }
        let routers = trace.hops.iter().map(|hop| match hop.answers.first() {
            Some(answer) => HopRouter::Single(answer.router),
            None => HopRouter::Unknown,
        });
        self.route.establish(routers.collect(), trace.rtt.and(self.routers));
    }
}
