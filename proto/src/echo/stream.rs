//! The side that asks over a stream: the same schedule and the same verdicts as over datagrams.
//!
//! A stream loses nothing while it stands, it only makes wait. So a message counts from the time at which it was meant to
//! leave, whatever keeps it: a stalled stream shows as latency and then as late, never as a hole. Lost is what had no answer
//! within [`StreamSpec::lost_after`], and what was on a connection that broke. On which half of the way is not known.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use super::absence::Absence;
use super::flow::{Carries, Drops, Fit, Flow, Purpose, Reply, Rules};
use super::outcome::{Mismatch, Report, Sample, Verdict};
use crate::grid::{Grid, mix};
use crate::machine::{HostDrops, NotSent, Now, StampedBy};
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
    Report(Report),
    /// Nothing to do until then, or until something happens.
    Wait(Timestamp),
    /// Nothing to do ever again.
    Finished,
}

/// An answer as it came off the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// To what.
    pub message: Message,
    /// When its last byte arrived.
    pub at: Timestamp,
    /// By whose clock reading.
    pub by: StampedBy,
    /// The responder's part of the round trip in nanoseconds, as it says; 0 where it says nothing.
    pub turnaround: i64,
}

/// Measures one path over one connection at a time.
#[derive(Debug)]
pub struct StreamProber {
    spec: StreamSpec,
    /// `None` until the first attempt to connect has ended: a round trip does not include that one.
    grid: Option<Grid>,
    slots_left: u64,
    flow: Flow,
    /// Messages that wait to be handed over, the oldest first.
    waiting: VecDeque<Waiting>,
    /// The first message of this connection that is not answered, and the one after the last that was handed over.
    unanswered: Range<u64>,
    connection: Connection,
    /// Attempts in a row after which nothing was answered.
    failures: u32,
    /// Whether anything was answered on this connection.
    has_answered: bool,
    minimum: WindowedMinimum,
    absence: Option<Absence>,
    is_stopping: bool,
    is_lossy: bool,
    reports: VecDeque<Report>,
}

/// A message that has not been handed over.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    message: Message,
    due: Timestamp,
}

