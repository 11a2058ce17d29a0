//! What truly happened, and what was reported of it.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::echo::{Direction, EchoReport, Mismatch, RoundTrip, Verdict};
use crate::machine::{TX_TIMESTAMP_WAIT, TimestampSource};
use crate::time::{Timestamp, nanos};

/// The truth about every datagram of a run, by flow and sequence number.
#[derive(Debug, Default)]
pub struct Ledger {
    datagrams: BTreeMap<(u8, u64), Truth>,
    /// First copies of replies in the order in which they were handed to the prober's socket.
    order: Vec<(u8, u64)>,
    /// Replies that the prober's host dropped.
    pub dropped_at_prober: u64,
    /// Requests that the responder's host dropped.
    pub dropped_at_responder: u64,
    /// Whether there is a reason to withdraw anything: a goodbye, a foreign responder, or an early end.
    pub may_withdraw: bool,
    /// Replies with a bit changed that were handed to the prober.
    pub corrupted_replies: u64,
    /// Requests that the responder answered.
    pub answered: u64,
    /// A report says nothing about what was sent less than this before the datagram that asked for it.
    pub horizon: Duration,
    /// Whether the responder reports what it received, and forgets nothing of it.
    pub is_reported: bool,
}

/// The truth about one datagram. Times are the prober's and the responder's own monotonic clocks without stamps' errors.
#[derive(Debug, Clone, Default)]
struct Truth {
    left: Option<Timestamp>,
    /// When it left, in true nanoseconds.
    left_truly: u64,
    /// Whether it asks for a report of what was received.
    asks_for_report: bool,
    /// When the kernel's transmit timestamp was handed to the prober.
    timestamped: Option<Timestamp>,
    /// When the first undamaged reply was handed to the prober.
    handed: Option<Timestamp>,
    /// When the prober was told by a router that it was not passed on.
    refused: Option<Timestamp>,
    /// When the first copy of the request was answered, in true nanoseconds.
    reached_responder: Option<u64>,
    replies: Vec<TrueReply>,
}

#[derive(Debug, Clone, Copy)]
struct TrueReply {
    at: Timestamp,
    turnaround: Duration,
    /// When it arrived, in true nanoseconds.
    at_truly: u64,
    /// What the responder took, in true nanoseconds.
    turnaround_truly: u64,
    /// When it left the responder, in true nanoseconds.
    left_truly: u64,
}

/// What a prober reported, counted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Counts {
    /// Verdicts, by datagram.
    pub verdicts: BTreeMap<(u8, u64), (Verdict, Option<RoundTrip>)>,
    /// Datagrams that left.
    pub sent: u64,
    /// Slots that passed.
    pub unsent: u64,
    /// Datagrams that did not leave.
    pub send_errors: u64,
    /// Further copies.
    pub duplicates: u64,
    /// Out of order.
    pub reordered: u64,
    /// After the deadline.
    pub very_late: u64,
    /// Not believed.
    pub mismatched: u64,
    /// Differences between neighbours, sorted.
    pub ipdv: Vec<Duration>,
    /// Runs of losses that began.
    pub bursts: u64,
    /// Lengths of the runs that ended.
    pub burst_lengths: Vec<u32>,
    /// Turnarounds that made no sense.
    pub turnaround_invalid: u64,
    /// Lags of the responder's transmissions.
    pub transmit_lags: Vec<Duration>,
    /// ICMP errors.
    pub complaints: u64,
    /// When each datagram was decided, on the prober's clock.
    pub decided_at: BTreeMap<(u8, u64), Timestamp>,
    /// Datagrams that got a second verdict: always a bug.
    pub decided_twice: u64,
}

impl Counts {
    /// Takes one report, which was made at `at`.
    pub fn add(&mut self, report: &EchoReport, at: Timestamp) {
        match *report {
            EchoReport::Sent { .. } => self.sent += 1,
            EchoReport::Unsent(slots) => self.unsent += slots,
            EchoReport::SendError(_) => self.send_errors += 1,
            EchoReport::Decided { flow, sequence, verdict, sample } => {
                let before = self.verdicts.insert((flow, sequence), (verdict, sample));
                self.decided_twice += u64::from(before.is_some());
                self.decided_at.insert((flow, sequence), at);
            }
            EchoReport::Ipdv(difference) => self.ipdv.push(difference),
            EchoReport::Duplicate => self.duplicates += 1,
            EchoReport::Reordered => self.reordered += 1,
            EchoReport::VeryLate => self.very_late += 1,
            EchoReport::Mismatched(Mismatch::Malformed | Mismatch::Unauthentic | Mismatch::Unsolicited) => {
                self.mismatched += 1;
            }
            EchoReport::BurstBegan => self.bursts += 1,
            EchoReport::BurstEnded(length) => self.burst_lengths.push(length),
            EchoReport::TransmitLag(lag) => self.transmit_lags.push(lag),
            EchoReport::TurnaroundInvalid => self.turnaround_invalid += 1,
            EchoReport::Icmp(_) => self.complaints += 1,
            EchoReport::LossyFlows(_) => {}
        }
    }

