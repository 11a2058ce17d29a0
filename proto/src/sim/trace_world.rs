//! A tracer, a network of routers and a responder.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::random::Random;
use super::routers::{RouterNetwork, Transit};
use crate::admission::Policy;
use crate::echo::StampResponder;
use crate::machine::{
    Arrival, HostDrops, IcmpError, IcmpKind, Machine as _, Now, Send, Step, TimestampSource,
};
use crate::time::{Timestamp, WallOffset, WallTime};
use crate::trace::{DirectedReport, Direction, TraceReport, Tracer};

/// A simulation of a tracer that traces a responder through a network.
#[derive(Debug)]
pub struct TraceWorld {
    /// The network towards the responder.
    pub forward: RouterNetwork,
    /// Changes of that network, by time in nanoseconds.
    pub changes: BTreeMap<u64, RouterNetwork>,
    /// The network from the responder back.
    pub reverse: RouterNetwork,
    /// Changes of that network, by time in nanoseconds.
    pub reverse_changes: BTreeMap<u64, RouterNetwork>,
    /// Share of the replies that are lost on the first link.
    pub reverse_loss: f64,
    /// Longest request that the responder answers, in bytes. Some reflectors drop requests with extensions.
    pub request_bytes_max: usize,
    /// The tracer.
    pub tracer: Tracer,
    responder: StampResponder,
    random: Random,
    events: BTreeMap<(u64, u64), TraceEvent>,
    count: u64,
    at: u64,
    sent: Vec<SentPacket>,
    reverse_reports: Vec<(Duration, TraceReport)>,
}

/// A packet that the tracer sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SentPacket {
    /// Time in nanoseconds.
    pub at: u64,
    /// Its flow.
    pub flow: u8,
    /// Its TTL.
    pub ttl: u8,
    /// The sequence number that it carries.
    pub sequence: u32,
}

#[derive(Debug)]
enum TraceEvent {
    Request {
        flow: u8,
        bytes: Vec<u8>,
        ttl: u8,
    },
    Reply {
        flow: u8,
        bytes: Vec<u8>,
        ttl: u8,
    },
    /// An error about a reply, which the responder receives.
    ReverseError {
        flow: u8,
        quoted: Vec<u8>,
        error: IcmpError,
    },
    Error {
        flow: u8,
        quoted: Vec<u8>,
        error: IcmpError,
    },
}

/// Address of the tracer; the port does not matter.
const TRACER: ([u8; 4], u16) = ([192, 0, 2, 1], 40_000);
/// Address of the responder.
const RESPONDER: ([u8; 4], u16) = ([192, 0, 2, 2], 862);
/// The monotonic clock at true time 0.
const ORIGIN: u64 = 5_000_000_000;

/// Bytes behind the UDP header to which routers pad a quotation before they attach something: 128 with the
/// headers (RFC 4884 section 3).
const PADDED_BYTES: usize = 128 - 28;

/// Attaches an extension structure to a quotation. Returns where it begins; `None` if it is empty.
fn attach(quotation: &mut Vec<u8>, extensions: &[u8]) -> Option<u16> {
    if extensions.is_empty() {
        return None;
    }
    quotation.resize(quotation.len().max(PADDED_BYTES), 0);
    let at = u16::try_from(quotation.len()).expect("quotations are short");
    quotation.extend(extensions);
    Some(at)
}

impl TraceWorld {
    /// Address of the responder, for the specification of the tracer.
    #[must_use]
    pub fn responder_address() -> SocketAddr {
        RESPONDER.into()
    }

    /// The tracer's monotonic clock at true time 0.
    #[must_use]
    pub fn start() -> Timestamp {
        Timestamp::from_nanos(ORIGIN)
    }

