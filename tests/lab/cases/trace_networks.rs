//! Traces through networks whose routes are unusual.

use std::fs;
use std::net::IpAddr;
use std::process::Command;

use pathmeter_lab::{Namespace, Net, NetPlan, Program, eventually};
use pathmeter_proto::sim::Link;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::{NodeAgent, PROGRAM};
use crate::testbed::Inconclusive;
use crate::trace::{ROUTERS, first_trace, responders, routers_of_chain, start};

/// Larger than any route here.
const HOPS_MAX: usize = 12;

/// The result of `pathmeter probe trace` on a node, as JSON.
pub(crate) fn probe_trace(command: &mut Command, target: IpAddr, arguments: &[&str]) -> Value {
    let folder = TempDir::new().unwrap();
    let hops = HOPS_MAX.to_string();
    command.args(["probe", "trace", &target.to_string(), "-n", "--json", "-m", &hops]).args(arguments);
    let mut program = Program::start(command, &folder.path().join("output"));
    program.wait();
    let output = program.output();
    let json = output.lines().find(|line| line.starts_with('{'));
    json.and_then(|json| serde_json::from_str(json).ok()).unwrap_or_else(|| panic!("no trace: {output}"))
}

/// The same, repeated a few times until it has what is expected: on a busy machine answers come later than
/// the command waits for them.
pub(crate) fn probe_trace_until(
    command: impl Fn() -> Command,
    target: IpAddr,
    arguments: &[&str],
    is_expected: impl Fn(&Value) -> bool,
) -> Value {
    const ATTEMPTS: usize = 5;
    let mut found = probe_trace(&mut command(), target, arguments);
    for _ in 1..ATTEMPTS {
        if is_expected(&found) {
            break;
        }
        found = probe_trace(&mut command(), target, arguments);
    }
    found
}

/// An agent that only answers, also those whose addresses it does not know.
pub(crate) fn responder(node: &Namespace) -> NodeAgent<'_> {
    let config = json!({"agent": {"name": "b", "grace": "1s"}, "responder": {"allow": ["10.77.0.0/16"]}});
    NodeAgent::start(node, config, &[])
}

/// Delays on the wires at both ends of a chain. Without any, answers arrive while the probe is being sent.
pub(crate) fn delay_ends(net: &Net, [first, last]: [(&str, &str); 2]) {
    let link = Link::perfect(2_000_000);
    for (one, other) in [first, last] {
        net.wire(one, other).set_links(&link, &link);
    }
}

pub(crate) fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// The way back has other routers, and one more: both ends show both ways as they are, and both have the same
/// records of each flow.
pub(crate) fn asymmetric() {
    let mut plan = NetPlan::default();
    plan.host("a").host("b");
    for router in ["left", "one", "two", "three", "right"] {
        plan.router(router);
    }
    plan.wire("a", "left").cable("left", "one").cable("one", "right");
    plan.cable("left", "two").cable("two", "three").cable("three", "right").wire("right", "b");
    let net = plan.build(7);
    delay_ends(&net, [("a", "left"), ("right", "b")]);
    // From `b` to `a` by the longer way.
    net.node("right").ip("route replace 10.77.0.0/24 via 10.77.5.1\n");
    // Routers answer from the interface of their own route to the asking host.
    let forward = addresses(&["10.77.0.2", "10.77.1.2", "10.77.5.2"]);
    let reverse = addresses(&["10.77.6.1", "10.77.5.1", "10.77.4.1", "10.77.1.1"]);
    let b = start(&net, "b", ("a", net.v4("a")), 1);
    let a = start(&net, "a", ("b", net.v4("b")), 1);
    for (agent, ways) in [(&a, ["forward", "reverse"]), (&b, ["reverse", "forward"])] {
        for (direction, routers) in ways.into_iter().zip([&forward, &reverse]) {
            let trace = first_trace(agent, direction);
            assert_eq!(responders(&trace), *routers, "{direction}: {trace}");
            assert_eq!(trace["routers"], routers.len(), "{direction}: {trace}");
        }
        let page = agent.page();
        for name in ["pathmeter_accounting_errors_total", "pathmeter_trace_unmatched_total"] {
            assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
        }
    }
    let own = eventually("the routes of both directions", || {
        let own = a.json("/api/v1/routes")["own"].take();
        (own[0]["asymmetric_hops"] == 1).then_some(own)
    });
    assert_eq!(own[0]["forward"]["routers"], 3, "{own}");
    assert_eq!(own[0]["reverse"]["routers"], 4, "{own}");
    // An agent requests the records of its peers when it starts, and then once a minute.
    drop(b);
    let b = start(&net, "b", ("a", net.v4("a")), 1);
    let reported = eventually("the records of the peer", || {
        let reported = b.json("/api/v1/routes")["reported"].take();
        (!reported.as_array()?.is_empty()).then_some(reported)
    });
    assert_eq!(reported, own);
}

