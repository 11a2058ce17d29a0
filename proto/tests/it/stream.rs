//! Echo over streams: verdicts against the truth in thousands of seeded connections.

use std::collections::{BTreeMap, VecDeque};
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

/// A stream of random badness: in order, nothing lost but by a break.
struct World {
    random: Random,
    /// One-way delay.
    delay: u64,
    jitter: u64,
    /// Nothing moves between these.
    stalls: Vec<(u64, u64)>,
    /// A connection that stands then is broken.
    breaks: Vec<u64>,
    /// Shares of the attempts to connect: refused by the network, by our own host, never answered.
    attempts: [f64; 3],
    /// Messages in flight at which the stream takes no more.
    room: usize,
    /// How late the driver wakes at most.
    lag: u64,
}

/// What became of every message, by the world.
#[derive(Debug, Default)]
struct Truth {
    /// When it was meant to leave, and when its answer arrived.
    answered: BTreeMap<u64, (u64, u64)>,
    handed: BTreeMap<u64, u64>,
    /// Handed to a connection that broke before the answer came.
    broken: u64,
}

#[derive(Debug, Default)]
struct Tally {
    decided: BTreeMap<u64, (Verdict, Option<Duration>)>,
    sent: u64,
    unsent: u64,
    send_errors: u64,
    very_late: u64,
    attempts: u64,
    given_up: u64,
}

impl World {
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

    fn bad(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut world = Self::perfect(seed);
        world.delay = random.between(0, 100 * MS);
        world.jitter = random.pick(&[0, MS, 50 * MS]);
        for _ in 0..random.below(4) {
            let from = START + random.below(20_000 * MS);
            world.stalls.push((from, from + random.below(6_000 * MS)));
        }
        for _ in 0..random.below(4) {
            world.breaks.push(START + random.below(20_000 * MS));
        }
        world.breaks.sort_unstable();
        world.attempts = random.pick(&[[0.0; 3], [0.5, 0.0, 0.0], [0.2, 0.2, 0.2], [0.0, 0.6, 0.0]]);
        world.room = random.pick(&[1, 3, usize::MAX]);
        world.lag = random.pick(&[0, MS, 30 * MS]);
        world
    }

    /// When something that sets out at `at` is through.
    fn through(&mut self, at: u64) -> u64 {
        let arrives = at + self.delay + self.random.below(self.jitter + 1);
        let stalled =
            |at: u64| self.stalls.iter().find(|(from, to)| *from <= at && at < *to).map(|(_, to)| *to);
        let mut arrives = arrives;
        while let Some(end) = stalled(arrives) {
            arrives = end;
        }
        arrives
    }

    fn run(mut self, spec: StreamSpec) -> (Tally, Truth) {
        let at = Timestamp::from_nanos;
        let (mut tally, mut truth) = (Tally::default(), Truth::default());
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
                    tally.take(&report);
                    continue;
                }
                StreamStep::Connect => {
                    tally.attempts += 1;
                    let [refused, ours, never] = self.attempts;
                    let draw = self.random.fraction();
                    attempt = Some(if draw < refused {
                        (self.through(now), Err(None))
                    } else if draw < refused + ours {
                        (now, Err(Some(NotSent::Unreachable)))
                    } else if draw < refused + ours + never {
                        (u64::MAX, Ok(()))
                    } else {
                        (self.through(now), Ok(()))
                    });
                    continue;
                }
                StreamStep::Disconnect => {
                    tally.given_up += 1;
                    truth.broken += answers.len() as u64;
                    answers.clear();
                    (attempt, is_up) = (None, false);
                    prober.disconnected(at(now), None);
                    continue;
                }
                StreamStep::Send(message) => {
                    assert!(is_up, "a message needs a connection");
                    assert!(!is_blocked, "the stream takes no more");
                    truth.handed.insert(message.sequence, now);
                    let there = self.through(now);
                    let back = self.through(there + TURNAROUND);
                    let after = answers.back().map_or(0, |(last, _)| *last);
                    answers.push_back((back.max(after), message));
                    prober.handed(message, at(now), None);
                    if answers.len() >= self.room {
                        is_blocked = true;
                        prober.blocked();
                    }
                    continue;
                }
                StreamStep::Finished => return (tally, truth),
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
                    Err(ours) => drop(prober.disconnected(at(now), ours)),
                }
            }
            while let Some((arrives, message)) = answers.front().copied()
                && arrives <= now
            {
                answers.pop_front();
                truth.answered.insert(message.sequence, (nanos_of(message.timestamp), arrives));
                let turnaround = i64::try_from(TURNAROUND).unwrap();
                let by = TimestampSource::Kernel;
                prober.answered(&StreamReply { message, at: at(arrives), by, turnaround });
                if is_blocked && answers.len() < self.room {
                    is_blocked = false;
                    prober.writable();
                }
            }
            while self.breaks.first().is_some_and(|at| *at <= now) {
                self.breaks.remove(0);
                if is_up {
                    is_up = false;
                    truth.broken += answers.len() as u64;
                    answers.clear();
                    prober.disconnected(at(now), None);
                }
            }
        }
    }
}

