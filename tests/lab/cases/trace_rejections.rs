//! Rejections of traced packets: by a router, by a firewall, and by the sending host.

use pathmeter_lab::{NetPlan, Program};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::PROGRAM;
use crate::trace::{CONFIRMED_WITHIN, address_of, first_trace, responders, start_with};
use crate::trace_networks::{REFLECTOR, addresses, delay_ends, probe_trace, probe_trace_until, responder};

/// A router that refuses to forward ends the route, and is shown with its reason, if it gives one.
pub(crate) fn refusing_router() {
    let protocols: [&[&str]; 3] =
        [&REFLECTOR, &["--protocol", "icmp"], &["--protocol", "tcp", "--port", "80"]];
    for (kind, reason) in [
        ("unreachable", "host_unreachable"),
        ("prohibit", "prohibited"),
        ("blackhole", ""),
        ("firewall", "network_unreachable"),
    ] {
        for options in protocols {
            // Linux gives about three reasons at once and then one per second, so each trace has routers of
            // its own.
            let net = NetPlan::chain(3).build(11);
            delay_ends(&net, [("a", "r1"), ("r3", "b")]);
            net.node("a").set_sysctl("ipv4/ping_group_range", "0 2147483647");
            let (r2, b) = (net.node("r2"), net.v4("b"));
            // Linux looks at its routes before it looks at the TTL, and at its firewall after that.
            let hops = match kind {
                "firewall" => {
                    let rule = format!("ip daddr {b} reject with icmp net-unreachable");
                    let chain = format!("chain forward {{ type filter hook forward priority 0; {rule}; }};");
                    r2.nft(&format!("table ip wall {{ {chain} }}"));
                    addresses(&["10.77.0.2", "10.77.1.2"])
                }
                _ => {
                    r2.ip(&format!("route add {kind} {b}/32\n"));
                    addresses(&["10.77.0.2"])
                }
            };
            let program = || net.node("a").command(PROGRAM);
            let found = probe_trace_until(program, b, options, |found| {
                responders(found) == hops && found["rejected"].is_object() != reason.is_empty()
            });
            assert_eq!(responders(&found), hops, "{kind} {options:?}: {found}");
            assert_eq!((&found["reached"], &found["routers"]), (&json!(false), &Value::Null), "{found}");
            let rejected = &found["rejected"];
            if reason.is_empty() {
                assert_eq!(*rejected, Value::Null, "{kind} {options:?}: {found}");
                continue;
            }
            let fields = ["ttl", "address", "reason"].map(|field| &rejected[field]);
            let expected = [&json!(2), &json!("10.77.1.2"), &json!(reason)];
            assert_eq!(fields, expected, "{kind} {options:?}: {found}");
            assert!(rejected["rtt_seconds"].as_f64() >= Some(0.004), "behind the first wire: {found}");
        }
    }
}

/// The same over IPv6, whose errors have other codes.
pub(crate) fn refusing_router_ipv6() {
    let protocols: [&[&str]; 3] =
        [&REFLECTOR, &["--protocol", "icmp"], &["--protocol", "tcp", "--port", "80"]];
    for (kind, reason) in [("unreachable", "network_unreachable"), ("prohibit", "prohibited")] {
        for options in protocols {
            let net = NetPlan::chain(3).build(22);
            delay_ends(&net, [("a", "r1"), ("r3", "b")]);
            net.node("a").set_sysctl("ipv4/ping_group_range", "0 2147483647");
            let b = net.v6("b");
            net.node("r2").ip(&format!("route add {kind} {b}/128\n"));
            let found = probe_trace(&mut net.node("a").command(PROGRAM), b, options);
            assert_eq!(responders(&found), addresses(&["fd77:0::2"]), "{kind} {options:?}: {found}");
            let fields = ["ttl", "reason"].map(|field| &found["rejected"][field]);
            assert_eq!(fields, [&json!(2), &json!(reason)], "{kind} {options:?}: {found}");
            assert_eq!(address_of(&found["rejected"]["address"]), addresses(&["fd77:1::2"])[0], "{found}");
        }
    }
}

