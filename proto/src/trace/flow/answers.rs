//! What the answers to the probes of a flow show.

use std::net::IpAddr;
use std::time::Duration;

use super::TracedFlow;
use crate::time::Timestamp;
use crate::trace::hop::HopHistory;
use crate::trace::route::RouteUpdate;
use crate::trace::{Answer, DESTINATION, Rejection, Trigger};

impl TracedFlow {
    fn answer(&mut self, sequence: u64, answer: Answer, is_reached: bool) {
        self.in_flight.take_if(|(latest, _)| *latest == sequence);
        if let Some(probe) = self.probe_mut(sequence) {
            probe.answer.get_or_insert(answer);
            probe.is_reached = is_reached;
        }
    }

    /// A probe was rejected. It counts as unanswered: the TTL of a rejected probe says nothing about a hop.
    pub(in crate::trace) fn rejected(&mut self, sequence: u64, ttl: u8, rejection: Rejection, at: Timestamp) {
        self.in_flight.take_if(|(latest, _)| *latest == sequence);
        self.latest_rejection.add(rejection, at);
        let Some(probe) = self.probe_mut(sequence) else { return };
        probe.rejection.get_or_insert(rejection);
        if let Some(burst) = &mut self.burst {
            burst.rejected(ttl);
        }
    }

    /// What is known about the route besides the latest answer.
    pub(in crate::trace) fn take_found_update(&mut self) -> Option<RouteUpdate> {
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

    /// The number of routers, if it was not known and the search has found it.
    pub(super) fn searched(&self) -> Option<u8> {
        self.search.routers().filter(|_| self.routers.is_none())
    }

    /// A probe of a search for the number of routers was answered.
    fn search_answered(&mut self, ttl: u8, is_reached: bool, at: Timestamp) -> Option<RouteUpdate> {
        self.search.answered(ttl, is_reached);
        // The burst has a number of its own when it is complete.
        let routers = self.searched().filter(|_| self.burst.is_none())?;
        self.observe_routers(routers, at)
    }

    /// A router answered a probe.
    pub(in crate::trace) fn answered(
        &mut self,
        sequence: u64,
        ttl: u8,
        answer: Answer,
        at: Timestamp,
    ) -> Option<RouteUpdate> {
        let from = answer.router;
        self.retries.answered(ttl);
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
    pub(in crate::trace) fn reached(
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
            self.has_answered = true;
            self.latest_rejection.answered(at - rtt);
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
    pub(in crate::trace) fn observe_routers(&mut self, routers: u8, at: Timestamp) -> Option<RouteUpdate> {
        if self.ttl_clamp.is_found() {
            return None;
        }
        if self.protocol.is_searching() && self.route.shorten(routers) {
            self.routers = Some(routers);
            return None;
        }
        let was_open = self.route.has_unconfirmed_length();
        let update = self.route.reached(routers, at);
        let is_open = self.route.has_unconfirmed_length();
        if self.routers.is_none() || !is_open {
            self.routers = self.route.current().and_then(|route| route.routers).or(Some(routers));
        }
        // Further observations of it confirm the change, and need no further trace.
        if is_open && !was_open && self.burst.is_none() {
            self.trigger(Trigger::Length);
        }
        update
    }

    /// A probe was not answered in time.
    pub(in crate::trace) fn unanswered(&mut self, ttl: u8) {
        if self.is_to_destination(ttl) {
            self.destination.unanswered();
        } else {
            self.hop_mut(ttl).unanswered();
        }
    }
}
