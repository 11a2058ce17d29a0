//! Traces that search for the number of routers: ICMP and TCP.

mod replaced_flow;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::machine::{Arrival, HostDrops, IcmpError, IcmpKind, Machine, Now, Send, Step, TimestampSource};
use crate::probe_budget::{Expected, ProbeLimits, TokenRate};
use crate::schedule::mix;
use crate::time::{WallOffset, WallTime};
use crate::wire::NtpTime;
use crate::wire::icmp::{IcmpEcho, IcmpVersion};

const TO: ([u8; 4], u16) = ([192, 0, 2, 2], 443);

const RTT: Duration = Duration::from_millis(10);

fn at(milliseconds: u64) -> Timestamp {
    Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
}

fn spec(budget: &Arc<Mutex<ProbeBudget>>, protocol: ProbeProtocol, seed: u64) -> TraceSpec {
    TraceSpec {
        protocol,
        to: TO.into(),
        ssids: vec![7],
        interval: Duration::from_secs(30),
        hops_max: 30,
        answer_wait: None,
        dscp: Dscp::DEFAULT,
        keys: None,
        quirks: None,
        tx_timestamps: true,
        traces_reverse: true,
        skips_busy_routers: false,
        missed_since: Vec::new(),
        budget: Arc::clone(budget),
        seed,
    }
}

/// What happens to a probe.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Router(u8),
    Destination,
    /// By a firewall of the destination.
    Rejected,
    /// By a router.
    RejectedBy(u8),
    Unanswered,
}

/// A tracer and a network that decides the fate of each probe by its TTL, its number and its time.
struct World<F> {
    tracer: Tracer,
    protocol: ProbeProtocol,
    fate: F,
    answers: VecDeque<(Timestamp, Arrival, Vec<u8>)>,
    reports: Vec<TraceReport>,
    sent: u64,
    /// Probes over TCP that were closed by the next one before they were answered.
    closed: usize,
    /// The most probes that were unanswered at a time.
    in_flight_max: usize,
    time: Timestamp,
}

impl<F: FnMut(u8, u64, Timestamp) -> Fate> World<F> {
    fn new(protocol: ProbeProtocol, seed: u64, fate: F) -> Self {
        let none = TokenRate::UNLIMITED;
        let limits = ProbeLimits { router_v4: none, router_v6: none, agent: none, others: none };
        Self::with(limits, protocol, seed, fate)
    }

    fn with(limits: ProbeLimits, protocol: ProbeProtocol, seed: u64, fate: F) -> Self {
        Self::of(spec(&Arc::new(Mutex::new(ProbeBudget::new(limits))), protocol, seed), fate)
    }

    fn of(spec: TraceSpec, fate: F) -> Self {
        let protocol = spec.protocol;
        let tracer = Tracer::new(spec, at(0));
        let (answers, reports) = (VecDeque::new(), Vec::new());
        Self { tracer, protocol, fate, answers, reports, sent: 0, closed: 0, in_flight_max: 0, time: at(0) }
    }

