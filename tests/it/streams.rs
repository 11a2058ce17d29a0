//! Echo over connections between two agents: all protocols, reloads, and restarts of the peer.

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixture::{Agent, CommandOutput, Host, MetricsPage, eventually, run, skipped};

const OK: &str = "pathmeter_echo_rtt_seconds_count";
const SENT: &str = "pathmeter_echo_sent_total";
const LOST: &str = "pathmeter_echo_lost_total";
const WITHDRAWN: &str = "pathmeter_echo_withdrawn_total";
const RECONNECTS: &str = "pathmeter_echo_reconnects_total";
const CONNECTED: &str = "pathmeter_echo_connected";

/// The protocols over connections with series of their own.
const STREAMS: [&str; 3] = ["tcp", "websocket", "http"];

/// Deadlines longer than any delay of this machine.
const LONG_DEADLINES: &str = "late_after: 60s, lost_after: 60s";

/// One probe per protocol, named after it; `more` are further keys.
fn probes(protocols: &[&str], more: &str) -> String {
    let probe =
        |protocol: &&str| format!("  - {{name: {protocol}, protocol: {protocol}, interval: 20ms, {more}}}\n");
    format!("probes:\n{}", protocols.iter().map(probe).collect::<String>())
}

fn probe_label(probe: &str) -> String {
    format!("probe=\"{probe}\"")
}

fn responder_config(host: &Host) -> String {
    host.config("b", "responder: {allow: [127.0.0.0/8]}")
}

fn prober_config(own: &Host, to: &Host, protocols: &[&str], more: &str) -> String {
    let probes = probes(protocols, &format!("source: {own}, {more}"));
    own.config("a", &format!("peers: [{{name: b, address: {to}}}]\n{probes}"))
}

/// Whether ICMP can be measured here; prints a message if not.
fn has_icmp(agent: &Agent) -> bool {
    let has_it = agent.path("icmp", "b")["reason"].is_null();
    if !has_it {
        skipped("this host does not permit ICMP");
    }
    has_it
}

/// Asserts that everything that has a verdict was answered, on connections that stayed open.
fn assert_nothing_missed(page: &MetricsPage) {
    for name in [
        "late_total",
        "lost_total",
        "host_dropped_total",
        "withdrawn_total",
        "mismatched_total",
        "reconnects_total",
    ] {
        assert_eq!(page.count(&format!("pathmeter_echo_{name}"), &[]), 0, "{name}\n{page}");
    }
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
}

/// Waits until each of these probes has replies, and asserts that nothing was lost.
fn assert_all_answered(agent: &Agent, protocols: &[&str]) {
    let page = agent.page_when("answers over all protocols", |page| {
        protocols.iter().all(|protocol| page.count(OK, &[&probe_label(protocol)]) >= 10)
    });
    assert_nothing_missed(&page);
    for protocol in protocols.iter().filter(|protocol| STREAMS.contains(protocol)) {
        assert_eq!(page.count(CONNECTED, &[&probe_label(protocol)]), 1, "{page}");
    }
}

fn key_file(folder: &Path) -> String {
    let file = folder.join("key");
    fs::write(&file, "the key of this year").unwrap();
    format!("key_file: {}\n", file.display())
}

#[test]
fn agents_measure_each_other_over_all_protocols_with_and_without_a_key() {
    let folder = TempDir::new().unwrap();
    for key in [String::new(), key_file(folder.path())] {
        let (a, b) = (Host::claim(), Host::claim());
        // With the key, the source address need not be listed.
        let allow = if key.is_empty() { "responder: {allow: [127.0.0.0/8]}" } else { "" };
        let responder = Agent::start(&b, &b.config("b", &format!("{key}{allow}")));
        let protocols = ["tcp", "websocket", "http", "icmp"];
        let agent = Agent::start(&a, &(key.clone() + &prober_config(&a, &b, &protocols, LONG_DEADLINES)));
        let is_all = has_icmp(&agent);
        assert_all_answered(&agent, if is_all { &protocols } else { &STREAMS });
        let page = responder.page();
        assert_eq!(page.count("pathmeter_responder_connections_refused_total", &[]), 0, "{page}");
        assert!(page.count("pathmeter_responder_messages_total", &[]) >= 10, "{page}");
        for protocol in STREAMS {
            let sources = agent.sources(protocol, "b");
            assert!(sources[0].as_str().unwrap().starts_with(&format!("{a}:")), "{sources}");
        }
    }
}

