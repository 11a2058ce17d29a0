//! Tracers in simulated networks whose routes are known.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{Profile, Quirks};
use pathmeter_proto::machine::{Arrival, IcmpError, IcmpKind, Machine as _, TimestampSource};
use pathmeter_proto::probe_budget::{ProbeBudget, ProbeLimits, TokenRate};
use pathmeter_proto::sim::{Answers, Balance, Random, RouterNetwork, Segment, SimRouter, TraceWorld};
use pathmeter_proto::trace::{
    Answer, AnswerExtensions, DESTINATION, Direction, Finding, HopRouter, HopState, ProbeProtocol, Route,
    RouteUpdate, Trace, TraceReport, TraceSpec, Tracer, Trigger,
};
use pathmeter_proto::wire::icmp_extensions::{IcmpExtensions, MplsLabel};

use super::conservation::seeds;

pub(super) const MS: u64 = 1_000_000;

pub(super) fn spec(seed: u64, flows: u16, limits: ProbeLimits) -> TraceSpec {
    TraceSpec {
        protocol: ProbeProtocol::Udp,
        to: TraceWorld::responder_address(),
        ssids: (1..=flows).collect(),
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
        seed,
    }
}

pub(super) fn unlimited() -> ProbeLimits {
    let none = TokenRate::UNLIMITED;
    ProbeLimits { router_v4: none, router_v6: none, agent: none, others: none }
}

pub(super) fn world(seed: u64, network: RouterNetwork) -> TraceWorld {
    let tracer = Tracer::new(spec(seed, 1, unlimited()), TraceWorld::start());
    TraceWorld::new(tracer, network, seed)
}

pub(super) fn traces(reports: &[(Duration, TraceReport)]) -> Vec<&Trace> {
    let found = reports.iter().filter_map(|(_, report)| {
        let TraceReport::Traced(trace) = report else { return None };
        Some(&**trace)
    });
    found.collect()
}

pub(super) fn route_events(reports: &[(Duration, TraceReport)]) -> Vec<(Duration, &RouteUpdate, Trigger)> {
    let found = reports.iter().filter_map(|(at, report)| {
        let TraceReport::Route { update, trigger, .. } = report else { return None };
        Some((*at, &**update, *trigger))
    });
    found.collect()
}

#[test]
fn cold_trace_of_a_chain_asks_each_hop_once_and_takes_two_round_trips() {
    for routers in [0, 1, 8, 16, 29] {
        let delay = 10 * MS / (u64::from(routers) + 1);
        let mut world = world(3, RouterNetwork::chain(routers, delay));
        let reports = world.run(Duration::from_secs(1));
        let [trace] = traces(&reports)[..] else { panic!("one trace") };
        assert_eq!(trace.routers, Some(routers));
        let found: Vec<_> = trace.hops.iter().map(|hop| hop.answers[0].router).collect();
        let expected: Vec<_> = world.forward.route(0).into_iter().flatten().collect();
        assert_eq!(found, expected);
        assert!(trace.hops.iter().all(|hop| hop.sent == 1));
        let rtt = Duration::from_millis(20);
        assert!(trace.duration <= rtt + rtt.mul_f64(1.1) + Duration::from_millis(5), "{:?}", trace.duration);
        let rtts = trace.hops.iter().map(|hop| hop.answers[0].rtt);
        assert!(rtts.eq((1..=u64::from(routers)).map(|hop| Duration::from_nanos(2 * hop * delay))));
    }
}

/// A random network: widths 1 to 16, all kinds of balance and of answers.
pub(super) fn random_network(seed: u64) -> RouterNetwork {
    let mut random = Random::new(seed);
    let count = random.between(1, 20);
    let segments = (0..count).map(|segment| {
        let width = random.pick(&[1, 1, 1, 2, 2, 3, 4, 8, 16]);
        let balance = random.pick(&[Balance::PerFlow, Balance::PerFlow, Balance::PerPacket]);
        let routers = (0..width).map(|index| {
            let [high, low] = [segment, index].map(|part| u8::try_from(part).unwrap());
            let mut router = SimRouter::new([10, 0, high, low].into());
            router.answers = match random.below(10) {
                0 => Answers::None,
                1 => Answers::Limited { per_second: 1.0, burst: 6.0 },
                2 => Answers::Share(0.5),
                _ => Answers::All,
            };
            router
        });
        let routers = routers.collect();
        Segment { routers, balance, delay: random.between(0, 4 * MS) }
    });
    let segments = segments.collect();
    RouterNetwork { segments, last_delay: MS, is_reachable: !random.chance(0.1) }
}