    fn answer(&mut self, send: &Send, datagram: Vec<u8>) {
        let fate = (self.fate)(send.ttl, self.sent, self.time);
        self.sent += 1;
        let due = self.time + RTT;
        let arrival = Arrival {
            at: due,
            by: TimestampSource::Kernel,
            from: TO.into(),
            to: None,
            flow: send.flow,
            ttl: Some(60),
            tos: None,
            icmp: None,
        };
        match fate {
            Fate::Unanswered => {}
            Fate::Rejected => {
                let kind = IcmpKind::Prohibited;
                let icmp = Some(IcmpError {
                    router: arrival.from.ip(),
                    kind,
                    code: 0,
                    mtu: None,
                    extensions_at: None,
                });
                self.answers.push_back((due, Arrival { icmp, ..arrival }, datagram));
            }
            Fate::RejectedBy(last) => {
                let (router, kind) = (IpAddr::from([10, 0, 0, last]), IcmpKind::Prohibited);
                let icmp = Some(IcmpError { router, kind, code: 13, mtu: None, extensions_at: None });
                self.answers.push_back((due, Arrival { icmp, ..arrival }, datagram));
            }
            Fate::Destination if self.protocol == ProbeProtocol::ClosedPort => {
                let kind = IcmpKind::PortUnreachable;
                let icmp = Some(IcmpError {
                    router: arrival.from.ip(),
                    kind,
                    code: 0,
                    mtu: None,
                    extensions_at: None,
                });
                self.answers.push_back((due, Arrival { icmp, ..arrival }, datagram));
            }
            Fate::Destination => {
                let mut reply = datagram;
                if self.protocol == ProbeProtocol::Icmp {
                    reply[0] = 0;
                }
                self.answers.push_back((due, arrival, reply));
            }
            Fate::Router(last) => {
                let (router, kind) = (IpAddr::from([10, 0, 0, last]), IcmpKind::TtlExceeded);
                let icmp = Some(IcmpError { router, kind, code: 0, mtu: None, extensions_at: None });
                let mut quoted = datagram;
                if self.protocol == ProbeProtocol::Icmp {
                    // The kernel of a ping socket has written its identifier and the checksum.
                    quoted[2..6].copy_from_slice(&[9, 9, 9, 9]);
                    // Every other router quotes no more than the ICMP header.
                    quoted.truncate(if last % 2 == 0 { 8 } else { 32 });
                }
                self.answers.push_back((due, Arrival { icmp, ..arrival }, quoted));
            }
        }
    }

    fn run_until(&mut self, until: Timestamp) {
        let epoch = WallTime::from_nanos(1_767_225_600_000_000_000);
        loop {
            while let Some((due, ..)) = self.answers.front()
                && *due <= self.time
            {
                let (_, arrival, datagram) = self.answers.pop_front().unwrap();
                assert!(self.tracer.owns(&datagram, &arrival));
                self.tracer.received(&datagram, &arrival);
            }
            let wall = WallOffset::between(Timestamp::from_nanos(0), epoch);
            let now = Now { at: self.time, drained: self.time, wall };
            let mut arena = Vec::new();
            match self.tracer.step(now, &mut HostDrops::default(), &mut arena) {
                Step::Send(send) => {
                    self.tracer.sent(send.id, self.time, TimestampSource::User);
                    if self.protocol == ProbeProtocol::Tcp {
                        // Two sockets cannot have the same ports.
                        self.closed += self.answers.len();
                        self.answers.clear();
                    }
                    self.in_flight_max = self.in_flight_max.max(self.answers.len() + 1);
                    self.answer(&send, arena);
                }
                Step::Report(report) => {
                    assert_eq!(report.direction, Direction::Forward, "there is no way back");
                    self.reports.push(report.report);
                }
                Step::Wait(next) => {
                    let next = self.answers.front().map_or(next, |(due, ..)| next.min(*due));
                    if next > until {
                        self.time = until;
                        return;
                    }
                    assert!(next > self.time, "it waits for a later time");
                    self.time = next;
                }
                Step::Finished => return,
            }
        }
    }

    fn traces(&self) -> Vec<&Trace> {
        let mut traces = Vec::new();
        for report in &self.reports {
            if let TraceReport::Traced(trace) = report {
                traces.push(&**trace);
            }
        }
        traces
    }

    fn updates(&self) -> Vec<&RouteUpdate> {
        let mut updates = Vec::new();
        for report in &self.reports {
            if let TraceReport::Route { update, .. } = report {
                updates.push(&**update);
            }
        }
        updates
    }

    /// How long the destination did not answer, of each report about that; `None`: it does not answer.
    fn absences(&self) -> Vec<Option<Duration>> {
        let mut absences = Vec::new();
        for report in &self.reports {
            if let TraceReport::Reachability(change) = report {
                absences.push(change.lasted);
            }
        }
        absences
    }

    /// sent = answered + unanswered + withdrawn + in flight.
    fn check_counts(&self) {
        let count = |is: fn(&TraceReport) -> bool| self.reports.iter().filter(|report| is(report)).count();
        let sent = count(|report| matches!(report, TraceReport::Sent { .. }));
        let answered = count(|report| matches!(report, TraceReport::Answered { .. }));
        let unanswered = count(|report| matches!(report, TraceReport::Unanswered { .. }));
        let withdrawn = count(|report| matches!(report, TraceReport::Withdrawn));
        assert_eq!(sent, answered + unanswered + withdrawn + self.tracer.in_flight());
        assert_eq!(count(|report| matches!(report, TraceReport::Unmatched)), 0);
        assert_eq!(self.closed, 0);
    }
}

