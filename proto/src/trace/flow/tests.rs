//! Tests of one flow: when its probes are due, and what its traces show.

use std::collections::HashSet;
use std::net::IpAddr;

use super::*;
use crate::trace::{Answer, CLAMPED_FOR, HopRouter, HopState, Rejection, RejectionReason};

fn at(milliseconds: u64) -> Timestamp {
    Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
}

fn milliseconds(at_time: Timestamp) -> u64 {
    u64::try_from(at_time.since(at(0)).as_millis()).unwrap()
}

/// A flow over three routers, of which some do not answer, with an RTT of 10 ms.
struct TestFlow {
    flow: TracedFlow,
    silent: Vec<u8>,
    /// The number of routers that replies of the destination show.
    routers: u8,
    /// The hop at which 10.0.0.77 answers.
    other_at: Option<u8>,
    /// The hop at which probes end that are not limited, because their TTL was lowered or they loop.
    ended_at: Option<u8>,
    next_sequence: u64,
    /// Probes that will be answered.
    answers: VecDeque<(Timestamp, u64, u8)>,
    traces: Vec<Trace>,
    updates: Vec<RouteUpdate>,
}

const RTT: Duration = Duration::from_millis(10);

impl TestFlow {
    fn new(silent: &[u8]) -> Self {
        let flow =
            TracedFlow::new(0, Direction::Forward, ProbeProtocol::Udp, 30, Duration::from_secs(30), 1, at(0));
        Self {
            flow,
            silent: silent.to_vec(),
            routers: 3,
            other_at: None,
            ended_at: None,
            next_sequence: 0,
            answers: VecDeque::new(),
            traces: Vec::new(),
            updates: Vec::new(),
        }
    }

    fn router(&self, ttl: u8) -> IpAddr {
        [10, 0, 0, if self.other_at == Some(ttl) { 77 } else { ttl }].into()
    }

    /// Lets the time pass and answers probes. Returns their TTLs and times.
    fn run(&mut self, from: u64, until: u64) -> Vec<(u8, u64)> {
        let (mut time, mut sent) = (at(from), Vec::new());
        loop {
            while let Some((due, sequence, ttl)) =
                self.answers.front().copied().filter(|(due, ..)| *due <= time)
            {
                self.answers.pop_front();
                let update = match (ttl, self.ended_at) {
                    (DESTINATION, Some(hop)) => {
                        self.flow.unlimited_ended(self.router(hop));
                        None
                    }
                    (DESTINATION, None) => {
                        let routers = Some(self.routers);
                        self.flow.reached(sequence, ttl, [10, 0, 0, 9].into(), RTT, routers, due)
                    }
                    _ => self.flow.answered(sequence, ttl, Answer::new(self.router(ttl), RTT), due),
                };
                self.updates.extend(update);
            }
            match self.flow.step(time, time) {
                FlowStep::Send { ttl, .. } => {
                    sent.push((ttl, milliseconds(time)));
                    self.flow.queued(self.next_sequence, ttl, time);
                    if !self.silent.contains(&ttl) {
                        self.answers.push_back((time + RTT, self.next_sequence, ttl));
                    }
                    self.next_sequence += 1;
                }
                FlowStep::Check => {
                    self.flow.queued(self.next_sequence, DESTINATION, time);
                    self.flow.check_queued(self.next_sequence);
                    self.next_sequence += 1;
                }
                FlowStep::Traced(trace) => self.traces.push(*trace),
                FlowStep::Report(report) => panic!("{report:?}"),
                FlowStep::Wait(next) => {
                    let next = self.answers.front().map_or(next, |(due, ..)| next.min(*due));
                    if next > at(until) {
                        return sent;
                    }
                    assert!(next > time, "it waits for a later time");
                    time = next;
                }
            }
        }
    }
}

fn times_of(sent: &[(u8, u64)], ttl: u8) -> Vec<u64> {
    sent.iter().filter(|(found, _)| *found == ttl).map(|(_, time)| *time).collect()
}

