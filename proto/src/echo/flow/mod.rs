//! One flow of a path: the datagrams sent on one 5-tuple and their verdicts.

use std::collections::VecDeque;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use super::absence::Absence;
use super::outcome::{Direction, EchoReport, RoundTrip, Verdict};
use super::profile::credible_turnaround;
use crate::machine::{HostDrops, NotSent, TX_TIMESTAMP_WAIT, TimestampSource};
use crate::stats::RecentLoss;
use crate::time::{Timestamp, nanos};
use crate::wire::NtpTime;

/// Limits for verdicts.
#[derive(Debug, Clone, Copy)]
pub(super) struct VerdictRules {
    /// Round trips longer than this are late.
    pub(super) late_after: Duration,
    /// A datagram without a reply after this time is lost.
    pub(super) lost_after: Duration,
    /// A report is evidence that a datagram is missing only if the report was requested this much later than
    /// the datagram was sent: before, the datagram may still be in transit.
    pub(super) horizon: Duration,
    /// Whether the driver delivers the kernel's transmit timestamps.
    pub(super) tx_timestamps: bool,
    /// Announced absence of the peer.
    pub(super) absence: Option<Absence>,
}

/// The datagrams of one flow, from the oldest that can still be answered.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) index: u8,
    pub(super) ssid: u16,
    /// Random: distinguishes this flow from an earlier one on the same port.
    pub(super) session: u32,
    next: u64,
    sent: u32,
    slots: VecDeque<SentDatagram>,
    /// All slots below this sequence number are decided.
    cursor: u64,
    /// The largest sequence number answered so far: NextExp − 1 of RFC 4737.
    answered_max: u64,
    held_until: Timestamp,
    held: u32,
    burst: u32,
    /// Round trip of the datagram before the oldest slot, if its verdict is ok.
    rtt_before: Option<Duration>,
    pub(super) loss: RecentLoss,
}

#[derive(Debug)]
struct SentDatagram {
    t1: Timestamp,
    wire: NtpTime,
    kind: RequestForm,
    purpose: Purpose,
    transmit: TimestampSource,
    evidence: ArrivalEvidence,
    state: SlotState,
}

/// Form of a request. The responder keeps separate records for requests with and without the session
/// extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestForm {
    /// With the session record.
    WithSession,
    /// Without it.
    WithoutSession,
}

/// Datagrams that the hosts at both ends dropped.
#[derive(Debug)]
pub(super) struct Drops<'a> {
    /// Drops of this host, by flow.
    pub(super) local: &'a mut HostDrops,
    /// Drops of the responder's host, all with flow 0: it does not report the socket.
    pub(super) remote: &'a mut HostDrops,
}

/// Purpose of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A measurement.
    Measure,
    /// A test of which extensions a third-party responder supports. The responder may drop it, so it is never
    /// lost.
    Detect,
}

/// Evidence of a datagram's arrival at the responder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ArrivalEvidence {
    None,
    Arrived,
    Missing,
}

#[derive(Debug)]
enum SlotState {
    /// Passed to the driver.
    Queued,
    /// Left the host; no reply yet.
    InFlight,
    /// Answered; the kernel's transmit timestamp is still expected.
    Held(Box<ReplyTimes>),
    /// Answered; the round trip if the verdict is ok.
    Answered(Option<Duration>),
    /// Decided without an answer.
    GivenUp,
    /// Not sent; there is no verdict.
    Void,
}

/// Times of a reply, before T1 is final.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReplyTimes {
    /// T4.
    pub(super) at: Timestamp,
    /// T3 − T2 in nanoseconds, as the responder reports it.
    pub(super) turnaround: i64,
    /// The values that do not depend on T1; `rtt`, `sent`, `turnaround` and `transmit` are filled in with
    /// the verdict.
    pub(super) sample: RoundTrip,
}

/// How a reply matches the sent datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReplyMatch {
    /// The first answer to an undecided datagram, with the time at which that was sent.
    Answer { sent: Timestamp },
    /// The datagram already has an answer.
    Duplicate,
    /// The datagram was already given up.
    VeryLate,
    /// No such datagram was sent.
    Unsolicited,
}

