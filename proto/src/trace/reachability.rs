//! Whether the destination of a flow answers, and when that has changed.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use super::rejection::Rejection;
use super::route::Route;
use super::{TRACE_GAP_MIN, Trace, Trigger};
use crate::time::Timestamp;

/// The destination of a flow no longer answers, or answers again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReachabilityChange {
    /// The flow.
    pub flow: u8,
    /// The current route of the flow; `None` if it is not known.
    pub route: Option<Route>,
    /// TTL and address of the last hop that answered in the latest trace; `None` if none did.
    pub last_hop: Option<(u8, IpAddr)>,
    /// The rejection of the latest trace, also if the destination answers again; `None` if no probe was
    /// rejected.
    pub rejection: Option<Rejection>,
    /// What led to the latest trace.
    pub trigger: Trigger,
    /// When the first probe was sent that was not answered.
    pub since: Timestamp,
    /// Time from then until it answered again; `None`: it does not answer.
    pub lasted: Option<Duration>,
}

/// Decides from the probes of one flow that are not limited in TTL whether the destination answers.
///
/// It does not answer if it has answered before and [`TRACES`] traces in a row did not reach it, if
/// [`MISSES`] probes in a row were not answered, and if no echo of the same flow was answered meanwhile:
/// hosts that limit their answers leave many probes unanswered. After the first of these traces it is asked
/// each [`CHECK_SPACING`], and traced again after [`TRACE_GAP_MIN`]. A single answer is enough to end that,
/// and to show that it answers again.
#[derive(Debug)]
pub(super) struct Reachability {
    state: State,
    /// When the peer announced its leave; `None` if it has answered since.
    left_at: Option<Timestamp>,
    /// Sequence number of the latest probe that was answered. Earlier ones say nothing about the time since.
    answered: Option<u64>,
    last_hop: Option<(u8, IpAddr)>,
    /// Of the latest trace.
    rejection: Option<Rejection>,
    /// Sequence numbers of the latest checks, oldest first.
    checks: VecDeque<u64>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// It has not answered yet, or not since it announced its leave.
    Unknown,
    Answers,
    Missed(Missed),
}

/// The latest trace did not reach the destination.
#[derive(Debug, Clone, Copy)]
struct Missed {
    since: Timestamp,
    traces: u8,
    /// Probes in a row that were not answered.
    probes: u32,
    /// Checks that were sent.
    checks: u32,
    check_at: Timestamp,
    trace_at: Timestamp,
    is_reported: bool,
}

/// Traces in a row that do not reach the destination.
const TRACES: u8 = 2;

/// Probes in a row, all later than the last answer, that the destination does not answer, of traces and
/// checks. Chosen: 21. If 30 % of the packets are lost at random in each direction, a probe is not answered
/// with probability 1 − 0.7² = 0.51, and 21 in a row are not with 0.51²¹ ≈ 7·10⁻⁷. Because a trace must miss
/// the destination for the first of them, this is also the bound for each trace.
const MISSES: u32 = 21;

/// Time between two checks. Chosen: 0.5 s, so that the checks between two traces are [`MISSES`] − 1, and a
/// gap of less than [`TRACE_GAP_MIN`] is not reported.
const CHECK_SPACING: Duration = Duration::from_millis(500);

/// Checks after which further ones are as far apart as traces. Some more than [`MISSES`], because the last
/// ones are decided when others were sent.
const CHECKS_FAST: u32 = 32;

/// Number of checks that are recognized. More are not in flight: each is decided after
/// [`ANSWER_AGE_MAX`](super::ANSWER_AGE_MAX).
const CHECKS_IN_FLIGHT: usize = 16;

impl Reachability {
    pub(super) fn new() -> Self {
        Self {
            state: State::Unknown,
            left_at: None,
            answered: None,
            last_hop: None,
            rejection: None,
            checks: VecDeque::new(),
        }
    }

