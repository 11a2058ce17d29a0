//! Scrapers: every format, many at once, none, and one that does not read.

use std::env;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use flate2::read::GzDecoder;
use serde_json::Value;

use crate::fixture::{Agent, CommandOutput, Host, MetricsPage, skipped};

const SENT: &str = "pathmeter_echo_sent_total";
const FAST: [&str; 1] = [r#"probe="fast""#];
const OPENMETRICS_TYPE: &str = "application/openmetrics-text;version=1.0.0";

/// Targets with closed ports: enough for a page that no socket buffer takes at once.
const TARGET_COUNT: usize = 1_000;

/// An agent with a fast path and this many further targets.
fn measuring(targets: usize) -> (Agent, Agent, Host) {
    let (a, b) = (Host::claim(), Host::claim());
    let other = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let listed: Vec<String> =
        (0..targets).map(|number| format!("{{name: t-{number}, address: {b}, port: 1}}")).collect();
    let more = format!(
        "peers: [{{name: b, address: {b}}}]\ntargets: [{}]\nprobes:\n\
         - {{name: fast, interval: 20ms, peers: all, late_after: 60s, lost_after: 60s}}\n\
         - {{name: many, interval: 10s, targets: all}}\n",
        listed.join(", ")
    );
    (Agent::start(&a, &a.config("a", &more)), other, a)
}

/// Sends a request with these headers.
fn send_request(to: SocketAddr, headers: &str) -> TcpStream {
    let mut stream = TcpStream::connect(to).unwrap();
    // With HTTP/1.0 the body ends with the connection, and is not chunked.
    write!(stream, "GET /metrics HTTP/1.0\r\nhost: {to}\r\n{headers}\r\n").unwrap();
    stream
}

/// Head and body of the response.
fn response(to: SocketAddr, headers: &str) -> (String, Vec<u8>) {
    let mut bytes = Vec::new();
    send_request(to, headers).read_to_end(&mut bytes).unwrap();
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
    let body = bytes.split_off(end + 4);
    (String::from_utf8(bytes).unwrap().to_lowercase(), body)
}

fn gunzip(body: &[u8]) -> String {
    let mut text = String::new();
    GzDecoder::new(body).read_to_string(&mut text).expect("a whole page");
    text
}

/// The series of a page, without values.
fn series(page: &str) -> Vec<&str> {
    let lines =
        page.lines().filter(|line| !line.starts_with('#') && !line.starts_with("pathmeter_echo_hops"));
    lines.map(|line| line.rsplit_once(' ').expect("a value").0).collect()
}

#[test]
fn every_format_and_encoding_has_the_same_series() {
    let (agent, _other, host) = measuring(0);
    agent.page_when("measurements", |page| page.count(SENT, &FAST) > 20 && page.has("pathmeter_peers", &[]));
    let (head, classic) = response(host.service_address(), "");
    assert!(head.contains("\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{head}");
    assert!(
        head.contains("\r\nvary: accept, accept-encoding\r\n") && !head.contains("content-encoding"),
        "{head}"
    );
    let classic = String::from_utf8(classic).unwrap();
    let (head, packed) = response(host.service_address(), "accept-encoding: gzip\r\n");
    assert!(head.contains("\r\ncontent-encoding: gzip\r\n"), "{head}");
    assert_eq!(series(&gunzip(&packed)), series(&classic));
    let (head, open) = response(host.service_address(), &format!("accept: {OPENMETRICS_TYPE}\r\n"));
    let kind = "\r\ncontent-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
    assert!(head.contains(kind), "{head}");
    let open = String::from_utf8(open).unwrap();
    assert!(open.ends_with("\n# EOF\n") && open.matches("# EOF").count() == 1);
    assert_eq!(series(&open), series(&classic));
    assert!(
        open.contains("# TYPE pathmeter_echo_sent counter\n")
            && open.contains("\npathmeter_echo_sent_total{")
    );
    assert!(open.contains("# TYPE process_cpu_seconds counter\nprocess_cpu_seconds_total "), "{open}");
    assert!(classic.contains("# TYPE pathmeter_echo_sent_total counter\n"));
}

/// A Python with the reference parser.
fn python() -> Option<Command> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/python/bin/python3");
    let program = env::var_os("PATHMETER_PYTHON_WEBSOCKETS").unwrap_or_else(|| installed.into());
    let mut trial = Command::new(&program);
    trial.args(["-c", "import prometheus_client.openmetrics.parser"]);
    if trial.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        return Some(Command::new(program));
    }
    let why = "Python's prometheus_client is not installed: scripts/install-test-peers.sh";
    assert!(env::var_os("PATHMETER_PEERS_REQUIRED").is_none_or(|value| value != "1"), "{why}");
    skipped(why);
    None
}

