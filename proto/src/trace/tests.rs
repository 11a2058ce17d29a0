use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::admission::Policy;
use crate::echo::{ResponderReport, StampResponder};
use crate::machine::{Arrival, HostDrops, IcmpError, IcmpKind, Machine, Now, Send, Step, TimestampSource};
use crate::probe_budget::{Expected, ProbeLimits, TokenRate};
use crate::time::{WallOffset, WallTime};
use crate::wire::stamp::{Mode, Reply};
use crate::wire::{ReplyFate, ReverseOutcome, ReverseTrace, tlv};

const RESPONDER: ([u8; 4], u16) = ([192, 0, 2, 2], 862);

fn at(milliseconds: u64) -> Timestamp {
    Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
}

fn now(at: Timestamp) -> Now {
    let epoch = WallTime::from_nanos(1_767_225_600_000_000_000);
    Now { at, drained: at, wall: WallOffset::between(Timestamp::from_nanos(0), epoch) }
}

fn arrival(at: Timestamp) -> Arrival {
    let (from, by) = (RESPONDER.into(), TimestampSource::Kernel);
    Arrival { at, by, from, to: None, flow: 0, ttl: Some(250), tos: Some(0), icmp: None }
}

fn expired(router: [u8; 4], at: Timestamp) -> Arrival {
    let icmp = Some(IcmpError {
        router: router.into(),
        kind: IcmpKind::TtlExceeded,
        code: 0,
        mtu: None,
        extensions_at: None,
    });
    Arrival { icmp, ..arrival(at) }
}

fn spec() -> TraceSpec {
    let none = TokenRate::UNLIMITED;
    let limits = ProbeLimits { router_v4: none, router_v6: none, agent: none, others: none };
    TraceSpec {
        protocol: ProbeProtocol::Udp,
        to: RESPONDER.into(),
        ssids: vec![7],
        interval: Duration::from_secs(30),
        hops_max: 30,
        answer_wait: None,
        dscp: Dscp::DEFAULT,
        keys: None,
        quirks: None,
        tx_timestamps: true,
        traces_reverse: false,
        skips_busy_routers: false,
        missed_since: Vec::new(),
        budget: Arc::new(Mutex::new(ProbeBudget::new(limits))),
        seed: 1,
    }
}

/// A tracer whose datagrams a test transports.
struct TestTracer {
    tracer: Tracer,
    responder: StampResponder,
    reports: Vec<DirectedReport>,
}

impl TestTracer {
    fn new(spec: TraceSpec) -> Self {
        let policy = Policy { open: true, rate: 1 << 40, rate_per_source: 1 << 40, ..Policy::default() };
        let responder = StampResponder::new(policy, None, 8);
        Self { tracer: Tracer::new(spec, at(0)), responder, reports: Vec::new() }
    }

    /// The datagrams that are sent until the tracer waits for a time after `until`.
    fn sent_until(&mut self, from: Timestamp, until: Timestamp) -> Vec<(Send, Vec<u8>)> {
        let (mut time, mut sent) = (from, Vec::new());
        loop {
            let mut arena = Vec::new();
            match self.tracer.step(now(time), &mut HostDrops::default(), &mut arena) {
                Step::Send(send) => {
                    self.tracer.sent(send.id, time, TimestampSource::User);
                    sent.push((send, arena));
                }
                Step::Report(report) => self.reports.push(report),
                Step::Wait(next) if next <= until => {
                    assert!(next > time, "it waits for a later time");
                    time = next;
                }
                Step::Wait(_) | Step::Finished => return sent,
            }
        }
    }

    /// The reply to a request, which passes five routers.
    fn reply(&mut self, request: &[u8], time: Timestamp) -> Vec<u8> {
        self.responder.received(request, &arrival(time));
        let mut reply = Vec::new();
        loop {
            match self.responder.step(now(time), &mut HostDrops::default(), &mut reply) {
                Step::Report(ResponderReport::Refused(why)) => panic!("{why:?}"),
                Step::Send(_) | Step::Report(ResponderReport::Answered | ResponderReport::Sources(_)) => {}
                Step::Wait(_) | Step::Finished => return reply,
            }
        }
    }

    /// The reports of one direction that were not taken yet.
    fn take(&mut self, direction: Direction) -> Vec<TraceReport> {
        let (taken, left) =
            std::mem::take(&mut self.reports).into_iter().partition(|report| report.direction == direction);
        self.reports = left;
        taken.into_iter().map(|report: DirectedReport| report.report).collect()
    }
}

#[test]
fn probe_that_has_left_is_decided_although_a_send_error_follows() {
    let mut test = TestTracer::new(spec());
    let sent = test.sent_until(at(0), at(0));
    let [(send, _)] = &sent[..] else { panic!("the destination is asked first") };
    test.tracer.not_sent(send.id, NotSent::Buffer);
    assert_eq!(test.tracer.in_flight(), 1);
    test.tracer.withdraw();
    test.sent_until(at(1), at(1));
    let expected = [TraceReport::Sent { ttl: DESTINATION }, TraceReport::Withdrawn];
    assert_eq!(test.take(Direction::Forward), expected);
}

