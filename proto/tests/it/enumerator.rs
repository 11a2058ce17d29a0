//! Enumerators in simulated networks whose equal-cost paths are known.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::admission::Policy;
use pathmeter_proto::echo::{Profile, Quirks, StampResponder};
use pathmeter_proto::key::Keys;
use pathmeter_proto::machine::{
    Arrival, HostDrops, IcmpError, IcmpKind, Machine as _, NotSent, Now, Send, SendId, Step, TimestampSource,
};
use pathmeter_proto::probe_budget::ProbeLimits;
use pathmeter_proto::sim::{
    Answers, Balance, Random, RouterNetwork, Segment, SimRouter, TraceWorld, Transit,
};
use pathmeter_proto::time::{Timestamp, WallOffset, WallTime};
use pathmeter_proto::trace::{
    Completeness, Enumerated, Enumeration, EnumerationEnd, EnumerationLimit, EnumerationReport, Enumerator,
    TraceSpec,
};

use super::conservation::seeds;
use super::trace::{MS, spec, unlimited};

/// Segments with so many routers each.
fn network(widths: &[u8]) -> RouterNetwork {
    let segments = (0..).zip(widths).map(|(index, width)| Segment {
        routers: (0..*width).map(|router| SimRouter::new([10, 0, index, router].into())).collect(),
        balance: Balance::PerFlow,
        delay: MS,
    });
    RouterNetwork { segments: segments.collect(), last_delay: MS, is_reachable: true }
}

/// An enumerator, a network and a responder.
struct World {
    enumerator: Enumerator,
    network: RouterNetwork,
    responder: StampResponder,
    random: Random,
    /// Datagrams and errors that will arrive, by time in nanoseconds.
    arrivals: BTreeMap<(u64, u64), (Arrival, Vec<u8>)>,
    count: u64,
    at: u64,
    /// The send errors of this host, as a share of the probes.
    refused: f64,
    counts: Counts,
    /// What arrived that the enumerator does not own.
    foreign: usize,
    enumerated: Option<Enumerated>,
}

/// Number of reports.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    sent: usize,
    answered: usize,
    unanswered: usize,
    withdrawn: usize,
    send_errors: usize,
    deferred: usize,
    unmatched: usize,
}

impl World {
    fn new(spec: TraceSpec, network: RouterNetwork) -> Self {
        let policy = Policy { open: true, rate: 1 << 40, rate_per_source: 1 << 40, ..Policy::default() };
        let (seed, keys) = (spec.seed, spec.keys.clone());
        Self {
            enumerator: Enumerator::new(spec, TraceWorld::start()),
            network,
            responder: StampResponder::new(policy, keys, 256),
            random: Random::new(seed),
            arrivals: BTreeMap::new(),
            count: 0,
            at: 0,
            refused: 0.0,
            counts: Counts::default(),
            foreign: 0,
            enumerated: None,
        }
    }

    fn timestamp(&self) -> Timestamp {
        TraceWorld::start() + Duration::from_nanos(self.at)
    }

    fn now(&self) -> Now {
        let (at, wall) = (self.timestamp(), WallTime::from_nanos(1_767_225_600_000_000_000));
        Now { at, drained: at, wall: WallOffset::between(TraceWorld::start(), wall) }
    }

    fn arrival(&self, flow: u8, icmp: Option<IcmpError>) -> Arrival {
        let (from, by) = (TraceWorld::responder_address(), TimestampSource::Kernel);
        Arrival { at: self.timestamp(), by, from, to: None, flow, ttl: Some(250), tos: Some(0), icmp }
    }

    fn arrives(&mut self, at: u64, flow: u8, icmp: Option<IcmpError>, bytes: Vec<u8>) {
        self.count += 1;
        let arrival = self.arrival(flow, icmp);
        self.arrivals.insert((at, self.count), (arrival, bytes));
    }