#[test]
fn reference_parser_reads_openmetrics() {
    let Some(mut python) = python() else { return };
    let (agent, _other, host) = measuring(0);
    let page = agent.page_when("measurements", |page| {
        page.count(SENT, &FAST) > 20
            && page.has("pathmeter_peers", &[])
            && page.has("pathmeter_echo_hops", &[])
    });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers/openmetrics.py");
    let output =
        CommandOutput::of(python.arg(script).arg(format!("http://{}/metrics", host.service_address())));
    assert_eq!(output.code, Some(0), "{output}");
    let found: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(found["encoding"], "gzip");
    let families = found["families"].as_object().unwrap();
    assert_eq!(families.len(), page.families().len(), "{found}");
    assert_eq!(families["pathmeter_echo_verdicts"], "counter");
    assert_eq!(families["pathmeter_echo_rtt_seconds"], "histogram");
    let lines = page.text().lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(found["samples"], lines, "{page}");
}

#[test]
fn scrapers_do_not_delay_sending() {
    let (agent, _other, host) = measuring(TARGET_COUNT);
    let sent = |page: &MetricsPage| page.count(SENT, &FAST);
    let assert_sending_continues = |agent: &Agent, what: &str| {
        let before = sent(&agent.page());
        agent.page_when(what, |page| sent(page) >= before + 50)
    };
    agent.page_when("all paths", |page| {
        page.count("pathmeter_probe_targets", &[r#"probe="many""#]) == TARGET_COUNT as u64
    });
    assert_sending_continues(&agent, "without other scrapers");

    // These send a request and read nothing.
    let not_reading: Vec<TcpStream> = ["", "accept-encoding: gzip\r\n"]
        .into_iter()
        .flat_map(|headers| [(); 3].map(|()| send_request(host.service_address(), headers)))
        .collect();
    assert_sending_continues(&agent, "with scrapers that do not read");

    let address = host.service_address();
    let scrapers: Vec<_> = (0..20)
        .map(|number| {
            thread::spawn(move || {
                let (accept, encoding) = (number % 2 == 0, number % 4 < 2);
                let headers = [
                    if accept { format!("accept: {OPENMETRICS_TYPE}\r\n") } else { String::new() },
                    if encoding { "accept-encoding: gzip\r\n".to_owned() } else { String::new() },
                ];
                let (_, body) = response(address, &headers.concat());
                let text = if encoding { gunzip(&body) } else { String::from_utf8(body).unwrap() };
                assert_eq!(text.ends_with("# EOF\n"), accept);
                series(&text).len()
            })
        })
        .collect();
    let page = assert_sending_continues(&agent, "with many scrapers");
    for scraper in scrapers {
        assert!(scraper.join().unwrap() > 65 * TARGET_COUNT);
    }
    drop(not_reading);
    assert_eq!(page.count("pathmeter_echo_lost_total", &FAST), 0, "{page}");
    assert_eq!(page.count("pathmeter_echo_late_total", &FAST), 0, "{page}");
    assert_eq!(agent.page().count("pathmeter_accounting_errors_total", &[]), 0);
}
