//! When the peer was away, by its own word.

use std::time::Duration;

use crate::time::Timestamp;

/// An announced absence: from a goodbye until something that was sent after it is answered, or for a minute.
///
/// It excuses datagrams by when they were sent, not by when they are given up: the peer is mostly back by then.
#[derive(Debug, Clone, Copy)]
pub(super) struct Absence {
    said: Timestamp,
    /// When the first datagram was sent that the peer answered afterwards.
    back: Option<Timestamp>,
}

impl Absence {
    /// A goodbye excuses a peer for this long. Chosen: a restart takes seconds, a reboot a minute.
    pub(super) const LASTS: Duration = Duration::from_secs(60);

    /// The peer said goodbye at `at`, perhaps while it was away already.
    pub(super) fn begin(at: Timestamp, before: Option<Self>) -> Self {
        let said = before.filter(|before| before.lasts(at)).map_or(at, |before| before.said);
        Self { said, back: None }
    }

    /// Whether the peer had said goodbye by then.
    pub(super) fn began_before(&self, at: Timestamp) -> bool {
        self.said < at
    }

    /// A datagram that was sent at `sent` was answered.
    pub(super) fn answered(&mut self, sent: Timestamp) {
        if sent > self.said && self.back.is_none() {
            self.back = Some(sent);
        }
    }

    /// Whether the peer is still away.
    pub(super) fn lasts(&self, now: Timestamp) -> bool {
        self.back.is_none() && now < self.said + Self::LASTS
    }

    /// Whether a datagram that was sent at `sent`, and would be lost, is excused: it was in flight at the goodbye, or was
    /// sent before the peer was back.
    pub(super) fn excuses(&self, sent: Timestamp, lost_after: Duration) -> bool {
        let end = self.back.unwrap_or(self.said + Self::LASTS);
        sent + lost_after > self.said && sent < end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absence_excuses_what_was_in_flight_and_what_was_sent_until_the_peer_was_back() {
        let at = |seconds: u64| Timestamp::from_nanos(seconds * 1_000_000_000);
        let lost_after = Duration::from_secs(3);
        let mut absence = Absence::begin(at(100), None);
        absence.answered(at(99));
        assert!(absence.lasts(at(101)), "an answer to what was sent before is no return");
        absence.answered(at(110));
        absence.answered(at(111));
        assert!(!absence.lasts(at(111)));
        let excused: Vec<u64> = (90..120).filter(|s| absence.excuses(at(*s), lost_after)).collect();
        assert_eq!(excused, (98..110).collect::<Vec<u64>>());
        let endless = Absence::begin(at(100), None);
        assert!(endless.excuses(at(159), lost_after) && !endless.excuses(at(160), lost_after));
        let again = Absence::begin(at(130), Some(endless));
        assert!(again.excuses(at(101), lost_after), "it never came back in between");
    }

    #[test]
    fn absence_lasts_a_minute_and_begins_with_what_was_in_flight() {
        let at = |seconds: u64| Timestamp::from_nanos(seconds * 1_000_000_000);
        let (lost_after, nanosecond) = (Duration::from_secs(3), Duration::from_nanos(1));
        let mut absence = Absence::begin(at(100), None);
        assert!(!absence.began_before(at(100)) && absence.began_before(at(100) + nanosecond));
        assert!(absence.lasts(at(160) - nanosecond) && !absence.lasts(at(160)));
        assert!(!absence.excuses(at(97), lost_after), "it would have been lost before the goodbye");
        assert!(absence.excuses(at(97) + nanosecond, lost_after));
        absence.answered(at(100));
        assert!(absence.lasts(at(101)), "what was sent in the moment of the goodbye");
        absence.answered(at(100) + nanosecond);
        assert!(!absence.lasts(at(101)));
        assert!(absence.excuses(at(100), lost_after) && !absence.excuses(at(100) + nanosecond, lost_after));
        // Another goodbye after the peer was back, or a minute later, is an absence of its own.
        for before in [absence, Absence::begin(at(10), None)] {
            let again = Absence::begin(at(105), Some(before));
            assert!(!again.excuses(at(102), lost_after) && again.excuses(at(164), lost_after));
        }
    }
}
