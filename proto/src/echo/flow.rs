//! One flow of a path: what was sent on one 5-tuple, and what became of it.

use std::collections::VecDeque;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use super::absence::Absence;
use super::outcome::{Direction, Report, Sample, Verdict};
use crate::machine::{HostDrops, NotSent, STAMP_WAIT, StampedBy};
use crate::stats::RecentLoss;
use crate::time::{Timestamp, nanos};
use crate::wire::NtpTime;

/// When a datagram's fate is decided.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// A longer round trip is late.
    pub(super) late_after: Duration,
    /// Without a reply by then it is lost.
    pub(super) lost_after: Duration,
    /// A report about a datagram counts against it only when it was asked for this much later: what is still
    /// under way is not missing.
    pub(super) horizon: Duration,
    /// Whether the driver will deliver the kernel's transmit stamps.
    pub(super) transmit_stamps: bool,
    /// When the peer was away, by its own word.
    pub(super) absence: Option<Absence>,
}

/// The datagrams of one flow, from the oldest that a reply could still belong to.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) index: u8,
    pub(super) ssid: u16,
    /// Random: tells this flow's life apart from an earlier one on the same port.
    pub(super) session: u32,
    next: u64,
    sent: u32,
    slots: VecDeque<Slot>,
    /// No slot below is undecided.
    cursor: u64,
    /// NextExp of RFC 4737.
    expected: u64,
    held_until: Timestamp,
    held: u32,
    burst: u32,
    /// The round trip of the datagram before the oldest, when its verdict was ok.
    before: Option<Duration>,
    pub(super) loss: RecentLoss,
}

#[derive(Debug)]
struct Slot {
    t1: Timestamp,
    wire: NtpTime,
    kind: Carries,
    purpose: Purpose,
    transmit: StampedBy,
    evidence: Evidence,
    state: State,
}

/// What a datagram carries: the responder keeps a record of its own for those with and for those without our extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carries {
    /// Our session extension.
    Session,
    /// Not that.
    Less,
}

/// What the hosts at both ends dropped.
#[derive(Debug)]
pub(super) struct Drops<'a> {
    /// Ours, by flow.
    pub(super) here: &'a mut HostDrops,
    /// The responder's, all of flow 0: it does not say at which socket.
    pub(super) there: &'a mut HostDrops,
}

/// Why a datagram was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To measure.
    Measure,
    /// To find out what a foreign responder understands, which it may refuse to answer.
    Ask,
}

/// What is known of a datagram's arrival at the responder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Evidence {
    None,
    Arrived,
    Missing,
}

#[derive(Debug)]
enum State {
    /// Handed to the driver.
    Queued,
    /// Left the host; no reply yet.
    InFlight,
    /// Answered; the kernel's transmit stamp is still to come.
    Held(Box<Reply>),
    /// Answered; the round trip when the verdict was ok.
    Answered(Option<Duration>),
    /// Decided without an answer: lost, or withdrawn.
    GivenUp,
    /// No verdict: it never left.
    Void,
}

/// What a reply tells about its own round trip, before T1 is known for good.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reply {
    /// T4.
    pub(super) at: Timestamp,
    /// T3 − T2 in nanoseconds, as the responder says.
    pub(super) turnaround: i64,
    /// Everything that does not depend on T1; `rtt`, `turnaround` and `transmit` are filled in.
    pub(super) sample: Sample,
}

/// How a reply fits what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fit {
    /// The first answer to a datagram that is undecided; when that was sent.
    Answer { sent: Timestamp },
    /// The datagram is answered already.
    Duplicate,
    /// The datagram was given up.
    VeryLate,
    /// Nothing like it was sent.
    Unasked,
}

impl Flow {
    /// Datagrams of a flow that may await a verdict at once; at the limit a slot goes unsent.
    pub(super) const PENDING: usize = 65_536;

