use super::*;
use crate::wire::NtpTime;

const MS: u64 = 1_000_000;
const RULES: VerdictRules = VerdictRules {
    late_after: Duration::from_millis(1_000),
    lost_after: Duration::from_millis(3_000),
    horizon: Duration::from_millis(250),
    tx_timestamps: false,
    absence: None,
};
const TX_TIMESTAMPS: VerdictRules = VerdictRules { tx_timestamps: true, ..RULES };

fn at(milliseconds: u64) -> Timestamp {
    Timestamp::from_nanos(milliseconds * MS)
}

fn nanosecond() -> Duration {
    Duration::from_nanos(1)
}

fn wire(sequence: u64) -> NtpTime {
    NtpTime(1_000 + sequence)
}

fn reply(at: Timestamp) -> ReplyTimes {
    ReplyTimes { at, turnaround: 0, sample: RoundTrip::empty(TimestampSource::Kernel) }
}

/// A flow, its limits and its reports.
struct TestFlow {
    flow: Flow,
    rules: VerdictRules,
    reports: VecDeque<EchoReport>,
    local: HostDrops,
    remote: HostDrops,
}

impl TestFlow {
    /// A flow that has sent a datagram at each of these times in milliseconds.
    fn sent(rules: VerdictRules, times: &[u64]) -> Self {
        let (local, remote) = (HostDrops::default(), HostDrops::default());
        let flow = Flow::new(3, 1, 9, at(0));
        let mut test = Self { flow, rules, reports: VecDeque::new(), local, remote };
        for time in times {
            test.send(at(*time));
        }
        test
    }

    fn queue(&mut self, at: Timestamp) -> u64 {
        let (next, _) = self.flow.upcoming();
        self.flow.push(at, wire(next), RequestForm::WithSession, Purpose::Measure)
    }

    fn send(&mut self, at: Timestamp) -> u64 {
        let sequence = self.queue(at);
        self.flow.sent(sequence, at, TimestampSource::User, &mut self.reports);
        sequence
    }

    fn answer(&mut self, sequence: u64, at: Timestamp) {
        let found = self.flow.match_reply(sequence, wire(sequence), at, &self.rules);
        assert!(matches!(found, ReplyMatch::Answer { .. }), "{found:?}");
        self.flow.accept_reply(sequence, reply(at), &self.rules, &mut self.reports);
    }

    /// The kernel's transmit timestamp of a datagram arrives.
    fn timestamp(&mut self, sequence: u64, at: Timestamp) {
        self.flow.sent(sequence, at, TimestampSource::Kernel, &mut self.reports);
        self.flow.release(sequence, &self.rules, &mut self.reports);
    }

    fn expire(&mut self, drained: Timestamp) {
        let mut drops = Drops { local: &mut self.local, remote: &mut self.remote };
        self.flow.expire(drained, &self.rules, &mut drops, &mut self.reports);
    }

    fn record_arrival(&mut self, sequence: u64, requested: Timestamp, has_arrived: bool) {
        let span = sequence..=sequence;
        self.flow.record_arrivals(span, RequestForm::WithSession, requested, &self.rules, |_, _| {
            Some(has_arrived)
        });
    }

    fn match_reply(&mut self, sequence: u64, at: Timestamp) -> ReplyMatch {
        self.flow.match_reply(sequence, wire(sequence), at, &self.rules)
    }

    /// The verdicts since the last call.
    fn verdicts(&mut self) -> Vec<(u64, Verdict)> {
        let decided = self.reports.drain(..).filter_map(|report| {
            let EchoReport::Decided { sequence, verdict, .. } = report else { return None };
            Some((sequence, verdict))
        });
        decided.collect()
    }

    /// The sample of the only verdict since the last call.
    fn sample(&mut self) -> RoundTrip {
        let decided = self.reports.drain(..).filter_map(|report| {
            let EchoReport::Decided { sample, .. } = report else { return None };
            sample
        });
        let [sample] = decided.collect::<Vec<RoundTrip>>()[..] else { panic!("one datagram is answered") };
        sample
    }
}

const UNKNOWN: Verdict = Verdict::Lost(Direction::Unknown);
const FORWARD: Verdict = Verdict::Lost(Direction::Forward);
const REVERSE: Verdict = Verdict::Lost(Direction::Reverse);