#[test]
fn refused_probe_is_not_waited_for() {
    let mut test = TestTracer::new(spec());
    let mut arena = Vec::new();
    let Step::Send(send) = test.tracer.step(now(at(0)), &mut HostDrops::default(), &mut arena) else {
        panic!("the destination is asked first")
    };
    assert_eq!(test.tracer.in_flight(), 0, "it has not left yet");
    test.tracer.not_sent(send.id, NotSent::Buffer);
    test.tracer.received(&arena, &expired([10, 0, 0, 1], at(1)));
    test.sent_until(at(1), at(1));
    let expected = [TraceReport::SendError(NotSent::Buffer), TraceReport::Unmatched];
    assert_eq!(test.take(Direction::Forward), expected);
}

#[test]
fn ttl_of_a_probe_to_the_destination_ends_only_in_a_loop_which_is_no_answer() {
    let mut test = TestTracer::new(spec());
    let sent = test.sent_until(at(0), at(0));
    test.tracer.received(&sent[0].1, &expired([10, 0, 0, 9], at(5)));
    let later = test.sent_until(at(5), at(400));
    for (send, bytes) in later.iter().filter(|(send, _)| send.ttl <= 2) {
        test.tracer.received(bytes, &expired([10, 0, 0, send.ttl], at(400)));
    }
    test.sent_until(at(400), at(5_400));
    let reports = test.take(Direction::Forward);
    assert_eq!(answered(&reports), [1, 2]);
    assert!(reports.contains(&TraceReport::Unanswered { ttl: DESTINATION }));
    assert!(!reports.contains(&TraceReport::Unmatched), "it quotes a probe");
    let route = test.tracer.routes(Direction::Forward).next().unwrap().expect("a trace was answered");
    assert_eq!(route.hops.len(), 2);
}

#[test]
fn router_that_ends_limited_and_unlimited_probes_shows_lowered_ttls() {
    for is_answered in [false, true] {
        let mut test = TestTracer::new(spec());
        let sent = test.sent_until(at(0), at(0));
        if is_answered {
            let reply = test.reply(&sent[0].1, at(5));
            test.tracer.received(&reply, &arrival(at(10)));
        }
        test.tracer.received(&sent[0].1, &expired([10, 0, 0, 2], at(11)));
        for (send, bytes) in test.sent_until(at(11), at(400)) {
            test.tracer.received(&bytes, &expired([10, 0, 0, send.ttl.min(2)], at(400)));
        }
        test.sent_until(at(400), at(1_400));
        let reports = test.take(Direction::Forward);
        let is_clamped = reports.iter().any(|report| matches!(report, TraceReport::TtlClamped { .. }));
        assert_eq!(is_clamped, !is_answered, "a second answer is no evidence: {reports:?}");
    }
}

#[test]
fn extensions_are_left_out_for_ten_minutes_if_only_requests_without_them_are_answered() {
    let mut test = TestTracer::new(TraceSpec { quirks: Some(Quirks::default()), hops_max: 1, ..spec() });
    let mut extended = Vec::new();
    for second in (0..1_300).step_by(20) {
        let time = at(second * 1_000);
        test.tracer.trigger(None, Trigger::Request);
        let sent = test.sent_until(time, time);
        let (_, request) = sent.iter().find(|(send, _)| send.ttl == DESTINATION).expect("it is asked first");
        if request.len() > Mode::Open.base_bytes() {
            extended.push(second);
        } else {
            let reply = test.reply(request, time);
            test.tracer.received(&reply, &arrival(time + Duration::from_millis(1)));
        }
        test.sent_until(time + Duration::from_millis(1), time + Duration::from_secs(15));
    }
    assert_eq!(extended, [0, 640, 1_280], "each time two traces, the second after ten seconds");
}

/// A responder that does not know the TTL on arrival writes 0.
#[test]
fn ttl_on_arrival_shows_rewriting_if_it_is_known() {
    for (unlimited, limited, is_found) in [(0, 0, false), (250, 2, false), (250, 60, true), (250, 0, false)] {
        let mut test = TestTracer::new(spec());
        let mut sent = test.sent_until(at(0), at(0));
        for time in [10, 270, 310] {
            for (send, request) in sent {
                let mut reply = test.reply(&request, at(time));
                let sender_ttl = if send.ttl == DESTINATION { unlimited } else { limited };
                let known = Reply { sender_ttl, ..Reply::decode(&reply, Mode::Open).unwrap() };
                known.write(Mode::Open, &mut reply);
                if send.ttl > 2 {
                    test.tracer.received(&reply, &arrival(at(time)));
                } else {
                    test.tracer.received(&request, &expired([10, 0, 0, send.ttl], at(time)));
                }
            }
            sent = test.sent_until(at(time), at(time + 255));
        }
        let reports = test.take(Direction::Forward);
        let clamped = reports.iter().filter(|report| matches!(report, TraceReport::TtlClamped { .. }));
        assert_eq!(clamped.count(), usize::from(is_found), "{unlimited} {limited}: {reports:?}");
        let traced = reports.iter().find_map(|report| {
            let TraceReport::Traced(trace) = report else { return None };
            Some(trace)
        });
        let routers = traced.expect("all was answered").routers;
        assert_eq!(routers.is_some(), unlimited > 0, "{unlimited} {limited}: {routers:?}");
    }
}

