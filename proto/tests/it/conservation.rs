//! Thousands of seeded worlds; in each, every count is the truth's.

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
    let (tally, mut ledger) = world.run(&mut prober, &mut responder, 600_000 * MS);
    assert_eq!(prober.in_flight(), 0);
    (ledger.horizon, ledger.is_reported) = (horizon, true);
    (tally, ledger)
}

/// How much earlier a datagram must have been sent for a report to count against it: a quarter of the time after
/// which a reply is late, or half of what a report covers.
pub(super) fn horizon(spec: &EchoSpec) -> Duration {
    (spec.late_after / 4).min(spec.interval * 64 * spec.ssids.len() as u32)
}

/// A link of random badness.
fn bad_link(random: &mut Random) -> Link {
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

/// A world of random badness, and how it is measured.
pub(super) fn bad_world(seed: u64) -> (World, EchoSpec) {
    let mut random = Random::new(seed);
    let mut world = World::new(seed);
    world.forward = bad_link(&mut random);
    world.reverse = bad_link(&mut random);
    world.here.timestamps_lost = random.pick(&[0.0, 0.1]);
    world.here.timestamps_late = random.pick(&[3 * MS, 3 * MS, 150 * MS]);
    world.here.refuses = random.pick(&[0.0, 0.05]);
    world.here.pace.latency = random.pick(&[0, 200_000, 20 * MS]);
    let interval = random.pick(&[5 * MS, 20 * MS, 100 * MS, 1_000 * MS]);
    let flows = random.pick(&[1, 1, 4, 16]);
    let count = random.between(20, 150);
    (world, spec(seed, interval, flows, count))
}

/// Whether one world is replayed, of which nothing can be said that holds only for many.
pub(super) fn is_replay() -> bool {
    std::env::var_os("SIM_SEED").is_some()
}

/// How many times as many worlds as usual are tried: `SIM_TIMES`, 1 unless it is set.
fn times() -> f64 {
    let times = std::env::var("SIM_TIMES").ok().and_then(|text| text.parse::<f64>().ok());
    times.unwrap_or(1.0).max(0.0)
}

/// `count`, or as much more or less as `SIM_TIMES` says.
pub(super) fn scaled(count: u64) -> u64 {
    #[expect(clippy::cast_sign_loss, reason = "neither factor is negative")]
    let scaled = (count as f64 * times()).ceil() as u64;
    scaled
}

/// Seeds to try: `SIM_SEED=n` replays one, `SIM_TIMES=x` tries that many times as many.
pub(super) fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let seed = std::env::var("SIM_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    match seed {
        Some(seed) => seed..seed + 1,
        None => 0..scaled(count),
    }
}

#[test]
fn every_count_is_the_truth_and_every_round_trip_is_exact_on_steady_clocks() {
    let (mut lost, mut unknown) = (0, 0);
    for seed in seeds(3_000) {
        let (world, spec) = bad_world(seed);
        let count = spec.count.unwrap();
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(tally.sent + tally.unsent + tally.send_errors, count, "SIM_SEED={seed}: slots");
        lost += tally.lost();
        unknown += tally.count(|verdict| verdict == Verdict::Lost(Direction::Unknown));
    }
    assert!(is_replay() || lost > scaled(10_000), "the worlds are bad: {lost} datagrams were lost");
    assert!(is_replay() || unknown * 2 < lost, "most losses have a direction: {unknown} of {lost} have none");
}

#[test]
fn authentication_turns_corruption_into_loss_in_its_direction() {
    let keys = Arc::new(Keys::parse("0123456789abcdef").unwrap());
    let mut corrupted = 0;
    for seed in seeds(500) {
        let (mut world, spec) = bad_world(seed);
        world.forward.corruption = (0.05, Corruption::Unnoticed);
        world.reverse.corruption = (0.05, Corruption::Unnoticed);
        let spec = EchoSpec {
            wire: WireFormat::Stamp { keys: Some(keys.clone()), quirks: Quirks::default() },
            ..spec
        };
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(tally.mismatched, ledger.corrupted_replies, "SIM_SEED={seed}");
        corrupted += tally.mismatched;
    }
    assert!(is_replay() || corrupted > scaled(500), "{corrupted} replies were corrupted");
}

#[test]
fn a_wall_clock_that_is_stepped_at_either_end_changes_no_verdict_and_no_round_trip() {
    for seed in seeds(1_000) {
        let (mut world, spec) = bad_world(seed);
        let mut random = Random::new(!seed);
        world.here.pace.latency = 200_000;
        for clock in [&mut world.here.clock, &mut world.there.clock] {
            let mut at = 0;
            for _ in 0..random.below(5) {
                at += random.between(500 * MS, 3_000 * MS);
                let by = i64::try_from(random.between(100 * MS, 3_600_000 * MS)).unwrap();
                clock.steps.push((at, if random.chance(0.5) { by } else { -by }));
            }
        }
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(tally.turnaround_invalid, 0, "SIM_SEED={seed}");
    }
}