#[test]
fn reply_at_the_deadline_is_an_answer_and_a_later_one_is_very_late() {
    let mut test = TestFlow::sent(RULES, &[10]);
    assert_eq!(test.match_reply(0, at(3_010)), ReplyMatch::Answer { sent: at(10) });
    assert_eq!(test.match_reply(0, at(3_010) + nanosecond()), ReplyMatch::VeryLate);
    assert_eq!(test.match_reply(1, at(20)), ReplyMatch::Unsolicited);
    assert_eq!(test.flow.match_reply(0, wire(1), at(20), &RULES), ReplyMatch::Unsolicited, "another T1");
    test.expire(at(3_010) - nanosecond());
    assert_eq!(test.verdicts(), []);
    test.expire(at(3_010));
    assert_eq!(test.verdicts(), [(0, UNKNOWN)]);
    assert_eq!(test.match_reply(0, at(3_010)), ReplyMatch::VeryLate, "its slot is gone");
}

#[test]
fn unsent_datagram_has_no_answer_and_a_decided_one_no_second_answer() {
    let mut test = TestFlow::sent(TX_TIMESTAMPS, &[]);
    let queued = test.queue(at(1));
    assert_eq!(test.match_reply(queued, at(2)), ReplyMatch::Unsolicited);
    test.flow.not_sent(queued, NotSent::Buffer, &mut test.reports);
    assert_eq!(test.match_reply(queued, at(2)), ReplyMatch::Unsolicited);
    let held = test.send(at(3));
    test.answer(held, at(4));
    assert_eq!(test.match_reply(held, at(5)), ReplyMatch::Duplicate);
    test.timestamp(held, at(3));
    assert_eq!(test.match_reply(held, at(5)), ReplyMatch::Duplicate);
    let withdrawn = test.send(at(6));
    test.flow.withdraw_one(withdrawn, &mut test.reports);
    assert_eq!(test.match_reply(withdrawn, at(7)), ReplyMatch::VeryLate);
    assert_eq!(test.verdicts(), [(held, Verdict::Ok), (withdrawn, Verdict::Withdrawn)]);
}

#[test]
fn round_trip_at_the_limit_is_ok_and_a_longer_one_is_late() {
    let mut test = TestFlow::sent(RULES, &[10, 20]);
    test.answer(0, at(1_010));
    test.answer(1, at(1_020) + nanosecond());
    assert_eq!(test.verdicts(), [(0, Verdict::Ok), (1, Verdict::Late)]);
}

#[test]
fn reply_before_its_transmit_timestamp_is_decided_when_that_arrives() {
    let mut test = TestFlow::sent(TX_TIMESTAMPS, &[10]);
    test.answer(0, at(30));
    assert_eq!((test.verdicts(), test.flow.in_flight()), (vec![], 1));
    assert!(!test.flow.is_settled());
    test.timestamp(0, at(11));
    let sample = test.sample();
    assert_eq!((sample.rtt, sample.transmit), (Duration::from_millis(19), TimestampSource::Kernel));
    assert_eq!(test.flow.in_flight(), 0);
    assert!(test.flow.is_settled());
    // A second timestamp changes nothing. A timestamp that arrives before the reply lets it be decided at
    // once.
    test.timestamp(0, at(12));
    test.send(at(40));
    test.timestamp(1, at(42));
    test.answer(1, at(50));
    let sample = test.sample();
    assert_eq!((sample.rtt, sample.transmit), (Duration::from_millis(8), TimestampSource::Kernel));
    assert_eq!(test.flow.deadline(&TX_TIMESTAMPS), Timestamp::NEVER, "no reply is held");
}