    /// Datagrams with a verdict that `is` accepts.
    pub fn count(&self, is: impl Fn(Verdict) -> bool) -> u64 {
        self.verdicts.values().filter(|(verdict, _)| is(*verdict)).count() as u64
    }

    /// Lost datagrams, in any direction.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.count(|verdict| matches!(verdict, Verdict::Lost(_)))
    }
}

/// A datagram reaches the wire at most this long after it was handed over.
pub(super) const HANDOVER_MAX: u64 = 20_000;

impl Ledger {
    /// A datagram left the prober, at `truly` in true nanoseconds.
    pub fn left(&mut self, id: (u8, u64), at: Timestamp, truly: u64, asks_for_report: bool) {
        let truth = self.datagrams.entry(id).or_default();
        truth.left = Some(at);
        truth.left_truly = truly;
        truth.asks_for_report = asks_for_report;
    }

    /// The kernel's transmit timestamp of a datagram was handed to the prober.
    pub fn timestamped(&mut self, id: (u8, u64), at: Timestamp) {
        self.datagrams.entry(id).or_default().timestamped.get_or_insert(at);
    }

    /// An undamaged reply was handed to the prober.
    pub fn handed(&mut self, id: (u8, u64), at: Timestamp) {
        self.datagrams.entry(id).or_default().handed.get_or_insert(at);
    }

    /// A router told the prober that it had not passed on a datagram; the error arrived at `at`.
    pub fn refused(&mut self, id: (u8, u64), at: Timestamp) {
        self.datagrams.entry(id).or_default().refused.get_or_insert(at);
    }

    /// A copy of a request was answered by the responder, at `truly` in true nanoseconds.
    pub fn reached_responder(&mut self, id: (u8, u64), truly: u64) {
        self.answered += 1;
        self.datagrams.entry(id).or_default().reached_responder.get_or_insert(truly);
    }

    /// An undamaged copy of a reply was handed to the prober's socket. Times as the hosts' clocks see them, and truly; and when it
    /// left the responder, truly.
    pub fn reached_prober(
        &mut self,
        id: (u8, u64),
        (at, at_truly): (Timestamp, u64),
        turnaround: (Duration, u64),
        left_truly: u64,
    ) {
        let truth = self.datagrams.entry(id).or_default();
        if truth.replies.is_empty() {
            self.order.push(id);
        }
        let (turnaround, turnaround_truly) = turnaround;
        truth.replies.push(TrueReply { at, turnaround, at_truly, turnaround_truly, left_truly });
    }

