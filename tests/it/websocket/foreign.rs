//! Clients that others wrote: Python's websockets, Node's ws, and what a page in a browser does.
//!
//! `scripts/install-test-peers.sh` installs them below `target/peers`; `$PATHMETER_PYTHON_WEBSOCKETS` (a Python that has the
//! package) and `$PATHMETER_NODE_WS` (the package's folder) name others. What is missing is skipped, and with
//! `PATHMETER_PEERS_REQUIRED=1` a failure.

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

use super::{BYTES, CLIENTS, CLOSED, MESSAGES, agent, because, when_all_left};
use crate::fixture::{Agent, Ended, Host, pathmeter, skipped};

/// A foreign client with the script that makes it talk.
struct Peer {
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

impl Peer {
    fn python() -> Option<Self> {
        let program = installed("PATHMETER_PYTHON_WEBSOCKETS", "target/peers/python/bin/python3");
        Self { program, script: "client.py" }.if_it_works(&["-c", "import websockets.sync.client"])
    }

    fn node(script: &'static str) -> Option<Self> {
        let peer = Self { program: "node".into(), script };
        peer.if_it_works(&["-e", "require(process.env.PATHMETER_NODE_WS)"])
    }

    fn if_it_works(self, trial: &[&str]) -> Option<Self> {
        let mut command = self.program();
        let tried = command.args(trial).stdout(Stdio::null()).stderr(Stdio::null()).status();
        if tried.is_ok_and(|status| status.success()) {
            return Some(self);
        }
        let why = format!("what {} needs is not installed: scripts/install-test-peers.sh", self.script);
        assert!(env::var_os("PATHMETER_PEERS_REQUIRED").is_none_or(|value| value != "1"), "{why}");
        skipped(&why);
        None
    }

    fn program(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env("PATHMETER_NODE_WS", node_ws()).stdin(Stdio::null());
        // A proxy of whoever runs this is not meant.
        for variable in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(variable);
        }
        command
    }

    fn command(&self, host: &Host, arguments: &[&str]) -> Command {
        let mut command = self.program();
        command.arg(in_project("tests/peers").join(self.script)).arg(format!("ws://{}/ws", host.front()));
        command.args(arguments);
        command
    }

    /// What it prints, when it ends well.
    fn says(&self, host: &Host, arguments: &[&str]) -> Value {
        let ended = Ended::of(&mut self.command(host, arguments));
        assert_eq!(ended.code, Some(0), "{ended}");
        serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}\n{ended}"))
    }
}

/// A client that is still there.
struct Guest {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Guest {
    fn of(peer: &Peer, host: &Host, arguments: &[&str]) -> Self {
        Self::run(&mut peer.command(host, arguments))
    }

