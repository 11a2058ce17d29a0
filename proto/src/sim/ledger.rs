//! The ledger of true events, and its comparison with the reports of a prober.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::echo::{Direction, EchoReport, Mismatch, RoundTrip, Verdict};
use crate::machine::{TX_TIMESTAMP_WAIT, TimestampSource};
use crate::time::{Timestamp, nanos};

/// The true events of every datagram of a run, by flow and sequence number.
#[derive(Debug, Default)]
pub struct Ledger {
    datagrams: BTreeMap<(u8, u64), Truth>,
    /// First copies of replies in the order in which they reached the prober's socket.
    order: Vec<(u8, u64)>,
    /// Number of replies that the prober's host dropped.
    pub dropped_at_prober: u64,
    /// Number of requests that the responder's host dropped.
    pub dropped_at_responder: u64,
    /// Whether datagrams may be withdrawn: because of a goodbye, a third-party responder, or an early end of
    /// the run.
    pub may_withdraw: bool,
    /// Number of replies with a changed bit that reached the prober's socket.
    pub corrupted_replies: u64,
    /// Number of requests that the responder answered.
    pub answered: u64,
    /// A report is no evidence against datagrams sent less than this before the datagram that requested it.
    pub horizon: Duration,
    /// Whether the responder reports what it received and keeps its sessions during the whole run.
    pub is_reported: bool,
}

/// The true events of one datagram. Times are readings of the hosts' monotonic clocks, without timestamping
/// errors.
#[derive(Debug, Clone, Default)]
struct Truth {
    left: Option<Timestamp>,
    /// Time at which it left, in true nanoseconds.
    left_truly: u64,
    /// Whether it requests a report of the received datagrams.
    requests_report: bool,
    /// Time at which the prober got the kernel's transmit timestamp.
    timestamped: Option<Timestamp>,
    /// Time at which the prober got the first undamaged reply.
    delivered: Option<Timestamp>,
    /// Time at which an ICMP error about it arrived at the prober.
    dropped_by_router: Option<Timestamp>,
    /// Time at which the responder answered the first copy, in true nanoseconds.
    reached_responder: Option<u64>,
    replies: Vec<TrueReply>,
}

#[derive(Debug, Clone, Copy)]
struct TrueReply {
    at: Timestamp,
    turnaround: Duration,
    /// Time of arrival, in true nanoseconds.
    at_truly: u64,
    /// Turnaround in true nanoseconds.
    turnaround_truly: u64,
    /// Time at which it left the responder, in true nanoseconds.
    left_truly: u64,
}

/// Counts of a prober's reports.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Counts {
    /// Verdicts, by datagram.
    pub verdicts: BTreeMap<(u8, u64), (Verdict, Option<RoundTrip>)>,
    /// Datagrams that left the host.
    pub sent: u64,
    /// Slots that passed without a send.
    pub unsent: u64,
    /// Datagrams that did not leave the host.
    pub send_errors: u64,
    /// Duplicate replies.
    pub duplicates: u64,
    /// Reordered replies.
    pub reordered: u64,
    /// Replies after the deadline.
    pub very_late: u64,
    /// Rejected replies.
    pub mismatched: u64,
    /// Differences between consecutive round trips. [`World::run`](super::World::run) returns them sorted.
    pub ipdv: Vec<Duration>,
    /// Bursts that began.
    pub bursts: u64,
    /// Lengths of the bursts that ended.
    pub burst_lengths: Vec<u32>,
    /// Implausible turnarounds.
    pub turnaround_invalid: u64,
    /// Transmit lags of the responder.
    pub transmit_lags: Vec<Duration>,
    /// ICMP errors.
    pub icmp_errors: u64,
    /// Time of each datagram's verdict, on the prober's clock.
    pub decided_at: BTreeMap<(u8, u64), Timestamp>,
    /// Datagrams with a second verdict, which is always a bug.
    pub decided_twice: u64,
}