#[test]
fn agents_measure_each_other_over_ipv6() {
    if TcpListener::bind("[::1]:0").is_err() {
        return skipped("this host has no IPv6");
    }
    let a = Host::claim();
    // A free port of ::1 may be taken by another test before the agent binds it.
    let (_asked, ports) = eventually("ports of ::1", || {
        let ports = [(); 2].map(|()| TcpListener::bind("[::1]:0").unwrap());
        let ports = ports.map(|listener| listener.local_addr().unwrap());
        let config = format!(
            "agent: {{name: b}}\n\
             listen: {{http: \"{}\", stamp: \"[::1]:0\", agent: \"{}\"}}\n\
             responder: {{allow: [\"::1/128\"]}}\n",
            ports[0], ports[1]
        );
        Agent::try_start_at(&config, ports[0]).ok().map(|agent| (agent, ports))
    });
    let peers = format!(
        "peers: [{{name: b, address: \"::1\", http_port: {}, agent_port: {}}}]\n",
        ports[0].port(),
        ports[1].port()
    );
    let protocols = ["tcp", "websocket", "http", "icmp"];
    let agent = Agent::start(
        &a,
        &a.config("a", &(peers + &probes(&protocols, &format!("family: ipv6, {LONG_DEADLINES}")))),
    );
    let is_all = has_icmp(&agent);
    assert_all_answered(&agent, if is_all { &protocols } else { &STREAMS });
}

#[cfg(feature = "tls")]
#[test]
fn agents_with_https_measure_each_other_over_all_protocols() {
    use pathmeter::http::client::{Client, TlsClient};
    use pathmeter::tls::{Connector, Trust};
    use pathmeter_lab::pki::{Authority, Validity};

    for is_keyed in [false, true] {
        let (a, b, folder) = (Host::claim(), Host::claim(), TempDir::new().unwrap());
        let ca = Authority::new("ours");
        let ca_file = ca.write(folder.path(), "ca");
        ca.issue(&[&b.to_string()], Validity::Current).write(folder.path(), "server");
        let web = folder.path().join("web.yml");
        fs::write(&web, "tls_server_config: {cert_file: server.pem, key_file: server.key}\n").unwrap();
        let key = if is_keyed { key_file(folder.path()) } else { String::new() };
        let connector = Connector::new(&Trust { ca_file: Some(ca_file.clone()), identity: None }).unwrap();
        let secure = Some(TlsClient { connector, server_name: b.to_string() });
        let more =
            format!("{key}tls: {{web_config_file: {}}}\nresponder: {{allow: [127.0.0.0/8]}}", web.display());
        let _asked = Agent::start_for(&b, &b.config("b", &more), Client { secure, ..Client::default() });
        let peers = format!("peers: [{{name: b, address: {b}, scheme: https}}]\n");
        let trust = format!("{key}tls: {{ca_file: {}}}\n", ca_file.display());
        let agent = Agent::start(
            &a,
            &a.config("a", &(trust + &peers + &probes(&STREAMS, &format!("source: {a}, {LONG_DEADLINES}")))),
        );
        assert_all_answered(&agent, &STREAMS);
        let page = agent.page();
        for (protocol, has_one) in [("tcp", false), ("websocket", true), ("http", true)] {
            let expiry = "pathmeter_tls_certificate_expiry_timestamp_seconds";
            assert_eq!(page.has(expiry, &[&probe_label(protocol)]), has_one, "{protocol}\n{page}");
        }
    }
}

