//! Thousands of simulated worlds; in each, all counts must equal those of the ledger.

use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::admission::Policy;
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{Direction, EchoSpec, Prober, Quirks, StampResponder, Verdict, WireFormat};
use pathmeter_proto::key::Keys;
use pathmeter_proto::machine::{IcmpKind, Machine as _, TimestampSource};
use pathmeter_proto::sim::{Corruption, Counts, Jitter, Ledger, Link, Loss, Queue, Random, World};
use pathmeter_proto::time::nanos;

pub(super) const MS: u64 = 1_000_000;
pub(super) const LATE_AFTER: Duration = Duration::from_millis(1_000);
pub(super) const LOST_AFTER: Duration = Duration::from_millis(3_000);

pub(super) fn spec(seed: u64, interval: u64, flows: u16, count: u64) -> EchoSpec {
    EchoSpec {
        to: World::responder_address(),
        wire: WireFormat::Stamp { keys: None, quirks: Quirks::default() },
        interval: Duration::from_nanos(interval),
        ssids: (1..=flows).collect(),
        size: None,
        dscp: Dscp::DEFAULT,
        late_after: LATE_AFTER,
        lost_after: LOST_AFTER,
        tx_timestamps: true,
        count: Some(count),
        seed,
    }
}

pub(super) fn responder(keys: Option<Arc<Keys>>) -> StampResponder {
    let policy =
        Policy { open: keys.is_none(), rate: 1_000_000, rate_per_source: 1_000_000, ..Policy::default() };
    StampResponder::new(policy, keys, 64)
}

fn measure(world: World, spec: EchoSpec) -> (Counts, Ledger) {
    let keys = match &spec.wire {
        WireFormat::Stamp { keys, .. } => keys.clone(),
        WireFormat::Icmp => None,
    };
    let mut responder = responder(keys);
    let horizon = horizon(&spec);
    let mut prober = Prober::new(spec, world.start());
    let (counts, mut ledger) = world.run(&mut prober, &mut responder, 600_000 * MS);
    assert_eq!(prober.in_flight(), 0);
    (ledger.horizon, ledger.is_reported) = (horizon, true);
    (counts, ledger)
}

/// The minimum time between a datagram and the request of a report that counts against it: a quarter of
/// `late_after`, or half of what a report covers.
pub(super) fn horizon(spec: &EchoSpec) -> Duration {
    (spec.late_after / 4).min(spec.interval * 64 * spec.ssids.len() as u32)
}

/// A link with random impairments.
fn impaired_link(random: &mut Random) -> Link {
    let mut link = Link::perfect(random.between(0, 80 * MS));
    link.jitter = match random.below(4) {
        0 => Jitter::Normal { deviation: 10 * MS },
        1 => Jitter::Pareto { scale: 5 * MS, shape: 1.5 },
        _ => Jitter::Uniform(random.pick(&[0, MS, 30 * MS, 150 * MS])),
    };
    link.keeps_order = random.chance(0.25);
    link.held = random.pick(&[(0.0, 0), (0.1, 100 * MS)]);
    link.queue = random.pick(&[None, None, Some(Queue { rate: 200_000, burst: 500, room: 4_000 })]);
    link.loss = match random.below(5) {
        0 => Loss::Random(0.0),
        1 => Loss::Random(random.fraction() * 0.3),
        2 => Loss::gilbert(0.02, 0.2),
        3 => Loss::Every(7),
        _ => {
            let from = random.between(0, 5_000 * MS);
            Loss::Blackout { from, to: from + random.between(0, 5_000 * MS) }
        }
    };
    link.duplicates = random.pick(&[0.0, 0.05]);
    link
}

/// A world with random impairments, and the parameters of its measurement.
pub(super) fn impaired_world(seed: u64) -> (World, EchoSpec) {
    let mut random = Random::new(seed);
    let mut world = World::new(seed);
    world.forward = impaired_link(&mut random);
    world.reverse = impaired_link(&mut random);
    world.prober_host.timestamps_lost = random.pick(&[0.0, 0.1]);
    world.prober_host.timestamps_late = random.pick(&[3 * MS, 3 * MS, 150 * MS]);
    world.prober_host.refuses = random.pick(&[0.0, 0.05]);
    world.prober_host.scheduling.latency = random.pick(&[0, 200_000, 20 * MS]);
    let interval = random.pick(&[5 * MS, 20 * MS, 100 * MS, 1_000 * MS]);
    let flows = random.pick(&[1, 1, 4, 16]);
    let count = random.between(20, 150);
    (world, spec(seed, interval, flows, count))
}

