//! The plan of a traced path, and a running one.

use std::any::Any;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::Quirks;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{DirectedReport, Direction, Finding, FlowChange, ProbeProtocol, TraceSpec};
use serde_json::{Map, Value};
use tokio::sync::mpsc::UnboundedSender;

use super::flow_events::TracedConnectionStalled;
use super::json::flow_json;
use super::quoted::QuotedFlows;
use super::series::DirectedSeries;
use super::task::{ListedTraces, trace_task};
use super::{SingleTrace, TraceParameters};
use crate::clock::Clock;
use crate::config::TraceMethod;
use crate::config::echo::transport::Transport;
use crate::datagram::SourceChoice;
use crate::keys::KeyChoice;
use crate::loops::{NewPath, PathEvent};
use crate::metrics::AnySeries;
use crate::metrics::trace::TracedFlow;
use crate::paths::PathId;
use crate::probe::{FlowRoutes, Followed, Loops, Measured, Path, Plan, Remote, StartContext, TableRow};
use crate::settings::Settings;
use crate::stream::{OwnFlow, OwnFlowStatus, Refusal, StreamTask, TcpTrace};

/// The plan of a traced path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TracePlan {
    protocol: ProbeProtocol,
    to: SocketAddr,
    interval: Duration,
    dscp: Dscp,
    source: SourceChoice,
    flows: u8,
    hops_max: u8,
    /// How long to wait for each answer; `None`: as long as the RTT suggests.
    answer_wait: Option<Duration>,
    /// Whether probes are to be sent on the connection of the echoes.
    wants_own_flow: bool,
    has_hop_metrics: bool,
    keys: KeyChoice,
    quirks: Option<Quirks>,
    /// Whether other traces come first, and it is not listed among the latest ones.
    is_of_client: bool,
}

impl TracePlan {
    /// The plan of the path with these parameters.
    pub(super) fn new(parameters: TraceParameters<'_>, settings: &Settings) -> Self {
        let TraceParameters { probe, trace, remote, address } = parameters;
        let (keys, quirks) = match (&trace.transport, remote) {
            (Transport::Udp(_), Remote::Peer(_)) => (settings.keys.mesh_choice(), None),
            (Transport::Udp(_), Remote::Target(target)) => {
                (settings.keys.target_choice(&target.name), Some(target.quirks))
            }
            (Transport::Icmp(_) | Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_), _) => {
                (KeyChoice::None, None)
            }
        };
        let (port, dont_fragment) = match &trace.transport {
            Transport::Udp(udp) => (udp.source_port, udp.dont_fragment),
            Transport::Icmp(icmp) => (None, icmp.dont_fragment),
            Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_) => (None, false),
        };
        Self {
            protocol: trace.probe_protocol(),
            to: SocketAddr::new(address, remote.port(&trace.transport)),
            interval: probe.interval,
            dscp: probe.dscp,
            source: SourceChoice::toward(address, probe.source, port, dont_fragment),
            flows: trace.flows(),
            hops_max: trace.hops_max,
            answer_wait: None,
            wants_own_flow: trace.method == TraceMethod::OwnFlow,
            has_hop_metrics: trace.hop_metrics,
            keys,
            quirks,
            is_of_client: false,
        }
    }
}

impl TracePlan {
    /// The source address and port.
    pub(super) fn source(&self) -> SourceChoice {
        self.source
    }

    /// Whether the probes are STAMP requests.
    pub(super) fn is_over_udp(&self) -> bool {
        self.protocol == ProbeProtocol::Udp
    }

    /// What the tracer does. The loop chooses the values of the session identifiers.
    pub(super) fn spec(&self, start: &StartContext<'_>) -> TraceSpec {
        TraceSpec {
            protocol: self.protocol,
            to: self.to,
            ssids: vec![0; usize::from(self.flows)],
            interval: self.interval,
            hops_max: self.hops_max,
            answer_wait: self.answer_wait,
            dscp: self.dscp,
            keys: start.settings.keys.get(self.keys, &start.key.peer),
            quirks: self.quirks,
            tx_timestamps: true,
            traces_reverse: self.protocol == ProbeProtocol::Udp,
            skips_busy_routers: self.is_of_client,
            missed_since: Vec::new(),
            budget: Arc::clone(&start.loops.probe_budget),
            seed: start.seed,
        }
    }

