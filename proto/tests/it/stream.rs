//! Echo over streams: verdicts in thousands of simulated connections are compared with the truth.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pathmeter_proto::echo::{
    Direction, EchoReport, StreamProber, StreamReply, StreamSpec, StreamStep, Verdict,
};
use pathmeter_proto::machine::{NotSent, Now, TimestampSource};
use pathmeter_proto::sim::Random;
use pathmeter_proto::time::{Timestamp, WallOffset, WallTime};
use pathmeter_proto::wire::Message;
use pathmeter_proto::wire::NtpTime;

use crate::conservation::{LATE_AFTER, LOST_AFTER, MS, scaled, seeds};

const START: u64 = 1_000 * MS;
const TURNAROUND: u64 = 30_000;

/// A stream with random impairments: in order, and nothing is lost unless the connection breaks.
struct TestStream {
    random: Random,
    /// One-way delay.
    delay: u64,
    jitter: u64,
    /// Times between which nothing moves.
    stalls: Vec<(u64, u64)>,
    /// Times at which an open connection breaks.
    breaks: Vec<u64>,
    /// Shares of the attempts to connect that fail in the network, fail in this host, or are never answered.
    attempts: [f64; 3],
    /// Messages in flight at which the stream blocks.
    room: usize,
    /// Maximum delay of the driver's wake-ups.
    lag: u64,
}

/// What truly happened to every message.
#[derive(Debug, Default)]
struct Truth {
    /// Due time and arrival of the answer.
    answered: BTreeMap<u64, (u64, u64)>,
    written: BTreeMap<u64, u64>,
    /// Messages on connections that broke before the answer arrived.
    broken: BTreeSet<u64>,
}

#[derive(Debug, Default)]
struct StreamCounts {
    decided: BTreeMap<u64, (Verdict, Option<Duration>)>,
    sent: u64,
    unsent: u64,
    send_errors: u64,
    very_late: u64,
    attempts: u64,
    given_up: u64,
}

impl TestStream {
    fn perfect(seed: u64) -> Self {
        let random = Random::new(seed);
        Self {
            random,
            delay: 10 * MS,
            jitter: 0,
            stalls: Vec::new(),
            breaks: Vec::new(),
            attempts: [0.0; 3],
            room: usize::MAX,
            lag: 0,
        }
    }

    fn impaired(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut stream = Self::perfect(seed);
        stream.delay = random.between(0, 100 * MS);
        stream.jitter = random.pick(&[0, MS, 50 * MS]);
        for _ in 0..random.below(4) {
            let from = START + random.below(20_000 * MS);
            stream.stalls.push((from, from + random.below(6_000 * MS)));
        }
        for _ in 0..random.below(4) {
            stream.breaks.push(START + random.below(20_000 * MS));
        }
        stream.breaks.sort_unstable();
        stream.attempts = random.pick(&[[0.0; 3], [0.5, 0.0, 0.0], [0.2, 0.2, 0.2], [0.0, 0.6, 0.0]]);
        stream.room = random.pick(&[1, 3, usize::MAX]);
        stream.lag = random.pick(&[0, MS, 30 * MS]);
        stream
    }

    /// Arrival of data that leaves at `at`.
    fn arrival(&mut self, at: u64) -> u64 {
        let arrives = at + self.delay + self.random.below(self.jitter + 1);
        let stalled =
            |at: u64| self.stalls.iter().find(|(from, to)| *from <= at && at < *to).map(|(_, to)| *to);
        let mut arrives = arrives;
        while let Some(end) = stalled(arrives) {
            arrives = end;
        }
        arrives
    }