/// Whether a single world is replayed. Statements about many worlds are then not checked.
pub(super) fn is_replay() -> bool {
    std::env::var_os("SIM_SEED").is_some()
}

/// Factor for the number of worlds: `SIM_TIMES`, or 1.
fn times() -> f64 {
    let times = std::env::var("SIM_TIMES").ok().and_then(|text| text.parse::<f64>().ok());
    times.unwrap_or(1.0).max(0.0)
}

/// `count` times the factor `SIM_TIMES`.
pub(super) fn scaled(count: u64) -> u64 {
    #[expect(clippy::cast_sign_loss, reason = "neither factor is negative")]
    let scaled = (count as f64 * times()).ceil() as u64;
    scaled
}

/// Seeds to try: `SIM_SEED=n` replays one, `SIM_TIMES=x` multiplies their number.
pub(super) fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let seed = std::env::var("SIM_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    match seed {
        Some(seed) => seed..seed + 1,
        None => 0..scaled(count),
    }
}

#[test]
fn counts_and_round_trips_equal_the_truth_on_steady_clocks() {
    let (mut lost, mut unknown) = (0, 0);
    for seed in seeds(3_000) {
        let (world, spec) = impaired_world(seed);
        let count = spec.count.unwrap();
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(counts.sent + counts.unsent + counts.send_errors, count, "SIM_SEED={seed}: slots");
        lost += counts.lost();
        unknown += counts.count(|verdict| verdict == Verdict::Lost(Direction::Unknown));
    }
    assert!(is_replay() || lost > scaled(10_000), "{lost} datagrams were lost");
    assert!(is_replay() || unknown * 2 < lost, "most losses have a direction: {unknown} of {lost} have none");
}

#[test]
fn corrupted_authenticated_datagrams_are_lost_in_the_right_direction() {
    let keys = Arc::new(Keys::parse("0123456789abcdef").unwrap());
    let mut corrupted = 0;
    for seed in seeds(500) {
        let (mut world, spec) = impaired_world(seed);
        world.forward.corruption = (0.05, Corruption::Undetected);
        world.reverse.corruption = (0.05, Corruption::Undetected);
        let spec = EchoSpec {
            wire: WireFormat::Stamp { keys: Some(keys.clone()), quirks: Quirks::default() },
            ..spec
        };
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(counts.mismatched, ledger.corrupted_replies, "SIM_SEED={seed}");
        corrupted += counts.mismatched;
    }
    assert!(is_replay() || corrupted > scaled(500), "{corrupted} replies were corrupted");
}

#[test]
fn wall_clock_steps_change_no_verdict_and_no_round_trip() {
    for seed in seeds(1_000) {
        let (mut world, spec) = impaired_world(seed);
        let mut random = Random::new(!seed);
        world.prober_host.scheduling.latency = 200_000;
        for clock in [&mut world.prober_host.clock, &mut world.responder_host.clock] {
            let mut at = 0;
            for _ in 0..random.below(5) {
                at += random.between(500 * MS, 3_000 * MS);
                let by = i64::try_from(random.between(100 * MS, 3_600_000 * MS)).unwrap();
                clock.steps.push((at, if random.chance(0.5) { by } else { -by }));
            }
        }
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(counts.turnaround_invalid, 0, "SIM_SEED={seed}");
    }
}

#[test]
fn error_of_a_small_clock_step_is_at_most_the_step() {
    let step = 3 * MS;
    for seed in seeds(300) {
        let (mut world, spec) = impaired_world(seed);
        let mut random = Random::new(!seed);
        for clock in [&mut world.prober_host.clock, &mut world.responder_host.clock] {
            let at = random.between(100 * MS, 5_000 * MS);
            clock.steps.push((at, i64::try_from(random.between(0, step)).unwrap()));
        }
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 2 * step);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
    }
}

#[test]
fn error_of_skewed_clocks_is_at_most_the_skew() {
    let mut decided = 0;
    for seed in seeds(500) {
        let (mut world, spec) = impaired_world(seed);
        let mut random = Random::new(!seed);
        world.prober_host.clock.skew_ppm = i64::try_from(random.below(1_001)).unwrap() - 500;
        world.responder_host.clock.skew_ppm = i64::try_from(random.below(1_001)).unwrap() - 500;
        let stall = random.between(0, 5_000 * MS);
        world.responder_host.scheduling.stalls = vec![(stall, stall + 1_500 * MS)];
        let [here, there] =
            [&world.prober_host, &world.responder_host].map(|host| host.clock.skew_ppm.unsigned_abs());
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 2).and_then(|()| {
            // The measurement of each clock, with the error of its own skew, and the rounding of four
            // readings.
            ledger.compare_with_true_time(&counts, |elapsed, turnaround| {
                nanos(elapsed) * here / 1_000_000 + nanos(turnaround) * there / 1_000_000 + 4
            })
        });
        decided += outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
    }
    assert!(is_replay() || decided > scaled(10_000), "{decided} round trips were compared");
}