#[test]
fn every_answer_of_a_trace_is_a_router_of_the_true_route() {
    for seed in seeds(300) {
        let network = random_network(seed);
        let truth = network.route(0);
        let mut world = world(seed, network);
        world.reverse_loss = if seed % 3 == 0 { 0.1 } else { 0.0 };
        let reports = world.run(Duration::from_secs(300));
        let traces = traces(&reports);
        assert!(!traces.is_empty(), "SIM_SEED={seed}");
        for trace in traces {
            let reached = trace.rtt.is_some();
            assert!(reached <= world.forward.is_reachable, "SIM_SEED={seed}");
            if let Some(routers) = trace.routers {
                assert_eq!(usize::from(routers), truth.len(), "SIM_SEED={seed}");
            }
            for hop in &trace.hops {
                let index = usize::from(hop.ttl) - 1;
                for Answer { router, .. } in &hop.answers {
                    let segment = &world.forward.segments[index].routers;
                    let is_known = match truth[index] {
                        Some(known) => known == *router,
                        None => segment.iter().any(|known| known.address == *router),
                    };
                    assert!(is_known, "SIM_SEED={seed}, hop {}: {router}", hop.ttl);
                }
            }
        }
    }
}

#[test]
fn every_probe_is_answered_or_unanswered() {
    for seed in seeds(100) {
        let mut world = world(seed, random_network(seed));
        let mut reports = world.run(Duration::from_secs(100));
        world.tracer.stop();
        reports.extend(world.run(Duration::from_secs(1)));
        let count = |is: fn(&TraceReport) -> bool| reports.iter().filter(|(_, report)| is(report)).count();
        let sent = count(|report| matches!(report, TraceReport::Sent { .. }));
        let decided = count(|report| {
            matches!(
                report,
                TraceReport::Answered { .. } | TraceReport::Unanswered { .. } | TraceReport::Withdrawn
            )
        });
        assert_eq!((sent, sent), (decided, world.sent().len()), "SIM_SEED={seed}");
    }
}

/// Balanced packet by packet, limited, lossy and silent routers, but no change.
#[test]
fn day_without_a_change_has_no_change() {
    for seed in seeds(10) {
        let mut network = random_network(seed);
        network.is_reachable = true;
        let tracer = Tracer::new(spec(seed, 1, ProbeLimits::default()), TraceWorld::start());
        let mut world = TraceWorld::new(tracer, network, seed);
        world.reverse_loss = 0.05;
        let reports = world.run(Duration::from_secs(24 * 3600));
        for (at, update, _) in route_events(&reports) {
            let RouteUpdate::LoadBalanced { ttl, routers } = update else {
                panic!("SIM_SEED={seed} at {at:?}: {update:?}")
            };
            let segment = &world.forward.segments[usize::from(*ttl) - 1];
            assert!(segment.balance == Balance::PerPacket && routers.len() > 1, "SIM_SEED={seed}");
        }
        let states: Vec<HopState> =
            traces(&reports).last().unwrap().hops.iter().map(|hop| hop.state).collect();
        assert!(!states.contains(&HopState::Lossy), "SIM_SEED={seed}: {states:?}");
    }
}

#[test]
fn changed_router_is_reported_within_an_interval_and_its_return_as_restored() {
    for seed in seeds(100) {
        let mut random = Random::new(seed);
        let routers = u8::try_from(random.between(2, 16)).unwrap();
        let network = RouterNetwork::chain(routers, MS);
        let mut other = network.clone();
        let changed = random.between(0, u64::from(routers) - 1);
        other.segments[usize::try_from(changed).unwrap()].routers[0].address = [10, 9, 9, 9].into();
        let mut world = world(seed, network.clone());
        world.changes.insert(100_000 * MS, other);
        world.changes.insert(200_000 * MS, network);
        let reports = world.run(Duration::from_secs(300));
        let [
            (first, RouteUpdate::Changed { from, to }, Trigger::Router),
            (second, RouteUpdate::Restored { to: back, .. }, _),
        ] = route_events(&reports)[..]
        else {
            panic!("SIM_SEED={seed}: {:?}", route_events(&reports))
        };
        // An interval, the jitter and the confirmations.
        let interval = Duration::from_secs(33);
        assert!(first - Duration::from_secs(100) < interval, "SIM_SEED={seed}: {first:?}");
        assert!(second - Duration::from_secs(200) < interval, "SIM_SEED={seed}: {second:?}");
        assert_eq!(from.id, back.id, "SIM_SEED={seed}");
        let hop = &to.hops[usize::try_from(changed).unwrap()];
        assert_eq!(*hop, HopRouter::Single([10, 9, 9, 9].into()), "SIM_SEED={seed}");
    }
}

