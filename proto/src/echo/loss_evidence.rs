//! What was heard from the responder about one flow, and what that proves.

use std::time::Duration;

use super::flow::{Flow, RequestForm, VerdictRules};
use crate::machine::HostDrops;
use crate::time::Timestamp;
use crate::wire::PeerTimestamp;
use crate::wire::tlv::{FollowUp, SessionRecord};

/// What was heard from the responder about one flow.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LossEvidence {
    /// Ours: the first sequence number of its record, and when that was sent, or later.
    record: Option<(u32, Timestamp)>,
    /// Foreign: the last reply in order, as sequence number and the reflector's own.
    last: Option<(u64, u32)>,
    /// Foreign: whether its sequence numbers are its own.
    is_stateful: bool,
    /// Foreign: until when its count is doubted, because a request was seen to arrive twice or behind a later one.
    doubted: Option<Timestamp>,
    /// T3 of recent replies, by the reflector's sequence number.
    left: [Option<(u32, PeerTimestamp)>; LEFT],
    /// The last follow-up that was used.
    followed: Option<u32>,
}

/// Replies whose T3 is remembered for a follow-up. Chosen: a follow-up normally comes with the next reply.
const LEFT: usize = 2;

/// The datagram whose reply is looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct AnsweredRequest {
    pub(super) sequence: u64,
    pub(super) sent: Timestamp,
    /// When its reply came.
    pub(super) heard: Timestamp,
}

/// A path that was seen to duplicate or to reorder requests is expected to do so again for this long. Chosen: 10 minutes.
const DOUBT_LASTS: Duration = Duration::from_secs(600);

/// What the responder's host dropped, as its reports on any flow of the path tell: one count, for all its sockets and all
/// who ask it.
#[derive(Debug, Default)]
pub(super) struct ResponderDrops {
    pub(super) ledger: HostDrops,
    /// When the last report was asked for, and the count it told.
    last: Option<(Timestamp, u32)>,
}

impl ResponderDrops {
    /// Takes the count from a reply that came at `heard` to a datagram that was sent at `asked`.
    pub(super) fn learn(&mut self, asked: Timestamp, heard: Timestamp, count: u32, rules: &VerdictRules) {
        if self.last.is_some_and(|(last, _)| asked <= last) {
            return;
        }
        if let Some((last, known)) = self.last.replace((asked, count)) {
            let dropped = count.wrapping_sub(known);
            // A count that seems to have fallen is that of a responder that began again.
            if dropped < 1 << 31 {
                self.ledger.forget(last - rules.lost_after);
                self.ledger.add(0, last, heard, dropped);
            }
        }
    }
}

impl LossEvidence {
    /// One of ours tells what it has received.
    pub(super) fn learn_from_ours(
        &mut self,
        flow: &mut Flow,
        asked: &AnsweredRequest,
        session: &SessionRecord,
        rules: &VerdictRules,
    ) {
        let AnsweredRequest { sent: asked, .. } = *asked;
        if session.session != flow.session {
            return;
        }
        let (Some(highest), Some(first)) =
            (flow.extend(session.highest), flow.extend(session.count_or_first))
        else {
            return;
        };
        let began = match self.record {
            Some((known, began)) if known == session.count_or_first => began,
            // Long gone or never sent: this report was asked for no earlier.
            _ => flow.sent_at(first).unwrap_or(asked),
        };
        self.record = Some((session.count_or_first, began));
        let bitmap = session.bitmap;
        flow.learn(
            highest.saturating_sub(127)..=highest,
            RequestForm::WithSession,
            asked,
            rules,
            |sequence, sent| {
                let is_set = bitmap >> (highest - sequence) & 1 == 1;
                // A responder that forgot us began its record anew, perhaps with a datagram that others had overtaken: what
                // was sent soon after that one may have arrived before.
                (is_set || sent >= began + rules.horizon).then_some(is_set)
            },
        );
    }