    fn run(mut self, spec: StreamSpec) -> (StreamCounts, Truth) {
        let at = Timestamp::from_nanos;
        let (mut counts, mut truth) = (StreamCounts::default(), Truth::default());
        let mut prober = StreamProber::new(spec, at(START));
        let mut now = START;
        let mut attempt: Option<(u64, Result<(), Option<NotSent>>)> = None;
        let mut answers: VecDeque<(u64, Message)> = VecDeque::new();
        let mut is_up = false;
        let mut is_blocked = false;
        loop {
            let time = Now {
                at: at(now),
                drained: at(now),
                wall: WallOffset::between(at(0), WallTime::from_nanos(0)),
            };
            match prober.step(time) {
                StreamStep::Report(report) => {
                    counts.take(&report);
                    continue;
                }
                StreamStep::Connect => {
                    counts.attempts += 1;
                    let [refused, local, unanswered] = self.attempts;
                    let draw = self.random.fraction();
                    attempt = Some(if draw < refused {
                        (self.arrival(now), Err(None))
                    } else if draw < refused + local {
                        (now, Err(Some(NotSent::Unreachable)))
                    } else if draw < refused + local + unanswered {
                        (u64::MAX, Ok(()))
                    } else {
                        (self.arrival(now), Ok(()))
                    });
                    continue;
                }
                StreamStep::Disconnect => {
                    counts.given_up += 1;
                    truth.broken.extend(answers.iter().map(|(_, message)| message.sequence));
                    answers.clear();
                    (attempt, is_up) = (None, false);
                    prober.disconnected(at(now), None);
                    continue;
                }
                StreamStep::Send(message) => {
                    assert!(is_up, "a message needs a connection");
                    assert!(!is_blocked, "the stream is blocked");
                    truth.written.insert(message.sequence, now);
                    let received = self.arrival(now);
                    let back = self.arrival(received + TURNAROUND);
                    let after = answers.back().map_or(0, |(last, _)| *last);
                    answers.push_back((back.max(after), message));
                    prober.sent(message, at(now), None);
                    if answers.len() >= self.room {
                        is_blocked = true;
                        prober.blocked();
                    }
                    continue;
                }
                StreamStep::Finished => return (counts, truth),
                StreamStep::Wait(until) => {
                    let breaks = self.breaks.first().copied().unwrap_or(u64::MAX).max(now);
                    let next = until.as_nanos().saturating_add(self.random.below(self.lag + 1));
                    let candidates = [
                        next,
                        attempt.map_or(u64::MAX, |(done, _)| done),
                        answers.front().map_or(u64::MAX, |(arrives, _)| *arrives),
                        breaks,
                    ];
                    now = candidates.into_iter().min().unwrap().max(now);
                    assert!(now < START + 600_000 * MS, "it never ends");
                }
            }
            if let Some((done, outcome)) = attempt
                && done <= now
            {
                attempt = None;
                match outcome {
                    Ok(()) => {
                        (is_up, is_blocked) = (true, false);
                        prober.connected(at(now));
                    }
                    Err(local_error) => drop(prober.disconnected(at(now), local_error)),
                }
            }
            while let Some((arrives, message)) = answers.front().copied()
                && arrives <= now
            {
                answers.pop_front();
                truth.answered.insert(message.sequence, (nanos_of(message.timestamp), arrives));
                let turnaround = i64::try_from(TURNAROUND).unwrap();
                let by = TimestampSource::Kernel;
                prober.received(&StreamReply { message, at: at(arrives), by, turnaround });
                if is_blocked && answers.len() < self.room {
                    is_blocked = false;
                    prober.writable();
                }
            }
            while self.breaks.first().is_some_and(|at| *at <= now) {
                self.breaks.remove(0);
                if is_up {
                    is_up = false;
                    truth.broken.extend(answers.iter().map(|(_, message)| message.sequence));
                    answers.clear();
                    prober.disconnected(at(now), None);
                }
            }
        }
    }
}

/// A timestamp in nanoseconds of the simulated wall clock.
fn nanos_of(timestamp: NtpTime) -> u64 {
    let epoch = NtpTime::from(WallTime::from_nanos(0)).0;
    let ticks = u128::from(timestamp.0 - epoch);
    u64::try_from((ticks * 1_000_000_000) >> 32).unwrap()
}