#[derive(Debug, Clone, Copy)]
enum Connection {
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
            grid: None,
            slots_left: spec.count.unwrap_or(u64::MAX),
            flow: Flow::new(0, 0, 0, at),
            waiting: VecDeque::new(),
            unanswered: 0..0,
            connection: Connection::None { again: at, ours: None },
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
        self.connection = Connection::Up { since: at, heard: at, is_blocked: false };
        self.begin(at);
    }

    /// The connection, or the attempt to make one, has ended. What was on it is lost. `ours`: our own host is to blame, and
    /// what waits is not sent. True if something is wrong; false if it may end like that ([`StreamSpec::on_demand`]).
    pub fn disconnected(&mut self, at: Timestamp, ours: Option<NotSent>) -> bool {
        let was_up = matches!(self.connection, Connection::Up { .. });
        if self.spec.on_demand && was_up && self.unanswered.is_empty() && ours.is_none() {
            if self.waiting.is_empty() {
                self.connection = Connection::Unneeded;
                return false;
            } else if self.has_answered {
                self.connection = Connection::None { again: at, ours: None };
                return false;
            }
        }
        let rules = self.rules();
        let unanswered = std::mem::take(&mut self.unanswered);
        self.flow.give_up(unanswered, at, &rules, &mut self.reports);
        if let Some(why) = ours {
            for Waiting { message, .. } in self.waiting.drain(..) {
                self.flow.not_sent(message.sequence, why, &mut self.reports);
                // One that was handed over before, and came back: it is our host that does not ask again.
                self.flow.withdraw_one(message.sequence, &mut self.reports);
            }
        }
        self.failures = self.failures.saturating_add(1);
        let again = at + self.pause();
        self.connection = Connection::None { again, ours };
        self.begin(at);
        true
    }

    /// The stream took the message that [`StreamStep::Send`] asked for at `at`. `left`: when the kernel let it go on its way,
    /// if it did so while it was handed over. One that had to wait before counts from when it was meant to leave.
    pub fn handed(&mut self, message: Message, at: Timestamp, left: Option<Timestamp>) {
        let Some(Waiting { due, .. }) = self.waiting.pop_front() else { return };
        let sequence = message.sequence;
        if self.unanswered.is_empty() {
            self.unanswered.start = sequence;
            if let Connection::Up { heard, .. } = &mut self.connection {
                *heard = at;
            }
        }
        self.unanswered.end = sequence + 1;
        self.flow.sent(sequence, due, StampedBy::User, &mut self.reports);
        if let Some(left) = left.filter(|_| due == at) {
            self.flow.sent(sequence, left, StampedBy::Kernel, &mut self.reports);
        }
    }

    /// The other side had ended the connection before it could see this message, the last that was handed over: it waits
    /// again, as if it never had been.
    pub fn returned(&mut self, message: Message) {
        if let Some(due) = self.flow.in_flight_since(message.sequence) {
            self.unanswered.end = self.unanswered.end.min(message.sequence).max(self.unanswered.start);
            self.waiting.push_front(Waiting { message, due });
        }
    }

    /// The stream takes no further message until [`StreamProber::writable`] is called.
    pub fn blocked(&mut self) {
        if let Connection::Up { is_blocked, .. } = &mut self.connection {
            *is_blocked = true;
        }
    }

    /// The stream takes messages again.
    pub fn writable(&mut self) {
        if let Connection::Up { is_blocked, .. } = &mut self.connection {
            *is_blocked = false;
        }
    }

    /// Something came back; whether it answers a message, in time or not.
    pub fn answered(&mut self, answer: &Answer) -> bool {
        let rules = self.rules();
        let Answer { message: Message { sequence, stamp }, at, by, turnaround } = *answer;
        let sent = match self.flow.fit(sequence, stamp, at, &rules) {
            Fit::Answer { sent } => sent,
            Fit::Duplicate => {
                self.reports.push_back(Report::Duplicate);
                return false;
            }
            Fit::VeryLate => {
                self.heard(at, sequence);
                self.reports.push_back(Report::VeryLate);
                return true;
            }
            Fit::Unasked => {
                self.mismatched(Mismatch::Unasked);
                return false;
            }
        };
        self.heard(at, sequence);
        // What stood at the goodbye is answered until it ends: who is back answers over another connection.
        if let (Some(absence), Connection::Up { since, .. }) = (&mut self.absence, self.connection)
            && absence.began_before(since)
        {
            absence.answered(sent);
        }
        let sample = Sample {
            rtt: Duration::ZERO,
            turnaround: Duration::ZERO,
            variation: Duration::ZERO,
            minimum: Duration::ZERO,
            transmit: StampedBy::User,
            receive: by,
            hops_forward: None,
            hops_reverse: None,
            class_forward: None,
            class_reverse: None,
        };
        self.flow.answer(sequence, Reply { at, turnaround, sample }, &rules, &mut self.reports);
        true
    }

    /// Something came back that answers nothing.
    pub fn mismatched(&mut self, why: Mismatch) {
        self.reports.push_back(Report::Mismatched(why));
    }

    /// Sends nothing more; `Finished` follows when everything is decided.
    pub fn stop(&mut self) {
        self.is_stopping = true;
    }

    /// Decides everything that is undecided: withdrawn. For a stop that cannot wait, and after a suspend.
    pub fn withdraw(&mut self) {
        for Waiting { message, due } in self.waiting.drain(..) {
            self.flow.sent(message.sequence, due, StampedBy::User, &mut self.reports);
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
            Connection::Unneeded if self.waiting.is_empty() => None,
            Connection::Unneeded => {
                self.connection = Connection::Coming { since: now.at };
                Some(StreamStep::Connect)
            }
            Connection::None { again, .. } if again <= now.at => {
                self.connection = Connection::Coming { since: now.at };
                Some(StreamStep::Connect)
            }
            Connection::Coming { since } if since + self.spec.lost_after <= now.drained => Some(self.end()),
            Connection::Up { heard, .. }
                if !self.unanswered.is_empty() && heard + self.spec.lost_after <= now.drained =>
            {
                Some(self.end())
            }
            Connection::Up { is_blocked: false, .. } if self.has_room() => {
                self.waiting.front().map(|first| StreamStep::Send(first.message))
            }
            Connection::None { .. }
            | Connection::Coming { .. }
            | Connection::Up { .. }
            | Connection::Ending => None,
        }
    }

    fn end(&mut self) -> StreamStep {
        self.connection = Connection::Ending;
        StreamStep::Disconnect
    }

    fn has_room(&self) -> bool {
        let open = self.unanswered.end - self.unanswered.start;
        usize::try_from(open).is_ok_and(|open| open < self.spec.at_once)
    }

    fn take_what_is_due(&mut self, now: Now) {
        while !self.is_over()
            && let Some(grid) = self.grid.as_mut().filter(|grid| grid.next() <= now.at)
        {
            let due = grid.take(now.at);
            let skipped = due.skipped.min(self.slots_left);
            self.slots_left -= skipped;
            if skipped > 0 {
                self.reports.push_back(Report::Unsent(skipped));
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
            return self.reports.push_back(Report::Unsent(1));
        }
        let stamp = NtpTime::from(now.wall.wall(now.at));
        let sequence = self.flow.push(now.at, stamp, Carries::Less, Purpose::Measure);
        if let Connection::None { ours: Some(why), .. } = self.connection {
            self.flow.not_sent(sequence, why, &mut self.reports);
        } else {
            self.waiting.push_back(Waiting { message: Message { sequence, stamp }, due: now.at });
        }
    }

    fn expire(&mut self, drained: Timestamp) {
        // What waits is no less late for that.
        while let Some(Waiting { message, due }) = self.waiting.front().copied()
            && due + self.spec.lost_after <= drained
        {
            self.waiting.pop_front();
            self.flow.sent(message.sequence, due, StampedBy::User, &mut self.reports);
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
            if let Connection::Up { heard, .. } = &mut self.connection {
                *heard = (*heard).max(at);
            }
        }
    }

    fn begin(&mut self, at: Timestamp) {
        self.grid.get_or_insert_with(|| Grid::new(at, self.spec.interval, self.spec.seed));
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
            Connection::None { again, .. } => again,
            Connection::Coming { since } => since + self.spec.lost_after,
            Connection::Up { heard, .. } if !self.unanswered.is_empty() => heard + self.spec.lost_after,
            Connection::Up { .. } | Connection::Ending | Connection::Unneeded => Timestamp::NEVER,
        };
        let next = self.grid.as_ref().filter(|_| !self.is_over()).map_or(Timestamp::NEVER, Grid::next);
        connection.min(next).min(self.flow.deadline(&self.rules()))
    }

    fn is_over(&self) -> bool {
        self.is_stopping || self.slots_left == 0
    }

    fn rules(&self) -> Rules {
        Rules {
            late_after: self.spec.late_after,
            lost_after: self.spec.lost_after,
            horizon: Duration::ZERO,
            transmit_stamps: false,
            absence: self.absence,
        }
    }

    fn complete(&mut self, mut report: Report, now: Timestamp) -> Report {
        if let Report::Decided { verdict: Verdict::Ok, sample: Some(sample), .. } = &mut report {
            sample.minimum = self.minimum.add(now, sample.rtt);
            sample.variation = sample.rtt - sample.minimum;
        }
        report
    }

    fn lossy_changed(&mut self) -> Option<Report> {
        let is_lossy = self.flow.loss.is_lossy();
        let was = std::mem::replace(&mut self.is_lossy, is_lossy);
        (was != is_lossy).then(|| Report::LossyFlows(is_lossy.into()))
    }
}
