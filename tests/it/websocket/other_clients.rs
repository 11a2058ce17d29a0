//! Other WebSocket clients: Python's websockets, Node's ws, and the code of a web page.
//! `scripts/install-test-peers.sh` installs them in `target/peers`. `$PATHMETER_PYTHON_WEBSOCKETS` (a Python
//! that has the package) and `$PATHMETER_NODE_WS` (the folder of the package) select others. Tests of missing
//! clients are skipped, or fail with `PATHMETER_PEERS_REQUIRED=1`.

use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{BYTES, CLIENTS, CLOSED, MESSAGES, agent, count_reason, when_all_closed};
use crate::fixture::{Agent, CommandOutput, Host, pathmeter, skipped};

/// A client program and the script that it runs.
struct ExternalClient {
    program: OsString,
    script: &'static str,
}

fn in_project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn installed(variable: &str, path: &str) -> OsString {
    env::var_os(variable).unwrap_or_else(|| in_project(path).into())
}

fn node_ws() -> OsString {
    installed("PATHMETER_NODE_WS", "target/peers/node/node_modules/ws")
}

impl ExternalClient {
    fn python() -> Option<Self> {
        let program = installed("PATHMETER_PYTHON_WEBSOCKETS", "target/peers/python/bin/python3");
        Self { program, script: "client.py" }.if_installed(&["-c", "import websockets.sync.client"])
    }

    fn node(script: &'static str) -> Option<Self> {
        let client = Self { program: "node".into(), script };
        client.if_installed(&["-e", "require(process.env.PATHMETER_NODE_WS)"])
    }

    fn if_installed(self, trial: &[&str]) -> Option<Self> {
        let mut command = self.program();
        let tried = command.args(trial).stdout(Stdio::null()).stderr(Stdio::null()).status();
        if tried.is_ok_and(|status| status.success()) {
            return Some(self);
        }
        let why =
            format!("the client for {} is not installed: run scripts/install-test-peers.sh", self.script);
        assert!(env::var_os("PATHMETER_PEERS_REQUIRED").is_none_or(|value| value != "1"), "{why}");
        skipped(&why);
        None
    }

    fn program(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env("PATHMETER_NODE_WS", node_ws()).stdin(Stdio::null());
        // Proxies of the environment must not be used.
        for variable in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(variable);
        }
        command
    }

    fn command(&self, host: &Host, arguments: &[&str]) -> Command {
        let mut command = self.program();
        command
            .arg(in_project("tests/peers").join(self.script))
            .arg(format!("ws://{}/ws", host.service_address()));
        command.args(arguments);
        command
    }

    /// Runs the client and returns the JSON that it prints.
    fn output(&self, host: &Host, arguments: &[&str]) -> Value {
        let output = CommandOutput::of(&mut self.command(host, arguments));
        assert_eq!(output.code, Some(0), "{output}");
        serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{output}"))
    }
}

/// A running client. Killed when dropped.
struct RunningClient {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl RunningClient {
    fn of(client: &ExternalClient, host: &Host, arguments: &[&str]) -> Self {
        Self::run(&mut client.command(host, arguments))
    }