#[test]
fn changed_length_is_confirmed_by_the_destination_at_once() {
    for seed in seeds(100) {
        let mut random = Random::new(seed);
        let routers = u8::try_from(random.between(2, 16)).unwrap();
        let network = RouterNetwork::chain(routers, MS);
        let longer = RouterNetwork::chain(routers + 1, MS);
        let mut world = world(seed, network);
        world.changes.insert(100_000 * MS, longer);
        let mut reports = world.run(Duration::from_secs(101));
        // The next echo shows the number of routers.
        let finding = Finding::Routers { flow: 0, direction: Direction::Forward, routers: routers + 1 };
        world.tracer.observe(finding, TraceWorld::start() + Duration::from_secs(101));
        reports.extend(world.run(Duration::from_secs(1)));
        let [(at, RouteUpdate::Changed { to, .. }, Trigger::Length)] = route_events(&reports)[..] else {
            panic!("SIM_SEED={seed}: {:?}", route_events(&reports))
        };
        assert!(at < Duration::from_millis(101_500), "SIM_SEED={seed}: {at:?}");
        assert_eq!(to.routers, Some(routers + 1));
    }
}

#[test]
fn limited_routers_are_never_asked_faster_than_they_answer() {
    for seed in seeds(20) {
        let mut network = RouterNetwork::chain(8, 2 * MS);
        for segment in &mut network.segments {
            segment.routers[0].answers = Answers::Limited { per_second: 1.0, burst: 6.0 };
        }
        let tracer = Tracer::new(spec(seed, 16, ProbeLimits::default()), TraceWorld::start());
        let mut world = TraceWorld::new(tracer, network, seed);
        let reports = world.run(Duration::from_secs(600));
        let unanswered =
            reports.iter().filter(|(_, report)| matches!(report, TraceReport::Unanswered { .. }));
        assert_eq!(unanswered.count(), 0, "SIM_SEED={seed}");
        assert_eq!(route_events(&reports), [], "SIM_SEED={seed}");
        let hops: Vec<_> =
            world.tracer.routes(Direction::Forward).map(|route| route.unwrap().hops.clone()).collect();
        assert!(
            hops.iter().flatten().all(|hop| matches!(hop, HopRouter::Single(_))),
            "SIM_SEED={seed}: {hops:?}"
        );
    }
}

#[test]
fn silent_hop_delays_the_trace_by_its_timeout_only() {
    let mut network = RouterNetwork::chain(8, MS * 10 / 9);
    network.segments[3].routers[0].answers = Answers::None;
    let mut world = world(1, network);
    let reports = world.run(Duration::from_secs(1));
    let [trace] = traces(&reports)[..] else { panic!("one trace") };
    let (rtt, found) = (trace.rtt.unwrap(), trace.duration);
    assert!(found <= rtt + rtt.mul_f64(1.25) + Duration::from_millis(35), "{found:?}");
    assert_eq!((trace.hops[3].answers.len(), trace.hops.len()), (0, 8));
    let asked = world.sent().iter().filter(|packet| packet.ttl == 4);
    assert_eq!(asked.count(), 1, "the retries come later");
}

#[test]
fn dead_target_is_traced_in_less_than_a_second() {
    for routers in [0, 4, 16] {
        let mut network = RouterNetwork::chain(routers, MS);
        network.is_reachable = false;
        let mut world = world(1, network);
        let reports = world.run(Duration::from_secs(1));
        let [trace] = traces(&reports)[..] else { panic!("one trace") };
        assert!(trace.duration < Duration::from_secs(1), "{:?}", trace.duration);
        assert_eq!((trace.rtt, trace.routers, trace.hops.len()), (None, None, usize::from(routers)));
        assert_eq!(world.sent().iter().filter(|packet| packet.ttl != DESTINATION).count(), 30);
    }
}

