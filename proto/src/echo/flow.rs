//! One flow of a path: what was sent on one 5-tuple, and what became of it.

use std::collections::VecDeque;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use super::absence::Absence;
use super::outcome::{Direction, EchoReport, RoundTrip, Verdict};
use crate::machine::{HostDrops, NotSent, STAMP_WAIT, TimestampSource};
use crate::stats::RecentLoss;
use crate::time::{Timestamp, nanos};
use crate::wire::NtpTime;

/// When a datagram's fate is decided.
#[derive(Debug, Clone, Copy)]
pub(super) struct VerdictRules {
    /// A longer round trip is late.
    pub(super) late_after: Duration,
    /// Without a reply by then it is lost.
    pub(super) lost_after: Duration,
    /// A report about a datagram counts against it only when it was asked for this much later: what is still
    /// under way is not missing.
    pub(super) horizon: Duration,
    /// Whether the driver will deliver the kernel's transmit stamps.
    pub(super) tx_timestamps: bool,
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
    kind: RequestForm,
    purpose: Purpose,
    transmit: TimestampSource,
    evidence: ArrivalEvidence,
    state: SlotState,
}

/// What a datagram carries: the responder keeps a record of its own for those with and for those without our extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestForm {
    /// Our session extension.
    WithSession,
    /// Not that.
    WithoutSession,
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
    Detect,
}

/// What is known of a datagram's arrival at the responder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ArrivalEvidence {
    None,
    Arrived,
    Missing,
}

#[derive(Debug)]
enum SlotState {
    /// Handed to the driver.
    Queued,
    /// Left the host; no reply yet.
    InFlight,
    /// Answered; the kernel's transmit stamp is still to come.
    Held(Box<ReplyTimes>),
    /// Answered; the round trip when the verdict was ok.
    Answered(Option<Duration>),
    /// Decided without an answer: lost, or withdrawn.
    GivenUp,
    /// No verdict: it never left.
    Void,
}

/// What a reply tells about its own round trip, before T1 is known for good.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReplyTimes {
    /// T4.
    pub(super) at: Timestamp,
    /// T3 − T2 in nanoseconds, as the responder says.
    pub(super) turnaround: i64,
    /// Everything that does not depend on T1; `rtt`, `turnaround` and `transmit` are filled in.
    pub(super) sample: RoundTrip,
}