    /// Compares what was reported with what happened.
    ///
    /// `tolerance` is how far a round trip may be off, given its elapsed time and turnaround; verdicts within the
    /// tolerance of a limit may fall on either side.
    ///
    /// # Errors
    /// The first difference, in a sentence.
    pub fn compare(
        &self,
        tally: &Counts,
        late_after: Duration,
        lost_after: Duration,
        tolerance: impl Fn(Duration, Duration) -> u64,
    ) -> Result<(), String> {
        let left = self.datagrams.values().filter(|truth| truth.left.is_some()).count() as u64;
        same("datagrams that left", tally.sent, left)?;
        same("datagrams with a verdict", tally.verdicts.len() as u64, left)?;
        same("datagrams decided twice", tally.decided_twice, 0)?;
        let (mut duplicates, mut very_late) = (0, 0);
        for (id, truth) in &self.datagrams {
            let Some(t1) = truth.left else { return Err(format!("{id:?} was answered and never left")) };
            let (verdict, sample) = tally.verdicts.get(id).ok_or_else(|| format!("{id:?} has no verdict"))?;
            let in_time = |reply: &&TrueReply| reply.at.since(t1) <= lost_after;
            let answer = truth.replies.iter().find(in_time);
            let copies = truth.replies.iter().filter(in_time).count() as u64;
            duplicates += copies.saturating_sub(1);
            very_late += truth.replies.len() as u64 - copies;
            match (verdict, answer) {
                (Verdict::Ok | Verdict::Late, Some(answer)) => {
                    let sample = sample.ok_or_else(|| format!("{id:?} is {verdict:?} without a sample"))?;
                    check_timestamp(*id, truth, answer, &sample, lost_after)?;
                    let elapsed = answer.at.since(t1);
                    let allowed = tolerance(elapsed, answer.turnaround);
                    check_round_trip(*id, &sample, elapsed, answer.turnaround, allowed)?;
                    let rtt = elapsed.saturating_sub(answer.turnaround);
                    let margin = nanos(rtt).abs_diff(nanos(late_after));
                    if (*verdict == Verdict::Late) != (rtt > late_after) && margin > allowed {
                        return Err(format!("{id:?} is {verdict:?} after {rtt:?}"));
                    }
                }
                (Verdict::Lost(Direction::Forward), None) if self.was_always_there(*id, truth) => {
                    return Err(format!("{id:?} is lost forward and had reached the responder"));
                }
                (Verdict::Lost(Direction::Reverse), None) if truth.reached_responder.is_none() => {
                    return Err(format!("{id:?} is lost in reverse and never reached the responder"));
                }
                (Verdict::Lost(direction @ (Direction::Reverse | Direction::Unknown)), None)
                    if truth.refused.is_some_and(|at| at + MARGIN < t1 + lost_after) =>
                {
                    return Err(format!("{id:?} is lost, {direction:?}, and a router refused it"));
                }
                (Verdict::Lost(Direction::Unknown), None) => {
                    if let Some(known) = self.reported_direction(*id, truth, t1, lost_after) {
                        return Err(format!("{id:?} is lost, Unknown, and was reported lost, {known:?}"));
                    }
                }
                (Verdict::Lost(_) | Verdict::HostDropped | Verdict::Withdrawn, None) => {}
                (verdict, answer) => return Err(format!("{id:?} is {verdict:?}; its answer: {answer:?}")),
            }
        }
        let blamed = tally.count(|verdict| verdict == Verdict::HostDropped);
        let dropped = self.dropped_at_prober + self.dropped_at_responder;
        if blamed > dropped {
            return Err(format!("{blamed} datagrams are said to be dropped by a host, truly {dropped}"));
        }
        if !self.may_withdraw {
            // A responder that was first heard in reply to plain STAMP is asked what it is.
            let is_plain = |truth: &Truth| !truth.asks_for_report && !truth.replies.is_empty();
            let is_asked = self.datagrams.values().any(is_plain);
            let is_wrong = |id: &(u8, u64)| !is_asked || !self.datagrams[id].asks_for_report;
            let mut withdrawn = tally.verdicts.iter().filter(|(_, found)| found.0 == Verdict::Withdrawn);
            if let Some((id, _)) = withdrawn.find(|(id, _)| is_wrong(id)) {
                return Err(format!("{id:?} is withdrawn without a reason"));
            }
        }
        same("duplicates", tally.duplicates, duplicates)?;
        same("very late replies", tally.very_late, very_late)?;
        same("reordered replies", tally.reordered, self.reordered(lost_after))?;
        let (found, differences) = (&tally.ipdv, neighbours(tally));
        same("differences between neighbours", found.len() as u64, differences.len() as u64)?;
        if *found != differences {
            return Err(format!("differences between neighbours: {found:?}, truly {differences:?}"));
        }
        let (bursts, ended) = bursts(tally);
        same("bursts that began", tally.bursts, bursts)?;
        let mut found = tally.burst_lengths.clone();
        found.sort_unstable();
        if found != ended {
            return Err(format!("lengths of bursts: found {found:?}, truly {ended:?}"));
        }
        Ok(())
    }

    /// Compares round trips with true time, which no clock here shows. `bound` is how far off one may be, given its elapsed
    /// time and turnaround. Returns how many were compared.
    ///
    /// # Errors
    /// The first that is further off, in a sentence.
    pub fn compare_with_true_time(
        &self,
        tally: &Counts,
        bound: impl Fn(Duration, Duration) -> u64,
    ) -> Result<u64, String> {
        let mut compared = 0;
        for (id, (_, sample)) in &tally.verdicts {
            let truth = self.datagrams.get(id).ok_or_else(|| format!("{id:?} never left"))?;
            let (Some(sample), Some(answer)) = (sample, truth.replies.first()) else { continue };
            if sample.transmit == TimestampSource::User {
                continue;
            }
            let elapsed = answer.at_truly - truth.left_truly;
            let true_rtt = elapsed - answer.turnaround_truly;
            let allowed = bound(Duration::from_nanos(elapsed), Duration::from_nanos(answer.turnaround_truly));
            let error = nanos(sample.rtt).abs_diff(true_rtt);
            if error > allowed {
                return Err(format!("{id:?} took {true_rtt} ns: {error} ns off, {allowed} allowed"));
            }
            compared += 1;
        }
        Ok(compared)
    }

