//! Traces of the way back.
//!
//! The answers of routers arrive at the responder. A request with a full TTL asks for them, after they had
//! time to arrive.

use super::burst::SPACING;
use super::flow::TracedFlow;
use crate::time::Timestamp;

/// A flow on the way back, and when its answers are fetched from the responder.
#[derive(Debug)]
pub(super) struct ReverseFlow {
    pub(super) traced: TracedFlow,
    /// When answers are fetched next; [`Timestamp::NEVER`] if no probe waits for one.
    fetch_at: Timestamp,
    /// How often they were fetched since the last probe.
    rounds: u8,
    /// The answers to probes before this sequence number were fetched in this round.
    pub(super) fetched: u64,
}

/// What a fetch is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fetch {
    /// Ask for the answers to the next probes of this round.
    Send,
    /// Wait until this time.
    Wait(Timestamp),
}

/// How often answers are fetched. The second time is for answers that came late, and for lost requests.
const ROUNDS_MAX: u8 = 2;

impl ReverseFlow {
    pub(super) fn new(traced: TracedFlow) -> Self {
        Self { traced, fetch_at: Timestamp::NEVER, rounds: 0, fetched: 0 }
    }

    /// A probe is sent at `now`. A fetch that is due earlier stays, and a further one follows.
    pub(super) fn fetch_after(&mut self, now: Timestamp) {
        self.fetch_at = self.fetch_at.min(now + self.traced.answer_timeout() / 2);
        self.rounds = 0;
    }

    /// Whether to fetch now. `has_next`: whether a probe from [`fetched`](Self::fetched) on waits for its
    /// answer.
    pub(super) fn fetch(&mut self, has_next: bool, now: Timestamp) -> Fetch {
        if self.fetch_at > now {
            return Fetch::Wait(self.fetch_at);
        }
        if has_next {
            self.fetch_at = now + SPACING;
            return Fetch::Send;
        }
        self.rounds += 1;
        self.fetched = 0;
        self.fetch_at = match self.rounds {
            0..ROUNDS_MAX => now + self.traced.answer_timeout() / 2,
            _ => Timestamp::NEVER,
        };
        Fetch::Wait(self.fetch_at)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Direction, ProbeProtocol};
    use super::*;

    fn at(microseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + microseconds * 1_000)
    }

    const MS: u64 = 1_000;

    /// A flow whose answers are waited for 110 ms.
    fn flow() -> ReverseFlow {
        let mut traced =
            TracedFlow::new(0, Direction::Reverse, ProbeProtocol::Udp, 30, Duration::from_secs(30), 1, at(0));
        traced.learn_destination(5, Duration::from_millis(20));
        assert_eq!(traced.answer_timeout(), Duration::from_millis(110));
        ReverseFlow::new(traced)
    }

    /// The times of fetches while `waiting` probes wait, three of which are fetched at a time.
    fn fetches(flow: &mut ReverseFlow, waiting: u64, from: Timestamp, until: Timestamp) -> Vec<Timestamp> {
        let (mut time, mut found) = (from, Vec::new());
        loop {
            match flow.fetch(flow.fetched < waiting, time) {
                Fetch::Send => {
                    flow.fetched += 3;
                    found.push(time);
                }
                Fetch::Wait(next) if next > until => return found,
                Fetch::Wait(next) => time = next,
            }
        }
    }

    #[test]
    fn answers_are_fetched_after_half_of_the_wait_and_after_all_of_it() {
        let mut flow = flow();
        assert_eq!(flow.fetch(true, at(0)), Fetch::Wait(Timestamp::NEVER), "no probe was sent");
        flow.fetch_after(at(0));
        let expected = [55 * MS, 55 * MS + 200 + 55 * MS].map(at);
        assert_eq!(fetches(&mut flow, 1, at(0), at(1_000 * MS)), expected);
        flow.fetch_after(at(2_000 * MS));
        assert_eq!(fetches(&mut flow, 1, at(2_000 * MS), at(3_000 * MS)).len(), 2, "a further probe");
    }

    #[test]
    fn each_round_asks_for_all_that_wait() {
        let mut flow = flow();
        flow.fetch_after(at(0));
        let second = 55 * MS + 600 + 55 * MS;
        let expected = [55 * MS, 55 * MS + 200, 55 * MS + 400, second, second + 200, second + 400].map(at);
        assert_eq!(fetches(&mut flow, 7, at(0), at(1_000 * MS)), expected);
    }

    #[test]
    fn further_probes_do_not_postpone_a_fetch() {
        let mut flow = flow();
        let mut found = Vec::new();
        for probe in 0..100 {
            let now = at(probe * 10 * MS);
            flow.fetch_after(now);
            found.extend(fetches(&mut flow, 1, now, at((probe + 1) * 10 * MS)));
        }
        assert!((15..=20).contains(&found.len()), "one in 55 ms: {found:?}");
    }

    #[test]
    fn nothing_is_fetched_if_all_answers_are_known() {
        let mut flow = flow();
        flow.fetch_after(at(0));
        assert_eq!(fetches(&mut flow, 0, at(0), at(1_000 * MS)), []);
    }
}