impl StreamCounts {
    fn take(&mut self, report: &EchoReport) {
        match report {
            EchoReport::Sent { .. } => self.sent += 1,
            EchoReport::Unsent(count) => self.unsent += count,
            EchoReport::SendError(_) => self.send_errors += 1,
            EchoReport::VeryLate => self.very_late += 1,
            EchoReport::Decided { sequence, verdict, sample, .. } => {
                let before = self.decided.insert(*sequence, (*verdict, sample.map(|sample| sample.rtt)));
                assert_eq!(before, None, "a message has one verdict");
            }
            EchoReport::Duplicate | EchoReport::Reordered | EchoReport::Mismatched(_) => panic!("{report:?}"),
            EchoReport::Ipdv(_)
            | EchoReport::BurstBegan
            | EchoReport::BurstEnded(_)
            | EchoReport::TransmitLag(_)
            | EchoReport::TurnaroundInvalid
            | EchoReport::Icmp(_)
            | EchoReport::LossyFlows(_) => {}
        }
    }

    fn count(&self, verdict: Verdict) -> u64 {
        self.decided.values().filter(|(found, _)| *found == verdict).count() as u64
    }
}

fn spec(seed: u64, count: u64) -> StreamSpec {
    StreamSpec {
        interval: Duration::from_millis(50),
        late_after: LATE_AFTER,
        lost_after: LOST_AFTER,
        unanswered_max: usize::MAX,
        on_demand: false,
        count: Some(count),
        seed,
    }
}

const LOST: Verdict = Verdict::Lost(Direction::Unknown);

/// Checks that must hold in every run.
fn check(counts: &StreamCounts, truth: &Truth, count: u64, seed: u64) {
    assert_eq!(counts.sent + counts.unsent + counts.send_errors, count, "SIM_SEED={seed}: slots");
    assert_eq!(counts.sent, counts.decided.len() as u64, "SIM_SEED={seed}: verdicts");
    for (sequence, (verdict, rtt)) in &counts.decided {
        let answer = truth.answered.get(sequence).map(|(due, arrived)| Duration::from_nanos(arrived - due));
        match answer {
            Some(whole) if whole <= LOST_AFTER => {
                let network = whole - Duration::from_nanos(TURNAROUND);
                assert_eq!(*rtt, Some(network), "SIM_SEED={seed}: message {sequence}");
                let expected = if network > LATE_AFTER { Verdict::Late } else { Verdict::Ok };
                assert_eq!(*verdict, expected, "SIM_SEED={seed}: message {sequence}");
            }
            Some(_) | None => assert_eq!(*verdict, LOST, "SIM_SEED={seed}: message {sequence}"),
        }
    }
    assert!(truth.written.keys().all(|sequence| counts.decided.contains_key(sequence)), "SIM_SEED={seed}");
}

#[test]
fn verdicts_equal_the_truth_and_latency_counts_from_the_due_time() {
    let (mut late, mut lost, mut broken) = (0, 0, 0);
    for seed in seeds(3_000) {
        let (counts, truth) = TestStream::impaired(seed).run(spec(seed, 200));
        check(&counts, &truth, 200, seed);
        late += counts.count(Verdict::Late);
        lost += counts.count(LOST);
        broken += truth.broken.len() as u64;
    }
    let is_replay = std::env::var_os("SIM_SEED").is_some();
    assert!(
        is_replay || late > scaled(1_000) && lost > scaled(1_000) && broken > scaled(1_000),
        "{late} late, {lost} lost, {broken} broken"
    );
}

#[test]
fn stall_shows_as_latency_and_not_as_loss() {
    for seed in seeds(300) {
        let mut stream = TestStream::perfect(seed);
        // While the connection is open.
        let from = START + stream.random.between(100 * MS, 3_000 * MS);
        stream.stalls = vec![(from, from + 2_500 * MS)];
        stream.room = stream.random.pick(&[2, usize::MAX]);
        let (counts, truth) = stream.run(spec(seed, 200));
        check(&counts, &truth, 200, seed);
        assert_eq!((counts.count(LOST), counts.unsent, counts.attempts), (0, 0, 1), "SIM_SEED={seed}");
        assert!(counts.count(Verdict::Late) > 20, "SIM_SEED={seed}");
    }
}

