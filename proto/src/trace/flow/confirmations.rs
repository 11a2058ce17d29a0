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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(microseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + microseconds * 1_000)
    }

    const WAIT: Duration = Duration::from_millis(30);

    #[test]
    fn batch_is_sent_0_2_ms_apart_and_the_next_one_after_the_wait_for_answers() {
        let mut confirmations = Confirmations::new(at(0));
        let mut next = |time: u64, batch: &[u8]| confirmations.next(at(time), WAIT, || batch.to_vec());
        assert_eq!(next(0, &[2, 5]), Ok(2));
        assert_eq!(next(0, &[]), Err(at(200)));
        assert_eq!(next(200, &[]), Ok(5));
        assert_eq!(next(200, &[]), Err(at(30_200)));
        assert_eq!(next(30_200, &[2]), Ok(2));
        assert_eq!(next(60_200, &[]), Err(Timestamp::NEVER));
    }

    #[test]
    fn rest_of_a_batch_is_not_sent_if_there_is_nothing_to_confirm() {
        let mut confirmations = Confirmations::new(at(0));
        assert_eq!(confirmations.next(at(0), WAIT, || vec![2, 3]), Ok(2));
        confirmations.clear();
        assert_eq!(confirmations.next(at(1_000), WAIT, || vec![7]), Ok(7), "of the next change");
    }
}
