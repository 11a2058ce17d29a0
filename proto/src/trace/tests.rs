use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::admission::Policy;
use crate::echo::{ResponderReport, StampResponder};
use crate::machine::{Arrival, HostDrops, IcmpError, IcmpKind, Machine, Now, Send, Step, TimestampSource};
use crate::probe_budget::{ProbeLimits, ProbeRate};
use crate::time::{WallOffset, WallTime};
use crate::wire::stamp::Mode;
use crate::wire::{ReverseAnswer, ReverseTrace, tlv};

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
    let icmp = Some(IcmpError { router: router.into(), kind: IcmpKind::TtlExceeded, mtu: None });
    Arrival { icmp, ..arrival(at) }
}

fn spec() -> TraceSpec {
    let none = ProbeRate::UNLIMITED;
    let limits = ProbeLimits { router_v4: none, router_v6: none, agent: none };
    TraceSpec {
        to: RESPONDER.into(),
        ssids: vec![7],
        interval: Duration::from_secs(30),
        hops_max: 30,
        dscp: Dscp::DEFAULT,
        keys: None,
        tx_timestamps: true,
        traces_reverse: false,
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
                Step::Wait(next) if next <= until => time = next,
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
        let TraceReport::Answered { ttl } = report else { return None };
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
            Some(ReverseAnswer { sequence: sequence(&probe.1), router: [10, 0, 1, 1].into(), rtt })
        };
        let [short, long] = [10, 21].map(Duration::from_millis);
        reverse.answers = [answer(&probes[1], short), answer(&probes[2], long), answer(&probes[0], short)];
    });
    test.tracer.received(&reply, &arrival(at(30)));
    test.sent_until(at(30), at(30));
    assert_eq!(answered(&test.take(Direction::Reverse)), [1, DESTINATION]);
}