    /// A stateful reflector numbers its replies: between two of them it received as many requests as its numbers
    /// advanced. All or none of those between gives each a direction; some of them does not. That it was all of them
    /// holds only while no request arrives twice, or behind a later one, for its number is then counted in the wrong
    /// place: where that was seen, it is not believed. The first time, if its reply is lost as well, is not seen.
    pub(super) fn learn_from_foreign(
        &mut self,
        flow: &mut Flow,
        asked: &AnsweredRequest,
        number: u32,
        rules: &VerdictRules,
    ) {
        let AnsweredRequest { sequence, sent: asked, heard } = *asked;
        #[expect(clippy::cast_possible_truncation, reason = "the wire carried the low half")]
        let is_copy = number == sequence as u32;
        self.is_stateful |= !is_copy;
        if let Some((last, last_number)) = self.last
            && sequence < last
        {
            if number.wrapping_sub(last_number) < 1 << 31 {
                self.doubted = Some(heard + DOUBT_LASTS);
            }
            return;
        }
        let is_doubted = self.doubted.is_some_and(|until| heard < until);
        if let Some((last, last_number)) = self.last
            && self.is_stateful
        {
            let (asked_since, answered_since) = (sequence - last, number.wrapping_sub(last_number));
            let arrived = match u64::from(answered_since) {
                1 => Some(false),
                answered if answered == asked_since && !is_doubted => Some(true),
                _ => None,
            };
            flow.learn(
                last + 1..=sequence.saturating_sub(1),
                RequestForm::WithoutSession,
                asked,
                rules,
                |_, _| arrived,
            );
        }
        self.last = Some((sequence, number));
    }

    /// The reply numbered `number` came again. A copy of a reply has its number; the reply to a copy of a request has its
    /// own.
    pub(super) fn heard_again(&mut self, number: u32, at: Timestamp) {
        if !self.left.iter().flatten().any(|(known, _)| *known == number) {
            self.doubted = Some(at + DOUBT_LASTS);
        }
    }

