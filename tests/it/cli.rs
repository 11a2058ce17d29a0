//! The command line: output for people and for scripts.

use std::fs;
use std::net::Ipv4Addr;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixture::{Agent, CommandOutput, Host, eventually, pathmeter, run};

/// An agent that answers every host on loopback.
fn open_responder(host: &Host) -> Agent {
    Agent::start(host, &host.config("b", "responder: {allow: [127.0.0.0/8]}"))
}

/// Runs `pathmeter probe echo` with a short interval and these further arguments.
fn probe(arguments: &[&str]) -> CommandOutput {
    run(&[&["probe", "echo", "--interval", "20ms"], arguments].concat())
}

fn summary(output: &CommandOutput) -> Value {
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{output}"))
}

/// Asserts that every sent datagram was answered. Slots missed because this machine was busy do not count.
fn assert_all_answered(found: &Value, count: u64) {
    let sent = found["sent"].as_u64().unwrap();
    assert_eq!(sent + found["unsent"].as_u64().unwrap(), count, "{found}");
    assert!(sent > 0 && found["received"] == sent, "{found}");
    assert_eq!(found["lost"], json!({"forward": 0, "reverse": 0, "unknown": 0}), "{found}");
}

/// The keys of an object, those of nested objects after a dot, sorted.
fn keys(value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for (key, value) in value.as_object().unwrap() {
        match value.as_object() {
            Some(_) => found.extend(keys(value).into_iter().map(|inner| format!("{key}.{inner}"))),
            None => found.push(key.clone()),
        }
    }
    found.sort();
    found
}

#[test]
fn probe_ends_with_a_readable_summary() {
    let host = Host::claim();
    let _agent = open_responder(&host);
    let output = probe(&[&host.to_string(), "--count", "5"]);
    assert_eq!(output.code, Some(0), "{output}");
    let address = host.service_address();
    assert!(output.stdout.starts_with(&format!("{host} ({address}): 5 datagrams every 20ms\n")), "{output}");
    for line in [
        &format!("\n--- {host} ({address}) ---\n"),
        " 0 lost (0.0 %: forward 0, reverse 0, unknown 0)\n",
        "\nrtt min/mean/p50/p90/p99/max = ",
        "\nipdv mean/p99 = ",
        "\nhops 0 forward, 0 reverse; timestamps kernel transmit, kernel receive; responder turnaround ",
    ] {
        assert!(output.stdout.contains(line), "{line}\n{output}");
    }
    assert!(!output.stdout.contains('\x1b') && output.stderr.is_empty(), "{output}");
}

#[test]
fn probe_json_ends_with_one_object() {
    let host = Host::claim();
    let _agent = open_responder(&host);
    let output = probe(&[
        &host.to_string(),
        "--count",
        "20",
        "--flows",
        "2",
        "--dscp",
        "ef",
        "--size",
        "200B",
        "--json",
    ]);
    assert_eq!(output.code, Some(0), "{output}");
    assert_eq!(output.stdout.lines().count(), 1, "{output}");
    let found = summary(&output);
    assert_all_answered(&found, 20);
    assert_eq!(found["target"], host.to_string());
    assert_eq!(found["address"], host.service_address().to_string());
    assert_eq!(found["hops"], json!({"forward": 0, "reverse": 0}));
    assert_eq!(found["timestamps"], json!({"transmit": "kernel", "receive": "kernel"}));
    let mut documented: Vec<&str> = "target address sent received late duplicates reordered unsent send_errors host_dropped \
         withdrawn lost.forward lost.reverse lost.unknown rtt_seconds.min rtt_seconds.mean rtt_seconds.stddev rtt_seconds.p50 \
         rtt_seconds.p90 rtt_seconds.p99 rtt_seconds.max ipdv_seconds.mean ipdv_seconds.p99 hops.forward hops.reverse \
         timestamps.transmit timestamps.receive unexpected"
        .split_whitespace()
        .collect();
    documented.sort_unstable();
    assert_eq!(keys(&found), documented);
}

