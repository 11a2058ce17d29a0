//! Bandwidth runs over links of known capacity, and the death of one end.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pathmeter_lab::{Namespace, Net, NetPlan, Program, eventually};
use pathmeter_proto::sim::{Link, Queue};
use serde_json::{Value, json};

use crate::agent::{NodeAgent, PROGRAM};
use crate::testbed::{Inconclusive, seed};

/// Payload of a packet of 1,500 bytes: the headers of IPv4 and of TCP with timestamps take the rest.
const PAYLOAD_SHARE: f64 = 1_448.0 / 1_500.0;

/// Two hosts, joined by one wire, whose packets have at most 1,500 bytes.
fn net() -> Net {
    let net = NetPlan::pair().build(seed());
    for node in ["a", "b"] {
        net.node(node).ip("link set e0 mtu 1500");
    }
    net
}

fn config(net: &Net, name: &str, bandwidth: &Value) -> Value {
    json!({
        "agent": {"name": name, "grace": "1s"},
        "peers": [{"name": "a", "address": net.v4("a")}, {"name": "b", "address": net.v4("b")}],
        "bandwidth": bandwidth,
    })
}

/// A link with 5 ms of delay and a queue of `queue_ms` at `rate` bits per second.
fn link(rate: u64, queue_ms: u64) -> Link {
    let mut link = Link::perfect(5_000_000);
    let room = (rate / 8 * queue_ms / 1_000).max(8 * 1_500);
    link.queue = Some(Queue { rate, burst: 0, room });
    link
}

/// `probe bandwidth` to an address.
fn command(node: &Namespace, target: &str, arguments: &[&str]) -> Command {
    let mut command = node.command(PROGRAM);
    command.args(["probe", "bandwidth", target, "--json"]).args(arguments);
    command
}

/// Runs `probe bandwidth`, and returns its results.
fn measure(node: &Namespace, target: &str, arguments: &[&str]) -> Vec<Value> {
    let output = command(node, target, arguments).output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}\n{errors}"));
    found["results"].as_array().unwrap().clone()
}

/// The throughput as a part of what the link carries.
fn part_of(rate: u64, result: &Value) -> f64 {
    result["throughput_bytes_per_second"].as_f64().unwrap() * 8.0 / (rate as f64 * PAYLOAD_SHARE)
}

/// Measures links of these rates in both directions. Every result is within `tolerance` of the true capacity.
fn measure_links(
    rates: &[u64],
    queues_ms: &[u64],
    arguments: &[&str],
    tolerance: f64,
) -> Result<(), Inconclusive> {
    let net = net();
    let _responder = NodeAgent::start(net.node("b"), config(&net, "b", &json!({})), &[]);
    let target = net.v4("b").to_string();
    for rate in rates {
        for queue_ms in queues_ms {
            let one_way = link(*rate, *queue_ms);
            net.wire("a", "b").set_links(&one_way, &one_way);
            for result in measure(net.node("a"), &target, arguments) {
                let part = part_of(*rate, &result);
                assert_eq!(result["is_capacity"], true, "{result}");
                assert!(part < 1.3 && part > 0.7, "{part} of {rate}: {result}");
                // A link in a process that does not run in time is slower than its rate.
                if (part - 1.0).abs() > tolerance {
                    return Err(Inconclusive(format!("{part} of {rate} bit/s: {result}")));
                }
                let delay =
                    |direction: &str| result[format!("added_delay_{direction}_seconds")].as_f64().unwrap();
                let (forward, reverse) = (delay("forward"), delay("reverse"));
                // The other direction carries acknowledgments only, which a wire that runs in time does not
                // delay.
                if forward.min(reverse) > 0.005 {
                    return Err(Inconclusive(format!("the wire was late: {result}")));
                }
                let is_forward = result["direction"] == "forward";
                assert_eq!(forward > reverse, is_forward, "the queue is in the loaded direction: {result}");
            }
        }
    }
    Ok(())
}

