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
            sent: Timestamp::default(),
            responder_received: None,
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
mod tests;