    /// The destination has not answered since `since`, which was reported already.
    pub(super) fn missed(since: Timestamp, now: Timestamp) -> Self {
        let missed = Missed {
            since,
            traces: TRACES,
            probes: MISSES,
            checks: CHECKS_FAST,
            check_at: now + CHECK_SPACING,
            trace_at: Timestamp::NEVER,
            is_reported: true,
        };
        Self { state: State::Missed(missed), ..Self::new() }
    }

    /// The last hop that answered in the latest trace.
    pub(super) fn last_hop(&self) -> Option<(u8, IpAddr)> {
        self.last_hop
    }

    /// The rejection of the latest trace.
    pub(super) fn rejection(&self) -> Option<Rejection> {
        self.rejection
    }

    /// The peer announced at `at` that it leaves: that it does not answer is not reported until it has
    /// answered a later probe.
    pub(super) fn peer_leaving(&mut self, at: Timestamp) {
        self.left_at = Some(at);
        if !matches!(self.state, State::Missed(Missed { is_reported: true, .. })) {
            self.state = State::Unknown;
        }
    }

    /// The destination answered a probe that was sent at `sent`. Returns since when it had not answered, if
    /// that was reported.
    pub(super) fn answered(&mut self, sequence: u64, sent: Timestamp) -> Option<Timestamp> {
        if self.left_at.is_some_and(|left| sent <= left) {
            return None;
        }
        self.left_at = None;
        self.answered = self.answered.max(Some(sequence));
        match std::mem::replace(&mut self.state, State::Answers) {
            State::Missed(missed) => missed.is_reported.then_some(missed.since),
            State::Unknown | State::Answers => None,
        }
    }

    /// When the first probe was sent that was not answered; `None` if the latest trace reached the
    /// destination, or it has not answered yet.
    pub(super) fn missed_since(&self) -> Option<Timestamp> {
        match self.state {
            State::Missed(missed) => Some(missed.since),
            State::Unknown | State::Answers => None,
        }
    }

    /// The destination has answered an echo since [`missed_since`](Self::missed_since). Returns as
    /// [`answered`](Self::answered).
    pub(super) fn echo_answered(&mut self) -> Option<Timestamp> {
        let State::Missed(missed) = self.state else { return None };
        self.state = State::Answers;
        missed.is_reported.then_some(missed.since)
    }

    /// The destination did not answer a probe in time. Returns since when it has not, if that is to be
    /// reported.
    pub(super) fn unanswered(&mut self, sequence: u64) -> Option<Timestamp> {
        if self.answered.is_some_and(|answered| sequence <= answered) {
            return None;
        }
        if let State::Missed(missed) = &mut self.state {
            missed.probes = missed.probes.saturating_add(1);
        }
        self.conclude()
    }

    /// A trace is complete; `sent` is when its first probe to the destination left the host, `None` if none
    /// did. Returns as [`unanswered`](Self::unanswered).
    pub(super) fn traced(
        &mut self,
        trace: &Trace,
        sent: Option<Timestamp>,
        now: Timestamp,
    ) -> Option<Timestamp> {
        let answered = trace.hops.iter().rev().filter_map(|hop| Some((hop.ttl, hop.answers.first()?.router)));
        // A router that could not be asked is not known to be silent.
        if trace.hops.iter().all(|hop| hop.sent > 0) || answered.clone().next().is_some() {
            self.last_hop = answered.clone().next();
        }
        self.rejection = trace.rejection;
        let is_missed = trace.rtt.is_none();
        match (&mut self.state, sent.filter(|_| is_missed)) {
            (State::Missed(missed), Some(_)) => missed.traces = missed.traces.saturating_add(1),
            (State::Missed(missed), None) => missed.trace_at = now + TRACE_GAP_MIN,
            (state @ State::Answers, Some(since)) => {
                *state = State::Missed(Missed {
                    since,
                    traces: 1,
                    probes: 0,
                    checks: 0,
                    check_at: now + CHECK_SPACING,
                    trace_at: now + TRACE_GAP_MIN,
                    is_reported: false,
                });
            }
            (State::Unknown, _) | (State::Answers, None) => {}
        }
        self.conclude()
    }

