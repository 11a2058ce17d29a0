//! The paths and the threads that measure them.

use std::sync::PoisonError;

use pathmeter_proto::prefix::Prefix;
use tracing::debug;

use crate::clock::Clock;
use crate::config::trace::TraceRules;
use crate::fleet::{Fleet, PlanInputs};
use crate::probe::Loops;

/// The paths and their threads.
#[derive(Debug)]
pub(super) struct Measuring {
    pub(super) fleet: Fleet,
    pub(super) loops: Loops,
}

impl Measuring {
    /// Starts, replaces and stops paths, so that exactly the desired ones run.
    pub(super) fn apply(&mut self, inputs: &PlanInputs<'_>) {
        let Self { fleet, loops } = self;
        fleet.apply(inputs, loops);
    }

    /// Limits how fast routers are probed from the next probe on.
    pub(super) fn set_trace_limits(&self, limits: TraceRules) {
        let mut budget = self.loops.probe_budget.lock().unwrap_or_else(PoisonError::into_inner);
        budget.set_limits(limits.probe_limits(), Clock::now());
    }

    /// Requests a trace of each traced path to a peer or target. Returns the number of paths.
    pub(super) fn request_traces(&self, target: &str) -> usize {
        self.fleet.request_traces(target, &self.loops)
    }

    /// Requests a trace of each traced path to a peer, because the peer reports that a route of its own has
    /// changed.
    pub(super) fn peer_routes_changed(&self, peer: &str) {
        let paths = self.fleet.peer_routes_changed(peer, &self.loops);
        debug!(peer, paths, "routes of peer have changed");
    }

    /// Requests a trace of each traced path to these destinations, because this host's routes have changed.
    pub(super) fn local_routes_changed(&self, destinations: &[Prefix]) {
        let paths = self.fleet.local_routes_changed(destinations, &self.loops);
        debug!(destinations = destinations.len(), paths, "routes of this host have changed");
    }

    /// Handles the goodbye of a peer. Returns the number of paths to it.
    pub(super) fn peer_leaving(&mut self, peer: &str) -> usize {
        self.fleet.peer_leaving(peer, Clock::now(), &self.loops)
    }
}
