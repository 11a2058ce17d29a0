//! Traces on the connections of echo probes.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use pathmeter_lab::{MetricsPage, Net, NetPlan, eventually};
use pathmeter_proto::sim::Link;
use serde_json::{Value, json};

use crate::agent::NodeAgent;
use crate::client_traces::tcp_counter;
use crate::seen_ports::{diamond, has_seen, is_address_of};
use crate::trace::{CONFIRMED_WITHIN, ROUTERS, responders, routers_of_chain};
use crate::trace_protocols::flows;

/// An agent on `a` with this many TCP probes to `b`, each with a trace on its connection, and one over HTTP
/// and one over WebSocket.
fn config(b: IpAddr, count: usize) -> Value {
    let address = SocketAddr::new(b, 9_862);
    let trace = |follows: &str| {
        let name = format!("{follows}-routes");
        json!({"name": name, "kind": "trace", "follows": follows, "interval": "2s", "method": "own_flow"})
    };
    let mut probes = vec![
        json!({"name": "pages", "protocol": "http", "interval": "200ms", "targets": ["web"]}),
        json!({"name": "live", "protocol": "websocket", "interval": "200ms", "targets": ["socket"]}),
        trace("pages"),
        trace("live"),
    ];
    for index in 1..=count {
        let name = format!("chat{index}");
        probes.push(json!({
            "name": name, "protocol": "tcp", "interval": "200ms", "lost_after": "3s", "peers": ["b"],
        }));
        probes.push(trace(&name));
    }
    json!({
        "agent": {"name": "a", "grace": "1s"},
        "peers": [{"name": "b", "address": b}],
        "targets": [
            {"name": "web", "address": b, "url": format!("http://{address}/-/healthy")},
            {"name": "socket", "address": b, "url": format!("ws://{address}/ws")},
        ],
        "probes": probes,
        // The routers of the lab answer as fast as they are asked.
        "trace": {"router_rate": "1000pps", "router_rate_ipv6": "1000pps", "agent_rate": "1000pps"},
    })
}

fn responder<'a>(net: &'a Net, a: IpAddr) -> NodeAgent<'a> {
    let config = json!({
        "agent": {"name": "b", "grace": "1s"},
        "peers": [{"name": "a", "address": a}],
        "websocket": {"open": true, "trace": "off"},
    });
    NodeAgent::start(net.node("b"), config, &[])
}

/// The flow of a trace that was reached on the connection of its echoes.
fn traced(agent: &NodeAgent<'_>, probe: &str) -> Value {
    let find = || {
        let flow = flows(agent, probe).into_iter().next()?;
        let is_traced = flow["is_on_own_flow"] == true && flow["forward"]["trace"]["reached"] == true;
        (is_traced && flow["forward"]["trace"]["routers"] != Value::Null).then_some(flow)
    };
    let mut found = None;
    agent.page_within(CONFIRMED_WITHIN, "a trace on the connection", |_| {
        found = find();
        found.is_some()
    });
    found.expect("waited for")
}

