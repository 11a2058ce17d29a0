use super::*;
use crate::time::{WallOffset, WallTime};

const LOST_AFTER: Duration = Duration::from_millis(3_000);

fn spec() -> StreamSpec {
    StreamSpec {
        interval: Duration::from_millis(100),
        late_after: Duration::from_millis(1_000),
        lost_after: LOST_AFTER,
        unanswered_max: 1_000,
        on_demand: false,
        count: None,
        seed: 1,
    }
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

const NANOSECOND: Duration = Duration::from_nanos(1);

/// A prober whose stream is simulated by hand.
struct TestDriver {
    prober: StreamProber,
    at: Timestamp,
    reports: Vec<EchoReport>,
}

impl TestDriver {
    fn new(spec: StreamSpec) -> Self {
        let at = Timestamp::from_nanos(1_000_000_000_000);
        Self { prober: StreamProber::new(spec, at), at, reports: Vec::new() }
    }

    /// A prober with an open connection.
    fn connected(spec: StreamSpec) -> Self {
        let mut test = Self::new(spec);
        assert_eq!(test.step(), StreamStep::Connect);
        test.prober.connected(test.at);
        test
    }

    fn now(at: Timestamp) -> Now {
        let wall = WallOffset::between(Timestamp::from_nanos(0), WallTime::from_nanos(0));
        Now { at, drained: at, wall }
    }

    /// The next step at this time, after all reports.
    fn step(&mut self) -> StreamStep {
        loop {
            match self.prober.step(Self::now(self.at)) {
                StreamStep::Report(report) => self.reports.push(report),
                StreamStep::Wait(until) => {
                    assert!(until > self.at, "the deadline is in the future");
                    return StreamStep::Wait(until);
                }
                step @ (StreamStep::Connect
                | StreamStep::Disconnect
                | StreamStep::Send(_)
                | StreamStep::Finished) => return step,
            }
        }
    }

    fn wait(&mut self) -> Timestamp {
        let step = self.step();
        let StreamStep::Wait(until) = step else { panic!("{step:?}") };
        until
    }

    /// Advances the time until a message is due, and returns it without writing it.
    fn due(&mut self) -> Message {
        loop {
            match self.step() {
                StreamStep::Wait(until) => self.at = until,
                StreamStep::Send(message) => return message,
                step @ (StreamStep::Connect
                | StreamStep::Disconnect
                | StreamStep::Report(_)
                | StreamStep::Finished) => panic!("{step:?}"),
            }
        }
    }

    /// Advances the time until a message is due, and writes it.
    fn send(&mut self) -> Message {
        let message = self.due();
        self.prober.sent(message, self.at, None);
        message
    }

    fn answer(&mut self, message: Message, at: Timestamp) -> bool {
        self.prober.received(&StreamReply { message, at, by: TimestampSource::Kernel, turnaround: 0 })
    }

    /// All pending reports, without letting anything become due.
    fn flush(&mut self) -> Vec<EchoReport> {
        self.reports.extend(self.prober.reports.drain(..));
        std::mem::take(&mut self.reports)
    }

    fn verdicts(&mut self) -> Vec<(u64, Verdict)> {
        let decided = self.flush().into_iter().filter_map(|report| {
            let EchoReport::Decided { sequence, verdict, .. } = report else { return None };
            Some((sequence, verdict))
        });
        decided.collect()
    }

    /// Runs until that time: messages are accepted and not answered, and connecting takes no time.
    fn pass(&mut self, until: Timestamp) {
        loop {
            match self.step() {
                StreamStep::Wait(next) if next > until => {
                    self.at = until;
                    return;
                }
                StreamStep::Wait(next) => self.at = next,
                StreamStep::Send(message) => self.prober.sent(message, self.at, None),
                StreamStep::Connect => self.prober.connected(self.at),
                StreamStep::Disconnect => drop(self.prober.disconnected(self.at, None)),
                StreamStep::Finished => return,
                StreamStep::Report(report) => panic!("{report:?}"),
            }
        }
    }
}

const LOST: Verdict = Verdict::Lost(super::super::outcome::Direction::Unknown);

#[test]
fn first_message_is_due_when_the_first_attempt_to_connect_has_ended() {
    for is_connected in [true, false] {
        let mut test = TestDriver::new(spec());
        assert_eq!(test.step(), StreamStep::Connect);
        let attempt_ends = test.at + LOST_AFTER;
        assert_eq!(test.wait(), attempt_ends, "nothing else is due");
        test.at = test.at + ms(2_000);
        match is_connected {
            true => test.prober.connected(test.at),
            false => assert!(test.prober.disconnected(test.at, None)),
        }
        let slot = test.prober.schedule.as_ref().unwrap().next();
        assert!(slot > test.at && slot <= test.at + ms(150));
        assert!(test.wait() <= slot);
    }
}

#[test]
fn attempt_to_connect_is_given_up_after_lost_after() {
    let mut test = TestDriver::new(spec());
    assert_eq!(test.step(), StreamStep::Connect);
    let began = test.at;
    test.at = began + LOST_AFTER - NANOSECOND;
    assert_eq!(test.wait(), began + LOST_AFTER);
    test.at = began + LOST_AFTER;
    assert_eq!(test.step(), StreamStep::Disconnect);
    assert_eq!(test.wait(), Timestamp::NEVER, "Disconnect is requested once");
    assert!(test.prober.disconnected(test.at, None));
}

#[test]
fn pause_between_attempts_doubles_up_to_five_seconds_with_jitter_down_to_half() {
    for seed in 0..200 {
        let mut test = TestDriver::new(StreamSpec { seed, interval: Duration::from_secs(3_600), ..spec() });
        for whole in [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000] {
            assert_eq!(test.step(), StreamStep::Connect);
            let failed = test.at;
            assert!(test.prober.disconnected(failed, None));
            test.at = test.wait();
            let pause = test.at.since(failed);
            assert!(ms(whole) / 2 <= pause && pause < ms(whole), "seed {seed}: {pause:?} of {whole} ms");
        }
        assert_eq!(test.step(), StreamStep::Connect);
    }
    let pauses = (0..200).map(|seed| {
        let mut test = TestDriver::new(StreamSpec { seed, interval: Duration::from_secs(3_600), ..spec() });
        test.prober.failures = 1;
        test.prober.retry_pause().as_micros()
    });
    let (least, most) = pauses.fold((u128::MAX, 0), |(least, most), p| (least.min(p), most.max(p)));
    assert!(least < 52_000 && most > 98_000, "{least} µs to {most} µs");
}

#[test]
fn answer_resets_the_pause() {
    let mut test = TestDriver::new(spec());
    test.prober.failures = 9;
    assert_eq!(test.step(), StreamStep::Connect);
    test.prober.connected(test.at);
    let message = test.send();
    assert!(test.answer(message, test.at + ms(1)));
    test.prober.disconnected(test.at, None);
    assert_eq!(test.prober.failures, 1);
    let again = test.prober.deadline().since(test.at);
    assert!(again <= ms(100), "{again:?}");
}

#[test]
fn connection_without_replies_is_given_up_after_lost_after() {
    let mut test = TestDriver::connected(StreamSpec { unanswered_max: 1, ..spec() });
    let first = test.send();
    let sent = test.at;
    test.answer(first, sent + ms(20));
    test.at = sent + ms(20);
    // A silence while no message was in flight does not count.
    test.at = sent + ms(50);
    let _ = test.send();
    let requested = test.at;
    test.at = requested + LOST_AFTER - NANOSECOND;
    assert!(test.wait() <= requested + LOST_AFTER);
    test.at = requested + LOST_AFTER;
    assert_eq!(test.step(), StreamStep::Disconnect);
    assert!(test.prober.disconnected(test.at, None));
    let known = test.verdicts();
    assert_eq!(known[..2], [(0, Verdict::Ok), (1, LOST)]);
}

#[test]
fn every_answer_shows_that_the_connection_works() {
    let mut test = TestDriver::connected(spec());
    let [first, second, third] = [(); 3].map(|()| test.send());
    let sent = test.at;
    test.answer(second, sent + ms(900));
    assert_eq!(test.prober.unanswered, 2..3, "earlier messages are not awaited any more");
    assert!(test.answer(first, sent + ms(950)), "an answer out of order is accepted");
    test.at = sent + ms(1_000);
    test.pass(sent + ms(3_899));
    assert!(matches!(test.prober.connection, ConnectionState::Connected { .. }));
    let is_late = test.answer(third, sent + ms(3_899));
    assert!(is_late && test.flush().contains(&EchoReport::VeryLate));
    assert!(!test.answer(third, sent + ms(3_899)) || test.flush().contains(&EchoReport::VeryLate));
    test.pass(sent + ms(5_000));
    assert!(
        matches!(test.prober.connection, ConnectionState::Connected { .. }),
        "a late answer counts as one"
    );
}

#[test]
fn second_answer_is_a_duplicate_and_an_unknown_message_a_mismatch() {
    let mut test = TestDriver::connected(spec());
    let message = test.send();
    let received = test.at + ms(5);
    assert!(test.answer(message, received));
    test.flush();
    assert!(!test.answer(message, received));
    let other = Message { timestamp: NtpTime(message.timestamp.0 ^ 1), ..message };
    assert!(!test.answer(other, received));
    assert!(!test.answer(Message { sequence: 7, ..message }, received));
    let unsolicited = EchoReport::Mismatched(Mismatch::Unsolicited);
    assert_eq!(test.flush(), [EchoReport::Duplicate, unsolicited, unsolicited]);
    test.prober.mismatched(Mismatch::Malformed);
    assert_eq!(test.flush(), [EchoReport::Mismatched(Mismatch::Malformed)]);
}

#[test]
fn kernel_timestamp_counts_only_if_the_message_did_not_wait() {
    for (waited, rtt) in [(Duration::ZERO, ms(9)), (ms(2), ms(12))] {
        let mut test = TestDriver::connected(spec());
        let message = test.due();
        let due = test.at;
        test.prober.sent(message, due + waited, Some(due + waited + ms(1)));
        assert_eq!(test.prober.in_flight(), 1);
        test.answer(message, due + waited + ms(10));
        let reports = test.flush();
        let sample = reports.iter().find_map(|report| {
            let EchoReport::Decided { sample, .. } = report else { return None };
            *sample
        });
        assert_eq!(sample.map(|sample| sample.rtt), Some(rtt));
        assert_eq!(reports[0], EchoReport::Sent { flow: 0, sequence: 0 });
        assert_eq!(test.prober.in_flight(), 0);
    }
}

#[test]
fn variation_is_the_round_trip_minus_the_minimum() {
    let mut test = TestDriver::connected(spec());
    for (rtt, minimum) in [(9, 9), (5, 5), (8, 5)] {
        let message = test.send();
        test.answer(message, test.at + ms(rtt));
        test.step();
        let samples = std::mem::take(&mut test.reports).into_iter().filter_map(|report| {
            let EchoReport::Decided { sample, .. } = report else { return None };
            sample
        });
        let [sample] = samples.collect::<Vec<RoundTrip>>()[..] else { panic!("one is answered") };
        assert_eq!((sample.minimum, sample.variation), (ms(minimum), ms(rtt) - ms(minimum)));
    }
}

#[test]
fn limit_of_unanswered_messages_and_a_blocked_stream_stop_sending() {
    let mut test = TestDriver::connected(StreamSpec { unanswered_max: 2, ..spec() });
    let first = test.send();
    test.send();
    test.at = test.wait();
    assert!(matches!(test.step(), StreamStep::Wait(_)), "two are unanswered");
    assert_eq!((test.prober.waiting.len(), test.prober.in_flight()), (1, 2));
    test.answer(first, test.at);
    test.prober.blocked();
    assert!(matches!(test.step(), StreamStep::Wait(_)), "the stream is blocked");
    test.prober.writable();
    assert!(matches!(test.step(), StreamStep::Send(message) if message.sequence == 2));
}

#[test]
fn waiting_message_is_lost_at_its_deadline() {
    let mut test = TestDriver::connected(StreamSpec { count: Some(1), ..spec() });
    test.prober.blocked();
    test.at = test.wait();
    let due = test.at;
    assert_eq!(test.wait(), due + LOST_AFTER);
    test.at = due + LOST_AFTER - NANOSECOND;
    test.step();
    assert_eq!(test.verdicts(), []);
    test.at = due + LOST_AFTER;
    assert_eq!(test.step(), StreamStep::Finished);
    assert_eq!(test.verdicts(), [(0, LOST)]);
}

#[test]
fn on_demand_server_may_close_an_idle_connection() {
    let idle = |change: &dyn Fn(&mut TestDriver)| {
        let mut test = TestDriver::connected(StreamSpec { on_demand: true, ..spec() });
        let message = test.send();
        test.answer(message, test.at + ms(1));
        change(&mut test);
        test
    };
    let mut test = idle(&|_| ());
    assert!(!test.prober.disconnected(test.at, None));
    assert_eq!(test.prober.failures, 0);
    // Another connection is opened when a message is due, and not before.
    let slot = test.wait();
    assert_eq!(slot, test.prober.schedule.as_ref().unwrap().next());
    test.at = slot;
    assert_eq!(test.step(), StreamStep::Connect);
    // A waiting message is sent over another connection at once, if this one had served.
    let mut test = idle(&|test| {
        test.due();
    });
    assert!(!test.prober.disconnected(test.at, None));
    assert_eq!(test.step(), StreamStep::Connect);
    let mut test = TestDriver::connected(StreamSpec { on_demand: true, ..spec() });
    test.due();
    assert!(test.prober.disconnected(test.at, None), "it answered nothing");
    // All other ends are failures.
    let mut test = idle(&|test| {
        test.send();
    });
    assert!(test.prober.disconnected(test.at, None), "a message was in flight");
    let mut test = idle(&|_| ());
    assert!(test.prober.disconnected(test.at, Some(NotSent::Unreachable)), "the cause was local");
    let mut test = idle(&|test| test.prober.spec.on_demand = false);
    assert!(test.prober.disconnected(test.at, None));
    let mut test = TestDriver::new(StreamSpec { on_demand: true, ..spec() });
    test.step();
    assert!(test.prober.disconnected(test.at, None), "an attempt to connect");
}

#[test]
fn returned_message_makes_room_and_is_sent_first() {
    let mut test = TestDriver::connected(StreamSpec { unanswered_max: 2, ..spec() });
    let first = test.send();
    let second = test.send();
    assert_eq!(test.prober.unanswered, 0..2);
    test.prober.undelivered(second);
    assert_eq!(test.prober.unanswered, 0..1);
    assert_eq!(test.step(), StreamStep::Send(second));
    test.prober.sent(second, test.at, None);
    assert_eq!(test.prober.unanswered, 0..2);
    test.answer(first, test.at);
    test.prober.undelivered(first);
    assert_eq!(test.prober.unanswered, 1..2, "an answered message is not sent again");
    test.answer(second, test.at);
    let third = test.send();
    test.prober.withdraw();
    test.prober.undelivered(third);
    assert!(test.prober.waiting.is_empty(), "a withdrawn message is not sent again");
}

#[test]
fn waiting_messages_are_withdrawn_when_a_stopped_peer_is_back() {
    let mut test = TestDriver::connected(spec());
    test.prober.blocked();
    test.at = test.wait();
    test.step();
    assert_eq!(test.prober.waiting.len(), 1);
    test.prober.peer_leaving(test.at);
    test.prober.disconnected(test.at, None);
    assert!(test.prober.is_draining(test.at));
    test.prober.connected(test.at + ms(1));
    assert_eq!(test.verdicts(), [(0, Verdict::Withdrawn)]);
    // It is back with the first answer over a connection that was opened after the goodbye.
    test.at = test.at + ms(1);
    let message = test.send();
    assert!(test.prober.is_draining(test.at));
    test.answer(message, test.at);
    assert!(!test.prober.is_draining(test.at));
    test.prober.disconnected(test.at, None);
    test.due_without_connection();
    test.prober.connected(test.at);
    assert_eq!(test.prober.waiting.len(), 1, "without an absence, waiting messages stay");
}

impl TestDriver {
    /// Advances the time until a message waits.
    fn due_without_connection(&mut self) {
        self.prober.connection = ConnectionState::Disconnecting;
        while self.prober.waiting.is_empty() {
            self.at = self.wait();
            self.step();
        }
    }
}

#[test]
fn withdrawal_decides_sent_and_waiting_messages_and_keeps_the_connection() {
    let mut test = TestDriver::connected(StreamSpec { unanswered_max: 1, ..spec() });
    let first = test.send();
    test.at = test.wait();
    test.step();
    test.prober.withdraw();
    assert_eq!(test.verdicts(), [(0, Verdict::Withdrawn), (1, Verdict::Withdrawn)]);
    assert_eq!((test.prober.in_flight(), test.prober.waiting.len()), (0, 0));
    assert!(test.prober.unanswered.is_empty(), "no answer is awaited");
    assert!(test.answer(first, test.at), "an answer is still accepted");
    assert_eq!(test.flush(), [EchoReport::VeryLate]);
}

#[test]
fn prober_without_a_connection_for_a_local_reason_sends_nothing() {
    let mut test = TestDriver::connected(StreamSpec { count: Some(3), ..spec() });
    test.prober.blocked();
    test.at = test.wait();
    test.step();
    assert!(test.prober.disconnected(test.at, Some(NotSent::Buffer)));
    assert_eq!(test.flush(), [EchoReport::SendError(NotSent::Buffer)], "the waiting message");
    test.prober.connection =
        ConnectionState::Down { retry_at: Timestamp::NEVER, local_error: Some(NotSent::Unreachable) };
    let slot = test.prober.schedule.as_ref().unwrap().next();
    assert_eq!(test.wait(), slot);
    test.at = slot;
    let next = test.wait();
    assert_eq!(test.flush(), [EchoReport::SendError(NotSent::Unreachable)], "the next message");
    test.at = next;
    assert_eq!(test.step(), StreamStep::Finished);
}

#[test]
fn stopped_prober_finishes_when_every_message_has_a_verdict() {
    let mut test = TestDriver::connected(spec());
    test.send();
    let sent = test.at;
    test.prober.stop();
    assert_eq!(test.wait(), sent + LOST_AFTER);
    test.at = sent + LOST_AFTER;
    assert_eq!(test.step(), StreamStep::Finished);
    assert_eq!(test.verdicts(), [(0, LOST)]);
    let mut test = TestDriver::connected(StreamSpec { count: Some(1), ..spec() });
    let message = test.send();
    assert!(
        matches!(test.step(), StreamStep::Wait(_)),
        "its only slot has passed and its message is undecided"
    );
    test.answer(message, test.at);
    assert_eq!(test.step(), StreamStep::Finished);
}

#[test]
fn slots_missed_by_a_stalled_prober_are_reported_as_unsent() {
    for (count, unsent, waiting) in [(100, 99, 1), (50, 50, 0), (101, 99, 1)] {
        let mut slots = Schedule::new(Timestamp::from_nanos(1_000_000_000_000), ms(100), 1);
        let hundredth = (0..100).map(|_| slots.take(slots.next()).slot.unwrap()).last().unwrap();
        let mut test = TestDriver::connected(StreamSpec { count: Some(count), ..spec() });
        test.prober.blocked();
        test.at = hundredth;
        test.step();
        assert_eq!(test.prober.waiting.len(), waiting, "of {count}");
        assert_eq!(test.flush(), [EchoReport::Unsent(unsent)], "of {count}");
    }
}

#[test]
fn stream_is_lossy_from_the_second_loss_on_and_reported_once() {
    let mut test = TestDriver::connected(StreamSpec { count: Some(3), ..spec() });
    test.pass(test.at + Duration::from_secs(30));
    let changes = |report: &&EchoReport| matches!(report, EchoReport::LossyFlows(_));
    let changes: Vec<EchoReport> = test.reports.iter().filter(changes).copied().collect();
    assert_eq!(changes, [EchoReport::LossyFlows(1)]);
    assert_eq!(test.verdicts(), [(0, LOST), (1, LOST), (2, LOST)]);
}

#[test]
fn stream_at_the_limit_of_undecided_messages_skips_slots() {
    let mut test = TestDriver::connected(StreamSpec { interval: Duration::from_micros(10), ..spec() });
    test.prober.blocked();
    while test.prober.waiting.len() < Flow::PENDING {
        test.at = test.wait();
        test.step();
    }
    test.flush();
    let (slot, unsent) = (test.wait(), test.flush());
    assert_eq!(unsent, []);
    test.at = slot;
    test.step();
    assert_eq!((test.flush(), test.prober.waiting.len()), (vec![EchoReport::Unsent(1)], Flow::PENDING));
}

#[test]
fn connection_without_a_reply_is_given_up_between_two_messages() {
    let mut test = TestDriver::connected(StreamSpec { interval: ms(60_000), ..spec() });
    let message = test.due();
    let due = test.at;
    // The stream had no room for a second.
    test.at = due + ms(1_000);
    test.prober.sent(message, test.at, None);
    assert_eq!(test.wait(), due + LOST_AFTER, "the message is lost, counted from when it was due");
    test.at = due + LOST_AFTER;
    assert_eq!(test.wait(), due + ms(1_000) + LOST_AFTER, "the peer had a second less to answer");
    test.at = due + ms(1_000) + LOST_AFTER;
    assert_eq!(test.step(), StreamStep::Disconnect);
}
