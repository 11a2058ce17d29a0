//! Two agents on one machine measure each other; agents that are not admitted get no reply.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket};

use tempfile::TempDir;

use crate::fixture::{Agent, DEADLINE, Host, MetricsPage, eventually, skipped};

/// Deadlines longer than any delay of this machine: a lost or late datagram is then an error of the program.
const LONG_DEADLINES: &str = "late_after: 60s, lost_after: 60s";

/// Deadlines for datagrams that are not answered.
const SHORT_DEADLINES: &str = "late_after: 100ms, lost_after: 100ms";

const OLD_KEY: &str = "the key of last year\n";
const NEW_KEY: &str = "the key of this year\n";

fn answered(page: &MetricsPage) -> u64 {
    page.count("pathmeter_echo_rtt_seconds_count", &[])
}

/// Asserts that everything that has a verdict was answered in time.
fn assert_nothing_missed(page: &MetricsPage) {
    for name in ["late_total", "lost_total", "host_dropped_total", "withdrawn_total", "mismatched_total"] {
        assert_eq!(page.count(&format!("pathmeter_echo_{name}"), &[]), 0, "{name}\n{page}");
    }
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
}

#[test]
fn two_agents_measure_each_other() {
    let (a, b) = (Host::claim(), Host::claim());
    let config = |own: &Host, name: &str, other: &Host, others_name: &str| {
        own.config(
            name,
            &format!(
                "peers: [{{name: {others_name}, address: {other}}}]\n\
                 probes: [{{name: fast, interval: 20ms, flows: 2, dscp: ef, source: {own}, {LONG_DEADLINES}}}]"
            ),
        )
    };
    let agents = [Agent::start(&a, &config(&a, "a", &b, "b")), Agent::start(&b, &config(&b, "b", &a, "a"))];
    for (agent, peer) in agents.iter().zip([r#"peer="b""#, r#"peer="a""#]) {
        let page = agent.page_when("fifty requests", |page| {
            page.count("pathmeter_echo_verdicts_total", &[peer, r#"probe="fast""#]) >= 50
        });
        for way in [r#"direction="forward""#, r#"direction="reverse""#] {
            assert_eq!(page.count("pathmeter_echo_hops", &[way]), 0);
            assert_eq!(page.count("pathmeter_echo_dscp_remarked_total", &[way]), 0);
        }
        assert_eq!(page.count("pathmeter_echo_flows", &[]), 2);
        assert_eq!(page.count("pathmeter_echo_user_timestamps_total", &[]), 0, "{page}");
        assert_eq!(page.count("pathmeter_echo_responder_turnaround_invalid_total", &[]), 0, "{page}");
        assert!(page.count("pathmeter_responder_replies_total", &[]) > 0);
        assert_eq!(page.count("pathmeter_responder_rejected_total", &[]), 0, "{page}");
        assert_nothing_missed(&page);
        let up = r#"state="up""#;
        agent.page_when("the peer is up", |page| {
            page.has("pathmeter_peers", &[up]) && page.count("pathmeter_peers", &[up]) == 1
        });
    }
    let sources = agents[0].sources("fast", "b");
    let sources: Vec<SocketAddr> =
        sources.as_array().unwrap().iter().map(|source| source.as_str().unwrap().parse().unwrap()).collect();
    assert!(sources.iter().all(|source| source.ip().to_string() == a.to_string()), "{sources:?}");
    assert!(matches!(sources[..], [one, other] if one.port() != other.port()), "{sources:?}");
}

#[test]
fn replies_leave_from_the_address_that_was_asked() {
    let (a, b, asked) = (Host::claim(), Host::claim(), Host::claim());
    let listen = format!(
        "agent: {{name: b}}\nresponder: {{allow: [127.0.0.0/8]}}\n\
         listen: {{http: \"{}\", stamp: \"0.0.0.0:0\", agent: \"{}\"}}\n",
        b.service_address(),
        b.at(Host::AGENT_PORT)
    );
    let responder = Agent::start(&b, &listen);
    let port = responder.json("/api/v1/agent")["ports"]["stamp"].clone();
    let more = format!(
        "targets: [{{name: asked, address: {asked}, port: {port}}}]\n\
         probes: [{{name: echo, interval: 20ms, peers: [], targets: all, {LONG_DEADLINES}}}]"
    );
    let agent = Agent::start(&a, &a.config("a", &more));
    let page = agent.page_when("ten replies", |page| answered(page) >= 10);
    assert_nothing_missed(&page);
}

#[test]
fn configured_peers_are_answered_from_the_first_datagram() {
    let (a, b) = (Host::claim(), Host::claim());
    let probes = format!(
        "peers: [{{name: b, address: {b}}}]\nprobes: [{{name: fast, interval: 1ms, source: {a}, {LONG_DEADLINES}}}]"
    );
    let _asking = Agent::start(&a, &a.config("a", &probes));
    let answering = Agent::start(&b, &b.config("b", &format!("peers: [{{name: a, address: {a}}}]")));
    let page =
        answering.page_when("replies", |page| page.count("pathmeter_responder_replies_total", &[]) > 0);
    assert_eq!(page.count("pathmeter_responder_rejected_total", &[]), 0, "{page}");
}

#[test]
fn ipv6_path_is_measured() {
    if UdpSocket::bind("[::1]:0").is_err() {
        return skipped("this host has no IPv6");
    }
    let (a, b) = (Host::claim(), Host::claim());
    let listen = format!(
        "agent: {{name: b}}\n\
         listen: {{http: \"{}\", stamp: \"[::1]:0\", agent: \"{}\"}}\n\
         responder: {{allow: [\"::1/128\"]}}\n",
        b.service_address(),
        b.at(Host::AGENT_PORT)
    );
    let responder = Agent::start(&b, &listen);
    let port = responder.json("/api/v1/agent")["ports"]["stamp"].clone();
    let more = format!(
        "peers: [{{name: b, address: \"::1\", stamp_port: {port}}}]\n\
         probes: [{{name: six, interval: 20ms, family: ipv6, {LONG_DEADLINES}}}]"
    );
    let agent = Agent::start(&a, &a.config("a", &more));
    let page = agent.page_when("ten requests over IPv6", |page| {
        page.count("pathmeter_echo_verdicts_total", &[r#"family="ipv6""#]) >= 10
    });
    assert_nothing_missed(&page);
    assert_eq!(page.count("pathmeter_echo_hops", &[]), 0);
    assert_eq!(page.count("pathmeter_echo_user_timestamps_total", &[]), 0, "{page}");
}

#[test]
fn family_both_makes_two_paths_and_a_missing_address_is_a_reason() {
    let (a, b) = (Host::claim(), Host::claim());
    let listen = format!(
        "agent: {{name: b}}\n\
         listen: {{http: \"{}\", stamp: \"[::]:0\", agent: \"{}\"}}\n\
         responder: {{allow: [127.0.0.0/8, \"::1/128\"]}}\n",
        b.service_address(),
        b.at(Host::AGENT_PORT)
    );
    // The port that the kernel chose for IPv6 may be in use in IPv4.
    let responder =
        eventually("a port that is free in both families", || Agent::try_start(&b, &listen, &[]).ok());
    let port = responder.json("/api/v1/agent")["ports"]["stamp"].clone();
    let more = format!(
        "peers: [{{name: b, address: localhost, stamp_port: {port}}}]\n\
         probes: [{{name: both, interval: 20ms, family: both, {LONG_DEADLINES}}}]"
    );
    let agent = Agent::start(&a, &a.config("a", &more));
    let known: Vec<IpAddr> =
        ("localhost", 0).to_socket_addrs().unwrap().map(|address| address.ip()).collect();
    for (family, is_of) in [("ipv4", IpAddr::is_ipv4 as fn(&IpAddr) -> bool), ("ipv6", IpAddr::is_ipv6)] {
        let label = format!("family=\"{family}\"");
        if known.iter().any(is_of) {
            let page = agent.page_when("ten requests", |page| {
                let name = "pathmeter_echo_verdicts_total";
                page.has(name, &[&label]) && page.count(name, &[&label]) >= 10
            });
            assert_nothing_missed(&page);
        } else {
            let reason = eventually("the reason why a family is not measured", || {
                let all = agent.json("/api/v1/paths");
                let path = all["paths"].as_array().unwrap().iter().find(|path| path["family"] == family);
                path.map(|path| path["reason"].clone())
            });
            assert_eq!(reason, format!("b has no {family} address"));
        }
    }
}

/// An agent that measures `to` with this key file and no other peer.
fn keyed_agent(own: &Host, to: &Host, key: &str, deadlines: &str) -> (Agent, TempDir) {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("key");
    fs::write(&file, key).unwrap();
    let more = format!(
        "key_file: {}\n\
         peers: [{{name: other, address: {to}}}]\n\
         probes: [{{name: fast, interval: 20ms, source: {own}, {deadlines}}}]",
        file.display()
    );
    (Agent::start(own, &own.config("asker", &more)), dir)
}

#[test]
fn holder_of_the_key_is_answered_from_any_address() {
    let (a, b) = (Host::claim(), Host::claim());
    let (responder, _key) = keyed_agent(&b, &b, NEW_KEY, LONG_DEADLINES);
    let (agent, _same) = keyed_agent(&a, &b, NEW_KEY, LONG_DEADLINES);
    let page = agent.page_when("twenty answers", |page| answered(page) >= 20);
    assert_nothing_missed(&page);
    assert_eq!(responder.page().count("pathmeter_responder_rejected_total", &[]), 0);
}

#[test]
fn two_keys_are_valid_during_a_rotation() {
    let (old, both, turned) = (Host::claim(), Host::claim(), Host::claim());
    // A key is rotated in three steps: all agents know both keys and sign with the old one, then with the new
    // one, then drop the old one.
    let (second, _a) = keyed_agent(&both, &turned, &(OLD_KEY.to_owned() + NEW_KEY), LONG_DEADLINES);
    let (third, _b) = keyed_agent(&turned, &both, &(NEW_KEY.to_owned() + OLD_KEY), LONG_DEADLINES);
    let (first, _c) = keyed_agent(&old, &both, OLD_KEY, LONG_DEADLINES);
    for agent in &[first, second, third] {
        let page = agent.page_when("twenty answers", |page| answered(page) >= 20);
        assert_eq!(page.count("pathmeter_echo_mismatched_total", &[]), 0, "{page}");
        assert_eq!(page.count("pathmeter_responder_rejected_total", &[]), 0, "{page}");
    }
}

#[test]
fn wrong_key_is_rejected_and_counted() {
    let (a, b) = (Host::claim(), Host::claim());
    let (responder, _key) = keyed_agent(&b, &a, NEW_KEY, SHORT_DEADLINES);
    let (agent, _other) = keyed_agent(&a, &b, OLD_KEY, SHORT_DEADLINES);
    for agent in &[agent, responder] {
        let page = agent.page_when("refusals and losses", |page| {
            page.count("pathmeter_responder_rejected_total", &[r#"reason="auth""#]) >= 10
                && page.count("pathmeter_echo_lost_total", &[]) >= 10
        });
        assert_eq!(answered(&page), 0, "{page}");
        assert_eq!(page.count("pathmeter_responder_replies_total", &[]), 0, "{page}");
    }
}

#[test]
fn unlisted_source_is_rejected_counted_and_given_the_reason() {
    let (a, b) = (Host::claim(), Host::claim());
    let responder = Agent::start(&b, &b.config("b", ""));
    let more = format!(
        "peers: [{{name: b, address: {b}}}]\n\
         probes: [{{name: fast, interval: 20ms, source: {a}, {SHORT_DEADLINES}}}]"
    );
    let agent = Agent::start(&a, &a.config("a", &more));
    let page = agent.page_when("losses", |page| page.count("pathmeter_echo_lost_total", &[]) >= 10);
    assert_eq!(answered(&page), 0, "{page}");
    let page = responder.page();
    assert!(page.count("pathmeter_responder_rejected_total", &[r#"reason="unlisted""#]) >= 10, "{page}");
    assert_eq!(page.count("pathmeter_responder_replies_total", &[]), 0, "{page}");
    let reason = eventually("the peer gives the reason", || {
        agent.path("fast", "b")["reason"].as_str().map(str::to_owned)
    });
    assert!(
        reason.starts_with("b does not answer 127.") && reason.ends_with("add it to responder.allow there")
    );
}

#[test]
fn size_and_source_ports_are_as_configured() {
    const FIRST: u16 = 21_000;
    let (a, b) = (Host::claim(), Host::claim());
    let reflector = b.socket(10_862);
    let port = reflector.local_addr().unwrap().port();
    let more = format!(
        "targets: [{{name: router, address: {b}, port: {port}}}]\n\
         probes: [{{name: sized, targets: all, interval: 20ms, flows: 3, size: 1400B, dont_fragment: true, \
         source: {a}, source_port: {FIRST}}}]"
    );
    let agent = Agent::start(&a, &a.config("a", &more));
    reflector.set_read_timeout(Some(DEADLINE)).unwrap();
    let ports = FIRST..FIRST + 3;
    let mut seen = BTreeSet::new();
    while seen.len() < 3 {
        let mut datagram = [0; 2_000];
        let (length, from) = reflector.recv_from(&mut datagram).unwrap();
        assert_eq!(length, 1_400);
        assert!(from.ip() == a.at(0).ip() && ports.contains(&from.port()), "{from}");
        seen.insert(from);
    }
    let sources: Vec<String> = seen.iter().map(SocketAddr::to_string).collect();
    let path = agent.path("sized", "router");
    assert_eq!(agent.sources("sized", "router"), serde_json::json!(sources));
    assert_eq!(path["address"], reflector.local_addr().unwrap().to_string());
    assert_eq!(agent.page().count("pathmeter_echo_send_errors_total", &[]), 0);
}

#[test]
fn path_mtu_on_loopback_is_the_ceiling() {
    let (a, b) = (Host::claim(), Host::claim());
    let (responder, _key) = keyed_agent(&b, &b, NEW_KEY, LONG_DEADLINES);
    let (agent, _same) = keyed_agent(
        &a,
        &b,
        NEW_KEY,
        &format!("{LONG_DEADLINES}, path_mtu: {{interval: 1s, ceiling: 8000B}}"),
    );
    assert!(agent.path("fast", "other")["path_mtu_bytes"].is_null());
    let acknowledged = [r#"outcome="acknowledged""#];
    let page = agent.page_when("the path MTU, confirmed", |page| {
        page.has("pathmeter_path_mtu_bytes", &[])
            && page.count("pathmeter_path_mtu_probes_total", &acknowledged) >= 3
    });
    assert_eq!(page.count("pathmeter_path_mtu_bytes", &[]), 8_000);
    for outcome in ["lost", "too_big"] {
        let label = format!("outcome=\"{outcome}\"");
        assert_eq!(page.count("pathmeter_path_mtu_probes_total", &[&label]), 0, "{page}");
    }
    assert_eq!(page.count("pathmeter_path_mtu_changes_total", &[]), 0, "{page}");
    assert_eq!(agent.path("fast", "other")["path_mtu_bytes"], 8_000);
    assert_nothing_missed(&page);
    for counter in ["send_errors_total", "icmp_errors_total"] {
        assert_eq!(page.count(&format!("pathmeter_echo_{counter}"), &[]), 0, "{counter}\n{page}");
    }
    assert!(agent.log().contains("path MTU found"), "{}", agent.log());
    assert_eq!(responder.page().count("pathmeter_responder_rejected_total", &[]), 0);
    assert_eq!(page.count("pathmeter_socket_unrouted_total", &[r#"loop="prober""#]), 0, "{page}");
}