    fn send(&mut self, send: &Send, mut bytes: Vec<u8>) {
        if self.random.chance(self.refused) {
            self.enumerator.not_sent(send.id, NotSent::Buffer);
            return;
        }
        self.enumerator.sent(send.id, self.timestamp(), TimestampSource::User);
        self.enumerator.sent(send.id, self.timestamp(), TimestampSource::Kernel);
        let flow = send.flow;
        match self.network.send(flow.into(), send.ttl, self.at, &mut self.random) {
            Transit::Expired { router, quoted_bytes, at, .. } => {
                bytes.truncate(quoted_bytes);
                let icmp = Some(IcmpError {
                    router,
                    kind: IcmpKind::TtlExceeded,
                    code: 0,
                    mtu: None,
                    extensions_at: None,
                });
                self.arrives(at, flow, icmp, bytes);
            }
            Transit::Delivered { at, .. } => {
                let reply = self.reply(flow, &bytes);
                self.arrives(2 * at - self.at, flow, None, reply);
            }
            Transit::Lost | Transit::Rejected { .. } => {}
        }
    }

    fn reply(&mut self, flow: u8, request: &[u8]) -> Vec<u8> {
        let from = ([192, 0, 2, 1], 40_000 + u16::from(flow)).into();
        self.responder.received(request, &Arrival { from, ..self.arrival(0, None) });
        let now = self.now();
        let mut reply = Vec::new();
        loop {
            match self.responder.step(now, &mut HostDrops::default(), &mut reply) {
                Step::Send(_) | Step::Report(_) => {}
                Step::Wait(_) | Step::Finished => return reply,
            }
        }
    }

    /// Steps the enumerator until it waits, and returns until when; `None`: it has finished.
    fn drive(&mut self) -> Option<u64> {
        let mut steps = 0;
        loop {
            steps += 1;
            assert!(steps < 10_000, "it waits at last");
            let mut arena = Vec::new();
            match self.enumerator.step(self.now(), &mut HostDrops::default(), &mut arena) {
                Step::Send(send) => self.send(&send, arena),
                Step::Report(report) => self.count(report),
                Step::Wait(until) => {
                    assert!(until > self.timestamp(), "the deadline is in the future");
                    self.check_balance();
                    return Some(until.since(TraceWorld::start()).as_nanos() as u64);
                }
                Step::Finished => {
                    assert_eq!(self.enumerator.in_flight(), 0);
                    self.check_balance();
                    return None;
                }
            }
        }
    }

    fn count(&mut self, report: EnumerationReport) {
        assert!(self.enumerated.is_none(), "the result is the last report");
        let counts = &mut self.counts;
        match report {
            EnumerationReport::Sent { .. } => counts.sent += 1,
            EnumerationReport::Answered { .. } => counts.answered += 1,
            EnumerationReport::Unanswered { .. } => counts.unanswered += 1,
            EnumerationReport::Withdrawn => counts.withdrawn += 1,
            EnumerationReport::SendError(_) => counts.send_errors += 1,
            EnumerationReport::Deferred(_) => counts.deferred += 1,
            EnumerationReport::Unmatched => counts.unmatched += 1,
            EnumerationReport::Enumerated(enumerated) => self.enumerated = Some(*enumerated),
        }
    }

    fn receive(&mut self, bytes: &[u8], arrival: &Arrival) {
        self.foreign += usize::from(!self.enumerator.owns(bytes, arrival));
        self.enumerator.received(bytes, arrival);
    }

    /// Every probe that left is decided once, or in flight, and nothing that is owned belongs to no probe.
    fn check_balance(&self) {
        assert_eq!(self.counts.unmatched, self.foreign);
        let Counts { sent, answered, unanswered, withdrawn, .. } = self.counts;
        assert_eq!(
            sent,
            answered + unanswered + withdrawn + self.enumerator.in_flight(),
            "{:?}",
            self.counts
        );
    }

    /// Runs until the time or the end, and returns whether it has finished.
    fn run_until(&mut self, end: u64) -> bool {
        loop {
            let Some(until) = self.drive() else { return true };
            let next = self.arrivals.keys().next().map_or(u64::MAX, |(at, _)| *at);
            let at = until.min(next);
            if at > end {
                self.at = end;
                return false;
            }
            self.at = self.at.max(at);
            while let Some(first) = self.arrivals.first_entry().filter(|entry| entry.key().0 <= self.at) {
                let (arrival, bytes) = first.remove();
                let arrival = Arrival { at: self.timestamp(), ..arrival };
                self.receive(&bytes, &arrival);
            }
        }
    }

    fn run(mut self) -> (Enumerated, Counts) {
        assert!(self.run_until(3_600_000 * MS), "an hour suffices: {:?}", self.counts);
        (self.enumerated.expect("it has ended"), self.counts)
    }
}

