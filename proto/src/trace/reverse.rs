//! Traces of the way back.
//!
//! The answers of routers arrive at the responder. A request with a full TTL fetches them, after they had
//! time to arrive.

use super::burst::SPACING;
use super::flow::TracedFlow;
use crate::time::Timestamp;
use crate::wire::ReverseTrace;

/// A flow on the way back, and when its answers are fetched from the responder.
#[derive(Debug)]
pub(super) struct ReverseFlow {
    pub(super) traced: TracedFlow,
    /// When the next answers are fetched; [`Timestamp::NEVER`] if all are known.
    fetch_at: Timestamp,
    /// How often they were fetched since the last probe.
    rounds: u8,
    /// Requests of this round that are still to be sent.
    left: usize,
}

/// How often answers are fetched. The second time is for answers that came late, and for lost requests.
const ROUNDS_MAX: u8 = 2;

impl ReverseFlow {
    pub(super) fn new(traced: TracedFlow) -> Self {
        Self { traced, fetch_at: Timestamp::NEVER, rounds: 0, left: 0 }
    }

    /// A probe is sent at `now`.
    pub(super) fn fetch_after(&mut self, now: Timestamp) {
        self.fetch_at = now + self.traced.answer_timeout() / 2;
        (self.rounds, self.left) = (0, 0);
    }

    /// Whether to send a request now that fetches answers, if `waiting` probes are not answered yet.
    ///
    /// # Errors
    /// When to ask again.
    pub(super) fn fetch(&mut self, waiting: usize, now: Timestamp) -> Result<(), Timestamp> {
        if self.fetch_at > now {
            return Err(self.fetch_at);
        }
        if self.left == 0 {
            self.rounds += 1;
            self.left = waiting.div_ceil(ReverseTrace::ANSWERS);
        }
        if self.left == 0 {
            self.fetch_at = Timestamp::NEVER;
            return Err(Timestamp::NEVER);
        }
        self.left -= 1;
        self.fetch_at = match (self.left, self.rounds) {
            (1.., _) => now + SPACING,
            (0, ROUNDS_MAX) => Timestamp::NEVER,
            (0, _) => now + self.traced.answer_timeout() / 2,
        };
        Ok(())
    }
}
