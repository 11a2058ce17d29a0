//! Trace probes on loopback: configuration, reload and JSON.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::thread;

use nix::sys::signal::Signal;
use pathmeter::route_record::{RecordedRoute, RouteRecord};
use serde_json::{Value, json};

use crate::fixture::{Agent, CommandOutput, Host, MetricsPage, eventually, pathmeter};

/// The flows of the traced path of an agent; empty while there is none.
fn flows(agent: &Agent) -> Vec<Value> {
    let paths = agent.json("/api/v1/paths");
    let path = paths["paths"].as_array().unwrap().iter().find(|path| path["probe"] == "routes");
    path.and_then(|path| path["flows"].as_array().cloned()).unwrap_or_default()
}

#[test]
fn trace_that_a_reload_adds_follows_the_running_echoes_and_disturbs_none() {
    let (a, b) = (Host::claim(), Host::claim());
    let peer = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let config = |more: &str| {
        let probes = format!("probes: [{{name: mesh, interval: 20ms, flows: 2, lost_after: 5s}}{more}]");
        a.config("a", &format!("peers: [{{name: b, address: {b}}}]\n{probes}"))
    };
    let agent = Agent::start(&a, &config(""));
    let sent = |agent: &Agent| agent.page().count("pathmeter_echo_sent_total", &[]);
    eventually("echoes are sent", || (sent(&agent) > 10).then_some(()));
    let before = sent(&agent);
    // Some echoes have no verdict yet, so a restart of their path would withdraw them.
    peer.signal(Signal::SIGSTOP);
    eventually("echoes are in flight", || (sent(&agent) > before + 5).then_some(()));
    agent.rewrite(&config(", {name: routes, kind: trace, follows: mesh, interval: 2s}"));
    assert_eq!(agent.reload().status, 200);
    peer.signal(Signal::SIGCONT);
    let found = eventually("both flows are traced", || {
        let flows = flows(&agent);
        let is_traced = |flow: &Value| {
            ["forward", "reverse"].iter().all(|direction| flow[direction]["trace"]["reached"] == true)
        };
        (flows.len() == 2 && flows.iter().all(is_traced)).then_some(flows)
    });
    for direction in found.iter().flat_map(|flow| [&flow["forward"], &flow["reverse"]]) {
        let (trace, route) = (&direction["trace"], &direction["route"]);
        assert_eq!((&trace["routers"], &route["routers"]), (&0.into(), &0.into()), "{direction}");
        assert_eq!(trace["hops"], Value::Array(Vec::new()), "{direction}");
    }
    let page = agent.page();
    assert!(page.count("pathmeter_echo_sent_total", &[]) >= before, "counters continue\n{page}");
    for name in [
        "pathmeter_accounting_errors_total",
        "pathmeter_trace_unmatched_total",
        "pathmeter_echo_mismatched_total",
        "pathmeter_echo_withdrawn_total",
    ] {
        assert_eq!(page.count(name, &[]), 0, "{name}\n{page}");
    }
    let is = |state: &'static str| {
        move |page: &MetricsPage| {
            let label = format!("state=\"{state}\"");
            page.has("pathmeter_peers", &[&label]) && page.count("pathmeter_peers", &[&label]) == 1
        }
    };
    agent.page_when("the peer is up", is("up"));
    peer.signal(Signal::SIGSTOP);
    agent.page_when("the peer is down although a trace has reached it lately", is("down"));
    peer.signal(Signal::SIGCONT);
    agent.rewrite(&config(""));
    assert_eq!(agent.reload().status, 200);
    eventually("the trace has ended", || flows(&agent).is_empty().then_some(()));
    let page = agent.page();
    assert!(!page.has("pathmeter_trace_probes_total", &[]));
    assert_eq!(page.count("pathmeter_echo_withdrawn_total", &[]), 0, "{page}");
}

/// Runs `pathmeter probe trace` without look-ups of names.
fn probe_trace(arguments: &[&str]) -> CommandOutput {
    CommandOutput::of(pathmeter(&["probe", "trace", "-n"]).args(arguments))
}

