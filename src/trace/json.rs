//! Routes and traces as JSON, for the API and for events.

use std::net::IpAddr;

use pathmeter_proto::trace::{EchoSummary, Route};
use serde_json::{Value, json};

use crate::metrics::trace::TracedFlow;
use crate::route_record::{RecordedRoute, asymmetric_hops};
use crate::stream::OwnFlowStatus;
use crate::trace_log::{QuotedRecord, TraceRecord};

/// The latest traces and the routes of a flow, to the peer and back, and its echoes of the last minute.
/// `own_flow`: whether probes have the ports of the echoes. `quoted` is what a router to the peer has quoted
/// of its probes.
pub(super) fn flow_json(
    forward: &TracedFlow,
    reverse: &TracedFlow,
    echoes: &EchoSummary,
    own_flow: &OwnFlowStatus,
    quoted: impl Fn(IpAddr) -> Option<QuotedRecord>,
) -> Value {
    let routers = |flow: &TracedFlow| flow.route.as_ref().and_then(|route| route.routers);
    json!({
        "asymmetric_hops": asymmetric_hops(routers(forward), routers(reverse)),
        "forward": direction_json(forward, quoted),
        "reverse": direction_json(reverse, |_| None),
        "echoes": echoes_json(echoes),
        "is_on_own_flow": own_flow.is_on_connection,
        "own_flow_refusal": own_flow.refusal.as_ref().map(ToString::to_string),
    })
}

/// The loss and the mean RTT of echoes.
pub(super) fn echoes_json(echoes: &EchoSummary) -> Value {
    let rtt = echoes.rtt.map(|rtt| rtt.as_secs_f64());
    json!({"decided": echoes.decided, "lost": echoes.lost, "mean_rtt_seconds": rtt})
}

fn direction_json(flow: &TracedFlow, quoted: impl Fn(IpAddr) -> Option<QuotedRecord>) -> Value {
    let trace = flow.trace.as_deref().map(|trace| TraceRecord::from(trace).with_quoted(quoted));
    let route = flow.route.as_ref().map(route_json);
    json!({"route": route, "trace": trace})
}

/// A route as the API shows it.
pub(super) fn route_json(route: &Route) -> Value {
    json!(RecordedRoute::from(route))
}