    fn run(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next line that it prints; it gives up by itself.
    fn says(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both foreign clients that are there.
fn peers() -> impl Iterator<Item = Peer> {
    [Peer::python(), Peer::node("client.mjs")].into_iter().flatten()
}

#[test]
fn others_get_back_text_binary_and_fragments_of_all_sizes() {
    for peer in peers() {
        let host = Host::claim();
        let agent = agent(&host, "");
        let sizes = ["0", "1", "16", "125", "126", "1400", "4096", "65535", "65536"];
        let told = peer.says(&host, &[&["echo"], &sizes[..]].concat());
        assert_eq!((&told["wrong"], &told["pong"]), (&json!([]), &json!(true)), "{told}");
        let page = when_all_left(&agent);
        assert_eq!(told["sent"], page.count(MESSAGES, &[]), "{told}\n{page}");
        assert_eq!(told["sent"], 4 * sizes.len() as u64, "{told}");
        assert_eq!(told["payload"], page.count(BYTES, &[]), "{told}\n{page}");
        assert_eq!(because(&page, CLOSED, "client"), 1, "{page}");
    }
}

#[test]
fn others_are_closed_with_the_codes_of_the_standard() {
    for peer in peers() {
        let host = Host::claim();
        let agent = agent(&host, "");
        let told = peer.says(&host, &["codes", "65536"]);
        let expected = json!({
            "too_large": 1009, "far_too_large": 1009, "fragments_too_large": 1009, "no_text": 1007, "normal": 1000, "own": 4321,
        });
        assert_eq!(told, expected, "{}", peer.script);
        let page = when_all_left(&agent);
        let reasons = ["too_large", "protocol", "client"].map(|reason| because(&page, CLOSED, reason));
        assert_eq!(reasons, [3, 1, 2], "{page}");
    }
}

#[test]
fn others_see_that_we_go_away() {
    for peer in peers() {
        let host = Host::claim();
        let mut agent = agent(&host, "");
        let mut guest =
            Guest::of(&peer, &host, &["stay", "0"][..if peer.script == "client.py" { 1 } else { 2 }]);
        assert_eq!(guest.says(), json!({"ready": true}));
        agent.signal(Signal::SIGTERM);
        assert_eq!(guest.says(), json!({"code": 1001}), "{}", peer.script);
        assert_eq!(agent.ended().code(), Some(0), "{}", agent.log());
    }
}

#[test]
fn one_that_answers_our_pings_stays_though_it_says_nothing() {
    let Some(peer) = Peer::node("client.mjs") else { return };
    let host = Host::claim();
    let agent = agent(&host, "idle_timeout: 6s");
    let mut guest = Guest::of(&peer, &host, &["stay", "2"]);
    assert_eq!(guest.says(), json!({"ready": true}), "after two half idle timeouts");
    drop(guest);
    assert_eq!(because(&when_all_left(&agent), CLOSED, "idle"), 0);
}

#[test]
fn a_page_of_another_origin_is_refused_until_it_is_listed() {
    let Some(peer) = Peer::node("client.mjs") else { return };
    let host = Host::claim();
    let agent = agent(&host, "");
    let page = ["origin", "https://page.example.net"];
    assert_eq!(peer.says(&host, &page), json!({"status": 403}));
    agent.rewrite(&host.config("a", "websocket: {origins: ['https://page.example.net']}"));
    assert_eq!(agent.reload().status, 200);
    assert_eq!(peer.says(&host, &page), json!({"status": 101}));
}

#[test]
fn a_page_that_measures_gets_every_answer_and_both_count_the_same() {
    let Some(peer) = Peer::node("page.mjs") else { return };
    let host = Host::claim();
    let agent = agent(&host, "");
    let told = peer.says(&host, &["20"]);
    for (name, expected) in [("sent", 20), ("received", 20), ("identical", 20), ("lost", 0), ("unasked", 0)] {
        assert_eq!(told[name], expected, "{name}: {told}");
    }
    let rtt = |name: &str| told["rtt_ms"][name].as_f64().unwrap();
    assert!(0.0 < rtt("min") && rtt("min") <= rtt("median") && rtt("median") <= rtt("max"), "{told}");
    assert!(told["jitter_ms"].as_f64() >= Some(0.0), "{told}");
    let page = when_all_left(&agent);
    assert_eq!(page.count(MESSAGES, &[]), 20, "{page}");
}

/// What a page and what we found at the same server at the same time.
struct Views {
    page: Value,
    /// The summary.
    ours: Value,
    /// Our round trips in milliseconds, in the order of the messages.
    trips: Vec<f64>,
}

const COUNT: u64 = 60;

/// Both measure a server with one message every 100 ms, over a way that takes time; when both are under way, `drill` is done to
/// the server.
fn both_measure(page: &Peer, drill: impl FnOnce(&Agent)) -> Views {
    let host = Host::claim();
    let agent = agent(&host, "");
    let count = COUNT.to_string();
    let url = format!("ws://{}/ws", long_way(host.front()));
    let mut command = page.program();
    command.arg(in_project("tests/peers").join(page.script)).args([url.as_str(), &count, "100"]);
    let mut theirs = Guest::run(&mut command);
    let mut probe = pathmeter(&["probe", "echo", &url, "--protocol", "websocket", "--format", "text"]);
    let mut ours =
        Guest::run(probe.args(["--count", &count, "--interval", "100ms", "--json", "--json-each"]));
    agent.page_when("both are under way", |page| {
        page.count(CLIENTS, &[]) == 2 && page.count(MESSAGES, &[]) >= COUNT / 3
    });
    drill(&agent);
    let mut trips = Vec::new();
    let summary = loop {
        let line = ours.says();
        let Some(rtt) = line.get("rtt_seconds").and_then(Value::as_f64) else { break line };
        trips.push(rtt * 1e3);
    };
    let views = Views { page: theirs.says(), ours: summary, trips };
    let page = when_all_left(&agent);
    let asked = views.page["sent"].as_u64().unwrap() + views.ours["sent"].as_u64().unwrap();
    assert_eq!(page.count(MESSAGES, &[]), asked, "{page}");
    views
}

/// What the way back takes: of every second piece so much more.
const WAY: Duration = Duration::from_millis(150);
const MORE: Duration = Duration::from_millis(40);

/// A way to a server on which everything that comes back is held up.
fn long_way(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), TcpStream::connect(to).unwrap());
            let (mut from_near, mut to_far) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            for stream in [&near, &far] {
                stream.set_nodelay(true).unwrap();
            }
            thread::spawn(move || {
                let _ = io::copy(&mut from_near, &mut to_far);
                let _ = to_far.shutdown(Shutdown::Write);
            });
            thread::spawn(move || come_back(far, near));
        }
    });
    address
}