impl Flow {
    /// Maximum number of slots of a flow; at the limit, datagrams are not sent.
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
            answered_max: 0,
            held_until: Timestamp::NEVER,
            held: 0,
            burst: 0,
            rtt_before: None,
            loss: RecentLoss::new(at),
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.slots.len() < Self::PENDING
    }

    /// Sequence number of the next datagram, and the number of sent datagrams including that one.
    pub(super) fn upcoming(&self) -> (u64, u32) {
        (self.next, self.sent.wrapping_add(1))
    }

    /// Adds a datagram that is passed to the driver and returns its sequence number.
    pub(super) fn push(&mut self, at: Timestamp, wire: NtpTime, kind: RequestForm, purpose: Purpose) -> u64 {
        let sequence = self.next;
        self.next += 1;
        self.sent = self.sent.wrapping_add(1);
        self.slots.push_back(SentDatagram {
            t1: at,
            wire,
            kind,
            purpose,
            transmit: TimestampSource::User,
            evidence: ArrivalEvidence::None,
            state: SlotState::Queued,
        });
        sequence
    }

    fn base(&self) -> u64 {
        self.next - self.slots.len() as u64
    }

    fn slot(&mut self, sequence: u64) -> Option<&mut SentDatagram> {
        let index = usize::try_from(sequence.checked_sub(self.base())?).ok()?;
        self.slots.get_mut(index)
    }

    /// Send time of a datagram; `None` if it has no slot.
    pub(super) fn sent_at(&mut self, sequence: u64) -> Option<Timestamp> {
        self.slot(sequence).map(|slot| slot.t1)
    }

    /// Send time of a datagram that is in flight; `None` for any other.
    pub(super) fn in_flight_since(&mut self, sequence: u64) -> Option<Timestamp> {
        self.slot(sequence).filter(|slot| matches!(slot.state, SlotState::InFlight)).map(|slot| slot.t1)
    }

    /// The highest 64-bit sequence number up to `next` whose low half is `wire`.
    pub(super) fn extend(&self, wire: u32) -> Option<u64> {
        #[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
        let low = self.next as u32;
        self.next.checked_sub(u64::from(low.wrapping_sub(wire)))
    }

    pub(super) fn sent(
        &mut self,
        sequence: u64,
        at: Timestamp,
        by: TimestampSource,
        reports: &mut VecDeque<EchoReport>,
    ) {
        let flow = self.index;
        let Some(slot) = self.slot(sequence) else { return };
        if let SlotState::Queued = slot.state {
            slot.state = SlotState::InFlight;
            slot.t1 = at;
            slot.transmit = by;
            reports.push_back(EchoReport::Sent { flow, sequence });
        } else if by == TimestampSource::Kernel && slot.transmit == TimestampSource::User {
            slot.t1 = at;
            slot.transmit = by;
        }
    }

    pub(super) fn not_sent(&mut self, sequence: u64, why: NotSent, reports: &mut VecDeque<EchoReport>) {
        let Some(slot) = self.slot(sequence) else { return };
        // A datagram that has left is decided by its reply or its deadline.
        let SlotState::Queued = slot.state else { return };
        slot.state = SlotState::Void;
        self.sent = self.sent.wrapping_sub(1);
        reports.push_back(EchoReport::SendError(why));
        self.advance();
    }

    /// Whether `sequence` has a slot and carried `wire` as T1.
    pub(super) fn has_sent(&self, sequence: u64, wire: NtpTime) -> bool {
        let index = sequence.checked_sub(self.base()).and_then(|index| usize::try_from(index).ok());
        index.and_then(|index| self.slots.get(index)).is_some_and(|slot| slot.wire == wire)
    }

    /// Matches a reply to `sequence` that carries `wire` as T1 and arrived at `at`.
    pub(super) fn match_reply(
        &mut self,
        sequence: u64,
        wire: NtpTime,
        at: Timestamp,
        rules: &VerdictRules,
    ) -> ReplyMatch {
        if sequence < self.base() {
            return ReplyMatch::VeryLate;
        }
        let Some(slot) = self.slot(sequence) else { return ReplyMatch::Unsolicited };
        if slot.wire != wire {
            return ReplyMatch::Unsolicited;
        }
        let is_late = at.since(slot.t1) > rules.lost_after;
        match slot.state {
            SlotState::Queued | SlotState::Void => ReplyMatch::Unsolicited,
            SlotState::GivenUp => ReplyMatch::VeryLate,
            _ if is_late => ReplyMatch::VeryLate,
            SlotState::InFlight => ReplyMatch::Answer { sent: slot.t1 },
            SlotState::Held(_) | SlotState::Answered(_) => ReplyMatch::Duplicate,
        }
    }

    /// Takes the answer to a datagram in flight. The verdict follows at once if T1 is final.
    pub(super) fn accept_reply(
        &mut self,
        sequence: u64,
        reply: ReplyTimes,
        rules: &VerdictRules,
        reports: &mut VecDeque<EchoReport>,
    ) {
        if sequence < self.answered_max {
            reports.push_back(EchoReport::Reordered);
        } else {
            self.answered_max = sequence;
        }
        let slot = self.slot(sequence).expect("the reply matched it");
        if rules.tx_timestamps && slot.transmit == TimestampSource::User {
            // Rare: the timestamp normally arrives before the reply. The box keeps the other slots small.
            slot.state = SlotState::Held(Box::new(reply));
            self.held += 1;
            self.held_until = self.held_until.min(reply.at + TX_TIMESTAMP_WAIT);
        } else {
            self.decide(sequence, &reply, rules, reports);
        }
    }

    /// Decides a datagram whose reply was held, after its kernel timestamp arrived.
    pub(super) fn release(
        &mut self,
        sequence: u64,
        rules: &VerdictRules,
        reports: &mut VecDeque<EchoReport>,
    ) {
        if self.slot(sequence).is_some_and(|slot| matches!(slot.state, SlotState::Held(_))) {
            self.decide_held(sequence, rules, reports);
        }
    }

    fn decide_held(&mut self, sequence: u64, rules: &VerdictRules, reports: &mut VecDeque<EchoReport>) {
        let slot = self.slot(sequence).expect("it is held");
        if let SlotState::Held(reply) = std::mem::replace(&mut slot.state, SlotState::InFlight) {
            self.held -= 1;
            self.decide(sequence, &reply, rules, reports);
        }
    }

    fn decide(
        &mut self,
        sequence: u64,
        reply: &ReplyTimes,
        rules: &VerdictRules,
        reports: &mut VecDeque<EchoReport>,
    ) {
        let flow = self.index;
        let slot = self.slot(sequence).expect("it was answered");
        let (mut sample, t1) = (reply.sample, slot.t1);
        let elapsed = nanos(reply.at.since(t1));
        let turnaround = credible_turnaround(reply.turnaround, elapsed);
        sample.rtt = Duration::from_nanos(elapsed.saturating_sub(turnaround.unwrap_or(0)));
        sample.turnaround = Duration::from_nanos(turnaround.unwrap_or(0));
        sample.sent = t1;
        sample.transmit = slot.transmit;
        let verdict = if sample.rtt > rules.late_after { Verdict::Late } else { Verdict::Ok };
        let rtt = Some(sample.rtt).filter(|_| verdict == Verdict::Ok);
        let at = reply.at;
        slot.state = SlotState::Answered(rtt);
        if turnaround.is_none() {
            reports.push_back(EchoReport::TurnaroundInvalid);
        }
        reports.push_back(EchoReport::Decided { flow, sequence, verdict, sample: Some(sample) });
        self.loss.add(at, false);
        if let Some(rtt) = rtt {
            for neighbour in [sequence.checked_sub(1), Some(sequence + 1)].into_iter().flatten() {
                if let Some(other) = self.round_trip(neighbour) {
                    reports.push_back(EchoReport::Ipdv(rtt.abs_diff(other)));
                }
            }
        }
        self.advance();
        self.end_burst(reports);
    }

    /// Round trip of a datagram whose verdict is ok.
    fn round_trip(&mut self, sequence: u64) -> Option<Duration> {
        if sequence + 1 == self.base() {
            return self.rtt_before;
        }
        match self.slot(sequence)?.state {
            SlotState::Answered(rtt) => rtt,
            SlotState::Queued
            | SlotState::InFlight
            | SlotState::Held(_)
            | SlotState::GivenUp
            | SlotState::Void => None,
        }
    }

    /// A burst ends when the next datagram that was neither given up nor unsent is answered.
    fn end_burst(&mut self, reports: &mut VecDeque<EchoReport>) {
        let next = self.slots.iter().find(|slot| !matches!(slot.state, SlotState::GivenUp | SlotState::Void));
        if self.burst > 0 && next.is_some_and(|slot| matches!(slot.state, SlotState::Answered(_))) {
            reports.push_back(EchoReport::BurstEnded(std::mem::take(&mut self.burst)));
        }
    }

    /// Records which undecided datagrams of one form, with sequence numbers in `span`, had arrived when the
    /// responder answered a datagram that was sent at `requested`. `arrived` gets a sequence number and its
    /// send time; it returns `None` if the report says nothing about that datagram.
    pub(super) fn record_arrivals(
        &mut self,
        span: RangeInclusive<u64>,
        kind: RequestForm,
        requested: Timestamp,
        rules: &VerdictRules,
        arrived: impl Fn(u64, Timestamp) -> Option<bool>,
    ) {
        let from = (*span.start()).max(self.cursor);
        for sequence in from..=(*span.end()).min(self.next.saturating_sub(1)) {
            let Some(slot) = self.slot(sequence).filter(|slot| slot.kind == kind) else { continue };
            match arrived(sequence, slot.t1) {
                Some(true) => slot.evidence = ArrivalEvidence::Arrived,
                Some(false)
                    if slot.evidence == ArrivalEvidence::None && requested >= slot.t1 + rules.horizon =>
                {
                    slot.evidence = ArrivalEvidence::Missing;
                }
                Some(false) | None => {}
            }
        }
    }

    /// A router reported that it dropped a datagram.
    pub(super) fn dropped_by_router(&mut self, sequence: u64, wire: NtpTime) {
        if let Some(slot) = self.slot(sequence)
            && slot.wire == wire
            && slot.evidence == ArrivalEvidence::None
        {
            slot.evidence = ArrivalEvidence::Missing;
        }
    }

    /// Decides all datagrams whose deadline is at or before `drained`.
    pub(super) fn expire(
        &mut self,
        drained: Timestamp,
        rules: &VerdictRules,
        drops: &mut Drops<'_>,
        reports: &mut VecDeque<EchoReport>,
    ) {
        if self.held_until <= drained {
            self.release_overdue(drained, rules, reports);
        }
        while let Some(front) = self.slots.front() {
            let deadline = front.t1 + rules.lost_after;
            let sequence = self.base();
            match front.state {
                SlotState::Queued => break,
                SlotState::GivenUp | SlotState::Void => {}
                _ if deadline > drained => break,
                SlotState::Held(_) => self.decide_held(sequence, rules, reports),
                SlotState::Answered(_) => {}
                SlotState::InFlight => self.lose(sequence, deadline, rules, drops, reports),
            }
            self.pop(reports);
        }
    }

    fn release_overdue(
        &mut self,
        drained: Timestamp,
        rules: &VerdictRules,
        reports: &mut VecDeque<EchoReport>,
    ) {
        self.held_until = Timestamp::NEVER;
        for sequence in self.cursor..self.next {
            let Some(SentDatagram { state: SlotState::Held(reply), .. }) = self.slot(sequence) else {
                continue;
            };
            let until = reply.at + TX_TIMESTAMP_WAIT;
            if until <= drained {
                self.decide_held(sequence, rules, reports);
            } else {
                self.held_until = self.held_until.min(until);
            }
        }
    }

    /// Decides a datagram as lost at its deadline, in the direction of its evidence. A host drop, an absent
    /// peer or a detection datagram excuses it instead.
    fn lose(
        &mut self,
        sequence: u64,
        deadline: Timestamp,
        rules: &VerdictRules,
        drops: &mut Drops<'_>,
        reports: &mut VecDeque<EchoReport>,
    ) {
        let flow = self.index;
        let slot = self.slot(sequence).expect("it is in flight");
        let (evidence, t1, purpose) = (slot.evidence, slot.t1, slot.purpose);
        slot.state = SlotState::GivenUp;
        let Drops { local, remote } = drops;
        let local_drop = &mut || local.claim(flow, t1, deadline);
        let remote_drop = &mut || remote.claim(0, t1, deadline);
        let (host_dropped, direction) = match evidence {
            ArrivalEvidence::Arrived => (local_drop(), Direction::Reverse),
            ArrivalEvidence::Missing => (remote_drop(), Direction::Forward),
            ArrivalEvidence::None => (local_drop() || remote_drop(), Direction::Unknown),
        };
        let is_excused = rules.absence.is_some_and(|absence| absence.excuses(t1, rules.lost_after));
        let is_excused = is_excused || purpose == Purpose::Detect;
        let verdict = match (is_excused, host_dropped) {
            (true, _) => Verdict::Withdrawn,
            (false, true) => Verdict::HostDropped,
            (false, false) => Verdict::Lost(direction),
        };
        reports.push_back(EchoReport::Decided { flow, sequence, verdict, sample: None });
        let is_lost = matches!(verdict, Verdict::Lost(_));
        self.loss.add(deadline, is_lost);
        if is_lost {
            if self.burst == 0 {
                reports.push_back(EchoReport::BurstBegan);
            }
            self.burst += 1;
        }
    }

    fn pop(&mut self, reports: &mut VecDeque<EchoReport>) {
        let Some(slot) = self.slots.pop_front() else { return };
        self.rtt_before = match slot.state {
            SlotState::Answered(rtt) => rtt,
            SlotState::Queued
            | SlotState::InFlight
            | SlotState::Held(_)
            | SlotState::GivenUp
            | SlotState::Void => None,
        };
        self.advance();
        self.end_burst(reports);
    }

    fn advance(&mut self) {
        self.cursor = self.cursor.max(self.base());
        while let Some(slot) = self.slot(self.cursor) {
            match slot.state {
                SlotState::Queued | SlotState::InFlight | SlotState::Held(_) => break,
                SlotState::Answered(_) | SlotState::GivenUp | SlotState::Void => self.cursor += 1,
            }
        }
    }

    /// Decides the datagrams in flight within `which` as lost: their connection has ended, so no answer can
    /// arrive.
    pub(super) fn give_up(
        &mut self,
        which: Range<u64>,
        at: Timestamp,
        rules: &VerdictRules,
        reports: &mut VecDeque<EchoReport>,
    ) {
        let mut drops = Drops { local: &mut HostDrops::default(), remote: &mut HostDrops::default() };
        for sequence in which.start.max(self.cursor)..which.end.min(self.next) {
            if self.slot(sequence).is_some_and(|slot| matches!(slot.state, SlotState::InFlight)) {
                self.lose(sequence, at, rules, &mut drops, reports);
            }
        }
        self.advance();
    }

    /// Decides all sent datagrams that have no verdict: as withdrawn, or as answered if a reply is held.
    pub(super) fn withdraw(&mut self, rules: &VerdictRules, reports: &mut VecDeque<EchoReport>) {
        for sequence in self.cursor..self.next {
            let flow = self.index;
            let Some(slot) = self.slot(sequence) else { continue };
            match slot.state {
                SlotState::Held(_) => self.decide_held(sequence, rules, reports),
                SlotState::InFlight => {
                    slot.state = SlotState::GivenUp;
                    reports.push_back(EchoReport::Decided {
                        flow,
                        sequence,
                        verdict: Verdict::Withdrawn,
                        sample: None,
                    });
                }
                SlotState::Queued | SlotState::Answered(_) | SlotState::GivenUp | SlotState::Void => {}
            }
        }
        self.advance();
    }

    /// Decides one datagram in flight as withdrawn.
    pub(super) fn withdraw_one(&mut self, sequence: u64, reports: &mut VecDeque<EchoReport>) {
        let flow = self.index;
        if let Some(slot) = self.slot(sequence)
            && matches!(slot.state, SlotState::InFlight)
        {
            slot.state = SlotState::GivenUp;
            let verdict = Verdict::Withdrawn;
            reports.push_back(EchoReport::Decided { flow, sequence, verdict, sample: None });
            self.advance();
        }
    }

    /// Time of the next verdict if nothing arrives before.
    pub(super) fn deadline(&self, rules: &VerdictRules) -> Timestamp {
        let index = usize::try_from(self.cursor - self.base()).unwrap_or(usize::MAX);
        let at = |index| self.slots.get(index).map(|slot: &SentDatagram| slot.t1 + rules.lost_after);
        // Datagrams are decided in order, and by its kernel timestamp an earlier one may have left after a
        // later one.
        let first = at(index).max(at(0)).filter(|_| index < self.slots.len()).unwrap_or(Timestamp::NEVER);
        if self.held > 0 { first.min(self.held_until) } else { first }
    }

    /// Number of datagrams that left the host and have no verdict. Takes linear time.
    pub(super) fn in_flight(&self) -> usize {
        let skip = usize::try_from(self.cursor - self.base()).unwrap_or(usize::MAX);
        let is_undecided =
            |slot: &&SentDatagram| matches!(slot.state, SlotState::InFlight | SlotState::Held(_));
        self.slots.iter().skip(skip).filter(is_undecided).count()
    }

    /// Whether no datagram waits for its send or its verdict.
    pub(super) fn is_settled(&self) -> bool {
        self.cursor == self.next
    }
}

#[cfg(test)]
mod tests;
