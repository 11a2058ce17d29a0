//! The sending side of echo measurements over a stream, with the same schedule and the same verdicts as over
//! datagrams.
//!
//! A stream loses nothing while its connection lasts; it only delays. Latency therefore counts from the time
//! at which a message was due, whatever delays the message: a stalled stream shows as rising latency and late
//! messages, not as a gap. A message is lost if it has no answer within [`StreamSpec::lost_after`], or if its
//! connection breaks. The direction of a loss is not known.

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

/// Parameters of a [`StreamProber`].
#[derive(Debug, Clone)]
pub struct StreamSpec {
    /// Time between messages.
    pub interval: Duration,
    /// Round trips longer than this are late.
    pub late_after: Duration,
    /// A message without an answer after this time is lost. A connection on which nothing is received for
    /// this long is given up, and so is an attempt to connect.
    pub lost_after: Duration,
    /// Maximum number of unanswered messages on a connection; further messages wait.
    pub unanswered_max: usize,
    /// Whether the peer may close an idle connection, as HTTP servers do. This is then not a failure, and the
    /// next connection is opened when a message is due.
    pub on_demand: bool,
    /// Number of slots; `None`: unlimited.
    pub count: Option<u64>,
    /// Determines the phase, the jitter and the pauses between attempts to connect.
    pub seed: u64,
}

/// What a stream prober wants its driver to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StreamStep {
    /// Open a connection. [`StreamProber::connected`] or [`StreamProber::disconnected`] follows.
    Connect,
    /// Close the connection, or give up the attempt to connect. [`StreamProber::disconnected`] follows.
    Disconnect,
    /// Write a message to the stream, then call [`StreamProber::sent`].
    Send(Message),
    /// A result for the driver's user.
    Report(EchoReport),
    /// Nothing to do until this time or the next event.
    Wait(Timestamp),
    /// The prober has stopped and must not be called again.
    Finished,
}

/// A reply that was read from the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamReply {
    /// The message that it answers.
    pub message: Message,
    /// Arrival of its last byte.
    pub at: Timestamp,
    /// Where `at` was taken.
    pub by: TimestampSource,
    /// The responder's part of the round trip in nanoseconds, as the responder reports it; 0 if it does not.
    pub turnaround: i64,
}

/// Measures one path over one connection at a time.
#[derive(Debug)]
pub struct StreamProber {
    spec: StreamSpec,
    /// `None` until the first attempt to connect has ended, so that no round trip includes that attempt.
    schedule: Option<Schedule>,
    slots_left: u64,
    flow: Flow,
    /// Messages that wait to be written, oldest first.
    waiting: VecDeque<QueuedMessage>,
    /// The first unanswered message of this connection, and the one after the last that was written.
    unanswered: Range<u64>,
    connection: ConnectionState,
    /// Number of consecutive connections and attempts without an answer.
    failures: u32,
    /// Whether any message was answered on this connection.
    has_answered: bool,
    minimum: WindowedMinimum,
    absence: Option<Absence>,
    is_stopping: bool,
    is_lossy: bool,
    reports: VecDeque<EchoReport>,
}

/// A message that was not yet written to the stream.
#[derive(Debug, Clone, Copy)]
struct QueuedMessage {
    message: Message,
    due: Timestamp,
}

#[derive(Debug, Clone, Copy)]
enum ConnectionState {
    /// No connection, and none is needed before a message is due.
    Idle,
    /// No connection. Time of the next attempt, and the local error if this host is the cause.
    Down { retry_at: Timestamp, local_error: Option<NotSent> },
    /// An attempt to connect is in progress.
    Connecting { since: Timestamp },
    /// Connected. `last_reply`: arrival of the last reply, or the time from which the first one is awaited
    /// after an idle period.
    Connected { since: Timestamp, last_reply: Timestamp, is_blocked: bool },
    /// The driver was told to close it.
    Disconnecting,
}

impl StreamProber {
    /// The shortest pause between two attempts to connect; it doubles with each failure. Chosen: 100 ms.
    pub const RETRY_MIN: Duration = Duration::from_millis(100);
    /// The longest pause between two attempts to connect. Chosen: a third of the default `lost_after`, so
    /// that little is lost after the responder is back.
    pub const RETRY_MAX: Duration = Duration::from_secs(5);

