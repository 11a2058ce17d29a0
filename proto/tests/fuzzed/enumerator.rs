//! Enumerators of equal-cost paths under arbitrary sequences of driver and network events.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pathmeter_proto::admission::Policy;
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::StampResponder;
use pathmeter_proto::machine::{
    Arrival, HostDrops, IcmpError, IcmpKind, Machine as _, NotSent, SendId, Step, TimestampSource,
};
use pathmeter_proto::probe_budget::{ProbeBudget, ProbeLimits, TokenRate};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{
    Completeness, Enumerated, Enumeration, EnumerationReport, Enumerator, ProbeProtocol, TraceSpec,
};

use super::machines::{answer, arrival, now, source, start};
use super::{Input, keys};

/// Arbitrary events in arbitrary order: every probe that left is reported once and decided once, the limits
/// are kept, only routers that answered are reported, and the enumerator finishes when it is stopped.
///
/// Input: flags, the number of flows, the number of hops, then records of an operation and its parameters.
pub(crate) fn enumerator(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (flags, flows, hops) = (input.byte(), input.byte(), input.byte());
    let keys = (flags & 1 != 0).then(|| Arc::new(keys()));
    let policy = Policy { open: true, rate: u64::MAX, rate_per_source: u64::MAX, ..Policy::default() };
    let none = TokenRate::UNLIMITED;
    let limits = match flags & 2 == 0 {
        true => ProbeLimits::default(),
        false => ProbeLimits { router_v4: none, router_v6: none, agent: none, others: none },
    };
    let spec = TraceSpec {
        protocol: ProbeProtocol::Udp,
        to: source(0),
        ssids: (1..=u16::from(flows)).collect(),
        interval: Duration::from_secs(30),
        hops_max: 1 + hops % 32,
        answer_wait: None,
        dscp: Dscp::DEFAULT,
        keys: keys.clone(),
        quirks: None,
        tx_timestamps: flags & 4 != 0,
        traces_reverse: false,
        skips_busy_routers: false,
        missed_since: Vec::new(),
        budget: Arc::new(Mutex::new(ProbeBudget::new(limits))),
        seed: flags.into(),
    };
    let mut run = Run {
        flows: flows.clamp(1, Enumeration::FLOWS_MAX),
        hops_max: spec.hops_max,
        enumerator: Enumerator::new(spec, start()),
        responder: StampResponder::new(policy, keys, 8),
        at: start(),
        left: Vec::new(),
        counts: Counts::default(),
        answered: BTreeSet::new(),
        enumerated: None,
        is_finished: false,
        refuses: false,
    };
    // Each operation sends at most some hundred probes; the limit keeps a run short.
    for _ in 0..600 {
        run.drive();
        if input.is_over() || run.is_finished {
            break;
        }
        run.event(&mut input);
    }
    assert_eq!(run.is_finished, run.enumerated.is_some(), "it finishes by itself with a result only");
    if !run.is_finished {
        run.enumerator.stop();
        run.drive();
        assert!(run.is_finished, "it finishes when it is stopped");
    }
    assert_eq!((run.enumerator.in_flight(), run.counts.undecided()), (0, 0));
}

struct Run {
    enumerator: Enumerator,
    responder: StampResponder,
    flows: u8,
    hops_max: u8,
    at: Timestamp,
    /// Datagrams that were sent or refused, with their flow and TTL.
    left: Vec<(SendId, u8, u8, Vec<u8>)>,
    counts: Counts,
    /// The routers of all errors that were delivered.
    answered: BTreeSet<IpAddr>,
    enumerated: Option<Enumerated>,
    is_finished: bool,
    refuses: bool,
}

#[derive(Debug, Default)]
struct Counts {
    left: usize,
    sent: usize,
    decided: usize,
}

impl Counts {
    fn undecided(&self) -> usize {
        self.sent.checked_sub(self.decided).expect("no probe is decided twice")
    }
}

