//! The side that asks over a stream: the same schedule and the same verdicts as over datagrams.
//!
//! A stream loses nothing while it stands, it only makes wait. So a message counts from the time at which it was meant to
//! leave, whatever keeps it: a stalled stream shows as latency and then as late, never as a hole. Lost is what had no answer
//! within [`StreamSpec::lost_after`], and what was on a connection that broke. On which half of the way is not known.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use super::absence::Absence;
use super::flow::{Drops, Flow, Purpose, ReplyMatch, ReplyTimes, RequestForm, VerdictRules};
use super::outcome::{EchoReport, Mismatch, RoundTrip, Verdict};
use crate::machine::{HostDrops, NotSent, Now, TimestampSource};
use crate::schedule::{Schedule, mix};
use crate::stats::WindowedMinimum;
use crate::time::Timestamp;
use crate::wire::{Message, NtpTime};

/// What to measure over a stream.
#[derive(Debug, Clone)]
pub struct StreamSpec {
    /// Time between messages.
    pub interval: Duration,
    /// A longer round trip is late.
    pub late_after: Duration,
    /// Without an answer by then a message is lost; a connection on which nothing came back for so long is given up, and
    /// so is an attempt to connect.
    pub lost_after: Duration,
    /// Messages that may be unanswered on a connection at once; further ones wait.
    pub at_once: usize,
    /// Whether the other side may end a connection that serves nothing, as HTTP servers do: then that is no failure, and another
    /// one is made when a message is due.
    pub on_demand: bool,
    /// Slots after which to stop; `None`: never.
    pub count: Option<u64>,
    /// Decides phase, jitter and the pauses between attempts to connect.
    pub seed: u64,
}

/// What a prober asks of its driver.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StreamStep {
    /// Begin a connection. [`StreamProber::connected`] or [`StreamProber::disconnected`] follows.
    Connect,
    /// End the connection, or the attempt: nothing comes back. [`StreamProber::disconnected`] follows.
    Disconnect,
    /// Hand a message to the stream, then call [`StreamProber::handed`].
    Send(Message),
    /// Something was learnt.
    Report(EchoReport),
    /// Nothing to do until then, or until something happens.
    Wait(Timestamp),
    /// Nothing to do ever again.
    Finished,
}

/// An answer as it came off the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamReply {
    /// To what.
    pub message: Message,
    /// When its last byte arrived.
    pub at: Timestamp,
    /// By whose clock reading.
    pub by: TimestampSource,
    /// The responder's part of the round trip in nanoseconds, as it says; 0 where it says nothing.
    pub turnaround: i64,
}

/// Measures one path over one connection at a time.
#[derive(Debug)]
pub struct StreamProber {
    spec: StreamSpec,
    /// `None` until the first attempt to connect has ended: a round trip does not include that one.
    schedule: Option<Schedule>,
    slots_left: u64,
    flow: Flow,
    /// Messages that wait to be handed over, the oldest first.
    waiting: VecDeque<QueuedMessage>,
    /// The first message of this connection that is not answered, and the one after the last that was handed over.
    unanswered: Range<u64>,
    connection: ConnectionState,
    /// Attempts in a row after which nothing was answered.
    failures: u32,
    /// Whether anything was answered on this connection.
    has_answered: bool,
    minimum: WindowedMinimum,
    absence: Option<Absence>,
    is_stopping: bool,
    is_lossy: bool,
    reports: VecDeque<EchoReport>,
}

/// A message that has not been handed over.
#[derive(Debug, Clone, Copy)]
struct QueuedMessage {
    message: Message,
    due: Timestamp,
}

#[derive(Debug, Clone, Copy)]
enum ConnectionState {
    /// There is none, and none is needed before a message is due.
    Unneeded,
    /// There is none; when to try again, and whether it is our host that keeps us from having one.
    None { again: Timestamp, ours: Option<NotSent> },
    /// It is being made.
    Coming { since: Timestamp },
    /// It stands, since then. `heard`: when something last came back, or was first awaited after a silence that was none.
    Up { since: Timestamp, heard: Timestamp, is_blocked: bool },
    /// The driver was asked to end it.
    Ending,
}

impl StreamProber {
    /// The shortest pause between two attempts to connect; it doubles with each attempt that came to nothing. Chosen: 100 ms.
    pub const RETRY_MIN: Duration = Duration::from_millis(100);
    /// The longest pause. Chosen: a third of the time after which a message is lost by default, so that a responder that is
    /// back loses nothing more.
    pub const RETRY_MAX: Duration = Duration::from_secs(5);