/// The routers that were found at each hop.
fn found(enumerated: &Enumerated) -> Vec<BTreeSet<IpAddr>> {
    let hops = enumerated.paths.hops.iter();
    hops.map(|hop| hop.routers.iter().map(|router| router.address).collect()).collect()
}

/// The routers that the first flows pass at each hop.
fn passed(network: &RouterNetwork, flows: u64) -> Vec<BTreeSet<IpAddr>> {
    let routes: Vec<_> = (0..flows).map(|flow| network.route(flow)).collect();
    let at = |hop: usize| routes.iter().filter_map(|route| route[hop]).collect();
    (0..network.segments.len()).map(at).collect()
}

fn completeness(enumerated: &Enumerated) -> Vec<Completeness> {
    enumerated.paths.hops.iter().map(|hop| hop.completeness).collect()
}

#[test]
fn all_equal_cost_paths_are_found_in_both_modes_and_whatever_routers_quote() {
    for quoted_bytes in [0, 4, 520] {
        for keys in [None, Some(Arc::new(Keys::parse("0123456789abcdef").unwrap()))] {
            let mut network = network(&[1, 2, 4, 1]);
            let routers = network.segments.iter_mut().flat_map(|segment| &mut segment.routers);
            routers.for_each(|router| router.quoted_bytes = quoted_bytes);
            let spec = TraceSpec { keys, ..spec(7, 96, unlimited()) };
            let (enumerated, counts) = World::new(spec, network.clone()).run();
            let mut expected = passed(&network, 96);
            expected.push(BTreeSet::new());
            assert_eq!(found(&enumerated), expected, "{quoted_bytes} bytes");
            assert_eq!(completeness(&enumerated), [Completeness::Complete; 5], "{quoted_bytes} bytes");
            assert_eq!(enumerated.paths.end, EnumerationEnd::Destination);
            assert_eq!(counts.sent, enumerated.paths.probes as usize);
            assert_eq!((counts.unanswered, counts.unmatched, counts.deferred), (0, 0, 0));
            // A round trip each, for hops that are 2 to 10 ms away.
            assert!(enumerated.duration < Duration::from_secs(1), "{:?}", enumerated.duration);
        }
    }
}

#[test]
fn third_party_reflectors_are_recognised_as_the_destination() {
    for profile in [Profile::Detect, Profile::Stamp, Profile::Plain, Profile::TwampLight] {
        let quirks = Some(Quirks { profile, ..Quirks::default() });
        let spec = TraceSpec { quirks, ..spec(7, 96, unlimited()) };
        let (enumerated, counts) = World::new(spec, network(&[1, 2])).run();
        assert_eq!(completeness(&enumerated), [Completeness::Complete; 3], "{profile:?}");
        assert_eq!(enumerated.paths.end, EnumerationEnd::Destination, "{profile:?}");
        assert_eq!((counts.unanswered, counts.unmatched), (0, 0), "{profile:?}");
    }
}

#[test]
fn budget_is_kept_so_that_routers_that_limit_their_answers_answer_all_probes() {
    let mut network = network(&[1, 4, 1]);
    for router in network.segments.iter_mut().flat_map(|segment| &mut segment.routers) {
        router.answers = Answers::Limited { per_second: 1.0, burst: 6.0 };
    }
    let (enumerated, counts) = World::new(spec(3, 96, ProbeLimits::default()), network.clone()).run();
    assert_eq!(completeness(&enumerated), [Completeness::Complete; 4]);
    assert_eq!(counts.unanswered, 0);
    assert!(counts.deferred > 0);
    let mut expected = passed(&network, 96);
    expected.push(BTreeSet::new());
    assert_eq!(found(&enumerated), expected);
    assert!(enumerated.duration > Duration::from_secs(20), "{:?}", enumerated.duration);
}

#[test]
fn hop_that_limits_its_answers_is_never_complete_while_flows_stay_unanswered() {
    for seed in seeds(50) {
        let mut network = network(&[1, 2, 1]);
        for router in &mut network.segments[1].routers {
            router.answers = Answers::Limited { per_second: 0.1, burst: 2.0 };
        }
        let (enumerated, _) = World::new(spec(seed, 96, unlimited()), network).run();
        let hop = &enumerated.paths.hops[1];
        assert_eq!(hop.completeness == Completeness::PartlySilent, !hop.unanswered_flows.is_empty());
        assert!(!hop.routers.is_empty(), "SIM_SEED={seed}");
    }
}

