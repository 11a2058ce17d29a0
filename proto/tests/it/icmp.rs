//! Hosts that answer ICMP echoes: the same laws, but that no loss has a direction.

use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use pathmeter_proto::echo::{Direction, EchoReport, EchoSpec, Mismatch, Prober, Verdict, WireFormat};
use pathmeter_proto::machine::{Arrival, HostDrops, IcmpError, IcmpKind, Machine, Step, TimestampSource};
use pathmeter_proto::sim::{Corruption, Counts, EchoHost, Ledger, Link, Loss, Random, World};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::icmp::{self, IcmpEcho, IcmpVersion};

use super::byhand::{self, now};
use super::conservation::{LATE_AFTER, LOST_AFTER, MS, bad_world, is_replay, scaled, seeds, spec};

/// The same world with a host at its far end that answers ICMP; of either family.
fn to_a_host(seed: u64, (mut world, spec): (World, EchoSpec)) -> (World, EchoSpec) {
    world.there.answers_at_once = true;
    let to = if seed.is_multiple_of(2) { spec.to } else { (Ipv6Addr::LOCALHOST, 0).into() };
    let size = Random::new(!seed).pick(&[None, Some(32), Some(33), Some(64), Some(1_400)]);
    (world, EchoSpec { to, size, wire: WireFormat::Icmp, ..spec })
}

fn measure(world: World, spec: EchoSpec) -> (Counts, Ledger) {
    let mut prober = Prober::new(spec, world.start());
    let result = world.run(&mut prober, &mut EchoHost::default(), 600_000 * MS);
    assert_eq!(prober.in_flight(), 0);
    result
}

fn unknown(tally: &Counts) -> u64 {
    tally.count(|verdict| verdict == Verdict::Lost(Direction::Unknown))
}

#[test]
fn every_count_is_the_truth_and_every_round_trip_is_exact_on_steady_clocks() {
    let (mut lost, mut duplicates, mut reordered, mut late) = (0, 0, 0, 0);
    for seed in seeds(3_000) {
        let (world, spec) = to_a_host(seed, bad_world(seed));
        let count = spec.count.unwrap();
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(tally.sent + tally.unsent + tally.send_errors, count, "SIM_SEED={seed}: slots");
        assert_eq!(tally.lost(), unknown(&tally), "SIM_SEED={seed}: nobody can know the direction");
        assert_eq!((tally.mismatched, tally.turnaround_invalid), (0, 0), "SIM_SEED={seed}");
        for (_, sample) in tally.verdicts.values() {
            let told = sample.map(|sample| (sample.turnaround, sample.hops_forward, sample.hops_reverse));
            assert!(told.is_none_or(|told| told == (Duration::ZERO, None, None)), "SIM_SEED={seed}");
        }
        lost += tally.lost();
        duplicates += tally.duplicates;
        reordered += tally.reordered;
        late += tally.count(|verdict| verdict == Verdict::Late);
    }
    assert!(is_replay() || lost > scaled(10_000), "the worlds are bad: {lost} datagrams were lost");
    let seen = [duplicates, reordered, late];
    assert!(
        is_replay() || seen.iter().all(|count| *count > scaled(50)),
        "duplicates, reordered, late: {seen:?}"
    );
}

#[test]
fn what_a_checksum_notices_is_lost() {
    let mut lost = 0;
    for seed in seeds(300) {
        let (mut world, spec) = to_a_host(seed, bad_world(seed));
        world.forward.corruption = (0.05, Corruption::Noticed);
        world.reverse.corruption = (0.05, Corruption::Noticed);
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        lost += tally.lost();
    }
    assert!(is_replay() || lost > scaled(1_000), "{lost} datagrams were lost");
}

#[test]
fn a_stalled_prober_turns_no_answer_into_a_loss_and_makes_none_late() {
    for seed in seeds(500) {
        let mut world = World::new(seed);
        let mut random = Random::new(!seed);
        let from = random.between(0, 2_000 * MS);
        world.here.pace.stalls = vec![(from, from + random.between(500 * MS, 10_000 * MS))];
        let (world, spec) = to_a_host(seed, (world, spec(seed, 20 * MS, 4, 200)));
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(tally.count(|verdict| verdict == Verdict::Ok), tally.sent, "SIM_SEED={seed}");
    }
}

#[test]
fn a_wall_clock_that_is_stepped_changes_no_verdict_and_no_round_trip() {
    for seed in seeds(500) {
        let (mut world, spec) = to_a_host(seed, bad_world(seed));
        let mut random = Random::new(!seed);
        world.here.pace.latency = 200_000;
        let mut at = 0;
        for _ in 0..random.below(5) {
            at += random.between(500 * MS, 3_000 * MS);
            let by = i64::try_from(random.between(100 * MS, 3_600_000 * MS)).unwrap();
            world.here.clock.steps.push((at, if random.chance(0.5) { by } else { -by }));
        }
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
    }
}

#[test]
fn what_our_own_host_drops_is_not_the_networks_loss() {
    let mut dropped = 0;
    for seed in seeds(300) {
        let mut world = World::new(seed);
        world.here.queue = 8;
        (world.forward, world.reverse) = (Link::perfect(200 * MS), Link::perfect(200 * MS));
        world.here.pace.stalls = vec![(1_000 * MS, 1_400 * MS), (2_500 * MS, 2_900 * MS)];
        let (world, spec) = to_a_host(seed, (world, spec(seed, 10 * MS, 1, 400)));
        let (tally, ledger) = measure(world, spec);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        let blamed = tally.count(|verdict| verdict == Verdict::HostDropped);
        assert_eq!((blamed, tally.lost()), (ledger.dropped_at_prober, 0), "SIM_SEED={seed}");
        dropped += blamed;
    }
    assert!(is_replay() || dropped > scaled(1_000), "{dropped} replies were dropped");
}

