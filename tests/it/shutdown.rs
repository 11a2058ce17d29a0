//! A stopping agent sends a goodbye; a stalled or killed agent is distinguished from a faulty network.

use std::fs;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::fixture::{Agent, Host};

const OK: &str = "pathmeter_echo_rtt_seconds_count";
const LOST: &str = "pathmeter_echo_lost_total";
const DRAINING: &str = "pathmeter_echo_draining";
const WITHDRAWN: &str = "pathmeter_echo_withdrawn_total";
const IN_FLIGHT: &str = "pathmeter_echo_in_flight";

/// A configuration that measures `to` with one probe.
fn prober_config(own: &Host, to: &Host, probe: &str) -> String {
    let more =
        format!("peers: [{{name: b, address: {to}}}]\nprobes: [{{name: fast, source: {own}, {probe}}}]");
    own.config("a", &more)
}

fn responder_config(host: &Host) -> String {
    host.config("b", "responder: {allow: [127.0.0.0/8]}")
}

#[test]
fn sigterm_and_sigint_exit_with_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (a, b) = (Host::claim(), Host::claim());
        let _b = Agent::start(&b, &responder_config(&b));
        let mut agent = Agent::start(&a, &prober_config(&a, &b, "interval: 20ms"));
        agent.page_when("answers", |page| page.count(OK, &[]) >= 5);
        agent.signal(signal);
        assert_eq!(agent.wait().code(), Some(0), "{}", agent.log());
        assert!(agent.log().contains("stopped"), "{}", agent.log());
    }
}

#[test]
fn goodbye_withdraws_requests_and_a_restart_resumes() {
    let (a, b) = (Host::claim(), Host::claim());
    let dir = TempDir::new().unwrap();
    let key = dir.path().join("key");
    fs::write(&key, "the key of this year").unwrap();
    let key = format!("key_file: {}\n", key.display());
    let responder_config = b.config("b", &format!("{key}peers: [{{name: a, address: {a}}}]"));
    let probe = "interval: 20ms, late_after: 500ms, lost_after: 500ms";
    let mut leaving = Agent::start(&b, &responder_config);
    let agent = Agent::start(&a, &(key + &prober_config(&a, &b, probe)));
    agent.page_when("answers", |page| page.count(OK, &[]) >= 20);

    leaving.signal(Signal::SIGTERM);
    assert_eq!(leaving.wait().code(), Some(0), "{}", leaving.log());
    let page = agent.page_when("what goes unanswered is withdrawn", |page| page.count(WITHDRAWN, &[]) >= 10);
    assert_eq!(page.count(DRAINING, &[]), 1, "{page}");
    assert_eq!(page.count(LOST, &[]), 0, "{page}");
    assert_eq!(agent.path("fast", "b")["state"], "draining");
    agent.page_when("the peer is known to be leaving", |page| {
        page.count("pathmeter_peers", &[r#"state="draining""#]) == 1
    });

    let _back = Agent::start(&b, &responder_config);
    let back = agent.page_when("the peer is back", |page| page.count(DRAINING, &[]) == 0);
    let page = agent.page_when("answers again", |page| page.count(OK, &[]) >= back.count(OK, &[]) + 10);
    assert_eq!(page.count(LOST, &[]), 0, "{page}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
}

#[test]
fn stalled_responder_adds_turnaround_and_no_loss() {
    const TURNAROUND: &str = "pathmeter_echo_responder_turnaround_seconds_sum";
    let (a, b) = (Host::claim(), Host::claim());
    let responder = Agent::start(&b, &responder_config(&b));
    let probe = "interval: 100ms, late_after: 5s, lost_after: 60s";
    let agent = Agent::start(&a, &prober_config(&a, &b, probe));
    let before = agent.page_when("answers", |page| page.count(OK, &[]) >= 5);

    responder.signal(Signal::SIGSTOP);
    let stalled = agent.page_when("two seconds without a reply", |page| page.count(IN_FLIGHT, &[]) >= 20);
    responder.signal(Signal::SIGCONT);
    let after = agent
        .page_when("all requests are answered", |page| page.count(OK, &[]) >= stalled.count(OK, &[]) + 20);

    let grown = after.seconds(TURNAROUND, &[]) - before.seconds(TURNAROUND, &[]);
    assert!(grown >= 1.0, "the turnarounds grew by {grown} s\n{after}");
    for name in [LOST, "pathmeter_echo_late_total", "pathmeter_echo_host_dropped_total"] {
        assert_eq!(after.count(name, &[]), 0, "{name}\n{after}");
    }
}

#[test]
fn killed_responder_is_counted_as_loss() {
    let (a, b) = (Host::claim(), Host::claim());
    let mut responder = Agent::start(&b, &responder_config(&b));
    let agent =
        Agent::start(&a, &prober_config(&a, &b, "interval: 20ms, late_after: 200ms, lost_after: 200ms"));
    agent.page_when("answers", |page| page.count(OK, &[]) >= 10);

    responder.signal(Signal::SIGKILL);
    assert_eq!(responder.wait().code(), None);
    let then = agent.page();
    let page = agent.page_when("losses", |page| page.count(LOST, &[]) >= then.count(LOST, &[]) + 10);
    assert_eq!(page.count(WITHDRAWN, &[]), 0, "{page}");
    assert_eq!(page.count(DRAINING, &[]), 0, "{page}");
    // The host still runs and sends ICMP port unreachable.
    assert!(page.count("pathmeter_echo_icmp_errors_total", &[]) >= 1, "{page}");
    agent.page_when("the peer is down", |page| page.count("pathmeter_peers", &[r#"state="down""#]) == 1);
}
