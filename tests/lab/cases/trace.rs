//! Traces through routers of the kernel, and through routers that attach something to their answers.

use std::net::IpAddr;
use std::time::Duration;

use pathmeter_lab::{Net, NetPlan, WireRouter, eventually};
use pathmeter_proto::sim::{Link, Loss};
use pathmeter_proto::wire::icmp_extensions::{IcmpExtensions, MplsLabel};
use serde_json::{Value, json};

use crate::agent::{NodeAgent, PROGRAM};
use crate::testbed::Inconclusive;

/// Routers of a long chain.
pub(crate) const ROUTERS: usize = 8;

/// An interval, and sixteen answers of a router that is asked 0.8 times per second.
pub(crate) const CONFIRMED_WITHIN: Duration = Duration::from_secs(60);

/// An agent on `name` that measures and traces the agent on `peer`.
pub(crate) fn start<'a>(net: &'a Net, name: &str, peer: (&str, IpAddr), flows: u8) -> NodeAgent<'a> {
    start_with(net, name, peer, flows, ["100ms", "5s"])
}

/// The same, with the intervals of echoes and of traces.
pub(crate) fn start_with<'a>(
    net: &'a Net,
    name: &str,
    peer: (&str, IpAddr),
    flows: u8,
    [echoes, traces]: [&str; 2],
) -> NodeAgent<'a> {
    NodeAgent::start(net.node(name), config(name, peer, flows, [echoes, traces]), &[])
}

fn config(name: &str, peer: (&str, IpAddr), flows: u8, [echoes, traces]: [&str; 2]) -> Value {
    json!({
        "agent": {"name": name, "grace": "1s"},
        "peers": [{"name": peer.0, "address": peer.1}],
        "probes": [
            {"name": "mesh", "interval": echoes, "flows": flows},
            {"name": "routes", "kind": "trace", "follows": "mesh", "interval": traces},
        ],
    })
}

/// The flows of the traced path; empty while there are none.
pub(crate) fn flows(agent: &NodeAgent<'_>) -> Vec<Value> {
    let paths = agent.json("/api/v1/paths");
    let path = paths["paths"].as_array().unwrap().iter().find(|path| path["probe"] == "routes");
    path.and_then(|path| path["flows"].as_array().cloned()).unwrap_or_default()
}

/// The latest trace of the first flow in one direction, as soon as one has reached the peer.
pub(crate) fn first_trace(agent: &NodeAgent<'_>, direction: &str) -> Value {
    eventually("a trace that reaches the peer", || {
        let flows = flows(agent);
        let trace = &flows.first()?[direction]["trace"];
        trace["reached"].as_bool()?.then(|| trace.clone())
    })
}

/// A trace of the first flow in one direction in which every router is known.
fn whole_trace(agent: &NodeAgent<'_>, direction: &str, routers: usize) -> Value {
    eventually("a trace with every router", || {
        let flows = flows(agent);
        let trace = &flows.first()?[direction]["trace"];
        let hops = trace["hops"].as_array()?;
        let is_known = |hop: &Value| hop["responders"].as_array().is_some_and(|found| !found.is_empty());
        (hops.len() == routers && hops.iter().all(is_known)).then(|| trace.clone())
    })
}

pub(crate) fn address_of(text: &Value) -> IpAddr {
    text.as_str().unwrap().parse().unwrap()
}

/// The first responder of each hop that has one.
pub(crate) fn responders(trace: &Value) -> Vec<IpAddr> {
    let hops = trace["hops"].as_array().map_or(&[][..], Vec::as_slice);
    let texts = hops.iter().filter_map(|hop| hop["responders"][0]["address"].as_str());
    texts.map(|text| text.parse().unwrap()).collect()
}