#[test]
fn rejection_by_the_destination_is_no_answer_of_it() {
    let mut test = TestTracer::new(spec());
    let sent = test.sent_until(at(0), at(251));
    let [(_, unlimited), (_, limited), ..] = &sent[..] else { panic!("{sent:?}") };
    test.take(Direction::Forward);
    let icmp = Some(IcmpError {
        router: RESPONDER.0.into(),
        kind: IcmpKind::PortUnreachable,
        code: 3,
        mtu: None,
        extensions_at: None,
    });
    for probe in [unlimited, limited] {
        test.tracer.received(probe, &Arrival { icmp, ..arrival(at(260)) });
    }
    test.sent_until(at(260), at(260));
    let rejected = |ttl, milliseconds| TraceReport::Rejected {
        flow: 0,
        rejection: Rejection {
            ttl,
            address: RESPONDER.0.into(),
            reason: RejectionReason::PortUnreachable,
            rtt: Duration::from_millis(milliseconds),
        },
    };
    let reports = test.take(Direction::Forward);
    assert_eq!(answered(&reports), []);
    let found: Vec<_> =
        reports.into_iter().filter(|report| matches!(report, TraceReport::Rejected { .. })).collect();
    assert_eq!(found, [rejected(None, 260), rejected(Some(1), 10)]);
}

/// Sends a trace of the way back to a responder five routers away, up to `until`; returns its probes in the
/// order of their TTLs, and the requests that fetch answers.
fn reverse_probes(test: &mut TestTracer, until: Timestamp) -> Vec<(u8, Send, Vec<u8>)> {
    let sent = test.sent_until(at(0), at(0));
    let reply = test.reply(&sent[0].1, at(5));
    test.tracer.received(&reply, &arrival(at(10)));
    let sent = test.sent_until(at(10), until);
    let mut probes: Vec<_> = sent
        .into_iter()
        .filter_map(|(send, bytes)| {
            let found =
                tlv::walk(&bytes, Mode::Open.base_bytes()).find(|tlv| tlv.kind == tlv::REVERSE_TRACE)?;
            Some((ReverseTrace::read(found.value(&bytes)).unwrap().ttl, send, bytes))
        })
        .collect();
    probes.sort_by_key(|(ttl, ..)| *ttl);
    probes
}

/// A reply to a request whose extension for the way back is changed.
fn changed_reply(
    test: &mut TestTracer,
    request: &[u8],
    time: Timestamp,
    change: impl FnOnce(&mut ReverseTrace),
) -> Vec<u8> {
    let mut reply = test.reply(request, time);
    let found = tlv::walk(&reply, Mode::Open.base_bytes()).find(|tlv| tlv.kind == tlv::REVERSE_TRACE);
    let found = found.expect("the request has the extension");
    let mut reverse = ReverseTrace::read(found.value(&reply)).unwrap();
    change(&mut reverse);
    reverse.write(found.value_mut(&mut reply));
    reply
}

/// The TTLs that were reported as answered.
fn answered(reports: &[TraceReport]) -> Vec<u8> {
    let found = reports.iter().filter_map(|report| {
        let TraceReport::Answered { ttl, .. } = report else { return None };
        Some(*ttl)
    });
    found.collect()
}

fn sequence(send: &Send) -> u32 {
    u32::try_from(send.id.0 & u64::from(u32::MAX)).unwrap()
}

#[test]
fn answer_on_the_way_back_that_took_longer_than_the_wait_for_it_is_ignored() {
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let probes = reverse_probes(&mut test, at(20));
    let ttls: Vec<u8> = probes.iter().map(|(ttl, ..)| *ttl).collect();
    assert_eq!(ttls, [0, 1, 2, 3, 4, 5], "the destination and each hop");
    let request = probes[0].2.clone();
    let reply = changed_reply(&mut test, &request, at(25), |reverse| {
        let answer = |probe: &(u8, Send, Vec<u8>), rtt| {
            Some(ReverseOutcome {
                sequence: sequence(&probe.1),
                fate: ReplyFate::Answered { router: [10, 0, 1, 1].into(), rtt },
            })
        };
        let [short, long] = [10, 21].map(Duration::from_millis);
        reverse.outcomes = [answer(&probes[1], short), answer(&probes[2], long), answer(&probes[0], short)];
    });
    test.tracer.received(&reply, &arrival(at(30)));
    test.sent_until(at(30), at(30));
    assert_eq!(answered(&test.take(Direction::Reverse)), [1, DESTINATION]);
}

#[test]
fn probe_of_the_way_back_is_unanswered_only_if_its_reply_was_sent() {
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let probes = reverse_probes(&mut test, at(20));
    let reply = changed_reply(&mut test, &probes[5].2.clone(), at(25), |reverse| {
        reverse.outcomes = [(1, ReplyFate::Unanswered), (2, ReplyFate::Unknown), (3, ReplyFate::Wanted)]
            .map(|(index, fate)| Some(ReverseOutcome { sequence: sequence(&probes[index].1), fate }));
    });
    test.tracer.received(&reply, &arrival(at(30)));
    test.sent_until(at(30), at(30));
    test.take(Direction::Reverse);
    test.sent_until(at(30), at(5_030));
    let (mut unanswered, mut withdrawn) = (Vec::new(), 0);
    for report in test.take(Direction::Reverse) {
        if let TraceReport::Unanswered { ttl } = report {
            unanswered.push(ttl);
        }
        withdrawn += usize::from(report == TraceReport::Withdrawn);
    }
    unanswered.sort_unstable();
    assert_eq!((unanswered, withdrawn), (vec![1, DESTINATION], 3), "2, 3 and 4 may have been lost before");
}