    /// A world whose replies take as long as the requests.
    #[must_use]
    pub fn new(tracer: Tracer, forward: RouterNetwork, seed: u64) -> Self {
        let delay: u64 = forward.segments.iter().map(|segment| segment.delay).sum();
        let reverse = RouterNetwork::chain(0, delay + forward.last_delay);
        let policy = Policy { open: true, rate: 1_000_000, rate_per_source: 1_000_000, ..Policy::default() };
        Self {
            forward,
            changes: BTreeMap::new(),
            reverse,
            reverse_changes: BTreeMap::new(),
            reverse_loss: 0.0,
            request_bytes_max: usize::MAX,
            tracer,
            responder: StampResponder::new(policy, None, 64),
            random: Random::new(seed),
            events: BTreeMap::new(),
            count: 0,
            at: 0,
            sent: Vec::new(),
            reverse_reports: Vec::new(),
        }
    }

    /// Everything that was sent so far.
    #[must_use]
    pub fn sent(&self) -> &[SentPacket] {
        &self.sent
    }

    /// The reports about the way back so far, with the time of each since the start.
    #[must_use]
    pub fn reverse_reports(&self) -> &[(Duration, TraceReport)] {
        &self.reverse_reports
    }

    /// Runs for `span` and returns the reports about the way to the responder, with the time of each since
    /// the start.
    pub fn run(&mut self, span: Duration) -> Vec<(Duration, TraceReport)> {
        let end = self.at + u64::try_from(span.as_nanos()).expect("less than 584 years");
        let mut reports = Vec::new();
        loop {
            let wake = self.drive(&mut reports);
            let next = self.events.keys().next().map_or(u64::MAX, |(at, _)| *at);
            let changes = [&self.changes, &self.reverse_changes];
            let change = changes.iter().filter_map(|changes| changes.keys().next().copied()).min();
            let change = change.unwrap_or(u64::MAX);
            let until = wake.min(next).min(change);
            if until > end {
                self.at = end;
                return reports;
            }
            self.at = self.at.max(until);
            if let Some(entry) = self.changes.first_entry().filter(|entry| *entry.key() <= self.at) {
                self.forward = entry.remove();
            }
            if let Some(entry) = self.reverse_changes.first_entry().filter(|entry| *entry.key() <= self.at) {
                self.reverse = entry.remove();
            }
            while let Some(first) = self.events.first_entry().filter(|event| event.key().0 <= self.at) {
                let event = first.remove();
                self.deliver(event);
            }
        }
    }

    fn now(&self) -> Now {
        let at = self.timestamp();
        let wall = WallTime::from_nanos(1_767_225_600_000_000_000);
        Now { at, drained: at, wall: WallOffset::between(Self::start(), wall) }
    }

    fn timestamp(&self) -> Timestamp {
        Timestamp::from_nanos(ORIGIN + self.at)
    }

    fn schedule(&mut self, at: u64, event: TraceEvent) {
        self.count += 1;
        self.events.insert((at, self.count), event);
    }

    /// Steps the tracer until it waits, and then sends what it has requested, as drivers do. Returns its
    /// deadline in true nanoseconds.
    fn drive(&mut self, reports: &mut Vec<(Duration, TraceReport)>) -> u64 {
        let mut queued = Vec::new();
        let until = self.step(reports, &mut queued);
        for (send, bytes) in queued {
            self.send(&send, bytes);
        }
        until
    }

    fn send(&mut self, send: &Send, mut bytes: Vec<u8>) {
        self.tracer.sent(send.id, self.timestamp(), TimestampSource::User);
        self.tracer.sent(send.id, self.timestamp(), TimestampSource::Kernel);
        let sequence = u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"));
        self.sent.push(SentPacket { at: self.at, flow: send.flow, ttl: send.ttl, sequence });
        let flow = send.flow;
        match self.forward.send(flow.into(), send.ttl, self.at, &mut self.random) {
            Transit::Delivered { at, ttl } => self.schedule(at, TraceEvent::Request { flow, bytes, ttl }),
            Transit::Expired { router, quoted_bytes, extensions, at } => {
                bytes.truncate(quoted_bytes);
                let extensions_at = attach(&mut bytes, &extensions);
                let error =
                    IcmpError { router, kind: IcmpKind::TtlExceeded, code: 0, mtu: None, extensions_at };
                self.schedule(at, TraceEvent::Error { flow, quoted: bytes, error });
            }
            Transit::Rejected { router, quoted_bytes, kind, code, at } => {
                bytes.truncate(quoted_bytes);
                let error = IcmpError { router, kind, code, mtu: None, extensions_at: None };
                self.schedule(at, TraceEvent::Error { flow, quoted: bytes, error });
            }
            Transit::Lost => {}
        }
    }