#[test]
fn json_each_prints_one_line_per_datagram_before_the_summary() {
    let host = Host::claim();
    let _agent = open_responder(&host);
    let output = probe(&[&host.to_string(), "--count", "20", "--flows", "2", "--json", "--json-each"]);
    assert_eq!(output.code, Some(0), "{output}");
    let mut lines: Vec<Value> =
        output.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let found = lines.pop().unwrap();
    assert_all_answered(&found, 20);
    assert_eq!(lines.len() as u64, found["sent"].as_u64().unwrap(), "{output}");
    for line in &lines {
        assert_eq!(keys(line), ["direction", "flow", "rtt_seconds", "sequence", "verdict"]);
        assert_eq!((&line["verdict"], &line["direction"]), (&json!("ok"), &Value::Null));
        assert!(line["rtt_seconds"].as_f64() >= found["rtt_seconds"]["min"].as_f64(), "{output}");
    }
    let names = lines.iter().map(|line| (line["flow"].as_u64(), line["sequence"].as_u64()));
    assert_eq!(names.collect::<std::collections::BTreeSet<_>>().len(), lines.len(), "{output}");
}

#[test]
fn line_of_a_lost_datagram_has_its_direction() {
    let host = Host::claim();
    let output = probe(&[&host.to_string(), "--port", "862", "--count", "3", "--json", "--json-each"]);
    assert_eq!(output.code, Some(1), "{output}");
    let first: Value = serde_json::from_str(output.stdout.lines().next().unwrap()).unwrap();
    let lost =
        json!({"flow": 0, "sequence": 0, "verdict": "lost", "direction": "unknown", "rtt_seconds": null});
    assert_eq!(first, lost, "{output}");
}

#[test]
fn probe_without_replies_exits_with_1() {
    let host = Host::claim();
    let output = probe(&[&host.to_string(), "--port", "862", "--count", "3", "--json"]);
    assert_eq!(output.code, Some(1), "{output}");
    let found = summary(&output);
    assert_eq!(found["received"], 0);
    assert_eq!(found["lost"]["unknown"], found["sent"]);
    assert_eq!(found["rtt_seconds"]["min"], Value::Null);
    let output = probe(&[&host.to_string(), "--port", "862", "--count", "3"]);
    assert_eq!(output.code, Some(1), "{output}");
    assert!(
        output.stdout.contains(" 0 received, ") && output.stdout.contains("\nICMP: port_unreachable\n"),
        "{output}"
    );
}