#[test]
fn responder_tells_nothing_about_probes_of_the_way_there() {
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let sent = test.sent_until(at(0), at(0));
    let reply = test.reply(&sent[0].1, at(5));
    test.tracer.received(&reply, &arrival(at(10)));
    let sent = test.sent_until(at(10), at(20));
    test.take(Direction::Forward);
    let there: Vec<&Send> =
        sent.iter().map(|(send, _)| send).filter(|send| send.ttl != DESTINATION).collect();
    let (_, request) = sent.iter().find(|(send, _)| send.ttl == DESTINATION).unwrap();
    let reply = changed_reply(&mut test, request, at(25), |reverse| {
        let fate = ReplyFate::Answered { router: [10, 0, 1, 1].into(), rtt: Duration::from_millis(1) };
        reverse.outcomes[0] = Some(ReverseOutcome { sequence: sequence(there[0]), fate });
    });
    test.tracer.received(&reply, &arrival(at(30)));
    test.sent_until(at(30), at(30));
    assert_eq!(test.take(Direction::Forward), []);
}

/// Lets a trace over two routers, 10.0.0.1 and 10.0.0.2, be answered completely. Returns its probes in the
/// order of their TTLs.
fn first_trace(test: &mut TestTracer) -> Vec<(Send, Vec<u8>)> {
    let mut probes = test.sent_until(at(0), at(0));
    let reply = test.reply(&probes[0].1, at(5));
    let passes_two = Reply { sender_ttl: 253, ..Reply::decode(&reply, Mode::Open).unwrap() };
    let mut reply = reply;
    passes_two.write(Mode::Open, &mut reply);
    test.tracer.received(&reply, &arrival(at(10)));
    probes.extend(test.sent_until(at(10), at(12)));
    probes.sort_by_key(|(send, _)| send.ttl);
    let [first, second, _] = &probes[..] else { panic!("two routers and the destination: {probes:?}") };
    for (send, bytes) in [first, second] {
        test.tracer.received(bytes, &expired([10, 0, 0, send.ttl], at(15)));
    }
    test.sent_until(at(15), at(15));
    assert_eq!(answered(&test.take(Direction::Forward)), [DESTINATION, 1, 2]);
    probes
}

#[test]
fn number_of_routers_that_echoes_passed_is_an_observation_of_the_route() {
    let mut test = TestTracer::new(spec());
    first_trace(&mut test);
    for observation in 1..=CONFIRMATIONS {
        let finding = Finding::Routers { flow: 0, direction: Direction::Forward, routers: 3 };
        test.tracer.observe(finding, at(20));
        test.sent_until(at(20), at(20));
        let reports = test.take(Direction::Forward);
        let is_changed = reports.iter().any(|report| matches!(report, TraceReport::Route { .. }));
        assert_eq!(is_changed, observation == CONFIRMATIONS, "{observation}: {reports:?}");
    }
    // Of the way back no reply has shown that it can be traced.
    let finding = Finding::Routers { flow: 0, direction: Direction::Reverse, routers: 3 };
    test.tracer.observe(finding, at(20));
    test.sent_until(at(20), at(20));
    assert_eq!(test.take(Direction::Reverse), []);
}

#[test]
fn replies_and_errors_are_owned_if_they_belong_to_a_probe_of_their_flow() {
    let mut test = TestTracer::new(spec());
    let sent = test.sent_until(at(0), at(0));
    let request = &sent[0].1;
    let reply = test.reply(request, at(5));
    let (answer, error) = (arrival(at(10)), expired([10, 0, 0, 1], at(10)));
    let refused = Arrival {
        icmp: Some(IcmpError {
            router: [10, 0, 0, 1].into(),
            kind: IcmpKind::PortUnreachable,
            code: 0,
            mtu: None,
            extensions_at: None,
        }),
        ..answer
    };
    let mut other_time = request.clone();
    other_time[11] ^= 1;
    let mut other_number = request.clone();
    other_number[3] ^= 1;
    let elsewhere = |arrival: Arrival| Arrival { flow: 1, ..arrival };
    let mut of_other_time = reply.clone();
    of_other_time[35] ^= 1;
    for (datagram, arrival, is_owned) in [
        (&reply[..], answer, true),
        (&reply, elsewhere(answer), false),
        (&reply[..40], answer, false),
        (&of_other_time, answer, false),
        (&other_number, answer, false),
        (request, error, true),
        (request, refused, true),
        (request, elsewhere(error), false),
        (&request[..11], error, true),
        (&request[..4], error, true),
        (&request[..4], refused, true),
        (&other_number[..4], error, false),
        (&other_time[..12], error, false),
        // Only tracers limit the TTL.
        (&request[..3], error, true),
        (&[], error, true),
        (&request[..3], refused, false),
    ] {
        assert_eq!(test.tracer.owns(datagram, &arrival), is_owned, "{} bytes, {arrival:?}", datagram.len());
    }
}