/// Errors that quote other datagrams, with TTLs and routers that do not exist.
#[test]
fn forged_errors_are_counted_and_change_nothing() {
    for seed in seeds(100) {
        let mut random = Random::new(seed);
        let mut world = world(seed, RouterNetwork::chain(4, MS));
        let mut reports = world.run(Duration::from_secs(100));
        let before: Vec<_> = world.tracer.routes(Direction::Forward).map(Option::<&Route>::cloned).collect();
        world.tracer.trigger(None, Trigger::Request);
        reports.extend(world.run(Duration::from_millis(1)));
        let in_flight: Vec<u32> = world.sent().iter().rev().take(3).map(|packet| packet.sequence).collect();
        for _ in 0..200 {
            let length = usize::try_from(random.between(4, 140)).unwrap();
            let mut quoted: Vec<u8> = (0..length).map(|_| random.draw().to_le_bytes()[0]).collect();
            if random.chance(0.5) {
                // The sequence number of a probe in flight, with another T1.
                quoted[..4].copy_from_slice(&random.pick(&in_flight).to_be_bytes());
                quoted.resize(length.max(12), 0);
            }
            let kind = random.pick(&[IcmpKind::TtlExceeded, IcmpKind::Unreachable, IcmpKind::TooBig]);
            let router = [10, 66, 66, random.draw().to_le_bytes()[0]].into();
            let arrival = Arrival {
                at: TraceWorld::start() + Duration::from_secs(100),
                by: TimestampSource::Kernel,
                from: TraceWorld::responder_address(),
                to: None,
                flow: 0,
                ttl: Some(60),
                tos: None,
                icmp: Some(IcmpError { router, kind, code: 0, mtu: None, extensions_at: None }),
            };
            world.tracer.received(&quoted, &arrival);
        }
        reports.extend(world.run(Duration::from_secs(100)));
        let unmatched = reports.iter().filter(|(_, report)| matches!(report, TraceReport::Unmatched));
        assert_eq!(unmatched.count(), 200, "SIM_SEED={seed}");
        assert_eq!(route_events(&reports), [], "SIM_SEED={seed}");
        let after: Vec<_> = world.tracer.routes(Direction::Forward).map(Option::<&Route>::cloned).collect();
        assert_eq!(after, before, "SIM_SEED={seed}");
    }
}

#[test]
fn no_probe_has_a_ttl_above_the_limit_but_those_to_the_destination() {
    let spec = TraceSpec { hops_max: 5, ..spec(1, 1, unlimited()) };
    let tracer = Tracer::new(spec, TraceWorld::start());
    let mut world = TraceWorld::new(tracer, RouterNetwork::chain(9, MS), 1);
    let reports = world.run(Duration::from_secs(100));
    let ttls: BTreeSet<u8> = world.sent().iter().map(|packet| packet.ttl).collect();
    assert_eq!(ttls, BTreeSet::from([1, 2, 3, 4, 5, DESTINATION]));
    assert!(traces(&reports).iter().all(|trace| trace.rtt.is_some() && trace.routers == Some(9)));
}

#[test]
fn route_is_known_from_the_first_trace_that_is_answered() {
    let network = RouterNetwork::chain(4, MS);
    let mut dead = network.clone();
    dead.is_reachable = false;
    dead.segments.iter_mut().for_each(|segment| segment.routers[0].answers = Answers::None);
    let mut world = world(1, dead);
    let reports = world.run(Duration::from_secs(20));
    assert_eq!((traces(&reports).len(), traces(&reports)[1].route), (2, None));
    assert_eq!(world.tracer.routes(Direction::Forward).next(), Some(None));
    world.forward = network;
    // An echo shows the number of routers, so hops are probed one after the other.
    let finding = Finding::Routers { flow: 0, direction: Direction::Forward, routers: 4 };
    world.tracer.observe(finding, TraceWorld::start() + Duration::from_secs(20));
    let reports = world.run(Duration::from_secs(70));
    let route = world.tracer.routes(Direction::Forward).next().unwrap().expect("it is known");
    assert_eq!((route.hops.len(), route.routers), (4, Some(4)));
    assert!(route.hops.iter().all(|hop| matches!(hop, HopRouter::Single(_))));
    assert_eq!(traces(&reports).last().unwrap().route, Some(route.id));
}

#[test]
fn unreachable_destination_behind_a_silent_hop_is_traced_once_in_an_interval() {
    let mut network = RouterNetwork::chain(5, MS);
    network.segments[2].routers[0].answers = Answers::None;
    network.is_reachable = false;
    let mut world = world(5, network);
    let reports = world.run(Duration::from_secs(299));
    let traces = traces(&reports);
    let began: Vec<Duration> = traces.iter().map(|trace| trace.began.since(traces[0].began)).collect();
    // Until it has answered, two are earlier than the interval of 30 s.
    assert_eq!(began[..3], [0, 10, 30].map(Duration::from_secs));
    assert!((9..=11).contains(&began.len()), "{began:?}");
    assert!(began[2..].windows(2).all(|pair| pair[1] - pair[0] >= Duration::from_secs(30)), "{began:?}");
}

#[test]
fn every_hop_is_probed_in_each_interval_also_after_a_request() {
    let mut world = world(6, RouterNetwork::chain(5, MS));
    world.run(Duration::from_secs(100));
    world.tracer.trigger(None, Trigger::Request);
    world.run(Duration::from_secs(200));
    for ttl in 1..=5 {
        let times: Vec<u64> =
            world.sent().iter().filter(|sent| sent.ttl == ttl).map(|sent| sent.at).collect();
        let ends =
            [0].into_iter().chain(times.iter().copied()).zip(times.iter().copied().chain([300_000 * MS]));
        let longest = ends.map(|(from, to)| to - from).max().unwrap();
        // An interval, and the jitter of two probes.
        assert!(longest <= 33_000 * MS, "TTL {ttl} was not probed for {} s", longest / (1000 * MS));
    }
}