#[test]
fn connection_without_replies_is_replaced() {
    for seed in seeds(300) {
        let mut stream = TestStream::perfect(seed);
        stream.stalls = vec![(START + 1_000 * MS, START + 8_000 * MS)];
        let (counts, truth) = stream.run(spec(seed, 300));
        check(&counts, &truth, 300, seed);
        assert!(counts.given_up >= 1 && counts.attempts > counts.given_up, "SIM_SEED={seed}: {counts:?}");
        let (last, _) = counts.decided.values().next_back().unwrap();
        assert_eq!(*last, Verdict::Ok, "SIM_SEED={seed}: it recovers");
    }
}

#[test]
fn prober_with_local_connect_errors_sends_and_loses_nothing() {
    let mut stream = TestStream::perfect(1);
    stream.attempts = [0.0, 1.0, 0.0];
    let (counts, _) = stream.run(spec(1, 100));
    assert_eq!((counts.sent, counts.send_errors + counts.unsent), (0, 100));
}

#[test]
fn attempts_to_connect_become_rarer_and_never_stop() {
    let mut stream = TestStream::perfect(1);
    stream.attempts = [1.0, 0.0, 0.0];
    let (counts, _) = stream.run(spec(1, 2_400));
    assert_eq!(counts.count(LOST), 2_400);
    assert!((20..=60).contains(&counts.attempts), "{} attempts in two minutes", counts.attempts);
}

#[test]
fn unanswered_messages_to_a_stopping_peer_are_withdrawn() {
    let at = |millis: u64| Timestamp::from_nanos(START + millis * MS);
    let mut prober = StreamProber::new(spec(1, 10), at(0));
    let mut counts = StreamCounts::default();
    let wall = WallOffset::between(at(0), WallTime::from_nanos(START));
    let mut drive = |prober: &mut StreamProber, now: Timestamp| loop {
        match prober.step(Now { at: now, drained: now, wall }) {
            StreamStep::Report(report) => counts.take(&report),
            StreamStep::Send(message) => prober.sent(message, now, None),
            StreamStep::Connect | StreamStep::Disconnect => {}
            StreamStep::Wait(_) | StreamStep::Finished => break,
        }
    };
    drive(&mut prober, at(0));
    prober.connected(at(0));
    for millis in 0..300 {
        drive(&mut prober, at(millis));
    }
    prober.peer_leaving(at(300));
    prober.disconnected(at(301), None);
    prober.stop();
    drive(&mut prober, at(9_000));
    assert!(counts.sent > 2);
    assert_eq!(counts.count(Verdict::Withdrawn), counts.sent);
}

#[test]
fn undelivered_message_is_sent_again_and_counts_from_its_due_time() {
    let at = |millis: u64| Timestamp::from_nanos(START + millis * MS);
    let wall = WallOffset::between(at(0), WallTime::from_nanos(START));
    let mut prober = StreamProber::new(StreamSpec { unanswered_max: 1, ..spec(1, 1) }, at(0));
    let mut counts = StreamCounts::default();
    let mut drive = |prober: &mut StreamProber, now: Timestamp| -> Option<Message> {
        loop {
            match prober.step(Now { at: now, drained: now, wall }) {
                StreamStep::Report(report) => counts.take(&report),
                StreamStep::Send(message) => {
                    prober.sent(message, now, None);
                    return Some(message);
                }
                StreamStep::Connect | StreamStep::Disconnect => {}
                StreamStep::Wait(_) | StreamStep::Finished => return None,
            }
        }
    };
    drive(&mut prober, at(0));
    prober.connected(at(0));
    let due = (0..200).find(|millis| drive(&mut prober, at(*millis)).is_some()).unwrap();
    let message = Message { sequence: 0, timestamp: NtpTime::from(wall.wall(at(due))) };
    prober.undelivered(message);
    prober.disconnected(at(due + 10), None);
    assert_eq!(drive(&mut prober, at(due + 11)), None, "there is no connection");
    drive(&mut prober, at(due + 200));
    prober.connected(at(due + 200));
    assert_eq!(drive(&mut prober, at(due + 200)), Some(message));
    let by = TimestampSource::User;
    prober.received(&StreamReply { message, at: at(due + 230), by, turnaround: 0 });
    drive(&mut prober, at(due + 230));
    assert_eq!(counts.decided[&0], (Verdict::Ok, Some(Duration::from_millis(230))));
    assert_eq!((counts.sent, prober.in_flight()), (1, 0));
}

