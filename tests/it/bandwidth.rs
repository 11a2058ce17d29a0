//! Bandwidth runs between agents, and of the command line.

use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::fixture::{Agent, CommandOutput, Host, eventually, run};

/// `pathmeter probe bandwidth` to a host, which is never stopped because a busy machine answers late.
fn probe(to: &Host, arguments: &[&str]) -> CommandOutput {
    let to = to.service_address().to_string();
    run(&[&["probe", "bandwidth", &to, "--added-delay-max", "off"], arguments].concat())
}

fn results(output: &CommandOutput) -> Vec<Value> {
    let all: Value = serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{output}"));
    all["results"].as_array().unwrap().clone()
}

fn responder(host: &Host, bandwidth: &str) -> Agent {
    let more = format!("responder: {{allow: [127.0.0.0/8]}}\nbandwidth: {{{bandwidth}}}");
    Agent::start(host, &host.config("b", &more))
}

#[test]
fn command_measures_both_directions() {
    let host = Host::claim();
    let _agent = responder(&host, "");
    let output = probe(&host, &["--bytes", "3MB", "--streams", "2", "--json"]);
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{output}");
    let results = results(&output);
    let directions: Vec<&Value> = results.iter().map(|result| &result["direction"]).collect();
    assert_eq!(directions, ["forward", "reverse"]);
    for result in &results {
        let named = ["method", "bytes", "stop_reason", "streams"].map(|name| &result[name]);
        assert_eq!(named, [&json!("tcp"), &json!(3_000_000), &json!("bytes"), &json!(2)], "{result}");
        assert!(result["throughput_bytes_per_second"].as_u64().unwrap() > 0, "{result}");
    }
    let text = probe(&host, &["--bytes", "3MB", "--direction", "forward"]);
    assert!(text.stdout.starts_with("forward: ") && text.stdout.contains("3.000 MB in "), "{text}");
    assert!(!text.stdout.contains("reverse:"), "{text}");
}

#[test]
fn many_clients_have_their_turn() {
    let host = Host::claim();
    let _agent = responder(&host, "runs_max: 4");
    let arguments = ["--bytes", "100kB", "--direction", "forward", "--concurrent", "30", "--json"];
    let output = probe(&host, &arguments);
    assert_eq!(output.code, Some(0), "{output}");
    let results = results(&output);
    let clients: Vec<u64> = results.iter().map(|result| result["client"].as_u64().unwrap()).collect();
    assert_eq!(clients, (1..=30).collect::<Vec<u64>>());
    assert!(results.iter().all(|result| result["bytes"] == 100_000), "{results:?}");
}

#[test]
fn refused_run_has_a_reason_and_keeps_the_result_of_the_other_direction() {
    let host = Host::claim();
    let _agent = responder(&host, "bytes_per_day: 5MB");
    let output = probe(&host, &["--bytes", "3MB", "--json"]);
    assert_eq!(output.code, Some(1), "{output}");
    let results = results(&output);
    assert_eq!(results[0]["bytes"], 3_000_000);
    let error = results[1]["error"].as_str().unwrap();
    let reason = "refuses the run: the run may use 3000000 bytes, but the budget of this host has 2000000 bytes \
                  left today";
    assert!(error.ends_with(reason), "{error}");
    assert!(output.stderr.contains(reason), "{output}");
}

#[test]
fn invalid_options_are_refused() {
    let host = Host::claim();
    for (arguments, problem) in [
        (["--bytes", "3"], "--bytes: `3` has no unit"),
        (["--rate", "3MB"], "--rate: `3MB` has an unknown unit"),
        (["--rate", "99kbit/s"], "--rate: 99kbit/s is out of range; write at least 100kbit/s"),
        (["--added-delay-max", "0ms"], "--added-delay-max: 0ms is out of range; write at least 1ms, or off"),
        (["--added-delay-max", "never"], "--added-delay-max: `never` is not a duration"),
        (["--dscp", "64"], "--dscp: 64 is above 63"),
        (["--port", "9"], "--port: not valid with bandwidth"),
    ] {
        let to = host.service_address().to_string();
        let output = run(&[&["probe", "bandwidth", &to], &arguments[..]].concat());
        assert_eq!(output.code, Some(2), "{output}");
        assert!(output.stderr.contains(problem), "{output}");
    }
}

