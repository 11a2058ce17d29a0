//! Events and traces that survive a restart in `state_dir`.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::fixture::{Agent, Host, eventually};

fn config(host: &Host, peer: &Host, state_dir: &Path) -> String {
    host.config(
        "a",
        &format!(
            "state_dir: {}\n\
             peers: [{{name: b, address: {peer}}}]\n\
             probes: [{{name: mesh, interval: 20ms}}, {{name: routes, kind: trace, follows: mesh, interval: 1h}}, \
             {{name: chat, protocol: tcp, interval: 1s}}]",
            state_dir.display()
        ),
    )
}

fn list(agent: &Agent, what: &str) -> Vec<Value> {
    agent.json(&format!("/api/v1/{what}"))[what].as_array().unwrap().clone()
}

fn stored(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[test]
fn traces_and_events_survive_a_killed_agent_and_their_numbers_continue() {
    let (a, b) = (Host::claim(), Host::claim());
    let folder = tempfile::tempdir().unwrap();
    let state_dir = folder.path().join("new/state");
    let mut peer = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let config = config(&a, &b, &state_dir);
    let mut agent = Agent::start(&a, &config);
    let state = agent.json("/api/v1/agent")["state"].clone();
    assert_eq!(state, serde_json::json!({"directory": state_dir, "error": null}));
    eventually("there are traces", || (list(&agent, "traces").len() >= 2).then_some(()));
    peer.signal(Signal::SIGKILL);
    peer.wait();
    eventually("there are events", || (!list(&agent, "events").is_empty()).then_some(()));
    let (traces, events) = eventually("both are stored", || {
        let (traces, events) = (list(&agent, "traces"), list(&agent, "events"));
        let is_stored = stored(&state_dir.join("traces.jsonl")) == traces
            && stored(&state_dir.join("events.jsonl")) == events;
        is_stored.then_some((traces, events))
    });
    agent.signal(Signal::SIGKILL);
    agent.wait();
    let agent = Agent::start(&a, &config);
    assert!(list(&agent, "traces").starts_with(&traces));
    assert!(list(&agent, "events").starts_with(&events));
    let after = |all: &[Value]| all.last().unwrap()["number"].as_u64().unwrap() + 1;
    let _peer = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let next = eventually("a trace of this run", || list(&agent, "traces").get(traces.len()).cloned());
    assert_eq!(next["number"], after(&traces));
}

#[test]
fn stopping_agent_stores_what_is_new() {
    let (a, b) = (Host::claim(), Host::claim());
    let folder = tempfile::tempdir().unwrap();
    let _peer = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let mut agent = Agent::start(&a, &config(&a, &b, folder.path()));
    eventually("there are traces", || (list(&agent, "traces").len() >= 2).then_some(()));
    agent.signal(Signal::SIGTERM);
    agent.wait();
    assert!(stored(&folder.path().join("traces.jsonl")).len() >= 2);
}

#[test]
fn agent_measures_while_the_disk_is_full_and_stores_everything_later() {
    let (a, b) = (Host::claim(), Host::claim());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("traces.jsonl");
    // Every write fails as on a full disk.
    std::os::unix::fs::symlink("/dev/full", &file).unwrap();
    let _peer = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let agent = Agent::start(&a, &config(&a, &b, folder.path()));
    let error = || agent.json("/api/v1/agent")["state"]["error"].clone();
    eventually("the API shows the error", || error().as_str().map(str::to_owned));
    let failures = "pathmeter_state_dir_write_failures_total";
    let page = agent.page_when("failures are counted", |page| page.count(failures, &[]) >= 1);
    assert!(page.count("pathmeter_echo_verdicts_total", &[]) > 0, "{page}");
    fs::remove_file(&file).unwrap();
    eventually("the traces are stored", || (stored(&file) == list(&agent, "traces")).then_some(()));
    eventually("the API shows no error", || error().is_null().then_some(()));
    let log = agent.log();
    assert_eq!(log.matches("cannot be stored").count(), 1, "{log}");
}

#[test]
fn folder_that_cannot_be_used_is_reported_and_the_agent_measures() {
    let (a, b) = (Host::claim(), Host::claim());
    let folder = tempfile::tempdir().unwrap();
    let first = Agent::start(&a, &config(&a, &b, folder.path()));
    let second = Agent::start(&b, &config(&b, &a, folder.path()));
    let error = |agent: &Agent| agent.json("/api/v1/agent")["state"]["error"].clone();
    assert_eq!(error(&first), Value::Null);
    let expected =
        format!("{} is used by another agent; give each its own state_dir", folder.path().display());
    assert_eq!(error(&second), expected);
    assert!(second.log().contains(&expected), "{}", second.log());
    drop(second);
    let not_a_folder = folder.path().join("lock");
    let third = Agent::start(&b, &config(&b, &a, &not_a_folder));
    let found = error(&third);
    assert!(
        found.as_str().unwrap().contains("the user of the agent must be able to create and write it"),
        "{found}"
    );
}

#[test]
fn folder_of_systemd_is_the_default_and_without_one_history_is_in_memory() {
    let host = Host::claim();
    let folder = tempfile::tempdir().unwrap();
    let list = format!("{}:/other", folder.path().display());
    let agent = Agent::start_with(&host, &host.config("a", ""), &[("STATE_DIRECTORY", &list)]);
    assert_eq!(agent.json("/api/v1/agent")["state"]["directory"], folder.path().to_str().unwrap());
    drop(agent);
    let agent = Agent::start(&host, &host.config("a", ""));
    assert_eq!(agent.json("/api/v1/agent")["state"]["directory"], Value::Null);
    assert!(agent.log().contains("in memory only"), "{}", agent.log());
}
