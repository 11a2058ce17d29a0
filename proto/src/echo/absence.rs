//! Announced absence of the peer.

use std::time::Duration;

use crate::time::Timestamp;

/// An announced absence of the peer. It begins with a goodbye and ends when the peer answers something that
/// was sent after the goodbye, or after [`Absence::LASTS`].
///
/// A datagram is excused according to the time at which it was sent, not at which it is given up: the peer is
/// usually back by then.
#[derive(Debug, Clone, Copy)]
pub(super) struct Absence {
    announced: Timestamp,
    /// Send time of the first datagram that the peer answered after the goodbye.
    back: Option<Timestamp>,
}

impl Absence {
    /// Maximum length of an absence. Chosen: a restart takes seconds, a reboot a minute.
    pub(super) const LASTS: Duration = Duration::from_secs(60);

    /// The absence after a goodbye at `at`. If `before` still lasts, it continues.
    pub(super) fn begin(at: Timestamp, before: Option<Self>) -> Self {
        let announced = before.filter(|before| before.lasts(at)).map_or(at, |before| before.announced);
        Self { announced, back: None }
    }

    /// Whether the goodbye came before `at`.
    pub(super) fn began_before(&self, at: Timestamp) -> bool {
        self.announced < at
    }

    /// Records that a datagram sent at `sent` was answered.
    pub(super) fn answered(&mut self, sent: Timestamp) {
        if sent > self.announced && self.back.is_none() {
            self.back = Some(sent);
        }
    }

    /// Whether the peer is still absent.
    pub(super) fn lasts(&self, now: Timestamp) -> bool {
        self.back.is_none() && now < self.announced + Self::LASTS
    }

    /// Whether a datagram sent at `sent` that would be lost is excused: it was in flight at the goodbye, or
    /// it was sent before the peer was back.
    pub(super) fn excuses(&self, sent: Timestamp, lost_after: Duration) -> bool {
        let end = self.back.unwrap_or(self.announced + Self::LASTS);
        sent + lost_after > self.announced && sent < end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absence_excuses_datagrams_in_flight_and_those_sent_until_the_peer_is_back() {
        let at = |seconds: u64| Timestamp::from_nanos(seconds * 1_000_000_000);
        let lost_after = Duration::from_secs(3);
        let mut absence = Absence::begin(at(100), None);
        absence.answered(at(99));
        assert!(absence.lasts(at(101)), "an answer to an earlier datagram does not end it");
        absence.answered(at(110));
        absence.answered(at(111));
        assert!(!absence.lasts(at(111)));
        let excused: Vec<u64> = (90..120).filter(|s| absence.excuses(at(*s), lost_after)).collect();
        assert_eq!(excused, (98..110).collect::<Vec<u64>>());
        let unended = Absence::begin(at(100), None);
        assert!(unended.excuses(at(159), lost_after) && !unended.excuses(at(160), lost_after));
        let again = Absence::begin(at(130), Some(unended));
        assert!(again.excuses(at(101), lost_after), "the peer was not back in between");
    }

    #[test]
    fn absence_lasts_a_minute_and_covers_datagrams_in_flight() {
        let at = |seconds: u64| Timestamp::from_nanos(seconds * 1_000_000_000);
        let (lost_after, nanosecond) = (Duration::from_secs(3), Duration::from_nanos(1));
        let mut absence = Absence::begin(at(100), None);
        assert!(!absence.began_before(at(100)) && absence.began_before(at(100) + nanosecond));
        assert!(absence.lasts(at(160) - nanosecond) && !absence.lasts(at(160)));
        assert!(!absence.excuses(at(97), lost_after), "it would have been lost before the goodbye");
        assert!(absence.excuses(at(97) + nanosecond, lost_after));
        absence.answered(at(100));
        assert!(absence.lasts(at(101)), "it was sent at the time of the goodbye");
        absence.answered(at(100) + nanosecond);
        assert!(!absence.lasts(at(101)));
        assert!(absence.excuses(at(100), lost_after) && !absence.excuses(at(100) + nanosecond, lost_after));
        // A second goodbye after the peer was back, or a minute later, begins a new absence.
        for before in [absence, Absence::begin(at(10), None)] {
            let again = Absence::begin(at(105), Some(before));
            assert!(!again.excuses(at(102), lost_after) && again.excuses(at(164), lost_after));
        }
    }
}
