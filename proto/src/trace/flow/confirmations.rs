//! Probes that confirm or refute a change of the route.

use std::collections::VecDeque;
use std::time::Duration;

use crate::time::Timestamp;
use crate::trace::burst::SPACING;

/// The probes of a flow that confirm or refute an observed change, in batches.
#[derive(Debug)]
pub(super) struct Confirmations {
    /// When the next probe is due.
    at: Timestamp,
    /// The TTLs of the batch that were not probed yet.
    waiting: VecDeque<u8>,
}

impl Confirmations {
    pub(super) fn new(at: Timestamp) -> Self {
        Self { at, waiting: VecDeque::new() }
    }

    /// There is nothing to confirm.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// The TTL of the next probe, or when it is due. `batch` has the TTLs to probe when all of the batch
    /// before were sent; the next batch follows after `answer_timeout`.
    pub(super) fn next(
        &mut self,
        now: Timestamp,
        answer_timeout: Duration,
        batch: impl FnOnce() -> Vec<u8>,
    ) -> Result<u8, Timestamp> {
        if self.at > now {
            return Err(self.at);
        }
        if self.waiting.is_empty() {
            self.waiting.extend(batch());
        }
        let Some(ttl) = self.waiting.pop_front() else { return Err(Timestamp::NEVER) };
        self.at = now + if self.waiting.is_empty() { answer_timeout } else { SPACING };
        Ok(ttl)
    }
}
