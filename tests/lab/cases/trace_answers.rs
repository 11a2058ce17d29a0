//! Traces whose answers come late, and forged answers.

use std::net::Ipv4Addr;
use std::time::{Duration, UNIX_EPOCH};

use pathmeter_lab::{ForgedError, LogEntry, MetricsPage, Net, NetPlan, WireDirection, eventually};
use pathmeter_proto::sim::Link;
use serde_json::{Value, json};

use crate::agent::NodeAgent;
use crate::testbed::Inconclusive;
use crate::trace::{CONFIRMED_WITHIN, flows};

/// Agents on `a` and `b`, of which that on `a` measures and traces the other.
fn start(net: &Net) -> [NodeAgent<'_>; 2] {
    let agent = |name: &str, peer: &str, probes: Value| {
        let peers = json!([{"name": peer, "address": net.v4(peer)}]);
        let config = json!({"agent": {"name": name, "grace": "1s"}, "peers": peers, "probes": probes});
        NodeAgent::start(net.node(name), config, &[])
    };
    let b = agent("b", "a", json!([]));
    let probes = json!([
        {"name": "mesh", "interval": "100ms"},
        {"name": "routes", "kind": "trace", "follows": "mesh", "interval": "2s"},
    ]);
    [agent("a", "b", probes), b]
}

/// The first route to the peer, as soon as it has these hops.
fn first_route(agent: &NodeAgent<'_>, hops: [&str; 2]) -> Value {
    eventually("the first route", || {
        let route = flows(agent).first_mut()?["forward"]["route"].take();
        (route["hops"] == json!(hops) && route["routers"] == hops.len()).then_some(route)
    })
}

/// The current route to the peer.
fn route(agent: &NodeAgent<'_>) -> Value {
    flows(agent).swap_remove(0)["forward"]["route"].take()
}

/// The current route is this one, with one router at each hop, and there never was another.
fn assert_unchanged(agent: &NodeAgent<'_>, route_before: &Value) {
    assert_eq!(route(agent), *route_before);
    let trace = flows(agent).swap_remove(0)["forward"]["trace"].take();
    assert_eq!(trace["first_lossy_hop"], Value::Null, "{trace}");
    for (hop, router) in
        trace["hops"].as_array().unwrap().iter().zip(route_before["hops"].as_array().unwrap())
    {
        for responder in hop["responders"].as_array().unwrap() {
            assert_eq!(responder["address"], *router, "{trace}");
        }
    }
    let page = agent.page();
    for name in [
        "pathmeter_trace_route_changes_total",
        "pathmeter_echo_mismatched_total",
        "pathmeter_accounting_errors_total",
    ] {
        assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
    }
    let events = agent.json("/api/v1/events");
    let is_of_route = |event: &&Value| event["event"].as_str().unwrap().starts_with("route_");
    let events: Vec<&Value> = events["events"].as_array().unwrap().iter().filter(is_of_route).collect();
    assert!(events.is_empty(), "{events:?}");
}

