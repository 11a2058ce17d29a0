//! Echo over connections between two agents: all protocols, and what happens when the other one goes.

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixture::{Agent, Ended, Host, Page, eventually, run, skipped};

const OK: &str = "pathmeter_echo_rtt_seconds_count";
const SENT: &str = "pathmeter_echo_sent_total";
const LOST: &str = "pathmeter_echo_lost_total";
const WITHDRAWN: &str = "pathmeter_echo_withdrawn_total";
const ENDED: &str = "pathmeter_echo_reconnects_total";
const CONNECTED: &str = "pathmeter_echo_connected";

/// Over connections, those that have series of their own.
const STREAMS: [&str; 3] = ["tcp", "websocket", "http"];

/// Deadlines that no delay of this machine reaches.
const PATIENT: &str = "late_after: 60s, lost_after: 60s";

/// Probes of `protocols`, each called as its protocol; `more` are further keys.
fn probes(protocols: &[&str], more: &str) -> String {
    let probe =
        |protocol: &&str| format!("  - {{name: {protocol}, protocol: {protocol}, interval: 20ms, {more}}}\n");
    format!("probes:\n{}", protocols.iter().map(probe).collect::<String>())
}

fn of(probe: &str) -> String {
    format!("probe=\"{probe}\"")
}

fn answering(host: &Host) -> String {
    host.config("b", "responder: {allow: [127.0.0.0/8]}")
}

fn measuring(own: &Host, to: &Host, protocols: &[&str], more: &str) -> String {
    let probes = probes(protocols, &format!("source: {own}, {more}"));
    own.config("a", &format!("peers: [{{name: b, address: {to}}}]\n{probes}"))
}

/// Whether ICMP can be measured here; says so if not.
fn has_icmp(agent: &Agent) -> bool {
    let has_it = agent.path("icmp", "b")["reason"].is_null();
    if !has_it {
        skipped("this host does not let us send ICMP");
    }
    has_it
}

/// Asserts that everything that has a verdict was answered, over connections that stayed.
fn assert_nothing_missed(page: &Page) {
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

/// Waits until each of these probes has its answers, and nothing went wrong.
fn all_are_answered(agent: &Agent, protocols: &[&str]) {
    let page = agent.page_when("answers over all protocols", |page| {
        protocols.iter().all(|protocol| page.count(OK, &[&of(protocol)]) >= 10)
    });
    assert_nothing_missed(&page);
    for protocol in protocols.iter().filter(|protocol| STREAMS.contains(protocol)) {
        assert_eq!(page.count(CONNECTED, &[&of(protocol)]), 1, "{page}");
    }
}

fn key_file(folder: &Path) -> String {
    let file = folder.join("key");
    fs::write(&file, "the key of this year").unwrap();
    format!("key_file: {}\n", file.display())
}

#[test]
fn two_agents_measure_each_other_over_all_protocols_with_and_without_a_key() {
    let folder = TempDir::new().unwrap();
    for key in [String::new(), key_file(folder.path())] {
        let (a, b) = (Host::claim(), Host::claim());
        // With the key the address need not be known.
        let allow = if key.is_empty() { "responder: {allow: [127.0.0.0/8]}" } else { "" };
        let asked = Agent::start(&b, &b.config("b", &format!("{key}{allow}")));
        let protocols = ["tcp", "websocket", "http", "icmp"];
        let agent = Agent::start(&a, &(key.clone() + &measuring(&a, &b, &protocols, PATIENT)));
        let is_all = has_icmp(&agent);
        all_are_answered(&agent, if is_all { &protocols } else { &STREAMS });
        let page = asked.page();
        assert_eq!(page.count("pathmeter_responder_connections_refused_total", &[]), 0, "{page}");
        assert!(page.count("pathmeter_responder_messages_total", &[]) >= 10, "{page}");
        for protocol in STREAMS {
            let sources = agent.sources(protocol, "b");
            assert!(sources[0].as_str().unwrap().starts_with(&format!("{a}:")), "{sources}");
        }
    }
}

#[test]
fn two_agents_measure_each_other_over_ipv6() {
    if TcpListener::bind("[::1]:0").is_err() {
        return skipped("this host has no IPv6");
    }
    let a = Host::claim();
    // A port of ::1 is nobody's until it is bound: another test may take it first.
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
    let agent =
        Agent::start(&a, &a.config("a", &(peers + &probes(&protocols, &format!("family: ipv6, {PATIENT}")))));
    let is_all = has_icmp(&agent);
    all_are_answered(&agent, if is_all { &protocols } else { &STREAMS });
}

#[cfg(feature = "tls")]
#[test]
fn agents_with_https_measure_each_other_over_all_protocols() {
    use pathmeter::http::client::{Client, TlsClient};
    use pathmeter::tls::{Connector, Trust};
    use pathmeter_lab::pki::{Authority, Valid};

    for is_keyed in [false, true] {
        let (a, b, folder) = (Host::claim(), Host::claim(), TempDir::new().unwrap());
        let ca = Authority::new("ours");
        let ca_file = ca.write(folder.path(), "ca");
        ca.issue(&[&b.to_string()], Valid::Always).write(folder.path(), "server");
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
            &a.config("a", &(trust + &peers + &probes(&STREAMS, &format!("source: {a}, {PATIENT}")))),
        );
        all_are_answered(&agent, &STREAMS);
        let page = agent.page();
        for (protocol, has_one) in [("tcp", false), ("websocket", true), ("http", true)] {
            let expiry = "pathmeter_tls_certificate_expiry_timestamp_seconds";
            assert_eq!(page.has(expiry, &[&of(protocol)]), has_one, "{protocol}\n{page}");
        }
    }
}