impl Counts {
    /// Adds a report that was made at `at`.
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
            EchoReport::Icmp(_) => self.icmp_errors += 1,
            EchoReport::LossyFlows(_) => {}
        }
    }

    /// Number of datagrams with a verdict for which `is` returns true.
    pub fn count(&self, is: impl Fn(Verdict) -> bool) -> u64 {
        self.verdicts.values().filter(|(verdict, _)| is(*verdict)).count() as u64
    }

    /// Number of lost datagrams, in any direction.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.count(|verdict| matches!(verdict, Verdict::Lost(_)))
    }
}

/// Maximum time in nanoseconds from the send call until a datagram reaches the wire.
pub(super) const HANDOVER_MAX: u64 = 20_000;

impl Ledger {
    /// Records that a datagram left the prober, at `truly` in true nanoseconds.
    pub fn left(&mut self, id: (u8, u64), at: Timestamp, truly: u64, requests_report: bool) {
        let truth = self.datagrams.entry(id).or_default();
        truth.left = Some(at);
        truth.left_truly = truly;
        truth.requests_report = requests_report;
    }

    /// Records that the prober got the kernel's transmit timestamp of a datagram.
    pub fn timestamped(&mut self, id: (u8, u64), at: Timestamp) {
        self.datagrams.entry(id).or_default().timestamped.get_or_insert(at);
    }

    /// Records that the prober got an undamaged reply.
    pub fn delivered(&mut self, id: (u8, u64), at: Timestamp) {
        self.datagrams.entry(id).or_default().delivered.get_or_insert(at);
    }

    /// Records that an ICMP error arrived at `at`: a router dropped a datagram.
    pub fn dropped_by_router(&mut self, id: (u8, u64), at: Timestamp) {
        self.datagrams.entry(id).or_default().dropped_by_router.get_or_insert(at);
    }

    /// Records that the responder answered a copy of a request, at `truly` in true nanoseconds.
    pub fn reached_responder(&mut self, id: (u8, u64), truly: u64) {
        self.answered += 1;
        self.datagrams.entry(id).or_default().reached_responder.get_or_insert(truly);
    }

    /// Records that an undamaged copy of a reply reached the prober's socket. Times are given by the hosts'
    /// clocks and in true nanoseconds; `left_truly` is the true time at which it left the responder.
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