/// The routers of a chain, by the address of the interface at which the packets arrive, from `a` to `b`
/// (forward) or back.
pub(crate) fn routers_of_chain(is_v4: bool, direction: &str) -> Vec<IpAddr> {
    let end = if direction == "forward" { 2 } else { 1 };
    let address = |cable| match is_v4 {
        true => format!("10.77.{cable}.{end}"),
        false => format!("fd77:{cable}::{end}"),
    };
    let cables: Vec<usize> =
        if direction == "forward" { (0..ROUTERS).collect() } else { (1..=ROUTERS).rev().collect() };
    cables.into_iter().map(|cable| address(cable).parse().unwrap()).collect()
}

/// The events of one type about the way to the peer, oldest first.
pub(crate) fn forward_events(agent: &NodeAgent<'_>, name: &str) -> Vec<Value> {
    let events = agent.json("/api/v1/events");
    let is_meant = |event: &&Value| event["event"] == name && event["direction"] == "forward";
    events["events"].as_array().unwrap().iter().filter(is_meant).cloned().collect()
}

/// The first of these events, as soon as there is one.
pub(crate) fn wait_for_event(agent: &NodeAgent<'_>, name: &str) -> Value {
    agent.page_within(CONFIRMED_WITHIN, name, |_| !forward_events(agent, name).is_empty());
    forward_events(agent, name).swap_remove(0)
}

/// Every router of a chain is found, over both families, with an RTT that grows with the distance.
pub(crate) fn chain() {
    for is_v4 in [true, false] {
        let net = NetPlan::chain(ROUTERS).build(3);
        for (first, second) in [("a", "r1"), ("r8", "b")] {
            let link = Link::perfect(5_000_000);
            net.wire(first, second).set_links(&link, &link);
        }
        let address = |name| if is_v4 { net.v4(name) } else { net.v6(name) };
        let b = start(&net, "b", ("a", address("a")), 1);
        let a = start(&net, "a", ("b", address("b")), 1);
        for direction in ["forward", "reverse"] {
            let trace = first_trace(&a, direction);
            assert_eq!(trace["routers"], ROUTERS, "{trace}");
            let hops = trace["hops"].as_array().unwrap();
            assert_eq!(responders(&trace), routers_of_chain(is_v4, direction), "{direction}: {trace}");
            let least = |hop: &Value| hop["responders"][0]["rtt_seconds"]["min"].as_f64().unwrap();
            assert!(hops.iter().all(|hop| least(hop) >= 0.010), "all are behind the first wire: {trace}");
            assert!(trace["rtt_seconds"].as_f64().unwrap() >= 0.020, "{trace}");
        }
        for agent in [&a, &b] {
            let page = agent.page_when("a complete trace", |page| {
                page.has("pathmeter_trace_traces_total", &["result=\"complete\""])
                    && page.count("pathmeter_trace_traces_total", &["result=\"complete\""]) >= 1
            });
            for name in [
                "pathmeter_accounting_errors_total",
                "pathmeter_trace_unmatched_total",
                "pathmeter_echo_mismatched_total",
            ] {
                assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
            }
            assert_eq!(page.count("pathmeter_trace_routers", &["forward"]), ROUTERS as u64, "{page}");
            agent.page_when("the way back is known", |page| {
                page.has("pathmeter_trace_routers", &["reverse"])
                    && page.count("pathmeter_trace_routers", &["reverse"]) == ROUTERS as u64
            });
        }
    }
}