#[test]
fn reply_without_transmit_timestamp_is_decided_after_100_ms() {
    let mut test = TestFlow::sent(TX_TIMESTAMPS, &[10, 20, 30]);
    test.answer(1, at(50));
    test.answer(2, at(60));
    test.answer(0, at(55));
    assert_eq!(test.flow.deadline(&TX_TIMESTAMPS), at(150));
    test.expire(at(150) - nanosecond());
    assert_eq!(test.verdicts(), []);
    test.expire(at(150));
    let sample = test.sample();
    assert_eq!((sample.rtt, sample.transmit), (Duration::from_millis(30), TimestampSource::User));
    assert_eq!(test.flow.deadline(&TX_TIMESTAMPS), at(155), "the first of the replies that are still held");
    test.timestamp(0, at(12));
    assert_eq!(test.sample().rtt, Duration::from_millis(43));
    test.expire(at(159));
    assert_eq!(test.verdicts(), []);
    test.expire(at(160));
    assert_eq!(test.verdicts(), [(2, Verdict::Ok)]);
    assert_eq!(test.flow.deadline(&TX_TIMESTAMPS), Timestamp::NEVER);
}

#[test]
fn held_reply_is_decided_at_the_latest_at_the_deadline_of_its_datagram() {
    let mut test = TestFlow::sent(VerdictRules { late_after: RULES.lost_after, ..TX_TIMESTAMPS }, &[10]);
    test.answer(0, at(2_950));
    test.expire(at(3_009));
    assert_eq!(test.verdicts(), []);
    test.expire(at(3_010));
    assert_eq!(test.verdicts(), [(0, Verdict::Ok)]);
    assert_eq!(test.flow.deadline(&test.rules), Timestamp::NEVER);
    let mut test = TestFlow::sent(TX_TIMESTAMPS, &[10]);
    test.answer(0, at(20));
    test.flow.withdraw(&TX_TIMESTAMPS, &mut test.reports);
    assert_eq!(test.verdicts(), [(0, Verdict::Ok)], "it is not withdrawn");
}

#[test]
fn report_counts_against_a_datagram_only_if_requested_one_horizon_later() {
    for (requested, verdict) in [(at(260) - nanosecond(), UNKNOWN), (at(260), FORWARD)] {
        let mut test = TestFlow::sent(RULES, &[10]);
        test.record_arrival(0, requested, false);
        test.expire(at(3_010));
        assert_eq!(test.verdicts(), [(0, verdict)]);
    }
    let mut test = TestFlow::sent(RULES, &[10]);
    test.record_arrival(0, at(11), true);
    test.expire(at(3_010));
    assert_eq!(test.verdicts(), [(0, REVERSE)], "an arrival counts at once");
}

#[test]
fn arrived_datagram_is_not_missing_whatever_other_reports_say() {
    let mut test = TestFlow::sent(RULES, &[10, 20, 30, 40]);
    test.record_arrival(0, at(500), false);
    test.record_arrival(0, at(600), true);
    test.record_arrival(1, at(500), true);
    test.record_arrival(1, at(600), false);
    test.flow.dropped_by_router(1, wire(1));
    test.flow.dropped_by_router(2, wire(2));
    test.flow.dropped_by_router(3, wire(2));
    test.flow.dropped_by_router(4, wire(4));
    test.expire(at(5_000));
    assert_eq!(test.verdicts(), [(0, REVERSE), (1, REVERSE), (2, FORWARD), (3, UNKNOWN)]);
}

#[test]
fn report_applies_to_undecided_datagrams_of_its_span_and_form() {
    let mut test = TestFlow::sent(RULES, &[10, 20, 30, 40, 50]);
    test.flow.push(at(60), wire(5), RequestForm::WithoutSession, Purpose::Measure);
    test.flow.sent(5, at(60), TimestampSource::User, &mut test.reports);
    test.answer(1, at(70));
    let seen = std::cell::RefCell::new(Vec::new());
    test.flow.record_arrivals(1..=9, RequestForm::WithSession, at(900), &RULES, |sequence, sent| {
        seen.borrow_mut().push((sequence, sent));
        [None, None, Some(false), Some(true), None][usize::try_from(sequence).unwrap()]
    });
    let expected = [(1, at(20)), (2, at(30)), (3, at(40)), (4, at(50))];
    assert_eq!(seen.into_inner(), expected);
    test.expire(at(5_000));
    let lost = [(0, UNKNOWN), (2, FORWARD), (3, REVERSE), (4, UNKNOWN), (5, UNKNOWN)];
    assert_eq!(test.verdicts()[1..], lost);
}

