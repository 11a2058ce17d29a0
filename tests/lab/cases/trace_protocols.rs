//! Traces over ICMP and TCP.

use std::net::IpAddr;

use pathmeter_lab::{Net, NetPlan, eventually};
use pathmeter_proto::sim::Link;
use serde_json::{Value, json};

use crate::agent::NodeAgent;
use crate::trace::{CONFIRMED_WITHIN, ROUTERS, address_of, label_routers, routers_of_chain};

/// An agent on `a` that traces the packets of echo probes over ICMP, TCP and HTTP, the last to a target
/// without an agent.
fn start<'a>(net: &'a Net, b: IpAddr, interval: &str) -> NodeAgent<'a> {
    net.node("a").set_sysctl("ipv4/ping_group_range", "0 2147483647");
    let url = match b {
        IpAddr::V4(b) => format!("http://{b}:9862/-/healthy"),
        IpAddr::V6(b) => format!("http://[{b}]:9862/-/healthy"),
    };
    let trace = |name: &str, follows: &str, protocol: &str| json!({"name": name, "kind": "trace", "follows": follows, "protocol": protocol, "interval": interval});
    let config = json!({
        "agent": {"name": "a", "grace": "1s"},
        "peers": [{"name": "b", "address": b}],
        "targets": [{"name": "web", "address": b, "url": url}],
        "probes": [
            {"name": "ping", "protocol": "icmp", "interval": "100ms", "peers": ["b"], "flows": 2},
            {"name": "chat", "protocol": "tcp", "interval": "1s", "peers": ["b"]},
            {"name": "pages", "protocol": "http", "interval": "1s", "targets": ["web"]},
            trace("ping-routes", "ping", "icmp"),
            trace("chat-routes", "chat", "tcp"),
            trace("page-routes", "pages", "tcp"),
        ],
    });
    NodeAgent::start(net.node("a"), config, &[])
}

const PROBES: [&str; 3] = ["ping-routes", "chat-routes", "page-routes"];

pub(crate) fn flows(agent: &NodeAgent<'_>, probe: &str) -> Vec<Value> {
    let paths = agent.json("/api/v1/paths");
    let path = paths["paths"].as_array().unwrap().iter().find(|path| path["probe"] == probe);
    path.and_then(|path| path["flows"].as_array().cloned()).unwrap_or_default()
}

/// Every router of a chain is found over both families, with an RTT that grows with the distance.
pub(crate) fn chain() {
    for is_v4 in [true, false] {
        let net = NetPlan::chain(ROUTERS).build(13);
        for (first, second) in [("a", "r1"), ("r8", "b")] {
            let link = Link::perfect(5_000_000);
            net.wire(first, second).set_links(&link, &link);
        }
        let address = |name| if is_v4 { net.v4(name) } else { net.v6(name) };
        let b =
            json!({"agent": {"name": "b", "grace": "1s"}, "peers": [{"name": "a", "address": address("a")}]});
        let _b = NodeAgent::start(net.node("b"), b, &[]);
        let a = start(&net, address("b"), "5s");
        for (probe, count) in PROBES.into_iter().zip([2, 1, 1]) {
            let flows = eventually("a trace of every flow", || {
                let flows = flows(&a, probe);
                let is_reached = |flow: &Value| flow["forward"]["trace"]["reached"] == true;
                (flows.len() == count && flows.iter().all(is_reached)).then_some(flows)
            });
            for flow in &flows {
                let trace = &flow["forward"]["trace"];
                assert_eq!(trace["routers"], ROUTERS, "{probe}: {trace}");
                let hops = trace["hops"].as_array().unwrap();
                let found = hops.iter().map(|hop| address_of(&hop["responders"][0]["address"]));
                assert_eq!(
                    found.collect::<Vec<IpAddr>>(),
                    routers_of_chain(is_v4, "forward"),
                    "{probe}: {trace}"
                );
                let least = |hop: &Value| hop["responders"][0]["rtt_seconds"]["min"].as_f64().unwrap();
                assert!(hops.iter().all(|hop| least(hop) >= 0.010), "all are behind the first wire: {trace}");
                assert!(trace["rtt_seconds"].as_f64().unwrap() >= 0.020, "{trace}");
                assert_eq!(flow["reverse"]["trace"], Value::Null, "the target sends no probes back");
            }
        }
        let page = a.page_when("rounds after the first trace", |page| {
            PROBES.iter().all(|probe| {
                let labels = [&*format!("probe=\"{probe}\""), "result=\"complete\""];
                page.has("pathmeter_trace_traces_total", &labels)
                    && page.count("pathmeter_trace_traces_total", &labels) >= 3
            })
        });
        for name in [
            "pathmeter_accounting_errors_total",
            "pathmeter_trace_unmatched_total",
            "pathmeter_trace_unanswered_total",
            "pathmeter_trace_send_errors_total",
            "pathmeter_trace_route_changes_total",
            "pathmeter_echo_mismatched_total",
            "pathmeter_echo_lost_total",
            "pathmeter_echo_reconnects_total",
        ] {
            assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
        }
        assert!(!page.has("pathmeter_trace_routers", &["direction=\"reverse\""]), "{page}");
    }
}