    fn conclude(&mut self) -> Option<Timestamp> {
        let State::Missed(missed) = &mut self.state else { return None };
        if missed.is_reported || missed.traces < TRACES || missed.probes < MISSES {
            return None;
        }
        missed.is_reported = true;
        Some(missed.since)
    }

    /// Whether to trace again because the destination was missed. Returns `true` once.
    pub(super) fn take_trace(&mut self, now: Timestamp) -> bool {
        let State::Missed(missed) = &mut self.state else { return false };
        let is_due = missed.traces < TRACES && missed.trace_at <= now;
        if is_due {
            missed.trace_at = Timestamp::NEVER;
        }
        is_due
    }

    /// Whether to ask the destination now; if not, when it or a trace is due next.
    pub(super) fn next_check(&mut self, now: Timestamp) -> Result<(), Timestamp> {
        let State::Missed(missed) = &mut self.state else { return Err(Timestamp::NEVER) };
        if missed.check_at > now {
            let trace_at = if missed.traces < TRACES { missed.trace_at } else { Timestamp::NEVER };
            return Err(missed.check_at.min(trace_at));
        }
        missed.checks = missed.checks.saturating_add(1);
        missed.check_at = now + if missed.checks < CHECKS_FAST { CHECK_SPACING } else { TRACE_GAP_MIN };
        Ok(())
    }

    /// A check is on its way to the kernel.
    pub(super) fn check_queued(&mut self, sequence: u64) {
        if self.checks.len() == CHECKS_IN_FLIGHT {
            self.checks.pop_front();
        }
        self.checks.push_back(sequence);
    }