    /// A prober that connects at once; its first slot lies within one interval after that.
    #[must_use]
    pub fn new(spec: StreamSpec, at: Timestamp) -> Self {
        Self {
            schedule: None,
            slots_left: spec.count.unwrap_or(u64::MAX),
            flow: Flow::new(0, 0, 0, at),
            waiting: VecDeque::new(),
            unanswered: 0..0,
            connection: ConnectionState::None { again: at, ours: None },
            failures: 0,
            has_answered: false,
            minimum: WindowedMinimum::new(at),
            absence: None,
            is_stopping: false,
            is_lossy: false,
            reports: VecDeque::new(),
            spec,
        }
    }

    /// The connection stands. What waited while the peer was away by its own word is withdrawn.
    pub fn connected(&mut self, at: Timestamp) {
        if self.is_draining(at) {
            self.withdraw();
        }
        self.has_answered = false;
        self.connection = ConnectionState::Up { since: at, heard: at, is_blocked: false };
        self.begin(at);
    }

    /// The connection, or the attempt to make one, has ended. What was on it is lost. `ours`: our own host is to blame, and
    /// what waits is not sent. True if something is wrong; false if it may end like that ([`StreamSpec::on_demand`]).
    pub fn disconnected(&mut self, at: Timestamp, ours: Option<NotSent>) -> bool {
        let was_up = matches!(self.connection, ConnectionState::Up { .. });
        if self.spec.on_demand && was_up && self.unanswered.is_empty() && ours.is_none() {
            if self.waiting.is_empty() {
                self.connection = ConnectionState::Unneeded;
                return false;
            } else if self.has_answered {
                self.connection = ConnectionState::None { again: at, ours: None };
                return false;
            }
        }
        let rules = self.rules();
        let unanswered = std::mem::take(&mut self.unanswered);
        self.flow.give_up(unanswered, at, &rules, &mut self.reports);
        if let Some(why) = ours {
            for QueuedMessage { message, .. } in self.waiting.drain(..) {
                self.flow.not_sent(message.sequence, why, &mut self.reports);
                // One that was handed over before, and came back: it is our host that does not ask again.
                self.flow.withdraw_one(message.sequence, &mut self.reports);
            }
        }
        self.failures = self.failures.saturating_add(1);
        let again = at + self.pause();
        self.connection = ConnectionState::None { again, ours };
        self.begin(at);
        true
    }

    /// The stream took the message that [`StreamStep::Send`] asked for at `at`. `left`: when the kernel let it go on its way,
    /// if it did so while it was handed over. One that had to wait before counts from when it was meant to leave.
    pub fn handed(&mut self, message: Message, at: Timestamp, left: Option<Timestamp>) {
        let Some(QueuedMessage { due, .. }) = self.waiting.pop_front() else { return };
        let sequence = message.sequence;
        if self.unanswered.is_empty() {
            self.unanswered.start = sequence;
            if let ConnectionState::Up { heard, .. } = &mut self.connection {
                *heard = at;
            }
        }
        self.unanswered.end = sequence + 1;
        self.flow.sent(sequence, due, TimestampSource::User, &mut self.reports);
        if let Some(left) = left.filter(|_| due == at) {
            self.flow.sent(sequence, left, TimestampSource::Kernel, &mut self.reports);
        }
    }

    /// The other side had ended the connection before it could see this message, the last that was handed over: it waits
    /// again, as if it never had been.
    pub fn returned(&mut self, message: Message) {
        if let Some(due) = self.flow.in_flight_since(message.sequence) {
            self.unanswered.end = self.unanswered.end.min(message.sequence).max(self.unanswered.start);
            self.waiting.push_front(QueuedMessage { message, due });
        }
    }

    /// The stream takes no further message until [`StreamProber::writable`] is called.
    pub fn blocked(&mut self) {
        if let ConnectionState::Up { is_blocked, .. } = &mut self.connection {
            *is_blocked = true;
        }
    }

    /// The stream takes messages again.
    pub fn writable(&mut self) {
        if let ConnectionState::Up { is_blocked, .. } = &mut self.connection {
            *is_blocked = false;
        }
    }

    /// Something came back; whether it answers a message, in time or not.
    pub fn answered(&mut self, answer: &StreamReply) -> bool {
        let rules = self.rules();
        let StreamReply { message: Message { sequence, timestamp }, at, by, turnaround } = *answer;
        let sent = match self.flow.fit(sequence, timestamp, at, &rules) {
            ReplyMatch::Answer { sent } => sent,
            ReplyMatch::Duplicate => {
                self.reports.push_back(EchoReport::Duplicate);
                return false;
            }
            ReplyMatch::VeryLate => {
                self.heard(at, sequence);
                self.reports.push_back(EchoReport::VeryLate);
                return true;
            }
            ReplyMatch::Unsolicited => {
                self.mismatched(Mismatch::Unsolicited);
                return false;
            }
        };
        self.heard(at, sequence);
        // What stood at the goodbye is answered until it ends: who is back answers over another connection.
        if let (Some(absence), ConnectionState::Up { since, .. }) = (&mut self.absence, self.connection)
            && absence.began_before(since)
        {
            absence.answered(sent);
        }
        let sample = RoundTrip {
            rtt: Duration::ZERO,
            turnaround: Duration::ZERO,
            variation: Duration::ZERO,
            minimum: Duration::ZERO,
            transmit: TimestampSource::User,
            receive: by,
            hops_forward: None,
            hops_reverse: None,
            class_forward: None,
            class_reverse: None,
        };
        self.flow.answer(sequence, ReplyTimes { at, turnaround, sample }, &rules, &mut self.reports);
        true
    }

