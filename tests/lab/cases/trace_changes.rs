//! Traces of routes that change, and of routes that only seem to.

use std::time::{Duration, UNIX_EPOCH};

use pathmeter_lab::{Net, NetPlan, WireDirection};
use pathmeter_proto::sim::Link;
use serde_json::{Value, json};

use crate::agent::NodeAgent;
use crate::trace::{CONFIRMED_WITHIN, flows, forward_events, wait_for_event};

/// Two ways from `left` to `right`, through `one` or through `two`.
fn two_ways() -> NetPlan {
    let mut plan = NetPlan::default();
    plan.host("a").host("b").router("left").router("one").router("two").router("right");
    plan.wire("a", "left").cable("left", "one").cable("one", "right");
    plan.cable("left", "two").cable("two", "right").wire("right", "b");
    plan
}

const ONE: &str = "10.77.1.2";
const TWO: &str = "10.77.3.2";

/// Delays at both ends, and one way back for everything: routers then answer from one address each.
fn build(plan: &NetPlan, seed: u64) -> Net {
    let net = plan.build(seed);
    let link = Link::perfect(2_000_000);
    net.wire("a", "left").set_links(&link, &link);
    net.wire("right", "b").set_links(&link, &link);
    net.node("right").ip("route replace 10.77.0.0/24 via 10.77.2.1\n");
    net
}

/// An agent on `b` that only answers.
fn responder(net: &Net) -> NodeAgent<'_> {
    let peers = json!([{"name": "a", "address": net.v4("a")}]);
    NodeAgent::start(net.node("b"), json!({"agent": {"name": "b", "grace": "1s"}, "peers": peers}), &[])
}

/// An agent on `a` that measures and traces `b`.
fn start<'a>(net: &'a Net, echo: Value, trace_interval: &str, limits: Value) -> NodeAgent<'a> {
    let mut mesh = json!({"name": "mesh"});
    mesh.as_object_mut().unwrap().extend(echo.as_object().unwrap().clone());
    let config = json!({
        "agent": {"name": "a", "grace": "1s"},
        "peers": [{"name": "b", "address": net.v4("b")}],
        "probes": [
            mesh,
            {"name": "routes", "kind": "trace", "follows": "mesh", "interval": trace_interval},
        ],
        "trace": limits,
    });
    NodeAgent::start(net.node("a"), config, &[])
}

/// The current route to the peer, without its number.
fn route_of(agent: &NodeAgent<'_>) -> Value {
    let flows = flows(agent);
    let route = flows.first().map_or(&Value::Null, |flow| &flow["forward"]["route"]);
    json!({"hops": route["hops"], "routers": route["routers"]})
}

/// Traces that are complete.
fn complete_traces(agent: &NodeAgent<'_>) -> u64 {
    let labels = ["direction=\"forward\"", "result=\"complete\""];
    let page = agent.page();
    if page.has("pathmeter_trace_traces_total", &labels) {
        page.count("pathmeter_trace_traces_total", &labels)
    } else {
        0
    }
}

/// A router sends the packets of a flow by turns over two routers: the hop is balanced, which is reported
/// once, and the route does not change.
pub(crate) fn balanced() {
    let net = build(&two_ways(), 18);
    let b = net.v4("b");
    net.node("left").nft(&format!(
        "add table ip balance\n\
         add chain ip balance prerouting {{ type filter hook prerouting priority mangle; }}\n\
         add rule ip balance prerouting ip daddr {b} meta mark set numgen inc mod 2\n"
    ));
    net.node("left").ip(&format!(
        "route replace 10.77.5.0/24 via {ONE}\n\
         route add {b}/32 via {TWO} table 100\n\
         rule add fwmark 1 table 100\n"
    ));
    let _b = responder(&net);
    let a = start(&net, json!({"interval": "100ms"}), "2s", json!({}));
    let event = wait_for_event(&a, "route_load_balanced");
    assert_eq!((&event["ttl"], &event["routers"]), (&json!(2), &json!([ONE, TWO])), "{event}");
    let before = complete_traces(&a);
    a.page_within(CONFIRMED_WITHIN, "further traces", |_| complete_traces(&a) >= before + 5);
    let flow = flows(&a).swap_remove(0)["forward"].take();
    assert_eq!(flow["route"]["hops"], json!(["10.77.0.2", [ONE, TWO], "10.77.2.2"]), "{flow}");
    let states = flow["trace"]["hops"].as_array().unwrap().iter().map(|hop| hop["state"] == "balanced");
    assert_eq!(states.collect::<Vec<bool>>(), [false, true, false], "{flow}");
    for (name, count) in [("route_load_balanced", 1), ("route_changed", 0), ("route_restored", 0)] {
        assert_eq!(forward_events(&a, name).len(), count, "{name}");
    }
    assert_eq!(a.page().count("pathmeter_trace_route_changes_total", &[]), 0);
}