    pub(super) fn new(index: u8, ssid: u16, session: u32, at: Timestamp) -> Self {
        Self {
            index,
            ssid,
            session,
            next: 0,
            sent: 0,
            slots: VecDeque::new(),
            cursor: 0,
            expected: 0,
            held_until: Timestamp::NEVER,
            held: 0,
            burst: 0,
            before: None,
            loss: RecentLoss::new(at),
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.slots.len() < Self::PENDING
    }

    /// The sequence number of the next datagram, and how many will then have been sent.
    pub(super) fn upcoming(&self) -> (u64, u32) {
        (self.next, self.sent.wrapping_add(1))
    }

    /// Takes note of a datagram that was handed to the driver.
    pub(super) fn push(&mut self, at: Timestamp, wire: NtpTime, kind: Carries, purpose: Purpose) -> u64 {
        let sequence = self.next;
        self.next += 1;
        self.sent = self.sent.wrapping_add(1);
        self.slots.push_back(Slot {
            t1: at,
            wire,
            kind,
            purpose,
            transmit: StampedBy::User,
            evidence: Evidence::None,
            state: State::Queued,
        });
        sequence
    }

    fn base(&self) -> u64 {
        self.next - self.slots.len() as u64
    }

    fn slot(&mut self, sequence: u64) -> Option<&mut Slot> {
        let index = usize::try_from(sequence.checked_sub(self.base())?).ok()?;
        self.slots.get_mut(index)
    }

    /// When a datagram was sent; `None` when it is forgotten or was not.
    pub(super) fn sent_at(&mut self, sequence: u64) -> Option<Timestamp> {
        self.slot(sequence).map(|slot| slot.t1)
    }

    /// When a datagram left that is still under way; `None` for any other.
    pub(super) fn in_flight_since(&mut self, sequence: u64) -> Option<Timestamp> {
        self.slot(sequence).filter(|slot| matches!(slot.state, State::InFlight)).map(|slot| slot.t1)
    }

    /// The 64-bit sequence number that ends in `wire`, at most `next`.
    pub(super) fn extend(&self, wire: u32) -> Option<u64> {
        #[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
        let low = self.next as u32;
        self.next.checked_sub(u64::from(low.wrapping_sub(wire)))
    }

    pub(super) fn sent(
        &mut self,
        sequence: u64,
        at: Timestamp,
        by: StampedBy,
        reports: &mut VecDeque<Report>,
    ) {
        let flow = self.index;
        let Some(slot) = self.slot(sequence) else { return };
        if let State::Queued = slot.state {
            slot.state = State::InFlight;
            slot.t1 = at;
            slot.transmit = by;
            reports.push_back(Report::Sent { flow, sequence });
        } else if by == StampedBy::Kernel && slot.transmit == StampedBy::User {
            slot.t1 = at;
            slot.transmit = by;
        }
    }

    pub(super) fn not_sent(&mut self, sequence: u64, why: NotSent, reports: &mut VecDeque<Report>) {
        let Some(slot) = self.slot(sequence) else { return };
        // What has left is decided by what comes back, whatever is said of it later.
        let State::Queued = slot.state else { return };
        slot.state = State::Void;
        self.sent = self.sent.wrapping_sub(1);
        reports.push_back(Report::SendError(why));
        self.advance();
    }

    /// Whether `sequence` was sent, is remembered, and carried T1 as `wire`.
    pub(super) fn has_sent(&self, sequence: u64, wire: NtpTime) -> bool {
        let index = sequence.checked_sub(self.base()).and_then(|index| usize::try_from(index).ok());
        index.and_then(|index| self.slots.get(index)).is_some_and(|slot| slot.wire == wire)
    }

    /// How a reply to `sequence` that carries T1 as `wire` and arrived at `at` fits.
    pub(super) fn fit(&mut self, sequence: u64, wire: NtpTime, at: Timestamp, rules: &Rules) -> Fit {
        if sequence < self.base() {
            return Fit::VeryLate;
        }
        let Some(slot) = self.slot(sequence) else { return Fit::Unasked };
        if slot.wire != wire {
            return Fit::Unasked;
        }
        let is_late = at.since(slot.t1) > rules.lost_after;
        match slot.state {
            State::Queued | State::Void => Fit::Unasked,
            State::GivenUp => Fit::VeryLate,
            _ if is_late => Fit::VeryLate,
            State::InFlight => Fit::Answer { sent: slot.t1 },
            State::Held(_) | State::Answered(_) => Fit::Duplicate,
        }
    }

    /// Takes the answer to a datagram that is in flight. It is decided at once if T1 is known for good.
    pub(super) fn answer(
        &mut self,
        sequence: u64,
        reply: Reply,
        rules: &Rules,
        reports: &mut VecDeque<Report>,
    ) {
        if sequence < self.expected {
            reports.push_back(Report::Reordered);
        } else {
            self.expected = sequence + 1;
        }
        let slot = self.slot(sequence).expect("it fitted");
        if rules.transmit_stamps && slot.transmit == StampedBy::User {
            // Rare: the stamp is normally there before the reply, and a slot is kept small for the others.
            slot.state = State::Held(Box::new(reply));
            self.held += 1;
            self.held_until = self.held_until.min(reply.at + STAMP_WAIT);
        } else {
            self.decide(sequence, &reply, rules, reports);
        }
    }

    /// Decides a datagram whose reply was held, if its kernel stamp has come.
    pub(super) fn release(&mut self, sequence: u64, rules: &Rules, reports: &mut VecDeque<Report>) {
        if self.slot(sequence).is_some_and(|slot| matches!(slot.state, State::Held(_))) {
            self.finish(sequence, rules, reports);
        }
    }

    fn finish(&mut self, sequence: u64, rules: &Rules, reports: &mut VecDeque<Report>) {
        let slot = self.slot(sequence).expect("it is held");
        if let State::Held(reply) = std::mem::replace(&mut slot.state, State::InFlight) {
            self.held -= 1;
            self.decide(sequence, &reply, rules, reports);
        }
    }

    fn decide(&mut self, sequence: u64, reply: &Reply, rules: &Rules, reports: &mut VecDeque<Report>) {
        let flow = self.index;
        let slot = self.slot(sequence).expect("it was answered");
        let (mut sample, t1) = (reply.sample, slot.t1);
        let elapsed = nanos(reply.at.since(t1));
        let turnaround = credible_turnaround(reply.turnaround, elapsed);
        sample.rtt = Duration::from_nanos(elapsed.saturating_sub(turnaround.unwrap_or(0)));
        sample.turnaround = Duration::from_nanos(turnaround.unwrap_or(0));
        sample.transmit = slot.transmit;
        let verdict = if sample.rtt > rules.late_after { Verdict::Late } else { Verdict::Ok };
        let rtt = Some(sample.rtt).filter(|_| verdict == Verdict::Ok);
        let at = reply.at;
        slot.state = State::Answered(rtt);
        if turnaround.is_none() {
            reports.push_back(Report::TurnaroundInvalid);
        }
        reports.push_back(Report::Decided { flow, sequence, verdict, sample: Some(sample) });
        self.loss.add(at, false);
        if let Some(rtt) = rtt {
            for neighbour in [sequence.checked_sub(1), Some(sequence + 1)].into_iter().flatten() {
                if let Some(other) = self.round_trip(neighbour) {
                    reports.push_back(Report::Ipdv(rtt.abs_diff(other)));
                }
            }
        }
        self.advance();
        self.end_burst(reports);
    }

    /// The round trip of a datagram whose verdict is ok.
    fn round_trip(&mut self, sequence: u64) -> Option<Duration> {
        if sequence + 1 == self.base() {
            return self.before;
        }
        match self.slot(sequence)?.state {
            State::Answered(rtt) => rtt,
            State::Queued | State::InFlight | State::Held(_) | State::GivenUp | State::Void => None,
        }
    }

    /// A run of losses ends when the next datagram that has a fate at all is found answered.
    fn end_burst(&mut self, reports: &mut VecDeque<Report>) {
        let next = self.slots.iter().find(|slot| !matches!(slot.state, State::GivenUp | State::Void));
        if self.burst > 0 && next.is_some_and(|slot| matches!(slot.state, State::Answered(_))) {
            reports.push_back(Report::BurstEnded(std::mem::take(&mut self.burst)));
        }
    }

    /// Learns from a responder which of the undecided datagrams of a kind, between the two ends of `span`, had arrived when
    /// it answered a datagram that was sent at `asked`. `arrived` is told a sequence number and when that was sent; `None`:
    /// the responder says nothing about that one.
    pub(super) fn learn(
        &mut self,
        span: RangeInclusive<u64>,
        kind: Carries,
        asked: Timestamp,
        rules: &Rules,
        arrived: impl Fn(u64, Timestamp) -> Option<bool>,
    ) {
        let from = (*span.start()).max(self.cursor);
        for sequence in from..=(*span.end()).min(self.next.saturating_sub(1)) {
            let Some(slot) = self.slot(sequence).filter(|slot| slot.kind == kind) else { continue };
            match arrived(sequence, slot.t1) {
                Some(true) => slot.evidence = Evidence::Arrived,
                Some(false) if slot.evidence == Evidence::None && asked >= slot.t1 + rules.horizon => {
                    slot.evidence = Evidence::Missing;
                }
                Some(false) | None => {}
            }
        }
    }

    /// A router said that it could not pass on a datagram.
    pub(super) fn refused_on_the_way(&mut self, sequence: u64, wire: NtpTime) {
        if let Some(slot) = self.slot(sequence)
            && slot.wire == wire
            && slot.evidence == Evidence::None
        {
            slot.evidence = Evidence::Missing;
        }
    }

    /// Decides everything whose deadline lies at or before `drained`.
    pub(super) fn expire(
        &mut self,
        drained: Timestamp,
        rules: &Rules,
        drops: &mut Drops<'_>,
        reports: &mut VecDeque<Report>,
    ) {
        if self.held > 0 && self.held_until <= drained {
            self.release_overdue(drained, rules, reports);
        }
        while let Some(front) = self.slots.front() {
            let deadline = front.t1 + rules.lost_after;
            let sequence = self.base();
            match front.state {
                State::Queued => break,
                State::GivenUp | State::Void => {}
                _ if deadline > drained => break,
                State::Held(_) => self.finish(sequence, rules, reports),
                State::Answered(_) => {}
                State::InFlight => self.lose(sequence, deadline, rules, drops, reports),
            }
            self.pop(reports);
        }
    }

    fn release_overdue(&mut self, drained: Timestamp, rules: &Rules, reports: &mut VecDeque<Report>) {
        self.held_until = Timestamp::NEVER;
        for sequence in self.cursor..self.next {
            let Some(Slot { state: State::Held(reply), .. }) = self.slot(sequence) else { continue };
            let until = reply.at + STAMP_WAIT;
            if until <= drained {
                self.finish(sequence, rules, reports);
            } else {
                self.held_until = self.held_until.min(until);
            }
        }
    }

    fn lose(
        &mut self,
        sequence: u64,
        deadline: Timestamp,
        rules: &Rules,
        drops: &mut Drops<'_>,
        reports: &mut VecDeque<Report>,
    ) {
        let flow = self.index;
        let slot = self.slot(sequence).expect("it is in flight");
        let (evidence, t1, purpose) = (slot.evidence, slot.t1, slot.purpose);
        slot.state = State::GivenUp;
        let Drops { here, there } = drops;
        let ours = &mut || here.claim(flow, t1, deadline);
        let theirs = &mut || there.claim(0, t1, deadline);
        let (host_dropped, direction) = match evidence {
            Evidence::Arrived => (ours(), Direction::Reverse),
            Evidence::Missing => (theirs(), Direction::Forward),
            Evidence::None => (ours() || theirs(), Direction::Unknown),
        };
        let is_excused = rules.absence.is_some_and(|absence| absence.excuses(t1, rules.lost_after));
        let is_excused = is_excused || purpose == Purpose::Ask;
        let verdict = match (is_excused, host_dropped) {
            (true, _) => Verdict::Withdrawn,
            (false, true) => Verdict::HostDropped,
            (false, false) => Verdict::Lost(direction),
        };
        reports.push_back(Report::Decided { flow, sequence, verdict, sample: None });
        let is_lost = matches!(verdict, Verdict::Lost(_));
        self.loss.add(deadline, is_lost);
        if is_lost {
            if self.burst == 0 {
                reports.push_back(Report::BurstBegan);
            }
            self.burst += 1;
        }
    }

    fn pop(&mut self, reports: &mut VecDeque<Report>) {
        let Some(slot) = self.slots.pop_front() else { return };
        self.before = match slot.state {
            State::Answered(rtt) => rtt,
            State::Queued | State::InFlight | State::Held(_) | State::GivenUp | State::Void => None,
        };
        self.advance();
        self.end_burst(reports);
    }

    fn advance(&mut self) {
        self.cursor = self.cursor.max(self.base());
        while let Some(slot) = self.slot(self.cursor) {
            match slot.state {
                State::Queued | State::InFlight | State::Held(_) => break,
                State::Answered(_) | State::GivenUp | State::Void => self.cursor += 1,
            }
        }
    }

    /// Decides those of some datagrams that have no verdict: their way has ended, and nothing can come back.
    pub(super) fn give_up(
        &mut self,
        which: Range<u64>,
        at: Timestamp,
        rules: &Rules,
        reports: &mut VecDeque<Report>,
    ) {
        let mut drops = Drops { here: &mut HostDrops::default(), there: &mut HostDrops::default() };
        for sequence in which.start.max(self.cursor)..which.end.min(self.next) {
            if self.slot(sequence).is_some_and(|slot| matches!(slot.state, State::InFlight)) {
                self.lose(sequence, at, rules, &mut drops, reports);
            }
        }
        self.advance();
    }

    /// Decides everything that left the host and has no verdict: withdrawn, or answered if a reply is held.
    pub(super) fn withdraw(&mut self, rules: &Rules, reports: &mut VecDeque<Report>) {
        for sequence in self.cursor..self.next {
            let flow = self.index;
            let Some(slot) = self.slot(sequence) else { continue };
            match slot.state {
                State::Held(_) => self.finish(sequence, rules, reports),
                State::InFlight => {
                    slot.state = State::GivenUp;
                    reports.push_back(Report::Decided {
                        flow,
                        sequence,
                        verdict: Verdict::Withdrawn,
                        sample: None,
                    });
                }
                State::Queued | State::Answered(_) | State::GivenUp | State::Void => {}
            }
        }
        self.advance();
    }

    /// Decides one datagram that is under way: withdrawn.
    pub(super) fn withdraw_one(&mut self, sequence: u64, reports: &mut VecDeque<Report>) {
        let flow = self.index;
        if let Some(slot) = self.slot(sequence)
            && matches!(slot.state, State::InFlight)
        {
            slot.state = State::GivenUp;
            let verdict = Verdict::Withdrawn;
            reports.push_back(Report::Decided { flow, sequence, verdict, sample: None });
            self.advance();
        }
    }

    /// When something must be decided if nothing arrives.
    pub(super) fn deadline(&self, rules: &Rules) -> Timestamp {
        let index = usize::try_from(self.cursor - self.base()).unwrap_or(usize::MAX);
        let at = |index| self.slots.get(index).map(|slot: &Slot| slot.t1 + rules.lost_after);
        // Datagrams are decided in order, and by the kernel's stamps one may have left after a later one.
        let first = at(index).max(at(0)).filter(|_| index < self.slots.len()).unwrap_or(Timestamp::NEVER);
        if self.held > 0 { first.min(self.held_until) } else { first }
    }

    /// Datagrams that left the host and have no verdict, counted one by one.
    pub(super) fn in_flight(&self) -> usize {
        let skip = usize::try_from(self.cursor - self.base()).unwrap_or(usize::MAX);
        let is_undecided = |slot: &&Slot| matches!(slot.state, State::InFlight | State::Held(_));
        self.slots.iter().skip(skip).filter(is_undecided).count()
    }

    /// Whether anything awaits its confirmation or its verdict.
    pub(super) fn is_settled(&self) -> bool {
        self.cursor == self.next
    }
}

/// The responder's time that can be subtracted: `None` when it is negative, or longer than the whole by more than two
/// clocks' skew explains (500 ppm each, the bound of clock discipline in Linux and RFC 5905).
fn credible_turnaround(stated: i64, elapsed: u64) -> Option<u64> {
    let turnaround = u64::try_from(stated).ok()?;
    let tolerance = elapsed / 1_000 + 1_000;
    if turnaround > elapsed.saturating_add(tolerance) {
        return None;
    }
    Some(turnaround)
}