/// Every router is found on connections over both families, which lose nothing and send nothing again.
pub(crate) fn chain() {
    for is_v4 in [true, false] {
        let net = NetPlan::chain(ROUTERS).build(41);
        for (first, second) in [("a", "r1"), ("r8", "b")] {
            let link = Link::perfect(5_000_000);
            net.wire(first, second).set_links(&link, &link);
        }
        let address = |name| if is_v4 { net.v4(name) } else { net.v6(name) };
        let _b = responder(&net, address("a"));
        let a = NodeAgent::start(net.node("a"), config(address("b"), 1), &[]);
        for probe in ["chat1-routes", "pages-routes", "live-routes"] {
            let flow = traced(&a, probe);
            let trace = &flow["forward"]["trace"];
            assert_eq!(responders(trace), routers_of_chain(is_v4, "forward"), "{probe}: {flow}");
            assert_eq!(trace["routers"], ROUTERS, "{probe}: {flow}");
            let rtt = trace["rtt_seconds"].as_f64().unwrap();
            assert!((0.020..0.5).contains(&rtt), "{probe}: {flow}");
        }
        let page = a.page_when("rounds after the first trace", |page| {
            ["chat1", "pages", "live"].iter().all(|probe| {
                let labels = [&*format!("probe=\"{probe}-routes\""), "result=\"complete\""];
                page.has("pathmeter_trace_traces_total", &labels)
                    && page.count("pathmeter_trace_traces_total", &labels) >= 3
            })
        });
        for name in [
            "pathmeter_accounting_errors_total",
            "pathmeter_trace_unmatched_total",
            "pathmeter_trace_send_errors_total",
            "pathmeter_trace_route_changes_total",
            "pathmeter_echo_lost_total",
            "pathmeter_echo_reconnects_total",
        ] {
            assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
        }
        assert_eq!(page.count("pathmeter_trace_own_flow", &[]), 3, "{page}");
        assert_eq!(tcp_counter(&net, "a", "netstat", "TCPFastRetrans"), 0);
        let ignored = tcp_counter(&net, "a", "netstat", "OutOfWindowIcmps");
        assert!(ignored >= 3 * u64::try_from(ROUTERS).unwrap(), "the kernel ignores the answers: {ignored}");
    }
}

/// Where routers choose by flow, a trace shows the way of the connection, and after it was opened again, that
/// of the next one, without an event.
pub(crate) fn balanced() {
    balanced_from("a", 3, None);
}

/// The same where this host itself chooses among its uplinks.
pub(crate) fn balanced_uplinks() {
    // Not an address of an uplink, for which the kernel would prefer that uplink.
    balanced_from("left", 2, Some("10.77.0.2"));
}

