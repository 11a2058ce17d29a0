//! The paths that are measured, and the threads that measure them.

use crate::clock::Clock;
use crate::fleet::{Fleet, PlanInputs};
use crate::probe::Loops;

/// The paths and their threads.
#[derive(Debug)]
pub(super) struct Measuring {
    pub(super) fleet: Fleet,
    pub(super) loops: Loops,
}

impl Measuring {
    /// Starts, replaces and ends paths until those run that the inputs ask for.
    pub(super) fn apply(&mut self, inputs: &PlanInputs<'_>) {
        let Self { fleet, loops } = self;
        fleet.apply(inputs, loops);
    }

    /// Notes that a peer is leaving; returns how many paths lead to it.
    pub(super) fn peer_leaving(&mut self, peer: &str) -> usize {
        self.fleet.peer_leaving(peer, Clock::now(), &self.loops)
    }
}
