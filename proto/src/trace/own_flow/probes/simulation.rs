//! A tracer whose probes are sent on a simulated connection.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::tests::{echo_reply, healthy, repeated, report};
use super::*;
use crate::dscp::Dscp;
use crate::machine::{
    Arrival, HostDrops, IcmpError, IcmpKind, Machine as _, Now, Send, Step, TimestampSource,
};
use crate::probe_budget::{ProbeBudget, ProbeLimits, TokenRate};
use crate::schedule::mix;
use crate::time::{WallOffset, WallTime};
use crate::trace::{Direction, ProbeProtocol, Route, TraceReport, TraceSpec, Tracer};

const LOCAL: ([u8; 4], u16) = ([192, 0, 2, 1], 50_000);
const PEER: ([u8; 4], u16) = ([198, 51, 100, 7], 443);

/// Time between two echoes.
const ECHOES: Duration = Duration::from_millis(200);

/// Linux repeats an acknowledgment no more often.
const PEER_SPACING: Duration = Duration::from_millis(500);

fn at(milliseconds: u64) -> Timestamp {
    Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
}

/// The path and its faults.
#[derive(Debug, Clone, Copy)]
struct Network {
    routers: u8,
    rtt: Duration,
    /// Packets that are lost, in thousandths, each way.
    lost: u64,
    /// Whether a router does not answer.
    has_silent_router: bool,
    seed: u64,
}

/// What arrives at this host.
#[derive(Debug)]
enum Arriving {
    OfRouter(IpAddr, Vec<u8>),
    Repeated,
    /// After loss or reordering of data.
    RepeatedWithSack,
}

struct World {
    network: Network,
    tracer: Tracer,
    probes: ConnectionProbes,
    waiting: Option<(Send, Vec<u8>)>,
    arriving: BTreeMap<(Timestamp, u64), Arriving>,
    random: u64,
    repeated_at: Option<Timestamp>,
    echoed: u32,
    reports: Vec<TraceReport>,
    time: Timestamp,
}

impl World {
    fn new(network: Network) -> Self {
        let none = TokenRate::UNLIMITED;
        let limits = ProbeLimits { router_v4: none, router_v6: none, agent: none, others: none };
        let spec = TraceSpec {
            protocol: ProbeProtocol::Tcp,
            to: PEER.into(),
            ssids: vec![0],
            interval: Duration::from_secs(10),
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
            seed: network.seed,
        };
        let mut probes = ConnectionProbes::new(30, at(0));
        probes.opened(1, LOCAL.into(), PEER.into(), at(0));
        Self {
            network,
            tracer: Tracer::new(spec, at(0)),
            probes,
            waiting: None,
            arriving: BTreeMap::new(),
            random: network.seed,
            repeated_at: None,
            echoed: 0,
            reports: Vec::new(),
            time: at(0),
        }
    }

    fn is_lost(&mut self) -> bool {
        self.random = mix(self.random + 1);
        self.random % 1_000 < self.network.lost
    }

    /// A delay of up to a tenth of the RTT more.
    fn arrives(&mut self, what: Arriving) {
        self.random = mix(self.random + 1);
        let more = u32::try_from(self.random % 100).unwrap();
        let due = self.time + self.network.rtt + self.network.rtt * more / 1_000;
        self.arriving.insert((due, self.random), what);
    }

    /// A segment without data leaves.
    fn leaves(&mut self, ttl: u8, segment: &[u8]) {
        let Network { routers, rtt, has_silent_router, .. } = self.network;
        if self.is_lost() || self.is_lost() {
            return;
        }
        if ttl <= routers {
            if !has_silent_router || ttl != routers / 2 + 1 {
                self.arrives(Arriving::OfRouter([10, 0, 0, ttl].into(), report(segment)));
            }
            return;
        }
        let arrives = self.time + rtt / 2;
        if self.repeated_at.is_none_or(|last| last + PEER_SPACING <= arrives) {
            self.repeated_at = Some(arrives);
            self.arrives(Arriving::Repeated);
        }
    }

    /// An echo is answered. Sometimes its data was lost or reordered.
    fn echo(&mut self) {
        self.echoed += 1;
        self.probes.delivered(healthy(u64::from(self.echoed) * 100), self.time);
        let _ = self.probes.received(echo_reply(self.echoed), 64 - self.network.routers, self.time);
        if self.is_lost() {
            self.arrives(Arriving::RepeatedWithSack);
        }
    }

    fn receive(&mut self, what: Arriving) {
        let answer = match what {
            Arriving::OfRouter(router, message) => self.probes.message_received(&message, router),
            Arriving::Repeated => self.probes.received(repeated(self.echoed), 60, self.time),
            Arriving::RepeatedWithSack => {
                let segment = ReceivedSegment { has_sack: true, ..repeated(self.echoed) };
                self.probes.received(segment, 60, self.time)
            }
        };
        let Some(ProbeAnswer { identifier, router, .. }) = answer else { return };
        let kind = IcmpKind::TtlExceeded;
        let icmp = router.map(|router| IcmpError { router, kind, code: 0, mtu: None, extensions_at: None });
        let (at, by, from) = (self.time, TimestampSource::Kernel, PEER.into());
        let arrival = Arrival { at, by, from, to: None, flow: 0, ttl: None, tos: None, icmp };
        self.tracer.received(&identifier, &arrival);
    }