/// A router that begins to refuse is shown by the agent's traces, and in the event.
pub(crate) fn refusing_router_of_a_peer() {
    let net = NetPlan::chain(3).build(18);
    delay_ends(&net, [("a", "r1"), ("r3", "b")]);
    let _b = responder(net.node("b"));
    // Few echoes: Linux gives one reason per second.
    let a = start_with(&net, "a", ("b", net.v4("b")), 1, ["2s", "5s"]);
    assert_eq!(first_trace(&a, "forward")["rejected"], Value::Null);
    net.node("r2").ip(&format!("route add prohibit {}/32\n", net.v4("b")));
    let rejected = |rejected: &Value| {
        let fields = ["ttl", "address", "reason"].map(|field| rejected[field].clone());
        fields == [json!(2), json!("10.77.1.2"), json!("prohibited")]
    };
    a.page_within(CONFIRMED_WITHIN, "the event", |_| {
        let events = a.json("/api/v1/events");
        let mut events = events["events"].as_array().unwrap().iter();
        events.any(|event| event["event"] == "route_unreachable" && rejected(&event["rejected"]))
    });
    let traces = a.json("/api/v1/traces");
    let mut found = traces["traces"].as_array().unwrap().iter();
    assert!(found.any(|trace| rejected(&trace["rejected"])), "{traces}");
    let paths = a.json("/api/v1/paths");
    let path = paths["paths"].as_array().unwrap().iter().find(|path| path["probe"] == "routes").unwrap();
    let trace = &path["flows"][0]["forward"]["trace"];
    assert!(rejected(&trace["rejected"]), "{trace}");
    let page = a.page();
    for name in ["pathmeter_accounting_errors_total", "pathmeter_trace_route_changes_total"] {
        assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
    }
}

/// The router at the link of an absent host rejects the probes after seconds, which can be waited for.
pub(crate) fn absent_host() {
    let net = NetPlan::chain(2).build(21);
    delay_ends(&net, [("a", "r1"), ("r2", "b")]);
    net.node("a").set_sysctl("ipv4/ping_group_range", "0 2147483647");
    let protocols: [&[&str]; 2] = [&REFLECTOR, &["--protocol", "icmp"]];
    for options in protocols {
        let trace = |wait: &str| {
            let options = [options, &["--wait", wait]].concat();
            probe_trace(&mut net.node("a").command(PROGRAM), "10.77.2.9".parse().unwrap(), &options)
        };
        let found = trace("0s");
        assert_eq!((responders(&found).len(), &found["rejected"]), (2, &Value::Null), "{found}");
        let found = trace("10s");
        let rejected = &found["rejected"];
        let fields = ["ttl", "address", "reason"].map(|field| rejected[field].clone());
        assert_eq!(fields, [json!(2), json!("10.77.1.2"), json!("host_unreachable")], "{options:?}: {found}");
    }
    // A host that may send from any address does not have all addresses.
    net.node("a").set_sysctl("ipv4/ip_nonlocal_bind", "1");
    let mut command = net.node("a").command(PROGRAM);
    let output = command.args(["probe", "trace", "10.77.2.9", "-n", "-w", "10s"]).args(REFLECTOR).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(text.ends_with("\n10.77.2.9 does not answer: 10.77.1.2 rejects the probes\n"), "{text}");
}

/// Probes that this host cannot send are an error with its reason, and so is a next host that does not answer
/// on its link.
pub(crate) fn failures_of_this_host() {
    let net = NetPlan::chain(1).build(20);
    let a = net.node("a");
    a.set_sysctl("ipv4/ping_group_range", "0 2147483647");
    let without_route = "no route from this host";
    let with_firewall = "not permitted, for example by a firewall of this host";
    let on_link = "host unreachable: the next host does not answer on its link";
    // The kernel sends over TCP later, and the link shows nothing while paths are enumerated.
    for (target, reason, protocols) in
        [("192.0.2.1", without_route, 4), ("10.77.1.2", with_firewall, 3), ("10.77.0.9", on_link, 2)]
    {
        if reason == with_firewall {
            a.nft("table ip wall { chain out { type filter hook output priority 0; ip daddr 10.77.1.2 drop; }; }");
        }
        let all: [&[&str]; 4] = [
            &REFLECTOR,
            &["--protocol", "icmp"],
            &["--port", "9862", "--enumerate"],
            &["--protocol", "tcp", "--port", "80"],
        ];
        for options in &all[..protocols] {
            let folder = TempDir::new().unwrap();
            let mut command = a.command(PROGRAM);
            command.args(["probe", "trace", target, "-n"]).args(*options);
            let mut program = Program::start(&mut command, &folder.path().join("output"));
            assert_eq!(program.wait().code(), Some(1));
            let output = program.output();
            assert!(
                output.ends_with(&format!("\nerror: sending to {target}: {reason}\n")),
                "{options:?}: {output}"
            );
            assert_eq!(output.lines().count(), 2, "{options:?}: {output}");
        }
        if reason != on_link {
            let mut command = a.command(PROGRAM);
            let echo = ["probe", "echo", target, "-c", "2", "-i", "20ms"];
            let output = command.args(echo).args(REFLECTOR).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            // A host that pauses leaves one of the two unsent.
            assert!(text.contains(&format!(" could not be sent: {reason}\n")), "{text}");
        }
    }
}
