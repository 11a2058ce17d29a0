//! Work that changes have made necessary and that is done a little later, once for all of them.

use std::time::Duration;

use tokio::time::Instant;

/// What has to be updated, and when. Results and events come in thousands and are handled together.
#[derive(Debug, Default)]
pub(super) struct PendingWork {
    /// Members or their names have changed.
    pub(super) rebuild_roster: bool,
    /// Addresses or zones have changed: the paths may have to.
    pub(super) measure: bool,
    /// Something that metrics or the status show has changed.
    pub(super) publish: bool,
    /// When to do it; `None`: there is nothing to do.
    pub(super) by: Option<Instant>,
}

/// How long changes are collected.
const COLLECT: Duration = Duration::from_millis(50);

impl PendingWork {
    /// Notes a change, which is handled within 50 ms.
    pub(super) fn note(&mut self, what: impl FnOnce(&mut Self)) {
        self.note_within(COLLECT, what);
    }

    /// The same for changes that come in bursts of about `span`.
    pub(super) fn note_within(&mut self, span: Duration, what: impl FnOnce(&mut Self)) {
        what(self);
        self.by.get_or_insert_with(|| Instant::now() + span);
    }
}