/// Echoes and messages of the run itself use 0.1 Mbit/s.
pub(crate) fn capacity() -> Result<(), Inconclusive> {
    measure_links(&[20_000_000, 100_000_000], &[50], &["--seconds", "2", "--added-delay-max", "off"], 0.02)
}

/// Many rates and queues, without and with a stop when the run adds delay.
pub(crate) fn capacities() -> Result<(), Inconclusive> {
    let rates = [10_000_000, 100_000_000, 500_000_000];
    measure_links(&rates, &[20, 100], &["--seconds", "3", "--added-delay-max", "off"], 0.02)?;
    measure_links(&rates, &[50, 1_000], &["--seconds", "3"], 0.1)
}

/// A run that fills a long queue is stopped soon.
pub(crate) fn harm() {
    let net = net();
    let _responder = NodeAgent::start(net.node("b"), config(&net, "b", &json!({})), &[]);
    let target = net.v4("b").to_string();
    let bloated = link(20_000_000, 2_000);
    net.wire("a", "b").set_links(&bloated, &bloated);
    for result in measure(net.node("a"), &target, &["--seconds", "20"]) {
        assert_eq!(result["stop_reason"], "delay", "{result}");
        let duration = result["duration_seconds"].as_f64().unwrap();
        assert!(duration < 3.0, "stopped long before its time: {result}");
    }
}

/// kill -9 of either end in the middle of a run: the other one ends, and the next run works.
pub(crate) fn killed() {
    let net = net();
    let (a, b) = (net.node("a"), net.node("b"));
    let one_way = link(20_000_000, 50);
    net.wire("a", "b").set_links(&one_way, &one_way);
    let target = net.v4("b").to_string();
    let mut responder = NodeAgent::start(b, config(&net, "b", &json!({})), &[]);
    let long = ["--seconds", "20", "--added-delay-max", "off", "--direction"];
    let short = ["--bytes", "200kB", "--added-delay-max", "off"];
    for direction in ["forward", "reverse"] {
        let arguments = [&long[..], &[direction]].concat();
        // The prober dies.
        let mut command = command(a, &target, &arguments);
        let output = responder.file("killed");
        let mut prober = Program::start(command.stdout(Stdio::null()), &output);
        wait_for_load(&net);
        prober.signal(Signal::SIGKILL);
        prober.wait();
        assert_measured(&measure(a, &target, &short));
        // The responder dies.
        let began = Instant::now();
        let results = std::thread::scope(|scope| {
            let run = scope.spawn(|| measure(a, &target, &arguments));
            wait_for_load(&net);
            responder.signal(Signal::SIGKILL);
            run.join().unwrap()
        });
        assert_eq!(results[0]["stop_reason"], "peer", "{results:?}");
        assert!(began.elapsed() < Duration::from_secs(15), "the prober noticed it");
        drop(responder);
        responder = NodeAgent::start(b, config(&net, "b", &json!({})), &[]);
        assert_measured(&measure(a, &target, &short));
    }
}

fn assert_measured(results: &[Value]) {
    assert_eq!(results.len(), 2);
    for result in results {
        assert_eq!((&result["bytes"], &result["stop_reason"]), (&200_000.into(), &"bytes".into()));
    }
}

/// Waits until a run loads the wire: much more than echoes and messages.
fn wait_for_load(net: &Net) {
    let mut before = interface_bytes(net.node("a"));
    eventually("a run loads the wire", || {
        std::thread::sleep(Duration::from_millis(200));
        let now = interface_bytes(net.node("a"));
        (now - std::mem::replace(&mut before, now) > 200_000).then_some(())
    });
}

/// Bytes that the interface of a node has received and sent.
fn interface_bytes(node: &Namespace) -> u64 {
    let output = node.command("cat").arg("/proc/net/dev").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let counts = text.lines().find_map(|line| line.trim().strip_prefix("e0:")).unwrap();
    let counts: Vec<u64> = counts.split_whitespace().map(|count| count.parse().unwrap()).collect();
    counts[0] + counts[8]
}