    /// A prober that connects at once. Its schedule begins when that attempt ends.
    #[must_use]
    pub fn new(spec: StreamSpec, at: Timestamp) -> Self {
        Self {
            schedule: None,
            slots_left: spec.count.unwrap_or(u64::MAX),
            flow: Flow::new(0, 0, 0, at),
            waiting: VecDeque::new(),
            unanswered: 0..0,
            connection: ConnectionState::Down { retry_at: at, local_error: None },
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

    /// The connection was opened. Messages that waited during an announced absence of the peer are withdrawn.
    pub fn connected(&mut self, at: Timestamp) {
        if self.is_draining(at) {
            self.withdraw();
        }
        self.has_answered = false;
        self.connection = ConnectionState::Connected { since: at, last_reply: at, is_blocked: false };
        self.start_schedule(at);
    }

    /// The connection, or the attempt to connect, has ended. Messages in flight on it are lost. With a local
    /// error, this host is the cause, and waiting messages count as not sent. Returns whether this is a
    /// failure; false if the peer may close the connection at this point ([`StreamSpec::on_demand`]).
    pub fn disconnected(&mut self, at: Timestamp, local_error: Option<NotSent>) -> bool {
        let was_connected = matches!(self.connection, ConnectionState::Connected { .. });
        if self.spec.on_demand && was_connected && self.unanswered.is_empty() && local_error.is_none() {
            if self.waiting.is_empty() {
                self.connection = ConnectionState::Idle;
                return false;
            } else if self.has_answered {
                self.connection = ConnectionState::Down { retry_at: at, local_error: None };
                return false;
            }
        }
        let rules = self.rules();
        let unanswered = std::mem::take(&mut self.unanswered);
        self.flow.give_up(unanswered, at, &rules, &mut self.reports);
        if let Some(why) = local_error {
            for QueuedMessage { message, .. } in self.waiting.drain(..) {
                self.flow.not_sent(message.sequence, why, &mut self.reports);
                // A message that was sent before and not delivered: this host cannot send it again, so it is
                // withdrawn.
                self.flow.withdraw_one(message.sequence, &mut self.reports);
            }
        }
        self.failures = self.failures.saturating_add(1);
        let retry_at = at + self.retry_pause();
        self.connection = ConnectionState::Down { retry_at, local_error };
        self.start_schedule(at);
        true
    }

    /// The stream accepted the message of [`StreamStep::Send`] at `at`. `left`: the kernel's transmit
    /// timestamp, if it is known already. It is not used if the message had to wait, because latency then
    /// counts from its due time.
    pub fn sent(&mut self, message: Message, at: Timestamp, left: Option<Timestamp>) {
        let Some(QueuedMessage { due, .. }) = self.waiting.pop_front() else { return };
        let sequence = message.sequence;
        if self.unanswered.is_empty() {
            self.unanswered.start = sequence;
            if let ConnectionState::Connected { last_reply, .. } = &mut self.connection {
                *last_reply = at;
            }
        }
        self.unanswered.end = sequence + 1;
        self.flow.sent(sequence, due, TimestampSource::User, &mut self.reports);
        if let Some(left) = left.filter(|_| due == at) {
            self.flow.sent(sequence, left, TimestampSource::Kernel, &mut self.reports);
        }
    }

    /// The peer had closed the connection before it could read this message, the last that was written: it
    /// waits again as if it had not been written.
    pub fn undelivered(&mut self, message: Message) {
        if let Some(due) = self.flow.in_flight_since(message.sequence) {
            self.unanswered.end = self.unanswered.end.min(message.sequence).max(self.unanswered.start);
            self.waiting.push_front(QueuedMessage { message, due });
        }
    }

    /// The stream accepts no more messages until [`StreamProber::writable`] is called.
    pub fn blocked(&mut self) {
        if let ConnectionState::Connected { is_blocked, .. } = &mut self.connection {
            *is_blocked = true;
        }
    }

    /// The stream accepts messages again.
    pub fn writable(&mut self) {
        if let ConnectionState::Connected { is_blocked, .. } = &mut self.connection {
            *is_blocked = false;
        }
    }

    /// Takes a reply; returns whether it answers a message, in time or not.
    pub fn received(&mut self, reply: &StreamReply) -> bool {
        let rules = self.rules();
        let StreamReply { message: Message { sequence, timestamp }, at, by, turnaround } = *reply;
        let sent = match self.flow.match_reply(sequence, timestamp, at, &rules) {
            ReplyMatch::Answer { sent } => sent,
            ReplyMatch::Duplicate => {
                self.reports.push_back(EchoReport::Duplicate);
                return false;
            }
            ReplyMatch::VeryLate => {
                self.reply_received(at, sequence);
                self.reports.push_back(EchoReport::VeryLate);
                return true;
            }
            ReplyMatch::Unsolicited => {
                self.mismatched(Mismatch::Unsolicited);
                return false;
            }
        };
        self.reply_received(at, sequence);
        // A connection that was open at the goodbye may still deliver answers. The peer is back when it
        // answers over a later connection.
        if let (Some(absence), ConnectionState::Connected { since, .. }) =
            (&mut self.absence, self.connection)
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
        self.flow.accept_reply(sequence, ReplyTimes { at, turnaround, sample }, &rules, &mut self.reports);
        true
    }

    /// A received message was not a valid reply.
    pub fn mismatched(&mut self, why: Mismatch) {
        self.reports.push_back(EchoReport::Mismatched(why));
    }

    /// Stops sending; [`StreamStep::Finished`] follows when every message has a verdict.
    pub fn stop(&mut self) {
        self.is_stopping = true;
    }

    /// Decides all undecided messages as withdrawn: for a stop that cannot wait, and after a suspend.
    pub fn withdraw(&mut self) {
        for QueuedMessage { message, due } in self.waiting.drain(..) {
            self.flow.sent(message.sequence, due, TimestampSource::User, &mut self.reports);
        }
        let rules = self.rules();
        self.flow.withdraw(&rules, &mut self.reports);
        // A later answer to a withdrawn message shows that the connection works; a missing answer shows
        // nothing.
        self.unanswered.start = self.unanswered.end;
    }

    /// The peer announced at `at` that it is about to stop. Messages that it does not answer after that are
    /// withdrawn. It is back when it answers over a connection that was opened later.
    pub fn peer_leaving(&mut self, at: Timestamp) {
        self.absence = Some(Absence::begin(at, self.absence));
    }

    /// Whether the peer said goodbye and is not back yet.
    #[must_use]
    pub fn is_draining(&self, now: Timestamp) -> bool {
        self.absence.is_some_and(|absence| absence.lasts(now))
    }

    /// Number of sent messages without a verdict. Takes time linear in that number.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flow.in_flight()
    }

    /// Returns what to do next. Called until it returns [`StreamStep::Wait`] or [`StreamStep::Finished`].
    pub fn step(&mut self, now: Now) -> StreamStep {
        if let Some(report) = self.reports.pop_front() {
            return StreamStep::Report(self.complete(report, now.at));
        }
        self.expire(now.drained);
        self.take_due_slots(now);
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
            ConnectionState::Idle if self.waiting.is_empty() => None,
            ConnectionState::Idle => {
                self.connection = ConnectionState::Connecting { since: now.at };
                Some(StreamStep::Connect)
            }
            ConnectionState::Down { retry_at, .. } if retry_at <= now.at => {
                self.connection = ConnectionState::Connecting { since: now.at };
                Some(StreamStep::Connect)
            }
            ConnectionState::Connecting { since } if since + self.spec.lost_after <= now.drained => {
                Some(self.disconnect())
            }
            ConnectionState::Connected { last_reply, .. }
                if !self.unanswered.is_empty() && last_reply + self.spec.lost_after <= now.drained =>
            {
                Some(self.disconnect())
            }
            ConnectionState::Connected { is_blocked: false, .. } if self.has_room() => {
                self.waiting.front().map(|first| StreamStep::Send(first.message))
            }
            ConnectionState::Down { .. }
            | ConnectionState::Connecting { .. }
            | ConnectionState::Connected { .. }
            | ConnectionState::Disconnecting => None,
        }
    }