#[test]
fn stalled_prober_loses_no_answer() {
    for seed in seeds(500) {
        let (mut world, spec) = impaired_world(seed);
        let mut random = Random::new(!seed);
        let from = random.between(0, 2_000 * MS);
        world.prober_host.scheduling.stalls = vec![(from, from + random.between(500 * MS, 10_000 * MS))];
        let count = spec.count.unwrap();
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(counts.sent + counts.unsent + counts.send_errors, count, "SIM_SEED={seed}: slots");
    }
}

#[test]
fn stalled_responder_increases_turnaround_and_not_rtt() {
    let mut slow = 0;
    for seed in seeds(200) {
        let mut world = World::new(seed);
        world.responder_host.scheduling.stalls = vec![(1_000 * MS, 3_000 * MS)];
        let (counts, ledger) = measure(world, spec(seed, 50 * MS, 1, 100));
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(counts.count(|verdict| verdict == Verdict::Ok), counts.sent, "SIM_SEED={seed}");
        for (verdict, sample) in counts.verdicts.values() {
            let sample = sample.unwrap();
            assert!(nanos(sample.rtt) < 21 * MS, "SIM_SEED={seed}: {verdict:?} {sample:?}");
            slow += u64::from(nanos(sample.turnaround) > 500 * MS);
        }
    }
    assert!(is_replay() || slow > scaled(1_000), "{slow} replies waited in the stalled responder");
}

#[test]
fn drops_of_the_probers_host_are_not_network_loss() {
    let mut dropped = 0;
    for seed in seeds(300) {
        let mut world = World::new(seed);
        world.prober_host.queue = 8;
        (world.forward, world.reverse) = (Link::perfect(200 * MS), Link::perfect(200 * MS));
        world.prober_host.scheduling.stalls = vec![(1_000 * MS, 1_400 * MS), (2_500 * MS, 2_900 * MS)];
        let (counts, ledger) = measure(world, spec(seed, 10 * MS, 1, 400));
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        let blamed = counts.count(|verdict| verdict == Verdict::HostDropped);
        assert_eq!(blamed, ledger.dropped_at_prober, "SIM_SEED={seed}");
        assert_eq!(counts.lost(), 0, "SIM_SEED={seed}");
        dropped += blamed;
    }
    assert!(is_replay() || dropped > scaled(1_000), "{dropped} replies were dropped");
}

#[test]
fn drops_of_the_responders_host_are_not_network_loss() {
    let mut dropped = 0;
    for seed in seeds(300) {
        let mut world = World::new(seed);
        world.responder_host.queue = 8;
        world.responder_host.scheduling.stalls = vec![(1_000 * MS, 1_400 * MS)];
        let (counts, ledger) = measure(world, spec(seed, 10 * MS, 1, 400));
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        dropped += counts.count(|verdict| verdict == Verdict::HostDropped);
        assert_eq!(counts.lost(), 0, "SIM_SEED={seed}");
    }
    assert!(is_replay() || dropped > scaled(1_000), "{dropped} requests were dropped");
}

#[test]
fn host_drops_excuse_no_more_losses_than_drops_with_many_flows() {
    let (mut dropped, mut blamed, mut lost) = (0, 0, 0);
    for seed in seeds(200) {
        let mut world = World::new(seed);
        world.responder_host.queue = 4;
        world.responder_host.scheduling.stalls = vec![(1_000 * MS, 1_200 * MS), (2_000 * MS, 2_050 * MS)];
        (world.forward, world.reverse) = (Link::perfect(50 * MS), Link::perfect(50 * MS));
        world.forward.loss = Loss::Random(0.2);
        world.reverse.loss = Loss::Random(0.2);
        let (counts, ledger) = measure(world, spec(seed, 10 * MS, 16, 400));
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        dropped += ledger.dropped_at_responder;
        blamed += counts.count(|verdict| verdict == Verdict::HostDropped);
        lost += counts.lost();
    }
    assert!(
        is_replay() || dropped > scaled(1_000) && blamed > scaled(1_000),
        "{dropped} dropped, {blamed} blamed"
    );
    assert!(is_replay() || lost > scaled(5_000), "{lost} lost in the network");
}

