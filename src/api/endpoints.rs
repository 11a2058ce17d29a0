//! The paths of the HTTP API, and the page that lists them.

use std::fmt::Write as _;

use hyper::Method;

use crate::bulk::LEASES;

/// Polled by other agents; answered without leaving the connection's thread.
pub(super) const PING: &str = "/api/v1/ping";

pub(super) const WEBSOCKET: &str = "/ws";

pub(super) const EVENTS: &str = "/api/v1/events";

pub(super) const TRACES: &str = "/api/v1/traces";

pub(super) const ENUMERATIONS: &str = "/api/v1/enumerations";

pub(super) const TRACES_DIFF: &str = "/api/v1/traces/diff";

pub(super) const BANDWIDTH_STOP: &str = "/api/v1/bandwidth/stop";

/// The paths of the API with their method and description, in the order of the index page.
pub(super) const ENDPOINTS: [(&str, Method, &str); 18] = [
    ("/", Method::GET, "this page"),
    ("/metrics", Method::GET, "metrics in the Prometheus text format, or OpenMetrics if requested"),
    (
        "/api/v1/agent",
        Method::GET,
        "name, labels and version of this agent, and whether it answers your address",
    ),
    ("/api/v1/paths", Method::GET, "all paths, and the reason for each that is not measured"),
    ("/api/v1/discovery", Method::GET, "discovery providers, and members whose agent name is not known yet"),
    (
        EVENTS,
        Method::GET,
        "recent events; ?after=N omits events up to number N; as a stream for text/event-stream or a WebSocket",
    ),
    (
        "/api/v1/routes",
        Method::GET,
        "routes of flows to peers and targets and back, and of peers' flows to this agent",
    ),
    (TRACES, Method::GET, "recent traces; ?target=NAME and ?since=SECONDS select"),
    (
        TRACES,
        Method::POST,
        "trace the paths to ?target=NAME now (from loopback, or signed with the mesh key)",
    ),
    (
        ENUMERATIONS,
        Method::POST,
        "enumerate the equal-cost paths to ?target=NAME (from loopback, or signed with the mesh key)",
    ),
    (TRACES_DIFF, Method::GET, "the hops at which the traces ?a=N and ?b=N differ"),
    (LEASES, Method::POST, "request a lease for a bandwidth run (from peers, or signed with the mesh key)"),
    (
        BANDWIDTH_STOP,
        Method::POST,
        "stop all bandwidth runs of this agent (from loopback, or signed with the mesh key)",
    ),
    (PING, Method::GET, "times at which the request was received and the response was sent"),
    (WEBSOCKET, Method::GET, "WebSocket echo: every message is sent back unchanged"),
    ("/-/healthy", Method::GET, "200 while the process is running"),
    ("/-/ready", Method::GET, "200 while the agent measures: after startup, until shutdown"),
    ("/-/reload", Method::POST, "reload the configuration (from loopback, or signed with the mesh key)"),
];

/// The page at `/`, which lists all endpoints, as HTML.
pub(super) fn index_page(agent_name: &str) -> String {
    let name = escaped(agent_name);
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>pathmeter {name}</title>\n\
             <h1>pathmeter {name}</h1><p>version {}</p><ul>\n",
        env!("CARGO_PKG_VERSION")
    );
    for (path, method, about) in ENDPOINTS.iter().skip(1) {
        let shown = match *method == Method::GET && ![WEBSOCKET, TRACES_DIFF].contains(path) {
            true => format!("<a href=\"{path}\">{path}</a>"),
            false => format!("{method} {path}"),
        };
        let _ = writeln!(page, "<li>{shown}: {about}");
    }
    page.push_str("</ul></html>\n");
    page
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