#[test]
fn loss_is_retried_and_every_probe_is_decided_once() {
    for seed in seeds(100) {
        let mut network = network(&[1, 3, 1, 2]);
        for router in network.segments.iter_mut().flat_map(|segment| &mut segment.routers) {
            (router.loss, router.answers) = (0.02, Answers::Share(0.95));
        }
        let mut world = World::new(spec(seed, 96, unlimited()), network.clone());
        world.refused = 0.01;
        let (enumerated, counts) = world.run();
        assert_eq!(enumerated.paths.probes as usize, counts.sent + counts.send_errors, "SIM_SEED={seed}");
        let passed = passed(&network, 96);
        for (hop, found) in found(&enumerated).iter().enumerate().take(passed.len()) {
            assert!(found.is_subset(&passed[hop]), "SIM_SEED={seed}");
        }
        let has_silent_flow = enumerated.paths.hops.iter().any(|hop| !hop.unanswered_flows.is_empty());
        assert!(enumerated.paths.end == EnumerationEnd::Destination || has_silent_flow, "SIM_SEED={seed}");
    }
}

#[test]
fn per_packet_balancing_is_marked() {
    let mut network = network(&[1, 8, 1]);
    network.segments[1].balance = Balance::PerPacket;
    let (enumerated, _) = World::new(spec(5, 96, unlimited()), network).run();
    let expected = [
        Completeness::Complete,
        Completeness::PerPacket,
        Completeness::CompleteIfUniform,
        Completeness::Complete,
    ];
    assert_eq!(completeness(&enumerated), expected);
    assert!(enumerated.paths.probes < 50, "{}", enumerated.paths.probes);
}

#[test]
fn suspended_host_withdraws_its_probes_and_goes_on() {
    let mut world = World::new(spec(2, 96, unlimited()), network(&[1, 4, 1]));
    for interruption in 1..20 {
        if world.run_until(interruption * MS) {
            break;
        }
        world.enumerator.withdraw();
        assert_eq!(world.enumerator.in_flight(), 0);
    }
    let (enumerated, counts) = world.run();
    assert!(counts.withdrawn > 0);
    assert_eq!(completeness(&enumerated), [Completeness::Complete; 4]);
    assert!(enumerated.paths.hops.iter().all(|hop| hop.unanswered_flows.is_empty()));
}

#[test]
fn stopped_enumerator_finishes_at_once_without_a_result() {
    let mut world = World::new(spec(2, 96, ProbeLimits::default()), network(&[1, 4, 1]));
    assert!(!world.run_until(MS));
    assert!(world.enumerator.in_flight() > 0);
    world.enumerator.stop();
    assert_eq!(world.drive(), None);
    assert!(world.enumerated.is_none());
    assert!(world.counts.withdrawn > 0);
}

#[test]
fn unreachable_destination_and_refused_probes_end_the_enumeration() {
    let mut dark = network(&[1, 1]);
    dark.is_reachable = false;
    let (enumerated, _) = World::new(spec(2, 96, unlimited()), dark).run();
    assert_eq!(enumerated.paths.end, EnumerationEnd::Silent);
    assert_eq!(enumerated.paths.hops.len(), 2 + Enumeration::SILENT_HOPS_MAX);
    let mut world = World::new(spec(2, 96, unlimited()), network(&[1, 1]));
    world.refused = 1.0;
    let (enumerated, counts) = world.run();
    assert_eq!(enumerated.paths.end, EnumerationEnd::Limited(EnumerationLimit::NotSent));
    assert_eq!((counts.sent, counts.send_errors), (0, Enumeration::NOT_SENT_MAX as usize));
}

/// The first probe of an enumerator, and the world that it asks.
fn first_probe(spec: TraceSpec) -> (World, Send, Vec<u8>) {
    let (mut world, mut bytes) = (World::new(spec, network(&[1, 1])), Vec::new());
    let Step::Send(send) = world.enumerator.step(world.now(), &mut HostDrops::default(), &mut bytes) else {
        panic!("it begins at once")
    };
    world.enumerator.sent(send.id, world.timestamp(), TimestampSource::Kernel);
    (world, send, bytes)
}