fn come_back(mut far: TcpStream, mut near: TcpStream) {
    let (pieces, held) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        for (due, piece) in held {
            // This is what is measured.
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if near.write_all(&piece).is_err() {
                return;
            }
        }
        let _ = near.shutdown(Shutdown::Write);
    });
    let mut room = [0; 4096];
    for number in 0_u32.. {
        let Ok(length @ 1..) = far.read(&mut room) else { return };
        let due = Instant::now() + WAY + MORE * (number % 2);
        if pieces.send((due, room[..length].to_vec())).is_err() {
            return;
        }
    }
}

impl Views {
    /// Neither missed anything.
    fn assert_nothing_missed(&self) {
        let Self { page, ours, trips } = self;
        assert_eq!(
            (&page["sent"], &page["received"], &page["lost"]),
            (&json!(COUNT), &json!(COUNT), &json!(0))
        );
        assert_eq!(ours["lost"], json!({"forward": 0, "reverse": 0, "unknown": 0}), "{ours}");
        assert_eq!((&ours["received"], trips.len() as u64), (&ours["sent"], ours["sent"].as_u64().unwrap()));
        // A slot that this machine was too busy for was not asked.
        assert_eq!(trips.len() as u64 + ours["unsent"].as_u64().unwrap(), COUNT, "{ours}");
    }

    fn theirs(&self, name: &str) -> f64 {
        self.page["rtt_ms"][name].as_f64().unwrap()
    }

    /// Our largest, or some other share of our round trips.
    fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.trips.clone();
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

    /// RFC 3550 section 6.4.1, as the page has it.
    fn jitter(&self) -> f64 {
        let steps = self.trips.windows(2).map(|pair| (pair[1] - pair[0]).abs());
        steps.fold(0.0, |jitter, step| jitter + (step - jitter) / 16.0)
    }
}

#[test]
fn a_page_and_we_find_the_same() {
    let Some(page) = Peer::node("page.mjs") else { return };
    let views = both_measure(&page, |_| {});
    views.assert_nothing_missed();
    let way = WAY.as_secs_f64() * 1e3;
    let more = MORE.as_secs_f64() * 1e3;
    let (theirs, ours) = (views.theirs("median"), views.quantile(0.5));
    for median in [theirs, ours] {
        assert!(
            (way..way + 3.0 * more).contains(&median),
            "{median} ms over a way of {way} to {} ms",
            way + more
        );
    }
    assert!((theirs - ours).abs() < 2.0 * more, "{ours} ms, and the page {theirs} ms");
    // Of steps of `more` each the mean comes close to that, from below.
    for jitter in [views.jitter(), views.page["jitter_ms"].as_f64().unwrap()] {
        assert!(
            (more / 2.0..more * 3.0).contains(&jitter),
            "{jitter} ms of jitter where each step is {more} ms"
        );
    }
}

#[test]
fn a_page_and_we_see_a_server_that_stands_still_alike() {
    let Some(page) = Peer::node("page.mjs") else { return };
    let views = both_measure(&page, |agent| {
        agent.signal(Signal::SIGSTOP);
        // This is what is measured.
        thread::sleep(Duration::from_millis(1_500));
        agent.signal(Signal::SIGCONT);
    });
    views.assert_nothing_missed();
    let (theirs, ours) = (views.theirs("max"), views.quantile(1.0));
    for (whose, longest) in [("the page's", theirs), ("our", ours)] {
        assert!(longest > 1_000.0, "{whose} longest round trip was {longest} ms");
    }
    assert!((theirs - ours).abs() < 1_000.0, "the longest: {ours} ms, and the page's {theirs} ms");
    let ratio = (views.jitter() + 1.0) / (views.page["jitter_ms"].as_f64().unwrap() + 1.0);
    assert!((0.1..10.0).contains(&ratio), "jitter: {} ms, {}", views.jitter(), views.page);
}