/// A changed route is reported with both routes, and as restored when it is back.
pub(crate) fn change() {
    // The two agents ask the routers for both directions; the rest of what they answer is for confirmations.
    const INTERVALS: [&str; 2] = ["100ms", "12s"];
    let mut plan = NetPlan::default();
    plan.host("a").host("b").router("left").router("one").router("two").router("right");
    plan.wire("a", "left").cable("left", "one").cable("one", "right");
    plan.cable("left", "two").cable("two", "right").wire("right", "b");
    let net = plan.build(4);
    let [one, two] = ["10.77.1.2", "10.77.3.2"];
    let route = |via: &str| net.node("left").ip(&format!("route replace 10.77.5.0/24 via {via}\n"));
    route(one);
    let b = start_with(&net, "b", ("a", net.v4("a")), 1, INTERVALS);
    let a = start_with(&net, "a", ("b", net.v4("b")), 1, INTERVALS);
    let trace = first_trace(&a, "forward");
    let second = |trace: &Value| trace["hops"][1]["responders"][0]["address"].clone();
    assert_eq!(second(&trace), one, "{trace}");
    // On the way back the left router answers from the interface that it sends with, which changes too.
    let events = |name: &str| {
        let events = a.json("/api/v1/events");
        let is_meant = |event: &&Value| event["event"] == name && event["direction"] == "forward";
        let all = events["events"].as_array().unwrap().iter().filter(is_meant);
        all.cloned().collect::<Vec<Value>>()
    };
    route(two);
    let wait_for = |kind: &str| {
        let label = format!("kind=\"{kind}\"");
        a.page_within(CONFIRMED_WITHIN, &format!("the route is {kind}"), |page| {
            page.count("pathmeter_trace_route_changes_total", &[&label, "direction=\"forward\""]) == 1
        });
        eventually("its event", || events(&format!("route_{kind}")).first().cloned())
    };
    let changed = wait_for("changed");
    assert_eq!(
        (&changed["from"]["hops"][1], &changed["to"]["hops"][1]),
        (&json!(one), &json!(two)),
        "{changed}"
    );
    assert_eq!((&changed["peer"], &changed["flow"]), (&json!("b"), &json!(0)), "{changed}");
    assert!(changed["after"]["decided"].as_u64() > Some(0), "{changed}");
    route(one);
    let restored = wait_for("restored");
    assert_eq!(restored["to"]["id"], changed["from"]["id"], "{restored}");
    assert_eq!(events("route_load_balanced"), Vec::<Value>::new());
    drop(b);
}

/// One of four equal-cost paths loses a tenth: the flow on it is named, with the hop at which its route
/// leaves those of the others.
pub(crate) fn lossy_flow() -> Result<(), Inconclusive> {
    const FLOWS: u8 = 4;
    const INTERVALS: [&str; 2] = ["20ms", "30s"];
    let net = NetPlan::diamond(4).build(6);
    let b = start_with(&net, "b", ("a", net.v4("a")), FLOWS, INTERVALS);
    let a = start_with(&net, "a", ("b", net.v4("b")), FLOWS, INTERVALS);
    let routers = eventually("the routes of all flows", || {
        let flows = flows(&a);
        let router = |flow: &Value| flow["forward"]["route"]["hops"][1].as_str().map(str::to_owned);
        let routers: Option<Vec<String>> = flows.iter().map(router).collect();
        routers.filter(|routers| routers.len() == usize::from(FLOWS))
    });
    let is_alone = |router: &&String| routers.iter().filter(|other| other == router).count() == 1;
    let Some(router) = routers.iter().find(is_alone) else {
        return Err(Inconclusive(format!("no flow has a path of its own: {routers:?}")));
    };
    let flow = routers.iter().position(|other| other == router).unwrap();
    let name = (1..=4).find(|way| *router == format!("10.77.{}.2", 2 * way - 1)).map(|way| format!("m{way}"));
    let mut lossy = Link::perfect(1_000_000);
    lossy.loss = Loss::Random(0.1);
    net.wire("left", &name.unwrap()).set_links(&lossy, &Link::perfect(1_000_000));
    let events = || {
        let events = a.json("/api/v1/events");
        let found =
            events["events"].as_array().unwrap().iter().filter(|event| event["event"] == "flow_lossy");
        found.cloned().collect::<Vec<Value>>()
    };
    let found = eventually("the lossy flow", || events().first().cloned());
    assert_eq!((&found["flow"], &found["forward_hop"]), (&json!(flow), &json!(2)), "{found}");
    let losses = |index: usize| flows(&a)[index]["echoes"]["lost"].as_u64().unwrap();
    assert!(losses(flow) > 0);
    for other in (0..usize::from(FLOWS)).filter(|other| *other != flow) {
        assert_eq!(losses(other), 0, "flow {other}");
    }
    assert_eq!(events().len(), 1, "{:?}", events());
    drop(b);
    Ok(())
}