/// Runs `pathmeter probe echo` with a short interval.
fn probe(arguments: &[&str]) -> CommandOutput {
    run(&[&["probe", "echo", "--interval", "20ms", "--count", "10"], arguments].concat())
}

fn summary(output: &CommandOutput) -> Value {
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{output}"))
}

/// The keys of an object and of nested objects.
fn names(value: &Value) -> Vec<String> {
    let members = value.as_object().unwrap().iter();
    members
        .flat_map(|(name, value)| match value.as_object() {
            Some(_) => names(value).into_iter().map(|inner| format!("{name}.{inner}")).collect(),
            None => vec![name.clone()],
        })
        .collect()
}

#[test]
fn probe_reports_the_same_fields_over_every_protocol() {
    let host = Host::claim();
    let _agent = Agent::start(&host, &responder_config(&host));
    let target = host.to_string();
    let udp = summary(&probe(&[&target, "--json"]));
    for (protocol, units, port) in [
        ("tcp", "messages", Some(Host::AGENT_PORT)),
        ("websocket", "messages", Some(Host::PORT)),
        ("http", "requests", Some(Host::PORT)),
        ("icmp", "datagrams", None),
    ] {
        let output = probe(&[&target, "--protocol", protocol, "--json"]);
        if protocol == "icmp" && output.code != Some(0) {
            return skipped(&format!("this host does not permit ICMP: {output}"));
        }
        assert_eq!(output.code, Some(0), "{output}");
        let found = summary(&output);
        assert_eq!(names(&found), names(&udp), "{protocol}");
        assert_eq!(found["received"], found["sent"], "{protocol}: {found}");
        assert_eq!(found["lost"], json!({"forward": 0, "reverse": 0, "unknown": 0}), "{protocol}: {found}");
        let address = port.map_or_else(|| target.clone(), |port| host.at(port).to_string());
        assert_eq!(found["address"], address);
        let output = probe(&[&target, "--protocol", protocol]);
        assert_eq!(output.code, Some(0), "{output}");
        assert!(
            output.stdout.starts_with(&format!("{target} ({address}): 10 {units} every 20ms\n")),
            "{output}"
        );
        assert!(
            output.stdout.contains(" 0 lost (0.0 %") && output.stdout.contains("\nrtt min/mean/"),
            "{output}"
        );
        assert!(output.stderr.is_empty(), "{output}");
    }
}

#[test]
fn probe_requests_the_given_url() {
    let host = Host::claim();
    let _agent = Agent::start(&host, &responder_config(&host));
    let address = host.service_address();
    for (protocol, url) in [
        ("websocket", format!("ws://{address}/ws")),
        ("http", format!("http://{address}/-/healthy")),
        ("http", format!("http://{address}/-/ready")),
    ] {
        let output = probe(&[&url, "--protocol", protocol, "--json"]);
        assert_eq!(output.code, Some(0), "{output}");
        let found = summary(&output);
        assert_eq!((&found["received"], &found["target"]), (&found["sent"], &json!(url)), "{found}");
    }
    let output = probe(&[&format!("ws://{address}/metrics"), "--protocol", "websocket"]);
    assert_eq!(output.code, Some(1), "{output}");
    assert!(output.stderr.contains("server answered 200 OK"), "{output}");
}