/// A world whose way back is `reverse`, and a tracer of both directions.
fn both_ways(seed: u64, forward: RouterNetwork, reverse: RouterNetwork) -> TraceWorld {
    let spec = TraceSpec { traces_reverse: true, ..spec(seed, 1, unlimited()) };
    let mut world = TraceWorld::new(Tracer::new(spec, TraceWorld::start()), forward, seed);
    world.reverse = reverse;
    world
}

/// A chain whose routers have addresses from 10.0.2.0 on.
fn way_back(routers: u8, delay: u64) -> RouterNetwork {
    let mut network = RouterNetwork::chain(routers, delay);
    for (segment, index) in network.segments.iter_mut().zip(0..) {
        segment.routers[0].address = [10, 0, 2, index].into();
    }
    network
}

#[test]
fn way_back_is_traced_without_being_taken_for_the_way_there() {
    for (there, back) in [(8, 5), (3, 16), (0, 4), (4, 0)] {
        let mut world = both_ways(3, RouterNetwork::chain(there, MS), way_back(back, 2 * MS));
        let reports = world.run(Duration::from_secs(1));
        let [forward] = traces(&reports)[..] else { panic!("one trace") };
        let [reverse] = traces(world.reverse_reports())[..] else { panic!("one trace back") };
        for (trace, network) in [(forward, &world.forward), (reverse, &world.reverse)] {
            let found: Vec<_> = trace.hops.iter().map(|hop| hop.answers[0].router).collect();
            let expected: Vec<_> = network.route(0).into_iter().flatten().collect();
            assert_eq!((found, trace.routers), (expected, u8::try_from(network.segments.len()).ok()));
            assert!(trace.hops.iter().all(|hop| hop.sent == 1));
        }
        let rtts = reverse.hops.iter().map(|hop| hop.answers[0].rtt);
        assert!(rtts.eq((1..=u64::from(back)).map(|hop| Duration::from_nanos(4 * hop * MS))), "{reverse:?}");
    }
}

#[test]
fn every_answer_on_the_way_back_is_a_router_of_it() {
    let (mut hops, mut found) = (0, 0);
    for seed in seeds(300) {
        let back = random_network(seed + 1_000);
        let truth = back.route(0);
        let mut world = both_ways(seed, RouterNetwork::chain(3, MS), back);
        world.reverse.is_reachable = true;
        world.reverse_loss = if seed % 3 == 0 { 0.1 } else { 0.0 };
        world.run(Duration::from_secs(300));
        let traces = traces(world.reverse_reports());
        assert!(!traces.is_empty(), "SIM_SEED={seed}");
        found += traces.iter().flat_map(|trace| &trace.hops).filter(|hop| !hop.answers.is_empty()).count();
        hops += traces.iter().map(|trace| trace.hops.len()).sum::<usize>();
        for trace in traces {
            assert_eq!(trace.routers.map(usize::from), Some(truth.len()), "SIM_SEED={seed}");
            for (hop, known) in trace.hops.iter().zip(&truth) {
                let segment = &world.reverse.segments[usize::from(hop.ttl) - 1].routers;
                for Answer { router, .. } in &hop.answers {
                    let is_known = match known {
                        Some(known) => known == router,
                        None => segment.iter().any(|known| known.address == *router),
                    };
                    assert!(is_known, "SIM_SEED={seed}, hop {}: {router}", hop.ttl);
                }
            }
        }
    }
    // A tenth of the routers is silent, a tenth answers every second probe, and a tenth one per second.
    assert!(found * 10 > hops * 7, "{found} of {hops} hops answered");
}

#[test]
fn every_probe_of_the_way_back_is_decided_once() {
    for seed in seeds(100) {
        let mut world = both_ways(seed, random_network(seed), random_network(seed + 1_000));
        (world.forward.is_reachable, world.reverse.is_reachable) = (true, true);
        world.reverse_loss = 0.05;
        let mut reports = world.run(Duration::from_secs(100));
        world.tracer.stop();
        reports.extend(world.run(Duration::from_secs(1)));
        let of = |reports: &[(Duration, TraceReport)], is: fn(&TraceReport) -> bool| {
            reports.iter().filter(|(_, report)| is(report)).count()
        };
        let is_sent = |report: &TraceReport| matches!(report, TraceReport::Sent { .. });
        let is_decided = |report: &TraceReport| {
            use TraceReport::{Answered, Unanswered, Withdrawn};
            matches!(report, Answered { .. } | Unanswered { .. } | Withdrawn)
        };
        let sent = [of(&reports, is_sent), of(world.reverse_reports(), is_sent)];
        let decided = [of(&reports, is_decided), of(world.reverse_reports(), is_decided)];
        assert_eq!(sent, decided, "SIM_SEED={seed}");
        assert_eq!(sent.iter().sum::<usize>(), world.sent().len(), "SIM_SEED={seed}");
        assert!(sent[1] > 0, "SIM_SEED={seed}");
    }
}