/// A longer route is an event of each probe, whatever its packets are.
pub(crate) fn change() {
    let mut plan = NetPlan::default();
    plan.host("a").host("b");
    for router in ["left", "one", "two", "three", "right"] {
        plan.router(router);
    }
    plan.wire("a", "left").cable("left", "one").cable("one", "right");
    plan.cable("left", "two").cable("two", "three").cable("three", "right").wire("right", "b");
    let net = plan.build(14);
    let link = Link::perfect(5_000_000);
    net.wire("a", "left").set_links(&link, &link);
    let _b = NodeAgent::start(
        net.node("b"),
        json!({"agent": {"name": "b", "grace": "1s"}, "peers": [{"name": "a", "address": net.v4("a")}]}),
        &[],
    );
    let route = |via: &str| net.node("left").ip(&format!("route replace 10.77.6.0/24 via {via}\n"));
    route("10.77.1.2");
    let a = start(&net, net.v4("b"), "12s");
    for probe in PROBES {
        eventually("a first route", || {
            let flows = flows(&a, probe);
            let hops = flows.first()?["forward"]["route"]["hops"].as_array()?.clone();
            (hops == [json!("10.77.0.2"), json!("10.77.1.2"), json!("10.77.2.2")]).then_some(())
        });
    }
    route("10.77.3.2");
    a.page_within(2 * CONFIRMED_WITHIN, "all routes have changed", |page| {
        PROBES.iter().all(|probe| {
            let labels = [&*format!("probe=\"{probe}\""), "kind=\"changed\""];
            page.count("pathmeter_trace_route_changes_total", &labels) >= 1
        })
    });
    let events = a.json("/api/v1/events");
    for probe in PROBES {
        let is_meant = |event: &&Value| event["event"] == "route_changed" && event["probe"] == probe;
        let event = events["events"].as_array().unwrap().iter().find(is_meant).unwrap();
        assert_eq!(event["from"]["hops"][1], "10.77.1.2", "{event}");
        assert_eq!(event["to"]["hops"][1], "10.77.3.2", "{event}");
    }
}

/// Labels that routers attach to their answers are shown over each protocol and both families.
pub(crate) fn labels() {
    for is_v4 in [true, false] {
        let net = NetPlan::pair().build(18);
        let routers = label_routers();
        net.wire("a", "b").set_routers(routers.clone());
        let [to_a, to_b] = ["a", "b"].map(|name| if is_v4 { net.v4(name) } else { net.v6(name) });
        let b = json!({"agent": {"name": "b", "grace": "1s"}, "peers": [{"name": "a", "address": to_a}]});
        let _b = NodeAgent::start(net.node("b"), b, &[]);
        let a = start(&net, to_b, "4s");
        for probe in PROBES {
            let trace = eventually("a trace that every router has answered", || {
                let trace = flows(&a, probe).first()?["forward"]["trace"].clone();
                let hops = trace["hops"].as_array()?;
                let has_answered = |hop: &Value| !hop["responders"].as_array().unwrap().is_empty();
                (hops.len() == routers.len() && hops.iter().all(has_answered)).then_some(trace)
            });
            let stack = json!([
                {"label": 16_004, "traffic_class": 5, "is_bottom": false, "ttl": 1},
                {"label": 24_015, "traffic_class": 0, "is_bottom": true, "ttl": 254},
            ]);
            assert_eq!(trace["hops"][0]["responders"][0]["mpls"], stack, "{probe}: {trace}");
            // A wrong checksum.
            assert_eq!(trace["hops"][2]["responders"][0]["mpls"], json!([]), "{probe}: {trace}");
        }
    }
}