    /// Something came back that answers nothing.
    pub fn mismatched(&mut self, why: Mismatch) {
        self.reports.push_back(EchoReport::Mismatched(why));
    }

    /// Sends nothing more; `Finished` follows when everything is decided.
    pub fn stop(&mut self) {
        self.is_stopping = true;
    }

    /// Decides everything that is undecided: withdrawn. For a stop that cannot wait, and after a suspend.
    pub fn withdraw(&mut self) {
        for QueuedMessage { message, due } in self.waiting.drain(..) {
            self.flow.sent(message.sequence, due, TimestampSource::User, &mut self.reports);
        }
        let rules = self.rules();
        self.flow.withdraw(&rules, &mut self.reports);
        // What still comes of it shows that the connection stands; that it does not, shows nothing.
        self.unanswered.start = self.unanswered.end;
    }

    /// The peer announced at `at` that it is leaving: what it does not answer from then on is withdrawn. It is back when it
    /// answers over a connection that was made after that.
    pub fn peer_leaving(&mut self, at: Timestamp) {
        self.absence = Some(Absence::begin(at, self.absence));
    }

    /// Whether the peer said goodbye and has not come back.
    #[must_use]
    pub fn is_draining(&self, now: Timestamp) -> bool {
        self.absence.is_some_and(|absence| absence.lasts(now))
    }