#[test]
fn turnaround_may_exceed_the_elapsed_time_by_the_skew_of_two_clocks() {
    for (stated, elapsed, credible) in [
        (0, 0, Some(0)),
        (-1, 5_000_000, None),
        (5_000_000, 5_000_000, Some(5_000_000)),
        (5_006_000, 5_000_000, Some(5_006_000)),
        (5_006_001, 5_000_000, None),
        (1_000, 0, Some(1_000)),
        (1_001, 0, None),
    ] {
        assert_eq!(credible_turnaround(stated, elapsed), credible, "{stated} ns of {elapsed} ns");
    }
    let mut test = TestFlow::sent(RULES, &[10]);
    let stated = ReplyTimes { turnaround: 5 * 1_000_000, ..reply(at(30)) };
    test.flow.accept_reply(0, stated, &RULES, &mut test.reports);
    let sample = test.sample();
    assert_eq!(sample.turnaround, Duration::from_millis(5));
    assert_eq!(sample.rtt, Duration::from_millis(15));
}

#[test]
fn flow_has_room_up_to_its_limit() {
    let mut test = TestFlow::sent(RULES, &[]);
    for index in 0..Flow::PENDING as u64 {
        assert!(test.flow.has_room(), "{index} are sent");
        test.send(at(1) + Duration::from_micros(index));
    }
    assert!(!test.flow.has_room());
    assert_eq!(test.flow.in_flight(), Flow::PENDING);
    test.expire(at(3_001));
    assert!(test.flow.has_room());
}

#[test]
fn deadline_is_that_of_the_first_undecided_datagram_and_not_before_the_oldest() {
    let mut test = TestFlow::sent(RULES, &[]);
    assert_eq!(test.flow.deadline(&RULES), Timestamp::NEVER);
    for time in [10, 20, 30] {
        test.send(at(time));
    }
    assert_eq!(test.flow.deadline(&RULES), at(3_010));
    test.answer(0, at(15));
    assert_eq!((test.flow.deadline(&RULES), test.flow.in_flight()), (at(3_020), 2));
    // By its kernel timestamp the oldest datagram, which is decided, left last.
    test.timestamp(0, at(500));
    assert_eq!(test.flow.deadline(&RULES), at(3_500));
    test.expire(at(3_499));
    assert_eq!(test.verdicts(), [(0, Verdict::Ok)]);
    test.expire(at(3_500));
    assert_eq!(test.verdicts(), [(1, UNKNOWN), (2, UNKNOWN)]);
}

#[test]
fn wire_number_extends_to_the_latest_possible_sequence_number() {
    let mut flow = Flow::new(0, 1, 9, at(0));
    assert_eq!((flow.extend(0), flow.extend(1), flow.extend(u32::MAX)), (Some(0), None, None));
    flow.next = (5 << 32) + 7;
    assert_eq!(flow.extend(7), Some((5 << 32) + 7));
    assert_eq!(flow.extend(6), Some((5 << 32) + 6));
    assert_eq!(flow.extend(8), Some((4 << 32) + 8));
}

#[test]
fn sent_count_excludes_datagrams_that_did_not_leave() {
    let mut test = TestFlow::sent(RULES, &[10, 20]);
    assert_eq!(test.flow.upcoming(), (2, 3));
    let queued = test.queue(at(30));
    assert_eq!(test.flow.upcoming(), (3, 4));
    test.flow.not_sent(queued, NotSent::Permission, &mut test.reports);
    test.flow.not_sent(queued, NotSent::Permission, &mut test.reports);
    test.flow.not_sent(0, NotSent::Permission, &mut test.reports);
    assert_eq!(test.flow.upcoming(), (3, 3));
    let errors = |report: &&EchoReport| matches!(report, EchoReport::SendError(NotSent::Permission));
    assert_eq!(test.reports.iter().filter(errors).count(), 1);
}