#[test]
fn agents_measure_each_other_and_take_turns() {
    let hosts = [Host::claim(), Host::claim()];
    let names = ["a", "b"];
    let agents: Vec<Agent> = (0..2)
        .map(|own| {
            let (host, other) = (&hosts[own], &hosts[1 - own]);
            let more = format!(
                "responder: {{allow: [127.0.0.0/8]}}\n\
                 peers: [{{name: {}, address: {other}}}]\n\
                 probes: [{{name: capacity, kind: bandwidth, interval: 10s, bytes: 1MB, added_delay_max: off}}]",
                names[1 - own]
            );
            Agent::start(host, &host.config(names[own], &more))
        })
        .collect();
    for agent in &agents {
        // Each agent waits for the other, twice.
        let page = agent.page_within(Duration::from_secs(120), "runs in both directions", |page| {
            ["forward", "reverse"].iter().all(|direction| {
                let labels = [&*format!("direction=\"{direction}\""), "reason=\"bytes\""];
                page.count("pathmeter_bandwidth_runs_total", &labels) >= 1
            })
        });
        let received = page.count("pathmeter_bandwidth_received_bytes_total", &[]);
        let runs = page.count("pathmeter_bandwidth_runs_total", &[]);
        assert_eq!(received, runs * 1_000_000);
        let failures = page.count("pathmeter_bandwidth_failures_total", &[]);
        // The other agent may not have started before the first request.
        let requests = page.count("pathmeter_bandwidth_failures_total", &["reason=\"request\""]);
        assert_eq!(failures, requests, "{}", page.text());
    }
    let path = agents[0].path("capacity", "b");
    assert_eq!(path["bandwidth"].as_array().unwrap().len(), 2, "{path}");
}

#[test]
fn runs_that_are_not_possible_are_counted_by_reason() {
    let hosts = [Host::claim(), Host::claim()];
    let _b = responder(&hosts[1], "enabled: false");
    let more = format!(
        "peers: [{{name: b, address: {}}}]\n\
         probes: [{{name: capacity, kind: bandwidth, interval: 10s, bytes: 1MB, direction: forward}}]",
        hosts[1]
    );
    let agent = Agent::start(&hosts[0], &hosts[0].config("a", &more));
    let page = agent.page_when("a skipped run", |page| {
        page.count("pathmeter_bandwidth_skipped_total", &["reason=\"disabled\""]) >= 1
    });
    assert!(!page.has("pathmeter_bandwidth_throughput_bytes_per_second", &[]), "no run, no result");
}

#[test]
fn stop_ends_runs_and_keeps_others_away() {
    let host = Host::claim();
    let agent = responder(&host, "run_bytes_max: 900GB, bytes_per_day: 900GB, path_bytes_per_day: 900GB");
    let (output, stopped) = thread::scope(|scope| {
        let run = scope.spawn(|| probe(&host, &["--bytes", "800GB", "--direction", "reverse", "--json"]));
        let stopped = eventually("a run is stopped", || {
            let response = agent.post("/api/v1/bandwidth/stop");
            let stopped: Value = serde_json::from_str(&response.body).unwrap();
            // Before the run has its lease, a stop would only refuse it.
            (run.is_finished() || stopped["stopped"] == 1).then_some(stopped)
        });
        (run.join().unwrap(), stopped)
    });
    assert_ne!(output.code, None);
    let refused = probe(&host, &["--bytes", "1MB", "--direction", "forward"]);
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(
        refused.stderr.contains("an operator has stopped all runs of this agent"),
        "{refused}\n{stopped}"
    );
}

/// The bytes of the last ledger that was stored.
fn stored_bytes(state_dir: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(state_dir.join("ledger.jsonl")).ok()?;
    let last: Value = serde_json::from_str(text.lines().last()?).ok()?;
    last["host"].as_u64()
}

#[test]
fn bytes_of_a_day_survive_a_killed_agent() {
    let host = Host::claim();
    let folder = tempfile::tempdir().unwrap();
    let more = format!(
        "state_dir: {}\nresponder: {{allow: [127.0.0.0/8]}}\nbandwidth: {{bytes_per_day: 5MB}}",
        folder.path().display()
    );
    let mut agent = Agent::start(&host, &host.config("b", &more));
    let forward = ["--direction", "forward", "--bytes"];
    assert_eq!(probe(&host, &[&forward[..], &["3MB"]].concat()).code, Some(0));
    eventually("the ledger is stored", || stored_bytes(folder.path()).filter(|bytes| *bytes == 3_000_000));
    agent.signal(Signal::SIGKILL);
    agent.wait();
    let _agent = Agent::start(&host, &host.config("b", &more));
    let refused = probe(&host, &[&forward[..], &["3MB"]].concat());
    let reason = "the budget of this host has 2000000 bytes left today";
    assert!(refused.stderr.contains(reason), "{refused}");
    assert_eq!(probe(&host, &[&forward[..], &["2MB"]].concat()).code, Some(0));
}