    fn run(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next line that it prints. The client has a timeout of its own.
    fn next_line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }
}

impl Drop for RunningClient {
    fn drop(&mut self) {
        // It may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The installed clients.
fn external_clients() -> impl Iterator<Item = ExternalClient> {
    [ExternalClient::python(), ExternalClient::node("client.mjs")].into_iter().flatten()
}

#[test]
fn text_binary_and_fragments_of_all_sizes_are_echoed() {
    for client in external_clients() {
        let host = Host::claim();
        let agent = agent(&host, "");
        let sizes = ["0", "1", "16", "125", "126", "1400", "4096", "65535", "65536"];
        let report = client.output(&host, &[&["echo"], &sizes[..]].concat());
        assert_eq!((&report["wrong"], &report["pong"]), (&json!([]), &json!(true)), "{report}");
        let page = when_all_closed(&agent);
        assert_eq!(report["sent"], page.count(MESSAGES, &[]), "{report}\n{page}");
        assert_eq!(report["sent"], 4 * sizes.len() as u64, "{report}");
        assert_eq!(report["payload"], page.count(BYTES, &[]), "{report}\n{page}");
        assert_eq!(count_reason(&page, CLOSED, "client"), 1, "{page}");
    }
}

#[test]
fn close_codes_follow_rfc_6455() {
    for client in external_clients() {
        let host = Host::claim();
        let agent = agent(&host, "");
        let report = client.output(&host, &["codes", "65536"]);
        let expected = json!({
            "too_large": 1009, "far_too_large": 1009, "fragments_too_large": 1009, "no_text": 1007, "normal": 1000, "own": 4321,
        });
        assert_eq!(report, expected, "{}", client.script);
        let page = when_all_closed(&agent);
        let reasons = ["too_large", "protocol", "client"].map(|reason| count_reason(&page, CLOSED, reason));
        assert_eq!(reasons, [3, 1, 2], "{page}");
    }
}

#[test]
fn shutdown_closes_with_going_away() {
    for client in external_clients() {
        let host = Host::claim();
        let mut agent = agent(&host, "");
        let mut running = RunningClient::of(
            &client,
            &host,
            &["stay", "0"][..if client.script == "client.py" { 1 } else { 2 }],
        );
        assert_eq!(running.next_line(), json!({"ready": true}));
        agent.signal(Signal::SIGTERM);
        assert_eq!(running.next_line(), json!({"code": 1001}), "{}", client.script);
        assert_eq!(agent.wait().code(), Some(0), "{}", agent.log());
    }
}

#[test]
fn client_that_answers_pings_is_not_idle() {
    let Some(client) = ExternalClient::node("client.mjs") else { return };
    let host = Host::claim();
    let agent = agent(&host, "idle_timeout: 6s");
    let mut running = RunningClient::of(&client, &host, &["stay", "2"]);
    assert_eq!(running.next_line(), json!({"ready": true}), "after two half idle timeouts");
    drop(running);
    assert_eq!(count_reason(&when_all_closed(&agent), CLOSED, "idle"), 0);
}

#[test]
fn page_of_an_unlisted_origin_is_refused() {
    let Some(client) = ExternalClient::node("client.mjs") else { return };
    let host = Host::claim();
    let agent = agent(&host, "");
    let page = ["origin", "https://page.example.net"];
    assert_eq!(client.output(&host, &page), json!({"status": 403}));
    agent.rewrite(&host.config("a", "websocket: {origins: ['https://page.example.net']}"));
    assert_eq!(agent.reload().status, 200);
    assert_eq!(client.output(&host, &page), json!({"status": 101}));
}

#[test]
fn browser_page_gets_every_reply_and_both_counts_agree() {
    let Some(client) = ExternalClient::node("page.mjs") else { return };
    let host = Host::claim();
    let agent = agent(&host, "");
    let report = client.output(&host, &["20"]);
    for (name, expected) in
        [("sent", 20), ("received", 20), ("identical", 20), ("lost", 0), ("unsolicited", 0)]
    {
        assert_eq!(report[name], expected, "{name}: {report}");
    }
    let rtt = |name: &str| report["rtt_ms"][name].as_f64().unwrap();
    assert!(0.0 < rtt("min") && rtt("min") <= rtt("median") && rtt("median") <= rtt("max"), "{report}");
    assert!(report["jitter_ms"].as_f64() >= Some(0.0), "{report}");
    let page = when_all_closed(&agent);
    assert_eq!(page.count(MESSAGES, &[]), 20, "{page}");
}

/// Results of a web page and of `pathmeter probe` for the same server at the same time.
struct Measurements {
    page: Value,
    /// Summary of `pathmeter probe`.
    summary: Value,
    /// Round trips of `pathmeter probe` in milliseconds, in message order.
    rtts_ms: Vec<f64>,
}

const COUNT: u64 = 60;

/// Both measure a server, one message every 100 ms, through a delaying proxy. When both are measuring,
/// `disturb` is applied to the server.
fn measure_with_both(page: &ExternalClient, disturb: impl FnOnce(&Agent)) -> Measurements {
    let host = Host::claim();
    let agent = agent(&host, "");
    let count = COUNT.to_string();
    let url = format!("ws://{}/ws", delayed_proxy(host.service_address()));
    let mut command = page.program();
    command.arg(in_project("tests/peers").join(page.script)).args([url.as_str(), &count, "100"]);
    let mut page_client = RunningClient::run(&mut command);
    let mut probe = pathmeter(&["probe", "echo", &url, "--protocol", "websocket", "--format", "text"]);
    let mut probe_client =
        RunningClient::run(probe.args(["--count", &count, "--interval", "100ms", "--json", "--json-each"]));
    agent.page_when("both are measuring", |page| {
        page.count(CLIENTS, &[]) == 2 && page.count(MESSAGES, &[]) >= COUNT / 3
    });
    disturb(&agent);
    let mut rtts_ms = Vec::new();
    let summary = loop {
        let line = probe_client.next_line();
        let Some(rtt) = line.get("rtt_seconds").and_then(Value::as_f64) else { break line };
        rtts_ms.push(rtt * 1e3);
    };
    let measurements = Measurements { page: page_client.next_line(), summary, rtts_ms };
    let page = when_all_closed(&agent);
    let sent_of = |found: &Value| found["sent"].as_u64().unwrap_or_else(|| panic!("no summary: {found}"));
    let sent = sent_of(&measurements.page) + sent_of(&measurements.summary);
    assert_eq!(page.count(MESSAGES, &[]), sent, "{page}");
    measurements
}

/// Delay from the server to the client, and the additional delay of every second chunk.
const DELAY: Duration = Duration::from_millis(150);
const EXTRA_DELAY: Duration = Duration::from_millis(40);

/// Starts a proxy to a server that delays everything sent to the client.
fn delayed_proxy(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client_side in listener.incoming() {
            let (client_side, server_side) = (client_side.unwrap(), TcpStream::connect(to).unwrap());
            let (mut from_client, mut to_server) =
                (client_side.try_clone().unwrap(), server_side.try_clone().unwrap());
            for stream in [&client_side, &server_side] {
                stream.set_nodelay(true).unwrap();
            }
            thread::spawn(move || {
                let _ = io::copy(&mut from_client, &mut to_server);
                let _ = to_server.shutdown(Shutdown::Write);
            });
            thread::spawn(move || relay_delayed(server_side, client_side));
        }
    });
    address
}

fn relay_delayed(mut server_side: TcpStream, mut client_side: TcpStream) {
    let (sender, queue) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        for (due, chunk) in queue {
            // The delay under test.
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if client_side.write_all(&chunk).is_err() {
                return;
            }
        }
        let _ = client_side.shutdown(Shutdown::Write);
    });
    let mut buffer = [0; 4096];
    for number in 0_u32.. {
        let Ok(length @ 1..) = server_side.read(&mut buffer) else { return };
        let due = Instant::now() + DELAY + EXTRA_DELAY * (number % 2);
        if sender.send((due, buffer[..length].to_vec())).is_err() {
            return;
        }
    }
}