#[test]
fn server_that_closes_idle_connections_causes_no_loss() {
    for seed in seeds(300) {
        let mut stream = TestStream::perfect(seed);
        // Between the messages, which are a second apart and answered within 20 ms, and sometimes in the
        // middle of one.
        stream.breaks = (0..200).map(|i| START + i * 97 * MS).collect();
        let spec = StreamSpec {
            interval: Duration::from_secs(1),
            on_demand: true,
            unanswered_max: 1,
            ..spec(seed, 15)
        };
        let (counts, truth) = stream.run(spec);
        check(&counts, &truth, 15, seed);
        // After five messages in a row that broke with their connections, the pause between attempts is
        // longer than the time after which a message is late, and later longer than the one after which it is
        // lost.
        let (mut lost_in_a_row, mut broken) = (0, 0);
        for (sequence, (verdict, _)) in &counts.decided {
            let is_broken = truth.broken.contains(sequence);
            match *verdict {
                LOST if is_broken => (lost_in_a_row, broken) = (lost_in_a_row + 1, broken + 1),
                LOST | Verdict::Late => {
                    assert!(lost_in_a_row >= 5, "SIM_SEED={seed}: message {sequence}: {verdict:?}");
                }
                Verdict::Ok | Verdict::Lost(_) | Verdict::HostDropped | Verdict::Withdrawn => {
                    lost_in_a_row = 0
                }
            }
        }
        assert_eq!(broken, truth.broken.len(), "SIM_SEED={seed}");
        assert!(
            counts.attempts <= 15 + 3 * broken as u64 + 1,
            "SIM_SEED={seed}: {} attempts",
            counts.attempts
        );
    }
}

/// A message to an HTTP server that closed the connection before it could read the message, and then what
/// `then` does.
fn returned(then: impl FnOnce(&mut StreamProber, Timestamp)) -> StreamCounts {
    let at = |millis: u64| Timestamp::from_nanos(START + millis * MS);
    let wall = WallOffset::between(at(0), WallTime::from_nanos(START));
    let mut prober = StreamProber::new(
        StreamSpec { unanswered_max: 1, on_demand: true, count: Some(1), ..spec(1, 1) },
        at(0),
    );
    let mut counts = StreamCounts::default();
    let mut drive = |prober: &mut StreamProber, now: Timestamp| -> Option<Message> {
        loop {
            match prober.step(Now { at: now, drained: now, wall }) {
                StreamStep::Report(report) => counts.take(&report),
                StreamStep::Send(message) => {
                    prober.sent(message, now, None);
                    return Some(message);
                }
                StreamStep::Connect | StreamStep::Disconnect => {}
                StreamStep::Wait(_) | StreamStep::Finished => return None,
            }
        }
    };
    drive(&mut prober, at(0));
    prober.connected(at(0));
    let message = (0..2_000).find_map(|millis| drive(&mut prober, at(millis))).expect("a message is due");
    prober.undelivered(message);
    prober.disconnected(at(2_000), None);
    then(&mut prober, at(2_001));
    drive(&mut prober, at(2_002));
    prober.connected(at(2_003));
    assert_eq!(drive(&mut prober, at(2_003)), None, "it is not sent again");
    drive(&mut prober, at(120_000));
    assert_eq!(prober.in_flight(), 0);
    counts
}

