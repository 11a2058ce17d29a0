//! Tracers in simulated networks in which a router rejects all packets.

use std::time::Duration;

use pathmeter_proto::machine::IcmpKind;
use pathmeter_proto::sim::{Answers, Random, Rejects, RouterNetwork, TraceWorld};
use pathmeter_proto::trace::{
    Finding, ReachabilityChange, Rejection, RejectionReason, Trace, TraceReport, Trigger,
};

use super::conservation::seeds;
use super::trace::{MS, route_events, traces, world};

/// Errors, and the reasons that they give.
const REASONS: [(IcmpKind, u8, RejectionReason); 4] = [
    (IcmpKind::Unreachable, 0, RejectionReason::NetworkUnreachable),
    (IcmpKind::Unreachable, 1, RejectionReason::HostUnreachable),
    (IcmpKind::Prohibited, 13, RejectionReason::Prohibited),
    (IcmpKind::PortUnreachable, 3, RejectionReason::PortUnreachable),
];

/// A random chain whose router at a random hop rejects what it gets, and what a trace should show of that.
fn rejecting_chain(seed: u64) -> (RouterNetwork, Rejection) {
    let mut random = Random::new(seed);
    let routers = random.between(1, 16);
    let ttl = random.between(1, routers);
    let (kind, code, reason) = random.pick(&REASONS);
    let mut network = RouterNetwork::chain(u8::try_from(routers).unwrap(), MS);
    let router = &mut network.segments[usize::try_from(ttl - 1).unwrap()].routers[0];
    router.rejects = Some(Rejects { kind, code, after: 0, is_before_ttl: random.chance(0.5) });
    let (address, rtt) = (router.address, Duration::from_millis(2 * ttl));
    (network, Rejection { ttl: u8::try_from(ttl).ok(), address, reason, rtt })
}

/// Number of hops of a trace that answered.
fn answered(trace: &Trace) -> usize {
    trace.hops.iter().filter(|hop| !hop.answers.is_empty()).count()
}

#[test]
fn rejecting_router_is_shown_with_its_hop_reason_and_rtt() {
    for seed in seeds(300) {
        let (network, expected) = rejecting_chain(seed);
        let mut world = world(seed, network);
        let reports = world.run(Duration::from_secs(1));
        let [trace] = traces(&reports)[..] else { panic!("one trace, SIM_SEED={seed}") };
        assert_eq!(trace.rejection, Some(expected), "SIM_SEED={seed}");
        assert_eq!((trace.rtt, trace.routers), (None, None), "SIM_SEED={seed}");
        // One that looks at the TTL first answers as a hop, too.
        let before = usize::from(expected.ttl.unwrap()) - 1;
        assert!([before, before + 1].contains(&trace.hops.len()), "SIM_SEED={seed}: {trace:?}");
        assert_eq!(answered(trace), trace.hops.len(), "SIM_SEED={seed}");
        assert!(trace.duration < Duration::from_millis(200), "SIM_SEED={seed}: {:?}", trace.duration);
        let limited = world.sent().iter().filter(|sent| sent.ttl < 255);
        let (last, ttl) = (limited.map(|sent| sent.ttl).max().unwrap(), expected.ttl.unwrap());
        // One that looks at the TTL first rejects probes of the next hop. The next wave of eight hops begins
        // after 30 ms.
        let is_in_time = expected.rtt < Duration::from_millis(25);
        assert!(!is_in_time || last <= (ttl + 1).next_multiple_of(8), "SIM_SEED={seed}: {last}");
    }
}

#[test]
fn hops_before_a_rejecting_router_are_shown_although_they_do_not_answer() {
    let (kind, code, reason) = REASONS[1];
    let mut network = RouterNetwork::chain(5, MS);
    network.segments[1].routers[0].answers = Answers::None;
    network.segments[2].routers[0].rejects = Some(Rejects { kind, code, after: 0, is_before_ttl: true });
    let reports = world(1, network).run(Duration::from_secs(1));
    let [trace] = traces(&reports)[..] else { panic!("one trace") };
    let rejected = trace.rejection.map(|rejection| (rejection.ttl, rejection.reason));
    assert_eq!(rejected, Some((Some(3), reason)));
    assert_eq!((trace.hops.len(), answered(trace)), (2, 1));
}