    /// Messages that were sent and have no verdict, counted one by one.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flow.in_flight()
    }

    /// What to do next. Called until it answers [`StreamStep::Wait`] or [`StreamStep::Finished`].
    pub fn step(&mut self, now: Now) -> StreamStep {
        if let Some(report) = self.reports.pop_front() {
            return StreamStep::Report(self.complete(report, now.at));
        }
        self.expire(now.drained);
        self.take_what_is_due(now);
        if let Some(report) = self.reports.pop_front().or_else(|| self.lossy_changed()) {
            return StreamStep::Report(self.complete(report, now.at));
        }
        if self.is_over() && self.flow.is_settled() {
            return StreamStep::Finished;
        }
        self.connection_step(now).unwrap_or_else(|| StreamStep::Wait(self.deadline()))
    }

    fn connection_step(&mut self, now: Now) -> Option<StreamStep> {
        match self.connection {
            ConnectionState::Unneeded if self.waiting.is_empty() => None,
            ConnectionState::Unneeded => {
                self.connection = ConnectionState::Coming { since: now.at };
                Some(StreamStep::Connect)
            }
            ConnectionState::None { again, .. } if again <= now.at => {
                self.connection = ConnectionState::Coming { since: now.at };
                Some(StreamStep::Connect)
            }
            ConnectionState::Coming { since } if since + self.spec.lost_after <= now.drained => {
                Some(self.end())
            }
            ConnectionState::Up { heard, .. }
                if !self.unanswered.is_empty() && heard + self.spec.lost_after <= now.drained =>
            {
                Some(self.end())
            }
            ConnectionState::Up { is_blocked: false, .. } if self.has_room() => {
                self.waiting.front().map(|first| StreamStep::Send(first.message))
            }
            ConnectionState::None { .. }
            | ConnectionState::Coming { .. }
            | ConnectionState::Up { .. }
            | ConnectionState::Ending => None,
        }
    }

    fn end(&mut self) -> StreamStep {
        self.connection = ConnectionState::Ending;
        StreamStep::Disconnect
    }

    fn has_room(&self) -> bool {
        let open = self.unanswered.end - self.unanswered.start;
        usize::try_from(open).is_ok_and(|open| open < self.spec.at_once)
    }

    fn take_what_is_due(&mut self, now: Now) {
        while !self.is_over()
            && let Some(schedule) = self.schedule.as_mut().filter(|schedule| schedule.next() <= now.at)
        {
            let due = schedule.take(now.at);
            let skipped = due.skipped.min(self.slots_left);
            self.slots_left -= skipped;
            if skipped > 0 {
                self.reports.push_back(EchoReport::Unsent(skipped));
            }
            if due.slot.is_none() || self.slots_left == 0 {
                break;
            }
            self.slots_left -= 1;
            self.take(now);
        }
    }

    /// A message is due. What our own wake-up was late by is not the stream's fault: it counts from `now`.
    fn take(&mut self, now: Now) {
        if !self.flow.has_room() {
            return self.reports.push_back(EchoReport::Unsent(1));
        }
        let timestamp = NtpTime::from(now.wall.wall(now.at));
        let sequence = self.flow.push(now.at, timestamp, RequestForm::WithoutSession, Purpose::Measure);
        if let ConnectionState::None { ours: Some(why), .. } = self.connection {
            self.flow.not_sent(sequence, why, &mut self.reports);
        } else {
            self.waiting.push_back(QueuedMessage { message: Message { sequence, timestamp }, due: now.at });
        }
    }

    fn expire(&mut self, drained: Timestamp) {
        // What waits is no less late for that.
        while let Some(QueuedMessage { message, due }) = self.waiting.front().copied()
            && due + self.spec.lost_after <= drained
        {
            self.waiting.pop_front();
            self.flow.sent(message.sequence, due, TimestampSource::User, &mut self.reports);
        }
        let rules = self.rules();
        let mut drops = Drops { here: &mut HostDrops::default(), there: &mut HostDrops::default() };
        self.flow.expire(drained, &rules, &mut drops, &mut self.reports);
    }

    fn heard(&mut self, at: Timestamp, sequence: u64) {
        if self.unanswered.contains(&sequence) {
            // In order: what was asked before is answered, or never will be.
            self.unanswered.start = sequence + 1;
            self.failures = 0;
            self.has_answered = true;
            if let ConnectionState::Up { heard, .. } = &mut self.connection {
                *heard = (*heard).max(at);
            }
        }
    }

    fn begin(&mut self, at: Timestamp) {
        self.schedule.get_or_insert_with(|| Schedule::new(at, self.spec.interval, self.spec.seed));
    }

    /// Between half of a doubling pause and the whole of it: agents that lost the same responder do not return as one.
    fn pause(&self) -> Duration {
        let doubled = Self::RETRY_MIN.saturating_mul(1 << self.failures.saturating_sub(1).min(16));
        let whole = doubled.min(Self::RETRY_MAX);
        let share = mix(self.spec.seed ^ mix(u64::from(self.failures) ^ self.flow.upcoming().0)) % 1_000;
        let share = u32::try_from(share).expect("below a thousand");
        whole / 2 + whole / 2 * share / 1_000
    }

    fn deadline(&self) -> Timestamp {
        let connection = match self.connection {
            ConnectionState::None { again, .. } => again,
            ConnectionState::Coming { since } => since + self.spec.lost_after,
            ConnectionState::Up { heard, .. } if !self.unanswered.is_empty() => heard + self.spec.lost_after,
            ConnectionState::Up { .. } | ConnectionState::Ending | ConnectionState::Unneeded => {
                Timestamp::NEVER
            }
        };
        let next =
            self.schedule.as_ref().filter(|_| !self.is_over()).map_or(Timestamp::NEVER, Schedule::next);
        connection.min(next).min(self.flow.deadline(&self.rules()))
    }

    fn is_over(&self) -> bool {
        self.is_stopping || self.slots_left == 0
    }

    fn rules(&self) -> VerdictRules {
        VerdictRules {
            late_after: self.spec.late_after,
            lost_after: self.spec.lost_after,
            horizon: Duration::ZERO,
            tx_timestamps: false,
            absence: self.absence,
        }
    }

    fn complete(&mut self, mut report: EchoReport, now: Timestamp) -> EchoReport {
        if let EchoReport::Decided { verdict: Verdict::Ok, sample: Some(sample), .. } = &mut report {
            sample.minimum = self.minimum.add(now, sample.rtt);
            sample.variation = sample.rtt - sample.minimum;
        }
        report
    }

    fn lossy_changed(&mut self) -> Option<EchoReport> {
        let is_lossy = self.flow.loss.is_lossy();
        let was = std::mem::replace(&mut self.is_lossy, is_lossy);
        (was != is_lossy).then(|| EchoReport::LossyFlows(is_lossy.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::{WallOffset, WallTime};

    const LOST_AFTER: Duration = Duration::from_millis(3_000);

    fn spec() -> StreamSpec {
        StreamSpec {
            interval: Duration::from_millis(100),
            late_after: Duration::from_millis(1_000),
            lost_after: LOST_AFTER,
            at_once: 1_000,
            on_demand: false,
            count: None,
            seed: 1,
        }
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    const NANOSECOND: Duration = Duration::from_nanos(1);

    /// A prober whose stream a test is.
    struct Hand {
        prober: StreamProber,
        at: Timestamp,
        reports: Vec<EchoReport>,
    }

    impl Hand {
        fn new(spec: StreamSpec) -> Self {
            let at = Timestamp::from_nanos(1_000_000_000_000);
            Self { prober: StreamProber::new(spec, at), at, reports: Vec::new() }
        }

        /// One with a connection that stands.
        fn connected(spec: StreamSpec) -> Self {
            let mut hand = Self::new(spec);
            assert_eq!(hand.step(), StreamStep::Connect);
            hand.prober.connected(hand.at);
            hand
        }

        fn now(at: Timestamp) -> Now {
            let wall = WallOffset::between(Timestamp::from_nanos(0), WallTime::from_nanos(0));
            Now { at, drained: at, wall }
        }

        /// What it asks for at this time, besides taking reports.
        fn step(&mut self) -> StreamStep {
            loop {
                match self.prober.step(Self::now(self.at)) {
                    StreamStep::Report(report) => self.reports.push(report),
                    StreamStep::Wait(until) => {
                        assert!(until > self.at, "it waits for what is past");
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

        /// Lets time pass until a message is due, and returns it without handing it over.
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

        /// Lets time pass until a message is due, and hands it over.
        fn send(&mut self) -> Message {
            let message = self.due();
            self.prober.handed(message, self.at, None);
            message
        }

        fn answer(&mut self, message: Message, at: Timestamp) -> bool {
            self.prober.answered(&StreamReply { message, at, by: TimestampSource::Kernel, turnaround: 0 })
        }

        /// All reports that are waiting, without letting anything become due.
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

        /// What happens up to that time, while messages are taken and none is answered. Connecting takes no time.
        fn pass(&mut self, until: Timestamp) {
            loop {
                match self.step() {
                    StreamStep::Wait(next) if next > until => {
                        self.at = until;
                        return;
                    }
                    StreamStep::Wait(next) => self.at = next,
                    StreamStep::Send(message) => self.prober.handed(message, self.at, None),
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
            let mut hand = Hand::new(spec());
            assert_eq!(hand.step(), StreamStep::Connect);
            let attempt_ends = hand.at + LOST_AFTER;
            assert_eq!(hand.wait(), attempt_ends, "nothing else is due");
            hand.at = hand.at + ms(2_000);
            match is_connected {
                true => hand.prober.connected(hand.at),
                false => assert!(hand.prober.disconnected(hand.at, None)),
            }
            let slot = hand.prober.schedule.as_ref().unwrap().next();
            assert!(slot > hand.at && slot <= hand.at + ms(150));
            assert!(hand.wait() <= slot);
        }
    }

    #[test]
    fn attempt_to_connect_that_takes_as_long_as_a_loss_is_given_up() {
        let mut hand = Hand::new(spec());
        assert_eq!(hand.step(), StreamStep::Connect);
        let began = hand.at;
        hand.at = began + LOST_AFTER - NANOSECOND;
        assert_eq!(hand.wait(), began + LOST_AFTER);
        hand.at = began + LOST_AFTER;
        assert_eq!(hand.step(), StreamStep::Disconnect);
        assert_eq!(hand.wait(), Timestamp::NEVER, "it is asked for once");
        assert!(hand.prober.disconnected(hand.at, None));
    }

    #[test]
    fn pause_between_attempts_doubles_up_to_five_seconds_and_is_never_less_than_half() {
        for seed in 0..200 {
            let mut hand = Hand::new(StreamSpec { seed, interval: Duration::from_secs(3_600), ..spec() });
            for whole in [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000] {
                assert_eq!(hand.step(), StreamStep::Connect);
                let failed = hand.at;
                assert!(hand.prober.disconnected(failed, None));
                hand.at = hand.wait();
                let pause = hand.at.since(failed);
                assert!(ms(whole) / 2 <= pause && pause < ms(whole), "seed {seed}: {pause:?} of {whole} ms");
            }
            assert_eq!(hand.step(), StreamStep::Connect);
        }
        let pauses = (0..200).map(|seed| {
            let mut hand = Hand::new(StreamSpec { seed, interval: Duration::from_secs(3_600), ..spec() });
            hand.prober.failures = 1;
            hand.prober.pause().as_micros()
        });
        let (least, most) = pauses.fold((u128::MAX, 0), |(least, most), p| (least.min(p), most.max(p)));
        assert!(least < 52_000 && most > 98_000, "{least} µs to {most} µs");
    }

    #[test]
    fn answer_makes_the_next_pause_short_again() {
        let mut hand = Hand::new(spec());
        hand.prober.failures = 9;
        assert_eq!(hand.step(), StreamStep::Connect);
        hand.prober.connected(hand.at);
        let message = hand.send();
        assert!(hand.answer(message, hand.at + ms(1)));
        hand.prober.disconnected(hand.at, None);
        assert_eq!(hand.prober.failures, 1);
        let again = hand.prober.deadline().since(hand.at);
        assert!(again <= ms(100), "{again:?}");
    }

    #[test]
    fn connection_on_which_nothing_comes_back_is_given_up_when_a_message_would_be_lost() {
        let mut hand = Hand::connected(StreamSpec { at_once: 1, ..spec() });
        let first = hand.send();
        let sent = hand.at;
        hand.answer(first, sent + ms(20));
        hand.at = sent + ms(20);
        // A silence in which nothing was asked is none.
        hand.at = sent + ms(50);
        let _ = hand.send();
        let asked = hand.at;
        hand.at = asked + LOST_AFTER - NANOSECOND;
        assert!(hand.wait() <= asked + LOST_AFTER);
        hand.at = asked + LOST_AFTER;
        assert_eq!(hand.step(), StreamStep::Disconnect);
        assert!(hand.prober.disconnected(hand.at, None));
        let known = hand.verdicts();
        assert_eq!(known[..2], [(0, Verdict::Ok), (1, LOST)]);
    }

    #[test]
    fn each_answer_shows_that_the_connection_stands() {
        let mut hand = Hand::connected(spec());
        let [first, second, third] = [(); 3].map(|()| hand.send());
        let sent = hand.at;
        hand.answer(second, sent + ms(900));
        assert_eq!(hand.prober.unanswered, 2..3, "what was asked before never will be answered");
        assert!(hand.answer(first, sent + ms(950)), "it is all the same if it comes");
        hand.at = sent + ms(1_000);
        hand.pass(sent + ms(3_899));
        assert!(matches!(hand.prober.connection, ConnectionState::Up { .. }));
        let is_late = hand.answer(third, sent + ms(3_899));
        assert!(is_late && hand.flush().contains(&EchoReport::VeryLate));
        assert!(!hand.answer(third, sent + ms(3_899)) || hand.flush().contains(&EchoReport::VeryLate));
        hand.pass(sent + ms(5_000));
        assert!(matches!(hand.prober.connection, ConnectionState::Up { .. }), "a late answer is one");
    }

    #[test]
    fn message_that_was_answered_is_not_answered_again_and_a_stranger_answers_nothing() {
        let mut hand = Hand::connected(spec());
        let message = hand.send();
        let heard = hand.at + ms(5);
        assert!(hand.answer(message, heard));
        hand.flush();
        assert!(!hand.answer(message, heard));
        let stranger = Message { timestamp: NtpTime(message.timestamp.0 ^ 1), ..message };
        assert!(!hand.answer(stranger, heard));
        assert!(!hand.answer(Message { sequence: 7, ..message }, heard));
        let unasked = EchoReport::Mismatched(Mismatch::Unsolicited);
        assert_eq!(hand.flush(), [EchoReport::Duplicate, unasked, unasked]);
        hand.prober.mismatched(Mismatch::Malformed);
        assert_eq!(hand.flush(), [EchoReport::Mismatched(Mismatch::Malformed)]);
    }

    #[test]
    fn message_counts_from_the_kernels_time_only_if_nothing_kept_it_before() {
        for (kept, rtt) in [(Duration::ZERO, ms(9)), (ms(2), ms(12))] {
            let mut hand = Hand::connected(spec());
            let message = hand.due();
            let due = hand.at;
            hand.prober.handed(message, due + kept, Some(due + kept + ms(1)));
            assert_eq!(hand.prober.in_flight(), 1);
            hand.answer(message, due + kept + ms(10));
            let reports = hand.flush();
            let sample = reports.iter().find_map(|report| {
                let EchoReport::Decided { sample, .. } = report else { return None };
                *sample
            });
            assert_eq!(sample.map(|sample| sample.rtt), Some(rtt));
            assert_eq!(reports[0], EchoReport::Sent { flow: 0, sequence: 0 });
            assert_eq!(hand.prober.in_flight(), 0);
        }
    }

    #[test]
    fn variation_is_what_a_round_trip_has_above_the_smallest() {
        let mut hand = Hand::connected(spec());
        for (rtt, minimum) in [(9, 9), (5, 5), (8, 5)] {
            let message = hand.send();
            hand.answer(message, hand.at + ms(rtt));
            hand.step();
            let samples = std::mem::take(&mut hand.reports).into_iter().filter_map(|report| {
                let EchoReport::Decided { sample, .. } = report else { return None };
                sample
            });
            let [sample] = samples.collect::<Vec<RoundTrip>>()[..] else { panic!("one is answered") };
            assert_eq!((sample.minimum, sample.variation), (ms(minimum), ms(rtt) - ms(minimum)));
        }
    }

    #[test]
    fn only_so_many_messages_are_unanswered_at_once_and_none_is_sent_into_a_full_stream() {
        let mut hand = Hand::connected(StreamSpec { at_once: 2, ..spec() });
        let first = hand.send();
        hand.send();
        hand.at = hand.wait();
        assert!(matches!(hand.step(), StreamStep::Wait(_)), "two are unanswered");
        assert_eq!((hand.prober.waiting.len(), hand.prober.in_flight()), (1, 2));
        hand.answer(first, hand.at);
        hand.prober.blocked();
        assert!(matches!(hand.step(), StreamStep::Wait(_)), "the stream is full");
        hand.prober.writable();
        assert!(matches!(hand.step(), StreamStep::Send(message) if message.sequence == 2));
    }

    #[test]
    fn message_that_waits_is_lost_when_its_time_is_over() {
        let mut hand = Hand::connected(StreamSpec { count: Some(1), ..spec() });
        hand.prober.blocked();
        hand.at = hand.wait();
        let due = hand.at;
        assert_eq!(hand.wait(), due + LOST_AFTER);
        hand.at = due + LOST_AFTER - NANOSECOND;
        hand.step();
        assert_eq!(hand.verdicts(), []);
        hand.at = due + LOST_AFTER;
        assert_eq!(hand.step(), StreamStep::Finished);
        assert_eq!(hand.verdicts(), [(0, LOST)]);
    }

    #[test]
    fn server_may_end_an_idle_connection_where_it_serves_on_demand() {
        let idle = |change: &dyn Fn(&mut Hand)| {
            let mut hand = Hand::connected(StreamSpec { on_demand: true, ..spec() });
            let message = hand.send();
            hand.answer(message, hand.at + ms(1));
            change(&mut hand);
            hand
        };
        let mut hand = idle(&|_| ());
        assert!(!hand.prober.disconnected(hand.at, None));
        assert_eq!(hand.prober.failures, 0);
        // Another one is made when a message is due, and not before.
        let slot = hand.wait();
        assert_eq!(slot, hand.prober.schedule.as_ref().unwrap().next());
        hand.at = slot;
        assert_eq!(hand.step(), StreamStep::Connect);
        // One that waits is sent over another one at once, if this one served.
        let mut hand = idle(&|hand| {
            hand.due();
        });
        assert!(!hand.prober.disconnected(hand.at, None));
        assert_eq!(hand.step(), StreamStep::Connect);
        let mut hand = Hand::connected(StreamSpec { on_demand: true, ..spec() });
        hand.due();
        assert!(hand.prober.disconnected(hand.at, None), "it served nothing");
        // Anything else is a failure.
        let mut hand = idle(&|hand| {
            hand.send();
        });
        assert!(hand.prober.disconnected(hand.at, None), "a message was on it");
        let mut hand = idle(&|_| ());
        assert!(hand.prober.disconnected(hand.at, Some(NotSent::Unreachable)), "it was our host");
        let mut hand = idle(&|hand| hand.prober.spec.on_demand = false);
        assert!(hand.prober.disconnected(hand.at, None));
        let mut hand = Hand::new(StreamSpec { on_demand: true, ..spec() });
        hand.step();
        assert!(hand.prober.disconnected(hand.at, None), "an attempt to connect");
    }

    #[test]
    fn message_that_came_back_makes_room_and_is_sent_first() {
        let mut hand = Hand::connected(StreamSpec { at_once: 2, ..spec() });
        let first = hand.send();
        let second = hand.send();
        assert_eq!(hand.prober.unanswered, 0..2);
        hand.prober.returned(second);
        assert_eq!(hand.prober.unanswered, 0..1);
        assert_eq!(hand.step(), StreamStep::Send(second));
        hand.prober.handed(second, hand.at, None);
        assert_eq!(hand.prober.unanswered, 0..2);
        hand.answer(first, hand.at);
        hand.prober.returned(first);
        assert_eq!(hand.prober.unanswered, 1..2, "what is answered does not come back");
        hand.answer(second, hand.at);
        let third = hand.send();
        hand.prober.withdraw();
        hand.prober.returned(third);
        assert!(hand.prober.waiting.is_empty(), "nor does what is withdrawn");
    }

    #[test]
    fn what_waits_is_withdrawn_when_a_peer_that_left_is_back() {
        let mut hand = Hand::connected(spec());
        hand.prober.blocked();
        hand.at = hand.wait();
        hand.step();
        assert_eq!(hand.prober.waiting.len(), 1);
        hand.prober.peer_leaving(hand.at);
        hand.prober.disconnected(hand.at, None);
        assert!(hand.prober.is_draining(hand.at));
        hand.prober.connected(hand.at + ms(1));
        assert_eq!(hand.verdicts(), [(0, Verdict::Withdrawn)]);
        // It is back with the first answer to what was sent over a connection that is younger than the goodbye.
        hand.at = hand.at + ms(1);
        let message = hand.send();
        assert!(hand.prober.is_draining(hand.at));
        hand.answer(message, hand.at);
        assert!(!hand.prober.is_draining(hand.at));
        hand.prober.disconnected(hand.at, None);
        hand.due_without_connection();
        hand.prober.connected(hand.at);
        assert_eq!(hand.prober.waiting.len(), 1, "a peer that did not leave keeps what waits");
    }

    impl Hand {
        /// Lets time pass until a message waits.
        fn due_without_connection(&mut self) {
            self.prober.connection = ConnectionState::Ending;
            while self.prober.waiting.is_empty() {
                self.at = self.wait();
                self.step();
            }
        }
    }

    #[test]
    fn withdrawal_decides_what_was_sent_and_what_waits_and_leaves_the_connection() {
        let mut hand = Hand::connected(StreamSpec { at_once: 1, ..spec() });
        let first = hand.send();
        hand.at = hand.wait();
        hand.step();
        hand.prober.withdraw();
        assert_eq!(hand.verdicts(), [(0, Verdict::Withdrawn), (1, Verdict::Withdrawn)]);
        assert_eq!((hand.prober.in_flight(), hand.prober.waiting.len()), (0, 0));
        assert!(hand.prober.unanswered.is_empty(), "that nothing comes back shows nothing");
        assert!(hand.answer(first, hand.at), "what does, shows that it stands");
        assert_eq!(hand.flush(), [EchoReport::VeryLate]);
    }

    #[test]
    fn prober_without_a_connection_by_its_hosts_fault_sends_nothing() {
        let mut hand = Hand::connected(StreamSpec { count: Some(3), ..spec() });
        hand.prober.blocked();
        hand.at = hand.wait();
        hand.step();
        assert!(hand.prober.disconnected(hand.at, Some(NotSent::Buffer)));
        assert_eq!(hand.flush(), [EchoReport::SendError(NotSent::Buffer)], "what waits");
        hand.prober.connection =
            ConnectionState::None { again: Timestamp::NEVER, ours: Some(NotSent::Unreachable) };
        let slot = hand.prober.schedule.as_ref().unwrap().next();
        assert_eq!(hand.wait(), slot);
        hand.at = slot;
        let next = hand.wait();
        assert_eq!(hand.flush(), [EchoReport::SendError(NotSent::Unreachable)], "what becomes due");
        hand.at = next;
        assert_eq!(hand.step(), StreamStep::Finished);
    }

    #[test]
    fn prober_that_is_stopped_finishes_when_everything_is_decided() {
        let mut hand = Hand::connected(spec());
        hand.send();
        let sent = hand.at;
        hand.prober.stop();
        assert_eq!(hand.wait(), sent + LOST_AFTER);
        hand.at = sent + LOST_AFTER;
        assert_eq!(hand.step(), StreamStep::Finished);
        assert_eq!(hand.verdicts(), [(0, LOST)]);
        let mut hand = Hand::connected(StreamSpec { count: Some(1), ..spec() });
        let message = hand.send();
        assert!(matches!(hand.step(), StreamStep::Wait(_)), "its only slot is over and nothing is decided");
        hand.answer(message, hand.at);
        assert_eq!(hand.step(), StreamStep::Finished);
    }

    #[test]
    fn slots_that_pass_while_the_prober_does_not_run_are_not_sent_and_count() {
        for (count, unsent, waiting) in [(100, 99, 1), (50, 50, 0), (101, 99, 1)] {
            let mut slots = Schedule::new(Timestamp::from_nanos(1_000_000_000_000), ms(100), 1);
            let hundredth = (0..100).map(|_| slots.take(slots.next()).slot.unwrap()).last().unwrap();
            let mut hand = Hand::connected(StreamSpec { count: Some(count), ..spec() });
            hand.prober.blocked();
            hand.at = hundredth;
            hand.step();
            assert_eq!(hand.prober.waiting.len(), waiting, "of {count}");
            assert_eq!(hand.flush(), [EchoReport::Unsent(unsent)], "of {count}");
        }
    }

    #[test]
    fn stream_is_lossy_from_its_second_loss_on_and_that_is_reported_once() {
        let mut hand = Hand::connected(StreamSpec { count: Some(3), ..spec() });
        hand.pass(hand.at + Duration::from_secs(30));
        let changes = |report: &&EchoReport| matches!(report, EchoReport::LossyFlows(_));
        let changes: Vec<EchoReport> = hand.reports.iter().filter(changes).copied().collect();
        assert_eq!(changes, [EchoReport::LossyFlows(1)]);
        assert_eq!(hand.verdicts(), [(0, LOST), (1, LOST), (2, LOST)]);
    }

    #[test]
    fn stream_with_as_many_undecided_messages_as_a_flow_takes_skips_its_slots() {
        let mut hand = Hand::connected(StreamSpec { interval: Duration::from_micros(10), ..spec() });
        hand.prober.blocked();
        while hand.prober.waiting.len() < Flow::PENDING {
            hand.at = hand.wait();
            hand.step();
        }
        hand.flush();
        let (slot, unsent) = (hand.wait(), hand.flush());
        assert_eq!(unsent, []);
        hand.at = slot;
        hand.step();
        assert_eq!((hand.flush(), hand.prober.waiting.len()), (vec![EchoReport::Unsent(1)], Flow::PENDING));
    }
}