/// An extension structure with one label, with which the datagram arrived with TTL 1.
fn one_label(label: u32) -> Vec<u8> {
    let entry = MplsLabel { label, traffic_class: 0, is_bottom: true, ttl: 1 }.to_bytes();
    IcmpExtensions::encode(&[(1, 1, &entry)])
}

/// Routers that attach labels and interfaces, correctly and not.
pub(crate) fn label_routers() -> Vec<WireRouter> {
    let stack = [
        MplsLabel { label: 16_004, traffic_class: 5, is_bottom: false, ttl: 1 },
        MplsLabel { label: 24_015, traffic_class: 0, is_bottom: true, ttl: 254 },
    ];
    let stack: Vec<u8> = stack.iter().flat_map(|label| label.to_bytes()).collect();
    // Index 513, 192.0.2.1, a name with an escape character, MTU 1500; then the next hop.
    let incoming =
        [&[0, 0, 2, 1, 0, 1, 0, 0, 192, 0, 2, 1, 12][..], b"ge-0/\x1b0\0\0\0\0", &[0, 0, 5, 220]].concat();
    let next_hop = [&[0, 2, 0, 0, 0x20, 1, 0x0d, 0xb8][..], &[0; 11], &[7]].concat();
    let all =
        IcmpExtensions::encode(&[(1, 1, &stack), (2, 0x0f, &incoming), (7, 7, &[1]), (2, 0xc4, &next_hop)]);
    let mut damaged = one_label(3);
    damaged[9] ^= 1;
    let mut truncated = one_label(4);
    truncated.truncate(9);
    let unannounced = |number, padded_bytes| WireRouter {
        has_length: false,
        padded_bytes,
        // Shorter than every request, so that only the padding decides the length of the quotation.
        quoted_payload_bytes: 16,
        ..WireRouter::extended(number, one_label(number.into()))
    };
    vec![
        WireRouter::extended(1, all),
        WireRouter { quoted_payload_bytes: 16, ..WireRouter::extended(2, one_label(2)) },
        WireRouter::extended(3, damaged),
        WireRouter::extended(4, truncated),
        unannounced(5, 128),
        unannounced(6, 132),
        WireRouter::plain(7),
    ]
}