#[test]
fn hop_without_an_answer_is_probed_twice_more_and_not_if_it_is_known_to_be_silent() {
    let mut test = TestFlow::new(&[2]);
    let sent = test.run(0, 3_000);
    let complete = milliseconds(test.traces[0].began + test.traces[0].duration);
    assert_eq!(times_of(&sent, 2), [10, complete + 1_100, complete + 2_200]);
    (0..5).for_each(|_| test.flow.unanswered(2));
    test.flow.trigger(Trigger::Request);
    let sent = test.run(3_000, 5_999);
    assert_eq!(times_of(&sent, 2).len(), 1, "{sent:?}");
}

#[test]
fn every_hop_and_the_destination_are_probed_once_in_an_interval() {
    let mut test = TestFlow::new(&[]);
    test.run(0, 100);
    let sent = test.run(100, 30_000);
    for ttl in [1, 2, 3, DESTINATION] {
        assert_eq!(times_of(&sent, ttl).len(), 1, "{sent:?}");
    }
    assert_eq!(sent[3].0, DESTINATION);
    let later = test.run(30_000, 60_000);
    assert!(later.iter().map(|(ttl, _)| ttl).eq(sent.iter().map(|(ttl, _)| ttl)), "{later:?}");
    let [burst, first, second] = &test.traces[..] else { panic!("{:?}", test.traces) };
    assert_eq!([burst, first, second].map(|trace| trace.is_burst), [true, false, false]);
    assert_eq!([burst, first, second].map(|trace| trace.trigger), {
        [Trigger::Start, Trigger::Interval, Trigger::Interval]
    });
    assert_eq!(second.began.since(first.began), Duration::from_secs(30));
    for trace in [burst, first, second] {
        assert!(trace.hops.iter().all(|hop| hop.answers.len() == 1 && hop.state == HopState::Answered));
        assert_eq!((trace.hops.len(), trace.routers, trace.rtt), (3, Some(3), Some(RTT)));
        assert!(trace.route.is_some());
    }
}

#[test]
fn traces_are_ten_seconds_apart_except_on_request() {
    let mut test = TestFlow::new(&[]);
    test.run(0, 100);
    test.flow.trigger(Trigger::Loss);
    test.flow.trigger(Trigger::Rtt);
    test.run(100, 10_100);
    test.flow.trigger(Trigger::Request);
    test.run(10_200, 10_300);
    let bursts = test.traces.iter().filter(|trace| trace.is_burst);
    let found: Vec<_> = bursts.map(|trace| (trace.trigger, milliseconds(trace.began))).collect();
    let expected = [(Trigger::Start, 0), (Trigger::Loss, 10_000), (Trigger::Request, 10_200)];
    assert_eq!(found, expected, "of two triggers the first is kept");
    assert_eq!(test.flow.last_trigger(), Trigger::Request);
}

#[test]
fn trace_without_a_destination_ends_at_the_last_hop_that_answers_and_is_repeated() {
    let mut test = TestFlow::new(&[DESTINATION, 1]);
    (4..=30).for_each(|ttl| test.silent.push(ttl));
    test.run(0, 29_999);
    test.run(30_000, 32_000);
    for trace in &test.traces {
        assert_eq!((trace.hops.len(), trace.routers, trace.rtt), (3, None, None));
        let states = trace.hops.iter().map(|hop| hop.state);
        assert!(states.eq([HopState::Unanswered, HopState::Answered, HopState::Answered]));
        assert!(trace.is_burst);
    }
    let began = |test: &TestFlow| {
        test.traces.iter().map(|trace| (trace.trigger, milliseconds(trace.began))).collect::<Vec<_>>()
    };
    let unanswered = [(Trigger::Start, 0), (Trigger::Interval, 10_000), (Trigger::Interval, 30_000)];
    assert_eq!(began(&test), unanswered, "earlier than the interval of 30 s, until it has answered");
    test.run(32_000, 99_999);
    assert_eq!(began(&test)[3..], [(Trigger::Interval, 60_000), (Trigger::Interval, 90_000)]);
}

