//! Traces to the clients of `/ws`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::schedule::mix;
use pathmeter_proto::time::{Timestamp, nanos};
use pathmeter_proto::trace::{DirectedReport, ProbeProtocol, Trace, TraceReport};
use serde::Serialize;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::clock::Clock;
use crate::config::WebSocketRules;
use crate::datagram::opens_icmp_sockets;
use crate::event_log::{EventLog, EventType};
use crate::paths::{PathId, PathKey};
use crate::probe::{Loops, Path, StartContext};
use crate::settings::Settings;
use crate::trace::{SingleTrace, start_once};
use crate::trace_log::{HopRecord, TraceRecord};
use crate::websocket::{ClientTraceRequest, TraceUpdate};

/// The running traces to clients, at most one for each address.
#[derive(Debug)]
pub(super) struct ClientTraces {
    /// Secret: with the session numbers that follow from it, answers could be forged.
    seed: u64,
    active: BTreeMap<PathId, ActiveTrace>,
    tasks: JoinSet<PathId>,
    started: u64,
    /// When the next trace may begin at the configured rate.
    next_at: Option<Timestamp>,
}

#[derive(Debug)]
struct ActiveTrace {
    client: IpAddr,
    path: Box<dyn Path>,
    /// Receives why the trace could not be started.
    failed: Option<oneshot::Sender<String>>,
}

/// Identifiers of configured paths are smaller.
const FIRST_ID: u64 = 1 << 63;

/// Traces that may begin at once.
const BURST: u32 = 5;

/// A trace without a result after this time has failed. Chosen: more than the longest wait for the answers to
/// all hops.
const RESULT_MAX: Duration = Duration::from_secs(15);

/// Number of events of each type about clients that are kept. Chosen: the clients of the last minute at the
/// default rate, with up to thirty hops each, in two megabytes.
const EVENTS_MAX: usize = 64;

/// The port of probes over UDP, which is hardly ever in use: the first one of traceroute.
const CLOSED_PORT: u16 = 33_434;

impl ClientTraces {
    /// No traces. `seed` must be random.
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, active: BTreeMap::new(), tasks: JoinSet::new(), started: 0, next_at: None }
    }

    /// Starts a trace to a client, or tells the client why not.
    pub(super) fn start(
        &mut self,
        request: ClientTraceRequest,
        settings: &Settings,
        loops: &Loops,
        events: &Arc<EventLog>,
    ) {
        let ClientTraceRequest { client, updates } = request;
        let rules = &settings.config.websocket;
        if let Err(reason) = self.admit(client, rules, Clock::now()) {
            // The client may have left.
            let _ = updates.send(TraceUpdate::Error { reason });
            return;
        }
        let protocol = match opens_icmp_sockets(client) {
            true => ProbeProtocol::Icmp,
            false => ProbeProtocol::ClosedPort,
        };
        let id = PathId(FIRST_ID + self.started);
        self.started += 1;
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
        let once = SingleTrace {
            protocol,
            to: SocketAddr::new(client, port),
            hops_max: rules.trace_hops_max,
            answer_wait: rules.trace_timeout,
        };
        let path = start_once(&once, &start, sender);
        let (failed, failure) = oneshot::channel();
        self.active.insert(id, ActiveTrace { client, path, failed: Some(failed) });
        let method = protocol.as_str();
        self.tasks.spawn(watch(id, (client, method), updates, reports, failure, Arc::clone(events)));
    }

    /// Whether a trace may begin now.
    fn admit(&mut self, client: IpAddr, rules: &WebSocketRules, now: Timestamp) -> Result<(), String> {
        if self.active.values().any(|active| active.client == client) {
            return Err("a trace to your address is running".to_owned());
        }
        let spacing =
            Duration::from_nanos(nanos(Duration::from_secs(1)) / u64::from(rules.traces_per_second));
        let due = self.next_at.map_or(now, |next_at| next_at.max(now - spacing * (BURST - 1)));
        if due > now {
            return Err(format!(
                "at most {} traces begin per second; connect again later",
                rules.traces_per_second
            ));
        }
        self.next_at = Some(due + spacing);
        Ok(())
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

    /// Waits for the end of a trace, and stops it. `None`: none is running.
    pub(super) async fn next_ended(&mut self) -> Option<PathId> {
        self.tasks.join_next().await?.ok()
    }

    /// Stops a trace.
    pub(super) fn stop(&mut self, id: PathId, loops: &Loops) {
        if let Some(active) = self.active.remove(&id) {
            active.path.stop(loops);
        }
    }
}

/// Tells the client and the event log what becomes of a trace. Ends early if the client leaves.
async fn watch(
    id: PathId,
    (client, method): (IpAddr, &'static str),
    updates: UnboundedSender<TraceUpdate>,
    mut reports: UnboundedReceiver<DirectedReport>,
    failure: oneshot::Receiver<String>,
    events: Arc<EventLog>,
) -> PathId {
    let send = |update| {
        // The client may have left.
        let _ = updates.send(update);
    };
    send(TraceUpdate::Connected { address: client, method });
    let outcome = tokio::select! {
        Some(trace) = first_trace(&mut reports) => Ok(trace),
        Ok(reason) = failure => Err(reason),
        () = updates.closed() => return id,
        () = sleep(RESULT_MAX) => Err(format!("no result within {RESULT_MAX:?}")),
    };
    match outcome {
        Ok(trace) => {
            let record = TraceRecord::from(&trace);
            record.hops.iter().map(hop).for_each(send);
            let TraceRecord { reached, routers, rtt_seconds, duration_seconds, .. } = record;
            send(TraceUpdate::Done { reached, routers, rtt_seconds, duration_seconds });
            events.add(&ClientTraced { client, method, trace: record });
        }
        Err(reason) => {
            events.add(&ClientTraceFailed { client, method, reason: reason.clone() });
            send(TraceUpdate::Error { reason });
        }
    }
    id
}

/// The first complete trace; `None` if the tracer has ended without one.
async fn first_trace(reports: &mut UnboundedReceiver<DirectedReport>) -> Option<Trace> {
    loop {
        if let TraceReport::Traced(trace) = reports.recv().await?.report {
            return Some(*trace);
        }
    }
}

fn hop(hop: &HopRecord) -> TraceUpdate {
    let first = hop.responders.first().filter(|_| hop.answered > 0);
    TraceUpdate::Hop {
        ttl: hop.ttl,
        state: hop.state.to_string(),
        address: first.map(|found| found.address),
        rtt_seconds: first.map(|found| found.rtt_seconds.last),
    }
}

/// The route to a client of `/ws`.
#[derive(Serialize)]
struct ClientTraced {
    client: IpAddr,
    method: &'static str,
    #[serde(flatten)]
    trace: TraceRecord,
}

impl EventType for ClientTraced {
    const NAME: &'static str = "client_traced";
    const KEPT_MAX: Option<usize> = Some(EVENTS_MAX);
}

/// There is no route to a client of `/ws`.
#[derive(Serialize)]
struct ClientTraceFailed {
    client: IpAddr,
    method: &'static str,
    reason: String,
}

impl EventType for ClientTraceFailed {
    const NAME: &'static str = "client_trace_failed";
    const KEPT_MAX: Option<usize> = Some(EVENTS_MAX);
}
