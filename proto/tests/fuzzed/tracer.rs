//! The tracer under arbitrary sequences of driver and network events.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pathmeter_proto::admission::Policy;
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::StampResponder;
use pathmeter_proto::key::Key;
use pathmeter_proto::machine::{
    Arrival, HostDrops, IcmpError, IcmpKind, Machine, NotSent, SENT_TTL, SendId, Step, TimestampSource,
};
use pathmeter_proto::probe_budget::{ProbeBudget, ProbeLimits, TokenRate};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{
    Direction, Finding, ProbeProtocol, Route, RouteUpdate, Trace, TraceReport, TraceSpec, Tracer, Trigger,
};
use pathmeter_proto::wire::icmp_extensions::IcmpExtensions;
use pathmeter_proto::wire::stamp::{self, Mode};
use pathmeter_proto::wire::tlv;

use super::machines::{answer, arrival, now, source, start};
use super::{Input, keys};

/// Arbitrary events in arbitrary order: in each direction every probe that left is reported once and decided
/// once, traces and routes stay within their limits, and a stopped tracer finishes.
///
/// Input: flags, the number of hops, then records of an operation and its parameters.
pub(crate) fn tracer(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (flags, hops) = (input.byte(), input.byte());
    let keys = (flags & 1 != 0).then(|| Arc::new(keys()));
    let policy = Policy { open: true, rate: u64::MAX, rate_per_source: u64::MAX, ..Policy::default() };
    let unlimited = TokenRate::UNLIMITED;
    let limits = match flags & 4 == 0 {
        true => ProbeLimits::default(),
        false => {
            ProbeLimits { router_v4: unlimited, router_v6: unlimited, agent: unlimited, others: unlimited }
        }
    };
    let spec = TraceSpec {
        protocol: ProbeProtocol::Udp,
        to: source(0),
        ssids: (1..=1 + u16::from(flags >> 3 & 3)).collect(),
        interval: Duration::from_secs([1, 10, 30, 300][usize::from(flags >> 5 & 3)]),
        hops_max: 1 + hops % 64,
        answer_wait: None,
        dscp: Dscp::DEFAULT,
        keys: keys.clone(),
        quirks: None,
        tx_timestamps: flags & 0x80 != 0,
        traces_reverse: flags & 2 != 0,
        skips_busy_routers: false,
        missed_since: Vec::new(),
        budget: Arc::new(Mutex::new(ProbeBudget::new(limits))),
        seed: u64::from(flags),
    };
    let mut run = Run {
        hops_max: spec.hops_max,
        tracer: Tracer::new(spec, start()),
        responder: StampResponder::new(policy, keys.clone(), 8),
        key: keys.map(|keys| keys.current().clone()),
        at: start(),
        left: Vec::new(),
        left_count: 0,
        counts: BTreeMap::new(),
        refuses: false,
    };
    // Each operation sends at most some hundred probes; the limit keeps a run short.
    for _ in 0..600 {
        if input.is_over() {
            break;
        }
        run.event(&mut input);
        assert!(!run.drive(), "it does not finish by itself");
    }
    run.tracer.stop();
    assert!(run.drive(), "it finishes when it is stopped");
    assert_eq!((run.tracer.in_flight(), run.undecided()), (0, 0));
}

struct Run {
    tracer: Tracer,
    responder: StampResponder,
    key: Option<Key>,
    hops_max: u8,
    at: Timestamp,
    /// Datagrams that were sent or refused, with their flow.
    left: Vec<(SendId, u8, Vec<u8>)>,
    /// Number of datagrams that were sent.
    left_count: usize,
    counts: BTreeMap<Direction, Counts>,
    refuses: bool,
}

/// What was reported of one direction.
#[derive(Debug, Default)]
struct Counts {
    /// Probes that left the host, by their TTL.
    sent: BTreeMap<u8, usize>,
    /// Probes that were or were not answered, by their TTL.
    decided: BTreeMap<u8, usize>,
    withdrawn: usize,
}