    /// Sends what may be sent, and returns until when nothing happens.
    fn drive(&mut self) -> Timestamp {
        if let Some((ttl, segment)) = self.probes.test(self.time) {
            self.probes.tested(ttl, self.time);
            self.leaves(ttl, &segment);
        }
        let change = self.probes.change(self.time);
        assert_eq!(change, None, "{:?} at {:?}: {:?}", self.network, self.time, self.probes);
        loop {
            if let Some((send, identifier)) = self.waiting.take() {
                match self.probes.step(send.ttl, self.time) {
                    ProbeStep::Wait(until) => {
                        self.waiting = Some((send, identifier));
                        return until;
                    }
                    ProbeStep::Segment(segment) => {
                        self.probes.sent(send.ttl, identifier, self.time);
                        self.tracer.sent(send.id, self.time, TimestampSource::User);
                        self.leaves(send.ttl, &segment);
                    }
                    ProbeStep::Syn => panic!("there is a connection"),
                }
            }
            let wall = WallOffset::between(
                Timestamp::from_nanos(0),
                WallTime::from_nanos(1_767_225_600_000_000_000),
            );
            let now = Now { at: self.time, drained: self.time, wall };
            let mut identifier = Vec::new();
            match self.tracer.step(now, &mut HostDrops::default(), &mut identifier) {
                Step::Send(send) => self.waiting = Some((send, identifier)),
                Step::Report(report) => self.reports.push(report.report),
                Step::Wait(until) => return until,
                Step::Finished => panic!("it is not stopped"),
            }
        }
    }

    fn run_until(&mut self, end: Timestamp) {
        let mut next_echo = self.time + ECHOES;
        while self.time < end {
            let until = self.drive().min(next_echo).max(self.time + Duration::from_micros(100));
            let first = self.arriving.keys().next().map_or(until, |(due, _)| until.min(*due));
            self.time = first.min(end);
            while let Some(entry) = self.arriving.first_entry()
                && entry.key().0 <= self.time
            {
                let what = entry.remove();
                self.receive(what);
            }
            if next_echo <= self.time {
                next_echo = next_echo + ECHOES;
                self.echo();
            }
        }
    }

    fn route(&self) -> Option<&Route> {
        self.tracer.routes(Direction::Forward).next().flatten()
    }
}

/// Whatever is lost or late, the number of routers is the true one, no change is reported, and each probe has
/// at most one answer.
#[test]
fn routes_of_connections_are_right_over_lossy_and_slow_paths() {
    let (mut exact, mut all) = (0, 0);
    for seed in 0..240 {
        let random = mix(seed);
        let network = Network {
            routers: u8::try_from(random % 13).unwrap(),
            rtt: Duration::from_micros(
                [40, 1_000, 20_000, 200_000][usize::try_from(random >> 8).unwrap() % 4],
            ),
            lost: [0, 0, 10, 50][usize::try_from(random >> 16).unwrap() % 4],
            has_silent_router: random >> 24 & 3 == 0 && random % 13 > 2,
            seed,
        };
        let mut world = World::new(network);
        world.run_until(at(120_000));
        let mut changes = 0;
        let mut counts = [0; 3];
        for report in &world.reports {
            match report {
                TraceReport::Route { .. } => changes += 1,
                TraceReport::Sent { .. } => counts[0] += 1,
                TraceReport::Answered { .. } => counts[1] += 1,
                TraceReport::Unanswered { .. } => counts[2] += 1,
                TraceReport::Unmatched => panic!("{network:?}: an answer to no probe"),
                TraceReport::Reachability(change) => panic!("{network:?}: {change:?}"),
                TraceReport::Rejected { .. }
                | TraceReport::Withdrawn
                | TraceReport::SendError(_)
                | TraceReport::Deferred(_)
                | TraceReport::Traced(_)
                | TraceReport::LossyFlow { .. }
                | TraceReport::TtlClamped { .. } => {}
            }
        }
        let [sent, answered, unanswered] = counts;
        assert_eq!(sent, answered + unanswered + world.tracer.in_flight(), "{network:?}");
        assert!(changes == 0 || network.lost > 10, "{network:?}: {changes} changes");
        let routers = world.route().and_then(|route| route.routers);
        all += 1;
        exact += u32::from(routers == Some(network.routers));
        if network.lost == 0 {
            assert_eq!(routers, Some(network.routers), "{network:?}");
        }
    }
    assert!(exact * 100 >= all * 98, "{exact} of {all}");
}