/// A process of the user `nobody` traces both ways over UDP, and the way there over TCP. The kernel's
/// default, which the lab leaves as it is, permits that user no ICMP socket.
pub(crate) fn unprivileged() {
    let net = NetPlan::chain(ROUTERS).build(8);
    delay_ends(&net, [("a", "r1"), ("r8", "b")]);
    let _b = responder(net.node("b"));
    let program = || without_privileges(net.node("a"));
    let expected = ["forward", "reverse"].map(|direction| routers_of_chain(true, direction));
    let found = probe_trace_until(program, net.v4("b"), &[], |found| {
        ["forward", "reverse"].map(|direction| responders(&found["flows"][0][direction])) == expected
    });
    for direction in ["forward", "reverse"] {
        let trace = &found["flows"][0][direction];
        assert_eq!(responders(trace), routers_of_chain(true, direction), "{direction}: {found}");
    }
    assert_eq!(found["privileged"], false);
    for is_v4 in [true, false] {
        let b = if is_v4 { net.v4("b") } else { net.v6("b") };
        let tcp = ["--protocol", "tcp", "--port", "9862"];
        let expected = routers_of_chain(is_v4, "forward");
        let found = probe_trace_until(program, b, &tcp, |found| responders(found) == expected);
        let trace = &found["flows"][0]["forward"];
        assert_eq!(responders(trace), expected, "{found}");
        assert_eq!((&trace["reached"], &trace["routers"]), (&json!(true), &json!(ROUTERS)), "{found}");
        assert_eq!(found["privileged"], false);
    }
}

/// The program on a node as the user nobody. If this process may not become that user, or that user may not
/// execute the program, for example in a private home directory: without capabilities.
fn without_privileges(node: &Namespace) -> Command {
    const NOBODY: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    const WITHOUT_CAPABILITIES: [&str; 3] = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"];
    let as_user = |options: [&str; 3]| {
        let mut command = node.command("setpriv");
        command.args(options).arg(PROGRAM);
        command
    };
    let is_permitted = as_user(NOBODY).arg("--version").output().unwrap().status.success();
    as_user(if is_permitted { NOBODY } else { WITHOUT_CAPABILITIES })
}

/// Behind a router that replaces source addresses, probes and the errors about them are translated, both
/// ways. Errors of a router on its inner side reach the peer from its own address, as all packets do.
pub(crate) fn address_translation() {
    let net = NetPlan::chain(3).build(9);
    delay_ends(&net, [("a", "r1"), ("r3", "b")]);
    net.node("r2").nft(
        "table ip nat { chain out { type nat hook postrouting priority srcnat; \
                        oifname \"e2\" masquerade; }; }",
    );
    let _b = responder(net.node("b"));
    let forward = addresses(&["10.77.0.2", "10.77.1.2", "10.77.2.2"]);
    let reverse = addresses(&["10.77.3.1", "10.77.2.1", "10.77.2.1"]);
    let found = probe_trace_until(
        || net.node("a").command(PROGRAM),
        net.v4("b"),
        &[],
        |found| {
            let flow = &found["flows"][0];
            responders(&flow["forward"]) == forward && responders(&flow["reverse"]) == reverse
        },
    );
    let flow = &found["flows"][0];
    assert_eq!(responders(&flow["forward"]), forward, "{found}");
    assert_eq!(responders(&flow["reverse"]), reverse, "{found}");
}