#[test]
fn second_answer_to_a_probe_is_ignored() {
    let mut test = TestTracer::new(spec());
    let probes = first_trace(&mut test);
    let reply = test.reply(&probes[2].1, at(5));
    test.tracer.received(&reply, &arrival(at(20)));
    let error = expired([10, 0, 0, 9], at(20));
    test.tracer.received(&probes[0].1, &error);
    let icmp = error.icmp.map(|icmp| IcmpError { kind: IcmpKind::Prohibited, ..icmp });
    test.tracer.received(&probes[1].1, &Arrival { icmp, ..error });
    test.sent_until(at(20), at(20));
    assert_eq!(test.take(Direction::Forward), []);
    let route = test.tracer.routes(Direction::Forward).next().unwrap().unwrap();
    let single = |last| HopRouter::Single([10, 0, 0, last].into());
    assert_eq!((route.hops.clone(), route.routers), (vec![single(1), single(2)], Some(2)));
    assert_eq!(test.tracer.in_flight(), 0);
}

#[test]
fn error_of_another_flow_and_rejections_are_no_answers() {
    let mut test = TestTracer::new(spec());
    test.sent_until(at(0), at(251));
    test.take(Direction::Forward);
    let probes = test.sent_until(at(252), at(252));
    let (send, bytes) = &probes[0];
    let error = expired([10, 0, 0, 1], at(255));
    let kinds = [
        IcmpKind::PortUnreachable,
        IcmpKind::Unreachable,
        IcmpKind::Prohibited,
        IcmpKind::TooBig,
        IcmpKind::Other,
    ];
    for kind in kinds {
        let icmp = error.icmp.map(|icmp| IcmpError { kind, ..icmp });
        test.tracer.received(bytes, &Arrival { icmp, ..error });
    }
    test.tracer.received(bytes, &Arrival { flow: 1, ..error });
    test.tracer.received(bytes, &error);
    test.sent_until(at(255), at(255));
    let reports = test.take(Direction::Forward);
    assert_eq!(answered(&reports), [send.ttl]);
    let unmatched = reports.iter().filter(|report| **report == TraceReport::Unmatched);
    assert_eq!(unmatched.count(), 1, "the one of another flow");
}

#[test]
fn error_without_a_quotation_answers_the_only_probe_that_waits_for_its_router() {
    let mut test = TestTracer::new(spec());
    first_trace(&mut test);
    test.tracer.trigger(None, Trigger::Request);
    let probes = test.sent_until(at(30), at(31));
    assert_eq!(probes.len(), 3);
    test.take(Direction::Forward);
    let mut receive = |arrival: Arrival| {
        test.tracer.received(&[], &arrival);
        test.sent_until(at(31), at(31));
        let reports = test.take(Direction::Forward);
        (answered(&reports), reports.contains(&TraceReport::Unmatched))
    };
    let [known, unknown] = [2, 9].map(|last| expired([10, 0, 0, last], at(31)));
    assert_eq!(receive(Arrival { flow: 1, ..known }), (vec![], true));
    assert_eq!(receive(unknown), (vec![], true));
    assert_eq!(receive(known), (vec![2], false));
    assert_eq!(receive(known), (vec![], true), "it has answered");
    test.tracer.trigger(None, Trigger::Request);
    test.sent_until(at(300), at(301));
    test.tracer.trigger(None, Trigger::Request);
    assert_eq!(test.sent_until(at(600), at(601)).len(), 3);
    test.take(Direction::Forward);
    test.tracer.received(&[], &expired([10, 0, 0, 2], at(601)));
    test.sent_until(at(601), at(601));
    assert!(answered(&test.take(Direction::Forward)).is_empty(), "two probes wait for this router");
}

#[test]
fn error_without_a_quotation_answers_the_probe_of_its_own_flow_although_others_wait_too() {
    let mut test = TestTracer::new(TraceSpec { ssids: vec![7, 8], ..spec() });
    for (send, request) in test.sent_until(at(0), at(0)) {
        let mut reply = test.reply(&request, at(5));
        let passes_two = Reply { sender_ttl: 253, ..Reply::decode(&reply, Mode::Open).unwrap() };
        passes_two.write(Mode::Open, &mut reply);
        test.tracer.received(&reply, &Arrival { flow: send.flow, ..arrival(at(10)) });
    }
    for (send, bytes) in test.sent_until(at(10), at(12)) {
        let error = expired([10, 0, 0, send.ttl], at(15));
        test.tracer.received(&bytes, &Arrival { flow: send.flow, ..error });
    }
    test.sent_until(at(15), at(15));
    test.tracer.trigger(None, Trigger::Request);
    assert_eq!(test.sent_until(at(30), at(31)).len(), 6);
    for flow in [1, 0] {
        test.take(Direction::Forward);
        test.tracer.received(&[], &Arrival { flow, ..expired([10, 0, 0, 2], at(31)) });
        test.sent_until(at(31), at(31));
        let reports = test.take(Direction::Forward);
        let [TraceReport::Answered { flow: of, ttl: 2, .. }] = reports[..] else { panic!("{reports:?}") };
        assert_eq!(of, flow);
    }
}