/// What a stamp says in nanoseconds of the simulated wall clock.
fn nanos_of(timestamp: NtpTime) -> u64 {
    let epoch = NtpTime::from(WallTime::from_nanos(0)).0;
    let ticks = u128::from(timestamp.0 - epoch);
    u64::try_from((ticks * 1_000_000_000) >> 32).unwrap()
}

impl Tally {
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
        at_once: usize::MAX,
        on_demand: false,
        count: Some(count),
        seed,
    }
}

const LOST: Verdict = Verdict::Lost(Direction::Unknown);

/// What must hold in every world.
fn check(tally: &Tally, truth: &Truth, count: u64, seed: u64) {
    assert_eq!(tally.sent + tally.unsent + tally.send_errors, count, "SIM_SEED={seed}: slots");
    assert_eq!(tally.sent, tally.decided.len() as u64, "SIM_SEED={seed}: verdicts");
    for (sequence, (verdict, rtt)) in &tally.decided {
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
    assert!(truth.handed.keys().all(|sequence| tally.decided.contains_key(sequence)), "SIM_SEED={seed}");
}

#[test]
fn every_verdict_is_the_truth_and_latency_counts_from_when_a_message_was_meant_to_leave() {
    let (mut late, mut lost, mut broken) = (0, 0, 0);
    for seed in seeds(3_000) {
        let (tally, truth) = World::bad(seed).run(spec(seed, 200));
        check(&tally, &truth, 200, seed);
        late += tally.count(Verdict::Late);
        lost += tally.count(LOST);
        broken += truth.broken;
    }
    let is_replay = std::env::var_os("SIM_SEED").is_some();
    assert!(
        is_replay || late > scaled(1_000) && lost > scaled(1_000) && broken > scaled(1_000),
        "{late} late, {lost} lost, {broken} broken"
    );
}

#[test]
fn a_stall_is_latency_and_never_a_hole() {
    for seed in seeds(300) {
        let mut world = World::perfect(seed);
        // When the connection stands.
        let from = START + world.random.between(100 * MS, 3_000 * MS);
        world.stalls = vec![(from, from + 2_500 * MS)];
        world.room = world.random.pick(&[2, usize::MAX]);
        let (tally, truth) = world.run(spec(seed, 200));
        check(&tally, &truth, 200, seed);
        assert_eq!((tally.count(LOST), tally.unsent, tally.attempts), (0, 0, 1), "SIM_SEED={seed}");
        assert!(tally.count(Verdict::Late) > 20, "SIM_SEED={seed}");
    }
}

#[test]
fn a_connection_on_which_nothing_comes_back_is_given_up_and_another_one_made() {
    for seed in seeds(300) {
        let mut world = World::perfect(seed);
        world.stalls = vec![(START + 1_000 * MS, START + 8_000 * MS)];
        let (tally, truth) = world.run(spec(seed, 300));
        check(&tally, &truth, 300, seed);
        assert!(tally.given_up >= 1 && tally.attempts > tally.given_up, "SIM_SEED={seed}: {tally:?}");
        let (last, _) = tally.decided.values().next_back().unwrap();
        assert_eq!(*last, Verdict::Ok, "SIM_SEED={seed}: it recovers");
    }
}

#[test]
fn a_host_that_cannot_connect_by_its_own_fault_sends_nothing_and_loses_nothing() {
    let mut world = World::perfect(1);
    world.attempts = [0.0, 1.0, 0.0];
    let (tally, _) = world.run(spec(1, 100));
    assert_eq!((tally.sent, tally.send_errors + tally.unsent), (0, 100));
}

#[test]
fn attempts_to_connect_grow_rarer_and_never_stop() {
    let mut world = World::perfect(1);
    world.attempts = [1.0, 0.0, 0.0];
    let (tally, _) = world.run(spec(1, 2_400));
    assert_eq!(tally.count(LOST), 2_400);
    assert!((20..=60).contains(&tally.attempts), "{} attempts in two minutes", tally.attempts);
}

#[test]
fn what_a_leaving_peer_does_not_answer_is_withdrawn() {
    let at = |millis: u64| Timestamp::from_nanos(START + millis * MS);
    let mut prober = StreamProber::new(spec(1, 10), at(0));
    let mut tally = Tally::default();
    let wall = WallOffset::between(at(0), WallTime::from_nanos(START));
    let mut drive = |prober: &mut StreamProber, now: Timestamp| loop {
        match prober.step(Now { at: now, drained: now, wall }) {
            StreamStep::Report(report) => tally.take(&report),
            StreamStep::Send(message) => prober.handed(message, now, None),
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
    assert!(tally.sent > 2);
    assert_eq!(tally.count(Verdict::Withdrawn), tally.sent);
}

#[test]
fn a_message_that_the_other_side_could_not_have_seen_is_asked_again_and_counts_from_its_slot() {
    let at = |millis: u64| Timestamp::from_nanos(START + millis * MS);
    let wall = WallOffset::between(at(0), WallTime::from_nanos(START));
    let mut prober = StreamProber::new(StreamSpec { at_once: 1, ..spec(1, 1) }, at(0));
    let mut tally = Tally::default();
    let mut drive = |prober: &mut StreamProber, now: Timestamp| -> Option<Message> {
        loop {
            match prober.step(Now { at: now, drained: now, wall }) {
                StreamStep::Report(report) => tally.take(&report),
                StreamStep::Send(message) => {
                    prober.handed(message, now, None);
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
    prober.returned(message);
    prober.disconnected(at(due + 10), None);
    assert_eq!(drive(&mut prober, at(due + 11)), None, "there is no connection");
    drive(&mut prober, at(due + 200));
    prober.connected(at(due + 200));
    assert_eq!(drive(&mut prober, at(due + 200)), Some(message));
    let by = TimestampSource::User;
    prober.answered(&StreamReply { message, at: at(due + 230), by, turnaround: 0 });
    drive(&mut prober, at(due + 230));
    assert_eq!(tally.decided[&0], (Verdict::Ok, Some(Duration::from_millis(230))));
    assert_eq!((tally.sent, prober.in_flight()), (1, 0));
}

#[test]
fn a_server_that_closes_what_is_idle_makes_neither_loss_nor_failure() {
    for seed in seeds(300) {
        let mut world = World::perfect(seed);
        // Between the messages, which are a second apart and answered within 20 ms; and now and then in the middle of one.
        world.breaks = (0..200).map(|i| START + i * 97 * MS).collect();
        let spec =
            StreamSpec { interval: Duration::from_secs(1), on_demand: true, at_once: 1, ..spec(seed, 15) };
        let (tally, truth) = world.run(spec);
        check(&tally, &truth, 15, seed);
        assert_eq!(tally.count(LOST), truth.broken, "SIM_SEED={seed}");
        assert_eq!(tally.count(Verdict::Late), 0, "SIM_SEED={seed}");
        assert!(tally.attempts <= 15 + 3 * truth.broken + 1, "SIM_SEED={seed}: {} attempts", tally.attempts);
    }
}

/// One message of an HTTP server that closed before it could see it, and what becomes of it.
fn returned(then: impl FnOnce(&mut StreamProber, Timestamp)) -> Tally {
    let at = |millis: u64| Timestamp::from_nanos(START + millis * MS);
    let wall = WallOffset::between(at(0), WallTime::from_nanos(START));
    let mut prober =
        StreamProber::new(StreamSpec { at_once: 1, on_demand: true, count: Some(1), ..spec(1, 1) }, at(0));
    let mut tally = Tally::default();
    let mut drive = |prober: &mut StreamProber, now: Timestamp| -> Option<Message> {
        loop {
            match prober.step(Now { at: now, drained: now, wall }) {
                StreamStep::Report(report) => tally.take(&report),
                StreamStep::Send(message) => {
                    prober.handed(message, now, None);
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
    prober.returned(message);
    prober.disconnected(at(2_000), None);
    then(&mut prober, at(2_001));
    drive(&mut prober, at(2_002));
    prober.connected(at(2_003));
    assert_eq!(drive(&mut prober, at(2_003)), None, "it is asked no more");
    drive(&mut prober, at(120_000));
    assert_eq!(prober.in_flight(), 0);
    tally
}

#[test]
fn a_message_that_came_back_and_that_our_host_cannot_send_again_is_not_lost() {
    let tally = returned(|prober, now| {
        prober.disconnected(now, Some(NotSent::Unreachable));
    });
    assert_eq!((tally.count(LOST), tally.count(Verdict::Withdrawn)), (0, 1));
}

#[test]
fn a_message_that_was_withdrawn_does_not_come_back() {
    let at = |millis: u64| Timestamp::from_nanos(START + millis * MS);
    let wall = WallOffset::between(at(0), WallTime::from_nanos(START));
    let mut prober = StreamProber::new(StreamSpec { at_once: 1, on_demand: true, ..spec(1, 1) }, at(0));
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
    prober.handed(message, at(2_000), None);
    prober.withdraw();
    prober.returned(message);
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
    let asked_again = |step: &StreamStep| matches!(step, StreamStep::Send(sent) if *sent == message);
    assert!(!steps.any(|step| asked_again(&step)));
}

#[test]
fn a_leaving_peer_that_still_answers_over_the_old_connection_is_not_back() {
    let at = |millis: u64| Timestamp::from_nanos(START + millis * MS);
    let mut prober = StreamProber::new(spec(1, 100), at(0));
    let mut tally = Tally::default();
    let wall = WallOffset::between(at(0), WallTime::from_nanos(START));
    let mut drive = |prober: &mut StreamProber, now: Timestamp, is_answered: bool| loop {
        match prober.step(Now { at: now, drained: now, wall }) {
            StreamStep::Report(report) => tally.take(&report),
            StreamStep::Send(message) => {
                prober.handed(message, now, None);
                if is_answered {
                    prober.answered(&StreamReply {
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
    assert_eq!(tally.count(LOST), 0);
    assert!(tally.count(Verdict::Withdrawn) >= 1);
}