#[test]
fn command_traces_both_directions_of_each_flow() {
    let host = Host::claim();
    let _agent = Agent::start(&host, &host.config("b", "responder: {open: true}"));
    let target = host.to_string();
    let output = probe_trace(&[&target, "--flows", "2"]);
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{output}");
    let address = host.service_address().ip();
    for flow in 0..2 {
        for (title, end) in [("to", address.to_string()), ("back from", "this host".to_owned())] {
            let title = format!("{title} {target}, flow {flow}\n   1 ");
            let lines = output.stdout.split_once(&title).unwrap_or_else(|| panic!("{title}{output}")).1;
            let [first, second, ..] = lines.lines().collect::<Vec<&str>>()[..] else { panic!("{output}") };
            assert!(first.ends_with(&end) && second == "0 routers", "{output}");
        }
    }
    let output = probe_trace(&[&target, "--flows", "2", "--json"]);
    assert_eq!(output.code, Some(0), "{output}");
    let found: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!((&found["target"], &found["method"]), (&target.into(), &"udp".into()), "{output}");
    assert_eq!((&found["reached"], &found["privileged"]), (&true.into(), &false.into()), "{output}");
    assert_eq!((&found["routers"], &found["hops"]), (&0.into(), &Value::Array(Vec::new())), "{output}");
    let flows = found["flows"].as_array().unwrap();
    assert_eq!(flows.len(), 2);
    for trace in flows.iter().flat_map(|flow| [&flow["forward"], &flow["reverse"]]) {
        assert_eq!((&trace["reached"], &trace["routers"]), (&true.into(), &0.into()), "{output}");
    }
}

#[test]
fn command_says_that_a_target_does_not_answer() {
    let host = Host::claim();
    let output = probe_trace(&[&host.to_string(), "--port", "862", "--max-hops", "3"]);
    assert_eq!(output.code, Some(1), "{output}");
    let address = host.service_address().ip();
    for line in [
        format!(" {address}  rejects the probes: port unreachable\n"),
        format!("{host} does not answer: nothing listens on its UDP port 862\n"),
    ] {
        assert!(output.stdout.contains(&line), "{line}{output}");
    }
    assert!(!output.stdout.contains("back from"), "{output}");
    let output = probe_trace(&[&host.to_string(), "--port", "862", "--flows", "17"]);
    assert_eq!(output.code, Some(2), "{output}");
}