#[test]
fn changed_way_back_is_reported_within_an_interval_and_the_way_there_is_not() {
    for seed in seeds(50) {
        let mut random = Random::new(seed);
        let routers = u8::try_from(random.between(2, 12)).unwrap();
        let (network, changed) = (way_back(routers, MS), random.below(routers.into()));
        let mut other = network.clone();
        other.segments[usize::try_from(changed).unwrap()].routers[0].address = [10, 9, 9, 9].into();
        let mut world = both_ways(seed, RouterNetwork::chain(4, MS), network.clone());
        world.reverse_changes.insert(100_000 * MS, other);
        world.reverse_changes.insert(200_000 * MS, network);
        let reports = world.run(Duration::from_secs(300));
        assert_eq!(route_events(&reports), [], "SIM_SEED={seed}");
        let [
            (first, RouteUpdate::Changed { from, to }, Trigger::Router),
            (second, RouteUpdate::Restored { to: back, .. }, _),
        ] = route_events(world.reverse_reports())[..]
        else {
            panic!("SIM_SEED={seed}: {:?}", route_events(world.reverse_reports()))
        };
        // An interval, the jitter, and sixteen confirmations, of which the responder sends four in five
        // seconds.
        let within = Duration::from_secs(33 + 20);
        assert!(first - Duration::from_secs(100) < within, "SIM_SEED={seed}: {first:?}");
        assert!(second - Duration::from_secs(200) < within, "SIM_SEED={seed}: {second:?}");
        assert_eq!(from.id, back.id, "SIM_SEED={seed}");
        let hop = &to.hops[usize::try_from(changed).unwrap()];
        assert_eq!(*hop, HopRouter::Single([10, 9, 9, 9].into()), "SIM_SEED={seed}");
    }
}

/// The responder asks no router faster than it answers, whatever it is asked for, and says so.
#[test]
fn limited_routers_on_the_way_back_are_never_asked_faster_than_they_answer() {
    for seed in seeds(20) {
        let mut back = way_back(6, 2 * MS);
        for segment in &mut back.segments {
            segment.routers[0].answers = Answers::Limited { per_second: 1.0, burst: 6.0 };
        }
        let spec = TraceSpec { traces_reverse: true, ..spec(seed, 16, unlimited()) };
        let tracer = Tracer::new(spec, TraceWorld::start());
        let mut world = TraceWorld::new(tracer, RouterNetwork::chain(2, MS), seed);
        world.reverse = back;
        world.run(Duration::from_secs(600));
        let count = |is: fn(&TraceReport) -> bool| {
            world.reverse_reports().iter().filter(|(_, report)| is(report)).count()
        };
        assert_eq!(count(|report| matches!(report, TraceReport::Unanswered { .. })), 0, "SIM_SEED={seed}");
        assert!(count(|report| matches!(report, TraceReport::Deferred(_))) > 0, "SIM_SEED={seed}");
        let traces = traces(world.reverse_reports());
        let without_probe = traces.iter().flat_map(|trace| &trace.hops).filter(|hop| hop.sent == 0);
        let states: BTreeSet<bool> =
            without_probe.map(|hop| matches!(hop.state, HopState::NotProbed | HopState::Inherited)).collect();
        assert_eq!(states, BTreeSet::from([true]), "SIM_SEED={seed}");
        let hops: Vec<_> = world.tracer.routes(Direction::Reverse).map(|route| route.unwrap()).collect();
        assert!(
            hops.iter().flat_map(|route| &route.hops).all(|hop| matches!(hop, HopRouter::Single(_))),
            "SIM_SEED={seed}: {hops:?}"
        );
    }
}

/// A day without a change: packet-by-packet balancing, limited, lossy and silent routers on the way back.
#[test]
fn day_without_a_change_has_no_change_on_the_way_back() {
    for seed in seeds(5) {
        let spec = TraceSpec { traces_reverse: true, ..spec(seed, 1, ProbeLimits::default()) };
        let tracer = Tracer::new(spec, TraceWorld::start());
        let mut world = TraceWorld::new(tracer, RouterNetwork::chain(3, MS), seed);
        world.reverse = random_network(seed);
        world.reverse.is_reachable = true;
        world.reverse_loss = 0.05;
        world.run(Duration::from_secs(24 * 3600));
        for (at, update, _) in route_events(world.reverse_reports()) {
            let RouteUpdate::LoadBalanced { ttl, routers } = update else {
                panic!("SIM_SEED={seed} at {at:?}: {update:?}")
            };
            let segment = &world.reverse.segments[usize::from(*ttl) - 1];
            assert!(segment.balance == Balance::PerPacket && routers.len() > 1, "SIM_SEED={seed}");
        }
    }
}