#[test]
fn nearly_all_losses_have_a_direction_at_one_percent_loss() {
    let (mut forward, mut reverse, mut unknown) = (0, 0, 0);
    for seed in seeds(100) {
        let mut world = World::new(seed);
        world.forward.loss = Loss::Random(0.01);
        world.reverse.loss = Loss::Random(0.01);
        let (counts, ledger) = measure(world, spec(seed, 100 * MS, 1, 1_000));
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        forward += counts.count(|verdict| verdict == Verdict::Lost(Direction::Forward));
        reverse += counts.count(|verdict| verdict == Verdict::Lost(Direction::Reverse));
        unknown += counts.count(|verdict| verdict == Verdict::Lost(Direction::Unknown));
    }
    assert!(
        is_replay() || forward > scaled(900) && reverse > scaled(900),
        "{forward} forward, {reverse} in reverse"
    );
    assert!(is_replay() || unknown * 100 < forward + reverse, "{unknown} without a direction");
}

#[test]
fn reply_waits_up_to_100_ms_for_its_transmit_timestamp() {
    let (mut kernel, mut user) = (0, 0);
    for seed in seeds(300) {
        let (mut world, mut spec) = impaired_world(seed);
        world.prober_host.timestamps_late = 200 * MS;
        world.prober_host.scheduling.latency = 200_000;
        let mut lost_after = LOST_AFTER;
        if seed % 3 == 0 {
            // Replies arrive up to 80 ms before the deadline of their datagram.
            lost_after = Duration::from_millis(120);
            let delay = Random::new(!seed).between(20 * MS, 55 * MS);
            (world.forward, world.reverse) = (Link::perfect(delay), Link::perfect(delay));
            (spec.late_after, spec.lost_after) = (lost_after, lost_after);
        }
        let late_after = spec.late_after;
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, late_after, lost_after, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        for sample in counts.verdicts.values().filter_map(|(_, sample)| *sample) {
            match sample.transmit {
                TimestampSource::Kernel => kernel += 1,
                TimestampSource::User => user += 1,
            }
        }
    }
    assert!(is_replay() || kernel > scaled(3_000), "{kernel} by the kernel's timestamp");
    assert!(is_replay() || user > scaled(1_000), "{user} without");
}

#[test]
fn verdicts_are_on_time_with_wake_ups_only_at_deadlines() {
    let latency = Duration::from_micros(200);
    let mut decided = 0;
    for seed in seeds(500) {
        let (mut world, spec) = impaired_world(seed);
        world.prober_host.timestamps_late = Random::new(!seed).pick(&[3 * MS, 200 * MS]);
        // It reads replies only when a datagram or a verdict is due.
        (world.prober_host.scheduling.latency, world.prober_host.scheduling.tick) =
            (nanos(latency), u64::MAX / 2);
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        let outcome = outcome.and_then(|()| ledger.compare_times(&counts, LOST_AFTER, latency));
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        decided += counts.verdicts.len() as u64;
    }
    assert!(is_replay() || decided > scaled(10_000), "{decided} were decided");
}

#[test]
fn report_horizon_is_half_its_range_at_short_intervals() {
    let mut lost = 0;
    for seed in seeds(200) {
        let (world, spec) = impaired_world(seed);
        let spec = EchoSpec { interval: Duration::from_millis(1), count: Some(400), ..spec };
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        lost += counts.lost();
    }
    assert!(is_replay() || lost > scaled(5_000), "{lost} datagrams were lost");
}

#[test]
fn datagram_dropped_by_a_router_with_an_error_is_lost_forward() {
    for kind in [IcmpKind::Unreachable, IcmpKind::Prohibited, IcmpKind::TooBig, IcmpKind::TtlExceeded] {
        let mut lost = 0;
        for seed in seeds(50) {
            let (mut world, mut spec) = impaired_world(seed);
            (world.prober_host.timestamps_lost, world.prober_host.timestamps_late) = (0.0, 3 * MS);
            world.forward.loss = Loss::Random(Random::new(!seed).pick(&[0.2, 1.0]));
            world.icmp_errors = (1.0, kind);
            if seed % 2 == 0 {
                spec.wire = WireFormat::Stamp {
                    keys: Some(Arc::new(Keys::parse("0123456789abcdef").unwrap())),
                    quirks: Quirks::default(),
                };
            }
            let is_silent = world.forward.loss == Loss::Random(1.0);
            let (counts, ledger) = measure(world, spec);
            let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
            outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}, {kind:?}: {difference}"));
            let forward = counts.count(|verdict| verdict == Verdict::Lost(Direction::Forward));
            if is_silent {
                assert_eq!(
                    (forward, counts.icmp_errors),
                    (counts.sent, counts.sent),
                    "SIM_SEED={seed}, {kind:?}"
                );
            }
            lost += forward;
        }
        assert!(is_replay() || lost > scaled(1_000), "{kind:?}: {lost} were lost");
    }
}