/// Payload of a datagram of the load: its headers take the rest.
const LOAD_SHARE: f64 = 1_200.0 / 1_228.0;

/// A value of a result in bytes per second, as a part of what a link carries.
fn load_part(rate: u64, result: &Value, name: &str) -> Option<f64> {
    Some(result[name].as_f64()? * 8.0 / (rate as f64 * LOAD_SHARE))
}

/// Trains over links and a token bucket.
pub(crate) fn trains() -> Result<(), Inconclusive> {
    let net = net();
    let _responder = NodeAgent::start(net.node("b"), config(&net, "b", &json!({})), &[]);
    let target = net.v4("b").to_string();
    let arguments = ["--method", "train", "--added-delay-max", "off"];
    for rate in [5_000_000, 20_000_000, 100_000_000] {
        let one_way = link(rate, 1_000);
        net.wire("a", "b").set_links(&one_way, &one_way);
        for result in measure(net.node("a"), &target, &arguments) {
            assert_eq!(
                (&result["bytes"], &result["is_capacity"]),
                (&300_000.into(), &false.into()),
                "{result}"
            );
            assert!(result["sustained_bytes_per_second"].is_null(), "{result}");
            let part = |name: &str| load_part(rate, &result, name);
            // A wire that does not run in time delivers datagrams in bunches.
            let found = part("throughput_bytes_per_second");
            if found.is_none_or(|part| (part - 1.0).abs() > 0.05) {
                return Err(Inconclusive(format!("{found:?} of {rate} bit/s: {result}")));
            }
        }
    }
    let rate = 10_000_000;
    let mut bucket = Link::perfect(5_000_000);
    bucket.queue = Some(Queue { rate, burst: 60_000, room: 1 << 20 });
    net.wire("a", "b").set_links(&bucket, &bucket);
    for result in measure(net.node("a"), &target, &arguments) {
        let found = load_part(rate, &result, "sustained_bytes_per_second");
        if found.is_none_or(|part| (part - 1.0).abs() > 0.05) {
            return Err(Inconclusive(format!("{found:?} of {rate} bit/s behind a burst: {result}")));
        }
    }
    Ok(())
}

/// Checks below and above the rate of a link.
pub(crate) fn checks() -> Result<(), Inconclusive> {
    let net = net();
    let _responder = NodeAgent::start(net.node("b"), config(&net, "b", &json!({})), &[]);
    let target = net.v4("b").to_string();
    for rate in [20_000_000, 100_000_000] {
        let one_way = link(rate, 100);
        net.wire("a", "b").set_links(&one_way, &one_way);
        let asked = |percent: u64| format!("{}kbit/s", rate / 1_000 * percent / 100);
        let check = |rate: &str| {
            let arguments = ["--method", "check", "--rate", rate, "--added-delay-max", "off"];
            measure(net.node("a"), &target, &arguments)
        };
        for result in check(&asked(85)) {
            assert_eq!(result["is_capacity"], false, "{result}");
            // A sender or a wire that does not run in time.
            if result["check"] != "passed" {
                return Err(Inconclusive(format!("85 % of {rate} bit/s: {result}")));
            }
        }
        for result in check(&asked(120)) {
            let verdict = result["check"].as_str().unwrap();
            assert!(["delay", "loss"].contains(&verdict), "{result}");
            assert_eq!(
                (&result["is_capacity"], &result["limited_by"]),
                (&true.into(), &"path".into()),
                "{result}"
            );
            // Echoes and messages of the run itself use 0.1 Mbit/s.
            let part = load_part(rate - 100_000, &result, "throughput_bytes_per_second").unwrap();
            if (part - 1.0).abs() > 0.05 {
                return Err(Inconclusive(format!("{part} of {rate} bit/s: {result}")));
            }
        }
    }
    Ok(())
}