    /// Compares a prober's reports with the true events.
    ///
    /// `tolerance` returns the allowed error of a round trip in nanoseconds, given its elapsed time and
    /// turnaround. Verdicts within the tolerance of a limit may be on either side.
    ///
    /// # Errors
    /// A description of the first difference.
    pub fn compare(
        &self,
        counts: &Counts,
        late_after: Duration,
        lost_after: Duration,
        tolerance: impl Fn(Duration, Duration) -> u64,
    ) -> Result<(), String> {
        let left = self.datagrams.values().filter(|truth| truth.left.is_some()).count() as u64;
        same("datagrams that left", counts.sent, left)?;
        same("datagrams with a verdict", counts.verdicts.len() as u64, left)?;
        same("datagrams decided twice", counts.decided_twice, 0)?;
        let (mut duplicates, mut very_late) = (0, 0);
        for (id, truth) in &self.datagrams {
            let Some(t1) = truth.left else { return Err(format!("{id:?} was answered and never left")) };
            let (verdict, sample) =
                counts.verdicts.get(id).ok_or_else(|| format!("{id:?} has no verdict"))?;
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
                (Verdict::Lost(Direction::Forward), None) if self.arrived_before_all_reports(*id, truth) => {
                    return Err(format!("{id:?} is lost forward and had reached the responder"));
                }
                (Verdict::Lost(Direction::Reverse), None) if truth.reached_responder.is_none() => {
                    return Err(format!("{id:?} is lost in reverse and never reached the responder"));
                }
                (Verdict::Lost(direction @ (Direction::Reverse | Direction::Unknown)), None)
                    if truth.dropped_by_router.is_some_and(|at| at + MARGIN < t1 + lost_after) =>
                {
                    return Err(format!("{id:?} is lost, {direction:?}, and a router dropped it"));
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
        let blamed = counts.count(|verdict| verdict == Verdict::HostDropped);
        let dropped = self.dropped_at_prober + self.dropped_at_responder;
        if blamed > dropped {
            return Err(format!("{blamed} datagrams were reported as dropped by a host, truly {dropped}"));
        }
        if !self.may_withdraw {
            // A responder that first answered a datagram without the session record is tested for support
            // of it, and such datagrams may be withdrawn.
            let is_plain = |truth: &Truth| !truth.requests_report && !truth.replies.is_empty();
            let is_tested = self.datagrams.values().any(is_plain);
            let is_wrong = |id: &(u8, u64)| !is_tested || !self.datagrams[id].requests_report;
            let mut withdrawn = counts.verdicts.iter().filter(|(_, found)| found.0 == Verdict::Withdrawn);
            if let Some((id, _)) = withdrawn.find(|(id, _)| is_wrong(id)) {
                return Err(format!("{id:?} is withdrawn without a reason"));
            }
        }
        same("duplicates", counts.duplicates, duplicates)?;
        same("very late replies", counts.very_late, very_late)?;
        same("reordered replies", counts.reordered, self.reordered(lost_after))?;
        let (found, differences) = (&counts.ipdv, neighbours(counts));
        same("differences between neighbours", found.len() as u64, differences.len() as u64)?;
        if *found != differences {
            return Err(format!("differences between neighbours: {found:?}, truly {differences:?}"));
        }
        let (bursts, ended) = bursts(counts);
        same("bursts that began", counts.bursts, bursts)?;
        let mut found = counts.burst_lengths.clone();
        found.sort_unstable();
        if found != ended {
            return Err(format!("lengths of bursts: found {found:?}, truly {ended:?}"));
        }
        Ok(())
    }

    /// Compares round trips with true time, which no clock of the simulation shows. `bound` returns the
    /// allowed error in nanoseconds, given elapsed time and turnaround. Returns the number of compared round
    /// trips.
    ///
    /// # Errors
    /// A description of the first larger error.
    pub fn compare_with_true_time(
        &self,
        counts: &Counts,
        bound: impl Fn(Duration, Duration) -> u64,
    ) -> Result<u64, String> {
        let mut compared = 0;
        for (id, (_, sample)) in &counts.verdicts {
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

    /// Whether the datagram had reached the responder before every reply to a datagram that was sent later by
    /// [`Ledger::horizon`] and that reached the prober. If so, no report can have shown it as missing.
    fn arrived_before_all_reports(&self, (flow, sequence): (u8, u64), truth: &Truth) -> bool {
        let Some(reached) = truth.reached_responder else { return false };
        let later = self.datagrams.range((flow, sequence + 1)..=(flow, u64::MAX)).map(|(_, truth)| truth);
        let earliest = truth.left.map(|left| left + self.horizon - MARGIN);
        let later = later.filter(|later| later.left >= earliest);
        let mut reports = later.flat_map(|truth| &truth.replies).map(|reply| reply.left_truly);
        reports.all(|left| reached < left)
    }

    /// Compares the times of the verdicts with the times at which they were possible, for a prober that is
    /// woken at most `latency` late and never stalled.
    ///
    /// # Errors
    /// A description of the first verdict that was too early or too late.
    pub fn compare_times(
        &self,
        counts: &Counts,
        lost_after: Duration,
        latency: Duration,
    ) -> Result<(), String> {
        // Datagrams of a flow are given up in order.
        let mut given_up: BTreeMap<u8, Timestamp> = BTreeMap::new();
        for ((flow, sequence), truth) in &self.datagrams {
            let id = (*flow, *sequence);
            let (Some(left), Some(decided)) = (truth.left, counts.decided_at.get(&id)) else { continue };
            let (verdict, _) = counts.verdicts[&id];
            let deadline = given_up.entry(*flow).or_default();
            *deadline = (*deadline).max(left + lost_after);
            let (least, most) = match (verdict, truth.replies.first(), truth.delivered) {
                (Verdict::Withdrawn, ..) => continue,
                (Verdict::Ok | Verdict::Late, Some(reply), Some(delivered)) => {
                    (delivered, delivered.max((reply.at + TX_TIMESTAMP_WAIT).min(*deadline)))
                }
                _ => (left + lost_after, *deadline),
            };
            if *decided + MARGIN < least || *decided > most + latency + MARGIN {
                return Err(format!("{id:?} was {verdict:?} at {decided:?}, not from {least:?} to {most:?}"));
            }
        }
        Ok(())
    }

    /// The direction of a loss as the prober could know it in time: from a reply to another datagram of the
    /// flow whose report covers it. `None` if there was no such reply.
    fn reported_direction(
        &self,
        (flow, sequence): (u8, u64),
        truth: &Truth,
        left: Timestamp,
        lost_after: Duration,
    ) -> Option<Direction> {
        if !self.is_reported || !truth.requests_report {
            return None;
        }
        let requesting = || {
            let flow = self.datagrams.range((flow, 0)..=(flow, u64::MAX));
            flow.filter(|(_, other)| other.requests_report).map(|((_, sequence), other)| (*sequence, other))
        };
        // The first datagram that the responder received begins its record; the prober must have learned of
        // it early enough.
        let arrived =
            requesting().filter_map(|(number, other)| Some((other.reached_responder?, number, other.left?)));
        let (_, first, began) = arrived.min()?;
        let replies = requesting().filter_map(|(_, other)| Some((other.left?, other.replies.first()?)));
        let in_time =
            |(requested, reply): &(Timestamp, &TrueReply)| reply.at + MARGIN < *requested + lost_after;
        let first_reply = replies.clone().map(|(_, reply)| reply.at).min()?;
        let is_established =
            first_reply + MARGIN < began + lost_after && began + self.horizon + MARGIN <= left;
        replies.filter(in_time).filter(|(_, reply)| reply.at + MARGIN < left + lost_after).find_map(
            |(requested, reply)| {
                let had = |other: &Truth| other.reached_responder.is_some_and(|at| at <= reply.left_truly);
                let highest = requesting().filter(|(_, other)| had(other)).map(|(number, _)| number).max()?;
                let is_covered = (highest.saturating_sub(127)..=highest).contains(&sequence);
                let is_old = left + self.horizon + MARGIN <= requested && sequence > first && is_established;
                match (is_covered, had(truth)) {
                    (true, true) => Some(Direction::Reverse),
                    (true, false) if is_old => Some(Direction::Forward),
                    (true, false) | (false, _) => None,
                }
            },
        )
    }

    /// Reordered replies as RFC 4737 counts them, from the order of the first copies that arrived in time.
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

/// Events closer to a limit than this are not checked. Chosen: 1 ms, longer than the transmission of a
/// datagram takes.
const MARGIN: Duration = Duration::from_millis(1);

/// The kernel's transmit timestamp must be used if it arrived while the prober may wait for it.
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
    // A datagram without a kernel timestamp is measured from its send call, which is at most this much
    // earlier, by a clock that may be 0.1 % wrong.
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

/// The differences between the round trips of consecutive datagrams that are both ok, sorted.
fn neighbours(counts: &Counts) -> Vec<Duration> {
    let rtt = |id: &(u8, u64)| match counts.verdicts.get(id) {
        Some((Verdict::Ok, Some(sample))) => Some(sample.rtt),
        _ => None,
    };
    let pairs = counts.verdicts.keys().map(|id| (rtt(id), rtt(&(id.0, id.1 + 1))));
    let mut differences: Vec<Duration> = pairs.filter_map(|(one, next)| Some(one?.abs_diff(next?))).collect();
    differences.sort_unstable();
    differences
}

/// Bursts in the order of sequence numbers: how many began, and the sorted lengths of those that ended.
fn bursts(counts: &Counts) -> (u64, Vec<u32>) {
    let (mut began, mut ended) = (0, Vec::new());
    let mut run: BTreeMap<u8, u32> = BTreeMap::new();
    for ((flow, _), (verdict, _)) in &counts.verdicts {
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