#[test]
fn hop_whose_probe_was_deferred_shows_its_last_answer() {
    let mut test = TestFlow::new(&[]);
    test.run(0, 100);
    assert!(!test.flow.retries().is_reserved(2));
    test.flow.retries_mut().reserve(2, at(20_000));
    assert!(test.flow.retries().is_reserved(2) && !test.flow.retries().is_reserved(1));
    test.flow.trigger(Trigger::Request);
    let mut sequence = 100;
    let trace = loop {
        match test.flow.step(at(100 + sequence), at(100 + sequence)) {
            // The tracer leaves out hops that wait for their turn.
            FlowStep::Send { ttl: 2, .. } => {}
            FlowStep::Send { ttl, .. } => {
                test.flow.queued(sequence, ttl, at(100 + sequence));
                match ttl {
                    DESTINATION => {
                        test.flow.reached(sequence, ttl, [10, 0, 0, 9].into(), RTT, Some(3), at(200))
                    }
                    _ => test.flow.answered(sequence, ttl, Answer::new([10, 0, 0, ttl].into(), RTT), at(200)),
                };
            }
            FlowStep::Traced(trace) => break trace,
            FlowStep::Wait(_) => {}
            step @ (FlowStep::Check | FlowStep::Report(_)) => panic!("{step:?}"),
        }
        sequence += 1;
    };
    let states: Vec<HopState> = trace.hops.iter().map(|hop| hop.state).collect();
    assert_eq!(states, [HopState::Answered, HopState::Inherited, HopState::Answered]);
}

#[test]
fn other_router_at_a_known_hop_is_confirmed_and_leads_to_a_trace() {
    let mut test = TestFlow::new(&[]);
    test.run(0, 12_000);
    let other = [10, 0, 0, 77].into();
    assert_eq!(test.flow.answered(1_000, 2, Answer::new(other, RTT), at(12_000)), None);
    test.silent.push(2);
    let sent = test.run(12_000, 12_200);
    assert!(test.traces.iter().any(|trace| trace.trigger == Trigger::Router && trace.is_burst));
    assert!(times_of(&sent, 2).len() > 3, "every answer timeout: {sent:?}");
    let updates = (0..15).filter_map(|_| test.flow.answered(1_001, 2, Answer::new(other, RTT), at(12_300)));
    assert!(matches!(updates.collect::<Vec<_>>()[..], [RouteUpdate::Changed { .. }]));
    assert!(times_of(&test.run(12_300, 13_000), 2).is_empty());
}

/// The triggers of the traces that were made at once.
fn triggers(test: &TestFlow) -> Vec<Trigger> {
    test.traces.iter().filter(|trace| trace.is_burst).map(|trace| trace.trigger).collect()
}

#[test]
fn changed_route_is_traced_at_once_and_only_once() {
    let mut test = TestFlow::new(&[]);
    test.run(0, 12_000);
    test.other_at = Some(2);
    test.run(12_000, 70_000);
    assert_eq!(triggers(&test), [Trigger::Start, Trigger::Router]);
    test.routers = 4;
    let sent = test.run(70_000, 150_000);
    assert_eq!(triggers(&test), [Trigger::Start, Trigger::Router, Trigger::Length]);
    let began = test.traces.iter().find(|trace| trace.trigger == Trigger::Length).unwrap().began;
    let replies = sent.iter().filter(|(ttl, time)| *ttl == DESTINATION && at(*time + 1) < began);
    assert_eq!(replies.count(), 1, "the first reply that showed it: {sent:?}");
    let sent = test.run(150_000, 180_000);
    let count = |ttl: u8| times_of(&sent, ttl).len();
    assert_eq!([1, 2, 3, 4, DESTINATION].map(count), [1; 5], "the new hop is probed like others");
}

#[test]
fn only_ttls_at_which_one_of_two_routes_ends_show_which_one_is_taken() {
    let (protocol, interval) = (ProbeProtocol::Icmp, Duration::from_secs(30));
    let mut flow = TracedFlow::new(0, Direction::Forward, protocol, 30, interval, 1, at(0));
    let hops = (1..=5).map(|last| HopRouter::Single([10, 0, 0, last].into()));
    flow.route.establish(hops.collect(), Some(5));
    flow.routers = Some(5);
    assert_eq!(flow.observe_routers(7, at(0)), None);
    let mut answered = |ttl: u8| flow.answered(1, ttl, Answer::new([10, 0, 0, ttl].into(), RTT), at(0));
    for ttl in [4, 5, 8].repeat(20) {
        assert_eq!(answered(ttl), None, "a router on both routes, or on none");
    }
    assert!([6, 7].repeat(7).into_iter().all(|ttl| answered(ttl).is_none()));
    assert!(matches!(answered(6), Some(RouteUpdate::Changed { .. })), "the sixteenth");
}