/// A route over the routers 1, 2, … of this number.
fn route(ttl: u8, routers: u8) -> Fate {
    if ttl <= routers { Fate::Router(ttl) } else { Fate::Destination }
}

const PROTOCOLS: [ProbeProtocol; 3] = [ProbeProtocol::Icmp, ProbeProtocol::ClosedPort, ProbeProtocol::Tcp];

#[test]
fn every_hop_is_found_and_then_probed_once_in_an_interval() {
    for protocol in PROTOCOLS {
        for routers in [0, 1, 2, 7, 8, 9, 16, 28] {
            let mut world = World::new(protocol, 3, |ttl, _, _| route(ttl, routers));
            world.run_until(at(119_000));
            world.check_counts();
            let traces = world.traces();
            for trace in &traces {
                let found: Vec<IpAddr> = trace.hops.iter().map(|hop| hop.answers[0].router).collect();
                let expected: Vec<IpAddr> = (1..=routers).map(|last| [10, 0, 0, last].into()).collect();
                assert_eq!((found, trace.routers, trace.rtt), (expected, Some(routers), Some(RTT)));
            }
            assert!((3..=5).contains(&traces.len()), "{protocol:?} {routers}: {}", traces.len());
            assert_eq!(traces[0].trigger, Trigger::Start);
            assert_eq!(world.updates(), Vec::<&RouteUpdate>::new());
            let first = traces[0].duration;
            match protocol {
                ProbeProtocol::Tcp => {
                    assert_eq!(world.in_flight_max, 1);
                    assert_eq!(
                        first,
                        RTT * (u32::from(routers) + 2),
                        "one RTT for each hop, after the first"
                    );
                    let rounds = u64::try_from(traces.len()).unwrap();
                    assert!(world.sent <= (u64::from(routers) + 1) * (rounds + 1), "one probe for each hop");
                }
                ProbeProtocol::Icmp | ProbeProtocol::ClosedPort | ProbeProtocol::Udp => {
                    assert!(first < RTT * (u32::from(routers) / 8 + 1) * 4, "{routers}: {first:?}")
                }
            }
        }
    }
}

#[test]
fn destination_that_rejects_probes_is_reached() {
    for protocol in PROTOCOLS {
        let fate = |ttl, _, _| if ttl <= 3 { Fate::Router(ttl) } else { Fate::Rejected };
        let mut world = World::new(protocol, 3, fate);
        world.run_until(at(29_000));
        world.check_counts();
        let trace = world.traces()[0];
        assert_eq!((trace.routers, trace.rtt, trace.hops.len()), (Some(3), Some(RTT), 3), "{protocol:?}");
    }
}

#[test]
fn hops_that_were_left_out_do_not_end_a_search() {
    for protocol in PROTOCOLS {
        let once = TokenRate { spacing: Duration::from_secs(60), burst: 1 };
        let none = TokenRate::UNLIMITED;
        let limits = ProbeLimits { router_v4: once, router_v6: none, agent: none, others: none };
        let fate = |ttl, _, _| if ttl <= 5 { Fate::Router(ttl) } else { Fate::Unanswered };
        let mut budget = ProbeBudget::new(limits);
        for ttl in 1..=3 {
            budget.reserve(Expected::Unknown { ttl, is_v4: true }, at(0));
        }
        let mut world = World::of(spec(&Arc::new(Mutex::new(budget)), protocol, 3), fate);
        world.run_until(at(20_000));
        let hops = &world.traces()[0].hops;
        let answered = hops.iter().filter(|hop| !hop.answers.is_empty()).map(|hop| hop.ttl);
        assert!(answered.eq([4, 5]), "{protocol:?}: {hops:?}");
    }
}

