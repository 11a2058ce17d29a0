//! What routers quote of the probes of a trace: DSCP, ECN, and signs of a translation of addresses.

use pathmeter_lab::{Net, NetPlan, eventually};
use pathmeter_proto::sim::Link;
use serde_json::{Value, json};

use crate::agent::NodeAgent;
use crate::trace::{first_trace, flows};

const ROUTERS: usize = 4;

/// The second router sets DSCP 10 and ECN 3.
const REMARK: &str = "table inet remark { chain out { type filter hook forward priority 0; \
    ip daddr 10.77.4.2 ip dscp set af11 ip ecn set ce; ip6 daddr fd77:4::2 ip6 dscp set af11 ip6 ecn set ce; }; }";

/// The third router replaces the source address of `a` by its own, and restores the address in replies and in
/// quotations, but not the checksum there. The third word of the ICMP header, which is not used, makes up for
/// the sum of the restored address.
const TRANSLATE: &str = "table ip translate { \
    chain out { type filter hook postrouting priority 0; oifname \"e3\" ip saddr 10.77.0.1 ip saddr set 10.77.3.1; }; \
    chain back { type filter hook prerouting priority -300; iifname \"e3\" ip daddr 10.77.3.1 jump restore; }; \
    chain restore { icmp type { time-exceeded, destination-unreachable } @th,160,32 set 0x0a4d0001 \
                    @th,48,16 set 0x0300; ip daddr set 10.77.0.1; }; }";

/// The third router translates as Linux does.
const MASQUERADE: &str = "table ip nat { chain out { type nat hook postrouting priority srcnat; \
    oifname \"e3\" masquerade; }; }";

fn build(seed: u64) -> Net {
    let net = NetPlan::chain(ROUTERS).build(seed);
    let link = Link::perfect(2_000_000);
    net.wire("a", "r1").set_links(&link, &link);
    net
}

/// An agent that only answers, also behind a translation.
fn responder(net: &Net) -> NodeAgent<'_> {
    let allow = ["10.77.0.0/16", "fd77::/16"];
    let config = json!({"agent": {"name": "b", "grace": "1s"}, "responder": {"allow": allow}});
    NodeAgent::start(net.node("b"), config, &[])
}

fn config(net: &Net, is_v4: bool) -> Value {
    config_over(net, is_v4, "udp", 2)
}

fn config_over(net: &Net, is_v4: bool, protocol: &str, flows: u8) -> Value {
    let mut mesh = json!({"name": "mesh", "protocol": protocol, "interval": "100ms", "dscp": "ef"});
    if flows > 1 {
        mesh["flows"] = flows.into();
    }
    json!({
        "agent": {"name": "a", "grace": "1s"},
        "trace": {
            "router_rate": "1kpps", "router_rate_ipv6": "1kpps", "agent_rate": "1kpps", "quoted_headers": true,
        },
        "peers": [{"name": "b", "address": if is_v4 { net.v4("b") } else { net.v6("b") }}],
        "probes": [
            mesh,
            {"name": "routes", "kind": "trace", "follows": "mesh", "interval": "2s"},
        ],
    })
}

/// What the routers of a flow have quoted.
fn quoted(agent: &NodeAgent<'_>, flow: usize) -> Vec<Value> {
    let flows = flows(agent);
    let Some(hops) = flows.get(flow).and_then(|flow| flow["forward"]["trace"]["hops"].as_array()) else {
        return Vec::new();
    };
    hops.iter().map(|hop| hop["responders"][0]["quoted"].clone()).collect()
}

/// Waits until each of so many flows has what is expected of its routers.
fn wait_for(agent: &NodeAgent<'_>, flows: usize, expected: &[Value]) {
    let what = format!("quoted headers {expected:?}");
    eventually(&what, || (0..flows).all(|flow| quoted(agent, flow) == expected).then_some(()));
}

fn header(dscp: u8, ecn: u8, is_translated: Option<bool>) -> Value {
    json!({"dscp": dscp, "ecn": ecn, "is_translated": is_translated})
}

/// DSCP and ECN are those with which the probe arrived at each router. A translation is shown behind it, also
/// in the listed traces, and never on the way back.
pub(crate) fn shown() {
    let (sent, remarked) = (header(46, 0, None), header(10, 3, None));
    for is_v4 in [true, false] {
        let net = build(31);
        net.node("r2").nft(REMARK);
        net.node("r3").nft(TRANSLATE);
        let _b = responder(&net);
        let a = NodeAgent::start(net.node("a"), config(&net, is_v4), &[]);
        let last = header(10, 3, is_v4.then_some(true));
        wait_for(&a, 2, &[sent.clone(), sent.clone(), remarked.clone(), last.clone()]);
        let reverse = first_trace(&a, "reverse");
        let hops = reverse["hops"].as_array().unwrap();
        assert!(hops.iter().all(|hop| hop["responders"][0]["quoted"].is_null()), "{reverse}");

        a.post("/api/v1/traces?target=b");
        eventually("a listed trace with quoted headers", || {
            let traces = a.json("/api/v1/traces");
            let traces = traces["traces"].as_array()?.clone();
            let is_meant = |trace: &&Value| {
                trace["direction"] == "forward" && trace["hops"][3]["responders"][0]["quoted"] == last
            };
            traces.iter().find(is_meant).map(|_| ())
        });
    }
}

/// Routers quote the probes of the other protocols too.
pub(crate) fn protocols() {
    let (sent, remarked) = (header(46, 0, None), header(10, 3, None));
    let expected = [sent.clone(), sent, remarked.clone(), remarked];
    for (is_v4, protocol) in [(true, "icmp"), (false, "icmp"), (true, "tcp"), (false, "tcp")] {
        let net = build(35);
        net.node("r2").nft(REMARK);
        let _b = responder(&net);
        let a = NodeAgent::start(net.node("a"), config_over(&net, is_v4, protocol, 1), &[]);
        wait_for(&a, 1, &expected);
    }
}

/// Linux restores the checksum in a quotation: nothing shows its translation, and nothing denies it.
pub(crate) fn masquerade() {
    let net = build(32);
    net.node("r3").nft(MASQUERADE);
    let _b = responder(&net);
    let a = NodeAgent::start(net.node("a"), config(&net, true), &[]);
    wait_for(&a, 2, &vec![header(46, 0, None); ROUTERS]);
}

/// Without the capability the agent says so once, and traces as usual.
pub(crate) fn not_permitted() {
    let net = build(33);
    let _b = responder(&net);
    let a = NodeAgent::start_without_capabilities(net.node("a"), config(&net, true));
    let trace = first_trace(&a, "forward");
    assert_eq!(trace["routers"], ROUTERS, "{trace}");
    a.configure(config(&net, true));
    eventually("a reload", || a.log().contains("configuration reloaded").then_some(()));
    assert_eq!(quoted(&a, 0), vec![Value::Null; ROUTERS]);
    assert_eq!(a.log().matches("CAP_NET_RAW").count(), 1, "{}", a.log());
}

/// Headers are read after a reload that configures it, and forgotten after one that does not.
pub(crate) fn reloaded() {
    let net = build(34);
    let _b = responder(&net);
    let with = config(&net, true);
    let mut without = with.clone();
    without["trace"]["quoted_headers"] = false.into();
    let a = NodeAgent::start(net.node("a"), without.clone(), &[]);
    let unknown = vec![Value::Null; ROUTERS];
    wait_for(&a, 2, &unknown);
    a.configure(with);
    wait_for(&a, 2, &vec![header(46, 0, None); ROUTERS]);
    a.configure(without);
    wait_for(&a, 2, &unknown);
}
