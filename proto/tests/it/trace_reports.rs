//! What tracers report besides traces and routes: destinations that do not answer, and rewritten TTLs.

use std::collections::BTreeSet;
use std::time::Duration;

use pathmeter_proto::echo::Quirks;
use pathmeter_proto::machine::Machine as _;
use pathmeter_proto::probe_budget::ProbeLimits;
use pathmeter_proto::sim::{Answers, Random, RouterNetwork, TraceWorld};
use pathmeter_proto::trace::{
    CLAMPED_FOR, DESTINATION, Direction, Finding, HopState, ReachabilityChange, TraceReport, TraceSpec,
    Tracer, Trigger, TtlRewriting,
};

use super::conservation::seeds;
use super::trace::{MS, random_network, route_events, spec, traces, unlimited, world};

type Reports = [(Duration, TraceReport)];

fn reachability(reports: &Reports) -> Vec<(Duration, &ReachabilityChange)> {
    let found = reports.iter().filter_map(|(at, report)| {
        let TraceReport::Reachability(change) = report else { return None };
        Some((*at, &**change))
    });
    found.collect()
}

fn clamps(reports: &Reports) -> Vec<(Duration, TtlRewriting)> {
    let found = reports.iter().filter_map(|(at, report)| {
        let TraceReport::TtlClamped { rewriting, .. } = report else { return None };
        Some((*at, *rewriting))
    });
    found.collect()
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// A chain of which the link behind the first `routers` routers is cut.
fn cut(network: &RouterNetwork, routers: usize) -> RouterNetwork {
    let mut cut = RouterNetwork { is_reachable: false, ..network.clone() };
    cut.segments.truncate(routers);
    cut
}

#[test]
fn destination_that_goes_away_and_returns_is_reported_once_each() {
    for seed in seeds(50) {
        let mut random = Random::new(seed);
        let routers = random.between(1, 12);
        let network = RouterNetwork::chain(u8::try_from(routers).unwrap(), MS);
        let left = usize::try_from(random.between(0, routers)).unwrap();
        let [gone, back] = [100_000, 300_000].map(|time| time + random.between(0, 30_000));
        let mut world = world(seed, network.clone());
        world.changes.insert(gone * MS, cut(&network, left));
        world.changes.insert(back * MS, network);
        let reports = world.run(seconds(600));
        let [(first, down), (second, up)] = reachability(&reports)[..] else {
            panic!("SIM_SEED={seed}: {:?}", reachability(&reports))
        };
        let [gone, back] = [gone, back].map(Duration::from_millis);
        // A round, ten seconds until the second trace, and the five that its probes may take.
        assert!(first > gone && first < gone + seconds(30 + 18), "SIM_SEED={seed}: {:?}", first - gone);
        assert!(second > back && second < back + seconds(11), "SIM_SEED={seed}: {:?}", second - back);
        assert_eq!((down.lasted, down.trigger), (None, Trigger::Unreached), "SIM_SEED={seed}");
        let since = down.since.since(TraceWorld::start());
        assert!(since > gone - seconds(1) && since < gone + seconds(31), "SIM_SEED={seed}: {since:?}");
        assert_eq!(up.since, down.since, "SIM_SEED={seed}");
        assert_eq!(up.lasted, Some(second - since), "SIM_SEED={seed}");
        let last = down.last_hop.map(|(ttl, _)| usize::from(ttl));
        assert_eq!(last, Some(left).filter(|left| *left > 0), "SIM_SEED={seed}");
        let route = down.route.as_ref().unwrap();
        assert_eq!(route.routers.map(u64::from), Some(routers), "SIM_SEED={seed}");
        assert_eq!(up.route.as_ref(), Some(route), "SIM_SEED={seed}");
        assert_eq!(route_events(&reports), [], "a missing answer is no change, SIM_SEED={seed}");
    }
}

#[test]
fn gap_of_less_than_ten_seconds_is_not_reported() {
    for seed in seeds(50) {
        let network = RouterNetwork::chain(3, MS);
        let mut world = world(seed, network.clone());
        let gone = Random::new(seed).between(100_000, 130_000);
        world.changes.insert(gone * MS, cut(&network, 1));
        world.changes.insert((gone + 9_900) * MS, network);
        let finding = Finding::Trigger { flow: None, trigger: Trigger::Loss };
        let mut reports = world.run(Duration::from_millis(gone + 300));
        world.tracer.observe(finding, TraceWorld::start() + Duration::from_millis(gone + 300));
        reports.extend(world.run(seconds(300)));
        assert_eq!(reachability(&reports), [], "SIM_SEED={seed}");
    }
}

#[test]
fn random_loss_of_up_to_30_percent_in_each_direction_is_not_reported_within_a_day() {
    for (seed, loss) in seeds(5).flat_map(|seed| [0.1, 0.2, 0.3].map(|loss| (seed, loss))) {
        let mut network = RouterNetwork::chain(4, MS);
        network.segments[1].routers[0].loss = loss;
        let mut world = world(seed, network);
        world.reverse_loss = loss;
        let reports = world.run(seconds(24 * 3_600));
        assert_eq!(reachability(&reports), [], "SIM_SEED={seed} {loss}");
        assert_eq!(clamps(&reports), [], "SIM_SEED={seed} {loss}");
        let unreached = traces(&reports).iter().filter(|trace| trace.rtt.is_none()).count();
        assert!(unreached > 100, "SIM_SEED={seed} {loss}: {unreached}");
    }
}

#[test]
fn peer_that_announced_its_leave_is_not_reported_until_it_has_answered_again() {
    for seed in seeds(20) {
        let network = RouterNetwork::chain(3, MS);
        let mut world = world(seed, network.clone());
        for (gone, back) in [(100, 300), (500, 700)] {
            world.changes.insert(gone * 1_000 * MS, cut(&network, 3));
            world.changes.insert(back * 1_000 * MS, network.clone());
        }
        let mut reports = world.run(seconds(100));
        world.tracer.peer_leaving(TraceWorld::start() + seconds(100));
        reports.extend(world.run(seconds(390)));
        assert_eq!(reachability(&reports), [], "SIM_SEED={seed}");
        let reports = world.run(seconds(400));
        assert_eq!(reachability(&reports).len(), 2, "it did not announce the second, SIM_SEED={seed}");
    }
}

#[test]
fn destination_that_is_away_is_asked_no_more_than_ten_times_a_minute() {
    let network = RouterNetwork::chain(3, MS);
    let mut world = world(1, network.clone());
    world.changes.insert(100_000 * MS, cut(&network, 1));
    world.run(seconds(3_600));
    let late = world.sent().iter().filter(|packet| packet.at > 200_000 * MS && packet.ttl == DESTINATION);
    let count = late.count();
    assert!((300..600).contains(&count), "{count} in 3,400 s");
}

/// Otherwise a short gap would look like a path that loses much.
#[test]
fn checks_do_not_count_as_the_usual_loss() {
    let mut network = RouterNetwork::chain(2, MS);
    network.segments[1].routers[0].answers = Answers::Share(0.4);
    let mut world = world(1, network.clone());
    world.run(seconds(3_000));
    let asked = world.sent().iter().rfind(|packet| packet.ttl == DESTINATION).unwrap().at;
    // The next round asks about 30 s later.
    world.changes.insert(asked + 20_000 * MS, cut(&network, 2));
    world.changes.insert(asked + 36_000 * MS, network.clone());
    let reports = world.run(seconds(90));
    let found = traces(&reports).into_iter().map(|trace| (trace.rtt.is_some(), trace.hops[1].state));
    assert!(found.clone().any(|(is_reached, _)| !is_reached), "{:?}", found.collect::<Vec<_>>());
    assert!(
        found.clone().all(|(_, state)| state == HopState::RateLimited),
        "{:?}",
        found.collect::<Vec<_>>()
    );
    let checks = world.sent().iter().filter(|packet| packet.ttl == DESTINATION && packet.at > asked);
    assert!(checks.count() > 5);
}

/// Extensions are tried again from time to time. That a reflector drops them is not that it is away.
#[test]
fn reflector_that_drops_extensions_is_not_reported() {
    let quirks = Some(Quirks::default());
    let tracer = Tracer::new(TraceSpec { quirks, ..spec(1, 1, unlimited()) }, TraceWorld::start());
    let mut world = TraceWorld::new(tracer, RouterNetwork::chain(3, MS), 1);
    world.request_bytes_max = 44;
    let reports = world.run(seconds(4 * 3_600));
    assert_eq!(reachability(&reports), []);
    assert!(traces(&reports).iter().filter(|trace| trace.rtt.is_none()).count() > 20, "they are tried again");
}

/// The TTLs of limited probes that were sent in a span of time.
fn limited(world: &TraceWorld, from: Duration, until: Duration) -> BTreeSet<u8> {
    let within = world.sent().iter().filter(|packet| {
        let at = Duration::from_nanos(packet.at);
        packet.ttl != DESTINATION && at >= from && at < until
    });
    within.map(|packet| packet.ttl).collect()
}

/// A chain in which one router sets the TTL.
fn clamped(routers: u8, index: usize, ttl: u8) -> RouterNetwork {
    let mut network = RouterNetwork::chain(routers, MS);
    network.segments[index].routers[0].sets_ttl = Some(ttl);
    network
}

#[test]
fn raised_and_lowered_ttls_are_found_with_the_first_trace_and_reported_once() {
    let ends = |last: u8| TtlRewriting::Lowered { router: Some([10, 0, 1, last].into()) };
    for (network, expected) in [
        (clamped(8, 0, 64), TtlRewriting::Raised),
        (clamped(8, 3, 128), TtlRewriting::Raised),
        (clamped(3, 0, 4), TtlRewriting::Lowered { router: None }),
        (clamped(8, 0, 4), ends(4)),
        (clamped(8, 4, 1), ends(5)),
    ] {
        for seed in seeds(10) {
            let mut world = world(seed, network.clone());
            let reports = world.run(seconds(3_600));
            let [(at, found)] = clamps(&reports)[..] else {
                panic!("SIM_SEED={seed} {expected:?}: {:?}", clamps(&reports))
            };
            assert_eq!(found, expected, "SIM_SEED={seed}");
            assert!(at < seconds(2), "SIM_SEED={seed}: {at:?}");
            for trace in traces(&reports) {
                assert!(trace.is_ttl_clamped, "SIM_SEED={seed} {expected:?}");
                assert_eq!((trace.routers, trace.hops.len()), (None, 0), "SIM_SEED={seed} {expected:?}");
            }
            assert!(traces(&reports).len() > 100, "it is still traced, SIM_SEED={seed}");
            assert_eq!(limited(&world, at, seconds(3_600)), BTreeSet::new(), "SIM_SEED={seed}");
            let route = world.tracer.routes(Direction::Forward).next().unwrap();
            assert_eq!(route.and_then(|route| route.routers), None, "SIM_SEED={seed}");
        }
    }
}

#[test]
fn rewriting_that_begins_later_is_found_and_the_length_is_forgotten() {
    let ends = |last: u8| TtlRewriting::Lowered { router: Some([10, 0, 1, last].into()) };
    for (routers, index, ttl, expected) in [
        (4, 1, 64, TtlRewriting::Raised),
        (4, 1, 3, TtlRewriting::Lowered { router: None }),
        (6, 1, 2, ends(3)),
        // Only the last router answers, with one TTL of the known ones.
        (2, 0, 1, ends(1)),
    ] {
        for seed in seeds(20) {
            let mut world = world(seed, RouterNetwork::chain(routers, MS));
            world.changes.insert(100_000 * MS, clamped(routers, index, ttl));
            let reports = world.run(seconds(300));
            let [(at, found)] = clamps(&reports)[..] else {
                panic!("SIM_SEED={seed} {ttl}: {:?}", clamps(&reports))
            };
            assert_eq!(found, expected, "SIM_SEED={seed}");
            assert!(at > seconds(100) && at < seconds(150), "SIM_SEED={seed}: {at:?}");
            assert_eq!(route_events(&reports), [], "SIM_SEED={seed} {ttl}");
            let latest = traces(&reports).last().copied().unwrap();
            assert_eq!((latest.is_ttl_clamped, latest.routers), (true, None), "SIM_SEED={seed}");
            let route = world.tracer.routes(Direction::Forward).next().unwrap().unwrap();
            assert_eq!((route.routers, route.hops.len()), (None, routers.into()), "SIM_SEED={seed}");
        }
    }
}

#[test]
fn limited_probes_resume_after_a_day_and_what_is_still_there_is_not_reported_again() {
    for is_gone in [false, true] {
        let mut world = world(1, clamped(4, 0, 64));
        if is_gone {
            world.changes.insert(50_000_000 * MS, RouterNetwork::chain(4, MS));
        }
        let mut reports = world.run(CLAMPED_FOR);
        assert_eq!(limited(&world, seconds(1), CLAMPED_FOR), BTreeSet::new());
        reports.extend(world.run(seconds(300)));
        assert_eq!(clamps(&reports).len(), 1, "{is_gone}");
        let resumed = limited(&world, CLAMPED_FOR, CLAMPED_FOR + seconds(300));
        assert!(resumed.is_superset(&BTreeSet::from([1, 2])), "{is_gone}: {resumed:?}");
        let latest = traces(&reports).last().copied().unwrap();
        let expected = if is_gone { (false, Some(4), 4) } else { (true, None, 0) };
        assert_eq!((latest.is_ttl_clamped, latest.routers, latest.hops.len()), expected);
        let later = limited(&world, CLAMPED_FOR + seconds(60), CLAMPED_FOR + seconds(300));
        assert_eq!(later.is_empty(), !is_gone, "{later:?}");
    }
}

#[test]
fn way_back_whose_ttls_are_raised_is_found_alone() {
    let spec = TraceSpec { traces_reverse: true, ..spec(1, 1, unlimited()) };
    let tracer = Tracer::new(spec, TraceWorld::start());
    let mut world = TraceWorld::new(tracer, RouterNetwork::chain(3, MS), 1);
    world.reverse = clamped(5, 1, 64);
    let reports = world.run(seconds(600));
    assert_eq!(clamps(&reports), []);
    assert_eq!(clamps(world.reverse_reports()).len(), 1);
    let latest = traces(world.reverse_reports()).last().copied().unwrap();
    assert_eq!((latest.is_ttl_clamped, latest.routers), (true, None));
    assert_eq!(traces(&reports).last().unwrap().routers, Some(3));
}

/// Sixteen flows share the probes that routers answer, so that many are sent later.
#[test]
fn limits_of_the_routers_do_not_hide_what_each_flow_shows() {
    for (network, expected) in [
        (clamped(6, 1, 64), 16..=16),
        (clamped(3, 0, 3), 16..=16),
        // One router answers all probes of all flows: two answers in a row for each take long.
        (clamped(6, 0, 4), 2..=16),
        (RouterNetwork::chain(6, MS), 0..=0),
    ] {
        let tracer = Tracer::new(spec(1, 16, ProbeLimits::default()), TraceWorld::start());
        let mut world = TraceWorld::new(tracer, network.clone(), 1);
        world.changes.insert(600_000 * MS, cut(&network, 1));
        let reports = world.run(seconds(900));
        let clamped = reports.iter().filter_map(|(_, report)| {
            let TraceReport::TtlClamped { flow, .. } = report else { return None };
            Some(*flow)
        });
        let (clamped, count) = (clamped.collect::<BTreeSet<u8>>(), clamps(&reports).len());
        assert_eq!(clamped.len(), count, "once for each flow");
        assert!(expected.contains(&count), "{count}, {network:?}");
        let changes = reachability(&reports);
        let unreachable: BTreeSet<u8> = changes.iter().map(|(_, change)| change.flow).collect();
        assert_eq!(unreachable.len(), changes.len(), "once for each flow");
        let has_answered = traces(&reports).iter().any(|trace| trace.rtt.is_some());
        assert_eq!(unreachable.len(), if has_answered { 16 } else { 0 }, "{network:?}");
    }
}

/// Balanced packet by packet, limited and silent routers, in both directions.
#[test]
fn day_without_a_fault_has_no_report() {
    for seed in seeds(10) {
        let spec = TraceSpec { traces_reverse: true, ..spec(seed, 2, ProbeLimits::default()) };
        let tracer = Tracer::new(spec, TraceWorld::start());
        let mut world = TraceWorld::new(tracer, random_network(seed), seed);
        world.reverse = random_network(seed + 1_000);
        (world.forward.is_reachable, world.reverse.is_reachable) = (true, true);
        world.reverse_loss = 0.05;
        let reports = world.run(seconds(24 * 3_600));
        for reports in [&reports[..], world.reverse_reports()] {
            assert_eq!((clamps(reports), reachability(reports)), (vec![], vec![]), "SIM_SEED={seed}");
        }
    }
}

/// Packets that go around between routers, of which some do not answer, until their TTL ends.
#[test]
fn routing_loop_is_no_clamp() {
    for seed in seeds(50) {
        let mut random = Random::new(seed);
        let length = usize::try_from(random.between(2, 4)).unwrap();
        let first = usize::try_from(random.between(0, 4)).unwrap();
        let mut network = RouterNetwork::chain(255, MS / 10);
        for index in first + length..255 {
            network.segments[index] = network.segments[index - length].clone();
        }
        let silent = (0..length).filter(|_| random.chance(0.4)).collect::<BTreeSet<usize>>();
        for index in first..255 {
            if silent.contains(&((index - first) % length)) {
                network.segments[index].routers[0].answers = Answers::None;
            }
        }
        let mut world = world(seed, RouterNetwork::chain(6, MS));
        world.changes.insert(100_000 * MS, network);
        let reports = world.run(seconds(600));
        assert_eq!(clamps(&reports), [], "SIM_SEED={seed}: {length} from {first}, silent: {silent:?}");
        assert_eq!(reachability(&reports).len(), 1, "SIM_SEED={seed}");
        let route = world.tracer.routes(Direction::Forward).next().unwrap().unwrap();
        assert_eq!(route.hops.len(), 6, "hops behind the known length are not learned, SIM_SEED={seed}");
    }
}

#[test]
fn ttls_that_another_reflector_than_an_agent_reports_are_no_evidence() {
    let quirks = Some(Quirks::default());
    let tracer = Tracer::new(TraceSpec { quirks, ..spec(1, 1, unlimited()) }, TraceWorld::start());
    let mut world = TraceWorld::new(tracer, clamped(8, 0, 64), 1);
    assert_eq!(clamps(&world.run(seconds(600))), []);
}

#[test]
fn changes_of_the_route_while_it_is_traced_are_no_evidence() {
    for seed in seeds(200) {
        let mut random = Random::new(seed);
        let mut lengths = || u8::try_from(random.between(1, 25)).unwrap();
        let mut world = world(seed, RouterNetwork::chain(lengths(), 10 * MS));
        // A route of another length every 700 ms, during many bursts.
        for change in 1..400 {
            world.changes.insert(change * 700 * MS, RouterNetwork::chain(lengths(), 10 * MS));
        }
        let mut reports = Vec::new();
        for _ in 0..100 {
            world.tracer.trigger(None, Trigger::Request);
            reports.extend(world.run(Duration::from_millis(2_310)));
        }
        assert_eq!(clamps(&reports), [], "SIM_SEED={seed}");
        assert_eq!(reachability(&reports), [], "SIM_SEED={seed}");
    }
}
