//! Drives the task of a trace over TCP.
//!
//! Without privileges each probe is an attempt to connect with a limited TTL. The socket's error queue tells
//! the router at which the TTL ended (Linux `tcp_v4_err`). A probe that reaches the destination establishes a
//! connection, or is refused; either way the socket is closed with a reset. All probes of a path have the
//! same ports, so that they take the same route, but other ports than the echoes have.
//!
//! With CAP_NET_RAW the probes are segments on the connection of the echoes; see
//! [`ConnectionProbes`](pathmeter_proto::trace::ConnectionProbes).

mod own_flow;
mod syn_probe;

use std::future::{Future, pending};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::machine::{Arrival, HostDrops, IcmpError, NotSent, Now, Send, TimestampSource};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::ProbeStep;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::yield_now;
use tokio::time::sleep;

use super::TcpTrace;
use super::path::PathCommand;
use crate::clock::{Clock, ClockEvent};
use crate::datagram::{Notice, Task, TaskStep, Traffic, not_sent_reason};
use crate::loops::LoopEvent;
use crate::metrics::agent::LoopSeries;
use crate::paths::PathId;
use syn_probe::{Outcome, SynProbe};

pub use own_flow::OwnFlow;
use own_flow::{Look, OwnFlowProbes};

/// A path whose task probes over TCP.
pub(super) struct TcpTracePath {
    id: PathId,
    to: SocketAddr,
    /// The port is 0 until the first probe.
    source: SocketAddr,
    task: Box<dyn Task>,
    clock: Clock,
    /// All answers that arrived before this time were passed to the task.
    drained: Timestamp,
    /// The probe in flight, with the bytes that identify it. A second one could not have the same ports.
    in_flight: Option<(Vec<u8>, Attempt)>,
    /// Present if probes are sent on the connection of the echoes.
    own_flow: Option<OwnFlowProbes>,
    /// A probe that must not be sent yet, with the bytes that identify it.
    waiting: Option<(Send, Vec<u8>)>,
    traffic: Traffic,
    commands: UnboundedReceiver<PathCommand>,
    series: Arc<LoopSeries>,
    events: tokio::sync::mpsc::Sender<LoopEvent>,
}

type Attempt = Pin<Box<dyn Future<Output = Outcome> + std::marker::Send>>;

/// Longest time without a step of the task, which may have been given something to do.
const STEP_INTERVAL: Duration = Duration::from_secs(1);

/// The same, while it is not known whether the connection of the echoes still delivers data. Chosen: shorter
/// than echoes are waited for.
const VERIFICATION_INTERVAL: Duration = Duration::from_millis(100);

/// Answers that are read before another task may run. Chosen: more than the routers of a way.
const ANSWERS_PER_STEP: usize = 64;

/// What wakes a path.
enum Wakeup {
    Command(Option<PathCommand>),
    Ended(Outcome),
    Time,
    /// Something has happened on the connection of the echoes, perhaps an answer.
    Connection(Option<(Vec<u8>, Arrival)>),
}

impl TcpTracePath {
    pub(super) fn new(
        id: PathId,
        trace: TcpTrace,
        commands: UnboundedReceiver<PathCommand>,
        series: Arc<LoopSeries>,
        events: tokio::sync::mpsc::Sender<LoopEvent>,
    ) -> Self {
        let now = Clock::now();
        let TcpTrace { task: new, own_flow } = trace;
        let task = (new.build)(vec![0; usize::from(new.flows)], now);
        Self {
            id,
            to: new.to,
            source: SocketAddr::new(new.source.address, new.source.port),
            task,
            clock: Clock::new(),
            drained: now,
            in_flight: None,
            own_flow: own_flow.map(|own| OwnFlowProbes::new(own, new.to, now)),
            waiting: None,
            traffic: Traffic::default(),
            commands,
            series,
            events,
        }
    }