impl Measurements {
    /// Asserts that both got every reply.
    fn assert_nothing_missed(&self) {
        let Self { page, summary, rtts_ms } = self;
        assert_eq!(
            (&page["sent"], &page["received"], &page["lost"]),
            (&json!(COUNT), &json!(COUNT), &json!(0))
        );
        assert_eq!(summary["lost"], json!({"forward": 0, "reverse": 0, "unknown": 0}), "{summary}");
        assert_eq!(
            (&summary["received"], rtts_ms.len() as u64),
            (&summary["sent"], summary["sent"].as_u64().unwrap())
        );
        // Slots missed because this machine was busy were not sent.
        assert_eq!(rtts_ms.len() as u64 + summary["unsent"].as_u64().unwrap(), COUNT, "{summary}");
    }

    fn page_rtt(&self, name: &str) -> f64 {
        self.page["rtt_ms"][name].as_f64().unwrap()
    }

    /// A quantile of the round trips of `pathmeter probe`; 1.0 is the maximum.
    fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.rtts_ms.clone();
        sorted.sort_by(f64::total_cmp);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index"
        )]
        let index = (sorted.len() as f64 * share) as usize;
        sorted[index.min(sorted.len() - 1)]
    }

    /// Jitter as in RFC 3550 section 6.4.1, computed as the page does.
    fn jitter(&self) -> f64 {
        let steps = self.rtts_ms.windows(2).map(|pair| (pair[1] - pair[0]).abs());
        steps.fold(0.0, |jitter, step| jitter + (step - jitter) / 16.0)
    }
}

#[test]
fn browser_and_probe_agree_on_rtt_and_jitter() {
    let Some(page) = ExternalClient::node("page.mjs") else { return };
    let measurements = measure_with_both(&page, |_| {});
    measurements.assert_nothing_missed();
    let delay = DELAY.as_secs_f64() * 1e3;
    let extra = EXTRA_DELAY.as_secs_f64() * 1e3;
    let (page_rtt, summary) = (measurements.page_rtt("median"), measurements.quantile(0.5));
    for median in [page_rtt, summary] {
        assert!(
            (delay..delay + 3.0 * extra).contains(&median),
            "{median} ms over a way of {delay} to {} ms",
            delay + extra
        );
    }
    assert!((page_rtt - summary).abs() < 2.0 * extra, "{summary} ms, and the page {page_rtt} ms");
    // All steps are `extra`, so the mean approaches that from below.
    for jitter in [measurements.jitter(), measurements.page["jitter_ms"].as_f64().unwrap()] {
        assert!(
            (extra / 2.0..extra * 3.0).contains(&jitter),
            "{jitter} ms of jitter where each step is {extra} ms"
        );
    }
}

#[test]
fn browser_and_probe_agree_on_a_stalled_server() {
    let Some(page) = ExternalClient::node("page.mjs") else { return };
    let measurements = measure_with_both(&page, |agent| {
        agent.signal(Signal::SIGSTOP);
        // The delay under test.
        thread::sleep(Duration::from_millis(1_500));
        agent.signal(Signal::SIGCONT);
    });
    measurements.assert_nothing_missed();
    let (page_rtt, summary) = (measurements.page_rtt("max"), measurements.quantile(1.0));
    for (whose, longest) in [("the page's", page_rtt), ("our", summary)] {
        assert!(longest > 1_000.0, "{whose} longest round trip was {longest} ms");
    }
    assert!((page_rtt - summary).abs() < 1_000.0, "the longest: {summary} ms, and the page's {page_rtt} ms");
    let ratio = (measurements.jitter() + 1.0) / (measurements.page["jitter_ms"].as_f64().unwrap() + 1.0);
    assert!((0.1..10.0).contains(&ratio), "jitter: {} ms, {}", measurements.jitter(), measurements.page);
}