impl Run {
    fn event(&mut self, input: &mut Input) {
        match input.byte() % 12 {
            0 => self.at = self.at + Duration::from_micros(u64::from(input.byte()) * 100),
            1 => self.at = self.at + Duration::from_millis(u64::from(input.byte()) * 50),
            // Each of the latest probes is answered by a router that depends on its flow and TTL.
            2..=4 => {
                let (count, width) = (usize::from(input.byte()), input.byte() % 20);
                let latest: Vec<_> = self.left.iter().rev().take(count).cloned().collect();
                for (_, flow, ttl, bytes) in latest {
                    let router = flow.wrapping_mul(ttl.wrapping_add(7)) % (width + 1);
                    self.receive_error(&bytes, flow, [10, ttl, 0, router].into(), IcmpKind::TtlExceeded);
                }
            }
            5 => {
                let (damage, at) = (input.byte(), usize::from(input.word()));
                let Some((_, flow, _, request)) = self.chosen(input) else { return };
                let sent = answer(&mut self.responder, &request, &arrival(source(flow), self.at), false);
                let Some((_, mut reply)) = sent else { return };
                let at = at % reply.len();
                reply[at] ^= damage;
                self.enumerator.received(&reply, &Arrival { flow, ..arrival(source(0), self.at) });
            }
            6 => {
                let (len, router) = (usize::from(input.byte()), input.byte());
                let kind = match input.byte() % 6 {
                    0 => IcmpKind::PortUnreachable,
                    1 => IcmpKind::Unreachable,
                    2 => IcmpKind::TooBig,
                    _ => IcmpKind::TtlExceeded,
                };
                let Some((_, flow, _, bytes)) = self.chosen(input) else { return };
                self.receive_error(&bytes[..bytes.len().min(len)], flow, [10, 0, 0, router].into(), kind);
            }
            7 => {
                let len = usize::from(input.byte());
                let (flow, garbage) = (input.byte(), input.take(len).to_vec());
                self.receive_error(&garbage, flow, [10, 0, 0, flow].into(), IcmpKind::TtlExceeded);
                self.enumerator.received(&garbage, &Arrival { flow, ..arrival(source(0), self.at) });
            }
            8 => {
                if let Some((id, ..)) = self.chosen(input) {
                    self.enumerator.sent(id, self.at, TimestampSource::Kernel);
                }
            }
            9 => {
                if let Some((id, ..)) = self.chosen(input) {
                    self.enumerator.not_sent(id, NotSent::Buffer);
                }
            }
            10 => self.refuses = !self.refuses,
            _ => {
                self.enumerator.withdraw();
                self.enumerator.peer_leaving(self.at);
            }
        }
    }

    /// One of the latest datagrams, chosen by the input.
    fn chosen(&self, input: &mut Input) -> Option<(SendId, u8, u8, Vec<u8>)> {
        let back = usize::from(input.byte());
        self.left.iter().rev().nth(back % self.left.len().max(1)).cloned()
    }

    fn receive_error(&mut self, quoted: &[u8], flow: u8, router: IpAddr, kind: IcmpKind) {
        self.answered.insert(router);
        let icmp = Some(IcmpError { router, kind, code: 0, mtu: None, extensions_at: None });
        let arrival = Arrival { flow, icmp, ..arrival(source(0), self.at) };
        let _ = self.enumerator.owns(quoted, &arrival);
        self.enumerator.received(quoted, &arrival);
    }

    /// Steps the enumerator until it waits or has finished.
    fn drive(&mut self) {
        for _ in 0..100_000 {
            let mut arena = Vec::new();
            match self.enumerator.step(now(self.at), &mut HostDrops::default(), &mut arena) {
                Step::Send(send) => {
                    assert!((1..=self.hops_max).contains(&send.ttl) && send.flow < self.flows);
                    match self.refuses {
                        true => self.enumerator.not_sent(send.id, NotSent::Permission),
                        false => {
                            self.enumerator.sent(send.id, self.at, TimestampSource::User);
                            self.counts.left += 1;
                        }
                    }
                    self.left.push((send.id, send.flow, send.ttl, arena));
                }
                Step::Report(report) => self.check(report),
                Step::Wait(until) => {
                    assert!(until > self.at, "the deadline is in the future");
                    assert_eq!(self.enumerator.in_flight(), self.counts.undecided());
                    assert_eq!(self.counts.sent, self.counts.left, "each is reported once");
                    return;
                }
                Step::Finished => {
                    self.is_finished = true;
                    return;
                }
            }
        }
        panic!("the machine never waits");
    }

    fn check(&mut self, report: EnumerationReport) {
        assert!(self.enumerated.is_none(), "the result is the last report");
        match report {
            EnumerationReport::Sent { .. } => self.counts.sent += 1,
            EnumerationReport::Answered { .. }
            | EnumerationReport::Unanswered { .. }
            | EnumerationReport::Withdrawn => self.counts.decided += 1,
            EnumerationReport::SendError(_)
            | EnumerationReport::Deferred(_)
            | EnumerationReport::Unmatched => {}
            EnumerationReport::Enumerated(enumerated) => {
                self.check_result(&enumerated);
                self.enumerated = Some(*enumerated);
            }
        }
    }

    fn check_result(&self, enumerated: &Enumerated) {
        let paths = &enumerated.paths;
        assert!(enumerated.began + enumerated.duration <= self.at, "it has ended");
        assert!(paths.probes <= Enumeration::PROBES_MAX && paths.flows <= self.flows);
        assert!(paths.hops.len() <= usize::from(self.hops_max));
        for hop in &paths.hops {
            assert!(hop.routers.len() <= Enumeration::ROUTERS_MAX);
            assert!(hop.routers.iter().all(|router| self.answered.contains(&router.address)));
            assert!(hop.completeness != Completeness::Complete || hop.unanswered_flows.is_empty());
        }
    }
}