/// From a node of a diamond with this number of routers between it and `b`, the second last of which is that
/// of the way.
fn balanced_from(node: &str, routers: usize, source: Option<&str>) {
    const WAYS: usize = 4;
    const PROBES: usize = 6;
    let net = diamond(WAYS, 42, "dport 9863", "sport");
    if source.is_some() {
        // By addresses and ports; what RTM_GETROUTE says of chosen fields is not what the kernel does. Where
        // packets are forwarded, this would be the hash of the socket, which a veth device passes on.
        net.node(node).set_sysctl("ipv4/fib_multipath_hash_policy", "1");
    }
    // The router left has several addresses.
    let b = json!({"agent": {"name": "b", "grace": "1s"}, "responder": {"allow": ["10.77.0.0/16"]}, "websocket": {"open": true}});
    let _b = NodeAgent::start(net.node("b"), b, &[]);
    let mut config = config(net.v4("b"), PROBES);
    for probe in config["probes"].as_array_mut().unwrap() {
        if let (Some(source), true) = (source, probe["protocol"] == "tcp") {
            probe["source"] = json!(source);
        }
    }
    let a = NodeAgent::start(net.node(node), config, &[]);
    let check = |earlier: &BTreeMap<String, String>| {
        let mut sources = BTreeMap::new();
        for index in 1..=PROBES {
            let probe = format!("chat{index}-routes");
            let find = || {
                let paths = a.json("/api/v1/paths");
                let path = paths["paths"].as_array().unwrap().iter().find(|path| path["probe"] == probe)?;
                let (source, flow) = (path["sources"][0].as_str()?, &path["flows"][0]);
                let is_traced = flow["is_on_own_flow"] == true
                    && flow["forward"]["trace"]["reached"] == true
                    && flow["forward"]["trace"]["hops"].as_array()?.len() == routers;
                let is_new = earlier.get(&probe).is_none_or(|earlier| earlier != source);
                // The source of the probes before may be shown a moment longer.
                let port = source.parse::<SocketAddr>().unwrap().port();
                let is_used = (1..=WAYS).any(|way| has_seen(&net, way, port));
                (is_traced && is_new && is_used).then(|| (source.to_owned(), flow.clone()))
            };
            let mut found = None;
            a.page_within(CONFIRMED_WITHIN, "a trace on the connection", |_| {
                found = find();
                found.is_some()
            });
            let (source, flow) = found.expect("waited for");
            let port = source.parse::<SocketAddr>().unwrap().port();
            let used: Vec<usize> = (1..=WAYS).filter(|way| has_seen(&net, *way, port)).collect();
            let [way] = used[..] else { panic!("a flow has one way: {used:?}, {flow}") };
            // Until a trace with these ports is complete, those before are shown.
            a.page_within(CONFIRMED_WITHIN, "the route and the trace of these ports", |_| {
                let Some(flow) = flows(&a, &probe).into_iter().next() else { return false };
                let hop = &flow["forward"]["trace"]["hops"][routers - 2]["responders"][0]["address"];
                [&flow["forward"]["route"]["hops"][routers - 2], hop].iter().all(|address| {
                    let address = address.as_str().and_then(|text| text.parse().ok());
                    address.is_some_and(|address| is_address_of(&net, way, address))
                })
            });
            sources.insert(probe, source);
        }
        sources
    };
    let first = check(&BTreeMap::new());
    // The responder ends all connections, and takes new ones.
    let b = net.node("b");
    b.nft(
        "add table ip ending\n\
         add chain ip ending input { type filter hook input priority 0; }\n\
         add rule ip ending input tcp dport 9863 tcp flags & psh == psh reject with tcp reset\n",
    );
    a.page_when("all connections have ended", |page| {
        (1..=PROBES).all(|index| {
            page.count("pathmeter_trace_own_flow", &[&format!("probe=\"chat{index}-routes\"")]) == 0
        })
    });
    b.nft("delete table ip ending\n");
    check(&first);
    let traces = a.json("/api/v1/traces?target=b");
    let triggers = traces["traces"].as_array().unwrap().iter().map(|trace| trace["trigger"].clone());
    assert!(triggers.clone().any(|trigger| trigger == "connection"), "{traces}");
    let events = a.json("/api/v1/events");
    let mut events = events["events"].as_array().unwrap().iter();
    assert_eq!(events.find(|event| event["event"].as_str().unwrap().starts_with("route_")), None);
    let page = a.page();
    assert_eq!(page.count("pathmeter_trace_route_changes_total", &[]), 0, "{page}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
}

/// A firewall that drops a connection after a segment with a small TTL is found after two connections: it is
/// an event, echoes go on, and traces have other ports.
pub(crate) fn stalled() {
    let net = NetPlan::chain(4).build(43);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    // Attempts to connect are left alone.
    net.node("r2").nft(
        "add table ip clamp\n\
         add chain ip clamp pre { type filter hook prerouting priority mangle; }\n\
         add rule ip clamp pre tcp dport 9863 tcp flags & syn == 0 ip ttl < 16 ct mark set 1\n\
         add rule ip clamp pre tcp dport 9863 ct mark 1 ip ttl set 2\n",
    );
    let _b = responder(&net, net.v4("a"));
    let a = NodeAgent::start(net.node("a"), config(net.v4("b"), 1), &[]);
    let find = || {
        let events = a.json("/api/v1/events");
        let mut events = events["events"].as_array().unwrap().iter();
        events.find(|event| event["event"] == "traced_connection_stalled").cloned()
    };
    a.page_within(CONFIRMED_WITHIN, "the event", |_| find().is_some());
    let event = find().unwrap();
    assert_eq!((&event["probe"], &event["peer"]), (&json!("chat1-routes"), &json!("b")), "{event}");
    assert!(a.log().contains("two connections stalled after trace probes"), "{}", a.log());
    let [ok, reconnects] = {
        let page = a.page();
        ["pathmeter_echo_rtt_seconds_count", "pathmeter_echo_reconnects_total"]
            .map(|name| page.count(name, &["probe=\"chat1\""]))
    };
    let page = a.page_when("echoes and traces go on", |page| {
        let labels = ["probe=\"chat1-routes\"", "result=\"complete\""];
        page.count("pathmeter_echo_rtt_seconds_count", &["probe=\"chat1\""]) > ok + 50
            && page.has("pathmeter_trace_traces_total", &labels)
            && page.count("pathmeter_trace_traces_total", &labels) >= 3
    });
    let again = page.count("pathmeter_echo_reconnects_total", &["probe=\"chat1\""]);
    assert!(again <= reconnects + 1, "{reconnects} before, {again} after: {page}");
    assert_eq!(page.count("pathmeter_trace_own_flow", &["probe=\"chat1-routes\""]), 0, "{page}");
    assert_eq!(page.count("pathmeter_trace_own_flow", &["probe=\"pages-routes\""]), 1, "{page}");
    assert_eq!(flows(&a, "chat1-routes")[0]["is_on_own_flow"], false);
}

/// An outage is reported with the last hop and the route from before, and is not held against the segments.
pub(crate) fn outage() {
    let net = NetPlan::chain(4).build(44);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    let _b = responder(&net, net.v4("a"));
    let a = NodeAgent::start(net.node("a"), config(net.v4("b"), 1), &[]);
    let before = traced(&a, "chat1-routes");
    let blackhole =
        |verb: &str| net.node("r3").ip(&format!("route {verb} blackhole {}/32 metric 1\n", net.v4("b")));
    let find = |name: &str| {
        let events = a.json("/api/v1/events");
        let mut events = events["events"].as_array().unwrap().iter();
        events.find(|event| event["event"] == name && event["probe"] == "chat1-routes").cloned()
    };
    blackhole("add");
    a.page_within(CONFIRMED_WITHIN, "the outage is an event", |_| find("route_unreachable").is_some());
    let event = find("route_unreachable").unwrap();
    assert_eq!(event["route"], before["forward"]["route"], "{event}");
    assert_eq!(event["last_hop"]["ttl"], 2, "{event}");
    blackhole("del");
    a.page_within(CONFIRMED_WITHIN, "it has ended", |_| find("route_reachable").is_some());
    let after = traced(&a, "chat1-routes");
    assert_eq!(after["forward"]["route"], before["forward"]["route"], "{after}");
    for name in ["route_changed", "traced_connection_stalled"] {
        assert_eq!(find(name), None);
    }
}

/// Without the capability the agent says so once, and traces with other ports.
pub(crate) fn not_permitted() {
    let net = NetPlan::chain(4).build(45);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    let _b = responder(&net, net.v4("a"));
    let a = NodeAgent::start_without_capabilities(net.node("a"), config(net.v4("b"), 2));
    for probe in ["chat1-routes", "chat2-routes", "pages-routes"] {
        let flow = eventually("a trace", || {
            let flow = flows(&a, probe).into_iter().next()?;
            (flow["forward"]["trace"]["reached"] == true).then_some(flow)
        });
        assert_eq!(responders(&flow["forward"]["trace"]).len(), 4, "{probe}: {flow}");
        assert_eq!(flow["is_on_own_flow"], false, "{probe}: {flow}");
        assert_eq!(flow["own_flow_refusal"], "raw sockets need CAP_NET_RAW", "{probe}: {flow}");
    }
    let log = a.log();
    assert_eq!(log.matches("connections of probes cannot be traced with own_flow").count(), 1, "{log}");
    assert!(log.contains("CAP_NET_RAW"), "{log}");
    assert_eq!(a.page().count("pathmeter_trace_own_flow", &[]), 0);
    let mut config = config(net.v4("b"), 2);
    for probe in config["probes"].as_array_mut().unwrap() {
        probe.as_object_mut().unwrap().remove("method");
    }
    a.configure(config);
    a.page_when("the method has changed", |page| !page.has("pathmeter_trace_own_flow", &[]));
    assert_eq!(flows(&a, "chat1-routes")[0]["own_flow_refusal"], Value::Null);
}

/// An ICMP error about another port of the peer does not end the trace of a connection, and its segments have
/// the DSCP of the echoes.
pub(crate) fn disturbed() {
    let net = NetPlan::chain(4).build(46);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    net.node("b").nft(
        "add table ip refuse\n\
         add chain ip refuse input { type filter hook input priority 0; }\n\
         add rule ip refuse input tcp dport 7777 reject with icmp type port-unreachable\n",
    );
    net.node("r1").nft(
        "add table ip marked\n\
         add chain ip marked forward { type filter hook forward priority 0; }\n\
         add rule ip marked forward tcp dport 9863 ip dscp != ef counter\n",
    );
    let _b = responder(&net, net.v4("a"));
    let mut config = config(net.v4("b"), 1);
    for probe in config["probes"].as_array_mut().unwrap() {
        if probe["protocol"] == "tcp" {
            probe["dscp"] = json!("ef");
        }
    }
    let a = NodeAgent::start(net.node("a"), config.clone(), &[]);
    traced(&a, "chat1-routes");
    let refused = net.node("a").within(|| TcpStream::connect((net.v4("b"), 7_777)));
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    let labels = ["probe=\"chat1-routes\"", "result=\"complete\""];
    let count = |page: &MetricsPage| page.count("pathmeter_trace_traces_total", &labels);
    let before = count(&a.page());
    let page = a.page_when("further traces", |page| count(page) >= before + 3);
    for probe in ["chat1", "pages", "live"] {
        let label = format!("probe=\"{probe}-routes\"");
        assert_eq!(page.count("pathmeter_trace_own_flow", &[&label]), 1, "{probe}: {page}");
    }
    assert_eq!(page.count("pathmeter_trace_unanswered_total", &["probe=\"chat1-routes\""]), 0, "{page}");
    let listed = net.node("r1").command("nft").args(["list", "table", "ip", "marked"]).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.contains("counter packets 0 "), "{listed}");
    for probe in config["probes"].as_array_mut().unwrap() {
        probe.as_object_mut().unwrap().remove("method");
    }
    a.configure(config);
    a.page_when("the method has changed", |page| !page.has("pathmeter_trace_own_flow", &[]));
}