#[test]
fn hops_of_a_loop_behind_the_known_length_are_not_of_the_route_which_may_change_before_it() {
    let mut test = TestFlow::new(&[]);
    test.ended_at = Some(2);
    test.flow.observe_routers(3, at(0));
    test.run(0, 20_000);
    test.flow.trigger(Trigger::Request);
    let sent = test.run(20_000, 21_000);
    assert!(sent.iter().any(|(ttl, _)| *ttl == 30), "the loop is shown: {sent:?}");
    let hops = |test: &TestFlow| test.flow.route().current().unwrap().hops.clone();
    let hop = |last: u8| HopRouter::Single([10, 0, 0, last].into());
    assert_eq!(hops(&test), [1, 2, 3].map(hop));
    for changed in [2, 3] {
        test.other_at = Some(changed);
        test.run(21_000 + 80_000 * u64::from(changed - 2), 100_000 + 80_000 * u64::from(changed - 2));
        assert!(matches!(test.updates[..], [RouteUpdate::Changed { .. }]), "{:?}", test.updates);
        assert_eq!(hops(&test)[usize::from(changed) - 1], hop(77));
        test.updates.clear();
    }
}

#[test]
fn rejection_of_a_probe_that_was_sent_after_an_answered_one_is_shown_by_later_traces() {
    let mut test = TestFlow::new(&[]);
    test.run(0, 100);
    let milliseconds = Duration::from_millis;
    let reason = RejectionReason::HostUnreachable;
    let mut shown = |sent: u64| {
        let answered = milliseconds(40);
        test.flow.reached(1_000, DESTINATION, [10, 0, 0, 9].into(), answered, Some(3), at(1_000));
        let rtt = at(1_100).since(at(sent));
        let rejection = Rejection { ttl: None, address: [10, 0, 0, 55].into(), reason, rtt };
        test.flow.rejected(1_001, DESTINATION, rejection, at(1_100));
        let latest = test.flow.record(Trigger::Loss, at(1_200), at(1_300), &[], None);
        latest.rejection.is_some()
    };
    assert_eq!([950, 960, 970, 1_010].map(&mut shown), [false, false, true, true]);
}

/// Over TCP the next probe closes the socket of the one before, so that its answer is lost.
#[test]
fn check_is_waited_for_if_only_one_probe_may_be_in_flight() {
    let (protocol, interval) = (ProbeProtocol::Tcp, Duration::from_secs(30));
    let mut flow = TracedFlow::new(0, Direction::Forward, protocol, 30, interval, 1, at(0));
    flow.learn_destination(3, RTT);
    flow.queued(7, DESTINATION, at(0));
    flow.check_queued(7);
    assert_eq!(flow.step(at(1), at(1)), FlowStep::Wait(at(0) + flow.answer_timeout()));
    flow.reached(7, DESTINATION, [10, 0, 0, 9].into(), RTT, None, at(10));
    assert!(matches!(flow.step(at(10), at(10)), FlowStep::Send { .. }));
}

/// Probes of a trace of which these are answered by the usual routers, and the destination is.
fn answered_probes(ttls: &[u8]) -> Vec<BurstProbe> {
    let probe = |ttl: u8| {
        let answer = Some(Answer::new([10, 0, 0, ttl].into(), RTT));
        let is_reached = ttl == DESTINATION;
        BurstProbe { answer, is_reached, ..BurstProbe::new(ttl.into(), ttl, at(0)) }
    };
    ttls.iter().chain(&[DESTINATION]).map(|ttl| probe(*ttl)).collect()
}