/// The reports of a destination that no longer answers, or answers again.
fn reachability(reports: &[(Duration, TraceReport)]) -> Vec<&ReachabilityChange> {
    let found = reports.iter().filter_map(|(_, report)| {
        let TraceReport::Reachability(change) = report else { return None };
        Some(&**change)
    });
    found.collect()
}

#[test]
fn router_that_begins_to_reject_is_shown_until_it_forwards_again_and_is_no_change_of_the_route() {
    for seed in seeds(50) {
        let (rejecting, expected) = rejecting_chain(seed);
        let mut network = rejecting.clone();
        network.segments[usize::from(expected.ttl.unwrap()) - 1].routers[0].rejects = None;
        let mut world = world(seed, network.clone());
        world.changes.insert(100_000 * MS, rejecting);
        world.changes.insert(300_000 * MS, network);
        let before = world.run(Duration::from_secs(100));
        let during = world.run(Duration::from_secs(200));
        let mut after = world.run(Duration::from_secs(5));
        let finding = Finding::Trigger { flow: None, trigger: Trigger::Request };
        world.tracer.observe(finding, TraceWorld::start() + Duration::from_secs(305));
        after.extend(world.run(Duration::from_secs(100)));
        let rejection =
            |trace: &&Trace| trace.rejection.map(|found| Rejection { rtt: expected.rtt, ..found });
        assert!(traces(&before).iter().all(|trace| trace.rejection.is_none()), "SIM_SEED={seed}");
        let bursts: Vec<&Trace> = traces(&during).into_iter().filter(|trace| trace.is_burst).collect();
        assert!(!bursts.is_empty(), "SIM_SEED={seed}");
        assert!(bursts.iter().all(|trace| rejection(trace) == Some(expected)), "SIM_SEED={seed}");
        let [down] = reachability(&during)[..] else { panic!("once, SIM_SEED={seed}") };
        assert_eq!(down.rejection.map(|found| found.address), Some(expected.address), "SIM_SEED={seed}");
        let last = traces(&after).into_iter().next_back().unwrap();
        assert_eq!((last.rejection, last.rtt.is_some()), (None, true), "SIM_SEED={seed}");
        let [up] = reachability(&after)[..] else { panic!("once, SIM_SEED={seed}") };
        assert_eq!(up.rejection, down.rejection, "what has ended, SIM_SEED={seed}");
        for reports in [before, during, after] {
            assert_eq!(route_events(&reports), [], "SIM_SEED={seed}");
        }
    }
}

#[test]
fn rejection_that_comes_after_the_trace_is_in_the_next_one() {
    let (kind, code, reason) = REASONS[1];
    let mut network = RouterNetwork::chain(3, MS);
    let after = 3_000 * MS;
    network.segments[2].routers[0].rejects = Some(Rejects { kind, code, after, is_before_ttl: false });
    let reports = world(1, network).run(Duration::from_secs(20));
    let [first, second] = traces(&reports)[..] else { panic!("{:?}", traces(&reports)) };
    assert_eq!(first.rejection, None);
    let rtt = Duration::from_millis(6) + Duration::from_nanos(after);
    let address = [10, 0, 1, 2].into();
    assert_eq!(second.rejection, Some(Rejection { ttl: Some(3), address, reason, rtt }));
    assert_eq!((second.hops.len(), answered(second)), (3, 3));
    let late = reports.iter().filter(|(_, report)| matches!(report, TraceReport::Rejected { .. }));
    assert!(late.clone().count() > 1 && late.clone().all(|(at, _)| *at > Duration::from_secs(3)));
}
