//! The link from a measuring path to the path that follows it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pathmeter_proto::echo::EchoReport;
use pathmeter_proto::trace::{EchoWatch, Finding, Trigger};

use crate::paths::PathId;

/// Passes what the echoes of a path show to the path that traces them. Both run on the same loop.
#[derive(Debug, Default)]
pub struct Followed {
    watch: Mutex<EchoWatch>,
    /// The [`PathId`] of the follower; 0: none.
    follower: AtomicU64,
}

impl Followed {
    /// Sets the path that follows.
    pub fn set_follower(&self, id: PathId) {
        self.follower.store(id.0, Relaxed);
    }

    /// Takes a report of the echoes. Returns the path to wake, if it must act on what they show.
    #[must_use]
    pub fn record(&self, report: &EchoReport) -> Option<PathId> {
        let has_findings = self.watch().record(report);
        let follower = self.follower.load(Relaxed);
        (has_findings && follower != 0).then_some(PathId(follower))
    }

    /// Requests a trace of all flows.
    #[must_use]
    pub fn trigger(&self, trigger: Trigger) -> Option<PathId> {
        self.watch().trigger(trigger);
        let follower = self.follower.load(Relaxed);
        (follower != 0).then_some(PathId(follower))
    }

    /// Takes the oldest finding.
    pub fn take(&self) -> Option<Finding> {
        self.watch().take()
    }

    fn watch(&self) -> MutexGuard<'_, EchoWatch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