impl Counts {
    fn undecided(&self) -> usize {
        let [sent, decided] = [&self.sent, &self.decided].map(|counts| counts.values().sum::<usize>());
        sent.checked_sub(decided + self.withdrawn).expect("no probe is decided twice")
    }
}

impl Run {
    fn event(&mut self, input: &mut Input) {
        match input.byte() % 16 {
            0 => self.at = self.at + Duration::from_micros(u64::from(input.byte()) * 100),
            1 => self.at = self.at + Duration::from_millis(u64::from(input.byte()) * 50),
            2 => self.at = self.at + Duration::from_secs(input.byte().into()),
            3..=5 => self.deliver_reply(input),
            6 => {
                let len = usize::from(input.byte());
                let flow = input.byte() % 5;
                let garbage = input.take(len).to_vec();
                self.receive(&garbage, flow, 0, 250);
            }
            7 => {
                let (len, chosen) = (usize::from(input.byte()), self.chosen(input));
                let Some((_, flow, bytes)) = chosen else { return };
                self.receive_error(&bytes[..bytes.len().min(len)], flow, input);
            }
            8 => {
                let len = usize::from(input.byte());
                let flow = input.byte() % 5;
                let garbage = input.take(len).to_vec();
                self.receive_error(&garbage, flow, input);
            }
            9 => {
                let early = Duration::from_micros(u64::from(input.byte()) * 100);
                if let Some((id, ..)) = self.chosen(input) {
                    self.tracer.sent(id, self.at - early, TimestampSource::Kernel);
                }
            }
            10 => self.refuses = !self.refuses,
            11 => {
                if let Some((id, ..)) = self.chosen(input) {
                    self.tracer.not_sent(id, NotSent::Buffer);
                }
            }
            12 => self.tracer.withdraw(),
            13 => self.tracer.peer_leaving(self.at),
            14 => {
                let (flow, direction, routers) = (input.byte() % 5, direction(input), input.byte());
                self.tracer.observe(Finding::Routers { flow, direction, routers }, self.at);
            }
            _ => {
                let (kind, flow) = (input.byte() % 3, input.byte() % 8);
                let of_flow = Some(flow).filter(|flow| *flow < 5);
                let finding = match kind {
                    0 => Finding::Trigger { flow: of_flow, trigger: Trigger::Loss },
                    1 => Finding::Trigger { flow: of_flow, trigger: Trigger::Request },
                    _ => Finding::FlowReplaced { flow },
                };
                self.tracer.observe(finding, self.at);
            }
        }
    }

    /// One of the latest datagrams, chosen by the input.
    fn chosen(&self, input: &mut Input) -> Option<(SendId, u8, Vec<u8>)> {
        let back = usize::from(input.byte());
        self.left.iter().rev().nth(back % self.left.len().max(1)).cloned()
    }

    /// Delivers a reply to one of the latest datagrams, authentic or with changed bytes, sealed again or not.
    /// A reply with a limited TTL may end at a router instead.
    fn deliver_reply(&mut self, input: &mut Input) {
        let Some((_, flow, request)) = self.chosen(input) else { return };
        let from = source(flow + 1);
        let sent = answer(&mut self.responder, &request, &arrival(from, self.at), false);
        let Some((send, mut reply)) = sent else { return };
        let (how, ttl) = (input.byte(), input.byte());
        if send.ttl != SENT_TTL && how & 0x80 == 0 {
            let router = router(input.byte());
            let icmp = Some(IcmpError {
                router,
                kind: IcmpKind::TtlExceeded,
                code: 0,
                mtu: None,
                extensions_at: None,
            });
            self.responder.received(&reply, &Arrival { icmp, ..arrival(from, self.at) });
            return;
        }
        for _ in 0..how & 3 {
            let at = usize::from(input.word()) % reply.len();
            reply[at] ^= input.byte();
        }
        if how & 4 != 0 {
            self.change_reverse_trace(&mut reply, input);
        }
        if how & 8 != 0 {
            reply.truncate(usize::from(input.word()) % (reply.len() + 1));
        }
        if how & 16 != 0 && reply.len() >= Mode::Authenticated.base_bytes() {
            stamp::seal(&mut reply, Mode::Authenticated, self.key.as_ref());
        }
        self.receive(&reply, flow, input.byte(), send.ttl.saturating_sub(ttl % 70));
        if how & 32 != 0 {
            self.receive(&reply, flow, 0, ttl);
        }
    }