    /// Whether it had reached the responder before every reply to something that was sent later by
    /// [`Ledger::horizon`] and that the prober heard: then no report can have said that it was missing.
    fn was_always_there(&self, (flow, sequence): (u8, u64), truth: &Truth) -> bool {
        let Some(reached) = truth.reached_responder else { return false };
        let later = self.datagrams.range((flow, sequence + 1)..=(flow, u64::MAX)).map(|(_, truth)| truth);
        let earliest = truth.left.map(|left| left + self.horizon - MARGIN);
        let later = later.filter(|later| later.left >= earliest);
        let mut reports = later.flat_map(|truth| &truth.replies).map(|reply| reply.left_truly);
        reports.all(|left| reached < left)
    }

    /// Compares when verdicts were reached with when they could be, by a prober that is woken at most `latency`
    /// after it asked to be, and is never stopped.
    ///
    /// # Errors
    /// The first that was too early or too late, in a sentence.
    pub fn compare_times(
        &self,
        tally: &Counts,
        lost_after: Duration,
        latency: Duration,
    ) -> Result<(), String> {
        // Datagrams of a flow are given up in order.
        let mut given_up: BTreeMap<u8, Timestamp> = BTreeMap::new();
        for ((flow, sequence), truth) in &self.datagrams {
            let id = (*flow, *sequence);
            let (Some(left), Some(decided)) = (truth.left, tally.decided_at.get(&id)) else { continue };
            let (verdict, _) = tally.verdicts[&id];
            let deadline = given_up.entry(*flow).or_default();
            *deadline = (*deadline).max(left + lost_after);
            let (least, most) = match (verdict, truth.replies.first(), truth.handed) {
                (Verdict::Withdrawn, ..) => continue,
                (Verdict::Ok | Verdict::Late, Some(reply), Some(handed)) => {
                    (handed, handed.max((reply.at + TX_TIMESTAMP_WAIT).min(*deadline)))
                }
                _ => (left + lost_after, *deadline),
            };
            if *decided + MARGIN < least || *decided > most + latency + MARGIN {
                return Err(format!("{id:?} was {verdict:?} at {decided:?}, not from {least:?} to {most:?}"));
            }
        }
        Ok(())
    }

    /// On which half of the way a datagram was lost, as the prober was told in time: by a reply to another
    /// datagram of its flow, whose report reached back so far. `None` where no report did.
    fn reported_direction(
        &self,
        (flow, sequence): (u8, u64),
        truth: &Truth,
        left: Timestamp,
        lost_after: Duration,
    ) -> Option<Direction> {
        if !self.is_reported || !truth.asks_for_report {
            return None;
        }
        let asking = || {
            let flow = self.datagrams.range((flow, 0)..=(flow, u64::MAX));
            flow.filter(|(_, other)| other.asks_for_report).map(|((_, sequence), other)| (*sequence, other))
        };
        // What the responder received first begins its record; the prober must have been told soon.
        let arrived =
            asking().filter_map(|(number, other)| Some((other.reached_responder?, number, other.left?)));
        let (_, first, began) = arrived.min()?;
        let replies = asking().filter_map(|(_, other)| Some((other.left?, other.replies.first()?)));
        let in_time = |(asked, reply): &(Timestamp, &TrueReply)| reply.at + MARGIN < *asked + lost_after;
        let heard = replies.clone().map(|(_, reply)| reply.at).min()?;
        let is_begun = heard + MARGIN < began + lost_after && began + self.horizon + MARGIN <= left;
        replies.filter(in_time).filter(|(_, reply)| reply.at + MARGIN < left + lost_after).find_map(
            |(asked, reply)| {
                let had = |other: &Truth| other.reached_responder.is_some_and(|at| at <= reply.left_truly);
                let highest = asking().filter(|(_, other)| had(other)).map(|(number, _)| number).max()?;
                let is_covered = (highest.saturating_sub(127)..=highest).contains(&sequence);
                let is_old = left + self.horizon + MARGIN <= asked && sequence > first && is_begun;
                match (is_covered, had(truth)) {
                    (true, true) => Some(Direction::Reverse),
                    (true, false) if is_old => Some(Direction::Forward),
                    (true, false) | (false, _) => None,
                }
            },
        )
    }