/// A router whose answers take another way than everything else: later than a trace waits for them they are
/// answers, later than they are remembered they belong to nothing. The route does not change.
pub(crate) fn late() -> Result<(), Inconclusive> {
    let mut plan = NetPlan::default();
    plan.host("a").host("b").router("r1").router("r2").router("slow");
    plan.wire("a", "r1").cable("r1", "r2").wire("r2", "b").wire("r2", "slow").cable("slow", "r1");
    let net = plan.build(22);
    let near = Link::perfect(2_000_000);
    net.wires().for_each(|(_, wire)| wire.set_links(&near, &near));
    net.node("r2").ip("route add 10.77.0.0/24 via 10.77.3.2 table 100\n\
         rule add ipproto icmp to 10.77.0.0/24 table 100\n");
    let slow = net.wire("r2", "slow");
    // How long each answer took on the slow wire.
    let delays = || {
        let delay = |entry: &LogEntry| {
            let copy = entry.outcome.as_ref().ok()?[0]?;
            Some(Duration::from_nanos(copy.delivered_at?.1 - entry.at))
        };
        slow.read(|log| log.iter().filter_map(delay).collect::<Vec<Duration>>())
    };
    let [a, _b] = start(&net);
    let before = first_route(&a, ["10.77.0.2", "10.77.3.1"]);

    slow.set_links(&Link::perfect(2_000_000_000), &near);
    let count = delays().len();
    a.page_within(CONFIRMED_WITHIN, "answers after two seconds", |_| {
        let hop = flows(&a).swap_remove(0)["forward"]["trace"]["hops"][1].take();
        let last = hop["responders"][0]["rtt_seconds"]["last"].as_f64();
        last.is_some_and(|last| last >= 2.0) && delays().len() >= count + 4
    });
    if delays().iter().any(|delay| *delay > Duration::from_secs(3)) {
        return Err(Inconclusive("the slow wire did not run in time".to_owned()));
    }
    assert_unchanged(&a, &before);
    let page = a.page();
    for name in ["pathmeter_trace_unanswered_total", "pathmeter_trace_unmatched_total"] {
        assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
    }

    slow.set_links(&Link::perfect(6_000_000_000), &near);
    let page = a.page_within(CONFIRMED_WITHIN, "answers after six seconds", |page| {
        page.count("pathmeter_trace_unmatched_total", &[]) >= 4
    });
    let unanswered = page.count("pathmeter_trace_unanswered_total", &["direction=\"forward\""]);
    assert!(unanswered >= page.count("pathmeter_trace_unmatched_total", &[]), "{page}");
    assert_unchanged(&a, &before);
    Ok(())
}

/// ICMP errors about probes that were never sent are counted, and such errors about answered probes ignored.
/// Neither changes anything.
pub(crate) fn forged() {
    const COUNT: u64 = 20;
    let net = NetPlan::chain(2).build(23);
    let link = Link::perfect(2_000_000);
    net.wires().for_each(|(_, wire)| wire.set_links(&link, &link));
    let [a, _b] = start(&net);
    let before = first_route(&a, ["10.77.0.2", "10.77.1.2"]);
    let unmatched = |page: &MetricsPage| page.count("pathmeter_trace_unmatched_total", &[]);
    for (what, forge) in FORGERIES {
        let expected = unmatched(&a.page()) + COUNT;
        (0..COUNT).for_each(|_| send_forged(&net, forge));
        let page = a.page_when(what, |page| unmatched(page) >= expected);
        assert_eq!(unmatched(&page), expected, "{what}\n{page}");
    }
    (0..COUNT).for_each(|_| send_forged(&net, |payload| payload));
    let traces = |page: &MetricsPage| {
        page.count("pathmeter_trace_traces_total", &["direction=\"forward\"", "result=\"complete\""])
    };
    let count = traces(&a.page());
    a.page_when("further traces", |page| traces(page) >= count + 2);
    assert_unchanged(&a, &before);
}

/// Changes the payload of a probe to what a forged error quotes.
type Forge = fn(Vec<u8>) -> Vec<u8>;

/// A probe begins with its sequence number and the time at which it was sent.
const FORGERIES: [(&str, Forge); 3] = [
    ("only the UDP header", |_| Vec::new()),
    ("another sequence number", |mut payload| {
        payload[0] ^= 0x80;
        payload
    }),
    ("another time", |mut payload| {
        payload[11] ^= 1;
        payload
    }),
];

/// Sends an error from a router that does not exist, about the latest probe for the second router that was
/// answered.
fn send_forged(net: &Net, forge: Forge) {
    const ANSWERED_AFTER: Duration = Duration::from_millis(100);
    let probe = eventually("a probe", || {
        let until = UNIX_EPOCH.elapsed().unwrap() - ANSWERED_AFTER;
        net.wire("a", "r1").read(|log| {
            let mut sent = log.iter().rev().filter(|entry| entry.direction == WireDirection::Forward);
            let found = sent.find(|LogEntry { at, head, .. }| {
                let is_probe = head.datagram.destination.port() == 9_862 && head.datagram.ttl == 2;
                is_probe && Duration::from_nanos(*at) < until
            });
            found.map(|entry| entry.head)
        })
    });
    let payload = forge(probe.payload[..probe.datagram.payload_bytes()].to_vec());
    let router = Ipv4Addr::new(198, 51, 100, 1);
    ForgedError { router, datagram: probe.datagram, payload }.send(net.node("r1"));
}
