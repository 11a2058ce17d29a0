//! Traces to the clients of `/ws`.

mod own_flow;
mod report;
mod tasks;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::admission::{RateLimits, Rates, Refusal};
use pathmeter_proto::schedule::mix;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::token_bucket::TokenRate;
use pathmeter_proto::trace::ProbeProtocol;
use tokio::sync::mpsc::unbounded_channel;
use tokio::sync::oneshot;

use self::own_flow::{OwnFlowAdmission, OwnFlowRefusal};
use self::report::{ClientTraceReport, TraceEnd, watch};
use self::tasks::{EndedTask, PathTasks};
use super::observability::Observability;
use crate::clock::Clock;
use crate::config::{TraceMethod, WebSocketRules};
use crate::datagram::opens_icmp_sockets;
use crate::http::AcceptedConnection;
use crate::metrics::websocket::ClientTraceResult;
use crate::paths::{PathId, PathKey};
use crate::probe::{Loops, Path, StartContext};
use crate::settings::Settings;
use crate::stream::own_flow::OwnFlowLimits;
use crate::trace::{SingleTrace, start_once};
use crate::websocket::ClientTraceRequest;

/// The running traces to clients, at most one for each address.
#[derive(Debug)]
pub(super) struct ClientTraces {
    /// Secret: with the session numbers that follow from it, answers could be forged.
    seed: u64,
    active: BTreeMap<PathId, ActiveTrace>,
    tasks: PathTasks<TraceEnd>,
    started: u64,
    rates: Rates,
    own_flow: OwnFlowAdmission,
}

#[derive(Debug)]
struct ActiveTrace {
    client: IpAddr,
    /// `None` if the client's own connection is traced.
    path: Option<Box<dyn Path>>,
    /// Receives why the trace could not be started.
    failed: Option<oneshot::Sender<String>>,
}

/// Why a client is not traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TraceRefusal {
    /// A trace to its address is running.
    Running,
    /// Traces to its address, or IPv6 /64, begin no faster than this.
    SourceRate(Duration),
    /// Traces to all clients begin no faster than this many per second.
    TotalRate(u32),
}

/// Identifiers of configured paths are smaller.
const FIRST_ID: u64 = 1 << 63;

/// Traces that may begin at once.
const BURST: u32 = 5;

/// Traces to one address, or IPv6 /64, that may begin at once. Chosen: 2, for a page that is loaded again.
const SOURCE_BURST: u32 = 2;

/// The part of `traces_per_second` that one address, or IPv6 /64, may use. Chosen: a quarter, so that one
/// client does not exclude all others.
const SOURCE_SHARE: u32 = 4;

/// The port of probes over UDP, which is hardly ever in use: the first one of traceroute.
const CLOSED_PORT: u16 = 33_434;

impl TraceRefusal {
    fn result(self) -> ClientTraceResult {
        match self {
            Self::Running => ClientTraceResult::Running,
            Self::SourceRate(_) => ClientTraceResult::SourceRate,
            Self::TotalRate(_) => ClientTraceResult::TotalRate,
        }
    }
}

impl fmt::Display for TraceRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => f.write_str("a trace to your address is running"),
            Self::SourceRate(spacing) => {
                let seconds = (spacing.as_secs_f64() * 100.0).round() / 100.0;
                write!(f, "at most one trace to your address begins every {seconds} s; connect again later")
            }
            Self::TotalRate(rate) => {
                let traces = if *rate == 1 { "trace begins" } else { "traces begin" };
                write!(f, "at most {rate} {traces} per second; connect again later")
            }
        }
    }
}

