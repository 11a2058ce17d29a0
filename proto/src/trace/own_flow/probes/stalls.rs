//! Connections that have stalled after segments of a trace.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::time::Timestamp;
use crate::trace::CLAMPED_FOR;

/// Counts the connections of a path that have stalled after segments, and decides when no more are sent.
#[derive(Debug, Default)]
pub(super) struct Stalls {
    /// Connections in a row.
    count: u32,
    /// The TTLs of the segments after which the latest one has stalled, without those that another has
    /// survived since.
    suspected: BTreeSet<u8>,
    latest: Option<Timestamp>,
    /// Until when no segments are sent; `None`: they are.
    disabled_until: Option<Timestamp>,
    /// Whether that has yet to be reported.
    is_unreported: bool,
}

/// Connections in a row that stall after a segment before no more are sent. Chosen: 2, because one may have
/// stalled by chance.
const STALLS_MAX: u32 = 2;

/// A stall this long ago is forgotten. Chosen: an hour, in which every hop is probed at least once, and most
/// several times.
const STALL_AGE_MAX: Duration = Duration::from_secs(3_600);

impl Stalls {
    /// A connection has stalled after segments with these TTLs.
    pub(super) fn add(&mut self, ttls: &BTreeSet<u8>, at: Timestamp) {
        self.count += 1;
        self.suspected.clone_from(ttls);
        self.latest = Some(at);
        if self.count >= STALLS_MAX {
            let disabled_until = Some(at + CLAMPED_FOR);
            *self = Self { disabled_until, is_unreported: true, ..Self::default() };
        }
    }

    /// A connection has delivered data after segments with these TTLs. That says nothing about others: larger
    /// ones may be large enough for a device on the path, and smaller ones do not reach it.
    pub(super) fn survived(&mut self, ttls: &BTreeSet<u8>, at: Timestamp) {
        self.suspected.retain(|ttl| !ttls.contains(ttl));
        let is_old = self.latest.is_some_and(|latest| at.since(latest) > STALL_AGE_MAX);
        if self.suspected.is_empty() || is_old {
            self.count = 0;
        }
    }

    /// Whether no segments are sent.
    pub(super) fn is_disabled(&self, now: Timestamp) -> bool {
        self.disabled_until.is_some_and(|until| until > now)
    }

    /// Whether it has become so and was not reported yet. Returns `true` once.
    pub(super) fn take_report(&mut self) -> bool {
        std::mem::take(&mut self.is_unreported)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_nanos((1_000 + seconds) * 1_000_000_000)
    }

    fn ttls<const N: usize>(ttls: [u8; N]) -> BTreeSet<u8> {
        ttls.into()
    }

    #[test]
    fn two_stalls_in_a_row_disable_segments_for_a_day_and_are_reported_once() {
        let mut stalls = Stalls::default();
        stalls.add(&ttls([4]), at(0));
        assert!(!stalls.is_disabled(at(1)) && !stalls.take_report());
        stalls.add(&ttls([4]), at(10));
        assert!(stalls.take_report() && !stalls.take_report());
        assert!(stalls.is_disabled(at(10 + 86_399)) && !stalls.is_disabled(at(10 + 86_400)));
        stalls.add(&ttls([4]), at(90_000));
        assert!(!stalls.is_disabled(at(90_000)), "the row begins again");
    }

    #[test]
    fn only_segments_with_all_of_the_ttls_or_an_hour_end_the_row() {
        for (survived, after, is_ended) in [
            (vec![ttls([2, 3])], 1, true),
            (vec![ttls([3]), ttls([1, 2, 9])], 1, true),
            (vec![ttls([8, 9])], 1, false),
            (vec![ttls([1, 2])], 1, false),
            (vec![ttls([1])], 3_601, true),
        ] {
            let mut stalls = Stalls::default();
            stalls.add(&ttls([2, 3]), at(0));
            survived.iter().for_each(|ttls| stalls.survived(ttls, at(after)));
            stalls.add(&ttls([2]), at(after + 1));
            assert_eq!(stalls.is_disabled(at(after + 1)), !is_ended, "{survived:?} after {after} s");
        }
    }
}