/// What routers attach to their answers is shown, over both families, if it is valid. On the way back there
/// is nothing. Other labels are no other route.
pub(crate) fn labels() {
    for is_v4 in [true, false] {
        let net = NetPlan::pair().build(7);
        let wire = net.wire("a", "b");
        let routers = label_routers();
        wire.set_routers(routers.clone());
        let [a_address, b_address] = ["a", "b"].map(|name| if is_v4 { net.v4(name) } else { net.v6(name) });
        let b = start(&net, "b", ("a", a_address), 1);
        let a = start(&net, "a", ("b", b_address), 1);
        let trace = whole_trace(&a, "forward", routers.len());
        let responder = |trace: &Value, hop: usize| trace["hops"][hop - 1]["responders"][0].clone();
        for (index, router) in routers.iter().enumerate() {
            assert_eq!(responder(&trace, index + 1)["address"], json!(router.address(is_v4)), "{trace}");
        }
        let label = |label: u32| json!({"label": label, "traffic_class": 0, "is_bottom": true, "ttl": 1});
        let stack = json!([
            {"label": 16_004, "traffic_class": 5, "is_bottom": false, "ttl": 1},
            {"label": 24_015, "traffic_class": 0, "is_bottom": true, "ttl": 254},
        ]);
        let interfaces = json!([
            {"role": "incoming", "index": 513, "address": "192.0.2.1", "name": "ge-0/\u{fffd}0", "mtu_bytes": 1_500},
            {"role": "next_hop", "index": null, "address": "2001:db8::7", "name": null, "mtu_bytes": null},
        ]);
        let attached = |trace: &Value, hop: usize| {
            let responder = responder(trace, hop);
            (responder["mpls"].clone(), responder["interfaces"].clone())
        };
        assert_eq!(attached(&trace, 1), (stack, interfaces), "{trace}");
        assert_eq!(
            attached(&trace, 2),
            (json!([label(2)]), json!([])),
            "a short quotation is padded\n{trace}"
        );
        assert_eq!(attached(&trace, 5), (json!([label(5)]), json!([])), "after 128 bytes\n{trace}");
        // A wrong checksum, a truncated structure, one after 132 bytes, and none.
        for hop in [3, 4, 6, 7] {
            assert_eq!(attached(&trace, hop), (json!([]), json!([])), "hop {hop}\n{trace}");
        }
        let back = whole_trace(&a, "reverse", routers.len());
        for hop in 1..=routers.len() {
            assert_eq!(attached(&back, hop), (json!([]), json!([])), "hop {hop}\n{back}");
        }
        let expected = [
            format!(
                "{} [MPLS: L=16004 E=5 S=0 T=1 / L=24015 E=0 S=1 T=254] \
                     [incoming: ge-0/\u{fffd}0 192.0.2.1 index=513 mtu=1500] [next-hop: 2001:db8::7]",
                routers[0].address(is_v4)
            ),
            format!("{} [MPLS: L=2 E=0 S=1 T=1]", routers[1].address(is_v4)),
        ];
        // An answer may come later than the command waits for it.
        eventually("the table", || table_of(&net, b_address).starts_with(&expected).then_some(()));
        for agent in [&a, &b] {
            let page =
                agent.page_when("a trace", |page| page.has("pathmeter_trace_traces_total", &["forward"]));
            for name in ["pathmeter_trace_unmatched_total", "pathmeter_echo_mismatched_total"] {
                assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
            }
        }
        // The second router answers with another label, and quotes only the UDP header, which it pads.
        let mut changed = routers.clone();
        (changed[1].extensions, changed[1].quoted_payload_bytes) = (one_label(1_000), 0);
        wire.set_routers(changed);
        let page = a.page_when("the other label", |_| {
            let trace = &flows(&a)[0]["forward"]["trace"];
            attached(trace, 2).0 == json!([label(1_000)])
        });
        for name in ["pathmeter_accounting_errors_total", "pathmeter_trace_route_changes_total"] {
            assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
        }
        drop(b);
    }
}

