//! Hosts that answer ICMP echo requests: the same invariants, but no loss has a direction.

use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use pathmeter_proto::echo::{Direction, EchoReport, EchoSpec, Mismatch, Prober, Verdict, WireFormat};
use pathmeter_proto::machine::{Arrival, HostDrops, IcmpError, IcmpKind, Machine, Step, TimestampSource};
use pathmeter_proto::sim::{Corruption, Counts, EchoHost, Ledger, Link, Loss, Random, World};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::icmp::{self, IcmpEcho, IcmpVersion};

use super::conservation::{LATE_AFTER, LOST_AFTER, MS, impaired_world, is_replay, scaled, seeds, spec};
use super::manual::{self, now};

/// The same world with a responder's host that answers ICMP, over IPv4 or IPv6.
fn with_icmp_host(seed: u64, (mut world, spec): (World, EchoSpec)) -> (World, EchoSpec) {
    world.responder_host.kernel_replies = true;
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

fn unknown(counts: &Counts) -> u64 {
    counts.count(|verdict| verdict == Verdict::Lost(Direction::Unknown))
}

#[test]
fn counts_and_round_trips_equal_the_truth_on_steady_clocks() {
    let (mut lost, mut duplicates, mut reordered, mut late) = (0, 0, 0, 0);
    for seed in seeds(3_000) {
        let (world, spec) = with_icmp_host(seed, impaired_world(seed));
        let count = spec.count.unwrap();
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(counts.sent + counts.unsent + counts.send_errors, count, "SIM_SEED={seed}: slots");
        assert_eq!(counts.lost(), unknown(&counts), "SIM_SEED={seed}: no loss has a direction");
        assert_eq!((counts.mismatched, counts.turnaround_invalid), (0, 0), "SIM_SEED={seed}");
        for (_, sample) in counts.verdicts.values() {
            let sample = sample.map(|sample| (sample.turnaround, sample.hops_forward, sample.hops_reverse));
            assert!(sample.is_none_or(|sample| sample == (Duration::ZERO, None, None)), "SIM_SEED={seed}");
        }
        lost += counts.lost();
        duplicates += counts.duplicates;
        reordered += counts.reordered;
        late += counts.count(|verdict| verdict == Verdict::Late);
    }
    assert!(is_replay() || lost > scaled(10_000), "{lost} datagrams were lost");
    let seen = [duplicates, reordered, late];
    assert!(
        is_replay() || seen.iter().all(|count| *count > scaled(50)),
        "duplicates, reordered, late: {seen:?}"
    );
}

#[test]
fn datagrams_with_a_wrong_checksum_are_lost() {
    let mut lost = 0;
    for seed in seeds(300) {
        let (mut world, spec) = with_icmp_host(seed, impaired_world(seed));
        world.forward.corruption = (0.05, Corruption::Detected);
        world.reverse.corruption = (0.05, Corruption::Detected);
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        lost += counts.lost();
    }
    assert!(is_replay() || lost > scaled(1_000), "{lost} datagrams were lost");
}

#[test]
fn stalled_prober_makes_no_answer_lost_or_late() {
    for seed in seeds(500) {
        let mut world = World::new(seed);
        let mut random = Random::new(!seed);
        let from = random.between(0, 2_000 * MS);
        world.prober_host.scheduling.stalls = vec![(from, from + random.between(500 * MS, 10_000 * MS))];
        let (world, spec) = with_icmp_host(seed, (world, spec(seed, 20 * MS, 4, 200)));
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        assert_eq!(counts.count(|verdict| verdict == Verdict::Ok), counts.sent, "SIM_SEED={seed}");
    }
}

#[test]
fn wall_clock_steps_change_no_verdict_and_no_round_trip() {
    for seed in seeds(500) {
        let (mut world, spec) = with_icmp_host(seed, impaired_world(seed));
        let mut random = Random::new(!seed);
        world.prober_host.scheduling.latency = 200_000;
        let mut at = 0;
        for _ in 0..random.below(5) {
            at += random.between(500 * MS, 3_000 * MS);
            let by = i64::try_from(random.between(100 * MS, 3_600_000 * MS)).unwrap();
            world.prober_host.clock.steps.push((at, if random.chance(0.5) { by } else { -by }));
        }
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
    }
}

#[test]
fn drops_of_the_probers_host_are_not_network_loss() {
    let mut dropped = 0;
    for seed in seeds(300) {
        let mut world = World::new(seed);
        world.prober_host.queue = 8;
        (world.forward, world.reverse) = (Link::perfect(200 * MS), Link::perfect(200 * MS));
        world.prober_host.scheduling.stalls = vec![(1_000 * MS, 1_400 * MS), (2_500 * MS, 2_900 * MS)];
        let (world, spec) = with_icmp_host(seed, (world, spec(seed, 10 * MS, 1, 400)));
        let (counts, ledger) = measure(world, spec);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        let blamed = counts.count(|verdict| verdict == Verdict::HostDropped);
        assert_eq!((blamed, counts.lost()), (ledger.dropped_at_prober, 0), "SIM_SEED={seed}");
        dropped += blamed;
    }
    assert!(is_replay() || dropped > scaled(1_000), "{dropped} replies were dropped");
}

#[test]
fn early_end_withdraws_datagrams_in_flight() {
    let mut withdrawn = 0;
    for seed in seeds(300) {
        let (world, spec) = with_icmp_host(seed, impaired_world(seed));
        let mut prober = Prober::new(EchoSpec { count: None, ..spec }, world.start());
        let (counts, _) = world.run(&mut prober, &mut EchoHost::default(), 1_500 * MS);
        // A datagram may be sent at the very end.
        let undecided = prober.in_flight() as u64;
        assert_eq!(
            counts.verdicts.len() as u64 + undecided,
            counts.sent,
            "SIM_SEED={seed}: one verdict each"
        );
        assert_eq!((counts.lost(), counts.decided_twice), (0, 0), "SIM_SEED={seed}");
        withdrawn += counts.count(|verdict| verdict == Verdict::Withdrawn);
    }
    assert!(is_replay() || withdrawn > scaled(1_000), "{withdrawn} were withdrawn");
}

/// A prober that has sent its first datagram, and that datagram.
fn first_request(to: SocketAddr) -> (Prober, Vec<u8>, Timestamp) {
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
            Step::Report(_) | Step::Finished => panic!("the first slot is in the future"),
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
fn router_error_is_counted_and_gives_no_direction() {
    let to = SocketAddr::from(([192, 0, 2, 2], 0));
    for kind in [IcmpKind::Unreachable, IcmpKind::Prohibited, IcmpKind::TtlExceeded, IcmpKind::TooBig] {
        // Routers may quote only eight bytes.
        for quoted in [8, 32] {
            let (mut prober, request, at) = first_request(to);
            let router = [192, 0, 2, 9].into();
            let icmp = Some(IcmpError { router, kind, code: 0, mtu: None, extensions_at: None });
            prober.received(&request[..quoted], &Arrival { icmp, ..manual::arrival(to, at) });
            let found = reports(&mut prober, at + LOST_AFTER + LOST_AFTER);
            assert!(found.contains(&EchoReport::Icmp(kind)), "{found:?}");
            let lost = Verdict::Lost(Direction::Unknown);
            let is_lost = |report: &EchoReport| matches!(report, EchoReport::Decided { verdict, .. } if *verdict == lost);
            assert!(found.iter().any(is_lost), "{found:?}");
        }
    }
}

#[test]
fn only_replies_to_sent_datagrams_are_accepted() {
    for (to, version) in [
        (SocketAddr::from(([192, 0, 2, 2], 0)), IcmpVersion::V4),
        ((Ipv6Addr::LOCALHOST, 0).into(), IcmpVersion::V6),
    ] {
        let (mut prober, request, at) = first_request(to);
        let arrival = manual::arrival(to, at + Duration::from_millis(5));
        let mut reply = request.clone();
        prober.received(&reply, &arrival);
        reply[0] = version.reply();
        // One changed bit in each field that identifies the datagram: header, magic number, session, T1,
        // sequence number, SSID.
        for at in (0..2).chain(6..30) {
            reply[at] ^= 1;
            prober.received(&reply, &arrival);
            reply[at] ^= 1;
        }
        prober.received(&reply[..31], &arrival);
        let found = reports(&mut prober, arrival.at);
        let mismatches = |why| found.iter().filter(|report| **report == EchoReport::Mismatched(why)).count();
        assert_eq!(
            (mismatches(Mismatch::Unsolicited), mismatches(Mismatch::Malformed)),
            (27, 1),
            "{found:?}"
        );
        assert!(!found.iter().any(|report| matches!(report, EchoReport::Decided { .. })), "{found:?}");
        // NAT may change the identifier.
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
fn host_that_said_goodbye_has_no_losses() {
    let mut world = World::new(1);
    world.forward.loss = Loss::Every(1);
    let (world, spec) = with_icmp_host(0, (world, spec(1, 50 * MS, 2, 100)));
    let mut prober = Prober::new(spec, world.start());
    prober.peer_leaving(world.start());
    let (counts, _) = world.run(&mut prober, &mut EchoHost::default(), 60_000 * MS);
    assert!(counts.sent > 90, "{} left", counts.sent);
    assert_eq!(counts.count(|verdict| verdict == Verdict::Withdrawn), counts.sent);
}