    /// Runs until a command ends the path.
    pub(super) async fn run(mut self) {
        loop {
            if let Some(ClockEvent::Suspend(_)) = self.clock.read().1 {
                self.waiting = None;
                self.task.withdraw();
            }
            let Some(until) = self.drive() else { break };
            let is_unverified = self.own_flow.as_ref().is_some_and(OwnFlowProbes::has_unverified_segments);
            let longest = if is_unverified { VERIFICATION_INTERVAL } else { STEP_INTERVAL };
            let span = until.since(Clock::now()).min(longest);
            let wakeup = tokio::select! {
                biased;
                command = self.commands.recv() => Wakeup::Command(command),
                outcome = ended(&mut self.in_flight) => Wakeup::Ended(outcome),
                () = sleep(span) => Wakeup::Time,
                answer = answered(&mut self.own_flow) => Wakeup::Connection(answer),
            };
            match wakeup {
                Wakeup::Command(Some(PathCommand::PeerLeaving(at))) => self.task.peer_leaving(at),
                Wakeup::Command(Some(PathCommand::Stop)) => {
                    self.waiting = None;
                    self.task.stop();
                }
                Wakeup::Command(None) => {
                    self.waiting = None;
                    self.task.stop();
                    self.task.withdraw();
                    self.drive();
                    break;
                }
                Wakeup::Ended(outcome) => self.ended(outcome),
                Wakeup::Time => self.drain().await,
                Wakeup::Connection(answer) => self.answered(answer),
            }
            self.series.wakeups.inc();
        }
        if !self.task.is_balanced(Clock::now()) {
            self.series.accounting_errors.inc();
        }
        self.emit(LoopEvent::Finished(self.id));
    }

    /// Passes an answer that has arrived to the task, so that a probe is not given up while its answer waits.
    async fn drain(&mut self) {
        let now = Clock::now();
        // Lets the runtime poll the sockets.
        yield_now().await;
        for _ in 0..ANSWERS_PER_STEP {
            tokio::select! {
                biased;
                outcome = ended(&mut self.in_flight) => self.ended(outcome),
                answer = answered(&mut self.own_flow) => self.answered(answer),
                () = yield_now() => {
                    self.drained = now;
                    break;
                }
            }
        }
    }

    /// Steps the task until it waits. Returns until when; `None` when it has finished.
    fn drive(&mut self) -> Option<Timestamp> {
        self.look_at_connection();
        loop {
            if let Some((send, identifier)) = self.waiting.take()
                && let Some(until) = self.send(send, identifier)
            {
                return Some(until);
            }
            let now = Now { at: Clock::now(), drained: self.drained, wall: self.clock.offset() };
            let mut identifier = Vec::new();
            let mut drops = HostDrops::default();
            match self.task.step(now, &mut drops, &mut identifier, &mut self.traffic) {
                TaskStep::Send(send) => {
                    if let Some(until) = self.send(send, identifier) {
                        return Some(until);
                    }
                }
                // A deadline in the past is decided when all answers before it are passed to the task.
                TaskStep::Wait(until) if until <= now.at && self.drained < now.at => return Some(now.at),
                TaskStep::Wait(until) => return Some(until),
                TaskStep::Notify(Notice::Path(event)) => self.emit(LoopEvent::OfPath { id: self.id, event }),
                // Only tasks with a companion or a follower, or on the agent port, send these.
                TaskStep::Notify(Notice::PeerLeaving(_) | Notice::Wake(_)) => {}
                TaskStep::Finished => return None,
            }
        }
    }

    /// Follows the connection of the echoes. Probes that were sent or wait are of no use when the port
    /// changes.
    fn look_at_connection(&mut self) {
        let Some(own_flow) = &mut self.own_flow else { return };
        let Look { is_replaced, source, events } = own_flow.look(Clock::now());
        if is_replaced {
            (self.in_flight, self.waiting) = (None, None);
            // The next attempt to connect has another port.
            self.source.set_port(0);
        }
        if let Some(source) = source {
            self.emit(LoopEvent::Started { id: self.id, sources: vec![source] });
        }
        for event in events {
            self.emit(LoopEvent::OfPath { id: self.id, event });
        }
    }