/// Sixty targets behind the same three routers, which are asked slowly: every trace reaches its target, and
/// no wrong number of routers is shown while most TTLs wait for their turns.
#[test]
fn targets_that_share_routers_are_reached_and_never_have_a_wrong_distance() {
    for protocol in PROTOCOLS {
        let budget = Arc::new(Mutex::new(ProbeBudget::default()));
        let world = |seed| World::of(spec(&budget, protocol, seed), |ttl, _, _| route(ttl, 3));
        let mut worlds: Vec<_> = (0..60).map(world).collect();
        for second in 1..600 {
            worlds.iter_mut().for_each(|world| world.run_until(at(second * 1_000)));
        }
        for (number, world) in worlds.iter().enumerate() {
            world.check_counts();
            assert_eq!(world.updates(), Vec::<&RouteUpdate>::new());
            let traces = world.traces();
            for trace in &traces {
                let found = (trace.rtt, trace.routers.unwrap_or(3));
                assert_eq!(found, (Some(RTT), 3), "{protocol:?} {number}: {trace:?}");
            }
            let last = traces.last().unwrap();
            assert_eq!(last.routers, Some(3), "{protocol:?} {number}: {last:?}");
        }
    }
}

#[test]
fn tracer_waits_no_longer_than_changed_limits_demand() {
    for protocol in PROTOCOLS {
        let slow = TokenRate { spacing: Duration::from_secs(1_000), burst: 1 };
        let limits = ProbeLimits { router_v4: slow, agent: slow, ..ProbeLimits::default() };
        let budget = Arc::new(Mutex::new(ProbeBudget::new(limits)));
        let mut world = World::of(spec(&budget, protocol, 3), |ttl, _, _| route(ttl, 3));
        world.run_until(at(100_000));
        budget.lock().unwrap().set_limits(ProbeLimits::default(), at(100_000));
        world.run_until(at(160_000));
        let last = *world.traces().last().unwrap();
        assert_eq!(last.routers, Some(3), "{protocol:?}: {last:?}");
        assert!(last.hops.iter().all(|hop| !hop.answers.is_empty()), "{protocol:?}: {last:?}");
    }
}

#[test]
fn tracer_that_skips_busy_routers_reserves_no_turn() {
    for protocol in PROTOCOLS {
        let budget = Arc::new(Mutex::new(ProbeBudget::default()));
        let mut found = Vec::new();
        for seed in 0..200 {
            let spec = TraceSpec { skips_busy_routers: true, ..spec(&budget, protocol, seed) };
            let mut world = World::of(spec, |ttl, _, _| route(ttl, 3));
            world.run_until(at(900));
            world.check_counts();
            let hops = world.traces().into_iter().flat_map(|trace| &trace.hops);
            found.push(hops.filter(|hop| hop.sent > 0).count());
        }
        assert_eq!(found[0], 3, "{protocol:?}");
        assert_eq!(found[199], 0, "{protocol:?}: the routers have answered in the same second");
        let mut budget = budget.lock().unwrap();
        let turns =
            [1, 2, 3].map(|last| budget.reserve(Expected::Router([10, 0, 0, last].into()), at(900)).0);
        assert!(turns.iter().all(|turn| *turn <= at(900) + Duration::from_millis(1_250)), "{protocol:?}");
    }
}

#[test]
fn probes_with_a_full_ttl_that_end_are_no_rewriting_of_an_agent() {
    for protocol in PROTOCOLS {
        let fate = |ttl, _, _| if ttl == DESTINATION { Fate::Router(9) } else { route(ttl, 3) };
        let mut world = World::new(protocol, 3, fate);
        world.run_until(at(119_000));
        world.check_counts();
        assert!(world.traces().iter().all(|trace| trace.routers == Some(3) && !trace.is_ttl_clamped));
    }
}

#[test]
fn routers_that_limit_their_answers_are_asked_slowly_and_all_probes_are_answered() {
    for protocol in PROTOCOLS {
        for seed in 0..20 {
            // One router at all hops: probes wait for their turns, and become due together with others.
            let mut world = World::with(ProbeLimits::default(), protocol, seed, |ttl, _, _| match ttl {
                1..=9 => Fate::Router(1),
                _ => Fate::Destination,
            });
            world.run_until(at(60_000));
            world.tracer.trigger(None, Trigger::Request);
            world.run_until(at(600_000));
            world.check_counts();
            let unanswered =
                world.reports.iter().filter(|report| matches!(report, TraceReport::Unanswered { .. }));
            assert_eq!(unanswered.count(), 0, "{protocol:?} {seed}");
            assert!(world.reports.iter().any(|report| matches!(report, TraceReport::Deferred(_))));
        }
    }
}

