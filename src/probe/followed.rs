//! The link from a measuring path to the path that follows it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pathmeter_proto::echo::EchoReport;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{EchoSummary, EchoWatch, Finding, Trigger};

use crate::clock::Clock;
use crate::paths::PathId;
use crate::stream::SharedConnection;

/// Passes what the echoes of a path show to the path that traces them. Both run on the same loop. Every path
/// has one, so that a follower comes and goes without a restart of the path that it follows; nothing is kept
/// while there is no follower.
#[derive(Debug, Default)]
pub struct Followed {
    watch: Mutex<EchoWatch>,
    /// The [`PathId`] of the follower; 0: none.
    follower: AtomicU64,
    /// The connection of the path that is followed, if it has one.
    connection: Arc<SharedConnection>,
}

impl Followed {
    /// Sets the path that follows.
    pub fn set_follower(&self, id: PathId) {
        self.follower.store(id.0, Relaxed);
    }

    /// The path `id` has ended. No effect if another one follows.
    pub fn unfollow(&self, id: PathId) {
        if self.follower.compare_exchange(id.0, 0, Relaxed, Relaxed).is_ok() {
            *self.watch() = EchoWatch::default();
        }
    }

    fn follower(&self) -> Option<PathId> {
        Some(self.follower.load(Relaxed)).filter(|id| *id != 0).map(PathId)
    }

    /// Takes a report of the echoes. Returns the path to wake, if it must act on what they show.
    #[must_use]
    pub fn record(&self, report: &EchoReport) -> Option<PathId> {
        let follower = self.follower()?;
        self.watch().record(report, Clock::now()).then_some(follower)
    }

    /// Requests a trace of all flows. Returns the path to wake; `None`: no path follows.
    pub fn trigger(&self, trigger: Trigger) -> Option<PathId> {
        let follower = self.follower()?;
        self.watch().trigger(trigger);
        Some(follower)
    }

    /// Takes something else about the echoes' flow that the follower must know. It finds it within a second.
    pub fn add(&self, finding: Finding) {
        self.watch().add(finding);
    }

    /// The connection of the path that is followed.
    #[must_use]
    pub fn connection(&self) -> &Arc<SharedConnection> {
        &self.connection
    }

    /// The echoes of a flow in a span of time, as far back as they are kept.
    #[must_use]
    pub fn echoes(&self, flow: u8, from: Timestamp, to: Timestamp) -> EchoSummary {
        self.watch().echoes(flow, from, to)
    }

    /// Takes the oldest finding.
    pub fn take(&self) -> Option<Finding> {
        self.watch().take()
    }

    fn watch(&self) -> MutexGuard<'_, EchoWatch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