#[test]
fn probe_is_unanswered_after_five_seconds() {
    let mut test = TestTracer::new(TraceSpec { hops_max: 1, ..spec() });
    test.sent_until(at(0), at(251));
    assert_eq!(test.tracer.in_flight(), 2);
    test.take(Direction::Forward);
    let unanswered = |reports: Vec<TraceReport>| {
        let ttls = reports.into_iter().filter_map(|report| {
            let TraceReport::Unanswered { ttl } = report else { return None };
            Some(ttl)
        });
        ttls.collect::<Vec<u8>>()
    };
    for (time, expected, in_flight) in
        [(4_999, vec![], 2), (5_000, vec![DESTINATION], 1), (5_249, vec![], 1), (5_250, vec![1], 0)]
    {
        test.sent_until(at(time), at(time));
        assert_eq!(unanswered(test.take(Direction::Forward)), expected, "{time} ms");
        assert_eq!(test.tracer.in_flight(), in_flight, "{time} ms");
    }
}

#[test]
fn trace_of_one_flow_is_requested_alone() {
    let mut test = TestTracer::new(TraceSpec { ssids: vec![7, 8, 9], ..spec() });
    test.sent_until(at(0), at(2_000));
    test.tracer.trigger(Some(1), Trigger::Request);
    let flows: Vec<u8> = test.sent_until(at(2_500), at(2_500)).iter().map(|(send, _)| send.flow).collect();
    assert!(flows.contains(&1) && flows.iter().all(|flow| *flow == 1), "{flows:?}");
    test.sent_until(at(2_500), at(9_000));
    test.tracer.observe(Finding::Trigger { flow: None, trigger: Trigger::Loss }, at(20_000));
    let flows: Vec<u8> = test.sent_until(at(20_000), at(20_000)).iter().map(|(send, _)| send.flow).collect();
    assert_eq!(flows, [0, 1, 2]);
}

#[test]
fn probe_of_a_limited_router_is_deferred_and_sent_when_its_turn_comes() {
    let once = TokenRate { spacing: Duration::from_secs(1), burst: 1 };
    let unlimited = TokenRate::UNLIMITED;
    let limits = ProbeLimits { router_v4: once, router_v6: unlimited, agent: unlimited, others: unlimited };
    let budget = Arc::new(Mutex::new(ProbeBudget::new(limits)));
    let mut test = TestTracer::new(TraceSpec { budget: budget.clone(), ..spec() });
    first_trace(&mut test);
    // Its two routers were asked less than a second ago.
    test.tracer.trigger(None, Trigger::Request);
    let ttls = |sent: Vec<(Send, Vec<u8>)>| {
        let mut ttls: Vec<u8> = sent.iter().map(|(send, _)| send.ttl).collect();
        ttls.sort_unstable();
        ttls
    };
    assert_eq!(ttls(test.sent_until(at(30), at(500))), [DESTINATION]);
    let deferred = TraceReport::Deferred(Deferral::Router);
    let reports = test.take(Direction::Forward);
    assert_eq!(reports.iter().filter(|report| **report == deferred).count(), 2);
    test.tracer.trigger(None, Trigger::Request);
    assert_eq!(ttls(test.sent_until(at(500), at(505))), [DESTINATION], "they have a turn already");
    let later = test.sent_until(at(505), at(1_020));
    let limited = later.into_iter().filter(|(send, _)| send.ttl != DESTINATION);
    assert_eq!(ttls(limited.collect()), [1, 2]);
    let mut budget = budget.lock().unwrap();
    let next = budget.reserve(Expected::Unknown { ttl: 1, is_v4: true }, at(1_030)).0;
    assert!(next >= at(2_000), "the unknown router may be the one that answered last");
}

#[test]
fn requests_ask_for_the_way_back_only_if_it_is_traced() {
    let mut test = TestTracer::new(spec());
    let probes = first_trace(&mut test);
    let has_extension = |bytes: &[u8]| {
        tlv::walk(bytes, Mode::Open.base_bytes()).any(|found| found.kind == tlv::REVERSE_TRACE)
    };
    assert!(!probes.iter().any(|(_, bytes)| has_extension(bytes)));
    assert_eq!(test.tracer.routes(Direction::Reverse).collect::<Vec<_>>(), [None]);
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let sent = test.sent_until(at(0), at(300));
    assert!(sent.iter().all(|(send, bytes)| has_extension(bytes) == (send.ttl == DESTINATION)));
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let probes = reverse_probes(&mut test, at(30));
    assert!(probes.iter().all(|(_, send, _)| send.ttl == DESTINATION), "their replies end at routers");
}