#[test]
fn refusal_names_the_remedy() {
    let (open, keyed, no_agent) = (Host::claim(), Host::claim(), Host::claim());
    let dir = TempDir::new().unwrap();
    let [key, other] = ["the key of this year", "the key of last year"].map(|text| {
        let file = dir.path().join(text);
        fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    });
    let _open = Agent::start(&open, &open.config("fra-1", ""));
    let _keyed = Agent::start(&keyed, &keyed.config("ams-1", &format!("key_file: {key:?}")));
    let with_key = "ams-1 does not answer 127.0.0.1: add it to responder.allow there, or pass --key-file";
    for (arguments, sentence) in [
        (vec![open.to_string()], "fra-1 does not answer 127.0.0.1: add it to responder.allow there"),
        (vec![keyed.to_string()], with_key),
        (
            vec![keyed.to_string(), "--key-file".to_owned(), other.clone()],
            "ams-1 does not know the key of 127.0.0.1: give both the same key file",
        ),
        (
            vec![open.to_string(), "--key-file".to_owned(), other],
            "fra-1 has no key and cannot answer authenticated requests of 127.0.0.1: configure the key file there, or send requests without a key",
        ),
    ] {
        let output = probe(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!((output.code, output.stdout.as_str()), (Some(1), ""), "{output}");
        assert_eq!(output.stderr, format!("error: {sentence}\n"));
    }
    let output = probe(&[&keyed.to_string(), "--key-file", &key, "--count", "5", "--json"]);
    assert_eq!(output.code, Some(0), "{output}");
    assert_all_answered(&summary(&output), 5);

    let output = probe(&[&no_agent.to_string()]);
    assert_eq!(output.code, Some(1), "{output}");
    let sentence = format!(
        "error: connecting to {}: Connection refused (os error 111)\n\
         is an agent running there? for a STAMP reflector, give its port, for example --port 862; for any other host, use pathmeter probe echo --protocol icmp\n",
        no_agent.service_address()
    );
    assert_eq!(output.stderr, sentence);
}

#[test]
fn target_is_a_host_a_reflector_or_a_configured_name() {
    let host = Host::claim();
    let agent = open_responder(&host);
    let more = format!(
        "peers: [{{name: ams-1, address: {host}}}]\ntargets: [{{name: router, address: {host}, port: 9862}}]"
    );
    let file = agent.file("other.yaml");
    fs::write(&file, Host::claim().config("fra-1", &more)).unwrap();
    let file = file.to_str().unwrap();
    let (address, with_port) = (host.to_string(), host.service_address().to_string());
    for target in [
        &[address.as_str()][..],
        &[&with_port],
        &[&address, "--port", "9862"],
        &["ams-1", "--config", file],
        &["router", "--config", file],
    ] {
        let output = probe(&[target, &["--count", "5", "--json"]].concat());
        assert_eq!(output.code, Some(0), "{output}");
        assert_all_answered(&summary(&output), 5);
    }
    let output = probe(&["lon-1", "--config", file]);
    assert_eq!(output.code, Some(1), "{output}");
    assert!(output.stderr.ends_with(" has no peer or target named lon-1\n"), "{output}");
    let output = probe(&["ams-1", "--config", "/nowhere"]);
    assert_eq!(output.code, Some(78), "{output}");
}

#[test]
fn demo_needs_no_configuration_and_ends_with_a_table() {
    // Another demo that starts at the same time would choose the same ports.
    let _turn = eventually("the other demos end", || Host::claim_address(Ipv4Addr::new(127, 0, 0, 11)));
    let output = run(&["demo", "--seconds", "3"]);
    assert_eq!(output.code, Some(0), "{output}");
    let rows: Vec<Vec<&str>> =
        output.stdout.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    let is_head = |row: &&Vec<&str>| row[0] == "from";
    let third = rows.iter().rposition(|row| is_head(&row)).expect("three tables");
    let (rows, [trace_head, traces @ ..]) = rows.split_at(third) else { panic!("{output}") };
    let second = rows.iter().rposition(|row| is_head(&row)).expect("two tables");
    let ([head, rows @ ..], [runs_head, runs @ ..]) = rows.split_at(second) else { panic!("{output}") };
    let runs_columns = ["from", "to", "probe", "forward", "Mbit/s", "reverse", "Mbit/s", "runs"];
    assert_eq!(runs_head[..], runs_columns, "{output}");
    let methods: Vec<&str> = runs.iter().map(|row| row[2]).collect();
    assert_eq!(methods, ["bw-check", "bw-tcp", "bw-train"].repeat(3), "{output}");
    assert_eq!(head[..6], ["from", "to", "probe", "sent", "lost", "fwd"], "{output}");
    assert_eq!(trace_head[..], ["from", "to", "probe", "routers", "route"], "{output}");
    assert_eq!(traces.len(), 6, "{output}");
    assert!(traces.iter().all(|row| row[2..] == ["route", "0", "direct"]), "{output}");
    let pairs = |probe: &str| -> Vec<(&str, &str)> {
        let mut pairs: Vec<_> =
            rows.iter().filter(|row| row[2] == probe).map(|row| (row[0], row[1])).collect();
        pairs.sort_unstable();
        pairs
    };
    let agents = ["ams-1", "fra-1", "lon-1"];
    let expected: Vec<_> =
        agents.iter().flat_map(|a| agents.iter().filter(move |b| a != *b).map(move |b| (*a, *b))).collect();
    assert_eq!(pairs("udp"), expected, "{output}");
    for probe in ["tcp", "websocket", "http", "icmp"] {
        assert_eq!(pairs(probe), [("ams-1", "fra-1"), ("fra-1", "lon-1"), ("lon-1", "ams-1")], "{output}");
    }
    // If this user may not send ICMP, the row says so.
    for row in rows.iter().filter(|row| row[2] != "icmp" || row[3].parse::<u64>().is_ok()) {
        assert!(row[3].parse::<u64>().unwrap() > 0, "{output}");
        assert_eq!(row[4..7], ["0"; 3], "{output}");
    }
}

#[test]
fn healthcheck_exits_with_0_if_ready_and_1_if_not_running() {
    let host = Host::claim();
    let address = host.service_address().to_string();
    let output = run(&["healthcheck", "--address", &address]);
    assert_eq!(output.code, Some(1), "{output}");
    assert_eq!(output.stderr, format!("error: connecting to {address}: Connection refused (os error 111)\n"));
    let _agent = open_responder(&host);
    let output = run(&["healthcheck", "--address", &address]);
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (Some(0), "", ""));
}