#[test]
fn requested_trace_is_stored_listed_and_compared() {
    let (a, b) = (Host::claim(), Host::claim());
    let _peer = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let config = format!(
        "peers: [{{name: b, address: {b}}}]\n\
         probes: [{{name: mesh, interval: 20ms}}, {{name: routes, kind: trace, follows: mesh, interval: 1h}}]"
    );
    let agent = Agent::start(&a, &a.config("a", &config));
    let list = |query: &str| {
        let answer = agent.json(&format!("/api/v1/traces{query}"));
        answer["traces"].as_array().unwrap().clone()
    };
    let first = eventually("the first traces of both directions", || {
        let traces = list("");
        (traces.len() == 2).then_some(traces)
    });
    let directions: Vec<&Value> = first.iter().map(|trace| &trace["direction"]).collect();
    assert_eq!(directions, ["forward", "reverse"]);
    for trace in &first {
        let key = ["probe", "peer", "family", "trigger"].map(|key| trace[key].as_str().unwrap());
        assert_eq!(key, ["routes", "b", "ipv4", "start"], "{trace}");
        let one = agent.json(&format!("/api/v1/traces/{}", trace["number"]));
        assert_eq!(one, *trace);
    }
    let answer = agent.post("/api/v1/traces?target=b");
    assert_eq!((answer.status, answer.body.as_str()), (200, r#"{"paths":1}"#));
    let requested = eventually("the requested traces", || {
        let traces = list("?target=b");
        let requested = traces.into_iter().filter(|trace| trace["trigger"] == "request");
        Some(requested.collect::<Vec<Value>>()).filter(|traces| traces.len() == 2)
    });
    let since = requested[0]["timestamp_seconds"].as_f64().unwrap();
    assert_eq!(list(&format!("?since={since}")).first(), requested.first());
    assert_eq!(list("?target=other"), Vec::<Value>::new());
    let difference = agent.json("/api/v1/traces/diff?a=1&b=3");
    assert_eq!(
        (&difference["is_same_route"], &difference["hops"]),
        (&true.into(), &Value::Array(Vec::new()))
    );
    for (path, status) in [
        ("/api/v1/traces?until=5", 400),
        ("/api/v1/traces?since=yesterday", 400),
        ("/api/v1/traces/99", 404),
        ("/api/v1/traces/latest", 404),
        ("/api/v1/traces/diff", 400),
        ("/api/v1/traces/diff?a=1&b=99", 400),
    ] {
        assert_eq!(agent.get(path).status, status, "{path}");
    }
    for (path, status) in [
        ("/api/v1/traces", 400),
        ("/api/v1/traces?target=c", 404),
        ("/api/v1/traces/1", 404),
        ("/api/v1/traces/diff", 405),
    ] {
        assert_eq!(agent.post(path).status, status, "{path}");
    }
}

#[test]
fn port_that_is_not_known_is_asked_for() {
    let host = Host::claim();
    let refused = format!("connecting to {}: Connection refused (os error 111)", host.service_address());
    let target = host.to_string();
    let file = tempfile::NamedTempFile::new().unwrap();
    let targets = format!(
        "targets: [{{name: web, address: {host}, url: 'http://{host}:9'}}, {{name: dns, address: {host}}}]"
    );
    std::fs::write(file.path(), Host::claim().config("a", &targets)).unwrap();
    let file = file.path().to_str().unwrap();
    for (arguments, code, sentence) in [
        (
            &[target.as_str(), "--protocol", "tcp"][..],
            1,
            format!(
                "{refused}\nis an agent running there? for any other host, give its TCP port, for example --port 443"
            ),
        ),
        (
            &[&target],
            1,
            format!(
                "{refused}\nis an agent running there? for a STAMP reflector, give its port, for example \
                     --port 862; for any other host, use --protocol icmp, or --protocol tcp with a --port"
            ),
        ),
        (
            &["dns", "--config", file, "--protocol", "tcp"],
            1,
            "the TCP port of dns is not known; give it, for example --port 443".to_owned(),
        ),
        (
            &[&target, "--protocol", "icmp", "--port", "7"],
            2,
            "--port is not valid with --protocol icmp, which has no ports".to_owned(),
        ),
    ] {
        let output = probe_trace(arguments);
        assert_eq!((output.code, output.stdout.as_str()), (Some(code), ""), "{output}");
        assert!(output.stderr.starts_with(&format!("error: {sentence}\n")), "{sentence}\n{output}");
    }
    let ports: [&[&str]; 2] = [&["web", "--config", file], &["dns", "--config", file, "--port", "9"]];
    for arguments in ports {
        let output = probe_trace(&[arguments, &["--protocol", "tcp"]].concat());
        assert_eq!(output.code, Some(0), "{output}");
    }
}

#[test]
fn command_traces_any_tcp_port_whether_it_is_open_or_not() {
    let host = Host::claim();
    let _agent = Agent::start(&host, &host.config("b", ""));
    let open = host.service_address().port().to_string();
    for port in [&*open, "9"] {
        let output = probe_trace(&[&host.to_string(), "--protocol", "tcp", "--port", port, "--json"]);
        assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{output}");
        let found: Value = serde_json::from_str(&output.stdout).unwrap();
        assert_eq!((&found["method"], &found["privileged"]), (&"tcp".into(), &false.into()), "{output}");
        assert_eq!((&found["reached"], &found["routers"]), (&true.into(), &0.into()), "{output}");
        assert_eq!(found["flows"][0]["reverse"], Value::Null, "{output}");
    }
}

#[test]
fn option_that_would_have_no_effect_is_refused() {
    for (arguments, problem) in [
        (&["--protocol", "tcp", "--flows", "2"][..], "--flows is not valid with --protocol tcp"),
        (&["--protocol", "tcp", "--wait", "4s"], "--wait is not valid with --protocol tcp"),
        (&["--protocol", "icmp", "--port", "862"], "--port is not valid with --protocol icmp"),
        (&["--enumerate", "--wait", "4s"], "cannot be used with '--wait <DURATION>'"),
        (&["--enumerate", "--flows", "2"], "cannot be used with '--flows <N>'"),
        (&["--enumerate", "--protocol", "icmp"], "--enumerate needs --protocol udp"),
    ] {
        let output = probe_trace(&[&["192.0.2.9"], arguments].concat());
        assert_eq!(output.code, Some(2), "{output}");
        assert!(output.stderr.contains(problem), "{problem}: {output}");
    }
}

/// Answers every request to a port of `host` with the identity of an agent `b` whose flow to `a` takes the
/// route `route`. Returns the port.
fn report_route(host: &Host, route: &str) -> u16 {
    let listener = TcpListener::bind(host.at(0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let record = RouteRecord {
        id: String::new(),
        from: "b".into(),
        to: "a".into(),
        probe: "routes".into(),
        family: "ipv4".into(),
        protocol: "udp".into(),
        flow: 0,
        source_port: Some(4_000),
        destination: "127.0.0.1:9862".parse().unwrap(),
        forward: Some(RecordedRoute { id: route.into(), routers: Some(1), hops: Vec::new() }),
        reverse: None,
        asymmetric_hops: None,
    };
    let body = json!({
        "name": "b", "labels": {}, "version": "0", "boot_id": "00000000000000b0", "capabilities": [],
        "ports": {"http": port, "stamp": 1, "agent": 1},
        "you": {"address": "127.0.0.1", "stamp": {"answers": true}},
        "routes": [record.with_id(), "of another version"],
    });
    let body = body.to_string();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // The request is short: it arrives at once. What it asks for is not relevant.
            let _ = stream.read(&mut [0; 2_048]);
            let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
    });
    port
}

#[test]
fn another_route_that_the_peer_reports_triggers_a_trace() {
    let (a, b) = (Host::claim(), Host::claim());
    let _peer = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let probes = "[{name: mesh, interval: 20ms}, {name: routes, kind: trace, follows: mesh, interval: 1h}]";
    let config = |http_port: u16| {
        a.config(
            "a",
            &format!("peers: [{{name: b, address: {b}, http_port: {http_port}}}]\nprobes: {probes}"),
        )
    };
    let agent = Agent::start(&a, &config(report_route(&b, "0000000000a1")));
    let reported = |route: &'static str| {
        eventually("the report of the peer", || {
            let routes = agent.json("/api/v1/routes");
            (routes["reported"][0]["forward"]["id"] == route).then_some(())
        });
    };
    let triggers = || {
        let traces = agent.json("/api/v1/traces");
        let traces = traces["traces"].as_array().unwrap().clone();
        traces.iter().map(|trace| trace["trigger"].as_str().unwrap().to_owned()).collect::<BTreeSet<String>>()
    };
    reported("0000000000a1");
    eventually("the first trace", || triggers().contains("start").then_some(()));
    assert!(!triggers().contains("peer"), "a first report is no change");
    agent.rewrite(&config(report_route(&b, "0000000000a2")));
    assert_eq!(agent.reload().status, 200);
    reported("0000000000a2");
    eventually("a further trace", || triggers().contains("peer").then_some(()));
}

#[test]
fn equal_cost_paths_are_enumerated_on_request() {
    let (a, b) = (Host::claim(), Host::claim());
    let _peer = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let config = format!(
        "peers: [{{name: b, address: {b}}}]\n\
         targets: [{{name: reflector, address: {b}}}]\n\
         probes:\n\
         - {{name: mesh, interval: 20ms}}\n\
         - {{name: routes, kind: trace, follows: mesh, interval: 1h}}\n\
         - {{name: pings, interval: 100ms, targets: all}}"
    );
    let agent = Agent::start(&a, &a.config("a", &config));
    eventually("the path is traced", || flows(&agent).first()?["forward"]["trace"]["reached"].as_bool());
    for (query, expected) in [("", 400), ("?target=c", 404), ("?target=reflector", 404), ("?target=b", 200)] {
        let response = agent.post(&format!("/api/v1/enumerations{query}"));
        assert_eq!(response.status, expected, "{query}: {response:?}");
    }
    let event = eventually("the result", || {
        let events = agent.json("/api/v1/events");
        let mut events = events["events"].as_array()?.iter();
        events.find(|event| event["event"] == "paths_enumerated").cloned()
    });
    let key = ["probe", "peer", "family", "end"].map(|key| event[key].as_str().unwrap());
    assert_eq!(key, ["routes", "b", "ipv4", "destination"], "{event}");
    assert_eq!((&event["reached"], &event["links"]), (&true.into(), &json!([])), "{event}");
}

#[test]
fn enumeration_ends_with_its_path() {
    let host = Host::claim();
    let probes = "[{name: mesh, interval: 20ms}, {name: routes, kind: trace, follows: mesh, interval: 1h}]";
    let config = |peers: &str| host.config("a", &format!("{peers}\nprobes: {probes}"));
    // Nothing answers there, so an enumeration waits at each hop.
    let agent = Agent::start(&host, &config("peers: [{name: dead, address: 127.0.0.1, stamp_port: 9}]"));
    eventually("the path runs", || flows(&agent).first().map(|_| ()));
    let response = agent.post("/api/v1/enumerations?target=dead");
    assert_eq!((response.status, &*response.body), (200, r#"{"paths":1}"#), "{response:?}");
    agent.rewrite(&config("peers: []"));
    assert_eq!(agent.reload().status, 200);
    let event = eventually("it has failed", || {
        let events = agent.json("/api/v1/events");
        let mut events = events["events"].as_array()?.iter();
        events.find(|event| event["event"] == "enumeration_failed").cloned()
    });
    assert_eq!((&event["peer"], &event["reason"]), (&json!("dead"), &json!("the path has ended")), "{event}");
}

/// A peer that starts after its first trace is found by a repetition, whose trigger is the interval.
#[test]
fn first_trace_that_reaches_the_peer_is_listed_whatever_led_to_it() {
    let (a, b) = (Host::claim(), Host::claim());
    let config = format!(
        "peers: [{{name: b, address: {b}}}]\n\
         probes: [{{name: mesh, interval: 1s}}, {{name: routes, kind: trace, follows: mesh, interval: 2s}}]"
    );
    let agent = Agent::start(&a, &a.config("a", &config));
    agent.page_when("a trace that did not reach it", |page| {
        page.has("pathmeter_trace_traces_total", &["result=\"unreached\""])
            && page.count("pathmeter_trace_traces_total", &["result=\"unreached\""]) > 0
    });
    let _peer = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    eventually("a listed trace that has reached it", || {
        let traces = agent.json("/api/v1/traces?target=b");
        let mut traces = traces["traces"].as_array()?.iter();
        traces.find(|trace| trace["reached"] == true && trace["direction"] == "forward").cloned()
    });
}