impl ClientTraces {
    /// `seed` must be random.
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            active: BTreeMap::new(),
            tasks: PathTasks::new(),
            started: 0,
            rates: Rates::new(),
            own_flow: OwnFlowAdmission::default(),
        }
    }

    /// Applies the rules of a configuration.
    pub(super) fn apply(&mut self, rules: &WebSocketRules) {
        self.own_flow.apply(rules);
    }

    /// Starts a trace to a client, or tells the client why not.
    pub(super) fn start(
        &mut self,
        request: ClientTraceRequest,
        settings: &Settings,
        loops: &Loops,
        observability: &Observability,
    ) {
        let ClientTraceRequest { client, connection, messages } = request;
        let mut report = ClientTraceReport::new(
            client,
            messages,
            Arc::clone(&observability.events),
            Arc::clone(&observability.exporter.websocket),
        );
        let (rules, now) = (&settings.config.websocket, Clock::now());
        if let Err(refusal) = self.admit(client, rules.traces_per_second, now) {
            report.refused(refusal);
            return;
        }
        match self.own_flow_connection(client, connection, rules, now) {
            Some(Ok(connection)) => self.trace_connection(report, connection, rules, loops),
            Some(Err(refusal)) => {
                report.fall_back(refusal.to_string());
                self.trace_address(report, settings, loops);
            }
            None => self.trace_address(report, settings, loops),
        }
    }

    /// The connection on which a client is traced, or why it is not, if that is configured.
    fn own_flow_connection(
        &self,
        client: IpAddr,
        connection: Option<AcceptedConnection>,
        rules: &WebSocketRules,
        now: Timestamp,
    ) -> Option<Result<AcceptedConnection, OwnFlowRefusal>> {
        if rules.trace_method != TraceMethod::OwnFlow {
            return None;
        }
        let running = self.active.values().filter(|active| active.path.is_none()).count();
        let admitted = self.own_flow.admit(client, running, now);
        Some(admitted.and_then(|()| connection.ok_or(OwnFlowRefusal::NoConnection)))
    }

    /// Traces the client on its own connection.
    fn trace_connection(
        &mut self,
        report: ClientTraceReport,
        connection: AcceptedConnection,
        rules: &WebSocketRules,
        loops: &Loops,
    ) {
        let id = self.next_id();
        let limits = OwnFlowLimits {
            hops_max: rules.trace_hops_max,
            answer_wait: rules.trace_timeout,
            budget: Arc::clone(&loops.probe_budget),
        };
        self.active.insert(id, ActiveTrace { client: report.client(), path: None, failed: None });
        self.tasks.spawn(id, own_flow::watch(report, connection, limits));
    }

    /// Traces the client with packets of their own.
    fn trace_address(&mut self, report: ClientTraceReport, settings: &Settings, loops: &Loops) {
        let client = report.client();
        let protocol = match opens_icmp_sockets(client) {
            true => ProbeProtocol::Icmp,
            false => ProbeProtocol::ClosedPort,
        };
        let id = self.next_id();
        let family = if client.is_ipv4() { "ipv4" } else { "ipv6" };
        let key = PathKey { probe: "websocket".into(), peer: client.to_string().into(), family };
        let start = StartContext {
            id,
            key: &key,
            settings,
            loops,
            peer_left_at: None,
            seed: mix(self.seed ^ mix(id.0)),
            followed: Arc::default(),
        };
        let (sender, reports) = unbounded_channel();
        let port = if protocol == ProbeProtocol::ClosedPort { CLOSED_PORT } else { 0 };
        let rules = &settings.config.websocket;
        let once = SingleTrace {
            protocol,
            to: SocketAddr::new(client, port),
            hops_max: rules.trace_hops_max,
            answer_wait: rules.trace_timeout,
        };
        let path = start_once(&once, &start, sender);
        let (failed, failure) = oneshot::channel();
        self.active.insert(id, ActiveTrace { client, path: Some(path), failed: Some(failed) });
        self.tasks.spawn(id, watch(report, protocol.as_str(), reports, failure));
    }

    fn next_id(&mut self) -> PathId {
        self.started += 1;
        PathId(FIRST_ID + self.started)
    }

    /// Whether a trace may begin now.
    fn admit(&mut self, client: IpAddr, per_second: u32, now: Timestamp) -> Result<(), TraceRefusal> {
        if self.active.values().any(|active| active.client == client) {
            return Err(TraceRefusal::Running);
        }
        let spacing = Duration::from_secs(1) / per_second;
        let total = TokenRate { spacing, burst: BURST };
        let per_source = TokenRate { spacing: spacing * SOURCE_SHARE, burst: SOURCE_BURST };
        match self.rates.take_within(RateLimits { per_source, total }, client, now) {
            Ok(()) => Ok(()),
            Err(Refusal::SourceRate) => Err(TraceRefusal::SourceRate(per_source.spacing)),
            Err(_) => Err(TraceRefusal::TotalRate(per_second)),
        }
    }

    /// Whether a path is one of these.
    pub(super) fn has(&self, id: PathId) -> bool {
        self.active.contains_key(&id)
    }

    /// A path could not be started. Returns whether it is one of these.
    pub(super) fn not_started(&mut self, id: PathId, reason: &str) -> bool {
        let Some(active) = self.active.get_mut(&id) else { return false };
        if let Some(failed) = active.failed.take() {
            let _ = failed.send(reason.to_owned());
        }
        true
    }

    /// Waits for the end of the task of a trace. `None`: none is running.
    pub(super) async fn next_ended(&mut self) -> Option<EndedTask<TraceEnd>> {
        self.tasks.next_ended().await
    }

    /// Stops the trace of a task that has ended.
    pub(super) fn on_ended(
        &mut self,
        EndedTask { path: id, result: end }: EndedTask<TraceEnd>,
        settings: &Settings,
        loops: &Loops,
    ) {
        let Some(active) = self.active.remove(&id) else { return };
        if let Some(path) = active.path {
            path.stop(loops);
        }
        match end {
            Some(TraceEnd::Reported) | None => {}
            Some(TraceEnd::NotBegun(report)) => self.trace_address(report, settings, loops),
            Some(TraceEnd::Stalled) => self.own_flow.stalled(active.client, Clock::now()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
    }

    #[test]
    fn one_source_cannot_use_up_the_rate_of_all() {
        for network in ["198.51.100.", "2001:db8::1:"] {
            let mut traces = ClientTraces::new(1);
            // A /64 is one source.
            let client = |host: u64| -> IpAddr {
                let text =
                    if network.contains(':') { format!("{network}{host}") } else { format!("{network}7") };
                text.parse().unwrap()
            };
            let mut begun = Vec::new();
            let mut other = Vec::new();
            for time in (0..60_000).step_by(100) {
                if traces.admit(client(time % 1_000), 1, at(time)).is_ok() {
                    begun.push(time);
                }
                if time % 2_000 == 0 {
                    other.push(traces.admit(
                        [192, 0, 2, u8::try_from(time / 2_000).unwrap()].into(),
                        1,
                        at(time),
                    ));
                }
            }
            assert_eq!(begun[..4], [0, 100, 4_000, 8_000], "two at once, then a quarter of the rate");
            assert_eq!(begun.len(), 16, "{begun:?}");
            assert!(other.iter().all(Result::is_ok), "others are traced: {other:?}");
        }
    }

    #[test]
    fn all_sources_share_the_rate() {
        let mut traces = ClientTraces::new(1);
        let begun = (0..100_u64).map(|index| {
            let client = IpAddr::from([192, 0, 2, u8::try_from(index).unwrap()]);
            traces.admit(client, 2, at(index * 100))
        });
        let begun: Vec<_> = begun.collect();
        let count = begun.iter().filter(|begun| begun.is_ok()).count();
        assert!((23..=25).contains(&count), "five at once and two per second: {count}");
        assert!(begun.iter().flat_map(|begun| begun.err()).all(|error| error == TraceRefusal::TotalRate(2)));
    }
}
