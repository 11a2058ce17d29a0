//! Evidence of where datagrams were lost, from the replies to other datagrams of the flow.

use std::time::Duration;

use super::flow::{Flow, RequestForm, VerdictRules};
use crate::machine::HostDrops;
use crate::time::Timestamp;
use crate::wire::PeerTimestamp;
use crate::wire::tlv::{FollowUp, SessionRecord};

/// What the replies of one flow prove about its lost datagrams.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LossEvidence {
    /// Agents: the first sequence number of the responder's record, and an upper bound of the time at which
    /// that datagram was sent.
    record: Option<(u32, Timestamp)>,
    /// Third-party reflectors: the last reply in order, as request's and reflector's sequence numbers.
    last: Option<(u64, u32)>,
    /// Third-party reflectors: whether the reflector counts its replies instead of copying the request's
    /// number.
    is_stateful: bool,
    /// Third-party reflectors: end of the time in which the count proves nothing, because a request arrived
    /// twice or out of order.
    unreliable_since: Option<Timestamp>,
    /// Sequence number and T3 of the latest replies.
    sent: [Option<(u32, PeerTimestamp)>; REPLIES_KEPT],
    /// Sequence number of the last follow-up that was used.
    last_follow_up: Option<u32>,
}

/// Number of replies whose T3 is kept for a follow-up. Chosen: a follow-up normally arrives with the next
/// reply.
const REPLIES_KEPT: usize = 2;

/// The request that a reply answers.
#[derive(Debug, Clone, Copy)]
pub(super) struct AnsweredRequest {
    pub(super) sequence: u64,
    pub(super) sent: Timestamp,
    /// Arrival of the reply.
    pub(super) received: Timestamp,
}

/// How long the count of a reflector proves nothing after the path duplicated or reordered requests. Chosen:
/// 10 minutes.
const UNRELIABLE_FOR: Duration = Duration::from_secs(600);

/// Drops of the responder's host, from the reports in the replies of all flows of the path. The host reports
/// one count for all its sockets and senders.
#[derive(Debug, Default)]
pub(super) struct ResponderDrops {
    pub(super) drops: HostDrops,
    /// Time at which the last report was requested, and its count.
    last: Option<(Timestamp, u32)>,
}

impl ResponderDrops {
    /// Takes the count from a reply that arrived at `received` to a datagram sent at `requested`.
    pub(super) fn add(
        &mut self,
        requested: Timestamp,
        received: Timestamp,
        count: u32,
        rules: &VerdictRules,
    ) {
        if self.last.is_some_and(|(last, _)| requested <= last) {
            return;
        }
        if let Some((last, known)) = self.last.replace((requested, count)) {
            let dropped = count.wrapping_sub(known);
            // A count that decreased is from a restarted responder.
            if dropped < 1 << 31 {
                self.drops.forget(last - rules.lost_after);
                self.drops.add(0, last, received, dropped);
            }
        }
    }
}

