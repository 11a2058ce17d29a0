//! Collects changes, so that the work that they make necessary is done once for many changes.

use std::time::Duration;

use tokio::time::Instant;

/// What has to be updated, and when. There can be thousands of results and events at a time.
#[derive(Debug, Default)]
pub(super) struct PendingWork {
    /// Members or their names have changed: compute the roster again.
    pub(super) rebuild_roster: bool,
    /// Addresses or zones have changed: update the paths.
    pub(super) update_paths: bool,
    /// Something that metrics or the status show has changed: publish them.
    pub(super) publish: bool,
    /// The deadline; `None`: there is nothing to do.
    pub(super) deadline: Option<Instant>,
}

/// The period over which changes are collected.
const COLLECT: Duration = Duration::from_millis(50);

impl PendingWork {
    /// Records a change, which is handled within 50 ms.
    pub(super) fn add(&mut self, change: impl FnOnce(&mut Self)) {
        self.add_within(COLLECT, change);
    }

    /// Like [`add`](Self::add), for changes that come in bursts of about `span`.
    pub(super) fn add_within(&mut self, span: Duration, change: impl FnOnce(&mut Self)) {
        change(self);
        self.deadline.get_or_insert_with(|| Instant::now() + span);
    }
}
