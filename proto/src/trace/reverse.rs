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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Direction;
    use super::*;

    fn at(microseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + microseconds * 1_000)
    }

    const MS: u64 = 1_000;

    /// A flow whose answers are waited for 110 ms.
    fn flow() -> ReverseFlow {
        let mut traced = TracedFlow::new(0, Direction::Reverse, 30, Duration::from_secs(30), 1, at(0));
        traced.learn_destination(5, Duration::from_millis(20));
        assert_eq!(traced.answer_timeout(), Duration::from_millis(110));
        ReverseFlow::new(traced)
    }

    #[test]
    fn answers_are_fetched_after_half_of_the_wait_and_after_all_of_it() {
        let mut flow = flow();
        assert_eq!(flow.fetch(1, at(0)), Err(Timestamp::NEVER), "no probe was sent");
        flow.fetch_after(at(0));
        assert_eq!(flow.fetch(1, at(0)), Err(at(55 * MS)));
        assert_eq!(flow.fetch(1, at(55 * MS)), Ok(()));
        assert_eq!(flow.fetch(1, at(55 * MS)), Err(at(110 * MS)));
        assert_eq!(flow.fetch(1, at(110 * MS)), Ok(()));
        assert_eq!(flow.fetch(1, at(110 * MS)), Err(Timestamp::NEVER));
        flow.fetch_after(at(200 * MS));
        assert_eq!(flow.fetch(1, at(255 * MS)), Ok(()), "a further probe");
        assert_eq!(flow.fetch(1, at(255 * MS)), Err(at(310 * MS)));
    }

    #[test]
    fn each_request_fetches_three_answers() {
        let mut flow = flow();
        flow.fetch_after(at(0));
        let mut time = at(0);
        let mut fetched = Vec::new();
        loop {
            match flow.fetch(7, time) {
                Ok(()) => fetched.push(time),
                Err(Timestamp::NEVER) => break,
                Err(next) => time = next,
            }
        }
        let second = 55 * MS + 400 + 55 * MS;
        let expected = [55 * MS, 55 * MS + 200, 55 * MS + 400, second, second + 200, second + 400].map(at);
        assert_eq!(fetched, expected);
    }

    #[test]
    fn nothing_is_fetched_if_all_answers_are_known() {
        let mut flow = flow();
        flow.fetch_after(at(0));
        assert_eq!(flow.fetch(0, at(55 * MS)), Err(Timestamp::NEVER));
        assert_eq!(flow.fetch(1, at(200 * MS)), Err(Timestamp::NEVER));
    }
}