/// Errors that quote too little of a reply, or another T3, are no answers.
#[test]
fn short_quotations_on_the_way_back_are_no_answers() {
    for (bytes, is_answered) in [(0, false), (4, false), (11, false), (12, true)] {
        let mut back = way_back(3, MS);
        back.segments[1].routers[0].quoted_bytes = bytes;
        let mut world = both_ways(1, RouterNetwork::chain(2, MS), back);
        world.run(Duration::from_secs(1));
        let [trace] = traces(world.reverse_reports())[..] else { panic!("one trace back") };
        let answered: Vec<bool> = trace.hops.iter().map(|hop| !hop.answers.is_empty()).collect();
        assert_eq!(answered, [true, is_answered, true], "{bytes} bytes");
    }
}

#[test]
fn reflector_that_drops_extensions_is_reached_with_the_third_trace_or_as_configured() {
    for (profile, first) in
        [(Profile::Detect, 2), (Profile::Stamp, usize::MAX), (Profile::Plain, 0), (Profile::TwampLight, 0)]
    {
        let quirks = Some(Quirks { profile, ..Quirks::default() });
        let spec = TraceSpec { quirks, traces_reverse: true, ..spec(1, 1, unlimited()) };
        let tracer = Tracer::new(spec, TraceWorld::start());
        let mut world = TraceWorld::new(tracer, RouterNetwork::chain(3, MS), 1);
        world.request_bytes_max = 44;
        let reports = world.run(Duration::from_secs(100));
        let reached = traces(&reports).iter().position(|trace| trace.rtt.is_some());
        assert_eq!(reached.unwrap_or(usize::MAX), first, "{profile:?}");
        let is_known = |trace: &&Trace| trace.routers == Some(3) && trace.hops.len() == 3;
        let behind = traces(&reports).into_iter().skip(first.min(2)).filter(is_known).count();
        assert!(behind > 0 || profile == Profile::Stamp, "{profile:?}");
        assert_eq!(traces(world.reverse_reports()), Vec::<&Trace>::new(), "{profile:?}");
    }
}

/// A probe of the way back that was lost on the way there is not a router that did not answer.
#[test]
fn loss_on_the_way_there_is_not_loss_on_the_way_back() {
    for seed in seeds(20) {
        let mut there = RouterNetwork::chain(3, MS);
        there.segments[1].routers[0].loss = 0.5;
        let mut world = both_ways(seed, there, way_back(4, MS));
        let reports = world.run(Duration::from_secs(3_600));
        let unanswered = world
            .reverse_reports()
            .iter()
            .filter(|(_, report)| matches!(report, TraceReport::Unanswered { ttl } if *ttl != DESTINATION));
        assert_eq!(unanswered.count(), 0, "SIM_SEED={seed}");
        let traces = traces(world.reverse_reports());
        assert!(traces.iter().all(|trace| trace.first_lossy_hop.is_none()), "SIM_SEED={seed}");
        let answered = traces.iter().flat_map(|trace| &trace.hops).filter(|hop| !hop.answers.is_empty());
        assert!(answered.count() > traces.len(), "SIM_SEED={seed}: most hops answer in spite of it");
        let forward = self::traces(&reports);
        let found = forward.iter().filter(|trace| trace.first_lossy_hop == Some(3)).count();
        let all = forward.len();
        assert!(found * 3 > all, "SIM_SEED={seed}: behind the router that drops, in {found} of {all} traces");
    }
}

/// Lost replies to fetches do not lose the answers.
#[test]
fn answers_on_the_way_back_survive_lost_fetches() {
    for seed in seeds(50) {
        let mut world = both_ways(seed, RouterNetwork::chain(2, MS), way_back(16, MS));
        world.reverse_loss = 0.1;
        world.run(Duration::from_secs(600));
        let traces = traces(world.reverse_reports());
        let hops = traces.iter().flat_map(|trace| &trace.hops).count();
        let answered = traces.iter().flat_map(|trace| &trace.hops).filter(|hop| !hop.answers.is_empty());
        // A tenth of the probes is lost before it reaches a router, and a hundredth of the answers twice.
        assert!(answered.count() * 100 > hops * 80, "SIM_SEED={seed}: {hops} hops");
    }
}