    /// Takes note of when the reply numbered `number` says it left, and returns how much later an earlier one really did.
    pub(super) fn follow_up(
        &mut self,
        number: u32,
        left: PeerTimestamp,
        follow_up: Option<FollowUp>,
    ) -> Option<Duration> {
        self.left.rotate_right(1);
        self.left[0] = Some((number, left));
        let FollowUp { sequence, timestamp } =
            follow_up.filter(|told| self.followed != Some(told.sequence))?;
        let (_, written) = self.left.iter().flatten().find(|(number, _)| *number == sequence)?;
        self.followed = Some(sequence);
        let lag = PeerTimestamp::from_ntp(timestamp.0).signed_since(*written);
        u64::try_from(lag).ok().map(Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::echo::flow::{Drops, Purpose};
    use crate::echo::outcome::{Direction, EchoReport, Verdict};
    use crate::machine::TimestampSource;
    use crate::wire::NtpTime;

    const MS: u64 = 1_000_000;
    const RULES: VerdictRules = VerdictRules {
        late_after: Duration::from_millis(1_000),
        lost_after: Duration::from_millis(3_000),
        horizon: Duration::from_millis(250),
        tx_timestamps: false,
        absence: None,
    };

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_nanos(milliseconds * MS)
    }

    /// A flow that has sent a datagram every ten milliseconds, the first at 0.
    fn sending(count: u64, kind: RequestForm) -> Flow {
        let mut flow = Flow::new(0, 1, 9, at(0));
        for sequence in 0..count {
            flow.push(at(sequence * 10), NtpTime(sequence), kind, Purpose::Measure);
            flow.sent(sequence, at(sequence * 10), TimestampSource::User, &mut VecDeque::new());
        }
        flow
    }

    /// What is known of each datagram: `f` lost on the way there, `r` on the way back, `-` nothing.
    fn known(mut flow: Flow) -> String {
        let mut reports = VecDeque::new();
        let (here, there) = (&mut HostDrops::default(), &mut HostDrops::default());
        flow.expire(at(1_000_000), &RULES, &mut Drops { here, there }, &mut reports);
        let direction = |report| {
            let EchoReport::Decided { verdict: Verdict::Lost(direction), .. } = report else { return None };
            Some(match direction {
                Direction::Forward => 'f',
                Direction::Reverse => 'r',
                Direction::Unknown => '-',
            })
        };
        reports.into_iter().filter_map(direction).collect()
    }

    fn asked(sequence: u64) -> AnsweredRequest {
        AnsweredRequest { sequence, sent: at(sequence * 10), heard: at(sequence * 10 + 5) }
    }

    fn record(first: u32, highest: u32, bitmap: u128) -> SessionRecord {
        SessionRecord {
            session: 9,
            is_reply: true,
            count_or_first: first,
            highest,
            bitmap,
            ..SessionRecord::default()
        }
    }

    #[test]
    fn report_of_another_session_says_nothing() {
        for (session, expected) in [(9, "r"), (8, "-")] {
            let mut flow = sending(41, RequestForm::WithSession);
            let told = SessionRecord { session, ..record(0, 40, 1 << 20) };
            LossEvidence::default().learn_from_ours(&mut flow, &asked(40), &told, &RULES);
            assert_eq!(&known(flow)[20..21], expected);
        }
    }

    #[test]
    fn report_reaches_back_over_128_datagrams() {
        let mut flow = sending(200, RequestForm::WithSession);
        LossEvidence::default().learn_from_ours(
            &mut flow,
            &asked(199),
            &record(0, 199, 1 << 127 | 1),
            &RULES,
        );
        let expected = "-".repeat(72) + "r" + &"f".repeat(102) + &"-".repeat(24) + "r";
        assert_eq!(known(flow), expected, "what was sent less than 250 ms before it was asked for is open");
    }

    #[test]
    fn record_says_nothing_of_what_may_have_arrived_before_it_began() {
        let mut flow = sending(200, RequestForm::WithSession);
        let mut view = LossEvidence::default();
        // It begins with number 100. What was sent up to 250 ms later may have overtaken that one.
        view.learn_from_ours(&mut flow, &asked(110), &record(100, 110, 1), &RULES);
        view.learn_from_ours(&mut flow, &asked(199), &record(100, 199, 1), &RULES);
        let expected = "-".repeat(110) + "r" + &"-".repeat(14) + &"f".repeat(50) + &"-".repeat(24) + "r";
        assert_eq!(known(flow), expected);
        // A record that begins with what was never sent began no earlier than it was asked for.
        let mut flow = sending(200, RequestForm::WithSession);
        let mut view = LossEvidence::default();
        let (here, there) = (&mut HostDrops::default(), &mut HostDrops::default());
        flow.expire(at(3_500), &RULES, &mut Drops { here, there }, &mut VecDeque::new());
        view.learn_from_ours(&mut flow, &asked(120), &record(40, 120, 1), &RULES);
        view.learn_from_ours(&mut flow, &asked(199), &record(40, 199, 1), &RULES);
        // Number 40 is forgotten; 51 to 199 are left.
        let expected = "-".repeat(69) + "r" + &"-".repeat(24) + &"f".repeat(30) + &"-".repeat(24) + "r";
        assert_eq!(known(flow), expected);
    }

    #[test]
    fn first_datagram_of_a_record_that_has_begun_anew_is_not_missing() {
        let mut flow = sending(200, RequestForm::WithSession);
        let mut view = LossEvidence::default();
        view.learn_from_ours(&mut flow, &asked(120), &record(0, 120, 1), &RULES);
        view.learn_from_ours(&mut flow, &asked(199), &record(150, 199, 1), &RULES);
        // The first report came too early for 96 to 119, and the second record begins later.
        let expected = "-".repeat(25) + &"f".repeat(71) + &"-".repeat(24) + "r" + &"-".repeat(78) + "r";
        assert_eq!(known(flow), expected);
    }

    /// What a foreign reflector's numbers prove about the datagrams between two replies.
    fn between(first: (u64, u32), second: (u64, u32), doubt: impl FnOnce(&mut LossEvidence)) -> String {
        let mut flow = sending(60, RequestForm::WithoutSession);
        let mut view = LossEvidence::default();
        view.learn_from_foreign(&mut flow, &asked(first.0), first.1, &RULES);
        doubt(&mut view);
        view.learn_from_foreign(&mut flow, &asked(second.0), second.1, &RULES);
        let known = known(flow);
        let (from, to) = (usize::try_from(first.0).unwrap() + 1, usize::try_from(second.0).unwrap());
        let others = known[..from].chars().chain(known[to..].chars());
        assert!(others.eq(std::iter::repeat_n('-', 60 - (to - from))), "{known}");
        known[from..to].to_owned()
    }

    #[test]
    fn all_or_none_between_two_counted_replies_has_a_direction() {
        let old = "f".repeat(24) + &"-".repeat(24);
        assert_eq!(between((1, 0), (50, 1), |_| ()), old, "none arrived");
        assert_eq!(between((1, 0), (50, 49), |_| ()), "r".repeat(48), "all arrived");
        for some in [0, 2, 25, 48, 50] {
            assert_eq!(between((1, 0), (50, some), |_| ()), "-".repeat(48), "{some}");
        }
        assert_eq!(between((1, 1), (50, 50), |_| ()), "-".repeat(48), "the numbers are copies");
        assert_eq!(between((1, u32::MAX), (50, 0), |_| ()), old, "the count wraps");
    }

    #[test]
    fn count_is_doubted_for_ten_minutes_after_a_request_arrived_twice_or_behind_a_later_one() {
        let heard = asked(50).heard;
        for (until, expected) in [(heard, "r"), (heard + Duration::from_nanos(1), "-")] {
            let doubt = |view: &mut LossEvidence| view.doubted = Some(until);
            assert_eq!(between((1, 0), (50, 49), doubt), expected.repeat(48));
        }
        let mut view = LossEvidence::default();
        view.follow_up(7, PeerTimestamp::from_ntp(1), None);
        view.follow_up(8, PeerTimestamp::from_ntp(1), None);
        view.heard_again(7, at(5));
        view.heard_again(8, at(5));
        assert_eq!(view.doubted, None, "a copy of the reply");
        view.heard_again(6, at(5));
        assert_eq!(view.doubted, Some(at(600_005)), "a reply to a copy of the request");
        view.follow_up(9, PeerTimestamp::from_ntp(1), None);
        view.doubted = None;
        view.heard_again(7, at(6));
        assert_eq!(view.doubted, Some(at(600_006)), "two are remembered");
    }

    #[test]
    fn reply_to_an_earlier_request_with_a_later_number_shows_that_requests_were_reordered() {
        for (number, is_doubted) in [(7, false), (9, true), (7 + (1 << 31), true), (8 + (1 << 31), false)] {
            let mut flow = sending(60, RequestForm::WithoutSession);
            let mut view = LossEvidence::default();
            view.learn_from_foreign(&mut flow, &asked(20), 8, &RULES);
            view.learn_from_foreign(&mut flow, &asked(10), number, &RULES);
            let expected = is_doubted.then(|| asked(10).heard + DOUBT_LASTS);
            assert_eq!((view.doubted, view.last), (expected, Some((20, 8))), "{number}");
        }
    }

    #[test]
    fn follow_up_tells_once_how_late_a_remembered_reply_left() {
        let second = PeerTimestamp::from_ntp(1 << 32);
        let told = |sequence, timestamp| Some(FollowUp { sequence, timestamp: NtpTime(timestamp) });
        let half = (1 << 32) + (1 << 31);
        let mut view = LossEvidence::default();
        assert_eq!(view.follow_up(0, second, None), None);
        assert_eq!(view.follow_up(1, second, told(5, half)), None, "nobody knows that reply");
        assert_eq!(view.follow_up(2, second, told(1, half)), Some(Duration::from_millis(500)));
        assert_eq!(view.follow_up(3, second, told(1, half)), None, "it was told already");
        assert_eq!(view.follow_up(4, second, told(3, 1)), None, "before it was written");
        assert_eq!(view.follow_up(5, second, told(4, half)), Some(Duration::from_millis(500)));
    }

    #[test]
    fn drops_of_the_responder_lie_between_the_reports_that_counted_them() {
        let mut drops = ResponderDrops::default();
        drops.learn(at(10), at(15), 7, &RULES);
        assert_eq!(drops.ledger.total(), 0, "the first report is where counting begins");
        drops.learn(at(100), at(105), 10, &RULES);
        assert_eq!(drops.ledger.total(), 3);
        assert!(!drops.ledger.claim(0, at(106), at(200)) && !drops.ledger.claim(0, at(0), at(9)));
        assert!(drops.ledger.claim(0, at(105), at(200)) && drops.ledger.claim(0, at(0), at(10)));
        drops.learn(at(100), at(106), 20, &RULES);
        drops.learn(at(99), at(107), 20, &RULES);
        assert_eq!(drops.ledger.total(), 3, "reports that were asked for no later");
        drops.learn(at(200), at(205), 2, &RULES);
        assert_eq!(drops.ledger.total(), 3, "a responder that began again");
        drops.learn(at(300), at(305), 3, &RULES);
        assert_eq!(drops.ledger.total(), 4);
        drops.learn(at(400), at(405), 3 + (1 << 31), &RULES);
        assert_eq!(drops.ledger.total(), 4, "half of all numbers is backwards");
        // What was dropped longer ago than a datagram is waited for is forgotten.
        drops.learn(at(3_106), at(3_110), 3 + (1 << 31), &RULES);
        drops.learn(at(6_000), at(6_010), 3 + (1 << 31), &RULES);
        assert!(!drops.ledger.claim(0, at(0), at(150)));
        assert!(drops.ledger.claim(0, at(250), at(310)));
    }
}