#[test]
fn longer_and_shorter_routes_are_events_with_both_routes() {
    for protocol in PROTOCOLS {
        for (before, after) in [(5, 7), (7, 5), (4, 5), (5, 4), (0, 1), (1, 0), (9, 3)] {
            let mut world = World::new(protocol, 11, move |ttl, _, time| {
                route(ttl, if time < at(40_000) { before } else { after })
            });
            world.run_until(at(200_000));
            world.check_counts();
            let updates = world.updates();
            let [RouteUpdate::Changed { from, to }] = updates[..] else {
                panic!("{protocol:?} {before} to {after}: {updates:?}");
            };
            assert_eq!((from.routers, to.routers), (Some(before), Some(after)));
            assert_eq!(world.traces().last().unwrap().routers, Some(after));
        }
    }
}

#[test]
fn changed_length_is_one_event_although_traces_are_requested_while_it_is_confirmed() {
    for protocol in PROTOCOLS {
        for pause in (20..200).step_by(10) {
            let mut world =
                World::new(protocol, 11, |ttl, _, time| route(ttl, if time < at(40_000) { 5 } else { 7 }));
            for request in 0..60 {
                world.run_until(at(40_000 + request * pause));
                world.tracer.trigger(None, Trigger::Request);
            }
            world.run_until(at(200_000));
            world.check_counts();
            let updates = world.updates();
            assert!(
                matches!(updates[..], [RouteUpdate::Changed { .. }]),
                "{protocol:?} {pause}: {updates:?}"
            );
        }
    }
}

#[test]
fn other_router_at_a_hop_is_an_event_within_an_interval() {
    for protocol in PROTOCOLS {
        let mut world = World::new(protocol, 5, |ttl, _, time| match route(ttl, 6) {
            Fate::Router(3) if time >= at(40_000) => Fate::Router(103),
            fate @ (Fate::Router(_)
            | Fate::Destination
            | Fate::Rejected
            | Fate::RejectedBy(_)
            | Fate::Unanswered) => fate,
        });
        world.run_until(at(75_000));
        let updates = world.updates();
        assert!(matches!(updates[..], [RouteUpdate::Changed { .. }]), "{protocol:?}: {updates:?}");
    }
}

#[test]
fn silent_routers_are_marked_and_the_route_goes_on_behind_them() {
    for protocol in PROTOCOLS {
        for silent in [vec![1], vec![3, 4], vec![6], vec![1, 2, 3, 4, 5, 6]] {
            let is_silent = silent.clone();
            let mut world = World::new(protocol, 5, move |ttl, _, _| match route(ttl, 6) {
                Fate::Router(last) if is_silent.contains(&last) => Fate::Unanswered,
                fate @ (Fate::Router(_)
                | Fate::Destination
                | Fate::Rejected
                | Fate::RejectedBy(_)
                | Fate::Unanswered) => fate,
            });
            world.run_until(at(300_000));
            world.check_counts();
            assert_eq!(world.updates(), Vec::<&RouteUpdate>::new(), "{protocol:?} {silent:?}");
            let traces = world.traces();
            let last = traces.last().unwrap();
            assert_eq!((last.routers, last.rtt.is_some()), (Some(6), true), "{protocol:?} {silent:?}");
            for hop in &last.hops {
                let expected = if silent.contains(&hop.ttl) { HopState::Silent } else { HopState::Answered };
                assert_eq!(hop.state, expected, "{protocol:?} {silent:?} {}", hop.ttl);
            }
        }
    }
}

#[test]
fn loss_and_balancing_per_packet_are_never_a_change() {
    let day = at(24 * 3_600_000);
    for protocol in PROTOCOLS {
        for seed in 0..10 {
            let draw = move |number: u64| mix(number ^ mix(seed));
            // A fifth of all probes and answers is lost.
            let mut world = World::new(protocol, seed, move |ttl, number, _| match draw(number) % 5 {
                0 => Fate::Unanswered,
                _ => route(ttl, 9),
            });
            world.run_until(day);
            world.check_counts();
            assert_eq!(world.updates(), Vec::<&RouteUpdate>::new(), "{protocol:?} {seed}: loss");
            assert_eq!(world.absences(), [], "{protocol:?} {seed}: loss");
            // Packets alternate between routes of five and of six routers.
            let mut world = World::new(protocol, seed, move |ttl, number, _| {
                route(ttl, if draw(number) % 2 == 0 { 5 } else { 6 })
            });
            world.run_until(day);
            world.check_counts();
            let changes = world
                .updates()
                .into_iter()
                .filter(|update| !matches!(update, RouteUpdate::LoadBalanced { .. }));
            assert_eq!(changes.count(), 0, "{protocol:?} {seed}: {:?}", world.updates());
        }
    }
}