#[test]
fn probe_that_cannot_be_answered_names_the_reason() {
    let host = Host::claim();
    let _agent = Agent::start(&host, &host.config("b", ""));
    let from = Host::claim();
    let probe = |protocol| probe(&[&host.to_string(), "--source", &from.to_string(), "--protocol", protocol]);
    for protocol in ["tcp", "udp"] {
        let output = probe(protocol);
        assert_eq!((output.code, output.stdout.lines().count() <= 1), (Some(1), true), "{output}");
        assert!(output.stderr.contains("responder.allow there"), "{output}");
    }
    let (closed, target) = (Host::claim(), host.to_string());
    for protocol in STREAMS {
        let output = self::probe(&[&closed.to_string(), "--protocol", protocol]);
        assert_eq!(output.code, Some(1), "{output}");
        assert!(output.stderr.contains("onnecting to") || output.stderr.contains("refused"), "{output}");
    }
    for (arguments, text) in [
        (&["--protocol", "tcp", "--flows", "2"][..], "--flows: only valid with protocol: udp, icmp"),
        (
            &["--protocol", "http", "--size", "100B"],
            "--size: only valid with protocol: udp, icmp, tcp, websocket",
        ),
        (&["--protocol", "http", "--port", "80"], "--port: only valid with --protocol udp or tcp"),
        (
            &["--protocol", "websocket", "--dont-fragment"],
            "--dont-fragment: only valid with protocol: udp, icmp",
        ),
        (&["--protocol", "tcp", "--size", "55B"], "--size: 55B is out of range; write 56B to 65536B"),
        (&["--protocol", "websocket", "--size", "95B"], "--size: 95B is out of range; write 96B to 65536B"),
        (&["--protocol", "tcp", "--format", "text"], "--format: only valid with protocol: websocket"),
        (&["--expect-status", "200"], "--expect-status: only valid with protocol: http"),
        (&["--protocol", "smtp"], "smtp"),
    ] {
        let output = self::probe(&[&[target.as_str()], arguments].concat());
        assert_eq!(output.code, Some(2), "{arguments:?}: {output}");
        assert!(output.stderr.contains(text), "{arguments:?}: {output}");
    }
}

#[test]
fn reload_reconnects_only_changed_paths() {
    let (a, b) = (Host::claim(), Host::claim());
    let _b = Agent::start(&b, &responder_config(&b));
    let agent = Agent::start(&a, &prober_config(&a, &b, &STREAMS, LONG_DEADLINES));
    let before = agent.page_when("answers over all protocols", |page| {
        STREAMS.iter().all(|protocol| page.count(OK, &[&probe_label(protocol)]) >= 10)
    });
    let sources = STREAMS.map(|protocol| agent.sources(protocol, "b"));
    let changed = prober_config(&a, &b, &STREAMS, LONG_DEADLINES)
        .replace("protocol: tcp, ", "protocol: tcp, size: 1000B, ");
    agent.rewrite(&changed);
    assert_eq!(agent.reload().status, 200);
    eventually("another connection", || (agent.sources("tcp", "b") != sources[0]).then_some(()));
    let after = agent.page_when("all go on", |page| {
        STREAMS.iter().all(|protocol| {
            page.count(OK, &[&probe_label(protocol)]) >= before.count(OK, &[&probe_label(protocol)]) + 10
        })
    });
    for (protocol, source) in STREAMS.iter().zip(&sources).skip(1) {
        assert_eq!(agent.sources(protocol, "b"), *source, "{protocol}");
        assert_eq!(after.count(WITHDRAWN, &[&probe_label(protocol)]), 0, "{after}");
    }
    assert_eq!(after.count(LOST, &[]) + after.count(RECONNECTS, &[]), 0, "{after}");
    assert_eq!(after.count("pathmeter_accounting_errors_total", &[]), 0, "{after}");
}