    /// Changes bytes of the reverse-trace extension, and seals the extensions again.
    fn change_reverse_trace(&self, reply: &mut [u8], input: &mut Input) {
        let mode = if self.key.is_some() { Mode::Authenticated } else { Mode::Open };
        let Some(found) = tlv::walk(reply, mode.base_bytes()).find(|tlv| tlv.kind == tlv::REVERSE_TRACE)
        else {
            return;
        };
        for _ in 0..input.byte() % 32 {
            let (at, value) = (usize::from(input.byte()), input.byte());
            if let Some(byte) = found.value_mut(reply).get_mut(at) {
                *byte = value;
            }
        }
        let hmac = tlv::walk(reply, mode.base_bytes()).find(|tlv| tlv.kind == tlv::HMAC);
        let length = usize::from(tlv::HMAC_VALUE_BYTES);
        if let (Some(key), Some(hmac)) = (&self.key, hmac.filter(|hmac| hmac.len == length)) {
            tlv::seal(reply, mode.base_bytes(), hmac, key);
        }
    }

    fn receive(&mut self, datagram: &[u8], flow: u8, early: u8, ttl: u8) {
        let arrival = arrival(source(0), self.at - Duration::from_micros(early.into()));
        self.tracer.received(datagram, &Arrival { flow, ttl: Some(ttl), ..arrival });
        self.drive();
    }

    fn receive_error(&mut self, quoted: &[u8], flow: u8, input: &mut Input) {
        let choice = input.byte();
        let kind = match choice % 8 {
            0 => IcmpKind::PortUnreachable,
            1 => IcmpKind::Unreachable,
            2 => IcmpKind::Prohibited,
            3 => IcmpKind::TooBig,
            4 => IcmpKind::Other,
            _ => IcmpKind::TtlExceeded,
        };
        let mut icmp = IcmpError {
            router: router(input.byte()),
            kind,
            code: choice / 8,
            mtu: None,
            extensions_at: None,
        };
        // High numbers of routers attach something: what they quote ends anywhere, and is a structure or not.
        let mut received = quoted.to_vec();
        if icmp.router > router(127) {
            icmp.extensions_at = Some(input.byte().into());
            let entries = input.take(8);
            received.extend(IcmpExtensions::encode(&[(1, 1, entries), (2, input.byte(), entries)]));
        }
        let icmp = Some(icmp);
        let arrival = Arrival { flow, icmp, ..arrival(source(0), self.at) };
        let _ = self.tracer.owns(&received, &arrival);
        self.tracer.received(&received, &arrival);
    }

    fn undecided(&self) -> usize {
        self.counts.values().map(Counts::undecided).sum()
    }

    /// Steps the tracer until it waits, and returns whether it has finished.
    fn drive(&mut self) -> bool {
        for _ in 0..1_000_000 {
            let mut arena = Vec::new();
            match self.tracer.step(now(self.at), &mut HostDrops::default(), &mut arena) {
                Step::Send(send) => {
                    assert!(send.ttl == SENT_TTL || (1..=self.hops_max).contains(&send.ttl));
                    if self.refuses {
                        self.tracer.not_sent(send.id, NotSent::Permission);
                    } else {
                        self.tracer.sent(send.id, self.at, TimestampSource::User);
                        self.left_count += 1;
                    }
                    self.left.push((send.id, send.flow, arena));
                }
                Step::Report(report) => self.check(report.direction, report.report),
                Step::Wait(until) => {
                    assert!(until > self.at, "the deadline is in the future");
                    assert_eq!(self.tracer.in_flight(), self.undecided());
                    let sent = self.counts.values().flat_map(|counts| counts.sent.values());
                    assert_eq!(sent.sum::<usize>(), self.left_count, "each is reported once");
                    return false;
                }
                Step::Finished => return true,
            }
        }
        panic!("the machine never waits");
    }