#[test]
fn destination_that_is_down_ends_the_trace_and_is_reported_but_is_no_change_of_the_route() {
    for protocol in PROTOCOLS {
        let down = at(100_000)..at(500_000);
        let mut world = World::new(protocol, 5, |ttl, _, time| match route(ttl, 4) {
            Fate::Destination if down.contains(&time) => Fate::Unanswered,
            fate @ (Fate::Router(_)
            | Fate::Destination
            | Fate::Rejected
            | Fate::RejectedBy(_)
            | Fate::Unanswered) => fate,
        });
        world.run_until(at(400_000));
        world.check_counts();
        assert_eq!(world.updates(), Vec::<&RouteUpdate>::new());
        let traces = world.traces();
        let last = traces.last().unwrap();
        assert_eq!((last.rtt, last.hops.len() >= 4), (None, true), "{protocol:?}: {last:?}");
        assert_eq!(world.absences(), [None], "{protocol:?}");
        world.run_until(at(700_000));
        world.check_counts();
        assert_eq!(world.updates(), Vec::<&RouteUpdate>::new());
        let [None, Some(lasted)] = world.absences()[..] else { panic!("{:?}", world.absences()) };
        // From the first probe that was not answered to the first one that was.
        let expected = Duration::from_secs(340)..=Duration::from_secs(440);
        assert!(expected.contains(&lasted), "{protocol:?}: {lasted:?}");
    }
}

#[test]
fn destination_that_answers_echoes_is_not_reported_as_unreachable() {
    for protocol in PROTOCOLS {
        let mut world = World::new(protocol, 5, |ttl, _, time| match route(ttl, 4) {
            Fate::Destination if time >= at(100_000) => Fate::Unanswered,
            fate @ (Fate::Router(_)
            | Fate::Destination
            | Fate::Rejected
            | Fate::RejectedBy(_)
            | Fate::Unanswered) => fate,
        });
        for second in 100..400 {
            world.run_until(at(second * 1_000));
            let missed: Vec<(u8, Timestamp)> = world.tracer.missed().collect();
            // One echo in five seconds is answered.
            if second % 5 == 0 && !missed.is_empty() {
                world.tracer.echo_answered(0, world.time);
                assert_eq!(world.tracer.missed().count(), 0);
            }
        }
        assert_eq!(world.absences(), [], "{protocol:?}");
        world.run_until(at(500_000));
        assert_eq!(world.absences(), [None], "{protocol:?}: without echoes");
        world.tracer.echo_answered(0, world.time);
        world.run_until(at(501_000));
        assert!(matches!(world.absences()[..], [None, Some(_)]), "{protocol:?}");
        world.check_counts();
    }
}

#[test]
fn answers_that_belong_to_no_probe_are_counted_and_ignored() {
    for protocol in PROTOCOLS {
        let mut world = World::new(protocol, 5, |ttl, _, _| route(ttl, 4));
        world.run_until(at(1_000));
        let icmp = IcmpError {
            router: [10, 9, 9, 9].into(),
            kind: IcmpKind::TtlExceeded,
            code: 0,
            mtu: None,
            extensions_at: None,
        };
        let arrival = Arrival {
            at: at(1_000),
            by: TimestampSource::Kernel,
            from: SocketAddr::from(TO),
            to: None,
            flow: 0,
            ttl: None,
            tos: None,
            icmp: None,
        };
        let before = world.traces().len();
        for bytes in [vec![], vec![8, 0, 0, 0, 0, 0, 255, 255], vec![0; 8], vec![7; 40], vec![0xff; 64]] {
            world.tracer.received(&bytes, &arrival);
            world.tracer.received(&bytes, &Arrival { icmp: Some(icmp), ..arrival });
        }
        world.run_until(at(1_100));
        let unmatched =
            world.reports.iter().filter(|report| matches!(report, TraceReport::Unmatched)).count();
        assert_eq!((unmatched, world.traces().len()), (10, before), "{protocol:?}");
    }
}