#[test]
fn known_router_of_the_way_back_is_named_in_the_next_request() {
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let probes = reverse_probes(&mut test, at(20));
    let expected_of = |bytes: &[u8]| {
        let found = tlv::walk(bytes, Mode::Open.base_bytes()).find(|tlv| tlv.kind == tlv::REVERSE_TRACE);
        ReverseTrace::read(found.unwrap().value(bytes)).unwrap().expected
    };
    assert!(probes.iter().all(|(.., bytes)| expected_of(bytes).is_none()));
    let reply = changed_reply(&mut test, &probes[0].2.clone(), at(25), |reverse| {
        let (sequence, rtt) = (sequence(&probes[2].1), Duration::from_millis(3));
        reverse.outcomes[0] = Some(ReverseOutcome {
            sequence,
            fate: ReplyFate::Answered { router: [10, 0, 1, 2].into(), rtt },
        });
    });
    test.tracer.received(&reply, &arrival(at(30)));
    test.tracer.trigger(None, Trigger::Request);
    let sent = test.sent_until(at(30), at(600));
    let again: Vec<_> = sent
        .iter()
        .filter(|(_, bytes)| tlv::walk(bytes, 44).any(|found| found.kind == tlv::REVERSE_TRACE))
        .filter_map(|(_, bytes)| expected_of(bytes))
        .collect();
    assert!(
        !again.is_empty() && again.iter().all(|router| *router == IpAddr::from([10, 0, 1, 2])),
        "{again:?}"
    );
}

#[test]
fn reply_that_says_when_to_ask_again_decides_nothing_and_the_probe_is_repeated_then() {
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let probes = reverse_probes(&mut test, at(20));
    test.take(Direction::Reverse);
    let reply = changed_reply(&mut test, &probes[3].2.clone(), at(25), |reverse| {
        reverse.deferred = Some(Duration::from_millis(2_000));
    });
    test.tracer.received(&reply, &arrival(at(30)));
    test.sent_until(at(30), at(30));
    let expected = [TraceReport::Withdrawn, TraceReport::Deferred(Deferral::Router)];
    assert_eq!(test.take(Direction::Reverse), expected);
    let asked_for = |sent: Vec<(Send, Vec<u8>)>, ttl: u8| {
        let asked = sent.iter().filter(|(_, bytes)| {
            let mut all = tlv::walk(bytes, Mode::Open.base_bytes());
            let found = all.find(|tlv| tlv.kind == tlv::REVERSE_TRACE);
            found.is_some_and(|found| ReverseTrace::read(found.value(bytes)).unwrap().ttl == ttl)
        });
        asked.count()
    };
    assert_eq!(asked_for(test.sent_until(at(30), at(2_029)), 3), 0);
    assert_eq!(asked_for(test.sent_until(at(2_029), at(2_030)), 3), 1);
}

#[test]
fn probe_of_the_way_back_is_withdrawn_if_another_responder_answers_that_does_not_support_it() {
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let probes = reverse_probes(&mut test, at(20));
    test.take(Direction::Reverse);
    for (_, _, request) in &probes[1..3] {
        let mut reply = test.reply(request, at(25));
        let found = tlv::walk(&reply, 44).find(|found| found.kind == tlv::REVERSE_TRACE).unwrap();
        reply[found.at] |= tlv::UNRECOGNIZED;
        test.tracer.received(&reply, &arrival(at(30)));
    }
    assert_eq!(test.tracer.in_flight(), 4 + 5, "those of both directions that were not answered");
    test.sent_until(at(30), at(31));
    let reports = test.take(Direction::Reverse);
    assert_eq!(reports, [TraceReport::Withdrawn, TraceReport::Withdrawn]);
}

#[test]
fn reply_of_another_flow_is_unmatched() {
    let mut test = TestTracer::new(TraceSpec { ssids: vec![7, 8], ..spec() });
    let sent = test.sent_until(at(0), at(0));
    let reply = test.reply(&sent[0].1, at(5));
    test.tracer.received(&reply, &Arrival { flow: 1, ..arrival(at(10)) });
    test.sent_until(at(10), at(10));
    let sent = TraceReport::Sent { ttl: DESTINATION };
    assert_eq!(test.take(Direction::Forward), [sent.clone(), sent, TraceReport::Unmatched]);
}

#[test]
fn time_of_the_kernel_replaces_the_one_of_the_driver_and_is_no_second_probe() {
    let mut test = TestTracer::new(spec());
    let sent = test.sent_until(at(0), at(0));
    let (send, request) = &sent[0];
    assert!(send.timestamp);
    test.tracer.sent(send.id, at(2), TimestampSource::Kernel);
    let reply = test.reply(request, at(5));
    test.tracer.received(&reply, &arrival(at(10)));
    let probes = test.sent_until(at(10), at(12));
    for (_, bytes) in probes {
        test.tracer.received(&bytes, &expired([10, 0, 0, 1], at(13)));
    }
    test.sent_until(at(13), at(13));
    let reports = test.take(Direction::Forward);
    let sent = reports.iter().filter(|report| **report == TraceReport::Sent { ttl: DESTINATION });
    assert_eq!(sent.count(), 1);
    let trace = reports.iter().find_map(|report| {
        let TraceReport::Traced(trace) = report else { return None };
        Some(trace)
    });
    assert_eq!(trace.unwrap().rtt, Some(Duration::from_millis(8)));
}

