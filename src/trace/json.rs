//! Routes and traces as JSON, for the API and for events.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use pathmeter_proto::trace::{EchoSummary, Hop, HopRouter, Route, Trace};
use serde_json::{Value, json};

use crate::metrics::trace::TracedFlow;

/// The latest traces and the routes of a flow, to the peer and back, and its echoes of the last minute.
pub(super) fn flow_json(forward: &TracedFlow, reverse: &TracedFlow, echoes: &EchoSummary) -> Value {
    json!({
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
    let (route, trace) = (flow.route.as_ref().map(route_json), flow.trace.as_deref().map(trace_json));
    json!({"route": route, "trace": trace})
}

/// A trace as the API shows it.
#[must_use]
pub fn trace_json(trace: &Trace) -> Value {
    json!({
        "reached": trace.rtt.is_some(),
        "routers": trace.routers,
        "duration_seconds": trace.duration.as_secs_f64(),
        "rtt_seconds": trace.rtt.map(|rtt| rtt.as_secs_f64()),
        "first_lossy_hop": trace.first_lossy_hop,
        "hops": trace.hops.iter().map(hop_json).collect::<Vec<Value>>(),
    })
}

/// A route as the API shows it.
pub(super) fn route_json(route: &Route) -> Value {
    let hops = route.hops.iter().map(|hop| match hop {
        HopRouter::Unknown => Value::Null,
        HopRouter::Single(address) => json!(address.to_string()),
        HopRouter::Balanced(routers) => {
            json!(routers.iter().map(ToString::to_string).collect::<Vec<String>>())
        }
    });
    json!({"id": route.id.to_string(), "routers": route.routers, "hops": hops.collect::<Vec<Value>>()})
}

fn hop_json(hop: &Hop) -> Value {
    let state = hop.state.as_str();
    // The shortest and the last RTT of each.
    let mut responders: BTreeMap<IpAddr, (Duration, Duration)> = BTreeMap::new();
    for (address, rtt) in &hop.answers {
        let (min, last) = responders.entry(*address).or_insert((*rtt, *rtt));
        (*min, *last) = ((*min).min(*rtt), *rtt);
    }
    // Of the last known one, the shortest RTT of all its answers is known.
    responders.extend(hop.responder.map(|known| (known.address, (known.rtt_min, known.rtt_last))));
    let responders = responders.iter().map(|(address, (min, last))| {
        let rtt = json!({"min": min.as_secs_f64(), "last": last.as_secs_f64()});
        json!({"address": address.to_string(), "rtt_seconds": rtt})
    });
    let responders: Vec<Value> = responders.collect();
    json!({"ttl": hop.ttl, "state": state, "sent": hop.sent, "answered": hop.answers.len(), "responders": responders})
}