/// A route moves away, back, away and back: after the first time both are known by their number.
pub(crate) fn flapping() {
    let net = build(&two_ways(), 19);
    let route = |via: &str| net.node("left").ip(&format!("route replace 10.77.5.0/24 via {via}\n"));
    route(ONE);
    let _b = responder(&net);
    // The routers of the lab answer as fast as they are asked.
    let a = start(&net, json!({"interval": "100ms"}), "2s", json!({"router_rate": "1kpps"}));
    let has_route =
        |via: &str| route_of(&a) == json!({"hops": ["10.77.0.2", via, "10.77.2.2"], "routers": 3});
    a.page_when("the first route", |_| has_route(ONE));
    let changes = |kind: &str| forward_events(&a, &format!("route_{kind}"));
    let counts = || ["changed", "restored"].map(|kind| changes(kind).len());
    for (via, expected) in [(TWO, [1, 0]), (ONE, [1, 1]), (TWO, [1, 2]), (ONE, [1, 3])] {
        route(via);
        a.page_within(CONFIRMED_WITHIN, &format!("the route through {via}"), |_| {
            has_route(via) && counts().iter().sum::<usize>() >= expected.iter().sum()
        });
        assert_eq!(counts(), expected, "{via}");
    }
    let first = changes("changed").swap_remove(0);
    let [home, away] = [&first["from"]["id"], &first["to"]["id"]];
    assert_ne!(home, away, "{first}");
    for (event, [from, to]) in changes("restored").iter().zip([[away, home], [home, away], [away, home]]) {
        assert_eq!([&event["from"]["id"], &event["to"]["id"]], [from, to], "{event}");
    }
    assert_eq!(forward_events(&a, "route_load_balanced"), Vec::<Value>::new());
}

/// A route with another number of routers is reported after the next echo, although the next trace would
/// come in an hour.
pub(crate) fn length() {
    /// Echoes until the event: the one whose reply shows the change, and those during the confirmation.
    const ECHOES_MAX: usize = 3;
    /// UDP payload of the echoes. Probes of traces are shorter.
    const BYTES: usize = 400;
    let mut plan = NetPlan::default();
    plan.host("a").host("b");
    for router in ["left", "one", "two", "three", "right"] {
        plan.router(router);
    }
    plan.wire("a", "left").cable("left", "one").cable("one", "right");
    plan.cable("left", "two").cable("two", "three").cable("three", "right").wire("right", "b");
    let net = build(&plan, 20);
    let route = |via: &str| net.node("left").ip(&format!("route replace 10.77.6.0/24 via {via}\n"));
    route(ONE);
    let _b = responder(&net);
    let a = start(&net, json!({"interval": "1s", "size": format!("{BYTES}B")}), "1h", json!({}));
    let shorter = json!(["10.77.0.2", ONE, "10.77.2.2"]);
    let longer = json!(["10.77.0.2", TWO, "10.77.4.2", "10.77.2.2"]);
    // Two traces of a flow are at least ten seconds apart.
    a.page_when("echoes after the first trace", |page| page.count("pathmeter_echo_sent_total", &[]) >= 12);
    let is_known = || route_of(&a) == json!({"hops": shorter, "routers": 3});
    // On a busy machine an answer may come too late for the first trace.
    if !is_known() {
        a.post("/api/v1/traces?target=b");
    }
    a.page_when("the first route", |_| is_known());
    let changed_at = UNIX_EPOCH.elapsed().unwrap();
    route(TWO);
    let event = wait_for_event(&a, "route_changed");
    assert_eq!((&event["from"]["routers"], &event["from"]["hops"]), (&json!(3), &shorter), "{event}");
    assert_eq!(event["to"]["routers"], 4, "{event}");
    let found_at = Duration::from_secs_f64(event["timestamp_seconds"].as_f64().unwrap());
    let echoes = net.wire("a", "left").read(|log| {
        let is_between = |at: u64| (changed_at..found_at).contains(&Duration::from_nanos(at));
        let echoes = log.iter().filter(|entry| {
            entry.direction == WireDirection::Forward && entry.head.datagram.payload_bytes() == BYTES
        });
        echoes.filter(|entry| is_between(entry.at)).count()
    });
    assert!((1..=ECHOES_MAX).contains(&echoes), "{echoes} echoes until {event}");
    let is_traced = || {
        let traces = a.json("/api/v1/traces");
        let is_meant = |trace: &Value| trace["trigger"] == "length" && trace["routers"] == 4;
        traces["traces"].as_array().unwrap().iter().any(is_meant)
    };
    a.page_when("a trace of the longer route", |_| {
        is_traced() && route_of(&a) == json!({"hops": longer, "routers": 4})
    });
    assert_eq!(forward_events(&a, "route_changed").len(), 1);
}