/// Two routers that send everything to each other: both are shown again and again, up to the largest TTL.
pub(crate) fn routing_loop() {
    let net = NetPlan::chain(2).build(10);
    delay_ends(&net, [("a", "r1"), ("r2", "b")]);
    net.node("r2").ip("route add 10.77.2.2/32 via 10.77.1.1\n");
    let expected = addresses(&["10.77.0.2", "10.77.1.2"]).into_iter().cycle().take(HOPS_MAX);
    let expected: Vec<IpAddr> = expected.collect();
    let program = || net.node("a").command(PROGRAM);
    let found = probe_trace_until(program, net.v4("b"), &REFLECTOR, |found| responders(found) == expected);
    assert_eq!(responders(&found), expected, "{found}");
    assert_eq!((&found["reached"], &found["routers"]), (&json!(false), &Value::Null), "{found}");
}

/// Each hop is printed while the next ones are still probed.
pub(crate) fn hops_appear_one_by_one() {
    let net = NetPlan::chain(2).build(19);
    delay_ends(&net, [("a", "r1"), ("r2", "b")]);
    net.node("r2").ip(&format!("route add blackhole {}/32\n", net.v4("b")));
    let folder = TempDir::new().unwrap();
    let mut command = net.node("a").command(PROGRAM);
    let b = net.v4("b").to_string();
    command.args(["probe", "trace", "-n", &b, "--protocol", "tcp", "--port", "80"]);
    let mut program = Program::start(&mut command, &folder.path().join("output"));
    // The target does not answer, so each silent hop takes 0.9 s.
    eventually("the first hop", || program.output().contains(" 10.77.0.2\n").then_some(()));
    assert_eq!(program.try_wait(), None, "{}", program.output());
    assert!(!program.wait().success());
    let output = program.output();
    assert!(output.ends_with(&format!(" 10.77.0.2\n{b} does not answer\n")), "{output}");
}

/// A link that is too small for the echoes of the path: probes are small, so all routers are found.
pub(crate) fn mtu_step() {
    let net = NetPlan::chain(3).build(13);
    delay_ends(&net, [("a", "r1"), ("r3", "b")]);
    for router in ["r1", "r2"] {
        net.node(router).ip("link set e1 mtu 1300\n");
    }
    let _b = responder(net.node("b"));
    let config = json!({
        "agent": {"name": "a", "grace": "1s"},
        "peers": [{"name": "b", "address": net.v4("b")}],
        "probes": [
            {"name": "mesh", "interval": "100ms", "size": "1400B", "dont_fragment": true, "lost_after": "1s"},
            {"name": "routes", "kind": "trace", "follows": "mesh", "interval": "5s"},
        ],
    });
    let a = NodeAgent::start(net.node("a"), config, &[]);
    a.page_when("lost echoes", |page| page.count("pathmeter_echo_lost_total", &[]) > 0);
    let trace = first_trace(&a, "forward");
    assert_eq!(responders(&trace), addresses(&["10.77.0.2", "10.77.1.2", "10.77.2.2"]), "{trace}");
    assert_eq!(a.page().count("pathmeter_echo_rtt_seconds_count", &[]), 0, "no echo passes");
}

/// Limits raised above those of the routers cost answers: the keys are in use.
pub(crate) fn raised_limits() {
    let net = NetPlan::chain(2).build(12);
    delay_ends(&net, [("a", "r1"), ("r2", "b")]);
    for router in ["r1", "r2"] {
        net.node(router).set_sysctl("ipv4/icmp_ratelimit", "1000");
    }
    let _b = responder(net.node("b"));
    let a = NodeAgent::start(
        net.node("a"),
        json!({
            "agent": {"name": "a", "grace": "1s"},
            "peers": [{"name": "b", "address": net.v4("b")}],
            "probes": [
                {"name": "mesh", "interval": "100ms", "flows": 16},
                {"name": "routes", "kind": "trace", "follows": "mesh", "interval": "5s"},
            ],
            "trace": {"router_rate": "1kpps", "agent_rate": "1kpps"},
        }),
        &[],
    );
    a.page_when("routers that do not answer", |page| page.count("pathmeter_trace_unanswered_total", &[]) > 0);
}