/// What follows the RTT in each line of the table of `pathmeter probe trace` from `a` to `target`.
fn table_of(net: &Net, target: IpAddr) -> Vec<String> {
    let host = if target.is_ipv4() { target.to_string() } else { format!("[{target}]") };
    let output = net.node("a").command(PROGRAM).args(["probe", "trace", "-n", &host]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(" ms  "));
    let found: Vec<String> = lines.map(|(_, rest)| rest.to_owned()).collect();
    assert!(!found.is_empty(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    found
}
/// A router drops what is for the peer, and later does not: two events, with the last hop that answers, and
/// no change of the route.
pub(crate) fn unreachable() -> Result<(), Inconclusive> {
    let net = NetPlan::chain(4).build(7);
    let b = start(&net, "b", ("a", net.v4("a")), 1);
    let a = start(&net, "a", ("b", net.v4("b")), 1);
    let trace = first_trace(&a, "forward");
    assert_eq!(trace["routers"], 4, "{trace}");
    let blackhole = |action: &str| {
        net.node("r3").ip(&format!("route {action} blackhole {}/32\n", net.v4("b")));
    };
    blackhole("add");
    let down = wait_for_event(&a, "route_unreachable");
    match down["last_hop"]["ttl"].as_u64() {
        // The answers of routers behind the first wire came later than the trace waits.
        None | Some(1) => return Err(Inconclusive(format!("some answers are missing: {down}"))),
        Some(_) => assert_eq!(down["last_hop"], json!({"ttl": 2, "router": "10.77.1.2"}), "{down}"),
    }
    assert_eq!(
        (&down["peer"], &down["flow"], &down["route"]["routers"]),
        (&json!("b"), &json!(0), &json!(4))
    );
    assert!(down["after"]["lost"].as_u64() > Some(0), "{down}");
    assert!(down.get("seconds").is_none(), "{down}");
    assert_eq!(forward_events(&a, "route_reachable"), Vec::<Value>::new());
    blackhole("del");
    let up = wait_for_event(&a, "route_reachable");
    // The second trace comes ten seconds after the first.
    assert!(up["seconds"].as_f64() > Some(10.0), "{up}");
    assert_eq!(up["route"], down["route"], "{up}");
    assert_eq!(forward_events(&a, "route_unreachable").len(), 1);
    for name in ["route_changed", "route_restored"] {
        assert_eq!(forward_events(&a, name), Vec::<Value>::new());
    }
    drop(b);
    Ok(())
}

/// A reload that restarts the traces in an outage loses neither its end nor its length.
pub(crate) fn unreachable_and_reloaded() {
    let net = NetPlan::chain(2).build(9);
    let peer = ("b", net.v4("b"));
    let _b = start(&net, "b", ("a", net.v4("a")), 1);
    let a = start(&net, "a", peer, 1);
    first_trace(&a, "forward");
    let blackhole = |action: &str| {
        net.node("r1").ip(&format!("route {action} blackhole {}/32\n", peer.1));
    };
    blackhole("add");
    wait_for_event(&a, "route_unreachable");
    let traces = || a.page().count("pathmeter_trace_traces_total", &["direction=\"forward\""]);
    let before = traces();
    a.configure(config("a", peer, 1, ["100ms", "4s"]));
    eventually("traces after the reload", || (traces() >= before + 2).then_some(()));
    assert_eq!(forward_events(&a, "route_unreachable").len(), 1, "it is not reported again");
    blackhole("del");
    let up = wait_for_event(&a, "route_reachable");
    assert!(up["seconds"].as_f64() > Some(10.0), "{up}");
}

/// A router that sets the TTL of what it forwards to the peer: the way is not traced, in this direction only.
pub(crate) fn clamped() {
    for (rule, expected, router) in [
        ("ip ttl set 64", "raised", Value::Null),
        // The second router after it is the last one that they reach.
        ("udp dport 9862 ip ttl set 2", "lowered", json!("10.77.2.2")),
    ] {
        let net = NetPlan::chain(4).build(8);
        net.node("r1").nft(&format!(
            "add table ip clamp\n\
             add chain ip clamp forward {{ type filter hook forward priority mangle; }}\n\
             add rule ip clamp forward ip daddr {} {rule}\n",
            net.v4("b")
        ));
        let b = start(&net, "b", ("a", net.v4("a")), 1);
        let a = start(&net, "a", ("b", net.v4("b")), 1);
        let event = wait_for_event(&a, "route_ttl_clamped");
        let found = (&event["rewriting"], &event["router"], &event["flow"]);
        assert_eq!(found, (&json!(expected), &router, &json!(0)), "{event}");
        let trace = eventually("a trace without hops", || {
            let trace = flows(&a).first()?["forward"]["trace"].clone();
            // Answers may come later than the first trace waits for them.
            let is_reached = expected == "lowered" || trace["reached"] == true;
            (trace["ttl_clamped"] == true && is_reached).then_some(trace)
        });
        assert_eq!((&trace["routers"], &trace["hops"]), (&Value::Null, &json!([])), "{trace}");
        let page = a.page_when("the gauge", |page| {
            page.count("pathmeter_trace_ttl_clamped", &["direction=\"forward\""]) == 1
        });
        assert!(!page.has("pathmeter_trace_routers", &["direction=\"forward\""]), "{page}");
        if expected == "raised" {
            let back = first_trace(&a, "reverse");
            assert_eq!((&back["routers"], &back["ttl_clamped"]), (&json!(4), &json!(false)), "{back}");
            // The other agent's replies pass the same router.
            b.page_when("the gauge of the way back", |page| {
                page.count("pathmeter_trace_ttl_clamped", &["direction=\"reverse\""]) == 1
            });
        }
        assert_eq!(forward_events(&a, "route_ttl_clamped").len(), 1);
        drop(b);
    }
}
