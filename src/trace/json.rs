//! Routes and traces as JSON, for the API and for events.

use pathmeter_proto::trace::{EchoSummary, Route};
use serde_json::{Value, json};

use crate::metrics::trace::TracedFlow;
use crate::route_record::{RecordedRoute, asymmetric_hops};
use crate::trace_log::TraceRecord;

/// The latest traces and the routes of a flow, to the peer and back, and its echoes of the last minute.
pub(super) fn flow_json(forward: &TracedFlow, reverse: &TracedFlow, echoes: &EchoSummary) -> Value {
    let routers = |flow: &TracedFlow| flow.route.as_ref().and_then(|route| route.routers);
    json!({
        "asymmetric_hops": asymmetric_hops(routers(forward), routers(reverse)),
        "forward": direction_json(forward),
        "reverse": direction_json(reverse),
        "echoes": echoes_json(echoes),
    })
}

/// The loss and the mean RTT of echoes.
pub(super) fn echoes_json(echoes: &EchoSummary) -> Value {
    let rtt = echoes.rtt.map(|rtt| rtt.as_secs_f64());
    json!({"decided": echoes.decided, "lost": echoes.lost, "mean_rtt_seconds": rtt})
}

fn direction_json(flow: &TracedFlow) -> Value {
    let (route, trace) = (flow.route.as_ref().map(route_json), flow.trace.as_deref().map(TraceRecord::from));
    json!({"route": route, "trace": trace})
}

/// A route as the API shows it.
pub(super) fn route_json(route: &Route) -> Value {
    json!(RecordedRoute::from(route))
}