/// A destination that can no longer be reached is an event over each protocol, and so is its return.
pub(crate) fn unreachable() {
    let net = NetPlan::chain(4).build(17);
    let link = Link::perfect(5_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    let b = json!({"agent": {"name": "b", "grace": "1s"}, "peers": [{"name": "a", "address": net.v4("a")}]});
    let _b = NodeAgent::start(net.node("b"), b, &[]);
    let a = start(&net, net.v4("b"), "4s");
    for probe in PROBES {
        eventually("a trace", || {
            flows(&a, probe).first()?["forward"]["trace"]["reached"].as_bool()?.then_some(())
        });
    }
    let blackhole = |action: &str| {
        net.node("r3").ip(&format!("route {action} blackhole {}/32\n", net.v4("b")));
    };
    let events = |name: &str, probe: &str| {
        let events = a.json("/api/v1/events")["events"].take();
        let is_meant = |event: &&Value| event["event"] == name && event["probe"] == probe;
        events.as_array().unwrap().iter().filter(is_meant).cloned().collect::<Vec<Value>>()
    };
    let wait_for = |name: &str| {
        PROBES.map(|probe| {
            a.page_within(CONFIRMED_WITHIN, name, |_| !events(name, probe).is_empty());
            events(name, probe).swap_remove(0)
        })
    };
    blackhole("add");
    for event in wait_for("route_unreachable") {
        assert_eq!(event["route"]["routers"], 4, "{event}");
        // Limited routers do not answer every trace.
        let last_hop = &event["last_hop"];
        let is_before = last_hop.is_null() || last_hop["ttl"].as_u64() <= Some(2);
        assert!(is_before, "{event}");
    }
    blackhole("del");
    wait_for("route_reachable");
    for probe in PROBES {
        assert_eq!(events("route_changed", probe), Vec::<Value>::new());
    }
}

/// An agent traces the clients of its `/ws`, here another agent, over ICMP and without any permission.
pub(crate) fn clients() {
    for is_permitted in [true, false] {
        let net = NetPlan::chain(ROUTERS).build(15);
        let link = Link::perfect(5_000_000);
        net.wire("a", "r1").set_links(&link, &link);
        let b = net.node("b");
        b.set_sysctl("ipv4/ping_group_range", if is_permitted { "0 2147483647" } else { "1 0" });
        let config = json!({
            "agent": {"name": "b", "grace": "1s"},
            "websocket": {"trace": "all"},
            "peers": [{"name": "a", "address": net.v4("a")}],
        });
        let b = match is_permitted {
            true => NodeAgent::start(b, config, &[]),
            false => NodeAgent::start_without_capabilities(b, config),
        };
        let _a = NodeAgent::start(
            net.node("a"),
            json!({
                "agent": {"name": "a", "grace": "1s"},
                "peers": [{"name": "b", "address": net.v4("b")}],
                "probes": [{"name": "live", "protocol": "websocket", "interval": "1s"}],
            }),
            &[],
        );
        let event = eventually("the client is traced", || {
            let events = b.json("/api/v1/events");
            let mut events = events["events"].as_array().unwrap().iter();
            events.find(|event| event["event"] == "client_traced").cloned()
        });
        let method = if is_permitted { "icmp" } else { "udp" };
        assert_eq!((&event["client"], &event["method"]), (&json!(net.v4("a")), &json!(method)), "{event}");
        assert_eq!((&event["reached"], &event["routers"]), (&json!(true), &json!(ROUTERS)), "{event}");
        let hops = event["hops"].as_array().unwrap();
        let found = hops.iter().map(|hop| address_of(&hop["responders"][0]["address"]));
        assert_eq!(found.collect::<Vec<IpAddr>>(), routers_of_chain(true, "reverse"), "{event}");
    }
}
