//! The task of a traced path on a loop of datagrams or connections.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_proto::machine::{Arrival, Machine as _};
use pathmeter_proto::time::{Timestamp, nanos};
use pathmeter_proto::trace::{
    DirectedReport, Direction, EchoSummary, ProbeProtocol, RouteId, Trace, TraceReport, TraceSpec, Tracer,
    Trigger,
};
use tokio::sync::mpsc::UnboundedSender;

use super::events::{LossyFlow, RouteUpdated};
use super::flow_events::{ReachabilityChanged, TtlClamped};
use super::quoted::QuotedFlows;
use super::series::DirectedSeries;
use crate::clock::Clock;
use crate::datagram::{
    Access, DatagramProtocol, MachineTask, NewTask, Notice, Recorder, SourceChoice, Traffic,
};
use crate::paths::PathKey;
use crate::probe::Followed;
use crate::trace_log::TraceLog;

/// A task that traces the flows of `source`. Only the number of session identifiers in `spec` matters: the
/// loop chooses their values.
pub(super) fn trace_task(
    mut spec: TraceSpec,
    source: SourceChoice,
    series: DirectedSeries,
    followed: Arc<Followed>,
    log: Option<ListedTraces>,
    reports: Option<UnboundedSender<DirectedReport>>,
) -> NewTask {
    NewTask {
        protocol: match spec.protocol {
            ProbeProtocol::Icmp => DatagramProtocol::Icmp,
            // Over TCP the loop of connections opens the sockets.
            ProbeProtocol::Udp | ProbeProtocol::ClosedPort | ProbeProtocol::Tcp => DatagramProtocol::Udp,
        },
        to: spec.to,
        source,
        flows: u8::try_from(spec.ssids.len()).expect("few flows"),
        interval: spec.interval,
        seed: spec.seed,
        companion: None,
        is_following: true,
        build: Box::new(move |ssids, at| {
            spec.ssids = ssids;
            let interval = spec.interval;
            let recorder = TraceRecorder {
                interval,
                series,
                followed,
                log,
                reports,
                has_new_route: false,
                has_traced: false,
                listed: BTreeMap::new(),
            };
            Box::new(MachineTask { machine: Tracer::new(spec, at), recorder })
        }),
    }
}

/// Longest time before the first observation of a change whose echoes are left out. Echoes are kept for three
/// minutes.
const UNNOTICED_MAX: Duration = Duration::from_secs(60);

/// How long the replies to the probes of a first trace are read at once. Chosen: longer than the RTT of
/// nearly all paths.
const FIRST_REPLY_MAX: Duration = Duration::from_millis(500);

/// Where the traces of a path are listed.
#[derive(Debug)]
pub(super) struct ListedTraces {
    pub(super) path: PathKey,
    pub(super) log: Arc<TraceLog>,
    /// What routers quote of the probes to the peer.
    pub(super) quoted: Arc<QuotedFlows>,
}

#[derive(Debug)]
struct TraceRecorder {
    interval: Duration,
    /// Keeps the traces that were not made one hop after the other.
    /// `None`: traces are not listed.
    log: Option<ListedTraces>,
    /// Receives every report; `None`: there is no receiver.
    reports: Option<UnboundedSender<DirectedReport>>,
    series: DirectedSeries,
    followed: Arc<Followed>,
    /// Whether a route may have become known since the routes were published.
    has_new_route: bool,
    /// Whether a trace is complete.
    has_traced: bool,
    /// The route of the latest trace of each flow that was listed.
    listed: BTreeMap<(Direction, u8), Option<RouteId>>,
}

impl ListedTraces {
    fn add(&self, direction: Direction, trace: &Trace) {
        let quoted = |router| match direction {
            Direction::Forward => self.quoted.find(trace.flow, router),
            Direction::Reverse => None,
        };
        self.log.add(&self.path, direction, trace, quoted);
    }
}

impl TraceRecorder {
    /// Whether a trace is listed: its hops were probed at once, and something has led to it. Without routers,
    /// or without an answer of the target, a burst takes the place of each round, which is listed only if it
    /// shows another route.
    fn is_new(&self, direction: Direction, trace: &Trace) -> bool {
        let listed = self.listed.get(&(direction, trace.flow)).copied().flatten();
        trace.is_burst && (trace.trigger != Trigger::Interval || trace.route != listed)
    }