impl LossEvidence {
    /// Takes the session record in an agent's reply.
    pub(super) fn add_session_record(
        &mut self,
        flow: &mut Flow,
        request: &AnsweredRequest,
        session: &SessionRecord,
        rules: &VerdictRules,
    ) {
        let AnsweredRequest { sent: requested, .. } = *request;
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
            // The slot is gone, or the datagram was never sent: the record began no later than this report
            // was requested.
            _ => flow.sent_at(first).unwrap_or(requested),
        };
        self.record = Some((session.count_or_first, began));
        let bitmap = session.bitmap;
        flow.record_arrivals(
            highest.saturating_sub(127)..=highest,
            RequestForm::WithSession,
            requested,
            rules,
            |sequence, sent| {
                let is_set = bitmap >> (highest - sequence) & 1 == 1;
                // A responder that evicted the session began a new record, perhaps with a datagram that
                // others had overtaken. Datagrams sent soon after that one may have arrived before it.
                (is_set || sent >= began + rules.horizon).then_some(is_set)
            },
        );
    }

    /// Takes the sequence number of a third-party reflector's reply.
    ///
    /// A stateful reflector counts its replies: between two replies it received as many requests as its
    /// numbers advanced. If that is all or none of the requests sent in between, each lost one has a
    /// direction; otherwise none has. The count is reliable only while no request arrives twice or out of
    /// order, because the reply to such a request takes a number at the wrong position. After such an arrival
    /// the count is ignored for [`UNRELIABLE_FOR`]. A first such arrival whose reply is also lost goes
    /// unnoticed.
    pub(super) fn add_reply_number(
        &mut self,
        flow: &mut Flow,
        request: &AnsweredRequest,
        number: u32,
        rules: &VerdictRules,
    ) {
        let AnsweredRequest { sequence, sent: requested, received } = *request;
        #[expect(clippy::cast_possible_truncation, reason = "the wire carried the low half")]
        let is_copy = number == sequence as u32;
        self.is_stateful |= !is_copy;
        if let Some((last, last_number)) = self.last
            && sequence < last
        {
            if number.wrapping_sub(last_number) < 1 << 31 {
                self.unreliable_since = Some(received + UNRELIABLE_FOR);
            }
            return;
        }
        let is_doubted = self.unreliable_since.is_some_and(|until| received < until);
        if let Some((last, last_number)) = self.last
            && self.is_stateful
        {
            let (sent_since, answered_since) = (sequence - last, number.wrapping_sub(last_number));
            let arrived = match u64::from(answered_since) {
                1 => Some(false),
                answered if answered == sent_since && !is_doubted => Some(true),
                _ => None,
            };
            flow.record_arrivals(
                last + 1..=sequence.saturating_sub(1),
                RequestForm::WithoutSession,
                requested,
                rules,
                |_, _| arrived,
            );
        }
        self.last = Some((sequence, number));
    }

    /// A second reply to a datagram arrived, numbered `number`. A duplicate of a reply has the same number;
    /// the reply to a duplicate of the request has its own.
    pub(super) fn duplicate_reply(&mut self, number: u32, at: Timestamp) {
        if !self.sent.iter().flatten().any(|(known, _)| *known == number) {
            self.unreliable_since = Some(at + UNRELIABLE_FOR);
        }
    }

    /// Records T3 of the reply numbered `number`. Returns how much later than its T3 an earlier reply really
    /// left, if the follow-up reports it.
    pub(super) fn follow_up(
        &mut self,
        number: u32,
        sent: PeerTimestamp,
        follow_up: Option<FollowUp>,
    ) -> Option<Duration> {
        self.sent.rotate_right(1);
        self.sent[0] = Some((number, sent));
        let FollowUp { sequence, timestamp } =
            follow_up.filter(|found| self.last_follow_up != Some(found.sequence))?;
        let (_, written) = self.sent.iter().flatten().find(|(number, _)| *number == sequence)?;
        self.last_follow_up = Some(sequence);
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

    /// A flow that has sent `count` datagrams, one every ten milliseconds from 0 on.
    fn sending(count: u64, kind: RequestForm) -> Flow {
        let mut flow = Flow::new(0, 1, 9, at(0));
        for sequence in 0..count {
            flow.push(at(sequence * 10), NtpTime(sequence), kind, Purpose::Measure);
            flow.sent(sequence, at(sequence * 10), TimestampSource::User, &mut VecDeque::new());
        }
        flow
    }

    /// Directions of all losses: `f` forward, `r` reverse, `-` unknown.
    fn known(mut flow: Flow) -> String {
        let mut reports = VecDeque::new();
        let (local, remote) = (&mut HostDrops::default(), &mut HostDrops::default());
        flow.expire(at(1_000_000), &RULES, &mut Drops { local, remote }, &mut reports);
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

    fn request(sequence: u64) -> AnsweredRequest {
        AnsweredRequest { sequence, sent: at(sequence * 10), received: at(sequence * 10 + 5) }
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
    fn record_of_another_session_is_no_evidence() {
        for (session, expected) in [(9, "r"), (8, "-")] {
            let mut flow = sending(41, RequestForm::WithSession);
            let record = SessionRecord { session, ..record(0, 40, 1 << 20) };
            LossEvidence::default().add_session_record(&mut flow, &request(40), &record, &RULES);
            assert_eq!(&known(flow)[20..21], expected);
        }
    }

    #[test]
    fn record_covers_128_datagrams() {
        let mut flow = sending(200, RequestForm::WithSession);
        LossEvidence::default().add_session_record(
            &mut flow,
            &request(199),
            &record(0, 199, 1 << 127 | 1),
            &RULES,
        );
        let expected = "-".repeat(72) + "r" + &"f".repeat(102) + &"-".repeat(24) + "r";
        assert_eq!(known(flow), expected, "datagrams sent less than 250 ms before the request are open");
    }

    #[test]
    fn record_is_no_evidence_against_datagrams_that_may_have_arrived_before_it() {
        let mut flow = sending(200, RequestForm::WithSession);
        let mut evidence = LossEvidence::default();
        // The record begins with number 100. Datagrams sent up to 250 ms later may have arrived before that
        // one.
        evidence.add_session_record(&mut flow, &request(110), &record(100, 110, 1), &RULES);
        evidence.add_session_record(&mut flow, &request(199), &record(100, 199, 1), &RULES);
        let expected = "-".repeat(110) + "r" + &"-".repeat(14) + &"f".repeat(50) + &"-".repeat(24) + "r";
        assert_eq!(known(flow), expected);
        // A record whose first datagram has no slot began no later than it was requested.
        let mut flow = sending(200, RequestForm::WithSession);
        let mut evidence = LossEvidence::default();
        let (local, remote) = (&mut HostDrops::default(), &mut HostDrops::default());
        flow.expire(at(3_500), &RULES, &mut Drops { local, remote }, &mut VecDeque::new());
        evidence.add_session_record(&mut flow, &request(120), &record(40, 120, 1), &RULES);
        evidence.add_session_record(&mut flow, &request(199), &record(40, 199, 1), &RULES);
        // The slot of number 40 is gone; 51 to 199 are left.
        let expected = "-".repeat(69) + "r" + &"-".repeat(24) + &"f".repeat(30) + &"-".repeat(24) + "r";
        assert_eq!(known(flow), expected);
    }

    #[test]
    fn first_datagram_of_a_new_record_is_not_missing() {
        let mut flow = sending(200, RequestForm::WithSession);
        let mut evidence = LossEvidence::default();
        evidence.add_session_record(&mut flow, &request(120), &record(0, 120, 1), &RULES);
        evidence.add_session_record(&mut flow, &request(199), &record(150, 199, 1), &RULES);
        // The first report was requested too early for 96 to 119, and the second record begins later.
        let expected = "-".repeat(25) + &"f".repeat(71) + &"-".repeat(24) + "r" + &"-".repeat(78) + "r";
        assert_eq!(known(flow), expected);
    }

    /// Directions of the losses between two replies of a reflector that counts.
    fn between(first: (u64, u32), second: (u64, u32), doubt: impl FnOnce(&mut LossEvidence)) -> String {
        let mut flow = sending(60, RequestForm::WithoutSession);
        let mut evidence = LossEvidence::default();
        evidence.add_reply_number(&mut flow, &request(first.0), first.1, &RULES);
        doubt(&mut evidence);
        evidence.add_reply_number(&mut flow, &request(second.0), second.1, &RULES);
        let known = known(flow);
        let (from, to) = (usize::try_from(first.0).unwrap() + 1, usize::try_from(second.0).unwrap());
        let others = known[..from].chars().chain(known[to..].chars());
        assert!(others.eq(std::iter::repeat_n('-', 60 - (to - from))), "{known}");
        known[from..to].to_owned()
    }

    #[test]
    fn losses_between_two_replies_have_a_direction_if_all_or_none_arrived() {
        let old = "f".repeat(24) + &"-".repeat(24);
        assert_eq!(between((1, 0), (50, 1), |_| ()), old, "none arrived");
        assert_eq!(between((1, 0), (50, 49), |_| ()), "r".repeat(48), "all arrived");
        for some in [0, 2, 25, 48, 50] {
            assert_eq!(between((1, 0), (50, some), |_| ()), "-".repeat(48), "{some}");
        }
        assert_eq!(between((1, 1), (50, 50), |_| ()), "-".repeat(48), "the numbers are copied");
        assert_eq!(between((1, u32::MAX), (50, 0), |_| ()), old, "the count wraps");
    }

    #[test]
    fn count_is_ignored_for_ten_minutes_after_a_duplicated_or_reordered_request() {
        let received = request(50).received;
        for (until, expected) in [(received, "r"), (received + Duration::from_nanos(1), "-")] {
            let doubt = |evidence: &mut LossEvidence| evidence.unreliable_since = Some(until);
            assert_eq!(between((1, 0), (50, 49), doubt), expected.repeat(48));
        }
        let mut evidence = LossEvidence::default();
        evidence.follow_up(7, PeerTimestamp::from_ntp(1), None);
        evidence.follow_up(8, PeerTimestamp::from_ntp(1), None);
        evidence.duplicate_reply(7, at(5));
        evidence.duplicate_reply(8, at(5));
        assert_eq!(evidence.unreliable_since, None, "a duplicate of the reply");
        evidence.duplicate_reply(6, at(5));
        assert_eq!(evidence.unreliable_since, Some(at(600_005)), "a reply to a duplicate of the request");
        evidence.follow_up(9, PeerTimestamp::from_ntp(1), None);
        evidence.unreliable_since = None;
        evidence.duplicate_reply(7, at(6));
        assert_eq!(evidence.unreliable_since, Some(at(600_006)), "two are remembered");
    }

    #[test]
    fn later_number_in_the_reply_to_an_earlier_request_shows_reordering() {
        for (number, is_doubted) in [(7, false), (9, true), (7 + (1 << 31), true), (8 + (1 << 31), false)] {
            let mut flow = sending(60, RequestForm::WithoutSession);
            let mut evidence = LossEvidence::default();
            evidence.add_reply_number(&mut flow, &request(20), 8, &RULES);
            evidence.add_reply_number(&mut flow, &request(10), number, &RULES);
            let expected = is_doubted.then(|| request(10).received + UNRELIABLE_FOR);
            assert_eq!((evidence.unreliable_since, evidence.last), (expected, Some((20, 8))), "{number}");
        }
    }

    #[test]
    fn follow_up_of_a_kept_reply_gives_its_lag_once() {
        let second = PeerTimestamp::from_ntp(1 << 32);
        let follow_up = |sequence, timestamp| Some(FollowUp { sequence, timestamp: NtpTime(timestamp) });
        let half = (1 << 32) + (1 << 31);
        let mut evidence = LossEvidence::default();
        assert_eq!(evidence.follow_up(0, second, None), None);
        assert_eq!(evidence.follow_up(1, second, follow_up(5, half)), None, "no such reply is kept");
        assert_eq!(evidence.follow_up(2, second, follow_up(1, half)), Some(Duration::from_millis(500)));
        assert_eq!(evidence.follow_up(3, second, follow_up(1, half)), None, "it was used already");
        assert_eq!(evidence.follow_up(4, second, follow_up(3, 1)), None, "earlier than T3");
        assert_eq!(evidence.follow_up(5, second, follow_up(4, half)), Some(Duration::from_millis(500)));
    }

    #[test]
    fn responder_drops_lie_between_the_reports_that_counted_them() {
        let mut responder = ResponderDrops::default();
        responder.add(at(10), at(15), 7, &RULES);
        assert_eq!(responder.drops.total(), 0, "the first report is where counting begins");
        responder.add(at(100), at(105), 10, &RULES);
        assert_eq!(responder.drops.total(), 3);
        assert!(!responder.drops.claim(0, at(106), at(200)) && !responder.drops.claim(0, at(0), at(9)));
        assert!(responder.drops.claim(0, at(105), at(200)) && responder.drops.claim(0, at(0), at(10)));
        responder.add(at(100), at(106), 20, &RULES);
        responder.add(at(99), at(107), 20, &RULES);
        assert_eq!(responder.drops.total(), 3, "reports that were requested no later");
        responder.add(at(200), at(205), 2, &RULES);
        assert_eq!(responder.drops.total(), 3, "the responder restarted");
        responder.add(at(300), at(305), 3, &RULES);
        assert_eq!(responder.drops.total(), 4);
        responder.add(at(400), at(405), 3 + (1 << 31), &RULES);
        assert_eq!(responder.drops.total(), 4, "an advance by half of all numbers counts as a decrease");
        // Drops from before any datagram that is still undecided are discarded.
        responder.add(at(3_106), at(3_110), 3 + (1 << 31), &RULES);
        responder.add(at(6_000), at(6_010), 3 + (1 << 31), &RULES);
        assert!(!responder.drops.claim(0, at(0), at(150)));
        assert!(responder.drops.claim(0, at(250), at(310)));
    }
}