#[test]
fn trace_of_rewritten_ttls_shows_no_hops_and_is_no_route() {
    let mut test = TestFlow::new(&[]);
    let mut probes = answered_probes(&[1, 2]);
    let (reason, address) = (RejectionReason::Prohibited, [10, 0, 0, 55].into());
    probes[1].rejection = Some(Rejection { ttl: Some(2), address, reason, rtt: RTT });
    let record = |flow: &mut TracedFlow, probes: &[BurstProbe], routers| {
        let trace = flow.record(Trigger::Start, at(0), at(100), probes, routers);
        flow.establish_route(&trace);
        let rejected_at = trace.rejection.and_then(|rejection| rejection.ttl);
        (trace.hops.len(), trace.routers, rejected_at, flow.route().current().is_some())
    };
    test.flow.ttl_clamp.found(at(0));
    assert_eq!(record(&mut test.flow, &probes, Some(2)), (0, None, None, false));
    test.flow.ttl_clamp.expire(Timestamp::NEVER);
    assert_eq!(record(&mut test.flow, &[], None), (0, None, None, false), "nothing has answered");
    assert_eq!(record(&mut test.flow, &probes, Some(2)), (2, Some(2), Some(2), true));
}

#[test]
fn hop_that_was_never_probed_is_shown_as_such() {
    let test = TestFlow::new(&[]);
    let trace = test.flow.record(Trigger::Start, at(0), at(100), &answered_probes(&[1, 3]), Some(3));
    let hops: Vec<_> = trace.hops.iter().map(|hop| (hop.sent, hop.state == HopState::NotProbed)).collect();
    assert_eq!(hops, [(1, false), (0, true), (1, false)]);
}

#[test]
fn rewriting_that_is_still_there_a_day_later_is_not_reported_again() {
    let mut flow = TestFlow::new(&[]).flow;
    let mut reports = |is_rewritten: bool, days: u32| {
        let now = at(0) + CLAMPED_FOR * days;
        flow.ttl_clamp.expire(now);
        flow.ttl_clamp.trace_began();
        let mut probes = answered_probes(&[1, 2, 3]);
        if is_rewritten {
            probes[2].answer = Some(Answer::new([10, 0, 0, 2].into(), RTT));
            probes[3].answer = None;
            flow.unlimited_ended([10, 0, 0, 2].into());
        }
        flow.examine(&probes, now);
        std::mem::take(&mut flow.reports).len()
    };
    assert_eq!([reports(false, 0), reports(true, 0), reports(true, 1), reports(true, 2)], [0, 1, 0, 0]);
    assert_eq!([reports(false, 3), reports(true, 3)], [0, 1], "it was gone");
}

/// A flow whose destination has answered, and was missed by two traces that began after 1 s and 12 s.
fn missed_destination(direction: Direction) -> TracedFlow {
    let (protocol, interval) = (ProbeProtocol::Udp, Duration::from_secs(30));
    let mut flow = TracedFlow::new(0, direction, protocol, 30, interval, 1, at(0));
    let (sent_ttl, arrived_ttl) = (DESTINATION, None);
    let reply = DestinationReply { sequence: 0, sent_ttl, arrived_ttl, sent_at: at(0), at: at(10) };
    flow.destination_answered(reply);
    for began in [1_000, 12_000] {
        let mut probes = answered_probes(&[1, 2]);
        for (probe, after) in probes.iter_mut().zip([0, 100, 200]) {
            probe.sent_at = at(began + after);
            probe.answer.take_if(|_| after > 0);
        }
        let trace = flow.record(Trigger::Start, at(began), at(began + 500), &probes, Some(2));
        flow.trace_ended(&trace, &probes, at(began + 500));
    }
    flow
}

#[test]
fn only_probes_to_the_destination_show_that_it_does_not_answer() {
    let mut flow = missed_destination(Direction::Forward);
    assert_eq!(flow.reachability.missed_since(), Some(at(1_200)), "the first one that was not answered");
    (1..=40).for_each(|sequence| flow.probe_expired(sequence, 2));
    (41..=60).for_each(|sequence| flow.probe_expired(sequence, DESTINATION));
    assert_eq!(flow.reports, []);
    flow.probe_expired(61, DESTINATION);
    assert!(matches!(flow.reports.make_contiguous(), [TraceReport::Reachability(_)]), "{:?}", flow.reports);
}