    /// The plan of a single trace to any host.
    pub(super) fn once(once: &SingleTrace) -> Self {
        let SingleTrace { protocol, to, hops_max, answer_wait } = *once;
        Self {
            protocol,
            to,
            interval: ONCE,
            dscp: Dscp::DEFAULT,
            source: SourceChoice::toward(to.ip(), None, None, false),
            flows: 1,
            hops_max,
            answer_wait: Some(answer_wait),
            wants_own_flow: false,
            has_hop_metrics: false,
            keys: KeyChoice::None,
            quirks: None,
            is_of_client: true,
        }
    }
}

/// Longer than a single trace runs: it is not repeated.
const ONCE: Duration = Duration::from_secs(3_600);

impl Plan for TracePlan {
    fn to(&self) -> SocketAddr {
        self.to
    }

    fn can_continue(&self, other: &dyn Plan) -> bool {
        other.as_any().downcast_ref::<Self>() == Some(self)
    }

    fn start(self: Box<Self>, start: &StartContext<'_>, earlier: Option<Box<dyn Path>>) -> Box<dyn Path> {
        let earlier = earlier.and_then(|path| path.into_any().downcast::<TracePath>().ok());
        Box::new(TracePath::start(*self, start, earlier.map(|path| *path), None))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug)]
pub(super) struct TracePath {
    id: PathId,
    plan: TracePlan,
    series: DirectedSeries,
    followed: Arc<Followed>,
    quoted: Arc<QuotedFlows>,
}

/// The results of a traced path.
#[derive(Debug)]
struct Traced {
    protocol: ProbeProtocol,
    wants_own_flow: bool,
    series: DirectedSeries,
    followed: Arc<Followed>,
    quoted: Arc<QuotedFlows>,
}

impl TracePath {
    /// Starts the path. `reports` receives every report of the tracer.
    pub(super) fn start(
        plan: TracePlan,
        start: &StartContext<'_>,
        earlier: Option<Self>,
        reports: Option<UnboundedSender<DirectedReport>>,
    ) -> Self {
        let earlier = earlier.map(|path| path.series);
        let hops_max = plan.has_hop_metrics.then_some(plan.hops_max);
        let series = DirectedSeries::new(start.key, plan.protocol == ProbeProtocol::Udp, hops_max, earlier);
        series.of(Direction::Forward).set_own_flow(plan.wants_own_flow.then_some(false));
        let missed_since = series.of(Direction::Forward).flows().into_iter().map(|flow| flow.missed_since);
        let spec = TraceSpec { missed_since: missed_since.collect(), ..plan.spec(start) };
        start.followed.set_follower(start.id);
        let quoted = QuotedFlows::new(plan.protocol, plan.to, Arc::clone(&start.loops.quoted_headers));
        let quoted = Arc::new(quoted);
        let log = || ListedTraces {
            path: start.key.clone(),
            log: Arc::clone(&start.loops.traces),
            quoted: Arc::clone(&quoted),
        };
        let log = (!plan.is_of_client).then(log);
        let task = trace_task(spec, plan.source, series.clone(), Arc::clone(&start.followed), log, reports);
        let (id, peer_left_at) = (start.id, start.peer_left_at);
        match plan.protocol {
            ProbeProtocol::Udp | ProbeProtocol::ClosedPort | ProbeProtocol::Icmp => {
                start.loops.prober.start(NewPath { id, task, peer_left_at });
            }
            ProbeProtocol::Tcp => {
                let own_flow = plan.wants_own_flow.then(|| own_flow(start, plan.hops_max)).flatten();
                let task = StreamTask::Trace(TcpTrace { task, own_flow });
                start.loops.streams.start(NewPath { id, task, peer_left_at });
            }
        }
        Self { id: start.id, plan, series, followed: Arc::clone(&start.followed), quoted }
    }
}

/// Connects the trace of a TCP path to the connection of the path that it follows; `None` if this process may
/// not send segments on it.
fn own_flow(start: &StartContext<'_>, hops_max: u8) -> Option<OwnFlow> {
    let (connection, followed) = (Arc::clone(start.followed.connection()), Arc::clone(&start.followed));
    if !start.loops.own_flow.is_granted() {
        connection.refuse(Refusal::NotPermitted);
        return None;
    }
    let changed = move |change| match change {
        FlowChange::Replaced => {
            followed.add(Finding::FlowReplaced { flow: 0 });
            None
        }
        FlowChange::Stalled => Some(Box::new(TracedConnectionStalled) as Box<dyn PathEvent>),
    };
    Some(OwnFlow { connection, hops_max, changed: Box::new(changed) })
}

