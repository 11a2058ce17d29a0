//! `pathmeter probe all`.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::fixture::{Agent, CommandOutput, Host, pathmeter, run};

/// Few bytes, and no stop because a busy machine answers late.
const QUICK: [&str; 6] = ["--count", "5", "--bytes", "1MB", "--added-delay-max", "off"];

fn probe(to: &str, arguments: &[&str]) -> CommandOutput {
    run(&[&["probe", "all", to], &QUICK[..], arguments].concat())
}

fn responder(host: &Host, bandwidth: &str) -> Agent {
    let more = format!("responder: {{allow: [127.0.0.0/8]}}\nbandwidth: {{{bandwidth}}}");
    Agent::start(host, &host.config("b", &more))
}

fn summary(output: &CommandOutput) -> Value {
    assert_eq!(output.stdout.lines().count(), 1, "{output}");
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{output}"))
}

/// The parts that have failed, each with its message.
fn failures(summary: &Value) -> Vec<(&str, &str)> {
    let errors = summary["errors"].as_array().unwrap();
    errors.iter().map(|error| (error["part"].as_str().unwrap(), error["message"].as_str().unwrap())).collect()
}

#[test]
fn text_has_all_parts_in_the_order_of_measurement() {
    let host = Host::claim();
    let _agent = responder(&host, "");
    let output = probe(&host.to_string(), &["--streams", "2"]);
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{output}");
    let mut rest = output.stdout.as_str();
    for text in [
        "latency: rtt min/mean/max/stddev = ",
        "\n  5 sent, 5 received, 0 lost (",
        "\nroute: target reached, 0 routers\n   1 ",
        "\n  back: 0 routers\n   1 ",
        "this host\ndownload: ",
        "2 connections",
        "\n  1.000 MB in ",
        "\nupload: ",
        "2 connections",
        "\n  1.000 MB in ",
    ] {
        rest = rest.split_once(text).unwrap_or_else(|| panic!("{text:?} is missing or early\n{output}")).1;
    }
    assert!(!output.stdout.contains('\x1b'), "{output}");
}

#[test]
fn json_has_the_objects_of_the_single_commands() {
    let host = Host::claim();
    let _agent = responder(&host, "");
    let target = host.to_string();
    let output = probe(&target, &["--size", "200B", "--json"]);
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{output}");
    let all = summary(&output);
    assert_eq!((&all["target"], &all["errors"]), (&json!(target), &json!([])), "{output}");
    let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<String>>();
    assert_eq!(names(&all), ["download", "errors", "latency", "route", "target", "upload"]);
    let single = |arguments: &[&str]| summary(&run(&[&["probe"], arguments, &[&target, "--json"]].concat()));
    let echo = single(&["echo", "--count", "2", "--interval", "20ms"]);
    assert_eq!(names(&all["latency"]), names(&echo));
    assert_eq!((&all["latency"]["sent"], &all["latency"]["received"]), (&json!(5), &json!(5)), "{output}");
    assert_eq!(names(&all["route"]), names(&single(&["trace"])));
    assert_eq!(all["route"]["reached"], true, "{output}");
    for (part, direction) in [("download", "reverse"), ("upload", "forward")] {
        let bandwidth = single(&["bandwidth", "--bytes", "1MB", "--direction", direction]);
        assert_eq!(names(&all[part]), names(&bandwidth));
        let results = all[part]["results"].as_array().unwrap();
        assert_eq!(results.len(), 1, "{output}");
        assert_eq!(names(&results[0]), names(&bandwidth["results"][0]));
        assert_eq!((&results[0]["direction"], &results[0]["bytes"]), (&json!(direction), &json!(1_000_000)));
    }
}

#[test]
fn clients_measure_at_the_same_time() {
    let host = Host::claim();
    let _agent = responder(&host, "runs_max: 3");
    let output = probe(&host.to_string(), &["--concurrent", "3", "--json"]);
    assert_eq!(output.code, Some(0), "{output}");
    let all = summary(&output);
    for part in ["download", "upload"] {
        let results = all[part]["results"].as_array().unwrap();
        let clients: Vec<&Value> = results.iter().map(|result| &result["client"]).collect();
        assert_eq!(clients, [1, 2, 3], "{output}");
    }
}

#[test]
fn part_that_fails_leaves_the_others() {
    let host = Host::claim();
    let _agent = responder(&host, "bytes_per_day: 1500kB");
    let text = probe(&host.to_string(), &[]);
    assert_eq!(text.code, Some(1), "{text}");
    assert_eq!(text.stderr, "error: 1 of 4 parts failed: upload\n");
    let reason = "refuses the run: the run may use 1000000 bytes, but the budget of this host has 500000 bytes \
                  left today";
    let line = text.stdout.lines().find(|line| line.starts_with("upload: failed: ")).unwrap();
    assert!(line.contains(reason), "{text}");
    assert!(text.stdout.contains("\n  1.000 MB in "), "{text}");
    let output = probe(&host.to_string(), &["--json"]);
    assert_eq!(output.code, Some(1), "{output}");
    let all = summary(&output);
    let [(download, message), (upload, _)] = failures(&all)[..] else { panic!("{output}") };
    assert_eq!((download, upload), ("download", "upload"));
    assert!(message.contains(reason), "{output}");
    assert_eq!(all["download"]["results"][0]["error"], message);
    assert_eq!(
        (&all["latency"]["received"], &all["route"]["reached"]),
        (&json!(5), &json!(true)),
        "{output}"
    );
}