/// How a reply fits what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReplyMatch {
    /// The first answer to a datagram that is undecided; when that was sent.
    Answer { sent: Timestamp },
    /// The datagram is answered already.
    Duplicate,
    /// The datagram was given up.
    VeryLate,
    /// Nothing like it was sent.
    Unsolicited,
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
    pub(super) fn push(&mut self, at: Timestamp, wire: NtpTime, kind: RequestForm, purpose: Purpose) -> u64 {
        let sequence = self.next;
        self.next += 1;
        self.sent = self.sent.wrapping_add(1);
        self.slots.push_back(Slot {
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
        self.slot(sequence).filter(|slot| matches!(slot.state, SlotState::InFlight)).map(|slot| slot.t1)
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
        // What has left is decided by what comes back, whatever is said of it later.
        let SlotState::Queued = slot.state else { return };
        slot.state = SlotState::Void;
        self.sent = self.sent.wrapping_sub(1);
        reports.push_back(EchoReport::SendError(why));
        self.advance();
    }

    /// Whether `sequence` was sent, is remembered, and carried T1 as `wire`.
    pub(super) fn has_sent(&self, sequence: u64, wire: NtpTime) -> bool {
        let index = sequence.checked_sub(self.base()).and_then(|index| usize::try_from(index).ok());
        index.and_then(|index| self.slots.get(index)).is_some_and(|slot| slot.wire == wire)
    }

    /// How a reply to `sequence` that carries T1 as `wire` and arrived at `at` fits.
    pub(super) fn fit(
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

    /// Takes the answer to a datagram that is in flight. It is decided at once if T1 is known for good.
    pub(super) fn answer(
        &mut self,
        sequence: u64,
        reply: ReplyTimes,
        rules: &VerdictRules,
        reports: &mut VecDeque<EchoReport>,
    ) {
        if sequence < self.expected {
            reports.push_back(EchoReport::Reordered);
        } else {
            self.expected = sequence + 1;
        }
        let slot = self.slot(sequence).expect("it fitted");
        if rules.tx_timestamps && slot.transmit == TimestampSource::User {
            // Rare: the stamp is normally there before the reply, and a slot is kept small for the others.
            slot.state = SlotState::Held(Box::new(reply));
            self.held += 1;
            self.held_until = self.held_until.min(reply.at + STAMP_WAIT);
        } else {
            self.decide(sequence, &reply, rules, reports);
        }
    }

    /// Decides a datagram whose reply was held, if its kernel stamp has come.
    pub(super) fn release(
        &mut self,
        sequence: u64,
        rules: &VerdictRules,
        reports: &mut VecDeque<EchoReport>,
    ) {
        if self.slot(sequence).is_some_and(|slot| matches!(slot.state, SlotState::Held(_))) {
            self.finish(sequence, rules, reports);
        }
    }

    fn finish(&mut self, sequence: u64, rules: &VerdictRules, reports: &mut VecDeque<EchoReport>) {
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

    /// The round trip of a datagram whose verdict is ok.
    fn round_trip(&mut self, sequence: u64) -> Option<Duration> {
        if sequence + 1 == self.base() {
            return self.before;
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

    /// A run of losses ends when the next datagram that has a fate at all is found answered.
    fn end_burst(&mut self, reports: &mut VecDeque<EchoReport>) {
        let next = self.slots.iter().find(|slot| !matches!(slot.state, SlotState::GivenUp | SlotState::Void));
        if self.burst > 0 && next.is_some_and(|slot| matches!(slot.state, SlotState::Answered(_))) {
            reports.push_back(EchoReport::BurstEnded(std::mem::take(&mut self.burst)));
        }
    }

    /// Learns from a responder which of the undecided datagrams of a kind, between the two ends of `span`, had arrived when
    /// it answered a datagram that was sent at `asked`. `arrived` is told a sequence number and when that was sent; `None`:
    /// the responder says nothing about that one.
    pub(super) fn learn(
        &mut self,
        span: RangeInclusive<u64>,
        kind: RequestForm,
        asked: Timestamp,
        rules: &VerdictRules,
        arrived: impl Fn(u64, Timestamp) -> Option<bool>,
    ) {
        let from = (*span.start()).max(self.cursor);
        for sequence in from..=(*span.end()).min(self.next.saturating_sub(1)) {
            let Some(slot) = self.slot(sequence).filter(|slot| slot.kind == kind) else { continue };
            match arrived(sequence, slot.t1) {
                Some(true) => slot.evidence = ArrivalEvidence::Arrived,
                Some(false) if slot.evidence == ArrivalEvidence::None && asked >= slot.t1 + rules.horizon => {
                    slot.evidence = ArrivalEvidence::Missing;
                }
                Some(false) | None => {}
            }
        }
    }

    /// A router said that it could not pass on a datagram.
    pub(super) fn refused_on_the_way(&mut self, sequence: u64, wire: NtpTime) {
        if let Some(slot) = self.slot(sequence)
            && slot.wire == wire
            && slot.evidence == ArrivalEvidence::None
        {
            slot.evidence = ArrivalEvidence::Missing;
        }
    }

    /// Decides everything whose deadline lies at or before `drained`.
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
                SlotState::Held(_) => self.finish(sequence, rules, reports),
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
            let Some(Slot { state: SlotState::Held(reply), .. }) = self.slot(sequence) else { continue };
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
        rules: &VerdictRules,
        drops: &mut Drops<'_>,
        reports: &mut VecDeque<EchoReport>,
    ) {
        let flow = self.index;
        let slot = self.slot(sequence).expect("it is in flight");
        let (evidence, t1, purpose) = (slot.evidence, slot.t1, slot.purpose);
        slot.state = SlotState::GivenUp;
        let Drops { here, there } = drops;
        let ours = &mut || here.claim(flow, t1, deadline);
        let theirs = &mut || there.claim(0, t1, deadline);
        let (host_dropped, direction) = match evidence {
            ArrivalEvidence::Arrived => (ours(), Direction::Reverse),
            ArrivalEvidence::Missing => (theirs(), Direction::Forward),
            ArrivalEvidence::None => (ours() || theirs(), Direction::Unknown),
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
        self.before = match slot.state {
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

    /// Decides those of some datagrams that have no verdict: their way has ended, and nothing can come back.
    pub(super) fn give_up(
        &mut self,
        which: Range<u64>,
        at: Timestamp,
        rules: &VerdictRules,
        reports: &mut VecDeque<EchoReport>,
    ) {
        let mut drops = Drops { here: &mut HostDrops::default(), there: &mut HostDrops::default() };
        for sequence in which.start.max(self.cursor)..which.end.min(self.next) {
            if self.slot(sequence).is_some_and(|slot| matches!(slot.state, SlotState::InFlight)) {
                self.lose(sequence, at, rules, &mut drops, reports);
            }
        }
        self.advance();
    }

    /// Decides everything that left the host and has no verdict: withdrawn, or answered if a reply is held.
    pub(super) fn withdraw(&mut self, rules: &VerdictRules, reports: &mut VecDeque<EchoReport>) {
        for sequence in self.cursor..self.next {
            let flow = self.index;
            let Some(slot) = self.slot(sequence) else { continue };
            match slot.state {
                SlotState::Held(_) => self.finish(sequence, rules, reports),
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

    /// Decides one datagram that is under way: withdrawn.
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

    /// When something must be decided if nothing arrives.
    pub(super) fn deadline(&self, rules: &VerdictRules) -> Timestamp {
        let index = usize::try_from(self.cursor - self.base()).unwrap_or(usize::MAX);
        let at = |index| self.slots.get(index).map(|slot: &Slot| slot.t1 + rules.lost_after);
        // Datagrams are decided in order, and by the kernel's stamps one may have left after a later one.
        let first = at(index).max(at(0)).filter(|_| index < self.slots.len()).unwrap_or(Timestamp::NEVER);
        if self.held > 0 { first.min(self.held_until) } else { first }
    }

    /// Datagrams that left the host and have no verdict, counted one by one.
    pub(super) fn in_flight(&self) -> usize {
        let skip = usize::try_from(self.cursor - self.base()).unwrap_or(usize::MAX);
        let is_undecided = |slot: &&Slot| matches!(slot.state, SlotState::InFlight | SlotState::Held(_));
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

#[cfg(test)]
mod tests {
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
    const WAITING: VerdictRules = VerdictRules { tx_timestamps: true, ..RULES };

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
        ReplyTimes { at, turnaround: 0, sample: RoundTrip::bare(TimestampSource::Kernel) }
    }

    /// A flow and what it reported.
    struct Hand {
        flow: Flow,
        rules: VerdictRules,
        reports: VecDeque<EchoReport>,
        here: HostDrops,
        there: HostDrops,
    }

    impl Hand {
        /// A flow that has sent a datagram at each of these milliseconds.
        fn sent(rules: VerdictRules, times: &[u64]) -> Self {
            let (here, there) = (HostDrops::default(), HostDrops::default());
            let flow = Flow::new(3, 1, 9, at(0));
            let mut hand = Self { flow, rules, reports: VecDeque::new(), here, there };
            for time in times {
                hand.send(at(*time));
            }
            hand
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
            let fit = self.flow.fit(sequence, wire(sequence), at, &self.rules);
            assert!(matches!(fit, ReplyMatch::Answer { .. }), "{fit:?}");
            self.flow.answer(sequence, reply(at), &self.rules, &mut self.reports);
        }

        /// The kernel says when a datagram left.
        fn timestamp(&mut self, sequence: u64, at: Timestamp) {
            self.flow.sent(sequence, at, TimestampSource::Kernel, &mut self.reports);
            self.flow.release(sequence, &self.rules, &mut self.reports);
        }

        fn expire(&mut self, drained: Timestamp) {
            let mut drops = Drops { here: &mut self.here, there: &mut self.there };
            self.flow.expire(drained, &self.rules, &mut drops, &mut self.reports);
        }

        fn learn(&mut self, sequence: u64, asked: Timestamp, has_arrived: bool) {
            let span = sequence..=sequence;
            self.flow.learn(span, RequestForm::WithSession, asked, &self.rules, |_, _| Some(has_arrived));
        }

        fn fit(&mut self, sequence: u64, at: Timestamp) -> ReplyMatch {
            self.flow.fit(sequence, wire(sequence), at, &self.rules)
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
            let [sample] = decided.collect::<Vec<RoundTrip>>()[..] else {
                panic!("one datagram is answered")
            };
            sample
        }
    }

    const UNKNOWN: Verdict = Verdict::Lost(Direction::Unknown);
    const FORWARD: Verdict = Verdict::Lost(Direction::Forward);
    const REVERSE: Verdict = Verdict::Lost(Direction::Reverse);

    #[test]
    fn reply_at_the_deadline_is_an_answer_and_one_that_comes_later_is_very_late() {
        let mut hand = Hand::sent(RULES, &[10]);
        assert_eq!(hand.fit(0, at(3_010)), ReplyMatch::Answer { sent: at(10) });
        assert_eq!(hand.fit(0, at(3_010) + nanosecond()), ReplyMatch::VeryLate);
        assert_eq!(hand.fit(1, at(20)), ReplyMatch::Unsolicited);
        assert_eq!(hand.flow.fit(0, wire(1), at(20), &RULES), ReplyMatch::Unsolicited, "another T1");
        hand.expire(at(3_010) - nanosecond());
        assert_eq!(hand.verdicts(), []);
        hand.expire(at(3_010));
        assert_eq!(hand.verdicts(), [(0, UNKNOWN)]);
        assert_eq!(hand.fit(0, at(3_010)), ReplyMatch::VeryLate, "it is forgotten");
    }

    #[test]
    fn what_did_not_leave_has_no_answer_and_what_is_decided_has_no_second_one() {
        let mut hand = Hand::sent(WAITING, &[]);
        let queued = hand.queue(at(1));
        assert_eq!(hand.fit(queued, at(2)), ReplyMatch::Unsolicited);
        hand.flow.not_sent(queued, NotSent::Buffer, &mut hand.reports);
        assert_eq!(hand.fit(queued, at(2)), ReplyMatch::Unsolicited);
        let held = hand.send(at(3));
        hand.answer(held, at(4));
        assert_eq!(hand.fit(held, at(5)), ReplyMatch::Duplicate);
        hand.timestamp(held, at(3));
        assert_eq!(hand.fit(held, at(5)), ReplyMatch::Duplicate);
        let withdrawn = hand.send(at(6));
        hand.flow.withdraw_one(withdrawn, &mut hand.reports);
        assert_eq!(hand.fit(withdrawn, at(7)), ReplyMatch::VeryLate);
        assert_eq!(hand.verdicts(), [(held, Verdict::Ok), (withdrawn, Verdict::Withdrawn)]);
    }

    #[test]
    fn round_trip_as_long_as_the_limit_is_ok_and_a_longer_one_is_late() {
        let mut hand = Hand::sent(RULES, &[10, 20]);
        hand.answer(0, at(1_010));
        hand.answer(1, at(1_020) + nanosecond());
        assert_eq!(hand.verdicts(), [(0, Verdict::Ok), (1, Verdict::Late)]);
    }

    #[test]
    fn reply_before_transmit_timestamp_is_decided_when_that_comes() {
        let mut hand = Hand::sent(WAITING, &[10]);
        hand.answer(0, at(30));
        assert_eq!((hand.verdicts(), hand.flow.in_flight()), (vec![], 1));
        assert!(!hand.flow.is_settled());
        hand.timestamp(0, at(11));
        let sample = hand.sample();
        assert_eq!((sample.rtt, sample.transmit), (Duration::from_millis(19), TimestampSource::Kernel));
        assert_eq!(hand.flow.in_flight(), 0);
        assert!(hand.flow.is_settled());
        // A second one changes nothing, and one that comes first makes no reply wait.
        hand.timestamp(0, at(12));
        hand.send(at(40));
        hand.timestamp(1, at(42));
        hand.answer(1, at(50));
        let sample = hand.sample();
        assert_eq!((sample.rtt, sample.transmit), (Duration::from_millis(8), TimestampSource::Kernel));
        assert_eq!(hand.flow.deadline(&WAITING), Timestamp::NEVER, "no reply waits");
    }

    #[test]
    fn reply_whose_transmit_timestamp_never_comes_is_decided_after_a_tenth_of_a_second() {
        let mut hand = Hand::sent(WAITING, &[10, 20, 30]);
        hand.answer(1, at(50));
        hand.answer(2, at(60));
        hand.answer(0, at(55));
        assert_eq!(hand.flow.deadline(&WAITING), at(150));
        hand.expire(at(150) - nanosecond());
        assert_eq!(hand.verdicts(), []);
        hand.expire(at(150));
        let sample = hand.sample();
        assert_eq!((sample.rtt, sample.transmit), (Duration::from_millis(30), TimestampSource::User));
        assert_eq!(hand.flow.deadline(&WAITING), at(155), "of those that still wait the first");
        hand.timestamp(0, at(12));
        assert_eq!(hand.sample().rtt, Duration::from_millis(43));
        hand.expire(at(159));
        assert_eq!(hand.verdicts(), []);
        hand.expire(at(160));
        assert_eq!(hand.verdicts(), [(2, Verdict::Ok)]);
        assert_eq!(hand.flow.deadline(&WAITING), Timestamp::NEVER);
    }

    #[test]
    fn reply_that_waits_is_decided_at_the_latest_when_its_datagram_would_be_lost() {
        let mut hand = Hand::sent(VerdictRules { late_after: RULES.lost_after, ..WAITING }, &[10]);
        hand.answer(0, at(2_950));
        hand.expire(at(3_009));
        assert_eq!(hand.verdicts(), []);
        hand.expire(at(3_010));
        assert_eq!(hand.verdicts(), [(0, Verdict::Ok)]);
        assert_eq!(hand.flow.deadline(&hand.rules), Timestamp::NEVER);
        let mut hand = Hand::sent(WAITING, &[10]);
        hand.answer(0, at(20));
        hand.flow.withdraw(&WAITING, &mut hand.reports);
        assert_eq!(hand.verdicts(), [(0, Verdict::Ok)], "nor is it withdrawn");
    }

    #[test]
    fn report_counts_against_a_datagram_only_if_it_was_asked_for_a_horizon_later() {
        for (asked, verdict) in [(at(260) - nanosecond(), UNKNOWN), (at(260), FORWARD)] {
            let mut hand = Hand::sent(RULES, &[10]);
            hand.learn(0, asked, false);
            hand.expire(at(3_010));
            assert_eq!(hand.verdicts(), [(0, verdict)]);
        }
        let mut hand = Hand::sent(RULES, &[10]);
        hand.learn(0, at(11), true);
        hand.expire(at(3_010));
        assert_eq!(hand.verdicts(), [(0, REVERSE)], "what has arrived has arrived");
    }

    #[test]
    fn datagram_that_has_arrived_is_not_missing_whatever_is_said_before_or_after() {
        let mut hand = Hand::sent(RULES, &[10, 20, 30, 40]);
        hand.learn(0, at(500), false);
        hand.learn(0, at(600), true);
        hand.learn(1, at(500), true);
        hand.learn(1, at(600), false);
        hand.flow.refused_on_the_way(1, wire(1));
        hand.flow.refused_on_the_way(2, wire(2));
        hand.flow.refused_on_the_way(3, wire(2));
        hand.flow.refused_on_the_way(4, wire(4));
        hand.expire(at(5_000));
        assert_eq!(hand.verdicts(), [(0, REVERSE), (1, REVERSE), (2, FORWARD), (3, UNKNOWN)]);
    }

    #[test]
    fn report_is_about_the_datagrams_between_its_ends_that_are_undecided_and_of_its_kind() {
        let mut hand = Hand::sent(RULES, &[10, 20, 30, 40, 50]);
        hand.flow.push(at(60), wire(5), RequestForm::WithoutSession, Purpose::Measure);
        hand.flow.sent(5, at(60), TimestampSource::User, &mut hand.reports);
        hand.answer(1, at(70));
        let seen = std::cell::RefCell::new(Vec::new());
        hand.flow.learn(1..=9, RequestForm::WithSession, at(900), &RULES, |sequence, sent| {
            seen.borrow_mut().push((sequence, sent));
            [None, None, Some(false), Some(true), None][usize::try_from(sequence).unwrap()]
        });
        let expected = [(1, at(20)), (2, at(30)), (3, at(40)), (4, at(50))];
        assert_eq!(seen.into_inner(), expected);
        hand.expire(at(5_000));
        let lost = [(0, UNKNOWN), (2, FORWARD), (3, REVERSE), (4, UNKNOWN), (5, UNKNOWN)];
        assert_eq!(hand.verdicts()[1..], lost);
    }

    #[test]
    fn turnaround_is_credible_up_to_two_clocks_skew_beyond_the_whole() {
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
        let mut hand = Hand::sent(RULES, &[10]);
        let stated = ReplyTimes { turnaround: 5 * 1_000_000, ..reply(at(30)) };
        hand.flow.answer(0, stated, &RULES, &mut hand.reports);
        let sample = hand.sample();
        assert_eq!(sample.turnaround, Duration::from_millis(5));
        assert_eq!(sample.rtt, Duration::from_millis(15));
    }

    #[test]
    fn flow_takes_as_many_undecided_datagrams_as_its_limit() {
        let mut hand = Hand::sent(RULES, &[]);
        for index in 0..Flow::PENDING as u64 {
            assert!(hand.flow.has_room(), "{index} are sent");
            hand.send(at(1) + Duration::from_micros(index));
        }
        assert!(!hand.flow.has_room());
        assert_eq!(hand.flow.in_flight(), Flow::PENDING);
        hand.expire(at(3_001));
        assert!(hand.flow.has_room());
    }

    #[test]
    fn deadline_is_that_of_the_first_undecided_datagram_and_never_before_the_oldest_ones() {
        let mut hand = Hand::sent(RULES, &[]);
        assert_eq!(hand.flow.deadline(&RULES), Timestamp::NEVER);
        for time in [10, 20, 30] {
            hand.send(at(time));
        }
        assert_eq!(hand.flow.deadline(&RULES), at(3_010));
        hand.answer(0, at(15));
        assert_eq!((hand.flow.deadline(&RULES), hand.flow.in_flight()), (at(3_020), 2));
        // By the kernel's timestamp the oldest, which is decided, left last.
        hand.timestamp(0, at(500));
        assert_eq!(hand.flow.deadline(&RULES), at(3_500));
        hand.expire(at(3_499));
        assert_eq!(hand.verdicts(), [(0, Verdict::Ok)]);
        hand.expire(at(3_500));
        assert_eq!(hand.verdicts(), [(1, UNKNOWN), (2, UNKNOWN)]);
    }

    #[test]
    fn wire_number_stands_for_the_latest_datagram_that_it_may_belong_to() {
        let mut flow = Flow::new(0, 1, 9, at(0));
        assert_eq!((flow.extend(0), flow.extend(1), flow.extend(u32::MAX)), (Some(0), None, None));
        flow.next = (5 << 32) + 7;
        assert_eq!(flow.extend(7), Some((5 << 32) + 7));
        assert_eq!(flow.extend(6), Some((5 << 32) + 6));
        assert_eq!(flow.extend(8), Some((4 << 32) + 8));
    }

    #[test]
    fn count_of_sent_datagrams_leaves_out_those_that_did_not_leave() {
        let mut hand = Hand::sent(RULES, &[10, 20]);
        assert_eq!(hand.flow.upcoming(), (2, 3));
        let queued = hand.queue(at(30));
        assert_eq!(hand.flow.upcoming(), (3, 4));
        hand.flow.not_sent(queued, NotSent::Permission, &mut hand.reports);
        hand.flow.not_sent(queued, NotSent::Permission, &mut hand.reports);
        hand.flow.not_sent(0, NotSent::Permission, &mut hand.reports);
        assert_eq!(hand.flow.upcoming(), (3, 3));
        let errors = |report: &&EchoReport| matches!(report, EchoReport::SendError(NotSent::Permission));
        assert_eq!(hand.reports.iter().filter(errors).count(), 1);
    }

    #[test]
    fn burst_is_a_run_of_losses_that_ends_with_an_answer_and_no_other_fate_interrupts_it() {
        let mut hand = Hand::sent(RULES, &[10, 20]);
        let void = hand.queue(at(30));
        hand.flow.not_sent(void, NotSent::Buffer, &mut hand.reports);
        for time in [40, 50, 60] {
            hand.send(at(time));
        }
        // Too late to have been one of the first two.
        hand.here.add(3, at(3_030), at(3_031), 1);
        hand.answer(5, at(70));
        hand.expire(at(5_000));
        let bursts: Vec<EchoReport> = hand
            .reports
            .drain(..)
            .filter(|report| matches!(report, EchoReport::BurstBegan | EchoReport::BurstEnded(_)))
            .collect();
        assert_eq!(bursts, [EchoReport::BurstBegan, EchoReport::BurstEnded(3)]);
    }

    #[test]
    fn drop_of_a_host_excuses_what_it_may_have_been() {
        let cases = [
            // Where drops were, whether the datagram is known to have arrived, and what follows.
            ((1, 0), None, Verdict::HostDropped),
            ((0, 1), None, Verdict::HostDropped),
            ((1, 0), Some(true), Verdict::HostDropped),
            ((0, 1), Some(true), REVERSE),
            ((1, 0), Some(false), FORWARD),
            ((0, 1), Some(false), Verdict::HostDropped),
            ((0, 0), None, UNKNOWN),
        ];
        for ((here, there), has_arrived, verdict) in cases {
            let mut hand = Hand::sent(RULES, &[10]);
            hand.here.add(3, at(20), at(30), here);
            hand.there.add(0, at(20), at(30), there);
            if let Some(has_arrived) = has_arrived {
                hand.learn(0, at(900), has_arrived);
            }
            hand.expire(at(3_010));
            assert_eq!(hand.verdicts(), [(0, verdict)], "{here} here, {there} there, {has_arrived:?}");
        }
    }

    #[test]
    fn neighbour_that_is_forgotten_still_has_its_round_trip() {
        let mut hand = Hand::sent(RULES, &[10, 20, 30, 40]);
        let differences = |hand: &mut Hand| -> Vec<u128> {
            let reports = hand.reports.drain(..).filter_map(|report| {
                let EchoReport::Ipdv(difference) = report else { return None };
                Some(difference.as_millis())
            });
            reports.collect()
        };
        hand.answer(0, at(15));
        hand.expire(at(3_010));
        // The network's part is short: the responder took the rest.
        let slow = ReplyTimes { turnaround: 2_983 * 1_000_000, ..reply(at(3_010)) };
        hand.flow.answer(1, slow, &RULES, &mut hand.reports);
        assert_eq!(differences(&mut hand), [2]);
        hand.answer(3, at(52));
        assert_eq!(differences(&mut hand), [0; 0], "its neighbour has no answer yet");
        hand.answer(2, at(51));
        assert_eq!(differences(&mut hand), [14, 9]);
        let mut hand = Hand::sent(RULES, &[10, 20]);
        hand.answer(0, at(1_500));
        hand.answer(1, at(30));
        assert_eq!(differences(&mut hand), [0; 0], "a late one is no neighbour");
    }

    #[test]
    fn end_of_a_connection_decides_the_undecided_among_some_datagrams() {
        let mut hand = Hand::sent(RULES, &[10, 20, 30, 40]);
        hand.answer(1, at(45));
        hand.flow.give_up(0..3, at(50), &RULES, &mut hand.reports);
        assert_eq!(hand.verdicts(), [(1, Verdict::Ok), (0, UNKNOWN), (2, UNKNOWN)]);
        assert_eq!((hand.flow.in_flight(), hand.flow.is_settled()), (1, false));
        hand.flow.give_up(0..9, at(60), &RULES, &mut hand.reports);
        assert_eq!(hand.verdicts(), [(3, UNKNOWN)]);
        assert_eq!((hand.flow.in_flight(), hand.flow.is_settled()), (0, true));
        assert_eq!(hand.flow.deadline(&RULES), Timestamp::NEVER);
    }

    #[test]
    fn withdrawal_decides_what_left_and_nothing_else() {
        let mut hand = Hand::sent(RULES, &[10, 20]);
        hand.answer(0, at(15));
        let queued = hand.queue(at(30));
        hand.flow.withdraw(&RULES, &mut hand.reports);
        assert_eq!(hand.verdicts(), [(0, Verdict::Ok), (1, Verdict::Withdrawn)]);
        assert!(!hand.flow.is_settled(), "one has not left yet");
        hand.flow.withdraw_one(queued, &mut hand.reports);
        hand.flow.sent(queued, at(31), TimestampSource::User, &mut hand.reports);
        assert_eq!(hand.flow.in_flight_since(queued), Some(at(31)));
        assert_eq!(hand.flow.in_flight_since(1), None);
        assert_eq!(hand.flow.sent_at(1), Some(at(20)));
        hand.flow.withdraw_one(queued, &mut hand.reports);
        assert_eq!(hand.verdicts(), [(queued, Verdict::Withdrawn)]);
        assert!(hand.flow.is_settled());
    }

    #[test]
    fn reply_behind_a_later_ones_is_reordered() {
        let mut hand = Hand::sent(RULES, &[10, 20, 30]);
        for (sequence, is_reordered) in [(1, false), (0, true), (2, false)] {
            hand.reports.clear();
            hand.answer(sequence, at(40));
            assert_eq!(hand.reports.contains(&EchoReport::Reordered), is_reordered, "{sequence}");
        }
    }

    #[test]
    fn datagram_is_remembered_with_the_time_that_it_carries_until_it_is_decided() {
        let mut hand = Hand::sent(RULES, &[10, 20]);
        assert!(hand.flow.has_sent(0, wire(0)) && hand.flow.has_sent(1, wire(1)));
        assert!(!hand.flow.has_sent(0, wire(1)) && !hand.flow.has_sent(2, wire(2)));
        hand.expire(at(3_010));
        assert!(!hand.flow.has_sent(0, wire(0)) && hand.flow.has_sent(1, wire(1)));
    }

    #[test]
    fn time_of_a_datagram_is_the_first_that_the_kernel_says() {
        let mut hand = Hand::sent(WAITING, &[10]);
        let mut sent = |milliseconds, by| {
            hand.flow.sent(0, at(milliseconds), by, &mut hand.reports);
            hand.flow.sent_at(0)
        };
        assert_eq!(sent(15, TimestampSource::User), Some(at(10)));
        assert_eq!(sent(11, TimestampSource::Kernel), Some(at(11)));
        assert_eq!(sent(12, TimestampSource::Kernel), Some(at(11)));
        assert_eq!(sent(13, TimestampSource::User), Some(at(11)));
        assert_eq!(hand.reports, [EchoReport::Sent { flow: 3, sequence: 0 }]);
    }

    #[test]
    fn question_or_a_datagram_of_an_absent_peer_is_withdrawn_and_not_lost() {
        let mut hand = Hand::sent(RULES, &[10]);
        hand.flow.push(at(20), wire(1), RequestForm::WithSession, Purpose::Detect);
        hand.flow.sent(1, at(20), TimestampSource::User, &mut hand.reports);
        hand.expire(at(4_000));
        assert_eq!(hand.verdicts(), [(0, UNKNOWN), (1, Verdict::Withdrawn)]);
        let mut hand = Hand::sent(RULES, &[10, 20, 70_000]);
        hand.rules.absence = Some(Absence::begin(at(3_015), None));
        hand.expire(at(80_000));
        assert_eq!(hand.verdicts(), [(0, UNKNOWN), (1, Verdict::Withdrawn), (2, UNKNOWN)]);
    }

    #[test]
    fn what_is_forgotten_counts_neither_for_the_deadline_nor_as_undecided() {
        let mut hand = Hand::sent(RULES, &[10, 20, 30, 40, 50]);
        hand.expire(at(3_020));
        assert_eq!((hand.flow.deadline(&RULES), hand.flow.in_flight()), (at(3_030), 3));
        hand.answer(2, at(3_025));
        assert_eq!((hand.flow.deadline(&RULES), hand.flow.in_flight()), (at(3_040), 2));
    }

    #[test]
    fn answer_without_a_loss_before_it_ends_no_burst() {
        let mut hand = Hand::sent(RULES, &[10]);
        hand.answer(0, at(20));
        hand.expire(at(4_000));
        assert!(!hand.reports.iter().any(|report| matches!(report, EchoReport::BurstEnded(_))));
    }

    #[test]
    fn two_losses_make_a_flow_lossy() {
        let mut hand = Hand::sent(RULES, &[10, 20, 30]);
        hand.answer(2, at(40));
        hand.expire(at(3_010));
        assert!(!hand.flow.loss.is_lossy());
        hand.expire(at(3_020));
        assert!(hand.flow.loss.is_lossy());
    }
}