impl Path for TracePath {
    fn plan(&self) -> &dyn Plan {
        &self.plan
    }

    fn adjust(&mut self, _: Box<dyn Plan>, _: &StartContext<'_>) {}

    fn started(&self, sources: &[SocketAddr]) {
        self.quoted.set_sources(sources);
    }

    fn stop(&self, loops: &Loops) {
        match self.plan.protocol {
            ProbeProtocol::Udp | ProbeProtocol::ClosedPort | ProbeProtocol::Icmp => {
                loops.prober.remove(self.id);
            }
            ProbeProtocol::Tcp => loops.streams.remove(self.id),
        }
    }

    fn series(&self) -> Vec<Arc<dyn AnySeries>> {
        self.series.all()
    }

    fn measured(&self) -> Arc<dyn Measured> {
        let TracePlan { protocol, wants_own_flow, .. } = self.plan;
        let (series, followed) = (self.series.clone(), Arc::clone(&self.followed));
        Arc::new(Traced { protocol, wants_own_flow, series, followed, quoted: Arc::clone(&self.quoted) })
    }

    /// The echoes that it follows show earlier whether the peer is up, and whether it is leaving.
    fn reply_interval_max(&self) -> Option<Duration> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl Traced {
    /// The latest results of each flow, to the peer and back.
    fn flows(&self) -> impl Iterator<Item = (TracedFlow, TracedFlow)> {
        let mut reverse = self.series.of(Direction::Reverse).flows();
        let forward = self.series.of(Direction::Forward).flows();
        reverse.resize_with(forward.len(), TracedFlow::default);
        forward.into_iter().zip(reverse)
    }
}

impl Traced {
    /// Whether probes have the ports, or the identifier, of the echoes.
    fn own_flow(&self) -> OwnFlowStatus {
        let is_on_connection = match self.protocol {
            ProbeProtocol::Udp | ProbeProtocol::Icmp => true,
            // Why the connection was not used before a reload is of no interest.
            ProbeProtocol::Tcp if self.wants_own_flow => return self.followed.connection().status(),
            ProbeProtocol::Tcp | ProbeProtocol::ClosedPort => false,
        };
        OwnFlowStatus { is_on_connection, refusal: None }
    }
}

impl Measured for Traced {
    fn last_reply(&self) -> u64 {
        self.series.of(Direction::Forward).last_reply()
    }

    fn is_draining(&self) -> bool {
        false
    }

    fn local_failure(&self) -> Option<String> {
        None
    }

    fn json(&self) -> Map<String, Value> {
        let since = Clock::now() - ECHOES_WINDOW;
        let flows = self.flows().zip(0..).map(|((to, back), flow)| {
            let echoes = self.followed.echoes(flow, since, Timestamp::NEVER);
            let quoted = |router| self.quoted.find(flow, router);
            flow_json(&to, &back, &echoes, &self.own_flow(), quoted)
        });
        let flows: Vec<Value> = flows.collect();
        [("flows".to_owned(), flows.into())].into_iter().collect()
    }

    fn routes(&self) -> Vec<FlowRoutes> {
        let routes = |(to, back): (TracedFlow, TracedFlow)| FlowRoutes {
            protocol: self.protocol,
            forward: to.route,
            reverse: back.route,
        };
        self.flows().map(routes).collect()
    }

    fn row(&self) -> TableRow {
        let flows = self.series.of(Direction::Forward).flows();
        let Some(trace) = flows.first().and_then(|flow| flow.trace.as_ref()) else {
            return TableRow { head: TABLE_HEAD, cells: "      -".to_owned() };
        };
        let routers = trace.routers.map_or_else(|| "-".to_owned(), |routers| routers.to_string());
        let hops = trace.hops.iter().map(|hop| {
            hop.answers.first().map_or_else(|| "*".to_owned(), |answer| answer.router.to_string())
        });
        let hops: Vec<String> = hops.collect();
        let route = if hops.is_empty() { "direct".to_owned() } else { hops.join(" ") };
        TableRow { head: TABLE_HEAD, cells: format!("{routers:>7}  {route}") }
    }
}

/// The time over which echoes are summed.
const ECHOES_WINDOW: Duration = Duration::from_secs(60);

/// The table head of the row of a traced path.
const TABLE_HEAD: &str = "routers  route";