#[test]
fn a_step_that_is_smaller_than_the_time_between_two_looks_errs_by_at_most_the_step() {
    let step = 3 * MS;
    for seed in seeds(300) {
        let (mut world, spec) = bad_world(seed);
        let mut random = Random::new(!seed);
        for clock in [&mut world.here.clock, &mut world.there.clock] {
            let at = random.between(100 * MS, 5_000 * MS);
            clock.steps.push((at, i64::try_from(random.between(0, step)).unwrap()));
        }
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 2 * step);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
    }
}

#[test]
fn clocks_that_run_wrong_err_by_their_skew_and_no_more() {
    let mut decided = 0;
    for seed in seeds(500) {
        let (mut world, spec) = bad_world(seed);
        let mut random = Random::new(!seed);
        world.here.clock.skew_ppm = i64::try_from(random.below(1_001)).unwrap() - 500;
        world.there.clock.skew_ppm = i64::try_from(random.below(1_001)).unwrap() - 500;
        let stall = random.between(0, 5_000 * MS);
        world.there.pace.stalls = vec![(stall, stall + 1_500 * MS)];
        let [here, there] = [&world.here, &world.there].map(|host| host.clock.skew_ppm.unsigned_abs());
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 2).and_then(|()| {
            // What each clock measured, wrong by its own skew; and the roundings of four readings.
            ledger.compare_with_true_time(&tally, |elapsed, turnaround| {
                nanos(elapsed) * here / 1_000_000 + nanos(turnaround) * there / 1_000_000 + 4
            })
        });
        decided += outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
    }
    assert!(is_replay() || decided > scaled(10_000), "{decided} round trips were compared");
}

#[test]
fn a_stalled_prober_turns_no_answer_into_a_loss() {
    for seed in seeds(500) {
        let (mut world, spec) = bad_world(seed);
        let mut random = Random::new(!seed);
        let from = random.between(0, 2_000 * MS);
        world.here.pace.stalls = vec![(from, from + random.between(500 * MS, 10_000 * MS))];
        let count = spec.count.unwrap();
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(tally.sent + tally.unsent + tally.send_errors, count, "SIM_SEED={seed}: slots");
    }
}

#[test]
fn a_stalled_responder_shows_as_its_turnaround_and_not_as_the_networks() {
    let mut slow = 0;
    for seed in seeds(200) {
        let mut world = World::new(seed);
        world.there.pace.stalls = vec![(1_000 * MS, 3_000 * MS)];
        let (tally, ledger) = measure(world, spec(seed, 50 * MS, 1, 100));
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(tally.count(|verdict| verdict == Verdict::Ok), tally.sent, "SIM_SEED={seed}");
        for (verdict, sample) in tally.verdicts.values() {
            let sample = sample.unwrap();
            assert!(nanos(sample.rtt) < 21 * MS, "SIM_SEED={seed}: {verdict:?} {sample:?}");
            slow += u64::from(nanos(sample.turnaround) > 500 * MS);
        }
    }
    assert!(is_replay() || slow > scaled(1_000), "{slow} replies waited in the stalled responder");
}

#[test]
fn what_our_own_host_drops_is_not_the_networks_loss() {
    let mut dropped = 0;
    for seed in seeds(300) {
        let mut world = World::new(seed);
        world.here.queue = 8;
        (world.forward, world.reverse) = (Link::perfect(200 * MS), Link::perfect(200 * MS));
        world.here.pace.stalls = vec![(1_000 * MS, 1_400 * MS), (2_500 * MS, 2_900 * MS)];
        let (tally, ledger) = measure(world, spec(seed, 10 * MS, 1, 400));
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        let blamed = tally.count(|verdict| verdict == Verdict::HostDropped);
        assert_eq!(blamed, ledger.dropped_at_prober, "SIM_SEED={seed}");
        assert_eq!(tally.lost(), 0, "SIM_SEED={seed}");
        dropped += blamed;
    }
    assert!(is_replay() || dropped > scaled(1_000), "{dropped} replies were dropped");
}

#[test]
fn what_the_responders_host_drops_is_not_the_networks_loss() {
    let mut dropped = 0;
    for seed in seeds(300) {
        let mut world = World::new(seed);
        world.there.queue = 8;
        world.there.pace.stalls = vec![(1_000 * MS, 1_400 * MS)];
        let (tally, ledger) = measure(world, spec(seed, 10 * MS, 1, 400));
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        dropped += tally.count(|verdict| verdict == Verdict::HostDropped);
        assert_eq!(tally.lost(), 0, "SIM_SEED={seed}");
    }
    assert!(is_replay() || dropped > scaled(1_000), "{dropped} requests were dropped");
}