#[test]
fn completions_exist_for_every_shell() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = run(&["completions", shell]);
        assert_eq!(output.code, Some(0), "{output}");
        assert!(output.stdout.contains("healthcheck") && output.stderr.is_empty(), "{output}");
    }
}

#[test]
fn name_argument_and_environment_override_the_file() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("config.yaml");
    fs::write(
        &file,
        "agent: {name: c}\npeers: [{name: a, address: 192.0.2.1}, {name: b, address: 192.0.2.2}]",
    )
    .unwrap();
    let path = file.to_str().unwrap();
    for (arguments, environment, found) in [
        (&[][..], None, "agent c, 2 peers"),
        (&["--name", "a"], None, "agent a, 1 peer,"),
        (&[], Some("b"), "agent b, 1 peer,"),
        (&["--name", "a"], Some("b"), "agent a, 1 peer,"),
    ] {
        let mut command = pathmeter(&[&["check", path], arguments].concat());
        command.envs(environment.map(|name| ("PATHMETER_NAME", name)));
        let output = CommandOutput::of(&mut command);
        assert_eq!(output.code, Some(0), "{output}");
        assert!(output.stdout.contains(&format!("{path}: ok: {found}")), "{output}");
    }
}

#[test]
fn help_matches_the_snapshot() {
    let commands: [&[&str]; 10] = [
        &[],
        &["run"],
        &["check"],
        &["probe"],
        &["probe", "all"],
        &["probe", "echo"],
        &["probe", "bandwidth"],
        &["demo"],
        &["healthcheck"],
        &["completions"],
    ];
    let mut all = String::new();
    for command in commands {
        let output = run(&[command, &["--help"]].concat());
        assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{output}");
        all += &format!("$ pathmeter {}\n{}\n", [command, &["--help"]].concat().join(" "), output.stdout);
    }
    insta::assert_snapshot!(all);
}

/// The subcommands that a command's help lists.
fn subcommands(command: &[String]) -> Vec<String> {
    let output = CommandOutput::of(pathmeter(&[]).args(command).arg("--help"));
    let lines = output.stdout.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = lines.take_while(|line| !line.is_empty()).filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

#[test]
fn every_command_has_a_manual_page_listed_by_its_parent() {
    let folder = TempDir::new().unwrap();
    let output = run(&["man", folder.path().to_str().unwrap()]);
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (Some(0), "", ""), "{output}");
    let page = |name: &str| fs::read_to_string(folder.path().join(format!("{name}.1"))).unwrap();

    let mut expected = vec!["pathmeter.1".to_owned()];
    let mut commands = vec![Vec::new()];
    while let Some(command) = commands.pop() {
        let name = [&["pathmeter".to_owned()], &command[..]].concat().join("-");
        let text = page(&name);
        for subcommand in subcommands(&command) {
            let below = format!("{name}-{subcommand}");
            // roff escapes hyphens with a backslash.
            assert!(text.contains(&format!("\n{}(1)\n", below.replace('-', "\\-"))), "{below}\n{text}");
            expected.push(format!("{below}.1"));
            commands.push([&command[..], &[subcommand]].concat());
        }
    }
    let files = fs::read_dir(folder.path()).unwrap();
    let mut found: Vec<String> =
        files.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    let text = page("pathmeter-run");
    assert!(text.contains("PATHMETER_NAME") && text.contains("/etc/pathmeter/config.yaml"), "{text}");
}