#[test]
fn answered_and_unsent_probes_are_not_withdrawn() {
    let mut test = TestTracer::new(spec());
    first_trace(&mut test);
    test.tracer.trigger(None, Trigger::Request);
    let mut arena = Vec::new();
    let is_send = |step| matches!(step, Step::Send(_));
    assert!((0..9).any(|_| is_send(test.tracer.step(now(at(30)), &mut HostDrops::default(), &mut arena))));
    test.take(Direction::Forward);
    test.tracer.withdraw();
    test.tracer.stop();
    let finished = test.tracer.step(now(at(30)), &mut HostDrops::default(), &mut arena);
    assert_eq!(finished, Step::Finished, "nothing is reported");
}

/// The requests for answers, in the order in which they were sent.
fn fetches(sent: &[(Send, Vec<u8>)]) -> Vec<&(Send, Vec<u8>)> {
    let is_fetch = |bytes: &[u8]| {
        let found = tlv::walk(bytes, 44).find(|found| found.kind == tlv::REVERSE_TRACE);
        found.is_some_and(|found| ReverseTrace::read(found.value(bytes)).unwrap().ttl == 0)
    };
    sent.iter().filter(|(_, bytes)| is_fetch(bytes)).collect()
}

#[test]
fn answers_on_the_way_back_are_fetched_until_all_are_known() {
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let probes = reverse_probes(&mut test, at(20));
    // The first hop is probed at 10 ms, and answers are waited for 85 ms.
    let sent = test.sent_until(at(20), at(52));
    let fetched = fetches(&sent);
    assert_eq!(fetched.len(), 0);
    let sent = test.sent_until(at(52), at(90));
    let fetched = fetches(&sent);
    assert_eq!(fetched.len(), 2, "for five answers");
    let mut asked = Vec::new();
    for (fetch, ttls) in fetched.into_iter().zip([1..=3, 4..=4]) {
        let found = tlv::walk(&fetch.1, 44).find(|found| found.kind == tlv::REVERSE_TRACE).unwrap();
        let outcomes = ReverseTrace::read(found.value(&fetch.1)).unwrap().outcomes;
        asked.extend(outcomes.into_iter().flatten());
        let reply = changed_reply(&mut test, &fetch.1, at(92), |reverse| {
            for (slot, ttl) in reverse.outcomes.iter_mut().zip(ttls) {
                let (sequence, rtt) = (sequence(&probes[ttl].1), Duration::from_millis(3));
                *slot = Some(ReverseOutcome {
                    sequence,
                    fate: ReplyFate::Answered { router: [10, 0, 1, 1].into(), rtt },
                });
            }
        });
        test.tracer.received(&reply, &arrival(at(95)));
    }
    let mut waiting: Vec<u32> = probes[1..].iter().map(|(_, send, _)| sequence(send)).collect();
    waiting.sort_unstable();
    let wanted = |sequence| ReverseOutcome { sequence, fate: ReplyFate::Wanted };
    assert_eq!(asked, waiting.into_iter().map(wanted).collect::<Vec<_>>(), "each of them once");
    let sent = test.sent_until(at(95), at(400));
    assert_eq!(fetches(&sent).len(), 1, "for the last answer");
}

#[test]
fn error_about_a_request_for_a_trace_of_the_way_back_is_no_answer() {
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let probes = reverse_probes(&mut test, at(20));
    test.sent_until(at(20), at(20));
    test.reports.clear();
    test.tracer.received(&probes[2].2, &expired([10, 0, 0, 9], at(21)));
    test.sent_until(at(21), at(21));
    assert_eq!(test.reports, []);
}

#[test]
fn reply_without_a_limited_ttl_cannot_be_deferred() {
    let mut test = TestTracer::new(TraceSpec { traces_reverse: true, ..spec() });
    let probes = reverse_probes(&mut test, at(20));
    test.take(Direction::Reverse);
    let reply = changed_reply(&mut test, &probes[0].2.clone(), at(25), |reverse| {
        reverse.deferred = Some(Duration::from_secs(25));
    });
    test.tracer.received(&reply, &arrival(at(30)));
    test.sent_until(at(30), at(30));
    let reports = test.take(Direction::Reverse);
    assert!(
        matches!(reports[..], [TraceReport::Answered { ttl: DESTINATION, is_destination: true, .. }]),
        "{reports:?}"
    );
}

/// The kernel's time of a send may come after the answer, and is later than the driver's.
#[test]
fn trace_does_not_end_in_the_future_if_the_time_of_a_send_changes_after_its_answer() {
    let mut test = TestTracer::new(spec());
    let sent = test.sent_until(at(0), at(0));
    let reply = test.reply(&sent[0].1, at(5));
    let passes_none = Reply { sender_ttl: 255, ..Reply::decode(&reply, Mode::Open).unwrap() };
    let mut reply = reply;
    passes_none.write(Mode::Open, &mut reply);
    test.tracer.received(&reply, &arrival(at(10)));
    test.tracer.sent(sent[0].0.id, at(6), TimestampSource::Kernel);
    test.sent_until(at(10), at(10));
    let reports = test.take(Direction::Forward);
    let traced = reports.iter().find_map(|report| {
        let TraceReport::Traced(trace) = report else { return None };
        Some(trace)
    });
    let trace = traced.expect("it is complete");
    assert!(trace.began + trace.duration <= at(10), "{trace:?}");
}