#[test]
fn rejection_that_quotes_a_probe_is_owned_but_is_no_answer() {
    let (mut world, send, bytes) = first_probe(spec(2, 96, unlimited()));
    let other_number = [bytes[0], bytes[1], bytes[2], !bytes[3]];
    let mut answered = 0;
    for (kind, quoted, is_owned) in [
        (IcmpKind::Prohibited, &bytes[..], true),
        (IcmpKind::Prohibited, &bytes[..4], true),
        (IcmpKind::Prohibited, &bytes[..3], false),
        (IcmpKind::PortUnreachable, &[], false),
        (IcmpKind::TtlExceeded, &other_number, false),
        (IcmpKind::TtlExceeded, &bytes[..4], true),
        (IcmpKind::TtlExceeded, &bytes, true),
    ] {
        let router = [10, 0, 0, 0].into();
        let icmp = Some(IcmpError { router, kind, code: 0, mtu: None, extensions_at: None });
        let arrival = world.arrival(send.flow, icmp);
        assert_eq!(world.enumerator.owns(quoted, &arrival), is_owned, "{kind:?} {}", quoted.len());
        world.receive(quoted, &arrival);
        // The first one; the second is ignored.
        answered |= usize::from(is_owned && kind == IcmpKind::TtlExceeded);
        assert_eq!(world.enumerator.in_flight(), 1 - answered, "{kind:?} {}", quoted.len());
    }
    let (_, counts) = world.run();
    assert_eq!(counts.unmatched, 3);
}

#[test]
fn error_that_quotes_too_little_answers_the_only_probe_of_its_flow() {
    let (mut world, send, bytes) = first_probe(spec(2, 96, unlimited()));
    let router = [10, 0, 0, 0].into();
    let icmp =
        Some(IcmpError { router, kind: IcmpKind::TtlExceeded, code: 0, mtu: None, extensions_at: None });
    let other = world.arrival(send.flow + 1, icmp);
    world.receive(&bytes[..3], &other);
    assert_eq!((world.foreign, world.enumerator.in_flight()), (1, 1));
    let own = world.arrival(send.flow, icmp);
    world.receive(&bytes[..3], &own);
    assert_eq!((world.foreign, world.enumerator.in_flight()), (1, 0));
}

#[test]
fn request_has_the_session_of_its_flow_unless_the_reflector_expects_none() {
    for (profile, has_ssid) in
        [(None, true), (Some(Profile::Stamp), true), (Some(Profile::TwampLight), false)]
    {
        let quirks = profile.map(|profile| Quirks { profile, ..Quirks::default() });
        let spec = TraceSpec { quirks, ..spec(2, 96, unlimited()) };
        let ssids = spec.ssids.clone();
        let (_, send, bytes) = first_probe(spec);
        // RFC 8972 section 3.
        let ssid = u16::from_be_bytes([bytes[14], bytes[15]]);
        assert_eq!(ssid, if has_ssid { ssids[usize::from(send.flow)] } else { 0 }, "{profile:?}");
    }
}

#[test]
fn answers_that_belong_to_no_probe_are_counted_and_add_nothing() {
    let mut world = World::new(spec(2, 96, unlimited()), network(&[1, 1]));
    world.drive();
    let icmp = Some(IcmpError {
        router: [10, 9, 9, 9].into(),
        kind: IcmpKind::TtlExceeded,
        code: 0,
        mtu: None,
        extensions_at: None,
    });
    for (flow, bytes) in [(95, vec![]), (0, vec![0; 44]), (0, vec![1; 5])] {
        let arrival = world.arrival(flow, icmp);
        world.receive(&bytes, &arrival);
        world.receive(&bytes, &Arrival { icmp: None, ..arrival });
    }
    assert_eq!(world.foreign, 6);
    world.enumerator.sent(SendId(1), TraceWorld::start(), TimestampSource::Kernel);
    world.enumerator.not_sent(SendId(1), NotSent::Other);
    let (enumerated, counts) = world.run();
    assert_eq!(counts.unmatched, 6);
    assert!(!found(&enumerated).iter().flatten().any(|router| *router == IpAddr::from([10, 9, 9, 9])));
}