/// `pathmeter probe echo` with a quick schedule.
fn probe(arguments: &[&str]) -> Ended {
    run(&[&["probe", "echo", "--interval", "20ms", "--count", "10"], arguments].concat())
}

fn summary(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}\n{ended}"))
}

/// The names of an object's members, and of objects within.
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
fn a_probe_over_each_protocol_says_the_same_things_to_people_and_to_programs() {
    let host = Host::claim();
    let _agent = Agent::start(&host, &answering(&host));
    let target = host.to_string();
    let udp = summary(&probe(&[&target, "--json"]));
    for (protocol, units, port) in [
        ("tcp", "messages", Some(Host::AGENT_PORT)),
        ("websocket", "messages", Some(Host::PORT)),
        ("http", "requests", Some(Host::PORT)),
        ("icmp", "datagrams", None),
    ] {
        let ended = probe(&[&target, "--protocol", protocol, "--json"]);
        if protocol == "icmp" && ended.code != Some(0) {
            return skipped(&format!("this host does not let us send ICMP: {ended}"));
        }
        assert_eq!(ended.code, Some(0), "{ended}");
        let found = summary(&ended);
        assert_eq!(names(&found), names(&udp), "{protocol}");
        assert_eq!(found["received"], found["sent"], "{protocol}: {found}");
        assert_eq!(found["lost"], json!({"forward": 0, "reverse": 0, "unknown": 0}), "{protocol}: {found}");
        let place = port.map_or_else(|| target.clone(), |port| host.at(port).to_string());
        assert_eq!(found["address"], place);
        let ended = probe(&[&target, "--protocol", protocol]);
        assert_eq!(ended.code, Some(0), "{ended}");
        assert!(ended.stdout.starts_with(&format!("{target} ({place}): 10 {units} every 20ms\n")), "{ended}");
        assert!(
            ended.stdout.contains(" 0 lost (0.0 %") && ended.stdout.contains("\nrtt min/mean/"),
            "{ended}"
        );
        assert!(ended.stderr.is_empty(), "{ended}");
    }
}