#[test]
fn burst_ends_with_an_answer_and_not_with_unsent_or_excused_datagrams() {
    let mut test = TestFlow::sent(RULES, &[10, 20]);
    let void = test.queue(at(30));
    test.flow.not_sent(void, NotSent::Buffer, &mut test.reports);
    for time in [40, 50, 60] {
        test.send(at(time));
    }
    // Too late for one of the first two datagrams.
    test.local.add(3, at(3_030), at(3_031), 1);
    test.answer(5, at(70));
    test.expire(at(5_000));
    let bursts: Vec<EchoReport> = test
        .reports
        .drain(..)
        .filter(|report| matches!(report, EchoReport::BurstBegan | EchoReport::BurstEnded(_)))
        .collect();
    assert_eq!(bursts, [EchoReport::BurstBegan, EchoReport::BurstEnded(3)]);
}

#[test]
fn host_drop_excuses_a_datagram_it_may_have_been() {
    let cases = [
        // Drops here and at the responder, whether the datagram is known to have arrived, and its
        // verdict.
        ((1, 0), None, Verdict::HostDropped),
        ((0, 1), None, Verdict::HostDropped),
        ((1, 0), Some(true), Verdict::HostDropped),
        ((0, 1), Some(true), REVERSE),
        ((1, 0), Some(false), FORWARD),
        ((0, 1), Some(false), Verdict::HostDropped),
        ((0, 0), None, UNKNOWN),
    ];
    for ((local, remote), has_arrived, verdict) in cases {
        let mut test = TestFlow::sent(RULES, &[10]);
        test.local.add(3, at(20), at(30), local);
        test.remote.add(0, at(20), at(30), remote);
        if let Some(has_arrived) = has_arrived {
            test.record_arrival(0, at(900), has_arrived);
        }
        test.expire(at(3_010));
        assert_eq!(test.verdicts(), [(0, verdict)], "{local} local, {remote} remote, {has_arrived:?}");
    }
}

#[test]
fn round_trip_of_a_removed_neighbour_is_still_known() {
    let mut test = TestFlow::sent(RULES, &[10, 20, 30, 40]);
    let differences = |test: &mut TestFlow| -> Vec<u128> {
        let reports = test.reports.drain(..).filter_map(|report| {
            let EchoReport::Ipdv(difference) = report else { return None };
            Some(difference.as_millis())
        });
        reports.collect()
    };
    test.answer(0, at(15));
    test.expire(at(3_010));
    // The network's part is short: the rest is the responder's turnaround.
    let slow = ReplyTimes { turnaround: 2_983 * 1_000_000, ..reply(at(3_010)) };
    test.flow.accept_reply(1, slow, &RULES, &mut test.reports);
    assert_eq!(differences(&mut test), [2]);
    test.answer(3, at(52));
    assert_eq!(differences(&mut test), [0; 0], "the neighbour has no answer yet");
    test.answer(2, at(51));
    assert_eq!(differences(&mut test), [14, 9]);
    let mut test = TestFlow::sent(RULES, &[10, 20]);
    test.answer(0, at(1_500));
    test.answer(1, at(30));
    assert_eq!(differences(&mut test), [0; 0], "a late round trip is not compared");
}

#[test]
fn end_of_a_connection_decides_its_datagrams_in_flight() {
    let mut test = TestFlow::sent(RULES, &[10, 20, 30, 40]);
    test.answer(1, at(45));
    test.flow.give_up(0..3, at(50), &RULES, &mut test.reports);
    assert_eq!(test.verdicts(), [(1, Verdict::Ok), (0, UNKNOWN), (2, UNKNOWN)]);
    assert_eq!((test.flow.in_flight(), test.flow.is_settled()), (1, false));
    test.flow.give_up(0..9, at(60), &RULES, &mut test.reports);
    assert_eq!(test.verdicts(), [(3, UNKNOWN)]);
    assert_eq!((test.flow.in_flight(), test.flow.is_settled()), (0, true));
    assert_eq!(test.flow.deadline(&RULES), Timestamp::NEVER);
}

#[test]
fn withdrawal_decides_only_datagrams_that_left() {
    let mut test = TestFlow::sent(RULES, &[10, 20]);
    test.answer(0, at(15));
    let queued = test.queue(at(30));
    test.flow.withdraw(&RULES, &mut test.reports);
    assert_eq!(test.verdicts(), [(0, Verdict::Ok), (1, Verdict::Withdrawn)]);
    assert!(!test.flow.is_settled(), "one has not left yet");
    test.flow.withdraw_one(queued, &mut test.reports);
    test.flow.sent(queued, at(31), TimestampSource::User, &mut test.reports);
    assert_eq!(test.flow.in_flight_since(queued), Some(at(31)));
    assert_eq!(test.flow.in_flight_since(1), None);
    assert_eq!(test.flow.sent_at(1), Some(at(20)));
    test.flow.withdraw_one(queued, &mut test.reports);
    assert_eq!(test.verdicts(), [(queued, Verdict::Withdrawn)]);
    assert!(test.flow.is_settled());
}