#[test]
fn drops_of_a_host_excuse_no_more_losses_than_there_were_drops_however_many_flows_there_are() {
    let (mut dropped, mut blamed, mut lost) = (0, 0, 0);
    for seed in seeds(200) {
        let mut world = World::new(seed);
        world.there.queue = 4;
        world.there.pace.stalls = vec![(1_000 * MS, 1_200 * MS), (2_000 * MS, 2_050 * MS)];
        (world.forward, world.reverse) = (Link::perfect(50 * MS), Link::perfect(50 * MS));
        world.forward.loss = Loss::Random(0.2);
        world.reverse.loss = Loss::Random(0.2);
        let (tally, ledger) = measure(world, spec(seed, 10 * MS, 16, 400));
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        dropped += ledger.dropped_at_responder;
        blamed += tally.count(|verdict| verdict == Verdict::HostDropped);
        lost += tally.lost();
    }
    assert!(
        is_replay() || dropped > scaled(1_000) && blamed > scaled(1_000),
        "{dropped} dropped, {blamed} blamed"
    );
    assert!(is_replay() || lost > scaled(5_000), "{lost} lost in the network");
}

#[test]
fn on_a_path_that_loses_one_percent_each_way_nearly_every_loss_has_its_direction() {
    let (mut forward, mut reverse, mut unknown) = (0, 0, 0);
    for seed in seeds(100) {
        let mut world = World::new(seed);
        world.forward.loss = Loss::Random(0.01);
        world.reverse.loss = Loss::Random(0.01);
        let (tally, ledger) = measure(world, spec(seed, 100 * MS, 1, 1_000));
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        forward += tally.count(|verdict| verdict == Verdict::Lost(Direction::Forward));
        reverse += tally.count(|verdict| verdict == Verdict::Lost(Direction::Reverse));
        unknown += tally.count(|verdict| verdict == Verdict::Lost(Direction::Unknown));
    }
    assert!(
        is_replay() || forward > scaled(900) && reverse > scaled(900),
        "{forward} forward, {reverse} in reverse"
    );
    assert!(is_replay() || unknown * 100 < forward + reverse, "{unknown} without a direction");
}