#[test]
fn undelivered_message_is_withdrawn_after_a_local_connect_error() {
    let counts = returned(|prober, now| {
        prober.disconnected(now, Some(NotSent::Unreachable));
    });
    assert_eq!((counts.count(LOST), counts.count(Verdict::Withdrawn)), (0, 1));
}

#[test]
fn withdrawn_message_is_not_sent_again() {
    let at = |millis: u64| Timestamp::from_nanos(START + millis * MS);
    let wall = WallOffset::between(at(0), WallTime::from_nanos(START));
    let mut prober =
        StreamProber::new(StreamSpec { unanswered_max: 1, on_demand: true, ..spec(1, 1) }, at(0));
    prober.connected(at(0));
    let message = (0..2_000)
        .find_map(|millis| match prober.step(Now { at: at(millis), drained: at(millis), wall }) {
            StreamStep::Send(message) => Some(message),
            StreamStep::Connect
            | StreamStep::Disconnect
            | StreamStep::Report(_)
            | StreamStep::Wait(_)
            | StreamStep::Finished => None,
        })
        .expect("a message is due");
    prober.sent(message, at(2_000), None);
    prober.withdraw();
    prober.undelivered(message);
    prober.disconnected(at(2_001), None);
    prober.connected(at(2_002));
    let mut steps =
        std::iter::from_fn(|| match prober.step(Now { at: at(2_002), drained: at(2_002), wall }) {
            StreamStep::Wait(_) | StreamStep::Finished => None,
            step @ (StreamStep::Connect
            | StreamStep::Disconnect
            | StreamStep::Send(_)
            | StreamStep::Report(_)) => Some(step),
        });
    let is_sent_again = |step: &StreamStep| matches!(step, StreamStep::Send(sent) if *sent == message);
    assert!(!steps.any(|step| is_sent_again(&step)));
}

#[test]
fn peer_that_answers_over_the_old_connection_is_still_draining() {
    let at = |millis: u64| Timestamp::from_nanos(START + millis * MS);
    let mut prober = StreamProber::new(spec(1, 100), at(0));
    let mut counts = StreamCounts::default();
    let wall = WallOffset::between(at(0), WallTime::from_nanos(START));
    let mut drive = |prober: &mut StreamProber, now: Timestamp, is_answered: bool| loop {
        match prober.step(Now { at: now, drained: now, wall }) {
            StreamStep::Report(report) => counts.take(&report),
            StreamStep::Send(message) => {
                prober.sent(message, now, None);
                if is_answered {
                    prober.received(&StreamReply {
                        message,
                        at: now,
                        by: TimestampSource::User,
                        turnaround: 0,
                    });
                }
            }
            StreamStep::Connect | StreamStep::Disconnect => {}
            StreamStep::Wait(_) | StreamStep::Finished => break,
        }
    };
    drive(&mut prober, at(0), true);
    prober.connected(at(0));
    for millis in 0..500 {
        if millis == 300 {
            prober.peer_leaving(at(300));
        }
        drive(&mut prober, at(millis), true);
    }
    assert!(prober.is_draining(at(500)));
    for millis in 500..700 {
        drive(&mut prober, at(millis), false);
    }
    prober.disconnected(at(700), None);
    for millis in 700..800 {
        drive(&mut prober, at(millis), false);
    }
    prober.connected(at(800));
    for millis in 800..6_000 {
        drive(&mut prober, at(millis), true);
    }
    assert!(!prober.is_draining(at(6_000)));
    prober.stop();
    drive(&mut prober, at(60_000), false);
    assert_eq!(counts.count(LOST), 0);
    assert!(counts.count(Verdict::Withdrawn) >= 1);
}