#[test]
fn reply_after_that_of_a_later_datagram_is_reordered() {
    let mut test = TestFlow::sent(RULES, &[10, 20, 30]);
    for (sequence, is_reordered) in [(1, false), (0, true), (2, false)] {
        test.reports.clear();
        test.answer(sequence, at(40));
        assert_eq!(test.reports.contains(&EchoReport::Reordered), is_reordered, "{sequence}");
    }
}

#[test]
fn datagram_is_known_by_its_number_and_t1_until_it_is_removed() {
    let mut test = TestFlow::sent(RULES, &[10, 20]);
    assert!(test.flow.has_sent(0, wire(0)) && test.flow.has_sent(1, wire(1)));
    assert!(!test.flow.has_sent(0, wire(1)) && !test.flow.has_sent(2, wire(2)));
    test.expire(at(3_010));
    assert!(!test.flow.has_sent(0, wire(0)) && test.flow.has_sent(1, wire(1)));
}

#[test]
fn first_kernel_timestamp_of_a_datagram_is_final() {
    let mut test = TestFlow::sent(TX_TIMESTAMPS, &[10]);
    let mut sent = |milliseconds, by| {
        test.flow.sent(0, at(milliseconds), by, &mut test.reports);
        test.flow.sent_at(0)
    };
    assert_eq!(sent(15, TimestampSource::User), Some(at(10)));
    assert_eq!(sent(11, TimestampSource::Kernel), Some(at(11)));
    assert_eq!(sent(12, TimestampSource::Kernel), Some(at(11)));
    assert_eq!(sent(13, TimestampSource::User), Some(at(11)));
    assert_eq!(test.reports, [EchoReport::Sent { flow: 3, sequence: 0 }]);
}

#[test]
fn detection_datagram_or_one_to_an_absent_peer_is_withdrawn_and_not_lost() {
    let mut test = TestFlow::sent(RULES, &[10]);
    test.flow.push(at(20), wire(1), RequestForm::WithSession, Purpose::Detect);
    test.flow.sent(1, at(20), TimestampSource::User, &mut test.reports);
    test.expire(at(4_000));
    assert_eq!(test.verdicts(), [(0, UNKNOWN), (1, Verdict::Withdrawn)]);
    let mut test = TestFlow::sent(RULES, &[10, 20, 70_000]);
    test.rules.absence = Some(Absence::begin(at(3_015), None));
    test.expire(at(80_000));
    assert_eq!(test.verdicts(), [(0, UNKNOWN), (1, Verdict::Withdrawn), (2, UNKNOWN)]);
}

#[test]
fn removed_slot_affects_neither_deadline_nor_in_flight() {
    let mut test = TestFlow::sent(RULES, &[10, 20, 30, 40, 50]);
    test.expire(at(3_020));
    assert_eq!((test.flow.deadline(&RULES), test.flow.in_flight()), (at(3_030), 3));
    test.answer(2, at(3_025));
    assert_eq!((test.flow.deadline(&RULES), test.flow.in_flight()), (at(3_040), 2));
}

#[test]
fn answer_without_a_preceding_loss_ends_no_burst() {
    let mut test = TestFlow::sent(RULES, &[10]);
    test.answer(0, at(20));
    test.expire(at(4_000));
    assert!(!test.reports.iter().any(|report| matches!(report, EchoReport::BurstEnded(_))));
}

#[test]
fn two_losses_make_a_flow_lossy() {
    let mut test = TestFlow::sent(RULES, &[10, 20, 30]);
    test.answer(2, at(40));
    test.expire(at(3_010));
    assert!(!test.flow.loss.is_lossy());
    test.expire(at(3_020));
    assert!(test.flow.loss.is_lossy());
}