#[test]
fn a_probe_of_a_url_asks_for_that() {
    let host = Host::claim();
    let _agent = Agent::start(&host, &answering(&host));
    let front = host.front();
    for (protocol, url) in [
        ("websocket", format!("ws://{front}/ws")),
        ("http", format!("http://{front}/-/healthy")),
        ("http", format!("http://{front}/-/ready")),
    ] {
        let ended = probe(&[&url, "--protocol", protocol, "--json"]);
        assert_eq!(ended.code, Some(0), "{ended}");
        let found = summary(&ended);
        assert_eq!((&found["received"], &found["target"]), (&found["sent"], &json!(url)), "{found}");
    }
    let ended = probe(&[&format!("ws://{front}/metrics"), "--protocol", "websocket"]);
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.stderr.contains("server answered 200 OK"), "{ended}");
}

#[test]
fn a_probe_that_will_not_be_answered_says_why() {
    let host = Host::claim();
    let _agent = Agent::start(&host, &host.config("b", ""));
    let from = Host::claim();
    let probe = |protocol| probe(&[&host.to_string(), "--source", &from.to_string(), "--protocol", protocol]);
    for protocol in ["tcp", "udp"] {
        let ended = probe(protocol);
        assert_eq!((ended.code, ended.stdout.lines().count() <= 1), (Some(1), true), "{ended}");
        assert!(ended.stderr.contains("responder.allow there"), "{ended}");
    }
    let (closed, target) = (Host::claim(), host.to_string());
    for protocol in STREAMS {
        let ended = self::probe(&[&closed.to_string(), "--protocol", protocol]);
        assert_eq!(ended.code, Some(1), "{ended}");
        assert!(ended.stderr.contains("onnecting to") || ended.stderr.contains("refused"), "{ended}");
    }
    for (arguments, words) in [
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
        let ended = self::probe(&[&[target.as_str()], arguments].concat());
        assert_eq!(ended.code, Some(2), "{arguments:?}: {ended}");
        assert!(ended.stderr.contains(words), "{arguments:?}: {ended}");
    }
}

#[test]
fn a_reload_keeps_the_connections_of_paths_that_stay_and_makes_those_anew_that_change() {
    let (a, b) = (Host::claim(), Host::claim());
    let _b = Agent::start(&b, &answering(&b));
    let agent = Agent::start(&a, &measuring(&a, &b, &STREAMS, PATIENT));
    let before = agent.page_when("answers over all protocols", |page| {
        STREAMS.iter().all(|protocol| page.count(OK, &[&of(protocol)]) >= 10)
    });
    let sources = STREAMS.map(|protocol| agent.sources(protocol, "b"));
    let changed =
        measuring(&a, &b, &STREAMS, PATIENT).replace("protocol: tcp, ", "protocol: tcp, size: 1000B, ");
    agent.rewrite(&changed);
    assert_eq!(agent.reload().status, 200);
    eventually("another connection", || (agent.sources("tcp", "b") != sources[0]).then_some(()));
    let after = agent.page_when("all go on", |page| {
        STREAMS
            .iter()
            .all(|protocol| page.count(OK, &[&of(protocol)]) >= before.count(OK, &[&of(protocol)]) + 10)
    });
    for (protocol, source) in STREAMS.iter().zip(&sources).skip(1) {
        assert_eq!(agent.sources(protocol, "b"), *source, "{protocol}");
        assert_eq!(after.count(WITHDRAWN, &[&of(protocol)]), 0, "{after}");
    }
    assert_eq!(after.count(LOST, &[]) + after.count(ENDED, &[]), 0, "{after}");
    assert_eq!(after.count("pathmeter_accounting_errors_total", &[]), 0, "{after}");
}