#[test]
fn reply_before_transmit_timestamp_waits_for_it_a_tenth_of_a_second() {
    let (mut kernel, mut user) = (0, 0);
    for seed in seeds(300) {
        let (mut world, mut spec) = bad_world(seed);
        world.here.timestamps_late = 200 * MS;
        world.here.pace.latency = 200_000;
        let mut lost_after = LOST_AFTER;
        if seed % 3 == 0 {
            // Replies come up to 80 ms before their datagram would be given up.
            lost_after = Duration::from_millis(120);
            let delay = Random::new(!seed).between(20 * MS, 55 * MS);
            (world.forward, world.reverse) = (Link::perfect(delay), Link::perfect(delay));
            (spec.late_after, spec.lost_after) = (lost_after, lost_after);
        }
        let late_after = spec.late_after;
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, late_after, lost_after, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        for sample in tally.verdicts.values().filter_map(|(_, sample)| *sample) {
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
fn verdict_comes_when_it_is_due_though_the_prober_is_woken_only_when_it_asked() {
    let latency = Duration::from_micros(200);
    let mut decided = 0;
    for seed in seeds(500) {
        let (mut world, spec) = bad_world(seed);
        world.here.timestamps_late = Random::new(!seed).pick(&[3 * MS, 200 * MS]);
        // It reads replies when a datagram is due or a verdict is.
        (world.here.pace.latency, world.here.pace.tick) = (nanos(latency), u64::MAX / 2);
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        let outcome = outcome.and_then(|()| ledger.compare_times(&tally, LOST_AFTER, latency));
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        decided += tally.verdicts.len() as u64;
    }
    assert!(is_replay() || decided > scaled(10_000), "{decided} were decided");
}

#[test]
fn report_counts_against_what_was_sent_half_its_reach_before_where_datagrams_come_fast() {
    let mut lost = 0;
    for seed in seeds(200) {
        let (world, spec) = bad_world(seed);
        let spec = EchoSpec { interval: Duration::from_millis(1), count: Some(400), ..spec };
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        lost += tally.lost();
    }
    assert!(is_replay() || lost > scaled(5_000), "{lost} datagrams were lost");
}

#[test]
fn what_a_router_refused_is_lost_on_the_way_there_even_if_nothing_else_is_heard() {
    for kind in [IcmpKind::Unreachable, IcmpKind::Prohibited, IcmpKind::TooBig, IcmpKind::TtlExceeded] {
        let mut lost = 0;
        for seed in seeds(50) {
            let (mut world, mut spec) = bad_world(seed);
            (world.here.timestamps_lost, world.here.timestamps_late) = (0.0, 3 * MS);
            world.forward.loss = Loss::Random(Random::new(!seed).pick(&[0.2, 1.0]));
            world.complaints = (1.0, kind);
            if seed % 2 == 0 {
                spec.wire = WireFormat::Stamp {
                    keys: Some(Arc::new(Keys::parse("0123456789abcdef").unwrap())),
                    quirks: Quirks::default(),
                };
            }
            let is_silent = world.forward.loss == Loss::Random(1.0);
            let (tally, ledger) = measure(world, spec);
            let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
            outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}, {kind:?}: {difference}"));
            let forward = tally.count(|verdict| verdict == Verdict::Lost(Direction::Forward));
            if is_silent {
                assert_eq!(
                    (forward, tally.complaints),
                    (tally.sent, tally.sent),
                    "SIM_SEED={seed}, {kind:?}"
                );
            }
            lost += forward;
        }
        assert!(is_replay() || lost > scaled(1_000), "{kind:?}: {lost} were lost");
    }
}

#[test]
fn a_host_where_nothing_listens_is_no_loss_on_the_way_there() {
    for kind in [IcmpKind::PortUnreachable, IcmpKind::Other] {
        for seed in seeds(50) {
            let (mut world, spec) = bad_world(seed);
            world.forward.loss = Loss::Random(1.0);
            world.complaints = (1.0, kind);
            let (tally, _) = measure(world, spec);
            let unknown = tally.count(|verdict| verdict == Verdict::Lost(Direction::Unknown));
            assert_eq!((unknown, tally.complaints), (tally.sent, tally.sent), "SIM_SEED={seed}, {kind:?}");
        }
    }
}

#[test]
fn neighbours_differ_by_their_round_trips_however_far_apart_they_are_decided() {
    let mut late = 0;
    for seed in seeds(100) {
        let mut random = Random::new(!seed);
        let (mut world, spec) = bad_world(seed);
        // The responder holds the requests of its pause until the first of them are about to be given up.
        let from = random.below(1_000 * MS);
        world.there.pace.stalls = vec![(from, from + random.between(2_000 * MS, 2_990 * MS))];
        world.forward = Link::perfect(random.between(0, 10 * MS));
        world.reverse = Link::perfect(MS);
        world.reverse.jitter = Jitter::Uniform(random.below(50 * MS));
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        late +=
            tally.verdicts.values().filter_map(|v| v.1).filter(|s| nanos(s.turnaround) > 2_000 * MS).count();
    }
    assert!(is_replay() || late as u64 > scaled(300), "{late} waited for two seconds");
}

#[test]
fn lag_of_each_stamped_reply_is_told_once_by_the_next_reply() {
    for seed in seeds(100) {
        let mut random = Random::new(!seed);
        let world = World::new(seed);
        let (flows, count) = (random.between(1, 4), random.between(100, 200));
        // Each reply is heard before the next datagram of its flow.
        let (tally, ledger) = measure(world, spec(seed, 100 * MS, flows as u16, count));
        ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0).unwrap();
        let replies = |flow: u64| (count - flow).div_ceil(flows);
        // The second reply and every sixteenth after that, where another follows.
        let told: usize = (0..flows).map(|flow| (1..replies(flow) - 1).step_by(16).count()).sum();
        let lags = &tally.transmit_lags;
        assert_eq!(lags.len(), told, "SIM_SEED={seed}: {flows} flows, {count} datagrams");
        assert!(lags.iter().all(|lag| (0..=20_001).contains(&nanos(*lag))), "SIM_SEED={seed}: {lags:?}");
        assert!(lags.iter().any(|lag| nanos(*lag) > 100), "SIM_SEED={seed}: {lags:?}");
    }
}

#[test]
fn a_goodbye_withdraws_what_goes_unanswered_until_the_peer_is_back() {
    for seed in seeds(100) {
        let mut world = World::new(seed);
        world.forward.loss = Loss::Blackout { from: 500 * MS, to: 4_000 * MS };
        let mut prober = Prober::new(spec(seed, 50 * MS, 1, 200), world.start());
        prober.peer_leaving(world.start() + Duration::from_millis(500));
        assert!(prober.is_draining(world.start()));
        let until = world.start() + Duration::from_secs(60);
        let mut responder = responder(None);
        let (tally, _) = world.run(&mut prober, &mut responder, 60_000 * MS);
        assert!(!prober.is_draining(until), "SIM_SEED={seed}");
        let withdrawn = tally.count(|verdict| verdict == Verdict::Withdrawn);
        assert!(withdrawn > 50, "SIM_SEED={seed}: {withdrawn} withdrawn");
        assert_eq!(tally.lost(), 0, "SIM_SEED={seed}: all of it was announced");
        assert_eq!(tally.verdicts.len() as u64, tally.sent, "SIM_SEED={seed}");
    }
}
