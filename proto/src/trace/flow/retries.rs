//! Hops that are probed again between the traces of a flow.

use std::collections::VecDeque;
use std::time::Duration;

use crate::time::Timestamp;

/// The hops that did not answer a trace, and those whose router may be asked only later.
#[derive(Debug, Default)]
pub(in crate::trace) struct Retries(VecDeque<Retry>);

/// A hop to probe again.
#[derive(Debug, Clone, Copy)]
struct Retry {
    ttl: u8,
    left: u8,
    at: Timestamp,
    /// Whether a token was reserved for that time.
    is_reserved: bool,
}

/// Further probes of a hop that did not answer in a trace.
const RETRIES_MAX: u8 = 2;

/// Time between two probes of a hop that did not answer: routers that limit their answers to one per second
/// answer the second.
const RETRY_SPACING: Duration = Duration::from_millis(1_100);

impl Retries {
    /// A hop did not answer a trace, which is complete.
    pub(in crate::trace) fn add(&mut self, ttl: u8, now: Timestamp) {
        let at = now + RETRY_SPACING;
        self.0.push_back(Retry { ttl, left: RETRIES_MAX, at, is_reserved: false });
    }

    /// A token was reserved for a later time: the hop is left out of the trace, and probed then.
    pub(in crate::trace) fn reserve(&mut self, ttl: u8, at: Timestamp) {
        match self.0.iter_mut().find(|retry| retry.ttl == ttl) {
            Some(retry) => *retry = Retry { at, is_reserved: true, ..*retry },
            None => self.0.push_back(Retry { ttl, left: 1, at, is_reserved: true }),
        }
    }

    /// The next hop to probe, and whether a token was reserved for it; or when the next one is due.
    pub(in crate::trace) fn next(&mut self, now: Timestamp) -> Result<(u8, bool), Timestamp> {
        let Some(index) = (0..self.0.len()).min_by_key(|index| self.0[*index].at) else {
            return Err(Timestamp::NEVER);
        };
        let retry = &mut self.0[index];
        if retry.at > now {
            return Err(retry.at);
        }
        let due = *retry;
        *retry = Retry { left: due.left - 1, at: now + RETRY_SPACING, is_reserved: false, ..due };
        if retry.left == 0 {
            self.0.remove(index);
        }
        Ok((due.ttl, due.is_reserved))
    }

    /// A router answered at this hop. What was reserved is used all the same.
    pub(in crate::trace) fn answered(&mut self, ttl: u8) {
        self.0.retain(|retry| retry.ttl != ttl || retry.is_reserved);
    }

    /// A trace begins, which probes all hops but those for which a token is reserved.
    pub(in crate::trace) fn trace_began(&mut self) {
        self.0.retain(|retry| retry.is_reserved);
    }

    /// Probes no hop again.
    pub(in crate::trace) fn clear(&mut self) {
        self.0.clear();
    }

    /// Whether a token is reserved for a hop.
    pub(in crate::trace) fn is_reserved(&self, ttl: u8) -> bool {
        self.0.iter().any(|retry| retry.ttl == ttl && retry.is_reserved)
    }

    /// Whether a token is reserved for any hop.
    pub(in crate::trace) fn has_reserved(&self) -> bool {
        self.0.iter().any(|retry| retry.is_reserved)
    }

    /// Reserved times are no longer valid: reserves again at once.
    pub(in crate::trace) fn cancel_reserved(&mut self, now: Timestamp) {
        for retry in self.0.iter_mut().filter(|retry| retry.is_reserved) {
            (retry.at, retry.is_reserved) = (now, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
    }

    #[test]
    fn hop_is_probed_twice_again_unless_it_answers_or_a_trace_begins() {
        let mut retries = Retries::default();
        assert_eq!(retries.next(at(0)), Err(Timestamp::NEVER));
        for ttl in [2, 3] {
            retries.add(ttl, at(0));
        }
        assert_eq!(retries.next(at(1_099)), Err(at(1_100)));
        assert_eq!(retries.next(at(1_100)), Ok((2, false)));
        retries.answered(3);
        assert_eq!(retries.next(at(1_100)), Err(at(2_200)));
        assert_eq!(retries.next(at(2_200)), Ok((2, false)));
        assert_eq!(retries.next(at(9_000)), Err(Timestamp::NEVER));
        retries.add(2, at(9_000));
        retries.trace_began();
        assert_eq!(retries.next(at(20_000)), Err(Timestamp::NEVER));
    }

    #[test]
    fn reserved_probe_is_sent_whatever_happens_before() {
        let mut retries = Retries::default();
        retries.add(2, at(0));
        retries.reserve(2, at(5_000));
        retries.reserve(4, at(6_000));
        retries.answered(2);
        retries.trace_began();
        assert!(retries.is_reserved(2) && retries.is_reserved(4) && !retries.is_reserved(3));
        assert_eq!(retries.next(at(4_999)), Err(at(5_000)), "not when it would have been probed again");
        assert_eq!(retries.next(at(5_000)), Ok((2, true)));
        assert_eq!(retries.next(at(5_000)), Err(at(6_000)), "once again, later");
        retries.cancel_reserved(at(5_500));
        assert!(!retries.has_reserved());
        assert_eq!(retries.next(at(5_500)), Ok((4, false)));
        retries.clear();
        assert_eq!(retries.next(at(90_000)), Err(Timestamp::NEVER));
    }
}