#[test]
fn planned_restart_of_a_peer_causes_no_loss() {
    let (a, b, folder) = (Host::claim(), Host::claim(), TempDir::new().unwrap());
    let key = key_file(folder.path());
    let responder = b.config("b", &format!("{key}peers: [{{name: a, address: {a}}}]"));
    let mut leaving = Agent::start(&b, &responder);
    let agent =
        Agent::start(&a, &(key + &prober_config(&a, &b, &STREAMS, "late_after: 500ms, lost_after: 500ms")));
    agent.page_when("answers over all protocols", |page| {
        STREAMS.iter().all(|protocol| page.count(OK, &[&probe_label(protocol)]) >= 10)
    });
    leaving.signal(Signal::SIGTERM);
    assert_eq!(leaving.wait().code(), Some(0), "{}", leaving.log());
    let page = agent.page_when("what goes unanswered is withdrawn", |page| {
        STREAMS.iter().all(|protocol| page.count(WITHDRAWN, &[&probe_label(protocol)]) >= 5)
    });
    assert_eq!(page.count(LOST, &[]), 0, "{page}");
    for protocol in STREAMS {
        let path = agent.path(protocol, "b");
        assert_eq!(path["state"], "draining", "{path}");
        assert!(path["reason"].is_string(), "{path}");
    }
    let _back = Agent::start(&b, &responder);
    let back = agent.page_when("the peer is back", |page| {
        page.count("pathmeter_echo_draining", &[]) == 0 && page.count(CONNECTED, &[]) == 3
    });
    let page = agent.page_when("answers again", |page| {
        STREAMS.iter().all(|protocol| {
            page.count(OK, &[&probe_label(protocol)]) >= back.count(OK, &[&probe_label(protocol)]) + 10
        })
    });
    assert_eq!(page.count(LOST, &[]), 0, "{page}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
}

#[test]
fn killed_peer_loses_only_what_was_sent_while_it_was_down() {
    let (a, b) = (Host::claim(), Host::claim());
    let mut responder = Agent::start(&b, &responder_config(&b));
    let agent = Agent::start(&a, &prober_config(&a, &b, &STREAMS, "late_after: 300ms, lost_after: 300ms"));
    let before = agent.page_when("answers over all protocols", |page| {
        STREAMS.iter().all(|protocol| page.count(OK, &[&probe_label(protocol)]) >= 10)
    });
    responder.signal(Signal::SIGKILL);
    assert_eq!(responder.wait().code(), None);
    agent.page_when("losses and refusals over all protocols", |page| {
        STREAMS.iter().all(|protocol| {
            page.count(LOST, &[&probe_label(protocol)]) >= 5
                && page.count(RECONNECTS, &[&probe_label(protocol), r#"reason="refused""#]) >= 1
        })
    });
    for protocol in STREAMS {
        let path = agent.path(protocol, "b");
        let reason = path["reason"].as_str().unwrap_or_else(|| panic!("{path}"));
        assert!(reason.starts_with("connecting to ") && reason.contains("refused"), "{path}");
    }
    let events = agent.json("/api/v1/events");
    let lost: Vec<&Value> = events["events"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["event"] == "connection_lost")
        .collect();
    assert!(lost.len() >= STREAMS.len() && lost.iter().all(|event| event["peer"] == "b"), "{events}");

    let _back = Agent::start(&b, &responder_config(&b));
    let back = agent.page_when("connections over all protocols", |page| page.count(CONNECTED, &[]) == 3);
    let after = agent.page_when("answers again", |page| {
        STREAMS.iter().all(|protocol| {
            page.count(OK, &[&probe_label(protocol)]) >= back.count(OK, &[&probe_label(protocol)]) + 10
        })
    });
    for protocol in STREAMS {
        let count =
            |name, labels: &[&str]| after.count(name, &[&[probe_label(protocol).as_str()], labels].concat());
        let ended = ["reset", "closed", "refused"]
            .map(|reason| count(RECONNECTS, &[&format!("reason=\"{reason}\"")]));
        assert_eq!(ended.iter().sum::<u64>(), count(RECONNECTS, &[]), "{after}");
        // The end of an idle HTTP connection is not counted.
        let counted = if protocol == "http" { 0..=2 } else { 1..=2 };
        assert!(counted.contains(&(ended[0] + ended[1])), "the kill, and perhaps the last attempt\n{after}");
        let answered = count(OK, &[]);
        assert!(answered > before.count(OK, &[&probe_label(protocol)]), "{after}");
        assert!(count(LOST, &[]) <= count(SENT, &[]) - answered, "{after}");
        assert!(agent.path(protocol, "b")["reason"].is_null(), "{}", agent.path(protocol, "b"));
    }
    assert_eq!(after.count(WITHDRAWN, &[]), 0, "{after}");
    assert_eq!(after.count("pathmeter_accounting_errors_total", &[]), 0, "{after}");
}