/// Echo replies do not tell how many routers the request has passed: the number is a guess from their TTL.
#[test]
fn number_of_routers_that_echoes_suggest_is_ignored() {
    for protocol in PROTOCOLS {
        let mut world = World::new(protocol, 3, |ttl, _, _| route(ttl, 5));
        world.run_until(at(1_000));
        for _ in 0..40 {
            let finding = Finding::Routers { flow: 0, direction: Direction::Forward, routers: 9 };
            world.tracer.observe(finding, world.time);
        }
        world.run_until(at(60_000));
        assert_eq!(world.updates(), Vec::<&RouteUpdate>::new(), "{protocol:?}");
        assert!(world.traces().iter().all(|trace| trace.routers == Some(5) && trace.hops.len() == 5));
    }
}

/// Other processes of the host may measure the same target, over ICMP without ports that tell them apart.
#[test]
fn echo_reply_is_owned_if_session_and_time_are_those_of_the_probe() {
    let mut world = World::new(ProbeProtocol::Icmp, 3, |_, _, _| Fate::Unanswered);
    let epoch = WallTime::from_nanos(1_767_225_600_000_000_000);
    let wall = WallOffset::between(Timestamp::from_nanos(0), epoch);
    let (now, mut request) = (Now { at: at(0), drained: at(0), wall }, Vec::new());
    let step = world.tracer.step(now, &mut HostDrops::default(), &mut request);
    assert!(matches!(step, Step::Send(_)));
    let version = IcmpVersion::of(TO.0.into());
    let sent = IcmpEcho::decode_request(&request, version).unwrap();
    for (echo, is_owned) in [
        (sent, true),
        (IcmpEcho { session: !sent.session, ..sent }, false),
        (IcmpEcho { timestamp: NtpTime(sent.timestamp.0 + 1), ..sent }, false),
    ] {
        let mut reply = Vec::new();
        echo.encode(version, IcmpEcho::BYTES, &mut reply);
        reply[0] = 0;
        let arrival = Arrival {
            at: at(10),
            by: TimestampSource::Kernel,
            from: TO.into(),
            to: None,
            flow: 0,
            ttl: Some(60),
            tos: None,
            icmp: None,
        };
        assert_eq!(world.tracer.owns(&reply, &arrival), is_owned, "{echo:?}");
    }
}

#[test]
fn router_that_rejects_probes_ends_the_search() {
    for protocol in [ProbeProtocol::Icmp, ProbeProtocol::ClosedPort, ProbeProtocol::Tcp] {
        // The firewall of router 3 lets those pass whose TTL ends there.
        for (is_before_ttl, hops) in [(true, 2), (false, 3)] {
            let fate = move |ttl: u8, _, _| match ttl {
                1 | 2 => Fate::Router(ttl),
                3 if !is_before_ttl => Fate::Router(3),
                _ => Fate::RejectedBy(3),
            };
            let mut world = World::new(protocol, 1, fate);
            world.run_until(at(1_000));
            let [trace] = world.traces()[..] else { panic!("{protocol:?}") };
            let reason = RejectionReason::Prohibited;
            let expected = Rejection { ttl: Some(3), address: [10, 0, 0, 3].into(), reason, rtt: RTT };
            assert_eq!(trace.rejection, Some(expected), "{protocol:?}");
            assert_eq!((trace.hops.len(), trace.routers, trace.rtt), (hops, None, None), "{protocol:?}");
            assert!(trace.hops.iter().all(|hop| hop.answers.len() == 1), "{protocol:?}");
            assert!(trace.duration < Duration::from_millis(100), "{protocol:?}: {:?}", trace.duration);
            // A wave of eight hops, or one hop after the other.
            let probes = if protocol == ProbeProtocol::Tcp { hops + 2 } else { 9 };
            assert_eq!(world.sent, u64::try_from(probes).unwrap(), "{protocol:?}");
            world.check_counts();
        }
    }
}
