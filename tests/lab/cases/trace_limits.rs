//! Traces through routers that limit their ICMP errors as Linux does by default.

use std::thread;
use std::time::{Duration, Instant};

use pathmeter_lab::NetPlan;
use serde_json::{Value, json};

use crate::agent::NodeAgent;
use crate::testbed::Inconclusive;
use crate::trace::{CONFIRMED_WITHIN, flows, start};

const DIRECTIONS: [&str; 2] = ["forward", "reverse"];

/// Flows of each path, as many as a path may have.
const FLOWS: u8 = 16;

/// No agent probes routers faster than they answer, so no hop looks lossy and no route looks changed. All
/// flows together get their turn at a router within the time that an agent tells others to wait.
pub(crate) fn limited() -> Result<(), Inconclusive> {
    const ROUTERS: usize = 3;
    let net = NetPlan::chain(ROUTERS).keep_icmp_limits().build(5);
    let b = start(&net, "b", ("a", net.v4("a")), 4);
    let a = start(&net, "a", ("b", net.v4("b")), FLOWS);
    // Each router answers five of the flows at once and the others one after the other.
    a.page_within(CONFIRMED_WITHIN, "all flows are traced", |_| {
        let flows = flows(&a);
        flows.len() == usize::from(FLOWS) && flows.iter().all(|flow| is_traced(flow, ROUTERS))
    });
    for agent in [&a, &b] {
        flows(agent).iter().for_each(assert_no_loss);
        assert_no_events(agent);
    }
    check_probes(&a)
}

/// More than a hundred flows through one router for ten minutes: it answers each of them once in two
/// minutes.
pub(crate) fn limited_for_ten_minutes() -> Result<(), Inconclusive> {
    const PEERS: [&str; 7] = ["b", "c", "d", "e", "f", "g", "h"];
    const DURATION: Duration = Duration::from_secs(600);
    let net = NetPlan::mesh(PEERS.len() + 1).keep_icmp_limits().build(5);
    let responder = |name: &str| {
        let peers = json!([{"name": "a", "address": net.v4("a")}]);
        let config = json!({"agent": {"name": name, "grace": "1s"}, "peers": peers});
        NodeAgent::start(net.node(name), config, &[])
    };
    let _responders = PEERS.map(responder);
    let config = json!({
        "agent": {"name": "a", "grace": "1s"},
        "peers": PEERS.map(|name| json!({"name": name, "address": net.v4(name)})),
        "probes": [
            {"name": "mesh", "interval": "1s", "flows": FLOWS},
            {"name": "routes", "kind": "trace", "follows": "mesh", "interval": "5s"},
        ],
    });
    let a = NodeAgent::start(net.node("a"), config, &[]);
    let all_flows = || {
        let paths = a.json("/api/v1/paths");
        let traced = paths["paths"].as_array().unwrap().iter().filter(|path| path["probe"] == "routes");
        traced.flat_map(|path| path["flows"].as_array().cloned().unwrap_or_default()).collect::<Vec<Value>>()
    };
    let begin = Instant::now();
    while begin.elapsed() < DURATION {
        all_flows().iter().for_each(assert_no_loss);
        thread::sleep(Duration::from_secs(1));
    }
    let flows = all_flows();
    assert_eq!(flows.len(), PEERS.len() * usize::from(FLOWS));
    for flow in &flows {
        assert!(is_traced(flow, 1), "{flow}");
    }
    assert_no_events(&a);
    check_probes(&a)
}

/// Whether all routers of a flow are known, in both directions.
fn is_traced(flow: &Value, routers: usize) -> bool {
    let hops = |direction: &str| flow[direction]["route"]["hops"].as_array().cloned();
    let is_whole = |hops: Vec<Value>| hops.len() == routers && hops.iter().all(Value::is_string);
    DIRECTIONS.iter().all(|direction| hops(direction).is_some_and(is_whole))
}

/// No hop of a flow looks lossy, or as if its router limited the answers.
fn assert_no_loss(flow: &Value) {
    for direction in DIRECTIONS {
        let trace = &flow[direction]["trace"];
        assert_eq!(trace["first_lossy_hop"], Value::Null, "{direction}: {flow}");
        let hops = trace["hops"].as_array().map_or(&[][..], Vec::as_slice);
        for hop in hops {
            assert!(hop["state"] != "lossy" && hop["state"] != "rate_limited", "{direction}: {flow}");
        }
    }
}

/// Nothing is reported about any route.
fn assert_no_events(agent: &NodeAgent<'_>) {
    let events = agent.json("/api/v1/events");
    let is_of_route = |event: &&Value| {
        let name = event["event"].as_str().unwrap();
        name.starts_with("route_") || name == "flow_lossy"
    };
    let events: Vec<&Value> = events["events"].as_array().unwrap().iter().filter(is_of_route).collect();
    assert!(events.is_empty(), "{events:?}");
    assert_eq!(agent.page().count("pathmeter_trace_route_changes_total", &[]), 0);
}

/// Probes waited for their turn, and then were answered.
///
/// # Errors
/// When the peer did not answer in time either: only a machine that stands still loses packets here.
fn check_probes(agent: &NodeAgent<'_>) -> Result<(), Inconclusive> {
    let page = agent.page();
    let unanswered = page.count("pathmeter_trace_unanswered_total", &[]);
    let unreached = page.count("pathmeter_trace_traces_total", &["direction=\"forward\"", "unreached"]);
    if unanswered > 0 && unreached > 0 {
        return Err(Inconclusive(format!("{unreached} traces did not reach the peer")));
    }
    assert_eq!(unanswered, 0, "{page}");
    assert!(page.count("pathmeter_trace_deferred_total", &["reason=\"router\""]) > 0, "{page}");
    Ok(())
}