#[test]
fn way_back_does_not_show_whether_the_destination_answers() {
    let mut flow = missed_destination(Direction::Reverse);
    assert_eq!(flow.reachability.missed_since(), None);
    (1..=40).for_each(|sequence| flow.probe_expired(sequence, DESTINATION));
    assert_eq!(flow.reports, []);
}

#[test]
fn hops_are_probed_in_another_order_in_each_trace() {
    for seed in 0..4 {
        let (protocol, interval) = (ProbeProtocol::Udp, Duration::from_secs(30));
        let mut test = TestFlow::new(&[]);
        test.flow = TracedFlow::new(0, Direction::Forward, protocol, 30, interval, seed, at(0));
        test.flow.learn_destination(12, RTT);
        test.routers = 12;
        let mut orders = HashSet::new();
        for request in 0..8 {
            test.flow.trigger(Trigger::Request);
            let sent = test.run(request * 1_000, request * 1_000 + 100);
            orders.insert(sent.into_iter().map(|(ttl, _)| ttl).collect::<Vec<u8>>());
        }
        assert_eq!(orders.len(), 8, "seed {seed}: {orders:?}");
    }
}

#[test]
fn round_that_shows_the_first_route_has_it() {
    let mut test = TestFlow::new(&(1..=DESTINATION).collect::<Vec<u8>>());
    test.run(0, 5_000);
    assert_eq!(test.flow.route().current(), None, "nothing has answered");
    test.silent.clear();
    // By a reply to an echo.
    test.flow.observe_routers(3, at(5_000));
    test.run(5_000, 70_000);
    let first = test.traces.iter().find(|trace| trace.rtt.is_some()).expect("the destination answers");
    assert!(!first.is_burst);
    assert_eq!(first.route, test.flow.route().current().map(|route| route.id));
    assert!(first.route.is_some());
}

#[test]
fn destination_behind_no_router_is_traced_in_each_interval() {
    let mut test = TestFlow::new(&[]);
    test.routers = 0;
    let sent = test.run(0, 65_000);
    assert_eq!(sent.iter().map(|(ttl, _)| *ttl).collect::<Vec<u8>>(), [DESTINATION; 3]);
    assert_eq!(triggers(&test), [Trigger::Start, Trigger::Interval, Trigger::Interval]);
}

#[test]
fn answers_are_waited_for_from_the_time_at_which_probes_left() {
    let mut test = TestFlow::new(&[1, DESTINATION]);
    test.flow.learn_destination(1, RTT);
    assert_eq!(test.run(0, 1).len(), 2);
    (0..2).for_each(|sequence| test.flow.sent(sequence, at(30)));
    let until = at(30) + test.flow.answer_timeout();
    assert_eq!(test.flow.step(at(50), at(50)), FlowStep::Wait(until));
    assert!(matches!(test.flow.step(until, until), FlowStep::Traced(_)));
}

#[test]
fn probe_that_did_not_leave_is_not_in_flight_any_more() {
    let (protocol, interval) = (ProbeProtocol::Tcp, Duration::from_secs(30));
    let mut flow = TracedFlow::new(0, Direction::Forward, protocol, 30, interval, 1, at(0));
    flow.queued(7, DESTINATION, at(0));
    flow.not_sent(6);
    assert!(matches!(flow.step(at(1), at(1)), FlowStep::Wait(_)));
    flow.not_sent(7);
    assert!(matches!(flow.step(at(1), at(1)), FlowStep::Send { .. }));
}

#[test]
fn no_limited_probe_is_sent_where_ttls_are_rewritten() {
    let mut test = TestFlow::new(&[2]);
    test.run(0, 100);
    test.flow.trigger(Trigger::Request);
    assert!(test.run(100, 100).len() < 4, "it has hops left to probe");
    test.flow.ttl_clamp.found(at(100));
    test.flow.stop_limited_probes();
    let sent = test.run(100, 100_000);
    assert!(sent.len() == 3 && sent.iter().all(|(ttl, _)| *ttl == DESTINATION), "{sent:?}");
    let trace = test.traces.last().unwrap();
    assert_eq!((trace.routers, trace.rtt), (None, Some(RTT)));
}