/// A server that closes each connection is traced with SYN segments, and the reason is shown.
pub(crate) fn closed_each_time() {
    let net = NetPlan::chain(4).build(47);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    let listener = net.node("b").within(|| TcpListener::bind(("0.0.0.0", 8_080)).unwrap());
    net.node("b").spawn(move || {
        for client in listener.incoming() {
            // A trace closes its connections at once.
            let Ok(mut client) = client else { continue };
            let _ = client.read(&mut [0; 4_096]);
            let _ = client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    let url = format!("http://{}:8080/", net.v4("b"));
    let config = json!({
        "agent": {"name": "a", "grace": "1s"},
        "targets": [{"name": "web", "address": net.v4("b"), "url": url}],
        "probes": [
            {"name": "pages", "protocol": "http", "interval": "1s", "targets": ["web"]},
            {"name": "page-routes", "kind": "trace", "follows": "pages", "interval": "2s", "method": "own_flow"},
        ],
        "trace": {"router_rate": "1000pps", "agent_rate": "1000pps"},
    });
    let a = NodeAgent::start(net.node("a"), config, &[]);
    let labels = ["probe=\"page-routes\"", "result=\"complete\""];
    let page = a.page_when("traces", |page| {
        page.has("pathmeter_trace_traces_total", &labels)
            && page.count("pathmeter_trace_traces_total", &labels) >= 3
    });
    assert_eq!(page.count("pathmeter_trace_own_flow", &[]), 0, "{page}");
    let flow = flows(&a, "page-routes").swap_remove(0);
    assert_eq!(responders(&flow["forward"]["trace"]), routers_of_chain(true, "forward")[..4], "{flow}");
    let refusal = flow["own_flow_refusal"].as_str().unwrap();
    assert!(refusal.contains("connection"), "{flow}");
}