    /// Whether this probe was a check, and not of a trace.
    pub(super) fn is_check(&self, sequence: u64) -> bool {
        self.checks.contains(&sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{Answer, Hop, HopState, RejectionReason};

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
    }

    impl Reachability {
        fn is_missed(&self) -> bool {
            matches!(self.state, State::Missed(_))
        }
    }

    fn trace(is_reached: bool) -> Trace {
        Trace {
            flow: 0,
            trigger: Trigger::Interval,
            began: at(0),
            duration: Duration::ZERO,
            is_burst: false,
            rtt: is_reached.then_some(Duration::from_millis(1)),
            routers: None,
            hops: Vec::new(),
            route: None,
            first_lossy_hop: None,
            is_ttl_clamped: false,
            rejection: None,
        }
    }

    /// A destination that answered probe 0 at 0, and was then missed by one trace at 1 s.
    fn missed() -> Reachability {
        let mut reachability = Reachability::new();
        assert_eq!(reachability.answered(0, at(0)), None);
        assert_eq!(reachability.traced(&trace(false), Some(at(900)), at(1_000)), None);
        assert!(reachability.is_missed());
        reachability
    }

    /// The sequence numbers of misses that follow until one is reported.
    fn misses_until_report(reachability: &mut Reachability, from: u64) -> Option<u64> {
        (from..from + 100).find(|sequence| reachability.unanswered(*sequence) == Some(at(900)))
    }

    #[test]
    fn absence_that_was_reported_before_ends_with_the_first_answer_and_is_not_reported_again() {
        let mut reachability = Reachability::missed(at(900), at(5_000));
        assert_eq!(reachability.missed_since(), Some(at(900)));
        assert_eq!(reachability.traced(&trace(false), Some(at(5_000)), at(6_000)), None);
        assert_eq!(misses_until_report(&mut reachability, 1), None);
        assert!(!reachability.take_trace(at(100_000)));
        assert_eq!(reachability.next_check(at(5_500)), Ok(()));
        assert_eq!(reachability.answered(200, at(7_000)), Some(at(900)));
        assert_eq!(reachability.missed_since(), None);
    }

    #[test]
    fn random_loss_of_30_percent_in_each_direction_is_reported_less_than_once_in_a_million_traces() {
        let unanswered = 1.0 - 0.7_f64 * 0.7;
        assert!(unanswered.powi(i32::try_from(MISSES).unwrap()) < 1e-6);
    }

    #[test]
    fn two_traces_and_21_probes_in_a_row_are_reported_once_with_the_first_miss() {
        let mut test = missed();
        assert_eq!(test.traced(&trace(false), Some(at(11_000)), at(12_000)), None);
        assert_eq!(misses_until_report(&mut test, 1), Some(21));
        assert_eq!(misses_until_report(&mut test, 22), None, "once");
        assert_eq!(test.traced(&trace(false), Some(at(40_000)), at(41_000)), None);
        assert_eq!(test.answered(200, at(50_000)), Some(at(900)));
        assert_eq!(test.answered(201, at(51_000)), None, "once");
    }

    #[test]
    fn one_trace_is_not_enough_and_the_second_may_end_last() {
        let mut test = missed();
        assert_eq!(misses_until_report(&mut test, 1), None);
        assert_eq!(test.traced(&trace(false), Some(at(11_000)), at(12_000)), Some(at(900)));
    }

    #[test]
    fn any_answer_begins_anew_and_earlier_misses_do_not_count() {
        let mut test = missed();
        (1..=20).for_each(|sequence| assert_eq!(test.unanswered(sequence), None));
        assert_eq!(test.answered(30, at(5_000)), None);
        assert!(!test.is_missed());
        test.traced(&trace(false), Some(at(900)), at(6_000));
        test.traced(&trace(false), Some(at(17_000)), at(18_000));
        (21..30).for_each(|sequence| assert_eq!(test.unanswered(sequence), None));
        assert_eq!(misses_until_report(&mut test, 31), Some(51));
    }

    #[test]
    fn destination_that_never_answered_is_not_reported() {
        let mut test = Reachability::new();
        test.traced(&trace(false), Some(at(900)), at(1_000));
        test.traced(&trace(false), Some(at(900)), at(1_000));
        assert_eq!(misses_until_report(&mut test, 0), None);
        assert_eq!(test.next_check(at(100_000)), Err(Timestamp::NEVER));
    }

    #[test]
    fn trace_whose_probes_did_not_leave_the_host_is_no_miss() {
        let mut test = missed();
        assert!(test.take_trace(at(11_000)));
        assert_eq!(test.traced(&trace(false), None, at(12_000)), None);
        assert_eq!(misses_until_report(&mut test, 1), None);
        assert!(!test.take_trace(at(21_999)) && test.take_trace(at(22_000)), "it is repeated");
    }

    #[test]
    fn destination_is_asked_each_half_second_and_traced_again_after_ten() {
        let mut test = missed();
        let (mut time, mut checks, mut traces) = (at(1_000), Vec::new(), Vec::new());
        while time < at(60_000) {
            if test.take_trace(time) {
                traces.push(time);
                test.traced(&trace(false), Some(time), time);
            }
            match test.next_check(time) {
                Ok(()) => checks.push(time),
                Err(next) => time = next,
            }
        }
        assert_eq!(traces, [at(11_000)]);
        let (fast, slow) = checks.split_at(usize::try_from(CHECKS_FAST).unwrap());
        assert!(fast.iter().copied().eq((1_500..).step_by(500).map(at).take(fast.len())));
        assert!(
            slow.iter()
                .zip(&checks[fast.len() - 1..])
                .all(|(next, check)| { next.since(*check) == TRACE_GAP_MIN })
        );
    }

    #[test]
    fn trace_that_is_due_is_waited_for_until_two_have_missed_the_destination() {
        let mut test = missed();
        let checks = (1_500..).step_by(500).take(usize::try_from(CHECKS_FAST).unwrap());
        assert_eq!(checks.clone().map(|time| test.next_check(at(time))).find(Result::is_err), None);
        let next_check = at(checks.last().unwrap()) + TRACE_GAP_MIN;
        assert_eq!(test.traced(&trace(false), None, at(16_800)), None);
        let next_trace = at(16_800) + TRACE_GAP_MIN;
        assert!(next_trace < next_check);
        assert_eq!(test.next_check(at(17_100)), Err(next_trace));
        assert_eq!(test.traced(&trace(false), Some(at(17_200)), at(17_200)), None, "for another reason");
        assert_eq!(test.next_check(at(17_300)), Err(next_check));
        assert!(!test.take_trace(next_trace), "the second has been made");
    }

    #[test]
    fn last_hop_and_rejection_are_those_of_the_latest_trace_unless_routers_were_not_asked() {
        let router = |last: u8| IpAddr::from([10, 0, 0, last]);
        let with = |hops: &[(u16, Option<u8>)], rejection| {
            let hops = (1..).zip(hops).map(|(ttl, (sent, answer))| Hop {
                ttl,
                state: HopState::Unanswered,
                sent: *sent,
                answers: answer.map(|last| Answer::new(router(last), Duration::ZERO)).into_iter().collect(),
                responder: None,
            });
            Trace { hops: hops.collect(), rejection, ..trace(false) }
        };
        let mut test = missed();
        let (reason, rtt) = (RejectionReason::Prohibited, Duration::ZERO);
        let rejection = Some(Rejection { ttl: Some(2), address: router(2), reason, rtt });
        for (hops, rejection, last_hop) in [
            (&[(1, Some(1)), (1, Some(2)), (1, None)][..], rejection, Some((2, router(2)))),
            (&[(0, None), (1, None)], None, Some((2, router(2)))),
            (&[(0, None), (1, Some(5)), (0, None)], rejection, Some((2, router(5)))),
            (&[(1, None), (1, None)], None, None),
        ] {
            test.traced(&with(hops, rejection), Some(at(1_000)), at(1_000));
            assert_eq!((test.last_hop(), test.rejection()), (last_hop, rejection), "{hops:?}");
        }
    }

    #[test]
    fn latest_sixteen_checks_are_recognised() {
        let mut test = missed();
        (1..=20).for_each(|sequence| test.check_queued(sequence));
        let is_check = |sequence: &u64| test.is_check(*sequence);
        assert_eq!((0..30).filter(is_check).collect::<Vec<u64>>(), (5..=20).collect::<Vec<u64>>());
    }

    #[test]
    fn checks_before_the_second_trace_are_enough() {
        let checks = TRACE_GAP_MIN.as_nanos() / CHECK_SPACING.as_nanos();
        assert_eq!(u32::try_from(checks).unwrap() + 1, MISSES, "with the probe of the first trace");
    }

    #[test]
    fn peer_that_leaves_is_reported_only_after_it_has_answered_a_later_probe() {
        let mut test = missed();
        (1..=20).for_each(|sequence| assert_eq!(test.unanswered(sequence), None));
        test.peer_leaving(at(2_000));
        for (sequence, time) in [(100, 20_000), (200, 40_000)] {
            assert_eq!(test.traced(&trace(false), Some(at(900)), at(time)), None);
            assert_eq!(misses_until_report(&mut test, sequence), None);
            assert_eq!(test.next_check(at(time)), Err(Timestamp::NEVER));
            assert_eq!(test.answered(sequence, at(2_000)), None, "it was sent before");
        }
        assert_eq!(test.answered(300, at(50_000)), None);
        test.traced(&trace(false), Some(at(900)), at(60_000));
        test.traced(&trace(false), Some(at(71_000)), at(71_000));
        assert_eq!(misses_until_report(&mut test, 301), Some(321));
    }

    #[test]
    fn end_is_reported_although_the_peer_has_left_in_between() {
        let mut test = missed();
        test.traced(&trace(false), Some(at(11_000)), at(12_000));
        misses_until_report(&mut test, 1);
        test.peer_leaving(at(20_000));
        assert_eq!(test.answered(100, at(30_000)), Some(at(900)));
    }
}