#[test]
fn agent_that_refuses_this_host_says_what_to_do() {
    let host = Host::claim();
    let _agent = Agent::start(&host, &host.config("fra-1", ""));
    let output = probe(&host.to_string(), &["--json"]);
    assert_eq!(output.code, Some(1), "{output}");
    let all = summary(&output);
    let remedy = "fra-1 does not answer 127.0.0.1: add it to responder.allow there";
    let expected = ["latency", "route", "download", "upload"].map(|part| (part, remedy));
    assert_eq!(failures(&all), expected, "{output}");
    assert!(expected.iter().all(|(part, _)| all[part].is_null()), "{output}");
}

#[test]
fn host_without_an_agent_is_measured_over_icmp() {
    let host = Host::claim();
    let output = probe(&host.to_string(), &["--json"]);
    assert_eq!(output.code, Some(1), "{output}");
    let all = summary(&output);
    let failures = failures(&all);
    // Where this host may not send ICMP echo requests, the other parts fail too.
    let [.., download, upload] = failures[..] else { panic!("{output}") };
    assert_eq!((download.0, upload.0), ("download", "upload"));
    assert!(download.1.ends_with("\nis an agent running there? bandwidth needs one"), "{output}");
    if failures.len() == 2 {
        assert_eq!(all["latency"]["address"], host.service_address().ip().to_string());
        assert_eq!((&all["latency"]["received"], &all["route"]["method"]), (&json!(5), &json!("icmp")));
    }
    let output = probe(&host.to_string(), &["--protocol", "udp"]);
    assert_eq!(output.code, Some(1), "{output}");
    assert_eq!(output.stderr, "error: 4 of 4 parts failed: latency, route, download, upload\n");
    assert!(output.stdout.contains("for any other host, use --protocol icmp"), "{output}");
}

#[test]
fn port_without_a_reflector_fails_latency_and_route_only() {
    let host = Host::claim();
    let _agent = responder(&host, "");
    let output = probe(&host.to_string(), &["--port", "862", "--json"]);
    assert_eq!(output.code, Some(1), "{output}");
    let all = summary(&output);
    let [(latency, no_reply), (route, rejected)] = failures(&all)[..] else { panic!("{output}") };
    assert_eq!((latency, route), ("latency", "route"));
    let address = host.service_address().ip();
    assert!(no_reply.starts_with(&format!("{address}:862 does not answer: 5 sent, 0 received")), "{output}");
    assert!(rejected.ends_with("nothing listens on its UDP port 862"), "{output}");
    assert_eq!((&all["latency"]["received"], &all["route"]["reached"]), (&json!(0), &json!(false)));
    assert_eq!(all["upload"]["results"][0]["bytes"], 1_000_000, "{output}");
}

#[test]
fn interrupt_prints_the_parts_that_are_complete() {
    let host = Host::claim();
    let _agent = responder(&host, "");
    let mut command = pathmeter(&["probe", "all", &host.to_string(), "--count", "3"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("\nroute: ") {
        assert!(stdout.read_line(&mut text).unwrap() > 0, "{text}");
    }
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    stdout.read_to_string(&mut text).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(0), "{text}");
    assert!(text.starts_with("latency: rtt ") && !text.contains("upload: "), "{text}");
}

#[test]
fn invalid_command_lines_are_refused_before_anything_is_measured() {
    let host = Host::claim();
    for (arguments, code, problem) in [
        (["--bytes", "3"], 2, "--bytes: `3` has no unit"),
        (["--rate", "3MB"], 2, "--rate: `3MB` has an unknown unit"),
        (["--added-delay-max", "never"], 2, "--added-delay-max: `never` is not a duration"),
        (["--dscp", "64"], 2, "--dscp"),
        (["--size", "1B"], 2, "--size"),
        (["--count", "0"], 2, "'--count <COUNT>'"),
        (["--concurrent", "1001"], 2, "'--concurrent <N>'"),
        (["--protocol", "http"], 2, "'--protocol <PROTOCOL>'"),
        (["--config", "/nowhere"], 78, "/nowhere"),
    ] {
        let output = run(&[&["probe", "all", &host.to_string()], &arguments[..]].concat());
        assert_eq!((output.code, output.stdout.as_str()), (Some(code), ""), "{output}");
        assert!(output.stderr.contains(problem), "{output}");
    }
    let output = run(&["probe", "all", &host.to_string(), "--protocol", "icmp", "--port", "7"]);
    assert_eq!(output.code, Some(2), "{output}");
    assert!(output.stderr.contains("--port: only valid with"), "{output}");
}