#[test]
fn port_unreachable_is_no_evidence_of_forward_loss() {
    for kind in [IcmpKind::PortUnreachable, IcmpKind::Other] {
        for seed in seeds(50) {
            let (mut world, spec) = impaired_world(seed);
            world.forward.loss = Loss::Random(1.0);
            world.icmp_errors = (1.0, kind);
            let (counts, _) = measure(world, spec);
            let unknown = counts.count(|verdict| verdict == Verdict::Lost(Direction::Unknown));
            assert_eq!(
                (unknown, counts.icmp_errors),
                (counts.sent, counts.sent),
                "SIM_SEED={seed}, {kind:?}"
            );
        }
    }
}

#[test]
fn ipdv_is_correct_for_neighbours_decided_far_apart() {
    let mut late = 0;
    for seed in seeds(100) {
        let mut random = Random::new(!seed);
        let (mut world, spec) = impaired_world(seed);
        // The responder delays the requests of its stall until the first of them are about to be given up.
        let from = random.below(1_000 * MS);
        world.responder_host.scheduling.stalls = vec![(from, from + random.between(2_000 * MS, 2_990 * MS))];
        world.forward = Link::perfect(random.between(0, 10 * MS));
        world.reverse = Link::perfect(MS);
        world.reverse.jitter = Jitter::Uniform(random.below(50 * MS));
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        late +=
            counts.verdicts.values().filter_map(|v| v.1).filter(|s| nanos(s.turnaround) > 2_000 * MS).count();
    }
    assert!(is_replay() || late as u64 > scaled(300), "{late} waited for two seconds");
}

#[test]
fn transmit_lag_of_each_timestamped_reply_is_reported_once() {
    for seed in seeds(100) {
        let mut random = Random::new(!seed);
        let world = World::new(seed);
        let (flows, count) = (random.between(1, 4), random.between(100, 200));
        // Each reply arrives before the next datagram of its flow.
        let (counts, ledger) = measure(world, spec(seed, 100 * MS, flows as u16, count));
        ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0).unwrap();
        let replies = |flow: u64| (count - flow).div_ceil(flows);
        // The second reply and every sixteenth after it, if another reply follows.
        let expected: usize = (0..flows).map(|flow| (1..replies(flow) - 1).step_by(16).count()).sum();
        let lags = &counts.transmit_lags;
        assert_eq!(lags.len(), expected, "SIM_SEED={seed}: {flows} flows, {count} datagrams");
        assert!(lags.iter().all(|lag| (0..=20_001).contains(&nanos(*lag))), "SIM_SEED={seed}: {lags:?}");
        assert!(lags.iter().any(|lag| nanos(*lag) > 100), "SIM_SEED={seed}: {lags:?}");
    }
}

#[test]
fn goodbye_withdraws_unanswered_datagrams_until_the_peer_is_back() {
    for seed in seeds(100) {
        let mut world = World::new(seed);
        world.forward.loss = Loss::Blackout { from: 500 * MS, to: 4_000 * MS };
        let mut prober = Prober::new(spec(seed, 50 * MS, 1, 200), world.start());
        prober.peer_leaving(world.start() + Duration::from_millis(500));
        assert!(prober.is_draining(world.start()));
        let until = world.start() + Duration::from_secs(60);
        let mut responder = responder(None);
        let (counts, _) = world.run(&mut prober, &mut responder, 60_000 * MS);
        assert!(!prober.is_draining(until), "SIM_SEED={seed}");
        let withdrawn = counts.count(|verdict| verdict == Verdict::Withdrawn);
        assert!(withdrawn > 50, "SIM_SEED={seed}: {withdrawn} withdrawn");
        assert_eq!(counts.lost(), 0, "SIM_SEED={seed}: all of it was announced");
        assert_eq!(counts.verdicts.len() as u64, counts.sent, "SIM_SEED={seed}");
    }
}
