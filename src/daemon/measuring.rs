//! The paths that are measured, and the threads that measure them.

use crate::clock::Clock;
use crate::fleet::{Fleet, Loops, Scene};

/// The paths and their threads.
#[derive(Debug)]
pub(super) struct Measuring {
    pub(super) fleet: Fleet,
    pub(super) loops: Loops,
}

impl Measuring {
    /// Starts, replaces and ends paths until they are those that `scene` wants.
    pub(super) fn apply(&mut self, scene: &Scene<'_>) {
        let Self { fleet, loops } = self;
        fleet.apply(scene, loops);
    }

    /// Notes that a peer is leaving; returns how many paths lead to it.
    pub(super) fn goodbye(&mut self, peer: &str) -> usize {
        self.fleet.goodbye(peer, Clock::now(), &self.loops)
    }
}