#[test]
fn target_that_is_down_for_an_hour_is_traced_all_the_time() {
    let quirks = Some(Quirks::default());
    let tracer = Tracer::new(TraceSpec { quirks, ..spec(1, 16, unlimited()) }, TraceWorld::start());
    let mut network = RouterNetwork::chain(2, MS);
    network.is_reachable = false;
    let mut world = TraceWorld::new(tracer, network, 1);
    let reports = world.run(Duration::from_secs(3_600));
    // One in an interval of 30 s, and one more at the beginning, after 10 s.
    assert_eq!(traces(&reports).len(), 16 * 121);
}

fn label(label: u32, is_bottom: bool) -> MplsLabel {
    MplsLabel { label, traffic_class: 0, is_bottom, ttl: 1 }
}

/// An extension structure with a label stack and the incoming interface 513.
fn labels(stack: &[MplsLabel]) -> Vec<u8> {
    let entries: Vec<u8> = stack.iter().flat_map(|label| label.to_bytes()).collect();
    IcmpExtensions::encode(&[(1, 1, &entries), (2, 8, &[0, 0, 2, 1])])
}

fn extensions_of(trace: &Trace, ttl: usize) -> Vec<Option<&AnswerExtensions>> {
    trace.hops[ttl - 1].answers.iter().map(|answer| answer.extensions.as_deref()).collect()
}

#[test]
fn labels_are_those_of_the_router_that_attached_them() {
    let stack = [label(16_004, false), label(24_015, true)];
    let mut network = RouterNetwork::chain(4, MS);
    network.segments[1].routers[0].extensions = labels(&stack);
    let mut damaged = labels(&stack);
    damaged[9] ^= 1;
    network.segments[2].routers[0].extensions = damaged;
    let mut world = world(3, network);
    let reports = world.run(Duration::from_secs(1));
    let [trace] = traces(&reports)[..] else { panic!("one trace") };
    let [Some(found)] = extensions_of(trace, 2)[..] else { panic!("{trace:?}") };
    assert_eq!(found.labels, stack);
    assert_eq!(found.interfaces.iter().filter_map(|found| found.index).collect::<Vec<_>>(), [513]);
    for ttl in [1, 3, 4] {
        assert_eq!(extensions_of(trace, ttl), [None], "hop {ttl}");
    }
    let known = trace.hops[1].responder.as_ref().unwrap();
    assert_eq!(known.extensions.as_deref(), Some(found));
}

#[test]
fn changed_label_is_no_changed_route() {
    let mut network = RouterNetwork::chain(4, MS);
    network.segments[1].routers[0].extensions = labels(&[label(16_004, true)]);
    let mut world = world(3, network.clone());
    network.segments[1].routers[0].extensions = labels(&[label(16_005, true)]);
    world.changes.insert(100_000 * MS, network);
    let reports = world.run(Duration::from_secs(300));
    assert_eq!(route_events(&reports), []);
    let traces = traces(&reports);
    let id = traces[0].route;
    assert!(id.is_some() && traces.iter().all(|trace| trace.route == id));
    let of = |trace: &Trace| extensions_of(trace, 2)[0].unwrap().labels[0].label;
    assert_eq!([traces[0], traces[traces.len() - 1]].map(of), [16_004, 16_005]);
}

/// Labels are shown also if the router quotes only the UDP header, which it pads with zeros.
#[test]
fn padding_is_no_quotation() {
    let mut network = RouterNetwork::chain(3, MS);
    let router = &mut network.segments[1].routers[0];
    (router.extensions, router.quoted_bytes) = (labels(&[label(16_004, true)]), 520);
    let mut world = world(3, network.clone());
    network.segments[1].routers[0].quoted_bytes = 0;
    world.changes.insert(10_000 * MS, network);
    let reports = world.run(Duration::from_secs(100));
    assert!(!reports.iter().any(|(_, report)| *report == TraceReport::Unmatched));
    let traces = traces(&reports);
    assert!(traces.len() > 3);
    for trace in traces {
        assert!(matches!(extensions_of(trace, 2)[..], [Some(_)]), "{trace:?}");
    }
}

/// The responder passes on addresses and RTTs only.
#[test]
fn way_back_has_no_labels() {
    let spec = TraceSpec { traces_reverse: true, ..spec(3, 1, unlimited()) };
    let mut network = RouterNetwork::chain(3, MS);
    network.segments.iter_mut().for_each(|segment| {
        segment.routers[0].extensions = labels(&[label(16_004, true)]);
    });
    let mut world = TraceWorld::new(Tracer::new(spec, TraceWorld::start()), network.clone(), 3);
    world.reverse = network;
    world.run(Duration::from_secs(5));
    let trace = traces(world.reverse_reports())[0].clone();
    assert_eq!(trace.hops.len(), 3);
    for ttl in 1..=3 {
        assert_eq!(extensions_of(&trace, ttl), [None], "hop {ttl}");
    }
}