    fn check(&mut self, direction: Direction, report: TraceReport) {
        let counts = self.counts.entry(direction).or_default();
        match report {
            TraceReport::Sent { ttl } => *counts.sent.entry(ttl).or_default() += 1,
            TraceReport::Answered { ttl, .. } | TraceReport::Unanswered { ttl } => {
                let decided = counts.decided.entry(ttl).or_default();
                *decided += 1;
                assert!(counts.sent.get(&ttl).is_some_and(|sent| *decided <= *sent), "TTL {ttl}");
            }
            TraceReport::Withdrawn => counts.withdrawn += 1,
            TraceReport::Rejected { .. }
            | TraceReport::SendError(_)
            | TraceReport::Deferred(_)
            | TraceReport::Unmatched
            | TraceReport::LossyFlow { .. } => {}
            TraceReport::Traced(trace) => self.check_trace(&trace),
            TraceReport::Route { update, .. } => match *update {
                RouteUpdate::Changed { from, to } | RouteUpdate::Restored { from, to } => {
                    assert_ne!(from.id, to.id);
                    self.check_route(&to);
                }
                RouteUpdate::LoadBalanced { routers, .. } => assert!(routers.len() > 1),
            },
            TraceReport::Reachability(change) => {
                assert_eq!(direction, Direction::Forward);
                assert!(change.since + change.lasted.unwrap_or_default() <= self.at);
                assert!(change.last_hop.is_none_or(|(ttl, _)| (1..=self.hops_max).contains(&ttl)));
            }
            TraceReport::TtlClamped { .. } => {}
        }
        let undecided = self.counts[&direction].undecided();
        assert!(undecided <= self.left_count);
        for route in self.tracer.routes(direction).flatten() {
            self.check_route(route);
        }
    }

    fn check_trace(&self, trace: &Trace) {
        assert!(trace.began + trace.duration <= self.at, "it has ended");
        assert!(trace.hops.len() <= usize::from(self.hops_max));
        assert!(trace.hops.iter().map(|hop| hop.ttl).eq((1..).take(trace.hops.len())));
        assert!(trace.hops.iter().all(|hop| hop.answers.len() <= usize::from(hop.sent)));
        if let (Some(_), Some(routers)) = (trace.rtt, trace.routers) {
            assert_eq!(trace.hops.len(), usize::from(routers.min(self.hops_max)));
        }
        if let Some(ttl) = trace.rejection.and_then(|rejection| rejection.ttl) {
            assert!((1..=self.hops_max).contains(&ttl));
            let is_shown = trace.rtt.is_some() || trace.is_ttl_clamped;
            assert!(is_shown || trace.hops.len() + 1 >= usize::from(ttl), "the hops before it are shown");
        }
        let first_lossy = trace.first_lossy_hop.map_or(0, usize::from);
        assert!(first_lossy <= trace.hops.len(), "the lossy hop is one of the hops");
    }

    /// Every known hop is one that a probe can end at.
    fn check_route(&self, route: &Route) {
        let routers = route.routers.unwrap_or(0);
        assert!(route.hops.len() <= usize::from(self.hops_max.max(routers)), "{} hops", route.hops.len());
    }
}

fn direction(input: &mut Input) -> Direction {
    Direction::ALL[usize::from(input.byte() & 1)]
}

fn router(choice: u8) -> IpAddr {
    [10, 0, 0, choice].into()
}