    /// The echoes of a flow before and since something was first observed. It may have begun up to an
    /// interval earlier.
    fn echoes(&self, flow: u8, since: Timestamp) -> (EchoSummary, EchoSummary) {
        let gap = self.interval.min(UNNOTICED_MAX);
        let before = self.followed.echoes(flow, Timestamp::from_nanos(0), since - gap);
        (before, self.followed.echoes(flow, since, Timestamp::NEVER))
    }
}

impl Recorder<Tracer> for TraceRecorder {
    fn record(&mut self, report: DirectedReport, traffic: &mut Traffic) -> Option<Notice> {
        if let Some(reports) = &self.reports {
            // The receiver may be gone.
            let _ = reports.send(report.clone());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, nanos);
        let DirectedReport { direction, report } = report;
        self.series.record(direction, &report, now);
        match report {
            TraceReport::Sent { .. } => {
                traffic.outstanding += 1;
                traffic.sent += 1;
                if !self.has_traced {
                    // The number of routers is in the first reply.
                    traffic.prompt_until = Some(Clock::now() + FIRST_REPLY_MAX);
                }
                None
            }
            TraceReport::Answered { .. } | TraceReport::Unanswered { .. } | TraceReport::Withdrawn => {
                traffic.outstanding = traffic.outstanding.saturating_sub(1);
                None
            }
            TraceReport::Rejected { .. }
            | TraceReport::SendError(_)
            | TraceReport::Deferred(_)
            | TraceReport::Unmatched => None,
            TraceReport::Traced(trace) => {
                self.has_new_route = true;
                self.has_traced = true;
                if let Some(log) = &self.log
                    && self.is_new(direction, &trace)
                {
                    log.add(direction, &trace);
                    self.listed.insert((direction, trace.flow), trace.route);
                }
                None
            }
            TraceReport::Route { flow, update, trigger, since } => {
                self.has_new_route = true;
                let (before, after) = self.echoes(flow, since);
                let update = *update;
                let event = RouteUpdated { direction, flow, update, trigger, before, after };
                Some(Notice::Path(Box::new(event)))
            }
            TraceReport::Reachability(change) => {
                let (before, after) = self.echoes(change.flow, change.since);
                let event = ReachabilityChanged { direction, change: *change, before, after };
                Some(Notice::Path(Box::new(event)))
            }
            TraceReport::TtlClamped { flow, rewriting, trigger } => {
                Some(Notice::Path(Box::new(TtlClamped { direction, flow, rewriting, trigger })))
            }
            TraceReport::LossyFlow { flow, echoes, forward_hop, reverse_hop } => {
                let event = LossyFlow { flow, echoes, forward_hop, reverse_hop };
                Some(Notice::Path(Box::new(event)))
            }
        }
    }

    fn stepping(&mut self, tracer: &mut Tracer, now: Timestamp) {
        while let Some(finding) = self.followed.take() {
            tracer.observe(finding, now);
        }
        let followed = &self.followed;
        let answered = tracer.missed().filter_map(|(flow, since)| {
            let echoes = followed.echoes(flow, since, Timestamp::NEVER);
            (echoes.decided > echoes.lost).then_some(flow)
        });
        let answered: Vec<u8> = answered.collect();
        answered.into_iter().for_each(|flow| tracer.echo_answered(flow, now));
    }

    fn waiting(&mut self, tracer: &Tracer, _: Timestamp) {
        let connection = self.followed.connection();
        if connection.is_watched() {
            let is_on_connection = connection.status().is_on_connection;
            self.series.of(Direction::Forward).set_own_flow(Some(is_on_connection));
        }
        if std::mem::take(&mut self.has_new_route) {
            for direction in Direction::ALL {
                self.series.set_routes(direction, tracer.routes(direction));
            }
        }
    }

    fn received(&mut self, _: &Arrival) {}

    fn not_sent(&mut self) {}

    fn set_access(&mut self, _: &mut Tracer, _: &Access) {}

    /// A trace that is cut short loses nothing.
    fn delays_stop(&self) -> bool {
        false
    }

    fn is_balanced(&self, tracer: &Tracer, _: Timestamp) -> bool {
        let in_flight = Direction::ALL.map(|direction| self.series.of(direction).in_flight());
        let in_flight = in_flight.into_iter().sum::<Option<u64>>();
        in_flight == u64::try_from(tracer.in_flight()).ok()
    }

    fn claims(&self, tracer: &Tracer, datagram: &[u8], arrival: &Arrival) -> bool {
        tracer.owns(datagram, arrival)
    }
}