/// A changed route of the own host leads to a trace of the paths that it concerns.
pub(crate) fn local_route() {
    let net = NetPlan::chain(2).build(17);
    delay_ends(&net, [("a", "r1"), ("r2", "b")]);
    let _b = responder(net.node("b"));
    let config = json!({
        "agent": {"name": "a", "grace": "1s"},
        "peers": [{"name": "b", "address": net.v4("b")}],
        "probes": [
            {"name": "mesh", "interval": "100ms"},
            {"name": "routes", "kind": "trace", "follows": "mesh", "interval": "1h"},
        ],
    });
    let a = NodeAgent::start(net.node("a"), config, &[]);
    let triggers = || {
        let traces = a.json("/api/v1/traces");
        let traces = traces["traces"].as_array().unwrap().iter();
        traces.filter_map(|trace| trace["trigger"].as_str().map(str::to_owned)).collect::<Vec<String>>()
    };
    eventually("the first traces", || (triggers().len() == 2).then_some(()));
    // Of another destination, and then of this one.
    net.node("a").ip("route add 192.0.2.0/24 via 10.77.0.2\n");
    net.node("a").ip(&format!("route add {}/32 via 10.77.0.2\n", net.v4("b")));
    eventually("a trace after the change", || triggers().contains(&"local_route".to_owned()).then_some(()));
}

/// All four equal-cost paths are found, each with its links, by the command and by an agent on request.
pub(crate) fn equal_cost_paths() -> Result<(), Inconclusive> {
    let net = NetPlan::diamond(4).build(16);
    let _b = responder(net.node("b"));
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("config.yaml");
    // The routers of the lab answer as fast as they are asked.
    let config = json!({
        "peers": [{"name": net.v4("b").to_string(), "address": net.v4("b")}],
        "trace": {"router_rate": "1kpps", "agent_rate": "1kpps"},
    });
    fs::write(&file, config.to_string()).unwrap();
    let arguments = ["--enumerate", "--config", file.to_str().unwrap()];
    let found = probe_trace(&mut net.node("a").command(PROGRAM), net.v4("b"), &arguments);
    check_diamond(&found)?;
    let config = json!({
        "agent": {"name": "a"},
        "peers": [{"name": "b", "address": net.v4("b")}],
        "trace": {"router_rate": "1kpps", "agent_rate": "1kpps"},
        "probes": [
            {"name": "mesh", "interval": "100ms"},
            {"name": "routes", "kind": "trace", "follows": "mesh"},
        ],
    });
    let agent = NodeAgent::start(net.node("a"), config, &[]);
    first_trace(&agent, "forward");
    let requested = agent.post("/api/v1/enumerations?target=b");
    assert_eq!((requested.status, &*requested.body), (200, r#"{"paths":1}"#), "{requested:?}");
    let event = eventually("the result", || {
        let events = agent.json("/api/v1/events");
        let mut events = events["events"].as_array()?.iter();
        events.find(|event| event["event"] == "paths_enumerated").cloned()
    });
    check_diamond(&event)
}

/// Checks the equal-cost paths that were found in a network with four of them.
fn check_diamond(found: &Value) -> Result<(), Inconclusive> {
    let hops = found["hops"].as_array().unwrap();
    let routers = |hop: &Value| hop["routers"].as_array().unwrap().len();
    let widths: Vec<usize> = hops.iter().map(routers).collect();
    // The stopping rule misses a router in one of twenty enumerations.
    if widths.get(1).is_some_and(|width| *width < 4) {
        return Err(Inconclusive(format!("a path was missed: {found}")));
    }
    // The last router answers from the interface at which a probe has arrived.
    assert_eq!(widths, [1, 4, 4, 0], "{found}");
    assert!(hops.iter().all(|hop| hop["completeness"] == "complete"), "{found}");
    let links = found["links"].as_array().unwrap();
    let at = |ttl: usize| links.iter().filter(|link| link["ttl"] == ttl).count();
    assert_eq!([at(1), at(2), at(3)], [4, 4, 4], "{found}");
    assert_eq!((&found["reached"], &found["end"]), (&json!(true), &json!("destination")), "{found}");
    Ok(())
}

/// Traces without asking the target over HTTP first.
pub(crate) const REFLECTOR: [&str; 2] = ["--port", "9862"];