#[test]
fn a_peer_that_is_restarted_as_planned_costs_no_loss() {
    let (a, b, folder) = (Host::claim(), Host::claim(), TempDir::new().unwrap());
    let key = key_file(folder.path());
    let asked = b.config("b", &format!("{key}peers: [{{name: a, address: {a}}}]"));
    let mut leaving = Agent::start(&b, &asked);
    let agent =
        Agent::start(&a, &(key + &measuring(&a, &b, &STREAMS, "late_after: 500ms, lost_after: 500ms")));
    agent.page_when("answers over all protocols", |page| {
        STREAMS.iter().all(|protocol| page.count(OK, &[&of(protocol)]) >= 10)
    });
    leaving.signal(Signal::SIGTERM);
    assert_eq!(leaving.ended().code(), Some(0), "{}", leaving.log());
    let page = agent.page_when("what goes unanswered is withdrawn", |page| {
        STREAMS.iter().all(|protocol| page.count(WITHDRAWN, &[&of(protocol)]) >= 5)
    });
    assert_eq!(page.count(LOST, &[]), 0, "{page}");
    for protocol in STREAMS {
        let path = agent.path(protocol, "b");
        assert_eq!(path["state"], "draining", "{path}");
        assert!(path["reason"].is_string(), "{path}");
    }
    let _back = Agent::start(&b, &asked);
    let back = agent.page_when("the peer is back", |page| {
        page.count("pathmeter_echo_draining", &[]) == 0 && page.count(CONNECTED, &[]) == 3
    });
    let page = agent.page_when("answers again", |page| {
        STREAMS
            .iter()
            .all(|protocol| page.count(OK, &[&of(protocol)]) >= back.count(OK, &[&of(protocol)]) + 10)
    });
    assert_eq!(page.count(LOST, &[]), 0, "{page}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
}

#[test]
fn a_peer_that_is_killed_and_comes_back_costs_what_was_asked_meanwhile() {
    let (a, b) = (Host::claim(), Host::claim());
    let mut asked = Agent::start(&b, &answering(&b));
    let agent = Agent::start(&a, &measuring(&a, &b, &STREAMS, "late_after: 300ms, lost_after: 300ms"));
    let before = agent.page_when("answers over all protocols", |page| {
        STREAMS.iter().all(|protocol| page.count(OK, &[&of(protocol)]) >= 10)
    });
    asked.signal(Signal::SIGKILL);
    assert_eq!(asked.ended().code(), None);
    agent.page_when("losses and refusals over all protocols", |page| {
        STREAMS.iter().all(|protocol| {
            page.count(LOST, &[&of(protocol)]) >= 5
                && page.count(ENDED, &[&of(protocol), r#"reason="refused""#]) >= 1
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

    let _back = Agent::start(&b, &answering(&b));
    let back = agent.page_when("connections over all protocols", |page| page.count(CONNECTED, &[]) == 3);
    let after = agent.page_when("answers again", |page| {
        STREAMS
            .iter()
            .all(|protocol| page.count(OK, &[&of(protocol)]) >= back.count(OK, &[&of(protocol)]) + 10)
    });
    for protocol in STREAMS {
        let count = |name, labels: &[&str]| after.count(name, &[&[of(protocol).as_str()], labels].concat());
        let ended =
            ["reset", "closed", "refused"].map(|reason| count(ENDED, &[&format!("reason=\"{reason}\"")]));
        assert_eq!(ended.iter().sum::<u64>(), count(ENDED, &[]), "{after}");
        // The end of an idle HTTP connection is not counted.
        let counted = if protocol == "http" { 0..=2 } else { 1..=2 };
        assert!(counted.contains(&(ended[0] + ended[1])), "the kill, and perhaps the last attempt\n{after}");
        let answered = count(OK, &[]);
        assert!(answered > before.count(OK, &[&of(protocol)]), "{after}");
        assert!(count(LOST, &[]) <= count(SENT, &[]) - answered, "{after}");
        assert!(agent.path(protocol, "b")["reason"].is_null(), "{}", agent.path(protocol, "b"));
    }
    assert_eq!(after.count(WITHDRAWN, &[]), 0, "{after}");
    assert_eq!(after.count("pathmeter_accounting_errors_total", &[]), 0, "{after}");
}