#[test]
fn a_run_that_is_ended_withdraws_what_is_in_flight() {
    let mut withdrawn = 0;
    for seed in seeds(300) {
        let (world, spec) = to_a_host(seed, bad_world(seed));
        let mut prober = Prober::new(EchoSpec { count: None, ..spec }, world.start());
        let (tally, _) = world.run(&mut prober, &mut EchoHost::default(), 1_500 * MS);
        // A slot that came in the very moment.
        let undecided = prober.in_flight() as u64;
        assert_eq!(tally.verdicts.len() as u64 + undecided, tally.sent, "SIM_SEED={seed}: one verdict each");
        assert_eq!((tally.lost(), tally.decided_twice), (0, 0), "SIM_SEED={seed}");
        withdrawn += tally.count(|verdict| verdict == Verdict::Withdrawn);
    }
    assert!(is_replay() || withdrawn > scaled(1_000), "{withdrawn} were withdrawn");
}

/// A prober that has sent its first datagram, and that datagram.
fn asked(to: SocketAddr) -> (Prober, Vec<u8>, Timestamp) {
    let mut at = Timestamp::from_nanos(1_000 * MS);
    let spec = EchoSpec { to, wire: WireFormat::Icmp, tx_timestamps: false, ..spec(1, 100 * MS, 1, 1) };
    let (mut prober, mut arena) = (Prober::new(spec, at), Vec::new());
    loop {
        match prober.step(now(at), &mut HostDrops::default(), &mut arena) {
            Step::Send(send) => {
                prober.sent(send.id, at, TimestampSource::User);
                return (prober, arena, at);
            }
            Step::Wait(until) => at = until,
            Step::Report(_) | Step::Finished => panic!("its slot is still to come"),
        }
    }
}

fn reports(prober: &mut Prober, at: Timestamp) -> Vec<EchoReport> {
    let mut found = Vec::new();
    while let Step::Report(report) = prober.step(now(at), &mut HostDrops::default(), &mut Vec::new()) {
        found.push(report);
    }
    found
}

#[test]
fn an_error_of_a_router_is_counted_and_gives_no_direction() {
    let to = SocketAddr::from(([192, 0, 2, 2], 0));
    for kind in [IcmpKind::Unreachable, IcmpKind::Prohibited, IcmpKind::TtlExceeded, IcmpKind::TooBig] {
        // Routers may quote eight bytes only.
        for quoted in [8, 32] {
            let (mut prober, request, at) = asked(to);
            let router = [192, 0, 2, 9].into();
            let icmp = Some(IcmpError { router, kind, mtu: None });
            prober.received(&request[..quoted], &Arrival { icmp, ..byhand::arrival(to, at) });
            let found = reports(&mut prober, at + LOST_AFTER + LOST_AFTER);
            assert!(found.contains(&EchoReport::Icmp(kind)), "{found:?}");
            let lost = Verdict::Lost(Direction::Unknown);
            let is_lost = |report: &EchoReport| matches!(report, EchoReport::Decided { verdict, .. } if *verdict == lost);
            assert!(found.iter().any(is_lost), "{found:?}");
        }
    }
}

#[test]
fn only_the_answer_to_what_was_sent_is_believed() {
    for (to, version) in [
        (SocketAddr::from(([192, 0, 2, 2], 0)), IcmpVersion::V4),
        ((Ipv6Addr::LOCALHOST, 0).into(), IcmpVersion::V6),
    ] {
        let (mut prober, request, at) = asked(to);
        let arrival = byhand::arrival(to, at + Duration::from_millis(5));
        let mut reply = request.clone();
        prober.received(&reply, &arrival);
        reply[0] = version.reply();
        // A bit of anything that says which datagram it was: header, magic, session, T1, sequence number, SSID.
        for at in (0..2).chain(6..30) {
            reply[at] ^= 1;
            prober.received(&reply, &arrival);
            reply[at] ^= 1;
        }
        prober.received(&reply[..31], &arrival);
        let found = reports(&mut prober, arrival.at);
        let disbelieved = |why| found.iter().filter(|report| **report == EchoReport::Mismatched(why)).count();
        assert_eq!(
            (disbelieved(Mismatch::Unsolicited), disbelieved(Mismatch::Malformed)),
            (27, 1),
            "{found:?}"
        );
        assert!(!found.iter().any(|report| matches!(report, EchoReport::Decided { .. })), "{found:?}");
        // What translators of addresses change.
        icmp::identify(&mut reply, 4_711);
        prober.received(&reply, &arrival);
        prober.received(&reply, &arrival);
        let found = reports(&mut prober, arrival.at);
        let ok = |report: &EchoReport| matches!(report, EchoReport::Decided { verdict: Verdict::Ok, .. });
        assert!(found.iter().any(ok) && found.contains(&EchoReport::Duplicate), "{found:?}");
        let mut echoed = request.clone();
        echoed[0] = version.reply();
        let sent = IcmpEcho::decode_reply(&echoed, version).unwrap();
        assert_eq!((sent.sequence, sent.ssid), (0, 1));
    }
}

#[test]
fn a_host_that_is_away_by_its_own_word_loses_nothing() {
    let mut world = World::new(1);
    world.forward.loss = Loss::Every(1);
    let (world, spec) = to_a_host(0, (world, spec(1, 50 * MS, 2, 100)));
    let mut prober = Prober::new(spec, world.start());
    prober.peer_leaving(world.start());
    let (tally, _) = world.run(&mut prober, &mut EchoHost::default(), 60_000 * MS);
    assert!(tally.sent > 90, "{} left", tally.sent);
    assert_eq!(tally.count(|verdict| verdict == Verdict::Withdrawn), tally.sent);
}