    fn disconnect(&mut self) -> StreamStep {
        self.connection = ConnectionState::Disconnecting;
        StreamStep::Disconnect
    }

    fn has_room(&self) -> bool {
        let unanswered = self.unanswered.end - self.unanswered.start;
        usize::try_from(unanswered).is_ok_and(|unanswered| unanswered < self.spec.unanswered_max)
    }

    fn take_due_slots(&mut self, now: Now) {
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
            self.enqueue(now);
        }
    }

    /// A message is due. It counts from `now`: the delay of this process's own wake-up is not part of the
    /// latency.
    fn enqueue(&mut self, now: Now) {
        if !self.flow.has_room() {
            return self.reports.push_back(EchoReport::Unsent(1));
        }
        let timestamp = NtpTime::from(now.wall.wall(now.at));
        let sequence = self.flow.push(now.at, timestamp, RequestForm::WithoutSession, Purpose::Measure);
        if let ConnectionState::Down { local_error: Some(why), .. } = self.connection {
            self.flow.not_sent(sequence, why, &mut self.reports);
        } else {
            self.waiting.push_back(QueuedMessage { message: Message { sequence, timestamp }, due: now.at });
        }
    }

    fn expire(&mut self, drained: Timestamp) {
        // A waiting message has the same deadline as one in flight.
        while let Some(QueuedMessage { message, due }) = self.waiting.front().copied()
            && due + self.spec.lost_after <= drained
        {
            self.waiting.pop_front();
            self.flow.sent(message.sequence, due, TimestampSource::User, &mut self.reports);
        }
        let rules = self.rules();
        let mut drops = Drops { local: &mut HostDrops::default(), remote: &mut HostDrops::default() };
        self.flow.expire(drained, &rules, &mut drops, &mut self.reports);
    }

    fn reply_received(&mut self, at: Timestamp, sequence: u64) {
        if self.unanswered.contains(&sequence) {
            // Answers arrive in order: an earlier message is answered already or never will be.
            self.unanswered.start = sequence + 1;
            self.failures = 0;
            self.has_answered = true;
            if let ConnectionState::Connected { last_reply, .. } = &mut self.connection {
                *last_reply = (*last_reply).max(at);
            }
        }
    }

    fn start_schedule(&mut self, at: Timestamp) {
        self.schedule.get_or_insert_with(|| Schedule::new(at, self.spec.interval, self.spec.seed));
    }

    /// Between half of a doubling pause and the whole of it, so that agents that lost the same responder do
    /// not reconnect at the same time.
    fn retry_pause(&self) -> Duration {
        let doubled = Self::RETRY_MIN.saturating_mul(1 << self.failures.saturating_sub(1).min(16));
        let whole = doubled.min(Self::RETRY_MAX);
        let share = mix(self.spec.seed ^ mix(u64::from(self.failures) ^ self.flow.upcoming().0)) % 1_000;
        let share = u32::try_from(share).expect("below a thousand");
        whole / 2 + whole / 2 * share / 1_000
    }

    fn deadline(&self) -> Timestamp {
        let connection = match self.connection {
            ConnectionState::Down { retry_at, .. } => retry_at,
            ConnectionState::Connecting { since } => since + self.spec.lost_after,
            ConnectionState::Connected { last_reply, .. } if !self.unanswered.is_empty() => {
                last_reply + self.spec.lost_after
            }
            ConnectionState::Connected { .. } | ConnectionState::Disconnecting | ConnectionState::Idle => {
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
            let mut test =
                TestDriver::new(StreamSpec { seed, interval: Duration::from_secs(3_600), ..spec() });
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
            let mut test =
                TestDriver::new(StreamSpec { seed, interval: Duration::from_secs(3_600), ..spec() });
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
        let foreign = Message { timestamp: NtpTime(message.timestamp.0 ^ 1), ..message };
        assert!(!test.answer(foreign, received));
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
}