    fn step(&mut self, reports: &mut Vec<(Duration, TraceReport)>, queued: &mut Vec<(Send, Vec<u8>)>) -> u64 {
        loop {
            let mut arena = Vec::new();
            match self.tracer.step(self.now(), &mut HostDrops::default(), &mut arena) {
                Step::Send(send) => queued.push((send, arena)),
                Step::Report(DirectedReport { direction, report }) => {
                    let reports = match direction {
                        Direction::Forward => &mut *reports,
                        Direction::Reverse => &mut self.reverse_reports,
                    };
                    reports.push((Duration::from_nanos(self.at), report));
                }
                Step::Wait(until) => {
                    assert!(until > self.timestamp(), "the deadline is in the future");
                    return until.as_nanos().saturating_sub(ORIGIN);
                }
                Step::Finished => return u64::MAX,
            }
        }
    }

    /// Sends a reply through the network back.
    fn reply(&mut self, flow: u8, ttl: u8, mut bytes: Vec<u8>) {
        if self.random.chance(self.reverse_loss) {
            return;
        }
        match self.reverse.send(flow.into(), ttl, self.at, &mut self.random) {
            Transit::Delivered { at, ttl } => self.schedule(at, TraceEvent::Reply { flow, bytes, ttl }),
            Transit::Expired { router, quoted_bytes, extensions, at } => {
                bytes.truncate(quoted_bytes);
                let extensions_at = attach(&mut bytes, &extensions);
                let error =
                    IcmpError { router, kind: IcmpKind::TtlExceeded, code: 0, mtu: None, extensions_at };
                self.schedule(at, TraceEvent::ReverseError { flow, quoted: bytes, error });
            }
            Transit::Rejected { router, quoted_bytes, kind, code, at } => {
                bytes.truncate(quoted_bytes);
                let error = IcmpError { router, kind, code, mtu: None, extensions_at: None };
                self.schedule(at, TraceEvent::ReverseError { flow, quoted: bytes, error });
            }
            Transit::Lost => {}
        }
    }

    fn deliver(&mut self, event: TraceEvent) {
        let arrival = |from: SocketAddr, flow, ttl, icmp| Arrival {
            at: self.timestamp(),
            by: TimestampSource::Kernel,
            from,
            to: None,
            flow,
            ttl: Some(ttl),
            tos: Some(0),
            icmp,
        };
        match event {
            TraceEvent::Error { flow, quoted, error } => {
                let arrival = arrival(RESPONDER.into(), flow, 250, Some(error));
                self.tracer.received(&quoted, &arrival);
            }
            TraceEvent::Reply { flow, bytes, ttl } => {
                let arrival = arrival(RESPONDER.into(), flow, ttl, None);
                self.tracer.received(&bytes, &arrival);
            }
            TraceEvent::ReverseError { flow, quoted, error } => {
                let to = (TRACER.0, TRACER.1 + u16::from(flow));
                let arrival = arrival(to.into(), 0, 250, Some(error));
                self.responder.received(&quoted, &arrival);
            }
            TraceEvent::Request { bytes, .. } if bytes.len() > self.request_bytes_max => {}
            TraceEvent::Request { flow, bytes, ttl } => {
                let from = (TRACER.0, TRACER.1 + u16::from(flow));
                let arrival = arrival(from.into(), flow, ttl, None);
                self.responder.received(&bytes, &arrival);
                let now = self.now();
                loop {
                    let mut arena = Vec::new();
                    match self.responder.step(now, &mut HostDrops::default(), &mut arena) {
                        Step::Send(send) => {
                            self.responder.before_send(send.id, &mut arena, now);
                            self.responder.sent(send.id, self.timestamp(), TimestampSource::Kernel);
                            self.reply(flow, send.ttl, arena);
                        }
                        Step::Report(_) => {}
                        Step::Wait(_) | Step::Finished => return,
                    }
                }
            }
        }
    }
}