    /// Sends a probe, unless it must wait: until the returned time.
    fn send(&mut self, send: Send, identifier: Vec<u8>) -> Option<Timestamp> {
        let Some(own_flow) = &mut self.own_flow else {
            self.connect(&send, identifier);
            return None;
        };
        match own_flow.step(&send, Clock::now()) {
            ProbeStep::Wait(until) => {
                self.waiting = Some((send, identifier));
                Some(until)
            }
            ProbeStep::Segment(segment) => {
                match own_flow.send(send.ttl, &segment, identifier) {
                    Some(at) => self.task.sent(send.id, at, TimestampSource::User),
                    None => self.task.not_sent(send.id, NotSent::Other),
                }
                None
            }
            ProbeStep::Syn => {
                self.connect(&send, identifier);
                None
            }
        }
    }

    fn connect(&mut self, send: &Send, identifier: Vec<u8>) {
        // Closes the previous one.
        self.in_flight = None;
        let at = Clock::now();
        match SynProbe::start(self.to, self.source, send.ttl, send.tos) {
            Ok((probe, source)) => {
                if self.source.port() == 0 {
                    self.source.set_port(source.port());
                    let address = local_address(self.to).unwrap_or_else(|| source.ip());
                    let sources = vec![SocketAddr::new(address, source.port())];
                    self.emit(LoopEvent::Started { id: self.id, sources });
                }
                self.task.sent(send.id, at, TimestampSource::User);
                self.in_flight = Some((identifier, Box::pin(probe.outcome(at))));
            }
            Err(error) => {
                if let Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL) = error.raw_os_error() {
                    // Somebody has taken the port: the next probe gets another one.
                    self.source.set_port(0);
                }
                self.task.not_sent(send.id, not_sent_reason(&error));
            }
        }
    }

    /// The probe in flight has an outcome.
    fn ended(&mut self, outcome: Outcome) {
        let Some((mut identifier, _)) = self.in_flight.take() else { return };
        let now = Clock::now();
        let (at, by, icmp) = match outcome {
            Outcome::Reached { at, by } => (at, by, None),
            Outcome::Expired { timestamp, sent_at, icmp, extensions } => {
                // The task takes the identifier for what the router has quoted.
                let extensions_at = icmp.extensions_at.and_then(|_| u16::try_from(identifier.len()).ok());
                identifier.extend(extensions);
                let icmp = Some(IcmpError { extensions_at, ..icmp });
                match timestamp {
                    Some(timestamp) => {
                        let at = self.clock.monotonic_of(timestamp, sent_at, now);
                        (at, TimestampSource::Kernel, icmp)
                    }
                    None => (now, TimestampSource::User, icmp),
                }
            }
            Outcome::Nothing => return,
        };
        let arrival = Arrival { at, by, from: self.to, to: None, flow: 0, ttl: None, tos: None, icmp };
        self.task.received(&identifier, &arrival);
    }

    fn answered(&mut self, answer: Option<(Vec<u8>, Arrival)>) {
        if let Some((identifier, arrival)) = answer {
            self.task.received(&identifier, &arrival);
        }
    }

    fn emit(&self, event: LoopEvent) {
        if self.events.try_send(event).is_err() {
            self.series.events_dropped.inc();
        }
    }
}

/// The outcome of the probe in flight; never, if there is none.
async fn ended(in_flight: &mut Option<(Vec<u8>, Attempt)>) -> Outcome {
    match in_flight {
        Some((_, attempt)) => attempt.await,
        None => pending().await,
    }
}

/// The next answer on the connection of the echoes; never, if probes are not sent on it.
async fn answered(own_flow: &mut Option<OwnFlowProbes>) -> Option<(Vec<u8>, Arrival)> {
    match own_flow {
        Some(own_flow) => own_flow.next().await,
        None => pending().await,
    }
}

/// The local address for packets to `to`; `None` if there is no route.
fn local_address(to: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Sends nothing.
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