    /// RFC 4737, from the order in which first copies arrived in time.
    fn reordered(&self, lost_after: Duration) -> u64 {
        let mut expected: BTreeMap<u8, u64> = BTreeMap::new();
        let mut reordered = 0;
        for (flow, sequence) in &self.order {
            let truth = &self.datagrams[&(*flow, *sequence)];
            let in_time = truth.left.is_some_and(|t1| truth.replies[0].at.since(t1) <= lost_after);
            if !in_time {
                continue;
            }
            let next = expected.entry(*flow).or_default();
            if sequence < next {
                reordered += 1;
            } else {
                *next = sequence + 1;
            }
        }
        reordered
    }
}

/// Nothing is asked of what is closer to a limit than this. Chosen: 1 ms, more than a datagram's hand-over takes.
const MARGIN: Duration = Duration::from_millis(1);

/// The kernel's transmit timestamp counts if it came while the prober may wait for it.
fn check_timestamp(
    id: (u8, u64),
    truth: &Truth,
    answer: &TrueReply,
    sample: &RoundTrip,
    lost_after: Duration,
) -> Result<(), String> {
    let limit = truth.left.map(|left| (answer.at + TX_TIMESTAMP_WAIT).min(left + lost_after));
    let is_in_time = truth.timestamped.is_some_and(|at| Some(at + MARGIN) < limit);
    match sample.transmit {
        TimestampSource::User if is_in_time => Err(format!("{id:?} was measured without its timestamp")),
        TimestampSource::Kernel if truth.timestamped.is_none() => Err(format!("{id:?} had no timestamp")),
        TimestampSource::Kernel | TimestampSource::User => Ok(()),
    }
}

fn check_round_trip(
    id: (u8, u64),
    sample: &RoundTrip,
    elapsed: Duration,
    turnaround: Duration,
    tolerance: u64,
) -> Result<(), String> {
    // A datagram whose kernel stamp was lost is measured from the hand-over, at most this much earlier, by a clock that
    // may be 1 ‰ wrong.
    let fallback =
        if sample.transmit == TimestampSource::User { HANDOVER_MAX + HANDOVER_MAX / 1_000 } else { 0 };
    let truth = nanos(elapsed.saturating_sub(turnaround));
    let error = nanos(sample.rtt).abs_diff(truth);
    if error > tolerance + fallback {
        let found = sample.rtt;
        return Err(format!(
            "{id:?} took {truth} ns, reported {found:?}: {error} ns off, {tolerance} allowed"
        ));
    }
    Ok(())
}

fn same(what: &str, found: u64, truth: u64) -> Result<(), String> {
    if found == truth { Ok(()) } else { Err(format!("{what}: reported {found}, truly {truth}")) }
}

/// The differences between the round trips of neighbours that are both ok, sorted.
fn neighbours(tally: &Counts) -> Vec<Duration> {
    let rtt = |id: &(u8, u64)| match tally.verdicts.get(id) {
        Some((Verdict::Ok, Some(sample))) => Some(sample.rtt),
        _ => None,
    };
    let pairs = tally.verdicts.keys().map(|id| (rtt(id), rtt(&(id.0, id.1 + 1))));
    let mut differences: Vec<Duration> = pairs.filter_map(|(one, next)| Some(one?.abs_diff(next?))).collect();
    differences.sort_unstable();
    differences
}

/// Runs of losses in the order of sequence numbers: how many, and the sorted lengths of those that ended.
fn bursts(tally: &Counts) -> (u64, Vec<u32>) {
    let (mut began, mut ended) = (0, Vec::new());
    let mut run: BTreeMap<u8, u32> = BTreeMap::new();
    for ((flow, _), (verdict, _)) in &tally.verdicts {
        let length = run.entry(*flow).or_default();
        match verdict {
            Verdict::Lost(_) => {
                began += u64::from(*length == 0);
                *length += 1;
            }
            Verdict::Ok | Verdict::Late if *length > 0 => ended.push(std::mem::take(length)),
            Verdict::Ok | Verdict::Late | Verdict::HostDropped | Verdict::Withdrawn => {}
        }
    }
    ended.sort_unstable();
    (began, ended)
}
